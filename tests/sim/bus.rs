//! Apps and the bus they live on.

use std::{collections::VecDeque, sync::Arc};

use nightporter::{
    action::ConnectorCall,
    event::{
        Authorization, BusEvent, CallOutcome, Caller, Claim, Command, DeliveryTicket, Event, Request, StartOutcome,
    },
    model::{AppKey, ConnectorVersion, Owner, Registration},
    notification::NotifyWhen,
};

use crate::{
    client::{Notices, States},
    clock::{At, MS, Rng, SEC},
    world::{BUS, Due, What, World},
};

/// An app, running or not; what it has written down outlives its process.
pub(crate) struct AppState {
    pub(crate) key: AppKey,
    version: ConnectorVersion,
    declares: bool,
    /// It has been heard to declare.
    pub(crate) declared: bool,
    pub(crate) activatable: bool,
    pub(crate) wishes: Vec<Wish>,
    pub(crate) instance: Option<u64>,
    /// The instance it has or had last.
    latest: Option<u64>,
    started_in: Option<u32>,
    listens: bool,
    notify: Option<NotifyWhen>,
    pub(crate) states: States,
}

/// A registration the app wants.
pub(crate) struct Wish {
    pub(crate) token: Arc<str>,
    pub(crate) vapid: Option<Arc<str>>,
    pub(crate) wanted: bool,
    pub(crate) registered: bool,
    pub(crate) endpoint: Option<Arc<str>>,
    pub(crate) before: Vec<Arc<str>>,
    /// The core of this life has yet to hear that the app took its endpoint.
    pub(crate) owed: bool,
}

/// One run of an app.
pub(crate) struct Instance {
    pub(crate) app: usize,
    pub(crate) owner: Option<Owner>,
    /// By us.
    pub(crate) frozen: bool,
    /// From outside.
    pub(crate) stopped: bool,
    /// Answers nothing any more.
    pub(crate) hung: bool,
    pub(crate) calls: VecDeque<Call>,
    work_due: bool,
    /// What the core of this life has heard it say over this bus.
    heard: Option<(u32, u32, Claim)>,
    started_by_us: Option<u32>,
    pub(crate) commanded: Option<(u32, Command)>,
    pub(crate) notices: Notices,
}

/// A call to an app that has not been answered.
pub(crate) struct Call {
    pub(crate) life: u32,
    ticket: DeliveryTicket,
    what: ConnectorCall,
    taken: bool,
}

/// The answer to one, on its way.
pub(crate) struct Answer {
    life: u32,
    bus: u32,
    ticket: DeliveryTicket,
    outcome: CallOutcome,
}

/// The apps of a run.
pub(crate) fn apps(rng: &mut Rng) -> Vec<AppState> {
    let count = rng.between(1, 6);
    (0..count)
        .map(|n| AppState {
            key: AppKey::new(BUS, format!("org.example.App{n}")),
            version: if rng.chance(2000) { ConnectorVersion::V1 } else { ConnectorVersion::V2 },
            declares: rng.chance(7500),
            declared: false,
            activatable: rng.chance(8000),
            wishes: (0..rng.between(1, 3))
                .map(|w| Wish {
                    token: format!("token-{n}-{w}").into(),
                    vapid: rng.chance(3000).then(|| vapid(rng)),
                    wanted: true,
                    registered: false,
                    endpoint: None,
                    before: Vec::new(),
                    owed: false,
                })
                .collect(),
            instance: None,
            latest: None,
            started_in: None,
            listens: rng.chance(6000),
            notify: rng.pick(&[None, Some(NotifyWhen::Never), Some(NotifyWhen::Always)]).copied().flatten(),
            states: States::default(),
        })
        .collect()
}

pub(crate) fn vapid(rng: &mut Rng) -> Arc<str> {
    format!("B{:086}", rng.below(1_000_000)).into()
}

