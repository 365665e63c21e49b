//! How many apps can this machine keep reachable? Apps are added until memory is short, a push is late, one is ended by the
//! kernel, or there are as many as the experiment allows.
//!
//! After the first number comes a quarter more each time. With `reach.times-enough` the arms after the first begin with what
//! that has kept, and the double of it comes each time, up to that many times as many: this takes the fewest steps that say
//! whether it is so. The first that is too many ends that: the newest apps are ended
//! again, and half way between what was kept and what was too many is tried, until the two are next to each other, or within
//! a fiftieth. So a few dozen numbers are tried and not each; each is settled before it is judged.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{
    arm::Arm,
    experiment::{Experiment, ReachPlan},
    kernel,
    progress::Progress,
    schedule::Random,
    stage::{Stage, Started, look},
};
use crate::exit::Failure;

/// What came out for one arm.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Reach {
    pub(super) arm: Arm,
    /// The greatest number that was kept reachable.
    pub(super) apps: usize,
    /// The least number that was too many; none when the experiment's own bound was reached.
    pub(super) too_many: Option<usize>,
    /// Why that was too many, or why no more were tried.
    pub(super) ended: Ended,
    pub(super) because: String,
    pub(super) connections: usize,
    pub(super) steps: Vec<Step>,
    pub(super) seconds: f64,
    pub(super) notes: Vec<String>,
}

/// What makes a number too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Ended {
    Pressure,
    LatePush,
    Died,
    NotReady,
    /// A bound of the experiment's own.
    Most,
}

/// One number that was tried.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Step {
    pub(super) apps: usize,
    pub(super) kept: bool,
    pub(super) because: Option<String>,
    /// Share of the time some task waited for memory while they were added and settled, in percent: for information.
    pub(super) pressure_adding: Option<f64>,
    /// The same once they had settled: what makes a number too many.
    pub(super) pressure: Option<f64>,
    pub(super) available_kib: u64,
    pub(super) used_kib: u64,
    pub(super) swap_used_kib: u64,
    pub(super) slowest_push_ms: Option<f64>,
    pub(super) seconds: f64,
}

/// Which numbers are tried. Pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Search {
    good: usize,
    bad: Option<usize>,
    first: usize,
    most: usize,
    /// What a number that was kept is divided by for how many more come next.
    part: usize,
}

impl Search {
    const fn new(first: usize, most: usize) -> Self {
        Self { good: 0, bad: None, first, most, part: 4 }
    }

    /// For an arm that is to be compared with what another has kept.
    fn up_to(plan: &ReachPlan, kept: Option<usize>) -> Self {
        match (plan.times_enough, kept) {
            (Some(times), Some(kept @ 1..)) => {
                Self { part: 1, ..Self::new(kept, plan.most.min(kept.saturating_mul(times))) }
            }
            _ => Self::new(plan.first, plan.most),
        }
    }

    /// The next number to try; none when it is known well enough.
    fn next(&self) -> Option<usize> {
        match self.bad {
            None if self.good >= self.most => None,
            None if self.good == 0 => Some(self.first.min(self.most)),
            None => Some((self.good + (self.good / self.part).max(1)).min(self.most)),
            Some(bad) if bad - self.good <= 1 + self.good / 50 => None,
            Some(bad) => Some(self.good + (bad - self.good) / 2),
        }
    }

    fn tell(&mut self, apps: usize, kept: bool) {
        if kept {
            self.good = self.good.max(apps);
        } else {
            self.bad = Some(self.bad.map_or(apps, |bad| bad.min(apps)));
        }
    }
}

