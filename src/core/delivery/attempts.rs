//! How a message gets to its app: when the app is wanted, one call at a time, and what to do when it fails.

use std::sync::Arc;

use super::{ANSWER_TIME, Cargo, Delivery, Flight, Handover, Output, Reach, backoff, queue::Body};
use crate::{
    event::{CallOutcome, DeliveryTicket, StartOutcome},
    model::{AppKey, Bus, Ending, Owner, RegistrationId, Urgency},
    time::Now,
};

impl Delivery {
    /// The bus says that the app runs, as a new instance or for the first time.
    pub fn appeared(&mut self, app: &AppKey, now: Now) {
        if let Some(state) = self.apps.get_mut(app) {
            state.reach = Reach::Away;
            state.quiet_until = None;
        }
        self.settle(app, now);
    }

    /// The bus says that the app does not run. Its calls in flight end on their own.
    pub fn vanished(&mut self, app: &AppKey, now: Now) {
        if let Some(state) = self.apps.get_mut(app) {
            state.reach = Reach::Away;
        }
        self.settle(app, now);
    }

    /// The app that was asked for has its turn. False when nothing is worth it any more: power or network are worse than they
    /// were, or what waited has expired. Then it is not asked for any more.
    pub fn turn_has_come(&mut self, app: &AppKey, now: Now) -> bool {
        let Some(state) = self.apps.get(app) else { return false };
        let called = state.lanes.iter().any(|id| self.lanes.get(id).is_some_and(|lane| lane.flight.is_some()));
        if state.reach != Reach::Asked || called || self.is_wanted(app, now) {
            return true;
        }
        if let Some(state) = self.apps.get_mut(app) {
            state.reach = Reach::Away;
        }
        self.settle(app, now);
        false
    }

    /// The app runs, is not frozen, and `owner` is its instance.
    pub fn ready(&mut self, app: &AppKey, owner: Owner, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        state.reach = Reach::Ready(owner);
        for id in &state.lanes {
            if let Some(flight) = self.lanes.get_mut(id).and_then(|lane| lane.flight.as_mut()) {
                flight.slow = false;
                flight.deadline = now.boot + ANSWER_TIME;
            }
        }
        self.settle(app, now);
    }

    /// The app is about to be frozen or ended: no call before it is ready again, and those not taken out yet are called
    /// off.
    pub fn unready(&mut self, app: &AppKey, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        if !matches!(state.reach, Reach::Ready(_) | Reach::Asked) {
            return;
        }
        state.reach = Reach::Away;
        let (lanes, flights) = (&mut self.lanes, &mut self.flights);
        self.outputs.retain(|output| match output {
            Output::Call { ticket, app: called, .. } if called == app => {
                let lane = flights.remove(ticket).and_then(|registration| lanes.get_mut(&registration));
                if let Some(lane) = lane {
                    lane.flight.take_if(|flight| flight.ticket == *ticket);
                }
                false
            }
            _ => true,
        });
        self.settle(app, now);
    }

    /// The app could not be started.
    pub fn start_failed(&mut self, app: &AppKey, outcome: &StartOutcome, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        if state.reach != Reach::Asked {
            return;
        }
        match outcome {
            StartOutcome::Started => return,
            StartOutcome::NotActivatable => {
                state.reach = Reach::Unstartable;
                let reason = "a message waits for it, but nothing says how to start it (no D-Bus service file); \
                              it is delivered when the app starts by itself";
                self.outputs.push_back(Output::Note(app.clone(), "wait", reason.to_owned()));
            }
            StartOutcome::Failed(text) => {
                state.reach = Reach::Away;
                let delay = state.failed(now);
                let reason = format!("it could not be started ({text}); next try in {} s", delay.as_secs().max(1));
                self.outputs.push_back(Output::Note(app.clone(), "wait", reason));
                let lanes = state.lanes.clone();
                for id in lanes {
                    self.count_failure(id, None, text);
                }
            }
        }
        self.settle(app, now);
    }

    /// The bus is gone: nothing is known of its apps, and what was in flight is not.
    pub fn bus_down(&mut self, bus: Bus, now: Now) {
        let apps: Vec<AppKey> = self.apps.keys().filter(|app| app.bus == bus).cloned().collect();
        for app in apps {
            let Some(state) = self.apps.get_mut(&app) else { continue };
            state.reach = Reach::Unknown;
            for id in &state.lanes {
                if let Some(flight) = self.lanes.get_mut(id).and_then(|lane| lane.flight.take()) {
                    self.flights.remove(&flight.ticket);
                }
            }
            self.settle(&app, now);
        }
    }

