//! A message's way to its app, whatever the app does or is.

use std::time::{Duration, Instant};

use nightporter::model::Freezer;
use nix::sys::signal::Signal;

use crate::support::{FAST, Sender, Setup, World, is_held, is_running, signal, stays, wait};

/// Long enough not to fail where the machine is busy, far below what the bad apps take.
const UNDELAYED: Duration = Duration::from_secs(1);

#[test]
fn to_a_running_app() {
    let world = World::new(Setup::default());
    world.samples(&[("org.example.A", ""), ("org.example.Old", "v1")]);
    for app in ["org.example.A", "org.example.Old"] {
        let first = world.post(app, "one");
        world.post(app, "two");
        world.expect(app, &["one", "two"]);
        wait("both to be taken", || (world.show(app).app.waiting == 0).then_some(()));
        assert!(world.is_acked(&first));
    }
}

#[test]
fn to_a_frozen_app() {
    let app = "org.example.A";
    let world = World::new(Setup { top: "profile = \"cached\"", lifecycle: FAST, ..Setup::default() });
    world.samples(&[(app, "")]);
    let pid = world.pid(app);
    for text in ["one", "two", "three"] {
        let show = world.wait_state(app, "frozen");
        assert!(is_held(pid), "{show:?}");
        if show.freezer == Some(Freezer::Cgroup2) {
            assert!(stays(Duration::from_millis(50), || is_held(pid)));
        }
        world.post(app, text);
        wait("the message", || (world.bodies(app).last()? == text).then_some(()));
    }
    assert_eq!(world.bodies(app), ["one", "two", "three"]);
    assert_eq!((world.pid(app), world.starts(app)), (pid, 1), "it is the same process");
    assert!(world.decided(app, "thaw", "a message is waiting for it"));
}

#[test]
fn to_a_tombstone() {
    let app = "org.example.A";
    let lifecycle =
        "grace = \"100ms\"\npage-out-after = \"1h\"\ntombstone-after = \"400ms\"\nawake-window = \"100ms\"\n";
    let world = World::new(Setup { top: "profile = \"tombstone\"", lifecycle, ..Setup::default() });
    world.samples(&[(app, "")]);
    for (text, starts) in [("one", 2), ("two", 3)] {
        let pid = world.pid(app);
        let show = world.wait_state(app, "tombstone");
        assert!(!is_running(pid) && !world.is_owned(app), "{show:?}");
        assert_eq!(show.app.pid, None);
        world.post(app, text);
        wait("the message", || (world.bodies(app).last()? == text).then_some(()));
        wait("the app to be up again", || (world.starts(app) == starts).then_some(()));
    }
    assert_eq!(world.bodies(app), ["one", "two"]);
    assert!(world.decided(app, "kill", "in the background"));
    assert!(world.decided(app, "start", "a message is waiting for it"));
}

#[test]
fn to_an_app_that_nothing_can_start() {
    let app = "org.example.A";
    let mut world = World::new(Setup::default());
    let pid = world.spawn(app, "");
    world.wait_ready(app);
    signal(pid, Signal::SIGKILL);
    wait("its name to go", || (!world.is_owned(app)).then_some(()));
    let location = world.post(app, "when you are back");
    wait("the reason", || world.decided(app, "wait", "it is delivered when the app starts by itself").then_some(()));
    assert_eq!(world.show(app).app.waiting, 1);
    world.spawn(app, "");
    world.expect(app, &["when you are back"]);
    wait("it to be taken", || (world.show(app).app.waiting == 0).then_some(()));
    assert!(world.is_acked(&location), "it was safe on the disk and is acknowledged all the same");
}

