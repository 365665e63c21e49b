//! From raw samples to figures, and from figures to what was expected of them. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    arm::{Arm, Messages, Sample},
    ballast,
    experiment::{Expectations, Experiment},
    kernel::Machine,
    reach::Reach,
    statistics::{Latency, Summary},
};

/// `--json FILE`. Sizes in KiB.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Outcome {
    pub(super) experiment: String,
    pub(super) version: &'static str,
    pub(super) machine: Machine,
    pub(super) apps: usize,
    /// What the apps are: name of the kind, and how many of it.
    pub(super) kinds: BTreeMap<String, usize>,
    pub(super) runs: usize,
    pub(super) seed: u64,
    pub(super) arms: Vec<ArmFigures>,
    pub(super) reach: Vec<Reach>,
    pub(super) expectations: Vec<Expectation>,
    /// Every run of every arm, in the order they were made in.
    pub(super) samples: Vec<Sample>,
}

/// One arm over all runs.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ArmFigures {
    pub(super) arm: Arm,
    /// What it costs: growth of used memory ([`super::kernel::System::used`], zram in it).
    pub(super) cost: Option<Summary>,
    /// The same without page cache that nobody maps.
    pub(super) cost_occupied: Option<Summary>,
    pub(super) cost_unavailable: Option<Summary>,
    /// What can be allocated beside it.
    pub(super) ballast: Option<Summary>,
    /// Whether it was the experiment's own bound that ended it, once at least: then it is more than that.
    pub(super) ballast_bounded: bool,
    pub(super) apps_pss: Option<Summary>,
    pub(super) daemon_pss: Option<Summary>,
    pub(super) zram: Option<Summary>,
    pub(super) swap: Option<Summary>,
    pub(super) apps_cpu: Option<Summary>,
    pub(super) daemon_cpu: Option<Summary>,
    pub(super) major_faults: Option<Summary>,
    pub(super) connections: Option<Summary>,
    pub(super) reachable: Option<Summary>,
    pub(super) messages: Messages,
    pub(super) wake_ms: BTreeMap<&'static str, Latency>,
    /// The resident arm's cost less this one's, run by run.
    pub(super) saved: Option<Summary>,
    /// The same in percent of the resident arm's cost.
    pub(super) returned_percent: Option<Summary>,
    /// What more can be allocated than beside the resident arm.
    pub(super) ballast_gained: Option<Summary>,
    /// What the daemon says it saves.
    pub(super) claim: Option<Summary>,
    /// The claim less what was saved, in percent of that, run by run.
    pub(super) claim_error_percent: Option<Summary>,
    /// The same against what was saved by `occupied`.
    pub(super) claim_error_occupied_percent: Option<Summary>,
    /// The daemon's PSS in percent of what was saved.
    pub(super) daemon_percent_of_saved: Option<Summary>,
    pub(super) notes: Vec<String>,
}

/// What was expected, and what came.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Expectation {
    pub(super) key: &'static str,
    pub(super) wanted: String,
    /// None when there is nothing to say it by, which is a miss.
    pub(super) measured: Option<String>,
    pub(super) met: bool,
}

impl Outcome {
    pub(super) fn of_arms(experiment: &Experiment, samples: Vec<Sample>) -> Self {
        let arms: Vec<ArmFigures> = experiment.arms.iter().map(|arm| ArmFigures::of(*arm, &samples)).collect();
        let expectations = of_arms(&experiment.expect, &arms);
        Self { arms, expectations, samples, ..Self::empty(experiment) }
    }

    pub(super) fn of_reach(experiment: &Experiment, reach: Vec<Reach>) -> Self {
        let counts: Vec<(Arm, usize)> = reach.iter().map(|reach| (reach.arm, reach.apps)).collect();
        let expectations = of_reach(&experiment.expect, &counts);
        Self { reach, expectations, ..Self::empty(experiment) }
    }

    /// How many expectations were missed.
    pub(super) fn missed(&self) -> usize {
        self.expectations.iter().filter(|expectation| !expectation.met).count()
    }

    fn empty(experiment: &Experiment) -> Self {
        Self {
            experiment: experiment.name.clone(),
            version: env!("CARGO_PKG_VERSION"),
            machine: Machine::look(),
            apps: experiment.apps().len(),
            kinds: experiment.kinds.iter().map(|kind| (kind.name.clone(), kind.count)).collect(),
            runs: experiment.runs,
            seed: experiment.seed,
            arms: Vec::new(),
            reach: Vec::new(),
            expectations: Vec::new(),
            samples: Vec::new(),
        }
    }
}

