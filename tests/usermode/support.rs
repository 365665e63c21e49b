//! One user's session: home, runtime directory, bus, cgroups, daemon and apps, all with that user's rights.

#[path = "../support/patience.rs"]
mod patience;

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{self, Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::{
    processes::{self, is_running},
    relay::Relay,
    reports::Reports,
};

use self::patience::PATIENCE;
pub(crate) use self::patience::wait;

const LIFECYCLE: &str =
    "grace = \"200ms\"\npage-out-after = \"1h\"\ntombstone-after = \"2h\"\nawake-window = \"200ms\"\n";
/// What the user's systemd does for an app, with the user's rights; and a child of the app that does not end when asked.
const SCOPE: &str = r#"#!/bin/sh
set -e
scope="$1/app-$2-$$.scope"
mkdir "$scope"
echo 0 >"$scope/cgroup.procs"
shift 2
(trap '' TERM && exec sleep 1000) &
exec "$@"
"#;
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Which cgroups the session runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cgroups {
    /// Below one that is the user's, as `user@.service` is (`Delegate=`).
    Delegated,
    /// The test's own, which the user may not write.
    NotOurs,
}

/// Everything; it ends with this.
pub(crate) struct Session {
    pub(crate) uid: u32,
    daemon: Option<Child>,
    bus: Option<Child>,
    relay: Relay,
    reports: Reports,
    /// The user's `user@.service`.
    pub(crate) manager: Option<PathBuf>,
    dir: TempDir,
}

impl Session {
    /// Without the daemon.
    pub(crate) fn new(uid: u32, cgroups: Cgroups) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test must run as root");
        let dir = tempfile::tempdir().unwrap();
        open_to_all(dir.path(), 0o755);
        for program in [
            env!("CARGO_BIN_EXE_nightporter-sample"),
            env!("CARGO_BIN_EXE_nightporter"),
            env!("CARGO_BIN_EXE_nightporterd"),
        ] {
            // The user cannot go where the build is, perhaps.
            let copy = dir.path().join(Path::new(program).file_name().unwrap());
            fs::hard_link(program, &copy).or_else(|_| fs::copy(program, &copy).map(drop)).unwrap();
        }
        let scope = dir.path().join("scope");
        fs::write(&scope, SCOPE).unwrap();
        open_to_all(&scope, 0o755);
        let report = dir.path().join("report");
        let reports = Reports::listen(&report);
        open_to_all(&report, 0o666);
        let manager = (cgroups == Cgroups::Delegated).then(|| delegate(uid));
        let relay = Relay::in_memory(&[]);
        let session = Self { uid, daemon: None, bus: None, relay, reports, manager, dir };
        for name in ["home", "run"] {
            let path = session.path(name);
            fs::create_dir(&path).unwrap();
            open_to_all(&path, 0o700);
            chown(&path, Some(uid), Some(uid)).unwrap();
        }
        // From here on everything is made by the user.
        session.sh("mkdir -p ~/.config/nightporter ~/.local/share/dbus-1/services");
        let config = format!(
            "profile = \"tombstone\"\n[[upstream]]\nname = \"home\"\nkind = \"autopush\"\nurl = \"ws://{}/\"\n[lifecycle]\n{LIFECYCLE}",
            session.relay.address
        );
        fs::write(session.path("home/.config/nightporter/nightporter.toml"), config).unwrap();
        if let Some(manager) = &session.manager {
            session.sh(&format!(
                "cd {} && mkdir -p app.slice session.slice/dbus.service session.slice/nightporterd.service",
                manager.display()
            ));
        }
        let mut session = session;
        session.start_bus();
        session
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A program run by the user, in the unit's cgroup where the session has cgroups.
    pub(crate) fn run(&self, unit: Option<&str>, program: impl AsRef<OsStr>) -> Command {
        let mut command = match (unit, &self.manager) {
            (Some(unit), Some(manager)) => {
                let mut command = Command::new("sh");
                command.args(["-c", "echo 0 >\"$0/cgroup.procs\" && exec \"$@\""]);
                command.arg(manager.join("session.slice").join(unit)).arg("setpriv");
                command
            }
            _ => Command::new("setpriv"),
        };
        let uid = self.uid.to_string();
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--no-new-privs", "--"]).arg(program);
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", self.path("home"));
        command.env("XDG_RUNTIME_DIR", self.path("run")).env("DBUS_SESSION_BUS_ADDRESS", self.bus_address());
        // dbus-daemon takes the home directory of passwd(5), not of the environment.
        command.env("XDG_DATA_HOME", self.path("home/.local/share"));
        command.env("XDG_DATA_DIRS", "/nonexistent").env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent");
        command.env("NIGHTPORTER_LOG", "debug").env("no_proxy", "127.0.0.1").current_dir("/").stdin(Stdio::null());
        command
    }

    pub(crate) fn sh(&self, script: &str) {
        let output = self.run(None, "sh").args(["-ec", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
    }

    pub(crate) fn bus_address(&self) -> String {
        format!("unix:path={}", self.path("run/bus").display())
    }

    fn start_bus(&mut self) {
        let mut command = self.run(Some("dbus.service"), "dbus-daemon");
        command.args(["--session", "--nofork", "--nopidfile", "--address", &self.bus_address()]);
        self.bus = Some(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        wait("the session bus", || self.path("run/bus").exists().then_some(()));
    }

    /// As the user unit starts it, and waits until it has its names.
    pub(crate) fn start_daemon(&mut self) {
        let log = File::options().append(true).create(true).open(self.path("daemon.log")).unwrap();
        let mut command = self.run(Some("nightporterd.service"), self.path("nightporterd"));
        command.arg("--user").stdout(log.try_clone().unwrap()).stderr(log);
        let mut daemon = command.spawn().unwrap();
        wait("the daemon", || {
            assert_eq!(daemon.try_wait().unwrap(), None, "{}", self.log());
            self.ask_bus("NameHasOwner", &["string:org.nightporter1"]).contains("true").then_some(())
        });
        self.daemon = Some(daemon);
    }

    pub(crate) fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// kill -9.
    pub(crate) fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// SIGTERM.
    pub(crate) fn stop_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        processes::signal(daemon.id(), Signal::SIGTERM);
        let status = wait("the daemon's end", || daemon.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("daemon.log")).unwrap_or_default()
    }

    /// `nightporter`, by the user.
    pub(crate) fn nightporter(&self, arguments: &[&str]) -> Output {
        self.run(None, self.path("nightporter")).args(arguments).output().unwrap()
    }

    /// `nightporterd` for something else than serving.
    pub(crate) fn nightporterd(&self, arguments: &[&str]) -> Output {
        self.run(None, self.path("nightporterd")).args(arguments).output().unwrap()
    }

    pub(crate) fn send(&self, to: &str, path: &str, method: &str, arguments: &[&str]) -> String {
        let mut command = self.run(None, "dbus-send");
        command.args(["--print-reply=literal", &format!("--bus={}", self.bus_address())]);
        let output = command.arg(format!("--dest={to}")).args([path, method]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{method}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(crate) fn ask_bus(&self, method: &str, arguments: &[&str]) -> String {
        let (bus, path) = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
        self.send(bus, path, &format!("org.freedesktop.DBus.{method}"), arguments)
    }

    /// What the shell says of an app nobody looks at.
    pub(crate) fn background(&self, app: &str) {
        self.say(app, "background");
    }

    /// What the shell says of an app.
    pub(crate) fn say(&self, app: &str, state: &str) {
        let arguments = [&*format!("string:{app}"), &format!("string:{state}")];
        self.send("org.nightporter1", "/org/nightporter1", "org.nightporter1.App.SetStateOf", &arguments);
    }

    /// Makes a sample app that the bus can start, with 64 KiB of chat history.
    pub(crate) fn install(&self, app: &str) {
        let scope = self
            .manager
            .as_ref()
            .map(|manager| format!("{} {} {app} ", self.path("scope").display(), manager.join("app.slice").display()));
        let exec = format!(
            "{}/usr/bin/env NIGHTPORTER_SAMPLE_NAME={app} NIGHTPORTER_SAMPLE_MODE=shared \
             NIGHTPORTER_SAMPLE_BALLAST_KIB=64 {} {}",
            scope.unwrap_or_default(),
            self.report_variable(),
            self.path("nightporter-sample").display()
        );
        let text = format!("[D-BUS Service]\nName={app}\nExec={exec}\n");
        fs::write(self.path(&format!("home/.local/share/dbus-1/services/{app}.service")), text).unwrap();
        self.ask_bus("ReloadConfig", &[]);
    }

    pub(crate) fn report_variable(&self) -> String {
        format!("NIGHTPORTER_SAMPLE_REPORT={}", self.path("report").display())
    }

    /// Starts an app and waits until it is registered; its endpoint.
    pub(crate) fn launch(&self, app: &str) -> String {
        self.ask_bus("StartServiceByName", &[&format!("string:{app}"), "uint32:0"]);
        wait(&format!("{app}'s registration"), || {
            (self.reports.count(app, "ready") > 0).then(|| self.reports.endpoint(app)).flatten()
        })
    }

    /// The app's process, as the bus knows it.
    pub(crate) fn pid(&self, app: &str) -> u32 {
        let answer = self.ask_bus("GetConnectionUnixProcessID", &[&format!("string:{app}")]);
        answer.rsplit(' ').next().unwrap().parse().unwrap()
    }

    pub(crate) fn post(&self, endpoint: &str, body: &str) {
        let response = self.relay.post(endpoint, &[("TTL", "600")], body.as_bytes());
        assert_eq!(response.status, 201, "{response:?}");
    }

    /// Waits until the app has seen these messages; it must have seen no others. One may have come again, with the same
    /// id, after the daemon was killed.
    pub(crate) fn expect(&self, app: &str, bodies: &[&str]) {
        let seen = || -> Vec<String> {
            let mut ids = HashSet::new();
            let seen = self.reports.seen(app).into_iter().filter(|seen| ids.insert(seen.id.clone()));
            seen.map(|seen| seen.body).collect()
        };
        wait(&format!("{bodies:?}"), || (seen().len() >= bodies.len()).then_some(()));
        assert_eq!(seen(), bodies);
    }

    /// The directory of the cgroup a process is in.
    pub(crate) fn cgroup_of(&self, pid: u32) -> PathBuf {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let path = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
        mount().join(path)
    }

    /// By `cgroup.freeze`, confirmed by the kernel.
    pub(crate) fn is_frozen(&self, cgroup: &Path) -> bool {
        let read = |name| fs::read_to_string(cgroup.join(name)).unwrap();
        read("cgroup.freeze").trim() == "1" && read("cgroup.events").lines().any(|line| line == "frozen 1")
    }

    pub(crate) fn is_empty(&self, cgroup: &Path) -> bool {
        fs::read_to_string(cgroup.join("cgroup.procs")).unwrap().is_empty()
    }

    /// The database is where XDG says, for the user's eyes only, and no record of frozen apps is left.
    pub(crate) fn finds_its_files(&self) {
        let state = self.path("home/.local/state/nightporter");
        let mode = |path: &Path| fs::metadata(path).map(|at| (at.uid(), at.mode() & 0o77)).unwrap();
        assert_eq!(mode(&state), (self.uid, 0));
        assert_eq!(mode(&state.join("nightporter.db")), (self.uid, 0));
        assert!(!self.path("run/nightporter/frozen").exists());
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for child in [&mut self.daemon, &mut self.bus].into_iter().flatten() {
            let _ = (child.kill(), child.wait());
        }
        for pid in processes::with_environment(&self.report_variable()).into_iter().filter(|pid| is_running(*pid)) {
            processes::signal(pid, Signal::SIGKILL);
        }
        if let Some(top) = self.manager.as_ref().and_then(|manager| manager.parent()) {
            // Frozen processes die of it as well.
            let _ = fs::write(top.join("cgroup.kill"), "1");
            let until = Instant::now() + PATIENCE;
            while remove(top).is_err() && Instant::now() < until {
                thread::sleep(Duration::from_millis(5));
            }
        }
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("the daemon's log:\n{}", lines[lines.len().saturating_sub(80)..].join("\n"));
        }
    }
}

/// A `user@UID.service` with what systemd gives to the user in it, in a slice of its own.
fn delegate(uid: u32) -> PathBuf {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let manager = mount().join(format!("usermode-test-{}-{number}.slice/user@{uid}.service", process::id()));
    fs::create_dir_all(&manager).unwrap();
    for name in [".", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
        chown(manager.join(name), Some(uid), Some(uid)).unwrap();
    }
    manager
}

fn remove(cgroup: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(cgroup)?.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove(&entry.path())?;
    }
    fs::remove_dir(cgroup)
}

pub(crate) fn mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("this test needs cgroup v2");
    PathBuf::from(mount.split(' ').nth(4).unwrap())
}

pub(crate) fn open_to_all(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}
