//! What each app cost while resident, what it costs now, and what that saves (design.md, "The ledger").
//!
//! # What is counted
//!
//! The claim is to be what `free` would show: memory that is *used* less (MemTotal − MemAvailable), zram included. So of an
//! app count
//!
//! - its anonymous and shared memory: its PSS without `Pss_File`. Apps hardly share it, so the figure does not depend on who
//!   else ran when it was taken;
//! - kernel memory charged to its cgroup (page tables, stacks, slab, sockets), where it has one of its own;
//! - what its swap costs of zram's real memory. Swap itself is never added: it is uncompressed.
//!
//! Pages of files do not count, neither before nor now. They are page cache: the kernel drops them when it needs room,
//! whoever runs, and keeps them when an app ends; and the PSS of the others rises when one of those that share a library
//! goes, so that sums of PSS taken at different times count a library many times over. [`LedgerRow::cache`] says how much
//! of the difference in PSS that is. Where the kernel does not tell files apart (before 5.4) all of the PSS counts.
//!
//! Each byte has one owner (invariant 10): an app's memory is in its row, its share of zram in `zram`, this process (with
//! its file pages: they are nobody else's) in `daemon`, the kernel memory of its connections in `sockets`.
//!
//! An app that runs may shrink and grow by itself, which it would do without us as well: on it only what our page-outs
//! still keep in swap is saved. [`LedgerRow::drift`] is the rest of the difference.
//!
//! # Baselines
//!
//! What an app costs resident is measured when it is in the background and idle, right before the first freeze of each
//! instance. After that it is measured right after every freeze anyway, when it is still as it was a moment before: once
//! the baseline is a day old, or wrong by more than a twentieth, that becomes the new one. What our own page-outs left in
//! swap would be in memory without us and is added. The latest measurement holds, a smaller one too: an instance that was
//! started for a message and shows nothing costs less than the one its user had left, and more is not claimed. But one that
//! is still starting, as its processor time says, only shows that it will be no smaller: it cannot lower the baseline.
//!
//! # zram
//!
//! The kernel does not say how much of zram is whose. The share of an app is what zram grew by during its page-outs,
//! shrunk as its swap shrinks after a thaw, and nothing once it has ended; swap beyond that and beyond the baseline's (the
//! kernel pages out by itself, too) costs what zram's ratio says. Should all shares together be more than zram holds,
//! they are scaled down to that.

mod account;
mod cost;
mod history;
mod whatif;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use self::cost::{Claim, Cost};
pub use self::{
    account::{Account, Reached},
    history::{Journal, Parts},
    whatif::{Compression, Shadows, Window},
};
use crate::{
    model::{AppKey, AppRecord, Bus, Memory, Pressure, Profile, Sample, SelfSample, Total, Zram, ZramSource},
    time::{Instant, Now, UnixTime},
    view::{LedgerRow, Report},
};

/// A baseline older than this is replaced at the next freeze.
const REFRESH_AFTER: Duration = Duration::from_secs(24 * 3600);
/// One that is wrong by more than this part of it, and by more than this many KiB, is replaced at the next freeze.
const REFRESH_PART: u64 = 20;
const REFRESH_LEAST: u64 = 256;
/// A process younger than this that has worked for more than this part of its life is still starting.
const STARTED_AFTER: Duration = Duration::from_secs(120);
const STARTING_PART: u32 = 5;
/// What is known of the machine's memory counts as a condition of a measurement this long.
const MACHINE_FRESH: Duration = Duration::from_secs(60);

/// The memory books of all apps and of the daemon. All figures in KiB.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    rows: BTreeMap<AppKey, Row>,
    daemon: Option<SelfSample>,
    /// Once measured.
    zram: Option<Zram>,
    /// What zram takes at most: as measured, and what our page-outs since then have added.
    zram_most: u64,
    /// The machine's memory, and when that was read.
    machine: Option<(Pressure, Instant)>,
    machine_asked: Option<Instant>,
}

