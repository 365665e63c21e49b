//! One HTTP/1.1 request and the head of its answer: how a WebSocket, an event stream and a proxy's tunnel begin.
//!
//! Our own rather than tungstenite's, which gives up on a server that answers in small pieces, fails where the server
//! picks no subprotocol, and loses the body of a refusal, which is where ntfy says why.

use std::{
    fmt,
    io::{ErrorKind, Read, Write},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, Uri, header};

use super::{
    body::Body, error_of_io, event_stream::EventStream, transport::Transport, tunnel::Tunnel, upgrade::Upgrade,
};
use crate::{
    event::LinkError,
    sys::{clock, credentials::Secret},
};

/// The longest head of an answer, in bytes.
const HEAD: usize = 16 * 1024;
/// Header fields of an answer at most.
const FIELDS: usize = 100;
/// What is kept of a refusal's body, in bytes.
const BODY: usize = 512;
/// The longest address of a page that is passed on.
const PAGE: usize = 512;

/// A request as it goes over the wire.
pub(super) struct Request(Vec<u8>);

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It may hold a secret.
        f.write_str("Request(..)")
    }
}

impl Request {
    /// `authority` and `target` come from a parsed `http::Uri`, so they hold neither space nor line end.
    pub(super) fn new(method: &str, target: &str, authority: &str) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        let head = format!("{method} {target} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: nightporter/{version}\r\n");
        Self(head.into_bytes())
    }

    pub(super) fn field(&mut self, name: &str, value: &str) {
        self.0.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }

    /// A field that goes out as it is, whatever it holds: the credentials were looked at when they were read.
    pub(super) fn secret(&mut self, name: &str, value: &Secret) {
        self.field(name, value.expose());
    }

    /// A field whose value somebody else made.
    ///
    /// # Errors
    /// The name of one that cannot be sent.
    pub(super) fn foreign(&mut self, name: &str, value: &str) -> Result<(), String> {
        if HeaderValue::from_str(value).is_err() {
            return Err(format!("the value of \"{name}\" cannot be sent in a header"));
        }
        self.field(name, value);
        Ok(())
    }
}

/// The head of an answer.
#[derive(Debug, Default)]
pub(super) struct Head {
    pub(super) status: u16,
    pub(super) reason: String,
    pub(super) headers: HeaderMap,
}

/// What the answer is to be.
#[derive(Debug)]
pub(super) enum Purpose {
    Upgrade(Upgrade),
    EventStream,
    Tunnel(Tunnel),
}

/// Whom the request goes to, as far as its answer's meaning depends on it.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) host: String,
    /// Whether TLS proves that it is the server that answers.
    pub(super) proved: bool,
}

/// An exchange under way.
#[derive(Debug)]
pub(super) struct Exchange {
    request: Request,
    purpose: Purpose,
    peer: Peer,
    sent: usize,
    received: Vec<u8>,
    refusal: Option<Refusal>,
}

#[derive(Debug)]
struct Refusal {
    head: Head,
    body: Option<Body>,
    words: Vec<u8>,
}

impl Exchange {
    pub(super) fn new(mut request: Request, purpose: Purpose, peer: Peer) -> Self {
        request.0.extend_from_slice(b"\r\n");
        Self { request, purpose, peer, sent: 0, received: Vec::new(), refusal: None }
    }

    /// Goes on as far as it can: the head and the first bytes after it once the server agreed, `None` until then.
    pub(super) fn drive(&mut self, transport: &mut Transport) -> Result<Option<(Head, Vec<u8>)>, LinkError> {
        // Reading is what moves a TLS handshake on, and that is what lets more of the request out.
        loop {
            let wrote = self.write(transport)?;
            let read = self.read(transport)?;
            if let Some(agreed) = self.answer(read == Progress::End)? {
                return Ok(Some(agreed));
            }
            if !wrote && read == Progress::Nothing {
                return Ok(None);
            }
        }
    }

    /// Whether part of the request waits for the socket.
    pub(super) const fn unsent(&self) -> bool {
        self.sent < self.request.0.len()
    }

    /// Whether the server refused and only the rest of its words is awaited.
    pub(super) const fn refused(&self) -> bool {
        self.refusal.is_some()
    }

    /// The refusal with what came of its body.
    pub(super) fn refusal(&self) -> Option<LinkError> {
        let Refusal { head, words, .. } = self.refusal.as_ref()?;
        if let Purpose::Tunnel(tunnel) = &self.purpose {
            return Some(tunnel.refusal(head));
        }
        if let Some(page) = self.portal(head) {
            return Some(LinkError::Portal(page));
        }
        let mut body = String::from_utf8_lossy(words).trim().replace(char::is_control, " ");
        if body.is_empty()
            && let Some(location) = location(head)
        {
            body = format!("it redirects to {location}");
        }
        Some(LinkError::Http { status: head.status, body, retry_after: retry_after(&head.headers) })
    }

