//! The executor for app processes on this machine's real kernel: cgroup v2, signals, pidfds, `/proc`. Needs root.
#![cfg(feature = "daemon")]
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "a test fails by panicking")]

#[path = "support/patience.rs"]
mod patience;

use std::{
    fs,
    io::{self, Read},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt, parent_id},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant as Clock},
};

use mio::{Events, Poll, Token};
use nightporter::{
    event::{Event, Outcome},
    model::{AppKey, Bus, Freezer, Memory, ProcessFacts, Sample, SelfSample, TargetId, Veto, VetoKind, ZramSource},
    sys::{
        clock,
        inbox::{self, Inbox, Incoming, Process},
        jobs::Jobs,
        process::{Options, Targets, thaw_leftovers},
    },
};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

const WAKER: Token = Token(7);
const FIRST: usize = 100;
static NUMBER: AtomicU32 = AtomicU32::new(0);

// ---- cgroup freezer ------------------------------------------------------------------------------------------------

#[test]
fn an_app_in_its_own_cgroup_is_frozen_and_thawed() {
    let group = Group::new();
    let app = App::forking();
    group.take(&app);
    let mut porter = Porter::new();
    let (target, facts) = porter.adopt(&app);
    assert_eq!(facts.freezer, Freezer::Cgroup2);
    assert_eq!((facts.pid, facts.protected), (app.pid(), None));
    assert!(app.grows());

    // It has forked many a child by the time it is frozen.
    assert_eq!(porter.inspect(target), []);
    assert!(app.grows());
    porter.freeze(target);
    assert!(group.is_frozen());
    assert!(app.is_still());
    let record = fs::read_to_string(porter.record()).unwrap();
    assert!(record.contains(group.0.to_str().unwrap()), "{record}");

    porter.thaw(target);
    assert!(!group.is_frozen());
    assert!(app.grows());
    assert!(!porter.record().exists());

    porter.targets.freeze(target);
    porter.targets.thaw_all();
    assert!(app.grows());
    porter.targets.freeze(target);
    drop(porter);
    assert!(app.grows());
}

#[test]
fn an_app_that_shares_its_cgroup_gets_its_own() {
    let app = App::forking();
    let before = cgroup_of(app.pid());
    let mut porter = Porter::new();
    let (target, facts) = porter.adopt(&app);
    assert_eq!(facts.freezer, Freezer::Cgroup2);
    assert_eq!(cgroup_of(app.pid()), before, "adopting alone touches nothing");

    porter.freeze(target);
    let path = cgroup_of(app.pid());
    assert!(path.starts_with("/nightporter-") && path.contains("/app-"), "{path}");
    assert!(app.is_still());
    porter.thaw(target);
    assert!(app.grows());
    porter.freeze(target);

    let dir = mount().join(&path[1..]);
    assert!(dir.is_dir());
    porter.targets.kill(target, Duration::from_millis(100));
    porter.gone(target);
    wait_for("the cgroup to be removed", || {
        porter.turn();
        !dir.exists()
    });
    wait_for("rest", || {
        porter.turn();
        porter.targets.poll_timeout().is_none()
    });
}

#[test]
fn with_systemd_a_shared_cgroup_is_left_alone() {
    let group = Group::new();
    let (app, stranger) = (App::forking(), App::forking());
    group.take(&app);
    group.take(&stranger);
    let mut porter = Porter::with(Options { systemd: Some(true), ..Options::default() });
    let (target, facts) = porter.adopt(&app);
    assert_eq!(facts.freezer, Freezer::Signal);
    porter.freeze(target);
    assert!(!group.is_frozen());
    assert!(app.is_still());
    assert!(stranger.grows());
    assert_eq!(cgroup_of(app.pid()), group.path());
    porter.thaw(target);
    assert!(app.grows());
}

#[test]
fn a_cgroup_that_gets_a_stranger_is_not_frozen_any_more() {
    let group = Group::new();
    let (app, stranger) = (App::forking(), App::forking());
    group.take(&app);
    let mut porter = Porter::with(Options { systemd: Some(true), ..Options::default() });
    let (target, facts) = porter.adopt(&app);
    assert_eq!(facts.freezer, Freezer::Cgroup2);
    group.take(&stranger);
    porter.freeze(target);
    assert!(!group.is_frozen());
    assert!(stranger.grows());
    assert!(app.is_still());
}

#[test]
fn an_app_unit_may_hold_more_than_one_tree_but_not_two_apps() {
    let group = Group::named("app-flatpak-im.example-1.scope");
    let (app, other) = (App::forking(), App::forking());
    group.take(&app);
    group.take(&other);
    let mut porter = Porter::with(Options { systemd: Some(true), ..Options::default() });
    let (target, facts) = porter.adopt(&app);
    assert_eq!(facts.freezer, Freezer::Cgroup2);
    porter.freeze(target);
    assert!(group.is_frozen());
    assert!(other.is_still());
    porter.thaw(target);

    // Another app in the same unit: freezing one would freeze the other, which may be in the foreground.
    let (_, facts) = porter.adopt(&other);
    assert_eq!(facts.protected, None);
    let reason = porter.freeze_fails(target);
    assert!(reason.contains("runs together with it"), "{reason}");
    assert!(app.grows() && other.grows());
}

#[test]
fn a_freeze_the_kernel_does_not_confirm_is_rolled_back() {
    // A task that waits in the kernel for a file system that never answers does not come to rest.
    let silent = SilentFileSystem::mount();
    let app = App::forking();
    let reader = App::spawn(Command::new("stat").arg(silent.dir.path()).stdout(Stdio::null()).stderr(Stdio::null()));
    wait_for("the reader to hang", || state_of(reader.pid()) == 'D');
    let unit = Group::named("app-stuck.scope");
    unit.take(&app);
    unit.take(&reader);
    let mut porter = Porter::with(Options { deadline: Duration::from_millis(300), ..Options::default() });
    let (target, facts) = porter.adopt(&app);
    assert_eq!(facts.freezer, Freezer::Cgroup2);
    let started = Clock::now();
    let reason = porter.freeze_fails(target);
    assert!(reason.contains("within"), "{reason}");
    assert!(reason.contains(&format!("process {} (stat", reader.pid())), "{reason}");
    assert!(reason.contains("hangs in the kernel"), "{reason}");
    assert!(started.elapsed() >= Duration::from_millis(300));
    assert_eq!(fs::read_to_string(unit.0.join("cgroup.freeze")).unwrap().trim(), "0");
    assert!(app.grows());
    assert!(!porter.record().exists());
    assert_eq!(porter.targets.poll_timeout(), None);
}

#[test]
fn what_somebody_else_froze_is_not_ours() {
    let group = Group::new();
    let app = App::forking();
    group.take(&app);
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    let outer = group.0.parent().unwrap().join("cgroup.freeze");
    fs::write(&outer, "1").unwrap();
    wait_for("the freeze from above", || group.is_frozen());
    let reason = porter.freeze_fails(target);
    assert!(reason.contains("somebody else"), "{reason}");
    fs::write(&outer, "0").unwrap();
    fs::write(group.0.join("cgroup.freeze"), "1").unwrap();
    let reason = porter.freeze_fails(target);
    assert!(reason.contains("somebody else"), "{reason}");
    drop(porter);
    assert_eq!(fs::read_to_string(group.0.join("cgroup.freeze")).unwrap().trim(), "1", "left as somebody else left it");
}

#[test]
fn a_thaw_takes_back_a_freeze_that_is_under_way() {
    for signals_only in [false, true] {
        let app = App::forking();
        let mut porter = Porter::with(Options { signals_only, systemd: Some(false), ..Options::default() });
        let (target, _) = porter.adopt(&app);
        porter.targets.freeze(target);
        porter.targets.thaw(target);
        porter.until("the thaw", |event| matches!(event, Event::Outcome(t, Outcome::Thawed { .. }) if *t == target));
        assert!(app.grows());
        assert!(!porter.record().exists());
    }
}

// ---- signal freezer ------------------------------------------------------------------------------------------------

#[test]
fn a_tree_is_stopped_and_continued() {
    signal_scenario();
}

