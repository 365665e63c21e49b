//! Rows of history as means over longer times.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    model::{AppKey, Bus, History, HistoryRow, Total},
    time::UnixTime,
};

/// Makes one row of all those that begin in the same hour, day or whatever `over` is, for each bus and each app. Rows
/// go in by time; what stands for so long already, and what is no mean, comes out as it is.
#[derive(Debug)]
pub(super) struct Means {
    /// In ms.
    over: u64,
    begin: u64,
    totals: BTreeMap<Bus, TotalMean>,
    apps: BTreeMap<AppKey, AppMean>,
}

impl Means {
    /// Means over so many seconds.
    pub(super) fn over(secs: u32) -> Self {
        Self { over: u64::from(secs.max(1)) * 1000, begin: 0, totals: BTreeMap::new(), apps: BTreeMap::new() }
    }

    /// One more row; those that are finished by it go to `out`.
    pub(super) fn add(&mut self, row: HistoryRow, out: &mut Vec<HistoryRow>) {
        let span = u64::from(row.span) * 1000;
        if span >= self.over || matches!(row.what, History::Wake { .. } | History::Would { .. }) {
            return out.push(row);
        }
        let at = row.at.as_millis();
        let begin = at - at % self.over;
        if begin != self.begin {
            self.finish(out);
            self.begin = begin;
        }
        match row.what {
            History::Total { bus, total } => self.totals.entry(bus).or_default().add(at, span, total),
            History::App { app, state, pss, zram, saved } => {
                self.apps.entry(app).or_default().add(at, span, Figures { state, pss, zram, saved });
            }
            History::Wake { .. } | History::Would { .. } => {}
        }
    }

    /// What is not finished yet goes to `out`.
    pub(super) fn finish(&mut self, out: &mut Vec<HistoryRow>) {
        let end = self.begin.saturating_add(self.over);
        let (at, span) = (UnixTime::from_millis(self.begin), u32::try_from(self.over / 1000).unwrap_or(u32::MAX));
        let mut tell = |what| out.push(HistoryRow { at, span, what });
        for (bus, mean) in std::mem::take(&mut self.totals) {
            tell(History::Total { bus, total: mean.finish(end) });
        }
        for (app, mean) in std::mem::take(&mut self.apps) {
            let Figures { state, pss, zram, saved } = mean.finish(end);
            tell(History::App { app, state, pss, zram, saved });
        }
    }
}

/// The mean of a figure, weighted by the time it held.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: i128,
    weight: i128,
}

impl Mean {
    fn add(&mut self, value: impl Into<i128>, weight: u64) {
        self.sum = self.sum.saturating_add(value.into().saturating_mul(weight.into()));
        self.weight += i128::from(weight);
    }

    fn value<T: TryFrom<i128>>(self) -> Option<T> {
        if self.weight == 0 {
            return None;
        }
        let half = if self.sum < 0 { -self.weight / 2 } else { self.weight / 2 };
        T::try_from(self.sum.saturating_add(half) / self.weight).ok()
    }
}

/// A row for a moment holds until the next one, of which it is closed, or the end.
#[derive(Debug)]
struct Open<T>(Option<(u64, T)>);

impl<T> Default for Open<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> Open<T> {
    /// What held until `until`, and how long.
    fn close(&mut self, until: u64) -> Option<(T, u64)> {
        self.0.take().map(|(since, figures)| (figures, until.saturating_sub(since).max(1)))
    }
}

#[derive(Debug)]
struct Figures {
    state: Arc<str>,
    pss: Option<u64>,
    zram: u64,
    saved: Option<i64>,
}

#[derive(Debug, Default)]
struct AppMean {
    open: Open<Figures>,
    pss: Mean,
    zram: Mean,
    saved: Mean,
    states: BTreeMap<Arc<str>, u64>,
}

impl AppMean {
    fn add(&mut self, at: u64, span: u64, figures: Figures) {
        self.close(at);
        if span == 0 { self.open = Open(Some((at, figures))) } else { self.held(figures, span) }
    }

