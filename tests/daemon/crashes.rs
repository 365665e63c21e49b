//! However the daemon ends: nothing is lost, nothing stays frozen.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nightporter::view::LinkState;
use nix::sys::signal::Signal;

use crate::support::{Behaviour, FAST, Setup, World, alone, is_held, signal, stays, wait};

const APPS: [&str; 3] = ["org.example.A", "org.example.B", "org.example.C"];
const MESSAGES: usize = 200;
const ROUNDS: usize = 25;

#[test]
fn killed_at_random_moments_it_loses_nothing() {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    eprintln!("seed {seed}");
    let mut random = u64::from(seed) | 1;
    let mut below = |bound: u64| {
        // xorshift64.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % bound
    };
    let lifecycle = "grace = \"20ms\"\npage-out-after = \"1h\"\ntombstone-after = \"400ms\"\nawake-window = \"20ms\"\n";
    let mut world = World::new(Setup { top: "profile = \"tombstone\"", lifecycle, ..Setup::default() });
    world.samples(&APPS.map(|app| (app, "")));

    let mut sent: HashMap<&str, Vec<String>> = HashMap::new();
    for round in 0..ROUNDS {
        for n in 0..MESSAGES / ROUNDS {
            let app = APPS[below(3) as usize];
            let body = format!("{app} {round}.{n}");
            world.post(app, &body);
            sent.entry(app).or_default().push(body);
        }
        // On its way are the last ones: over the wire, to the disk, to the app.
        std::thread::sleep(Duration::from_micros(below(3000)));
        world.kill_daemon();
        match round % 5 {
            // Also before it has seen anything.
            0 => {
                world.spawn_daemon();
                std::thread::sleep(Duration::from_millis(below(40)));
                world.kill_daemon();
                world.start_daemon();
            }
            _ => world.start_daemon(),
        }
        wait("it to be online", || (world.status().upstreams[0].state == LinkState::Online).then_some(()));
        // From running to frozen to ended.
        std::thread::sleep(Duration::from_millis(below(5) * below(5) * 25));
    }
    world.kill_daemon();
    world.start_daemon();

    for app in APPS {
        let sent = &sent[app];
        wait(&format!("all of {app}'s messages (seed {seed})"), || {
            let seen = world.bodies(app);
            sent.iter().all(|body| seen.contains(body)).then_some(())
        });
        let mut ids: HashMap<String, String> = HashMap::new();
        let mut first = Vec::new();
        for seen in world.seen(app) {
            match ids.get(&seen.body) {
                Some(id) => assert_eq!(*id, seen.id, "twice with another id (seed {seed})"),
                None => {
                    ids.insert(seen.body.clone(), seen.id);
                    first.push(seen.body);
                }
            }
        }
        assert_eq!(first, *sent, "not in order (seed {seed})");
    }
    wait("all to be done with", || (world.status().messages_waiting == 0).then_some(()));
}

#[test]
fn what_a_killed_daemon_left_frozen_is_thawed() {
    let mut world = World::new(Setup { top: "profile = \"cached\"", lifecycle: FAST, ..Setup::default() });
    world.samples(&APPS.map(|app| (app, "")));
    let pids = APPS.map(|app| world.pid(app));
    let freeze_all_and_die = |world: &mut World| {
        for (app, pid) in APPS.into_iter().zip(pids) {
            declare_background(world, app);
            world.wait_state(app, "frozen");
            assert!(is_held(pid));
        }
        world.kill_daemon();
        // A daemon of somebody else's that starts right now thaws what it finds; then it is done again.
        stays(Duration::from_millis(200), || pids.into_iter().all(is_held))
    };

    // By hand, or by systemd (ExecStopPost=).
    let others = alone();
    let mut tries = 0;
    while !freeze_all_and_die(&mut world) {
        tries += 1;
        assert!(tries < 5, "they do not stay frozen");
        world.start_only_daemon();
    }
    let output = world.daemon_command().arg("--thaw-all").stdout(std::process::Stdio::piped()).output().unwrap();
    assert!(output.status.success(), "{}", world.log());
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("3 thawed"), "{said}");
    wait("all to run", || (!pids.into_iter().any(is_held)).then_some(()));
    drop(others);

    // By the next start, before anything else.
    world.start_daemon();
    for (app, text) in APPS.into_iter().zip(["a", "b", "c"]) {
        world.post(app, text);
        world.expect(app, &[text]);
    }
    let others = alone();
    freeze_all_and_die(&mut world);
    drop(others);
    let calm = FAST.replace("grace = \"200ms\"", "grace = \"1h\"");
    world.configure(&Setup { top: "profile = \"cached\"", lifecycle: &calm, ..Setup::default() });
    world.start_daemon();
    wait("all to run", || (!pids.into_iter().any(is_held)).then_some(()));
    assert_eq!(APPS.map(|app| world.pid(app)), pids, "none was ended for it");
}

/// As the shell does.
fn declare_background(world: &World, app: &str) {
    let shell = world.nameless();
    shell.porter("org.nightporter1.App", "SetStateOf", &[app, "background"]).unwrap();
}

#[test]
fn on_sigterm_nothing_stays_frozen() {
    let mut world = World::new(Setup { top: "profile = \"cached\"", lifecycle: FAST, ..Setup::default() });
    world.samples(&APPS.map(|app| (app, "")));
    let pids = APPS.map(|app| world.pid(app));
    for app in APPS {
        world.wait_state(app, "frozen");
    }
    assert!(pids.into_iter().all(is_held));
    let status = world.stop_daemon();
    assert_eq!(status.code(), Some(0));
    assert!(!pids.into_iter().any(is_held), "already when it is gone");
    assert!(!world.state.join("run/frozen").exists(), "and the record is empty");
}

#[test]
fn sighup_is_not_the_end() {
    let mut world = World::new(Setup::default());
    world.samples(&[("org.example.A", "")]);
    signal(world.daemon_pid(), Signal::SIGHUP);
    world.post("org.example.A", "after");
    world.expect("org.example.A", &["after"]);
    assert!(world.daemon_lives());
}

#[test]
fn a_bus_that_comes_back_finds_the_daemon_there() {
    let app = "org.example.App";
    let mut world = World::new(Setup::default());
    let client = world.client(app, Behaviour::Accept);
    let endpoint = client.endpoint("t");
    world.stop_bus();
    world.start_bus();
    drop(client);
    world.post_to(&endpoint, &[("TTL", "600")], "in between");
    wait("the daemon to be on the new bus", || world.is_owned("org.nightporter1").then_some(()));
    wait("it to wait", || (world.show(app).app.waiting == 1).then_some(()));
    let client = world.client(app, Behaviour::Accept);
    assert_eq!(client.next_message(), "in between");
    assert_eq!(client.endpoint("t"), endpoint);
    assert!(world.daemon_lives());
}

#[test]
fn a_daemon_that_is_there_before_its_bus() {
    let mut world = World::without_daemon(Setup::default());
    world.stop_bus();
    world.spawn_daemon();
    assert!(stays(Duration::from_millis(500), || world.daemon_lives()), "{}", world.log());
    world.start_bus();
    wait("the daemon to be on the bus", || world.is_owned("org.nightporter1").then_some(()));
    let client = world.client("org.example.App", Behaviour::Accept);
    let endpoint = client.endpoint("t");
    world.post_to(&endpoint, &[("TTL", "600")], "hello");
    assert_eq!(client.message(), "hello");
}
