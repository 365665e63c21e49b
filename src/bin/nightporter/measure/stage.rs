//! One world of the experiment, and what is done in it whatever is measured: apps are started, brought to rest, looked at
//! and ended, with the daemon or without.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nightporter::{
    sys::process::{Paged, page_out_now},
    view,
};
use rustix::process::Signal;

use super::{arm::Arm, experiment::Experiment, kernel, still::Still};
use crate::{
    client::{self, Daemon},
    exit::{Exit, Failure},
    lab::{
        cgroups::{self, Cgroups},
        processes::{self, Process, Tracker},
        pushes::Pushes,
        scripts::AppSpec,
        state::State,
        world::{DaemonSetup, Setup, World},
    },
};

pub(super) struct Stage<'a> {
    pub(super) experiment: &'a Experiment,
    pub(super) arm: Arm,
    pub(super) world: World,
    pub(super) pushes: Pushes,
    pub(super) relay: Option<u32>,
    pub(super) daemon: Option<(Daemon, u32)>,
    pub(super) tracker: Tracker,
    /// What a reader of the figures must know, once each.
    pub(super) notes: Vec<String>,
    // Last, so that nothing lives in them any more when they go.
    pub(super) cgroups: Option<Cgroups>,
}

/// How starting apps went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Started {
    All,
    /// One was not ready in time.
    Late(String),
    /// One ended by itself, or was ended by the kernel for want of memory.
    Ended(String),
    /// It made no sense to go on.
    GivenUp(String),
}

const FREEZE: Duration = Duration::from_secs(30);
/// What was swapped out is only let go of, but there may be a lot of it.
const KILL: Duration = Duration::from_secs(120);
/// A daemon that looks at an app before it touches it, or is asked to wait, may take this long beside.
const MARGIN: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(20);
/// Between two questions to the daemon: each is work for it.
const ASK: Duration = Duration::from_millis(250);
/// Between two looks at memory while it settles.
const LOOK: Duration = Duration::from_millis(500);
/// What we are to the OOM killer.
const PROTECTED: &str = "-900";

impl<'a> Stage<'a> {
    /// A world with these apps, with the bus and the push server up and nothing else.
    pub(super) fn new(experiment: &'a Experiment, arm: Arm, mut apps: Vec<AppSpec>) -> Result<Self, Failure> {
        let mut notes = Vec::new();
        let cgroups = match Cgroups::make(apps.iter().map(|app| app.name.as_str())) {
            Ok(cgroups) => Some(cgroups),
            Err(why) => {
                cgroups::release();
                notes.push(format!("apps have no cgroups of their own ({why}): they are frozen by signals"));
                None
            }
        };
        if let Some(cgroups) = &cgroups {
            // Who measures and serves goes last when memory runs out; apps with a cgroup say otherwise of themselves at their
            // start. Only root may say so.
            let _ = std::fs::write("/proc/self/oom_score_adj", PROTECTED);
            for app in &mut apps {
                app.cgroup = Some(cgroups.path_of(&app.name));
            }
            if !cgroups.has_memory() {
                notes.push("the memory controller is not to be had here: cgroups count no memory".into());
            }
        }
        // Not a directory in memory: what is written there would be measured.
        let parent = PathBuf::from("/var/tmp");
        let world = World::new(Setup { prefix: "nightporter-measure-", parent, apps })?;
        let pushes = Pushes::new("measure", world.interrupted()).of_bytes(experiment.messages.bytes);
        let tracker = Tracker::new(world.report_socket());
        let mut stage = Self { experiment, arm, world, pushes, relay: None, daemon: None, tracker, notes, cgroups };
        stage.world.start_bus()?;
        match &experiment.server {
            Some(url) => stage.world.use_server(url, super::commands::port_of(url).unwrap_or(0)),
            None => stage.relay = Some(stage.world.start_relay()?),
        }
        Ok(stage)
    }

