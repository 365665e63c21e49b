//! Packets of MQTT 5.0 and 3.1.1: framing and bounds here, the packets themselves by `mqtt-protocol-core`.

use std::sync::Arc;

use mqtt_protocol_core::mqtt::{
    packet::{
        MaximumPacketSize, Properties, Property, Qos, ReceiveMaximum, RetainHandling, SessionExpiryInterval, SubEntry,
        SubOpts, v3_1_1, v5_0,
    },
    result_code::{ConnectReasonCode, DisconnectReasonCode},
};

use crate::config::MqttVersion;

/// The largest packet taken: 4096 bytes of body, a topic and the properties of a generous gateway.
pub(super) const PACKET_LIMIT: usize = 8 * 1024;
/// What is read of a message larger than that: as much as it takes to say that it is done with.
const HEAD_LIMIT: usize = 1024;
/// An own user property of senders longer than this is none.
const PROPERTY_LIMIT: usize = 64;

/// What the server says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    ConnAck(ConnAck),
    Publish(Publish),
    /// A message over [`PACKET_LIMIT`]: topic, packet id, bytes of the packet.
    TooLarge {
        topic: String,
        packet: Option<u16>,
        size: usize,
    },
    SubAck {
        packet: u16,
        codes: Vec<u8>,
    },
    UnsubAck {
        packet: u16,
    },
    PingResp,
    Disconnect {
        code: u8,
        text: Option<String>,
        server: Option<String>,
    },
}

/// The answer to CONNECT.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ConnAck {
    pub(super) session_present: bool,
    pub(super) refusal: Option<Refusal>,
    pub(super) assigned_client: Option<String>,
    /// Seconds.
    pub(super) keep_alive: Option<u16>,
    /// Seconds.
    pub(super) session_expiry: Option<u32>,
    pub(super) packet_limit: Option<u32>,
    pub(super) at_most_once: bool,
    pub(super) text: Option<String>,
    pub(super) server: Option<String>,
}

/// Why the server will not have this client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It does not speak this version.
    Version,
    /// User name, password, or what they may do.
    Credentials(u8),
    /// The client identifier.
    Client(u8),
    /// Another server is to be used.
    Moved(u8),
    /// Not now.
    Busy(u8),
    /// Anything else.
    Other(u8),
}

/// A message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Publish {
    pub(super) topic: String,
    pub(super) payload: Arc<[u8]>,
    /// `None` for QoS 0.
    pub(super) packet: Option<u16>,
    pub(super) duplicate: bool,
    pub(super) retained: bool,
    /// Seconds it is still of use.
    pub(super) expiry: Option<u32>,
    /// The user properties `id`, `urgency` and `topic`.
    pub(super) id: Option<String>,
    pub(super) urgency: Option<String>,
    pub(super) collapse: Option<String>,
}

/// Why the bytes cannot be gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken(pub(super) &'static str);

/// Cuts bytes into packets. Holds at most [`PACKET_LIMIT`] and what came with one call.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    bytes: Vec<u8>,
    at: usize,
    /// The rest of a message that is too large.
    skip: usize,
}

impl Decoder {
    /// The next bytes.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.bytes.extend_from_slice(&bytes[skipped..]);
    }

    /// The next packet, if it is complete. After an error nothing more comes.
    pub(super) fn next(&mut self, version: MqttVersion) -> Result<Option<Incoming>, Broken> {
        let rest = &self.bytes[self.at..];
        let Some((first, length, header)) = fixed_header(rest)? else {
            self.compact();
            return Ok(None);
        };
        let size = header + length;
        if size > PACKET_LIMIT {
            let head = rest.len().min(size);
            if head < HEAD_LIMIT.min(size) {
                return Ok(None);
            }
            let (topic, packet) = publish_head(first, &rest[header..head])?;
            self.at += head;
            self.skip = size - head;
            self.compact();
            return Ok(Some(Incoming::TooLarge { topic, packet, size }));
        }
        if rest.len() < size {
            self.compact();
            return Ok(None);
        }
        let packet = match version {
            MqttVersion::V5 => parse_v5(first, &rest[header..size]),
            MqttVersion::V3 => parse_v3(first, &rest[header..size]),
        }?;
        self.at += size;
        Ok(Some(packet))
    }

    fn compact(&mut self) {
        if self.at == self.bytes.len() {
            // Nothing is kept for a link that is silent nearly always.
            self.bytes = Vec::new();
        } else if self.at > 0 {
            self.bytes.drain(..self.at);
        }
        self.at = 0;
    }
}

