//! The rules of push.md §3c, one test each, against a server played by the test.

use std::collections::{BTreeMap, BTreeSet};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    action::HttpRequest,
    config::{NetworkSettings, UpstreamKind, UpstreamSettings},
    core::upstream::{Channel, IncomingBody, IncomingMessage, REGISTER_TIMEOUT, backoff::CROWD_LIMIT},
    event::LinkError,
    time::UnixTime,
};

const SECOND: Duration = Duration::from_secs(1);

struct World {
    session: Session,
    now: Now,
    seen: Vec<Output>,
}

impl World {
    fn new(device: Option<&str>, channels: Vec<Channel>) -> Self {
        let settings = UpstreamSettings::new("n", UpstreamKind::NextPush, "https://cloud/");
        let now = Now { boot: Instant::from_nanos(5_000_000_000_000), wall: UnixTime::from_secs(1_000_000) };
        let beginning = Beginning {
            settings: &settings,
            network: &NetworkSettings::default(),
            remembered: device.iter().map(|device| ("device".into(), (*device).into())).collect(),
            channels,
            seed: [7; 32],
            links: LinkIds::new(0),
        };
        let mut world = Self { session: Session::new(beginning, now), now, seen: Vec::new() };
        world.drain();
        world
    }

    fn drain(&mut self) {
        while let Some(output) = self.session.poll_output() {
            self.seen.push(output);
        }
        if let Some(at) = self.session.poll_timeout() {
            assert!(at > self.now.boot, "a deadline that is not in the future: {:?}", self.session);
        }
    }

    /// Everything put out since the last call.
    fn take(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.seen)
    }

    fn link(&mut self, link: LinkId, event: LinkEvent) {
        self.session.handle_link(link, event, self.now);
        self.drain();
    }

    fn say(&mut self, link: LinkId, kind: &str, data: Value) {
        self.link(link, LinkEvent::Bytes(format!("event: {kind}\ndata: {data}\n\n").into_bytes()));
    }

    fn message(&mut self, link: LinkId, token: &str, id: Option<&str>, body: &str) {
        let data = json!({"type": "message", "token": token, "message": BASE64_STANDARD.encode(body)});
        let id = id.map(|id| format!("id: {id}\n")).unwrap_or_default();
        self.link(link, LinkEvent::Bytes(format!("{id}event: message\ndata: {data}\n\n").into_bytes()));
    }

    fn answer(&mut self, ticket: HttpTicket, status: u16, body: Value) {
        let answer = HttpResponse { status, body: body.to_string(), retry_after: None };
        self.session.handle_http(ticket, Ok(answer), self.now);
        self.drain();
    }

    fn register(&mut self, n: u64) {
        self.session.register(RegistrationId(n), None, self.now);
        self.drain();
    }

    fn safe(&mut self, message: &IncomingMessage) {
        self.session.safe(message.registration, &message.id, self.now);
        self.drain();
    }

    /// Lets time pass, firing every deadline on its way.
    fn pass(&mut self, time: Duration) {
        let end = self.now.boot + time;
        while let Some(at) = self.session.poll_timeout().filter(|at| *at <= end) {
            self.now.boot = at;
            self.session.handle_timeout(self.now);
            self.drain();
        }
        self.now.boot = end;
    }

    /// Lets time pass until something is put out that `f` is after.
    fn until<T>(&mut self, f: impl Fn(&Output) -> Option<T>) -> T {
        for _ in 0..1000 {
            if let Some(at) = self.seen.iter().position(|output| f(output).is_some()) {
                return f(&self.seen.remove(at)).unwrap();
            }
            let at = self.session.poll_timeout().expect("nothing is due");
            self.pass(at.since(self.now.boot));
        }
        panic!("it does not come: {:?}", self.seen);
    }

    fn request(&mut self) -> (HttpTicket, HttpRequest) {
        self.until(|output| match output {
            Output::Http(ticket, request) => Some((*ticket, request.clone())),
            _ => None,
        })
    }

    fn connect(&mut self) -> (LinkId, String, Vec<(&'static str, String)>) {
        self.until(|output| match output {
            Output::Connect { link, path, headers } => Some((*link, path.clone(), headers.clone())),
            _ => None,
        })
    }

    fn online(&mut self) -> LinkId {
        let (link, ..) = self.connect();
        self.link(link, LinkEvent::Open);
        self.say(link, "start", json!({"type": "start"}));
        self.say(link, "keepalive", json!({"type": "keepalive", "keepalive": 50}));
        assert_eq!(self.state(), LinkState::Online);
        link
    }

    fn requests(&mut self) -> Vec<(HttpTicket, String)> {
        let request = |output| match output {
            Output::Http(ticket, request) => Some((ticket, format!("{} {}", request.method, request.path))),
            _ => None,
        };
        self.take().into_iter().filter_map(request).collect()
    }

    fn messages(&mut self) -> Vec<IncomingMessage> {
        let message = |output| match output {
            Output::Message(message) => Some(message),
            _ => None,
        };
        self.take().into_iter().filter_map(message).collect()
    }

    fn state(&self) -> LinkState {
        self.session.standing().state
    }
}