impl World {
    pub(crate) fn app_index(&self, key: &AppKey) -> usize {
        self.apps.iter().position(|app| app.key == *key).unwrap_or_else(|| panic!("there is no app {key}"))
    }

    fn owner_of(&self, app: usize) -> Option<Owner> {
        self.instances.get(&self.apps[app].instance?)?.owner.clone()
    }

    pub(crate) fn instance_of_owner(&self, owner: &Owner) -> Option<u64> {
        self.instances.iter().find(|(_, instance)| instance.owner.as_ref() == Some(owner)).map(|(n, _)| *n)
    }

    pub(crate) fn spawn(&mut self, app: usize, for_push: bool) {
        if self.apps[app].instance.is_some() {
            return;
        }
        self.count("apps started");
        let n = self.next_instance();
        let owner = self.bus_up.then(|| self.new_owner());
        self.note(|| format!("app {app} runs as {n}, {owner:?}"));
        self.instances.insert(
            n,
            Instance {
                app,
                owner,
                frozen: false,
                stopped: false,
                hung: self.plan.slow_apps && !self.calm && self.rng.chance(300),
                calls: VecDeque::new(),
                work_due: false,
                heard: None,
                started_by_us: None,
                commanded: None,
                notices: Notices::default(),
            },
        );
        self.apps[app].instance = Some(n);
        self.apps[app].latest = Some(n);
        self.owner_changed(app);
        self.settle_in(app, n);
        if for_push && self.rng.chance(3000) {
            let at = self.soon(5 * SEC, 60 * SEC);
            self.agenda.add(at, Due::Exit(n));
        }
    }

    /// What an app does at its start: registers all it wants, and says what it is.
    fn settle_in(&mut self, app: usize, n: u64) {
        for wish in 0..self.apps[app].wishes.len() {
            let at = self.soon(10 * MS, 2 * SEC);
            self.agenda.add(at, Due::Register(app, n, wish));
        }
        let at = self.soon(5 * MS, 3 * SEC);
        self.agenda.add(at, Due::Declare(n));
    }

    fn next_instance(&mut self) -> u64 {
        self.next_target += 1;
        self.next_target
    }

    fn new_owner(&mut self) -> Owner {
        self.next_owner += 1;
        Owner(format!(":1.{}", self.next_owner).into())
    }

    fn owner_changed(&mut self, app: usize) {
        let key = self.apps[app].key.clone();
        if !self.bus_up || !self.is_up() || !self.watched.contains(&key) {
            return;
        }
        let owner = self.owner_of(app);
        let running = self.apps[app].instance.filter(|_| owner.is_some());
        self.bus_event(BusEvent::OwnerChanged(key, owner));
        if let Some(n) = running {
            let at = self.soon(0, 80 * MS);
            self.agenda.add(at, Due::Identify(self.life, app, n));
        }
    }

    pub(crate) fn watch(&mut self, key: AppKey) {
        let app = self.app_index(&key);
        self.watched.insert(key);
        self.owner_changed(app);
    }

    pub(crate) fn start_app(&mut self, key: &AppKey) {
        let app = self.app_index(key);
        self.count("starts for a push");
        self.apps[app].started_in = Some(self.life);
        if self.apps[app].activatable {
            let at = self.soon(50 * MS, 4 * SEC);
            self.agenda.add(at, Due::StartApp(self.life, app));
        } else {
            self.bus_event(BusEvent::Started(key.clone(), StartOutcome::NotActivatable));
        }
    }

    pub(crate) fn app_start_ends(&mut self, life: u32, app: usize) {
        let dice = if self.calm { 9999 } else { self.rng.below(10_000) };
        let key = self.apps[app].key.clone();
        let outcome = match dice {
            0..1000 => StartOutcome::Failed("it exited with status 1".into()),
            // Nobody ever hears of it.
            1000..1400 => {
                self.reference.failed(&key);
                return;
            }
            _ => {
                self.spawn(app, true);
                StartOutcome::Started
            }
        };
        if life == self.life && self.is_up() {
            if matches!(outcome, StartOutcome::Failed(_)) {
                self.count("starts failed");
                self.reference.failed(&key);
            }
            self.bus_event(BusEvent::Started(key, outcome));
        }
    }

