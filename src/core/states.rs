//! States that apps save, so that one that was ended comes back where it was.
//!
//! The bytes are the app's own business and lie in the store alone; known here is only how large they are, for the bounds.

use std::{collections::BTreeMap, sync::Arc};

use super::{Core, Stored};
use crate::{
    action::{ErrorKind, Reply, StoreOp},
    event::{CallId, Caller, STATE_MAX, StoreError, StoreTicket},
    model::{AppKey, Bus},
};

/// Bytes of all states. Beyond it nothing is replaced by anything larger.
const TOTAL: usize = 16 * 1024 * 1024;
/// Bytes of one bus's: no user takes the room of all others.
const PER_BUS: usize = TOTAL / 4;
/// Calls of one app, and of all, that may wait for the store; beyond it the newest is refused. Bounds what is in memory to
/// 4 MiB.
const WAITING_PER_APP: usize = 4;
const WAITING: usize = 64;

/// Sizes of what is stored and what is on its way.
#[derive(Debug)]
pub(super) struct States {
    kept: BTreeMap<AppKey, usize>,
    waiting: BTreeMap<StoreTicket, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    call: CallId,
    app: AppKey,
    /// Of a state on its way in. None once the app was forgotten, and for one on its way out.
    size: Option<usize>,
}

impl States {
    pub(super) fn new(stored: Vec<(AppKey, u32)>) -> Self {
        let size = |size| usize::try_from(size).unwrap_or(usize::MAX);
        Self { kept: stored.into_iter().map(|(app, bytes)| (app, size(bytes))).collect(), waiting: BTreeMap::new() }
    }

    /// The app is gone, and its state with it.
    pub(super) fn forget(&mut self, app: &AppKey) {
        self.kept.remove(app);
        self.waiting.values_mut().filter(|waiting| waiting.app == *app).for_each(|waiting| waiting.size = None);
    }

    /// Whether the store may have a state of the app, now or when what is queued is done.
    fn has(&self, app: &AppKey) -> bool {
        self.kept.contains_key(app)
            || self.waiting.values().any(|waiting| waiting.app == *app && waiting.size.is_some())
    }

    /// Whether a state of the app of this size fits, beside those of all others. Whichever of an app's is the largest
    /// counts, for it may be the one that lasts.
    fn fits(&self, app: &AppKey, size: usize) -> bool {
        let mut sizes: BTreeMap<&AppKey, usize> = self.kept.iter().map(|(app, size)| (app, *size)).collect();
        for Waiting { app, size, .. } in self.waiting.values() {
            let largest = sizes.entry(app).or_default();
            *largest = (*largest).max(size.unwrap_or_default());
        }
        let before = sizes.remove(app).unwrap_or_default();
        let sum = |bus: Option<Bus>| -> usize {
            sizes.iter().filter(|(other, _)| bus.is_none_or(|bus| other.bus == bus)).map(|(_, size)| size).sum()
        };
        size <= before || (sum(None) + size <= TOTAL && sum(Some(app.bus)) + size <= PER_BUS)
    }

    /// Why the app must wait, if it must.
    fn is_busy(&self, app: &AppKey) -> Option<String> {
        let own = self.waiting.values().filter(|waiting| waiting.app == *app).count();
        (own >= WAITING_PER_APP || self.waiting.len() >= WAITING)
            .then(|| format!("{own} of your states are on their way already; wait for the answers"))
    }
}

impl Core {
    pub(super) fn save_state(&mut self, call: CallId, caller: &Caller, state: Arc<[u8]>) {
        let app = match self.state_owner(caller) {
            Ok(app) => app,
            Err(reply) => return self.reply(call, reply),
        };
        if state.len() > STATE_MAX {
            let text = format!("the state has {} bytes; at most {STATE_MAX} are kept", state.len());
            return self.reply(call, Reply::Error(ErrorKind::LimitsExceeded, text));
        }
        if !self.states.fits(&app, state.len()) {
            let text = "the states of all apps together take more room than they may".into();
            return self.reply(call, Reply::Error(ErrorKind::LimitsExceeded, text));
        }
        if state.is_empty() && !self.states.has(&app) {
            return self.reply(call, Reply::Done);
        }
        let size = Some(state.len());
        let ticket = self.store_with(StoreOp::PutState(app.clone(), state), Stored::State);
        self.states.waiting.insert(ticket, Waiting { call, app, size });
    }

    pub(super) fn restore_state(&mut self, call: CallId, caller: &Caller) {
        match self.state_owner(caller) {
            Err(reply) => self.reply(call, reply),
            Ok(app) if !self.states.has(&app) => self.reply(call, Reply::State(Arc::default())),
            Ok(app) => {
                let ticket = self.store_with(StoreOp::LoadState(app.clone()), Stored::State);
                self.states.waiting.insert(ticket, Waiting { call, app, size: None });
            }
        }
    }