#[test]
fn a_tree_is_stopped_without_privileges() {
    let status = helper("signals").uid(65534).gid(65534).stdout(Stdio::inherit()).status().unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn a_tree_that_somebody_else_stopped_is_left_stopped() {
    let app = App::forking();
    kill_process(pid(app.pid()), Signal::STOP).unwrap();
    wait_for("the stop", || state_of(app.pid()) == 'T');
    let mut porter = Porter::with(Options { signals_only: true, ..Options::default() });
    let (target, _) = porter.adopt(&app);
    let reason = porter.freeze_fails(target);
    assert!(reason.contains("stopped by somebody else"), "{reason}");
    assert_eq!(state_of(app.pid()), 'T');
    kill_process(pid(app.pid()), Signal::CONT).unwrap();
    assert!(app.grows());
}

#[test]
fn a_process_that_does_not_stop_is_rolled_back() {
    // A parent in vfork(2) stands still in the kernel until its child is done, and cannot be stopped there.
    let app = App::spawn(&mut helper("vfork"));
    let stuck = || tree_of(app.pid()).into_iter().any(|pid| threads_of(pid).contains(&'D'));
    wait_for("the vfork", stuck);
    let options = Options { signals_only: true, deadline: Duration::from_millis(300), ..Options::default() };
    let mut porter = Porter::with(options);
    let (target, _) = porter.adopt(&app);
    let reason = porter.freeze_fails(target);
    assert!(reason.contains("within"), "{reason}");
    assert!(tree_of(app.pid()).into_iter().all(|pid| !threads_of(pid).contains(&'T')));
    assert!(!porter.record().exists());
}

// ---- kill ----------------------------------------------------------------------------------------------------------

#[test]
fn a_frozen_app_is_asked_to_end_and_may_finish() {
    for signals_only in [false, true] {
        let app = App::shell(
            "trap 'sleep 0.2; echo saved > $F.saved; exit 0' TERM; while :; do echo >> $F; sleep 0.01; done",
        );
        let mut porter = Porter::with(Options { signals_only, systemd: Some(false), ..Options::default() });
        let (target, _) = porter.adopt(&app);
        assert!(app.grows());
        porter.freeze(target);
        porter.targets.kill(target, Duration::from_secs(5));
        porter.gone(target);
        assert!(app.file.with_extension("saved").exists(), "signals_only: {signals_only}");
        assert!(!porter.record().exists());
    }
}

#[test]
fn an_app_that_ignores_it_is_killed_with_its_children() {
    for signals_only in [false, true] {
        let app =
            App::shell("trap '' TERM; sh -c 'while :; do echo >> $F; sleep 0.01; done' & while :; do sleep 1; done");
        let mut porter = Porter::with(Options { signals_only, systemd: Some(false), ..Options::default() });
        let (target, _) = porter.adopt(&app);
        assert!(app.grows());
        porter.freeze(target);
        let started = Clock::now();
        porter.targets.kill(target, Duration::from_millis(300));
        porter.gone(target);
        assert!(started.elapsed() >= Duration::from_millis(300));
        assert!(app.is_still(), "signals_only: {signals_only}");
    }
}

#[test]
fn children_that_outlive_their_parent_are_killed_after_the_grace() {
    for signals_only in [false, true] {
        let app = App::shell("sh -c 'trap \"\" TERM; while :; do echo >> $F; sleep 0.01; done' & wait");
        let mut porter = Porter::with(Options { signals_only, systemd: Some(false), ..Options::default() });
        let (target, _) = porter.adopt(&app);
        assert!(app.grows());
        porter.freeze(target);
        porter.targets.kill(target, Duration::from_secs(1));
        porter.gone(target);
        assert!(app.grows(), "the grace is the children's as well");
        assert!(porter.targets.poll_timeout().is_some());
        wait_for("the children to be killed", || {
            porter.turn();
            porter.targets.poll_timeout().is_none()
        });
        assert!(app.is_still(), "signals_only: {signals_only}");
    }
}

#[test]
fn the_end_of_an_app_is_told_once_and_thaws_the_rest() {
    let group = Group::new();
    let app = App::shell("sh -c 'while :; do echo >> $F; sleep 0.01; done' & wait");
    assert!(app.grows());
    group.take(&app);
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    porter.freeze(target);
    assert!(app.is_still());
    kill_process(pid(app.pid()), Signal::KILL).unwrap();
    porter.gone(target);
    assert!(app.grows(), "its children are not held without it");
    assert!(!porter.record().exists());
    for _ in 0..3 {
        porter.turn();
    }
    assert!(porter.seen.is_empty(), "{:?}", porter.seen);
    assert!(porter.freeze_fails(target).contains("ended"));
}

// ---- identity and protection ---------------------------------------------------------------------------------------

#[test]
fn a_process_that_is_not_the_one_meant_is_refused() {
    let (app, other) = (App::forking(), App::forking());
    let mut porter = Porter::new();
    let key = AppKey::new(Bus::Session(0), "org.example.A");
    let mixed = Process { pid: other.pid(), uid: 0, pidfd: pidfd(app.pid()) };
    assert!(porter.targets.adopt(&key, mixed).unwrap_err().contains("pidfd"));
    let another_user = Process { pid: app.pid(), uid: 4321, pidfd: pidfd(app.pid()) };
    assert!(porter.targets.adopt(&key, another_user).unwrap_err().contains("user"));
    let mut dead = App::forking();
    let (dead_pid, dead_fd) = (dead.pid(), pidfd(dead.pid()));
    dead.child.kill().unwrap();
    // A zombie first, then nobody.
    wait_for("its end", || state_of(dead_pid) == 'Z');
    let ended = Process { pid: dead_pid, uid: 0, pidfd: dead_fd.try_clone().unwrap() };
    assert!(porter.targets.adopt(&key, ended).unwrap_err().contains("ended"));
    dead.child.wait().unwrap();
    let ended = Process { pid: dead_pid, uid: 0, pidfd: dead_fd };
    assert!(porter.targets.adopt(&key, ended).unwrap_err().contains("ended"));
}

#[test]
fn the_session_is_never_touched() {
    let dir = tempfile::tempdir().unwrap();
    let bus = dir.path().join("dbus-daemon");
    fs::copy(fs::canonicalize("/bin/sleep").unwrap(), &bus).unwrap();
    let app = App::spawn(Command::new(&bus).arg("60"));
    wait_for("the program", || fs::read_link(format!("/proc/{}/exe", app.pid())).is_ok_and(|exe| exe == bus));
    let mut porter = Porter::new();
    let (target, facts) = porter.adopt(&app);
    assert!(facts.protected.unwrap().contains("message bus"));
    assert!(porter.freeze_fails(target).contains("message bus"));
    porter.targets.kill(target, Duration::ZERO);
    porter.until("the refusal", |event| {
        matches!(event, Event::Outcome(t, Outcome::KillFailed(reason)) if *t == target && reason.contains("message bus"))
    });
    thread::sleep(Duration::from_millis(50));
    assert_eq!(state_of(app.pid()), 'S');

    // Below an app, or by the name it registers under, just the same.
    let launcher = App::shell(&format!("'{}' 60 & while :; do echo >> $F; sleep 0.01; done", bus.display()));
    assert!(launcher.grows());
    let (target, facts) = porter.adopt(&launcher);
    assert!(facts.protected.unwrap().contains("message bus"));
    porter.freeze_fails(target);
    assert!(launcher.grows());
    let portal = App::forking();
    let key = AppKey::new(Bus::Session(0), "org.freedesktop.portal.Desktop");
    let (_, facts) = porter.targets.adopt(&key, portal.process()).unwrap();
    assert!(facts.protected.unwrap().contains("portal"));
}

#[test]
fn what_a_users_bus_says_of_another_users_process_is_not_believed() {
    let mut porter = Porter::new();
    let (root, init) = (App::forking(), std::process::id());
    for (bus, process) in [
        (Bus::Session(4_002_001), root.process()),
        (Bus::Session(4_002_001), Process { uid: 4_002_001, ..root.process() }),
        (Bus::Session(4_002_001), Process { pid: init, uid: 0, pidfd: pidfd(init) }),
    ] {
        let refused = porter.targets.adopt(&AppKey::new(bus, "org.example.Chat"), process);
        assert!(refused.is_err(), "{refused:?}");
    }
    // On the system bus apps run as whom they like.
    assert!(porter.targets.adopt(&AppKey::new(Bus::System, "org.example.Chat"), root.process()).is_ok());
}

#[test]
fn neither_the_porter_nor_what_it_runs_below() {
    let mut porter = Porter::new();
    let key = AppKey::new(Bus::Session(0), "org.example.Me");
    for me in [std::process::id(), parent_id(), 1] {
        let process = Process { pid: me, uid: 0, pidfd: pidfd(me) };
        let (target, facts) = porter.targets.adopt(&key, process).unwrap();
        assert!(facts.protected.is_some(), "{me}");
        porter.freeze_fails(target);
        porter.targets.forget(target);
    }
}

// ---- the freeze record ---------------------------------------------------------------------------------------------

#[test]
fn what_a_killed_daemon_froze_is_thawed() {
    for mode in ["crash-cgroup", "crash-signals"] {
        let group = Group::new();
        let app = App::forking();
        group.take(&app);
        let dir = tempfile::tempdir().unwrap();
        let status = helper(mode).env("NP_DIR", dir.path()).env("NP_PID", app.pid().to_string()).status().unwrap();
        assert_eq!(status.signal(), Some(9), "{mode}: {status}");
        assert!(app.is_still(), "{mode}");
        assert_eq!(oom_of(app.pid()), Some(900), "{mode}");
        let report = thaw_leftovers(dir.path());
        assert_eq!(oom_of(app.pid()), oom_of(std::process::id()), "{mode}: {report}");
        assert!(
            report.thawed >= 1 && report.restored >= 1 && report.failed.is_empty() && report.damaged.is_empty(),
            "{mode}: {report}"
        );
        assert!(app.grows(), "{mode}");
        assert!(thaw_leftovers(dir.path()).is_empty());
    }
}

#[test]
fn at_whichever_moment_the_daemon_is_killed() {
    for mode in ["churn-cgroup", "churn-signals"] {
        let group = Group::new();
        let app = App::forking();
        group.take(&app);
        let mut thawed = 0;
        // A freeze takes as long as the machine lets it: later and later, until it was met.
        for round in 0..100_u64 {
            if round >= 20 && thawed > 0 {
                break;
            }
            let dir = tempfile::tempdir().unwrap();
            let mut command = helper(mode);
            command.env("NP_DIR", dir.path()).env("NP_PID", app.pid().to_string()).stdout(Stdio::piped());
            let mut daemon = command.spawn().unwrap();
            // It says so when the first freeze is about to begin.
            let mut output = daemon.stdout.take().unwrap();
            let mut said = Vec::new();
            while !said.ends_with(b"ready\n") {
                let mut byte = [0];
                output.read_exact(&mut byte).unwrap();
                said.push(byte[0]);
            }
            thread::sleep(Duration::from_micros(round * round * 150));
            daemon.kill().unwrap();
            daemon.wait().unwrap();
            let report = thaw_leftovers(dir.path());
            assert!(report.failed.is_empty() && report.damaged.is_empty(), "{mode} {round}: {report}");
            let states = || tree_of(app.pid()).into_iter().map(|pid| (pid, state_of(pid))).collect::<Vec<_>>();
            let frozen = group.is_frozen();
            assert!(app.grows(), "{mode} {round}: {report}; frozen: {frozen}, {:?}", states());
            thawed += report.thawed;
        }
        assert!(thawed > 0, "{mode}: it was never killed while anything was frozen");
    }
}

#[test]
fn cgroups_of_a_dead_daemon_are_thawed_and_removed_even_without_a_record() {
    let app = App::forking();
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = helper("crash-cgroup");
    let status = daemon.env("NP_DIR", dir.path()).env("NP_PID", app.pid().to_string()).status().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
    let path = mount().join(&cgroup_of(app.pid())[1..]);
    assert!(path.to_string_lossy().contains("/nightporter-"), "{}", path.display());
    let mut porter = Porter::new();
    assert!(app.grows());
    // Another daemon that starts thaws and removes it again, so the new one does not freeze the app there.
    let (target, facts) = porter.adopt(&app);
    assert_eq!(facts.freezer, Freezer::Cgroup2);
    porter.freeze(target);
    let own = mount().join(&cgroup_of(app.pid())[1..]);
    assert_ne!(own, path);
    assert!(own.to_string_lossy().contains(&format!("/nightporter-{}.", std::process::id())), "{}", own.display());
    porter.targets.kill(target, Duration::from_millis(100));
    porter.gone(target);
    wait_for("the cgroups to be removed", || {
        porter.turn();
        !own.exists() && !path.parent().unwrap().exists()
    });
}

#[test]
fn an_app_in_the_care_of_another_daemon_is_left_to_it() {
    let app = App::forking();
    let dir = tempfile::tempdir().unwrap();
    let mut command = helper("churn-cgroup");
    command.env("NP_DIR", dir.path()).env("NP_PID", app.pid().to_string());
    let mut daemon = command.spawn().unwrap();
    wait_for("the move", || cgroup_of(app.pid()).contains(&format!("/nightporter-{}.", daemon.id())));
    let mut porter = Porter::new();
    let key = AppKey::new(Bus::Session(0), "org.example.Other");
    let refused = porter.targets.adopt(&key, app.process());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(refused.unwrap_err().contains("another Night Porter"));
    thaw_leftovers(dir.path());
    assert!(app.grows());
    porter.targets.adopt(&key, app.process()).unwrap();
}

#[test]
fn a_record_of_somebody_else_thaws_nobody() {
    let group = Group::new();
    let app = App::forking();
    group.take(&app);
    fs::write(group.0.join("cgroup.freeze"), "1").unwrap();
    wait_for("the freeze", || group.is_frozen());
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let stopped = App::forking();
    kill_process(pid(stopped.pid()), Signal::STOP).unwrap();
    wait_for("the stop", || state_of(stopped.pid()) == 'T');
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "nightporter-frozen 1 {}\ncgroup 1 {}\nprocess {} 1\nrubbish\n",
        boot.trim(),
        group.0.display(),
        stopped.pid(),
    );
    fs::write(dir.path().join("frozen"), text).unwrap();
    let report = thaw_leftovers(dir.path());
    assert_eq!((report.thawed, report.gone, report.damaged.len()), (0, 2, 1), "{report}");
    assert!(group.is_frozen());
    assert_eq!(state_of(stopped.pid()), 'T');
    kill_process(pid(stopped.pid()), Signal::CONT).unwrap();
}

