//! One daemon for several users: it serves each one's session bus while that user is logged in, and keeps them apart. The
//! buses are real, under the users' own ids; only logind is played. Must run as root.
#![cfg(all(feature = "cli", feature = "relay"))]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![expect(clippy::print_stderr, reason = "what a failing test wants to be known")]

#[path = "support/desk.rs"]
#[expect(dead_code, reason = "made for the tests of the buses; shared")]
mod desk;
#[path = "support/lease.rs"]
#[expect(dead_code, reason = "made for the tests of the daemon; shared")]
mod lease;
#[path = "support/polkit.rs"]
#[expect(dead_code, reason = "made for the tests of the bus thread; shared")]
mod polkit;
#[path = "support/processes.rs"]
#[expect(dead_code, reason = "made for the tests of the daemon; shared")]
mod processes;
#[path = "relay/harness.rs"]
#[expect(dead_code, reason = "made for the tests of the relay; shared")]
mod relay;
#[expect(dead_code, reason = "made for the tests of the daemon; shared")]
#[path = "support/reports.rs"]
mod reports;
#[path = "surroundings/support.rs"]
#[expect(dead_code, reason = "made for the tests of the surroundings; shared")]
mod services;
#[path = "sessions/stand_in.rs"]
mod stand_in;
#[path = "sessions/support.rs"]
mod support;

use std::{fs, io, thread, time::Duration};

use self::{
    lease::{Puppet, play},
    polkit::{Polkit, Says},
    support::{Machine, User, wait},
};

/// dbus-daemon starts for users the system knows; these are on every Debian (base-passwd).
const ALICE: u32 = 5;
const BOB: u32 = 6;
const MALLORY: u32 = 9;
const VICTIM: u32 = 10;
const CHAT: &str = "org.example.Chat";

/// Both logged in and served, with an app each, and `hers`.
fn alice_and_bob(hers: &[&str]) -> (Machine, [usize; 2]) {
    let mut machine = Machine::new();
    let users = [ALICE, BOB].map(|uid| machine.user(uid));
    hers.iter().for_each(|app| machine.at(users[0]).install(app, ""));
    for user in users {
        machine.at(user).install(CHAT, "");
        machine.at_mut(user).start_bus();
        machine.log_in(user);
    }
    machine.start_daemon();
    for uid in [ALICE, BOB] {
        machine.wait_up(uid, 1);
    }
    (machine, users)
}

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
/// Played by another test, as a process of a user's own; by itself it does nothing.
fn play_a_holder() {
    let Ok(bus) = std::env::var("PUPPET_BUS") else { return };
    let connection = zbus::block_on(zbus::connection::Builder::address(bus.as_str()).build()).unwrap();
    play(&connection);
}

#[test]
fn leases_pass_over_a_users_bus_and_stay_that_users() {
    let (machine, users) = alice_and_bob(&[]);
    for user in users {
        machine.at(user).launch(CHAT);
    }
    let [alice, bob] = users;
    let mut holder = Puppet::start(machine.at(alice).run_this(&["play_a_holder"], &[("PUPPET_SERVICE", CHAT)]));
    let held = |user: usize| -> serde_json::Value {
        serde_json::from_str(&machine.at(user).manager("Leases", &["string:"]).unwrap()).unwrap()
    };
    holder.tell("take");
    let id = holder.hear("taken");
    let listed = held(alice);
    assert_eq!((&listed[0]["app"], &listed[0]["bus"]), (&CHAT.into(), &"user 5".into()), "{listed}");
    assert_eq!(held(bob), serde_json::json!([]));
    let end = |user: usize, id: &str| machine.at(user).manager("EndLease", &[&format!("uint32:{id}")]);
    assert!(end(bob, &id).unwrap_err().contains("there is no lease"));
    end(alice, &id).unwrap();
    holder.tell("wait");
    holder.hear("over");
    // What is given back, and what its holder dies with.
    holder.tell("take");
    holder.hear("taken");
    holder.tell("close");
    wait("it to be given back", || (held(alice) == serde_json::json!([])).then_some(()));
    holder.tell("take");
    holder.hear("taken");
    assert_eq!(held(alice).as_array().map(Vec::len), Some(1));
    holder.kill();
    wait("it to be over", || (held(alice) == serde_json::json!([])).then_some(()));
    // Root sees them all, and takes away whose it likes.
    let mut holder = Puppet::start(machine.at(bob).run_this(&["play_a_holder"], &[("PUPPET_SERVICE", CHAT)]));
    holder.tell("take");
    let id = holder.hear("taken");
    let listed = machine.cli(&["leases"]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains("upload of 3 photos"), "{listed:?}");
    assert!(machine.cli(&["end-lease", &id]).status.success());
    holder.tell("wait");
    holder.hear("over");
    assert_eq!(machine.count_log("cannot connect"), 0);
}

