//! The JSON of uppush (push.md §3c), read strictly enough to be used without a second look.

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Deserialize;
use serde_json::json;

use crate::core::upstream::{IncomingBody, rest::is_plain, sse::Event};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
/// Longer ids than this are none.
const ID_LIMIT: usize = 256;

/// What the server says on its stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// The stream has begun, or goes on.
    Alive,
    /// A ping comes after so many seconds without anything else.
    Keepalive(u64),
    Message {
        token: String,
        body: IncomingBody,
        /// To be acknowledged with; servers before 2 have none.
        id: Option<String>,
    },
    /// The registration with this token was deleted.
    Deleted { token: String },
    /// Another connection took the device over.
    Close,
    /// More than 144 connections within 12 hours.
    Warning(String),
}

/// Reads an event; the error says what is wrong with it, without quoting it.
pub(super) fn read(event: Event) -> Result<Incoming, String> {
    #[derive(Deserialize)]
    struct Keepalive {
        keepalive: u64,
    }
    #[derive(Deserialize)]
    struct Token {
        token: String,
        #[serde(default)]
        message: String,
    }
    #[derive(Deserialize)]
    struct Warning {
        #[serde(default)]
        message: String,
    }
    let reason = |error: serde_json::Error| format!("{:?} at column {}", error.classify(), error.column());
    match event.kind.as_str() {
        "keepalive" => {
            let keepalive: Keepalive = serde_json::from_str(&event.data).map_err(reason)?;
            Ok(Incoming::Keepalive(keepalive.keepalive))
        }
        "message" => {
            let Token { token, message } = serde_json::from_str(&event.data).map_err(reason)?;
            let body = match BASE64.decode(message) {
                Ok(bytes) => IncomingBody::Bytes(bytes.into()),
                Err(error) => IncomingBody::Undecodable(format!("not base64: {error}")),
            };
            Ok(Incoming::Message { token, body, id: event.id.filter(|id| is_id(id)) })
        }
        "deleteApp" => {
            let Token { token, .. } = serde_json::from_str(&event.data).map_err(reason)?;
            Ok(Incoming::Deleted { token })
        }
        "close" => Ok(Incoming::Close),
        "warning" => {
            let warning: Warning = serde_json::from_str(&event.data).map_err(reason)?;
            Ok(Incoming::Warning(warning.message.chars().filter(|c| !c.is_control()).take(80).collect()))
        }
        // `start`, `ping`, and what newer servers may say.
        _ => Ok(Incoming::Alive),
    }
}

/// Whether a message can be acknowledged by this.
pub(super) fn is_id(id: &str) -> bool {
    (1..=ID_LIMIT).contains(&id.len()) && !id.chars().any(char::is_control)
}

/// The path that acknowledges a message.
pub(super) fn message_path(id: &str) -> String {
    let mut path = String::from("message/");
    for byte in id.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => path.push(char::from(byte)),
            _ => path.push_str(&format!("%{byte:02X}")),
        }
    }
    path
}

/// Whether this answer is uppush's own "there is no such thing": `{"success":false}`. Servers before 2 say it with 401,
/// as Nextcloud says that the password is wrong, but in other words.
pub(super) fn says_no(body: &str) -> bool {
    success(body) == Some(false)
}

/// Whether this answer is uppush's own "yes".
pub(super) fn says_yes(body: &str) -> bool {
    success(body) == Some(true)
}

/// The id of a device just made.
pub(super) fn device(body: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Device {
        #[serde(rename = "deviceId")]
        id: String,
    }
    let device: Device = serde_json::from_str(body).ok().filter(|_| !says_no(body))?;
    Some(device.id).filter(|id| is_plain(id))
}

/// The token of a registration just made.
pub(super) fn token(body: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Token {
        token: String,
    }
    let token: Token = serde_json::from_str(body).ok().filter(|_| !says_no(body))?;
    Some(token.token).filter(|token| is_plain(token))
}

