//! `nightporter report` in all its formats, each read by a parser that is not ours, and the page looked at in a browser.
#![cfg(all(feature = "cli", feature = "relay"))]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![expect(clippy::print_stderr, reason = "what a failing test wants to be known")]

#[path = "report/browser.rs"]
mod browser;
#[path = "report/fixture.rs"]
mod fixture;
#[path = "report/pictures.rs"]
mod pictures;
#[path = "report/schema.rs"]
mod schema;
#[path = "support/mod.rs"]
#[expect(dead_code, unused_imports, reason = "made for the tests of the daemon; shared")]
mod support;

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use nightporter::{
    model::{Memory, Profile},
    view::{History, Report, WhatIf},
};
use serde_json::{Value, json};
use zbus::{Connection, block_on, connection::Builder, interface};

use self::support::{FAST, Setup, World, bus};

/// A name as no bus would let anybody have it, and a sentence of somebody who would.
const HOSTILE: &str = "</script></style><img src=x onerror=alert(1)>\"'&amp;,\u{1b}[2J\u{202e}\r\nend";

/// What the daemon would say; without a history it is an older one.
struct Fake(Report);

struct Newer {
    report: Report,
    history: History,
    what_if: WhatIf,
}

#[interface(name = "org.nightporter1.Manager")]
impl Fake {
    fn report(&self) -> String {
        serde_json::to_string(&self.0).unwrap()
    }
}

#[interface(name = "org.nightporter1.Manager")]
impl Newer {
    fn report(&self) -> String {
        serde_json::to_string(&self.report).unwrap()
    }

    fn history(&self, hours: u32) -> String {
        assert!([24, 168].contains(&hours));
        serde_json::to_string(&self.history).unwrap()
    }

    fn what_if(&self, hours: u32) -> String {
        assert_eq!(hours, 24);
        serde_json::to_string(&self.what_if).unwrap()
    }
}

/// A bus with the fake daemon on it.
struct Phone {
    bus: bus::Daemon,
    _daemon: Connection,
}

impl Phone {
    fn new(report: Report, history: History, what_if: WhatIf) -> Self {
        Self::with(|builder| builder.serve_at("/org/nightporter1", Newer { report, history, what_if }))
    }

    /// With the figures of the fixture.
    fn usual(profile: Profile) -> Self {
        Self::new(fixture::report(profile), fixture::history(), fixture::what_if())
    }

    /// With a daemon that knows no history.
    fn older(report: Report) -> Self {
        Self::with(|builder| builder.serve_at("/org/nightporter1", Fake(report)))
    }

    fn with(serve: impl FnOnce(Builder<'static>) -> Builder<'static>) -> Self {
        let bus = bus::Daemon::new();
        let builder = Builder::address(bus.address().as_str());
        let daemon = block_on(serve(builder).name("org.nightporter1").build()).unwrap();
        Self { bus, _daemon: daemon }
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nightporter"));
        command.args(["--user", "report"]).args(args).env("DBUS_SESSION_BUS_ADDRESS", self.bus.address());
        command.output().unwrap()
    }

    fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.text(args)).unwrap()
    }
}

#[test]
fn json_is_as_the_schema_says_and_the_schema_as_json_is() {
    let phone = Phone::usual(Profile::Tombstone);
    let report = phone.json(&["--json"]);
    assert_eq!(report, serde_json::to_value(fixture::report(Profile::Tombstone)).unwrap());
    fits("", &report);
    fits("/$defs/History", &phone.json(&["--json", "--history", "--hours", "168"]));
    fits("/$defs/WhatIf", &phone.json(&["--json", "--what-if"]));
    let schema = our_schema();
    let members = |document: &Value| document.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    for (pointer, document) in
        [("", &report), ("/$defs/LedgerRow", &report["apps"][0]), ("/$defs/Account", &report["account"])]
    {
        assert_eq!(members(schema.pointer(&format!("{pointer}/properties")).unwrap()), members(document), "{pointer}");
    }
    let mut undescribed = BTreeSet::new();
    schema::undescribed(&schema, "", &mut undescribed);
    assert!(undescribed.is_empty(), "{undescribed:?}");
    // And it does find what is wrong.
    for (pointer, value) in [
        ("/now", json!("10")),
        ("/profile", json!("x")),
        ("/apps/0/resident/pss", json!(-1)),
        ("/at", json!("today")),
        ("/account/since", json!(1)),
        ("/daemon", json!(null)),
    ] {
        let mut broken = report.clone();
        *broken.pointer_mut(pointer).unwrap() = value;
        assert!(!against_schema("", &broken).is_empty(), "{pointer} is not noticed");
    }
    let mut longer = report;
    longer["apps"][0]["secret"] = json!(1);
    assert_eq!(against_schema("", &longer), ["$.apps[0].secret is not documented"]);
}

