//! The rules of push.md §3e and of the specifications, one test each, against a broker played by the test.

use mqtt_protocol_core::mqtt::packet::{
    AssignedClientIdentifier, MaximumPacketSize, MessageExpiryInterval, Properties, Qos, ReasonString, ServerKeepAlive,
    ServerReference, UserProperty, v5_0,
};
use mqtt_protocol_core::mqtt::result_code::{ConnectReasonCode, DisconnectReasonCode};
use proptest::prelude::*;

use super::{
    super::{IncomingBody, IncomingMessage, LinkIds, PROOF_TIMEOUT, heartbeat},
    *,
};
use crate::{
    config::{NetworkSettings, UpstreamKind, UpstreamSettings},
    event::LinkError,
    model::{Secret, Urgency},
    time::UnixTime,
};

const SECOND: Duration = Duration::from_secs(1);

struct World {
    session: Session,
    settings: UpstreamSettings,
    remembered: BTreeMap<Arc<str>, Arc<str>>,
    now: Now,
    seen: Vec<Output>,
}

impl World {
    fn with(settings: UpstreamSettings, remembered: &[(&str, &str)], channels: Vec<Channel>) -> Self {
        let now = Now { boot: Instant::from_nanos(5_000_000_000_000), wall: UnixTime::from_secs(1_800_000_000) };
        let remembered: BTreeMap<Arc<str>, Arc<str>> =
            remembered.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let session = begin(&settings, remembered.clone(), channels, now);
        let mut world = Self { session, settings, remembered, now, seen: Vec::new() };
        world.drain();
        world
    }

    fn new() -> Self {
        Self::with(settings(), &[], Vec::new())
    }

