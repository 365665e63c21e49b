//! The link of a session: how it comes to a device and a stream, what comes over it and how it ends.

use std::{sync::Arc, time::Duration};

use super::{
    ANSWER_LIMIT, EVENT_LIMIT, KEEPALIVE, KEEPALIVE_RANGE, Link, OWN_CLOSE, PROVEN, REMAKING, Session, Stream,
    UNSAFE_LIMIT,
    registrations::app_path,
    wire::{self, Incoming},
};
use crate::{
    action::HttpRequest,
    core::upstream::{
        IncomingBody, IncomingMessage, Output,
        quiet::hint,
        rest::{Fault, TOO_MANY_REQUESTS, fingerprint, is_plain, outcome},
        sse::{Item, Parser},
    },
    event::{HttpError, HttpResponse, LinkError, LinkId},
    model::FailureReason,
    time::Instant,
    view::LinkState,
};

impl Session {
    /// What came over the stream; the rest is left when one of it ends the link.
    pub(super) fn items(&mut self, link: LinkId, items: Vec<Item>, now: Instant) {
        for item in items {
            let Link::Stream(stream) = &mut self.link else { return };
            if stream.id != link {
                return;
            }
            if stream.started.is_none() {
                stream.started = Some(now);
                self.link_trouble = None;
                self.taken_over = false;
                self.tell_moved();
            }
            let incoming = match item {
                Item::Event(event) => wire::read(event),
                Item::TooLarge { id } => {
                    // It would come again for ever.
                    if let Some(id) = id.filter(|id| wire::is_id(id)) {
                        self.deletions.add(wire::message_path(&id));
                    }
                    Err(format!("larger than {EVENT_LIMIT} bytes"))
                }
            };
            match incoming {
                Ok(incoming) => self.event(incoming, now),
                Err(reason) => {
                    let what = format_args!("the server sent an event that cannot be read ({reason}); ignored");
                    self.quiet_events.warn(what, now);
                }
            }
        }
    }

    fn event(&mut self, incoming: Incoming, now: Instant) {
        let Link::Stream(stream) = &mut self.link else { return };
        match incoming {
            Incoming::Alive => {}
            Incoming::Keepalive(secs) => {
                stream.keepalive = Duration::from_secs(secs.clamp(KEEPALIVE_RANGE.0, KEEPALIVE_RANGE.1));
            }
            Incoming::Message { token, body, id } => self.message(&token, body, id, now),
            Incoming::Deleted { token } => {
                // Also comes for what this client deleted itself, and is nobody's then.
                if let Some(registration) = self.registrations.of(&token) {
                    self.registrations.remove(registration);
                    self.unsafe_messages.retain(|(whose, _), _| *whose != registration);
                    let text = "it was deleted in Nextcloud's settings".to_owned();
                    self.outputs.push_back(Output::Lost { registration, text });
                }
            }
            Incoming::Close => self.told_to_close(now),
            Incoming::Warning(text) => {
                let what = format_args!(
                    "the server warns: {text}; a proxy in front of it may end connections sooner than its keepalive"
                );
                self.quiet_events.warn(what, now);
            }
        }
    }

    fn message(&mut self, token: &str, body: IncomingBody, server_id: Option<String>, now: Instant) {
        self.backoff.succeeded();
        self.has_ids |= server_id.is_some();
        let Some(registration) = self.registrations.of(token) else {
            let what = format_args!("a message for the unknown registration {}…: dropped", hint(token));
            self.quiet_unknown.warn(what, now);
            if let Some(id) = server_id {
                self.deletions.add(wire::message_path(&id));
            }
            if is_plain(token) {
                // Devices are one client's own, so it is one that this client has given up.
                self.deletions.add(app_path(token));
            }
            return;
        };
        let id: Arc<str> = match server_id {
            Some(server_id) => {
                let id: Arc<str> = format!("{:016x}-{server_id}", fingerprint(token.as_bytes())).into();
                let key = (registration, Arc::clone(&id));
                if self.unsafe_messages.len() >= UNSAFE_LIMIT && !self.unsafe_messages.contains_key(&key) {
                    self.unsafe_messages.clear();
                    self.close("too many messages wait to be stored", now);
                    self.backoff.failed(None, now, &mut self.rng);
                    return;
                }
                self.unsafe_messages.insert(key, server_id);
                id
            }
            None => {
                self.count += 1;
                format!("{:016x}-{}", self.nonce, self.count).into()
            }
        };
        self.outputs.push_back(Output::Message(IncomingMessage {
            registration,
            id,
            body,
            expires: None,
            topic: None,
            urgency: None,
        }));
    }