#[test]
fn without_a_place_for_the_record_nothing_is_frozen() {
    for signals_only in [false, true] {
        let app = App::forking();
        let mut porter = Porter::with(Options { signals_only, systemd: Some(false), ..Options::default() });
        let (target, _) = porter.adopt(&app);
        fs::remove_dir_all(porter.dir.path()).unwrap();
        let reason = porter.freeze_fails(target);
        assert!(reason.contains("freeze record"), "{reason}");
        assert!(app.grows());
    }
}

// ---- whose process it is -------------------------------------------------------------------------------------------

#[test]
fn a_process_is_the_apps_by_its_cgroup_or_its_parents() {
    let unit = Group::named("app-im.example-7.scope");
    let (app, resident, stranger) = (App::forking(), App::forking(), App::forking());
    unit.take(&app);
    let inner = unit.0.join("inner");
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("cgroup.procs"), resident.pid().to_string()).unwrap();
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    assert_eq!(porter.targets.of_pid(app.pid()), Some(target));
    assert_eq!(porter.targets.of_pid(resident.pid()), Some(target), "its cgroup, though not its child");
    for nobodys in [stranger.pid(), std::process::id(), 1, 0, u32::MAX] {
        assert_eq!(porter.targets.of_pid(nobodys), None, "{nobodys}");
    }

    let tree = App::shell("sh -c 'sleep 60; :' & while :; do echo >> $F; sleep 0.01; done");
    assert!(tree.grows());
    let child = tree_of(tree.pid()).into_iter().rfind(|pid| *pid != tree.pid()).unwrap();
    assert_eq!(porter.targets.of_pid(child), None);
    let (below, _) = porter.adopt(&tree);
    let lasting =
        || tree_of(tree.pid()).into_iter().filter(|pid| *pid != tree.pid()).max_by_key(|pid| tree_of(*pid).len());
    assert_eq!(porter.targets.of_pid(lasting().unwrap()), Some(below));
    // What it has started and the system knows as another app is not its own.
    let other = Group::named("app-org.other-1.scope");
    let moved = lasting().unwrap();
    fs::write(other.0.join("cgroup.procs"), moved.to_string()).unwrap();
    assert_eq!(porter.targets.of_pid(moved), None);
    porter.targets.forget(below);
    assert_eq!(porter.targets.of_pid(tree.pid()), None);
    let _ = fs::write(inner.join("cgroup.kill"), "1");
    wait_for("the inner cgroup to go", || fs::remove_dir(&inner).is_ok());
}

