//! MQTT 5 and 3.1.1 (push.md §3e): a persistent session, one subscription with QoS 1 per registration.
//!
//! A message is acknowledged when the core calls it safe, never before, and in the order of arrival, as the specification
//! demands (MQTT 5.0 §4.6); the receive maximum bounds what waits here. What identifies a message is in `identity.rs`.
//!
//! Version 5 is tried first, and 3.1.1 when the broker refuses 5 or hangs up on it; which one worked is remembered, and 5
//! looked at again once a day. Every topic is subscribed anew with each link, whether or not the broker says that it has
//! the session: a broker that lost power comes back with the session but not with its latest subscriptions.
//!
//! A sender's user properties `id`, `urgency` (RFC 8030's words) and `topic` (collapse) are honoured, and the message
//! expiry as TTL. A retained message is handed on once per content.
//!
//! Packets are made and read by `mqtt-protocol-core`, its packets alone: both versions, checked per packet type,
//! maintained, and without a runtime (`mqute-codec` brings tokio, `mqttbytes` is not maintained, `mqtt5-protocol` takes
//! more). Framing and bounds are in `wire.rs`.

mod identity;
mod link;
mod messages;
mod registrations;
mod versions;
mod wire;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand_chacha::{
    ChaCha12Rng,
    rand_core::{Rng, SeedableRng},
};

use self::{identity::Ledger, versions::Versions, wire::Decoder};
use super::{
    Beginning, CONNECT_TIMEOUT, Channel, DOUBT, Heartbeat, LinkIds, Output, REGISTER_TIMEOUT, Standing,
    backoff::Backoff, heartbeat::Intervals, quiet::Quiet,
};
use crate::{
    config::{MqttSettings, MqttVersion},
    event::{LinkEvent, LinkId, Login},
    model::{FailureReason, RegistrationId},
    time::{Instant, Now, earliest},
    view::LinkState,
};

/// Requests under way at a time.
const WINDOW: usize = 16;
/// Topics in one request: AWS IoT takes no more.
const TOPICS_PER_REQUEST: usize = 8;
/// How long the broker may take to answer one.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Before an app's registration is tried again within its [`REGISTER_TIMEOUT`].
const FRESH_RETRY: Duration = Duration::from_secs(2);
/// A link that lived this long has proved the broker well, and has brought what was left of before.
const PROVEN: Duration = Duration::from_secs(30);
/// An attempt older than this may date from before the network came back.
const STALE_ATTEMPT: Duration = Duration::from_secs(2);
/// For so long a refusal of the credentials is the answer to every app; after it an app's registration may try again.
const TROUBLE_HOLDS: Duration = Duration::from_secs(30);
/// Messages on the way, whatever the broker was asked for; with more the link is given up.
const UNSAFE_LIMIT: usize = 4096;
/// Acknowledgements after which the broker is asked whether it has them.
const ACKS_PER_PING: usize = 256;
/// Links in a row that the broker took and closed before they were [`PROVEN`]: as if somebody else took their place.
const SHORT_LIVES: u32 = 6;
/// Topics to unsubscribe; of more the oldest are forgotten, and found again when a message comes.
const DEAD_LIMIT: usize = 256;
/// UnifiedPush D-Bus 0.3.0: what an app takes.
const ENDPOINT_LIMIT: usize = 1000;
/// The longest prefix and our own part, with room.
const TOPIC_LIMIT: usize = 200;
/// Random bytes of a topic: 32 characters, 192 bits. UnifiedPush advises 160.
const TOPIC_BYTES: usize = 24;
/// Every broker takes a client identifier of 1 to 23 letters and digits (MQTT 5.0 §3.1.3.1): `np` and 125 random bits.
const CLIENT_LENGTH: usize = 23;
/// How much longer than our longest silence the broker is told to wait.
const KEEP_ALIVE_MARGIN: Duration = Duration::from_secs(60);
/// How much sooner than that it gets a packet.
const KEEP_ALIVE_SLACK: Duration = Duration::from_secs(10);
/// After a word that the broker is busy.
const BUSY: Duration = Duration::from_secs(60);
/// No broker in use takes less; a request with one topic fits.
const LEAST_PACKET: u32 = 256;

