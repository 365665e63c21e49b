//! What the daemon's bus thread learns of apps' units, and has done to them: a real bus, real processes in real cgroups,
//! and a systemd manager of our own making that grants, refuses, is silent or goes away. Needs root and cgroup v2.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

#[expect(dead_code, reason = "made for the tests of the bus; shared")]
#[path = "bus/support.rs"]
mod bus;
#[expect(dead_code, reason = "shared with the tests of the daemon")]
#[path = "units/group.rs"]
mod group;
#[path = "units/systemd.rs"]
mod systemd;

use std::{process::Command, sync::Arc, time::Duration};

use nightporter::{
    action::Action,
    event::{BusEvent, Event},
    model::{AppKey, Bus, TargetId, Veto, VetoKind},
    sys::{
        bus::BusAddress,
        inbox::{Incoming, Process},
    },
};

use crate::{
    bus::{BUS, Daemon, Ended, Loop, UID, app_command, connect, run},
    group::Group,
    systemd::{Stopping, Systemd, Unit, forge},
};

const APP: &str = "org.example.Unit";
const SERVICE: &str = "app-org.example.Unit@1.service";
const SCOPE: &str = "app-gnome-org.example.Unit-7.scope";
const T: TargetId = TargetId(1);

#[test]
fn app_process() {
    bus::be_app();
}

#[test]
fn a_watchdog_is_seen() {
    let mut scene = Scene::new(SERVICE);
    let systemd = scene.systemd(Stopping::Grant, |unit| unit.watchdog = 30_000_000);
    let pid = scene.launch();
    let (kind, reason) = only(scene.sightings(), pid);
    assert_eq!(kind, VetoKind::Watchdog);
    assert_eq!(&*reason, "it has a watchdog of 30 s, which would end it (unit app-org.example.Unit@1.service)");
    // It says nothing to nobody unless asked, and is not asked for longer than there is an app.
    systemd.expect("Subscribe");
    scene.app = None;
    assert_eq!(scene.sightings(), []);
    systemd.expect("Unsubscribe");
}

#[test]
fn a_unit_that_has_nothing_to_say_is_no_news() {
    for (unit, change) in [(SERVICE, 0), (SERVICE, u64::MAX), (SCOPE, 0)] {
        let mut scene = Scene::new(unit);
        let systemd = scene.systemd(Stopping::Grant, |unit| unit.watchdog = change);
        let pid = scene.launch();
        systemd.expect("GetUnit");
        assert!(scene.no_sightings(), "{unit}");
        // It was looked at all the same.
        systemd.job_new(4, unit);
        assert_eq!(only(scene.sightings(), pid).0, VetoKind::UnitJob);
    }
}

#[test]
fn jobs_are_followed() {
    for unit in [SERVICE, SCOPE] {
        let mut scene = Scene::new(unit);
        let systemd = scene.systemd(Stopping::Grant, |_| {});
        let pid = scene.launch();
        systemd.expect("GetUnit");
        assert!(scene.no_sightings());
        systemd.job_new(1, "other.service");
        systemd.job_new(8, unit);
        let (kind, reason) = only(scene.sightings(), pid);
        assert!(kind == VetoKind::UnitJob && reason.contains(unit) && reason.contains("job"), "{kind:?} {reason}");
        // Replaced by another: there is still one.
        systemd.job_new(9, unit);
        systemd.job_removed(8, unit, "canceled");
        assert!(scene.no_sightings());
        systemd.job_removed(9, unit, "done");
        assert_eq!(scene.sightings(), []);
    }
}

#[test]
fn a_job_from_before_is_seen() {
    let mut scene = Scene::new(SERVICE);
    let systemd = scene.systemd(Stopping::Grant, |unit| (unit.job, unit.state) = (3, "activating"));
    let pid = scene.launch();
    assert_eq!(only(scene.sightings(), pid).0, VetoKind::UnitJob);
    systemd.state(SERVICE, "active");
    assert!(scene.no_sightings(), "the job is still there");
    systemd.job_removed(3, SERVICE, "done");
    assert_eq!(scene.sightings(), []);
}

#[test]
fn a_stop_that_is_no_job_is_seen() {
    let mut scene = Scene::new(SERVICE);
    let systemd = scene.systemd(Stopping::Grant, |_| {});
    let pid = scene.launch();
    systemd.expect("GetUnit");
    assert!(scene.no_sightings());
    // RuntimeMaxSec= is over.
    systemd.state(SERVICE, "deactivating");
    let (kind, reason) = only(scene.sightings(), pid);
    assert!(kind == VetoKind::UnitJob && reason.contains("deactivating"), "{reason}");
    systemd.state(SERVICE, "active");
    assert_eq!(scene.sightings(), []);
}

#[test]
fn a_unit_in_another_cgroup_is_not_the_apps() {
    let mut scene = Scene::new(SERVICE);
    let systemd = scene.systemd(Stopping::Grant, |unit| {
        unit.group.push_str("/elsewhere");
        unit.watchdog = 1_000_000;
        unit.job = 5;
    });
    scene.launch();
    systemd.expect("GetUnit");
    assert!(scene.no_sightings());
    let refusal = scene.stop().unwrap_err();
    assert!(refusal.contains(SERVICE), "{refusal}");
}

