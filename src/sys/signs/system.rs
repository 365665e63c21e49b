//! The system bus: who holds off sleep and idling (logind's locks), and whether there is a call (ModemManager).

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU32,
    sync::Arc,
};

use zbus::{ObjectPath, Variant};

use super::{
    line::Line,
    teller::{Teller, clean, sentence},
    watch::{Signal, Watch, owner_rule},
};
use crate::{
    model::{Veto, VetoKind},
    sys::asking::{Calls, PROPERTIES, Response},
    time::Instant,
};

const LOGIND: &str = "org.freedesktop.login1";
const LOGIND_PATH: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";

const MODEMS: &str = "org.freedesktop.ModemManager1";
const MODEMS_PATH: &str = "/org/freedesktop/ModemManager1";
const OBJECT_MANAGER: &str = "org.freedesktop.DBus.ObjectManager";
const VOICE: &str = "org.freedesktop.ModemManager1.Modem.Voice";
const CALL: &str = "org.freedesktop.ModemManager1.Call";
/// `MM_CALL_STATE_TERMINATED`
const TERMINATED: i32 = 7;

/// Locks of a user looked at.
const LOCKS: usize = 128;
/// Calls looked at.
const CALLS: usize = 32;

/// What is seen on the system bus.
pub(super) struct SystemBus {
    line: Line,
    logind: Option<Arc<str>>,
    asked: Option<NonZeroU32>,
    /// Whether they have changed since they were asked for.
    again: bool,
    /// The locks, by user.
    locks: BTreeMap<u32, Vec<(u32, Veto)>>,
    modems: Option<Arc<str>>,
    /// Whether each call is over.
    calls: BTreeMap<String, bool>,
}

/// What a reply is for.
pub(super) enum Asked {
    Match,
    Owner(&'static str),
    Locks,
    Modems,
    CallState(String),
}

impl SystemBus {
    pub(super) fn new(line: Line) -> Self {
        Self {
            line,
            logind: None,
            asked: None,
            again: false,
            locks: BTreeMap::new(),
            modems: None,
            calls: BTreeMap::new(),
        }
    }

    fn owner(&mut self, calls: &mut Calls<Asked>, name: &str, owner: Option<Arc<str>>) {
        match name {
            LOGIND if self.logind != owner => {
                // While it restarts its last word holds: the locks outlive it.
                self.logind = owner;
                if let Some(earlier) = self.asked.take() {
                    calls.forget(earlier);
                }
                self.ask_locks(calls);
            }
            MODEMS if self.modems != owner => {
                self.modems = owner;
                self.calls.clear();
                if let Some(modems) = &self.modems {
                    let _ = calls.call(modems, MODEMS_PATH, OBJECT_MANAGER, "GetManagedObjects", &(), Asked::Modems);
                }
            }
            _ => {}
        }
    }

    fn ask_locks(&mut self, calls: &mut Calls<Asked>) {
        let Some(logind) = &self.logind else { return };
        // No faster than it answers: anybody can take locks and let them go.
        if self.asked.is_some() {
            self.again = true;
            return;
        }
        self.again = false;
        self.asked = calls.call(logind, LOGIND_PATH, MANAGER, "ListInhibitors", &(), Asked::Locks);
    }

    fn locks_answered(&mut self, calls: &mut Calls<Asked>, serial: NonZeroU32, response: Response) {
        if self.asked != Some(serial) {
            return;
        }
        self.asked = None;
        match response {
            Ok(message) => match message.body().deserialize::<Vec<Lock<'_>>>() {
                Ok(locks) => self.locks = vetoes(&locks),
                Err(error) => log::warn!("logind tells of its locks in a form we do not know: {error}"),
            },
            Err(text) => log::warn!("logind does not tell of its locks: {text}"),
        }
        if self.again {
            self.ask_locks(calls);
        }
    }

