//! Which messages may wake their app, and what becomes of those that may not.
//!
//! A message waits until its urgency is enough, the app can be called anyway, it has been held for too long, or so many
//! wait that some would be dropped. Then everything that waits for the app goes, in order: that is the batch.

use super::{
    App, BATCH, Delivery, Lane, Output, Reach,
    queue::{Body, Entry, Help},
};
use crate::{
    model::{AppKey, Ending, Urgency},
    time::{Instant, Now},
};

/// Why what was held goes to its app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Release {
    /// Power and network are good enough now.
    Allowed,
    /// It has been held for as long as messages are.
    TimeUp,
    /// Half of what is kept for one app waits; with more something would be dropped.
    Crowded,
    /// Another message, or an endpoint, wakes the app.
    Company,
    /// The app runs.
    Running,
    /// The budget of the app allows it again.
    Batch,
}

/// What a held message waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// Power and network.
    Surroundings,
    /// The app's budget of wake-ups.
    Budget,
    /// That the app runs for another reason: its payload helper has it, or has told the user.
    Helper,
}

/// What an app's messages wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// The most urgent of them.
    highest: Urgency,
    count: usize,
    why: Why,
}

/// What it takes to wake an app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gate {
    minimum: Urgency,
    crowded: bool,
    /// What more urgent ones count as.
    most: Urgency,
    /// Nothing up to normal urgency wakes it, for it has used up its budget.
    batching: bool,
    /// The app's payload helper comes first.
    pub(super) helped: bool,
    /// Half of what is kept for one app waits, so the helper comes first no more.
    pub(super) full: bool,
}

impl Gate {
    /// What the message counts as.
    fn weigh(self, entry: &Entry) -> Urgency {
        entry.urgency.min(self.most)
    }

    /// Whether the message may wake its app, however long it has waited.
    pub(super) fn passes(self, entry: &Entry) -> bool {
        let urgency = self.weigh(entry);
        let affordable = !self.batching || urgency > Urgency::Normal;
        self.crowded || affordable && urgency >= self.minimum
    }

    /// The same when the app's helper has had its say.
    fn wakes(self, entry: &Entry) -> bool {
        self.passes(entry) && (!self.helped || self.full || entry.help == Help::Declined)
    }
}

impl Delivery {
    /// From now on an app may be woken for messages of this urgency, unless it has a minimum of its own.
    pub fn set_minimum(&mut self, minimum: Urgency, now: Now) {
        if std::mem::replace(&mut self.minimum, minimum) != minimum {
            let apps: Vec<AppKey> = self.apps.keys().cloned().collect();
            for app in apps {
                self.settle(&app, now);
            }
        }
    }

    /// Whether the app's urgent messages count as normal, because they show nothing to the user.
    pub fn set_demoted(&mut self, key: &AppKey, demoted: bool, now: Now) {
        if let Some(app) = self.apps.get_mut(key)
            && std::mem::replace(&mut app.demoted, demoted) != demoted
        {
            self.settle(key, now);
        }
    }

    /// Whether attachments may be downloaded. While they may not, each waits as long as a held message does.
    pub fn set_fetching(&mut self, fetching: bool, now: Now) {
        self.fetching = fetching;
        self.start_fetches(now);
    }

    /// The least urgency that may wake the app now.
    pub fn minimum_for(&self, app: &AppKey) -> Urgency {
        match self.own_minimums.get(&app.service) {
            Some(own) if self.urgency.enabled => *own,
            Some(_) | None => self.minimum,
        }
    }

    /// Whether the app has a minimum of its own.
    pub fn has_own_minimum(&self, app: &AppKey) -> bool {
        self.urgency.enabled && self.own_minimums.contains_key(&app.service)
    }

    /// Messages that wait for the app for want of urgency.
    pub fn held_for(&self, app: &AppKey) -> usize {
        self.apps.get(app).and_then(|app| app.held).map_or(0, |held| held.count)
    }

    /// Apps with held messages: worth telling [`Delivery::ready`] of when they run.
    pub fn holding(&self) -> impl Iterator<Item = &AppKey> {
        self.apps.iter().filter(|(_, app)| app.held.is_some()).map(|(key, _)| key)
    }

    /// Whether something is on its way to an app, or to here for one: worth staying awake for.
    pub fn is_busy(&self) -> bool {
        !self.fetches.is_empty() || self.apps.values().any(|app| app.pending_told)
    }

    /// Whether something is on its way to this app.
    pub fn is_pending(&self, app: &AppKey) -> bool {
        self.apps.get(app).is_some_and(|app| app.pending_told)
    }

