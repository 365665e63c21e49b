//! Delivery: who has what waiting, whom to wake for it, and what to do when an app does not take it.
//!
//! Each registration is a lane of its own: one call at a time, so that its messages stay in order whatever fails, and so
//! that no other lane waits for it. An unanswered call is never repeated to the instance that has it (it would see the
//! message twice); only when that instance is gone is the message sent again.
//!
//! The module decides when an app is *wanted*; whether it must be thawed or started first is for others to know. They
//! say [`Delivery::ready`] when it can be called.

mod queue;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use self::queue::{Body, Entry, Queue};
use crate::{
    config::Limits,
    event::{CallOutcome, DeliveryTicket, FetchError, FetchTicket, StartOutcome},
    model::{
        AppKey, Bus, ConnectorVersion, Ending, Message, MessageSeq, Owner, Registration, RegistrationId, StoredMessage,
        Urgency,
    },
    time::{Instant, Now, UnixTime, earliest},
};

/// UnifiedPush D-Bus 0.3.0: a message has 1 to 4096 bytes.
pub const MESSAGE_MAX: usize = 4096;
/// Beyond this, bodies that are safe in the store are read back when their turn comes.
const INLINE_BUDGET: usize = 256 * 1024;
/// Bodies the store would not take (full disk) and that are therefore held in memory, at most.
const UNSTORED_BUDGET: usize = 2 * 1024 * 1024;
/// An app that has not answered for this long no longer keeps itself awake by it.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// The store refused: full disks get emptied by people, not by haste.
const STORE_RETRY: Duration = Duration::from_secs(30);
/// Downloads of one attachment before it is given up.
const FETCH_TRIES: u32 = 5;

/// All registrations' queues.
#[derive(Debug)]
pub struct Delivery {
    limits: Limits,
    lanes: BTreeMap<RegistrationId, Lane>,
    apps: BTreeMap<AppKey, App>,
    flights: BTreeMap<DeliveryTicket, RegistrationId>,
    waiting: BTreeMap<MessageSeq, RegistrationId>,
    fetches: BTreeMap<FetchTicket, MessageSeq>,
    inline_bytes: usize,
    unstored_bytes: usize,
    store_retry_at: Option<Instant>,
    next_seq: u64,
    next_ticket: u64,
    outputs: VecDeque<Output>,
}

/// What came of a message handed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It waits for its app.
    Queued,
    /// Known already.
    Duplicate,
    /// Empty, too large or not decodable; the upstream is told that it is done with.
    Unusable,
    /// The store takes nothing and memory is at its bound: the upstream is not told, so that it keeps the message.
    NoRoom,
}

/// A message to hand in: the upstream's, with our defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Whom it is for.
    pub registration: RegistrationId,
    /// The upstream's id.
    pub id: Arc<str>,
    /// Its bytes.
    pub body: ArrivalBody,
    /// When it is of no use any more.
    pub expires: UnixTime,
    /// RFC 8030 Topic.
    pub topic: Option<Arc<str>>,
    /// RFC 8030 Urgency.
    pub urgency: Urgency,
}

/// The bytes of a message to hand in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArrivalBody {
    /// Here.
    Bytes(Arc<[u8]>),
    /// To be downloaded first.
    Attachment {
        /// Absolute URL.
        url: String,
        /// Size the server claims, in bytes.
        size: Option<u64>,
    },
    /// Cannot be decoded, with why.
    Undecodable(String),
}

/// What delivery wants done or known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Write the message; answer with [`Delivery::stored`].
    Persist(Message),
    /// The message's life ended; `persisted` says whether the store knows it.
    End(MessageSeq, Ending),
    /// Read the body back; answer with [`Delivery::body`].
    LoadBody(MessageSeq),
    /// Download an attachment; answer with [`Delivery::fetched`].
    Fetch {
        /// To answer with.
        ticket: FetchTicket,
        /// For which registration.
        registration: RegistrationId,
        /// Absolute URL.
        url: String,
    },
    /// The upstream may be told that the message is safe, or done with.
    Safe(RegistrationId, Arc<str>),
    /// The app has something waiting and is not known to be ready. Answer with [`Delivery::ready`],
    /// [`Delivery::start_failed`] or, when its owner changes, [`Delivery::appeared`] or [`Delivery::vanished`].
    Wake(AppKey),
    /// Call a connector; answer with [`Delivery::call_done`].
    Call {
        /// To answer with.
        ticket: DeliveryTicket,
        /// Which app.
        app: AppKey,
        /// Which instance.
        owner: Owner,
        /// Which interface.
        version: ConnectorVersion,
        /// What to hand over.
        call: Handover,
    },
    /// The app was told of its endpoint.
    EndpointTold(RegistrationId),
    /// The app took something.
    Delivered(AppKey),
    /// Whether a delivery to the app is under way, which vetoes freezing and killing it.
    Pending(AppKey, bool),
    /// A decision for the app's `why`.
    Note(AppKey, &'static str, String),
}