#[test]
fn another_users_process_is_not_the_apps() {
    let unit = Group::named("app-im.example-8.scope");
    let app = App::forking();
    let other = App::spawn(Command::new("sleep").arg("60").uid(65534).gid(65534));
    unit.take(&app);
    unit.take(&other);
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    assert_eq!(porter.targets.of_pid(app.pid()), Some(target));
    assert_eq!(porter.targets.of_pid(other.pid()), None);
}

// ---- what speaks against it ----------------------------------------------------------------------------------------

#[test]
fn nothing_speaks_against_a_quiet_app() {
    for signals_only in [false, true] {
        let app = App::forking();
        let mut porter = Porter::with(Options { signals_only, systemd: Some(false), ..Options::default() });
        let (target, _) = porter.adopt(&app);
        assert_eq!(porter.inspect(target), [], "signals_only: {signals_only}");
        porter.freeze(target);
        assert_eq!(porter.inspect(target), [], "signals_only: {signals_only}");
        assert!(app.is_still());
        porter.targets.forget(target);
        porter.targets.inspect(target);
        porter.until("an error", |event| matches!(event, Event::Inspected(_, Err(reason)) if reason.contains("ended")));
    }
}

#[test]
fn a_lock_that_others_wait_for() {
    for kind in ["flock", "posix", "ofd"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("database.lock");
        let lock =
            |wait: &str| App::spawn(helper("lock").env("NP_DIR", &path).env("NP_KIND", kind).env("NP_CHILD", wait));
        let app = lock("");
        wait_for("the lock", || path.with_extension("held").exists());
        let mut porter = Porter::new();
        let (target, _) = porter.adopt(&app);
        assert_eq!(porter.inspect(target), [], "{kind}: nobody waits");
        let waiter = lock("wait");
        let is_awaited = || {
            fs::read_to_string("/proc/locks")
                .unwrap()
                .lines()
                .any(|line| line.contains("->") && line.contains(&format!(":{} ", inode(&path))))
        };
        wait_for("the waiter", is_awaited);
        let found = porter.inspect(target);
        let [Veto { kind: VetoKind::AwaitedLock, reason }] = &found[..] else { panic!("{kind}: {found:?}") };
        assert!(reason.ends_with("database.lock"), "{kind}: {reason}");
        if kind != "ofd" {
            assert!(reason.contains(&format!("(process {})", waiter.pid())), "{kind}: {reason}");
        }
        // Who waits has nothing that another waits for.
        let (waiting, _) = porter.adopt(&waiter);
        assert_eq!(porter.inspect(waiting), [], "{kind}");
    }
}

#[test]
fn a_lock_its_own_processes_wait_for_keeps_nobody_else_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("own.lock");
    let script =
        format!("flock '{0}' sleep 60 & sleep 0.1; flock '{0}' true & while :; do sleep 1; done", path.display());
    let app = App::shell(&script);
    let is_awaited = || {
        path.exists()
            && fs::read_to_string("/proc/locks")
                .unwrap()
                .lines()
                .any(|line| line.contains("->") && line.contains(&format!(":{} ", inode(&path))))
    };
    wait_for("the waiter", is_awaited);
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    assert_eq!(porter.inspect(target), []);
}

#[test]
fn devices_and_file_systems_others_depend_on() {
    let dir = tempfile::tempdir().unwrap();
    let dev = dir.path().join("dev");
    fs::create_dir(&dev).unwrap();
    // The null device under another name: some are known by name alone.
    let null = rustix::fs::makedev(1, 3);
    let make = |name: &str| {
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(rustix::fs::CWD, dev.join(name), rustix::fs::FileType::CharacterDevice, mode, null)
            .unwrap();
        dev.join(name)
    };
    let mut porter = Porter::new();
    for (path, expected) in [
        (PathBuf::from("/dev/fuse"), Some((VetoKind::FileSystem, "it serves a file system (FUSE)"))),
        (make("watchdog0"), Some((VetoKind::Device, "it keeps the machine's watchdog quiet (/dev/watchdog0)"))),
        (make("ttyMSM7"), Some((VetoKind::Device, "it uses a serial device (/dev/ttyMSM7)"))),
        (PathBuf::from("/dev/null"), None),
        (PathBuf::from("/dev/urandom"), None),
    ] {
        let app = App::shell(&format!("exec 8<'{}'; while :; do echo >> $F; sleep 0.01; done", path.display()));
        assert!(app.grows());
        let (target, _) = porter.adopt(&app);
        let found = porter.inspect(target);
        let found: Vec<_> = found.iter().map(|veto| (veto.kind, &*veto.reason)).collect();
        assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "{}", path.display());
        porter.targets.forget(target);
    }
    // Not a device, whatever it is called.
    fs::write(dev.join("watchdog9"), "").unwrap();
    let app = App::shell(&format!("exec 8<'{}/watchdog9'; while :; do echo >> $F; sleep 0.01; done", dev.display()));
    assert!(app.grows());
    let (target, _) = porter.adopt(&app);
    assert_eq!(porter.inspect(target), []);
}

#[test]
fn who_answers_permission_events() {
    let dir = tempfile::tempdir().unwrap();
    let mut porter = Porter::new();
    for (kind, expected) in [("permission", 1), ("notice", 0)] {
        let path = dir.path().join(kind);
        fs::write(&path, "").unwrap();
        let app = App::spawn(helper("fanotify").env("NP_DIR", &path).env("NP_KIND", kind));
        wait_for("the group", || path.with_extension("held").exists());
        let (target, _) = porter.adopt(&app);
        let found = porter.inspect(target);
        assert_eq!(found.len(), expected, "{found:?}");
        assert!(found.iter().all(|veto| veto.kind == VetoKind::FileSystem && veto.reason.contains("fanotify")));
    }
}

#[test]
fn who_is_traced() {
    let app = App::forking();
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    let tracer = App::spawn(helper("trace").env("NP_PID", app.pid().to_string()));
    let traced = || {
        let status = fs::read_to_string(format!("/proc/{}/status", app.pid())).unwrap();
        !status.contains("TracerPid:\t0\n")
    };
    wait_for("the tracer", traced);
    let found = porter.inspect(target);
    let [Veto { kind: VetoKind::Debugger, reason }] = &found[..] else { panic!("{found:?}") };
    assert!(reason.contains(&format!("(process {})", tracer.pid())), "{reason}");
}

#[test]
fn what_must_never_be_touched_says_so_by_its_kind() {
    let dir = tempfile::tempdir().unwrap();
    let reader = dir.path().join("orca");
    fs::copy(fs::canonicalize("/bin/sleep").unwrap(), &reader).unwrap();
    let app = App::shell(&format!("'{}' 60 & while :; do echo >> $F; sleep 0.01; done", reader.display()));
    assert!(app.grows());
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    let found = porter.inspect(target);
    let [Veto { kind: VetoKind::Accessibility, reason }] = &found[..] else { panic!("{found:?}") };
    assert!(reason.contains("assistive"), "{reason}");
}

// ---- what changes between a look and a freeze -----------------------------------------------------------------------

