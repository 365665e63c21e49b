//! A small fleet, and what must hold of one of any size.

use std::{sync::LazyLock, time::Duration};

use nightporter::core::upstream::{
    CONNECT_TIMEOUT,
    backoff::{CEILING, CROWD_LIMIT},
};

use crate::{
    crowd::{Crowd, REGISTRATIONS, Upstream},
    dialect::Dialect,
    figure, model, page,
    scenario::{ALL, Scenario},
    survey::{self, Chapter},
    world,
};

const PHONES: u32 = 2000;
const SEED: u64 = 11;
/// The slowest handshake, the hello included.
const HANDSHAKE: f64 = 1.3;

static FLEET: LazyLock<Vec<Chapter>> = LazyLock::new(|| fleet("autopush", SEED));

fn fleet(upstream: &str, seed: u64) -> Vec<Chapter> {
    survey::run(&ALL, &Upstream::new(upstream).unwrap(), PHONES, seed, |_, _| {})
}

fn chapter(title: &str) -> &'static Chapter {
    FLEET.iter().find(|chapter| chapter.scenario.title == title).unwrap()
}

fn scenario(title: &str) -> &'static Scenario {
    ALL.iter().find(|scenario| scenario.title == title).unwrap()
}

#[test]
fn the_same_seed_gives_the_same_page_and_figure() {
    let documents =
        |chapters: &[Chapter], seed| (page::page(chapters, "autopush", PHONES, seed), figure::figure(chapters, PHONES));
    assert_eq!(documents(&FLEET, SEED), documents(&fleet("autopush", SEED), SEED));
    assert_ne!(documents(&FLEET, SEED), documents(&fleet("autopush", SEED + 1), SEED));
}

#[test]
fn everybody_comes_back_whatever_the_upstream() {
    for chapter in FLEET.iter().chain(&fleet("ntfy", SEED)) {
        let outcome = chapter.of(Crowd::NightPorter);
        assert_eq!(outcome.back.len(), PHONES as usize, "{}", chapter.scenario.title);
        assert!(outcome.tries[0] >= 1, "{}", chapter.scenario.title);
    }
}

#[test]
fn a_restart_brings_no_stampede() {
    for title in ["Restart, 1 s", "Restart, 10 s"] {
        let chapter = chapter(title);
        let (ours, fixed) = (chapter.of(Crowd::NightPorter), chapter.of(Crowd::Fixed));
        assert!(chapter.peak_after(ours) * 4 < chapter.peak_after(fixed), "{title}");
        // Two waves may overlap in a second, no more.
        let even = f64::from(PHONES) / CROWD_LIMIT.as_secs_f64();
        assert!(f64::from(chapter.peak_before(ours).max(chapter.peak_after(ours))) < 2.0 * even, "{title}");
        // After three failures the limit has doubled thrice; hardly anybody has failed more often by then.
        assert!(ours.seconds(0.99).unwrap() < 8.0 * CROWD_LIMIT.as_secs_f64(), "{title}");
        assert!(ours.mean_tries() < 4.0, "{title}");
    }
}

#[test]
fn after_an_outage_nobody_waits_longer_than_the_ceiling() {
    for (title, late) in [("Outage, 10 min", Duration::ZERO), ("Dead network, 10 min", CONNECT_TIMEOUT)] {
        let chapter = chapter(title);
        let ours = chapter.of(Crowd::NightPorter);
        assert!(ours.seconds(1.0).unwrap() <= (CEILING + late).as_secs_f64() + HANDSHAKE, "{title}");
        assert!(ours.seconds(0.5).unwrap() <= CEILING.as_secs_f64() / 2.0, "{title}");
        // Few against a server that is away, and a trickle when it is back.
        assert!(ours.mean_tries() * 2.0 < chapter.of(Crowd::Fixed).mean_tries(), "{title}");
        assert!(f64::from(chapter.peak_after(ours)) < f64::from(PHONES) / 60.0, "{title}");
    }
}

#[test]
fn a_server_with_a_limit_is_worked_off_and_not_worn_down() {
    let sheds = chapter("Restart, server sheds load");
    let ideal = sheds.ideal().unwrap().seconds(0.99);
    let ours = sheds.of(Crowd::NightPorter).seconds(0.99).unwrap();
    assert!(ours >= ideal && ours < 2.5 * ideal, "{ours} s, ideal {ideal} s");
    assert!(ours < sheds.of(Crowd::Former).seconds(0.99).unwrap());

    let drowns = chapter("Restart, server drowns");
    assert!(drowns.of(Crowd::NightPorter).seconds(0.99).unwrap() < 1000.0);
    assert!(drowns.of(Crowd::Fixed).seconds(0.5).is_none(), "if this recovers the scenario shows nothing");
}

#[test]
fn a_server_that_forgot_is_told_every_registration_once() {
    let registers: u64 =
        chapter("Restart, 10 s, memory lost").of(Crowd::NightPorter).registers.iter().map(|n| u64::from(*n)).sum();
    assert_eq!(registers, u64::from(PHONES) * REGISTRATIONS);
    let others = FLEET.iter().filter(|chapter| !chapter.scenario.forgets);
    assert!(others.flat_map(|chapter| &chapter.of(Crowd::NightPorter).registers).all(|n| *n == 0));
}

#[test]
fn a_phones_own_network_brings_its_link_within_two_seconds() {
    let outcome = chapter("Phones' own networks, 60 s").of(Crowd::NightPorter);
    assert!(outcome.seconds(1.0).unwrap() <= 2.0, "{:?}", outcome.seconds(1.0));
}

/// What is said of the models holds only if they are driven as the session is.
#[test]
fn a_model_with_the_sessions_own_figures_fares_as_the_session_does() {
    let policy = model::Policy::Doubling { first: CROWD_LIMIT, ceiling: CEILING, from: 0.25, over: 1.0 };
    for title in ["Restart, 10 s", "Outage, 10 min", "Restart, server drowns"] {
        let model = world::run(scenario(title), Dialect::Mute, PHONES, SEED, |_, seed, now| {
            model::Model::new(policy, u64::from(seed[0]) << 32 | u64::from(seed[9]) << 8 | u64::from(seed[17]), now)
        });
        let real = chapter(title).of(Crowd::NightPorter);
        for share in [0.5, 0.9, 0.99] {
            let (model, real) = (model.seconds(share).unwrap(), real.seconds(share).unwrap());
            assert!((model / real - 1.0).abs() < 0.15, "{title}, {share}: model {model} s, session {real} s");
        }
        assert!((model.mean_tries() / real.mean_tries() - 1.0).abs() < 0.05, "{title}");
    }
}

#[test]
fn numbers_read_as_people_write_them() {
    assert_eq!([0, 999, 1000, 1_234_567].map(page::thousands), ["0", "999", "1,000", "1,234,567"]);
    assert_eq!([1.234, 2.0, 59.6, 130.0, 600.0].map(page::time), ["1.2 s", "2 s", "60 s", "2.2 min", "10 min"]);
}
