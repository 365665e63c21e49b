//! The rules of push.md §3b, one test each, against a server played by the test.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    super::{IncomingBody, IncomingMessage},
    cursor::STORING,
    *,
};
use crate::{event::LinkError, model::Urgency};

const SECOND: Duration = Duration::from_secs(1);
const BASE: &str = "https://ntfy.example/";

struct World {
    session: Session,
    now: Now,
    seen: Vec<Output>,
}

impl World {
    fn new(cursor: Option<&str>, channels: Vec<Channel>) -> Self {
        let now = Now { boot: Instant::from_nanos(5_000_000_000_000), ..Now::default() };
        let session = Session::new(BASE.into(), false, cursor.map(Arc::from), channels, [7; 32], LinkIds::new(0), now);
        let mut world = Self { session, now, seen: Vec::new() };
        world.drain();
        world
    }

    fn drain(&mut self) {
        while let Some(output) = self.session.poll_output() {
            self.seen.push(output);
        }
    }

    /// Everything put out since the last call.
    fn take(&mut self) -> Vec<Output> {
        self.drain();
        std::mem::take(&mut self.seen)
    }

    fn link(&mut self, link: LinkId, event: LinkEvent) {
        self.session.handle_link(link, event, self.now);
        self.drain();
    }

    fn say(&mut self, link: LinkId, event: Value) {
        self.link(link, LinkEvent::Text(event.to_string()));
    }

    /// The server's `open`, at the second its clock shows.
    fn open(&mut self, link: LinkId) {
        self.link(link, LinkEvent::Open);
        let time = self.secs();
        self.say(link, json!({"id": "open", "time": time, "event": "open", "topic": "ignored"}));
    }

    fn secs(&self) -> u64 {
        self.now.boot.as_nanos() / 1_000_000_000
    }

    fn message(&mut self, link: LinkId, topic: &str, id: &str) {
        let time = self.secs();
        self.say(link, json!({"id": id, "time": time, "event": "message", "topic": topic, "message": "hi"}));
    }

    fn register(&mut self, n: u64) {
        self.session.register(RegistrationId(n), self.now);
        self.drain();
    }

    fn unregister(&mut self, n: u64) {
        self.session.unregister(RegistrationId(n), self.now);
        self.drain();
    }

    fn safe(&mut self, id: &str) {
        self.session.safe(RegistrationId(0), &id.into(), self.now);
        self.drain();
    }

    /// Lets time pass, firing every deadline on its way.
    fn pass(&mut self, time: Duration) {
        let end = self.now.boot + time;
        while let Some(at) = self.session.poll_timeout().filter(|at| *at <= end) {
            assert!(at >= self.now.boot, "a deadline in the past");
            self.now.boot = at;
            self.session.handle_timeout(self.now);
            self.drain();
            assert!(self.session.poll_timeout().is_none_or(|next| next > at), "a deadline that is not cleared");
        }
        self.now.boot = end;
    }

    /// Lets time pass with the server's pings.
    fn pass_alive(&mut self, link: LinkId, time: Duration) {
        let end = self.now.boot + time;
        while self.now.boot + 45 * SECOND <= end {
            self.pass(45 * SECOND);
            self.link(link, LinkEvent::Ping);
        }
        self.pass(end.since(self.now.boot));
    }

    /// Lets time pass until a link is asked for: its id and path.
    fn connect(&mut self) -> (LinkId, String) {
        for _ in 0..1000 {
            let asked = self.seen.iter().rposition(|output| matches!(output, Output::Connect { .. }));
            if let Some(at) = asked {
                let Output::Connect { link, path, .. } = self.seen.remove(at) else { unreachable!() };
                return (link, path);
            }
            let at = self.session.poll_timeout().expect("nothing is due");
            self.pass(at.since(self.now.boot));
        }
        panic!("no link is asked for");
    }

    /// Lets time pass until there is a link that lacks nothing.
    fn online(&mut self) -> LinkId {
        let (link, _) = self.connect();
        self.open(link);
        match self.session.look_at() {
            Some(_) => self.look_again(link),
            None => link,
        }
    }

