//! One link from its first SYN to its last frame.

use std::{collections::VecDeque, io, mem, net::SocketAddr, sync::Arc, time::Duration};

use mio::{Interest, Registry, Token, net::TcpStream};
use rustls::{ClientConfig, pki_types::ServerName};
use tungstenite::{
    Message, WebSocket,
    protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
};

use super::{
    error_of_io,
    transport::Transport,
    upgrade::{Request, Upgrade},
};
use crate::{
    event::{LinkError, LinkEvent},
    sys::{
        memory,
        tls::{self, Roots},
    },
};

/// For one address to answer the SYN; then the next one is tried.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// For the rest of a refusal's words.
const REFUSAL_LIMIT: Duration = Duration::from_secs(2);
/// The largest message taken. A push body of 4096 bytes is about 5.5 kB in base64 with its JSON.
const MESSAGE_LIMIT: usize = 64 * 1024;
/// What waits for a peer that does not read: a few hundred registrations at once.
const WRITE_LIMIT: usize = 256 * 1024;
/// Read at once, and kept by an idle link.
const READ_BUFFER: usize = 4 * 1024;

/// What TLS needs, with the trusted certificates held until the handshake is done.
#[derive(Debug)]
pub(super) struct Tls {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
    pub(super) roots: Roots,
}

/// What to do after a [`Connection::drive`].
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing before the next readiness, unless there is `more`; at the latest after `limit`.
    Wait { more: bool, limit: Option<Duration> },
    /// This address failed.
    NextAddress(io::Error),
    /// The link's last event.
    End(LinkEvent),
}

#[derive(Debug)]
pub(super) struct Connection {
    phase: Phase,
    addresses: VecDeque<SocketAddr>,
    /// What the addresses tried so far said, for the case that none answers.
    last_error: Option<(SocketAddr, io::Error)>,
}

#[derive(Debug)]
enum Phase {
    /// Nothing open; between two addresses.
    Idle(Request, Option<Tls>),
    Connecting {
        socket: TcpStream,
        address: SocketAddr,
        request: Request,
        tls: Option<Tls>,
    },
    Upgrading {
        transport: Transport,
        upgrade: Upgrade,
        roots: Option<Roots>,
    },
    Open {
        socket: Box<WebSocket<Transport>>,
        unflushed: bool,
    },
    /// Ended, or in the middle of a change from one phase to the next.
    Gone,
}

impl Connection {
    pub(super) const fn new(addresses: VecDeque<SocketAddr>, request: Request, tls: Option<Tls>) -> Self {
        Self { phase: Phase::Idle(request, tls), addresses, last_error: None }
    }

    /// Begins with the next address that does not fail at once, `failed` being what the last one said. How long it may
    /// take, or why none is left.
    pub(super) fn next_address(
        &mut self,
        registry: &Registry,
        token: Token,
        failed: Option<io::Error>,
    ) -> Result<Duration, LinkError> {
        let (request, tls) = match mem::replace(&mut self.phase, Phase::Gone) {
            Phase::Idle(request, tls) => (request, tls),
            Phase::Connecting { mut socket, address, request, tls } => {
                // Closing it would do as well; the event queue is told for certain.
                let _ = registry.deregister(&mut socket);
                self.last_error = failed.map(|error| (address, error));
                (request, tls)
            }
            other => {
                self.phase = other;
                return Err(LinkError::Connect("it is connected already".into()));
            }
        };
        while let Some(address) = self.addresses.pop_front() {
            match begin(registry, token, address) {
                Ok(socket) => {
                    self.phase = Phase::Connecting { socket, address, request, tls };
                    return Ok(CONNECT_LIMIT);
                }
                Err(error) => self.last_error = Some((address, error)),
            }
        }
        Err(match self.last_error.take() {
            Some((_, error)) if error.kind() == io::ErrorKind::TimedOut => LinkError::Timeout,
            Some((address, error)) => LinkError::Connect(format!("{address}: {error}")),
            None => LinkError::Connect("no address to connect to".into()),
        })
    }

