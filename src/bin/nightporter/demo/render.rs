//! The demo's result for people: first what a phone's owner wants to know.

use std::fmt::Write;

use super::Story;
use crate::render::{Table, freezer_text, mib, mib_signed};

pub(super) fn story(story: &Story) -> String {
    let figures = &story.figures;
    let memory = &figures.memory_kib;
    let mut text = format!("{} apps, {:.0} s\n\n", figures.apps, figures.seconds);

    let mut table = Table::new(["", "each app on its own", "through Night Porter"]).right(&[1, 2]);
    let connections = &figures.upstream_connections;
    table.row([
        "Connections to the push server".into(),
        connections.resident.to_string(),
        connections.shared.to_string(),
    ]);
    let after = memory.shared_pss + memory.daemon_pss + memory.zram;
    table.row(["Memory".into(), mib(memory.resident_pss), mib(after)]);
    table.row(["  apps".into(), mib(memory.resident_pss), mib(memory.shared_pss)]);
    table.row(["  Night Porter".into(), "–".into(), mib(memory.daemon_pss)]);
    table.row(["  zram".into(), "–".into(), mib(memory.zram)]);
    text.push_str(&table.to_text());
    let _ = write!(text, "\nSaved: {}", mib_signed(memory.saved));
    if let Some(percent) = (memory.saved * 100).checked_div(i64::try_from(memory.resident_pss).unwrap_or(i64::MAX)) {
        let _ = write!(text, " ({percent} %)");
    }
    let _ = writeln!(text, "; the daemon's own ledger says {}.", mib_signed(memory.ledger_saved));

    let messages = figures.messages;
    let _ = writeln!(
        text,
        "Messages: {} sent, {} delivered, {} lost, {} duplicated.\n",
        messages.sent, messages.delivered, messages.lost, messages.duplicated
    );

    let mut table =
        Table::new(["STATE OF THE APPS", "THEIR MEMORY", "PUSH TO APP, MEDIAN", "99 OF 100"]).right(&[1, 2, 3]);
    for row in &story.states {
        let wake = |pick: fn(&super::measure::Wake) -> f64| {
            row.wake.as_ref().map_or_else(|| "–".into(), |wake| format!("{:.1} ms", pick(wake)))
        };
        table.row([row.state.label().into(), mib(row.pss), wake(|wake| wake.p50), wake(|wake| wake.p99)]);
    }
    text.push_str(&table.to_text());
    if let Some(reason) = &story.not_paged_out {
        let _ = writeln!(text, "Not paged out here: {}.", crate::render::clean(reason.trim_end_matches('.')));
    }
    let _ = writeln!(text, "\nFrozen by {}.\nThe apps: {}.", freezer_text(figures.freezer), story.apps);
    text
}