    /// The second look, up to the end of the first link.
    fn look_again(&mut self, first: LinkId) -> LinkId {
        let (link, _) = self.connect();
        self.open(link);
        self.end_overlap(first);
        assert_eq!(self.session.look_at(), None, "still lacking something");
        link
    }

    fn end_overlap(&mut self, old: LinkId) {
        self.pass(OVERLAP);
        self.link(old, LinkEvent::Pong);
        let closed = [Output::Ping(old), Output::Close(old)];
        assert!(self.seen.ends_with(&closed), "{:?}", self.seen);
    }

    fn state(&self) -> LinkState {
        self.session.standing().state
    }
}

fn channel(n: u64) -> Channel {
    Channel {
        registration: RegistrationId(n),
        channel: format!("up{n}").into(),
        vapid: None,
        endpoint: format!("{BASE}up{n}?up=1").into(),
    }
}

fn refusal(status: u16) -> LinkEvent {
    LinkEvent::Failed(LinkError::Http { status, body: String::new(), retry_after: None })
}

fn failures(outputs: &[Output]) -> Vec<(u64, FailureReason)> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::RegisterFailed { registration, reason, .. } => Some((registration.0, *reason)),
            _ => None,
        })
        .collect()
}

fn registered(outputs: &[Output]) -> Vec<(u64, &str, &str)> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Registered { registration, channel, endpoint } => Some((registration.0, &**channel, &**endpoint)),
            _ => None,
        })
        .collect()
}

fn messages(outputs: &[Output]) -> Vec<&str> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Message(message) => Some(&*message.id),
            _ => None,
        })
        .collect()
}

fn connects(outputs: &[Output]) -> usize {
    outputs.iter().filter(|output| matches!(output, Output::Connect { .. })).count()
}

#[test]
fn without_registrations_nothing_happens_and_nothing_is_due() {
    let mut world = World::new(Some("abc"), vec![]);
    world.session.handle_network(world.now);
    assert_eq!(world.take(), []);
    assert_eq!(world.session.poll_timeout(), None);
}

#[test]
fn a_registration_is_made_when_the_server_says_open() {
    let mut world = World::new(None, vec![]);
    world.register(1);
    let (link, path) = world.connect();
    let topic = path.strip_suffix("/ws?since=all").unwrap().to_owned();
    assert!(topic.len() == 34 && topic.starts_with("up") && wire::is_topic(&topic), "{topic}");
    world.link(link, LinkEvent::Open);
    assert_eq!(registered(&world.take()), []);
    world.open(link);
    let outputs = world.take();
    assert_eq!(registered(&outputs), [(1, &*topic, &*format!("{BASE}{topic}?up=1"))]);
    assert_eq!(world.state(), LinkState::Online);
    world.unregister(1);
    assert_eq!(world.take(), [Output::Close(link), Output::StateChanged(LinkState::Idle)]);
    assert_eq!(world.session.poll_timeout(), None);
}

#[test]
fn where_nothing_else_works_topics_have_ntfys_own_form() {
    let now = Now::default();
    let mut session = Session::new("https://ntfy.sh/".into(), false, None, vec![], [1; 32], LinkIds::new(0), now);
    session.register(RegistrationId(1), now);
    let topic = session.names.keys().next().unwrap();
    assert!(topic.len() == 14 && topic.starts_with("up") && wire::is_topic(topic), "{topic}");
}

#[test]
fn all_topics_share_one_link_from_the_cursor_on() {
    let mut world = World::new(Some("MCUKyeAIO0k7"), vec![channel(1), channel(2), channel(3)]);
    let (_, path) = world.connect();
    assert_eq!(path, "up1,up2,up3/ws?since=MCUKyeAIO0k7");
}

#[test]
fn stored_values_that_would_break_the_url_are_not_used() {
    let bad = Channel { channel: "a/b?c".into(), ..channel(2) };
    let mut world = World::new(Some("x&y"), vec![channel(1), bad]);
    assert!(world.seen.iter().any(|o| matches!(o, Output::Lost { registration: RegistrationId(2), .. })));
    assert_eq!(world.connect().1, "up1/ws?since=all");
}