    fn close(&mut self, until: u64) {
        if let Some((figures, time)) = self.open.close(until) {
            self.held(figures, time);
        }
    }

    fn held(&mut self, figures: Figures, time: u64) {
        if let Some(pss) = figures.pss {
            self.pss.add(pss, time);
        }
        self.zram.add(figures.zram, time);
        if let Some(saved) = figures.saved {
            self.saved.add(saved, time);
        }
        *self.states.entry(figures.state).or_default() += time;
    }

    fn finish(mut self, end: u64) -> Figures {
        self.close(end);
        Figures {
            state: self.states.into_iter().max_by_key(|(_, time)| *time).map(|(state, _)| state).unwrap_or_default(),
            pss: self.pss.value(),
            zram: self.zram.value().unwrap_or_default(),
            saved: self.saved.value(),
        }
    }
}

#[derive(Debug, Default)]
struct TotalMean {
    open: Open<Total>,
    means: [Mean; 8],
    messages: u32,
}

impl TotalMean {
    fn add(&mut self, at: u64, span: u64, total: Total) {
        self.close(at);
        self.messages = self.messages.saturating_add(total.messages);
        if span == 0 { self.open = Open(Some((at, total))) } else { self.held(total, span) }
    }

    fn close(&mut self, until: u64) {
        if let Some((total, time)) = self.open.close(until) {
            self.held(total, time);
        }
    }

    fn held(&mut self, total: Total, time: u64) {
        let Total { apps, running, resident, now, zram, daemon, connections, replaced, messages: _ } = total;
        let figures = [apps.into(), running.into(), resident, now, zram, daemon, connections.into(), replaced.into()];
        self.means.iter_mut().zip(figures).for_each(|(mean, figure)| mean.add(figure, time));
    }