/// First byte, remaining length, and length of the header itself (MQTT 5.0 §2.1).
fn fixed_header(bytes: &[u8]) -> Result<Option<(u8, usize, usize)>, Broken> {
    let Some((first, rest)) = bytes.split_first() else { return Ok(None) };
    let mut length = 0;
    for (index, byte) in rest.iter().take(4).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some((*first, length, index + 2)));
        }
    }
    if rest.len() >= 4 { Err(Broken("a packet's length is none")) } else { Ok(None) }
}

/// Topic and packet id of a message of which only the beginning is there.
fn publish_head(first: u8, bytes: &[u8]) -> Result<(String, Option<u16>), Broken> {
    const PROBLEM: Broken = Broken("a packet is larger than any may be");
    if first >> 4 != 3 {
        return Err(PROBLEM);
    }
    let (length, rest) = bytes.split_first_chunk::<2>().ok_or(PROBLEM)?;
    let (topic, rest) = rest.split_at_checked(u16::from_be_bytes(*length).into()).ok_or(PROBLEM)?;
    let topic = std::str::from_utf8(topic).map_err(|_| PROBLEM)?.to_owned();
    let packet = match first >> 1 & 3 {
        0 => None,
        1 => Some(rest.first_chunk::<2>().map(|id| u16::from_be_bytes(*id)).filter(|id| *id != 0).ok_or(PROBLEM)?),
        _ => return Err(Broken("a message came with QoS 2, which was not asked for")),
    };
    Ok((topic, packet))
}

const MALFORMED: Broken = Broken("a packet is malformed");
const OUT_OF_TURN: Broken = Broken("a packet came that a server must not send");

fn parse_v5(first: u8, body: &[u8]) -> Result<Incoming, Broken> {
    // A server that knows no version 5 may answer in the form of 3.1.1.
    if first == 0x20
        && let [0, 1] = body
    {
        return Ok(Incoming::ConnAck(ConnAck { refusal: Some(Refusal::Version), ..ConnAck::default() }));
    }
    match (first >> 4, first & 0xf) {
        (2, 0) => {
            if body.first().is_some_and(|flags| flags & 0xfe != 0) {
                return Err(MALFORMED);
            }
            let ack = whole(v5_0::Connack::parse(body), body)?;
            Ok(Incoming::ConnAck(connack_v5(&ack)))
        }
        (3, flags) => {
            let packet = v5_0::Publish::parse(flags, body.into()).map_err(|_| MALFORMED)?.0;
            let mut publish = Publish {
                topic: packet.topic_name().to_owned(),
                payload: packet.payload().as_slice().into(),
                packet: checked_id(packet.qos(), packet.packet_id(), packet.dup())?,
                duplicate: packet.dup(),
                retained: packet.retain(),
                expiry: None,
                id: None,
                urgency: None,
                collapse: None,
            };
            for property in packet.props() {
                match property {
                    Property::MessageExpiryInterval(secs) => publish.expiry = Some(secs.val()),
                    Property::TopicAlias(_) => return Err(Broken("a topic alias came, which was not asked for")),
                    Property::UserProperty(pair) => {
                        let of_ours = match pair.key() {
                            "id" => &mut publish.id,
                            "urgency" => &mut publish.urgency,
                            "topic" => &mut publish.collapse,
                            _ => continue,
                        };
                        let usable = (1..=PROPERTY_LIMIT).contains(&pair.val().len());
                        if usable && pair.val().bytes().all(|byte| byte.is_ascii_graphic()) {
                            *of_ours = Some(pair.val().to_owned());
                        }
                    }
                    _ => {}
                }
            }
            checked_topic(&publish.topic)?;
            Ok(Incoming::Publish(publish))
        }
        (9, 0) => {
            let ack = whole(v5_0::Suback::parse(body), body)?;
            let codes = ack.reason_codes().into_iter().map(|code| code as u8).collect();
            Ok(Incoming::SubAck { packet: ack.packet_id(), codes })
        }
        (11, 0) => {
            let ack = whole(v5_0::Unsuback::parse(body), body)?;
            Ok(Incoming::UnsubAck { packet: ack.packet_id() })
        }
        (13, 0) if body.is_empty() => Ok(Incoming::PingResp),
        (14, 0) => {
            let packet = whole(v5_0::Disconnect::parse(body), body)?;
            let code = packet.reason_code().map_or(0, |code| code as u8);
            let (mut text, mut server) = (None, None);
            for property in packet.props().iter().flatten() {
                match property {
                    Property::ReasonString(reason) => text = Some(printable(reason.val())),
                    Property::ServerReference(reference) => server = Some(printable(reference.val())),
                    _ => {}
                }
            }
            Ok(Incoming::Disconnect { code, text, server })
        }
        _ => Err(OUT_OF_TURN),
    }
}

