//! What power and network are, for the parts that depend on it: delivery holds, sessions connect or not, `status` says it.

use std::{collections::BTreeMap, sync::Arc};

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
        let worth = old.is_some_and(|old| is_worth_a_try(&old.network, &network));
        self.brief_transfers(worth, now);
        if worth {
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

    /// What is held for an app goes to it when it runs anyway, and it hears of its transfers that have ended. True when any
    /// does.
    pub(super) fn hand_over_held(&mut self, now: Now) -> bool {
        if self.ending.is_some() {
            return false;
        }
        let running = |app: &&AppKey| {
            let state = self.lifecycle.show(app, now).map(|shown| shown.state);
            matches!(state, Some(State::Foreground | State::Background | State::Awake))
        };
        let owned = |app: &AppKey| Some((app.clone(), self.apps.get(app)?.owner.clone()?));
        let holding = self.delivery.holding().chain(self.transfers.holding());
        let ready: BTreeMap<_, _> = holding.filter(running).filter_map(owned).collect();
        for (app, owner) in &ready {
            self.ready(app, owner.clone(), now);
        }
        !ready.is_empty()
    }

    /// Lets the machine sleep, or keeps it awake.
    pub(super) fn mind_sleep(&mut self, now: Now) {
        if self.sleep.cares() {
            let busy = self.delivery.is_busy() || self.transfers.is_busy() || self.unsaved.holds_messages();
            let busy = busy || self.stand_in.helping.is_busy();
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        action::{Reply, StoreOp},
        config::{AppSettings, NetworkSettings, Settings, UrgencySettings},
        core::fixtures::{NOW, caller, kept, registration, tell},
        event::{BusEvent, CallId, Caller, Event, LinkEvent, LinkId, Query, Request},
        model::{Bus, NetworkKind, Snapshot},
    };

    const BUS: Bus = Bus::Session(1000);
    const APP: &str = "org.example.App";

    /// A core that serves one app, which does not run, over one link.
    struct World {
        core: Core,
        now: Now,
        link: LinkId,
    }

    impl World {
        fn new(settings: Settings) -> Self {
            let upstream = Arc::clone(&settings.upstreams[0].name);
            let snapshot = Snapshot {
                upstreams: vec![(Arc::clone(&upstream), "uaid".into(), "u1".into())],
                ..kept([registration(1, AppKey::new(BUS, APP), upstream)])
            };
            let mut world = Self { core: Core::new(settings, [7; 32], snapshot, NOW), now: NOW, link: LinkId(0) };
            world.tell(Event::Bus(BusEvent::Up(BUS)));
            world.tell(Event::Bus(BusEvent::OwnerChanged(AppKey::new(BUS, APP), None)));
            world.hello();
            world
        }

        fn tell(&mut self, event: Event) -> Vec<Action> {
            tell(&mut self.core, &mut self.link, event, self.now)
        }

        fn hello(&mut self) {
            self.tell(Event::Link(self.link, LinkEvent::Open));
            let hello = json!({"messageType": "hello", "uaid": "u1", "status": 200});
            self.tell(Event::Link(self.link, LinkEvent::Text(hello.to_string())));
        }

        fn push(&mut self, version: &str, urgency: Option<Urgency>) -> Vec<Action> {
            let mut frame = json!({
                "messageType": "notification", "channelID": "channel1", "version": version, "data": "aGk",
            });
            if let Some(urgency) = urgency {
                frame["urgency"] = urgency.as_str().into();
            }
            self.tell(Event::Link(self.link, LinkEvent::Text(frame.to_string())))
        }

        fn ask<T: serde::de::DeserializeOwned>(&mut self, query: Query, sandboxed: bool) -> T {
            let caller = Caller { sandboxed, ..caller(BUS, ":1.1") };
            let request = Request::Query(query);
            let actions = self.tell(Event::Bus(BusEvent::Call { call: CallId(1), caller, request }));
            match actions.first() {
                Some(Action::Reply(_, Reply::Json(text))) => serde_json::from_str(text).unwrap(),
                other => panic!("{other:?}"),
            }
        }

        fn decisions(&mut self) -> Vec<(String, String)> {
            let why: view::Why = self.ask(Query::Why(APP.into()), false);
            why.decisions.into_iter().map(|decision| (decision.verdict, decision.reason)).collect()
        }
    }

    fn outside() -> Surroundings {
        let network = Network {
            kind: NetworkKind::Mobile,
            id: Some("mobile/x".into()),
            reach: Reach::Full,
            ..Network::default()
        };
        Surroundings { on_mains: Some(false), battery: Some(80), network }
    }

    fn home() -> Surroundings {
        let network =
            Network { kind: NetworkKind::Wifi, id: Some("wifi/home".into()), reach: Reach::Full, ..Network::default() };
        Surroundings { on_mains: Some(true), battery: Some(80), network }
    }

    fn starts(actions: &[Action]) -> bool {
        actions.iter().any(|action| matches!(action, Action::Start(_)))
    }

    #[test]
    fn a_message_is_held_outside_and_goes_at_home_and_why_says_both() {
        let mut world = World::new(Settings::default());
        world.tell(Event::Surroundings(outside()));
        let actions = world.push("v1", Some(Urgency::Low));
        assert!(!starts(&actions));
        assert!(actions.iter().any(|action| matches!(action, Action::Store(StoreOp::PutMessage(_), Some(_)))));
        let show: view::Show = world.ask(Query::Show(APP.into()), false);
        assert_eq!((show.app.waiting, show.app.held), (1, 1));
        assert!(starts(&world.tell(Event::Surroundings(home()))));
        let decisions = world.decisions();
        let told: Vec<&str> = decisions.iter().map(|(verdict, _)| verdict.as_str()).collect();
        assert_eq!(told, ["hold", "release", "start"]);
        assert!(decisions[0].1.contains("running on battery, on a mobile network"), "{decisions:?}");
        assert!(decisions[1].1.contains("on mains power, on Wi-Fi"), "{decisions:?}");
    }

    #[test]
    fn what_the_protocol_does_not_carry_is_the_apps_own_policy_and_why_says_so() {
        let policy = |urgency| {
            let app = AppSettings { urgency, ..AppSettings::new(APP) };
            Settings { apps: vec![app], ..Settings::default() }
        };
        let mut world = World::new(policy(Urgency::Low));
        world.tell(Event::Surroundings(outside()));
        assert!(!starts(&world.push("v1", None)));
        assert!(world.decisions()[0].1.contains("low is what this app's messages count as"));
        let mut world = World::new(policy(Urgency::High));
        world.tell(Event::Surroundings(Surroundings { battery: Some(3), ..outside() }));
        assert!(starts(&world.push("v1", None)));
        assert!(world.decisions().iter().any(|(verdict, _)| verdict == "urgency"));
    }

    #[test]
    fn sessions_hear_of_the_least_any_app_may_be_woken_for() {
        let mut world = World::new(Settings::default());
        world.tell(Event::Surroundings(outside()));
        assert_eq!(world.core.upstreams[0].told.minimum, Urgency::Normal);
        let app = AppSettings { min_urgency: Some(Urgency::VeryLow), ..AppSettings::new(APP) };
        let mut world = World::new(Settings { apps: vec![app.clone()], ..Settings::default() });
        world.tell(Event::Surroundings(outside()));
        assert_eq!(world.core.upstreams[0].told.minimum, Urgency::VeryLow, "it would be starved");
        let other = AppSettings { name: "org.example.Other".into(), ..app };
        let mut world = World::new(Settings { apps: vec![other], ..Settings::default() });
        world.tell(Event::Surroundings(outside()));
        assert_eq!(world.core.upstreams[0].told.minimum, Urgency::Normal, "it is not registered");
        let urgency = UrgencySettings { enabled: false, ..UrgencySettings::default() };
        let mut world = World::new(Settings { urgency, ..Settings::default() });
        world.tell(Event::Surroundings(outside()));
        assert_eq!(world.core.upstreams[0].told.minimum, Urgency::VeryLow);
    }

    #[test]
    fn another_network_proves_the_link_and_the_same_one_does_not() {
        let mut world = World::new(Settings::default());
        let pings = |actions: &[Action]| actions.iter().any(|action| matches!(action, Action::Ping(_)));
        assert!(!pings(&world.tell(Event::Surroundings(home()))), "nothing has changed: it is told for the first time");
        assert!(!pings(&world.tell(Event::Surroundings(Surroundings { battery: Some(79), ..home() }))));
        let actions = world.tell(Event::Surroundings(outside()));
        assert!(pings(&actions));
        assert_eq!(world.core.upstreams[0].told.network.as_deref(), Some("mobile/x"));
        world.tell(Event::Link(world.link, LinkEvent::Pong));
        let mut portal = outside();
        portal.network.reach = Reach::Portal;
        assert!(!pings(&world.tell(Event::Surroundings(portal))));
        let status: view::Status = world.ask(Query::Status, false);
        assert!(
            status.troubles.iter().any(|trouble| trouble.contains("log in on a web page")),
            "{:?}",
            status.troubles
        );
        assert!(pings(&world.tell(Event::Surroundings(outside()))), "past the portal");
    }

    #[test]
    fn where_the_machine_is_is_not_for_every_app() {
        let mut world = World::new(Settings::default());
        world.tell(Event::Surroundings(home()));
        let own: view::Status = world.ask(Query::Status, false);
        assert_eq!(own.surroundings.unwrap().network_id.as_deref(), Some("wifi/home"));
        let apps: view::Status = world.ask(Query::Status, true);
        assert_eq!(apps.surroundings.unwrap().network_id, None);
        assert_eq!(apps.min_urgency, Some(Urgency::VeryLow));
    }

    #[test]
    fn roaming_ends_the_link_where_the_user_wants_it_so() {
        let network = NetworkSettings { roaming: Roaming::Off, ..NetworkSettings::default() };
        let mut world = World::new(Settings { network, ..Settings::default() });
        let mut abroad = outside();
        abroad.network.roaming = true;
        let link = world.link;
        assert!(world.tell(Event::Surroundings(abroad.clone())).contains(&Action::Close(link)));
        let status: view::Status = world.ask(Query::Status, false);
        assert_eq!(status.upstreams[0].state, view::LinkState::Off);
        let actions = world.tell(Event::Surroundings(outside()));
        assert!(actions.iter().any(|action| matches!(action, Action::Connect { .. })));
        let mut world = World::new(Settings::default());
        let link = world.link;
        assert!(!world.tell(Event::Surroundings(abroad)).contains(&Action::Close(link)), "by default it stays");
    }

    #[test]
    fn a_message_right_after_the_machine_woke_keeps_it_awake_and_never_beyond_the_daemons_end() {
        let mut world = World::new(Settings::default());
        assert!(!world.push("v0", None).contains(&Action::StayAwake(true)), "this machine never sleeps");
        let mut world = World::new(Settings::default());
        assert_eq!(world.tell(Event::FallingAsleep), [Action::AllowSleep]);
        world.tell(Event::Resumed);
        world.tell(Event::Surroundings(outside()));
        assert!(!world.push("v1", Some(Urgency::Low)).contains(&Action::StayAwake(true)), "it is held");
        assert!(world.push("v2", None).contains(&Action::StayAwake(true)));
        let actions = world.tell(Event::Shutdown);
        let place = |wanted: &Action| actions.iter().position(|action| action == wanted);
        assert!(place(&Action::StayAwake(false)).is_some_and(|at| Some(at) < place(&Action::Exit)), "{actions:?}");
    }
}
