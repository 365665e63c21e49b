//! The lifecycle as a specification: one scenario a rule, on a stepping clock.

use std::{sync::Arc, time::Duration};

use super::*;
use crate::{
    model::{LifecycleTimes, Profile, VetoKind, ZramSource},
    time::UnixTime,
};

const T1: TargetId = TargetId(1);
const T2: TargetId = TargetId(2);
const T3: TargetId = TargetId(3);
const ITSELF: &str = "the app itself";
const SHELL: &str = "the shell (sm.puri.Phosh)";
const FROZEN: Outcome = Outcome::Frozen { took: Duration::from_millis(1) };
const THAWED: Outcome = Outcome::Thawed { took: Duration::from_millis(1) };
const PAGED: Outcome =
    Outcome::PagedOut { freed: 9000, zram: 3000, source: ZramSource::Measured, took: Duration::from_millis(9) };
const LARGE: Memory = Memory { pss: 40_000, uss: 30_000, swap: 0 };
const KILL: Output = Output::Kill { target: T1, grace: Duration::from_secs(5) };
const RESIDENT: Output = Output::Sample(T1, SampleKind::Resident);

fn app() -> AppKey {
    AppKey::new(Bus::Session(1000), "org.example.Chat")
}

fn owner(n: u32) -> Owner {
    Owner(format!(":1.{n}").into())
}

fn facts(pid: u32) -> ProcessFacts {
    ProcessFacts { pid, freezer: Freezer::Cgroup2, can_page_out: true, protected: None }
}

struct World {
    life: Lifecycle,
    now: Now,
    app: AppKey,
    /// Inspections are answered at once, with nothing found.
    clear: bool,
}

impl World {
    fn new(profile: Profile, declares: bool) -> Self {
        let record = AppRecord { app: app(), declares, resident: None, measured: None, conditions: None };
        let now = Now { boot: Instant::from_nanos(1_000_000_000_000), wall: UnixTime::from_secs(1_700_000_000) };
        let mut life = Lifecycle::new(Rules::new(profile, LifecycleTimes::default()), BTreeMap::new(), &[record]);
        life.add_app(&app(), now);
        life.startable(&app(), true, now);
        Self { life, now, app: app(), clear: true }
    }

    /// Running and identified; nothing said yet.
    fn running(profile: Profile) -> Self {
        let mut world = Self::new(profile, false);
        world.life.appeared(&world.app, &owner(1), false, world.now);
        world.identify(1, T1);
        world
    }

    fn background(profile: Profile) -> Self {
        let mut world = Self::running(profile);
        world.declare(Claim::Background);
        assert_eq!(world.acts(), [Output::Record { app: app(), declares: true }]);
        world
    }

    /// Frozen and measured, 10 s after it went to the background.
    fn frozen(profile: Profile) -> Self {
        let mut world = Self::background(profile);
        world.pass(10);
        assert_eq!(world.acts(), [RESIDENT]);
        world.sampled(LARGE);
        assert_eq!(world.acts(), [Output::Freeze(T1)]);
        assert_eq!(world.state(), "freezing");
        world.outcome(FROZEN);
        assert_eq!(world.acts(), [Output::Sample(T1, SampleKind::Frozen)]);
        world.sampled(LARGE);
        assert_eq!(world.acts(), []);
        assert_eq!(world.state(), "frozen");
        world
    }

    fn identify(&mut self, n: u32, target: TargetId) {
        self.life.identified(&self.app, &owner(n), Ok((target, facts(100 + n))), self.now);
    }

    fn declare(&mut self, claim: Claim) {
        self.life.declare(&self.app, claim, ITSELF, self.now);
    }

    fn outcome(&mut self, outcome: Outcome) {
        self.life.outcome(T1, &outcome, self.now);
    }

    fn sampled(&mut self, memory: Memory) -> Option<SampleKind> {
        let kind = self.life.sampled(T1, Ok(memory), self.now);
        self.inspect();
        kind
    }

    fn wanted(&mut self) -> Readiness {
        self.life.set_pending(&self.app, true, self.now);
        self.life.wanted(&self.app, self.now)
    }

    /// The app took its message and none is left.
    fn delivered(&mut self) {
        self.life.delivered(&self.app, Priority::Normal, self.now);
        self.life.set_pending(&self.app, false, self.now);
    }

    fn command(&mut self, command: Command) -> Result<(), Refusal> {
        self.life.command(&self.app, command, "root", self.now)
    }

    /// Lets time pass, deadline by deadline.
    fn pass(&mut self, secs: u64) {
        self.pass_millis(secs * 1000);
    }

    fn pass_millis(&mut self, millis: u64) {
        let end = self.now.boot + Duration::from_millis(millis);
        while let Some(next) = self.life.poll_timeout().filter(|next| *next <= end) {
            assert!(next > self.now.boot, "asked again for an instant that is past");
            self.step_to(next);
            self.life.handle_timeout(self.now);
            self.inspect();
        }
        self.step_to(end);
    }

    fn step_to(&mut self, boot: Instant) {
        self.now = Now { boot, wall: self.now.wall + boot.since(self.now.boot) };
    }

    /// Answers what is asked of an inspection.
    fn inspect(&mut self) {
        while let Some(at) = self.life.out.iter().position(|out| self.clear && matches!(out, Output::Inspect(_))) {
            if let Some(Output::Inspect(target)) = self.life.out.remove(at) {
                self.life.inspected(target, &Ok(Vec::new()), self.now);
            }
        }
    }

    /// What is to be done, without what is told.
    fn acts(&mut self) -> Vec<Output> {
        self.inspect();
        std::iter::from_fn(|| self.life.poll_output()).filter(|out| !matches!(out, Output::Decided(..))).collect()
    }

    fn told(&mut self) -> Vec<String> {
        self.inspect();
        std::iter::from_fn(|| self.life.poll_output())
            .filter_map(|out| match out {
                Output::Decided(_, decision) => Some(format!("{}: {}", decision.verdict, decision.reason)),
                _ => None,
            })
            .collect()
    }

    fn why(&self) -> String {
        let newest = self.life.decisions(&self.app).last().expect("nothing was decided");
        format!("{}: {}", newest.verdict, newest.reason)
    }

    fn state(&self) -> &'static str {
        self.life.show(&self.app, self.now).expect("unknown app").state.as_str()
    }

    fn done(&self, command: Command, result: Result<(), &str>) -> Output {
        Output::CommandDone(self.app.clone(), command, result.map_err(str::to_owned))
    }
}

