//! One app: what is known of it, and what each event means for it. After each it asks the policy (`carry_out`).

mod carry_out;
mod instance;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use self::{
    carry_out::THAW_SOON,
    instance::{Claimed, Instance, Looked, claimed, finish_all},
};
use super::{
    AppView, Held, Output, Outward, Readiness, Refusal, RefusalKind, SampleKind, Seen, State,
    decisions::{Decision, Decisions},
    policy::{self, Baseline, Hold, Inspection, Notice, Paged, Process, Retry, Squeeze},
};
use crate::{
    event::{Claim, Command, Outcome},
    model::{AppKey, Memory, Owner, Priority, Profile, Rules, TargetId, Veto},
    time::{Instant, Now, earliest},
};

/// A claim may overtake the news that the app has a name: it is kept this long for it, and no longer, lest it be
/// believed of a later instance that somebody looks at.
const EARLY_CLAIM: Duration = Duration::from_secs(5);
/// Pause before an app with something against freezing it is inspected again, doubled each time, and how often doubled.
const INSPECT_AGAIN: Duration = Duration::from_secs(30);
const INSPECT_DOUBLINGS: u32 = 4;
const MESSAGE: &str = "a message came for it";
const NAMELESS: &str = "it gave up its name on the bus";
const NO_CLAIM: &str = "nothing says that it is in the background";
const NEVER_DECLARES: &str = "it has never said whether it is in the foreground, so it may be";

/// What an app needs to know of the rest, for one call.
pub(super) struct Env<'a> {
    pub(super) key: &'a AppKey,
    pub(super) rules: &'a Rules,
    pub(super) ending: bool,
    pub(super) now: Now,
    pub(super) out: &'a mut VecDeque<Output>,
}

/// One app, running or not.
#[derive(Debug)]
pub(super) struct App {
    declares: bool,
    pending: bool,
    /// What is pending, where it is no message.
    cause: Option<Arc<str>>,
    /// Whether anything says how to start it again, once that is known.
    startable: Option<bool>,
    instance: Option<Instance>,
    /// Tombstone or gone: what it is when it does not run.
    rest: State,
    shown: (State, Instant),
    decisions: Decisions,
    /// The last reason to leave it alone, until something else is decided: not told twice.
    left: Option<Arc<str>>,
    early_claim: Option<(Claim, Arc<str>, Instant)>,
    early_process: Option<(Owner, Looked)>,
    /// The owner before this one: what is still said of it is stale.
    last_owner: Option<Owner>,
    next: Option<Instant>,
}

impl App {
    pub(super) fn new(declares: bool, now: Now) -> Self {
        Self {
            declares,
            pending: false,
            cause: None,
            startable: None,
            instance: None,
            rest: State::Gone,
            shown: (State::Gone, now.boot),
            decisions: Decisions::default(),
            left: None,
            early_claim: None,
            early_process: None,
            last_owner: None,
            next: None,
        }
    }

    pub(super) const fn next(&self) -> Option<Instant> {
        self.next
    }

    pub(super) fn decisions(&self) -> &Decisions {
        &self.decisions
    }

    pub(super) fn target(&self) -> Option<TargetId> {
        self.instance.as_ref()?.target()
    }

    pub(super) fn vetoes(&self) -> &[Veto] {
        self.instance.as_ref().map_or(&[], Instance::vetoes)
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.instance.as_ref()?.facts().map(|facts| facts.pid)
    }

    /// Whether the target is this app's, also when it has not taken its name yet.
    pub(super) fn knows(&self, target: TargetId) -> bool {
        let early = match &self.early_process {
            Some((_, Ok((early, _)))) => Some(*early),
            _ => None,
        };
        self.target() == Some(target) || early == Some(target)
    }

    /// Whether nothing of it is held still, or all that can be done about that has been.
    pub(super) fn is_quiet(&self) -> bool {
        self.instance.as_ref().is_none_or(|instance| match instance.hold {
            Hold::Running | Hold::Killing { .. } | Hold::WouldBeFrozen { .. } | Hold::WouldBeKilled => true,
            Hold::Thawing { .. } => instance.thaw_fails > THAW_SOON.len(),
            Hold::Freezing { .. } | Hold::Frozen { .. } => false,
        })
    }

