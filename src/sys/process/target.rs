//! One app's process: what is done to it now and what is waited for.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::{
    io::Errno,
    process::{Signal, pidfd_send_signal},
};

use super::{
    cgroup::Cgroup,
    hold::{Hold, Progress, Wait, hanging, read_frozen},
    home::{Home, Survey, Walk, World, move_to},
    inspect::{Held, Inspection, Loose, Request, Usage, inspect, veto},
    look::{Haste, Looker, Sight, Ticket as LookTicket},
    measure::Scope,
    oom::Oom,
    page_out::Ticket,
    procfs::{MAX_MEMBERS, Member, Processes, Stat, is_gone},
    record::{Entry, Record},
    targets::UnitOf,
};
use crate::{
    event::{Event, Outcome},
    model::{AppKey, TargetId, VetoKind},
    sys::clock,
    time::{Instant, earliest},
};

/// A process that got SIGKILL and is there after this long hangs in the kernel.
const DEATH: Duration = Duration::from_secs(2);
/// An inspection that has begun and not answered by then has failed.
const INSPECTION: Duration = Duration::from_secs(5);
/// What an inspection found out about the processes may be used for a freeze as long as this.
const FRESH: Duration = Duration::from_secs(5);
/// For the manager of its unit to say that it will stop it, half of the grace at most; then SIGTERM comes from us.
const ASK: Duration = Duration::from_secs(2);
/// What a target needs of its surroundings for a while.
pub(super) struct Context<'a> {
    pub(super) registry: &'a Registry,
    pub(super) world: &'a Arc<World>,
    pub(super) looker: &'a Looker,
    pub(super) record: &'a mut Record,
    pub(super) made: &'a mut Vec<std::path::PathBuf>,
    pub(super) out: &'a mut Vec<Event>,
    /// A freeze or thaw the kernel has not confirmed by then is given up.
    pub(super) deadline: Duration,
    /// For the processes of what is held.
    pub(super) oom_score_adj: Option<i16>,
}

#[derive(Debug)]
pub(super) struct Target {
    pub(super) id: TargetId,
    pub(super) app: AppKey,
    pub(super) main: Member,
    /// Whom it runs as.
    pub(super) uid: u32,
    pub(super) pidfd: OwnedFd,
    /// For `cgroup.events` while it is held.
    pub(super) token: Token,
    pub(super) home: Home,
    pub(super) phase: Phase,
    pub(super) page_out: Option<Arc<Ticket>>,
    pub(super) kill: Option<Kill>,
    pub(super) oom: Oom,
    pub(super) look: Look,
}

/// What is being looked at for a target, and what was seen last.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// The look a freeze waits for.
    asked: Option<u64>,
    /// What that look saw.
    processes: Option<io::Result<Arc<Processes>>>,
    /// The inspection under way, and when it has failed.
    inspection: Option<(LookTicket, Instant)>,
    /// What the last inspection found out about the processes, and when.
    survey: Option<(Survey, Instant)>,
    /// When it came to rest.
    usage: Option<Usage>,
    /// The last inspection found some of it awake.
    was_loose: bool,
}

