//! `nightporter demo`: the main job on a machine with nothing else running. The same apps are run twice, each on its own
//! and then behind the daemon, and every figure shown is measured in that run.

mod measure;
mod render;
mod resident;
mod shared;

use std::{
    env,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use self::measure::{Connections, Figures, MemoryFigures};
use crate::{
    args::Demo,
    exit::{Exit, Failure},
    lab::{
        pushes::Pushes,
        scripts::{AppSpec, quoted, text},
        state::State,
        world::{Setup, World, beside},
    },
};

/// Little for a chat app, and as much as makes paging out worth while (design.md: 8 MiB).
const BALLAST_KIB: u64 = 8192;

/// What a person sees in addition to the figures.
struct Story {
    figures: Figures,
    states: Vec<StateRow>,
    /// What was run as the app.
    apps: String,
    /// Why nothing was paged out, if so.
    not_paged_out: Option<String>,
}

/// One row of the table of states.
struct StateRow {
    state: State,
    pss: u64,
    wake: Option<measure::Wake>,
}

/// Does the command and gives back what to print.
pub(crate) fn run(args: &Demo) -> Result<String, Failure> {
    let started = Instant::now();
    // Two starts and a few pushes an app beside the rounds: near enough for a bar.
    let steps = u64::from(args.apps) * (4 + 4 * u64::from(args.messages));
    let progress = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg:<44} {bar:30} {elapsed}") {
        progress.set_style(style);
    }
    progress.enable_steady_tick(Duration::from_millis(100));

    let mut world = World::new(setup(args)?)?;
    let told = tell(&mut world, args, started, &progress);
    progress.set_message("Ending everything that was started");
    let ended = world.end();
    progress.finish_and_clear();
    // The first trouble is the one to tell of; what was left behind may be its consequence.
    let story = told?;
    ended?;

    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&story.figures)
            .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
        std::fs::write(path, text + "\n")
            .map_err(|error| Failure::new(Exit::CannotCreate, format!("cannot write {}: {error}", path.display())))?;
    }
    let text = render::story(&story);
    match story.figures.messages.lost {
        0 => Ok(text),
        lost => Err(Failure::new(Exit::Failed, format!("{lost} messages were lost\n\n{text}"))),
    }
}

fn setup(args: &Demo) -> Result<Setup, Failure> {
    let command = match &args.app_command {
        Some(command) => command.clone(),
        None => quoted(&text(&beside("nightporter-sample")?)?),
    };
    let app = |n| AppSpec {
        name: format!("org.nightporter.Sample{n}"),
        resident: command.clone(),
        shared: command.clone(),
        registering: None,
        env: vec![("NIGHTPORTER_SAMPLE_BALLAST_KIB".into(), ballast_kib().to_string())],
        cgroup: None,
    };
    Ok(Setup { prefix: "nightporter-demo-", parent: env::temp_dir(), apps: (1..=args.apps).map(app).collect() })
}

fn tell(world: &mut World, args: &Demo, started: Instant, progress: &ProgressBar) -> Result<Story, Failure> {
    let mut pushes = Pushes::new("demo", world.interrupted());
    // First, because it is what may be missing.
    world.start_bus()?;
    world.start_relay()?;
    let resident = resident::run(world, &mut pushes, progress)?;
    let shared = shared::run(world, args.messages, &mut pushes, progress)?;
    let messages = pushes.count(world.inbox());
    let saved = [shared.pss, shared.daemon, shared.zram]
        .into_iter()
        .fold(signed(resident.pss), |saved, cost| saved - signed(cost));
    let figures = Figures {
        apps: args.apps,
        upstream_connections: Connections { resident: resident.connections, shared: shared.connections },
        memory_kib: MemoryFigures {
            resident_pss: resident.pss,
            shared_pss: shared.pss,
            daemon_pss: shared.daemon,
            zram: shared.zram,
            saved,
            ledger_saved: shared.ledger_saved,
        },
        messages,
        wake_ms: shared.wake,
        freezer: shared.freezer,
        seconds: measure::rounded(started.elapsed().as_secs_f64()),
    };
    let apps = match &args.app_command {
        Some(command) => format!("{} × {command}", args.apps),
        None => format!(
            "{} × nightporter-sample, each holding {} of generated chat history; real apps hold more. Run your own \
             program with --app-command",
            args.apps,
            crate::render::mib(ballast_kib())
        ),
    };
    Ok(Story { figures, states: shared.states, apps, not_paged_out: shared.not_paged_out })
}

fn signed(kib: u64) -> i64 {
    i64::try_from(kib).unwrap_or(i64::MAX)
}

/// How much history each app is told to hold.
fn ballast_kib() -> u64 {
    env::var("NIGHTPORTER_SAMPLE_BALLAST_KIB").ok().and_then(|kib| kib.parse().ok()).unwrap_or(BALLAST_KIB)
}
