//! Tables, a machine whose memory is short in every way, and random ones.

use proptest::prelude::*;

use super::*;
use crate::model::Bus;

const GIB: u64 = 1 << 20;
const START: u64 = 100_000;

fn at(millis: u64) -> Instant {
    Instant::from_nanos((START * 1000 + millis) * 1_000_000)
}

fn app(number: u64) -> AppKey {
    AppKey::new(Bus::Session(1000), format!("org.example.App{number}"))
}

/// Frozen for 20 minutes, 40 MiB.
fn candidate(number: u64) -> Candidate {
    Candidate {
        app: app(number),
        frozen: Instant::from_nanos((START - 1200) * 1_000_000_000),
        unseen: Instant::from_nanos((START - 1200) * 1_000_000_000),
        uss: Some(40 * 1024),
        paged_out: false,
        can_page_out: true,
        can_end: true,
    }
}

/// A phone with 3 GiB, a third of it available, and half of its swap free.
const PHONE: Reading = Reading {
    trigger: None,
    stalled: Some(Stalled { some_avg10: 0, full_avg10: 0, some_total: 0, full_total: 0 }),
    total: 3 * GIB,
    available: GIB,
    swap_total: 2 * GIB,
    swap_free: GIB,
    zram_used: 0,
    zram_limit: 0,
};

/// A machine where tasks wait as told, and the apps do what they are told, at once or after `slow` ms.
struct Machine {
    pressure: Pressure,
    millis: u64,
    reading: Reading,
    /// In a thousand: some and all tasks wait that long.
    stalls: (u64, u64),
    psi: bool,
    apps: Vec<Candidate>,
    slow: u64,
    busy_until: u64,
    orders: Vec<(u64, AppKey, Deep)>,
    reasons: Vec<String>,
    looks: usize,
}

impl Machine {
    fn new(apps: u64) -> Self {
        Self {
            pressure: Pressure::new(PressureSettings::default(), at(0)),
            millis: 0,
            reading: PHONE,
            stalls: (0, 0),
            psi: true,
            apps: (0..apps).map(candidate).collect(),
            slow: 0,
            busy_until: 0,
            orders: Vec::new(),
            reasons: Vec::new(),
            looks: 0,
        }
    }

    fn look(&mut self, trigger: Option<Stall>) {
        self.looks += 1;
        let reading = Reading { trigger, stalled: self.reading.stalled.filter(|_| self.psi), ..self.reading };
        let busy = self.millis < self.busy_until;
        let Some(order) = self.pressure.read(&reading, &self.apps, busy, at(self.millis)) else { return };
        self.busy_until = self.millis + self.slow;
        self.orders.push((self.millis, order.app.clone(), order.deep));
        self.reasons.push(order.reason);
        let place = self.apps.iter().position(|app| app.app == order.app).expect("it is held");
        match order.deep {
            Deep::PageOut => {
                assert!(self.apps[place].can_page_out);
                (self.apps[place].can_page_out, self.apps[place].paged_out) = (false, true);
            }
            Deep::End => {
                assert!(self.apps[place].can_end);
                self.apps.remove(place);
            }
        }
    }

    /// The kernel triggers once a second while tasks wait; the core looks when it wants to.
    fn pass(&mut self, millis: u64) {
        for _ in 0..millis {
            self.millis += 1;
            if let Some(stalled) = &mut self.reading.stalled {
                stalled.some_total += self.stalls.0;
                stalled.full_total += self.stalls.1;
            }
            let now = at(self.millis);
            if self.pressure.poll_timeout().is_some_and(|due| due <= now) && self.pressure.handle_timeout(now) {
                self.look(None);
            }
            if self.psi && self.millis.is_multiple_of(1000) {
                match self.stalls {
                    (200.., _) | (_, 70..) => self.look(Some(Stall::Severe)),
                    (70.., _) => self.look(Some(Stall::Moderate)),
                    _ => {}
                }
            }
        }
    }

