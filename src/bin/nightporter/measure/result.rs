//! From raw samples to figures, and from figures to what was expected of them. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    arm::{Arm, Messages, Sample},
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
    /// What it costs: growth of used memory (MemTotal - MemAvailable, zram in it).
    pub(super) cost: Option<Summary>,
    /// The same without page cache that nobody maps.
    pub(super) cost_occupied: Option<Summary>,
    /// What can be allocated beside it.
    pub(super) ballast: Option<Summary>,
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
            ballast: kib(&|sample| sample.ballast.as_ref().map(|ballast| ballast.kib)),
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
            daemon_percent_of_saved: per_pair(&|pair| percent_of(float(pair.1.daemon_pss?), saved(pair))),
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