/// What a call hands over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handover {
    /// A message.
    Message {
        /// The app's name for the registration.
        token: Arc<str>,
        /// The upstream's id.
        id: Arc<str>,
        /// Exactly as received.
        body: Arc<[u8]>,
    },
    /// An endpoint.
    Endpoint {
        /// The app's name for the registration.
        token: Arc<str>,
        /// The capability URL.
        endpoint: Arc<str>,
    },
}

#[derive(Debug)]
struct Lane {
    app: AppKey,
    token: Arc<str>,
    version: ConnectorVersion,
    queue: Queue,
    endpoint: Option<EndpointDue>,
    flight: Option<Flight>,
    retry_at: Option<Instant>,
}

#[derive(Debug)]
struct EndpointDue {
    endpoint: Arc<str>,
    attempts: u32,
}

#[derive(Debug)]
struct Flight {
    ticket: DeliveryTicket,
    cargo: Cargo,
    /// While `slow` is false: when it becomes slow. While true: when the app gets another chance to answer.
    deadline: Instant,
    slow: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Cargo {
    Message(MessageSeq),
    Endpoint(Arc<str>),
}

#[derive(Debug)]
struct App {
    lanes: Vec<RegistrationId>,
    reach: Reach,
    failures: u32,
    quiet_until: Option<Instant>,
    pending_told: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Reach {
    /// Its bus has not said yet whether it runs.
    Unknown,
    /// Not ready: frozen or not running.
    Away,
    /// Not ready and cannot be started; it must come by itself.
    Unstartable,
    /// `Wake` was asked for.
    Asked,
    /// Can be called.
    Ready(Owner),
}

impl Delivery {
    /// Empty queues. `next_seq` is the first message number never used before.
    pub fn new(limits: Limits, next_seq: u64) -> Self {
        Self {
            limits,
            lanes: BTreeMap::new(),
            apps: BTreeMap::new(),
            flights: BTreeMap::new(),
            waiting: BTreeMap::new(),
            fetches: BTreeMap::new(),
            inline_bytes: 0,
            unstored_bytes: 0,
            store_retry_at: None,
            next_seq,
            next_ticket: 1,
            outputs: VecDeque::new(),
        }
    }

    /// A registration exists. Nothing is sent for it before [`Delivery::endpoint_due`] or a message.
    pub fn add(&mut self, registration: &Registration) {
        let app = self.apps.entry(registration.app.clone()).or_insert_with(App::new);
        if !app.lanes.contains(&registration.id) {
            app.lanes.push(registration.id);
        }
        self.lanes.entry(registration.id).or_insert_with(|| Lane {
            app: registration.app.clone(),
            token: Arc::clone(&registration.token),
            version: registration.version,
            queue: Queue::default(),
            endpoint: None,
            flight: None,
            retry_at: None,
        });
    }

    /// A message an earlier life left waiting. Only before the first event.
    pub fn restore(&mut self, stored: StoredMessage) {
        if let Some(lane) = self.lanes.get_mut(&stored.registration) {
            self.waiting.insert(stored.seq, stored.registration);
            lane.queue.restore(stored);
        }
    }

    /// An id an earlier life has dealt with. Only before the first event.
    pub fn restore_seen(&mut self, registration: RegistrationId, id: &str) {
        if let Some(lane) = self.lanes.get_mut(&registration) {
            lane.queue.see(id);
        }
    }

    /// A registration is gone, and all its messages with it. The caller removes them from the store.
    pub fn remove(&mut self, registration: RegistrationId, now: Now) {
        let Some(mut lane) = self.lanes.remove(&registration) else { return };
        if let Some(flight) = lane.flight.take() {
            self.flights.remove(&flight.ticket);
        }
        for entry in lane.queue.iter_mut() {
            self.waiting.remove(&entry.seq);
            self.inline_bytes -= entry.body.inline_len();
            if !entry.persisted {
                self.unstored_bytes -= entry.body.inline_len();
            }
            for _ in 0..entry.unsafe_count {
                self.outputs.push_back(Output::Safe(registration, Arc::clone(&entry.id)));
            }
            self.outputs.push_back(Output::End(entry.seq, Ending::Unregistered));
        }
        if let Some(app) = self.apps.get_mut(&lane.app) {
            app.lanes.retain(|id| *id != registration);
            if app.lanes.is_empty() {
                if app.pending_told {
                    self.outputs.push_back(Output::Pending(lane.app.clone(), false));
                }
                self.apps.remove(&lane.app);
                return;
            }
        }
        self.settle(&lane.app, now);
    }

