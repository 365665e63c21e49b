//! When a change is told: not while it flaps, not before all of it is known, and only if it matters.

use std::time::Duration;

use crate::{
    model::Surroundings,
    time::{Instant, earliest},
};

/// How long things must be still before a change is told.
const STILL: Duration = Duration::from_secs(1);
/// A change is told after this long at the latest: while it flaps, while somebody owes an answer, while a service that
/// went away may be coming back.
const LONGEST: Duration = Duration::from_secs(10);
/// The battery is told of in steps of this many percent.
const STEP: u8 = 5;

/// What was told, and what is to be told when. No deadline while nothing is to be told.
#[derive(Debug)]
pub(super) struct Settling {
    /// Charge in percent up to which the battery is low: crossing it is told whatever the step.
    low_battery: u8,
    told: Option<Surroundings>,
    seen: Surroundings,
    due: Option<Instant>,
    latest: Option<Instant>,
}

impl Settling {
    pub(super) fn new(low_battery: u8) -> Self {
        Self { low_battery, told: None, seen: Surroundings::default(), due: None, latest: None }
    }

    /// Takes in how things are; `complete` unless more is expected soon.
    pub(super) fn update(&mut self, current: Surroundings, complete: bool, now: Instant) {
        let changed = self.seen != current;
        self.seen = current;
        if !self.matters() {
            (self.due, self.latest) = (None, None);
            return;
        }
        let latest = *self.latest.get_or_insert(now + LONGEST);
        self.due = match self.due {
            _ if !complete => None,
            // Nothing flaps yet.
            _ if self.told.is_none() => Some(now),
            Some(due) if !changed => Some(due),
            _ => Some((now + STILL).min(latest)),
        };
    }

    /// When [`Settling::poll`] has something to tell.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        earliest(self.due, self.latest)
    }

    /// What is to be told now.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Surroundings> {
        if self.poll_timeout().is_none_or(|at| at > now) {
            return None;
        }
        (self.due, self.latest) = (None, None);
        self.told = Some(self.seen.clone());
        self.told.clone()
    }

    fn matters(&self) -> bool {
        let nothing = Surroundings::default();
        let told = self.told.as_ref().unwrap_or(&nothing);
        if (told.on_mains, &told.network) != (self.seen.on_mains, &self.seen.network) {
            return true;
        }
        match (told.battery, self.seen.battery) {
            (Some(told), Some(seen)) => {
                told.abs_diff(seen) >= STEP || (told <= self.low_battery) != (seen <= self.low_battery)
            }
            (told, seen) => told != seen,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn at(tenths: u64) -> Instant {
        Instant::from_nanos(tenths * SECOND / 10)
    }

    fn battery(percent: u8) -> Surroundings {
        Surroundings { on_mains: Some(false), battery: Some(percent), ..Surroundings::default() }
    }

    fn told(percent: u8) -> Settling {
        let mut settling = Settling::new(15);
        settling.update(battery(percent), true, at(0));
        assert_eq!(settling.poll(at(0)), Some(battery(percent)));
        settling
    }

    #[test]
    fn the_first_is_told_when_all_is_known_and_nothing_is_told_of_nothing() {
        let mut settling = Settling::new(15);
        settling.update(Surroundings::default(), true, at(0));
        assert_eq!(settling.poll_timeout(), None);
        settling.update(battery(80), false, at(1));
        assert_eq!(settling.poll(at(99)), None);
        settling.update(battery(80), true, at(99));
        assert_eq!(settling.poll(at(99)), Some(battery(80)));
        assert_eq!(settling.poll_timeout(), None);
    }

    #[test]
    fn somebody_who_owes_an_answer_holds_it_up_for_ten_seconds() {
        let mut settling = Settling::new(15);
        settling.update(battery(80), false, at(1));
        assert_eq!(settling.poll_timeout(), Some(at(101)));
        assert_eq!(settling.poll(at(101)), Some(battery(80)));
    }

    #[test]
    fn a_change_waits_for_stillness_but_not_for_ever() {
        let mut settling = told(80);
        let mains = Surroundings { on_mains: Some(true), ..battery(80) };
        settling.update(mains.clone(), true, at(10));
        assert_eq!(settling.poll_timeout(), Some(at(20)));
        // Seen again, unchanged: no later.
        settling.update(mains, true, at(15));
        assert_eq!(settling.poll_timeout(), Some(at(20)));
        // Back to what was told: nothing to tell.
        settling.update(battery(80), true, at(16));
        assert_eq!(settling.poll_timeout(), None);
        // Never still.
        for tenth in (0..99).step_by(5) {
            let network = crate::model::Network { metered: tenth % 10 == 0, roaming: true, ..Default::default() };
            settling.update(Surroundings { network, ..battery(80) }, true, at(100 + tenth));
            assert_eq!(settling.poll(at(100 + tenth)), None);
        }
        assert_eq!(settling.poll_timeout(), Some(at(200)));
        assert!(settling.poll(at(200)).is_some());
        assert_eq!(settling.poll_timeout(), None);
    }

    #[test]
    fn the_battery_is_told_of_in_steps_and_when_it_becomes_low() {
        let mut settling = told(80);
        for percent in [79, 78, 77, 76, 79, 84] {
            settling.update(battery(percent), true, at(100));
            assert_eq!(settling.poll_timeout(), None, "{percent}");
        }
        settling.update(battery(75), true, at(100));
        assert_eq!(settling.poll(at(110)), Some(battery(75)));
        let mut settling = told(17);
        settling.update(battery(16), true, at(100));
        assert_eq!(settling.poll_timeout(), None);
        settling.update(battery(15), true, at(100));
        assert_eq!(settling.poll(at(110)), Some(battery(15)));
        settling.update(battery(16), true, at(120));
        assert_eq!(settling.poll(at(130)), Some(battery(16)));
        // A battery taken out.
        settling.update(Surroundings { on_mains: Some(true), ..Surroundings::default() }, true, at(140));
        assert!(settling.poll(at(150)).is_some());
    }

    #[test]
    fn a_service_that_restarts_is_not_told_of() {
        let mut settling = told(80);
        settling.update(Surroundings::default(), false, at(10));
        assert_eq!(settling.poll_timeout(), Some(at(110)));
        settling.update(battery(80), true, at(30));
        assert_eq!(settling.poll_timeout(), None);
        settling.update(Surroundings::default(), false, at(50));
        settling.update(Surroundings::default(), true, at(60));
        assert_eq!(settling.poll(at(70)), Some(Surroundings::default()));
    }
}
