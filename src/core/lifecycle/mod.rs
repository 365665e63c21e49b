//! Per-app lifecycle: states, vetoes, verdicts with their reasons.
//!
//! Pure: events and commands in, [`Lifecycle::poll_output`] until `None`, then [`Lifecycle::poll_timeout`]. What is to
//! be done with an app is decided in `policy`, a pure function; `app` keeps what it depends on and carries it out.
//! Siblings (`delivery`, `ledger`) are not known here.
//!
//! What must hold, whatever comes in and in whatever order (design.md, "Invariants"):
//!
//! - an app is held still only while its last claim is `Background`, no delivery is pending and its process is known,
//!   touchable and its own alone; or on the user's explicit word;
//! - thawing is never given up;
//! - every freeze, thaw, page-out and kill follows a decision with its reason;
//! - there is no deadline for an app in the foreground, in a tombstone or gone.

mod app;
mod decisions;
mod policy;
#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use self::app::{App, Env, next_of};
pub use self::{
    decisions::{Decision, KEPT as DECISIONS_KEPT},
    policy::Squeeze,
};
use crate::{
    event::{Claim, Command, Outcome},
    model::{AppKey, AppRecord, Bus, Freezer, Memory, Owner, Priority, ProcessFacts, Rules, TargetId, Veto},
    time::{Instant, Now},
};

/// The lifecycle of all apps.
#[derive(Debug)]
pub struct Lifecycle {
    rules: Rules,
    /// Of apps that have rules of their own, by name.
    own_rules: BTreeMap<Arc<str>, Rules>,
    ending: bool,
    apps: BTreeMap<AppKey, App>,
    /// Apps that declared a state in an earlier life of the daemon and have not been added yet.
    declared: BTreeSet<AppKey>,
    /// Being killed, and no app's any more: another instance has the name, or the app was removed.
    leaving: BTreeSet<TargetId>,
    /// Apps that are another [`Outward`] since somebody asked.
    changed: BTreeSet<AppKey>,
    out: VecDeque<Output>,
}

/// What the lifecycle wants done or known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Hold it still.
    Freeze(TargetId),
    /// Let it run.
    Thaw(TargetId),
    /// Move its memory to swap.
    PageOut(TargetId),
    /// End it.
    Kill {
        /// Which instance.
        target: TargetId,
        /// Between SIGTERM and SIGKILL.
        grace: Duration,
    },
    /// Not asked for any more: sent once for each target identified, also after its process ended.
    Forget(TargetId),
    /// Look whether anything speaks against holding it still, or on; the answer belongs to [`Lifecycle::inspected`].
    Inspect(TargetId),
    /// Tell the app that it is about to be frozen, and how long it may prepare; the answer belongs to
    /// [`Lifecycle::prepared`].
    WillSuspend(AppKey, Duration),
    /// Tell the app that it runs again, and how long it was frozen; not at all, perhaps.
    Resumed(AppKey, Duration),
    /// Measure it; the answer belongs to [`Lifecycle::sampled`].
    Sample(TargetId, SampleKind),
    /// An app [`Lifecycle::wanted`] found held still runs now. Not sent when the app ended or gave up its name first:
    /// that is known from `vanished` and `target_gone`.
    Runnable(AppKey),
    /// A command accepted by [`Lifecycle::command`] ended; exactly one for each.
    CommandDone(AppKey, Command, Result<(), String>),
    /// Keep in the app's record that it declares its state.
    Record {
        /// Which app.
        app: AppKey,
        /// For `AppRecord::declares`.
        declares: bool,
    },
    /// A decision, for the log: once each, and before what it is about.
    Decided(AppKey, Decision),
}

/// What a measurement is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SampleKind {
    /// In the background and idle, before the first freeze: the baseline.
    Resident,
    /// Right after the freeze.
    Frozen,
    /// Right after the page-out.
    PagedOut,
}

/// What the windows of its session say of an app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// One of them can be seen; why, as a sentence.
    Front(Arc<str>),
    /// It is certain that none can be seen.
    Behind,
    /// Nothing is known.
    Nothing,
}

