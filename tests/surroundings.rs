//! What the services of the system bus say, against stand-ins on a real dbus-daemon.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "surroundings/support.rs"]
mod support;

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command},
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use nightporter::{
    event::Event,
    model::{Network, NetworkKind, Reach, Surroundings},
};
use support::*;
use zbus::Variant;

fn on_battery(percent: u8, network: Network) -> Surroundings {
    Surroundings { on_mains: Some(false), battery: Some(percent), network }
}

/// Something of which it is known that it is told: what was done before it and is not told of never will be.
fn plug_in(world: &mut World, upower: &Fake) -> Surroundings {
    upower.set(UPOWER_PATH, UPOWER, vec![("OnBattery", false.into())]);
    world.told()
}

#[test]
fn nobody_there_is_nothing_to_tell_and_each_may_come_later() {
    let daemon = Daemon::new();
    let mut world = World::on(&daemon);
    assert_eq!(world.event_within(Duration::from_millis(1500)), None);
    let _upower = upower(&daemon, 54.9);
    assert_eq!(world.told(), on_battery(54, Network::default()));
    let _network_manager = network_manager(&daemon);
    assert_eq!(world.told(), on_battery(54, home()));
}

#[test]
fn all_there_is_told_at_once_and_once() {
    let daemon = Daemon::new();
    let upower = upower(&daemon, 80.0);
    let network_manager = network_manager(&daemon);
    let mut world = World::on(&daemon);
    assert_eq!(world.told(), on_battery(80, home()));
    // Nobody asks for what is not in use.
    let asked: Vec<(String, String)> = network_manager.asked.try_iter().collect();
    let expected =
        [(NM_PATH, NM), (WIFI, ACTIVE), (POINT, ACCESS_POINT)].map(|(path, interface)| (path.into(), interface.into()));
    assert_eq!(asked, expected);
    assert_eq!(plug_in(&mut world, &upower).on_mains, Some(true));
}

#[test]
fn a_board_without_a_battery_is_on_mains() {
    let daemon = Daemon::new();
    let upower = upower(&daemon, 0.0);
    upower.put(UPOWER_PATH, UPOWER, vec![("OnBattery", false.into())]);
    upower.put(BATTERY_PATH, BATTERY, vec![("Type", 0_u32.into()), ("IsPresent", false.into())]);
    let mut world = World::on(&daemon);
    assert_eq!(world.told(), Surroundings { on_mains: Some(true), ..Surroundings::default() });
}

#[test]
fn the_charge_is_told_in_steps_and_when_it_becomes_low() {
    let daemon = Daemon::new();
    let upower = upower(&daemon, 20.0);
    let mut world = World::on(&daemon);
    assert_eq!(world.told().battery, Some(20));
    let percent = |percent: f64| upower.set(BATTERY_PATH, BATTERY, vec![("Percentage", percent.into())]);
    for step in [19.0, 18.0, 17.0, 16.0] {
        percent(step);
    }
    assert_eq!(
        plug_in(&mut world, &upower),
        Surroundings { on_mains: Some(true), battery: Some(16), ..Default::default() }
    );
    percent(15.9);
    assert_eq!(world.told().battery, Some(15), "now it is low");
    percent(21.0);
    assert_eq!(world.told().battery, Some(21));
    percent(26.0);
    assert_eq!(world.told().battery, Some(26));
}

