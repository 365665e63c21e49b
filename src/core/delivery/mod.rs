//! Delivery: who has what waiting, whom to wake for it, and what to do when an app does not take it.
//!
//! Each registration is a lane of its own: one call at a time, so that its messages stay in order whatever fails, and so
//! that no other lane waits for it. An unanswered call is never repeated to the instance that has it (it would see the
//! message twice); only when that instance is gone is the message sent again.
//!
//! The module decides when an app is *wanted*; whether it must be thawed or started first is for others to know. They
//! say [`Delivery::ready`] when it can be called.
//!
//! A message of too little urgency for the moment does not make its app wanted. It is held: accepted, persisted and
//! acknowledged like any other, and handed over with whatever else waits when the app can be called for another reason.

mod arrivals;
mod attempts;
mod budget;
mod helping;
mod holding;
mod queue;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

pub use self::{
    budget::BATCH,
    helping::Helped,
    holding::{Release, Why},
};
use self::{
    budget::Budget,
    holding::Held,
    queue::{Body, Entry, Queue},
};
use crate::{
    config::{Limits, Settings, UrgencySettings},
    event::{DeliveryTicket, FetchTicket},
    model::{
        AppKey, ConnectorVersion, Ending, Message, MessageSeq, Owner, Registration, RegistrationId, StoredMessage,
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
    urgency: UrgencySettings,
    /// What single apps may be woken for, by name, instead of `minimum`.
    own_minimums: BTreeMap<Arc<str>, Urgency>,
    /// Apps that have a payload helper, by name.
    helped: BTreeSet<Arc<str>>,
    /// What an app may be woken for now.
    minimum: Urgency,
    /// Whether attachments may be downloaded now.
    fetching: bool,
    lanes: BTreeMap<RegistrationId, Lane>,
    apps: BTreeMap<AppKey, App>,
    flights: BTreeMap<DeliveryTicket, RegistrationId>,
    /// The daemon is about to exit: nobody is called any more.
    ending: bool,
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
    /// The urgency is what the app's messages count as, because the upstream's protocol says none.
    pub by_policy: bool,
    /// What its app is doing, for [`Output::Reached`].
    pub from: &'static str,
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
    /// The message's life ended.
    End(AppKey, MessageSeq, Ending),
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
    /// The app has something of this urgency waiting and is not known to be ready; said again when something more urgent
    /// comes. Answer with [`Delivery::ready`],
    /// [`Delivery::start_failed`] or, when its owner changes, [`Delivery::appeared`] or [`Delivery::vanished`].
    Wake(AppKey, Urgency),
    /// The app's payload helper is to see the message; answer with [`Delivery::helped`].
    Help {
        /// Which message.
        seq: MessageSeq,
        /// For which app.
        app: AppKey,
        /// The app's name for the registration.
        token: Arc<str>,
        /// The upstream's id.
        id: Arc<str>,
        /// RFC 8030 §5.3.
        urgency: Urgency,
        /// Exactly as received.
        body: Arc<[u8]>,
    },
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
        /// Of the message, if it is one.
        urgency: Option<Urgency>,
    },
    /// The app was told of this endpoint, which may not be the latest.
    EndpointTold(RegistrationId, Arc<str>),
    /// The app took something: a message of this urgency, or an endpoint.
    Delivered(AppKey, Option<Urgency>),
    /// The app took a message that came in this life.
    Reached {
        /// Whose.
        app: AppKey,
        /// [`Arrival::from`].
        from: &'static str,
        /// Since it came, or since it was let go of where it was held.
        took: Duration,
        /// Of the message.
        urgency: Urgency,
    },
    /// Whether a delivery to the app is under way or asked for, which vetoes freezing and killing it.
    Pending(AppKey, bool),
    /// A message is held, the first since there were none: for the app's `why`.
    Held {
        /// Whose.
        app: AppKey,
        /// Of the message.
        urgency: Urgency,
        /// As in [`Arrival::by_policy`].
        by_policy: bool,
        /// What for.
        why: Why,
    },
    /// What was held goes to the app now, or as soon as it is ready: for the app's `why`.
    Released {
        /// Whose.
        app: AppKey,
        /// How many messages.
        count: usize,
        /// Why.
        why: Release,
    },
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
    /// Set while nothing but urgency, or its budget, keeps it from being woken.
    held: Option<Held>,
    /// The urgency [`Output::Wake`] was said with, while it is [`Reach::Asked`].
    asked: Urgency,
    /// Its urgent messages show nothing to the user: they count as normal.
    demoted: bool,
    /// Wake-ups for messages up to normal urgency, and for urgent ones.
    normal: Budget,
    urgent: Budget,
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
    /// Empty queues. `next_seq` is the first message number never used before. Nothing is held before
    /// [`Delivery::set_minimum`].
    pub fn new(settings: &Settings, next_seq: u64) -> Self {
        let own = settings.apps.iter().filter_map(|app| Some((Arc::clone(&app.name), app.min_urgency?)));
        let helped = settings.apps.iter().filter(|app| app.payload_helper.is_some());
        Self {
            limits: settings.limits,
            urgency: settings.urgency,
            own_minimums: own.collect(),
            helped: helped.map(|app| Arc::clone(&app.name)).collect(),
            minimum: Urgency::VeryLow,
            fetching: true,
            lanes: BTreeMap::new(),
            apps: BTreeMap::new(),
            flights: BTreeMap::new(),
            ending: false,
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
    pub fn restore(&mut self, stored: StoredMessage, now: Now) {
        let most = self.urgency.hold_at_most;
        // The wall clock may have jumped meanwhile.
        let held_until = now.boot + (stored.received + most).since(now.wall).min(most);
        // A crash may have taken back the word that some had ended: then they are too many.
        if let Some(app) = self.lanes.get(&stored.registration).map(|lane| lane.app.clone()) {
            self.make_room(&app, now);
        }
        if let Some(lane) = self.lanes.get_mut(&stored.registration) {
            self.waiting.insert(stored.seq, stored.registration);
            lane.queue.restore(stored, held_until);
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
            self.outputs.push_back(Output::End(lane.app.clone(), entry.seq, Ending::Unregistered));
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

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        if self.store_retry_at.is_some_and(|at| at <= now.boot) {
            self.store_retry_at = Some(now.boot + STORE_RETRY);
            self.persist_again();
        }
        self.start_fetches(now);
        let due: Vec<RegistrationId> = self
            .apps
            .values()
            .flat_map(|app| app.lanes.iter().map(move |id| (app, id)))
            .filter(|(app, id)| {
                let lane = self.lanes.get(id);
                lane.and_then(|lane| self.flight_due(app, lane)).is_some_and(|at| at <= now.boot)
            })
            .map(|(_, id)| *id)
            .collect();
        for id in due {
            self.answer_is_late(id, now);
        }
        let held_too_long = self.held_too_long(now.boot);
        for key in held_too_long {
            self.settle(&key, now);
        }
        let apps: Vec<AppKey> = self
            .apps
            .iter()
            .filter(|(_, app)| {
                app.quiet_until.is_some_and(|at| at <= now.boot)
                    || app.budget_opens().is_some_and(|at| at <= now.boot)
                    || app.lanes.iter().any(|id| self.lanes.get(id).is_some_and(|lane| lane.is_due(now.boot)))
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in apps {
            if let Some(app) = self.apps.get_mut(&key) {
                app.quiet_until.take_if(|at| *at <= now.boot);
                app.normal.reopen(now.boot);
                app.urgent.reopen(now.boot);
                for id in &app.lanes {
                    if let Some(lane) = self.lanes.get_mut(id) {
                        lane.retry_at.take_if(|at| *at <= now.boot);
                    }
                }
            }
            self.settle(&key, now);
        }
    }

    /// The daemon is about to exit: nobody is called any more.
    pub const fn shutdown(&mut self) {
        self.ending = true;
    }

    /// Whether no app still owes an answer.
    pub fn is_quiet(&self) -> bool {
        self.flights.is_empty()
    }

    /// When [`Delivery::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let lanes = self.lanes.values().flat_map(|lane| {
            let fetches = lane.queue.iter().filter_map(|entry| match entry.body {
                Body::Fetching { retry_at, .. } if self.fetching => retry_at,
                Body::Fetching { retry_at, .. } => retry_at.map(|at| at.max(entry.held_until)),
                Body::Inline(_) | Body::Stored | Body::Loading => None,
            });
            let flight = self.apps.get(&lane.app).and_then(|app| self.flight_due(app, lane));
            lane.retry_at.into_iter().chain(flight).chain(fetches)
        });
        let apps = self.apps.values().flat_map(|app| app.quiet_until.into_iter().chain(app.budget_opens()));
        earliest(earliest(self.store_retry_at, self.holds_end()), lanes.chain(apps).min())
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
        let app = lane.app.clone();
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
        self.outputs.push_back(Output::End(app, seq, ending));
    }

    fn entry_mut(&mut self, seq: MessageSeq) -> Option<(RegistrationId, &mut Entry)> {
        let registration = *self.waiting.get(&seq)?;
        let entry = self.lanes.get_mut(&registration)?.queue.entry(seq)?;
        Some((registration, entry))
    }
}

impl App {
    fn new() -> Self {
        Self {
            asked: Urgency::VeryLow,
            demoted: false,
            normal: Budget::default(),
            urgent: Budget::default(),
            lanes: Vec::new(),
            reach: Reach::Unknown,
            failures: 0,
            quiet_until: None,
            pending_told: false,
            held: None,
        }
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

/// 0.25 s, 1 s, 4 s, 16 s, 64 s, 256 s, then 10 min: the first retry meets an app that owned its name before it exported
/// its object, the last ones an app that crashes at every start.
fn backoff(failures: u32) -> Duration {
    const CEILING: Duration = Duration::from_secs(600);
    let millis = 250_u64.saturating_mul(4_u64.saturating_pow(failures.saturating_sub(1).min(16)));
    Duration::from_millis(millis).min(CEILING)
}

#[cfg(test)]
mod budget_tests;
#[cfg(test)]
mod holding_tests;
#[cfg(test)]
mod tests;
