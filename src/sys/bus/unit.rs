//! Names of systemd units: which app a cgroup belongs to, and how a unit for an app is named.
//!
//! The convention is systemd's `DESKTOP_ENVIRONMENTS.md`; what shells really use is in lifecycle.md §4.4. All of it is
//! text made by others, so every function here takes anything.

use std::fmt::Write as _;

use crate::model::Bus;

/// UNIT_NAME_MAX of systemd.
const NAME_MAX: usize = 255;

/// What a process's cgroup says about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Placement {
    /// Its application id, where its unit's name has one.
    pub(super) app_id: Option<String>,
    /// Whether the unit is a sandbox's (Flatpak, snap).
    pub(super) sandbox: bool,
}

/// A unit of a systemd manager, as a process's cgroup names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    /// Its name: a service or a scope.
    pub(super) name: String,
    /// Its cgroup, below the root of the hierarchy: what systemd tells as `ControlGroup`.
    pub(super) group: String,
}

/// The unit that the manager on `bus` has made for a process with this `/proc/PID/cgroup`: the user's own manager on a
/// session bus, the system's on the system bus. `None` for what is another manager's, or nobody's.
pub(super) fn of_process(cgroup: &str, bus: Bus) -> Option<Unit> {
    of_group(v2_path(cgroup), bus)
}

/// The same of a path in the cgroup hierarchy.
pub(super) fn of_group(path: &str, bus: Bus) -> Option<Unit> {
    let user_manager = |part: &str| {
        let uid = part.strip_prefix("user@")?.strip_suffix(".service")?;
        uid.parse::<u32>().ok()
    };
    let mut end = 0;
    // Below the system's manager, and below each user's, are its slices and then its units.
    let mut manager = None;
    for part in path.strip_prefix('/')?.split('/') {
        end += 1 + part.len();
        match (user_manager(part), bus) {
            (Some(_), Bus::System) => return None,
            (Some(uid), Bus::Session(_)) if manager.is_none() => manager = Some(uid),
            _ if part.ends_with(".slice") => {}
            _ => {
                let own = match bus {
                    Bus::System => true,
                    Bus::Session(uid) => manager == Some(uid),
                };
                // systemd puts a `_` before what the kernel would take for a file of its own.
                let name = part.strip_prefix('_').unwrap_or(part);
                return (own && is_unit_name(name))
                    .then(|| Unit { name: name.to_owned(), group: path.get(..end).unwrap_or(path).to_owned() });
            }
        }
    }
    None
}

/// The path in the cgroup v2 hierarchy that `/proc/PID/cgroup` tells, or nothing.
fn v2_path(cgroup: &str) -> &str {
    cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default()
}

/// Whether systemd could have given this name to a service or scope. Nothing else gets into match rules and calls.
fn is_unit_name(name: &str) -> bool {
    let stem = name.strip_suffix(".service").or_else(|| name.strip_suffix(".scope"));
    stem.is_some_and(|stem| !stem.is_empty())
        && name.len() <= NAME_MAX
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b))
}

/// What `/proc/PID/cgroup` says: from the unit its manager made, which is the outermost below the user manager. Below it
/// a service with a delegated subtree makes cgroups of any name it likes.
pub(super) fn placement(cgroup: &str) -> Placement {
    let mut unit = None;
    for part in v2_path(cgroup).split('/') {
        if part.ends_with(".slice") || part.is_empty() || (part.starts_with("user@") && part.ends_with(".service")) {
            continue;
        }
        unit = Some(part);
        break;
    }
    let Some(unit) = unit else { return Placement::default() };
    Placement { app_id: app_id(unit), sandbox: unit.starts_with("app-flatpak-") || unit.starts_with("snap.") }
}

/// The application id in a unit's name: `app[-LAUNCHER]-ID-RANDOM.scope`, `app[-LAUNCHER]-ID[@RANDOM].service`, the older
/// `app[-LAUNCHER]-ID-RANDOM.service`, and dbus-broker's `dbus-:1.N-ID@N.service`.
pub(super) fn app_id(unit: &str) -> Option<String> {
    let id = if let Some(name) = unit.strip_suffix(".scope") {
        match split(name.strip_prefix("app-")?).as_slice() {
            [id, _random] | [_, id, _random] => *id,
            _ => return None,
        }
    } else {
        let name = unit.strip_suffix(".service")?;
        let (name, instance) = name.split_once('@').map_or((name, None), |(name, random)| (name, Some(random)));
        if let Some(activated) = name.strip_prefix("dbus-:1.") {
            instance?;
            let (connection, id) = activated.split_once('-')?;
            connection.bytes().all(|b| b.is_ascii_digit()).then_some(id)?
        } else {
            match (split(name.strip_prefix("app-")?).as_slice(), instance) {
                ([id], _) => *id,
                // An id is in reverse-DNS form; a random part is not.
                ([id, random], None) if id.contains('.') && !random.contains('.') => *id,
                ([_, id], _) | ([_, id, _], None) => *id,
                _ => return None,
            }
        }
    };
    let id = unescape(id)?;
    let plausible =
        !id.is_empty() && id.len() <= 255 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    plausible.then_some(id)
}

