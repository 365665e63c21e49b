//! The ledger's history: rows made at transitions, kept a while, written in one go; and what is read back, as a document.
//!
//! Rows are made when something happens anyway, never by a timer. Totals come once in five minutes at most; of an app that
//! goes back and forth quickly the last state counts; of messages that reach it while it runs one in that time. So what a
//! peer can make us write is bounded whatever it does.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    model::{AppKey, Bus, History, HistoryRow, Total},
    time::{Instant, Now, UnixTime},
    view::{self, AppAt, AppHistory, TotalAt, WakeAt},
};

/// Rows kept at most before they are written.
const BUFFER: usize = 128;
/// They are written when the first of them is older than this, and something happens.
const KEEP: Duration = Duration::from_secs(15 * 60);
/// Between two totals of a bus.
const TOTALS_EVERY: Duration = Duration::from_secs(5 * 60);
/// The same when a report has measured everything.
const TOTALS_APART: Duration = Duration::from_secs(60);
/// Between two rows of one app.
const CALM: Duration = Duration::from_secs(15);

/// What is not written yet.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    rows: Vec<HistoryRow>,
    oldest: Option<Instant>,
    /// When totals were asked for.
    totals: Option<Instant>,
    /// Messages received since the last totals.
    messages: BTreeMap<Bus, u32>,
    apps: BTreeMap<AppKey, Written>,
}

/// What was last written of an app.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    /// The state it was told to be in.
    state: Option<&'static str>,
    /// When its last row was made.
    row: Option<Instant>,
    /// When the last row of a message was made that reached it while it ran.
    wake: Option<Instant>,
}

impl Journal {
    /// Nothing to write yet; the first totals come after a while.
    pub fn new(now: Instant) -> Self {
        Self { totals: Some(now), ..Self::default() }
    }

    /// The app is in this state now. True when that is another than the last one told; at first it does not run.
    pub fn is_in(&mut self, app: &AppKey, state: &'static str) -> bool {
        let before = self.apps.entry(app.clone()).or_default().state.replace(state);
        before.unwrap_or("gone") != state
    }

    /// What an app costs now. Soon after another row of it this one takes its place.
    pub fn app(&mut self, app: &AppKey, what: History, now: Now) {
        let written = self.apps.entry(app.clone()).or_default();
        if written.row.is_some_and(|at| now.boot.since(at) < CALM) {
            let same = |row: &&mut HistoryRow| matches!(&row.what, History::App { app: of, .. } if of == app);
            if let Some(row) = self.rows.iter_mut().rev().find(same) {
                row.what = what;
                return;
            }
        }
        written.row = Some(now.boot);
        self.push(HistoryRow { at: now.wall, span: 0, what }, now.boot);
    }

    /// A message that woke its app, or reached it while it ran.
    pub fn wake(&mut self, row: HistoryRow, now: Instant) {
        if let History::Wake { app, cpu: None, .. } = &row.what {
            let written = self.apps.entry(app.clone()).or_default();
            if written.wake.is_some_and(|at| now.since(at) < CALM) {
                return;
            }
            written.wake = Some(now);
        }
        self.push(row, now);
    }

    /// What would have been done.
    pub fn would(&mut self, row: HistoryRow, now: Instant) {
        self.push(row, now);
    }

    /// A message has come.
    pub fn received(&mut self, bus: Bus) {
        let count = self.messages.entry(bus).or_default();
        *count = count.saturating_add(1);
    }

    /// Whether it is time for totals, if something happens anyway; `reported`: all has just been measured for a report.
    pub fn wants_totals(&self, reported: bool, now: Instant) -> bool {
        let pause = if reported { TOTALS_APART } else { TOTALS_EVERY };
        self.totals.is_none_or(|at| now.since(at) >= pause)
    }

    /// Totals are on their way.
    pub const fn totals_asked(&mut self, now: Instant) {
        self.totals = Some(now);
    }

    /// The figures of one bus.
    pub fn total(&mut self, bus: Bus, mut total: Total, now: Now) {
        total.messages = self.messages.remove(&bus).unwrap_or(0);
        self.push(HistoryRow { at: now.wall, span: 0, what: History::Total { bus, total } }, now.boot);
    }

    /// Nothing is kept of the app any more.
    pub fn remove(&mut self, app: &AppKey) {
        self.apps.remove(app);
        self.rows.retain(|row| app_of(&row.what) != Some(app));
    }

    /// Nothing is kept of this bus any more.
    pub fn forget(&mut self, bus: Bus) {
        self.messages.remove(&bus);
        self.apps.retain(|app, _| app.bus != bus);
        self.rows.retain(|row| bus_of(&row.what) != bus);
    }

    /// What is to be written now; with `all` whatever there is.
    pub fn take(&mut self, all: bool, now: Instant) -> Option<Arc<[HistoryRow]>> {
        let due = all || self.rows.len() >= BUFFER || self.oldest.is_some_and(|at| now.since(at) >= KEEP);
        if !due || self.rows.is_empty() {
            return None;
        }
        self.oldest = None;
        Some(std::mem::take(&mut self.rows).into())
    }

