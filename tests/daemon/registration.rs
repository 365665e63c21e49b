//! From Register to Unregister, as the UnifiedPush specification has it.

use std::time::{Duration, Instant};

use crate::support::{Behaviour, Setup, World, dict, error_of, wait};

const OK: &str = "REGISTRATION_SUCCEEDED";
const FAILED: &str = "REGISTRATION_FAILED";
const APP: &str = "org.example.App";
const VAPID: &str = "BA1Hxzyi1RUM1b5wjxsn7nGxAszw2u61m164i3MrAIxHF6YK5h4SDYic-dRuU_RCPCfA5aq9ojSwk5Y2EmClBPs";

fn failed(reason: &str) -> (String, String) {
    (FAILED.to_owned(), reason.to_owned())
}

#[test]
fn version_2_from_register_to_message_and_acknowledgement() {
    let world = World::new(Setup::default());
    let app = world.client(APP, Behaviour::Accept);
    // A token as a library of old makes it.
    let token = "{8b3c2a44-0f5e-4d52-9f0a-1d4b6a8c2e11}";
    assert_eq!(app.register(token), (OK.to_owned(), String::new()));
    let told = app.call();
    assert_eq!((told.member.as_str(), told.token.as_deref()), ("NewEndpoint", Some(token)));
    assert_eq!(told.interface, "org.unifiedpush.Connector2");
    assert_eq!(told.path, "/org/unifiedpush/Connector");
    let endpoint = told.endpoint.unwrap();
    assert!(endpoint.starts_with(&world.front.public_url()), "{endpoint}");

    let location = world.post_to(&endpoint, &[("TTL", "600")], "hello");
    let message = app.call();
    assert_eq!((message.member.as_str(), message.text()), ("Message", "hello".to_owned()));
    assert_eq!(message.token.as_deref(), Some(token));
    let id = message.id.unwrap();
    assert!(!id.is_empty());
    let second = world.post_to(&endpoint, &[("TTL", "600")], "again");
    assert_ne!(app.call().id.unwrap(), id, "each message has an id of its own");
    wait("both to be counted", || (world.status().messages.accepted == 2).then_some(()));
    // What is acknowledged comes before what follows it on the same connection.
    assert_eq!(app.register("later").0, OK);
    assert!(world.is_acked(&location) && world.is_acked(&second));
}

#[test]
fn version_1_from_register_to_unregistered() {
    let world = World::new(Setup::default());
    let app = world.client(APP, Behaviour::Accept);
    assert_eq!(app.register_v1("t").0, OK);
    let told = app.call();
    assert_eq!((told.interface.as_str(), told.member.as_str()), ("org.unifiedpush.Connector1", "NewEndpoint"));
    let endpoint = told.endpoint.unwrap();
    world.post_to(&endpoint, &[("TTL", "600")], "one");
    let message = app.call();
    assert_eq!((message.interface.as_str(), message.member.as_str()), ("org.unifiedpush.Connector1", "Message"));
    assert_eq!((message.token.as_deref(), message.text()), (Some("t"), "one".to_owned()));
    assert!(!message.id.unwrap().is_empty());
    app.unregister_v1("t");
    let confirmed = app.call();
    assert_eq!((confirmed.member.as_str(), confirmed.token.as_deref()), ("Unregistered", Some("")));
    wait("the endpoint to go", || {
        (world.relay().post(&endpoint, &[("TTL", "600")], b"late").status == 410).then_some(())
    });
    assert!(app.hears_nothing());
}

#[test]
fn an_app_without_a_well_known_name() {
    let world = World::new(Setup::default());
    let app = world.nameless();
    assert!(app.service.starts_with(':'));
    let endpoint = app.endpoint("t");
    world.post_to(&endpoint, &[("TTL", "600")], "to a connection");
    assert_eq!(app.message(), "to a connection");
    app.quit();
    // The name will never come back, so nothing is kept for it.
    wait("the endpoint to go with the connection", || {
        (world.relay().post(&endpoint, &[("TTL", "600")], b"late").status == 410).then_some(())
    });
    assert_eq!(world.status().apps, 0);
}

