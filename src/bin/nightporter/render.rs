//! Turns the daemon's documents into text for people: aligned tables, sizes in MiB, rough durations.

use std::{
    fmt::Write,
    io::{IsTerminal, stdout},
};

use nightporter::{
    model::{Freezer, Memory, Profile},
    view::{App, Lease, LinkState, Log, LogEntry, Show, Status, Upstream, Why},
};

/// How text may look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    /// Draw bars and use colours: only for eyes, so only on a terminal and without NO_COLOR (no-color.org).
    pub(crate) bars: bool,
    /// Columns of the terminal; none where it is not one, or does not say.
    pub(crate) width: Option<usize>,
}

impl Style {
    /// What fits standard output.
    pub(crate) fn of_stdout() -> Self {
        let terminal = stdout().is_terminal();
        let size = if terminal { rustix::termios::tcgetwinsize(stdout()).ok() } else { None };
        Self {
            bars: terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            width: size.map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0),
        }
    }
}

/// `nightporter status`.
pub(crate) fn status(status: &Status) -> String {
    let mut text = format!("Night Porter {}, profile {}", clean(&status.version), profile(status.profile));
    if status.profile == Profile::Observe {
        text.push_str(" (decides and measures, touches nothing)");
    }
    text.push_str("\n\n");
    let mut table = Table::new(["", ""]);
    for (index, upstream) in status.upstreams.iter().enumerate() {
        let default = index == 0 && status.upstreams.len() > 1;
        let [first, rest @ ..] = &upstream_lines(upstream, default)[..] else { continue };
        table.row(["Upstream".into(), first.clone()]);
        for line in rest {
            table.row([String::new(), line.clone()]);
        }
    }
    let counts = &status.messages;
    table.row(["Buses".into(), if status.buses.is_empty() { "none".into() } else { status.buses.join(", ") }]);
    table.row(["Apps".into(), format!("{}, {} registrations", status.apps, status.registrations)]);
    table.row([
        "Messages".into(),
        format!("{} received, {} accepted, {} waiting", counts.received, counts.accepted, status.messages_waiting),
    ]);
    let ended: Vec<String> = [
        (counts.duplicates, "duplicates"),
        (counts.expired, "expired"),
        (counts.replaced, "replaced"),
        (counts.given_up, "given up"),
        (counts.overflowed, "dropped from full queues"),
        (counts.unregistered, "for registrations gone"),
        (counts.unusable, "unusable"),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, what)| format!("{count} {what}"))
    .collect();
    if !ended.is_empty() {
        table.row([String::new(), ended.join(", ")]);
    }
    if let Some(reason) = &status.min_urgency_reason {
        table.row(["Urgency".into(), reason.clone()]);
    }
    if let Some(pressure) = &status.pressure {
        table.row(["Memory".into(), pressure.reason.clone()]);
        if pressure.paged_out + pressure.ended > 0 {
            let done = format!("{} page-outs and {} ended apps for want of it", pressure.paged_out, pressure.ended);
            table.row([String::new(), done]);
        }
    }
    text.push_str(&table.body());
    for trouble in &status.troubles {
        let _ = write!(text, "\n! {}\n", clean(trouble));
    }
    text
}

/// `nightporter apps`.
pub(crate) fn apps(apps: &[App]) -> String {
    if apps.is_empty() {
        return "No app has registered yet.\n".into();
    }
    let mut table = Table::new(["APP", "STATE", "SINCE", "PID", "REGISTRATIONS", "WAITING", "WHY"]).right(&[3, 4, 5]);
    for app in apps {
        table.row([
            app.name.clone(),
            app.state.clone(),
            duration(app.since_secs),
            app.pid.map_or_else(|| "–".into(), |pid| pid.to_string()),
            app.registrations.to_string(),
            app.waiting.to_string(),
            app.reason.clone(),
        ]);
    }
    table.to_text()
}

