//! Notifications in an app's stead: what is shown, what comes of it, and what an app's payload helper is asked and says.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::{AppKey, MessageSeq, Priority, Urgency};

/// When a generic notification is shown in an app's stead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NotifyWhen {
    /// Not at all.
    Never,
    /// A message waits for it, and it cannot be started.
    #[default]
    Unstartable,
    /// A message has waited for it for 2 s, for whatever reason.
    Always,
}

impl NotifyWhen {
    /// The word in the configuration and in `org.nightporter.notify`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Unstartable => "unstartable",
            Self::Always => "always",
        }
    }

    /// The inverse of [`NotifyWhen::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Never, Self::Unstartable, Self::Always].into_iter().find(|when| when.as_str() == text)
    }
}

/// What is shown of an app, in the place of what was shown with the same tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Which of the app's notifications: [`GENERIC`], or what its helper says.
    pub tag: Arc<str>,
    /// Never used twice: what is told of one that was replaced meanwhile is known by it.
    pub number: u64,
    /// What it says.
    pub text: Text,
    /// Hint `urgency`: 0 for low, 1 for normal, 2 for anything more.
    pub priority: Priority,
    /// Hint `category`, as in the Desktop Notifications Specification.
    pub category: Option<Arc<str>>,
}

/// What a notification says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// The app's name, and how many messages wait for it. Nothing of what they say.
    Messages(usize),
    /// What the app's helper has made of a message. Plain text, without control characters but line ends in the body.
    Own {
        /// 1 to [`SUMMARY`] bytes.
        summary: Arc<str>,
        /// At most [`BODY`] bytes; may be empty.
        body: Arc<str>,
        /// A name of the icon theme or an absolute path, instead of the app's icon.
        icon: Option<Arc<str>>,
    },
}

/// The tag of the generic notification. No helper can say it: tags have no control characters.
pub const GENERIC: &str = "\u{1}";
/// Bytes of a summary at most.
pub const SUMMARY: usize = 256;
/// Bytes of a body at most.
pub const BODY: usize = 2048;
/// Bytes of a tag, a category and an icon's name at most.
const WORD: usize = 128;

/// What is to be done with the notifications in an app's stead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotifyOrder {
    /// Show this one.
    Show(Notification),
    /// Close the one with this tag.
    Close(Arc<str>),
    /// Close all of them.
    CloseAll,
}

/// What has become of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotifyNews {
    /// It cannot be shown: why, as a sentence part. It may be all the same, when another notification server comes.
    NotShown(Arc<str>),
    /// The user touched it: the token with which the app may come to the front, where the server gives one.
    Clicked(Option<Arc<str>>),
    /// It is gone, and not by our doing.
    Gone,
}

/// A message that an app's payload helper is to make something of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelperJob {
    /// Which message, to answer with.
    pub seq: MessageSeq,
    /// For which app.
    pub app: AppKey,
    /// Program and arguments, as configured.
    pub command: Arc<[Arc<str>]>,
    /// Whether it may use the network.
    pub network: bool,
    /// The app's name for the registration.
    pub token: Arc<str>,
    /// The upstream's id of the message.
    pub id: Arc<str>,
    /// RFC 8030 §5.3.
    pub urgency: Urgency,
    /// Exactly as received.
    pub body: Arc<[u8]>,
}

/// What a helper says of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HelperAnswer {
    /// This is to be shown, and the app left as it is.
    Show {
        /// Which of the app's notifications it replaces; possibly empty.
        tag: Arc<str>,
        /// What it says.
        text: Text,
        /// As in [`Notification::category`].
        category: Option<Arc<str>>,
    },
    /// The app is to be woken, as if there were no helper.
    Wake,
    /// The message is of no use to anybody.
    Drop,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAnswer {
    summary: Option<String>,
    #[serde(default)]
    body: String,
    icon: Option<String>,
    category: Option<String>,
    replace: Option<String>,
    #[serde(default)]
    drop: bool,
    #[serde(default)]
    wake: bool,
}

