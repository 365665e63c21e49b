//! The rules of push.md §3a, one test each, against a server played by the test.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    super::{DOUBT, IncomingBody, IncomingMessage, PROOF_TIMEOUT},
    *,
};
use crate::{event::LinkError, model::Urgency, time::UnixTime};

const SECOND: Duration = Duration::from_secs(1);

struct World {
    session: Session,
    now: Now,
    seen: Vec<Output>,
}

impl World {
    fn new(uaid: Option<&str>, channels: Vec<Channel>) -> Self {
        let now = Now { boot: Instant::from_nanos(5_000_000_000_000), wall: UnixTime::from_secs(1_000_000) };
        let session = Session::new(uaid.map(Arc::from), channels, [7; 32], LinkIds::new(0), now);
        let mut world = Self { session, now, seen: Vec::new() };
        world.drain();
        world
    }

    fn drain(&mut self) {
        while let Some(output) = self.session.poll_output() {
            self.seen.push(output);
        }
    }

    /// Everything put out since the last call.
    fn take(&mut self) -> Vec<Output> {
        self.drain();
        std::mem::take(&mut self.seen)
    }

    fn link(&mut self, link: LinkId, event: LinkEvent) {
        self.session.handle_link(link, event, self.now);
        self.drain();
    }

    fn say(&mut self, link: LinkId, frame: Value) {
        self.link(link, LinkEvent::Text(frame.to_string()));
    }

    fn register(&mut self, n: u64) {
        self.session.register(RegistrationId(n), None, self.now);
        self.drain();
    }

    fn unregister(&mut self, n: u64) {
        self.session.unregister(RegistrationId(n), self.now);
        self.drain();
    }

    fn safe(&mut self, n: u64, id: &str) {
        self.session.safe(RegistrationId(n), &id.into(), self.now);
    }

    /// Lets time pass, firing every deadline on its way.
    fn pass(&mut self, time: Duration) {
        let end = self.now.boot + time;
        while let Some(at) = self.session.poll_timeout().filter(|at| *at <= end) {
            assert!(at >= self.now.boot, "a deadline in the past");
            self.now.boot = at;
            self.session.handle_timeout(self.now);
            self.drain();
            assert!(self.session.poll_timeout().is_none_or(|next| next > at), "a deadline that is not cleared");
        }
        self.now.boot = end;
    }

    /// Lets time pass until a link is asked for.
    fn connect(&mut self) -> LinkId {
        for _ in 0..1000 {
            let asked = self.seen.iter().rposition(|output| matches!(output, Output::Connect { .. }));
            if let Some(at) = asked {
                let Output::Connect { link, path, .. } = self.seen.remove(at) else { unreachable!() };
                assert_eq!(path, "");
                return link;
            }
            let at = self.session.poll_timeout().expect("nothing is due");
            self.pass(at.since(self.now.boot));
        }
        panic!("no link is asked for");
    }

    fn online(&mut self) -> LinkId {
        let link = self.connect();
        self.link(link, LinkEvent::Open);
        self.say(link, json!({"messageType": "hello", "uaid": "u1", "status": 200, "use_webpush": true}));
        link
    }

    /// The frames sent since the last call; other outputs are dropped.
    fn sent(&mut self) -> Vec<Value> {
        let sent = |output| match output {
            Output::Send(_, text) => Some(serde_json::from_str(&text).unwrap()),
            _ => None,
        };
        self.take().into_iter().filter_map(sent).collect()
    }

    fn state(&self) -> LinkState {
        self.session.standing().state
    }
}

fn channel(n: u64) -> Channel {
    Channel {
        registration: RegistrationId(n),
        channel: format!("channel-{n}").into(),
        vapid: None,
        endpoint: format!("https://push/{n}").into(),
    }
}

fn hello(uaid: &str) -> Value {
    json!({"messageType": "hello", "uaid": uaid, "status": 200, "use_webpush": true})
}

fn register_reply(channel: &Value, status: u16) -> Value {
    json!({"messageType": "register", "channelID": channel, "status": status,
           "pushEndpoint": format!("https://push/new/{}", channel.as_str().unwrap())})
}