    fn told_to_close(&mut self, now: Instant) {
        let Link::Stream(stream) = &self.link else { return };
        let early = stream.started.is_none_or(|started| now.since(started) < OWN_CLOSE);
        self.early_closes = if early { self.early_closes.saturating_add(1) } else { 0 };
        let first = self.early_closes == 1;
        let why = "another connection took this device over: is this configuration in use on a second machine?";
        self.close(why, now);
        if first {
            self.backoff.failed(None, now, &mut self.rng);
        } else {
            self.taken_over = true;
            self.link_trouble = Some(why.into());
            self.backoff.refused(now, &mut self.rng);
        }
    }

    /// The stream ended well, which it never should.
    pub(super) fn ended(&mut self, now: Instant) {
        let Link::Stream(stream) = &self.link else { return };
        let (wish, started) = (stream.parser.retry(), stream.started.is_some());
        self.link_ended("the server, or a proxy in front of it, ended the event stream", now);
        if !started {
            self.last_error = Some("the server ended the event stream without an event".into());
        }
        self.backoff.failed(wish, now, &mut self.rng);
    }

    pub(super) fn failed(&mut self, error: &LinkError, now: Instant) {
        self.link_ended(&error.to_string(), now);
        match error {
            LinkError::Http { status: 401 | 403 | 404 | 410, body, .. } if wire::says_no(body) => {
                self.forgotten(now);
            }
            LinkError::Http { status: 404 | 410, .. } => {
                let ticket = self.links.take_request();
                let request = HttpRequest { method: "GET", path: String::new(), json: None, limit: ANSWER_LIMIT };
                self.outputs.push_back(Output::Http(ticket, request));
                self.link = Link::Asking { ticket, asked: now };
            }
            LinkError::Http { status: status @ (401 | 403), .. } => {
                let text = refusal(*status);
                self.fail_waiting(FailureReason::ActionRequired, &text);
                self.link_trouble = Some(text.into());
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

    /// The app that did not know the device has said whether it is there.
    pub(super) fn told_of_app(&mut self, result: Result<HttpResponse, HttpError>, now: Instant) {
        self.link = Link::Down;
        match outcome(result) {
            Ok(body) if wire::says_yes(&body) => self.forgotten(now),
            Err(Fault::Credentials(status)) => self.refused(status, now),
            Ok(_) | Err(_) => {
                self.last_error = Some("there is no uppush at this URL, or it is just being updated".into());
                self.backoff.failed(None, now, &mut self.rng);
            }
        }
    }

    /// The server knows nothing of the device. It is kept in the store until there is another.
    pub(super) fn forgotten(&mut self, now: Instant) {
        log::warn!("the server has forgotten this device: a new one is made, and every registration");
        self.close("the server has forgotten this device", now);
        self.device = None;
        self.unsafe_messages.clear();
        self.backoff.failed(None, now, &mut self.rng);
    }

    /// The answer to the request for a device.
    pub(super) fn created(&mut self, result: Result<HttpResponse, HttpError>, now: Instant) {
        self.link = Link::Down;
        match outcome(result).map(|body| wire::device(&body)) {
            Ok(Some(device)) => {
                self.remaking = self.registrations.any_existing();
                self.mixed = false;
                let mark = if self.remaking { REMAKING } else { "" };
                self.outputs.push_back(Output::Remember { key: "device", value: format!("{mark}{device}") });
                self.device = Some(device.into());
                self.registrations.make_all_again(now);
                self.trouble = None;
                self.connect(now);
            }
            Ok(None) => self.not_created("the server's answer names no device", None, now),
            Err(Fault::Credentials(status)) => {
                self.last_error = Some(format!("the server answered {status}").into());
                self.refused(status, now);
            }
            Err(Fault::Busy(status, wish)) => self.not_created(&format!("the server answered {status}"), wish, now),
            Err(Fault::Unreachable(text)) => self.not_created(&text, None, now),
            Err(Fault::Refused(text)) => {
                let text = format!(
                    "the server made no device ({text}): the URL must end in index.php/apps/uppush/, and the app be \
                     installed"
                );
                self.trouble(&text, now);
                self.fail_waiting(FailureReason::ActionRequired, &text);
                self.not_created(&text, None, now);
            }
        }
    }

    fn not_created(&mut self, why: &str, wish: Option<Duration>, now: Instant) {
        self.last_error = Some(why.into());
        self.backoff.failed(wish, now, &mut self.rng);
    }

    /// Only the user can mend this.
    pub(super) fn refused(&mut self, status: u16, now: Instant) {
        let text = refusal(status);
        self.trouble(&text, now);
        self.fail_waiting(FailureReason::ActionRequired, &text);
        self.backoff.refused(now, &mut self.rng);
    }

    pub(super) fn trouble(&mut self, text: &str, now: Instant) {
        self.trouble = Some(text.into());
        self.trouble_since = now;
    }

    /// Closes the link from this side, whatever it is.
    pub(super) fn close(&mut self, why: &str, now: Instant) {
        match &self.link {
            Link::Down => {}
            Link::Creating { .. } | Link::Asking { .. } => self.link_ended(why, now),
            Link::Stream(stream) => {
                let id = stream.id;
                self.drop_link(id, why, now);
            }
        }
    }

    pub(super) fn drop_link(&mut self, id: LinkId, why: &str, now: Instant) {
        self.outputs.push_back(Output::Close(id));
        self.link_ended(why, now);
    }

    pub(super) fn link_ended(&mut self, why: &str, now: Instant) {
        let lived = match &self.link {
            Link::Stream(stream) => stream.started.map(|started| now.since(started)).unwrap_or_default(),
            Link::Down | Link::Creating { .. } | Link::Asking { .. } => Duration::ZERO,
        };
        if lived >= PROVEN {
            self.backoff.succeeded();
        }
        if lived >= OWN_CLOSE {
            self.early_closes = 0;
        }
        self.last_error = Some(why.into());
        self.link = Link::Down;
    }

    /// Does whatever has become due; every door ends here.
    pub(super) fn settle(&mut self, now: Instant) {
        self.expire(now);
        if self.registrations.is_empty() {
            self.retire();
        } else if self.allowed {
            self.tell_urgency(now);
            self.connect_if_due(now);
            self.send_requests(now);
        } else {
            self.backoff.clear();
        }
        self.send_deletions(now);
        self.finish_remaking();
        let state = match &self.link {
            _ if !self.allowed => LinkState::Off,
            Link::Stream(stream) if stream.started.is_some() => LinkState::Online,
            Link::Creating { .. } | Link::Asking { .. } | Link::Stream(_) => LinkState::Connecting,
            Link::Down if self.registrations.is_empty() => LinkState::Idle,
            Link::Down => LinkState::Waiting,
        };
        self.set_state(state, now);
    }

    fn set_state(&mut self, state: LinkState, now: Instant) {
        if state != self.state {
            self.state = state;
            self.since = now;
            self.outputs.push_back(Output::StateChanged(state));
        }
    }

    fn tell_urgency(&mut self, now: Instant) {
        if self.urgency_due().is_some_and(|at| at <= now) {
            self.close("connected anew to tell the server the urgency", now);
            self.backoff.at_once(now);
        }
    }

    /// Nobody needs the link any more.
    fn retire(&mut self) {
        if let Link::Stream(stream) = &self.link {
            self.outputs.push_back(Output::Close(stream.id));
        }
        self.link = Link::Down;
        self.unsafe_messages.clear();
        self.backoff.clear();
        self.taken_over = false;
        self.early_closes = 0;
    }

    fn connect_if_due(&mut self, now: Instant) {
        if !matches!(self.link, Link::Down) {
            return;
        }
        match self.backoff.retry_at() {
            Some(at) if at > now => {}
            Some(_) => self.connect(now),
            None => self.backoff.failed(None, now, &mut self.rng),
        }
    }

    /// The next step to a stream.
    fn connect(&mut self, now: Instant) {
        self.backoff.clear();
        match &self.device {
            None => {
                let ticket = self.links.take_request();
                let request = HttpRequest {
                    method: "PUT",
                    path: "device/".into(),
                    json: Some(wire::device_request()),
                    limit: ANSWER_LIMIT,
                };
                self.outputs.push_back(Output::Http(ticket, request));
                self.link = Link::Creating { ticket, asked: now };
            }
            Some(device) => {
                let id = self.links.take();
                let headers = vec![("urgency", self.urgency.as_str().to_owned())];
                self.outputs.push_back(Output::Connect { link: id, path: format!("device/{device}"), headers });
                self.link = Link::Stream(Box::new(Stream {
                    id,
                    asked: now,
                    open: false,
                    started: None,
                    heard: now,
                    keepalive: KEEPALIVE,
                    proof_by: None,
                    urgency: self.urgency,
                    parser: Parser::new(EVENT_LIMIT),
                }));
            }
        }
        self.set_state(LinkState::Connecting, now);
    }
}

/// What the user can do about it.
pub(super) fn refusal(status: u16) -> String {
    format!("the server refuses the credentials ({status}): mend them in the configuration")
}
