//! What identifies a message: MQTT has no id for one, and a message that comes again must be known again.
//!
//! What there is: a packet id, which a broker keeps until it has our PUBACK and then uses for another message, and DUP,
//! which it sets when it sends a message again over another link (MQTT 5.0 §3.3.1.1, §4.4). So the id of a message is a
//! hash of **packet id, topic, payload and era**, the era being a number that tells uses of the same packet id for the
//! same content apart:
//!
//! - Not DUP: a message never sent before. It gets the era of now; if that era has had the same packet id with the same
//!   content, a new era begins. So equal messages have different ids.
//! - DUP, known in this life (same packet id, same content, not surely acknowledged): the id it had.
//! - DUP, not known in this life: an earlier life may have had it. Then it was the era the earlier life ended in, except
//!   for the packet ids remembered otherwise. So it gets the same id after a crash, though nothing is written per message.
//! - A life begins a new era with its first new message, because it knows nothing of the contents of earlier lives.
//!
//! Remembered is one short text, `ERA;PACKET:ERA,…`: written when an era begins (once a life, then on equal content and
//! each `USED_LIMIT` messages), and when a packet id changes its era otherwise. The list holds packet ids that may come
//! again and belong to another era; it is empty nearly always.
//!
//! An acknowledgement sent is not one received. A packet id counts as acknowledged when the server has answered a ping sent
//! after it; until then the message may come again. After many acknowledgements a ping is asked for.
//!
//! **Guaranteed**, if the broker keeps to the specification: a message has the same id each time it comes, over links,
//! crashes and restarts of this daemon; two messages have different ids even if their contents are equal. Three gaps,
//! all of them about the moment of a failure: (1) a message lost on the way when the link broke, with the very content
//! and packet id of one whose acknowledgement was under way on that link, cannot be told from that one coming again, by
//! anybody; it is taken for the same. Payloads of Web Push are encrypted and never equal. (2) While
//! the disk takes nothing the text cannot be written, and a crash may give messages of that time another id when they come
//! again; otherwise the core hands none on before it is durable. (3) A broker
//! that itself falls back behind our acknowledgements (killed without its state on disk) may send old messages as new
//! ones. A sender closes all three with the user property `id`.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};

/// Contents remembered per era; then a new era begins.
const USED_LIMIT: usize = 512;
/// Acknowledgements held at most, in windows.
const HELD_WINDOWS: usize = 16;
/// Pings on the way at a time; there are never more than two.
const PINGS_LIMIT: usize = 8;
/// Exceptions read back at most: a packet id each.
const EXCEPTIONS_LIMIT: usize = 4096;

/// Packet ids and what they stand for.
#[derive(Debug)]
pub(super) struct Ledger {
    era: u32,
    /// Whether `era` may be used for new messages: not before this life, or this session of the server, has begun its own.
    begun: bool,
    /// What earlier lives left, until all of it has come again.
    inherited: Option<Eras>,
    /// What is remembered.
    told: Eras,
    flights: BTreeMap<u16, Flight>,
    /// Acknowledged on this link, oldest first: number and packet id.
    acknowledged: VecDeque<(u64, u16)>,
    acks: u64,
    /// Pings on the way, and the acknowledgements that went out before each.
    pings: VecDeque<u64>,
    /// Acknowledgements after which a ping is wanted.
    window: usize,
    /// Counts links.
    link: u32,
    /// Contents with their packet ids of the era of now.
    used: HashSet<u64>,
    changed: bool,
}

/// The era of each packet id that may come again.
#[derive(Clone, Debug, Default)]
struct Eras {
    era: u32,
    exceptions: BTreeMap<u16, u32>,
}

impl Eras {
    fn of(&self, packet: u16) -> u32 {
        self.exceptions.get(&packet).copied().unwrap_or(self.era)
    }
}

#[derive(Debug)]
struct Flight {
    content: u128,
    era: u32,
    id: Arc<str>,
    /// The link it came over last.
    link: u32,
    acknowledged: Option<u64>,
}

