//! Random sequences of everything that can happen, against a model of the world that knows what must hold: who may be
//! touched, what is really frozen, which command still waits.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use proptest::prelude::*;

use super::*;
use crate::{
    model::{LifecycleTimes, Profile, VetoKind, ZramSource},
    time::UnixTime,
};

#[derive(Clone, Debug)]
enum Op {
    Appear {
        app: usize,
        again: bool,
        started: bool,
    },
    Vanish(usize),
    /// `whose`: 0 the owner, 1 the one before, 2 another app's process, 3 a failed look.
    Identify {
        app: usize,
        whose: u8,
        protected: bool,
    },
    Die(usize),
    Declare(usize, bool),
    Wanted(usize),
    Pending(usize, bool),
    Delivered(usize, Priority),
    /// The outcome of something asked for; not necessarily in order.
    Resolve {
        which: usize,
        ok: bool,
    },
    Lose(usize),
    /// An outcome nobody asked for.
    Stray(usize, u8),
    Sampled {
        app: usize,
        ok: bool,
        small: bool,
    },
    Command(usize, u8),
    BusDown,
    /// What is watched speaks against holding it still, or no more.
    Veto(usize, bool),
    /// Its windows: 0 in front, 1 behind, 2 not known.
    Seen(usize, u8),
    Lease(usize, bool),
    Listen(usize, bool),
    Prepared(usize),
    /// The inspection asked for first: 0 nothing found, 1 something, 2 it failed.
    Inspected(u8),
    Squeeze(usize, bool),
    Unsqueeze(usize),
    Startable(usize, bool),
    Remove(usize),
    Add(usize),
    Pass(u64),
}

/// Everything that happens by itself.
fn event() -> impl Strategy<Value = Op> {
    let app = 0..APPS;
    prop_oneof![
        3 => (app.clone(), prop::bool::weighted(0.2), any::<bool>())
            .prop_map(|(app, again, started)| Op::Appear { app, again, started }),
        1 => app.clone().prop_map(Op::Vanish),
        4 => (app.clone(), prop_oneof![8 => Just(0u8), 1 => 1..4u8], prop::bool::weighted(0.1))
            .prop_map(|(app, whose, protected)| Op::Identify { app, whose, protected }),
        1 => app.clone().prop_map(Op::Die),
        6 => (app.clone(), prop::bool::weighted(0.8)).prop_map(|(app, background)| Op::Declare(app, background)),
        3 => app.clone().prop_map(Op::Wanted),
        4 => (app.clone(), prop::bool::weighted(0.3)).prop_map(|(app, pending)| Op::Pending(app, pending)),
        2 => (app.clone(), any::<bool>()).prop_map(|(app, urgent)| {
            Op::Delivered(app, if urgent { Priority::Call } else { Priority::Low })
        }),
        8 => (0..8usize, prop::bool::weighted(0.8)).prop_map(|(which, ok)| Op::Resolve { which, ok }),
        1 => (0..8usize).prop_map(Op::Lose),
        6 => (app.clone(), prop::bool::weighted(0.8), prop::bool::weighted(0.3))
            .prop_map(|(app, ok, small)| Op::Sampled { app, ok, small }),
        1 => Just(Op::BusDown),
        3 => (app.clone(), prop::bool::weighted(0.4)).prop_map(|(app, on)| Op::Veto(app, on)),
        3 => (app.clone(), prop_oneof![1 => Just(0u8), 2 => Just(1), 2 => Just(2)]).prop_map(|(app, seen)| Op::Seen(app, seen)),
        2 => (app.clone(), prop::bool::weighted(0.4)).prop_map(|(app, on)| Op::Lease(app, on)),
        1 => (app.clone(), any::<bool>()).prop_map(|(app, on)| Op::Listen(app, on)),
        2 => app.clone().prop_map(Op::Prepared),
        12 => prop_oneof![8 => Just(0u8), 1 => Just(1), 1 => Just(2)].prop_map(Op::Inspected),
        2 => (app.clone(), any::<bool>()).prop_map(|(app, kill)| Op::Squeeze(app, kill)),
        1 => app.clone().prop_map(Op::Unsqueeze),
        3 => (app.clone(), prop::bool::weighted(0.8)).prop_map(|(app, startable)| Op::Startable(app, startable)),
        1 => app.clone().prop_map(Op::Remove),
        2 => app.prop_map(Op::Add),
        8 => prop_oneof![Just(1), Just(10_000), Just(60_000), Just(700_000), 0..100_000u64].prop_map(Op::Pass),
    ]
}