    /// Starts the daemon, in an arm that has one.
    pub(super) fn start_daemon(&mut self) -> Result<(), Failure> {
        if let Some(profile) = self.arm.profile() {
            let setup = DaemonSetup { profile, lifecycle: &self.experiment.lifecycle.text };
            self.daemon = Some(self.world.start_daemon(&setup)?);
        }
        Ok(())
    }

    /// Starts these apps, a few at once, and waits until each is ready; `tick` is called for each. `hopeless` says why there is no
    /// sense in going on.
    pub(super) fn start(
        &mut self,
        apps: &[String],
        mut tick: impl FnMut(),
        mut hopeless: impl FnMut() -> Option<String>,
    ) -> Result<Started, Failure> {
        let patience = self.experiment.ready_within();
        let kills = kernel::oom_kills();
        for some in apps.chunks(self.experiment.start_at_once) {
            for app in some {
                match &self.daemon {
                    Some((daemon, _)) => daemon.start(app)?,
                    None => self.world.start_resident(app)?,
                }
            }
            let deadline = Instant::now() + patience;
            for app in some {
                while !self.world.inbox().is_ready(app) {
                    self.world.check_interrupted()?;
                    if let Some(text) = self.world.ended_by_itself() {
                        return Ok(Started::Ended(text));
                    }
                    if kernel::oom_kills() > kills {
                        return Ok(Started::Ended("the kernel ended a process for want of memory".into()));
                    }
                    if let Some(text) = hopeless() {
                        return Ok(Started::GivenUp(text));
                    }
                    if Instant::now() >= deadline {
                        let text = format!("{app} was not ready within {} s", patience.as_secs());
                        return Ok(Started::Late(text));
                    }
                    thread::sleep(POLL);
                }
                tick();
            }
        }
        // So that an app's processes are known before anything is paged out.
        self.tracker.apps();
        Ok(Started::All)
    }

    /// Brings these apps to where the arm leaves them. False when they did not get there in time.
    pub(super) fn rest(&mut self, apps: &[String]) -> Result<bool, Failure> {
        let lifecycle = &self.experiment.lifecycle;
        match self.arm {
            Arm::Resident | Arm::Daemon => Ok(true),
            Arm::ResidentFrozen => {
                self.world.pause(lifecycle.grace)?;
                for app in apps {
                    self.set_frozen(app, true)?;
                }
                self.world.pause(lifecycle.page_out_after.saturating_sub(lifecycle.grace))?;
                for app in apps {
                    match self.page_out(app) {
                        Ok(_) => {}
                        Err(why) => self.note(format!("not paged out: {why}")),
                    }
                }
                Ok(true)
            }
            Arm::Cached => self.wait_for_rest(apps, State::PagedOut),
            Arm::Tombstone => self.wait_for_rest(apps, State::Tombstoned),
        }
    }

    /// The daemon's word for each app.
    pub(super) fn states(&self) -> Result<BTreeMap<String, view::App>, Failure> {
        let Some((daemon, _)) = &self.daemon else { return Ok(BTreeMap::new()) };
        let apps: Vec<view::App> = client::decode(&daemon.ask("Apps", None)?)?;
        Ok(apps.into_iter().map(|app| (app.name.clone(), app)).collect())
    }

