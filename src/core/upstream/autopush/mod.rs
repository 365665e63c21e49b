//! Mozilla autopush and `nightporter-relay` (push.md §3a).
//!
//! A message is acknowledged when the core calls it safe, never before. Acknowledgements of one turn go out in one
//! frame; those of a link that is gone are dropped, because the server sends its messages again and the core calls them
//! safe again. The same message may come twice over one link: it is handed on each time, acknowledged once.

mod link;
mod registrations;
mod wire;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand_chacha::{ChaCha12Rng, rand_core::SeedableRng};

use super::{
    CONNECT_TIMEOUT, Channel, Heartbeat, LinkIds, Output, REGISTER_TIMEOUT, Standing, backoff::Backoff, quiet::Quiet,
};
use crate::{
    event::{LinkEvent, LinkId},
    model::{FailureReason, RegistrationId},
    time::{Instant, Now, earliest},
    view::LinkState,
};

/// Register requests under way at a time.
const WINDOW: usize = 16;
/// How long the server may take to answer one.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Before an app's registration is tried again within its [`REGISTER_TIMEOUT`].
const FRESH_RETRY: Duration = Duration::from_secs(2);
/// The server pings each 300 s; without a frame for longer than this the link is dead.
const SILENCE: Duration = Duration::from_secs(310);
/// The same before the first ping of a link, whose moment the server chooses.
const FIRST_SILENCE: Duration = Duration::from_secs(330);
/// A link that lived this long has proved the server well.
const PROVEN: Duration = Duration::from_secs(30);
/// An attempt older than this may date from before the network came back.
const STALE_ATTEMPT: Duration = Duration::from_secs(2);
/// For so long a refusal of the credentials is the answer to every app; after it an app's registration may try again.
const TROUBLE_HOLDS: Duration = Duration::from_secs(30);
/// The server's own rhythm, until it has shown another.
const RHYTHM: Duration = Duration::from_secs(300);
/// What an app is told while there may be no link.
const NOT_ALLOWED: &str = "there is no connection while roaming (network.roaming = \"off\")";
/// Messages not yet safe; with more the link is given up and the server sends them again later.
const UNSAFE_LIMIT: usize = 4096;
/// Channels to unregister at the server; of more the oldest are forgotten, and found again when a message comes.
const DEAD_LIMIT: usize = 256;
/// Unregister requests in one turn.
const DEAD_AT_ONCE: usize = 16;
/// Acknowledgements in one frame: versions are some 250 bytes each, and the server bounds its frames.
const ACKS_PER_FRAME: usize = 32;
/// UnifiedPush D-Bus 0.3.0: what an app takes.
const ENDPOINT_LIMIT: usize = 1000;
/// Longer names than these are no channel and no version.
const NAME_LIMIT: usize = 2048;
/// Without a wish of the server's own (RFC 6585 §4).
const TOO_MANY_REQUESTS: Duration = Duration::from_secs(60);

/// Ahead of a remembered uaid: some channels are not known to the server under it yet, and which ones would be forgotten
/// in a crash. No server's uaid begins with it.
const REMAKING: &str = "?";

/// One autopush server's session.
#[derive(Debug)]
pub struct Session {
    rng: ChaCha12Rng,
    links: LinkIds,
    uaid: Option<Arc<str>>,
    /// The server has forgotten this device, and not every registration has been made anew yet.
    remaking: bool,
    channels: BTreeMap<RegistrationId, Entry>,
    names: HashMap<Arc<str>, RegistrationId>,
    /// Registrations not [`Step::Done`].
    open: usize,
    link: Link,
    /// When an attempt that was young when the network changed has had its chance.
    recheck_at: Option<Instant>,
    /// Made beside a link in doubt, to take its place.
    challenger: Option<Challenger>,
    /// Whether there may be one at all.
    allowed: bool,
    backoff: Backoff,
    acks: Vec<(Arc<str>, Arc<str>)>,
    unsafe_messages: HashSet<(RegistrationId, Arc<str>)>,
    dead: VecDeque<Arc<str>>,
    outputs: VecDeque<Output>,
    state: LinkState,
    since: Instant,
    last_error: Option<Arc<str>>,
    trouble: Option<Arc<str>>,
    quiet_frames: Quiet,
    quiet_unknown: Quiet,
}

#[derive(Debug)]
struct Entry {
    channel: Arc<str>,
    vapid: Option<Arc<str>>,
    /// By when the app must be told; `None` for a registration that exists.
    answer_by: Option<Instant>,
    /// The server's last answer that was no registration.
    refusal: Option<u16>,
    tries: u32,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Done,
    Queued { not_before: Instant },
    Sent { deadline: Instant },
}

#[derive(Debug)]
enum Link {
    Down,
    /// Up to the server's hello.
    Greeting {
        id: LinkId,
        asked: Instant,
    },
    Online(Online),
}

/// A link that says nothing before the one in doubt is given up: the server knows a device on one link only.
#[derive(Debug)]
struct Challenger {
    id: LinkId,
    asked: Instant,
}