#[test]
fn what_was_seen_a_moment_ago_is_checked_again() {
    // A stranger has moved in.
    let group = Group::new();
    let (app, stranger) = (App::forking(), App::forking());
    group.take(&app);
    let mut porter = Porter::with(Options { systemd: Some(true), ..Options::default() });
    let (target, _) = porter.adopt(&app);
    assert_eq!(porter.inspect(target), []);
    group.take(&stranger);
    porter.freeze(target);
    assert!(!group.is_frozen());
    assert!(stranger.grows());
    assert!(app.is_still());
    porter.thaw(target);

    // Something has been started below it that must not be touched.
    let dir = tempfile::tempdir().unwrap();
    let bus = dir.path().join("dbus-daemon");
    fs::copy(fs::canonicalize("/bin/sleep").unwrap(), &bus).unwrap();
    let group = Group::new();
    let go = dir.path().join("go");
    let script = format!(
        "while :; do echo >> $F; [ -e '{0}' ] && {{ rm '{0}'; '{1}' 60 & }}; sleep 0.01; done",
        go.display(),
        bus.display()
    );
    let app = App::shell(&script);
    group.take(&app);
    let (target, _) = porter.adopt(&app);
    assert_eq!(porter.inspect(target), []);
    fs::write(&go, "").unwrap();
    let is_bus = |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == bus);
    wait_for("the bus", || tree_of(app.pid()).iter().any(is_bus));
    let reason = porter.freeze_fails(target);
    assert!(reason.contains("message bus"), "{reason}");
    assert!(app.grows());

    // Another app has moved in.
    let unit = Group::named("app-two-1.scope");
    let (app, other) = (App::forking(), App::forking());
    unit.take(&app);
    let (target, _) = porter.adopt(&app);
    assert_eq!(porter.inspect(target), []);
    unit.take(&other);
    porter.adopt(&other);
    let reason = porter.freeze_fails(target);
    assert!(reason.contains("runs together with it"), "{reason}");
    assert!(app.grows() && other.grows());
}

#[test]
fn a_cgroup_replaced_under_the_same_name_is_not_it() {
    for inspected in [false, true] {
        let (group, elsewhere) = (Group::named("app-one-1.scope"), Group::named("app-one-2.scope"));
        let (app, stranger) = (App::forking(), App::forking());
        group.take(&app);
        let mut porter = Porter::with(Options { systemd: Some(true), ..Options::default() });
        let (target, _) = porter.adopt(&app);
        if inspected {
            assert_eq!(porter.inspect(target), []);
        }
        elsewhere.take(&app);
        let before = inode(&group.0);
        wait_for("the cgroup to be empty", || fs::remove_dir(&group.0).is_ok());
        fs::create_dir(&group.0).unwrap();
        assert_ne!(inode(&group.0), before);
        group.take(&stranger);
        assert_eq!(porter.targets.of_pid(stranger.pid()), None);
        porter.freeze(target);
        assert!(!group.is_frozen() && stranger.grows(), "inspected: {inspected}");
        assert!(elsewhere.is_frozen(), "inspected: {inspected}");
        porter.thaw(target);

        // Its own, made again: what counts is what is there now.
        let (target, _) = porter.adopt(&stranger);
        assert_eq!(porter.inspect(target), []);
        let side = Group::new();
        side.take(&stranger);
        wait_for("the cgroup to be empty", || fs::remove_dir(&group.0).is_ok());
        fs::create_dir(&group.0).unwrap();
        group.take(&stranger);
        porter.freeze(target);
        assert!(group.is_frozen() && stranger.is_still());
    }
}

#[test]
fn what_is_continued_by_somebody_else_is_stopped_again_and_told() {
    let app = App::forking();
    let mut porter = Porter::with(Options { signals_only: true, ..Options::default() });
    let (target, _) = porter.adopt(&app);
    porter.freeze(target);
    kill_process_group(pid(app.pid()), Signal::CONT).unwrap();
    assert!(app.grows());
    assert_eq!(porter.inspect(target), [], "once it is mended");
    wait_for("the stop", || state_of(app.pid()) == 'T');
    kill_process_group(pid(app.pid()), Signal::CONT).unwrap();
    assert!(app.grows());
    let found = porter.inspect(target);
    assert!(matches!(&found[..], [Veto { kind: VetoKind::NotHeld, .. }]), "{found:?}");
    porter.thaw(target);
    assert!(app.grows());
    assert!(tree_of(app.pid()).into_iter().all(|pid| state_of(pid) != 'T'));
}

#[test]
fn a_cgroup_thawed_by_somebody_else_is_told() {
    let group = Group::new();
    let app = App::forking();
    group.take(&app);
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    porter.freeze(target);
    fs::write(group.0.join("cgroup.freeze"), "0").unwrap();
    assert!(app.grows());
    let found = porter.inspect(target);
    let [Veto { kind: VetoKind::NotHeld, reason }] = &found[..] else { panic!("{found:?}") };
    assert!(reason.contains("somebody else"), "{reason}");
    porter.thaw(target);
}

#[test]
fn a_child_that_escapes_is_told_or_taken_back() {
    let script = "sh -c 'while :; do echo >> $F; sleep 0.01; done' & while :; do sleep 0.1; done";
    let escape = |app: &App, to: &Group| {
        let child = tree_of(app.pid())
            .into_iter()
            .filter(|pid| *pid != app.pid())
            .find(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"sh\0-c\0while")));
        // With what it waits for.
        for pid in tree_of(child.unwrap()) {
            fs::write(to.0.join("cgroup.procs"), pid.to_string()).unwrap();
        }
    };
    // A unit of the system's: not ours to move things into.
    let (unit, outside) = (Group::named("app-leaky-1.scope"), Group::new());
    let app = App::shell(script);
    assert!(app.grows());
    unit.take(&app);
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    porter.freeze(target);
    escape(&app, &outside);
    assert!(app.grows());
    let found = porter.inspect(target);
    let [Veto { kind: VetoKind::NotHeld, reason }] = &found[..] else { panic!("{found:?}") };
    assert!(reason.contains("outside its cgroup"), "{reason}");
    porter.thaw(target);

    // A cgroup of our own making.
    let app = App::shell(script);
    assert!(app.grows());
    let (target, _) = porter.adopt(&app);
    porter.freeze(target);
    assert!(app.is_still());
    escape(&app, &outside);
    assert!(app.grows());
    assert_eq!(porter.inspect(target), []);
    assert!(app.is_still());
    porter.targets.kill(target, Duration::ZERO);
    porter.gone(target);
}

// ---- oom_score_adj -------------------------------------------------------------------------------------------------

#[test]
fn what_is_held_goes_first_when_memory_runs_out() {
    for signals_only in [false, true] {
        let (low, high) = ("sleep 60", "sh -c 'echo 950 > /proc/self/oom_score_adj; exec sleep 60'");
        let app = App::shell(&format!("{low} & {high} & while :; do echo >> $F; sleep 0.01; done"));
        let scores = || {
            // What has ended is not there to be killed.
            let tree = tree_of(app.pid()).into_iter().filter(|pid| state_of(*pid) != 'Z').filter_map(oom_of);
            let mut tree: Vec<i32> = tree.collect();
            tree.sort_unstable();
            (tree.first().copied().unwrap(), tree.last().copied().unwrap())
        };
        assert!(app.grows());
        let before = oom_of(std::process::id()).unwrap();
        wait_for("the second", || scores() == (before, 950));
        let mut porter = Porter::with(Options { signals_only, systemd: Some(false), ..Options::default() });
        let (target, _) = porter.adopt(&app);
        porter.freeze(target);
        porter.settle();
        assert_eq!(scores(), (900, 950), "signals_only: {signals_only}");
        assert!(fs::read_to_string(porter.record()).unwrap().contains(&format!(" {before} 900\n")));
        porter.thaw(target);
        porter.settle();
        assert_eq!(scores(), (before, 950), "signals_only: {signals_only}");
        assert!(!porter.record().exists());

        // What somebody has set meanwhile is theirs.
        porter.freeze(target);
        porter.settle();
        fs::write(format!("/proc/{}/oom_score_adj", app.pid()), "910").unwrap();
        porter.targets.thaw_all();
        assert_eq!(oom_of(app.pid()), Some(910));
        assert_eq!(scores(), (before, 950));
        drop(porter);

        let mut porter = Porter::with(Options { signals_only, oom_score_adj: None, ..Options::default() });
        let (target, _) = porter.adopt(&app);
        porter.freeze(target);
        porter.settle();
        assert_eq!(scores(), (before, 950), "where it is not wanted");
    }
}