fn notification(channel: &str, version: &str) -> Value {
    json!({"messageType": "notification", "channelID": channel, "version": version, "data": "aGk"})
}

fn failures(outputs: &[Output]) -> Vec<(u64, FailureReason)> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::RegisterFailed { registration, reason, .. } => Some((registration.0, *reason)),
            _ => None,
        })
        .collect()
}

fn registered(outputs: &[Output]) -> Vec<u64> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Registered { registration, .. } => Some(registration.0),
            _ => None,
        })
        .collect()
}

#[test]
fn without_registrations_nothing_happens_and_nothing_is_due() {
    let mut world = World::new(Some("u1"), vec![]);
    world.session.handle_network(world.now);
    assert_eq!(world.take(), []);
    assert_eq!(world.session.poll_timeout(), None);
    assert_eq!(world.state(), LinkState::Idle);
}

#[test]
fn the_first_registration_connects_and_the_last_to_leave_disconnects() {
    let mut world = World::new(None, vec![]);
    world.register(1);
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    assert_eq!(world.sent(), [json!({"messageType": "hello", "use_webpush": true})]);
    world.say(link, json!({"messageType": "hello", "uaid": "u1", "status": 200}));
    let outputs = world.take();
    assert!(outputs.contains(&Output::Remember { key: "uaid", value: "u1".into() }));
    let Some(Output::Send(_, request)) = outputs.iter().find(|o| matches!(o, Output::Send(..))) else { panic!() };
    let request: Value = serde_json::from_str(request).unwrap();
    let name = request["channelID"].as_str().unwrap();
    assert_eq!(uuid::Uuid::try_parse(name).unwrap().get_version_num(), 4);
    assert_eq!((name.len(), name.to_lowercase()), (36, name.to_owned()));
    world.say(link, register_reply(&request["channelID"], 200));
    assert_eq!(registered(&world.take()), [1]);
    world.unregister(1);
    let outputs = world.take();
    let Some(Output::Send(_, text)) = outputs.first() else { panic!("{outputs:?}") };
    assert!(text.contains("unregister") && text.contains("200"));
    assert_eq!(outputs[1..], [Output::Close(link), Output::StateChanged(LinkState::Idle)]);
    assert_eq!(world.session.poll_timeout(), None);
}

#[test]
fn the_same_uaid_back_means_nothing_to_do() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    world.online();
    let sent = world.sent();
    assert_eq!(sent, [json!({"messageType": "hello", "uaid": "u1", "use_webpush": true})]);
    assert_eq!(world.state(), LinkState::Online);
}