#[test]
fn networks_come_and_go() {
    let daemon = Daemon::new();
    let network_manager = network_manager(&daemon);
    let mut world = World::on(&daemon);
    assert_eq!(world.told().network, home());
    // The login page of a hotel.
    network_manager.set(NM_PATH, NM, vec![("State", 60_u32.into()), ("Connectivity", 2_u32.into())]);
    assert_eq!(world.told().network, Network { reach: Reach::Portal, ..home() });
    network_manager.set(
        NM_PATH,
        NM,
        vec![("PrimaryConnection", path(CABLE)), ("State", 70_u32.into()), ("Connectivity", 4_u32.into())],
    );
    let cable =
        Network { kind: NetworkKind::Wired, id: Some("wired/Dock".into()), reach: Reach::Full, ..Network::default() };
    assert_eq!(world.told().network, cable);
    // What was left behind is not listened to any more.
    network_manager.set(WIFI, ACTIVE, vec![("Id", "Other".into()), ("Type", "gsm".into())]);
    network_manager.set(
        NM_PATH,
        NM,
        vec![("PrimaryConnection", path("/")), ("State", 20_u32.into()), ("Connectivity", 1_u32.into())],
    );
    assert_eq!(world.told().network, Network { reach: Reach::None, ..Network::default() });
    network_manager.set(WIFI, ACTIVE, vec![("Type", "802-11-wireless".into())]);
    network_manager.set(
        NM_PATH,
        NM,
        vec![("PrimaryConnection", path(WIFI)), ("State", 70_u32.into()), ("Connectivity", 4_u32.into())],
    );
    assert_eq!(world.told().network, home());
    // A change that is only said to have happened.
    network_manager.put(NM_PATH, NM, vec![("Metered", 1_u32.into())]);
    network_manager.changed(NM_PATH, NM, &[], &["Metered"]);
    assert_eq!(world.told().network, Network { metered: true, ..home() });
}

#[test]
fn what_flaps_is_told_when_it_is_still() {
    let daemon = Daemon::new();
    let upower = upower(&daemon, 80.0);
    let mut world = World::on(&daemon);
    world.told();
    for on_battery in [false, true, false, true, false] {
        upower.set(UPOWER_PATH, UPOWER, vec![("OnBattery", on_battery.into())]);
    }
    assert_eq!(world.told().on_mains, Some(true));
    for on_battery in [true, false] {
        upower.set(UPOWER_PATH, UPOWER, vec![("OnBattery", on_battery.into())]);
    }
    // There and back: nothing.
    upower.set(BATTERY_PATH, BATTERY, vec![("Percentage", 60.0.into())]);
    assert_eq!(world.told(), Surroundings { on_mains: Some(true), battery: Some(60), ..Default::default() });
}

#[test]
fn a_modem_is_named_by_operator_and_access_point_and_roams_where_modem_manager_says_so() {
    let daemon = Daemon::new();
    let network_manager = network_manager(&daemon);
    network_manager.put(NM_PATH, NM, vec![("PrimaryConnection", path(MOBILE)), ("Metered", 3_u32.into())]);
    let mut world = World::on(&daemon);
    assert_eq!(world.told().network, mobile(false));
    let modem_manager = modem_manager(&daemon, 5);
    assert_eq!(world.told().network, mobile(true));
    modem_manager.set(MODEM_PATH, MODEM_3GPP, vec![("RegistrationState", 1_u32.into())]);
    assert_eq!(world.told().network, mobile(false));
    modem_manager.set(MODEM_PATH, MODEM_3GPP, vec![("RegistrationState", 10_u32.into())]);
    assert_eq!(world.told().network, mobile(true));
    // On Wi-Fi nobody cares.
    network_manager.set(NM_PATH, NM, vec![("PrimaryConnection", path(WIFI)), ("Metered", 4_u32.into())]);
    assert_eq!(world.told().network, home());
}

#[test]
fn a_restart_is_not_told_of_but_an_end_is() {
    let daemon = Daemon::new();
    let upower = upower(&daemon, 80.0);
    let first = network_manager(&daemon);
    let mut world = World::on(&daemon);
    assert_eq!(world.told(), on_battery(80, home()));
    first.quit();
    // As it comes up: without a network, until it has tried its connections.
    let second = network_manager(&daemon);
    second.set(NM_PATH, NM, vec![("Startup", true.into()), ("State", 20_u32.into()), ("PrimaryConnection", path("/"))]);
    thread::sleep(Duration::from_millis(1500));
    second.set(
        NM_PATH,
        NM,
        vec![("Startup", false.into()), ("State", 70_u32.into()), ("PrimaryConnection", path(WIFI))],
    );
    assert_eq!(plug_in(&mut world, &upower), Surroundings { on_mains: Some(true), battery: Some(80), network: home() });
    second.quit();
    assert_eq!(world.told(), Surroundings { on_mains: Some(true), battery: Some(80), network: Network::default() });
}

