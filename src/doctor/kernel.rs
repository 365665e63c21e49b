//! The kernel: cgroups, freezing, paging out, pressure, waking.

use super::{
    Area,
    facts::{AppSlice, Cgroups, Config, Facts, Kernel, Machine, Swappiness},
    mend,
};
use crate::view::{Finding, Verdict};

/// What the oldest Debian that was tried has. Older ones may well do.
const TRIED: (u32, u32) = (6, 1);

pub(super) fn examine(facts: &Facts, findings: &mut Vec<Finding>) {
    let mut area = Area { name: "kernel", findings };
    if let Some(kernel) = area.seen("kernel", "the kernel", &facts.kernel) {
        version(&mut area, kernel);
        processes(&mut area, facts, kernel);
        pressure(&mut area, facts, kernel);
        waking(&mut area, facts, kernel);
    }
    if let Some(cgroups) = area.seen("cgroup", "cgroups", &facts.cgroups) {
        hierarchy(&mut area, facts, cgroups);
        memory_controller(&mut area, facts, cgroups);
        freezer(&mut area, facts, cgroups);
        reclaim(&mut area, facts, cgroups);
        delegation(&mut area, facts, cgroups);
    }
}

fn version(area: &mut Area<'_>, kernel: &Kernel) {
    match kernel.version() {
        Some(version) if version >= TRIED => area.ok("kernel", format!("Linux {}", kernel.release)),
        Some(_) => area.note(
            "kernel",
            format!("Linux {}; 6.1 is the oldest this daemon was tried on. What it has is below.", kernel.release),
        ),
        None => area.note("kernel", format!("a kernel that calls itself \"{}\"", kernel.release)),
    }
}

fn processes(area: &mut Area<'_>, facts: &Facts, kernel: &Kernel) {
    if kernel.pidfd {
        area.ok("pidfd", "processes can be held by pidfd: no signal goes to the wrong one");
    } else {
        area.say(
            "pidfd",
            Verdict::Broken,
            "the kernel has no pidfd (Linux 5.3), or something forbids it",
            Some("no app can be identified, frozen or started: the daemon can do nothing for apps"),
            vec!["install a kernel of 5.3 or newer".to_owned()],
        );
    }
    if kernel.process_madvise {
        area.ok("process-madvise", "process_madvise(2) can page out apps that have no memory cgroup");
    } else {
        let without = match facts.cgroups.as_ref().is_ok_and(has_memory) {
            true => "nothing is missing: memory.reclaim does it",
            false => "nothing is paged out here: frozen apps keep their memory until they are ended",
        };
        area.say(
            "process-madvise",
            Verdict::Lacks,
            "the kernel has no process_madvise(2) (Linux 5.10), or something forbids it",
            Some(without),
            Vec::new(),
        );
    }
}

fn pressure(area: &mut Area<'_>, facts: &Facts, kernel: &Kernel) {
    if kernel.psi {
        area.ok("psi", "the kernel says when memory is short (/proc/pressure)");
        return;
    }
    let instead = "how short memory is is looked at when an app is frozen or thawed only, and judged by what is \
                   available; what looks at pressure (systemd-oomd, low-memory-monitor) does not work";
    match kernel.psi_built {
        Some(false) => area.say(
            "psi",
            Verdict::Lacks,
            "this kernel was built without pressure information (CONFIG_PSI)",
            Some(instead),
            vec!["install a kernel that was built with CONFIG_PSI".to_owned()],
        ),
        _ => area.say(
            "psi",
            Verdict::Lacks,
            "there is no pressure information (/proc/pressure): it is off unless asked for at boot",
            Some(instead),
            mend::kernel_command_line(facts, &mend::parameters(facts)),
        ),
    }
}