impl ArmFigures {
    fn of(arm: Arm, samples: &[Sample]) -> Self {
        let of = |arm: Arm| samples.iter().filter(move |sample| sample.arm == arm);
        let own: Vec<&Sample> = of(arm).collect();
        let kib = |pick: &dyn Fn(&Sample) -> Option<u64>| {
            Summary::of(own.iter().filter_map(|sample| pick(sample)).map(float))
        };
        // Each run has a resident arm of its own to be compared with.
        let pairs: Vec<(&Sample, &Sample)> = own
            .iter()
            .filter_map(|sample| Some((of(Arm::Resident).find(|other| other.run == sample.run)?, *sample)))
            .collect();
        let saved = |(resident, own): &(&Sample, &Sample)| float_signed(resident.cost - own.cost);
        let compared = arm != Arm::Resident;
        let per_pair = |figure: &dyn Fn(&(&Sample, &Sample)) -> Option<f64>| {
            Summary::of(pairs.iter().filter(|_| compared).filter_map(figure))
        };
        let mut latencies: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
        let mut messages = Messages::default();
        let mut notes: Vec<String> = Vec::new();
        for sample in &own {
            for (state, all) in &sample.latencies_ms {
                latencies.entry(state).or_default().extend(all);
            }
            messages.sent += sample.messages.sent;
            messages.in_time += sample.messages.in_time;
            messages.late += sample.messages.late;
            messages.lost += sample.messages.lost;
            messages.duplicated += sample.messages.duplicated;
            notes.extend(sample.notes.iter().filter(|note| !notes.contains(note)).cloned().collect::<Vec<_>>());
        }
        Self {
            arm,
            cost: Summary::of(own.iter().map(|sample| float_signed(sample.cost))),
            cost_occupied: Summary::of(own.iter().map(|sample| float_signed(sample.cost_occupied))),
            cost_unavailable: Summary::of(own.iter().map(|sample| float_signed(sample.cost_unavailable))),
            ballast: kib(&|sample| sample.ballast.as_ref().map(|ballast| ballast.kib)),
            ballast_bounded: own
                .iter()
                .any(|sample| sample.ballast.as_ref().is_some_and(|ballast| ballast.ended == ballast::Ended::Max)),
            apps_pss: kib(&|sample| Some(sample.apps_pss)),
            daemon_pss: kib(&|sample| sample.daemon_pss),
            zram: kib(&|sample| Some(sample.rest.zram.saturating_sub(sample.before.zram))),
            swap: kib(&|sample| Some(sample.rest.swap_used.saturating_sub(sample.before.swap_used))),
            apps_cpu: Summary::of(own.iter().filter_map(|sample| sample.apps_cpu)),
            daemon_cpu: Summary::of(own.iter().filter_map(|sample| sample.daemon_cpu)),
            major_faults: kib(&|sample| Some(sample.major_faults)),
            connections: kib(&|sample| u64::try_from(sample.connections).ok()),
            reachable: kib(&|sample| u64::try_from(sample.reachable).ok()),
            messages,
            wake_ms: latencies.into_iter().filter_map(|(state, all)| Some((state, Latency::of(all)?))).collect(),
            saved: per_pair(&|pair| Some(saved(pair))),
            returned_percent: per_pair(&|pair| percent_of(saved(pair), float_signed(pair.0.cost))),
            ballast_gained: per_pair(&|(resident, own)| {
                Some(float(own.ballast.as_ref()?.kib) - float(resident.ballast.as_ref()?.kib))
            }),
            claim: Summary::of(own.iter().filter_map(|sample| sample.claim).map(float_signed)),
            claim_error_percent: per_pair(&|pair| {
                let saved = saved(pair);
                percent_of(float_signed(pair.1.claim?) - saved, saved.abs())
            }),
            claim_error_occupied_percent: per_pair(&|(resident, own)| {
                let saved = float_signed(resident.cost_occupied - own.cost_occupied);
                percent_of(float_signed(own.claim?) - saved, saved.abs())
            }),
            // Like with like: PSS of PSS, files that are mapped in both.
            daemon_percent_of_saved: per_pair(&|(resident, own)| {
                percent_of(float(own.daemon_pss?), float(resident.apps_pss) - float(own.apps_pss))
            }),
            notes,
        }
    }
}

