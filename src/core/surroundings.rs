//! What power and network are, for the parts that depend on it: delivery holds, sessions connect or not, `status` says it.

use std::sync::Arc;

use super::{Core, lifecycle::State, urgency};
use crate::{
    action::Action,
    config::Roaming,
    model::{AppKey, Network, Reach, RegistrationId, Surroundings, Urgency},
    time::Now,
    view,
};

/// What a session knows of the surroundings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    network: Option<Arc<str>>,
    allowed: bool,
    minimum: Urgency,
}

/// What a session takes for granted until it is told otherwise.
impl Default for Told {
    fn default() -> Self {
        Self { network: None, allowed: true, minimum: Urgency::VeryLow }
    }
}

impl Core {
    /// Power or network are not what they were.
    pub(super) fn surrounded(&mut self, new: Surroundings, now: Now) {
        let minimum = urgency::minimum(&new, &self.settings.urgency);
        if self.surroundings.is_none() || minimum.urgency != self.minimum().urgency {
            log::info!("{}", minimum.sentence());
        }
        let (network, old) = (new.network.clone(), self.surroundings.replace(new));
        self.delivery.set_fetching(!network.roaming, now);
        self.delivery.set_minimum(minimum.urgency, now);
        self.brief_sessions(now);
        if old.is_some_and(|old| is_worth_a_try(&old.network, &network)) {
            for upstream in &mut self.upstreams {
                upstream.session.handle_network(now);
            }
        }
    }

    /// Tells each session what has changed for it. True when anything has.
    pub(super) fn brief_sessions(&mut self, now: Now) -> bool {
        let network = self.surroundings.as_ref().map(|surroundings| &surroundings.network);
        let off = network.is_some_and(|network| network.roaming) && self.settings.network.roaming == Roaming::Off;
        // An app with a minimum of its own must not be starved by a server that filters for the others.
        let least = self.apps.keys().map(|app| self.delivery.minimum_for(app)).min();
        let minimum = least.unwrap_or_else(|| self.minimum().urgency);
        let told = Told { network: network.and_then(|network| network.id.clone()), allowed: !off, minimum };
        let mut news = false;
        for upstream in self.upstreams.iter_mut().filter(|upstream| upstream.told != told) {
            let before = std::mem::replace(&mut upstream.told, told.clone());
            if before.network != told.network {
                upstream.session.set_network(told.network.clone(), now);
            }
            if before.allowed != told.allowed {
                upstream.session.set_allowed(told.allowed, now);
            }
            if before.minimum != told.minimum {
                upstream.session.set_min_urgency(told.minimum, now);
            }
            news = true;
        }
        news
    }

    /// What is held for an app goes to it when it runs anyway. True when any does.
    pub(super) fn hand_over_held(&mut self, now: Now) -> bool {
        if self.ending.is_some() {
            return false;
        }
        let running = |app: &&AppKey| {
            let state = self.lifecycle.show(app, now).map(|shown| shown.state);
            matches!(state, Some(State::Foreground | State::Background | State::Awake))
        };
        let owned = |app: &AppKey| Some((app.clone(), self.apps.get(app)?.owner.clone()?));
        let ready: Vec<_> = self.delivery.holding().filter(running).filter_map(owned).collect();
        for (app, owner) in &ready {
            self.delivery.ready(app, owner.clone(), now);
        }
        !ready.is_empty()
    }

    /// Lets the machine sleep, or keeps it awake.
    pub(super) fn mind_sleep(&mut self, now: Now) {
        if self.sleep.cares() {
            let busy = self.delivery.is_busy();
            let actions: Vec<Action> = std::iter::from_fn(|| self.sleep.next(busy, now.boot)).collect();
            self.actions.extend(actions);
        }
    }

    /// What a message of the registration counts as where its protocol tells no urgency.
    pub(super) fn counts_as(&self, registration: RegistrationId) -> Urgency {
        let name = self.registry.get(registration).map(|registration| &registration.app.service);
        let settings = self.settings.apps.iter().find(|app| Some(&app.name) == name);
        settings.map(|app| app.urgency).unwrap_or_default()
    }

    /// Says so when a message may wake its app only because of what the configuration has it count as.
    pub(super) fn note_policy(&mut self, registration: RegistrationId, urgency: Urgency, now: Now) {
        let Some(app) = self.registry.get(registration).map(|registration| registration.app.clone()) else { return };
        let minimum = self.delivery.minimum_for(&app);
        let asleep = self
            .lifecycle
            .show(&app, now)
            .is_some_and(|shown| !matches!(shown.state, State::Foreground | State::Background | State::Awake));
        if asleep && urgency >= minimum && Urgency::default() < minimum {
            self.lifecycle.note(&app, "urgency", urgency::by_policy(urgency), now);
        }
    }

    pub(super) fn minimum(&self) -> urgency::Minimum {
        match &self.surroundings {
            Some(surroundings) => urgency::minimum(surroundings, &self.settings.urgency),
            None => urgency::minimum(&Surroundings::default(), &self.settings.urgency),
        }
    }

    /// For `status`. Where this machine is (the name of its network) is for who may control it.
    pub(super) fn surroundings_view(&self, with_name: bool) -> Option<view::Surroundings> {
        let surroundings = self.surroundings.as_ref()?;
        let network = &surroundings.network;
        Some(view::Surroundings {
            on_mains: surroundings.on_mains,
            battery: surroundings.battery,
            network: network.kind,
            network_id: network.id.as_deref().filter(|_| with_name).map(str::to_owned),
            metered: network.metered,
            roaming: network.roaming,
            reach: network.reach,
        })
    }
}

/// Whether what did not work before may work now, or an open link may be dead.
fn is_worth_a_try(old: &Network, new: &Network) -> bool {
    let reaches = new.reach == Reach::Full && matches!(old.reach, Reach::None | Reach::Portal | Reach::Limited);
    new.reach != Reach::None && (reaches || old.id != new.id || old.kind != new.kind)
}
