//! Transfers on apps' behalf: which of them run, which wait and what for, how they end, and what of them is kept.
//!
//! A transfer that was taken over ends once: done, failed, or taken away by the user. That is durable before its app is
//! told (`telling`), and it is kept until the app has heard of it and, of a download, has fetched the file. Of what is in the
//! spool the core knows the sizes alone.

mod telling;

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use self::telling::App;
use crate::{
    config::TransferSettings,
    event::{CallId, TransferTicket},
    model::{AppKey, Owner},
    time::{Instant, Now, UnixTime, earliest},
    transfer::{
        ANSWER_MAX, Attempt, Attempted, Direction, End, How, Metered, Progress, SMALL, Transfer, TransferEvent,
        TransferId, TransferOrder, Wish,
    },
};

/// Transfers of one app, and of all; beyond it the newest is refused.
pub const PER_APP: usize = 32;
const IN_ALL: usize = 512;
/// What is not done by then never will be.
const GIVE_UP: Duration = Duration::from_secs(7 * 24 * 3600);
/// After that a download that can go on where it was gives way to another app's transfer.
const TURN: Duration = Duration::from_secs(10 * 60);
/// Between two tries, first and at most; doubled each time that nothing came of it.
const RETRY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(3600));
/// The longest a server can have us wait.
const RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Until the disk may have room again, or can be written again.
const DISK_RETRY: Duration = Duration::from_secs(600);
const STORE_RETRY: Duration = Duration::from_secs(30);
/// A machine that was about to sleep and is awake after that has changed its mind, whoever forgot to say so.
const FALLING: Duration = Duration::from_secs(60);
/// Services that tell of power and network are asked at the start, and are left a second to settle.
const UNKNOWN: Duration = Duration::from_secs(4);

/// What power and network allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conditions {
    /// There is a network that may be used.
    pub network: bool,
    /// Each byte is paid for.
    pub metered: bool,
    /// The battery is low.
    pub low: bool,
}

impl Default for Conditions {
    /// Nothing says so.
    fn default() -> Self {
        Self { network: true, metered: false, low: false }
    }
}

/// What the transfers want.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Keep this, and say so with [`Transfers::saved`].
    Save(Box<Transfer>),
    /// Keep this; a crash may lose it.
    Note(Box<Transfer>),
    /// Keep it no longer.
    Delete(TransferId),
    /// For the executor.
    Order(TransferOrder),
    /// The call that handed it over is answered: it is taken over.
    Began(CallId, TransferId),
    /// The call that handed it over is answered: it could not be kept.
    Refused(CallId),
    /// A decision, for people.
    Decided(AppKey, &'static str, String),
    /// Make the app ready ([`Transfers::ready`]), in its turn.
    Wake(AppKey),
    /// Whether something of it is on its way to or from the app, which must not be held still meanwhile.
    Pending(AppKey, bool),
    /// Call the app. Ends with [`Transfers::told`].
    Tell {
        /// Comes back with the outcome.
        ticket: TransferTicket,
        /// Which app.
        app: AppKey,
        /// Which instance.
        owner: Owner,
        /// Which transfer.
        id: TransferId,
        /// How it ended.
        status: &'static str,
        /// More about that.
        text: Arc<str>,
    },
    /// The app has heard of it.
    Heard(AppKey),
}

/// What a transfer waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The rest of its content.
    Content,
    /// A network.
    Network,
    /// One that costs nothing.
    Unmetered,
    /// A charged battery.
    Power,
    /// Room in the spool.
    Room,
    /// Another try.
    Retry(Instant),
    /// Others.
    Turn,
}

/// Why a transfer is not taken over: a sentence for the app's developer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too many.
    #[error("{0} transfers of yours are here already; collect or cancel some")]
    TooManyOfApp(usize),
    /// Too many in all.
    #[error("{0} transfers are here already; try again later")]
    TooMany(usize),
    /// An upload larger than any may be.
    #[error("it has {size} bytes; a transfer may have {most} (max-size)")]
    TooLarge {
        /// What it has.
        size: u64,
        /// What it may have.
        most: u64,
    },
    /// The app's share of the spool is used up.
    #[error("your transfers take {used} bytes already; all together they may take {quota} (spool-quota)")]
    NoRoom {
        /// What they take.
        used: u64,
        /// What they may take.
        quota: u64,
    },
}

