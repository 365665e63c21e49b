//! All targets: the door the loop uses.

use std::{
    collections::{HashMap, VecDeque},
    fs, io,
    os::fd::AsRawFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mio::{Interest, Registry, Token, unix::SourceFd};

use super::{
    cgroup::Cgroup,
    home::{Home, Walk, World, remove},
    look::{Looker, Seen},
    measure::{Batch, Scope},
    oom::Oom,
    own,
    page_out::{self, Ticket},
    procfs::{Member, ProcDir, parse_uids},
    record::{Record, thaw_leftovers},
    target::{Context, Look, Phase, Target, has_ended, kill_all},
    whose::whose,
    zram::{self, Crowd},
};
use crate::{
    event::{Event, Outcome},
    model::{AppKey, Bus, Freezer, ProcessFacts, TargetId},
    sys::{
        clock,
        inbox::{Process, Sender},
        jobs::Jobs,
    },
    time::{Instant, earliest},
};

/// Targets at most.
const MAX_TARGETS: usize = 4096;

/// Apps measured with one look at what they share, which is a little old by the last of them.
const BATCH: usize = 64;
/// Measurements waiting at most: the core asks for one of each app at a time.
const MAX_SAMPLES: usize = 2 * MAX_TARGETS;

/// After a kill, until its cgroup is removed.
const SWEEP: Duration = Duration::from_secs(1);

/// Two targets of one process (tests have them) must not make cgroups of the same name.
static NEXT_TARGET: AtomicU64 = AtomicU64::new(1);

/// Why [`Targets::new`] failed.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Nothing may be frozen that cannot be written down first.
    #[error("cannot keep the freeze record in {}: {error}; give a directory on a tmpfs that is the daemon's own", dir.display())]
    Record {
        /// The runtime directory.
        dir: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
    /// `/proc` is not what it should be.
    #[error("cannot read /proc: {0}; is it mounted?")]
    Proc(io::Error),
    /// No eventfd could be made.
    #[error("cannot make an eventfd: {0}")]
    Eventfd(io::Error),
}

/// What is found out by itself unless said otherwise.
#[derive(Clone, Debug)]
pub struct Options {
    /// Never use cgroups.
    pub signals_only: bool,
    /// Where the cgroup v2 hierarchy is mounted, instead of what `/proc/self/mountinfo` says.
    pub cgroup_mount: Option<PathBuf>,
    /// Whether systemd manages the cgroups, instead of whether `/run/systemd/system` is there.
    pub systemd: Option<bool>,
    /// A freeze or thaw that the kernel has not confirmed by then has failed.
    pub deadline: Duration,
    /// `oom_score_adj` of what is held still, for each process where it is not higher already; `None`: left alone.
    pub oom_score_adj: Option<i16>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            signals_only: false,
            cgroup_mount: None,
            systemd: None,
            deadline: Duration::from_secs(2),
            oom_score_adj: Some(900),
        }
    }
}

/// A systemd unit that holds an app and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitOf {
    /// Whose it is.
    pub app: AppKey,
    /// Its cgroup, below the root of the hierarchy.
    pub group: String,
}

/// The processes behind apps' names. Owned by the loop thread; never blocks. Results are taken with
/// [`Targets::drain`], those of measuring and paging out come through the inbox.
pub struct Targets {
    registry: Registry,
    first_token: usize,
    sender: Sender,
    jobs: Jobs,
    samples: Arc<Mutex<Samples>>,
    page_outs: Arc<Crowd>,
    world: Arc<World>,
    looker: Looker,
    record: Record,
    deadline: Duration,
    oom_score_adj: Option<i16>,
    targets: HashMap<TargetId, Target>,
    /// By token: two for each target, its pidfd's and its `cgroup.events`'.
    slots: Vec<Option<TargetId>>,
    killed: Vec<Killed>,
    /// Cgroups made by us, or by a daemon before us, that still have somebody in them.
    made: Vec<PathBuf>,
    /// What was killed takes a moment to leave its cgroup.
    sweep_at: Option<Instant>,
    out: Vec<Event>,
}

/// Measurements asked for. One worker takes them all.
#[derive(Default)]
struct Samples {
    waiting: VecDeque<(TargetId, Scope)>,
    running: bool,
}

/// The rest of an app whose main process ended on SIGTERM.
struct Killed {
    deadline: Instant,
    members: Vec<Member>,
    cgroup: Option<Cgroup>,
}

impl Targets {
    /// Tokens used, from `first_token` on.
    pub const TOKENS: usize = 2 * MAX_TARGETS + 1;

