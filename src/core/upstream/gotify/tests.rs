//! The rules of push.md §3d, one test each, against a server played by the test.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    action::HttpRequest,
    config::{NetworkSettings, UpstreamKind, UpstreamSettings},
    core::upstream::{Channel, IncomingMessage, REGISTER_TIMEOUT},
    event::LinkError,
    model::Urgency,
    time::UnixTime,
};

const SECOND: Duration = Duration::from_secs(1);

/// The session and a server: what is stored there, and its answers.
struct World {
    session: Session,
    now: Now,
    seen: Vec<Output>,
    stored: BTreeMap<u64, Value>,
    applications: BTreeMap<u64, String>,
    next: u64,
}

impl World {
    fn with(settings: &UpstreamSettings, last: Option<&str>, channels: Vec<Channel>) -> Self {
        let now = Now { boot: Instant::from_nanos(5_000_000_000_000), wall: UnixTime::from_secs(1_000_000) };
        let applications =
            channels.iter().filter_map(|c| wire::split(&c.channel)).map(|(id, token)| (id, token.into())).collect();
        let beginning = Beginning {
            settings,
            network: &NetworkSettings::default(),
            remembered: last.iter().map(|last| ("last".into(), (*last).into())).collect(),
            channels,
            seed: [7; 32],
            links: LinkIds::new(0),
        };
        let session = Session::new(beginning, now);
        let mut world = Self { session, now, seen: Vec::new(), stored: BTreeMap::new(), applications, next: 1 };
        world.drain();
        world
    }

    fn new(last: Option<&str>, channels: Vec<Channel>) -> Self {
        Self::with(&UpstreamSettings::new("g", UpstreamKind::Gotify, "https://push/"), last, channels)
    }

    fn drain(&mut self) {
        while let Some(output) = self.session.poll_output() {
            self.seen.push(output);
        }
        if let Some(at) = self.session.poll_timeout() {
            assert!(at > self.now.boot, "a deadline that is not in the future: {:?}", self.session);
        }
    }

