//! The second half: the same apps through the daemon. Each app is pushed to in each state the daemon brings it into, as
//! soon as it is there, whatever the others do.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use nightporter::{
    model::Freezer,
    view::{App, Report, Show, Why},
};

use super::{
    StateRow,
    measure::{Wake, Wakes},
};
use crate::{
    client::{self, Daemon},
    exit::{Exit, Failure},
    lab::{
        processes,
        pushes::Pushes,
        sockets,
        state::State,
        world::{DaemonSetup, World},
    },
};

/// What it costs.
pub(super) struct Shared {
    pub(super) pss: u64,
    pub(super) daemon: u64,
    pub(super) zram: u64,
    pub(super) ledger_saved: i64,
    pub(super) connections: usize,
    pub(super) wake: Wakes,
    pub(super) freezer: Freezer,
    pub(super) states: Vec<StateRow>,
    pub(super) not_paged_out: Option<String>,
}

/// Fast enough for a demo; the defaults are 10 s, 60 s, 10 min and 10 s.
const LIFECYCLE: &str =
    "grace = \"300ms\"\npage-out-after = \"700ms\"\ntombstone-after = \"3s\"\nawake-window = \"300ms\"\n";
/// The daemon gives back what a burst of work took once it is quiet for 2 s; the apps on their own were settled as well.
const SETTLED: Duration = Duration::from_secs(3);
const START: Duration = Duration::from_secs(30);
/// Long enough for a daemon that tries again.
const DELIVERY: Duration = Duration::from_secs(15);
/// No app has come into a state it is still wanted in for this long: something is wrong.
const STUCK: Duration = Duration::from_secs(20);
const TURN: Duration = Duration::from_millis(20);

pub(super) fn run(
    world: &mut World,
    messages: u16,
    pushes: &mut Pushes,
    progress: &ProgressBar,
) -> Result<Shared, Failure> {
    progress.set_message("Through Night Porter: starting");
    let (daemon, pid) = world.start_daemon(&DaemonSetup { profile: "tombstone", lifecycle: LIFECYCLE })?;
    for app in world.apps().to_vec() {
        daemon.start(&app)?;
    }
    for app in world.apps().to_vec() {
        world.wait(&format!("{app} to register"), START, |world| Ok(world.inbox().is_ready(&app).then_some(())))?;
        progress.inc(1);
    }
    let connections = sockets::connections_to(world.port());

    let mut rounds = Rounds::new(world.apps(), messages);
    rounds.run(world, &daemon, pushes, progress)?;
    progress.set_message("Through Night Porter: at rest, measuring");
    rest(world, &daemon)?;

    world.pause(SETTLED)?;
    let pss = processes::apps_pss(world.report_socket()).values().sum();
    let Some(daemon_pss) = processes::pss(pid) else {
        return Err(Failure::new(Exit::Failed, format!("the daemon cannot be measured{}", world.logs())));
    };
    let report: Report = client::decode(&daemon.ask("Report", None)?)?;
    let (Some(running), Some(frozen), Some(tombstoned)) =
        (rounds.wake(State::Running), rounds.wake(State::Frozen), rounds.wake(State::Tombstoned))
    else {
        return Err(Failure::new(
            Exit::Failed,
            format!("no message arrived in one of the states, so there is no figure to give{}", world.logs()),
        ));
    };
    Ok(Shared {
        pss,
        daemon: daemon_pss,
        zram: report.zram,
        ledger_saved: report.saved,
        connections,
        wake: Wakes { running, frozen, tombstoned },
        freezer: rounds.freezer.unwrap_or(Freezer::Signal),
        states: rounds.rows(),
        not_paged_out: rounds.not_paged_out(&daemon)?,
    })
}

/// What is still to be sent, and what has been seen.
struct Rounds {
    apps: Vec<String>,
    wanted: HashMap<(String, State), u16>,
    pss: HashMap<(String, State), u64>,
    latencies: HashMap<State, Vec<u64>>,
    freezer: Option<Freezer>,
}

impl Rounds {
    fn new(apps: &[String], messages: u16) -> Self {
        let wanted = apps.iter().flat_map(|app| State::ALL.map(|state| ((app.clone(), state), messages))).collect();
        Self { apps: apps.to_vec(), wanted, pss: HashMap::new(), latencies: HashMap::new(), freezer: None }
    }

    fn run(
        &mut self,
        world: &mut World,
        daemon: &Daemon,
        pushes: &mut Pushes,
        progress: &ProgressBar,
    ) -> Result<(), Failure> {
        let mut moved = Instant::now();
        while !self.is_done() {
            world.check()?;
            let mut sent = false;
            for app in self.apps.clone() {
                // What was true a push ago may not be any more, so each app is asked for right before its push.
                while let Some(state) = self.due(daemon, &app)? {
                    self.push(world, daemon, pushes, &app, state)?;
                    progress.inc(1);
                    progress.set_message(format!("Through Night Porter: pushes while {}", state.label()));
                    sent = true;
                    world.check()?;
                }
            }
            if sent {
                moved = Instant::now();
            } else if moved.elapsed() > STUCK {
                return Err(Failure::new(Exit::Failed, self.stuck(daemon)? + &world.logs()));
            }
            world.pause(TURN)?;
        }
        Ok(())
    }