    fn ended(&self) -> Vec<&AppKey> {
        self.orders.iter().filter(|order| order.2 == Deep::End).map(|order| &order.1).collect()
    }

    fn first_end(&self) -> Option<u64> {
        self.orders.iter().find(|order| order.2 == Deep::End).map(|order| order.0)
    }
}

#[test]
fn one_word_is_not_enough() {
    let mut machine = Machine::new(5);
    machine.look(Some(Stall::Severe));
    machine.pass(60_000);
    assert_eq!(machine.orders, []);
    assert!(!machine.pressure.is_pressed());
    assert_eq!(machine.looks, 2, "a second look, and no more");
    assert_eq!(machine.pressure.poll_timeout(), None);
}

#[test]
fn plenty_of_memory_means_that_nothing_is_done() {
    let mut machine = Machine::new(5);
    machine.reading.available = 2 * GIB;
    machine.stalls = (600, 300);
    machine.pass(60_000);
    assert_eq!(machine.orders, []);
}

#[test]
fn nothing_is_looked_at_while_nothing_waits() {
    let mut machine = Machine::new(5);
    machine.pass(600_000);
    assert_eq!(machine.looks, 0);
    assert!(machine.pressure.is_worth_a_look(at(machine.millis)));
    assert!(!machine.pressure.is_worth_a_look(at(machine.millis)), "once is enough");
    machine.look(None);
    machine.pass(600_000);
    assert_eq!(machine.looks, 1);
}

#[test]
fn switched_off_nothing_is_done() {
    let mut machine = Machine::new(5);
    machine.pressure = Pressure::new(PressureSettings { enabled: false, ..PressureSettings::default() }, at(0));
    machine.stalls = (600, 300);
    machine.pass(60_000);
    assert_eq!(machine.orders, []);
    assert!(!machine.pressure.is_worth_a_look(at(machine.millis)));
}

#[test]
fn page_outs_come_first_then_tombstones_one_at_a_time() {
    for (stalls, page_outs) in [((100, 0), 5), ((300, 0), 2), ((100, 80), 2)] {
        let mut machine = Machine::new(9);
        machine.stalls = stalls;
        machine.pass(60_000);
        let deeps: Vec<Deep> = machine.orders.iter().map(|order| order.2).collect();
        let first_end = deeps.iter().position(|deep| *deep == Deep::End).unwrap();
        assert_eq!(first_end, page_outs, "{stalls:?}");
        assert!(deeps[first_end..].iter().all(|deep| *deep == Deep::End));
        assert_eq!(machine.ended().len(), 9);
        let apart: Vec<u64> = machine.orders.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
        assert!(apart.iter().all(|apart| *apart >= 1500), "{apart:?}");
    }
}

#[test]
fn where_there_is_no_room_for_pages_tombstones_come_at_once() {
    let full: [fn(&mut Reading); 3] = [
        |reading| (reading.swap_total, reading.swap_free) = (0, 0),
        |reading| reading.swap_free = reading.swap_total / 5,
        |reading| (reading.zram_used, reading.zram_limit) = (81, 100),
    ];
    for change in full {
        let mut machine = Machine::new(3);
        change(&mut machine.reading);
        machine.stalls = (100, 0);
        machine.pass(10_000);
        assert!(!machine.orders.is_empty() && machine.orders.iter().all(|order| order.2 == Deep::End));
    }
}

