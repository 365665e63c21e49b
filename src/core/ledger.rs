//! What each app cost while resident, what it costs now, and what that saves (design.md, "The ledger").
//!
//! Each byte has one owner (invariant 10): an app's resident memory is in its row (PSS, so that shared pages are split
//! among their users), what our page-outs put into zram is in `zram`, and this process is in `daemon`. Swap is never
//! added to PSS: it is uncompressed, and its real cost is zram's.
//!
//! The kernel does not say how much of zram is whose, so the share of an app is an estimate: what zram grew by during
//! its page-outs, shrunk as its swap shrinks after a thaw, and nothing once it has ended. Should the shares add up to
//! more than zram holds at all, zram's own figure stands.

use std::collections::BTreeMap;

use crate::{
    model::{AppKey, AppRecord, Memory, Profile, SelfSample, Zram},
    time::{Now, UnixTime},
    view::{LedgerRow, Report},
};

/// The memory books of all apps and of the daemon. All figures in KiB.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    rows: BTreeMap<AppKey, Row>,
    daemon: SelfSample,
    /// Once measured.
    zram: Option<Zram>,
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

#[derive(Clone, Debug, Default)]
struct Row {
    resident: Option<(Memory, UnixTime)>,
    frozen: Option<Memory>,
    paged_out: Option<Memory>,
    now: Option<Memory>,
    /// Its estimated share of zram's real memory.
    zram: u64,
    /// Its swap when that share was right, if known.
    zram_swap: Option<u64>,
}

impl Ledger {
    /// Books with the baselines of an earlier life.
    pub fn new(records: &[AppRecord]) -> Self {
        let rows = records.iter().filter_map(|record| {
            let resident = Some((record.resident?, record.measured.unwrap_or_default()));
            Some((record.app.clone(), Row { resident, ..Row::default() }))
        });
        Self { rows: rows.collect(), ..Self::default() }
    }

    /// An app was measured.
    pub fn sampled(&mut self, app: &AppKey, phase: Phase, memory: Memory, now: Now) {
        let row = self.rows.entry(app.clone()).or_default();
        row.now = Some(memory);
        match phase {
            Phase::Resident => row.resident = Some((memory, now.wall)),
            Phase::Frozen => row.frozen = Some(memory),
            Phase::PagedOut => {
                row.paged_out = Some(memory);
                if row.zram > 0 {
                    row.zram_swap = Some(memory.swap);
                }
            }
            Phase::Now => {}
        }
        row.swap_is(memory.swap);
    }

    /// A running app could not be measured: what it costs now is not known.
    pub fn unmeasured(&mut self, app: &AppKey) {
        if let Some(row) = self.rows.get_mut(app) {
            row.now = None;
        }
    }

    /// The app was paged out: `freed` KiB of PSS for `zram` KiB of zram's real memory.
    pub fn paged_out(&mut self, app: &AppKey, freed: u64, zram: u64) {
        let row = self.rows.entry(app.clone()).or_default();
        row.zram = row.zram.saturating_add(zram);
        // Until the measurement after the page-out comes.
        row.zram_swap = None;
        if let Some(now) = &mut row.now {
            now.pss = now.pss.saturating_sub(freed);
            now.uss = now.uss.saturating_sub(freed).min(now.pss);
        }
    }

    /// The app runs again. Its pages come back as it touches them, so its share of zram shrinks with the swap that later
    /// measurements find; where the page-out was not measured there is nothing to go by and the share ends here.
    pub fn thawed(&mut self, app: &AppKey) {
        if let Some(row) = self.rows.get_mut(app)
            && row.zram_swap.is_none()
        {
            row.zram = 0;
        }
    }

    /// The app ended, whoever ended it. Until it is measured anew its cost is unknown should it run, else nothing.
    pub fn gone(&mut self, app: &AppKey) {
        if let Some(row) = self.rows.get_mut(app) {
            (row.now, row.zram, row.zram_swap) = (None, 0, None);
        }
    }

    /// The daemon measured itself and zram.
    pub fn daemon(&mut self, daemon: SelfSample, zram: Zram) {
        self.daemon = daemon;
        self.zram = Some(zram);
    }