#[test]
fn bad_apps_delay_nobody_else() {
    let (innocent, mute, slow) = ("org.example.Innocent", "org.example.Mute", "org.example.Slow");
    let (broken, fragile, stopped) = ("org.example.Broken", "org.example.Fragile", "org.example.Stopped");
    let world = World::new(Setup { limits: "attempts = 3", ..Setup::default() });
    world.samples(&[
        (innocent, ""),
        (mute, "never-reply"),
        (slow, "slow-reply:2000"),
        (broken, "error"),
        (fragile, "crash-on:2"),
        (stopped, ""),
    ]);
    let alone = (0..5).map(|n| world.round_trip(innocent, &format!("alone {n}"))).max().unwrap();
    let frozen = world.pid(stopped);
    signal(frozen, Signal::SIGSTOP);

    let bad = [mute, slow, broken, fragile, stopped];
    for text in ["1", "2", "3"] {
        for app in bad {
            world.post(app, text);
        }
    }
    // While all of them are at their worst, and some time after.
    for n in 0..20 {
        let among = world.round_trip(innocent, &format!("among {n}"));
        assert!(among < alone + UNDELAYED, "alone {alone:?}, among bad apps {among:?}");
        std::thread::sleep(Duration::from_millis(50));
    }

    // The slow one gets its messages one after the other.
    world.expect(slow, &["1", "2", "3"]);
    let at: Vec<u64> = world.seen(slow).iter().map(|seen| seen.at_nanos).collect();
    assert!(at.windows(2).all(|pair| pair[1] - pair[0] >= 1_900_000_000), "not before it answered: {at:?}");
    // The one that crashes in the middle gets the message in its next life, and each once.
    world.expect(fragile, &["1", "2", "3"]);
    // The one that takes nothing is given up, and says why.
    wait("it to be given up", || (world.status().messages.given_up == 3).then_some(()));
    assert!(world.decided(broken, "give-up", "this app takes no messages"), "{:?}", world.why(broken));
    assert_eq!(world.bodies(broken), [""; 0]);
    // The one that was stopped from outside.
    assert_eq!(world.bodies(stopped), [""; 0]);
    signal(frozen, Signal::SIGCONT);
    world.expect(stopped, &["1", "2", "3"]);
    // The one that never answers has its first and no other; its next life, which is well, takes them all.
    world.expect(mute, &["1"]);
    world.install(mute, "");
    signal(world.pid(mute), Signal::SIGKILL);
    world.expect(mute, &["1", "1", "2", "3"]);
    let seen = world.seen(mute);
    assert_eq!(seen[0].id, seen[1].id, "twice only with the same id");
    wait("all to be done with", || (world.status().messages_waiting == 0).then_some(()));
}

#[test]
fn what_has_expired_is_not_delivered() {
    let app = "org.example.A";
    let mut world = World::new(Setup::default());
    let pid = world.spawn(app, "");
    world.wait_ready(app);
    signal(pid, Signal::SIGKILL);
    wait("its name to go", || (!world.is_owned(app)).then_some(()));
    world.post_with(app, &[("TTL", "1")], "short");
    world.post_with(app, &[("TTL", "600")], "long");
    wait("both to wait", || (world.show(app).app.waiting == 2).then_some(()));
    std::thread::sleep(Duration::from_millis(2100));
    world.spawn(app, "");
    world.expect(app, &["long"]);
    wait("it to be counted", || (world.status().messages.expired == 1).then_some(()));
    assert!(stays(Duration::from_millis(300), || world.bodies(app) == ["long"]));
}

#[test]
fn of_a_topic_only_the_newest_is_delivered() {
    let app = "org.example.A";
    let mut world = World::new(Setup::default());
    let pid = world.spawn(app, "");
    world.wait_ready(app);
    signal(pid, Signal::SIGKILL);
    wait("its name to go", || (!world.is_owned(app)).then_some(()));
    let mut replaced = Vec::new();
    for text in ["old", "newer", "newest"] {
        replaced.push(world.post_with(app, &[("TTL", "600"), ("Topic", "score")], text));
        world.post_with(app, &[("TTL", "600")], &format!("after {text}"));
        wait("it to arrive", || world.show(app).app.waiting.ge(&2).then_some(()));
        // The relay would replace it there, were it not here already.
        wait("it to be acknowledged", || (world.status().messages.received == 2 * replaced.len() as u64).then_some(()));
    }
    wait("the counts", || (world.status().messages.replaced == 2).then_some(()));
    world.spawn(app, "");
    world.expect(app, &["after old", "after newer", "newest", "after newest"]);
}

#[test]
fn a_burst_arrives_whole_and_in_order() {
    let app = "org.example.A";
    let world = World::new(Setup { relay: &["--max-channel-messages", "2000"], ..Setup::default() });
    world.samples(&[(app, "")]);
    let endpoint = world.endpoint(app);
    let mut sender = Sender::connect(world.relay());
    let bodies: Vec<String> = (0..1000).map(|n| format!("message {n}")).collect();
    let began = Instant::now();
    for body in &bodies {
        assert_eq!(sender.post(&endpoint, 600, body.as_bytes()), 201);
    }
    wait("all of them", || (world.seen(app).len() >= 1000).then_some(()));
    eprintln!("1000 messages in {:?}", began.elapsed());
    assert!(stays(Duration::from_millis(300), || world.seen(app).len() == 1000), "some came twice");
    assert_eq!(world.bodies(app), bodies);
    let status = world.status();
    assert_eq!((status.messages.accepted, status.messages_waiting), (1000, 0));
}

