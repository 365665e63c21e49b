//! The registrations of a session: asked for, answered and given up.

use std::sync::Arc;

use super::{ANSWER_LIMIT, Session, link::refusal, wire};
use crate::{
    action::HttpRequest,
    core::upstream::{
        Output,
        rest::{
            Fault, outcome,
            registrations::{Failure, Whose, usable_endpoint},
        },
    },
    event::{HttpError, HttpResponse, HttpTicket},
    model::{FailureReason, RegistrationId},
    time::Instant,
};

/// Where a registration is deleted.
pub(super) fn app_path(token: &str) -> String {
    format!("app/{token}")
}

impl Session {
    /// The answer to a request for a registration, or to one that was given up.
    pub(super) fn app_answer(&mut self, ticket: HttpTicket, result: Result<HttpResponse, HttpError>, now: Instant) {
        let registration = match self.registrations.whose(ticket) {
            Whose::Registration(registration) => registration,
            Whose::Nobody | Whose::Other => return self.late_answer(result),
        };
        let unknown_device =
            result.as_ref().is_ok_and(|answer| matches!(answer.status, 401..=410) && wire::says_no(&answer.body));
        let vapid = self.registrations.get(registration).is_some_and(|entry| entry.vapid.is_some());
        let bad_request = result.as_ref().is_ok_and(|answer| answer.status == 400);
        let fault = match outcome(result) {
            Ok(body) => match wire::token(&body) {
                Some(token) if usable_endpoint(&self.endpoint(&token)) => {
                    return self.made(registration, token.into());
                }
                Some(_) => Fault::Refused("its endpoint is too long".into()),
                None => Fault::Refused("its answer has no token".into()),
            },
            Err(fault) => fault,
        };
        if unknown_device {
            let fault = Fault::Unreachable("the server has forgotten this device".into());
            self.registrations.is_refused(registration, fault, now, &mut self.rng);
            if self.device.is_some() {
                self.forgotten(now);
            }
            return;
        }
        if bad_request {
            let text = match vapid {
                true => "the server refused the registration (400): the app's VAPID key is bad",
                false => "the server refused the registration (400)",
            };
            return self.refused_for_good(registration, text.to_owned());
        }
        if let Fault::Credentials(status) = fault {
            // Refused for all of them, so the others need not try.
            self.registrations.is_refused(registration, fault, now, &mut self.rng);
            let text = refusal(status);
            self.trouble(&text, now);
            self.fail_waiting(FailureReason::ActionRequired, &text);
            self.registrations.pause(now + super::TROUBLE_HOLDS);
            return;
        }
        log::info!("a registration was not made ({fault:?}); it is tried again");
        self.registrations.is_refused(registration, fault, now, &mut self.rng);
    }

    fn made(&mut self, registration: RegistrationId, channel: Arc<str>) {
        let endpoint: Arc<str> = self.endpoint(&channel).into();
        let old = self.registrations.is_made(registration, Arc::clone(&channel), Arc::clone(&endpoint));
        if self.mixed
            && let Some(old) = old
        {
            // Made under this device already, by a life that died before it could say so.
            self.deletions.add(app_path(&old));
        }
        self.trouble = None;
        self.outputs.push_back(Output::Registered { registration, channel, endpoint });
    }

    fn refused_for_good(&mut self, registration: RegistrationId, text: String) {
        let Some(entry) = self.registrations.remove(registration) else { return };
        self.outputs.push_back(match entry.is_fresh() {
            true => Output::RegisterFailed { registration, reason: FailureReason::InternalError, text },
            false => Output::Lost { registration, text },
        });
    }

    /// What a request made that was given up is not wanted any more.
    fn late_answer(&mut self, result: Result<HttpResponse, HttpError>) {
        let Ok(body) = outcome(result) else { return };
        if let Some(token) = wire::token(&body) {
            self.deletions.add(app_path(&token));
        } else if let Some(device) = wire::device(&body)
            && self.device.as_deref() != Some(device.as_str())
        {
            self.deletions.add(format!("device/{device}"));
        }
    }

    pub(super) fn send_requests(&mut self, now: Instant) {
        let Some(device) = self.device.clone().filter(|_| self.can_register()) else { return };
        while let Some(registration) = self.registrations.next(now) {
            let vapid = self.registrations.get(registration).and_then(|entry| entry.vapid.as_deref());
            let request = HttpRequest {
                method: "PUT",
                path: "app/".into(),
                json: Some(wire::app_request(&device, registration.0, vapid)),
                limit: ANSWER_LIMIT,
            };
            let ticket = self.links.take_request();
            self.registrations.sent(registration, ticket, now);
            self.outputs.push_back(Output::Http(ticket, request));
        }
    }

    pub(super) fn send_deletions(&mut self, now: Instant) {
        self.deletions.expire(now, &mut self.rng);
        if !self.allowed {
            return;
        }
        while let Some((ticket, request)) = self.deletions.next(now, &mut self.links) {
            self.outputs.push_back(Output::Http(ticket, request));
        }
    }

    /// Ends what has taken too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let trouble = self.trouble.clone();
        let failures = self.registrations.expire(trouble.as_deref(), now, &mut self.rng);
        self.tell(failures);
    }

    pub(super) fn fail_waiting(&mut self, reason: FailureReason, text: &str) {
        let failures = self.registrations.fail_waiting(reason, text);
        self.tell(failures);
    }

    /// The last of the old device's registrations is made: from now on they need not be made again.
    pub(super) fn finish_remaking(&mut self) {
        if self.remaking && self.device.is_some() && !self.registrations.remaking() {
            (self.remaking, self.mixed) = (false, false);
            let value = self.device.as_deref().unwrap_or_default().to_owned();
            self.outputs.push_back(Output::RememberBehind { key: "device", value });
        }
    }

    /// The base URL is another than it was: so are the endpoints. Told once the server has shown that it is the same.
    pub(super) fn tell_moved(&mut self) {
        let moved: Vec<_> = self
            .registrations
            .made()
            .filter(|(_, entry)| *entry.endpoint != *self.endpoint(&entry.channel))
            .map(|(registration, entry)| (registration, Arc::clone(&entry.channel)))
            .collect();
        for (registration, channel) in moved {
            let endpoint: Arc<str> = self.endpoint(&channel).into();
            self.registrations.is_made(registration, Arc::clone(&channel), Arc::clone(&endpoint));
            self.outputs.push_back(Output::Registered { registration, channel, endpoint });
        }
    }

    fn tell(&mut self, failures: Vec<Failure>) {
        for Failure { registration, reason, text } in failures {
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
        }
    }

    fn endpoint(&self, token: &str) -> String {
        format!("{}push/{token}", self.base)
    }
}