/// The same, and users, and outcomes nobody asked for.
fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        16 => event(),
        1 => (0..APPS, 0..4u8).prop_map(|(app, kind)| Op::Stray(app, kind)),
        1 => (0..APPS, 0..3u8).prop_map(|(app, command)| Op::Command(app, command)),
    ]
}

const APPS: usize = 2;

/// What the model knows of an app.
#[derive(Debug, Default)]
struct Model {
    added: bool,
    declares: bool,
    owner: Option<u64>,
    former: Option<u64>,
    /// The last claim that holds: none, foreground, background.
    claim: Option<Claim>,
    /// As in [`Op::Seen`]; 2 is not known.
    seen: Option<u8>,
    vetoed: bool,
    leased: bool,
    startable: Option<bool>,
    pending: bool,
    by_hand: bool,
    awaited: bool,
    commands: BTreeMap<u8, i32>,
}

impl Model {
    /// Whether somebody says that it is in the background, and nobody that it is not.
    fn background(&self) -> bool {
        match (self.claim, self.seen) {
            (Some(Claim::Foreground), _) | (_, Some(0)) => false,
            (claim, seen) => claim == Some(Claim::Background) || seen == Some(1),
        }
    }

    fn forget_claims(&mut self) {
        (self.claim, self.seen, self.by_hand) = (None, None, false);
    }
}

/// What is really so of a target.
#[derive(Debug)]
struct Real {
    pid: u32,
    protected: bool,
    frozen: bool,
}

#[derive(Clone, Debug)]
enum Asked {
    Freeze(TargetId),
    Thaw(TargetId),
    PageOut(TargetId),
    Kill(TargetId),
}

impl Asked {
    const fn target(&self) -> TargetId {
        match self {
            Self::Freeze(target) | Self::Thaw(target) | Self::PageOut(target) | Self::Kill(target) => *target,
        }
    }
}

struct World {
    life: Lifecycle,
    now: Now,
    profile: Profile,
    apps: [Model; APPS],
    real: BTreeMap<TargetId, Real>,
    asked: Vec<(Asked, Instant)>,
    inspections: VecDeque<TargetId>,
    next: u64,
    /// Something was lost, is stray or failed: deadlines to notice that are in order.
    disturbed: bool,
}

fn key(app: usize) -> AppKey {
    AppKey::new(Bus::Session(1000), ["org.a", "org.b"][app])
}

fn index(app: &AppKey) -> usize {
    usize::from(*app == key(1))
}

fn owner(n: u64) -> Owner {
    Owner(format!(":1.{n}").into())
}

impl World {
    fn new(profile: Profile) -> Self {
        Self {
            life: Lifecycle::new(Rules::new(profile, LifecycleTimes::default()), BTreeMap::new(), &[]),
            now: Now { boot: Instant::from_nanos(1_000_000_000), wall: UnixTime::from_secs(1_700_000_000) },
            profile,
            apps: Default::default(),
            real: BTreeMap::new(),
            asked: Vec::new(),
            inspections: VecDeque::new(),
            next: 1,
            disturbed: false,
        }
    }