#[test]
fn another_uaid_back_means_every_channel_anew_sixteen_at_a_time() {
    let mut world = World::new(Some("old"), (0..40).map(channel).collect());
    let link = world.online();
    let mut requests: VecDeque<Value> = world.sent().into_iter().filter(|f| f["messageType"] == "register").collect();
    assert_eq!(requests.len(), WINDOW);
    let (mut done, mut finished) = (Vec::new(), false);
    while let Some(request) = requests.pop_front() {
        world.say(link, register_reply(&request["channelID"], 200));
        for output in world.take() {
            match output {
                Output::Send(_, text) => requests.push_back(serde_json::from_str(&text).unwrap()),
                Output::Registered { registration, endpoint, .. } => {
                    assert!(endpoint.starts_with("https://push/new/"));
                    done.push(registration.0);
                }
                Output::RememberBehind { key: "uaid", value } => {
                    assert_eq!((&*value, done.len()), ("u1", 40), "known to be complete only when it is");
                    finished = true;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(requests.len() <= WINDOW);
    }
    done.sort_unstable();
    assert_eq!(done, (0..40).collect::<Vec<_>>());
    assert!(finished);
}

#[test]
fn a_crash_while_channels_are_made_anew_loses_none_of_them() {
    let mut world = World::new(Some("old"), vec![channel(1), channel(2)]);
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    world.say(link, hello("u1"));
    assert!(world.take().contains(&Output::Remember { key: "uaid", value: "?u1".into() }));
    let mut world = World::new(Some("?u1"), vec![channel(1), channel(2)]);
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    assert_eq!(world.sent(), [json!({"messageType": "hello", "uaid": "u1", "use_webpush": true})]);
    world.say(link, hello("u1"));
    let asked: Vec<Value> = world.sent().into_iter().filter(|f| f["messageType"] == "register").collect();
    assert_eq!(asked.len(), 2, "which of them the server knows has been forgotten");
    world.say(link, register_reply(&asked[0]["channelID"], 200));
    assert!(!world.take().iter().any(|output| matches!(output, Output::RememberBehind { .. })));
    world.say(link, register_reply(&asked[1]["channelID"], 200));
    assert!(world.take().contains(&Output::RememberBehind { key: "uaid", value: "u1".into() }));
}

#[test]
fn a_restored_registration_without_endpoint_is_made() {
    let mut world = World::new(Some("u1"), vec![Channel { endpoint: "".into(), ..channel(1) }, channel(2)]);
    world.online();
    let sent = world.sent();
    assert_eq!(sent.len(), 2);
    assert_eq!(sent[1]["channelID"], "channel-1");
}

#[test]
fn a_refused_or_wordless_hello_is_a_failure() {
    for hello in [json!({"messageType": "hello", "status": 503}), json!({"messageType": "hello", "status": 200})] {
        let mut world = World::new(None, vec![channel(1)]);
        let link = world.connect();
        world.link(link, LinkEvent::Open);
        world.say(link, hello);
        assert!(world.take().contains(&Output::Close(link)));
        assert_eq!(world.state(), LinkState::Waiting);
        assert!(world.session.standing().last_error.unwrap().contains("hello"));
    }
}

#[test]
fn replies_are_matched_by_channel_and_failures_have_their_reasons() {
    let mut world = World::new(Some("u1"), vec![channel(9)]);
    let link = world.online();
    world.take();
    for n in 1..=4 {
        world.register(n);
    }
    let names: Vec<Value> = world.sent().into_iter().map(|frame| frame["channelID"].clone()).collect();
    world.say(link, register_reply(&names[3], 200));
    world.say(link, register_reply(&names[1], 400));
    world.say(link, json!({"messageType": "register", "channelID": names[2], "status": 200}));
    let outputs = world.take();
    assert_eq!(registered(&outputs), [4]);
    assert_eq!(failures(&outputs), [(2, FailureReason::InternalError), (3, FailureReason::InternalError)]);
    // 500: tried again on the same link, until the app's time is up.
    world.say(link, register_reply(&names[0], 500));
    assert_eq!(world.sent(), [] as [Value; 0]);
    world.pass(FRESH_RETRY);
    assert_eq!(world.sent()[0]["channelID"], names[0]);
    world.say(link, register_reply(&names[0], 409));
    world.pass(REGISTER_TIMEOUT);
    assert_eq!(failures(&world.take()), [(1, FailureReason::InternalError)]);
    assert_eq!(world.session.standing().registrations, 2);
}

#[test]
fn a_lost_reply_is_a_network_failure_and_a_late_one_is_undone() {
    let mut world = World::new(Some("u1"), vec![channel(9)]);
    let link = world.online();
    world.take();
    world.register(1);
    let name = world.sent()[0]["channelID"].clone();
    world.pass(REGISTER_TIMEOUT - SECOND);
    assert_eq!(failures(&world.take()), []);
    world.pass(SECOND);
    let outputs = world.take();
    assert_eq!(failures(&outputs), [(1, FailureReason::Network)]);
    world.say(link, register_reply(&name, 200));
    assert_eq!(world.sent(), [json!({"messageType": "unregister", "channelID": name, "code": 200})]);
}

#[test]
fn a_link_on_which_a_registration_stays_unanswered_is_proved() {
    let mut world = World::new(Some("u1"), vec![channel(9)]);
    let link = world.online();
    world.register(1);
    world.take();
    world.pass(REGISTER_TIMEOUT);
    assert!(world.take().contains(&Output::Ping(link)));
    world.pass(PROOF_TIMEOUT);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)), "{outputs:?}");
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })), "{outputs:?}");
}

