//! Upstream sessions: one protocol each, sans-IO, behind one enum. Siblings (`delivery`, `lifecycle`) are not known here.
//!
//! One door in (`handle_*` and the commands), one door out ([`Session::poll_output`] until `None`, then
//! [`Session::poll_timeout`]).

pub mod autopush;
pub mod backoff;
pub mod gotify;
pub mod heartbeat;
pub mod mqtt;
pub mod nextpush;
pub mod ntfy;
mod quiet;
mod rest;
mod sse;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    action::HttpRequest,
    config::{NetworkSettings, UpstreamKind, UpstreamSettings},
    event::{HttpError, HttpResponse, HttpTicket, LinkEvent, LinkId},
    model::{FailureReason, RegistrationId, Urgency},
    time::{Instant, Now, UnixTime},
    view::LinkState,
};

/// One upstream's session.
#[derive(Debug)]
pub enum Session {
    /// Mozilla autopush and `nightporter-relay`.
    Autopush(autopush::Session),
    /// ntfy.
    Ntfy(ntfy::Session),
    /// MQTT 5 and 3.1.1.
    Mqtt(Box<mqtt::Session>),
    /// Nextcloud's uppush.
    NextPush(nextpush::Session),
    /// Gotify.
    Gotify(gotify::Session),
}

/// A registration the session serves, as restored from the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Channel {
    /// Whose.
    pub registration: RegistrationId,
    /// The upstream's name for it.
    pub channel: Arc<str>,
    /// VAPID key it was registered with.
    pub vapid: Option<Arc<str>>,
    /// The endpoint the app knows.
    pub endpoint: Arc<str>,
}

/// What a session wants done or known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Open a link; `path` is appended to the base URL.
    Connect {
        /// Its name.
        link: LinkId,
        /// Path and query below the base URL.
        path: String,
        /// Header fields of the request, where there is one.
        headers: Vec<(&'static str, String)>,
    },
    /// Send a text frame.
    Send(LinkId, String),
    /// Send a binary frame, or bytes on a stream.
    SendBytes(LinkId, Vec<u8>),
    /// Make an HTTP request; answered with [`Session::handle_http`].
    Http(HttpTicket, HttpRequest),
    /// Send a ping frame.
    Ping(LinkId),
    /// Close a link.
    Close(LinkId),
    /// A registration asked for is made, or an existing one has moved to another channel or endpoint.
    Registered {
        /// Whose.
        registration: RegistrationId,
        /// The upstream's name for it.
        channel: Arc<str>,
        /// Its capability URL: not empty, at most 1000 bytes.
        endpoint: Arc<str>,
    },
    /// A registration asked for could not be made; the session has forgotten it. Never for one that existed.
    RegisterFailed {
        /// Whose.
        registration: RegistrationId,
        /// The word for the app.
        reason: FailureReason,
        /// What happened, for the log.
        text: String,
    },
    /// A registration that existed is dead at the server and cannot be made again (not a transient failure).
    Lost {
        /// Whose.
        registration: RegistrationId,
        /// What happened, for the log.
        text: String,
    },
    /// A message. The session does not acknowledge it before [`Session::safe`] is called with the same id.
    Message(IncomingMessage),
    /// Remember a value across restarts.
    Remember {
        /// `uaid`, `cursor`, `heartbeat`, …: a few per protocol.
        key: &'static str,
        /// The value; empty forgets it.
        value: String,
    },
    /// The same, but not before every registration told of until now is durable.
    RememberBehind {
        /// As in `Remember`.
        key: &'static str,
        /// As in `Remember`.
        value: String,
    },
    /// The state shown by `status` changed; log it.
    StateChanged(LinkState),
}

/// A message as the upstream sent it; not yet checked for duplicates or size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IncomingMessage {
    /// Whom it is for.
    pub registration: RegistrationId,
    /// The upstream's id: autopush's `version`, ntfy's `id`.
    pub id: Arc<str>,
    /// What it carries.
    pub body: IncomingBody,
    /// When it is of no use any more, where the upstream says so.
    pub expires: Option<UnixTime>,
    /// RFC 8030 Topic, where the upstream says so.
    pub topic: Option<Arc<str>>,
    /// RFC 8030 Urgency, where the protocol carries it.
    pub urgency: Option<Urgency>,
}

