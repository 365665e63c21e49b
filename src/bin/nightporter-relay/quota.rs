//! How fast one endpoint may be posted to: a token bucket each, in a table that cannot grow without bound.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// One bucket per endpoint.
#[derive(Debug)]
pub(crate) struct Rates {
    per_minute: u32,
    burst: u32,
    buckets: HashMap<i64, Bucket>,
    capacity: usize,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl Rates {
    /// Buckets that hold `burst` and gain `per_minute` a minute; at most `capacity` of them are remembered.
    pub(crate) fn new(per_minute: u32, burst: u32, capacity: usize) -> Self {
        Self { per_minute, burst, buckets: HashMap::new(), capacity }
    }

    /// Take one from the bucket of `channel`, or say how long until there is one.
    pub(crate) fn take(&mut self, channel: i64, now: Instant) -> Result<(), Duration> {
        let (per_second, burst) = (f64::from(self.per_minute) / 60.0, f64::from(self.burst));
        if self.buckets.len() >= self.capacity && !self.buckets.contains_key(&channel) {
            // A full bucket says nothing that a missing one does not.
            self.buckets.retain(|_, bucket| bucket.level_at(now, per_second) < burst);
            if self.buckets.len() >= self.capacity {
                return Err(Duration::from_secs(60));
            }
        }
        let bucket = self.buckets.entry(channel).or_insert(Bucket { level: burst, at: now });
        bucket.level = bucket.level_at(now, per_second).min(burst);
        bucket.at = now;
        if bucket.level >= 1.0 {
            bucket.level -= 1.0;
            Ok(())
        } else {
            Err(Duration::from_secs_f64((1.0 - bucket.level) / per_second))
        }
    }
}

impl Bucket {
    fn level_at(&self, now: Instant, per_second: f64) -> f64 {
        self.level + now.saturating_duration_since(self.at).as_secs_f64() * per_second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let (mut rates, start) = (Rates::new(60, 3, 10), Instant::now());
        for _ in 0..3 {
            assert_eq!(rates.take(1, start), Ok(()));
        }
        let wait = rates.take(1, start).unwrap_err();
        assert!(wait > Duration::from_millis(900) && wait <= Duration::from_secs(1), "{wait:?}");
        assert_eq!(rates.take(2, start), Ok(()), "another endpoint has its own bucket");
        assert_eq!(rates.take(1, start + Duration::from_secs(1)), Ok(()));
        assert!(rates.take(1, start + Duration::from_secs(1)).is_err());
    }

    #[test]
    fn the_table_is_bounded_and_forgets_full_buckets_first() {
        let (mut rates, start) = (Rates::new(60, 1, 2), Instant::now());
        assert_eq!(rates.take(1, start), Ok(()));
        assert_eq!(rates.take(2, start), Ok(()));
        assert!(rates.take(3, start).is_err(), "both are in use");
        let later = start + Duration::from_secs(5);
        assert_eq!(rates.take(3, later), Ok(()));
        assert_eq!(rates.buckets.len(), 1);
    }
}
