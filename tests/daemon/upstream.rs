//! The server's side: what it repeats, forgets, gets wrong, and how the way to it is secured.

use nightporter::view::{self, LinkState};
use serde_json::json;

use crate::support::{Authority, Behaviour, Client, Fake, Peer, Setup, World, wait};

const APP: &str = "org.example.App";
const ENDPOINT: &str = "https://push.example.org/wpush/1";

/// An app registered at a server played by the test.
fn registered(server: &Fake) -> (World, Client, Peer, String) {
    let url = server.url();
    let world = World::new(Setup { url: Some(&url), ..Setup::default() });
    let app = world.client(APP, Behaviour::Accept);
    let (peer, channel) = std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let mut peer = server.accept();
            assert_eq!(peer.hello("uaid-1"), None);
            let channel = peer.register(ENDPOINT);
            (peer, channel)
        });
        assert_eq!(app.endpoint("t"), ENDPOINT);
        serving.join().unwrap()
    });
    (world, app, peer, channel)
}

/// Registers an app at a server that answers from another thread.
fn register(app: &Client, serve: impl FnOnce() -> Peer + Send) -> ((String, String), Peer) {
    std::thread::scope(|scope| {
        let serving = scope.spawn(serve);
        let result = app.register("t");
        (result, serving.join().unwrap())
    })
}

#[test]
fn what_the_server_repeats_the_app_sees_once() {
    let server = Fake::start();
    let (mut world, app, mut peer, channel) = registered(&server);
    peer.notify(&channel, "v1", "one");
    assert_eq!(app.message(), "one");
    assert_eq!(peer.ack(), ["v1"]);
    // As if the acknowledgement had got lost: on the same connection, on the next one, in the daemon's next life.
    peer.notify(&channel, "v1", "one");
    assert_eq!(peer.ack(), ["v1"], "what is known is acknowledged again, or the server never stops");
    drop(peer);
    let mut peer = server.accept();
    assert_eq!(peer.hello("uaid-1").as_deref(), Some("uaid-1"));
    peer.notify(&channel, "v1", "one");
    assert_eq!(peer.ack(), ["v1"]);
    assert!(world.stop_daemon().success());
    world.start_daemon();
    let mut peer = server.accept();
    assert_eq!(peer.hello("uaid-1").as_deref(), Some("uaid-1"));
    peer.notify(&channel, "v1", "one");
    assert_eq!(peer.ack(), ["v1"]);
    assert!(app.hears_nothing());
    peer.notify(&channel, "v2", "two");
    assert_eq!(app.message(), "two");
    assert_eq!(peer.ack(), ["v2"]);
    let messages = world.status().messages;
    assert_eq!((messages.received, messages.duplicates), (1, 1), "of this life");
}

#[test]
fn nothing_is_acknowledged_that_is_neither_taken_nor_stored() {
    // The other half, that what is stored is acknowledged although the app says nothing.
    let server = Fake::start();
    let url = server.url();
    let world = World::new(Setup { url: Some(&url), ..Setup::default() });
    let app = world.client(APP, Behaviour::Silent);
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let mut peer = server.accept();
            peer.hello("uaid-1");
            let channel = peer.register(ENDPOINT);
            peer.notify(&channel, "v1", "one");
            assert_eq!(peer.ack(), ["v1"], "stored");
        });
        assert_eq!(app.register("t").0, "REGISTRATION_SUCCEEDED");
        serving.join().unwrap();
    });
    assert_eq!(world.show(APP).app.waiting, 1);
}

#[test]
fn a_message_for_nobody_is_acknowledged_and_its_channel_unregistered() {
    let server = Fake::start();
    let (world, app, mut peer, channel) = registered(&server);
    let unknown = "0f8fad5b-d9cb-469f-a165-70867728950e";
    peer.notify(unknown, "v9", "for whom?");
    let (mut acked, mut unregistered) = (false, false);
    while !(acked && unregistered) {
        let frame = peer.receive();
        match frame["messageType"].as_str().unwrap() {
            "ack" => {
                assert_eq!(frame["updates"][0]["channelID"], unknown);
                assert!(!unregistered, "first the message, then the channel");
                acked = true;
            }
            "unregister" => {
                assert_eq!(frame["channelID"], unknown);
                unregistered = true;
            }
            other => panic!("{other}"),
        }
    }
    peer.notify(&channel, "v1", "one");
    assert_eq!(app.message(), "one");
    assert_eq!(world.status().messages.received, 1);
}