impl Ledger {
    /// What an earlier life remembered. After `window` acknowledgements a ping is wanted.
    pub(super) fn new(remembered: Option<&str>, window: usize) -> Self {
        let told = remembered.and_then(parse).unwrap_or_default();
        Self {
            era: told.era,
            begun: false,
            inherited: Some(told.clone()),
            told,
            flights: BTreeMap::new(),
            acknowledged: VecDeque::new(),
            acks: 0,
            pings: VecDeque::new(),
            window,
            link: 0,
            used: HashSet::new(),
            changed: false,
        }
    }

    /// The server took the link; `session_present`: with the session of before.
    pub(super) fn connected(&mut self, session_present: bool) {
        self.link = self.link.wrapping_add(1);
        self.acknowledged.clear();
        self.pings.clear();
        if !session_present {
            // Packet ids begin anew, and so must what they stand for.
            self.begun &= self.flights.is_empty() && self.inherited.is_none();
            self.flights.clear();
            self.inherited = None;
        }
    }

    /// The id of a message that came with a packet id; `None` when it is on its way to be safe already, from this link.
    pub(super) fn id(&mut self, packet: u16, duplicate: bool, topic: &str, payload: &[u8]) -> Option<Arc<str>> {
        let content = content(topic, payload);
        if let Some(flight) = self.flights.get_mut(&packet).filter(|flight| flight.content == content) {
            let here = flight.link == self.link;
            if here && flight.acknowledged.is_none() {
                return None;
            }
            // Without DUP it can only be the same if the packet id was not free for another.
            if duplicate || (!here && flight.acknowledged.is_none()) {
                flight.link = self.link;
                flight.acknowledged = None;
                return Some(Arc::clone(&flight.id));
            }
        }
        if duplicate {
            if let Some(id) = self.moved(packet, content) {
                return Some(id);
            }
            if let Some(inherited) = &self.inherited {
                let era = inherited.of(packet);
                return Some(self.fly(packet, content, era));
            }
        }
        if !self.begun || self.used.len() >= USED_LIMIT || self.used.contains(&use_of(packet, content)) {
            self.begin();
        }
        self.used.insert(use_of(packet, content));
        Some(self.fly(packet, content, self.era))
    }

    /// The packet id stands for a message that has an id of its own.
    pub(super) fn forget(&mut self, packet: u16) {
        self.flights.remove(&packet);
    }

    /// The message is acknowledged, as far as this side knows.
    pub(super) fn acknowledged(&mut self, packet: u16) {
        self.acks += 1;
        if let Some(flight) = self.flights.get_mut(&packet) {
            flight.acknowledged = Some(self.acks);
            self.acknowledged.push_back((self.acks, packet));
        }
        // A server that answers no pings.
        while self.acknowledged.len() > HELD_WINDOWS * self.window {
            self.received_first();
        }
    }

    /// Whether a ping would let go of much.
    pub(super) fn wants_ping(&self) -> bool {
        self.pings.is_empty() && self.acknowledged.len() >= self.window
    }

    /// A ping goes out behind the acknowledgements.
    pub(super) fn pinged(&mut self) {
        if self.pings.len() < PINGS_LIMIT {
            self.pings.push_back(self.acks);
        }
    }

    /// The oldest ping is answered; `old_link`: the link is up for long enough for everything to have come again.
    pub(super) fn answered(&mut self, old_link: bool) {
        let Some(pinged) = self.pings.pop_front() else { return };
        while self.acknowledged.front().is_some_and(|(number, _)| *number <= pinged) {
            self.received_first();
        }
        if old_link {
            let link = self.link;
            self.flights.retain(|_, flight| flight.link == link);
            self.inherited = None;
        }
    }