fn channel(n: u64) -> Channel {
    Channel {
        registration: RegistrationId(n),
        channel: format!("token-{n}").into(),
        vapid: None,
        endpoint: format!("https://cloud/push/token-{n}").into(),
    }
}

fn failures(outputs: &[Output]) -> Vec<(u64, FailureReason)> {
    let failure = |output: &Output| match output {
        Output::RegisterFailed { registration, reason, .. } => Some((registration.0, *reason)),
        _ => None,
    };
    outputs.iter().filter_map(failure).collect()
}

fn registered(outputs: &[Output]) -> Vec<(u64, String, String)> {
    let one = |output: &Output| match output {
        Output::Registered { registration, channel, endpoint } => {
            Some((registration.0, channel.to_string(), endpoint.to_string()))
        }
        _ => None,
    };
    outputs.iter().filter_map(one).collect()
}

fn failed_with(status: u16, body: &str) -> LinkEvent {
    LinkEvent::Failed(LinkError::Http { status, body: body.into(), retry_after: None })
}

#[test]
fn without_registrations_nothing_happens_and_nothing_is_due() {
    let mut world = World::new(Some("d1"), vec![]);
    world.session.handle_network(world.now);
    world.drain();
    assert_eq!(world.take(), []);
    assert_eq!(world.session.poll_timeout(), None);
    assert_eq!(world.state(), LinkState::Idle);
}

#[test]
fn the_first_registration_makes_a_device_connects_and_registers() {
    let mut world = World::new(None, vec![]);
    world.session.register(RegistrationId(1), Some("vapid".into()), world.now);
    world.drain();
    let (ticket, request) = world.request();
    assert_eq!((request.method, request.path.as_str()), ("PUT", "device/"));
    assert_eq!(world.state(), LinkState::Connecting);
    world.answer(ticket, 200, json!({"success": true, "deviceId": "d1"}));
    assert!(world.seen.contains(&Output::Remember { key: "device", value: "d1".into() }));
    let (link, path, headers) = world.connect();
    assert_eq!((path.as_str(), headers), ("device/d1", vec![("urgency", "very-low".to_owned())]));
    let (ticket, request) = world.request();
    assert_eq!((request.method, request.path.as_str()), ("PUT", "app/"));
    let body: Value = serde_json::from_str(&request.json.unwrap()).unwrap();
    assert_eq!(body, json!({"deviceId": "d1", "appName": "Night Porter 1", "vapid": "vapid"}));
    world.answer(ticket, 200, json!({"success": true, "token": "t1"}));
    assert_eq!(registered(&world.take()), [(1, "t1".into(), "https://cloud/push/t1".into())]);
    world.link(link, LinkEvent::Open);
    world.say(link, "start", json!({}));
    assert_eq!(world.state(), LinkState::Online);
    world.take();
    world.session.unregister(RegistrationId(1), world.now);
    world.drain();
    let outputs = world.take();
    assert!(
        matches!(&outputs[..], [Output::Close(id), Output::Http(ticket, request), Output::StateChanged(LinkState::Idle)]
        if *id == link && request.path == "app/t1" && request.method == "DELETE" && ticket.0 > 0)
    );
    let Output::Http(ticket, _) = outputs[1] else { unreachable!() };
    world.answer(ticket, 200, json!({"success": true}));
    assert_eq!(world.session.poll_timeout(), None);
}

#[test]
fn a_message_is_acknowledged_when_it_is_safe_and_not_before() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    world.message(link, "token-1", Some("m/7"), "hello");
    world.message(link, "token-1", Some("m8"), "again");
    let messages = world.messages();
    assert_eq!(messages[0].body, IncomingBody::Bytes(b"hello".as_slice().into()));
    assert!(messages[0].id.ends_with("-m/7"));
    assert_ne!(messages[0].id, messages[1].id);
    world.pass(10 * SECOND);
    assert_eq!(world.requests(), []);
    world.safe(&messages[1]);
    assert_eq!(world.requests()[0].1, "DELETE message/m8");
    world.safe(&messages[1]);
    assert_eq!(world.requests(), [], "once");
    world.safe(&messages[0]);
    assert_eq!(world.requests()[0].1, "DELETE message/m%2F7");
}

