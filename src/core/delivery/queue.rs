//! One registration's queue: order, duplicates, Topic, TTL. Knows nothing of apps, calls or retries' timing.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use crate::{
    model::{MessageSeq, StoredMessage, Urgency},
    time::{Instant, UnixTime},
};

/// Ids of ended messages remembered for duplicates. Firefox keeps 100 per subscription; ntfy's cursor lags up to 90 s
/// behind, and what came since then comes again after a restart.
pub(super) const SEEN: usize = 1000;

/// Waiting messages in order of arrival, and the ids of those that ended.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: VecDeque<Entry>,
    seen: VecDeque<u64>,
}

/// One waiting message.
#[derive(Debug)]
pub(super) struct Entry {
    /// Our number.
    pub(super) seq: MessageSeq,
    /// The upstream's id.
    pub(super) id: Arc<str>,
    /// Where its bytes are.
    pub(super) body: Body,
    /// When it arrived here.
    pub(super) received: UnixTime,
    /// Since when its app may have it, and what that was doing when it came; none: it came in an earlier life.
    pub(super) arrived: Option<(Instant, &'static str)>,
    /// When it is of no use any more.
    pub(super) expires: UnixTime,
    /// RFC 8030 §5.3.
    pub(super) urgency: Urgency,
    /// The urgency is what the app's messages count as, because its upstream's protocol says none.
    pub(super) by_policy: bool,
    /// From then on it wakes its app whatever its urgency is.
    pub(super) held_until: Instant,
    /// Replaces a waiting message with the same topic.
    pub(super) topic: Option<Arc<str>>,
    /// Durable in the store.
    pub(super) persisted: bool,
    /// How many times the upstream waits to hear that it is safe; zero once told.
    pub(super) unsafe_count: u32,
    /// Tries that failed.
    pub(super) attempts: u32,
    /// Whether its app's payload helper has had it, where the app has one.
    pub(super) help: Help,
}

/// What an app's payload helper has to do with a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Help {
    /// Nothing yet.
    #[default]
    Untried,
    /// It has it.
    Asked,
    /// The user knows of the message.
    Spoken,
    /// The message is for the app itself.
    Declined,
}

/// Where a message's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// Here.
    Inline(Arc<[u8]>),
    /// In the store only.
    Stored,
    /// In the store, asked for.
    Loading,
    /// An attachment on its way.
    Fetching {
        /// Where it is.
        url: String,
        /// Tries that failed.
        failures: u32,
        /// When to try again; none while a download runs.
        retry_at: Option<Instant>,
    },
}

impl Body {
    /// Bytes held in memory.
    pub(super) fn inline_len(&self) -> usize {
        match self {
            Self::Inline(bytes) => bytes.len(),
            Self::Stored | Self::Loading | Self::Fetching { .. } => 0,
        }
    }
}

impl Queue {
    pub(super) fn restore(&mut self, stored: StoredMessage, held_until: Instant) {
        self.entries.push_back(Entry {
            seq: stored.seq,
            id: stored.id,
            body: Body::Stored,
            received: stored.received,
            arrived: None,
            expires: stored.expires,
            urgency: stored.urgency,
            by_policy: false,
            held_until,
            topic: stored.topic,
            persisted: true,
            unsafe_count: 0,
            attempts: 0,
            help: Help::Untried,
        });
    }

    pub(super) fn push(&mut self, entry: Entry) {
        self.entries.push_back(entry);
    }

    /// Whether a message with this id ended before.
    pub(super) fn has_seen(&self, id: &str) -> bool {
        let hash = hash(id);
        self.seen.iter().any(|&seen| seen == hash)
    }

    /// Remembers an id for duplicates.
    pub(super) fn see(&mut self, id: &str) {
        if self.seen.len() == SEEN {
            self.seen.pop_front();
        }
        self.seen.push_back(hash(id));
    }

    pub(super) fn waiting_with_id(&mut self, id: &str) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| &*entry.id == id)
    }

    /// The waiting message a new one with this topic replaces; never the first while it is `in_flight`.
    pub(super) fn waiting_with_topic(&self, topic: &str, in_flight: bool) -> Option<MessageSeq> {
        self.entries
            .iter()
            .skip(usize::from(in_flight))
            .find(|entry| entry.topic.as_deref() == Some(topic))
            .map(|entry| entry.seq)
    }

    pub(super) fn entry(&mut self, seq: MessageSeq) -> Option<&mut Entry> {
        // Numbers grow along the queue.
        let index = self.entries.binary_search_by_key(&seq, |entry| entry.seq).ok()?;
        self.entries.get_mut(index)
    }

    /// Takes a message out for good and remembers its id.
    pub(super) fn remove(&mut self, seq: MessageSeq) -> Option<Entry> {
        let index = self.entries.binary_search_by_key(&seq, |entry| entry.seq).ok()?;
        let entry = self.entries.remove(index)?;
        self.see(&entry.id);
        if self.entries.is_empty() {
            self.entries.shrink_to_fit();
        }
        Some(entry)
    }

    pub(super) fn first(&self) -> Option<&Entry> {
        self.entries.front()
    }

    pub(super) fn first_mut(&mut self) -> Option<&mut Entry> {
        self.entries.front_mut()
    }

    /// The oldest message that may be dropped: not the first while it is `in_flight`.
    pub(super) fn oldest_droppable(&self, in_flight: bool) -> Option<MessageSeq> {
        self.entries.get(usize::from(in_flight)).map(|entry| entry.seq)
    }

    /// Messages whose TTL has passed; not the first while it is `in_flight`.
    pub(super) fn expired(&self, now: UnixTime, in_flight: bool) -> Vec<MessageSeq> {
        let late = |entry: &&Entry| entry.expires <= now;
        self.entries.iter().skip(usize::from(in_flight)).filter(late).map(|entry| entry.seq).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.entries.iter_mut()
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// 64 bits are kept of an id, 8 KiB for a registration with the most ids. Never stored: the hash may
/// change with the compiler.
fn hash(id: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    hasher.finish()
}
