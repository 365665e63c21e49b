//! ntfy over its WebSocket stream (push.md §3b).
//!
//! One link carries all topics. When the list grows a second link is made with the new list, and the first is closed
//! only when the second is subscribed and the first has brought what was on its way to it. A link that takes no other's
//! place may lack a message that was about to be stored: a few seconds later it is replaced once by another. ntfy has no acknowledgement: the `since` cursor takes its place, see `cursor.rs`.
//! A message that comes again is handed on again while it is not safe, and left out once it is.
//!
//! A server of version 2.11 refuses a WebSocket, whatever the reason, with an empty `200` (measured: bad credentials,
//! no permission, 429, too many subscriptions, a topic it does not like). The reason is to be had only by asking
//! without WebSocket; so one such refusal is taken for the passing kind and a second in a row for the lasting one.

mod cursor;
mod link;
mod registrations;
mod wire;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand_chacha::{ChaCha12Rng, rand_core::SeedableRng};

use self::cursor::{Tracker, Watermark};
use super::{
    CONNECT_TIMEOUT, Channel, DOUBT, Heartbeat, LinkIds, Output, PROOF_TIMEOUT, REGISTER_TIMEOUT, Standing,
    backoff::Backoff, quiet::Quiet,
};
use crate::{
    event::{LinkEvent, LinkId},
    model::{FailureReason, RegistrationId},
    time::{Instant, Now, earliest},
    view::LinkState,
};

/// Topics on one link: 35 kB of URL and of `open` event. ntfy 2.11 takes 5000, proxies in front of it may not.
const TOPIC_LIMIT: usize = 1000;
/// Random bytes of a topic: 32 characters, 192 bits. UnifiedPush advises 160 (KDE's distributor has 32).
const TOPIC_BYTES: usize = 24;
/// Random bytes of a topic in ntfy's own form, `up` and 12 characters, 72 bits. Where `visitor-subscriber-rate-limiting`
/// is on no other form works at all: every message to a longer topic is answered 507 (tried with 2.11).
const SHORT_TOPIC_BYTES: usize = 9;
/// Servers known to have that option on. A server of one's own needs it off, which is the default.
const SHORT_TOPIC_SERVERS: [&str; 1] = ["https://ntfy.sh/"];
/// Registrations that come close together share a link.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// The longest the first of them waits for the last.
const DEBOUNCE_LIMIT: Duration = Duration::from_millis(500);
/// Topics given up stay subscribed this long, unless a new link is made anyway: each takes one of 60 requests.
const SURPLUS_KEPT: Duration = Duration::from_secs(600);
/// The server pings each 45 s: two of them and some.
const SILENCE: Duration = Duration::from_secs(100);
/// A link that lived this long has proved the server well.
const PROVEN: Duration = Duration::from_secs(30);
/// A link that has been replaced is read on for so long: what the server was sending then is on its way by then.
const OVERLAP: Duration = Duration::from_secs(2);
/// An attempt older than this may date from before the network came back.
const STALE_ATTEMPT: Duration = Duration::from_secs(2);
/// For so long a refusal is the answer to every app; after it an app's registration may try again.
const TROUBLE_HOLDS: Duration = Duration::from_secs(30);
/// The server's own rhythm, until it has shown another.
const RHYTHM: Duration = Duration::from_secs(45);
/// What an app is told while there may be no link.
const NOT_ALLOWED: &str = "there is no connection while roaming (network.roaming = \"off\")";
/// Messages not yet safe; with more the link is given up and the server sends them again later.
const UNSAFE_LIMIT: usize = 4096;
/// After 429 without a wish of the server's own: 12 requests' worth at its default of one per 5 s.
const TOO_MANY_REQUESTS: Duration = Duration::from_secs(60);
/// After a first refusal without a word: one request's worth, and well within an app's [`REGISTER_TIMEOUT`].
const WORDLESS_REFUSAL: Duration = Duration::from_secs(5);