fn waking(area: &mut Area<'_>, facts: &Facts, kernel: &Kernel) {
    if !kernel.suspends {
        area.ok("wake-alarm", "this machine does not suspend, so nothing need wake it");
        return;
    }
    let wanted = match &facts.config {
        Ok(Config::Valid(_, settings)) => settings.network.wake_for_heartbeat,
        _ => false,
    };
    let [clock, ..] = &kernel.wake_clocks[..] else {
        let clocks = match &kernel.other_clocks[..] {
            [] => "there is no real-time clock".to_owned(),
            clocks => format!("no real-time clock can ({} cannot)", clocks.join(", ")),
        };
        area.say(
            "wake-alarm",
            Verdict::Lacks,
            format!("nothing can wake this machine from suspend at a given time: {clocks}"),
            Some(
                "while it sleeps no heartbeat is sent; after the resume the link is proved and what waited at the \
                 server comes",
            ),
            Vec::new(),
        );
        return;
    };
    let daemon = daemon(facts);
    match (wanted, daemon.and_then(|daemon| daemon.may_wake)) {
        (false, _) => area.ok(
            "wake-alarm",
            format!("{clock} can wake this machine; the heartbeat does not ask for it (network.wake-for-heartbeat)"),
        ),
        (true, Some(true)) => area.ok("wake-alarm", format!("{clock} wakes this machine for the heartbeat")),
        (true, None) => {
            area.note("wake-alarm", format!("{clock} can wake this machine; whether the daemon may, it alone knows"))
        }
        (true, Some(false)) => area.say(
            "wake-alarm",
            Verdict::Broken,
            "network.wake-for-heartbeat is on, but the daemon lacks CAP_WAKE_ALARM",
            Some("the machine is not woken for the heartbeat"),
            match facts.user {
                true => {
                    vec!["set network.wake-for-heartbeat = false: a user's daemon cannot have the capability".into()]
                }
                false => vec![
                    "sudo mkdir -p /etc/systemd/system/nightporterd.service.d".into(),
                    "printf '[Service]\\nProtectClock=no\\nCapabilityBoundingSet=CAP_WAKE_ALARM\\n' | \
                     sudo tee /etc/systemd/system/nightporterd.service.d/wake.conf"
                        .into(),
                    "sudo systemctl daemon-reload".into(),
                    "sudo systemctl restart nightporterd".into(),
                ],
            },
        ),
    }
}

fn hierarchy(area: &mut Area<'_>, facts: &Facts, cgroups: &Cgroups) {
    let machine = facts.machine.as_ref().ok();
    let Some(mount) = &cgroups.mount else {
        area.say(
            "cgroup",
            Verdict::Lacks,
            "cgroup v2 is not mounted",
            Some(
                "apps are stopped and continued by signals (SIGSTOP), which a program can notice and another can undo",
            ),
            unified(facts, machine),
        );
        return;
    };
    if cgroups.read_only {
        area.say(
            "cgroup",
            Verdict::Lacks,
            format!("cgroup v2 is mounted read-only at {mount}: a container, it seems"),
            Some("apps are stopped and continued by signals (SIGSTOP)"),
            vec![format!("sudo mount -o remount,rw {mount}")],
        );
    } else if cgroups.v1.is_empty() {
        area.ok("cgroup", format!("cgroup v2 is mounted at {mount}"));
    } else {
        area.say(
            "cgroup",
            Verdict::Note,
            format!(
                "cgroup v2 is mounted at {mount}, beside version 1 (hybrid mode), which holds {}",
                cgroups.v1.join(", ")
            ),
            Some("freezing works; a controller that version 1 holds is not to be had in version 2"),
            unified(facts, machine),
        );
    }
}

/// How version 2 comes to be the only one.
fn unified(facts: &Facts, machine: Option<&Machine>) -> Vec<String> {
    let Some(machine) = machine else { return Vec::new() };
    let init = machine.init.as_deref();
    if machine.cmdline.split_ascii_whitespace().any(|word| word == "systemd.unified_cgroup_hierarchy=0") {
        return vec![
            "remove systemd.unified_cgroup_hierarchy=0 from the kernel's command line".to_owned(),
            "sudo reboot".to_owned(),
        ];
    }
    if machine.systemd {
        return mend::kernel_command_line(facts, &["systemd.unified_cgroup_hierarchy=1"]);
    }
    if init == Some("init") && machine.ids.iter().any(|id| id == "alpine" || id == "postmarketos" || id == "gentoo") {
        return vec![
            "set rc_cgroup_mode=\"unified\" in /etc/rc.conf".to_owned(),
            "sudo rc-update add cgroups sysinit".to_owned(),
            "sudo reboot".to_owned(),
        ];
    }
    vec!["have what mounts /sys/fs/cgroup at boot mount cgroup v2 there, and nothing else".to_owned()]
}