#[test]
fn an_acknowledgement_outlives_the_link_and_is_tried_again() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    world.message(link, "token-1", Some("m1"), "a");
    let messages = world.messages();
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    world.safe(&messages[0]);
    let (ticket, _) = world.requests()[0];
    world.answer(ticket, 503, json!({}));
    let (ticket, request) = world.request();
    assert_eq!(request.path, "message/m1");
    world.answer(ticket, 401, json!({"success": false}));
    world.take();
    world.pass(3600 * SECOND);
    assert_eq!(world.requests(), [], "gone is as good as deleted");
}

#[test]
fn messages_without_an_id_get_one_that_no_other_has() {
    let ids = |seed: u8| {
        let settings = UpstreamSettings::new("n", UpstreamKind::NextPush, "https://cloud/");
        let mut world = World::new(Some("d1"), vec![channel(1)]);
        let beginning = Beginning {
            settings: &settings,
            network: &NetworkSettings::default(),
            remembered: BTreeMap::from([("device".into(), "d1".into())]),
            channels: vec![channel(1)],
            seed: [seed; 32],
            links: LinkIds::new(0),
        };
        world.session = Session::new(beginning, world.now);
        let link = world.online();
        world.message(link, "token-1", None, "same");
        world.message(link, "token-1", None, "same");
        let messages = world.messages();
        for message in &messages {
            world.safe(message);
        }
        assert_eq!(world.requests(), [], "there is nothing to acknowledge");
        messages.into_iter().map(|message| message.id)
    };
    let all: BTreeSet<Arc<str>> = ids(1).chain(ids(2)).collect();
    assert_eq!(all.len(), 4);
}

#[test]
fn silence_is_judged_by_the_servers_own_interval() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    assert_eq!(world.session.standing().heartbeat, Some(Heartbeat { interval: 50 * SECOND, by_server: true }));
    for _ in 0..5 {
        world.pass(100 * SECOND);
        world.say(link, "ping", json!({"type": "ping"}));
    }
    assert_eq!(world.state(), LinkState::Online);
    world.take();
    world.pass(109 * SECOND);
    assert_eq!(world.take(), []);
    world.pass(SECOND);
    assert!(world.take().contains(&Output::Close(link)));
    assert_eq!(&*world.session.standing().last_error.unwrap(), "the server fell silent");
    // A server that says no interval has 300 s.
    let (link, ..) = world.connect();
    world.link(link, LinkEvent::Open);
    world.say(link, "start", json!({}));
    world.take();
    world.pass(659 * SECOND);
    assert_eq!(world.take(), []);
    world.pass(SECOND);
    assert!(world.take().contains(&Output::Close(link)));
}

#[test]
fn a_clean_end_of_the_stream_is_followed_by_another_stream() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    for _ in 0..3 {
        let link = world.online();
        world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
        assert_eq!(world.state(), LinkState::Waiting);
        assert!(world.session.standing().retry_at.is_some());
    }
    world.online();
}

#[test]
fn a_stream_that_a_proxy_holds_back_is_named_so() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let (link, ..) = world.connect();
    world.link(link, LinkEvent::Open);
    assert_eq!(world.state(), LinkState::Connecting);
    world.pass(CONNECT_TIMEOUT);
    assert!(world.take().contains(&Output::Close(link)));
    assert!(world.session.standing().last_error.unwrap().contains("proxy"));
}

#[test]
fn another_connection_is_not_fought_but_ones_own_former_one_is_no_other() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    world.pass(60 * SECOND);
    world.say(link, "close", json!({"type": "close"}));
    assert!(world.take().contains(&Output::Close(link)));
    assert!(world.session.standing().trouble.unwrap().contains("second machine"));
    let retry = world.session.standing().retry_at.unwrap().since(world.now.boot);
    assert!(retry >= 300 * SECOND, "{retry:?}");
    world.session.handle_network(world.now);
    world.register(2);
    assert_eq!(world.session.standing().retry_at.unwrap().since(world.now.boot), retry);
    // Right at the beginning it may be meant for the connection before; the second time it is not.
    let link = world.online();
    assert_eq!(world.session.standing().trouble, None);
    world.say(link, "close", json!({}));
    assert!(world.session.standing().retry_at.unwrap().since(world.now.boot) <= CROWD_LIMIT);
    let link = world.online();
    world.say(link, "close", json!({}));
    assert!(world.session.standing().retry_at.unwrap().since(world.now.boot) >= 300 * SECOND);
    // A link that lived in between proves that there is no other.
    let link = world.online();
    world.pass(20 * SECOND);
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    let link = world.online();
    world.say(link, "close", json!({}));
    assert!(world.session.standing().retry_at.unwrap().since(world.now.boot) < 300 * SECOND);
}