/// What memory pressure needs to know of a frozen app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which app.
    pub app: AppKey,
    /// Frozen since then.
    pub since: Instant,
    /// What ending it would give back at most, KiB, where it was measured.
    pub uss: Option<u64>,
    /// Whether its memory is in swap.
    pub paged_out: bool,
    /// What it has been asked to do for memory's sake and has not done yet.
    pub going: Option<Squeeze>,
    /// Nobody has looked at it since then, if that is known.
    pub unseen: Option<Instant>,
    /// Whether [`Squeeze::PageOut`] would page it out now.
    pub can_page_out: bool,
    /// Whether [`Squeeze::Kill`] would end it now.
    pub can_end: bool,
    /// Whether it is being paged out.
    pub paging: bool,
}

/// Whether an app can take a message now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub enum Readiness {
    /// It runs.
    Ready,
    /// It is being thawed: [`Output::Runnable`] comes.
    Thawing,
    /// It must be started.
    NotRunning,
    /// It is being killed: wait for `target_gone`, then start it. Should the kill fail, [`Output::Runnable`] comes.
    Ending,
}

/// Why a command is not even tried.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// Which D-Bus error.
    pub kind: RefusalKind,
    /// A sentence that begins with the app's name.
    pub text: String,
}

/// The kinds of [`Refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalKind {
    /// There is no process to act on.
    NotRunning,
    /// It must not be done now, or never.
    Refused,
}

/// A lifecycle state, as `view::App` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Somebody looks at it, or nothing says that nobody does.
    Foreground,
    /// Nobody looks at it; it runs.
    Background,
    /// In the background, in its window after a message.
    Awake,
    /// Asked to be held still, not there yet.
    Freezing,
    /// Held still.
    Frozen,
    /// Held still and paged out.
    Reclaimed,
    /// Being killed.
    Ending,
    /// Killed by us; starts again for the next message.
    Tombstone,
    /// Not running.
    Gone,
}

impl State {
    /// The word in `view::App::state`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Foreground => "foreground",
            Self::Background => "background",
            Self::Awake => "awake",
            Self::Freezing => "freezing",
            Self::Frozen => "frozen",
            Self::Reclaimed => "reclaimed",
            Self::Ending => "ending",
            Self::Tombstone => "tombstone",
            Self::Gone => "gone",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What an app looks like from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outward {
    /// Its state.
    pub state: State,
    /// Under the profile `observe`, the state it would be in, if it were held still or ended: frozen, reclaimed or tombstone.
    pub would_be: Option<State>,
    /// Why it was last left to run, as a sentence, while nothing else was decided since.
    pub left: Option<Arc<str>>,
}

/// What is shown of an app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppView {
    /// Its state.
    pub state: State,
    /// How long it has been in it.
    pub since: Duration,
    /// Process id of the running instance, once identified.
    pub pid: Option<u32>,
    /// How it would be frozen, once identified.
    pub freezer: Option<Freezer>,
    /// Why it can not be touched at all, if so.
    pub protected: Option<Arc<str>>,
    /// The handle on the running instance, once identified.
    pub target: Option<TargetId>,
    /// The latest decision's reason.
    pub reason: Option<Arc<str>>,
}

impl Lifecycle {
    /// A lifecycle without apps: `rules` are those of all, `own_rules` of single apps, by name. Of `records` only who ever
    /// declared a state is used, once the app is added.
    pub fn new(rules: Rules, own_rules: BTreeMap<Arc<str>, Rules>, records: &[AppRecord]) -> Self {
        Self {
            rules,
            own_rules,
            ending: false,
            apps: BTreeMap::new(),
            declared: records.iter().filter(|record| record.declares).map(|record| record.app.clone()).collect(),
            leaving: BTreeSet::new(),
            changed: BTreeSet::new(),
            out: VecDeque::new(),
        }
    }

    /// The app has a registration now. Idempotent.
    pub fn add_app(&mut self, app: &AppKey, now: Now) {
        if !self.apps.contains_key(app) {
            let declares = self.declared.remove(app);
            self.apps.insert(app.clone(), App::new(declares, now));
            self.changed.insert(app.clone());
        }
    }

    /// The app's last registration is gone: thawed if it is held, forgotten, and none of our business from now on.
    pub fn remove_app(&mut self, app: &AppKey, now: Now) {
        self.declared.remove(app);
        let Some(pid) = self.apps.get(app).map(App::pid) else { return };
        let dying = self.with(app, now, |app, env| {
            app.forget_early(env);
            app.release("its last registration is gone", env)
        });
        self.leaving.extend(dying.flatten());
        self.apps.remove(app);
        self.changed.remove(app);
        self.reshare(pid, now);
    }

