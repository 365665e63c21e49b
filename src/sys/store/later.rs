//! History that waits for another write to join: for it alone the flash is written once an hour at most.

use std::time::{Duration, Instant};

use crate::{
    event::StoreTicket,
    model::{AppKey, History, HistoryRow},
};

/// How long it waits at most.
const WAIT: Duration = Duration::from_secs(3600);
/// With so many rows it is written at once. While the disk takes nothing the oldest go.
const ROWS: usize = 1000;

/// Rows that are not written yet.
#[derive(Debug, Default)]
pub(super) struct Later {
    pub(super) rows: Vec<HistoryRow>,
    pub(super) tickets: Vec<StoreTicket>,
    due: Option<Instant>,
    /// Could not be written: not tried again with each write, but when it is due.
    blocked: bool,
}

impl Later {
    pub(super) fn add(&mut self, rows: &[HistoryRow], ticket: Option<StoreTicket>, now: Instant) {
        self.rows.extend_from_slice(rows);
        self.tickets.extend(ticket);
        if !self.is_empty() {
            self.due.get_or_insert_with(|| now + WAIT);
        }
        self.shorten();
    }

    /// When it has waited long enough.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.tickets.is_empty()
    }

    /// Whether it need not wait for company any more.
    pub(super) fn must(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now) || (!self.blocked && self.rows.len() >= ROWS)
    }

    /// What there is to write with others, or alone if it must.
    pub(super) fn take(&mut self, company: bool, now: Instant) -> Self {
        if (company && !self.blocked) || self.must(now) { std::mem::take(self) } else { Self::default() }
    }

    /// It could not be written.
    pub(super) fn put_back(&mut self, failed: Self, now: Instant) {
        let after = std::mem::replace(&mut self.rows, failed.rows);
        self.rows.extend(after);
        (self.due, self.blocked) = (Some(now + WAIT), true);
        self.shorten();
    }

    /// Nothing is kept of the app.
    pub(super) fn forget(&mut self, app: &AppKey) {
        self.rows.retain(|row| match &row.what {
            History::Total { .. } => true,
            History::App { app: of, .. } | History::Wake { app: of, .. } | History::Would { app: of, .. } => of != app,
        });
    }

    fn shorten(&mut self) {
        if self.blocked {
            self.rows.drain(..self.rows.len().saturating_sub(ROWS));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Bus, Total},
        time::UnixTime,
    };

    fn rows(count: u64) -> Vec<HistoryRow> {
        let row = |at| HistoryRow {
            at: UnixTime::from_secs(at),
            span: 0,
            what: History::Total { bus: Bus::System, total: Total::default() },
        };
        (0..count).map(row).collect()
    }

    #[test]
    fn it_waits_an_hour_from_the_first() {
        let start = Instant::now();
        let mut later = Later::default();
        assert_eq!(later.due(), None);
        later.add(&rows(1), None, start);
        later.add(&rows(1), Some(StoreTicket(7)), start + WAIT / 2);
        assert_eq!(later.due(), Some(start + WAIT));
        assert!(later.take(false, start + WAIT / 2).is_empty());
        assert!(later.must(start + WAIT));
        let taken = later.take(false, start + WAIT);
        assert_eq!((taken.rows.len(), taken.tickets), (2, vec![StoreTicket(7)]));
        assert_eq!((later.is_empty(), later.due()), (true, None));
        later.add(&rows(3), None, start);
        assert_eq!(later.take(true, start).rows.len(), 3, "company");
        later.add(&[], None, start);
        assert_eq!(later.due(), None);
    }

    #[test]
    fn what_fails_waits_and_stays_bounded() {
        let start = Instant::now();
        let mut later = Later::default();
        later.add(&rows(ROWS as u64), None, start);
        let taken = later.take(false, start);
        assert_eq!(taken.rows.len(), ROWS, "as many are written at once");
        later.put_back(taken, start);
        assert!(later.take(true, start).is_empty(), "not with each write");
        later.add(&rows(10), None, start);
        assert_eq!(later.rows.len(), ROWS);
        assert_eq!(later.rows.last(), rows(10).last());
        assert_eq!(later.take(false, start + WAIT).rows.len(), ROWS);
        later.add(&rows(1), None, start);
        assert_eq!(later.take(true, start).rows.len(), 1, "as ever afterwards");
    }
}