/// What is shown of a transfer.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    /// What is kept of it.
    pub transfer: &'a Transfer,
    /// Bytes that are there, or sent.
    pub bytes: u64,
    /// Whether it runs.
    pub running: bool,
    /// What the last try came to.
    pub trouble: Option<&'a str>,
}

/// All transfers.
#[derive(Debug)]
pub struct Transfers {
    settings: TransferSettings,
    /// Tries to tell an app before it is left to ask.
    attempts: u32,
    all: BTreeMap<TransferId, Entry>,
    /// Those that have any.
    apps: BTreeMap<AppKey, App>,
    conditions: Conditions,
    /// Whether what is done may wake its app.
    may_wake: bool,
    /// About to sleep, or asleep: it is neither any more when this time comes.
    asleep: Option<Instant>,
    /// What power and network are is not yet known, and may be soon.
    unknown: Option<Instant>,
    ending: bool,
    next: u64,
    next_ticket: u64,
    starts: u64,
    out: VecDeque<Output>,
}

#[derive(Debug)]
struct Entry {
    transfer: Transfer,
    phase: Phase,
    bytes: u64,
    /// What there was when the latest attempt began.
    from: u64,
    /// Tries in a row that nothing came of.
    tries: u32,
    retry_at: Option<Instant>,
    trouble: Option<Arc<str>>,
    /// More is to come than may come over a metered network.
    heavy: bool,
    /// Answers of the store that are still to come.
    saving: u32,
    save_again: Option<Instant>,
    /// The app did not take the news in the tries allowed.
    given_up: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not yet durable.
    New(CallId),
    /// An upload whose content comes.
    Content,
    /// All of it is there, which is not yet durable.
    Complete,
    Waiting,
    Running {
        since: Instant,
    },
    Stopping,
    Over,
}

impl Transfers {
    /// With what an earlier life has left. `attempts`: tries to tell an app.
    pub fn new(settings: TransferSettings, attempts: u32, stored: Vec<Transfer>, next: u64, now: Now) -> Self {
        let mut transfers = Self {
            settings,
            attempts,
            all: BTreeMap::new(),
            apps: BTreeMap::new(),
            conditions: Conditions::default(),
            may_wake: true,
            asleep: None,
            unknown: None,
            ending: false,
            next: next.max(1),
            next_ticket: 1,
            starts: 0,
            out: VecDeque::new(),
        };
        for transfer in stored {
            let (id, app) = (transfer.id, transfer.app.clone());
            transfers.next = transfers.next.max(id.0 + 1);
            let mut entry = Entry::new(transfer, Phase::Waiting);
            entry.bytes = entry.transfer.progress.good;
            entry.retry_at = entry.transfer.progress.not_before.filter(|at| *at > now.wall).map(|at| {
                // The wall clock may have been anywhere.
                now.boot + at.since(now.wall).min(RETRY_AFTER)
            });
            if entry.transfer.end.is_some() {
                entry.phase = Phase::Over;
            }
            let incomplete = entry.phase == Phase::Waiting && !entry.transfer.progress.content;
            transfers.all.insert(id, entry);
            transfers.apps.entry(app).or_default();
            if incomplete {
                transfers.end(id, How::Failed, "its content was not handed over to the end", now);
            }
        }
        transfers
    }

