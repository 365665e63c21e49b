//! Who is never touched, by role: the processes and bus names a session stands on (design.md, invariant 3). Either name,
//! the executable's or the one a process gives itself, is enough: at worst an app protects itself from being frozen.

use std::{path::Path, sync::Arc};

use super::procfs::Stat;
use crate::model::VetoKind;

/// `comm` is cut to this many bytes by the kernel.
const COMM: usize = 15;

const INPUT_METHOD: &str = "an input method";
const ACCESSIBILITY: &str = "an assistive technology";
const LOCK_SCREEN: &str = "the lock screen";
const ALARM: &str = "an alarm clock";
const TELEPHONE: &str = "the telephone";

/// Why something must never be touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Role {
    pub(super) kind: VetoKind,
    /// As a sentence part.
    pub(super) reason: Arc<str>,
}

impl Role {
    /// One without a kind of its own.
    pub(super) fn other(reason: &str) -> Self {
        Self { kind: VetoKind::Service, reason: reason.into() }
    }

    fn new(role: &str, reason: String) -> Self {
        let kind = match role {
            INPUT_METHOD => VetoKind::InputMethod,
            ACCESSIBILITY => VetoKind::Accessibility,
            LOCK_SCREEN | ALARM | TELEPHONE => VetoKind::LockScreen,
            _ => VetoKind::Service,
        };
        Self { kind, reason: reason.into() }
    }
}

/// What a process of this name is, as a noun phrase. A trailing `*` stands for anything.
const PROCESSES: &[(&str, &[&str])] = &[
    ("the message bus", &["dbus-daemon", "dbus-broker", "dbus-broker-launch"]),
    ("the service manager", &["systemd", "(sd-pam)", "(systemd)", "init", "openrc-init", "runit", "s6-svscan"]),
    ("a part of the system", &["systemd-*", "elogind*", "login", "seatd", "greetd", "gdm*", "sddm*", "lightdm*"]),
    ("the sound server", &["pipewire", "pipewire-pulse", "wireplumber", "pulseaudio", "pipewire-media-session"]),
    ("a desktop portal", &["xdg-desktop-portal*", "xdg-document-portal", "xdg-permission-store"]),
    ("the virtual file system", &["gvfsd", "gvfsd-*", "gvfs-*", "kiod*"]),
    (
        "the desktop shell",
        &[
            "phosh",
            "phoc",
            "phosh-session",
            "kwin_wayland*",
            "kwin_x11",
            "plasmashell",
            "plasma_session",
            "startplasma-*",
            "sway",
            "swayidle",
            "labwc",
            "cage",
            "wayfire",
            "hyprland",
            "Hyprland",
            "niri",
            "cosmic-comp",
            "cosmic-session",
            "river",
            "weston",
            "gnome-shell",
            "gnome-session*",
            "mutter*",
            "lomiri*",
            "Xwayland",
            "Xorg",
            "X",
            "kded*",
            "ksmserver",
            "gsd-*",
            "dwl",
            "gamescope*",
            "hikari",
            "lipstick",
            "miracle-wm*",
            "qtile",
            "waybar",
            "xfwm4",
            "xwayland-satellite",
            "cosmic-panel",
            "kglobalaccel*",
            "lisgd",
        ],
    ),
    (
        INPUT_METHOD,
        &[
            "ibus*",
            "fcitx*",
            "scim*",
            "uim-*",
            "nimf*",
            "kime*",
            "squeekboard",
            "phosh-osk*",
            "stevia",
            "maliit-*",
            "plasma-keyboard",
            "wvkbd*",
            "svkbd*",
            "onboard",
            "florence",
            "xvkbd",
            "corekeyboard",
            "lomiri-keyboard*",
        ],
    ),
    (
        ACCESSIBILITY,
        &[
            "at-spi*",
            "orca",
            "speech-dispatcher",
            "sd_*",
            "espeakup",
            "brltty*",
            "kmag",
            "kmousetool",
            "dasher",
            "mousetweaks",
        ],
    ),
    (
        LOCK_SCREEN,
        &[
            "swaylock*",
            "gtklock",
            "waylock",
            "hyprlock",
            "i3lock*",
            "xsecurelock",
            "xscreensaver*",
            "light-locker",
            "kscreenlocker*",
            "physlock",
            "phrog",
            "gtkgreet",
            "regreet",
        ],
    ),
    (ALARM, &["gnome-clocks", "kclock", "kclockd", "lomiri-clock*"]),
    (
        TELEPHONE,
        &[
            "gnome-calls",
            "plasma-dialer*",
            "plasma-phone-dialer",
            "kde-telephony-daemon",
            "lomiri-dialer*",
            "callaudiod",
            "feedbackd",
            "cellbroadcastd",
        ],
    ),
    ("the location service", &["geoclue"]),
    ("the Bluetooth service", &["bluetoothd", "obexd"]),
    ("the keyring", &["gnome-keyring*", "kwalletd*", "ksecretd", "keepassxc"]),
    ("a key agent", &["ssh-agent", "gpg-agent", "scdaemon", "gcr-ssh-agent", "pinentry*"]),
    ("the authorisation agent", &["polkitd", "polkit-*", "lxpolkit", "xfce-polkit"]),
    ("the network manager", &["NetworkManager", "connmand", "iwd", "wpa_supplicant", "systemd-networkd"]),
    ("the modem manager", &["ModemManager", "ofonod", "oFono*"]),
    ("the notification service", &["dunst", "mako", "fnott", "swaync"]),
    ("the porter itself", &["nightporterd"]),
];