/// What a message carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IncomingBody {
    /// The bytes, possibly none.
    Bytes(Arc<[u8]>),
    /// To be fetched (ntfy, senders without UnifiedPush mode).
    Attachment {
        /// Absolute URL.
        url: String,
        /// Size the server claims, in bytes.
        size: Option<u64>,
    },
    /// Something that could not be decoded; to be dropped and called safe.
    Undecodable(String),
}

/// What `status` shows of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Where it stands.
    pub state: LinkState,
    /// Since when.
    pub since: Instant,
    /// The next attempt, when waiting for one.
    pub retry_at: Option<Instant>,
    /// Why the last connection ended or failed.
    pub last_error: Option<Arc<str>>,
    /// Set when only the user can mend it (credentials refused), as a sentence.
    pub trouble: Option<Arc<str>>,
    /// Registrations served, those in flight included.
    pub registrations: usize,
    /// The heartbeat in use while there is a link.
    pub heartbeat: Option<Heartbeat>,
}

/// What keeps a link alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Between two signs of life.
    pub interval: Duration,
    /// Whether the server sets the rhythm; else this client does.
    pub by_server: bool,
}

/// How long a registration may take before the app is told NETWORK (push.md §6.4; D-Bus callers give up after 25 s).
pub const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);
/// From asking for a link to its first protocol frame.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the peer may take to answer a ping that is to prove the path.
pub const PROOF_TIMEOUT: Duration = Duration::from_secs(10);
/// After so much of that another link is begun beside the one in doubt, which may still answer: a server that sent into a
/// gap of half a minute repeats itself only after another, however soon the path is back.
pub const DOUBT: Duration = Duration::from_secs(1);

/// What a session begins with.
#[derive(Debug)]
pub struct Beginning<'a> {
    /// The server, and how to log in there.
    pub settings: &'a UpstreamSettings,
    /// How the network may be used.
    pub network: &'a NetworkSettings,
    /// What an earlier life asked to remember: keys and values.
    pub remembered: BTreeMap<Arc<str>, Arc<str>>,
    /// The registrations it served.
    pub channels: Vec<Channel>,
    /// Feeds the names of channels and the jitter.
    pub seed: [u8; 32],
    /// Names for its links and requests.
    pub links: LinkIds,
}

impl Beginning<'_> {
    /// A remembered value.
    pub fn remembered(&self, key: &str) -> Option<Arc<str>> {
        self.remembered.get(key).cloned()
    }
}

/// Calls the same method of whichever session it is.
macro_rules! each {
    ($self:expr, $session:ident => $call:expr) => {
        match $self {
            Self::Autopush($session) => $call,
            Self::Ntfy($session) => $call,
            Self::Mqtt($session) => $call,
            Self::NextPush($session) => $call,
            Self::Gotify($session) => $call,
        }
    };
}

impl Session {
    /// The session for the kind of server it is.
    pub fn new(beginning: Beginning<'_>, now: Now) -> Self {
        match beginning.settings.kind {
            UpstreamKind::Autopush => Self::Autopush(autopush::Session::new(
                beginning.remembered("uaid"),
                beginning.channels,
                beginning.seed,
                beginning.links,
                now,
            )),
            UpstreamKind::Ntfy => Self::Ntfy(ntfy::Session::new(
                beginning.settings.http_url(),
                beginning.settings.short_topics,
                beginning.remembered("cursor"),
                beginning.channels,
                beginning.seed,
                beginning.links,
                now,
            )),
            UpstreamKind::Mqtt => Self::Mqtt(Box::new(mqtt::Session::new(beginning, now))),
            UpstreamKind::NextPush => Self::NextPush(nextpush::Session::new(beginning, now)),
            UpstreamKind::Gotify => Self::Gotify(gotify::Session::new(beginning, now)),
        }
    }

    /// An event on one of this session's links. Events of links it has given up are ignored.
    pub fn handle_link(&mut self, link: LinkId, event: LinkEvent, now: Now) {
        each!(self, session => session.handle_link(link, event, now));
    }

    /// A request of this session ended. Those of requests it has given up are ignored.
    pub fn handle_http(&mut self, ticket: HttpTicket, result: Result<HttpResponse, HttpError>, now: Now) {
        match self {
            Self::Autopush(_) | Self::Ntfy(_) | Self::Mqtt(_) => {}
            Self::NextPush(session) => session.handle_http(ticket, result, now),
            Self::Gotify(session) => session.handle_http(ticket, result, now),
        }
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        each!(self, session => session.handle_timeout(now));
    }

