//! The JSON of Gotify (push.md §3d), read strictly enough to be used without a second look.

use std::sync::Arc;

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    core::upstream::{IncomingBody, rest::is_plain},
    model::Urgency,
};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
/// The key of `extras` with which a rewriting proxy says how it has written the body.
const BODY: &str = "nightporter::body";

/// A message, of whichever application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) id: u64,
    pub(super) application: u64,
    pub(super) body: IncomingBody,
    pub(super) urgency: Option<Urgency>,
}

/// A page of stored messages, newest first.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) messages: Vec<Message>,
    /// Older ones follow.
    pub(super) more: bool,
}

#[derive(Deserialize)]
struct RawMessage {
    id: u64,
    appid: u64,
    #[serde(default)]
    message: String,
    #[serde(default)]
    priority: Option<i64>,
    #[serde(default)]
    extras: Option<serde_json::Map<String, Value>>,
}

impl From<RawMessage> for Message {
    fn from(raw: RawMessage) -> Self {
        let encoding = raw.extras.as_ref().and_then(|extras| extras.get(BODY)?.get("encoding")?.as_str());
        let body = match encoding {
            // Gotify takes no empty message, so an empty body is a space.
            Some("base64") => match BASE64.decode(raw.message.trim()) {
                Ok(bytes) => IncomingBody::Bytes(bytes.into()),
                Err(error) => IncomingBody::Undecodable(format!("not base64: {error}")),
            },
            Some(_) => IncomingBody::Undecodable("in an encoding this program does not know".into()),
            None => IncomingBody::Bytes(raw.message.as_bytes().into()),
        };
        Self { id: raw.id, application: raw.appid, body, urgency: urgency(raw.priority) }
    }
}

/// Gotify's own classes: 1 to 3 make no sound, 4 to 7 do, 8 and more also move the screen. 0 is what a sender sets who
/// sets nothing, so it says nothing.
fn urgency(priority: Option<i64>) -> Option<Urgency> {
    match priority? {
        ..=0 => None,
        1..=3 => Some(Urgency::Low),
        4..=7 => Some(Urgency::Normal),
        8.. => Some(Urgency::High),
    }
}

/// Reads a frame of the stream; the error says what is wrong with it, without quoting it.
pub(super) fn message(text: &str) -> Result<Message, String> {
    serde_json::from_str::<RawMessage>(text).map(Message::from).map_err(reason)
}

/// Reads a page of stored messages.
pub(super) fn page(text: &str) -> Result<Page, String> {
    #[derive(Deserialize)]
    struct RawPage {
        messages: Vec<RawMessage>,
        paging: Paging,
    }
    #[derive(Deserialize)]
    struct Paging {
        #[serde(default)]
        next: Option<String>,
    }
    let raw: RawPage = serde_json::from_str(text).map_err(reason)?;
    let more = raw.paging.next.is_some_and(|next| !next.is_empty());
    Ok(Page { messages: raw.messages.into_iter().map(Message::from).collect(), more })
}

/// A registration's name here: the application's id, for deleting it and for its messages, and its token, for its
/// endpoint.
pub(super) fn channel(application: u64, token: &str) -> Arc<str> {
    format!("{application}:{token}").into()
}

/// The two parts of a channel.
pub(super) fn split(channel: &str) -> Option<(u64, &str)> {
    let (application, token) = channel.split_once(':')?;
    Some((application.parse().ok()?, token)).filter(|(_, token)| is_plain(token))
}

/// The application just made, as a channel.
pub(super) fn application(text: &str) -> Option<Arc<str>> {
    let made: RawApplication = serde_json::from_str(text).ok()?;
    let token = made.token.filter(|token| is_plain(token))?;
    Some(channel(made.id, &token))
}

/// The applications the server has, with their tokens where it shows them.
pub(super) fn applications(text: &str) -> Result<Vec<(u64, Option<String>)>, String> {
    let list: Vec<RawApplication> = serde_json::from_str(text).map_err(reason)?;
    Ok(list.into_iter().map(|one| (one.id, one.token.filter(|token| !token.is_empty()))).collect())
}

