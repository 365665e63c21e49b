//! What is done to apps, by whom, and what the ledger makes of it.

use std::time::Duration;

use nightporter::view;

use crate::support::{Behaviour, FAST, Setup, World, is_held, is_running, memory, of, stays, wait, wait_for};

const APP: &str = "org.example.App";
const BRISK: &str =
    "grace = \"100ms\"\npage-out-after = \"100ms\"\ntombstone-after = \"500ms\"\nawake-window = \"100ms\"\n";

#[test]
fn observe_is_the_default_and_touches_nothing() {
    let world = World::new(Setup { lifecycle: BRISK, ..Setup::default() });
    world.samples(&[(APP, "")]);
    let pid = world.pid(APP);
    assert!(stays(Duration::from_millis(1200), || !is_held(pid) && is_running(pid)));
    assert_eq!((world.pid(APP), world.starts(APP)), (pid, 1));
    let why = world.why(APP);
    assert!(why.decisions.iter().any(|decision| decision.verdict == "would-freeze"), "{why:?}");
    assert!(why.decisions.iter().any(|decision| decision.verdict == "would-kill"), "{why:?}");
    assert!(
        !why.decisions.iter().any(|decision| ["freeze", "kill", "page-out"].contains(&&*decision.verdict)),
        "{why:?}"
    );
    world.post(APP, "as ever");
    world.expect(APP, &["as ever"]);
    let report: view::Report = world.ask("Report", None);
    assert_eq!(report.apps[0].frozen, None);
}

#[test]
fn cached_freezes_and_does_not_end() {
    let world = World::new(Setup { top: "profile = \"cached\"", lifecycle: BRISK, ..Setup::default() });
    world.samples(&[(APP, "")]);
    let pid = world.pid(APP);
    wait("it to be frozen", || is_held(pid).then_some(()));
    assert!(stays(Duration::from_millis(1200), || is_running(pid)));
    assert!(is_held(pid));
    assert!(!world.decided(APP, "kill", ""));
}

#[test]
fn an_app_that_nothing_could_start_again_is_not_ended_by_time() {
    let mut world = World::new(Setup { top: "profile = \"tombstone\"", lifecycle: BRISK, ..Setup::default() });
    let pid = world.spawn(APP, "");
    world.wait_ready(APP);
    wait("the reason", || world.decided(APP, "leave", "nothing says how to start it again").then_some(()));
    assert!(is_held(pid), "{:?}", world.why(APP));
    assert!(stays(Duration::from_millis(800), || is_held(pid)), "{:?}", world.why(APP));
    world.post(APP, "it gets its messages");
    world.expect(APP, &["it gets its messages"]);
    let output = world.cli(&["kill", "example.app"]);
    assert!(output.status.success(), "the user may: {}", of(&output));
    wait("its end", || (!is_running(pid)).then_some(()));
}

#[test]
fn status_says_how_short_memory_is() {
    let world = World::new(Setup { top: "profile = \"cached\"", lifecycle: BRISK, ..Setup::default() });
    world.samples(&[(APP, "")]);
    let pid = world.pid(APP);
    wait("it to be frozen", || is_held(pid).then_some(()));
    let pressure = world.status().pressure.unwrap();
    assert!(["enough", "low", "moderate", "severe"].contains(&&*pressure.level), "{pressure:?}");
    let text = String::from_utf8(world.cli(&["status"]).stdout).unwrap();
    assert!(text.contains("Memory") && text.contains("memory "), "{text}");
}

#[test]
fn nothing_is_frozen_that_may_be_in_the_foreground() {
    let world = World::new(Setup { top: "profile = \"tombstone\"", lifecycle: BRISK, ..Setup::default() });
    world.samples(&[(APP, "")]);
    let pid = world.pid(APP);
    let shell = world.nameless();
    shell.porter("org.nightporter1.App", "SetStateOf", &[APP, "foreground"]).unwrap();
    assert!(stays(Duration::from_millis(800), || is_running(pid) && !is_held(pid)));
    world.post(APP, "looked at");
    world.expect(APP, &["looked at"]);
    assert!(stays(Duration::from_millis(800), || is_running(pid) && !is_held(pid)), "{:?}", world.why(APP));
    shell.porter("org.nightporter1.App", "SetStateOf", &[APP, "background"]).unwrap();
    world.wait_state(APP, "tombstone");
    assert!(!is_running(pid));
}