    fn run(&mut self, op: &Op) {
        let now = self.now;
        match *op {
            Op::Appear { app, again, started } => self.appear(app, again, started),
            Op::Vanish(app) => {
                self.unclaim(app);
                self.life.vanished(&key(app), now);
            }
            Op::Identify { app, whose, protected } => self.identify(app, whose, protected),
            Op::Die(app) => {
                if let Some(target) = self.life.target_of(&key(app)) {
                    self.die(target);
                }
            }
            Op::Declare(app, background) if self.apps[app].owner.is_some() => {
                let claim = if background { Claim::Background } else { Claim::Foreground };
                self.apps[app].claim = Some(claim);
                self.apps[app].declares = true;
                self.apps[app].by_hand &= background;
                self.life.declare(&key(app), claim, "the shell", now);
            }
            Op::Declare(..) => {}
            Op::Wanted(app) => self.wanted(app),
            Op::Pending(app, pending) => {
                self.apps[app].pending = pending && self.apps[app].added;
                self.apps[app].by_hand &= !pending;
                self.life.set_pending(&key(app), pending, now);
            }
            Op::Delivered(app, priority) => self.life.delivered(&key(app), priority, now),
            Op::Resolve { which, ok } => self.resolve(which, ok),
            Op::Lose(which) if which < self.asked.len() => {
                self.asked.remove(which);
                self.disturbed = true;
            }
            Op::Lose(_) => {}
            Op::Stray(app, kind) => self.stray(app, kind),
            Op::Sampled { app, ok, small } => {
                let uss = if small { 1000 } else { 20_000 };
                let memory = if ok { Ok(Memory { pss: 2 * uss, uss, swap: 0 }) } else { Err("no".into()) };
                if let Some(target) = self.life.target_of(&key(app)) {
                    let _ = self.life.sampled(target, memory, now);
                }
            }
            Op::Command(app, command) => self.command(app, command),
            Op::BusDown => {
                self.apps.iter_mut().for_each(Model::forget_claims);
                self.life.bus_down(Bus::Session(1000), now);
            }
            Op::Veto(app, on) => {
                let veto = Veto { kind: VetoKind::Playback, reason: "it plays sound".into() };
                if let Some(target) = self.life.target_of(&key(app)) {
                    self.apps[app].vetoed = on;
                    self.apps[app].by_hand &= !on;
                    self.life.vetoed(target, if on { vec![veto] } else { Vec::new() }, now);
                }
            }
            Op::Seen(app, seen) if self.is_there(app) => {
                self.apps[app].seen = Some(seen);
                self.apps[app].by_hand &= seen != 0;
                let seen = [Seen::Front("its window is in front".into()), Seen::Behind, Seen::Nothing]
                    [usize::from(seen)]
                .clone();
                self.life.seen(&key(app), seen, now);
            }
            Op::Seen(..) => {}
            Op::Lease(app, on) if self.is_there(app) => {
                self.apps[app].leased = on;
                self.life.leased(&key(app), on.then(|| "it holds a lease".into()), now);
            }
            Op::Lease(..) => {}
            Op::Listen(app, on) => self.life.listens(&key(app), on, now),
            Op::Prepared(app) => self.life.prepared(&key(app), now),
            Op::Inspected(how) => self.inspected(how),
            Op::Squeeze(app, kill) => {
                let squeeze = if kill { Squeeze::Kill } else { Squeeze::PageOut };
                self.life.squeeze(&key(app), squeeze, "memory is short", now);
            }
            Op::Unsqueeze(app) => self.life.unsqueeze(&key(app), now),
            Op::Startable(app, startable) => {
                if self.apps[app].added {
                    self.apps[app].startable = Some(startable);
                }
                self.life.startable(&key(app), startable, now);
            }
            Op::Remove(app) => {
                self.apps[app].startable = None;
                self.unclaim(app);
                self.apps[app].former = None;
                (self.apps[app].added, self.apps[app].declares, self.apps[app].pending) = (false, false, false);
                self.life.remove_app(&key(app), now);
            }
            Op::Add(app) => {
                self.apps[app].added = true;
                self.life.add_app(&key(app), now);
            }
            Op::Pass(millis) => self.pass(millis),
        }
        self.drain();
        self.check();
    }

