//! The results for people: as text, and as a section of Markdown.

use std::fmt::Write;

use super::{
    experiment::Experiment,
    reach::Reach,
    result::{ArmFigures, Outcome, times_as_many},
    schedule,
    statistics::Summary,
};
use crate::render::Table;

type Row = (&'static str, Box<dyn Fn(&ArmFigures) -> String>);

/// `--check`: what would be done.
pub(super) fn plan(experiment: &Experiment) -> String {
    let mut text = format!("{}: {} apps\n", experiment.name, experiment.apps().len());
    for kind in &experiment.kinds {
        let _ = writeln!(text, "  {} × {}: {}", kind.count, kind.name, kind.shared.join(" "));
    }
    for run in 1..=experiment.runs {
        let order = schedule::order(&experiment.arms, experiment.runs, experiment.seed);
        let arms: Vec<&str> = order.iter().filter(|(n, _)| *n == run).map(|(_, arm)| arm.label()).collect();
        let _ = writeln!(text, "run {run}: {}", arms.join(", "));
    }
    let reach = experiment.reach.as_ref().map(|plan| plan.most);
    if let Some(most) = reach {
        let _ = writeln!(text, "with --reach: up to {most} apps");
    }
    text
}

/// For a terminal.
pub(super) fn text(outcome: &Outcome) -> String {
    let mut text = format!("{}\n\n", head(outcome));
    if !outcome.arms.is_empty() {
        let rows = rows();
        for (label, pick) in &rows {
            let cells: Vec<String> = outcome.arms.iter().map(pick).collect();
            if cells.iter().any(|cell| cell != "–") {
                let _ = writeln!(text, "{label}");
                for (arm, cell) in outcome.arms.iter().zip(cells) {
                    let _ = writeln!(text, "  {:<16} {cell}", arm.arm.label());
                }
            }
        }
        text.push('\n');
    }
    for reach in &outcome.reach {
        let _ = writeln!(text, "{}", reach_line(reach));
        let mut table =
            Table::new(["APPS", "KEPT", "PRESSURE", "AVAILABLE", "SWAP", "SLOWEST PUSH", "SECONDS", "WHY NOT"])
                .right(&[0, 2, 3, 4, 5, 6]);
        for step in &reach.steps {
            table.row([
                step.apps.to_string(),
                if step.kept { "yes" } else { "no" }.into(),
                step.pressure.map_or_else(|| "–".into(), |share| format!("{share:.1} %")),
                crate::render::mib(step.available_kib),
                crate::render::mib(step.swap_used_kib),
                step.slowest_push_ms.map_or_else(|| "–".into(), |ms| format!("{ms:.0} ms")),
                format!("{:.0}", step.seconds),
                step.because.clone().unwrap_or_default(),
            ]);
        }
        text.push_str(&table.to_text());
        text.push('\n');
    }
    if let Some(times) = times(outcome) {
        let _ = writeln!(text, "Through the daemon {times:.1} times as many.\n");
    }
    for expectation in &outcome.expectations {
        let _ = writeln!(
            text,
            "{}: {} {}, wanted {}",
            if expectation.met { "met" } else { "MISSED" },
            expectation.key,
            expectation.measured.as_deref().unwrap_or("nothing to say it by"),
            expectation.wanted
        );
    }
    for note in notes(outcome) {
        let _ = writeln!(text, "Note: {note}.");
    }
    text
}

/// A section a document can include.
pub(super) fn markdown(outcome: &Outcome) -> String {
    let mut text = format!("### {}\n\n{}\n\n", outcome.experiment, head(outcome));
    if !outcome.arms.is_empty() {
        let labels: Vec<&str> = outcome.arms.iter().map(|arm| arm.arm.label()).collect();
        let _ = writeln!(text, "| | {} |\n|---|{}", labels.join(" | "), "--:|".repeat(labels.len()));
        for (label, pick) in &rows() {
            let cells: Vec<String> = outcome.arms.iter().map(pick).collect();
            if cells.iter().any(|cell| cell != "–") {
                let _ = writeln!(text, "| {label} | {} |", cells.join(" | "));
            }
        }
        text.push('\n');
    }
    if !outcome.reach.is_empty() {
        text.push_str("| | kept reachable | too many | why |\n|---|--:|--:|---|\n");
        for reach in &outcome.reach {
            let too_many = reach.too_many.map_or_else(|| "–".into(), |apps| apps.to_string());
            let _ = writeln!(text, "| {} | {} | {too_many} | {} |", reach.arm.label(), reach.apps, reach.because);
        }
        text.push('\n');
        if let Some(times) = times(outcome) {
            let _ = writeln!(text, "Through the daemon **{times:.1} times as many**.\n");
        }
    }
    for note in notes(outcome) {
        let _ = writeln!(text, "- {note}");
    }
    text
}

fn head(outcome: &Outcome) -> String {
    let kinds: Vec<String> = outcome.kinds.iter().map(|(name, count)| format!("{count} × {name}")).collect();
    let machine = &outcome.machine;
    let mut text = format!(
        "{} on Linux {}, {} CPUs, {} of memory",
        kinds.join(", "),
        machine.kernel,
        machine.cpus,
        crate::render::mib(machine.memory_kib)
    );
    match machine.swaps.is_empty() {
        true => text.push_str(", no swap"),
        false => text.push_str(", with swap"),
    }
    if !outcome.arms.is_empty() {
        let _ = match outcome.runs {
            1 => write!(text, "; one run (seed {})", outcome.seed),
            runs => write!(text, "; {runs} runs (seed {}), median (quartiles; least to most)", outcome.seed),
        };
        if outcome.samples.iter().all(|sample| sample.caches_dropped) {
            text.push_str("; caches dropped before each measurement");
        }
    }
    text
}

fn rows() -> Vec<Row> {
    fn size(pick: impl Fn(&ArmFigures) -> Option<Summary> + 'static) -> Box<dyn Fn(&ArmFigures) -> String> {
        Box::new(move |arm| spread(pick(arm), 1024.0, " MiB"))
    }
    fn number(
        pick: impl Fn(&ArmFigures) -> Option<Summary> + 'static,
        unit: &'static str,
    ) -> Box<dyn Fn(&ArmFigures) -> String> {
        Box::new(move |arm| spread(pick(arm), 1.0, unit))
    }
    fn wake(state: &'static str) -> Box<dyn Fn(&ArmFigures) -> String> {
        Box::new(move |arm| match arm.wake_ms.get(state) {
            Some(wake) => format!("{:.0} / {:.0} / {:.0} ms ({})", wake.p50, wake.p95, wake.max, wake.n),
            None => "–".into(),
        })
    }
    vec![
        ("Memory used", size(|arm| arm.cost)),
        ("Memory used, by MemAvailable as it is", size(|arm| arm.cost_unavailable)),
        ("Memory occupied (with mapped files)", size(|arm| arm.cost_occupied)),
        (
            "More could be allocated",
            Box::new(|arm| match (arm.ballast_bounded, spread(arm.ballast, 1024.0, " MiB")) {
                (true, text) => format!("at least {text}"),
                (false, text) => text,
            }),
        ),
        ("Saved against resident", size(|arm| arm.saved)),
        ("Returned", number(|arm| arm.returned_percent, " %")),
        ("More to allocate than resident", size(|arm| arm.ballast_gained)),
        ("The daemon's own claim", size(|arm| arm.claim)),
        ("Its error", number(|arm| arm.claim_error_percent, " %")),
        ("Its error, by what is occupied", number(|arm| arm.claim_error_occupied_percent, " %")),
        ("Apps, PSS", size(|arm| arm.apps_pss)),
        ("Daemon, PSS", size(|arm| arm.daemon_pss)),
        ("Daemon, of what is saved", number(|arm| arm.daemon_percent_of_saved, " %")),
        ("zram", size(|arm| arm.zram)),
        ("Swap", size(|arm| arm.swap)),
        ("CPU, apps", number(|arm| arm.apps_cpu, " s")),
        ("CPU, daemon", number(|arm| arm.daemon_cpu, " s")),
        ("Major faults", number(|arm| arm.major_faults, "")),
        ("Connections", number(|arm| arm.connections, "")),
        ("Apps reachable at rest", number(|arm| arm.reachable, "")),
        (
            "Messages: in time, late, lost, twice",
            Box::new(|arm| {
                let messages = &arm.messages;
                format!(
                    "{} of {}, {}, {}, {}",
                    messages.in_time, messages.sent, messages.late, messages.lost, messages.duplicated
                )
            }),
        ),
        ("Push to running, p50 / p95 / max", wake("running")),
        ("Push to frozen", wake("frozen")),
        ("Push to paged out", wake("paged out")),
        ("Push to tombstone", wake("tombstone")),
    ]
}

fn spread(summary: Option<Summary>, unit: f64, name: &str) -> String {
    let Some(summary) = summary else { return "–".into() };
    let digits = |value: f64| format!("{:.1}", value / unit);
    let median = format!("{}{name}", digits(summary.median));
    match summary.n {
        1 => median,
        _ => format!(
            "{median} ({}–{}; {} to {})",
            digits(summary.q1),
            digits(summary.q3),
            digits(summary.min),
            digits(summary.max)
        ),
    }
}

fn reach_line(reach: &Reach) -> String {
    match reach.too_many {
        Some(too_many) => {
            format!(
                "{}: {} apps kept reachable; {too_many} were too many: {}",
                reach.arm.label(),
                reach.apps,
                reach.because
            )
        }
        None => format!(
            "{}: {} apps kept reachable, and no more were tried: {}",
            reach.arm.label(),
            reach.apps,
            reach.because
        ),
    }
}

fn times(outcome: &Outcome) -> Option<f64> {
    use super::arm::Arm;
    let find = |arm: Arm| outcome.reach.iter().find(|reach| reach.arm == arm).map(|reach| reach.apps);
    times_as_many(find(Arm::Resident), find(Arm::Tombstone).or(find(Arm::Cached)))
}

/// Each with the arms it is about, where there are several.
fn notes(outcome: &Outcome) -> Vec<String> {
    let mut said: Vec<(String, Vec<&str>)> = Vec::new();
    let all = outcome.arms.iter().flat_map(|arm| arm.notes.iter().map(|note| (arm.arm.label(), note)));
    let all =
        all.chain(outcome.reach.iter().flat_map(|reach| reach.notes.iter().map(|note| (reach.arm.label(), note))));
    for (arm, note) in all {
        match said.iter_mut().find(|(other, _)| other == note) {
            Some((_, arms)) => arms.push(arm),
            None => said.push((note.clone(), vec![arm])),
        }
    }
    said.into_iter().map(|(note, arms)| format!("{note} ({})", arms.join(", "))).collect()
}