    /// The app speaks another connector version now.
    pub fn version_changed(&mut self, registration: RegistrationId, version: ConnectorVersion) {
        if let Some(lane) = self.lanes.get_mut(&registration) {
            lane.version = version;
        }
    }

    /// The app is to be told of this endpoint, before any message of the registration.
    pub fn endpoint_due(&mut self, registration: RegistrationId, endpoint: &Arc<str>, now: Now) {
        let Some(lane) = self.lanes.get_mut(&registration) else { return };
        lane.endpoint = Some(EndpointDue { endpoint: Arc::clone(endpoint), attempts: 0 });
        lane.retry_at = None;
        let app = lane.app.clone();
        self.settle(&app, now);
    }

    /// A message came from an upstream.
    pub fn arrived(&mut self, arrival: Arrival, now: Now) -> Admission {
        let Some(lane) = self.lanes.get_mut(&arrival.registration) else {
            self.outputs.push_back(Output::Safe(arrival.registration, arrival.id));
            return Admission::Unusable;
        };
        if lane.queue.has_seen(&arrival.id) {
            self.outputs.push_back(Output::Safe(arrival.registration, arrival.id));
            return Admission::Duplicate;
        }
        if let Some(entry) = lane.queue.waiting_with_id(&arrival.id) {
            if entry.unsafe_count == 0 {
                self.outputs.push_back(Output::Safe(arrival.registration, arrival.id));
            } else {
                entry.unsafe_count += 1;
            }
            return Admission::Duplicate;
        }
        if let Some(problem) = unusable(&arrival.body) {
            let reason = format!("a message from its server was dropped: {problem}");
            self.outputs.push_back(Output::Note(lane.app.clone(), "drop", reason));
            lane.queue.see(&arrival.id);
            self.outputs.push_back(Output::Safe(arrival.registration, arrival.id));
            return Admission::Unusable;
        }
        if self.unstored_bytes >= UNSTORED_BUDGET && self.store_retry_at.is_some() {
            return Admission::NoRoom;
        }
        let app = lane.app.clone();
        self.admit(arrival, now);
        self.settle(&app, now);
        Admission::Queued
    }

    fn admit(&mut self, arrival: Arrival, now: Now) {
        let registration = arrival.registration;
        let Some(lane) = self.lanes.get_mut(&registration) else { return };
        let app = lane.app.clone();
        let in_flight = lane.has_message_in_flight();
        if let Some(old) = arrival.topic.as_deref().and_then(|topic| lane.queue.waiting_with_topic(topic, in_flight)) {
            self.end(old, Ending::Replaced);
        }
        self.make_room(&app, now);
        let seq = MessageSeq(self.next_seq);
        self.next_seq += 1;
        let body = match arrival.body {
            ArrivalBody::Bytes(bytes) => Body::Inline(bytes),
            ArrivalBody::Attachment { url, .. } => Body::Fetching { url, failures: 0, retry_at: Some(now.boot) },
            ArrivalBody::Undecodable(_) => return,
        };
        let entry = Entry {
            seq,
            id: arrival.id,
            body,
            received: now.wall,
            expires: arrival.expires,
            urgency: arrival.urgency,
            topic: arrival.topic,
            persisted: false,
            unsafe_count: 1,
            attempts: 0,
        };
        self.inline_bytes += entry.body.inline_len();
        self.unstored_bytes += entry.body.inline_len();
        self.waiting.insert(seq, registration);
        if let Some(message) = entry.message(registration) {
            self.outputs.push_back(Output::Persist(message));
        }
        if let Some(lane) = self.lanes.get_mut(&registration) {
            lane.queue.push(entry);
        }
        self.start_fetches(now);
    }

    /// Makes room for one more message of the app: first what has expired goes, then the oldest.
    fn make_room(&mut self, app: &AppKey, now: Now) {
        if self.waiting_for(app) < self.limits.messages_per_app {
            return;
        }
        self.sweep_app(app, now);
        if self.waiting_for(app) < self.limits.messages_per_app {
            return;
        }
        // More than one too many when a crash took back the word that some had ended.
        while self.waiting_for(app) >= self.limits.messages_per_app {
            let lanes = self.apps.get(app).map(|app| app.lanes.as_slice()).unwrap_or_default();
            let oldest = lanes
                .iter()
                .filter_map(|id| self.lanes.get(id))
                .filter_map(|lane| lane.queue.oldest_droppable(lane.has_message_in_flight()))
                .min();
            let Some(seq) = oldest else { return };
            self.end(seq, Ending::Overflowed);
            let reason = format!(
                "{} messages were waiting for it, which is the most that are kept: the oldest was dropped",
                self.limits.messages_per_app
            );
            self.outputs.push_back(Output::Note(app.clone(), "drop", reason));
        }
    }

