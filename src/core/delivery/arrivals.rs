//! How a message comes in: duplicates, bounds, the store's word, attachments.

use std::sync::Arc;

use super::{
    Admission, Arrival, ArrivalBody, Delivery, FETCH_TRIES, INLINE_BUDGET, MESSAGE_MAX, Output, STORE_RETRY,
    UNSTORED_BUDGET, backoff,
    queue::{Body, Entry, Help},
};
use crate::{
    event::{FetchError, FetchTicket},
    model::{AppKey, Ending, MessageSeq},
    time::Now,
};

impl Delivery {
    /// A message came from an upstream.
    pub fn arrived(&mut self, arrival: Arrival, now: Now) -> Admission {
        let Some(lane) = self.lanes.get_mut(&arrival.registration) else {
            self.outputs.push_back(Output::Safe(arrival.registration, arrival.id));
            return Admission::Unusable;
        };
        if lane.queue.has_seen(&arrival.id) {
            self.outputs.push_back(Output::Safe(arrival.registration, arrival.id));
            return Admission::Duplicate;
        }
        if let Some(entry) = lane.queue.waiting_with_id(&arrival.id) {
            if entry.unsafe_count == 0 {
                self.outputs.push_back(Output::Safe(arrival.registration, arrival.id));
            } else {
                entry.unsafe_count += 1;
            }
            return Admission::Duplicate;
        }
        if let Some(problem) = unusable(&arrival.body) {
            let reason = format!("a message from its server was dropped: {problem}");
            self.outputs.push_back(Output::Note(lane.app.clone(), "drop", reason));
            lane.queue.see(&arrival.id);
            self.outputs.push_back(Output::Safe(arrival.registration, arrival.id));
            return Admission::Unusable;
        }
        if self.unstored_bytes >= UNSTORED_BUDGET && self.store_retry_at.is_some() {
            return Admission::NoRoom;
        }
        let app = lane.app.clone();
        self.admit(arrival, now);
        self.settle(&app, now);
        Admission::Queued
    }

    fn admit(&mut self, arrival: Arrival, now: Now) {
        let registration = arrival.registration;
        let Some(lane) = self.lanes.get_mut(&registration) else { return };
        let app = lane.app.clone();
        let in_flight = lane.has_message_in_flight();
        let mut held_until = now.boot + self.urgency.hold_at_most;
        if let Some(old) = arrival.topic.as_deref().and_then(|topic| lane.queue.waiting_with_topic(topic, in_flight)) {
            // Else a topic that changes often enough would be held for ever.
            held_until = lane.queue.entry(old).map_or(held_until, |old| old.held_until.min(held_until));
            self.end(old, Ending::Replaced);
        }
        self.make_room(&app, now);
        let seq = MessageSeq(self.next_seq);
        self.next_seq += 1;
        let body = match arrival.body {
            ArrivalBody::Bytes(bytes) => Body::Inline(bytes),
            ArrivalBody::Attachment { url, .. } => Body::Fetching { url, failures: 0, retry_at: Some(now.boot) },
            ArrivalBody::Undecodable(_) => return,
        };
        let entry = Entry {
            seq,
            id: arrival.id,
            body,
            received: now.wall,
            arrived: Some((now.boot, arrival.from)),
            expires: arrival.expires,
            urgency: arrival.urgency,
            by_policy: arrival.by_policy,
            held_until,
            topic: arrival.topic,
            persisted: false,
            unsafe_count: 1,
            attempts: 0,
            help: Help::Untried,
        };
        self.inline_bytes += entry.body.inline_len();
        self.unstored_bytes += entry.body.inline_len();
        self.waiting.insert(seq, registration);
        if let Some(message) = entry.message(registration) {
            self.outputs.push_back(Output::Persist(message));
        }
        let put_off = !self.fetching && matches!(entry.body, Body::Fetching { .. });
        if let Some(lane) = self.lanes.get_mut(&registration) {
            lane.queue.push(entry);
        }
        if put_off {
            let reason =
                "an attachment is not fetched while roaming; what comes after it for the same registration waits";
            self.outputs.push_back(Output::Note(app, "hold", reason.to_owned()));
        }
        self.start_fetches(now);
    }

    /// Makes room for one more message of the app: first what has expired goes, then the oldest.
    pub(super) fn make_room(&mut self, app: &AppKey, now: Now) {
        if self.waiting_for(app) < self.limits.messages_per_app {
            return;
        }
        self.sweep_app(app, now);
        if self.waiting_for(app) < self.limits.messages_per_app {
            return;
        }
        // More than one too many when a crash took back the word that some had ended.
        while self.waiting_for(app) >= self.limits.messages_per_app {
            let lanes = self.apps.get(app).map(|app| app.lanes.as_slice()).unwrap_or_default();
            let oldest = lanes
                .iter()
                .filter_map(|id| self.lanes.get(id))
                .filter_map(|lane| lane.queue.oldest_droppable(lane.has_message_in_flight()))
                .min();
            let Some(seq) = oldest else { return };
            self.end(seq, Ending::Overflowed);
            let reason = format!(
                "{} messages were waiting for it, which is the most that are kept: the oldest was dropped",
                self.limits.messages_per_app
            );
            self.outputs.push_back(Output::Note(app.clone(), "drop", reason));
        }
    }

