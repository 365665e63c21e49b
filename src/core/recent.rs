//! The latest decisions about all apps, for `nightporter log`. The journal has what is older.

use std::collections::VecDeque;

use super::{Core, access, lifecycle::Decision, queries::json};
use crate::{action::Reply, event::Caller, model::AppKey, view};

/// Decisions kept at most, some 200 bytes each.
const KEPT: usize = 256;

/// A ring of decisions, numbered from 1 on as long as the daemon lives.
#[derive(Debug, Default)]
pub(super) struct Recent {
    entries: VecDeque<(AppKey, Decision)>,
    /// The number of the newest.
    latest: u64,
}

impl Recent {
    pub(super) fn push(&mut self, app: AppKey, decision: Decision) {
        if self.entries.len() == KEPT {
            self.entries.pop_front();
        }
        self.entries.push_back((app, decision));
        self.latest += 1;
    }

    /// Those after number `after`, oldest first, with their numbers. A number of an earlier daemon's gives all.
    fn after(&self, after: u64) -> impl Iterator<Item = (u64, &AppKey, &Decision)> {
        let first = self.latest - self.entries.len() as u64 + 1;
        let after = if after > self.latest { 0 } else { after };
        let numbered = self.entries.iter().zip(first..).map(|((app, decision), number)| (number, app, decision));
        numbered.filter(move |(number, ..)| *number > after)
    }
}

impl Core {
    /// `Log`: what the caller may see of it.
    pub(super) fn recent(&self, caller: &Caller, after: u64) -> Reply {
        let entries = self.recent.after(after).filter(|(_, app, _)| access::sees(caller, app.bus));
        json(&view::Log {
            latest: self.recent.latest,
            entries: entries
                .map(|(_, app, decision)| view::LogEntry {
                    name: app.service.to_string(),
                    bus: app.bus.to_string(),
                    decision: view::Decision {
                        at: decision.at.to_string(),
                        verdict: decision.verdict.to_owned(),
                        reason: decision.reason.to_string(),
                    },
                })
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Bus, time::UnixTime};

    fn numbers(recent: &Recent, after: u64) -> Vec<u64> {
        recent.after(after).map(|(number, ..)| number).collect()
    }

    #[test]
    fn it_keeps_the_newest_and_counts_all() {
        let mut recent = Recent::default();
        assert_eq!(numbers(&recent, 0), Vec::<u64>::new());
        let app = AppKey::new(Bus::System, "org.example.App");
        for _ in 0..KEPT + 2 {
            let decision = Decision { at: UnixTime::from_secs(0), verdict: "freeze", reason: "so".into() };
            recent.push(app.clone(), decision);
        }
        let last = KEPT as u64 + 2;
        assert_eq!(numbers(&recent, 0), (3..=last).collect::<Vec<_>>());
        assert_eq!(numbers(&recent, last - 1), [last]);
        assert_eq!(numbers(&recent, last), Vec::<u64>::new());
        assert_eq!(numbers(&recent, last + 50).len(), KEPT, "the number was an earlier daemon's");
    }
}