/// Likewise for bus names.
const NAMES: &[(&str, &[&str])] = &[
    ("the message bus", &["org.freedesktop.DBus", "org.freedesktop.DBus.*"]),
    ("the service manager", &["org.freedesktop.systemd1", "org.freedesktop.login1"]),
    ("the sound server", &["org.pulseaudio.*", "org.PulseAudio*", "org.freedesktop.ReserveDevice1.*"]),
    ("a desktop portal", &["org.freedesktop.portal.*", "org.freedesktop.impl.portal.*"]),
    ("the virtual file system", &["org.gtk.vfs.*"]),
    (
        "the desktop shell",
        &[
            "org.gnome.Shell",
            "org.gnome.Shell.*",
            "org.gnome.Mutter.*",
            "org.gnome.SessionManager",
            "org.kde.KWin",
            "org.kde.plasmashell",
            "org.kde.ksmserver",
            "sm.puri.Phosh*",
            "mobi.phosh.Shell*",
            "org.gnome.SettingsDaemon*",
        ],
    ),
    (INPUT_METHOD, &["org.freedesktop.IBus*", "org.fcitx.*", "sm.puri.OSK0", "org.maliit.*"]),
    (ACCESSIBILITY, &["org.a11y.*", "org.gnome.Orca*", "org.brlapi.*"]),
    (LOCK_SCREEN, &["org.gnome.ScreenSaver", "org.freedesktop.ScreenSaver", "org.kde.screensaver"]),
    (ALARM, &["org.gnome.clocks", "org.kde.kclock", "org.kde.kclockd"]),
    (
        TELEPHONE,
        &[
            "org.gnome.Calls",
            "org.kde.phone.dialer",
            "org.kde.telephony.*",
            "org.mobian_project.CallAudio",
            "org.sigxcpu.Feedback",
        ],
    ),
    ("the location service", &["org.freedesktop.GeoClue2"]),
    ("the Bluetooth service", &["org.bluez", "org.bluez.obex"]),
    ("the keyring", &["org.freedesktop.secrets", "org.gnome.keyring*", "org.kde.kwalletd*"]),
    ("the authorisation service", &["org.freedesktop.PolicyKit1"]),
    ("the network manager", &["org.freedesktop.NetworkManager"]),
    ("the modem manager", &["org.freedesktop.ModemManager1"]),
    ("the notification service", &["org.freedesktop.Notifications"]),
    ("a push distributor", &["org.unifiedpush.Distributor.*", "org.nightporter1"]),
];

