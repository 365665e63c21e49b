//! What the ledger writes and says: little, and nothing that does not add up.

use std::{collections::BTreeMap, time::Duration};

use nightporter::{
    model::{AppKey, Bus, History, HistoryRow, Profile},
    time::UnixTime,
    view,
};

use crate::world::World;

/// Real memory behind all zram there is here.
pub(crate) const ZRAM: u64 = 1000;

/// With what has been paged out since that was read.
const MOST: u64 = ZRAM + 64 * 3000;

/// What this life of the daemon has written.
#[derive(Default)]
pub(crate) struct Written {
    totals: BTreeMap<Bus, UnixTime>,
    would: BTreeMap<AppKey, UnixTime>,
}

impl Written {
    /// Nothing is kept of the app any more.
    pub(crate) fn forget(&mut self, app: &AppKey) {
        self.would.remove(app);
    }
}

impl World {
    /// However much happens, rows are few.
    pub(crate) fn check_rows(&mut self, rows: &[HistoryRow]) {
        assert!((1..=512).contains(&rows.len()), "{} rows at a time", rows.len());
        let mut apps: BTreeMap<&AppKey, UnixTime> = BTreeMap::new();
        for row in rows {
            let end = row.at + Duration::from_secs(row.span.into());
            match &row.what {
                History::Total { bus, total } => {
                    self.count("totals written");
                    let before = self.ledger.totals.insert(*bus, row.at);
                    let apart = before.map(|before| row.at.since(before));
                    assert!(apart.is_none_or(|apart| apart.as_secs() >= 60), "totals {apart:?} apart");
                    assert!(total.running <= total.apps && total.zram <= MOST, "{total:?}");
                }
                History::App { app, zram, .. } => {
                    self.count("rows of apps written");
                    let before = apps.insert(app, row.at);
                    let apart = before.map(|before| row.at.since(before));
                    assert!(apart.is_none_or(|apart| apart.as_secs() >= 15), "rows of {app} {apart:?} apart");
                    assert!(*zram <= MOST, "{app} has {zram} KiB of zram");
                }
                History::Wake { .. } => self.count("wakes written"),
                History::Would { app, .. } => {
                    self.count("shadows written");
                    assert_eq!(self.plan.profile, Profile::Observe, "{app} would be, and is");
                    let before = self.ledger.would.insert(app.clone(), end);
                    assert!(before.is_none_or(|before| before <= row.at), "{app} would be two things at a time");
                }
            }
        }
    }

    /// The ledger's documents.
    pub(crate) fn check_books(&mut self, text: &str) {
        if let Ok(report) = serde_json::from_str::<view::Report>(text) {
            self.count("reports");
            let sum = |parts: &[u64]| parts.iter().map(|part| *part as i64).sum::<i64>();
            let spent = sum(&[report.now, report.zram, report.daemon.pss, report.sockets]);
            let saved = report.resident as i64 - spent - report.cache + report.kernel - report.drift;
            assert_eq!(report.saved, saved, "{report:?}");
            assert!(report.zram <= MOST, "{report:?}");
            for row in &report.apps {
                if let (Some(saved), Some(before), Some(after)) = (row.saved, row.resident, row.now) {
                    let pages = before.pss as i64 - after.pss as i64 - row.cache;
                    assert_eq!(saved, pages + row.kernel - row.zram as i64 - row.drift, "{row:?}");
                }
            }
            let account = report.account.expect("it is kept");
            assert_eq!(account.wakes.len(), 4);
            assert!(account.wakes.iter().all(|wakes| wakes.p50_ms <= wakes.p95_ms && wakes.p95_ms <= wakes.max_ms));
            assert!(account.hours >= 0.0 && account.saved_mib_hours.is_finite());
        } else if let Ok(history) = serde_json::from_str::<view::History>(text) {
            self.count("histories read");
            assert!(history.totals.is_sorted_by_key(|at| at.at), "{:?}", history.totals);
            assert!(history.apps.iter().all(|app| app.points.is_sorted_by_key(|at| at.at)), "{:?}", history.apps);
        } else if let Ok(what_if) = serde_json::from_str::<view::WhatIf>(text) {
            self.count("shadows read");
            let observed = what_if.hours * 3600.0;
            assert!(what_if.hours <= 1.0 + 1e-9 && what_if.saved_mib_hours.is_finite(), "{what_if:?}");
            for app in &what_if.apps {
                let told: u64 = app.spans.iter().map(|span| span.secs).sum();
                assert!(told as f64 <= observed + 5.0, "{} s of {observed}: {app:?}", told);
                assert!(app.spans.is_empty() || self.plan.profile == Profile::Observe, "{app:?}");
            }
        }
    }
}