/// When in an app's life a measurement was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// In the background and idle, before the first freeze: the new baseline.
    Resident,
    /// Held still.
    Frozen,
    /// Held still and paged out.
    PagedOut,
    /// Whatever it is doing now.
    Now,
}

/// What it cost resident, when, and under which conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Baseline {
    cost: Cost,
    at: UnixTime,
    conditions: Option<Arc<str>>,
}

#[derive(Clone, Debug, Default)]
struct Row {
    resident: Option<Baseline>,
    frozen: Option<Memory>,
    paged_out: Option<Memory>,
    now: Option<Cost>,
    /// What zram grew by for it, as far as that is still in swap.
    zram: u64,
    /// Its swap when that was right, if known.
    zram_swap: Option<u64>,
    zram_source: Option<ZramSource>,
    /// A page-out left part of it in swap, and nobody measured how much.
    swap_unknown: bool,
}

impl Ledger {
    /// Books with the baselines of an earlier life.
    pub fn new(records: &[AppRecord]) -> Self {
        let rows = records.iter().filter_map(|record| {
            let resident = Baseline {
                cost: Cost { memory: record.resident?, ..Cost::default() },
                at: record.measured.unwrap_or_default(),
                conditions: record.conditions.clone(),
            };
            Some((record.app.clone(), Row { resident: Some(resident), ..Row::default() }))
        });
        Self { rows: rows.collect(), ..Self::default() }
    }

    /// What an earlier life wrote with [`Ledger::parts`] beside the app's record. Only before the first measurement.
    pub fn restore_parts(&mut self, app: &AppKey, text: &str) {
        let Some(baseline) = self.rows.get_mut(app).and_then(|row| row.resident.as_mut()) else { return };
        let mut parts = text.split(' ').map(|part| part.parse::<u64>().ok());
        baseline.cost.file = parts.next().flatten().map(|file| file.min(baseline.cost.memory.pss));
        baseline.cost.kernel = parts.next().flatten();
    }

    /// What an app's record has no room for: file pages and kernel memory of the baseline, for [`Ledger::restore_parts`].
    pub fn parts(&self, app: &AppKey) -> Option<String> {
        let cost = self.rows.get(app)?.resident.as_ref()?.cost;
        let word = |part: Option<u64>| part.map_or_else(|| "-".to_owned(), |part| part.to_string());
        (cost.file.is_some() || cost.kernel.is_some()).then(|| format!("{} {}", word(cost.file), word(cost.kernel)))
    }

    /// An app was measured; `conditions` is a sentence part. True when its baseline is another one now.
    pub fn sampled(&mut self, app: &AppKey, phase: Phase, sample: &Sample, conditions: &str, now: Now) -> bool {
        let row = self.rows.entry(app.clone()).or_default();
        let cost = Cost::of(sample);
        let memory = sample.memory;
        row.now = Some(cost);
        match phase {
            Phase::Frozen => row.frozen = Some(memory),
            Phase::PagedOut => {
                row.paged_out = Some(memory);
                if row.zram_source.is_some() {
                    (row.zram_swap, row.swap_unknown) = (Some(memory.swap), false);
                }
            }
            Phase::Resident | Phase::Now => {}
        }
        row.swap_is(memory.swap);
        row.swap_unknown &= memory.swap > 0;
        match phase {
            Phase::Resident | Phase::Frozen if !row.is_worth(sample, &cost) => false,
            Phase::Resident => {
                row.rebase(cost, row.our_swap(memory.swap), conditions, now);
                true
            }
            Phase::Frozen => row.refresh(cost, conditions, now),
            Phase::PagedOut | Phase::Now => false,
        }
    }

    /// A running app could not be measured: what it costs now is not known.
    pub fn unmeasured(&mut self, app: &AppKey) {
        if let Some(row) = self.rows.get_mut(app) {
            row.now = None;
        }
    }