/// Protected only with something running in them.
const TERMINALS: &[&str] = &[
    "gnome-terminal*",
    "kgx",
    "gnome-console",
    "konsole",
    "qmlkonsole",
    "foot",
    "footclient",
    "alacritty",
    "kitty",
    "xterm",
    "ptyxis*",
    "xfce4-terminal",
    "lxterminal",
    "st",
    "wezterm*",
    "terminator",
    "tilix",
    "tmux*",
    "screen",
    "sshd*",
    "cool-retro-term",
    "deepin-terminal",
];

const SHELLS: &[&str] = &["sh", "ash", "bash", "dash", "fish", "ksh*", "mksh", "zsh", "nu", "tcsh", "csh"];

/// Why this process must never be touched, as a sentence part, if so. `has_children`: whether anything runs below it.
pub(super) fn of_process(stat: &Stat, exe: Option<&Path>, has_children: bool) -> Option<Role> {
    if stat.pid == 1 {
        return Some(Role::other("it is the first process of the system"));
    }
    if stat.is_kernel_thread() {
        return Some(Role::other("it is a part of the kernel"));
    }
    let exe = exe.and_then(Path::file_name).and_then(|name| name.to_str());
    let exe = exe.map(|name| name.strip_suffix(" (deleted)").unwrap_or(name));
    let is = |patterns: &[&str]| {
        patterns.iter().any(|pattern| is_comm(pattern, &stat.comm) || exe.is_some_and(|exe| is_name(pattern, exe)))
    };
    if let Some((role, _)) = PROCESSES.iter().find(|(_, patterns)| is(patterns)) {
        return Some(Role::new(role, format!("it is {role} ({})", exe.unwrap_or(&stat.comm))));
    }
    if has_children && is(TERMINALS) {
        return Some(Role::other("it is a terminal with jobs in it"));
    }
    // What a login or a terminal starts: first of its session, with a terminal of its own.
    if is(SHELLS) && stat.session == stat.pid && stat.terminal != 0 {
        return Some(Role::other("it is a login shell"));
    }
    None
}

/// Why an app of this bus name must never be touched, as a sentence part, if so.
pub(super) fn of_service(service: &str) -> Option<Role> {
    let (role, _) = NAMES.iter().find(|(_, patterns)| patterns.iter().any(|pattern| is_name(pattern, service)))?;
    Some(Role::new(role, format!("it is {role}")))
}

fn is_name(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    }
}

