//! What the parts of the core want of one another and of the world. They do not know one another; they meet here, in two
//! places: delivery asks for an app to be made ready, and a pending delivery vetoes freezing it.

use std::sync::Arc;

use super::{
    Core, Stored,
    delivery::{self, Admission, Arrival, ArrivalBody, Handover},
    lifecycle,
    upstream::{self, IncomingBody, IncomingMessage},
    urgency::Minimum,
};
use crate::{
    action::{Action, ConnectorCall, StoreOp},
    model::{Bus, Ending, RegistrationId, TargetId, Urgency},
    notification::HelperJob,
    time::Now,
    view::{LinkState, Messages},
};

impl Core {
    /// Lets the parts talk until all are quiet.
    pub(super) fn pump(&mut self, now: Now) {
        loop {
            let session = self
                .upstreams
                .iter_mut()
                .enumerate()
                .find_map(|(index, upstream)| upstream.session.poll_output().map(|output| (index, output)));
            if let Some((index, output)) = session {
                self.on_upstream(index, output, now);
            } else if let Some(output) = self.leases.poll_output() {
                self.on_leases(output, now);
            } else if let Some(output) = self.lifecycle.poll_output() {
                // Before delivery's: an app is thawed before it is called.
                self.on_lifecycle(output, now);
            } else if let Some(output) = self.delivery.poll_output() {
                self.on_delivery(output, now);
            } else if let Some(output) = self.transfers.poll_output() {
                self.on_transfers(output, now);
            } else if !self.settle_moves(now)
                && !self.brief_sessions(now)
                && !self.hand_over_held(now)
                && !self.wake_next(now)
                && !self.mind_stand_ins(now)
            {
                self.observe_leased(now);
                if !self.leases.has_output() {
                    break;
                }
            }
        }
        self.keep_books(now);
        self.mind_sleep(now);
        self.release_held();
        self.say_farewells(now);
        let answered = self.answers_until.is_none() || self.delivery.is_quiet();
        if self.ending.is_some() && answered && self.lifecycle.is_quiet() {
            self.exit(now);
        }
    }

    fn on_upstream(&mut self, index: usize, output: upstream::Output, now: Now) {
        let Some(upstream) = self.upstreams.get(index) else { return };
        let name = Arc::clone(&upstream.settings.name);
        match output {
            upstream::Output::Connect { link, path, headers } => {
                self.actions.push_back(Action::Connect { link, upstream: name, path, headers });
            }
            upstream::Output::Send(link, text) => self.actions.push_back(Action::Send(link, text)),
            upstream::Output::SendBytes(link, bytes) => self.actions.push_back(Action::SendBytes(link, bytes)),
            upstream::Output::Http(ticket, request) => {
                self.actions.push_back(Action::Http { ticket, upstream: name, request });
            }
            upstream::Output::Ping(link) => self.actions.push_back(Action::Ping(link)),
            upstream::Output::Close(link) => self.actions.push_back(Action::Close(link)),
            upstream::Output::Registered { registration, channel, endpoint } => {
                self.registered(index, registration, channel, endpoint, now);
                self.count_beats(now);
            }
            upstream::Output::RegisterFailed { registration, reason, text } => {
                self.register_failed(index, registration, reason, text, now);
            }
            upstream::Output::Lost { registration, text } => self.registration_lost(index, registration, &text, now),
            upstream::Output::Message(message) => {
                if let Some(message) = self.hold_nameless(index, message) {
                    self.on_message(index, message, now);
                }
            }
            upstream::Output::Remember { key, value } => {
                self.remember(index, key, value.into());
            }
            upstream::Output::RememberBehind { key, value } => self.remember_behind(index, key, value.into()),
            upstream::Output::StateChanged(state) => {
                self.panels_changed(index);
                self.count_beats(now);
                match state {
                    LinkState::Idle => log::info!("upstream {name}: idle, no app is registered"),
                    LinkState::Connecting => log::debug!("upstream {name}: connecting"),
                    LinkState::Online => {
                        log::info!("upstream {name}: online");
                        self.routes.try_again(now);
                    }
                    LinkState::Waiting => log::info!("upstream {name}: waiting to reconnect"),
                    LinkState::Off => log::info!("upstream {name}: kept from connecting while roaming"),
                }
            }
        }
    }

