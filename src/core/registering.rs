//! Register and Unregister (push.md §0), from the app's call to the endpoint in its hands.
//!
//! An app is told that it is registered only when the registration is durable: otherwise a crash would leave it with an
//! endpoint nobody listens at.

use std::sync::Arc;

use super::{
    Core, Presence, Stored, access,
    lifecycle::{Readiness, State},
    registry::{Pending, describe},
};
use crate::{
    action::{Action, ConnectorCall, Reply, StoreOp},
    event::{CallId, Caller, DeliveryTicket, StoreError, StoreTicket},
    model::{AppKey, ConnectorVersion, FailureReason, Owner, Registration, RegistrationId},
    notification::NotifyWhen,
    time::Now,
};

/// Calls that may wait for one registration; an app that asks again and again before the answer is told to wait.
const CALLS: usize = 8;
/// For calls whose outcome nobody waits for.
const NO_TICKET: DeliveryTicket = DeliveryTicket(0);

/// Apps that may wait to be told; beyond it the newest finds out when it registers at its next start.
const FAREWELLS: usize = 256;

/// A word to an instance whose registration is gone.
#[derive(Debug)]
pub(super) struct Farewell {
    app: AppKey,
    owner: Owner,
    version: ConnectorVersion,
    token: Arc<str>,
}

/// What an app wants registered.
pub(super) struct Wish {
    pub(super) service: Arc<str>,
    pub(super) token: Arc<str>,
    pub(super) description: Arc<str>,
    pub(super) vapid: Option<Arc<str>>,
    pub(super) version: ConnectorVersion,
    /// The upstream it asks for, by name.
    pub(super) upstream: Option<Arc<str>>,
    /// When the user is to be notified in its stead.
    pub(super) notify: Option<NotifyWhen>,
}

impl Core {
    pub(super) fn register(&mut self, call: CallId, caller: &Caller, wish: Wish, now: Now) {
        if !access::may_register(caller, &wish.service) {
            log::warn!("{} may not register {}: it does not own that name", describe(caller), wish.service);
            let text = format!("{} is not a name this caller owns", wish.service);
            self.fail(call, FailureReason::Unauthorized, text);
            return;
        }
        if let Some(name) = &wish.upstream
            && self.upstream_named(name, caller.bus).is_none()
        {
            let text = format!("no upstream is called \"{}\"; `nightporter status` lists them", name.escape_debug());
            self.fail(call, FailureReason::ActionRequired, text);
            return;
        }
        let app = AppKey::new(caller.bus, Arc::clone(&wish.service));
        if let Some((_, pending)) = self.registry.pending_by_token(&app, &wish.token) {
            if pending.calls.len() >= CALLS {
                self.fail(call, FailureReason::InternalError, "this registration is being made already".into());
            } else {
                pending.calls.push(call);
            }
            return;
        }
        let known = self.registry.by_token(&app, &wish.token);
        match known.map(|known| (known.id, known.vapid == wish.vapid)) {
            Some((id, true)) => self.register_again(call, id, wish, now),
            known => self.register_new(call, app, wish, known.map(|(id, _)| id), now),
        }
    }

    /// The hot path: apps register at each start.
    fn register_again(&mut self, call: CallId, id: RegistrationId, wish: Wish, now: Now) {
        let Some(registration) = self.registry.get_mut(id) else { return };
        if registration.version != wish.version || registration.description != wish.description {
            registration.version = wish.version;
            registration.description = wish.description;
            let op = StoreOp::PutRegistration(registration.clone());
            self.delivery.version_changed(id, wish.version);
            self.store(op, None);
        }
        self.wish_upstream(id, wish.upstream);
        self.wish_notify(id, wish.notify);
        self.reply(call, Reply::Registered);
        if self.is_unsaved(id) {
            // It is told as soon as a crash cannot take the endpoint back.
            if let Some(registration) = self.registry.get_mut(id) {
                registration.told = false;
            }
            return;
        }
        if let Some(endpoint) = self.registry.get(id).map(|registration| Arc::clone(&registration.endpoint)) {
            self.delivery.endpoint_due(id, &endpoint, now);
        }
    }

