//! From facts to findings, case by case. `tests/doctor.rs` has whole machines, made of files.

use super::{
    examine,
    facts::{
        App, Boot, Bus, Cgroups, Config, Daemon, Facts, Kernel, Machine, ServiceFile, StateDir, Swap, SwapSpace,
        Upstream, Zram,
    },
};
use crate::{
    config::Settings,
    model::Profile,
    view::{self, LinkState, Verdict},
};

/// A machine on which nothing is wrong.
fn sound() -> Facts {
    Facts {
        user: false,
        uid: 0,
        machine: Ok(Machine {
            os: Some("Debian".into()),
            ids: vec!["debian".into()],
            boot: Boot::Grub { fragments: true, update: true },
            init: Some("systemd".into()),
            systemd: true,
            systemd_version: Some(257),
            ..Machine::default()
        }),
        kernel: Ok(Kernel {
            release: "6.12.48".into(),
            pidfd: true,
            process_madvise: true,
            psi: true,
            wake_clocks: vec!["rtc0".into()],
            suspends: true,
            ..Kernel::default()
        }),
        cgroups: Ok(Cgroups {
            mount: Some("/sys/fs/cgroup".into()),
            controllers: vec!["cpu".into(), "memory".into()],
            memory_enabled: Some(true),
            ..Cgroups::default()
        }),
        swap: Ok(Swap {
            memory: 2 << 20,
            spaces: vec![SwapSpace {
                path: "/dev/zram0".into(),
                size: 1 << 20,
                used: 1024,
                zram: Some(Zram { algorithm: Some("zstd".into()), memory_used: Some(400), memory_limit: Some(0) }),
            }],
            zram_devices: 1,
        }),
        system_bus: Ok(bus()),
        session_bus: None,
        config: Ok(Config::Valid("/etc/n.toml".into(), Box::default())),
        state: Ok(StateDir { path: "/var/lib/n".into(), exists: Some(true), free: 1 << 30, read_only: false }),
        apps: Ok(Vec::new()),
        upstreams: Ok(Vec::new()),
    }
}

fn bus() -> Bus {
    let names = ["login1", "NetworkManager", "ModemManager1", "UPower", "systemd1"];
    let mut names: Vec<String> = names.map(|name| format!("org.freedesktop.{name}")).into();
    names.push("org.nightporter1".into());
    names.push("org.unifiedpush.Distributor.nightporter".into());
    Bus {
        implementation: Some("dbus-daemon".into()),
        owners: vec![
            ("org.nightporter1".into(), ":1.5".into()),
            ("org.unifiedpush.Distributor.nightporter".into(), ":1.5".into()),
        ],
        names,
        systemd: Some("257.9-1~deb13u1".into()),
        unit: Some(("loaded".into(), "active".into())),
        daemon: Some(daemon(Profile::Tombstone)),
        ..Bus::default()
    }
}

fn daemon(profile: Profile) -> Daemon {
    let status = view::Status {
        pressure: None,
        version: env!("CARGO_PKG_VERSION").into(),
        profile,
        upstreams: Vec::new(),
        buses: vec!["system".into(), "user 1000".into()],
        apps: 0,
        registrations: 0,
        messages_waiting: 0,
        messages: view::Messages::default(),
        surroundings: None,
        min_urgency: None,
        min_urgency_reason: None,
        troubles: Vec::new(),
    };
    Daemon { pid: Some(77), uid: Some(0), may_wake: Some(false), status: Ok(status), apps: Ok(Vec::new()) }
}

/// The verdict, the text, what happens instead and what mends it of the only finding with this id.
fn only(facts: &Facts, id: &str) -> (Verdict, String) {
    let found = examine(facts).findings;
    let those: Vec<_> = found.into_iter().filter(|finding| finding.id == id).collect();
    let [one] = &those[..] else { panic!("{id}: {those:?}") };
    (one.verdict, format!("{} | {} | {}", one.text, one.instead.as_deref().unwrap_or_default(), one.mend.join(" ; ")))
}

