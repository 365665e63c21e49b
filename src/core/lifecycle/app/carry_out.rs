//! From verdicts to outputs: what the policy says is carried out, told, and tried again where it failed.

use std::time::Duration;

use super::{
    super::{
        Output, SampleKind, State,
        decisions::human,
        policy::{self, Act, Baseline, Hold, INSPECT_ANSWER, Inspection, NOTICE, Notice, Paged, Retry, Verdict},
    },
    App, Env,
    instance::finish_all,
};
use crate::{
    event::Command,
    model::{Priority, Profile, TargetId},
    time::Instant,
};

/// Between SIGTERM and SIGKILL.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// Pauses before a failed thaw is tried again; then every [`THAW_AGAIN`], for ever.
pub(super) const THAW_SOON: [Duration; 3] =
    [Duration::from_millis(200), Duration::from_millis(400), Duration::from_millis(800)];
const THAW_AGAIN: Duration = Duration::from_secs(5);
/// Pause before a failed freeze is tried again, doubled each time, and how often (Freezeit's figures).
const FREEZE_AGAIN: Duration = Duration::from_secs(15);
const KILL_AGAIN: Duration = Duration::from_secs(60);
const MOST_RETRIES: u32 = 5;
/// Under `observe` an app is measured again before it would be frozen, when that was last done so long ago.
const MEASURE_AGAIN: Duration = Duration::from_secs(24 * 3600);
/// A verdict moves the app on to the next; no chain of them is longer than this.
const MOST_STEPS: usize = 8;

impl App {
    /// Asks the policy until it is content.
    pub(in crate::core::lifecycle) fn settle(&mut self, env: &mut Env<'_>) {
        self.next = Some(env.now.boot + Duration::from_secs(1));
        for _ in 0..MOST_STEPS {
            let Some(instance) = &self.instance else {
                self.next = None;
                break;
            };
            let verdict = policy::decide(
                &instance.snapshot(self.pending, self.cause.as_deref(), self.startable, env),
                env.now.boot,
            );
            match verdict.act {
                Act::Wait { until } => {
                    self.next = until;
                    break;
                }
                Act::Leave { until, told } => {
                    self.next = until;
                    self.leave(told.then_some(&*verdict.reason), env);
                    break;
                }
                _ => self.carry_out(&verdict, env),
            }
        }
        self.refresh(env);
    }