    pub(super) fn outward(&self) -> Outward {
        let would_be = self.instance.as_ref().and_then(|instance| match instance.hold {
            Hold::WouldBeFrozen { paged: Paged::Done, .. } => Some(State::Reclaimed),
            Hold::WouldBeFrozen { .. } => Some(State::Frozen),
            Hold::WouldBeKilled => Some(State::Tombstone),
            Hold::Running
            | Hold::Freezing { .. }
            | Hold::Frozen { .. }
            | Hold::Thawing { .. }
            | Hold::Killing { .. } => None,
        });
        Outward { state: self.shown.0, would_be, left: self.left.clone() }
    }

    /// Since when nobody looks at it, if that is known.
    pub(super) fn unseen(&self) -> Option<Instant> {
        self.instance.as_ref()?.unseen()
    }

    pub(super) fn view(&self, now: Now) -> AppView {
        let facts = self.instance.as_ref().and_then(Instance::facts);
        AppView {
            state: self.shown.0,
            since: now.boot.since(self.shown.1),
            pid: facts.map(|facts| facts.pid),
            freezer: facts.map(|facts| facts.freezer),
            protected: facts.and_then(|facts| facts.protected.clone()),
            target: self.target(),
            reason: self.decisions.newest().map(|decision| decision.reason.clone()),
        }
    }

    /// The name has an owner. Gives back a target that is being killed and must be seen through.
    pub(super) fn appeared(&mut self, owner: &Owner, started_by_us: bool, env: &mut Env<'_>) -> Option<TargetId> {
        if self.instance.as_ref().is_some_and(|instance| instance.owner.as_ref() == Some(owner)) {
            return None;
        }
        let dying = self.release("another process took its name", env);
        let now = env.now.boot;
        let claim = match (self.early_claim.take(), started_by_us) {
            (Some((claim, by, at)), _) if now.since(at) <= EARLY_CLAIM => claimed(claim, &by, env),
            (_, true) if self.declares => Claimed::Background { since: now, grace: Duration::ZERO },
            (_, true) => Claimed::Nothing(NEVER_DECLARES),
            (_, false) => Claimed::Nothing(NO_CLAIM),
        };
        let mut instance = Instance::new(owner.clone(), claim);
        if started_by_us {
            instance.wake(Priority::Normal, env);
        }
        self.instance = Some(instance);
        self.settle(env);
        dying
    }

    /// A look at the process of `owner` that came before `owner` had the name, if there is one.
    pub(super) fn take_early(&mut self, owner: &Owner) -> Option<Looked> {
        self.early_process.take_if(|(early, _)| early == owner).map(|(_, process)| process)
    }

    pub(super) fn identified(&mut self, owner: &Owner, process: Looked, shared: Option<Arc<str>>, env: &mut Env<'_>) {
        let current = self.instance.as_mut().filter(|instance| instance.owner.as_ref() == Some(owner));
        let Some(instance) = current else {
            let replaced = if self.last_owner.as_ref() == Some(owner) {
                Some(process)
            } else {
                self.early_process.replace((owner.clone(), process)).map(|(_, process)| process)
            };
            if let Some(Ok((target, _))) = replaced {
                env.out.push_back(Output::Forget(target));
            }
            return;
        };
        let after = process.as_ref().ok().map(|(target, _)| *target);
        match instance.target() {
            // What is being killed is seen through, whatever is said of its name.
            Some(before) if after != Some(before) && matches!(instance.hold, Hold::Killing { .. }) => {
                env.out.extend(after.map(Output::Forget));
                return;
            }
            // The same unique name on a bus that was started anew: another process.
            Some(before) if after != Some(before) => {
                self.release("another process has its name", env);
                self.instance = Some(Instance::new(owner.clone(), Claimed::Nothing(NO_CLAIM)));
            }
            _ => {}
        }
        if let Some(instance) = &mut self.instance {
            instance.process = Some(process);
            instance.shared = shared;
        }
        self.settle(env);
    }

    /// The name has no owner any more.
    pub(super) fn vanished(&mut self, env: &mut Env<'_>) {
        self.early_claim = None;
        let Some(instance) = &mut self.instance else { return };
        self.last_owner = instance.owner.take().or(self.last_owner.take());
        if instance.target().is_none() {
            self.decide("gone", NAMELESS, env);
            self.end(State::Gone, env);
            return;
        }
        instance.forget_claims(NAMELESS);
        instance.fail(Command::Freeze, NAMELESS, env);
        self.settle(env);
    }