/// Does it for one arm. `first`: what the first arm has kept, if this is another.
pub(super) fn run(
    experiment: &Experiment,
    plan: &ReachPlan,
    arm: Arm,
    first: Option<usize>,
    progress: &Progress,
) -> Result<Reach, Failure> {
    let started = Instant::now();
    let search = Search::up_to(plan, first);
    let mut apps = experiment.many(search.most);
    // As many as can be had resident start in full behind the daemon as well.
    let full = first.unwrap_or(apps.len()).min(apps.len());
    for app in &mut apps[..full] {
        app.registering = None;
    }
    let stage = Stage::new(experiment, arm, apps)?;
    let mut climb =
        Climb { stage, plan, running: 0, random: Random(experiment.seed), steps: Vec::new(), connections: 0 };
    let climbed = climb.climb(search, progress);
    let Climb { mut stage, steps, connections, .. } = climb;
    if let Ok((found, _)) = &climbed
        && found.good > full
        && experiment.kinds.iter().any(|kind| kind.registering.is_some())
    {
        stage.note(format!(
            "{full} apps were started in full; the others only registered, as if since a reboot nobody had opened them yet \
             (app.registering): a push starts the whole of them"
        ));
    }
    let notes = stage.notes.clone();
    let ended = stage.end();
    let (search, last) = climbed?;
    ended?;
    let (ended, because) = match last {
        Some((ended, because)) => (ended, because),
        None => (Ended::Most, format!("{} were asked for at most (reach.most, reach.times-enough)", search.most)),
    };
    Ok(Reach {
        arm,
        apps: search.good,
        too_many: search.bad,
        ended,
        because,
        connections,
        steps,
        seconds: started.elapsed().as_secs_f64(),
        notes,
    })
}

struct Climb<'a> {
    stage: Stage<'a>,
    plan: &'a ReachPlan,
    /// How many apps are there.
    running: usize,
    random: Random,
    steps: Vec<Step>,
    /// With the greatest number that was kept.
    connections: usize,
}

type Reason = Option<(Ended, String)>;

impl<'a> Climb<'a> {
    /// Tries one number after the other. Gives back what is known, and why the least of those that were too many was.
    fn climb(&mut self, mut search: Search, progress: &Progress) -> Result<(Search, Reason), Failure> {
        if kernel::stalled().is_none() {
            self.stage.note(
                "THIS KERNEL DOES NOT TELL OF MEMORY PRESSURE (PSI; boot with psi=1): only late pushes and ended apps \
                 make a number too many"
                    .into(),
            );
        }
        self.stage.start_daemon()?;
        let mut last = None;
        while let Some(target) = search.next() {
            progress.say(format!("{}: {target} apps ({} are kept)", self.stage.arm.label(), search.good));
            let began = Instant::now();
            let mut step = Step {
                apps: target,
                kept: false,
                because: None,
                pressure_adding: None,
                pressure: None,
                available_kib: 0,
                used_kib: 0,
                swap_used_kib: 0,
                slowest_push_ms: None,
                seconds: 0.0,
            };
            let reason = self.attempt(target, &mut step)?;
            let system = look()?;
            step.kept = reason.is_none();
            step.because = reason.as_ref().map(|(_, text)| text.clone());
            (step.available_kib, step.used_kib, step.swap_used_kib) = (system.available, system.used, system.swap_used);
            step.seconds = began.elapsed().as_secs_f64();
            let because = step.because.as_ref().map_or_else(|| "kept".into(), |why| format!("too many: {why}"));
            progress.tell(&format!("{}: {target} apps, {because}; {:.0} s", self.stage.arm.label(), step.seconds));
            self.steps.push(step);
            if reason.is_none() {
                self.connections = crate::lab::sockets::connections_to(self.stage.world.port());
            }
            if let Some((Ended::Died | Ended::NotReady, _)) = reason {
                // Who is left is anybody's guess.
                self.end(0, Stage::kill_apps);
            }
            search.tell(target, reason.is_none());
            last = reason.or(last).filter(|_| search.bad.is_some());
            progress.step();
        }
        Ok((search, last))
    }