    fn take(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.seen)
    }

    fn link(&mut self, link: LinkId, event: LinkEvent) {
        self.session.handle_link(link, event, self.now);
        self.drain();
    }

    /// A sender posts a message; it is stored, and sent live if there is a link.
    fn publish(&mut self, application: u64, link: Option<LinkId>) -> u64 {
        let id = self.next;
        self.next += 1;
        let message = json!({"id": id, "appid": application, "message": format!("m{id}"), "priority": 5});
        self.stored.insert(id, message.clone());
        if let Some(link) = link {
            self.link(link, LinkEvent::Text(message.to_string()));
        }
        id
    }

    fn http(&mut self, ticket: HttpTicket, status: u16, body: String) {
        self.session.handle_http(ticket, Ok(HttpResponse { status, body, retry_after: None }), self.now);
        self.drain();
    }

    /// What a working server answers.
    fn answer(&mut self, ticket: HttpTicket, request: &HttpRequest) {
        let parameter = |name: &str| {
            let (_, rest) = request.path.split_once(&format!("{name}="))?;
            rest.split('&').next()?.parse::<u64>().ok()
        };
        let (status, body) = match (request.method, request.path.as_str()) {
            ("POST", "application") => {
                self.next += 1;
                let (id, token) = (self.next, format!("T{}", self.next));
                self.applications.insert(id, token.clone());
                (200, json!({"id": id, "token": token}))
            }
            ("GET", "application") => {
                let list = self.applications.iter().map(|(id, token)| json!({"id": id, "token": token}));
                (200, Value::Array(list.collect()))
            }
            ("GET", _) => {
                let limit = parameter("limit").unwrap() as usize;
                let mut page: Vec<Value> = self
                    .stored
                    .range(..parameter("since").unwrap_or(u64::MAX))
                    .rev()
                    .take(limit + 1)
                    .map(|(_, message)| message.clone())
                    .collect();
                let more = page.len() > limit;
                page.truncate(limit);
                let next = if more { "http://push/message?more" } else { "" };
                (200, json!({"messages": page, "paging": {"size": page.len(), "limit": limit, "next": next}}))
            }
            (_, path) => {
                let (kind, id) = path.split_once('/').unwrap();
                let id = id.parse().unwrap();
                let there = match kind {
                    "message" => self.stored.remove(&id).is_some(),
                    _ => {
                        self.stored.retain(|_, message| message["appid"] != id);
                        self.applications.remove(&id).is_some()
                    }
                };
                (if there { 200 } else { 404 }, Value::Null)
            }
        };
        self.http(ticket, status, body.to_string());
    }

    fn requests(&mut self) -> Vec<(HttpTicket, HttpRequest)> {
        let mut requests = Vec::new();
        self.seen.retain(|output| match output {
            Output::Http(ticket, request) => {
                requests.push((*ticket, request.clone()));
                false
            }
            _ => true,
        });
        requests
    }

    /// Answers requests as they come, until there are none.
    fn serve(&mut self) {
        loop {
            let requests = self.requests();
            if requests.is_empty() {
                return;
            }
            for (ticket, request) in requests {
                self.answer(ticket, &request);
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now.boot + time;
        while let Some(at) = self.session.poll_timeout().filter(|at| *at <= end) {
            self.now.boot = at;
            self.session.handle_timeout(self.now);
            self.drain();
        }
        self.now.boot = end;
    }

    fn connect(&mut self) -> LinkId {
        for _ in 0..1000 {
            if let Some(at) = self.seen.iter().position(|output| matches!(output, Output::Connect { .. })) {
                let Output::Connect { link, path, headers } = self.seen.remove(at) else { unreachable!() };
                assert_eq!((path.as_str(), headers), ("stream", vec![]));
                return link;
            }
            let at = self.session.poll_timeout().expect("nothing is due");
            self.pass(at.since(self.now.boot));
        }
        panic!("no link is asked for");
    }

    /// A link with which everything missed has come.
    fn online(&mut self) -> LinkId {
        let link = self.connect();
        self.link(link, LinkEvent::Open);
        self.pass(SUBSCRIBED);
        self.serve();
        link
    }

    fn messages(&mut self) -> Vec<IncomingMessage> {
        let mut messages = Vec::new();
        self.seen.retain(|output| match output {
            Output::Message(message) => {
                messages.push(message.clone());
                false
            }
            _ => true,
        });
        messages
    }

    fn numbers(&mut self) -> Vec<u64> {
        self.messages().iter().map(number).collect()
    }

    fn safe(&mut self, message: &IncomingMessage) {
        self.session.safe(message.registration, &message.id, self.now);
        self.drain();
    }

    fn register(&mut self, n: u64) {
        self.session.register(RegistrationId(n), self.now);
        self.drain();
    }
}

fn number(message: &IncomingMessage) -> u64 {
    message.id.split_once('-').unwrap().1.parse().unwrap()
}

fn channel(n: u64) -> Channel {
    Channel {
        registration: RegistrationId(n),
        channel: format!("{n}:A{n}").into(),
        vapid: None,
        endpoint: format!("https://push/UP?token=A{n}").into(),
    }
}

fn failures(outputs: &[Output]) -> Vec<(u64, FailureReason)> {
    let failure = |output: &Output| match output {
        Output::RegisterFailed { registration, reason, .. } => Some((registration.0, *reason)),
        _ => None,
    };
    outputs.iter().filter_map(failure).collect()
}

fn registered(outputs: &[Output]) -> Vec<(u64, String, String)> {
    let one = |output: &Output| match output {
        Output::Registered { registration, channel, endpoint } => {
            Some((registration.0, channel.to_string(), endpoint.to_string()))
        }
        _ => None,
    };
    outputs.iter().filter_map(one).collect()
}

#[test]
fn without_registrations_nothing_happens_and_nothing_is_due() {
    let mut world = World::new(Some("77"), vec![]);
    world.session.handle_network(world.now);
    world.drain();
    assert_eq!(world.take(), []);
    assert_eq!(world.session.poll_timeout(), None);
}

#[test]
fn the_first_registration_connects_and_the_last_to_leave_disconnects() {
    let mut world = World::new(None, vec![]);
    world.next = 100;
    world.publish(55, None);
    world.register(1);
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    assert_eq!(world.requests(), [], "not before the server has subscribed the stream");
    world.pass(SUBSCRIBED);
    let requests = world.requests();
    assert_eq!(requests[0].1.path, "message?limit=1");
    world.answer(requests[0].0, &requests[0].1);
    assert!(world.seen.contains(&Output::Remember { key: "last", value: "100".into() }), "before the endpoint is told");
    let requests = world.requests();
    assert_eq!((requests[0].1.method, requests[0].1.path.as_str()), ("POST", "application"));
    world.answer(requests[0].0, &requests[0].1);
    assert_eq!(registered(&world.take()), [(1, "102:T102".into(), "https://push/UP?token=T102".into())]);
    world.publish(102, Some(link));
    world.publish(55, Some(link));
    assert_eq!(world.messages().len(), 1, "others' are left alone");
    world.session.unregister(RegistrationId(1), world.now);
    world.drain();
    assert!(world.seen.contains(&Output::Close(link)));
    assert_eq!(world.requests()[0].1.path, "application/102");
    assert_eq!(world.session.standing().state, LinkState::Idle);
}

#[test]
fn a_message_is_deleted_when_it_is_safe_and_not_before() {
    let mut world = World::new(Some("0"), vec![channel(1)]);
    let link = world.online();
    world.take();
    world.publish(1, Some(link));
    world.publish(1, Some(link));
    let messages = world.messages();
    assert_eq!(messages[0].urgency, Some(Urgency::Normal));
    assert_eq!(world.take(), []);
    world.safe(&messages[1]);
    let outputs = world.take();
    assert!(
        matches!(&outputs[0], Output::Http(_, request) if request.path == "message/2" && request.method == "DELETE")
    );
    assert_eq!(outputs.len(), 1, "the first is not safe: {outputs:?}");
    world.safe(&messages[0]);
    assert!(world.seen.contains(&Output::Remember { key: "last", value: "2".into() }));
    world.take();
    world.safe(&messages[0]);
    assert_eq!(world.take(), [], "once");
}

#[test]
fn what_was_missed_comes_in_order_before_what_comes_live() {
    let mut world = World::new(Some("0"), vec![channel(1), channel(2)]);
    for n in 0..1000 {
        world.publish(1 + n % 3, None);
    }
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    world.publish(1, Some(link));
    world.pass(SUBSCRIBED);
    let mut live = 0;
    loop {
        let requests = world.requests();
        if requests.is_empty() {
            break;
        }
        for (ticket, request) in requests {
            live += 1;
            world.publish(2, Some(link));
            world.answer(ticket, &request);
        }
    }
    assert!(live > 10, "it takes several pages");
    world.publish(1, Some(link));
    let numbers = world.numbers();
    assert!(numbers.is_sorted_by(|a, b| a < b));
    let ours = |application: &Value| application == 1 || application == 2;
    let expected: Vec<u64> = world.stored.iter().filter(|(_, m)| ours(&m["appid"])).map(|(id, _)| *id).collect();
    assert_eq!(numbers, expected);
}

#[test]
fn what_was_safe_does_not_come_again_and_the_rest_does() {
    let mut world = World::new(Some("0"), vec![channel(1)]);
    let link = world.online();
    for _ in 0..10 {
        world.publish(1, Some(link));
    }
    let messages = world.messages();
    for message in messages.iter().filter(|message| number(message) != 4) {
        world.safe(message);
    }
    world.serve();
    let last = world.seen.iter().rev().find_map(|output| match output {
        Output::Remember { key: "last", value } => Some(value.clone()),
        _ => None,
    });
    assert_eq!(last.as_deref(), Some("3"));
    for lives in [false, true] {
        if lives {
            let stored = std::mem::take(&mut world.stored);
            world = World::new(last.as_deref(), vec![channel(1)]);
            (world.stored, world.next) = (stored, 11);
        } else {
            world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
        }
        world.online();
        let again = world.messages();
        assert_eq!(again.iter().map(number).collect::<Vec<_>>(), [4]);
        assert_eq!(again[0].id, messages[3].id, "known by its id");
    }
}

#[test]
fn failed_pages_are_tried_again_while_the_link_stays() {
    let mut world = World::new(Some("0"), vec![channel(1)]);
    world.publish(1, None);
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    world.pass(SUBSCRIBED);
    for status in [500, 503] {
        let (ticket, _) = world.requests().remove(0);
        world.http(ticket, status, "[]".into());
        assert!(world.session.standing().last_error.unwrap().contains("stored messages"));
        world.pass(5 * SECOND);
    }
    world.publish(1, Some(link));
    assert_eq!(world.numbers(), [] as [u64; 0], "in order");
    let (ticket, _) = world.requests().remove(0);
    world.session.handle_http(ticket, Err(HttpError::Unusable("too large".into())), world.now);
    world.drain();
    let requests = world.requests();
    assert_eq!(requests[0].1.path, "message?limit=50", "a smaller page");
    world.answer(requests[0].0, &requests[0].1);
    assert_eq!(world.numbers(), [1, 2]);
    assert_eq!(world.session.standing().state, LinkState::Online);
}

#[test]
fn a_page_that_does_not_come_is_asked_for_again() {
    let mut world = World::new(Some("0"), vec![channel(1)]);
    world.publish(1, None);
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    world.pass(SUBSCRIBED);
    let (late, request) = world.requests().remove(0);
    world.link(link, LinkEvent::Ping);
    world.pass(PAGE_TIMEOUT + 5 * SECOND);
    assert_eq!(world.requests().len(), 1);
    world.answer(late, &request);
    assert_eq!(world.numbers(), [] as [u64; 0], "nobody waits for that answer");
}

#[test]
fn an_application_deleted_at_the_server_is_made_anew() {
    let mut world = World::new(Some("0"), vec![channel(1), channel(2), channel(3)]);
    world.applications.remove(&2);
    world.applications.insert(3, "another".into());
    world.next = 50;
    let link = world.online();
    let made = registered(&world.take());
    assert_eq!(made.iter().map(|(n, ..)| *n).collect::<Vec<_>>(), [2, 3]);
    let id = made[0].1.split_once(':').unwrap().0.parse().unwrap();
    world.publish(id, Some(link));
    world.publish(2, Some(link));
    assert_eq!(world.messages().len(), 1);
    // Looked at once in a while only.
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    world.pass(SUBSCRIBED);
    let (ticket, request) = world.requests().remove(0);
    world.answer(ticket, &request);
    assert_eq!(world.requests(), []);
}

#[test]
fn a_late_answer_to_a_registration_made_anew_is_undone_as_well() {
    let mut world = World::new(Some("0"), vec![channel(1)]);
    world.applications.clear();
    world.next = 50;
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    world.pass(SUBSCRIBED);
    for _ in 0..2 {
        let (ticket, request) = world.requests().remove(0);
        world.answer(ticket, &request);
    }
    let (late, request) = world.requests().remove(0);
    assert_eq!((request.method, request.path.as_str()), ("POST", "application"));
    world.pass(REGISTER_TIMEOUT);
    world.answer(late, &request);
    assert_eq!(registered(&world.seen), []);
    assert_eq!(world.requests()[0].1.path, "application/51");
    for _ in 0..18 {
        world.pass(5 * SECOND);
        world.serve();
    }
    assert_eq!(registered(&world.take()).len(), 1);
    assert_eq!(world.applications.len(), 1, "of all that were made one is left");
}

#[test]
fn the_configured_form_of_endpoints_is_told_when_it_changes() {
    let mut settings = UpstreamSettings::new("g", UpstreamKind::Gotify, "wss://push/");
    settings.endpoint = Some("https://up.example/{channel}/x".into());
    let mut world = World::with(&settings, Some("0"), vec![channel(1)]);
    assert_eq!(registered(&world.seen), []);
    world.online();
    assert_eq!(registered(&world.take()), [(1, "1:A1".into(), "https://up.example/A1/x".into())]);
    settings.endpoint = Some(format!("https://up.example/{{channel}}/{}", "x".repeat(880)).into());
    let mut world = World::with(&settings, None, vec![]);
    world.register(1);
    world.online();
    assert_eq!(registered(&world.take()).len(), 1);
}

#[test]
fn a_refused_token_needs_the_user() {
    let mut world = World::new(None, vec![]);
    world.register(1);
    let link = world.connect();
    world.link(link, LinkEvent::Failed(LinkError::Http { status: 401, body: String::new(), retry_after: None }));
    assert_eq!(failures(&world.take()), [(1, FailureReason::ActionRequired)]);
    world.register(2);
    assert_eq!(failures(&world.take()), [(2, FailureReason::ActionRequired)], "at once");
    world.pass(TROUBLE_HOLDS);
    world.register(3);
    let link = world.connect();
    world.link(link, LinkEvent::Open);
    assert_eq!(world.session.standing().trouble, None);
    world.pass(SUBSCRIBED);
    let (ticket, _) = world.requests().remove(0);
    world.http(ticket, 401, String::new());
    let outputs = world.take();
    assert_eq!(failures(&outputs), [(3, FailureReason::ActionRequired)]);
    assert!(outputs.contains(&Output::Close(link)));
    assert!(world.session.standing().trouble.unwrap().contains("client token"));
}

#[test]
fn failures_of_registrations_have_their_reasons() {
    for (status, body, reason) in [
        (500, "{}", FailureReason::Network),
        (429, "{}", FailureReason::Network),
        (400, "{}", FailureReason::InternalError),
        (200, "{}", FailureReason::InternalError),
    ] {
        let mut world = World::new(Some("0"), vec![channel(9)]);
        world.online();
        world.register(1);
        let end = world.now.boot + REGISTER_TIMEOUT;
        while world.now.boot < end {
            for (ticket, _) in world.requests() {
                world.http(ticket, status, body.into());
            }
            world.pass(SECOND);
        }
        assert_eq!(failures(&world.seen), [(1, reason)], "{status}");
    }
    let mut world = World::new(Some("0"), vec![channel(9)]);
    world.online();
    world.register(1);
    let (ticket, request) = world.requests().remove(0);
    world.pass(REGISTER_TIMEOUT);
    assert_eq!(failures(&world.take()), [(1, FailureReason::Network)]);
    world.answer(ticket, &request);
    assert!(world.requests()[0].1.path.starts_with("application/"), "a late answer is undone");
}

#[test]
fn silence_and_a_changed_network_end_a_dead_link() {
    let mut world = World::new(Some("0"), vec![channel(1)]);
    let link = world.online();
    for _ in 0..5 {
        world.pass(90 * SECOND);
        world.link(link, LinkEvent::Ping);
    }
    world.take();
    world.pass(99 * SECOND);
    assert_eq!(world.take(), []);
    world.pass(SECOND);
    assert!(world.take().contains(&Output::Close(link)));
    let link = world.online();
    world.session.handle_network(world.now);
    world.drain();
    assert!(world.seen.contains(&Output::Ping(link)));
    world.pass(9 * SECOND);
    world.link(link, LinkEvent::Pong);
    world.take();
    world.pass(20 * SECOND);
    assert_eq!(world.take(), []);
    world.session.handle_network(world.now);
    world.pass(PROOF_TIMEOUT);
    let outputs = world.take();
    assert!(outputs.contains(&Output::Close(link)));
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })), "at once");
}