    /// A process ends; what it owes nobody will get.
    pub(crate) fn die(&mut self, n: u64, why: &str) {
        let Some(instance) = self.instances.remove(&n) else { return };
        self.note(|| format!("app {} ({n}) {why}", instance.app));
        self.apps[instance.app].instance = None;
        self.record.remove(&n);
        let owner_first = self.rng.chance(5000);
        if owner_first {
            self.owner_changed(instance.app);
        }
        for call in instance.calls {
            self.call_done(call.life, call.ticket, CallOutcome::Vanished, instance.app);
        }
        if !owner_first {
            self.owner_changed(instance.app);
        }
        self.transfers_of_dead(n);
        self.targets_of_dead(n);
    }

    fn call_done(&mut self, life: u32, ticket: DeliveryTicket, outcome: CallOutcome, app: usize) {
        if life != self.life || !self.is_up() {
            return;
        }
        if outcome != CallOutcome::Accepted {
            let key = self.apps[app].key.clone();
            self.reference.failed(&key);
        }
        self.bus_event(BusEvent::CallDone(ticket, outcome));
    }

    pub(crate) fn call_app(&mut self, ticket: DeliveryTicket, key: &AppKey, owner: &Owner, what: ConnectorCall) {
        let app = self.app_index(key);
        self.count("calls to apps");
        if let ConnectorCall::Message { .. } = &what {
            self.stand_ins.called.insert(ticket, key.clone());
            // What an app that ran did not take is for itself all the same.
            self.stand_ins.declined.insert(key.clone());
        }
        let life = self.life;
        if let ConnectorCall::NewEndpoint { token, .. } = &what {
            self.endpoint_calls.insert(ticket, (app, Arc::clone(token)));
        }
        let Some(n) = self.instance_of_owner(owner) else {
            self.call_done(life, ticket, CallOutcome::Vanished, app);
            return;
        };
        // Invariant 4: thawed before it is called.
        self.check_not_held(n, &what);
        if !self.calm && self.rng.chance(50) {
            self.call_done(life, ticket, CallOutcome::NotSent("no buffer space".into()), app);
            return;
        }
        if let Some(instance) = self.instances.get_mut(&n) {
            instance.calls.push_back(Call { life, ticket, what, taken: false });
        }
        self.set_to_work(n);
    }

    pub(crate) fn set_to_work(&mut self, n: u64) {
        let at = self.soon(MS, 60 * MS);
        if let Some(instance) = self.instances.get_mut(&n)
            && !instance.work_due
        {
            instance.work_due = true;
            self.agenda.add(at, Due::Work(n));
        }
    }