#[test]
fn only_systemd_is_believed() {
    let mut scene = Scene::new(SERVICE);
    let systemd = scene.systemd(Stopping::Grant, |_| {});
    let pid = scene.launch();
    systemd.expect("GetUnit");
    assert!(scene.no_sightings());
    let (address, porter) = (scene.daemon.address(), scene.porter());
    run(async move { forge(&connect(&address).await, &porter, SERVICE).await }).join().unwrap();
    assert!(scene.no_sightings());
    systemd.job_new(5, SERVICE);
    assert_eq!(only(scene.sightings(), pid).0, VetoKind::UnitJob);
}

#[test]
fn a_manager_that_comes_goes_and_comes_again() {
    let mut scene = Scene::new(SERVICE);
    let pid = scene.launch();
    assert!(scene.no_sightings());
    assert!(scene.stop().unwrap_err().contains("not known"));
    for _ in 0..2 {
        // As with systemctl daemon-reexec.
        let systemd = scene.systemd(Stopping::Grant, |unit| unit.watchdog = 5_000_000);
        assert_eq!(only(scene.sightings(), pid).0, VetoKind::Watchdog);
        systemd.expect("Subscribe");
        assert_eq!(scene.stop(), Ok(()));
        // The stop was its own, so it is nothing to be told of; and it ends with the manager.
        systemd.job_new(77, SERVICE);
        assert!(scene.no_sightings());
        drop(systemd);
        assert_eq!(scene.sightings(), []);
        assert!(scene.stopped().unwrap_err().contains("went away"));
    }
}

#[test]
fn an_app_that_moves_is_found_again() {
    let mut scene = Scene::new(SERVICE);
    let systemd = scene.systemd(Stopping::Grant, |unit| unit.watchdog = 2_000_000);
    let pid = scene.launch();
    assert_eq!(only(scene.sightings(), pid).0, VetoKind::Watchdog);
    // Out of the unit, and back: shells do the second after the start.
    let mount = scene.group.name();
    let root = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = root.lines().find(|line| line.contains(" - cgroup2 ")).unwrap().split(' ').nth(4).unwrap().to_owned();
    std::fs::write(format!("{root}/cgroup.procs"), pid.to_string()).unwrap();
    scene.main.bus.as_ref().unwrap().look_at_unit(scene.key(), pid);
    assert_eq!(scene.sightings(), []);
    systemd.expect("Unsubscribe");
    std::fs::write(format!("{root}{mount}/cgroup.procs"), pid.to_string()).unwrap();
    scene.main.bus.as_ref().unwrap().look_at_unit(scene.key(), pid);
    assert_eq!(only(scene.sightings(), pid).0, VetoKind::Watchdog);
    // And where it is it is not looked for again.
    systemd.expect_look();
    while systemd.asked.try_recv().is_ok() {}
    scene.main.bus.as_ref().unwrap().look_at_unit(scene.key(), pid);
    assert_eq!(scene.stop(), Ok(()));
    assert_eq!(systemd.asked.recv_timeout(Duration::from_secs(5)).unwrap(), ("StopUnit".into(), SERVICE.into()));
}

#[test]
fn a_stop_is_granted_refused_or_fails() {
    let mut scene = Scene::new(SCOPE);
    let systemd = scene.systemd(Stopping::Grant, |_| {});
    scene.launch();
    systemd.expect_look();
    assert!(scene.no_sightings());
    assert_eq!(scene.stop(), Ok(()));
    assert_eq!(systemd.expect("StopUnit"), SCOPE);
    // Another's job is not it.
    systemd.job_removed(76, SCOPE, "canceled");
    systemd.job_removed(77, SCOPE, "frozen");
    let reason = scene.stopped().unwrap_err();
    assert!(reason.contains("frozen"), "{reason}");
    assert_eq!(scene.stop(), Ok(()), "it may be tried again");
    systemd.job_removed(77, SCOPE, "done");
    assert!(scene.nothing_stopped());
    drop(systemd);

    let systemd = scene.systemd(Stopping::Refuse, |_| {});
    systemd.expect_look();
    assert!(scene.no_sightings());
    let reason = scene.stop().unwrap_err();
    assert!(reason.contains("Interactive authentication required"), "{reason}");
    drop(systemd);

    let systemd = scene.systemd(Stopping::Vanish, |_| {});
    systemd.expect_look();
    assert!(scene.no_sightings());
    assert!(scene.stop().is_err());
    drop(systemd);

    // Nothing is told of what is not answered: whoever asked has a time limit. But the bus's end is told.
    let systemd = scene.systemd(Stopping::Silent, |_| {});
    systemd.expect_look();
    assert!(scene.no_sightings());
    scene.ask_stop();
    systemd.expect("StopUnit");
    assert!(scene.nothing_stopped());
    scene.daemon.stop();
    assert!(scene.stopped().unwrap_err().contains("went away"));
    scene.ask_stop();
    assert!(scene.stopped().unwrap_err().contains("not there"));
}

