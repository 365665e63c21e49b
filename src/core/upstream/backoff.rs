//! When to try again: jitter under a doubling limit, the server's own wishes, and a pace for those in a hurry.
//!
//! Two cases that look alike are told apart. What happens to this phone alone, such as a returning network, is tried at
//! once and again soon. What may happen to every phone of the server at the same moment, such as the end of a link that
//! was good, is spread over [`CROWD_LIMIT`]. The figures were chosen by `examples/fleet` (`docs/scale.md`): a million of
//! these against one server.

use std::time::Duration;

use rand_chacha::{ChaCha12Rng, rand_core::Rng};

use crate::time::Instant;

/// No attempt follows a failed one sooner than this.
pub const FLOOR: Duration = Duration::from_millis(500);
/// The limit of the first delay after an event of this phone's own; it doubles with each failure.
pub const BASE: Duration = Duration::from_secs(1);
/// The limit of the first delay after a link that was good: the server may have dropped everybody. It doubles as well.
pub const CROWD_LIMIT: Duration = BASE.saturating_mul(1 << CROWD);
/// Where the doubling ends. A phone that is online is woken by the server's ping as often.
pub const CEILING: Duration = Duration::from_secs(300);
/// The longest delay after a refusal that only the user can mend, the shortest being half of it.
pub const REFUSED: Duration = Duration::from_secs(600);
/// The longest `Retry-After` obeyed: a server that says "in a year" must not silence a phone for good.
pub const LONGEST_WISH: Duration = Duration::from_secs(3600);
/// An attempt that an app's registration may force ahead of the backoff: one per this time in the long run…
pub const FORCED_PERIOD: Duration = Duration::from_secs(5);
/// …and this many at once, so that a phone's apps starting one by one do not wait.
pub const FORCED_BURST: u32 = 8;

/// Where the doubling begins for a link that was good.
const CROWD: u32 = 3;

/// The attempts of one session.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    /// How often the limit of the next delay has doubled.
    doublings: u32,
    retry_at: Option<Instant>,
    /// The server asked not to be tried before; not even a returning network changes that.
    not_before: Instant,
    /// Generic cell rate algorithm (ITU-T I.371): the time the next forced attempt would conform exactly.
    forced_tat: Instant,
}

impl Backoff {
    /// When the next attempt is due, if one is.
    pub const fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Whether the server has said nothing against an attempt now.
    pub fn allows(&self, now: Instant) -> bool {
        self.not_before <= now
    }

    /// An attempt begins, or none is wanted any more: nothing is due.
    pub const fn clear(&mut self) {
        self.retry_at = None;
    }

    /// The connection has proved itself: the next failure counts as the first, and may be everybody's.
    pub const fn succeeded(&mut self) {
        self.doublings = CROWD;
    }

    /// An attempt or a connection failed; `retry_after` is the server's wish, a minimum.
    pub fn failed(&mut self, retry_after: Option<Duration>, now: Instant, rng: &mut ChaCha12Rng) {
        match retry_after {
            // A crowd told the same second must not come back in the same second, nor as fast as it was told.
            Some(wish) => self.pause(wish, 1, now, rng),
            None => {
                let (soonest, limit) = self.next_delays();
                self.retry_at = Some((now + between(soonest, limit, rng)).max(self.not_before));
            }
        }
    }

    /// The same with a pause that the server has not asked for: what is known of its limits for a single phone.
    pub fn throttled(&mut self, pause: Duration, now: Instant, rng: &mut ChaCha12Rng) {
        self.pause(pause, 10, now, rng);
    }

    /// Refused for a reason that only the user can mend: try slowly from now on.
    pub fn refused(&mut self, now: Instant, rng: &mut ChaCha12Rng) {
        self.retry_at = Some((now + between(REFUSED / 2, REFUSED, rng)).max(self.not_before));
    }

    /// Try as soon as the server allows: the network came back, the machine woke up, the first registration came.
    pub fn at_once(&mut self, now: Instant) {
        self.own_event();
        self.retry_at = Some(now.max(self.not_before));
    }

    /// A link ended that was still to be proved after this phone's network changed: that it is dead says nothing of the
    /// server, which may have given it up long ago. Tried at once, unless another attempt is `under_way`.
    pub fn ended_in_doubt(&mut self, under_way: bool, now: Instant) {
        match under_way {
            true => self.own_event(),
            false => self.at_once(now),
        }
    }

    /// The network changed while an attempt is under way that may or may not know: should it fail, the next follows soon.
    pub const fn own_event(&mut self) {
        self.doublings = 0;
    }

    /// Somebody waits for an attempt: have one as soon as the server and the pace allow, if none is due before.
    pub fn hurry(&mut self, now: Instant) {
        let at = self.forced_at(now);
        if self.retry_at.is_none_or(|due| due > at) {
            self.retry_at = Some(at);
            self.forced_tat = self.forced_tat.max(at) + FORCED_PERIOD;
        }
    }

    /// Waits for at least `wish`, and up to the `part`th part of that longer.
    fn pause(&mut self, wish: Duration, part: u32, now: Instant, rng: &mut ChaCha12Rng) {
        let wish = wish.min(LONGEST_WISH);
        self.not_before = self.not_before.max(now + wish);
        // A wish too small for the crowd is outgrown.
        let soonest = wish.max(self.next_delays().0);
        let at = now + between(soonest, soonest + soonest.min(CEILING) / part, rng);
        self.retry_at = Some(at.max(self.not_before));
    }

    /// The shortest and the longest delay of the next failure. Not from nothing on: who draws next to nothing again and
    /// again fails thrice in the time of others' one attempt, and has then doubled to a wait of minutes.
    fn next_delays(&mut self) -> (Duration, Duration) {
        let limit = CEILING.min(BASE.saturating_mul(1 << self.doublings.min(16)));
        self.doublings = self.doublings.saturating_add(1);
        (FLOOR.max(limit / 4), limit)
    }

