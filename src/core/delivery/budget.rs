//! How often one app may be woken: what a spammy sender can cost.
//!
//! A bucket of wake-ups for messages up to normal urgency, another for urgent ones, each filled again within an hour. When
//! the first is empty the app's messages are batched, when the second is, its urgent messages count as normal; both for
//! [`BATCH`].

use std::time::Duration;

use crate::time::Instant;

/// How long an app that has used up a budget is held to it. Android batches the work of apps that are seldom used by as long.
pub const BATCH: Duration = Duration::from_secs(15 * 60);
const HOUR: Duration = Duration::from_secs(3600);

/// One of an app's two buckets.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Budget {
    /// How much is used: as the time it takes until the bucket is full again.
    full_at: Option<Instant>,
    closed_until: Option<Instant>,
}

impl Budget {
    /// One wake-up of at most `most` in an hour. False when there is none left: closed from now on.
    pub(super) fn take(&mut self, most: usize, now: Instant) -> bool {
        let one = HOUR / u32::try_from(most.max(1)).unwrap_or(u32::MAX);
        let full_at = self.full_at.map_or(now, |at| at.max(now)) + one;
        if full_at.since(now) > HOUR {
            self.closed_until = Some(now + BATCH);
            return false;
        }
        self.full_at = Some(full_at);
        true
    }

    /// Whether it is used up and [`BATCH`] is not over.
    pub(super) const fn is_closed(&self) -> bool {
        self.closed_until.is_some()
    }

    /// When [`Budget::reopen`] wants to be called.
    pub(super) const fn closed_until(&self) -> Option<Instant> {
        self.closed_until
    }

    /// Time passed. True when it was closed and is no more.
    pub(super) fn reopen(&mut self, now: Instant) -> bool {
        self.closed_until.take_if(|at| *at <= now).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(secs: u64) -> Instant {
        Instant::from_nanos(secs * 1_000_000_000)
    }

    #[test]
    fn a_burst_up_to_the_most_passes_and_one_more_closes_it() {
        let mut budget = Budget::default();
        assert!((0..60).all(|_| budget.take(60, at(1000))));
        assert!(!budget.is_closed());
        assert!(!budget.take(60, at(1000)));
        assert_eq!(budget.closed_until(), Some(at(1000) + BATCH));
        assert!(!budget.reopen(at(1899)));
        assert!(budget.reopen(at(1900)));
        assert!((0..15).all(|_| budget.take(60, at(1900))), "a quarter of an hour fills a quarter");
        assert!(!budget.take(60, at(1900)));
    }

    #[test]
    fn never_more_than_twice_the_most_in_an_hour_and_a_steady_rate_below_it_for_ever() {
        let mut budget = Budget::default();
        assert!((0..10_000).all(|minute| budget.take(60, at(60 * minute))));
        let mut budget = Budget::default();
        let taken = (0..3600).filter(|secs| budget.take(60, at(*secs))).count();
        assert!((60..=120).contains(&taken), "{taken}");
    }
}