#[derive(Debug)]
struct Online {
    id: LinkId,
    since: Instant,
    heard: Instant,
    /// When the server's latest ping came.
    pinged: Option<Instant>,
    /// Between two of them, as the server has shown.
    rhythm: Option<Duration>,
    proof_by: Option<Instant>,
    doubt_at: Option<Instant>,
}

impl Online {
    fn silence_ends(&self) -> Instant {
        self.heard + if self.pinged.is_some() { SILENCE } else { FIRST_SILENCE }
    }

    fn ping(&mut self, now: Instant) {
        self.rhythm = self.pinged.replace(now).map(|before| now.since(before)).or(self.rhythm);
    }
}

impl Session {
    /// A session that knows itself to the server by `uaid` and serves `channels`; connects when there are any.
    pub fn new(uaid: Option<Arc<str>>, channels: Vec<Channel>, seed: [u8; 32], links: LinkIds, now: Now) -> Self {
        let unfinished = uaid.as_deref().and_then(|uaid| uaid.strip_prefix(REMAKING)).map(Arc::from);
        let remaking = unfinished.is_some();
        let mut session = Self {
            rng: ChaCha12Rng::from_seed(seed),
            links,
            uaid: unfinished.or(uaid).filter(|uaid| !uaid.is_empty()),
            remaking,
            channels: BTreeMap::new(),
            names: HashMap::new(),
            open: 0,
            link: Link::Down,
            recheck_at: None,
            challenger: None,
            allowed: true,
            backoff: Backoff::default(),
            acks: Vec::new(),
            unsafe_messages: HashSet::new(),
            dead: VecDeque::new(),
            outputs: VecDeque::new(),
            state: LinkState::Idle,
            since: now.boot,
            last_error: None,
            trouble: None,
            quiet_frames: Quiet::default(),
            quiet_unknown: Quiet::default(),
        };
        for Channel { registration, channel, vapid, endpoint } in channels {
            let channel = if channel.is_empty() { session.new_name() } else { channel };
            let step = match endpoint.is_empty() || remaking {
                true => Step::Queued { not_before: now.boot },
                false => Step::Done,
            };
            session.insert(registration, Entry { channel, vapid, answer_by: None, refusal: None, tries: 0, step });
        }
        if !session.channels.is_empty() {
            session.backoff.at_once(now.boot);
            session.connect_if_due(now.boot);
        }
        session
    }

    /// An event on a link.
    pub fn handle_link(&mut self, link: LinkId, event: LinkEvent, now: Now) {
        if self.challenger.as_ref().is_some_and(|challenger| challenger.id == link) {
            self.handle_challenger(&event, now.boot);
            self.settle(now.boot);
            return;
        }
        let current = match &self.link {
            Link::Down => None,
            Link::Greeting { id, .. } => Some(*id),
            Link::Online(online) => Some(online.id),
        };
        if current != Some(link) {
            return;
        }
        let last = event.is_last();
        let doubted = last && matches!(&self.link, Link::Online(online) if online.proof_by.is_some());
        if let Link::Online(online) = &mut self.link
            && !last
        {
            online.heard = now.boot;
            (online.proof_by, online.doubt_at) = (None, None);
            if event == LinkEvent::Ping {
                online.ping(now.boot);
            }
            self.dismiss_challenger();
        }
        match event {
            LinkEvent::Open if matches!(self.link, Link::Online(_)) => {}
            LinkEvent::Open => self.greet(link),
            LinkEvent::Text(text) => self.frame(link, &text, now),
            LinkEvent::Bytes(_) => self.quiet_frames.warn("the server sent a binary frame; ignored", now.boot),
            LinkEvent::Ping | LinkEvent::Pong | LinkEvent::Login(_) => {}
            LinkEvent::Closed { code, reason } => self.closed(code, &reason, now.boot),
            LinkEvent::Failed(error) => self.failed(&error, now.boot),
        }
        if doubted {
            self.backoff.ended_in_doubt(!matches!(self.link, Link::Down), now.boot);
        }
        self.settle(now.boot);
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        let now = now.boot;
        match &self.link {
            Link::Greeting { id, .. } if self.recheck_at.is_some_and(|at| at <= now) => {
                let id = *id;
                self.drop_link(id, "tried again because the network changed", now);
                self.backoff.at_once(now);
            }
            Link::Greeting { id, asked } if *asked + CONNECT_TIMEOUT <= now => {
                let id = *id;
                self.drop_link(id, "the server did not answer in time", now);
                self.backoff.failed(None, now, &mut self.rng);
            }
            Link::Online(online) if online.proof_by.is_some_and(|by| by <= now) => {
                let id = online.id;
                self.drop_link(id, "the link was dead: the server did not answer", now);
                self.backoff.at_once(now);
            }
            Link::Online(online) if online.doubt_at.is_some_and(|at| at <= now) => self.doubt(now),
            Link::Online(online) if online.silence_ends() <= now => {
                let id = online.id;
                self.drop_link(id, "the server fell silent", now);
                self.backoff.failed(None, now, &mut self.rng);
            }
            Link::Down | Link::Greeting { .. } | Link::Online(_) => {}
        }
        self.settle(now);
    }

