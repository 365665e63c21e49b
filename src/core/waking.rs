//! Making an app ready for a message, in its turn (`wakes`), and what its messages count as: urgent ones that show nothing to
//! the user do not for long (`demotion`).

use std::sync::Arc;

use super::{
    Core, START_TIME,
    demotion::News,
    lifecycle::{Readiness, State},
};
use crate::{
    action::{Action, StoreOp},
    model::{AppKey, Bus, Owner, Priority, TargetId, Urgency},
    time::{Instant, Now, earliest},
};

/// The upstream under whose name the store keeps what urgent messages have shown, by app. None can be called so: names have no
/// control characters.
const SHOWN: &str = "\u{1}shown";

impl Core {
    /// What urgent messages have shown in an earlier life. Only before the first event.
    pub(super) fn restore_shown(&mut self, remembered: &[(Arc<str>, Arc<str>, Arc<str>)], now: Now) {
        for (_, key, counts) in remembered.iter().filter(|(name, ..)| **name == *SHOWN) {
            match self.apps.keys().find(|app| *name_of(app) == **key).cloned() {
                Some(app) => {
                    self.demotion.restore(app.clone(), counts, now.wall);
                    self.delivery.set_demoted(&app, self.demotion.is_demoted(&app), now);
                }
                None => self.store(shown_op(key, ""), None),
            }
        }
    }

    /// Delivery wants the app: at once if it runs, else when it is its turn.
    pub(super) fn want(&mut self, app: &AppKey, urgency: Urgency, now: Now) {
        if urgency >= Urgency::High {
            self.demotion.expected(app, now);
            if self.watched.get(&app.bus) == Some(&Watched::Failed) {
                self.watched.remove(&app.bus);
            }
            self.mind_demotion(now);
        }
        if self.runs(app, now) || self.wakes.ask(app, urgency) {
            self.wake(app, now);
        }
    }

    /// Delivery has the app asked for, or not. While it waits for its turn it is left as it is.
    pub(super) fn pending(&mut self, app: &AppKey, pending: bool, now: Now) {
        self.pending_because(app, pending, now);
    }

    /// Wakes the next app whose turn it is. True when there is one.
    pub(super) fn wake_next(&mut self, now: Now) -> bool {
        let up = self.wakes.waiting().find(|app| self.runs(app, now)).cloned();
        let next = match up {
            Some(app) => {
                self.wakes.done(&app);
                Some(app)
            }
            None => self.wakes.next(now.boot),
        };
        let Some(app) = next else { return false };
        let message = self.delivery.turn_has_come(&app, now);
        if message || self.transfers.is_asked(&app) {
            let cause = self.cause_of_wake(&app);
            self.lifecycle.set_pending_because(&app, true, cause, now);
            self.wake(&app, now);
        } else {
            self.wakes.done(&app);
        }
        true
    }

    /// The app can be called.
    pub(super) fn ready(&mut self, app: &AppKey, owner: Owner, now: Now) {
        self.wakes.done(app);
        self.delivery.ready(app, owner.clone(), now);
        self.transfers.ready(app, owner, now);
    }

    /// The app took a message or an endpoint.
    pub(super) fn delivered(&mut self, app: &AppKey, urgency: Option<Urgency>, now: Now) {
        if urgency.is_some() {
            self.stand_in.spoke(app);
        }
        let urgency = urgency.unwrap_or_default();
        if urgency >= Urgency::High {
            self.demotion.taken(app, now);
        }
        let counts = if self.demotion.is_demoted(app) { urgency.min(Urgency::Normal) } else { urgency };
        let calls = self.settings.apps.iter().any(|settings| settings.name == app.service && settings.calls);
        self.lifecycle.delivered(app, Priority::of(counts, calls), now);
        self.mind_demotion(now);
    }

    /// An urgent message is about to be handed over: it is to show something. What is, or may be, in front shows itself.
    pub(super) fn judge_from_now(&mut self, app: &AppKey, now: Now) {
        let in_front = self.lifecycle.show(app, now).is_some_and(|shown| shown.state == State::Foreground);
        self.demotion.handed(app, in_front, now);
        self.mind_demotion(now);
    }

