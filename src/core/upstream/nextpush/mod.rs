//! NextPush: Nextcloud's uppush app (push.md §3c).
//!
//! The device is made once, at the first registration, and kept: its id, a secret, is remembered as `device`. Messages
//! come as server-sent events over `device/<id>`; everything else is HTTP requests beside it.
//!
//! **Acknowledgement.** Servers of version 2 give messages an `id:` and keep them until `DELETE message/<id>`, which is
//! sent when the core calls a message safe, never before. Older ones forget a message when they write it to the socket:
//! at most once, and nothing here can change that. Their messages get an id of our own, of which no two are alike.
//!
//! **A device the server has forgotten.** uppush answers `{"success":false}` then, with 401 (before version 2). An
//! answer of 404 in other words may also come from a Nextcloud that is just being updated, so the app itself is asked
//! first whether it is there. The next device's registrations are all made anew; until each is, the stored id is marked,
//! because a crash forgets which.
//!
//! **Another connection with the same device** makes the server say `close`. Two clients that answer that by connecting
//! would throw each other out for ever, so this one waits for minutes. But a server also says it to the very connection
//! that has just been made, when the request before it was cut off at a bad moment; a `close` right at the beginning
//! therefore counts only the second time.
//!
//! **Proving the path.** Nothing can be sent over an event stream, and an answer to another request would prove the path,
//! not this connection, whose NAT entry or address may be gone. So after a change of the network the stream has
//! [`PROOF_TIMEOUT`] to bring anything, and is made anew if it does not.
//!
//! The device is kept when the last registration goes. It costs the server a row, and deleting it would take a second
//! request at each first registration.