fn has_memory(cgroups: &Cgroups) -> bool {
    cgroups.controllers.iter().any(|one| one == "memory")
}

fn memory_controller(area: &mut Area<'_>, facts: &Facts, cgroups: &Cgroups) {
    if cgroups.mount.is_none() {
        return;
    }
    let instead = match (facts.user, facts.kernel.as_ref().is_ok_and(|kernel| kernel.process_madvise)) {
        (false, true) => {
            "apps are paged out process by process (process_madvise); memory is read from /proc/PID/smaps_rollup"
        }
        (true, true) => "nothing is paged out: process_madvise(2) takes rights that a user's daemon does not have",
        (_, false) => "nothing is paged out: frozen apps keep their memory until they are ended",
    };
    if !has_memory(cgroups) {
        let (text, mend) = missing_controller(facts, cgroups);
        area.say("memory-controller", Verdict::Lacks, text, Some(instead), mend);
        return;
    }
    let off: Vec<&AppSlice> = cgroups.slices.iter().filter(|slice| !slice.memory_on).collect();
    let Some(first) = off.first() else {
        let apps = if cgroups.slices.is_empty() { ", though nobody who is logged in has a slice for apps" } else { "" };
        area.ok("memory-controller", format!("cgroups have the memory controller{apps}"));
        return;
    };
    let users: Vec<String> = off.iter().map(|slice| slice.uid.to_string()).collect();
    let (verdict, mend) = match first.memory {
        // The user's manager turns it on when a unit wants it.
        true => (
            Verdict::Lacks,
            vec![
                "mkdir -p ~/.config/systemd/user/app.slice.d".to_owned(),
                "printf '[Slice]\\nMemoryAccounting=yes\\n' > ~/.config/systemd/user/app.slice.d/memory.conf"
                    .to_owned(),
                "systemctl --user daemon-reload".to_owned(),
            ],
        ),
        false => (
            Verdict::Lacks,
            vec![
                "sudo mkdir -p /etc/systemd/system/user@.service.d".to_owned(),
                "printf '[Service]\\nDelegate=pids memory cpu\\n' | \
                 sudo tee /etc/systemd/system/user@.service.d/delegate.conf"
                    .to_owned(),
                "sudo systemctl daemon-reload".to_owned(),
                "log out and in again".to_owned(),
            ],
        ),
    };
    area.say(
        "memory-controller",
        verdict,
        format!("apps do not have the memory controller, though the machine does (user {})", users.join(", ")),
        Some(instead),
        mend,
    );
}

fn missing_controller(facts: &Facts, cgroups: &Cgroups) -> (String, Vec<String>) {
    let parameters = mend::parameters(facts);
    if cgroups.v1.iter().any(|one| one == "memory") {
        let text = "the memory controller belongs to cgroup version 1 here, so that version 2 does not have it";
        return (text.to_owned(), unified(facts, facts.machine.as_ref().ok()));
    }
    if parameters.contains(&"cgroup_enable=memory") {
        let text = "the memory controller is switched off at boot, as the Raspberry Pi's firmware has it";
        return (text.to_owned(), mend::kernel_command_line(facts, &parameters));
    }
    if cgroups.memory_enabled == Some(false) {
        let text = "the memory controller is switched off at boot (cgroup_disable=memory)";
        return (
            text.to_owned(),
            vec!["remove cgroup_disable=memory from the kernel's command line".to_owned(), "sudo reboot".to_owned()],
        );
    }
    (
        "this kernel has no memory controller (CONFIG_MEMCG)".to_owned(),
        vec!["install a kernel that was built with CONFIG_MEMCG".to_owned()],
    )
}

