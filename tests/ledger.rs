//! The ledger in the whole core, over scripted days: what it measures and when, what it says, and to whom. The world does at
//! once what the core wants; time is the test's.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use nightporter::{
    action::{Action, ErrorKind, Reply, StoreOp},
    config::Settings,
    core::Core,
    event::{
        Authorization, BusEvent, CallId, CallOutcome, Caller, Claim, Event, LinkEvent, LinkId, Outcome, Query, Request,
        StoreError,
    },
    model::{
        AppKey, Bus, Charged, ConnectorVersion, Freezer, History, HistoryRow, Memory, Owner, Pressure, ProcessFacts,
        Profile, Registration, RegistrationId, Sample, SelfSample, Snapshot, TargetId, Zram, ZramSource,
    },
    time::{Instant, Now, UnixTime},
    view,
};
use serde::de::DeserializeOwned;
use serde_json::json;

const HOUR: u64 = 3600;
const BUSES: [Bus; 2] = [Bus::Session(1000), Bus::Session(1001)];
const MIB: u64 = 1024;

fn chat() -> AppKey {
    AppKey::new(BUSES[0], "org.example.Chat")
}

fn mail() -> AppKey {
    AppKey::new(BUSES[0], "org.example.Mail")
}

fn other() -> AppKey {
    AppKey::new(BUSES[1], "org.example.Other")
}

fn user(bus: Bus, uid: u32) -> Caller {
    Caller {
        bus,
        owner: Owner(":1.99".into()),
        uid,
        pid: 99,
        app_id: None,
        sandboxed: false,
        networked: true,
        owns_service: false,
        authorization: Authorization::NotAsked,
    }
}

/// What runs of an app.
struct Running {
    target: TargetId,
    sample: Sample,
}

struct World {
    core: Core,
    secs: f64,
    ping: f64,
    link: LinkId,
    /// What each app costs when it starts.
    costs: BTreeMap<AppKey, Sample>,
    running: BTreeMap<AppKey, Running>,
    next: u64,
    zram: Zram,
    stored: Vec<HistoryRow>,
    put: usize,
    values: BTreeMap<(Arc<str>, Arc<str>), Arc<str>>,
    records: BTreeMap<AppKey, nightporter::model::AppRecord>,
    /// The store answers nothing.
    mute: Option<Vec<nightporter::event::StoreTicket>>,
    replies: BTreeMap<CallId, Reply>,
    /// All that was done since the last look, by name.
    did: Vec<String>,
}

fn now(secs: f64) -> Now {
    let nanos = (secs * 1e9) as u64;
    Now {
        boot: Instant::from_nanos(1_000_000_000_000 + nanos),
        wall: UnixTime::from_millis(1_795_000_000_000 + nanos / 1_000_000),
    }
}

fn sample(anon: u64, file: u64) -> Sample {
    Sample {
        anon,
        file,
        charged: Some(Charged { kernel: 512, current: anon, ..Charged::default() }),
        ..Memory { pss: anon + file, uss: anon, swap: 0 }.into()
    }
}

impl World {
    fn new(profile: Profile) -> Self {
        Self::with(profile, Snapshot::default())
    }

    fn with(profile: Profile, kept: Snapshot) -> Self {
        let settings = Settings { profile, ..Settings::default() };
        let upstream = Arc::clone(&settings.upstreams[0].name);
        let registration = |(app, id): (AppKey, u64)| Registration {
            id: RegistrationId(id),
            app,
            token: "token".into(),
            description: "".into(),
            vapid: None,
            version: ConnectorVersion::V2,
            upstream: Arc::clone(&upstream),
            channel: format!("channel{id}").into(),
            endpoint: format!("https://push.example/{id}").into(),
            told: true,
        };
        let mut upstreams = kept.upstreams.clone();
        upstreams.push((Arc::clone(&upstream), "uaid".into(), "u1".into()));
        let snapshot = Snapshot {
            registrations: [chat(), mail(), other()].into_iter().zip(1..).map(registration).collect(),
            upstreams,
            next_registration: 4,
            next_message: 1,
            ..kept
        };
        let mut world = Self {
            core: Core::new(settings, [7; 32], snapshot, now(0.0)),
            secs: 0.0,
            ping: 240.0,
            link: LinkId(0),
            costs: BTreeMap::from([
                (chat(), sample(60 * MIB, 20 * MIB)),
                (mail(), sample(30 * MIB, 10 * MIB)),
                (other(), sample(8 * MIB, MIB)),
            ]),
            running: BTreeMap::new(),
            next: 10,
            zram: Zram::default(),
            stored: Vec::new(),
            put: 0,
            values: BTreeMap::new(),
            records: BTreeMap::new(),
            mute: None,
            replies: BTreeMap::new(),
            did: Vec::new(),
        };
        BUSES.into_iter().for_each(|bus| world.tell(Event::Bus(BusEvent::Up(bus))));
        world
    }

