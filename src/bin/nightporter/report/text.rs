//! The report for the terminal: one line an app, then what all of it comes to, then what was saved and paid over time.

use std::fmt::Write;

use nightporter::{
    model::Profile,
    view::{Account, AppHistory, History, LedgerRow, Report},
};

use super::{
    app_saved,
    grid::{Column, Grid, wrapped},
    now, own_cost, resident, saved,
    series::{Point, Window, means},
    units::{self, count, float, mib_hours, millis},
};
use crate::render::{Style, Table, clean, mib, mib_signed, profile};

/// Cells of a bar, of the sparkline beside it, and of the bars of the summary below.
const BAR: std::ops::RangeInclusive<usize> = 10..=24;
const SPARK: usize = 16;
/// What the columns with bars and with sparklines are worth.
const BARS: u8 = 8;
const LINES: u8 = 3;
const SUMMARY: u64 = 30;

/// `nightporter report`; `history` is the last `hours`, or why there is none.
pub(super) fn report(report: &Report, history: Result<&History, &str>, hours: u32, style: Style) -> String {
    let head = format!("Measured {}, profile {}", clean(&report.at), profile(report.profile));
    let mut text = wrapped(&head, style.width, 0) + "\n";
    if report.apps.is_empty() {
        text.push_str("No app has registered yet.\n");
    } else {
        text.push_str(&apps(report, history.ok(), hours, style));
    }
    text.push('\n');
    text.push_str(&summary(report, style));
    let note = |text: &mut String, note: &str| {
        text.push('\n');
        text.push_str(&wrapped(note, style.width, 0));
    };
    if report.unmeasured > 0 {
        let many = if report.unmeasured == 1 { "1 app is".into() } else { format!("{} apps are", report.unmeasured) };
        note(
            &mut text,
            &format!("{many} without a baseline yet: an app is measured in the background, before it is first frozen."),
        );
    }
    if report.profile == Profile::Observe {
        note(
            &mut text,
            "Under profile observe nothing is frozen or ended, so nothing is saved, and only our own cost is counted. \
             `nightporter report --what-if` says what would be.",
        );
    }
    if let Some(account_) = &report.account {
        text.push('\n');
        text.push_str(&account(account_, report.profile, style));
    }
    if let Err(reason) = history {
        note(&mut text, &format!("No history: {}.", clean(reason)));
    }
    text
}

fn apps(report: &Report, history: Option<&History>, hours: u32, style: Style) -> String {
    let rows = &report.apps;
    let cell = |kib: Option<u64>| kib.map_or_else(|| "–".into(), mib);
    let column = |head, worth, pick: &dyn Fn(&LedgerRow) -> String| Column::new(head, worth, rows.iter().map(pick));
    let mut columns = vec![
        column("APP", 10, &|row| row.name.clone()),
        column("STATE", 5, &|row| row.state.clone()),
        column("RESIDENT", 6, &|row| cell(resident(row))).right(),
        column("FROZEN", 1, &|row| cell(row.frozen.map(|memory| memory.pss))).right(),
        column("PAGED OUT", 2, &|row| cell(row.paged_out.map(|memory| memory.pss))).right(),
        column("NOW", 7, &|row| cell(now(row))).right(),
        column("ZRAM", 4, &|row| if row.zram == 0 { "–".into() } else { mib(row.zram) }).right(),
        column("SAVED", 9, &|row| app_saved(report, row).map_or_else(|| "–".into(), mib_signed)).right(),
    ];
    let drawn = history.and_then(|history| Window::of(history).map(|window| (history, window)));
    let Some(width) = style.width else { return Grid::new(columns).text() };
    if style.bars {
        columns.push(column("", BARS, &|_| " ".repeat(*BAR.start())));
        if drawn.is_some() {
            columns.push(Column::new(format!("LAST {hours} H"), LINES, rows.iter().map(|_| " ".repeat(SPARK))));
        }
    }
    let mut grid = Grid::new(columns);
    grid.fit(width);
    if let Some((history, window)) = drawn {
        let line = |row: &LedgerRow| {
            let found = history.apps.iter().find(|app| app.name == row.name);
            found.map(|app| sparkline(app, window, resident(row))).unwrap_or_default()
        };
        grid.fill(LINES, rows.iter().map(line));
    }
    if !grid.has(BARS) {
        return grid.text();
    }
    let room = (BAR.start() + width.saturating_sub(grid.width())).min(*BAR.end());
    let whole = rows.iter().map(|row| resident(row).unwrap_or(0).max(cost(row).unwrap_or(0))).max().unwrap_or(0);
    grid.fill(BARS, rows.iter().map(|row| bar(report, row, whole, room)));
    let saved = if report.profile == Profile::Observe { "" } else { "  ░ saved" };
    format!("{}\n█ now  ▒ in zram{saved}\n", grid.text())
}

