//! The NextPush session against a stand-in server (`standins/nextpush.rs` says which documents that follows), over real
//! sockets.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

mod standins {
    pub(crate) mod faults;
    pub(crate) mod http;
    pub(crate) mod nextpush;
    pub(crate) mod pump;
}

use std::{collections::HashMap, time::Duration};

use nightporter::{
    config::{UpstreamKind, UpstreamSettings},
    core::upstream::{Channel, Output},
    model::{FailureReason, RegistrationId, Urgency},
    view::LinkState,
};
use serde_json::json;
use standins::{
    http::Answer,
    nextpush::{AUTHORIZATION, Standin, Version},
    pump::{Pump, body},
};

const SECOND: Duration = Duration::from_secs(1);

fn pump(server: &Standin) -> Pump {
    again(server, vec![], HashMap::new(), 1)
}

fn again(server: &Standin, channels: Vec<Channel>, remembered: HashMap<&'static str, String>, seed: u8) -> Pump {
    let settings = UpstreamSettings::new("n", UpstreamKind::NextPush, server.url());
    Pump::new(&settings, ("authorization", AUTHORIZATION), channels, remembered, seed)
}

fn online(pump: &mut Pump) {
    pump.wait("a link", |pump| pump.session.standing().state == LinkState::Online);
}

fn offline(pump: &mut Pump) {
    pump.wait("the link's end", |pump| pump.session.standing().state != LinkState::Online);
}

/// A session with registration 1, online.
fn connected(server: &Standin) -> (Pump, String) {
    let mut pump = pump(server);
    let (token, endpoint) = pump.register(1);
    assert_eq!(endpoint, format!("{}push/{token}", server.url()));
    online(&mut pump);
    (pump, token)
}

#[test]
fn a_message_comes_and_is_acknowledged_when_it_is_safe() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    let bytes: Vec<u8> = (0..=255).cycle().take(4096).collect();
    assert_eq!(server.publish(&token, &bytes), 201);
    assert_eq!(server.publish("nobody", b"x"), 404);
    let message = pump.message();
    assert_eq!(body(&message), bytes);
    pump.run(Duration::from_millis(300));
    assert_eq!(server.stored(), 1, "not before");
    pump.session.safe(message.registration, &message.id, pump.now());
    pump.wait("the acknowledgement", |_| server.stored() == 0);
    assert_eq!(pump.session.standing().heartbeat.unwrap().interval, 50 * SECOND);
    assert_eq!(server.app(&token)["deviceId"], json!(server.devices()[0]));
}

#[test]
fn registrations_are_made_together_with_their_keys_and_deleted() {
    let server = Standin::start();
    let (mut pump, _) = connected(&server);
    for n in 2..30 {
        pump.session.register(RegistrationId(n), Some(format!("key-{n}").into()), pump.now());
    }
    for n in 2..30 {
        let (token, _) = pump.registered(n);
        assert_eq!(server.app(&token)["vapid"], json!(format!("key-{n}")));
    }
    assert_eq!(server.tokens().len(), 29);
    for n in 1..30 {
        pump.session.unregister(RegistrationId(n), pump.now());
    }
    pump.wait("their end", |_| server.tokens().is_empty());
    assert_eq!(pump.session.standing().state, LinkState::Idle);
    assert_eq!(server.devices().len(), 1, "the device is kept");
}

#[test]
fn what_is_sent_while_the_stream_is_gone_comes_with_the_next() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    for cut in [true, false, true, false] {
        let before = server.connects();
        if cut {
            server.cut()
        } else {
            server.end()
        }
        offline(&mut pump);
        for n in 0..10 {
            server.publish(&token, format!("{n}").as_bytes());
        }
        for n in 0..10 {
            assert_eq!(pump.take(), (1, format!("{n}").into_bytes()));
        }
        pump.wait("the acknowledgements", |_| server.stored() == 0);
        assert_eq!(server.connects(), before + 1);
    }
}

