//! The registrations of a session and their topics.

use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use rand_chacha::rand_core::Rng;

use super::{Entry, SHORT_TOPIC_BYTES, Session, TOPIC_BYTES};
use crate::{
    core::upstream::Output,
    model::{FailureReason, RegistrationId},
    time::Instant,
};

impl Session {
    /// Ends the wait of apps whose time is up.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.pending == 0 {
            return;
        }
        let late: Vec<_> = self
            .topics
            .iter()
            .filter(|(_, entry)| entry.answer_by.is_some_and(|by| by <= now))
            .map(|(registration, _)| *registration)
            .collect();
        for registration in late {
            self.forget(registration);
            let (reason, text) = match &self.trouble {
                Some(trouble) => (FailureReason::ActionRequired, trouble.to_string()),
                None => (FailureReason::Network, "the server did not subscribe it in time".to_owned()),
            };
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
        }
    }

    /// Nobody need wait for a registration any more.
    pub(super) fn fail_waiting(&mut self, reason: FailureReason, text: &str) {
        let waiting: Vec<_> =
            self.topics.iter().filter(|(_, e)| e.answer_by.is_some()).map(|(registration, _)| *registration).collect();
        for registration in waiting {
            self.forget(registration);
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text: text.to_owned() });
        }
    }

    pub(super) fn insert(&mut self, registration: RegistrationId, entry: Entry) {
        self.pending += usize::from(!entry.told);
        self.names.insert(entry.topic.clone(), registration);
        if let Some(old) = self.topics.insert(registration, entry) {
            self.pending -= usize::from(!old.told);
            self.names.remove(&old.topic);
        }
    }

    pub(super) fn forget(&mut self, registration: RegistrationId) -> Option<Entry> {
        let entry = self.topics.remove(&registration)?;
        self.names.remove(&entry.topic);
        self.pending -= usize::from(!entry.told);
        Some(entry)
    }

    pub(super) fn endpoint(&self, topic: &str) -> String {
        format!("{}{topic}?up=1", self.base)
    }

    pub(super) fn new_topic(&mut self) -> Arc<str> {
        let length = match self.short_topics {
            true => SHORT_TOPIC_BYTES,
            false => TOPIC_BYTES,
        };
        let mut bytes = [0; TOPIC_BYTES];
        self.rng.fill_bytes(&mut bytes);
        format!("up{}", BASE64_URL_SAFE_NO_PAD.encode(&bytes[..length])).into()
    }
}
