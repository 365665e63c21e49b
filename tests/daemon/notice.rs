//! Apps that are told before they are frozen, and come back where they were: the sample, and the examples of
//! docs/lifecycle.md as they are.

use std::{fs, path::Path, process::Command, time::Duration};

use nix::unistd::getuid;

use crate::{
    group::Group,
    support::{Behaviour, FAST, PATIENCE, Setup, World, dict, is_held, is_running, of, stays, wait, wait_for},
};

const APP: &str = "org.example.App";
const UNIT: &str = "app-org.example.App@9.service";
const PORTER_APP: &str = "org.nightporter1.App";

fn enforcing() -> World {
    World::new(Setup { top: "profile = \"tombstone\"", lifecycle: FAST, ..Setup::default() })
}

fn listener(fault: &str) -> World {
    let world = enforcing();
    world.install_listener(APP, fault);
    world.launch(APP);
    world.wait_ready(APP);
    world
}

#[test]
fn an_app_is_told_before_and_after_and_comes_back_where_it_was() {
    let world = listener("");
    assert_eq!(world.reported(APP, "restored")[0]["state"], "");
    let pid = world.pid(APP);
    wait("the freeze", || is_held(pid).then_some(()));
    let told = world.reported(APP, "will-suspend");
    assert_eq!((told.len(), &told[0]["milliseconds"]), (1, &5000.into()));
    assert!(world.reported(APP, "resumed").is_empty());
    assert!(stays(Duration::from_millis(300), || is_held(pid)));
    world.post(APP, "where I was");
    world.expect(APP, &["where I was"]);
    let resumed = wait("Resumed", || world.reported(APP, "resumed").pop());
    assert!((100..60_000).contains(&resumed["milliseconds"].as_u64().unwrap()), "{resumed}");
    wait("the second notice", || (world.reported(APP, "will-suspend").len() == 2).then_some(()));
    wait("the second freeze", || is_held(pid).then_some(()));
    let kill = world.cli(&["kill", APP]);
    assert!(kill.status.success() && !is_running(pid), "{}", of(&kill));
    world.post(APP, "started again");
    world.expect(APP, &["where I was", "started again"]);
    assert_ne!(world.pid(APP), pid);
    let restored = wait("the state", || world.reported(APP, "restored").into_iter().nth(1));
    assert_eq!(restored["state"], "where I was");
}

#[test]
fn a_state_outlives_the_daemon_and_ends_with_the_registration() {
    let mut world = enforcing();
    let app = world.client(APP, Behaviour::Accept);
    let bytes = |connection: &zbus::Connection| -> Vec<u8> { restore(connection).unwrap() };
    let early = call(&app.connection, "Listen", &true).map(drop);
    assert_eq!(early, Err("org.nightporter1.Error.NoSuchApp".into()));
    assert_eq!(save(&app.connection, b"too early"), Err("org.nightporter1.Error.NoSuchApp".into()));
    app.endpoint("t");
    assert_eq!(bytes(&app.connection), b"");
    let largest = vec![0xa5; 65_536];
    save(&app.connection, &largest).unwrap();
    assert_eq!(bytes(&app.connection), largest);
    let refused = save(&app.connection, &vec![0; 65_537]);
    assert_eq!(refused, Err("org.freedesktop.DBus.Error.LimitsExceeded".into()));
    save(&app.connection, b"kept").unwrap();
    // Answered is durable.
    world.kill_daemon();
    world.start_daemon();
    assert_eq!(wait("the app to be known", || restore(&app.connection).ok()), b"kept");
    // Nobody else's.
    let other = world.client("org.example.Other", Behaviour::Accept);
    other.endpoint("o");
    assert_eq!(bytes(&other.connection), b"");
    save(&other.connection, b"another").unwrap();
    let shell = world.nameless();
    assert_eq!(restore(&shell.connection), Err("org.nightporter1.Error.NoSuchApp".into()));
    assert_eq!(bytes(&app.connection), b"kept");
    save(&other.connection, b"").unwrap();
    assert_eq!(bytes(&other.connection), b"");
    app.unregister("t");
    assert_eq!(app.register_with(dict(&[("service", APP), ("token", "t2")])).0, "REGISTRATION_SUCCEEDED");
    assert_eq!(bytes(&app.connection), b"", "it went with the last registration");
}

#[test]
fn who_does_not_answer_the_notice_is_frozen_all_the_same() {
    let world = listener("deaf");
    let pid = world.pid(APP);
    wait("the notice", || world.reported(APP, "will-suspend").pop());
    assert!(stays(Duration::from_secs(3), || !is_held(pid)), "it had no time to prepare");
    wait("the freeze", || is_held(pid).then_some(()));
    // Once is enough: it is told again, and not waited for.
    world.post(APP, "awake");
    world.expect(APP, &["awake"]);
    wait("Resumed", || world.reported(APP, "resumed").pop());
    let quickest = (0..3).any(|n| {
        wait("the next notice", || (world.reported(APP, "will-suspend").len() >= n + 2).then_some(()));
        let quick = wait_for(Duration::from_secs(3), || is_held(pid).then_some(())).is_some();
        wait("the freeze", || is_held(pid).then_some(()));
        world.post(APP, &format!("awake {n}"));
        wait("the thaw", || (!is_held(pid)).then_some(()));
        quick
    });
    assert!(quickest, "it is waited for each time");
}