/// `nightporter show APP`.
pub(crate) fn show(show: &Show) -> String {
    let app = &show.app;
    let mut table = Table::new(["", ""]);
    table.row(["App".into(), app.name.clone()]);
    table.row(["Bus".into(), app.bus.clone()]);
    table.row(["State".into(), format!("{} for {}: {}", app.state, duration(app.since_secs), app.reason)]);
    table.row(["Process".into(), app.pid.map_or_else(|| "not running".into(), |pid| pid.to_string())]);
    if let Some(freezer) = show.freezer {
        table.row(["Freezer".into(), freezer_text(freezer).into()]);
    }
    if let Some(protected) = &show.protected {
        table.row(["Never touched".into(), protected.clone()]);
    }
    let held = if app.held == 0 { String::new() } else { format!(", {} held for want of urgency", app.held) };
    table.row(["Waiting".into(), format!("{} messages{held}", app.waiting)]);
    for lease in &show.leases {
        table.row([format!("Lease {}", lease.id), lease_text(lease)]);
    }
    let memory = &show.memory;
    let baseline = match (&memory.resident, &memory.measured) {
        (Some(resident), Some(at)) => format!("{} (measured {at})", mib(resident.pss)),
        (Some(resident), None) => mib(resident.pss),
        (None, _) => "not measured yet".into(),
    };
    table.row(["Memory resident".into(), baseline]);
    for (name, memory) in [("frozen", memory.frozen), ("paged out", memory.paged_out), ("now", memory.now)] {
        if let Some(memory) = memory {
            table.row([format!("Memory {name}"), memory_text(memory)]);
        }
    }
    if let Some(saved) = memory.saved {
        table.row(["Saved".into(), mib_signed(saved)]);
    }
    let mut text = table.body();
    text.push('\n');
    if show.registered.is_empty() {
        text.push_str("No registrations.\n");
        return text;
    }
    let mut table = Table::new(["REGISTRATION", "FOR", "UPSTREAM", "VERSION", "VAPID", "WAITING"]).right(&[3, 5]);
    for one in &show.registered {
        table.row([
            one.token.clone(),
            one.description.clone(),
            one.upstream.clone(),
            one.version.to_string(),
            if one.vapid { "yes" } else { "no" }.into(),
            one.waiting.to_string(),
        ]);
    }
    text.push_str(&table.to_text());
    text
}

/// `nightporter leases`.
pub(crate) fn leases(leases: &[Lease]) -> String {
    if leases.is_empty() {
        return "No leases are held.\n".into();
    }
    let mut table = Table::new(["ID", "APP", "KIND", "HELD", "LEFT", "FOR"]).right(&[0]);
    for lease in leases {
        table.row([
            lease.id.to_string(),
            lease.app.clone(),
            lease_kind(lease),
            duration(lease.since_secs),
            lease_left(lease),
            lease.reason.clone(),
        ]);
    }
    table.to_text()
}

fn lease_text(lease: &Lease) -> String {
    let left = match lease.left_secs {
        Some(_) => format!(", {} left", lease_left(lease)),
        None => String::new(),
    };
    format!("{} for {}{left}: {}", lease_kind(lease), duration(lease.since_secs), lease.reason)
}

fn lease_kind(lease: &Lease) -> String {
    match lease.kind == lease.counts_as {
        true => lease.kind.as_str().into(),
        false => format!("{}, counts as {}", lease.kind.as_str(), lease.counts_as.as_str()),
    }
}

/// Its time stands still while the app is in the foreground.
fn lease_left(lease: &Lease) -> String {
    match (lease.left_secs, lease.counting) {
        (None, _) => "–".into(),
        (Some(left), true) => duration(left),
        (Some(left), false) => format!("{} of background", duration(left)),
    }
}

/// `nightporter why APP`: one line a decision.
pub(crate) fn why(why: &Why) -> String {
    let mut text = format!("{}: {}\n", clean(&why.name), clean(&why.state));
    if why.decisions.is_empty() {
        text.push_str("Nothing has been decided about it yet.\n");
        return text;
    }
    let mut table = Table::new(["", "", ""]);
    for decision in &why.decisions {
        table.row([decision.at.clone(), decision.verdict.clone(), decision.reason.clone()]);
    }
    text.push_str(&table.body());
    text
}

