//! systemd's watchdog (`WatchdogSec=`): the loop says that it is alive. It rides along with what wakes the loop anyway;
//! a wake-up of its own comes only after two thirds of the time without any. `WatchdogSec=15min` thus costs nothing on
//! a link with a heartbeat of less than 10 minutes.

use std::time::Duration;

use crate::time::Instant;

/// Off where systemd wants no sign of life.
#[derive(Debug)]
pub(super) struct Watchdog {
    /// `WATCHDOG_USEC` of sd_watchdog_enabled(3).
    limit: Option<Duration>,
    /// When it was last told; the start counts, since systemd counts from `READY=1`.
    told: Instant,
}

impl Watchdog {
    /// As the environment has it.
    pub(super) fn from_env(now: Instant) -> Self {
        Self::new(sd_notify::watchdog_enabled(), now)
    }

    fn new(limit: Option<Duration>, now: Instant) -> Self {
        Self { limit: limit.filter(|limit| !limit.is_zero()), told: now }
    }

    /// When the loop must turn at the latest.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.limit.map(|limit| self.told + limit / 3 * 2)
    }

    /// To be called at each turn of the loop.
    pub(super) fn turn(&mut self, now: Instant) {
        if self.is_due(now) {
            // What is not heard is told again at the next turn.
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
        }
    }

    /// Not at each of a thousand turns a second, but early enough that the next heartbeat need not be waited for.
    fn is_due(&mut self, now: Instant) -> bool {
        let due = self.limit.is_some_and(|limit| now.since(self.told) >= limit / 8);
        if due {
            self.told = now;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> Instant {
        Instant::from_nanos(secs * 1_000_000_000)
    }

    #[test]
    fn without_a_watchdog_there_is_no_timer() {
        for limit in [None, Some(Duration::ZERO)] {
            let mut watchdog = Watchdog::new(limit, at(1));
            assert_eq!(watchdog.poll_timeout(), None);
            assert!(!watchdog.is_due(at(1_000_000)));
        }
    }

    #[test]
    fn a_heartbeat_of_five_minutes_needs_no_further_wake_up() {
        let mut watchdog = Watchdog::new(Some(Duration::from_secs(900)), at(0));
        for beat in 1..100 {
            let now = at(beat * 300);
            assert!(watchdog.poll_timeout().is_some_and(|timeout| timeout > now));
            assert!(watchdog.is_due(now));
        }
    }

    #[test]
    fn alone_it_is_told_well_within_the_limit() {
        let mut watchdog = Watchdog::new(Some(Duration::from_secs(900)), at(100));
        assert_eq!(watchdog.poll_timeout(), Some(at(700)));
        assert!(watchdog.is_due(at(700)));
        assert_eq!(watchdog.poll_timeout(), Some(at(1300)));
    }

    #[test]
    fn a_busy_loop_does_not_tell_it_each_turn() {
        let mut watchdog = Watchdog::new(Some(Duration::from_secs(900)), at(0));
        let told = (0..900).filter(|second| watchdog.is_due(at(*second))).count();
        assert_eq!(told, 7);
    }
}