fn connack_v5(packet: &v5_0::Connack) -> ConnAck {
    let mut ack = ConnAck { session_present: packet.session_present(), ..ConnAck::default() };
    let code = packet.reason_code();
    ack.refusal = match code {
        ConnectReasonCode::Success => None,
        ConnectReasonCode::UnsupportedProtocolVersion => Some(Refusal::Version),
        ConnectReasonCode::BadUserNameOrPassword
        | ConnectReasonCode::NotAuthorized
        | ConnectReasonCode::Banned
        | ConnectReasonCode::BadAuthenticationMethod => Some(Refusal::Credentials(code as u8)),
        ConnectReasonCode::ClientIdentifierNotValid => Some(Refusal::Client(code as u8)),
        ConnectReasonCode::UseAnotherServer | ConnectReasonCode::ServerMoved => Some(Refusal::Moved(code as u8)),
        ConnectReasonCode::ServerUnavailable
        | ConnectReasonCode::ServerBusy
        | ConnectReasonCode::QuotaExceeded
        | ConnectReasonCode::ConnectionRateExceeded => Some(Refusal::Busy(code as u8)),
        _ => Some(Refusal::Other(code as u8)),
    };
    for property in packet.props() {
        match property {
            Property::AssignedClientIdentifier(id) => ack.assigned_client = Some(id.val().to_owned()),
            Property::ServerKeepAlive(secs) => ack.keep_alive = Some(secs.val()),
            Property::SessionExpiryInterval(secs) => ack.session_expiry = Some(secs.val()),
            Property::MaximumPacketSize(size) => ack.packet_limit = Some(size.val()),
            Property::MaximumQos(qos) => ack.at_most_once = qos.val() == 0,
            Property::ReasonString(reason) => ack.text = Some(printable(reason.val())),
            Property::ServerReference(reference) => ack.server = Some(printable(reference.val())),
            // Receive Maximum bounds what we publish: nothing.
            _ => {}
        }
    }
    ack
}