fn summary(report: &Report, style: Style) -> String {
    let mut table = Table::new(["", "", ""]).right(&[1]);
    let own = own_cost(report);
    let scale = report.resident.max(report.now.saturating_add(report.zram).saturating_add(own));
    // Name and figure take some 34 columns.
    let room = style.width.map_or(SUMMARY, |width| u64::try_from(width.saturating_sub(36)).unwrap_or(0).min(SUMMARY));
    let bar = |size: u64| if style.bars { eighths(size, scale, room) } else { String::new() };
    for (name, size) in [
        ("Each app on its own", report.resident),
        ("Apps now", report.now),
        ("zram", report.zram),
        ("Night Porter", own),
    ] {
        table.row([name.into(), mib(size), bar(size)]);
    }
    if report.cache != 0 {
        table.row(["Page cache".into(), mib_signed(report.cache), String::new()]);
    }
    if report.kernel != 0 {
        table.row(["Kernel memory".into(), mib_signed(report.kernel), String::new()]);
    }
    if report.drift != 0 {
        table.row(["By themselves".into(), mib_signed(report.drift), String::new()]);
    }
    let share = match report.profile {
        Profile::Observe => None,
        Profile::Tombstone | Profile::Cached => percent(report.saved, report.resident),
    };
    let name = share.map_or_else(|| "Saved".into(), |share| format!("Saved ({share})"));
    table.row([name, mib_signed(saved(report)), String::new()]);
    let mut text = table.body();
    if report.cache != 0 {
        let note = "Page cache is what of the difference is pages of files: the kernel keeps or drops them whoever runs, so \
                    they are not counted as saved.";
        text.push('\n');
        text.push_str(&wrapped(note, style.width, 0));
    }
    if report.drift != 0 {
        let note = "By themselves is what apps that run cost less or more than resident with nothing of them paged out: not \
                    counted either.";
        text.push('\n');
        text.push_str(&wrapped(note, style.width, 0));
    }
    if let Some(source) = report.zram_source.filter(|_| report.zram > 0) {
        text.push('\n');
        text.push_str(&wrapped(units::source(source), style.width, 0));
    }
    text
}

fn account(account: &Account, in_force: Profile, style: Style) -> String {
    const NAME: usize = 18;
    let since = format!("Since {} ({})", clean(&account.since), units::hours(account.hours).replace('\u{a0}', " "));
    let mut text = wrapped(&since, style.width, 0);
    let mut row = |name: &str, value: String| {
        let value = wrapped(&value.replace('\u{a0}', " "), style.width.map(|width| width.saturating_sub(NAME)), 0);
        let lines = value.trim_end().replace('\n', &format!("\n{:NAME$}", ""));
        let _ = writeln!(text, "  {name:<16}{lines}");
    };
    let mean = (account.hours > 0.0).then(|| account.saved_mib_hours / account.hours);
    row(
        "Saved",
        match mean {
            _ if in_force == Profile::Observe && account.saved_mib_hours <= 0.0 => "nothing".into(),
            Some(mean) => format!("{}, {mean:.1} MiB on the mean", mib_hours(account.saved_mib_hours)),
            None => mib_hours(account.saved_mib_hours),
        },
    );
    let instead = |ours: u64, theirs: u64| format!("{} instead of {}", count(ours), count(theirs));
    row("Connections", instead(account.connections, account.connections_replaced));
    row("Heartbeats", instead(account.heartbeats, account.heartbeats_replaced));
    row("Processor time", format!("{} of Night Porter", millis(account.daemon_cpu_ms)));
    let wakes: Vec<_> = account.wakes.iter().filter(|wakes| wakes.count > 0).collect();
    if !wakes.is_empty() {
        let column = |head, worth, pick: &dyn Fn(&&nightporter::view::WakeStats) -> String| {
            Column::new(head, worth, wakes.iter().map(|wakes| pick(wakes).replace('\u{a0}', " ")))
        };
        let ms = |ms: u32| millis(u64::from(ms));
        let mut grid = Grid::new(vec![
            column("APPS THAT WERE", 9, &|wakes| wakes.from.clone()),
            column("MESSAGES", 8, &|wakes| count(wakes.count)).right(),
            column("MEDIAN", 7, &|wakes| ms(wakes.p50_ms)).right(),
            column("95 OF 100", 6, &|wakes| ms(wakes.p95_ms)).right(),
            column("SLOWEST", 4, &|wakes| ms(wakes.max_ms)).right(),
            column("CPU", 5, &|wakes| millis(wakes.cpu_ms)).right(),
            column("FAULTS", 3, &|wakes| count(wakes.faults)).right(),
        ]);
        grid.fit(style.width.unwrap_or(usize::MAX));
        let _ = write!(text, "\n{}", grid.text());
    }
    text
}