    pub(super) fn on_message(&mut self, index: usize, message: IncomingMessage, now: Now) {
        let latest = now.wall + self.settings.limits.max_age;
        let registration = message.registration;
        let from = self.registry.get(registration).and_then(|registration| self.lifecycle.outward(&registration.app));
        let by_policy = message.urgency.is_none();
        let urgency = message.urgency.unwrap_or_else(|| self.counts_as(registration));
        let arrival = Arrival {
            registration: message.registration,
            id: message.id,
            body: match message.body {
                IncomingBody::Bytes(bytes) => ArrivalBody::Bytes(bytes),
                IncomingBody::Attachment { url, size } => ArrivalBody::Attachment { url, size },
                IncomingBody::Undecodable(why) => ArrivalBody::Undecodable(why),
            },
            expires: message.expires.map_or(latest, |expires| expires.min(latest)),
            topic: message.topic,
            urgency,
            by_policy,
            from: from.map_or("gone", |outward| outward.state.as_str()),
        };
        match self.delivery.arrived(arrival, now) {
            Admission::Queued => {
                self.count(registration).received += 1;
                self.message_waits(registration, urgency, now);
                if let Some(registration) = self.registry.get(registration) {
                    self.journal.received(registration.app.bus);
                }
                if by_policy {
                    self.note_policy(registration, urgency, now);
                }
            }
            Admission::Duplicate => self.count(registration).duplicates += 1,
            Admission::Unusable => self.count(registration).unusable += 1,
            Admission::NoRoom => {
                let name = self.upstreams.get(index).map(|upstream| &*upstream.settings.name).unwrap_or_default();
                log::debug!("upstream {name}: a message is left at the server until the disk can be written");
            }
        }
    }

    /// What is counted for the bus that the registration is on; one that is gone counts for nobody else.
    fn count(&mut self, registration: RegistrationId) -> &mut Messages {
        let bus = self.registry.get(registration).map_or(Bus::System, |registration| registration.app.bus);
        self.messages.entry(bus).or_default()
    }

    fn on_delivery(&mut self, output: delivery::Output, now: Now) {
        match output {
            delivery::Output::Persist(message) => {
                let seq = message.seq;
                self.store(StoreOp::PutMessage(message), Some(Stored::Message(seq)));
            }
            delivery::Output::End(app, seq, ending) => {
                if ending == Ending::GivenUp {
                    self.stand_in.given_up(&app);
                }
                self.messages.entry(app.bus).or_default().ended(ending);
                if ending != Ending::Unregistered {
                    self.store(StoreOp::EndMessage(seq, ending), None);
                }
            }
            delivery::Output::LoadBody(seq) => self.store(StoreOp::LoadBody(seq), None),
            delivery::Output::Fetch { ticket, registration, url } => {
                if let Some(upstream) = self.upstream_behind(registration, &url) {
                    let limit = u32::try_from(delivery::MESSAGE_MAX).unwrap_or(u32::MAX);
                    self.actions.push_back(Action::Fetch { ticket, upstream, url, limit });
                }
            }
            delivery::Output::Safe(registration, id) => {
                // Which of them it came from is known to that one alone.
                for index in self.upstreams_of(registration) {
                    if let Some(upstream) = self.upstreams.get_mut(index) {
                        upstream.session.safe(registration, &id, now);
                    }
                }
            }
            delivery::Output::Wake(app, urgency) => self.want(&app, urgency, now),
            delivery::Output::Help { seq, app, token, id, urgency, body } => {
                let command = Arc::default();
                self.ask_helper(HelperJob { seq, app, command, network: false, token, id, urgency, body }, now);
            }
            delivery::Output::Call { ticket, app, owner, version, call, urgency } => {
                if urgency == Some(Urgency::High) {
                    self.judge_from_now(&app, now);
                }
                let call = match call {
                    Handover::Message { token, id, body } => ConnectorCall::Message { token, body, id },
                    Handover::Endpoint { token, endpoint } => ConnectorCall::NewEndpoint { token, endpoint },
                };
                self.actions.push_back(Action::Call { ticket, app, owner, version, call });
            }
            delivery::Output::EndpointTold(registration, endpoint) => {
                // It may have moved while the call was under way.
                if let Some(registration) = self.registry.get_mut(registration)
                    && registration.endpoint == endpoint
                    && !std::mem::replace(&mut registration.told, true)
                {
                    let id = registration.id;
                    let op = StoreOp::PutRegistration(registration.clone());
                    self.store(op, None);
                    self.former_routes_fade(id, now);
                }
            }
            delivery::Output::Reached { app, from, took, urgency } => self.reached(&app, from, took, urgency, now),
            delivery::Output::Delivered(app, urgency) => self.delivered(&app, urgency, now),
            delivery::Output::Pending(app, pending) => self.pending(&app, pending, now),
            delivery::Output::Held { app, urgency, why: delivery::Why::Budget, .. } => {
                self.lifecycle.note(&app, "hold", Minimum::hold_for_budget(urgency), now);
            }
            delivery::Output::Held { why: delivery::Why::Helper, .. } => {}
            delivery::Output::Held { app, urgency, by_policy, why: delivery::Why::Surroundings } => {
                let own = self.delivery.has_own_minimum(&app).then(|| self.delivery.minimum_for(&app));
                let reason = self.minimum().hold(urgency, by_policy, own, self.settings.urgency.hold_at_most);
                self.lifecycle.note(&app, "hold", reason, now);
            }
            delivery::Output::Released { app, count, why } => {
                let reason = self.minimum().release(why, count, self.settings.urgency.hold_at_most);
                self.lifecycle.note(&app, "release", reason, now);
            }
            delivery::Output::Note(app, verdict, reason) => {
                self.lifecycle.note(&app, verdict, reason, now);
            }
        }
    }