    /// What is not written yet.
    pub fn rows(&self) -> &[HistoryRow] {
        &self.rows
    }

    fn push(&mut self, row: HistoryRow, now: Instant) {
        // Many may come with one event; what is over the bound is lost, not kept.
        if self.rows.len() >= 4 * BUFFER {
            self.rows.remove(0);
        }
        self.oldest.get_or_insert(now);
        self.rows.push(row);
    }
}

/// Whose a row is.
pub(super) const fn app_of(what: &History) -> Option<&AppKey> {
    match what {
        History::Total { .. } => None,
        History::App { app, .. } | History::Wake { app, .. } | History::Would { app, .. } => Some(app),
    }
}

/// The bus a row is about.
pub(super) const fn bus_of(what: &History) -> Bus {
    match what {
        History::Total { bus, .. } => *bus,
        History::App { app, .. } | History::Wake { app, .. } | History::Would { app, .. } => app.bus,
    }
}

/// Rows for one reader, sorted out.
#[derive(Clone, Debug)]
pub struct Parts {
    rows: Vec<HistoryRow>,
}

impl Parts {
    /// Those of `rows` about a bus that is seen, from `since` on, in order of time.
    pub fn new(rows: impl IntoIterator<Item = HistoryRow>, sees: impl Fn(Bus) -> bool, since: UnixTime) -> Self {
        let end = |row: &HistoryRow| row.at + Duration::from_secs(row.span.into());
        let wanted = |row: &HistoryRow| sees(bus_of(&row.what)) && end(row) >= since;
        let mut rows: Vec<HistoryRow> = rows.into_iter().filter(wanted).collect();
        rows.sort_by_key(|row| row.at);
        Self { rows }
    }

    /// What would have been done, and the time of the first row of all.
    pub(super) fn rows(&self) -> &[HistoryRow] {
        &self.rows
    }

    /// As a document.
    pub fn view(&self, since: UnixTime, until: UnixTime) -> view::History {
        let mut totals: BTreeMap<(u64, u32), Total> = BTreeMap::new();
        let mut apps: BTreeMap<&AppKey, Vec<AppAt>> = BTreeMap::new();
        let mut wakes = Vec::new();
        for row in &self.rows {
            let at = secs(row.at);
            match &row.what {
                History::Total { total, .. } => {
                    let sum = totals.entry((at, row.span)).or_default();
                    *sum = together(sum, total);
                }
                History::App { app, state, pss, zram, saved } => apps.entry(app).or_default().push(AppAt {
                    at,
                    span: row.span,
                    state: state.to_string(),
                    pss: *pss,
                    zram: *zram,
                    saved: *saved,
                }),
                History::Wake { app, from, took, .. } => {
                    wakes.push(WakeAt { at, name: app.to_string(), from: from.to_string(), took_ms: *took });
                }
                History::Would { .. } => {}
            }
        }
        let mut apps: Vec<AppHistory> =
            apps.into_iter().map(|(app, points)| AppHistory { name: app.to_string(), points }).collect();
        apps.sort_by(|a, b| a.name.cmp(&b.name));
        view::History {
            since: since.to_string(),
            until: until.to_string(),
            totals: totals.into_iter().map(|((at, span), total)| TotalAt { at, span, total }).collect(),
            apps,
            wakes,
        }
    }
}

/// Two buses' figures at the same time: there is one daemon, and its connections serve both.
fn together(a: &Total, b: &Total) -> Total {
    Total {
        apps: a.apps.saturating_add(b.apps),
        running: a.running.saturating_add(b.running),
        resident: a.resident.saturating_add(b.resident),
        now: a.now.saturating_add(b.now),
        zram: a.zram.saturating_add(b.zram),
        daemon: a.daemon.max(b.daemon),
        connections: a.connections.max(b.connections),
        replaced: a.replaced.saturating_add(b.replaced),
        messages: a.messages.saturating_add(b.messages),
    }
}