    /// The daemon dies and comes back with what was remembered.
    fn crash(&mut self, channels: Vec<Channel>) {
        self.session = begin(&self.settings, self.remembered.clone(), channels, self.now);
        self.seen.clear();
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(output) = self.session.poll_output() {
            if let Output::Remember { key, value } = &output {
                self.remembered.insert((*key).into(), value.as_str().into());
            }
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

    fn say(&mut self, link: LinkId, bytes: Vec<u8>) {
        self.link(link, LinkEvent::Bytes(bytes));
    }

    fn register(&mut self, n: u64) {
        self.session.register(RegistrationId(n), self.now);
        self.drain();
    }

    fn safe(&mut self, n: u64, id: &Arc<str>) {
        self.session.safe(RegistrationId(n), id, self.now);
        self.drain();
    }

    /// Lets time pass, firing every deadline on its way.
    fn pass(&mut self, time: Duration) {
        let end = self.now.boot + time;
        while let Some(at) = self.session.poll_timeout().filter(|at| *at <= end) {
            assert!(at >= self.now.boot, "a deadline in the past");
            self.advance(at.since(self.now.boot));
            self.session.handle_timeout(self.now);
            self.drain();
            assert!(self.session.poll_timeout().is_none_or(|next| next > at), "a deadline that is not cleared");
        }
        self.advance(end.since(self.now.boot));
    }

    fn advance(&mut self, time: Duration) {
        self.now = Now { boot: self.now.boot + time, wall: self.now.wall + time };
    }

    /// Lets time pass until a link is asked for, and opens it; gives the CONNECT.
    fn open(&mut self) -> (LinkId, Vec<u8>) {
        for _ in 0..1000 {
            let asked = self.seen.iter().rev().find_map(|output| match output {
                Output::Connect { link, .. } => Some(*link),
                _ => None,
            });
            if let Some(link) = asked {
                self.seen.clear();
                self.link(link, LinkEvent::Login(Login { username: None, password: None }));
                self.link(link, LinkEvent::Open);
                return (link, self.sent());
            }
            let at = self.session.poll_timeout().expect("it does not try");
            self.pass(at.since(self.now.boot));
        }
        panic!("it never connects");
    }

    /// The link asked for last, which was asked for at once.
    fn connect(&mut self) -> LinkId {
        self.drain();
        let asked = self.seen.iter().rposition(|output| matches!(output, Output::Connect { .. }));
        let Output::Connect { link, .. } = self.seen.remove(asked.expect("no link is asked for")) else {
            unreachable!()
        };
        link
    }

    /// The bytes put out since the last look; other outputs stay.
    fn sent(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.seen.retain(|output| match output {
            Output::SendBytes(_, more) => {
                bytes.extend_from_slice(more);
                false
            }
            _ => true,
        });
        bytes
    }

    /// A link up to CONNACK.
    fn online(&mut self, session_present: bool) -> LinkId {
        let (link, _) = self.open();
        self.say(link, connack(session_present, ConnectReasonCode::Success, Vec::new()));
        link
    }

    /// Answers every SUBSCRIBE and UNSUBSCRIBE with the code; gives the topics subscribed.
    fn grant(&mut self, link: LinkId, code: u8) -> Vec<String> {
        let bytes = self.sent();
        let mut topics = Vec::new();
        for (first, body) in packets(&bytes) {
            let (packet, rest) = (body[..2].to_vec(), &body[2..]);
            match first {
                0x82 => {
                    let of_this = filters(&rest[1..], 1);
                    let mut ack = vec![0x90, 3 + of_this.len() as u8, packet[0], packet[1], 0];
                    ack.extend(vec![code; of_this.len()]);
                    self.say(link, ack);
                    topics.extend(of_this);
                }
                0xa2 => {
                    let count = filters(&rest[1..], 0).len();
                    let mut ack = vec![0xb0, 3 + count as u8, packet[0], packet[1], 0];
                    ack.extend(vec![0; count]);
                    self.say(link, ack);
                }
                _ => {}
            }
        }
        topics
    }

    /// Registered 1, with its link and topic.
    fn registered() -> (Self, LinkId, String) {
        let mut world = Self::new();
        world.register(1);
        let link = world.online(false);
        let topics = world.grant(link, 1);
        let outputs = world.take();
        assert!(outputs.iter().any(|output| matches!(output, Output::Registered { .. })), "{outputs:?}");
        (world, link, topics[0].clone())
    }

    fn messages(&mut self) -> Vec<IncomingMessage> {
        let outputs = self.take();
        outputs.into_iter().filter_map(|output| if let Output::Message(m) = output { Some(m) } else { None }).collect()
    }

    /// The PUBACKs put out, by packet id.
    fn acks(&mut self) -> Vec<u16> {
        let bytes = self.sent();
        packets(&bytes)
            .into_iter()
            .filter(|(first, _)| *first == 0x40)
            .map(|(_, body)| u16::from_be_bytes([body[0], body[1]]))
            .collect()
    }

    fn failures(&mut self) -> Vec<(RegistrationId, FailureReason)> {
        let failed = |output| match output {
            Output::RegisterFailed { registration, reason, .. } => Some((registration, reason)),
            _ => None,
        };
        self.take().into_iter().filter_map(failed).collect()
    }
}

fn settings() -> UpstreamSettings {
    UpstreamSettings::new("broker", UpstreamKind::Mqtt, "mqtts://broker.example/")
}

fn begin(
    settings: &UpstreamSettings,
    remembered: BTreeMap<Arc<str>, Arc<str>>,
    channels: Vec<Channel>,
    now: Now,
) -> Session {
    let network = NetworkSettings::default();
    let links = LinkIds::new(0);
    Session::new(Beginning { settings, network: &network, remembered, channels, seed: [7; 32], links }, now)
}

fn channel(n: u64, topic: &str) -> Channel {
    Channel {
        registration: RegistrationId(n),
        channel: topic.into(),
        vapid: None,
        endpoint: format!("mqtts://broker.example:8883/{topic}").into(),
    }
}

fn connack(session_present: bool, code: ConnectReasonCode, properties: Properties) -> Vec<u8> {
    let packet = v5_0::Connack::builder().session_present(session_present).reason_code(code).props(properties);
    packet.build().unwrap().to_continuous_buffer()
}

fn message(topic: &str, packet: u16, duplicate: bool, body: &str) -> Vec<u8> {
    let publish = v5_0::Publish::builder().topic_name(topic).unwrap().qos(Qos::AtLeastOnce).packet_id(packet);
    publish.dup(duplicate).payload(body).build().unwrap().to_continuous_buffer()
}

fn disconnect(code: DisconnectReasonCode, properties: Properties) -> Vec<u8> {
    v5_0::Disconnect::builder().reason_code(code).props(properties).build().unwrap().to_continuous_buffer()
}

/// First bytes and bodies.
fn packets(bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let (mut rest, mut found) = (bytes, Vec::new());
    while let [first, length @ ..] = rest {
        let (mut size, mut header) = (0, 0);
        for byte in length {
            size |= usize::from(byte & 0x7f) << (7 * header);
            header += 1;
            if byte & 0x80 == 0 {
                break;
            }
        }
        found.push((*first, length[header..header + size].to_vec()));
        rest = &length[header + size..];
    }
    found
}

/// The topic filters of a SUBSCRIBE or UNSUBSCRIBE, each followed by `options` bytes.
fn filters(bytes: &[u8], options: usize) -> Vec<String> {
    let (mut rest, mut found) = (bytes, Vec::new());
    while let [high, low, more @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        found.push(String::from_utf8(more[..length].to_vec()).unwrap());
        rest = &more[length + options..];
    }
    found
}

#[test]
fn a_name_for_this_device_is_remembered_before_any_link() {
    let mut world = World::new();
    let outputs = world.take();
    let [Output::Remember { key: "client", value }] = &outputs[..] else { panic!("{outputs:?}") };
    assert!(value.len() == 23 && value.starts_with("np") && value.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    let mut again = World::with(settings(), &[("client", value)], Vec::new());
    assert_eq!(again.take(), []);
    again.register(1);
    let (_, connect) = again.open();
    assert!(connect.windows(23).any(|part| part == value.as_bytes()));
}

#[test]
fn connect_says_what_the_configuration_says() {
    let mut settings = settings();
    settings.mqtt.session_expiry = Duration::from_secs(86_400);
    settings.mqtt.receive_maximum = 10;
    let mut world = World::with(settings, &[], Vec::new());
    world.register(1);
    let asked = world.take().into_iter().find_map(|output| match output {
        Output::Connect { link, .. } => Some(link),
        _ => None,
    });
    let link = asked.unwrap();
    let login = Login { username: Some("phone".into()), password: Some(Secret::new("sesame")) };
    world.link(link, LinkEvent::Login(login));
    world.link(link, LinkEvent::Open);
    let bytes = world.sent();
    let (connect, _) = v5_0::Connect::parse(&packets(&bytes)[0].1).unwrap();
    assert_eq!((connect.user_name(), connect.password()), (Some("phone"), Some(&b"sesame"[..])));
    assert!(!connect.clean_start());
    assert_eq!(connect.keep_alive(), 29 * 60 + 60);
    let text = format!("{connect:?}");
    assert!(text.contains("SessionExpiryInterval") && text.contains("ReceiveMaximum"), "{text}");
}

#[test]
fn a_registration_is_a_topic_nobody_can_guess() {
    let (mut world, link, topic) = World::registered();
    assert!(topic.starts_with("up/") && topic.len() == 3 + 32, "{topic}");
    world.register(2);
    assert!(!world.take().iter().any(|output| matches!(output, Output::Registered { .. })));
    world.register(3);
    world.grant(link, 1);
    world.register(4);
    let second = world.grant(link, 1);
    assert_ne!(second, [topic]);
    let registered: Vec<Output> =
        world.take().into_iter().filter(|output| matches!(output, Output::Registered { .. })).collect();
    let Some(Output::Registered { endpoint, channel, .. }) = registered.last() else { panic!("{registered:?}") };
    assert_eq!(**endpoint, *format!("mqtts://broker.example:8883/{channel}"));
}

#[test]
fn a_gateway_makes_the_endpoint_where_there_is_one() {
    let mut settings = settings();
    settings.endpoint = Some("https://gateway.example/push/{channel}?up".into());
    settings.mqtt.topic_prefix = "phones/m%y/".into();
    let mut world = World::with(settings.clone(), &[], Vec::new());
    world.register(1);
    let link = world.online(false);
    let topics = world.grant(link, 1);
    let outputs = world.take();
    let endpoint = outputs.iter().find_map(|output| match output {
        Output::Registered { endpoint, .. } => Some(endpoint),
        _ => None,
    });
    let own = topics[0].strip_prefix("phones/m%y/").unwrap();
    assert_eq!(**endpoint.unwrap(), *format!("https://gateway.example/push/phones/m%25y/{own}?up"));
    settings.endpoint = Some(format!("https://gateway.example/{}/{{channel}}", "x".repeat(950)).into());
    let mut world = World::with(settings, &[], Vec::new());
    world.register(1);
    assert_eq!(world.failures(), [(RegistrationId(1), FailureReason::ActionRequired)]);
}

#[test]
fn a_changed_template_moves_endpoints_and_keeps_topics() {
    let mut settings = settings();
    settings.endpoint = Some("https://gateway.example/{channel}".into());
    let mut world = World::with(settings, &[], vec![channel(1, "up/one"), channel(2, "")]);
    let link = world.online(true);
    assert_eq!(world.grant(link, 1)[0], "up/one");
    let moved: Vec<Arc<str>> = world
        .take()
        .into_iter()
        .filter_map(|output| if let Output::Registered { endpoint, .. } = output { Some(endpoint) } else { None })
        .collect();
    assert_eq!(&*moved[0], "https://gateway.example/up/one");
    assert_eq!(moved.len(), 2);
}

#[test]
fn many_registrations_are_packed() {
    let mut world = World::new();
    for n in 0..100 {
        world.register(n);
    }
    let link = world.online(false);
    let bytes = world.sent();
    assert_eq!(packets(&bytes).len(), 100_usize.div_ceil(TOPICS_PER_REQUEST).min(WINDOW));
    world.session.outputs.push_front(Output::SendBytes(link, bytes));
    world.drain();
    while !world.grant(link, 1).is_empty() {}
    let done = world.take().iter().filter(|output| matches!(output, Output::Registered { .. })).count();
    assert_eq!(done, 100);
}

#[test]
fn a_refused_subscription_says_what_to_mend() {
    for (code, reason) in [
        (0x87, FailureReason::ActionRequired),
        (0x97, FailureReason::ActionRequired),
        (0x8f, FailureReason::InternalError),
        (0x80, FailureReason::ActionRequired),
    ] {
        let mut world = World::new();
        world.register(1);
        let link = world.online(false);
        world.grant(link, code);
        assert_eq!(world.failures(), [(RegistrationId(1), reason)]);
    }
    // One that passes is tried again while the app waits.
    let mut world = World::new();
    world.register(1);
    let link = world.online(false);
    world.grant(link, 0x83);
    assert_eq!(world.failures(), []);
    world.pass(FRESH_RETRY);
    assert_eq!(world.grant(link, 1).len(), 1);
    assert!(world.take().iter().any(|output| matches!(output, Output::Registered { .. })));
}

#[test]
fn a_refused_subscription_that_exists_is_tried_again_for_good() {
    let mut world = World::with(settings(), &[], vec![channel(1, "up/one")]);
    let link = world.online(true);
    world.grant(link, 0x87);
    for _ in 0..20 {
        world.pass(Duration::from_secs(60));
        world.sent();
        world.say(link, vec![0xd0, 0]);
    }
    assert!(!world.take().iter().any(|output| matches!(output, Output::Lost { .. } | Output::RegisterFailed { .. })));
    assert_eq!(world.session.standing().registrations, 1);
}

#[test]
fn an_app_is_answered_in_time_whatever_the_broker_does() {
    let mut world = World::new();
    world.register(1);
    world.pass(REGISTER_TIMEOUT);
    assert_eq!(world.failures(), [(RegistrationId(1), FailureReason::Network)]);
    let mut world = World::new();
    world.register(1);
    world.online(false);
    world.pass(REGISTER_TIMEOUT);
    assert_eq!(world.failures(), [(RegistrationId(1), FailureReason::Network)]);
}

#[test]
fn a_message_is_acknowledged_when_it_is_safe_and_in_order() {
    let (mut world, link, topic) = World::registered();
    let mut bytes = message(&topic, 7, false, "one");
    bytes.extend(message(&topic, 8, false, "two"));
    bytes.extend(message(&topic, 9, false, "three"));
    for piece in bytes.chunks(5) {
        world.say(link, piece.to_vec());
    }
    let messages = world.messages();
    let bodies: Vec<_> = messages.iter().map(|message| message.body.clone()).collect();
    assert_eq!(bodies, [b"one" as &[u8], b"two", b"three"].map(|body| IncomingBody::Bytes(body.into())));
    assert_eq!(world.acks(), [0_u16; 0]);
    world.safe(1, &messages[1].id);
    assert_eq!(world.acks(), [0_u16; 0]);
    world.safe(1, &messages[0].id);
    assert_eq!(world.acks(), [7, 8]);
    world.safe(1, &messages[0].id);
    world.safe(2, &messages[2].id);
    assert_eq!(world.acks(), [0_u16; 0]);
    world.safe(1, &messages[2].id);
    assert_eq!(world.acks(), [9]);
}

#[test]
fn a_message_that_comes_again_is_known_again_also_after_a_crash() {
    let (mut world, link, topic) = World::registered();
    world.say(link, message(&topic, 7, false, "one"));
    let first = world.messages().remove(0).id;
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    let link = world.online(true);
    world.say(link, message(&topic, 7, true, "one"));
    assert_eq!(world.messages()[0].id, first);
    world.crash(vec![channel(1, &topic)]);
    let link = world.online(true);
    world.say(link, message(&topic, 7, true, "one"));
    assert_eq!(world.messages()[0].id, first);
    // What is said safe now counts for this link only once it came over it.
    world.safe(1, &first);
    assert_eq!(world.acks(), [7]);
    // The same words again are another message.
    world.say(link, message(&topic, 7, false, "one"));
    assert_ne!(world.messages()[0].id, first);
}

#[test]
fn an_acknowledgement_does_not_outlive_its_link() {
    let (mut world, link, topic) = World::registered();
    world.say(link, message(&topic, 7, false, "one"));
    let id = world.messages().remove(0).id;
    world.link(link, LinkEvent::Failed(LinkError::Io("gone".into())));
    world.safe(1, &id);
    let link = world.online(true);
    world.grant(link, 1);
    assert_eq!(world.acks(), [0_u16; 0]);
    world.say(link, message(&topic, 7, true, "one"));
    world.safe(1, &id);
    assert_eq!(world.acks(), [7]);
}

#[test]
fn what_a_sender_says_of_its_message_is_honoured() {
    let (mut world, link, topic) = World::registered();
    let properties: Properties = vec![
        MessageExpiryInterval::new(90).unwrap().into(),
        UserProperty::new("id", "m-1").unwrap().into(),
        UserProperty::new("urgency", "Very-Low").unwrap().into(),
        UserProperty::new("topic", "weather").unwrap().into(),
        UserProperty::new("other", "x").unwrap().into(),
    ];
    let publish = v5_0::Publish::builder().topic_name(&*topic).unwrap().qos(Qos::AtLeastOnce).packet_id(3_u16);
    world.say(link, publish.payload("x").props(properties).build().unwrap().to_continuous_buffer());
    let message = world.messages().remove(0);
    assert_eq!(&*message.id, "m-1");
    assert_eq!(message.expires, Some(world.now.wall + 90 * SECOND));
    assert_eq!((message.topic.as_deref(), message.urgency), (Some("weather"), Some(Urgency::VeryLow)));
    world.safe(1, &"m-1".into());
    assert_eq!(world.acks(), [3]);
}

#[test]
fn a_retained_message_has_the_same_id_each_time() {
    let (mut world, link, topic) = World::registered();
    let retained = |packet: u16| {
        let publish = v5_0::Publish::builder().topic_name(&*topic).unwrap().qos(Qos::AtLeastOnce).packet_id(packet);
        publish.retain(true).payload("state").build().unwrap().to_continuous_buffer()
    };
    world.say(link, retained(1));
    world.say(link, retained(2));
    let messages = world.messages();
    assert_eq!(messages[0].id, messages[1].id);
    world.safe(1, &messages[0].id);
    world.safe(1, &messages[0].id);
    assert_eq!(world.acks(), [1, 2]);
}

#[test]
fn messages_of_qos_0_need_no_acknowledgement_and_differ() {
    let (mut world, link, topic) = World::registered();
    for _ in 0..2 {
        let publish = v5_0::Publish::builder().topic_name(&*topic).unwrap().qos(Qos::AtMostOnce).payload("x");
        world.say(link, publish.build().unwrap().to_continuous_buffer());
    }
    let messages = world.messages();
    assert_ne!(messages[0].id, messages[1].id);
    world.safe(1, &messages[0].id);
    assert_eq!(world.sent(), [0_u8; 0]);
}

#[test]
fn a_message_too_large_is_dropped_and_acknowledged() {
    let (mut world, link, topic) = World::registered();
    let bytes = message(&topic, 4, false, &"x".repeat(100_000));
    for piece in bytes.chunks(1400) {
        world.say(link, piece.to_vec());
    }
    let message = world.messages().remove(0);
    assert!(matches!(message.body, IncomingBody::Undecodable(_)));
    world.safe(1, &message.id);
    assert_eq!(world.acks(), [4]);
}

#[test]
fn a_topic_nobody_wants_is_acknowledged_and_unsubscribed() {
    let (mut world, link, _) = World::registered();
    world.say(link, message("up/forgotten", 4, false, "x"));
    let sent = world.sent();
    let sent = packets(&sent);
    assert_eq!((sent[0].0, &sent[0].1[..]), (0x40, &[0, 4][..]));
    assert_eq!((sent[1].0, filters(&sent[1].1[3..], 0)), (0xa2, vec!["up/forgotten".to_owned()]));
}

#[test]
fn more_on_the_way_than_can_be_borne_ends_the_link() {
    let (mut world, link, topic) = World::registered();
    for packet in 1..=UNSAFE_LIMIT as u16 {
        world.say(link, message(&topic, packet, false, &packet.to_string()));
    }
    assert_eq!(world.messages().len(), UNSAFE_LIMIT);
    world.say(link, message(&topic, 5000, false, "one more"));
    let bytes = world.sent();
    assert_eq!(packets(&bytes)[0], (0xe0, vec![0x93, 0]));
    assert_eq!(world.take().first(), Some(&Output::Close(link)));
}

#[test]
fn with_every_link_everything_is_subscribed() {
    for present in [false, true] {
        let mut world = World::with(settings(), &[], vec![channel(1, "up/one"), channel(2, "up/two")]);
        let link = world.online(present);
        assert_eq!(world.grant(link, 1), ["up/one", "up/two"]);
        assert!(!world.take().iter().any(|output| matches!(output, Output::Registered { .. })));
        world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
        let link = world.online(present);
        assert_eq!(world.grant(link, 1), ["up/one", "up/two"]);
    }
}

#[test]
fn the_last_registration_takes_the_session_with_it() {
    let (mut world, link, topic) = World::registered();
    world.session.unregister(RegistrationId(1), world.now);
    world.drain();
    let sent = world.sent();
    assert_eq!(filters(&packets(&sent)[0].1[3..], 0), [topic]);
    assert_eq!(world.session.standing().state, LinkState::Online);
    let packet = packets(&sent)[0].1[..2].to_vec();
    world.say(link, vec![0xb0, 4, packet[0], packet[1], 0, 0]);
    // Session expiry 0: the broker keeps nothing.
    let bytes = world.sent();
    assert_eq!(packets(&bytes), [(0xe0, vec![0, 5, 0x11, 0, 0, 0, 0])]);
    assert!(world.take().contains(&Output::Close(link)));
    assert_eq!(world.session.standing().state, LinkState::Idle);
    assert_eq!(world.session.poll_timeout(), None);
}

#[test]
fn a_broker_that_does_not_answer_the_farewell_is_left() {
    let (mut world, link, _) = World::registered();
    world.session.unregister(RegistrationId(1), world.now);
    world.pass(REQUEST_TIMEOUT + PROOF_TIMEOUT);
    assert!(world.take().contains(&Output::Close(link)));
    assert_eq!(world.session.standing().state, LinkState::Idle);
    assert_eq!(world.session.poll_timeout(), None);
}

#[test]
fn a_broker_of_311_is_spoken_to_in_311() {
    for hang_up in [false, true] {
        let mut world = World::new();
        world.register(1);
        let (link, connect) = world.open();
        assert_eq!(packets(&connect)[0].1[6], 5);
        if hang_up {
            world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
        } else {
            world.say(link, vec![0x20, 2, 0, 1]);
        }
        let (link, connect) = world.open();
        assert_eq!(packets(&connect)[0].1[6], 4);
        world.say(link, vec![0x20, 2, 0, 0]);
        let sent = world.sent();
        let (first, body) = &packets(&sent)[0];
        assert_eq!(*first, 0x82);
        let topics = filters(&body[2..], 1);
        world.say(link, vec![0x90, 3, body[0], body[1], 1]);
        let outputs = world.take();
        assert!(outputs.iter().any(|output| matches!(output, Output::Registered { .. })), "{outputs:?}");
        assert!(world.remembered["version"].starts_with("3.1.1@"));
        // A message in 3.1.1 has no properties.
        let mut publish = vec![0x32, 4 + topics[0].len() as u8 + 1, 0, topics[0].len() as u8];
        publish.extend(topics[0].bytes());
        publish.extend([0, 5, b'x']);
        world.say(link, publish);
        let id = world.messages().remove(0).id;
        world.safe(1, &id);
        assert_eq!(world.acks(), [5]);
    }
}

#[test]
fn refused_credentials_are_the_users_to_mend() {
    for answer in [
        connack(false, ConnectReasonCode::BadUserNameOrPassword, Vec::new()),
        connack(false, ConnectReasonCode::NotAuthorized, vec![ReasonString::new("no").unwrap().into()]),
        connack(false, ConnectReasonCode::Banned, Vec::new()),
        connack(false, ConnectReasonCode::ClientIdentifierNotValid, Vec::new()),
    ] {
        let mut world = World::new();
        world.register(1);
        let (link, _) = world.open();
        world.say(link, answer);
        assert_eq!(world.failures(), [(RegistrationId(1), FailureReason::ActionRequired)]);
        assert!(world.session.standing().trouble.is_some());
        world.register(2);
        assert_eq!(world.failures(), [(RegistrationId(2), FailureReason::ActionRequired)]);
        world.pass(TROUBLE_HOLDS);
        world.register(3);
        let link = world.online(false);
        world.grant(link, 1);
        assert_eq!(world.session.standing().trouble, None);
    }
}

#[test]
fn a_session_taken_over_is_not_fought_for() {
    let (mut world, link, _) = World::registered();
    world.say(link, disconnect(DisconnectReasonCode::SessionTakenOver, Vec::new()));
    assert!(world.take().contains(&Output::Close(link)));
    let standing = world.session.standing();
    assert!(standing.trouble.unwrap().contains("two devices"));
    assert!(standing.retry_at.unwrap().since(world.now.boot) >= Duration::from_secs(300));
}

#[test]
fn a_broker_that_takes_and_closes_each_link_is_left_alone() {
    let (mut world, mut link, _) = World::registered();
    for _ in 1..SHORT_LIVES {
        world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
        assert_eq!(world.session.standing().trouble, None);
        link = world.online(true);
    }
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    let standing = world.session.standing();
    assert!(standing.trouble.is_some());
    assert!(standing.retry_at.unwrap().since(world.now.boot) >= Duration::from_secs(300));
    // One that lives ends it.
    let link = world.online(true);
    world.pass(PROVEN);
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    assert_eq!(world.session.standing().trouble, None);
}

#[test]
fn a_busy_broker_is_left_alone_for_a_while() {
    for code in [DisconnectReasonCode::ServerBusy, DisconnectReasonCode::QuotaExceeded] {
        let (mut world, link, _) = World::registered();
        world.say(link, disconnect(code, Vec::new()));
        let standing = world.session.standing();
        assert!(standing.retry_at.unwrap().since(world.now.boot) >= BUSY);
        assert_eq!(standing.trouble, None);
    }
    let mut world = World::with(settings(), &[], vec![channel(1, "up/one")]);
    let (link, _) = world.open();
    world.say(link, connack(false, ConnectReasonCode::ServerBusy, Vec::new()));
    assert!(world.session.standing().retry_at.unwrap().since(world.now.boot) >= BUSY);
}

#[test]
fn a_broker_that_moved_says_where() {
    let (mut world, link, _) = World::registered();
    let place = ServerReference::new("other.example:8883").unwrap().into();
    world.say(link, disconnect(DisconnectReasonCode::ServerMoved, vec![place]));
    assert!(world.session.standing().trouble.unwrap().contains("other.example:8883"));
}

#[test]
fn what_the_broker_assigns_is_taken() {
    let mut world = World::new();
    world.register(1);
    let (link, _) = world.open();
    let properties = vec![
        AssignedClientIdentifier::new("given").unwrap().into(),
        ServerKeepAlive::new(100).unwrap().into(),
        MaximumPacketSize::new(100_000).unwrap().into(),
    ];
    world.say(link, connack(false, ConnectReasonCode::Success, properties));
    assert_eq!(&*world.remembered["client"], "given");
    let heartbeat = world.session.standing().heartbeat.unwrap();
    assert_eq!(heartbeat, Heartbeat { interval: 90 * SECOND, by_server: false });
    assert_eq!(world.session.poll_wake(), Some(world.now.boot + 90 * SECOND));
}

#[test]
fn pings_keep_the_learned_rhythm_and_only_silence_needs_them() {
    let (mut world, link, topic) = World::registered();
    world.take();
    world.pass(heartbeat::START - SECOND);
    assert_eq!(world.sent(), [0_u8; 0]);
    world.say(link, message(&topic, 1, false, "x"));
    world.pass(heartbeat::START - SECOND);
    assert_eq!(world.sent(), [0_u8; 0]);
    world.pass(SECOND);
    assert_eq!(world.sent(), wire::PINGREQ);
    assert_eq!(world.session.poll_wake(), None);
    world.say(link, vec![0xd0, 0]);
    assert_eq!(world.session.poll_wake(), Some(world.now.boot + heartbeat::START));
    for _ in 0..20 {
        let at = world.session.poll_wake().unwrap();
        world.pass(at.since(world.now.boot));
        world.say(link, vec![0xd0, 0]);
    }
    assert_eq!(world.session.standing().heartbeat.unwrap().interval, Duration::from_secs(29 * 60));
    assert!(world.remembered.contains_key("heartbeat"));
    let longer = world.remembered["heartbeat"].clone();
    world.crash(vec![channel(1, &topic)]);
    assert_eq!(world.session.intervals.interval(), Duration::from_secs(29 * 60));
    // On another network one begins anew.
    world.session.set_network(Some("wifi/x".into()), world.now);
    assert_eq!(world.session.intervals.interval(), heartbeat::START);
    assert_eq!(world.remembered["heartbeat"], longer);
}

#[test]
fn a_dead_link_is_found_by_the_ping_and_made_again_at_once() {
    let (mut world, link, _) = World::registered();
    world.pass(heartbeat::START + PROOF_TIMEOUT);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)), "{outputs:?}");
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })));
    world.seen = outputs;
    world.online(true);
    // It was silence that killed it.
    assert_eq!(world.session.standing().heartbeat.unwrap().interval, heartbeat::START / 2);
}