#[test]
fn by_hand() {
    let world = World::new(Setup::default());
    world.samples(&[(APP, "")]);
    let pid = world.pid(APP);
    let command = |word| {
        let output = world.cli(&[word, "example.app"]);
        assert!(output.status.success(), "{word}: {}", of(&output));
    };
    command("freeze");
    assert!(is_held(pid), "when the command has ended it is done");
    assert_eq!(world.show(APP).app.state, "frozen");
    world.post(APP, "wakes it all the same");
    world.expect(APP, &["wakes it all the same"]);
    command("freeze");
    assert!(is_held(pid));
    command("thaw");
    assert!(!is_held(pid));
    command("kill");
    assert!(!is_running(pid) && !world.is_owned(APP));
    let freeze = world.cli(&["freeze", APP]);
    assert!(!freeze.status.success() && of(&freeze).contains("does not run"), "{}", of(&freeze));
    world.post(APP, "back to life");
    world.expect(APP, &["wakes it all the same", "back to life"]);
    assert_ne!(world.pid(APP), pid);
    let pushed = world.cli(&["push", APP, "from the command line"]);
    assert!(pushed.status.success(), "{}", of(&pushed));
    wait("the push", || (world.bodies(APP).last()? == "from the command line").then_some(()));
    let log = world.cli(&["log"]);
    let lines: Vec<&str> = std::str::from_utf8(&log.stdout).unwrap().lines().collect();
    for verdict in ["freeze", "thaw", "kill", "start"] {
        let of_it = |line: &&&str| line.contains(APP) && line.contains(&format!(" {verdict} "));
        assert!(lines.iter().any(|line| of_it(&line)), "{verdict}: {lines:?}");
    }
    let json = world.cli(&["log", "--json", "example.app"]);
    let json: view::Log = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json.entries.len(), lines.len(), "it is the only app");
    let unknown = world.cli(&["kill", "org.example.Nobody"]);
    assert!(!unknown.status.success() && of(&unknown).contains("org.example.Nobody"));
}

#[test]
fn an_app_may_do_nothing_to_another() {
    let world = World::new(Setup { top: "profile = \"cached\"", lifecycle: FAST, ..Setup::default() });
    world.samples(&[(APP, "")]);
    let pid = world.pid(APP);
    let other = world.client("org.example.Other", Behaviour::Accept);
    other.endpoint("t");
    let shell = world.nameless();
    shell.porter("org.nightporter1.App", "SetStateOf", &[APP, "foreground"]).unwrap();

    let refused = Err("org.nightporter1.Error.NotAuthorized".to_owned());
    for member in ["Freeze", "Thaw", "Kill", "Show", "Why", "Endpoints"] {
        assert_eq!(other.porter("org.nightporter1.Manager", member, &[APP]), refused, "{member}");
    }
    for member in ["Apps", "Report"] {
        assert_eq!(other.porter("org.nightporter1.Manager", member, &[]), refused, "{member}");
    }
    for state in ["background", "foreground"] {
        assert_eq!(other.porter("org.nightporter1.App", "SetStateOf", &[APP, state]), refused, "{state}");
    }
    // Who may not is not told who is there.
    assert_eq!(other.porter("org.nightporter1.Manager", "Kill", &["org.example.Nobody"]), refused);
    assert!(stays(Duration::from_millis(600), || is_running(pid) && !is_held(pid)));

    // For itself it may speak and look.
    other.porter("org.nightporter1.App", "SetState", &["background"]).unwrap();
    other.porter("org.nightporter1.App", "SetStateOf", &["org.example.Other", "foreground"]).unwrap();
    other.porter("org.nightporter1.Manager", "Show", &["org.example.Other"]).unwrap();
    assert!(other.porter("org.nightporter1.App", "SetState", &["sleeping"]).is_err());
    // Who is no app has no state.
    assert!(shell.porter("org.nightporter1.App", "SetState", &["background"]).is_err());
}

