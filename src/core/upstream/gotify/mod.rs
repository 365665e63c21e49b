//! Gotify (push.md §3d).
//!
//! Each registration is an application of the user's; its channel is `<id>:<token>`. Messages come as text frames over
//! the WebSocket `stream`, of all the user's applications; those of others are left alone.
//!
//! **Acknowledgement.** `DELETE message/<id>` when the core calls a message safe, never before. A deletion that fails
//! does no harm: the message comes again after the next connect and is known by its id.
//!
//! **What was missed** is fetched page by page after each connect, see `catch_up.rs`. How far back is remembered as
//! `last`: an id up to which nothing of ours is unsafe. It only spares work, because what is safe has been deleted; it may
//! lag, and lags on purpose, so that other applications' messages do not write to flash. The first page is asked for
//! `SUBSCRIBED` after the handshake: Gotify answers that *before* it subscribes the stream.
//!
//! Registrations are made over a link that has caught up, so that there is an id before the first endpoint is told. An
//! application that the user has deleted at the server is noticed there, once in a while, and made anew.
//!
//! Message ids are small numbers. A fingerprint of the channel is added, because a registration may move between servers,
//! and a server be set up anew, without the app getting an id twice. (The date would not do: a stored message has it in
//! other words than the same message live.)

mod catch_up;
mod link;
mod registrations;
mod wire;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand_chacha::{ChaCha12Rng, rand_core::SeedableRng};

use self::catch_up::CatchUp;
use super::{
    Beginning, CONNECT_TIMEOUT, Heartbeat, LinkIds, Output, PROOF_TIMEOUT, Standing,
    backoff::Backoff,
    quiet::Quiet,
    rest::{deletions::Deletions, registrations::Registrations},
};
use crate::{
    event::{HttpError, HttpResponse, HttpTicket, LinkEvent, LinkId},
    model::{FailureReason, RegistrationId},
    time::{Instant, Now, earliest},
    view::LinkState,
};

/// Bytes taken of a page of messages.
const PAGE_LIMIT: u32 = 2 * 1024 * 1024;
/// Bytes taken of the list of applications: some 300 for each.
const LIST_LIMIT: u32 = 1024 * 1024;
/// Bytes taken of any other answer.
const ANSWER_LIMIT: u32 = 16 * 1024;
/// The server pings each 45 s.
const PING: Duration = Duration::from_secs(45);
/// Two pings and some.
const SILENCE: Duration = Duration::from_secs(100);
/// From the handshake's answer to when the server has surely subscribed the stream.
const SUBSCRIBED: Duration = Duration::from_millis(250);
/// How long the server may take for a page.
const PAGE_TIMEOUT: Duration = Duration::from_secs(35);
/// A link that lived this long has proved the server well.
const PROVEN: Duration = Duration::from_secs(30);
/// An attempt older than this may date from before the network came back.
const STALE_ATTEMPT: Duration = Duration::from_secs(2);
/// For so long a refusal of the credentials is the answer to every app; after it an app's registration may try again.
const TROUBLE_HOLDS: Duration = Duration::from_secs(30);
/// Between two looks at whether the applications are still there.
const LOOK_AGAIN: Duration = Duration::from_secs(12 * 3600);
/// Messages not yet safe; with more the link is given up and the server's store keeps them.
const UNSAFE_LIMIT: usize = 4096;
/// Other applications' messages that `last` may lag behind.
const LAG: u64 = 50;

/// One server's session.
#[derive(Debug)]
pub struct Session {
    /// The endpoints' form.
    template: String,
    rng: ChaCha12Rng,
    links: LinkIds,
    registrations: Registrations,
    /// Whose messages an application's are.
    applications: HashMap<u64, RegistrationId>,
    deletions: Deletions,
    link: Link,
    backoff: Backoff,
    /// For pages.
    page_backoff: Backoff,
    allowed: bool,
    /// Everything up to this id has come; `None` until the server was asked.
    known: Option<u64>,
    /// By server id: what is not safe yet.
    unsafe_messages: BTreeMap<u64, (RegistrationId, Arc<str>)>,
    remembered: Option<u64>,
    /// One of ours became safe.
    moved: bool,
    looked_at: Option<Instant>,
    outputs: VecDeque<Output>,
    state: LinkState,
    since: Instant,
    last_error: Option<Arc<str>>,
    trouble: Option<Arc<str>>,
    trouble_since: Instant,
    quiet_frames: Quiet,
}

#[derive(Debug)]
enum Link {
    Down,
    Connecting { id: LinkId, asked: Instant },
    Online(Box<Online>),
}