    /// The app was paged out: `freed` KiB of PSS for `zram` KiB of zram's real memory.
    pub fn paged_out(&mut self, app: &AppKey, freed: u64, zram: u64, source: ZramSource) {
        self.zram_most = self.zram_most.saturating_add(zram);
        let row = self.rows.entry(app.clone()).or_default();
        row.zram = row.zram.saturating_add(zram);
        row.zram_source = match (row.zram_source, source) {
            (Some(ZramSource::Ratio), _) | (_, ZramSource::Ratio) => Some(ZramSource::Ratio),
            _ => Some(ZramSource::Measured),
        };
        // Until the measurement after the page-out comes.
        row.zram_swap = None;
        if let Some(now) = &mut row.now {
            now.memory.pss = now.memory.pss.saturating_sub(freed);
            now.memory.uss = now.memory.uss.saturating_sub(freed).min(now.memory.pss);
            now.file = now.file.map(|file| file.min(now.memory.pss));
        }
    }

    /// A page-out of the app came to no end: it was asked to run again, say. What was paged out until then stays in swap.
    pub fn page_out_failed(&mut self, app: &AppKey) {
        self.rows.entry(app.clone()).or_default().swap_unknown = true;
    }

    /// The app runs again. Its pages come back as it touches them: what it costs is not known until it is measured, and its
    /// share of zram shrinks with the swap that is found then; where the page-out was not measured there is nothing to go
    /// by and the share ends here.
    pub fn thawed(&mut self, app: &AppKey) {
        if let Some(row) = self.rows.get_mut(app) {
            row.now = None;
            if row.zram_swap.is_none() {
                row.swap_unknown |= row.zram_source.is_some();
                row.no_zram();
            }
        }
    }

    /// The app ended, whoever ended it. Until it is measured anew its cost is unknown should it run, else nothing.
    pub fn gone(&mut self, app: &AppKey) {
        if let Some(row) = self.rows.get_mut(app) {
            row.now = None;
            row.no_zram();
            row.swap_unknown = false;
        }
    }

    /// The daemon measured itself and zram.
    pub fn daemon(&mut self, daemon: SelfSample, zram: Zram) {
        self.daemon = Some(daemon);
        (self.zram, self.zram_most) = (Some(zram), zram.used);
    }

    /// What the daemon costs, its sockets included, once it was measured.
    pub fn own_cost(&self) -> Option<u64> {
        self.daemon.map(|daemon| daemon.memory.pss.saturating_add(daemon.sockets))
    }

    /// Processor time of the daemon, at the last look.
    pub fn own_cpu(&self) -> Duration {
        self.daemon.map(|daemon| daemon.cpu).unwrap_or_default()
    }

    /// The machine's memory was read.
    pub fn machine(&mut self, reading: &Pressure, now: Instant) {
        self.machine = Some((*reading, now));
    }

    /// Whether what is known of the machine's memory is too old for the conditions of a measurement; it is asked for then.
    pub fn wants_machine(&mut self, now: Instant) -> bool {
        let old = |at: Instant| now.since(at) >= MACHINE_FRESH;
        let wants = self.machine.is_none_or(|(_, at)| old(at)) && self.machine_asked.is_none_or(old);
        if wants {
            self.machine_asked = Some(now);
        }
        wants
    }

    /// Under which conditions something is measured, as a sentence part.
    pub fn conditions(&self, background: Option<Duration>, others: usize, now: Instant) -> String {
        let mut parts = Vec::new();
        parts.extend(background.map(|time| format!("{} in the background", whole(time))));
        parts.push(match others {
            0 => "no other app running".to_owned(),
            1 => "1 other app running".to_owned(),
            many => format!("{many} other apps running"),
        });
        if let Some((machine, _)) =
            self.machine.filter(|(read, at)| read.total > 0 && now.since(*at) < 2 * MACHINE_FRESH)
        {
            parts.push(format!("{} of {} MiB available", machine.available / 1024, machine.total / 1024));
        }
        parts.join(", ")
    }

