//! What must hold, kept apart from how the core does it: what senders were promised, what became of it, who may be
//! touched. A breach is a panic with what was breached.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use nightporter::{
    action::StoreOp,
    model::{AppKey, Ending, FormerRoute, Registration, RegistrationId, Urgency},
};

use crate::{
    clock::{At, SEC, START, now as both},
    store::Store,
};

pub(crate) type MessageNumber = usize;

#[derive(Default)]
pub(crate) struct Reference {
    /// Every message a server took, by number.
    pub(crate) sent: Vec<Sent>,
    by_id: BTreeMap<Arc<str>, MessageNumber>,
    /// Registrations as the running daemon has them.
    alive: BTreeMap<RegistrationId, Registration>,
    by_channel: BTreeMap<Arc<str>, RegistrationId>,
    /// Channels left behind by moves, still listened to.
    former: BTreeMap<(RegistrationId, Arc<str>), Arc<str>>,
    /// What the core's own numbers stand for.
    seqs: BTreeMap<u64, (RegistrationId, Arc<str>)>,
    /// Registrations that may go: the app or the server said so.
    pub(crate) may_go: BTreeSet<(AppKey, Arc<str>)>,
    /// Channels the server would not make again.
    pub(crate) refused: BTreeSet<Arc<str>>,
    arrivals: BTreeMap<(u32, MessageNumber), u64>,
    last_in_order: BTreeMap<(u32, Arc<str>), u64>,
    arrived: u64,
    /// Called safe, for a reason that has yet to be given.
    owed: Vec<(MessageNumber, &'static str)>,
    /// Attempts that failed, for the right to give up.
    failures: BTreeMap<AppKey, u32>,
}

/// A message a server took.
pub(crate) struct Sent {
    pub(crate) app: AppKey,
    pub(crate) token: Arc<str>,
    pub(crate) channel: Arc<str>,
    pub(crate) id: Arc<str>,
    pub(crate) body: Arc<[u8]>,
    pub(crate) at: At,
    /// By the sender's TTL.
    pub(crate) expires: Option<At>,
    pub(crate) topic: Option<&'static str>,
    /// Where its protocol carried one.
    pub(crate) urgency: Option<Urgency>,
    /// Empty or too large.
    pub(crate) unusable: bool,
    /// The server itself threw it away before it was safe here.
    pub(crate) server_dropped: bool,
    /// Its app took it.
    pub(crate) accepted: bool,
    pub(crate) ended: Option<Ending>,
    pub(crate) processed: Option<Processed>,
    pub(crate) times: u32,
}

impl Sent {
    pub(crate) fn describe(&self) -> String {
        let secs = (self.at - START) as f64 / SEC as f64;
        format!("{} of {secs:.3} for {} {}", self.id, self.app, self.token)
    }
}

/// One time a message was processed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Processed {
    /// Which daemon sent it.
    pub(crate) life: u32,
    /// Which run of the app.
    pub(crate) instance: u64,
    /// How often the bus had gone by then.
    pub(crate) bus: u32,
    /// The app took it and answered with an error all the same.
    pub(crate) error: bool,
}

/// What the run is allowed.
#[derive(Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) most_waiting: usize,
    pub(crate) attempts: u32,
}

impl Reference {
    /// A server took the message.
    pub(crate) fn accept(&mut self, sent: Sent) {
        self.by_id.insert(Arc::clone(&sent.id), self.sent.len());
        self.sent.push(sent);
    }

    pub(crate) fn next_number(&self) -> MessageNumber {
        self.sent.len()
    }

    /// A daemon starts with what is in the store.
    pub(crate) fn begin(&mut self, life: u32, store: &Store) {
        self.alive.clear();
        self.by_channel.clear();
        self.former.clear();
        self.seqs.clear();
        self.failures.clear();
        for registration in store.registrations.values() {
            self.know(registration);
        }
        for route in store.former() {
            self.know_former(route);
        }
        let waiting: Vec<_> = store.waiting().map(|m| (m.seq.0, m.registration, Arc::clone(&m.id))).collect();
        for (seq, registration, id) in waiting {
            if let Some(number) = self.by_id.get(&id) {
                self.arrivals.insert((life, *number), self.arrived);
                self.arrived += 1;
            }
            self.seqs.insert(seq, (registration, id));
        }
    }

    fn know_former(&mut self, route: &FormerRoute) {
        self.by_channel.insert(Arc::clone(&route.channel), route.registration);
        self.former.insert((route.registration, Arc::clone(&route.upstream)), Arc::clone(&route.channel));
    }

    fn know(&mut self, registration: &Registration) {
        if !registration.channel.is_empty() {
            self.by_channel.insert(Arc::clone(&registration.channel), registration.id);
        }
        self.alive.insert(registration.id, registration.clone());
    }

    /// The message reached the daemon.
    pub(crate) fn arrive(&mut self, life: u32, number: MessageNumber) -> bool {
        let first = !self.arrivals.contains_key(&(life, number));
        if first {
            self.arrivals.insert((life, number), self.arrived);
            self.arrived += 1;
        }
        first
    }

