//! What a source sees, told to the loop when it changes: at once, but not more often than every 100 ms, and never waiting
//! for room in the inbox.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::Duration,
};

use zruntime::SharedRuntime;

use crate::{
    model::Veto,
    sys::{
        clock,
        inbox::{Incoming, Sender},
    },
    time::Instant,
};

/// Told of a user at most.
const VETOES: usize = 256;
/// Between two tellings: whoever starts and stops a hundred times a second is told of ten times.
const GAP: Duration = Duration::from_millis(100);

/// One source. Dropped, it sees nothing any more.
#[derive(Debug)]
pub(super) struct Teller {
    source: &'static str,
    inbox: Sender,
    users: BTreeMap<u32, User>,
    /// Nothing is told before.
    not_before: Instant,
    /// Nothing need be looked at before: it would not be told.
    open_at: Instant,
}

#[derive(Debug, Default)]
struct User {
    /// As the source says it.
    seen: Vec<(u32, Veto)>,
    /// What of it is told.
    wanted: Vec<(u32, Veto)>,
    /// `None` at first: what was told over a connection before this may still stand.
    told: Option<Vec<(u32, Veto)>>,
}

impl Teller {
    pub(super) fn new(source: &'static str, inbox: Sender) -> Self {
        let (not_before, open_at) = (Instant::from_nanos(0), Instant::from_nanos(0));
        Self { source, inbox, users: BTreeMap::new(), not_before, open_at }
    }

    /// When it is worth seeing what there is: looking costs time as well, and a flood is looked at ten times a second.
    pub(super) fn open_at(&self) -> Instant {
        self.open_at
    }

    /// All that is seen of a user's processes. Of processes that are another user's nothing is told: what comes over a
    /// user's own socket may be made up.
    pub(super) fn see(&mut self, uid: u32, seen: Vec<(u32, Veto)>, now: Instant) {
        let user = self.users.entry(uid).or_default();
        if user.seen == seen && user.told.is_some() {
            return;
        }
        self.open_at = now + GAP;
        let pids: BTreeSet<u32> = seen.iter().map(|(pid, _)| *pid).collect();
        let own: BTreeSet<u32> = pids.into_iter().filter(|pid| belongs_to(*pid, uid)).collect();
        let wanted: BTreeSet<(u32, Veto)> = seen.iter().filter(|(pid, _)| own.contains(pid)).cloned().collect();
        user.wanted = wanted.into_iter().take(VETOES).collect();
        user.seen = seen;
    }

    /// All that is seen, of all users.
    pub(super) fn see_all(&mut self, mut seen: BTreeMap<u32, Vec<(u32, Veto)>>, now: Instant) {
        for uid in self.users.keys() {
            seen.entry(*uid).or_default();
        }
        for (uid, seen) in seen {
            self.see(uid, seen, now);
        }
    }

    /// When [`Teller::poll`] has something to tell.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.users.values().any(User::is_news).then_some(self.not_before)
    }

    /// Tells what is to be told by now.
    pub(super) fn poll(&mut self, now: Instant) {
        if self.poll_timeout().is_none_or(|at| at > now) {
            return;
        }
        self.not_before = now + GAP;
        for (uid, user) in self.users.iter_mut().filter(|(_, user)| user.is_news()) {
            let vetoes = user.wanted.clone();
            log::debug!("{} of user {uid}: {vetoes:?}", self.source);
            match self.inbox.try_send(Incoming::Sightings { source: self.source, uid: *uid, vetoes }) {
                // The latter means that the loop is gone, and this thread about to end.
                Ok(()) | Err(None) => user.told = Some(user.wanted.clone()),
                // Later, then.
                Err(Some(_)) => return,
            }
        }
    }
}

impl Teller {
    /// Waits until all is told.
    pub(super) async fn finish(&mut self, runtime: &SharedRuntime) {
        self.poll(clock::boot());
        while let Some(at) = self.poll_timeout() {
            runtime.sleep(at.since(clock::boot())).await;
            self.poll(clock::boot());
        }
    }
}

impl User {
    fn is_news(&self) -> bool {
        self.told.as_ref() != Some(&self.wanted)
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        for (uid, user) in std::mem::take(&mut self.users) {
            if user.told.is_some_and(|told| !told.is_empty()) {
                // Should there be no room: those processes were this user's, who is about to be gone as well.
                let _ = self.inbox.try_send(Incoming::Sightings { source: self.source, uid, vetoes: Vec::new() });
            }
        }
    }
}

/// A name out of somebody else's hands, for a sentence that is shown.
pub(super) fn clean(name: &str) -> String {
    name.chars().filter(|letter| !letter.is_control()).take(LONGEST_NAME).collect()
}