#[test]
fn lies_of_any_type_and_size_are_not_known() {
    let daemon = Daemon::new();
    let upower = upower(&daemon, 80.0);
    let network_manager = network_manager(&daemon);
    network_manager.put(POINT, ACCESS_POINT, vec![("Ssid", b"caf\xE9/\0%\xF0\x9F".to_vec().into())]);
    network_manager.put(
        NM_PATH,
        NM,
        vec![
            ("State", "seventy".into()),
            ("Connectivity", Variant::from(vec![4_u32])),
            ("Metered", (-1_i32).into()),
            ("AllDevices", Variant::from(vec!["x"; 1000])),
        ],
    );
    let mut world = World::on(&daemon);
    let odd = Network { kind: NetworkKind::Wifi, id: Some("wifi/caf%E9%2F%00%25%F0%9F".into()), ..Network::default() };
    assert_eq!(world.told(), on_battery(80, odd.clone()));

    // Signals of others in the name of the services.
    let stranger = Fake::start(&daemon, "", Default::default());
    stranger.changed(UPOWER_PATH, UPOWER, &[("OnBattery", false.into())], &[]);
    stranger.prepare_for_sleep(true);
    // Signals of the services that are not what they should be.
    upower.signal(UPOWER_PATH, "org.freedesktop.DBus.Properties", "PropertiesChanged", &"what");
    upower.signal(UPOWER_PATH, "org.freedesktop.DBus.Properties", "PropertiesChanged", &(UPOWER, 7_u32));
    upower.changed(BATTERY_PATH, BATTERY, &[("Percentage", "full".repeat(100_000).into())], &[]);
    upower.changed(BATTERY_PATH, BATTERY, &[("Percentage", f64::NAN.into())], &[]);
    assert_eq!(world.told(), Surroundings { on_mains: Some(false), battery: None, network: odd.clone() });

    // Names of any length.
    network_manager.set(POINT, ACCESS_POINT, vec![("Ssid", vec![b'x'; 60_000].into())]);
    network_manager.set(WIFI, ACTIVE, vec![("Id", "é".repeat(30_000).into()), ("SpecificObject", path("/"))]);
    let named = Network { id: Some("wifi/7d0f6e8e-9d5f-4f7c-9d9c-0a8a3a3b2f11".into()), ..odd };
    assert_eq!(world.told().network, named);
    network_manager.set(WIFI, ACTIVE, vec![("SpecificObject", "not a path'".into()), ("Uuid", 5_u32.into())]);
    assert_eq!(world.told().network, Network { id: None, ..named });
}

#[test]
fn who_does_not_answer_holds_up_the_others_for_ten_seconds_and_is_heard_later() {
    let daemon = Daemon::new();
    let _upower = upower(&daemon, 80.0);
    let network_manager = network_manager(&daemon);
    network_manager.manners.silent.store(true, Ordering::Relaxed);
    let begun = Instant::now();
    let mut world = World::on(&daemon);
    assert_eq!(world.told(), on_battery(80, Network::default()));
    assert!(begun.elapsed() >= Duration::from_secs(9));
    network_manager.manners.silent.store(false, Ordering::Relaxed);
    world.surroundings.look_again();
    assert_eq!(world.told(), on_battery(80, home()));
}

#[test]
fn sleep_waits_until_it_is_allowed() {
    let daemon = Daemon::new();
    let logind = logind(&daemon);
    let mut world = World::on(&daemon);
    let mut first = logind.lock();
    let (what, who, why, mode) = &first.arguments;
    assert_eq!((&**what, &**who, &**why, &**mode), ("sleep", "Night Porter", "delivering messages", "delay"));
    for _ in 0..2 {
        logind.prepare_for_sleep(true);
        assert_eq!(world.event(), Event::FallingAsleep);
        assert!(!first.released());
        world.surroundings.allow_sleep();
        first.wait_released();
        // None is taken before the machine is awake again.
        assert!(logind.inhibited.try_recv().is_err());
        logind.prepare_for_sleep(false);
        assert_eq!(world.event(), Event::Resumed);
        first = logind.lock();
        assert_eq!(first.arguments.3, "delay");
    }
    // An answer that comes after the machine is awake again means nothing.
    world.surroundings.allow_sleep();
    logind.prepare_for_sleep(true);
    assert_eq!(world.event(), Event::FallingAsleep);
    assert!(!first.released());
    // Said twice, told once; and the loop need not answer.
    logind.prepare_for_sleep(true);
    logind.prepare_for_sleep(false);
    assert_eq!(world.event(), Event::Resumed);
    assert!(!first.released() && logind.inhibited.try_recv().is_err(), "it is still held: never two of one kind");
    drop(world);
    first.wait_released();
}