    /// The app's name has an owner. `started_by_us`: for a message; such an instance counts as in the background if the
    /// app ever declared a state, any other as in the foreground until it says otherwise.
    pub fn appeared(&mut self, app: &AppKey, owner: &Owner, started_by_us: bool, now: Now) {
        let Some(pid) = self.apps.get(app).map(App::pid) else { return };
        let dying = self.with(app, now, |app, env| app.appeared(owner, started_by_us, env));
        self.leaving.extend(dying.flatten());
        self.reshare(pid, now);
        let early = self.apps.get_mut(app).and_then(|app| app.take_early(owner));
        if let Some(process) = early {
            self.identified(app, owner, process, now);
        }
    }

    /// The process behind an owner of the app's name was looked at. For an owner the app no longer has, the target is
    /// forgotten at once.
    pub fn identified(
        &mut self,
        app: &AppKey,
        owner: &Owner,
        process: Result<(TargetId, ProcessFacts), Arc<str>>,
        now: Now,
    ) {
        let Some(before) = self.apps.get(app).map(App::pid) else {
            self.out.extend(process.ok().map(|(target, _)| Output::Forget(target)));
            return;
        };
        let pid = process.as_ref().ok().map(|(_, facts)| facts.pid);
        let shared = pid.and_then(|pid| self.other_in(pid, app));
        self.with(app, now, |app, env| app.identified(owner, process, shared, env));
        self.reshare(before, now);
        self.reshare(pid, now);
    }

    /// The app's name has no owner any more. Its process may live on for a moment: nothing proves any more that nobody
    /// looks at it, so it runs.
    pub fn vanished(&mut self, app: &AppKey, now: Now) {
        self.with(app, now, |app, env| app.vanished(env));
    }

    /// The process behind the target ended.
    pub fn target_gone(&mut self, target: TargetId, now: Now) {
        if self.leaving.remove(&target) {
            self.out.push_back(Output::Forget(target));
        }
        let apps: Vec<_> = self.apps.iter().filter(|(_, app)| app.knows(target)).map(|(key, _)| key.clone()).collect();
        for key in apps {
            let pid = self.apps.get(&key).and_then(App::pid);
            self.with(&key, now, |app, env| app.target_gone(target, env));
            self.reshare(pid, now);
        }
    }

    /// Somebody entitled says what the app is now. `by` is a sentence's subject: "the app itself", "the shell".
    pub fn declare(&mut self, app: &AppKey, claim: Claim, by: &str, now: Now) {
        self.with(app, now, |app, env| app.declare(claim, by, env));
    }

    /// The windows of its session were looked at.
    pub fn seen(&mut self, app: &AppKey, seen: Seen, now: Now) {
        self.with(app, now, |app, env| app.seen(seen, env));
    }

    /// What is watched all the time says all of this against holding the target still.
    pub fn vetoed(&mut self, target: TargetId, vetoes: Vec<Veto>, now: Now) {
        if let Some(key) = self.app_of(target).cloned() {
            self.with(&key, now, |app, env| app.vetoed(vetoes, env));
        }
    }

    /// The look asked for with [`Output::Inspect`] is over.
    pub fn inspected(&mut self, target: TargetId, found: &Result<Vec<Veto>, Arc<str>>, now: Now) {
        if let Some(key) = self.app_of(target).cloned() {
            self.with(&key, now, |app, env| app.inspected(found, env));
        }
    }

    /// A lease keeps the app awake, as a sentence, or none does.
    pub fn leased(&mut self, app: &AppKey, leased: Option<Arc<str>>, now: Now) {
        self.with(app, now, |app, env| app.leased(leased, env));
    }

    /// The app's instance wants [`Output::WillSuspend`] and [`Output::Resumed`], or not.
    pub fn listens(&mut self, app: &AppKey, listens: bool, now: Now) {
        self.with(app, now, |app, env| app.listens(listens, env));
    }

    /// The app has prepared for being frozen, or did not answer.
    pub fn prepared(&mut self, app: &AppKey, now: Now) {
        self.with(app, now, |app, env| app.prepared(env));
    }

    /// Memory is short: the app, if it is frozen, is to go deeper now. `reason` is a sentence.
    pub fn squeeze(&mut self, app: &AppKey, squeeze: Squeeze, reason: &str, now: Now) {
        self.with(app, now, |app, env| app.squeeze(squeeze, reason, env));
    }

    /// Memory is not short any more: what has been asked of the app for its sake and not begun is called off.
    pub fn unsqueeze(&mut self, app: &AppKey, now: Now) {
        self.with(app, now, |app, env| app.unsqueeze(env));
    }