    fn now(&self) -> Now {
        now(self.secs)
    }

    fn tell(&mut self, event: Event) {
        self.core.handle(event, self.now());
        while let Some(action) = self.core.poll_action() {
            self.perform(action);
        }
    }

    fn app_of(&self, target: TargetId) -> Option<AppKey> {
        self.running.iter().find(|(_, running)| running.target == target).map(|(app, _)| app.clone())
    }

    fn done(&mut self, target: TargetId, outcome: Outcome) {
        self.tell(Event::Outcome(target, outcome));
    }

    fn perform(&mut self, action: Action) {
        let word = format!("{action:?}");
        self.did.push(word.split(['(', ' ']).next().unwrap().to_owned());
        let took = Duration::from_millis(3);
        match action {
            Action::Connect { link, .. } => {
                self.link = link;
                self.tell(Event::Link(link, LinkEvent::Open));
                let hello = json!({"messageType": "hello", "uaid": "u1", "status": 200});
                self.tell(Event::Link(link, LinkEvent::Text(hello.to_string())));
            }
            Action::Sample(target) => {
                let sample = self.app_of(target).map(|app| self.running[&app].sample).ok_or_else(|| "gone".into());
                self.tell(Event::Sampled(target, sample));
            }
            Action::SampleSelf => {
                let memory = Memory { pss: 4 * MIB, uss: 3 * MIB, swap: 0 };
                let cpu = Duration::from_millis(self.secs as u64);
                let daemon = SelfSample { memory, sockets: 64, connections: 1, cpu };
                self.tell(Event::SampledSelf { daemon, zram: self.zram });
            }
            Action::ReadPressure => self.tell(Event::Pressure(Pressure {
                total: 2048 * MIB,
                available: 812 * MIB,
                swap_total: 1024 * MIB,
                swap_free: 1024 * MIB,
                ..Pressure::default()
            })),
            Action::Inspect(target) => self.tell(Event::Inspected(target, Ok(Vec::new()))),
            Action::Freeze(target) => self.done(target, Outcome::Frozen { took }),
            Action::Thaw(target) => self.done(target, Outcome::Thawed { took }),
            Action::PageOut(target) => {
                let app = self.app_of(target).unwrap();
                let running = self.running.get_mut(&app).unwrap();
                // Half of what is anonymous goes, and compresses to a third.
                let out = running.sample.anon / 2;
                running.sample.anon -= out;
                running.sample.memory.pss -= out;
                running.sample.memory.uss -= out;
                running.sample.memory.swap += out;
                self.zram.used += out / 3;
                self.zram.stored += out;
                self.done(target, Outcome::PagedOut { freed: out, zram: out / 3, source: ZramSource::Measured, took });
            }
            Action::Kill { target, .. } => {
                let app = self.app_of(target).unwrap();
                self.ends(&app);
            }
            Action::Start(app) => self.starts(&app),
            Action::Call { ticket, .. } => {
                self.secs += 0.05;
                self.tell(Event::Bus(BusEvent::CallDone(ticket, CallOutcome::Accepted)));
            }
            Action::Store(op, ticket) => self.store(op, ticket),
            Action::Reply(call, reply) => {
                self.replies.insert(call, reply);
            }
            _ => {}
        }
    }

    fn store(&mut self, op: StoreOp, ticket: Option<nightporter::event::StoreTicket>) {
        match op {
            StoreOp::PutHistory(rows) => {
                self.put += 1;
                self.stored.extend(rows.iter().cloned());
            }
            StoreOp::LoadHistory(since) => {
                let ticket = ticket.expect("its answer has a ticket");
                match &mut self.mute {
                    Some(asked) => asked.push(ticket),
                    None => {
                        let rows = self.stored.iter().filter(|row| row.at >= since).cloned().collect();
                        self.tell(Event::History(ticket, Ok(rows)));
                    }
                }
                return;
            }
            StoreOp::PutUpstream { upstream, key, value } => {
                self.values.insert((upstream, key), value);
            }
            StoreOp::PutApp(record) => {
                self.records.insert(record.app.clone(), record);
            }
            _ => {}
        }
        if let Some(ticket) = ticket {
            self.tell(Event::Stored(ticket, Ok(())));
        }
    }