#[test]
fn csv_has_one_row_an_app_or_one_row_a_time() {
    let phone = Phone::usual(Profile::Tombstone);
    let rows = read("csv", &phone.text(&["--csv"]));
    let report = fixture::report(Profile::Tombstone);
    assert_eq!(rows.as_array().unwrap().len(), report.apps.len());
    for (row, app) in rows.as_array().unwrap().iter().zip(&report.apps) {
        assert_eq!(row["app"], app.name);
        assert_eq!(row["resident_kib"], app.resident.map(|memory| memory.pss.to_string()).unwrap_or_default());
        assert_eq!(row["now_kib"], app.now.unwrap().pss.to_string());
        assert_eq!(row["saved_kib"], app.saved.map(|saved| saved.to_string()).unwrap_or_default());
        assert_eq!(row["profile"], "tombstone");
    }
    let (rows, history) = (read("csv", &phone.text(&["--csv", "--history"])), fixture::history());
    let rows = rows.as_array().unwrap();
    let points: usize = history.apps.iter().map(|app| app.points.len()).sum();
    assert_eq!(rows.len(), history.totals.len() + points);
    assert!(rows.windows(2).all(|pair| pair[0]["at"].as_str() <= pair[1]["at"].as_str()));
    let totals: Vec<&Value> = rows.iter().filter(|row| row["app"] == "").collect();
    assert_eq!(totals.len(), history.totals.len());
    assert_eq!(totals[7]["now_kib"], history.totals[7].total.now.to_string());
}

#[test]
fn openmetrics_is_read_by_prometheus_own_parsers_both_old_and_new() {
    let phone = Phone::usual(Profile::Tombstone);
    let text = phone.text(&["--openmetrics"]);
    assert!(text.ends_with("\n# EOF\n"));
    let (found, report) = (read("metrics", &text), fixture::report(Profile::Tombstone));
    let is = |key: &str, expected: f64| {
        let value = found[key].as_f64().unwrap_or_else(|| panic!("no {key} in {found}"));
        assert!((value - expected).abs() < 1e-6, "{key}: {value} and not {expected}");
    };
    is("nightporter_saved_bytes", report.saved as f64 * 1024.0);
    is("nightporter_own_cost_bytes", 3180.0 * 1024.0);
    is("nightporter_zram_bytes|source=measured", report.zram as f64 * 1024.0);
    is("nightporter_apps", 13.0);
    is("nightporter_report_timestamp_seconds", 1_795_347_360.0);
    is("nightporter_app_resident_bytes|app=im.dino.Dino", 84.0 * 1024.0 * 1024.0);
    is("nightporter_app_wake_cpu_seconds_total|app=im.dino.Dino", 2.46);
    is("nightporter_delivery_latency_seconds|from=tombstone|percentile=95", 1.704);
    is("nightporter_deliveries_total|from=frozen", 143.0);
    is("nightporter_connections_replaced", 12.0);
    assert!(found.get("nightporter_app_saved_bytes|app=org.example.JustInstalled").is_none(), "it has no baseline");
    // Another user's app of the same name is not another series.
    let mut twice = report;
    twice.apps.push(twice.apps[0].clone());
    let found = read("metrics", &Phone::older(twice).text(&["--openmetrics"]));
    assert_eq!(found["nightporter_app_resident_bytes|app=de.schmidhuberj.Flare"], 2.0 * 96.0 * 1024.0 * 1024.0);
}