    /// A call ended.
    pub fn call_done(&mut self, ticket: DeliveryTicket, outcome: &CallOutcome, now: Now) {
        let Some(registration) = self.flights.remove(&ticket) else { return };
        let Some(lane) = self.lanes.get_mut(&registration) else { return };
        let Some(flight) = lane.flight.take_if(|flight| flight.ticket == ticket) else { return };
        let key = lane.app.clone();
        let Some(app) = self.apps.get_mut(&key) else { return };
        match outcome {
            CallOutcome::Accepted => {
                app.failures = 0;
                app.quiet_until = None;
                lane.retry_at = None;
                let urgency = match flight.cargo {
                    Cargo::Message(seq) => {
                        let urgency = lane.queue.entry(seq).map(|entry| entry.urgency);
                        if let Some((since, from)) = lane.queue.entry(seq).and_then(|entry| entry.arrived) {
                            self.outputs.push_back(Output::Reached {
                                app: key.clone(),
                                from,
                                took: now.boot.since(since),
                                urgency: urgency.unwrap_or_default(),
                            });
                        }
                        self.end(seq, Ending::Accepted);
                        urgency
                    }
                    Cargo::Endpoint(told) => {
                        lane.endpoint.take_if(|due| due.endpoint == told);
                        self.outputs.push_back(Output::EndpointTold(registration, told));
                        None
                    }
                };
                self.outputs.push_back(Output::Delivered(key.clone(), urgency));
            }
            CallOutcome::Refused(text) => {
                let attempts = self.count_failure(registration, Some(&flight.cargo), text);
                if let Some(lane) = self.lanes.get_mut(&registration) {
                    lane.retry_at = attempts.map(|attempts| now.boot + backoff(attempts));
                }
            }
            CallOutcome::Vanished => {
                if matches!(app.reach, Reach::Ready(_)) {
                    app.reach = Reach::Away;
                }
                app.failed(now);
                self.count_failure(registration, Some(&flight.cargo), "it ended before it took the message");
            }
            CallOutcome::NotSent(text) => {
                log::warn!("a call to {key} could not be sent: {text}");
                lane.retry_at = Some(now.boot + backoff(3));
            }
        }
        self.settle(&key, now);
    }

    /// Sends what can be sent, asks for the app if it is wanted, and tells whether a delivery is under way.
    pub(super) fn settle(&mut self, key: &AppKey, now: Now) {
        let Some(app) = self.apps.get(key) else { return };
        let lanes = app.lanes.clone();
        if let Reach::Ready(owner) = app.reach.clone() {
            self.release(key, true, now);
            for id in &lanes {
                self.send_next(*id, &owner, now);
            }
        }
        let busy = lanes.iter().any(|id| {
            self.lanes.get(id).is_some_and(|lane| {
                lane.flight.as_ref().is_some_and(|flight| !flight.slow)
                    || lane.queue.first().is_some_and(|entry| entry.body == Body::Loading)
            })
        });
        self.ask_or_hold(key, now);
        let Some(app) = self.apps.get_mut(key) else { return };
        let pending = match app.reach {
            Reach::Ready(_) => busy,
            Reach::Asked => true,
            Reach::Unknown | Reach::Away | Reach::Unstartable => false,
        };
        if pending != app.pending_told {
            app.pending_told = pending;
            self.outputs.push_back(Output::Pending(key.clone(), pending));
        }
    }

    /// An app that is away is asked for when something is worth waking it.
    fn ask_or_hold(&mut self, key: &AppKey, now: Now) {
        self.ask_helper(key, now);
        let Some(app) = self.apps.get_mut(key) else { return };
        match app.reach {
            Reach::Away => {}
            Reach::Unknown | Reach::Unstartable => {
                app.held = None;
                return;
            }
            Reach::Asked => {
                if app.asked < Urgency::High
                    && let Some(urgency) = self.most_urgent(key, now)
                    && self.is_wanted(key, now)
                    && let Some(app) = self.apps.get_mut(key)
                    && urgency > app.asked
                {
                    app.asked = urgency;
                    self.outputs.push_back(Output::Wake(key.clone(), urgency));
                }
                return;
            }
            Reach::Ready(_) => return,
        }
        let quiet = app.quiet_until.is_some();
        if !self.is_wanted(key, now) {
            self.hold(key, now);
        } else if !quiet && self.afford(key, now) {
            self.release(key, false, now);
            self.ask(key, now);
        } else if !quiet {
            // The budget is used up: what may still wake it is another question now.
            self.ask_or_hold(key, now);
        }
    }

    fn ask(&mut self, key: &AppKey, now: Now) {
        let urgency = self.most_urgent(key, now).unwrap_or_default();
        if let Some(app) = self.apps.get_mut(key) {
            (app.reach, app.asked) = (Reach::Asked, urgency);
        }
        self.outputs.push_back(Output::Wake(key.clone(), urgency));
    }

    pub(super) fn settle_lane(&mut self, registration: RegistrationId, now: Now) {
        if let Some(app) = self.lanes.get(&registration).map(|lane| lane.app.clone()) {
            self.settle(&app, now);
        }
    }

