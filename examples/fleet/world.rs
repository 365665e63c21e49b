//! One crowd, one server, one clock: a discrete-event simulation, exact and repeatable.
//!
//! Whatever implements [`Daemon`] is driven as the daemon's shell drives it: events in, outputs drained, one deadline.

use std::{cmp::Ordering, collections::BinaryHeap, time::Duration};

use nightporter::{
    core::upstream::Output,
    event::{LinkError, LinkEvent, LinkId},
    time::{Instant, Now, UnixTime},
    view::LinkState,
};

use crate::{
    dialect::Dialect,
    scenario::{Away, Capacity, Cut, Scenario},
};

/// When the links end. By then each phone has been online for a while.
pub(crate) const CUT: Instant = Instant::from_nanos(3600 * SEC);
/// How long after it one looks.
pub(crate) const HORIZON: Duration = Duration::from_secs(1800);
/// Nothing happens before this: the first daemon starts later.
const BEGINNING: Instant = Instant::from_nanos(3000 * SEC);
/// The last phone's link is back: so much longer, for what a session does next.
const AFTERMATH: u64 = 30 * SEC;

/// How long each phone has been online at least when the links end.
const UP_FOR: Duration = Duration::from_secs(120);
const SEC: u64 = 1_000_000_000;
const MS: u64 = 1_000_000;
/// One way between phone and server: from this…
const NEAREST: u64 = 15 * MS;
/// …to ten times this, half of the phones below 47 ms.
const FARTHEST_FACTOR: f64 = 10.0;
/// From the SYN's arrival to the phone's sight of the 101: TCP, TLS 1.3 and the upgrade, in one-way trips.
const HANDSHAKE_TRIPS: u64 = 5;
/// No link, among link numbers.
const NONE: u32 = u32::MAX;

/// What a phone runs.
pub(crate) trait Daemon {
    fn handle_link(&mut self, link: LinkId, event: LinkEvent, now: Now);
    fn handle_timeout(&mut self, now: Now);
    fn handle_network(&mut self, now: Now);
    fn poll_output(&mut self) -> Option<Output>;
    fn poll_timeout(&self) -> Option<Instant>;
}

/// What became of a crowd.
pub(crate) struct Outcome {
    /// Attempts begun in each second after the cut.
    pub(crate) attempts: Vec<u32>,
    /// Channels registered anew in each second after the cut.
    pub(crate) registers: Vec<u32>,
    /// When each phone's link was back, in milliseconds after the cut, sorted; those never back are missing.
    pub(crate) back: Vec<u32>,
    /// How long each phone's link took from the first moment it could be had: server and own network there. Sorted.
    pub(crate) waits: Vec<u32>,
    /// Attempts of each phone until its link was back, sorted.
    pub(crate) tries: Vec<u16>,
    /// Handshakes the server worked on for a phone that had given up.
    pub(crate) wasted: u64,
    pub(crate) phones: usize,
}

/// Runs `phones` daemons through `scenario`. `make` builds one that begins to connect at the time given.
pub(crate) fn run<D: Daemon>(
    scenario: &Scenario,
    dialect: Dialect,
    phones: u32,
    seed: u64,
    make: impl Fn(u32, [u8; 32], Now) -> D,
) -> Outcome {
    let mut world = World::new(scenario, dialect, phones, seed);
    for phone in 0..phones {
        world.admit(phone, &make);
    }
    world.live(CUT.as_nanos());
    world.cut();
    world.live((CUT + HORIZON).as_nanos());
    world.outcome()
}

/// Deterministic randomness without a state: the `n`th number of `seed` (Steele, Lea, Flood: SplitMix64).
pub(crate) const fn random(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct World<'a, D> {
    scenario: &'a Scenario,
    dialect: Dialect,
    seed: u64,
    phones: Vec<Phone<D>>,
    queue: Queue,
    /// When the server will have done the handshakes it has taken on.
    busy_until: u64,
    wasted: u64,
    /// Phones whose link is there; from the cut on: is back.
    online: usize,
    attempts: Vec<u32>,
    registers: Vec<u32>,
}

struct Phone<D> {
    daemon: D,
    /// When its timer event is; 0 for none.
    armed: u64,
    /// One way to the server, in nanoseconds.
    trip: u32,
    /// The link asked for last, unless it is gone or there.
    asked: u32,
    /// The links that are there, the newest first: a session may replace one by another.
    open: [u32; 2],
    tries: u16,
    /// Milliseconds from the cut to the link's return.
    back: u32,
}

