//! Who is logged in, as logind says (org.freedesktop.login1.Manager and .User).
//!
//! What was known stays while logind restarts or the bus is away: the sessions stay too.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU32,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use zbus::{ObjectPath, Variant};

use super::{
    calls::{Calls, PROPERTIES, Pending, Response},
    logind::{MANAGER, PATH},
};
use crate::{
    sys::{
        clock,
        users::{USERS, User, Usher},
    },
    time::Instant,
};

/// What logind has not told within this is asked for again, each time after twice as long, up to the second.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));
const USER: &str = "org.freedesktop.login1.User";

/// Who is logged in, and what is being found out about it.
#[derive(Debug)]
pub(super) struct Users {
    usher: Usher,
    logind: Option<Arc<str>>,
    /// By uid. Bounded by [`USERS`] and one more, so that it can be said that there are too many.
    known: BTreeMap<u32, Known>,
    list: Option<NonZeroU32>,
    /// Whether the list is still to be had.
    unlisted: bool,
    patience: Duration,
    /// When something that was not told is asked for again.
    again: Option<Instant>,
}

#[derive(Debug, Default)]
struct Known {
    path: String,
    user: Option<User>,
    asked: Option<NonZeroU32>,
}

impl Users {
    pub(super) fn new(usher: Usher) -> Self {
        Self {
            usher,
            logind: None,
            known: BTreeMap::new(),
            list: None,
            unlisted: false,
            patience: PATIENCE.0,
            again: None,
        }
    }

    /// logind is there, perhaps anew.
    pub(super) fn appeared(&mut self, calls: &mut Calls, owner: Arc<str>) {
        self.logind = Some(owner);
        self.patience = PATIENCE.0;
        self.list(calls);
    }

    fn list(&mut self, calls: &mut Calls) {
        let Some(logind) = &self.logind else { return };
        if let Some(earlier) = self.list.take() {
            calls.forget(earlier);
        }
        self.unlisted = true;
        self.list = calls.call(logind, PATH, MANAGER, "ListUsers", &(), Pending::Users);
        self.wait();
    }

    /// Waits for what was asked just now, if nothing is waited for.
    fn wait(&mut self) {
        if self.again.is_none() {
            self.again = Some(clock::boot() + self.patience);
        }
    }

    /// When [`Users::handle_timeout`] wants to be called.
    pub(super) const fn poll_timeout(&self) -> Option<Instant> {
        self.again
    }

    /// Time passed. Of a logind that hangs nothing is known, and nothing else waits for it.
    pub(super) fn handle_timeout(&mut self, calls: &mut Calls, now: Instant) {
        if self.again.is_none_or(|at| at > now) {
            return;
        }
        self.again = None;
        let silent: Vec<(u32, String)> = self
            .known
            .iter()
            .filter(|(_, known)| known.asked.is_some())
            .map(|(uid, known)| (*uid, known.path.clone()))
            .collect();
        match self.patience == PATIENCE.0 {
            true => log::warn!("logind does not tell who is logged in; it is asked again, less and less often"),
            false => log::debug!("logind still does not tell who is logged in"),
        }
        self.patience = (self.patience * 2).min(PATIENCE.1);
        if self.unlisted {
            self.list(calls);
        }
        for (uid, path) in silent {
            self.came(calls, uid, &path);
        }
    }

    /// logind is gone, and answers nothing any more.
    pub(super) fn vanished(&mut self) {
        (self.logind, self.list, self.unlisted, self.again) = (None, None, false, None);
        for known in self.known.values_mut() {
            known.asked = None;
        }
    }

