//! The policy: from what is known of one app to what is to be done with it, and why. A pure function of its arguments.
//!
//! It first asks why the app must run ([`why_run`]); only when there is no such reason may it be held still.

use std::{borrow::Cow, sync::Arc, time::Duration};

use super::decisions::human;
use crate::{
    model::{LifecycleTimes, Priority, Profile, Veto},
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
/// How long an inspection may stay without an answer. The executor promises 5 s from when it has come to it; before that it may
/// wait behind others, where many apps go to the background at a time.
pub(super) const INSPECT_ANSWER: Duration = Duration::from_secs(30);
/// An inspection that found nothing is good for a freeze this long.
const CLEAR_FOR: Duration = Duration::from_secs(5);
/// What was frozen is inspected once more after this: a lock may have become awaited (Android's deadlock watchdog, lifecycle.md §1.1).
pub(super) const CHECK_AFTER: Duration = Duration::from_secs(1);
/// How long an app may take to prepare for being frozen (design.md; iOS gives 5 s).
pub(super) const NOTICE: Duration = Duration::from_secs(5);

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
    /// What speaks against holding it still, as watched all the time.
    pub(super) vetoes: &'a [Veto],
    /// Why it is exempt from being frozen at all, if the configuration says so.
    pub(super) exempt: Option<&'a str>,
    /// The lease that keeps it awake, as a sentence.
    pub(super) leased: Option<&'a str>,
    /// Until when it is left alone after the last veto or lease went.
    pub(super) calm_until: Option<Instant>,
    /// End of the window a push or a thaw by hand gave it, also when it has passed.
    pub(super) awake_until: Option<Instant>,
    /// What that window is for, and how long it is.
    pub(super) awake_after: Option<(Priority, Duration)>,
    /// A message waits for it.
    pub(super) pending: bool,
    /// What else waits for it, where it is no message.
    pub(super) cause: Option<&'a str>,
    /// Who asked to freeze it by hand, as long as that stands.
    pub(super) by_hand: Option<&'a str>,
    pub(super) baseline: Baseline,
    pub(super) notice: Notice,
    pub(super) inspection: Inspection<&'a str>,
    /// Whether it was inspected since it was frozen.
    pub(super) checked: bool,
    /// Memory is short: how deep it must go, and why.
    pub(super) squeeze: Option<(Squeeze, &'a str)>,
    /// Whether anything says how to start it again, once that is known.
    pub(super) startable: Option<bool>,
    /// Whether it was said that it is not ended, because nothing does.
    pub(super) kept: bool,
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
    /// Somebody looks at it; the reason is a sentence.
    Foreground { reason: Arc<str> },
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

/// The word to the app that it is about to be frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// It does not listen.
    NotWanted,
    /// It listens and has not been told.
    NotGiven,
    /// It has been told, and may prepare until then.
    Given { until: Instant },
    /// It is prepared, or its time is over.
    Done,
}

/// The look at the app right before the freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inspection<R> {
    NotAsked,
    Asked {
        until: Instant,
    },
    /// Nothing spoke against it.
    Clear {
        at: Instant,
    },
    /// Something did, or it could not be found out; looked at again then.
    Vetoed {
        reason: R,
        again: Instant,
    },
}

impl<R: AsRef<str>> Inspection<R> {
    pub(super) fn as_ref(&self) -> Inspection<&str> {
        match self {
            Self::NotAsked => Inspection::NotAsked,
            Self::Asked { until } => Inspection::Asked { until: *until },
            Self::Clear { at } => Inspection::Clear { at: *at },
            Self::Vetoed { reason, again } => Inspection::Vetoed { reason: reason.as_ref(), again: *again },
        }
    }
}