    /// Takes a transfer over: the call is answered once that is durable.
    ///
    /// # Errors
    /// When there are too many, or no room.
    pub fn begin(&mut self, app: &AppKey, call: CallId, wish: Wish, now: Now) -> Result<(), Refusal> {
        let of_app = self.of(app).count();
        if of_app >= PER_APP {
            return Err(Refusal::TooManyOfApp(of_app));
        }
        if self.all.len() >= IN_ALL {
            return Err(Refusal::TooMany(IN_ALL));
        }
        if let Some(size) = wish.size {
            let TransferSettings { max_size, spool_quota, .. } = self.settings;
            if size > max_size {
                return Err(Refusal::TooLarge { size, most: max_size });
            }
            while self.used_by(app, None).saturating_add(size) > spool_quota {
                if !self.make_room(app, now) {
                    return Err(Refusal::NoRoom { used: self.used_by(app, None), quota: spool_quota });
                }
            }
        }
        let passed = |at: &mut Instant| *at <= now.boot;
        self.unknown.take_if(passed);
        self.asleep.take_if(passed);
        let id = TransferId(self.next);
        self.next += 1;
        let content = wish.direction == Direction::Download;
        let progress =
            Progress { begun: now.wall, content, good: 0, total: wish.size, validator: None, not_before: None };
        let transfer = Transfer { id, app: app.clone(), wish, progress, end: None };
        self.all.insert(id, Entry::new(transfer, Phase::New(call)));
        self.apps.entry(app.clone()).or_default().is_here();
        self.save(id);
        Ok(())
    }

    /// The store answered [`Output::Save`]; answers come in the order of what was asked.
    pub fn saved(&mut self, id: TransferId, ok: bool, now: Now) {
        let Some(entry) = self.all.get_mut(&id) else { return };
        entry.saving = entry.saving.saturating_sub(1);
        if entry.saving > 0 {
            return;
        }
        let app = entry.transfer.app.clone();
        match (entry.phase, ok) {
            (Phase::New(call), true) => {
                let text = format!("{} is taken over", self.name(id));
                self.out.push_back(Output::Decided(app.clone(), "transfer", text));
                let size = self.all.get(&id).and_then(|entry| entry.transfer.wish.size);
                let phase = match size {
                    Some(size) => {
                        self.out.push_back(Output::Order(TransferOrder::Take { call, id, size }));
                        Phase::Content
                    }
                    None => {
                        self.out.push_back(Output::Began(call, id));
                        Phase::Waiting
                    }
                };
                self.set_phase(id, phase);
            }
            (Phase::New(call), false) => {
                self.out.push_back(Output::Refused(call));
                self.all.remove(&id);
            }
            (Phase::Complete, true) => self.set_phase(id, Phase::Waiting),
            (_, false) => entry.save_again = Some(now.boot + STORE_RETRY),
            (_, true) => {}
        }
        self.settle(now);
        self.settle_app(&app, now);
    }

    /// Something happened to a transfer. Of what is forgotten already nothing is heard.
    pub fn happened(&mut self, id: TransferId, event: TransferEvent, now: Now) {
        let Some(entry) = self.all.get_mut(&id) else { return };
        let app = entry.transfer.app.clone();
        match event {
            TransferEvent::Spooled(result) if entry.phase == Phase::Content => match result {
                Ok(()) => {
                    entry.transfer.progress.content = true;
                    entry.phase = Phase::Complete;
                    self.save(id);
                }
                Err(why) => self.end(id, How::Failed, &why, now),
            },
            TransferEvent::Begun { total, validator } if entry.is_under_way() => {
                let progress = &mut entry.transfer.progress;
                (progress.total, progress.validator) = (total, validator);
                self.note(id);
            }
            TransferEvent::Progress { bytes, good } if entry.is_under_way() => {
                entry.bytes = bytes;
                let news = std::mem::replace(&mut entry.transfer.progress.good, good) != good;
                if news {
                    self.note(id);
                }
            }
            TransferEvent::Ended(attempted) if entry.is_under_way() => self.attempted(id, attempted, now),
            TransferEvent::Collected(ok) => self.collected(id, ok),
            TransferEvent::Spooled(_)
            | TransferEvent::Begun { .. }
            | TransferEvent::Progress { .. }
            | TransferEvent::Ended(_) => {}
        }
        self.settle(now);
        self.settle_app(&app, now);
    }