    /// Goes on as far as it can, with `budget` events at most. `writable`: the socket takes more.
    pub(super) fn drive(&mut self, writable: bool, budget: usize, emit: &mut dyn FnMut(LinkEvent)) -> Step {
        let mut left = budget;
        if let Phase::Connecting { socket, .. } = &mut self.phase {
            match connected(socket) {
                Ok(false) => return Step::Wait { more: false, limit: Some(CONNECT_LIMIT) },
                Ok(true) => {
                    if let Err(error) = self.begin_upgrade() {
                        return Step::End(LinkEvent::Failed(error));
                    }
                }
                Err(error) => return Step::NextAddress(error),
            }
        }
        if let Phase::Upgrading { transport, upgrade, roots } = &mut self.phase {
            transport.refill();
            match upgrade.drive(transport) {
                Err(error) => return Step::End(LinkEvent::Failed(error)),
                Ok(None) => {
                    if !transport.handshaking() {
                        *roots = None;
                    }
                    let limit = upgrade.refused().then_some(REFUSAL_LIMIT);
                    return Step::Wait { more: transport.throttled(), limit };
                }
                Ok(Some(rest)) => {
                    self.open(rest);
                    emit(LinkEvent::Open);
                    left = left.saturating_sub(1);
                }
            }
        }
        match &mut self.phase {
            Phase::Open { socket, unflushed } => frames(socket, unflushed, writable, left, emit),
            _ => Step::Wait { more: false, limit: None },
        }
    }

    /// The time given with the last step is over: why the link ends, or nothing, and the next address is due.
    pub(super) fn timed_out(&mut self) -> Option<LinkError> {
        match &self.phase {
            Phase::Connecting { .. } => None,
            Phase::Upgrading { upgrade, .. } => Some(upgrade.refusal().unwrap_or(LinkError::Timeout)),
            Phase::Idle(..) | Phase::Open { .. } | Phase::Gone => Some(LinkError::Timeout),
        }
    }

    pub(super) fn send(&mut self, text: String) -> Result<(), LinkEvent> {
        self.write(Message::text(text))
    }

    pub(super) fn ping(&mut self) -> Result<(), LinkEvent> {
        self.write(Message::Ping(tungstenite::Bytes::new()))
    }

    /// Close frame, close_notify, FIN: whatever of them goes out at once.
    pub(super) fn close(&mut self, registry: &Registry) {
        if let Phase::Open { socket, .. } = &mut self.phase {
            let _ = socket.close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }));
            socket.get_mut().shutdown();
        }
        self.deregister(registry);
    }

    pub(super) fn deregister(&mut self, registry: &Registry) {
        if let Some(socket) = self.socket() {
            // It fails only for what is not registered.
            let _ = registry.deregister(socket);
        }
        self.phase = Phase::Gone;
    }

    /// Whether something waits for the socket to take more.
    pub(super) fn wants_write(&self) -> bool {
        match &self.phase {
            Phase::Connecting { .. } => true,
            Phase::Upgrading { transport, upgrade, .. } => {
                transport.wants_write() || (upgrade.unsent() && !transport.handshaking())
            }
            Phase::Open { socket, unflushed } => *unflushed || socket.get_ref().wants_write(),
            Phase::Idle(..) | Phase::Gone => false,
        }
    }

    pub(super) fn socket(&mut self) -> Option<&mut TcpStream> {
        match &mut self.phase {
            Phase::Connecting { socket, .. } => Some(socket),
            Phase::Upgrading { transport, .. } => Some(transport.socket()),
            Phase::Open { socket, .. } => Some(socket.get_mut().socket()),
            Phase::Idle(..) | Phase::Gone => None,
        }
    }

    fn begin_upgrade(&mut self) -> Result<(), LinkError> {
        let Phase::Connecting { socket, request, tls, .. } = mem::replace(&mut self.phase, Phase::Gone) else {
            return Ok(());
        };
        let (transport, roots) = match tls {
            None => (Transport::plain(socket), None),
            Some(Tls { config, name, roots }) => {
                let transport =
                    Transport::tls(socket, config, name).map_err(|error| LinkError::Tls(tls::describe(&error)))?;
                (transport, Some(roots))
            }
        };
        self.addresses = VecDeque::new();
        self.phase = Phase::Upgrading { transport, upgrade: Upgrade::new(request), roots };
        Ok(())
    }

    fn open(&mut self, rest: Vec<u8>) {
        if let Phase::Upgrading { transport, roots, .. } = mem::replace(&mut self.phase, Phase::Gone) {
            let config = WebSocketConfig::default()
                .read_buffer_size(READ_BUFFER)
                .write_buffer_size(0)
                .max_write_buffer_size(WRITE_LIMIT)
                .max_message_size(Some(MESSAGE_LIMIT))
                .max_frame_size(Some(MESSAGE_LIMIT));
            let socket = WebSocket::from_partially_read(transport, rest, Role::Client, Some(config));
            self.phase = Phase::Open { socket: Box::new(socket), unflushed: false };
            // Reading the trust store has left some 300 KiB of holes in the heap, and nothing may happen for hours now.
            drop(roots);
            memory::trim();
        }
    }

    fn write(&mut self, message: Message) -> Result<(), LinkEvent> {
        let Phase::Open { socket, unflushed } = &mut self.phase else {
            log::debug!("a frame for a link that is not open is dropped");
            return Ok(());
        };
        match socket.write(message) {
            Ok(()) => {}
            // tungstenite has taken the frame.
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(last_event(socket, error)),
        }
        flush(socket, unflushed)
    }
}

