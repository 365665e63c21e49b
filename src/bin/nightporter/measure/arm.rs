//! The arms of an experiment, and one run of one of them from an empty world to its figures.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use nightporter::{sys::clock, view::Report};
use serde::{Deserialize, Serialize};

use super::{
    ballast::{self, Ballast},
    experiment::Experiment,
    kernel::{self, System},
    progress::Progress,
    stage::{Stage, Started, look},
    trace::{self, Latencies},
};
use crate::{
    client,
    exit::{Exit, Failure},
    lab::{cgroups, processes, state::State},
    render::mib_signed,
};

/// What is done with the same apps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Arm {
    /// Each has a connection of its own and runs.
    Resident,
    /// As before, and then frozen and paged out: what freezing and zram alone would do.
    ResidentFrozen,
    /// Behind the daemon, which touches none of them.
    Daemon,
    /// Behind the daemon, which freezes them and pages them out.
    Cached,
    /// Behind the daemon, which ends them as well.
    Tombstone,
}

impl Arm {
    /// Those of an experiment that names none.
    pub(super) const DEFAULT: [Self; 4] = [Self::Resident, Self::ResidentFrozen, Self::Daemon, Self::Tombstone];

    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Resident => "resident",
            Self::ResidentFrozen => "resident-frozen",
            Self::Daemon => "daemon",
            Self::Cached => "cached",
            Self::Tombstone => "tombstone",
        }
    }

    /// The daemon's profile, in an arm that has one.
    pub(super) const fn profile(self) -> Option<&'static str> {
        match self {
            Self::Resident | Self::ResidentFrozen => None,
            Self::Daemon => Some("observe"),
            Self::Cached => Some("cached"),
            Self::Tombstone => Some("tombstone"),
        }
    }

    /// Whether the daemon brings apps from one state to another.
    pub(super) const fn has_lifecycle(self) -> bool {
        matches!(self, Self::Cached | Self::Tombstone)
    }
}

/// All of one run of one arm. Sizes in KiB.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Sample {
    pub(super) run: usize,
    pub(super) arm: Arm,
    /// With the bus and the push server up, and nothing else.
    pub(super) before: System,
    /// With all apps where the arm leaves them.
    pub(super) rest: System,
    /// What the arm costs: growth of `used`, without that of the push server, which is no part of a phone.
    pub(super) cost: i64,
    /// The same by `occupied`.
    pub(super) cost_occupied: i64,
    /// The same by MemTotal − MemAvailable as the kernel tells it.
    pub(super) cost_unavailable: i64,
    pub(super) apps: Vec<AppSample>,
    pub(super) apps_pss: u64,
    pub(super) daemon_pss: Option<u64>,
    pub(super) server_pss: Option<(u64, u64)>,
    pub(super) connections: usize,
    /// CPU time of all apps, the daemon's, in seconds.
    pub(super) apps_cpu: Option<f64>,
    pub(super) daemon_cpu: Option<f64>,
    /// Of the whole machine during the run.
    pub(super) major_faults: u64,
    pub(super) messages: Messages,
    /// Each message, in the order they were sent.
    pub(super) sent: Vec<SentSample>,
    /// Apps that a message reached in time at the end, when all were at rest.
    pub(super) reachable: usize,
    pub(super) latencies_ms: BTreeMap<&'static str, Vec<f64>>,
    /// The daemon's own claim: `saved` of its report.
    pub(super) claim: Option<i64>,
    /// The whole of its report, as it gave it.
    pub(super) report: Option<serde_json::Value>,
    pub(super) ballast: Option<Ballast>,
    pub(super) caches_dropped: bool,
    /// Memory stood still: before, at rest.
    pub(super) settled: (bool, bool),
    pub(super) seconds: f64,
    pub(super) notes: Vec<String>,
}

/// One app at rest. Sizes in KiB.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct AppSample {
    pub(super) name: String,
    pub(super) state: Option<String>,
    pub(super) processes: usize,
    pub(super) pss: u64,
    pub(super) swap_pss: u64,
    pub(super) cgroup_memory: Option<u64>,
    pub(super) cgroup_swap: Option<u64>,
}