#[test]
fn a_changed_server_address_gives_every_app_its_new_endpoint() {
    let mut world =
        World::new(None, vec![Channel { endpoint: "https://old/up1?up=1".into(), ..channel(1) }, channel(2)]);
    world.online();
    assert_eq!(registered(&world.take()), [(1, "up1", &*format!("{BASE}up1?up=1"))]);
}

#[test]
fn many_registrations_share_one_reconnect() {
    let mut world = World::new(None, vec![channel(1000)]);
    world.online();
    world.take();
    for n in 0..100 {
        world.register(n);
        world.pass(Duration::from_millis(2));
    }
    let (link, path) = world.connect();
    assert_eq!(connects(&world.take()), 0);
    world.open(link);
    assert_eq!(registered(&world.take()).len(), 100);
    assert_eq!(path.split('/').next().unwrap().split(',').count(), 101);
}

#[test]
fn a_drip_of_registrations_waits_half_a_second_at_most() {
    let mut world = World::new(None, vec![channel(1000)]);
    world.online();
    let start = world.now.boot;
    for n in 0.. {
        world.take();
        world.register(n);
        world.pass(DEBOUNCE / 2);
        if connects(&world.seen) > 0 {
            break;
        }
    }
    assert!(world.now.boot.since(start) <= DEBOUNCE_LIMIT + DEBOUNCE);
}

#[test]
fn apps_registering_one_by_one_do_not_eat_the_request_budget() {
    let mut world = World::new(None, vec![channel(1000)]);
    world.online();
    let mut attempts = 0;
    for n in 0..120 {
        world.register(n);
        world.pass(SECOND);
        for output in world.take() {
            if let Output::Connect { link, .. } = output {
                attempts += 1;
                world.open(link);
            }
            assert_eq!(failures(&world.seen), []);
        }
    }
    // ntfy gives 60 at once and one per 5 s.
    assert!((20..40).contains(&attempts), "{attempts} attempts in two minutes");
}

#[test]
fn the_old_link_ends_only_when_the_new_one_is_subscribed() {
    let mut world = World::new(None, vec![channel(1)]);
    let old = world.online();
    world.take();
    world.register(2);
    let (new, _) = world.connect();
    world.link(new, LinkEvent::Open);
    world.message(old, "up1", "m1");
    assert_eq!(messages(&world.take()), ["m1"]);
    world.open(new);
    world.message(old, "up1", "m2");
    assert_eq!(messages(&world.take()), ["m2"], "it was on its way");
    // What came over both comes once.
    world.safe("m1");
    world.message(new, "up1", "m1");
    assert_eq!(messages(&world.take()), [] as [&str; 0]);
    world.end_overlap(old);
    world.take();
    world.message(old, "up1", "m3");
    world.pass(STORING);
    assert_eq!(world.take(), []);
}

#[test]
fn a_link_in_no_others_place_is_replaced_once_when_all_is_stored() {
    let mut world = World::new(Some("m0"), vec![channel(1)]);
    let (first, path) = world.connect();
    world.open(first);
    world.pass(STORING - Duration::from_millis(1));
    assert_eq!(connects(&world.take()), 0);
    let (second, again) = world.connect();
    assert_eq!(again, path);
    world.open(second);
    world.message(second, "up1", "m1");
    world.end_overlap(first);
    assert_eq!(messages(&world.take()), ["m1"]);
    world.pass_alive(second, 1000 * SECOND);
    assert_eq!(world.take(), []);
}

#[test]
fn for_endpoints_that_nobody_knows_there_is_no_second_look() {
    let mut world = World::new(None, vec![]);
    world.register(1);
    let (link, _) = world.connect();
    world.open(link);
    world.pass_alive(link, 100 * SECOND);
    assert_eq!(connects(&world.take()), 0);
}

#[test]
fn a_long_replay_puts_the_second_look_off() {
    let mut world = World::new(None, vec![channel(1)]);
    let (link, _) = world.connect();
    world.open(link);
    for n in 0..10 {
        world.pass(SECOND);
        let time = world.secs() - 1000;
        world.say(link, json!({"id": n.to_string(), "time": time, "event": "message", "topic": "up1"}));
    }
    world.pass(STORING - SECOND);
    assert_eq!(connects(&world.take()), 0);
    world.pass(SECOND);
    assert_eq!(connects(&world.take()), 1);
}

