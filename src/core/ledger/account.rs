//! What was saved and paid since the daemon started: memory over time, heartbeats, and what waking apps cost.
//!
//! Pure sums over what is known anyway. Memory: the rate that held since the last measurement or transition, times how long
//! that was. Heartbeats: the rhythm of each connection that stands, times how long it stood; what the apps would have
//! cost by themselves is the same rhythm, once for each. A wake: how long the message took to be accepted, and the processor
//! time and major faults between the last measurement before it and the one at the next freeze, which is taken anyway. An
//! app that its user brings to the front meanwhile costs what it costs for the user, and an instance that was started
//! began with nothing.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    model::{AppKey, Bus, History, HistoryRow, Sample, Urgency},
    time::{Instant, Now, UnixTime},
    view::{self, LedgerRow, WakeStats},
};

const KIB_MS_PER_MIB_HOUR: f64 = 1024.0 * 3_600_000.0;
/// Upstreams of which heartbeats are counted; there are a handful.
const UPSTREAMS: usize = 256;
/// Values below this have a bucket of their own; above it each doubling has [`PARTS`].
const EXACT: u32 = 16;
const PARTS: u32 = 8;

/// The account of all apps, by user.
#[derive(Clone, Debug)]
pub struct Account {
    since: Now,
    daemon: Meter,
    /// Whether `daemon` was ever told what the daemon costs.
    metered: bool,
    apps: BTreeMap<AppKey, App>,
    upstreams: BTreeMap<usize, Beats>,
    wakes: BTreeMap<Bus, [Wakes; 4]>,
}

/// A message has reached its app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// The app's lifecycle state when the message came, as [`view::App`] has it.
    pub from: &'static str,
    /// From then, or from when it was let go of, to the app's acceptance.
    pub took: Duration,
    /// RFC 8030 §5.3.
    pub urgency: Urgency,
}

/// The states of [`WakeStats`], in this order.
const FROM: [&str; 4] = ["running", "frozen", "reclaimed", "tombstone"];

fn category(state: &str) -> usize {
    match state {
        "freezing" | "frozen" => 1,
        "reclaimed" => 2,
        "ending" | "tombstone" | "gone" => 3,
        _ => 0,
    }
}

/// An integral over time, of KiB.
#[derive(Clone, Copy, Debug, Default)]
struct Meter {
    rate: i64,
    since: Instant,
    /// KiB times milliseconds.
    sum: i128,
}

impl Meter {
    fn at(&self, now: Instant) -> i128 {
        let passed = i128::try_from(now.since(self.since).as_millis()).unwrap_or(i128::MAX);
        self.sum.saturating_add(i128::from(self.rate).saturating_mul(passed))
    }

    fn set(&mut self, rate: i64, now: Instant) {
        *self = Self { rate, since: now, sum: self.at(now) };
    }
}

#[derive(Clone, Debug, Default)]
struct App {
    saved: Meter,
    /// Processor time and faults of its instance at the last measurement; none: not measured.
    last: Option<(Duration, u64)>,
    /// The wake whose cost is not known yet.
    open: Option<Open>,
    wakes: u64,
    cpu: Duration,
    faults: u64,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    at: UnixTime,
    reached: Reached,
    /// What the instance had used before; none: not known.
    before: Option<(Duration, u64)>,
}

#[derive(Clone, Debug, Default)]
struct Beats {
    since: Instant,
    interval: Option<Duration>,
    apps: BTreeMap<Bus, u32>,
    ours: f64,
    replaced: BTreeMap<Bus, f64>,
}

#[derive(Clone, Debug, Default)]
struct Wakes {
    took: Histogram,
    cpu: Duration,
    faults: u64,
}

impl Account {
    /// Nothing is saved or paid yet.
    pub fn new(now: Now) -> Self {
        Self {
            since: now,
            daemon: Meter { since: now.boot, ..Meter::default() },
            metered: false,
            apps: BTreeMap::new(),
            upstreams: BTreeMap::new(),
            wakes: BTreeMap::new(),
        }
    }

    /// Since when it counts.
    pub const fn since(&self) -> Now {
        self.since
    }

