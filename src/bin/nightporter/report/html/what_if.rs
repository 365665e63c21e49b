//! What would have been done under `observe`, app by app on one line of time.

use nightporter::view::{WhatIf, WhatIfApp, WhatIfSpan};

use super::{
    super::{
        series::Window,
        units::{self, mib_hours, parsed, size, when},
        what_if::{done, headline, unobserved},
    },
    chart::{axis, block, legend, picture},
    markup::Markup,
    scale::times,
};
use crate::render::duration;

/// Spans listed of one app; all are drawn.
const LISTED: usize = 50;

pub(super) fn section(page: &mut Markup, what_if: &WhatIf) {
    page.leaf("p", &[("class", &"claim")], headline(what_if));
    let mut told = format!(
        "The profile tombstone, as it would have acted in {} that were observed until {}. What paging out would have saved \
         is an estimate",
        units::hours(what_if.hours),
        when(&what_if.until)
    );
    if what_if.compression > 0.0 && what_if.compression.is_finite() {
        let known = if what_if.compression_measured { "is known" } else { "is only taken" };
        told.push_str(&format!(": zram {known} to hold {:.1} times its size", what_if.compression));
    }
    page.leaf("p", &[("class", &"note")], told + ".");
    if let Some(note) = unobserved(what_if) {
        page.leaf("p", &[("class", &"note")], note);
    }
    let (Some(from), Some(to)) = (parsed(&what_if.since), parsed(&what_if.until)) else { return };
    if what_if.apps.is_empty() || from >= to {
        return;
    }
    let window = Window { from, to };
    legend(page, &[("frozen", "frozen"), ("reclaimed", "paged out"), ("tombstone", "ended")]);
    let mut apps: Vec<&WhatIfApp> = what_if.apps.iter().collect();
    apps.sort_by(|a, b| b.saved_mib_hours.total_cmp(&a.saved_mib_hours));
    for app in &apps {
        row(page, app, window);
    }
    page.element("div", &[("class", &"row axis")], |page| {
        page.empty("div", &[]);
        page.element("div", &[], |page| axis(page, &times(window)));
    });
    page.element("details", &[], |page| {
        page.leaf("summary", &[], "When, why and how much");
        page.element("div", &[("class", &"scroll"), ("tabindex", &"0")], |page| list(page, &apps));
    });
}

fn row(page: &mut Markup, app: &WhatIfApp, window: Window) {
    page.element("div", &[("class", &"row")], |page| {
        page.element("div", &[("class", &"name")], |page| page.leaf("bdi", &[], &app.name));
        picture(page, &format!("When {} would have been held", app.name), &["bar"], |page| {
            block(page, "lane", 0.0, 1.0, "");
            for span in &app.spans {
                let Some(from) = parsed(&span.from) else { continue };
                let (begin, end) = (window.position(from), window.position(from.saturating_add(span.secs)));
                let class =
                    if ["frozen", "reclaimed"].contains(&span.state.as_str()) { &span.state } else { "tombstone" };
                block(page, class, begin, end - begin, &told(span));
            }
        });
        page.leaf("div", &[("class", &"figure")], mib_hours(app.saved_mib_hours));
        if let Some(reason) = &app.kept_by {
            page.leaf("div", &[("class", &"kept")], format_args!("Kept awake most of the rest of the time: {reason}"));
        }
    });
}

fn list(page: &mut Markup, apps: &[&WhatIfApp]) {
    let cells = |page: &mut Markup, cell: &'static str, texts: &[&str]| {
        page.element("tr", &[], |page| texts.iter().for_each(|text| page.leaf(cell, &[], text)));
    };
    page.element("table", &[], |page| {
        page.element("thead", &[], |page| cells(page, "th", &["App", "From", "What", "For", "Saved", "Why"]));
        page.element("tbody", &[], |page| {
            for app in apps {
                let earlier = app.spans.len().saturating_sub(LISTED);
                for span in app.spans.iter().skip(earlier) {
                    let (from, long, saved) = (when(&span.from), duration(span.secs), size(span.saved));
                    cells(page, "td", &[&app.name, &from, done(&span.state), &long, &saved, &span.reason]);
                }
                if earlier > 0 {
                    let more = format!("and {earlier} earlier");
                    cells(page, "td", &[&app.name, &more, "", "", "", ""]);
                }
            }
        });
    });
}

fn told(span: &WhatIfSpan) -> String {
    format!("{}: {} for {}: {}", when(&span.from), done(&span.state), duration(span.secs), span.reason)
}
