//! Feeds the ledger with what happens, and answers who asks for it: the report, its history, and what would have been done.
//!
//! Nothing is measured or written for its own sake: samples come with freezes, page-outs and reports, rows with transitions, and
//! no timer is set for any of it.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::{
    Core, Purpose, Stored, Upstream, access,
    ledger::{Parts, Phase, Reached, Window},
    lifecycle::{Outward, SampleKind, State},
    queries::json,
    waking::name_of,
};
use crate::{
    action::{Action, ErrorKind, Reply, StoreOp},
    event::{CallId, Caller, Outcome, StoreError, StoreTicket},
    model::{AppKey, AppRecord, Bus, History, HistoryRow, Profile, Sample, SelfSample, TargetId, Urgency, Zram},
    time::{Instant, Now, UnixTime},
    view::{Account, LinkState},
};

/// A report is built with what has been measured by then.
const REPORT_TIME: Duration = Duration::from_secs(20);
/// Calls that may wait for one report; beyond it the newest is refused.
const CALLS: usize = 32;
/// Calls that may wait for the history; beyond it the newest is refused. Each has a copy of what is not written yet.
const READERS: usize = 8;
/// As much earlier than asked is read, for what reaches into the time asked about: what would have been done is written in
/// pieces of an hour, and longer ones where nothing happened meanwhile.
const REACH: Duration = Duration::from_secs(24 * 3600);
/// The upstream under whose name the store keeps of a baseline what an app's record has no room for, by app. None can be
/// called so: names have no control characters.
const PARTS: &str = "\u{1}resident";

/// A report whose samples are on their way.
#[derive(Debug)]
pub(super) struct ReportRun {
    calls: Vec<(CallId, Caller)>,
    targets: BTreeSet<TargetId>,
    daemon: bool,
    deadline: Instant,
}

impl ReportRun {
    pub(super) const fn deadline(&self) -> Instant {
        self.deadline
    }
}

/// Who waits for the history.
#[derive(Debug)]
pub(super) struct Reader {
    call: CallId,
    caller: Caller,
    since: UnixTime,
    what_if: bool,
    /// What was not written yet when it was asked for.
    unwritten: Vec<HistoryRow>,
}

impl Core {
    /// What an earlier life knew of baselines. Only before the first event.
    pub(super) fn restore_parts(&mut self, remembered: &[(Arc<str>, Arc<str>, Arc<str>)]) {
        for (_, key, parts) in remembered.iter().filter(|(name, ..)| **name == *PARTS) {
            match self.apps.keys().find(|app| *name_of(app) == **key) {
                Some(app) => self.ledger.restore_parts(app, parts),
                None => self.store(parts_op(key, ""), None),
            }
        }
    }

    pub(super) fn put_record(&mut self, app: &AppKey) {
        let (resident, measured, conditions) = match self.ledger.record(app) {
            Some((memory, at, conditions)) => (Some(memory), Some(at), conditions),
            None => (None, None, None),
        };
        let declares = self.apps.get(app).is_some_and(|presence| presence.declares);
        let record = AppRecord { app: app.clone(), declares, resident, measured, conditions };
        self.store(StoreOp::PutApp(record), None);
    }

    pub(super) fn sample(&mut self, target: TargetId, purpose: Purpose) {
        self.samples.entry(target).or_default().push_back(purpose);
        self.actions.push_back(Action::Sample(target));
    }

    /// A measurement that belongs to the lifecycle is wanted. A baseline is taken with its conditions.
    pub(super) fn sample_for_lifecycle(&mut self, target: TargetId, kind: SampleKind, now: Now) {
        if kind == SampleKind::Resident && self.ledger.wants_machine(now.boot) {
            self.actions.push_back(Action::ReadPressure);
        }
        self.sample(target, Purpose::Lifecycle);
    }