#[test]
fn the_report_agrees_with_the_kernel() {
    let apps = ["org.example.A", "org.example.B", "org.example.C"];
    let world = World::new(Setup { top: "profile = \"cached\"", lifecycle: FAST, ..Setup::default() });
    for app in apps {
        world.install_with(app, "", "16384");
        world.launch(app);
    }
    for app in apps {
        world.wait_ready(app);
        world.wait_state(app, "frozen");
    }
    // Frozen they do not change, but what they share with the apps of other tests, which come and go, is theirs in part;
    // and the daemon changes by being asked. So a report is compared with what is read right before and after it.
    let kernel = || (apps.map(|app| memory(world.pid(app))), memory(world.daemon_pid()));
    let agrees = |ours: u64, before: u64, after: u64| {
        let slack = before.max(after) / 20 + 256;
        (before.min(after) - slack..=before.max(after) + slack).contains(&ours)
    };
    let mut last = String::new();
    let report = wait_for(Duration::from_secs(5), || {
        let (before, daemon_before) = kernel();
        let report: view::Report = world.ask("Report", None);
        let (after, daemon_after) = kernel();
        let mut fits = agrees(report.daemon.pss, daemon_before.pss, daemon_after.pss);
        for ((row, before), after) in report.apps.iter().zip(before).zip(after) {
            let now = row.now.unwrap();
            fits &= agrees(now.pss, before.pss, after.pss) && agrees(now.uss, before.uss, after.uss);
        }
        last = format!("{report:?}\nbefore {before:?} {daemon_before:?}\nafter {after:?} {daemon_after:?}");
        fits.then_some(report)
    });
    let report = report.unwrap_or_else(|| panic!("{last}"));
    assert_eq!(report.apps.len(), 3);
    for (row, app) in report.apps.iter().zip(apps) {
        let (now, resident) = (row.now.unwrap(), row.resident.unwrap());
        assert_eq!(row.name, app);
        assert!(now.uss > 16 * 1024 && resident.uss > 16 * 1024, "the history counts: {row:?}");
        let pages = resident.pss as i64 - now.pss as i64 - row.cache;
        assert_eq!(row.saved, Some(pages + row.kernel - row.zram as i64));
        if app == apps[2] {
            // The others were alone with their program's pages when they were measured.
            assert!(agrees(resident.uss, now.uss, now.uss), "{row:?}");
        }
    }
    let balances = |report: &view::Report| {
        let sum = |of: fn(&view::LedgerRow) -> Option<nightporter::model::Memory>| -> u64 {
            report.apps.iter().filter_map(of).map(|memory| memory.pss).sum()
        };
        assert_eq!(report.resident, sum(|row| row.resident));
        assert_eq!(report.now, sum(|row| row.now));
        let costs = report.now + report.zram + report.daemon.pss + report.sockets;
        assert_eq!(report.saved, report.resident as i64 - costs as i64 - report.cache + report.kernel);
    };
    balances(&report);

    assert!(world.cli(&["kill", apps[0]]).status.success());
    let after: view::Report = world.ask("Report", None);
    balances(&after);
    let gone = &after.apps[0];
    assert_eq!(gone.now.unwrap().pss, 0);
    assert_eq!(gone.saved, Some(gone.resident.unwrap().pss as i64 - gone.cache + gone.kernel));
    assert!(gone.saved.unwrap() > 16 * 1024, "its history is its own: {gone:?}");
    assert!(after.now + 12 * 1024 < report.now, "{} before, {} after", report.now, after.now);
    let printed = world.cli(&["report", "--json"]);
    let printed: view::Report = serde_json::from_slice(&printed.stdout).unwrap();
    assert_eq!(printed.resident, after.resident);
}
