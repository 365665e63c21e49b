use super::*;
use crate::{
    event::{CallOutcome, FetchError, StartOutcome},
    model::Bus,
};

/// One app with one registration, and a clock.
pub(super) struct World {
    pub(super) delivery: Delivery,
    pub(super) now: Now,
    pub(super) app: AppKey,
    pub(super) owner: Owner,
}

const SECOND: Duration = Duration::from_secs(1);
pub(super) const LANE: RegistrationId = RegistrationId(1);
pub(super) const OTHER_LANE: RegistrationId = RegistrationId(2);

impl World {
    fn new() -> Self {
        Self::with_limits(Limits::default())
    }

    fn with_limits(limits: Limits) -> Self {
        Self::with_settings(&Settings { limits, ..Settings::default() })
    }

    pub(super) fn with_settings(settings: &Settings) -> Self {
        let mut world = Self {
            delivery: Delivery::new(settings, 1),
            now: Now { boot: Instant::from_nanos(1), wall: UnixTime::from_secs(1_000_000) },
            app: AppKey::new(Bus::Session(1000), "org.example.App"),
            owner: Owner(":1.5".into()),
        };
        world.delivery.add(&world.registration(LANE));
        world.delivery.add(&world.registration(OTHER_LANE));
        world
    }

    /// Running and thawed.
    fn ready() -> Self {
        let mut world = Self::new();
        world.delivery.appeared(&world.app, world.now);
        world.delivery.ready(&world.app, world.owner.clone(), world.now);
        world.drain();
        world
    }

    pub(super) fn registration(&self, id: RegistrationId) -> Registration {
        Registration {
            id,
            app: self.app.clone(),
            token: format!("token{}", id.0).into(),
            description: "".into(),
            vapid: None,
            version: ConnectorVersion::V2,
            upstream: "main".into(),
            channel: format!("channel{}", id.0).into(),
            endpoint: "https://push.example/x".into(),
            told: true,
        }
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now.boot = self.now.boot + time;
        self.now.wall = self.now.wall + time;
        self.delivery.handle_timeout(self.now);
    }

    fn push(&mut self, id: &str) -> Admission {
        self.push_to(LANE, id, None)
    }

    fn push_to(&mut self, registration: RegistrationId, id: &str, topic: Option<&str>) -> Admission {
        self.push_with(registration, id, topic, Urgency::Normal)
    }

    pub(super) fn push_with(
        &mut self,
        registration: RegistrationId,
        id: &str,
        topic: Option<&str>,
        urgency: Urgency,
    ) -> Admission {
        let arrival = Arrival {
            registration,
            id: id.into(),
            body: ArrivalBody::Bytes(id.as_bytes().into()),
            expires: self.now.wall + SECOND * 1_000_000,
            topic: topic.map(Arc::from),
            urgency,
            by_policy: false,
            from: "background",
        };
        self.delivery.arrived(arrival, self.now)
    }

    pub(super) fn drain(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.delivery.poll_output()).collect()
    }

    /// The calls made since the last look: (ticket, message id).
    pub(super) fn calls(&mut self) -> Vec<(DeliveryTicket, String)> {
        calls(&self.drain())
    }

    pub(super) fn done(&mut self, ticket: DeliveryTicket, outcome: CallOutcome) {
        self.delivery.call_done(ticket, &outcome, self.now);
    }
}

pub(super) fn calls(outputs: &[Output]) -> Vec<(DeliveryTicket, String)> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Call { ticket, call: Handover::Message { id, .. }, .. } => Some((*ticket, id.to_string())),
            Output::Call { ticket, call: Handover::Endpoint { .. }, .. } => Some((*ticket, "endpoint".into())),
            _ => None,
        })
        .collect()
}

pub(super) fn safe(outputs: &[Output]) -> Vec<&str> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Safe(_, id) => Some(&**id),
            _ => None,
        })
        .collect()
}

pub(super) fn ended(outputs: &[Output]) -> Vec<Ending> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::End(_, _, ending) => Some(*ending),
            _ => None,
        })
        .collect()
}

fn refused() -> CallOutcome {
    CallOutcome::Refused("org.example.Error: no".into())
}

