//! Names on a session bus that stand for a role: their owners are called by others, who hang while the owner is held still,
//! or a person cannot do without them. The one table of them.

use super::watch::covers;
use crate::model::VetoKind::{self, Accessibility, InputMethod, LockScreen, Service};

/// A role.
#[derive(Debug)]
pub(super) struct Role {
    /// The name; with `.*` at its end, all names below it as well.
    pub(super) name: &'static str,
    pub(super) kind: VetoKind,
    /// What its owner is, after "it".
    pub(super) is: &'static str,
    /// Whether it is for its owner to ring, and to carry the call.
    pub(super) calls: bool,
}

/// The first that fits counts.
pub(super) const ROLES: &[Role] = &[
    // Without these nobody can type.
    role("org.fcitx.*", InputMethod, "is an input method"),
    role("org.freedesktop.portal.Fcitx", InputMethod, "is an input method"),
    role("org.freedesktop.IBus.*", InputMethod, "is an input method"),
    role("org.freedesktop.portal.IBus", InputMethod, "is an input method"),
    role("org.maliit.server", InputMethod, "is an on-screen keyboard"),
    role("sm.puri.OSK0", InputMethod, "is the on-screen keyboard"),
    // Without these some people can do nothing at all.
    role("org.gnome.Orca.*", Accessibility, "is a screen reader"),
    role("org.a11y.*", Accessibility, "serves screen readers and other aids"),
    // The phone rings, in an emergency as well.
    dialler("org.gnome.Calls"),
    dialler("org.kde.plasma.dialer"),
    dialler("org.kde.telephony"),
    dialler("org.kde.modemdaemon"),
    dialler("com.lomiri.TelephonyServiceHandler"),
    role("com.lomiri.TelephonyServiceApprover", Service, "lets calls in"),
    role("org.freedesktop.Telepathy.*", Service, "carries calls and messages for others"),
    role("org.ofono.mms", Service, "carries multimedia messages for others"),
    role("org.sigxcpu.Feedback", Service, "makes the phone ring and buzz"),
    // Locking must not hang.
    role("org.freedesktop.ScreenSaver", LockScreen, "locks the screen, or keeps it lit for others"),
    role("org.gnome.ScreenSaver", LockScreen, "locks the screen"),
    role("org.mate.ScreenSaver", LockScreen, "locks the screen"),
    role("org.xfce.ScreenSaver", LockScreen, "locks the screen"),
    role("org.cinnamon.ScreenSaver", LockScreen, "locks the screen"),
    // What other apps call and wait for.
    role("org.freedesktop.Notifications", Service, "shows everybody's notifications"),
    role("org.freedesktop.secrets", Service, "keeps other apps' passwords"),
    role("org.kde.kwalletd5", Service, "keeps other apps' passwords"),
    role("org.kde.kwalletd6", Service, "keeps other apps' passwords"),
    role("org.freedesktop.portal.*", Service, "is a portal for sandboxed apps"),
    role("org.freedesktop.impl.portal.*", Service, "serves a portal for sandboxed apps"),
    role("org.freedesktop.FileManager1", Service, "shows folders for other apps"),
    role("org.freedesktop.PowerManagement.*", Service, "manages power for other apps"),
    role("org.gnome.SessionManager", Service, "manages the session"),
    role("org.gnome.Shell.*", Service, "is part of the shell"),
    role("org.gnome.evolution.dataserver.*", Service, "keeps other apps' contacts and calendars"),
    role("org.gnome.OnlineAccounts", Service, "keeps other apps' accounts"),
    role("org.gtk.vfs.*", Service, "serves files to other apps"),
    role("ca.desrt.dconf", Service, "keeps other apps' settings"),
    role("org.kde.ActivityManager", Service, "is part of the shell"),
    role("org.kde.StatusNotifierWatcher", Service, "keeps the tray"),
];

const fn role(name: &'static str, kind: VetoKind, is: &'static str) -> Role {
    Role { name, kind, is, calls: false }
}

const fn dialler(name: &'static str) -> Role {
    Role { name, kind: Service, is: "answers the phone", calls: true }
}

/// The role that `name` stands for.
pub(super) fn of(name: &str) -> Option<&'static Role> {
    ROLES.iter().find(|role| covers(role.name, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_roles_they_should() {
        let kind = |name: &str| of(name).map(|role| role.kind);
        assert_eq!(kind("org.fcitx.Fcitx5"), Some(InputMethod));
        assert_eq!(kind("org.freedesktop.IBus"), Some(InputMethod));
        assert_eq!(kind("org.freedesktop.portal.IBus"), Some(InputMethod), "before the portals");
        assert_eq!(kind("org.freedesktop.portal.Desktop"), Some(Service));
        assert_eq!(kind("org.gnome.Orca"), Some(Accessibility));
        assert_eq!(kind("org.freedesktop.ScreenSaver"), Some(LockScreen));
        assert_eq!(kind("org.gnome.Shellfish"), None);
        assert_eq!(kind("org.gnome.Music"), None);
        let diallers = ROLES.iter().filter(|role| role.calls);
        assert!(diallers.clone().count() > 0 && diallers.clone().all(|role| role.kind == Service));
    }

    #[test]
    fn a_name_is_one_and_fit_for_a_rule() {
        for (index, role) in ROLES.iter().enumerate() {
            let name = role.name.strip_suffix(".*").unwrap_or(role.name);
            zbus::names::WellKnownName::try_from(name).unwrap();
            assert!(
                !ROLES[..index].iter().any(|earlier| covers(earlier.name, role.name)),
                "{} comes too late",
                role.name
            );
        }
    }
}
