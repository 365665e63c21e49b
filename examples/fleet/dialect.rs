//! The server's side of each protocol, as far as a connection needs it.

use std::time::Duration;

use nightporter::config::UpstreamKind;
use serde_json::{Value, json};

/// Whose server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Autopush,
    Ntfy,
    /// The models': a link is enough for them.
    Mute,
}

pub(crate) struct Answer {
    pub(crate) text: String,
    /// It is a registration.
    pub(crate) registers: bool,
}

impl Dialect {
    /// What an upstream of this kind speaks, if it is known here.
    pub(crate) fn of(kind: UpstreamKind) -> Option<Self> {
        match kind.as_str() {
            "autopush" => Some(Self::Autopush),
            "ntfy" => Some(Self::Ntfy),
            _ => None,
        }
    }

    /// The server's pings (push.md §3a, §3b).
    pub(crate) const fn ping_period(self) -> Duration {
        match self {
            Self::Autopush | Self::Mute => Duration::from_secs(300),
            Self::Ntfy => Duration::from_secs(45),
        }
    }

    /// What the server says first.
    pub(crate) fn greeting(self) -> Option<String> {
        match self {
            Self::Ntfy => Some(json!({ "event": "open", "time": 1_800_000_000 }).to_string()),
            Self::Autopush | Self::Mute => None,
        }
    }

    /// What the server says to a frame of `phone`'s. With `forgotten` it knows the phone no more.
    pub(crate) fn answer(self, phone: u32, frame: &str, forgotten: bool) -> Option<Answer> {
        match self {
            Self::Autopush => autopush(phone, frame, forgotten),
            Self::Ntfy | Self::Mute => None,
        }
    }
}

fn autopush(phone: u32, frame: &str, forgotten: bool) -> Option<Answer> {
    let frame: Value = serde_json::from_str(frame).ok()?;
    let (reply, registers) = match frame["messageType"].as_str()? {
        "hello" => {
            let uaid = format!("{phone:031x}{}", u8::from(forgotten));
            (json!({ "messageType": "hello", "status": 200, "uaid": uaid, "use_webpush": true }), false)
        }
        "register" => {
            let channel = &frame["channelID"];
            let endpoint = format!("https://push.example/wpush/{}", channel.as_str()?);
            let reply =
                json!({ "messageType": "register", "channelID": channel, "status": 200, "pushEndpoint": endpoint });
            (reply, true)
        }
        _ => return None,
    };
    Some(Answer { text: reply.to_string(), registers })
}
