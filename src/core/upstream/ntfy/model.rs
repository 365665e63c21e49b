//! The session against a model of the server with its race (see [`cursor`]): a message goes to the subscribers of the
//! moment, is stored up to 5.5 s later, and a new link subscribes and reads its replay in between.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::event::LinkError;

const BASE: &str = "https://ntfy.example/";
const WAY: Duration = Duration::from_millis(50);
const PING: Duration = Duration::from_secs(45);

#[derive(Clone, Debug)]
enum Step {
    /// To a topic; stored after this many milliseconds, written to each subscriber within `writing`.
    Publish {
        topic: usize,
        storing: u64,
        writing: u64,
    },
    /// This many milliseconds pass.
    Pass(u64),
    /// What has come becomes safe.
    Safe,
    /// Every connection is reset.
    Cut,
    /// Everything under way on the open connections and whatever follows is lost without a sign; the network returns.
    Roam,
    /// The daemon ends and begins anew from what it was to remember.
    Crash,
    /// New connections are refused from now on, or no longer.
    Refuse(bool),
    /// Roaming, or home again.
    Allow(bool),
    Register,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (any::<usize>(), prop_oneof![0_u64..50, 0_u64..5500], 0_u64..1500)
            .prop_map(|(topic, storing, writing)| Step::Publish { topic, storing, writing }),
        8 => prop_oneof![4 => 0_u64..1000, 2 => 0_u64..10_000, 1 => 0_u64..200_000].prop_map(Step::Pass),
        6 => Just(Step::Safe),
        2 => Just(Step::Cut),
        2 => Just(Step::Roam),
        2 => Just(Step::Crash),
        2 => any::<bool>().prop_map(Step::Refuse),
        1 => any::<bool>().prop_map(Step::Allow),
        2 => Just(Step::Register),
    ]
}

#[derive(Clone, Debug)]
struct Row {
    id: Arc<str>,
    topic: String,
    secs: u64,
}

#[derive(Debug)]
struct Pipe {
    link: LinkId,
    topics: Vec<String>,
    pings_at: Instant,
    lost: bool,
    /// In the order in which they are written, which is the order in which they come.
    frames: BTreeSet<(Instant, u64, Frame)>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Frame {
    Text(String),
    Ping,
    Pong,
}

struct World {
    session: Session,
    now: Now,
    lives: u8,
    rows: Vec<Row>,
    storing: Vec<(Instant, Row)>,
    asked: Vec<(Instant, LinkId, String)>,
    pipes: Vec<Pipe>,
    numbers: u64,
    connects: usize,
    refuses: bool,
    cursor: Option<Arc<str>>,
    channels: BTreeMap<u64, Arc<str>>,
    come: Vec<Arc<str>>,
    safe: HashSet<Arc<str>>,
}

impl World {
    fn new() -> Self {
        let now = Now { boot: Instant::from_nanos(5_000_000_000_000), ..Now::default() };
        let channels = BTreeMap::from([(0, "up0".into())]);
        let mut world = Self {
            session: session(0, None, &channels, now),
            now,
            lives: 0,
            rows: Vec::new(),
            storing: Vec::new(),
            asked: Vec::new(),
            pipes: Vec::new(),
            numbers: 0,
            connects: 0,
            refuses: false,
            cursor: None,
            channels,
            come: Vec::new(),
            safe: HashSet::new(),
        };
        world.drain();
        world
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Publish { topic, storing, writing } => self.publish(topic, storing, writing),
            Step::Pass(millis) => self.pass(Duration::from_millis(millis)),
            Step::Safe => {
                for id in self.come.drain(..) {
                    self.session.safe(RegistrationId(0), &id, self.now);
                    self.safe.insert(id);
                }
            }
            Step::Cut => {
                let links: Vec<LinkId> =
                    self.pipes.drain(..).map(|p| p.link).chain(self.asked.drain(..).map(|(_, link, _)| link)).collect();
                for link in links {
                    self.session.handle_link(link, LinkEvent::Closed { code: None, reason: String::new() }, self.now);
                }
            }
            Step::Roam => {
                self.pipes.iter_mut().for_each(|pipe| pipe.lost = true);
                self.asked.clear();
                self.session.handle_network(self.now);
            }
            Step::Crash => {
                self.lives += 1;
                self.pipes.clear();
                self.asked.clear();
                self.come.clear();
                self.session = session(self.lives, self.cursor.clone(), &self.channels, self.now);
            }
            Step::Refuse(refuses) => self.refuses = refuses,
            Step::Allow(allowed) => self.session.set_allowed(allowed, self.now),
            Step::Register => {
                let registration = RegistrationId(1000 + self.number());
                self.session.register(registration, self.now);
            }
        }
        self.drain();
    }