#[test]
fn a_change_of_network_proves_the_link_and_teaches_nothing() {
    let (mut world, link, _) = World::registered();
    world.pass(100 * SECOND);
    world.session.set_network(Some("mobile/x".into()), world.now);
    world.session.handle_network(world.now);
    world.drain();
    assert_eq!(world.sent(), wire::PINGREQ);
    world.pass(PROOF_TIMEOUT);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)));
    world.seen = outputs;
    world.online(true);
    assert_eq!(world.session.standing().heartbeat.unwrap().interval, heartbeat::START);
}

#[test]
fn a_link_that_ends_while_it_is_in_doubt_is_made_anew_at_once() {
    let (mut world, link, _) = World::registered();
    world.session.handle_network(world.now);
    world.take();
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    let outputs = world.take();
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })), "{outputs:?}");
}

#[test]
fn a_link_in_doubt_is_challenged_and_keeps_its_place_if_it_answers_first() {
    let (mut world, link, _) = World::registered();
    world.take();
    world.session.handle_network(world.now);
    world.pass(DOUBT);
    let other = world.connect();
    assert_eq!(world.sent(), wire::PINGREQ);
    world.say(link, vec![0xd0, 0]);
    assert_eq!(world.take(), [Output::Close(other)]);
    world.pass(60 * SECOND);
    assert_eq!(world.take(), []);
}