    /// The store has the message, or would not take it.
    pub fn stored(&mut self, seq: MessageSeq, ok: bool, now: Now) {
        if ok && self.store_retry_at.take().is_some() {
            self.persist_again();
        }
        let Some((registration, entry)) = self.entry_mut(seq) else { return };
        if !ok {
            self.store_retry_at = Some(now.boot + STORE_RETRY);
            return;
        }
        if entry.persisted {
            return;
        }
        entry.persisted = true;
        let id = Arc::clone(&entry.id);
        let count = std::mem::take(&mut entry.unsafe_count);
        let len = entry.body.inline_len();
        self.unstored_bytes -= len;
        for _ in 0..count {
            self.outputs.push_back(Output::Safe(registration, Arc::clone(&id)));
        }
        if self.inline_bytes > INLINE_BUDGET
            && let Some((_, entry)) = self.entry_mut(seq)
            && matches!(entry.body, Body::Inline(_))
        {
            entry.body = Body::Stored;
            self.inline_bytes -= len;
        }
    }

    /// Whether the store refused and messages are held in memory.
    pub fn store_is_failing(&self) -> bool {
        self.store_retry_at.is_some()
    }

    /// A body asked for; `None` when the store does not have it.
    pub fn body(&mut self, seq: MessageSeq, body: Option<Arc<[u8]>>, now: Now) {
        let Some((registration, entry)) = self.entry_mut(seq) else { return };
        if entry.body != Body::Loading {
            return;
        }
        match body {
            Some(bytes) => {
                let len = bytes.len();
                entry.body = Body::Inline(bytes);
                self.inline_bytes += len;
            }
            None => self.give_up(seq, "its text could not be read back from the disk"),
        }
        self.settle_lane(registration, now);
    }

    /// An attachment asked for.
    pub fn fetched(&mut self, ticket: FetchTicket, result: Result<Arc<[u8]>, FetchError>, now: Now) {
        let Some(seq) = self.fetches.remove(&ticket) else { return };
        let Some((registration, entry)) = self.entry_mut(seq) else { return };
        let Body::Fetching { failures, retry_at, .. } = &mut entry.body else { return };
        let problem = match result {
            Ok(bytes) if (1..=MESSAGE_MAX).contains(&bytes.len()) => {
                let len = bytes.len();
                entry.body = Body::Inline(bytes);
                let message = entry.message(registration);
                self.inline_bytes += len;
                self.unstored_bytes += len;
                self.outputs.extend(message.map(Output::Persist));
                self.settle_lane(registration, now);
                return;
            }
            Ok(bytes) => format!("its attachment has {} bytes; 1 to {MESSAGE_MAX} are possible", bytes.len()),
            Err(FetchError::Failed(_)) if *failures + 1 < FETCH_TRIES => {
                *failures += 1;
                *retry_at = Some(now.boot + backoff(*failures + 1));
                return;
            }
            Err(error) => format!("its attachment could not be had: {error}"),
        };
        self.give_up(seq, &problem);
        self.settle_lane(registration, now);
    }

    /// The bus says that the app runs, as a new instance or for the first time.
    pub fn appeared(&mut self, app: &AppKey, now: Now) {
        if let Some(state) = self.apps.get_mut(app) {
            state.reach = Reach::Away;
            state.quiet_until = None;
        }
        self.settle(app, now);
    }

    /// The bus says that the app does not run. Its calls in flight end on their own.
    pub fn vanished(&mut self, app: &AppKey, now: Now) {
        if let Some(state) = self.apps.get_mut(app) {
            state.reach = Reach::Away;
        }
        self.settle(app, now);
    }

    /// The app runs, is not frozen, and `owner` is its instance.
    pub fn ready(&mut self, app: &AppKey, owner: Owner, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        state.reach = Reach::Ready(owner);
        for id in &state.lanes {
            if let Some(flight) = self.lanes.get_mut(id).and_then(|lane| lane.flight.as_mut()) {
                flight.slow = false;
                flight.deadline = now.boot + ANSWER_TIME;
            }
        }
        self.settle(app, now);
    }

    /// The app is about to be frozen or ended: no call before it is ready again, and those not taken out yet are called
    /// off.
    pub fn unready(&mut self, app: &AppKey, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        if !matches!(state.reach, Reach::Ready(_) | Reach::Asked) {
            return;
        }
        state.reach = Reach::Away;
        let (lanes, flights) = (&mut self.lanes, &mut self.flights);
        self.outputs.retain(|output| match output {
            Output::Call { ticket, app: called, .. } if called == app => {
                let lane = flights.remove(ticket).and_then(|registration| lanes.get_mut(&registration));
                if let Some(lane) = lane {
                    lane.flight.take_if(|flight| flight.ticket == *ticket);
                }
                false
            }
            _ => true,
        });
        self.settle(app, now);
    }