    /// Waits until used memory stands still, at most as long as the experiment allows. False when it did not.
    pub(super) fn settle(&mut self) -> Result<bool, Failure> {
        let deadline = Instant::now() + self.experiment.settle_within;
        let mut still = Still::default();
        loop {
            if still.add(look()?.used) {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            self.world.pause(LOOK)?;
        }
    }

    /// Holds an app still, or lets it run: its cgroup, or all its processes one by one.
    pub(super) fn set_frozen(&mut self, app: &str, frozen: bool) -> Result<(), Failure> {
        if let Some(cgroups) = &self.cgroups {
            return cgroups::set_frozen(&cgroups.path_of(app), frozen, FREEZE)
                .map_err(|error| Failure::system(format!("cannot freeze or thaw {app}"), error));
        }
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        for process in self.processes_of(app) {
            processes::signal(&process, signal);
        }
        Ok(())
    }

    /// Ends these apps' processes.
    pub(super) fn end_apps(&mut self, apps: &[String]) {
        let processes: Vec<Process> =
            self.tracker.apps().into_iter().filter(|(app, _)| apps.contains(app)).map(|(_, process)| process).collect();
        let stubborn = self.world.end_processes(&processes);
        if stubborn > 0 {
            self.note("some apps did not end on SIGTERM and were killed".into());
        }
    }

    /// Ends these apps, with SIGKILL at once where that takes no look at a process: for a machine so short of memory that each
    /// takes seconds, and no app could answer SIGTERM.
    pub(super) fn kill_apps(&mut self, apps: &[String]) {
        if let Some(Err(error)) = self.cgroups.as_ref().map(|cgroups| cgroups.kill(apps, KILL)) {
            self.note(format!("the apps' cgroups cannot be killed: {error}"));
        }
        // Where there are no cgroups, and what had not come into its own yet.
        self.end_apps(apps);
    }

    /// Says something about the figures, once.
    pub(super) fn note(&mut self, text: String) {
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    /// Ends everything. Fails when something had to be killed or is left.
    pub(super) fn end(mut self) -> Result<(), Failure> {
        if let Some(cgroups) = &self.cgroups {
            cgroups.thaw();
        }
        self.daemon = None;
        let ended = self.world.end();
        let left = cgroups::release();
        ended?;
        match left.is_empty() {
            true => Ok(()),
            false => Err(Failure::new(Exit::Failed, format!("this was left behind:\n  {}", left.join("\n  ")))),
        }
    }

    fn page_out(&mut self, app: &str) -> Result<Paged, String> {
        let cgroup = self.cgroups.as_ref().map(|cgroups| cgroups.path_of(app));
        let main = self.processes_of(app).into_iter().min_by_key(|process| process.pid);
        let main = main.ok_or_else(|| format!("{app} does not run"))?;
        page_out_now(main.pid, cgroup.as_deref().filter(|path| Path::exists(path))).map_err(|why| why.to_string())
    }

    fn processes_of(&mut self, app: &str) -> Vec<Process> {
        self.tracker.apps().into_iter().filter(|(name, _)| name == app).map(|(_, process)| process).collect()
    }

    fn wait_for_rest(&mut self, apps: &[String], wanted: State) -> Result<bool, Failure> {
        let lifecycle = &self.experiment.lifecycle;
        let deadline = Instant::now() + lifecycle.tombstone_after + self.experiment.settle_within + MARGIN;
        let page_out_by = lifecycle.page_out_after.as_secs() + 5;
        loop {
            self.world.check()?;
            let states = self.states()?;
            let rests = |name: &String| {
                states.get(name).is_some_and(|app| match (wanted, State::of(app)) {
                    (State::Tombstoned, state) => state == Some(State::Tombstoned) && app.waiting == 0,
                    (_, Some(State::PagedOut)) => true,
                    // Where nothing can be paged out, that is as far as it goes.
                    (_, Some(State::Frozen)) => app.since_secs >= page_out_by,
                    _ => false,
                })
            };
            if apps.iter().all(rests) {
                if wanted == State::PagedOut
                    && let Some(frozen) =
                        apps.iter().filter_map(|app| states.get(app)).find(|app| app.state == "frozen")
                {
                    let text = format!("not paged out: {}", crate::render::clean(&frozen.reason));
                    self.note(text);
                }
                return Ok(true);
            }
            if Instant::now() >= deadline {
                let late = apps.iter().find(|name| !rests(name)).and_then(|name| states.get(name));
                if let Some(late) = late {
                    let text = format!("{} did not come to rest: it is {} ({})", late.name, late.state, late.reason);
                    self.note(crate::render::clean(&text));
                }
                return Ok(false);
            }
            self.world.pause(ASK)?;
        }
    }
}

/// One look at the machine's memory.
pub(super) fn look() -> Result<kernel::System, Failure> {
    kernel::System::now().map_err(|error| Failure::system("/proc/meminfo cannot be read", error))
}