fn parse_v3(first: u8, body: &[u8]) -> Result<Incoming, Broken> {
    match (first >> 4, first & 0xf) {
        (2, 0) => match body {
            [flags @ (0 | 1), code] => {
                let refusal = match code {
                    0 => None,
                    1 => Some(Refusal::Version),
                    2 => Some(Refusal::Client(2)),
                    3 => Some(Refusal::Busy(3)),
                    4 | 5 => Some(Refusal::Credentials(*code)),
                    _ => Some(Refusal::Other(*code)),
                };
                Ok(Incoming::ConnAck(ConnAck { session_present: *flags == 1, refusal, ..ConnAck::default() }))
            }
            _ => Err(MALFORMED),
        },
        (3, flags) => {
            let packet = v3_1_1::Publish::parse(flags, body.into()).map_err(|_| MALFORMED)?.0;
            checked_topic(packet.topic_name())?;
            Ok(Incoming::Publish(Publish {
                topic: packet.topic_name().to_owned(),
                payload: packet.payload().as_slice().into(),
                packet: checked_id(packet.qos(), packet.packet_id(), packet.dup())?,
                duplicate: packet.dup(),
                retained: packet.retain(),
                expiry: None,
                id: None,
                urgency: None,
                collapse: None,
            }))
        }
        (9, 0) => {
            let ack = whole(v3_1_1::Suback::parse(body), body)?;
            let codes = ack.return_codes().into_iter().map(|code| code as u8).collect();
            Ok(Incoming::SubAck { packet: ack.packet_id(), codes })
        }
        (11, 0) => {
            let ack = whole(v3_1_1::Unsuback::parse(body), body)?;
            Ok(Incoming::UnsubAck { packet: ack.packet_id() })
        }
        (13, 0) if body.is_empty() => Ok(Incoming::PingResp),
        _ => Err(OUT_OF_TURN),
    }
}

/// The packet, if it is all there is.
fn whole<T, E>(parsed: Result<(T, usize), E>, body: &[u8]) -> Result<T, Broken> {
    match parsed {
        Ok((packet, used)) if used == body.len() => Ok(packet),
        Ok(_) | Err(_) => Err(MALFORMED),
    }
}

fn checked_id(qos: Qos, packet: Option<u16>, duplicate: bool) -> Result<Option<u16>, Broken> {
    match (qos, packet) {
        (Qos::AtMostOnce, None) if !duplicate => Ok(None),
        (Qos::AtLeastOnce, Some(1..)) => Ok(packet),
        (Qos::ExactlyOnce, _) => Err(Broken("a message came with QoS 2, which was not asked for")),
        _ => Err(MALFORMED),
    }
}

fn checked_topic(topic: &str) -> Result<(), Broken> {
    let bad = topic.is_empty() || topic.contains(['+', '#', '\0']);
    if bad { Err(Broken("a message's topic is none")) } else { Ok(()) }
}

/// What this client says of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Connect<'a> {
    pub(super) client: &'a str,
    pub(super) username: Option<&'a str>,
    pub(super) password: Option<&'a str>,
    /// Seconds.
    pub(super) keep_alive: u16,
    /// Seconds.
    pub(super) session_expiry: u32,
    pub(super) receive_maximum: u16,
}

impl Connect<'_> {
    /// The packet; `None` when the credentials do not fit into one.
    pub(super) fn to_bytes(self, version: MqttVersion) -> Option<Vec<u8>> {
        // 3.1.1 has no password without a user name, and not every server of 5 bears one.
        let username = self.username.or(self.password.map(|_| ""));
        match version {
            MqttVersion::V5 => {
                let properties: Properties = vec![
                    SessionExpiryInterval::new(self.session_expiry).ok()?.into(),
                    ReceiveMaximum::new(self.receive_maximum).ok()?.into(),
                    MaximumPacketSize::new(u32::try_from(PACKET_LIMIT).ok()?).ok()?.into(),
                ];
                let mut connect = v5_0::Connect::builder()
                    .client_id(self.client)
                    .ok()?
                    .clean_start(false)
                    .keep_alive(self.keep_alive);
                if let Some(name) = username {
                    connect = connect.user_name(name).ok()?;
                }
                if let Some(password) = self.password {
                    connect = connect.password(password).ok()?;
                }
                Some(connect.props(properties).build().ok()?.to_continuous_buffer())
            }
            MqttVersion::V3 => {
                let mut connect = v3_1_1::Connect::builder()
                    .client_id(self.client)
                    .ok()?
                    .clean_session(false)
                    .keep_alive(self.keep_alive);
                if let Some(name) = username {
                    connect = connect.user_name(name).ok()?;
                }
                if let Some(password) = self.password {
                    connect = connect.password(password).ok()?;
                }
                Some(connect.build().ok()?.to_continuous_buffer())
            }
        }
    }
}

