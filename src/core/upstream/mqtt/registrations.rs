//! The registrations of a session: subscribed, answered, subscribed again and given up.

use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use rand_chacha::rand_core::Rng;

use super::{
    DEAD_LIMIT, ENDPOINT_LIMIT, Entry, FRESH_RETRY, Link, Online, REQUEST_TIMEOUT, Request, Session, Step, TOPIC_BYTES,
    TOPICS_PER_REQUEST, WINDOW, wire,
};
use crate::{
    config::MqttVersion,
    core::upstream::{
        Output,
        backoff::{BASE, CEILING, between},
    },
    model::{FailureReason, RegistrationId},
    time::{Instant, Now},
};

impl Session {
    /// The broker answered a SUBSCRIBE.
    pub(super) fn subscribed(&mut self, packet: u16, codes: &[u8], now: Instant) -> Result<(), wire::Broken> {
        let Some(request) = self.requests.remove(&packet) else {
            // Answered too late; it was asked for again.
            return Ok(());
        };
        if codes.len() != request.topics.len() {
            return Err(wire::Broken("an answer to SUBSCRIBE has not as many codes as topics were asked for"));
        }
        for ((registration, topic), code) in request.topics.into_iter().zip(codes) {
            let entry = registration.and_then(|registration| self.entries.get_mut(&registration));
            let Some((entry, registration)) = entry.filter(|entry| entry.topic == topic).zip(registration) else {
                // Given up meanwhile, and to be unsubscribed behind this.
                continue;
            };
            if entry.step == Step::Done {
                continue;
            }
            match code {
                0..=2 => {
                    if *code == 0 {
                        let what = "the broker subscribed with QoS 0: messages sent while this device is away are lost";
                        self.quiet_refused.warn(what, now);
                    }
                    entry.answer_by = None;
                    entry.refusal = None;
                    entry.tries = 0;
                    entry.step = Step::Done;
                    self.open -= 1;
                    if !std::mem::replace(&mut entry.told, true) {
                        let (channel, endpoint) = (Arc::clone(&entry.topic), Arc::clone(&entry.endpoint));
                        self.outputs.push_back(Output::Registered { registration, channel, endpoint });
                    }
                }
                code => {
                    entry.refusal = Some(*code);
                    let lasting = matches!(code, 0x80 | 0x87 | 0x8f | 0x97);
                    if lasting && entry.answer_by.is_some() {
                        self.forget(registration);
                        let (reason, text) = self.refusal(*code);
                        self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
                    } else {
                        let text = self.refusal(*code).1;
                        self.quiet_refused.warn(format_args!("{text}; tried again"), now);
                        self.requeue(registration, now);
                    }
                }
            }
        }
        Ok(())
    }

    /// The broker answered an UNSUBSCRIBE, whatever it says.
    pub(super) fn unsubscribed(&mut self, packet: u16) {
        self.requests.remove(&packet);
    }

    pub(super) fn send_requests(&mut self, now: Instant) {
        let Link::Online(Online { version, .. }) = self.link else { return };
        // Ahead of what is asked for: a topic that was given up and is wanted again stays wanted.
        while !self.dead.is_empty() && self.requests.len() < WINDOW {
            let count = self.dead.len().min(TOPICS_PER_REQUEST);
            let topics: Vec<Arc<str>> = self.dead.drain(..count).collect();
            let packet = self.next_packet();
            if let Some(bytes) = wire::unsubscribe(version, packet, &topics) {
                self.send(&bytes, now);
                let topics = topics.into_iter().map(|topic| (None, topic)).collect();
                self.requests.insert(packet, Request { deadline: now + REQUEST_TIMEOUT, topics });
            }
        }
        // Apps that wait come before registrations that exist.
        for fresh in [true, false] {
            while self.open > 0 && self.requests.len() < WINDOW {
                let due = self.entries.iter_mut().filter(|(_, entry)| {
                    matches!(entry.step, Step::Queued { not_before } if not_before <= now)
                        && entry.answer_by.is_some() == fresh
                });
                let mut topics = Vec::new();
                for (registration, entry) in due.take(TOPICS_PER_REQUEST) {
                    entry.tries = entry.tries.saturating_add(1);
                    entry.step = Step::Sent;
                    topics.push((Some(*registration), Arc::clone(&entry.topic)));
                }
                if topics.is_empty() {
                    break;
                }
                self.subscribe(version, topics, now);
            }
        }
    }

    fn subscribe(&mut self, version: MqttVersion, topics: Vec<(Option<RegistrationId>, Arc<str>)>, now: Instant) {
        let packet = self.next_packet();
        let names: Vec<Arc<str>> = topics.iter().map(|(_, topic)| Arc::clone(topic)).collect();
        if let Some(bytes) = wire::subscribe(version, packet, &names) {
            self.send(&bytes, now);
        }
        self.requests.insert(packet, Request { deadline: now + REQUEST_TIMEOUT, topics });
    }

    /// Ends what has taken too long: an app's wait, or a request.
    pub(super) fn expire(&mut self, now: Now) {
        let unanswered: Vec<u16> = self
            .requests
            .iter()
            .filter(|(_, request)| request.deadline <= now.boot)
            .map(|(packet, _)| *packet)
            .collect();
        for request in unanswered.iter().filter_map(|packet| self.requests.remove(packet)).collect::<Vec<_>>() {
            for (registration, topic) in request.topics {
                match registration {
                    Some(registration) => self.requeue(registration, now.boot),
                    None => self.bury(topic),
                }
            }
        }
        if !unanswered.is_empty() {
            // A broker that answers nothing may be gone without a word.
            self.prove(now.boot);
        }
        if self.open == 0 {
            return;
        }
        let late = |entry: &Entry| entry.answer_by.is_some_and(|at| at <= now.boot);
        let given_up: Vec<_> = self.entries.iter().filter(|(_, entry)| late(entry)).map(|(id, _)| *id).collect();
        for registration in given_up {
            let Some(entry) = self.forget(registration) else { continue };
            let (reason, text) = match (&self.trouble, entry.refusal) {
                (Some(trouble), _) => (FailureReason::ActionRequired, trouble.to_string()),
                (None, Some(code)) => self.refusal(code),
                (None, None) => (FailureReason::Network, "the broker did not subscribe it in time".to_owned()),
            };
            if entry.tries > 0 {
                self.bury(entry.topic);
                self.prove(now.boot);
            }
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
        }
    }