#[derive(Debug)]
pub(super) enum Phase {
    Running,
    /// About to be held: what is to be held is being looked at.
    Looking(Wait),
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
        let survey = world.survey(&self.app.service, self.main, others, Walk::Own)?;
        match survey.refusal() {
            Some(reason) => Err(reason),
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
            Phase::Looking(wait) | Phase::Freezing(_, wait) | Phase::Thawing(_, wait) => Some(wait.next),
            Phase::Running | Phase::Frozen(_) => None,
        };
        let inspection = self.look.inspection.as_ref().map(|(_, deadline)| *deadline);
        let kill = self.kill.as_ref().and_then(|kill| earliest(Some(kill.deadline), kill.answer_by));
        earliest(earliest(wait, kill), earliest(inspection, self.oom.due()))
    }

    pub(super) fn freeze(&mut self, others: &[(u32, Arc<str>)], cx: &mut Context<'_>) {
        let refusal = match &self.phase {
            _ if self.kill.is_some() => Some("it is being ended".into()),
            Phase::Running => None,
            Phase::Looking(_) | Phase::Freezing(..) => return,
            Phase::Frozen(_) => return self.tell(cx, Outcome::Frozen { took: Duration::ZERO }),
            Phase::Thawing(..) => Some("it is just being thawed".into()),
        };
        if let Some(reason) = refusal {
            return self.tell(cx, Outcome::FreezeFailed(reason));
        }
        self.oom.restore_all();
        cx.record.remove_all(self.id);
        let now = clock::boot();
        let wait = Wait::start(now, cx.deadline);
        let fresh = self.look.survey.take().filter(|(_, at)| now.since(*at) <= FRESH);
        match fresh.and_then(|(survey, _)| cx.world.confirm(survey, self.main, others)) {
            Some(survey) => self.begin(survey, wait, cx),
            None => self.ask_survey(wait, others, cx),
        }
    }

    /// Has the app looked at, and is frozen then.
    fn ask_survey(&mut self, mut wait: Wait, others: &[(u32, Arc<str>)], cx: &mut Context<'_>) {
        let (world, service, main) = (Arc::clone(cx.world), Arc::clone(&self.app.service), self.main);
        let (others, walk) = (others.to_vec(), Walk::Shared(clock::boot()));
        let look = move || Sight::Survey(world.survey(&service, main, &others, walk));
        self.look.asked = cx.looker.ask(self.id, Haste::Now, look).map(|ticket| ticket.number);
        if self.look.asked.is_none() {
            return self.tell(cx, Outcome::FreezeFailed("too much other work is waiting".into()));
        }
        wait.only_deadline();
        self.phase = Phase::Looking(wait);
    }

    /// A look has ended.
    pub(super) fn seen(&mut self, ticket: u64, sight: Sight, others: &[(u32, Arc<str>)], cx: &mut Context<'_>) {
        if let Sight::Inspection(inspection) = sight {
            if self.look.inspection.take_if(|(asked, _)| asked.number == ticket).is_some() {
                self.inspected(*inspection, cx);
            }
            return;
        }
        // One that nobody waits for any more.
        if self.look.asked.take_if(|asked| *asked == ticket).is_none() {
            return;
        }
        match sight {
            Sight::Survey(survey) => {
                let Phase::Looking(wait) = self.phase else { return };
                self.phase = Phase::Running;
                let survey = match survey {
                    Ok(survey) if survey.refusal().is_some() || has_ended(&self.pidfd) => Ok(Some(survey)),
                    Ok(survey) => Ok(cx.world.confirm(survey, self.main, others)),
                    Err(reason) => Err(reason),
                };
                match survey {
                    Ok(Some(survey)) => self.begin(survey, wait, cx),
                    // It has changed since. That comes to an end, or the time does.
                    Ok(None) if clock::boot() < wait.deadline => self.ask_survey(wait, others, cx),
                    Ok(None) => {
                        self.tell(cx, Outcome::FreezeFailed("it changes faster than it can be looked at".into()));
                    }
                    Err(reason) => self.tell(cx, Outcome::FreezeFailed(reason)),
                }
            }
            Sight::Processes(processes) if matches!(self.phase, Phase::Freezing(..)) => {
                self.look.processes = Some(processes);
                self.step(clock::boot(), cx);
            }
            Sight::Processes(_) | Sight::Inspection(_) => {}
        }
    }

    /// Has it looked at whether something speaks against holding it.
    pub(super) fn inspect(&mut self, others: &[(u32, Arc<str>)], cx: &mut Context<'_>) {
        // The one under way answers this as well.
        if self.look.inspection.is_some() {
            return;
        }
        let held = match &self.phase {
            Phase::Frozen(Hold::Cgroup { cgroup, .. }) => {
                cgroup.try_clone().ok().map(|cgroup| Held::Cgroup { cgroup, usage: self.look.usage })
            }
            Phase::Frozen(Hold::Tree { stopped }) => Some(Held::Tree { stopped: stopped.clone() }),
            _ => None,
        };
        let request = Request {
            world: Arc::clone(cx.world),
            service: Arc::clone(&self.app.service),
            main: self.main,
            others: others.to_vec(),
            held,
            asked: clock::boot(),
        };
        match cx.looker.ask(self.id, Haste::Whenever, move || Sight::Inspection(Box::new(inspect(request)))) {
            Some(ticket) => self.look.inspection = Some((ticket, clock::boot() + INSPECTION)),
            None => cx.out.push(Event::Inspected(self.id, Err("too much other work is waiting".into()))),
        }
    }

    fn inspected(&mut self, inspection: Inspection, cx: &mut Context<'_>) {
        let Inspection { mut vetoes, survey, loose } = inspection;
        // Without a veto it is frozen next. Otherwise nobody would need it, and it holds a file descriptor.
        self.look.survey =
            survey.filter(|_| matches!(self.phase, Phase::Running) && vetoes.as_ref().is_ok_and(Vec::is_empty));
        let is_loose = loose.is_some_and(|loose| self.mend(loose, cx));
        // Once it is mended; one that comes loose again is told of.
        if is_loose
            && self.look.was_loose
            && let Ok(vetoes) = &mut vetoes
        {
            vetoes.push(veto(VetoKind::NotHeld, "parts of it run again and again although they are held still"));
        }
        self.look.was_loose = is_loose;
        if has_ended(&self.pidfd) {
            vetoes = Err("its process has ended".into());
        }
        cx.out.push(Event::Inspected(self.id, vetoes));
    }

    /// Takes in again what runs although it should be held still. False when it is not held (any more).
    fn mend(&mut self, loose: Loose, cx: &mut Context<'_>) -> bool {
        let mut phase = std::mem::replace(&mut self.phase, Phase::Running);
        let mended = match (&mut phase, loose) {
            (Phase::Frozen(Hold::Cgroup { cgroup, .. }), Loose::Outside(members)) => {
                Some(move_to(cgroup, &members).map_err(|error| error.to_string()))
            }
            (Phase::Frozen(Hold::Tree { stopped }), Loose::Awake(processes)) => {
                for member in stopped.iter().filter(|member| member.is_stopped() == Some(false)) {
                    let _ = member.signal(Signal::STOP);
                }
                Some(self.stop_more(stopped, &processes, cx).map(drop))
            }
            _ => None,
        };
        self.phase = phase;
        if let Some(Err(error)) = &mended {
            log::warn!("{}: parts of it run although it is held still: {error}", self.app);
        }
        mended.is_some()
    }

    /// Does what is due apart from what it waits for.
    pub(super) fn work(&mut self, now: Instant, cx: &mut Context<'_>) {
        if let Some((ticket, deadline)) = self.look.inspection.as_mut().filter(|(_, deadline)| *deadline <= now) {
            if ticket.begun.load(Ordering::Relaxed) {
                self.look.inspection = None;
                cx.out.push(Event::Inspected(self.id, Err("looking at it took too long".into())));
            } else {
                // It waits behind others: many went to the background at a time. The core has a deadline for that.
                *deadline = now + INSPECTION;
            }
        }
        let (id, record) = (self.id, &mut *cx.record);
        let Some(to) = cx.oom_score_adj else { return };
        let write_down = |raised: &[super::oom::Raised]| {
            if raised.is_empty() { Ok(()) } else { record.add(id, raised.iter().copied().map(Entry::Oom).collect()) }
        };
        if self.oom.work(now, to, write_down) {
            cx.record.remove_all(id);
        }
    }

    fn begin(&mut self, survey: Survey, wait: Wait, cx: &mut Context<'_>) {
        let refusal = if has_ended(&self.pidfd) { Some("its process has ended".into()) } else { survey.refusal() };
        let begun = match refusal {
            Some(reason) => Err(reason),
            None => self.hold(survey, wait, cx),
        };
        if let Err(reason) = begun {
            self.tell(cx, Outcome::FreezeFailed(reason));
        }
    }

    fn hold(&mut self, survey: Survey, wait: Wait, cx: &mut Context<'_>) -> Result<(), Arc<str>> {
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
        let hold = match &self.home {
            Home::Cgroup { cgroup, .. } => self.freeze_cgroup(cgroup, cx)?,
            _ => Hold::Tree { stopped: Vec::new() },
        };
        self.look = Look { inspection: self.look.inspection.take(), ..Look::default() };
        self.phase = Phase::Freezing(hold, wait);
        self.step(clock::boot(), cx);
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
            Phase::Looking(wait) if now < wait.deadline => self.phase = Phase::Looking(wait),
            Phase::Looking(wait) => {
                self.look.asked = None;
                let after = now.since(wait.since).as_millis();
                let reason = format!("its processes could not be looked at within {after} ms");
                self.tell(cx, Outcome::FreezeFailed(reason.into()));
            }
            Phase::Freezing(mut hold, mut wait) => match self.is_held(&mut hold, cx) {
                Ok(Progress::Held(members)) => self.held(hold, members, wait, cx),
                Ok(progress) if now < wait.deadline => {
                    wait.again(now, matches!(progress, Progress::Told));
                    self.phase = Phase::Freezing(hold, wait);
                }
                Ok(progress) => {
                    let after = now.since(wait.since).as_millis();
                    let mut reason = format!("it did not come to rest within {after} ms");
                    let why = match progress {
                        Progress::Look(why) => Some(why),
                        Progress::Told | Progress::Held(_) => hanging(&hold),
                    };
                    if let Some(why) = why {
                        reason = format!("{reason}: {why}");
                    }
                    self.roll_back(hold, reason, cx);
                }
                Err(reason) => self.roll_back(hold, reason, cx),
            },
            Phase::Thawing(hold, mut wait) => match hold.is_running() {
                Ok(true) => {
                    self.end_hold(hold, cx);
                    self.tell(cx, Outcome::Thawed { took: clock::boot().since(wait.since) });
                    // The record is only written anew once all is done: someone waits for it to run.
                    if !self.oom.restore(now) {
                        cx.record.remove_all(self.id);
                    }
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

    /// Everything of it is held.
    fn held(&mut self, hold: Hold, members: Vec<Member>, wait: Wait, cx: &mut Context<'_>) {
        if let Hold::Cgroup { cgroup, .. } = &hold {
            self.look.usage = Usage::of(cgroup);
        }
        self.phase = Phase::Frozen(hold);
        let now = clock::boot();
        self.tell(cx, Outcome::Frozen { took: now.since(wait.since) });
        if cx.oom_score_adj.is_some() {
            self.oom.raise(members, now);
        }
    }

    /// Whether everything of the app is held now. Children that were born meanwhile are taken in.
    fn is_held(&mut self, hold: &mut Hold, cx: &mut Context<'_>) -> Result<Progress, String> {
        if let Hold::Cgroup { events, .. } = hold
            && !read_frozen(events).map_err(|error| format!("cgroup.events cannot be read: {error}"))?
        {
            // What was seen before it came to rest says nothing.
            (self.look.asked, self.look.processes) = (None, None);
            return Ok(Progress::Told);
        }
        let Some(processes) = self.look.processes.take() else {
            if self.look.asked.is_none() {
                self.ask_processes(cx);
            }
            return match self.look.asked {
                Some(_) => Ok(Progress::Told),
                None => Err("too much other work is waiting".to_owned()),
            };
        };
        let processes = processes.map_err(|error| format!("/proc cannot be read: {error}"))?;
        match hold {
            Hold::Cgroup { cgroup, .. } => self.is_cgroup_held(cgroup, &processes, cx),
            Hold::Tree { stopped } => match self.stop_more(stopped, &processes, cx)? {
                Some(progress) => Ok(progress),
                None => {
                    self.ask_processes(cx);
                    Ok(Progress::Told)
                }
            },
        }
    }

    fn ask_processes(&mut self, cx: &Context<'_>) {
        let (world, walk) = (Arc::clone(cx.world), Walk::Shared(clock::boot()));
        let look = move || Sight::Processes(world.walk(walk));
        self.look.asked = cx.looker.ask(self.id, Haste::Now, look).map(|ticket| ticket.number);
    }

    fn is_cgroup_held(&self, cgroup: &Cgroup, processes: &Processes, cx: &Context<'_>) -> Result<Progress, String> {
        let outside = cx.world.outside(cgroup, self.main, processes).map_err(|error| error.to_string())?;
        let Some(first) = outside.first() else { return Ok(Progress::Held(cx.world.inside(cgroup, processes))) };
        if cx.world.is_own(cgroup) {
            move_to(cgroup, &outside).map_err(|error| error.to_string())?;
        }
        // It may also be one that was just ending.
        Ok(Progress::Look(format!("process {} below it runs outside its cgroup", first.pid)))
    }

    /// Stops what can be stopped now: the main process, and whatever runs below a process that is stopped already.
    ///
    /// Never a child before its parent: a parent in vfork(2), as posix_spawn(3) uses it, cannot stop until its child has
    /// started its program, so a child stopped before that would keep both from ever coming to rest. And below a process
    /// that is stopped no more are born. `None` when another look will show more.
    fn stop_more(
        &self,
        stopped: &mut Vec<Member>,
        processes: &Processes,
        cx: &mut Context<'_>,
    ) -> Result<Option<Progress>, String> {
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
                None => Progress::Held(stopped.clone()),
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
            Phase::Looking(_) => {
                self.look.asked = None;
                self.tell(cx, Outcome::FreezeFailed("it was asked to run again first".into()));
                return self.tell(cx, Outcome::Thawed { took: Duration::ZERO });
            }
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
        self.oom.restore_all();
        cx.record.remove_oom(self.id);
        let (hold, outcome) = match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Running => {
                cx.record.remove(self.id);
                return Ok(());
            }
            Phase::Looking(_) => {
                self.look.asked = None;
                self.tell(cx, Outcome::FreezeFailed("something else was asked of it first".into()));
                return Ok(());
            }
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