#[test]
fn a_challenger_takes_the_place_of_a_link_that_does_not_answer() {
    let (mut world, link, topic) = World::registered();
    world.session.handle_network(world.now);
    world.pass(DOUBT);
    let other = world.connect();
    world.sent();
    world.link(other, LinkEvent::Login(Login { username: Some("u".into()), password: None }));
    world.link(other, LinkEvent::Open);
    assert!(world.seen.contains(&Output::Close(link)), "the broker has a session on one link only");
    let connect = world.sent();
    assert_eq!(connect.first(), Some(&0x10), "CONNECT, and nothing before it");
    assert!(connect.ends_with(&[0, 1, b'u']), "with the login of its own link");
    world.say(other, connack(true, ConnectReasonCode::Success, Vec::new()));
    assert_eq!(world.grant(other, 1), [topic]);
    // It breaks while the next challenger is on its way.
    world.session.handle_network(world.now);
    world.pass(DOUBT);
    let third = world.connect();
    world.link(other, LinkEvent::Failed(LinkError::Io("reset".into())));
    world.link(third, LinkEvent::Open);
    world.say(third, connack(true, ConnectReasonCode::Success, Vec::new()));
    assert_eq!(world.session.standing().state, LinkState::Online);
}

#[test]
fn an_attempt_that_was_young_when_the_network_changed_is_soon_made_anew() {
    let mut world = World::new();
    world.register(1);
    let link = world.connect();
    world.pass(SECOND);
    world.session.handle_network(world.now);
    world.drain();
    assert!(!world.seen.contains(&Output::Close(link)));
    world.pass(SECOND);
    assert!(world.seen.contains(&Output::Close(link)));
    assert_ne!(world.connect(), link);
}