    /// From now on so many KiB are saved on the app.
    pub fn rate(&mut self, app: &AppKey, saved: i64, now: Instant) {
        match self.apps.get_mut(app) {
            Some(app) => app.saved.set(saved, now),
            None => {
                let saved = Meter { rate: saved, since: now, sum: 0 };
                self.apps.insert(app.clone(), App { saved, ..App::default() });
            }
        }
    }

    /// From now on the daemon costs so many KiB; the first time, since it started.
    pub fn daemon(&mut self, cost: u64, now: Instant) {
        let cost = i64::try_from(cost).unwrap_or(i64::MAX);
        if !std::mem::replace(&mut self.metered, true) {
            self.daemon.rate = cost;
        }
        self.daemon.set(cost, now);
    }

    /// An app took a message. What the history gets now, if not later.
    pub fn reached(&mut self, app: &AppKey, reached: Reached, now: Now) -> Option<HistoryRow> {
        let from = category(reached.from);
        let stats = self.wakes.entry(app.bus).or_default();
        stats[from].took.add(millis(reached.took));
        let row = || wake(app, now.wall, reached, None);
        if from == 0 {
            return Some(row());
        }
        let entry = self.apps.entry(app.clone()).or_default();
        if entry.open.is_some() {
            // It came while the app was being woken for another, which bears the cost of both.
            return Some(row());
        }
        entry.wakes = entry.wakes.saturating_add(1);
        let before = if from == 3 { Some((Duration::ZERO, 0)) } else { entry.last };
        entry.open = Some(Open { at: now.wall, reached, before });
        None
    }

    /// An app was measured; `held`: because it is about to be held still, or is.
    pub fn sampled(&mut self, app: &AppKey, sample: &Sample, held: bool) -> Option<HistoryRow> {
        let key = app;
        let app = self.apps.entry(key.clone()).or_default();
        app.last = Some((sample.cpu, sample.faults));
        let Open { at, reached, before } = app.open.take_if(|_| held)?;
        let cost = before.map(|(cpu, faults)| (sample.cpu.saturating_sub(cpu), sample.faults.saturating_sub(faults)));
        if let Some((cpu, faults)) = cost {
            app.cpu = app.cpu.saturating_add(cpu);
            app.faults = app.faults.saturating_add(faults);
            let stats = &mut self.wakes.entry(key.bus).or_default()[category(reached.from)];
            stats.cpu = stats.cpu.saturating_add(cpu);
            stats.faults = stats.faults.saturating_add(faults);
        }
        Some(wake(key, at, reached, cost))
    }

    /// What the app does now is not for the message alone, or it has ended: what the wake cost will not be known.
    pub fn give_up(&mut self, app: &AppKey) -> Option<HistoryRow> {
        let Open { at, reached, .. } = self.apps.get_mut(app)?.open.take()?;
        Some(wake(app, at, reached, None))
    }

    /// The app's instance has ended: the next one begins with nothing.
    pub fn gone(&mut self, app: &AppKey) -> Option<HistoryRow> {
        let row = self.give_up(app);
        if let Some(app) = self.apps.get_mut(app) {
            app.last = None;
        }
        row
    }

    /// All wakes whose cost is not known yet: the daemon ends.
    pub fn give_all_up(&mut self) -> Vec<HistoryRow> {
        let open: Vec<AppKey> =
            self.apps.iter().filter(|(_, app)| app.open.is_some()).map(|(key, _)| key.clone()).collect();
        open.iter().filter_map(|app| self.give_up(app)).collect()
    }

    /// The rhythm of an upstream's connection from now on, none while there is no connection, and the apps it serves on
    /// each bus.
    pub fn beats(&mut self, upstream: usize, interval: Option<Duration>, apps: BTreeMap<Bus, u32>, now: Instant) {
        if !self.upstreams.contains_key(&upstream) && self.upstreams.len() >= UPSTREAMS {
            return;
        }
        let beats = self.upstreams.entry(upstream).or_insert_with(|| Beats { since: now, ..Beats::default() });
        beats.go_on(now);
        (beats.interval, beats.apps) = (interval, apps);
    }

    /// Nothing is kept of the app any more.
    pub fn remove(&mut self, app: &AppKey) {
        self.apps.remove(app);
    }

    /// Nothing is kept of this bus any more.
    pub fn forget(&mut self, bus: Bus) {
        self.apps.retain(|app, _| app.bus != bus);
        self.wakes.remove(&bus);
        for beats in self.upstreams.values_mut() {
            beats.replaced.remove(&bus);
            beats.apps.remove(&bus);
        }
    }

