//! The link of a session: what comes over it, when it is made and how it ends.

use std::{sync::Arc, time::Duration};

use super::{
    ACKS_PER_FRAME, Challenger, Link, NAME_LIMIT, Online, PROVEN, REMAKING, Session, Step, TOO_MANY_REQUESTS,
    UNSAFE_LIMIT,
    wire::{self, Ack, Incoming, Notification, Outgoing},
};
use crate::{
    core::upstream::{DOUBT, IncomingBody, IncomingMessage, Output, PROOF_TIMEOUT, backoff::between, quiet::hint},
    event::{LinkError, LinkEvent, LinkId},
    model::{FailureReason, Urgency},
    time::{Instant, Now},
    view::LinkState,
};

impl Session {
    pub(super) fn frame(&mut self, link: LinkId, text: &str, now: Now) {
        let frame = match wire::parse(text) {
            Ok(frame) => frame,
            Err(reason) => {
                self.quiet_frames.warn(format_args!("the server sent a frame that is {reason}; ignored"), now.boot);
                return;
            }
        };
        let online = matches!(self.link, Link::Online(_));
        match frame {
            Incoming::Hello { status: 200, uaid: Some(uaid) } if !online => self.greeted(link, uaid, now.boot),
            Incoming::Hello { status, uaid } if !online => {
                let what = match uaid {
                    None if status == 200 => "the server's hello has no uaid".to_owned(),
                    _ => format!("the server refused the hello with status {status}"),
                };
                self.drop_link(link, &what, now.boot);
                self.backoff.failed(None, now.boot, &mut self.rng);
            }
            Incoming::Register { channel, status, endpoint } if online => {
                self.register_reply(&channel, status, endpoint, now.boot);
            }
            Incoming::Notification(notification) if online => self.notification(link, notification, now),
            Incoming::Nothing => {}
            Incoming::Hello { .. } | Incoming::Register { .. } | Incoming::Notification(_) => {
                self.quiet_frames.warn("the server sent a frame out of turn; ignored", now.boot);
            }
        }
    }

    fn greeted(&mut self, id: LinkId, uaid: String, now: Instant) {
        let (pinged, rhythm) = (None, None);
        self.link = Link::Online(Online { id, since: now, heard: now, pinged, rhythm, proof_by: None, doubt_at: None });
        self.trouble = None;
        self.recheck_at = None;
        self.backoff.clear();
        if self.uaid.as_deref() != Some(uaid.as_str()) {
            if self.uaid.is_some() {
                log::warn!("the server has forgotten this device: every registration is made anew");
            }
            self.remaking = self.channels.values().any(|entry| entry.answer_by.is_none());
            let mark = if self.remaking { REMAKING } else { "" };
            self.outputs.push_back(Output::Remember { key: "uaid", value: format!("{mark}{uaid}") });
            self.uaid = Some(uaid.into());
            // The old life's channels are unknown to the new one.
            self.dead.clear();
            for entry in self.channels.values_mut() {
                if entry.step == Step::Done {
                    self.open += 1;
                }
                entry.tries = 0;
                entry.step = Step::Queued { not_before: now };
            }
        }
    }

