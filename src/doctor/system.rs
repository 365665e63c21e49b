//! systemd, the buses, the services that tell of power and network, and whoever else manages apps.

use super::{
    Area,
    facts::{Bus, Config, Facts, Machine},
    mend,
};
use crate::{
    model::Profile,
    view::{Finding, Verdict},
};

pub(super) fn examine(facts: &Facts, findings: &mut Vec<Finding>) {
    let mut area = Area { name: "system", findings };
    if let Some(machine) = area.seen("systemd", "the machine", &facts.machine) {
        systemd(&mut area, facts, machine);
        double_management(&mut area, facts, machine);
    }
    let mut area = Area { name: "bus", findings: area.findings };
    system_bus(&mut area, facts);
    session_bus(&mut area, facts);
}

fn systemd(area: &mut Area<'_>, facts: &Facts, machine: &Machine) {
    if !machine.systemd {
        let init = machine.init.as_deref().unwrap_or("something else");
        area.say(
            "systemd",
            Verdict::Lacks,
            format!("systemd does not run this machine ({init} does)"),
            Some(
                "apps are started by the bus and moved to cgroups of their own where the daemon may; nothing restarts \
                 the daemon or thaws apps after a crash but its next start",
            ),
            vec![
                "have your init start /usr/bin/nightporterd, restart it when it fails, and run `nightporterd --thaw-all` \
                 when it has ended"
                    .to_owned(),
            ],
        );
        return;
    }
    let told = |bus: &Bus| version(bus.systemd.as_deref()?);
    let system = facts.system_bus.as_ref().ok().and_then(told).or(machine.systemd_version);
    let user = facts.session_bus.as_ref().and_then(|bus| bus.as_ref().ok()).and_then(told);
    let Some(version) = (if facts.user { user.or(system) } else { system }) else {
        area.note("systemd", "systemd runs this machine; it does not say its version");
        return;
    };
    match version {
        0..247 => area.say(
            "systemd",
            Verdict::Note,
            format!("systemd {version}: much older than any tried (252)"),
            Some("ProtectProc= and LoadCredential= of the unit are ignored (247), and the pause between restarts does not grow (254)"),
            Vec::new(),
        ),
        247..252 => area.say(
            "systemd",
            Verdict::Note,
            format!("systemd {version}: older than any tried (252)"),
            Some("the pause between restarts of the daemon does not grow (RestartSteps=, 254)"),
            Vec::new(),
        ),
        252..254 => area.ok(
            "systemd",
            format!("systemd {version}; the pause between restarts of the daemon does not grow (RestartSteps=, 254)"),
        ),
        254..256 => area.ok("systemd", format!("systemd {version}")),
        _ if facts.user => area.say(
            "systemd",
            Verdict::Note,
            format!("systemd {version} freezes user.slice while the machine suspends, and a user's daemon with it"),
            Some("a message that comes right before or after waits until systemd has thawed the session"),
            vec!["run nightporterd as a system service".to_owned()],
        ),
        _ => area.ok(
            "systemd",
            format!(
                "systemd {version}; it refuses to stop what `systemctl freeze` froze (256), so apps are frozen without it"
            ),
        ),
    }
}

