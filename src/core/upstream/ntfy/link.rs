//! The links of a session: what comes over them, when one is made and how it ends.

use std::{collections::HashSet, sync::Arc};

use super::{
    DEBOUNCE, DEBOUNCE_LIMIT, OVERLAP, PROVEN, SURPLUS_KEPT, Session, Stream, TOO_MANY_REQUESTS, UNSAFE_LIMIT,
    WORDLESS_REFUSAL,
    cursor::{Arrival, STORING, Watermark},
    wire::{self, Incoming, Message},
};
use crate::{
    core::upstream::{IncomingBody, IncomingMessage, Output, PROOF_TIMEOUT, quiet::hint},
    event::{LinkError, LinkEvent, LinkId},
    model::FailureReason,
    time::{Instant, Now},
    view::LinkState,
};

impl Session {
    pub(super) fn frame(&mut self, link: LinkId, text: &str, now: Now) {
        match wire::parse(text) {
            Ok(Incoming::Open { time }) => self.subscribed(link, time, now.boot),
            Ok(Incoming::Message(message)) => self.message(link, message, now),
            Ok(Incoming::Error { code, http, text }) => {
                self.outputs.push_back(Output::Close(link));
                let retry_after = None;
                self.failed(
                    link,
                    &LinkError::Http { status: http, body: format!("{text} ({code})"), retry_after },
                    now.boot,
                );
            }
            Ok(Incoming::Nothing) => {}
            Err(reason) => {
                let what = format_args!("the server sent an event that cannot be read ({reason}); ignored");
                self.quiet_frames.warn(what, now.boot);
            }
        }
    }

    /// The new link has its topics: it takes over, and the old one begins to end.
    fn subscribed(&mut self, link: LinkId, time: Option<u64>, now: Instant) {
        let Some(mut next) = self.next.take_if(|next| next.id == link) else {
            self.quiet_frames.warn("the server sent a second open event; ignored", now);
            return;
        };
        next.since = now;
        // Nobody can have sent anything yet to an endpoint that no app knows.
        let known = self.topics.values().any(|entry| entry.told && next.topics.contains(&entry.topic));
        next.watermark.open(time, known.then_some(now));
        self.close_old();
        self.old = self.main.take();
        self.backoff.clear();
        self.refusals = 0;
        self.trouble = None;
        let mut registered = Vec::new();
        for (registration, entry) in &mut self.topics {
            if !entry.told && next.topics.contains(&entry.topic) {
                (entry.told, entry.answer_by) = (true, None);
                self.pending -= 1;
                registered.push((*registration, entry.topic.clone()));
            }
        }
        for (registration, channel) in registered {
            let endpoint = self.endpoint(&channel).into();
            self.outputs.push_back(Output::Registered { registration, channel, endpoint });
        }
        let surplus = next.topics.iter().any(|topic| !self.names.contains_key(topic));
        self.surplus_since = surplus.then_some(now);
        self.main = Some(next);
    }

    fn message(&mut self, link: LinkId, message: Message, now: Now) {
        let Message { id, topic, time, body, urgency } = message;
        let attachment = matches!(body, IncomingBody::Attachment { .. });
        let registration = self.names.get(topic.as_str()).copied();
        let known = self.tracker.look_up(&id);
        if known == Arrival::New {
            if self.tracker.unsafe_count() >= UNSAFE_LIMIT {
                self.drop_link(link, "too many messages wait to be stored", now.boot);
                self.backoff.failed(None, now.boot, &mut self.rng);
                return;
            }
            self.tracker.arrive(&id, registration);
            self.backoff.succeeded();
        }
        match registration {
            Some(_) if known == Arrival::Safe => {}
            Some(registration) => self.outputs.push_back(Output::Message(IncomingMessage {
                registration,
                id: id.clone(),
                body,
                // The event's `expires` is the end of the server's own cache, not the sender's TTL.
                expires: None,
                topic: None,
                urgency,
            })),
            None => {
                log::debug!("a message on the topic {}… that was given up: dropped", hint(&topic));
                self.tracker.safe(&id);
            }
        }
        let stream = [&mut self.main, &mut self.next].into_iter().flatten().find(|stream| stream.id == link);
        if let Some(stream) = stream {
            stream.watermark.put_off(time, now.boot);
            if let Some(settled) = stream.watermark.message(&id, time, attachment) {
                self.tracker.checkpoint(settled);
            }
        }
    }

    // The link that has been replaced.