    pub(super) fn handle_sampled(&mut self, target: TargetId, sample: Result<Sample, Arc<str>>, now: Now) {
        let purpose = self.samples.get_mut(&target).and_then(VecDeque::pop_front);
        if self.samples.get(&target).is_some_and(VecDeque::is_empty) {
            self.samples.remove(&target);
        }
        let Some(app) = self.lifecycle.app_of(target).cloned() else { return };
        let phase = match purpose {
            Some(Purpose::Lifecycle) => {
                let memory = sample.as_ref().map(|sample| sample.memory).map_err(Arc::clone);
                self.lifecycle.sampled(target, memory, now).map(|kind| match kind {
                    SampleKind::Resident => Phase::Resident,
                    SampleKind::Frozen => Phase::Frozen,
                    SampleKind::PagedOut => Phase::PagedOut,
                })
            }
            Some(Purpose::Report) => Some(Phase::Now),
            None => None,
        };
        match (phase, &sample) {
            (Some(phase), Ok(sample)) => self.measured(&app, phase, sample, now),
            (Some(Phase::Now), Err(_)) => self.ledger.unmeasured(&app),
            (Some(Phase::Resident | Phase::Frozen | Phase::PagedOut) | None, _) => {}
        }
        if matches!(phase, Some(Phase::Frozen | Phase::PagedOut)) {
            self.write_app(&app, now);
        }
        if purpose == Some(Purpose::Report) {
            self.report_target_done(target, now);
        }
    }

    fn measured(&mut self, app: &AppKey, phase: Phase, sample: &Sample, now: Now) {
        let conditions = match phase {
            Phase::Resident | Phase::Frozen => {
                let others = self.states().filter(|(other, state)| {
                    *other != app && other.bus == app.bus && !matches!(state, State::Tombstone | State::Gone)
                });
                self.ledger.conditions(self.lifecycle.unseen(app, now), others.count(), now.boot)
            }
            Phase::PagedOut | Phase::Now => String::new(),
        };
        if self.ledger.sampled(app, phase, sample, &conditions, now) {
            self.put_record(app);
            let parts = self.ledger.parts(app).unwrap_or_default();
            self.store(parts_op(&name_of(app), &parts), None);
        }
        let wake = self.account.sampled(app, sample, phase != Phase::Now);
        self.write_wake(wake, now);
        self.rate(app, now);
    }

    /// A lifecycle operation ended, for the books.
    pub(super) fn account_for(&mut self, app: &AppKey, outcome: &Outcome, now: Now) {
        match outcome {
            Outcome::PagedOut { freed, zram, source, .. } => self.ledger.paged_out(app, *freed, *zram, *source),
            Outcome::PageOutFailed(_) => self.ledger.page_out_failed(app),
            Outcome::Thawed { .. } => self.ledger.thawed(app),
            Outcome::Frozen { .. } | Outcome::FreezeFailed(_) | Outcome::ThawFailed(_) | Outcome::KillFailed(_) => {
                return;
            }
        }
        self.rate(app, now);
    }

    /// The app's process has ended.
    pub(super) fn account_for_end(&mut self, app: &AppKey, now: Now) {
        self.ledger.gone(app);
        let wake = self.account.gone(app);
        self.write_wake(wake, now);
        self.rate(app, now);
    }

    /// The app took a message.
    pub(super) fn reached(&mut self, app: &AppKey, from: &'static str, took: Duration, urgency: Urgency, now: Now) {
        let wake = self.account.reached(app, Reached { from, took, urgency }, now);
        self.write_wake(wake, now);
    }

    /// The daemon measured itself and zram.
    pub(super) fn daemon_sampled(&mut self, daemon: SelfSample, zram: Zram, now: Now) {
        self.ledger.daemon(daemon, zram);
        self.account.daemon(self.ledger.own_cost().unwrap_or(0), now.boot);
        if std::mem::take(&mut self.totals_asked) {
            self.write_totals(now);
        }
        if let Some(run) = &mut self.report {
            run.daemon = true;
            self.finish_if_measured(now);
        }
    }

