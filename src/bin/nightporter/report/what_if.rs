//! `nightporter report --what-if` for the terminal.

use std::fmt::Write;

use nightporter::{
    model::Profile,
    view::{WhatIf, WhatIfApp, WhatIfSpan},
};

use super::{
    grid::{Column, Grid, wrapped},
    units::{mib_hours, size},
};
use crate::render::{Style, clean, duration, profile};

/// Spans listed of one app.
const SPANS: usize = 12;

/// What would have been done, when, why, and what it would have saved.
pub(super) fn text(what_if: &WhatIf, style: Style) -> String {
    let mut text = wrapped(
        &format!(
            "What the profile tombstone would have done from {} to {}, in {} that were observed",
            clean(&what_if.since),
            clean(&what_if.until),
            plain(&super::units::hours(what_if.hours))
        ),
        style.width,
        0,
    );
    text.push('\n');
    text.push_str(&wrapped(&plain(&headline(what_if)), style.width, 0));
    if let Some(note) = unobserved(what_if) {
        text.push_str(&wrapped(&note, style.width, 0));
    }
    if what_if.apps.is_empty() {
        return text;
    }
    let apps = &what_if.apps;
    let column = |head, worth, pick: &dyn Fn(&WhatIfApp) -> String| {
        Column::new(head, worth, apps.iter().map(|app| plain(&pick(app))))
    };
    let mut grid = Grid::new(vec![
        column("APP", 9, &|app| app.name.clone()),
        column("FROZEN", 5, &|app| held(app, "frozen")).right(),
        column("PAGED OUT", 6, &|app| held(app, "reclaimed")).right(),
        column("ENDED", 7, &|app| held(app, "tombstone")).right(),
        column("WOULD SAVE", 8, &|app| mib_hours(app.saved_mib_hours)).right(),
    ]);
    grid.fit(style.width.unwrap_or(usize::MAX));
    let _ = write!(text, "\n{}", grid.text());
    for app in apps {
        let _ = writeln!(text, "\n{}", clean(&app.name));
        if let Some(reason) = &app.kept_by {
            text.push_str(&wrapped(
                &format!("  Kept awake most of the rest of the time: {}", clean(reason)),
                style.width,
                4,
            ));
        }
        let earlier = app.spans.len().saturating_sub(SPANS);
        if earlier > 0 {
            let _ = writeln!(text, "  {earlier} earlier ones are left out (--json has all)");
        }
        for span in app.spans.iter().skip(earlier) {
            text.push_str(&wrapped(&format!("  {}", plain(&line(span))), style.width, 4));
        }
        if app.spans.is_empty() {
            text.push_str("  Nothing would have been done.\n");
        }
    }
    text
}

/// What it comes to, in one sentence.
pub(super) fn headline(what_if: &WhatIf) -> String {
    match what_if.apps.iter().all(|app| app.spans.is_empty()) {
        true => "Nothing would have been done.".into(),
        false => format!(
            "Apps would have taken {} less on the mean ({}).",
            size(what_if.saved_mean),
            mib_hours(what_if.saved_mib_hours)
        ),
    }
}

/// What stands in the way of an answer.
pub(super) fn unobserved(what_if: &WhatIf) -> Option<String> {
    (what_if.profile != Profile::Observe).then(|| {
        format!(
            "The profile {} is in force now: only while it was observe could anything be observed.",
            profile(what_if.profile)
        )
    })
}

/// How long an app would have been in a state; `–` if never.
pub(super) fn held(app: &WhatIfApp, state: &str) -> String {
    let secs = app.spans.iter().filter(|span| span.state == state).map(|span| span.secs).fold(0, u64::saturating_add);
    if secs == 0 { "–".into() } else { duration(secs) }
}

/// What people say of a state an app would have been put in.
pub(super) fn done(state: &str) -> &str {
    match state {
        "reclaimed" => "paged out",
        "tombstone" => "ended",
        other => other,
    }
}

fn line(span: &WhatIfSpan) -> String {
    let saved = if span.saved == 0 { String::new() } else { format!(" ({} less)", size(span.saved)) };
    let (from, done, long) = (clean(&span.from), clean(done(&span.state)), duration(span.secs));
    format!("{from} {done} for {long}{saved}: {}", clean(&span.reason))
}

fn plain(text: &str) -> String {
    text.replace('\u{a0}', " ")
}
