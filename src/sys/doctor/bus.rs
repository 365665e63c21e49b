//! One message bus: who is on it, and the daemon itself.

use std::{env, path::PathBuf, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use zbus::{Connection, DynamicType, Message, OwnedObjectPath, OwnedVariant, block_on, connection::Builder};

use super::Root;
use crate::doctor::facts::{Bus, Daemon, Seen};

/// Which one.
pub(super) enum Which {
    System,
    Session(String),
}

/// For one answer. Three that do not come must fit into the limit of the whole look.
const ANSWER: Duration = Duration::from_millis(1300);
const DBUS: (&str, &str, &str) = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus");
const SYSTEMD: (&str, &str, &str) =
    ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager");
const MANAGER: (&str, &str, &str) = ("org.nightporter1", "/org/nightporter1", "org.nightporter1.Manager");
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const UNIT: &str = "nightporterd.service";
/// `CAP_WAKE_ALARM` of capabilities(7).
const CAP_WAKE_ALARM: u32 = 35;

/// The bus of the session we are in.
pub(super) fn session() -> Option<Which> {
    let given = env::var("DBUS_SESSION_BUS_ADDRESS").ok().filter(|address| !address.is_empty());
    let usual = || {
        let socket = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)?.join("bus");
        socket.exists().then(|| format!("unix:path={}", socket.display()))
    };
    given.or_else(usual).map(Which::Session)
}

pub(super) fn look(which: Which) -> Seen<Bus> {
    let builder = match &which {
        Which::System => Builder::system(),
        Which::Session(address) => Builder::address(address.as_str()),
    };
    let connection = block_on(builder.method_timeout(ANSWER).build()).map_err(|error| error.to_string())?;
    let asked = Asked { connection };
    let mut names: Vec<String> = asked.ask(DBUS, "ListNames", &())?;
    names.retain(|name| !name.starts_with(':'));
    let activatable = asked.ask(DBUS, "ListActivatableNames", &()).unwrap_or_default();
    let has = |name: &str| names.iter().any(|one| one == name);
    let owners = names.iter().filter(|name| name.starts_with("org.unifiedpush.Distributor.") || *name == MANAGER.0);
    let owners = owners.filter_map(|name| Some((name.clone(), asked.ask(DBUS, "GetNameOwner", &name.as_str()).ok()?)));
    let owners = owners.collect();
    let implementation = asked.process(DBUS.0).and_then(|pid| Root::real().line(format!("proc/{pid}/comm")));
    let systemd: Option<String> =
        if has(SYSTEMD.0) { asked.property(SYSTEMD.0, SYSTEMD.1, SYSTEMD.2, "Version") } else { None };
    let unit = systemd.as_ref().and_then(|_| asked.unit());
    let daemon = has(MANAGER.0).then(|| asked.daemon());
    Ok(Bus { implementation, names, activatable, owners, systemd, unit, daemon })
}

struct Asked {
    connection: Connection,
}

impl Asked {
    fn ask<T, B>(&self, whom: (&str, &str, &str), method: &str, body: &B) -> Seen<T>
    where
        T: DeserializeOwned + zbus::Type,
        B: Serialize + DynamicType,
    {
        self.call(whom, method, body)?.body().deserialize().map_err(|error| error.to_string())
    }

    fn call<B: Serialize + DynamicType>(&self, whom: (&str, &str, &str), method: &str, body: &B) -> Seen<Message> {
        let (name, path, interface) = whom;
        let reply = self.connection.call_method(Some(name), path, Some(interface), method, body);
        block_on(reply).map_err(|error| match error {
            zbus::Error::MethodError(_, Some(text), _) => text,
            zbus::Error::InputOutput(io) if io.kind() == std::io::ErrorKind::TimedOut => {
                "it does not answer".to_owned()
            }
            other => other.to_string(),
        })
    }

    fn property(&self, name: &str, path: &str, interface: &str, property: &str) -> Option<String> {
        let value: OwnedVariant = self.ask((name, path, PROPERTIES), "Get", &(interface, property)).ok()?;
        String::try_from(value).ok()
    }

    fn process(&self, name: &str) -> Option<u32> {
        self.ask(DBUS, "GetConnectionUnixProcessID", &name).ok()
    }

    /// systemd reads the unit's file for it, and does nothing else.
    fn unit(&self) -> Option<(String, String)> {
        let path: OwnedObjectPath = self.ask(SYSTEMD, "LoadUnit", &UNIT).ok()?;
        let state = |property| self.property(SYSTEMD.0, path.as_str(), "org.freedesktop.systemd1.Unit", property);
        Some((state("LoadState")?, state("ActiveState")?))
    }

    fn daemon(&self) -> Daemon {
        let pid = self.process(MANAGER.0);
        let status = pid.and_then(|pid| Root::real().read(format!("proc/{pid}/status")));
        let uid = status.as_deref().and_then(real_uid);
        let may_wake = status.as_deref().and_then(may_wake);
        let status = self.document("Status");
        // One that does not answer this will not answer that.
        let apps = if status.is_ok() { self.document("Apps") } else { Err("it does not answer".to_owned()) };
        Daemon { pid, uid, may_wake, status, apps }
    }

    fn document<T: DeserializeOwned>(&self, method: &str) -> Seen<T> {
        let text: String = self.ask(MANAGER, method, &())?;
        serde_json::from_str(&text).map_err(|error| format!("its answer cannot be read: {error}"))
    }
}

/// The first number of `Uid:` in a `/proc/PID/status`: on a user's bus the system's daemon has that user's effective uid
/// for the moment it connects, and never another real one.
fn real_uid(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_ascii_whitespace().next()?.parse().ok()
}

fn may_wake(status: &str) -> Option<bool> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    Some(u64::from_str_radix(hex.trim(), 16).ok()? >> CAP_WAKE_ALARM & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_tells_who_it_is_and_what_it_may() {
        let status = "Name:\tx\nUid:\t0\t1000\t0\t0\nCapPrm:\t0\nCapEff:\t0000000800000000\n";
        assert_eq!((real_uid(status), may_wake(status)), (Some(0), Some(true)));
        assert_eq!(may_wake(&status.replace("0000000800000000", "0000000400000000")), Some(false));
        assert_eq!((real_uid(""), may_wake("CapEff:\tx")), (None, None));
    }
}