#[test]
fn a_message_is_handed_over_at_once_and_safe_when_accepted_or_persisted_whichever_is_first() {
    let mut world = World::ready();
    assert_eq!(world.push("a"), Admission::Queued);
    let outputs = world.drain();
    assert!(matches!(&outputs[0], Output::Persist(message) if &*message.body == b"a"));
    assert_eq!(safe(&outputs), [""; 0], "neither persisted nor accepted");
    let (ticket, _) = calls(&outputs)[0];
    world.done(ticket, CallOutcome::Accepted);
    let outputs = world.drain();
    assert_eq!((safe(&outputs), ended(&outputs)), (vec!["a"], vec![Ending::Accepted]));

    world.push("b");
    let ticket = world.calls()[0].0;
    world.delivery.stored(MessageSeq(2), true, world.now);
    assert_eq!(safe(&world.drain()), ["b"]);
    world.done(ticket, CallOutcome::Accepted);
    assert_eq!(safe(&world.drain()), [""; 0], "told once");
}

#[test]
fn messages_of_a_registration_go_one_at_a_time_and_in_order() {
    let mut world = World::ready();
    for id in ["a", "b", "c"] {
        world.push(id);
    }
    let mut order = Vec::new();
    for _ in 0..3 {
        let calls = world.calls();
        assert_eq!(calls.len(), 1);
        order.push(calls[0].1.clone());
        world.done(calls[0].0, CallOutcome::Accepted);
    }
    assert_eq!(order, ["a", "b", "c"]);
}

#[test]
fn a_refused_message_is_tried_again_before_the_next_and_given_up_with_a_reason() {
    let mut world = World::with_limits(Limits { attempts: 3, ..Limits::default() });
    world.delivery.appeared(&world.app, world.now);
    world.delivery.ready(&world.app, world.owner.clone(), world.now);
    world.push("a");
    world.push("b");
    world.push_to(OTHER_LANE, "other", None);
    let first = world.calls();
    assert_eq!(first.iter().map(|(_, id)| id.as_str()).collect::<Vec<_>>(), ["a", "other"]);
    let mut ticket = first[0].0;
    for _ in 0..2 {
        world.done(ticket, refused());
        assert_eq!(world.calls(), [], "waits");
        world.pass(SECOND);
        let calls = world.calls();
        assert_eq!(calls[0].1, "a");
        ticket = calls[0].0;
    }
    world.done(ticket, refused());
    let outputs = world.drain();
    assert_eq!(ended(&outputs), [Ending::GivenUp]);
    assert!(outputs.iter().any(|o| matches!(o, Output::Note(_, "give-up", reason) if reason.contains("no"))));
    assert_eq!(calls_of(&outputs), ["b"], "what waited behind it goes on");
}

#[test]
fn an_unanswered_call_is_never_repeated_to_the_same_instance_and_delays_no_other_registration() {
    let mut world = World::ready();
    world.push("a");
    let ticket = world.calls()[0].0;
    world.push("b");
    world.push_to(OTHER_LANE, "other", None);
    let calls = world.calls();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0].1, "other");
    world.done(calls[0].0, CallOutcome::Accepted);
    world.drain();
    for _ in 0..3 {
        world.pass(SECOND * 31);
        assert_eq!(world.calls(), [], "the instance has it in hand");
    }
    world.done(ticket, CallOutcome::Accepted);
    let outputs = world.drain();
    assert_eq!(ended(&outputs), [Ending::Accepted], "a late reply counts");
    assert_eq!(calls_of(&outputs), ["b"]);
}

pub(super) fn calls_of(outputs: &[Output]) -> Vec<String> {
    calls(outputs).into_iter().map(|(_, id)| id).collect()
}

#[test]
fn an_app_that_does_not_answer_keeps_itself_awake_for_a_bounded_time() {
    let mut world = World::ready();
    world.push("a");
    assert!(world.drain().contains(&Output::Pending(world.app.clone(), true)));
    world.pass(ANSWER_TIME);
    assert!(world.drain().contains(&Output::Pending(world.app.clone(), false)));
    world.delivery.unready(&world.app, world.now);
    let at = world.delivery.poll_timeout().unwrap();
    world.pass(at.since(world.now.boot));
    assert!(
        world.drain().contains(&Output::Wake(world.app.clone(), Urgency::Normal)),
        "it is woken for another chance to answer"
    );
    world.delivery.ready(&world.app, world.owner.clone(), world.now);
    assert_eq!(world.calls(), [], "but not called again");
}

#[test]
fn a_crash_in_the_middle_brings_the_message_again_to_the_next_instance() {
    let mut world = World::ready();
    world.push("a");
    let ticket = world.calls()[0].0;
    world.delivery.vanished(&world.app, world.now);
    world.done(ticket, CallOutcome::Vanished);
    assert!(
        !world.drain().contains(&Output::Wake(world.app.clone(), Urgency::Normal)),
        "not at once: it may crash at every start"
    );
    world.pass(SECOND);
    assert!(world.drain().contains(&Output::Wake(world.app.clone(), Urgency::Normal)));
    world.delivery.appeared(&world.app, world.now);
    world.delivery.ready(&world.app, Owner(":1.6".into()), world.now);
    assert_eq!(world.calls()[0].1, "a");
}