    /// The process ended.
    pub(super) fn target_gone(&mut self, target: TargetId, env: &mut Env<'_>) {
        if self.early_process.as_ref().is_some_and(|(_, p)| matches!(p, Ok((early, _)) if *early == target)) {
            self.forget_early(env);
        }
        let Some(instance) = self.instance.as_mut().filter(|instance| instance.target() == Some(target)) else {
            return;
        };
        self.last_owner = instance.owner.take().or(self.last_owner.take());
        if matches!(instance.hold, Hold::Killing { .. }) {
            instance.finish(Command::Kill, Ok(()), env);
            self.end(State::Tombstone, env);
            return;
        }
        let reason = match instance.hold {
            Hold::Frozen { .. } | Hold::Freezing { .. } => "it was ended from outside while it was frozen",
            _ => "it ended by itself, crashed or was ended from outside",
        };
        self.decide("gone", reason, env);
        self.end(State::Gone, env);
    }

    pub(super) fn declare(&mut self, claim: Claim, by: &str, env: &mut Env<'_>) {
        if !self.declares {
            self.declares = true;
            env.out.push_back(Output::Record { app: env.key.clone(), declares: true });
        }
        let Some(instance) = self.instance.as_mut().filter(|instance| instance.owner.is_some()) else {
            self.early_claim = Some((claim, by.into(), env.now.boot));
            return;
        };
        instance.claim(claimed(claim, by, env), env);
        self.settle(env);
    }

    /// Its windows are seen.
    pub(super) fn seen(&mut self, seen: Seen, env: &mut Env<'_>) {
        if let Some(instance) = &mut self.instance {
            instance.see(seen, env);
            self.settle(env);
        }
    }

    /// What is watched all the time speaks against holding it still, or no more.
    pub(super) fn vetoed(&mut self, vetoes: Vec<Veto>, env: &mut Env<'_>) {
        if let Some(instance) = &mut self.instance {
            instance.set_vetoes(vetoes, env);
            self.settle(env);
        }
    }

    /// A lease keeps it awake, or none does any more.
    pub(super) fn leased(&mut self, leased: Option<Arc<str>>, env: &mut Env<'_>) {
        if let Some(instance) = &mut self.instance {
            instance.set_leased(leased, env);
            self.settle(env);
        }
    }

    /// It wants to be told before it is frozen, or not.
    pub(super) fn listens(&mut self, listens: bool, env: &mut Env<'_>) {
        if let Some(instance) = &mut self.instance {
            instance.notice = match (instance.notice, listens) {
                (_, false) => Notice::NotWanted,
                (Notice::NotWanted, true) => Notice::NotGiven,
                (notice, true) => notice,
            };
            self.settle(env);
        }
    }

    /// It is prepared for being frozen, or cannot be asked.
    pub(super) fn prepared(&mut self, env: &mut Env<'_>) {
        if let Some(instance) = &mut self.instance
            && let Notice::Given { .. } = instance.notice
        {
            instance.notice = Notice::Done;
            self.settle(env);
        }
    }

    /// The look at it is over.
    pub(super) fn inspected(&mut self, found: &Result<Vec<Veto>, Arc<str>>, env: &mut Env<'_>) {
        let Some(instance) = &mut self.instance else { return };
        let Inspection::Asked { .. } = instance.inspection else { return };
        let reason: Option<Arc<str>> = match found {
            Ok(vetoes) => vetoes.first().map(|veto| policy::vetoed(veto).into()),
            Err(text) => Some(format!("it could not be inspected: {text}").into()),
        };
        let frozen = matches!(instance.hold, Hold::Frozen { .. });
        match reason {
            None if frozen => (instance.checked, instance.found, instance.inspection) = (true, 0, Inspection::NotAsked),
            None => instance.inspection = Inspection::Clear { at: env.now.boot },
            // What cannot be found out now was looked at a second ago.
            Some(_) if frozen && found.is_err() => {
                (instance.checked, instance.inspection) = (true, Inspection::NotAsked)
            }
            Some(reason) => {
                instance.let_go(&reason, env);
                let again = env.now.boot + INSPECT_AGAIN * (1 << instance.found.min(INSPECT_DOUBLINGS));
                instance.found = instance.found.saturating_add(1);
                if frozen {
                    self.thaw(&reason, env);
                }
                if let Some(instance) = &mut self.instance {
                    instance.inspection = Inspection::Vetoed { reason, again };
                }
            }
        }
        self.settle(env);
    }