#[test]
fn endpoints_over_a_thousand_bytes_or_of_another_kind_are_none() {
    for endpoint in [format!("https://push/{}", "x".repeat(1000)), "ftp://push/1".into(), String::new()] {
        let mut world = World::new(Some("u1"), vec![channel(9)]);
        let link = world.online();
        world.take();
        world.register(1);
        let name = world.sent()[0]["channelID"].clone();
        world.say(link, json!({"messageType": "register", "channelID": name, "status": 200, "pushEndpoint": endpoint}));
        assert_eq!(failures(&world.take()), [(1, FailureReason::InternalError)]);
    }
}

#[test]
fn an_existing_registration_is_lost_only_when_the_server_will_never_make_it() {
    let mut world = World::new(Some("old"), vec![channel(1), channel(2)]);
    let link = world.online();
    world.take();
    world.say(link, register_reply(&json!("channel-1"), 500));
    world.say(link, register_reply(&json!("channel-2"), 400));
    let outputs = world.take();
    assert!(matches!(&outputs[..], [Output::Lost { registration: RegistrationId(2), .. }]), "{outputs:?}");
    // Tried again on the live link, after its backoff.
    world.pass(21 * SECOND);
    assert_eq!(world.sent()[0]["channelID"], "channel-1");
}

#[test]
fn a_message_is_acknowledged_when_it_is_safe_and_not_before() {
    let mut world = World::new(Some("u1"), vec![channel(1), channel(2)]);
    let link = world.online();
    world.take();
    let mut first = notification("channel-1", "v1");
    (first["ttl"], first["topic"], first["urgency"]) = (json!(60), json!("t"), json!("high"));
    world.say(link, first);
    world.say(link, notification("channel-2", "v2"));
    world.say(link, json!({"messageType": "notification", "channelID": "channel-1", "version": "v3", "data": "%%%"}));
    let outputs = world.take();
    assert_eq!(
        outputs[0],
        Output::Message(IncomingMessage {
            registration: RegistrationId(1),
            id: "v1".into(),
            body: IncomingBody::Bytes(b"hi"[..].into()),
            expires: Some(UnixTime::from_secs(1_000_060)),
            topic: Some("t".into()),
            urgency: Some(Urgency::High),
        })
    );
    let Output::Message(last) = &outputs[2] else { panic!() };
    assert!(matches!(last.body, IncomingBody::Undecodable(_)));
    assert_eq!(outputs.len(), 3);
    world.pass(SECOND);
    assert_eq!(world.take(), []);
    world.safe(2, "v2");
    world.safe(1, "v1");
    world.safe(1, "v1");
    world.safe(1, "never came");
    assert_eq!(
        world.sent(),
        [json!({"messageType": "ack", "updates": [
            {"channelID": "channel-2", "version": "v2", "code": 100},
            {"channelID": "channel-1", "version": "v1", "code": 100}]})]
    );
}

#[test]
fn what_is_safe_after_the_link_broke_is_acknowledged_when_it_comes_again() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let link = world.online();
    world.say(link, notification("channel-1", "v1"));
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    world.safe(1, "v1");
    let link = world.online();
    assert!(!world.sent().iter().any(|frame| frame["messageType"] == "ack"));
    world.say(link, notification("channel-1", "v1"));
    world.safe(1, "v1");
    assert_eq!(world.sent()[0]["messageType"], "ack");
}

#[test]
fn an_unknown_channel_is_acknowledged_and_unregistered() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let link = world.online();
    world.take();
    world.say(link, notification("stranger", "v1"));
    assert_eq!(
        world.sent(),
        [
            json!({"messageType": "ack", "updates": [{"channelID": "stranger", "version": "v1", "code": 100}]}),
            json!({"messageType": "unregister", "channelID": "stranger", "code": 200}),
        ]
    );
}