/// How deep memory pressure wants a frozen app to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Squeeze {
    /// Paged out at once.
    PageOut,
    /// A tombstone at once.
    Kill,
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
    /// Tell it that it is about to be frozen.
    Notify,
    /// Look whether anything speaks against holding it still, or on.
    Inspect,
    Freeze,
    Thaw,
    PageOut,
    /// Leave its memory where it is until the next freeze.
    LeavePages,
    /// It is not ended although it was its turn: nothing would start it again. Said once for each instance.
    Keep,
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
        return run(app.cause.unwrap_or(MESSAGE).to_owned());
    }
    if let Process::Untouchable(reason) = app.process {
        return run(reason.to_owned());
    }
    if app.by_hand.is_none() {
        match app.standing {
            Standing::Unknown(reason) => return run(*reason),
            Standing::Foreground { reason } => return run(reason.to_string()),
            Standing::Background { .. } => {}
        }
    }
    if app.process == Process::Unknown {
        return run("its process is not known yet");
    }
    if let Some(veto) = app.vetoes.first() {
        return run(vetoed(veto));
    }
    if let Some(reason) = app.exempt.or(app.leased).filter(|_| app.by_hand.is_none()) {
        return run(reason.to_owned());
    }
    if app.pending {
        let reason = app.cause.unwrap_or(MESSAGE).to_owned().into();
        return Some(Run { reason, until: None, told: freeze_due(app).is_some_and(|due| due <= now) });
    }
    match app.awake_until {
        Some(until) if app.by_hand.is_none() && now < until => {
            Some(Run { reason: awake_reason(app).into(), until: Some(until), told: true })
        }
        _ => None,
    }
}

fn awake_reason(app: &Snapshot<'_>) -> String {
    let (priority, window) = app.awake_after.unwrap_or((Priority::Normal, app.times.awake_window));
    let what = match priority {
        Priority::Low | Priority::Normal => "a message or a thaw",
        Priority::High => "a message of high urgency",
        Priority::Call => "a call",
    };
    format!("it may run for {} after {what}", human(window))
}