    /// Whether anything says how to start the app again. Until that is known, and when nothing does, it is not ended
    /// but by the user's hand.
    pub fn startable(&mut self, app: &AppKey, startable: bool, now: Now) {
        self.with(app, now, |app, env| app.set_startable(startable, env));
    }

    /// All frozen apps.
    pub fn held(&self) -> impl Iterator<Item = Held> {
        self.apps.iter().filter_map(|(key, app)| {
            let rules = self.own_rules.get(&key.service).unwrap_or(&self.rules);
            app.held(key, rules)
        })
    }

    /// Whether an app is being ended.
    pub fn is_ending_any(&self) -> bool {
        self.apps.values().any(App::is_ending)
    }

    /// A delivery waits for the app: a frozen one is thawed.
    pub fn wanted(&mut self, app: &AppKey, now: Now) -> Readiness {
        self.wanted_because(app, None, now)
    }

    /// [`Lifecycle::wanted`] for something that is no message: what, as a sentence.
    pub fn wanted_because(&mut self, app: &AppKey, cause: Option<&str>, now: Now) -> Readiness {
        self.with(app, now, |app, env| app.wanted(cause, env)).unwrap_or(Readiness::NotRunning)
    }

    /// Whether a delivery is pending: vetoes freeze, page-out and kill, and thaws. Whoever sets it bounds how long.
    pub fn set_pending(&mut self, app: &AppKey, pending: bool, now: Now) {
        self.set_pending_because(app, pending, None, now);
    }

    /// [`Lifecycle::set_pending`] for something that is no message: what, as a sentence.
    pub fn set_pending_because(&mut self, app: &AppKey, pending: bool, cause: Option<&str>, now: Now) {
        self.with(app, now, |app, env| app.set_pending(pending, cause, env));
    }

    /// The app took a message: in the background it may run for a window, three times as long after one of high priority
    /// or more, extended by each message up to 60 s in one go. Call it before clearing the pending mark.
    pub fn delivered(&mut self, app: &AppKey, priority: Priority, now: Now) {
        self.with(app, now, |app, env| app.delivered(priority, env));
    }

    /// A freeze, thaw, page-out or kill ended. Those of targets that are no app's are ignored.
    pub fn outcome(&mut self, target: TargetId, outcome: &Outcome, now: Now) {
        if let Outcome::KillFailed(_) = outcome
            && self.leaving.remove(&target)
        {
            self.out.push_back(Output::Forget(target));
        }
        if let Some(key) = self.app_of(target).cloned() {
            self.with(&key, now, |app, env| app.outcome(outcome, env));
        }
    }

    /// A measurement came. Gives back which of ours it answers; none when it was not asked for here, or the app has
    /// moved on since and it is a measurement of nothing in particular.
    pub fn sampled(&mut self, target: TargetId, memory: Result<Memory, Arc<str>>, now: Now) -> Option<SampleKind> {
        let key = self.app_of(target).cloned()?;
        self.with(&key, now, |app, env| app.sampled(&memory, env)).flatten()
    }

    /// The user acts on the app by hand. Accepted, it ends in one [`Output::CommandDone`], possibly at once.
    pub fn command(&mut self, app: &AppKey, command: Command, by: &str, now: Now) -> Result<(), Refusal> {
        self.with(app, now, |app, env| app.command(command, by, env)).unwrap_or_else(|| {
            Err(Refusal { kind: RefusalKind::NotRunning, text: format!("{app} has no registration here") })
        })
    }

    /// A decision taken elsewhere (a delivery's) for the app's list. The same one twice in a row is kept once.
    pub fn note(&mut self, app: &AppKey, verdict: &'static str, reason: impl AsRef<str>, now: Now) {
        self.with(app, now, |app, env| app.note(verdict, reason.as_ref(), env));
    }

    /// The daemon is about to exit: thaws everything and freezes nothing any more.
    pub fn shutdown(&mut self, now: Now) {
        // Nobody waits any more for what is being killed under no app's name; forgetting it thaws it.
        self.out.extend(std::mem::take(&mut self.leaving).into_iter().map(Output::Forget));
        self.ending = true;
        self.each(now, |app, env| app.shutdown(env));
    }

    /// Whether nothing is held still, or what is could not be thawed in four tries.
    pub fn is_quiet(&self) -> bool {
        self.apps.values().all(App::is_quiet)
    }