    fn send_next(&mut self, registration: RegistrationId, owner: &Owner, now: Now) {
        if self.ending {
            return;
        }
        self.end_expired_head(registration, now);
        let Some(lane) = self.lanes.get_mut(&registration) else { return };
        if lane.flight.is_some() || lane.retry_at.is_some_and(|at| at > now.boot) {
            return;
        }
        let (cargo, call, urgency) = if let Some(due) = &lane.endpoint {
            let endpoint = Arc::clone(&due.endpoint);
            let call = Handover::Endpoint { token: Arc::clone(&lane.token), endpoint: Arc::clone(&endpoint) };
            (Cargo::Endpoint(endpoint), call, None)
        } else {
            let Some(entry) = lane.queue.first_mut() else { return };
            match &entry.body {
                Body::Inline(body) => (
                    Cargo::Message(entry.seq),
                    Handover::Message {
                        token: Arc::clone(&lane.token),
                        id: Arc::clone(&entry.id),
                        body: Arc::clone(body),
                    },
                    Some(entry.urgency),
                ),
                Body::Stored => {
                    entry.body = Body::Loading;
                    self.outputs.push_back(Output::LoadBody(entry.seq));
                    return;
                }
                Body::Loading | Body::Fetching { .. } => return,
            }
        };
        let ticket = DeliveryTicket(self.next_ticket);
        self.next_ticket += 1;
        lane.retry_at = None;
        lane.flight = Some(Flight { ticket, cargo, deadline: now.boot + ANSWER_TIME, slow: false });
        self.flights.insert(ticket, registration);
        let (app, version) = (lane.app.clone(), lane.version);
        self.outputs.push_back(Output::Call { ticket, app, owner: owner.clone(), version, call, urgency });
    }

    fn end_expired_head(&mut self, registration: RegistrationId, now: Now) {
        while let Some(lane) = self.lanes.get(&registration)
            && lane.flight.is_none()
            && let Some(entry) = lane.queue.first()
            && entry.expires <= now.wall
        {
            self.end(entry.seq, Ending::Expired);
        }
    }

    /// The app has had its time to answer, or its pause after that is over.
    pub(super) fn answer_is_late(&mut self, registration: RegistrationId, now: Now) {
        let Some(lane) = self.lanes.get_mut(&registration) else { return };
        let key = lane.app.clone();
        let (Some(flight), Some(app)) = (lane.flight.as_mut(), self.apps.get_mut(&key)) else { return };
        if flight.slow {
            // Another chance: an app that is awake has it now, any other once it was woken.
            flight.slow = false;
            flight.deadline = now.boot + ANSWER_TIME;
            if app.reach == Reach::Away {
                app.quiet_until = None;
                self.release(&key, false, now);
                self.ask(&key, now);
            }
        } else {
            flight.slow = true;
            let cargo = flight.cargo.clone();
            if let Some(attempts) = self.count_failure(registration, Some(&cargo), "it does not answer")
                && let Some(flight) = self.lanes.get_mut(&registration).and_then(|lane| lane.flight.as_mut())
            {
                flight.deadline = now.boot + backoff(attempts + 2);
                let reason = format!(
                    "it has not answered for {} s; its other messages wait until it does or ends",
                    ANSWER_TIME.as_secs()
                );
                self.outputs.push_back(Output::Note(key.clone(), "wait", reason));
            }
        }
        self.settle(&key, now);
    }

    /// One more failure of what is at the head of a lane; gives up at the limit. Returns the failures so far, `None`
    /// when it was given up or there was nothing.
    pub(super) fn count_failure(
        &mut self,
        registration: RegistrationId,
        cargo: Option<&Cargo>,
        why: &str,
    ) -> Option<u32> {
        let limit = self.limits.attempts;
        let lane = self.lanes.get_mut(&registration)?;
        let of_endpoint = match cargo {
            Some(Cargo::Endpoint(_)) => true,
            Some(Cargo::Message(_)) => false,
            None => lane.endpoint.is_some(),
        };
        if of_endpoint {
            let due = lane.endpoint.as_mut()?;
            due.attempts += 1;
            if due.attempts < limit {
                return Some(due.attempts);
            }
            lane.endpoint = None;
            self.drop_flight(registration);
            let app = self.lanes.get(&registration)?.app.clone();
            let reason =
                format!("it did not take its new endpoint in {limit} tries ({why}); it gets it when it registers");
            self.outputs.push_back(Output::Note(app, "give-up", reason));
            return None;
        }
        let entry = match cargo {
            Some(Cargo::Message(seq)) => lane.queue.entry(*seq)?,
            Some(Cargo::Endpoint(_)) | None => lane.queue.first_mut()?,
        };
        entry.attempts += 1;
        if entry.attempts < limit {
            return Some(entry.attempts);
        }
        let seq = entry.seq;
        self.give_up(seq, &format!("the last of {limit} tries failed: {why}"));
        None
    }

    /// Stops waiting for a call: what it carried has been given up, and a late answer no longer matters.
    pub(super) fn drop_flight(&mut self, registration: RegistrationId) {
        if let Some(flight) = self.lanes.get_mut(&registration).and_then(|lane| lane.flight.take()) {
            self.flights.remove(&flight.ticket);
        }
    }
}