/// What an app costs now in all.
fn cost(row: &LedgerRow) -> Option<u64> {
    now(row).map(|now| now.saturating_add(row.zram))
}

/// `71 %`, rounded down.
fn percent(part: i64, whole: u64) -> Option<String> {
    let percent = i128::from(part).checked_mul(100)?.checked_div(i128::from(whole))?;
    Some(format!("{percent} %"))
}

/// What an app costs now, what of that is in zram, and what is saved, on one scale for all apps.
fn bar(report: &Report, row: &LedgerRow, whole: u64, width: usize) -> String {
    let cells = |kib: u64| {
        let cells = (u128::from(kib) * width as u128 + u128::from(whole / 2)).checked_div(u128::from(whole));
        usize::try_from(cells.unwrap_or(0)).unwrap_or(width).min(width)
    };
    let (now, all) = (cells(now(row).unwrap_or(0)), cells(cost(row).unwrap_or(0)));
    let saved = app_saved(report, row).and_then(|saved| u64::try_from(saved).ok()).unwrap_or(0);
    let to = cells(cost(row).unwrap_or(0).saturating_add(saved)).max(all);
    let parts = [("█", now), ("▒", all - now), ("░", to - all)];
    parts.iter().map(|(cell, count)| cell.repeat(*count)).collect()
}

/// `part` of `whole` in cells of eighths.
fn eighths(part: u64, whole: u64, width: u64) -> String {
    let eighths = (u128::from(part) * u128::from(width) * 8).checked_div(u128::from(whole)).unwrap_or(0);
    let mut text = "█".repeat(usize::try_from(eighths / 8).unwrap_or(0));
    text.extend(["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"].get(usize::try_from(eighths % 8).unwrap_or(0)).copied());
    text
}

/// What an app cost over the time, its share of zram included; full height is what it cost resident.
fn sparkline(app: &AppHistory, window: Window, resident: Option<u64>) -> String {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let value = |pss: Option<u64>, zram: u64| pss.map(|pss| float(pss.saturating_add(zram)));
    let points: Vec<Point> = app
        .points
        .iter()
        .map(|point| Point { at: point.at, span: point.span, value: value(point.pss, point.zram) })
        .collect();
    let means = means(&points, window, SPARK);
    let top = means.iter().flatten().copied().fold(float(resident.unwrap_or(0)), f64::max);
    let cell = |mean: &Option<f64>| {
        mean.map_or(' ', |mean| {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 7, and NaN is 0")]
            let level = (mean / top * 7.0).round() as usize;
            LEVELS.get(level).copied().unwrap_or('█')
        })
    };
    means.iter().map(cell).collect()
}

#[cfg(test)]
mod tests {
    use nightporter::{model::Memory, view::AppAt};

    use super::*;

