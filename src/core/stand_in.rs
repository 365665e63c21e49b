//! Speaking to the user in an app's stead: `notifying` decides when, `helping` which payload goes to its helper next; here
//! they meet delivery, the lifecycle and the bus.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Core, START_TIME,
    delivery::Helped,
    helping::Helping,
    lifecycle::State,
    notifying::{Facts, Notifying, Output, Why},
};
use crate::{
    action::{Action, StoreOp},
    config::AppSettings,
    event::Command,
    model::{AppKey, Bus, MessageSeq, Priority, RegistrationId, StoredMessage, Urgency},
    notification::{GENERIC, HelperAnswer, HelperJob, Notification, NotifyNews, NotifyWhen},
    time::{Instant, Now, earliest},
};

/// The upstream under whose name the store keeps what registrations have asked for. None can be called so: names have no
/// control characters.
const NOTIFY: &str = "\u{1}notify";

/// What is kept of it.
#[derive(Debug, Default)]
pub(super) struct StandIn {
    notifying: Notifying,
    pub(super) helping: Helping,
    /// What registrations have asked for (`org.nightporter.notify`).
    wishes: BTreeMap<RegistrationId, NotifyWhen>,
    /// Apps the user wants to see, which are being thawed for that, with the activation token.
    clicked: BTreeMap<AppKey, Option<Arc<str>>>,
    /// Buses on which an app that is spoken for runs, and may speak for itself any moment.
    watched: Vec<Bus>,
}

impl StandIn {
    /// Whether notifications on the bus are to be watched for.
    pub(super) fn wants(&self, bus: Bus) -> bool {
        self.watched.contains(&bus)
    }

    /// When something is due.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        earliest(self.notifying.poll_timeout(), self.helping.poll_timeout())
    }

    /// The app was asked to start, and did not.
    pub(super) fn start_failed(&mut self, app: &AppKey) {
        self.notifying.start_failed(app);
    }

    /// A message for the app was given up.
    pub(super) fn given_up(&mut self, app: &AppKey) {
        self.notifying.given_up(app);
    }

    /// The app runs.
    pub(super) fn appeared(&mut self, app: &AppKey) {
        self.notifying.appeared(app);
    }

    /// The app does not run.
    pub(super) fn vanished(&mut self, app: &AppKey) {
        self.clicked.remove(app);
    }

    /// The app speaks for itself.
    pub(super) fn spoke(&mut self, app: &AppKey) {
        self.notifying.spoke(app);
    }

    /// The bus is gone.
    pub(super) fn bus_down(&mut self, bus: Bus) {
        self.notifying.bus_down(bus);
        self.clicked.retain(|app, _| app.bus != bus);
    }

    /// The app is not ours any more.
    pub(super) fn forget(&mut self, app: &AppKey) {
        self.notifying.spoke(app);
        self.helping.forget(app);
        self.clicked.remove(app);
    }
}

impl Core {
    /// What registrations have asked for in an earlier life, and what waits since. Only before the first event.
    pub(super) fn restore_stand_in(
        &mut self,
        remembered: &[(Arc<str>, Arc<str>, Arc<str>)],
        messages: &[StoredMessage],
        now: Now,
    ) {
        for (_, key, when) in remembered.iter().filter(|(name, ..)| **name == *NOTIFY) {
            let id = key.parse().ok().map(RegistrationId).filter(|id| self.registry.get(*id).is_some());
            match id.zip(NotifyWhen::parse(when)) {
                Some((id, when)) => drop(self.stand_in.wishes.insert(id, when)),
                None => self.store(wish_op(key, ""), None),
            }
        }
        for message in messages {
            self.message_waits(message.registration, message.urgency, now);
        }
    }

    /// What the registration asks for from now on.
    pub(super) fn wish_notify(&mut self, id: RegistrationId, wish: Option<NotifyWhen>) {
        let before = match wish {
            Some(when) => self.stand_in.wishes.insert(id, when),
            None => self.stand_in.wishes.remove(&id),
        };
        if before != wish {
            let value = wish.map_or("", NotifyWhen::as_str);
            self.store(wish_op(&id.0.to_string(), value), None);
        }
    }

    /// A message came for the registration.
    pub(super) fn message_waits(&mut self, id: RegistrationId, urgency: Urgency, now: Now) {
        let Some(app) = self.registry.get(id).map(|registration| registration.app.clone()) else { return };
        let settings = self.app_settings(&app);
        let wish = settings.and_then(|app| app.notify).or(self.stand_in.wishes.get(&id).copied()).unwrap_or_default();
        if wish != NotifyWhen::Never {
            let priority = Priority::of(urgency, settings.is_some_and(|app| app.calls));
            self.stand_in.notifying.arrived(&app, priority, wish == NotifyWhen::Always, now.boot);
        }
    }

