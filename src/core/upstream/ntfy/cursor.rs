//! Up to where everything is safe, in terms ntfy understands.
//!
//! ntfy has no acknowledgement: the id given as `since` at the next connect is the only word a client has, and the
//! server answers with what it stored *after* that id. An id may therefore be given only when everything stored before
//! it has come and is safe. Neither the order of arrival nor an empty list of unsafe messages shows that, because
//! (ntfy 2.11, measured with its own server):
//!
//! - live messages are sent while the stored ones are still being replayed, often as the very first frame, and nothing
//!   marks the end of the replay;
//! - a replay over several topics is sorted by the second, in no order within it: 482 of 2000 messages came displaced;
//! - live messages of parallel senders overtake one another by up to 140 places;
//! - a message is sent to the subscribers of the moment *before* it is stored. One that was sent just before a link
//!   subscribed and stored just after the link's replay was read comes over neither: a **gap** at the link's beginning.
//!   Under load every second link had one, and what was in it had been sent up to 3.7 s before.
//!
//! So an id becomes the cursor in two steps. [`Watermark`] says when nothing stored before an id can still be on its
//! way; that is a checkpoint. [`Tracker`] then waits until all that had arrived by then is safe. The cursor lags a
//! little: after a crash up to some 90 s of messages come again and are known by their ids.
//!
//! **The invariant:** everything stored before the cursor has come and is safe. Gaps do not break it, because what is in
//! a link's gap is stored after all that the link replays, and only replayed messages become checkpoints while there is
//! a gap ([`Watermark::gap`]). It is closed by another link, asked for when what was on its way is stored ([`STORING`]),
//! which replays it: the cursor has not moved past it. That link has no gap itself, because the first one was subscribed
//! before it and is proved to have been alive until after ([`Watermark::overlapped`]).

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use crate::{model::RegistrationId, time::Instant};

/// Ids of safe messages remembered at most, so that a replay does not bother the core with them. It has to be well above
/// what may be unsafe at a time: a backlog longer than that comes in several goes, each from the same cursor.
const RECENT: usize = 32_768;
/// Of those, ids that arrived this long before the cursor are forgotten: nothing displaces a message that far.
const DISPLACED: u64 = 1024;
/// Checkpoints waiting for their messages; when there are more the newest are joined.
const CHECKPOINTS: usize = 64;
/// How much later than an id a message must have been sent, in the server's seconds, to show that nothing stored before
/// that id is missing: the longest that storing a message of 4096 bytes may take the server.
const SLACK: u64 = 30;
/// The longest from sending a message to the subscribers to storing it: ntfy waits 5 s for SQLite's lock and then tells the
/// sender that it failed. Where the operator has it stored in batches, `cache-batch-timeout` comes on top, up to 1 s here.
pub(super) const STORING: Duration = Duration::from_secs(6);
/// A message this much older than the link is a replayed one, whatever the sender's upload took.
const SURELY_OLD: u64 = 120;
/// A message this little younger than the link may belong to the replay.
const MAYBE_OLD: u64 = 5;
/// Server pings closer together than this count as one mark.
const MARK_SPACING: Duration = Duration::from_secs(10);

/// What has arrived, what of it is safe, and the cursor that follows.
#[derive(Debug)]
pub(super) struct Tracker {
    cursor: Option<Arc<str>>,
    moved: bool,
    arrivals: u64,
    /// Place in the order of arrival, and whose it is.
    waiting: HashMap<Arc<str>, (u64, Option<RegistrationId>)>,
    order: BTreeSet<u64>,
    checkpoints: VecDeque<(u64, Arc<str>)>,
    /// Arrivals at the last checkpoint passed: its successor's id is about as old as that.
    passed: u64,
    recent: VecDeque<(u64, Arc<str>)>,
    recent_set: HashSet<Arc<str>>,
}

/// What is known of an id that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// Nothing.
    New,
    /// It came before and is not safe yet.
    Waiting,
    /// It is safe.
    Safe,
}

impl Tracker {
    pub(super) fn new(cursor: Option<Arc<str>>) -> Self {
        Self {
            cursor,
            moved: false,
            arrivals: 0,
            waiting: HashMap::new(),
            order: BTreeSet::new(),
            checkpoints: VecDeque::new(),
            passed: 0,
            recent: VecDeque::new(),
            recent_set: HashSet::new(),
        }
    }

    /// What to give as `since`; `None` before there is one.
    pub(super) fn cursor(&self) -> Option<&Arc<str>> {
        self.cursor.as_ref()
    }