#[test]
fn the_whole_way_down_to_the_tombstone_and_up_again() {
    let mut world = World::frozen(Profile::Tombstone);
    world.pass(59);
    assert_eq!(world.acts(), []);
    world.pass(1);
    assert_eq!(world.acts(), [Output::PageOut(T1)]);
    assert_eq!(world.why(), "page-out: it has been frozen for 60 s");
    world.outcome(PAGED);
    assert_eq!(world.acts(), [Output::Sample(T1, SampleKind::PagedOut)]);
    assert_eq!(world.sampled(LARGE), Some(SampleKind::PagedOut));
    assert_eq!(world.state(), "reclaimed");
    world.pass(600 - 71);
    assert_eq!(world.acts(), []);
    world.pass(1);
    assert_eq!(world.acts(), [KILL]);
    assert_eq!(world.why(), "kill: it has been in the background without a message for 10 min");
    assert_eq!(world.state(), "ending");
    world.life.vanished(&world.app, world.now);
    assert_eq!(world.state(), "ending");
    world.life.target_gone(T1, world.now);
    assert_eq!(world.acts(), [Output::Forget(T1)]);
    assert_eq!(world.state(), "tombstone");
    assert_eq!(world.life.poll_timeout(), None);

    // The next message starts it; it has declared a state, so it counts as in the background.
    assert_eq!(world.wanted(), Readiness::NotRunning);
    world.life.appeared(&world.app, &owner(2), true, world.now);
    world.identify(2, T2);
    assert_eq!(world.state(), "awake");
    world.delivered();
    world.pass(9);
    assert_eq!((world.state(), world.acts()), ("awake", vec![]));
    world.pass(1);
    assert_eq!(world.acts(), [Output::Sample(T2, SampleKind::Resident)]);
    world.life.sampled(T2, Ok(LARGE), world.now);
    assert_eq!(world.acts(), [Output::Freeze(T2)]);
    assert_eq!(world.why(), "freeze: it is in the background and its time after a message or a thaw is over");
}

#[test]
fn why_reads_like_a_story() {
    let mut world = World::background(Profile::Tombstone);
    world.pass(10);
    world.sampled(LARGE);
    world.outcome(FROZEN);
    let _ = world.wanted();
    world.outcome(THAWED);
    world.delivered();
    world.life.declare(&world.app, Claim::Foreground, SHELL, world.now);
    let why: Vec<_> = world.life.decisions(&world.app).map(|d| format!("{}: {}", d.verdict, d.reason)).collect();
    assert_eq!(
        why,
        [
            "leave: nothing says that it is in the background",
            "leave: it went to the background and may run for 10 s more",
            "freeze: it has been in the background for 10 s",
            "thaw: a message is waiting for it",
            "leave: it may run for 10 s after a message or a thaw",
            "leave: the shell (sm.puri.Phosh) says that it is in the foreground",
        ]
    );
}

#[test]
fn unknown_is_foreground() {
    let mut world = World::running(Profile::Tombstone);
    assert_eq!(world.state(), "foreground");
    assert_eq!(world.life.poll_timeout(), None);
    world.pass(100_000);
    assert_eq!(world.acts(), []);
    // Started for a message, but it never said that it can be in the background.
    let mut world = World::new(Profile::Tombstone, false);
    world.life.set_pending(&world.app, true, world.now);
    world.life.appeared(&world.app, &owner(1), true, world.now);
    world.identify(1, T1);
    world.delivered();
    assert_eq!(world.state(), "foreground");
    assert_eq!(world.life.poll_timeout(), None);
    world.pass(100_000);
    assert_eq!(world.acts(), []);
    assert_eq!(world.why(), "leave: it has never said whether it is in the foreground, so it may be");
    // Not started by us: whatever it declared in an earlier life.
    let mut world = World::new(Profile::Tombstone, true);
    world.life.appeared(&world.app, &owner(1), false, world.now);
    world.identify(1, T1);
    world.pass(100_000);
    assert_eq!((world.state(), world.acts()), ("foreground", vec![]));
}

#[test]
fn coming_to_the_foreground_thaws_at_once_in_every_state() {
    let mut world = World::frozen(Profile::Tombstone);
    world.declare(Claim::Foreground);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
    assert_eq!((world.state(), &*world.why()), ("frozen", "thaw: the app itself says that it is in the foreground"));
    world.outcome(THAWED);
    assert_eq!((world.state(), world.acts(), world.life.poll_timeout()), ("foreground", vec![], None));

    // Reclaimed.
    let mut world = World::frozen(Profile::Tombstone);
    world.pass(60);
    world.outcome(PAGED);
    world.acts();
    world.declare(Claim::Foreground);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);

    // Freezing; the freeze's own outcome comes before or after the thaw's.
    for late in [false, true] {
        let mut world = World::background(Profile::Tombstone);
        world.pass(10);
        world.sampled(LARGE);
        world.acts();
        world.declare(Claim::Foreground);
        assert_eq!(world.acts(), [Output::Thaw(T1)]);
        if late {
            world.outcome(THAWED);
            assert_eq!(world.state(), "foreground");
            world.outcome(FROZEN);
            assert_eq!(world.acts(), [Output::Thaw(T1)], "an outcome out of order must not leave it frozen");
        } else {
            world.outcome(FROZEN);
        }
        world.outcome(THAWED);
        assert_eq!((world.state(), world.acts()), ("foreground", vec![]));
    }
}

#[test]
fn going_to_the_background_again_starts_the_grace_anew_but_saying_it_twice_does_not() {
    let mut world = World::background(Profile::Cached);
    world.pass(9);
    world.declare(Claim::Background);
    world.pass(1);
    assert_eq!(world.acts(), [RESIDENT]);
    world.declare(Claim::Foreground);
    world.declare(Claim::Background);
    assert_eq!(world.sampled(LARGE), None, "a measurement taken over a turn in the foreground is no baseline");
    world.pass(9);
    assert_eq!(world.acts(), []);
    world.pass(1);
    assert_eq!(world.acts(), [RESIDENT]);
}

#[test]
fn the_baseline_is_taken_once_an_instance() {
    let mut world = World::frozen(Profile::Cached);
    world.declare(Claim::Foreground);
    world.outcome(THAWED);
    world.declare(Claim::Background);
    world.acts();
    world.pass(10);
    assert_eq!(world.acts(), [Output::Freeze(T1)]);
}

#[test]
fn a_measurement_that_fails_or_gets_lost_does_not_stop_the_freeze() {
    let mut world = World::background(Profile::Tombstone);
    world.pass(10);
    world.acts();
    assert_eq!(world.life.sampled(T1, Err("no access".into()), world.now), Some(SampleKind::Resident));
    world.inspect();
    let told =
        ["not-measured: its memory could not be measured: no access", "freeze: it has been in the background for 10 s"];
    let decisions: Vec<_> = world.life.decisions(&world.app).map(|d| format!("{}: {}", d.verdict, d.reason)).collect();
    assert_eq!(decisions[decisions.len() - 2..], told);
    assert_eq!(world.acts(), [Output::Freeze(T1)]);

    let mut world = World::background(Profile::Tombstone);
    world.pass(10);
    world.acts();
    world.pass(4);
    assert_eq!(world.acts(), []);
    world.pass(1);
    assert_eq!(world.acts(), [Output::Freeze(T1)]);
    assert_eq!(world.sampled(LARGE), None, "too late to be a baseline");
}