    fn starts(&mut self, app: &AppKey) {
        self.next += 1;
        let (owner, target) = (Owner(format!(":1.{}", self.next).into()), TargetId(self.next));
        self.running.insert(app.clone(), Running { target, sample: self.costs[app] });
        self.tell(Event::Bus(BusEvent::OwnerChanged(app.clone(), Some(owner.clone()))));
        let facts = ProcessFacts {
            pid: u32::try_from(self.next).unwrap(),
            freezer: Freezer::Cgroup2,
            can_page_out: true,
            protected: None,
        };
        self.tell(Event::Identified { app: app.clone(), owner, process: Ok((target, facts)) });
        self.tell(Event::Bus(BusEvent::Startable(app.clone(), true)));
    }

    fn ends(&mut self, app: &AppKey) {
        let running = self.running.remove(app).unwrap();
        self.tell(Event::Bus(BusEvent::OwnerChanged(app.clone(), None)));
        self.tell(Event::TargetGone(running.target));
    }

    fn declare(&mut self, app: &AppKey, claim: Claim) {
        let Bus::Session(uid) = app.bus else { panic!() };
        let request = Request::Declare { service: Some(Arc::clone(&app.service)), claim };
        assert_eq!(self.ask(user(app.bus, uid), request), Reply::Done);
    }

    fn ask(&mut self, caller: Caller, request: Request) -> Reply {
        let call = self.call(caller, request);
        self.replies.remove(&call).unwrap()
    }

    fn call(&mut self, caller: Caller, request: Request) -> CallId {
        self.next += 1;
        let call = CallId(self.next);
        self.tell(Event::Bus(BusEvent::Call { call, caller, request }));
        call
    }

    fn read<T: DeserializeOwned>(&mut self, caller: Caller, query: Query) -> T {
        let Reply::Json(text) = self.ask(caller, Request::Query(query)) else { panic!("no document") };
        serde_json::from_str(&text).unwrap()
    }

    fn mine<T: DeserializeOwned>(&mut self, query: Query) -> T {
        self.read(user(BUSES[0], 1000), query)
    }

    fn push(&mut self, id: u64, version: &str) {
        let frame = json!({
            "messageType": "notification", "channelID": format!("channel{id}"), "data": "aGk", "version": version,
        });
        self.tell(Event::Link(self.link, LinkEvent::Text(frame.to_string())));
    }

    /// Until so many seconds have passed since the start. The server pings every four minutes.
    fn until(&mut self, secs: u64) {
        let end = secs as f64;
        loop {
            let tick = self.core.poll_timeout().map(|at| (at.as_nanos() - 1_000_000_000_000) as f64 / 1e9 + 1e-6);
            let tick = tick.unwrap_or(f64::MAX).max(self.secs);
            let next = tick.min(self.ping);
            if next > end {
                break;
            }
            self.secs = self.secs.max(next);
            if next == self.ping {
                self.ping += 240.0;
                self.tell(Event::Link(self.link, LinkEvent::Ping));
            } else {
                self.tell(Event::Tick);
            }
        }
        self.secs = self.secs.max(end);
    }

    fn did(&mut self) -> Vec<String> {
        std::mem::take(&mut self.did)
    }
}

/// Chat is used for an hour and gets a message in the fourth; mail is used all the time.
fn day(world: &mut World) {
    world.starts(&chat());
    world.starts(&mail());
    world.starts(&other());
    for app in [chat(), mail(), other()] {
        world.declare(&app, Claim::Foreground);
    }
    world.until(HOUR);
    world.declare(&chat(), Claim::Background);
    world.declare(&other(), Claim::Background);
    world.until(4 * HOUR);
    world.push(1, "v1");
    world.until(8 * HOUR);
}

