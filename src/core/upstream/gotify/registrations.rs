//! The registrations of a session: asked for, answered and given up.

use std::{collections::HashMap, sync::Arc};

use super::{ANSWER_LIMIT, Link, Phase, Session, wire};
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
pub(super) fn application_path(application: u64) -> String {
    format!("application/{application}")
}

impl Session {
    /// The answer to a request for an application, or to one that was given up.
    pub(super) fn application_answer(
        &mut self,
        ticket: HttpTicket,
        result: Result<HttpResponse, HttpError>,
        now: Instant,
    ) {
        let made = outcome(result).map(|body| wire::application(&body));
        let registration = match self.registrations.whose(ticket) {
            Whose::Registration(registration) => registration,
            Whose::Nobody => {
                // Made after it was given up.
                if let Ok(Some(channel)) = made
                    && let Some((application, _)) = wire::split(&channel)
                {
                    self.deletions.add(application_path(application));
                }
                return;
            }
            Whose::Other => return,
        };
        let fault = match made {
            Ok(Some(channel)) => match self.endpoint(&channel).filter(|endpoint| usable_endpoint(endpoint)) {
                Some(endpoint) => return self.made(registration, channel, endpoint.into()),
                None => Fault::Refused("its endpoint is too long".into()),
            },
            Ok(None) => Fault::Refused("its answer names no application".into()),
            Err(Fault::Credentials(status)) => return self.refused(status, now),
            Err(fault) => fault,
        };
        log::info!("a registration was not made ({fault:?}); it is tried again");
        self.registrations.is_refused(registration, fault, now, &mut self.rng);
    }

    fn made(&mut self, registration: RegistrationId, channel: Arc<str>, endpoint: Arc<str>) {
        if let Some((application, _)) = wire::split(&channel) {
            self.applications.insert(application, registration);
        }
        let old = self.registrations.is_made(registration, Arc::clone(&channel), Arc::clone(&endpoint));
        if let Some((application, _)) = old.as_deref().and_then(wire::split)
            && self.applications.get(&application) == Some(&registration)
            && wire::split(&channel).is_none_or(|(new, _)| new != application)
        {
            self.applications.remove(&application);
        }
        self.trouble = None;
        self.outputs.push_back(Output::Registered { registration, channel, endpoint });
    }

    /// The list of the server's applications: those of ours that are not there are made anew.
    pub(super) fn list(&mut self, result: Result<HttpResponse, HttpError>, now: Instant) {
        let Link::Online(online) = &mut self.link else { return };
        online.phase = Phase::Live;
        let list = match outcome(result).and_then(|body| wire::applications(&body).map_err(Fault::Refused)) {
            Ok(list) => list,
            Err(Fault::Credentials(status)) => return self.refused(status, now),
            Err(fault) => {
                log::info!("the list of applications could not be had ({fault:?}); it is looked at another time");
                return;
            }
        };
        self.looked_at = Some(now);
        let there: HashMap<u64, Option<String>> = list.into_iter().collect();
        let is_there = |channel: &str| {
            wire::split(channel).is_some_and(|(application, token)| match there.get(&application) {
                None => false,
                Some(None) => true,
                Some(Some(shown)) => shown == token,
            })
        };
        let gone: Vec<_> = self
            .registrations
            .made()
            .filter(|(_, entry)| !is_there(&entry.channel))
            .map(|(registration, _)| registration)
            .collect();
        if !gone.is_empty() {
            log::warn!("{} applications were deleted at the server: they are made anew", gone.len());
        }
        for registration in gone {
            self.registrations.make_again(registration, now);
        }
    }

    pub(super) fn send_requests(&mut self, now: Instant) {
        if !self.can_register() {
            return;
        }
        while let Some(registration) = self.registrations.next(now) {
            let request = HttpRequest {
                method: "POST",
                path: "application".into(),
                json: Some(wire::application_request(registration.0)),
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

    /// The endpoints' form is another than it was, so the endpoints are. Told once there is a link.
    pub(super) fn tell_moved(&mut self) {
        let moved: Vec<_> = self
            .registrations
            .made()
            .filter_map(|(registration, entry)| {
                let endpoint = self.endpoint(&entry.channel).filter(|endpoint| usable_endpoint(endpoint))?;
                (*entry.endpoint != endpoint).then(|| (registration, Arc::clone(&entry.channel), endpoint.into()))
            })
            .collect();
        for (registration, channel, endpoint) in moved {
            let endpoint: Arc<str> = endpoint;
            self.registrations.is_made(registration, Arc::clone(&channel), Arc::clone(&endpoint));
            self.outputs.push_back(Output::Registered { registration, channel, endpoint });
        }
    }

    fn tell(&mut self, failures: Vec<Failure>) {
        for Failure { registration, reason, text } in failures {
            self.outputs.push_back(Output::RegisterFailed { registration, reason, text });
        }
    }

    fn endpoint(&self, channel: &str) -> Option<String> {
        let (_, token) = wire::split(channel)?;
        Some(self.template.replace("{channel}", token))
    }
}
