//! What a spammy sender can cost, and what urgent messages that show nothing count as.

use super::{
    tests::{LANE, World, calls},
    *,
};
use crate::{config::Limits, event::CallOutcome};

/// An app that does not run and may be woken three times an hour, in the best of surroundings.
fn thrifty() -> World {
    let limits = Limits { wakes_per_hour: 3, ..Limits::default() };
    let mut world = World::with_settings(&Settings { limits, ..Settings::default() });
    world.delivery.vanished(&world.app, world.now);
    world
}

/// A message; what it does, and then the app takes all there is and is held still again.
fn push(world: &mut World, id: &str, urgency: Urgency) -> Vec<Output> {
    world.push_with(LANE, id, None, urgency);
    let outputs = world.drain();
    if asked(&outputs).is_some() {
        take(world);
    }
    outputs
}

fn take(world: &mut World) -> Vec<String> {
    world.delivery.ready(&world.app, world.owner.clone(), world.now);
    let mut taken = Vec::new();
    loop {
        let calls = calls(&world.drain());
        if calls.is_empty() {
            break;
        }
        for (ticket, id) in calls {
            taken.push(id);
            world.done(ticket, CallOutcome::Accepted);
        }
    }
    world.delivery.unready(&world.app, world.now);
    world.drain();
    taken
}

fn asked(outputs: &[Output]) -> Option<Urgency> {
    outputs.iter().find_map(|output| if let Output::Wake(_, urgency) = output { Some(*urgency) } else { None })
}

fn told(outputs: &[Output]) -> Option<&str> {
    outputs.iter().find_map(|output| if let Output::Note(_, "budget", text) = output { Some(&**text) } else { None })
}

#[test]
fn beyond_its_budget_an_app_gets_what_is_not_urgent_all_at_once() {
    let mut world = thrifty();
    for id in ["a", "b", "c"] {
        assert_eq!(asked(&push(&mut world, id, Urgency::Normal)), Some(Urgency::Normal));
    }
    let outputs = push(&mut world, "d", Urgency::Normal);
    assert_eq!(asked(&outputs), None);
    assert!(told(&outputs).unwrap().contains("woken it 3 times within an hour (limits.wakes-per-hour)"));
    assert!(outputs.iter().any(|output| matches!(output, Output::Held { why: Why::Budget, .. })));
    let outputs = push(&mut world, "e", Urgency::Low);
    assert_eq!((asked(&outputs), told(&outputs)), (None, None), "said once");
    assert_eq!(world.delivery.poll_timeout(), Some(world.now.boot + BATCH));
    world.pass(BATCH);
    // A quarter of an hour gives back three quarters of one wake-up: none yet.
    assert_eq!(asked(&world.drain()), None);
    world.pass(BATCH);
    let outputs = world.drain();
    assert_eq!(asked(&outputs), Some(Urgency::Normal));
    assert!(outputs.iter().any(|output| matches!(output, Output::Released { count: 2, why: Release::Batch, .. })));
    assert_eq!(take(&mut world), ["d", "e"]);
}

#[test]
fn what_is_urgent_has_a_budget_of_its_own_and_takes_the_others_along() {
    let mut world = thrifty();
    (0..4).for_each(|n| drop(push(&mut world, &format!("{n}"), Urgency::Normal)));
    world.push_with(LANE, "urgent", None, Urgency::High);
    let outputs = world.drain();
    assert_eq!(asked(&outputs), Some(Urgency::High));
    assert!(outputs.iter().any(|output| matches!(output, Output::Released { why: Release::Company, .. })));
    assert_eq!(take(&mut world), ["3", "urgent"]);
}

#[test]
fn urgent_ones_beyond_their_budget_count_as_normal() {
    let mut world = thrifty();
    (0..3).for_each(|n| drop(push(&mut world, &format!("{n}"), Urgency::High)));
    let outputs = push(&mut world, "a", Urgency::High);
    assert!(told(&outputs).unwrap().contains("count as normal"));
    assert_eq!(asked(&outputs), Some(Urgency::Normal));
    // And at a low battery they wait.
    world.delivery.set_minimum(Urgency::High, world.now);
    let outputs = push(&mut world, "b", Urgency::High);
    assert_eq!(asked(&outputs), None);
    assert!(outputs.iter().any(|output| matches!(output, Output::Held { urgency: Urgency::Normal, .. })));
    world.pass(BATCH + BATCH);
    assert_eq!(asked(&world.drain()), Some(Urgency::High));
}

#[test]
fn an_app_that_runs_or_is_told_an_endpoint_costs_nothing() {
    let mut world = thrifty();
    world.delivery.ready(&world.app, world.owner.clone(), world.now);
    for n in 0..50 {
        world.push_with(LANE, &format!("{n}"), None, Urgency::Normal);
        let (ticket, _) = calls(&world.drain())[0];
        world.done(ticket, CallOutcome::Accepted);
    }
    world.delivery.unready(&world.app, world.now);
    for _ in 0..10 {
        world.delivery.endpoint_due(LANE, &"https://push.example/y".into(), world.now);
        assert!(asked(&world.drain()).is_some());
        take(&mut world);
    }
    assert_eq!(asked(&push(&mut world, "x", Urgency::Normal)), Some(Urgency::Normal));
}

#[test]
fn a_demoted_app_is_not_woken_by_what_calls_itself_urgent_until_it_is_better() {
    let mut world = thrifty();
    world.delivery.set_minimum(Urgency::High, world.now);
    world.delivery.set_demoted(&world.app, true, world.now);
    assert_eq!(asked(&push(&mut world, "a", Urgency::High)), None);
    world.delivery.set_demoted(&world.app, false, world.now);
    assert_eq!(asked(&world.drain()), Some(Urgency::High), "what waits counts as what it is again");
    assert_eq!(take(&mut world), ["a"]);
    world.delivery.set_demoted(&world.app, true, world.now);
    world.delivery.set_minimum(Urgency::Normal, world.now);
    assert_eq!(asked(&push(&mut world, "b", Urgency::High)), Some(Urgency::Normal), "never below normal");
}

#[test]
fn an_app_that_waits_for_its_turn_is_asked_for_again_when_something_urgent_comes() {
    let mut world = thrifty();
    world.push_with(LANE, "a", None, Urgency::Low);
    assert_eq!(asked(&world.drain()), Some(Urgency::Low));
    world.push_with(LANE, "b", None, Urgency::Low);
    assert_eq!(asked(&world.drain()), None);
    world.push_with(LANE, "c", None, Urgency::High);
    assert_eq!(asked(&world.drain()), Some(Urgency::High));
    assert_eq!(take(&mut world), ["a", "b", "c"]);
}