    /// The app could not be started.
    pub fn start_failed(&mut self, app: &AppKey, outcome: &StartOutcome, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        if state.reach != Reach::Asked {
            return;
        }
        match outcome {
            StartOutcome::Started => return,
            StartOutcome::NotActivatable => {
                state.reach = Reach::Unstartable;
                let reason = "a message waits for it, but nothing says how to start it (no D-Bus service file); \
                              it is delivered when the app starts by itself";
                self.outputs.push_back(Output::Note(app.clone(), "wait", reason.to_owned()));
            }
            StartOutcome::Failed(text) => {
                state.reach = Reach::Away;
                let delay = state.failed(now);
                let reason = format!("it could not be started ({text}); next try in {} s", delay.as_secs().max(1));
                self.outputs.push_back(Output::Note(app.clone(), "wait", reason));
                let lanes = state.lanes.clone();
                for id in lanes {
                    self.count_failure(id, None, text);
                }
            }
        }
        self.settle(app, now);
    }

    /// The bus is gone: nothing is known of its apps, and what was in flight is not.
    pub fn bus_down(&mut self, bus: Bus, now: Now) {
        let apps: Vec<AppKey> = self.apps.keys().filter(|app| app.bus == bus).cloned().collect();
        for app in apps {
            let Some(state) = self.apps.get_mut(&app) else { continue };
            state.reach = Reach::Unknown;
            for id in &state.lanes {
                if let Some(flight) = self.lanes.get_mut(id).and_then(|lane| lane.flight.take()) {
                    self.flights.remove(&flight.ticket);
                }
            }
            self.settle(&app, now);
        }
    }

    /// A call ended.
    pub fn call_done(&mut self, ticket: DeliveryTicket, outcome: &CallOutcome, now: Now) {
        let Some(registration) = self.flights.remove(&ticket) else { return };
        let Some(lane) = self.lanes.get_mut(&registration) else { return };
        let Some(flight) = lane.flight.take_if(|flight| flight.ticket == ticket) else { return };
        let key = lane.app.clone();
        let Some(app) = self.apps.get_mut(&key) else { return };
        match outcome {
            CallOutcome::Accepted => {
                app.failures = 0;
                app.quiet_until = None;
                lane.retry_at = None;
                match flight.cargo {
                    Cargo::Message(seq) => self.end(seq, Ending::Accepted),
                    Cargo::Endpoint(told) => {
                        lane.endpoint.take_if(|due| due.endpoint == told);
                        self.outputs.push_back(Output::EndpointTold(registration));
                    }
                }
                self.outputs.push_back(Output::Delivered(key.clone()));
            }
            CallOutcome::Refused(text) => {
                let attempts = self.count_failure(registration, Some(&flight.cargo), text);
                if let Some(lane) = self.lanes.get_mut(&registration) {
                    lane.retry_at = attempts.map(|attempts| now.boot + backoff(attempts));
                }
            }
            CallOutcome::Vanished => {
                if matches!(app.reach, Reach::Ready(_)) {
                    app.reach = Reach::Away;
                }
                app.failed(now);
                self.count_failure(registration, Some(&flight.cargo), "it ended before it took the message");
            }
            CallOutcome::NotSent(text) => {
                log::warn!("a call to {key} could not be sent: {text}");
                lane.retry_at = Some(now.boot + backoff(3));
            }
        }
        self.settle(&key, now);
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        if self.store_retry_at.is_some_and(|at| at <= now.boot) {
            self.store_retry_at = Some(now.boot + STORE_RETRY);
            self.persist_again();
        }
        self.start_fetches(now);
        let due: Vec<RegistrationId> = self
            .lanes
            .iter()
            .filter(|(_, lane)| lane.flight.as_ref().is_some_and(|flight| flight.deadline <= now.boot))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.answer_is_late(id, now);
        }
        let apps: Vec<AppKey> = self
            .apps
            .iter()
            .filter(|(_, app)| {
                app.quiet_until.is_some_and(|at| at <= now.boot)
                    || app.lanes.iter().any(|id| self.lanes.get(id).is_some_and(|lane| lane.is_due(now.boot)))
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in apps {
            if let Some(app) = self.apps.get_mut(&key) {
                app.quiet_until.take_if(|at| *at <= now.boot);
                for id in &app.lanes {
                    if let Some(lane) = self.lanes.get_mut(id) {
                        lane.retry_at.take_if(|at| *at <= now.boot);
                    }
                }
            }
            self.settle(&key, now);
        }
    }

    /// Ends every message whose TTL has passed. Worth calling now and then; no timer is kept for it, because nobody waits
    /// for it.
    pub fn sweep(&mut self, now: Now) {
        let apps: Vec<AppKey> = self.apps.keys().cloned().collect();
        for app in apps {
            self.sweep_app(&app, now);
        }
    }

    /// When [`Delivery::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let lanes = self.lanes.values().flat_map(|lane| {
            let fetches = lane.queue.iter().filter_map(|entry| match entry.body {
                Body::Fetching { retry_at, .. } => retry_at,
                Body::Inline(_) | Body::Stored | Body::Loading => None,
            });
            lane.retry_at.into_iter().chain(lane.flight.as_ref().map(|flight| flight.deadline)).chain(fetches)
        });
        let apps = self.apps.values().filter_map(|app| app.quiet_until);
        earliest(self.store_retry_at, lanes.chain(apps).min())
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        let output = self.outputs.pop_front();
        if output.is_none() {
            self.outputs.shrink_to(16);
        }
        output
    }