/// Asks for a device.
pub(super) fn device_request() -> String {
    json!({"deviceName": "Night Porter"}).to_string()
}

/// Asks for a registration. The server shows the name to its user.
pub(super) fn app_request(device: &str, registration: u64, vapid: Option<&str>) -> String {
    let mut request = json!({"deviceId": device, "appName": format!("Night Porter {registration}")});
    if let Some(vapid) = vapid {
        request["vapid"] = vapid.into();
    }
    request.to_string()
}

fn success(body: &str) -> Option<bool> {
    #[derive(Deserialize)]
    struct Success {
        success: bool,
    }
    serde_json::from_str::<Success>(body).ok().map(|answer| answer.success)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(kind: &str, data: &str, id: Option<&str>) -> Event {
        Event { kind: kind.into(), data: data.into(), id: id.map(String::from) }
    }

    #[test]
    fn events_are_read_as_the_server_writes_them() {
        let cases = [
            (event("start", r#"{"type":"start"}"#, None), Incoming::Alive),
            (event("ping", r#"{"type":"ping"}"#, None), Incoming::Alive),
            (event("keepalive", r#"{"type":"keepalive","keepalive":50}"#, None), Incoming::Keepalive(50)),
            (event("close", r#"{"type":"close"}"#, None), Incoming::Close),
            (
                event("deleteApp", r#"{"type":"deleteApp","token":"t","message":""}"#, None),
                Incoming::Deleted { token: "t".into() },
            ),
            (
                event("warning", r#"{"type":"warning","message":"Connected 145 times in 12 hours"}"#, None),
                Incoming::Warning("Connected 145 times in 12 hours".into()),
            ),
            (
                event("message", r#"{"type":"message","token":"t","message":"aGk\/"}"#, Some("m1")),
                Incoming::Message {
                    token: "t".into(),
                    body: IncomingBody::Bytes(b"hi?".as_slice().into()),
                    id: Some("m1".into()),
                },
            ),
        ];
        for (event, incoming) in cases {
            assert_eq!(read(event), Ok(incoming));
        }
        assert!(matches!(
            read(event("message", r#"{"token":"t","message":"*"}"#, None)),
            Ok(Incoming::Message { body: IncomingBody::Undecodable(_), id: None, .. })
        ));
        assert!(read(event("message", "[]", None)).is_err());
    }

    #[test]
    fn answers_are_read_as_the_server_writes_them() {
        assert_eq!(device(r#"{"success":true,"deviceId":"0b-1"}"#).as_deref(), Some("0b-1"));
        assert_eq!(device(r#"{"success":false,"deviceId":"0b-1"}"#), None);
        assert_eq!(device(r#"{"success":true,"deviceId":"../x"}"#), None);
        assert_eq!(token(r#"{"success":true,"token":"t"}"#).as_deref(), Some("t"));
        assert!(says_no(r#"{"success":false}"#) && !says_no(r#"{"message":"Current user is not logged in"}"#));
        assert!(says_yes(r#"{"success":true}"#) && !says_yes("<html>"));
    }

    #[test]
    fn requests_go_out_as_the_server_wants_them() {
        assert_eq!(device_request(), r#"{"deviceName":"Night Porter"}"#);
        let request: serde_json::Value = serde_json::from_str(&app_request("d", 7, Some("k"))).unwrap();
        assert_eq!(request, json!({"deviceId": "d", "appName": "Night Porter 7", "vapid": "k"}));
        assert!(!app_request("d", 7, None).contains("vapid"));
        assert_eq!(message_path("a/b?1-é"), "message/a%2Fb%3F1-%C3%A9");
        assert_eq!(message_path(".."), "message/%2E%2E");
    }

    proptest! {
        #[test]
        fn garbage_does_no_harm(kind in "(message|keepalive|deleteApp|warning|[a-z]{0,5})", data in ".{0,200}") {
            let _ = read(event(&kind, &data, Some(&data)));
            let _ = (device(&data), token(&data), says_no(&data), message_path(&data));
        }
    }
}