#[test]
fn a_day_under_observe_is_told_and_nothing_is_touched() {
    let mut world = World::new(Profile::Observe);
    world.did();
    day(&mut world);
    let did = world.did();
    for action in ["Freeze", "Thaw", "PageOut", "Kill", "CallClient", "StayAwake"] {
        assert!(!did.iter().any(|did| did == action), "{action}");
    }
    let shown: view::WhatIf = world.mine(Query::WhatIf { hours: 24 });
    assert_eq!(shown.profile, Profile::Observe);
    assert!((shown.hours - 8.0).abs() < 0.01, "{}", shown.hours);
    assert_eq!(shown.apps.iter().map(|app| &*app.name).collect::<Vec<_>>(), ["org.example.Chat", "org.example.Mail"]);
    let told = |app: &view::WhatIfApp| -> Vec<(String, u64, u64)> {
        app.spans.iter().map(|span| (span.state.clone(), span.secs, span.saved / MIB)).collect()
    };
    // 10 s of grace, page-out after 60 s, tombstone after 10 min, a window of 10 s after the message.
    let span = |state: &str, secs, saved| (state.to_owned(), secs, saved);
    let chat = told(&shown.apps[0]);
    let expected = [
        span("frozen", 60, 0),
        span("reclaimed", 600 - 70, 30),
        span("tombstone", 3 * HOUR - 600, 60),
        span("frozen", 60, 0),
        span("reclaimed", 600 - 60, 30),
        span("tombstone", 4 * HOUR - 610, 60),
    ];
    assert_eq!(chat.len(), expected.len(), "{chat:?}");
    for (told, expected) in chat.iter().zip(&expected) {
        assert_eq!((&told.0, told.2), (&expected.0, expected.2), "{chat:?}");
        assert!(told.1.abs_diff(expected.1) <= 12, "{told:?} for {expected:?}");
    }
    let reasons: Vec<&str> = shown.apps[0].spans.iter().map(|span| &*span.reason).collect();
    assert!(reasons[0].contains("in the background for 10 s"), "{reasons:?}");
    assert!(reasons[1].contains("frozen for") && reasons[2].contains("without a message"), "{reasons:?}");
    assert_eq!(shown.apps[1].spans, []);
    assert!(shown.apps[1].kept_by.as_deref().unwrap().contains("in the foreground"), "{:?}", shown.apps[1].kept_by);
    let sum: f64 = chat.iter().map(|(_, secs, mib)| *secs as f64 / 3600.0 * *mib as f64).sum();
    assert!((shown.saved_mib_hours - sum).abs() < sum / 50.0, "{} for {sum}", shown.saved_mib_hours);
    assert!((shown.saved_mean as f64 - sum / shown.hours * 1024.0).abs() < sum * 50.0);
    assert_eq!((shown.compression, shown.compression_measured), (2.0, false));

    // What is stored by the end of the daemon is what the next one tells.
    world.tell(Event::Shutdown);
    let stored = std::mem::take(&mut world.stored);
    let mut next = World::new(Profile::Observe);
    next.stored = stored;
    next.until(9 * HOUR);
    let again: view::WhatIf = next.mine(Query::WhatIf { hours: 24 });
    assert_eq!(told(&again.apps[0]).len(), chat.len(), "{:?}", again.apps[0]);
    assert!((again.saved_mib_hours - shown.saved_mib_hours).abs() < 1.0);
    let late: view::WhatIf = next.mine(Query::WhatIf { hours: 2 });
    assert_eq!(late.apps[0].spans.len(), 1, "the last of the night before: {late:?}");

    let theirs: view::WhatIf = next.read(user(BUSES[1], 1001), Query::WhatIf { hours: 24 });
    assert_eq!(theirs.apps.iter().map(|app| &*app.name).collect::<Vec<_>>(), ["org.example.Other"]);
    assert!(!theirs.apps[0].spans.is_empty());
}

