//! The WebSocket opening handshake (RFC 6455 §4.1), client side.
//!
//! Our own rather than tungstenite's, which gives up on a server that answers in small pieces, fails where the server
//! picks no subprotocol, and loses the body of a refusal, which is where ntfy says why.

use std::{
    fmt,
    io::{ErrorKind, Read, Write},
    time::Duration,
};

use http::{HeaderMap, StatusCode, header};
use tungstenite::handshake::{
    client::{Response, generate_key},
    derive_accept_key,
    machine::TryParse,
};

use super::{error_of_io, transport::Transport};
use crate::{event::LinkError, sys::credentials::Secret};

/// The longest head of an answer, in bytes.
const HEAD: usize = 16 * 1024;
/// What is kept of a refusal's body, in bytes.
const BODY: usize = 512;

/// A request and the answer it must get.
pub(super) struct Request {
    bytes: Vec<u8>,
    key: String,
    protocol: Option<&'static str>,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It may hold a secret.
        f.write_str("Request(..)")
    }
}

impl Request {
    /// `authority` and `target` come from a parsed `http::Uri`, so they hold neither space nor line end.
    pub(super) fn new(
        authority: &str,
        target: &str,
        protocol: Option<&'static str>,
        authorization: Option<&Secret>,
    ) -> Self {
        let key = generate_key();
        let version = env!("CARGO_PKG_VERSION");
        let mut text = format!(
            "GET {target} HTTP/1.1\r\nHost: {authority}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nUser-Agent: nightporter/{version}\r\n"
        );
        if let Some(protocol) = protocol {
            text.push_str(&format!("Sec-WebSocket-Protocol: {protocol}\r\n"));
        }
        let mut bytes = text.into_bytes();
        if let Some(secret) = authorization {
            bytes.extend_from_slice(b"Authorization: ");
            bytes.extend_from_slice(secret.expose().as_bytes());
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"\r\n");
        Self { bytes, key, protocol }
    }
}

/// A handshake under way.
#[derive(Debug)]
pub(super) struct Upgrade {
    request: Request,
    sent: usize,
    received: Vec<u8>,
    refusal: Option<Refusal>,
}

#[derive(Debug)]
struct Refusal {
    status: u16,
    retry_after: Option<Duration>,
    chunked: bool,
    length: Option<usize>,
}

impl Upgrade {
    pub(super) const fn new(request: Request) -> Self {
        Self { request, sent: 0, received: Vec::new(), refusal: None }
    }

    /// Goes on as far as it can: the first bytes after the answer once the server agreed, `None` until then.
    pub(super) fn drive(&mut self, transport: &mut Transport) -> Result<Option<Vec<u8>>, LinkError> {
        // Reading is what moves a TLS handshake on, and that is what lets more of the request out.
        loop {
            let wrote = self.write(transport)?;
            let read = self.read(transport)?;
            if let Some(rest) = self.answer(read == Progress::End)? {
                return Ok(Some(rest));
            }
            if !wrote && read == Progress::Nothing {
                return Ok(None);
            }
        }
    }

    /// Whether part of the request waits for the socket.
    pub(super) const fn unsent(&self) -> bool {
        self.sent < self.request.bytes.len()
    }

    /// Whether the server refused and only the rest of its words is awaited.
    pub(super) const fn refused(&self) -> bool {
        self.refusal.is_some()
    }

    /// The refusal with what came of its body.
    pub(super) fn refusal(&self) -> Option<LinkError> {
        let refusal = self.refusal.as_ref()?;
        let body = if refusal.chunked { unchunk(&self.received).0 } else { self.received.clone() };
        let body = String::from_utf8_lossy(body.get(..BODY).unwrap_or(&body)).trim().replace(char::is_control, " ");
        Some(LinkError::Http { status: refusal.status, body, retry_after: refusal.retry_after })
    }