    /// The answer to ListUsers.
    pub(super) fn listed(&mut self, calls: &mut Calls, serial: NonZeroU32, response: Response) {
        if self.list != Some(serial) {
            return;
        }
        self.list = None;
        let listed = response.and_then(|message| {
            let body = message.body();
            let listed = body.deserialize::<Vec<(u32, &str, ObjectPath<'_>)>>().map_err(|error| error.to_string())?;
            Ok(listed.into_iter().map(|(uid, _, path)| (uid, path.to_string())).collect::<BTreeMap<u32, String>>())
        });
        let listed = match listed {
            Ok(listed) => listed,
            // It is asked again.
            Err(text) => return log::warn!("logind does not tell who is logged in: {text}"),
        };
        self.unlisted = false;
        self.known.retain(|uid, _| listed.contains_key(uid));
        for (uid, path) in listed {
            self.came(calls, uid, &path);
        }
        self.settle();
        self.tell();
    }

    /// A user logged in, or was found to be.
    pub(super) fn came(&mut self, calls: &mut Calls, uid: u32, path: &str) {
        let Some(logind) = &self.logind else { return };
        if self.known.len() > USERS && !self.known.contains_key(&uid) {
            log::debug!("user {uid} is one too many");
            return;
        }
        let known = self.known.entry(uid).or_default();
        if let Some(earlier) = known.asked.take() {
            calls.forget(earlier);
        }
        path.clone_into(&mut known.path);
        known.asked = calls.call(logind, path, PROPERTIES, "GetAll", &USER, Pending::User(uid));
        self.wait();
    }

    /// The answer to GetAll.
    pub(super) fn described(&mut self, uid: u32, serial: NonZeroU32, response: Response) {
        let Some(known) = self.known.get_mut(&uid).filter(|known| known.asked == Some(serial)) else { return };
        known.asked = None;
        match response.and_then(|message| user(uid, &message.body().deserialize().map_err(|e| e.to_string())?)) {
            Ok(user) => known.user = Some(user),
            // It may have logged out again; then logind says so.
            Err(text) => log::info!("logind does not tell where the session bus of user {uid} is: {text}"),
        }
        self.settle();
        self.tell();
    }

    /// A user logged out.
    pub(super) fn left(&mut self, calls: &mut Calls, uid: u32) {
        if let Some(known) = self.known.remove(&uid) {
            if let Some(serial) = known.asked {
                calls.forget(serial);
            }
            self.settle();
            self.tell();
        }
    }

    /// No timer while nothing is waited for.
    fn settle(&mut self) {
        if !self.unlisted && self.known.values().all(|known| known.asked.is_none()) {
            (self.again, self.patience) = (None, PATIENCE.0);
        }
    }

    fn tell(&self) {
        self.usher.present(self.known.values().filter_map(|known| known.user.clone()).collect());
    }
}

/// A user, out of what logind says.
fn user(uid: u32, properties: &HashMap<&str, Variant<'_>>) -> Result<User, String> {
    let number = |name: &str| match properties.get(name) {
        Some(Variant::U32(number)) => Ok(*number),
        other => Err(format!("{name} is {other:?}")),
    };
    if number("UID")? != uid {
        return Err("it is another user's".into());
    }
    match properties.get("RuntimePath") {
        Some(Variant::Str(path)) if path.as_str().starts_with('/') => {
            Ok(User { uid, gid: number("GID")?, runtime_dir: PathBuf::from(path.as_str()) })
        }
        other => Err(format!("RuntimePath is {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_logind_says_is_checked() {
        let said = |uid: u32, gid: Variant<'static>, path: Variant<'static>| {
            user(7, &[("UID", uid.into()), ("GID", gid), ("RuntimePath", path), ("Name", "x".into())].into())
        };
        let expected = User { uid: 7, gid: 70, runtime_dir: "/run/user/7".into() };
        assert_eq!(said(7, 70_u32.into(), "/run/user/7".into()), Ok(expected));
        assert!(said(8, 70_u32.into(), "/run/user/7".into()).is_err());
        assert!(said(7, "70".into(), "/run/user/7".into()).is_err());
        assert!(said(7, 70_u32.into(), "run/user/7".into()).is_err());
        assert!(said(7, 70_u32.into(), 7_u32.into()).is_err());
        assert!(user(7, &HashMap::new()).is_err());
    }
}
