//! The world around one core: its shell, its clock, its links, its crashes.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use nightporter::{
    action::{Action, Reply, StoreOp},
    config::{
        AppSettings, Limits, NetworkSettings, Roaming, Settings, UpstreamKind, UpstreamSettings, UrgencySettings,
    },
    core::Core,
    event::{
        Authorization, BusEvent, CallId, Caller, DeliveryTicket, Event, LinkError, LinkEvent, LinkId, Query, Request,
    },
    model::{AppKey, Bus, LeaseId, LifecycleTimes, Owner, Profile, SelfSample, TargetId, Zram},
    notification::{HelperJob, NotifyNews},
    transfer::TransferId,
    view,
};

use crate::{
    bus::{AppState, Instance},
    clock::{Agenda, At, MS, Rng, SEC, START, now as both},
    kernel::{KernelOp, Target},
    ledger::Written,
    ntfy::Ntfy,
    phone::Phone,
    pressure::Shortage,
    reference::{MessageNumber, Processed, Reference, Rules},
    server::{Autopush, Deed},
    stand_in::{HelperDeed, StandIns},
    store::Store,
    transfers::{Told, Transfers},
};

pub(crate) const BUS: Bus = Bus::Session(1000);
/// Apps on a bus give up on an answer after this (D-Bus's default timeout).
const ANSWERED_WITHIN: At = 25 * SEC;
const MOST_ACTIONS: usize = 4000;
const STEPS_SHOWN: usize = 60;

/// A link: which life of the daemon, which link of it.
pub(crate) type LinkKey = (u32, u64);

/// Something that is going to happen.
pub(crate) enum Due {
    /// An event for the core of this life, if it lives.
    Core(u32, Event),
    /// One that comes over the bus, if that connection still is.
    Bus(u32, u32, BusEvent),
    Accept(LinkKey),
    ToServer(LinkKey, String),
    ToCore(LinkKey, LinkEvent, Option<MessageNumber>),
    /// The server sends a frame now.
    Reply(LinkKey, String, Option<MessageNumber>),
    ServerPing(LinkKey),
    Replay(LinkKey),
    /// The server learns that the link is gone.
    Hangup(LinkKey),
    Commit(u32),
    Start,
    Kernel(u32, TargetId, KernelOp),
    Identify(u32, usize, u64),
    StartApp(u32, usize),
    Work(u64),
    Answer(u64, crate::bus::Answer),
    Continue(u64),
    Register(usize, u64, usize),
    Declare(u64),
    /// An app answers the notice before a freeze.
    Prepared(u64, crate::client::Noticed),
    /// An attempt at a transfer ends; whether it was stopped.
    Attempt(u32, TransferId, u64, bool),
    /// An app answers the news of a transfer.
    Told(u64, Told),
    Exit(u64),
    BusUp,
    Publish,
    Chaos,
    /// The daemon of this life is told of its surroundings.
    Around(u32),
    /// A payload helper answers.
    Helped(u32, Box<HelperJob>, HelperDeed),
    /// Something becomes of a notification.
    Notified(u32, u32, AppKey, Arc<str>, u64, NotifyNews),
    /// The kernel says that tasks wait for memory.
    Stall(u32),
    /// The machine sleeps, if this is the time it was about to.
    Asleep(u32),
    NetworkUp,
    ServerUp(UpstreamKind),
    DiskFree,
}

/// How hard this run is.
pub(crate) struct Plan {
    pub(crate) profile: Profile,
    pub(crate) first: UpstreamKind,
    /// In ten thousand, before and after each action.
    pub(crate) crash: u64,
    /// Apps that hang, answer late or are stopped from outside.
    pub(crate) slow_apps: bool,
    pub(crate) rules: Rules,
    pub(crate) chaos: At,
    pub(crate) publish: At,
    /// The kernel says when memory is short.
    pub(crate) psi: bool,
    /// Power and network change.
    pub(crate) phone: bool,
    pub(crate) roaming: Roaming,
    pub(crate) hold_at_most: At,
    pub(crate) policies: Vec<AppSettings>,
    pub(crate) times: LifecycleTimes,
}

/// A link as both its ends see it.
pub(crate) struct Link {
    pub(crate) kind: UpstreamKind,
    path: String,
    /// Nothing gets through any more and nobody knows.
    pub(crate) dead: bool,
    up: At,
    down: At,
    /// The server has had the last of it.
    pub(crate) hung_up: bool,
}

struct Asked {
    life: u32,
    at: At,
    jumps: u32,
    bus: u32,
    what: What,
}

/// Which call an answer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Register { app: usize, instance: u64, registration: usize },
    Listen { instance: u64, listens: bool },
    Save { app: usize, number: u64, forgotten: u64 },
    Restore { app: usize, at_least: u64, forgotten: u64 },
    Transfer { app: usize },
    Other,
    Json,
}

pub(crate) type Stats = BTreeMap<&'static str, u64>;

pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) rng: Rng,
    pub(crate) at: At,
    pub(crate) agenda: Agenda<Due>,
    pub(crate) stats: Stats,
    trace: Option<VecDeque<String>>,
    core: Option<Core>,
    pub(crate) life: u32,
    settings: Settings,
    pub(crate) store: Store,
    pub(crate) links: BTreeMap<LinkKey, Link>,
    pub(crate) autopush: Autopush,
    pub(crate) ntfy: Ntfy,
    pub(crate) network_down: bool,
    pub(crate) servers_down: BTreeSet<UpstreamKindKey>,
    pub(crate) reference: Reference,
    pub(crate) bus_up: bool,
    /// Counts the times the bus has gone.
    pub(crate) bus_age: u32,
    bus_last: At,
    pub(crate) watched: BTreeSet<AppKey>,
    pub(crate) apps: Vec<AppState>,
    pub(crate) instances: BTreeMap<u64, Instance>,
    pub(crate) next_owner: u64,
    pub(crate) targets: BTreeMap<TargetId, Target>,
    pub(crate) next_target: u64,
    /// The record of what is held still, as it outlives the daemon.
    pub(crate) record: BTreeSet<u64>,
    pub(crate) phone: Phone,
    pub(crate) shortage: Shortage,
    pub(crate) transfers: Transfers,
    pub(crate) stand_ins: StandIns,
    pub(crate) ledger: Written,
    /// Apps of registrations deleted with this event.
    pub(crate) deleted: BTreeSet<AppKey>,
    /// Which app is told of its endpoint with which call.
    pub(crate) endpoint_calls: BTreeMap<DeliveryTicket, (usize, Arc<str>)>,
    calls: BTreeMap<CallId, Asked>,
    next_call: u64,
    /// Leases not taken away, with the life of the daemon that gave them, and whether their holder gave them back.
    pub(crate) leases: BTreeMap<(u32, LeaseId), bool>,
    jumps: u32,
    shutdown: Option<At>,
    thaw_trouble: bool,
    /// Faults are over.
    pub(crate) calm: bool,
    overdue: u32,
    pub(crate) ticks: u64,
    why: Option<view::Why>,
    /// Verdicts that must be found in `why` before time goes on.
    verdicts: Vec<(AppKey, &'static str)>,
    pub(crate) steps: u64,
}

/// `UpstreamKind` has no order.
type UpstreamKindKey = &'static str;