#[test]
fn a_new_list_soon_after_a_gap_does_not_close_it() {
    let mut world = World::new(None, vec![channel(1)]);
    let (first, _) = world.connect();
    world.open(first);
    let opened = world.now.boot;
    world.register(2);
    let (second, _) = world.connect();
    world.open(second);
    world.end_overlap(first);
    let third = world.look_again(second);
    assert_eq!(world.now.boot.since(opened), STORING + OVERLAP);
    world.pass_alive(third, 100 * SECOND);
    assert_eq!(connects(&world.take()), 0);
}

#[test]
fn an_old_link_that_does_not_answer_proves_nothing() {
    let mut world = World::new(None, vec![channel(1)]);
    let old = world.online();
    world.session.handle_network(world.now);
    world.message(old, "up1", "m0");
    world.register(2);
    let (new, _) = world.connect();
    world.open(new);
    world.pass(OVERLAP);
    assert_eq!(world.take().last(), Some(&Output::Ping(old)));
    // The answer to the ping of before.
    world.link(old, LinkEvent::Pong);
    assert_eq!(world.take(), []);
    world.pass(PROOF_TIMEOUT);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(old)));
    assert_eq!(connects(&outputs), 1, "looks again");
}

#[test]
fn the_cursor_stays_before_a_gap_that_is_not_closed() {
    let mut world = World::new(Some("m0"), vec![channel(1)]);
    let (link, _) = world.connect();
    world.open(link);
    world.message(link, "up1", "m1");
    world.safe("m1");
    for _ in 0..20 {
        world.pass_alive(link, 45 * SECOND);
        if let Some(next) = world.session.next.as_ref().map(|next| next.id) {
            world.link(next, refusal(503));
        }
    }
    assert!(!world.take().iter().any(|output| matches!(output, Output::Remember { .. })));
    world.session.handle_network(world.now);
    world.link(link, LinkEvent::Pong);
    let again = world.look_again(link);
    world.message(again, "up1", "m1");
    world.pass_alive(again, 200 * SECOND);
    assert_eq!(world.take().last(), Some(&Output::Remember { key: "cursor", value: "m1".into() }));
}

#[test]
fn when_the_new_link_fails_the_old_one_stays() {
    let mut world = World::new(None, vec![channel(1)]);
    let old = world.online();
    world.take();
    world.register(2);
    let (new, _) = world.connect();
    world.link(new, refusal(503));
    assert_eq!(world.state(), LinkState::Online);
    world.message(old, "up1", "m1");
    assert_eq!(messages(&world.take()), ["m1"]);
    let (new, path) = world.connect();
    assert!(path.contains(','));
    world.open(new);
    assert_eq!(registered(&world.take()).len(), 1);
}

#[test]
fn when_the_old_link_breaks_meanwhile_the_new_one_goes_on() {
    let mut world = World::new(None, vec![channel(1)]);
    let old = world.online();
    world.register(2);
    let (new, _) = world.connect();
    world.link(old, LinkEvent::Closed { code: None, reason: String::new() });
    assert_eq!(world.state(), LinkState::Connecting);
    world.open(new);
    let outputs = world.take();
    assert_eq!(connects(&outputs), 0);
    assert_eq!(registered(&outputs).len(), 1);
}

#[test]
fn a_registration_not_made_in_time_is_a_network_failure() {
    let mut world = World::new(None, vec![channel(1)]);
    world.connect();
    world.register(2);
    world.pass(REGISTER_TIMEOUT);
    assert_eq!(failures(&world.take()), [(2, FailureReason::Network)]);
    assert_eq!(world.session.standing().registrations, 1);
}

#[test]
fn topics_given_up_leave_with_the_next_link_or_after_a_while() {
    let mut world = World::new(None, vec![channel(1), channel(2)]);
    let old = world.online();
    world.take();
    world.unregister(2);
    world.message(old, "up2", "m1");
    assert_eq!(world.take(), []);
    world.pass_alive(old, SURPLUS_KEPT - 50 * SECOND);
    assert_eq!(connects(&world.take()), 0);
    world.pass_alive(old, 100 * SECOND);
    let (new, path) = world.connect();
    assert!(path.starts_with("up1/ws"));
    world.open(new);
    world.end_overlap(old);
    world.take();
    world.pass_alive(new, 2 * SURPLUS_KEPT);
    assert_eq!(connects(&world.take()), 0);
}

