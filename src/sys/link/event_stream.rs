//! A response that never ends (`text/event-stream`), as the bytes that come.

use http::header;

use super::{
    body::Body,
    exchange::Head,
    stream::{self, CHUNK},
    transport::Transport,
};
use crate::{
    event::{LinkError, LinkEvent},
    sys::link::connection::Step,
};

#[derive(Debug)]
pub(super) struct EventStream {
    transport: Transport,
    body: Body,
    /// What came with the head.
    first: Vec<u8>,
}

impl EventStream {
    /// Whether this is a stream of events. A page for people is none, whatever its status.
    pub(super) fn agreed(head: &Head) -> Result<bool, LinkError> {
        let kind = head.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        // Servers that give no type are taken at their word: the status.
        let events = kind.is_none_or(|kind| kind.trim_start().to_ascii_lowercase().starts_with("text/event-stream"));
        if head.status != 200 || !events {
            return Ok(false);
        }
        if head.headers.contains_key(header::CONTENT_ENCODING) {
            return Err(LinkError::Protocol("it encodes the stream, which nobody asked for".into()));
        }
        Ok(true)
    }

    pub(super) fn new(transport: Transport, head: &Head, first: Vec<u8>) -> Result<Self, LinkError> {
        let body = Body::new(&head.headers).map_err(|what| LinkError::Protocol(what.into()))?;
        Ok(Self { transport, body, first })
    }

    pub(super) const fn transport(&self) -> &Transport {
        &self.transport
    }

    pub(super) const fn transport_mut(&mut self) -> &mut Transport {
        &mut self.transport
    }

    pub(super) fn drive(&mut self, budget: usize, emit: &mut dyn FnMut(LinkEvent)) -> Step {
        self.transport.refill();
        // Nothing is said on an open stream, but TLS may have something to say.
        if let Err(error) = stream::flush(&mut self.transport) {
            return Step::End(LinkEvent::Failed(error));
        }
        let mut left = budget;
        let first = std::mem::take(&mut self.first);
        if left == 0 {
            self.first = first;
            return Step::Wait { more: true };
        }
        if let Some(step) = self.take(&first, &mut left, emit) {
            return step;
        }
        while left > 0 {
            let mut chunk = [0; CHUNK];
            match stream::read(&mut self.transport, &mut chunk) {
                Ok(None) => return Step::Wait { more: self.transport.throttled() },
                Ok(Some(0)) if self.body.may_end() => return Step::End(closed()),
                Ok(Some(0)) => {
                    return Step::End(LinkEvent::Failed(LinkError::Io("the stream was cut off".into())));
                }
                Ok(Some(length)) => {
                    if let Some(step) = self.take(&chunk[..length], &mut left, emit) {
                        return step;
                    }
                }
                Err(error) => return Step::End(LinkEvent::Failed(error)),
            }
        }
        Step::Wait { more: true }
    }

    fn take(&mut self, bytes: &[u8], left: &mut usize, emit: &mut dyn FnMut(LinkEvent)) -> Option<Step> {
        let mut data = Vec::new();
        let taken = self.body.take(bytes, &mut data);
        if !data.is_empty() {
            emit(LinkEvent::Bytes(data));
            *left -= 1;
        }
        match taken {
            Err(what) => Some(Step::End(LinkEvent::Failed(LinkError::Protocol(what.into())))),
            Ok(()) if self.body.done() => Some(Step::End(closed())),
            Ok(()) => None,
        }
    }
}

const fn closed() -> LinkEvent {
    LinkEvent::Closed { code: None, reason: String::new() }
}
