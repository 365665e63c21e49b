//! Whether each app that has registered can be started when it does not run.

use super::{
    Area,
    facts::{App, Facts, ServiceFile},
};
use crate::view::{Finding, Verdict};

pub(super) fn examine(facts: &Facts, findings: &mut Vec<Finding>) {
    let mut area = Area { name: "push", findings };
    let Some(apps) = area.seen("apps", "the apps that have registered", &facts.apps) else { return };
    if apps.is_empty() {
        area.ok("apps", "no app has registered yet");
    }
    let systemd = facts.machine.as_ref().is_ok_and(|machine| machine.systemd);
    for app in apps {
        examine_one(&mut area, app, systemd);
    }
}

fn examine_one(area: &mut Area<'_>, app: &App, systemd: bool) {
    let App { name, bus, .. } = app;
    let id = format!("app:{name}");
    let file = match &app.file {
        Ok(Some(file)) => file,
        Ok(None) if app.known_to_bus == Some(true) => {
            area.note(
                &id,
                format!(
                    "{name} ({bus}): the bus can start it, but its D-Bus service file was not found in the usual places"
                ),
            );
            return;
        }
        Ok(None) => {
            area.say(
                &id,
                Verdict::Lacks,
                format!("{name} ({bus}) has no D-Bus service file"),
                Some(
                    "it cannot be started for a push: what comes while it does not run waits until it is started by hand; \
                     so it is frozen and paged out, but not ended to save memory",
                ),
                vec![service_file(name, bus)],
            );
            return;
        }
        Err(why) => {
            area.note(&id, format!("{name} ({bus}): its D-Bus service file could not be seen: {why}"));
            return;
        }
    };
    let ServiceFile { systemd_service, exec, user } = file;
    if app.known_to_bus == Some(false) {
        area.say(
            &id,
            Verdict::Broken,
            format!("{name} ({bus}) has a D-Bus service file, but the bus does not know of it"),
            Some("the bus cannot start it for a push, and other programs cannot reach it"),
            vec![format!(
                "busctl {} call org.freedesktop.DBus / org.freedesktop.DBus ReloadConfig",
                if bus == "system" { "--system" } else { "--user" }
            )],
        );
        return;
    }
    match (systemd, systemd_service, exec) {
        (true, Some(unit), _) => {
            area.ok(&id, format!("{name} ({bus}) can be started as {unit}, in a cgroup of its own"));
        }
        (true, None, true) if bus == "system" && !user => area.say(
            &id,
            Verdict::Broken,
            format!("{name} ({bus}): its D-Bus service file names neither SystemdService= nor User="),
            Some("it cannot be started for a push"),
            vec![format!("add User= to /usr/share/dbus-1/system-services/{name}.service")],
        ),
        (true, None, true) => area.ok(
            &id,
            format!("{name} ({bus}) can be started, as a transient unit of its own (it has no SystemdService=)"),
        ),
        (false, _, true) => area.ok(&id, format!("{name} ({bus}) can be started by the bus")),
        (_, _, false) => area.say(
            &id,
            Verdict::Broken,
            format!("{name} ({bus}): its D-Bus service file has no Exec= that can be run"),
            Some("it cannot be started for a push"),
            vec![service_file(name, bus)],
        ),
    }
}

fn service_file(name: &str, bus: &str) -> String {
    match bus {
        "system" => format!(
            "have its package install /usr/share/dbus-1/system-services/{name}.service: \
             [D-BUS Service], Name={name}, Exec=/path/to/it, User=…, SystemdService=…"
        ),
        _ => format!(
            "printf '[D-BUS Service]\\nName={name}\\nExec=/path/to/it\\n' > ~/.local/share/dbus-1/services/{name}.service"
        ),
    }
}