    /// Fills in what the account knows of the app.
    pub fn fill(&self, app: &AppKey, row: &mut LedgerRow, now: Instant) {
        let Some(app) = self.apps.get(app) else { return };
        row.saved_mib_hours = mib_hours(app.saved.at(now));
        row.wakes = app.wakes;
        row.wake_cpu_ms = long_millis(app.cpu);
        row.wake_faults = app.faults;
    }

    /// What is shown to who sees these buses, and these upstreams; what the core knows besides is left empty.
    pub fn view(&self, sees: impl Fn(Bus) -> bool, upstream: impl Fn(usize) -> bool, now: Now) -> view::Account {
        let apps = self.apps.iter().filter(|(app, _)| sees(app.bus));
        let saved = apps.fold(0i128, |sum, (_, app)| sum.saturating_add(app.saved.at(now.boot)));
        let (mut ours, mut replaced) = (0.0, 0.0);
        for (_, beats) in self.upstreams.iter().filter(|(index, _)| upstream(**index)) {
            let mut beats = beats.clone();
            beats.go_on(now.boot);
            ours += beats.ours;
            replaced += beats.replaced.iter().filter(|(bus, _)| sees(**bus)).map(|(_, beats)| beats).sum::<f64>();
        }
        let mut wakes: [Wakes; 4] = Default::default();
        for (_, of_bus) in self.wakes.iter().filter(|(bus, _)| sees(**bus)) {
            wakes.iter_mut().zip(of_bus).for_each(|(sum, one)| sum.add(one));
        }
        view::Account {
            since: self.since.wall.to_string(),
            hours: now.boot.since(self.since.boot).as_secs_f64() / 3600.0,
            saved_mib_hours: mib_hours(saved.saturating_sub(self.daemon.at(now.boot))),
            heartbeats: ours as u64,
            heartbeats_replaced: replaced as u64,
            wakes: FROM.iter().zip(&wakes).map(|(from, wakes)| wakes.view(from)).collect(),
            ..view::Account::default()
        }
    }
}

impl Beats {
    fn go_on(&mut self, now: Instant) {
        let passed = now.since(self.since).as_secs_f64();
        self.since = now;
        let Some(interval) = self.interval.filter(|interval| !interval.is_zero()) else { return };
        let beats = passed / interval.as_secs_f64();
        self.ours += beats;
        for (bus, apps) in &self.apps {
            *self.replaced.entry(*bus).or_default() += beats * f64::from(*apps);
        }
    }
}

impl Wakes {
    fn add(&mut self, other: &Self) {
        self.took.merge(&other.took);
        self.cpu = self.cpu.saturating_add(other.cpu);
        self.faults = self.faults.saturating_add(other.faults);
    }

    fn view(&self, from: &str) -> WakeStats {
        WakeStats {
            from: from.to_owned(),
            count: self.took.count,
            p50_ms: self.took.quantile(50),
            p95_ms: self.took.quantile(95),
            max_ms: self.took.max,
            cpu_ms: long_millis(self.cpu),
            faults: self.faults,
        }
    }
}

/// Counts by size, in buckets that are an eighth of a doubling wide: 240 at most.
#[derive(Clone, Debug, Default)]
struct Histogram {
    buckets: BTreeMap<u32, u64>,
    count: u64,
    max: u32,
}

impl Histogram {
    fn add(&mut self, value: u32) {
        let count = self.buckets.entry(bucket(value)).or_default();
        *count = count.saturating_add(1);
        self.count = self.count.saturating_add(1);
        self.max = self.max.max(value);
    }

    fn merge(&mut self, other: &Self) {
        for (bucket, count) in &other.buckets {
            let sum = self.buckets.entry(*bucket).or_default();
            *sum = sum.saturating_add(*count);
        }
        self.count = self.count.saturating_add(other.count);
        self.max = self.max.max(other.max);
    }

    /// At most so many percent of all are above it: exact below 16, else at most an eighth too much.
    fn quantile(&self, percent: u64) -> u32 {
        let rank = (u128::from(self.count) * u128::from(percent)).div_ceil(100);
        let mut below = 0;
        for (bucket, count) in &self.buckets {
            below += u128::from(*count);
            if below >= rank {
                return most(*bucket).min(self.max);
            }
        }
        self.max
    }
}