    /// When an attempt could be forced.
    fn forced_at(&self, now: Instant) -> Instant {
        let burst = FORCED_PERIOD * (FORCED_BURST - 1);
        now.max(self.not_before).max(self.forced_tat - burst)
    }
}

/// A duration from `low` to `high`, each as likely as the other; `low` when `high` is below it.
pub fn between(low: Duration, high: Duration, rng: &mut ChaCha12Rng) -> Duration {
    let span = u64::try_from(high.saturating_sub(low).as_millis()).unwrap_or(u64::MAX - 1);
    // The bias of a remainder over 2^64 is far below a millisecond in any span used here.
    low + Duration::from_millis(rng.next_u64() % (span + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    const START: Instant = Instant::from_nanos(1_000_000_000_000);

    fn rng(seed: u8) -> ChaCha12Rng {
        ChaCha12Rng::from_seed([seed; 32])
    }

    proptest! {
        #[test]
        fn delays_stay_within_floor_and_the_doubling_limit(seed: u8, failures in 0_u32..40) {
            let (mut backoff, mut rng) = (Backoff::default(), rng(seed));
            for n in 0..=failures {
                backoff.failed(None, START, &mut rng);
                let delay = backoff.retry_at().unwrap().since(START);
                prop_assert!(delay >= FLOOR);
                prop_assert!(delay <= CEILING.min(BASE * 2_u32.pow(n.min(16))));
            }
        }

        #[test]
        fn a_servers_wish_is_a_minimum_up_to_an_hour(seed: u8, wish in 0_u64..1_000_000) {
            let (mut backoff, mut rng) = (Backoff::default(), rng(seed));
            backoff.failed(Some(Duration::from_secs(wish)), START, &mut rng);
            let delay = backoff.retry_at().unwrap().since(START);
            prop_assert!(delay >= Duration::from_secs(wish).min(LONGEST_WISH));
            prop_assert!(delay <= LONGEST_WISH + CEILING);
        }
    }

    #[test]
    fn delays_spread_and_a_seed_repeats_them() {
        let series = |seed| {
            let (mut backoff, mut rng) = (Backoff::default(), rng(seed));
            (0..20)
                .map(|_| {
                    backoff.failed(None, START, &mut rng);
                    backoff.retry_at().unwrap()
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(series(1), series(1));
        assert_ne!(series(1), series(2));
        let late = &series(3)[10..];
        assert!(late.iter().min().unwrap().since(START) < CEILING / 2);
        assert!(late.iter().max().unwrap().since(START) > CEILING / 2);
    }

    #[test]
    fn the_network_resets_the_backoff_but_not_the_servers_wish() {
        let (mut backoff, mut rng) = (Backoff::default(), rng(4));
        for _ in 0..10 {
            backoff.failed(None, START, &mut rng);
        }
        backoff.at_once(START);
        assert_eq!(backoff.retry_at(), Some(START));
        backoff.failed(Some(Duration::from_secs(90)), START, &mut rng);
        backoff.at_once(START);
        assert_eq!(backoff.retry_at(), Some(START + Duration::from_secs(90)));
    }

    #[test]
    fn a_lost_link_is_spread_wider_than_an_event_of_the_phones_own() {
        let delays = |prepare: fn(&mut Backoff)| {
            let mut rng = rng(6);
            let delays = (0..1000).map(|_| {
                let mut backoff = Backoff::default();
                prepare(&mut backoff);
                backoff.failed(None, START, &mut rng);
                backoff.retry_at().unwrap().since(START)
            });
            let sorted: std::collections::BTreeSet<Duration> = delays.collect();
            (*sorted.first().unwrap(), *sorted.last().unwrap())
        };
        let (soonest, latest) = delays(Backoff::succeeded);
        assert!(soonest >= CROWD_LIMIT / 4 && soonest < CROWD_LIMIT / 3, "{soonest:?}");
        assert!(latest > CROWD_LIMIT * 9 / 10 && latest <= CROWD_LIMIT, "{latest:?}");
        assert!(delays(|backoff| backoff.at_once(START)).1 <= BASE);
        assert!(delays(|backoff| (backoff.succeeded(), backoff.own_event()).1).1 <= BASE);
    }

    #[test]
    fn a_crowd_told_to_wait_comes_back_over_as_long_again() {
        let mut rng = rng(7);
        let wish = Duration::from_secs(30);
        let mut tenths = [0; 10];
        for _ in 0..1000 {
            let mut backoff = Backoff::default();
            backoff.failed(Some(wish), START, &mut rng);
            let late = backoff.retry_at().unwrap().since(START + wish);
            tenths[(late.as_millis() * 10 / 30_001) as usize] += 1;
        }
        assert!(tenths.iter().all(|n| (50..200).contains(n)), "{tenths:?}");
        // What is known of a single phone's limit is no crowd's business.
        let mut backoff = Backoff::default();
        backoff.throttled(wish, START, &mut rng);
        assert!((wish..=wish + wish / 10).contains(&backoff.retry_at().unwrap().since(START)));
    }

    #[test]
    fn forced_attempts_keep_a_pace() {
        let (mut backoff, mut rng) = (Backoff::default(), rng(5));
        let mut attempts = 0;
        let mut now = START;
        for _ in 0..6000 {
            now = now + Duration::from_millis(10);
            backoff.hurry(now);
            if backoff.retry_at().is_some_and(|at| at <= now) {
                attempts += 1;
                backoff.clear();
                backoff.refused(now, &mut rng);
            }
        }
        assert!((12..=22).contains(&attempts), "{attempts} attempts in a minute");
    }
}
