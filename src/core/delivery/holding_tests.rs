//! What is held, for how long, and what it takes to let it go.

use proptest::prelude::*;

use super::{
    tests::{LANE, OTHER_LANE, World, calls, calls_of, safe},
    *,
};
use crate::{config::AppSettings, event::CallOutcome, event::FetchError};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Not running, on battery and a mobile network.
fn outside() -> World {
    outside_with(&Settings::default())
}

fn outside_with(settings: &Settings) -> World {
    let mut world = World::with_settings(settings);
    world.delivery.set_minimum(Urgency::Normal, world.now);
    world.delivery.vanished(&world.app, world.now);
    world
}

impl World {
    fn send(&mut self, id: &str, urgency: Urgency) -> Vec<Output> {
        self.push_with(LANE, id, None, urgency);
        self.drain()
    }

    fn runs(&mut self) {
        self.delivery.ready(&self.app, self.owner.clone(), self.now);
    }

    /// Takes everything it is called with; in this order.
    fn take_all(&mut self) -> Vec<String> {
        let mut order = Vec::new();
        loop {
            let calls = self.calls();
            if calls.is_empty() {
                return order;
            }
            for (ticket, id) in calls {
                order.push(id);
                self.done(ticket, CallOutcome::Accepted);
            }
        }
    }
}

fn woken(outputs: &[Output]) -> bool {
    outputs.iter().any(|output| matches!(output, Output::Wake(..)))
}

fn released(outputs: &[Output]) -> Option<(usize, Release)> {
    outputs.iter().find_map(|output| match output {
        Output::Released { count, why, .. } => Some((*count, *why)),
        _ => None,
    })
}

fn told_of_hold(outputs: &[Output]) -> usize {
    outputs.iter().filter(|output| matches!(output, Output::Held { .. })).count()
}

#[test]
fn a_message_of_too_little_urgency_is_kept_and_acknowledged_and_wakes_nobody() {
    let mut world = outside();
    let outputs = world.send("a", Urgency::Low);
    assert!(!woken(&outputs));
    assert!(!outputs.iter().any(|output| matches!(output, Output::Pending(_, true))), "it may be frozen meanwhile");
    assert!(outputs.iter().any(|output| matches!(output, Output::Persist(_))));
    assert_eq!(told_of_hold(&outputs), 1);
    world.delivery.stored(MessageSeq(1), true, world.now);
    assert_eq!(safe(&world.drain()), ["a"]);
    assert_eq!(told_of_hold(&world.send("b", Urgency::VeryLow)), 0, "said once for all of them");
    assert_eq!((world.delivery.held_for(&world.app), world.delivery.waiting()), (2, 2));
    assert!(!world.delivery.is_busy());
}

