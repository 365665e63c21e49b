//! `nightporter measure`: the proof. The same apps with the daemon and without, in an order left to chance, several times;
//! what the whole machine has to say about each, and the daemon's own claim beside it.

mod arm;
mod ballast;
mod commands;
mod experiment;
mod kernel;
mod progress;
mod reach;
mod render;
mod result;
mod schedule;
mod stage;
mod statistics;
mod still;
mod trace;
mod values;

use std::{fs, path::Path};

use self::{experiment::Experiment, progress::Progress, reach::Reach, result::Outcome};
use crate::{
    args,
    exit::{Exit, Failure},
};

/// Does the command and gives back what to print.
pub(crate) fn run(args: &args::Measure) -> Result<String, Failure> {
    let text = fs::read_to_string(&args.experiment)
        .map_err(|error| Failure::new(Exit::Data, format!("cannot read {}: {error}", args.experiment.display())))?;
    let experiment = Experiment::parse(&text)
        .map_err(|problem| Failure::new(Exit::Data, format!("{}: {problem}", args.experiment.display())))?;
    if args.check {
        return Ok(render::plan(&experiment));
    }
    // Found out before hours of work, not after.
    for path in [&args.json, &args.markdown].into_iter().flatten() {
        fs::File::options().append(true).create(true).open(path).map_err(|error| cannot_write(path, &error))?;
    }
    let save = |outcome: &Outcome| match &args.json {
        Some(path) => save(path, outcome),
        None => Ok(()),
    };
    let outcome = if args.reach { reach_all(&experiment, save)? } else { measure_all(&experiment, save)? };
    if let Some(path) = &args.markdown {
        write(path, &render::markdown(&outcome))?;
    }
    let text = render::text(&outcome);
    match outcome.missed() {
        0 => Ok(text),
        missed => Err(Failure::new(Exit::Refused, format!("{missed} expectations were missed\n\n{text}"))),
    }
}

/// The child that the ballast test makes of this program.
pub(crate) fn ballast(args: &args::Ballast) -> Result<String, Failure> {
    ballast::child(args.parent, args.cgroup.as_deref())
        .map(|()| String::new())
        .map_err(|error| Failure::system("ballast", error))
}

/// `save` is given what there is after each run of an arm: one that fails hours later does not take it along.
fn measure_all(experiment: &Experiment, save: impl Fn(&Outcome) -> Result<(), Failure>) -> Result<Outcome, Failure> {
    let order = schedule::order(&experiment.arms, experiment.runs, experiment.seed);
    let apps = experiment.apps().len();
    let steps = order.len() * apps * (1 + experiment.messages.each * experiment.messages.states.len());
    let progress = Progress::new(steps);
    let mut outcome = Outcome::of_arms(experiment, Vec::new());
    for (run, arm) in order {
        let mut samples = outcome.samples;
        samples.push(arm::run(experiment, run, arm, &progress)?);
        outcome = Outcome::of_arms(experiment, samples);
        save(&outcome)?;
    }
    Ok(outcome)
}

fn reach_all(experiment: &Experiment, save: impl Fn(&Outcome) -> Result<(), Failure>) -> Result<Outcome, Failure> {
    let Some(plan) = &experiment.reach else {
        return Err(Failure::new(Exit::Data, "the experiment has no [reach], which --reach needs"));
    };
    let progress = Progress::new(0);
    let mut outcome = Outcome::of_reach(experiment, Vec::new());
    for arm in &plan.arms {
        let mut reaches = outcome.reach;
        let first = reaches.first().map(|first: &Reach| first.apps);
        reaches.push(reach::run(experiment, plan, *arm, first, &progress)?);
        outcome = Outcome::of_reach(experiment, reaches);
        save(&outcome)?;
    }
    Ok(outcome)
}

fn save(path: &Path, outcome: &Outcome) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(outcome).map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    write(path, &(text + "\n"))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).map_err(|error| cannot_write(path, &error))
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(Exit::CannotCreate, format!("cannot write {}: {error}", path.display()))
}