#[test]
fn a_registration_deleted_in_nextcloud_is_lost() {
    let mut world = World::new(Some("d1"), vec![channel(1), channel(2)]);
    let link = world.online();
    world.take();
    world.say(link, "deleteApp", json!({"type": "deleteApp", "token": "token-1", "message": ""}));
    world.say(link, "deleteApp", json!({"type": "deleteApp", "token": "token-9", "message": ""}));
    assert!(matches!(&world.take()[..], [Output::Lost { registration: RegistrationId(1), .. }]));
    assert_eq!(world.session.standing().registrations, 1);
}

#[test]
fn a_device_the_server_has_forgotten_is_made_anew_with_all_its_registrations() {
    let no = r#"{"success":false}"#;
    for (status, body, asks) in [(401, no, false), (404, no, false), (404, "<html>", true)] {
        let mut world = World::new(Some("d1"), vec![channel(1), channel(2)]);
        let (link, ..) = world.connect();
        world.link(link, failed_with(status, body));
        if asks {
            let (ticket, request) = world.request();
            assert_eq!((request.method, request.path.as_str()), ("GET", ""));
            world.answer(ticket, 200, json!({"success": true}));
        }
        let (ticket, request) = world.request();
        assert_eq!(request.path, "device/");
        world.take();
        world.answer(ticket, 200, json!({"success": true, "deviceId": "d2"}));
        assert!(world.seen.contains(&Output::Remember { key: "device", value: "?d2".into() }));
        let requests = world.requests();
        assert_eq!(requests.len(), 2);
        world.answer(requests[1].0, 200, json!({"success": true, "token": "n2"}));
        assert!(!world.seen.iter().any(|output| matches!(output, Output::RememberBehind { .. })));
        world.answer(requests[0].0, 200, json!({"success": true, "token": "n1"}));
        let outputs = world.take();
        assert_eq!(registered(&outputs).len(), 2);
        assert_eq!(outputs.last(), Some(&Output::RememberBehind { key: "device", value: "d2".into() }));
    }
}

#[test]
fn a_nextcloud_without_the_app_has_not_forgotten_the_device() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let (link, ..) = world.connect();
    world.link(link, failed_with(404, "<html>"));
    let (ticket, _) = world.request();
    world.answer(ticket, 404, json!("nothing here"));
    assert!(world.session.standing().last_error.unwrap().contains("no uppush"));
    let (_, path, _) = world.connect();
    assert_eq!(path, "device/d1");
}

