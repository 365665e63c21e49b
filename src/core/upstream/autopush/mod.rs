//! Mozilla autopush and `nightporter-relay` (push.md §3a).
//!
//! A message is acknowledged when the core calls it safe, never before. Acknowledgements of one turn go out in one
//! frame; those of a link that is gone are dropped, because the server sends its messages again and the core calls them
//! safe again. The same message may come twice over one link: it is handed on each time, acknowledged once.

mod wire;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand_chacha::{
    ChaCha12Rng,
    rand_core::{Rng, SeedableRng},
};

use self::wire::{Ack, Incoming, Notification, Outgoing};
use super::{
    CONNECT_TIMEOUT, Channel, IncomingBody, IncomingMessage, LinkIds, Output, PROOF_TIMEOUT, REGISTER_TIMEOUT,
    Standing,
    backoff::{Backoff, between},
    quiet::{Quiet, hint},
};
use crate::{
    event::{LinkError, LinkEvent, LinkId},
    model::{FailureReason, RegistrationId, Urgency},
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

#[derive(Debug)]
struct Online {
    id: LinkId,
    since: Instant,
    heard: Instant,
    pinged: bool,
    proof_by: Option<Instant>,
}

impl Online {
    fn silence_ends(&self) -> Instant {
        self.heard + if self.pinged { SILENCE } else { FIRST_SILENCE }
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
        let current = match &self.link {
            Link::Down => None,
            Link::Greeting { id, .. } => Some(*id),
            Link::Online(online) => Some(online.id),
        };
        if current != Some(link) {
            return;
        }
        if let Link::Online(online) = &mut self.link {
            online.heard = now.boot;
            online.proof_by = None;
            online.pinged |= event == LinkEvent::Ping;
        }
        match event {
            LinkEvent::Open if matches!(self.link, Link::Online(_)) => {}
            LinkEvent::Open => {
                let hello = Outgoing::Hello { uaid: self.uaid.as_deref(), use_webpush: true };
                self.outputs.push_back(Output::Send(link, hello.to_text()));
            }
            LinkEvent::Text(text) => self.frame(link, &text, now),
            LinkEvent::Binary => self.quiet_frames.warn("the server sent a binary frame; ignored", now.boot),
            LinkEvent::Ping | LinkEvent::Pong => {}
            LinkEvent::Closed { code, reason } => self.closed(code, &reason, now.boot),
            LinkEvent::Failed(error) => self.failed(&error, now.boot),
        }
        self.settle(now.boot);
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        let now = now.boot;
        match &self.link {
            Link::Greeting { id, asked } if *asked + CONNECT_TIMEOUT <= now => {
                let id = *id;
                self.drop_link(id, "the server did not answer in time", now);
                self.backoff.failed(None, now, &mut self.rng);
            }
            Link::Online(online) if online.proof_by.is_some_and(|by| by <= now) => {
                let id = online.id;
                self.drop_link(id, "the link was dead after the network changed", now);
                self.backoff.at_once(now);
            }
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
        match &mut self.link {
            Link::Online(online) => {
                if online.proof_by.is_none() {
                    online.proof_by = Some(now + PROOF_TIMEOUT);
                    self.outputs.push_back(Output::Ping(online.id));
                }
            }
            Link::Greeting { id, asked } if now.since(*asked) >= STALE_ATTEMPT => {
                let id = *id;
                self.drop_link(id, "tried again because the network changed", now);
                self.backoff.at_once(now);
            }
            Link::Greeting { .. } => {}
            Link::Down if self.channels.is_empty() => {}
            Link::Down => self.backoff.at_once(now),
        }
        self.settle(now);
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
            Link::Greeting { asked, .. } => Some(*asked + CONNECT_TIMEOUT),
            Link::Online(online) => earliest(Some(online.silence_ends()), online.proof_by),
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
        }
    }

    // Frames.

    fn frame(&mut self, link: LinkId, text: &str, now: Now) {
        let frame = match wire::parse(text) {
            Ok(frame) => frame,
            Err(reason) => {
                self.quiet_frames.warn(format_args!("the server sent a frame that is {reason}; ignored"), now.boot);
                return;
            }
        };
        let online = matches!(self.link, Link::Online(_));
        match frame {
            Incoming::Hello { status: 200, uaid: Some(uaid) } if !online => self.greeted(link, uaid, now.boot),
            Incoming::Hello { status, uaid } if !online => {
                let what = match uaid {
                    None if status == 200 => "the server's hello has no uaid".to_owned(),
                    _ => format!("the server refused the hello with status {status}"),
                };
                self.drop_link(link, &what, now.boot);
                self.backoff.failed(None, now.boot, &mut self.rng);
            }
            Incoming::Register { channel, status, endpoint } if online => {
                self.register_reply(&channel, status, endpoint, now.boot);
            }
            Incoming::Notification(notification) if online => self.notification(link, notification, now),
            Incoming::Nothing => {}
            Incoming::Hello { .. } | Incoming::Register { .. } | Incoming::Notification(_) => {
                self.quiet_frames.warn("the server sent a frame out of turn; ignored", now.boot);
            }
        }
    }

    fn greeted(&mut self, id: LinkId, uaid: String, now: Instant) {
        self.link = Link::Online(Online { id, since: now, heard: now, pinged: false, proof_by: None });
        self.trouble = None;
        if self.uaid.as_deref() != Some(uaid.as_str()) {
            if self.uaid.is_some() {
                log::warn!("the server has forgotten this device: every registration is made anew");
            }
            self.remaking = self.channels.values().any(|entry| entry.answer_by.is_none());
            let mark = if self.remaking { REMAKING } else { "" };
            self.outputs.push_back(Output::Remember { key: "uaid", value: format!("{mark}{uaid}") });
            self.uaid = Some(uaid.into());
            // The old life's channels are unknown to the new one.
            self.dead.clear();
            for entry in self.channels.values_mut() {
                if entry.step == Step::Done {
                    self.open += 1;
                }
                entry.tries = 0;
                entry.step = Step::Queued { not_before: now };
            }
        }
    }

    fn register_reply(&mut self, channel: &str, status: u16, endpoint: Option<String>, now: Instant) {
        let Some(registration) = self.names.get(channel).copied() else {
            // Answered after it was given up: it exists at the server, and nobody wants it.
            if status == 200 && channel.len() <= NAME_LIMIT {
                self.bury(channel.into());
            }
            return;
        };
        let Some(entry) = self.channels.get_mut(&registration) else {
            return;
        };
        if !matches!(entry.step, Step::Sent { .. }) {
            // A late answer to a request that is queued again is as good as any; one to a finished request is not asked
            // for: the endpoint it names works, and so does the one the app has.
            if entry.step == Step::Done || status != 200 {
                return;
            }
        }
        entry.refusal = (status != 200).then_some(status);
        let fault = match (status, endpoint) {
            (200, Some(endpoint)) if usable_endpoint(&endpoint) => {
                let channel = entry.channel.clone();
                entry.answer_by = None;
                entry.tries = 0;
                entry.step = Step::Done;
                self.open -= 1;
                self.backoff.succeeded();
                self.outputs.push_back(Output::Registered { registration, channel, endpoint: endpoint.into() });
                return;
            }
            (200, _) => Fault::Final("the server's register reply has no endpoint that can be used".into()),
            (400, _) if entry.vapid.is_some() => {
                Fault::Final("the server refused the registration (400): the app's VAPID key is bad".into())
            }
            (400, _) => Fault::Final("the server refused the registration (400)".into()),
            (status, _) => Fault::Passing(status),
        };
        let existed = entry.answer_by.is_none();
        match fault {
            Fault::Final(text) if !existed => {
                self.forget(registration);
                let reason = FailureReason::InternalError;
                self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
            }
            Fault::Final(text) if status == 400 => {
                self.forget(registration);
                self.outputs.push_back(Output::Lost { registration, text });
            }
            Fault::Final(text) => {
                self.quiet_frames.warn(text, now);
                self.requeue(registration, now);
            }
            Fault::Passing(status) => {
                log::info!("the server answered {status} to a registration; it is tried again");
                self.requeue(registration, now);
            }
        }
    }

    fn notification(&mut self, link: LinkId, notification: Notification, now: Now) {
        if notification.version.is_empty()
            || notification.version.len() > NAME_LIMIT
            || notification.channel.len() > NAME_LIMIT
        {
            self.quiet_frames.warn("the server sent a message without a usable version; ignored", now.boot);
            return;
        }
        self.backoff.succeeded();
        let id: Arc<str> = notification.version.as_str().into();
        let Some(registration) = self.names.get(notification.channel.as_str()).copied() else {
            let what = format_args!("a message for the unknown channel {}…: dropped", hint(&notification.channel));
            self.quiet_unknown.warn(what, now.boot);
            let channel: Arc<str> = notification.channel.as_str().into();
            self.acks.push((channel.clone(), id));
            self.bury(channel);
            return;
        };
        let key = (registration, id.clone());
        if self.unsafe_messages.len() >= UNSAFE_LIMIT && !self.unsafe_messages.contains(&key) {
            self.drop_link(link, "too many messages wait to be stored", now.boot);
            self.backoff.failed(None, now.boot, &mut self.rng);
            return;
        }
        self.unsafe_messages.insert(key);
        let body = match notification.body() {
            Ok(bytes) => IncomingBody::Bytes(bytes.into()),
            Err(reason) => IncomingBody::Undecodable(reason),
        };
        self.outputs.push_back(Output::Message(IncomingMessage {
            registration,
            id,
            body,
            expires: notification.ttl.map(|secs| now.wall + Duration::from_secs(secs)),
            topic: notification.topic.filter(|topic| !topic.is_empty()).map(Arc::from),
            urgency: notification.urgency.as_deref().and_then(Urgency::parse).unwrap_or_default(),
        }));
    }

    // The link.

    fn closed(&mut self, code: Option<u16>, reason: &str, now: Instant) {
        let reset = code == Some(1000) && reason == "SM";
        let text = match code {
            _ if reset => "the server forgot this device: too many messages were stored".to_owned(),
            Some(code) => format!("the server closed the connection ({code} {})", printable(reason)),
            None => "the connection ended".to_owned(),
        };
        self.link_ended(&text, now);
        self.backoff.failed(None, now, &mut self.rng);
        if reset {
            // Every endpoint is dead until the next hello; the pace still bounds a server that does nothing else.
            self.backoff.hurry(now + between(Duration::from_millis(100), Duration::from_secs(1), &mut self.rng));
        }
    }

    fn failed(&mut self, error: &LinkError, now: Instant) {
        self.link_ended(&error.to_string(), now);
        match error {
            LinkError::Http { status: status @ (401 | 403), .. } => {
                let text = format!("the server refuses the credentials ({status}): mend them in the configuration");
                self.trouble = Some(text.as_str().into());
                self.fail_waiting(FailureReason::ActionRequired, &text);
                self.backoff.refused(now, &mut self.rng);
            }
            LinkError::Http { status, retry_after, .. } => {
                let wish = retry_after.or_else(|| (*status == 429).then_some(TOO_MANY_REQUESTS));
                self.backoff.failed(wish, now, &mut self.rng);
            }
            LinkError::Resolve(_)
            | LinkError::Connect(_)
            | LinkError::Tls(_)
            | LinkError::Timeout
            | LinkError::Protocol(_)
            | LinkError::Io(_) => self.backoff.failed(None, now, &mut self.rng),
        }
    }

    /// Closes the link from this side.
    fn drop_link(&mut self, id: LinkId, why: &str, now: Instant) {
        self.outputs.push_back(Output::Close(id));
        self.link_ended(why, now);
    }

    fn link_ended(&mut self, why: &str, now: Instant) {
        if let Link::Online(online) = &self.link
            && now.since(online.since) >= PROVEN
        {
            self.backoff.succeeded();
        }
        self.last_error = Some(why.into());
        self.link_gone(now);
    }

    fn link_gone(&mut self, now: Instant) {
        self.link = Link::Down;
        self.acks.clear();
        self.unsafe_messages.clear();
        for entry in self.channels.values_mut() {
            if matches!(entry.step, Step::Sent { .. }) {
                entry.step = Step::Queued { not_before: now };
            }
        }
    }

    /// Does whatever has become due; every door ends here.
    fn settle(&mut self, now: Instant) {
        self.expire(now);
        if self.channels.is_empty() {
            self.retire(now);
        } else {
            self.connect_if_due(now);
            self.send_requests(now);
        }
        self.bury_dead();
        self.finish_remaking();
        let state = match &self.link {
            Link::Online(_) => LinkState::Online,
            Link::Greeting { .. } => LinkState::Connecting,
            Link::Down if self.channels.is_empty() => LinkState::Idle,
            Link::Down => LinkState::Waiting,
        };
        if state != self.state {
            self.state = state;
            self.since = now;
            self.outputs.push_back(Output::StateChanged(state));
        }
    }

    /// The last of the old life's registrations is made: from now on they need not be made again.
    fn finish_remaking(&mut self) {
        let unmade = |entry: &Entry| entry.answer_by.is_none() && entry.step != Step::Done;
        if self.remaking && !self.channels.values().any(unmade) {
            self.remaking = false;
            let value = self.uaid.as_deref().unwrap_or_default().to_owned();
            self.outputs.push_back(Output::RememberBehind { key: "uaid", value });
        }
    }

    /// Nobody needs the link any more.
    fn retire(&mut self, now: Instant) {
        self.bury_dead();
        self.flush_acks();
        let id = match &self.link {
            Link::Down => None,
            Link::Greeting { id, .. } => Some(*id),
            Link::Online(online) => Some(online.id),
        };
        if let Some(id) = id {
            self.outputs.push_back(Output::Close(id));
            self.link_gone(now);
        }
        self.backoff.clear();
    }

    fn connect_if_due(&mut self, now: Instant) {
        if !matches!(self.link, Link::Down) {
            return;
        }
        match self.backoff.retry_at() {
            Some(at) if at > now => {}
            Some(_) => {
                self.backoff.clear();
                let id = self.links.take();
                self.link = Link::Greeting { id, asked: now };
                self.outputs.push_back(Output::Connect { link: id, path: String::new() });
                if self.state != LinkState::Connecting {
                    self.state = LinkState::Connecting;
                    self.since = now;
                    self.outputs.push_back(Output::StateChanged(LinkState::Connecting));
                }
            }
            None => self.backoff.failed(None, now, &mut self.rng),
        }
    }

    // Registrations.

    fn send_requests(&mut self, now: Instant) {
        let Link::Online(Online { id: link, .. }) = self.link else {
            return;
        };
        if self.open == 0 {
            return;
        }
        let mut room = WINDOW.saturating_sub(self.in_flight());
        // Apps that wait come before registrations that are being made again.
        for fresh in [true, false] {
            for entry in self.channels.values_mut() {
                if room == 0 {
                    return;
                }
                match entry.step {
                    Step::Queued { not_before } if not_before <= now && entry.answer_by.is_some() == fresh => {}
                    Step::Queued { .. } | Step::Sent { .. } | Step::Done => continue,
                }
                room -= 1;
                entry.tries = entry.tries.saturating_add(1);
                entry.step = Step::Sent { deadline: now + REQUEST_TIMEOUT };
                let frame = Outgoing::Register { channel: &entry.channel, key: entry.vapid.as_deref() };
                self.outputs.push_back(Output::Send(link, frame.to_text()));
            }
        }
    }

    /// Ends what has taken too long: an app's wait, or a request that exists already.
    fn expire(&mut self, now: Instant) {
        if self.open == 0 {
            return;
        }
        let late = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let given_up: Vec<_> =
            self.channels.iter().filter(|(_, e)| late(e.answer_by)).map(|(registration, _)| *registration).collect();
        for registration in given_up {
            let Some(entry) = self.forget(registration) else {
                continue;
            };
            let (reason, text) = match (&self.trouble, entry.refusal) {
                (Some(trouble), _) => (FailureReason::ActionRequired, trouble.to_string()),
                (None, Some(status)) => {
                    (FailureReason::InternalError, format!("the server refused the registration ({status})"))
                }
                (None, None) => (FailureReason::Network, "the server did not make it in time".to_owned()),
            };
            if entry.tries > 0 {
                self.bury(entry.channel);
            }
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
        }
        let unanswered: Vec<_> = self
            .channels
            .iter()
            .filter(|(_, e)| matches!(e.step, Step::Sent { deadline } if deadline <= now))
            .map(|(registration, _)| *registration)
            .collect();
        for registration in unanswered {
            self.requeue(registration, now);
        }
    }

    fn requeue(&mut self, registration: RegistrationId, now: Instant) {
        let Some(entry) = self.channels.get_mut(&registration) else {
            return;
        };
        let delay = match entry.answer_by {
            Some(_) => FRESH_RETRY,
            None => {
                let limit = super::backoff::CEILING.min(REQUEST_TIMEOUT * (1 << entry.tries.min(8)));
                between(super::backoff::BASE, limit, &mut self.rng)
            }
        };
        entry.step = Step::Queued { not_before: now + delay };
    }

    fn fail_waiting(&mut self, reason: FailureReason, text: &str) {
        let waiting: Vec<_> = self
            .channels
            .iter()
            .filter(|(_, e)| e.answer_by.is_some())
            .map(|(registration, _)| *registration)
            .collect();
        for registration in waiting {
            self.forget(registration);
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text: text.to_owned() });
        }
    }

    fn insert(&mut self, registration: RegistrationId, entry: Entry) {
        self.open += usize::from(entry.step != Step::Done);
        self.names.insert(entry.channel.clone(), registration);
        if let Some(old) = self.channels.insert(registration, entry) {
            self.open -= usize::from(old.step != Step::Done);
            self.names.remove(&old.channel);
        }
    }

    fn forget(&mut self, registration: RegistrationId) -> Option<Entry> {
        let entry = self.channels.remove(&registration)?;
        self.names.remove(&entry.channel);
        self.open -= usize::from(entry.step != Step::Done);
        Some(entry)
    }

    fn in_flight(&self) -> usize {
        self.channels.values().filter(|entry| matches!(entry.step, Step::Sent { .. })).count()
    }

    /// A channel nobody wants any more: the server is told at the next occasion.
    fn bury(&mut self, channel: Arc<str>) {
        if self.dead.contains(&channel) {
            return;
        }
        if self.dead.len() == DEAD_LIMIT {
            self.dead.pop_front();
        }
        self.dead.push_back(channel);
    }

    fn bury_dead(&mut self) {
        let Link::Online(Online { id: link, .. }) = self.link else {
            return;
        };
        for channel in self.dead.drain(..self.dead.len().min(DEAD_AT_ONCE)) {
            // 200: by the user (push.md §3a); the server counts the reasons and nothing else.
            let frame = Outgoing::Unregister { channel: &channel, code: 200 };
            self.outputs.push_back(Output::Send(link, frame.to_text()));
        }
    }

    fn flush_acks(&mut self) {
        let Link::Online(Online { id: link, .. }) = self.link else {
            self.acks.clear();
            return;
        };
        for acks in self.acks.chunks(ACKS_PER_FRAME) {
            let updates = acks.iter().map(|(channel, version)| Ack { channel, version, code: 100 }).collect();
            self.outputs.push_back(Output::Send(link, Outgoing::Ack { updates }.to_text()));
        }
        self.acks.clear();
    }

    /// A version 4 UUID, lower case with dashes: with any other writing the server closes the link.
    fn new_name(&mut self) -> Arc<str> {
        let mut bytes = [0; 16];
        self.rng.fill_bytes(&mut bytes);
        uuid::Builder::from_random_bytes(bytes).into_uuid().hyphenated().to_string().into()
    }
}

enum Fault {
    /// Trying again would not help.
    Final(String),
    Passing(u16),
}

fn usable_endpoint(endpoint: &str) -> bool {
    endpoint.len() <= ENDPOINT_LIMIT && (endpoint.starts_with("https://") || endpoint.starts_with("http://"))
}

/// A peer's text for the log: short, in one line.
fn printable(text: &str) -> String {
    text.chars().take(80).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests;