#[test]
fn without_leave_there_is_no_link() {
    let (mut world, link, topic) = World::registered();
    world.register(2);
    world.session.set_allowed(false, world.now);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)));
    assert_eq!(world.session.standing().state, LinkState::Off);
    world.seen = outputs;
    assert_eq!(world.failures(), [(RegistrationId(2), FailureReason::Network)]);
    world.session.handle_network(world.now);
    world.register(3);
    assert_eq!(world.failures(), [(RegistrationId(3), FailureReason::Network)]);
    assert_eq!(world.session.poll_timeout(), None);
    world.session.set_allowed(true, world.now);
    world.drain();
    let link = world.online(true);
    assert_eq!(world.grant(link, 1), [topic]);
}

#[test]
fn a_restart_brings_unsafe_messages_again() {
    let (mut world, link, topic) = World::registered();
    world.say(link, message(&topic, 7, false, "one"));
    let first = world.messages().remove(0).id;
    world.session.restart(world.now);
    world.drain();
    let link = world.online(true);
    world.say(link, message(&topic, 7, true, "one"));
    assert_eq!(world.messages()[0].id, first);
}

#[test]
fn a_server_that_breaks_the_protocol_is_left() {
    for bytes in [vec![0x20, 3, 0, 0, 0], vec![0x34, 7, 0, 1, b'a', 0, 1, 0, 0], vec![0xf0, 0], vec![0xff; 8]] {
        let (mut world, link, _) = World::registered();
        world.say(link, bytes);
        let outputs = world.take();
        assert!(outputs.contains(&Output::Close(link)), "{outputs:?}");
        assert!(world.session.standing().retry_at.is_some());
    }
    let mut world = World::new();
    world.register(1);
    let (link, _) = world.open();
    world.say(link, vec![0xd0, 0]);
    assert!(world.take().contains(&Output::Close(link)));
}