    fn row(resident: u64, now: u64, zram: u64) -> LedgerRow {
        let memory = |pss| serde_json::json!({ "pss": pss, "uss": pss, "swap": 0 });
        let mut row: LedgerRow = serde_json::from_value(serde_json::json!({
            "name": "org.example.Messenger", "state": "frozen", "resident": memory(resident), "measured": null,
            "frozen": null, "paged_out": null, "now": memory(now), "saved": 1 }))
        .unwrap();
        row.zram = zram;
        row.saved = i64::try_from(i128::from(resident) - i128::from(now) - i128::from(zram)).ok();
        row
    }

    fn of(apps: Vec<LedgerRow>) -> Report {
        Report {
            at: "2026-11-22T01:39:00Z".into(),
            profile: Profile::Tombstone,
            apps,
            daemon: Memory { pss: 3072, ..Memory::default() },
            sockets: 0,
            cache: 0,
            drift: 0,
            kernel: 0,
            zram: 0,
            zram_source: None,
            resident: 102_400,
            now: 10_240,
            saved: 89_088,
            unmeasured: 0,
            account: None,
        }
    }

    #[test]
    fn bars_are_as_long_as_their_figures_ask_for() {
        let mut report = of(vec![]);
        assert_eq!(bar(&report, &row(100, 25, 25), 100, 12), "███▒▒▒░░░░░░");
        assert_eq!(bar(&report, &row(25, 50, 0), 100, 12), "██████");
        assert_eq!(bar(&report, &row(u64::MAX, u64::MAX, u64::MAX), u64::MAX, 3), "███");
        assert_eq!(bar(&report, &row(0, 0, 0), 0, 12), "");
        report.profile = Profile::Observe;
        assert_eq!(bar(&report, &row(100, 25, 0), 100, 12), "███", "nothing is saved");
        assert_eq!(eighths(1, 2, 30), "█".repeat(15));
        assert_eq!([eighths(0, 0, 30), eighths(1, 60, 30)], ["", "▌"]);
    }

    #[test]
    fn a_line_goes_up_and_down_with_the_app() {
        let point = |at, pss: Option<u64>| AppAt { at, pss, ..AppAt::default() };
        let app =
            AppHistory { name: String::new(), points: vec![point(8, Some(70)), point(12, Some(0)), point(14, None)] };
        assert_eq!(sparkline(&app, Window { from: 0, to: 16 }, Some(70)), "        ████▁▁  ");
        assert_eq!(sparkline(&app, Window { from: 0, to: 16 }, Some(140)), "        ▅▅▅▅▁▁  ");
    }

    #[test]
    fn no_line_is_wider_than_the_terminal_however_narrow() {
        let mut report_ = of((0..3).map(|_| row(102_400, 1024, 2048)).collect());
        report_.unmeasured = 1;
        report_.zram_source = Some(nightporter::model::ZramSource::Ratio);
        report_.zram = 2048;
        report_.account = Some(Account {
            since: "2026-11-20T06:12:00Z".into(),
            hours: 53.4,
            saved_mib_hours: 9814.2,
            wakes: vec![nightporter::view::WakeStats { from: "tombstone".into(), count: 12, ..Default::default() }],
            ..Account::default()
        });
        let history = History { since: "2026-11-21T01:39:00Z".into(), until: report_.at.clone(), ..History::default() };
        for width in [36, 45, 60, 80, 100, 140] {
            for bars in [true, false] {
                let text = report(&report_, Ok(&history), 24, Style { bars, width: Some(width) });
                let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
                assert!(widest <= width, "{widest} in {width}:\n{text}");
                assert!(text.contains("SAVED") && text.contains("Messenger"), "{text}");
                assert_eq!(text.contains('░'), bars && width >= 40, "{width}:\n{text}");
            }
        }
    }

    #[test]
    fn under_observe_nothing_is_called_saved() {
        let mut observed = of(vec![row(102_400, 0, 0)]);
        (observed.profile, observed.now, observed.saved) = (Profile::Observe, 0, 99_328);
        let text = report(&observed, Err("it is older"), 24, Style { bars: true, width: Some(80) });
        assert!(text.contains("-3.0 MiB\n") && text.contains("nothing is saved") && !text.contains("97.0"), "{text}");
        assert!(text.contains("--what-if") && text.contains("No history: it is older."), "{text}");
    }
}