    /// What was to be kept is durable, or is not.
    pub(super) fn state_saved(&mut self, ticket: StoreTicket, result: Result<(), StoreError>) {
        let Some(Waiting { call, app, size }) = self.states.waiting.remove(&ticket) else { return };
        let reply = match result {
            Ok(()) => {
                match size {
                    Some(0) => self.states.kept.remove(&app),
                    Some(size) => self.states.kept.insert(app, size),
                    None => None,
                };
                Reply::Done
            }
            Err(error) => Reply::Error(ErrorKind::Failed, format!("the state could not be written: {error}")),
        };
        self.reply(call, reply);
    }

    /// What was asked for is here, or cannot be read.
    pub(super) fn state_loaded(&mut self, ticket: StoreTicket, state: Result<Arc<[u8]>, StoreError>) {
        self.stores.remove(&ticket);
        let Some(Waiting { call, .. }) = self.states.waiting.remove(&ticket) else { return };
        let reply = match state {
            Ok(state) => Reply::State(state),
            Err(error) => Reply::Error(ErrorKind::Failed, format!("the state could not be read: {error}")),
        };
        self.reply(call, reply);
    }

    /// The app whose state the caller may have: itself, if it is registered for good. A state without a registration would
    /// not outlive a crash.
    fn state_owner(&self, caller: &Caller) -> Result<AppKey, Reply> {
        let app = self.app_of_caller(caller).filter(|app| self.registry.of_app(app).next().is_some());
        let Some(app) = app else {
            let text = "only an app that is registered for push has a state here; register first";
            return Err(Reply::Error(ErrorKind::NoSuchApp, text.into()));
        };
        match self.states.is_busy(&app) {
            Some(text) => Err(Reply::Error(ErrorKind::LimitsExceeded, text)),
            None => Ok(app),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        action::Action,
        config::Settings,
        core::fixtures::{BROKER, NOW, at_the_broker, caller, kept},
        event::{BusEvent, Event, Request},
        model::ConnectorVersion,
    };

    fn app(uid: u32, number: u64) -> AppKey {
        AppKey::new(Bus::Session(uid), format!("org.example.App{number}"))
    }

    /// A core with these apps, and a store that does as it is told.
    struct World {
        core: Core,
        stored: BTreeMap<AppKey, Arc<[u8]>>,
        calls: u64,
        /// What is asked of the store waits.
        slow: Vec<(StoreOp, StoreTicket)>,
    }

    impl World {
        fn with(apps: &[AppKey]) -> Self {
            let snapshot = kept(apps.iter().zip(1..).map(|(app, id)| at_the_broker(id, app.clone())));
            let core = Core::new(Settings::parse(BROKER).unwrap(), [7; 32], snapshot, NOW);
            Self { core, stored: BTreeMap::new(), calls: 0, slow: Vec::new() }
        }

        /// Asks and does not wait; the answer, if it comes at once.
        fn begin(&mut self, app: &AppKey, request: Request) -> Option<Reply> {
            self.calls += 1;
            let call = CallId(self.calls);
            let app_id = Some(Arc::clone(&app.service));
            let caller = Caller { app_id, sandboxed: true, owns_service: true, ..caller(app.bus, ":1.1") };
            self.core.handle(Event::Bus(BusEvent::Call { call, caller, request }), NOW);
            self.reply(call)
        }

        fn reply(&mut self, call: CallId) -> Option<Reply> {
            let mut found = None;
            while let Some(action) = self.core.poll_action() {
                match action {
                    Action::Store(op @ (StoreOp::PutState(..) | StoreOp::LoadState(_)), Some(ticket)) => {
                        self.slow.push((op, ticket));
                    }
                    Action::Store(StoreOp::DeleteApp(app), _) => drop(self.stored.remove(&app)),
                    Action::Reply(to, reply) if to == call => found = Some(reply),
                    _ => {}
                }
            }
            found
        }

        /// The store does the next of what it was asked.
        fn step(&mut self, result: Result<(), StoreError>) -> Option<Reply> {
            let (op, ticket) = self.slow.remove(0);
            let event = match (op, result) {
                (StoreOp::PutState(app, state), Ok(())) => {
                    self.stored.insert(app, state);
                    Event::Stored(ticket, Ok(()))
                }
                (StoreOp::LoadState(app), Ok(())) => {
                    Event::State(ticket, Ok(self.stored.get(&app).cloned().unwrap_or_default()))
                }
                (StoreOp::LoadState(_), Err(error)) => Event::State(ticket, Err(error)),
                (_, result) => Event::Stored(ticket, result),
            };
            let call = CallId(self.calls);
            self.core.handle(event, NOW);
            self.reply(call)
        }

        fn ask(&mut self, app: &AppKey, request: Request) -> Reply {
            self.begin(app, request).or_else(|| self.step(Ok(()))).expect("an answer")
        }

        fn save(&mut self, app: &AppKey, size: usize) -> Reply {
            self.ask(app, Request::SaveState(vec![1; size].into()))
        }
    }

    fn kind(reply: &Reply) -> Option<ErrorKind> {
        if let Reply::Error(kind, _) = reply { Some(*kind) } else { None }
    }

    #[test]
    fn it_is_answered_when_it_is_durable_and_not_before() {
        let mut world = World::with(&[app(1000, 1)]);
        assert_eq!(world.begin(&app(1000, 1), Request::SaveState([7][..].into())), None);
        assert_eq!(world.step(Ok(())), Some(Reply::Done));
        assert_eq!(world.begin(&app(1000, 1), Request::SaveState([8][..].into())), None);
        assert_eq!(kind(&world.step(Err(StoreError::Full)).unwrap()), Some(ErrorKind::Failed));
        assert_eq!(world.ask(&app(1000, 1), Request::RestoreState), Reply::State([7][..].into()));
        world.begin(&app(1000, 1), Request::RestoreState);
        assert_eq!(kind(&world.step(Err(StoreError::Other("no".into()))).unwrap()), Some(ErrorKind::Failed));
    }

    #[test]
    fn an_app_has_its_own_and_who_is_none_has_nothing() {
        let mut world = World::with(&[app(1000, 1), app(1000, 2), app(1001, 1)]);
        world.save(&app(1000, 1), 5);
        for other in [app(1000, 2), app(1001, 1)] {
            assert_eq!(world.ask(&other, Request::RestoreState), Reply::State(Arc::default()), "{other}");
        }
        for request in [Request::RestoreState, Request::SaveState([1][..].into()), Request::Listen(true)] {
            let reply = world.ask(&app(1000, 3), request);
            assert_eq!(kind(&reply), Some(ErrorKind::NoSuchApp));
        }
        let token: Arc<str> = "token".into();
        world.ask(&app(1000, 1), Request::Unregister { token, version: ConnectorVersion::V2 });
        assert!(!world.stored.contains_key(&app(1000, 1)), "it goes with the registration");
        assert_eq!(kind(&world.ask(&app(1000, 1), Request::RestoreState)), Some(ErrorKind::NoSuchApp));
    }

    #[test]
    fn no_user_takes_the_room_of_all() {
        let per_user = PER_BUS / STATE_MAX;
        let users = 1000..1000 + u32::try_from(TOTAL / PER_BUS).unwrap() + 1;
        let apps: Vec<AppKey> = users.clone().flat_map(|uid| (0..=per_user).map(move |n| app(uid, n as u64))).collect();
        let mut world = World::with(&apps);
        let last = users.end - 1;
        for uid in users.start..last {
            for n in 0..per_user {
                assert_eq!(world.save(&app(uid, n as u64), STATE_MAX), Reply::Done);
            }
            let refused = world.save(&app(uid, per_user as u64), 1);
            assert_eq!(kind(&refused), Some(ErrorKind::LimitsExceeded));
        }
        assert_eq!(kind(&world.save(&app(last, 0), 1)), Some(ErrorKind::LimitsExceeded), "all in all");
        // What is there may be replaced, and what shrinks makes room.
        assert_eq!(world.save(&app(1000, 0), STATE_MAX), Reply::Done);
        assert_eq!(world.save(&app(1000, 0), STATE_MAX - 1), Reply::Done);
        assert_eq!(world.save(&app(last, 0), 1), Reply::Done);
        assert_eq!(kind(&world.save(&app(last, 0), STATE_MAX + 1)), Some(ErrorKind::LimitsExceeded));
    }

    #[test]
    fn what_waits_for_the_store_is_bounded() {
        let mut world = World::with(&[app(1000, 1), app(1000, 2)]);
        for _ in 0..WAITING_PER_APP {
            assert_eq!(world.begin(&app(1000, 1), Request::SaveState([1][..].into())), None);
        }
        let refused = world.begin(&app(1000, 1), Request::SaveState([1][..].into())).unwrap();
        assert_eq!(kind(&refused), Some(ErrorKind::LimitsExceeded));
        assert_eq!(world.begin(&app(1000, 2), Request::SaveState([1][..].into())), None, "it is no other's fault");
        assert_eq!(world.slow.len(), WAITING_PER_APP + 1);
        world.step(Ok(()));
        assert_eq!(world.begin(&app(1000, 1), Request::RestoreState), None);
    }
}