    /// The app is none of ours any more.
    pub fn remove(&mut self, app: &AppKey) {
        self.rows.remove(app);
    }

    /// The app's baseline, its date and its conditions, for its record.
    pub fn record(&self, app: &AppKey) -> Option<(Memory, UnixTime, Option<Arc<str>>)> {
        let baseline = self.rows.get(app)?.resident.as_ref()?;
        Some((baseline.cost.memory, baseline.at, baseline.conditions.clone()))
    }

    /// What ending the app would give back, by its baseline.
    pub fn counted(&self, app: &AppKey) -> Option<u64> {
        Some(self.rows.get(app)?.resident.as_ref()?.cost.counted())
    }

    /// The part of that which can be paged out, where the kernel tells.
    pub fn pageable(&self, app: &AppKey) -> Option<u64> {
        let cost = self.rows.get(app)?.resident.as_ref()?.cost;
        Some(cost.memory.pss.saturating_sub(cost.file?))
    }

    /// The app's row; `state` is the lifecycle's word for what it is doing.
    pub fn row(&self, app: &AppKey, state: &str) -> LedgerRow {
        let unknown = Row::default();
        let row = self.rows.get(app).unwrap_or(&unknown);
        let now = if is_running(state) { row.now } else { Some(Cost::NONE) };
        let (zram, source) = self.share(row, state);
        let claim = row.resident.as_ref().zip(now).map(|(resident, now)| match is_held(state) {
            true => Claim::new(&resident.cost, &now, zram),
            false => Claim::of_running(&resident.cost, &now, zram, row.our_swap(now.memory.swap)),
        });
        let baseline = row.resident.as_ref();
        LedgerRow {
            name: app.to_string(),
            state: state.to_owned(),
            resident: baseline.map(|baseline| baseline.cost.memory),
            measured: baseline.map(|baseline| baseline.at.to_string()),
            conditions: baseline.and_then(|baseline| baseline.conditions.as_deref().map(str::to_owned)),
            frozen: row.frozen,
            paged_out: row.paged_out,
            now: now.map(|now| now.memory),
            charged: now.and_then(|now| now.charged),
            cache: claim.map_or(0, |claim| claim.cache),
            kernel: claim.map_or(0, |claim| claim.kernel),
            drift: claim.map_or(0, |claim| claim.drift),
            zram,
            zram_source: source,
            saved: claim.map(|claim| claim.saved()),
            saved_mib_hours: 0.0,
            wakes: 0,
            wake_cpu_ms: 0,
            wake_faults: 0,
        }
    }

    /// What can be said to be saved on an app from now on, until it is measured again: one that runs gets its memory back,
    /// so nothing.
    pub fn rate(&self, app: &AppKey, state: &str) -> Option<i64> {
        let saved = self.row(app, state).saved;
        if is_held(state) { saved } else { saved.map(|_| 0) }
    }