/// One broker's session.
#[derive(Debug)]
pub struct Session {
    url: Arc<str>,
    template: Option<Arc<str>>,
    settings: MqttSettings,
    rng: ChaCha12Rng,
    links: LinkIds,
    client: Arc<str>,
    versions: Versions,
    ledger: Ledger,
    intervals: Intervals,
    entries: BTreeMap<RegistrationId, Entry>,
    names: HashMap<Arc<str>, RegistrationId>,
    /// Registrations not [`Step::Done`].
    open: usize,
    dead: VecDeque<Arc<str>>,
    requests: BTreeMap<u16, Request>,
    last_packet: u16,
    /// Messages not acknowledged yet on this link, in the order of arrival.
    arrivals: VecDeque<Arrival>,
    link: Link,
    /// After a change of the network: when a link that has not answered is doubted, or an attempt has had its chance.
    doubt_at: Option<Instant>,
    challenger: Option<Challenger>,
    decoder: Decoder,
    allowed: bool,
    short_lives: u32,
    backoff: Backoff,
    outputs: VecDeque<Output>,
    state: LinkState,
    since: Instant,
    last_error: Option<Arc<str>>,
    trouble: Option<Arc<str>>,
    quiet_unknown: Quiet,
    quiet_refused: Quiet,
}

#[derive(Debug)]
struct Entry {
    topic: Arc<str>,
    endpoint: Arc<str>,
    /// Whether the core knows this endpoint.
    told: bool,
    /// By when the app must be told; `None` for a registration that exists.
    answer_by: Option<Instant>,
    /// The broker's last answer that was no subscription.
    refusal: Option<u8>,
    tries: u32,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Done,
    Queued { not_before: Instant },
    Sent,
}

#[derive(Debug)]
struct Request {
    deadline: Instant,
    /// With whose they are; of none: to unsubscribe.
    topics: Vec<(Option<RegistrationId>, Arc<str>)>,
}

#[derive(Debug)]
struct Arrival {
    packet: u16,
    registration: Option<RegistrationId>,
    id: Arc<str>,
    safe: bool,
}

#[derive(Debug)]
enum Link {
    Down,
    /// Up to the broker's CONNACK.
    Opening {
        id: LinkId,
        asked: Instant,
        version: MqttVersion,
        login: Option<Login>,
        /// Whether CONNECT is on its way.
        greeted: bool,
        /// Whether anything came back.
        heard: bool,
    },
    Online(Online),
}

/// Made beside a link in doubt. It says nothing before that is given up: the broker has a session on one link only.
#[derive(Debug)]
struct Challenger {
    id: LinkId,
    asked: Instant,
    login: Option<Login>,
}

#[derive(Debug)]
struct Online {
    id: LinkId,
    version: MqttVersion,
    since: Instant,
    heard: Instant,
    sent: Instant,
    /// What the broker is told, or tells, that it waits for a packet of ours.
    keep_alive: Duration,
    /// By when the ping on its way must be answered, and the silence before it.
    proof: Option<Proof>,
    /// The network has changed: a silence that began before says nothing of it.
    moved: bool,
    /// The last registration is gone: how long what is on its way is waited for.
    leave_by: Option<Instant>,
}

impl Online {
    /// How long after a packet of ours another one is due; the broker counts nothing else.
    fn patience(&self) -> Duration {
        self.keep_alive - KEEP_ALIVE_SLACK.min(self.keep_alive / 10)
    }
}

#[derive(Clone, Copy, Debug)]
struct Proof {
    by: Instant,
    silence: Duration,
}