    /// Whoever has this name, or is this target, has notified the user.
    pub(super) fn notified(&mut self, bus: Bus, owner: &Owner, target: Option<TargetId>, now: Now) {
        let by = |key: &&AppKey| {
            let named = self.apps.get(*key).and_then(|presence| presence.owner.as_ref()) == Some(owner);
            key.bus == bus && (named || target.is_some() && self.lifecycle.target_of(key) == target)
        };
        let apps: Vec<AppKey> = self.apps.keys().filter(by).cloned().collect();
        for app in apps {
            self.demotion.shown(&app, now);
            self.stand_in.spoke(&app);
        }
        self.mind_demotion(now);
    }

    /// Notifications on the bus are seen, or not (any more).
    pub(super) fn notifications_seen(&mut self, bus: Bus, seen: bool, now: Now) {
        if seen && self.watched.get(&bus) != Some(&Watched::Asked) {
            return;
        }
        self.demotion.seeing(bus, seen);
        if let Some(watched) = self.watched.get_mut(&bus).filter(|_| !seen) {
            // Asked for again with the next urgent message, for it may fail each time.
            *watched = Watched::Failed;
        }
        self.mind_demotion(now);
    }

    /// The bus is gone, and what was watched there with it.
    pub(super) fn unwatched(&mut self, bus: Bus) {
        self.watched.remove(&bus);
        self.demotion.seeing(bus, false);
    }

    /// The app is seen in front: it shows itself.
    pub(super) fn seen_in_front(&mut self, app: &AppKey, now: Now) {
        self.demotion.shown(app, now);
        self.stand_in.spoke(app);
        self.mind_demotion(now);
    }

    /// Nothing is kept of the app any more.
    pub(super) fn forget_shown(&mut self, app: &AppKey) {
        self.wakes.done(app);
        if self.demotion.remove(app) {
            self.store(shown_op(&name_of(app), ""), None);
        }
    }

    /// When a turn or a judgement is over.
    pub(super) fn waking_timeout(&self) -> Option<Instant> {
        earliest(self.wakes.poll_timeout(), self.demotion.poll_timeout())
    }

    /// Time passed.
    pub(super) fn handle_waking_timeout(&mut self, now: Now) {
        self.demotion.handle_timeout(now);
        self.mind_demotion(now);
    }

    /// Passes on what demotion has to say, and watches for notifications while that is of use.
    fn mind_demotion(&mut self, now: Now) {
        while let Some(news) = self.demotion.poll_news() {
            match news {
                News::Counted(app, counts) => self.store(shown_op(&name_of(&app), &counts), None),
                News::Demoted(app, demoted, reason) => {
                    self.lifecycle.note(&app, if demoted { "demote" } else { "promote" }, reason, now);
                    self.delivery.set_demoted(&app, demoted, now);
                }
            }
        }
        self.mind_watching();
    }

    /// Watches for notifications where that is of use: to judge by them, or to see that an app speaks for itself.
    pub(super) fn mind_watching(&mut self) {
        for bus in self.buses.iter().copied().filter(|bus| matches!(bus, Bus::Session(_))) {
            match (self.demotion.wants(bus) || self.stand_in.wants(bus), self.watched.contains_key(&bus)) {
                (true, false) => {
                    self.watched.insert(bus, Watched::Asked);
                    self.actions.push_back(Action::WatchNotifications(bus, true));
                }
                (false, true) => {
                    self.watched.remove(&bus);
                    self.demotion.seeing(bus, false);
                    self.actions.push_back(Action::WatchNotifications(bus, false));
                }
                (true, true) | (false, false) => {}
            }
        }
    }

    /// Whether the app can be called without waking it.
    pub(super) fn runs(&self, app: &AppKey, now: Now) -> bool {
        let state = self.lifecycle.show(app, now).map(|shown| shown.state);
        self.apps.get(app).is_some_and(|presence| presence.owner.is_some())
            && matches!(state, Some(State::Foreground | State::Background | State::Awake))
    }

