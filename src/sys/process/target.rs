//! One app's process: what is done to it now and what is waited for.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::{
    io::Errno,
    process::{Signal, pidfd_send_signal},
};

use super::{
    cgroup::Cgroup,
    hold::{Hold, Progress, Wait, read_frozen},
    home::{Home, ROUNDS, Survey, World},
    measure::Scope,
    page_out::Ticket,
    procfs::{MAX_MEMBERS, Member, Processes, Stat, is_gone},
    record::{Entry, Record},
    targets::UnitOf,
};
use crate::{
    event::{Event, Outcome},
    model::{AppKey, TargetId},
    sys::clock,
    time::{Instant, earliest},
};

/// A process that got SIGKILL and is there after this long hangs in the kernel.
const DEATH: Duration = Duration::from_secs(2);
/// For the manager of its unit to say that it will stop it, half of the grace at most; then SIGTERM comes from us.
const ASK: Duration = Duration::from_secs(2);
/// What a target needs of its surroundings for a while.
pub(super) struct Context<'a> {
    pub(super) registry: &'a Registry,
    pub(super) world: &'a World,
    pub(super) record: &'a mut Record,
    pub(super) made: &'a mut Vec<std::path::PathBuf>,
    pub(super) out: &'a mut Vec<Event>,
    /// A freeze or thaw the kernel has not confirmed by then is given up.
    pub(super) deadline: Duration,
}

#[derive(Debug)]
pub(super) struct Target {
    pub(super) id: TargetId,
    pub(super) app: AppKey,
    pub(super) main: Member,
    pub(super) pidfd: OwnedFd,
    /// For `cgroup.events` while it is held.
    pub(super) token: Token,
    pub(super) home: Home,
    pub(super) phase: Phase,
    pub(super) page_out: Option<Arc<Ticket>>,
    pub(super) kill: Option<Kill>,
}

#[derive(Debug)]
pub(super) enum Phase {
    Running,
    Freezing(Hold, Wait),
    Frozen(Hold),
    Thawing(Hold, Wait),
}

/// A kill under way.
#[derive(Debug)]
pub(super) struct Kill {
    deadline: Instant,
    forced: bool,
    /// The manager of its unit is asked, and SIGTERM is not sent before this.
    answer_by: Option<Instant>,
    /// The manager of its unit stops it, and whatever else is in the unit.
    pub(super) handed_over: bool,
    pub(super) members: Vec<Member>,
}