    /// The cursor, when it has moved since the last call.
    pub(super) fn take_moved(&mut self) -> Option<Arc<str>> {
        std::mem::take(&mut self.moved).then(|| self.cursor.clone()).flatten()
    }

    /// Messages not safe yet.
    pub(super) fn unsafe_count(&self) -> usize {
        self.waiting.len()
    }

    /// What is known of this id.
    pub(super) fn look_up(&self, id: &str) -> Arrival {
        if self.waiting.contains_key(id) {
            Arrival::Waiting
        } else if self.recent_set.contains(id) {
            Arrival::Safe
        } else {
            Arrival::New
        }
    }

    /// A message not known before has arrived.
    pub(super) fn arrive(&mut self, id: &Arc<str>, whose: Option<RegistrationId>) {
        self.waiting.insert(id.clone(), (self.arrivals, whose));
        self.order.insert(self.arrivals);
        self.arrivals += 1;
    }

    /// The message is safe; an id that is not waiting changes nothing.
    pub(super) fn safe(&mut self, id: &str) {
        let Some((id, (arrival, _))) = self.waiting.remove_entry(id) else {
            return;
        };
        self.order.remove(&arrival);
        if self.recent_set.insert(id.clone()) {
            self.recent.push_back((arrival, id));
        }
        if self.recent.len() > RECENT
            && let Some((_, oldest)) = self.recent.pop_front()
        {
            self.recent_set.remove(&oldest);
        }
        self.advance();
    }

    /// Nobody wants this registration's messages any more.
    pub(super) fn abandon(&mut self, registration: RegistrationId) {
        let theirs = |(_, whose): &(u64, Option<RegistrationId>)| *whose == Some(registration);
        let ids: Vec<_> = self.waiting.iter().filter(|(_, at)| theirs(at)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.safe(&id);
        }
    }

    /// `id` may be the cursor as soon as all that has arrived so far is safe.
    pub(super) fn checkpoint(&mut self, id: Arc<str>) {
        if self.checkpoints.len() == CHECKPOINTS {
            self.checkpoints.pop_back();
        }
        self.checkpoints.push_back((self.arrivals, id));
        self.advance();
    }

    fn advance(&mut self) {
        let safe_below = self.order.first().copied().unwrap_or(self.arrivals);
        while let Some((arrivals, id)) = self.checkpoints.pop_front_if(|(arrivals, _)| *arrivals <= safe_below) {
            let old = std::mem::replace(&mut self.passed, arrivals).saturating_sub(DISPLACED);
            while let Some((_, id)) = self.recent.pop_front_if(|(arrival, _)| *arrival < old) {
                self.recent_set.remove(&id);
            }
            if self.cursor.as_ref() != Some(&id) {
                self.cursor = Some(id);
                self.moved = true;
            }
        }
    }
}

/// Watches one link for the moments when nothing stored before some id can still be on its way.
///
/// - While stored messages are replayed they come sorted by time. One that is [`SLACK`] younger than an id shows that
///   everything stored before that id has come.
/// - The server pings every 45 s from beside the replay, through the same first-come lock. Two pings with no old
///   message between them: the replay is over. From then on a message [`SLACK`] younger than an id shows the same, and
///   so does a ping that follows the ping that followed the id.
/// - Attachments are left out: their upload takes minutes, and their time is when it began.
/// - As long as there is a gap all this holds for replayed messages only.
#[derive(Debug, Default)]
pub(super) struct Watermark {
    opened: Option<u64>,
    gap: Option<Instant>,
    replayed: bool,
    old_since_mark: bool,
    mark: Option<Instant>,
    by_time: Option<(Arc<str>, u64)>,
    before_mark: Option<Arc<str>>,
    last: Option<Arc<str>>,
}

impl Watermark {
    /// The server's `open` event, with its time in seconds; `gap` when something may have been on its way meanwhile.
    pub(super) fn open(&mut self, time: Option<u64>, gap: Option<Instant>) {
        self.opened = time;
        self.gap = gap;
    }

    /// Messages sent before this moment may be missing, unless they are replayed by a link asked for [`STORING`] later.
    pub(super) fn gap(&self) -> Option<Instant> {
        self.gap
    }

    /// This link was asked for at `asked` and all that `before` was to bring when this one subscribed has come.
    pub(super) fn overlapped(&mut self, before: &Self, asked: Instant) {
        self.gap = before.gap.filter(|gap| asked < *gap + STORING);
    }