    /// The user (or, with `by_app`, the app itself) wants it no more.
    pub fn cancel(&mut self, id: TransferId, by_app: bool, by: &str, now: Now) {
        let Some(entry) = self.all.get_mut(&id) else { return };
        let app = entry.transfer.app.clone();
        let known = by_app || entry.transfer.end.as_ref().is_some_and(|end| end.told);
        if let (Phase::New(call), true) = (entry.phase, known) {
            self.out.push_back(Output::Refused(call));
        }
        if known {
            self.drop_entry(id);
        } else {
            self.out.push_back(Output::Order(TransferOrder::Remove(id)));
            self.end(id, How::Cancelled, &format!("{by} took it away"), now);
        }
        self.settle(now);
        self.settle_app(&app, now);
    }

    /// Whether the app's file can be fetched, and which way it went; else why not.
    ///
    /// # Errors
    /// A sentence for the app's developer.
    pub fn collectable(&self, app: &AppKey, id: TransferId) -> Result<Direction, String> {
        let entry = self.all.get(&id).filter(|entry| entry.transfer.app == *app);
        let entry = entry.ok_or_else(|| format!("you have no transfer {}", id.0))?;
        match &entry.transfer.end {
            Some(End { how: How::Done, .. }) => Ok(entry.transfer.wish.direction),
            Some(_) => Err(format!("transfer {} has no file: it was not done", id.0)),
            None => Err(format!("transfer {} is not done yet", id.0)),
        }
    }

    /// Whose it is.
    pub fn app_of(&self, id: TransferId) -> Option<&AppKey> {
        self.all.get(&id).map(|entry| &entry.transfer.app)
    }

    /// Everything of the app goes; of its rows somebody else takes care.
    pub fn forget(&mut self, app: &AppKey, now: Now) {
        let ids: Vec<TransferId> = self.of(app).map(|entry| entry.transfer.id).collect();
        for id in ids {
            if let Some(Entry { phase: Phase::New(call), .. }) = self.all.remove(&id) {
                self.out.push_back(Output::Refused(call));
            }
            self.out.push_back(Output::Order(TransferOrder::Remove(id)));
        }
        self.apps.remove(app);
        self.settle(now);
    }

    /// What power and network allow from now on; `returned`: what did not work may work now.
    pub fn set_conditions(&mut self, conditions: Conditions, may_wake: bool, returned: bool, now: Now) {
        if !conditions.metered {
            self.all.values_mut().for_each(|entry| entry.heavy = false);
        }
        if returned {
            self.forget_failures();
        }
        (self.conditions, self.may_wake, self.unknown) = (conditions, may_wake, None);
        self.settle(now);
        self.settle_apps(now);
    }

    /// There is a network again: what failed is tried at once, but for what a server wants to be left alone with.
    pub fn network_returned(&mut self, now: Now) {
        self.forget_failures();
        self.settle(now);
    }

    fn forget_failures(&mut self) {
        for entry in self.all.values_mut().filter(|entry| entry.transfer.progress.not_before.is_none()) {
            (entry.retry_at, entry.tries) = (None, 0);
        }
    }

    /// The machine is about to sleep, or is awake again.
    pub fn sleep(&mut self, asleep: bool, now: Now) {
        self.asleep = asleep.then(|| now.boot + FALLING);
        if !asleep {
            self.forget_failures();
        }
        self.settle(now);
    }

    /// The daemon begins: what power and network are is told in a moment, where anything says so. Until then nothing runs.
    pub fn beginning(&mut self, now: Now) {
        self.unknown = Some(now.boot + UNKNOWN);
        self.sweep(now);
    }

    /// The daemon is about to end: what runs stops where it is.
    pub fn shutdown(&mut self, now: Now) {
        self.ending = true;
        self.settle(now);
    }