impl World {
    pub(crate) fn new(plan: Plan, mut rng: Rng, traced: bool) -> Self {
        let settings = settings(&plan);
        let apps = crate::bus::apps(&mut rng);
        let mut world = Self {
            rng,
            at: START,
            agenda: Agenda::new(),
            stats: Stats::new(),
            trace: traced.then(VecDeque::new),
            core: None,
            life: 0,
            settings,
            store: Store::new(),
            links: BTreeMap::new(),
            autopush: Autopush::default(),
            ntfy: Ntfy::default(),
            network_down: false,
            servers_down: BTreeSet::new(),
            reference: Reference::default(),
            bus_up: true,
            bus_age: 0,
            bus_last: 0,
            watched: BTreeSet::new(),
            apps,
            instances: BTreeMap::new(),
            next_owner: 1,
            targets: BTreeMap::new(),
            next_target: 1,
            record: BTreeSet::new(),
            phone: Phone::default(),
            shortage: Shortage::default(),
            transfers: Transfers::default(),
            stand_ins: StandIns::default(),
            ledger: Written::default(),
            deleted: BTreeSet::new(),
            endpoint_calls: BTreeMap::new(),
            calls: BTreeMap::new(),
            next_call: 1,
            leases: BTreeMap::new(),
            jumps: 0,
            shutdown: None,
            thaw_trouble: false,
            calm: false,
            overdue: 0,
            ticks: 0,
            why: None,
            verdicts: Vec::new(),
            steps: 0,
            plan,
        };
        world.agenda.add(START, Due::Start);
        for app in 0..world.apps.len() {
            world.spawn(app, false);
        }
        world.agenda.add(START + 3 * SEC, Due::Publish);
        world.agenda.add(START + 2 * SEC, Due::Chaos);
        world
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        *self.stats.entry(what).or_default() += 1;
    }

    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        let at = self.at;
        if let Some(trace) = &mut self.trace {
            if trace.len() == STEPS_SHOWN && std::env::var_os("NIGHTPORTER_SIM_ALL").is_none() {
                trace.pop_front();
            }
            trace.push_back(format!("{:10.3} {}", (at - START) as f64 / SEC as f64, text()));
        }
    }

    pub(crate) fn trace(&self) -> Vec<String> {
        self.trace.iter().flatten().cloned().collect()
    }

    pub(crate) fn soon(&mut self, low: At, high: At) -> At {
        self.at + self.rng.between(low, high)
    }

    pub(crate) fn is_up(&self) -> bool {
        self.core.is_some()
    }

    /// Goes on to the next thing that happens, but not beyond `until`. False when that is reached.
    pub(crate) fn step(&mut self, until: At) -> bool {
        self.steps += 1;
        let timeout = self.core.as_ref().and_then(Core::poll_timeout).map(|at| at.as_nanos());
        let next = self.agenda.next_at();
        let tick = timeout.filter(|at| next.is_none_or(|next| *at <= next));
        let Some(at) = tick.or(next).filter(|at| *at <= until) else {
            self.at = self.at.max(until);
            return false;
        };
        self.at = self.at.max(at);
        if tick.is_some() {
            self.ticks += 1;
            self.tell(Event::Tick);
            let late = self.core.as_ref().and_then(Core::poll_timeout).is_some_and(|at| at.as_nanos() <= self.at);
            self.overdue = if late { self.overdue + 1 } else { 0 };
            assert!(self.overdue < 2, "the core spins: after two ticks its deadline is still in the past");
        } else if let Some(due) = self.agenda.pop() {
            self.happen(due);
        }
        true
    }

    // The shell.

    /// Hands an event to the core and carries out what it wants.
    pub(crate) fn tell(&mut self, event: Event) {
        if event == Event::Resumed {
            self.has_resumed();
        }
        let Some(core) = &mut self.core else { return };
        if event != Event::Tick {
            let text = self.trace.is_some().then(|| format!("→ {event:?}"));
            if let (Some(text), Some(trace)) = (text, &mut self.trace) {
                if trace.len() == STEPS_SHOWN && std::env::var_os("NIGHTPORTER_SIM_ALL").is_none() {
                    trace.pop_front();
                }
                trace.push_back(format!("{:10.3} {text}", (self.at - START) as f64 / SEC as f64));
            }
        }
        if let Event::Surroundings(around) = &event {
            self.phone.told = Some(around.clone());
        }
        core.handle(event, both(self.at));
        self.drain();
        self.deleted.clear();
    }

    fn drain(&mut self) {
        let mut count = 0;
        while let Some(action) = self.core.as_mut().and_then(Core::poll_action) {
            count += 1;
            assert!(count < MOST_ACTIONS, "one event makes more than {MOST_ACTIONS} actions");
            let crash = if self.calm { 0 } else { self.plan.crash };
            if self.rng.chance(crash) {
                self.note(|| format!("crash before {action:?}"));
                self.count("crashes at an action");
                self.crash();
                return;
            }
            let midway = self.rng.chance(crash);
            let shown = (midway && self.trace.is_some()).then(|| format!("{action:?}"));
            self.note(|| format!("  {action:?}"));
            if action == Action::Exit {
                self.exit();
                return;
            }
            self.perform(action);
            if midway {
                self.note(|| format!("crash after {}", shown.unwrap_or_default()));
                self.count("crashes at an action");
                self.crash();
                return;
            }
        }
        self.reference.check_owed();
        self.check_notifications();
        self.check_sleep();
        self.check_why();
    }

    /// Invariant 7: what was just done has a decision, with this moment's time.
    fn check_why(&mut self) {
        for (app, verdict) in std::mem::take(&mut self.verdicts) {
            let Some(core) = &mut self.core else { return };
            let call = CallId(u64::MAX);
            let request = Request::Query(Query::Why(Arc::clone(&app.service)));
            core.handle(Event::Bus(BusEvent::Call { call, caller: tool(), request }), both(self.at));
            self.drain();
            let Some(why) = self.why.take() else { continue };
            let at = both(self.at).wall.to_string();
            let told = why.decisions.iter().any(|d| d.verdict == verdict && d.at == at && !d.reason.is_empty());
            assert!(told, "{app}: {verdict} without a decision: {:?}", why.decisions);
            let for_message = |d: &view::Decision| d.at == at && d.reason == "a message came for it";
            if verdict == "thaw" && why.decisions.iter().any(for_message) {
                self.check_worth_waking(&app, "thawed");
            }
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Connect { link, upstream, path, .. } => self.connect(link, &upstream, path),
            Action::Send(link, text) => self.send(link, text),
            Action::Ping(link) => {
                let key = (self.life, link.0);
                // Answered by the server's library.
                if self.links.get(&key).is_some_and(|link| !link.dead && !link.hung_up) {
                    self.send_down(key, LinkEvent::Pong, None);
                }
            }
            Action::Close(link) => {
                let key = (self.life, link.0);
                let Some(link) = self.links.remove(&key) else { panic!("closed link {} which is none", key.1) };
                if link.dead {
                    let at = self.soon(SEC, 60 * SEC);
                    self.agenda.add(at, Due::Hangup(key));
                } else {
                    let at = link.up.max(self.soon(MS, 100 * MS));
                    self.agenda.add(at, Due::Hangup(key));
                }
            }
            Action::Fetch { .. } => panic!("nothing has an attachment here"),
            Action::SendBytes(..) | Action::Http { .. } | Action::Configure(_) => {
                panic!("no server here needs {action:?}")
            }
            Action::Transfer(order) => self.transfer_order(order),
            Action::StayAwake(keep) => self.stay_awake(keep),
            Action::AllowSleep => self.sleep_allowed(),
            Action::Help(job) => self.help(*job),
            Action::Notify(app, order) => self.notify(&app, order),
            Action::Activate { app, owner, .. } => self.activate(&app, owner),
            Action::PanelChanged(_) | Action::LeaseEnding { .. } | Action::WatchNotifications(..) => {}
            Action::EndLease(_, lease) => {
                let held = self.leases.remove(&(self.life, lease));
                assert!(held.is_some(), "lease {} is taken away, which nobody holds", lease.0);
                self.count("leases taken away");
            }
            Action::Store(op, ticket) => {
                let rules = self.plan.rules;
                match &op {
                    StoreOp::DeleteRegistration(id) => {
                        if let Some(app) = self.reference.app_of(*id).cloned() {
                            self.state_may_go(&app);
                            self.transfers_may_go(&app);
                        }
                    }
                    StoreOp::PutHistory(rows) => self.check_rows(rows),
                    StoreOp::DeleteApp(app) => {
                        self.ledger.forget(app);
                        self.state_may_go(app);
                        self.transfers_may_go(app);
                        self.listens_no_more(app);
                    }
                    _ => {}
                }
                if let StoreOp::DeleteRegistration(id) = &op {
                    self.deleted.extend(self.reference.app_of(*id).cloned());
                }
                if let StoreOp::EndMessage(seq, nightporter::model::Ending::GivenUp) = &op {
                    self.stand_ins.given_up.extend(self.reference.app_of_message(seq.0).cloned());
                }
                self.reference.ordered(&op, self.at, rules, &self.store);
                if let StoreOp::EndMessage(_, ending) = &op {
                    self.count(match ending {
                        nightporter::model::Ending::Accepted => "messages accepted",
                        nightporter::model::Ending::Expired => "messages expired",
                        nightporter::model::Ending::Replaced => "messages replaced",
                        nightporter::model::Ending::GivenUp => "messages given up",
                        nightporter::model::Ending::Overflowed => "messages overflowed",
                        nightporter::model::Ending::Unregistered => "messages unregistered",
                    });
                }
                if let StoreOp::LoadBody(_) = op {
                    self.count("bodies read back");
                }
                if let Some(at) = self.store.apply(op, ticket, self.at, &mut self.rng) {
                    self.agenda.add(at, Due::Commit(self.life));
                }
            }
            Action::Reply(call, reply) => self.answered(call, &reply),
            Action::Watch(app) => self.watch(app),
            Action::Unwatch(app) => {
                self.watched.remove(&app);
            }
            Action::Call { ticket, app, owner, call, .. } => self.call_app(ticket, &app, &owner, call),
            Action::CallClient { app, owner, call } => self.call_client(&app, &owner, call),
            Action::Start(app) => {
                self.verdicts.push((app.clone(), "start"));
                self.check_worth_waking(&app, "started");
                self.start_app(&app);
            }
            Action::Freeze(target) => self.freeze(target),
            Action::Thaw(target) => self.kernel(target, KernelOp::Thaw),
            Action::PageOut(target) => self.page_out(target),
            Action::Kill { target, grace } => self.kill_target(target, grace),
            Action::Forget(target) => self.forget(target),
            Action::Inspect(target) => self.kernel(target, KernelOp::Inspect),
            Action::Sample(target) => self.kernel(target, KernelOp::Sample),
            Action::SampleSelf => {
                let memory = nightporter::model::Memory { pss: 3000, uss: 2000, swap: 0 };
                let event = Event::SampledSelf {
                    daemon: SelfSample { memory, ..SelfSample::default() },
                    zram: Zram { used: crate::ledger::ZRAM, stored: 3 * crate::ledger::ZRAM },
                };
                let at = self.soon(MS, 50 * MS);
                self.agenda.add(at, Due::Core(self.life, event));
            }
            Action::ReadPressure => self.read_pressure(),
            Action::Exit => {}
        }
    }

    pub(crate) fn must_say_why(&mut self, app: AppKey, verdict: &'static str) {
        self.verdicts.push((app, verdict));
    }

    /// The core asked for its end: nothing may be held still any more.
    fn exit(&mut self) {
        self.note(|| "exit".to_owned());
        let Some(since) = self.shutdown else { panic!("exit without a shutdown") };
        assert!(self.at - since <= 4 * SEC || self.jumps > 0, "the shutdown took {} s", (self.at - since) / SEC);
        if !self.thaw_trouble && self.at - since < 3 * SEC {
            let held: Vec<u64> =
                self.instances.iter().filter(|(_, instance)| instance.frozen).map(|(n, _)| *n).collect();
            assert!(held.is_empty(), "exit with frozen apps: {held:?}");
        }
        self.check_awake_no_more();
        self.count("clean exits");
        // What the shell does at its end: a last sweep, and everything written.
        self.thaw_record();
        let (_, written) = self.store.flush(&mut self.rng);
        self.written(&written);
        self.core = None;
        self.fall();
    }

    /// The daemon is gone from one instruction to the next.
    pub(crate) fn crash(&mut self) {
        if self.core.take().is_none() {
            return;
        }
        if self.instances.values().any(|instance| instance.calls.iter().any(|call| call.life == self.life)) {
            self.count("crashes mid-delivery");
        }
        self.count("crashes");
        self.fall();
    }

    fn fall(&mut self) {
        self.verdicts.clear();
        self.inhibits_no_more();
        self.attempts_end();
        self.endpoint_calls.clear();
        self.apps.iter_mut().flat_map(|app| &mut app.wishes).for_each(|wish| wish.owed = false);
        self.reference.cancel_owed(self.plan.rules);
        self.shutdown = None;
        self.store.crash();
        let keys: Vec<LinkKey> = self.links.keys().copied().collect();
        for key in keys {
            self.links.remove(&key);
            let at = self.soon(MS, 30 * SEC);
            self.agenda.add(at, Due::Hangup(key));
        }
        self.kernel_crash();
        self.watched.clear();
        // Their callers hear from the bus that nobody answers.
        let lost: Vec<What> = std::mem::take(&mut self.calls).into_values().map(|asked| asked.what).collect();
        for what in lost {
            self.retry_register(what);
        }
        let at = if self.calm { self.soon(100 * MS, SEC) } else { self.soon(100 * MS, 20 * SEC) };
        self.agenda.add(at, Due::Start);
    }

    fn start(&mut self) {
        if self.core.is_some() {
            return;
        }
        self.life += 1;
        self.count("daemon starts");
        self.ledger = Written::default();
        self.thaw_record();
        for (n, instance) in &self.instances {
            assert!(!instance.frozen, "instance {n} is frozen and in no record");
        }
        if self.rng.chance(1000) {
            self.settings.upstreams.reverse();
        }
        let snapshot = self.store.snapshot();
        self.reference.begin(self.life, &self.store);
        self.stand_ins = StandIns::default();
        let life = self.life;
        self.note(|| format!("daemon starts, life {life}"));
        let core = Core::new(self.settings.clone(), self.rng.seed(), snapshot, both(self.at));
        self.core = Some(core);
        self.overdue = 0;
        self.thaw_trouble = false;
        if self.bus_up {
            self.bus_event(BusEvent::Up(BUS));
        }
        self.drain();
        let at = self.soon(0, 2 * SEC);
        self.agenda.add(at, Due::Around(life));
    }

    pub(crate) fn shutdown(&mut self) {
        if self.core.is_some() && self.shutdown.is_none() {
            self.shutdown = Some(self.at);
            self.tell(Event::Shutdown);
        }
    }

    pub(crate) fn trouble_thawing(&mut self) {
        self.thaw_trouble = true;
    }

    /// The machine sleeps: nothing happens, and time goes on.
    pub(crate) fn suspend(&mut self, length: At) {
        self.note(|| format!("suspended for {} s", length / SEC));
        self.at += length;
        self.jumps += 1;
        self.tell(Event::Resumed);
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Core(life, event) => {
                if life == self.life {
                    self.tell(event);
                }
            }
            Due::Bus(life, age, event) => {
                if life == self.life && age == self.bus_age {
                    self.claim_heard(&event);
                    self.notice_heard(&event);
                    self.tell(Event::Bus(event));
                } else if let BusEvent::Call { call, .. } = event {
                    // It never got there.
                    self.calls.remove(&call);
                }
            }
            Due::Accept(key) => self.accept(key),
            Due::ToServer(key, text) => self.at_server(key, &text),
            Due::ToCore(key, event, message) => self.at_core(key, event, message),
            Due::Reply(key, frame, message) => self.send_down(key, LinkEvent::Text(frame), message),
            Due::ServerPing(key) => self.server_ping(key),
            Due::Replay(key) => self.replay(key),
            Due::Hangup(key) => self.hangup(key),
            Due::Commit(life) => {
                if life == self.life && self.core.is_some() {
                    let (events, written) = self.store.commit(self.at, &mut self.rng);
                    self.written(&written);
                    if self.store.full && !events.is_empty() {
                        self.count("writes refused by a full disk");
                    }
                    for event in events {
                        self.agenda.add(self.at + MS, Due::Core(self.life, event));
                    }
                }
            }
            Due::Start => self.start(),
            Due::Kernel(life, target, op) => self.kernel_done(life, target, op),
            Due::Identify(life, app, instance) => self.identify(life, app, instance),
            Due::StartApp(life, app) => self.app_start_ends(life, app),
            Due::Work(n) => self.work(n),
            Due::Answer(n, answer) => self.answer(n, answer),
            Due::Continue(n) => self.go_on(n),
            Due::Register(app, n, registration) => self.app_registers(app, n, registration),
            Due::Declare(n) => self.app_declares(n),
            Due::Helped(life, job, deed) => self.helper_answers(life, &job, deed),
            Due::Notified(life, bus, app, tag, number, news) => {
                self.notification_news((life, bus), app, tag, number, news);
            }
            Due::Prepared(n, noticed) => self.prepared(n, noticed),
            Due::Attempt(life, id, number, stopped) => self.attempt_ends(life, id, number, stopped),
            Due::Told(n, told) => self.transfer_told(n, told),
            Due::Exit(n) => self.die(n, "exits"),
            Due::BusUp => self.bus_returns(),
            Due::Publish => self.publish(),
            Due::Chaos => self.chaos(),
            Due::Around(life) => {
                if life == self.life {
                    self.tell_surroundings();
                }
            }
            Due::Stall(life) => self.stall(life),
            Due::Asleep(times) => self.asleep(times),
            Due::NetworkUp => {
                self.network_down = false;
                self.note(|| "network up".to_owned());
                self.tell(Event::NetworkReturned);
            }
            Due::ServerUp(kind) => {
                self.servers_down.remove(kind.as_str());
            }
            Due::DiskFree => {
                self.store.full = false;
                self.note(|| "disk free".to_owned());
            }
        }
    }

    /// Invariant 1 for cursors: checked when one is durable.
    fn written(&mut self, ops: &[StoreOp]) {
        for op in ops {
            if let StoreOp::PutUpstream { key, value, .. } = op
                && &**key == "cursor"
            {
                self.check_cursor(value, "a cursor was stored");
                self.count("cursors stored");
            }
        }
        self.reference.check_owed();
    }

    fn check_cursor(&mut self, id: &str, what: &'static str) {
        for cached in self.ntfy.up_to(id) {
            self.reference.check_safe(cached.number, what, &self.store);
        }
    }

    // Links.

    fn connect(&mut self, link: LinkId, upstream: &str, path: String) {
        let kind = if upstream == "push" { UpstreamKind::Autopush } else { UpstreamKind::Ntfy };
        self.check_may_connect();
        if let Some((_, since)) = path.split_once("since=") {
            self.check_cursor(since, "a cursor was used");
        }
        let key = (self.life, link.0);
        let link = Link { kind, path, dead: false, up: self.at, down: self.at, hung_up: true };
        assert!(self.links.insert(key, link).is_none(), "link {} is used twice", key.1);
        let open = self.links.values().filter(|link| link.kind == kind).count();
        // ntfy's: the one in use, the next one, and the one before, which is kept for what is on its way.
        let most = if kind == UpstreamKind::Ntfy { 3 } else { 2 };
        assert!(open <= most, "{open} links to one upstream");
        self.count("connects");
        let at = self.soon(5 * MS, 300 * MS);
        self.agenda.add(at, Due::Accept(key));
    }

    fn accept(&mut self, key: LinkKey) {
        let Some(link) = self.links.get(&key) else { return };
        let kind = link.kind;
        let down = self.network_down || self.servers_down.contains(kind.as_str());
        let dice = if self.calm { 9999 } else { self.rng.below(10_000) };
        let failed = match dice {
            _ if down => Some(LinkError::Connect("connection refused".into())),
            0..200 => Some(LinkError::Timeout),
            200..400 => {
                let retry_after = self.rng.chance(5000).then(|| Duration::from_secs(self.rng.between(1, 30)));
                Some(LinkError::Http { status: 429, body: "too many".into(), retry_after })
            }
            400..500 => Some(LinkError::Http { status: 503, body: String::new(), retry_after: None }),
            500..700 if kind == UpstreamKind::Ntfy => {
                Some(LinkError::Http { status: 200, body: String::new(), retry_after: None })
            }
            700..1000 => {
                // Accepts and hangs: the core never hears of it again.
                self.count("half-open links");
                if let Some(link) = self.links.get_mut(&key) {
                    link.dead = true;
                }
                return;
            }
            _ => None,
        };
        if let Some(error) = failed {
            self.count("connects refused");
            self.refuse_link(key, LinkEvent::Failed(error));
            return;
        }
        if let Some(link) = self.links.get_mut(&key) {
            link.hung_up = false;
            let path = link.path.clone();
            match kind {
                UpstreamKind::Autopush => self.autopush.connected(key),
                UpstreamKind::Ntfy => self.ntfy.connected(key, &path),
                UpstreamKind::Mqtt | UpstreamKind::NextPush | UpstreamKind::Gotify => unreachable!(),
            }
        }
        self.send_down(key, LinkEvent::Open, None);
        let ping = match kind {
            UpstreamKind::Autopush => 300 * SEC,
            UpstreamKind::Ntfy => 45 * SEC,
            UpstreamKind::Mqtt | UpstreamKind::NextPush | UpstreamKind::Gotify => unreachable!(),
        };
        self.agenda.add(self.at + ping, Due::ServerPing(key));
        if kind == UpstreamKind::Ntfy {
            if let Some(open) = self.ntfy.open(key, self.at) {
                self.send_down(key, LinkEvent::Text(open), None);
            }
            let at = self.soon(MS, 200 * MS);
            self.agenda.add(at, Due::Replay(key));
        }
    }

    fn replay(&mut self, key: LinkKey) {
        let most = self.rng.between(1, 5) as usize;
        let part = self.ntfy.replay(key, most);
        if part.is_empty() {
            return;
        }
        for (frame, number) in part {
            self.send_down(key, LinkEvent::Text(frame), Some(number));
        }
        let at = self.soon(MS, 100 * MS);
        self.agenda.add(at, Due::Replay(key));
    }

    fn server_ping(&mut self, key: LinkKey) {
        let Some(link) = self.links.get(&key).filter(|link| !link.hung_up) else { return };
        let every = match link.kind {
            UpstreamKind::Autopush => 300 * SEC,
            UpstreamKind::Ntfy => 45 * SEC,
            UpstreamKind::Mqtt | UpstreamKind::NextPush | UpstreamKind::Gotify => unreachable!(),
        };
        if link.dead {
            // No pong.
            self.agenda.add(self.at + 60 * SEC, Due::Hangup(key));
            return;
        }
        self.send_down(key, LinkEvent::Ping, None);
        self.agenda.add(self.at + every, Due::ServerPing(key));
    }

    fn send(&mut self, link: LinkId, text: String) {
        let key = (self.life, link.0);
        self.check_frame(&text);
        let at = self.soon(MS, 100 * MS);
        let Some(link) = self.links.get_mut(&key) else { return };
        link.up = link.up.max(at);
        if !link.dead {
            let at = link.up;
            self.agenda.add(at, Due::ToServer(key, text));
        }
    }

    /// Invariant 1 for acknowledgements.
    fn check_frame(&mut self, text: &str) {
        let frame: serde_json::Value = serde_json::from_str(text).expect("the daemon sends JSON");
        match frame["messageType"].as_str() {
            Some("ack") => {
                for update in frame["updates"].as_array().expect("updates") {
                    let version = update["version"].as_str().expect("a version");
                    let number = self.reference.number(version);
                    self.reference.check_safe(number, "acknowledged", &self.store);
                    self.count("acknowledgements");
                }
            }
            Some("unregister") => {
                let channel = frame["channelID"].as_str().unwrap_or_default();
                assert!(!self.reference.is_alive(channel), "channel {channel} is unregistered and in use");
            }
            _ => {}
        }
    }

    fn at_server(&mut self, key: LinkKey, text: &str) {
        if self.links.get(&key).is_some_and(|link| link.dead) {
            return;
        }
        let deeds = self.autopush.frame(key, text, self.at, &mut self.rng);
        self.carry_out(deeds);
    }

    pub(crate) fn carry_out(&mut self, deeds: Vec<Deed>) {
        for channel in std::mem::take(&mut self.autopush.refused) {
            self.reference.refused.insert(channel.into());
        }
        for number in std::mem::take(&mut self.autopush.dropped) {
            self.reference.dropped_by_server(number, &self.store);
        }
        for deed in deeds {
            match deed {
                Deed::Send { link, after: 0, frame, message } => self.send_down(link, LinkEvent::Text(frame), message),
                Deed::Send { link, after, frame, message } => {
                    self.agenda.add(self.at + after, Due::Reply(link, frame, message));
                }
                Deed::Close { link, code, reason } => {
                    self.end_link(link, LinkEvent::Closed { code: Some(code), reason: reason.into() });
                }
            }
        }
    }

    /// A frame of the server is on its way, behind those before it.
    pub(crate) fn send_down(&mut self, key: LinkKey, event: LinkEvent, message: Option<MessageNumber>) {
        let slow = if self.rng.chance(200) { 4000 } else { 120 };
        let at = self.soon(MS, slow * MS);
        let Some(link) = self.links.get_mut(&key) else { return };
        if link.dead || link.hung_up {
            return;
        }
        link.down = link.down.max(at);
        let at = link.down;
        self.agenda.add(at, Due::ToCore(key, event, message));
    }

    /// The last event of a link that never was.
    fn refuse_link(&mut self, key: LinkKey, event: LinkEvent) {
        self.agenda.add(self.at, Due::ToCore(key, event, None));
    }

    fn at_core(&mut self, key: LinkKey, event: LinkEvent, message: Option<MessageNumber>) {
        let Some(link) = self.links.get(&key) else { return };
        if link.dead && !matches!(event, LinkEvent::Failed(_)) {
            return;
        }
        if matches!(event, LinkEvent::Closed { .. } | LinkEvent::Failed(_)) {
            self.links.remove(&key);
            self.hangup(key);
        }
        if let Some(number) = message {
            // A frame may be quicker than the sender's own answer.
            if self.reference.sent.len() > number && !self.reference.arrive(self.life, number) {
                self.count("replays");
            }
        }
        self.tell(Event::Link(LinkId(key.1), event));
    }

    /// The server ends the link, or something between does.
    pub(crate) fn end_link(&mut self, key: LinkKey, event: LinkEvent) {
        self.send_down(key, event, None);
        self.hangup(key);
        if let Some(link) = self.links.get_mut(&key) {
            link.hung_up = true;
        }
    }

    pub(crate) fn hangup(&mut self, key: LinkKey) {
        self.autopush.disconnected(key, &mut self.rng);
        self.ntfy.disconnected(key);
        if let Some(link) = self.links.get_mut(&key) {
            link.hung_up = true;
        }
    }

    // Calls to the core.

    /// A call over the bus. False when there is nobody to call.
    pub(crate) fn call(&mut self, caller: Caller, request: Request, what: What) -> bool {
        if self.core.is_none() || !self.bus_up {
            return false;
        }
        let call = CallId(self.next_call);
        self.next_call += 1;
        let asked = Asked { life: self.life, at: self.at, jumps: self.jumps, bus: self.bus_age, what };
        self.calls.insert(call, asked);
        self.bus_event(BusEvent::Call { call, caller, request });
        true
    }

    /// Something comes over the bus, behind what came before.
    pub(crate) fn bus_event(&mut self, event: BusEvent) {
        let at = self.soon(0, 20 * MS);
        self.bus_last = self.bus_last.max(at);
        self.agenda.add(self.bus_last, Due::Bus(self.life, self.bus_age, event));
    }

    fn answered(&mut self, call: CallId, reply: &Reply) {
        if call == CallId(u64::MAX) {
            if let Reply::Json(text) = reply {
                self.why = Some(serde_json::from_str(text).expect("why is JSON"));
            }
            return;
        }
        let Some(asked) = self.calls.remove(&call) else {
            panic!("call {} was answered twice, or was none", call.0);
        };
        let took = self.at - asked.at;
        if matches!(asked.what, What::Register { .. }) {
            let excused = asked.jumps != self.jumps;
            assert!(excused || took <= ANSWERED_WITHIN, "a registration was answered after {} s", took / SEC);
        }
        assert_eq!(asked.life, self.life, "an earlier life's call was answered");
        if let Reply::Lease(lease) = reply {
            assert!(self.leases.insert((self.life, *lease), false).is_none(), "lease {} is given twice", lease.0);
            self.count("leases given");
        }
        if asked.bus != self.bus_age {
            self.retry_register(asked.what);
            return;
        }
        match (asked.what, reply) {
            (What::Register { app, registration, .. }, Reply::Registered) => {
                self.count("registrations");
                self.apps[app].wishes[registration].registered = true;
                self.apps[app].wishes[registration].owed = true;
                let going = (self.apps[app].key.clone(), Arc::clone(&self.apps[app].wishes[registration].token));
                self.reference.may_go.remove(&going);
            }
            (What::Register { .. }, _) => {
                self.count("registrations failed");
                self.retry_register(asked.what);
            }
            (What::Json, Reply::Json(text)) => self.check_json(text),
            (What::Listen { .. } | What::Save { .. } | What::Restore { .. }, reply) => self.saved(asked.what, reply),
            (What::Transfer { app }, Reply::Transfer(id)) => self.transfer_accepted(app, *id),
            (What::Json | What::Other | What::Transfer { .. }, _) => {}
        }
    }

    /// A call whose answer is a file. What it was, if its caller still is.
    pub(crate) fn answered_otherwise(&mut self, call: CallId) -> Option<What> {
        let asked = self.calls.remove(&call);
        let asked = asked.unwrap_or_else(|| panic!("call {} was answered twice, or was none", call.0));
        (asked.bus == self.bus_age).then_some(asked.what)
    }

    fn check_json(&mut self, text: &str) {
        self.check_books(text);
        if let Ok(apps) = serde_json::from_str::<Vec<view::App>>(text) {
            for app in apps {
                if app.held > 0 {
                    self.count("apps seen with held messages");
                    let runs = matches!(app.state.as_str(), "foreground" | "background" | "awake");
                    // A process may outlive its name for a moment.
                    let instance = self.apps.iter().find(|state| *state.key.service == *app.name);
                    let instance = instance.and_then(|state| state.instance).map(|n| u32::try_from(n).unwrap_or(1));
                    let excused = self.shutdown.is_some() || instance.is_none() || app.pid != instance;
                    assert!(!runs || excused, "{} runs, and {} messages are held", app.name, app.held);
                    assert!(app.held <= app.waiting);
                }
                assert!(app.waiting <= self.plan.rules.most_waiting, "{} messages wait for {}", app.waiting, app.name);
            }
        }
    }

    /// The bus connection is gone: nothing comes back over it.
    pub(crate) fn forget_calls(&mut self) {
        let lost: Vec<What> = self.calls.values().map(|asked| asked.what).collect();
        for what in lost {
            self.retry_register(what);
        }
    }

    /// Calls that have had no answer for longer than there is an excuse for.
    pub(crate) fn check_answers(&self) {
        for (call, asked) in &self.calls {
            let excused = asked.jumps != self.jumps || asked.bus != self.bus_age;
            let register = matches!(asked.what, What::Register { .. });
            assert!(
                excused || !register || self.at - asked.at <= ANSWERED_WITHIN,
                "call {} ({:?}) has had no answer for {} s",
                call.0,
                asked.what,
                (self.at - asked.at) / SEC
            );
        }
    }

    pub(crate) fn unanswered(&self) -> Vec<String> {
        self.calls.iter().map(|(call, asked)| format!("{} of {}: {:?}", call.0, asked.at / SEC, asked.what)).collect()
    }

    pub(crate) const fn processed_by(&self, life: u32, instance: u64, error: bool) -> Processed {
        Processed { life, instance, bus: self.bus_age, error }
    }
}

