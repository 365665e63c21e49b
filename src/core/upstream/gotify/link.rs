//! The link of a session: what comes over it, what was missed, and how it ends.

use std::sync::Arc;

use super::{
    LOOK_AGAIN, Link, Online, PAGE_LIMIT, PAGE_TIMEOUT, PROVEN, Phase, SUBSCRIBED, Session, UNSAFE_LIMIT,
    catch_up::{CatchUp, KEPT, Progress},
    wire::{self, Message},
};
use crate::{
    action::HttpRequest,
    core::upstream::{
        IncomingMessage, Output,
        backoff::Backoff,
        rest::{Fault, TOO_MANY_REQUESTS, fingerprint, outcome},
    },
    event::{HttpError, HttpResponse, LinkError, LinkId},
    model::FailureReason,
    time::Instant,
    view::LinkState,
};

/// Where a message is deleted.
pub(super) fn message_path(id: u64) -> String {
    format!("message/{id}")
}

impl Session {
    pub(super) fn open(&mut self, id: LinkId, now: Instant) {
        if matches!(self.link, Link::Online(_)) {
            return;
        }
        self.trouble = None;
        self.page_backoff = Backoff::default();
        self.link = Link::Online(Box::new(Online {
            id,
            since: now,
            heard: now,
            proof_by: None,
            phase: Phase::Pause { until: now + SUBSCRIBED },
            walk: CatchUp::new(self.known),
        }));
        self.tell_moved();
    }

    pub(super) fn frame(&mut self, text: &str, now: Instant) {
        let message = match wire::message(text) {
            Ok(message) => message,
            Err(reason) => {
                let what = format_args!("the server sent a frame that cannot be read ({reason}); ignored");
                self.quiet_frames.warn(what, now);
                return;
            }
        };
        let ours = self.applications.contains_key(&message.application);
        let Link::Online(online) = &mut self.link else { return };
        match online.phase {
            Phase::Pause { .. } | Phase::Page { .. } if ours => online.walk.wait(message),
            Phase::Pause { .. } | Phase::Page { .. } => {}
            Phase::List { .. } | Phase::Live => {
                // Live messages are new whatever their id: lower than a known one only if the server counts anew, or
                // if two were stored at the same time.
                let far_below = |known: u64| message.id.saturating_add(super::LAG) < known;
                self.known = match self.known {
                    Some(known) if far_below(known) => Some(message.id),
                    known => known.max(Some(message.id)),
                };
                if ours {
                    self.hand_on(message, now);
                }
            }
        }
    }

    fn hand_on(&mut self, message: Message, now: Instant) {
        let Some(registration) = self.applications.get(&message.application).copied() else { return };
        let Some(entry) = self.registrations.get(registration) else { return };
        let Message { id: server_id, body, urgency, .. } = message;
        if self.unsafe_messages.len() >= UNSAFE_LIMIT && !self.unsafe_messages.contains_key(&server_id) {
            self.known = self.last();
            self.unsafe_messages.clear();
            self.close("too many messages wait to be stored", now);
            self.backoff.failed(None, now, &mut self.rng);
            return;
        }
        let id: Arc<str> = format!("{:016x}-{server_id}", fingerprint(entry.channel.as_bytes())).into();
        self.backoff.succeeded();
        self.unsafe_messages.insert(server_id, (registration, Arc::clone(&id)));
        self.outputs.push_back(Output::Message(IncomingMessage {
            registration,
            id,
            body,
            expires: None,
            topic: None,
            urgency,
        }));
    }

    /// A page of stored messages came, or did not.
    pub(super) fn page(&mut self, result: Result<HttpResponse, HttpError>, now: Instant) {
        let too_large = matches!(result, Err(HttpError::Unusable(_)));
        let page = outcome(result).and_then(|body| wire::page(&body).map_err(Fault::Refused));
        let Link::Online(online) = &mut self.link else { return };
        let progress = match page {
            Ok(page) => {
                self.page_backoff.succeeded();
                self.page_backoff.clear();
                online.walk.page(page, |message| self.applications.contains_key(&message.application))
            }
            Err(_) if too_large && online.walk.shrink() => Progress::More,
            Err(_) if too_large => {
                log::warn!("a stored message is too large to be fetched: it and what is older are left at the server");
                online.walk.finish()
            }
            Err(fault) => return self.no_page(fault, now),
        };
        match progress {
            Progress::More => online.phase = Phase::Pause { until: now },
            Progress::Part(messages) => {
                online.phase = Phase::Pause { until: now };
                self.hand_on_all(messages, now);
            }
            Progress::Done(messages, newest) => {
                online.phase = Phase::Live;
                // Nothing stored says nothing, once what was safe is deleted.
                self.known = if newest == 0 { self.known.or(Some(0)) } else { Some(newest) };
                self.hand_on_all(messages, now);
                self.look(now);
            }
        }
    }

    fn hand_on_all(&mut self, messages: Vec<Message>, now: Instant) {
        for message in messages {
            if matches!(self.link, Link::Online(_)) {
                self.hand_on(message, now);
            }
        }
    }

    fn no_page(&mut self, fault: Fault, now: Instant) {
        let (text, wish) = match fault {
            Fault::Credentials(status) => return self.refused(status, now),
            Fault::Busy(status, wish) => (format!("it answered {status}"), wish),
            Fault::Refused(text) | Fault::Unreachable(text) => (text, None),
        };
        log::info!("stored messages could not be fetched ({text}); it is tried again");
        self.last_error = Some(format!("stored messages could not be fetched: {text}").into());
        self.page_backoff.failed(wish, now, &mut self.rng);
        if let Link::Online(online) = &mut self.link {
            online.phase = Phase::Pause { until: now };
        }
    }