impl Session {
    /// A session that goes on where an earlier life ended; connects when there are channels.
    pub fn new(beginning: Beginning<'_>, now: Now) -> Self {
        let remembered = |key| beginning.remembered(key);
        let settings = beginning.settings.mqtt.clone();
        let mut rng = ChaCha12Rng::from_seed(beginning.seed);
        let client = remembered("client").filter(|client| !client.is_empty());
        let forgotten = client.is_none();
        let (shortest, longest) = beginning.network.heartbeat;
        let mut session = Self {
            url: Arc::clone(&beginning.settings.url),
            template: beginning.settings.endpoint.clone(),
            client: client.unwrap_or_else(|| new_client(&mut rng)),
            versions: Versions::new(settings.version, remembered("version").as_deref()),
            ledger: Ledger::new(remembered("era").as_deref(), ACKS_PER_PING),
            intervals: Intervals::new((shortest, longest), remembered("heartbeat").as_deref()),
            settings,
            rng,
            links: beginning.links,
            entries: BTreeMap::new(),
            names: HashMap::new(),
            open: 0,
            dead: VecDeque::new(),
            requests: BTreeMap::new(),
            last_packet: 0,
            arrivals: VecDeque::new(),
            link: Link::Down,
            doubt_at: None,
            challenger: None,
            decoder: Decoder::default(),
            allowed: true,
            short_lives: 0,
            backoff: Backoff::default(),
            outputs: VecDeque::new(),
            state: LinkState::Idle,
            since: now.boot,
            last_error: None,
            trouble: None,
            quiet_unknown: Quiet::default(),
            quiet_refused: Quiet::default(),
        };
        if forgotten {
            // Before any link: a broker keeps messages under this name, and after a crash they must be found again.
            let value = session.client.to_string();
            session.outputs.push_back(Output::Remember { key: "client", value });
        }
        for Channel { registration, channel, endpoint: known, .. } in beginning.channels {
            let topic = if channel.is_empty() { session.new_topic() } else { channel };
            let endpoint = session.endpoint(&topic);
            let lost = match &endpoint {
                _ if !is_topic(&topic) => Some("its stored topic is none".to_owned()),
                Err(text) => Some(text.clone()),
                Ok(_) => None,
            };
            match (lost, endpoint) {
                (None, Ok(endpoint)) => {
                    let told = *endpoint == *known;
                    session.insert(registration, Entry::new(topic, endpoint, told, None, now.boot));
                }
                (text, _) => {
                    let text = text.unwrap_or_default();
                    session.outputs.push_back(Output::Lost { registration, text });
                }
            }
        }
        if !session.entries.is_empty() {
            session.backoff.at_once(now.boot);
        }
        session.settle(now);
        session
    }

    /// An event on a link.
    pub fn handle_link(&mut self, link: LinkId, event: LinkEvent, now: Now) {
        if self.challenger.as_ref().is_some_and(|challenger| challenger.id == link) {
            self.handle_challenger(event, now);
            self.settle(now);
            return;
        }
        if self.link_id() != Some(link) {
            return;
        }
        let doubted = event.is_last()
            && (self.doubt_at.is_some() || self.challenger.is_some())
            && matches!(self.link, Link::Online(_));
        match event {
            LinkEvent::Login(given) => {
                if let Link::Opening { login, .. } = &mut self.link {
                    *login = Some(given);
                }
            }
            LinkEvent::Open => self.greet(now.boot),
            LinkEvent::Bytes(bytes) => self.bytes(&bytes, now),
            // What a WebSocket has beside its binary frames says nothing here.
            LinkEvent::Text(_) | LinkEvent::Ping | LinkEvent::Pong => {}
            LinkEvent::Closed { .. } => {
                let challenger = self.challenger.take();
                self.hung_up(now);
                self.ended("the broker closed the connection", now.boot);
                self.give_way(now.boot);
                self.adopt(challenger, now);
            }
            LinkEvent::Failed(error) => {
                let challenger = self.challenger.take();
                self.failed(&error, now);
                self.adopt(challenger, now);
            }
        }
        if doubted && self.trouble.is_none() {
            self.backoff.ended_in_doubt(!matches!(self.link, Link::Down), now.boot);
        }
        self.settle(now);
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        match &self.link {
            Link::Opening { asked, .. } if *asked + CONNECT_TIMEOUT <= now.boot => {
                self.drop_link("the broker did not answer in time", now.boot);
                self.backoff.failed(None, now.boot, &mut self.rng);
            }
            Link::Online(Online { proof: Some(proof), moved, .. }) if proof.by <= now.boot => {
                if !moved {
                    self.intervals.unanswered(proof.silence, now.boot);
                }
                self.drop_link("the link was dead: the broker did not answer", now.boot);
                self.backoff.at_once(now.boot);
            }
            Link::Opening { .. } if self.doubt_at.is_some_and(|at| at <= now.boot) => {
                self.drop_link("tried again because the network changed", now.boot);
                self.backoff.at_once(now.boot);
            }
            Link::Online(_) if self.doubt_at.is_some_and(|at| at <= now.boot) => self.doubt(now),
            Link::Online(online) if self.ping_at(online).is_some_and(|at| at <= now.boot) => self.ping(now.boot),
            Link::Down | Link::Opening { .. } | Link::Online(_) => {}
        }
        self.settle(now);
    }