    /// Has that many apps, and says why they are too many, if they are.
    fn attempt(&mut self, target: usize, step: &mut Step) -> Result<Reason, Failure> {
        let names = self.stage.world.apps().to_vec();
        if target < self.running {
            self.end(target, Stage::end_apps);
        }
        let kills = kernel::oom_kills();
        let (began, before) = (Instant::now(), kernel::stalled());
        let were = self.running;
        self.running = target;
        let pressure = || Some(kernel::share(kernel::stalled()?.saturating_sub(before?), began.elapsed()));
        let mut strain = Strain::new(began, before);
        match self.stage.start(&names[were..target], || {}, || strain.look(Instant::now(), kernel::stalled))? {
            Started::All => {}
            Started::GivenUp(text) => {
                step.pressure_adding = pressure();
                self.end(were, Stage::kill_apps);
                return Ok(Some((Ended::Pressure, text)));
            }
            Started::Late(text) => return Ok(Some((Ended::NotReady, text))),
            Started::Ended(text) => return Ok(Some((Ended::Died, text))),
        }
        let there = &names[..target];
        self.stage.rest(there)?;
        self.stage.settle()?;
        step.pressure_adding = pressure();
        self.probe(there, kills, step)
    }

    /// Ends the newest apps, so that this many are left.
    fn end(&mut self, left: usize, by: fn(&mut Stage<'a>, &[String])) {
        let surplus = self.stage.world.apps()[left..self.running].to_vec();
        by(&mut self.stage, &surplus);
        self.stage.world.inbox().forget(&surplus);
        self.running = left;
    }

    /// Watches for pressure while a few apps are sent a push, the oldest among them.
    fn probe(&mut self, there: &[String], kills: Option<u64>, step: &mut Step) -> Result<Reason, Failure> {
        let late = self.stage.experiment.late_after;
        let (began, before) = (Instant::now(), kernel::stalled());
        let mut asked = vec![0];
        for _ in 1..self.plan.probes.min(there.len()) {
            asked.push(self.random.below(there.len()));
        }
        asked.sort_unstable();
        asked.dedup();
        for index in asked {
            let app = &there[index];
            let Stage { world, pushes, .. } = &mut self.stage;
            let latency = pushes.send(world.inbox(), app, "among many", late)?;
            world.check_interrupted()?;
            let Some(nanos) = latency.filter(|nanos| u128::from(*nanos) <= late.as_nanos()) else {
                return Ok(Some((
                    Ended::LatePush,
                    format!("a push to {app} took over {}", humantime::format_duration(late)),
                )));
            };
            let millis = Duration::from_nanos(nanos).as_secs_f64() * 1000.0;
            step.slowest_push_ms = Some(step.slowest_push_ms.map_or(millis, |slowest: f64| slowest.max(millis)));
        }
        self.stage.world.pause(self.plan.window.saturating_sub(began.elapsed()))?;
        if let (Some(before), Some(after)) = (before, kernel::stalled()) {
            let share = kernel::share(after.saturating_sub(before), began.elapsed());
            step.pressure = Some(share);
            if share > self.plan.pressure {
                let text = format!("tasks waited for memory {share:.0} % of the time");
                return Ok(Some((Ended::Pressure, text)));
            }
        }
        if kernel::oom_kills() > kills {
            return Ok(Some((Ended::Died, "the kernel ended a process for want of memory".into())));
        }
        match self.stage.world.ended_by_itself() {
            Some(text) => Ok(Some((Ended::Died, text))),
            None => Ok(None),
        }
    }
}

/// Whether memory is so short while apps are added that there is no sense in adding more: far beyond what makes a number too
/// many, and for long. The machine does little else by then, and would take most of an hour over the rest of them. Pure.
struct Strain {
    since: Instant,
    stalled: Option<u64>,
    windows: u32,
}

impl Strain {
    const WINDOW: Duration = Duration::from_secs(10);
    const WINDOWS: u32 = 3;
    /// Percent.
    const SHARE: f64 = 50.0;

    const fn new(now: Instant, stalled: Option<u64>) -> Self {
        Self { since: now, stalled, windows: 0 }
    }