    fn notification(&mut self, link: LinkId, notification: Notification, now: Now) {
        if notification.version.is_empty()
            || notification.version.len() > NAME_LIMIT
            || notification.channel.len() > NAME_LIMIT
        {
            self.quiet_frames.warn("the server sent a message without a usable version; ignored", now.boot);
            return;
        }
        self.backoff.succeeded();
        let id: Arc<str> = notification.version.as_str().into();
        let Some(registration) = self.names.get(notification.channel.as_str()).copied() else {
            let what = format_args!("a message for the unknown channel {}…: dropped", hint(&notification.channel));
            self.quiet_unknown.warn(what, now.boot);
            let channel: Arc<str> = notification.channel.as_str().into();
            self.acks.push((channel.clone(), id));
            self.bury(channel);
            return;
        };
        let key = (registration, id.clone());
        if self.unsafe_messages.len() >= UNSAFE_LIMIT && !self.unsafe_messages.contains(&key) {
            self.drop_link(link, "too many messages wait to be stored", now.boot);
            self.backoff.failed(None, now.boot, &mut self.rng);
            return;
        }
        self.unsafe_messages.insert(key);
        let body = match notification.body() {
            Ok(bytes) => IncomingBody::Bytes(bytes.into()),
            Err(reason) => IncomingBody::Undecodable(reason),
        };
        self.outputs.push_back(Output::Message(IncomingMessage {
            registration,
            id,
            body,
            expires: notification.ttl.map(|secs| now.wall + Duration::from_secs(secs)),
            topic: notification.topic.filter(|topic| !topic.is_empty()).map(Arc::from),
            urgency: notification.urgency.as_deref().and_then(Urgency::parse),
        }));
    }

    pub(super) fn closed(&mut self, code: Option<u16>, reason: &str, now: Instant) {
        let reset = code == Some(1000) && reason == "SM";
        let text = match code {
            _ if reset => "the server forgot this device: too many messages were stored".to_owned(),
            Some(code) => format!("the server closed the connection ({code} {})", printable(reason)),
            None => "the connection ended".to_owned(),
        };
        self.link_ended(&text, now);
        self.backoff.failed(None, now, &mut self.rng);
        if reset {
            // Every endpoint is dead until the next hello; the pace still bounds a server that does nothing else.
            self.backoff.hurry(now + between(Duration::from_millis(100), Duration::from_secs(1), &mut self.rng));
        }
    }

