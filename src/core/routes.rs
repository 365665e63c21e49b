//! Which upstream serves which app: what users, the configuration and apps themselves want, and moving from one to another.
//!
//! A registration that moves keeps its identity, and with it everything accepted for it. It is asked for at the new
//! upstream first; only when that has given an address does the old one become a *former route*, which goes on being
//! listened to: senders still know the old address until the app has told its server of the new one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::{Core, Stored};
use crate::{
    action::StoreOp,
    model::{AppKey, Bus, FailureReason, FormerRoute, Preference, RegistrationId, Snapshot},
    time::{Instant, Now, UnixTime},
};

/// How long a former route is listened to after the app was told of its new address: app servers take an address over when
/// the app next talks to them.
const FADING: Duration = Duration::from_secs(24 * 3600);
/// Before a move that failed for want of network is tried again; doubled each time.
const AGAIN: Duration = Duration::from_secs(300);
/// The longest of these pauses.
const AGAIN_AT_MOST: Duration = Duration::from_secs(3600);
/// Former routes of one registration; beyond it the oldest is given up.
const FORMER: usize = 4;
/// Preferences kept in all.
const PREFERENCES: usize = 2000;

/// Everything about upstreams that a registration itself does not say.
#[derive(Debug, Default)]
pub(super) struct Routes {
    former: BTreeMap<RegistrationId, Vec<FormerRoute>>,
    /// Asked for at that upstream, to move there.
    moving: BTreeMap<RegistrationId, usize>,
    failed: BTreeMap<RegistrationId, Failed>,
    /// What users want: for a bus, and for single apps on it.
    preferences: BTreeMap<(Bus, Option<Arc<str>>), Arc<str>>,
    /// What apps asked for at their latest registration.
    wishes: BTreeMap<RegistrationId, Arc<str>>,
    /// Something changed that may set registrations moving.
    due: bool,
}

/// A move that did not work out.
#[derive(Debug)]
struct Failed {
    target: Arc<str>,
    /// Until then it is left alone; `None` while it waits: only another wish changes anything.
    retry_at: Option<Instant>,
    waits: bool,
    pause: Duration,
}

impl Routes {
    /// What an earlier life left, but for what makes no sense any more.
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        let mut routes = Self { due: true, ..Self::default() };
        for route in &snapshot.former {
            routes.former.entry(route.registration).or_default().push(route.clone());
        }
        for Preference { bus, service, upstream } in &snapshot.preferences {
            routes.preferences.insert((*bus, service.clone()), Arc::clone(upstream));
        }
        routes
    }

    /// When a failed move is to be tried again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.failed.values().filter_map(|failed| failed.retry_at).min()
    }

    /// Whether any registration was reached over this upstream before.
    pub(super) fn leads_over(&self, upstream: &str) -> bool {
        self.former.values().flatten().any(|route| *route.upstream == *upstream)
    }

    /// The user's own upstream for the bus, if one was chosen.
    pub(super) fn preference_of_bus(&self, bus: Bus) -> Option<&Arc<str>> {
        self.preferences.get(&(bus, None))
    }

    /// The network is back, or a server: what failed for want of it is tried at once.
    pub(super) fn try_again(&mut self, now: Now) {
        for failed in self.failed.values_mut().filter(|failed| failed.retry_at.is_some()) {
            failed.retry_at = Some(now.boot);
        }
    }

    /// Looks at all registrations again at the next occasion.
    pub(super) const fn look_again(&mut self) {
        self.due = true;
    }

    /// The registration is gone.
    pub(super) fn forget(&mut self, id: RegistrationId) {
        self.wishes.remove(&id);
        self.failed.remove(&id);
        self.moving.remove(&id);
        self.former.remove(&id);
    }

    fn take_former(&mut self, id: RegistrationId, upstream: &str) -> Option<FormerRoute> {
        let routes = self.former.get_mut(&id)?;
        let at = routes.iter().position(|route| *route.upstream == *upstream)?;
        let route = routes.remove(at);
        if routes.is_empty() {
            self.former.remove(&id);
        }
        Some(route)
    }
}