    fn appear(&mut self, app: usize, again: bool, started: bool) {
        let model = &mut self.apps[app];
        if !model.added {
            return;
        }
        let same = again && model.owner.is_some();
        if !same {
            self.unclaim(app);
            let model = &mut self.apps[app];
            model.owner = Some(self.next);
            model.claim = (started && model.declares).then_some(Claim::Background);
            self.next += 1;
        }
        if let Some(n) = self.apps[app].owner {
            self.life.appeared(&key(app), &owner(n), started, self.now);
        }
    }

    fn identify(&mut self, app: usize, whose: u8, protected: bool) {
        let model = &self.apps[app];
        let Some(n) = (if whose == 1 { model.former } else { model.owner }) else { return };
        if whose == 3 {
            // A second look that finds another process, or none, costs the claim.
            if self.life.target_of(&key(app)).is_some() && !self.is_ending(app) {
                self.forget(app);
            }
            self.life.identified(&key(app), &owner(n), Err("it went away".into()), self.now);
            return;
        }
        let known = self.life.target_of(&key(app)).is_some();
        if known && whose == 0 {
            return;
        }
        let target = TargetId(self.next);
        self.next += 1;
        let other = self.life.target_of(&key(1 - app)).and_then(|target| self.real.get(&target)).map(|real| real.pid);
        let pid = if whose == 2 { other.unwrap_or(7) } else { 1000 + target.0 as u32 };
        self.real.insert(target, Real { pid, protected, frozen: false });
        let facts = ProcessFacts {
            pid,
            freezer: Freezer::Signal,
            can_page_out: true,
            protected: protected.then(|| "it is the message bus".into()),
        };
        if known && whose == 2 && !self.is_ending(app) {
            self.forget(app);
        }
        self.life.identified(&key(app), &owner(n), Ok((target, facts)), self.now);
    }

    /// Another instance: nothing that was said before is of it.
    fn forget(&mut self, app: usize) {
        self.apps[app].forget_claims();
        (self.apps[app].vetoed, self.apps[app].leased) = (false, false);
    }

    /// Whether there is an instance of it.
    fn is_there(&self, app: usize) -> bool {
        let gone = |view: AppView| matches!(view.state, State::Gone | State::Tombstone);
        self.life.show(&key(app), self.now).is_some_and(|view| !gone(view))
    }

    fn inspected(&mut self, how: u8) {
        let Some(target) = self.inspections.pop_front() else { return };
        let veto = Veto { kind: VetoKind::AwaitedLock, reason: "somebody waits for its lock".into() };
        let found = [Ok(Vec::new()), Ok(vec![veto]), Err("it is too large".into())][usize::from(how)].clone();
        if found != Ok(Vec::new())
            && let Some(app) = self.life.app_of(target).map(index)
        {
            self.apps[app].by_hand = false;
        }
        self.life.inspected(target, &found, self.now);
    }

    /// What is being killed is seen through: looks at another process are not believed.
    fn is_ending(&self, app: usize) -> bool {
        self.life.show(&key(app), self.now).is_some_and(|view| view.state == State::Ending)
    }

    fn wanted(&mut self, app: usize) {
        self.apps[app].by_hand = false;
        match self.life.wanted(&key(app), self.now) {
            Readiness::Ready => {
                let target = self.life.target_of(&key(app));
                let frozen = target.and_then(|target| self.real.get(&target)).is_some_and(|real| real.frozen);
                assert!(!frozen, "called ready while it is frozen");
            }
            Readiness::Thawing | Readiness::Ending => self.apps[app].awaited = true,
            Readiness::NotRunning => {}
        }
    }