    /// The upstream of the registration whose server the URL is on: its credentials are for that server alone.
    fn upstream_behind(&self, registration: RegistrationId, url: &str) -> Option<Arc<str>> {
        let known = self.upstreams_of(registration);
        let known = || known.iter().filter_map(|index| self.upstreams.get(*index));
        let found = known().find(|upstream| url.starts_with(&upstream.settings.http_url()));
        found.or_else(|| known().next()).map(|upstream| Arc::clone(&upstream.settings.name))
    }

    fn on_lifecycle(&mut self, output: lifecycle::Output, now: Now) {
        match output {
            lifecycle::Output::Freeze(target) => {
                self.call_off(target, now);
                self.actions.push_back(Action::Freeze(target));
            }
            lifecycle::Output::Thaw(target) => self.actions.push_back(Action::Thaw(target)),
            lifecycle::Output::PageOut(target) => self.actions.push_back(Action::PageOut(target)),
            lifecycle::Output::Kill { target, grace } => {
                self.call_off(target, now);
                self.actions.push_back(Action::Kill { target, grace });
            }
            lifecycle::Output::Inspect(target) => self.actions.push_back(Action::Inspect(target)),
            lifecycle::Output::WillSuspend(app, within) => self.will_suspend(app, within, now),
            lifecycle::Output::Resumed(app, frozen) => self.resumed(app, frozen),
            lifecycle::Output::Forget(target) => {
                self.samples.remove(&target);
                self.report_target_done(target, now);
                self.actions.push_back(Action::Forget(target));
            }
            lifecycle::Output::Sample(target, kind) => self.sample_for_lifecycle(target, kind, now),
            lifecycle::Output::Runnable(app) => {
                if let Some(owner) = self.apps.get(&app).and_then(|presence| presence.owner.clone()) {
                    self.ready(&app, owner, now);
                }
            }
            lifecycle::Output::CommandDone(app, command, result) => self.command_done(&app, command, result),
            lifecycle::Output::Record { app, declares } => {
                if let Some(presence) = self.apps.get_mut(&app) {
                    presence.declares = declares;
                    self.put_record(&app);
                }
            }
            lifecycle::Output::Decided(app, decision) => {
                log::info!("{app}: {}: {}", decision.verdict, decision.reason);
                self.recent.push(app, decision);
            }
        }
    }

    /// No calls to an app that is about to be held still or ended.
    fn call_off(&mut self, target: TargetId, now: Now) {
        if let Some(app) = self.lifecycle.app_of(target).cloned() {
            self.delivery.unready(&app, now);
            self.transfers.unready(&app, now);
        }
    }
}