    /// Whether any registration of the app has a queue.
    pub fn serves(&self, app: &AppKey) -> bool {
        self.apps.contains_key(app)
    }

    /// Messages waiting for the app.
    pub fn waiting_for(&self, app: &AppKey) -> usize {
        let lanes = self.apps.get(app).map(|app| app.lanes.as_slice()).unwrap_or_default();
        lanes.iter().map(|id| self.waiting_in(*id)).sum()
    }

    /// Messages waiting for the registration.
    pub fn waiting_in(&self, registration: RegistrationId) -> usize {
        self.lanes.get(&registration).map_or(0, |lane| lane.queue.len())
    }

    /// Messages waiting in all.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sends what can be sent, asks for the app if it is wanted, and tells whether a delivery is under way.
    fn settle(&mut self, key: &AppKey, now: Now) {
        let Some(app) = self.apps.get(key) else { return };
        let lanes = app.lanes.clone();
        if let Reach::Ready(owner) = app.reach.clone() {
            for id in &lanes {
                self.send_next(*id, &owner, now);
            }
        }
        let work = |lane: &Lane| lane.has_work(now);
        let wanted = lanes.iter().any(|id| self.lanes.get(id).is_some_and(work));
        let busy = lanes.iter().any(|id| {
            self.lanes.get(id).is_some_and(|lane| {
                lane.flight.as_ref().is_some_and(|flight| !flight.slow)
                    || lane.queue.first().is_some_and(|entry| entry.body == Body::Loading)
            })
        });
        let Some(app) = self.apps.get_mut(key) else { return };
        if app.reach == Reach::Away && wanted && app.quiet_until.is_none() {
            app.reach = Reach::Asked;
            self.outputs.push_back(Output::Wake(key.clone()));
        }
        let pending = match app.reach {
            Reach::Ready(_) => busy,
            Reach::Asked => true,
            Reach::Unknown | Reach::Away | Reach::Unstartable => false,
        };
        if pending != app.pending_told {
            app.pending_told = pending;
            self.outputs.push_back(Output::Pending(key.clone(), pending));
        }
    }

    fn settle_lane(&mut self, registration: RegistrationId, now: Now) {
        if let Some(app) = self.lanes.get(&registration).map(|lane| lane.app.clone()) {
            self.settle(&app, now);
        }
    }

    fn send_next(&mut self, registration: RegistrationId, owner: &Owner, now: Now) {
        self.end_expired_head(registration, now);
        let Some(lane) = self.lanes.get_mut(&registration) else { return };
        if lane.flight.is_some() || lane.retry_at.is_some_and(|at| at > now.boot) {
            return;
        }
        let (cargo, call) = if let Some(due) = &lane.endpoint {
            let endpoint = Arc::clone(&due.endpoint);
            (Cargo::Endpoint(Arc::clone(&endpoint)), Handover::Endpoint { token: Arc::clone(&lane.token), endpoint })
        } else {
            let Some(entry) = lane.queue.first_mut() else { return };
            match &entry.body {
                Body::Inline(body) => (
                    Cargo::Message(entry.seq),
                    Handover::Message {
                        token: Arc::clone(&lane.token),
                        id: Arc::clone(&entry.id),
                        body: Arc::clone(body),
                    },
                ),
                Body::Stored => {
                    entry.body = Body::Loading;
                    self.outputs.push_back(Output::LoadBody(entry.seq));
                    return;
                }
                Body::Loading | Body::Fetching { .. } => return,
            }
        };
        let ticket = DeliveryTicket(self.next_ticket);
        self.next_ticket += 1;
        lane.retry_at = None;
        lane.flight = Some(Flight { ticket, cargo, deadline: now.boot + ANSWER_TIME, slow: false });
        self.flights.insert(ticket, registration);
        let (app, version) = (lane.app.clone(), lane.version);
        self.outputs.push_back(Output::Call { ticket, app, owner: owner.clone(), version, call });
    }