#[test]
fn a_server_gone_mad_is_survived() {
    let server = Fake::start();
    let (mut world, app, mut peer, channel) = registered(&server);
    for nonsense in [
        "",
        "{",
        "null",
        "[]",
        "\"messageType\"",
        "{\"messageType\":7}",
        "{\"messageType\":\"dance\",\"steps\":3}",
        "{\"messageType\":\"notification\"}",
        "{\"messageType\":\"notification\",\"channelID\":[],\"version\":{},\"data\":1}",
        "{\"messageType\":\"register\",\"status\":\"yes\"}",
        "{\"messageType\":\"hello\",\"status\":1e99}",
        "{\"messageType\":\"ack\"}",
        "{}",
        &"[".repeat(20_000),
    ] {
        peer.send_text(nonsense);
    }
    let frame = |version: &str, data: &str| json!({ "messageType": "notification", "channelID": channel, "version": version, "data": data });
    // Not base64url, empty, and one byte too many: of no use to anybody, and done with.
    peer.send(&frame("bad", "%%%"));
    assert_eq!(peer.ack(), ["bad"]);
    peer.send(&frame("empty", ""));
    assert_eq!(peer.ack(), ["empty"]);
    peer.notify(&channel, "long", &"x".repeat(4097));
    assert_eq!(peer.ack(), ["long"]);
    peer.notify(&channel, "v1", &"x".repeat(4096));
    assert_eq!(app.message().len(), 4096);
    assert_eq!(peer.ack(), ["v1"]);
    assert_eq!(world.status().messages.unusable, 3);
    assert!(world.daemon_lives());

    // A frame beyond all bounds ends the connection, and nothing else.
    peer.send_text(&format!("{{\"messageType\":\"{}\"}}", "x".repeat(1 << 20)));
    assert!(peer.leaves(), "an oversized frame is not taken in");
    let mut peer = server.accept();
    assert_eq!(peer.hello("uaid-1").as_deref(), Some("uaid-1"));
    peer.notify(&channel, "v2", "two");
    assert_eq!(app.message(), "two");
    assert!(world.daemon_lives());
}

#[test]
fn a_server_that_forgot_everybody_gives_new_endpoints_that_work() {
    let mut world = World::new(Setup::default());
    let apps = ["org.example.A", "org.example.B", "org.example.C"];
    world.samples(&apps.map(|app| (app, "")));
    let before = apps.map(|app| world.endpoint(app));
    world.kill_relay();
    world.start_relay();
    for (app, before) in apps.into_iter().zip(&before) {
        wait("a new endpoint", || (world.endpoint(app) != *before).then_some(()));
        world.post(app, "at the new address");
        world.expect(app, &["at the new address"]);
        assert_eq!(world.endpoints_told(app), 2);
        assert!(world.relay().post(before, &[("TTL", "60")], b"at the old one").status >= 400);
    }
    assert_eq!(world.status().registrations, 3);
}

#[test]
fn an_app_that_was_away_is_told_its_new_endpoint() {
    let mut world = World::new(Setup::default());
    let app = world.client(APP, Behaviour::Accept);
    let before = app.endpoint("t");
    app.quit();
    wait("it to be gone", || (!world.is_owned(APP)).then_some(()));
    world.kill_relay();
    world.start_relay();
    let endpoint = wait("a new endpoint", || {
        let endpoint = world.ask::<Vec<view::Endpoint>>("Endpoints", Some(APP)).remove(0).endpoint;
        (endpoint != before).then_some(endpoint)
    });
    // It does not even register again.
    let app = world.client(APP, Behaviour::Accept);
    assert_eq!(app.call().endpoint.as_ref(), Some(&endpoint));
    world.post_to(&endpoint, &[("TTL", "600")], "hello again");
    assert_eq!(app.message(), "hello again");
}

#[test]
fn one_connection_carries_all_apps_and_comes_back_after_a_cut() {
    let world = World::new(Setup::default());
    let apps: Vec<Client> = (0..10).map(|n| world.client(&format!("org.example.App{n}"), Behaviour::Accept)).collect();
    let endpoints: Vec<String> = apps.iter().map(|app| app.endpoint("t")).collect();
    assert_eq!(world.front.seen(), 1);
    let address = world.relay().address.clone();
    world.front.cut();
    wait("the daemon to notice", || (world.status().upstreams[0].state != LinkState::Online).then_some(()));
    for endpoint in &endpoints {
        world.post_to(endpoint, &[("TTL", "600")], "while away");
    }
    world.front.lead_to(&address);
    for app in &apps {
        assert_eq!(app.message(), "while away");
    }
    assert_eq!(world.status().upstreams[0].state, LinkState::Online);
    assert!(apps.iter().all(Client::hears_nothing), "the endpoints are the same as before");
}

#[test]
fn over_tls_with_an_authority_of_ones_own() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new("The household");
    let upstream = format!("ca-file = \"{}\"", authority.write(dir.path()).display());
    let setup = Setup { upstream: &upstream, tls: Some(authority.server()), ..Setup::default() };
    let world = World::new(setup);
    assert!(world.front.url().starts_with("wss://"));
    world.samples(&[(APP, "")]);
    for text in ["one", "two"] {
        world.post(APP, text);
    }
    world.expect(APP, &["one", "two"]);
    assert!(world.endpoint(APP).starts_with("https://"));
}