    /// Its messages count, its checkpoints do not: it lacks the new topics.
    pub(super) fn handle_old(&mut self, link: LinkId, event: LinkEvent, now: Now) {
        match event {
            LinkEvent::Text(text) => match wire::parse(&text) {
                Ok(Incoming::Message(message)) => self.message(link, message, now),
                Ok(Incoming::Error { .. }) => self.close_old(),
                Ok(Incoming::Open { .. } | Incoming::Nothing) | Err(_) => {}
            },
            LinkEvent::Pong => {
                let Some(old) = &mut self.old else { return };
                old.pings = old.pings.saturating_sub(1);
                // Of the pings only the one at the end of the overlap proves anything: it is the last.
                if old.proof_by.is_some() && old.pings == 0 {
                    if let Some(main) = &mut self.main {
                        main.watermark.overlapped(&old.watermark, main.asked);
                    }
                    self.close_old();
                }
            }
            LinkEvent::Closed { .. } | LinkEvent::Failed(_) => self.old = None,
            LinkEvent::Open | LinkEvent::Login(_) | LinkEvent::Bytes(_) | LinkEvent::Ping => {}
        }
    }

    /// When something is due with it.
    pub(super) fn overlap_ends(&self) -> Option<Instant> {
        let (old, main) = (self.old.as_ref()?, self.main.as_ref()?);
        Some(old.proof_by.unwrap_or(main.since + OVERLAP))
    }

    /// What was sent over it is on its way, so it comes before the answer to a ping. Without an answer the new link keeps
    /// its gap.
    pub(super) fn end_overlap(&mut self, now: Instant) {
        if self.overlap_ends().is_none_or(|at| at > now) {
            return;
        }
        match &mut self.old {
            Some(old) if old.proof_by.is_none() => {
                old.proof_by = Some(now + PROOF_TIMEOUT);
                old.pings += 1;
                self.outputs.push_back(Output::Ping(old.id));
            }
            _ => self.close_old(),
        }
    }

    pub(super) fn close_old(&mut self) {
        if let Some(old) = self.old.take() {
            self.outputs.push_back(Output::Close(old.id));
        }
    }

    // The others.

    pub(super) fn failed(&mut self, link: LinkId, error: &LinkError, now: Instant) {
        let wordless = matches!(error, LinkError::Http { status: 200, .. });
        let text = match wordless {
            true => "the server refuses the subscription without saying why".to_owned(),
            false => error.to_string(),
        };
        self.ended(link, &text, now);
        match error {
            LinkError::Http { status: 200, .. } => {
                self.refusals = self.refusals.saturating_add(1);
                if self.refusals == 1 {
                    self.backoff.throttled(WORDLESS_REFUSAL, now, &mut self.rng);
                } else {
                    self.refused(
                        "the server refuses the subscription: check the credentials, that they may read the topics \
                         up*, and the server's limits of requests and subscriptions",
                        now,
                    );
                }
            }
            LinkError::Http { status: status @ (401 | 403), .. } => {
                self.refused(
                    &format!(
                        "the server refuses the credentials ({status}): mend them in the configuration, and see that \
                         they may read the topics up*"
                    ),
                    now,
                );
            }
            LinkError::Http { status, retry_after, .. } => {
                let wish = retry_after.or_else(|| (*status == 429).then_some(TOO_MANY_REQUESTS));
                self.backoff.failed(wish, now, &mut self.rng);
            }
            LinkError::Resolve(_)
            | LinkError::Connect(_)
            | LinkError::Tls(_)
            | LinkError::Clock(_)
            | LinkError::Portal(_)
            | LinkError::Proxy(_)
            | LinkError::Timeout
            | LinkError::Protocol(_)
            | LinkError::Io(_) => self.backoff.failed(None, now, &mut self.rng),
        }
    }

    /// Only the user can mend this.
    fn refused(&mut self, text: &str, now: Instant) {
        self.trouble = Some(text.into());
        self.backoff.refused(now, &mut self.rng);
        self.fail_waiting(FailureReason::ActionRequired, text);
    }

    pub(super) fn drop_link(&mut self, id: LinkId, why: &str, now: Instant) {
        self.outputs.push_back(Output::Close(id));
        self.ended(id, why, now);
    }

    pub(super) fn ended(&mut self, id: LinkId, why: &str, now: Instant) {
        if let Some(main) = self.main.take_if(|main| main.id == id) {
            if now.since(main.since) >= PROVEN {
                self.backoff.succeeded();
            }
            self.close_old();
        } else if self.next.take_if(|next| next.id == id).is_none() {
            self.old.take_if(|old| old.id == id);
        }
        self.last_error = Some(why.into());
    }