/// What became of all messages of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Messages {
    pub(super) sent: usize,
    /// Within `late-after`.
    pub(super) in_time: usize,
    /// After it.
    pub(super) late: usize,
    /// Not by the end of the run.
    pub(super) lost: usize,
    /// More than once.
    pub(super) duplicated: usize,
}

/// One message.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SentSample {
    pub(super) app: String,
    /// What it was sent to: an app that was running, say.
    pub(super) to: &'static str,
    /// From the request to the app's handler; none when it did not come.
    pub(super) ms: Option<f64>,
    pub(super) times: u64,
}

const LOOK: Duration = Duration::from_millis(500);

/// Does one arm once.
pub(super) fn run(experiment: &Experiment, run: usize, arm: Arm, progress: &Progress) -> Result<Sample, Failure> {
    let began = Instant::now();
    let say = |what: &str| progress.say(format!("run {run} of {}, {}: {what}", experiment.runs, arm.label()));
    say("starting");
    let mut stage = Stage::new(experiment, arm, experiment.apps())?;
    let measured = measure(&mut stage, run, &say, progress);
    say("ending everything that was started");
    let notes = stage.notes.clone();
    let ended = stage.end();
    // The first trouble is the one to tell of; what was left behind may be its consequence.
    let mut sample = measured?;
    ended?;
    sample.seconds = began.elapsed().as_secs_f64();
    sample.notes = notes;
    progress.tell(&told(&sample, experiment.runs));
    Ok(sample)
}

fn told(sample: &Sample, runs: usize) -> String {
    let claim = sample.claim.map_or_else(String::new, |claim| format!(", claims {} saved", mib_signed(claim)));
    format!(
        "run {} of {runs}, {}: costs {}{claim}; {} of {} reachable; {:.0} s",
        sample.run,
        sample.arm.label(),
        mib_signed(sample.cost),
        sample.reachable,
        sample.apps.len(),
        sample.seconds
    )
}

fn measure(stage: &mut Stage<'_>, run: usize, say: &dyn Fn(&str), progress: &Progress) -> Result<Sample, Failure> {
    let (before, settled_before, dropped) = watch(stage)?;
    let server_before = stage.relay.and_then(processes::pss);
    let cpu_before = stage.cgroups.as_ref().and_then(cgroups::Cgroups::cpu_micros);

    stage.start_daemon()?;
    let apps = stage.world.apps().to_vec();
    say("apps start");
    match stage.start(&apps, || progress.step(), || None)? {
        Started::All => {}
        Started::Late(text) | Started::Ended(text) | Started::GivenUp(text) => {
            return Err(Failure::new(Exit::Failed, text + &stage.world.logs()));
        }
    }
    say("messages");
    let mut latencies = trace::run(stage, || progress.step())?;
    say("apps come to rest");
    if !stage.rest(&apps)? {
        stage.note("not all apps came to rest in time".into());
    }
    if stage.arm == Arm::ResidentFrozen {
        trace::to_frozen(stage)?;
    }
    say("memory settles");
    let (rest, settled_rest, _) = watch(stage)?;
    let server_after = stage.relay.and_then(processes::pss);
    let server_pss = server_before.zip(server_after);
    // Before it is asked anything: what an answer maps is gone again seconds after.
    let daemon_pss = stage.daemon.as_ref().and_then(|(_, pid)| processes::pss(*pid));
    let samples = app_samples(stage)?;
    let connections = trace::connections(stage);
    let (claim, report) = claim(stage)?;
    let kills = kernel::oom_kills();
    let ballast = match &stage.experiment.ballast {
        Some(_) if kernel::stalled().is_none() => {
            stage.note("NO BALLAST TEST: this kernel does not tell of memory pressure (PSI; boot with psi=1)".into());
            None
        }
        Some(plan) => {
            say("ballast");
            Some(ballast::run(stage, plan)?)
        }
        None => None,
    };
    // The ballast itself is the first to go, and may well be ended.
    let of_ballast = kernel::oom_kills().zip(kills).map_or(0, |(after, before)| after.saturating_sub(before));
    say("a message to each at rest");
    let reachable = reachable(stage, &mut latencies)?;

    let apps_cpu = stage.cgroups.as_ref().and_then(cgroups::Cgroups::cpu_micros).zip(cpu_before);
    let daemon_cpu = stage.daemon.as_ref().and_then(|(_, pid)| processes::of(*pid));
    let server_growth = server_pss.map_or(0, |(before, after)| signed(after) - signed(before));
    let after = look()?;
    if after.oom_kills > before.oom_kills + of_ballast {
        stage.note("THE KERNEL ENDED PROCESSES FOR WANT OF MEMORY during this run".into());
    }
    Ok(Sample {
        run,
        arm: stage.arm,
        cost: signed(rest.used) - signed(before.used) - server_growth,
        cost_occupied: signed(rest.occupied) - signed(before.occupied) - server_growth,
        cost_unavailable: signed(before.available) - signed(rest.available) - server_growth,
        before,
        rest,
        apps_pss: samples.iter().map(|app| app.pss).sum(),
        apps: samples,
        daemon_pss,
        server_pss,
        connections,
        apps_cpu: apps_cpu.map(|(after, before)| Duration::from_micros(after.saturating_sub(before)).as_secs_f64()),
        daemon_cpu: daemon_cpu.map(|process| seconds(process.ticks)),
        major_faults: after.major_faults.saturating_sub(before.major_faults),
        messages: messages(stage),
        sent: sent_samples(stage),
        reachable,
        latencies_ms: latencies.into_iter().map(|(state, all)| (state.label(), all)).collect(),
        claim,
        report,
        ballast,
        caches_dropped: dropped,
        settled: (settled_before, settled_rest),
        seconds: 0.0,
        notes: Vec::new(),
    })
}