    /// Goes on with what is done over a new link.
    fn catch_up(&mut self, now: Instant) {
        let Link::Online(online) = &mut self.link else { return };
        match online.phase {
            Phase::Live => {}
            Phase::Pause { until } => {
                let until = self.page_backoff.retry_at().unwrap_or(until);
                // What a walk brings must find room.
                let room = self.unsafe_messages.len() + 2 * KEPT <= UNSAFE_LIMIT;
                if until <= now && room {
                    let ticket = self.links.take_request();
                    let request =
                        HttpRequest { method: "GET", path: online.walk.path(), json: None, limit: PAGE_LIMIT };
                    self.outputs.push_back(Output::Http(ticket, request));
                    online.phase = Phase::Page { ticket, by: now + PAGE_TIMEOUT };
                } else if until <= now {
                    self.page_backoff.failed(None, now, &mut self.rng);
                }
            }
            Phase::Page { by, .. } if by <= now => {
                self.no_page(Fault::Unreachable("the server did not answer in time".into()), now);
            }
            // Looked at another time.
            Phase::List { by, .. } if by <= now => online.phase = Phase::Live,
            Phase::Page { .. } | Phase::List { .. } => {}
        }
    }

    /// Asks once in a while whether the applications are still there.
    fn look(&mut self, now: Instant) {
        let Link::Online(online) = &mut self.link else { return };
        let due = self.looked_at.is_none_or(|at| now.since(at) >= LOOK_AGAIN);
        if !due || self.registrations.made().next().is_none() {
            return;
        }
        let ticket = self.links.take_request();
        let request = HttpRequest { method: "GET", path: "application".into(), json: None, limit: super::LIST_LIMIT };
        self.outputs.push_back(Output::Http(ticket, request));
        online.phase = Phase::List { ticket, by: now + PAGE_TIMEOUT };
    }

    pub(super) fn closed(&mut self, code: Option<u16>, reason: &str, now: Instant) {
        let reason: String = reason.chars().filter(|c| !c.is_control()).take(80).collect();
        let text = match code {
            Some(code) => format!("the server closed the connection ({code} {reason})"),
            None => "the connection ended".to_owned(),
        };
        self.link_ended(&text, now);
        self.backoff.failed(None, now, &mut self.rng);
    }

    pub(super) fn failed(&mut self, error: &LinkError, now: Instant) {
        self.link_ended(&error.to_string(), now);
        match error {
            LinkError::Http { status: status @ (401 | 403), .. } => self.refused(*status, now),
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
    pub(super) fn refused(&mut self, status: u16, now: Instant) {
        let text = format!("the server refuses the client token ({status}): mend it in the configuration");
        self.close(&text, now);
        self.fail_waiting(FailureReason::ActionRequired, &text);
        self.trouble = Some(text.into());
        self.trouble_since = now;
        self.backoff.refused(now, &mut self.rng);
    }

    /// Closes the link from this side, whatever it is.
    pub(super) fn close(&mut self, why: &str, now: Instant) {
        let id = match &self.link {
            Link::Down => return,
            Link::Connecting { id, .. } => *id,
            Link::Online(online) => online.id,
        };
        self.drop_link(id, why, now);
    }

    pub(super) fn drop_link(&mut self, id: LinkId, why: &str, now: Instant) {
        self.outputs.push_back(Output::Close(id));
        self.link_ended(why, now);
    }

    pub(super) fn link_ended(&mut self, why: &str, now: Instant) {
        if let Link::Online(online) = &self.link
            && now.since(online.since) >= PROVEN
        {
            self.backoff.succeeded();
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
            self.catch_up(now);
            self.connect_if_due(now);
            self.send_requests(now);
        } else {
            self.backoff.clear();
        }
        self.send_deletions(now);
        let state = match &self.link {
            _ if !self.allowed => LinkState::Off,
            Link::Online(_) => LinkState::Online,
            Link::Connecting { .. } => LinkState::Connecting,
            Link::Down if self.registrations.is_empty() => LinkState::Idle,
            Link::Down => LinkState::Waiting,
        };
        self.set_state(state, now);
    }

    /// Nobody needs the link any more.
    fn retire(&mut self) {
        match &self.link {
            Link::Down => {}
            Link::Connecting { id, .. } => self.outputs.push_back(Output::Close(*id)),
            Link::Online(online) => self.outputs.push_back(Output::Close(online.id)),
        }
        self.link = Link::Down;
        self.unsafe_messages.clear();
        self.backoff.clear();
        // Nothing of ours is stored there any more, so the next walk need not look for any.
        self.known = None;
    }

    fn set_state(&mut self, state: LinkState, now: Instant) {
        if state != self.state {
            self.state = state;
            self.since = now;
            self.outputs.push_back(Output::StateChanged(state));
        }
    }

    fn connect_if_due(&mut self, now: Instant) {
        if !matches!(self.link, Link::Down) {
            return;
        }
        match self.backoff.retry_at() {
            Some(at) if at > now => {}
            Some(_) => {
                self.backoff.clear();
                let id = self.links.take();
                self.link = Link::Connecting { id, asked: now };
                self.outputs.push_back(Output::Connect { link: id, path: "stream".into(), headers: Vec::new() });
                self.set_state(LinkState::Connecting, now);
            }
            None => self.backoff.failed(None, now, &mut self.rng),
        }
    }
}
