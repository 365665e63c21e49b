//! One run of an app: what its process is doing and what was said of it.

use std::{sync::Arc, time::Duration};

use super::{
    super::{
        Output, SampleKind, Seen, State,
        policy::{
            self, Baseline, Hold, Inspection, Notice, Paged, Process, Retry, SAMPLE_ANSWER, Snapshot, Squeeze, Standing,
        },
    },
    Env,
};
use crate::{
    event::{Claim, Command},
    model::{Owner, Priority, ProcessFacts, TargetId, Veto},
    time::Instant,
};

/// A chatty app may stay awake this long in one go, or one window where that is longer; a waiting message still vetoes.
const AWAKE_MOST: Duration = Duration::from_secs(60);
/// After a message of high urgency, or a call, in awake windows (design.md: 30 s for 10 s; FCM has 10 s, an iOS notification
/// service extension 30 s).
const URGENT_WINDOWS: u32 = 3;

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
    /// What was declared of it, and what its windows say.
    claim: Claimed,
    seen: Seen,
    /// What follows from both.
    pub(super) standing: Standing,
    /// What is watched all the time says against holding it still.
    vetoes: Vec<Veto>,
    /// The lease that keeps it awake, as a sentence.
    leased: Option<Arc<str>>,
    calm_until: Option<Instant>,
    pub(super) notice: Notice,
    pub(super) inspection: Inspection<Arc<str>>,
    /// Inspections that found something, in a row.
    pub(super) found: u32,
    /// Whether it was inspected since it was frozen.
    pub(super) checked: bool,
    pub(super) squeeze: Option<(Squeeze, Arc<str>)>,
    /// Whether it was said that it is not ended, because nothing could start it again.
    pub(super) kept: bool,
    /// Since when it is frozen, for telling it how long that was.
    pub(super) frozen_since: Option<Instant>,
    pub(super) hold: Hold,
    pub(super) awake: Option<Awake>,
    /// A delivery waits for it to run.
    pub(super) wanted: bool,
    pub(super) by_hand: Option<Arc<str>>,
    pub(super) baseline: Baseline,
    /// When its baseline was measured.
    pub(super) measured: Option<Instant>,
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