/// SUBSCRIBE with QoS 1.
pub(super) fn subscribe(version: MqttVersion, packet: u16, topics: &[Arc<str>]) -> Option<Vec<u8>> {
    let entries = topics.iter().map(|topic| {
        // A retained message once, when the subscription is new; and marked as such also while it is live, because it
        // may come again as a retained one.
        let options = match version {
            MqttVersion::V5 => {
                SubOpts::new().set_qos(Qos::AtLeastOnce).set_rap(true).set_rh(RetainHandling::SendRetainedIfNotExists)
            }
            MqttVersion::V3 => SubOpts::new().set_qos(Qos::AtLeastOnce),
        };
        SubEntry::new(&**topic, options).ok()
    });
    let entries: Vec<SubEntry> = entries.collect::<Option<_>>()?;
    Some(match version {
        MqttVersion::V5 => {
            v5_0::Subscribe::builder().packet_id(packet).entries(entries).build().ok()?.to_continuous_buffer()
        }
        MqttVersion::V3 => {
            v3_1_1::Subscribe::builder().packet_id(packet).entries(entries).build().ok()?.to_continuous_buffer()
        }
    })
}

/// UNSUBSCRIBE.
pub(super) fn unsubscribe(version: MqttVersion, packet: u16, topics: &[Arc<str>]) -> Option<Vec<u8>> {
    let topics: Vec<&str> = topics.iter().map(|topic| &**topic).collect();
    Some(match version {
        MqttVersion::V5 => {
            v5_0::Unsubscribe::builder().packet_id(packet).entries(topics).ok()?.build().ok()?.to_continuous_buffer()
        }
        MqttVersion::V3 => {
            v3_1_1::Unsubscribe::builder().packet_id(packet).entries(topics).ok()?.build().ok()?.to_continuous_buffer()
        }
    })
}

/// PUBACK: the same four bytes in both versions.
pub(super) fn puback(packet: u16) -> [u8; 4] {
    let [high, low] = packet.to_be_bytes();
    [0x40, 2, high, low]
}

/// PINGREQ: the same two bytes in both versions.
pub(super) const PINGREQ: [u8; 2] = [0xc0, 0];

/// How this client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leave {
    /// To come back.
    Keeping,
    /// For good: the server may forget the session.
    Ending,
    /// Because the server broke the protocol.
    Malformed,
    /// Because more was on the way than allowed.
    ReceiveMaximum,
}

/// DISCONNECT; 3.1.1 has one form only, and none for an error.
pub(super) fn disconnect(version: MqttVersion, leave: Leave) -> Option<Vec<u8>> {
    match (version, leave) {
        (_, Leave::Keeping) | (MqttVersion::V3, Leave::Ending) => Some(vec![0xe0, 0]),
        (MqttVersion::V3, Leave::Malformed | Leave::ReceiveMaximum) => None,
        (MqttVersion::V5, _) => {
            let (code, properties) = match leave {
                Leave::Malformed => (DisconnectReasonCode::MalformedPacket, Properties::new()),
                Leave::ReceiveMaximum => (DisconnectReasonCode::ReceiveMaximumExceeded, Properties::new()),
                Leave::Keeping | Leave::Ending => {
                    (DisconnectReasonCode::NormalDisconnection, vec![SessionExpiryInterval::new(0).ok()?.into()])
                }
            };
            let packet = v5_0::Disconnect::builder().reason_code(code).props(properties).build().ok()?;
            Some(packet.to_continuous_buffer())
        }
    }
}