#[test]
fn the_system_bus_has_the_systems_manager() {
    let mut scene = Scene::on(Bus::System, Group::of_system("board.service"), "board.service");
    let systemd = scene.systemd(Stopping::Grant, |unit| unit.watchdog = 1);
    let pid = scene.launch();
    let (kind, reason) = only(scene.sightings(), pid);
    systemd.expect_look();
    assert!(kind == VetoKind::Watchdog && reason.contains("1 s"), "{reason}");
    assert_eq!(scene.stop(), Ok(()));
    assert_eq!(systemd.expect("StopUnit"), "board.service");
    // What runs under a user's manager is none of its business.
    let mut scene = Scene::on(Bus::System, Group::of_user(UID, SERVICE), SERVICE);
    let _systemd = scene.systemd(Stopping::Grant, |unit| unit.watchdog = 1);
    scene.launch();
    assert!(scene.no_sightings());
}

/// One app in one unit.
struct Scene {
    app: Option<Ended>,
    main: Loop,
    daemon: Daemon,
    group: Group,
    unit: &'static str,
    bus: Bus,
}

impl Scene {
    fn new(unit: &'static str) -> Self {
        Self::on(BUS, Group::of_user(UID, unit), unit)
    }

    fn on(bus: Bus, group: Group, unit: &'static str) -> Self {
        let daemon = Daemon::new();
        let mut main = Loop::on(vec![BusAddress { bus, address: Some(daemon.address()) }]);
        main.expect(|incoming| matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(_)))).then_some(()));
        Self { app: None, main, daemon, group, unit, bus }
    }

    fn key(&self) -> AppKey {
        AppKey::new(self.bus, APP)
    }

    fn systemd(&self, stopping: Stopping, change: impl FnOnce(&mut Unit)) -> Systemd {
        let mut unit = Unit::of(&self.group.name());
        change(&mut unit);
        Systemd::start(&self.daemon.address(), &[(self.unit, unit)], stopping)
    }

    /// Starts the app in its unit and waits until its process is known.
    fn launch(&mut self) -> u32 {
        let key = self.key();
        self.main.perform(Action::Watch(key.clone()));
        let program = app_command(&self.daemon.address(), APP);
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(self.group.run("\"$0\" \"$@\"")).arg(program.get_program()).args(program.get_args());
        shell.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        shell.stdout(std::process::Stdio::null());
        self.app = Some(Ended(shell.spawn().unwrap()));
        let (_, Process { pid, .. }) = self.main.process(&key);
        assert_eq!(pid, self.app.as_ref().unwrap().0.id());
        pid
    }

    /// What is seen of processes next, which must be this bus's.
    fn sightings(&mut self) -> Vec<(u32, Veto)> {
        let of = match self.bus {
            Bus::Session(uid) => ("systemd", uid),
            Bus::System => ("systemd-system", 0),
        };
        self.main.expect(|incoming| match incoming {
            Incoming::Sightings { source, uid, vetoes } if (*source, *uid) == of => Some(vetoes.clone()),
            _ => None,
        })
    }

    fn no_sightings(&mut self) -> bool {
        let any = |incoming: &Incoming| matches!(incoming, Incoming::Sightings { .. }).then_some(());
        self.main.expect_within(Duration::from_millis(300), any).is_none()
    }

    fn ask_stop(&self) {
        self.main.bus.as_ref().unwrap().stop_unit(self.key(), T, self.group.name());
    }

    fn stop(&mut self) -> Result<(), Arc<str>> {
        self.ask_stop();
        self.stopped()
    }

    fn stopped(&mut self) -> Result<(), Arc<str>> {
        self.main.expect(|incoming| match incoming {
            Incoming::UnitStopped(T, answer) => Some(answer.clone()),
            _ => None,
        })
    }

    fn nothing_stopped(&mut self) -> bool {
        let any = |incoming: &Incoming| matches!(incoming, Incoming::UnitStopped(..)).then_some(());
        self.main.expect_within(Duration::from_millis(300), any).is_none()
    }

    /// The unique name of the daemon's side.
    fn porter(&self) -> String {
        let address = self.daemon.address();
        run(async move {
            let connection = connect(&address).await;
            let (name, path) = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
            let reply = connection
                .call_method(Some(name), path, Some(name), "GetNameOwner", &"org.nightporter1")
                .await
                .unwrap();
            reply.body().deserialize::<String>().unwrap()
        })
        .join()
        .unwrap()
    }
}

/// The only thing that is seen, of this process.
fn only(mut vetoes: Vec<(u32, Veto)>, pid: u32) -> (VetoKind, Arc<str>) {
    assert_eq!(vetoes.len(), 1, "{vetoes:?}");
    let (of, veto) = vetoes.remove(0);
    assert_eq!(of, pid);
    assert!(veto.reason.len() <= 200);
    (veto.kind, veto.reason)
}