    /// The daemon gives an order to its store.
    pub(crate) fn ordered(&mut self, op: &StoreOp, now: At, rules: Rules, store: &Store) {
        match op {
            StoreOp::PutRegistration(registration) => self.know(registration),
            StoreOp::DeleteRegistration(id) => {
                if let Some(gone) = self.alive.remove(id) {
                    // Should the deletion be lost and the registration come back, these stay gone.
                    let of_it = |sent: &&mut Sent| self.by_channel.get(&sent.channel) == Some(id);
                    for sent in self.sent.iter_mut().filter(of_it) {
                        sent.ended.get_or_insert(Ending::Unregistered);
                    }
                    self.by_channel.retain(|_, registration| registration != id);
                    let asked = self.may_go.contains(&(gone.app.clone(), Arc::clone(&gone.token)));
                    let never_was = !store.registrations.contains_key(&id.0);
                    let another = self.alive.values().any(|r| r.app == gone.app && r.token == gone.token);
                    assert!(
                        asked || never_was || another || self.refused.contains(&gone.channel),
                        "registration {} ({}, {}) was removed, and nobody asked for it",
                        id.0,
                        gone.app,
                        gone.token
                    );
                }
            }
            StoreOp::PutMessage(message) => {
                let number = self.number(&message.id);
                assert_eq!(self.sent[number].body, message.body, "message {} was changed", message.id);
                self.seqs.insert(message.seq.0, (message.registration, Arc::clone(&message.id)));
            }
            StoreOp::EndMessage(seq, ending) => self.ended(seq.0, *ending, now, rules),
            StoreOp::PutFormer(route) => self.know_former(route),
            StoreOp::DeleteFormer(id, upstream) => {
                if let Some(channel) = self.former.remove(&(*id, Arc::clone(upstream))) {
                    self.by_channel.remove(&channel);
                }
            }
            StoreOp::LoadBody(_)
            | StoreOp::PutUpstream { .. }
            | StoreOp::PutPreference(_)
            | StoreOp::DeletePreference(..)
            | StoreOp::PutApp(_)
            | StoreOp::DeleteApp(_)
            | StoreOp::PutState(..)
            | StoreOp::PutTransfer(_)
            | StoreOp::NoteTransfer(_)
            | StoreOp::DeleteTransfer(_)
            | StoreOp::LoadState(_)
            | StoreOp::PutHistory(_)
            | StoreOp::LoadHistory(_) => {}
        }
    }

    fn ended(&mut self, seq: u64, ending: Ending, now: At, rules: Rules) {
        let Some((_, id)) = self.seqs.get(&seq) else { panic!("message {seq} ended and never was") };
        let number = self.number(&id.clone());
        let sent = &self.sent[number];
        match ending {
            Ending::Accepted => assert!(sent.accepted, "{} is said to be accepted and was not", sent.id),
            Ending::Expired => {
                let due = sent.expires.expect("only what has a TTL expires in a run");
                assert!(both(now).wall >= both(due).wall, "{} expired before its time", sent.id);
            }
            Ending::Replaced => assert!(self.is_replaced(number), "{} was replaced by nothing", sent.id),
            Ending::GivenUp => {
                let failures = self.failures.get(&sent.app).copied().unwrap_or_default();
                assert!(failures >= rules.attempts, "{} was given up after {failures} failures", sent.id);
            }
            Ending::Overflowed => {
                let waiting = self.waiting_for(&sent.app);
                assert!(waiting >= rules.most_waiting, "{} was dropped with only {waiting} waiting", sent.id);
            }
            Ending::Unregistered => panic!("{} ended as unregistered, which is not stored", sent.id),
        }
        self.sent[number].ended = Some(ending);
        self.seqs.remove(&seq);
    }

    /// A newer message of its topic was taken.
    fn is_replaced(&self, number: MessageNumber) -> bool {
        let old = &self.sent[number];
        old.topic.is_some()
            && self.sent[number + 1..].iter().any(|new| new.channel == old.channel && new.topic == old.topic)
    }

    /// An attempt to reach the app failed.
    pub(crate) fn failed(&mut self, app: &AppKey) {
        *self.failures.entry(app.clone()).or_default() += 1;
    }

    /// Invariant 1: whether an upstream may be told that it can forget the message.
    pub(crate) fn check_safe(&mut self, number: MessageNumber, what: &'static str, store: &Store) {
        let sent = &self.sent[number];
        let Some(registration) = self.by_channel.get(&sent.channel) else { return };
        let safe = sent.accepted || sent.ended.is_some() || sent.unusable || store.has(*registration, &sent.id);
        if !safe {
            // A rule may have ended it this very moment; the word for that comes with the same actions.
            self.owed.push((number, what));
        }
    }

