//! Power, network and sleep: what a phone goes through, and what the core may do about it.

use std::sync::Arc;

use nightporter::{
    config::{AppSettings, Roaming},
    event::{Event, Query, Request},
    model::{AppKey, Network, NetworkKind, Reach, Surroundings, Urgency},
};

use crate::{
    clock::{At, MS, Rng, SEC},
    world::{Due, What, World, tool},
};

/// As in `config::UrgencySettings`.
const LOW_BATTERY: u8 = 15;
const LONGEST_WINDOW: At = 30 * SEC;
const LONGEST_DELAY: At = 4 * SEC;
/// logind's `InhibitDelayMaxSec=`.
const LOGIND_WAITS: At = 5 * SEC;

/// The machine as a phone.
#[derive(Default)]
pub(crate) struct Phone {
    pub(crate) around: Surroundings,
    /// As the running core has been told.
    pub(crate) told: Option<Surroundings>,
    /// About to sleep: since when, and for how long.
    falling: Option<(At, At)>,
    allowed: bool,
    /// Counts the times it was about to, so that an old alarm is known.
    times: u32,
    resumed: Option<At>,
    awake: bool,
}

/// What the configuration says of single apps.
pub(crate) fn policies(rng: &mut Rng) -> Vec<AppSettings> {
    let mut policies = Vec::new();
    for n in 0..6 {
        if rng.chance(4000) {
            let any = [Urgency::VeryLow, Urgency::Low, Urgency::Normal, Urgency::High];
            let urgency = *rng.pick(&any).expect("four");
            let min_urgency = if rng.chance(3000) { rng.pick(&any).copied() } else { None };
            let name: Arc<str> = format!("org.example.App{n}").into();
            let payload_helper = rng.chance(5000).then(crate::stand_in::helper);
            policies.push(AppSettings { urgency, min_urgency, payload_helper, ..AppSettings::new(name) });
        }
    }
    policies
}

impl World {
    pub(crate) fn surroundings_change(&mut self) {
        if !self.plan.phone {
            return;
        }
        let kinds = [NetworkKind::Wifi, NetworkKind::Mobile, NetworkKind::Mobile, NetworkKind::Wired];
        let kind = *self.rng.pick(&kinds).expect("four");
        let reaches = [Reach::Full, Reach::Full, Reach::Full, Reach::Portal, Reach::Limited, Reach::None];
        let id = format!("net/{}", self.rng.below(3));
        self.phone.around = Surroundings {
            on_mains: Some(self.rng.chance(3000)),
            battery: Some(self.rng.below(101) as u8),
            network: Network {
                kind,
                id: self.rng.chance(8000).then(|| id.into()),
                metered: self.rng.chance(2000),
                roaming: kind == NetworkKind::Mobile && self.rng.chance(2000),
                reach: *self.rng.pick(&reaches).expect("six"),
            },
        };
        self.count("changes of surroundings");
        self.tell_surroundings();
        self.call(tool(), Request::Query(Query::Apps), What::Json);
    }

    /// Faults are over; whether the phone is on mains is left to chance: everything must arrive all the same.
    pub(crate) fn comes_home(&mut self) {
        self.phone.around.network.roaming = false;
        self.tell_surroundings();
    }

    /// Nothing stands against a transfer any more.
    pub(crate) fn is_well(&mut self) {
        let around = &mut self.phone.around;
        (around.network.reach, around.network.metered, around.on_mains) = (Reach::Full, false, Some(true));
        self.tell_surroundings();
    }

    pub(crate) fn tell_surroundings(&mut self) {
        if self.plan.phone {
            self.tell(Event::Surroundings(self.phone.around.clone()));
        }
    }

    /// The least urgency that may wake the app, as the core knows the world.
    fn may_wake_from(&self, app: &AppKey) -> Urgency {
        let own = self.plan.policies.iter().find(|policy| policy.name == app.service);
        if let Some(own) = own.and_then(|policy| policy.min_urgency) {
            return own;
        }
        let Some(around) = &self.phone.told else { return Urgency::VeryLow };
        let mains = around.on_mains != Some(false);
        let network = &around.network;
        let free = network.kind != NetworkKind::Mobile && !network.metered && network.reach != Reach::None;
        let low = around.battery.is_some_and(|charge| charge <= LOW_BATTERY);
        match (mains, free) {
            (true, true) => Urgency::VeryLow,
            (true, false) => Urgency::Low,
            (false, _) if low => Urgency::High,
            (false, true) => Urgency::Low,
            (false, false) => Urgency::Normal,
        }
    }