#[test]
fn sleep_is_held_off_by_one_lock_at_a_time() {
    let daemon = Daemon::new();
    let logind = logind(&daemon);
    let world = World::on(&daemon);
    let mut delay = logind.lock();
    world.surroundings.stay_awake(true);
    let mut block = logind.lock();
    assert_eq!((&*block.arguments.0, &*block.arguments.3), ("sleep", "block"));
    world.surroundings.stay_awake(true);
    world.surroundings.stay_awake(false);
    block.wait_released();
    // Wanted and no more before logind has answered: closed as soon as it comes, and one is enough.
    while logind.asked.try_recv().is_ok() {}
    logind.manners.holds_back.store(true, Ordering::Relaxed);
    world.surroundings.stay_awake(true);
    logind.wait_asked_for_lock();
    world.surroundings.stay_awake(false);
    logind.manners.holds_back.store(false, Ordering::Relaxed);
    logind.lock().wait_released();
    world.surroundings.stay_awake(true);
    let mut block = logind.lock();
    assert!(!block.released() && !delay.released());
    assert!(logind.inhibited.try_recv().is_err());
    drop(world);
    block.wait_released();
    delay.wait_released();
}

#[test]
fn locks_are_taken_anew_when_logind_or_the_bus_restarts() {
    let mut daemon = Daemon::new();
    let first = logind(&daemon);
    let mut world = World::on(&daemon);
    let mut delay = first.lock();
    world.surroundings.stay_awake(true);
    let mut block = first.lock();
    first.prepare_for_sleep(true);
    assert_eq!(world.event(), Event::FallingAsleep);
    first.quit();
    assert_eq!(world.event(), Event::Resumed, "nobody else would say so");
    delay.wait_released();
    block.wait_released();
    let modes = |logind: &Fake| {
        let mut locks = [logind.lock(), logind.lock()];
        locks.sort_by(|a, b| a.arguments.3.cmp(&b.arguments.3));
        assert_eq!([&*locks[0].arguments.3, &*locks[1].arguments.3], ["block", "delay"]);
        locks
    };
    let second = logind(&daemon);
    let mut locks = modes(&second);
    assert!(locks.iter_mut().all(|lock| !lock.released()));
    daemon.stop();
    locks.iter_mut().for_each(Inhibited::wait_released);
    drop(second);
    daemon.start();
    let third = logind(&daemon);
    let mut locks = modes(&third);
    assert!(locks.iter_mut().all(|lock| !lock.released()));
    third.prepare_for_sleep(true);
    assert_eq!(world.event(), Event::FallingAsleep);
}

#[test]
fn a_refused_lock_is_asked_for_again_when_it_is_worth_it() {
    let daemon = Daemon::new();
    let logind = logind(&daemon);
    logind.manners.refuses.store(true, Ordering::Relaxed);
    let mut world = World::on(&daemon);
    logind.wait_asked_for_lock();
    logind.prepare_for_sleep(true);
    assert_eq!(world.event(), Event::FallingAsleep, "told all the same");
    world.surroundings.allow_sleep();
    logind.prepare_for_sleep(false);
    assert_eq!(world.event(), Event::Resumed);
    logind.wait_asked_for_lock();
    logind.manners.refuses.store(false, Ordering::Relaxed);
    let begun = Instant::now();
    // The refusal may still be on its way.
    let mut delay = loop {
        world.surroundings.look_again();
        match logind.inhibited.recv_timeout(Duration::from_millis(100)) {
            Ok(lock) => break lock,
            Err(_) => assert!(begun.elapsed() < LIMIT, "no lock was asked for"),
        }
    };
    assert!(!delay.released());
}