/// A server's text for the log: short, in one line.
fn printable(text: &str) -> String {
    text.chars().take(120).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOTH: [MqttVersion; 2] = [MqttVersion::V5, MqttVersion::V3];

    fn all(decoder: &mut Decoder, version: MqttVersion) -> Result<Vec<Incoming>, Broken> {
        let mut packets = Vec::new();
        while let Some(packet) = decoder.next(version)? {
            packets.push(packet);
        }
        Ok(packets)
    }

    fn publish(version: MqttVersion, topic: &str, packet: u16, payload: &[u8]) -> Vec<u8> {
        match version {
            MqttVersion::V5 => {
                let properties = vec![
                    mqtt_protocol_core::mqtt::packet::MessageExpiryInterval::new(60).unwrap().into(),
                    mqtt_protocol_core::mqtt::packet::UserProperty::new("urgency", "high").unwrap().into(),
                    mqtt_protocol_core::mqtt::packet::UserProperty::new("id", "a b").unwrap().into(),
                ];
                let builder = v5_0::Publish::builder().topic_name(topic).unwrap().qos(Qos::AtLeastOnce);
                let builder = builder.packet_id(packet).payload(payload).props(properties);
                builder.build().unwrap().to_continuous_buffer()
            }
            MqttVersion::V3 => {
                let builder = v3_1_1::Publish::builder().topic_name(topic).unwrap().qos(Qos::AtLeastOnce);
                builder.packet_id(packet).payload(payload).build().unwrap().to_continuous_buffer()
            }
        }
    }

    /// The beginnings of packets servers send, so that random bytes get past the first check.
    fn beginning() -> impl Strategy<Value = u8> {
        prop_oneof![
            any::<u8>(),
            prop::sample::select(vec![0x20_u8, 0x30, 0x32, 0x33, 0x3a, 0x3b, 0x34, 0x40, 0x90, 0xb0, 0xd0, 0xe0, 0xf0]),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_cut_anywhere_are_survived_within_bounds(
            packets in prop::collection::vec((beginning(), prop::collection::vec(any::<u8>(), 0..40), any::<bool>()), 1..6),
            cuts in prop::collection::vec(1_usize..30, 1..8),
        ) {
            let mut bytes = Vec::new();
            for (first, body, honest) in packets {
                bytes.push(first);
                if honest {
                    bytes.push(body.len() as u8);
                }
                bytes.extend(body);
            }
            for version in BOTH {
                let mut decoder = Decoder::default();
                let (mut rest, mut cut) = (&bytes[..], cuts.iter().cycle());
                while !rest.is_empty() {
                    let (piece, after) = rest.split_at((*cut.next().unwrap()).min(rest.len()));
                    rest = after;
                    decoder.feed(piece);
                    if all(&mut decoder, version).is_err() {
                        break;
                    }
                    prop_assert!(decoder.bytes.len() <= PACKET_LIMIT + 30);
                }
            }
        }

        #[test]
        fn a_changed_byte_of_a_message_is_survived(at in 0_usize..120, byte: u8, version in prop::sample::select(BOTH.to_vec())) {
            let mut bytes = publish(version, "up/topic", 7, b"some body");
            let at = at % bytes.len();
            bytes[at] = byte;
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            let _ = all(&mut decoder, version);
        }

        #[test]
        fn a_message_comes_whole_however_it_is_cut(cut in 1_usize..64, length in 0_usize..4097) {
            for version in BOTH {
                let payload = vec![b'x'; length];
                let bytes = publish(version, "up/topic", 9, &payload);
                let mut decoder = Decoder::default();
                let mut packets = Vec::new();
                for piece in bytes.chunks(cut) {
                    decoder.feed(piece);
                    packets.extend(all(&mut decoder, version).unwrap());
                }
                prop_assert_eq!(packets.len(), 1);
                let Incoming::Publish(publish) = &packets[0] else { panic!("{packets:?}") };
                prop_assert_eq!((&*publish.topic, publish.packet), ("up/topic", Some(9)));
                prop_assert_eq!(&*publish.payload, &payload[..]);
                prop_assert_eq!(publish.expiry, (version == MqttVersion::V5).then_some(60));
                prop_assert_eq!(publish.urgency.as_deref(), (version == MqttVersion::V5).then_some("high"));
                prop_assert_eq!(&publish.id, &None);
                prop_assert_eq!(decoder.bytes.capacity(), 0);
            }
        }
    }

    #[test]
    fn a_message_too_large_is_passed_over_without_being_held() {
        for version in BOTH {
            let mut bytes = publish(version, "up/topic", 9, &vec![b'x'; 3_000_000]);
            bytes.extend(publish(version, "up/next", 10, b"next"));
            let mut decoder = Decoder::default();
            let (mut packets, mut most) = (Vec::new(), 0);
            for piece in bytes.chunks(1400) {
                decoder.feed(piece);
                packets.extend(all(&mut decoder, version).unwrap());
                most = most.max(decoder.bytes.capacity());
            }
            let Incoming::TooLarge { topic, packet, size } = &packets[0] else { panic!("{packets:?}") };
            assert_eq!((&**topic, *packet), ("up/topic", Some(9)));
            assert!((3_000_000..3_000_100).contains(size));
            let Incoming::Publish(publish) = &packets[1] else { panic!("{packets:?}") };
            assert_eq!(publish.topic, "up/next");
            assert!(most <= 2 * PACKET_LIMIT, "{most}");
        }
    }

    #[test]
    fn a_server_of_311_refuses_version_5_in_its_own_form() {
        for bytes in [&[0x20, 2, 0, 1][..], &[0x20, 3, 0, 0x84, 0]] {
            let mut decoder = Decoder::default();
            decoder.feed(bytes);
            let Ok(Some(Incoming::ConnAck(ack))) = decoder.next(MqttVersion::V5) else { panic!("{bytes:?}") };
            assert_eq!(ack.refusal, Some(Refusal::Version));
        }
    }

    #[test]
    fn what_no_server_may_send_is_refused() {
        for (version, bytes) in [
            (MqttVersion::V5, &[0x10, 0][..]),
            (MqttVersion::V5, &[0xf0, 2, 0x18, 0]),
            (MqttVersion::V3, &[0xe0, 0]),
            (MqttVersion::V3, &[0x62, 2, 0, 1]),
            // QoS 2, QoS 0 with DUP, packet id 0, a wildcard, a topic alias.
            (MqttVersion::V3, &[0x34, 5, 0, 1, b'a', 0, 1]),
            (MqttVersion::V3, &[0x38, 3, 0, 1, b'a']),
            (MqttVersion::V3, &[0x32, 5, 0, 1, b'a', 0, 0]),
            (MqttVersion::V3, &[0x30, 3, 0, 1, b'+']),
            (MqttVersion::V5, &[0x30, 7, 0, 1, b'a', 3, 0x23, 0, 1]),
            (MqttVersion::V5, &[0xd0, 1, 0]),
            (MqttVersion::V5, &[0x20, 4, 0, 0, 0, 0]),
            (MqttVersion::V5, &[0x90, 0xff, 0xff, 0xff, 0xff]),
        ] {
            let mut decoder = Decoder::default();
            decoder.feed(bytes);
            assert!(decoder.next(version).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn the_fixed_packets_are_those_of_the_crate() {
        assert_eq!(puback(513)[..], v5_0::Puback::builder().packet_id(513).build().unwrap().to_continuous_buffer());
        assert_eq!(
            puback(513)[..],
            v3_1_1::Puback::builder().packet_id(513_u16).build().unwrap().to_continuous_buffer()
        );
        assert_eq!(PINGREQ[..], v5_0::Pingreq::new().to_continuous_buffer());
        let kept = v5_0::Disconnect::builder().build().unwrap().to_continuous_buffer();
        assert_eq!(disconnect(MqttVersion::V5, Leave::Keeping), Some(kept));
    }
}