#[test]
fn unregistering_acknowledges_what_was_on_its_way() {
    let mut world = World::new(Some("u1"), vec![channel(1), channel(2)]);
    let link = world.online();
    world.take();
    world.say(link, notification("channel-1", "v1"));
    world.unregister(1);
    let sent = world.sent();
    assert_eq!(sent[0]["updates"][0]["version"], "v1");
    assert_eq!(sent[1], json!({"messageType": "unregister", "channelID": "channel-1", "code": 200}));
}

#[test]
fn unregistering_offline_is_told_at_the_next_hello() {
    let mut world = World::new(Some("u1"), vec![channel(1), channel(2)]);
    world.unregister(1);
    world.online();
    let sent = world.sent();
    assert_eq!(sent[1], json!({"messageType": "unregister", "channelID": "channel-1", "code": 200}));
}

#[test]
fn a_returning_network_proves_the_link_within_ten_seconds() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let link = world.online();
    world.take();
    world.session.handle_network(world.now);
    assert_eq!(world.take(), [Output::Ping(link)]);
    world.link(link, LinkEvent::Pong);
    world.pass(60 * SECOND);
    assert_eq!(world.take(), []);
    world.session.handle_network(world.now);
    world.pass(PROOF_TIMEOUT);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)));
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })), "{outputs:?}");
}

#[test]
fn a_link_that_ends_while_it_is_in_doubt_is_made_anew_at_once() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let link = world.online();
    world.session.handle_network(world.now);
    world.take();
    world.link(link, LinkEvent::Closed { code: Some(1011), reason: "pong came too late".into() });
    let outputs = world.take();
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })), "{outputs:?}");
}

#[test]
fn an_attempt_that_was_young_when_the_network_changed_is_soon_made_anew() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let link = world.connect();
    world.pass(SECOND);
    world.session.handle_network(world.now);
    assert_eq!(world.take(), [Output::StateChanged(LinkState::Connecting)]);
    world.pass(SECOND);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)), "{outputs:?}");
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })), "{outputs:?}");
}

#[test]
fn a_link_in_doubt_is_challenged_and_keeps_its_place_if_it_answers_first() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let link = world.online();
    world.take();
    for _ in 0..2 {
        world.session.handle_network(world.now);
        world.pass(DOUBT);
        let other = world.connect();
        assert_eq!(world.take(), [Output::Ping(link)]);
        assert_eq!(world.state(), LinkState::Online);
        world.link(link, LinkEvent::Pong);
        assert_eq!(world.take(), [Output::Close(other)]);
        world.pass(60 * SECOND);
        assert_eq!(world.take(), []);
    }
    // A challenger that fails changes nothing.
    world.session.handle_network(world.now);
    world.pass(DOUBT);
    let other = world.connect();
    world.link(other, LinkEvent::Failed(LinkError::Timeout));
    world.link(link, LinkEvent::Pong);
    assert_eq!(world.take(), [Output::Ping(link)]);
    assert_eq!(world.state(), LinkState::Online);
}

#[test]
fn a_challenger_takes_the_place_of_a_link_that_does_not_answer() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let link = world.online();
    world.session.handle_network(world.now);
    world.pass(DOUBT);
    let other = world.connect();
    world.take();
    world.link(other, LinkEvent::Open);
    let outputs = world.take();
    assert_eq!(outputs.first(), Some(&Output::Close(link)), "the server knows a device on one link only");
    let greets = |output: &&Output| matches!(output, Output::Send(at, text) if *at == other && text.contains("hello"));
    assert_eq!(outputs.iter().filter(greets).count(), 1, "{outputs:?}");
    world.say(other, hello("u1"));
    assert_eq!(world.state(), LinkState::Online);
    // The old one breaks while the challenger is on its way.
    world.session.handle_network(world.now);
    world.pass(DOUBT);
    let third = world.connect();
    world.link(other, LinkEvent::Failed(LinkError::Io("reset".into())));
    world.link(third, LinkEvent::Open);
    world.say(third, hello("u1"));
    assert_eq!(world.state(), LinkState::Online);
    world.take();
    world.pass(60 * SECOND);
    assert_eq!(world.take(), []);
}

