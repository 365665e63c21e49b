//! `nightporterd --user`: one session, no privileges, and the cgroups systemd would have delegated to the user. The user,
//! the bus, the cgroups and the apps are real; only the user's systemd is played, by a script that gives each app a scope
//! of its own with the user's own rights. Must run as root, to make the user's processes.
#![cfg(all(feature = "cli", feature = "relay"))]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![expect(clippy::print_stderr, reason = "what a failing test wants to be known")]

#[path = "support/processes.rs"]
#[expect(dead_code, reason = "made for the tests of the daemon; shared")]
mod processes;
#[path = "relay/harness.rs"]
#[expect(dead_code, reason = "made for the tests of the relay; shared")]
mod relay;
#[path = "support/reports.rs"]
#[expect(dead_code, reason = "made for the tests of the daemon; shared")]
mod reports;
#[path = "usermode/support.rs"]
mod support;

use self::{
    processes::{is_held, is_running},
    support::{Cgroups, Session, wait},
};

/// Debian's user `games` (base-passwd).
const UID: u32 = 5;
const CHAT: &str = "org.example.Chat";

#[test]
fn a_session_has_its_whole_service_from_what_is_delegated_to_it() {
    let mut session = Session::new(UID, Cgroups::Delegated);
    session.install(CHAT);
    session.start_daemon();
    let status = std::fs::read_to_string(format!("/proc/{}/status", session.daemon_pid())).unwrap();
    assert!(status.contains("Uid:\t5\t5\t5\t5\n") && status.contains("CapEff:\t0000000000000000\n"), "{status}");

    let endpoint = session.launch(CHAT);
    session.post(&endpoint, "while it runs");
    session.expect(CHAT, &["while it runs"]);

    // It is in a scope of its own, which the kernel freezes and nothing is stopped for.
    let pid = session.pid(CHAT);
    let scope = session.cgroup_of(pid);
    assert!(scope.to_str().unwrap().ends_with(".scope"), "{scope:?}");
    wait("the freeze", || session.is_frozen(&scope).then_some(()));
    assert!(is_held(pid) && !processes::is_stopped(pid));
    session.post(&endpoint, "while it is frozen");
    session.expect(CHAT, &["while it runs", "while it is frozen"]);
    assert_eq!(session.pid(CHAT), pid);
    wait("the next freeze", || session.is_frozen(&scope).then_some(()));

    // What ExecStopPost= of the user unit does after the daemon was killed.
    session.kill_daemon();
    assert!(session.is_frozen(&scope));
    let thawed = session.nightporterd(&["--user", "--thaw-all"]);
    assert!(String::from_utf8_lossy(&thawed.stdout).contains("1 thawed"), "{thawed:?}");
    wait("the thaw", || (!session.is_frozen(&scope)).then_some(()));
    session.post(&endpoint, "while there is no daemon");
    session.start_daemon();
    session.expect(CHAT, &["while it runs", "while it is frozen", "while there is no daemon"]);

    // Ended by hand while it is frozen, it goes with all it has started; the next message brings it back.
    session.background(CHAT);
    wait("the freeze after the restart", || session.is_frozen(&scope).then_some(()));
    let killed = session.nightporter(&["--user", "kill", CHAT]);
    assert!(killed.status.success(), "{killed:?}");
    wait("its end", || (!is_running(pid)).then_some(()));
    wait("the end of its child", || session.is_empty(&scope).then_some(()));
    session.post(&endpoint, "to a tombstone");
    session.expect(CHAT, &["while it runs", "while it is frozen", "while there is no daemon", "to a tombstone"]);
    let next = session.cgroup_of(session.pid(CHAT));
    assert_ne!(next, scope);
    wait("the freeze of the next instance", || session.is_frozen(&next).then_some(()));

    // Asked to end, it leaves nothing frozen behind.
    session.stop_daemon();
    assert!(!session.is_frozen(&next));
    session.finds_its_files();
}

#[test]
fn without_a_cgroup_of_its_own_to_write_the_user_holds_apps_by_signals() {
    let mut session = Session::new(UID, Cgroups::NotOurs);
    session.install(CHAT);
    session.start_daemon();
    let endpoint = session.launch(CHAT);
    let pid = session.pid(CHAT);
    wait("the stop", || processes::is_stopped(pid).then_some(()));
    session.post(&endpoint, "while it is stopped");
    session.expect(CHAT, &["while it is stopped"]);
    wait("the next stop", || processes::is_stopped(pid).then_some(()));
    session.kill_daemon();
    let thawed = session.nightporterd(&["--user", "--thaw-all"]);
    assert!(thawed.status.success(), "{thawed:?}");
    wait("the thaw", || (!processes::is_stopped(pid)).then_some(()));
}