    /// The app's payload helper is to see the message, unless the app runs and can take it itself.
    pub(super) fn ask_helper(&mut self, mut job: HelperJob, now: Now) {
        let (app, seq) = (job.app.clone(), job.seq);
        let helper = self.app_settings(&app).and_then(|app| app.payload_helper.clone());
        let Some(helper) = helper.filter(|_| app.bus != Bus::System && !self.runs(&app, now)) else {
            return self.delivery.helped(seq, Helped::Declined, now);
        };
        (job.command, job.network) = (helper.command, helper.network);
        if !self.stand_in.helping.push(job) {
            let reason = "too many messages wait for payload helpers: it is woken for this one";
            self.wake_instead(&app, seq, reason.to_owned(), now);
        }
    }

    /// A helper has answered, or failed to.
    pub(super) fn helped(&mut self, seq: MessageSeq, answer: Result<HelperAnswer, Arc<str>>, now: Now) {
        self.stand_in.helping.done(seq);
        let Some((app, urgency)) = self.delivery.awaits_help(seq) else { return };
        match answer {
            Ok(HelperAnswer::Show { tag, text, category }) => {
                let calls = self.app_settings(&app).is_some_and(|app| app.calls);
                let notification =
                    Notification { tag, number: 0, text, priority: Priority::of(urgency, calls), category };
                if !self.stand_in.notifying.helped(&app, notification) {
                    let reason = "too many notifications are shown for apps: it is woken for this message";
                    return self.wake_instead(&app, seq, reason.to_owned(), now);
                }
                let reason = "a notification was shown in its stead: its payload helper made it of a message, which goes \
                              to it when it runs";
                self.lifecycle.note(&app, "notify", reason.to_owned(), now);
                self.delivery.helped(seq, Helped::Spoken, now);
            }
            Ok(HelperAnswer::Wake) => {
                let reason = "its payload helper wants it woken for a message";
                self.wake_instead(&app, seq, reason.to_owned(), now);
            }
            Ok(HelperAnswer::Drop) => {
                let reason = "its payload helper dropped a message as of no use";
                self.lifecycle.note(&app, "drop", reason.to_owned(), now);
                self.delivery.helped(seq, Helped::Dropped, now);
            }
            Err(why) => {
                let reason = format!("its payload helper is of no use ({why}): it is woken for the message");
                self.wake_instead(&app, seq, reason, now);
            }
        }
    }

    /// Helpers that never came back are not waited for.
    pub(super) fn handle_helpers_timeout(&mut self, now: Now) {
        for seq in self.stand_in.helping.lost(now.boot) {
            self.helped(seq, Err("it did not come back".into()), now);
        }
    }

    /// Starts helpers whose turn it is, and orders what is to be shown or closed. True when there was anything.
    pub(super) fn mind_stand_ins(&mut self, now: Now) -> bool {
        let mut any = self.show_the_touched(now);
        while self.ending.is_none()
            && let Some(job) = self.stand_in.helping.next(now.boot)
        {
            any = true;
            // The app may have been woken meanwhile, or its message gone.
            match self.delivery.awaits_help(job.seq) {
                Some(_) => self.actions.push_back(Action::Help(Box::new(job))),
                None => drop(self.stand_in.helping.done(job.seq)),
            }
        }
        let apps: Vec<AppKey> = self.stand_in.notifying.apps().cloned().collect();
        let mut watched = Vec::new();
        for app in apps {
            let facts = self.facts(&app, now);
            self.stand_in.notifying.settle(&app, facts, now.boot);
            let running = self.apps.get(&app).is_some_and(|presence| presence.owner.is_some());
            if running && self.stand_in.notifying.stands_for(&app) && !watched.contains(&app.bus) {
                watched.push(app.bus);
            }
        }
        while let Some(output) = self.stand_in.notifying.poll_output() {
            any = true;
            match output {
                Output::Order(app, order) => self.actions.push_back(Action::Notify(app, order)),
                Output::Spoken(app, why) => self.lifecycle.note(&app, "notify", sentence(why).to_owned(), now),
            }
        }
        if self.stand_in.watched != watched {
            self.stand_in.watched = watched;
            self.mind_watching();
        }
        any
    }