#[test]
fn what_was_not_safe_comes_again_with_the_same_id_also_to_another_life() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    server.publish(&token, b"one");
    let first = pump.message();
    server.cut();
    offline(&mut pump);
    assert_eq!(pump.message().id, first.id);
    let channel = Channel {
        registration: RegistrationId(1),
        channel: token.as_str().into(),
        vapid: None,
        endpoint: format!("{}push/{token}", server.url()).into(),
    };
    let mut pump = again(&server, vec![channel], pump.remembered, 2);
    assert_eq!(pump.message().id, first.id);
    pump.session.safe(first.registration, &first.id, pump.now());
    pump.wait("the acknowledgement", |_| server.stored() == 0);
    assert_eq!(server.devices().len(), 1);
}

#[test]
fn a_failed_acknowledgement_is_tried_again() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    server.faults().order("DELETE message/", Answer::status(500));
    server.publish(&token, b"one");
    pump.take();
    pump.wait("the fault", |_| server.faults().left() == 0);
    pump.wait("the acknowledgement", |_| server.stored() == 0);
}

#[test]
fn a_server_of_version_one_is_at_most_once_and_ids_are_never_alike() {
    let server = Standin::of(Version::One);
    let (mut pump, token) = connected(&server);
    server.publish(&token, b"same");
    server.publish(&token, b"same");
    let ids = [pump.message().id, pump.message().id];
    assert_ne!(ids[0], ids[1]);
    server.end();
    offline(&mut pump);
    server.publish(&token, b"later");
    assert_eq!(pump.take().1, b"later");
    assert!(!server.requests().iter().any(|request| request.starts_with("DELETE")), "nothing to acknowledge");
}

#[test]
fn a_forgotten_device_is_made_anew_with_all_its_registrations() {
    for version in [Version::One, Version::Two] {
        let server = Standin::of(version);
        let (mut pump, old) = connected(&server);
        pump.register(2);
        let device = pump.remembered["device"].clone();
        server.forget();
        let (token, endpoint) = pump.registered(1);
        pump.registered(2);
        assert_ne!(token, old);
        assert!(endpoint.ends_with(&token));
        online(&mut pump);
        pump.wait("the mark's end", |pump| !pump.remembered["device"].starts_with('?'));
        assert_ne!(pump.remembered["device"], device);
        server.publish(&token, b"to the new one");
        assert_eq!(pump.take(), (1, b"to the new one".to_vec()));
        assert_eq!(server.devices().len(), 1);
    }
}

#[test]
fn a_nextcloud_that_is_being_updated_has_not_forgotten_the_device() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    server.faults().order("GET device/", Answer::status(404));
    server.faults().order("GET ", Answer::status(404));
    server.end();
    offline(&mut pump);
    server.publish(&token, b"still there");
    assert_eq!(pump.take().1, b"still there");
    assert_eq!(server.faults().left(), 0);
}

#[test]
fn a_deleted_registration_is_lost() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    pump.register(2);
    server.delete_app(&token);
    pump.until("its loss", |output| {
        matches!(output, Output::Lost { registration: RegistrationId(1), .. }).then_some(())
    });
    assert_eq!(pump.session.standing().registrations, 1);
}

#[test]
fn another_connection_is_not_fought() {
    let server = Standin::start();
    let (mut pump, _) = connected(&server);
    pump.skip(15 * SECOND);
    let before = server.connects();
    server.take_over();
    offline(&mut pump);
    pump.wait("the trouble", |pump| pump.session.standing().trouble.is_some());
    pump.session.handle_network(pump.now());
    pump.run(3 * SECOND);
    assert_eq!(server.connects(), before + 1, "its own one is the last");
    pump.skip(600 * SECOND);
    online(&mut pump);
}