#[test]
fn the_page_is_whole_valid_and_runs_nothing() {
    let phone = Phone::usual(Profile::Tombstone);
    let text = phone.text(&["--html", "--what-if"]);
    let page = read("html", &text);
    assert_eq!(page["tags"].get("script"), None);
    assert_eq!(page["tags"].get("img"), None);
    for outside in ["src=", "url(", "@import", "href=\"http"] {
        assert!(!text.contains(outside), "{outside}");
    }
    let said = page["text"].as_str().unwrap().replace('\u{a0}', " ");
    let report = fixture::report(Profile::Tombstone);
    let saved = format!("{:.0}", report.saved as f64 / 1024.0);
    for expected in
        ["1,", "MiB saved now", "1 instead of 12", "Kept awake most of the rest of the time", "frozen for 10 min"]
    {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    assert!(said.replace(',', "").contains(&format!("{saved} MiB saved now")), "{saved}: {said}");
    let names: BTreeSet<&str> = page["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(names, report.apps.iter().map(|app| app.name.as_str()).collect());
}

#[test]
fn whatever_the_documents_say_every_format_stays_whole() {
    let mut report = fixture::report(Profile::Tombstone);
    let huge = Memory { pss: u64::MAX, uss: u64::MAX, swap: u64::MAX };
    let row = report.apps[0].clone();
    report.apps.clear();
    for index in 0..200 {
        let mut row = row.clone();
        row.name = format!("{HOSTILE}{index}");
        (row.state, row.conditions) = (HOSTILE.into(), Some(HOSTILE.into()));
        match index % 5 {
            0 => (row.resident, row.now, row.zram, row.saved) = (Some(huge), Some(huge), u64::MAX, Some(i64::MIN)),
            1 => (row.resident, row.now, row.saved, row.measured) = (None, None, None, Some(HOSTILE.into())),
            2 => (row.now, row.saved_mib_hours) = (Some(Memory::default()), -1e300),
            3 => row.saved = Some(-123),
            _ => {}
        }
        report.apps.push(row);
    }
    (report.resident, report.now, report.saved, report.zram) = (u64::MAX, u64::MAX, i64::MIN, u64::MAX);
    report.at = HOSTILE.into();
    let account = report.account.as_mut().unwrap();
    (account.hours, account.saved_mib_hours, account.since) = (0.0, -1e300, HOSTILE.into());
    (account.wakes[0].from, account.wakes[0].max_ms, account.wakes[0].count) = (HOSTILE.into(), u32::MAX, u64::MAX);
    let mut history = fixture::history();
    history.wakes.iter_mut().for_each(|wake| wake.from = HOSTILE.into());
    history.wakes[0].took_ms = u32::MAX;
    (history.totals[3].at, history.totals[4].span, history.totals[5].total.now) = (u64::MAX, u32::MAX, u64::MAX);
    history.apps[0].points[3].at = u64::MAX;
    history.apps[1].name = HOSTILE.into();
    let mut what_if = fixture::what_if();
    what_if.apps[0].spans[0].from = HOSTILE.into();
    (what_if.apps[0].spans[1].secs, what_if.apps[0].spans[1].reason) = (u64::MAX, HOSTILE.into());
    (what_if.apps[1].name, what_if.apps[1].kept_by) = (HOSTILE.into(), Some(HOSTILE.into()));
    (what_if.compression, what_if.hours, what_if.saved_mean) = (0.0, -1.0, u64::MAX);
    let empty = {
        let mut report = fixture::report(Profile::Cached);
        (report.resident, report.now, report.zram, report.saved, report.unmeasured) = (0, 0, 0, -3180, 0);
        (report.apps, report.account) = (Vec::new(), None);
        report
    };
    let nothing = WhatIf { apps: Vec::new(), ..fixture::what_if() };
    for phone in [Phone::new(report, history, what_if), Phone::new(empty, History::default(), nothing)] {
        let html = phone.text(&["--html", "--what-if"]);
        let page = read("html", &html);
        assert_eq!((page["tags"].get("script"), page["tags"].get("img")), (None, None));
        for nonsense in ["NaN", "inf\"", "e300", "\u{1b}", "\u{202e}"] {
            assert!(!html.contains(nonsense), "{nonsense:?}");
        }
        read("csv", &phone.text(&["--csv"]));
        read("csv", &phone.text(&["--csv", "--history"]));
        read("metrics", &phone.text(&["--openmetrics"]));
        for args in [&[][..], &["--what-if"]] {
            let text = phone.text(args);
            assert!(!text.contains(['\u{1b}', '\r']), "{text:?}");
        }
    }
}

#[test]
fn under_observe_no_format_calls_anything_saved() {
    let phone = Phone::usual(Profile::Observe);
    let own = -3180.0 * 1024.0;
    assert_eq!(read("metrics", &phone.text(&["--openmetrics"]))["nightporter_saved_bytes"], own);
    assert!(!phone.text(&["--openmetrics"]).contains("app_saved_bytes{"));
    let rows = read("csv", &phone.text(&["--csv"]));
    assert!(rows.as_array().unwrap().iter().all(|row| row["saved_kib"] == "" && row["profile"] == "observe"));
    assert_eq!(phone.json(&["--json"])["profile"], "observe");
    let text = phone.text(&[]);
    assert!(text.contains("nothing is saved") && text.contains("-3.1 MiB") && !text.contains("1,493"), "{text}");
    let page = phone.text(&["--html"]);
    assert!(page.contains("Nothing is saved: only observed"));
    assert!(!page.contains("class=\"saved\" x="), "an area or a bar is called saved");
}

#[test]
fn what_if_says_what_when_why_and_how_much() {
    let phone = Phone::usual(Profile::Observe);
    let text = phone.text(&["--what-if"]);
    for expected in [
        "less on the mean",
        "in 1 d that were observed",
        "Z ended for ",
        " less): frozen for 10 min\n",
        "Z frozen for 1 min: in the background for 10 s\n",
        "Kept awake most of the rest of the time: it has a tray item",
        "earlier ones are left out",
    ] {
        assert!(text.contains(expected), "{expected}:\n{text}");
    }
    assert!(!text.contains("The profile observe is in force"), "{text}");
    let enforced = Phone::new(
        fixture::report(Profile::Tombstone),
        History::default(),
        WhatIf { profile: Profile::Tombstone, apps: Vec::new(), ..fixture::what_if() },
    );
    let text = enforced.text(&["--what-if"]);
    assert!(text.contains("Nothing would have been done.") && text.contains("tombstone is in force now"), "{text}");
}

#[test]
fn an_older_daemon_has_its_report_and_says_that_it_has_no_more() {
    let phone = Phone::older(fixture::report(Profile::Tombstone));
    let text = phone.text(&[]);
    assert!(text.contains("im.dino.Dino") && text.contains("No history: the daemon that runs is older"), "{text}");
    assert!(read("html", &phone.text(&["--html"]))["text"].as_str().unwrap().contains("older than this nightporter"));
    phone.text(&["--csv"]);
    phone.text(&["--openmetrics"]);
    for args in [&["--what-if"][..], &["--csv", "--history"], &["--json", "--history"], &["--html", "--what-if"]] {
        let output = phone.run(args);
        assert_eq!(output.status.code(), Some(76), "{args:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("older") && said.contains("restart") && output.stdout.is_empty(), "{said}");
    }
}

#[test]
fn a_file_is_written_whole_for_all_to_read() {
    let phone = Phone::usual(Profile::Tombstone);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let name = |path: &Path| path.to_str().unwrap().to_owned();
    let (prom, page) = (file("nightporter.prom"), file("report.html"));
    fs::write(&prom, "old").unwrap();
    let before = fs::File::open(&prom).unwrap();
    assert_eq!(phone.text(&["--openmetrics", "--output", &name(&prom)]), "");
    // Who has the old one open reads it to its end: it is another file.
    assert_eq!(std::io::read_to_string(before).unwrap(), "old");
    assert_eq!(fs::metadata(&prom).unwrap().permissions().mode() & 0o777, 0o644);
    read("metrics", &fs::read_to_string(&prom).unwrap());
    assert_eq!(phone.text(&["--html", &name(&page)]), "");
    assert!(fs::read_to_string(&page).unwrap().ends_with("</html>\n"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    let nowhere = phone.run(&["--html", "/nonexistent/report.html"]);
    assert_eq!(nowhere.status.code(), Some(73));
    assert_eq!(phone.run(&["--html", &name(&page), "--output", &name(&prom)]).status.code(), Some(64));
}

#[test]
fn a_terminal_gets_bars_that_fit_it() {
    let phone = Phone::usual(Profile::Tombstone);
    for (columns, color) in [(40, true), (80, true), (120, true), (80, false)] {
        let text = on_terminal(&phone, columns, color);
        let widest = text.lines().map(|line| line.trim_end().chars().count()).max().unwrap();
        assert!(widest <= columns && text.contains("SAVED"), "{widest} in {columns}:\n{text}");
        assert_eq!(text.contains('█') && text.contains('░'), color, "{columns}:\n{text}");
        assert_eq!(text.contains("LAST 24 H"), color && columns == 120, "{columns}:\n{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}

/// The real daemon with a real app.
#[test]
fn what_the_real_daemon_measures_fits_as_well() {
    const APP: &str = "org.example.Chat";
    let world = World::new(Setup { top: "profile = \"tombstone\"\n", lifecycle: FAST, ..Setup::default() });
    world.install(APP, "");
    world.launch(APP);
    world.wait_ready(APP);
    world.wait_state(APP, "frozen");
    let run = |args: &[&str]| {
        let output = world.cli(&[&["report"], args].concat());
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let report: Value = serde_json::from_str(&run(&["--json"])).unwrap();
    fits("", &report);
    assert!(report["apps"][0]["resident"]["pss"].as_u64().unwrap() > 100, "{report}");
    assert_eq!(read("html", &run(&["--html"]))["names"][0], APP);
    assert_eq!(read("csv", &run(&["--csv"]))[0]["app"], APP);
    assert!(read("metrics", &run(&["--openmetrics"]))["nightporter_daemon_memory_bytes"].as_f64() > Some(1e5));
    assert!(run(&[]).contains(APP));
}

#[test]
fn the_timer_shipped_does_what_the_page_says() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/report.md")).unwrap();
    let service = fs::read_to_string(root.join("systemd/nightporter-metrics.service")).unwrap();
    let timer = fs::read_to_string(root.join("systemd/nightporter-metrics.timer")).unwrap();
    let line = service.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    assert!(line.contains("nightporter --system report --openmetrics --output "), "{line}");
    let directory = Path::new(line.rsplit(' ').next().unwrap()).parent().unwrap();
    assert!(service.contains(&format!("ReadWritePaths={}", directory.display())), "{service}");
    assert!(line.ends_with(".prom"), "the collector reads nothing else");
    assert!(page.contains(directory.to_str().unwrap()) && page.contains("nightporter-metrics.timer"));
    assert!(!timer.contains("WakeSystem"), "a phone is not woken for this");
}

/// What the schema, or this part of it, has against a document.
fn against_schema(pointer: &str, document: &Value) -> Vec<String> {
    let root = our_schema();
    let mut wrong = Vec::new();
    schema::check(&root, root.pointer(pointer).unwrap(), document, "$", &mut wrong);
    wrong
}

fn fits(pointer: &str, document: &Value) {
    let wrong = against_schema(pointer, document);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn our_schema() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/report.schema.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// What Python's parsers make of it.
fn read(format: &str, text: &str) -> Value {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/report/read.py");
    // Debian's own, which has Debian's modules.
    let mut command = Command::new("/usr/bin/python3");
    command.args([script, format]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child =
        command.spawn().expect("python3 is needed (Debian's packages python3 and python3-prometheus-client)");
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{format} (Debian's package python3-prometheus-client is needed):\n{said}\n{text:.3000}"
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// On a terminal of so many columns (script(1), of util-linux).
fn on_terminal(phone: &Phone, columns: usize, color: bool) -> String {
    let command = format!("stty cols {columns} rows 50; exec {} --user report", env!("CARGO_BIN_EXE_nightporter"));
    let mut script = Command::new("script");
    script.args(["-qec", &command, "/dev/null"]).env("DBUS_SESSION_BUS_ADDRESS", phone.bus.address());
    script.env_remove("NO_COLOR").stdin(Stdio::null());
    if !color {
        script.env("NO_COLOR", "1");
    }
    let output = script.output().expect("script(1) is needed (Debian's package bsdutils)");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().replace('\r', "")
}