/// The unit an app is started in: `app-nightporter-ID@RANDOM.service`. `None` when that is longer than systemd takes.
pub(super) fn unit_for(app: &str, random: u32) -> Option<String> {
    let name = format!("app-nightporter-{}@{random:08x}.service", escape(app));
    (name.len() <= NAME_MAX).then_some(name)
}

/// systemd-escape(1): what is not alphanumeric, `_`, `:` or an inner `.` becomes `\xHH`; `/` becomes `-`.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'/' => out.push('-'),
            b'.' if at > 0 => out.push('.'),
            b'_' | b':' => out.push(char::from(byte)),
            _ if byte.is_ascii_alphanumeric() => out.push(char::from(byte)),
            _ => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\x{byte:02x}");
            }
        }
    }
    out
}

/// The inverse of [`escape`] for one part of a name. `None` for a broken escape or what is not UTF-8.
fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        if bytes.next()? != b'x' {
            return None;
        }
        let (high, low) = (char::from(bytes.next()?).to_digit(16)?, char::from(bytes.next()?).to_digit(16)?);
        out.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(out).ok()
}

fn split(name: &str) -> Vec<&str> {
    // More than three parts fit no rule, however many there are.
    name.splitn(4, '-').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_names_of_every_launcher() {
        for (unit, id) in [
            ("app-org.gnome.Maps-1234.scope", Some("org.gnome.Maps")),
            ("app-gnome-org.gnome.Maps-1234.scope", Some("org.gnome.Maps")),
            ("app-gnome-firefox\\x2desr-99.scope", Some("firefox-esr")),
            ("app-flatpak-im.dino.Dino-301.scope", Some("im.dino.Dino")),
            ("app-org.kde.neochat@3f9c8a.service", Some("org.kde.neochat")),
            ("app-org.kde.neochat.service", Some("org.kde.neochat")),
            ("app-nightporter-im.dino.Dino@0badcafe.service", Some("im.dino.Dino")),
            ("app-gnome-im.dino.Dino-55.service", Some("im.dino.Dino")),
            ("app-im.dino.Dino-55.service", Some("im.dino.Dino")),
            ("app-gnome-im.dino.Dino.service", Some("im.dino.Dino")),
            ("app-tuba@autostart.service", Some("tuba")),
            ("dbus-:1.2-org.gnome.Calls@0.service", Some("org.gnome.Calls")),
            ("dbus-:1.17-org.a\\x2db@3.service", Some("org.a-b")),
            ("app-org.kde.konsole-1234.scope", Some("org.kde.konsole")),
            ("app-org.kde.dolphin@9b4e0f4c7b3d4c4e8f7a.service", Some("org.kde.dolphin")),
            ("app-org.kde.kdeconnect.daemon@autostart.service", Some("org.kde.kdeconnect.daemon")),
            ("app-gnome\\x2dkeyring\\x2dpkcs11@autostart.service", Some("gnome-keyring-pkcs11")),
            ("app-gnome-org.gnome.Evolution\\x2dalarm\\x2dnotify-2211.scope", Some("org.gnome.Evolution-alarm-notify")),
            ("app-phosh-sm.puri.Chatty-812.scope", Some("sm.puri.Chatty")),
            ("app-sway-foot-4711.scope", Some("foot")),
            ("app-Hyprland-firefox-1a2b3c4d.scope", Some("firefox")),
            ("app-flatpak-org.mozilla.firefox-2862107932.scope", Some("org.mozilla.firefox")),
            ("app-my\\x2dshell-org.a.B@77.service", Some("org.a.B")),
            ("app-dbus\\x2d:1.2\\x2dorg.a.B.slice", None),
        ] {
            assert_eq!(app_id(unit).as_deref(), id, "{unit}");
        }
    }

    #[test]
    fn hostile_unit_names_have_no_id() {
        for unit in [
            "",
            "app-",
            "app-.scope",
            "app-1234.scope",
            "app--.scope",
            "app-@.service",
            "app-a-b-c-d.scope",
            "app-a-b-c-d@1.service",
            "app-x\\x2-1.scope",
            "app-x\\-1.scope",
            "app-x\\x-1.scope",
            "app-x\\xzz-1.scope",
            "app-x\\x00y-1.scope",
            "app-x\\xff-1.scope",
            "app-x\\x2f..-1.scope",
            "app-\\x0aevil-1.scope",
            "dbus-:1.-x.service",
            "dbus-:1.x-org.a@1.service",
            "dbus-:1.2-org.a.service",
            "session-2.scope",
            "dbus.service",
            "user@1000.service",
            "app-org.x-1.slice",
        ] {
            assert_eq!(app_id(unit), None, "{unit}");
        }
        assert_eq!(app_id(&format!("app-{}-1.scope", "a".repeat(256))), None);
    }

    #[test]
    fn the_outermost_unit_below_the_user_manager_counts() {
        let base = "0::/user.slice/user-1000.slice/user@1000.service/app.slice";
        for (cgroup, id, sandbox) in [
            (format!("{base}/app-org.a.B-1.scope"), Some("org.a.B"), false),
            (format!("{base}/app-flatpak-org.a.B-1.scope/sub"), Some("org.a.B"), true),
            (format!("{base}/evil.service/app-org.victim.App-1.scope"), None, false),
            (format!("{base}/snap.chat.chat-5.scope"), None, true),
            ("0::/user.slice/user-1000.slice/session-1.scope".into(), None, false),
            ("0::/system.slice/app-org.a.B.service".into(), Some("org.a.B"), false),
            ("9:name=systemd:/app-org.a.B-1.scope\n0::/".into(), None, false),
            (String::new(), None, false),
            ("0::".into(), None, false),
        ] {
            let placement = placement(&cgroup);
            assert_eq!((placement.app_id.as_deref(), placement.sandbox), (id, sandbox), "{cgroup}");
        }
    }

    #[test]
    fn units_belong_to_the_manager_of_their_bus() {
        let user = "/user.slice/user-1000.slice/user@1000.service";
        let session = Bus::Session(1000);
        for (path, bus, unit) in [
            (format!("{user}/app.slice/app-org.a.B-1.scope"), session, Some("app-org.a.B-1.scope")),
            (format!("{user}/app.slice/app-flatpak-org.a.B-1.scope"), session, Some("app-flatpak-org.a.B-1.scope")),
            (
                format!("{user}/app.slice/app-dbus\\x2d:1.2\\x2dorg.a.slice/dbus-:1.2-org.a@0.service"),
                session,
                Some("dbus-:1.2-org.a@0.service"),
            ),
            (format!("{user}/background.slice/_io.sync.service"), session, Some("io.sync.service")),
            (format!("{user}/dbus.service"), session, Some("dbus.service")),
            // The user's manager is itself a unit of the system's, and knows nothing of another user's.
            (format!("{user}/app.slice/app-org.a.B-1.scope"), Bus::System, None),
            (format!("{user}/app.slice/app-org.a.B-1.scope"), Bus::Session(1001), None),
            (format!("{user}/app.slice"), session, None),
            (format!("{user}/evil.d/app-org.a.B-1.scope"), session, None),
            (format!("{user}/a'b.service"), session, None),
            (format!("{user}/.service"), session, None),
            (format!("{user}/{}.service", "a".repeat(255)), session, None),
            ("/user.slice/user-1000.slice/session-2.scope".into(), session, None),
            ("/user.slice/user-1000.slice/session-2.scope".into(), Bus::System, Some("session-2.scope")),
            ("/system.slice/sample1.service".into(), Bus::System, Some("sample1.service")),
            ("/system.slice/system-getty.slice/getty@tty1.service".into(), Bus::System, Some("getty@tty1.service")),
            ("/system.slice/sample1.service".into(), session, None),
            ("/user@x.service/a.service".into(), session, None),
            ("/".into(), Bus::System, None),
            (String::new(), Bus::System, None),
            ("relative.service".into(), Bus::System, None),
        ] {
            let found = of_group(&path, bus);
            assert_eq!(found.as_ref().map(|unit| unit.name.as_str()), unit, "{path} on {bus}");
            assert!(found.is_none_or(|unit| unit.group == path), "{path}");
            for below in ["/", "/inner/most", "/evil.service"] {
                let inside = of_process(&format!("1:x:/\n0::{path}{below}\n"), bus);
                if unit.is_some() {
                    assert_eq!(inside.map(|unit| unit.group).as_deref(), Some(&*path), "{path}{below}");
                }
            }
        }
        assert_eq!(of_process("", session), None);
    }

    #[test]
    fn our_own_units_read_back() {
        for app in ["im.dino.Dino", "org.a-b.c_d", ":1.5", ".x-y/z"] {
            let name = unit_for(app, 0x00ab_cdef).unwrap();
            assert!(name.starts_with("app-nightporter-") && name.ends_with("@00abcdef.service"), "{name}");
        }
        assert_eq!(app_id(&unit_for("org.a-b.C", 7).unwrap()).as_deref(), Some("org.a-b.C"));
        assert_eq!(unit_for(&"a-".repeat(120), 0), None);
    }
}