    fn end_expired_head(&mut self, registration: RegistrationId, now: Now) {
        while let Some(lane) = self.lanes.get(&registration)
            && lane.flight.is_none()
            && let Some(entry) = lane.queue.first()
            && entry.expires <= now.wall
        {
            self.end(entry.seq, Ending::Expired);
        }
    }

    /// The app has had its time to answer, or its pause after that is over.
    fn answer_is_late(&mut self, registration: RegistrationId, now: Now) {
        let Some(lane) = self.lanes.get_mut(&registration) else { return };
        let key = lane.app.clone();
        let (Some(flight), Some(app)) = (lane.flight.as_mut(), self.apps.get_mut(&key)) else { return };
        if flight.slow {
            // Another chance: an app that is awake has it now, any other once it was woken.
            flight.slow = false;
            flight.deadline = now.boot + ANSWER_TIME;
            if app.reach == Reach::Away {
                app.quiet_until = None;
                app.reach = Reach::Asked;
                self.outputs.push_back(Output::Wake(key.clone()));
            }
        } else {
            flight.slow = true;
            let cargo = flight.cargo.clone();
            if let Some(attempts) = self.count_failure(registration, Some(&cargo), "it does not answer")
                && let Some(flight) = self.lanes.get_mut(&registration).and_then(|lane| lane.flight.as_mut())
            {
                flight.deadline = now.boot + backoff(attempts + 2);
                let reason = format!(
                    "it has not answered for {} s; its other messages wait until it does or ends",
                    ANSWER_TIME.as_secs()
                );
                self.outputs.push_back(Output::Note(key.clone(), "wait", reason));
            }
        }
        self.settle(&key, now);
    }

    /// One more failure of what is at the head of a lane; gives up at the limit. Returns the failures so far, `None`
    /// when it was given up or there was nothing.
    fn count_failure(&mut self, registration: RegistrationId, cargo: Option<&Cargo>, why: &str) -> Option<u32> {
        let limit = self.limits.attempts;
        let lane = self.lanes.get_mut(&registration)?;
        let of_endpoint = match cargo {
            Some(Cargo::Endpoint(_)) => true,
            Some(Cargo::Message(_)) => false,
            None => lane.endpoint.is_some(),
        };
        if of_endpoint {
            let due = lane.endpoint.as_mut()?;
            due.attempts += 1;
            if due.attempts < limit {
                return Some(due.attempts);
            }
            lane.endpoint = None;
            self.drop_flight(registration);
            let app = self.lanes.get(&registration)?.app.clone();
            let reason =
                format!("it did not take its new endpoint in {limit} tries ({why}); it gets it when it registers");
            self.outputs.push_back(Output::Note(app, "give-up", reason));
            return None;
        }
        let entry = match cargo {
            Some(Cargo::Message(seq)) => lane.queue.entry(*seq)?,
            Some(Cargo::Endpoint(_)) | None => lane.queue.first_mut()?,
        };
        entry.attempts += 1;
        if entry.attempts < limit {
            return Some(entry.attempts);
        }
        let seq = entry.seq;
        self.give_up(seq, &format!("the last of {limit} tries failed: {why}"));
        None
    }

    fn give_up(&mut self, seq: MessageSeq, why: &str) {
        if let Some(registration) = self.waiting.get(&seq)
            && let Some(lane) = self.lanes.get(registration)
        {
            let reason = format!("a message was given up: {why}");
            self.outputs.push_back(Output::Note(lane.app.clone(), "give-up", reason));
        }
        self.end(seq, Ending::GivenUp);
    }

    fn end(&mut self, seq: MessageSeq, ending: Ending) {
        let Some(registration) = self.waiting.remove(&seq) else { return };
        let Some(lane) = self.lanes.get_mut(&registration) else { return };
        let Some(entry) = lane.queue.remove(seq) else { return };
        let flies = lane.flight.as_ref().is_some_and(|flight| flight.cargo == Cargo::Message(seq));
        self.inline_bytes -= entry.body.inline_len();
        if !entry.persisted {
            self.unstored_bytes -= entry.body.inline_len();
        }
        if flies {
            self.drop_flight(registration);
        }
        for _ in 0..entry.unsafe_count {
            self.outputs.push_back(Output::Safe(registration, Arc::clone(&entry.id)));
        }
        self.outputs.push_back(Output::End(seq, ending));
    }

