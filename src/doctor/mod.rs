//! `nightporter doctor`: from what was seen of a machine to what it means. Pure: `sys::doctor` looks.
//!
//! Each part of [`examine`] turns some facts into findings; each finding says what there is, what the daemon does
//! without it, and what mends it.

pub mod facts;

mod apps;
mod kernel;
mod memory;
mod mend;
mod push;
mod system;

#[cfg(test)]
mod tests;

use self::facts::{Facts, Seen};
use crate::view::{Doctor, DoctorCounts, Finding, Verdict};

/// What `facts` mean.
pub fn examine(facts: &Facts) -> Doctor {
    let mut findings = Vec::new();
    kernel::examine(facts, &mut findings);
    memory::examine(facts, &mut findings);
    system::examine(facts, &mut findings);
    push::examine(facts, &mut findings);
    apps::examine(facts, &mut findings);
    let mut counts = DoctorCounts::default();
    for finding in &findings {
        *match finding.verdict {
            Verdict::Ok => &mut counts.ok,
            Verdict::Note => &mut counts.note,
            Verdict::Lacks => &mut counts.lacks,
            Verdict::Broken => &mut counts.broken,
        } += 1;
    }
    Doctor {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        scope: if facts.user { "user" } else { "system" }.to_owned(),
        machine: machine(facts),
        counts,
        findings,
    }
}

fn machine(facts: &Facts) -> String {
    let Ok(machine) = &facts.machine else { return "unknown machine".to_owned() };
    let os = machine.os.as_deref().unwrap_or("unknown system");
    let kernel = facts.kernel.as_ref().map_or("", |kernel| &kernel.release);
    let on = machine.model.as_ref().map(|model| format!(" on {model}")).unwrap_or_default();
    format!("{os}{on}, Linux {}", if kernel.is_empty() { "of unknown version" } else { kernel })
}

/// Where findings go, with what they have in common.
struct Area<'a> {
    name: &'static str,
    findings: &'a mut Vec<Finding>,
}

impl Area<'_> {
    fn ok(&mut self, id: &str, text: impl Into<String>) {
        self.say(id, Verdict::Ok, text, None, Vec::new());
    }

    /// Worth knowing, and nothing to be done about.
    fn note(&mut self, id: &str, text: impl Into<String>) {
        self.say(id, Verdict::Note, text, None, Vec::new());
    }

    fn say(&mut self, id: &str, verdict: Verdict, text: impl Into<String>, instead: Option<&str>, mend: Vec<String>) {
        self.findings.push(Finding {
            area: self.name.to_owned(),
            id: id.to_owned(),
            verdict,
            text: text.into(),
            instead: instead.map(str::to_owned),
            mend,
        });
    }

    /// What was seen; a finding where it was not.
    fn seen<'a, T>(&mut self, id: &str, what: &str, seen: &'a Seen<T>) -> Option<&'a T> {
        match seen {
            Ok(seen) => Some(seen),
            Err(why) => {
                self.note(id, format!("{what} could not be seen: {why}"));
                None
            }
        }
    }
}