    /// Makes an app ready for a delivery: thaws it, starts it, or finds that it is ready.
    fn wake(&mut self, app: &AppKey, now: Now) {
        let cause = self.cause_of_wake(app);
        let Some(presence) = self.apps.get_mut(app) else { return };
        let readiness = self.lifecycle.wanted_because(app, cause, now);
        if readiness == Readiness::Thawing || (readiness == Readiness::NotRunning && presence.starting.is_none()) {
            self.pressure.woken(app, now.boot);
        }
        match (presence.owner.clone(), readiness) {
            // Comes back as `Runnable`, or as the end of the old instance.
            (_, Readiness::Ending) | (Some(_), Readiness::Thawing) => {}
            (Some(owner), Readiness::Ready | Readiness::NotRunning) => self.ready(app, owner, now),
            (None, Readiness::Ready | Readiness::NotRunning | Readiness::Thawing) => {
                if presence.starting.is_none() && self.ending.is_none() {
                    presence.starting = Some(now.boot + START_TIME);
                    self.lifecycle.note(app, "start", cause.unwrap_or("a message is waiting for it"), now);
                    self.actions.push_back(Action::Start(app.clone()));
                }
            }
        }
    }
}

/// What was asked of the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watched {
    Asked,
    Failed,
}

/// An app's name in what is kept by app beside what upstreams remember.
pub(super) fn name_of(app: &AppKey) -> String {
    format!("{}/{}", app.bus.to_number(), app.service)
}