    /// Memory is short: it is to go deeper, if it is frozen.
    pub(super) fn squeeze(&mut self, squeeze: Squeeze, reason: &str, env: &mut Env<'_>) {
        if let Some(instance) = self.instance.as_mut().filter(|instance| matches!(instance.hold, Hold::Frozen { .. })) {
            instance.squeeze = Some((squeeze, reason.into()));
            self.settle(env);
        }
    }

    /// Memory is not short any more.
    pub(super) fn unsqueeze(&mut self, env: &mut Env<'_>) {
        if let Some(instance) = self.instance.as_mut().filter(|instance| instance.squeeze.is_some()) {
            instance.squeeze = None;
            self.settle(env);
        }
    }

    pub(super) fn set_startable(&mut self, startable: bool, env: &mut Env<'_>) {
        if self.startable != Some(startable) {
            self.startable = Some(startable);
            if let Some(instance) = &mut self.instance {
                instance.kept = false;
            }
            self.settle(env);
        }
    }

    pub(super) fn is_ending(&self) -> bool {
        self.instance.as_ref().is_some_and(|instance| matches!(instance.hold, Hold::Killing { .. }))
    }

    /// What memory pressure needs to know of it, while it is frozen.
    pub(super) fn held(&self, key: &AppKey, rules: &Rules) -> Option<Held> {
        let instance = self.instance.as_ref()?;
        let Hold::Frozen { since, paged } = instance.hold else { return None };
        let open = rules.profile != Profile::Observe && instance.checked && instance.squeeze.is_none();
        let large = instance.uss.is_some_and(|uss| uss >= policy::PAGE_OUT_LEAST);
        let pages = matches!(instance.touchable(), Process::Touchable { can_page_out: true });
        Some(Held {
            unseen: instance.unseen(),
            can_page_out: open && paged == Paged::NotYet && instance.paging.is_none() && large && pages,
            can_end: rules.profile != Profile::Observe
                && instance.checked
                && self.startable == Some(true)
                && instance.by_hand.is_none()
                && instance.kill_again == Retry::Now,
            paging: instance.paging.is_some(),
            app: key.clone(),
            since,
            uss: instance.uss,
            paged_out: paged == Paged::Done,
            going: instance.squeeze.as_ref().map(|(squeeze, _)| *squeeze),
        })
    }

    pub(super) fn wanted(&mut self, cause: Option<&str>, env: &mut Env<'_>) -> Readiness {
        self.cause = cause.map(Into::into);
        let Some(instance) = &mut self.instance else { return Readiness::NotRunning };
        if matches!(instance.hold, Hold::Killing { .. }) {
            instance.wanted = true;
            return Readiness::Ending;
        }
        instance.let_go(cause.unwrap_or(MESSAGE), env);
        let named = instance.owner.is_some();
        instance.wanted = named;
        self.settle(env);
        if !named {
            return Readiness::NotRunning;
        }
        match &mut self.instance {
            Some(instance) if instance.hold == Hold::Running => {
                instance.wanted = false;
                Readiness::Ready
            }
            _ => Readiness::Thawing,
        }
    }

    pub(super) fn set_pending(&mut self, pending: bool, cause: Option<&str>, env: &mut Env<'_>) {
        self.pending = pending;
        self.cause = cause.map(Into::into);
        if pending && let Some(instance) = &mut self.instance {
            instance.let_go(cause.unwrap_or(MESSAGE), env);
        }
        self.settle(env);
    }

    pub(super) fn delivered(&mut self, priority: Priority, env: &mut Env<'_>) {
        if let Some(instance) = &mut self.instance {
            instance.wake(priority, env);
        }
        self.settle(env);
    }

