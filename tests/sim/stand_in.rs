//! Speaking for apps: payload helpers that answer, fail, or never come back, and what becomes of notifications.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use nightporter::{
    config::PayloadHelper,
    event::{BusEvent, DeliveryTicket, Event},
    model::{AppKey, Owner},
    notification::{GENERIC, HelperAnswer, HelperJob, NotifyNews, NotifyOrder, Text},
};

use crate::{
    clock::{At, MS, SEC},
    world::{BUS, Due, World},
};

/// In this life of the daemon.
#[derive(Default)]
pub(crate) struct StandIns {
    /// Helpers that run: one of an app, two in all.
    running: BTreeMap<u64, (AppKey, At)>,
    /// Apps whose helper has wanted them woken, or failed, or what it made was not seen.
    pub(crate) declined: BTreeSet<AppKey>,
    /// What is shown, since when as it is, and its number.
    pub(crate) shown: BTreeMap<(AppKey, Arc<str>), (At, u64)>,
    /// Apps that were told of a message they never got.
    pub(crate) given_up: BTreeSet<AppKey>,
    pub(crate) called: BTreeMap<DeliveryTicket, AppKey>,
    /// The app that has taken a message with this event.
    pub(crate) took: Option<AppKey>,
}

/// What a helper does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum HelperDeed {
    Shows,
    Wakes,
    Drops,
    Fails,
}

/// After this the core gives one up.
const GIVEN_UP: At = 20 * SEC;

pub(crate) fn helper() -> PayloadHelper {
    PayloadHelper { command: ["/usr/libexec/helper".into()].into(), network: false }
}

impl World {
    pub(crate) fn help(&mut self, job: HelperJob) {
        self.count("helpers run");
        let (life, at) = (self.life, self.at);
        self.stand_ins.running.retain(|_, (_, since)| *since + GIVEN_UP > at);
        let running = &mut self.stand_ins.running;
        assert!(running.len() < 2, "{} helpers run", running.len() + 1);
        assert!(running.values().all(|(app, _)| *app != job.app), "{} has two helpers", job.app);
        running.insert(job.seq.0, (job.app.clone(), at));
        let sent = &self.reference.sent[self.reference.number(&job.id)];
        assert!(sent.app == job.app && sent.token == job.token && sent.body == job.body, "{} was changed", job.id);
        let dice = if self.calm { self.rng.below(7000) } else { self.rng.below(10_000) };
        let deed = match dice {
            0..4500 => HelperDeed::Shows,
            4500..6500 => HelperDeed::Wakes,
            6500..7000 => HelperDeed::Drops,
            7000..9300 => HelperDeed::Fails,
            _ => {
                self.count("helpers that never came back");
                self.stand_ins.declined.insert(job.app);
                return;
            }
        };
        let at = self.soon(MS, 6 * SEC);
        self.agenda.add(at, Due::Helped(life, Box::new(job), deed));
    }

    pub(crate) fn helper_answers(&mut self, life: u32, job: &HelperJob, deed: HelperDeed) {
        if life != self.life || !self.is_up() {
            return;
        }
        self.stand_ins.running.remove(&job.seq.0);
        let answer = match deed {
            HelperDeed::Shows => {
                self.count("helpers that showed something");
                let tag = format!("tag {}", self.rng.below(3)).into();
                let text = Text::Own { summary: "Ann".into(), body: "".into(), icon: None };
                Ok(HelperAnswer::Show { tag, text, category: None })
            }
            HelperDeed::Wakes => Ok(HelperAnswer::Wake),
            HelperDeed::Drops => {
                self.count("helpers that dropped a message");
                // Its helper is a part of the app.
                let number = self.reference.number(&job.id);
                self.reference.sent[number].accepted = true;
                Ok(HelperAnswer::Drop)
            }
            HelperDeed::Fails => {
                self.count("helpers that failed");
                Err("it failed".into())
            }
        };
        if matches!(deed, HelperDeed::Wakes | HelperDeed::Fails) {
            self.stand_ins.declined.insert(job.app.clone());
        }
        self.tell(Event::Helped(job.seq, answer));
    }