fn shown_op(key: &str, counts: &str) -> StoreOp {
    StoreOp::PutUpstream { upstream: SHOWN.into(), key: key.into(), value: counts.into() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::{
        config::{AppSettings, Settings},
        core::fixtures::{NOW, kept, registration, tell},
        event::{BusEvent, CallOutcome, DeliveryTicket, Event, LinkEvent, LinkId},
        model::Snapshot,
        time::UnixTime,
    };

    const BUS: Bus = Bus::Session(1000);

    fn app(n: u64) -> AppKey {
        AppKey::new(BUS, format!("org.example.App{n}"))
    }

    /// Apps that do not run, with a registration each.
    struct World {
        core: Core,
        now: Now,
        link: LinkId,
        pushed: u32,
    }

    impl World {
        fn new(apps: u64) -> Self {
            Self::with(apps, Vec::new(), Settings::default())
        }

        fn with(apps: u64, remembered: Vec<(Arc<str>, Arc<str>, Arc<str>)>, settings: Settings) -> Self {
            let upstream = Arc::clone(&settings.upstreams[0].name);
            let snapshot = Snapshot {
                upstreams: [vec![(Arc::clone(&upstream), "uaid".into(), "u1".into())], remembered].concat(),
                ..kept((1..=apps).map(|n| registration(n, app(n), Arc::clone(&upstream))))
            };
            let now = Now { wall: UnixTime::from_secs(20_000 * 86_400), ..NOW };
            let core = Core::new(settings, [7; 32], snapshot, now);
            let mut world = Self { core, now, link: LinkId(0), pushed: 0 };
            world.tell(Event::Bus(BusEvent::Up(BUS)));
            (1..=apps).for_each(|n| drop(world.tell(Event::Bus(BusEvent::OwnerChanged(app(n), None)))));
            world.tell(Event::Link(world.link, LinkEvent::Open));
            let hello = json!({"messageType": "hello", "uaid": "u1", "status": 200});
            world.tell(Event::Link(world.link, LinkEvent::Text(hello.to_string())));
            world
        }

        fn tell(&mut self, event: Event) -> Vec<Action> {
            tell(&mut self.core, &mut self.link, event, self.now)
        }

        fn push(&mut self, n: u64, urgency: Urgency) -> Vec<Action> {
            self.pushed += 1;
            let frame = json!({
                "messageType": "notification", "channelID": format!("channel{n}"), "data": "aGk",
                "version": format!("v{}", self.pushed), "urgency": urgency.as_str(),
            });
            self.tell(Event::Link(self.link, LinkEvent::Text(frame.to_string())))
        }

        fn pass(&mut self, time: Duration) -> Vec<Action> {
            let end = self.now.boot + time;
            let mut actions = Vec::new();
            while let Some(at) = self.core.poll_timeout().filter(|at| *at <= end) {
                self.now.wall = self.now.wall + at.since(self.now.boot);
                self.now.boot = at.max(self.now.boot);
                actions.extend(self.tell(Event::Tick));
            }
            self.now.wall = self.now.wall + end.since(self.now.boot);
            self.now.boot = end;
            actions
        }

        fn comes(&mut self, n: u64) -> Vec<Action> {
            self.tell(Event::Bus(BusEvent::OwnerChanged(app(n), Some(Owner(format!(":1.{n}").into())))))
        }

        fn goes(&mut self, n: u64) {
            self.tell(Event::Bus(BusEvent::OwnerChanged(app(n), None)));
        }

        /// A message to an app that is started for it, takes it, and ends when its window is over.
        fn round(&mut self, shows: bool) -> Vec<Action> {
            let mut actions = self.push(1, Urgency::High);
            actions.extend(self.tell(Event::NotificationsSeen(BUS, true)));
            // Said of itself, for else it may be in front.
            let calls = self.comes(1);
            actions.extend(self.declare_background());
            for ticket in called(&calls) {
                actions.extend(self.tell(Event::Bus(BusEvent::CallDone(ticket, CallOutcome::Accepted))));
            }
            if shows {
                let owner = Owner(":1.1".into());
                actions.extend(self.tell(Event::Notified { bus: BUS, owner, target: None }));
            }
            actions.extend(self.pass(Duration::from_secs(40)));
            self.goes(1);
            actions
        }

        /// As a shell would, once for all instances to come.
        fn declare_background(&mut self) -> Vec<Action> {
            self.core.lifecycle.declare(&app(1), crate::event::Claim::Background, "the test", self.now);
            self.tell(Event::Tick)
        }

        fn why(&self) -> Vec<String> {
            self.core.lifecycle.decisions(&app(1)).map(|d| format!("{}: {}", d.verdict, d.reason)).collect()
        }
    }

    fn started(actions: &[Action]) -> Vec<AppKey> {
        let started = |action: &Action| if let Action::Start(app) = action { Some(app.clone()) } else { None };
        actions.iter().filter_map(started).collect()
    }

    fn called(actions: &[Action]) -> Vec<DeliveryTicket> {
        let called = |action: &Action| if let Action::Call { ticket, .. } = action { Some(*ticket) } else { None };
        actions.iter().filter_map(called).collect()
    }

    #[test]
    fn a_burst_to_many_apps_starts_two_at_a_time_and_what_is_urgent_at_once() {
        let mut world = World::new(8);
        let burst: Vec<Action> = (1..=6).flat_map(|n| world.push(n, Urgency::Normal)).collect();
        assert_eq!(started(&burst), [app(1), app(2)]);
        assert_eq!(started(&world.push(7, Urgency::High)), [app(7)]);
        assert_eq!(started(&world.push(5, Urgency::High)), [app(5)], "it waited for its turn, and need not any more");
        assert_eq!(started(&world.comes(7)), []);
        assert_eq!(called(&world.comes(1)).len(), 1);
        assert_eq!(started(&world.comes(5)), [app(3)]);
        // App 2 and app 3 hang: 5 s later the others have their turn.
        assert_eq!(started(&world.pass(Duration::from_millis(4_900))), []);
        assert_eq!(started(&world.pass(Duration::from_millis(200))), [app(4), app(6)]);
        assert_eq!(called(&world.comes(6)).len(), 1);
        assert_eq!(called(&world.comes(2)).len(), 1, "late is not lost");
    }

    #[test]
    fn one_whose_turn_comes_when_its_message_is_to_be_held_is_left_alone() {
        let mut world = World::new(3);
        (1..=3).for_each(|n| drop(world.push(n, Urgency::Low)));
        let battery = crate::model::Surroundings { on_mains: Some(false), battery: Some(5), ..Default::default() };
        assert_eq!(started(&world.tell(Event::Surroundings(battery))), []);
        assert_eq!(started(&world.comes(1)), []);
        assert_eq!(world.core.delivery.held_for(&app(3)), 1);
        let mains = crate::model::Surroundings { on_mains: Some(true), ..Default::default() };
        assert_eq!(started(&world.tell(Event::Surroundings(mains))), [app(3)]);
    }

    #[test]
    fn one_that_comes_by_itself_while_it_waits_gets_its_message_at_once() {
        let mut world = World::new(4);
        (1..=4).for_each(|n| drop(world.push(n, Urgency::Normal)));
        assert_eq!(called(&world.comes(4)).len(), 1);
        assert_eq!(started(&world.comes(1)), [app(3)]);
    }

    #[test]
    fn who_shows_nothing_is_demoted_and_says_why_and_the_store_keeps_it() {
        let mut world = World::new(1);
        world.declare_background();
        let actions = world.round(false);
        assert!(actions.contains(&Action::WatchNotifications(BUS, true)));
        assert_eq!(
            actions.iter().filter(|a| **a == Action::WatchNotifications(BUS, false)).count(),
            1,
            "and no longer"
        );
        for _ in 0..4 {
            world.round(false);
        }
        let why = world.why();
        assert!(why.iter().any(|line| line.starts_with("demote: of its 5 messages of high urgency")), "{why:?}");
        assert!(world.core.demotion.is_demoted(&app(1)));
        let kept: Vec<_> = vec![(SHOWN.into(), "1000/org.example.App1".into(), "20000:5:0".into())];
        let actions = world.round(true);
        let text = Arc::<str>::from("20000:6:1");
        let op = StoreOp::PutUpstream { upstream: SHOWN.into(), key: "1000/org.example.App1".into(), value: text };
        assert!(actions.contains(&Action::Store(op, None)), "{actions:?}");
        let mut world = World::with(1, kept, Settings::default());
        assert!(world.core.demotion.is_demoted(&app(1)));
        (0..5).for_each(|_| drop(world.round(true)));
        assert!(!world.core.demotion.is_demoted(&app(1)));
        assert!(world.why().iter().any(|line| line.starts_with("promote: 5 of its 10")), "{:?}", world.why());
    }

    #[test]
    fn a_bus_that_cannot_be_watched_judges_nobody() {
        let mut world = World::new(1);
        world.declare_background();
        for _ in 0..10 {
            world.push(1, Urgency::High);
            let asked = world.tell(Event::NotificationsSeen(BUS, false));
            assert!(!asked.contains(&Action::WatchNotifications(BUS, true)), "not tried in a circle");
            let calls = world.comes(1);
            world.declare_background();
            for ticket in called(&calls) {
                world.tell(Event::Bus(BusEvent::CallDone(ticket, CallOutcome::Accepted)));
            }
            world.pass(Duration::from_secs(40));
            world.goes(1);
        }
        assert!(!world.core.demotion.is_demoted(&app(1)));
    }

    #[test]
    fn calls_are_high_urgency_of_apps_that_are_said_to_get_them() {
        let window = |calls, urgency| {
            let apps = vec![AppSettings { calls, ..AppSettings::new("org.example.App1") }];
            let mut world = World::with(1, Vec::new(), Settings { apps, ..Settings::default() });
            world.declare_background();
            world.push(1, urgency);
            let calls = world.comes(1);
            world.declare_background();
            for ticket in called(&calls) {
                world.tell(Event::Bus(BusEvent::CallDone(ticket, CallOutcome::Accepted)));
            }
            world.core.lifecycle.show(&app(1), world.now).unwrap().state
        };
        assert_eq!(window(true, Urgency::High), State::Awake);
        assert_eq!(Priority::of(Urgency::High, true), Priority::Call);
        assert_eq!(Priority::of(Urgency::High, false), Priority::High);
        assert_eq!(Priority::of(Urgency::Normal, true), Priority::Normal);
    }
}