    /// What to remember, if it is not what was remembered last.
    pub(super) fn take_changed(&mut self) -> Option<String> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let mut exceptions = self.inherited.as_ref().map(|eras| eras.exceptions.clone()).unwrap_or_default();
        exceptions.extend(self.flights.iter().map(|(packet, flight)| (*packet, flight.era)));
        exceptions.retain(|_, era| *era != self.era);
        let list: Vec<String> = exceptions.iter().map(|(packet, era)| format!("{packet}:{era}")).collect();
        self.told = Eras { era: self.era, exceptions };
        Some(format!("{};{}", self.era, list.join(",")))
    }

    /// A broker that gives a message another packet id when it sends it again. One that keeps to the specification sends
    /// the unacknowledged ones first and as they were, so that none is left to be taken for another.
    fn moved(&mut self, packet: u16, content: u128) -> Option<Arc<str>> {
        let from = *self
            .flights
            .iter()
            .find(|(_, flight)| flight.content == content && flight.link != self.link && flight.acknowledged.is_none())?
            .0;
        let mut flight = self.flights.remove(&from)?;
        flight.link = self.link;
        let id = Arc::clone(&flight.id);
        self.flights.insert(packet, flight);
        Some(id)
    }

    fn fly(&mut self, packet: u16, content: u128, era: u32) -> Arc<str> {
        // Whether a crash now would find it again.
        self.changed |= self.told.of(packet) != era;
        if self.flights.len() >= 2 * HELD_WINDOWS * self.window {
            let link = self.link;
            self.flights.retain(|_, flight| flight.link == link);
        }
        let id = id_of(packet, content, era);
        let flight = Flight { content, era, id: Arc::clone(&id), link: self.link, acknowledged: None };
        self.flights.insert(packet, flight);
        id
    }

    fn begin(&mut self) {
        self.era = self.era.wrapping_add(1);
        self.begun = true;
        self.used.clear();
    }

    fn received_first(&mut self) {
        if let Some((number, packet)) = self.acknowledged.pop_front()
            && self.flights.get(&packet).is_some_and(|flight| flight.acknowledged == Some(number))
        {
            self.flights.remove(&packet);
        }
    }
}

fn parse(text: &str) -> Option<Eras> {
    let (era, list) = text.split_once(';')?;
    let exceptions = list.split(',').take(EXCEPTIONS_LIMIT).filter_map(|item| {
        let (packet, era) = item.split_once(':')?;
        Some((packet.parse().ok()?, era.parse().ok()?))
    });
    Some(Eras { era: era.parse().ok()?, exceptions: exceptions.collect() })
}

/// The id of a message that is the same whenever it comes: a retained one.
pub(super) fn retained_id(topic: &str, payload: &[u8]) -> Arc<str> {
    text_of(hash(&[b"retained", &content(topic, payload).to_be_bytes()]))
}

/// The id of a message that never comes again: one of QoS 0.
pub(super) fn passing_id(random: u64) -> Arc<str> {
    text_of(hash(&[b"passing", &random.to_be_bytes()]))
}

fn id_of(packet: u16, content: u128, era: u32) -> Arc<str> {
    text_of(hash(&[b"message", &era.to_be_bytes(), &packet.to_be_bytes(), &content.to_be_bytes()]))
}

fn use_of(packet: u16, content: u128) -> u64 {
    // The low half of a hash is one.
    hash(&[&packet.to_be_bytes(), &content.to_be_bytes()]) as u64
}

fn content(topic: &str, payload: &[u8]) -> u128 {
    hash(&[topic.as_bytes(), &[0], payload])
}

fn text_of(hash: u128) -> Arc<str> {
    BASE64_URL_SAFE_NO_PAD.encode(hash.to_be_bytes()).into()
}

