//! The messages of a run: the same to each app, whatever the arm, sent when it is in the state they are meant for, or as
//! near to it as the arm lets it come.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use nightporter::view::App;

use super::{arm::Arm, stage::Stage};
use crate::{
    exit::{Exit, Failure},
    lab::{sockets, state::State},
};

/// Latencies in milliseconds, by the state the app was in when the message was sent.
pub(super) type Latencies = BTreeMap<State, Vec<f64>>;

/// No app has come into a state it is still wanted in for as long as that takes, and this long beside.
const PATIENCE: Duration = Duration::from_secs(60);
const TURN: Duration = Duration::from_millis(200);

/// What is still to be sent.
struct Wanted(BTreeMap<(String, State), usize>);

impl Wanted {
    /// Gives what was meant for `from` to `to`, for an app that does not come there.
    fn give(&mut self, app: &str, from: State, to: State) {
        let left = self.0.remove(&(app.to_owned(), from)).unwrap_or(0);
        *self.0.entry((app.to_owned(), to)).or_default() += left;
    }

    fn left(&self, app: &str, state: State) -> usize {
        self.0.get(&(app.to_owned(), state)).copied().unwrap_or(0)
    }

    fn sent(&mut self, app: &str, state: State) {
        if let Some(left) = self.0.get_mut(&(app.to_owned(), state)) {
            *left = left.saturating_sub(1);
        }
    }

    fn is_empty(&self) -> bool {
        self.0.values().all(|left| *left == 0)
    }
}

/// Sends them all, but for those that are to be sent at rest to apps nobody wakes ([`to_frozen`]).
pub(super) fn run(stage: &mut Stage<'_>, mut tick: impl FnMut()) -> Result<Latencies, Failure> {
    let plan = &stage.experiment.messages;
    let apps = stage.world.apps().to_vec();
    let mut wanted = Wanted(
        apps.iter().flat_map(|app| plan.states.iter().map(|state| ((app.clone(), *state), plan.each))).collect(),
    );
    for app in &apps {
        match stage.arm {
            Arm::Resident | Arm::Daemon => {
                for state in [State::Frozen, State::PagedOut, State::Tombstoned] {
                    wanted.give(app, state, State::Running);
                }
            }
            Arm::ResidentFrozen => {
                for state in [State::Frozen, State::PagedOut, State::Tombstoned] {
                    wanted.0.remove(&(app.clone(), state));
                }
            }
            Arm::Cached => wanted.give(app, State::Tombstoned, State::PagedOut),
            Arm::Tombstone => {}
        }
    }
    let mut latencies = Latencies::new();
    let patience = stage.experiment.lifecycle.tombstone_after + PATIENCE;
    let mut moved = Instant::now();
    let mut seen_paged_out = BTreeSet::new();
    while !wanted.is_empty() {
        stage.world.check()?;
        let mut sent = false;
        let seen = states(stage)?;
        for app in &apps {
            if due(stage, &seen, &mut wanted, &mut seen_paged_out, app)?.is_none() {
                continue;
            }
            // What was true a message ago may not be any more.
            while let Some(state) = due(stage, &states(stage)?, &mut wanted, &mut seen_paged_out, app)? {
                send(stage, app, state, &mut latencies)?;
                wanted.sent(app, state);
                tick();
                sent = true;
                let interval = stage.experiment.messages.interval;
                stage.world.pause(interval)?;
                stage.world.check()?;
            }
        }
        if sent {
            moved = Instant::now();
        } else if moved.elapsed() > patience {
            return Err(stuck(stage, &wanted)?);
        }
        stage.world.pause(TURN)?;
    }
    Ok(latencies)
}

/// Those that resident apps are sent while they are held still. Nobody waits for them: they come when the apps run again.
pub(super) fn to_frozen(stage: &mut Stage<'_>) -> Result<(), Failure> {
    let plan = &stage.experiment.messages;
    let states = plan.states.iter().filter(|state| **state != State::Running).count();
    for _ in 0..plan.each * states {
        for app in stage.world.apps().to_vec() {
            let Stage { world, pushes, .. } = stage;
            pushes.post(world.inbox(), &app, State::PagedOut.label())?;
            world.pause(plan.interval)?;
        }
    }
    Ok(())
}

/// The state the app is in, if a message is still to be sent to it there.
fn due(
    stage: &Stage<'_>,
    states: &BTreeMap<String, App>,
    wanted: &mut Wanted,
    paged_out: &mut BTreeSet<String>,
    app: &str,
) -> Result<Option<State>, Failure> {
    if State::ALL.into_iter().all(|state| wanted.left(app, state) == 0) {
        return Ok(None);
    }
    if !stage.arm.has_lifecycle() {
        return Ok((wanted.left(app, State::Running) > 0).then_some(State::Running));
    }
    let Some(line) = states.get(app) else { return Ok(None) };
    let Some(state) = State::of(line) else { return Ok(None) };
    match state {
        State::PagedOut => {
            paged_out.insert(app.to_owned());
        }
        // It has gone by without: this machine cannot page out.
        State::Tombstoned if !paged_out.contains(app) => wanted.give(app, State::PagedOut, State::Tombstoned),
        State::Frozen
            if !paged_out.contains(app)
                && stage.arm == Arm::Cached
                && line.since_secs > stage.experiment.lifecycle.page_out_after.as_secs() + 5 =>
        {
            wanted.give(app, State::PagedOut, State::Frozen);
        }
        _ => {}
    }
    let due = match state {
        // One that went by a state it is wanted in has to be woken once more to come there.
        State::Tombstoned => match &stage.daemon {
            Some((daemon, _)) => !daemon.owned(app)?,
            None => false,
        },
        _ => wanted.left(app, state) > 0,
    };
    Ok(due.then_some(state))
}

/// As the daemon has it, where it does anything; each question is work for it.
fn states(stage: &Stage<'_>) -> Result<BTreeMap<String, App>, Failure> {
    if stage.arm.has_lifecycle() { stage.states() } else { Ok(BTreeMap::new()) }
}

fn send(stage: &mut Stage<'_>, app: &str, state: State, latencies: &mut Latencies) -> Result<(), Failure> {
    let patience = stage.experiment.late_after;
    let Stage { world, pushes, .. } = stage;
    if let Some(nanos) = pushes.send(world.inbox(), app, state.label(), patience)? {
        latencies.entry(state).or_default().push(Duration::from_nanos(nanos).as_secs_f64() * 1000.0);
    }
    world.check_interrupted()
}

fn stuck(stage: &Stage<'_>, wanted: &Wanted) -> Result<Failure, Failure> {
    let mut text = "no app comes into a state it is still to be sent messages in:".to_owned();
    for (name, app) in stage.states()? {
        let states: Vec<&str> =
            State::ALL.into_iter().filter(|state| wanted.left(&name, *state) > 0).map(State::label).collect();
        if !states.is_empty() {
            text += &format!("\n  {name} is {} ({}); wanted: {}", app.state, app.reason, states.join(", "));
        }
    }
    Ok(Failure::new(Exit::Failed, text + &stage.world.logs()))
}

/// Connections to the push server.
pub(super) fn connections(stage: &Stage<'_>) -> usize {
    sockets::connections_to(stage.world.port())
}
