//! `nightporter report`: what the daemon's ledger says, for people, spreadsheets, browsers and Prometheus.
//!
//! Everything below is a pure function from the daemon's documents to text, but for `output`, which writes a file.

mod csv;
mod grid;
mod html;
mod openmetrics;
mod output;
mod series;
mod text;
mod units;
mod what_if;

use nightporter::{
    model::Profile,
    view::{History, LedgerRow, Report, WhatIf},
};
use serde::de::DeserializeOwned;

use crate::{
    args,
    client::{self, Daemon},
    exit::{Exit, Failure},
    render::Style,
};

/// Does the command and gives back what to print.
pub(crate) fn run(daemon: &Daemon, args: &args::Report, style: Style) -> Result<String, Failure> {
    let file = match (&args.output, &args.html) {
        (Some(_), Some(html)) if html.as_os_str() != "-" => {
            return Err(Failure::new(Exit::Usage, "two files were named: with --html or with --output, not both"));
        }
        (Some(file), _) => Some(file),
        (None, Some(html)) if html.as_os_str() != "-" => Some(html),
        _ => None,
    };
    // A file is read by others, whatever the terminal is like.
    let style = if file.is_some() { Style { bars: false, width: None } } else { style };
    let text = made(daemon, args, style)?;
    match file {
        Some(file) => output::write(file, text.as_bytes()).map(|()| String::new()),
        None => Ok(text),
    }
}

fn made(daemon: &Daemon, args: &args::Report, style: Style) -> Result<String, Failure> {
    let hours = args.hours;
    if args.html.is_some() {
        let (report, history) = (measured(daemon)?, past(daemon, hours));
        let what_if = args.what_if.then(|| asked::<WhatIf>(daemon, "WhatIf", hours)).transpose()?;
        return Ok(html::page(&report, history.as_ref().map_err(String::as_str), what_if.as_ref(), hours));
    }
    if args.openmetrics {
        return Ok(openmetrics::text(&measured(daemon)?));
    }
    match (args.what_if, args.history, args.json, args.csv) {
        (true, _, true, _) => asked_text(daemon, "WhatIf", hours).map(line),
        (true, ..) => asked(daemon, "WhatIf", hours).map(|document| what_if::text(&document, style)),
        (_, true, true, _) => asked_text(daemon, "History", hours).map(line),
        (_, true, ..) => asked(daemon, "History", hours).map(|document| csv::history(&document)),
        (_, _, true, _) => daemon.ask("Report", None).map(line),
        (_, _, _, true) => measured(daemon).map(|report| csv::apps(&report)),
        _ => {
            let (report, history) = (measured(daemon)?, past(daemon, hours));
            Ok(text::report(&report, history.as_ref().map_err(String::as_str), hours, style))
        }
    }
}

fn measured(daemon: &Daemon) -> Result<Report, Failure> {
    client::decode(&daemon.ask("Report", None)?)
}

/// The history, or why there is none: a report is worth something without.
fn past(daemon: &Daemon, hours: u32) -> Result<History, String> {
    asked(daemon, "History", hours).map_err(|failure| failure.text)
}

fn asked<T: DeserializeOwned>(daemon: &Daemon, method: &str, hours: u32) -> Result<T, Failure> {
    client::decode(&asked_text(daemon, method, hours)?)
}

fn asked_text(daemon: &Daemon, method: &str, hours: u32) -> Result<String, Failure> {
    daemon.ask_hours(method, hours)?.ok_or_else(|| {
        let text = "the daemon that runs is older than this nightporter and keeps no history of the ledger; restart it \
                    (systemctl restart nightporterd, or nightporterd --user)";
        Failure::new(Exit::Protocol, text)
    })
}

fn line(text: String) -> String {
    text + "\n"
}

/// What the report may claim: under `observe` no app is touched, so that what apps shrank by themselves is not ours, and only
/// our own cost is left.
fn saved(report: &Report) -> i64 {
    match report.profile {
        Profile::Observe => 0i64.saturating_sub_unsigned(own_cost(report)),
        Profile::Tombstone | Profile::Cached => report.saved,
    }
}

/// [`saved`] of one app; none where that is not known.
fn app_saved(report: &Report, row: &LedgerRow) -> Option<i64> {
    row.saved.filter(|_| report.profile != Profile::Observe)
}

/// What the daemon costs, its sockets included. KiB.
fn own_cost(report: &Report) -> u64 {
    report.daemon.pss.saturating_add(report.sockets)
}

/// What an app was measured at, KiB; none where it was not.
fn resident(row: &LedgerRow) -> Option<u64> {
    row.resident.map(|memory| memory.pss)
}

/// What an app costs now, KiB; none where it is not known.
fn now(row: &LedgerRow) -> Option<u64> {
    row.now.map(|memory| memory.pss)
}