#[test]
fn a_message_waits_until_its_user_logs_in_again() {
    let (mut machine, [alice, bob]) = alice_and_bob(&[]);
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

/// An app of the system's, run by root: it is registered and never answers.
struct Service {
    _connection: zbus::Connection,
}

const SERVICE: &str = "org.example.Camera";

fn system_service(machine: &Machine) -> Service {
    let address = machine.system_address();
    zbus::block_on(async {
        let connection = zbus::connection::Builder::address(address.as_str()).build().await.unwrap();
        connection.request_name(SERVICE).await.unwrap();
        let (name, path) = ("org.nightporter1", "/org/unifiedpush/Distributor");
        let arguments = (SERVICE, "camera-token", "");
        let distributor = Some("org.unifiedpush.Distributor1");
        connection.call_method(Some(name), path, distributor, "Register", &arguments).await.unwrap();
        Service { _connection: connection }
    })
}

/// Everything that can be asked of the manager about an app, and in general.
fn everything(app: &str) -> Vec<(&'static str, Vec<String>)> {
    let name = format!("string:{app}");
    let mut all: Vec<(&str, Vec<String>)> = ["Status", "Apps", "Report"].map(|method| (method, Vec::new())).into();
    for method in ["Show", "Why", "Endpoints", "Freeze", "Thaw", "Kill"] {
        all.push((method, vec![name.clone()]));
    }
    all.push(("Log", vec!["uint64:0".into()]));
    all.push(("Leases", vec!["string:".into()]));
    all.push(("Move", vec![name, "string:home".into()]));
    all
}

#[test]
fn nobody_is_shown_or_given_what_is_anothers() {
    const OWN: &str = "org.example.Diary";
    let (machine, [alice, bob]) = alice_and_bob(&[OWN]);
    let _service = system_service(&machine);
    let [chat, diary] = [CHAT, OWN].map(|app| machine.at(alice).launch(app));
    machine.at(bob).launch(CHAT);
    machine.post(&diary, "alice's secret");
    wait("her message", || (machine.at(alice).bodies(OWN) == ["alice's secret"]).then_some(()));
    // She ends it, which leaves a tombstone.
    machine.at(alice).manager("Kill", &[&format!("string:{OWN}")]).unwrap();
    wait("the tombstone", || machine.at(alice).manager("Apps", &[]).unwrap().contains("tombstone").then_some(()));

    let ask = |user: &User, address: &str, (method, arguments): &(&'static str, Vec<String>)| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        user.manager_at(address, method, &arguments)
    };
    let secrets = [OWN, &*chat, &*diary, "user 5", "alice's secret", SERVICE, "camera-token"];
    let keeps_quiet = |answer: &Result<String, String>, named: &str| {
        let (Ok(text) | Err(text)) = answer;
        for secret in secrets.iter().filter(|secret| **secret != named) {
            assert!(!text.contains(*secret), "{secret:?} is in {text}");
        }
    };
    // By another user, on that user's own bus.
    let user = machine.at(bob);
    for app in [CHAT, OWN, SERVICE] {
        for question in everything(app) {
            if app == CHAT && matches!(question.0, "Freeze" | "Kill" | "Thaw" | "Move") {
                continue;
            }
            let answer = ask(user, &user.address(), &question);
            keeps_quiet(&answer, app);
            if !question.1.iter().any(|argument| argument.contains(app)) {
                assert!(answer.is_ok(), "{question:?}: {answer:?}");
            } else if app != CHAT {
                // As of an app that does not exist.
                let nobody =
                    ("x", question.1.iter().map(|argument| argument.replace(app, "org.example.Nobody")).collect());
                let nobody = ask(user, &user.address(), &(question.0, nobody.1));
                assert_eq!(answer.unwrap_err().replace(app, "org.example.Nobody"), nobody.unwrap_err());
            }
        }
    }
    let status: serde_json::Value = serde_json::from_str(&user.manager("Status", &[]).unwrap()).unwrap();
    assert_eq!((&status["apps"], &status["messages"]["received"]), (&1.into(), &0.into()), "{status}");
    // Her bus does not let another user in.
    let refused = user.manager_at(&machine.at(alice).address(), "Status", &[]).unwrap_err();
    assert!(!refused.contains("apps"), "{refused}");

    // By users who are not root, on the system bus, where there is no polkit: of nobody's apps anything, their own
    // included, and nothing can be done.
    for user in [alice, bob].map(|user| machine.at(user)) {
        for app in [CHAT, OWN, SERVICE, "org.example.Nobody"] {
            for question in everything(app) {
                let answer = ask(user, &machine.system_address(), &question);
                keeps_quiet(&answer, app);
                match question.0 {
                    "Status" => {
                        let status: serde_json::Value = serde_json::from_str(&answer.unwrap()).unwrap();
                        assert_eq!(status["apps"], 1, "the system's own: {status}");
                        assert_eq!(status["messages"]["received"], 0, "{status}");
                    }
                    _ => assert!(answer.as_ref().unwrap_err().contains("administrators"), "{question:?}: {answer:?}"),
                }
            }
        }
        let forget = user.manager_at(&machine.system_address(), "ForgetUser", &["uint32:5"]);
        assert!(forget.unwrap_err().contains("administrators"));
    }
    // Root sees all of it.
    let root = String::from_utf8(machine.cli(&["apps", "--json"]).stdout).unwrap();
    for app in [CHAT, OWN, SERVICE] {
        assert!(root.contains(app), "{root}");
    }
}

#[test]
fn polkit_lets_a_user_do_on_the_system_bus_what_root_may() {
    let mut machine = Machine::new();
    let alice = machine.user(ALICE);
    machine.start_daemon();
    let _service = system_service(&machine);
    let run = |arguments: &[&str]| {
        let output = machine.cli_of(alice, arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    };
    let all: [&[&str]; 5] =
        [&["apps"], &["why", SERVICE], &["report"], &["move", SERVICE, "home"], &["forget-user", "9"]];
    for arguments in all {
        let (code, out, error) = run(arguments);
        assert_eq!((code, &*out), (77, ""), "{arguments:?}: {error}");
        assert!(error.contains("there is no polkit here to ask") && error.contains("sudo"), "{error}");
        assert!(error.contains("pkttyagent"), "{error}");
    }
    let polkit = Polkit::start(&machine.system_address(), Says::Challenge);
    for arguments in all {
        let (code, _, error) = run(arguments);
        assert_eq!(code, 77, "{error}");
        assert!(error.contains("no authentication agent"), "{error}");
    }
    while !polkit.was_left_alone() {}
    polkit.set(Says::YesTo("org.nightporter1.manage-apps"));
    // The list of all apps, by which short names are found, is not for this user; the app by its whole name is.
    let (code, _, error) = run(&["move", SERVICE, "home"]);
    assert_eq!(code, 0, "{error}");
    let [listing, moving] = [polkit.check(), polkit.check()];
    assert_eq!((&*listing.action, listing.flags), ("org.nightporter1.read", 0));
    assert_eq!((&*moving.action, moving.flags), ("org.nightporter1.manage-apps", 1));
    assert_eq!(moving.details.get("service").map(String::as_str), Some(SERVICE));
    assert_eq!(run(&["apps"]).0, 77);
    polkit.set(Says::Yes);
    for arguments in all {
        let (code, out, error) = run(arguments);
        assert_eq!(code, 0, "{arguments:?}: {out}{error}");
    }
    assert!(run(&["apps"]).1.contains(SERVICE));
}

#[test]
fn a_deleted_account_leaves_registrations_until_it_is_forgotten_and_the_daemon_in_peace() {
    let (mut machine, [alice, bob]) = alice_and_bob(&[]);
    let [alices, bobs] = [alice, bob].map(|user| machine.at(user).launch(CHAT));
    // `userdel -f` while she is logged in: the bus and the directory go, and logind says nothing.
    machine.at_mut(alice).stop_bus();
    fs::remove_dir_all(&machine.at(alice).runtime_dir).unwrap();
    machine.wait_log("the user 5 bus is gone");
    machine.post(&alices, "to nobody");
    machine.post(&bobs, "as ever");
    wait("bob's message", || (machine.at(bob).bodies(CHAT) == ["as ever"]).then_some(()));
    let (ticks, tries) = (machine.daemon_ticks(), machine.count_log("user 5 bus: cannot connect"));
    thread::sleep(Duration::from_secs(6));
    // Each second one at first, and fewer from then on.
    let tried = machine.count_log("user 5 bus: cannot connect") - tries;
    assert!(tried <= 4, "{tried} tries in 6 s");
    assert!(machine.daemon_ticks() - ticks < 100, "it spins");

    // After the next boot nobody knows her.
    machine.stop_daemon();
    machine.logind.forget(ALICE);
    machine.start_daemon_without_account(ALICE);
    machine.wait_up(BOB, 2);
    let apps = || String::from_utf8(machine.cli(&["apps", "--json"]).stdout).unwrap();
    assert!(apps().contains("user 5") && apps().contains("user 6"), "{}", apps());
    let status: serde_json::Value = serde_json::from_slice(&machine.cli(&["status", "--json"]).stdout).unwrap();
    assert_eq!((&status["registrations"], &status["messages_waiting"]), (&2.into(), &1.into()), "{status}");
    assert!(machine.cli(&["forget-user", "5"]).status.success());
    assert!(!apps().contains("user 5") && apps().contains("user 6"), "{}", apps());
    wait("her endpoint to be gone", || {
        (machine.relay.post(&alices, &[("TTL", "60")], b"x").status != 201).then_some(())
    });
    machine.post(&bobs, "still");
    wait("bob's message", || (machine.at(bob).bodies(CHAT) == ["as ever", "still"]).then_some(()));
}

#[test]
fn a_logind_that_does_not_answer_holds_up_nothing() {
    let mut machine = Machine::new();
    let alice = machine.user(ALICE);
    machine.at(alice).install(CHAT, "");
    machine.at_mut(alice).start_bus();
    machine.log_in(alice);
    machine.logind.be_silent(true);
    machine.start_daemon();
    // It serves those whom it can serve without.
    let _service = system_service(&machine);
    let apps = String::from_utf8(machine.cli(&["apps"]).stdout).unwrap();
    assert!(apps.contains(SERVICE), "{apps}");
    machine.wait_log("logind does not tell who is logged in; it is asked again");
    assert_eq!(machine.count_log("user 5 bus: ready"), 0);
    // It comes to itself, without a word, and without answering what it was asked before.
    machine.logind.be_silent(false);
    machine.wait_up(ALICE, 1);
    let endpoint = machine.at(alice).launch(CHAT);
    machine.post(&endpoint, "at last");
    wait("the message", || (machine.at(alice).bodies(CHAT) == ["at last"]).then_some(()));
    // It hangs again: what is known holds.
    machine.logind.be_silent(true);
    machine.post(&endpoint, "all the same");
    wait("the message", || (machine.at(alice).bodies(CHAT) == ["at last", "all the same"]).then_some(()));
}