    fn command(&mut self, app: usize, which: u8) {
        let command = [Command::Freeze, Command::Thaw, Command::Kill][usize::from(which)];
        let before = self.apps[app].by_hand;
        self.apps[app].by_hand = match command {
            Command::Freeze => true,
            Command::Thaw => false,
            Command::Kill => before,
        };
        if self.life.command(&key(app), command, "root", self.now).is_ok() {
            *self.apps[app].commands.entry(which).or_default() += 1;
            self.drain_with(Some((app, command)));
        } else {
            self.apps[app].by_hand = before;
        }
    }

    fn resolve(&mut self, which: usize, ok: bool) {
        if which >= self.asked.len() {
            return;
        }
        let took = Duration::from_millis(1);
        let (asked, _) = self.asked.remove(which);
        let target = asked.target();
        let later = self.asked.iter().any(|(later, _)| later.target() == target);
        let outcome = match (&asked, ok) {
            (Asked::Freeze(_), true) => Outcome::Frozen { took },
            (Asked::Freeze(_), false) => {
                if let (Some(real), false) = (self.real.get_mut(&target), later) {
                    real.frozen = false;
                }
                if let Some(app) = self.life.app_of(target).map(index) {
                    self.apps[app].by_hand = false;
                }
                Outcome::FreezeFailed("busy".into())
            }
            (Asked::Thaw(_), true) => Outcome::Thawed { took },
            (Asked::Thaw(_), false) => {
                if let (Some(real), false) = (self.real.get_mut(&target), later) {
                    real.frozen = true;
                }
                Outcome::ThawFailed("EIO".into())
            }
            (Asked::PageOut(_), true) => {
                Outcome::PagedOut { freed: 1000, zram: 300, source: ZramSource::Measured, took }
            }
            (Asked::PageOut(_), false) => Outcome::PageOutFailed("no swap".into()),
            (Asked::Kill(_), true) => return self.die(target),
            (Asked::Kill(_), false) => Outcome::KillFailed("EPERM".into()),
        };
        self.life.outcome(target, &outcome, self.now);
    }

    fn stray(&mut self, app: usize, kind: u8) {
        let Some(target) = self.life.target_of(&key(app)) else { return };
        let took = Duration::ZERO;
        let outcome = match kind {
            0 => Outcome::Frozen { took },
            1 => Outcome::ThawFailed("stray".into()),
            2 => Outcome::PagedOut { freed: 0, zram: 0, source: ZramSource::Measured, took },
            // A freeze said to have failed, or a thaw to have worked, when it has not would be believed, rightly.
            _ => Outcome::PageOutFailed("stray".into()),
        };
        self.disturbed = true;
        self.life.outcome(target, &outcome, self.now);
    }

    fn die(&mut self, target: TargetId) {
        self.asked.retain(|(asked, _)| asked.target() != target);
        for app in 0..APPS {
            if self.life.target_of(&key(app)) == Some(target) {
                self.unclaim(app);
            }
        }
        self.life.target_gone(target, self.now);
    }

    fn unclaim(&mut self, app: usize) {
        let model = &mut self.apps[app];
        model.former = model.owner.take().or(model.former);
        model.forget_claims();
        (model.awaited, model.vetoed, model.leased) = (false, false, false);
    }

    fn pass(&mut self, millis: u64) {
        let end = self.now.boot + Duration::from_millis(millis);
        while let Some(next) = self.life.poll_timeout().filter(|next| *next <= end) {
            assert!(next > self.now.boot, "asked again for an instant that is past");
            self.now = Now { boot: next, wall: self.now.wall + next.since(self.now.boot) };
            self.life.handle_timeout(self.now);
            self.drain();
        }
        self.now = Now { boot: end, wall: self.now.wall + end.since(self.now.boot) };
        // The executor promises a freeze's outcome within 2 s: what has none by now never has.
        let waiting = self.asked.len();
        self.asked.retain(|(asked, at)| !matches!(asked, Asked::Freeze(_)) || end.since(*at) < Duration::from_secs(5));
        self.disturbed |= self.asked.len() < waiting;
    }

