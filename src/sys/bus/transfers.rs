//! `org.nightporter1.Transfers`: what an app may ask for, checked, and the files that answer it.

use std::{collections::HashMap, os::fd::OwnedFd, sync::Arc};

use http::{HeaderName, HeaderValue, Uri};
use zbus::{Fd, Message, Variant, message::Body};

use super::request::{About, Call, Fault, Wording, arguments, invalid};
use crate::{
    event::{CallId, Event, Request},
    sys::inbox::Incoming,
    transfer::{Direction, Field, Metered, TransferEvent, TransferId, TransferRequest, Wish},
};

const URL: usize = 4096;
const TITLE: usize = 100;
/// Header fields, and bytes of all their names and values.
const FIELDS: usize = 32;
const FIELD_BYTES: usize = 8 * 1024;
/// What the daemon says itself, or what only concerns one connection.
const OURS: [&str; 16] = [
    "host",
    "content-length",
    "content-range",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "range",
    "if-range",
    "if-none-match",
    "if-modified-since",
    "accept-encoding",
    "http2-settings",
];

type Fields<'a> = HashMap<&'a str, &'a str>;
type Options<'a> = HashMap<&'a str, Variant<'a>>;

/// Reads a call of the interface.
pub(super) fn read(member: &str, body: &Body) -> Result<Call, Fault> {
    let ask = |request, wording| Ok(Call::Ask { request: Request::Transfer(request), wording, about: About::Caller });
    let id = || arguments::<u64>(body).map(TransferId);
    match member {
        "Download" => {
            let (url, fields, options) = arguments::<(&str, Fields<'_>, Options<'_>)>(body)?;
            let wish = wish(Direction::Download, url, None, &fields, &options)?;
            ask(TransferRequest::Begin(Box::new(wish)), Wording::Transfer)
        }
        "Upload" => {
            let (url, size, fields, options) = arguments::<(&str, u64, Fields<'_>, Options<'_>)>(body)?;
            let wish = wish(Direction::Upload, url, Some(size), &fields, &options)?;
            ask(TransferRequest::Begin(Box::new(wish)), Wording::File)
        }
        "Collect" => ask(TransferRequest::Collect(id()?), Wording::File),
        "Cancel" => ask(TransferRequest::Cancel(id()?), Wording::Empty),
        _ => {
            arguments::<()>(body)?;
            ask(TransferRequest::List, Wording::Text)
        }
    }
}

fn wish(
    direction: Direction,
    url: &str,
    size: Option<u64>,
    fields: &Fields<'_>,
    options: &Options<'_>,
) -> Result<Wish, Fault> {
    check_url(url)?;
    let mut wish = Wish {
        direction,
        url: url.into(),
        method: if direction == Direction::Download { "GET" } else { "PUT" }.into(),
        headers: headers(fields)?,
        size,
        title: "".into(),
        metered: None,
        sha256: None,
        most: None,
    };
    for (name, value) in options {
        match (*name, value, direction) {
            ("title", Variant::Str(title), _) => {
                if title.len() > TITLE || title.chars().any(char::is_control) {
                    let text =
                        format!("the title must be at most {TITLE} bytes without control characters: users read it");
                    return Err(invalid(text));
                }
                wish.title = title.as_str().into();
            }
            ("metered", Variant::Str(word), _) => {
                wish.metered = Some(match word.as_str() {
                    "never" => Metered::Never,
                    "small" => Metered::Small,
                    "allow" => Metered::Allow,
                    _ => return Err(invalid("\"metered\" must be \"never\", \"small\" or \"allow\"".into())),
                });
            }
            ("sha256", Variant::Str(digest), Direction::Download) => {
                if digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    return Err(invalid("\"sha256\" must be 64 hexadecimal digits".into()));
                }
                wish.sha256 = Some(digest.to_ascii_lowercase().into());
            }
            ("max-size", Variant::U64(most), Direction::Download) if *most > 0 => wish.most = Some(*most),
            ("method", Variant::Str(method), Direction::Upload) if matches!(method.as_str(), "PUT" | "POST") => {
                wish.method = method.as_str().into();
            }
            _ => {
                let known = match direction {
                    Direction::Download => "title (s), metered (s), sha256 (s), max-size (t, above 0)",
                    Direction::Upload => "title (s), metered (s), method (s: PUT or POST)",
                };
                return Err(invalid(format!("the option {name:.40?} is not understood; there are {known}")));
            }
        }
    }
    Ok(wish)
}

fn check_url(url: &str) -> Result<(), Fault> {
    let wrong = |why: String| Err(invalid(format!("this URL cannot be used: {why}")));
    if url.len() > URL {
        return wrong(format!("it has {} bytes, and {URL} are the most", url.len()));
    }
    let uri: Uri = match url.parse() {
        Ok(uri) => uri,
        Err(error) => return wrong(format!("{error}")),
    };
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        return wrong("it must begin with https:// or http:// and name a server".into());
    }
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return wrong("a login belongs into the header Authorization".into());
    }
    Ok(())
}