mod link;
mod registrations;
mod wire;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand_chacha::{
    ChaCha12Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{
    Beginning, CONNECT_TIMEOUT, Heartbeat, LinkIds, Output, PROOF_TIMEOUT, Standing,
    backoff::Backoff,
    quiet::Quiet,
    rest::{deletions::Deletions, is_plain, registrations::Registrations},
    sse::Parser,
};
use crate::{
    event::{HttpError, HttpResponse, HttpTicket, LinkEvent, LinkId},
    model::{FailureReason, RegistrationId, Urgency},
    time::{Instant, Now, earliest},
    view::LinkState,
};

/// The largest event taken: a body of 64 KiB in base64. Web Push bodies have 4 KiB.
const EVENT_LIMIT: usize = 96 * 1024;
/// Bytes of an answer looked at.
const ANSWER_LIMIT: u32 = 16 * 1024;
/// What the server's interval is taken for until it says one: the default of versions that say none.
const KEEPALIVE: Duration = Duration::from_secs(300);
/// Shorter and longer intervals than these are not believed.
const KEEPALIVE_RANGE: (u64, u64) = (5, 3600);
/// A link that lived this long has proved the server well.
const PROVEN: Duration = Duration::from_secs(30);
/// A `close` sooner than this may have been meant for the connection before.
const OWN_CLOSE: Duration = Duration::from_secs(10);
/// An attempt older than this may date from before the network came back.
const STALE_ATTEMPT: Duration = Duration::from_secs(2);
/// For so long a refusal of the credentials is the answer to every app; after it an app's registration may try again.
const TROUBLE_HOLDS: Duration = Duration::from_secs(30);
/// Between two connections of which the second only tells the server another urgency.
const URGENCY_SPACING: Duration = Duration::from_secs(30);
/// Messages not yet safe; with more the link is given up and the server sends them again later.
const UNSAFE_LIMIT: usize = 4096;

/// Ahead of a remembered device: some registrations are not made under it yet, and which ones would be forgotten in a
/// crash. No server's id begins with it.
const REMAKING: &str = "?";

/// One server's session.
#[derive(Debug)]
pub struct Session {
    base: String,
    rng: ChaCha12Rng,
    links: LinkIds,
    device: Option<Arc<str>>,
    /// The device is new, and not every registration has been made anew yet.
    remaking: bool,
    /// An earlier life died in the middle of that: names from the store may be of either device.
    mixed: bool,
    registrations: Registrations,
    deletions: Deletions,
    link: Link,
    backoff: Backoff,
    urgency: Urgency,
    allowed: bool,
    /// Another connection has the device.
    taken_over: bool,
    /// Times in a row that the server said `close` right at the beginning.
    early_closes: u32,
    /// The server gives messages an id: it is of version 2, and looks at the urgency.
    has_ids: bool,
    /// The server's ids of messages not yet safe.
    unsafe_messages: HashMap<(RegistrationId, Arc<str>), String>,
    /// For messages without an id: this life's name and a count.
    nonce: u64,
    count: u64,
    outputs: VecDeque<Output>,
    state: LinkState,
    since: Instant,
    last_error: Option<Arc<str>>,
    /// Requests are refused.
    trouble: Option<Arc<str>>,
    trouble_since: Instant,
    /// The stream is refused, or another has it.
    link_trouble: Option<Arc<str>>,
    quiet_events: Quiet,
    quiet_unknown: Quiet,
}

#[derive(Debug)]
enum Link {
    Down,
    /// A device is asked for.
    Creating {
        ticket: HttpTicket,
        asked: Instant,
    },
    /// The app is asked whether it is there, after it did not know the device.
    Asking {
        ticket: HttpTicket,
        asked: Instant,
    },
    Stream(Box<Stream>),
}

#[derive(Debug)]
struct Stream {
    id: LinkId,
    asked: Instant,
    /// The answer has begun.
    open: bool,
    /// The first event came.
    started: Option<Instant>,
    heard: Instant,
    keepalive: Duration,
    proof_by: Option<Instant>,
    urgency: Urgency,
    parser: Parser,
}

impl Stream {
    /// 2.2 intervals: one ping may be lost in a proxy, and the next be late.
    fn silence_ends(&self) -> Instant {
        self.heard + self.keepalive * 11 / 5
    }
}

impl Session {
    /// A session that goes on where an earlier life ended; connects when there are registrations.
    pub fn new(beginning: Beginning<'_>, now: Now) -> Self {
        let remembered = beginning.remembered("device").filter(|device| !device.is_empty());
        let unfinished = remembered.as_deref().and_then(|device| device.strip_prefix(REMAKING)).map(Arc::from);
        let remaking = unfinished.is_some();
        let mut rng = ChaCha12Rng::from_seed(beginning.seed);
        let nonce = rng.next_u64();
        let mut session = Self {
            base: beginning.settings.http_url(),
            rng,
            links: beginning.links,
            device: unfinished.or(remembered).filter(|device| is_plain(device)),
            remaking,
            mixed: remaking,
            registrations: Registrations::default(),
            deletions: Deletions::default(),
            link: Link::Down,
            backoff: Backoff::default(),
            urgency: Urgency::VeryLow,
            allowed: true,
            taken_over: false,
            early_closes: 0,
            has_ids: false,
            unsafe_messages: HashMap::new(),
            nonce,
            count: 0,
            outputs: VecDeque::new(),
            state: LinkState::Idle,
            since: now.boot,
            last_error: None,
            trouble: None,
            trouble_since: now.boot,
            link_trouble: None,
            quiet_events: Quiet::default(),
            quiet_unknown: Quiet::default(),
        };
        for channel in beginning.channels {
            session.registrations.restore(channel, remaking, now.boot);
        }
        if !session.registrations.is_empty() {
            session.backoff.at_once(now.boot);
        }
        session.settle(now.boot);
        session
    }

    /// An event on a link.
    pub fn handle_link(&mut self, link: LinkId, event: LinkEvent, now: Now) {
        let Link::Stream(stream) = &mut self.link else { return };
        if stream.id != link {
            return;
        }
        let doubted = event.is_last() && stream.proof_by.is_some();
        match event {
            LinkEvent::Open => stream.open = true,
            LinkEvent::Bytes(bytes) => {
                stream.heard = now.boot;
                stream.proof_by = None;
                let items = stream.parser.push(&bytes);
                self.items(link, items, now.boot);
            }
            LinkEvent::Text(_) | LinkEvent::Ping | LinkEvent::Pong | LinkEvent::Login(_) => {}
            LinkEvent::Closed { .. } => self.ended(now.boot),
            LinkEvent::Failed(error) => self.failed(&error, now.boot),
        }
        if doubted {
            self.backoff.ended_in_doubt(!matches!(self.link, Link::Down), now.boot);
        }
        self.settle(now.boot);
    }