impl Core {
    /// The upstream of that name, if there is one the bus may use.
    pub(super) fn upstream_named(&self, name: &str, bus: Bus) -> Option<usize> {
        let usable = |owner: Option<Bus>| owner.is_none_or(|owner| owner == bus);
        self.upstreams.iter().position(|upstream| *upstream.settings.name == *name && usable(upstream.owner))
    }

    /// Where a new registration of the app goes, `wish` being what the app itself asked for.
    pub(super) fn upstream_for(&self, app: &AppKey, wish: Option<&Arc<str>>) -> usize {
        self.wanted_upstream(app).or_else(|| self.upstream_named(wish?, app.bus)).unwrap_or(0)
    }

    /// The upstream the user, or else the configuration, wants for the app.
    fn wanted_upstream(&self, app: &AppKey) -> Option<usize> {
        let preferences = &self.routes.preferences;
        let own = preferences.get(&(app.bus, Some(Arc::clone(&app.service))));
        let configured = || self.settings.apps.iter().find(|settings| settings.name == app.service)?.upstream.as_ref();
        own.or_else(|| preferences.get(&(app.bus, None)))
            .and_then(|name| self.upstream_named(name, app.bus))
            .or_else(|| self.upstream_named(configured()?, app.bus))
    }

    /// An app asked for an upstream with a registration that exists.
    pub(super) fn wish_upstream(&mut self, id: RegistrationId, wish: Option<Arc<str>>) {
        if let Some(wish) = wish
            && self.routes.wishes.insert(id, Arc::clone(&wish)) != Some(wish)
        {
            self.routes.failed.remove(&id);
            self.routes.look_again();
        }
    }

    /// Nobody on the bus prefers anything any more.
    pub(super) fn forget_preferences(&mut self, bus: Bus) {
        let gone: Vec<_> = self.routes.preferences.extract_if(.., |(other, _), _| *other == bus).collect();
        for ((bus, service), _) in gone {
            self.store_surely(StoreOp::DeletePreference(bus, service));
        }
    }

    /// From now on the app, or all apps of the bus, use this upstream. False when too many preferences are kept already.
    pub(super) fn prefer(&mut self, bus: Bus, service: Option<Arc<str>>, upstream: Arc<str>) -> bool {
        let key = (bus, service);
        if self.routes.preferences.len() >= PREFERENCES && !self.routes.preferences.contains_key(&key) {
            return false;
        }
        if key.1.is_none() {
            let single = |(other, service): &(Bus, Option<Arc<str>>)| *other == bus && service.is_some();
            let single: Vec<_> = self.routes.preferences.keys().filter(|key| single(key)).cloned().collect();
            for key in single {
                self.routes.preferences.remove(&key);
                self.store_surely(StoreOp::DeletePreference(key.0, key.1));
            }
        }
        self.routes.preferences.insert(key.clone(), Arc::clone(&upstream));
        self.store_surely(StoreOp::PutPreference(Preference { bus: key.0, service: key.1, upstream }));
        self.routes.failed.clear();
        self.routes.look_again();
        true
    }

    /// Sets moving what is not where it is wanted; true if there was anything to look at.
    pub(super) fn settle_moves(&mut self, now: Now) -> bool {
        let retry = self.routes.deadline().is_some_and(|at| at <= now.boot);
        if !std::mem::take(&mut self.routes.due) && !retry {
            return false;
        }
        for failed in self.routes.failed.values_mut() {
            failed.waits &= failed.retry_at.is_none_or(|at| at > now.boot);
            failed.retry_at.take_if(|at| *at <= now.boot);
        }
        let mut moves = Vec::new();
        for registration in self.registry.iter() {
            let id = registration.id;
            let wish = || self.upstream_named(self.routes.wishes.get(&id)?, registration.app.bus);
            let Some(target) = self.wanted_upstream(&registration.app).or_else(wish) else { continue };
            let Some(name) = self.upstreams.get(target).map(|upstream| &upstream.settings.name) else { continue };
            let waits = self.routes.failed.get(&id).is_some_and(|failed| failed.waits && failed.target == *name);
            let moving = self.routes.moving.get(&id);
            if *name == registration.upstream && moving.is_some() {
                moves.push((id, None));
            } else if *name != registration.upstream && moving != Some(&target) && !waits {
                moves.push((id, Some(target)));
            }
        }
        for (id, target) in moves {
            if let Some(asked) = self.routes.moving.remove(&id) {
                self.unregister_at_server(asked, id, now);
            }
            if let Some(target) = target {
                self.begin_move(id, target, now);
            }
        }
        true
    }