    /// The report on the apps given with the lifecycle's words for what they are doing; `fill` adds to a row what is not
    /// known here. An app without a baseline, or
    /// one that runs and could not be measured, counts neither way.
    pub fn report<'a>(
        &self,
        now: Now,
        profile: Profile,
        states: impl Iterator<Item = (&'a AppKey, &'a str)>,
        fill: impl Fn(&AppKey, &mut LedgerRow),
    ) -> Report {
        let filled = |(app, state)| {
            let mut row = self.row(app, state);
            fill(app, &mut row);
            row
        };
        let mut apps: Vec<LedgerRow> = states.map(filled).collect();
        apps.sort_by(|a, b| a.name.cmp(&b.name));
        let mut sum = Claim::default();
        let mut unmeasured = 0;
        let mut source = None;
        for row in &apps {
            sum.zram = sum.zram.saturating_add(row.zram);
            source = match (source, row.zram_source) {
                (Some(ZramSource::Ratio), _) | (_, Some(ZramSource::Ratio)) => Some(ZramSource::Ratio),
                (one, other) => one.or(other),
            };
            let (Some(before), Some(after)) = (row.resident, row.now) else {
                unmeasured += 1;
                continue;
            };
            sum.resident = sum.resident.saturating_add(before.pss);
            sum.now = sum.now.saturating_add(after.pss);
            sum.cache = sum.cache.saturating_add(row.cache);
            sum.kernel = sum.kernel.saturating_add(row.kernel);
            sum.drift = sum.drift.saturating_add(row.drift);
        }
        let daemon = self.daemon.unwrap_or_default();
        // As if the daemon were one more of what there is now.
        let spent = Claim { now: sum.now.saturating_add(daemon.memory.pss).saturating_add(daemon.sockets), ..sum };
        Report {
            at: now.wall.to_string(),
            profile,
            apps,
            daemon: daemon.memory,
            sockets: daemon.sockets,
            zram: sum.zram,
            zram_source: source,
            resident: sum.resident,
            now: sum.now,
            cache: sum.cache,
            kernel: sum.kernel,
            drift: sum.drift,
            saved: spent.saved(),
            unmeasured,
            account: None,
        }
    }

    /// The figures of one bus for the history. An app that runs and was not measured since counts as its baseline.
    pub fn total<'a>(&self, bus: Bus, states: impl Iterator<Item = (&'a AppKey, &'a str)>) -> Total {
        let mut total = Total::default();
        for (app, state) in states.filter(|(app, _)| app.bus == bus) {
            total.apps = total.apps.saturating_add(1);
            total.running = total.running.saturating_add(u32::from(is_running(state)));
            let row = self.row(app, state);
            let Some(resident) = row.resident else { continue };
            total.resident = total.resident.saturating_add(resident.pss);
            total.now = total.now.saturating_add(row.now.unwrap_or(resident).pss);
            total.zram = total.zram.saturating_add(row.zram);
        }
        total.daemon = self.own_cost().unwrap_or(0);
        total
    }

    /// What zram holds over what it costs, all devices together; none without zram or with nothing in it.
    pub fn ratio(&self) -> Option<f64> {
        let Zram { used, stored } = self.zram?;
        (used > 0 && stored > 0).then(|| stored as f64 / used as f64)
    }

    /// How well what is paged out is taken to be compressed, for estimates.
    pub fn compression(&self) -> Compression {
        match (self.ratio(), self.machine) {
            (_, Some((machine, _))) if machine.total > 0 && machine.swap_total == 0 => Compression::Nowhere,
            (Some(ratio), _) => Compression::Measured(ratio),
            (None, _) => Compression::Assumed,
        }
    }

    /// An app's share of zram's real memory, and how that is known.
    fn share(&self, row: &Row, state: &str) -> (u64, Option<ZramSource>) {
        if !is_running(state) {
            return (0, None);
        }
        let (own, source) = self.wish(row);
        if self.zram.is_none() {
            return (own, source);
        }
        // Each byte has one owner.
        let all = self.rows.values().fold(0u128, |sum, row| sum + u128::from(self.wish(row).0));
        if all <= u128::from(self.zram_most) {
            return (own, source);
        }
        let scaled = u128::from(own) * u128::from(self.zram_most) / all;
        let scaled = u64::try_from(scaled).unwrap_or(own);
        (scaled, source.filter(|_| scaled > 0).map(|_| ZramSource::Ratio))
    }

    /// The share before it is held against zram's own figure.
    fn wish(&self, row: &Row) -> (u64, Option<ZramSource>) {
        let swap = row.now.map_or(0, |now| now.memory.swap);
        let before = row.resident.as_ref().map_or(0, |baseline| baseline.cost.memory.swap);
        // Before the measurement after a page-out nothing is known of the swap behind it.
        let known = if row.zram_source.is_some() { row.zram_swap.unwrap_or(swap) } else { 0 };
        let beyond = swap.saturating_sub(known.max(before));
        let cost = self.zram.filter(|zram| zram.stored > 0).map_or(0, |zram| {
            let used = u128::from(beyond) * u128::from(zram.used) / u128::from(zram.stored);
            u64::try_from(used).unwrap_or(u64::MAX)
        });
        let share = row.zram.saturating_add(cost);
        let source = if cost > 0 { Some(ZramSource::Ratio) } else { row.zram_source };
        (share, source.filter(|_| share > 0))
    }
}