    /// All transfers, in the order of their numbers.
    pub fn shown(&self) -> impl Iterator<Item = Shown<'_>> {
        self.all.values().filter(|entry| !matches!(entry.phase, Phase::New(_))).map(|entry| Shown {
            transfer: &entry.transfer,
            bytes: entry.bytes,
            running: matches!(entry.phase, Phase::Running { .. }),
            trouble: entry.trouble.as_deref(),
        })
    }

    /// What it waits for, if it does.
    pub fn waits_for(&self, id: TransferId) -> Option<Wait> {
        let entry = self.all.get(&id)?;
        match entry.phase {
            Phase::New(_) | Phase::Content | Phase::Complete => Some(Wait::Content),
            Phase::Waiting | Phase::Stopping => Some(self.hindrance(entry).unwrap_or(Wait::Turn)),
            Phase::Running { .. } | Phase::Over => None,
        }
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        let due = |at: &mut Option<Instant>| at.take_if(|at| *at <= now.boot).is_some();
        let mut again = Vec::new();
        for (id, entry) in &mut self.all {
            if due(&mut entry.retry_at) {
                entry.transfer.progress.not_before = None;
            }
            if due(&mut entry.save_again) {
                again.push(*id);
            }
        }
        due(&mut self.asleep);
        due(&mut self.unknown);
        again.into_iter().for_each(|id| self.save(id));
        self.telling_timeout(now);
        self.sweep(now);
    }

    /// Gives up what has not come to an end, and what nobody has fetched.
    pub fn sweep(&mut self, now: Now) {
        let old = |since: UnixTime, most: Duration| now.wall.since(since) >= most;
        let mut late = Vec::new();
        let mut stale = Vec::new();
        for (id, entry) in &self.all {
            match &entry.transfer.end {
                None if old(entry.transfer.progress.begun, GIVE_UP) => late.push(*id),
                Some(end) if old(end.at, self.settings.keep) => stale.push(*id),
                _ => {}
            }
        }
        for id in late {
            let trouble = self.all.get(&id).and_then(|entry| entry.trouble.clone());
            let last = trouble.map(|text| format!(": {text}")).unwrap_or_default();
            self.out.push_back(Output::Order(TransferOrder::Remove(id)));
            self.end(id, How::Failed, &format!("it was not done within 7 days{last}"), now);
        }
        for id in stale {
            let text = format!("{} was not fetched in time, and is deleted", self.name(id));
            if let Some(app) = self.app_of(id).cloned() {
                self.out.push_back(Output::Decided(app, "transfer-expired", text));
            }
            self.drop_entry(id);
        }
        self.settle(now);
        self.settle_apps(now);
    }

    /// When [`Transfers::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let own = self.all.values().filter_map(|entry| earliest(entry.retry_at, entry.save_again)).min();
        // Nobody waits for it where there is nothing to transfer.
        let unknown = self.unknown.filter(|_| !self.all.is_empty());
        let own = earliest(own, earliest(self.asleep.filter(|_| !self.all.is_empty()), unknown));
        earliest(earliest(own, self.end_of_turn()), self.telling_deadline())
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    fn attempted(&mut self, id: TransferId, attempted: Attempted, now: Now) {
        let Some(entry) = self.all.get_mut(&id) else { return };
        entry.phase = Phase::Waiting;
        match attempted {
            Attempted::Done { bytes, text } => {
                entry.bytes = bytes;
                self.end(id, How::Done, &text, now);
            }
            Attempted::Failed(text) => {
                self.out.push_back(Output::Order(TransferOrder::Remove(id)));
                self.end(id, How::Failed, &text, now);
            }
            Attempted::Stopped { bytes } => entry.bytes = bytes,
            Attempted::Metered => entry.heavy = true,
            Attempted::NoRoom { bytes } => {
                entry.bytes = bytes;
                entry.retry_at = Some(now.boot + DISK_RETRY);
                self.troubled(id, "the disk has no room for it");
            }
            Attempted::Later { bytes, after, text } => {
                let came = bytes > entry.from;
                entry.tries = if came { 1 } else { entry.tries.saturating_add(1) };
                entry.bytes = bytes;
                let wait = after.unwrap_or_default().min(RETRY_AFTER).max(pause(id, entry.tries));
                entry.retry_at = Some(now.boot + wait);
                entry.transfer.progress.not_before = after.map(|_| now.wall + wait);
                self.note(id);
                self.troubled(id, &text);
            }
        }
    }

    fn troubled(&mut self, id: TransferId, text: &str) {
        let name = self.name(id);
        let Some(entry) = self.all.get_mut(&id) else { return };
        let news = entry.trouble.as_deref() != Some(text);
        entry.trouble = Some(text.into());
        if news {
            let text = format!("{name} is tried again later: {text}");
            self.out.push_back(Output::Decided(entry.transfer.app.clone(), "transfer-wait", text));
        }
    }

    fn end(&mut self, id: TransferId, how: How, text: &str, now: Now) {
        let name = self.name(id);
        let Some(entry) = self.all.get_mut(&id) else { return };
        let text: Arc<str> = text.chars().take(300).collect::<String>().into();
        let (verdict, word) = match how {
            How::Done => ("transfer-done", "is done"),
            How::Failed => ("transfer-failed", "failed"),
            How::Cancelled => ("transfer-cancelled", "is cancelled"),
        };
        self.out.push_back(Output::Decided(entry.transfer.app.clone(), verdict, format!("{name} {word}: {text}")));
        if let Phase::New(call) = entry.phase {
            self.out.push_back(Output::Began(call, id));
        }
        (entry.phase, entry.retry_at, entry.trouble) = (Phase::Over, None, None);
        entry.transfer.end = Some(End { how, text, at: now.wall, told: false, collected: false });
        if how != How::Done {
            entry.bytes = 0;
        }
        self.save(id);
    }

    fn collected(&mut self, id: TransferId, ok: bool) {
        let Some(end) = self.all.get_mut(&id).and_then(|entry| entry.transfer.end.as_mut()) else { return };
        if !ok {
            return;
        }
        end.collected = true;
        if end.told { self.drop_entry(id) } else { self.note(id) }
    }

    fn drop_entry(&mut self, id: TransferId) {
        if let Some(entry) = self.all.remove(&id) {
            let app = entry.transfer.app;
            self.out.push_back(Output::Order(TransferOrder::Remove(id)));
            self.out.push_back(Output::Delete(id));
            // What is on its way to it is for nobody any more.
            if let Some(state) = self.apps.get_mut(&app) {
                state.drop_flight_of(id);
            }
        }
    }

    /// Stops what may not run, and starts what may.
    fn settle(&mut self, now: Now) {
        let mut stopped = Vec::new();
        for (id, entry) in &self.all {
            if matches!(entry.phase, Phase::Running { .. })
                && let Some(wait) = self.hindrance(entry)
            {
                stopped.push((*id, wait));
            }
        }
        let giving_way = self.end_of_turn().is_some_and(|at| at <= now.boot);
        let oldest = self.running().filter(|(entry, _)| entry.can_go_on()).min_by_key(|(_, since)| *since);
        if let (true, true, Some((entry, _))) = (giving_way, stopped.is_empty(), oldest) {
            stopped.push((entry.transfer.id, Wait::Turn));
        }
        for (id, wait) in stopped {
            self.set_phase(id, Phase::Stopping);
            self.out.push_back(Output::Order(TransferOrder::Stop(id)));
            let (text, app) = (format!("{} waits {}", self.name(id), words(&wait)), self.app_of(id).cloned());
            self.out.extend(app.map(|app| Output::Decided(app, "transfer-wait", text)));
        }
        while self.under_way() < self.settings.at_a_time {
            let Some(id) = self.next_one() else { break };
            let Some(attempt) = self.attempt(id, now) else {
                // There is no room for it.
                if let Some(entry) = self.all.get_mut(&id) {
                    entry.retry_at = Some(now.boot + DISK_RETRY);
                }
                self.troubled(id, "your share of the spool is used up; collect or cancel some");
                continue;
            };
            self.starts += 1;
            let app = attempt.0;
            if let Some(state) = self.apps.get_mut(&app) {
                state.served = self.starts;
            }
            self.set_phase(id, Phase::Running { since: now.boot });
            if let Some(entry) = self.all.get_mut(&id) {
                entry.from = entry.bytes;
            }
            self.out.push_back(Output::Order(TransferOrder::Start(Box::new(attempt.1))));
        }
    }

    fn attempt(&mut self, id: TransferId, now: Now) -> Option<(AppKey, Attempt)> {
        let app = self.app_of(id)?.clone();
        let quota = self.settings.spool_quota;
        while self.used_by(&app, Some(id)) >= quota && self.make_room(&app, now) {}
        let left = quota.saturating_sub(self.used_by(&app, Some(id)));
        let Transfer { wish, progress, .. } = &self.all.get(&id)?.transfer;
        let most = self.settings.max_size.min(wish.most.unwrap_or(u64::MAX)).min(left);
        let metered = match self.allows(wish) {
            Metered::Small if self.conditions.metered => Some(SMALL),
            _ => None,
        };
        let attempt = Attempt {
            id,
            wish: wish.clone(),
            progress: progress.clone(),
            most,
            metered,
            loopback: self.settings.loopback,
        };
        (most > 0 || wish.size.is_some()).then_some((app, attempt))
    }

    /// The next to run: of the app that has the fewest running, and of those the one that was served longest ago.
    fn next_one(&self) -> Option<TransferId> {
        let eligible =
            self.all.values().filter(|entry| entry.phase == Phase::Waiting && self.hindrance(entry).is_none());
        let rank = |entry: &&Entry| {
            let app = &entry.transfer.app;
            let running = self.of(app).filter(|other| other.is_under_way()).count();
            (running, self.apps.get(app).map_or(0, |state| state.served), entry.transfer.id)
        };
        eligible.min_by_key(rank).map(|entry| entry.transfer.id)
    }

    /// When the download that has run longest is to give way, if another app's transfer waits for it.
    fn end_of_turn(&self) -> Option<Instant> {
        if self.under_way() < self.settings.at_a_time || self.all.values().any(|entry| entry.phase == Phase::Stopping) {
            return None;
        }
        let next = self.next_one().and_then(|id| self.app_of(id))?;
        let others = self.running().filter(|(entry, _)| entry.can_go_on() && entry.transfer.app != *next);
        others.map(|(_, since)| since + TURN).min()
    }

    /// What keeps a transfer from running, but for its turn.
    fn hindrance(&self, entry: &Entry) -> Option<Wait> {
        if let Some(at) = entry.retry_at {
            return Some(if entry.trouble.is_none() { Wait::Room } else { Wait::Retry(at) });
        }
        if self.ending || self.asleep.is_some() || self.unknown.is_some() || !self.conditions.network {
            return Some(Wait::Network);
        }
        if self.conditions.low {
            return Some(Wait::Power);
        }
        let progress = &entry.transfer.progress;
        let left = progress.total.map(|total| total.saturating_sub(progress.good));
        let small = !entry.heavy && left.is_none_or(|left| left <= SMALL);
        let paid = match self.allows(&entry.transfer.wish) {
            Metered::Allow => true,
            Metered::Small => small,
            Metered::Never => false,
        };
        (self.conditions.metered && !paid).then_some(Wait::Unmetered)
    }

    /// What may go over a metered network: the user's word, and within it the app's.
    fn allows(&self, wish: &Wish) -> Metered {
        match (self.settings.metered, wish.metered) {
            (Metered::Never, _) => Metered::Never,
            (user, wish) => wish.unwrap_or(user),
        }
    }

    fn running(&self) -> impl Iterator<Item = (&Entry, Instant)> {
        self.all.values().filter_map(|entry| match entry.phase {
            Phase::Running { since } => Some((entry, since)),
            _ => None,
        })
    }

    fn under_way(&self) -> usize {
        self.all.values().filter(|entry| entry.is_under_way()).count()
    }

    fn of(&self, app: &AppKey) -> impl Iterator<Item = &Entry> {
        self.all.values().filter(move |entry| entry.transfer.app == *app)
    }

    /// Bytes the app's transfers take in the spool, or will, but for this one.
    fn used_by(&self, app: &AppKey, but: Option<TransferId>) -> u64 {
        self.of(app).filter(|entry| Some(entry.transfer.id) != but).map(Entry::takes).sum()
    }

    /// Deletes the oldest file of the app's that was not fetched although the app knows of it. False when there is none.
    fn make_room(&mut self, app: &AppKey, now: Now) -> bool {
        let is_told = |entry: &&Entry| entry.transfer.end.as_ref().is_some_and(|end| end.told) && entry.takes() > 0;
        let oldest = self.of(app).filter(is_told).map(|entry| entry.transfer.id).min();
        let Some(id) = oldest else { return false };
        let text = format!("{} was not fetched, and makes room", self.name(id));
        self.out.push_back(Output::Decided(app.clone(), "transfer-expired", text));
        self.drop_entry(id);
        self.settle_app(app, now);
        true
    }

    fn set_phase(&mut self, id: TransferId, phase: Phase) {
        if let Some(entry) = self.all.get_mut(&id) {
            entry.phase = phase;
        }
    }

    fn save(&mut self, id: TransferId) {
        if let Some(entry) = self.all.get_mut(&id) {
            entry.saving += 1;
            entry.save_again = None;
            self.out.push_back(Output::Save(Box::new(entry.transfer.clone())));
        }
    }

    fn note(&mut self, id: TransferId) {
        if let Some(entry) = self.all.get(&id) {
            self.out.push_back(Output::Note(Box::new(entry.transfer.clone())));
        }
    }

    /// For people, without what may be a secret.
    fn name(&self, id: TransferId) -> String {
        let Some(entry) = self.all.get(&id) else { return format!("transfer {}", id.0) };
        let Wish { direction, url, title, .. } = &entry.transfer.wish;
        let what = match direction {
            Direction::Download => "download",
            Direction::Upload => "upload",
        };
        let mut name = format!("{what} {}", id.0);
        let shown = if title.is_empty() { place(url) } else { title };
        let _ = write!(name, " ({})", shown.chars().take(80).collect::<String>());
        name
    }
}

