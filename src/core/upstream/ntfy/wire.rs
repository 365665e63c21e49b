//! Events of the ntfy protocol (push.md §3b), read strictly enough to be used without a second look.

use std::sync::Arc;

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Deserialize;

use crate::{core::upstream::IncomingBody, model::Urgency};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// An event from the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Subscribed, at this time of the server's clock in seconds.
    Open {
        time: Option<u64>,
    },
    Message(Message),
    /// An error object; `http` as in HTTP.
    Error {
        code: u64,
        http: u16,
        text: String,
    },
    /// Keepalive, poll request, or an event of a newer server: nothing follows from it.
    Nothing,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) id: Arc<str>,
    pub(super) topic: String,
    /// In seconds of the server's clock.
    pub(super) time: u64,
    pub(super) body: IncomingBody,
    pub(super) urgency: Option<Urgency>,
}

/// Reads an event; the error says what is wrong with it, without quoting it.
pub(super) fn parse(text: &str) -> Result<Incoming, String> {
    #[derive(Deserialize)]
    struct Kind {
        event: Option<String>,
        time: Option<u64>,
    }
    #[derive(Deserialize)]
    struct Failure {
        code: u64,
        http: u16,
        error: Option<String>,
    }
    let reason = |error: serde_json::Error| format!("{:?} at column {}", error.classify(), error.column());
    let kind: Kind = serde_json::from_str(text).map_err(reason)?;
    match kind.event.as_deref() {
        Some("open") => Ok(Incoming::Open { time: kind.time }),
        Some("message") => {
            let event: Event = serde_json::from_str(text).map_err(reason)?;
            if !is_id(&event.id) {
                return Err("a message whose id is none".into());
            }
            Ok(Incoming::Message(Message {
                body: event.body(),
                urgency: event.urgency(),
                id: event.id.into(),
                topic: event.topic,
                time: event.time,
            }))
        }
        Some(_) => Ok(Incoming::Nothing),
        None => {
            let failure: Failure = serde_json::from_str(text).map_err(reason)?;
            let text = failure.error.unwrap_or_default().chars().filter(|c| !c.is_control()).take(80).collect();
            Ok(Incoming::Error { code: failure.code, http: failure.http, text })
        }
    }
}

/// Whether this can be a message's id: it goes into a URL, and is 12 letters and digits with every known server.
pub(super) fn is_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// Whether this can be a topic's name.
pub(super) fn is_topic(name: &str) -> bool {
    is_id(name)
}

#[derive(Deserialize)]
struct Event {
    id: String,
    time: u64,
    topic: String,
    #[serde(default)]
    message: String,
    encoding: Option<String>,
    priority: Option<u8>,
    attachment: Option<Attachment>,
}

#[derive(Deserialize)]
struct Attachment {
    url: String,
    size: Option<u64>,
}

impl Event {
    /// What was sent. With an attachment that is the attachment: the text is then the server's own, for people.
    fn body(&self) -> IncomingBody {
        if let Some(Attachment { url, size }) = &self.attachment {
            return match url.starts_with("https://") || url.starts_with("http://") {
                true => IncomingBody::Attachment { url: url.clone(), size: *size },
                false => IncomingBody::Undecodable("its attachment has no HTTP address".into()),
            };
        }
        match self.encoding.as_deref() {
            None | Some("") => IncomingBody::Bytes(self.message.as_bytes().into()),
            Some("base64") => match BASE64.decode(&self.message) {
                Ok(bytes) => IncomingBody::Bytes(bytes.into()),
                Err(error) => IncomingBody::Undecodable(format!("not base64: {error}")),
            },
            Some(_) => IncomingBody::Undecodable("its encoding is not known".into()),
        }
    }

    /// ntfy's priority is meant for the display; senders in UnifiedPush mode leave it alone.
    fn urgency(&self) -> Option<Urgency> {
        match self.priority? {
            1 => Some(Urgency::VeryLow),
            2 => Some(Urgency::Low),
            4.. => Some(Urgency::High),
            0 | 3 => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(fields: &str) -> IncomingBody {
        let text = format!(r#"{{"id":"MCUKyeAIO0k7","time":1,"event":"message","topic":"up1",{fields}}}"#);
        match parse(&text) {
            Ok(Incoming::Message(message)) => message.body,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bodies_are_text_base64_or_an_attachment() {
        assert_eq!(body(r#""message":"hello""#), IncomingBody::Bytes(b"hello"[..].into()));
        assert_eq!(body(r#""message":"AP/I","encoding":"base64""#), IncomingBody::Bytes([0, 255, 200][..].into()));
        assert_eq!(body(r#""message":"triggered""#), IncomingBody::Bytes(b"triggered"[..].into()));
        assert!(matches!(body(r#""message":"?","encoding":"base64""#), IncomingBody::Undecodable(_)));
        assert!(matches!(body(r#""message":"?","encoding":"jwe""#), IncomingBody::Undecodable(_)));
        assert_eq!(
            body(
                r#""message":"You received a file: attachment.bin","attachment":{"name":"attachment.bin",
                "type":"application/octet-stream","size":4352,"expires":1,"url":"http://s/file/k.bin"}"#
            ),
            IncomingBody::Attachment { url: "http://s/file/k.bin".into(), size: Some(4352) }
        );
        assert!(matches!(body(r#""attachment":{"url":"file:///etc/shadow"}"#), IncomingBody::Undecodable(_)));
    }

    #[test]
    fn what_is_no_event_is_told_without_quoting_it() {
        let broken = [
            "",
            "{",
            "3",
            "{}",
            r#"{"event":["secret"]}"#,
            r#"{"event":"message","id":"a b&secret","time":1,"topic":"t"}"#,
            r#"{"event":"message","id":"","time":1,"topic":"t"}"#,
            r#"{"event":"message","id":"secret","time":"1","topic":"t"}"#,
            r#"{"event":"message","id":"secret","time":1}"#,
        ];
        for text in broken {
            assert!(!parse(text).unwrap_err().contains("secret"), "{text}");
        }
        assert_eq!(parse(r#"{"event":"message_delete","id":7}"#), Ok(Incoming::Nothing));
        assert_eq!(
            parse(r#"{"code":42901,"http":429,"error":"limit reached: too many requests","link":"https://x"}"#),
            Ok(Incoming::Error { code: 42901, http: 429, text: "limit reached: too many requests".into() })
        );
    }
}