impl Row {
    fn swap_is(&mut self, swap: u64) {
        let Some(before) = self.zram_swap.filter(|before| swap < *before) else { return };
        let left = u128::from(self.zram) * u128::from(swap) / u128::from(before);
        self.zram = u64::try_from(left).unwrap_or(self.zram);
        self.zram_swap = Some(swap);
    }

    fn no_zram(&mut self) {
        (self.zram, self.zram_swap, self.zram_source) = (0, None, None);
    }

    /// What of this much swap is there because of our page-outs.
    fn our_swap(&self, swap: u64) -> u64 {
        self.zram_swap.map_or(0, |ours| ours.min(swap))
    }

    /// Whether part of this much swap may be there because of our page-outs, and nobody knows how much.
    fn is_unknown(&self, swap: u64) -> bool {
        swap > 0 && (self.swap_unknown || self.zram_source.is_some() && self.zram_swap.is_none())
    }

    /// Whether this measurement may become the baseline.
    fn is_worth(&self, sample: &Sample, cost: &Cost) -> bool {
        let starting = sample.age > Duration::ZERO
            && sample.age < STARTED_AFTER
            && sample.cpu.saturating_mul(STARTING_PART) > sample.age;
        let before = self.resident.as_ref().map(|baseline| baseline.cost.counted());
        let after = cost.counted().saturating_add(self.our_swap(cost.memory.swap));
        let doubtful = starting || self.is_unknown(cost.memory.swap);
        !doubtful || before.is_none_or(|before| before < after)
    }

    /// Makes the cost, and what we have put into swap, the baseline.
    fn rebase(&mut self, mut cost: Cost, swapped: u64, conditions: &str, now: Now) {
        cost.memory.pss = cost.memory.pss.saturating_add(swapped);
        cost.memory.uss = cost.memory.uss.saturating_add(swapped);
        cost.memory.swap = cost.memory.swap.saturating_sub(swapped);
        let conditions = match swapped / 1024 {
            0 => conditions.into(),
            mib => format!("{conditions}, {mib} MiB of it paged out before").into(),
        };
        self.resident = Some(Baseline { cost, at: now.wall, conditions: Some(conditions) });
    }

    /// What was just frozen is as it was: a better baseline than an old or a wrong one.
    fn refresh(&mut self, cost: Cost, conditions: &str, now: Now) -> bool {
        let Some(baseline) = &self.resident else { return false };
        if self.is_unknown(cost.memory.swap) {
            return false;
        }
        let swapped = self.our_swap(cost.memory.swap);
        let (before, after) = (baseline.cost.counted(), cost.counted().saturating_add(swapped));
        let wrong = before.abs_diff(after);
        let stale = now.wall.since(baseline.at) >= REFRESH_AFTER;
        let other = wrong > REFRESH_LEAST && wrong > before / REFRESH_PART;
        if stale || other {
            self.rebase(cost, swapped, conditions, now);
        }
        stale || other
    }
}

/// Whether an app in this state takes memory.
pub(super) fn is_running(state: &str) -> bool {
    !matches!(state, "tombstone" | "gone")
}

/// Whether it cannot do anything by itself in this state, and so costs less only through us.
fn is_held(state: &str) -> bool {
    matches!(state, "frozen" | "reclaimed" | "tombstone" | "gone")
}

fn whole(time: Duration) -> String {
    match time.as_secs() {
        secs @ 0..120 => format!("{secs} s"),
        secs @ 120..7200 => format!("{} min", secs / 60),
        secs => format!("{} h", secs / 3600),
    }
}

#[cfg(test)]
mod tests;