/// The bucket a value is in.
fn bucket(value: u32) -> u32 {
    if value < EXACT {
        return value;
    }
    let doubling = value.ilog2();
    EXACT + (doubling - EXACT.ilog2()) * PARTS + (value >> (doubling - PARTS.ilog2())) % PARTS
}

/// The largest value of a bucket.
fn most(bucket: u32) -> u32 {
    let Some(above) = bucket.checked_sub(EXACT) else { return bucket };
    let shift = above / PARTS + EXACT.ilog2() - PARTS.ilog2();
    let end = u64::from(PARTS + above % PARTS + 1) << shift;
    u32::try_from(end - 1).unwrap_or(u32::MAX)
}

fn wake(app: &AppKey, at: UnixTime, reached: Reached, cost: Option<(Duration, u64)>) -> HistoryRow {
    let what = History::Wake {
        app: app.clone(),
        from: Arc::from(reached.from),
        took: millis(reached.took),
        urgency: reached.urgency,
        cpu: cost.map(|(cpu, _)| millis(cpu)),
        faults: cost.map(|(_, faults)| u32::try_from(faults).unwrap_or(u32::MAX)),
    };
    HistoryRow { at, span: 0, what }
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

fn long_millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn mib_hours(sum: i128) -> f64 {
    sum as f64 / KIB_MS_PER_MIB_HOUR
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Memory;

    const BUS: Bus = Bus::Session(1000);

    fn at(secs: u64) -> Now {
        Now { boot: Instant::from_nanos(secs * 1_000_000_000), wall: UnixTime::from_secs(1_000_000 + secs) }
    }

    fn key(name: &str) -> AppKey {
        AppKey::new(BUS, name)
    }

    fn view(account: &Account, secs: u64) -> view::Account {
        account.view(|bus| bus == BUS, |_| true, at(secs))
    }

    fn reached(from: &'static str, took: u64) -> Reached {
        Reached { from, took: Duration::from_millis(took), urgency: Urgency::Normal }
    }

    fn used(cpu: u64, faults: u64) -> Sample {
        Sample { cpu: Duration::from_millis(cpu), faults, ..Sample::from(Memory::default()) }
    }

    #[test]
    fn memory_over_time_is_the_rate_times_how_long_it_held_less_the_daemon() {
        let mut account = Account::new(at(0));
        let (a, b) = (key("org.a"), key("org.b"));
        account.rate(&a, 100 * 1024, at(3600).boot);
        account.rate(&b, -10 * 1024, at(3600).boot);
        account.rate(&a, 0, at(3600 + 1800).boot);
        let mut row = LedgerRow { saved_mib_hours: 7.0, ..crate::core::ledger::Ledger::default().row(&a, "gone") };
        account.fill(&a, &mut row, at(7200).boot);
        assert!((row.saved_mib_hours - 50.0).abs() < 1e-9, "{row:?}");
        // It was measured late, and cost as much before; the change counts from then on.
        account.daemon(2 * 1024, at(3600).boot);
        account.daemon(4 * 1024, at(5400).boot);
        let shown = view(&account, 7200);
        assert!((shown.saved_mib_hours - (50.0 - 10.0 - 3.0 - 2.0)).abs() < 1e-9, "{shown:?}");
        assert_eq!((shown.hours, &*shown.since), (2.0, &*at(0).wall.to_string()));
        account.remove(&b);
        assert!((view(&account, 7200).saved_mib_hours - 45.0).abs() < 1e-9);
    }

    #[test]
    fn heartbeats_are_counted_while_there_is_a_connection_once_for_us_and_once_for_each_app() {
        let mut account = Account::new(at(0));
        let minute = Some(Duration::from_secs(60));
        account.beats(0, minute, BTreeMap::from([(BUS, 3), (Bus::Session(1001), 5)]), at(0).boot);
        account.beats(1, Some(Duration::from_secs(300)), BTreeMap::from([(BUS, 1)]), at(0).boot);
        account.beats(0, None, BTreeMap::from([(BUS, 3)]), at(600).boot);
        account.beats(0, minute, BTreeMap::from([(BUS, 4)]), at(1200).boot);
        let shown = view(&account, 1800);
        assert_eq!((shown.heartbeats, shown.heartbeats_replaced), (10 + 10 + 6, 30 + 40 + 6));
        let one = account.view(|bus| bus == BUS, |upstream| upstream == 1, at(1800));
        assert_eq!((one.heartbeats, one.heartbeats_replaced), (6, 6));
        let other = account.view(|bus| bus == Bus::Session(1001), |_| true, at(1800));
        assert_eq!((other.heartbeats, other.heartbeats_replaced), (26, 50));
    }

    #[test]
    fn a_wake_costs_what_is_used_between_the_measurement_before_and_the_next_freeze() {
        let mut account = Account::new(at(0));
        let a = key("org.a");
        assert_eq!(account.sampled(&a, &used(1000, 10), true), None);
        assert_eq!(account.reached(&a, reached("frozen", 30), at(10)), None, "its cost is not known yet");
        assert!(account.reached(&a, reached("frozen", 31), at(10)).is_some(), "two messages, one wake");
        assert!(account.reached(&a, reached("awake", 2), at(11)).is_some(), "it runs");
        assert_eq!(account.sampled(&a, &used(1100, 14), false), None, "a report");
        let row = account.sampled(&a, &used(1250, 25), true).unwrap();
        assert_eq!(row.at, at(10).wall);
        let History::Wake { cpu, faults, took, from, .. } = row.what else { panic!() };
        assert_eq!((cpu, faults, took, &*from), (Some(250), Some(15), 30, "frozen"));
        // Killed, and started for a message: all it has used was for that.
        assert_eq!(account.gone(&a), None);
        account.reached(&a, reached("tombstone", 900), at(20));
        account.sampled(&a, &used(400, 70), true).unwrap();
        // In front it is used.
        account.reached(&a, reached("reclaimed", 90), at(30));
        assert!(account.give_up(&a).is_some());
        assert_eq!(account.sampled(&a, &used(90_000, 700), true), None);
        // Not measured before: not known.
        let b = key("org.b");
        account.reached(&b, reached("frozen", 40), at(40));
        let History::Wake { cpu, .. } = account.sampled(&b, &used(5, 5), true).unwrap().what else { panic!() };
        assert_eq!(cpu, None);
        let shown = view(&account, 50);
        let stats: Vec<_> = shown.wakes.iter().map(|s| (&*s.from, s.count, s.max_ms, s.cpu_ms, s.faults)).collect();
        let expected = [
            ("running", 1, 2, 0, 0),
            ("frozen", 3, 40, 250, 15),
            ("reclaimed", 1, 90, 0, 0),
            ("tombstone", 1, 900, 400, 70),
        ];
        assert_eq!(stats, expected);
        let mut row = crate::core::ledger::Ledger::default().row(&a, "gone");
        account.fill(&a, &mut row, at(50).boot);
        assert_eq!((row.wakes, row.wake_cpu_ms, row.wake_faults), (3, 650, 85));
        // Another user sees none of it.
        let other = account.view(|bus| bus == Bus::Session(1001), |_| true, at(50));
        assert!(other.wakes.iter().all(|stats| stats.count == 0));
        account.forget(BUS);
        assert!(view(&account, 50).wakes.iter().all(|stats| stats.count == 0));
    }

    proptest! {
        #[test]
        fn quantiles_are_an_eighth_too_much_at_most(mut values in prop::collection::vec(any::<u32>(), 1..200)) {
            let mut histogram = Histogram::default();
            values.iter().for_each(|value| histogram.add(*value));
            values.sort_unstable();
            for percent in [50, 95, 100] {
                let exact = values[(values.len() * percent).div_ceil(100) - 1];
                let shown = histogram.quantile(percent as u64);
                prop_assert!(shown >= exact && u64::from(shown) <= u64::from(exact) + u64::from(exact) / 8, "{shown} for {exact}");
            }
            prop_assert!(histogram.buckets.len() <= 240);
            prop_assert!(histogram.buckets.keys().all(|bucket| *bucket < 240));
        }

        #[test]
        fn buckets_are_in_order_and_hold_what_they_say(value in any::<u32>()) {
            prop_assert!(most(bucket(value)) >= value);
            prop_assert!(bucket(value) == 0 || most(bucket(value) - 1) < value);
        }
    }
}
