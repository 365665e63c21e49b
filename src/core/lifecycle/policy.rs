//! The policy: from what is known of one app to what is to be done with it, and why. A pure function of its arguments.
//!
//! It first asks why the app must run ([`why_run`]); only when there is no such reason may it be held still.

use std::{borrow::Cow, sync::Arc, time::Duration};

use super::decisions::human;
use crate::{
    model::{LifecycleTimes, Profile},
    time::{Instant, earliest},
};

/// An app that gives back less than this is not worth paging out (design.md: iOS 8 MB, Android 12 MB). KiB.
pub(super) const PAGE_OUT_LEAST: u64 = 8 * 1024;
/// How long a measurement may take before the app is frozen without it.
pub(super) const SAMPLE_ANSWER: Duration = Duration::from_secs(5);
/// How long a freeze or a thaw may stay without an outcome; the executor promises 2 s.
pub(super) const HOLD_ANSWER: Duration = Duration::from_secs(5);
/// How long a kill may stay without an end: the grace between SIGTERM and SIGKILL, and time to die.
pub(super) const KILL_ANSWER: Duration = Duration::from_secs(30);

/// Everything a decision depends on.
#[derive(Clone, Debug)]
pub(super) struct Snapshot<'a> {
    pub(super) profile: Profile,
    pub(super) times: LifecycleTimes,
    /// The daemon is about to exit.
    pub(super) ending: bool,
    pub(super) process: Process<'a>,
    pub(super) hold: Hold,
    pub(super) standing: &'a Standing,
    /// End of the window a push or a thaw by hand gave it, also when it has passed.
    pub(super) awake_until: Option<Instant>,
    /// A message waits for it.
    pub(super) pending: bool,
    /// Who asked to freeze it by hand, as long as that stands.
    pub(super) by_hand: Option<&'a str>,
    pub(super) baseline: Baseline,
    /// Until when a measurement under way is waited for.
    pub(super) sampling_until: Option<Instant>,
    /// A page-out has no outcome yet.
    pub(super) paging: bool,
    /// What paging out could free at most, KiB, where it was measured.
    pub(super) uss: Option<u64>,
    pub(super) freeze_again: Retry,
    pub(super) kill_again: Retry,
}

/// What is known of the process behind the app's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Process<'a> {
    /// Nothing yet.
    Unknown,
    /// It must not be touched; the reason is a sentence.
    Untouchable(&'a str),
    /// It may be touched.
    Touchable { can_page_out: bool },
}

/// What the process is doing, as far as we and the kernel are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    Running,
    Freezing {
        since: Instant,
    },
    Frozen {
        since: Instant,
        paged: Paged,
    },
    Thawing {
        since: Instant,
        retry: Option<Instant>,
    },
    Killing {
        since: Instant,
    },
    /// Profile `observe`: it runs, and would be frozen by now.
    WouldBeFrozen {
        since: Instant,
        paged: Paged,
    },
    /// Profile `observe`: it runs, and would be a tombstone by now.
    WouldBeKilled,
}

/// How far paging out has come since the freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Paged {
    NotYet,
    /// Decided against, or failed: not tried again before the next freeze.
    Left,
    Done,
}

/// What was said of this instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing that holds: treated as foreground (design.md, invariant 2). With the reason as a sentence.
    Unknown(&'static str),
    /// Somebody looks at it, says `by`.
    Foreground { by: Arc<str> },
    /// Nobody looks at it.
    Background { since: Instant, grace_until: Instant },
}

/// The measurement before the first freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Baseline {
    NotAsked,
    Asked,
    Done,
}

/// When something that failed may be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Retry {
    Now,
    At(Instant),
    Never,
}