    /// Says so, if it is so. Called as often as one likes.
    fn look(&mut self, now: Instant, stalled: impl FnOnce() -> Option<u64>) -> Option<String> {
        let over = now.saturating_duration_since(self.since);
        if over < Self::WINDOW {
            return None;
        }
        let (before, after) = (self.stalled?, stalled()?);
        let share = kernel::share(after.saturating_sub(before), over);
        self.windows = if share > Self::SHARE { self.windows + 1 } else { 0 };
        (self.since, self.stalled) = (now, Some(after));
        let long = Self::WINDOW * Self::WINDOWS;
        (self.windows >= Self::WINDOWS).then(|| {
            format!("tasks waited for memory more than {:.0} % of {long:?} while they were added", Self::SHARE)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What it finds when every number above `limit` is too many, and the numbers it tried.
    fn search(limit: usize, first: usize, most: usize) -> (Search, Vec<usize>) {
        tried(Search::new(first, most), limit)
    }

    fn tried(mut search: Search, limit: usize) -> (Search, Vec<usize>) {
        let mut tried = Vec::new();
        while let Some(next) = search.next() {
            tried.push(next);
            search.tell(next, next <= limit);
            assert!(tried.len() < 100, "{tried:?}");
        }
        (search, tried)
    }

    #[test]
    fn steps_grow_and_the_end_is_halved() {
        let (found, tried) = search(10, 1, 100);
        assert_eq!(tried, [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 11]);
        assert_eq!((found.good, found.bad), (10, Some(11)));
        assert_eq!(search(0, 1, 100).1, [1]);
        let (found, tried) = search(1000, 1, 30);
        assert_eq!((found.good, found.bad, tried.last()), (30, None, Some(&30)));
        assert_eq!(search(10, 20, 100).1, [20, 10, 15, 12, 11]);
    }

    #[test]
    fn another_arm_is_asked_for_no_more_than_is_enough() {
        let mut plan = ReachPlan {
            arms: vec![Arm::Resident, Arm::Tombstone],
            first: 4,
            most: 100,
            times_enough: Some(8),
            pressure: 10.0,
            window: Duration::from_secs(1),
            probes: 1,
        };
        assert_eq!(tried(Search::up_to(&plan, Some(10)), 500).1, [10, 20, 40, 80]);
        assert_eq!(tried(Search::up_to(&plan, Some(10)), 50).1, [10, 20, 40, 80, 60, 50, 55, 52]);
        assert_eq!(tried(Search::up_to(&plan, Some(30)), 500).1, [30, 60, 100], "no more than most");
        assert_eq!(Search::up_to(&plan, None), Search::new(4, 100));
        assert_eq!(Search::up_to(&plan, Some(0)), Search::new(4, 100));
        plan.times_enough = None;
        assert_eq!(Search::up_to(&plan, Some(10)), Search::new(4, 100));
    }

    #[test]
    fn memory_that_is_short_for_long_ends_the_adding() {
        let start = Instant::now();
        let mut strain = Strain::new(start, Some(0));
        // Seconds, and seconds waited by then.
        let mut look =
            |at: u64, waited: u64| strain.look(start + Duration::from_secs(at), || Some(waited * 1_000_000)).is_some();
        assert!(!look(9, 9) && !look(10, 6) && !look(20, 12));
        assert!(!look(30, 16), "once less, and it begins anew");
        assert!(!look(40, 22) && !look(50, 28) && !look(55, 33) && look(60, 34));
        assert_eq!(Strain::new(start, None).look(start + Duration::from_secs(60), || Some(60_000_000)), None);
    }

    proptest! {
        #[test]
        fn the_limit_lies_between_what_was_kept_and_what_was_too_many(
            limit in 0_usize..1200,
            first in 1_usize..100,
            most in 1_usize..1000,
        ) {
            let (found, tried) = search(limit, first, most);
            prop_assert!(tried.iter().all(|n| (1..=most).contains(n)));
            prop_assert!(found.good <= limit);
            match found.bad {
                Some(bad) => prop_assert!(limit < bad && bad - found.good <= 1 + found.good / 50),
                None => prop_assert_eq!(found.good, most),
            }
            // As often as it takes to add a quarter up to a thousand, and to halve the last quarter.
            prop_assert!(tried.len() < 40, "{}", tried.len());
        }
    }
}