#[test]
fn an_attempt_that_the_network_overtook_is_followed_soon() {
    let unreachable = || LinkEvent::Failed(LinkError::Connect("unreachable".into()));
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    for _ in 0..8 {
        let link = world.connect();
        world.link(link, unreachable());
    }
    let link = world.connect();
    world.session.handle_network(world.now);
    world.link(link, unreachable());
    world.take();
    world.pass(crate::core::upstream::backoff::BASE);
    assert!(world.take().iter().any(|output| matches!(output, Output::Connect { .. })));
}

#[test]
fn silence_ends_a_link() {
    for (pinged, limit) in [(false, FIRST_SILENCE), (true, SILENCE)] {
        let mut world = World::new(Some("u1"), vec![channel(1)]);
        let link = world.online();
        if pinged {
            world.link(link, LinkEvent::Ping);
        }
        world.take();
        world.pass(limit - SECOND);
        assert_eq!(world.take(), []);
        world.pass(SECOND);
        assert!(world.take().contains(&Output::Close(link)));
    }
}

#[test]
fn a_server_that_does_not_say_hello_is_left() {
    let mut world = World::new(None, vec![channel(1)]);
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    world.pass(CONNECT_TIMEOUT);
    assert!(world.take().contains(&Output::Close(link)));
}

#[test]
fn a_reset_by_the_server_is_answered_at_once() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let link = world.online();
    world.link(link, LinkEvent::Closed { code: Some(1000), reason: "SM".into() });
    let before = world.now.boot;
    let link = world.connect();
    assert!(world.now.boot.since(before) <= SECOND);
    world.link(link, LinkEvent::Open);
    world.say(link, json!({"messageType": "hello", "uaid": "u2", "status": 200}));
    assert!(world.sent().iter().any(|frame| frame["channelID"] == "channel-1"));
}

#[test]
fn a_server_that_accepts_and_closes_is_left_alone_more_and_more() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let start = world.now.boot;
    for _ in 0..30 {
        let link = world.online();
        world.link(link, LinkEvent::Closed { code: Some(1011), reason: "ghost".into() });
    }
    assert!(world.now.boot.since(start) > Duration::from_secs(1800), "{:?}", world.now.boot.since(start));
}

#[test]
fn refused_credentials_are_told_to_the_app_and_to_the_user() {
    let mut world = World::new(None, vec![]);
    world.register(1);
    let link = world.connect();
    let refusal = LinkError::Http { status: 401, body: String::new(), retry_after: None };
    world.link(link, LinkEvent::Failed(refusal));
    assert_eq!(failures(&world.take()), [(1, FailureReason::ActionRequired)]);
    assert!(world.session.standing().trouble.unwrap().contains("credentials"));
    world.register(2);
    assert_eq!(failures(&world.take()), [(2, FailureReason::ActionRequired)]);
    // Mended meanwhile.
    world.pass(TROUBLE_HOLDS);
    world.register(3);
    world.online();
    assert_eq!(world.session.standing().trouble, None);
}

#[test]
fn retry_after_is_obeyed_even_by_a_hurried_app() {
    let mut world = World::new(None, vec![channel(1)]);
    let link = world.connect();
    let busy = LinkError::Http { status: 503, body: String::new(), retry_after: Some(120 * SECOND) };
    world.link(link, LinkEvent::Failed(busy));
    world.take();
    world.register(2);
    world.session.handle_network(world.now);
    world.pass(119 * SECOND);
    let outputs = world.take();
    assert_eq!(failures(&outputs), [(2, FailureReason::Network)]);
    assert!(!outputs.iter().any(|output| matches!(output, Output::Connect { .. })));
    world.connect();
}