/// What is to be done, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub(super) struct Verdict {
    pub(super) act: Act,
    /// A sentence; empty for [`Act::Wait`] and [`Act::Measure`], which are no decisions.
    pub(super) reason: Cow<'static, str>,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Measure it before its first freeze.
    Measure,
    Freeze,
    Thaw,
    PageOut,
    /// Leave its memory where it is until the next freeze.
    LeavePages,
    Kill,
    /// Something asked for has had no outcome for too long.
    NoAnswer,
    /// Let it run; look again at `until`.
    Leave {
        until: Option<Instant>,
        told: bool,
    },
    /// All is as it should be; look again at `until`.
    Wait {
        until: Option<Instant>,
    },
}

/// What is to be done with an app now. An `until` in the verdict is always after `now`.
pub(super) fn decide(app: &Snapshot<'_>, now: Instant) -> Verdict {
    match app.hold {
        Hold::Killing { since } => return answer_or_wait(since + KILL_ANSWER, now, "it did not end"),
        Hold::Thawing { retry: Some(retry), .. } if now < retry => return wait(Some(retry)),
        Hold::Thawing { retry: Some(_), .. } => return verdict(Act::Thaw, "the last attempt to thaw it failed"),
        Hold::Thawing { since, retry: None } => {
            return answer_or_wait(since + HOLD_ANSWER, now, "the freezer did not answer");
        }
        _ => {}
    }
    match (why_run(app, now), app.hold) {
        (Some(Run { reason, until, told }), Hold::Running) => verdict(Act::Leave { until, told }, reason),
        (Some(Run { reason, .. }), _) => verdict(Act::Thaw, reason),
        (None, Hold::Running) => running(app, now),
        (None, Hold::Freezing { since }) => answer_or_wait(since + HOLD_ANSWER, now, "the freezer did not answer"),
        (None, Hold::Frozen { since, paged } | Hold::WouldBeFrozen { since, paged }) => frozen(app, since, paged, now),
        (None, Hold::WouldBeKilled | Hold::Thawing { .. } | Hold::Killing { .. }) => wait(None),
    }
}

struct Run {
    reason: Cow<'static, str>,
    until: Option<Instant>,
    told: bool,
}

fn run(reason: impl Into<Cow<'static, str>>) -> Option<Run> {
    Some(Run { reason: reason.into(), until: None, told: true })
}

/// Why the app must run now, if it must.
fn why_run(app: &Snapshot<'_>, now: Instant) -> Option<Run> {
    const MESSAGE: &str = "a message is waiting for it";
    if app.ending {
        return run("Night Porter is ending");
    }
    if app.pending && app.hold != Hold::Running {
        return run(MESSAGE);
    }
    if let Process::Untouchable(reason) = app.process {
        return run(reason.to_owned());
    }
    if app.by_hand.is_none() {
        match app.standing {
            Standing::Unknown(reason) => return run(*reason),
            Standing::Foreground { by } => return run(format!("{by} says that it is in the foreground")),
            Standing::Background { .. } => {}
        }
    }
    if app.process == Process::Unknown {
        return run("its process is not known yet");
    }
    if app.pending {
        return Some(Run { reason: MESSAGE.into(), until: None, told: freeze_due(app).is_some_and(|due| due <= now) });
    }
    match app.awake_until {
        Some(until) if app.by_hand.is_none() && now < until => Some(Run {
            reason: format!("it may run for {} after a message or a thaw", human(app.times.awake_window)).into(),
            until: Some(until),
            told: true,
        }),
        _ => None,
    }
}

fn running(app: &Snapshot<'_>, now: Instant) -> Verdict {
    if let Some(by) = app.by_hand {
        return measure_first(app, now).unwrap_or_else(|| verdict(Act::Freeze, format!("{by} asked for it")));
    }
    match freeze_due(app) {
        Some(due) if now < due => {
            let reason = format!("it went to the background and may run for {} more", human(app.times.grace));
            return verdict(Act::Leave { until: Some(due), told: true }, reason);
        }
        Some(_) => {}
        None => return wait(None),
    }
    match app.freeze_again {
        Retry::At(again) if now < again => return wait(Some(again)),
        Retry::Now | Retry::At(_) => {}
        Retry::Never => {
            let reason = "it could not be frozen several times and is left alone until it starts again";
            return verdict(Act::Leave { until: None, told: true }, reason);
        }
    }
    measure_first(app, now).unwrap_or_else(|| verdict(Act::Freeze, freeze_reason(app)))
}