    fn publish(&mut self, topic: usize, storing: u64, writing: u64) {
        let topic = self.channels.values().nth(topic % self.channels.len()).unwrap().to_string();
        let id: Arc<str> = format!("m{:011}", self.number()).into();
        let row = Row { id, topic, secs: self.now.boot.as_nanos() / 1_000_000_000 };
        let at = self.now.boot + Duration::from_millis(writing);
        for n in 0..self.pipes.len() {
            let number = self.number();
            let pipe = &mut self.pipes[n];
            if pipe.topics.contains(&row.topic) {
                pipe.frames.insert((at, number, row.frame()));
            }
        }
        self.storing.push((self.now.boot + Duration::from_millis(storing), row));
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now.boot + time;
        loop {
            let stores = self.storing.iter().map(|(at, _)| *at).min();
            let accepts = self.asked.iter().map(|(at, ..)| *at).min();
            let pings = self.pipes.iter().map(|pipe| pipe.pings_at).min();
            let frames = self.pipes.iter().filter_map(|pipe| Some(pipe.frames.first()?.0 + WAY)).min();
            let server = earliest(earliest(stores, accepts), earliest(pings, frames));
            let Some(at) = earliest(server, self.session.poll_timeout()).filter(|at| *at <= end) else { break };
            self.now.boot = self.now.boot.max(at);
            self.server_turn();
            self.session.handle_timeout(self.now);
            self.drain();
        }
        self.now.boot = end;
    }