#[test]
fn what_would_free_little_is_not_paged_out() {
    let mut world = World::background(Profile::Cached);
    world.pass(10);
    world.sampled(Memory { pss: 60_000, uss: 8191, swap: 0 });
    world.outcome(FROZEN);
    world.sampled(LARGE);
    world.acts();
    world.pass(60);
    assert_eq!(world.acts(), []);
    assert_eq!(world.why(), "leave: its memory is not paged out: it holds less than 8 MiB of its own");
    assert_eq!(world.life.poll_timeout(), None, "profile cached: nothing is due any more");

    let mut world = World::frozen(Profile::Cached);
    world.pass(60);
    world.acts();
    world.outcome(Outcome::PageOutFailed("no swap".into()));
    assert_eq!((world.state(), world.life.poll_timeout()), ("frozen", None));
    assert_eq!(world.why(), "page-out-failed: its memory could not be paged out: no swap");
}

#[test]
fn a_message_thaws_wakes_and_lets_it_sleep_again_without_grace() {
    let mut world = World::frozen(Profile::Tombstone);
    assert_eq!(world.wanted(), Readiness::Thawing);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
    assert_eq!(world.wanted(), Readiness::Thawing);
    assert_eq!(world.acts(), []);
    world.outcome(THAWED);
    assert_eq!(world.acts(), [Output::Runnable(world.app.clone())]);
    assert_eq!(world.wanted(), Readiness::Ready);
    world.pass(30);
    assert_eq!(world.acts(), [], "a pending delivery vetoes the freeze");
    world.delivered();
    assert_eq!(world.state(), "awake");
    world.pass(9);
    assert_eq!(world.acts(), []);
    world.pass(1);
    assert_eq!(world.acts(), [Output::Freeze(T1)]);
    // The tombstone's time counts from the end of the window.
    world.outcome(FROZEN);
    world.sampled(LARGE);
    world.pass(60);
    world.outcome(PAGED);
    world.acts();
    world.pass(600 - 61);
    assert_eq!(world.acts(), []);
    world.pass(1);
    assert_eq!(world.acts(), [KILL]);
}

#[test]
fn a_message_for_an_app_about_to_be_frozen_cancels_the_freeze() {
    let mut world = World::background(Profile::Tombstone);
    world.pass(10);
    world.sampled(LARGE);
    world.acts();
    assert_eq!(world.wanted(), Readiness::Thawing);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
    world.outcome(Outcome::FreezeFailed("cancelled".into()));
    world.outcome(THAWED);
    assert_eq!(world.acts(), [Output::Runnable(world.app.clone())]);
    world.delivered();
    world.pass(10);
    assert_eq!(world.acts(), [Output::Freeze(T1)], "a cancelled freeze is no failed one");
}

#[test]
fn a_message_for_an_app_in_the_foreground_leaves_it_there() {
    let mut world = World::running(Profile::Tombstone);
    assert_eq!(world.wanted(), Readiness::Ready);
    world.delivered();
    assert_eq!((world.state(), world.life.poll_timeout(), world.acts()), ("foreground", None, vec![]));
}

#[test]
fn the_order_of_delivered_and_no_longer_pending_does_not_matter_after_a_thaw() {
    let mut world = World::frozen(Profile::Tombstone);
    let _ = world.wanted();
    world.outcome(THAWED);
    world.acts();
    world.life.set_pending(&world.app, false, world.now);
    world.life.delivered(&world.app, Priority::Normal, world.now);
    assert_eq!((world.state(), world.acts()), ("awake", vec![]));
}

#[test]
fn a_chatty_app_is_not_awake_for_ever() {
    let mut world = World::frozen(Profile::Tombstone);
    let _ = world.wanted();
    world.outcome(THAWED);
    world.delivered();
    world.acts();
    for _ in 0..11 {
        world.pass(5);
        assert_eq!(world.wanted(), Readiness::Ready);
        world.delivered();
        assert_eq!(world.acts(), []);
    }
    world.pass(5);
    assert_eq!(world.acts(), [Output::Freeze(T1)], "60 s in one go are enough");
    // Unless a message is waiting.
    let mut world = World::frozen(Profile::Tombstone);
    let _ = world.wanted();
    world.outcome(THAWED);
    world.acts();
    for _ in 0..30 {
        world.pass(5);
        world.life.delivered(&world.app, Priority::Normal, world.now);
    }
    assert_eq!(world.acts(), []);
}

#[test]
fn what_is_urgent_gives_more_time_and_of_several_messages_the_longest_counts() {
    let window = |priorities: &[(u64, Priority)]| {
        let mut world = World::frozen(Profile::Tombstone);
        let _ = world.wanted();
        world.outcome(THAWED);
        world.life.set_pending(&world.app, false, world.now);
        world.acts();
        let mut passed = 0;
        for (after, priority) in priorities {
            world.pass(after - passed);
            passed = *after;
            world.life.delivered(&world.app, *priority, world.now);
        }
        let told = world.why();
        let mut secs = passed;
        while world.acts() != [Output::Freeze(T1)] && secs < 100 {
            world.pass(1);
            secs += 1;
        }
        (secs, told)
    };
    let (low, normal, high, call) = (Priority::Low, Priority::Normal, Priority::High, Priority::Call);
    assert_eq!(window(&[(0, low)]).0, 10);
    assert_eq!(window(&[(0, normal)]).0, 10);
    let (secs, told) = window(&[(0, high)]);
    assert_eq!((secs, &*told), (30, "leave: it may run for 30 s after a message of high urgency"));
    let (secs, told) = window(&[(0, call)]);
    assert_eq!((secs, &*told), (30, "leave: it may run for 30 s after a call"));
    let (secs, told) = window(&[(0, high), (5, normal)]);
    assert_eq!((secs, &*told), (30, "leave: it may run for 30 s after a message of high urgency"));
    assert_eq!(window(&[(0, normal), (5, high)]).0, 35);
    assert_eq!(window(&[(0, high), (25, normal)]).0, 35);
    assert_eq!(window(&[(0, high), (20, high), (40, high)]).0, 60, "in one go");
}

#[test]
fn a_burst_does_not_flood_the_decisions() {
    let mut world = World::background(Profile::Tombstone);
    world.told();
    for _ in 0..1000 {
        let _ = world.wanted();
        world.delivered();
    }
    assert_eq!(world.told(), ["leave: it may run for 10 s after a message or a thaw"]);
}

#[test]
fn thawing_is_never_given_up() {
    let mut world = World::frozen(Profile::Tombstone);
    let _ = world.wanted();
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
    for pause in [200, 400, 800, 5000, 5000, 5000] {
        world.outcome(Outcome::ThawFailed("EIO".into()));
        world.pass_millis(pause - 1);
        assert_eq!(world.acts(), []);
        world.pass_millis(1);
        assert_eq!(world.acts(), [Output::Thaw(T1)]);
    }
    assert_eq!(world.why(), "thaw-failed: it still cannot be thawed, and is tried every 5 s from now on: EIO");
    world.outcome(THAWED);
    assert_eq!(world.acts(), [Output::Runnable(world.app.clone())]);
}

