//! The registrations of a session: asked for, answered, made again and given up.

use std::sync::Arc;

use rand_chacha::rand_core::Rng;

use super::{
    DEAD_AT_ONCE, DEAD_LIMIT, ENDPOINT_LIMIT, Entry, FRESH_RETRY, Link, NAME_LIMIT, Online, REQUEST_TIMEOUT, Session,
    Step, WINDOW, wire::Outgoing,
};
use crate::{
    core::upstream::{
        Output,
        backoff::{BASE, CEILING, between},
    },
    model::{FailureReason, RegistrationId},
    time::Instant,
};

impl Session {
    pub(super) fn register_reply(&mut self, channel: &str, status: u16, endpoint: Option<String>, now: Instant) {
        let Some(registration) = self.names.get(channel).copied() else {
            // Answered after it was given up: it exists at the server, and nobody wants it.
            if status == 200 && channel.len() <= NAME_LIMIT {
                self.bury(channel.into());
            }
            return;
        };
        let Some(entry) = self.channels.get_mut(&registration) else {
            return;
        };
        if !matches!(entry.step, Step::Sent { .. }) {
            // A late answer to a request that is queued again is as good as any; one to a finished request is not asked
            // for: the endpoint it names works, and so does the one the app has.
            if entry.step == Step::Done || status != 200 {
                return;
            }
        }
        entry.refusal = (status != 200).then_some(status);
        let fault = match (status, endpoint) {
            (200, Some(endpoint)) if usable_endpoint(&endpoint) => {
                let channel = entry.channel.clone();
                entry.answer_by = None;
                entry.tries = 0;
                entry.step = Step::Done;
                self.open -= 1;
                self.backoff.succeeded();
                self.outputs.push_back(Output::Registered { registration, channel, endpoint: endpoint.into() });
                return;
            }
            (200, _) => Fault::Final("the server's register reply has no endpoint that can be used".into()),
            (400, _) if entry.vapid.is_some() => {
                Fault::Final("the server refused the registration (400): the app's VAPID key is bad".into())
            }
            (400, _) => Fault::Final("the server refused the registration (400)".into()),
            (status, _) => Fault::Passing(status),
        };
        let existed = entry.answer_by.is_none();
        match fault {
            Fault::Final(text) if !existed => {
                self.forget(registration);
                let reason = FailureReason::InternalError;
                self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
            }
            Fault::Final(text) if status == 400 => {
                self.forget(registration);
                self.outputs.push_back(Output::Lost { registration, text });
            }
            Fault::Final(text) => {
                self.quiet_frames.warn(text, now);
                self.requeue(registration, now);
            }
            Fault::Passing(status) => {
                log::info!("the server answered {status} to a registration; it is tried again");
                self.requeue(registration, now);
            }
        }
    }

    pub(super) fn send_requests(&mut self, now: Instant) {
        let Link::Online(Online { id: link, .. }) = self.link else {
            return;
        };
        if self.open == 0 {
            return;
        }
        let mut room = WINDOW.saturating_sub(self.in_flight());
        // Apps that wait come before registrations that are being made again.
        for fresh in [true, false] {
            for entry in self.channels.values_mut() {
                if room == 0 {
                    return;
                }
                match entry.step {
                    Step::Queued { not_before } if not_before <= now && entry.answer_by.is_some() == fresh => {}
                    Step::Queued { .. } | Step::Sent { .. } | Step::Done => continue,
                }
                room -= 1;
                entry.tries = entry.tries.saturating_add(1);
                entry.step = Step::Sent { deadline: now + REQUEST_TIMEOUT };
                let frame = Outgoing::Register { channel: &entry.channel, key: entry.vapid.as_deref() };
                self.outputs.push_back(Output::Send(link, frame.to_text()));
            }
        }
    }