    pub(super) fn outcome(&mut self, outcome: &Outcome, env: &mut Env<'_>) {
        let Some(instance) = &mut self.instance else { return };
        let now = env.now.boot;
        match (outcome, instance.hold) {
            (Outcome::Frozen { .. }, Hold::Freezing { .. }) => {
                instance.hold = Hold::Frozen { since: now, paged: Paged::NotYet };
                (instance.checked, instance.inspection) = (false, Inspection::NotAsked);
                instance.frozen_since.get_or_insert(now);
                (instance.freeze_fails, instance.freeze_again) = (0, Retry::Now);
                instance.sample(SampleKind::Frozen, env);
                instance.finish(Command::Freeze, Ok(()), env);
            }
            (Outcome::Frozen { .. }, Hold::Running | Hold::WouldBeFrozen { .. } | Hold::WouldBeKilled) => {
                self.thaw("it was frozen after it had been let go", env);
            }
            (Outcome::ThawFailed(text), Hold::Running | Hold::WouldBeFrozen { .. } | Hold::WouldBeKilled) => {
                self.thaw(&format!("it is not known whether it is frozen: {text}"), env);
            }
            (Outcome::FreezeFailed(text), Hold::Freezing { .. }) => {
                instance.hold = Hold::Running;
                self.freeze_failed(text, env);
            }
            (Outcome::Thawed { .. }, Hold::Thawing { .. }) => self.thawed(env),
            (Outcome::ThawFailed(text), Hold::Thawing { since, retry: None }) => self.thaw_failed(since, text, env),
            // A page-out overtaken by a thaw says nothing about the next freeze.
            (Outcome::PagedOut { .. }, hold) => {
                let asked = instance.paging.take();
                if let Hold::Frozen { since, paged: Paged::NotYet } = hold
                    && asked == Some(since)
                {
                    instance.hold = Hold::Frozen { since, paged: Paged::Done };
                    instance.sample(SampleKind::PagedOut, env);
                }
            }
            (Outcome::PageOutFailed(text), hold) => {
                let asked = instance.paging.take();
                if let Hold::Frozen { since, paged: Paged::NotYet } = hold
                    && asked == Some(since)
                {
                    instance.hold = Hold::Frozen { since, paged: Paged::Left };
                    self.decide("page-out-failed", &format!("its memory could not be paged out: {text}"), env);
                }
            }
            (Outcome::KillFailed(text), Hold::Killing { .. }) => self.kill_failed(text, env),
            // Stale: the app has moved on.
            (
                Outcome::Frozen { .. }
                | Outcome::FreezeFailed(_)
                | Outcome::Thawed { .. }
                | Outcome::ThawFailed(_)
                | Outcome::KillFailed(_),
                _,
            ) => return,
        }
        self.settle(env);
    }

    pub(super) fn sampled(&mut self, memory: &Result<Memory, Arc<str>>, env: &mut Env<'_>) -> Option<SampleKind> {
        let instance = self.instance.as_mut()?;
        let (kind, _) = instance.sampling.take()?;
        if kind == SampleKind::Resident {
            (instance.baseline, instance.measured) = (Baseline::Done, Some(env.now.boot));
        }
        match memory {
            Ok(memory) if kind != SampleKind::PagedOut => {
                instance.uss.get_or_insert(memory.uss);
            }
            Ok(_) => {}
            Err(text) => self.decide("not-measured", &format!("its memory could not be measured: {text}"), env),
        }
        self.settle(env);
        Some(kind)
    }

