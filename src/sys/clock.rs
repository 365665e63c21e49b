//! Both clocks of [`Now`].

use nix::time::{ClockId, clock_gettime};

use crate::time::{Instant, Now, UnixTime};

/// CLOCK_BOOTTIME and CLOCK_REALTIME, now.
pub fn now() -> Now {
    Now { boot: boot(), wall: UnixTime::from_millis(nanos(ClockId::CLOCK_REALTIME) / 1_000_000) }
}

/// CLOCK_BOOTTIME, now.
pub fn boot() -> Instant {
    Instant::from_nanos(nanos(ClockId::CLOCK_BOOTTIME))
}

/// How long the machine has slept since boot: what CLOCK_BOOTTIME counts and CLOCK_MONOTONIC does not, in nanoseconds.
/// Grows only over a suspend.
pub fn slept_nanos() -> u64 {
    nanos(ClockId::CLOCK_BOOTTIME).saturating_sub(nanos(ClockId::CLOCK_MONOTONIC))
}

fn nanos(clock: ClockId) -> u64 {
    // These clocks exist on every Linux that can run this program; a failure would mean a broken kernel, and zero makes
    // every deadline wait rather than fire.
    clock_gettime(clock)
        .map_or(0, |t| u64::try_from(t.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(t.tv_nsec()).unwrap_or(0))
}