    /// The app takes its next call.
    pub(crate) fn work(&mut self, n: u64) {
        let Some(instance) = self.instances.get_mut(&n) else { return };
        instance.work_due = false;
        if instance.frozen || instance.stopped || instance.hung {
            return;
        }
        let Some(call) = instance.calls.iter_mut().find(|call| !call.taken) else { return };
        call.taken = true;
        let (life, ticket, what) = (call.life, call.ticket, call.what.clone());
        let dice = if self.calm { 9999 } else { self.rng.below(10_000) };
        let slow = self.plan.slow_apps;
        let now = self.soon(MS, 30 * MS);
        let answer = |world: &mut Self, at: At, outcome: CallOutcome| {
            let answer = Answer { life, bus: world.bus_age, ticket, outcome };
            world.agenda.add(at, Due::Answer(n, answer));
        };
        match dice {
            0..400 => {
                self.count("calls refused");
                answer(self, now, CallOutcome::Refused("not now".into()));
            }
            400..500 => {
                self.count("calls taken and refused");
                self.process(n, life, &what, true);
                answer(self, now, CallOutcome::Refused("oops".into()));
            }
            500..800 => {
                self.count("apps crashed before taking a message");
                self.die(n, "crashes");
                return;
            }
            800..1100 => {
                self.count("apps crashed after taking a message");
                self.process(n, life, &what, false);
                self.die(n, "crashes after it took a message");
                return;
            }
            1100..1500 if slow => {
                self.count("late answers");
                self.process(n, life, &what, false);
                let at = self.soon(SEC, 90 * SEC);
                answer(self, at, CallOutcome::Accepted);
            }
            1500..1600 if slow => {
                self.count("calls never answered");
                self.process(n, life, &what, false);
            }
            1600..1700 if slow => {
                self.count("apps hung");
                if let Some(instance) = self.instances.get_mut(&n) {
                    instance.hung = true;
                    instance.calls.iter_mut().for_each(|call| call.taken |= call.ticket == ticket);
                }
            }
            _ => {
                self.process(n, life, &what, false);
                answer(self, now, CallOutcome::Accepted);
            }
        }
        if self.instances.get(&n).is_some_and(|instance| instance.calls.iter().any(|call| !call.taken)) {
            self.set_to_work(n);
        }
    }

    fn process(&mut self, n: u64, life: u32, what: &ConnectorCall, error: bool) {
        let Some(app) = self.instances.get(&n).map(|instance| instance.app) else { return };
        self.note(|| format!("app {app} ({n}) takes {}", brief(what)));
        match what {
            ConnectorCall::Message { token, body, id } => {
                let by = self.processed_by(life, n, error);
                let key = self.apps[app].key.clone();
                if self.reference.process(&key, token, id, body, by) {
                    self.count("duplicates seen by apps");
                }
                self.count("messages processed");
            }
            ConnectorCall::NewEndpoint { token, endpoint } => {
                self.count("endpoints told");
                if let Some(wish) = self.apps[app].wishes.iter_mut().find(|wish| wish.token == *token)
                    && wish.wanted
                    && !error
                {
                    wish.before.extend(wish.endpoint.replace(Arc::clone(endpoint)));
                }
            }
            ConnectorCall::Unregistered { token } => {
                self.count("apps told of a lost registration");
                let found = self.apps[app].wishes.iter().position(|wish| wish.token == *token && wish.wanted);
                if let Some(wish) = found {
                    self.apps[app].wishes[wish].endpoint = None;
                    self.apps[app].wishes[wish].registered = false;
                    let at = self.soon(SEC, 20 * SEC);
                    self.agenda.add(at, Due::Register(app, n, wish));
                }
            }
        }
    }

    pub(crate) fn answer(&mut self, n: u64, answer: Answer) {
        let Some(instance) = self.instances.get_mut(&n) else { return };
        if instance.frozen || instance.stopped {
            self.agenda.add(self.at + SEC, Due::Answer(n, answer));
            return;
        }
        if answer.bus != self.bus_age {
            return;
        }
        let app = instance.app;
        instance.calls.retain(|call| (call.life, call.ticket) != (answer.life, answer.ticket));
        self.call_done(answer.life, answer.ticket, answer.outcome, app);
    }

    pub(crate) fn go_on(&mut self, n: u64) {
        if let Some(instance) = self.instances.get_mut(&n) {
            instance.stopped = false;
            self.set_to_work(n);
        }
    }

    // What apps ask.

    pub(crate) fn caller(&self, n: u64) -> Option<Caller> {
        let owner = self.instances.get(&n)?.owner.clone()?;
        Some(Caller {
            bus: BUS,
            owner,
            uid: 1000,
            pid: u32::try_from(n).unwrap_or(1),
            app_id: None,
            sandboxed: false,
            networked: true,
            owns_service: true,
            authorization: Authorization::NotAsked,
        })
    }