    /// A message of this time came: closing the gap by another replay has to wait until this one is over.
    pub(super) fn put_off(&mut self, time: u64, now: Instant) {
        if self.gap.is_some() && self.opened.is_some_and(|opened| time.saturating_add(SURELY_OLD) <= opened) {
            self.gap = Some(now);
        }
    }

    /// A message came. Returns an id to make a checkpoint of.
    pub(super) fn message(&mut self, id: &Arc<str>, time: u64, attachment: bool) -> Option<Arc<str>> {
        // A message ahead of `open` says nothing about the replay, which has not begun.
        let opened = self.opened?;
        self.old_since_mark |= time <= opened.saturating_add(MAYBE_OLD);
        if attachment {
            return None;
        }
        self.last = Some(id.clone());
        if (!self.replayed || self.gap.is_some()) && time.saturating_add(SURELY_OLD) > opened {
            return None;
        }
        match &self.by_time {
            Some((_, at)) if time < at.saturating_add(SLACK) => None,
            _ => self.by_time.replace((id.clone(), time)).map(|(id, _)| id),
        }
    }

    /// The server pinged. Returns an id to make a checkpoint of.
    pub(super) fn ping(&mut self, now: Instant) -> Option<Arc<str>> {
        if self.opened.is_none() || self.mark.is_some_and(|mark| now.since(mark) < MARK_SPACING) {
            return None;
        }
        let first = self.mark.replace(now).is_none();
        let quiet = !std::mem::take(&mut self.old_since_mark);
        self.replayed |= quiet && !first;
        if !self.replayed || self.gap.is_some() {
            return None;
        }
        std::mem::replace(&mut self.before_mark, self.last.take())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: u64) -> Arc<str> {
        format!("m{n:011}").into()
    }

    fn at(secs: u64) -> Instant {
        Instant::from_nanos(secs * 1_000_000_000)
    }

    #[test]
    fn the_cursor_waits_for_every_message_before_it() {
        let mut tracker = Tracker::new(None);
        for n in 0..3 {
            tracker.arrive(&id(n), None);
        }
        tracker.checkpoint(id(1));
        tracker.safe(&id(1));
        tracker.safe(&id(2));
        assert_eq!(tracker.take_moved(), None);
        tracker.safe(&id(0));
        assert_eq!(tracker.take_moved(), Some(id(1)));
        assert_eq!(tracker.take_moved(), None);
    }

    #[test]
    fn a_link_has_replayed_when_a_whole_ping_interval_brought_nothing_old() {
        let mut mark = Watermark::default();
        mark.open(Some(1000), None);
        assert_eq!(mark.message(&id(1), 990, false), None);
        assert_eq!(mark.ping(at(45)), None);
        assert_eq!(mark.message(&id(2), 1000, false), None, "still replaying");
        assert_eq!(mark.ping(at(90)), None);
        assert_eq!(mark.message(&id(3), 1100, false), None, "live");
        assert_eq!(mark.ping(at(135)), None, "replayed; what came before this ping is settled at the next");
        assert_eq!(mark.ping(at(180)), Some(id(3)));
        assert_eq!(mark.ping(at(225)), None);
    }

    #[test]
    fn with_a_gap_only_replayed_messages_make_checkpoints() {
        let mut mark = Watermark::default();
        mark.open(Some(1000), Some(at(1)));
        assert_eq!(mark.message(&id(1), 700, false), None);
        assert_eq!(mark.message(&id(2), 800, false), Some(id(1)));
        for n in 1..10 {
            assert_eq!(mark.message(&id(2 + n), 1000 + 60 * n, false), None);
            assert_eq!(mark.ping(at(60 * n)), None);
        }
        let mut before = Watermark::default();
        before.open(Some(990), Some(at(0)));
        mark.overlapped(&before, at(5));
        assert_eq!(mark.gap(), Some(at(0)), "asked for too early to have what was about to be stored");
        mark.overlapped(&before, at(6));
        assert_eq!(mark.gap(), None);
        assert_eq!(mark.message(&id(12), 2000, false), Some(id(2)));
        assert_eq!(mark.message(&id(13), 2060, false), Some(id(12)));
    }

    #[test]
    fn a_live_message_during_the_replay_is_no_checkpoint() {
        let mut mark = Watermark::default();
        assert_eq!(mark.message(&id(1), 1000, false), None, "ahead of open");
        mark.open(Some(1000), None);
        for n in 2..100 {
            assert_eq!(mark.message(&id(n), 1000 + 40 * n, false), None);
        }
    }

