//! An open WebSocket (RFC 6455), by tungstenite.

use std::io;

use tungstenite::{
    Message, WebSocket,
    protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
};

use super::{connection::Step, error_of_io, stream::WRITE_LIMIT, transport::Transport};
use crate::event::{LinkError, LinkEvent};

/// The largest message taken. A push body of 4096 bytes is about 5.5 kB in base64 with its JSON.
const MESSAGE_LIMIT: usize = 64 * 1024;
/// Read at once, and kept by an idle link.
const READ_BUFFER: usize = 4 * 1024;

#[derive(Debug)]
pub(super) struct Frames {
    socket: Box<WebSocket<Transport>>,
    unflushed: bool,
}

impl Frames {
    /// `rest` came right behind the answer to the handshake.
    pub(super) fn new(transport: Transport, rest: Vec<u8>) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .write_buffer_size(0)
            .max_write_buffer_size(WRITE_LIMIT)
            .max_message_size(Some(MESSAGE_LIMIT))
            .max_frame_size(Some(MESSAGE_LIMIT));
        let socket = WebSocket::from_partially_read(transport, rest, Role::Client, Some(config));
        Self { socket: Box::new(socket), unflushed: false }
    }

    pub(super) fn transport(&self) -> &Transport {
        self.socket.get_ref()
    }

    pub(super) fn transport_mut(&mut self) -> &mut Transport {
        self.socket.get_mut()
    }

    /// Whether something waits for the socket to take more.
    pub(super) fn unsent(&self) -> bool {
        self.unflushed || self.transport().wants_write()
    }

    pub(super) fn send(&mut self, message: Message) -> Result<(), LinkEvent> {
        match self.socket.write(message) {
            Ok(()) => {}
            // tungstenite has taken the frame.
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(self.last_event(error)),
        }
        self.flush()
    }

    /// Close frame, close_notify, FIN: whatever of them goes out at once.
    pub(super) fn close(&mut self) {
        let _ = self.socket.close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }));
        self.transport_mut().shutdown();
    }

    pub(super) fn drive(&mut self, writable: bool, budget: usize, emit: &mut dyn FnMut(LinkEvent)) -> Step {
        self.transport_mut().refill();
        if (writable || self.unflushed)
            && let Err(event) = self.flush()
        {
            return Step::End(event);
        }
        for _ in 0..budget {
            let event = match self.socket.read() {
                Ok(Message::Text(text)) => LinkEvent::Text(text.as_str().to_owned()),
                Ok(Message::Binary(bytes)) => LinkEvent::Bytes(bytes.to_vec()),
                Ok(Message::Ping(_)) => {
                    // autopush waits four seconds for the pong that tungstenite has queued.
                    if let Err(event) = self.flush() {
                        return Step::End(event);
                    }
                    LinkEvent::Ping
                }
                Ok(Message::Pong(_)) => LinkEvent::Pong,
                Ok(Message::Close(frame)) => {
                    // The answer to it, queued likewise; whether it gets through matters to nobody.
                    let _ = self.socket.flush();
                    self.transport_mut().shutdown();
                    let (code, reason) =
                        frame.map_or((None, String::new()), |f| (Some(f.code.into()), f.reason.as_str().to_owned()));
                    return Step::End(LinkEvent::Closed { code, reason });
                }
                // Never made by reading.
                Ok(Message::Frame(_)) => continue,
                Err(error) if would_block(&error) => {
                    return Step::Wait { more: self.transport_mut().throttled() };
                }
                Err(error) => return Step::End(self.last_event(error)),
            };
            emit(event);
        }
        Step::Wait { more: true }
    }

    fn flush(&mut self) -> Result<(), LinkEvent> {
        match self.socket.flush() {
            Ok(()) => self.unflushed = false,
            Err(error) if would_block(&error) => self.unflushed = true,
            Err(error) => return Err(self.last_event(error)),
        }
        Ok(())
    }

    /// What an error means, and the close frame it calls for (RFC 6455 §7.1.7), sent as far as that goes at once.
    fn last_event(&mut self, error: tungstenite::Error) -> LinkEvent {
        use tungstenite::error::{Error, ProtocolError};
        let (code, text) = match error {
            Error::ConnectionClosed
            | Error::AlreadyClosed
            | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
                return LinkEvent::Closed { code: None, reason: String::new() };
            }
            Error::Io(error) => return LinkEvent::Failed(error_of_io(&error)),
            Error::WriteBufferFull(_) => {
                return LinkEvent::Failed(LinkError::Io("the server does not read what it is sent".into()));
            }
            Error::Capacity(error) => (CloseCode::Size, error.to_string()),
            Error::Utf8(_) => (CloseCode::Invalid, "a text frame is not UTF-8".into()),
            other => (CloseCode::Protocol, other.to_string()),
        };
        let _ = self.socket.close(Some(CloseFrame { code, reason: "".into() }));
        self.transport_mut().shutdown();
        LinkEvent::Failed(LinkError::Protocol(text))
    }
}

fn would_block(error: &tungstenite::Error) -> bool {
    matches!(error, tungstenite::Error::Io(error) if error.kind() == io::ErrorKind::WouldBlock)
}