    /// Ends what has taken too long: an app's wait, or a request that exists already.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.open == 0 {
            return;
        }
        let late = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let given_up: Vec<_> =
            self.channels.iter().filter(|(_, e)| late(e.answer_by)).map(|(registration, _)| *registration).collect();
        for registration in given_up {
            let Some(entry) = self.forget(registration) else {
                continue;
            };
            let (reason, text) = match (&self.trouble, entry.refusal) {
                (Some(trouble), _) => (FailureReason::ActionRequired, trouble.to_string()),
                (None, Some(status)) => {
                    (FailureReason::InternalError, format!("the server refused the registration ({status})"))
                }
                (None, None) => (FailureReason::Network, "the server did not make it in time".to_owned()),
            };
            if entry.tries > 0 {
                self.bury(entry.channel);
                // A server that answers nothing may be gone without a word.
                self.prove(now);
            }
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
        }
        let unanswered: Vec<_> = self
            .channels
            .iter()
            .filter(|(_, e)| matches!(e.step, Step::Sent { deadline } if deadline <= now))
            .map(|(registration, _)| *registration)
            .collect();
        if !unanswered.is_empty() {
            self.prove(now);
        }
        for registration in unanswered {
            self.requeue(registration, now);
        }
    }

    fn requeue(&mut self, registration: RegistrationId, now: Instant) {
        let Some(entry) = self.channels.get_mut(&registration) else {
            return;
        };
        let delay = match entry.answer_by {
            Some(_) => FRESH_RETRY,
            None => {
                let limit = CEILING.min(REQUEST_TIMEOUT * (1 << entry.tries.min(8)));
                between(BASE, limit, &mut self.rng)
            }
        };
        entry.step = Step::Queued { not_before: now + delay };
    }

    pub(super) fn fail_waiting(&mut self, reason: FailureReason, text: &str) {
        let waiting: Vec<_> = self
            .channels
            .iter()
            .filter(|(_, e)| e.answer_by.is_some())
            .map(|(registration, _)| *registration)
            .collect();
        for registration in waiting {
            self.forget(registration);
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text: text.to_owned() });
        }
    }

    pub(super) fn insert(&mut self, registration: RegistrationId, entry: Entry) {
        self.open += usize::from(entry.step != Step::Done);
        self.names.insert(entry.channel.clone(), registration);
        if let Some(old) = self.channels.insert(registration, entry) {
            self.open -= usize::from(old.step != Step::Done);
            self.names.remove(&old.channel);
        }
    }

    pub(super) fn forget(&mut self, registration: RegistrationId) -> Option<Entry> {
        let entry = self.channels.remove(&registration)?;
        self.names.remove(&entry.channel);
        self.open -= usize::from(entry.step != Step::Done);
        Some(entry)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.channels.values().filter(|entry| matches!(entry.step, Step::Sent { .. })).count()
    }

    /// The last of the old life's registrations is made: from now on they need not be made again.
    pub(super) fn finish_remaking(&mut self) {
        let unmade = |entry: &Entry| entry.answer_by.is_none() && entry.step != Step::Done;
        if self.remaking && !self.channels.values().any(unmade) {
            self.remaking = false;
            let value = self.uaid.as_deref().unwrap_or_default().to_owned();
            self.outputs.push_back(Output::RememberBehind { key: "uaid", value });
        }
    }

    /// A channel nobody wants any more: the server is told at the next occasion.
    pub(super) fn bury(&mut self, channel: Arc<str>) {
        if self.dead.contains(&channel) {
            return;
        }
        if self.dead.len() == DEAD_LIMIT {
            self.dead.pop_front();
        }
        self.dead.push_back(channel);
    }

    pub(super) fn bury_dead(&mut self) {
        let Link::Online(Online { id: link, .. }) = self.link else {
            return;
        };
        if !self.dead.is_empty() {
            // A message for a channel nobody knows is acknowledged before its channel goes.
            self.flush_acks();
        }
        for channel in self.dead.drain(..self.dead.len().min(DEAD_AT_ONCE)) {
            // 200: by the user (push.md §3a); the server counts the reasons and nothing else.
            let frame = Outgoing::Unregister { channel: &channel, code: 200 };
            self.outputs.push_back(Output::Send(link, frame.to_text()));
        }
    }

    /// A version 4 UUID, lower case with dashes: with any other writing the server closes the link.
    pub(super) fn new_name(&mut self) -> Arc<str> {
        let mut bytes = [0; 16];
        self.rng.fill_bytes(&mut bytes);
        uuid::Builder::from_random_bytes(bytes).into_uuid().hyphenated().to_string().into()
    }
}

enum Fault {
    /// Trying again would not help.
    Final(String),
    Passing(u16),
}

fn usable_endpoint(endpoint: &str) -> bool {
    endpoint.len() <= ENDPOINT_LIMIT && (endpoint.starts_with("https://") || endpoint.starts_with("http://"))
}