    fn can_act(&self, n: u64) -> bool {
        self.instances.get(&n).is_some_and(|instance| !instance.frozen && !instance.stopped && instance.owner.is_some())
    }

    pub(crate) fn app_registers(&mut self, app: usize, n: u64, index: usize) {
        if self.apps[app].instance != Some(n) || !self.apps[app].wishes[index].wanted {
            return;
        }
        let what = What::Register { app, instance: n, registration: index };
        if !self.can_act(n) {
            self.retry_register(what);
            return;
        }
        let Some(caller) = self.caller(n) else { return };
        let state = &self.apps[app];
        let request = Request::Register {
            service: Arc::clone(&state.key.service),
            token: Arc::clone(&state.wishes[index].token),
            description: "an app".into(),
            vapid: state.wishes[index].vapid.clone(),
            version: state.version,
            upstream: None,
            notify: self.apps[app].notify,
        };
        if !self.call(caller, request, what) {
            self.retry_register(what);
        }
    }

    pub(crate) fn retry_register(&mut self, what: What) {
        if let What::Register { app, instance, registration } = what {
            let at = self.soon(3 * SEC, 30 * SEC);
            self.agenda.add(at, Due::Register(app, instance, registration));
        }
    }

    pub(crate) fn app_unregisters(&mut self, app: usize, index: usize) {
        let Some(n) = self.apps[app].instance.filter(|n| self.can_act(*n)) else { return };
        let Some(caller) = self.caller(n) else { return };
        let version = self.apps[app].version;
        let wish = &mut self.apps[app].wishes[index];
        wish.wanted = false;
        wish.registered = false;
        wish.endpoint = None;
        wish.before.clear();
        let token = Arc::clone(&wish.token);
        self.count("unregistrations");
        self.call(caller, Request::Unregister { token, version }, What::Other);
    }

    /// Another VAPID key: the registration is made anew.
    pub(crate) fn app_changes_key(&mut self, app: usize, index: usize) {
        let Some(n) = self.apps[app].instance else { return };
        let key = vapid(&mut self.rng);
        self.apps[app].wishes[index].vapid = Some(key);
        self.apps[app].wishes[index].registered = false;
        self.count("VAPID keys changed");
        self.app_registers(app, n, index);
    }

    pub(crate) fn app_declares(&mut self, n: u64) {
        let Some(app) = self.instances.get(&n).map(|instance| instance.app) else { return };
        if !self.apps[app].declares || !self.can_act(n) {
            return;
        }
        let claim = if self.rng.chance(7500) { Claim::Background } else { Claim::Foreground };
        if let Some(caller) = self.caller(n) {
            self.call(caller.clone(), Request::Declare { service: None, claim }, What::Other);
            if self.apps[app].listens {
                self.app_listens(app, n, &caller);
            }
        }
    }

    pub(crate) fn wish_is_owed(&self, app: &AppKey) -> bool {
        self.apps.iter().any(|state| state.key == *app && state.wishes.iter().any(|wish| wish.owed))
    }

