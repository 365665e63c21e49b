//! Apps in systemd units, ended through their manager or without it. The cgroups are real, the manager is ours.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{sys::signal::Signal, unistd::getuid};

use crate::{
    group::Group,
    support::{PATIENCE, Setup, World, is_held, is_running, of, signal, stays, wait, wait_for},
    systemd::{Stopping, Systemd, Unit},
};

const APP: &str = "org.example.App";
const BRISK: &str = "grace = \"100ms\"\npage-out-after = \"1h\"\ntombstone-after = \"24h\"\nawake-window = \"100ms\"\n";
const UNIT: &str = "app-org.example.App@7.service";

/// An app that its shell has moved to a unit of its own since it came, and the manager of that unit.
struct Scene {
    world: World,
    systemd: Systemd,
    pid: u32,
    group: Group,
}

impl Scene {
    fn new(stopping: Stopping) -> Self {
        Self::with(Setup::default(), stopping, |_| {})
    }

    fn with(setup: Setup<'_>, stopping: Stopping, change: impl FnOnce(&mut Unit)) -> Self {
        let world = World::new(setup);
        world.samples(&[(APP, "")]);
        let pid = world.pid(APP);
        let group = Group::of_user(getuid().as_raw(), UNIT);
        let mut unit = Unit::of(&group.name());
        change(&mut unit);
        group.take(pid);
        let systemd = Systemd::start(&world.bus_address(), &[(UNIT, unit)], stopping);
        Self { world, systemd, pid, group }
    }

    fn freeze(&self) {
        let output = self.world.cli(&["freeze", APP]);
        assert!(output.status.success(), "{}", of(&output));
        assert!(self.group.is_frozen() && is_held(self.pid));
        // Looked at because it is held.
        self.systemd.expect_look();
    }

    /// By hand; it ends when the app has.
    fn kill(&self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nightporter"));
        command.args(["--user", "kill", APP]).env("DBUS_SESSION_BUS_ADDRESS", self.world.bus_address());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }
}

fn ended(kill: Child) {
    let output = kill.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", of(&output));
}

#[test]
fn a_frozen_app_is_ended_by_the_manager_of_its_unit() {
    let scene = Scene::new(Stopping::Grant);
    scene.freeze();
    let kill = scene.kill();
    assert_eq!(scene.systemd.expect("StopUnit"), UNIT);
    assert!(!scene.group.is_frozen(), "it was not thawed first");
    // The sample ends at SIGTERM.
    assert!(stays(Duration::from_millis(500), || is_running(scene.pid)), "it was ended by somebody else");
    signal(scene.pid, Signal::SIGTERM);
    ended(kill);
    scene.systemd.job_removed(77, UNIT, "done");
    assert!(!is_running(scene.pid));
    assert!(!scene.world.log().contains("ended by signals"));
}

#[test]
fn a_job_thaws_a_frozen_app() {
    let scene = Scene::new(Stopping::Grant);
    scene.freeze();
    // systemctl stop: SIGTERM is not heard in a frozen cgroup.
    scene.systemd.job_new(4, UNIT);
    wait("the thaw", || (!scene.group.is_frozen()).then_some(()));
    wait("the reason", || scene.world.decided(APP, "thaw", "pending systemd job").then_some(()));
    let refused = scene.world.cli(&["freeze", APP]);
    assert!(!refused.status.success() && of(&refused).contains(UNIT), "{}", of(&refused));
    assert!(!scene.group.is_frozen());
    scene.systemd.job_removed(4, UNIT, "done");
    wait("the next freeze", || scene.world.cli(&["freeze", APP]).status.success().then_some(()));
    // RuntimeMaxSec= is over: no job, but no less of a stop.
    scene.systemd.state(UNIT, "deactivating");
    wait("the thaw", || (!scene.group.is_frozen()).then_some(()));
    wait("the reason", || scene.world.decided(APP, "thaw", "deactivating").then_some(()));
}

#[test]
fn what_has_a_watchdog_is_left_alone() {
    let setup = Setup { top: "profile = \"cached\"", lifecycle: BRISK, ..Setup::default() };
    let scene = Scene::with(setup, Stopping::Grant, |unit| unit.watchdog = 30_000_000);
    wait("the reason", || {
        let why = scene.world.why(APP);
        why.decisions.iter().any(|decision| decision.reason.contains("a watchdog of 30 s")).then_some(())
    });
    // It may have been frozen before that was known: it had moved to its unit since it came.
    wait("the thaw", || (!is_held(scene.pid)).then_some(()));
    assert!(stays(Duration::from_secs(1), || !is_held(scene.pid)), "{:?}", scene.world.why(APP));
    // A message changes nothing about that.
    scene.world.post(APP, "as ever");
    scene.world.expect(APP, &["as ever"]);
    assert!(stays(Duration::from_millis(500), || !is_held(scene.pid)), "{:?}", scene.world.why(APP));
}

#[test]
fn what_the_manager_does_not_do_signals_do() {
    for (stopping, reason) in [(Stopping::Refuse, "Interactive"), (Stopping::Silent, "does not answer")] {
        let scene = Scene::new(stopping);
        scene.freeze();
        let output = scene.world.cli(&["kill", APP]);
        assert!(output.status.success(), "{stopping:?}: {}", of(&output));
        assert!(!is_running(scene.pid));
        assert_eq!(scene.systemd.expect("StopUnit"), UNIT);
        let log = scene.world.log();
        let line = log.lines().find(|line| line.contains("ended by signals"));
        assert!(line.is_some_and(|line| line.contains(reason)), "{stopping:?}: {line:?}");
    }
    // It goes away in the middle of it.
    let scene = Scene::new(Stopping::Vanish);
    scene.freeze();
    assert!(scene.world.cli(&["kill", APP]).status.success());
    assert!(!is_running(scene.pid));
    // Its job fails.
    let scene = Scene::new(Stopping::Grant);
    scene.freeze();
    let kill = scene.kill();
    scene.systemd.expect("StopUnit");
    scene.systemd.job_removed(77, UNIT, "failed");
    ended(kill);
    assert!(scene.world.log().contains("did not stop"), "{}", scene.world.log());
}

#[test]
fn a_stop_that_does_not_end_is_cut_short() {
    // As with an ExecStop= that hangs: TimeoutStopSec= is a minute and a half, the grace is shorter.
    let scene = Scene::new(Stopping::Grant);
    scene.freeze();
    let kill = scene.kill();
    scene.systemd.expect("StopUnit");
    assert!(stays(Duration::from_secs(2), || is_running(scene.pid)), "it had no time to end");
    ended(kill);
    assert!(!is_running(scene.pid));
}

#[test]
fn the_app_that_was_stopped_comes_back_by_a_message() {
    let scene = Scene::new(Stopping::Grant);
    scene.freeze();
    let kill = scene.kill();
    scene.systemd.expect("StopUnit");
    signal(scene.pid, Signal::SIGTERM);
    ended(kill);
    // Where systemd is gone the bus starts it.
    drop(scene.systemd);
    scene.world.post(APP, "back to life");
    scene.world.expect(APP, &["back to life"]);
    let pid = wait("the new instance", || scene.world.is_owned(APP).then(|| scene.world.pid(APP)));
    assert_ne!(pid, scene.pid);
    assert!(wait_for(PATIENCE, || (!is_held(pid)).then_some(())).is_some());
}