#[derive(Deserialize)]
struct RawApplication {
    id: u64,
    #[serde(default)]
    token: Option<String>,
}

/// Asks for an application. The server shows these texts to its user.
pub(super) fn application_request(registration: u64) -> String {
    json!({
        "name": format!("Night Porter {registration}"),
        "description": "Push messages for an app on a device with Night Porter. Deleting this ends them.",
        "defaultPriority": 5,
    })
    .to_string()
}

fn reason(error: serde_json::Error) -> String {
    format!("{:?} at column {}", error.classify(), error.column())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_is_read_as_the_server_writes_it() {
        let text = r#"{"id":25,"appid":5,"message":"Backup \u00e9","title":"t","priority":2,
                       "date":"2018-02-27T19:36:10.5045044+01:00","extras":{"a::b":{"c":1}}}"#;
        let read = message(text).unwrap();
        assert_eq!((read.id, read.application, read.urgency), (25, 5, Some(Urgency::Low)));
        assert_eq!(read.body, IncomingBody::Bytes("Backup é".as_bytes().into()));
        assert!(message("{}").is_err());
    }

    #[test]
    fn a_proxy_can_say_that_the_body_is_base64() {
        let with = |encoding: &str, body: &str| {
            let extras = json!({BODY: {"encoding": encoding}});
            message(&json!({"id": 1, "appid": 2, "message": body, "extras": extras}).to_string()).unwrap().body
        };
        assert_eq!(with("base64", "gP8="), IncomingBody::Bytes([0x80, 0xff].as_slice().into()));
        assert_eq!(with("base64", "gP8"), IncomingBody::Bytes([0x80, 0xff].as_slice().into()));
        assert_eq!(with("base64", " "), IncomingBody::Bytes([].as_slice().into()));
        assert!(matches!(with("base64", "*"), IncomingBody::Undecodable(_)));
        assert!(matches!(with("rot13", "a"), IncomingBody::Undecodable(_)));
    }

    #[test]
    fn priorities_are_urgencies() {
        let expected = [
            (None, -1),
            (None, 0),
            (Some(Urgency::Low), 1),
            (Some(Urgency::Low), 3),
            (Some(Urgency::Normal), 4),
            (Some(Urgency::Normal), 7),
            (Some(Urgency::High), 8),
            (Some(Urgency::High), 10),
        ];
        for (expected, priority) in expected {
            assert_eq!(urgency(Some(priority)), expected, "{priority}");
        }
        assert_eq!(urgency(None), None);
    }

    #[test]
    fn pages_applications_and_channels() {
        let text = r#"{"messages":[{"id":5,"appid":1,"message":"b"},{"id":3,"appid":1,"message":"a"}],
                       "paging":{"size":2,"limit":2,"since":3,"next":"http://x/message?limit=2&since=3"}}"#;
        let read = page(text).unwrap();
        assert_eq!(read.messages.iter().map(|message| message.id).collect::<Vec<_>>(), [5, 3]);
        assert!(read.more);
        assert!(!page(r#"{"messages":[],"paging":{"size":0,"limit":2,"since":0}}"#).unwrap().more);
        assert_eq!(
            application(r#"{"id":7,"token":"AWH0wZ5r0Mbac.r","name":"n"}"#).as_deref(),
            Some("7:AWH0wZ5r0Mbac.r")
        );
        assert_eq!(application(r#"{"id":7,"token":"a/b"}"#), None);
        assert_eq!(split("7:AWH0wZ5r0Mbac.r"), Some((7, "AWH0wZ5r0Mbac.r")));
        assert_eq!(split("x:y"), None);
        assert_eq!(applications(r#"[{"id":7,"token":"t"},{"id":8}]"#), Ok(vec![(7, Some("t".into())), (8, None)]));
    }

    proptest! {
        #[test]
        fn garbage_does_no_harm(text in ".{0,200}") {
            let _ = (message(&text), page(&text), application(&text), applications(&text), split(&text));
        }
    }
}