#[test]
fn a_day_of_tombstones_is_accounted_for() {
    let mut world = World::new(Profile::Tombstone);
    world.until(5);
    day(&mut world);
    let report: view::Report = world.mine(Query::Report);
    let [chat_row, mail_row] = &report.apps[..] else { panic!("{report:?}") };
    assert_eq!((&*chat_row.state, &*mail_row.state), ("tombstone", "foreground"));
    // A baseline with its circumstances; of it count what is anonymous and what the kernel has for it.
    let conditions = chat_row.conditions.as_deref().unwrap();
    assert!(conditions.contains("in the background, 1 other app running, 812 of 2048 MiB available"), "{conditions}");
    assert_eq!(chat_row.saved, Some((60 * MIB + 512) as i64));
    assert_eq!((chat_row.cache, chat_row.kernel), (20 * MIB as i64, 512));
    assert_eq!(mail_row.resident, None, "it was never at rest");
    assert_eq!(report.saved, chat_row.saved.unwrap() - (4 * MIB + 64) as i64);
    assert_eq!((report.sockets, report.unmeasured), (64, 1));
    assert_eq!(mail_row.charged.unwrap().kernel, 512);
    let account = report.account.as_ref().unwrap();
    assert!((account.hours - 8.0).abs() < 0.01);
    assert_eq!((account.connections, account.connections_replaced), (1, 2));
    assert!(account.heartbeats > 0);
    assert!(
        account.heartbeats_replaced.abs_diff(2 * account.heartbeats) <= 2,
        "two of the three apps are theirs: {account:?}"
    );
    // Frozen for a minute, then half of it at a third, then all of it, twice.
    let paged = 60.0 - 30.0 - 10.0;
    let whole = 60.5;
    let mib_hours = (2.0 * paged * 540.0 + whole * (7.0 * 3600.0 - 1200.0)) / 3600.0;
    let off = (chat_row.saved_mib_hours - mib_hours).abs();
    assert!(off < mib_hours / 50.0, "{} for {mib_hours}", chat_row.saved_mib_hours);
    let daemon = (4.0 + 64.0 / 1024.0) * 8.0;
    assert!((account.saved_mib_hours - (chat_row.saved_mib_hours - daemon)).abs() < 0.1, "{account:?}");
    let wakes: BTreeMap<&str, u64> = account.wakes.iter().map(|stats| (&*stats.from, stats.count)).collect();
    assert_eq!(wakes, BTreeMap::from([("running", 0), ("frozen", 0), ("reclaimed", 0), ("tombstone", 1)]));
    assert_eq!((chat_row.wakes, account.daemon_cpu_ms), (1, 8 * HOUR));

    let history: view::History = world.mine(Query::History { hours: 24 });
    let states: Vec<&str> = history.apps[0].points.iter().map(|point| &*point.state).collect();
    assert_eq!(history.apps[0].name, "org.example.Chat");
    let lasting: Vec<&str> =
        states.iter().copied().filter(|state| ["frozen", "reclaimed", "tombstone"].contains(state)).collect();
    assert_eq!(lasting, ["frozen", "reclaimed", "tombstone", "frozen", "reclaimed", "tombstone"], "{states:?}");
    let reclaimed = history.apps[0].points.iter().find(|point| point.state == "reclaimed").unwrap();
    assert_eq!((reclaimed.pss, reclaimed.zram), (Some(50 * MIB), 10 * MIB));
    assert_eq!(reclaimed.saved, Some(20 * MIB as i64));
    assert!(!history.totals.is_empty() && history.totals.iter().all(|at| at.total.apps == 2), "{:?}", history.totals);
    assert_eq!(history.totals.iter().map(|at| at.total.messages).sum::<u32>(), 1);
    assert_eq!((history.wakes.len(), &*history.wakes[0].from), (1, "tombstone"));
    assert!(!serde_json::to_string(&history).unwrap().contains("Other"));
    // All there is for root, in one sum.
    let root = user(Bus::System, 0);
    let all: view::History = world.read(root, Query::History { hours: 24 });
    assert!(all.totals.iter().all(|at| at.total.apps == 3) && all.apps.len() == 3, "{all:?}");
    // An hour ago nothing was as yet, or again.
    let late: view::History = world.mine(Query::History { hours: 0 });
    assert_eq!(late.apps, []);
}

#[test]
fn what_a_wake_costs_is_found_at_the_next_freeze() {
    let mut world = World::new(Profile::Cached);
    world.starts(&chat());
    world.declare(&chat(), Claim::Background);
    world.until(300);
    let run = |world: &mut World, cpu, faults| {
        let running = world.running.get_mut(&chat()).unwrap();
        running.sample.cpu += Duration::from_millis(cpu);
        running.sample.faults += faults;
    };
    world.push(1, "v1");
    run(&mut world, 120, 900);
    world.until(600);
    world.push(1, "v2");
    run(&mut world, 80, 100);
    world.declare(&chat(), Claim::Foreground);
    run(&mut world, 5_000, 10_000);
    world.declare(&chat(), Claim::Background);
    world.until(900);
    let report: view::Report = world.mine(Query::Report);
    let stats = report.account.unwrap().wakes.into_iter().find(|stats| stats.from == "reclaimed").unwrap();
    assert_eq!((stats.count, stats.cpu_ms, stats.faults), (2, 120, 900), "the second was for the user");
    assert!(stats.p50_ms >= 50 && stats.max_ms < 1000, "{stats:?}");
    assert_eq!((report.apps[0].wakes, report.apps[0].wake_cpu_ms, report.apps[0].wake_faults), (2, 120, 900));
    world.tell(Event::Shutdown);
    let wakes: Vec<Option<u32>> = world
        .stored
        .iter()
        .filter_map(|row| if let History::Wake { cpu, .. } = &row.what { Some(*cpu) } else { None })
        .collect();
    assert_eq!(wakes, [Some(120), None]);
}