fn begin(registry: &Registry, token: Token, address: SocketAddr) -> io::Result<TcpStream> {
    let mut socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    registry.register(&mut socket, token, Interest::READABLE | Interest::WRITABLE)?;
    Ok(socket)
}

/// As mio's `TcpStream::connect` says to find out.
fn connected(socket: &TcpStream) -> io::Result<bool> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    match socket.peer_addr() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}

fn frames(
    socket: &mut WebSocket<Transport>,
    unflushed: &mut bool,
    writable: bool,
    budget: usize,
    emit: &mut dyn FnMut(LinkEvent),
) -> Step {
    socket.get_mut().refill();
    if (writable || *unflushed)
        && let Err(event) = flush(socket, unflushed)
    {
        return Step::End(event);
    }
    for _ in 0..budget {
        let event = match socket.read() {
            Ok(Message::Text(text)) => LinkEvent::Text(text.as_str().to_owned()),
            Ok(Message::Binary(bytes)) => LinkEvent::Bytes(bytes.to_vec()),
            Ok(Message::Ping(_)) => {
                // autopush waits four seconds for the pong that tungstenite has queued.
                if let Err(event) = flush(socket, unflushed) {
                    return Step::End(event);
                }
                LinkEvent::Ping
            }
            Ok(Message::Pong(_)) => LinkEvent::Pong,
            Ok(Message::Close(frame)) => {
                // The answer to it, queued likewise; whether it gets through matters to nobody.
                let _ = socket.flush();
                socket.get_mut().shutdown();
                let (code, reason) =
                    frame.map_or((None, String::new()), |f| (Some(f.code.into()), f.reason.as_str().to_owned()));
                return Step::End(LinkEvent::Closed { code, reason });
            }
            // Never made by reading.
            Ok(Message::Frame(_)) => continue,
            Err(error) if would_block(&error) => {
                return Step::Wait { more: socket.get_ref().throttled(), limit: None };
            }
            Err(error) => return Step::End(last_event(socket, error)),
        };
        emit(event);
    }
    Step::Wait { more: true, limit: None }
}

fn flush(socket: &mut WebSocket<Transport>, unflushed: &mut bool) -> Result<(), LinkEvent> {
    match socket.flush() {
        Ok(()) => *unflushed = false,
        Err(error) if would_block(&error) => *unflushed = true,
        Err(error) => return Err(last_event(socket, error)),
    }
    Ok(())
}

fn would_block(error: &tungstenite::Error) -> bool {
    matches!(error, tungstenite::Error::Io(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// What an error means, and the close frame it calls for (RFC 6455 §7.1.7), sent as far as that goes at once.
fn last_event(socket: &mut WebSocket<Transport>, error: tungstenite::Error) -> LinkEvent {
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
    let _ = socket.close(Some(CloseFrame { code, reason: "".into() }));
    socket.get_mut().shutdown();
    LinkEvent::Failed(LinkError::Protocol(text))
}