    /// A request ended.
    pub fn handle_http(&mut self, ticket: HttpTicket, result: Result<HttpResponse, HttpError>, now: Now) {
        let now = now.boot;
        match &self.link {
            Link::Creating { ticket: own, .. } if *own == ticket => self.created(result, now),
            Link::Asking { ticket: own, .. } if *own == ticket => self.told_of_app(result, now),
            _ if self.deletions.owns(ticket) => {
                let gone = result.as_ref().is_ok_and(|answer| wire::says_no(&answer.body));
                self.deletions.answered(ticket, result, gone, now, &mut self.rng);
            }
            _ => self.app_answer(ticket, result, now),
        }
        self.settle(now);
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        let now = now.boot;
        let mut end = None;
        match &self.link {
            Link::Creating { asked, .. } | Link::Asking { asked, .. } if *asked + CONNECT_TIMEOUT <= now => {
                self.link_ended("the server did not answer in time", now);
                self.backoff.failed(None, now, &mut self.rng);
            }
            Link::Down | Link::Creating { .. } | Link::Asking { .. } => {}
            Link::Stream(stream) => {
                let id = stream.id;
                if stream.started.is_none() && stream.asked + CONNECT_TIMEOUT <= now {
                    let why = match stream.open {
                        true => "the server answered, but no event comes through: a proxy in between keeps them back",
                        false => "the server did not answer in time",
                    };
                    end = Some((id, why, false));
                } else if stream.proof_by.is_some_and(|by| by <= now) {
                    end = Some((id, "connected anew because the network changed", true));
                } else if stream.started.is_some() && stream.silence_ends() <= now {
                    end = Some((id, "the server fell silent", false));
                }
            }
        }
        if let Some((id, why, at_once)) = end {
            self.drop_link(id, why, now);
            match at_once {
                true => self.backoff.at_once(now),
                false => self.backoff.failed(None, now, &mut self.rng),
            }
        }
        self.settle(now);
    }

    /// The network came back or changed, or the machine woke up.
    pub fn handle_network(&mut self, now: Now) {
        let now = now.boot;
        let stale = |asked: Instant| now.since(asked) >= STALE_ATTEMPT;
        match &mut self.link {
            Link::Stream(stream) if stream.started.is_some() => {
                stream.proof_by.get_or_insert(now + PROOF_TIMEOUT);
            }
            Link::Stream(stream) if stale(stream.asked) => {
                let id = stream.id;
                self.drop_link(id, "tried again because the network changed", now);
                self.backoff.at_once(now);
            }
            Link::Creating { asked, .. } | Link::Asking { asked, .. } if stale(*asked) => {
                self.link_ended("tried again because the network changed", now);
                self.backoff.at_once(now);
            }
            Link::Stream(_) | Link::Creating { .. } | Link::Asking { .. } => {}
            // Not to be fought for, whatever the network.
            Link::Down if self.taken_over || self.registrations.is_empty() => {}
            Link::Down => self.backoff.at_once(now),
        }
        self.registrations.hurry(now);
        self.deletions.at_once(now);
        self.settle(now);
    }

    /// The least urgency that may wake any app now: a header of the next connection. Lowered, the server has messages to
    /// send that it held back. Raised, a connection is worth it only for a server that is known to look at it.
    pub fn set_min_urgency(&mut self, urgency: Urgency, now: Now) {
        self.urgency = urgency;
        self.settle(now.boot);
    }

    /// Whether there may be a link at all.
    pub fn set_allowed(&mut self, allowed: bool, now: Now) {
        let now = now.boot;
        if std::mem::replace(&mut self.allowed, allowed) == allowed {
            return;
        }
        if allowed {
            self.registrations.hurry(now);
            if !self.registrations.is_empty() {
                self.backoff.at_once(now);
            }
        } else {
            let why = "connections are not allowed on this network (network.roaming)";
            self.close(why, now);
            self.fail_waiting(FailureReason::Network, why);
        }
        self.settle(now);
    }