#[test]
fn an_app_that_still_answers_is_not_frozen() {
    let app = "org.example.Slow";
    let lifecycle =
        "grace = \"100ms\"\npage-out-after = \"1h\"\ntombstone-after = \"300ms\"\nawake-window = \"100ms\"\n";
    let world = World::new(Setup { top: "profile = \"tombstone\"", lifecycle, ..Setup::default() });
    world.samples(&[(app, "slow-reply:1500")]);
    world.wait_state(app, "tombstone");
    for text in ["one", "two"] {
        world.post(app, text);
    }
    world.expect(app, &["one"]);
    let pid = world.pid(app);
    // Frozen it could not answer, ended it would see the message again.
    assert!(stays(Duration::from_millis(1200), || is_running(pid) && !is_held(pid)));
    world.expect(app, &["one", "two"]);
    assert!(stays(Duration::from_millis(1200), || is_running(pid) && !is_held(pid)));
    wait("its end", || (!is_running(pid)).then_some(()));
    assert_eq!(world.bodies(app), ["one", "two"]);
    assert_eq!(world.status().messages.accepted, 2);
}

#[test]
fn messages_that_race_with_the_lifecycle_arrive_once_and_in_order() {
    let apps = ["org.example.A", "org.example.B"];
    let lifecycle =
        "grace = \"10ms\"\npage-out-after = \"10ms\"\ntombstone-after = \"60ms\"\nawake-window = \"10ms\"\n";
    let world = World::new(Setup { top: "profile = \"tombstone\"", lifecycle, ..Setup::default() });
    world.samples(&apps.map(|app| (app, "")));
    let mut sent = apps.map(|_| Vec::new());
    // From bursts to pauses in which they are frozen, paged out and ended.
    for n in 0_u64..160 {
        let to = usize::from(n % 3 == 0);
        let body = format!("message {n}");
        world.post(apps[to], &body);
        sent[to].push(body);
        // What is frozen is looked at once more after a second, before it is ended.
        let long = if n % 40 == 39 { 2000 } else { 0 };
        std::thread::sleep(Duration::from_millis(n * 37 % 90 + long));
    }
    for (app, sent) in apps.into_iter().zip(sent) {
        wait("all of them", || (world.seen(app).len() >= sent.len()).then_some(()));
        assert!(stays(Duration::from_millis(200), || world.seen(app).len() == sent.len()), "some came twice");
        assert_eq!(world.bodies(app), sent);
        assert!(world.starts(app) > 1, "it was never ended");
    }
}

#[test]
fn to_an_app_that_cannot_start() {
    let (app, other) = ("org.example.Broken", "org.example.Other");
    let world = World::new(Setup { limits: "attempts = 3", ..Setup::default() });
    world.samples(&[(app, ""), (other, "")]);
    world.install_command(app, "/nonexistent/app");
    signal(world.pid(app), Signal::SIGKILL);
    wait("its name to go", || (!world.is_owned(app)).then_some(()));
    world.post(app, "one");
    wait("the reason", || world.decided(app, "wait", "could not be started").then_some(()));
    assert!(world.round_trip(other, "undelayed") < UNDELAYED);
    wait("it to be given up", || world.decided(app, "give-up", "").then_some(()));
    // Once it is mended it is well again.
    world.install(app, "");
    world.post(app, "two");
    world.expect(app, &["two"]);
}

#[test]
fn of_too_many_the_oldest_are_dropped_and_it_is_said() {
    let app = "org.example.A";
    let mut world = World::new(Setup { limits: "messages-per-app = 5", ..Setup::default() });
    let pid = world.spawn(app, "");
    world.wait_ready(app);
    signal(pid, Signal::SIGKILL);
    wait("its name to go", || (!world.is_owned(app)).then_some(()));
    for n in 0..8 {
        world.post(app, &n.to_string());
    }
    wait("all to arrive", || (world.status().messages.received == 8).then_some(()));
    let status = world.status();
    assert_eq!((status.messages.overflowed, status.messages_waiting), (3, 5));
    assert!(world.decided(app, "drop", "5 messages were waiting"), "{:?}", world.why(app));
    world.spawn(app, "");
    world.expect(app, &["3", "4", "5", "6", "7"]);
}