    fn write(&mut self, transport: &mut Transport) -> Result<bool, LinkError> {
        let before = self.sent;
        while let Some(rest) = self.request.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
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

    fn answer(&mut self, ended: bool) -> Result<Option<Vec<u8>>, LinkError> {
        while self.refusal.is_none() {
            let Some(end) = find(&self.received, b"\r\n\r\n") else {
                if self.received.len() > HEAD {
                    return Err(LinkError::Protocol("the head of its answer is over 16 KiB".into()));
                }
                if ended {
                    return Err(LinkError::Io("the server closed it before it answered".into()));
                }
                return Ok(None);
            };
            let rest = self.received.split_off(end + 4);
            let head = std::mem::replace(&mut self.received, rest);
            let response = match Response::try_parse(&head) {
                Ok(Some((_, response))) => response,
                Ok(None) => return Err(LinkError::Protocol("its answer is not HTTP".into())),
                Err(error) => return Err(LinkError::Protocol(format!("its answer is not HTTP/1.1: {error}"))),
            };
            match response.status() {
                StatusCode::SWITCHING_PROTOCOLS => {
                    self.verify(response.headers()).map_err(|what| LinkError::Protocol(what.into()))?;
                    return Ok(Some(std::mem::take(&mut self.received)));
                }
                // RFC 9110 §15.2: interim answers may come first.
                status if status.is_informational() => {}
                status => self.refusal = Some(Refusal::new(status, response.headers())),
            }
        }
        if ended || self.refusal.as_ref().is_some_and(|refusal| refusal.complete(&self.received)) {
            return self.refusal().map_or(Ok(None), Err);
        }
        Ok(None)
    }

    fn verify(&self, headers: &HeaderMap) -> Result<(), &'static str> {
        if !has_token(headers, header::UPGRADE, "websocket") || !has_token(headers, header::CONNECTION, "upgrade") {
            return Err("its answer lacks \"Upgrade: websocket\"");
        }
        let accepted = headers.get(header::SEC_WEBSOCKET_ACCEPT).map(header::HeaderValue::as_bytes);
        if accepted != Some(derive_accept_key(self.request.key.as_bytes()).as_bytes()) {
            return Err("its answer's Sec-WebSocket-Accept is wrong");
        }
        if headers.contains_key(header::SEC_WEBSOCKET_EXTENSIONS) {
            return Err("it chose an extension nobody offered");
        }
        // None at all is fine: the subprotocol is then the one the path implies.
        match headers.get(header::SEC_WEBSOCKET_PROTOCOL) {
            Some(chosen) if Some(chosen.as_bytes()) != self.request.protocol.map(str::as_bytes) => {
                Err("it chose a subprotocol nobody offered")
            }
            _ => Ok(()),
        }
    }
}

impl Refusal {
    fn new(status: StatusCode, headers: &HeaderMap) -> Self {
        let number = |name| headers.get(name)?.to_str().ok()?.trim().parse::<u64>().ok();
        Self {
            status: status.as_u16(),
            retry_after: number(header::RETRY_AFTER).map(Duration::from_secs),
            chunked: has_token(headers, header::TRANSFER_ENCODING, "chunked"),
            length: number(header::CONTENT_LENGTH).and_then(|length| usize::try_from(length).ok()),
        }
    }

    fn complete(&self, body: &[u8]) -> bool {
        if self.chunked {
            let (body, ended) = unchunk(body);
            return ended || body.len() >= BODY;
        }
        body.len() >= self.length.unwrap_or(BODY).min(BODY)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Some,
    Nothing,
    End,
}

fn has_token(headers: &HeaderMap, name: header::HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|part| part.trim().eq_ignore_ascii_case(token))
}

/// What is there of a chunked body (RFC 9112 §7.1), and whether nothing more can come of it.
fn unchunk(mut bytes: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    while let Some(end) = find(bytes, b"\r\n") {
        let size = str::from_utf8(&bytes[..end]).ok().and_then(|line| {
            let digits = line.split(';').next()?.trim();
            usize::from_str_radix(digits, 16).ok()
        });
        let (Some(size), Some(rest)) = (size.filter(|size| *size > 0), bytes.get(end + 2..)) else {
            return (body, true);
        };
        body.extend_from_slice(rest.get(..size).unwrap_or(rest));
        let Some(next) = size.checked_add(2).and_then(|skip| rest.get(skip..)) else { break };
        bytes = next;
    }
    (body, false)
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined_and_rubbish_ends_them() {
        assert_eq!(unchunk(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"), (b"abcde".to_vec(), true));
        assert_eq!(unchunk(b"3\r\nab"), (b"ab".to_vec(), false));
        assert_eq!(unchunk(b"zz\r\nab"), (Vec::new(), true));
        assert_eq!(unchunk(b"ffffffffffffffff\r\nab"), (b"ab".to_vec(), false));
    }
}
