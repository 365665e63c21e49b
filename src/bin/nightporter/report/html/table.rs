//! All figures of all apps.

use nightporter::{
    model::Memory,
    view::{LedgerRow, Report},
};

use super::{
    super::{
        app_saved,
        units::{count, figure, float, mib_hours, millis, signed, when},
    },
    markup::Markup,
};

const HEAD: [(&str, &str); 13] = [
    ("App", ""),
    ("State", ""),
    ("Resident", "MiB"),
    ("Frozen", "MiB"),
    ("Paged out", "MiB"),
    ("Now", "MiB"),
    ("zram", "MiB"),
    ("Saved", "MiB"),
    ("Saved", "MiB·h"),
    ("Wakes", ""),
    ("Their CPU", ""),
    ("Faults", ""),
    ("Baseline of", ""),
];

pub(super) fn section(page: &mut Markup, report: &Report) {
    page.element("div", &[("class", &"scroll"), ("tabindex", &"0")], |page| {
        page.element("table", &[], |page| {
            page.element("thead", &[], |page| {
                page.element("tr", &[], |page| {
                    for (name, unit) in HEAD {
                        page.element("th", &[("scope", &"col")], |page| {
                            page.text(name);
                            if !unit.is_empty() {
                                page.empty("br", &[]);
                                page.leaf("small", &[], unit);
                            }
                        });
                    }
                });
            });
            page.element("tbody", &[], |page| {
                for app in &report.apps {
                    page.element("tr", &[], |page| {
                        page.element("th", &[("scope", &"row")], |page| page.leaf("bdi", &[], &app.name));
                        cells(report, app).iter().for_each(|cell| page.leaf("td", &[], cell));
                    });
                }
            });
        });
    });
}

fn cells(report: &Report, app: &LedgerRow) -> [String; HEAD.len() - 1] {
    let mib = |kib: u64| figure(float(kib) / 1024.0);
    let of = |memory: Option<Memory>| memory.map_or_else(|| "–".into(), |memory| mib(memory.pss));
    let saved = app_saved(report, app).map_or_else(|| "–".into(), signed);
    let mut baseline = app.measured.as_deref().map_or_else(|| "–".into(), when);
    if let Some(conditions) = &app.conditions {
        baseline.push_str(&format!(", {conditions}"));
    }
    [
        app.state.clone(),
        of(app.resident),
        of(app.frozen),
        of(app.paged_out),
        of(app.now),
        mib(app.zram),
        saved.replace("\u{a0}MiB", ""),
        mib_hours(app.saved_mib_hours).replace("\u{a0}MiB·h", ""),
        count(app.wakes),
        millis(app.wake_cpu_ms),
        count(app.wake_faults),
        baseline,
    ]
}