#[test]
fn nothing_is_asked_of_an_app_before_its_bus_has_spoken() {
    let mut world = World::new();
    world.push("a");
    assert!(!world.drain().iter().any(|output| matches!(output, Output::Wake(..))));
    world.delivery.vanished(&world.app, world.now);
    assert!(world.drain().contains(&Output::Wake(world.app.clone(), Urgency::Normal)));
}

#[test]
fn an_app_that_cannot_be_started_gets_its_messages_when_it_comes_by_itself() {
    let mut world = World::new();
    world.delivery.vanished(&world.app, world.now);
    world.push("a");
    world.drain();
    world.delivery.start_failed(&world.app, &StartOutcome::NotActivatable, world.now);
    let outputs = world.drain();
    assert!(outputs.iter().any(|output| matches!(output, Output::Note(_, "wait", _))));
    assert_eq!(world.delivery.poll_timeout(), None, "no timer for what only the user can do");
    world.delivery.appeared(&world.app, world.now);
    world.drain();
    world.delivery.ready(&world.app, world.owner.clone(), world.now);
    assert_eq!(world.calls()[0].1, "a");
}

#[test]
fn a_start_that_fails_is_tried_again_with_growing_pauses_and_given_up() {
    let mut world = World::with_limits(Limits { attempts: 3, ..Limits::default() });
    world.delivery.vanished(&world.app, world.now);
    world.push("a");
    let mut pauses = Vec::new();
    let mut endings = Vec::new();
    while endings.is_empty() && pauses.len() < 10 {
        assert!(world.drain().contains(&Output::Wake(world.app.clone(), Urgency::Normal)));
        world.delivery.start_failed(&world.app, &StartOutcome::Failed("exit code 1".into()), world.now);
        endings = ended(&world.drain());
        if let Some(at) = world.delivery.poll_timeout() {
            pauses.push(at.since(world.now.boot));
            world.pass(at.since(world.now.boot));
        }
    }
    assert_eq!(endings, [Ending::GivenUp]);
    assert!(pauses.is_sorted() && pauses[0] < pauses[1], "{pauses:?}");
}

#[test]
fn duplicates_are_known_while_they_wait_and_after_they_ended() {
    let mut world = World::ready();
    world.push("a");
    let ticket = world.calls()[0].0;
    assert_eq!(world.push("a"), Admission::Duplicate);
    assert_eq!(safe(&world.drain()), [""; 0], "not safe yet: no acknowledgement");
    world.done(ticket, CallOutcome::Accepted);
    assert_eq!(safe(&world.drain()), ["a", "a"], "one for each time it came");
    assert_eq!(world.push("a"), Admission::Duplicate);
    let outputs = world.drain();
    assert_eq!((safe(&outputs), calls(&outputs).len()), (vec!["a"], 0));
}

#[test]
fn an_earlier_life_is_remembered() {
    let mut world = World::new();
    world.delivery.restore_seen(LANE, "old");
    let waiting = StoredMessage {
        seq: MessageSeq(1),
        registration: LANE,
        id: "waiting".into(),
        size: 7,
        received: world.now.wall,
        expires: world.now.wall + SECOND,
        topic: None,
        urgency: Urgency::Normal,
    };
    world.delivery.restore(waiting, world.now);
    assert_eq!(world.push("old"), Admission::Duplicate);
    assert_eq!(world.push("waiting"), Admission::Duplicate);
    assert_eq!(safe(&world.drain()), ["old", "waiting"]);
    world.delivery.appeared(&world.app, world.now);
    world.delivery.ready(&world.app, world.owner.clone(), world.now);
    assert!(world.drain().contains(&Output::LoadBody(MessageSeq(1))));
    world.delivery.body(MessageSeq(1), Some(b"waiting".as_slice().into()), world.now);
    assert_eq!(world.calls()[0].1, "waiting");
}

#[test]
fn a_topic_replaces_the_waiting_message_but_not_the_one_in_the_apps_hands() {
    let mut world = World::ready();
    world.push_to(LANE, "a", Some("t"));
    let ticket = world.calls()[0].0;
    world.push_to(LANE, "b", Some("t"));
    world.push_to(LANE, "c", Some("t"));
    assert_eq!(ended(&world.drain()), [Ending::Replaced]);
    world.done(ticket, CallOutcome::Accepted);
    assert_eq!(world.calls()[0].1, "c");
}