#[test]
fn the_cursor_follows_what_is_safe_and_settled() {
    let mut world = World::new(None, vec![channel(1)]);
    let link = world.online();
    world.pass_alive(link, 90 * SECOND);
    world.take();
    for id in ["m1", "m2"] {
        world.message(link, "up1", id);
    }
    world.safe("m2");
    world.pass_alive(link, 90 * SECOND);
    assert_eq!(world.take().iter().filter(|o| matches!(o, Output::Remember { .. })).count(), 0, "m1 is not safe");
    world.safe("m1");
    assert_eq!(world.take().last(), Some(&Output::Remember { key: "cursor", value: "m2".into() }));
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    assert!(world.connect().1.ends_with("since=m2"));
}

#[test]
fn unregistering_frees_the_cursor() {
    let mut world = World::new(None, vec![channel(1), channel(2)]);
    let link = world.online();
    world.pass_alive(link, 90 * SECOND);
    world.message(link, "up2", "m1");
    world.pass_alive(link, 90 * SECOND);
    world.take();
    world.unregister(2);
    assert_eq!(world.take(), [Output::Remember { key: "cursor", value: "m1".into() }]);
}

#[test]
fn a_message_that_comes_again_is_handed_on_while_it_is_not_safe() {
    let mut world = World::new(None, vec![channel(1)]);
    let link = world.online();
    world.take();
    world.message(link, "up1", "m1");
    world.message(link, "up1", "m1");
    world.safe("m1");
    world.message(link, "up1", "m1");
    assert_eq!(messages(&world.take()), ["m1", "m1"]);
}

#[test]
fn messages_carry_what_the_server_says() {
    let mut world = World::new(None, vec![channel(1)]);
    let link = world.online();
    world.take();
    let event = json!({"id": "m1", "time": 1, "expires": 5, "event": "message", "topic": "up1", "message": "AP/I",
        "encoding": "base64", "priority": 5, "title": "x", "tags": ["y"]});
    world.say(link, event);
    assert_eq!(
        world.take(),
        [Output::Message(IncomingMessage {
            registration: RegistrationId(1),
            id: "m1".into(),
            body: IncomingBody::Bytes([0, 255, 200][..].into()),
            expires: None,
            topic: None,
            urgency: Some(Urgency::High),
        })]
    );
    for event in ["keepalive", "poll_request", "message_clear"] {
        world.say(link, json!({"id": "k", "time": 1, "event": event, "topic": "up1"}));
    }
    assert_eq!(world.take(), []);
}

#[test]
fn a_429_waits_a_minute_or_as_long_as_the_server_says() {
    for (event, wait) in [
        (refusal(429), 60),
        (
            LinkEvent::Failed(LinkError::Http {
                status: 429,
                body: String::new(),
                retry_after: Some(Duration::from_secs(300)),
            }),
            300,
        ),
        (LinkEvent::Text(json!({"code": 42901, "http": 429, "error": "limit reached"}).to_string()), 60),
    ] {
        let mut world = World::new(None, vec![channel(1)]);
        let (link, _) = world.connect();
        world.link(link, event);
        world.take();
        world.register(2);
        world.session.handle_network(world.now);
        world.pass((wait - 1) * SECOND);
        assert_eq!(connects(&world.take()), 0, "{wait} s");
        world.connect();
    }
}

#[test]
fn refused_credentials_are_told_to_the_app_and_to_the_user() {
    for event in [
        refusal(401),
        refusal(403),
        LinkEvent::Text(json!({"code": 40301, "http": 403, "error": "forbidden"}).to_string()),
    ] {
        let mut world = World::new(None, vec![]);
        world.register(1);
        let (link, _) = world.connect();
        world.link(link, event);
        assert_eq!(failures(&world.take()), [(1, FailureReason::ActionRequired)]);
        assert!(world.session.standing().trouble.unwrap().contains("credentials"));
    }
}