#[test]
fn a_thaw_without_an_answer_is_asked_for_again() {
    let mut world = World::frozen(Profile::Tombstone);
    world.declare(Claim::Foreground);
    world.acts();
    world.pass(6);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
    world.outcome(THAWED);
    assert_eq!(world.state(), "foreground");
}

#[test]
fn a_freeze_that_fails_is_retried_later_and_later_then_left() {
    let mut world = World::background(Profile::Tombstone);
    world.pass(10);
    world.sampled(LARGE);
    assert!(world.acts().contains(&Output::Freeze(T1)));
    for pause in [15, 30, 60, 120, 240] {
        world.outcome(Outcome::FreezeFailed("busy".into()));
        assert_eq!(world.state(), "background");
        world.pass(pause - 1);
        assert_eq!(world.acts(), []);
        world.pass(1);
        assert_eq!(world.acts(), [Output::Freeze(T1)]);
    }
    world.outcome(Outcome::FreezeFailed("busy".into()));
    world.pass(100_000);
    assert_eq!((world.acts(), world.life.poll_timeout()), (vec![], None));
    assert_eq!(world.why(), "leave: it could not be frozen several times and is left alone until it starts again");
    // The next instance is another matter.
    world.life.target_gone(T1, world.now);
    world.life.appeared(&world.app, &owner(2), true, world.now);
    world.identify(2, T2);
    world.acts();
    world.pass(10);
    assert_eq!(world.acts(), [Output::Sample(T2, SampleKind::Resident)]);
}

#[test]
fn a_freeze_without_an_answer_is_undone() {
    let mut world = World::background(Profile::Tombstone);
    world.pass(10);
    world.sampled(LARGE);
    world.acts();
    world.pass(5);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
    assert_eq!(world.why(), "thaw: it is not known whether it is frozen");
    world.outcome(THAWED);
    world.pass(9);
    assert_eq!((world.state(), world.acts()), ("awake", vec![]));
}

#[test]
fn observe_decides_the_same_and_touches_nothing() {
    let mut world = World::background(Profile::Observe);
    world.told();
    world.pass(10);
    assert_eq!(world.acts(), [RESIDENT]);
    world.sampled(LARGE);
    assert_eq!(world.told(), ["would-freeze: it has been in the background for 10 s"]);
    world.pass(60);
    assert_eq!(world.told(), ["would-page-out: it has been frozen for 60 s"]);
    assert_eq!(world.state(), "background");
    assert_eq!(world.wanted(), Readiness::Ready);
    world.delivered();
    assert_eq!(
        world.told(),
        ["would-thaw: a message is waiting for it", "leave: it may run for 10 s after a message or a thaw"]
    );
    assert_eq!(world.state(), "awake");
    world.pass(10);
    world.told();
    world.pass(600);
    assert_eq!(
        world.told(),
        [
            "would-page-out: it has been frozen for 60 s",
            "would-kill: it has been in the background without a message for 10 min"
        ]
    );
    assert_eq!((world.state(), world.life.poll_timeout()), ("background", None));
    assert_eq!(world.wanted(), Readiness::Ready);
    assert_eq!(world.told()[0], "would-start: a message is waiting for it");
    world.life.shutdown(world.now);
    assert!(world.life.is_quiet());
}

#[test]
fn a_protected_or_unknown_process_is_never_touched() {
    let mut world = World::new(Profile::Tombstone, true);
    world.life.appeared(&world.app, &owner(1), false, world.now);
    world.declare(Claim::Background);
    world.pass(1000);
    assert_eq!((world.acts(), &*world.why()), (vec![], "leave: its process is not known yet"));

    let bus = ProcessFacts { protected: Some("it is the message bus".into()), ..facts(7) };
    world.life.identified(&world.app, &owner(1), Ok((T1, bus)), world.now);
    world.pass(1000);
    assert_eq!((world.acts(), &*world.why()), (vec![], "leave: it is the message bus"));
    let refusal = world.command(Command::Kill).unwrap_err();
    assert_eq!(refusal.to_string(), "org.example.Chat must not be touched: it is the message bus");
    assert_eq!(refusal.kind, RefusalKind::Refused);

    let mut world = World::new(Profile::Tombstone, true);
    world.life.appeared(&world.app, &owner(1), false, world.now);
    world.life.identified(&world.app, &owner(1), Err("its process ended too early".into()), world.now);
    world.declare(Claim::Background);
    world.pass(1000);
    assert_eq!((world.acts(), &*world.why()), (vec![], "leave: its process ended too early"));
}

#[test]
fn two_apps_in_one_process_are_left_alone() {
    let mut world = World::frozen(Profile::Tombstone);
    let other = AppKey::new(Bus::Session(1000), "org.example.Mail");
    world.life.add_app(&other, world.now);
    world.life.appeared(&other, &owner(9), false, world.now);
    world.life.declare(&other, Claim::Background, SHELL, world.now);
    world.pass(20);
    world.life.identified(&other, &owner(9), Ok((T2, facts(101))), world.now);
    assert_eq!(world.acts(), [Output::Record { app: other.clone(), declares: true }, Output::Thaw(T1)]);
    assert_eq!(world.why(), "thaw: it shares its process with org.example.Mail");
    world.outcome(THAWED);
    world.pass(1000);
    assert_eq!(world.acts(), []);
    assert!(world.command(Command::Freeze).unwrap_err().text.ends_with("it shares its process with org.example.Mail"));
    // Until one of them is gone.
    world.life.remove_app(&other, world.now);
    assert_eq!(world.acts(), [Output::Forget(T2), Output::Freeze(T1)]);
}

#[test]
fn a_handle_two_apps_share_is_forgotten_when_neither_needs_it() {
    let mut world = World::running(Profile::Tombstone);
    let other = AppKey::new(Bus::Session(1000), "org.example.Mail");
    world.life.add_app(&other, world.now);
    world.life.appeared(&other, &owner(1), false, world.now);
    world.life.identified(&other, &owner(1), Ok((T1, facts(101))), world.now);
    world.life.remove_app(&other, world.now);
    assert_eq!(world.acts(), []);
    world.life.target_gone(T1, world.now);
    assert_eq!(world.acts(), [Output::Forget(T1)]);
}