    /// Whether something waits that is worth waking the app for.
    pub(super) fn is_wanted(&self, key: &AppKey, now: Now) -> bool {
        let Some(app) = self.apps.get(key) else { return false };
        let gate = self.gate(key);
        let wakes = |entry: &Entry| entry.expires > now.wall && (gate.wakes(entry) || entry.held_until <= now.boot);
        let wants = |lane: &Lane| lane.is_free(now.boot) && (lane.endpoint.is_some() || lane.reachable().any(wakes));
        self.lanes_of(app).any(wants)
    }

    /// The app is not to be woken: notes what is held, if anything is.
    pub(super) fn hold(&mut self, key: &AppKey, now: Now) {
        let Some(app) = self.apps.get(key) else { return };
        let idle = |lane: &&Lane| lane.flight.is_none();
        let expired: Vec<_> =
            self.lanes_of(app).filter(idle).flat_map(|lane| lane.queue.expired(now.wall, false)).collect();
        for seq in expired {
            self.end(seq, Ending::Expired);
        }
        let Some(app) = self.apps.get(key) else { return };
        let gate = self.gate(key);
        let why =
            if gate.batching && self.minimum_for(key) <= Urgency::Normal { Why::Budget } else { Why::Surroundings };
        let mut count = 0;
        let (mut first, mut highest) = (None::<(&Entry, Urgency)>, Urgency::VeryLow);
        for lane in self.lanes_of(app).filter(idle) {
            for entry in lane.reachable().filter(|entry| !gate.wakes(entry)) {
                count += 1;
                highest = highest.max(gate.weigh(entry));
                if gate.passes(entry) {
                    continue;
                }
                if first.is_none_or(|(other, _)| other.seq > entry.seq) {
                    first = Some((entry, gate.weigh(entry)));
                }
            }
        }
        let told = first.map(|(entry, urgency)| (urgency, entry.by_policy));
        let Some(app) = self.apps.get_mut(key) else { return };
        let why = if told.is_some() { why } else { Why::Helper };
        let held = (count > 0).then_some(Held { highest, count, why });
        let news = app.held.is_none_or(|before| before.why != why);
        app.held = held;
        if let Some((urgency, by_policy)) = told.filter(|_| news) {
            self.outputs.push_back(Output::Held { app: key.clone(), urgency, by_policy, why });
        }
    }

    /// The app is asked for, or runs: nothing is held any more.
    pub(super) fn release(&mut self, key: &AppKey, running: bool, now: Now) {
        let Some(Held { highest, count, why }) = self.apps.get_mut(key).and_then(|app| app.held.take()) else { return };
        self.count_from_now(key, now.boot);
        let Some(app) = self.apps.get(key) else { return };
        let gate = self.gate(key);
        let too_long = |entry: &Entry| !gate.wakes(entry) && entry.held_until <= now.boot;
        let why = if running {
            Release::Running
        } else if why == Why::Budget && !gate.batching {
            Release::Batch
        } else if why != Why::Helper && !gate.batching && highest >= gate.minimum {
            Release::Allowed
        } else if self.lanes_of(app).any(|lane| lane.reachable().any(too_long)) {
            Release::TimeUp
        } else if gate.crowded || gate.helped && gate.full {
            Release::Crowded
        } else {
            Release::Company
        };
        self.outputs.push_back(Output::Released { app: key.clone(), count, why });
    }

    /// Held is not late: what has waited was not on its way.
    fn count_from_now(&mut self, key: &AppKey, now: Instant) {
        let lanes = self.apps.get(key).map(|app| app.lanes.clone()).unwrap_or_default();
        for id in lanes {
            let entries = self.lanes.get_mut(&id).into_iter().flat_map(|lane| lane.queue.iter_mut());
            for (since, _) in entries.filter_map(|entry| entry.arrived.as_mut()) {
                *since = now;
            }
        }
    }

    /// When the first of the held messages will have been held for too long.
    pub(super) fn holds_end(&self) -> Option<Instant> {
        self.apps.keys().filter_map(|key| self.hold_ends(key)).min()
    }

    pub(super) fn held_too_long(&self, now: Instant) -> Vec<AppKey> {
        self.apps.keys().filter(|key| self.hold_ends(key).is_some_and(|at| at <= now)).cloned().collect()
    }