enum What {
    Timer,
    /// A SYN reaches the server.
    Syn,
    Refused,
    NoNetwork,
    Busy,
    Open,
    Frame(Box<str>),
    Ping,
    Pong,
    Ended,
    NetworkReturns,
}

impl<'a, D: Daemon> World<'a, D> {
    fn new(scenario: &'a Scenario, dialect: Dialect, phones: u32, seed: u64) -> Self {
        let seconds = HORIZON.as_secs() as usize;
        Self {
            scenario,
            dialect,
            seed,
            phones: Vec::with_capacity(phones as usize),
            queue: Queue::new(CUT + HORIZON),
            busy_until: 0,
            wasted: 0,
            online: 0,
            attempts: vec![0; seconds],
            registers: vec![0; seconds],
        }
    }

    /// A phone whose daemon starts at a moment of its own, so that the server's pings to a crowd are spread.
    fn admit(&mut self, number: u32, make: &impl Fn(u32, [u8; 32], Now) -> D) {
        let seed = random(self.seed, u64::from(number));
        let mut bytes = [0; 32];
        for (n, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&random(seed, n as u64).to_le_bytes());
        }
        let started = CUT - UP_FOR - self.dialect.ping_period().mul_f64(unit(random(seed, 10)));
        let trip = NEAREST as f64 * FARTHEST_FACTOR.powf(unit(random(seed, 11)));
        let daemon = make(number, bytes, at(started.as_nanos()));
        self.phones.push(Phone {
            daemon,
            armed: 0,
            trip: trip as u32,
            asked: NONE,
            open: [NONE; 2],
            tries: 0,
            back: NONE,
        });
        self.drain(number, started.as_nanos());
        self.arm(number);
    }

    fn cut(&mut self) {
        assert_eq!(self.online, self.phones.len(), "everybody is online before the cut");
        self.online = 0;
        let cut = CUT.as_nanos();
        for number in 0..self.phones.len() as u32 {
            let network_back = self.network_back(number);
            let phone = &mut self.phones[number as usize];
            for link in std::mem::replace(&mut phone.open, [NONE; 2]) {
                match self.scenario.cut {
                    Cut::Closed => self.queue.push(cut + u64::from(phone.trip), number, link, What::Ended),
                    Cut::Network { .. } => self.queue.push(cut, number, link, What::Ended),
                    Cut::Silent => {}
                }
            }
            if network_back > cut {
                self.queue.push(network_back, number, NONE, What::NetworkReturns);
            }
        }
    }

    /// Lets time pass until `end`, or until everybody has been back for a little while.
    fn live(&mut self, end: u64) {
        let mut end = end;
        while let Some(Event { at: time, phone: number, link, what }) = self.queue.pop(end) {
            let Some(phone) = self.phones.get_mut(number as usize) else { continue };
            let (now, id) = (at(time), LinkId(u64::from(link)));
            let event = match what {
                What::Timer if phone.armed != time => continue,
                What::Timer => {
                    phone.armed = 0;
                    if phone.daemon.poll_timeout().is_some_and(|due| due <= now.boot) {
                        phone.daemon.handle_timeout(now);
                    }
                    None
                }
                What::NetworkReturns => {
                    phone.daemon.handle_network(now);
                    None
                }
                What::Syn => {
                    self.syn(time, number, link);
                    continue;
                }
                What::Open if phone.asked != link => {
                    self.wasted += 1;
                    continue;
                }
                What::Open => {
                    phone.asked = NONE;
                    phone.open = [link, phone.open[0]];
                    self.queue.push(time + nanos(self.dialect.ping_period()), number, link, What::Ping);
                    if let Some(greeting) = self.dialect.greeting() {
                        self.queue.push(time, number, link, What::Frame(greeting.into()));
                    }
                    Some(LinkEvent::Open)
                }
                What::Ping if !phone.open.contains(&link) => continue,
                What::Ping => {
                    self.queue.push(time + nanos(self.dialect.ping_period()), number, link, What::Ping);
                    Some(LinkEvent::Ping)
                }
                What::Refused => Some(LinkEvent::Failed(LinkError::Connect("connection refused".into()))),
                What::NoNetwork => Some(LinkEvent::Failed(LinkError::Connect("network is unreachable".into()))),
                What::Busy => {
                    let retry_after = self.scenario.retry_after();
                    Some(LinkEvent::Failed(LinkError::Http { status: 503, body: String::new(), retry_after }))
                }
                What::Frame(text) => Some(LinkEvent::Text(text.into())),
                What::Pong => Some(LinkEvent::Pong),
                What::Ended => Some(LinkEvent::Closed { code: None, reason: String::new() }),
            };
            if let Some(event) = event {
                phone.daemon.handle_link(id, event, now);
            }
            let before = self.online;
            self.drain(number, time);
            self.arm(number);
            if self.online > before && self.online == self.phones.len() && time > CUT.as_nanos() {
                end = end.min(time + AFTERMATH);
            }
        }
    }

    /// Carries out what a daemon wants.
    fn drain(&mut self, number: u32, now: u64) {
        let network_back = self.network_back(number);
        let Some(phone) = self.phones.get_mut(number as usize) else { return };
        let trip = u64::from(phone.trip);
        let second = now.checked_sub(CUT.as_nanos()).map(|since| (since / SEC) as usize);
        let count = |counts: &mut Vec<u32>| {
            if let Some(count) = second.and_then(|second| counts.get_mut(second)) {
                *count += 1;
            }
        };
        while let Some(output) = phone.daemon.poll_output() {
            match output {
                Output::Connect { link, .. } => {
                    phone.asked = number_of(link);
                    if network_back > now && second.is_some() {
                        self.queue.push(now + MS, number, phone.asked, What::NoNetwork);
                        continue;
                    }
                    count(&mut self.attempts);
                    if second.is_some() && phone.back == NONE {
                        phone.tries = phone.tries.saturating_add(1);
                    }
                    self.queue.push(now + trip, number, phone.asked, What::Syn);
                }
                Output::Send(link, frame) if phone.open.contains(&number_of(link)) => {
                    let forgotten = self.scenario.forgets && second.is_some();
                    let answer = self.dialect.answer(number, &frame, forgotten);
                    if answer.as_ref().is_some_and(|answer| answer.registers) {
                        count(&mut self.registers);
                    }
                    if let Some(answer) = answer {
                        self.queue.push(now + 2 * trip, number, number_of(link), What::Frame(answer.text.into()));
                    }
                }
                Output::Ping(link) if phone.open.contains(&number_of(link)) => {
                    self.queue.push(now + 2 * trip, number, number_of(link), What::Pong);
                }
                Output::Close(link) => {
                    for known in
                        phone.open.iter_mut().chain([&mut phone.asked]).filter(|known| **known == number_of(link))
                    {
                        *known = NONE;
                    }
                }
                Output::StateChanged(LinkState::Online) if phone.back == NONE => {
                    self.online += 1;
                    if let Some(since) = now.checked_sub(CUT.as_nanos()) {
                        phone.back = u32::try_from(since / MS).unwrap_or(NONE - 1);
                    }
                }
                Output::SendBytes(..)
                | Output::Http(..)
                | Output::Send(..)
                | Output::Ping(_)
                | Output::StateChanged(_)
                | Output::Registered { .. }
                | Output::RegisterFailed { .. }
                | Output::Lost { .. }
                | Output::Message(_)
                | Output::Remember { .. }
                | Output::RememberBehind { .. } => {}
            }
        }
    }

    /// Sets the phone's timer. One that became later is left to fire in vain.
    fn arm(&mut self, number: u32) {
        let Some(phone) = self.phones.get_mut(number as usize) else { return };
        let Some(due) = phone.daemon.poll_timeout() else { return };
        let due = due.as_nanos();
        if phone.armed == 0 || due < phone.armed {
            phone.armed = due;
            self.queue.push(due, number, NONE, What::Timer);
        }
    }

    /// What the server makes of an attempt that arrives.
    fn syn(&mut self, now: u64, number: u32, link: u32) {
        let Some(phone) = self.phones.get(number as usize) else { return };
        let (trip, rest) = (u64::from(phone.trip), HANDSHAKE_TRIPS * u64::from(phone.trip));
        let returns = self.returns();
        if (CUT.as_nanos()..returns).contains(&now) {
            if self.scenario.away == Away::Refuses {
                self.queue.push(now + trip, number, link, What::Refused);
            }
            return;
        }
        let limits = (now >= returns).then_some(self.scenario.capacity);
        let (rate, most) = match limits {
            None | Some(Capacity::Boundless) => {
                self.queue.push(now + rest, number, link, What::Open);
                return;
            }
            Some(Capacity::Sheds { share, queue, .. } | Capacity::Drowns { share, queue }) => (share, queue),
        };
        let start = self.busy_until.max(now);
        if start - now <= nanos(most) {
            let rate = rate * self.phones.len() as f64;
            self.busy_until = start + (SEC as f64 / rate) as u64;
            self.queue.push(self.busy_until + rest, number, link, What::Open);
        } else if matches!(self.scenario.capacity, Capacity::Sheds { .. }) {
            self.queue.push(now + rest, number, link, What::Busy);
        }
    }

    fn returns(&self) -> u64 {
        (CUT + self.scenario.down).as_nanos()
    }

    fn network_back(&self, number: u32) -> u64 {
        match self.scenario.cut {
            Cut::Network { within } => {
                let seed = random(self.seed, u64::from(number));
                (CUT + within.mul_f64(unit(random(seed, 12)))).as_nanos()
            }
            Cut::Closed | Cut::Silent => CUT.as_nanos(),
        }
    }

    fn outcome(self) -> Outcome {
        let base = CUT.as_nanos();
        let mut waits: Vec<u32> = (0_u32..)
            .zip(&self.phones)
            .filter(|(_, phone)| phone.back != NONE)
            .map(|(number, phone)| {
                let possible = self.returns().max(self.network_back(number)) - base;
                phone.back.saturating_sub((possible / MS) as u32)
            })
            .collect();
        let mut back: Vec<u32> = self.phones.iter().map(|phone| phone.back).filter(|back| *back != NONE).collect();
        let mut tries: Vec<u16> = self.phones.iter().map(|phone| phone.tries).collect();
        waits.sort_unstable();
        back.sort_unstable();
        tries.sort_unstable();
        let Self { attempts, registers, wasted, phones, .. } = self;
        Outcome { attempts, registers, back, waits, tries, wasted, phones: phones.len() }
    }
}