/// The baseline is worth something only when taken in the background, so a freeze by hand of an app in the foreground
/// goes without.
fn measure_first(app: &Snapshot<'_>, now: Instant) -> Option<Verdict> {
    let background = matches!(app.standing, Standing::Background { .. });
    match (app.baseline, app.sampling_until) {
        (Baseline::NotAsked, _) if background => Some(verdict(Act::Measure, "")),
        (Baseline::Asked, Some(until)) if now < until => Some(wait(Some(until))),
        _ => None,
    }
}

fn frozen(app: &Snapshot<'_>, since: Instant, paged: Paged, now: Instant) -> Verdict {
    // Under `observe` only the user's hand holds an app still, and then nothing more is done to it.
    if app.profile == Profile::Observe && matches!(app.hold, Hold::Frozen { .. }) {
        return wait(None);
    }
    let kill = kill_due(app);
    if kill.is_some_and(|due| due <= now) {
        let time = human(app.times.tombstone_after);
        return verdict(Act::Kill, format!("it has been in the background without a message for {time}"));
    }
    if paged != Paged::NotYet || app.paging {
        return wait(kill);
    }
    let due = since + app.times.page_out_after;
    if now < due {
        return wait(earliest(Some(due), kill));
    }
    // A measurement under way is that of the frozen app: paging out now would spoil it.
    if let Some(until) = app.sampling_until.filter(|until| now < *until) {
        return wait(earliest(Some(until), kill));
    }
    match (app.process, app.uss) {
        (Process::Touchable { can_page_out: false }, _) => {
            verdict(Act::LeavePages, "its memory cannot be paged out on this system")
        }
        (_, None) => verdict(Act::LeavePages, "its memory is not paged out: it is not known how much that would free"),
        (_, Some(uss)) if uss < PAGE_OUT_LEAST => {
            verdict(Act::LeavePages, "its memory is not paged out: it holds less than 8 MiB of its own")
        }
        _ => verdict(Act::PageOut, format!("it has been frozen for {}", human(app.times.page_out_after))),
    }
}

/// When grace and awake window are over; none when nothing says that it is in the background.
fn freeze_due(app: &Snapshot<'_>) -> Option<Instant> {
    match app.standing {
        Standing::Background { grace_until, .. } => Some(app.awake_until.map_or(*grace_until, |a| a.max(*grace_until))),
        Standing::Unknown(_) | Standing::Foreground { .. } => None,
    }
}

/// When it is to become a tombstone, if time alone does that to it.
fn kill_due(app: &Snapshot<'_>) -> Option<Instant> {
    let Standing::Background { since, .. } = app.standing else { return None };
    if app.profile == Profile::Cached || app.by_hand.is_some() {
        return None;
    }
    let due = app.awake_until.map_or(*since, |awake| awake.max(*since)) + app.times.tombstone_after;
    match app.kill_again {
        Retry::Now => Some(due),
        Retry::At(again) => Some(due.max(again)),
        Retry::Never => None,
    }
}

fn freeze_reason(app: &Snapshot<'_>) -> String {
    match (app.standing, app.awake_until) {
        (Standing::Background { grace_until, .. }, Some(awake)) if awake >= *grace_until => {
            "it is in the background and its time after a message or a thaw is over".into()
        }
        _ => format!("it has been in the background for {}", human(app.times.grace)),
    }
}

fn answer_or_wait(until: Instant, now: Instant, reason: &'static str) -> Verdict {
    if now < until { wait(Some(until)) } else { verdict(Act::NoAnswer, reason) }
}

fn verdict(act: Act, reason: impl Into<Cow<'static, str>>) -> Verdict {
    Verdict { act, reason: reason.into() }
}

fn wait(until: Option<Instant>) -> Verdict {
    verdict(Act::Wait { until }, "")
}