/// One ntfy server's session.
#[derive(Debug)]
pub struct Session {
    base: String,
    short_topics: bool,
    rng: ChaCha12Rng,
    links: LinkIds,
    tracker: Tracker,
    topics: BTreeMap<RegistrationId, Entry>,
    names: HashMap<Arc<str>, RegistrationId>,
    /// Registrations that wait for a link with their topic.
    pending: usize,
    /// Subscribed.
    main: Option<Box<Stream>>,
    /// On the way, to take the place of `main`.
    next: Option<Box<Stream>>,
    /// Replaced by `main`, to be closed when what was on its way has come.
    old: Option<Box<Stream>>,
    /// Whether there may be a link at all.
    allowed: bool,
    backoff: Backoff,
    /// First and latest of the registrations that wait for company.
    debounce: Option<(Instant, Instant)>,
    surplus_since: Option<Instant>,
    refusals: u32,
    outputs: VecDeque<Output>,
    state: LinkState,
    since: Instant,
    last_error: Option<Arc<str>>,
    trouble: Option<Arc<str>>,
    quiet_frames: Quiet,
}

#[derive(Debug)]
struct Entry {
    topic: Arc<str>,
    /// Whether the app knows the endpoint.
    told: bool,
    /// By when the app must be told; `None` for a registration that exists.
    answer_by: Option<Instant>,
}

#[derive(Debug)]
struct Stream {
    id: LinkId,
    topics: HashSet<Arc<str>>,
    asked: Instant,
    since: Instant,
    heard: Instant,
    /// When the server's latest ping came.
    pinged: Option<Instant>,
    /// Between two of them, as the server has shown.
    rhythm: Option<Duration>,
    proof_by: Option<Instant>,
    /// While it is to be proved: when another is begun beside it. Of an attempt that was young when the network changed:
    /// when it has had its chance.
    doubt_at: Option<Instant>,
    /// Begun beside one in doubt.
    challenges: bool,
    /// Pings not answered yet.
    pings: u32,
    watermark: Watermark,
}

impl Session {
    /// A session on the server at `http_url` that goes on after `cursor` and serves `channels`; connects when there
    /// are any.
    pub fn new(
        http_url: String,
        short_topics: bool,
        cursor: Option<Arc<str>>,
        channels: Vec<Channel>,
        seed: [u8; 32],
        links: LinkIds,
        now: Now,
    ) -> Self {
        let mut session = Self {
            short_topics: short_topics || SHORT_TOPIC_SERVERS.contains(&http_url.as_str()),
            base: http_url,
            rng: ChaCha12Rng::from_seed(seed),
            links,
            tracker: Tracker::new(cursor.filter(|id| wire::is_id(id))),
            topics: BTreeMap::new(),
            names: HashMap::new(),
            pending: 0,
            main: None,
            next: None,
            old: None,
            allowed: true,
            backoff: Backoff::default(),
            debounce: None,
            surplus_since: None,
            refusals: 0,
            outputs: VecDeque::new(),
            state: LinkState::Idle,
            since: now.boot,
            last_error: None,
            trouble: None,
            quiet_frames: Quiet::default(),
        };
        for Channel { registration, channel, endpoint, .. } in channels {
            let lost = if session.topics.len() >= TOPIC_LIMIT {
                Some(format!("one upstream serves at most {TOPIC_LIMIT} registrations"))
            } else if !channel.is_empty() && !wire::is_topic(&channel) {
                Some("its stored topic is none".to_owned())
            } else {
                None
            };
            if let Some(text) = lost {
                session.outputs.push_back(Output::Lost { registration, text });
                continue;
            }
            let topic = if channel.is_empty() { session.new_topic() } else { channel };
            let told = *endpoint == *session.endpoint(&topic);
            session.insert(registration, Entry { topic, told, answer_by: None });
        }
        if !session.topics.is_empty() {
            session.backoff.at_once(now.boot);
        }
        session.settle(now.boot);
        session
    }

