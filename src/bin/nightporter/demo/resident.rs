//! The first half: each app runs its own resident service with its own connection.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use crate::{
    exit::{Exit, Failure},
    lab::{processes, pushes::Pushes, sockets, world::World},
};

/// What it costs.
pub(super) struct Resident {
    pub(super) pss: u64,
    pub(super) connections: usize,
}

const START: Duration = Duration::from_secs(30);
const DELIVERY: Duration = Duration::from_secs(10);
/// Memory counts as settled when two samples this far apart differ by less than 1 %.
const SETTLE: Duration = Duration::from_millis(300);
const SETTLED_BY: Duration = Duration::from_secs(3);

pub(super) fn run(world: &mut World, pushes: &mut Pushes, progress: &ProgressBar) -> Result<Resident, Failure> {
    progress.set_message("Each app on its own: starting");
    for app in world.apps().to_vec() {
        world.start_resident(&app)?;
    }
    for app in world.apps().to_vec() {
        world.wait(&format!("{app} to start"), START, |world| Ok(world.inbox().is_ready(&app).then_some(())))?;
        progress.inc(1);
    }
    progress.set_message("Each app on its own: one push each");
    for app in world.apps() {
        if pushes.send(world.inbox(), app, "on its own", DELIVERY)?.is_none() {
            world.check_interrupted()?;
            return Err(Failure::new(Exit::Failed, format!("{app}, on its own, did not get its message")));
        }
        progress.inc(1);
    }
    progress.set_message("Each app on its own: measuring");
    let pss = settled(world)?;
    let connections = sockets::connections_to(world.port());
    world.end_apps()?;
    world.inbox().forget_apps();
    Ok(Resident { pss, connections })
}

fn settled(world: &World) -> Result<u64, Failure> {
    let deadline = Instant::now() + SETTLED_BY;
    let mut before = total(world);
    loop {
        world.pause(SETTLE)?;
        let now = total(world);
        if now.abs_diff(before) * 100 < now || Instant::now() >= deadline {
            return Ok(now);
        }
        before = now;
    }
}

fn total(world: &World) -> u64 {
    processes::apps_pss(world.report_socket()).values().sum()
}
