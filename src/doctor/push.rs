//! The daemon, its configuration and state, and the push servers.

use super::{
    Area,
    facts::{Bus, Config, Daemon, Facts, StateDir, Upstream},
    kernel,
    memory::mib,
};
use crate::{
    model::Profile,
    view::{Finding, LinkState, Verdict},
};

/// The distributor's name, which apps look for.
const OWN: &str = "org.unifiedpush.Distributor.nightporter";
const DISTRIBUTORS: &str = "org.unifiedpush.Distributor.";
const MANAGER: &str = "org.nightporter1";
/// Bytes of free space below which nothing more can be relied upon to be stored, and below which it is getting tight.
const NO_SPACE: u64 = 4 << 20;
const LITTLE_SPACE: u64 = 64 << 20;

pub(super) fn examine(facts: &Facts, findings: &mut Vec<Finding>) {
    let mut area = Area { name: "daemon", findings };
    running(&mut area, facts);
    distributors(&mut area, facts);
    if let Some(config) = area.seen("config", "the configuration", &facts.config) {
        configuration(&mut area, facts, config);
    }
    if let Some(state) = area.seen("state", "the state directory", &facts.state) {
        state_directory(&mut area, facts, state);
    }
    let mut area = Area { name: "push", findings: area.findings };
    if let Some(upstreams) = area.seen("upstream", "the push servers", &facts.upstreams) {
        for one in upstreams {
            upstream(&mut area, facts, one);
        }
    }
}

fn running(area: &mut Area<'_>, facts: &Facts) {
    match (kernel::daemon(facts), bus(facts)) {
        (Some(daemon), _) => alive(area, facts, daemon),
        (None, Some(bus)) => dead(area, facts, bus),
        (None, None) => area.note("daemon", "whether the daemon runs could not be seen: its bus could not be reached"),
    }
    let other = match facts.user {
        true => None,
        false => facts.session_bus.as_ref().and_then(|bus| bus.as_ref().ok()?.daemon.as_ref()),
    };
    if other.is_some_and(|daemon| daemon.uid.is_some_and(|uid| uid != 0)) {
        area.say(
            "user-daemon",
            Verdict::Note,
            "this session has a daemon of its own (nightporterd --user)",
            Some("the system's daemon does not serve this session while that one has the names"),
            vec!["nightporter doctor --user".to_owned()],
        );
    }
}

fn alive(area: &mut Area<'_>, facts: &Facts, daemon: &Daemon) {
    if facts.user && is_the_systems(facts, daemon) {
        area.note(
            "daemon",
            "the system's daemon serves this session; `nightporter doctor` without --user says how it is",
        );
        return;
    }
    let status = match &daemon.status {
        Ok(status) => status,
        Err(why) => {
            area.say(
                "daemon",
                Verdict::Broken,
                format!("the daemon runs, but does not say how it is: {why}"),
                None,
                vec![restart(facts)],
            );
            return;
        }
    };
    let process = daemon.pid.map(|pid| format!(", process {pid}")).unwrap_or_default();
    let text = format!(
        "nightporterd {} runs{process}, serving {}",
        status.version,
        match &status.buses[..] {
            [] => "no bus".to_owned(),
            buses => buses.join(", "),
        }
    );
    if status.version == env!("CARGO_PKG_VERSION") {
        area.ok("daemon", text);
    } else {
        area.say(
            "daemon",
            Verdict::Note,
            format!("{text}; this is nightporter {}", env!("CARGO_PKG_VERSION")),
            None,
            vec![restart(facts)],
        );
    }
    for trouble in &status.troubles {
        area.say("trouble", Verdict::Broken, trouble.clone(), None, Vec::new());
    }
    match status.profile {
        Profile::Observe => area.say(
            "profile",
            Verdict::Note,
            "the profile is observe: it decides and measures, and touches no app",
            Some("messages are delivered; no memory is saved"),
            vec![format!("set profile = \"tombstone\" in {}", config_file(facts)), restart(facts)],
        ),
        Profile::Cached => area.ok("profile", "the profile is cached: apps are frozen and paged out, not ended"),
        Profile::Tombstone => area.ok("profile", "the profile is tombstone: apps are frozen, paged out and ended"),
    }
}

/// On a user's bus: whether it is the one that serves all of them.
fn is_the_systems(facts: &Facts, daemon: &Daemon) -> bool {
    let system = facts.system_bus.as_ref().ok().and_then(|bus| bus.daemon.as_ref()).and_then(|daemon| daemon.pid);
    daemon.uid == Some(0) && facts.uid != 0 || system.is_some() && system == daemon.pid
}