    /// An app is woken for a message: something must wait that may.
    pub(crate) fn check_worth_waking(&mut self, app: &AppKey, how: &str) {
        let least = self.may_wake_from(app);
        let policy = self.plan.policies.iter().find(|policy| policy.name == app.service);
        let counts_as = policy.map(|policy| policy.urgency).unwrap_or_default();
        let waiting: Vec<_> = self.reference.waiting_of(app).collect();
        let half = (self.plan.rules.most_waiting / 2).max(1);
        let hold = self.plan.hold_at_most;
        let at = self.at;
        let may = waiting
            .iter()
            .any(|sent| sent.urgency.unwrap_or(counts_as) >= least || sent.at + hold <= at || sent.topic.is_some());
        let endpoint = self.reference.endpoint_is_owed(app) || self.wish_is_owed(app);
        let leaving = self.deleted.contains(app);
        let helped = policy.is_some_and(|policy| policy.payload_helper.is_some());
        let held_too_long = waiting.iter().any(|sent| sent.at + hold <= at || sent.topic.is_some());
        assert!(
            !helped
                || self.stand_ins.declined.contains(app)
                || held_too_long
                || endpoint
                || leaving
                || waiting.len() >= half
                || self.has_ended_transfer(app),
            "{app} was woken ({how}) although its helper did not want it to be"
        );
        assert!(
            may || endpoint || leaving || waiting.len() >= half || self.has_ended_transfer(app),
            "{app} was woken ({how}) for {} messages that are to be held below {least:?}",
            waiting.len()
        );
        if waiting.iter().any(|sent| sent.urgency.unwrap_or(counts_as) < least) {
            self.count("held messages that went along");
        }
    }

    pub(crate) fn check_may_connect(&self) {
        let roaming = self.phone.told.as_ref().is_some_and(|around| around.network.roaming);
        assert!(!roaming || self.plan.roaming == Roaming::Connect, "a connection while roaming");
    }

    // Sleep.

    /// The machine is about to sleep, and asks first where it can.
    pub(crate) fn falls_asleep(&mut self, length: At) {
        if self.phone.falling.is_some() {
            return;
        }
        if !self.is_up() || self.rng.chance(1500) {
            self.suspend(length);
            return;
        }
        self.phone.falling = Some((self.at, length));
        self.phone.allowed = false;
        self.phone.times += 1;
        self.agenda.add(self.at + LOGIND_WAITS, Due::Asleep(self.phone.times));
        self.tell(Event::FallingAsleep);
    }

    pub(crate) fn sleep_allowed(&mut self) {
        let Some((since, _)) = self.phone.falling else { panic!("sleep was allowed, and nobody had asked") };
        assert!(!std::mem::replace(&mut self.phone.allowed, true), "sleep was allowed twice");
        assert!(self.at - since <= LONGEST_DELAY, "sleep was allowed after {} s", (self.at - since) / SEC);
        self.count("sleeps allowed");
        if self.at > since {
            self.count("sleeps delayed for a delivery");
        }
        let at = self.soon(0, 50 * MS);
        self.agenda.add(at, Due::Asleep(self.phone.times));
    }

    pub(crate) fn asleep(&mut self, times: u32) {
        if self.phone.times != times {
            return;
        }
        let Some((_, length)) = self.phone.falling.take() else { return };
        if self.calm || self.rng.chance(1000) {
            self.tell(Event::Resumed);
        } else {
            self.suspend(length);
        }
    }

    pub(crate) fn has_resumed(&mut self) {
        self.phone.falling = None;
        self.phone.resumed = Some(self.at);
    }

    pub(crate) fn stay_awake(&mut self, keep: bool) {
        assert_ne!(self.phone.awake, keep, "said twice");
        if keep {
            self.count("kept awake");
            assert!(self.at < self.window_ends(), "kept awake long after the machine woke up");
        }
        self.phone.awake = keep;
    }

    fn window_ends(&self) -> At {
        let window = u64::try_from(self.plan.times.awake_window.as_nanos()).unwrap_or(At::MAX).min(LONGEST_WINDOW);
        self.phone.resumed.map_or(0, |at| at + window)
    }

    /// The core has said all it had to say for now.
    pub(crate) fn check_sleep(&self) {
        assert!(!self.phone.awake || self.at < self.window_ends(), "kept awake for too long");
        let late = |(since, _): (At, At)| self.at - since >= LONGEST_DELAY && !self.phone.allowed;
        assert!(!self.phone.falling.is_some_and(late), "nobody allows the machine to sleep");
    }

    pub(crate) fn check_awake_no_more(&self) {
        assert!(!self.phone.awake, "the daemon ends and keeps the machine awake");
    }

    /// The daemon is gone, and with it what it held open.
    pub(crate) fn inhibits_no_more(&mut self) {
        self.phone.awake = false;
        self.phone.told = None;
        // Its window is not the next daemon's.
        self.phone.resumed = None;
        if self.phone.falling.is_some() {
            self.agenda.add(self.at, Due::Asleep(self.phone.times));
        }
    }
}
