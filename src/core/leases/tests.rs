use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const BACKGROUND: Facts = Facts { background: true, audio: false, call: false };
const FRONT: Facts = Facts { background: false, audio: false, call: false };

fn app() -> AppKey {
    AppKey::new(Bus::Session(1000), "org.example.App")
}

fn holder() -> Owner {
    Owner(":1.7".into())
}

fn wish(kind: LeaseKind) -> Wish {
    Wish { holder: holder(), kind, reason: "r".into(), time: None }
}

fn at(secs: u64) -> Instant {
    Instant::from_nanos(0) + Duration::from_secs(secs)
}

/// Leases of one app, driven by their own timers.
struct Driven {
    leases: Leases,
    now: Instant,
    /// What came out, with the second it came in.
    out: Vec<(u64, Output)>,
}

impl Driven {
    fn new(facts: Facts, kinds: &[LeaseKind]) -> Self {
        let mut driven = Self { leases: Leases::default(), now: at(0), out: Vec::new() };
        for kind in kinds {
            driven.leases.take(&app(), wish(*kind), driven.now).unwrap();
        }
        driven.see(facts);
        driven
    }

    fn see(&mut self, facts: Facts) {
        self.leases.observe(&app(), facts, self.now);
        self.drain();
    }

    /// On to this second, with every timer in between.
    fn run_to(&mut self, secs: u64) {
        while let Some(due) = self.leases.poll_timeout().filter(|due| *due <= at(secs)) {
            assert!(due > self.now || self.now == at(0), "a timer that is due again at once");
            self.now = due;
            self.leases.handle_timeout(self.now);
            self.drain();
        }
        self.now = at(secs);
    }

    fn drain(&mut self) {
        let secs = self.now.since(at(0)).as_secs();
        while let Some(output) = self.leases.poll_output() {
            self.out.push((secs, output));
        }
    }

    fn endings(&self) -> Vec<(u64, u64)> {
        let of = |(secs, output): &(u64, Output)| match output {
            Output::Ending { within, .. } => Some((*secs, within.as_secs())),
            _ => None,
        };
        self.out.iter().filter_map(of).collect()
    }

    fn ended(&self) -> Vec<(u64, u32)> {
        let of = |(secs, output): &(u64, Output)| match output {
            Output::Ended(_, id) => Some((*secs, id.0)),
            _ => None,
        };
        self.out.iter().filter_map(of).collect()
    }

    fn sentences(&self) -> Vec<(u64, Option<&str>)> {
        let of = |(secs, output): &'_ (u64, Output)| match output {
            Output::Keeps(_, _) => Some(*secs),
            _ => None,
        };
        let text = |output| match output {
            &(_, Output::Keeps(_, Some(ref text))) => Some(&**text),
            _ => None,
        };
        self.out.iter().filter_map(|out| Some((of(out)?, text(out)))).collect()
    }
}

#[test]
fn each_kind_has_its_time_and_its_end_is_announced() {
    use LeaseKind::{Audio, Call, Navigation, Sync, Task, Transfer};
    let plays = Facts { audio: true, ..BACKGROUND };
    let calls = Facts { call: true, ..BACKGROUND };
    // Kind, what is to be seen, and after how many seconds in the background it ends.
    for (kind, facts, end) in [
        (Task, BACKGROUND, Some(30)),
        (Task, plays, Some(30)),
        (Sync, BACKGROUND, Some(60)),
        (Transfer, BACKGROUND, Some(6 * 3600)),
        (Navigation, BACKGROUND, Some(12 * 3600)),
        (Audio, plays, None),
        (Audio, BACKGROUND, Some(30)),
        (Audio, calls, Some(30)),
        (Call, calls, None),
        (Call, BACKGROUND, Some(30)),
        (Call, plays, Some(30)),
        (Transfer, FRONT, None),
        (Task, FRONT, None),
        (Audio, FRONT, None),
    ] {
        let mut driven = Driven::new(facts, &[kind]);
        driven.run_to(23 * 3600);
        assert_eq!(driven.ended(), end.map(|end| (end, 1)).into_iter().collect::<Vec<_>>(), "{kind:?} {facts:?}");
        assert_eq!(driven.endings(), end.map(|end| (end - 5, 5)).into_iter().collect::<Vec<_>>(), "{kind:?}");
        let last = driven.sentences().last().unwrap().1;
        assert_eq!(last.is_some(), end.is_none(), "{kind:?}");
        assert_eq!(driven.leases.poll_timeout(), None, "no timer while nothing is due: {kind:?} {facts:?}");
    }
}