    /// The connection to a bus is lost, and with it all claims made over it: its apps are thawed.
    pub fn bus_down(&mut self, bus: Bus, now: Now) {
        self.each(now, |app, env| {
            if env.key.bus == bus {
                app.bus_down(env);
            }
        });
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Now) {
        self.each(now, |app, env| {
            if app.next().is_some_and(|next| next <= env.now.boot) {
                app.settle(env);
            }
        });
    }

    /// When [`Lifecycle::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        next_of(self.apps.values())
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        loop {
            match self.out.pop_front()? {
                // Two names of one process may share a handle.
                Output::Forget(target) if self.apps.values().any(|app| app.knows(target)) => {}
                output => return Some(output),
            }
        }
    }

    /// What is shown of an app.
    pub fn show(&self, app: &AppKey, now: Now) -> Option<AppView> {
        self.apps.get(app).map(|app| app.view(now))
    }

    /// The app's last decisions, oldest first, at most [`DECISIONS_KEPT`].
    pub fn decisions(&self, app: &AppKey) -> impl Iterator<Item = &Decision> {
        self.apps.get(app).into_iter().flat_map(|app| app.decisions().iter())
    }

    /// An app that is not what it was when it was last given back here, or is new.
    pub fn take_changed(&mut self) -> Option<AppKey> {
        self.changed.pop_first()
    }

    /// What an app looks like from outside.
    pub fn outward(&self, app: &AppKey) -> Option<Outward> {
        self.apps.get(app).map(App::outward)
    }

    /// How long nobody has looked at the app, if that is known.
    pub fn unseen(&self, app: &AppKey, now: Now) -> Option<Duration> {
        self.apps.get(app)?.unseen().map(|since| now.boot.since(since))
    }

    /// All apps, sorted.
    pub fn apps(&self) -> impl Iterator<Item = &AppKey> {
        self.apps.keys()
    }

    /// What is watched all the time and speaks against holding the app's instance still.
    pub fn vetoes(&self, app: &AppKey) -> &[Veto] {
        self.apps.get(app).map_or(&[], App::vetoes)
    }

    /// What is done with an app of this name in the background.
    pub fn rules_of(&self, service: &str) -> &Rules {
        self.own_rules.get(service).unwrap_or(&self.rules)
    }

    /// The handle on the app's running instance, once identified.
    pub fn target_of(&self, app: &AppKey) -> Option<TargetId> {
        self.apps.get(app)?.target()
    }

    /// Whose instance the target is.
    pub fn app_of(&self, target: TargetId) -> Option<&AppKey> {
        self.apps.iter().find(|(_, app)| app.target() == Some(target)).map(|(key, _)| key)
    }

    fn with<R>(&mut self, key: &AppKey, now: Now, act: impl FnOnce(&mut App, &mut Env<'_>) -> R) -> Option<R> {
        let app = self.apps.get_mut(key)?;
        let rules = self.own_rules.get(&key.service).unwrap_or(&self.rules);
        let before = app.outward();
        let result = act(app, &mut Env { key, rules, ending: self.ending, now, out: &mut self.out });
        if app.outward() != before {
            self.changed.insert(key.clone());
        }
        Some(result)
    }

    fn each(&mut self, now: Now, mut act: impl FnMut(&mut App, &mut Env<'_>)) {
        for (key, app) in &mut self.apps {
            let rules = self.own_rules.get(&key.service).unwrap_or(&self.rules);
            let before = app.outward();
            act(app, &mut Env { key, rules, ending: self.ending, now, out: &mut self.out });
            if app.outward() != before {
                self.changed.insert(key.clone());
            }
        }
    }

    /// Holding one of two apps in a process would hold the other: neither is touched.
    fn reshare(&mut self, pid: Option<u32>, now: Now) {
        let Some(pid) = pid else { return };
        let apps: Vec<_> =
            self.apps.iter().filter(|(_, app)| app.pid() == Some(pid)).map(|(key, _)| key.clone()).collect();
        for key in &apps {
            let with = self.other_in(pid, key);
            self.with(key, now, |app, env| app.set_shared(with, env));
        }
    }

    fn other_in(&self, pid: u32, app: &AppKey) -> Option<Arc<str>> {
        let (other, _) = self.apps.iter().find(|(key, other)| *key != app && other.pid() == Some(pid))?;
        Some(format!("it shares its process with {other}").into())
    }
}