fn of_arms(expect: &Expectations, arms: &[ArmFigures]) -> Vec<Expectation> {
    let find = |arm: Arm| arms.iter().find(|figures| figures.arm == arm);
    // The deepest the daemon goes in this experiment is what its claim is judged by.
    let deepest = find(Arm::Tombstone).or(find(Arm::Cached));
    let frozen = find(Arm::Cached).or(find(Arm::ResidentFrozen));
    let median = |summary: Option<Summary>| summary.map(|summary| summary.median);
    let lost: usize = arms.iter().map(|arm| arm.messages.lost).sum();
    [
        expect.claim_within.map(|wanted| {
            let error = median(deepest.and_then(|arm| arm.claim_error_percent)).map(f64::abs);
            at_most("claim-within", wanted, error)
        }),
        expect
            .returned_at_least
            .map(|wanted| at_least("returned-at-least", wanted, median(deepest.and_then(|arm| arm.returned_percent)))),
        expect.frozen_returned_at_least.map(|wanted| {
            at_least("frozen-returned-at-least", wanted, median(frozen.and_then(|arm| arm.returned_percent)))
        }),
        expect.daemon_at_most.map(|wanted| {
            // Where nothing is saved, whatever the daemon costs is too much.
            let share = median(deepest.and_then(|arm| arm.daemon_percent_of_saved)).filter(|share| *share >= 0.0);
            at_most("daemon-at-most", wanted, share)
        }),
        expect.lost_at_most.map(|wanted| Expectation {
            key: "lost-at-most",
            wanted: format!("at most {wanted}"),
            measured: Some(lost.to_string()),
            met: lost <= wanted,
        }),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn of_reach(expect: &Expectations, counts: &[(Arm, usize)]) -> Vec<Expectation> {
    let find = |arm: Arm| counts.iter().find(|(other, _)| *other == arm).map(|(_, apps)| *apps);
    let ours = find(Arm::Tombstone).or(find(Arm::Cached));
    let many = expect.apps_at_least.map(|wanted| Expectation {
        key: "apps-at-least",
        wanted: format!("at least {wanted}"),
        measured: ours.map(|apps| apps.to_string()),
        met: ours.is_some_and(|apps| apps >= wanted),
    });
    let times = expect.times_as_many_at_least.map(|wanted| {
        let times = times_as_many(find(Arm::Resident), ours);
        Expectation {
            key: "times-as-many-at-least",
            wanted: format!("at least {wanted} times"),
            measured: times.map(|times| format!("{times:.1} times")),
            met: times.is_some_and(|times| times >= wanted),
        }
    });
    many.into_iter().chain(times).collect()
}

/// How many times as many apps as resident ones.
pub(super) fn times_as_many(resident: Option<usize>, ours: Option<usize>) -> Option<f64> {
    let resident = u32::try_from(resident?).ok().filter(|apps| *apps > 0)?;
    Some(f64::from(u32::try_from(ours?).ok()?) / f64::from(resident))
}

fn at_most(key: &'static str, wanted: f64, measured: Option<f64>) -> Expectation {
    Expectation {
        key,
        wanted: format!("at most {wanted} %"),
        measured: measured.map(|measured| format!("{measured:.1} %")),
        met: measured.is_some_and(|measured| measured <= wanted),
    }
}

fn at_least(key: &'static str, wanted: f64, measured: Option<f64>) -> Expectation {
    Expectation {
        key,
        wanted: format!("at least {wanted} %"),
        measured: measured.map(|measured| format!("{measured:.1} %")),
        met: measured.is_some_and(|measured| measured >= wanted),
    }
}

fn percent_of(part: f64, whole: f64) -> Option<f64> {
    (whole != 0.0).then_some(part / whole * 100.0)
}

#[expect(clippy::cast_precision_loss, reason = "memory in KiB is far below 2^53")]
const fn float(kib: u64) -> f64 {
    kib as f64
}

#[expect(clippy::cast_precision_loss, reason = "memory in KiB is far below 2^53")]
const fn float_signed(kib: i64) -> f64 {
    kib as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::kernel::System;

    fn sample(run: usize, arm: Arm, cost: i64, claim: Option<i64>) -> Sample {
        Sample {
            run,
            arm,
            before: System::default(),
            rest: System::default(),
            cost,
            cost_occupied: cost * 2,
            cost_unavailable: cost,
            apps: Vec::new(),
            apps_pss: u64::try_from(cost).unwrap_or(0),
            daemon_pss: claim.map(|_| 1000),
            server_pss: None,
            connections: 1,
            apps_cpu: None,
            daemon_cpu: None,
            major_faults: 0,
            messages: Messages { sent: 10, in_time: 9, lost: 1, ..Messages::default() },
            sent: Vec::new(),
            reachable: 3,
            latencies_ms: BTreeMap::new(),
            claim,
            report: None,
            ballast: None,
            caches_dropped: true,
            settled: (true, true),
            seconds: 1.0,
            notes: vec!["a note".into()],
        }
    }

    fn figures() -> Vec<ArmFigures> {
        // The machine drifts: the arms of one run belong together.
        let samples = vec![
            sample(1, Arm::Resident, 100_000, None),
            sample(1, Arm::Tombstone, 10_000, Some(99_000)),
            sample(2, Arm::Tombstone, 30_000, Some(88_000)),
            sample(2, Arm::Resident, 110_000, None),
            sample(3, Arm::Resident, 100_000, None),
            sample(3, Arm::Tombstone, 20_000, Some(84_000)),
        ];
        [Arm::Resident, Arm::Tombstone].map(|arm| ArmFigures::of(arm, &samples)).into()
    }

    #[test]
    fn an_arm_is_compared_with_the_resident_one_of_its_own_run() {
        let [resident, tombstone] = &figures()[..] else { panic!() };
        assert_eq!(resident.cost.unwrap().median, 100_000.0);
        assert_eq!((resident.saved, resident.returned_percent, resident.claim_error_percent), (None, None, None));
        let saved = tombstone.saved.unwrap();
        assert_eq!((saved.min, saved.median, saved.max), (80_000.0, 80_000.0, 90_000.0));
        // 10 %, 10 % and 5 % too much.
        let error = tombstone.claim_error_percent.unwrap();
        assert!((error.median - 10.0).abs() < 1e-9 && (error.min - 5.0).abs() < 1e-9, "{error:?}");
        assert!((tombstone.daemon_percent_of_saved.unwrap().median - 1.25).abs() < 1e-9);
        assert_eq!((tombstone.messages.sent, tombstone.messages.lost), (30, 3));
        assert_eq!(tombstone.notes, ["a note"]);
    }

    #[test]
    fn expectations_are_met_missed_or_cannot_be_judged() {
        let met = |expect: Expectations| of_arms(&expect, &figures())[0].met;
        let expect = Expectations::default();
        assert!(of_arms(&expect, &figures()).is_empty());
        assert!(met(Expectations { claim_within: Some(10.1), ..expect }));
        assert!(!met(Expectations { claim_within: Some(9.9), ..expect }));
        assert!(met(Expectations { returned_at_least: Some(79.0), ..expect }));
        assert!(!met(Expectations { returned_at_least: Some(91.0), ..expect }));
        assert!(met(Expectations { daemon_at_most: Some(1.3), ..expect }));
        assert!(!met(Expectations { daemon_at_most: Some(1.0), ..expect }));
        assert!(met(Expectations { lost_at_most: Some(6), ..expect }));
        assert!(!met(Expectations { lost_at_most: Some(5), ..expect }));
        // No arm that freezes and does not end: nothing to say it by.
        let missed = &of_arms(&Expectations { frozen_returned_at_least: Some(1.0), ..expect }, &figures())[0];
        assert_eq!((missed.met, &missed.measured), (false, &None));
    }

    #[test]
    fn a_claim_that_is_too_small_is_as_wrong_as_one_too_great() {
        let samples = [sample(1, Arm::Resident, 100_000, None), sample(1, Arm::Tombstone, 0, Some(50_000))];
        let arms = [ArmFigures::of(Arm::Tombstone, &samples)];
        assert_eq!(arms[0].claim_error_percent.unwrap().median, -50.0);
        let expect = Expectations { claim_within: Some(49.0), ..Expectations::default() };
        assert!(!of_arms(&expect, &arms)[0].met);
        // A daemon that saves nothing costs too much, however little.
        let samples = [sample(1, Arm::Resident, 1000, None), sample(1, Arm::Tombstone, 2000, Some(0))];
        let arms = [ArmFigures::of(Arm::Tombstone, &samples)];
        let expect = Expectations { daemon_at_most: Some(1.0), ..Expectations::default() };
        assert!(!of_arms(&expect, &arms)[0].met);
    }

    #[test]
    fn counts_are_compared_when_there_are_two() {
        let expect =
            Expectations { apps_at_least: Some(50), times_as_many_at_least: Some(8.0), ..Expectations::default() };
        let met = |counts: &[(Arm, usize)]| of_reach(&expect, counts).iter().map(|one| one.met).collect::<Vec<_>>();
        assert_eq!(met(&[(Arm::Resident, 10), (Arm::Tombstone, 80)]), [true, true]);
        assert_eq!(met(&[(Arm::Resident, 11), (Arm::Tombstone, 80)]), [true, false]);
        assert_eq!(met(&[(Arm::Resident, 1), (Arm::Cached, 49)]), [false, true]);
        assert_eq!(met(&[(Arm::Tombstone, 80)]), [true, false]);
        // With no app at all kept there is no number of times.
        assert_eq!(met(&[(Arm::Resident, 0), (Arm::Tombstone, 80)]), [true, false]);
    }
}