/// What goes first: how the second of two apps differs, and which of them goes.
#[test]
fn the_least_valuable_goes_first() {
    let minutes = |minutes: u64| Instant::from_nanos((START - 60 * minutes) * 1_000_000_000);
    type Change = fn(&mut Candidate, &mut Pressure, fn(u64) -> AppKey);
    let cases: [(&str, Change, u64); 8] = [
        ("alike: by name", |_, _, _| {}, 0),
        ("it is larger", |app, _, _| app.uss = Some(50 * 1024), 1),
        ("it is smaller", |app, _, _| app.uss = Some(30 * 1024), 0),
        ("its size is not known", |app, _, _| app.uss = None, 0),
        ("it is paged out, which frees little", |app, _, _| app.paged_out = true, 0),
        (
            "messages wake it",
            |app, pressure, key| {
                app.uss = Some(100 * 1024);
                (0..9).for_each(|_| pressure.woken(&key(1), at(0)));
            },
            0,
        ),
        (
            "it was woken long ago",
            |app, pressure, key| {
                app.uss = Some(50 * 1024);
                let long_ago = Instant::from_nanos(at(0).as_nanos() - 72_000_000_000_000);
                (0..1).for_each(|_| pressure.woken(&key(1), long_ago));
            },
            1,
        ),
        (
            "it came back soon",
            |app, pressure, key| {
                app.uss = Some(50 * 1024);
                pressure.histories.entry(key(1)).or_default().ended = Some(at(0));
                pressure.appeared(&key(1), at(60_000));
            },
            0,
        ),
    ];
    for (name, change, goes) in cases {
        let mut machine = Machine::new(2);
        machine.reading.swap_free = 0;
        change(&mut machine.apps[1], &mut machine.pressure, app);
        machine.stalls = (100, 0);
        machine.pass(4000);
        assert_eq!(machine.ended().first(), Some(&&app(goes)), "{name}");
    }
    let mut machine = Machine::new(2);
    machine.reading.swap_free = 0;
    machine.apps[1].unseen = minutes(200);
    machine.stalls = (100, 0);
    machine.pass(4000);
    assert_eq!(machine.ended().first(), Some(&&app(1)), "nobody has looked at it for long");
}

#[test]
fn the_largest_is_paged_out_first_and_what_is_woken_all_the_time_is_not() {
    let mut machine = Machine::new(3);
    machine.apps[1].uss = Some(80 * 1024);
    machine.apps[2].uss = Some(200 * 1024);
    (0..200).for_each(|_| machine.pressure.woken(&app(2), at(0)));
    machine.stalls = (100, 0);
    machine.pass(6000);
    let paged = machine.orders.iter().filter(|order| order.2 == Deep::PageOut);
    let paged: Vec<&AppKey> = paged.map(|order| &order.1).collect();
    assert_eq!(paged, [&app(1), &app(0)]);
}

#[test]
fn what_cannot_be_started_again_is_never_ended() {
    let mut machine = Machine::new(3);
    machine.apps[1].can_end = false;
    machine.stalls = (700, 600);
    machine.pass(120_000);
    assert_eq!(machine.ended().len(), 2);
    assert_eq!(machine.apps.len(), 1);
    assert_eq!(machine.apps[0].app, app(1));
}

#[test]
fn relief_ends_it_and_moderate_shortness_does_not_begin_it_again_at_once() {
    let mut machine = Machine::new(9);
    machine.stalls = (100, 0);
    machine.pass(6000);
    let before = machine.orders.len();
    assert!(before > 0);
    machine.stalls = (0, 0);
    machine.pass(20_000);
    assert_eq!(machine.orders.len(), before);
    assert!(!machine.pressure.is_pressed());
    assert_eq!(machine.pressure.poll_timeout(), None);
    machine.stalls = (100, 0);
    machine.pass(15_000);
    assert_eq!(machine.orders.len(), before, "it has to cool down");
    machine.pass(30_000);
    assert!(machine.orders.len() > before);
}

#[test]
fn severe_shortness_does_not_wait_for_cooling_down() {
    let mut machine = Machine::new(9);
    machine.stalls = (100, 0);
    machine.pass(6000);
    machine.stalls = (0, 0);
    machine.pass(20_000);
    let before = machine.orders.len();
    machine.stalls = (600, 100);
    machine.pass(4000);
    assert!(machine.orders.len() > before);
}