#[test]
fn an_app_that_registers_in_a_loop_does_not_defeat_the_backoff() {
    let mut world = World::new(None, vec![channel(1000)]);
    let mut attempts = 0;
    for n in 0..600 {
        world.pass(Duration::from_millis(100));
        world.register(n);
        for output in world.take() {
            if let Output::Connect { link, .. } = output {
                attempts += 1;
                world.link(link, LinkEvent::Failed(LinkError::Connect("refused".into())));
            }
        }
        world.unregister(n);
    }
    assert!(attempts < 30, "{attempts} attempts in a minute");
}

#[test]
fn with_too_many_unsafe_messages_the_link_is_given_up() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let link = world.online();
    for n in 0..UNSAFE_LIMIT {
        world.say(link, notification("channel-1", &format!("v{n}")));
    }
    assert!(!world.take().contains(&Output::Close(link)));
    world.say(link, notification("channel-1", "one more"));
    assert!(world.take().contains(&Output::Close(link)));
    assert!(world.session.unsafe_messages.is_empty());
}

#[test]
fn events_of_links_given_up_are_ignored() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let old = world.online();
    world.link(old, LinkEvent::Closed { code: None, reason: String::new() });
    world.online();
    world.take();
    world.say(old, notification("channel-1", "v1"));
    world.link(old, LinkEvent::Failed(LinkError::Timeout));
    assert_eq!(world.take(), []);
    assert_eq!(world.state(), LinkState::Online);
}

#[test]
fn while_roaming_is_off_there_is_no_link_and_registrations_fail_at_once() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    let link = world.online();
    world.register(2);
    world.say(link, notification("channel-1", "v1"));
    world.safe(1, "v1");
    world.take();
    world.session.set_allowed(false, world.now);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)));
    assert_eq!(failures(&outputs), [(2, FailureReason::Network)]);
    assert_eq!((world.state(), world.session.poll_timeout()), (LinkState::Off, None));
    world.register(3);
    world.session.handle_network(world.now);
    world.session.restart(world.now);
    let outputs = world.take();
    assert_eq!(failures(&outputs), [(3, FailureReason::Network)]);
    assert!(!outputs.iter().any(|output| matches!(output, Output::Connect { .. })));
    world.session.set_allowed(true, world.now);
    world.drain();
    world.online();
    assert_eq!(world.state(), LinkState::Online);
}

#[test]
fn the_heartbeat_shown_is_the_servers() {
    let mut world = World::new(Some("u1"), vec![channel(1)]);
    assert_eq!(world.session.standing().heartbeat, None);
    let link = world.online();
    let beat = |world: &World| world.session.standing().heartbeat.map(|beat| (beat.interval, beat.by_server));
    assert_eq!(beat(&world), Some((SECOND * 300, true)));
    world.link(link, LinkEvent::Ping);
    world.pass(SECOND * 30);
    world.link(link, LinkEvent::Ping);
    assert_eq!(beat(&world), Some((SECOND * 30, true)), "as it has shown");
}