#[test]
fn while_nothing_happens_nothing_is_measured_or_written() {
    let mut world = World::new(Profile::Tombstone);
    day(&mut world);
    world.until(9 * HOUR);
    world.did();
    let put = world.put;
    world.until(40 * HOUR);
    let did = world.did();
    for action in ["Sample", "SampleSelf", "Store", "ReadPressure", "Inspect"] {
        assert!(!did.iter().any(|did| did == action), "{action}: {did:?}");
    }
    assert_eq!(world.put, put);
    // What waits goes with the next thing that happens.
    world.declare(&mail(), Claim::Background);
    world.until(40 * HOUR + 1200);
    assert!(world.put > put);
}

#[test]
fn a_flood_of_changes_writes_little() {
    let mut world = World::new(Profile::Observe);
    world.starts(&chat());
    for n in 0..2000 {
        world.declare(&chat(), if n % 2 == 0 { Claim::Foreground } else { Claim::Background });
        world.push(1, &format!("v{n}"));
        world.secs += 0.1;
    }
    world.tell(Event::Shutdown);
    assert!(world.stored.len() <= 40, "{} rows in 300 s", world.stored.len());
    assert!(world.did().iter().filter(|did| *did == "SampleSelf").count() <= 2);
}

#[test]
fn a_baseline_outlives_the_daemon_with_all_that_counts_of_it() {
    let mut world = World::new(Profile::Tombstone);
    world.starts(&chat());
    world.declare(&chat(), Claim::Background);
    world.until(HOUR);
    let before: view::Report = world.mine(Query::Report);
    let upstreams = world.values.iter().map(|((upstream, key), value)| (upstream.clone(), key.clone(), value.clone()));
    let kept = Snapshot {
        apps: world.records.values().cloned().collect(),
        upstreams: upstreams.collect(),
        ..Snapshot::default()
    };
    let mut next = World::with(Profile::Tombstone, kept);
    next.until(10);
    let after: view::Report = next.mine(Query::Report);
    let figures = |row: &view::LedgerRow| (row.resident, row.measured.clone(), row.conditions.clone(), row.saved);
    assert_eq!(figures(&before.apps[0]), figures(&after.apps[0]));
    assert_eq!(after.apps[0].saved, Some((60 * MIB + 512) as i64));
}

#[test]
fn who_may_not_read_gets_no_history_and_a_store_that_hangs_holds_few() {
    let mut world = World::new(Profile::Observe);
    let queries = [Query::History { hours: 24 }, Query::WhatIf { hours: 24 }];
    for query in &queries {
        let app = Caller { app_id: Some(Arc::clone(&mail().service)), ..user(BUSES[0], 1000) };
        let reply = world.ask(app, Request::Query(query.clone()));
        assert!(matches!(reply, Reply::Authorize { .. }), "{reply:?}");
        let refused = Caller { authorization: Authorization::Refused("no".into()), ..user(BUSES[0], 1001) };
        let reply = world.ask(refused, Request::Query(query.clone()));
        assert!(matches!(reply, Reply::Error(ErrorKind::NotAuthorized, _)), "{reply:?}");
    }
    world.mute = Some(Vec::new());
    let calls: Vec<CallId> =
        (0..9).map(|n| world.call(user(BUSES[0], 1000), Request::Query(queries[n % 2].clone()))).collect();
    assert!(matches!(world.replies.remove(&calls[8]), Some(Reply::Error(ErrorKind::LimitsExceeded, _))));
    assert!(world.replies.is_empty());
    let asked = world.mute.take().unwrap();
    world.tell(Event::History(asked[0], Err(StoreError::Other("the disk is on fire".into()))));
    let Some(Reply::Error(ErrorKind::Failed, text)) = world.replies.remove(&calls[0]) else { panic!() };
    assert!(text.contains("on fire"));
    for ticket in &asked[1..] {
        world.tell(Event::History(*ticket, Ok(Vec::new())));
        world.tell(Event::History(*ticket, Ok(Vec::new())));
    }
    assert_eq!(world.replies.len(), 7);
    let _: view::WhatIf = world.mine(Query::WhatIf { hours: u32::MAX });
}
