//! The report as OpenMetrics 1.0 text (github.com/prometheus/OpenMetrics).
//!
//! node_exporter reads it with the parser of Prometheus's older text format: so only types both know, and no timestamps.

use std::{collections::BTreeMap, fmt::Write};

use nightporter::view::{LedgerRow, Report};

use super::{app_saved, own_cost, saved, units::parsed};

/// A size of an app in bytes, where it is known.
type Size = fn(&Report, &LedgerRow) -> Option<i128>;

/// All of it, with the `# EOF` that says it is whole.
pub(super) fn text(report: &Report) -> String {
    let mut text = Text::default();
    totals(&mut text, report);
    apps(&mut text, report);
    account(&mut text, report);
    text.text + "# EOF\n"
}

fn totals(text: &mut Text, report: &Report) {
    let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
    if let Some(at) = parsed(&report.at) {
        text.family("report_timestamp", "gauge", "seconds", "When the figures were measured.").sample(&[], at);
    }
    text.family("profile", "gauge", "", "1 for the profile in force; under observe nothing is saved.")
        .sample(&[("profile", crate::render::profile(report.profile))], 1);
    text.family("apps", "gauge", "", "Apps known.").sample(&[], count(report.apps.len()));
    text.family("apps_unmeasured", "gauge", "", "Apps without a baseline, which count neither way.")
        .sample(&[], count(report.unmeasured));
    for (name, help, kib) in [
        ("resident", "What the apps with a baseline cost resident, all together.", report.resident),
        ("memory", "What those apps cost now, all together (PSS).", report.now),
        ("daemon_memory", "What the daemon costs (PSS).", report.daemon.pss),
        ("daemon_sockets", "Kernel memory of the daemon's sockets.", report.sockets),
        ("own_cost", "What the daemon costs, its sockets included.", own_cost(report)),
    ] {
        text.family(name, "gauge", "bytes", help).sample(&[], bytes(kib));
    }
    let source = report.zram_source.map(|source| format!("{source:?}").to_ascii_lowercase()).unwrap_or_default();
    text.family("zram", "gauge", "bytes", "Real memory behind what was paged out; source: measured, or by ratio.")
        .sample(&[("source", &source)], bytes(report.zram));
    for (name, help, kib) in [
        ("cache", "Pages of files among what the apps cost less now: not counted as saved.", report.cache),
        ("kernel", "Kernel memory the apps are charged less than resident.", report.kernel),
        ("drift", "What apps that run cost less than resident by their own doing: not counted as saved.", report.drift),
    ] {
        text.family(name, "gauge", "bytes", help).sample(&[], signed_bytes(kib));
    }
    text.family("saved", "gauge", "bytes", "Saved now, the daemon's own cost taken off; negative where that is more.")
        .sample(&[], signed_bytes(saved(report)));
}

/// Several users may have the same app: their figures are one series, or the exposition would name it twice.
fn apps(text: &mut Text, report: &Report) {
    let mut rows: BTreeMap<&str, Vec<&LedgerRow>> = BTreeMap::new();
    for row in &report.apps {
        rows.entry(&row.name).or_default().push(row);
    }
    let sizes: [(&str, &str, Size); 4] = [
        ("app_resident", "The baseline: in the background and idle, before the first freeze.", |_, row| {
            super::resident(row).map(bytes)
        }),
        ("app_memory", "What the app costs now (PSS); 0 when it is not running.", |_, row| super::now(row).map(bytes)),
        ("app_zram", "The app's share of zram's real memory.", |_, row| Some(bytes(row.zram))),
        ("app_saved", "Saved on the app now.", |report, row| app_saved(report, row).map(signed_bytes)),
    ];
    for (name, help, figure) in sizes {
        let family = text.family(name, "gauge", "bytes", help);
        for (app, rows) in &rows {
            let known: Vec<i128> = rows.iter().filter_map(|row| figure(report, row)).collect();
            if !known.is_empty() {
                family.sample(&[("app", app)], known.iter().sum::<i128>());
            }
        }
    }
    let family = text.family("app_state", "gauge", "", "How many instances of the app are in this lifecycle state.");
    for (app, rows) in &rows {
        let mut states: BTreeMap<&str, u32> = BTreeMap::new();
        rows.iter().for_each(|row| *states.entry(&row.state).or_default() += 1);
        for (state, count) in states {
            family.sample(&[("app", app), ("state", state)], count);
        }
    }
    let family = text.family("app_wakes", "counter", "", "Times the app was woken for a message.");
    for (app, rows) in &rows {
        family.sample(&[("app", app)], total(rows, |row| row.wakes));
    }
    let family = text.family("app_wake_cpu_seconds", "counter", "seconds", "Processor time these wakes cost.");
    for (app, rows) in &rows {
        family.sample(&[("app", app)], seconds(total(rows, |row| row.wake_cpu_ms)));
    }
    let family = text.family("app_wake_faults", "counter", "", "Major page faults these wakes cost.");
    for (app, rows) in &rows {
        family.sample(&[("app", app)], total(rows, |row| row.wake_faults));
    }
}

