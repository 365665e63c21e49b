//! The real demo with real processes: relay, daemon, private bus, sample apps.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

#[path = "demo/support.rs"]
mod support;

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{assert_clean, interrupt, left_behind, run, text};
use tempfile::TempDir;

/// Every demo here keeps its files below a directory of its own, so that its processes can be told from all others: each
/// of them has that directory in its command line or its environment.
fn demo(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nightporter"));
    command.arg("demo").env("TMPDIR", dir);
    command
}

fn fields(document: &Value, at: &str) -> BTreeSet<String> {
    document.pointer(at).unwrap().as_object().unwrap().keys().cloned().collect()
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn three_apps_go_from_three_connections_to_one_and_lose_nothing() {
    let dir = TempDir::new().unwrap();
    let out = TempDir::new().unwrap();
    let figures = out.path().join("figures.json");
    let output = run(demo(dir.path()).args(["--apps", "3", "--messages", "1", "--json"]).arg(&figures));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_clean(dir.path());

    let document: Value = serde_json::from_str(&fs::read_to_string(&figures).unwrap()).unwrap();
    assert_eq!(
        fields(&document, ""),
        names(&["apps", "upstream_connections", "memory_kib", "messages", "wake_ms", "freezer", "seconds"])
    );
    assert_eq!(fields(&document, "/upstream_connections"), names(&["resident", "shared"]));
    assert_eq!(
        fields(&document, "/memory_kib"),
        names(&["resident_pss", "shared_pss", "daemon_pss", "zram", "saved", "ledger_saved"])
    );
    assert_eq!(fields(&document, "/messages"), names(&["sent", "delivered", "lost", "duplicated"]));
    assert_eq!(fields(&document, "/wake_ms"), names(&["running", "frozen", "tombstoned"]));

    let number = |at: &str| document.pointer(at).and_then(Value::as_f64).unwrap_or_else(|| panic!("{at}: {document}"));
    let whole = |at: &str| document.pointer(at).and_then(Value::as_i64).unwrap_or_else(|| panic!("{at}: {document}"));
    assert_eq!(whole("/apps"), 3);
    assert_eq!((whole("/upstream_connections/resident"), whole("/upstream_connections/shared")), (3, 1));
    assert_eq!((whole("/messages/lost"), whole("/messages/duplicated")), (0, 0), "{document}");
    // One on its own, and at least running, frozen and tombstoned, for each app.
    assert!(whole("/messages/sent") >= 12, "{document}");
    assert_eq!(whole("/messages/sent"), whole("/messages/delivered"));
    for state in ["running", "frozen", "tombstoned"] {
        let (p50, p99) = (number(&format!("/wake_ms/{state}/p50")), number(&format!("/wake_ms/{state}/p99")));
        assert!(p50 > 0.0 && p50 <= p99 && p99 < 15_000.0, "{state}: {document}");
    }
    // Three histories of 8 MiB at least, and all of them gone at the end.
    assert!(whole("/memory_kib/resident_pss") > 3 * 8192, "{document}");
    assert_eq!(whole("/memory_kib/shared_pss"), 0, "{document}");
    assert!(whole("/memory_kib/daemon_pss") > 0, "{document}");
    assert_eq!(
        whole("/memory_kib/saved"),
        whole("/memory_kib/resident_pss")
            - whole("/memory_kib/shared_pss")
            - whole("/memory_kib/daemon_pss")
            - whole("/memory_kib/zram")
    );
    assert!(["cgroup2", "signal"].contains(&document["freezer"].as_str().unwrap()), "{document}");
    assert!((1.0..60.0).contains(&number("/seconds")), "{document}");

    let table = text(&output.stdout);
    for expected in ["Connections to the push server", "0 lost", "tombstone", "nightporter-sample"] {
        assert!(table.contains(expected), "{expected} is missing:\n{table}");
    }
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let mut child = demo(dir.path()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // Into the second half, where there is most to leave behind: the daemon and apps it started.
    let deadline = Instant::now() + Duration::from_secs(60);
    while !left_behind(dir.path()).iter().any(|process| process.contains("nightporterd")) {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "the daemon never came");
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(Duration::from_millis(1500));
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert_clean(dir.path());
}

#[test]
fn a_program_that_does_not_keep_the_contract_fails_the_demo_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let output = run(demo(dir.path()).args(["--apps", "1", "--app-command", "sh -c 'echo not an app >&2; exit 3'"]));
    assert_eq!(output.status.code(), Some(70), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("not an app"), "{}", text(&output.stderr));
    assert_clean(dir.path());
}

#[test]
fn the_users_own_program_is_run_as_the_app() {
    let dir = TempDir::new().unwrap();
    let command = format!("env NIGHTPORTER_SAMPLE_BALLAST_KIB=1024 {}", env!("CARGO_BIN_EXE_nightporter-sample"));
    let output = run(demo(dir.path()).args(["--apps", "1", "--messages", "1", "--app-command", &command]));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("1 × env NIGHTPORTER_SAMPLE_BALLAST_KIB"), "{}", text(&output.stdout));
    assert_clean(dir.path());
}