/// Waits until memory stands still, drops caches, and watches it for as long as the experiment says. Gives back the look
/// in the middle, by what was used, so that a short burst of somebody else does not count.
fn watch(stage: &mut Stage<'_>) -> Result<(System, bool, bool), Failure> {
    let settled = stage.settle()?;
    if !settled {
        stage.note("memory did not stand still within settle-within: something else is at work here".into());
    }
    let wanted = stage.experiment.drop_caches;
    let dropped = wanted && kernel::drop_caches().is_ok();
    if wanted && !dropped {
        stage.note("caches were not dropped, which takes root: what was read before may count".into());
    }
    let deadline = Instant::now() + stage.experiment.hold;
    let mut looks = Vec::new();
    loop {
        looks.push(look()?);
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        stage.world.pause(LOOK.min(left))?;
    }
    looks.sort_by_key(|system| system.used);
    let middle = looks.get(looks.len() / 2).copied().unwrap_or_default();
    Ok((middle, settled, dropped))
}

fn app_samples(stage: &mut Stage<'_>) -> Result<Vec<AppSample>, Failure> {
    let states = stage.states()?;
    let mut samples: BTreeMap<String, AppSample> = BTreeMap::new();
    for name in stage.world.apps() {
        let cgroup = stage.cgroups.as_ref().map(|cgroups| cgroups.path_of(name));
        let count = |file: &str| cgroups::kib(cgroup.as_deref()?, file);
        let sample = AppSample {
            name: name.clone(),
            state: states.get(name).map(|app| app.state.clone()),
            cgroup_memory: count("memory.current"),
            cgroup_swap: count("memory.swap.current"),
            ..AppSample::default()
        };
        samples.insert(name.clone(), sample);
    }
    for (name, process) in stage.tracker.apps() {
        if let (Some(sample), Some((pss, swap))) = (samples.get_mut(&name), processes::memory(process.pid)) {
            sample.processes += 1;
            sample.pss += pss;
            sample.swap_pss += swap;
        }
    }
    Ok(samples.into_values().collect())
}