#[test]
fn news_may_come_in_any_order() {
    // The claim, then the process, then the name.
    let mut world = World::new(Profile::Tombstone, false);
    world.declare(Claim::Background);
    world.identify(1, T1);
    world.life.appeared(&world.app, &owner(1), false, world.now);
    assert_eq!((world.state(), world.life.target_of(&world.app)), ("background", Some(T1)));
    world.acts();
    world.pass(10);
    assert_eq!(world.acts(), [RESIDENT]);
    // A process looked at and ended before its name came.
    let mut world = World::new(Profile::Tombstone, false);
    world.identify(1, T1);
    world.life.target_gone(T1, world.now);
    assert_eq!(world.acts(), [Output::Forget(T1)]);
    // But a claim is not kept for whoever comes later.
    let mut world = World::new(Profile::Tombstone, false);
    world.declare(Claim::Background);
    world.pass(6);
    world.life.appeared(&world.app, &owner(1), false, world.now);
    world.identify(1, T1);
    assert_eq!(world.state(), "foreground");
}

#[test]
fn what_is_said_of_a_former_owner_is_forgotten() {
    let mut world = World::new(Profile::Tombstone, false);
    world.life.appeared(&world.app, &owner(1), false, world.now);
    world.life.appeared(&world.app, &owner(2), false, world.now);
    world.identify(1, T1);
    assert_eq!(world.acts(), [Output::Forget(T1)]);
    world.identify(2, T2);
    assert_eq!(world.life.app_of(T2), Some(&world.app));
    world.life.vanished(&world.app, world.now);
    world.identify(2, T3);
    assert_eq!(world.acts(), [Output::Forget(T3)]);
    // Outcomes, measurements and ends of targets that are no app's.
    world.outcome(FROZEN);
    assert_eq!(world.sampled(LARGE), None);
    world.life.target_gone(T1, world.now);
    world.life.identified(&AppKey::new(Bus::System, "org.nobody"), &owner(1), Ok((T3, facts(1))), world.now);
    assert_eq!(world.acts(), [Output::Forget(T3)]);
}

#[test]
fn an_app_that_gives_up_its_name_is_thawed_and_kept_until_its_process_ends() {
    let mut world = World::frozen(Profile::Tombstone);
    world.life.vanished(&world.app, world.now);
    assert_eq!((world.acts(), &*world.why()), (vec![Output::Thaw(T1)], "thaw: it gave up its name on the bus"));
    world.outcome(THAWED);
    assert_eq!(world.wanted(), Readiness::NotRunning);
    world.pass(1000);
    assert_eq!((world.state(), world.acts()), ("foreground", vec![]));
    world.life.target_gone(T1, world.now);
    assert_eq!((world.state(), world.acts()), ("gone", vec![Output::Forget(T1)]));
    assert_eq!(world.why(), "gone: it ended by itself, crashed or was ended from outside");

    let mut world = World::new(Profile::Tombstone, false);
    world.life.appeared(&world.app, &owner(1), false, world.now);
    world.life.vanished(&world.app, world.now);
    assert_eq!(world.state(), "gone");
}

#[test]
fn an_app_killed_from_outside_is_gone() {
    let mut world = World::frozen(Profile::Tombstone);
    world.life.target_gone(T1, world.now);
    assert_eq!((world.state(), &*world.why()), ("gone", "gone: it was ended from outside while it was frozen"));
    world.life.vanished(&world.app, world.now);
    assert_eq!((world.state(), world.life.poll_timeout()), ("gone", None));
}

#[test]
fn a_new_owner_is_a_new_instance() {
    let mut world = World::frozen(Profile::Tombstone);
    world.life.appeared(&world.app, &owner(2), false, world.now);
    assert_eq!(world.acts(), [Output::Thaw(T1), Output::Forget(T1)]);
    assert_eq!(world.state(), "foreground");
    // The same owner announced again is the same instance.
    let mut world = World::frozen(Profile::Tombstone);
    world.life.appeared(&world.app, &owner(1), false, world.now);
    assert_eq!((world.acts(), world.state()), (vec![], "frozen"));
}

#[test]
fn what_is_being_killed_is_seen_through_when_its_name_is_taken() {
    let mut world = World::running(Profile::Tombstone);
    world.command(Command::Kill).unwrap();
    world.acts();
    world.life.appeared(&world.app, &owner(2), false, world.now);
    assert_eq!(world.acts(), [world.done(Command::Kill, Err("another process took its name"))]);
    world.life.target_gone(T1, world.now);
    assert_eq!((world.acts(), world.state()), (vec![Output::Forget(T1)], "foreground"));
}

#[test]
fn the_same_unique_name_on_a_new_bus_is_another_process() {
    let mut world = World::frozen(Profile::Tombstone);
    world.identify(1, T2);
    assert_eq!(world.acts(), [Output::Thaw(T1), Output::Forget(T1)]);
    assert_eq!((world.state(), world.life.target_of(&world.app)), ("foreground", Some(T2)));
}

#[test]
fn an_app_without_registrations_is_let_go() {
    let mut world = World::frozen(Profile::Tombstone);
    world.life.remove_app(&world.app, world.now);
    assert_eq!(world.acts(), [Output::Thaw(T1), Output::Forget(T1)]);
    assert_eq!((world.life.apps().count(), world.life.poll_timeout()), (0, None));
    assert_eq!(world.life.show(&world.app, world.now), None);
    assert_eq!(world.wanted(), Readiness::NotRunning);
    world.outcome(THAWED);
    world.life.remove_app(&world.app, world.now);
    assert_eq!(world.acts(), []);
}

#[test]
fn adding_an_app_twice_changes_nothing() {
    let mut world = World::frozen(Profile::Tombstone);
    world.life.add_app(&world.app, world.now);
    assert_eq!(world.state(), "frozen");
}

#[test]
fn when_a_bus_is_lost_everything_on_it_runs() {
    let mut world = World::frozen(Profile::Tombstone);
    world.life.bus_down(Bus::System, world.now);
    assert_eq!(world.acts(), []);
    world.life.bus_down(Bus::Session(1000), world.now);
    assert_eq!((world.acts(), &*world.why()), (vec![Output::Thaw(T1)], "thaw: the connection to its bus is lost"));
    world.outcome(THAWED);
    assert_eq!((world.state(), world.life.poll_timeout()), ("foreground", None));
}

#[test]
fn the_daemon_leaves_nothing_frozen() {
    let mut world = World::frozen(Profile::Tombstone);
    world.life.shutdown(world.now);
    assert_eq!((world.acts(), world.life.is_quiet()), (vec![Output::Thaw(T1)], false));
    world.outcome(THAWED);
    assert!(world.life.is_quiet());
    world.pass(1000);
    assert_eq!(world.acts(), []);
    assert_eq!(
        world.command(Command::Freeze).unwrap_err().text,
        "org.example.Chat is left alone: Night Porter is ending"
    );
    // What cannot be thawed does not keep it from ending.
    let mut world = World::frozen(Profile::Tombstone);
    world.life.shutdown(world.now);
    for _ in 0..4 {
        assert!(!world.life.is_quiet());
        world.outcome(Outcome::ThawFailed("EIO".into()));
        world.pass_millis(800);
    }
    assert!(world.life.is_quiet());
}