fn dead(area: &mut Area<'_>, facts: &Facts, bus: &Bus) {
    let nothing = Some("nothing is received; what is on its way waits at the push server");
    let (user, scope) = if facts.user { (" --user", "journalctl --user") } else { ("", "journalctl") };
    let systemctl = if facts.user { "systemctl --user" } else { "sudo systemctl" };
    let unit = if facts.user { "nightporterd-user.service or nightporterd.service" } else { "nightporterd.service" };
    match bus.unit.as_ref().map(|(load, active)| (load.as_str(), active.as_str())) {
        Some((_, "failed")) => area.say(
            "daemon",
            Verdict::Broken,
            format!("the daemon has failed ({unit})"),
            nothing,
            vec![format!("{scope} -u nightporterd -b"), format!("{systemctl} restart nightporterd")],
        ),
        Some(("loaded", "activating" | "reloading")) => area.note("daemon", "the daemon is being started"),
        Some(("loaded", "active")) => area.say(
            "daemon",
            Verdict::Broken,
            format!("{unit} runs, but it does not own its name on the bus"),
            nothing,
            vec![format!("{scope} -u nightporterd -b"), format!("{systemctl} restart nightporterd")],
        ),
        Some(("loaded", _)) => area.say(
            "daemon",
            Verdict::Lacks,
            "the daemon is installed and does not run",
            nothing,
            vec![format!("{systemctl} enable --now nightporterd")],
        ),
        Some(("masked", _)) => area.say(
            "daemon",
            Verdict::Lacks,
            format!("{unit} is masked"),
            nothing,
            vec![format!("{systemctl} unmask nightporterd"), format!("{systemctl} enable --now nightporterd")],
        ),
        _ => area.say(
            "daemon",
            Verdict::Lacks,
            "the daemon does not run",
            nothing,
            vec![format!("{}nightporterd{user}", if facts.user { "" } else { "sudo " })],
        ),
    }
}

/// Who else would be the apps' distributor.
fn distributors(area: &mut Area<'_>, facts: &Facts) {
    let seen = [facts.system_bus.as_ref().ok(), facts.session_bus.as_ref().and_then(|bus| bus.as_ref().ok())];
    for (bus, place) in seen.into_iter().zip(["system bus", "session bus"]) {
        let Some(bus) = bus else { continue };
        let owner = |name: &str| bus.owners.iter().find(|(one, _)| one == name).map(|(_, owner)| owner.as_str());
        let ours = owner(MANAGER);
        if owner(OWN).is_some_and(|holder| Some(holder) != ours) {
            area.say(
                "distributor",
                Verdict::Broken,
                format!("somebody else owns {OWN} on the {place}"),
                Some("apps there register with that one; the daemon waits for the name"),
                vec![format!("busctl {} status {OWN}", if place == "session bus" { "--user" } else { "--system" })],
            );
        }
        let mut others: Vec<&str> = bus
            .names
            .iter()
            .chain(&bus.activatable)
            .map(String::as_str)
            .filter(|name| name.starts_with(DISTRIBUTORS) && *name != OWN)
            // KDE's panel is served under KDE's name.
            .filter(|name| ours.is_none() || owner(name) != ours)
            .collect();
        others.sort_unstable();
        others.dedup();
        if !others.is_empty() {
            area.say(
                "other-distributor",
                Verdict::Note,
                format!("another distributor is on the {place}: {}", others.join(", ")),
                Some("apps choose; KDE's library prefers KDE's own while that can be had"),
                vec!["export UNIFIEDPUSH_DISTRIBUTOR=nightporter".to_owned()],
            );
        }
    }
}

fn configuration(area: &mut Area<'_>, facts: &Facts, config: &Config) {
    match config {
        Config::Defaults => area.ok("config", format!("no {}: the defaults hold", config_file(facts))),
        Config::Valid(path, settings) => {
            let names: Vec<&str> = settings.upstreams.iter().map(|one| &*one.name).collect();
            area.ok("config", format!("{path} is valid (upstreams: {})", names.join(", ")));
        }
        Config::Denied(path) => area.say(
            "config",
            Verdict::Note,
            format!("{path} may not be read by this user, so it could not be checked"),
            None,
            vec!["sudo nightporter doctor".to_owned()],
        ),
        Config::Unreadable(path, why) => area.say(
            "config",
            Verdict::Broken,
            format!("{path} cannot be read: {why}"),
            Some("the daemon does not start with it"),
            Vec::new(),
        ),
        Config::Invalid(path, why) => area.say(
            "config",
            Verdict::Broken,
            format!("{path} is wrong: {}", why.trim_end()),
            Some("the daemon does not start with it; one that runs goes on with what it read before"),
            vec![format!("correct it, then: nightporterd{} --check-config", if facts.user { " --user" } else { "" })],
        ),
    }
}