fn running(app: &Snapshot<'_>, now: Instant) -> Verdict {
    if let Some(by) = app.by_hand {
        return first(app, now).unwrap_or_else(|| verdict(Act::Freeze, format!("{by} asked for it")));
    }
    match freeze_due(app) {
        Some(due) if now < due => {
            let what = match app.calm_until {
                Some(calm) if calm == due => "what kept it awake is over, and it",
                _ => "it went to the background and",
            };
            let reason = format!("{what} may run for {} more", human(app.times.grace));
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
    first(app, now).unwrap_or_else(|| verdict(Act::Freeze, freeze_reason(app)))
}

/// What comes before a freeze, in this order: it is measured as it is, told, and looked at last of all.
fn first(app: &Snapshot<'_>, now: Instant) -> Option<Verdict> {
    measure_first(app, now).or_else(|| notify_first(app, now)).or_else(|| inspect_first(app, now))
}

fn notify_first(app: &Snapshot<'_>, now: Instant) -> Option<Verdict> {
    // Under `observe` it is not going to be frozen, whatever is decided.
    if app.profile == Profile::Observe && app.by_hand.is_none() {
        return None;
    }
    match app.notice {
        Notice::NotGiven => Some(verdict(Act::Notify, "")),
        Notice::Given { until } if now < until => Some(wait(Some(until))),
        Notice::Given { .. } | Notice::NotWanted | Notice::Done => None,
    }
}

fn inspect_first(app: &Snapshot<'_>, now: Instant) -> Option<Verdict> {
    match app.inspection {
        Inspection::Clear { at } if now < at + CLEAR_FOR => None,
        Inspection::Asked { until } => Some(answer_or_wait(until, now, "it could not be inspected in time")),
        Inspection::Vetoed { reason, again } if now < again => {
            Some(verdict(Act::Leave { until: Some(again), told: true }, reason.to_owned()))
        }
        Inspection::NotAsked | Inspection::Clear { .. } | Inspection::Vetoed { .. } => Some(verdict(Act::Inspect, "")),
    }
}

/// A veto as `why` shows it: its name and its reason.
pub(super) fn vetoed(veto: &Veto) -> String {
    format!("{}: {}", veto.kind.as_str(), veto.reason)
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
    let by_hand_alone = app.profile == Profile::Observe && matches!(app.hold, Hold::Frozen { .. });
    let kill = if by_hand_alone { None } else { kill_due(app) };
    let squeezed = matches!(app.squeeze, Some((Squeeze::Kill, _))) && app.by_hand.is_none() && !by_hand_alone;
    // A message could not bring it back: it would be lost to its user for good.
    if app.startable == Some(false) && !app.kept && (squeezed || kill.is_some_and(|due| due <= now)) {
        return verdict(Act::Keep, "it is not ended: nothing says how to start it again");
    }
    let kill =
        kill.filter(|due| app.startable == Some(true) || (app.startable == Some(false) && *due > now && !app.kept));
    if kill.is_some_and(|due| due <= now) {
        let time = human(app.times.tombstone_after);
        return verdict(Act::Kill, format!("it has been in the background without a message for {time}"));
    }
    if matches!(app.hold, Hold::Frozen { .. }) && !app.checked {
        let check = since + CHECK_AFTER;
        return match app.inspection {
            Inspection::Asked { until } if now < until => wait(earliest(Some(until), kill)),
            Inspection::Asked { .. } => verdict(Act::NoAnswer, "it could not be inspected in time"),
            _ if now < check => wait(earliest(Some(check), kill)),
            _ => verdict(Act::Inspect, ""),
        };
    }
    if by_hand_alone {
        return wait(None);
    }
    // What the user froze by hand is not ended for want of memory.
    if let (Some((Squeeze::Kill, reason)), None) = (app.squeeze, app.by_hand)
        && app.kill_again == Retry::Now
        && app.startable == Some(true)
    {
        return verdict(Act::Kill, reason.to_owned());
    }
    if paged != Paged::NotYet || app.paging {
        return wait(kill);
    }
    let due = if app.squeeze.is_some() { since } else { since + app.times.page_out_after };
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
        _ => match app.squeeze {
            Some((_, reason)) => verdict(Act::PageOut, reason.to_owned()),
            None => verdict(Act::PageOut, format!("it has been frozen for {}", human(app.times.page_out_after))),
        },
    }
}

/// When grace and awake window are over; none when nothing says that it is in the background.
fn freeze_due(app: &Snapshot<'_>) -> Option<Instant> {
    match app.standing {
        Standing::Background { grace_until, .. } => Some(
            (*grace_until).max(app.awake_until.unwrap_or(*grace_until)).max(app.calm_until.unwrap_or(*grace_until)),
        ),
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

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn at(secs: u64) -> Instant {
        Instant::from_nanos(secs * S)
    }

    const fn frozen_at(secs: u64) -> Hold {
        Hold::Frozen { since: Instant::from_nanos(secs * S), paged: Paged::NotYet }
    }

    const BACKGROUND: Standing =
        Standing::Background { since: Instant::from_nanos(100 * S), grace_until: Instant::from_nanos(110 * S) };
    const UNKNOWN: Standing = Standing::Unknown("nothing says that it is in the background");

    /// In the background since 100 s, measured, with the default times.
    fn app() -> Snapshot<'static> {
        Snapshot {
            profile: Profile::Tombstone,
            times: LifecycleTimes::default(),
            ending: false,
            process: Process::Touchable { can_page_out: true },
            hold: Hold::Running,
            standing: &BACKGROUND,
            awake_until: None,
            awake_after: None,
            pending: false,
            cause: None,
            vetoes: &[],
            exempt: None,
            leased: None,
            calm_until: None,
            by_hand: None,
            baseline: Baseline::Done,
            notice: Notice::NotWanted,
            inspection: Inspection::Clear { at: Instant::from_nanos(u64::MAX / 2) },
            checked: true,
            squeeze: None,
            startable: Some(true),
            kept: false,
            sampling_until: None,
            paging: false,
            uss: Some(20 * 1024),
            freeze_again: Retry::Now,
            kill_again: Retry::Now,
        }
    }

    const fn leave(until: Option<Instant>) -> Act {
        Act::Leave { until, told: true }
    }

    const fn until(secs: u64) -> Act {
        Act::Wait { until: Some(Instant::from_nanos(secs * S)) }
    }

    /// Each line: what it says, how the app differs, when, and what must come out.
    type Case = (&'static str, fn(&mut Snapshot<'static>), u64, Act, &'static str);

    fn check(cases: &[Case]) {
        for (name, change, now, act, reason) in cases {
            let mut app = app();
            change(&mut app);
            let verdict = decide(&app, at(*now));
            assert_eq!((verdict.act, &*verdict.reason), (*act, *reason), "{name}");
        }
    }

    #[test]
    fn what_must_run_runs() {
        const FOREGROUND: fn() -> &'static Standing = || {
            Box::leak(Box::new(Standing::Foreground { reason: "the shell says that it is in the foreground".into() }))
        };
        let none = leave(None);
        check(&[
            ("unknown", |a| a.standing = &UNKNOWN, 999, none, "nothing says that it is in the background"),
            ("foreground", |a| a.standing = FOREGROUND(), 999, none, "the shell says that it is in the foreground"),
            (
                "frozen, then foreground",
                |a| (a.standing, a.hold) = (FOREGROUND(), frozen_at(110)),
                111,
                Act::Thaw,
                "the shell says that it is in the foreground",
            ),
            ("unknown process", |a| a.process = Process::Unknown, 999, none, "its process is not known yet"),
            (
                "protected",
                |a| a.process = Process::Untouchable("it is the message bus"),
                999,
                none,
                "it is the message bus",
            ),
            (
                "protected, by hand too",
                |a| (a.process, a.by_hand) = (Process::Untouchable("it is the message bus"), Some("root")),
                999,
                none,
                "it is the message bus",
            ),
            ("pending", |a| a.pending = true, 110, none, "a message is waiting for it"),
            (
                "pending in grace vetoes nothing yet",
                |a| a.pending = true,
                105,
                Act::Leave { until: None, told: false },
                "a message is waiting for it",
            ),
            (
                "pending, frozen by hand",
                |a| (a.pending, a.by_hand, a.hold) = (true, Some("root"), frozen_at(101)),
                102,
                Act::Thaw,
                "a message is waiting for it",
            ),
            (
                "pending while freezing",
                |a| (a.pending, a.hold) = (true, Hold::Freezing { since: at(110) }),
                110,
                Act::Thaw,
                "a message is waiting for it",
            ),
            (
                "awake",
                |a| a.awake_until = Some(at(200)),
                199,
                leave(Some(at(200))),
                "it may run for 10 s after a message or a thaw",
            ),
            ("shutdown", |a| a.ending = true, 999, none, "Night Porter is ending"),
            (
                "shutdown, frozen by hand",
                |a| (a.ending, a.hold, a.by_hand) = (true, frozen_at(110), Some("root")),
                999,
                Act::Thaw,
                "Night Porter is ending",
            ),
            (
                "would be killed, then pending",
                |a| (a.pending, a.hold) = (true, Hold::WouldBeKilled),
                999,
                Act::Thaw,
                "a message is waiting for it",
            ),
        ]);
    }

    #[test]
    fn what_is_in_the_background_is_frozen_after_its_grace() {
        let grace = "it has been in the background for 10 s";
        let after = "it is in the background and its time after a message or a thaw is over";
        check(&[
            ("in grace", |_| (), 109, leave(Some(at(110))), "it went to the background and may run for 10 s more"),
            ("grace over", |_| (), 110, Act::Freeze, grace),
            ("observe decides the same", |a| a.profile = Profile::Observe, 110, Act::Freeze, grace),
            ("cached too", |a| a.profile = Profile::Cached, 110, Act::Freeze, grace),
            ("awake over", |a| a.awake_until = Some(at(200)), 200, Act::Freeze, after),
            (
                "awake over, grace not",
                |a| a.awake_until = Some(at(105)),
                106,
                leave(Some(at(110))),
                "it went to the background and may run for 10 s more",
            ),
            ("awake over before the grace was", |a| a.awake_until = Some(at(105)), 110, Act::Freeze, grace),
            ("measured first", |a| a.baseline = Baseline::NotAsked, 110, Act::Measure, ""),
            (
                "measurement under way",
                |a| (a.baseline, a.sampling_until) = (Baseline::Asked, Some(at(115))),
                110,
                until(115),
                "",
            ),
            (
                "measurement lost",
                |a| (a.baseline, a.sampling_until) = (Baseline::Asked, Some(at(115))),
                115,
                Act::Freeze,
                grace,
            ),
            ("failed before", |a| a.freeze_again = Retry::At(at(125)), 124, until(125), ""),
            ("tried again", |a| a.freeze_again = Retry::At(at(125)), 125, Act::Freeze, grace),
            (
                "failed for good",
                |a| a.freeze_again = Retry::Never,
                999,
                leave(None),
                "it could not be frozen several times and is left alone until it starts again",
            ),
            (
                "by hand, at once, whatever failed before",
                |a| (a.by_hand, a.freeze_again, a.awake_until) = (Some("root"), Retry::Never, Some(at(999))),
                101,
                Act::Freeze,
                "root asked for it",
            ),
            (
                "by hand in the foreground: no baseline",
                |a| (a.by_hand, a.standing, a.baseline) = (Some("root"), &UNKNOWN, Baseline::NotAsked),
                101,
                Act::Freeze,
                "root asked for it",
            ),
        ]);
    }

    #[test]
    fn what_nothing_starts_again_is_not_ended() {
        const KEPT: &str = "it is not ended: nothing says how to start it again";
        let short = Some((Squeeze::Kill, "memory is short"));
        const PAGED: Hold = Hold::Frozen { since: Instant::from_nanos(110 * S), paged: Paged::Done };
        const SEEN: Hold = Hold::WouldBeFrozen { since: Instant::from_nanos(110 * S), paged: Paged::Done };
        type Case = (&'static str, Option<bool>, bool, Hold, u64, bool, Act, &'static str);
        let cases: [Case; 10] = [
            ("its time comes", Some(false), false, PAGED, 600, false, until(700), ""),
            ("its time has come", Some(false), false, PAGED, 700, false, Act::Keep, KEPT),
            ("said once", Some(false), true, PAGED, 700, false, Act::Wait { until: None }, ""),
            ("under observe nothing else is said", Some(false), false, SEEN, 700, false, Act::Keep, KEPT),
            ("not known yet", None, false, PAGED, 700, false, Act::Wait { until: None }, ""),
            (
                "known",
                Some(true),
                false,
                PAGED,
                700,
                false,
                Act::Kill,
                "it has been in the background without a message for 10 min",
            ),
            ("memory is short", Some(false), false, PAGED, 200, true, Act::Keep, KEPT),
            ("said once, for memory", Some(false), true, PAGED, 200, true, Act::Wait { until: None }, ""),
            ("not known yet, for memory", None, false, PAGED, 200, true, Act::Wait { until: None }, ""),
            (
                "it is paged out all the same",
                Some(false),
                true,
                frozen_at(110),
                200,
                true,
                Act::PageOut,
                "memory is short",
            ),
        ];
        for (name, startable, kept, hold, now, is_short, act, reason) in cases {
            let mut app = app();
            (app.startable, app.kept, app.hold) = (startable, kept, hold);
            app.squeeze = short.filter(|_| is_short);
            let verdict = decide(&app, at(now));
            assert_eq!((verdict.act, &*verdict.reason), (act, reason), "{name}");
        }
    }

    #[test]
    fn what_is_frozen_is_paged_out_and_becomes_a_tombstone() {
        let paged_out = "it has been frozen for 60 s";
        let killed = "it has been in the background without a message for 10 min";
        check(&[
            ("waits", |a| a.hold = frozen_at(110), 111, until(170), ""),
            ("paged out", |a| a.hold = frozen_at(110), 170, Act::PageOut, paged_out),
            (
                "not while its frozen memory is measured",
                |a| (a.hold, a.sampling_until) = (frozen_at(110), Some(at(175))),
                170,
                until(175),
                "",
            ),
            ("page-out under way", |a| (a.hold, a.paging) = (frozen_at(110), true), 171, until(700), ""),
            (
                "cannot",
                |a| (a.hold, a.process) = (frozen_at(110), Process::Touchable { can_page_out: false }),
                170,
                Act::LeavePages,
                "its memory cannot be paged out on this system",
            ),
            (
                "too small",
                |a| (a.hold, a.uss) = (frozen_at(110), Some(PAGE_OUT_LEAST - 1)),
                170,
                Act::LeavePages,
                "its memory is not paged out: it holds less than 8 MiB of its own",
            ),
            (
                "just large enough",
                |a| (a.hold, a.uss) = (frozen_at(110), Some(PAGE_OUT_LEAST)),
                170,
                Act::PageOut,
                paged_out,
            ),
            (
                "not measured",
                |a| (a.hold, a.uss) = (frozen_at(110), None),
                170,
                Act::LeavePages,
                "its memory is not paged out: it is not known how much that would free",
            ),
            ("killed", |a| a.hold = Hold::Frozen { since: at(110), paged: Paged::Done }, 700, Act::Kill, killed),
            ("not before", |a| a.hold = Hold::Frozen { since: at(110), paged: Paged::Left }, 699, until(700), ""),
            ("killed before it is paged out", |a| a.hold = frozen_at(690), 750, Act::Kill, killed),
            (
                "counted from the last awake window",
                |a| (a.hold, a.awake_until) = (frozen_at(300), Some(at(300))),
                899,
                Act::PageOut,
                paged_out,
            ),
            ("and then killed", |a| (a.hold, a.awake_until) = (frozen_at(300), Some(at(300))), 900, Act::Kill, killed),
            (
                "cached: never by time",
                |a| (a.hold, a.profile) = (Hold::Frozen { since: at(110), paged: Paged::Done }, Profile::Cached),
                99_999,
                Act::Wait { until: None },
                "",
            ),
            (
                "frozen by hand: stays",
                |a| (a.hold, a.by_hand) = (Hold::Frozen { since: at(110), paged: Paged::Done }, Some("root")),
                99_999,
                Act::Wait { until: None },
                "",
            ),
            (
                "frozen by hand under observe: not even paged out",
                |a| (a.hold, a.by_hand, a.profile) = (frozen_at(110), Some("root"), Profile::Observe),
                99_999,
                Act::Wait { until: None },
                "",
            ),
            (
                "the kill failed",
                |a| {
                    (a.hold, a.kill_again) = (Hold::Frozen { since: at(710), paged: Paged::Done }, Retry::At(at(790)));
                },
                720,
                until(790),
                "",
            ),
            (
                "observe: would page out",
                |a| {
                    (a.profile, a.hold) =
                        (Profile::Observe, Hold::WouldBeFrozen { since: at(110), paged: Paged::NotYet });
                },
                170,
                Act::PageOut,
                paged_out,
            ),
            (
                "observe: would kill",
                |a| {
                    (a.profile, a.hold) =
                        (Profile::Observe, Hold::WouldBeFrozen { since: at(110), paged: Paged::Done });
                },
                700,
                Act::Kill,
                killed,
            ),
        ]);
    }

    #[test]
    fn what_was_asked_for_is_waited_for_but_not_for_ever() {
        let lost = "the freezer did not answer";
        check(&[
            ("freezing", |a| a.hold = Hold::Freezing { since: at(110) }, 114, until(115), ""),
            ("freeze lost", |a| a.hold = Hold::Freezing { since: at(110) }, 115, Act::NoAnswer, lost),
            ("thawing", |a| a.hold = Hold::Thawing { since: at(110), retry: None }, 114, until(115), ""),
            ("thaw lost", |a| a.hold = Hold::Thawing { since: at(110), retry: None }, 115, Act::NoAnswer, lost),
            ("thaw failed", |a| a.hold = Hold::Thawing { since: at(110), retry: Some(at(112)) }, 111, until(112), ""),
            (
                "thawed again, pending or not",
                |a| a.hold = Hold::Thawing { since: at(110), retry: Some(at(112)) },
                112,
                Act::Thaw,
                "the last attempt to thaw it failed",
            ),
            ("killing", |a| (a.hold, a.pending) = (Hold::Killing { since: at(700) }, true), 729, until(730), ""),
            ("kill lost", |a| a.hold = Hold::Killing { since: at(700) }, 730, Act::NoAnswer, "it did not end"),
        ]);
    }
}