/// `nightporter log`: one line a decision.
pub(crate) fn log(log: &Log) -> String {
    if log.entries.is_empty() {
        return "Nothing has been decided yet.\n".into();
    }
    let mut table = Table::new(["", "", "", ""]);
    for LogEntry { name, decision, .. } in &log.entries {
        table.row([decision.at.clone(), name.clone(), decision.verdict.clone(), decision.reason.clone()]);
    }
    table.body()
}

/// One line of `nightporter log --follow`.
pub(crate) fn log_line(entry: &LogEntry) -> String {
    let LogEntry { name, decision, .. } = entry;
    format!("{}  {}  {}  {}\n", clean(&decision.at), clean(name), clean(&decision.verdict), clean(&decision.reason))
}

/// KiB as MiB.
pub(crate) fn mib(kib: u64) -> String {
    mib_signed(i64::try_from(kib).unwrap_or(i64::MAX))
}

/// KiB as MiB, with a sign when negative.
pub(crate) fn mib_signed(kib: i64) -> String {
    // Exact: no memory of this world has 2^53 KiB.
    #[expect(clippy::cast_precision_loss, reason = "rounded to a tenth of a MiB anyway")]
    let mib = kib as f64 / 1024.0;
    format!("{mib:.1} MiB")
}

/// How an app is frozen, in words.
pub(crate) const fn freezer_text(freezer: Freezer) -> &'static str {
    match freezer {
        Freezer::Cgroup2 => "cgroup v2 (cgroup.freeze)",
        Freezer::Signal => "signal (SIGSTOP)",
    }
}

/// Text from elsewhere made safe for a terminal: an app's description must not move the cursor.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Columns padded to their widest cell.
pub(crate) struct Table<const N: usize> {
    head: [&'static str; N],
    rows: Vec<[String; N]>,
    right: Vec<usize>,
}

impl<const N: usize> Table<N> {
    pub(crate) const fn new(head: [&'static str; N]) -> Self {
        Self { head, rows: Vec::new(), right: Vec::new() }
    }

    /// Aligns these columns to the right.
    pub(crate) fn right(mut self, columns: &[usize]) -> Self {
        self.right = columns.to_vec();
        self
    }

    pub(crate) fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| clean(&cell)));
    }

    /// Head and rows.
    pub(crate) fn to_text(&self) -> String {
        let mut text = String::new();
        self.line(&mut text, &self.head.map(str::to_owned));
        text + &self.body()
    }

    /// The rows alone.
    pub(crate) fn body(&self) -> String {
        let mut text = String::new();
        for row in &self.rows {
            self.line(&mut text, row);
        }
        text
    }

    fn line(&self, text: &mut String, cells: &[String; N]) {
        let start = text.len();
        for (column, cell) in cells.iter().enumerate() {
            let padding = self.width(column) - cell.chars().count();
            if column > 0 {
                text.push_str("  ");
            }
            if self.right.contains(&column) {
                text.extend(std::iter::repeat_n(' ', padding));
                text.push_str(cell);
            } else {
                text.push_str(cell);
                text.extend(std::iter::repeat_n(' ', padding));
            }
        }
        text.truncate(start + text[start..].trim_end().len());
        text.push('\n');
    }

    fn width(&self, column: usize) -> usize {
        let cells = self.rows.iter().map(|row| row[column].as_str());
        cells.chain([self.head[column]]).map(|cell| cell.chars().count()).max().unwrap_or(0)
    }
}

/// One upstream, a fact a line: a phone's terminal is narrow.
fn upstream_lines(upstream: &Upstream, default: bool) -> Vec<String> {
    let since = duration(upstream.since_secs);
    let state = match (upstream.state, upstream.retry_in_secs) {
        (LinkState::Off, _) => format!("off while roaming, for {since}"),
        (LinkState::Idle, _) => format!("idle for {since}"),
        (LinkState::Connecting, _) => format!("connecting for {since}"),
        (LinkState::Online, _) => format!("online for {since}"),
        (LinkState::Waiting, Some(secs)) => format!("waiting for {since}, next try in {}", duration(secs)),
        (LinkState::Waiting, None) => format!("waiting for {since}"),
    };
    let default = if default { ", the default" } else { "" };
    let mut lines = vec![format!("{} ({}{default}): {state}", upstream.name, upstream.kind)];
    lines.push(match upstream.registrations {
        0 => "no registrations".into(),
        1 => "1 registration".into(),
        count => format!("{count} registrations"),
    });
    if let Some(secs) = upstream.heartbeat_secs {
        let by = match upstream.heartbeat_by.as_deref() {
            Some("server") => ", set by the server",
            Some("client") => ", learned for this network",
            _ => "",
        };
        lines.push(format!("heartbeat every {}{by}", interval(secs)));
    }
    lines.extend(upstream.last_error.as_ref().map(|error| format!("last error: {error}")));
    lines
}