/// In characters; four bytes each at most, so that a sentence with two of them stays below 200 bytes in any language but
/// the rarest, for which [`sentence`] cuts it.
const LONGEST_NAME: usize = 48;

/// A veto's reason, cut to what it may be.
pub(super) fn sentence(mut text: String) -> std::sync::Arc<str> {
    text.truncate(text.floor_char_boundary(200));
    text.into()
}

/// Whether the process is this user's, or was never anybody else's to begin with.
fn belongs_to(pid: u32, uid: u32) -> bool {
    // The directory's owner would be root for a process that cannot be traced.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    real_uid(&status) == Some(uid)
}

/// The real uid of `/proc/PID/status`.
pub(super) fn real_uid(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use mio::{Poll, Token};

    use super::*;
    use crate::{
        model::VetoKind,
        sys::inbox::{self, Inbox},
    };

    fn teller() -> (Teller, Inbox, Poll, u32) {
        let poll = Poll::new().unwrap();
        let (sender, inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        (Teller::new("test", sender), inbox, poll, nix::unistd::getuid().as_raw())
    }

    fn veto(reason: &str) -> (u32, Veto) {
        (std::process::id(), Veto { kind: VetoKind::Playback, reason: reason.into() })
    }

    fn told(inbox: &mut Inbox) -> Option<Vec<(u32, Veto)>> {
        match inbox.take()? {
            Incoming::Sightings { source: "test", vetoes, .. } => Some(vetoes),
            other => panic!("{other:?}"),
        }
    }

    fn at(millis: u64) -> Instant {
        Instant::from_nanos(1_000_000_000 + millis * 1_000_000)
    }

    #[test]
    fn a_change_is_told_at_once_and_the_next_a_little_later() {
        let (mut teller, mut inbox, _poll, uid) = teller();
        assert_eq!(teller.poll_timeout(), None);
        teller.see(uid, vec![veto("one")], at(0));
        assert!(teller.poll_timeout().unwrap() <= at(0));
        teller.poll(at(0));
        assert_eq!(told(&mut inbox), Some(vec![veto("one")]));
        assert_eq!(teller.poll_timeout(), None);
        teller.see(uid, Vec::new(), at(0));
        assert_eq!(teller.poll_timeout(), Some(at(100)));
        teller.poll(at(99));
        assert_eq!(told(&mut inbox), None);
        // Back to what was told: nothing to tell.
        teller.see(uid, vec![veto("one")], at(0));
        assert_eq!(teller.poll_timeout(), None);
        teller.see(uid, vec![veto("two"), veto("one"), veto("two")], at(0));
        teller.poll(at(100));
        assert_eq!(told(&mut inbox), Some(vec![veto("one"), veto("two")]));
        drop(teller);
        assert_eq!(told(&mut inbox), Some(Vec::new()));
    }

    #[test]
    fn what_is_said_of_others_processes_is_not_told() {
        let (mut teller, mut inbox, _poll, uid) = teller();
        for (uid, seen) in [(uid + 1, veto("forged")), (uid, (u32::MAX, veto("nobody").1))] {
            teller.see(uid, vec![seen], at(0));
        }
        // That there is nothing is told once.
        teller.poll(at(0));
        assert_eq!((told(&mut inbox), told(&mut inbox)), (Some(Vec::new()), Some(Vec::new())));
        teller.see(uid, Vec::new(), at(0));
        assert_eq!(teller.poll_timeout(), None);
        drop(teller);
        assert_eq!(told(&mut inbox), None);
    }

    #[test]
    fn what_changes_all_the_time_is_looked_at_now_and_then() {
        let (mut teller, _inbox, _poll, uid) = teller();
        assert!(teller.open_at() <= at(0));
        teller.see(uid, vec![veto("one")], at(0));
        assert_eq!(teller.open_at(), at(100));
        teller.poll(at(0));
        // No change, no cost.
        teller.see(uid, vec![veto("one")], at(200));
        assert_eq!(teller.open_at(), at(100));
    }

    #[test]
    fn a_full_inbox_is_tried_again() {
        let (mut teller, mut inbox, _poll, uid) = teller();
        let mut turn = 0;
        while teller.poll_timeout().is_none() {
            teller.see(uid, vec![veto(&turn.to_string())], at(turn * 100));
            teller.poll(at(turn * 100));
            turn += 1;
            assert!(turn < 10_000);
        }
        let last = vec![veto(&(turn - 1).to_string())];
        while told(&mut inbox).is_some() {}
        teller.poll(at(turn * 100));
        assert_eq!(told(&mut inbox), Some(last));
    }

    #[test]
    fn reasons_are_short_and_plain() {
        assert_eq!(clean("a\nb\u{7}c"), "abc");
        assert_eq!(clean(&"x".repeat(500)).len(), LONGEST_NAME);
        assert_eq!(sentence("€".repeat(100)).len(), 198);
    }
}
