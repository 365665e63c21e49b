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
