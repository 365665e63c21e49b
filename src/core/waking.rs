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
        if !pending {
            self.wakes.done(app);
        }
        if !self.wakes.is_waiting(app) {
            self.lifecycle.set_pending(app, pending, now);
        }
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
        self.lifecycle.set_pending(&app, true, now);
        self.wake(&app, now);
        true
    }

    /// The app can be called.
    pub(super) fn ready(&mut self, app: &AppKey, owner: Owner, now: Now) {
        self.wakes.done(app);
        self.delivery.ready(app, owner, now);
    }

    /// The app took a message or an endpoint.
    pub(super) fn delivered(&mut self, app: &AppKey, urgency: Option<Urgency>, now: Now) {
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
        for bus in self.buses.iter().copied().filter(|bus| matches!(bus, Bus::Session(_))) {
            match (self.demotion.wants(bus), self.watched.contains_key(&bus)) {
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
    fn runs(&self, app: &AppKey, now: Now) -> bool {
        let state = self.lifecycle.show(app, now).map(|shown| shown.state);
        self.apps.get(app).is_some_and(|presence| presence.owner.is_some())
            && matches!(state, Some(State::Foreground | State::Background | State::Awake))
    }

    /// Makes an app ready for a delivery: thaws it, starts it, or finds that it is ready.
    fn wake(&mut self, app: &AppKey, now: Now) {
        let Some(presence) = self.apps.get_mut(app) else { return };
        let readiness = self.lifecycle.wanted(app, now);
        match (presence.owner.clone(), readiness) {
            // Comes back as `Runnable`, or as the end of the old instance.
            (_, Readiness::Ending) | (Some(_), Readiness::Thawing) => {}
            (Some(owner), Readiness::Ready | Readiness::NotRunning) => self.ready(app, owner, now),
            (None, Readiness::Ready | Readiness::NotRunning | Readiness::Thawing) => {
                if presence.starting.is_none() && self.ending.is_none() {
                    presence.starting = Some(now.boot + START_TIME);
                    self.lifecycle.note(app, "start", "a message is waiting for it", now);
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

fn name_of(app: &AppKey) -> String {
    format!("{}/{}", app.bus.to_number(), app.service)
}

fn shown_op(key: &str, counts: &str) -> StoreOp {
    StoreOp::PutUpstream { upstream: SHOWN.into(), key: key.into(), value: counts.into() }
}
