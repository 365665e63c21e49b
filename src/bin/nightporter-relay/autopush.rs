//! The autopush WebSocket protocol's frames (reference/push.md §3a), bytes to types and back; no state.

use std::sync::Arc;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use nightporter::model::Urgency;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::token::Uaid;

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ClientFrame {
    /// The first frame. `None` is a new client.
    Hello(Option<Uaid>),
    /// Make a channel.
    Register {
        /// Its name.
        channel: ChannelId,
        /// VAPID public key, unchecked.
        key: Option<String>,
    },
    /// Give a channel up.
    Unregister(ChannelId),
    /// These versions are safe.
    Ack(Vec<Arc<str>>),
    /// A message could not be handled: counted by autopush, changes nothing.
    Nack,
    /// Asks for broadcasts, of which there are none.
    BroadcastSubscribe,
    /// `{}`.
    Ping,
}

/// What makes the connection end with 1011.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    /// Not JSON, not an object, an unknown type, a field of another type.
    #[error("invalid message")]
    Invalid,
    /// A channel id in another writing.
    #[error("channelID must be a lower-case dashed UUID")]
    Channel,
}

/// A channel's name: a UUID in lower case with dashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChannelId(Arc<str>);

impl ChannelId {
    /// Checks the writing.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let uuid = Uuid::try_parse(text).ok()?;
        (uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == text).then(|| Self(text.into()))
    }

    /// As stored.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A message on its way to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// Its place in the store; `None` for TTL 0, which is never stored.
    pub(crate) seq: Option<i64>,
    /// Its unguessable id: the device acknowledges it, the sender deletes it by it.
    pub(crate) version: Arc<str>,
    /// The channel it came in through.
    pub(crate) channel: Arc<str>,
    /// The body.
    pub(crate) data: Arc<[u8]>,
    /// `Content-Encoding`.
    pub(crate) encoding: Option<Arc<str>>,
    /// `Encryption`.
    pub(crate) encryption: Option<Arc<str>>,
    /// `Crypto-Key`.
    pub(crate) crypto_key: Option<Arc<str>>,
    /// Unix seconds.
    pub(crate) expires: i64,
    /// RFC 8030 §5.4.
    pub(crate) topic: Option<Arc<str>>,
    /// RFC 8030 §5.3.
    pub(crate) urgency: Urgency,
}

impl ClientFrame {
    /// Read one text frame.
    pub(crate) fn parse(text: &str) -> Result<Self, FrameError> {
        if text.trim() == "{}" {
            return Ok(Self::Ping);
        }
        match serde_json::from_str(text).map_err(|_| FrameError::Invalid)? {
            Raw::Hello { uaid } => Ok(Self::Hello(uaid.as_deref().and_then(Uaid::parse))),
            Raw::Register { channel, key } => {
                ChannelId::parse(&channel).map(|channel| Self::Register { channel, key }).ok_or(FrameError::Channel)
            }
            Raw::Unregister { channel } => ChannelId::parse(&channel).map(Self::Unregister).ok_or(FrameError::Channel),
            Raw::Ack { updates } => Ok(Self::Ack(updates.into_iter().map(|update| update.version.into()).collect())),
            Raw::Nack {} => Ok(Self::Nack),
            Raw::BroadcastSubscribe {} => Ok(Self::BroadcastSubscribe),
            Raw::Ping {} => Ok(Self::Ping),
        }
    }
}

/// The answer to `hello`.
pub(crate) fn hello(uaid: &Uaid) -> String {
    encode(&Reply::Hello { uaid: uaid.reveal(), status: 200, use_webpush: true, broadcasts: Empty {} })
}

/// The answer to `register`. For a status other than 200, `endpoint` is a text for people, as autopush does it.
pub(crate) fn register(channel: &ChannelId, status: u16, endpoint: &str) -> String {
    encode(&Reply::Register { channel: channel.as_str(), status, endpoint })
}

/// The answer to `unregister`.
pub(crate) fn unregister(channel: &ChannelId, status: u16) -> String {
    encode(&Reply::Unregister { channel: channel.as_str(), status })
}

/// The answer to a ping.
pub(crate) fn pong() -> String {
    "{}".to_owned()
}

/// A message. `ttl` (seconds left), `topic` and `urgency` are our extension: clients that do not know them ignore
/// them, `nightporterd` honours them for its own waiting messages.
pub(crate) fn notification(message: &Message, now: i64) -> String {
    let Message { version, channel, data, encoding, encryption, crypto_key, expires, topic, urgency, .. } = message;
    let has_headers = encoding.is_some() || encryption.is_some() || crypto_key.is_some();
    encode(&Reply::Notification {
        channel,
        version,
        data: (!data.is_empty()).then(|| BASE64_URL_SAFE_NO_PAD.encode(data)),
        headers: has_headers.then_some(KeptHeaders {
            encoding: encoding.as_deref(),
            encryption: encryption.as_deref(),
            crypto_key: crypto_key.as_deref(),
        }),
        ttl: expires.saturating_sub(now).max(0),
        topic: topic.as_deref(),
        urgency: *urgency,
    })
}

fn encode(reply: &Reply<'_>) -> String {
    // Strings and numbers only: serialising them cannot fail.
    serde_json::to_string(reply).unwrap_or_default()
}