    /// Something has become of a notification.
    pub(super) fn notification_news(&mut self, app: &AppKey, tag: &str, number: u64, news: NotifyNews, now: Now) {
        // Another stands in its place by now: what was said of the old one is of no matter, but that the user wants the app.
        let current = self.stand_in.notifying.is_current(app, tag, number);
        match news {
            NotifyNews::Clicked(token) => {
                if current {
                    self.stand_in.notifying.gone(app, tag);
                }
                self.show_to_user(app, token, now);
            }
            _ if !current => {}
            NotifyNews::NotShown(why) if tag == GENERIC => {
                let reason = format!("the notification in its stead is not seen yet: {why}");
                self.lifecycle.note(app, "notify", reason, now);
            }
            NotifyNews::NotShown(why) => {
                let reason = format!("what its payload helper made is not seen ({why}): it is woken for what waits");
                self.lifecycle.note(app, "notify", reason, now);
                let order = crate::notification::NotifyOrder::Close(tag.into());
                self.stand_in.notifying.gone(app, tag);
                self.actions.push_back(Action::Notify(app.clone(), order));
                self.stand_in.helping.forget(app);
                self.delivery.untold(app, now);
            }
            NotifyNews::Gone => self.stand_in.notifying.gone(app, tag),
        }
    }

    /// The user has touched a notification in the app's stead: the app is wanted with a window.
    fn show_to_user(&mut self, app: &AppKey, token: Option<Arc<str>>, now: Now) {
        let Some(presence) = self.apps.get_mut(app).filter(|_| self.ending.is_none()) else { return };
        match presence.owner.clone() {
            None => {
                presence.starting = Some(now.boot + START_TIME);
                presence.touched = true;
                self.lifecycle.note(app, "start", "the user touched the notification in its stead", now);
                self.actions.push_back(Action::Activate { app: app.clone(), owner: None, token });
            }
            Some(owner) if self.runs(app, now) => {
                self.actions.push_back(Action::Activate { app: app.clone(), owner: Some(owner), token });
            }
            Some(_) => {
                let by = "the user, who touched the notification in its stead,";
                match self.lifecycle.command(app, Command::Thaw, by, now) {
                    Ok(()) => drop(self.stand_in.clicked.insert(app.clone(), token)),
                    Err(refusal) => self.lifecycle.note(app, "wait", refusal.text, now),
                }
            }
        }
    }

    /// Apps that were thawed because the user wants to see them are asked to come to the front. True when there was any.
    fn show_the_touched(&mut self, now: Now) -> bool {
        let runs = |app: &&AppKey| self.runs(app, now);
        let ready: Vec<AppKey> = self.stand_in.clicked.keys().filter(runs).cloned().collect();
        for app in &ready {
            let owner = self.apps.get(app).and_then(|presence| presence.owner.clone());
            let token = self.stand_in.clicked.remove(app).flatten();
            self.actions.push_back(Action::Activate { app: app.clone(), owner, token });
        }
        !ready.is_empty()
    }

    fn wake_instead(&mut self, app: &AppKey, seq: MessageSeq, reason: String, now: Now) {
        self.lifecycle.note(app, "wake", reason, now);
        self.stand_in.helping.forget(app);
        self.delivery.helped(seq, Helped::Declined, now);
    }

    fn facts(&self, app: &AppKey, now: Now) -> Facts {
        let own = self.app_settings(app).and_then(|app| app.notify);
        let wish = |id: RegistrationId| self.stand_in.wishes.get(&id).copied().unwrap_or_default();
        let wished = || self.registry.of_app(app).map(|registration| wish(registration.id)).max();
        let running = self.apps.get(app).is_some_and(|presence| presence.owner.is_some());
        let state = self.lifecycle.show(app, now).map(|shown| shown.state);
        Facts {
            reachable: self.buses.contains(&app.bus) && self.ending.is_none(),
            in_front: running && state == Some(State::Foreground),
            unstartable: self.delivery.is_unstartable(app),
            waiting: self.delivery.untold_for(app),
            when: own.or_else(wished).unwrap_or_default(),
        }
    }

    fn app_settings(&self, app: &AppKey) -> Option<&AppSettings> {
        self.settings.apps.iter().find(|settings| settings.name == app.service)
    }
}

fn wish_op(key: &str, value: &str) -> StoreOp {
    StoreOp::PutUpstream { upstream: NOTIFY.into(), key: key.into(), value: value.into() }
}

fn sentence(why: Why) -> &'static str {
    match why {
        Why::NotActivatable => {
            "a notification was shown in its stead: a message waits for it, and nothing says how to start it"
        }
        Why::Failing => "a notification was shown in its stead: a message waits for it, and it fails to start",
        Why::GivenUp => "a notification was shown in its stead: a message could not be handed over",
        Why::Wanted => {
            "a notification was shown in its stead, as its registration or the configuration wants it: a message waits \
             for it"
        }
    }
}