/// The number `257.9-1~deb13u1` begins with.
fn version(text: &str) -> Option<u32> {
    let digits = text.trim_start_matches('v').split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// lifecycle.md §6 #23: who else stops apps.
fn double_management(area: &mut Area<'_>, facts: &Facts, machine: &Machine) {
    let enforces = match &facts.config {
        Ok(Config::Valid(_, settings)) => settings.profile != Profile::Observe,
        _ => false,
    };
    if let Some(pid) = machine.lomiri {
        let mend = vec!["set profile = \"observe\" in nightporter.toml: let Lomiri alone stop apps".to_owned()];
        area.say(
            "lomiri",
            if enforces { Verdict::Broken } else { Verdict::Note },
            format!("Lomiri (process {pid}) stops apps by itself when nobody looks at them"),
            Some(if enforces {
                "two stop and continue the same apps; an app that Lomiri has stopped does not take its message until it is \
                 looked at"
            } else {
                "profile observe leaves that to Lomiri; an app that it has stopped takes its message when it is looked at"
            }),
            if enforces { mend } else { Vec::new() },
        );
    }
    if let Some(action) = &machine.waydroid {
        let instead =
            "its container is no app of Night Porter's and is never touched; Android apps in it are not served";
        if action == "freeze" {
            area.say(
                "waydroid",
                Verdict::Note,
                "Waydroid freezes its container by itself (suspend_action = freeze)",
                Some(instead),
                Vec::new(),
            );
        } else {
            area.say("waydroid", Verdict::Ok, "Waydroid is installed and does not freeze", Some(instead), Vec::new());
        }
    }
}

fn system_bus(area: &mut Area<'_>, facts: &Facts) {
    let bus = match &facts.system_bus {
        Ok(bus) => bus,
        Err(why) => {
            let without = match facts.user {
                true => "power, network and sleep are unknown and count as good; the session is served all the same",
                false => "the daemon has no system bus to serve, and does not hear of users, power, network and sleep",
            };
            area.say(
                "system-bus",
                Verdict::Lacks,
                format!("the system bus cannot be reached: {why}"),
                Some(without),
                vec![start_bus(facts)],
            );
            return;
        }
    };
    implementation(area, "system-bus", "system bus", bus);
    let machine = facts.machine.as_ref().ok();
    // A user's daemon has its session for a session: it needs logind for sleep alone.
    let without_logind = match facts.user {
        true => "nothing keeps the machine awake while a message is on its way to its app",
        false => {
            "only the system bus is served, for nobody says who logs in; nothing keeps the machine awake for a message"
        }
    };
    let elogind = mend::package(machine, "elogind", "elogind");
    for (id, name, what, without, package) in [
        ("logind", "org.freedesktop.login1", "logind", without_logind, elogind),
        (
            "network-manager",
            "org.freedesktop.NetworkManager",
            "NetworkManager",
            "the kind of network, its cost and captive portals are unknown and count as good; its return is heard from the kernel",
            mend::package(machine, "network-manager", "networkmanager"),
        ),
        (
            "modem-manager",
            "org.freedesktop.ModemManager1",
            "ModemManager",
            "roaming is unknown, and network.roaming = \"off\" has no effect",
            mend::package(machine, "modemmanager", "modemmanager"),
        ),
        (
            "upower",
            "org.freedesktop.UPower",
            "UPower",
            "power and battery are unknown and count as good: no message is held for want of battery",
            mend::package(machine, "upower", "upower"),
        ),
    ] {
        let runs = bus.names.iter().any(|one| one == name);
        if runs || bus.activatable.iter().any(|one| one == name) {
            let how = if runs { "runs" } else { "is started when it is asked" };
            area.ok(id, format!("{what} {how}"));
        } else {
            let verdict = if id == "logind" { Verdict::Lacks } else { Verdict::Note };
            area.say(id, verdict, format!("{what} is not there"), Some(without), vec![package]);
        }
    }
}

fn start_bus(facts: &Facts) -> String {
    match facts.machine.as_ref().is_ok_and(|machine| machine.systemd) {
        true => "sudo systemctl start dbus.socket".to_owned(),
        false => mend::package(facts.machine.as_ref().ok(), "dbus", "dbus") + ", and have your init start it",
    }
}

fn session_bus(area: &mut Area<'_>, facts: &Facts) {
    match &facts.session_bus {
        Some(Ok(bus)) => implementation(area, "session-bus", "session bus", bus),
        Some(Err(why)) if facts.user => area.say(
            "session-bus",
            Verdict::Broken,
            format!("this session's bus cannot be reached: {why}"),
            Some("nightporterd --user has nothing to serve"),
            vec!["run it inside a session, or through dbus-run-session".to_owned()],
        ),
        Some(Err(why)) => area.note("session-bus", format!("this session's bus could not be seen: {why}")),
        None if facts.user => area.say(
            "session-bus",
            Verdict::Broken,
            "this is no session: DBUS_SESSION_BUS_ADDRESS is not set",
            Some("nightporterd --user has nothing to serve"),
            vec!["run it inside a session, or through dbus-run-session".to_owned()],
        ),
        None => area.note("session-bus", "asked outside of a session: what is on a user's bus could not be seen"),
    }
}

fn implementation(area: &mut Area<'_>, id: &str, what: &str, bus: &Bus) {
    let starts = bus.names.iter().any(|name| name == "org.freedesktop.systemd1");
    match bus.implementation.as_deref() {
        Some("dbus-daemon") if starts => area.ok(
            id,
            format!("the {what} is a dbus-daemon; apps are started through systemd, each in a cgroup of its own"),
        ),
        Some("dbus-daemon") => area.say(
            id,
            Verdict::Note,
            format!("the {what} is a dbus-daemon without a systemd on it"),
            Some("an app it starts runs in the bus's own cgroup; it is moved to its own, or else stopped by signals"),
            Vec::new(),
        ),
        Some("dbus-broker") => area.ok(id, format!("the {what} is a dbus-broker")),
        Some(other) => area.note(id, format!("the {what} is a {other}, which was never tried")),
        None => area.ok(id, format!("the {what} answers")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_begins_with_its_number() {
        for (text, number) in
            [("257.9-1~deb13u1", Some(257)), ("252", Some(252)), ("v258~rc1", Some(258)), ("", None), ("x", None)]
        {
            assert_eq!(version(text), number, "{text:?}");
        }
    }
}
