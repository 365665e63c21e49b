//! Sleep: what is under way when the machine is about to sleep gets its chance, and what comes right after it woke up
//! reaches its app before it may sleep again (issue 3; logind's inhibitors, lifecycle.md).

use std::time::Duration;

use crate::{action::Action, time::Instant};

/// logind waits for 5 s (`InhibitDelayMaxSec=`) before it goes to sleep all the same.
const LONGEST_DELAY: Duration = Duration::from_secs(4);
/// However long the awake window of an app is.
const LONGEST_WINDOW: Duration = Duration::from_secs(30);

/// What the daemon has to do with the machine's sleep. Without sleep nothing, ever.
#[derive(Debug, Default)]
pub(super) struct Sleep {
    /// The machine waits to be allowed to sleep, until then.
    allow_by: Option<Instant>,
    /// It woke up: until then deliveries may keep it awake.
    window: Option<Instant>,
    keeping_awake: bool,
    ending: bool,
}

impl Sleep {
    /// The machine is about to sleep. Answered with exactly one `Action::AllowSleep`, unless it wakes up first.
    pub(super) fn falling_asleep(&mut self, now: Instant) {
        self.window = None;
        self.allow_by = Some(now + LONGEST_DELAY);
    }

    /// The machine slept: nobody waits for an answer any more. To be said before anything else is done at this time.
    pub(super) const fn slept(&mut self) {
        self.allow_by = None;
    }

    /// The machine woke up; `window` is how long apps may run for a message.
    pub(super) fn resumed(&mut self, window: Duration, now: Instant) {
        self.allow_by = None;
        let until = now + window.min(LONGEST_WINDOW);
        self.window = Some(self.window.map_or(until, |before| before.max(until)));
    }

    /// The daemon is about to exit: nothing keeps the machine awake any more.
    pub(super) const fn shutdown(&mut self) {
        self.ending = true;
    }

    /// Whether [`Sleep::next`] depends on anything.
    pub(super) const fn cares(&self) -> bool {
        self.allow_by.is_some() || self.window.is_some() || self.keeping_awake
    }

    /// The next thing to do, if any; `busy`: something is on its way to an app.
    pub(super) fn next(&mut self, busy: bool, now: Instant) -> Option<Action> {
        if self.window.is_some_and(|until| until <= now) {
            self.window = None;
        }
        let keep = busy && self.window.is_some() && !self.ending;
        if keep != self.keeping_awake {
            self.keeping_awake = keep;
            return Some(Action::StayAwake(keep));
        }
        self.allow_by.take_if(|by| !busy || *by <= now).map(|_| Action::AllowSleep)
    }

    /// When [`Sleep::next`] wants to be asked at the latest.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.allow_by.or(self.window.filter(|_| self.keeping_awake))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Duration::from_secs(10);
    const SECOND: u64 = 1_000_000_000;

    const fn at(secs: u64) -> Instant {
        Instant::from_nanos(secs * SECOND)
    }

    #[test]
    fn an_idle_daemon_lets_the_machine_sleep_at_once() {
        let mut sleep = Sleep::default();
        sleep.falling_asleep(at(1));
        assert_eq!(sleep.next(false, at(1)), Some(Action::AllowSleep));
        assert_eq!((sleep.next(false, at(1)), sleep.poll_timeout()), (None, None));
    }

    #[test]
    fn a_delivery_gets_its_chance_before_the_sleep_and_no_more() {
        let mut sleep = Sleep::default();
        sleep.falling_asleep(at(1));
        assert_eq!((sleep.next(true, at(1)), sleep.poll_timeout()), (None, Some(at(5))));
        assert_eq!(sleep.next(false, at(2)), Some(Action::AllowSleep), "it was taken");
        sleep.falling_asleep(at(10));
        assert_eq!(sleep.next(true, at(13)), None);
        assert_eq!(sleep.next(true, at(14)), Some(Action::AllowSleep), "it was not");
    }

    #[test]
    fn what_comes_after_a_resume_keeps_the_machine_awake_until_it_is_delivered() {
        let mut sleep = Sleep::default();
        sleep.resumed(WINDOW, at(100));
        assert_eq!((sleep.next(false, at(100)), sleep.poll_timeout()), (None, None), "no timer for nothing");
        assert_eq!(sleep.next(true, at(101)), Some(Action::StayAwake(true)));
        assert_eq!((sleep.next(true, at(101)), sleep.poll_timeout()), (None, Some(at(110))));
        assert_eq!(sleep.next(false, at(103)), Some(Action::StayAwake(false)));
        assert_eq!(sleep.next(true, at(104)), Some(Action::StayAwake(true)), "another one");
        assert_eq!(sleep.next(true, at(110)), Some(Action::StayAwake(false)), "the window is over");
        assert_eq!((sleep.next(true, at(111)), sleep.cares()), (None, false));
    }

    #[test]
    fn a_window_is_bounded_whatever_the_configuration_says() {
        let mut sleep = Sleep::default();
        sleep.resumed(Duration::from_secs(3600), at(100));
        assert_eq!(sleep.next(true, at(100)), Some(Action::StayAwake(true)));
        assert_eq!(sleep.poll_timeout(), Some(at(130)));
    }

    #[test]
    fn an_answer_nobody_waits_for_is_not_given() {
        let mut sleep = Sleep::default();
        sleep.falling_asleep(at(1));
        assert_eq!(sleep.next(true, at(2)), None);
        sleep.slept();
        assert_eq!(sleep.next(false, at(5000)), None, "the machine slept without it: it would be the next sleep's");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Falling,
        Resumed(u64),
        Busy(bool),
        Pass(u64),
        Shutdown,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Falling),
            (0_u64..100).prop_map(Step::Resumed),
            any::<bool>().prop_map(Step::Busy),
            (0_u64..20).prop_map(Step::Pass),
            Just(Step::Shutdown),
        ]
    }

    proptest! {
        #[test]
        fn every_true_has_one_false_and_every_question_one_answer(steps in prop::collection::vec(step(), 0..60)) {
            let (mut sleep, mut now, mut busy, mut resumed) = (Sleep::default(), at(1000), false, None);
            let (mut awake, mut asked, mut ended) = (false, None::<Instant>, false);
            for step in steps {
                match step {
                    Step::Falling => {
                        sleep.falling_asleep(now);
                        asked = Some(now);
                    }
                    Step::Resumed(window) => {
                        sleep.slept();
                        sleep.resumed(Duration::from_secs(window), now);
                        (asked, resumed) = (None, Some(now));
                    }
                    Step::Busy(now) => busy = now,
                    Step::Pass(secs) => {
                        let end = now + Duration::from_secs(secs);
                        now = sleep.poll_timeout().filter(|at| *at <= end).unwrap_or(end);
                    }
                    Step::Shutdown => {
                        sleep.shutdown();
                        ended = true;
                    }
                }
                while let Some(action) = sleep.next(busy, now) {
                    match action {
                        Action::StayAwake(keep) => {
                            prop_assert_ne!(awake, keep);
                            awake = keep;
                        }
                        Action::AllowSleep => prop_assert!(asked.take().is_some()),
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
                prop_assert!(!awake || busy && !ended);
                prop_assert!(!awake || resumed.is_some_and(|at: Instant| now < at + LONGEST_WINDOW));
                prop_assert!(asked.is_none_or(|at| busy && now < at + LONGEST_DELAY));
                prop_assert!(sleep.poll_timeout().is_none_or(|at| at > now), "a deadline in the past");
            }
        }
    }
}