    fn register_new(&mut self, call: CallId, app: AppKey, wish: Wish, replaces: Option<RegistrationId>, now: Now) {
        let limits = self.settings.limits;
        if self.registry.count() >= limits.registrations {
            let text = format!("{} registrations exist, which is the limit", limits.registrations);
            self.fail(call, FailureReason::ActionRequired, text);
            return;
        }
        if self.registry.count_of(&app) >= limits.registrations_per_app {
            let text = format!("{app} has {} registrations, which is the limit", limits.registrations_per_app);
            self.fail(call, FailureReason::ActionRequired, text);
            return;
        }
        let index = self.upstream_for(&app, wish.upstream.as_ref());
        let Some(upstream) = self.upstreams.get(index) else { return };
        if upstream.settings.require_vapid && wish.vapid.is_none() {
            let text = format!("the server \"{}\" takes registrations with a VAPID key only", upstream.settings.name);
            self.fail(call, FailureReason::VapidRequired, text);
            return;
        }
        let name = Arc::clone(&upstream.settings.name);
        let vapid = wish.vapid.clone();
        self.know_app(&app, now);
        let id = self.registry.begin(Pending {
            app,
            token: wish.token,
            description: wish.description,
            vapid: wish.vapid,
            version: wish.version,
            upstream: name,
            calls: vec![call],
            replaces,
        });
        self.wish_upstream(id, wish.upstream);
        self.wish_notify(id, wish.notify);
        if let Some(upstream) = self.upstreams.get_mut(index) {
            upstream.session.register(id, vapid, now);
        }
    }

    /// From now on the bus tells who owns the app's name.
    fn know_app(&mut self, app: &AppKey, now: Now) {
        if !self.apps.contains_key(app) {
            self.apps.insert(app.clone(), Presence::default());
            self.lifecycle.add_app(app, now);
            self.actions.push_back(Action::Watch(app.clone()));
        }
    }

    /// An upstream made a registration, or moved one.
    pub(super) fn registered(
        &mut self,
        index: usize,
        id: RegistrationId,
        channel: Arc<str>,
        endpoint: Arc<str>,
        now: Now,
    ) {
        if self.moved(index, id, &channel, &endpoint, now) || self.former_route_changed(index, id, &channel, &endpoint)
        {
            return;
        }
        self.identity_first(index);
        if let Some(pending) = self.registry.pending(id) {
            let registration = Registration {
                id,
                app: pending.app.clone(),
                token: Arc::clone(&pending.token),
                description: Arc::clone(&pending.description),
                vapid: pending.vapid.clone(),
                version: pending.version,
                upstream: Arc::clone(&pending.upstream),
                channel,
                endpoint,
                told: false,
            };
            // Its first message may come before the store has answered.
            self.introduce(&registration, now);
            self.registry.insert(registration.clone());
            self.store(StoreOp::PutRegistration(registration), Some(Stored::Registration(id)));
            return;
        }
        let Some(registration) = self.registry.get_mut(id) else { return };
        if registration.channel == channel && registration.endpoint == endpoint {
            return;
        }
        registration.channel = channel;
        registration.told &= registration.endpoint == endpoint;
        registration.endpoint = endpoint;
        let (app, told) = (registration.app.clone(), registration.told);
        let op = StoreOp::PutRegistration(registration.clone());
        self.store(op, Some(Stored::Registration(id)));
        if !told {
            self.lifecycle.note(&app, "endpoint", "its server gave it a new address", now);
        }
    }

    /// Gives the registration a queue; for an app new to delivery, with what the bus has said of it so far.
    fn introduce(&mut self, registration: &Registration, now: Now) {
        let first = !self.delivery.serves(&registration.app);
        self.delivery.add(registration);
        match self.apps.get(&registration.app) {
            Some(presence) if first && presence.known && presence.owner.is_some() => {
                self.delivery.appeared(&registration.app, now);
            }
            Some(presence) if first && presence.known => self.delivery.vanished(&registration.app, now),
            Some(_) | None => {}
        }
    }