impl Kill {
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Target {
    pub(super) fn survey(&self, world: &World, others: &[(u32, Arc<str>)]) -> Result<Survey, Arc<str>> {
        // The pidfd says whether it lives, the start time that the pid is still its own.
        if has_ended(&self.pidfd) {
            return Err("its process has ended".into());
        }
        let survey = world.survey(&self.app.service, self.main, others)?;
        match survey.protected.as_ref().or(survey.conflict.as_ref()) {
            Some(reason) => Err(Arc::clone(reason)),
            None => Ok(survey),
        }
    }

    /// Where its processes are to be found for measuring.
    pub(super) fn scope(&self) -> Scope {
        let cgroup = match (&self.phase, &self.home) {
            (Phase::Freezing(Hold::Cgroup { cgroup, .. }, _) | Phase::Frozen(Hold::Cgroup { cgroup, .. }), _)
            | (_, Home::Cgroup { cgroup, .. }) => cgroup.try_clone().ok(),
            _ => None,
        };
        Scope { main: self.main, cgroup }
    }

    pub(super) fn due(&self) -> Option<Instant> {
        let wait = match &self.phase {
            Phase::Freezing(_, wait) | Phase::Thawing(_, wait) => Some(wait.next),
            Phase::Running | Phase::Frozen(_) => None,
        };
        let kill = self.kill.as_ref().and_then(|kill| earliest(Some(kill.deadline), kill.answer_by));
        earliest(wait, kill)
    }

    pub(super) fn freeze(&mut self, others: &[(u32, Arc<str>)], cx: &mut Context<'_>) {
        let refusal = match &self.phase {
            _ if self.kill.is_some() => Some("it is being ended".into()),
            Phase::Running => None,
            Phase::Freezing(..) => return,
            Phase::Frozen(_) => return self.tell(cx, Outcome::Frozen { took: Duration::ZERO }),
            Phase::Thawing(..) => Some("it is just being thawed".into()),
        };
        let started = match refusal {
            Some(reason) => Err(reason),
            None => self.survey(cx.world, others).and_then(|survey| self.begin(survey, cx)),
        };
        if let Err(reason) = started {
            self.tell(cx, Outcome::FreezeFailed(reason));
        }
    }

    fn begin(&mut self, survey: Survey, cx: &mut Context<'_>) -> Result<(), Arc<str>> {
        self.home = match survey.home {
            Home::Movable => match cx.world.make_own(&self.app.service, self.id, self.main, &survey.members) {
                Ok(cgroup) => {
                    cx.made.push(cgroup.path().to_owned());
                    Home::Cgroup { cgroup, whole: true }
                }
                Err(error) => {
                    log::warn!("{} cannot be moved to a cgroup of its own: {error}; using signals", self.app);
                    Home::Tree
                }
            },
            home => home,
        };
        let now = clock::boot();
        let wait = Wait::start(now, cx.deadline);
        let hold = match &self.home {
            Home::Cgroup { cgroup, .. } => self.freeze_cgroup(cgroup, cx)?,
            _ => Hold::Tree { stopped: Vec::new() },
        };
        self.phase = Phase::Freezing(hold, wait);
        self.step(now, cx);
        Ok(())
    }

    fn freeze_cgroup(&self, cgroup: &Cgroup, cx: &mut Context<'_>) -> Result<Hold, Arc<str>> {
        let failed = |error: io::Error| -> Arc<str> { format!("its cgroup cannot be frozen: {error}").into() };
        if cgroup.asked_frozen().map_err(failed)? || cgroup.events().map_err(failed)?.frozen {
            return Err("somebody else has frozen it already".into());
        }
        let cgroup = cgroup.try_clone().map_err(failed)?;
        let events = cgroup.open_file("cgroup.events").map_err(failed)?;
        let source = events.as_raw_fd();
        cx.registry.register(&mut SourceFd(&source), self.token, Interest::PRIORITY).map_err(failed)?;
        let done = cx
            .record
            .add(self.id, vec![Entry::cgroup(&cgroup)])
            .map_err(|error| format!("the freeze record cannot be written: {error}").into())
            .and_then(|()| cgroup.set_frozen(true).map_err(failed));
        let hold = Hold::Cgroup { cgroup, events };
        match done {
            Ok(()) => Ok(hold),
            Err(reason) => {
                self.let_go(hold, cx).err().into_iter().for_each(|error| log::error!("{}: {error}", self.app));
                Err(reason)
            }
        }
    }

    /// Looks at what is waited for.
    pub(super) fn step(&mut self, now: Instant, cx: &mut Context<'_>) {
        match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Freezing(mut hold, mut wait) => match self.is_held(&mut hold, cx) {
                Ok(Progress::Held) => {
                    self.phase = Phase::Frozen(hold);
                    self.tell(cx, Outcome::Frozen { took: clock::boot().since(wait.since) });
                }
                Ok(progress) if now < wait.deadline => {
                    wait.again(now, matches!(progress, Progress::Told));
                    self.phase = Phase::Freezing(hold, wait);
                }
                Ok(progress) => {
                    let after = now.since(wait.since).as_millis();
                    let mut reason = format!("it did not come to rest within {after} ms");
                    if let Progress::Look(why) = progress {
                        reason = format!("{reason}: {why}");
                    }
                    self.roll_back(hold, reason, cx);
                }
                Err(reason) => self.roll_back(hold, reason, cx),
            },
            Phase::Thawing(hold, mut wait) => match hold.is_running() {
                Ok(true) => {
                    self.end_hold(hold, cx);
                    cx.record.remove(self.id);
                    self.tell(cx, Outcome::Thawed { took: clock::boot().since(wait.since) });
                }
                Ok(false) if now < wait.deadline => {
                    wait.again(now, matches!(hold, Hold::Cgroup { .. }));
                    self.phase = Phase::Thawing(hold, wait);
                }
                Ok(false) => {
                    self.phase = Phase::Frozen(hold);
                    self.tell(
                        cx,
                        Outcome::ThawFailed("the kernel did not let it run (is something above it frozen?)".into()),
                    );
                }
                Err(error) => {
                    self.phase = Phase::Frozen(hold);
                    self.tell(cx, Outcome::ThawFailed(error.to_string().into()));
                }
            },
            phase => self.phase = phase,
        }
    }