fn secs(at: UnixTime) -> u64 {
    at.as_millis() / 1000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Urgency;

    fn at(secs: u64) -> Now {
        Now { boot: Instant::from_nanos(secs * 1_000_000_000), wall: UnixTime::from_secs(1_000_000 + secs) }
    }

    fn key(uid: u32, name: &str) -> AppKey {
        AppKey::new(Bus::Session(uid), name)
    }

    fn app(key: &AppKey, state: &str, pss: u64) -> History {
        History::App { app: key.clone(), state: state.into(), pss: Some(pss), zram: 0, saved: None }
    }

    fn wake(key: &AppKey, cpu: Option<u32>) -> HistoryRow {
        let what = History::Wake {
            app: key.clone(),
            from: "awake".into(),
            took: 5,
            urgency: Urgency::Normal,
            cpu,
            faults: None,
        };
        HistoryRow { at: at(0).wall, span: 0, what }
    }

    #[test]
    fn rows_wait_for_company_and_are_written_when_there_are_many_or_old_ones() {
        let a = key(1, "org.a");
        let mut journal = Journal::default();
        journal.app(&a, app(&a, "frozen", 1), at(0));
        assert_eq!(journal.take(false, at(899).boot), None);
        assert_eq!(journal.take(false, at(900).boot).unwrap().len(), 1);
        assert_eq!(journal.take(true, at(900).boot), None);
        for n in 0..BUFFER as u64 {
            assert_eq!(journal.take(false, at(1000).boot), None);
            journal.wake(wake(&a, Some(1)), at(1000 + n).boot);
        }
        assert_eq!(journal.take(false, at(1000).boot).unwrap().len(), BUFFER);
        journal.wake(wake(&a, Some(1)), at(2000).boot);
        assert_eq!(journal.take(true, at(2000).boot).unwrap().len(), 1);
    }

    #[test]
    fn what_goes_back_and_forth_or_comes_in_floods_writes_little() {
        let (a, b) = (key(1, "org.a"), key(1, "org.b"));
        let mut journal = Journal::default();
        for n in 0..1000 {
            journal.app(&a, app(&a, if n % 2 == 0 { "foreground" } else { "background" }, n), at(n / 100));
            journal.wake(wake(&a, None), at(n / 100).boot);
        }
        journal.app(&b, app(&b, "gone", 7), at(9));
        assert_eq!(journal.rows().len(), 3);
        let History::App { state, pss, .. } = &journal.rows()[0].what else { panic!() };
        assert_eq!((&**state, *pss), ("background", Some(999)), "the last state holds");
        assert_eq!(journal.rows()[0].at, at(0).wall);
        journal.app(&a, app(&a, "frozen", 5), at(15));
        assert_eq!(journal.rows().len(), 4);
        for _ in 0..10_000 {
            journal.would(wake(&a, Some(1)), at(20).boot);
        }
        assert_eq!(journal.rows().len(), 4 * BUFFER);
        journal.remove(&a);
        assert_eq!(journal.rows().len(), 0, "b's row was among the oldest");
    }

    #[test]
    fn totals_come_once_in_five_minutes() {
        let mut journal = Journal::default();
        let bus = Bus::Session(1);
        assert!(journal.wants_totals(false, at(0).boot));
        assert!(!Journal::new(at(0).boot).wants_totals(false, at(299).boot));
        journal.totals_asked(at(0).boot);
        (0..3).for_each(|_| journal.received(bus));
        journal.total(bus, Total { apps: 2, ..Total::default() }, at(1));
        assert!(!journal.wants_totals(false, at(299).boot) && journal.wants_totals(false, at(300).boot));
        assert!(!journal.wants_totals(true, at(59).boot) && journal.wants_totals(true, at(60).boot));
        journal.total(bus, Total::default(), at(301));
        let messages: Vec<u32> = journal
            .rows()
            .iter()
            .map(|row| if let History::Total { total, .. } = &row.what { total.messages } else { 99 })
            .collect();
        assert_eq!(messages, [3, 0]);
        journal.forget(bus);
        assert!(journal.rows().is_empty());
    }

    #[test]
    fn a_reader_gets_what_it_may_see_and_one_sum_for_all_of_that() {
        let (a, b) = (key(1, "org.a"), key(2, "org.b"));
        let total = |uid, now, daemon| History::Total {
            bus: Bus::Session(uid),
            total: Total { apps: 1, now, daemon, connections: 1, replaced: 1, ..Total::default() },
        };
        let row = |secs, what| HistoryRow { at: at(secs).wall, span: 0, what };
        let rows = vec![
            row(50, total(1, 100, 7)),
            row(50, total(2, 1000, 7)),
            row(60, app(&b, "frozen", 5)),
            row(10, app(&a, "awake", 9)),
            row(20, app(&a, "frozen", 4)),
            wake(&b, None),
        ];
        let see = |buses: &'static [u32], from| {
            let sees = |bus| matches!(bus, Bus::Session(uid) if buses.contains(&uid));
            Parts::new(rows.clone(), sees, at(from).wall).view(at(from).wall, at(100).wall)
        };
        let first = see(&[1], 0);
        assert_eq!((first.totals.len(), first.totals[0].total.now, first.totals[0].total.apps), (1, 100, 1));
        let states: Vec<&str> = first.apps[0].points.iter().map(|point| &*point.state).collect();
        assert_eq!((first.apps.len(), states, first.wakes.len()), (1, vec!["awake", "frozen"], 0));
        let both = see(&[1, 2], 0);
        let sum = both.totals[0].total;
        assert_eq!((sum.now, sum.apps, sum.daemon, sum.connections, sum.replaced), (1100, 2, 7, 1, 2));
        assert_eq!((both.apps.len(), both.wakes.len()), (2, 1));
        assert_eq!(see(&[1], 15).apps[0].points.len(), 1);
        assert_eq!(see(&[3], 0).apps, []);
    }
}
