//! Registrations that a server makes on request: asked for, answered, made again and given up.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand_chacha::ChaCha12Rng;

use super::Fault;
use crate::{
    core::upstream::{
        Channel, REGISTER_TIMEOUT,
        backoff::{BASE, CEILING, LONGEST_WISH, between},
    },
    event::HttpTicket,
    model::{FailureReason, RegistrationId},
    time::{Instant, earliest},
};

/// Requests under way at a time.
const WINDOW: usize = 8;
/// How long the server may take to answer one.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Before an app's registration is tried again within its [`REGISTER_TIMEOUT`].
const FRESH_RETRY: Duration = Duration::from_secs(2);
/// Requests given up whose late answers are still recognised.
const ABANDONED: usize = 64;
/// UnifiedPush D-Bus 0.3.0: what an app takes.
const ENDPOINT_LIMIT: usize = 1000;

/// The registrations of one session.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    entries: BTreeMap<RegistrationId, Entry>,
    names: HashMap<Arc<str>, RegistrationId>,
    abandoned: VecDeque<HttpTicket>,
    /// Registrations not [`Step::Done`].
    open: usize,
    /// The server wants no requests before.
    not_before: Instant,
}

#[derive(Debug)]
pub(crate) struct Entry {
    /// The server's name for it; of one that is being made again the old one; of one never made empty.
    pub(crate) channel: Arc<str>,
    pub(crate) vapid: Option<Arc<str>>,
    /// What the app was told, if anything.
    pub(crate) endpoint: Arc<str>,
    /// By when the app must be told; `None` for a registration that exists.
    answer_by: Option<Instant>,
    /// What became of the last try.
    fault: Option<Fault>,
    tries: u32,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Done,
    Queued { not_before: Instant },
    Sent { ticket: HttpTicket, deadline: Instant },
}

/// Whose answer it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// This registration waits for it.
    Registration(RegistrationId),
    /// It was given up: what it made is not wanted.
    Nobody,
    /// No request of these.
    Other,
}

/// A registration that was not made, and is forgotten.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) registration: RegistrationId,
    pub(crate) reason: FailureReason,
    pub(crate) text: String,
}

impl Registrations {
    /// One that an earlier life served; `again` when the server is known to have forgotten it.
    pub(crate) fn restore(&mut self, channel: Channel, again: bool, now: Instant) {
        let Channel { registration, channel, vapid, endpoint } = channel;
        let again = again || channel.is_empty() || endpoint.is_empty();
        let step = if again { Step::Queued { not_before: now } } else { Step::Done };
        self.insert(registration, Entry { channel, vapid, endpoint, answer_by: None, fault: None, tries: 0, step });
    }

    /// A new one, for an app that waits. False when it is there already.
    pub(crate) fn add(&mut self, registration: RegistrationId, vapid: Option<Arc<str>>, now: Instant) -> bool {
        if self.entries.contains_key(&registration) {
            log::error!("registration {} is asked for twice; the second is ignored", registration.0);
            return false;
        }
        let entry = Entry {
            channel: Arc::default(),
            vapid,
            endpoint: Arc::default(),
            answer_by: Some(now + REGISTER_TIMEOUT),
            fault: None,
            tries: 0,
            step: Step::Queued { not_before: now },
        };
        self.insert(registration, entry);
        true
    }

    /// Forgets one.
    pub(crate) fn remove(&mut self, registration: RegistrationId) -> Option<Entry> {
        let entry = self.entries.remove(&registration)?;
        self.names.remove(&entry.channel);
        self.open -= usize::from(entry.step != Step::Done);
        self.abandon(entry.step);
        Some(entry)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn get(&self, registration: RegistrationId) -> Option<&Entry> {
        self.entries.get(&registration)
    }

    /// Whose channel this is.
    pub(crate) fn of(&self, channel: &str) -> Option<RegistrationId> {
        self.names.get(channel).copied()
    }

    /// Whether an app knows an endpoint of any of them.
    pub(crate) fn any_existing(&self) -> bool {
        self.entries.values().any(|entry| entry.answer_by.is_none())
    }

    /// Those the server has made.
    pub(crate) fn made(&self) -> impl Iterator<Item = (RegistrationId, &Entry)> {
        self.entries.iter().filter(|(_, entry)| entry.step == Step::Done).map(|(id, entry)| (*id, entry))
    }

    /// Whether one that existed waits to be made again.
    pub(crate) fn remaking(&self) -> bool {
        self.open > 0 && self.entries.values().any(|entry| entry.answer_by.is_none() && entry.step != Step::Done)
    }

    /// The server has forgotten one.
    pub(crate) fn make_again(&mut self, registration: RegistrationId, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&registration) {
            self.open += usize::from(entry.step == Step::Done);
            let step = std::mem::replace(&mut entry.step, Step::Queued { not_before: now });
            entry.tries = 0;
            self.abandon(step);
        }
    }