#[test]
fn one_that_may_wake_takes_the_others_along_in_order() {
    let mut world = outside();
    world.send("a", Urgency::Low);
    world.push_with(OTHER_LANE, "other", None, Urgency::VeryLow);
    let outputs = world.send("b", Urgency::Normal);
    assert!(woken(&outputs));
    assert_eq!(released(&outputs), Some((2, Release::Company)));
    world.runs();
    let order = world.take_all();
    assert_eq!(order.iter().filter(|id| **id != "other").collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(world.delivery.waiting(), 0, "{order:?}");
}

#[test]
fn better_surroundings_let_go_what_they_allow() {
    let mut world = outside();
    world.send("a", Urgency::VeryLow);
    world.delivery.set_minimum(Urgency::Low, world.now);
    assert_eq!(released(&world.drain()), None);
    world.send("b", Urgency::Low);
    assert_eq!(world.delivery.held_for(&world.app), 0, "low passes now and takes the other along");
    let mut world = outside();
    world.send("a", Urgency::VeryLow);
    world.delivery.set_minimum(Urgency::VeryLow, world.now);
    let outputs = world.drain();
    assert!(woken(&outputs));
    assert_eq!(released(&outputs), Some((1, Release::Allowed)));
}

#[test]
fn an_app_that_runs_anyway_gets_what_is_held() {
    let mut world = outside();
    world.send("a", Urgency::Low);
    world.delivery.appeared(&world.app, world.now);
    assert!(!woken(&world.drain()), "appeared is not yet ready");
    assert_eq!(world.delivery.holding().collect::<Vec<_>>(), [&world.app]);
    world.runs();
    let outputs = world.drain();
    assert_eq!(released(&outputs), Some((1, Release::Running)));
    assert_eq!(calls_of(&outputs), ["a"]);
    world.done(calls(&outputs)[0].0, CallOutcome::Accepted);
    assert_eq!(calls_of(&world.send("b", Urgency::VeryLow)), ["b"], "as long as it runs nothing is held");
}

#[test]
fn nothing_is_held_for_longer_than_it_may_be() {
    let mut world = outside();
    assert_eq!(world.delivery.poll_timeout(), None, "no timer while nothing is held");
    world.send("a", Urgency::Low);
    world.pass(HOUR);
    world.send("b", Urgency::Low);
    assert_eq!(world.delivery.poll_timeout().unwrap().since(world.now.boot), DAY - HOUR, "one timer for both");
    world.pass(DAY - HOUR);
    let outputs = world.drain();
    assert!(woken(&outputs));
    assert_eq!(released(&outputs), Some((2, Release::TimeUp)), "the whole batch");
    world.runs();
    assert_eq!(world.take_all(), ["a", "b"]);
    assert_eq!(world.delivery.poll_timeout(), None);
}

#[test]
fn what_has_expired_meanwhile_wakes_nobody() {
    let mut world = outside();
    let arrival = Arrival {
        registration: LANE,
        id: "a".into(),
        body: ArrivalBody::Bytes(b"a".as_slice().into()),
        expires: world.now.wall + HOUR,
        topic: None,
        urgency: Urgency::Low,
        by_policy: true,
        from: "background",
    };
    world.delivery.arrived(arrival, world.now);
    assert!(world.drain().iter().any(|output| matches!(output, Output::Held { by_policy: true, .. })));
    world.pass(HOUR * 2);
    world.delivery.set_minimum(Urgency::VeryLow, world.now);
    let outputs = world.drain();
    assert!(!woken(&outputs));
    assert_eq!((world.delivery.waiting(), world.delivery.poll_timeout()), (0, None));
}

#[test]
fn a_topic_that_changes_often_is_not_held_for_ever() {
    let mut world = outside();
    let mut first = None;
    for hour in 0..48 {
        world.push_with(LANE, &hour.to_string(), Some("news"), Urgency::Low);
        let outputs = world.drain();
        first = first.or(woken(&outputs).then_some(hour));
        world.pass(HOUR);
        let outputs = world.drain();
        first = first.or(woken(&outputs).then_some(hour));
    }
    assert_eq!(first, Some(23));
    assert_eq!(world.delivery.waiting(), 1, "the newest alone");
}

#[test]
fn a_queue_that_fills_goes_before_anything_is_dropped() {
    let limits = Limits { messages_per_app: 6, ..Limits::default() };
    let mut world = outside_with(&Settings { limits, ..Settings::default() });
    world.send("a", Urgency::Low);
    assert!(!woken(&world.send("b", Urgency::Low)));
    let outputs = world.send("c", Urgency::Low);
    assert!(woken(&outputs));
    assert_eq!(released(&outputs), Some((2, Release::Crowded)));
}

#[test]
fn an_app_may_have_a_minimum_of_its_own() {
    let app = |min_urgency| AppSettings { min_urgency: Some(min_urgency), ..AppSettings::new("org.example.App") };
    let mut world = outside_with(&Settings { apps: vec![app(Urgency::VeryLow)], ..Settings::default() });
    world.delivery.set_minimum(Urgency::High, world.now);
    assert!(woken(&world.send("a", Urgency::VeryLow)));
    let mut world = outside_with(&Settings { apps: vec![app(Urgency::High)], ..Settings::default() });
    world.delivery.set_minimum(Urgency::VeryLow, world.now);
    assert!(!woken(&world.send("a", Urgency::Normal)));
    let off = UrgencySettings { enabled: false, ..UrgencySettings::default() };
    let settings = Settings { apps: vec![app(Urgency::High)], urgency: off, ..Settings::default() };
    let mut world = outside_with(&settings);
    world.delivery.set_minimum(Urgency::VeryLow, world.now);
    assert!(woken(&world.send("a", Urgency::VeryLow)), "switched off is switched off");
}

#[test]
fn a_restart_does_not_begin_the_time_anew() {
    let mut world = World::with_settings(&Settings::default());
    let stored = |seq, hours: u32, wall: UnixTime| StoredMessage {
        seq: MessageSeq(seq),
        registration: LANE,
        id: format!("m{seq}").into(),
        size: 1,
        received: UnixTime::from_millis(wall.as_millis() - u64::from(hours) * 3_600_000),
        expires: wall + DAY * 20,
        topic: None,
        urgency: Urgency::Low,
    };
    world.delivery.set_minimum(Urgency::Normal, world.now);
    world.delivery.restore(stored(1, 20, world.now.wall), world.now);
    world.delivery.restore(stored(2, 0, world.now.wall), world.now);
    // The clock was ahead when this one came.
    let ahead = world.now.wall + DAY * 300;
    world.delivery.restore(StoredMessage { received: ahead, ..stored(3, 0, world.now.wall) }, world.now);
    world.delivery.vanished(&world.app, world.now);
    assert_eq!(told_of_hold(&world.drain()), 1);
    assert_eq!(world.delivery.poll_timeout().unwrap().since(world.now.boot), HOUR * 4);
    world.pass(HOUR * 4);
    assert!(woken(&world.drain()));
}

#[test]
fn an_app_that_does_not_answer_is_not_woken_again_for_what_would_be_held() {
    let mut world = outside();
    world.runs();
    assert_eq!(calls_of(&world.send("a", Urgency::Low)), ["a"]);
    world.pass(ANSWER_TIME);
    world.delivery.unready(&world.app, world.now);
    world.drain();
    assert!(world.delivery.poll_timeout().unwrap().since(world.now.boot) > HOUR * 20);
    world.send("b", Urgency::Normal);
    let at = world.delivery.poll_timeout().unwrap();
    world.pass(at.since(world.now.boot));
    assert!(woken(&world.drain()), "another chance, for the sake of what waits behind it");
}

#[test]
fn attachments_wait_while_roaming() {
    let mut world = outside();
    world.delivery.set_fetching(false, world.now);
    let attachment = |id: &str, expires| Arrival {
        registration: LANE,
        id: id.into(),
        body: ArrivalBody::Attachment { url: "https://x/a".into(), size: None },
        expires,
        topic: None,
        urgency: Urgency::High,
        by_policy: false,
        from: "background",
    };
    let fetches = |outputs: &[Output]| outputs.iter().filter(|o| matches!(o, Output::Fetch { .. })).count();
    world.delivery.arrived(attachment("a", world.now.wall + DAY * 2), world.now);
    let outputs = world.drain();
    assert_eq!(fetches(&outputs), 0);
    assert!(outputs.iter().any(|output| matches!(output, Output::Note(_, "hold", _))));
    assert_eq!(world.delivery.poll_timeout().unwrap().since(world.now.boot), DAY);
    world.pass(HOUR);
    assert_eq!(fetches(&world.drain()), 0);
    world.delivery.set_fetching(true, world.now);
    assert_eq!(fetches(&world.drain()), 1, "home again");
    assert!(world.delivery.is_busy());
    world.delivery.fetched(FetchTicket(1), Err(FetchError::Gone), world.now);
    assert!(!world.delivery.is_busy());
    world.delivery.set_fetching(false, world.now);
    world.delivery.arrived(attachment("b", world.now.wall + DAY * 2), world.now);
    world.pass(DAY);
    assert_eq!(fetches(&world.drain()), 1, "nothing waits for ever");
}

#[derive(Clone, Debug)]
enum Step {
    Send { other: bool, urgency: Urgency, topic: bool, ttl: u64 },
    Minimum(Urgency),
    Pass(u64),
    Runs,
    Held,
    Vanishes,
    Outcome(CallOutcome),
    Restart,
}

fn urgency() -> impl Strategy<Value = Urgency> {
    prop_oneof![Just(Urgency::VeryLow), Just(Urgency::Low), Just(Urgency::Normal), Just(Urgency::High)]
}

fn step() -> impl Strategy<Value = Step> {
    let outcome = prop_oneof![
        4 => Just(CallOutcome::Accepted),
        1 => Just(CallOutcome::Refused("no".into()))
    ];
    prop_oneof![
        6 => (any::<bool>(), urgency(), prop::bool::weighted(0.2), 1_u64..100_000)
            .prop_map(|(other, urgency, topic, ttl)| Step::Send { other, urgency, topic, ttl }),
        3 => urgency().prop_map(Step::Minimum),
        4 => prop_oneof![0_u64..20, 0_u64..20_000].prop_map(Step::Pass),
        3 => Just(Step::Runs),
        2 => Just(Step::Held),
        2 => Just(Step::Vanishes),
        5 => outcome.prop_map(Step::Outcome),
        1 => Just(Step::Restart),
    ]
}

/// A message as its sender knows it.
struct Sent {
    id: String,
    lane: RegistrationId,
    urgency: Urgency,
    at: Instant,
    expires: UnixTime,
}

/// Delivery, and what must be true of it whatever happens.
struct Model {
    world: World,
    settings: Settings,
    minimum: Urgency,
    sent: Vec<Sent>,
    seqs: BTreeMap<MessageSeq, Message>,
    /// In the app's hands.
    calls: Vec<(DeliveryTicket, String)>,
    handed: BTreeMap<RegistrationId, usize>,
    asked: bool,
    asked_for: Urgency,
    runs: bool,
    /// It failed: a pause may be under way.
    failed: bool,
}

impl Model {
    fn new() -> Self {
        let urgency = UrgencySettings { hold_at_most: HOUR, ..UrgencySettings::default() };
        let settings = Settings { urgency, ..Settings::default() };
        let mut world = World::with_settings(&settings);
        world.delivery.vanished(&world.app, world.now);
        Self {
            world,
            settings,
            minimum: Urgency::VeryLow,
            sent: Vec::new(),
            seqs: BTreeMap::new(),
            calls: Vec::new(),
            handed: BTreeMap::new(),
            asked: false,
            asked_for: Urgency::VeryLow,
            runs: false,
            failed: false,
        }
    }

    fn step(&mut self, step: Step) {
        let world = &mut self.world;
        match step {
            Step::Send { other, urgency, topic, ttl } => {
                let lane = if other { OTHER_LANE } else { LANE };
                let id = format!("m{}", self.sent.len());
                let expires = world.now.wall + Duration::from_secs(ttl);
                let arrival = Arrival {
                    registration: lane,
                    id: id.as_str().into(),
                    body: ArrivalBody::Bytes(id.as_bytes().into()),
                    expires,
                    topic: topic.then(|| "t".into()),
                    urgency,
                    by_policy: false,
                    from: "background",
                };
                self.sent.push(Sent { id, lane, urgency, at: world.now.boot, expires });
                world.delivery.arrived(arrival, world.now);
            }
            Step::Minimum(minimum) => {
                self.minimum = minimum;
                world.delivery.set_minimum(minimum, world.now);
            }
            Step::Pass(secs) => {
                self.pass(Duration::from_secs(secs));
                return;
            }
            Step::Runs => {
                if !self.runs {
                    self.asked = false;
                    world.delivery.appeared(&world.app, world.now);
                    self.look();
                    self.world.runs();
                }
                (self.runs, self.asked) = (true, false);
            }
            Step::Held => {
                if self.runs && self.calls.is_empty() {
                    world.delivery.unready(&world.app, world.now);
                    self.runs = false;
                }
            }
            Step::Vanishes => {
                world.delivery.vanished(&world.app, world.now);
                self.runs = false;
                self.asked = false;
                for (ticket, _) in std::mem::take(&mut self.calls) {
                    self.failed = true;
                    world.done(ticket, CallOutcome::Vanished);
                }
            }
            Step::Outcome(outcome) => {
                if let Some((ticket, _)) = self.calls.pop() {
                    self.failed |= outcome != CallOutcome::Accepted;
                    world.done(ticket, outcome);
                }
            }
            Step::Restart => {
                let stored = self.seqs.values().map(|message| StoredMessage {
                    seq: message.seq,
                    registration: message.registration,
                    id: Arc::clone(&message.id),
                    size: 1,
                    received: message.received,
                    expires: message.expires,
                    topic: message.topic.clone(),
                    urgency: message.urgency,
                });
                let now = world.now;
                let mut next = World::with_settings(&self.settings);
                next.now = now;
                next.delivery = Delivery::new(&self.settings, self.sent.len() as u64 + 1);
                next.delivery.add(&next.registration(LANE));
                next.delivery.add(&next.registration(OTHER_LANE));
                for message in stored {
                    next.delivery.restore(message, now);
                }
                next.delivery.set_minimum(self.minimum, now);
                next.delivery.vanished(&next.app, now);
                self.world = next;
                (self.asked, self.runs) = (false, false);
                self.calls.clear();
                self.handed.clear();
            }
        }
        self.look();
    }

    fn pass(&mut self, time: Duration) {
        let end = self.world.now.boot + time;
        while let Some(at) = self.world.delivery.poll_timeout().filter(|at| *at <= end) {
            assert!(at >= self.world.now.boot, "a deadline in the past");
            self.world.pass(at.since(self.world.now.boot));
            self.look();
            let next = self.world.delivery.poll_timeout();
            assert!(next.is_none_or(|next| next > at), "a deadline that is not cleared");
        }
        self.world.pass(end.since(self.world.now.boot));
        // The longest pause is 10 min.
        self.failed &= time < Duration::from_secs(700);
        self.look();
    }

    /// Takes what was put out, and checks it.
    fn look(&mut self) {
        for output in self.world.drain() {
            match output {
                Output::Persist(message) => {
                    self.seqs.insert(message.seq, message);
                }
                Output::End(_, seq, ending) => {
                    let message = self.seqs.remove(&seq).expect("what ends was there");
                    if ending == Ending::Expired {
                        assert!(message.expires <= self.world.now.wall);
                    }
                    self.calls.retain(|(_, id)| **id != *message.id);
                }
                Output::LoadBody(seq) => {
                    let body = self.seqs.get(&seq).map(|message| Arc::clone(&message.body));
                    self.world.delivery.body(seq, body, self.world.now);
                    self.look();
                }
                Output::Wake(_, urgency) => {
                    let hurries = self.asked && urgency > self.asked_for;
                    assert!((hurries || !self.asked) && !self.runs, "asked twice, or for nothing");
                    self.asked_for = urgency;
                    let worth = self.is_worth_waking(|message| message.topic.is_some());
                    assert!(worth, "woken for what is to be held: {:?}", self.minimum);
                    self.asked = true;
                }
                Output::Call { ticket, call: Handover::Message { id, .. }, .. } => {
                    assert!(self.runs, "an app that is held still was called");
                    let place = self.sent.iter().position(|sent| *sent.id == *id).expect("it was sent");
                    let last = self.handed.entry(self.sent[place].lane).or_default();
                    assert!(*last <= place, "{id} came after a later message");
                    *last = place;
                    self.calls.push((ticket, id.to_string()));
                }
                _ => {}
            }
        }
        // Neither that nor the opposite: what may wake is not held.
        if !self.asked && !self.runs && !self.failed {
            assert!(!self.is_worth_waking(|_| false), "held, and may wake: {:?}", self.minimum);
        }
        let held = self.world.delivery.held_for(&self.world.app);
        assert!(held == 0 || !self.asked && !self.runs, "held for an app that runs");
    }

    /// A message with a topic may have the age of one that it replaced: `or` decides of it.
    fn is_worth_waking(&self, or: impl Fn(&Message) -> bool) -> bool {
        let (boot, wall) = (self.world.now.boot, self.world.now.wall);
        self.seqs.values().filter(|message| message.expires > wall).any(|message| {
            let sent = self.sent.iter().find(|sent| *sent.id == *message.id).expect("it was sent");
            assert_eq!(sent.expires, message.expires);
            sent.urgency >= self.minimum || boot.since(sent.at) >= HOUR || or(message)
        })
    }
}

proptest! {
    #[test]
    fn nothing_that_may_wake_is_held_and_nothing_else_wakes(steps in prop::collection::vec(step(), 0..80)) {
        let mut model = Model::new();
        for step in steps {
            model.step(step);
        }
        // In the end: whatever has not expired has been handed over, or its app is asked for.
        model.pass(HOUR);
        for _ in 0..200 {
            model.step(Step::Runs);
            model.step(Step::Outcome(CallOutcome::Accepted));
        }
        model.pass(DAY);
        for _ in 0..200 {
            model.step(Step::Outcome(CallOutcome::Accepted));
        }
        model.world.delivery.sweep(model.world.now);
        model.look();
        prop_assert!(model.seqs.is_empty(), "{:?}", model.seqs.keys());
    }
}