    /// The page a captive portal wants to be looked at (RFC 6585 §6), if this is one's answer. A redirect to elsewhere is
    /// no proof where TLS shows that it is the server's own.
    fn portal(&self, head: &Head) -> Option<Option<String>> {
        let page = location(head);
        if head.status == 511 {
            return Some(page);
        }
        let elsewhere = page.as_deref().and_then(|page| page.parse::<Uri>().ok()).is_some_and(|page| {
            page.host().is_some_and(|host| !host.trim_matches(['[', ']']).eq_ignore_ascii_case(&self.peer.host))
        });
        (!self.peer.proved && (300..400).contains(&head.status) && elsewhere).then_some(page)
    }

    fn write(&mut self, transport: &mut Transport) -> Result<bool, LinkError> {
        let before = self.sent;
        while let Some(rest) = self.request.0.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match transport.write(rest) {
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error_of_io(&error)),
            }
        }
        match transport.flush() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error_of_io(&error)),
            _ => Ok(self.sent > before),
        }
    }

    fn read(&mut self, transport: &mut Transport) -> Result<Progress, LinkError> {
        let mut chunk = [0; 2048];
        match transport.read(&mut chunk) {
            Ok(0) => Ok(Progress::End),
            Ok(length) => {
                self.received.extend_from_slice(&chunk[..length]);
                Ok(Progress::Some)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Progress::Nothing),
            Err(error) => Err(error_of_io(&error)),
        }
    }

    fn answer(&mut self, ended: bool) -> Result<Option<(Head, Vec<u8>)>, LinkError> {
        while self.refusal.is_none() {
            let Some(end) = self.received.windows(4).position(|window| window == b"\r\n\r\n") else {
                if self.received.len() > HEAD {
                    return Err(LinkError::Protocol("the head of its answer is over 16 KiB".into()));
                }
                if ended {
                    return Err(LinkError::Io("the server closed it before it answered".into()));
                }
                return Ok(None);
            };
            let rest = self.received.split_off(end + 4);
            let bytes = std::mem::replace(&mut self.received, rest);
            let head = parse(&bytes).map_err(LinkError::Protocol)?;
            // A clock that is wrong spoils what depends on dates, and this is where it shows.
            if let Some(date) = head.headers.get(header::DATE).and_then(|value| value.to_str().ok()) {
                clock::compare(&self.peer.host, date);
            }
            let agreed = match &self.purpose {
                Purpose::Upgrade(upgrade) => upgrade.agreed(&head)?,
                Purpose::EventStream => EventStream::agreed(&head)?,
                Purpose::Tunnel(_) => (200..300).contains(&head.status),
            };
            if agreed {
                return Ok(Some((head, std::mem::take(&mut self.received))));
            }
            // RFC 9110 §15.2: interim answers may come first.
            if !(100..200).contains(&head.status) {
                let bodiless = matches!(head.status, 204 | 304);
                let body = if bodiless { None } else { Body::new(&head.headers).ok() };
                self.refusal = Some(Refusal { head, body, words: Vec::new() });
            }
        }
        let received = std::mem::take(&mut self.received);
        let complete = self.refusal.as_mut().is_none_or(|refusal| refusal.take(&received));
        if complete || ended { self.refusal().map_or(Ok(None), Err) } else { Ok(None) }
    }
}

impl Refusal {
    /// Takes in more of the body; whether enough of it is there.
    fn take(&mut self, bytes: &[u8]) -> bool {
        let Some(body) = &mut self.body else { return true };
        let broken = body.take(bytes, &mut self.words).is_err();
        let enough = broken || body.done() || self.words.len() >= BODY;
        self.words.truncate(BODY);
        enough
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Some,
    Nothing,
    End,
}

/// HTTP/1.0 is what some proxies answer with.
fn parse(bytes: &[u8]) -> Result<Head, String> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    match response.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err("its answer is not HTTP".into()),
        Err(error) => return Err(format!("its answer is not HTTP/1.1: {error}")),
    }
    let mut headers = HeaderMap::with_capacity(response.headers.len());
    for field in response.headers.iter() {
        // What `http` does not take is nothing anybody here looks at.
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(field.name), HeaderValue::from_bytes(field.value)) {
            headers.append(name, value);
        }
    }
    let reason = response.reason.unwrap_or_default().chars().take(100).collect();
    Ok(Head { status: response.code.unwrap_or_default(), reason, headers })
}

fn location(head: &Head) -> Option<String> {
    let text = head.headers.get(header::LOCATION)?.to_str().ok()?.trim();
    (!text.is_empty()).then(|| text.chars().take(PAGE).collect())
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}