    fn begin_move(&mut self, id: RegistrationId, target: usize, now: Now) {
        let Some(registration) = self.registry.get(id) else { return };
        if self.registry.pending(id).is_some() || self.is_unsaved(id) {
            // It is looked at again when it is durable.
            return;
        }
        let vapid = registration.vapid.clone();
        let app = registration.app.clone();
        let Some(upstream) = self.upstreams.get_mut(target) else { return };
        let name = Arc::clone(&upstream.settings.name);
        if let Some(route) = self.routes.take_former(id, &name) {
            // It is still listened to there.
            self.store_surely(StoreOp::DeleteFormer(id, name));
            self.change_route(id, target, route.channel, route.endpoint, now);
            return;
        }
        if upstream.settings.require_vapid && vapid.is_none() {
            let text = format!("the server \"{name}\" takes registrations with a VAPID key only");
            self.move_failed(id, target, FailureReason::VapidRequired, &text, now);
            return;
        }
        self.lifecycle.note(&app, "move", format!("its registration moves to \"{name}\""), now);
        self.routes.moving.insert(id, target);
        upstream.session.register(id, vapid, now);
    }

    /// The upstream a registration was to move to has made it: true if it was that.
    pub(super) fn moved(
        &mut self,
        index: usize,
        id: RegistrationId,
        channel: &Arc<str>,
        endpoint: &Arc<str>,
        now: Now,
    ) -> bool {
        if self.routes.moving.get(&id) != Some(&index) {
            return false;
        }
        self.routes.moving.remove(&id);
        self.change_route(id, index, Arc::clone(channel), Arc::clone(endpoint), now);
        true
    }

    /// The registration is reached over another upstream from now on; the way it came until now is a former route.
    fn change_route(&mut self, id: RegistrationId, index: usize, channel: Arc<str>, endpoint: Arc<str>, now: Now) {
        let Some(name) = self.upstreams.get(index).map(|upstream| Arc::clone(&upstream.settings.name)) else { return };
        self.routes.failed.remove(&id);
        let Some(registration) = self.registry.get_mut(id) else { return };
        let former = FormerRoute {
            registration: id,
            upstream: std::mem::replace(&mut registration.upstream, name),
            channel: std::mem::replace(&mut registration.channel, channel),
            endpoint: std::mem::replace(&mut registration.endpoint, endpoint),
            until: None,
        };
        registration.told = false;
        let (app, upstream) = (registration.app.clone(), Arc::clone(&registration.upstream));
        let op = StoreOp::PutRegistration(registration.clone());
        self.identity_first(index);
        if !former.endpoint.is_empty() {
            self.store_surely(StoreOp::PutFormer(former.clone()));
            let routes = self.routes.former.entry(id).or_default();
            routes.push(former);
            if routes.len() > FORMER {
                let oldest = routes.remove(0);
                self.give_up_route(&oldest, now);
            }
        }
        self.store(op, Some(Stored::Registration(id)));
        log::info!("{app}: moved to \"{upstream}\"");
        self.lifecycle.note(&app, "endpoint", format!("it has moved to \"{upstream}\" and has a new address"), now);
    }

    /// The upstream a registration was to move to would not make it: true if it was that.
    pub(super) fn move_refused(
        &mut self,
        index: usize,
        id: RegistrationId,
        reason: FailureReason,
        text: &str,
        now: Now,
    ) -> bool {
        if self.routes.moving.get(&id) != Some(&index) {
            return false;
        }
        self.routes.moving.remove(&id);
        self.move_failed(id, index, reason, text, now);
        true
    }