    /// Thaws what an earlier daemon left in `runtime_dir` and starts a freeze record there.
    ///
    /// # Errors
    /// When the record cannot be written or `/proc` cannot be read.
    pub fn new(
        registry: Registry,
        first_token: usize,
        sender: Sender,
        jobs: Jobs,
        runtime_dir: PathBuf,
        options: Options,
    ) -> Result<Self, ProcessError> {
        let report = thaw_leftovers(&runtime_dir);
        if !report.is_empty() {
            log::warn!("left frozen by the daemon before: {report}");
        }
        let world = World::new(options.cgroup_mount, options.systemd).map_err(ProcessError::Proc)?;
        let record = Record::open(&runtime_dir).map_err(|error| ProcessError::Record { dir: runtime_dir, error })?;
        let made = world.sweep_dead();
        let world = if options.signals_only { world.signals_only() } else { world };
        let token = Token(first_token + 2 * MAX_TARGETS);
        let looker = Looker::new(&registry, token, Arc::clone(world.walks())).map_err(ProcessError::Eventfd)?;
        Ok(Self {
            registry,
            first_token,
            sender,
            jobs,
            samples: Arc::default(),
            page_outs: Arc::default(),
            world: Arc::new(world),
            looker,
            record,
            deadline: options.deadline,
            oom_score_adj: options.oom_score_adj,
            targets: HashMap::new(),
            slots: Vec::new(),
            killed: Vec::new(),
            made,
            sweep_at: None,
            out: Vec::new(),
        })
    }

    /// Takes the process behind `app`'s name into care. Nothing is done to it yet.
    ///
    /// # Errors
    /// As a sentence part, when it has ended, is not the one meant, or there are 4096 already.
    pub fn adopt(&mut self, app: &AppKey, process: Process) -> Result<(TargetId, ProcessFacts), Arc<str>> {
        let main = identify(app, &process)?;
        let id = TargetId(NEXT_TARGET.fetch_add(1, Ordering::Relaxed));
        let survey = self.world.survey(&app.service, main, &[], Walk::Own)?;
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        if slot >= MAX_TARGETS {
            return Err("there are 4096 apps already".into());
        }
        let token = self.first_token + 2 * slot;
        self.registry
            .register(&mut SourceFd(&process.pidfd.as_raw_fd()), Token(token), Interest::READABLE)
            .map_err(|error| format!("its end cannot be watched: {error}"))?;
        let (freezer, cgroup) = match &survey.home {
            Home::Cgroup { cgroup, .. } => (Freezer::Cgroup2, Some(cgroup)),
            Home::Movable => (Freezer::Cgroup2, None),
            Home::Tree => (Freezer::Signal, None),
        };
        let can_page_out = survey.protected.is_none() && page_out::is_possible(cgroup);
        let protected = survey.protected.map(|role| role.reason);
        let facts = ProcessFacts { pid: main.pid, freezer, can_page_out, protected };
        let target = Target {
            id,
            app: app.clone(),
            main,
            uid: process.uid,
            pidfd: process.pidfd,
            token: Token(token + 1),
            home: survey.home,
            phase: Phase::Running,
            page_out: None,
            kill: None,
            oom: Oom::default(),
            look: Look::default(),
        };
        match self.slots.get_mut(slot) {
            Some(free) => *free = Some(id),
            None => self.slots.push(Some(id)),
        }
        self.targets.insert(id, target);
        Ok((id, facts))
    }

    /// Holds the app still. Ends with `Frozen` or `FreezeFailed`.
    pub fn freeze(&mut self, id: TargetId) {
        let ended = || Outcome::FreezeFailed("its process has ended".into());
        self.with_others(id, ended, |target, others, cx| target.freeze(others, cx));
    }

    /// Lets it run. Ends with `Thawed` or `ThawFailed`.
    pub fn thaw(&mut self, id: TargetId) {
        self.with(id, |target, cx| target.thaw(cx));
        if !self.targets.contains_key(&id) {
            self.out.push(Event::Outcome(id, Outcome::ThawFailed("its process has ended".into())));
        }
    }

    /// Asks it to end with SIGTERM, and kills it after `grace`. Ends with `TargetGone` or `KillFailed`.
    ///
    /// Where it is alone in a cgroup that bears the name of a systemd unit, it is thawed, and the unit is given back: its
    /// manager is to be asked first, so that `ExecStop=` runs and `Restart=` does not bring it back. SIGTERM then follows
    /// when [`Targets::unit_stopped`] tells of a refusal, or nothing in time.
    pub fn kill(&mut self, id: TargetId, grace: Duration) -> Option<UnitOf> {
        let ended = || Outcome::KillFailed("its process has ended".into());
        let mut unit = None;
        self.with_others(id, ended, |target, others, cx| unit = target.kill(grace, others, cx));
        unit
    }