    /// The server has forgotten them all.
    pub(crate) fn make_all_again(&mut self, now: Instant) {
        let all: Vec<_> = self.entries.keys().copied().collect();
        for registration in all {
            self.make_again(registration, now);
        }
    }

    /// Which one to ask for now, if any: apps that wait come before those that are being made again.
    pub(crate) fn next(&self, now: Instant) -> Option<RegistrationId> {
        if self.open == 0 || self.not_before > now || self.under_way() >= WINDOW {
            return None;
        }
        let due = |entry: &Entry| matches!(entry.step, Step::Queued { not_before } if not_before <= now);
        let find = |fresh: bool| {
            self.entries.iter().find(|(_, entry)| entry.answer_by.is_some() == fresh && due(entry)).map(|(id, _)| *id)
        };
        find(true).or_else(|| find(false))
    }

    /// It has been asked for.
    pub(crate) fn sent(&mut self, registration: RegistrationId, ticket: HttpTicket, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&registration) {
            entry.tries = entry.tries.saturating_add(1);
            entry.step = Step::Sent { ticket, deadline: now + REQUEST_TIMEOUT };
        }
    }

    /// Whose answer this is.
    pub(crate) fn whose(&mut self, ticket: HttpTicket) -> Whose {
        if let Some(at) = self.abandoned.iter().position(|other| *other == ticket) {
            self.abandoned.remove(at);
            return Whose::Nobody;
        }
        let waits = |entry: &Entry| matches!(entry.step, Step::Sent { ticket: other, .. } if other == ticket);
        match self.entries.iter().find(|(_, entry)| waits(entry)) {
            Some((registration, _)) => Whose::Registration(*registration),
            None => Whose::Other,
        }
    }

    /// The server has made it. Returns the name it had before, if that was another one.
    pub(crate) fn is_made(
        &mut self,
        registration: RegistrationId,
        channel: Arc<str>,
        endpoint: Arc<str>,
    ) -> Option<Arc<str>> {
        let entry = self.entries.get_mut(&registration)?;
        self.open -= usize::from(entry.step != Step::Done);
        (entry.step, entry.answer_by, entry.fault, entry.tries) = (Step::Done, None, None, 0);
        entry.endpoint = endpoint;
        let old = std::mem::replace(&mut entry.channel, Arc::clone(&channel));
        self.names.remove(&old);
        self.names.insert(Arc::clone(&channel), registration);
        Some(old).filter(|old| !old.is_empty() && *old != channel)
    }

    /// The server has not made it: it is tried again.
    pub(crate) fn is_refused(
        &mut self,
        registration: RegistrationId,
        fault: Fault,
        now: Instant,
        rng: &mut ChaCha12Rng,
    ) {
        if let Fault::Busy(_, Some(wish)) = &fault {
            self.not_before = self.not_before.max(now + (*wish).min(LONGEST_WISH));
        }
        if let Some(entry) = self.entries.get_mut(&registration) {
            entry.fault = Some(fault);
            requeue(entry, now, rng);
        }
    }

    /// No requests for a while: the server refuses the credentials.
    pub(crate) fn pause(&mut self, until: Instant) {
        self.not_before = self.not_before.max(until);
    }

    /// Asked for by an app, or the network came back: what was put off may be tried now, but for the server's own wish.
    pub(crate) fn hurry(&mut self, now: Instant) {
        for entry in self.entries.values_mut() {
            if let Step::Queued { not_before } = &mut entry.step {
                *not_before = (*not_before).min(now);
            }
        }
    }

    /// Ends what has taken too long: an app's wait, or a request that exists already.
    pub(crate) fn expire(&mut self, trouble: Option<&str>, now: Instant, rng: &mut ChaCha12Rng) -> Vec<Failure> {
        if self.open == 0 {
            return Vec::new();
        }
        let late = |entry: &Entry| entry.answer_by.is_some_and(|by| by <= now);
        let given_up: Vec<_> = self.entries.iter().filter(|(_, entry)| late(entry)).map(|(id, _)| *id).collect();
        let mut failures = Vec::new();
        for registration in given_up {
            let Some(entry) = self.remove(registration) else { continue };
            let (reason, text) = match (trouble, entry.fault) {
                (Some(trouble), _) => (FailureReason::ActionRequired, trouble.to_owned()),
                (None, Some(Fault::Credentials(status))) => {
                    (FailureReason::ActionRequired, format!("the server refuses the credentials ({status})"))
                }
                (None, Some(Fault::Refused(text))) => {
                    (FailureReason::InternalError, format!("the server did not make the registration: {text}"))
                }
                (None, Some(Fault::Busy(status, _))) => {
                    (FailureReason::Network, format!("the server cannot do it now ({status})"))
                }
                (None, Some(Fault::Unreachable(text))) => (FailureReason::Network, text),
                (None, None) => (FailureReason::Network, "the server did not make it in time".to_owned()),
            };
            failures.push(Failure { registration, reason, text });
        }
        let mut unanswered = Vec::new();
        for entry in self.entries.values_mut() {
            if matches!(entry.step, Step::Sent { deadline, .. } if deadline <= now) {
                unanswered.push(entry.step);
                entry.fault = None;
                requeue(entry, now, rng);
            }
        }
        for step in unanswered {
            self.abandon(step);
        }
        failures
    }

    /// Gives up all that apps wait for.
    pub(crate) fn fail_waiting(&mut self, reason: FailureReason, text: &str) -> Vec<Failure> {
        let waiting: Vec<_> =
            self.entries.iter().filter(|(_, entry)| entry.answer_by.is_some()).map(|(id, _)| *id).collect();
        let mut failures = Vec::new();
        for registration in waiting {
            self.remove(registration);
            failures.push(Failure { registration, reason, text: text.to_owned() });
        }
        failures
    }

    /// When [`Registrations::expire`] or [`Registrations::next`] has something to do; `open` is whether requests can be
    /// made.
    pub(crate) fn due(&self, open: bool) -> Option<Instant> {
        if self.open == 0 {
            return None;
        }
        let room = open && self.under_way() < WINDOW;
        self.entries.values().filter(|entry| entry.step != Step::Done).fold(None, |at, entry| {
            let step = match entry.step {
                Step::Sent { deadline, .. } => Some(deadline),
                Step::Queued { not_before } if room => Some(not_before.max(self.not_before)),
                Step::Queued { .. } | Step::Done => None,
            };
            earliest(earliest(at, entry.answer_by), step)
        })
    }

    fn under_way(&self) -> usize {
        self.entries.values().filter(|entry| matches!(entry.step, Step::Sent { .. })).count()
    }

    fn insert(&mut self, registration: RegistrationId, entry: Entry) {
        self.remove(registration);
        self.open += usize::from(entry.step != Step::Done);
        if !entry.channel.is_empty() {
            self.names.insert(Arc::clone(&entry.channel), registration);
        }
        self.entries.insert(registration, entry);
    }

    fn abandon(&mut self, step: Step) {
        if let Step::Sent { ticket, .. } = step {
            if self.abandoned.len() == ABANDONED {
                self.abandoned.pop_front();
            }
            self.abandoned.push_back(ticket);
        }
    }
}

impl Entry {
    /// Whether no app knows it yet.
    pub(crate) const fn is_fresh(&self) -> bool {
        self.answer_by.is_some()
    }
}

/// Whether this can be told to an app.
pub(crate) fn usable_endpoint(endpoint: &str) -> bool {
    endpoint.len() <= ENDPOINT_LIMIT && (endpoint.starts_with("https://") || endpoint.starts_with("http://"))
}

fn requeue(entry: &mut Entry, now: Instant, rng: &mut ChaCha12Rng) {
    let delay = match entry.answer_by {
        Some(_) => FRESH_RETRY,
        None => between(BASE, CEILING.min(REQUEST_TIMEOUT * (1 << entry.tries.min(8))), rng),
    };
    entry.step = Step::Queued { not_before: now + delay };
}