#[test]
fn what_is_asked_of_one_app_is_waited_for() {
    let mut machine = Machine::new(9);
    machine.slow = 5000;
    machine.stalls = (100, 0);
    machine.pass(30_000);
    let apart: Vec<u64> = machine.orders.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    assert!(!apart.is_empty() && apart.iter().all(|apart| *apart >= 5000), "{apart:?}");
    // Whatever hangs, the others are not spared for ever.
    let mut machine = Machine::new(9);
    machine.slow = 1_000_000;
    machine.stalls = (300, 0);
    machine.pass(30_000);
    assert!(machine.orders.len() >= 4, "{:?}", machine.orders);
}

/// systemd-oomd ends what it finds when all tasks wait 60 % of 30 s, or memory and swap are both 90 % used; earlyoom when
/// less than 10 % of both is left; lifecycle.md §4.7.
#[test]
fn it_is_earlier_than_those_who_kill_whatever_they_find() {
    for slow in [0, 4000, 1_000_000] {
        let mut machine = Machine::new(20);
        machine.slow = slow;
        machine.stalls = (800, 600);
        machine.pass(30_000);
        let first = machine.first_end().unwrap();
        assert!(first < 15_000, "systemd-oomd: ended first after {first} ms, slow {slow}");
        assert!(machine.ended().len() >= 3, "{:?}", machine.orders);
    }
    // Memory and swap go down together; nothing waits yet, and the kernel need not say anything.
    for psi in [true, false] {
        let mut ended_at = None;
        for percent in (0..40).rev() {
            let mut machine = Machine::new(20);
            machine.psi = psi;
            machine.reading.available = 3 * GIB * percent / 100;
            machine.reading.swap_free = 2 * GIB * percent / 100;
            machine.look(None);
            machine.pass(10_000);
            if machine.first_end().is_some() {
                ended_at = ended_at.max(Some(percent));
            }
        }
        assert!(ended_at.is_some_and(|percent| percent > 10), "earlyoom: {ended_at:?}");
    }
}

#[test]
fn little_memory_that_nothing_waits_for_is_worth_page_outs_alone() {
    let mut machine = Machine::new(9);
    machine.psi = false;
    machine.reading.available = 3 * GIB * 14 / 100;
    machine.look(None);
    machine.pass(60_000);
    assert_eq!(machine.orders.len(), 9);
    assert!(machine.orders.iter().all(|order| order.2 == Deep::PageOut));
    // With nothing left to be done it is not looked at for ever.
    assert_eq!(machine.pressure.poll_timeout(), None);
}

#[test]
fn reasons_are_sentences() {
    let stalled = |some, full| Some(Stalled { some_avg10: some, full_avg10: full, some_total: 0, full_total: 0 });
    let cases = [
        (Level::Moderate, stalled(1234, 0), 50, "memory is short: tasks waited for it 12 % of the last 10 s"),
        (
            Level::Severe,
            stalled(6100, 2000),
            50,
            "memory is short: tasks waited for it 61 % of the last 10 s, all of them 20 %",
        ),
        (Level::Moderate, stalled(20, 0), 50, "memory is short: tasks begin to wait for it, and 33 % is available"),
        (Level::Low, None, 50, "memory is short: 33 % of it is available"),
    ];
    for (level, stalled, swap, text) in cases {
        let reading = Reading { stalled, swap_free: 2 * GIB * swap / 100, ..PHONE };
        assert_eq!(why(level, &reading), text);
    }
    let little = Reading { available: 3 * GIB / 10, swap_free: 2 * GIB / 10, stalled: None, ..PHONE };
    assert_eq!(why(Level::Severe, &little), "memory is short: 9 % of it is available, and 9 % of swap is free");
    let none = Reading { swap_total: 0, swap_free: 0, ..little };
    assert_eq!(why(Level::Severe, &none), "memory is short: 9 % of it is available, and there is no swap");
}