    /// What the manager of its unit answered.
    pub fn unit_stopped(&mut self, id: TargetId, answer: Result<(), Arc<str>>) {
        self.with(id, |target, cx| target.unit_stopped(answer, cx));
    }

    /// Which app it is, and its process.
    pub fn app(&self, id: TargetId) -> Option<(AppKey, u32)> {
        self.targets.get(&id).map(|target| (target.app.clone(), target.main.pid))
    }

    /// Moves the memory of a frozen app to swap. Ends with `PagedOut` or `PageOutFailed`, in the inbox.
    pub fn page_out(&mut self, id: TargetId) {
        let started = self.start_page_out(id);
        if let Err(reason) = started {
            self.out.push(Event::Outcome(id, Outcome::PageOutFailed(reason)));
        }
    }

    /// Measures it. Ends with `Sampled`, in the inbox. Those asked for at the same time share what they can.
    pub fn sample(&mut self, id: TargetId) {
        let asked = self.ask_sample(id);
        if let Err(failed) = asked {
            self.out.push(Event::Sampled(id, Err(failed.into())));
        }
    }

    /// Looks, on a worker, whether something about its processes speaks against holding it still, or on: file locks
    /// others wait for, file systems it serves, devices it uses, a debugger, roles (lifecycle.md §6), and for what is
    /// held, whether it really is. Ends with `Inspected` within 5 s.
    pub fn inspect(&mut self, id: TargetId) {
        let others = self.others(id);
        if self.targets.contains_key(&id) {
            self.with(id, |target, cx| target.inspect(&others, cx));
        } else {
            self.out.push(Event::Inspected(id, Err("its process has ended".into())));
        }
    }

    /// Whose process this is: who lives in the cgroup it is in, or whose process it runs below. Nobody's, if it runs as
    /// another user than the app. Reads a few small files of `/proc`.
    pub fn of_pid(&self, pid: u32) -> Option<TargetId> {
        if let Some(target) = self.targets.values().find(|target| target.main.pid == pid && !has_ended(&target.pidfd)) {
            // Two names of one process are told by one target, always the same.
            let same = self.targets.values().filter(|other| other.main == target.main);
            return same.map(|target| target.id).min();
        }
        whose(pid, &self.targets, &self.world)
    }

    /// The same for a process that was told of in the session of user `uid`, whose word counts for that user's processes
    /// alone. 0 is the system itself (logind, the system's systemd), which is believed of everybody's.
    pub fn of_pid_told_by(&self, pid: u32, uid: u32) -> Option<TargetId> {
        self.of_pid(pid).filter(|id| uid == 0 || self.targets.get(id).is_some_and(|target| target.uid == uid))
    }

    /// Measures this daemon and zram. Ends with `SampledSelf`, in the inbox.
    pub fn sample_self(&mut self) {
        let sender = self.sender.clone();
        let run = move || {
            sender.event(this_process());
        };
        if !self.jobs.run(run) {
            // Cheap enough: a daemon of a few MiB.
            self.out.push(this_process());
        }
    }

    /// Lets it run, if it is held, and takes no more care of it. A kill under way goes on.
    pub fn forget(&mut self, id: TargetId) {
        self.end(id);
        self.sweep();
    }

    /// Whether `token` is one of ours.
    pub fn owns(&self, token: Token) -> bool {
        (self.first_token..self.first_token + Self::TOKENS).contains(&token.0)
    }

    /// Something happened behind `token`.
    pub fn ready(&mut self, token: Token) {
        let Some(index) = token.0.checked_sub(self.first_token) else { return };
        if index == 2 * MAX_TARGETS {
            return self.seen();
        }
        let Some(id) = self.slots.get(index / 2).copied().flatten() else { return };
        if index % 2 == 1 {
            return self.with(id, |target, cx| target.step(clock::boot(), cx));
        }
        // The slot may have had another tenant when this was made.
        if self.targets.get(&id).is_some_and(|target| has_ended(&target.pidfd)) {
            self.end(id);
            self.out.push(Event::TargetGone(id));
            self.sweep();
        }
    }