// ---- memory --------------------------------------------------------------------------------------------------------

#[test]
fn a_sample_is_the_sum_over_the_tree() {
    let app = App::spawn(helper("hog").env("NP_CHILD", "1"));
    let all = || tree_of(app.pid()).into_iter().map(rollup);
    wait_for("the memory", || all().filter(|one| one.uss > 32_000).count() == 2);
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    let near = |a: u64, b: u64| a.abs_diff(b) <= b / 20 + 256;
    for held in [false, true] {
        if held {
            porter.freeze(target);
        }
        porter.targets.sample(target);
        let event = porter.until("the sample", |event| matches!(event, Event::Sampled(..)));
        let Event::Sampled(_, Ok(whole)) = event else { panic!("{event:?}") };
        let sample = whole.memory;
        let (pss, uss) = all().fold((0, 0), |(pss, uss), one| (pss + one.pss, uss + one.uss));
        assert!(near(sample.pss, pss) && near(sample.uss, uss), "{sample:?} {pss} {uss}");
        assert!(sample.pss > 64_000, "{sample:?}");
        // Almost all of it is the helpers' own; they have worked to make it.
        assert!(whole.anon > 64_000 && whole.anon + whole.file <= sample.pss + 16, "{whole:?}");
        assert!(whole.cpu > Duration::from_millis(1) && whole.connections == 0, "{whole:?}");
    }
    porter.targets.kill(target, Duration::ZERO);
    porter.gone(target);
    porter.targets.sample(target);
    porter.until("an error", |event| matches!(event, Event::Sampled(_, Err(_))));
}

#[test]
fn apps_measured_together_are_told_apart() {
    let group = Group::new();
    let apps: Vec<App> = (0..12).map(|_| App::shell("sleep 60 & while :; do echo >> $F; sleep 0.01; done")).collect();
    group.take(&apps[0]);
    let mut porter = Porter::new();
    let targets: Vec<TargetId> = apps.iter().map(|app| porter.adopt(app).0).collect();
    for target in &targets {
        porter.targets.sample(*target);
    }
    for (target, app) in targets.iter().zip(&apps) {
        let event = porter.until("a sample", |event| matches!(event, Event::Sampled(of, _) if of == target));
        let Event::Sampled(_, Ok(sample)) = event else { panic!("{event:?}") };
        let truth: u64 = tree_of(app.pid()).into_iter().map(|pid| rollup(pid).pss).sum();
        assert!(sample.memory.pss > 0 && sample.memory.pss.abs_diff(truth) <= truth / 2 + 512, "{sample:?} {truth}");
    }
    // The cgroup is charged where there is a memory controller for it.
    let charged = fs::read_to_string(group.0.join("memory.current")).is_ok();
    porter.targets.sample(targets[0]);
    porter.targets.sample(targets[1]);
    for (target, charged) in [(targets[0], charged), (targets[1], false)] {
        let event = porter.until("a sample", |event| matches!(event, Event::Sampled(of, _) if *of == target));
        let Event::Sampled(_, Ok(Sample { charged: found, .. })) = event else { panic!("{event:?}") };
        assert_eq!(found.is_some(), charged, "{found:?}");
        assert!(found.is_none_or(|found| found.current > 0 && found.anon > 0), "{found:?}");
    }
}

#[test]
fn connections_that_leave_the_machine_are_counted() {
    // An app with one end of a connection in a network of its own and the other end in another's; and a connection to
    // itself, which does not count.
    let script = r#"
        set -e
        unshare --net sleep 60 & other=$!
        network() { readlink /proc/$1/ns/net; }
        until [ -n "$(network $other)" ] && [ "$(network $other)" != "$(network $$)" ]; do sleep 0.01; done
        ip link set lo up
        ip link add name near type veth peer name far netns $other
        ip address add 10.99.0.1/30 dev near; ip link set near up
        there="nsenter --target $other --net"
        $there ip address add 10.99.0.2/30 dev far; $there ip link set far up
        $there env NP_HELPER=accept "$SELF" --exact helper_process --nocapture --test-threads=1 &
        NP_HELPER=connect "$SELF" --exact helper_process --nocapture --test-threads=1 &
        wait
    "#;
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", script]).env("SELF", std::env::current_exe().unwrap()).stdout(Stdio::null());
    let app = App::spawn(&mut command);
    let mut porter = Porter::new();
    let (target, _) = porter.adopt(&app);
    let mut count = || {
        porter.targets.sample(target);
        match porter.until("the sample", |event| matches!(event, Event::Sampled(..))) {
            Event::Sampled(_, Ok(sample)) => sample.connections,
            other => panic!("{other:?}"),
        }
    };
    wait_for("both ends", || {
        let found = count();
        assert!(found <= 2, "{found}");
        found == 2
    });
    assert_eq!(count(), 2);
}

#[test]
fn the_daemon_measures_itself() {
    let mut porter = Porter::new();
    porter.targets.sample_self();
    let event = porter.until("the sample", |event| matches!(event, Event::SampledSelf { .. }));
    let Event::SampledSelf { daemon: SelfSample { memory: daemon, cpu, .. }, .. } = event else { unreachable!() };
    let truth = rollup(std::process::id());
    assert!(cpu > Duration::ZERO);
    assert!(daemon.pss > 0 && daemon.pss < truth.pss * 4 && truth.pss < daemon.pss * 4, "{daemon:?} {truth:?}");
}