#[test]
fn connectors_of_other_kinds_are_served_too() {
    let world = World::new(Setup::default());
    for (name, behaviour, path) in [
        ("org.example.AtRoot", Behaviour::OldPath, "/"),
        ("org.example.EmptyBody", Behaviour::EmptyBody, "/org/unifiedpush/Connector"),
        ("org.example.WrongBody", Behaviour::WrongBody, "/org/unifiedpush/Connector"),
    ] {
        let app = world.client(name, behaviour);
        assert_eq!(app.register("t").0, OK);
        let mut calls = std::iter::repeat_with(|| app.call()).filter(|call| call.path == path);
        let endpoint = calls.next().unwrap().endpoint.unwrap();
        for text in ["one", "two"] {
            world.post_to(&endpoint, &[("TTL", "600")], text);
            assert_eq!(calls.next().unwrap().text(), text, "{name}");
        }
        wait("both to be taken", || (world.show(name).app.waiting == 0).then_some(()));
        assert!(app.hears_nothing(), "{name} got something twice");
    }
    assert_eq!(world.status().messages.accepted, 6);
}

#[test]
fn a_known_token_gets_the_endpoint_it_has() {
    let mut world = World::new(Setup { lasting: true, ..Setup::default() });
    let app = world.client(APP, Behaviour::Accept);
    let endpoint = app.endpoint("t");
    assert_eq!(app.endpoint("t"), endpoint);
    assert_ne!(app.endpoint("another"), endpoint);
    app.quit();
    // Also by another instance, and by another life of the daemon.
    let app = world.client(APP, Behaviour::Accept);
    assert_eq!(app.endpoint("t"), endpoint);
    assert!(world.stop_daemon().success());
    world.start_daemon();
    assert_eq!(app.endpoint("t"), endpoint);
    world.post_to(&endpoint, &[("TTL", "600")], "still good");
    assert_eq!(app.next_message(), "still good");
    assert_eq!(world.status().registrations, 2);
}

#[test]
fn unregister_ends_it_everywhere() {
    let world = World::new(Setup::default());
    let app = world.client(APP, Behaviour::Accept);
    let (endpoint, other) = (app.endpoint("t"), app.endpoint("other"));
    app.unregister("t");
    let confirmed = app.call();
    assert_eq!((confirmed.member.as_str(), confirmed.token.as_deref()), ("Unregistered", Some("t")));
    wait("the endpoint to go", || {
        (world.relay().post(&endpoint, &[("TTL", "600")], b"late").status == 410).then_some(())
    });
    world.post_to(&other, &[("TTL", "600")], "the other lives");
    assert_eq!(app.message(), "the other lives");
    assert_eq!(world.status().registrations, 1);
    // An app can unregister nothing of another app.
    let stranger = world.client("org.example.Stranger", Behaviour::Accept);
    stranger.unregister("other");
    assert!(app.hears_nothing());
    assert_eq!(world.status().registrations, 1);
}