#[derive(Debug)]
struct Online {
    id: LinkId,
    since: Instant,
    heard: Instant,
    proof_by: Option<Instant>,
    phase: Phase,
    walk: CatchUp,
}

/// What is done over a new link, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Until the next page may be asked for.
    Pause { until: Instant },
    /// A page has been asked for.
    Page { ticket: HttpTicket, by: Instant },
    /// Caught up: the list of applications has been asked for.
    List { ticket: HttpTicket, by: Instant },
    /// Messages are handed on as they come.
    Live,
}

impl Session {
    /// A session that goes on where an earlier life ended; connects when there are registrations.
    pub fn new(beginning: Beginning<'_>, now: Now) -> Self {
        let last = beginning.remembered("last").and_then(|last| last.parse().ok());
        let base = beginning.settings.http_url();
        let template = match &beginning.settings.endpoint {
            Some(template) => template.to_string(),
            None => format!("{base}UP?token={{channel}}"),
        };
        let mut session = Self {
            template,
            rng: ChaCha12Rng::from_seed(beginning.seed),
            links: beginning.links,
            registrations: Registrations::default(),
            applications: HashMap::new(),
            deletions: Deletions::default(),
            link: Link::Down,
            backoff: Backoff::default(),
            page_backoff: Backoff::default(),
            allowed: true,
            known: None,
            unsafe_messages: BTreeMap::new(),
            remembered: last,
            moved: false,
            looked_at: None,
            outputs: VecDeque::new(),
            state: LinkState::Idle,
            since: now.boot,
            last_error: None,
            trouble: None,
            trouble_since: now.boot,
            quiet_frames: Quiet::default(),
        };
        for channel in beginning.channels {
            let application = wire::split(&channel.channel).map(|(application, _)| application);
            if let Some(application) = application {
                session.applications.insert(application, channel.registration);
                // Without a remembered id all that is stored is looked at: what was safe is not there any more.
                session.known = Some(last.unwrap_or(0));
            }
            session.registrations.restore(channel, application.is_none(), now.boot);
        }
        if !session.registrations.is_empty() {
            session.backoff.at_once(now.boot);
        }
        session.settle(now.boot);
        session
    }

    /// An event on a link.
    pub fn handle_link(&mut self, link: LinkId, event: LinkEvent, now: Now) {
        let now = now.boot;
        let mut doubted = false;
        let current = match &mut self.link {
            Link::Down => return,
            Link::Connecting { id, .. } => *id,
            Link::Online(online) => {
                if online.id == link {
                    doubted = event.is_last() && online.proof_by.is_some();
                    (online.heard, online.proof_by) = (now, None);
                }
                online.id
            }
        };
        if current != link {
            return;
        }
        match event {
            LinkEvent::Open => self.open(link, now),
            LinkEvent::Text(text) => self.frame(&text, now),
            LinkEvent::Bytes(_) => self.quiet_frames.warn("the server sent a binary frame; ignored", now),
            LinkEvent::Ping | LinkEvent::Pong | LinkEvent::Login(_) => {}
            LinkEvent::Closed { code, reason } => self.closed(code, &reason, now),
            LinkEvent::Failed(error) => self.failed(&error, now),
        }
        if doubted {
            self.backoff.ended_in_doubt(!matches!(self.link, Link::Down), now);
        }
        self.settle(now);
    }

