//! The WebSocket opening handshake (RFC 6455 §4.1), client side.

use http::header;
use tungstenite::handshake::{client::generate_key, derive_accept_key};

use super::{
    body::has_token,
    exchange::{Head, Request},
};
use crate::event::LinkError;

/// What the answer must hold.
#[derive(Debug)]
pub(super) struct Upgrade {
    key: String,
    protocol: Option<&'static str>,
}

impl Upgrade {
    /// Adds to `request` what makes it ask for a WebSocket.
    pub(super) fn ask(request: &mut Request, protocol: Option<&'static str>) -> Self {
        let key = generate_key();
        request.field("Connection", "Upgrade");
        request.field("Upgrade", "websocket");
        request.field("Sec-WebSocket-Version", "13");
        request.field("Sec-WebSocket-Key", &key);
        if let Some(protocol) = protocol {
            request.field("Sec-WebSocket-Protocol", protocol);
        }
        Self { key, protocol }
    }

    /// Whether the server agreed, and as it should.
    pub(super) fn agreed(&self, head: &Head) -> Result<bool, LinkError> {
        if head.status != 101 {
            return Ok(false);
        }
        self.verify(head).map_err(|what| LinkError::Protocol(what.into()))?;
        Ok(true)
    }

    fn verify(&self, head: &Head) -> Result<(), &'static str> {
        let headers = &head.headers;
        if !has_token(headers, header::UPGRADE, "websocket") || !has_token(headers, header::CONNECTION, "upgrade") {
            return Err("its answer lacks \"Upgrade: websocket\"");
        }
        let accepted = headers.get(header::SEC_WEBSOCKET_ACCEPT).map(header::HeaderValue::as_bytes);
        if accepted != Some(derive_accept_key(self.key.as_bytes()).as_bytes()) {
            return Err("its answer's Sec-WebSocket-Accept is wrong");
        }
        if headers.contains_key(header::SEC_WEBSOCKET_EXTENSIONS) {
            return Err("it chose an extension nobody offered");
        }
        // None at all is fine: the subprotocol is then the one the path implies.
        match headers.get(header::SEC_WEBSOCKET_PROTOCOL) {
            Some(chosen) if Some(chosen.as_bytes()) != self.protocol.map(str::as_bytes) => {
                Err("it chose a subprotocol nobody offered")
            }
            _ => Ok(()),
        }
    }
}