    fn finish(mut self, end: u64) -> Total {
        self.close(end);
        let [apps, running, resident, now, zram, daemon, connections, replaced] = self.means;
        let count = |mean: Mean| mean.value().unwrap_or_default();
        let size = |mean: Mean| mean.value().unwrap_or_default();
        Total {
            apps: count(apps),
            running: count(running),
            resident: size(resident),
            now: size(now),
            zram: size(zram),
            daemon: size(daemon),
            connections: count(connections),
            replaced: count(replaced),
            messages: self.messages,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Urgency;

    const HOUR: u32 = 3600;

    fn key(name: &str) -> AppKey {
        AppKey::new(Bus::Session(1000), name)
    }

    fn at(minute: u64, span: u32, what: History) -> HistoryRow {
        HistoryRow { at: UnixTime::from_secs(minute * 60), span, what }
    }

    fn app(minute: u64, span: u32, name: &str, state: &str, pss: Option<u64>, saved: Option<i64>) -> HistoryRow {
        at(minute, span, History::App { app: key(name), state: state.into(), pss, zram: 60, saved })
    }

    fn total(minute: u64, span: u32, figure: u32) -> HistoryRow {
        let size = u64::from(figure) * 100;
        let total = Total {
            apps: figure,
            running: figure,
            resident: size,
            now: size,
            zram: size,
            daemon: size,
            connections: figure,
            replaced: figure,
            messages: 1,
        };
        at(minute, span, History::Total { bus: Bus::System, total })
    }

    fn means(over: u32, rows: Vec<HistoryRow>) -> Vec<HistoryRow> {
        let (mut means, mut out) = (Means::over(over), Vec::new());
        rows.into_iter().for_each(|row| means.add(row, &mut out));
        means.finish(&mut out);
        out
    }

    #[test]
    fn a_moment_holds_until_the_next_or_the_hours_end() {
        // 10 of 60 minutes nothing is known, 15 minutes it is running, 35 frozen.
        let rows = vec![
            app(10, 0, "a", "background", Some(1000), Some(0)),
            app(25, 0, "a", "frozen", Some(500), Some(500)),
            // Another app's rows do not end it.
            app(30, 0, "b", "gone", Some(7), None),
            app(70, 0, "a", "tombstone", Some(0), Some(1000)),
        ];
        let expected = [
            app(0, HOUR, "a", "frozen", Some(650), Some(350)),
            app(0, HOUR, "b", "gone", Some(7), None),
            app(60, HOUR, "a", "tombstone", Some(0), Some(1000)),
        ];
        assert_eq!(means(HOUR, rows), expected);
    }

    #[test]
    fn spans_weigh_what_they_are() {
        let rows = vec![app(0, 600, "a", "x", Some(100), Some(-10)), app(10, 1800, "a", "y", Some(500), Some(-30))];
        assert_eq!(means(HOUR, rows), [app(0, HOUR, "a", "y", Some(400), Some(-25))]);
        let rows = vec![app(0, HOUR, "a", "x", Some(1), None), app(60, HOUR, "a", "x", Some(2), None)];
        assert_eq!(means(24 * HOUR, rows.clone()), [app(0, 24 * HOUR, "a", "x", Some(2), None)]);
        assert_eq!(means(HOUR, rows.clone()), rows, "as long as that already");
    }

    #[test]
    fn what_is_not_known_has_no_weight() {
        let rows = vec![
            app(0, 600, "a", "x", None, None),
            app(10, 60, "a", "x", Some(40), Some(9)),
            app(11, 60, "a", "x", None, None),
        ];
        assert_eq!(means(HOUR, rows), [app(0, HOUR, "a", "x", Some(40), Some(9))]);
    }

    #[test]
    fn totals_are_means_and_messages_are_counted() {
        let rows = vec![total(0, 0, 10), total(15, 0, 20), total(45, 900, 40), total(61, 0, 7)];
        let out = means(HOUR, rows);
        // 15 minutes of 10, 30 of 20, 15 of 40.
        let mut expected = total(0, HOUR, 0);
        if let (History::Total { total: expected, .. }, History::Total { total: found, .. }) =
            (&mut expected.what, &out[0].what)
        {
            let size = 2250;
            *expected = Total { apps: 23, running: 23, connections: 23, replaced: 23, messages: 3, ..*expected };
            *expected = Total { resident: size, now: size, zram: size, daemon: size, ..*expected };
            assert_eq!(found, expected);
        }
        assert_eq!(out, [expected, total(60, HOUR, 7)]);
    }

    #[test]
    fn what_is_no_mean_stays() {
        let wake = History::Wake {
            app: key("a"),
            from: "frozen".into(),
            took: 1,
            urgency: Urgency::High,
            cpu: None,
            faults: None,
        };
        let would = History::Would { app: key("a"), state: "tombstone".into(), reason: "r".into(), saved: 1 };
        let rows = vec![at(1, 0, wake), at(2, 20, would)];
        assert_eq!(means(HOUR, rows.clone()), rows);
    }

    #[test]
    fn absurd_figures_and_times_are_survived() {
        let absurd = |at, span| HistoryRow {
            at: UnixTime::from_millis(at),
            span,
            what: History::App {
                app: key("a"),
                state: "".into(),
                pss: Some(u64::MAX),
                zram: u64::MAX,
                saved: Some(i64::MIN),
            },
        };
        let rows = vec![absurd(u64::MAX, 0), absurd(0, 1), absurd(u64::MAX - 1, HOUR - 1), absurd(5, u32::MAX)];
        let out = means(HOUR, rows);
        assert_eq!(out.len(), 4);
        for row in out {
            let History::App { pss, zram, saved, .. } = row.what else { panic!() };
            assert_eq!((pss, zram, saved), (Some(u64::MAX), u64::MAX, Some(i64::MIN)));
        }
        assert_eq!(means(0, vec![app(1, 0, "a", "x", Some(3), None)]).len(), 1);
    }
}