    /// The core has said all it had to say for now: what it called safe must have been.
    pub(crate) fn check_owed(&mut self) {
        for (number, what) in std::mem::take(&mut self.owed) {
            let sent = &self.sent[number];
            let safe = sent.ended.is_some() || !self.is_alive(&sent.channel);
            assert!(safe, "{what}: message {} of {} is neither stored nor accepted", sent.id, sent.app);
        }
    }

    /// It never came to say it: what it called safe is gone, and must be what a rule allows.
    pub(crate) fn cancel_owed(&mut self, rules: Rules) {
        for (number, what) in std::mem::take(&mut self.owed) {
            let sent = &self.sent[number];
            let expired = sent.expires.is_some();
            let overflowed = self.waiting_for(&sent.app) >= rules.most_waiting;
            if sent.ended.is_some() {
                continue;
            }
            let allowed = overflowed || expired || self.is_replaced(number) || !self.is_alive(&sent.channel);
            assert!(allowed, "{what}: message {} of {} is neither stored nor accepted", sent.id, sent.app);
            self.sent[number].ended = Some(if overflowed { Ending::Overflowed } else { Ending::Replaced });
        }
    }

    fn waiting_for(&self, app: &AppKey) -> usize {
        let of_app = |id: &RegistrationId| self.alive.get(id).is_some_and(|r| r.app == *app);
        self.seqs.values().filter(|(registration, _)| of_app(registration)).count()
    }

    /// What waits for the app here.
    pub(crate) fn waiting_of<'a>(&'a self, app: &'a AppKey) -> impl Iterator<Item = &'a Sent> {
        let of_app = |id: &RegistrationId| self.alive.get(id).is_some_and(|r| r.app == *app);
        let waiting = self.seqs.values().filter(move |(registration, _)| of_app(registration));
        waiting.map(|(_, id)| &self.sent[self.number(id)])
    }

    /// Whether the store says that an app has not taken an endpoint.
    pub(crate) fn endpoint_is_owed(&self, app: &AppKey) -> bool {
        self.alive.values().any(|r| r.app == *app && !r.told)
    }

    pub(crate) fn app_of(&self, id: RegistrationId) -> Option<&AppKey> {
        self.alive.get(&id).map(|registration| &registration.app)
    }

    pub(crate) fn app_of_message(&self, seq: u64) -> Option<&AppKey> {
        self.seqs.get(&seq).and_then(|(registration, _)| self.app_of(*registration))
    }

    /// The server has thrown the message away.
    pub(crate) fn dropped_by_server(&mut self, number: MessageNumber, store: &Store) {
        let Some(sent) = self.sent.get_mut(number) else { return };
        let here = self.by_channel.get(&sent.channel).is_some_and(|registration| store.has(*registration, &sent.id));
        sent.server_dropped |= !here;
    }

    pub(crate) fn is_alive(&self, channel: &str) -> bool {
        self.by_channel.contains_key(channel)
    }

    pub(crate) fn number(&self, id: &str) -> MessageNumber {
        *self.by_id.get(id).unwrap_or_else(|| panic!("there is no message {id}"))
    }

    /// An app processes a message. True when it is not the first time.
    pub(crate) fn process(&mut self, app: &AppKey, token: &str, id: &str, body: &[u8], by: Processed) -> bool {
        let number = self.number(id);
        let sent = &mut self.sent[number];
        assert_eq!((&sent.app, &*sent.token), (app, token), "{id} went to the wrong app");
        assert_eq!(&*sent.body, body, "{id} was changed");
        assert!(!sent.unusable, "{id} is nothing an app takes");
        if let Some(before) = sent.processed {
            let excused = before.error || (before.life, before.instance, before.bus) != (by.life, by.instance, by.bus);
            assert!(excused, "{app} got {id} twice without a reason: {before:?}");
        }
        let again = sent.processed.replace(by).is_some();
        sent.times += 1;
        sent.accepted |= !by.error;
        let channel = Arc::clone(&sent.channel);
        let Some(place) = self.arrivals.get(&(by.life, number)).copied() else {
            panic!("{id} was delivered by a daemon that never had it")
        };
        let last = self.last_in_order.entry((by.life, channel)).or_default();
        assert!(*last <= place, "{app} got {id} after a later message");
        *last = place;
        again
    }

    /// Messages that nothing has become of and something should have.
    pub(crate) fn missing(&self, now: At) -> Vec<&Sent> {
        let lost = |(number, sent): &(usize, &Sent)| {
            !(sent.accepted
                || sent.ended.is_some_and(|ending| ending != Ending::Accepted)
                || sent.unusable
                || sent.server_dropped
                || sent.expires.is_some_and(|at| at <= now)
                || !self.is_alive(&sent.channel)
                || self.is_replaced(*number))
        };
        self.sent.iter().enumerate().filter(lost).map(|(_, sent)| sent).collect()
    }

    /// Live registrations.
    pub(crate) fn registrations(&self) -> impl Iterator<Item = &Registration> {
        self.alive.values()
    }
}
