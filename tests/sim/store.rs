//! The store as `sys::store` is: operations in order, several in one transaction, nothing of a failed one. A crash
//! keeps what was committed and nothing else.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use nightporter::{
    action::StoreOp,
    event::{Event, StoreError, StoreTicket},
    model::{
        AppKey, AppRecord, Bus, FormerRoute, History, HistoryRow, Message, MessageSeq, Preference, Registration,
        RegistrationId, Snapshot, StoredMessage,
    },
    transfer::{Transfer, TransferId},
};

use crate::clock::{At, MS, Rng, SEC};

const SEEN: usize = 1000;
const SEEN_SLACK: usize = 64;
const LAZY: At = 2 * SEC;

#[derive(Default)]
pub(crate) struct Store {
    pub(crate) registrations: BTreeMap<u64, Registration>,
    rows: BTreeMap<u64, Row>,
    by_id: BTreeMap<(u64, Arc<str>), u64>,
    upstreams: BTreeMap<(Arc<str>, Arc<str>), Arc<str>>,
    apps: BTreeMap<AppKey, AppRecord>,
    former: BTreeMap<(RegistrationId, Arc<str>), FormerRoute>,
    preferences: BTreeMap<(Bus, Option<Arc<str>>), Preference>,
    states: BTreeMap<AppKey, Arc<[u8]>>,
    pub(crate) transfers: BTreeMap<TransferId, Transfer>,
    next_transfer: u64,
    history: Vec<HistoryRow>,
    next_registration: u64,
    next_message: u64,
    next_ended: u64,
    queue: VecDeque<(StoreOp, Option<StoreTicket>)>,
    /// When what is queued will be written.
    due: Option<At>,
    pub(crate) full: bool,
}

struct Row {
    message: Message,
    ended: Option<u64>,
}

impl Store {
    pub(crate) fn new() -> Self {
        Self { next_registration: 1, next_message: 1, next_ended: 1, ..Self::default() }
    }

    /// Queues `op`. Gives the time of a commit that is to be arranged.
    pub(crate) fn apply(&mut self, op: StoreOp, ticket: Option<StoreTicket>, now: At, rng: &mut Rng) -> Option<At> {
        let slow = if rng.chance(300) { rng.between(100, 3000) } else { rng.between(1, 40) };
        let at = if op.is_lazy() { now + LAZY } else { now + slow * MS };
        self.queue.push_back((op, ticket));
        if self.due.is_some_and(|due| due <= at) {
            return None;
        }
        self.due = Some(at);
        self.due
    }

    /// Commits if it is time. Gives what the core is to be told, in order, and what was written.
    pub(crate) fn commit(&mut self, now: At, rng: &mut Rng) -> (Vec<Event>, Vec<StoreOp>) {
        if self.due.is_none_or(|due| due > now) {
            return (Vec::new(), Vec::new());
        }
        self.flush(rng)
    }

    pub(crate) fn flush(&mut self, rng: &mut Rng) -> (Vec<Event>, Vec<StoreOp>) {
        self.due = None;
        let (mut events, mut written) = (Vec::new(), Vec::new());
        let mut helping = true;
        for (op, ticket) in std::mem::take(&mut self.queue) {
            let gives_space = matches!(
                op,
                StoreOp::EndMessage(..)
                    | StoreOp::DeleteRegistration(_)
                    | StoreOp::DeleteApp(_)
                    | StoreOp::DeleteTransfer(_)
            );
            if let StoreOp::LoadBody(seq) = op {
                events.push(Event::Body(seq, self.body(seq)));
            }
            let since = if let StoreOp::LoadHistory(since) = &op { Some(*since) } else { None };
            let loaded = if let StoreOp::LoadState(app) = &op { Some(app.clone()) } else { None };
            let stored = !self.full || (gives_space && helping && rng.chance(7000));
            if stored {
                self.write(&op);
                written.push(op);
            } else {
                helping &= !gives_space;
            }
            if let (Some(app), Some(ticket)) = (loaded, ticket) {
                events.push(Event::State(ticket, Ok(self.states.get(&app).cloned().unwrap_or_default())));
            } else if let (Some(since), Some(ticket)) = (since, ticket) {
                let rows = self.history.iter().filter(|row| row.at >= since).cloned().collect();
                let failed = self.full && rng.chance(3000);
                events.push(Event::History(ticket, if failed { Err(StoreError::Full) } else { Ok(rows) }));
            } else if let Some(ticket) = ticket {
                events.push(Event::Stored(ticket, if stored { Ok(()) } else { Err(StoreError::Full) }));
            }
        }
        (events, written)
    }