    fn drain(&mut self) {
        self.drain_with(None);
    }

    fn drain_with(&mut self, by_command: Option<(usize, Command)>) {
        let mut told: Vec<(AppKey, Decision)> = Vec::new();
        while let Some(output) = self.life.poll_output() {
            match output {
                Output::Decided(app, decision) => told.push((app, decision)),
                Output::Freeze(target) => {
                    self.may_touch(target, "freeze", &told, None);
                    self.set_frozen(target, true);
                    self.asked.push((Asked::Freeze(target), self.now.boot));
                }
                Output::PageOut(target) => {
                    self.may_touch(target, "page-out", &told, None);
                    assert!(self.real[&target].frozen, "paged out while it runs");
                    self.asked.push((Asked::PageOut(target), self.now.boot));
                }
                Output::Kill { target, grace } => {
                    assert_eq!(grace, Duration::from_secs(5));
                    let by_command = by_command.filter(|(_, command)| *command == Command::Kill);
                    let app = self.life.app_of(target).map(index);
                    let comes_back = app.is_some_and(|app| self.apps[app].startable == Some(true));
                    assert!(by_command.is_some() || comes_back, "ended, and nothing starts it again");
                    self.may_touch(target, "kill", &told, by_command.map(|(app, _)| app));
                    self.set_frozen(target, false);
                    self.asked.push((Asked::Kill(target), self.now.boot));
                }
                Output::Thaw(target) => {
                    let app = self.life.app_of(target).cloned();
                    let known = app.as_ref().is_none_or(|app| {
                        self.life.decisions(app).any(|decision| {
                            (decision.verdict == "thaw" && decision.at == self.now.wall)
                                || decision.verdict == "thaw-failed"
                        })
                    });
                    let said = told.iter().any(|(_, decision)| decision.verdict == "thaw");
                    assert!(said || (app.is_some() && known), "thawed without a decision");
                    // Not when it is only tried again: a freeze by hand may wait for the thaw to end.
                    if let Some(app) = app.as_ref().filter(|_| said).map(index) {
                        self.apps[app].by_hand = false;
                    }
                    self.set_frozen(target, false);
                    self.asked.push((Asked::Thaw(target), self.now.boot));
                }
                Output::Forget(target) => {
                    assert!(self.real.remove(&target).is_some(), "forgotten twice");
                    self.asked.retain(|(asked, _)| asked.target() != target);
                }
                Output::Inspect(target) => {
                    assert!(self.real.contains_key(&target));
                    self.inspections.push_back(target);
                }
                Output::WillSuspend(app, within) => {
                    assert!(self.apps[index(&app)].added && !within.is_zero());
                }
                Output::Resumed(app, _) => assert!(self.apps[index(&app)].added),
                Output::Sample(target, _) => assert!(self.real.contains_key(&target)),
                Output::Runnable(app) => {
                    let target = self.life.target_of(&app).expect("runnable without a process");
                    assert!(!self.real[&target].frozen, "runnable while it is frozen");
                    assert!(std::mem::take(&mut self.apps[index(&app)].awaited), "nobody waits for it");
                }
                Output::CommandDone(app, command, _) => {
                    let which = [Command::Freeze, Command::Thaw, Command::Kill].iter().position(|c| *c == command);
                    let which = u8::try_from(which.unwrap()).unwrap();
                    *self.apps[index(&app)].commands.entry(which).or_default() -= 1;
                }
                Output::Record { app, declares } => assert!(declares && self.apps[index(&app)].added),
            }
        }
    }

    fn set_frozen(&mut self, target: TargetId, frozen: bool) {
        self.real.get_mut(&target).expect("touched after it was forgotten").frozen = frozen;
    }

