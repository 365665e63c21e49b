//! One link from its first SYN to its last byte.

use std::{io, mem, net::SocketAddr, sync::Arc, time::Duration};

use mio::{Registry, net::TcpStream};
use rustls::{ClientConfig, pki_types::ServerName};
use tungstenite::Message;

use super::{
    error_of_io, error_of_tls,
    event_stream::EventStream,
    exchange::{Exchange, Head},
    race::{Context, Lost, Race},
    stream::RawStream,
    transport::Transport,
    websocket::Frames,
};
use crate::{
    event::{LinkError, LinkEvent, Login},
    sys::{memory, tls::Roots},
    time::Instant,
};

/// For the rest of a refusal's words.
const REFUSAL_LIMIT: Duration = Duration::from_secs(2);
/// For a peer to take what it is sent.
const SEND_LIMIT: Duration = Duration::from_secs(60);

/// What TLS needs, with the trusted certificates held until the handshake is done.
#[derive(Debug)]
pub(super) struct Tls {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
    pub(super) _roots: Roots,
}

/// What to do once there is a connection.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) proxy: Option<Box<Proxy>>,
    pub(super) tls: Option<Tls>,
    pub(super) opening: Opening,
    pub(super) login: Option<Login>,
}

/// A proxy in between: the addresses are its own.
#[derive(Debug)]
pub(super) struct Proxy {
    /// For people.
    pub(super) name: String,
    pub(super) tls: Option<Tls>,
    pub(super) exchange: Exchange,
}

/// What makes the link one that can be used.
#[derive(Debug)]
pub(super) enum Opening {
    WebSocket(Box<Exchange>),
    EventStream(Box<Exchange>),
    /// The connection itself, encrypted where it is to be.
    Stream,
}

/// What to do after a [`Connection::drive`].
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing before the next readiness or deadline, unless there is `more`.
    Wait { more: bool },
    /// The link's last event.
    End(LinkEvent),
}

/// What came of a phase.
enum Advance {
    Wait { more: bool },
    Next,
    Open(Option<Login>),
}

#[derive(Debug)]
pub(super) struct Connection {
    phase: Phase,
    /// When the peer is given up on: it refuses and does not end, or does not take what it is sent.
    patience: Option<Instant>,
}

#[derive(Debug)]
enum Phase {
    Racing(Race, Box<Plan>),
    Tunnelling {
        transport: Transport,
        proxy: Box<Proxy>,
        plan: Box<Plan>,
    },
    Opening {
        transport: Transport,
        opening: Opening,
        login: Option<Login>,
        tls: Option<Tls>,
    },
    Open(Channel),
    /// Ended, or in the middle of a change from one phase to the next.
    Gone,
}

#[derive(Debug)]
enum Channel {
    WebSocket(Frames),
    EventStream(EventStream),
    Stream(RawStream),
}

impl Connection {
    pub(super) fn new(addresses: Vec<SocketAddr>, plan: Plan) -> Self {
        Self { phase: Phase::Racing(Race::new(addresses), Box::new(plan)), patience: None }
    }

    /// Goes on as far as it can, with about `budget` events. `writable`: the socket takes more.
    pub(super) fn drive(
        &mut self,
        context: Context<'_>,
        writable: bool,
        budget: usize,
        emit: &mut dyn FnMut(LinkEvent),
    ) -> Step {
        let mut left = budget;
        let step = loop {
            if let Phase::Open(channel) = &mut self.phase {
                break channel.drive(writable, left, emit);
            }
            match self.advance(context) {
                Ok(Advance::Wait { more }) => break Step::Wait { more },
                Ok(Advance::Next) => {}
                Ok(Advance::Open(login)) => {
                    left = left.saturating_sub(1 + usize::from(login.is_some()));
                    if let Some(login) = login {
                        emit(LinkEvent::Login(login));
                    }
                    emit(LinkEvent::Open);
                }
                Err(error) => break Step::End(LinkEvent::Failed(error)),
            }
        };
        match step {
            Step::Wait { .. } => {
                self.lose_patience(context.now).map_or(step, |error| Step::End(LinkEvent::Failed(error)))
            }
            Step::End(_) => step,
        }
    }