#[test]
fn a_seed_decides_everything() {
    let run = |seed| {
        let now = Now::default();
        let mut session = Session::new(None, vec![], [seed; 32], LinkIds::new(0), now);
        session.register(RegistrationId(1), None, now);
        session.names.keys().next().unwrap().clone()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

fn frame() -> impl Strategy<Value = String> {
    let value = prop_oneof![
        Just(json!(null)),
        any::<i64>().prop_map(|n| json!(n)),
        Just(json!([])),
        Just(json!("channel-1")),
        Just(json!("v1")),
        Just(json!(200)),
        Just(json!("https://push/x")),
        "\\PC{0,30}".prop_map(|s| json!(s)),
    ];
    let kind = prop::sample::select(vec!["hello", "register", "unregister", "notification", "broadcast", "ping", "x"]);
    let key =
        prop::sample::select(vec!["channelID", "version", "status", "pushEndpoint", "uaid", "data", "ttl", "topic"]);
    prop_oneof![
        8 => (kind, prop::collection::vec((key, value), 0..6)).prop_map(|(kind, fields)| {
            let mut frame = json!({"messageType": kind});
            for (key, value) in fields {
                frame[key] = value;
            }
            frame.to_string()
        }),
        1 => "\\PC{0,60}",
    ]
}

#[derive(Clone, Debug)]
enum Poke {
    Frame(String),
    Open,
    Hello,
    Ping,
    Closed,
    Failed(u16),
    Network,
    Allowed(bool),
    Register(u64),
    Unregister(u64),
    Safe,
    Pass(u64),
}

fn poke() -> impl Strategy<Value = Poke> {
    prop_oneof![
        6 => frame().prop_map(Poke::Frame),
        3 => Just(Poke::Open),
        3 => Just(Poke::Hello),
        1 => Just(Poke::Ping),
        1 => Just(Poke::Closed),
        1 => prop::sample::select(vec![200_u16, 401, 429, 500]).prop_map(Poke::Failed),
        1 => Just(Poke::Network),
        1 => any::<bool>().prop_map(Poke::Allowed),
        2 => (0_u64..5).prop_map(Poke::Register),
        2 => (0_u64..5).prop_map(Poke::Unregister),
        2 => Just(Poke::Safe),
        4 => (0_u64..400_000).prop_map(Poke::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn whatever_comes_nothing_panics_and_every_registration_is_answered_in_time(
        pokes in prop::collection::vec(poke(), 1..80)
    ) {
        let mut world = World::new(Some("u1"), vec![channel(1)]);
        let (mut link, mut messages) = (LinkId(0), Vec::new());
        let mut waiting: HashMap<u64, Instant> = HashMap::new();
        for poke in pokes {
            match poke {
                Poke::Frame(text) => world.link(link, LinkEvent::Text(text)),
                Poke::Open => world.link(link, LinkEvent::Open),
                Poke::Hello => world.say(link, json!({"messageType": "hello", "uaid": "u1", "status": 200})),
                Poke::Ping => world.link(link, LinkEvent::Ping),
                Poke::Closed => world.link(link, LinkEvent::Closed { code: Some(1000), reason: "SM".into() }),
                Poke::Failed(status) => {
                    let error = LinkError::Http { status, body: String::new(), retry_after: None };
                    world.link(link, LinkEvent::Failed(error));
                }
                Poke::Network => world.session.handle_network(world.now),
                Poke::Allowed(allowed) => world.session.set_allowed(allowed, world.now),
                Poke::Register(n) => {
                    if !world.session.channels.contains_key(&RegistrationId(n)) {
                        waiting.insert(n, world.now.boot + REGISTER_TIMEOUT);
                    }
                    world.register(n);
                }
                Poke::Unregister(n) => {
                    waiting.remove(&n);
                    world.unregister(n);
                }
                Poke::Safe => for (registration, id) in messages.drain(..) {
                    world.session.safe(registration, &id, world.now);
                },
                Poke::Pass(millis) => world.pass(Duration::from_millis(millis)),
            }
            for output in world.take() {
                match output {
                    Output::Connect { link: id, .. } => link = id,
                    Output::Message(message) => messages.push((message.registration, message.id)),
                    Output::Registered { registration, endpoint, .. } => {
                        prop_assert!(!endpoint.is_empty() && endpoint.len() <= ENDPOINT_LIMIT);
                        waiting.remove(&registration.0);
                    }
                    Output::RegisterFailed { registration, .. } => {
                        prop_assert!(waiting.remove(&registration.0).is_some(), "failed without being asked for");
                    }
                    _ => {}
                }
            }
            let now = world.now.boot;
            prop_assert!(waiting.values().all(|by| *by > now), "an app waits in vain");
            let open = world.session.channels.values().filter(|entry| entry.step != Step::Done).count();
            prop_assert_eq!(open, world.session.open);
            prop_assert_eq!(world.session.names.len(), world.session.channels.len());
            prop_assert_eq!(world.session.channels.is_empty(), world.state() == LinkState::Idle);
            prop_assert_eq!(world.session.poll_timeout().is_none(), matches!(world.state(), LinkState::Idle | LinkState::Off));
            prop_assert_eq!(world.state() == LinkState::Off, !world.session.allowed && !world.session.channels.is_empty());
        }
    }
}