    /// The store has the message, or would not take it.
    pub fn stored(&mut self, seq: MessageSeq, ok: bool, now: Now) {
        if ok && self.store_retry_at.take().is_some() {
            self.persist_again();
        }
        let Some((registration, entry)) = self.entry_mut(seq) else { return };
        if !ok {
            self.store_retry_at = Some(now.boot + STORE_RETRY);
            return;
        }
        if entry.persisted {
            return;
        }
        entry.persisted = true;
        let id = Arc::clone(&entry.id);
        let count = std::mem::take(&mut entry.unsafe_count);
        let len = entry.body.inline_len();
        self.unstored_bytes -= len;
        for _ in 0..count {
            self.outputs.push_back(Output::Safe(registration, Arc::clone(&id)));
        }
        if self.inline_bytes > INLINE_BUDGET
            && let Some((_, entry)) = self.entry_mut(seq)
            && matches!(entry.body, Body::Inline(_))
        {
            entry.body = Body::Stored;
            self.inline_bytes -= len;
        }
    }

    /// Whether the store refused and messages are held in memory.
    pub fn store_is_failing(&self) -> bool {
        self.store_retry_at.is_some()
    }

    /// A body asked for; `None` when the store does not have it.
    pub fn body(&mut self, seq: MessageSeq, body: Option<Arc<[u8]>>, now: Now) {
        let Some((registration, entry)) = self.entry_mut(seq) else { return };
        if entry.body != Body::Loading {
            return;
        }
        match body {
            Some(bytes) => {
                let len = bytes.len();
                entry.body = Body::Inline(bytes);
                self.inline_bytes += len;
            }
            None => self.give_up(seq, "its text could not be read back from the disk"),
        }
        self.settle_lane(registration, now);
    }

    /// An attachment asked for.
    pub fn fetched(&mut self, ticket: FetchTicket, result: Result<Arc<[u8]>, FetchError>, now: Now) {
        let Some(seq) = self.fetches.remove(&ticket) else { return };
        let Some((registration, entry)) = self.entry_mut(seq) else { return };
        let Body::Fetching { failures, retry_at, .. } = &mut entry.body else { return };
        let problem = match result {
            Ok(bytes) if (1..=MESSAGE_MAX).contains(&bytes.len()) => {
                let len = bytes.len();
                entry.body = Body::Inline(bytes);
                let message = entry.message(registration);
                self.inline_bytes += len;
                self.unstored_bytes += len;
                self.outputs.extend(message.map(Output::Persist));
                self.settle_lane(registration, now);
                return;
            }
            Ok(bytes) => format!("its attachment has {} bytes; 1 to {MESSAGE_MAX} are possible", bytes.len()),
            Err(FetchError::Failed(_)) if *failures + 1 < FETCH_TRIES => {
                *failures += 1;
                *retry_at = Some(now.boot + backoff(*failures + 1));
                return;
            }
            Err(error) => format!("its attachment could not be had: {error}"),
        };
        self.give_up(seq, &problem);
        self.settle_lane(registration, now);
    }

    /// Ends every message whose TTL has passed. Worth calling now and then; no timer is kept for it, because nobody waits
    /// for it.
    pub fn sweep(&mut self, now: Now) {
        let apps: Vec<AppKey> = self.apps.keys().cloned().collect();
        for app in apps {
            self.sweep_app(&app, now);
        }
    }

    pub(super) fn sweep_app(&mut self, app: &AppKey, now: Now) {
        let lanes = self.apps.get(app).map(|app| app.lanes.clone()).unwrap_or_default();
        for id in lanes {
            let expired = self
                .lanes
                .get(&id)
                .map(|lane| lane.queue.expired(now.wall, lane.has_message_in_flight()))
                .unwrap_or_default();
            for seq in expired {
                self.end(seq, Ending::Expired);
            }
        }
        self.settle(app, now);
    }

    pub(super) fn start_fetches(&mut self, now: Now) {
        for (registration, lane) in &mut self.lanes {
            for entry in lane.queue.iter_mut() {
                let Body::Fetching { url, retry_at, .. } = &mut entry.body else { continue };
                let allowed = self.fetching || entry.held_until <= now.boot;
                if allowed && retry_at.take_if(|at| *at <= now.boot).is_some() {
                    let ticket = FetchTicket(self.next_ticket);
                    self.next_ticket += 1;
                    self.fetches.insert(ticket, entry.seq);
                    self.outputs.push_back(Output::Fetch { ticket, registration: *registration, url: url.clone() });
                }
            }
        }
    }

    pub(super) fn persist_again(&mut self) {
        for (registration, lane) in &self.lanes {
            let unstored = lane.queue.iter().filter(|entry| !entry.persisted);
            self.outputs.extend(unstored.filter_map(|entry| entry.message(*registration)).map(Output::Persist));
        }
    }
}

fn unusable(body: &ArrivalBody) -> Option<String> {
    match body {
        ArrivalBody::Bytes(bytes) if bytes.is_empty() => Some("it is empty".into()),
        ArrivalBody::Bytes(bytes) if bytes.len() > MESSAGE_MAX => {
            Some(format!("it has {} bytes, {MESSAGE_MAX} are the most", bytes.len()))
        }
        ArrivalBody::Attachment { size: Some(size), .. } if *size > MESSAGE_MAX as u64 => {
            Some(format!("its attachment has {size} bytes, {MESSAGE_MAX} are the most"))
        }
        ArrivalBody::Undecodable(why) => Some(why.clone()),
        ArrivalBody::Bytes(_) | ArrivalBody::Attachment { .. } => None,
    }
}
