//! Several upstreams on one daemon, and apps that move between them.

use crate::support::{Behaviour, Client, Relay, Setup, World, dict, of, wait};

const APP: &str = "org.example.App";
const TTL: &[(&str, &str)] = &[("TTL", "600")];

/// A daemon with the upstreams "home" and "other".
fn two_upstreams() -> (World, Relay) {
    let other = Relay::in_memory(&[]);
    let more = format!("[[upstream]]\nname = \"other\"\nkind = \"autopush\"\nurl = \"ws://{}/\"", other.address);
    (World::new(Setup { upstream: &more, ..Setup::default() }), other)
}

/// The endpoint the app is told next.
fn told(app: &Client) -> String {
    let call = app.call();
    assert_eq!(call.member, "NewEndpoint", "{call:?}");
    call.endpoint.unwrap()
}

fn upstream_of(world: &World) -> String {
    world.show(APP).registered[0].upstream.clone()
}

#[test]
fn a_moved_app_is_reached_along_both_ways() {
    let (mut world, other) = two_upstreams();
    let app = world.client(APP, Behaviour::Accept);
    let before = app.endpoint("t");
    assert!(!before.contains(&other.address));

    let output = world.cli(&["move", APP, "other"]);
    assert!(output.status.success(), "{}", of(&output));
    let after = told(&app);
    assert!(after.contains(&other.address), "{after}");
    assert_eq!(upstream_of(&world), "other");
    // Its server does not know yet.
    world.post_to(&before, TTL, "along the old way");
    assert_eq!(app.message(), "along the old way");
    assert_eq!(other.post(&after, TTL, b"along the new way").status, 201);
    assert_eq!(app.message(), "along the new way");

    // What the daemon has not heard the app's answer to comes again in its next life.
    wait("the app's answer", || (world.status().messages.accepted == 2).then_some(()));
    assert!(world.stop_daemon().success());
    world.start_daemon();
    world.post_to(&before, TTL, "still");
    assert_eq!(app.next_message(), "still");
    // And back: the old address is the good one again, and it is told so.
    let output = world.cli(&["move", "--all", "home"]);
    assert!(output.status.success(), "{}", of(&output));
    assert_eq!(told(&app), before);
    assert_eq!(other.post(&after, TTL, b"late").status, 201);
    assert_eq!(app.message(), "late");

    let output = world.cli(&["move", APP, "nowhere"]);
    assert!(!output.status.success());
    assert!(of(&output).contains("home, other"), "{}", of(&output));
}

#[test]
fn an_app_chooses_its_upstream_and_what_waits_moves_with_it() {
    let (world, other) = two_upstreams();
    let app = world.client(APP, Behaviour::Accept);
    let chosen = dict(&[("service", APP), ("token", "t"), ("org.nightporter.upstream", "other")]);
    assert_eq!(app.register_with(chosen), ("REGISTRATION_SUCCEEDED".into(), String::new()));
    let endpoint = told(&app);
    assert!(endpoint.contains(&other.address), "{endpoint}");
    assert_eq!(upstream_of(&world), "other");
    app.quit();
    assert_eq!(other.post(&endpoint, TTL, b"while it was away").status, 201);
    wait("the message", || (world.show(APP).app.waiting == 1).then_some(()));
    assert!(world.cli(&["move", APP, "home"]).status.success());
    wait("the move", || (upstream_of(&world) == "home").then_some(()));
    let app = world.client(APP, Behaviour::Accept);
    assert_eq!(app.next_message(), "while it was away");
    let unknown = dict(&[("service", APP), ("token", "u"), ("org.nightporter.upstream", "third")]);
    assert_eq!(app.register_with(unknown).1, "ACTION_REQUIRED");
}