fn headers(fields: &Fields<'_>) -> Result<Vec<Field>, Fault> {
    let bytes: usize = fields.iter().map(|(name, value)| name.len() + value.len()).sum();
    if fields.len() > FIELDS || bytes > FIELD_BYTES {
        let text = format!("{} header fields of {bytes} bytes; {FIELDS} of {FIELD_BYTES} are the most", fields.len());
        return Err(invalid(text));
    }
    let mut headers = Vec::with_capacity(fields.len());
    for (name, value) in fields {
        let lower = name.to_ascii_lowercase();
        if HeaderName::from_bytes(name.as_bytes()).is_err() || HeaderValue::from_str(value).is_err() {
            return Err(invalid(format!("{name:.40?} is no header field that can be sent")));
        }
        if OURS.contains(&lower.as_str()) || lower.starts_with("proxy-") {
            return Err(invalid(format!("the header field {lower} is not an app's to set")));
        }
        headers.push((Arc::from(*name), Arc::from(*value)));
    }
    headers.sort();
    Ok(headers)
}

/// The answer to a call that is a file.
#[derive(Debug)]
pub struct Handed {
    /// To reply to.
    pub call: CallId,
    /// Which transfer it is of.
    pub id: TransferId,
    /// The file and the number that goes along, or why there is none.
    pub file: Result<(OwnedFd, u64), String>,
    /// Whether `TransferEvent::Collected` is to follow.
    pub collected: bool,
}

impl Handed {
    /// The message that answers `call`.
    pub(super) fn answer(file: OwnedFd, number: u64, call: &Message) -> Result<Message, String> {
        Message::method_return(&call.header()).build(&(Fd::from(file), number)).map_err(|error| error.to_string())
    }

    /// What the loop is told of how that went.
    pub(super) fn outcome(id: TransferId, collected: bool, went: bool) -> Option<Incoming> {
        collected.then(|| Incoming::Event(Event::Transfer(id, TransferEvent::Collected(went))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(url: &str, fields: &[(&str, &str)], options: &[(&str, Variant<'_>)]) -> Result<Wish, String> {
        let fields = fields.iter().copied().collect();
        let options = options.iter().map(|(name, value)| (*name, value.try_clone().unwrap())).collect();
        wish(Direction::Download, url, None, &fields, &options).map_err(|fault| fault.text)
    }

    #[test]
    fn what_cannot_be_asked_for_is_refused_by_its_reason() {
        let fine = "https://h.example/a?b=c";
        assert!(begin(fine, &[("Authorization", "Bearer x"), ("X-Any", "1")], &[]).is_ok());
        let (wide, long, many) = ("x".repeat(9000), format!("https://h/{}", "x".repeat(5000)), vec![("a", "b"); 1]);
        assert!(begin(fine, &many, &[]).is_ok());
        for (url, fields, word) in [
            ("ftp://h/x", &[][..], "https://"),
            ("file:///etc/passwd", &[], "URL"),
            ("/etc/passwd", &[], "https://"),
            ("https://u:p@h/", &[], "Authorization"),
            ("https://h/ x", &[], "URL"),
            (&long, &[], "bytes"),
            (fine, &[("Host", "other")], "not an app's"),
            (fine, &[("content-LENGTH", "5")], "not an app's"),
            (fine, &[("Proxy-Authorization", "x")], "not an app's"),
            (fine, &[("Range", "bytes=0-")], "not an app's"),
            (fine, &[("X-A", "1\r\nHost: other")], "no header"),
            (fine, &[("X A", "1")], "no header"),
            (fine, &[("X-A", &wide)], "most"),
        ] {
            let text = begin(url, fields, &[]).unwrap_err();
            assert!(text.contains(word), "{url} {fields:?}: {text}");
        }
    }

    #[test]
    fn options_are_what_they_are_said_to_be() {
        let of = |name: &str, value| begin("https://h/", &[], &[(name, value)]);
        let digest = "AB".repeat(32);
        assert_eq!(
            of("sha256", Variant::from(&*digest)).unwrap().sha256.as_deref(),
            Some(&*digest.to_ascii_lowercase())
        );
        assert_eq!(of("metered", Variant::from("allow")).unwrap().metered, Some(Metered::Allow));
        assert_eq!(of("max-size", Variant::from(5_u64)).unwrap().most, Some(5));
        for (name, value) in [
            ("sha256", Variant::from("ab")),
            ("sha-256", Variant::from(&*digest)),
            ("metered", Variant::from("sometimes")),
            ("max-size", Variant::from(0_u64)),
            ("max-size", Variant::from(5_u32)),
            ("method", Variant::from("POST")),
            ("title", Variant::from("two\nlines")),
        ] {
            assert!(of(name, value).is_err(), "{name}");
        }
    }
}
