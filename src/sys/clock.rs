//! Both clocks of [`Now`].

use std::{
    sync::atomic::{AtomicI32, Ordering},
    time::{Duration, UNIX_EPOCH},
};

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

/// Looks at the date in a response of `host` (RFC 9110 §5.6.7) and says in the log when this machine's clock is more than
/// a day away from it: what depends on dates (messages that expire, certificates) then goes wrong in ways nobody would
/// guess. Said once for each difference, in days.
pub fn compare(host: &str, date: &str) {
    static SAID: AtomicI32 = AtomicI32::new(0);
    let Some(theirs) = http_date(date) else { return };
    let ours = now().wall;
    let days = days_between(theirs, ours);
    if SAID.swap(days, Ordering::Relaxed) != days && days != 0 {
        log::warn!("this machine's clock says {ours}, but {host} says {theirs}: one of the two is wrong");
    }
}

/// Whole days, rounded towards zero.
fn days_between(one: UnixTime, other: UnixTime) -> i32 {
    let days = |span: Duration| i32::try_from(span.as_secs() / 86_400).unwrap_or(i32::MAX);
    days(other.since(one)) - days(one.since(other))
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`, the one form servers may send.
pub(super) fn http_date(text: &str) -> Option<UnixTime> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (_, text) = text.trim().strip_suffix(" GMT")?.split_once(", ")?;
    let mut parts = text.split(' ');
    let (day, month, year, time) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    let time = humantime::parse_rfc3339(&format!("{year}-{month:02}-{day}T{time}Z")).ok()?;
    Some(UnixTime::from_secs(time.duration_since(UNIX_EPOCH).ok()?.as_secs()))
}

fn nanos(clock: ClockId) -> u64 {
    // These clocks exist on every Linux that can run this program; a failure would mean a broken kernel, and zero makes
    // every deadline wait rather than fire.
    clock_gettime(clock)
        .map_or(0, |t| u64::try_from(t.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(t.tv_nsec()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_responses_are_read() {
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(UnixTime::from_secs(784_111_777)));
        for other in
            ["", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun, 06 Foo 1994 08:49:37 GMT", "Sun, 99 Nov 1994 0:0:0 GMT"]
        {
            assert_eq!(http_date(other), None, "{other}");
        }
    }

    #[test]
    fn a_day_is_a_day_in_either_direction() {
        let (one, other) = (UnixTime::from_secs(1_000_000), UnixTime::from_secs(1_000_000 + 90_000));
        assert_eq!(days_between(one, one), 0);
        assert_eq!(days_between(one, other), 1);
        assert_eq!(days_between(other, one), -1);
        assert_eq!(days_between(one, UnixTime::from_secs(1_000_000 + 86_399)), 0);
    }
}
