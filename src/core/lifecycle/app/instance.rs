//! One run of an app: what its process is doing and what was said of it.

use std::{sync::Arc, time::Duration};

use super::{
    super::{
        Output, SampleKind, State,
        policy::{Baseline, Hold, Paged, Process, Retry, SAMPLE_ANSWER, Snapshot, Standing},
    },
    Env,
};
use crate::{
    event::{Claim, Command},
    model::{Owner, ProcessFacts, TargetId},
    time::Instant,
};

/// A chatty app may stay awake this long in one go, or one window where that is longer; a waiting message still vetoes.
const AWAKE_MOST: Duration = Duration::from_secs(60);

/// What a look at a process gave.
pub(in crate::core::lifecycle) type Looked = Result<(TargetId, ProcessFacts), Arc<str>>;

/// One run of the app: from taking its name to the end of its process.
#[derive(Debug)]
pub(super) struct Instance {
    /// None once it gave up its name.
    pub(super) owner: Option<Owner>,
    pub(super) process: Option<Looked>,
    /// Another app that lives in the same process.
    pub(super) shared: Option<Arc<str>>,
    pub(super) standing: Standing,
    pub(super) hold: Hold,
    pub(super) awake: Option<Awake>,
    /// A delivery waits for it to run.
    pub(super) wanted: bool,
    pub(super) by_hand: Option<Arc<str>>,
    pub(super) baseline: Baseline,
    pub(super) sampling: Option<(SampleKind, Instant)>,
    pub(super) uss: Option<u64>,
    /// Since when it was frozen as its page-out was asked for, until that has an outcome.
    pub(super) paging: Option<Instant>,
    pub(super) freeze_fails: u32,
    pub(super) freeze_again: Retry,
    pub(super) kill_fails: u32,
    pub(super) kill_again: Retry,
    pub(super) thaw_fails: usize,
    /// Commands accepted and not yet done.
    pub(super) commands: Vec<Command>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Awake {
    pub(super) since: Instant,
    pub(super) until: Instant,
}

impl Instance {
    pub(super) const fn new(owner: Owner, standing: Standing) -> Self {
        Self {
            owner: Some(owner),
            process: None,
            shared: None,
            standing,
            hold: Hold::Running,
            awake: None,
            wanted: false,
            by_hand: None,
            baseline: Baseline::NotAsked,
            sampling: None,
            uss: None,
            paging: None,
            freeze_fails: 0,
            freeze_again: Retry::Now,
            kill_fails: 0,
            kill_again: Retry::Now,
            thaw_fails: 0,
            commands: Vec::new(),
        }
    }

    pub(super) fn target(&self) -> Option<TargetId> {
        match &self.process {
            Some(Ok((target, _))) => Some(*target),
            _ => None,
        }
    }

    pub(super) fn facts(&self) -> Option<&ProcessFacts> {
        match &self.process {
            Some(Ok((_, facts))) => Some(facts),
            _ => None,
        }
    }

    pub(super) const fn is_held(&self) -> bool {
        matches!(self.hold, Hold::Freezing { .. } | Hold::Frozen { .. } | Hold::Thawing { .. })
    }

    pub(super) fn touchable(&self) -> Process<'_> {
        match (&self.process, &self.shared) {
            (None, _) => Process::Unknown,
            (Some(Err(reason)), _) => Process::Untouchable(reason),
            (Some(Ok((_, ProcessFacts { protected: Some(reason), .. }))), _) => Process::Untouchable(reason),
            (Some(Ok(_)), Some(with)) => Process::Untouchable(with),
            (Some(Ok((_, facts))), None) => Process::Touchable { can_page_out: facts.can_page_out },
        }
    }

    pub(super) fn snapshot<'a>(&'a self, pending: bool, env: &Env<'_>) -> Snapshot<'a> {
        Snapshot {
            profile: env.profile,
            times: env.times,
            ending: env.ending,
            process: self.touchable(),
            hold: self.hold,
            standing: &self.standing,
            awake_until: self.awake.map(|awake| awake.until),
            pending: pending || self.wanted,
            by_hand: self.by_hand.as_deref(),
            baseline: self.baseline,
            sampling_until: self.sampling.map(|(_, until)| until),
            paging: self.paging.is_some(),
            uss: self.uss,
            freeze_again: self.freeze_again,
            kill_again: self.kill_again,
        }
    }

    pub(super) fn state(&self, now: Instant) -> State {
        match self.hold {
            Hold::Freezing { .. } => State::Freezing,
            Hold::Frozen { paged: Paged::Done, .. } => State::Reclaimed,
            Hold::Frozen { .. } | Hold::Thawing { .. } => State::Frozen,
            Hold::Killing { .. } => State::Ending,
            Hold::Running | Hold::WouldBeFrozen { .. } | Hold::WouldBeKilled => match self.standing {
                Standing::Unknown(_) | Standing::Foreground { .. } => State::Foreground,
                Standing::Background { .. } if self.awake.is_some_and(|awake| now < awake.until) => State::Awake,
                Standing::Background { .. } => State::Background,
            },
        }
    }

    /// Opens or extends the awake window of an app in the background, up to the cap.
    pub(super) fn wake(&mut self, env: &Env<'_>) {
        let now = env.now.boot;
        let since = self.awake.filter(|awake| now < awake.until).map_or(now, |awake| awake.since);
        let cap = since + AWAKE_MOST.max(env.times.awake_window);
        self.set_awake(since, cap.min(now + env.times.awake_window));
    }

    /// Opens a window of its own, whatever was used up before.
    pub(super) fn wake_anew(&mut self, env: &Env<'_>) {
        self.set_awake(env.now.boot, env.now.boot + env.times.awake_window);
    }

    pub(super) fn set_awake(&mut self, since: Instant, until: Instant) {
        if matches!(self.standing, Standing::Background { .. }) {
            self.awake = Some(Awake { since, until });
        }
    }

    pub(super) fn sample(&mut self, kind: SampleKind, env: &mut Env<'_>) {
        if let Some(target) = self.target() {
            self.sampling = Some((kind, env.now.boot + SAMPLE_ANSWER));
            env.out.push_back(Output::Sample(target, kind));
        }
    }

    pub(super) fn forget_claims(&mut self, reason: &'static str) {
        self.standing = Standing::Unknown(reason);
        self.awake = None;
        self.by_hand = None;
    }

    /// What the user froze by hand is let go by something that counts for more.
    pub(super) fn let_go(&mut self, reason: &str, env: &mut Env<'_>) {
        self.by_hand = None;
        self.fail(Command::Freeze, reason, env);
    }

    pub(super) fn fail(&mut self, command: Command, reason: &str, env: &mut Env<'_>) {
        self.finish(command, Err(reason.to_owned()), env);
    }

    pub(super) fn finish(&mut self, command: Command, result: Result<(), String>, env: &mut Env<'_>) {
        if let Some(at) = self.commands.iter().position(|waiting| *waiting == command) {
            self.commands.remove(at);
            env.out.push_back(Output::CommandDone(env.key.clone(), command, result));
        }
    }
}

pub(super) fn finish_all(commands: Vec<Command>, reason: &str, env: &mut Env<'_>) {
    for command in commands {
        env.out.push_back(Output::CommandDone(env.key.clone(), command, Err(reason.to_owned())));
    }
}

pub(super) fn claimed(claim: Claim, by: &str, env: &Env<'_>) -> Standing {
    let now = env.now.boot;
    match claim {
        Claim::Foreground => Standing::Foreground { by: by.into() },
        Claim::Background => Standing::Background { since: now, grace_until: now + env.times.grace },
    }
}
