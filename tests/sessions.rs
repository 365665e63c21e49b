//! One daemon for several users: it serves each one's session bus while that user is logged in, and keeps them apart. The
//! buses are real, under the users' own ids; only logind is played. Must run as root.
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
mod reports;
#[path = "surroundings/support.rs"]
#[expect(dead_code, reason = "made for the tests of the surroundings; shared")]
mod services;
#[path = "sessions/support.rs"]
mod support;

use std::{fs, io, thread, time::Duration};

use self::support::{Machine, wait};

/// dbus-daemon starts for users the system knows; these are on every Debian (base-passwd).
const ALICE: u32 = 5;
const BOB: u32 = 6;
const MALLORY: u32 = 9;
const VICTIM: u32 = 10;
const CHAT: &str = "org.example.Chat";

#[test]
fn users_are_served_by_one_daemon_and_kept_apart() {
    let mut machine = Machine::new();
    let [alice, bob] = [ALICE, BOB].map(|uid| machine.user(uid));
    for user in [alice, bob] {
        machine.at(user).install(CHAT, "");
    }
    // One is there before the daemon; the other comes, and her bus a little later.
    machine.at_mut(alice).start_bus();
    machine.log_in(alice);
    let address = machine.at(alice).address();
    let as_root = zbus::block_on(zbus::connection::Builder::address(address.as_str()).build());
    assert!(as_root.is_err(), "this bus lets root in, so nothing is proved here");
    machine.start_daemon();
    machine.wait_up(ALICE, 1);
    machine.log_in(bob);
    machine.wait_log("user 6 bus: cannot connect");
    machine.at_mut(bob).start_bus();
    machine.wait_up(BOB, 1);

    let [alices, bobs] = [alice, bob].map(|user| machine.at(user).launch(CHAT));
    assert_ne!(alices, bobs);
    machine.post(&alices, "for alice");
    wait("alice's message", || (machine.at(alice).bodies(CHAT) == ["for alice"]).then_some(()));
    machine.post(&bobs, "for bob");
    wait("bob's message", || (machine.at(bob).bodies(CHAT) == ["for bob"]).then_some(()));
    assert_eq!(machine.at(alice).bodies(CHAT), ["for alice"]);

    // The daemon's process is the same, and still root's alone.
    let status = fs::read_to_string(format!("/proc/{}/status", machine.daemon_pid())).unwrap();
    assert!(status.contains("Uid:\t0\t0\t0\t0\n"), "{status}");
    for task in fs::read_dir(format!("/proc/{}/task", machine.daemon_pid())).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains("Uid:\t0\t0\t0\t0\n"), "{status}");
    }
    // The app's process was taken into care as the user's own.
    wait("the app's process", || {
        let shown = machine.at(alice).manager("Show", &[&format!("string:{CHAT}")]).unwrap();
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        let pid = shown["app"]["pid"].as_u64().or_else(|| shown["pid"].as_u64())?;
        fs::read_to_string(format!("/proc/{pid}/status")).unwrap().contains("Uid:\t5\t").then_some(())
    });

    // What each sees and can do.
    for (user, other, endpoint) in [(alice, &bobs, &alices), (bob, &alices, &bobs)] {
        let user = machine.at(user);
        let status: serde_json::Value = serde_json::from_str(&user.manager("Status", &[]).unwrap()).unwrap();
        assert_eq!((&status["apps"], &status["registrations"]), (&1.into(), &1.into()), "{status}");
        assert_eq!(status["messages"]["received"], 1, "{status}");
        assert_eq!(status["buses"], serde_json::json!([format!("user {}", user.uid)]), "{status}");
        let endpoints = user.manager("Endpoints", &[&format!("string:{CHAT}")]).unwrap();
        assert!(endpoints.contains(endpoint.as_str()) && !endpoints.contains(other.as_str()), "{endpoints}");
    }
}