    /// The daemon is gone with all it had not written.
    pub(crate) fn crash(&mut self) {
        self.queue.clear();
        self.due = None;
    }

    pub(crate) fn has(&self, registration: RegistrationId, id: &str) -> bool {
        self.by_id.contains_key(&(registration.0, id.into()))
    }

    /// Messages that have not ended, in order of arrival.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &Message> {
        self.rows.values().filter(|row| row.ended.is_none()).map(|row| &row.message)
    }

    pub(crate) fn snapshot(&mut self) -> Snapshot {
        self.rows.retain(|_, row| self.registrations.contains_key(&row.message.registration.0));
        self.by_id.retain(|(registration, _), _| self.registrations.contains_key(registration));
        let registered = |app: &AppKey| self.registrations.values().any(|registration| registration.app == *app);
        let gone: Vec<TransferId> =
            self.transfers.values().filter(|transfer| !registered(&transfer.app)).map(|transfer| transfer.id).collect();
        let orphans: Vec<AppKey> = self.states.keys().filter(|app| !registered(app)).cloned().collect();
        orphans.iter().for_each(|app| drop(self.states.remove(app)));
        gone.iter().for_each(|id| drop(self.transfers.remove(id)));
        let mut ended: Vec<&Row> = self.rows.values().filter(|row| row.ended.is_some()).collect();
        ended.sort_by_key(|row| row.ended);
        let mut count: BTreeMap<RegistrationId, usize> = BTreeMap::new();
        let mut seen: Vec<(RegistrationId, Arc<str>)> = Vec::new();
        for row in ended.into_iter().rev() {
            let count = count.entry(row.message.registration).or_default();
            *count += 1;
            if *count <= SEEN {
                seen.push((row.message.registration, Arc::clone(&row.message.id)));
            }
        }
        seen.reverse();
        Snapshot {
            registrations: self.registrations.values().cloned().collect(),
            messages: self.waiting().map(stored).collect(),
            seen,
            upstreams: self.upstreams.iter().map(|((u, k), v)| (u.clone(), k.clone(), v.clone())).collect(),
            apps: self.apps.values().cloned().collect(),
            former: self.former.values().cloned().collect(),
            preferences: self.preferences.values().cloned().collect(),
            states: self.states.iter().map(|(app, state)| (app.clone(), state.len() as u32)).collect(),
            transfers: self.transfers.values().cloned().collect(),
            next_transfer: self.next_transfer,
            next_registration: self.next_registration,
            next_message: self.next_message,
            damaged: None,
        }
    }

    pub(crate) fn former(&self) -> impl Iterator<Item = &FormerRoute> {
        self.former.values()
    }

    /// The upstream the user wants for the app, by what is durable.
    pub(crate) fn preferred(&self, app: &AppKey) -> Option<&Arc<str>> {
        let own = self.preferences.get(&(app.bus, Some(Arc::clone(&app.service))));
        own.or_else(|| self.preferences.get(&(app.bus, None))).map(|preference| &preference.upstream)
    }

    fn body(&self, seq: MessageSeq) -> Option<Arc<[u8]>> {
        self.rows.get(&seq.0).filter(|row| row.ended.is_none()).map(|row| Arc::clone(&row.message.body))
    }

    fn write(&mut self, op: &StoreOp) {
        match op {
            StoreOp::PutRegistration(registration) => {
                self.next_registration = self.next_registration.max(registration.id.0 + 1);
                self.registrations.insert(registration.id.0, registration.clone());
            }
            StoreOp::DeleteRegistration(id) => {
                self.registrations.remove(&id.0);
                self.former.retain(|(registration, _), _| registration != id);
                self.rows.retain(|_, row| row.message.registration != *id);
                self.by_id.retain(|(registration, _), _| *registration != id.0);
            }
            StoreOp::PutMessage(message) => self.put_message(message),
            StoreOp::EndMessage(seq, _) => {
                if let Some(row) = self.rows.get_mut(&seq.0).filter(|row| row.ended.is_none()) {
                    row.ended = Some(self.next_ended);
                    self.next_ended += 1;
                    let registration = row.message.registration;
                    self.prune(registration);
                }
            }
            StoreOp::LoadBody(_) | StoreOp::LoadState(_) | StoreOp::LoadHistory(_) => {}
            StoreOp::PutHistory(rows) => {
                self.history.extend(rows.iter().cloned());
                self.history.sort_by_key(|row| row.at);
            }
            StoreOp::PutState(app, state) if state.is_empty() => {
                self.states.remove(app);
            }
            StoreOp::PutState(app, state) => {
                self.states.insert(app.clone(), Arc::clone(state));
            }
            StoreOp::PutUpstream { upstream, key, value } if value.is_empty() => {
                self.upstreams.remove(&(upstream.clone(), key.clone()));
            }
            StoreOp::PutUpstream { upstream, key, value } => {
                self.upstreams.insert((upstream.clone(), key.clone()), value.clone());
            }
            StoreOp::PutFormer(route) => {
                self.former.insert((route.registration, route.upstream.clone()), route.clone());
            }
            StoreOp::DeleteFormer(registration, upstream) => {
                self.former.remove(&(*registration, upstream.clone()));
            }
            StoreOp::PutPreference(preference) => {
                self.preferences.insert((preference.bus, preference.service.clone()), preference.clone());
            }
            StoreOp::DeletePreference(bus, service) => {
                self.preferences.remove(&(*bus, service.clone()));
            }
            StoreOp::PutApp(record) => {
                self.apps.insert(record.app.clone(), record.clone());
            }
            StoreOp::PutTransfer(transfer) | StoreOp::NoteTransfer(transfer) => {
                self.next_transfer = self.next_transfer.max(transfer.id.0 + 1);
                self.transfers.insert(transfer.id, (**transfer).clone());
            }
            StoreOp::DeleteTransfer(id) => {
                self.transfers.remove(id);
            }
            StoreOp::DeleteApp(app) => {
                self.transfers.retain(|_, transfer| transfer.app != *app);
                self.history.retain(|row| match &row.what {
                    History::Total { .. } => true,
                    History::App { app: of, .. } | History::Wake { app: of, .. } | History::Would { app: of, .. } => {
                        of != app
                    }
                });
                self.apps.remove(app);
                self.states.remove(app);
            }
        }
    }

    /// As the SQL of `sys::store` says: the same message again changes nothing, one that ended may come again.
    fn put_message(&mut self, message: &Message) {
        self.next_message = self.next_message.max(message.seq.0 + 1);
        let key = (message.registration.0, Arc::clone(&message.id));
        if let Some(old) = self.by_id.get(&key).copied() {
            let again = old < message.seq.0 && self.rows.get(&old).is_some_and(|row| row.ended.is_some());
            if !again {
                return;
            }
            self.rows.remove(&old);
        }
        self.by_id.insert(key, message.seq.0);
        self.rows.insert(message.seq.0, Row { message: message.clone(), ended: None });
    }

    fn prune(&mut self, registration: RegistrationId) {
        let mut ended: Vec<(u64, u64, Arc<str>)> = self
            .rows
            .iter()
            .filter(|(_, row)| row.message.registration == registration)
            .filter_map(|(seq, row)| Some((row.ended?, *seq, Arc::clone(&row.message.id))))
            .collect();
        if ended.len() > SEEN + SEEN_SLACK {
            ended.sort_unstable();
            for (_, seq, id) in ended.iter().take(ended.len() - SEEN) {
                self.rows.remove(seq);
                self.by_id.remove(&(registration.0, Arc::clone(id)));
            }
        }
    }
}

fn stored(message: &Message) -> StoredMessage {
    StoredMessage {
        seq: message.seq,
        registration: message.registration,
        id: Arc::clone(&message.id),
        size: u32::try_from(message.body.len()).unwrap_or(u32::MAX),
        received: message.received,
        expires: message.expires,
        topic: message.topic.clone(),
        urgency: message.urgency,
    }
}