#[test]
fn less_may_be_asked_for_and_more_is_not_given() {
    for (asked, end) in [(3, 3), (10, 10), (100, 30)] {
        let mut leases = Leases::default();
        let time = Some(Duration::from_secs(asked));
        leases.take(&app(), Wish { time, ..wish(LeaseKind::Task) }, at(0)).unwrap();
        let mut driven = Driven { leases, now: at(0), out: Vec::new() };
        driven.see(BACKGROUND);
        driven.run_to(200);
        assert_eq!(driven.ended(), [(end, 1)]);
        assert_eq!(driven.endings(), [(end.saturating_sub(5), end.min(5))], "announced as soon as can be");
    }
}

#[test]
fn time_runs_in_the_background_alone() {
    let mut driven = Driven::new(BACKGROUND, &[LeaseKind::Task]);
    driven.run_to(27);
    assert_eq!(driven.endings(), [(25, 5)]);
    driven.see(FRONT);
    driven.run_to(1000);
    assert!(driven.ended().is_empty());
    driven.leases.sleep(true, driven.now);
    driven.see(BACKGROUND);
    driven.run_to(2000);
    assert!(driven.ended().is_empty(), "nor while the machine sleeps");
    driven.leases.sleep(false, driven.now);
    driven.drain();
    driven.run_to(3000);
    assert_eq!(driven.ended(), [(2003, 1)]);
    assert_eq!(driven.endings(), [(25, 5), (2000, 3)], "announced anew");
}

#[test]
fn what_is_not_to_be_seen_counts_as_a_task_until_it_is() {
    let mut driven = Driven::new(BACKGROUND, &[LeaseKind::Audio]);
    driven.run_to(20);
    driven.see(Facts { audio: true, ..BACKGROUND });
    driven.run_to(5000);
    driven.see(BACKGROUND);
    driven.run_to(5004);
    driven.see(Facts { audio: true, ..BACKGROUND });
    driven.run_to(6000);
    let demotions = |driven: &Driven| {
        driven.out.iter().filter(|(_, output)| matches!(output, Output::Note(_, "lease-demoted", _))).count()
    };
    assert_eq!(demotions(&driven), 1, "{:?}", driven.out);
    let plain = Some("it holds a lease: audio \"r\"");
    let demoted = Some("it holds a lease that counts as a task: audio \"r\"");
    assert_eq!(driven.sentences(), [(0, plain), (5, demoted), (20, plain)]);
    driven.see(BACKGROUND);
    driven.run_to(6029);
    // Looked at it is not needed, and what was not to be seen is forgotten.
    driven.see(FRONT);
    driven.run_to(7000);
    driven.see(BACKGROUND);
    driven.run_to(9000);
    assert_eq!(driven.ended(), [(7030, 1)]);
    assert_eq!(driven.leases.apps().count(), 0);
}

#[test]
fn budgets_are_by_the_clock_and_for_a_day() {
    let mut driven = Driven::new(BACKGROUND, &[LeaseKind::Task; 8]);
    driven.run_to(30);
    assert_eq!(driven.ended().len(), 8);
    // Eight at once were 30 s; nineteen more are left of ten minutes.
    for round in 1..20 {
        driven.leases.take(&app(), wish(LeaseKind::Task), driven.now).unwrap();
        driven.see(BACKGROUND);
        driven.run_to(30 + 30 * round);
    }
    let refusal = driven.leases.take(&app(), wish(LeaseKind::Task), driven.now).unwrap_err();
    let text = refusal.to_string();
    assert!(text.contains("10 min of \"task\"") && text.contains("more in 24 h"), "{text}");
    // Of other kinds, and for other apps, there is as much as ever.
    driven.leases.take(&app(), wish(LeaseKind::Sync), driven.now).unwrap();
    let other = AppKey::new(Bus::Session(1000), "org.example.Other");
    driven.leases.take(&other, wish(LeaseKind::Task), driven.now).unwrap();
    // What is demoted to a task has no more of it either.
    driven.leases.take(&app(), wish(LeaseKind::Audio), driven.now).unwrap();
    driven.see(BACKGROUND);
    let before = driven.ended().len();
    driven.run_to(606);
    assert_eq!(driven.ended().len(), before + 1, "{:?}", driven.out.last());
    // Registering anew does not bring it back; the next day does.
    driven.leases.vanished(&app(), driven.now);
    assert!(driven.leases.take(&app(), wish(LeaseKind::Task), driven.now).is_err());
    driven.run_to(24 * 3600);
    driven.leases.take(&app(), wish(LeaseKind::Task), driven.now).unwrap();
}