    fn server_turn(&mut self) {
        let now = self.now.boot;
        self.rows.extend(self.storing.extract_if(.., |(at, _)| *at <= now).map(|(_, row)| row));
        let accepted: Vec<_> = self.asked.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, link, path) in accepted {
            if self.refuses {
                let refusal = LinkError::Http { status: 503, body: String::new(), retry_after: None };
                self.session.handle_link(link, LinkEvent::Failed(refusal), self.now);
                self.drain();
            } else {
                self.subscribe(link, &path);
            }
        }
        let mut events = Vec::new();
        for pipe in &mut self.pipes {
            if pipe.pings_at <= now {
                pipe.frames.insert((now, u64::MAX, Frame::Ping));
                pipe.pings_at = now + PING;
            }
            while pipe.frames.first().is_some_and(|(at, ..)| *at + WAY <= now) {
                if let Some((_, _, frame)) = pipe.frames.pop_first()
                    && !pipe.lost
                {
                    events.push((pipe.link, frame));
                }
            }
        }
        for (link, frame) in events {
            let event = match frame {
                Frame::Text(text) => LinkEvent::Text(text),
                Frame::Ping => LinkEvent::Ping,
                Frame::Pong => LinkEvent::Pong,
            };
            self.session.handle_link(link, event, self.now);
            self.drain();
        }
    }

    fn subscribe(&mut self, link: LinkId, path: &str) {
        let (topics, since) = path.split_once("/ws?since=").unwrap();
        let topics: Vec<String> = topics.split(',').map(str::to_owned).collect();
        let now = self.now.boot;
        let after = self.rows.iter().position(|row| *row.id == *since).map_or(0, |at| at + 1);
        let mut replay: Vec<Row> =
            self.rows[after..].iter().filter(|row| topics.contains(&row.topic)).cloned().collect();
        // By the second, and within one in no order.
        replay.reverse();
        replay.sort_by_key(|row| row.secs);
        let open = json!({"id": "open", "time": now.as_nanos() / 1_000_000_000, "event": "open", "topic": ""});
        let mut frames = BTreeSet::from([(now, 0, Frame::Text(open.to_string()))]);
        for (at, row) in replay.iter().enumerate() {
            // So slowly that what is live comes in the middle.
            let number = self.number();
            frames.insert((now + Duration::from_millis(100 * at as u64), number, row.frame()));
        }
        self.pipes.push(Pipe { link, topics, pings_at: now + PING, lost: false, frames });
    }

    fn drain(&mut self) {
        while let Some(output) = self.session.poll_output() {
            match output {
                Output::SendBytes(..) | Output::Http(..) => unreachable!("ntfy has no use for {output:?}"),
                Output::Connect { link, path, .. } => {
                    self.connects += 1;
                    self.asked.push((self.now.boot + WAY, link, path));
                }
                Output::Close(link) => {
                    self.pipes.retain(|pipe| pipe.link != link);
                    self.asked.retain(|(_, asked, _)| *asked != link);
                }
                Output::Ping(link) => {
                    let at = self.now.boot + WAY;
                    if let Some(pipe) = self.pipes.iter_mut().find(|pipe| pipe.link == link) {
                        pipe.frames.insert((at, u64::MAX, Frame::Pong));
                    }
                }
                Output::Registered { registration, channel, .. } => {
                    self.channels.insert(registration.0, channel);
                }
                Output::Message(message) => self.come.push(message.id),
                Output::Remember { value, .. } | Output::RememberBehind { value, .. } => {
                    let at = self.rows.iter().position(|row| *row.id == *value).expect("a cursor nobody stored");
                    for row in &self.rows[..=at] {
                        assert!(
                            self.safe.contains(&row.id),
                            "{} is stored before the cursor {value}, not safe",
                            row.id
                        );
                    }
                    self.cursor = Some(value.into());
                }
                Output::Send(..) | Output::RegisterFailed { .. } | Output::Lost { .. } | Output::StateChanged(_) => {}
            }
        }
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }
}

impl Row {
    fn frame(&self) -> Frame {
        let Self { id, topic, secs } = self;
        Frame::Text(json!({"id": **id, "time": secs, "event": "message", "topic": topic, "message": "x"}).to_string())
    }
}

fn session(life: u8, cursor: Option<Arc<str>>, channels: &BTreeMap<u64, Arc<str>>, now: Now) -> Session {
    let channel = |(n, topic): (&u64, &Arc<str>)| Channel {
        registration: RegistrationId(*n),
        channel: topic.clone(),
        vapid: None,
        endpoint: format!("{BASE}{topic}?up=1").into(),
    };
    let channels = channels.iter().map(channel).collect();
    Session::new(BASE.into(), false, cursor, channels, [life; 32], LinkIds::new(u32::from(life)), now)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn whatever_is_stored_comes_soon_and_the_cursor_never_passes_it(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.step(Step::Refuse(false));
        world.step(Step::Allow(true));
        world.step(Step::Roam);
        // What was asked for just before is given up, and whoever waits out a backoff does so no longer.
        world.pass(CONNECT_TIMEOUT);
        world.session.handle_network(world.now);
        world.drain();
        let connects = world.connects;
        world.pass(Duration::from_secs(60));
        let mut made = world.connects - connects;
        world.step(Step::Safe);
        for row in &world.rows {
            prop_assert!(world.safe.contains(&row.id), "{} did not come", row.id);
        }
        // One that is found dead, one in its place, one to look again, and what was due for registrations.
        prop_assert!(made <= 5, "{made} connections");
        made = world.connects;
        world.pass(Duration::from_secs(900));
        prop_assert_eq!(world.connects, made, "it goes on looking");
    }
}
