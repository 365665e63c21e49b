//! The report as CSV (RFC 4180), sizes in KiB.

use nightporter::view::{AppAt, History, LedgerRow, Report, TotalAt};

use super::app_saved;

const APPS: [&str; 21] = [
    "app",
    "state",
    "resident_kib",
    "measured",
    "conditions",
    "frozen_kib",
    "paged_out_kib",
    "now_kib",
    "swap_kib",
    "charged_kib",
    "zram_kib",
    "zram_source",
    "saved_kib",
    "saved_mib_hours",
    "wakes",
    "wake_cpu_ms",
    "wake_faults",
    "profile",
    "cache_kib",
    "kernel_kib",
    "drift_kib",
];
const HISTORY: [&str; 13] = [
    "at",
    "span_s",
    "app",
    "state",
    "resident_kib",
    "now_kib",
    "zram_kib",
    "saved_kib",
    "daemon_kib",
    "apps_running",
    "connections",
    "connections_replaced",
    "messages",
];

/// One row an app.
pub(super) fn apps(report: &Report) -> String {
    let mut text = row(&APPS.map(str::to_owned));
    for app in &report.apps {
        text.push_str(&row(&of_app(report, app)));
    }
    text
}

/// One row for each time something was recorded, the oldest first; those without an app are totals.
pub(super) fn history(history: &History) -> String {
    let totals = history.totals.iter().map(|total| (total.at, of_total(total)));
    let apps =
        history.apps.iter().flat_map(|app| app.points.iter().map(|point| (point.at, of_point(&app.name, point))));
    let mut rows: Vec<_> = totals.chain(apps).collect();
    rows.sort_by_key(|(at, _)| *at);
    let mut text = row(&HISTORY.map(str::to_owned));
    for (_, cells) in rows {
        text.push_str(&row(&cells));
    }
    text
}

fn of_app(report: &Report, app: &LedgerRow) -> [String; APPS.len()] {
    [
        app.name.clone(),
        app.state.clone(),
        maybe(app.resident.map(|memory| memory.pss)),
        app.measured.clone().unwrap_or_default(),
        app.conditions.clone().unwrap_or_default(),
        maybe(app.frozen.map(|memory| memory.pss)),
        maybe(app.paged_out.map(|memory| memory.pss)),
        maybe(app.now.map(|memory| memory.pss)),
        maybe(app.now.map(|memory| memory.swap)),
        maybe(app.charged.map(|charged| charged.current)),
        app.zram.to_string(),
        app.zram_source.map(|source| format!("{source:?}").to_ascii_lowercase()).unwrap_or_default(),
        maybe(app_saved(report, app)),
        format!("{:.3}", app.saved_mib_hours),
        app.wakes.to_string(),
        app.wake_cpu_ms.to_string(),
        app.wake_faults.to_string(),
        crate::render::profile(report.profile).into(),
        app.cache.to_string(),
        app.kernel.to_string(),
        app.drift.to_string(),
    ]
}

fn of_total(row: &TotalAt) -> [String; HISTORY.len()] {
    let total = &row.total;
    [
        time(row.at),
        row.span.to_string(),
        String::new(),
        String::new(),
        total.resident.to_string(),
        total.now.to_string(),
        total.zram.to_string(),
        String::new(),
        total.daemon.to_string(),
        total.running.to_string(),
        total.connections.to_string(),
        total.replaced.to_string(),
        total.messages.to_string(),
    ]
}

fn of_point(name: &str, point: &AppAt) -> [String; HISTORY.len()] {
    let mut cells: [String; HISTORY.len()] = Default::default();
    cells[0] = time(point.at);
    cells[1] = point.span.to_string();
    cells[2] = name.to_owned();
    cells[3] = point.state.clone();
    cells[5] = maybe(point.pss);
    cells[6] = point.zram.to_string();
    cells[7] = maybe(point.saved);
    cells
}

fn time(secs: u64) -> String {
    nightporter::time::UnixTime::from_secs(secs).to_string()
}

fn maybe(figure: Option<impl ToString>) -> String {
    figure.map(|figure| figure.to_string()).unwrap_or_default()
}

fn row(cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| quoted(cell)).collect();
    cells.join(",") + "\r\n"
}

fn quoted(cell: &str) -> String {
    match cell.contains(['"', ',', '\r', '\n']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.to_owned(),
    }
}