#[test]
fn what_has_expired_is_not_handed_over() {
    let mut world = World::new();
    world.push("a");
    world.now.wall = world.now.wall + SECOND * 1_000_000;
    world.push("b");
    world.drain();
    world.delivery.appeared(&world.app, world.now);
    world.delivery.ready(&world.app, world.owner.clone(), world.now);
    let outputs = world.drain();
    assert_eq!((ended(&outputs), calls_of(&outputs)), (vec![Ending::Expired], vec!["b".to_owned()]));
}

#[test]
fn a_full_queue_drops_the_oldest_and_says_so() {
    let mut world = World::with_limits(Limits { messages_per_app: 3, ..Limits::default() });
    for id in ["a", "b", "c", "d"] {
        assert_eq!(world.push(id), Admission::Queued);
    }
    let outputs = world.drain();
    assert_eq!(ended(&outputs), [Ending::Overflowed]);
    assert_eq!(safe(&outputs), ["a"], "the server must not send it for ever");
    assert!(outputs.iter().any(|output| matches!(output, Output::Note(_, "drop", _))));
    assert_eq!(world.delivery.waiting_for(&world.app), 3);
}

#[test]
fn empty_oversized_and_undecodable_messages_are_dropped_with_a_reason_and_acknowledged() {
    let mut world = World::ready();
    let bodies = [
        ArrivalBody::Bytes(Arc::new([])),
        ArrivalBody::Bytes(vec![0; MESSAGE_MAX + 1].into()),
        ArrivalBody::Undecodable("not base64url".into()),
        ArrivalBody::Attachment { url: "https://x/".into(), size: Some(5000) },
    ];
    for (n, body) in bodies.into_iter().enumerate() {
        let arrival = Arrival {
            registration: LANE,
            id: n.to_string().into(),
            body,
            expires: world.now.wall + SECOND,
            topic: None,
            urgency: Urgency::Normal,
            by_policy: false,
            from: "background",
        };
        assert_eq!(world.delivery.arrived(arrival, world.now), Admission::Unusable);
        let outputs = world.drain();
        assert_eq!(safe(&outputs).len(), 1);
        assert!(outputs.iter().any(|output| matches!(output, Output::Note(_, "drop", _))));
    }
}

#[test]
fn an_attachment_keeps_its_place_and_is_not_safe_before_it_is_here() {
    let mut world = World::ready();
    let arrival = Arrival {
        registration: LANE,
        id: "a".into(),
        body: ArrivalBody::Attachment { url: "https://x/a".into(), size: None },
        expires: world.now.wall + SECOND * 1000,
        topic: None,
        urgency: Urgency::Normal,
        by_policy: false,
        from: "background",
    };
    world.delivery.arrived(arrival, world.now);
    world.push("b");
    let outputs = world.drain();
    assert_eq!((calls(&outputs).len(), safe(&outputs).len()), (0, 0));
    let ticket = |outputs: &[Output]| {
        outputs.iter().find_map(|output| match output {
            Output::Fetch { ticket, .. } => Some(*ticket),
            _ => None,
        })
    };
    world.delivery.fetched(ticket(&outputs).unwrap(), Err(FetchError::Failed("down".into())), world.now);
    world.pass(SECOND * 5);
    let again = ticket(&world.drain()).unwrap();
    world.delivery.fetched(again, Ok(b"long text".as_slice().into()), world.now);
    let outputs = world.drain();
    assert!(outputs.iter().any(|output| matches!(output, Output::Persist(m) if &*m.body == b"long text")));
    assert_eq!(calls_of(&outputs), ["a"]);
}

#[test]
fn an_attachment_that_is_gone_is_given_up() {
    let mut world = World::ready();
    let arrival = Arrival {
        registration: LANE,
        id: "a".into(),
        body: ArrivalBody::Attachment { url: "https://x/a".into(), size: None },
        expires: world.now.wall + SECOND * 1000,
        topic: None,
        urgency: Urgency::Normal,
        by_policy: false,
        from: "background",
    };
    world.delivery.arrived(arrival, world.now);
    world.drain();
    world.delivery.fetched(FetchTicket(1), Err(FetchError::Gone), world.now);
    let outputs = world.drain();
    assert_eq!((ended(&outputs), safe(&outputs)), (vec![Ending::GivenUp], vec!["a"]));
}