    fn carry_out(&mut self, verdict: &Verdict, env: &mut Env<'_>) {
        let Some(instance) = &mut self.instance else { return };
        let Some(target) = instance.target() else { return };
        let now = env.now.boot;
        let reason = &*verdict.reason;
        if verdict.act == Act::Freeze && instance.baseline == Baseline::Asked {
            (instance.baseline, instance.sampling) = (Baseline::Done, None);
            self.note("not-measured", "its memory was not measured in time", env);
        }
        let Some(instance) = &mut self.instance else { return };
        match (verdict.act, instance.hold) {
            (Act::Measure, _) => {
                instance.baseline = Baseline::Asked;
                instance.sample(SampleKind::Resident, env);
            }
            (Act::Notify, _) => {
                instance.notice = Notice::Given { until: now + NOTICE };
                env.out.push_back(Output::WillSuspend(env.key.clone(), NOTICE));
            }
            (Act::Inspect, _) => {
                instance.inspection = Inspection::Asked { until: now + INSPECT_ANSWER };
                env.out.push_back(Output::Inspect(target));
            }
            (Act::NoAnswer, Hold::Running | Hold::Frozen { .. }) => self.inspected(&Err(reason.into()), env),
            (Act::Freeze, _) if env.rules.profile == Profile::Observe && instance.by_hand.is_none() => {
                instance.hold = Hold::WouldBeFrozen { since: now, paged: Paged::NotYet };
                self.decide("would-freeze", reason, env);
            }
            (Act::Freeze, _) => {
                instance.hold = Hold::Freezing { since: now };
                instance.sampling = None;
                self.decide("freeze", reason, env);
                env.out.push_back(Output::Freeze(target));
            }
            (Act::Thaw, Hold::WouldBeFrozen { .. } | Hold::WouldBeKilled) => {
                let verdict = if instance.hold == Hold::WouldBeKilled { "would-start" } else { "would-thaw" };
                instance.hold = Hold::Running;
                // What is really frozen is measured at each freeze; this one only here.
                if instance.measured.is_some_and(|at| now.since(at) >= MEASURE_AGAIN) {
                    instance.baseline = Baseline::NotAsked;
                }
                if self.pending || instance.wanted {
                    instance.wake(Priority::Normal, env);
                }
                self.decide(verdict, reason, env);
            }
            (Act::Thaw, Hold::Thawing { .. }) => {
                // Decided and told when it was first asked for, and when it failed.
                instance.hold = Hold::Thawing { since: now, retry: None };
                env.out.push_back(Output::Thaw(target));
            }
            (Act::Thaw, _) => self.thaw(reason, env),
            (Act::PageOut, Hold::WouldBeFrozen { since, .. }) => {
                instance.hold = Hold::WouldBeFrozen { since, paged: Paged::Done };
                self.decide("would-page-out", reason, env);
            }
            (Act::PageOut, Hold::Frozen { since, .. }) => {
                instance.paging = Some(since);
                self.decide("page-out", reason, env);
                env.out.push_back(Output::PageOut(target));
            }
            (Act::LeavePages, Hold::WouldBeFrozen { since, .. }) => {
                instance.hold = Hold::WouldBeFrozen { since, paged: Paged::Left };
                self.decide("leave", reason, env);
            }
            (Act::LeavePages, Hold::Frozen { since, .. }) => {
                instance.hold = Hold::Frozen { since, paged: Paged::Left };
                self.decide("leave", reason, env);
            }
            (Act::Keep, Hold::WouldBeFrozen { .. } | Hold::Frozen { .. }) => {
                instance.kept = true;
                self.decide("leave", reason, env);
            }
            (Act::Kill, Hold::WouldBeFrozen { .. }) => {
                instance.hold = Hold::WouldBeKilled;
                self.decide("would-kill", reason, env);
            }
            (Act::Kill, _) => self.kill(target, reason, env),
            (Act::NoAnswer, Hold::Freezing { .. }) => {
                self.freeze_failed(reason, env);
                self.thaw("it is not known whether it is frozen", env);
            }
            (Act::NoAnswer, Hold::Thawing { since, .. }) => self.thaw_failed(since, reason, env),
            (Act::NoAnswer, Hold::Killing { .. }) => self.kill_failed(reason, env),
            (Act::PageOut | Act::LeavePages | Act::Keep | Act::NoAnswer | Act::Leave { .. } | Act::Wait { .. }, _) => {}
        }
    }

    pub(super) fn thaw(&mut self, reason: &str, env: &mut Env<'_>) {
        self.decide("thaw", reason, env);
        let Some(instance) = &mut self.instance else { return };
        let Some(target) = instance.target() else { return };
        instance.hold = Hold::Thawing { since: env.now.boot, retry: None };
        instance.thaw_fails = 0;
        (instance.sampling, instance.by_hand, instance.squeeze) = (None, None, None);
        instance.inspection = Inspection::NotAsked;
        instance.fail(Command::Freeze, reason, env);
        env.out.push_back(Output::Thaw(target));
    }

    pub(super) fn thawed(&mut self, env: &mut Env<'_>) {
        let Some(instance) = &mut self.instance else { return };
        instance.hold = Hold::Running;
        instance.thaw_fails = 0;
        instance.finish(Command::Thaw, Ok(()), env);
        instance.wake(Priority::Normal, env);
        self.told_resumed(env);
        let Some(instance) = &mut self.instance else { return };
        // A name given up meanwhile cannot be called; the delivery hears of that by itself.
        if std::mem::take(&mut instance.wanted) && instance.owner.is_some() {
            env.out.push_back(Output::Runnable(env.key.clone()));
        }
    }

    pub(super) fn thaw_failed(&mut self, since: Instant, text: &str, env: &mut Env<'_>) {
        let Some(instance) = &mut self.instance else { return };
        let soon = THAW_SOON.get(instance.thaw_fails).copied();
        instance.thaw_fails = instance.thaw_fails.saturating_add(1);
        instance.hold = Hold::Thawing { since, retry: Some(env.now.boot + soon.unwrap_or(THAW_AGAIN)) };
        let reason = if soon.is_some() {
            format!("it could not be thawed and is tried again: {text}")
        } else {
            instance.fail(Command::Thaw, text, env);
            format!("it still cannot be thawed, and is tried every {} from now on: {text}", human(THAW_AGAIN))
        };
        self.note("thaw-failed", &reason, env);
    }