    /// An event on a link.
    pub fn handle_link(&mut self, link: LinkId, event: LinkEvent, now: Now) {
        if self.old.as_ref().is_some_and(|old| old.id == link) {
            self.handle_old(link, event, now);
            self.settle(now.boot);
            return;
        }
        let Some(stream) = [&mut self.main, &mut self.next].into_iter().flatten().find(|stream| stream.id == link)
        else {
            return;
        };
        let doubted = event.is_last() && stream.proof_by.is_some();
        stream.heard = now.boot;
        (stream.proof_by, stream.doubt_at) = (None, None);
        if self.main.as_ref().is_some_and(|main| main.id == link)
            && !event.is_last()
            && let Some(next) = self.next.take_if(|next| next.challenges)
        {
            self.outputs.push_back(Output::Close(next.id));
        }
        let Some(stream) = [&mut self.main, &mut self.next].into_iter().flatten().find(|stream| stream.id == link)
        else {
            return;
        };
        match event {
            LinkEvent::Text(text) => self.frame(link, &text, now),
            LinkEvent::Ping => {
                stream.rhythm = stream.pinged.replace(now.boot).map(|at| now.boot.since(at)).or(stream.rhythm);
                if let Some(id) = stream.watermark.ping(now.boot) {
                    self.tracker.checkpoint(id);
                }
                self.drop_surplus(link, now.boot);
            }
            LinkEvent::Pong => stream.pings = stream.pings.saturating_sub(1),
            LinkEvent::Open | LinkEvent::Login(_) => {}
            LinkEvent::Bytes(_) => self.quiet_frames.warn("the server sent a binary frame; ignored", now.boot),
            LinkEvent::Closed { code, reason } => {
                let reason: String = reason.chars().filter(|c| !c.is_control()).take(80).collect();
                let text = match code {
                    Some(code) => format!("the server closed the connection ({code} {reason})"),
                    None => "the connection ended".to_owned(),
                };
                self.ended(link, &text, now.boot);
                self.backoff.failed(None, now.boot, &mut self.rng);
            }
            LinkEvent::Failed(error) => self.failed(link, &error, now.boot),
        }
        if doubted {
            self.backoff.ended_in_doubt(self.next.is_some(), now.boot);
        }
        self.settle(now.boot);
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        let now = now.boot;
        if let Some(next) = self.next.as_ref().filter(|next| next.asked + CONNECT_TIMEOUT <= now) {
            self.drop_link(next.id, "the server did not answer in time", now);
            self.backoff.failed(None, now, &mut self.rng);
        }
        if let Some(next) = self.next.as_ref().filter(|next| next.doubt_at.is_some_and(|at| at <= now)) {
            self.drop_link(next.id, "tried again because the network changed", now);
            if self.wants_link(now) {
                self.backoff.at_once(now);
            }
        }
        if let Some(main) = &self.main {
            let id = main.id;
            if main.proof_by.is_some_and(|by| by <= now) {
                self.drop_link(id, "the link was dead after the network changed", now);
                self.backoff.at_once(now);
            } else if main.doubt_at.is_some_and(|at| at <= now) {
                self.doubt(now);
            } else if main.heard + SILENCE <= now {
                self.drop_link(id, "the server fell silent", now);
                self.backoff.failed(None, now, &mut self.rng);
            }
        }
        self.end_overlap(now);
        self.settle(now);
    }

    /// The network came back or changed, or the machine woke up.
    pub fn handle_network(&mut self, now: Now) {
        let now = now.boot;
        if let Some(next) = self.next.as_ref().filter(|next| now.since(next.asked) >= STALE_ATTEMPT) {
            self.drop_link(next.id, "tried again because the network changed", now);
        }
        if let Some(main) = self.main.as_mut().filter(|main| main.proof_by.is_none()) {
            (main.proof_by, main.doubt_at) = (Some(now + PROOF_TIMEOUT), Some(now + DOUBT));
            main.pings += 1;
            self.outputs.push_back(Output::Ping(main.id));
        }
        if let Some(next) = &mut self.next {
            next.doubt_at = Some(next.asked + STALE_ATTEMPT);
            self.backoff.own_event();
        } else if self.wants_link(now) {
            self.backoff.at_once(now);
        }
        self.settle(now);
    }

