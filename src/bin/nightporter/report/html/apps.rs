//! One bar an app: what it cost resident, and what is left of that.

use nightporter::{
    model::Profile,
    view::{LedgerRow, Report},
};

use super::{
    super::{
        app_saved, now, resident,
        units::{float, signed, size},
    },
    chart::{block, legend, picture},
    markup::Markup,
};

/// Beyond these the rest is folded away.
const SHOWN: usize = 24;

pub(super) fn section(page: &mut Markup, report: &Report) {
    if report.apps.is_empty() {
        page.leaf("p", &[("class", &"none")], "No app has registered yet.");
        return;
    }
    let mut entries = vec![("now", "now"), ("zram", "in zram"), ("baseline", "resident")];
    if report.profile != Profile::Observe {
        entries.insert(2, ("saved", "saved"));
    }
    legend(page, &entries);
    let mut rows: Vec<&LedgerRow> = report.apps.iter().collect();
    rows.sort_by_key(|row| std::cmp::Reverse(extent(row)));
    let whole = float(rows.first().map_or(0, |row| extent(row))).max(1.0);
    let (shown, folded) = rows.split_at(SHOWN.min(rows.len()));
    shown.iter().for_each(|row| bar(page, report, row, whole));
    if !folded.is_empty() {
        page.element("details", &[], |page| {
            page.leaf("summary", &[], format_args!("{} more", folded.len()));
            folded.iter().for_each(|row| bar(page, report, row, whole));
        });
    }
}

fn bar(page: &mut Markup, report: &Report, row: &LedgerRow, whole: f64) {
    let (before, after) = (resident(row), now(row));
    page.element("div", &[("class", &"row")], |page| {
        page.element("div", &[("class", &"name")], |page| {
            page.leaf("bdi", &[], &row.name);
            page.text(" ");
            page.leaf("small", &[], &row.state);
        });
        let told = told(report, row);
        picture(page, &told, &["bar"], |page| {
            let part = |kib: u64| float(kib) / whole;
            if let Some(before) = before {
                block(page, "baseline", 0.0, part(before), &told);
            }
            let held = part(after.unwrap_or(0));
            block(page, "now", 0.0, held, &told);
            block(page, "zram", held, part(row.zram), &told);
            // What is left up to resident is page cache, which would have gone or stayed without us as well.
            if let Some(saved) = app_saved(report, row).and_then(|saved| u64::try_from(saved).ok()) {
                let from = held + part(row.zram);
                block(page, "saved", from, part(saved).min((1.0 - from).max(0.0)), &told);
            }
        });
        page.element("div", &[("class", &"figure")], |page| match (before, after) {
            (Some(before), Some(after)) => {
                page.text(format_args!("{} → ", size(before)));
                page.leaf("b", &[], size(after.saturating_add(row.zram)));
            }
            (None, Some(after)) => {
                page.text("no baseline, ");
                page.leaf("b", &[], size(after.saturating_add(row.zram)));
            }
            (Some(before), None) => page.text(format_args!("{} → not known", size(before))),
            (None, None) => page.text("not measured yet"),
        });
    });
}

fn told(report: &Report, row: &LedgerRow) -> String {
    let size = |kib: Option<u64>| kib.map_or_else(|| "not known".into(), size);
    let mut text = format!("{}: resident {}, now {}", row.name, size(resident(row)), size(now(row)));
    if row.zram > 0 {
        text.push_str(&format!(", in zram {}", size(Some(row.zram))));
    }
    if let Some(saved) = app_saved(report, row) {
        text.push_str(&format!(", saved {}", signed(saved)));
    }
    text
}

/// How far its bar goes.
fn extent(row: &LedgerRow) -> u64 {
    let after = now(row).unwrap_or(0).saturating_add(row.zram);
    resident(row).unwrap_or(0).max(after)
}