/// What was declared of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Claimed {
    /// Nothing that holds, with the reason as a sentence.
    Nothing(&'static str),
    Foreground(Arc<str>),
    /// In the background since then; `grace` from then on.
    Background {
        since: Instant,
        grace: Duration,
    },
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Awake {
    pub(super) since: Instant,
    pub(super) until: Instant,
    /// The message it is longest for, and how long that is.
    after: (Priority, Duration),
}

impl Instance {
    pub(super) fn new(owner: Owner, claim: Claimed) -> Self {
        Self {
            owner: Some(owner),
            process: None,
            shared: None,
            standing: standing(&claim, &Seen::Nothing, None),
            claim,
            seen: Seen::Nothing,
            vetoes: Vec::new(),
            leased: None,
            calm_until: None,
            notice: Notice::NotWanted,
            inspection: Inspection::NotAsked,
            found: 0,
            checked: false,
            squeeze: None,
            kept: false,
            frozen_since: None,
            hold: Hold::Running,
            awake: None,
            wanted: false,
            by_hand: None,
            baseline: Baseline::NotAsked,
            measured: None,
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

    pub(super) fn snapshot<'a>(
        &'a self,
        pending: bool,
        cause: Option<&'a str>,
        startable: Option<bool>,
        env: &'a Env<'_>,
    ) -> Snapshot<'a> {
        Snapshot {
            profile: env.rules.profile,
            times: env.rules.times,
            ending: env.ending,
            process: self.touchable(),
            hold: self.hold,
            standing: &self.standing,
            vetoes: &self.vetoes,
            exempt: env.rules.exempt.as_deref(),
            leased: self.leased.as_deref(),
            calm_until: self.calm_until,
            awake_until: self.awake.map(|awake| awake.until),
            awake_after: self.awake.map(|awake| awake.after),
            pending: pending || self.wanted,
            cause,
            by_hand: self.by_hand.as_deref(),
            baseline: self.baseline,
            notice: self.notice,
            inspection: self.inspection.as_ref(),
            checked: self.checked,
            squeeze: self.squeeze.as_ref().map(|(squeeze, reason)| (*squeeze, &**reason)),
            startable,
            kept: self.kept,
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
    pub(super) fn wake(&mut self, priority: Priority, env: &Env<'_>) {
        let (now, window) = (env.now.boot, env.rules.times.awake_window);
        let open = self.awake.filter(|awake| now < awake.until);
        let most = AWAKE_MOST.max(window);
        let window = if priority >= Priority::High { window.saturating_mul(URGENT_WINDOWS).min(most) } else { window };
        let since = open.map_or(now, |awake| awake.since);
        let end = (since + most).min(now + window);
        match open {
            // Of several messages the longest counts.
            Some(open) if open.until >= end => {}
            _ => self.set_awake(Awake { since, until: end, after: (priority, window) }),
        }
    }

    /// Opens a window of its own, whatever was used up before.
    pub(super) fn wake_anew(&mut self, env: &Env<'_>) {
        let (now, window) = (env.now.boot, env.rules.times.awake_window);
        self.set_awake(Awake { since: now, until: now + window, after: (Priority::Normal, window) });
    }

    fn set_awake(&mut self, awake: Awake) {
        if matches!(self.standing, Standing::Background { .. }) {
            self.awake = Some(awake);
        }
    }

    pub(super) fn sample(&mut self, kind: SampleKind, env: &mut Env<'_>) {
        if let Some(target) = self.target() {
            self.sampling = Some((kind, env.now.boot + SAMPLE_ANSWER));
            env.out.push_back(Output::Sample(target, kind));
        }
    }

    pub(super) fn claim(&mut self, claim: Claimed, env: &mut Env<'_>) {
        self.claim = claim;
        self.restand(env);
    }

    pub(super) fn see(&mut self, seen: Seen, env: &mut Env<'_>) {
        if self.seen != seen {
            self.seen = seen;
            self.restand(env);
        }
    }

    fn restand(&mut self, env: &mut Env<'_>) {
        let next = standing(&self.claim, &self.seen, Some(env));
        match (&self.standing, &next) {
            (Standing::Background { .. }, Standing::Background { .. }) => return,
            (_, Standing::Foreground { reason }) => {
                self.awake = None;
                let reason = Arc::clone(reason);
                self.let_go(&reason, env);
            }
            _ => {}
        }
        self.standing = next;
    }

    /// What is watched says something else. What kept it awake being over, it is left alone for a while.
    pub(super) fn set_vetoes(&mut self, vetoes: Vec<Veto>, env: &mut Env<'_>) {
        if let (Some(veto), true) = (vetoes.first(), self.vetoes.is_empty()) {
            let reason = policy::vetoed(veto);
            self.let_go(&reason, env);
        }
        if vetoes.is_empty() && !self.vetoes.is_empty() {
            self.calm_until = Some(env.now.boot + env.rules.times.grace);
        }
        self.vetoes = vetoes;
    }

    pub(super) fn set_leased(&mut self, leased: Option<Arc<str>>, env: &Env<'_>) {
        if leased.is_none() && self.leased.is_some() {
            self.calm_until = Some(env.now.boot + env.rules.times.grace);
        }
        self.leased = leased;
    }

    /// Since when nobody looks at it, if that is known.
    pub(super) const fn unseen(&self) -> Option<Instant> {
        match self.standing {
            Standing::Background { since, .. } => Some(since),
            Standing::Unknown(_) | Standing::Foreground { .. } => None,
        }
    }

    pub(super) fn vetoes(&self) -> &[Veto] {
        &self.vetoes
    }

    pub(super) const fn is_vetoed(&self) -> Option<&Veto> {
        self.vetoes.as_slice().first()
    }

    pub(super) fn forget_claims(&mut self, reason: &'static str) {
        (self.claim, self.seen) = (Claimed::Nothing(reason), Seen::Nothing);
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

pub(super) fn claimed(claim: Claim, by: &str, env: &Env<'_>) -> Claimed {
    match claim {
        Claim::Foreground => Claimed::Foreground(by.into()),
        Claim::Background => Claimed::Background { since: env.now.boot, grace: env.rules.times.grace },
    }
}

/// In front is what anybody says is in front; in the background what somebody says is there, and nobody is not.
fn standing(claim: &Claimed, seen: &Seen, env: Option<&Env<'_>>) -> Standing {
    match (claim, seen, env) {
        (Claimed::Foreground(by), ..) => {
            Standing::Foreground { reason: format!("{by} says that it is in the foreground").into() }
        }
        (_, Seen::Front(reason), _) => Standing::Foreground { reason: Arc::clone(reason) },
        (Claimed::Background { since, grace }, ..) => {
            // It may have been seen in front meanwhile.
            let since = env.map_or(*since, |env| env.now.boot.max(*since));
            Standing::Background { since, grace_until: since + *grace }
        }
        (Claimed::Nothing(_), Seen::Behind, Some(env)) => {
            Standing::Background { since: env.now.boot, grace_until: env.now.boot + env.rules.times.grace }
        }
        (Claimed::Nothing(reason), ..) => Standing::Unknown(reason),
    }
}