    /// When [`Targets::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let targets = self.targets.values().filter_map(Target::due).min();
        earliest(earliest(targets, self.sweep_at), self.killed.iter().map(|killed| killed.deadline).min())
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        let due = |target: &&Target| target.due().is_some_and(|due| due <= now);
        let due: Vec<TargetId> = self.targets.values().filter(due).map(|target| target.id).collect();
        for id in due {
            let others = self.others(id);
            self.with(id, |target, cx| {
                target.step(now, cx);
                target.force(now, &others, cx);
                target.work(now, cx);
            });
        }
        let over: Vec<Killed> = self.killed.extract_if(.., |killed| killed.deadline <= now).collect();
        for killed in over {
            self.finish(killed);
        }
        if self.sweep_at.take_if(|due| *due <= now).is_some() {
            self.sweep();
        }
    }

    /// Moves what happened to `out`, in order.
    pub fn drain(&mut self, out: &mut Vec<Event>) {
        out.append(&mut self.out);
    }

    /// Lets everything run, at once: the daemon ends. Dropping does the same.
    pub fn thaw_all(&mut self) {
        let ids: Vec<TargetId> = self.targets.keys().copied().collect();
        for id in ids {
            self.with(id, |target, cx| {
                if let Err(error) = target.stop_holding(cx) {
                    log::error!("{} could not be thawed: {error}", target.app);
                }
            });
        }
        self.record.thaw_inherited();
    }

    fn seen(&mut self) {
        for Seen { target: id, ticket, sight } in self.looker.take() {
            let others = self.others(id);
            self.with(id, |target, cx| target.seen(ticket, sight, &others, cx));
        }
    }

    fn start_page_out(&mut self, id: TargetId) -> Result<(), Arc<str>> {
        let target = self.targets.get_mut(&id).ok_or("its process has ended")?;
        if !matches!(target.phase, Phase::Frozen(_)) {
            return Err("it is not frozen".into());
        }
        if target.page_out.as_ref().is_some_and(|ticket| !ticket.is_done()) {
            return Err("that is under way already".into());
        }
        let ticket = Arc::new(Ticket::default());
        target.page_out = Some(Arc::clone(&ticket));
        let (scope, sender, crowd) = (target.scope(), self.sender.clone(), Arc::clone(&self.page_outs));
        let run = move || {
            sender.event(Event::Outcome(id, page_out::run(&scope, &ticket, &crowd)));
        };
        if self.jobs.run(run) { Ok(()) } else { Err("too much other work is waiting".into()) }
    }

    fn ask_sample(&self, id: TargetId) -> Result<(), &'static str> {
        let target = self.targets.get(&id).ok_or("its process has ended")?;
        let mut samples = lock(&self.samples);
        if samples.waiting.len() >= MAX_SAMPLES {
            return Err("too much other work is waiting");
        }
        if !samples.running {
            let (shared, sender) = (Arc::clone(&self.samples), self.sender.clone());
            if !self.jobs.run(move || take_samples(&shared, &sender)) {
                return Err("too much other work is waiting");
            }
            samples.running = true;
        }
        samples.waiting.push_back((id, target.scope()));
        Ok(())
    }

    /// Ends the care for a target that is gone or forgotten.
    fn end(&mut self, id: TargetId) {
        self.with(id, |target, cx| {
            if let Err(error) = target.stop_holding(cx) {
                log::error!("{} could not be thawed: {error}", target.app);
            }
            // What it was about to say is of no interest any more.
            cx.out.retain(|event| !matches!(event, Event::Outcome(of, _) | Event::Inspected(of, _) if *of == id));
        });
        let Some(target) = self.targets.remove(&id) else { return };
        let _ = self.registry.deregister(&mut SourceFd(&target.pidfd.as_raw_fd()));
        for slot in self.slots.iter_mut().filter(|slot| **slot == Some(id)) {
            *slot = None;
        }
        if target.kill.is_some() && !self.made.is_empty() {
            self.sweep_at = Some(clock::boot() + SWEEP);
        }
        // What its manager stops it also ends; and by the deadline the unit may have been started anew.
        if let Some(kill) = target.kill.filter(|kill| !kill.handed_over)
            && self.killed.len() < MAX_TARGETS
        {
            let deadline = kill.deadline();
            let cgroup = match target.home {
                Home::Cgroup { cgroup, whole: true } => Some(cgroup),
                _ => None,
            };
            self.killed.push(Killed { deadline, members: kill.members, cgroup });
        }
    }

    /// The grace of an app is over whose main process has ended: the rest goes as well.
    fn finish(&mut self, killed: Killed) {
        match killed.cgroup {
            // Its own, and nobody we know has moved in.
            Some(cgroup)
                if cgroup.is_current()
                    && cgroup.procs().is_ok_and(|pids| !self.targets.values().any(|t| pids.contains(&t.main.pid))) =>
            {
                if let Err(error) = cgroup.kill() {
                    log::warn!("{}: cgroup.kill: {error}", cgroup.path().display());
                    kill_all(killed.members);
                }
            }
            Some(_) => {}
            None => kill_all(killed.members),
        }
        self.sweep_at = (!self.made.is_empty()).then(|| clock::boot() + SWEEP);
    }

    /// Removes cgroups of ours that are empty now.
    fn sweep(&mut self) {
        self.made.retain(|path| !remove(path));
    }

    fn with(&mut self, id: TargetId, act: impl FnOnce(&mut Target, &mut Context<'_>)) {
        let Some(target) = self.targets.get_mut(&id) else { return };
        let mut cx = Context {
            registry: &self.registry,
            world: &self.world,
            looker: &self.looker,
            record: &mut self.record,
            made: &mut self.made,
            out: &mut self.out,
            deadline: self.deadline,
            oom_score_adj: self.oom_score_adj,
        };
        act(target, &mut cx);
    }

    fn with_others(
        &mut self,
        id: TargetId,
        ended: impl FnOnce() -> Outcome,
        act: impl FnOnce(&mut Target, &[(u32, Arc<str>)], &mut Context<'_>),
    ) {
        let others = self.others(id);
        if self.targets.contains_key(&id) {
            self.with(id, |target, cx| act(target, &others, cx));
        } else {
            self.out.push(Event::Outcome(id, ended()));
        }
    }

    /// The processes of all other apps.
    fn others(&self, id: TargetId) -> Vec<(u32, Arc<str>)> {
        let Some(app) = self.targets.get(&id).map(|target| &target.app) else { return Vec::new() };
        let others = self.targets.values().filter(|other| other.app != *app);
        others.map(|other| (other.main.pid, Arc::clone(&other.app.service))).collect()
    }
}

impl Drop for Targets {
    fn drop(&mut self) {
        self.thaw_all();
    }
}

fn lock(samples: &Mutex<Samples>) -> MutexGuard<'_, Samples> {
    // Plain data that no panic can leave half-changed.
    samples.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes measurements until none is asked for. On a worker.
fn take_samples(shared: &Mutex<Samples>, sender: &Sender) {
    loop {
        let mut samples = lock(shared);
        let count = samples.waiting.len().min(BATCH);
        let asked: Vec<(TargetId, Scope)> = samples.waiting.drain(..count).collect();
        if asked.is_empty() {
            (samples.running, samples.waiting) = (false, VecDeque::new());
            return;
        }
        drop(samples);
        let mut batch = Batch::default();
        for (id, scope) in asked {
            sender.event(Event::Sampled(id, batch.sample(&scope)));
        }
    }
}

/// This daemon and zram.
fn this_process() -> Event {
    Event::SampledSelf { daemon: own::sample(), zram: zram::now() }
}

/// The start time that belongs to the process behind the pidfd.
fn identify(app: &AppKey, process: &Process) -> Result<Member, Arc<str>> {
    let gone = || Arc::from("its process has ended");
    let dir = ProcDir::open(process.pid).map_err(|_| gone())?;
    let main = Member::of(&dir.stat().map_err(|_| gone())?);
    let uids = dir.read("status").ok().and_then(|status| parse_uids(&status));
    let same = fs::read_to_string(format!("/proc/self/fdinfo/{}", process.pidfd.as_raw_fd())).is_ok_and(|info| {
        info.lines().any(|line| line.strip_prefix("Pid:").is_some_and(|pid| pid.trim() == process.pid.to_string()))
    });
    // Still alive after its pid was read: so the pid was its own all the while.
    if has_ended(&process.pidfd) {
        return Err(gone());
    }
    if !same {
        return Err(format!("its pidfd is not that of process {}", process.pid).into());
    }
    let runs_as = |uid: u32| uids.as_ref().is_some_and(|uids| uids.contains(&uid));
    if !runs_as(process.uid) {
        return Err(format!("process {} does not run as user {}", process.pid, process.uid).into());
    }
    // A session bus belongs to its user, who may have it name any process: none but that user's own is touched for it.
    if let Bus::Session(owner) = app.bus
        && !uids.is_some_and(|uids| uids.iter().all(|uid| *uid == owner))
    {
        return Err(format!("process {} is not user {owner}'s alone", process.pid).into());
    }
    Ok(main)
}