#[test]
fn a_crash_while_registrations_are_made_anew_loses_none_of_them() {
    let mut world = World::new(Some("?d2"), vec![channel(1), channel(2)]);
    let requests = world.requests();
    assert_eq!(requests.len(), 2, "which of them the new device has was forgotten");
    world.answer(requests[0].0, 200, json!({"success": true, "token": "n1"}));
    world.answer(requests[1].0, 200, json!({"success": true, "token": "n2"}));
    let outputs = world.take();
    assert_eq!(registered(&outputs).len(), 2);
    let deleted: Vec<_> = outputs
        .iter()
        .filter_map(|output| match output {
            Output::Http(_, request) => Some(request.path.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(deleted, ["app/token-1", "app/token-2"], "they may be of the new device");
    assert!(outputs.contains(&Output::RememberBehind { key: "device", value: "d2".into() }));
}

#[test]
fn a_device_unknown_to_a_registration_is_made_anew_too() {
    let mut world = World::new(Some("d1"), vec![]);
    world.register(1);
    let link = world.online();
    let (ticket, _) = world.request();
    world.answer(ticket, 401, json!({"success": false}));
    assert!(world.seen.contains(&Output::Close(link)));
    let (ticket, request) = world.request();
    assert_eq!(request.path, "device/");
    world.take();
    world.answer(ticket, 200, json!({"success": true, "deviceId": "d2"}));
    assert!(world.seen.contains(&Output::Remember { key: "device", value: "d2".into() }), "nothing is made anew");
    let (ticket, _) = world.request();
    world.answer(ticket, 200, json!({"success": true, "token": "t"}));
    assert_eq!(registered(&world.take()).len(), 1);
}

#[test]
fn refused_credentials_need_the_user() {
    let mut world = World::new(None, vec![]);
    world.register(1);
    let (ticket, _) = world.request();
    world.answer(ticket, 401, json!({"message": "Current user is not logged in"}));
    assert_eq!(failures(&world.take()), [(1, FailureReason::ActionRequired)]);
    assert!(world.session.standing().trouble.unwrap().contains("credentials"));
    world.register(2);
    assert_eq!(failures(&world.take()), [(2, FailureReason::ActionRequired)], "at once");
    world.pass(TROUBLE_HOLDS);
    world.register(3);
    let (ticket, _) = world.request();
    world.answer(ticket, 200, json!({"success": true, "deviceId": "d"}));
    assert_eq!(world.session.standing().trouble, None);
    // With a device the registration itself may be refused.
    let (ticket, _) = world.request();
    world.answer(ticket, 403, json!({}));
    assert_eq!(failures(&world.take()), [(3, FailureReason::ActionRequired)]);
    assert!(world.session.standing().trouble.is_some());
}

#[test]
fn failures_of_registrations_have_their_reasons() {
    let cases = [
        (500, json!({}), FailureReason::Network),
        (429, json!({}), FailureReason::Network),
        (200, json!({"success": true}), FailureReason::InternalError),
        (200, json!({"success": false, "token": "t"}), FailureReason::InternalError),
        (200, json!({"success": true, "token": "a/b"}), FailureReason::InternalError),
        (400, json!({}), FailureReason::InternalError),
    ];
    for (status, body, reason) in cases {
        let mut world = World::new(Some("d1"), vec![channel(9)]);
        world.online();
        world.register(1);
        let started = world.now.boot;
        loop {
            let (tickets, failed) = (world.requests(), world.now.boot.since(started) >= REGISTER_TIMEOUT);
            if failed || tickets.is_empty() && status == 400 {
                break;
            }
            for (ticket, _) in tickets {
                world.answer(ticket, status, body.clone());
            }
            let failed = failures(&world.seen);
            if !failed.is_empty() {
                assert_eq!(failed, [(1, reason)], "{status} {body}");
                break;
            }
            world.pass(SECOND);
            let failed = failures(&world.seen);
            if !failed.is_empty() {
                assert_eq!(failed, [(1, reason)], "{status} {body}");
                assert!(world.now.boot.since(started) <= REGISTER_TIMEOUT);
                break;
            }
        }
        assert_eq!(world.session.standing().registrations, 1, "{status} {body}");
    }
}

#[test]
fn a_500_and_then_an_answer_is_a_registration() {
    let mut world = World::new(Some("d1"), vec![channel(9)]);
    world.online();
    world.register(1);
    let (ticket, _) = world.request();
    world.answer(ticket, 500, json!({}));
    let (ticket, _) = world.request();
    world.answer(ticket, 200, json!({"success": true, "token": "t"}));
    assert_eq!(registered(&world.take()).len(), 1);
}

#[test]
fn a_late_answer_is_undone() {
    let mut world = World::new(Some("d1"), vec![channel(9)]);
    world.online();
    world.register(1);
    let (ticket, _) = world.request();
    world.pass(REGISTER_TIMEOUT);
    assert_eq!(failures(&world.take()), [(1, FailureReason::Network)]);
    world.answer(ticket, 200, json!({"success": true, "token": "t"}));
    assert_eq!(world.requests()[0].1, "DELETE app/t");
}

#[test]
fn too_many_requests_are_put_off_as_long_as_the_server_wants() {
    let mut world = World::new(Some("d1"), vec![channel(1), Channel { channel: "".into(), ..channel(2) }]);
    let link = world.online();
    let (ticket, _) = world.request();
    let answer = HttpResponse { status: 429, body: String::new(), retry_after: Some(120 * SECOND) };
    world.session.handle_http(ticket, Ok(answer), world.now);
    world.drain();
    world.take();
    for _ in 0..11 {
        world.pass(10 * SECOND);
        world.say(link, "ping", json!({}));
    }
    assert_eq!(world.requests(), []);
    world.pass(60 * SECOND);
    assert_eq!(world.requests()[0].1, "PUT app/");
    // The same for the stream.
    world.link(link, LinkEvent::Failed(LinkError::Http { status: 429, body: String::new(), retry_after: None }));
    let retry = world.session.standing().retry_at.unwrap().since(world.now.boot);
    assert!(retry >= TOO_MANY, "{retry:?}");
}

const TOO_MANY: Duration = crate::core::upstream::rest::TOO_MANY_REQUESTS;

#[test]
fn a_message_for_nobody_is_acknowledged_and_its_registration_deleted() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    world.take();
    world.message(link, "token-7", Some("m1"), "x");
    world.message(link, "token-7", None, "x");
    world.message(link, "../evil", None, "x");
    let requests: Vec<_> = world.requests().into_iter().map(|(_, path)| path).collect();
    assert_eq!(requests, ["DELETE message/m1", "DELETE app/token-7"]);
}

#[test]
fn after_a_change_of_the_network_the_stream_has_ten_seconds() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    world.take();
    world.session.handle_network(world.now);
    world.pass(9 * SECOND);
    world.say(link, "ping", json!({}));
    world.pass(20 * SECOND);
    assert_eq!(world.take(), [], "it has proved itself");
    world.session.handle_network(world.now);
    world.pass(PROOF_TIMEOUT);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)));
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })), "at once: {outputs:?}");
}