    pub(super) fn freeze_failed(&mut self, text: &str, env: &mut Env<'_>) {
        let Some(instance) = &mut self.instance else { return };
        let by_hand = instance.by_hand.take().is_some();
        instance.fail(Command::Freeze, text, env);
        let reason = if instance.freeze_fails >= MOST_RETRIES {
            instance.freeze_again = Retry::Never;
            format!("it could not be frozen: {text}")
        } else {
            let pause = FREEZE_AGAIN * (1 << instance.freeze_fails);
            instance.freeze_fails += 1;
            instance.freeze_again = Retry::At(env.now.boot + pause);
            let again = if by_hand { "if it is in the background" } else { "if it still is in the background" };
            format!("it could not be frozen, and is tried again in {} {again}: {text}", human(pause))
        };
        self.decide("freeze-failed", &reason, env);
    }

    pub(super) fn kill(&mut self, target: TargetId, reason: &str, env: &mut Env<'_>) {
        self.decide("kill", reason, env);
        let Some(instance) = &mut self.instance else { return };
        instance.hold = Hold::Killing { since: env.now.boot };
        instance.sampling = None;
        instance.by_hand = None;
        for command in [Command::Freeze, Command::Thaw] {
            instance.fail(command, "it is being ended", env);
        }
        env.out.push_back(Output::Kill { target, grace: KILL_GRACE });
    }

    pub(super) fn kill_failed(&mut self, text: &str, env: &mut Env<'_>) {
        let Some(instance) = &mut self.instance else { return };
        instance.fail(Command::Kill, text, env);
        let reason = if instance.kill_fails >= MOST_RETRIES {
            instance.kill_again = Retry::Never;
            format!("it could not be ended and is not tried again: {text}")
        } else {
            instance.kill_again = Retry::At(env.now.boot + KILL_AGAIN * (1 << instance.kill_fails));
            instance.kill_fails += 1;
            format!("it could not be ended: {text}")
        };
        self.decide("kill-failed", &reason, env);
        self.thaw("it is not known whether it is frozen", env);
    }

    /// The instance is over.
    pub(super) fn end(&mut self, rest: State, env: &mut Env<'_>) {
        if let Some(instance) = self.instance.take() {
            if let Some(target) = instance.target() {
                env.out.push_back(Output::Forget(target));
            }
            finish_all(instance.commands, "it has ended", env);
        }
        self.rest = rest;
        self.left = None;
        self.next = None;
        self.refresh(env);
    }

    /// An app that was told that it is about to be frozen is told that it is not any more, and for how long it was.
    fn told_resumed(&mut self, env: &mut Env<'_>) {
        let Some(instance) = &mut self.instance else { return };
        let frozen = instance.frozen_since.take().map(|since| env.now.boot.since(since));
        if let Notice::Given { .. } | Notice::Done = instance.notice {
            instance.notice = Notice::NotGiven;
            env.out.push_back(Output::Resumed(env.key.clone(), frozen.unwrap_or_default()));
        }
    }

    fn leave(&mut self, reason: Option<&str>, env: &mut Env<'_>) {
        self.told_resumed(env);
        if let Some(instance) = &mut self.instance {
            // It runs for a reason: what is measured now would not be the app at rest.
            instance.sampling = None;
            if instance.baseline == Baseline::Asked {
                instance.baseline = Baseline::NotAsked;
            }
            if !matches!(instance.inspection, Inspection::Vetoed { .. }) {
                instance.inspection = Inspection::NotAsked;
            }
        }
        let Some(reason) = reason else { return };
        if self.left.as_deref() != Some(reason) {
            self.left = Some(reason.into());
            self.note("leave", reason, env);
        }
    }

    pub(super) fn decide(&mut self, verdict: &'static str, reason: &str, env: &mut Env<'_>) {
        self.left = None;
        self.note(verdict, reason, env);
    }

    fn refresh(&mut self, env: &Env<'_>) {
        let state = match &self.instance {
            None => self.rest,
            Some(instance) => instance.state(env.now.boot),
        };
        if state != self.shown.0 {
            self.shown = (state, env.now.boot);
        }
    }
}
