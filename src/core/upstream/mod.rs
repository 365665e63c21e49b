//! Upstream sessions: one protocol each, sans-IO, behind one enum. Siblings (`delivery`, `lifecycle`) are not known here.
//!
//! One door in (`handle_*` and the commands), one door out ([`Session::poll_output`] until `None`, then
//! [`Session::poll_timeout`]).

pub mod autopush;
pub mod backoff;
pub mod ntfy;
mod quiet;

use std::{sync::Arc, time::Duration};

use crate::{
    config::{UpstreamKind, UpstreamSettings},
    event::{LinkEvent, LinkId},
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
    },
    /// Send a text frame.
    Send(LinkId, String),
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
        /// `uaid`, `cursor`.
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
    /// RFC 8030 Urgency, where the upstream says so.
    pub urgency: Urgency,
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
}

/// How long a registration may take before the app is told NETWORK (push.md §6.4; D-Bus callers give up after 25 s).
pub const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);
/// From asking for a link to its first protocol frame.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the peer may take to answer a ping that is to prove the path.
pub const PROOF_TIMEOUT: Duration = Duration::from_secs(10);

impl Session {
    /// A session for `settings`. `remembered` gives what an earlier life asked to remember, `channels` what it served;
    /// `seed` feeds channel names and jitter. Link ids are taken from `links`, which all sessions share.
    pub fn new(
        settings: &UpstreamSettings,
        remembered: impl Fn(&str) -> Option<Arc<str>>,
        channels: Vec<Channel>,
        seed: [u8; 32],
        links: LinkIds,
        now: Now,
    ) -> Self {
        match settings.kind {
            UpstreamKind::Autopush => {
                Self::Autopush(autopush::Session::new(remembered("uaid"), channels, seed, links, now))
            }
            UpstreamKind::Ntfy => {
                Self::Ntfy(ntfy::Session::new(settings.http_url(), remembered("cursor"), channels, seed, links, now))
            }
        }
    }

    /// An event on one of this session's links. Events of links it has given up are ignored.
    pub fn handle_link(&mut self, link: LinkId, event: LinkEvent, now: Now) {
        match self {
            Self::Autopush(session) => session.handle_link(link, event, now),
            Self::Ntfy(session) => session.handle_link(link, event, now),
        }
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        match self {
            Self::Autopush(session) => session.handle_timeout(now),
            Self::Ntfy(session) => session.handle_timeout(now),
        }
    }

    /// The network came back or changed, or the machine woke up: forget the backoff and try at once; an open link is
    /// proved by a ping with [`PROOF_TIMEOUT`].
    pub fn handle_network(&mut self, now: Now) {
        match self {
            Self::Autopush(session) => session.handle_network(now),
            Self::Ntfy(session) => session.handle_network(now),
        }
    }

    /// Messages were turned away that the server still has: connect anew, so that it sends them again.
    pub fn restart(&mut self, now: Now) {
        match self {
            Self::Autopush(session) => session.restart(now),
            Self::Ntfy(session) => session.restart(now),
        }
    }

    /// Make a registration. Ends with `Registered` or `RegisterFailed` within [`REGISTER_TIMEOUT`].
    pub fn register(&mut self, registration: RegistrationId, vapid: Option<Arc<str>>, now: Now) {
        match self {
            Self::Autopush(session) => session.register(registration, vapid, now),
            Self::Ntfy(session) => session.register(registration, now),
        }
    }

    /// Give a registration up, whether it exists or is in flight. Nothing comes back.
    pub fn unregister(&mut self, registration: RegistrationId, now: Now) {
        match self {
            Self::Autopush(session) => session.unregister(registration, now),
            Self::Ntfy(session) => session.unregister(registration, now),
        }
    }

    /// The message with this id is durable, accepted by its app, or known and done before: acknowledge it. Called once
    /// for every `Output::Message` delivered, duplicates included, in any order.
    pub fn safe(&mut self, registration: RegistrationId, id: &Arc<str>, now: Now) {
        match self {
            Self::Autopush(session) => session.safe(registration, id, now),
            Self::Ntfy(session) => session.safe(registration, id, now),
        }
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        match self {
            Self::Autopush(session) => session.poll_output(),
            Self::Ntfy(session) => session.poll_output(),
        }
    }

    /// When [`Session::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self {
            Self::Autopush(session) => session.poll_timeout(),
            Self::Ntfy(session) => session.poll_timeout(),
        }
    }

    /// What `status` shows.
    pub fn standing(&self) -> Standing {
        match self {
            Self::Autopush(session) => session.standing(),
            Self::Ntfy(session) => session.standing(),
        }
    }
}

/// Link names for one session: session `index` of `count` takes every `count`th number, so that no two share one.
#[derive(Clone, Copy, Debug)]
pub struct LinkIds {
    next: u64,
    step: u64,
}

impl LinkIds {
    /// The names for session `index` of `count`.
    pub const fn new(index: u64, count: u64) -> Self {
        Self { next: index, step: count }
    }

    /// Which session a link belongs to.
    pub const fn session_of(link: LinkId, count: u64) -> u64 {
        link.0 % count
    }

    /// A name not used before.
    pub const fn take(&mut self) -> LinkId {
        let link = LinkId(self.next);
        self.next += self.step;
        link
    }
}
