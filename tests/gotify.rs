//! The Gotify session against a stand-in server (`standins/gotify.rs` says which documents that follows), over real
//! sockets.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

mod standins {
    pub(crate) mod faults;
    pub(crate) mod gotify;
    pub(crate) mod http;
    pub(crate) mod pump;
}

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use nightporter::{
    config::{UpstreamKind, UpstreamSettings},
    core::upstream::{Channel, Output},
    model::{FailureReason, RegistrationId, Urgency},
    view::LinkState,
};
use serde_json::json;
use standins::{
    gotify::{Standin, TOKEN},
    http::Answer,
    pump::{Pump, body},
};

const SECOND: Duration = Duration::from_secs(1);

fn again(server: &Standin, channels: Vec<Channel>, remembered: HashMap<&'static str, String>, seed: u8) -> Pump {
    let settings = UpstreamSettings::new("g", UpstreamKind::Gotify, server.url());
    Pump::new(&settings, ("x-gotify-key", TOKEN), channels, remembered, seed)
}

fn offline(pump: &mut Pump) {
    pump.wait("the link's end", |pump| pump.session.standing().state != LinkState::Online);
}

fn token(channel: &str) -> &str {
    channel.split_once(':').unwrap().1
}

/// A session with registration 1, and its token.
fn connected(server: &Standin) -> (Pump, String) {
    let mut pump = again(server, vec![], HashMap::new(), 1);
    let (channel, endpoint) = pump.register(1);
    let token = token(&channel).to_owned();
    assert_eq!(endpoint, format!("{}UP?token={token}", server.url()));
    (pump, token)
}

#[test]
fn a_message_comes_and_is_deleted_when_it_is_safe() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    assert_eq!(server.publish(&token, "text, é".as_bytes()), 200);
    assert_eq!(server.publish("nobody", b"x"), 401);
    let message = pump.message();
    assert_eq!(body(&message), "text, é".as_bytes());
    assert_eq!(message.urgency, Some(Urgency::Normal), "the application's own");
    pump.run(Duration::from_millis(300));
    assert_eq!(server.stored(), 1, "not before");
    pump.session.safe(message.registration, &message.id, pump.now());
    pump.wait("the deletion", |_| server.stored() == 0);
}

#[test]
fn bytes_come_whole_through_a_proxy_that_encodes_them_and_only_through_that() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    let bytes: Vec<u8> = (0..=255).cycle().take(4096).collect();
    server.publish_encoded(&token, &bytes, 9);
    let message = pump.message();
    assert_eq!((body(&message), message.urgency), (bytes.clone(), Some(Urgency::High)));
    server.publish(&token, &bytes);
    assert_ne!(body(&pump.message()), bytes, "common-proxies makes text of it");
}

#[test]
fn a_backlog_comes_in_order_with_what_is_sent_meanwhile() {
    let server = Standin::start();
    let (mut pump, mine) = connected(&server);
    let other = server.other_application();
    for round in 0..2 {
        if round == 0 {
            server.cut()
        } else {
            server.end()
        }
        offline(&mut pump);
        for n in 0..450 {
            server.publish(&mine, format!("{n}").as_bytes());
            server.publish(&other, b"backup done");
        }
        let (mut bodies, mut ids) = (Vec::new(), BTreeSet::new());
        for n in 450..500 {
            server.publish(&mine, format!("{n}").as_bytes());
            pump.turn(Duration::from_millis(5));
        }
        while bodies.len() < 500 {
            let message = pump.message();
            assert!(ids.insert(message.id.clone()), "twice");
            bodies.push(String::from_utf8(body(&message)).unwrap());
            pump.session.safe(message.registration, &message.id, pump.now());
        }
        assert_eq!(bodies, (0..500).map(|n| n.to_string()).collect::<Vec<_>>());
        pump.wait("the deletions", |_| server.stored() == (round + 1) * 450);
    }
}

#[test]
fn what_was_not_safe_comes_again_with_the_same_id_also_to_another_life() {
    let server = Standin::start();
    let (mut pump, _) = connected(&server);
    let (channel, endpoint) = pump.register(2);
    for n in 0..20 {
        server.publish(token(&channel), format!("{n}").as_bytes());
    }
    let messages: Vec<_> = (0..20).map(|_| pump.message()).collect();
    for message in messages.iter().filter(|message| body(message) != b"7") {
        pump.session.safe(message.registration, &message.id, pump.now());
    }
    pump.wait("the deletions", |_| server.stored() == 1);
    server.cut();
    offline(&mut pump);
    assert_eq!(pump.message().id, messages[7].id);
    let channel = Channel {
        registration: RegistrationId(2),
        channel: channel.as_str().into(),
        vapid: None,
        endpoint: endpoint.as_str().into(),
    };
    let mut pump = again(&server, vec![channel], pump.remembered, 2);
    let message = pump.message();
    assert_eq!(message.id, messages[7].id);
    pump.session.safe(message.registration, &message.id, pump.now());
    pump.wait("the deletion", |_| server.stored() == 0);
}