    /// A bus has come or gone: while its user is logged out none of the apps on it would run, so nothing is saved on them.
    pub(super) fn rate_all_on(&mut self, bus: Bus, now: Now) {
        let apps: Vec<AppKey> = self.apps.keys().filter(|app| app.bus == bus).cloned().collect();
        for app in apps {
            self.rate(&app, now);
        }
    }

    /// Writes down which apps have changed, and what is due.
    pub(super) fn keep_books(&mut self, now: Now) {
        let mut changed = false;
        while let Some(app) = self.lifecycle.take_changed() {
            changed = true;
            self.app_changed(&app, now);
        }
        for row in self.shadows.cut(false, now) {
            self.journal.would(row, now.boot);
        }
        if changed && self.ending.is_none() && self.journal.wants_totals(false, now.boot) && !self.totals_asked {
            self.totals_asked = true;
            self.journal.totals_asked(now.boot);
            self.actions.push_back(Action::SampleSelf);
        }
        self.write_history(false, now);
    }

    /// Hands everything to the store: the daemon ends.
    pub(super) fn close_books(&mut self, now: Now) {
        for wake in self.account.give_all_up() {
            self.journal.wake(wake, now.boot);
        }
        for row in self.shadows.cut(true, now) {
            self.journal.would(row, now.boot);
        }
        self.write_history(true, now);
    }

    /// The rhythms of all connections from now on, and the apps behind them.
    pub(super) fn count_beats(&mut self, now: Now) {
        let mut apps: BTreeMap<&str, BTreeMap<Bus, BTreeSet<&AppKey>>> = BTreeMap::new();
        for registration in self.registry.iter() {
            let of_bus = apps.entry(&registration.upstream).or_default().entry(registration.app.bus).or_default();
            of_bus.insert(&registration.app);
        }
        for (index, upstream) in self.upstreams.iter().enumerate() {
            let standing = upstream.session.standing();
            let interval = standing.heartbeat.map(|beat| beat.interval);
            let served = apps.get(&*upstream.settings.name).into_iter().flatten();
            let served = served.map(|(bus, apps)| (*bus, u32::try_from(apps.len()).unwrap_or(u32::MAX)));
            self.account.beats(index, interval, served.collect(), now.boot);
        }
    }

    /// Nothing is kept of the app any more.
    pub(super) fn forget_books(&mut self, app: &AppKey) {
        if self.ledger.parts(app).is_some() {
            self.store(parts_op(&name_of(app), ""), None);
        }
        self.ledger.remove(app);
        self.account.remove(app);
        self.journal.remove(app);
        self.shadows.remove(app);
    }

    /// Nothing is kept of the bus any more.
    pub(super) fn forget_books_of(&mut self, bus: Bus) {
        self.account.forget(bus);
        self.journal.forget(bus);
    }

    fn app_changed(&mut self, app: &AppKey, now: Now) {
        let Some(outward) = self.lifecycle.outward(app) else { return };
        if outward.state == State::Foreground {
            let wake = self.account.give_up(app);
            self.write_wake(wake, now);
        }
        self.rate(app, now);
        self.shadow(app, &outward, now);
        match outward.state {
            // What comes next says more: they do not last, or are about to be measured.
            State::Freezing | State::Ending => return,
            State::Frozen | State::Reclaimed if self.journal.is_in(app, outward.state.as_str()) => return,
            _ => {}
        }
        if self.journal.is_in(app, outward.state.as_str()) {
            self.write_app(app, now);
        }
    }

    fn shadow(&mut self, app: &AppKey, outward: &Outward, now: Now) {
        if self.lifecycle.rules_of(&app.service).profile != Profile::Observe {
            return;
        }
        let would = outward.would_be.map(|state| {
            let (verdict, saved) = match state {
                State::Reclaimed => {
                    let pageable = self.ledger.pageable(app).unwrap_or(0);
                    ("would-page-out", self.ledger.compression().saves(pageable))
                }
                State::Tombstone => ("would-kill", self.ledger.counted(app).unwrap_or(0)),
                _ => ("would-freeze", 0),
            };
            let decided = self.lifecycle.decisions(app).filter(|decision| decision.verdict == verdict).last();
            (state.as_str(), decided.map(|decision| Arc::clone(&decision.reason)).unwrap_or_default(), saved)
        });
        let runs = !matches!(outward.state, State::Tombstone | State::Gone);
        let kept = outward.left.clone().filter(|_| runs);
        if let Some(row) = self.shadows.set(app, would, kept, now) {
            self.journal.would(row, now.boot);
        }
    }