#[test]
fn two_refusals_without_a_word_are_trouble_and_one_is_not() {
    let mut world = World::new(None, vec![]);
    world.register(1);
    let start = world.now.boot;
    let (link, _) = world.connect();
    world.link(link, refusal(200));
    assert_eq!(world.session.standing().trouble, None);
    assert_eq!(failures(&world.take()), []);
    let (link, _) = world.connect();
    assert!((WORDLESS_REFUSAL..REGISTER_TIMEOUT).contains(&world.now.boot.since(start)));
    world.link(link, refusal(200));
    assert_eq!(failures(&world.take()), [(1, FailureReason::ActionRequired)]);
    assert!(world.session.standing().trouble.unwrap().contains("credentials"));
    world.pass(TROUBLE_HOLDS);
    world.register(2);
    world.online();
    assert_eq!(world.session.standing().trouble, None);
}

#[test]
fn existing_registrations_outlive_a_refusal_and_it_is_tried_slowly() {
    let mut world = World::new(None, vec![channel(1)]);
    for _ in 0..5 {
        let (link, _) = world.connect();
        world.link(link, refusal(401));
        let wait = world.session.standing().retry_at.unwrap().since(world.now.boot);
        assert!(wait >= super::super::backoff::CEILING / 2, "{wait:?}");
    }
    assert_eq!(world.session.standing().registrations, 1);
    world.online();
}

#[test]
fn silence_ends_a_link_and_server_pings_keep_it() {
    let mut world = World::new(None, vec![channel(1)]);
    let link = world.online();
    world.take();
    world.pass_alive(link, 1000 * SECOND);
    assert_eq!(world.take(), []);
    world.pass(SILENCE);
    assert!(world.take().contains(&Output::Close(link)));
}

#[test]
fn a_returning_network_proves_the_link_within_ten_seconds() {
    let mut world = World::new(None, vec![channel(1)]);
    let link = world.online();
    world.take();
    world.session.handle_network(world.now);
    assert_eq!(world.take(), [Output::Ping(link)]);
    world.pass(PROOF_TIMEOUT);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)));
    assert_eq!(connects(&outputs), 1, "at once");
}

#[test]
fn a_link_that_ends_while_it_is_in_doubt_is_made_anew_at_once() {
    let mut world = World::new(None, vec![channel(1)]);
    let link = world.online();
    world.session.handle_network(world.now);
    world.take();
    world.link(link, LinkEvent::Failed(LinkError::Io("reset".into())));
    let outputs = world.take();
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })), "{outputs:?}");
}

#[test]
fn an_attempt_that_was_young_when_the_network_changed_is_soon_made_anew() {
    let mut world = World::new(None, vec![channel(1)]);
    let (link, _) = world.connect();
    world.pass(SECOND);
    world.session.handle_network(world.now);
    assert_eq!(connects(&world.take()), 0);
    world.pass(SECOND);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)), "{outputs:?}");
    assert_eq!(connects(&outputs), 1);
}

#[test]
fn a_link_in_doubt_is_challenged_and_keeps_its_place_if_it_answers_first() {
    let mut world = World::new(None, vec![channel(1)]);
    let link = world.online();
    world.take();
    world.session.handle_network(world.now);
    world.pass(DOUBT);
    let (other, _) = world.connect();
    world.link(link, LinkEvent::Pong);
    assert_eq!(world.take(), [Output::Ping(link), Output::Close(other)]);
    world.session.handle_network(world.now);
    world.pass(DOUBT);
    let (other, _) = world.connect();
    world.open(other);
    assert_eq!(world.session.standing().state, LinkState::Online);
    world.pass(PROOF_TIMEOUT + OVERLAP);
    assert!(world.take().contains(&Output::Close(link)), "it has been replaced");
}

#[test]
fn a_returning_network_ends_the_wait() {
    let mut world = World::new(None, vec![channel(1)]);
    for _ in 0..8 {
        let (link, _) = world.connect();
        world.link(link, LinkEvent::Failed(LinkError::Connect("unreachable".into())));
    }
    world.session.handle_network(world.now);
    assert_eq!(connects(&world.take()), 1);
}