    /// The network came back or changed, or the machine woke up.
    pub fn handle_network(&mut self, now: Now) {
        match &self.link {
            Link::Online(online) => {
                self.doubt_at.get_or_insert(now.boot + DOUBT);
                if online.proof.is_none() {
                    self.ping(now.boot);
                }
            }
            Link::Opening { asked, .. } if now.boot.since(*asked) >= STALE_ATTEMPT => {
                self.drop_link("tried again because the network changed", now.boot);
                self.backoff.at_once(now.boot);
            }
            Link::Opening { asked, .. } => {
                self.doubt_at = Some(*asked + STALE_ATTEMPT);
                self.backoff.own_event();
            }
            Link::Down if self.allowed && !self.entries.is_empty() => self.backoff.at_once(now.boot),
            Link::Down => {}
        }
        self.settle(now);
    }

    /// Which network it is now.
    pub fn set_network(&mut self, id: Option<Arc<str>>, now: Now) {
        self.intervals.use_network(id.as_deref());
        if let Link::Online(online) = &mut self.link {
            online.moved = true;
        }
        self.settle(now);
    }

    /// Whether there may be a link at all.
    pub fn set_allowed(&mut self, allowed: bool, now: Now) {
        if std::mem::replace(&mut self.allowed, allowed) == allowed {
            return;
        }
        if allowed {
            self.backoff.at_once(now.boot);
        } else {
            self.leave(wire::Leave::Keeping, now.boot);
            self.backoff.clear();
            self.fail_waiting(FailureReason::Network, NOT_ALLOWED);
        }
        self.settle(now);
    }

    /// Messages were turned away that the server still has: it sends them again on a new link.
    pub fn restart(&mut self, now: Now) {
        if !matches!(self.link, Link::Down) {
            self.drop_link("connected anew to get messages again that could not be stored", now.boot);
            self.backoff.at_once(now.boot);
        }
        self.settle(now);
    }

    /// Make a registration.
    pub fn register(&mut self, registration: RegistrationId, now: Now) {
        if self.entries.contains_key(&registration) {
            log::error!("registration {} is asked for twice; the second is ignored", registration.0);
            return;
        }
        let topic = self.new_topic();
        let trouble = self.trouble.as_deref().filter(|_| now.boot.since(self.since) < TROUBLE_HOLDS);
        let refusal = if !self.allowed {
            Err((FailureReason::Network, NOT_ALLOWED.to_owned()))
        } else if let Some(trouble) = trouble {
            Err((FailureReason::ActionRequired, trouble.to_owned()))
        } else {
            self.endpoint(&topic).map_err(|text| (FailureReason::ActionRequired, text))
        };
        let endpoint = match refusal {
            Ok(endpoint) => endpoint,
            Err((reason, text)) => {
                self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
                return;
            }
        };
        let first = self.entries.is_empty();
        self.insert(registration, Entry::new(topic, endpoint, false, Some(now.boot + REGISTER_TIMEOUT), now.boot));
        if matches!(self.link, Link::Down) {
            if first {
                // Whatever was due was for registrations that are gone.
                self.backoff.clear();
            }
            self.backoff.hurry(now.boot);
        }
        self.settle(now);
    }