    /// The app is none of ours any more.
    pub fn remove(&mut self, app: &AppKey) {
        self.rows.remove(app);
    }

    /// The app's baseline and its date, for its record.
    pub fn record(&self, app: &AppKey) -> Option<(Memory, UnixTime)> {
        self.rows.get(app)?.resident
    }

    /// The app's row; `state` is the lifecycle's word for what it is doing.
    pub fn row(&self, app: &AppKey, state: &str) -> LedgerRow {
        let unknown = Row::default();
        let row = self.rows.get(app).unwrap_or(&unknown);
        let now = if is_running(state) { row.now } else { Some(Memory::default()) };
        let resident = row.resident.map(|(memory, _)| memory);
        LedgerRow {
            name: app.to_string(),
            state: state.to_owned(),
            resident,
            measured: row.resident.map(|(_, at)| at.to_string()),
            conditions: None,
            frozen: row.frozen,
            paged_out: row.paged_out,
            now,
            charged: None,
            zram: 0,
            zram_source: None,
            saved: resident.zip(now).map(|(resident, now)| difference(resident.pss, now.pss)),
            saved_mib_hours: 0.0,
            wakes: 0,
            wake_cpu_ms: 0,
            wake_faults: 0,
        }
    }

    /// The report on the apps given with the lifecycle's words for what they are doing. An app without a baseline, or
    /// one that runs and could not be measured, counts neither way.
    pub fn report<'a>(
        &self,
        now: Now,
        profile: Profile,
        states: impl Iterator<Item = (&'a AppKey, &'a str)>,
    ) -> Report {
        let mut apps = Vec::new();
        let (mut resident, mut cost, mut zram, mut unmeasured) = (0u64, 0u64, 0u64, 0);
        for (app, state) in states {
            let row = self.row(app, state);
            match (row.resident, row.now) {
                (Some(before), Some(after)) => {
                    resident = resident.saturating_add(before.pss);
                    cost = cost.saturating_add(after.pss);
                }
                _ => unmeasured += 1,
            }
            if is_running(state) {
                zram = zram.saturating_add(self.rows.get(app).map_or(0, |row| row.zram));
            }
            apps.push(row);
        }
        apps.sort_by(|a, b| a.name.cmp(&b.name));
        let zram = self.zram.map_or(zram, |all| zram.min(all.used));
        let spent =
            cost.saturating_add(zram).saturating_add(self.daemon.memory.pss).saturating_add(self.daemon.sockets);
        Report {
            at: now.wall.to_string(),
            profile,
            apps,
            daemon: self.daemon.memory,
            sockets: self.daemon.sockets,
            zram,
            zram_source: None,
            resident,
            now: cost,
            saved: difference(resident, spent),
            unmeasured,
            account: None,
        }
    }

    /// What zram holds over what it costs, all devices together; none without zram or with nothing in it.
    pub fn compression(&self) -> Option<f64> {
        let Zram { used, stored } = self.zram?;
        (used > 0 && stored > 0).then(|| stored as f64 / used as f64)
    }
}

impl Row {
    fn swap_is(&mut self, swap: u64) {
        let Some(before) = self.zram_swap.filter(|before| swap < *before) else { return };
        let left = u128::from(self.zram) * u128::from(swap) / u128::from(before);
        self.zram = u64::try_from(left).unwrap_or(self.zram);
        self.zram_swap = Some(swap);
    }
}

fn is_running(state: &str) -> bool {
    !matches!(state, "tombstone" | "gone")
}