fn state_directory(area: &mut Area<'_>, facts: &Facts, state: &StateDir) {
    let free = mib(state.free / 1024);
    let instead = Some("messages cannot be stored: one that its app does not take at once stays at the push server");
    if state.read_only {
        area.say(
            "state",
            Verdict::Broken,
            format!("the file system of {} is read-only", state.path),
            instead,
            vec!["sudo mount -o remount,rw the file system, and look into dmesg for why it was not".to_owned()],
        );
    } else if state.free < NO_SPACE {
        area.say(
            "state",
            Verdict::Broken,
            format!("the file system of {} is full ({free} left)", state.path),
            instead,
            full(facts),
        );
    } else if state.free < LITTLE_SPACE {
        area.say(
            "state",
            Verdict::Note,
            format!("the file system of {} is nearly full ({free} left)", state.path),
            None,
            full(facts),
        );
    } else {
        let made = if state.exists == Some(false) { ", to be made at the first start" } else { "" };
        area.ok("state", format!("{}{made}: {free} left", state.path));
    }
}

fn full(facts: &Facts) -> Vec<String> {
    let mut steps = Vec::new();
    if facts.machine.as_ref().is_ok_and(|machine| machine.systemd) {
        steps.push("sudo journalctl --vacuum-size=50M".to_owned());
    }
    if facts.machine.as_ref().is_ok_and(|machine| machine.ids.iter().any(|id| id == "debian")) {
        steps.push("sudo apt clean".to_owned());
    }
    steps.push("remove what is not needed".to_owned());
    steps
}

fn upstream(area: &mut Area<'_>, facts: &Facts, one: &Upstream) {
    let id = format!("upstream:{}", one.name);
    let who = format!("{} ({})", one.name, one.kind);
    let reached = |took: u64| format!("{who} can be reached; connecting took {took} ms");
    let told = one.daemon.as_ref().map(|told| (told.state, told.last_error.as_deref()));
    match (told, &one.tried) {
        (Some((LinkState::Online, _)), _) => area.ok(&id, format!("{who} is connected")),
        (Some((LinkState::Off, _)), _) => {
            area.note(&id, format!("{who} is not connected while roaming (network.roaming = \"off\")"));
        }
        (Some((LinkState::Idle, _)) | None, Some(Ok(took))) => area.ok(&id, reached(*took)),
        (Some((LinkState::Idle, _)), None) => area.ok(&id, format!("{who} is not connected: no app needs it")),
        (Some((LinkState::Connecting, None)), None) => area.note(&id, format!("{who} is being connected to")),
        (Some((_, error)), Some(Ok(took))) => area.say(
            &id,
            Verdict::Broken,
            format!("{}, but the daemon is not connected: {}", reached(*took), error.unwrap_or("it is trying")),
            Some("it tries again by itself, with growing pauses"),
            vec![restart(facts)],
        ),
        (Some((_, Some(error))), None) => {
            unreachable(area, facts, &id, &who, error);
        }
        (Some((_, None)), None) => area.note(&id, format!("{who} is not connected yet")),
        (_, Some(Err(error))) => unreachable(area, facts, &id, &who, error),
        (None, None) => area.note(&id, format!("{who} was not tried")),
    }
}

fn unreachable(area: &mut Area<'_>, facts: &Facts, id: &str, who: &str, error: &str) {
    area.say(
        id,
        Verdict::Broken,
        format!("{who} cannot be reached: {error}"),
        Some("nothing is received from it; what is on its way waits there, and it is tried again with growing pauses"),
        vec![format!("look at the network, then at this [[upstream]] in {}", config_file(facts))],
    );
}

fn bus(facts: &Facts) -> Option<&Bus> {
    match facts.user {
        true => facts.session_bus.as_ref()?.as_ref().ok(),
        false => facts.system_bus.as_ref().ok(),
    }
}

fn config_file(facts: &Facts) -> String {
    match &facts.config {
        Ok(Config::Valid(path, _) | Config::Denied(path)) => path.clone(),
        _ if facts.user => "~/.config/nightporter/nightporter.toml".to_owned(),
        _ => "/etc/nightporter/nightporter.toml".to_owned(),
    }
}

fn restart(facts: &Facts) -> String {
    let systemd = facts.machine.as_ref().is_ok_and(|machine| machine.systemd);
    match (systemd, facts.user) {
        (true, true) => "systemctl --user restart nightporterd",
        (true, false) => "sudo systemctl restart nightporterd",
        (false, _) => "restart nightporterd",
    }
    .to_owned()
}