    /// Give a registration up.
    pub fn unregister(&mut self, registration: RegistrationId, now: Now) {
        let Some(entry) = self.forget(registration) else { return };
        for arrival in self.arrivals.iter_mut().filter(|arrival| arrival.registration == Some(registration)) {
            arrival.safe = true;
        }
        self.acknowledge(now.boot);
        if entry.answer_by.is_none() || entry.tries > 0 {
            self.bury(entry.topic);
        }
        self.settle(now);
    }

    /// The message is safe: acknowledge it.
    pub fn safe(&mut self, registration: RegistrationId, id: &Arc<str>, now: Now) {
        let arrival = self
            .arrivals
            .iter_mut()
            .find(|arrival| !arrival.safe && arrival.id == *id && arrival.registration == Some(registration));
        if let Some(arrival) = arrival {
            arrival.safe = true;
            self.acknowledge(now.boot);
        }
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Session::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let (link, online) = match &self.link {
            Link::Down => (self.backoff.retry_at().filter(|_| self.allowed), false),
            Link::Opening { asked, .. } => (earliest(Some(*asked + CONNECT_TIMEOUT), self.doubt_at), false),
            Link::Online(online) => {
                let ping = online.proof.map(|proof| proof.by).or_else(|| self.ping_at(online));
                (earliest(earliest(ping, online.leave_by), self.doubt_at), true)
            }
        };
        let at = self.requests.values().fold(link, |at, request| earliest(at, Some(request.deadline)));
        if self.open == 0 {
            return at;
        }
        let room = online && self.requests.len() < WINDOW;
        self.entries.values().filter(|entry| entry.step != Step::Done).fold(at, |at, entry| {
            let step = match entry.step {
                Step::Queued { not_before } if room => Some(not_before),
                Step::Queued { .. } | Step::Sent | Step::Done => None,
            };
            earliest(earliest(at, entry.answer_by), step)
        })
    }

    /// What is worth waking a sleeping machine for.
    pub fn poll_wake(&self) -> Option<Instant> {
        match &self.link {
            Link::Online(online) => self.ping_at(online),
            Link::Down | Link::Opening { .. } => None,
        }
    }

    /// What `status` shows.
    pub fn standing(&self) -> Standing {
        let heartbeat = match &self.link {
            Link::Online(online) => {
                Some(Heartbeat { interval: self.intervals.interval().min(online.patience()), by_server: false })
            }
            Link::Down | Link::Opening { .. } => None,
        };
        Standing {
            state: self.state,
            since: self.since,
            retry_at: self.backoff.retry_at().filter(|_| self.state == LinkState::Waiting),
            last_error: self.last_error.clone(),
            trouble: self.trouble.clone(),
            registrations: self.entries.len(),
            heartbeat,
        }
    }
}

const NOT_ALLOWED: &str = "connections are not allowed on this network (network.roaming)";

impl Entry {
    const fn new(
        topic: Arc<str>,
        endpoint: Arc<str>,
        told: bool,
        answer_by: Option<Instant>,
        not_before: Instant,
    ) -> Self {
        Self { topic, endpoint, told, answer_by, refusal: None, tries: 0, step: Step::Queued { not_before } }
    }
}

fn new_client(rng: &mut ChaCha12Rng) -> Arc<str> {
    const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut client = String::from("np");
    while client.len() < CLIENT_LENGTH {
        // Of 64 values two are thrown away, so that each letter is as likely as the others.
        if let Some(letter) = LETTERS.get((rng.next_u32() % 64) as usize) {
            client.push(char::from(*letter));
        }
    }
    client.into()
}

fn is_topic(topic: &str) -> bool {
    (1..=TOPIC_LIMIT).contains(&topic.len())
        && topic.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'#' | b'+'))
}

#[cfg(test)]
mod tests;