    fn call_came(&mut self, calls: &mut Calls<Asked>, path: &str, ask: bool) {
        if self.calls.len() >= CALLS && !self.calls.contains_key(path) {
            return;
        }
        self.calls.insert(path.to_owned(), false);
        if let Some(modems) = self.modems.as_ref().filter(|_| ask) {
            let _ = calls.call(modems, path, PROPERTIES, "Get", &(CALL, "State"), Asked::CallState(path.to_owned()));
        }
    }
}

impl Watch for SystemBus {
    type Asked = Asked;

    fn begin(&mut self, calls: &mut Calls<Asked>) {
        let rules = [
            owner_rule(LOGIND),
            owner_rule(MODEMS),
            format!(
                "type='signal',sender='{LOGIND}',path='{LOGIND_PATH}',interface='{PROPERTIES}',\
                 member='PropertiesChanged',arg0='{MANAGER}'"
            ),
            format!("type='signal',sender='{MODEMS}',interface='{VOICE}'"),
            format!("type='signal',sender='{MODEMS}',interface='{CALL}',member='StateChanged'"),
        ];
        for rule in rules {
            calls.ask_bus("AddMatch", &rule, Asked::Match);
        }
        for name in [LOGIND, MODEMS] {
            calls.ask_bus("GetNameOwner", name, Asked::Owner(name));
        }
    }