    fn requeue(&mut self, registration: RegistrationId, now: Instant) {
        let Some(entry) = self.entries.get_mut(&registration).filter(|entry| entry.step == Step::Sent) else { return };
        let delay = match entry.answer_by {
            Some(_) => FRESH_RETRY,
            None => {
                let limit = CEILING.min(REQUEST_TIMEOUT * (1 << entry.tries.min(8)));
                between(BASE, limit, &mut self.rng)
            }
        };
        entry.step = Step::Queued { not_before: now + delay };
    }

    /// Every topic is to be subscribed with the link that has just been made.
    pub(super) fn subscribe_all(&mut self, now: Instant) {
        self.requests.clear();
        for entry in self.entries.values_mut() {
            entry.tries = 0;
            entry.step = Step::Queued { not_before: now };
        }
        self.open = self.entries.len();
    }

    pub(super) fn fail_waiting(&mut self, reason: FailureReason, text: &str) {
        let waiting = self.entries.iter().filter(|(_, entry)| entry.answer_by.is_some());
        for registration in waiting.map(|(registration, _)| *registration).collect::<Vec<_>>() {
            self.forget(registration);
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text: text.to_owned() });
        }
    }

    pub(super) fn insert(&mut self, registration: RegistrationId, entry: Entry) {
        self.open += usize::from(entry.step != Step::Done);
        self.dead.retain(|topic| *topic != entry.topic);
        self.names.insert(Arc::clone(&entry.topic), registration);
        if let Some(old) = self.entries.insert(registration, entry) {
            self.open -= usize::from(old.step != Step::Done);
            self.names.remove(&old.topic);
        }
    }

    pub(super) fn forget(&mut self, registration: RegistrationId) -> Option<Entry> {
        let entry = self.entries.remove(&registration)?;
        self.names.remove(&entry.topic);
        self.open -= usize::from(entry.step != Step::Done);
        Some(entry)
    }

    /// A topic nobody wants any more: unsubscribed at the next occasion.
    pub(super) fn bury(&mut self, topic: Arc<str>) {
        if self.names.contains_key(&topic) || self.dead.contains(&topic) {
            return;
        }
        if self.requests.values().flat_map(|request| &request.topics).any(|(of, on)| of.is_none() && *on == topic) {
            return;
        }
        if self.dead.len() == DEAD_LIMIT {
            self.dead.pop_front();
        }
        self.dead.push_back(topic);
    }

    pub(super) fn new_topic(&mut self) -> Arc<str> {
        let mut bytes = [0; TOPIC_BYTES];
        self.rng.fill_bytes(&mut bytes);
        format!("{}{}", self.settings.topic_prefix, BASE64_URL_SAFE_NO_PAD.encode(bytes)).into()
    }

    /// What senders post to, or why there is no such URL.
    pub(super) fn endpoint(&self, topic: &str) -> Result<Arc<str>, String> {
        let topic = percent_encoded(topic);
        let endpoint = match &self.template {
            Some(template) => template.replace("{channel}", &topic),
            None => format!("{}{topic}", with_port(&self.url)),
        };
        if endpoint.len() > ENDPOINT_LIMIT {
            return Err(format!("the endpoint would have {} bytes, {ENDPOINT_LIMIT} are possible", endpoint.len()));
        }
        Ok(endpoint.into())
    }

    fn next_packet(&mut self) -> u16 {
        // Requests under way are few.
        loop {
            self.last_packet = self.last_packet.checked_add(1).unwrap_or(1);
            if !self.requests.contains_key(&self.last_packet) {
                return self.last_packet;
            }
        }
    }

    /// What a broker's refusal to subscribe means for an app.
    fn refusal(&self, code: u8) -> (FailureReason, String) {
        let prefix = &self.settings.topic_prefix;
        match code {
            0x87 | 0x80 => {
                let text = format!(
                    "the broker refuses the subscription (0x{code:02x}): allow this user to read {prefix}# in its access rules"
                );
                (FailureReason::ActionRequired, text)
            }
            0x97 => {
                let text = "the broker refuses the subscription (0x97): its quota of subscriptions is used up";
                (FailureReason::ActionRequired, text.to_owned())
            }
            code => (FailureReason::InternalError, format!("the broker refuses the subscription (0x{code:02x})")),
        }
    }
}

/// The base URL with the port it stands for: not everybody knows those of MQTT.
fn with_port(url: &str) -> String {
    for (scheme, port) in [("mqtt://", 1883), ("mqtts://", 8883)] {
        if let Some((host, path)) = url.strip_prefix(scheme).and_then(|rest| rest.split_once('/'))
            && !host.rsplit_once(':').is_some_and(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()))
        {
            return format!("{scheme}{host}:{port}/{path}");
        }
    }
    url.to_owned()
}

/// What may stand in a path (RFC 3986 §3.3) stays as it is, the slashes between the levels too: many servers refuse
/// `%2F`.
fn percent_encoded(topic: &str) -> String {
    let mut text = String::with_capacity(topic.len());
    for byte in topic.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => text.push(char::from(byte)),
            byte => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}
