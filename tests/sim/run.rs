//! One run from its seed, and many of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use nightporter::{
    config::{Roaming, UpstreamKind},
    event::Event,
    model::{LifecycleTimes, Profile},
};

use crate::{
    clock::{At, MS, Rng, SEC},
    reference::Rules,
    world::{Plan, Stats, World},
};

/// How long faults go on, in the world's time.
const LENGTH: At = 200 * SEC;
/// How long everything may take to come right afterwards.
const MINUTES_OF_CALM: u64 = 60;

/// A run that breached something.
pub(crate) struct Breach {
    pub(crate) plan: String,
    pub(crate) what: String,
    pub(crate) steps: Vec<String>,
}

/// Runs `seeds`, on as many threads as there are cores. The first breach ends all.
pub(crate) fn all(seeds: &[u64]) -> Result<Stats, (u64, Breach)> {
    let next = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let stats = Mutex::new(Stats::new());
    let breach = Mutex::new(None);
    let threads = thread::available_parallelism().map_or(2, usize::from).min(8);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut own = Stats::new();
                while !over.load(Ordering::Relaxed) {
                    let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) else { break };
                    match one(*seed, false) {
                        Ok(stats) => stats.into_iter().for_each(|(what, n)| *own.entry(what).or_default() += n),
                        Err(_) => {
                            over.store(true, Ordering::Relaxed);
                            // Once more, slowly, to see how it came to that.
                            let found = one(*seed, true).err().unwrap_or_else(|| Breach {
                                plan: String::new(),
                                what: "it did not happen again: the core does not do the same twice".into(),
                                steps: Vec::new(),
                            });
                            breach.lock().unwrap().get_or_insert((*seed, found));
                        }
                    }
                }
                let mut stats = stats.lock().unwrap();
                own.into_iter().for_each(|(what, n)| *stats.entry(what).or_default() += n);
            });
        }
    });
    match breach.into_inner().unwrap() {
        Some(breach) => Err(breach),
        None => Ok(stats.into_inner().unwrap()),
    }
}

/// Runs all of them and tells what was breached how often, with a seed of each kind: for work on the core.
pub(crate) fn survey(seeds: &[u64]) -> Vec<(u64, u64, String)> {
    let mut kinds: BTreeMap<String, (u64, u64, String)> = BTreeMap::new();
    for seed in seeds {
        if let Err(breach) = one(*seed, false) {
            let kind = breach.what.chars().filter(|c| !c.is_ascii_digit()).take(50).collect();
            kinds.entry(kind).or_insert((0, *seed, breach.what)).0 += 1;
        }
    }
    kinds.into_values().collect()
}

/// One run.
pub(crate) fn one(seed: u64, traced: bool) -> Result<Stats, Breach> {
    let mut rng = Rng::new(seed);
    let plan = plan(&mut rng);
    let text = format!(
        "seed {seed}, profile {:?}, first upstream {}, crash {}/10000 per action, slow apps {}, at most {} waiting, {} attempts",
        plan.profile,
        plan.first.as_str(),
        plan.crash,
        plan.slow_apps,
        plan.rules.most_waiting,
        plan.rules.attempts,
    );
    let mut world = World::new(plan, rng, traced);
    let result = catch_unwind(AssertUnwindSafe(|| live(&mut world)));
    match result {
        Ok(()) => Ok(std::mem::take(&mut world.stats)),
        Err(panic) => {
            let what = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_default();
            Err(Breach { plan: text, what, steps: world.trace() })
        }
    }
}

fn plan(rng: &mut Rng) -> Plan {
    let strict = rng.chance(1500);
    Plan {
        profile: *rng.pick(&[Profile::Tombstone, Profile::Tombstone, Profile::Cached, Profile::Observe]).unwrap(),
        first: *rng.pick(&[UpstreamKind::Autopush, UpstreamKind::Ntfy]).unwrap(),
        crash: *rng.pick(&[0, 0, 10, 50, 150]).unwrap(),
        slow_apps: !strict && rng.chance(7000),
        rules: Rules { most_waiting: if rng.chance(1000) { 4 } else { 2048 }, attempts: if strict { 4 } else { 1000 } },
        chaos: rng.between(500, 8000) * MS,
        publish: rng.between(500, 12_000) * MS,
        phone: rng.chance(6000),
        psi: rng.chance(7000),
        roaming: if rng.chance(3000) { Roaming::Off } else { Roaming::Connect },
        hold_at_most: rng.between(10, 120) * SEC,
        policies: crate::phone::policies(rng),
        times: LifecycleTimes {
            grace: Duration::from_millis(rng.between(100, 5000)),
            page_out_after: Duration::from_millis(rng.between(1000, 10_000)),
            tombstone_after: Duration::from_millis(rng.between(6000, 60_000)),
            awake_window: Duration::from_millis(rng.between(100, 8000)),
        },
    }
}