    /// The core is about to hear this: what it may do afterwards depends on it.
    pub(crate) fn claim_heard(&mut self, event: &BusEvent) {
        let (life, bus) = (self.life, self.bus_age);
        match event {
            BusEvent::Call { caller, request: Request::Declare { claim, .. }, .. } => {
                if let Some(n) = self.instance_of_owner(&caller.owner)
                    && let Some(instance) = self.instances.get_mut(&n)
                {
                    instance.heard = Some((life, bus, *claim));
                }
                // It may have ended since it said so.
                let said = |app: &&mut AppState| app.latest == Some(u64::from(caller.pid));
                self.apps.iter_mut().filter(said).for_each(|app| app.declared = true);
            }
            BusEvent::Call { request: Request::Unregister { token, .. }, .. } => {
                let wishes = |app: &&AppState| app.wishes.iter().any(|wish| wish.token == *token);
                let key = self.apps.iter().find(wishes).map(|app| app.key.clone());
                self.reference.may_go.extend(key.map(|key| (key, Arc::clone(token))));
            }
            BusEvent::Call { request: Request::Register { service, token, vapid, .. }, .. } => {
                let key = AppKey::new(BUS, Arc::clone(service));
                let other = |r: &Registration| r.app == key && r.token == *token && r.vapid != *vapid;
                if self.reference.registrations().any(other) {
                    self.reference.may_go.insert((key, Arc::clone(token)));
                }
            }
            BusEvent::Call { request: Request::Command { service, command }, .. } => {
                let app = self.app_index(&AppKey::new(BUS, Arc::clone(service)));
                if let Some(instance) = self.apps[app].instance.and_then(|n| self.instances.get_mut(&n)) {
                    instance.commanded = Some((life, *command));
                }
            }
            BusEvent::CallDone(ticket, CallOutcome::Accepted) => {
                self.stand_ins.took = self.stand_ins.called.remove(ticket);
                if let Some((app, token)) = self.endpoint_calls.remove(ticket) {
                    self.apps[app].wishes.iter_mut().filter(|w| w.token == token).for_each(|w| w.owed = false);
                }
            }
            BusEvent::OwnerChanged(key, Some(_)) => {
                let app = self.app_index(key);
                let started = self.apps[app].started_in.take();
                if let Some(instance) = self.apps[app].instance.and_then(|n| self.instances.get_mut(&n))
                    && instance.started_by_us.is_none()
                {
                    instance.started_by_us = started;
                }
            }
            _ => {}
        }
    }

    /// Invariant 2: whether the core may hold this instance still or end it.
    pub(crate) fn may_touch(&self, n: u64, command: Command) -> bool {
        let Some(instance) = self.instances.get(&n) else { return true };
        let background = match instance.heard {
            Some((life, bus, claim)) if (life, bus) == (self.life, self.bus_age) => claim == Claim::Background,
            _ => instance.started_by_us == Some(self.life) && self.apps[instance.app].declared,
        };
        let commanded = instance.commanded == Some((self.life, command));
        let enforced = self.plan.profile != nightporter::model::Profile::Observe;
        commanded || (background && enforced)
    }

    // The bus itself.

    pub(crate) fn bus_goes(&mut self) {
        if !self.bus_up {
            return;
        }
        self.note(|| "the bus goes".to_owned());
        self.count("bus losses");
        self.forget_calls();
        self.transfer_flights_end();
        self.bus_up = false;
        self.bus_age += 1;
        self.stand_ins.shown.clear();
        self.watched.clear();
        for instance in self.instances.values_mut() {
            instance.owner = None;
            instance.calls.clear();
        }
        self.tell(Event::Bus(BusEvent::Down(BUS, "the connection ended".into())));
        let at = self.soon(SEC, 20 * SEC);
        self.agenda.add(at, Due::BusUp);
    }

    pub(crate) fn bus_returns(&mut self) {
        if self.bus_up {
            return;
        }
        self.note(|| "the bus is back".to_owned());
        self.bus_up = true;
        if self.rng.chance(5000) {
            // A bus started anew counts from the beginning.
            self.next_owner = 1;
        }
        let running: Vec<(u64, usize)> = self.instances.iter().map(|(n, instance)| (*n, instance.app)).collect();
        for (n, app) in running {
            let owner = self.new_owner();
            if let Some(instance) = self.instances.get_mut(&n) {
                instance.owner = Some(owner);
            }
            self.settle_in(app, n);
        }
        if self.is_up() {
            self.bus_event(BusEvent::Up(BUS));
        }
    }
}

fn brief(what: &ConnectorCall) -> String {
    match what {
        ConnectorCall::Message { token, id, body } => format!("message {id} for {token} ({} bytes)", body.len()),
        other => format!("{other:?}"),
    }
}
