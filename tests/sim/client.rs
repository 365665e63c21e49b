//! Apps that listen, and states they save: told before each freeze and after, in time or late or never answered; what was
//! said to be kept is there after any crash.

use std::sync::Arc;

use nightporter::{
    action::{ClientCall, Reply},
    event::{BusEvent, Caller, NoticeTicket, Request},
    model::{AppKey, Owner},
};

use crate::{
    clock::{At, MS, SEC},
    world::{BUS, Due, What, World},
};

/// What is waited for an answer to a notice (design.md).
const NOTICE: At = 5 * SEC;

/// What an app has saved. Its states are numbers, each larger than the one before.
#[derive(Default)]
pub(crate) struct States {
    issued: u64,
    /// The latest that was said to be durable, and may not go.
    durable: u64,
    /// Counts the times it was forgotten.
    forgotten: u64,
}

/// What an instance was told.
#[derive(Default)]
pub(crate) struct Notices {
    /// In which life, over which bus, the core has said that it will be told.
    heard: Option<(u32, u32)>,
    /// The notice not taken back yet, and when it came.
    told: Option<(NoticeTicket, At)>,
    /// Whether the core has heard that it is ready.
    prepared: bool,
    /// It has a notice that it has not answered.
    silent: bool,
}

/// An answer to a notice, on its way.
pub(crate) struct Noticed {
    life: u32,
    bus: u32,
    ticket: NoticeTicket,
}

impl World {
    /// The app saves, restores, or says whether it listens.
    pub(crate) fn app_listens(&mut self, app: usize, n: u64, caller: &Caller) {
        let listens = self.rng.chance(9000);
        self.call(caller.clone(), Request::Listen(listens), What::Listen { instance: n, listens });
        if self.rng.chance(3000) {
            self.app_saves(app, caller.clone());
        }
        if self.rng.chance(6000) {
            let States { durable, forgotten, .. } = self.apps[app].states;
            self.call(caller.clone(), Request::RestoreState, What::Restore { app, at_least: durable, forgotten });
        }
    }

    fn app_saves(&mut self, app: usize, caller: Caller) {
        let states = &mut self.apps[app].states;
        states.issued += 1;
        let (number, forgotten) = (states.issued, states.forgotten);
        let state: Arc<[u8]> = number.to_string().into_bytes().into();
        self.call(caller, Request::SaveState(state), What::Save { app, number, forgotten });
    }

    pub(crate) fn saved(&mut self, what: What, reply: &Reply) {
        match (what, reply) {
            (What::Listen { instance, listens }, Reply::Done) => {
                let heard = listens.then_some((self.life, self.bus_age));
                if let Some(instance) = self.instances.get_mut(&instance)
                    && instance.notices.heard != heard
                {
                    instance.notices = Notices { heard, silent: instance.notices.silent, ..Notices::default() };
                }
            }
            (What::Save { app, number, forgotten }, Reply::Done) => {
                self.count("states saved");
                let states = &mut self.apps[app].states;
                if states.forgotten == forgotten {
                    states.durable = states.durable.max(number);
                }
            }
            (What::Restore { app, at_least, forgotten }, Reply::State(state)) => {
                let text = std::str::from_utf8(state).expect("states are numbers");
                let number: u64 = if text.is_empty() { 0 } else { text.parse().expect("states are numbers") };
                let states = &self.apps[app].states;
                assert!(number <= states.issued, "app {app} never saved {number}");
                let kept = states.forgotten != forgotten || number >= at_least;
                assert!(kept, "app {app} got state {number} back, and {at_least} was durable");
                if number > 0 {
                    self.count("states restored");
                }
            }
            _ => self.count("states refused"),
        }
    }

    /// The daemon gives up a registration of the app, or all it has of it.
    pub(crate) fn state_may_go(&mut self, key: &AppKey) {
        let app = self.app_index(key);
        let states = &mut self.apps[app].states;
        states.durable = 0;
        states.forgotten += 1;
    }

