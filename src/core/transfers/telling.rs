//! Telling an app how its transfers ended: it is woken for that like for a message, one call at a time, until it has answered.

use std::sync::Arc;

use super::{Direction, How, Instant, Now, Output, Owner, Phase, TransferId, TransferTicket, Transfers};
use crate::{
    event::{CallOutcome, StartOutcome},
    model::{AppKey, Bus},
};
use std::time::Duration;

/// For an answer: the app need not be awake for a call it has not answered by then, which still counts when it comes.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// An app that has transfers.
#[derive(Debug, Default)]
pub(super) struct App {
    reach: Reach,
    flight: Option<Flight>,
    retry_at: Option<Instant>,
    failures: u32,
    pending_told: bool,
    /// When it was its turn last, counted.
    pub(super) served: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Reach {
    /// Nothing is known of its bus.
    #[default]
    Unknown,
    Away,
    Unstartable,
    /// It is being made ready.
    Asked,
    Ready(Owner),
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    ticket: TransferTicket,
    id: TransferId,
    /// None once the time for an answer is over.
    deadline: Option<Instant>,
}

impl App {
    /// It calls us.
    pub(super) fn is_here(&mut self) {
        if matches!(self.reach, Reach::Unknown | Reach::Unstartable) {
            self.reach = Reach::Away;
        }
    }

    pub(super) fn drop_flight_of(&mut self, id: TransferId) {
        self.flight.take_if(|flight| flight.id == id);
    }

    fn failed(&mut self, now: Now) {
        self.failures = self.failures.saturating_add(1);
        let millis = 250_u64.saturating_mul(4_u64.saturating_pow(self.failures.saturating_sub(1).min(16)));
        self.retry_at = Some(now.boot + Duration::from_millis(millis).min(Duration::from_secs(600)));
    }
}

impl Transfers {
    /// The bus says that the app runs as another instance than before, or does not run.
    pub fn moved(&mut self, app: &AppKey, appeared: bool, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        state.reach = Reach::Away;
        if appeared {
            (state.retry_at, state.failures) = (None, 0);
            self.all.values_mut().filter(|entry| entry.transfer.app == *app).for_each(|entry| entry.given_up = false);
        }
        self.settle_app(app, now);
    }

    /// The app runs, is not held still, and `owner` is its instance.
    pub fn ready(&mut self, app: &AppKey, owner: Owner, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        state.reach = Reach::Ready(owner);
        self.settle_app(app, now);
    }

    /// The app is about to be held still or ended: no call before it is ready again, and one not made yet is called off.
    pub fn unready(&mut self, app: &AppKey, now: Now) {
        let Some(state) = self.apps.get_mut(app) else { return };
        if !matches!(state.reach, Reach::Ready(_) | Reach::Asked) {
            return;
        }
        state.reach = Reach::Away;
        self.out.retain(|output| match output {
            Output::Tell { ticket, app: called, .. } if called == app => {
                state.flight.take_if(|flight| flight.ticket == *ticket);
                false
            }
            _ => true,
        });
        self.settle_app(app, now);
    }

    /// The app could not be started.
    pub fn start_failed(&mut self, app: &AppKey, outcome: &StartOutcome, now: Now) {
        let Some(state) = self.apps.get_mut(app).filter(|state| state.reach == Reach::Asked) else { return };
        match outcome {
            StartOutcome::Started => return,
            StartOutcome::NotActivatable => state.reach = Reach::Unstartable,
            StartOutcome::Failed(text) => {
                state.reach = Reach::Away;
                state.failed(now);
                self.count_failure(app, text);
            }
        }
        self.settle_app(app, now);
    }

    /// The bus is gone, and nothing is known of its apps.
    pub fn bus_down(&mut self, bus: Bus, now: Now) {
        let apps: Vec<AppKey> = self.apps.keys().filter(|app| app.bus == bus).cloned().collect();
        for app in apps {
            if let Some(state) = self.apps.get_mut(&app) {
                (state.reach, state.flight) = (Reach::Unknown, None);
            }
            self.settle_app(&app, now);
        }
    }

    /// [`Output::Tell`] ended.
    pub fn told(&mut self, ticket: TransferTicket, outcome: &CallOutcome, now: Now) {
        let is_it = |state: &App| state.flight.is_some_and(|flight| flight.ticket == ticket);
        let Some((app, state)) = self.apps.iter_mut().find(|(_, state)| is_it(state)) else { return };
        let app = app.clone();
        let Some(flight) = state.flight.take() else { return };
        match outcome {
            CallOutcome::Accepted => {
                (state.failures, state.retry_at) = (0, None);
                self.out.push_back(Output::Heard(app.clone()));
                self.heard(flight.id);
            }
            CallOutcome::Refused(text) | CallOutcome::NotSent(text) => {
                state.failed(now);
                self.count_failure(&app, text);
            }
            CallOutcome::Vanished => {
                if matches!(state.reach, Reach::Ready(_)) {
                    state.reach = Reach::Away;
                }
                state.failed(now);
                self.count_failure(&app, "it ended before it answered");
            }
        }
        self.settle_app(&app, now);
    }

