//! Every crowd through every scenario, and what is to be told of it.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use crate::{
    crowd::{Crowd, Upstream},
    scenario::{Capacity, Cut, Scenario},
    world::Outcome,
};

/// What became of each crowd in one scenario, in the order of [`Crowd::ALL`].
pub(crate) struct Chapter {
    pub(crate) scenario: &'static Scenario,
    pub(crate) outcomes: Vec<Outcome>,
}

/// Runs all of `scenarios`. The real sessions go one scenario after the other, because a million of them fill some
/// gigabytes; the models go beside them.
pub(crate) fn run(
    scenarios: &'static [Scenario],
    upstream: &Upstream,
    phones: u32,
    seed: u64,
    done: impl Fn(&Scenario, Crowd) + Sync,
) -> Vec<Chapter> {
    let of = |real: bool| {
        let crowds = Crowd::ALL.into_iter().filter(move |crowd| (*crowd == Crowd::NightPorter) == real);
        crowds.flat_map(|crowd| scenarios.iter().enumerate().map(move |(n, scenario)| (n, scenario, crowd)))
    };
    let results = Mutex::new(Vec::new());
    let work = |jobs: &[(usize, &'static Scenario, Crowd)], next: &AtomicUsize| {
        while let Some((n, scenario, crowd)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = crowd.run(scenario, upstream, phones, seed);
            results.lock().unwrap_or_else(PoisonError::into_inner).push((*n, *crowd as usize, outcome));
            done(scenario, *crowd);
        }
    };
    let (real, models): (Vec<_>, Vec<_>) = (of(true).collect(), of(false).collect());
    let (next_real, next_model) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let beside = thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1)).clamp(1, 3);
    thread::scope(|scope| {
        scope.spawn(|| work(&real, &next_real));
        for _ in 0..beside {
            scope.spawn(|| work(&models, &next_model));
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(n, crowd, _)| (*n, *crowd));
    let mut chapters: Vec<Chapter> =
        scenarios.iter().map(|scenario| Chapter { scenario, outcomes: Vec::new() }).collect();
    for (n, _, outcome) in results {
        chapters[n].outcomes.push(outcome);
    }
    chapters
}

impl Chapter {
    pub(crate) fn of(&self, crowd: Crowd) -> &Outcome {
        &self.outcomes[crowd as usize]
    }

    /// What could not be done better: nobody tries before there is a point, and then a steady stream. It is as wide as
    /// the server can take, or as our own peak where it can take anything. `None` where every phone goes by itself.
    pub(crate) fn ideal(&self) -> Option<Ideal> {
        let ours = self.of(Crowd::NightPorter);
        let rate = match (&self.scenario.cut, self.scenario.capacity) {
            (Cut::Network { .. }, _) => return None,
            (_, Capacity::Boundless) => f64::from(self.peak_after(ours)),
            (_, Capacity::Sheds { .. } | Capacity::Drowns { .. }) => self.scenario.rate(ours.phones)?,
        };
        Some(Ideal { rate, phones: ours.phones as f64 })
    }

    /// The worst second while the server is away, and before it can be reached again.
    pub(crate) fn peak_before(&self, outcome: &Outcome) -> u32 {
        let returns = self.scenario.down.as_secs() as usize;
        outcome.attempts.iter().take(returns).copied().max().unwrap_or(0)
    }

    /// The worst second once it is there.
    pub(crate) fn peak_after(&self, outcome: &Outcome) -> u32 {
        let returns = self.scenario.down.as_secs() as usize;
        outcome.attempts.iter().skip(returns).copied().max().unwrap_or(0)
    }
}

/// A steady stream of attempts that all succeed.
pub(crate) struct Ideal {
    /// A second.
    pub(crate) rate: f64,
    phones: f64,
}

impl Ideal {
    /// Seconds from the server's return until this share is back.
    pub(crate) fn seconds(&self, share: f64) -> f64 {
        share * self.phones / self.rate
    }
}

impl Outcome {
    /// Seconds until this share is back, if it ever is.
    pub(crate) fn seconds(&self, share: f64) -> Option<f64> {
        let phones = (share * self.phones as f64).ceil() as usize;
        self.waits.get(phones.saturating_sub(1)).map(|millis| f64::from(*millis) / 1000.0)
    }

    /// Attempts of a phone on average.
    pub(crate) fn mean_tries(&self) -> f64 {
        self.tries.iter().map(|tries| f64::from(*tries)).sum::<f64>() / self.phones as f64
    }

    pub(crate) fn most_tries(&self) -> u16 {
        self.tries.last().copied().unwrap_or(0)
    }
}
