//! Frames of the autopush protocol (push.md §3a): JSON in, JSON out, no state.

use base64::{
    Engine as _,
    alphabet::URL_SAFE,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::{Deserialize, Serialize};

/// Firefox sends its bodies without padding, other senders with it.
const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// A frame from the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    Hello {
        status: u16,
        uaid: Option<String>,
    },
    Register {
        channel: String,
        status: u16,
        endpoint: Option<String>,
    },
    Notification(Notification),
    /// An unregister reply, a broadcast, the answer to a ping: nothing follows from it.
    Nothing,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Notification {
    #[serde(rename = "channelID")]
    pub(super) channel: String,
    pub(super) version: String,
    pub(super) data: Option<String>,
    /// Seconds; an extension of `nightporter-relay`, as are the next two.
    pub(super) ttl: Option<u64>,
    pub(super) topic: Option<String>,
    pub(super) urgency: Option<String>,
}

impl Notification {
    /// The body, or why it cannot be had.
    pub(super) fn body(&self) -> Result<Vec<u8>, String> {
        let data = self.data.as_deref().unwrap_or_default();
        BASE64URL.decode(data).map_err(|error| format!("not base64url: {error}"))
    }
}

/// Reads a frame; the error says what is wrong with it, without quoting it.
pub(super) fn parse(text: &str) -> Result<Incoming, String> {
    #[derive(Deserialize)]
    struct Kind {
        #[serde(rename = "messageType")]
        kind: Option<String>,
    }
    #[derive(Deserialize)]
    struct Hello {
        status: Option<u16>,
        uaid: Option<String>,
    }
    #[derive(Deserialize)]
    struct Register {
        #[serde(rename = "channelID")]
        channel: String,
        status: u16,
        #[serde(rename = "pushEndpoint")]
        endpoint: Option<String>,
    }
    // Two passes, so that a broken field of one kind of frame says nothing of another kind. serde_json's messages give
    // a place and a type, and a value only for an enum's name, of which there is none.
    let reason = |error: serde_json::Error| format!("{:?} at column {}", error.classify(), error.column());
    let kind = serde_json::from_str::<Kind>(text).map_err(reason)?.kind;
    match kind.as_deref() {
        Some("hello") => {
            let hello: Hello = serde_json::from_str(text).map_err(reason)?;
            Ok(Incoming::Hello {
                status: hello.status.unwrap_or(200),
                uaid: hello.uaid.filter(|uaid| !uaid.is_empty()),
            })
        }
        Some("register") => {
            let reply: Register = serde_json::from_str(text).map_err(reason)?;
            Ok(Incoming::Register { channel: reply.channel, status: reply.status, endpoint: reply.endpoint })
        }
        Some("notification") => Ok(Incoming::Notification(serde_json::from_str(text).map_err(reason)?)),
        None | Some("unregister" | "broadcast" | "ping" | "urgency") => Ok(Incoming::Nothing),
        Some(_) => Err("of an unknown type".into()),
    }
}

/// A frame to the server.
#[derive(Serialize)]
#[serde(tag = "messageType", rename_all = "lowercase")]
pub(super) enum Outgoing<'a> {
    Hello {
        #[serde(skip_serializing_if = "Option::is_none")]
        uaid: Option<&'a str>,
        use_webpush: bool,
    },
    Register {
        #[serde(rename = "channelID")]
        channel: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        key: Option<&'a str>,
    },
    Unregister {
        #[serde(rename = "channelID")]
        channel: &'a str,
        code: u16,
    },
    Ack {
        updates: Vec<Ack<'a>>,
    },
}

/// One acknowledged message.
#[derive(Serialize)]
pub(super) struct Ack<'a> {
    #[serde(rename = "channelID")]
    pub(super) channel: &'a str,
    pub(super) version: &'a str,
    pub(super) code: u16,
}

impl Outgoing<'_> {
    /// As JSON.
    pub(super) fn to_text(&self) -> String {
        // Strings and numbers under string keys: there is nothing in it that JSON cannot hold.
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_go_out_as_the_server_wants_them() {
        let cases = [
            (Outgoing::Hello { uaid: None, use_webpush: true }, r#"{"messageType":"hello","use_webpush":true}"#),
            (
                Outgoing::Hello { uaid: Some("ab"), use_webpush: true },
                r#"{"messageType":"hello","uaid":"ab","use_webpush":true}"#,
            ),
            (
                Outgoing::Register { channel: "c", key: Some("k") },
                r#"{"messageType":"register","channelID":"c","key":"k"}"#,
            ),
            (
                Outgoing::Unregister { channel: "c", code: 200 },
                r#"{"messageType":"unregister","channelID":"c","code":200}"#,
            ),
            (
                Outgoing::Ack { updates: vec![Ack { channel: "c", version: "v", code: 100 }] },
                r#"{"messageType":"ack","updates":[{"channelID":"c","version":"v","code":100}]}"#,
            ),
        ];
        for (frame, text) in cases {
            assert_eq!(frame.to_text(), text);
        }
    }

    #[test]
    fn bodies_are_base64url_padded_or_not() {
        let body = |data: Option<&str>| {
            let data = data.map(String::from);
            Notification { channel: "c".into(), version: "v".into(), data, ttl: None, topic: None, urgency: None }
                .body()
        };
        assert_eq!(body(Some("_-8")), Ok(vec![0xff, 0xef]));
        assert_eq!(body(Some("_-8=")), Ok(vec![0xff, 0xef]));
        assert_eq!(body(None), Ok(vec![]));
        assert!(body(Some("a+b/")).is_err());
    }

    #[test]
    fn broken_frames_are_told_without_quoting_them() {
        for text in ["", "{", "[]", "1", r#"{"messageType":7}"#, r#"{"messageType":"secret"}"#] {
            assert!(!parse(text).unwrap_err().contains("secret"), "{text}");
        }
        let wrong_types = [
            r#"{"messageType":"register","channelID":["secret"],"status":200}"#,
            r#"{"messageType":"register","channelID":"a","status":"secret"}"#,
            r#"{"messageType":"notification","channelID":"secret"}"#,
            r#"{"messageType":"notification","channelID":"a","version":"b","ttl":-1}"#,
            r#"{"messageType":"hello","status":70000}"#,
        ];
        for text in wrong_types {
            assert!(!parse(text).unwrap_err().contains("secret"), "{text}");
        }
        assert_eq!(parse("{}"), Ok(Incoming::Nothing));
        assert_eq!(
            parse(r#"{"messageType":"hello","uaid":"","status":200,"broadcasts":{},"new":[1]}"#),
            Ok(Incoming::Hello { status: 200, uaid: None })
        );
    }
}