/// The profile's name, as in the configuration.
pub(crate) const fn profile(profile: Profile) -> &'static str {
    match profile {
        Profile::Tombstone => "tombstone",
        Profile::Cached => "cached",
        Profile::Observe => "observe",
    }
}

fn memory_text(memory: Memory) -> String {
    match memory.swap {
        0 => mib(memory.pss),
        swap => format!("{} and {} swapped out", mib(memory.pss), mib(swap)),
    }
}

/// A duration as people say it: its two largest units at most.
pub(crate) fn duration(secs: u64) -> String {
    match secs {
        0..60 => format!("{secs} s"),
        60..3600 => format!("{} min", secs / 60),
        3600..86_400 if secs % 3600 < 60 => format!("{} h", secs / 3600),
        3600..86_400 => format!("{} h {} min", secs / 3600, secs % 3600 / 60),
        _ if secs % 86_400 < 3600 => format!("{} d", secs / 86_400),
        _ => format!("{} d {} h", secs / 86_400, secs % 86_400 / 3600),
    }
}

/// A rhythm, exactly: 270 s is not 4 min.
fn interval(secs: u64) -> String {
    match (secs / 60, secs % 60) {
        (0, secs) => format!("{secs} s"),
        (min, 0) => format!("{min} min"),
        (min, secs) => format!("{min} min {secs} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_say_them() {
        let told: Vec<String> = [0, 59, 60, 185, 3600, 7500, 86_400, 90_000].map(duration).into();
        assert_eq!(told, ["0 s", "59 s", "1 min", "3 min", "1 h", "2 h 5 min", "1 d", "1 d 1 h"]);
    }

    #[test]
    fn an_upstream_is_told_in_full() {
        let mut upstream = Upstream {
            name: "home".into(),
            kind: "ntfy".into(),
            state: LinkState::Online,
            since_secs: 7500,
            retry_in_secs: None,
            last_error: None,
            registrations: 1,
            heartbeat_secs: Some(45),
            heartbeat_by: Some("server".into()),
        };
        assert_eq!(
            upstream_lines(&upstream, true),
            [
                "home (ntfy, the default): online for 2 h 5 min",
                "1 registration",
                "heartbeat every 45 s, set by the server"
            ]
        );
        upstream = Upstream {
            state: LinkState::Waiting,
            since_secs: 3,
            retry_in_secs: Some(12),
            last_error: Some("cannot connect".into()),
            registrations: 0,
            heartbeat_secs: Some(270),
            heartbeat_by: Some("client".into()),
            ..upstream
        };
        assert_eq!(
            upstream_lines(&upstream, false),
            [
                "home (ntfy): waiting for 3 s, next try in 12 s",
                "no registrations",
                "heartbeat every 4 min 30 s, learned for this network",
                "last error: cannot connect"
            ]
        );
        assert_eq!([interval(300), interval(59)], ["5 min", "59 s"]);
    }

    #[test]
    fn columns_line_up_and_control_characters_stay_out() {
        let mut table = Table::new(["A", "B"]).right(&[1]);
        table.row(["long".into(), "1".into()]);
        table.row(["x\u{1b}[2J".into(), "100".into()]);
        assert_eq!(table.to_text(), "A        B\nlong     1\nx\u{fffd}[2J  100\n");
    }

    #[test]
    fn sizes() {
        assert_eq!(mib(1536), "1.5 MiB");
        assert_eq!(mib_signed(-512), "-0.5 MiB");
    }
}