#[test]
fn a_budget_that_runs_out_ends_what_it_was_for() {
    let mut driven = Driven::new(BACKGROUND, &[LeaseKind::Transfer]);
    driven.run_to(3600);
    driven.leases.closed(LeaseId(1), driven.now);
    assert!(driven.leases.poll_timeout().is_none());
    driven.leases.take(&app(), wish(LeaseKind::Transfer), driven.now).unwrap();
    driven.see(BACKGROUND);
    driven.run_to(23 * 3600);
    assert_eq!(driven.ended(), [(6 * 3600, 2)]);
    assert_eq!(driven.endings(), [(6 * 3600 - 5, 5)]);
}

#[test]
fn there_are_not_too_many() {
    let mut leases = Leases::default();
    for number in 0..IN_ALL / PER_APP {
        let app = AppKey::new(Bus::System, format!("org.example.App{number}"));
        for _ in 0..PER_APP {
            leases.take(&app, wish(LeaseKind::Transfer), at(0)).unwrap();
        }
        assert_eq!(leases.take(&app, wish(LeaseKind::Task), at(0)), Err(Refusal::TooManyOfApp(PER_APP)));
    }
    assert_eq!(leases.take(&app(), wish(LeaseKind::Task), at(0)), Err(Refusal::TooMany(IN_ALL)));
    let ids: BTreeSet<u32> = leases.shown(at(0)).map(|lease| lease.id.0).collect();
    assert_eq!(ids.len(), IN_ALL);
    leases.bus_down(Bus::System, at(1));
    let ended = std::iter::from_fn(|| leases.poll_output()).filter(|output| matches!(output, Output::Ended(..)));
    assert_eq!(ended.count(), IN_ALL);
    leases.take(&app(), wish(LeaseKind::Task), at(1)).unwrap();
}

#[test]
fn the_memory_of_budgets_is_bounded() {
    let mut leases = Leases::default();
    for number in 0..2 * REMEMBERED as u64 {
        let app = AppKey::new(Bus::System, format!(":1.{number}"));
        leases.take(&app, wish(LeaseKind::Task), at(number * 2)).unwrap();
        leases.observe(&app, BACKGROUND, at(number * 2));
        leases.vanished(&app, at(number * 2 + 1));
    }
    assert_eq!(leases.spent.len(), REMEMBERED);
    let newest = AppKey::new(Bus::System, format!(":1.{}", 2 * REMEMBERED - 1));
    assert!(leases.spent.contains_key(&newest));
}

#[test]
fn the_strongest_is_named() {
    use LeaseKind::{Call, Task, Transfer};
    let mut leases = Leases::default();
    leases.take(&app(), Wish { reason: "upload of 3 photos".into(), ..wish(Transfer) }, at(0)).unwrap();
    leases.take(&app(), wish(Task), at(0)).unwrap();
    let call = leases.take(&app(), wish(Call), at(0)).unwrap();
    leases.revoke(call, "the user", at(1));
    let out: Vec<Output> = std::iter::from_fn(|| leases.poll_output()).collect();
    let keeps = |text: &str| Output::Keeps(app(), Some(text.into()));
    let upload = keeps("it holds a lease: transfer \"upload of 3 photos\"");
    let note = "the user took it away: lease 3, call \"r\"".to_owned();
    assert_eq!(
        out,
        [
            upload.clone(),
            keeps("it holds a lease: call \"r\""),
            Output::Note(app(), "lease-ended", note),
            Output::Ended(Bus::Session(1000), call),
            upload
        ]
    );
    leases.revoke(call, "the user", at(1));
    assert_eq!(leases.poll_output(), None);
}

#[derive(Clone, Debug)]
enum Op {
    Take(usize, LeaseKind, Option<u8>),
    Close(usize),
    Revoke(usize),
    See(usize, bool, bool, bool),
    Vanish(usize),
    Sleep(bool),
    Wait(u16),
}