    pub(super) fn failed(&mut self, error: &LinkError, now: Instant) {
        self.link_ended(&error.to_string(), now);
        match error {
            LinkError::Http { status: status @ (401 | 403), .. } => {
                let text = format!("the server refuses the credentials ({status}): mend them in the configuration");
                self.trouble = Some(text.as_str().into());
                self.fail_waiting(FailureReason::ActionRequired, &text);
                self.backoff.refused(now, &mut self.rng);
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

    /// Closes the link from this side.
    pub(super) fn drop_link(&mut self, id: LinkId, why: &str, now: Instant) {
        self.outputs.push_back(Output::Close(id));
        self.link_ended(why, now);
    }

    fn link_ended(&mut self, why: &str, now: Instant) {
        if let Link::Online(online) = &self.link
            && now.since(online.since) >= PROVEN
        {
            self.backoff.succeeded();
        }
        self.last_error = Some(why.into());
        self.link_gone(now);
    }

    fn link_gone(&mut self, now: Instant) {
        self.recheck_at = None;
        self.link = match self.challenger.take() {
            Some(Challenger { id, asked }) => Link::Greeting { id, asked },
            None => Link::Down,
        };
        self.acks.clear();
        self.unsafe_messages.clear();
        for entry in self.channels.values_mut() {
            if matches!(entry.step, Step::Sent { .. }) {
                entry.step = Step::Queued { not_before: now };
            }
        }
    }

    /// Asks an open link for a sign of life.
    pub(super) fn prove(&mut self, now: Instant) {
        if let Link::Online(online) = &mut self.link
            && online.proof_by.is_none()
        {
            (online.proof_by, online.doubt_at) = (Some(now + PROOF_TIMEOUT), Some(now + DOUBT));
            self.outputs.push_back(Output::Ping(online.id));
        }
    }

    /// The link has not answered yet: another is begun.
    pub(super) fn doubt(&mut self, now: Instant) {
        let Link::Online(online) = &mut self.link else { return };
        online.doubt_at = None;
        if self.challenger.is_none() && self.backoff.allows(now) {
            let id = self.links.take();
            self.challenger = Some(Challenger { id, asked: now });
            self.outputs.push_back(Output::Connect { link: id, path: String::new(), headers: Vec::new() });
        }
    }

    pub(super) fn handle_challenger(&mut self, event: &LinkEvent, now: Instant) {
        match event {
            LinkEvent::Open => {
                let doubted = match &self.link {
                    Link::Online(online) => Some(online.id),
                    Link::Down | Link::Greeting { .. } => None,
                };
                let link = self.challenger.as_ref().map(|challenger| challenger.id);
                if let (Some(doubted), Some(link)) = (doubted, link) {
                    self.drop_link(doubted, "replaced: it did not answer after the network changed", now);
                    self.greet(link);
                }
            }
            LinkEvent::Closed { .. } | LinkEvent::Failed(_) => self.challenger = None,
            LinkEvent::Login(_) | LinkEvent::Text(_) | LinkEvent::Bytes(_) | LinkEvent::Ping | LinkEvent::Pong => {}
        }
    }

    /// The link in doubt has answered.
    pub(super) fn dismiss_challenger(&mut self) {
        if let Some(Challenger { id, .. }) = self.challenger.take() {
            self.outputs.push_back(Output::Close(id));
        }
    }

    pub(super) fn greet(&mut self, link: LinkId) {
        let hello = Outgoing::Hello { uaid: self.uaid.as_deref(), use_webpush: true };
        self.outputs.push_back(Output::Send(link, hello.to_text()));
    }

    /// Does whatever has become due; every door ends here.
    pub(super) fn settle(&mut self, now: Instant) {
        self.expire(now);
        if self.channels.is_empty() || !self.allowed {
            self.retire(now);
        } else {
            self.connect_if_due(now);
            self.send_requests(now);
        }
        self.bury_dead();
        self.finish_remaking();
        let state = match &self.link {
            Link::Online(_) => LinkState::Online,
            Link::Greeting { .. } => LinkState::Connecting,
            Link::Down if self.channels.is_empty() => LinkState::Idle,
            Link::Down if !self.allowed => LinkState::Off,
            Link::Down => LinkState::Waiting,
        };
        if state != self.state {
            self.state = state;
            self.since = now;
            self.outputs.push_back(Output::StateChanged(state));
        }
    }

    /// Nobody needs the link any more, or there may be none.
    fn retire(&mut self, now: Instant) {
        self.bury_dead();
        self.flush_acks();
        self.dismiss_challenger();
        let id = match &self.link {
            Link::Down => None,
            Link::Greeting { id, .. } => Some(*id),
            Link::Online(online) => Some(online.id),
        };
        if let Some(id) = id {
            self.outputs.push_back(Output::Close(id));
            self.link_gone(now);
        }
        self.backoff.clear();
    }

    pub(super) fn connect_if_due(&mut self, now: Instant) {
        if !matches!(self.link, Link::Down) || !self.allowed {
            return;
        }
        match self.backoff.retry_at() {
            Some(at) if at > now => {}
            Some(_) => {
                self.backoff.clear();
                let id = self.links.take();
                self.link = Link::Greeting { id, asked: now };
                self.outputs.push_back(Output::Connect { link: id, path: String::new(), headers: Vec::new() });
                if self.state != LinkState::Connecting {
                    self.state = LinkState::Connecting;
                    self.since = now;
                    self.outputs.push_back(Output::StateChanged(LinkState::Connecting));
                }
            }
            None => self.backoff.failed(None, now, &mut self.rng),
        }
    }

    pub(super) fn flush_acks(&mut self) {
        let Link::Online(Online { id: link, .. }) = self.link else {
            self.acks.clear();
            return;
        };
        for acks in self.acks.chunks(ACKS_PER_FRAME) {
            let updates = acks.iter().map(|(channel, version)| Ack { channel, version, code: 100 }).collect();
            self.outputs.push_back(Output::Send(link, Outgoing::Ack { updates }.to_text()));
        }
        self.acks.clear();
    }
}

/// A peer's text for the log: short, in one line.
fn printable(text: &str) -> String {
    text.chars().take(80).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
