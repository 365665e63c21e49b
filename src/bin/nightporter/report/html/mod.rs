//! The report as one page for a browser: everything is in the file, nothing is fetched and nothing runs.

mod apps;
mod chart;
mod markup;
mod scale;
mod table;
mod time;
mod wakes;
mod what_if;

use nightporter::{
    model::Profile,
    view::{Account, History, Report, WhatIf},
};

use self::{
    chart::{legend, picture, rectangle},
    markup::Markup,
};
use super::{
    own_cost, saved,
    series::Window,
    units::{self, count, float, mib_hours, millis, signed, size, when},
};
use crate::render::profile;

/// The whole page. `history` is that of the last `hours`, or why there is none.
pub(super) fn page(report: &Report, history: Result<&History, &str>, what_if: Option<&WhatIf>, hours: u32) -> String {
    Markup::document("Night Porter: memory", include_str!("page.css"), |page| {
        page.element("main", &[], |page| {
            head(page, report);
            if let Some(account) = &report.account {
                tiles(page, report, account);
            }
            if let Some(what_if) = what_if {
                section(page, "what-if", "What would have been saved", "wide", |page| what_if::section(page, what_if));
            }
            let drawn = history.and_then(|history| {
                Window::of(history).map(|window| (history, window)).ok_or("nothing has been recorded yet")
            });
            let past = past(hours);
            section(page, "memory", &format!("Memory, {past}"), "wide", |page| match drawn {
                Ok((history, window)) => time::memory(page, history, window, report.profile),
                Err(reason) => page.leaf("p", &[("class", &"none")], format_args!("No history: {reason}.")),
            });
            section(page, "apps", "Apps: resident against now", "wide", |page| apps::section(page, report));
            let wakes = wakes::Source::of(drawn.ok().map(|(history, _)| history), report.account.as_ref());
            let times =
                if wakes.as_ref().is_some_and(|wakes| !wakes.single) { "since the daemon started" } else { &past };
            section(page, "wakes", &format!("From message to app, {times}"), "", |page| match &wakes {
                Some(wakes) => wakes::section(page, wakes),
                None => page.leaf("p", &[("class", &"none")], "No message has reached an app yet."),
            });
            section(page, "connections", "Connections", "", |page| match &report.account {
                Some(account) => wakes::connections(page, account),
                None => page.leaf("p", &[("class", &"none")], "This daemon does not count them yet."),
            });
            if let Ok((history, window)) = drawn {
                section(page, "messages", &format!("Messages, {past}"), "wide", |page| {
                    time::messages(page, history, window);
                });
            }
            section(page, "figures", "All figures", "wide", |page| table::section(page, report));
            foot(page, report);
        });
    })
}

fn head(page: &mut Markup, report: &Report) {
    let claim = saved(report);
    page.element("header", &[], |page| {
        page.leaf("p", &[("class", &"brand")], "Night Porter");
        let title = match (report.profile, claim) {
            (Profile::Observe, _) => "Nothing is saved: only observed".into(),
            (_, ..0) => format!("Costs {} more than it saves", size(claim.unsigned_abs())),
            _ => format!("{} saved now", size(claim.unsigned_abs())),
        };
        page.leaf("h1", &[], title);
        let after = report.now.saturating_add(report.zram).saturating_add(own_cost(report));
        let measured = report.apps.len().saturating_sub(report.unmeasured);
        let many = if measured == 1 { "1 app takes".into() } else { format!("{measured} apps take") };
        page.element("p", &[("class", &"lead")], |page| {
            page.text(format_args!(
                "{many} {} on their own, and now {}, zram and Night Porter itself included.",
                size(report.resident),
                size(after)
            ));
            if report.profile == Profile::Observe {
                page.text(
                    " Under the profile observe no app is touched, so what apps shrank by themselves does not count; all \
                     that is ours is what Night Porter costs.",
                );
            }
            if report.unmeasured > 0 {
                let one = if report.unmeasured == 1 { "app was" } else { "apps were" };
                page.text(format_args!(" {} more {one} not measured yet.", report.unmeasured));
            }
        });
        page.leaf(
            "p",
            &[("class", &"meta")],
            format_args!("Measured {} · profile {}", when(&report.at), profile(report.profile)),
        );
        sum(page, report);
    });
}