#[test]
fn an_attempt_that_the_network_overtook_is_followed_soon() {
    let mut world = World::new(None, vec![channel(1)]);
    for _ in 0..8 {
        let (link, _) = world.connect();
        world.link(link, LinkEvent::Failed(LinkError::Connect("unreachable".into())));
    }
    let (link, _) = world.connect();
    world.session.handle_network(world.now);
    world.link(link, LinkEvent::Failed(LinkError::Connect("unreachable".into())));
    world.take();
    world.pass(super::super::backoff::BASE);
    assert_eq!(connects(&world.take()), 1);
}

#[test]
fn the_thousand_and_first_registration_is_refused() {
    let mut world = World::new(None, (0..TOPIC_LIMIT as u64).map(channel).collect());
    world.register(5000);
    assert_eq!(failures(&world.take()), [(5000, FailureReason::ActionRequired)]);
}

#[test]
fn with_too_many_unsafe_messages_the_link_is_given_up() {
    let mut world = World::new(None, vec![channel(1)]);
    let link = world.online();
    for n in 0..UNSAFE_LIMIT {
        world.message(link, "up1", &format!("m{n}"));
    }
    assert!(!world.take().contains(&Output::Close(link)));
    world.message(link, "up1", "more");
    assert!(world.take().contains(&Output::Close(link)));
    assert_eq!(world.state(), LinkState::Waiting);
}

#[test]
fn a_backlog_longer_than_the_limit_comes_in_several_goes() {
    let mut world = World::new(None, vec![channel(1)]);
    let total = 3 * UNSAFE_LIMIT + 5;
    let mut got = HashSet::new();
    for _ in 0..4 {
        let link = world.online();
        for n in 0..total {
            // The core is slow: it calls nothing safe while the link lives.
            world.message(link, "up1", &format!("m{n}"));
        }
        let ids: Vec<String> = messages(&world.take()).into_iter().map(str::to_owned).collect();
        for id in ids {
            world.safe(&id);
            assert!(got.insert(id), "handed on twice");
        }
    }
    assert_eq!(got.len(), total);
}

#[test]
fn while_roaming_is_off_there_is_no_link_and_registrations_fail_at_once() {
    let mut world = World::new(Some("cursor"), vec![channel(1)]);
    let link = world.online();
    world.register(2);
    world.session.set_allowed(false, world.now);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)));
    let failed = |outputs: &[Output], n: u64| {
        outputs.iter().any(|output| {
            matches!(output, Output::RegisterFailed { registration, reason: FailureReason::Network, .. }
                if registration.0 == n)
        })
    };
    assert!(failed(&outputs, 2));
    assert_eq!((world.state(), world.session.poll_timeout()), (LinkState::Off, None));
    world.register(3);
    world.session.handle_network(world.now);
    world.session.restart(world.now);
    let outputs = world.take();
    assert!(failed(&outputs, 3));
    assert!(!outputs.iter().any(|output| matches!(output, Output::Connect { .. })));
    world.session.set_allowed(true, world.now);
    world.drain();
    let link = world.online();
    let beat = world.session.standing().heartbeat.unwrap();
    assert_eq!((beat.interval, beat.by_server), (SECOND * 45, true));
    world.message(link, "up1", "m1");
    assert_eq!(messages(&world.take()), ["m1"]);
}

#[derive(Clone, Debug)]
enum Poke {
    Frame(u64, String),
    Open(u64),
    Message(u64, u64, u64),
    Ping(u64),
    Ended(u64, u16),
    Network,
    Allowed(bool),
    Register(u64),
    Unregister(u64),
    Safe,
    Pass(u64),
}