    pub(super) fn registration_stored(
        &mut self,
        id: RegistrationId,
        ticket: StoreTicket,
        result: Result<(), StoreError>,
        now: Now,
    ) {
        if result.is_ok() && self.waits_for_identity(id, ticket) {
            return;
        }
        match (self.registry.take_pending(id), result) {
            (Some(pending), Ok(())) => {
                if let Some(old) = pending.replaces {
                    self.drop_registration(old, now);
                }
                for call in pending.calls {
                    self.reply(call, Reply::Registered);
                }
                log::info!("{}: registered with \"{}\"", pending.app, pending.upstream);
            }
            (Some(pending), Err(error)) => {
                for call in pending.calls {
                    let text = format!("the registration could not be written to the disk: {error}");
                    self.fail(call, FailureReason::InternalError, text);
                }
                self.drop_unstored(id, now);
                return;
            }
            (None, Err(_)) => {
                if self.registry.get(id).is_some() {
                    self.registration_refused(id, now);
                }
                return;
            }
            (None, Ok(())) => {}
        }
        self.routes.look_again();
        if let Some(registration) = self.registry.get(id)
            && !registration.told
        {
            let endpoint = Arc::clone(&registration.endpoint);
            self.delivery.endpoint_due(id, &endpoint, now);
        }
    }

    pub(super) fn register_failed(
        &mut self,
        index: usize,
        id: RegistrationId,
        reason: FailureReason,
        text: String,
        now: Now,
    ) {
        if self.move_refused(index, id, reason, &text, now) {
            return;
        }
        self.routes.forget(id);
        let Some(pending) = self.registry.take_pending(id) else { return };
        self.wish_notify(id, None);
        log::warn!("{}: not registered ({}): {text}", pending.app, reason.as_str());
        for call in pending.calls {
            self.fail(call, reason, text.clone());
        }
        self.forget_if_unused(&pending.app, now);
    }

    /// The server has dropped a registration for good: the app is told, so that it can register again.
    pub(super) fn registration_lost(&mut self, index: usize, id: RegistrationId, text: &str, now: Now) {
        if self.former_route_lost(index, id, now) {
            return;
        }
        let Some(registration) = self.registry.get(id).cloned() else { return };
        log::warn!("{}: its registration is lost: {text}", registration.app);
        self.tell_unregistered(&registration, Arc::clone(&registration.token), now);
        self.drop_registration(id, now);
    }

    pub(super) fn unregister(
        &mut self,
        call: CallId,
        caller: &Caller,
        token: &Arc<str>,
        version: ConnectorVersion,
        now: Now,
    ) {
        let owner = |app: &AppKey| self.apps.get(app).and_then(|presence| presence.owner.as_ref());
        let made = self.registry.with_token(token).find(|r| access::is_app(caller, &r.app, owner(&r.app))).cloned();
        let pending =
            self.registry.pending_with_token(token).find(|(_, p)| access::is_app(caller, &p.app, owner(&p.app)));
        let pending = pending.map(|(id, _)| id);
        self.reply(call, Reply::Done);
        if let Some(id) = pending
            && let upstreams = self.upstreams_of(id)
            && let Some(pending) = self.registry.take_pending(id)
        {
            for call in pending.calls {
                self.fail(call, FailureReason::InternalError, "the app unregistered meanwhile".into());
            }
            if self.registry.get(id).is_some() {
                self.drop_registration(id, now);
            } else {
                for index in upstreams {
                    self.unregister_at_server(index, id, now);
                }
                self.routes.forget(id);
                self.wish_notify(id, None);
            }
            self.forget_if_unused(&pending.app, now);
        }
        if let Some(registration) = made {
            log::info!("{}: unregistered", registration.app);
            // Version 1 confirms with an empty token; with a token it would mean a removal the app did not ask for.
            let confirmed = match version {
                ConnectorVersion::V1 => "".into(),
                ConnectorVersion::V2 => Arc::clone(token),
            };
            self.tell_unregistered(&registration, confirmed, now);
            self.drop_registration(registration.id, now);
        }
    }