#[test]
fn a_message_waits_until_its_user_logs_in_again() {
    let mut machine = Machine::new();
    let [alice, bob] = [ALICE, BOB].map(|uid| machine.user(uid));
    for user in [alice, bob] {
        machine.at(user).install(CHAT, "");
        machine.at_mut(user).start_bus();
        machine.log_in(user);
    }
    machine.start_daemon();
    for uid in [ALICE, BOB] {
        machine.wait_up(uid, 1);
    }
    let [alices, bobs] = [alice, bob].map(|user| machine.at(user).launch(CHAT));
    machine.log_out(alice);
    machine.wait_log("user 5: logged out");
    machine.post(&alices, "while away");
    // The other one goes on, and this is behind that in the daemon.
    machine.post(&bobs, "meanwhile");
    wait("bob's message", || (machine.at(bob).bodies(CHAT) == ["meanwhile"]).then_some(()));
    assert!(machine.at(alice).bodies(CHAT).is_empty());
    assert_eq!(machine.count_log("a message is waiting for it"), 0, "nobody is started without a bus");

    machine.at(alice).make_runtime_dir();
    machine.at_mut(alice).start_bus();
    machine.log_in(alice);
    machine.wait_up(ALICE, 2);
    // Her app does not run in the new session; it is started for the message.
    wait("what waited", || (machine.at(alice).bodies(CHAT) == ["while away"]).then_some(()));
    assert_eq!(machine.at(bob).bodies(CHAT), ["meanwhile"]);

    // Her account is deleted.
    let forget = ["forget-user", "5"];
    assert!(!machine.cli(&forget).status.success(), "she is still logged in");
    machine.log_out(alice);
    wait("her logout", || (machine.count_log("user 5: logged out") == 2).then_some(()));
    let output = machine.cli(&forget);
    assert!(output.status.success(), "{output:?}");
    wait("her endpoint to be gone", || {
        (machine.relay.post(&alices, &[("TTL", "60")], b"x").status != 201).then_some(())
    });
    machine.post(&bobs, "as ever");
    wait("bob's message", || (machine.at(bob).bodies(CHAT) == ["meanwhile", "as ever"]).then_some(()));
}

#[test]
fn a_bus_killed_in_the_middle_of_a_delivery_loses_nothing() {
    let mut machine = Machine::new();
    let alice = machine.user(ALICE);
    machine.at(alice).install(CHAT, "never-reply");
    machine.at_mut(alice).start_bus();
    machine.log_in(alice);
    machine.start_daemon();
    machine.wait_up(ALICE, 1);
    let endpoint = machine.at(alice).launch(CHAT);
    machine.post(&endpoint, "in flight");
    wait("the call", || (machine.at(alice).bodies(CHAT) == ["in flight"]).then_some(()));
    machine.at_mut(alice).stop_bus();
    machine.wait_log("the user 5 bus is gone");
    machine.at(alice).install(CHAT, "");
    machine.at_mut(alice).start_bus();
    machine.wait_up(ALICE, 2);
    // It was not answered, so the next instance gets it, with the same id.
    wait("it to come again", || (machine.at(alice).bodies(CHAT) == ["in flight"; 2]).then_some(()));
    let seen = machine.at(alice).reports.seen(CHAT);
    assert_eq!(seen[0].id, seen[1].id);
    machine.post(&endpoint, "next");
    wait("the next", || (machine.at(alice).bodies(CHAT) == ["in flight", "in flight", "next"]).then_some(()));
}

#[test]
fn what_is_not_a_users_bus_harms_nobody() {
    let mut machine = Machine::new();
    let [mallory, victim, alice] = [MALLORY, VICTIM, ALICE].map(|uid| machine.user(uid));
    // One that takes the connection and never answers, and one that somebody else has put there.
    let silent = machine.at(mallory).pretend_bus(MALLORY);
    let foreign = machine.at(victim).pretend_bus(MALLORY);
    machine.log_in(mallory);
    machine.log_in(victim);
    machine.start_daemon();
    let mut held = Vec::new();
    wait("the silent bus to be tried", || silent.accept().ok().map(|(stream, _)| held.push(stream)));
    // While that one is waited for, another user is served.
    machine.at(alice).install(CHAT, "");
    machine.at_mut(alice).start_bus();
    machine.log_in(alice);
    machine.wait_up(ALICE, 1);
    let endpoint = machine.at(alice).launch(CHAT);
    machine.post(&endpoint, "all the same");
    wait("the message", || (machine.at(alice).bodies(CHAT) == ["all the same"]).then_some(()));
    machine.wait_log("user 9 bus: cannot connect: it does not answer");
    machine.wait_log("it belongs to user 9");
    // Tried again by now, and again not entered.
    thread::sleep(Duration::from_secs(2));
    assert_eq!(foreign.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(machine.count_log("user 10 bus: ready"), 0);
    // They leave, and nothing is left of them.
    machine.log_out(mallory);
    machine.wait_log("user 9: logged out");
    machine.post(&endpoint, "and on");
    wait("the next message", || (machine.at(alice).bodies(CHAT) == ["all the same", "and on"]).then_some(()));
}