    /// When [`Connection::drive`] wants to be called without any readiness.
    pub(super) const fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Racing(race, _) => race.deadline(),
            _ => self.patience,
        }
    }

    pub(super) fn send(&mut self, text: String) -> Result<(), LinkEvent> {
        match &mut self.phase {
            Phase::Open(Channel::WebSocket(frames)) => frames.send(Message::text(text)),
            _ => dropped("a text frame"),
        }
    }

    pub(super) fn send_bytes(&mut self, bytes: Vec<u8>) -> Result<(), LinkEvent> {
        match &mut self.phase {
            Phase::Open(Channel::WebSocket(frames)) => frames.send(Message::Binary(bytes.into())),
            Phase::Open(Channel::Stream(stream)) => stream.send(&bytes).map_err(LinkEvent::Failed),
            _ => dropped("bytes"),
        }
    }

    /// Where there are frames; other protocols have pings of their own, or none.
    pub(super) fn ping(&mut self) -> Result<(), LinkEvent> {
        match &mut self.phase {
            Phase::Open(Channel::WebSocket(frames)) => frames.send(Message::Ping(tungstenite::Bytes::new())),
            _ => Ok(()),
        }
    }

    /// Close frame, close_notify, FIN: whatever of them goes out at once.
    pub(super) fn close(&mut self, registry: &Registry) {
        match &mut self.phase {
            Phase::Open(Channel::WebSocket(frames)) => frames.close(),
            Phase::Open(channel) => channel.transport_mut().shutdown(),
            _ => {}
        }
        self.deregister(registry);
    }

    pub(super) fn deregister(&mut self, registry: &Registry) {
        if let Phase::Racing(race, _) = &mut self.phase {
            race.close(registry);
        } else if let Some(socket) = self.socket() {
            // It fails only for what is not registered.
            let _ = registry.deregister(socket);
        }
        self.phase = Phase::Gone;
    }

    /// Whether something waits for the socket to take more.
    pub(super) fn wants_write(&self) -> bool {
        let pending = |transport: &Transport, exchange: &Exchange| {
            transport.wants_write() || (exchange.unsent() && !transport.handshaking())
        };
        match &self.phase {
            Phase::Racing(..) => true,
            Phase::Tunnelling { transport, proxy, .. } => pending(transport, &proxy.exchange),
            Phase::Opening { transport, opening, .. } => match opening {
                Opening::WebSocket(exchange) | Opening::EventStream(exchange) => pending(transport, exchange),
                Opening::Stream => transport.wants_write(),
            },
            Phase::Open(channel) => channel.unsent(),
            Phase::Gone => false,
        }
    }

    /// The one socket, once there is one.
    pub(super) fn socket(&mut self) -> Option<&mut TcpStream> {
        match &mut self.phase {
            Phase::Tunnelling { transport, .. } | Phase::Opening { transport, .. } => Some(transport.socket()),
            Phase::Open(channel) => Some(channel.transport_mut().socket()),
            Phase::Racing(..) | Phase::Gone => None,
        }
    }

    /// One phase's work.
    fn advance(&mut self, context: Context<'_>) -> Result<Advance, LinkError> {
        match &mut self.phase {
            Phase::Racing(race, plan) => {
                let won = race.drive(context).map_err(|lost| lost.into_error(plan))?;
                let Some(socket) = won else { return Ok(Advance::Wait { more: false }) };
                self.connected(socket)?;
            }
            Phase::Tunnelling { transport, proxy, .. } => {
                transport.refill();
                let answer = proxy.exchange.drive(transport).map_err(|error| of_proxy(&proxy.name, error))?;
                let Some((_, rest)) = answer else { return Ok(Advance::Wait { more: transport.throttled() }) };
                if !rest.is_empty() {
                    return Err(LinkError::Proxy(format!("{} speaks before it is asked", proxy.name)));
                }
                self.tunnelled()?;
            }
            Phase::Opening { transport, opening, tls, .. } => {
                transport.refill();
                let agreed = match opening {
                    Opening::WebSocket(exchange) | Opening::EventStream(exchange) => exchange.drive(transport)?,
                    Opening::Stream => {
                        let secured = transport.handshake().map_err(|error| error_of_io(&error))?;
                        secured.then(|| (Head::default(), Vec::new()))
                    }
                };
                let Some((head, rest)) = agreed else {
                    if !transport.handshaking() {
                        *tls = None;
                    }
                    return Ok(Advance::Wait { more: transport.throttled() });
                };
                return self.open(&head, rest).map(Advance::Open);
            }
            Phase::Open(_) | Phase::Gone => return Ok(Advance::Wait { more: false }),
        }
        Ok(Advance::Next)
    }

    fn connected(&mut self, socket: TcpStream) -> Result<(), LinkError> {
        if let Phase::Racing(_, mut plan) = mem::replace(&mut self.phase, Phase::Gone) {
            let transport = Transport::plain(socket);
            self.phase = match plan.proxy.take() {
                None => Phase::opening(transport, *plan)?,
                Some(proxy) => {
                    let transport =
                        secured(transport, proxy.tls.as_ref()).map_err(|error| of_proxy(&proxy.name, error))?;
                    Phase::Tunnelling { transport, proxy, plan }
                }
            };
        }
        Ok(())
    }

    fn tunnelled(&mut self) -> Result<(), LinkError> {
        if let Phase::Tunnelling { transport, plan, .. } = mem::replace(&mut self.phase, Phase::Gone) {
            self.phase = Phase::opening(transport, *plan)?;
        }
        self.patience = None;
        Ok(())
    }

    fn open(&mut self, head: &Head, rest: Vec<u8>) -> Result<Option<Login>, LinkError> {
        let Phase::Opening { transport, opening, login, tls } = mem::replace(&mut self.phase, Phase::Gone) else {
            return Ok(None);
        };
        let channel = match opening {
            Opening::WebSocket(_) => Channel::WebSocket(Frames::new(transport, rest)),
            Opening::EventStream(_) => Channel::EventStream(EventStream::new(transport, head, rest)?),
            Opening::Stream => Channel::Stream(RawStream::new(transport)),
        };
        self.phase = Phase::Open(channel);
        self.patience = None;
        // Reading the trust store has left some 300 KiB of holes in the heap, and nothing may happen for hours now.
        drop(tls);
        memory::trim();
        Ok(login)
    }

    /// The clock runs for a peer that refuses without end or takes nothing: why the link ends, once it has run out.
    pub(super) fn lose_patience(&mut self, now: Instant) -> Option<LinkError> {
        let (limit, error) = match &self.phase {
            Phase::Tunnelling { proxy, .. } if proxy.exchange.refused() => {
                (REFUSAL_LIMIT, proxy.exchange.refusal().unwrap_or(LinkError::Timeout))
            }
            Phase::Opening { opening: Opening::WebSocket(exchange) | Opening::EventStream(exchange), .. }
                if exchange.refused() =>
            {
                (REFUSAL_LIMIT, exchange.refusal().unwrap_or(LinkError::Timeout))
            }
            Phase::Open(channel) if channel.unsent() => {
                (SEND_LIMIT, LinkError::Io("the server does not read what it is sent".into()))
            }
            _ => {
                self.patience = None;
                return None;
            }
        };
        let end = *self.patience.get_or_insert(now + limit);
        (end <= now).then_some(error)
    }
}