#[test]
fn a_look_without_an_answer_is_given_up() {
    let mut pressure = Pressure::new(PressureSettings::default(), at(0));
    assert_eq!(pressure.read(&Reading { trigger: Some(Stall::Moderate), ..PHONE }, &[], false, at(0)), None);
    assert!(pressure.handle_timeout(at(1000)));
    assert!(!pressure.handle_timeout(at(2000)), "it is asked already");
    assert!(!pressure.handle_timeout(at(11_000)));
    assert_eq!(pressure.poll_timeout(), None);
}

#[derive(Clone, Debug)]
enum Op {
    Pass(u64),
    Stalls(u64, u64),
    Available(u64),
    SwapFree(u64),
    Slow(u64),
    Frozen(u64, bool, bool, u64),
    Woken(u64),
    Glance,
    Sleep(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (1..20_000u64).prop_map(Op::Pass),
        3 => (0..1000u64, 0..1000u64).prop_map(|(some, full)| Op::Stalls(some, full.min(some))),
        3 => Just(Op::Stalls(0, 0)),
        2 => (0..60u64).prop_map(Op::Available),
        2 => (0..100u64).prop_map(Op::SwapFree),
        1 => (0..20_000u64).prop_map(Op::Slow),
        6 => (0..20u64, any::<bool>(), any::<bool>(), 0..500_000u64).prop_map(|(n, p, e, u)| Op::Frozen(n, p, e, u)),
        2 => (0..20u64).prop_map(Op::Woken),
        2 => Just(Op::Glance),
        1 => (0..100_000_000u64).prop_map(Op::Sleep),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// `Machine::look` fails when anything is ordered of an app that is not held or cannot do it.
    #[test]
    fn whatever_happens_no_more_is_done_than_needed(psi: bool, ops in prop::collection::vec(op(), 1..60)) {
        let mut machine = Machine::new(0);
        machine.psi = psi;
        for op in ops {
            match op {
                Op::Pass(millis) => machine.pass(millis),
                Op::Stalls(some, full) => machine.stalls = (some, full),
                Op::Available(percent) => machine.reading.available = 3 * GIB * percent / 100,
                Op::SwapFree(percent) => machine.reading.swap_free = 2 * GIB * percent / 100,
                Op::Slow(millis) => machine.slow = millis,
                Op::Frozen(number, can_page_out, can_end, uss) => {
                    machine.apps.retain(|other| other.app != app(number));
                    machine.pressure.appeared(&app(number), at(machine.millis));
                    let frozen = at(machine.millis);
                    let uss = Some(uss).filter(|uss| *uss > 1000);
                    machine.apps.push(Candidate {
                        frozen, unseen: frozen, can_page_out, can_end, uss, ..candidate(number)
                    });
                }
                Op::Woken(number) => {
                    machine.apps.retain(|other| other.app != app(number));
                    machine.pressure.woken(&app(number), at(machine.millis));
                }
                Op::Glance => {
                    if machine.pressure.is_worth_a_look(at(machine.millis)) {
                        machine.look(None);
                    }
                }
                Op::Sleep(millis) => machine.millis += millis,
            }
        }
        for pair in machine.orders.windows(2) {
            prop_assert!(pair[1].0 - pair[0].0 >= 1500, "{:?}", pair);
        }
        // Relief: what was measured before it may count once, and then nothing is done or looked at any more.
        machine.stalls = (0, 0);
        (machine.reading.available, machine.reading.swap_free) = (GIB, GIB);
        machine.pass(6000);
        let (orders, looks) = (machine.orders.len(), machine.looks);
        machine.pass(20_000);
        prop_assert_eq!(machine.orders.len(), orders);
        prop_assert!(machine.looks <= looks + 10);
        prop_assert!(!machine.pressure.is_pressed());
        prop_assert_eq!(machine.pressure.poll_timeout(), None);
    }
}