#[test]
fn a_link_that_ends_while_it_is_in_doubt_is_made_anew_at_once() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    world.session.handle_network(world.now);
    world.take();
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    let outputs = world.take();
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })), "{outputs:?}");
}

#[test]
fn an_attempt_from_before_the_network_came_back_is_made_again() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let (link, ..) = world.connect();
    world.session.handle_network(world.now);
    world.drain();
    assert_eq!(world.take().iter().filter(|output| matches!(output, Output::Close(_))).count(), 0);
    world.pass(STALE_ATTEMPT);
    world.session.handle_network(world.now);
    world.drain();
    assert!(world.seen.contains(&Output::Close(link)));
    world.connect();
}

#[test]
fn another_urgency_makes_another_connection_when_that_matters() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    world.session.set_min_urgency(Urgency::High, world.now);
    let mut headers = Vec::new();
    let (link, ..) = {
        let connect = world.connect();
        headers.push(connect.2.clone());
        connect
    };
    world.link(link, LinkEvent::Open);
    world.say(link, "start", json!({}));
    world.take();
    // It was asked for before the urgency was known; the server is not known to look at it.
    world.pass(60 * SECOND);
    assert_eq!(world.take(), []);
    world.message(link, "token-1", Some("m1"), "x");
    assert!(world.take().contains(&Output::Close(link)), "now it is");
    let connected = world.now.boot;
    let link = world.online();
    world.session.set_min_urgency(Urgency::Low, world.now);
    world.session.set_min_urgency(Urgency::High, world.now);
    world.drain();
    world.take();
    world.pass(60 * SECOND);
    assert_eq!(world.take(), [], "back before its time");
    world.session.set_min_urgency(Urgency::Low, world.now);
    world.drain();
    assert!(world.take().contains(&Output::Close(link)), "lowered: there is something to fetch");
    let link = world.online();
    let again = world.now.boot;
    world.session.set_min_urgency(Urgency::VeryLow, world.now);
    world.drain();
    world.take();
    world.until(|output| matches!(output, Output::Close(id) if *id == link).then_some(()));
    assert!(world.now.boot.since(again) >= URGENCY_SPACING && again.since(connected) >= URGENCY_SPACING);
    let (_, _, headers) = world.connect();
    assert_eq!(headers, [("urgency", "very-low".to_owned())]);
}

#[test]
fn where_links_are_not_allowed_there_is_none() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    world.register(2);
    world.message(link, "token-1", Some("m1"), "x");
    let message = world.messages().remove(0);
    world.session.set_allowed(false, world.now);
    world.drain();
    assert_eq!(failures(&world.seen), [(2, FailureReason::Network)]);
    assert!(world.take().contains(&Output::Close(link)));
    assert_eq!(world.state(), LinkState::Off);
    world.register(3);
    assert_eq!(failures(&world.take()), [(3, FailureReason::Network)]);
    world.safe(&message);
    world.session.handle_network(world.now);
    world.drain();
    world.pass(3600 * SECOND);
    assert_eq!(world.take(), []);
    world.session.set_allowed(true, world.now);
    world.drain();
    assert_eq!(world.state(), LinkState::Connecting);
    assert!(world.requests().iter().any(|(_, path)| path == "DELETE message/m1"));
}

#[test]
fn a_restart_connects_at_once_to_get_everything_again() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    world.message(link, "token-1", Some("m1"), "x");
    let message = world.messages().remove(0);
    world.session.restart(world.now);
    world.drain();
    assert!(world.seen.contains(&Output::Close(link)));
    let link = world.online();
    world.message(link, "token-1", Some("m1"), "x");
    assert_eq!(world.messages()[0].id, message.id, "known by its id");
}

