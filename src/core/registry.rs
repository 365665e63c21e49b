//! Registrations: those that exist, those on their way, and how they are found.

use std::{
    collections::{BTreeMap, btree_map},
    sync::Arc,
};

use crate::{
    event::{CallId, Caller},
    model::{AppKey, ConnectorVersion, Registration, RegistrationId},
};

/// All registrations.
#[derive(Debug)]
pub(super) struct Registry {
    made: BTreeMap<RegistrationId, Registration>,
    /// Asked of an upstream, or waiting for the store.
    pending: BTreeMap<RegistrationId, Pending>,
    next: u64,
}

/// A registration that does not exist yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    pub(super) app: AppKey,
    pub(super) token: Arc<str>,
    pub(super) description: Arc<str>,
    pub(super) vapid: Option<Arc<str>>,
    pub(super) version: ConnectorVersion,
    pub(super) upstream: Arc<str>,
    /// Calls to be answered; an impatient app asks again before the first answer.
    pub(super) calls: Vec<CallId>,
    /// The registration this one takes the place of once it exists.
    pub(super) replaces: Option<RegistrationId>,
}

impl Registry {
    pub(super) fn new(next: u64, made: Vec<Registration>) -> Self {
        Self { made: made.into_iter().map(|r| (r.id, r)).collect(), pending: BTreeMap::new(), next }
    }

    pub(super) fn get(&self, id: RegistrationId) -> Option<&Registration> {
        self.made.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: RegistrationId) -> Option<&mut Registration> {
        self.made.get_mut(&id)
    }

    pub(super) fn by_token(&self, app: &AppKey, token: &str) -> Option<&Registration> {
        self.made.values().find(|r| r.app == *app && &*r.token == token)
    }

    pub(super) fn of_app<'a>(&'a self, app: &'a AppKey) -> impl Iterator<Item = &'a Registration> {
        self.made.values().filter(move |r| r.app == *app)
    }

    pub(super) fn with_token<'a>(&'a self, token: &'a str) -> impl Iterator<Item = &'a Registration> {
        self.made.values().filter(move |r| &*r.token == token)
    }

    pub(super) fn pending_with_token<'a>(
        &'a self,
        token: &'a str,
    ) -> impl Iterator<Item = (RegistrationId, &'a Pending)> {
        self.pending.iter().filter(move |(_, p)| &*p.token == token).map(|(id, p)| (*id, p))
    }

    pub(super) fn pending_by_token(&mut self, app: &AppKey, token: &str) -> Option<(RegistrationId, &mut Pending)> {
        self.pending.iter_mut().find(|(_, p)| p.app == *app && &*p.token == token).map(|(id, p)| (*id, p))
    }

    pub(super) fn pending(&self, id: RegistrationId) -> Option<&Pending> {
        self.pending.get(&id)
    }

    pub(super) fn begin(&mut self, pending: Pending) -> RegistrationId {
        let id = RegistrationId(self.next);
        self.next += 1;
        self.pending.insert(id, pending);
        id
    }

    pub(super) fn take_pending(&mut self, id: RegistrationId) -> Option<Pending> {
        self.pending.remove(&id)
    }

    pub(super) fn insert(&mut self, registration: Registration) {
        self.made.insert(registration.id, registration);
    }

    pub(super) fn remove(&mut self, id: RegistrationId) -> Option<Registration> {
        self.made.remove(&id)
    }

    pub(super) fn iter(&self) -> btree_map::Values<'_, RegistrationId, Registration> {
        self.made.values()
    }

    /// Registrations of the app, those on their way included.
    pub(super) fn count_of(&self, app: &AppKey) -> usize {
        self.of_app(app).count() + self.pending.values().filter(|p| p.app == *app).count()
    }

    /// Registrations in all, those on their way included.
    pub(super) fn count(&self) -> usize {
        self.made.len() + self.pending.len()
    }

    /// Registrations in all that exist.
    pub(super) fn len(&self) -> usize {
        self.made.len()
    }

    /// Calls of a caller's registration that never will be answered otherwise: those of `app`.
    pub(super) fn drop_pending_of(&mut self, app: &AppKey) -> Vec<(RegistrationId, Pending)> {
        let ids: Vec<RegistrationId> = self.pending.iter().filter(|(_, p)| p.app == *app).map(|(id, _)| *id).collect();
        ids.into_iter().filter_map(|id| self.pending.remove(&id).map(|p| (id, p))).collect()
    }
}

/// Who called, for the log.
pub(super) fn describe(caller: &Caller) -> String {
    format!("{} (pid {}, uid {})", caller.owner.0, caller.pid, caller.uid)
}