#[test]
fn the_bus_may_come_later_and_may_restart() {
    let mut daemon = Daemon::prepared();
    let mut world = World::on(&daemon);
    assert_eq!(world.event_within(Duration::from_millis(300)), None);
    daemon.start();
    let first = upower(&daemon, 80.0);
    world.surroundings.look_again();
    assert_eq!(world.told(), on_battery(80, Network::default()));
    daemon.stop();
    drop(first);
    daemon.start();
    let second = upower(&daemon, 40.0);
    // It comes back on its own, and in between nothing is told.
    assert_eq!(world.told(), on_battery(40, Network::default()));
    daemon.stop();
    drop(second);
    assert_eq!(world.told(), Surroundings::default());
}

/// Set in the process that a test starts of itself.
const CHILD: &str = "NIGHTPORTER_SURROUNDINGS_TEST_CHILD";

#[test]
fn while_nothing_changes_nothing_runs() {
    if std::env::var_os(CHILD).is_some() {
        return idle();
    }
    // On its own: other tests have threads of the same name.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["while_nothing_changes_nothing_runs", "--exact", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

fn idle() {
    let daemon = Daemon::new();
    let logind = logind(&daemon);
    let upower = upower(&daemon, 80.0);
    let network_manager = network_manager(&daemon);
    let mut world = World::on(&daemon);
    assert_eq!(world.told(), on_battery(80, home()));
    let _delay = logind.lock();
    plug_in(&mut world, &upower);
    let bus: Vec<PathBuf> = fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| task.unwrap().path())
        .filter(|task| fs::read_to_string(task.join("comm")).unwrap().trim_end() == "bus")
        .collect();
    assert_eq!(bus.len(), 1, "one thread for all of it");
    let switches = || {
        let status = fs::read_to_string(bus[0].join("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    // What follows the last message.
    thread::sleep(Duration::from_secs(1));
    let before = switches();
    thread::sleep(Duration::from_secs(3));
    // The strength of the signal, another program's comings and goings, a connection nobody uses.
    network_manager.set(POINT, ACCESS_POINT, vec![("Strength", 33_u8.into())]);
    network_manager.set(CABLE, ACTIVE, vec![("State", 4_u32.into())]);
    Fake::start(&daemon, "org.example.Other", Default::default()).quit();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(switches() - before, 0);
    network_manager.set(NM_PATH, NM, vec![("Metered", 1_u32.into())]);
    assert!(world.told().network.metered);
    assert!(switches() > before, "the count counts");
}

/// The daemon itself, ended with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_daemon_holds_a_delay_lock_and_lets_the_machine_sleep() {
    let daemon = Daemon::new();
    let logind = logind(&daemon);
    let session = Daemon::new();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("nightporter.toml");
    fs::write(&config, "[[upstream]]\nname = \"none\"\nkind = \"ntfy\"\nurl = \"http://127.0.0.1:1/\"\n").unwrap();
    let mut running = Running(
        Command::new(env!("CARGO_BIN_EXE_nightporterd"))
            .args(["--user", "--config"])
            .arg(&config)
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .env("XDG_RUNTIME_DIR", dir.path())
            .env("DBUS_SESSION_BUS_ADDRESS", session.address())
            .env("DBUS_SYSTEM_BUS_ADDRESS", daemon.address())
            .spawn()
            .unwrap(),
    );
    let mut lock = logind.lock();
    assert_eq!(lock.arguments.3, "delay");
    for _ in 0..2 {
        assert!(!lock.released());
        logind.prepare_for_sleep(true);
        lock.wait_released();
        logind.prepare_for_sleep(false);
        lock = logind.lock();
        assert_eq!(lock.arguments.3, "delay");
    }
    let pid = nix::unistd::Pid::from_raw(running.0.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    lock.wait_released();
    assert!(running.0.wait().unwrap().success());
}