proptest! {
    #[test]
    fn nothing_a_server_does_panics_or_spins(
        seed: u64,
        steps in prop::collection::vec((0_u8..12, any::<u8>(), prop::collection::vec(any::<u8>(), 0..24)), 0..120),
    ) {
        let mut world = World::with(settings(), &[("era", "3;1:2")], vec![channel(1, "up/one")]);
        let _ = seed;
        let mut link = None;
        for (what, n, bytes) in steps {
            for output in world.take() {
                match output {
                    Output::Connect { link: asked, .. } => link = Some(asked),
                    Output::Close(closed) if link == Some(closed) => link = None,
                    _ => {}
                }
            }
            match (what, link) {
                (0, _) => world.register(2 + u64::from(n % 8)),
                (1, _) => world.session.unregister(RegistrationId(1 + u64::from(n % 8)), world.now),
                (2, _) => world.session.handle_network(world.now),
                (3, _) => world.session.set_allowed(n > 40, world.now),
                (4, _) => world.session.restart(world.now),
                (5, _) => world.pass(Duration::from_secs(u64::from(n) * 10)),
                (6, Some(link)) => world.link(link, LinkEvent::Open),
                (7, Some(link)) => world.say(link, connack(n % 2 == 0, ConnectReasonCode::Success, Vec::new())),
                (8, Some(link)) => world.say(link, message("up/one", 1 + u16::from(n % 4), n > 127, "x")),
                (9, Some(link)) => world.say(link, bytes),
                (10, Some(link)) => { world.grant(link, if n > 200 { 0x87 } else { 1 }); }
                (11, Some(at)) => {
                    world.link(at, LinkEvent::Closed { code: None, reason: String::new() });
                    link = None;
                }
                _ => {}
            }
        }
        world.pass(Duration::from_secs(3600));
    }
}