    pub(super) fn command(&mut self, command: Command, by: &str, env: &mut Env<'_>) -> Result<(), Refusal> {
        let refuse = |text: &str| Err(Refusal { kind: RefusalKind::Refused, text: format!("{} {text}", env.key) });
        let Some(instance) = &mut self.instance else {
            let text = match self.rest {
                State::Tombstone => "is a tombstone: it does not run, and starts when a message comes for it",
                _ => "is not running",
            };
            return Err(Refusal { kind: RefusalKind::NotRunning, text: format!("{} {text}", env.key) });
        };
        if env.ending && command != Command::Thaw {
            return refuse("is left alone: Night Porter is ending");
        }
        if matches!(instance.hold, Hold::Killing { .. }) {
            return refuse("is being ended");
        }
        if instance.commands.contains(&command) {
            return refuse("is busy with the same command already");
        }
        let target = match instance.touchable() {
            Process::Touchable { .. } => instance.target(),
            Process::Untouchable(reason) => return refuse(&format!("must not be touched: {reason}")),
            Process::Unknown => None,
        };
        let Some(target) = target else { return refuse("cannot be acted on yet: its process is not known") };
        if let (Some(veto), Command::Freeze) = (instance.is_vetoed(), command) {
            return refuse(&format!("must run: {}", policy::vetoed(veto)));
        }
        if (self.pending || instance.wanted) && command != Command::Thaw {
            return refuse("has a message waiting for it; try again in a moment");
        }
        match command {
            Command::Freeze => {
                if matches!(instance.hold, Hold::WouldBeFrozen { .. } | Hold::WouldBeKilled) {
                    instance.hold = Hold::Running;
                }
                instance.by_hand = Some(by.into());
                instance.commands.push(command);
                if matches!(instance.hold, Hold::Frozen { .. }) {
                    instance.finish(command, Ok(()), env);
                }
            }
            Command::Thaw => {
                instance.let_go(&format!("{by} asked to thaw it"), env);
                instance.commands.push(command);
                instance.wake_anew(env);
                if instance.is_held() {
                    if !matches!(instance.hold, Hold::Thawing { .. }) {
                        self.thaw(&format!("{by} asked for it"), env);
                    }
                } else {
                    instance.hold = Hold::Running;
                    instance.finish(command, Ok(()), env);
                }
            }
            Command::Kill => {
                instance.commands.push(command);
                self.kill(target, &format!("{by} asked for it"), env);
            }
        }
        self.settle(env);
        Ok(())
    }

    pub(super) fn note(&mut self, verdict: &'static str, reason: &str, env: &mut Env<'_>) {
        let decision = Decision::new(verdict, reason, env.now.wall);
        if self.decisions.push(&decision) {
            env.out.push_back(Output::Decided(env.key.clone(), decision));
        }
    }

    pub(super) fn bus_down(&mut self, env: &mut Env<'_>) {
        (self.early_claim, self.last_owner) = (None, None);
        if let Some(instance) = &mut self.instance {
            instance.forget_claims("the connection to its bus is lost");
            instance.fail(Command::Freeze, "the connection to its bus is lost", env);
        }
        self.settle(env);
    }

    pub(super) fn shutdown(&mut self, env: &mut Env<'_>) {
        if let Some(instance) = &mut self.instance {
            instance.thaw_fails = 0;
            instance.let_go("Night Porter is ending", env);
        }
        self.settle(env);
    }

    pub(super) fn set_shared(&mut self, with: Option<Arc<str>>, env: &mut Env<'_>) {
        if let Some(instance) = &mut self.instance
            && instance.shared != with
        {
            instance.shared = with;
            if instance.shared.is_some() {
                instance.let_go("it shares its process with another app", env);
            }
            self.settle(env);
        }
    }

    /// Lets go of the process: thawed if it is held, then forgotten. Gives back a target that is being killed, which
    /// must not be forgotten before it has ended.
    pub(super) fn release(&mut self, reason: &str, env: &mut Env<'_>) -> Option<TargetId> {
        let instance = self.instance.take()?;
        self.last_owner = instance.owner.clone().or(self.last_owner.take());
        let killing = matches!(instance.hold, Hold::Killing { .. });
        let target = instance.target();
        if let Some(target) = target.filter(|_| !killing) {
            if instance.is_held() {
                self.decide("thaw", reason, env);
                env.out.push_back(Output::Thaw(target));
            }
            env.out.push_back(Output::Forget(target));
        }
        finish_all(instance.commands, reason, env);
        self.left = None;
        self.next = None;
        target.filter(|_| killing)
    }

    /// Drops a look at a process that came before its name did.
    pub(super) fn forget_early(&mut self, env: &mut Env<'_>) {
        if let Some((_, Ok((target, _)))) = self.early_process.take() {
            env.out.push_back(Output::Forget(target));
        }
    }
}

/// The earliest of the deadlines of all apps.
pub(super) fn next_of<'a>(apps: impl Iterator<Item = &'a App>) -> Option<Instant> {
    apps.fold(None, |next, app| earliest(next, app.next))
}
