//! Percentiles.

use std::time::Duration;

/// The smallest sample that at least `percent` % of `samples` do not exceed (nearest rank); zero of none.
pub(crate) fn percentile(samples: &[Duration], percent: usize) -> Duration {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}