#[test]
fn bytes_arrive_as_they_were_sent() {
    let world = World::new(Setup::default());
    let (new, old) = (world.client(APP, Behaviour::Accept), world.client("org.example.Old", Behaviour::Accept));
    assert_eq!(old.register_v1("t").0, OK);
    // Encrypted, as all messages of apps are: any byte, up to the most there may be.
    let longest: Vec<u8> = (0..4096_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (app, endpoint) in [(&new, new.endpoint("t")), (&old, old.call().endpoint.unwrap())] {
        for body in [&[0][..], &[0xff, 0xfe, 0, b'\n'], &longest] {
            let response = world.relay().post(&endpoint, &[("TTL", "600"), ("Content-Encoding", "aes128gcm")], body);
            assert_eq!(response.status, 201);
            assert_eq!(app.call().message.as_deref(), Some(body));
        }
    }
}

#[test]
fn only_names_of_its_own() {
    let world = World::new(Setup::default());
    let app = world.client(APP, Behaviour::Accept);
    let stranger = world.client("org.example.Stranger", Behaviour::Accept);
    let foreign = |token| stranger.register_with(dict(&[("service", APP), ("token", token)]));
    assert_eq!(foreign("t"), failed("UNAUTHORIZED"));
    let endpoint = app.endpoint("t");
    assert_eq!(foreign("t"), failed("UNAUTHORIZED"));
    assert_eq!(foreign("mine"), failed("UNAUTHORIZED"));
    let nobody = stranger.register_with(dict(&[("service", "org.example.Nobody"), ("token", "t")]));
    assert_eq!(nobody, failed("UNAUTHORIZED"));
    assert!(stranger.hears_nothing() && app.hears_nothing());
    assert_eq!(app.endpoint("t"), endpoint);
    assert_eq!(world.status().registrations, 1);
}

#[test]
fn what_is_too_much_wants_action() {
    let limits = "registrations = 3\nregistrations-per-app = 2\n";
    let world = World::new(Setup { limits, ..Setup::default() });
    let app = world.client(APP, Behaviour::Accept);
    app.endpoint("1");
    app.endpoint("2");
    assert_eq!(app.register("3"), failed("ACTION_REQUIRED"));
    assert_eq!(app.register("1").0, OK, "what is known needs no room");
    let other = world.client("org.example.Other", Behaviour::Accept);
    other.endpoint("1");
    assert_eq!(other.register("2"), failed("ACTION_REQUIRED"));
    other.unregister("1");
    assert_eq!(other.call().member, "Unregistered");
    other.endpoint("2");
}

#[test]
fn a_server_may_want_vapid() {
    let world = World::new(Setup { upstream: "require-vapid = true", ..Setup::default() });
    let app = world.client(APP, Behaviour::Accept);
    assert_eq!(app.register("t"), failed("VAPID_REQUIRED"));
    assert_eq!(app.register_v1("t").0, FAILED);
    let with_key = dict(&[("service", APP), ("token", "t"), ("vapid", VAPID)]);
    assert_eq!(app.register_with(with_key).0, OK);
    let endpoint = app.call().endpoint.unwrap();
    // The key has come to the server: who does not sign is turned away.
    assert_eq!(world.relay().post(&endpoint, &[("TTL", "600")], b"unsigned").status, 401);
}

#[test]
fn without_a_server_an_app_is_told_in_time_and_can_try_again() {
    let world = World::new(Setup::default());
    let address = world.relay().address.clone();
    world.front.cut();
    let app = world.client(APP, Behaviour::Accept);
    let began = Instant::now();
    assert_eq!(app.register("t"), failed("NETWORK"));
    let took = began.elapsed();
    assert!(took < Duration::from_secs(12), "{took:?}");
    assert_eq!(world.status().registrations, 0);
    world.front.lead_to(&address);
    let endpoint = app.endpoint("t");
    world.post_to(&endpoint, &[("TTL", "600")], "here at last");
    assert_eq!(app.message(), "here at last");
}

#[test]
fn bad_arguments_are_named_and_harm_nobody() {
    let mut world = World::new(Setup::default());
    let app = world.client(APP, Behaviour::Accept);
    let v2 = "org.unifiedpush.Distributor2";
    let long = "t".repeat(101);
    let mut wrong = dict(&[("service", APP)]);
    wrong.insert("token", zbus::Variant::from(7_u32));
    for (arguments, word) in [
        (dict(&[("service", APP), ("token", &long)]), "token"),
        (dict(&[("service", APP), ("token", "")]), "token"),
        (wrong, "token"),
        (dict(&[("service", APP)]), "token"),
        (dict(&[("token", "t")]), "service"),
        (dict(&[("service", "not a name"), ("token", "t")]), "name"),
        (dict(&[("service", APP), ("token", "t"), ("description", &long)]), "description"),
        (dict(&[("service", APP), ("token", "t"), ("vapid", "x")]), "vapid"),
    ] {
        let (name, text) = error_of(app.distributor(v2, "Register", &arguments));
        assert_eq!(name, "org.freedesktop.DBus.Error.InvalidArgs");
        assert!(text.to_lowercase().contains(word), "{arguments:?}: {text}");
    }
    assert!(app.distributor(v2, "Register", &(1_u8, "x")).is_err());
    assert!(app.distributor(v2, "Nonsense", &()).is_err());
    assert_eq!(world.status().registrations, 0);
    assert!(world.daemon_lives());
    app.endpoint(&"t".repeat(100));
}

#[test]
fn an_app_that_calls_without_end_stops_nobody() {
    let mut world = World::new(Setup::default());
    let innocent = world.client(APP, Behaviour::Accept);
    let endpoint = innocent.endpoint("t");
    let mad = world.client("org.example.Mad", Behaviour::Silent);
    for n in 0..3000 {
        mad.send("Register", &dict(&[("service", "org.example.Mad"), ("token", &format!("token {n}"))]));
    }
    let began = Instant::now();
    world.post_to(&endpoint, &[("TTL", "600")], "undisturbed");
    assert_eq!(innocent.message(), "undisturbed");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(innocent.register("another").0, OK);
    // When it is calm again it is served again, within its bounds.
    let registered = |world: &World| world.show("org.example.Mad").app.registrations;
    let (result, reason) = mad.register("the last");
    assert!(result == OK || reason == "ACTION_REQUIRED", "{result} {reason}");
    assert!((1..=64).contains(&registered(&world)), "{}", registered(&world));
    assert!(world.daemon_lives());
}