    /// A request ended.
    pub fn handle_http(&mut self, ticket: HttpTicket, result: Result<HttpResponse, HttpError>, now: Now) {
        let now = now.boot;
        let phase = match &self.link {
            Link::Online(online) => online.phase,
            Link::Down | Link::Connecting { .. } => Phase::Live,
        };
        match phase {
            Phase::Page { ticket: own, .. } if own == ticket => self.page(result, now),
            Phase::List { ticket: own, .. } if own == ticket => self.list(result, now),
            _ if self.deletions.owns(ticket) => {
                self.deletions.answered(ticket, result, false, now, &mut self.rng);
            }
            Phase::Pause { .. } | Phase::Page { .. } | Phase::List { .. } | Phase::Live => {
                self.application_answer(ticket, result, now);
            }
        }
        self.settle(now);
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        let now = now.boot;
        let end = match &self.link {
            Link::Connecting { id, asked } if *asked + CONNECT_TIMEOUT <= now => {
                Some((*id, "the server did not answer in time", false))
            }
            Link::Online(online) if online.proof_by.is_some_and(|by| by <= now) => {
                Some((online.id, "the link was dead: the server did not answer", true))
            }
            Link::Online(online) if online.heard + SILENCE <= now => Some((online.id, "the server fell silent", false)),
            Link::Down | Link::Connecting { .. } | Link::Online(_) => None,
        };
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
        match &mut self.link {
            Link::Online(online) => {
                if online.proof_by.is_none() {
                    online.proof_by = Some(now + PROOF_TIMEOUT);
                    self.outputs.push_back(Output::Ping(online.id));
                }
                if matches!(online.phase, Phase::Pause { .. }) && self.page_backoff.retry_at().is_some() {
                    self.page_backoff.at_once(now);
                }
            }
            Link::Connecting { id, asked } if now.since(*asked) >= STALE_ATTEMPT => {
                let id = *id;
                self.drop_link(id, "tried again because the network changed", now);
                self.backoff.at_once(now);
            }
            Link::Connecting { .. } => {}
            Link::Down if self.registrations.is_empty() => {}
            Link::Down => self.backoff.at_once(now),
        }
        self.registrations.hurry(now);
        self.deletions.at_once(now);
        self.settle(now);
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

    /// Messages were turned away that the server still has: they are fetched again over a new link.
    pub fn restart(&mut self, now: Now) {
        // From before the first of them.
        self.known = self.last();
        self.unsafe_messages.clear();
        if !matches!(self.link, Link::Down) {
            self.close("connected anew to get messages again that could not be stored", now.boot);
            self.backoff.at_once(now.boot);
        }
        self.settle(now.boot);
    }

    /// Make a registration.
    pub fn register(&mut self, registration: RegistrationId, now: Now) {
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
        if !self.registrations.add(registration, None, now) {
            return;
        }
        if matches!(self.link, Link::Down) {
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
        self.unsafe_messages.retain(|_, (whose, _)| *whose != registration);
        self.moved = true;
        if let Some((application, _)) = wire::split(&entry.channel) {
            self.applications.remove(&application);
            // With it go its messages.
            self.deletions.add(registrations::application_path(application));
        }
        self.settle(now.boot);
    }

    /// The message is safe: acknowledge it.
    pub fn safe(&mut self, registration: RegistrationId, id: &Arc<str>, now: Now) {
        let Some(server_id) = id.split('-').nth(1).and_then(|id| id.parse().ok()) else { return };
        if self.unsafe_messages.get(&server_id).is_some_and(|(whose, own)| *whose == registration && own == id) {
            self.unsafe_messages.remove(&server_id);
            self.moved = true;
            self.deletions.add(link::message_path(server_id));
            self.send_deletions(now.boot);
        }
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front().or_else(|| {
            let last = self.last()?;
            let far = self.remembered.is_none_or(|remembered| last.abs_diff(remembered) >= LAG);
            let own = std::mem::take(&mut self.moved) && self.remembered != Some(last);
            if !far && !own {
                return None;
            }
            self.remembered = Some(last);
            Some(Output::Remember { key: "last", value: last.to_string() })
        })
    }

    /// When [`Session::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let link = match &self.link {
            Link::Down => self.backoff.retry_at().filter(|_| self.allowed),
            Link::Connecting { asked, .. } => Some(*asked + CONNECT_TIMEOUT),
            Link::Online(online) => {
                let phase = match online.phase {
                    Phase::Pause { until } => Some(self.page_backoff.retry_at().unwrap_or(until)),
                    Phase::Page { by, .. } | Phase::List { by, .. } => Some(by),
                    Phase::Live => None,
                };
                earliest(earliest(Some(online.heard + SILENCE), online.proof_by), phase)
            }
        };
        let requests = earliest(self.registrations.due(self.can_register()), self.deletions.due(self.allowed));
        earliest(link, requests)
    }

    /// What `status` shows.
    pub fn standing(&self) -> Standing {
        let online = matches!(self.link, Link::Online(_));
        Standing {
            state: self.state,
            since: self.since,
            retry_at: self.backoff.retry_at().filter(|_| self.state == LinkState::Waiting),
            last_error: self.last_error.clone(),
            trouble: self.trouble.clone(),
            registrations: self.registrations.len(),
            heartbeat: online.then_some(Heartbeat { interval: PING, by_server: true }),
        }
    }

    /// The id up to which nothing of ours is unsafe.
    fn last(&self) -> Option<u64> {
        let known = self.known?;
        Some(self.unsafe_messages.keys().next().map_or(known, |first| known.min(first.saturating_sub(1))))
    }

    /// Whether registrations can be asked for.
    fn can_register(&self) -> bool {
        self.allowed && matches!(&self.link, Link::Online(online) if online.phase == Phase::Live)
    }
}

#[cfg(test)]
mod tests;