    /// Whether something is on its way to or from the app.
    pub fn is_pending(&self, app: &AppKey) -> bool {
        self.apps.get(app).is_some_and(|state| state.pending_told)
    }

    /// Whether anything is: the machine need not sleep at once.
    pub fn is_busy(&self) -> bool {
        self.apps.values().any(|state| state.pending_told)
    }

    /// Whether the app was asked for, and is still wanted.
    pub fn is_asked(&self, app: &AppKey) -> bool {
        self.apps.get(app).is_some_and(|state| state.reach == Reach::Asked)
    }

    /// Apps that are to hear something and are not asked for: who of them runs anyway can hear it.
    pub fn holding(&self) -> impl Iterator<Item = &AppKey> {
        self.apps
            .iter()
            .filter(|(app, state)| {
                state.reach == Reach::Away
                    && state.retry_at.is_none()
                    && state.flight.is_none()
                    && self.news(app).is_some()
            })
            .map(|(app, _)| app)
    }

    pub(super) fn settle_apps(&mut self, now: Now) {
        let apps: Vec<AppKey> = self.apps.keys().cloned().collect();
        for app in apps {
            self.settle_app(&app, now);
        }
    }

    /// Tells what can be told, asks for the app if it is wanted, and says whether something is on its way.
    pub(super) fn settle_app(&mut self, app: &AppKey, now: Now) {
        let news = self.news(app);
        let content = self.of(app).any(|entry| entry.phase == Phase::Content);
        let none_left = self.of(app).next().is_none();
        let Some(state) = self.apps.get_mut(app) else { return };
        let free = state.flight.is_none() && state.retry_at.is_none() && !self.ending;
        match &state.reach {
            Reach::Ready(owner) if free => {
                let owner = owner.clone();
                if let Some((id, status, text)) = news {
                    let ticket = TransferTicket(self.next_ticket);
                    self.next_ticket += 1;
                    state.flight = Some(Flight { ticket, id, deadline: Some(now.boot + ANSWER_TIME) });
                    self.out.push_back(Output::Tell { ticket, app: app.clone(), owner, id, status, text });
                }
            }
            Reach::Away if free && self.may_wake && news.is_some() => {
                state.reach = Reach::Asked;
                self.out.push_back(Output::Wake(app.clone()));
            }
            // It was taken away meanwhile.
            Reach::Asked if news.is_none() => state.reach = Reach::Away,
            _ => {}
        }
        let on_its_way = match state.reach {
            Reach::Ready(_) => state.flight.is_some_and(|flight| flight.deadline.is_some()),
            Reach::Asked => true,
            Reach::Unknown | Reach::Away | Reach::Unstartable => false,
        };
        let pending = on_its_way || (content && state.reach != Reach::Unknown);
        if pending != state.pending_told {
            state.pending_told = pending;
            self.out.push_back(Output::Pending(app.clone(), pending));
        }
        if none_left && state.flight.is_none() && !pending {
            self.apps.remove(app);
        }
    }

    pub(super) fn telling_timeout(&mut self, now: Now) {
        for state in self.apps.values_mut() {
            state.retry_at.take_if(|at| *at <= now.boot);
            if let Some(flight) = &mut state.flight {
                flight.deadline.take_if(|at| *at <= now.boot);
            }
        }
    }

    pub(super) fn telling_deadline(&self) -> Option<Instant> {
        let deadlines = self.apps.values().filter_map(|state| state.flight?.deadline);
        deadlines.chain(self.apps.values().filter_map(|state| state.retry_at)).min()
    }

    /// What the app is to hear next: the oldest of what is durable.
    fn news(&self, app: &AppKey) -> Option<(TransferId, &'static str, Arc<str>)> {
        self.of(app).find_map(|entry| {
            let end = entry.transfer.end.as_ref()?;
            let waits = !end.told && !entry.given_up && entry.saving == 0 && entry.save_again.is_none();
            waits.then(|| (entry.transfer.id, end.how.as_str(), Arc::clone(&end.text)))
        })
    }

    fn heard(&mut self, id: TransferId) {
        let Some(entry) = self.all.get_mut(&id) else { return };
        let download = entry.transfer.wish.direction == Direction::Download;
        let Some(end) = entry.transfer.end.as_mut() else { return };
        end.told = true;
        if end.how == How::Done && download && !end.collected { self.note(id) } else { self.drop_entry(id) }
    }

    /// One more failure to tell it of the oldest; at the limit it is left to ask.
    fn count_failure(&mut self, app: &AppKey, why: &str) {
        let Some((id, ..)) = self.news(app) else { return };
        let Some(state) = self.apps.get_mut(app) else { return };
        if state.failures < self.attempts {
            return;
        }
        state.failures = 0;
        let text =
            format!("it did not take the news of {} in {} tries ({why}); it can ask", self.name(id), self.attempts);
        if let Some(entry) = self.all.get_mut(&id) {
            entry.given_up = true;
        }
        self.out.push_back(Output::Decided(app.clone(), "give-up", text));
    }
}