#[test]
fn a_link_that_ends_while_it_is_in_doubt_is_made_anew_at_once() {
    let mut world = World::new(Some("0"), vec![channel(1)]);
    let link = world.online();
    world.session.handle_network(world.now);
    world.take();
    world.link(link, LinkEvent::Closed { code: None, reason: String::new() });
    let outputs = world.take();
    assert!(outputs.iter().any(|output| matches!(output, Output::Connect { .. })), "{outputs:?}");
}

#[test]
fn where_links_are_not_allowed_there_is_none() {
    let mut world = World::new(Some("0"), vec![channel(1)]);
    let link = world.online();
    world.take();
    world.session.set_allowed(false, world.now);
    world.drain();
    assert_eq!(world.take(), [Output::Close(link), Output::StateChanged(LinkState::Off)]);
    world.register(3);
    assert_eq!(failures(&world.take()), [(3, FailureReason::Network)]);
    world.session.handle_network(world.now);
    world.pass(3600 * SECOND);
    assert_eq!(world.take(), []);
    world.session.set_allowed(true, world.now);
    world.drain();
    world.online();
}

#[test]
fn messages_turned_away_come_again_after_a_restart() {
    let mut world = World::new(Some("0"), vec![channel(1)]);
    let link = world.online();
    for _ in 0..200 {
        world.publish(1, Some(link));
    }
    let messages = world.messages();
    for message in &messages[100..] {
        world.safe(message);
    }
    world.serve();
    world.session.restart(world.now);
    world.drain();
    world.online();
    assert_eq!(world.numbers(), (1..=100).collect::<Vec<_>>());
}