    /// Messages were turned away that the server still has: it sends them again on a new link.
    pub fn restart(&mut self, now: Now) {
        self.unsafe_messages.clear();
        if let Link::Stream(stream) = &self.link {
            let id = stream.id;
            self.drop_link(id, "connected anew to get messages again that could not be stored", now.boot);
            self.backoff.at_once(now.boot);
        }
        self.settle(now.boot);
    }

    /// Make a registration.
    pub fn register(&mut self, registration: RegistrationId, vapid: Option<Arc<str>>, now: Now) {
        let now = now.boot;
        let refusal = match &self.trouble {
            _ if !self.allowed => {
                Some((FailureReason::Network, "connections are not allowed on this network".to_owned()))
            }
            Some(trouble) if now.since(self.trouble_since) < TROUBLE_HOLDS => {
                Some((FailureReason::ActionRequired, trouble.to_string()))
            }
            Some(_) | None => None,
        };
        if let Some((reason, text)) = refusal {
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
            return;
        }
        let first = self.registrations.is_empty();
        if !self.registrations.add(registration, vapid, now) {
            return;
        }
        if matches!(self.link, Link::Down) && !self.taken_over {
            if first {
                // Whatever was due was for registrations that are gone.
                self.backoff.clear();
            }
            self.backoff.hurry(now);
        }
        self.settle(now);
    }

    /// Give a registration up.
    pub fn unregister(&mut self, registration: RegistrationId, now: Now) {
        let Some(entry) = self.registrations.remove(registration) else {
            return;
        };
        let deletions = &mut self.deletions;
        self.unsafe_messages.retain(|(whose, _), id| {
            let keep = *whose != registration;
            if !keep {
                deletions.add(wire::message_path(id));
            }
            keep
        });
        if !entry.channel.is_empty() {
            self.deletions.add(registrations::app_path(&entry.channel));
        }
        self.settle(now.boot);
    }

    /// The message is safe: acknowledge it.
    pub fn safe(&mut self, registration: RegistrationId, id: &Arc<str>, now: Now) {
        if let Some(id) = self.unsafe_messages.remove(&(registration, Arc::clone(id))) {
            self.deletions.add(wire::message_path(&id));
            self.send_deletions(now.boot);
        }
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Session::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let link = match &self.link {
            Link::Down => self.backoff.retry_at().filter(|_| self.allowed),
            Link::Creating { asked, .. } | Link::Asking { asked, .. } => Some(*asked + CONNECT_TIMEOUT),
            Link::Stream(stream) if stream.started.is_none() => Some(stream.asked + CONNECT_TIMEOUT),
            Link::Stream(stream) => {
                earliest(earliest(Some(stream.silence_ends()), stream.proof_by), self.urgency_due())
            }
        };
        let requests = earliest(self.registrations.due(self.can_register()), self.deletions.due(self.allowed));
        earliest(link, requests)
    }

    /// What `status` shows.
    pub fn standing(&self) -> Standing {
        let heartbeat = match &self.link {
            Link::Stream(stream) if stream.started.is_some() => {
                Some(Heartbeat { interval: stream.keepalive, by_server: true })
            }
            Link::Down | Link::Creating { .. } | Link::Asking { .. } | Link::Stream(_) => None,
        };
        Standing {
            state: self.state,
            since: self.since,
            retry_at: self.backoff.retry_at().filter(|_| self.state == LinkState::Waiting),
            last_error: self.last_error.clone(),
            trouble: self.trouble.clone().or_else(|| self.link_trouble.clone()),
            registrations: self.registrations.len(),
            heartbeat,
        }
    }

    /// When the link is made anew to tell another urgency, if it is.
    fn urgency_due(&self) -> Option<Instant> {
        let Link::Stream(stream) = &self.link else { return None };
        let matters = self.urgency < stream.urgency || self.urgency > stream.urgency && self.has_ids;
        Some(stream.started? + URGENCY_SPACING).filter(|_| matters)
    }

    /// Whether registrations can be asked for.
    const fn can_register(&self) -> bool {
        self.allowed && self.device.is_some()
    }
}

#[cfg(test)]
mod tests;