fn is_comm(pattern: &str, comm: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => comm.starts_with(start.get(..COMM).unwrap_or(start)),
        None => comm == pattern.get(..COMM).unwrap_or(pattern),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(comm: &str) -> Stat {
        Stat {
            pid: 70,
            comm: comm.to_owned(),
            state: 'S',
            parent: 1,
            session: 60,
            terminal: 0,
            flags: 0x0040_0000,
            major_faults: 0,
            waited: 0,
            threads: 1,
            start: 1,
        }
    }

    #[test]
    fn a_session_stands_on_these() {
        for comm in [
            "dbus-daemon",
            "dbus-broker-lau",
            "systemd",
            "(sd-pam)",
            "pipewire",
            "wireplumber",
            "pulseaudio",
            "xdg-desktop-por",
            "gvfsd-fuse",
            "phosh",
            "phoc",
            "kwin_wayland",
            "kwin_wayland_wr",
            "plasmashell",
            "sway",
            "labwc",
            "gnome-shell",
            "mutter",
            "Xwayland",
            "Xorg",
            "ibus-daemon",
            "fcitx5",
            "squeekboard",
            "maliit-keyboard",
            "at-spi-bus-laun",
            "gnome-keyring-d",
            "ssh-agent",
            "gpg-agent",
            "polkit-gnome-au",
            "NetworkManager",
            "ModemManager",
            "nightporterd",
            "init",
        ] {
            assert!(of_process(&process(comm), None, false).is_some(), "{comm}");
        }
        for comm in
            ["", "sleep", "sh", "dbus", "dbus-daemonx", "fractal", "systemctl", "signal-desktop", "nightporter-sam"]
        {
            assert_eq!(of_process(&process(comm), None, false), None, "{comm}");
        }
    }

    #[test]
    fn those_who_need_help_and_those_who_ring() {
        for (comm, kind) in [
            ("orca", VetoKind::Accessibility),
            ("speech-dispatch", VetoKind::Accessibility),
            ("brltty", VetoKind::Accessibility),
            ("fcitx5", VetoKind::InputMethod),
            ("ibus-engine-sim", VetoKind::InputMethod),
            ("squeekboard", VetoKind::InputMethod),
            ("phosh-osk-stub", VetoKind::InputMethod),
            ("maliit-keyboard", VetoKind::InputMethod),
            ("wvkbd-mobintl", VetoKind::InputMethod),
            ("swaylock", VetoKind::LockScreen),
            ("kscreenlocker_g", VetoKind::LockScreen),
            ("gnome-clocks", VetoKind::LockScreen),
            ("kclockd", VetoKind::LockScreen),
            ("gnome-calls", VetoKind::LockScreen),
            ("plasma-phone-di", VetoKind::LockScreen),
            ("kwin_wayland", VetoKind::Service),
        ] {
            assert_eq!(of_process(&process(comm), None, false).map(|role| role.kind), Some(kind), "{comm}");
        }
        for (name, kind) in [
            ("org.gnome.clocks", VetoKind::LockScreen),
            ("org.gnome.Calls", VetoKind::LockScreen),
            ("org.a11y.Bus", VetoKind::Accessibility),
            ("org.fcitx.Fcitx5", VetoKind::InputMethod),
        ] {
            assert_eq!(of_service(name).map(|role| role.kind), Some(kind), "{name}");
        }
    }

    #[test]
    fn the_executable_counts_as_well() {
        let renamed = process("innocent");
        assert!(
            of_process(&renamed, Some(Path::new("/usr/bin/dbus-daemon")), false)
                .unwrap()
                .reason
                .contains("message bus")
        );
        assert!(of_process(&renamed, Some(Path::new("/usr/bin/phoc (deleted)")), false).is_some());
        assert_eq!(of_process(&renamed, Some(Path::new("/usr/bin/chatty")), false), None);
    }

    #[test]
    fn terminals_and_shells_only_with_somebody_in_them() {
        assert_eq!(of_process(&process("kgx"), None, false), None);
        assert!(of_process(&process("gnome-terminal-"), None, true).is_some());
        assert_eq!(of_process(&process("bash"), None, true), None);
        let login = Stat { session: 70, terminal: 34816, ..process("bash") };
        assert!(of_process(&login, None, false).is_some());
    }

    #[test]
    fn the_first_process_and_the_kernel() {
        assert!(of_process(&Stat { pid: 1, ..process("anything") }, None, false).is_some());
        assert!(of_process(&Stat { flags: 0x0020_8040, ..process("kworker/0:1") }, None, false).is_some());
    }

    #[test]
    fn names_of_services() {
        for name in ["org.freedesktop.DBus", "org.freedesktop.portal.Desktop", "org.unifiedpush.Distributor.kde"] {
            assert!(of_service(name).is_some(), "{name}");
        }
        for name in ["org.freedesktop.DBusX", "im.fractal.Fractal", ":1.5", ""] {
            assert_eq!(of_service(name), None, "{name}");
        }
    }
}