#[test]
fn too_many_unsafe_messages_end_the_link() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    for n in 0..UNSAFE_LIMIT {
        world.message(link, "token-1", Some(&n.to_string()), "x");
    }
    assert_eq!(world.state(), LinkState::Online);
    world.message(link, "token-1", Some("more"), "x");
    assert!(world.take().contains(&Output::Close(link)));
    assert_eq!(world.state(), LinkState::Waiting);
}

#[test]
fn an_event_too_large_is_acknowledged_or_it_would_come_for_ever() {
    let mut world = World::new(Some("d1"), vec![channel(1)]);
    let link = world.online();
    world.take();
    let body = "x".repeat(2 * EVENT_LIMIT);
    world.message(link, "token-1", Some("m1"), &body);
    assert_eq!(world.requests()[0].1, "DELETE message/m1");
    world.message(link, "token-1", Some("m2"), "next");
    assert_eq!(world.messages().len(), 1);
}

#[test]
fn a_changed_base_url_changes_the_endpoints_once_the_server_is_reached() {
    let old = Channel { endpoint: "https://old/push/token-1".into(), ..channel(1) };
    let mut world = World::new(Some("d1"), vec![old, channel(2)]);
    assert_eq!(registered(&world.seen), []);
    world.online();
    assert_eq!(registered(&world.take()), [(1, "token-1".into(), "https://cloud/push/token-1".into())]);
}