/// What all of it comes to, in one bar.
fn sum(page: &mut Markup, report: &Report) {
    let own = own_cost(report);
    let after = report.now.saturating_add(report.zram).saturating_add(own);
    let spared = u64::try_from(saved(report)).unwrap_or(0);
    let cache = u64::try_from(report.cache).unwrap_or(0);
    let whole = float(report.resident.max(after.saturating_add(spared).saturating_add(cache))).max(1.0);
    let mut parts =
        vec![("now", "Apps now", report.now), ("zram", "zram", report.zram), ("daemon", "Night Porter", own)];
    if spared > 0 {
        parts.push(("saved", "Saved", spared));
    }
    if cache > 0 {
        parts.push(("baseline", "Page cache, not counted", cache));
    }
    picture(page, "What apps cost now, and what is saved", &["sum"], |page| {
        let mut x = 0.0;
        for &(class, name, kib) in &parts {
            let width = float(kib) / whole;
            rectangle(page, class, (x, width), (0.0, 1.0), &format!("{name}: {}", size(kib)));
            x += width;
        }
    });
    let texts: Vec<(&str, String)> =
        parts.iter().map(|(class, name, kib)| (*class, format!("{name} {}", size(*kib)))).collect();
    let entries: Vec<(&str, &str)> = texts.iter().map(|(class, text)| (*class, text.as_str())).collect();
    legend(page, &entries);
}

fn tiles(page: &mut Markup, report: &Report, account: &Account) {
    let tile = |page: &mut Markup, name: &str, value: String, note: String| {
        page.element("div", &[("class", &"tile")], |page| {
            page.leaf("h2", &[], name);
            page.leaf("p", &[("class", &"value")], value);
            page.leaf("p", &[("class", &"note")], note);
        });
    };
    let long = units::hours(account.hours);
    page.element("div", &[("class", &"tiles")], |page| {
        let observed = report.profile == Profile::Observe && account.saved_mib_hours <= 0.0;
        let mean = if account.hours > 0.0 { account.saved_mib_hours / account.hours } else { 0.0 };
        let mean = format!("{} MiB on the mean over {long}", units::figure(mean.max(0.0)));
        match observed {
            true => tile(page, "Saved over time", "Nothing".into(), format!("observed for {long}")),
            false => tile(page, "Saved over time", mib_hours(account.saved_mib_hours), mean),
        }
        let instead = |ours, theirs| format!("{} instead of {}", count(ours), count(theirs));
        tile(
            page,
            "Connections",
            instead(account.connections, account.connections_replaced),
            format!("{} heartbeats", instead(account.heartbeats, account.heartbeats_replaced)),
        );
        let messages = account.wakes.iter().map(|wakes| wakes.count).fold(0, u64::saturating_add);
        let slowest = account.wakes.iter().filter(|wakes| wakes.count > 0).max_by_key(|wakes| wakes.p50_ms);
        let note = slowest.map_or_else(
            || "none yet".into(),
            |wakes| format!("{}: median {}", wakes.from, millis(u64::from(wakes.p50_ms))),
        );
        tile(page, "Messages delivered", count(messages), note);
        let cpu = format!("{} of processor time in {long}", millis(account.daemon_cpu_ms));
        tile(page, "Night Porter itself", size(own_cost(report)), cpu);
    });
}

fn section(page: &mut Markup, id: &str, title: &str, class: &str, content: impl FnOnce(&mut Markup)) {
    page.element("section", &[("id", &id), ("class", &class)], |page| {
        page.leaf("h2", &[], title);
        content(page);
    });
}

fn foot(page: &mut Markup, report: &Report) {
    page.element("footer", &[], |page| {
        page.leaf(
            "p",
            &[],
            "Memory is proportional (PSS): what programs share is divided among them, so that the sum is what the machine \
             uses. Resident is what an app took in the background and idle, before it was first frozen. Times are UTC.",
        );
        if let Some(source) = report.zram_source {
            page.leaf("p", &[], units::source(source));
        }
        if report.profile != Profile::Observe {
            let formula = format!(
                "Saved = resident \u{2212} now \u{2212} zram \u{2212} Night Porter \u{2212} page cache + kernel memory \
                 \u{2212} by themselves = {} \u{2212} {} \u{2212} {} \u{2212} {} \u{2212} {} + {} \u{2212} {} = {}. Page cache is what of the difference is pages of files: the \
                 kernel keeps or drops them whoever runs, so they are not counted as saved. By themselves is what apps that \
                 run cost less or more than resident with nothing of them paged out: not counted either.",
                size(report.resident),
                size(report.now),
                size(report.zram),
                size(own_cost(report)),
                signed(report.cache),
                signed(report.kernel),
                signed(report.drift),
                signed(report.saved)
            );
            page.leaf("p", &[], formula);
        }
    });
}

fn past(hours: u32) -> String {
    match hours {
        24 => "last day".into(),
        1 => "last hour".into(),
        hours if hours.is_multiple_of(24) => format!("last {} days", hours / 24),
        hours => format!("last {hours} hours"),
    }
}