    /// The network came back or changed, or the machine woke up.
    pub fn handle_network(&mut self, now: Now) {
        let now = now.boot;
        match &self.link {
            Link::Online(_) => self.prove(now),
            Link::Greeting { id, asked } if now.since(*asked) >= STALE_ATTEMPT => {
                let id = *id;
                self.drop_link(id, "tried again because the network changed", now);
                self.backoff.at_once(now);
            }
            Link::Greeting { asked, .. } => {
                self.recheck_at = Some(*asked + STALE_ATTEMPT);
                self.backoff.own_event();
            }
            Link::Down if self.channels.is_empty() || !self.allowed => {}
            Link::Down => self.backoff.at_once(now),
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
        } else if !self.channels.is_empty() {
            self.backoff.at_once(now.boot);
        }
        self.settle(now.boot);
    }

    /// Messages were turned away that the server still has: it sends them again on a new link.
    pub fn restart(&mut self, now: Now) {
        let id = match &self.link {
            Link::Down => None,
            Link::Greeting { id, .. } => Some(*id),
            Link::Online(online) => Some(online.id),
        };
        if let Some(id) = id {
            self.drop_link(id, "connected anew to get messages again that could not be stored", now.boot);
            self.backoff.at_once(now.boot);
        }
        self.settle(now.boot);
    }

    /// Make a registration.
    pub fn register(&mut self, registration: RegistrationId, vapid: Option<Arc<str>>, now: Now) {
        if self.channels.contains_key(&registration) {
            log::error!("registration {} is asked for twice; the second is ignored", registration.0);
            return;
        }
        let now = now.boot;
        if !self.allowed {
            let (reason, text) = (FailureReason::Network, NOT_ALLOWED.to_owned());
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
            return;
        }
        if let Some(text) = self.trouble.as_deref().filter(|_| now.since(self.since) < TROUBLE_HOLDS) {
            let (reason, text) = (FailureReason::ActionRequired, text.to_owned());
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
            return;
        }
        let first = self.channels.is_empty();
        let entry = Entry {
            channel: self.new_name(),
            vapid,
            answer_by: Some(now + REGISTER_TIMEOUT),
            refusal: None,
            tries: 0,
            step: Step::Queued { not_before: now },
        };
        self.insert(registration, entry);
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
        let Some(entry) = self.forget(registration) else {
            return;
        };
        let acks = &mut self.acks;
        self.unsafe_messages.retain(|(whose, version)| {
            let keep = *whose != registration;
            if !keep {
                acks.push((entry.channel.clone(), version.clone()));
            }
            keep
        });
        if entry.step == Step::Done || entry.tries > 0 {
            self.bury(entry.channel);
        }
        self.settle(now.boot);
    }

    /// The message is safe: acknowledge it.
    pub fn safe(&mut self, registration: RegistrationId, id: &Arc<str>, _now: Now) {
        if self.unsafe_messages.remove(&(registration, id.clone()))
            && let Some(entry) = self.channels.get(&registration)
        {
            self.acks.push((entry.channel.clone(), id.clone()));
        }
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        if self.outputs.is_empty() {
            self.flush_acks();
        }
        self.outputs.pop_front()
    }

    /// When [`Session::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let link = match &self.link {
            Link::Down => self.backoff.retry_at(),
            Link::Greeting { asked, .. } => earliest(Some(*asked + CONNECT_TIMEOUT), self.recheck_at),
            Link::Online(online) => earliest(Some(online.silence_ends()), earliest(online.proof_by, online.doubt_at)),
        };
        if self.open == 0 {
            return link;
        }
        let online = matches!(self.link, Link::Online(_));
        let room = online && self.in_flight() < WINDOW;
        self.channels.values().filter(|entry| entry.step != Step::Done).fold(link, |at, entry| {
            let step = match entry.step {
                Step::Sent { deadline } => Some(deadline),
                Step::Queued { not_before } if room => Some(not_before),
                Step::Queued { .. } | Step::Done => None,
            };
            earliest(earliest(at, entry.answer_by), step)
        })
    }

    /// What `status` shows.
    pub fn standing(&self) -> Standing {
        Standing {
            state: self.state,
            since: self.since,
            retry_at: self.backoff.retry_at().filter(|_| self.state == LinkState::Waiting),
            last_error: self.last_error.clone(),
            trouble: self.trouble.clone(),
            registrations: self.channels.len(),
            heartbeat: match &self.link {
                Link::Online(online) => Some(Heartbeat { interval: online.rhythm.unwrap_or(RHYTHM), by_server: true }),
                Link::Down | Link::Greeting { .. } => None,
            },
        }
    }
}

#[cfg(test)]
mod tests;