#[test]
fn frozen_by_hand_stays_frozen_until_something_counts_for_more() {
    let frozen = |profile| {
        let mut world = World::running(profile);
        world.command(Command::Freeze).unwrap();
        assert_eq!((world.acts(), &*world.why()), (vec![Output::Freeze(T1)], "freeze: root asked for it"));
        world.outcome(FROZEN);
        let sample = Output::Sample(T1, SampleKind::Frozen);
        assert_eq!(world.acts(), [sample, world.done(Command::Freeze, Ok(()))]);
        world.sampled(Memory::default());
        world
    };
    let mut world = frozen(Profile::Observe);
    world.pass(100_000);
    assert_eq!((world.state(), world.acts(), world.life.poll_timeout()), ("frozen", vec![], None));
    world.command(Command::Thaw).unwrap();
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
    world.outcome(THAWED);
    assert_eq!((world.acts(), world.state()), (vec![world.done(Command::Thaw, Ok(()))], "foreground"));

    let mut world = frozen(Profile::Tombstone);
    world.declare(Claim::Background);
    world.pass(100_000);
    assert_eq!(world.state(), "frozen", "not killed either");
    world.acts();
    world.declare(Claim::Foreground);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);

    let mut world = frozen(Profile::Tombstone);
    assert_eq!(world.wanted(), Readiness::Thawing);
    assert_eq!((world.acts(), &*world.why()), (vec![Output::Thaw(T1)], "thaw: a message is waiting for it"));
    world.outcome(THAWED);
    world.delivered();
    assert_eq!(world.state(), "foreground");
}

#[test]
fn a_freeze_by_hand_is_answered_whatever_becomes_of_it() {
    let freezing = || {
        let mut world = World::running(Profile::Tombstone);
        world.command(Command::Freeze).unwrap();
        world.acts();
        world
    };
    let mut world = freezing();
    world.outcome(Outcome::FreezeFailed("busy".into()));
    assert_eq!(world.acts(), [world.done(Command::Freeze, Err("busy"))]);
    world.pass(1000);
    assert_eq!(world.acts(), [], "it is not tried again by itself");

    let mut world = freezing();
    let _ = world.wanted();
    assert_eq!(world.acts(), [world.done(Command::Freeze, Err("a message came for it")), Output::Thaw(T1)]);

    let mut world = freezing();
    world.command(Command::Thaw).unwrap();
    assert_eq!(world.acts(), [world.done(Command::Freeze, Err("root asked to thaw it")), Output::Thaw(T1)]);
    assert!(world.command(Command::Thaw).unwrap_err().text.contains("busy with the same command"));

    let mut world = freezing();
    world.life.target_gone(T1, world.now);
    assert_eq!(world.acts(), [Output::Forget(T1), world.done(Command::Freeze, Err("it has ended"))]);

    let mut world = freezing();
    world.life.remove_app(&world.app, world.now);
    let done = world.done(Command::Freeze, Err("its last registration is gone"));
    assert_eq!(world.acts(), [Output::Thaw(T1), Output::Forget(T1), done]);

    let mut world = World::frozen(Profile::Tombstone);
    world.command(Command::Freeze).unwrap();
    assert_eq!(world.acts(), [world.done(Command::Freeze, Ok(()))]);
}

#[test]
fn a_message_waiting_refuses_freeze_and_kill_by_hand() {
    let mut world = World::running(Profile::Tombstone);
    let _ = world.wanted();
    for command in [Command::Freeze, Command::Kill] {
        let refusal = world.command(command).unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::Refused);
        assert_eq!(refusal.text, "org.example.Chat has a message waiting for it; try again in a moment");
    }
    assert_eq!(world.acts(), []);
}

#[test]
fn thawed_by_hand_has_its_window_and_then_the_policy_again() {
    let mut world = World::frozen(Profile::Tombstone);
    world.command(Command::Thaw).unwrap();
    assert_eq!((world.acts(), &*world.why()), (vec![Output::Thaw(T1)], "thaw: root asked for it"));
    world.outcome(THAWED);
    assert_eq!((world.acts(), world.state()), (vec![world.done(Command::Thaw, Ok(()))], "awake"));
    world.pass(10);
    assert_eq!(world.acts(), [Output::Freeze(T1)]);
    // Already running.
    let mut world = World::running(Profile::Tombstone);
    world.command(Command::Thaw).unwrap();
    assert_eq!(world.acts(), [world.done(Command::Thaw, Ok(()))]);
    // It cannot be thawed: the user is told, and it goes on.
    let mut world = World::frozen(Profile::Tombstone);
    world.command(Command::Thaw).unwrap();
    world.acts();
    for _ in 0..3 {
        world.outcome(Outcome::ThawFailed("EIO".into()));
        world.pass(1);
        assert_eq!(world.acts(), [Output::Thaw(T1)]);
    }
    world.outcome(Outcome::ThawFailed("EIO".into()));
    assert_eq!(world.acts(), [world.done(Command::Thaw, Err("EIO"))]);
    world.pass(5);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
}

#[test]
fn killed_by_hand_leaves_a_tombstone() {
    for profile in [Profile::Tombstone, Profile::Cached, Profile::Observe] {
        let mut world = World::running(profile);
        world.command(Command::Kill).unwrap();
        assert_eq!((world.acts(), &*world.why()), (vec![KILL], "kill: root asked for it"));
        assert_eq!(world.wanted(), Readiness::Ending);
        assert!(world.command(Command::Thaw).unwrap_err().text.contains("is being ended"));
        world.life.target_gone(T1, world.now);
        assert_eq!(world.acts(), [world.done(Command::Kill, Ok(())), Output::Forget(T1)]);
        assert_eq!(world.state(), "tombstone");
        let refusal = world.command(Command::Kill).unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::NotRunning);
        assert!(refusal.text.contains("is a tombstone"));
    }
}