impl Entry {
    const fn new(transfer: Transfer, phase: Phase) -> Self {
        Self {
            transfer,
            phase,
            bytes: 0,
            from: 0,
            tries: 0,
            retry_at: None,
            trouble: None,
            heavy: false,
            saving: 0,
            save_again: None,
            given_up: false,
        }
    }

    const fn is_under_way(&self) -> bool {
        matches!(self.phase, Phase::Running { .. } | Phase::Stopping)
    }

    /// Whether nothing is lost when it is stopped.
    fn can_go_on(&self) -> bool {
        self.transfer.wish.direction == Direction::Download && self.transfer.progress.validator.is_some()
    }

    fn takes(&self) -> u64 {
        match (self.transfer.wish.size, &self.transfer.end) {
            (Some(size), None) => size,
            (Some(_), Some(_)) => self.bytes.min(ANSWER_MAX),
            (None, None) if self.is_under_way() => self.bytes.max(self.transfer.progress.total.unwrap_or_default()),
            (None, _) => self.bytes.max(self.transfer.progress.good),
        }
    }
}

/// Where a URL leads, without what may be a secret in it.
pub fn place(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let end = rest.find(['?', '#']).unwrap_or(rest.len());
    let rest = &rest[..end];
    let host = rest.find('/').unwrap_or(rest.len());
    match rest[..host].rfind('@') {
        Some(at) => &rest[at + 1..],
        None => rest,
    }
}

/// What is waited for, as the end of a sentence.
pub fn words(wait: &Wait) -> &'static str {
    match wait {
        Wait::Content => "for its content",
        Wait::Network => "for a network",
        Wait::Unmetered => "for a network that is not metered",
        Wait::Power => "for a charged battery",
        Wait::Room => "for room in the spool",
        Wait::Retry(_) => "for another try",
        Wait::Turn => "for its turn",
    }
}

/// Doubled with each try, and a little different for each transfer: a server that was away must not get them all at once.
fn pause(id: TransferId, tries: u32) -> Duration {
    let doubled = RETRY.0.saturating_mul(1 << tries.saturating_sub(1).min(16)).min(RETRY.1);
    let spread = (id.0.wrapping_mul(0x9e37_79b9).wrapping_add(tries.into())) % 16;
    doubled + doubled / 64 * u32::try_from(spread).unwrap_or_default()
}

#[cfg(test)]
mod tests;