    /// From now on so much is saved on the app.
    fn rate(&mut self, app: &AppKey, now: Now) {
        let Some(outward) = self.lifecycle.outward(app) else { return };
        let saved = self.ledger.rate(app, outward.state.as_str()).filter(|_| self.buses.contains(&app.bus));
        self.account.rate(app, saved.unwrap_or(0), now.boot);
    }

    fn write_app(&mut self, app: &AppKey, now: Now) {
        let Some(outward) = self.lifecycle.outward(app) else { return };
        let row = self.ledger.row(app, outward.state.as_str());
        let what = History::App {
            app: app.clone(),
            state: outward.state.as_str().into(),
            pss: row.now.map(|now| now.pss),
            zram: row.zram,
            saved: row.saved,
        };
        self.journal.app(app, what, now);
    }

    fn write_wake(&mut self, wake: Option<HistoryRow>, now: Now) {
        if let Some(wake) = wake {
            self.journal.wake(wake, now.boot);
        }
    }

    fn write_totals(&mut self, now: Now) {
        self.journal.totals_asked(now.boot);
        self.count_beats(now);
        let buses: BTreeSet<Bus> = self.apps.keys().map(|app| app.bus).collect();
        for bus in buses {
            let mut total = self.ledger.total(bus, self.states().map(|(app, state)| (app, state.as_str())));
            total.connections = self.connections(|owner| owner == bus);
            total.replaced = self.connections_replaced(|of| of == bus);
            self.journal.total(bus, total, now);
        }
    }

    fn write_history(&mut self, all: bool, now: Now) {
        if let Some(rows) = self.journal.take(all, now.boot) {
            self.store(StoreOp::PutHistory(rows), None);
        }
    }

    fn states(&self) -> impl Iterator<Item = (&AppKey, State)> {
        self.apps.keys().filter_map(|app| Some((app, self.lifecycle.outward(app)?.state)))
    }

    /// Connections that stand, of the upstreams that are everybody's or of such an owner.
    fn connections(&self, owned: impl Fn(Bus) -> bool) -> u32 {
        let of = |upstream: &&Upstream| upstream.owner.is_none_or(&owned);
        let standing =
            self.upstreams.iter().filter(of).filter(|upstream| upstream.session.standing().state == LinkState::Online);
        u32::try_from(standing.count()).unwrap_or(u32::MAX)
    }