#[derive(Deserialize)]
#[serde(tag = "messageType", rename_all = "snake_case")]
enum Raw {
    Hello {
        uaid: Option<String>,
    },
    Register {
        #[serde(rename = "channelID")]
        channel: String,
        key: Option<String>,
    },
    Unregister {
        #[serde(rename = "channelID")]
        channel: String,
    },
    Ack {
        updates: Vec<Update>,
    },
    Nack {},
    BroadcastSubscribe {},
    Ping {},
}

#[derive(Deserialize)]
struct Update {
    version: String,
}

#[derive(Serialize)]
#[serde(tag = "messageType", rename_all = "snake_case")]
enum Reply<'a> {
    Hello {
        uaid: &'a str,
        status: u16,
        use_webpush: bool,
        broadcasts: Empty,
    },
    Register {
        #[serde(rename = "channelID")]
        channel: &'a str,
        status: u16,
        #[serde(rename = "pushEndpoint")]
        endpoint: &'a str,
    },
    Unregister {
        #[serde(rename = "channelID")]
        channel: &'a str,
        status: u16,
    },
    Notification {
        #[serde(rename = "channelID")]
        channel: &'a str,
        version: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        data: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        headers: Option<KeptHeaders<'a>>,
        ttl: i64,
        #[serde(skip_serializing_if = "Option::is_none")]
        topic: Option<&'a str>,
        urgency: Urgency,
    },
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct KeptHeaders<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encryption: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    crypto_key: Option<&'a str>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANNEL: &str = "d5d2a1c4-0c0a-4a5e-9d0a-0123456789ab";

    fn parse(text: &str) -> Result<ClientFrame, FrameError> {
        ClientFrame::parse(text)
    }

    #[test]
    fn reads_what_clients_send() {
        let channel = ChannelId::parse(CHANNEL).unwrap();
        let uaid = Uaid::parse("0123456789abcdef0123456789abcdef");
        let frames = [
            (r#"{"messageType":"hello"}"#.to_owned(), ClientFrame::Hello(None)),
            (
                r#"{"messageType":"hello","uaid":null,"use_webpush":true,"broadcasts":{}}"#.into(),
                ClientFrame::Hello(None),
            ),
            (r#"{"messageType":"hello","uaid":"","channelIDs":["x"]}"#.into(), ClientFrame::Hello(None)),
            (r#"{"uaid":"0123456789abcdef0123456789abcdef","messageType":"hello"}"#.into(), ClientFrame::Hello(uaid)),
            (
                format!(r#"{{"messageType":"register","channelID":"{CHANNEL}","key":"k"}}"#),
                ClientFrame::Register { channel: channel.clone(), key: Some("k".into()) },
            ),
            (
                format!(r#"{{"messageType":"unregister","channelID":"{CHANNEL}","code":200}}"#),
                ClientFrame::Unregister(channel),
            ),
            (
                r#"{"messageType":"ack","updates":[{"channelID":"x","version":"v","code":100},{"version":"w"}]}"#
                    .into(),
                ClientFrame::Ack(vec!["v".into(), "w".into()]),
            ),
            (r#"{"messageType":"nack","version":"v","code":302}"#.into(), ClientFrame::Nack),
            (r#"{"messageType":"broadcast_subscribe","broadcasts":{}}"#.into(), ClientFrame::BroadcastSubscribe),
            (r#"{"messageType":"ping"}"#.into(), ClientFrame::Ping),
            (" {} ".into(), ClientFrame::Ping),
        ];
        for (text, frame) in frames {
            assert_eq!(parse(&text), Ok(frame), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        for text in [
            "",
            "null",
            "[]",
            "{",
            r#"{"messageType":"purge"}"#,
            r#"{"messageType":7}"#,
            r#"{"type":"hello"}"#,
            r#"{"messageType":"hello","uaid":7}"#,
            r#"{"messageType":"register"}"#,
            r#"{"messageType":"ack","updates":[{"channelID":"x"}]}"#,
        ] {
            assert_eq!(parse(text), Err(FrameError::Invalid), "{text}");
        }
        for channel in ["", "x", &CHANNEL.to_uppercase(), &CHANNEL.replace('-', ""), &format!("{{{CHANNEL}}}")] {
            let text = format!(r#"{{"messageType":"register","channelID":"{channel}"}}"#);
            assert_eq!(parse(&text), Err(FrameError::Channel), "{text}");
        }
    }

    #[test]
    fn writes_a_notification_with_the_extension_fields() {
        let mut message = Message {
            seq: Some(1),
            version: "v".into(),
            channel: CHANNEL.into(),
            data: Arc::from(&b"\xff\xfe\xfd"[..]),
            encoding: Some("aes128gcm".into()),
            encryption: None,
            crypto_key: None,
            expires: 160,
            topic: Some("t".into()),
            urgency: Urgency::VeryLow,
        };
        assert_eq!(
            notification(&message, 100),
            format!(
                r#"{{"messageType":"notification","channelID":"{CHANNEL}","version":"v","data":"__79","headers":{{"encoding":"aes128gcm"}},"ttl":60,"topic":"t","urgency":"very-low"}}"#
            )
        );
        message = Message { data: Arc::from([]), encoding: None, topic: None, urgency: Urgency::Normal, ..message };
        assert_eq!(
            notification(&message, 200),
            format!(
                r#"{{"messageType":"notification","channelID":"{CHANNEL}","version":"v","ttl":0,"urgency":"normal"}}"#
            )
        );
    }
}