impl HelperAnswer {
    /// Reads what a helper has printed.
    ///
    /// # Errors
    /// As a sentence part: it is not the JSON document of docs/lifecycle.md.
    pub fn parse(output: &[u8]) -> Result<Self, String> {
        let raw: RawAnswer =
            serde_json::from_slice(output).map_err(|error| format!("it printed no answer: {error}"))?;
        match (raw.wake, raw.drop, raw.summary) {
            (true, false, None) => Ok(Self::Wake),
            (false, true, None) => Ok(Self::Drop),
            (false, false, Some(summary)) => {
                let summary = plain(&summary, SUMMARY, false);
                if summary.is_empty() {
                    return Err("its summary is empty".into());
                }
                let icon = raw.icon.map(|icon| word("icon", &icon)).transpose()?;
                let category = raw.category.map(|category| word("category", &category)).transpose()?;
                let tag = raw.replace.map(|tag| word("replace", &tag)).transpose()?.unwrap_or_default();
                Ok(Self::Show { tag, text: Text::Own { summary, body: plain(&raw.body, BODY, true), icon }, category })
            }
            _ => Err("its answer must have one of \"summary\", \"drop\" and \"wake\"".into()),
        }
    }
}

/// Without control characters, cut at `most` bytes.
fn plain(text: &str, most: usize, lines: bool) -> Arc<str> {
    let mut out = String::new();
    for c in text.chars() {
        let c = if c.is_control() && !(lines && c == '\n') { ' ' } else { c };
        if out.len() + c.len_utf8() > most {
            break;
        }
        out.push(c);
    }
    out.trim().into()
}

fn word(key: &str, text: &str) -> Result<Arc<str>, String> {
    if text.len() > WORD || text.chars().any(char::is_control) {
        return Err(format!("its \"{key}\" is longer than {WORD} bytes or has control characters"));
    }
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(summary: &str, body: &str, icon: Option<&str>) -> Text {
        Text::Own { summary: summary.into(), body: body.into(), icon: icon.map(Into::into) }
    }

    #[test]
    fn what_a_helper_may_say() {
        let parse = |text: &str| HelperAnswer::parse(text.as_bytes());
        assert_eq!(parse("{\"wake\": true}"), Ok(HelperAnswer::Wake));
        assert_eq!(parse(" {\"drop\": true}\n"), Ok(HelperAnswer::Drop));
        assert_eq!(
            parse(
                "{\"summary\": \"Ann\", \"body\": \"Hi\\nthere\", \"replace\": \"room 7\", \"category\": \"im.received\"}"
            ),
            Ok(HelperAnswer::Show {
                tag: "room 7".into(),
                text: own("Ann", "Hi\nthere", None),
                category: Some("im.received".into())
            })
        );
        assert_eq!(
            parse("{\"summary\": \"A\\u0000\\u001bn\\n\", \"icon\": \"mail-unread\"}"),
            Ok(HelperAnswer::Show { tag: "".into(), text: own("A  n", "", Some("mail-unread")), category: None })
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let long = format!("{{\"summary\": \"x\", \"replace\": \"{}\"}}", "y".repeat(129));
        for text in [
            "",
            "hello",
            "[]",
            "{}",
            "{\"summary\": \" \\n\"}",
            "{\"summary\": 1}",
            "{\"summary\": \"x\", \"wake\": true}",
            "{\"drop\": true, \"wake\": true}",
            "{\"wake\": false}",
            "{\"summary\": \"x\", \"sound\": \"ding\"}",
            "{\"summary\": \"x\"} {\"summary\": \"y\"}",
            "{\"summary\": \"x\", \"replace\": \"\\u0001\"}",
            &long,
        ] {
            assert!(HelperAnswer::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(HelperAnswer::parse(&[0xff, 0xfe]).is_err());
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let text = format!("{{\"summary\": \"{}\", \"body\": \"{}\"}}", "ä".repeat(1000), "€".repeat(5000));
        let Ok(HelperAnswer::Show { text: Text::Own { summary, body, .. }, .. }) = HelperAnswer::parse(text.as_bytes())
        else {
            panic!("it is an answer");
        };
        assert_eq!((summary.len(), body.len()), (SUMMARY, BODY / 3 * 3));
    }
}