fn claim(stage: &mut Stage<'_>) -> Result<(Option<i64>, Option<serde_json::Value>), Failure> {
    let Some((daemon, _)) = &stage.daemon else { return Ok((None, None)) };
    let text = daemon.ask("Report", None)?;
    let report: Report = client::decode(&text)?;
    if report.unmeasured > 0 {
        let text = format!("the daemon has no baseline of {} apps: its claim is without them", report.unmeasured);
        stage.note(text);
    }
    Ok((Some(report.saved), serde_json::from_str(&text).ok()))
}

/// Sends a message to each app at rest, and counts those that have it in time. Resident apps that were held still are let
/// run after that, so that what is late can still come.
fn reachable(stage: &mut Stage<'_>, latencies: &mut Latencies) -> Result<usize, Failure> {
    let late = stage.experiment.late_after;
    let apps = stage.world.apps().to_vec();
    let states = stage.states()?;
    let mut reached = 0;
    let mut sent = Vec::new();
    for app in &apps {
        let state = match stage.arm {
            Arm::ResidentFrozen => Some(State::PagedOut),
            Arm::Resident => Some(State::Running),
            _ => states.get(app).and_then(State::of),
        };
        let Stage { world, pushes, .. } = stage;
        let number = pushes.post(world.inbox(), app, "at rest")?;
        // One after the other, as on a phone; unless nobody wakes them, and it would be in vain each time.
        let patience = if stage.arm == Arm::ResidentFrozen { Duration::ZERO } else { late };
        if let Some(nanos) = stage.pushes.wait(stage.world.inbox(), number, patience) {
            reached += 1;
            if let Some(state) = state {
                latencies.entry(state).or_default().push(Duration::from_nanos(nanos).as_secs_f64() * 1000.0);
            }
        } else {
            sent.push(number);
        }
        stage.world.check_interrupted()?;
    }
    if stage.arm == Arm::ResidentFrozen {
        let from = clock::boot();
        while clock::boot().since(from) < late {
            stage.world.pause(LOOK)?;
        }
        reached +=
            sent.iter().filter(|n| stage.pushes.wait(stage.world.inbox(), **n, Duration::ZERO).is_some()).count();
        for app in &apps {
            stage.set_frozen(app, false)?;
        }
    }
    // Time for what is late.
    let deadline = Instant::now() + late;
    while Instant::now() < deadline && messages(stage).lost > 0 {
        stage.world.pause(LOOK)?;
    }
    Ok(reached)
}

fn messages(stage: &Stage<'_>) -> Messages {
    let mut messages = Messages::default();
    let late = u64::try_from(stage.experiment.late_after.as_nanos()).unwrap_or(u64::MAX);
    for (sent, arrived) in stage.pushes.outcomes(stage.world.inbox()) {
        messages.sent += 1;
        match arrived.times {
            0 => messages.lost += 1,
            times => {
                match arrived.first.saturating_sub(sent.at) <= late {
                    true => messages.in_time += 1,
                    false => messages.late += 1,
                }
                messages.duplicated += usize::from(times > 1);
            }
        }
    }
    messages
}

fn sent_samples(stage: &Stage<'_>) -> Vec<SentSample> {
    let outcomes = stage.pushes.outcomes(stage.world.inbox()).into_iter();
    outcomes
        .map(|(sent, arrived)| SentSample {
            app: sent.app.clone(),
            to: sent.about,
            ms: (arrived.times > 0)
                .then(|| Duration::from_nanos(arrived.first.saturating_sub(sent.at)).as_secs_f64() * 1000.0),
            times: arrived.times,
        })
        .collect()
}

fn seconds(ticks: u64) -> f64 {
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    let per_second = per_second.and_then(|told| u32::try_from(told).ok()).filter(|told| *told > 0).unwrap_or(100);
    #[expect(clippy::cast_precision_loss, reason = "ticks of an experiment are far below 2^53")]
    let ticks = ticks as f64;
    ticks / f64::from(per_second)
}

fn signed(kib: u64) -> i64 {
    i64::try_from(kib).unwrap_or(i64::MAX)
}
