//! The whole core against a world that does its worst (ARCHITECTURE.md; issue 2, point 12).
//!
//! One thread and a stepping clock drive the real `Core`. Everything random comes from one seed, which is printed when a
//! run breaches what `reference` says must hold:
//!
//! ```text
//! NIGHTPORTER_SIM_SEED=… cargo test --no-default-features --test sim
//! ```
//!
//! `NIGHTPORTER_SIM_RUNS` changes the number of runs, `NIGHTPORTER_SIM_FROM` the first seed, `NIGHTPORTER_SIM_ALL` shows
//! every step of a
//! breach, `NIGHTPORTER_SIM_SURVEY` goes through all seeds and counts the kinds of breaches.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test: what cannot be is a breach")]

mod bus;
mod chaos;
mod client;
mod clock;
mod kernel;
mod ledger;
mod ntfy;
mod phone;
mod pressure;
mod reference;
mod run;
mod server;
mod stand_in;
mod store;
mod transfers;
mod world;

const RUNS: u64 = 2000;

#[test]
fn nothing_is_lost_whatever_the_world_does() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let seeds: Vec<u64> = match number("NIGHTPORTER_SIM_SEED") {
        Some(seed) => vec![seed],
        None => {
            let first = number("NIGHTPORTER_SIM_FROM").unwrap_or(1);
            (first..).take(number("NIGHTPORTER_SIM_RUNS").unwrap_or(RUNS) as usize).collect()
        }
    };
    // A breach is a panic; it is told once, with its steps, and not by every thread.
    std::panic::set_hook(Box::new(|info| {
        if std::env::var_os("NIGHTPORTER_SIM_PANICS").is_some() {
            eprintln!("{info}");
        }
    }));
    if std::env::var_os("NIGHTPORTER_SIM_SURVEY").is_some() {
        for (times, seed, what) in run::survey(&seeds) {
            println!("{times} times, as seed {seed}: {what}");
        }
        return;
    }
    let result = run::all(&seeds);
    let _ = std::panic::take_hook();
    match result {
        Ok(stats) => {
            for (what, n) in &stats {
                println!("{n:>10} {what}");
            }
            if seeds.len() as u64 >= RUNS {
                check_that_it_was_hard(&stats);
            }
        }
        Err((seed, breach)) => {
            for step in &breach.steps {
                println!("{step}");
            }
            panic!(
                "{}\n{}\nrerun: NIGHTPORTER_SIM_SEED={seed} cargo test --no-default-features --test sim",
                breach.plan, breach.what
            );
        }
    }
}

/// The same events at the same times with the same seed: the same.
#[test]
fn what_happens_once_happens_again() {
    for seed in 1..=8 {
        let [first, second] = [(); 2].map(|()| run::one(seed, false).map_err(|breach| breach.what));
        assert_eq!(first.unwrap(), second.unwrap(), "seed {seed}");
    }
}

/// A world without faults proves nothing: each of these happens several times as often with the usual seeds.
const LEAST: [(&str, u64); 52] = [
    ("messages processed", 30_000),
    ("acknowledgements", 10_000),
    ("cursors stored", 500),
    ("crashes at an action", 800),
    ("crashes mid-delivery", 400),
    ("crashes with frozen apps", 100),
    ("clean exits", 2000),
    ("writes refused by a full disk", 2000),
    ("bodies read back", 4000),
    ("replays", 20_000),
    ("duplicates seen by apps", 1000),
    ("devices forgotten by the server", 600),
    ("server restarts", 2000),
    ("links broken", 400),
    ("links that died silently", 400),
    ("half-open links", 80),
    ("network losses", 600),
    ("suspends", 500),
    ("bus losses", 300),
    ("apps crashed before taking a message", 600),
    ("apps crashed after taking a message", 600),
    ("apps stopped from outside", 400),
    ("calls never answered", 100),
    ("calls refused", 800),
    ("freezes", 2000),
    ("page-outs", 1000),
    ("kills", 800),
    ("starts for a push", 3000),
    ("messages overflowed", 500),
    ("messages replaced", 100),
    ("changes of surroundings", 500),
    ("apps seen with held messages", 25),
    ("held messages that went along", 100),
    ("sleeps allowed", 300),
    ("sleeps delayed for a delivery", 20),
    ("kept awake", 20),
    ("memory shortages", 500),
    ("apps ended for want of memory", 20),
    ("leases given", 200),
    ("leases given back", 15),
    ("leases taken away", 100),
    ("notices", 1500),
    ("notices to who does not answer", 80),
    ("freezes of the unprepared", 60),
    ("states restored", 1000),
    ("totals written", 1000),
    ("rows of apps written", 1000),
    ("wakes written", 1000),
    ("shadows written", 1000),
    ("reports", 500),
    ("histories read", 500),
    ("shadows read", 500),
];

fn check_that_it_was_hard(stats: &world::Stats) {
    for (what, least) in LEAST {
        let n = stats.get(what).copied().unwrap_or_default();
        assert!(n >= least, "only {n} {what}; {least} at least make the runs worth something");
    }
}