#[test]
fn the_new_endpoint_goes_out_before_the_messages() {
    let mut world = World::ready();
    world.delivery.endpoint_due(LANE, &"https://push.example/new".into(), world.now);
    world.push("a");
    let calls = world.calls();
    assert_eq!(calls[0].1, "endpoint");
    world.done(calls[0].0, CallOutcome::Accepted);
    let outputs = world.drain();
    assert!(outputs.contains(&Output::EndpointTold(LANE, "https://push.example/new".into())));
    assert_eq!(calls_of(&outputs), ["a"]);
}

#[test]
fn a_full_disk_loses_nothing_and_turns_away_what_memory_cannot_hold() {
    let mut world = World::new();
    let body: Arc<[u8]> = vec![1; MESSAGE_MAX].into();
    let mut queued = 0;
    for n in 0..2000 {
        let arrival = Arrival {
            registration: LANE,
            id: n.to_string().into(),
            body: ArrivalBody::Bytes(Arc::clone(&body)),
            expires: world.now.wall + SECOND * 1000,
            topic: None,
            urgency: Urgency::Normal,
            by_policy: false,
            from: "background",
        };
        match world.delivery.arrived(arrival, world.now) {
            Admission::Queued => {
                queued += 1;
                world.delivery.stored(MessageSeq(queued), false, world.now);
            }
            admission => {
                assert_eq!(admission, Admission::NoRoom);
                break;
            }
        }
    }
    assert_eq!(queued as usize * MESSAGE_MAX, UNSTORED_BUDGET);
    assert_eq!(safe(&world.drain()), [""; 0], "nothing is acknowledged that is not durable");
    world.pass(STORE_RETRY);
    let again = world.drain().into_iter().filter(|output| matches!(output, Output::Persist(_))).count();
    assert_eq!(again as u64, queued, "all are tried again");
    for seq in 1..=queued {
        world.delivery.stored(MessageSeq(seq), true, world.now);
    }
    assert_eq!(safe(&world.drain()).len() as u64, queued);
    assert!(!world.delivery.store_is_failing());
}

#[test]
fn bodies_that_are_durable_do_not_fill_the_memory() {
    let mut world = World::new();
    let body: Arc<[u8]> = vec![1; MESSAGE_MAX].into();
    for n in 1..=1000 {
        let arrival = Arrival {
            registration: LANE,
            id: n.to_string().into(),
            body: ArrivalBody::Bytes(Arc::clone(&body)),
            expires: world.now.wall + SECOND * 1000,
            topic: None,
            urgency: Urgency::Normal,
            by_policy: false,
            from: "background",
        };
        world.delivery.arrived(arrival, world.now);
        world.delivery.stored(MessageSeq(n), true, world.now);
        world.drain();
        assert!(world.delivery.inline_bytes <= INLINE_BUDGET + MESSAGE_MAX);
    }
    assert_eq!(world.delivery.waiting(), 1000);
}

#[test]
fn a_registration_that_goes_takes_its_messages_with_it() {
    let mut world = World::ready();
    world.push("a");
    world.push("b");
    world.drain();
    world.delivery.remove(LANE, world.now);
    let outputs = world.drain();
    assert_eq!(ended(&outputs), [Ending::Unregistered, Ending::Unregistered]);
    assert_eq!(safe(&outputs), ["a", "b"]);
    assert!(outputs.contains(&Output::Pending(world.app.clone(), false)));
    assert_eq!((world.delivery.waiting(), world.delivery.inline_bytes), (0, 0));
    assert_eq!(world.delivery.poll_timeout(), None);
}

#[test]
fn a_bus_that_goes_away_in_the_middle_costs_no_try_and_no_message() {
    let mut world = World::ready();
    world.push("a");
    let ticket = world.calls()[0].0;
    world.delivery.bus_down(world.app.bus, world.now);
    world.done(ticket, CallOutcome::NotSent("gone".into()));
    assert_eq!(world.delivery.poll_timeout(), None);
    world.delivery.appeared(&world.app, world.now);
    world.delivery.ready(&world.app, world.owner.clone(), world.now);
    assert_eq!(world.calls()[0].1, "a");
}

#[test]
fn a_call_not_taken_out_yet_is_called_off_when_the_app_is_about_to_be_frozen() {
    let mut world = World::ready();
    world.push("a");
    world.delivery.unready(&world.app, world.now);
    let outputs = world.drain();
    assert_eq!(calls(&outputs), []);
    assert!(
        outputs.contains(&Output::Wake(world.app.clone(), Urgency::Normal)),
        "it waits for the app to be ready again"
    );
    world.delivery.ready(&world.app, world.owner.clone(), world.now);
    assert_eq!(world.calls()[0].1, "a");
}