    fn may_touch(&self, target: TargetId, verdict: &str, told: &[(AppKey, Decision)], by_command: Option<usize>) {
        let app = self.life.app_of(target).expect("touched what is no app's");
        let model = &self.apps[index(app)];
        let real = &self.real[&target];
        assert!(!real.protected, "{verdict} of a protected process");
        assert!(!model.pending, "{verdict} while a message is pending");
        assert!(
            model.background() || model.by_hand || by_command == Some(index(app)),
            "{verdict} of an app that may be in the foreground"
        );
        assert!(!model.vetoed || by_command.is_some(), "{verdict} of an app that plays");
        assert!(!model.leased || model.by_hand || by_command.is_some(), "{verdict} of an app that holds a lease");
        let sharers = (0..APPS).filter_map(|app| self.life.target_of(&key(app))).filter_map(|t| self.real.get(&t));
        assert_eq!(sharers.filter(|other| other.pid == real.pid).count(), 1, "{verdict} of a shared process");
        if self.profile == Profile::Observe {
            assert!(model.by_hand || by_command.is_some(), "{verdict} under observe");
        }
        let kept = self.life.decisions(app).any(|d| d.verdict == verdict && d.at == self.now.wall);
        let said = told.iter().any(|(whose, d)| whose == app && d.verdict == verdict);
        assert!(kept || said, "{verdict} without a decision");
    }

    fn check(&self) {
        let next = self.life.poll_timeout();
        assert!(next.is_none_or(|next| next > self.now.boot), "a deadline in the past");
        for (app, model) in self.apps.iter().enumerate() {
            assert!(model.commands.values().all(|waiting| (0..=1).contains(waiting)), "{:?}", model.commands);
            assert!(self.life.decisions(&key(app)).count() <= DECISIONS_KEPT);
        }
        let idle = self.apps.iter().all(|model| !model.background() && !model.by_hand);
        if idle
            && !self.disturbed
            && self.asked.is_empty()
            && self.inspections.is_empty()
            && self.real.values().all(|real| !real.frozen)
        {
            assert_eq!(next, None, "a timer while nothing is due");
        }
    }

    /// From here on every thaw succeeds.
    fn shut_down(&mut self) {
        self.life.shutdown(self.now);
        for _ in 0..60 {
            self.drain();
            if self.asked.is_empty() && self.life.poll_timeout().is_none() {
                break;
            }
            while !self.asked.is_empty() {
                let ok = !matches!(self.asked[0].0, Asked::Kill(_));
                self.resolve(0, ok);
                self.drain();
            }
            self.pass(1000);
        }
        assert!(self.life.is_quiet());
        let frozen: Vec<_> = self.real.iter().filter(|(_, real)| real.frozen).collect();
        assert!(frozen.is_empty(), "left frozen: {frozen:?}");
        for app in 0..APPS {
            self.run(&Op::Remove(app));
            let waiting = &self.apps[app].commands;
            assert!(waiting.values().all(|waiting| *waiting == 0), "commands without an answer: {waiting:?}");
        }
        assert_eq!(self.life.poll_timeout(), None);
    }
}

fn start(profile: Profile) -> World {
    let mut world = World::new(profile);
    for app in 0..APPS {
        world.run(&Op::Add(app));
        world.run(&Op::Appear { app, again: false, started: false });
        world.run(&Op::Identify { app, whose: 0, protected: false });
        world.run(&Op::Declare(app, true));
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_invariants_hold(
        profile in prop_oneof![4 => Just(Profile::Tombstone), 1 => Just(Profile::Cached), 1 => Just(Profile::Observe)],
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let mut world = start(profile);
        ops.iter().for_each(|op| world.run(op));
        world.shut_down();
    }

    #[test]
    fn observe_touches_nothing(ops in prop::collection::vec(event(), 1..120)) {
        let mut world = start(Profile::Observe);
        for op in &ops {
            world.run(op);
            prop_assert!(world.asked.is_empty(), "{:?}", world.asked);
        }
        world.shut_down();
        prop_assert!(world.asked.is_empty());
    }
}