    fn move_failed(&mut self, id: RegistrationId, target: usize, reason: FailureReason, text: &str, now: Now) {
        let Some(target) = self.upstreams.get(target).map(|upstream| Arc::clone(&upstream.settings.name)) else {
            return;
        };
        let Some(app) = self.registry.get(id).map(|registration| registration.app.clone()) else { return };
        let before = self.routes.failed.get(&id).filter(|failed| failed.target == target);
        let pause = before.map_or(AGAIN, |failed| (failed.pause * 2).min(AGAIN_AT_MOST));
        let passing = matches!(reason, FailureReason::Network | FailureReason::InternalError);
        let retry_at = passing.then(|| now.boot + pause);
        let next = if passing { "it is tried again" } else { "it stays where it is" };
        self.lifecycle.note(&app, "move", format!("it could not move to \"{target}\", {next}: {text}"), now);
        self.routes.failed.insert(id, Failed { target, retry_at, waits: true, pause });
    }

    /// A former route leads to another address now, which no sender knows: true if it was one. It is kept all the same:
    /// what came along it is not safe yet perhaps, and giving it up would tell the server that it is.
    pub(super) fn former_route_changed(
        &mut self,
        index: usize,
        id: RegistrationId,
        channel: &Arc<str>,
        endpoint: &Arc<str>,
    ) -> bool {
        let Some(name) = self.upstreams.get(index).map(|upstream| &upstream.settings.name) else { return false };
        let mut routes = self.routes.former.get_mut(&id).into_iter().flatten();
        let Some(route) = routes.find(|route| route.upstream == *name) else { return false };
        (route.channel, route.endpoint) = (Arc::clone(channel), Arc::clone(endpoint));
        let op = StoreOp::PutFormer(route.clone());
        self.store_surely(op);
        true
    }

    /// A former route is dead at its server: true if it was one.
    pub(super) fn former_route_lost(&mut self, index: usize, id: RegistrationId, now: Now) -> bool {
        let Some(name) = self.upstreams.get(index).map(|upstream| Arc::clone(&upstream.settings.name)) else {
            return false;
        };
        let Some(route) = self.routes.take_former(id, &name) else { return false };
        self.give_up_route(&route, now);
        true
    }

    /// The app knows its new address: from now on the former ones fade.
    pub(super) fn former_routes_fade(&mut self, id: RegistrationId, now: Now) {
        let mut changed = Vec::new();
        for route in self.routes.former.get_mut(&id).into_iter().flatten().filter(|route| route.until.is_none()) {
            route.until = Some(now.wall + FADING);
            changed.push(route.clone());
        }
        for route in changed {
            self.store_surely(StoreOp::PutFormer(route));
        }
    }

    /// Gives up the former routes whose time has come.
    pub(super) fn sweep_routes(&mut self, now: Now) {
        if self.delivery.store_is_failing() {
            // As above: what came along them is in memory alone.
            return;
        }
        let over = |until: Option<UnixTime>| until.is_some_and(|until| until <= now.wall);
        let ids: Vec<RegistrationId> = self.routes.former.keys().copied().collect();
        for id in ids {
            let Some(routes) = self.routes.former.get_mut(&id) else { continue };
            let faded: Vec<FormerRoute> = routes.extract_if(.., |route| over(route.until)).collect();
            if routes.is_empty() {
                self.routes.former.remove(&id);
            }
            for route in faded {
                self.give_up_route(&route, now);
            }
        }
    }

    fn give_up_route(&mut self, route: &FormerRoute, now: Now) {
        self.store_surely(StoreOp::DeleteFormer(route.registration, Arc::clone(&route.upstream)));
        let index = self.upstreams.iter().position(|upstream| upstream.settings.name == route.upstream);
        if let Some(index) = index {
            self.unregister_at_server(index, route.registration, now);
        }
    }

    /// All upstreams that know the registration, or are asked for it: its own first.
    pub(super) fn upstreams_of(&self, id: RegistrationId) -> Vec<usize> {
        let former = self.routes.former.get(&id).into_iter().flatten();
        let former = former
            .filter_map(|route| self.upstreams.iter().position(|upstream| upstream.settings.name == route.upstream));
        let own = self.upstream_of(id).into_iter();
        let all: Vec<usize> = own.chain(former).chain(self.routes.moving.get(&id).copied()).collect();
        let mut known = BTreeSet::new();
        all.into_iter().filter(|index| known.insert(*index)).collect()
    }
}