    #[test]
    fn a_long_replay_makes_checkpoints_by_its_own_times() {
        let mut mark = Watermark::default();
        mark.open(Some(10_000), None);
        assert_eq!(mark.message(&id(1), 5000, false), None);
        assert_eq!(mark.message(&id(2), 5029, false), None, "too close to tell");
        assert_eq!(mark.message(&id(3), 5030, true), None, "attachments tell nothing");
        assert_eq!(mark.message(&id(4), 5030, false), Some(id(1)));
        assert_eq!(mark.message(&id(5), 9990, false), None, "perhaps live");
    }

    /// A server as ntfy 2.11 is: rows in order of storing, seconds that lag behind it a little, a replay sorted by
    /// second with ties backwards, live messages anywhere in it.
    #[derive(Clone, Debug)]
    enum Step {
        Publish { took: u64 },
        Seconds(u64),
        Deliver(usize),
        DeliverLive,
        Safe(usize),
        Ping,
        Reconnect,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0_u64..20).prop_map(|took| Step::Publish { took }),
            2 => (1_u64..200).prop_map(Step::Seconds),
            6 => (1_usize..6).prop_map(Step::Deliver),
            2 => Just(Step::DeliverLive),
            8 => any::<usize>().prop_map(Step::Safe),
            2 => Just(Step::Ping),
            1 => Just(Step::Reconnect),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn nothing_stored_before_the_cursor_is_ever_unsafe(steps in prop::collection::vec(step(), 1..250)) {
            let mut rows: Vec<(u64, Arc<str>)> = Vec::new();
            let (mut replay, mut live) = (VecDeque::new(), VecDeque::new());
            let mut live_since = VecDeque::new();
            let mut clock = 1_000_u64;
            let (mut tracker, mut mark) = (Tracker::new(None), Watermark::default());
            mark.open(Some(clock), None);
            let mut safe: HashSet<Arc<str>> = HashSet::new();
            let mut unsafe_ids: Vec<Arc<str>> = Vec::new();
            for step in steps {
                let mut arrived = Vec::new();
                match step {
                    Step::Publish { took } => {
                        let row = (clock.saturating_sub(took), id(rows.len() as u64));
                        rows.push(row.clone());
                        // Concurrent senders overtake each other, but nobody overtakes one who has stood in line.
                        let mut place = live.len();
                        while place > live.len().saturating_sub(took as usize % 3)
                            && clock - live_since[place - 1] < 5
                        {
                            place -= 1;
                        }
                        live.insert(place, row);
                        live_since.insert(place, clock);
                    }
                    Step::Seconds(secs) => clock += secs,
                    Step::Deliver(n) => for _ in 0..n {
                        arrived.extend(replay.pop_front().or_else(|| live.pop_front()));
                    },
                    Step::DeliverLive => arrived.extend(live.pop_front()),
                    Step::Safe(n) if !unsafe_ids.is_empty() => {
                        let id = unsafe_ids.swap_remove(n % unsafe_ids.len());
                        tracker.safe(&id);
                        safe.insert(id);
                    }
                    Step::Safe(_) => {}
                    Step::Ping => {
                        // The server's writers take turns: with a replay under way its frames come before a ping. What
                        // is live is written within the interval.
                        clock += 45;
                        arrived.extend(replay.drain(..replay.len().min(3)));
                        arrived.extend(live.drain(..));
                    }
                    Step::Reconnect => {
                        mark = Watermark::default();
                        mark.open(Some(clock), None);
                        let after = tracker.cursor().and_then(|c| rows.iter().position(|(_, id)| id == c));
                        let mut stored: Vec<_> = rows.iter().skip(after.map_or(0, |n| n + 1)).cloned().collect();
                        stored.reverse();
                        stored.sort_by_key(|(time, _)| *time);
                        (replay, live) = (stored.into(), VecDeque::new());
                        live_since.clear();
                    }
                }
                live_since.drain(..live_since.len() - live.len());
                for (time, id) in arrived {
                    if tracker.look_up(&id) == Arrival::New && !safe.contains(&id) {
                        tracker.arrive(&id, None);
                        unsafe_ids.push(id.clone());
                    }
                    if let Some(id) = mark.message(&id, time, false) {
                        tracker.checkpoint(id);
                    }
                }
                if matches!(step, Step::Ping) && let Some(id) = mark.ping(at(clock)) {
                    tracker.checkpoint(id);
                }
                if let Some(cursor) = tracker.cursor() {
                    for (_, row) in rows.iter().take_while(|(_, id)| id != cursor) {
                        prop_assert!(safe.contains(row), "{row} is stored before the cursor {cursor} and not safe");
                    }
                    prop_assert!(safe.contains(cursor));
                }
            }
        }
    }
}