#[test]
fn the_example_in_python() {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/lifecycle/python/app.py");
    an_example_sleeps_well(&format!("/usr/bin/python3 {}", program.display()));
}

#[test]
fn the_example_in_c() {
    let dir = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/lifecycle/c/app.c");
    let program = dir.path().join("app");
    let line = format!(
        "${{CC:-cc}} -Wall -Wextra -Werror -o {} {} $(pkg-config --cflags --libs libsystemd || echo -lsystemd)",
        program.display(),
        source.display()
    );
    let built = Command::new("sh").args(["-c", &line]).output().unwrap();
    assert!(built.status.success(), "{}", of(&built));
    an_example_sleeps_well(&program.display().to_string());
}

/// Frozen in a cgroup of its own, told before, resumed after; ended, started again by a push, and where it was.
fn an_example_sleeps_well(program: &str) {
    let mut world = enforcing();
    let group = Group::of_user(getuid().as_raw(), UNIT);
    let output = world.install_program(APP, &group.run(&format!("{program} {APP}")));
    let lines =
        || -> Vec<String> { fs::read_to_string(&output).unwrap_or_default().lines().map(ToOwned::to_owned).collect() };
    let says = |what: &str, nth: usize| {
        let seen = wait_for(PATIENCE, || lines().into_iter().filter(|line| line.starts_with(what)).nth(nth));
        seen.unwrap_or_else(|| panic!("{what} was not said {} times: {:#?}", nth + 1, lines()))
    };
    world.launch(APP);
    let endpoint = says("endpoint: ", 0).split_off("endpoint: ".len());
    assert_eq!(says("restored: ", 0), "restored: 0");
    let post = |world: &World, body: &str| world.post_to(&endpoint, &[("TTL", "600")], body);
    post(&world, "first");
    says("message 1: first", 0);
    let pid = world.pid(APP);
    wait("the freeze", || group.is_frozen().then_some(()));
    assert_eq!(says("freezing, within ", 0), "freezing, within 5000 ms");

    assert!(stays(Duration::from_millis(500), || group.is_frozen()));
    post(&world, "second");
    says("message 2: second", 0);
    let millis: u64 = says("resumed after ", 0).split(' ').nth(2).unwrap().parse().unwrap();
    assert!((250..60_000).contains(&millis), "{millis} ms");
    let at = |what: &str| lines().iter().position(|line| line.starts_with(what));
    assert!(at("resumed after ") < at("message 2: "), "{:#?}", lines());

    says("freezing, within ", 1);
    wait("the second freeze", || group.is_frozen().then_some(()));
    let kill = world.cli(&["kill", APP]);
    assert!(kill.status.success() && !is_running(pid), "{}", of(&kill));
    post(&world, "third");
    // Perhaps before it has its state back.
    wait("the third message", || lines().into_iter().find(|line| line.ends_with(": third")));
    assert_ne!(world.pid(APP), pid);
    let restored = says("restored: ", 1);
    assert!(["restored: 2", "restored: 3"].contains(&&*restored), "{:#?}", lines());

    // A daemon that was started anew is told everything anew.
    says("freezing, within ", 2);
    world.kill_daemon();
    world.start_daemon();
    says("ready", 2);
    says("freezing, within ", 3);
    wait("the freeze", || group.is_frozen().then_some(()));
    post(&world, "fourth");
    // The third may have come once more: the daemon was killed right after it was taken.
    wait("the fourth message", || lines().into_iter().find(|line| line.ends_with(": fourth")));
}

fn call<B>(connection: &zbus::Connection, member: &'static str, body: &B) -> Result<zbus::Message, String>
where
    B: serde::Serialize + zbus::DynamicType + Sync,
{
    let call = connection.call_method(Some("org.nightporter1"), "/org/nightporter1", Some(PORTER_APP), member, body);
    zbus::block_on(call).map_err(|error| crate::support::error_of(Err(error)).0)
}

fn save(connection: &zbus::Connection, state: &[u8]) -> Result<(), String> {
    call(connection, "SaveState", &state).map(drop)
}

fn restore(connection: &zbus::Connection) -> Result<Vec<u8>, String> {
    call(connection, "RestoreState", &()).map(|reply| reply.body().deserialize().unwrap())
}

/// docs/lifecycle.md names a test, or a reason why there is none, for each pitfall; the tests are there.
#[test]
fn the_tests_that_the_documentation_names_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/lifecycle.md")).unwrap();
    let rows: Vec<&str> = page.lines().skip_while(|line| !line.starts_with("## Pitfall")).collect();
    for number in 1..=24 {
        let row = rows.iter().find(|line| line.starts_with(&format!("| {number} |"))).unwrap();
        let last = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let named: Vec<_> = last.split('`').filter_map(|part| part.split_once("::")).collect();
        assert!(!named.is_empty() || last.starts_with("None: "), "{row}");
        for (file, test) in named {
            let source = fs::read_to_string(root.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
            assert!(
                source.contains(&format!("#[test]\nfn {test}("))
                    || source.contains(&format!("#[test]\n    fn {test}(")),
                "{file} has no test {test}"
            );
        }
    }
}