    fn hold_ends(&self, key: &AppKey) -> Option<Instant> {
        let app = self.apps.get(key).filter(|app| app.held.is_some() && app.quiet_until.is_none())?;
        let gate = self.gate(key);
        let free = self.lanes_of(app).filter(|lane| lane.flight.is_none() && lane.retry_at.is_none());
        free.flat_map(Lane::reachable).filter(|entry| !gate.wakes(entry)).map(|entry| entry.held_until).min()
    }

    /// When something is due with the call in flight. One that nobody is to be woken for has time.
    pub(super) fn flight_due(&self, app: &App, lane: &Lane) -> Option<Instant> {
        let flight = lane.flight.as_ref()?;
        if !flight.slow || app.reach != Reach::Away || lane.endpoint.is_some() {
            return Some(flight.deadline);
        }
        let gate = self.gate(&lane.app);
        let held_until = match lane.reachable().any(|entry| gate.wakes(entry)) {
            true => None,
            false => lane.reachable().map(|entry| entry.held_until).min(),
        };
        Some(held_until.map_or(flight.deadline, |until| until.max(flight.deadline)))
    }

    pub(super) fn gate(&self, key: &AppKey) -> Gate {
        let minimum = self.minimum_for(key);
        let half = (self.limits.messages_per_app / 2).max(1);
        let app = self.apps.get(key);
        let batching = app.is_some_and(|app| app.normal.is_closed());
        let demoted = app.is_some_and(|app| app.demoted || app.urgent.is_closed());
        let most = if demoted { Urgency::Normal } else { Urgency::High };
        let full = self.waiting_for(key) >= half;
        let crowded = !batching && minimum > Urgency::VeryLow && full;
        Gate { minimum, crowded, most, batching, helped: self.helped.contains(&key.service), full }
    }

    /// What the most urgent of the messages that wait for the app counts as; endpoints are of normal urgency.
    pub(super) fn most_urgent(&self, key: &AppKey, now: Now) -> Option<Urgency> {
        let (app, gate) = (self.apps.get(key)?, self.gate(key));
        let free = self.lanes_of(app).filter(|lane| lane.is_free(now.boot));
        let endpoint = |lane: &Lane| lane.endpoint.as_ref().map(|_| Urgency::Normal);
        free.flat_map(|lane| endpoint(lane).into_iter().chain(lane.reachable().map(|entry| gate.weigh(entry)))).max()
    }

    /// Whether the app may be woken for what waits as often as it has been. When not, it is told why.
    pub(super) fn afford(&mut self, key: &AppKey, now: Now) -> bool {
        let urgency = self.most_urgent(key, now).unwrap_or_default();
        let most = self.limits.wakes_per_hour;
        let Some(state) = self.apps.get(key) else { return true };
        // An endpoint comes once, and the app has asked for it; a retry has waited for its turn.
        if self.lanes_of(state).any(|lane| lane.endpoint.is_some()) {
            return true;
        }
        let Some(app) = self.apps.get_mut(key) else { return true };
        let urgent = urgency > Urgency::Normal;
        let budget = if urgent { &mut app.urgent } else { &mut app.normal };
        if budget.is_closed() || budget.take(most, now.boot) {
            // Closed, and wanted all the same: it has been held for long enough.
            return true;
        }
        let minutes = BATCH.as_secs() / 60;
        let reason = match urgent {
            true => format!(
                "messages of high urgency have woken it {most} times within an hour (limits.wakes-per-hour): for                  {minutes} min they count as normal"
            ),
            false => format!(
                "messages have woken it {most} times within an hour (limits.wakes-per-hour): for {minutes} min what is                  not urgent is held and comes all at once"
            ),
        };
        self.outputs.push_back(Output::Note(key.clone(), "budget", reason));
        false
    }

    pub(super) fn lanes_of<'a>(&'a self, app: &'a App) -> impl Iterator<Item = &'a Lane> {
        app.lanes.iter().filter_map(|id| self.lanes.get(id))
    }
}

impl App {
    /// When one of its budgets allows something again.
    pub(super) fn budget_opens(&self) -> Option<Instant> {
        crate::time::earliest(self.normal.closed_until(), self.urgent.closed_until())
    }
}

impl Lane {
    /// What could be handed over one after the other if the app were ready.
    fn reachable(&self) -> impl Iterator<Item = &Entry> {
        self.queue.iter().take_while(|entry| !matches!(entry.body, Body::Fetching { .. }))
    }

    /// Whether something could be sent now if the app were ready.
    fn is_free(&self, now: Instant) -> bool {
        self.flight.is_none() && self.retry_at.is_none_or(|at| at <= now)
    }
}