fn account(text: &mut Text, report: &Report) {
    let Some(account) = &report.account else { return };
    if let Some(since) = parsed(&account.since) {
        text.family("account_start_timestamp", "gauge", "seconds", "When the daemon began to count.")
            .sample(&[], since);
    }
    // A gauge: it falls while the daemon costs more than it saves.
    text.family("saved_mib_hours", "gauge", "", "Memory saved, times how long, since then.")
        .sample(&[], decimal(account.saved_mib_hours));
    text.family("connections", "gauge", "", "Upstream connections held now.").sample(&[], account.connections);
    text.family("connections_replaced", "gauge", "", "Connections the apps would hold by themselves.")
        .sample(&[], account.connections_replaced);
    text.family("heartbeats", "counter", "", "Heartbeats on our connections, computed from their rhythm.")
        .sample(&[], account.heartbeats);
    text.family("heartbeats_replaced", "counter", "", "Heartbeats the apps' own connections would have cost.")
        .sample(&[], account.heartbeats_replaced);
    text.family("daemon_cpu_seconds", "counter", "seconds", "Processor time of the daemon.")
        .sample(&[], seconds(account.daemon_cpu_ms));
    let family = text.family("deliveries", "counter", "", "Messages that reached apps, by the state those were in.");
    for wakes in &account.wakes {
        family.sample(&[("from", &wakes.from)], wakes.count);
    }
    // No summary: node_exporter would make up a sum for it.
    let help = "From a message's arrival to its app's acceptance; percentile 100 is the slowest.";
    let family = text.family("delivery_latency", "gauge", "seconds", help);
    for wakes in &account.wakes {
        for (percentile, ms) in [("50", wakes.p50_ms), ("95", wakes.p95_ms), ("100", wakes.max_ms)] {
            family.sample(&[("from", &wakes.from), ("percentile", percentile)], seconds(u64::from(ms)));
        }
    }
    let family =
        text.family("delivery_cpu_seconds", "counter", "seconds", "Processor time apps used for these messages.");
    for wakes in &account.wakes {
        family.sample(&[("from", &wakes.from)], seconds(wakes.cpu_ms));
    }
    let family = text.family("delivery_faults", "counter", "", "Major page faults of apps for these messages.");
    for wakes in &account.wakes {
        family.sample(&[("from", &wakes.from)], wakes.faults);
    }
}

/// The exposition so far; samples belong to the family begun last.
#[derive(Debug, Default)]
struct Text {
    text: String,
    name: String,
    suffix: &'static str,
}

impl Text {
    fn family(&mut self, name: &str, kind: &'static str, unit: &str, help: &str) -> &mut Self {
        let ends_in_unit = unit.is_empty() || name.ends_with(unit);
        let name = if ends_in_unit { format!("nightporter_{name}") } else { format!("nightporter_{name}_{unit}") };
        let _ = writeln!(self.text, "# TYPE {name} {kind}");
        if !unit.is_empty() {
            let _ = writeln!(self.text, "# UNIT {name} {unit}");
        }
        let _ = writeln!(self.text, "# HELP {name} {}", escaped(help));
        (self.name, self.suffix) = (name, if kind == "counter" { "_total" } else { "" });
        self
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: impl ToString) {
        let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.text, "{}{}{labels} {}", self.name, self.suffix, value.to_string());
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n").replace('\r', "\u{fffd}")
}

fn bytes(kib: u64) -> i128 {
    i128::from(kib) * 1024
}

fn signed_bytes(kib: i64) -> i128 {
    i128::from(kib) * 1024
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

fn total(rows: &[&LedgerRow], figure: fn(&LedgerRow) -> u64) -> u64 {
    rows.iter().map(|row| figure(row)).fold(0, u64::saturating_add)
}

fn decimal(value: f64) -> String {
    if value.is_finite() { format!("{value:.3}") } else { "0".into() }
}
