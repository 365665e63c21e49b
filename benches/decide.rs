//! How long the lifecycle thinks: a round of decisions over 200 apps, and the verdict on an activation among them.
//! `cargo bench --bench decide`. A pure computation: no peer to compare with, so it prints times and their ratio to the
//! budget (issue: under 1 ms), and fails only when it is over ten times that, which no busy machine explains.

#![expect(clippy::print_stdout, reason = "a benchmark prints its result")]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant as Clock},
};

use nightporter::{
    core::lifecycle::{Lifecycle, Output, Seen},
    event::{Claim, Outcome},
    model::{AppKey, Bus, Freezer, LifecycleTimes, Memory, Owner, ProcessFacts, Profile, Rules, TargetId},
    time::{Instant, Now, UnixTime},
};

const APPS: u64 = 200;
const ROUNDS: usize = 500;
const BUDGET: Duration = Duration::from_millis(1);

fn main() {
    let mut freezes = Vec::new();
    let mut activations = Vec::new();
    for _ in 0..ROUNDS {
        let (mut life, mut now) = background();
        now.boot = now.boot + Duration::from_secs(10);
        // Measured, told and inspected first: what is timed is the round that decides to freeze all of them.
        life.handle_timeout(now);
        answer(&mut life, now, false);
        answer(&mut life, now, true);
        let begun = Clock::now();
        for app in 0..APPS {
            life.inspected(TargetId(app), &Ok(Vec::new()), now);
        }
        freezes.push(begun.elapsed());
        let mut frozen = 0;
        while let Some(output) = life.poll_output() {
            frozen += u64::from(matches!(output, Output::Freeze(_)));
        }
        assert_eq!(frozen, APPS, "the round did not decide what it is timed for");
        for app in 0..APPS {
            life.outcome(TargetId(app), &Outcome::Frozen { took: Duration::from_millis(1) }, now);
        }
        while life.poll_output().is_some() {}
        let begun = Clock::now();
        life.seen(&key(APPS / 2), Seen::Front("its window is in front".into()), now);
        let thaw = std::iter::from_fn(|| life.poll_output()).any(|output| matches!(output, Output::Thaw(_)));
        activations.push(begun.elapsed());
        assert!(thaw);
    }
    show("freezing 200 apps", freezes);
    show("thawing one of 200", activations);
}

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or_default();
    let (median, p99) = (at(0.5), at(0.99));
    println!(
        "{what}: median {median:?}, p99 {p99:?}; {:.2} of the budget",
        median.as_secs_f64() / BUDGET.as_secs_f64()
    );
    assert!(median < BUDGET * 10, "{what} takes {median:?}");
}

fn key(app: u64) -> AppKey {
    AppKey::new(Bus::Session(1000), format!("org.example.App{app:03}"))
}

fn background() -> (Lifecycle, Now) {
    let rules = Rules::new(Profile::Tombstone, LifecycleTimes::default());
    let now = Now { boot: Instant::from_nanos(1_000_000_000), wall: UnixTime::from_secs(1_700_000_000) };
    let mut life = Lifecycle::new(rules, BTreeMap::new(), &[]);
    for app in 0..APPS {
        let owner = Owner(format!(":1.{app}").into());
        let facts = ProcessFacts {
            pid: 1000 + u32::try_from(app).unwrap_or_default(),
            freezer: Freezer::Cgroup2,
            can_page_out: true,
            protected: None,
        };
        life.add_app(&key(app), now);
        life.startable(&key(app), true, now);
        life.appeared(&key(app), &owner, false, now);
        life.identified(&key(app), &owner, Ok((TargetId(app), facts)), now);
        life.declare(&key(app), Claim::Background, "the app itself", now);
    }
    while life.poll_output().is_some() {}
    (life, now)
}

/// Answers what is measured, or leaves the inspections asked for without an answer yet.
fn answer(life: &mut Lifecycle, now: Now, drain: bool) {
    let mut measured = Vec::new();
    while let Some(output) = life.poll_output() {
        if let (Output::Sample(target, _), false) = (output, drain) {
            measured.push(target);
        }
    }
    for target in measured {
        let _ = life.sampled(target, Ok(Memory { pss: 40_000, uss: 30_000, swap: 0 }), now);
    }
}
