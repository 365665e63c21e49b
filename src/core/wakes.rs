//! Who is being made ready for a message (thawed, started), and who waits for a turn: a burst to many apps must not make a
//! phone start them all at once.
//!
//! What is urgent goes before everything else and waits for nothing but what is urgent as well.

use std::{cmp::Reverse, collections::BTreeMap, time::Duration};

use crate::{
    model::{AppKey, Urgency},
    time::Instant,
};

/// Wakes under way at a time. Starting an app is work for the processor and the flash; phones have four to eight cores, of
/// which half are slow, and two starts side by side leave room for what is in front.
const AT_ONCE: usize = 2;
/// More of them, for what is urgent alone.
const URGENT_AT_ONCE: usize = 2;
/// An app that is not ready by then does not hold up the others any more.
const TURN: Duration = Duration::from_secs(5);

/// The turns. Holds each app once at most.
#[derive(Debug, Default)]
pub(super) struct Wakes {
    waiting: BTreeMap<AppKey, Waiting>,
    /// With the end of its turn.
    under_way: BTreeMap<AppKey, Instant>,
    next: u64,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    urgency: Urgency,
    number: u64,
}

impl Wakes {
    /// The app is to be woken for something of this urgency. True when that is under way already; else it gets its turn
    /// from [`Wakes::next`].
    pub(super) fn ask(&mut self, app: &AppKey, urgency: Urgency) -> bool {
        if self.under_way.contains_key(app) {
            return true;
        }
        let number = self.next;
        self.next += 1;
        let waiting = self.waiting.entry(app.clone()).or_insert(Waiting { urgency, number });
        waiting.urgency = waiting.urgency.max(urgency);
        false
    }

    /// The next app whose turn it is: the most urgent, and of those the first that came.
    pub(super) fn next(&mut self, now: Instant) -> Option<AppKey> {
        let first = self.waiting.iter().min_by_key(|(_, waiting)| (Reverse(waiting.urgency), waiting.number));
        let (app, waiting) = first?;
        let room = if waiting.urgency >= Urgency::High { AT_ONCE + URGENT_AT_ONCE } else { AT_ONCE };
        self.under_way.retain(|_, until| now < *until);
        if self.under_way.len() >= room {
            return None;
        }
        let app = app.clone();
        self.waiting.remove(&app);
        self.under_way.insert(app.clone(), now + TURN);
        Some(app)
    }

    /// The app is ready, or not wanted any more.
    pub(super) fn done(&mut self, app: &AppKey) {
        self.waiting.remove(app);
        self.under_way.remove(app);
    }

    /// Whether the app waits for its turn.
    pub(super) fn is_waiting(&self, app: &AppKey) -> bool {
        self.waiting.contains_key(app)
    }

    /// All that wait.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &AppKey> {
        self.waiting.keys()
    }

    /// When [`Wakes::next`] wants to be asked again at the latest.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        if self.waiting.is_empty() {
            return None;
        }
        self.under_way.values().min().copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Bus;

    const fn at(secs: u64) -> Instant {
        Instant::from_nanos(secs * 1_000_000_000)
    }

    fn app(n: usize) -> AppKey {
        AppKey::new(Bus::System, format!("org.example.App{n}"))
    }

    fn ask_all(wakes: &mut Wakes, apps: std::ops::Range<usize>, urgency: Urgency) {
        for n in apps {
            assert!(!wakes.ask(&app(n), urgency));
        }
    }

    fn admitted(wakes: &mut Wakes, now: Instant) -> Vec<AppKey> {
        std::iter::from_fn(|| wakes.next(now)).collect()
    }

    #[test]
    fn two_at_a_time_in_the_order_of_urgency_and_age() {
        let mut wakes = Wakes::default();
        for (n, urgency) in [(1, Urgency::Low), (2, Urgency::Normal), (3, Urgency::Low), (4, Urgency::Normal)] {
            assert!(!wakes.ask(&app(n), urgency));
        }
        assert_eq!(admitted(&mut wakes, at(0)), [app(2), app(4)]);
        assert!(wakes.ask(&app(2), Urgency::Normal), "under way");
        wakes.done(&app(4));
        assert_eq!(admitted(&mut wakes, at(1)), [app(1)]);
        wakes.done(&app(2));
        assert_eq!(admitted(&mut wakes, at(1)), [app(3)]);
        assert_eq!(wakes.poll_timeout(), None, "nobody waits");
    }

    #[test]
    fn what_is_urgent_does_not_wait_for_what_is_not() {
        let mut wakes = Wakes::default();
        ask_all(&mut wakes, 0..10, Urgency::Normal);
        assert_eq!(admitted(&mut wakes, at(0)).len(), 2);
        wakes.ask(&app(9), Urgency::High);
        assert_eq!(admitted(&mut wakes, at(0)), [app(9)], "it became urgent while it waited");
        ask_all(&mut wakes, 20..40, Urgency::High);
        assert_eq!(admitted(&mut wakes, at(0)), [app(20)], "two that are urgent beside two that are not");
        wakes.done(&app(0));
        assert_eq!(admitted(&mut wakes, at(1)), [app(21)], "four in all");
        wakes.done(&app(9));
        assert_eq!(admitted(&mut wakes, at(1)), [app(22)]);
    }

    #[test]
    fn one_that_hangs_gives_its_turn_up() {
        let mut wakes = Wakes::default();
        ask_all(&mut wakes, 0..3, Urgency::Normal);
        assert_eq!(admitted(&mut wakes, at(0)).len(), 2);
        assert_eq!(wakes.poll_timeout(), Some(at(5)));
        assert_eq!(admitted(&mut wakes, at(4)), []);
        assert_eq!(admitted(&mut wakes, at(5)), [app(2)]);
    }

    #[test]
    fn one_that_is_not_wanted_any_more_is_left_out() {
        let mut wakes = Wakes::default();
        ask_all(&mut wakes, 0..3, Urgency::Normal);
        wakes.done(&app(1));
        assert_eq!(admitted(&mut wakes, at(0)), [app(0), app(2)]);
    }

    proptest! {
        #[test]
        fn never_too_many_and_everybody_in_the_end(asks in prop::collection::vec((0_usize..30, any::<bool>()), 0..80)) {
            let (mut wakes, mut woken) = (Wakes::default(), std::collections::BTreeSet::new());
            for (n, urgent) in &asks {
                wakes.ask(&app(*n), if *urgent { Urgency::High } else { Urgency::Normal });
                woken.extend(admitted(&mut wakes, at(0)));
                prop_assert!(wakes.under_way.len() <= AT_ONCE + URGENT_AT_ONCE);
            }
            for step in 1..=30 {
                woken.extend(admitted(&mut wakes, at(5 * step)));
            }
            prop_assert!(wakes.waiting.is_empty() && asks.iter().all(|(n, _)| woken.contains(&app(*n))));
        }
    }
}