#[test]
fn failing_pages_and_deletions_are_tried_again() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    server.cut();
    offline(&mut pump);
    server.publish(&token, b"stored");
    server.faults().order("GET message", Answer::status(503).with("Retry-After", "1"));
    server.faults().order("GET message", Answer::json(200, &json!({"messages": "none"})));
    server.faults().order("DELETE message", Answer::status(503));
    pump.wait("the first fault", |_| server.faults().left() < 3);
    server.publish(&token, b"live");
    assert_eq!([pump.take().1, pump.take().1], [b"stored".to_vec(), b"live".to_vec()]);
    pump.wait("the deletions", |_| server.stored() == 0);
    assert_eq!(server.faults().left(), 0);
}

#[test]
fn registrations_are_made_and_deleted_and_late_answers_undone() {
    let server = Standin::start();
    let (mut pump, _) = connected(&server);
    for n in 2..30 {
        pump.session.register(RegistrationId(n), None, pump.now());
    }
    for n in 2..30 {
        pump.registered(n);
    }
    assert_eq!(server.applications().len(), 29);
    server.faults().order("POST application", Answer::status(500));
    pump.register(30);
    server.faults().order("POST application", Answer::json(200, &json!({"id": 999, "token": "A"})).after(SECOND));
    pump.session.register(RegistrationId(31), None, pump.now());
    pump.skip(10 * SECOND);
    let reason = pump.until("the failure", |output| match output {
        Output::RegisterFailed { registration: RegistrationId(31), reason, .. } => Some(*reason),
        _ => None,
    });
    assert_eq!(reason, FailureReason::Network);
    pump.wait("the deletion", |_| server.requests().contains(&"DELETE application/999".to_owned()));
    for n in 1..=30 {
        pump.session.unregister(RegistrationId(n), pump.now());
    }
    pump.wait("their end", |_| server.applications().is_empty());
    assert_eq!(pump.session.standing().state, LinkState::Idle);
}

#[test]
fn a_deleted_application_and_a_server_made_anew_are_noticed() {
    let server = Standin::start();
    let (mut pump, _) = connected(&server);
    pump.register(2);
    server.delete_application(1);
    pump.skip(13 * 3600 * SECOND);
    let (channel, _) = pump.registered(1);
    server.publish(token(&channel), b"one");
    assert_eq!(pump.take(), (1, b"one".to_vec()));
    server.forget();
    offline(&mut pump);
    pump.skip(13 * 3600 * SECOND);
    pump.registered(1);
    let (channel, _) = pump.registered(2);
    server.publish(token(&channel), b"two");
    assert_eq!(pump.take(), (2, b"two".to_vec()));
}

#[test]
fn a_refused_token_needs_the_user_and_is_tried_again_once_mended() {
    let server = Standin::start();
    let mut pump = again(&server, vec![], HashMap::new(), 1);
    pump.set_credentials("Cwrong");
    pump.session.register(RegistrationId(1), None, pump.now());
    let reason = pump.until("the failure", |output| match output {
        Output::RegisterFailed { reason, .. } => Some(*reason),
        _ => None,
    });
    assert_eq!(reason, FailureReason::ActionRequired);
    assert!(pump.session.standing().trouble.unwrap().contains("client token"));
    pump.set_credentials(TOKEN);
    pump.skip(31 * SECOND);
    pump.register(2);
    assert_eq!(pump.session.standing().trouble, None);
}

#[test]
fn a_dead_link_is_found_by_silence_and_at_once_after_the_network_changed() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    pump.session.handle_network(pump.now());
    pump.run(SECOND);
    pump.skip(15 * SECOND);
    assert_eq!(server.connects(), 1, "it has answered");
    server.freeze();
    server.publish(&token, b"missed");
    pump.session.handle_network(pump.now());
    pump.skip(11 * SECOND);
    assert_eq!(pump.take().1, b"missed");
    assert_eq!(server.connects(), 2);
    server.freeze();
    server.publish(&token, b"missed again");
    pump.skip(101 * SECOND);
    assert_eq!(pump.take().1, b"missed again");
}

#[test]
fn garbage_does_no_harm() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    for text in
        ["", "{", "[]", "null", r#"{"id":-1}"#, r#"{"id":1,"appid":"x"}"#, r#"{"id":18446744073709551615,"appid":77}"#]
    {
        server.send(text);
    }
    server.publish(&token, b"after it");
    assert_eq!(pump.take().1, b"after it");
    server.cut();
    offline(&mut pump);
    server.publish(&token, b"and later");
    assert_eq!(pump.take().1, b"and later");
}