#[test]
fn a_server_that_counts_anew_is_followed() {
    let mut world = World::new(Some("90000"), vec![channel(1)]);
    world.publish(1, None);
    let link = world.online();
    assert_eq!(world.numbers(), [1]);
    world.publish(1, Some(link));
    assert_eq!(world.numbers(), [2]);
    assert_eq!(world.session.known, Some(2));
}

#[test]
fn other_applications_messages_seldom_write_to_flash() {
    let mut world = World::new(Some("0"), vec![channel(1)]);
    let link = world.online();
    world.take();
    for _ in 0..1000 {
        world.publish(99, Some(link));
    }
    let writes = world.take().iter().filter(|output| matches!(output, Output::Remember { .. })).count();
    assert!((1..=20).contains(&writes), "{writes} writes");
}

#[derive(Clone, Debug)]
enum Step {
    Register,
    Unregister(usize),
    Publish { which: usize, live: bool },
    Answer(usize),
    Fault { which: usize, status: u16 },
    NoAnswer(usize),
    Open,
    Frame(String),
    End(usize),
    Safe(usize),
    Network,
    Allowed(bool),
    Restart,
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::Register),
        1 => any::<usize>().prop_map(Step::Unregister),
        10 => (any::<usize>(), any::<bool>()).prop_map(|(which, live)| Step::Publish { which, live }),
        12 => any::<usize>().prop_map(Step::Answer),
        1 => (any::<usize>(), prop::sample::select(vec![400_u16, 401, 404, 429, 500]))
            .prop_map(|(which, status)| Step::Fault { which, status }),
        1 => any::<usize>().prop_map(Step::NoAnswer),
        5 => Just(Step::Open),
        1 => "[{}\":a-z0-9]{0,20}".prop_map(Step::Frame),
        1 => (0_usize..4).prop_map(Step::End),
        8 => any::<usize>().prop_map(Step::Safe),
        1 => Just(Step::Network),
        1 => prop::sample::select(vec![true, true, false]).prop_map(Step::Allowed),
        1 => Just(Step::Restart),
        6 => prop::sample::select(vec![1_u64, 250, 3000, 11_000, 40_000, 700_000]).prop_map(Step::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Whatever the server and the core do: nothing is deleted before it is safe, every registration asked for is
    /// answered in time and once, there is one link at a time, and in the end, with a server that works, everything
    /// published to what is registered has come.
    #[test]
    fn whatever_happens_nothing_is_lost(steps in prop::collection::vec(step(), 1..150)) {
        let mut world = World::new(Some("0"), vec![channel(1), channel(2)]);
        world.next = 10;
        let mut live: BTreeMap<u64, u64> = BTreeMap::from([(1, 1), (2, 2)]);
        let mut waiting: BTreeMap<u64, Instant> = BTreeMap::new();
        let (mut open, mut subscribed, mut breaking, mut http) = (None, false, false, Vec::new());
        let (mut handed, mut safe) = (Vec::<IncomingMessage>::new(), BTreeSet::new());
        let mut published: BTreeMap<u64, u64> = BTreeMap::new();
        let (mut next, mut allowed) = (100, true);
        let ending = [Step::End(0), Step::Allowed(true), Step::Network];
        let calm = (0..400).flat_map(|_| [Step::Open, Step::Answer(0), Step::Pass(1000)]);
        for step in std::iter::once(Step::Pass(0)).chain(steps).chain(ending).chain(calm) {
            match step {
                Step::Register => {
                    next += 1;
                    waiting.insert(next, world.now.boot + REGISTER_TIMEOUT);
                    world.register(next);
                }
                Step::Unregister(n) => if !live.is_empty() {
                    let n = *live.keys().nth(n % live.len()).unwrap();
                    let application = live.remove(&n).unwrap();
                    published.retain(|_, whose| *whose != application);
                    handed.retain(|message| message.registration.0 != n);
                    world.session.unregister(RegistrationId(n), world.now);
                    world.drain();
                },
                Step::Publish { which, live: is_live } => {
                    let application = live.values().nth(which % (live.len() + 1)).copied().unwrap_or(9999);
                    // What is not sent live was sent over a connection that is breaking: nothing comes after it.
                    let link = open.filter(|_| subscribed && is_live && !breaking);
                    breaking |= subscribed && link.is_none();
                    let id = world.publish(application, link);
                    if application != 9999 {
                        published.insert(id, application);
                    }
                }
                Step::Answer(which) if !http.is_empty() => {
                    let (ticket, request): (HttpTicket, HttpRequest) = http.remove(which % http.len());
                    world.answer(ticket, &request);
                }
                Step::Fault { which, status } if !http.is_empty() => {
                    let (ticket, _) = http.remove(which % http.len());
                    world.http(ticket, status, String::new());
                }
                Step::NoAnswer(which) if !http.is_empty() => {
                    let (ticket, _) = http.remove(which % http.len());
                    world.session.handle_http(ticket, Err(HttpError::Failed("no".into())), world.now);
                    world.drain();
                }
                Step::Open => if let Some(link) = open.filter(|_| !subscribed) {
                    subscribed = true;
                    world.link(link, LinkEvent::Open);
                },
                Step::Frame(text) => if let Some(link) = open { world.link(link, LinkEvent::Text(text)) },
                Step::End(how) => if let Some(link) = open.take() {
                    (subscribed, breaking) = (false, false);
                    let http = |status| LinkError::Http { status, body: String::new(), retry_after: None };
                    let event = match how {
                        0 => LinkEvent::Closed { code: Some(1006), reason: "x".into() },
                        1 => LinkEvent::Failed(http(401)),
                        2 => LinkEvent::Failed(http(503)),
                        _ => LinkEvent::Failed(LinkError::Timeout),
                    };
                    world.link(link, event);
                },
                Step::Safe(which) if !handed.is_empty() => {
                    let message = handed.swap_remove(which % handed.len());
                    safe.insert(number(&message));
                    world.safe(&message);
                }
                Step::Network => {
                    world.session.handle_network(world.now);
                    world.drain();
                }
                Step::Allowed(to) => {
                    allowed = to;
                    world.session.set_allowed(to, world.now);
                    world.drain();
                }
                Step::Restart => {
                    world.session.restart(world.now);
                    world.drain();
                }
                Step::Pass(millis) => {
                    world.pass(Duration::from_millis(millis));
                    if let Some(link) = open.filter(|_| subscribed) {
                        world.link(link, LinkEvent::Ping);
                    }
                }
                Step::Answer(_) | Step::Fault { .. } | Step::NoAnswer(_) | Step::Safe(_) => {}
            }
            let outputs = world.take();
            for output in outputs {
                match output {
                    Output::Connect { link, .. } => {
                        prop_assert!(open.is_none(), "two links");
                        prop_assert!(allowed);
                        (open, subscribed, breaking) = (Some(link), false, false);
                    }
                    Output::Close(link) => {
                        prop_assert_eq!(open.take(), Some(link));
                        (subscribed, breaking) = (false, false);
                    }
                    Output::Http(ticket, request) => {
                        if let Some(id) = request.path.strip_prefix("message/") {
                            prop_assert!(safe.contains(&id.parse().unwrap()), "{} is deleted and not safe", id);
                        }
                        http.push((ticket, request));
                    }
                    Output::Message(message) => {
                        let id = number(&message);
                        prop_assert_eq!(live.get(&message.registration.0), published.get(&id));
                        handed.push(message);
                    }
                    Output::Registered { registration, channel, .. } => {
                        waiting.remove(&registration.0);
                        let (application, _) = wire::split(&channel).unwrap();
                        if let Some(old) = live.insert(registration.0, application) && old != application {
                            published.retain(|_, whose| *whose != old);
                        }
                    }
                    Output::RegisterFailed { registration, .. } => {
                        prop_assert!(waiting.remove(&registration.0).is_some(), "answered twice, or never asked for");
                    }
                    Output::Remember { key, value } => {
                        prop_assert_eq!(key, "last");
                        let last: u64 = value.parse().unwrap();
                        let mine = published.keys().take_while(|id| **id <= last);
                        for id in mine {
                            prop_assert!(
                                handed.iter().all(|message| number(message) != *id) || safe.contains(id),
                                "{} is remembered and {} is not safe", last, id
                            );
                        }
                    }
                    Output::StateChanged(_) | Output::Ping(_) => {}
                    other => prop_assert!(false, "{other:?}"),
                }
            }
            for by in waiting.values() {
                prop_assert!(*by > world.now.boot, "an app waits for too long");
            }
            prop_assert_eq!(world.session.standing().registrations, live.len() + waiting.len());
        }
        let come: BTreeSet<u64> = handed.iter().map(number).chain(safe).collect();
        let lost: Vec<_> = published.keys().filter(|id| !come.contains(id)).collect();
        prop_assert!(lost.is_empty(), "{:?} are lost", lost);
    }
}