    fn reply(&mut self, calls: &mut Calls<Asked>, serial: NonZeroU32, asked: Asked, response: Response) {
        if let Asked::Locks = asked {
            return self.locks_answered(calls, serial, response);
        }
        let message = match (response, &asked) {
            (Ok(message), _) => message,
            (Err(text), Asked::Match) => return log::info!("system bus: a change will go unnoticed: {text}"),
            // Nobody has that name.
            (Err(_), Asked::Owner(_)) => return,
            (Err(text), _) => return log::debug!("system bus: {text}"),
        };
        let body = message.body();
        match asked {
            Asked::Match | Asked::Locks => {}
            Asked::Owner(name) => {
                if let Ok(owner) = body.deserialize::<&str>() {
                    self.owner(calls, name, Some(owner.into()));
                }
            }
            Asked::Modems => {
                for path in calls_of(&body.deserialize().unwrap_or_default()) {
                    self.call_came(calls, &path, true);
                }
            }
            Asked::CallState(path) => {
                if let (Some(over), Ok(Variant::I32(state))) =
                    (self.calls.get_mut(&path), body.deserialize::<Variant<'_>>())
                {
                    *over |= state == TERMINATED;
                }
            }
        }
    }

    fn signal(&mut self, calls: &mut Calls<Asked>, signal: &Signal<'_>) {
        if let Some((name, owner)) = signal.owner_changed() {
            return self.owner(calls, &name, owner.map(Arc::from));
        }
        let from = |owner: &Option<Arc<str>>| owner.as_deref() == Some(signal.sender);
        let body = signal.message.body();
        match (signal.interface, signal.member) {
            (PROPERTIES, "PropertiesChanged") if signal.path == LOGIND_PATH && from(&self.logind) => {
                let Ok((MANAGER, changed, gone)) = body.deserialize::<(&str, HashMap<&str, Variant<'_>>, Vec<&str>)>()
                else {
                    return;
                };
                // Said at each lock that is taken or let go, even where the sum of them stays the same.
                if ["BlockInhibited", "BlockWeakInhibited"]
                    .iter()
                    .any(|name| changed.contains_key(name) || gone.contains(name))
                {
                    self.ask_locks(calls);
                }
            }
            (VOICE, member @ ("CallAdded" | "CallDeleted")) if from(&self.modems) => {
                if let Ok(path) = body.deserialize::<ObjectPath<'_>>() {
                    match member {
                        "CallAdded" => self.call_came(calls, path.as_str(), false),
                        _ => drop(self.calls.remove(path.as_str())),
                    }
                }
            }
            (CALL, "StateChanged") if from(&self.modems) => {
                if let (Some(over), Ok((_, state, _))) =
                    (self.calls.get_mut(signal.path), body.deserialize::<(i32, i32, u32)>())
                {
                    *over = state == TERMINATED;
                }
            }
            _ => {}
        }
    }

    fn look(&mut self, teller: &mut Teller, now: Instant) {
        self.line.set(self.calls.values().any(|over| !over));
        teller.see_all(self.locks.clone(), now);
    }
}

impl Drop for SystemBus {
    fn drop(&mut self) {
        // Nobody would say when it ends.
        self.line.set(false);
    }
}

/// What, who, why, mode, uid, pid.
type Lock<'a> = (&'a str, &'a str, &'a str, &'a str, u32, u32);

/// Locks that hold sleep or idling off, but for this daemon's own. One that only delays sleep for a moment is no sign of
/// anything: half of all services have one.
fn vetoes(locks: &[Lock<'_>]) -> BTreeMap<u32, Vec<(u32, Veto)>> {
    let mut vetoes: BTreeMap<u32, Vec<(u32, Veto)>> = BTreeMap::new();
    for (what, _, why, mode, uid, pid) in locks.iter().filter(|lock| lock.5 != std::process::id()) {
        if !matches!(*mode, "block" | "block-weak") {
            continue;
        }
        let kinds = what.split(':').filter_map(|what| match what {
            "sleep" => Some((VetoKind::SleepInhibitor, "holds off sleep")),
            "idle" => Some((VetoKind::IdleInhibitor, "keeps the session from idling")),
            _ => None,
        });
        let of_user = vetoes.entry(*uid).or_default();
        for (kind, does) in kinds {
            if of_user.len() < LOCKS {
                of_user.push((*pid, Veto { kind, reason: sentence(format!("it {does}: {}", clean(why))) }));
            }
        }
    }
    vetoes.retain(|_, of_user| !of_user.is_empty());
    vetoes
}

type Objects<'a> = HashMap<ObjectPath<'a>, HashMap<&'a str, HashMap<&'a str, Variant<'a>>>>;

/// The calls of all modems.
fn calls_of(objects: &Objects<'_>) -> Vec<String> {
    let mut calls = Vec::new();
    for interfaces in objects.values() {
        if let Some(Variant::Array(paths)) = interfaces.get(VOICE).and_then(|voice| voice.get("Calls")) {
            calls.extend(paths.iter().filter_map(|path| match path {
                Variant::ObjectPath(path) => Some(path.to_string()),
                _ => None,
            }));
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_that_block_are_seen_and_ours_are_not() {
        let own = std::process::id();
        let locks = [
            ("sleep", "Lollypop", "Playing music", "block", 1000, 77),
            ("shutdown:idle:sleep", "Totem", "A\nfilm", "block", 1000, 78),
            ("sleep", "NetworkManager", "NetworkManager needs to turn off networks", "delay", 0, 5),
            ("handle-power-key", "phosh", "Phosh handles power keys", "block", 1000, 79),
            ("sleep", "Night Porter", "a message is on its way to an app", "block", 0, own),
            ("idle", "Reader", "reading", "block-weak", 1001, 80),
        ];
        let seen = vetoes(&locks);
        assert_eq!(seen.keys().copied().collect::<Vec<_>>(), [1000, 1001]);
        let of_user: Vec<(u32, VetoKind, &str)> =
            seen[&1000].iter().map(|(pid, veto)| (*pid, veto.kind, &*veto.reason)).collect();
        let expected = [
            (77, VetoKind::SleepInhibitor, "it holds off sleep: Playing music"),
            (78, VetoKind::IdleInhibitor, "it keeps the session from idling: Afilm"),
            (78, VetoKind::SleepInhibitor, "it holds off sleep: Afilm"),
        ];
        assert_eq!(of_user, expected);
        let many: Vec<Lock<'_>> = (0..10_000).map(|pid| ("sleep", "x", "x", "block", 7, pid)).collect();
        assert_eq!(vetoes(&many)[&7].len(), LOCKS);
    }
}