#[test]
fn over_tls_with_an_authority_nobody_knows() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new("The household"), Authority::new("Somebody else"));
    let upstream = format!("ca-file = \"{}\"", ours.write(dir.path()).display());
    let mut world = World::new(Setup { upstream: &upstream, tls: Some(theirs.server()), ..Setup::default() });
    let app = world.client(APP, Behaviour::Accept);
    assert_eq!(app.register("t"), ("REGISTRATION_FAILED".to_owned(), "NETWORK".to_owned()));

    // With an app that is registered it is tried again and again.
    theirs.write(dir.path());
    let endpoint = app.endpoint("t");
    assert!(world.stop_daemon().success());
    ours.write(dir.path());
    world.start_daemon();
    let seen = world.front.seen();
    wait("it to be tried more than once", || (world.front.seen() >= seen + 2).then_some(()));
    let upstream = world.status().upstreams.remove(0);
    assert_ne!(upstream.state, LinkState::Online);
    let error = upstream.last_error.unwrap();
    assert!(error.contains("certificate") && error.contains("ca-file"), "{error}");
    let printed = String::from_utf8(world.cli(&["status"]).stdout).unwrap();
    assert!(printed.contains("certificate"), "{printed}");

    // Mended, it needs no restart.
    theirs.write(dir.path());
    world.post_to(&endpoint, &[("TTL", "600")], "trusted at last");
    assert_eq!(app.next_message(), "trusted at last");
}

#[test]
fn many_register_at_once_over_one_connection() {
    let world = World::new(Setup::default());
    let mut apps: Vec<Client> =
        (0..30).map(|n| world.client(&format!("org.example.App{n}"), Behaviour::Accept)).collect();
    let mut endpoints: Vec<String> = std::thread::scope(|scope| {
        let registering: Vec<_> = apps.iter_mut().map(|app| scope.spawn(move || app.endpoint("t"))).collect();
        registering.into_iter().map(|registering| registering.join().unwrap()).collect()
    });
    for (app, endpoint) in apps.iter().zip(&endpoints) {
        world.post_to(endpoint, &[("TTL", "600")], &app.service);
        assert_eq!(app.message(), app.service);
    }
    endpoints.sort();
    endpoints.dedup();
    assert_eq!((endpoints.len(), world.front.seen()), (30, 1));
    // Capability URLs are secrets.
    let log = world.log();
    assert!(!endpoints.iter().any(|endpoint| log.contains(endpoint.rsplit('/').next().unwrap())), "{log}");
}

#[test]
fn a_server_that_gives_the_device_up_is_registered_with_anew() {
    let server = Fake::start();
    let (world, app, peer, channel) = registered(&server);
    peer.close(1000, "SM");
    let mut peer = server.accept();
    assert_eq!(peer.hello("uaid-2").as_deref(), Some("uaid-1"), "the server knows by its name whom it has forgotten");
    let new = "https://push.example.org/wpush/2";
    let again = peer.register(new);
    assert_eq!(app.call().endpoint.as_deref(), Some(new));
    peer.notify(&again, "v1", "one");
    assert_eq!(app.message(), "one");
    assert_eq!(world.status().registrations, 1);
    drop((world, channel));
}

#[test]
fn a_token_goes_to_the_server_and_nowhere_else() {
    let server = Fake::start();
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "tk_first_secret\n").unwrap();
    let (url, upstream) = (server.url(), format!("token-file = \"{}\"", token.display()));
    let world = World::new(Setup { url: Some(&url), upstream: &upstream, ..Setup::default() });
    let app = world.client(APP, Behaviour::Accept);
    let (result, peer) = register(&app, || {
        let mut peer = server.accept();
        peer.hello("uaid-1");
        peer.register(ENDPOINT);
        peer
    });
    assert_eq!(result.0, "REGISTRATION_SUCCEEDED");
    assert_eq!(peer.authorization.as_deref(), Some("Bearer tk_first_secret"));
    // A new one needs no restart.
    std::fs::write(&token, "tk_second_secret\n").unwrap();
    drop(peer);
    assert_eq!(server.accept().authorization.as_deref(), Some("Bearer tk_second_secret"));
    let status = String::from_utf8(world.cli(&["status", "--json"]).stdout).unwrap();
    assert!(!(world.log() + &status).contains("secret"));
}

#[test]
fn a_server_that_refuses_the_credentials_wants_the_users_action() {
    let server = Fake::start();
    let url = server.url();
    let world = World::new(Setup { url: Some(&url), ..Setup::default() });
    let app = world.client(APP, Behaviour::Accept);
    std::thread::scope(|scope| {
        scope.spawn(|| server.refuse("401 Unauthorized"));
        assert_eq!(app.register("t"), ("REGISTRATION_FAILED".to_owned(), "ACTION_REQUIRED".to_owned()));
    });
    let troubles = world.status().troubles;
    assert!(troubles.iter().any(|trouble| trouble.contains("credentials")), "{troubles:?}");
}
