//! Keeps a peer from filling the log: one line a minute, with the number of those left out.

use std::time::Duration;

use crate::time::Instant;

const PERIOD: Duration = Duration::from_secs(60);

/// One kind of complaint about one peer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Quiet {
    until: Instant,
    left_out: u64,
}

impl Quiet {
    /// Logs `what` as a warning unless one was logged within the last minute.
    pub(super) fn warn(&mut self, what: impl std::fmt::Display, now: Instant) {
        if now < self.until {
            self.left_out = self.left_out.saturating_add(1);
            return;
        }
        match self.left_out {
            0 => log::warn!("{what}"),
            more => log::warn!("{what} (and {more} like it in the last minute or more)"),
        }
        *self = Self { until: now + PERIOD, left_out: 0 };
    }
}

/// Enough of a secret to tell two apart in a log.
pub(super) fn hint(secret: &str) -> &str {
    secret.get(..6).unwrap_or("")
}