#[test]
fn slow_and_failing_answers() {
    let server = Standin::start();
    let mut pump = pump(&server);
    server.faults().order("PUT device/", Answer::status(503).with("Retry-After", "1"));
    pump.register(1);
    server.faults().order("PUT app/", Answer::status(500).after(Duration::from_millis(500)));
    pump.register(2);
    assert_eq!(server.faults().left(), 0);
    // An answer that comes after the app was told is undone.
    let known = server.tokens();
    server.faults().order("PUT app/", Answer::json(200, &json!({"success": true, "token": "late"})).after(SECOND));
    pump.session.register(RegistrationId(3), None, pump.now());
    pump.skip(10 * SECOND);
    let reason = pump.until("the failure", |output| match output {
        Output::RegisterFailed { registration: RegistrationId(3), reason, .. } => Some(*reason),
        _ => None,
    });
    assert_eq!(reason, FailureReason::Network);
    pump.wait("the deletion", |_| server.requests().contains(&"DELETE app/late".to_owned()));
    assert_eq!(server.tokens(), known);
}

#[test]
fn refused_credentials_need_the_user_and_are_tried_again_once_mended() {
    let server = Standin::start();
    let mut pump = pump(&server);
    pump.set_credentials("Basic d3Jvbmc=");
    pump.session.register(RegistrationId(1), None, pump.now());
    let reason = pump.until("the failure", |output| match output {
        Output::RegisterFailed { reason, .. } => Some(*reason),
        _ => None,
    });
    assert_eq!(reason, FailureReason::ActionRequired);
    assert!(pump.session.standing().trouble.unwrap().contains("credentials"));
    pump.set_credentials(AUTHORIZATION);
    pump.skip(31 * SECOND);
    pump.register(2);
    online(&mut pump);
    assert_eq!(pump.session.standing().trouble, None);
}

#[test]
fn a_stream_refused_with_429_is_left_alone_as_long_as_the_server_wants() {
    let server = Standin::start();
    let (mut pump, _) = connected(&server);
    server.faults().order("GET device/", Answer::status(429).with("Retry-After", "100"));
    server.end();
    pump.wait("the fault", |_| server.faults().left() == 0);
    pump.wait("the wait", |pump| pump.session.standing().retry_at.is_some());
    pump.session.handle_network(pump.now());
    let wait = pump.session.standing().retry_at.unwrap().since(pump.now().boot);
    assert!(wait > 80 * SECOND, "{wait:?}");
    pump.skip(120 * SECOND);
    online(&mut pump);
}

#[test]
fn garbage_and_warnings_do_no_harm() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    server.send(b"\xff\xfe\0\r\r\r: comment\r\ndata\r\n\r\n".to_vec());
    server.send("event: message\ndata: {\n\nevent: message\ndata: {\"token\":1}\n\n".repeat(100));
    server.send("event: keepalive\ndata: {\"keepalive\":-3}\n\nevent: warning\ndata: {}\n\n");
    server.send(format!("event: message\ndata: {}\n\n", "x".repeat(1_000_000)));
    server.publish(&token, b"after it");
    assert_eq!(pump.take().1, b"after it");
    assert_eq!(pump.session.standing().state, LinkState::Online);
}

#[test]
fn silence_is_noticed() {
    let server = Standin::start();
    server.set_keepalive(50);
    let (mut pump, token) = connected(&server);
    let before = server.connects();
    pump.skip(90 * SECOND);
    assert_eq!(pump.session.standing().state, LinkState::Online);
    pump.skip(25 * SECOND);
    offline(&mut pump);
    pump.skip(3 * SECOND);
    online(&mut pump);
    assert_eq!(server.connects(), before + 1);
    server.publish(&token, b"x");
    assert_eq!(pump.take().1, b"x");
}

#[test]
fn the_server_keeps_back_what_is_below_the_urgency() {
    let server = Standin::start();
    let (mut pump, token) = connected(&server);
    server.publish(&token, b"of version 2");
    pump.take();
    pump.session.set_min_urgency(Urgency::High, pump.now());
    pump.skip(31 * SECOND);
    pump.wait("the header", |_| server.urgency().as_deref() == Some("high"));
    online(&mut pump);
    let urgency = |value: &str| [("Urgency", value.to_owned())];
    server.publish_with(&token, b"low", &urgency("low"));
    server.publish_with(&token, b"high", &urgency("high"));
    assert_eq!(pump.take().1, b"high");
    pump.session.set_min_urgency(Urgency::VeryLow, pump.now());
    pump.skip(31 * SECOND);
    assert_eq!(pump.take().1, b"low");
}