    /// Whether everything of the app is held now. Children that were born meanwhile are taken in.
    fn is_held(&self, hold: &mut Hold, cx: &mut Context<'_>) -> Result<Progress, String> {
        match hold {
            Hold::Cgroup { cgroup, events } => self.is_cgroup_held(cgroup, events, cx),
            Hold::Tree { stopped } => {
                for _ in 0..ROUNDS {
                    if let Some(progress) = self.stop_more(stopped, cx)? {
                        return Ok(progress);
                    }
                }
                Ok(Progress::Look("it starts processes faster than they can be stopped".to_owned()))
            }
        }
    }

    fn is_cgroup_held(&self, cgroup: &Cgroup, events: &File, cx: &Context<'_>) -> Result<Progress, String> {
        if !read_frozen(events).map_err(|error| format!("cgroup.events cannot be read: {error}"))? {
            return Ok(Progress::Told);
        }
        let outside = cx.world.outside(cgroup, self.main).map_err(|error| error.to_string())?;
        let Some(first) = outside.first() else { return Ok(Progress::Held) };
        if cx.world.is_own(cgroup) {
            cx.world.gather(cgroup, self.main).map_err(|error| error.to_string())?;
        }
        // It may also be one that was just ending.
        Ok(Progress::Look(format!("process {} below it runs outside its cgroup", first.pid)))
    }