impl Phase {
    fn opening(transport: Transport, plan: Plan) -> Result<Self, LinkError> {
        let Plan { tls, opening, login, .. } = plan;
        let transport = secured(transport, tls.as_ref())?;
        Ok(Self::Opening { transport, opening, login, tls })
    }
}

impl Channel {
    fn drive(&mut self, writable: bool, budget: usize, emit: &mut dyn FnMut(LinkEvent)) -> Step {
        match self {
            Self::WebSocket(frames) => frames.drive(writable, budget, emit),
            Self::EventStream(stream) => stream.drive(budget, emit),
            Self::Stream(stream) => stream.drive(budget, emit),
        }
    }

    fn unsent(&self) -> bool {
        match self {
            Self::WebSocket(frames) => frames.unsent(),
            Self::EventStream(stream) => stream.transport().wants_write(),
            Self::Stream(stream) => stream.unsent(),
        }
    }

    fn transport_mut(&mut self) -> &mut Transport {
        match self {
            Self::WebSocket(frames) => frames.transport_mut(),
            Self::EventStream(stream) => stream.transport_mut(),
            Self::Stream(stream) => stream.transport_mut(),
        }
    }
}

impl Lost {
    fn into_error(self, plan: &Plan) -> LinkError {
        match (self, &plan.proxy) {
            (Self::Failed(_, error), None) if error.kind() == io::ErrorKind::TimedOut => LinkError::Timeout,
            (Self::Failed(address, error), None) => LinkError::Connect(format!("{address}: {error}")),
            (Self::NoAddress, None) => LinkError::Connect("no address to connect to".into()),
            (Self::Failed(address, error), Some(proxy)) => {
                LinkError::Proxy(format!("cannot connect to {} at {address}: {error}", proxy.name))
            }
            (Self::NoAddress, Some(proxy)) => LinkError::Proxy(format!("{} has no address", proxy.name)),
        }
    }
}

fn secured(transport: Transport, tls: Option<&Tls>) -> Result<Transport, LinkError> {
    match tls {
        None => Ok(transport),
        Some(Tls { config, name, .. }) => {
            transport.secure(Arc::clone(config), name.clone()).map_err(|error| error_of_tls(&error))
        }
    }
}

/// Of an error on the way to the proxy.
fn of_proxy(name: &str, error: LinkError) -> LinkError {
    match error {
        LinkError::Proxy(_) | LinkError::Portal(_) | LinkError::Clock(_) => error,
        other => LinkError::Proxy(format!("{name}: {other}")),
    }
}

fn dropped(what: &str) -> Result<(), LinkEvent> {
    log::debug!("{what} for a link that takes none now is dropped");
    Ok(())
}