/// FNV-1a of 128 bits: must be the same in every version of this program. Nobody gains by a collision: only who may post
/// to a registration can make one, with two messages of their own.
fn hash(parts: &[&[u8]]) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    parts.iter().flat_map(|part| part.iter()).fold(BASIS, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: usize = 4;

    /// What goes over the wire to the client.
    #[derive(Clone, Debug)]
    enum Down {
        Message { packet: u16, duplicate: bool, content: u8 },
        Pong,
    }

    #[derive(Clone, Copy, Debug)]
    enum Up {
        Ack(u16),
        Ping,
    }

    /// A broker that keeps to the specification.
    #[derive(Debug, Default)]
    struct Broker {
        /// Takes the lowest free packet id instead of the next one.
        lowest: bool,
        next: u16,
        queue: VecDeque<u8>,
        inflight: VecDeque<(u16, u8)>,
    }

    impl Broker {
        fn pump(&mut self, down: &mut VecDeque<Down>) {
            while self.inflight.len() < WINDOW
                && let Some(content) = self.queue.pop_front()
            {
                let free = |packet: &u16| self.inflight.iter().all(|(other, _)| other != packet);
                let start = if self.lowest { 1 } else { self.next + 1 };
                let packet = (start..).find(free).unwrap();
                self.next = packet;
                self.inflight.push_back((packet, content));
                down.push_back(Down::Message { packet, duplicate: false, content });
            }
        }

        fn take(&mut self, up: Up, down: &mut VecDeque<Down>) {
            match up {
                Up::Ack(packet) => self.inflight.retain(|(other, _)| *other != packet),
                Up::Ping => down.push_back(Down::Pong),
            }
            self.pump(down);
        }
    }

    struct World {
        broker: Broker,
        ledger: Ledger,
        remembered: Option<String>,
        writes: usize,
        /// What delivery knows, which is durable.
        seen: HashSet<Arc<str>>,
        /// Times each content was handed to the app, and sent.
        had: BTreeMap<u8, u32>,
        sent: BTreeMap<u8, u32>,
        unsafe_packets: VecDeque<u16>,
        down: VecDeque<Down>,
        up: VecDeque<Up>,
    }

    impl World {
        fn new(lowest: bool) -> Self {
            let mut world = Self {
                broker: Broker { lowest, ..Broker::default() },
                ledger: Ledger::new(None, WINDOW),
                remembered: None,
                writes: 0,
                seen: HashSet::new(),
                had: BTreeMap::new(),
                sent: BTreeMap::new(),
                unsafe_packets: VecDeque::new(),
                down: VecDeque::new(),
                up: VecDeque::new(),
            };
            world.ledger.connected(false);
            world
        }

        fn publish(&mut self, content: u8) {
            *self.sent.entry(content).or_default() += 1;
            self.broker.queue.push_back(content);
            self.broker.pump(&mut self.down);
        }

        /// The client reads one packet.
        fn read(&mut self) {
            match self.down.pop_front() {
                Some(Down::Message { packet, duplicate, content }) => {
                    if let Some(id) = self.ledger.id(packet, duplicate, "t", &[content]) {
                        if self.seen.insert(id) {
                            *self.had.entry(content).or_default() += 1;
                        }
                        self.unsafe_packets.push_back(packet);
                    }
                }
                Some(Down::Pong) => self.ledger.answered(true),
                None => {}
            }
            if let Some(text) = self.ledger.take_changed() {
                self.remembered = Some(text);
                self.writes += 1;
            }
        }

        fn safe(&mut self) {
            if let Some(packet) = self.unsafe_packets.pop_front() {
                self.ledger.acknowledged(packet);
                self.up.push_back(Up::Ack(packet));
            }
        }

        fn ping(&mut self) {
            self.ledger.pinged();
            self.up.push_back(Up::Ping);
        }

        /// The broker reads one packet.
        fn serve(&mut self) {
            if let Some(up) = self.up.pop_front() {
                self.broker.take(up, &mut self.down);
            }
        }

        fn cut(&mut self, crash: bool) {
            self.down.clear();
            self.up.clear();
            self.unsafe_packets.clear();
            if crash {
                self.ledger = Ledger::new(self.remembered.as_deref(), WINDOW);
            }
            self.ledger.connected(true);
            let again = self.broker.inflight.iter();
            self.down.extend(again.map(|(packet, content)| Down::Message {
                packet: *packet,
                duplicate: true,
                content: *content,
            }));
            self.broker.pump(&mut self.down);
        }

        /// Until nothing is on the way.
        fn rest(&mut self) {
            loop {
                while !self.down.is_empty() || !self.up.is_empty() || !self.unsafe_packets.is_empty() {
                    self.read();
                    self.safe();
                    self.serve();
                }
                if self.ledger.acknowledged.is_empty() {
                    return;
                }
                self.ping();
            }
        }

        fn step(&mut self, (what, content): (u8, u8)) {
            match what {
                0..=3 => self.publish(content),
                4..=9 => self.read(),
                10..=14 => self.safe(),
                15..=18 => self.serve(),
                19 if self.ledger.pings.len() < PINGS_LIMIT => self.ping(),
                19 => {}
                20 | 21 => self.cut(false),
                _ => self.cut(true),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

        #[test]
        fn messages_that_differ_come_once_whatever_breaks(
            lowest: bool,
            steps in prop::collection::vec(0_u8..24, 0..250),
        ) {
            let mut world = World::new(lowest);
            for (content, what) in steps.into_iter().enumerate() {
                world.step((what, content as u8));
            }
            world.rest();
            prop_assert_eq!(&world.had, &world.sent);
        }

        #[test]
        fn equal_messages_each_come_once_whatever_breaks_if_packet_ids_differ(
            steps in prop::collection::vec((0_u8..24, 0_u8..2), 0..250),
        ) {
            let mut world = World::new(false);
            for step in steps {
                world.step(step);
            }
            world.rest();
            prop_assert_eq!(&world.had, &world.sent);
        }

        #[test]
        fn equal_messages_with_equal_packet_ids_each_come_once_if_nothing_is_cut_while_on_its_way(
            steps in prop::collection::vec((0_u8..24, 0_u8..2), 0..250),
        ) {
            let mut world = World::new(true);
            for step in steps {
                if step.0 >= 20 {
                    world.rest();
                }
                world.step(step);
            }
            world.rest();
            prop_assert_eq!(&world.had, &world.sent);
        }

        #[test]
        fn equal_messages_are_not_lost_if_none_is_lost_on_its_way(
            steps in prop::collection::vec((0_u8..24, 0_u8..2), 0..250),
        ) {
            // What was sent arrives, acknowledgements need not.
            let mut world = World::new(true);
            for step in steps {
                if step.0 >= 20 {
                    while !world.down.is_empty() {
                        world.read();
                    }
                }
                world.step(step);
            }
            world.rest();
            prop_assert_eq!(&world.had, &world.sent);
        }

        #[test]
        fn any_remembered_text_is_survived(text in "[0-9:;,x]{0,60}") {
            let mut ledger = Ledger::new(Some(&text), WINDOW);
            ledger.connected(true);
            ledger.id(1, true, "t", b"x");
            ledger.id(2, false, "t", b"x");
            ledger.take_changed();
        }
    }

    #[test]
    fn little_is_written_and_little_is_held() {
        let mut world = World::new(true);
        for n in 0..2000_u32 {
            world.down.push_back(Down::Message { packet: (n % 3 + 1) as u16, duplicate: false, content: 0 });
            let Some(Down::Message { packet, .. }) = world.down.pop_back() else { unreachable!() };
            assert!(world.ledger.id(packet, false, "t", &n.to_be_bytes()).is_some());
            world.ledger.acknowledged(packet);
            world.writes += usize::from(world.ledger.take_changed().is_some());
        }
        // One for each era, and one for each packet id that could still have come again when it began.
        assert!(world.writes <= (2000 / USED_LIMIT + 1) * 4, "{}", world.writes);
        assert!(world.ledger.flights.len() <= 3 && world.ledger.acknowledged.len() <= HELD_WINDOWS * WINDOW);
    }

    #[test]
    fn a_restart_with_nothing_on_the_way_writes_once() {
        let mut world = World::new(false);
        for life in 0..5 {
            for content in 0..20 {
                world.publish(content + 20 * life);
            }
            world.rest();
            world.cut(true);
        }
        assert_eq!(world.writes, 5);
        assert_eq!(world.remembered.as_deref(), Some("5;"));
    }

    #[test]
    fn an_id_is_the_same_in_every_version_of_this_program() {
        assert_eq!(&*id_of(7, content("up/topic", b"body"), 3), "kP1a_8SpqxhSM7vrZgrD5A");
    }

    #[test]
    fn a_broker_that_changes_packet_ids_is_understood_within_a_life() {
        let mut ledger = Ledger::new(None, WINDOW);
        ledger.connected(false);
        let first = ledger.id(1, false, "t", b"same").unwrap();
        let second = ledger.id(2, false, "t", b"same").unwrap();
        assert_ne!(first, second);
        ledger.connected(true);
        assert_eq!(ledger.id(11, true, "t", b"same"), Some(first));
        assert_eq!(ledger.id(12, true, "t", b"same"), Some(second));
    }

    #[test]
    fn a_broker_that_forgets_dup_is_understood_within_a_life() {
        let mut ledger = Ledger::new(None, WINDOW);
        ledger.connected(false);
        let first = ledger.id(1, false, "t", b"same").unwrap();
        ledger.connected(true);
        assert_eq!(ledger.id(1, false, "t", b"same"), Some(first));
    }
}
