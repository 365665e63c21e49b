//! Which message goes to its app's payload helper next: two at a time, one of an app so that they come in order.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::{
    model::{AppKey, MessageSeq},
    notification::HelperJob,
    time::Instant,
};

/// Helpers at a time. Each is a process with memory of its own.
const AT_ONCE: usize = 2;
/// Messages that wait for one, of all apps; what comes beyond it wakes its app.
const WAITING: usize = 32;
/// One that has not come back by then never will: the executor ends them after 5 s.
const LOST: Duration = Duration::from_secs(20);

/// The helpers that run, and what waits for them.
#[derive(Debug, Default)]
pub(super) struct Helping {
    waiting: VecDeque<HelperJob>,
    running: BTreeMap<MessageSeq, (AppKey, Instant)>,
}

impl Helping {
    /// A message for a helper. False when too many wait.
    pub(super) fn push(&mut self, job: HelperJob) -> bool {
        let room = self.waiting.len() < WAITING;
        if room {
            self.waiting.push_back(job);
        }
        room
    }

    /// The next one that may run.
    pub(super) fn next(&mut self, now: Instant) -> Option<HelperJob> {
        if self.running.len() >= AT_ONCE {
            return None;
        }
        let free = |job: &HelperJob| self.running.values().all(|(app, _)| *app != job.app);
        let index = self.waiting.iter().position(free)?;
        let job = self.waiting.remove(index)?;
        self.running.insert(job.seq, (job.app.clone(), now + LOST));
        Some(job)
    }

    /// One has answered. False when it was not waited for (any more).
    pub(super) fn done(&mut self, seq: MessageSeq) -> bool {
        self.running.remove(&seq).is_some()
    }

    /// What waits for the app's helper need not go to it any more.
    pub(super) fn forget(&mut self, app: &AppKey) {
        self.waiting.retain(|job| job.app != *app);
    }

    /// Those that never came back.
    pub(super) fn lost(&self, now: Instant) -> Vec<MessageSeq> {
        self.running.iter().filter(|(_, (_, until))| *until <= now).map(|(seq, _)| *seq).collect()
    }

    /// Whether one runs or waits: worth staying awake for.
    pub(super) fn is_busy(&self) -> bool {
        !self.running.is_empty() || !self.waiting.is_empty()
    }

    /// When [`Helping::lost`] is worth asking.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.running.values().map(|(_, until)| *until).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Bus, Urgency};

    fn job(seq: u64, app: u32) -> HelperJob {
        HelperJob {
            seq: MessageSeq(seq),
            app: AppKey::new(Bus::Session(1), format!("org.example.App{app}")),
            command: ["/bin/true".into()].into(),
            network: false,
            token: "t".into(),
            id: "i".into(),
            urgency: Urgency::Normal,
            body: b"x"[..].into(),
        }
    }

    const NOW: Instant = Instant::from_nanos(1_000_000_000);

    #[test]
    fn two_at_a_time_and_one_of_an_app_in_order() {
        let mut helping = Helping::default();
        for (seq, app) in [(1, 1), (2, 1), (3, 2), (4, 3)] {
            assert!(helping.push(job(seq, app)));
        }
        let next = |helping: &mut Helping| helping.next(NOW).map(|job| job.seq.0);
        assert_eq!([next(&mut helping), next(&mut helping), next(&mut helping)], [Some(1), Some(3), None]);
        assert!(helping.done(MessageSeq(3)) && !helping.done(MessageSeq(3)));
        assert_eq!(next(&mut helping), Some(4), "the app of 2 has one that runs");
        assert!(helping.done(MessageSeq(1)));
        assert_eq!(next(&mut helping), Some(2));
        assert!(helping.is_busy());
        assert_eq!(helping.lost(NOW + LOST), [MessageSeq(2), MessageSeq(4)]);
        assert_eq!(helping.lost(NOW), []);
    }

    #[test]
    fn the_queue_is_bounded_and_an_app_can_leave_it() {
        let mut helping = Helping::default();
        let taken = (0..100).filter(|n| helping.push(job(*n, u32::from(*n % 2 == 0)))).count();
        assert_eq!(taken, WAITING);
        helping.forget(&job(0, 1).app);
        assert_eq!(helping.next(NOW).map(|job| job.seq), Some(MessageSeq(1)));
        assert_eq!(helping.waiting.len(), WAITING / 2 - 1);
    }
}