    pub(crate) fn notify(&mut self, app: &AppKey, order: NotifyOrder) {
        assert!(app.bus == BUS, "{app} is spoken for on {}", app.bus);
        let (life, bus, at) = (self.life, self.bus_age, self.at);
        match order {
            NotifyOrder::Show(notification) => {
                assert!(self.bus_up, "{app} is spoken for without a bus");
                self.count("notifications shown");
                let (tag, number) = (notification.tag, notification.number);
                let before = self.stand_ins.shown.insert((app.clone(), Arc::clone(&tag)), (at, number));
                assert!(before.is_none_or(|(before, _)| before + 2 * SEC <= at), "{app} flickers: {tag:?}");
                let of_app = self.stand_ins.shown.keys().filter(|(of, _)| of == app).count();
                assert!(of_app <= 9, "{app} has {of_app} notifications");
                let news = match self.rng.below(100) {
                    0..8 if !self.calm => NotifyNews::NotShown("nobody shows it".into()),
                    8..20 => NotifyNews::Gone,
                    20..35 => NotifyNews::Clicked(None),
                    _ => return,
                };
                let when = self.soon(MS, 30 * SEC);
                self.agenda.add(when, Due::Notified(life, bus, app.clone(), tag, number, news));
            }
            NotifyOrder::Close(tag) => {
                self.count("notifications closed");
                self.stand_ins.shown.remove(&(app.clone(), tag));
            }
            NotifyOrder::CloseAll => {
                self.count("notifications closed");
                self.stand_ins.shown.retain(|(of, _), _| of != app);
            }
        }
    }

    pub(crate) fn notification_news(
        &mut self,
        of: (u32, u32),
        app: AppKey,
        tag: Arc<str>,
        number: u64,
        news: NotifyNews,
    ) {
        let key = (app.clone(), Arc::clone(&tag));
        let shown = self.stand_ins.shown.get(&key).copied();
        let Some((_, now)) = shown.filter(|_| of == (self.life, self.bus_age) && self.is_up()) else { return };
        match news {
            NotifyNews::NotShown(_) if *tag == *GENERIC || number != now => {}
            NotifyNews::NotShown(_) => drop(self.stand_ins.declined.insert(app.clone())),
            NotifyNews::Gone => drop(self.stand_ins.shown.remove(&key)),
            NotifyNews::Clicked(_) => {
                self.count("notifications touched");
                self.stand_ins.shown.remove(&key);
            }
        }
        // As the bus thread says it: of what stood there at that moment.
        self.bus_event(BusEvent::Notified { app, tag, number: now, news });
    }

    pub(crate) fn activate(&mut self, app: &AppKey, owner: Option<Owner>) {
        self.count("apps shown to the user");
        let index = self.app_index(app);
        match owner {
            None => {
                // By its desktop file, where there is no service file.
                let at = self.soon(50 * MS, 4 * SEC);
                self.agenda.add(at, Due::StartApp(self.life, index));
            }
            Some(owner) => {
                let frozen = self.instance_of_owner(&owner).and_then(|n| self.instances.get(&n)).map(|n| n.frozen);
                assert_ne!(frozen, Some(true), "{app} is asked to show itself while it is held still");
            }
        }
    }

    /// Who takes a message speaks for itself.
    pub(crate) fn check_notifications(&mut self) {
        let Some(app) = self.stand_ins.took.take() else { return };
        if self.reference.waiting_of(&app).next().is_none() {
            self.stand_ins.declined.remove(&app);
        }
        if self.stand_ins.given_up.contains(&app) {
            return;
        }
        let shown: Vec<_> = self.stand_ins.shown.keys().filter(|(of, _)| *of == app).collect();
        assert!(shown.is_empty(), "{app} took a message and is still spoken for: {shown:?}");
    }
}