/// Changes a sound machine and looks at one finding.
#[track_caller]
fn check(id: &str, verdict: Verdict, words: &[&str], change: impl FnOnce(&mut Facts)) {
    let mut facts = sound();
    change(&mut facts);
    let (found, text) = only(&facts, id);
    assert_eq!(found, verdict, "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

fn system(facts: &mut Facts) -> &mut Bus {
    facts.system_bus.as_mut().unwrap()
}

fn with(settings: &str) -> Result<Config, String> {
    Ok(Config::Valid("/etc/n.toml".into(), Box::new(Settings::parse(settings).unwrap())))
}

#[test]
fn a_sound_machine_has_nothing_to_mend() {
    let mut facts = sound();
    facts.session_bus = Some(Ok(bus()));
    let found = examine(&facts);
    let worse: Vec<_> = found.findings.iter().filter(|finding| finding.verdict != Verdict::Ok).collect();
    assert!(worse.is_empty(), "{worse:?}");
    assert!(found.findings.iter().all(|finding| finding.mend.is_empty()));
    assert_eq!(found.counts.ok, found.findings.len());
    assert_eq!((found.scope.as_str(), found.machine.as_str()), ("system", "Debian, Linux 6.12.48"));
}

#[test]
fn what_could_not_be_seen_is_a_note_and_never_broken() {
    let unseen = || "it is dark".to_owned();
    for user in [false, true] {
        let facts = Facts {
            user,
            uid: 1000,
            machine: Err(unseen()),
            kernel: Err(unseen()),
            cgroups: Err(unseen()),
            swap: Err(unseen()),
            system_bus: Err(unseen()),
            session_bus: (!user).then(|| Err(unseen())),
            config: Err(unseen()),
            state: Err(unseen()),
            apps: Err(unseen()),
            upstreams: Err(unseen()),
        };
        let found = examine(&facts);
        let broken: Vec<_> = found.findings.iter().filter(|finding| finding.verdict == Verdict::Broken).collect();
        // A daemon for a session without a session has nothing to serve.
        assert_eq!(broken.len(), usize::from(user), "{broken:?}");
        assert!(found.counts.note >= 7, "{:?}", found.counts);
    }
}

#[test]
fn pressure_is_switched_on_where_this_machine_keeps_its_command_line() {
    let boots = [
        (Boot::RaspberryPi("/boot/firmware/cmdline.txt".into()), "sed -i '1 s/$/ psi=1/' /boot/firmware/cmdline.txt"),
        (
            Boot::Grub { fragments: true, update: true },
            "/etc/default/grub.d/nightporter.cfg ; sudo update-grub ; sudo reboot",
        ),
        (Boot::Grub { fragments: false, update: false }, "/etc/default/grub: psi=1 ; sudo grub2-mkconfig"),
        (Boot::UBootMenu, "tee /etc/u-boot-menu/conf.d/nightporter.conf ; sudo u-boot-update ; sudo reboot"),
        (Boot::PostmarketOs { fragments: true }, "tee /etc/kernel-cmdline.d/90-nightporter.conf ; sudo mkinitfs"),
        (Boot::PostmarketOs { fragments: false }, "/etc/deviceinfo: psi=1 ; sudo mkinitfs ; sudo reboot"),
        (Boot::Armbian, "/boot/armbianEnv.txt: psi=1"),
        (Boot::KernelInstall, "psi=1/' /etc/kernel/cmdline ; sudo kernel-install"),
        (Boot::Unknown, "your boot loader keeps it: psi=1"),
    ];
    for (boot, mend) in boots {
        check("psi", Verdict::Lacks, &[mend, "sudo reboot"], |facts| {
            facts.machine.as_mut().unwrap().boot = boot;
            facts.kernel.as_mut().unwrap().psi = false;
        });
    }
    check("psi", Verdict::Lacks, &["CONFIG_PSI", "install a kernel"], |facts| {
        let kernel = facts.kernel.as_mut().unwrap();
        (kernel.psi, kernel.psi_built) = (false, Some(false));
    });
}

#[test]
fn the_memory_controller_is_missing_in_several_ways() {
    let without = |facts: &mut Facts, enabled: Option<bool>| {
        let cgroups = facts.cgroups.as_mut().unwrap();
        cgroups.controllers = vec!["cpu".into()];
        cgroups.memory_enabled = enabled;
    };
    check("memory-controller", Verdict::Lacks, &["version 1", "systemd.unified_cgroup_hierarchy=1"], |facts| {
        without(facts, Some(true));
        facts.cgroups.as_mut().unwrap().v1 = vec!["memory".into()];
    });
    check("memory-controller", Verdict::Lacks, &["remove cgroup_disable=memory"], |facts| without(facts, Some(false)));
    check("memory-controller", Verdict::Lacks, &["CONFIG_MEMCG"], |facts| without(facts, None));
    // One change of the command line for all that is missing.
    check(
        "memory-controller",
        Verdict::Lacks,
        &["Raspberry", "process_madvise", "'1 s/$/ cgroup_enable=memory cgroup_memory=1 psi=1/' /boot/cmdline.txt"],
        |facts| {
            without(facts, Some(false));
            facts.machine.as_mut().unwrap().boot = Boot::RaspberryPi("/boot/cmdline.txt".into());
            facts.kernel.as_mut().unwrap().psi = false;
        },
    );
}

#[test]
fn old_kernels_are_told_what_they_lack() {
    let old = |release: &str| {
        let release = release.to_owned();
        move |facts: &mut Facts| facts.kernel.as_mut().unwrap().release = release
    };
    check("kernel", Verdict::Note, &["6.1"], old("5.10.0-28"));
    check("freezer", Verdict::Note, &["5.14", "one by one"], old("5.10.0"));
    check("freezer", Verdict::Lacks, &["SIGSTOP"], old("4.19.0"));
    check("memory-reclaim", Verdict::Lacks, &["5.19", "process_madvise"], old("5.10.0"));
    check("memory-reclaim", Verdict::Note, &["6.8"], old("6.1.0-rpi7"));
    check("memory-reclaim", Verdict::Ok, &["swappiness"], old("6.8.0"));
    check("pidfd", Verdict::Broken, &["5.3"], |facts| facts.kernel.as_mut().unwrap().pidfd = false);
    check("kernel", Verdict::Note, &["strange"], old("strange"));
}

#[test]
fn waking_takes_a_clock_and_a_capability() {
    let on = "[network]\nwake-for-heartbeat = true";
    check("wake-alarm", Verdict::Ok, &["does not ask"], |_| {});
    check("wake-alarm", Verdict::Broken, &["CAP_WAKE_ALARM", "ProtectClock=no"], |facts| facts.config = with(on));
    check("wake-alarm", Verdict::Ok, &["rtc0 wakes"], |facts| {
        facts.config = with(on);
        system(facts).daemon.as_mut().unwrap().may_wake = Some(true);
    });
    check("wake-alarm", Verdict::Lacks, &["rtc0 cannot"], |facts| {
        let kernel = facts.kernel.as_mut().unwrap();
        kernel.other_clocks = std::mem::take(&mut kernel.wake_clocks);
    });
    check("wake-alarm", Verdict::Ok, &["does not suspend"], |facts| facts.kernel.as_mut().unwrap().suspends = false);
}

#[test]
fn swap_is_described_or_had_by_this_systems_own_means() {
    let none = |facts: &mut Facts| facts.swap.as_mut().unwrap().spaces.clear();
    check("swap", Verdict::Lacks, &["apt install systemd-zram-generator", "zram-generator.conf"], none);
    check("swap", Verdict::Lacks, &["apt install zram-tools"], |facts| {
        none(facts);
        facts.machine.as_mut().unwrap().systemd = false;
    });
    check("swap", Verdict::Lacks, &["rc-update add zram-init"], |facts| {
        none(facts);
        let machine = facts.machine.as_mut().unwrap();
        (machine.systemd, machine.ids) = (false, vec!["postmarketos".into(), "alpine".into()]);
    });
    check("zram", Verdict::Ok, &["zram0: zstd", "1 MiB", "without a limit"], |_| {});
    check("zram", Verdict::Lacks, &["wears"], |facts| facts.swap.as_mut().unwrap().spaces[0].zram = None);
    check("zram", Verdict::Note, &["mem_limit"], |facts| {
        let zram = facts.swap.as_mut().unwrap().spaces[0].zram.as_mut().unwrap();
        (zram.memory_used, zram.memory_limit) = (Some(95), Some(100));
    });
    check("swap", Verdict::Note, &["nearly full"], |facts| facts.swap.as_mut().unwrap().spaces[0].used = 1 << 20);
}

#[test]
fn systemd_is_judged_by_its_version() {
    let is = |version: &str| {
        let version = version.to_owned();
        move |facts: &mut Facts| system(facts).systemd = Some(version)
    };
    check("systemd", Verdict::Note, &["LoadCredential="], is("241 (241-7)"));
    check("systemd", Verdict::Note, &["RestartSteps="], is("247.3-7"));
    check("systemd", Verdict::Ok, &["252"], is("252.39-1~deb12u1"));
    check("systemd", Verdict::Ok, &["refuses to stop"], is("257.9"));
    check("systemd", Verdict::Note, &["user.slice", "system service"], |facts| facts.user = true);
    check("systemd", Verdict::Lacks, &["openrc-init", "--thaw-all"], |facts| {
        let machine = facts.machine.as_mut().unwrap();
        (machine.systemd, machine.init) = (false, Some("openrc-init".into()));
    });
}

#[test]
fn services_that_are_missing_say_what_goes_unheard() {
    for (id, name, word) in [
        ("logind", "org.freedesktop.login1", "only the system bus is served"),
        ("network-manager", "org.freedesktop.NetworkManager", "apt install network-manager"),
        ("modem-manager", "org.freedesktop.ModemManager1", "roaming"),
        ("upower", "org.freedesktop.UPower", "battery"),
    ] {
        let verdict = if id == "logind" { Verdict::Lacks } else { Verdict::Note };
        check(id, verdict, &[word], |facts| system(facts).names.retain(|one| one != name));
        check(id, Verdict::Ok, &["started when it is asked"], |facts| {
            system(facts).names.retain(|one| one != name);
            system(facts).activatable.push(name.into());
        });
    }
    check("system-bus", Verdict::Ok, &["dbus-broker"], |facts| {
        system(facts).implementation = Some("dbus-broker".into())
    });
}

#[test]
fn a_daemon_that_does_not_run_is_told_by_how_its_unit_is() {
    let unit = |load: &str, active: &str| {
        let unit = Some((load.to_owned(), active.to_owned()));
        move |facts: &mut Facts| {
            system(facts).daemon = None;
            system(facts).unit = unit;
        }
    };
    check("daemon", Verdict::Broken, &["failed", "journalctl -u nightporterd"], unit("loaded", "failed"));
    check("daemon", Verdict::Lacks, &["sudo systemctl enable --now nightporterd"], unit("loaded", "inactive"));
    check("daemon", Verdict::Lacks, &["unmask"], unit("masked", "inactive"));
    check("daemon", Verdict::Broken, &["does not own its name"], unit("loaded", "active"));
    check("daemon", Verdict::Lacks, &["does not run"], unit("not-found", "inactive"));
    check("daemon", Verdict::Note, &["0.0.9"], |facts| {
        system(facts).daemon.as_mut().unwrap().status.as_mut().unwrap().version = "0.0.9".into();
    });
    check("daemon", Verdict::Broken, &["it hangs"], |facts| {
        system(facts).daemon.as_mut().unwrap().status = Err("it hangs".into());
    });
    check("trouble", Verdict::Broken, &["the disk is full"], |facts| {
        let status = system(facts).daemon.as_mut().unwrap().status.as_mut().unwrap();
        status.troubles.push("the disk is full".into());
    });
    check("profile", Verdict::Note, &["observe", "profile = \"tombstone\" in /etc/n.toml"], |facts| {
        system(facts).daemon = Some(daemon(Profile::Observe));
    });
}

#[test]
fn the_systems_daemon_on_a_users_bus_is_not_the_users_own() {
    let on_session = |uid: u32, daemon: Daemon| {
        move |facts: &mut Facts| {
            (facts.user, facts.uid) = (true, uid);
            facts.session_bus = Some(Ok(Bus { daemon: Some(daemon), ..bus() }));
        }
    };
    let own = |uid: u32| Daemon { pid: Some(78), uid: Some(uid), ..daemon(Profile::Tombstone) };
    check("daemon", Verdict::Note, &["the system's daemon serves this session"], on_session(1000, own(0)));
    check("daemon", Verdict::Note, &["the system's daemon"], on_session(0, daemon(Profile::Tombstone)));
    check("daemon", Verdict::Ok, &["process 78"], on_session(1000, own(1000)));
    check("daemon", Verdict::Ok, &["process 78"], on_session(0, own(0)));
    check("user-daemon", Verdict::Note, &["nightporter doctor --user"], |facts| {
        on_session(1000, own(1000))(facts);
        facts.user = false;
    });
}

#[test]
fn other_distributors_are_named_unless_they_are_us() {
    const OWN: &str = "org.unifiedpush.Distributor.nightporter";
    const KDE: &str = "org.unifiedpush.Distributor.kde";
    check("distributor", Verdict::Broken, &[OWN], |facts| system(facts).owners[1].1 = ":1.9".into());
    check("other-distributor", Verdict::Note, &[KDE, "UNIFIEDPUSH_DISTRIBUTOR=nightporter"], |facts| {
        system(facts).activatable.push(KDE.into());
    });
    let mut facts = sound();
    system(&mut facts).names.push(KDE.into());
    system(&mut facts).owners.push((KDE.into(), ":1.5".into()));
    assert!(examine(&facts).findings.iter().all(|finding| finding.id != "other-distributor"));
}

#[test]
fn configuration_and_state() {
    check("config", Verdict::Ok, &["/etc/nightporter/nightporter.toml", "defaults"], |facts| {
        facts.config = Ok(Config::Defaults)
    });
    check("config", Verdict::Note, &["sudo nightporter doctor"], |facts| {
        facts.config = Ok(Config::Denied("/x".into()))
    });
    check("config", Verdict::Broken, &["/x", "line 3", "--check-config"], |facts| {
        facts.config = Ok(Config::Invalid("/x".into(), "line 3".into()));
    });
    let free = |free: u64| move |facts: &mut Facts| facts.state.as_mut().unwrap().free = free;
    check("state", Verdict::Broken, &["full"], free(0));
    check("state", Verdict::Note, &["nearly full", "33 MiB", "apt clean"], free(33 << 20));
    check("state", Verdict::Ok, &["1024 MiB"], |_| {});
    check("state", Verdict::Broken, &["read-only"], |facts| facts.state.as_mut().unwrap().read_only = true);
}

#[test]
fn push_servers_are_judged_by_the_daemon_and_by_trying() {
    use LinkState::{Connecting, Idle, Off, Online, Waiting};
    let cases = [
        (Some((Online, None)), None, Verdict::Ok, "is connected"),
        (Some((Idle, None)), Some(Ok(12)), Verdict::Ok, "took 12 ms"),
        (Some((Idle, None)), None, Verdict::Ok, "no app needs it"),
        (Some((Idle, None)), Some(Err("no route".into())), Verdict::Broken, "no route"),
        (Some((Off, None)), None, Verdict::Note, "roaming"),
        (Some((Waiting, Some("refused"))), None, Verdict::Broken, "refused"),
        (Some((Waiting, Some("wrong token"))), Some(Ok(5)), Verdict::Broken, "wrong token"),
        (Some((Connecting, None)), None, Verdict::Note, "being connected"),
        (None, Some(Ok(7)), Verdict::Ok, "took 7 ms"),
        (None, Some(Err("TLS: wrong name".into())), Verdict::Broken, "TLS: wrong name"),
        (None, None, Verdict::Note, "was not tried"),
    ];
    for (told, tried, verdict, word) in cases {
        let daemon = told.map(|(state, error): (LinkState, Option<&str>)| view::Upstream {
            name: "home".into(),
            kind: "ntfy".into(),
            state,
            since_secs: 1,
            retry_in_secs: None,
            last_error: error.map(str::to_owned),
            registrations: 0,
            heartbeat_secs: None,
            heartbeat_by: None,
        });
        check("upstream:home", verdict, &[word, "home (ntfy)"], |facts| {
            facts.upstreams = Ok(vec![Upstream { name: "home".into(), kind: "ntfy".into(), daemon, tried }]);
        });
    }
}

#[test]
fn apps_are_told_how_they_are_started() {
    let file = |systemd: Option<&str>, exec, user| {
        Ok(Some(ServiceFile { systemd_service: systemd.map(str::to_owned), exec, user }))
    };
    let cases = [
        ("user 1000", file(Some("dino.service"), true, false), Some(true), Verdict::Ok, "dino.service"),
        ("user 1000", file(None, true, false), Some(true), Verdict::Ok, "transient unit"),
        ("user 1000", file(None, false, false), None, Verdict::Broken, "no Exec="),
        ("user 1000", file(None, true, false), Some(false), Verdict::Broken, "ReloadConfig"),
        ("user 1000", Ok(None), Some(false), Verdict::Lacks, "~/.local/share/dbus-1/services/im.dino.Dino.service"),
        ("user 1000", Ok(None), Some(true), Verdict::Note, "was not found"),
        ("user 1000", Err("it is another user's".into()), None, Verdict::Note, "another user's"),
        ("system", file(None, true, false), None, Verdict::Broken, "User="),
        ("system", file(None, true, true), None, Verdict::Ok, "transient unit"),
    ];
    for (bus, file, known_to_bus, verdict, word) in cases {
        check("app:im.dino.Dino", verdict, &[word], |facts| {
            facts.apps = Ok(vec![App { name: "im.dino.Dino".into(), bus: bus.into(), file, known_to_bus }]);
        });
    }
    check("apps", Verdict::Ok, &["no app has registered"], |_| {});
}

#[test]
fn nobody_else_may_manage_the_same_apps() {
    let lomiri = |facts: &mut Facts| facts.machine.as_mut().unwrap().lomiri = Some(9);
    check("lomiri", Verdict::Note, &["observe leaves"], lomiri);
    check("lomiri", Verdict::Broken, &["profile = \"observe\""], |facts| {
        lomiri(facts);
        facts.config = with("profile = \"tombstone\"");
    });
    let waydroid = |action: &str| {
        let action = Some(action.to_owned());
        move |facts: &mut Facts| facts.machine.as_mut().unwrap().waydroid = action
    };
    check("waydroid", Verdict::Note, &["suspend_action = freeze"], waydroid("freeze"));
    check("waydroid", Verdict::Ok, &["does not freeze"], waydroid("stop"));
}