#[test]
fn a_kill_that_fails_thaws_and_lets_the_message_through() {
    let mut world = World::running(Profile::Tombstone);
    world.command(Command::Kill).unwrap();
    assert_eq!(world.wanted(), Readiness::Ending);
    world.acts();
    world.outcome(Outcome::KillFailed("EPERM".into()));
    assert_eq!(world.acts(), [world.done(Command::Kill, Err("EPERM")), Output::Thaw(T1)]);
    world.outcome(THAWED);
    assert_eq!(world.acts(), [Output::Runnable(world.app.clone())]);

    // By time: tried again, not for ever, and frozen in between.
    let mut world = World::frozen(Profile::Tombstone);
    let mut kills = 0;
    for _ in 0..20_000 {
        world.pass(1);
        for act in world.acts() {
            match act {
                Output::Kill { .. } => {
                    kills += 1;
                    world.outcome(Outcome::KillFailed("EPERM".into()));
                }
                Output::Freeze(_) => world.outcome(FROZEN),
                Output::Thaw(_) => world.outcome(THAWED),
                Output::PageOut(_) => world.outcome(PAGED),
                Output::Sample(..) => assert!(world.sampled(LARGE).is_some()),
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!((kills, world.state(), world.life.poll_timeout()), (6, "reclaimed", None));
}

#[test]
fn a_kill_without_an_end_is_not_waited_for_for_ever() {
    let mut world = World::running(Profile::Tombstone);
    world.command(Command::Kill).unwrap();
    world.acts();
    world.pass(30);
    assert_eq!(world.acts(), [world.done(Command::Kill, Err("it did not end")), Output::Thaw(T1)]);
}

#[test]
fn a_page_out_overtaken_by_a_thaw_says_nothing_about_the_next_freeze() {
    let mut world = World::frozen(Profile::Tombstone);
    world.pass(60);
    assert_eq!(world.acts(), [Output::PageOut(T1)]);
    let _ = world.wanted();
    world.outcome(THAWED);
    world.delivered();
    world.acts();
    // Its outcome comes before the next freeze, or only after it.
    for late in [false, true] {
        if !late {
            world.outcome(PAGED);
            assert_eq!((world.state(), world.acts()), ("awake", vec![]));
        }
        world.pass(10);
        world.outcome(FROZEN);
        world.sampled(LARGE);
        if late {
            world.outcome(PAGED);
            assert_eq!(world.state(), "frozen");
        }
        world.acts();
        world.pass(60);
        assert_eq!(world.acts(), [Output::PageOut(T1)]);
        let _ = world.wanted();
        world.outcome(THAWED);
        world.delivered();
        world.acts();
    }
}

#[test]
fn notes_of_others_land_in_the_same_list() {
    let mut world = World::running(Profile::Tombstone);
    world.told();
    let text: Arc<str> = "a message of 12 bytes".into();
    world.life.note(&world.app, "deliver", &text, world.now);
    world.life.note(&world.app, "deliver", &text, world.now);
    assert_eq!(world.told(), ["deliver: a message of 12 bytes"]);
    assert_eq!(world.why(), "deliver: a message of 12 bytes");
    let reason = world.life.show(&world.app, world.now).unwrap().reason;
    assert_eq!(reason, Some(text));
}

#[test]
fn a_view_shows_what_is_known() {
    let mut world = World::running(Profile::Tombstone);
    world.pass(7);
    let view = world.life.show(&world.app, world.now).unwrap();
    assert_eq!((view.since, view.pid, view.freezer), (Duration::from_secs(7), Some(101), Some(Freezer::Cgroup2)));
    assert_eq!((view.protected, view.target), (None, Some(T1)));
}

fn veto(kind: VetoKind, reason: &str) -> Veto {
    Veto { kind, reason: reason.into() }
}

#[test]
fn what_plays_is_not_frozen_and_has_its_grace_afterwards() {
    let mut world = World::background(Profile::Tombstone);
    world.life.vetoed(T1, vec![veto(VetoKind::Playback, "it plays sound (PipeWire stream \"Radio\")")], world.now);
    world.pass(3600);
    assert_eq!(world.acts(), []);
    assert_eq!(world.why(), "leave: playback: it plays sound (PipeWire stream \"Radio\")");
    assert_eq!(world.life.poll_timeout(), None, "a veto is waited out without a timer");
    let refused = world.command(Command::Freeze).unwrap_err();
    assert_eq!(refused.text, "org.example.Chat must run: playback: it plays sound (PipeWire stream \"Radio\")");
    world.life.vetoed(T1, Vec::new(), world.now);
    assert_eq!(world.why(), "leave: what kept it awake is over, and it may run for 10 s more");
    world.pass(9);
    assert_eq!(world.acts(), []);
    world.pass(1);
    assert_eq!(world.acts(), [RESIDENT]);
}

#[test]
fn what_begins_to_play_while_frozen_is_thawed() {
    let mut world = World::frozen(Profile::Tombstone);
    world.life.vetoed(T1, vec![veto(VetoKind::Call, "a call is ringing")], world.now);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
    assert_eq!(world.why(), "thaw: call: a call is ringing");
}

#[test]
fn what_the_inspection_finds_puts_the_freeze_off_for_longer_each_time() {
    let mut world = World::background(Profile::Tombstone);
    world.clear = false;
    world.pass(10);
    world.sampled(LARGE);
    assert_eq!(world.acts(), [RESIDENT, Output::Inspect(T1)]);
    for pause in [30, 60, 120, 240, 480, 480] {
        let found = Ok(vec![veto(VetoKind::FileSystem, "it serves the file system at /mnt")]);
        world.life.inspected(T1, &found, world.now);
        assert_eq!(world.why(), "leave: file-system: it serves the file system at /mnt");
        world.pass(pause - 1);
        assert_eq!(world.acts(), []);
        world.pass(1);
        assert_eq!(world.acts(), [Output::Inspect(T1)]);
    }
    world.life.inspected(T1, &Ok(Vec::new()), world.now);
    assert_eq!(world.acts(), [Output::Freeze(T1)]);
}

#[test]
fn an_inspection_without_an_answer_does_not_freeze() {
    let mut world = World::background(Profile::Tombstone);
    world.clear = false;
    world.pass(10);
    world.sampled(LARGE);
    world.pass(29);
    assert_eq!(world.acts(), [RESIDENT, Output::Inspect(T1)]);
    assert!(!world.why().contains("in time"), "it may wait behind others");
    world.pass(1);
    assert_eq!(world.acts(), []);
    assert_eq!(world.why(), "leave: it could not be inspected: it could not be inspected in time");
    world.life.inspected(T1, &Ok(Vec::new()), world.now);
    assert_eq!(world.acts(), [], "a late answer is of another moment");
    world.pass(30);
    assert_eq!(world.acts(), [Output::Inspect(T1)]);
}

#[test]
fn a_second_after_the_freeze_a_lock_others_wait_for_thaws_it() {
    let mut world = World::frozen(Profile::Tombstone);
    world.clear = false;
    world.pass(1);
    assert_eq!(world.acts(), [Output::Inspect(T1)]);
    let found = Ok(vec![veto(VetoKind::AwaitedLock, "process 7 waits for its lock on /tmp/db")]);
    world.life.inspected(T1, &found, world.now);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
    assert_eq!(world.why(), "thaw: awaited-lock: process 7 waits for its lock on /tmp/db");
    world.outcome(THAWED);
    world.pass(29);
    assert_eq!(world.acts(), [], "not frozen again at once");
    world.pass(1);
    assert_eq!(world.acts(), [Output::Inspect(T1)]);
}

#[test]
fn an_app_that_listens_is_told_before_it_is_frozen_and_after() {
    let mut world = World::background(Profile::Tombstone);
    world.life.listens(&world.app, true, world.now);
    world.pass(10);
    world.sampled(LARGE);
    assert_eq!(world.acts(), [RESIDENT, Output::WillSuspend(app(), Duration::from_secs(5))]);
    world.life.prepared(&world.app, world.now);
    assert_eq!(world.acts(), [Output::Freeze(T1)]);
    world.outcome(FROZEN);
    world.pass(30);
    world.acts();
    assert_eq!(world.wanted(), Readiness::Thawing);
    world.outcome(THAWED);
    let acts = world.acts();
    assert!(acts.contains(&Output::Resumed(app(), Duration::from_secs(30))), "{acts:?}");
}

#[test]
fn an_app_that_does_not_answer_the_notice_is_frozen_after_five_seconds() {
    let mut world = World::background(Profile::Tombstone);
    world.life.listens(&world.app, true, world.now);
    world.pass(10);
    world.sampled(LARGE);
    world.acts();
    world.pass_millis(4999);
    assert_eq!(world.acts(), []);
    world.pass_millis(1);
    assert_eq!(world.acts(), [Output::Freeze(T1)]);
}

#[test]
fn a_notice_that_comes_to_nothing_is_taken_back() {
    let mut world = World::background(Profile::Tombstone);
    world.life.listens(&world.app, true, world.now);
    world.pass(10);
    world.sampled(LARGE);
    world.acts();
    world.declare(Claim::Foreground);
    assert_eq!(world.acts(), [Output::Resumed(app(), Duration::ZERO)]);
}

#[test]
fn windows_alone_say_where_an_app_is() {
    let mut world = World::running(Profile::Tombstone);
    world.life.seen(&world.app, Seen::Behind, world.now);
    assert_eq!(world.state(), "background");
    world.pass(10);
    world.sampled(LARGE);
    assert_eq!(world.acts(), [RESIDENT, Output::Freeze(T1)]);
    world.outcome(FROZEN);
    world.acts();
    world.life.seen(&world.app, Seen::Front("its window is in front".into()), world.now);
    assert_eq!(world.acts(), [Output::Thaw(T1)]);
    assert_eq!(world.why(), "thaw: its window is in front");
    world.outcome(THAWED);
    world.life.seen(&world.app, Seen::Nothing, world.now);
    world.pass(3600);
    assert_eq!(world.acts(), [], "the compositor is gone: unknown is foreground");
}

#[test]
fn what_is_seen_in_front_counts_for_more_than_what_is_said() {
    let mut world = World::background(Profile::Tombstone);
    world.life.seen(&world.app, Seen::Front("its window is in front".into()), world.now);
    world.pass(3600);
    assert_eq!((world.acts(), world.state()), (vec![], "foreground"));
    world.life.seen(&world.app, Seen::Behind, world.now);
    world.pass(9);
    assert_eq!(world.acts(), [], "it has its grace anew");
    world.pass(1);
    assert_eq!(world.acts(), [RESIDENT]);
}

#[test]
fn a_lease_keeps_it_awake_but_not_against_the_users_hand() {
    let mut world = World::background(Profile::Tombstone);
    world.life.leased(&world.app, Some("it holds a lease: transfer \"upload of 3 photos\"".into()), world.now);
    world.pass(3600);
    assert_eq!(world.acts(), []);
    assert_eq!(world.why(), "leave: it holds a lease: transfer \"upload of 3 photos\"");
    world.command(Command::Freeze).unwrap();
    world.sampled(LARGE);
    assert_eq!(world.acts(), [RESIDENT, Output::Freeze(T1)]);
}

#[test]
fn pressure_sends_frozen_apps_deeper_at_once() {
    let mut world = World::frozen(Profile::Cached);
    world.pass(1);
    world.life.squeeze(&world.app, Squeeze::PageOut, "memory is short: half of all tasks wait for it", world.now);
    assert_eq!(world.acts(), [Output::PageOut(T1)]);
    assert_eq!(world.why(), "page-out: memory is short: half of all tasks wait for it");
    world.outcome(PAGED);
    world.sampled(LARGE);
    world.acts();
    world.life.squeeze(&world.app, Squeeze::Kill, "memory is short, and swap is full", world.now);
    assert_eq!(world.acts(), [KILL]);
    assert_eq!(world.why(), "kill: memory is short, and swap is full");
}

#[test]
fn an_app_that_nothing_starts_again_is_kept_frozen_and_ended_by_hand_alone() {
    let mut world = World::frozen(Profile::Tombstone);
    world.life.startable(&world.app, false, world.now);
    world.pass(60);
    world.outcome(PAGED);
    world.acts();
    world.sampled(LARGE);
    world.pass(3600);
    assert_eq!(world.acts(), []);
    assert_eq!(world.why(), "leave: it is not ended: nothing says how to start it again");
    assert_eq!(world.state(), "reclaimed");
    let held: Vec<Held> = world.life.held().collect();
    assert!(held.iter().all(|app| !app.can_end), "{held:?}");
    // A service file comes.
    world.life.startable(&world.app, true, world.now);
    assert_eq!(world.acts(), [KILL]);

    let mut world = World::frozen(Profile::Tombstone);
    world.life.startable(&world.app, false, world.now);
    world.command(Command::Kill).unwrap();
    assert_eq!(world.acts(), [KILL]);
}

#[test]
fn what_is_held_says_what_could_be_done_with_it() {
    let mut world = World::frozen(Profile::Cached);
    let held = |world: &World| {
        let held = world.life.held().next().unwrap();
        (held.can_page_out, held.can_end, held.paging, held.going)
    };
    assert_eq!(held(&world), (false, false, false, None), "not inspected since it was frozen");
    world.pass(1);
    assert_eq!(held(&world), (true, true, false, None));
    world.life.squeeze(&world.app, Squeeze::PageOut, "memory is short", world.now);
    assert_eq!(held(&world), (false, true, true, Some(Squeeze::PageOut)));
    world.outcome(PAGED);
    assert_eq!(held(&world), (false, true, false, Some(Squeeze::PageOut)));
    world.life.unsqueeze(&world.app, world.now);
    assert_eq!(held(&world).3, None);
    world.life.squeeze(&world.app, Squeeze::Kill, "memory is short", world.now);
    assert!(world.life.is_ending_any() && world.life.held().next().is_none());

    let mut world = World::running(Profile::Observe);
    world.command(Command::Freeze).unwrap();
    world.inspect();
    world.outcome(FROZEN);
    world.pass(10);
    assert_eq!(held(&world), (false, false, false, None), "held by hand, under observe");
}

#[test]
fn pressure_does_not_touch_what_runs() {
    let mut world = World::background(Profile::Tombstone);
    world.life.squeeze(&world.app, Squeeze::Kill, "memory is short", world.now);
    assert_eq!(world.acts(), []);
    assert_eq!(world.life.held().count(), 0);
}

#[test]
fn rules_of_its_own_count_for_one_app_alone() {
    let mut rules = Rules::new(Profile::Tombstone, LifecycleTimes::default());
    rules.exempt = Some("the configuration says that it is never frozen (role terminal)".into());
    let mut world = World::background(Profile::Tombstone);
    world.life.own_rules.insert("org.example.Chat".into(), rules);
    world.pass(3600);
    assert_eq!(world.acts(), []);
    assert_eq!(world.why(), "leave: the configuration says that it is never frozen (role terminal)");
}