fn difference(before: u64, after: u64) -> i64 {
    let size = |kib: u64| i64::try_from(kib).unwrap_or(i64::MAX);
    size(before.saturating_sub(after)).saturating_sub(size(after.saturating_sub(before)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Bus;

    const NOW: Now = Now { boot: crate::time::Instant::from_nanos(0), wall: UnixTime::from_secs(1_795_311_549) };

    fn key(name: &str) -> AppKey {
        AppKey::new(Bus::Session(1000), name)
    }

    fn memory(pss: u64, swap: u64) -> Memory {
        Memory { pss, uss: pss / 2, swap }
    }

    fn report(ledger: &Ledger, states: &[(&AppKey, &'static str)]) -> Report {
        ledger.report(NOW, Profile::Tombstone, states.iter().copied())
    }

    #[test]
    fn saved_is_resident_less_now_less_zram_less_the_daemon() {
        let (a, b) = (key("org.a"), key("org.b"));
        let mut ledger = Ledger::default();
        ledger.sampled(&a, Phase::Resident, memory(50_000, 0), NOW);
        ledger.sampled(&a, Phase::Frozen, memory(49_000, 0), NOW);
        ledger.paged_out(&a, 30_000, 9_000);
        ledger.sampled(&a, Phase::PagedOut, memory(19_000, 30_000), NOW);
        ledger.sampled(&b, Phase::Resident, memory(20_000, 0), NOW);
        ledger.gone(&b);
        ledger.daemon(
            SelfSample { memory: memory(3_000, 0), ..SelfSample::default() },
            Zram { used: 100_000, stored: 300_000 },
        );

        let report = report(&ledger, &[(&b, "tombstone"), (&a, "reclaimed")]);
        assert_eq!((report.resident, report.now, report.zram, report.unmeasured), (70_000, 19_000, 9_000, 0));
        assert_eq!(report.saved, 70_000 - 19_000 - 9_000 - 3_000);
        assert_eq!(report.at, "2026-11-22T01:39:09Z");
        assert_eq!(report.apps.iter().map(|row| &*row.name).collect::<Vec<_>>(), ["org.a", "org.b"]);
        let a = &report.apps[0];
        assert_eq!(a.frozen.map(|m| m.pss), Some(49_000));
        assert_eq!(a.paged_out.map(|m| m.pss), Some(19_000));
        assert_eq!((a.saved, a.measured.as_deref()), (Some(31_000), Some("2026-11-22T01:39:09Z")));
        assert_eq!((report.apps[1].now, report.apps[1].saved), (Some(Memory::default()), Some(20_000)));
    }

    #[test]
    fn a_daemon_that_costs_more_than_it_saves_says_so() {
        let a = key("org.a");
        let mut ledger = Ledger::default();
        ledger.sampled(&a, Phase::Resident, memory(1_000, 0), NOW);
        ledger.sampled(&a, Phase::Now, memory(1_200, 0), NOW);
        ledger.daemon(SelfSample { memory: memory(3_000, 0), ..SelfSample::default() }, Zram { used: 0, stored: 0 });
        let report = report(&ledger, &[(&a, "foreground")]);
        assert_eq!(report.saved, -3_200);
        assert_eq!(report.apps[0].saved, Some(-200));
        assert_eq!(Ledger::default().report(NOW, Profile::Observe, std::iter::empty()).saved, 0);
    }

    #[test]
    fn an_app_without_a_baseline_or_a_figure_counts_neither_way() {
        let (a, b, c) = (key("org.a"), key("org.b"), key("org.c"));
        let mut ledger = Ledger::default();
        ledger.sampled(&a, Phase::Now, memory(7_000, 0), NOW);
        ledger.sampled(&b, Phase::Resident, memory(5_000, 0), NOW);
        ledger.unmeasured(&b);
        let report = report(&ledger, &[(&a, "frozen"), (&b, "background"), (&c, "gone")]);
        assert_eq!((report.resident, report.now, report.saved, report.unmeasured), (0, 0, 0, 3));
        assert!(report.apps.iter().all(|row| row.saved.is_none()));
    }

    #[test]
    fn an_app_started_again_is_not_taken_for_gone() {
        let a = key("org.a");
        let mut ledger = Ledger::default();
        ledger.sampled(&a, Phase::Resident, memory(5_000, 0), NOW);
        ledger.gone(&a);
        assert_eq!(ledger.row(&a, "gone").now, Some(Memory::default()));
        assert_eq!(ledger.row(&a, "awake").now, None);
        assert_eq!(report(&ledger, &[(&a, "awake")]).saved, 0);
    }

    #[test]
    fn the_share_of_zram_shrinks_as_pages_come_back_and_ends_with_the_app() {
        let a = key("org.a");
        let mut ledger = Ledger::default();
        let zram = |ledger: &Ledger| report(ledger, &[(&a, "background")]).zram;
        ledger.sampled(&a, Phase::Frozen, memory(50_000, 0), NOW);
        ledger.paged_out(&a, 40_000, 10_000);
        assert_eq!(ledger.row(&a, "frozen").now.map(|m| m.pss), Some(10_000));
        ledger.sampled(&a, Phase::PagedOut, memory(11_000, 40_000), NOW);
        ledger.thawed(&a);
        assert_eq!(zram(&ledger), 10_000);
        ledger.sampled(&a, Phase::Now, memory(31_000, 20_000), NOW);
        assert_eq!(zram(&ledger), 5_000);
        ledger.paged_out(&a, 20_000, 4_000);
        ledger.sampled(&a, Phase::PagedOut, memory(11_000, 40_000), NOW);
        assert_eq!(zram(&ledger), 9_000);
        ledger.sampled(&a, Phase::Now, memory(51_000, 0), NOW);
        assert_eq!(zram(&ledger), 0);
        ledger.paged_out(&a, 1_000, 500);
        ledger.gone(&a);
        assert_eq!(zram(&ledger), 0);
    }

    #[test]
    fn an_unmeasured_page_out_costs_until_the_thaw_and_never_more_than_all_of_zram() {
        let a = key("org.a");
        let mut ledger = Ledger::default();
        ledger.paged_out(&a, 40_000, 10_000);
        ledger.daemon(
            SelfSample { memory: Memory::default(), ..SelfSample::default() },
            Zram { used: 6_000, stored: 18_000 },
        );
        assert_eq!(report(&ledger, &[(&a, "frozen")]).zram, 6_000);
        assert_eq!(ledger.compression(), Some(3.0));
        ledger.thawed(&a);
        assert_eq!(report(&ledger, &[(&a, "background")]).zram, 0);
    }

    #[test]
    fn baselines_outlive_the_daemon() {
        let (a, b) = (key("org.a"), key("org.b"));
        let at = UnixTime::from_secs(951_782_400);
        let record = |app: &AppKey, resident: Option<Memory>| AppRecord {
            app: app.clone(),
            declares: true,
            resident,
            measured: resident.map(|_| at),
            conditions: None,
        };
        let mut ledger = Ledger::new(&[record(&a, Some(memory(5_000, 0))), record(&b, None)]);
        assert_eq!(ledger.record(&a), Some((memory(5_000, 0), at)));
        assert_eq!(ledger.record(&b), None);
        assert_eq!(ledger.row(&a, "gone").measured.as_deref(), Some("2000-02-29T00:00:00Z"));
        ledger.sampled(&a, Phase::Resident, memory(6_000, 0), NOW);
        assert_eq!(ledger.record(&a), Some((memory(6_000, 0), NOW.wall)));
        ledger.remove(&a);
        assert_eq!(ledger.record(&a), None);
    }

    #[test]
    fn absurd_figures_saturate() {
        let (a, b) = (key("org.a"), key("org.b"));
        let mut ledger = Ledger::default();
        for app in [&a, &b] {
            ledger.sampled(app, Phase::Resident, memory(u64::MAX, 0), NOW);
            ledger.paged_out(app, u64::MAX, u64::MAX);
            ledger.sampled(app, Phase::PagedOut, memory(u64::MAX, u64::MAX), NOW);
            ledger.sampled(app, Phase::Now, memory(u64::MAX, u64::MAX - 1), NOW);
        }
        ledger.daemon(
            SelfSample { memory: memory(u64::MAX, 0), ..SelfSample::default() },
            Zram { used: u64::MAX, stored: 1 },
        );
        assert_eq!(report(&ledger, &[(&a, "frozen"), (&b, "frozen")]).saved, 0);
        assert_eq!(report(&ledger, &[(&a, "gone"), (&b, "gone")]).saved, 0);
        assert_eq!(report(&ledger, &[]).saved, -i64::MAX);
    }
}