fn live(world: &mut World) {
    let end = world.at + LENGTH;
    while world.step(end) {}
    calm_down(world);
    check_end(world);
    let sent = world.reference.sent.len() as u64;
    *world.stats.entry("messages").or_default() += sent;
    *world.stats.entry("steps").or_default() += world.steps;
    *world.stats.entry("runs").or_default() += 1;
}

/// Faults are over, everything is brought up, and time goes on until nothing is missing.
fn calm_down(world: &mut World) {
    world.note(|| "calm".to_owned());
    world.calm = true;
    world.autopush.kind = true;
    world.store.full = false;
    world.network_down = false;
    world.servers_down.clear();
    world.comes_home();
    world.memory_is_enough();
    world.bus_returns();
    run_for(world, 40 * SEC);
    for app in 0..world.apps.len() {
        if let Some(n) = world.apps[app].instance {
            world.die(n, "is restarted");
        }
    }
    run_for(world, 2 * SEC);
    for app in 0..world.apps.len() {
        world.spawn(app, false);
    }
    world.tell(Event::NetworkReturned);
    for minute in 0..MINUTES_OF_CALM {
        run_for(world, 60 * SEC);
        if minute >= 2 && unsettled(world).is_none() {
            break;
        }
        // Messages have come by then, however the phone is; transfers wait for better days.
        if minute == MINUTES_OF_CALM / 2 {
            world.is_well();
        }
        // Nobody else starts what cannot be started, or is not known.
        for app in 0..world.apps.len() {
            let state = &world.apps[app];
            let unknown = state.wishes.iter().any(|wish| wish.wanted && !wish.registered);
            let startable = state.activatable;
            if let Some(n) = state.instance.filter(|_| unknown) {
                world.die(n, "is restarted");
            }
            if unknown || !startable {
                world.spawn(app, false);
            }
        }
    }
}

fn run_for(world: &mut World, time: At) {
    let end = world.at + time;
    while world.step(end) {}
    world.check_answers();
}

/// What is not as it must be in the end.
fn unsettled(world: &World) -> Option<String> {
    let missing: Vec<String> = world.reference.missing(world.at).into_iter().map(|sent| sent.describe()).collect();
    if !missing.is_empty() {
        return Some(format!("lost: {missing:?}"));
    }
    let unanswered = world.unanswered();
    if !unanswered.is_empty() {
        return Some(format!("calls without an answer: {unanswered:?}"));
    }
    if !world.is_up() {
        return Some("the daemon does not run".into());
    }
    if let Some(unheard) = world.unheard_transfer() {
        return Some(unheard);
    }
    let mut tokens = BTreeSet::new();
    for registration in world.reference.registrations() {
        if !tokens.insert((registration.app.clone(), registration.token.clone())) {
            return Some(format!("{} has two registrations for {}", registration.app, registration.token));
        }
    }
    for registration in world.reference.registrations() {
        if let Some(wanted) =
            world.store.preferred(&registration.app).filter(|wanted| **wanted != registration.upstream)
        {
            return Some(format!("{} {} did not move to {wanted}", registration.app, registration.token));
        }
    }
    let wishes = world.apps.iter().flat_map(|app| app.wishes.iter().map(move |wish| (app, wish)));
    wishes.filter(|(_, wish)| wish.wanted).find_map(|(app, wish)| {
        let (key, token) = (&app.key, &wish.token);
        if !wish.registered {
            return Some(format!("{key} could not register {token}"));
        }
        let found = world.reference.registrations().find(|r| r.app == *key && r.token == *token);
        let Some(registration) = found else {
            return Some(format!("{key} believes that {token} is registered, and it is not"));
        };
        let endpoint = &registration.endpoint;
        if wish.endpoint.as_ref() != Some(endpoint) {
            return Some(format!("{key} was not told of its endpoint {endpoint} for {token}: {:?}", wish.endpoint));
        }
        let live = *registration.upstream != *"push" || world.autopush.is_live(endpoint);
        (!live).then(|| format!("{key}: nobody listens at {endpoint} of {token}"))
    })
}

fn check_end(world: &mut World) {
    if let Some(problem) = unsettled(world) {
        panic!("{problem}");
    }
    // Invariant 9: with nothing to do, hardly a timer.
    let before = world.ticks;
    run_for(world, 120 * SEC);
    let ticks = world.ticks - before;
    assert!(ticks <= 20 * world.apps.len() as u64 + 20, "{ticks} timers in two idle minutes");
    world.shutdown();
    run_for(world, 5 * SEC);
    assert!(world.stats.get("clean exits").is_some_and(|n| *n > 0), "no exit after a shutdown");
}
