//! The last decisions about an app, each with a reason a user can read (design.md, invariant 7).

use std::{collections::VecDeque, sync::Arc, time::Duration};

use crate::time::UnixTime;

/// How many are kept for each app.
pub const KEPT: usize = 10;
/// Longest reason in bytes; what other programs say ends up in here and must not fill the memory.
const LONGEST_REASON: usize = 300;

/// One decision about an app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// When; for a decision met several times in a row, the last time.
    pub at: UnixTime,
    /// What: `freeze`, `thaw`, `page-out`, `kill`, `leave`, `would-freeze`, `deliver`, …
    pub verdict: &'static str,
    /// Why, as a sentence: one line, at most 300 bytes, no control characters.
    pub reason: Arc<str>,
}

impl Decision {
    pub(super) fn new(verdict: &'static str, reason: &str, at: UnixTime) -> Self {
        Self { at, verdict, reason: one_line(reason) }
    }

    fn says_the_same(&self, other: &Self) -> bool {
        self.verdict == other.verdict && self.reason == other.reason
    }
}

/// A ring of the last [`KEPT`] decisions.
#[derive(Clone, Debug, Default)]
pub(super) struct Decisions(VecDeque<Decision>);

impl Decisions {
    /// Adds a decision and says whether it is news: the newest one met again only gets a new time.
    pub(super) fn push(&mut self, decision: &Decision) -> bool {
        if let Some(newest) = self.0.back_mut().filter(|newest| newest.says_the_same(decision)) {
            newest.at = decision.at;
            return false;
        }
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(decision.clone());
        true
    }

    /// Oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Decision> {
        self.0.iter()
    }

    pub(super) fn newest(&self) -> Option<&Decision> {
        self.0.back()
    }
}

/// A duration as a person writes it: `500 ms`, `90 s`, `10 min`, `2 h`.
pub(super) fn human(duration: Duration) -> String {
    let millis = duration.as_millis();
    match millis {
        0..1000 => format!("{millis} ms"),
        _ if millis < 10_000 && !millis.is_multiple_of(1000) => format!("{:.1} s", duration.as_secs_f64()),
        _ => match duration.as_secs() {
            secs if secs >= 7200 && secs % 3600 == 0 => format!("{} h", secs / 3600),
            secs if secs >= 120 && secs % 60 == 0 => format!("{} min", secs / 60),
            secs => format!("{secs} s"),
        },
    }
}

fn one_line(text: &str) -> Arc<str> {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match line.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= LONGEST_REASON).last() {
        Some(end) if end < line.len() => line[..end].into(),
        _ => line.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(verdict: &'static str, reason: &str, secs: u64) -> Decision {
        Decision::new(verdict, reason, UnixTime::from_secs(secs))
    }

    #[test]
    fn the_last_ten_are_kept_oldest_first() {
        let mut ring = Decisions::default();
        for n in 0..25 {
            assert!(ring.push(&decision("leave", &n.to_string(), n)));
        }
        let reasons: Vec<_> = ring.iter().map(|d| d.reason.to_string()).collect();
        assert_eq!(reasons, (15..25).map(|n| n.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn the_same_decision_in_a_row_is_kept_once_with_its_last_time() {
        let mut ring = Decisions::default();
        assert!(ring.push(&decision("leave", "it is busy", 1)));
        assert!(!ring.push(&decision("leave", "it is busy", 2)));
        assert!(ring.push(&decision("freeze", "it is busy", 3)));
        assert!(ring.push(&decision("leave", "it is busy", 4)));
        assert_eq!(ring.iter().map(|d| d.at.as_millis() / 1000).collect::<Vec<_>>(), [2, 3, 4]);
    }

    #[test]
    fn a_reason_is_one_short_line_whatever_another_program_says() {
        let reason = decision("leave", "a\u{1b}[31m\nb", 0).reason;
        assert_eq!(&*reason, "a [31m b");
        let reason = decision("leave", &"é".repeat(1000), 0).reason;
        assert_eq!(reason.len(), LONGEST_REASON);
        assert_eq!(decision("leave", &"x".repeat(LONGEST_REASON), 0).reason.len(), LONGEST_REASON);
        assert_eq!(&*decision("leave", "", 0).reason, "");
    }

    #[test]
    fn durations_read_like_a_person_wrote_them() {
        let cases = [
            (200, "200 ms"),
            (1500, "1.5 s"),
            (10_000, "10 s"),
            (90_000, "90 s"),
            (600_000, "10 min"),
            (7_200_000, "2 h"),
        ];
        for (millis, text) in cases {
            assert_eq!(human(Duration::from_millis(millis)), text);
        }
    }
}