#[test]
fn memory_is_paged_out_where_there_is_swap() {
    let swap = fs::read_to_string("/proc/swaps").unwrap().lines().count() > 1;
    for signals_only in [false, true] {
        let app = App::spawn(&mut helper("hog"));
        wait_for("the memory", || rollup(app.pid()).uss > 32_000);
        let mut porter = Porter::with(Options { signals_only, systemd: Some(false), ..Options::default() });
        let (target, facts) = porter.adopt(&app);
        assert_eq!(facts.can_page_out, swap);
        porter.targets.page_out(target);
        porter.until(
            "the refusal",
            |event| matches!(event, Event::Outcome(_, Outcome::PageOutFailed(reason)) if reason.contains("not frozen")),
        );
        porter.freeze(target);
        porter.targets.page_out(target);
        match porter.until("the end", |event| matches!(event, Event::Outcome(..))) {
            Event::Outcome(_, Outcome::PagedOut { freed, .. }) if swap => {
                assert!(freed > 20_000, "{freed}");
                assert!(rollup(app.pid()).swap > 20_000);
            }
            Event::Outcome(_, Outcome::PageOutFailed(reason)) if !swap => {
                assert!(reason.contains("no swap"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        porter.thaw(target);
    }
}

/// With zram as swap the cost of a page-out is what zram grew by: of random bytes all, of text a part. Otherwise only
/// tests/vm proves it.
#[test]
fn incompressible_memory_costs_what_it_is() {
    let swaps = fs::read_to_string("/proc/swaps").unwrap();
    if !swaps.contains("/dev/zram") {
        return println!("skipped: no zram is swap here");
    }
    for (mode, cheap) in [("hog", false), ("text", true)] {
        let app = App::spawn(&mut helper(mode));
        wait_for("the memory", || rollup(app.pid()).uss > 32_000);
        let mut porter = Porter::with(Options { signals_only: true, ..Options::default() });
        let (target, _) = porter.adopt(&app);
        porter.freeze(target);
        porter.targets.page_out(target);
        let event = porter.until("the end", |event| matches!(event, Event::Outcome(..)));
        let Event::Outcome(_, Outcome::PagedOut { freed, zram, source, .. }) = event else { panic!("{event:?}") };
        println!("{mode}: {freed} KiB for {zram} KiB of zram, {source:?}");
        assert!(freed > 30_000, "{freed}");
        if source == ZramSource::Measured {
            assert_eq!(zram < freed / 2, cheap, "{mode}: {freed} for {zram}");
            assert!(cheap || zram > freed / 10 * 9, "{mode}: {freed} for {zram}");
        }
        porter.thaw(target);
    }
}

// ---- what the tests stand on ---------------------------------------------------------------------------------------

/// Run with `NP_HELPER` set, this test binary is another program.
#[test]
fn helper_process() {
    let Ok(mode) = std::env::var("NP_HELPER") else { return };
    match mode.as_str() {
        "signals" => signal_scenario(),
        "vfork" => vfork_and_wait(),
        "hog" => hog(),
        "text" => text(),
        "accept" => accept(),
        "connect" => connect(),
        "lock" => lock_and_wait(),
        "fanotify" => listen_to_files(),
        "trace" => trace_and_wait(),
        _ => freeze_and_crash(&mode),
    }
}

fn helper(mode: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "helper_process", "--nocapture", "--test-threads=1"]).env("NP_HELPER", mode);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// What must hold with SIGSTOP and SIGCONT, for any user.
fn signal_scenario() {
    let mut porter = Porter::with(Options { signals_only: true, ..Options::default() });
    // Three levels, and children are forked every few milliseconds: also while the tree is being stopped.
    let app =
        App::shell("sh -c 'sh -c \"while :; do echo >> $F; sleep 0.002; done\"; :' & while :; do sleep 0.001; done");
    assert!(app.grows());
    let (target, facts) = porter.adopt(&app);
    assert_eq!(facts.freezer, Freezer::Signal);
    for _ in 0..5 {
        porter.freeze(target);
        let tree = tree_of(app.pid());
        assert!(tree.len() >= 3, "{tree:?}");
        for member in tree {
            assert!(matches!(state_of(member), 'T' | 'Z'), "{member} is {}", state_of(member));
        }
        assert!(app.is_still());
        porter.thaw(target);
        assert!(app.grows());
    }
    porter.freeze(target);
    porter.targets.forget(target);
    assert!(app.grows(), "what is forgotten runs");
    assert!(!porter.record().exists());
    let (target, _) = porter.adopt(&app);
    porter.freeze(target);
    porter.targets.kill(target, Duration::from_millis(200));
    porter.gone(target);
}

fn freeze_and_crash(mode: &str) {
    let dir = PathBuf::from(std::env::var_os("NP_DIR").unwrap());
    let app: u32 = std::env::var("NP_PID").unwrap().parse().unwrap();
    let options = Options { signals_only: mode.ends_with("signals"), systemd: Some(false), ..Options::default() };
    let mut porter = Porter::at(Dir::Given(dir), options);
    let key = AppKey::new(Bus::Session(0), format!("org.example.App{app}"));
    let (target, _) = porter.targets.adopt(&key, Process { pid: app, uid: 0, pidfd: pidfd(app) }).unwrap();
    println!("\nready");
    loop {
        porter.freeze(target);
        if mode.starts_with("crash") {
            porter.settle();
            kill_process(pid(std::process::id()), Signal::KILL).unwrap();
        }
        porter.thaw(target);
    }
}

#[expect(unsafe_code, reason = "std cannot stand still in vfork")]
fn vfork_and_wait() {
    // SAFETY: without CLONE_VM the child is a copy as after fork; it calls nothing but pause and _exit.
    unsafe {
        if libc::syscall(libc::SYS_clone, libc::CLONE_VFORK | libc::SIGCHLD, 0, 0, 0, 0) == 0 {
            libc::pause();
            libc::_exit(0);
        }
    }
}

fn lock_and_wait() {
    use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
    let path = PathBuf::from(std::env::var_os("NP_DIR").unwrap());
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path).unwrap();
    let range = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let _held = match std::env::var("NP_KIND").unwrap().as_str() {
        "posix" => fcntl(&file, FcntlArg::F_SETLKW(&range)).map(|_| None).unwrap(),
        "ofd" => fcntl(&file, FcntlArg::F_OFD_SETLKW(&range)).map(|_| None).unwrap(),
        _ => Some(Flock::lock(file.try_clone().unwrap(), FlockArg::LockExclusive).unwrap()),
    };
    fs::write(path.with_extension("held"), "").unwrap();
    thread::sleep(Duration::from_secs(60));
    drop(file);
}

#[expect(unsafe_code, reason = "fanotify is not in the features this package takes from nix")]
fn listen_to_files() {
    let path = PathBuf::from(std::env::var_os("NP_DIR").unwrap());
    let mask = if std::env::var("NP_KIND").unwrap() == "permission" { libc::FAN_OPEN_PERM } else { libc::FAN_OPEN };
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: neither call takes memory but the string, which ends with a zero byte and outlives it.
    let result = unsafe {
        let group = libc::fanotify_init(libc::FAN_CLASS_CONTENT, 0);
        libc::fanotify_mark(group, libc::FAN_MARK_ADD, mask, libc::AT_FDCWD, name.as_ptr())
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    fs::write(path.with_extension("held"), "").unwrap();
    thread::sleep(Duration::from_secs(60));
}

#[expect(unsafe_code, reason = "ptrace is not in the features this package takes from nix")]
fn trace_and_wait() {
    let app: libc::pid_t = std::env::var("NP_PID").unwrap().parse().unwrap();
    // SAFETY: PTRACE_SEIZE takes no memory.
    let result = unsafe { libc::ptrace(libc::PTRACE_SEIZE, app, 0, 0) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    // The thread that traces must live; it is the one of this test.
    thread::sleep(Duration::from_secs(60));
}

fn hog() {
    let child = std::env::var_os("NP_CHILD").map(|_| App::spawn(helper("hog").env_remove("NP_CHILD")));
    // Not compressible to nothing.
    let mut number = 1_u64;
    let memory: Vec<u64> = std::iter::repeat_with(|| {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        number
    })
    .take(32 * 1024 * 1024 / 8)
    .collect();
    thread::sleep(Duration::from_secs(60));
    drop((child, std::hint::black_box(memory)));
}

/// 32 MiB of what compresses as text does.
fn text() {
    let lines = (0..).flat_map(|n: u64| format!("{n}: did you see what {} wrote about it? ", n % 97).into_bytes());
    let memory: Vec<u8> = lines.take(33 * 1024 * 1024).collect();
    thread::sleep(Duration::from_secs(60));
    drop(std::hint::black_box(memory));
}

fn accept() {
    let listener = TcpListener::bind("10.99.0.2:7").unwrap();
    let connection = listener.accept();
    thread::sleep(Duration::from_secs(60));
    drop(connection);
}

fn connect() {
    let here = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = TcpStream::connect(here.local_addr().unwrap()).unwrap();
    let mut connection = None;
    wait_for("the other end", || {
        connection = TcpStream::connect("10.99.0.2:7").ok();
        connection.is_some()
    });
    thread::sleep(Duration::from_secs(60));
    drop((here, own, connection));
}

/// The loop thread in small.
struct Porter {
    targets: Targets,
    poll: Poll,
    inbox: Inbox,
    dir: Dir,
    seen: Vec<Event>,
}

enum Dir {
    Made(tempfile::TempDir),
    Given(PathBuf),
}

impl Dir {
    fn path(&self) -> &Path {
        match self {
            Self::Made(dir) => dir.path(),
            Self::Given(dir) => dir,
        }
    }
}

impl Porter {
    fn new() -> Self {
        Self::with(Options { systemd: Some(false), ..Options::default() })
    }

    fn with(options: Options) -> Self {
        Self::at(Dir::Made(tempfile::tempdir().unwrap()), options)
    }

    fn at(dir: Dir, options: Options) -> Self {
        let poll = Poll::new().unwrap();
        let (sender, inbox) = inbox::channel(poll.registry(), WAKER).unwrap();
        let registry = poll.registry().try_clone().unwrap();
        let path = dir.path().to_owned();
        let targets = Targets::new(registry, FIRST, sender, Jobs::default(), path, options).unwrap();
        Self { targets, poll, inbox, dir, seen: Vec::new() }
    }

    fn record(&self) -> PathBuf {
        self.dir.path().join("frozen")
    }

    fn adopt(&mut self, app: &App) -> (TargetId, ProcessFacts) {
        let own = nix::unistd::geteuid().as_raw();
        let key = AppKey::new(Bus::Session(own), format!("org.example.App{}", app.pid()));
        self.targets.adopt(&key, app.process()).unwrap()
    }

    fn freeze(&mut self, target: TargetId) {
        self.targets.freeze(target);
        let event = self.until("the freeze", |event| matches!(event, Event::Outcome(t, _) if *t == target));
        assert!(matches!(event, Event::Outcome(_, Outcome::Frozen { .. })), "{event:?}");
    }

    fn freeze_fails(&mut self, target: TargetId) -> String {
        self.targets.freeze(target);
        match self.until("the refusal", |event| matches!(event, Event::Outcome(t, _) if *t == target)) {
            Event::Outcome(_, Outcome::FreezeFailed(reason)) => reason.to_string(),
            other => panic!("{other:?}"),
        }
    }

    fn thaw(&mut self, target: TargetId) {
        self.targets.thaw(target);
        let event = self.until("the thaw", |event| matches!(event, Event::Outcome(t, _) if *t == target));
        assert!(matches!(event, Event::Outcome(_, Outcome::Thawed { .. })), "{event:?}");
        self.settle();
    }

    fn inspect(&mut self, target: TargetId) -> Vec<Veto> {
        self.targets.inspect(target);
        match self.until("the inspection", |event| matches!(event, Event::Inspected(t, _) if *t == target)) {
            Event::Inspected(_, Ok(vetoes)) => vetoes,
            other => panic!("{other:?}"),
        }
    }

    /// Until nothing is due.
    fn settle(&mut self) {
        while self.targets.poll_timeout().is_some() {
            self.turn();
        }
    }

    fn gone(&mut self, target: TargetId) {
        self.until("the end", |event| *event == Event::TargetGone(target));
    }

    /// Takes turns until `wanted` comes; what comes before it is dropped.
    fn until(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        let started = Clock::now();
        loop {
            if let Some(at) = self.seen.iter().position(&wanted) {
                return self.seen.drain(..=at).next_back().unwrap();
            }
            assert!(started.elapsed() < patience::PATIENCE, "waited in vain for {what}; saw {:?}", self.seen);
            self.turn();
        }
    }

    fn turn(&mut self) {
        self.targets.drain(&mut self.seen);
        let patience = Duration::from_millis(if self.seen.is_empty() { 50 } else { 0 });
        let due = self.targets.poll_timeout().map(|due| due.since(clock::boot()));
        let mut events = Events::with_capacity(16);
        match self.poll.poll(&mut events, Some(due.map_or(patience, |due| due.min(patience)))) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => result.unwrap(),
        }
        for event in &events {
            if self.targets.owns(event.token()) {
                self.targets.ready(event.token());
            }
        }
        while let Some(incoming) = self.inbox.take() {
            if let Incoming::Event(event) = incoming {
                self.seen.push(event);
            }
        }
        let now = clock::boot();
        if self.targets.poll_timeout().is_some_and(|due| due <= now) {
            self.targets.handle_timeout(now);
        }
        self.targets.drain(&mut self.seen);
    }
}

/// A program that writes to a file while it runs.
struct App {
    child: Child,
    file: PathBuf,
    _dir: tempfile::TempDir,
}

impl App {
    /// Forks a child every few milliseconds.
    fn forking() -> Self {
        Self::shell("while :; do echo >> $F; sleep 0.005; done")
    }

    fn shell(script: &str) -> Self {
        Self::spawn(Command::new("sh").args(["-c", script]))
    }

    fn spawn(command: &mut Command) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("counter");
        let child = command.env("F", &file).process_group(0).spawn().unwrap();
        Self { child, file, _dir: dir }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn process(&self) -> Process {
        let uid = rustix::process::getuid().as_raw();
        Process { pid: self.pid(), uid, pidfd: pidfd(self.pid()) }
    }

    /// Whether it does anything. A busy machine may let it wait.
    fn grows(&self) -> bool {
        self.grows_within(Duration::from_secs(10))
    }

    /// Whether it does nothing.
    fn is_still(&self) -> bool {
        !self.grows_within(Duration::from_millis(400))
    }

    fn grows_within(&self, patience: Duration) -> bool {
        let length = || fs::metadata(&self.file).map_or(0, |file| file.len());
        let before = length();
        let started = Clock::now();
        while started.elapsed() < patience {
            thread::sleep(Duration::from_millis(10));
            // One line may have been under way.
            if length() > before + 1 {
                return true;
            }
        }
        false
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = kill_process_group(pid(self.pid()), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// A cgroup of the test's own.
struct Group(PathBuf);

impl Group {
    fn new() -> Self {
        Self::named("test")
    }

    fn named(name: &str) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let outer = mount().join(format!("np-test-{}-{number}", std::process::id()));
        fs::create_dir(&outer).unwrap();
        let path = outer.join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn take(&self, app: &App) {
        wait_for("the move", || {
            let outside: Vec<u32> =
                tree_of(app.pid()).into_iter().filter(|pid| cgroup_of(*pid) != self.path()).collect();
            for pid in &outside {
                let _ = fs::write(self.0.join("cgroup.procs"), pid.to_string());
            }
            outside.is_empty()
        });
    }

    fn path(&self) -> String {
        format!("/{}", self.0.strip_prefix(mount()).unwrap().display())
    }

    fn is_frozen(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events")).unwrap().contains("frozen 1")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.freeze"), "0");
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        if let Some(outer) = self.0.parent() {
            let _ = fs::remove_dir(outer);
        }
    }
}

/// A FUSE mount whose server never says a word.
struct SilentFileSystem {
    dir: tempfile::TempDir,
    _server: fs::File,
}

impl SilentFileSystem {
    #[expect(unsafe_code, reason = "mount(2) is not in the features this package takes from nix and rustix")]
    fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0\0", server.as_raw_fd());
        let path = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
        // SAFETY: all four strings end with a zero byte and outlive the call.
        let result = unsafe {
            libc::mount(c"np-test".as_ptr(), path.as_ptr(), c"fuse".as_ptr(), libc::MS_NODEV, options.as_ptr().cast())
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        Self { dir, _server: server }
    }
}

impl Drop for SilentFileSystem {
    #[expect(unsafe_code, reason = "as above")]
    fn drop(&mut self) {
        let path = std::ffi::CString::new(self.dir.path().to_str().unwrap()).unwrap();
        // SAFETY: the string ends with a zero byte and outlives the call.
        unsafe {
            libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::MNT_FORCE);
        }
    }
}

fn mount() -> PathBuf {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = text.lines().find(|line| line.contains(" - cgroup2 ")).expect("these tests need cgroup v2");
    PathBuf::from(line.split(' ').nth(4).unwrap())
}

fn pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

fn pidfd(number: u32) -> OwnedFd {
    pidfd_open(pid(number), PidfdFlags::empty()).unwrap()
}

fn cgroup_of(pid: u32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned()
}

fn state_in(stat: &str) -> char {
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('Z')
}

fn state_of(pid: u32) -> char {
    state_in(&fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default())
}

fn threads_of(pid: u32) -> Vec<char> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.map(|task| state_in(&fs::read_to_string(task.path().join("stat")).unwrap_or_default())).collect()
}

fn inode(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap())
}

fn oom_of(pid: u32) -> Option<i32> {
    fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?.trim().parse().ok()
}

fn tree_of(pid: u32) -> Vec<u32> {
    let mut tree = vec![pid];
    // The children of every thread.
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in text.split_ascii_whitespace().filter_map(|child| child.parse().ok()) {
            tree.extend(tree_of(child));
        }
    }
    tree
}

fn rollup(pid: u32) -> Memory {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let kib = |key: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_ascii_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
    };
    Memory { pss: kib("Pss:"), uss: kib("Private_Clean:") + kib("Private_Dirty:"), swap: kib("SwapPss:") }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    patience::wait(what, || done().then_some(()));
}