#[derive(Clone, Debug)]
enum Step {
    Register,
    Unregister(u64),
    Answer { which: usize, status: u16, success: bool },
    NoAnswer(usize),
    Open,
    Say { kind: usize, token: u64, id: Option<u8> },
    Bytes(Vec<u8>),
    End(usize),
    Safe(usize),
    Network,
    Allowed(bool),
    Urgency(usize),
    Restart,
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Register),
        1 => (0_u64..6).prop_map(Step::Unregister),
        8 => (any::<usize>(), prop::sample::select(vec![200_u16, 200, 200, 200, 400, 401, 404, 429, 500, 503]), any::<bool>())
            .prop_map(|(which, status, success)| Step::Answer { which, status, success }),
        1 => any::<usize>().prop_map(Step::NoAnswer),
        4 => Just(Step::Open),
        8 => (0_usize..7, 0_u64..8, prop::option::of(any::<u8>()))
            .prop_map(|(kind, token, id)| Step::Say { kind, token, id }),
        1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Step::Bytes),
        2 => (0_usize..6).prop_map(Step::End),
        5 => any::<usize>().prop_map(Step::Safe),
        1 => Just(Step::Network),
        1 => prop::sample::select(vec![true, true, false]).prop_map(Step::Allowed),
        1 => (0_usize..4).prop_map(Step::Urgency),
        1 => Just(Step::Restart),
        5 => prop::sample::select(vec![1_u64, 100, 3000, 11_000, 40_000, 700_000]).prop_map(Step::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Whatever the server and the core do: nothing is acknowledged before it is safe, every registration asked for is
    /// answered in time and once, there is one link at a time, and no deadline stays in the past.
    #[test]
    fn whatever_happens_the_rules_are_kept(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new(Some("d0"), vec![channel(0), channel(1)]);
        let mut live: BTreeSet<u64> = BTreeSet::from([0, 1]);
        let mut waiting: BTreeMap<u64, Instant> = BTreeMap::new();
        let (mut open, mut http, mut made) = (None, Vec::new(), 0);
        let mut tokens: BTreeMap<u64, Arc<str>> = (0..2).map(|n| (n, channel(n).channel)).collect();
        let (mut handed, mut may_ack) = (Vec::new(), BTreeSet::new());
        let (mut next, mut allowed) = (10, true);
        for step in std::iter::once(Step::Pass(0)).chain(steps) {
            match step {
                Step::Register => {
                    next += 1;
                    live.insert(next);
                    waiting.insert(next, world.now.boot + REGISTER_TIMEOUT);
                    world.register(next);
                }
                Step::Unregister(n) => {
                    if let Some(n) = live.iter().nth(n as usize).copied() {
                        live.remove(&n);
                        waiting.remove(&n);
                        // Whose messages nobody wants may be acknowledged.
                        may_ack.extend(handed.iter().filter(|m: &&IncomingMessage| m.registration.0 == n).map(server_id));
                        world.session.unregister(RegistrationId(n), world.now);
                        world.drain();
                    }
                }
                Step::Answer { which, status, success } if !http.is_empty() => {
                    let (ticket, path): (HttpTicket, String) = http.remove(which % http.len());
                    made += 1;
                    let body = match path.as_str() {
                        "device/" => json!({"success": success, "deviceId": format!("d{made}")}),
                        "app/" => json!({"success": success, "token": format!("n{made}")}),
                        _ => json!({"success": success}),
                    };
                    world.answer(ticket, status, body);
                }
                Step::NoAnswer(which) if !http.is_empty() => {
                    let (ticket, _) = http.remove(which % http.len());
                    world.session.handle_http(ticket, Err(HttpError::Failed("no".into())), world.now);
                    world.drain();
                }
                Step::Open => if let Some(link) = open { world.link(link, LinkEvent::Open) },
                Step::Say { kind, token, id } => if let Some(link) = open {
                    let name = tokens.values().nth(token as usize).cloned().unwrap_or_else(|| "stranger".into());
                    let id = id.map(|id| format!("m{id}"));
                    match kind {
                        0 => world.say(link, "start", json!({})),
                        1 => world.say(link, "close", json!({})),
                        2 => world.say(link, "keepalive", json!({"keepalive": token})),
                        3 => world.say(link, "deleteApp", json!({"token": &*name})),
                        _ => {
                            if !tokens.iter().any(|(n, token)| *token == name && live.contains(n)) {
                                may_ack.extend(id.clone());
                            }
                            world.message(link, &name, id.as_deref(), "x");
                        }
                    }
                },
                Step::Bytes(bytes) => if let Some(link) = open { world.link(link, LinkEvent::Bytes(bytes)) },
                Step::End(how) => if let Some(link) = open.take() {
                    let event = match how {
                        0 => LinkEvent::Closed { code: None, reason: String::new() },
                        1 => failed_with(401, r#"{"success":false}"#),
                        2 => failed_with(404, ""),
                        3 => failed_with(503, ""),
                        4 => failed_with(401, ""),
                        _ => LinkEvent::Failed(LinkError::Timeout),
                    };
                    world.link(link, event);
                },
                Step::Safe(which) if !handed.is_empty() => {
                    let message = handed.swap_remove(which % handed.len());
                    may_ack.insert(server_id(&message));
                    world.safe(&message);
                }
                Step::Network => {
                    world.session.handle_network(world.now);
                    world.drain();
                }
                Step::Allowed(to) => {
                    allowed = to;
                    world.session.set_allowed(to, world.now);
                    world.drain();
                }
                Step::Urgency(n) => {
                    let all = [Urgency::VeryLow, Urgency::Low, Urgency::Normal, Urgency::High];
                    world.session.set_min_urgency(all[n], world.now);
                    world.drain();
                }
                Step::Restart => {
                    world.session.restart(world.now);
                    world.drain();
                }
                Step::Pass(millis) => world.pass(Duration::from_millis(millis)),
                Step::Answer { .. } | Step::NoAnswer(_) | Step::Safe(_) => {}
            }
            for output in world.take() {
                match output {
                    Output::Connect { link, .. } => {
                        prop_assert!(open.is_none(), "two links");
                        prop_assert!(allowed);
                        open = Some(link);
                    }
                    Output::Close(link) => {
                        prop_assert_eq!(open.take(), Some(link));
                    }
                    Output::Http(ticket, request) => {
                        if let Some(id) = request.path.strip_prefix("message/") {
                            prop_assert!(may_ack.contains(id), "{} is acknowledged and not safe", id);
                        }
                        http.push((ticket, request.path));
                    }
                    Output::Message(message) => {
                        prop_assert!(live.contains(&message.registration.0));
                        handed.push(message);
                    }
                    Output::Registered { registration, channel, .. } => {
                        prop_assert!(live.contains(&registration.0));
                        waiting.remove(&registration.0);
                        tokens.insert(registration.0, channel);
                    }
                    Output::RegisterFailed { registration, .. } => {
                        prop_assert!(waiting.remove(&registration.0).is_some(), "answered twice, or never asked for");
                        live.remove(&registration.0);
                    }
                    Output::Lost { registration, .. } => {
                        prop_assert!(!waiting.contains_key(&registration.0));
                        prop_assert!(live.remove(&registration.0));
                    }
                    Output::Remember { .. } | Output::RememberBehind { .. } | Output::StateChanged(_) => {}
                    other => prop_assert!(false, "{other:?}"),
                }
            }
            for by in waiting.values() {
                prop_assert!(*by > world.now.boot, "an app waits for too long");
            }
            prop_assert_eq!(world.session.standing().registrations, live.len());
        }
    }
}

fn server_id(message: &IncomingMessage) -> String {
    message.id.split_once('-').unwrap().1.to_owned()
}