    /// Stops what can be stopped now: the main process, and whatever runs below a process that is stopped already.
    ///
    /// Never a child before its parent: a parent in vfork(2), as posix_spawn(3) uses it, cannot stop until its child has
    /// started its program, so a child stopped before that would keep both from ever coming to rest. And below a process
    /// that is stopped no more are born. `None` when another look will show more.
    fn stop_more(&self, stopped: &mut Vec<Member>, cx: &mut Context<'_>) -> Result<Option<Progress>, String> {
        let processes = Processes::now().map_err(|error| format!("/proc cannot be read: {error}"))?;
        let tree = processes.tree(self.main.pid).ok_or("it has more than 4096 processes")?;
        // Pids of the dead are of no use here: none of ours is given away while its parent is stopped.
        let at_rest: HashMap<u32, bool> =
            stopped.iter().filter_map(|member| Some((member.pid, member.is_stopped()?))).collect();
        let known: HashSet<Member> = stopped.iter().copied().collect();
        let unknown = tree.into_iter().filter(|stat| !stat.is_dead() && !known.contains(&Member::of(stat)));
        let unknown: Vec<_> = unknown.collect();
        if let Some(stat) = unknown.iter().find(|stat| stat.is_stopped()) {
            return Err(format!("process {} ({}) was stopped by somebody else before", stat.pid, stat.comm));
        }
        let may_stop = |stat: &&&Stat| stat.pid == self.main.pid || at_rest.get(&stat.parent) == Some(&true);
        let now: Vec<Member> = unknown.iter().filter(may_stop).map(|stat| Member::of(stat)).collect();
        if now.is_empty() {
            let moving = at_rest.iter().find(|(_, at_rest)| !**at_rest).map(|(pid, _)| *pid);
            let moving = moving.or(unknown.first().map(|stat| stat.pid));
            return Ok(Some(match moving {
                Some(pid) => Progress::Look(format!("process {pid} does not stop")),
                None => Progress::Held,
            }));
        }
        if stopped.len() + now.len() > MAX_MEMBERS {
            return Err("it has more than 4096 processes".to_owned());
        }
        let entries = now.iter().copied().map(Entry::process).collect();
        cx.record.add(self.id, entries).map_err(|error| format!("the freeze record cannot be written: {error}"))?;
        for member in now {
            stopped.push(member);
            match member.signal(Signal::STOP) {
                Err(error) if !is_gone(&error) => {
                    return Err(format!("process {} cannot be stopped: {error}", member.pid));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    pub(super) fn thaw(&mut self, cx: &mut Context<'_>) {
        self.cancel_page_out();
        let hold = match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Running => return self.tell(cx, Outcome::Thawed { took: Duration::ZERO }),
            Phase::Freezing(hold, _) => {
                self.tell(cx, Outcome::FreezeFailed("it was asked to run again first".into()));
                hold
            }
            Phase::Frozen(hold) => hold,
            thawing @ Phase::Thawing(..) => {
                self.phase = thawing;
                return;
            }
        };
        let now = clock::boot();
        match hold.release() {
            Ok(()) => {
                self.phase = Phase::Thawing(hold, Wait::start(now, cx.deadline));
                self.step(now, cx);
            }
            Err(error) => {
                self.phase = Phase::Frozen(hold);
                self.tell(cx, Outcome::ThawFailed(error.to_string().into()));
            }
        }
    }

    /// Asks it to end; SIGKILL follows after `grace`. Gives the unit whose manager is to ask it.
    pub(super) fn kill(&mut self, grace: Duration, others: &[(u32, Arc<str>)], cx: &mut Context<'_>) -> Option<UnitOf> {
        if self.kill.is_some() {
            return None;
        }
        let begun = self.survey(cx.world, others).and_then(|survey| {
            self.stop_holding(cx).map_err(|error| format!("it cannot be thawed: {error}"))?;
            Ok(survey)
        });
        let survey = match begun {
            Ok(survey) => survey,
            Err(reason) => {
                self.tell(cx, Outcome::KillFailed(reason));
                return None;
            }
        };
        let unit = cx.world.unit(&survey.home).map(|group| UnitOf { app: self.app.clone(), group });
        let now = clock::boot();
        let answer_by = Some(now + if unit.is_some() { ASK.min(grace / 2) } else { Duration::ZERO });
        self.kill =
            Some(Kill { deadline: now + grace, forced: false, answer_by, handed_over: false, members: survey.members });
        if unit.is_none() {
            self.terminate(cx);
        }
        unit
    }

    /// The manager of its unit answered: it asks the app to end, or we do.
    pub(super) fn unit_stopped(&mut self, answer: Result<(), Arc<str>>, cx: &mut Context<'_>) {
        let Some(kill) = self.kill.as_mut().filter(|kill| !kill.forced) else { return };
        match answer {
            Ok(()) => (kill.answer_by, kill.handed_over) = (None, true),
            Err(reason) => {
                log::info!("{}: ended by signals: {reason}", self.app);
                self.terminate(cx);
            }
        }
    }

    /// SIGTERM, for whoever it is now known to be. A process that ended meanwhile is told of by its pidfd.
    fn terminate(&mut self, cx: &mut Context<'_>) {
        let Some(kill) = &mut self.kill else { return };
        (kill.answer_by, kill.handed_over) = (None, false);
        match pidfd_send_signal(self.pidfd.as_fd(), Signal::TERM) {
            Err(error) if error != Errno::SRCH => {
                self.kill = None;
                return self.tell(cx, Outcome::KillFailed(format!("SIGTERM: {error}").into()));
            }
            _ => {}
        }
        for member in kill.members.iter().filter(|member| **member != self.main) {
            if let Err(error) = member.signal(Signal::TERM) {
                log::debug!("{}: SIGTERM to process {}: {error}", self.app, member.pid);
            }
        }
    }

    /// The grace is over.
    pub(super) fn force(&mut self, now: Instant, others: &[(u32, Arc<str>)], cx: &mut Context<'_>) {
        if self.kill.as_ref().and_then(|kill| kill.answer_by).is_some_and(|by| by <= now) {
            log::info!("{}: ended by signals: systemd does not answer", self.app);
            self.terminate(cx);
        }
        let Some(kill) = self.kill.take_if(|kill| kill.deadline <= now) else { return };
        if kill.forced {
            return self.tell(cx, Outcome::KillFailed("it hangs in the kernel and does not die".into()));
        }
        // Looked at once more: only what is still the app alone may go with it. The main process is known by its pidfd.
        let survey = self.survey(cx.world, others);
        if let Err(error) = pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL) {
            return self.tell(cx, Outcome::KillFailed(format!("SIGKILL: {error}").into()));
        }
        match survey {
            Ok(Survey { home: Home::Cgroup { cgroup, .. }, .. }) if cgroup.kill().is_ok() => {}
            Ok(survey) => kill_all(survey.members),
            Err(reason) => log::info!("{}: only its main process was killed: {reason}", self.app),
        }
        self.kill = Some(Kill { deadline: now + DEATH, forced: true, answer_by: None, handed_over: false, ..kill });
    }

    /// Lets it run at once, without waiting for the kernel's word. An announced outcome is still given.
    pub(super) fn stop_holding(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        self.cancel_page_out();
        let (hold, outcome) = match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Running => return Ok(()),
            Phase::Freezing(hold, _) => {
                (hold, Some(Outcome::FreezeFailed("something else was asked of it first".into())))
            }
            Phase::Frozen(hold) => (hold, None),
            Phase::Thawing(hold, wait) => (hold, Some(Outcome::Thawed { took: clock::boot().since(wait.since) })),
        };
        if let Some(outcome) = outcome {
            self.tell(cx, outcome);
        }
        self.let_go(hold, cx)
    }

    pub(super) fn cancel_page_out(&mut self) {
        if let Some(ticket) = self.page_out.take() {
            ticket.cancel();
        }
    }

    fn roll_back(&self, hold: Hold, mut reason: String, cx: &mut Context<'_>) {
        if let Err(error) = self.let_go(hold, cx) {
            reason = format!("{reason}; and thawing it failed: {error}");
        }
        self.tell(cx, Outcome::FreezeFailed(reason.into()));
    }

    /// Releases `hold` and forgets it; what cannot be released stays in the record for the next try.
    fn let_go(&self, hold: Hold, cx: &mut Context<'_>) -> io::Result<()> {
        let released = hold.release();
        self.end_hold(hold, cx);
        match &released {
            Ok(()) => cx.record.remove(self.id),
            Err(_) => cx.record.abandon(self.id),
        }
        released
    }

    fn end_hold(&self, hold: Hold, cx: &Context<'_>) {
        if let Hold::Cgroup { events, .. } = &hold {
            // Closing it would do the same; only its order with a new registration of the token is made sure here.
            let _ = cx.registry.deregister(&mut SourceFd(&events.as_raw_fd()));
        }
    }

    fn tell(&self, cx: &mut Context<'_>, outcome: Outcome) {
        cx.out.push(Event::Outcome(self.id, outcome));
    }
}

/// Whether the process behind `pidfd` has ended.
pub(super) fn has_ended(pidfd: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    // An error other than a signal is none we can have here; then it counts as ended, and nothing is done to it.
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_or(true, |ready| ready > 0)
}

/// SIGKILL for these very processes and what they have started since.
pub(super) fn kill_all(members: Vec<Member>) {
    let processes = Processes::now().unwrap_or_default();
    for member in members {
        // A pid that is somebody else's by now has another start time, and then so do all below it.
        let same = processes.find(member.pid).is_some_and(|stat| Member::of(stat) == member);
        let below = if same { processes.tree(member.pid) } else { None };
        for member in below.into_iter().flatten().map(Member::of) {
            if let Err(error) = member.signal(Signal::KILL)
                && !is_gone(&error)
            {
                log::warn!("SIGKILL to process {}: {error}", member.pid);
            }
        }
    }
}