fn op() -> impl Strategy<Value = Op> {
    let kind = proptest::sample::select(LeaseKind::ALL.to_vec());
    prop_oneof![
        3 => (0..3_usize, kind, proptest::option::of(1..90_u8)).prop_map(|(app, kind, secs)| Op::Take(app, kind, secs)),
        1 => (0..40_usize).prop_map(Op::Close),
        1 => (0..40_usize).prop_map(Op::Revoke),
        3 => (0..3_usize, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(app, b, a, c)| Op::See(app, b, a, c)),
        1 => (0..3_usize).prop_map(Op::Vanish),
        1 => any::<bool>().prop_map(Op::Sleep),
        6 => (0..20_000_u16).prop_map(Op::Wait),
    ]
}

proptest! {
    #[test]
    fn whatever_happens(ops in proptest::collection::vec(op(), 1..120)) {
        let apps = ["a.A", "b.B", "c.C"].map(|name| AppKey::new(Bus::System, name));
        let mut leases = Leases::default();
        let mut now = at(1);
        // Leases given and not over, with their apps; whether an app is kept awake, as was last said.
        let mut live: BTreeMap<LeaseId, AppKey> = BTreeMap::new();
        let mut keeps: BTreeMap<AppKey, bool> = BTreeMap::new();
        let mut announced: BTreeSet<LeaseId> = BTreeSet::new();
        let mut asleep = false;
        let mut facts = [Facts::default(); 3];
        for op in ops {
            let mut by_time = false;
            let mut until = now;
            match op {
                Op::Take(which, kind, secs) => {
                    let time = secs.map(|secs| Duration::from_secs(secs.into()));
                    if let Ok(id) = leases.take(&apps[which], Wish { time, ..wish(kind) }, now) {
                        prop_assert!(live.insert(id, apps[which].clone()).is_none(), "a number twice");
                        leases.observe(&apps[which], facts[which], now);
                    }
                    let held = live.values().filter(|app| **app == apps[which]).count();
                    prop_assert!(held <= PER_APP);
                }
                Op::Close(nth) | Op::Revoke(nth) => {
                    let Some(id) = live.keys().nth(nth).copied() else { continue };
                    if let Op::Close(_) = op {
                        leases.closed(id, now);
                        live.remove(&id);
                    } else {
                        leases.revoke(id, "the user", now);
                    }
                }
                Op::See(which, background, audio, call) => {
                    facts[which] = Facts { background, audio, call };
                    leases.observe(&apps[which], facts[which], now);
                }
                Op::Vanish(which) => leases.vanished(&apps[which], now),
                Op::Sleep(sleeps) => {
                    asleep = sleeps;
                    leases.sleep(asleep, now);
                }
                Op::Wait(secs) => {
                    until = now + Duration::from_secs(secs.into());
                    by_time = true;
                }
            }
            loop {
                while let Some(output) = leases.poll_output() {
                    match output {
                        Output::Keeps(app, sentence) => {
                            keeps.insert(app, sentence.is_some());
                        }
                        Output::Ending { lease, within, .. } => {
                            prop_assert!(live.contains_key(&lease) && within <= NOTICE && !within.is_zero());
                            announced.insert(lease);
                        }
                        Output::Ended(bus, lease) => {
                            prop_assert_eq!(bus, Bus::System);
                            prop_assert!(live.remove(&lease).is_some(), "ended twice, or after it was closed");
                            if by_time {
                                prop_assert!(announced.contains(&lease), "time took it without a word");
                            }
                        }
                        Output::Note(app, _, reason) => {
                            prop_assert!(apps.contains(&app) && !reason.is_empty());
                        }
                    }
                }
                let next = leases.poll_timeout().filter(|due| by_time && *due <= until);
                let Some(due) = next else { break };
                prop_assert!(due > now, "a timer that is due again at once");
                now = due;
                leases.handle_timeout(now);
            }
            now = now.max(until);
            for app in &apps {
                let holds = live.values().any(|other| other == app);
                prop_assert_eq!(keeps.get(app).copied().unwrap_or_default(), holds, "{}", app);
            }
            let shown: BTreeSet<LeaseId> = leases.shown(now).map(|lease| lease.id).collect();
            prop_assert_eq!(&shown, &live.keys().copied().collect());
            if asleep || facts.iter().all(|facts| !facts.background) {
                prop_assert_eq!(leases.poll_timeout(), None, "a timer while no time runs");
            }
            // No more is used than there is.
            for (budgets, kind) in leases.spent.values().flat_map(|all| all.iter().zip(LeaseKind::ALL)) {
                let most = budget_of(kind).unwrap_or(Duration::MAX);
                prop_assert!(budgets.spent <= most, "{:?} of {:?}: {:?}", budgets.spent, most, kind);
            }
        }
    }
}