    /// Whether every push is sent. Being paged out is not to be had on every machine: an app that went on to its
    /// tombstones without it will not get there.
    fn is_done(&self) -> bool {
        self.apps.iter().all(|app| self.is_done_with(app))
    }

    fn is_done_with(&self, app: &str) -> bool {
        let paged_out = self.pss.contains_key(&(app.to_owned(), State::PagedOut));
        State::ALL.into_iter().all(|state| self.left(app, state) == 0 || (state == State::PagedOut && !paged_out))
    }

    fn left(&self, app: &str, state: State) -> u16 {
        self.wanted.get(&(app.to_owned(), state)).copied().unwrap_or(0)
    }

    /// The state the app is in, if a push is still to be sent to it there.
    fn due(&self, daemon: &Daemon, app: &str) -> Result<Option<State>, Failure> {
        let Some(state) = apps(daemon)?.iter().find(|line| line.name == app).and_then(State::of) else {
            return Ok(None);
        };
        let due = match state {
            // An app that went by a state it is wanted in has to be woken once more to come there.
            State::Tombstoned => !self.is_done_with(app) && !daemon.owned(app)?,
            _ => self.left(app, state) > 0,
        };
        Ok(due.then_some(state))
    }

    fn push(
        &mut self,
        world: &World,
        daemon: &Daemon,
        pushes: &mut Pushes,
        app: &str,
        state: State,
    ) -> Result<(), Failure> {
        let key = (app.to_owned(), state);
        if !self.pss.contains_key(&key) {
            let pss = processes::apps_pss(world.report_socket()).get(app).copied().unwrap_or(0);
            self.pss.insert(key.clone(), pss);
            if state == State::Frozen {
                let show: Show = client::decode(&daemon.ask("Show", Some(app))?)?;
                // One app that takes the signal is enough not to claim the cgroup for all.
                self.freezer = match (self.freezer, show.freezer) {
                    (Some(Freezer::Signal), _) | (_, Some(Freezer::Signal)) => Some(Freezer::Signal),
                    (before, now) => now.or(before),
                };
            }
        }
        if let Some(latency) = pushes.send(world.inbox(), app, state.label(), DELIVERY)? {
            self.latencies.entry(state).or_default().push(latency);
        }
        if let Some(left) = self.wanted.get_mut(&key) {
            *left = left.saturating_sub(1);
        }
        Ok(())
    }

    fn wake(&self, state: State) -> Option<Wake> {
        Wake::of(self.latencies.get(&state).cloned().unwrap_or_default())
    }

    /// Memory of all apps in each state, as far as all of them have been seen in it.
    fn rows(&self) -> Vec<StateRow> {
        let row = |state: State| {
            let pss = self.apps.iter().map(|app| self.pss.get(&(app.clone(), state)).copied()).sum::<Option<u64>>()?;
            Some(StateRow { state, pss, wake: self.wake(state) })
        };
        State::ALL.into_iter().filter_map(row).collect()
    }

    /// Why some apps were never paged out, in the daemon's words.
    fn not_paged_out(&self, daemon: &Daemon) -> Result<Option<String>, Failure> {
        let Some(app) = self.apps.iter().find(|app| !self.pss.contains_key(&((*app).clone(), State::PagedOut))) else {
            return Ok(None);
        };
        let why: Why = client::decode(&daemon.ask("Why", Some(app))?)?;
        let told = why.decisions.iter().rev().find(|decision| decision.verdict.contains("page-out"));
        Ok(Some(match told {
            Some(decision) => decision.reason.clone(),
            None => "this machine has no swap, or no way to move an app's memory there".into(),
        }))
    }

    fn stuck(&self, daemon: &Daemon) -> Result<String, Failure> {
        let mut text = format!("nothing moved for {} s:", STUCK.as_secs());
        for app in apps(daemon)? {
            let wanted: Vec<&str> =
                State::ALL.into_iter().filter(|state| self.left(&app.name, *state) > 0).map(State::label).collect();
            if !wanted.is_empty() {
                text += &format!("\n  {} is {} ({}); wanted: {}", app.name, app.state, app.reason, wanted.join(", "));
            }
        }
        Ok(text)
    }
}

/// Waits until every app is a tombstone again.
fn rest(world: &mut World, daemon: &Daemon) -> Result<(), Failure> {
    let names = world.apps().to_vec();
    world.wait("all apps to rest again", START, |_| {
        let apps = apps(daemon)?;
        let resting = |name: &String| {
            apps.iter().any(|app| app.name == *name && State::of(app) == Some(State::Tombstoned) && app.waiting == 0)
        };
        Ok(names.iter().all(resting).then_some(()))
    })
}

fn apps(daemon: &Daemon) -> Result<Vec<App>, Failure> {
    client::decode(&daemon.ask("Apps", None)?)
}
