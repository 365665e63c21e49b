//! A plain or TLS stream that carries a protocol of its own (MQTT).

use std::io::{ErrorKind, Read, Write};

use super::{connection::Step, error_of_io, transport::Transport};
use crate::event::{LinkError, LinkEvent};

/// Bytes handed on at once.
pub(super) const CHUNK: usize = 4 * 1024;
/// What waits for a peer that does not read.
pub(super) const WRITE_LIMIT: usize = 256 * 1024;

#[derive(Debug)]
pub(super) struct RawStream {
    transport: Transport,
    /// What the socket did not take yet; no memory while there is none.
    unsent: Vec<u8>,
}

impl RawStream {
    pub(super) const fn new(transport: Transport) -> Self {
        Self { transport, unsent: Vec::new() }
    }

    pub(super) const fn transport_mut(&mut self) -> &mut Transport {
        &mut self.transport
    }

    pub(super) fn unsent(&self) -> bool {
        !self.unsent.is_empty() || self.transport.wants_write()
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        if self.unsent.len() + bytes.len() > WRITE_LIMIT {
            return Err(LinkError::Io("the server does not read what it is sent".into()));
        }
        self.unsent.extend_from_slice(bytes);
        self.flush()
    }

    pub(super) fn drive(&mut self, budget: usize, emit: &mut dyn FnMut(LinkEvent)) -> Step {
        self.transport.refill();
        if let Err(error) = self.flush() {
            return Step::End(LinkEvent::Failed(error));
        }
        for _ in 0..budget {
            let mut chunk = [0; CHUNK];
            match read(&mut self.transport, &mut chunk) {
                Ok(None) => return Step::Wait { more: self.transport.throttled() },
                Ok(Some(0)) => return Step::End(LinkEvent::Closed { code: None, reason: String::new() }),
                Ok(Some(length)) => emit(LinkEvent::Bytes(chunk[..length].to_vec())),
                Err(error) => return Step::End(LinkEvent::Failed(error)),
            }
        }
        Step::Wait { more: true }
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        let mut sent = 0;
        while let Some(rest) = self.unsent.get(sent..).filter(|rest| !rest.is_empty()) {
            match self.transport.write(rest) {
                Ok(0) => return Err(LinkError::Io("the connection takes nothing more".into())),
                Ok(written) => sent += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error_of_io(&error)),
            }
        }
        if sent == self.unsent.len() {
            self.unsent = Vec::new();
        } else {
            self.unsent.drain(..sent);
        }
        flush(&mut self.transport)
    }
}

/// Hands down what TLS still holds, as far as that goes.
pub(super) fn flush(transport: &mut Transport) -> Result<(), LinkError> {
    match transport.flush() {
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error_of_io(&error)),
        _ => Ok(()),
    }
}

/// Reads what is there: `None` when there is nothing, zero at the end.
pub(super) fn read(transport: &mut Transport, buffer: &mut [u8]) -> Result<Option<usize>, LinkError> {
    match transport.read(buffer) {
        Ok(length) => Ok(Some(length)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error_of_io(&error)),
    }
}