fn poke() -> impl Strategy<Value = Poke> {
    let value = prop_oneof![
        any::<i64>().prop_map(|n| json!(n)),
        Just(json!("up1")),
        Just(json!(["x"])),
        Just(json!({"url": "http://x"})),
        "\\PC{0,20}".prop_map(|s| json!(s)),
    ];
    let key =
        prop::sample::select(vec!["id", "time", "topic", "message", "encoding", "priority", "attachment", "code"]);
    let kind = prop::sample::select(vec!["open", "message", "keepalive", "other"]);
    let frame = (kind, prop::collection::vec((key, value), 0..6)).prop_map(|(kind, fields)| {
        let mut frame = json!({"event": kind, "id": "m1", "time": 5000, "topic": "up1"});
        for (key, value) in fields {
            frame[key] = value;
        }
        frame.to_string()
    });
    prop_oneof![
        4 => (0_u64..3, prop_oneof![4 => frame, 1 => "\\PC{0,40}"]).prop_map(|(back, text)| Poke::Frame(back, text)),
        6 => (0_u64..2).prop_map(Poke::Open),
        6 => (0_u64..2, 0_u64..5, 0_u64..400).prop_map(|(back, topic, id)| Poke::Message(back, topic, id)),
        2 => (0_u64..2).prop_map(Poke::Ping),
        2 => (0_u64..2, prop::sample::select(vec![0, 200, 401, 429, 507])).prop_map(|(b, s)| Poke::Ended(b, s)),
        1 => Just(Poke::Network),
        1 => any::<bool>().prop_map(Poke::Allowed),
        3 => (0_u64..5).prop_map(Poke::Register),
        2 => (0_u64..5).prop_map(Poke::Unregister),
        3 => Just(Poke::Safe),
        5 => (0_u64..120_000).prop_map(Poke::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn whatever_comes_nothing_panics_and_every_registration_is_answered_in_time(
        pokes in prop::collection::vec(poke(), 1..80)
    ) {
        let mut world = World::new(None, vec![channel(1)]);
        let (mut newest, mut arrived) = (0_u64, Vec::new());
        let mut waiting: HashMap<u64, Instant> = HashMap::new();
        for poke in pokes {
            let link = |back: u64| LinkId(newest.saturating_sub(back));
            match poke {
                Poke::Frame(back, text) => world.link(link(back), LinkEvent::Text(text)),
                Poke::Open(back) => world.open(link(back)),
                Poke::Message(back, topic, id) => world.message(link(back), &format!("up{topic}"), &format!("m{id}")),
                Poke::Ping(back) => world.link(link(back), LinkEvent::Ping),
                Poke::Ended(back, 0) => world.link(link(back), LinkEvent::Closed { code: None, reason: "\n".into() }),
                Poke::Ended(back, status) => world.link(link(back), refusal(status)),
                Poke::Network => world.session.handle_network(world.now),
                Poke::Allowed(allowed) => world.session.set_allowed(allowed, world.now),
                Poke::Register(n) => {
                    if !world.session.topics.contains_key(&RegistrationId(n)) {
                        waiting.insert(n, world.now.boot + REGISTER_TIMEOUT);
                    }
                    world.register(n);
                }
                Poke::Unregister(n) => {
                    waiting.remove(&n);
                    world.unregister(n);
                }
                Poke::Safe => for id in arrived.drain(..) {
                    world.session.safe(RegistrationId(1), &id, world.now);
                },
                Poke::Pass(millis) => world.pass(Duration::from_millis(millis)),
            }
            for output in world.take() {
                match output {
                    Output::Connect { link, path, .. } => {
                        prop_assert!(path.is_ascii() && !path.contains([' ', '\n', '#', '&']), "{path}");
                        newest = link.0;
                    }
                    Output::Message(message) => arrived.push(message.id),
                    Output::Registered { registration, .. } => {
                        waiting.remove(&registration.0);
                    }
                    Output::RegisterFailed { registration, .. } => {
                        prop_assert!(waiting.remove(&registration.0).is_some(), "failed without being asked for");
                    }
                    _ => {}
                }
            }
            let (session, now) = (&world.session, world.now.boot);
            prop_assert!(waiting.values().all(|by| *by > now), "an app waits in vain");
            let pending = session.topics.values().filter(|entry| !entry.told).count();
            prop_assert_eq!(pending, session.pending);
            prop_assert_eq!(session.names.len(), session.topics.len());
            prop_assert_eq!(session.topics.is_empty(), world.state() == LinkState::Idle);
            prop_assert_eq!(session.poll_timeout().is_none(), matches!(world.state(), LinkState::Idle | LinkState::Off));
            prop_assert_eq!(world.state() == LinkState::Off, !session.allowed && !session.topics.is_empty());
        }
    }
}