    /// The network came back or changed, or the machine woke up: forget the backoff and try at once; an open link is
    /// proved by a ping with [`PROOF_TIMEOUT`].
    pub fn handle_network(&mut self, now: Now) {
        each!(self, session => session.handle_network(now));
    }

    /// Which network it is now, for what is learnt about it; told before [`Session::handle_network`], and only when it
    /// has changed.
    pub fn set_network(&mut self, id: Option<Arc<str>>, now: Now) {
        match self {
            Self::Autopush(_) | Self::Ntfy(_) | Self::NextPush(_) | Self::Gotify(_) => {}
            Self::Mqtt(session) => session.set_network(id, now),
        }
    }

    /// The least urgency that may wake any app now, for servers that can keep back what is below it. `VeryLow` at first.
    pub fn set_min_urgency(&mut self, urgency: Urgency, now: Now) {
        match self {
            Self::Autopush(_) | Self::Ntfy(_) | Self::Mqtt(_) | Self::Gotify(_) => {}
            Self::NextPush(session) => session.set_min_urgency(urgency, now),
        }
    }

    /// Whether there may be a link at all (roaming). Without it registrations fail with NETWORK. True at first.
    pub fn set_allowed(&mut self, allowed: bool, now: Now) {
        each!(self, session => session.set_allowed(allowed, now));
    }

    /// Messages were turned away that the server still has: connect anew, so that it sends them again.
    pub fn restart(&mut self, now: Now) {
        each!(self, session => session.restart(now));
    }

    /// Make a registration. Ends with `Registered` or `RegisterFailed` within [`REGISTER_TIMEOUT`].
    pub fn register(&mut self, registration: RegistrationId, vapid: Option<Arc<str>>, now: Now) {
        match self {
            Self::Autopush(session) => session.register(registration, vapid, now),
            Self::Ntfy(session) => session.register(registration, now),
            Self::Mqtt(session) => session.register(registration, now),
            Self::NextPush(session) => session.register(registration, vapid, now),
            Self::Gotify(session) => session.register(registration, now),
        }
    }

    /// Give a registration up, whether it exists or is in flight. Nothing comes back.
    pub fn unregister(&mut self, registration: RegistrationId, now: Now) {
        each!(self, session => session.unregister(registration, now));
    }

    /// The message with this id is durable, accepted by its app, or known and done before: acknowledge it. Called once
    /// for every `Output::Message` delivered, duplicates included, in any order. Ids of other sessions are ignored.
    pub fn safe(&mut self, registration: RegistrationId, id: &Arc<str>, now: Now) {
        each!(self, session => session.safe(registration, id, now));
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        each!(self, session => session.poll_output())
    }

    /// When [`Session::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        each!(self, session => session.poll_timeout())
    }

    /// The part of [`Session::poll_timeout`] that is worth waking a sleeping machine for: a heartbeat of our own rhythm,
    /// without which the link dies.
    pub fn poll_wake(&self) -> Option<Instant> {
        match self {
            Self::Autopush(_) | Self::Ntfy(_) | Self::NextPush(_) | Self::Gotify(_) => None,
            Self::Mqtt(session) => session.poll_wake(),
        }
    }

    /// What `status` shows.
    pub fn standing(&self) -> Standing {
        each!(self, session => session.standing())
    }
}

/// Names for the links and requests of one session: those of session `index` never meet another's.
#[derive(Clone, Copy, Debug)]
pub struct LinkIds {
    next: u64,
}

/// Where in a name the session's index is; below it 2^40 names fit.
const INDEX_SHIFT: u32 = 40;

impl LinkIds {
    /// The names for session `index`.
    pub const fn new(index: u32) -> Self {
        Self { next: (index as u64) << INDEX_SHIFT }
    }

    /// Which session a link belongs to.
    pub const fn session_of(link: LinkId) -> usize {
        (link.0 >> INDEX_SHIFT) as usize
    }

    /// Which session a request belongs to.
    pub const fn session_of_request(ticket: HttpTicket) -> usize {
        (ticket.0 >> INDEX_SHIFT) as usize
    }

    /// A name for a link, not used before.
    pub const fn take(&mut self) -> LinkId {
        LinkId(self.number())
    }

    /// A name for a request, not used before.
    pub const fn take_request(&mut self) -> HttpTicket {
        HttpTicket(self.number())
    }

    const fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }
}