struct Event {
    at: u64,
    phone: u32,
    link: u32,
    what: What,
}

/// Events in the order of their time: a calendar of short days, each sorted when it comes.
struct Queue {
    /// From [`BEGINNING`] on.
    days: Vec<Vec<Event>>,
    today: BinaryHeap<Event>,
    day: usize,
}

impl Queue {
    /// A millisecond, as a power of two: what is sorted at a time fits the cache.
    const DAY: u32 = 20;

    fn new(end: Instant) -> Self {
        let days = Self::day_of(end.as_nanos()) + 1;
        Self { days: std::iter::repeat_with(Vec::new).take(days).collect(), today: BinaryHeap::new(), day: 0 }
    }

    const fn day_of(at: u64) -> usize {
        (at.saturating_sub(BEGINNING.as_nanos()) >> Self::DAY) as usize
    }

    /// What would be after the end is not kept.
    fn push(&mut self, at: u64, phone: u32, link: u32, what: What) {
        let day = Self::day_of(at);
        let event = Event { at, phone, link, what };
        if day <= self.day {
            self.today.push(event);
        } else if let Some(day) = self.days.get_mut(day) {
            day.push(event);
        }
    }

    /// The next event before `end`.
    fn pop(&mut self, end: u64) -> Option<Event> {
        loop {
            match self.today.peek() {
                Some(event) if event.at < end => return self.today.pop(),
                Some(_) => return None,
                None => {}
            }
            if self.day >= Self::day_of(end) {
                return None;
            }
            self.day += 1;
            self.today = std::mem::take(self.days.get_mut(self.day)?).into();
        }
    }
}

impl Ord for Event {
    /// The earliest is the greatest, as `BinaryHeap` wants it; at the same time the lower phone goes first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.phone).cmp(&(self.at, self.phone))
    }
}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Event {}

fn number_of(link: LinkId) -> u32 {
    u32::try_from(link.0).unwrap_or(NONE)
}

/// The moment `nanos`, on both clocks.
const fn at(nanos: u64) -> Now {
    Now { boot: Instant::from_nanos(nanos), wall: UnixTime::from_millis(1_800_000_000_000 + nanos / MS) }
}

fn nanos(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

/// From 0 up to 1.
fn unit(random: u64) -> f64 {
    (random >> 11) as f64 / (1_u64 << 53) as f64
}