    /// Only a running app is told: any other finds out when it registers at its next start.
    pub(super) fn tell_unregistered(&mut self, registration: &Registration, token: Arc<str>, now: Now) {
        let app = &registration.app;
        let Some(owner) = self.apps.get(app).and_then(|presence| presence.owner.clone()) else { return };
        if self.lifecycle.wanted(app, now) != Readiness::Ending && self.farewells.len() < FAREWELLS {
            self.farewells.push(Farewell { app: app.clone(), owner, version: registration.version, token });
        }
    }

    /// Tells those who can hear it; whoever is held still is thawed first.
    pub(super) fn say_farewells(&mut self, now: Now) {
        for farewell in std::mem::take(&mut self.farewells) {
            let presence = self.apps.get(&farewell.app);
            if presence.is_some_and(|presence| presence.owner.as_ref() != Some(&farewell.owner)) {
                continue;
            }
            let held = self.lifecycle.show(&farewell.app, now).is_some_and(|shown| {
                matches!(shown.state, State::Freezing | State::Frozen | State::Reclaimed | State::Ending)
            });
            if held {
                self.farewells.push(farewell);
                continue;
            }
            let Farewell { app, owner, version, token } = farewell;
            let call = ConnectorCall::Unregistered { token };
            self.actions.push_back(Action::Call { ticket: NO_TICKET, app, owner, version, call });
        }
    }

    /// Removes a registration everywhere: at its server last, when it cannot come back any more. One that came back to a
    /// server that had forgotten it would be told to its app as good.
    pub(super) fn drop_registration(&mut self, id: RegistrationId, now: Now) {
        let upstreams = self.upstreams_of(id);
        self.delivery.remove(id, now);
        let Some(registration) = self.registry.remove(id) else { return };
        self.delete_registration(id, upstreams);
        self.routes.forget(id);
        self.wish_notify(id, None);
        self.forget_if_unused(&registration.app, now);
        self.count_beats(now);
    }

    /// Removes a registration that never was durable.
    fn drop_unstored(&mut self, id: RegistrationId, now: Now) {
        for index in self.upstreams_of(id) {
            self.unregister_at_server(index, id, now);
        }
        self.routes.forget(id);
        self.wish_notify(id, None);
        self.delivery.remove(id, now);
        if let Some(registration) = self.registry.remove(id) {
            self.store(StoreOp::DeleteRegistration(id), None);
            self.forget_if_unused(&registration.app, now);
        }
    }

    pub(super) fn unregister_at_server(&mut self, index: usize, id: RegistrationId, now: Now) {
        if let Some(upstream) = self.upstreams.get_mut(index) {
            upstream.session.unregister(id, now);
        }
    }

    /// An app that is gone for good: its unique name will never come back.
    pub(super) fn forget_app(&mut self, app: &AppKey, now: Now) {
        for (id, pending) in self.registry.drop_pending_of(app) {
            self.routes.forget(id);
            self.wish_notify(id, None);
            if let Some(upstream) = self.upstreams.iter_mut().find(|u| u.settings.name == pending.upstream) {
                upstream.session.unregister(id, now);
            }
        }
        let ids: Vec<RegistrationId> = self.registry.of_app(app).map(|r| r.id).collect();
        for id in ids {
            self.drop_registration(id, now);
        }
        self.forget_if_unused(app, now);
    }

    fn forget_if_unused(&mut self, app: &AppKey, now: Now) {
        if self.registry.count_of(app) > 0 || self.apps.remove(app).is_none() {
            return;
        }
        self.leases.vanished(app, now.boot);
        self.lifecycle.remove_app(app, now);
        self.forget_books(app);
        self.pressure.forget(app);
        self.states.forget(app);
        self.transfers.forget(app, now);
        self.forget_shown(app);
        self.stand_in.forget(app);
        self.actions.push_back(Action::Unwatch(app.clone()));
        self.store(StoreOp::DeleteApp(app.clone()), None);
    }

    fn fail(&mut self, call: CallId, reason: FailureReason, text: String) {
        self.reply(call, Reply::RegisterFailed(reason, text));
    }
}