    /// Stops waiting for a call: what it carried has been given up, and a late answer no longer matters.
    fn drop_flight(&mut self, registration: RegistrationId) {
        if let Some(flight) = self.lanes.get_mut(&registration).and_then(|lane| lane.flight.take()) {
            self.flights.remove(&flight.ticket);
        }
    }

    fn sweep_app(&mut self, app: &AppKey, now: Now) {
        let lanes = self.apps.get(app).map(|app| app.lanes.clone()).unwrap_or_default();
        for id in lanes {
            let expired = self
                .lanes
                .get(&id)
                .map(|lane| lane.queue.expired(now.wall, lane.has_message_in_flight()))
                .unwrap_or_default();
            for seq in expired {
                self.end(seq, Ending::Expired);
            }
        }
        self.settle(app, now);
    }

    fn start_fetches(&mut self, now: Now) {
        for (registration, lane) in &mut self.lanes {
            for entry in lane.queue.iter_mut() {
                let Body::Fetching { url, retry_at, .. } = &mut entry.body else { continue };
                if retry_at.take_if(|at| *at <= now.boot).is_some() {
                    let ticket = FetchTicket(self.next_ticket);
                    self.next_ticket += 1;
                    self.fetches.insert(ticket, entry.seq);
                    self.outputs.push_back(Output::Fetch { ticket, registration: *registration, url: url.clone() });
                }
            }
        }
    }

    fn persist_again(&mut self) {
        for (registration, lane) in &self.lanes {
            let unstored = lane.queue.iter().filter(|entry| !entry.persisted);
            self.outputs.extend(unstored.filter_map(|entry| entry.message(*registration)).map(Output::Persist));
        }
    }

    fn entry_mut(&mut self, seq: MessageSeq) -> Option<(RegistrationId, &mut Entry)> {
        let registration = *self.waiting.get(&seq)?;
        let entry = self.lanes.get_mut(&registration)?.queue.entry(seq)?;
        Some((registration, entry))
    }
}

impl App {
    const fn new() -> Self {
        Self { lanes: Vec::new(), reach: Reach::Unknown, failures: 0, quiet_until: None, pending_told: false }
    }

    /// The app ended or would not start: a pause before it is tried again.
    fn failed(&mut self, now: Now) -> Duration {
        self.failures += 1;
        let delay = backoff(self.failures);
        self.quiet_until = Some(now.boot + delay);
        delay
    }
}

impl Lane {
    fn has_message_in_flight(&self) -> bool {
        self.flight.as_ref().is_some_and(|flight| matches!(flight.cargo, Cargo::Message(_)))
    }

    /// Whether something could be sent now if the app were ready.
    fn has_work(&self, now: Now) -> bool {
        if self.flight.is_some() || self.retry_at.is_some_and(|at| at > now.boot) {
            return false;
        }
        let sendable = |entry: &Entry| !matches!(entry.body, Body::Fetching { .. });
        self.endpoint.is_some() || self.queue.first().is_some_and(sendable)
    }

    fn is_due(&self, now: Instant) -> bool {
        self.retry_at.is_some_and(|at| at <= now)
    }
}

impl Entry {
    /// For the store; `None` while the body is not here.
    fn message(&self, registration: RegistrationId) -> Option<Message> {
        let Body::Inline(body) = &self.body else { return None };
        Some(Message {
            seq: self.seq,
            registration,
            id: Arc::clone(&self.id),
            body: Arc::clone(body),
            received: self.received,
            expires: self.expires,
            topic: self.topic.clone(),
            urgency: self.urgency,
        })
    }
}

fn unusable(body: &ArrivalBody) -> Option<String> {
    match body {
        ArrivalBody::Bytes(bytes) if bytes.is_empty() => Some("it is empty".into()),
        ArrivalBody::Bytes(bytes) if bytes.len() > MESSAGE_MAX => {
            Some(format!("it has {} bytes, {MESSAGE_MAX} are the most", bytes.len()))
        }
        ArrivalBody::Attachment { size: Some(size), .. } if *size > MESSAGE_MAX as u64 => {
            Some(format!("its attachment has {size} bytes, {MESSAGE_MAX} are the most"))
        }
        ArrivalBody::Undecodable(why) => Some(why.clone()),
        ArrivalBody::Bytes(_) | ArrivalBody::Attachment { .. } => None,
    }
}

/// 0.25 s, 1 s, 4 s, 16 s, 64 s, 256 s, then 10 min: the first retry meets an app that owned its name before it exported
/// its object, the last ones an app that crashes at every start.
fn backoff(failures: u32) -> Duration {
    const CEILING: Duration = Duration::from_secs(600);
    let millis = 250_u64.saturating_mul(4_u64.saturating_pow(failures.saturating_sub(1).min(16)));
    Duration::from_millis(millis).min(CEILING)
}

#[cfg(test)]
mod tests;