/// The user's own command line.
pub(crate) fn tool() -> Caller {
    Caller {
        bus: BUS,
        owner: Owner(":9.9".into()),
        uid: 1000,
        pid: 77,
        app_id: None,
        sandboxed: false,
        networked: true,
        owns_service: false,
        authorization: Authorization::NotAsked,
    }
}

fn settings(plan: &Plan) -> Settings {
    let mut upstreams = vec![
        UpstreamSettings::new("push", UpstreamKind::Autopush, "wss://push.sim/"),
        UpstreamSettings::new("ntfy", UpstreamKind::Ntfy, "https://ntfy.sim/"),
    ];
    if plan.first == UpstreamKind::Ntfy {
        upstreams.reverse();
    }
    let limits =
        Limits { messages_per_app: plan.rules.most_waiting, attempts: plan.rules.attempts, ..Limits::default() };
    let hold_at_most = Duration::from_nanos(plan.hold_at_most);
    Settings {
        profile: plan.profile,
        upstreams,
        apps: plan.policies.clone(),
        urgency: UrgencySettings { hold_at_most, ..UrgencySettings::default() },
        network: NetworkSettings { roaming: plan.roaming, ..NetworkSettings::default() },
        lifecycle: plan.times,
        limits,
        ..Settings::default()
    }
}