fn freezer(area: &mut Area<'_>, facts: &Facts, cgroups: &Cgroups) {
    if cgroups.mount.is_none() || cgroups.read_only {
        return;
    }
    let version = facts.kernel.as_ref().ok().and_then(Kernel::version);
    let since = |wanted: (u32, u32)| version.is_some_and(|version| version >= wanted);
    // The files say it for certain; the version, where there is no cgroup to look in.
    let (freeze, kill) = match &cgroups.sample {
        Some(sample) => (sample.freeze, sample.kill),
        None => (since((5, 2)), since((5, 14))),
    };
    match (freeze, kill) {
        (true, true) => area.ok("freezer", "apps can be frozen and ended as a whole (cgroup.freeze, cgroup.kill)"),
        (true, false) => area.say(
            "freezer",
            Verdict::Note,
            "apps can be frozen as a whole, but there is no cgroup.kill (Linux 5.14)",
            Some("an app's processes are ended one by one, each held by its pidfd"),
            Vec::new(),
        ),
        (false, _) => area.say(
            "freezer",
            Verdict::Lacks,
            "the kernel cannot freeze cgroups of version 2 (Linux 5.2)",
            Some("apps are stopped and continued by signals (SIGSTOP)"),
            vec!["install a newer kernel".to_owned()],
        ),
    }
}

fn reclaim(area: &mut Area<'_>, facts: &Facts, cgroups: &Cgroups) {
    if !has_memory(cgroups) {
        return;
    }
    let version = facts.kernel.as_ref().ok().and_then(Kernel::version);
    let since = |wanted: (u32, u32)| version.is_some_and(|version| version >= wanted);
    let there = cgroups.sample.as_ref().map_or(since((5, 19)), |sample| sample.reclaim || !sample.freeze);
    if !there && !since((5, 19)) {
        area.say(
            "memory-reclaim",
            Verdict::Lacks,
            "the kernel cannot page out a cgroup (memory.reclaim, Linux 5.19)",
            Some("apps are paged out process by process (process_madvise), by the system's daemon only"),
            vec!["install a kernel of 5.19 or newer".to_owned()],
        );
        return;
    }
    match cgroups.sample.as_ref().and_then(|sample| sample.swappiness) {
        Some(Swappiness::Max) => {
            area.ok("memory-reclaim", "a cgroup's anonymous memory can be paged out (memory.reclaim, swappiness=max)");
        }
        Some(Swappiness::Number) => area.ok(
            "memory-reclaim",
            "a cgroup can be paged out, mostly anonymous memory (memory.reclaim, swappiness=200)",
        ),
        Some(Swappiness::No) => without_swappiness(area),
        None if since((6, 8)) => {
            area.ok("memory-reclaim", "a cgroup can be paged out (memory.reclaim with swappiness)")
        }
        None => without_swappiness(area),
    }
}

fn without_swappiness(area: &mut Area<'_>) {
    area.say(
        "memory-reclaim",
        Verdict::Note,
        "a cgroup can be paged out (memory.reclaim), but what of it is for the kernel to choose (Linux 6.8 lets us say)",
        Some("more of an app's files is dropped, and read again when it wakes"),
        Vec::new(),
    );
}

/// What a user's daemon may write. The system's runs as root.
fn delegation(area: &mut Area<'_>, facts: &Facts, cgroups: &Cgroups) {
    if !facts.user || cgroups.mount.is_none() {
        return;
    }
    let signals = "apps are stopped and continued by signals (SIGSTOP), and nothing is paged out";
    let Some(slice) = cgroups.slices.iter().find(|slice| slice.uid == facts.uid) else {
        area.say(
            "delegation",
            Verdict::Lacks,
            "this user has no app.slice: no systemd looks after this user's session",
            Some(signals),
            vec!["run nightporterd as a system service: root may write all cgroups".to_owned()],
        );
        return;
    };
    let may = slice.freeze_writable.unwrap_or(slice.writable);
    if !may {
        area.say(
            "delegation",
            Verdict::Lacks,
            format!("this user may not write the cgroups in {}", slice.path),
            Some(signals),
            vec!["run nightporterd as a system service: root may write all cgroups".to_owned()],
        );
    } else if slice.reclaim_writable == Some(false) {
        area.say(
            "delegation",
            Verdict::Note,
            format!("this user may freeze what is in {}, but not page it out", slice.path),
            Some("frozen apps keep their memory until they are ended"),
            Vec::new(),
        );
    } else {
        area.ok("delegation", format!("this user may freeze, page out and end what is in {}", slice.path));
    }
}

/// The daemon that is asked about.
pub(super) fn daemon(facts: &Facts) -> Option<&super::facts::Daemon> {
    let bus = match facts.user {
        true => facts.session_bus.as_ref()?.as_ref().ok()?,
        false => facts.system_bus.as_ref().ok()?,
    };
    bus.daemon.as_ref()
}