    /// The app is forgotten; it says anew that it listens once it has registered again.
    pub(crate) fn listens_no_more(&mut self, key: &AppKey) {
        let app = self.app_index(key);
        if let Some(instance) = self.apps[app].instance.and_then(|n| self.instances.get_mut(&n)) {
            instance.notices = Notices { silent: instance.notices.silent, ..Notices::default() };
        }
    }

    /// The core is about to hear this.
    pub(crate) fn notice_heard(&mut self, event: &BusEvent) {
        let BusEvent::Prepared(key, ticket) = event else { return };
        let app = self.app_index(key);
        if let Some(instance) = self.apps[app].instance.and_then(|n| self.instances.get_mut(&n)) {
            instance.notices.prepared |= instance.notices.told.is_some_and(|(told, _)| told == *ticket);
        }
    }

    pub(crate) fn call_client(&mut self, key: &AppKey, owner: &Owner, call: ClientCall) {
        if matches!(call, ClientCall::TransferDone { .. }) {
            return self.tell_of_transfer(owner, &call);
        }
        let Some(n) = self.instance_of_owner(owner) else {
            if let ClientCall::WillSuspend { ticket, .. } = call {
                self.bus_event(BusEvent::Prepared(key.clone(), ticket));
            }
            return;
        };
        self.check_not_held(n, &call);
        let at = self.at;
        let Some(instance) = self.instances.get_mut(&n) else { return };
        match call {
            ClientCall::TransferDone { .. } => {}
            ClientCall::Resumed { .. } => {
                assert!(instance.notices.told.take().is_some(), "instance {n} resumes from nothing");
                self.count("apps told that they run again");
            }
            ClientCall::WillSuspend { ticket, .. } => {
                assert!(instance.notices.told.is_none(), "instance {n} is told twice");
                assert!(instance.notices.heard.is_some(), "instance {n} is told, and does not listen");
                instance.notices.told = Some((ticket, at));
                instance.notices.prepared = false;
                if std::mem::replace(&mut instance.notices.silent, true) {
                    // As the bus thread does with who has not answered the one before.
                    self.count("notices to who does not answer");
                    self.bus_event(BusEvent::Prepared(key.clone(), ticket));
                    return;
                }
                self.count("notices");
                let at = match if self.calm { 9999 } else { self.rng.below(10_000) } {
                    0..1000 => return,
                    1000..2500 => self.soon(3 * SEC, 30 * SEC),
                    _ => self.soon(MS, 200 * MS),
                };
                let noticed = Noticed { life: self.life, bus: self.bus_age, ticket };
                self.agenda.add(at, Due::Prepared(n, noticed));
            }
        }
    }

    /// The app has saved what it wants to keep, and answers.
    pub(crate) fn prepared(&mut self, n: u64, noticed: Noticed) {
        let Some(instance) = self.instances.get_mut(&n) else { return };
        if (noticed.life, noticed.bus) != (self.life, self.bus_age) {
            return;
        }
        if instance.frozen || instance.stopped {
            self.agenda.add(self.at + SEC, Due::Prepared(n, noticed));
            return;
        }
        instance.notices.silent = false;
        let app = instance.app;
        if let Some(caller) = self.caller(n) {
            self.app_saves(app, caller);
        }
        let key = self.apps[app].key.clone();
        debug_assert_eq!(key.bus, BUS);
        self.bus_event(BusEvent::Prepared(key, noticed.ticket));
    }

    /// Nobody who listens is held still unless told, and ready or out of time.
    pub(crate) fn check_told(&mut self, n: u64) {
        let Some(instance) = self.instances.get(&n) else { return };
        if instance.notices.heard != Some((self.life, self.bus_age)) {
            return;
        }
        let Some((_, told)) = instance.notices.told else { panic!("instance {n} listens and is frozen untold") };
        let (ready, waited) = (instance.notices.prepared, self.at - told);
        assert!(ready || waited >= NOTICE, "instance {n} is frozen {} ms after it was told", waited / MS);
        self.count(if ready { "freezes of the prepared" } else { "freezes of the unprepared" });
    }
}