    /// Whether there may be a link at all.
    pub fn set_allowed(&mut self, allowed: bool, now: Now) {
        if std::mem::replace(&mut self.allowed, allowed) == allowed {
            return;
        }
        if !allowed {
            self.fail_waiting(FailureReason::Network, NOT_ALLOWED);
        } else if !self.topics.is_empty() {
            self.backoff.at_once(now.boot);
        }
        self.settle(now.boot);
    }

    /// Messages were turned away that the server still has: it sends them again on a new link, from the cursor on.
    pub fn restart(&mut self, now: Now) {
        let ids: Vec<LinkId> = [&self.main, &self.next].into_iter().flatten().map(|stream| stream.id).collect();
        for id in ids {
            self.drop_link(id, "connected anew to get messages again that could not be stored", now.boot);
        }
        if self.wants_link(now.boot) {
            self.backoff.at_once(now.boot);
        }
        self.settle(now.boot);
    }

    /// Make a registration.
    pub fn register(&mut self, registration: RegistrationId, now: Now) {
        if self.topics.contains_key(&registration) {
            log::error!("registration {} is asked for twice; the second is ignored", registration.0);
            return;
        }
        let now = now.boot;
        if !self.allowed {
            let (reason, text) = (FailureReason::Network, NOT_ALLOWED.to_owned());
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
            return;
        }
        let refusal = if self.topics.len() >= TOPIC_LIMIT {
            Some(format!("one upstream serves at most {TOPIC_LIMIT} registrations"))
        } else {
            self.trouble.as_deref().filter(|_| now.since(self.since) < TROUBLE_HOLDS).map(str::to_owned)
        };
        if let Some(text) = refusal {
            let reason = FailureReason::ActionRequired;
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
            return;
        }
        if self.topics.is_empty() {
            // Whatever was due was for registrations that are gone.
            self.backoff.clear();
        }
        let topic = self.new_topic();
        self.insert(registration, Entry { topic, told: false, answer_by: Some(now + REGISTER_TIMEOUT) });
        let first = self.debounce.map_or(now, |(first, _)| first);
        self.debounce = Some((first, now));
        if self.next.is_none() {
            self.backoff.hurry(now);
        }
        self.settle(now);
    }

    /// Give a registration up.
    pub fn unregister(&mut self, registration: RegistrationId, now: Now) {
        if self.forget(registration).is_some() {
            self.tracker.abandon(registration);
            // Its messages go on to come and are called safe here, so the topic can wait for the next link.
            self.surplus_since.get_or_insert(now.boot);
            self.settle(now.boot);
        }
    }

    /// The message is safe: the cursor may pass it.
    pub fn safe(&mut self, _registration: RegistrationId, id: &Arc<str>, _now: Now) {
        self.tracker.safe(id);
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front().or_else(|| {
            let cursor = self.tracker.take_moved()?;
            Some(Output::Remember { key: "cursor", value: cursor.to_string() })
        })
    }

    /// When [`Session::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let main = self
            .main
            .as_ref()
            .and_then(|main| earliest(Some(main.heard + SILENCE), earliest(main.proof_by, main.doubt_at)));
        let next = match &self.next {
            Some(next) => earliest(Some(next.asked + CONNECT_TIMEOUT), next.doubt_at),
            None => self.attempt_at().or_else(|| self.look_at()),
        };
        let answer = match self.pending {
            0 => None,
            _ => self.topics.values().filter_map(|entry| entry.answer_by).min(),
        };
        earliest(earliest(answer, self.overlap_ends()), earliest(main, next))
    }

    /// What `status` shows.
    pub fn standing(&self) -> Standing {
        Standing {
            state: self.state,
            since: self.since,
            retry_at: self.attempt_at().filter(|_| self.state == LinkState::Waiting),
            last_error: self.last_error.clone(),
            trouble: self.trouble.clone(),
            registrations: self.topics.len(),
            heartbeat: self
                .main
                .as_ref()
                .map(|main| Heartbeat { interval: main.rhythm.unwrap_or(RHYTHM), by_server: true }),
        }
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