    /// Apps that would hold a connection by themselves.
    fn connections_replaced(&self, of: impl Fn(Bus) -> bool) -> u32 {
        let apps: BTreeSet<&AppKey> =
            self.registry.iter().map(|registration| &registration.app).filter(|app| of(app.bus)).collect();
        u32::try_from(apps.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn begin_report(&mut self, call: CallId, caller: &Caller, now: Now) {
        if let Some(run) = &mut self.report {
            if run.calls.len() < CALLS {
                run.calls.push((call, caller.clone()));
            } else {
                let text = format!("{CALLS} reports are being made already");
                self.reply(call, Reply::Error(ErrorKind::LimitsExceeded, text));
            }
            return;
        }
        let targets: BTreeSet<TargetId> = self.apps.keys().filter_map(|app| self.lifecycle.target_of(app)).collect();
        for target in &targets {
            self.sample(*target, Purpose::Report);
        }
        self.actions.push_back(Action::SampleSelf);
        let deadline = now.boot + REPORT_TIME;
        self.report = Some(ReportRun { calls: vec![(call, caller.clone())], targets, daemon: false, deadline });
    }

    pub(super) fn report_target_done(&mut self, target: TargetId, now: Now) {
        if let Some(run) = &mut self.report
            && run.targets.remove(&target)
        {
            self.finish_if_measured(now);
        }
    }

    fn finish_if_measured(&mut self, now: Now) {
        if self.report.as_ref().is_some_and(|run| run.daemon && run.targets.is_empty()) {
            self.finish_report(now);
        }
    }

    pub(super) fn finish_report(&mut self, now: Now) {
        let Some(run) = self.report.take() else { return };
        self.count_beats(now);
        for (call, caller) in run.calls {
            let states = self.states().filter(|(app, _)| access::sees(&caller, app.bus));
            let states = states.map(|(app, state)| (app, state.as_str()));
            let profile = self.settings.profile;
            let fill = |app: &AppKey, row: &mut _| self.account.fill(app, row, now.boot);
            let mut report = self.ledger.report(now, profile, states, fill);
            report.account = Some(self.account_for_caller(&caller, now));
            self.reply(call, json(&report));
        }
        if self.journal.wants_totals(true, now.boot) {
            self.write_totals(now);
        }
    }

    fn account_for_caller(&self, caller: &Caller, now: Now) -> Account {
        let all = caller.bus == Bus::System && caller.uid == 0;
        let owned = |owner: Bus| all || owner == caller.bus;
        let shown = |index: usize| self.upstreams.get(index).is_some_and(|one| one.owner.is_none_or(owned));
        Account {
            connections: self.connections(owned).into(),
            connections_replaced: self.connections_replaced(|bus| access::sees(caller, bus)).into(),
            daemon_cpu_ms: u64::try_from(self.ledger.own_cpu().as_millis()).unwrap_or(u64::MAX),
            ..self.account.view(|bus| access::sees(caller, bus), shown, now)
        }
    }

    /// Reads the history of the last hours for a caller that may read.
    pub(super) fn begin_history(&mut self, call: CallId, caller: &Caller, hours: u32, what_if: bool, now: Now) {
        if self.readers.len() >= READERS {
            let text = format!("{READERS} callers wait for the history already");
            return self.reply(call, Reply::Error(ErrorKind::LimitsExceeded, text));
        }
        let since = back(now.wall, Duration::from_secs(3600) * hours);
        let ticket = self.store_with(StoreOp::LoadHistory(back(since, REACH)), Stored::History);
        let unwritten = self.journal.rows().to_vec();
        self.readers.insert(ticket, Reader { call, caller: caller.clone(), since, what_if, unwritten });
    }

    /// The history is here, or cannot be read.
    pub(super) fn history_loaded(
        &mut self,
        ticket: StoreTicket,
        stored: Result<Vec<HistoryRow>, StoreError>,
        now: Now,
    ) {
        self.stores.remove(&ticket);
        let Some(Reader { call, caller, since, what_if, unwritten }) = self.readers.remove(&ticket) else { return };
        let sees = |bus| access::sees(&caller, bus);
        let reply = match stored {
            Err(error) => Reply::Error(ErrorKind::Failed, format!("the history could not be read: {error}")),
            Ok(stored) if what_if => {
                let rows = stored.into_iter().chain(unwritten).chain(self.shadows.live(now.boot));
                let window = Window {
                    since,
                    now,
                    profile: self.settings.profile,
                    apps: self.apps.keys().filter(|app| sees(app.bus)).collect(),
                    compression: self.ledger.compression(),
                };
                json(&self.shadows.view(&Parts::new(rows, sees, since), &window))
            }
            Ok(stored) => json(&Parts::new(stored.into_iter().chain(unwritten), sees, since).view(since, now.wall)),
        };
        self.reply(call, reply);
    }
}

fn back(from: UnixTime, by: Duration) -> UnixTime {
    UnixTime::from_millis(from.as_millis().saturating_sub(u64::try_from(by.as_millis()).unwrap_or(u64::MAX)))
}

fn parts_op(key: &str, parts: &str) -> StoreOp {
    StoreOp::PutUpstream { upstream: PARTS.into(), key: key.into(), value: parts.into() }
}