    /// Does whatever has become due; every door ends here.
    pub(super) fn settle(&mut self, now: Instant) {
        self.expire(now);
        if self.topics.is_empty() || !self.allowed {
            for stream in [self.old.take(), self.main.take(), self.next.take()].into_iter().flatten() {
                self.outputs.push_back(Output::Close(stream.id));
            }
            self.backoff.clear();
            self.debounce = None;
            self.surplus_since = None;
        } else if self.next.is_none() {
            if !self.wants_link(now) {
                self.backoff.clear();
                self.debounce = None;
                self.refusals = 0;
                self.trouble = None;
            } else {
                if self.backoff.retry_at().is_none() {
                    // Registered while another link was being made, or the time to look again: its turn has come.
                    self.backoff.hurry(now);
                }
                if self.attempt_at().is_some_and(|at| at <= now) {
                    self.connect(now);
                }
            }
        }
        let state = match (&self.main, &self.next) {
            (Some(_), _) => LinkState::Online,
            (None, Some(_)) => LinkState::Connecting,
            (None, None) if self.topics.is_empty() => LinkState::Idle,
            (None, None) if !self.allowed => LinkState::Off,
            (None, None) => LinkState::Waiting,
        };
        if state != self.state {
            self.state = state;
            self.since = now;
            self.outputs.push_back(Output::StateChanged(state));
        }
    }

    /// Whether a link is to be made: there is none, it lacks a topic, or it may lack a message.
    pub(super) fn wants_link(&self, now: Instant) -> bool {
        match &self.main {
            _ if !self.allowed => false,
            None => !self.topics.is_empty(),
            Some(main) => {
                self.pending > 0 && self.names.keys().any(|topic| !main.topics.contains(topic))
                    || self.look_at().is_some_and(|at| at <= now)
            }
        }
    }

    /// When another link is to look for what this one may lack.
    pub(super) fn look_at(&self) -> Option<Instant> {
        let main = self.main.as_ref().filter(|_| self.old.is_none() && self.next.is_none())?;
        Some(main.watermark.gap()? + STORING)
    }

    /// When the next link is to be made, if one is.
    pub(super) fn attempt_at(&self) -> Option<Instant> {
        let retry_at = self.backoff.retry_at().filter(|_| self.next.is_none())?;
        let company = self.debounce.map(|(first, last)| (last + DEBOUNCE).min(first + DEBOUNCE_LIMIT));
        Some(company.map_or(retry_at, |at| at.max(retry_at)))
    }

    fn connect(&mut self, now: Instant) {
        self.backoff.clear();
        self.debounce = None;
        let topics: HashSet<Arc<str>> = self.names.keys().cloned().collect();
        // In the order of registration: the same list gives the same URL.
        let list: Vec<&str> = self.topics.values().map(|entry| &*entry.topic).collect();
        let since = self.tracker.cursor().map_or("all", |id| id);
        let path = format!("{}/ws?since={since}", list.join(","));
        let id = self.links.take();
        self.outputs.push_back(Output::Connect { link: id, path, headers: Vec::new() });
        self.next = Some(Box::new(Stream {
            id,
            topics,
            asked: now,
            since: now,
            heard: now,
            pinged: None,
            rhythm: None,
            proof_by: None,
            doubt_at: None,
            challenges: false,
            pings: 0,
            watermark: Watermark::default(),
        }));
    }

    /// The link has not answered yet: another is begun.
    pub(super) fn doubt(&mut self, now: Instant) {
        let Some(main) = &mut self.main else { return };
        main.doubt_at = None;
        if self.next.is_none() && self.backoff.allows(now) {
            self.connect(now);
            if let Some(next) = &mut self.next {
                next.challenges = true;
            }
        }
    }

    /// Topics nobody reads any more leave with a new link, made right after a ping: then the radio is awake anyway.
    pub(super) fn drop_surplus(&mut self, link: LinkId, now: Instant) {
        let main = self.main.as_ref().is_some_and(|main| main.id == link);
        let old = self.surplus_since.is_some_and(|since| now.since(since) >= SURPLUS_KEPT);
        if main && old && self.next.is_none() && self.backoff.retry_at().is_none() && !self.topics.is_empty() {
            // If it fails the next try is as far away as the first.
            self.surplus_since = Some(now);
            self.connect(now);
        }
    }
}
