//! Everything together.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use nightporter::{sys::clock, view};
use nix::sys::signal::Signal;
use rustls::ServerConfig;
use serde::{Serialize, de::DeserializeOwned};
use tempfile::TempDir;
use zbus::{Connection, DynamicType, Message, block_on};

use super::{
    PATIENCE, Relay,
    app::Client,
    bus::{Behaviour, Daemon as Bus, Ended, connect},
    front::Front,
    processes::{self, is_running},
    reports::{Reports, Seen},
    wait, wait_for,
};

/// Lifecycle times for tests. What is not reached within a test stands at an hour.
pub(crate) const FAST: &str =
    "grace = \"200ms\"\npage-out-after = \"1h\"\ntombstone-after = \"2h\"\nawake-window = \"200ms\"\n";
const BALLAST_KIB: &str = "64";

/// A daemon that starts thaws what dead ones left behind, also those of other tests.
static STARTS: RwLock<()> = RwLock::new(());

/// Keeps other daemons from starting.
pub(crate) fn alone() -> RwLockWriteGuard<'static, ()> {
    STARTS.write().unwrap_or_else(PoisonError::into_inner)
}

/// What a world is made of; the default is a daemon with default settings on a relay in memory.
#[derive(Default)]
pub(crate) struct Setup<'a> {
    /// Lines before the first section, such as the profile.
    pub(crate) top: &'a str,
    /// Lines of the upstream.
    pub(crate) upstream: &'a str,
    /// Lines of `[lifecycle]`.
    pub(crate) lifecycle: &'a str,
    /// Lines of `[limits]`.
    pub(crate) limits: &'a str,
    /// Instead of the relay.
    pub(crate) url: Option<&'a str>,
    /// More arguments of the relay.
    pub(crate) relay: &'a [&'a str],
    /// The relay's state outlives it.
    pub(crate) lasting: bool,
    /// On a bus like the system's instead of a session's, with the policy we ship.
    pub(crate) system: bool,
    /// TLS in front of the relay.
    pub(crate) tls: Option<Arc<ServerConfig>>,
}

pub(crate) struct World {
    daemon: Option<Child>,
    /// Held from the daemon's start until it is up.
    starting: Option<RwLockReadGuard<'static, ()>>,
    children: Vec<Ended>,
    pub(crate) relay: Option<Relay>,
    pub(crate) front: Front,
    bus: Bus,
    system: bool,
    /// What else the daemon finds in its environment.
    pub(crate) environment: Vec<(&'static str, String)>,
    reports: Reports,
    control: Connection,
    relay_arguments: Vec<String>,
    pub(crate) state: PathBuf,
    pub(crate) dir: TempDir,
}

impl World {
    /// With the daemon up.
    pub(crate) fn new(setup: Setup<'_>) -> Self {
        let mut world = Self::without_daemon(setup);
        world.start_daemon();
        world
    }

    pub(crate) fn without_daemon(setup: Setup<'_>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let policy = concat!(env!("CARGO_MANIFEST_DIR"), "/config/dbus-1/system.d/org.nightporter1.conf");
        let bus = match setup.system {
            true => Bus::like_system(&fs::read_to_string(policy).unwrap()),
            false => Bus::new(),
        };
        let front = Front::start(setup.tls.clone());
        let mut relay_arguments = vec!["--public-url".to_owned(), front.public_url()];
        match setup.lasting {
            true => relay_arguments.extend(["--state-dir".to_owned(), text(&dir.path().join("relay"))]),
            false => relay_arguments.push("--memory".to_owned()),
        }
        relay_arguments.extend(setup.relay.iter().map(|argument| (*argument).to_owned()));
        let mut world = Self {
            daemon: None,
            starting: None,
            children: Vec::new(),
            relay: None,
            front,
            system: setup.system,
            environment: Vec::new(),
            reports: Reports::listen(&dir.path().join("report")),
            control: block_on(connect(&bus.address())),
            bus,
            relay_arguments,
            state: dir.path().join("state"),
            dir,
        };
        world.configure(&setup);
        if setup.url.is_none() {
            world.start_relay();
        }
        world
    }

    /// Writes the configuration; it holds from the daemon's next start on.
    pub(crate) fn configure(&self, setup: &Setup<'_>) {
        let url = setup.url.map_or_else(|| self.front.url(), str::to_owned);
        let text = format!(
            "{}\n[[upstream]]\nname = \"home\"\nkind = \"autopush\"\nurl = \"{url}\"\n{}\n[lifecycle]\n{}\n[limits]\n{}\n",
            setup.top, setup.upstream, setup.lifecycle, setup.limits
        );
        fs::write(self.dir.path().join("nightporter.toml"), text).unwrap();
    }

    pub(crate) fn start_relay(&mut self) {
        let arguments: Vec<&str> = self.relay_arguments.iter().map(String::as_str).collect();
        let relay = Relay::start(&arguments);
        self.front.lead_to(&relay.address);
        self.relay = Some(relay);
    }

    /// kill -9.
    pub(crate) fn kill_relay(&mut self) {
        self.relay.take().unwrap().kill();
    }

    pub(crate) fn relay(&self) -> &Relay {
        self.relay.as_ref().unwrap()
    }

    /// Starts the daemon and waits until it serves the bus.
    pub(crate) fn start_daemon(&mut self) {
        self.spawn_daemon();
        self.wait_daemon();
        self.starting = None;
    }

    /// The same for who holds [`alone`].
    pub(crate) fn start_only_daemon(&mut self) {
        self.daemon = Some(self.daemon_command().spawn().unwrap());
        self.wait_daemon();
    }

    fn wait_daemon(&mut self) {
        wait("the daemon to come up", || {
            let child = self.daemon.as_mut().unwrap();
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the daemon ended: {status}\n{}", self.log());
            }
            (self.is_owned("org.nightporter1") && self.is_owned("org.unifiedpush.Distributor.nightporter"))
                .then_some(())
        });
    }

    /// Starts the daemon and does not wait.
    pub(crate) fn spawn_daemon(&mut self) {
        self.starting = None;
        self.starting = Some(STARTS.read().unwrap_or_else(PoisonError::into_inner));
        let child = self.daemon_command().spawn().unwrap();
        self.daemon = Some(child);
    }

    /// The daemon's command in this world.
    pub(crate) fn daemon_command(&self) -> Command {
        let log = File::options().append(true).create(true).open(self.dir.path().join("daemon.log")).unwrap();
        let mut command = nightporterd();
        command.arg("--config").arg(self.dir.path().join("nightporter.toml")).arg("--state-dir").arg(&self.state);
        command.args((!self.system).then_some("--user")).env(self.bus_variable(), self.bus.address());
        command.env("XDG_DATA_HOME", self.dir.path().join("share"));
        command.envs(self.environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command
    }

    pub(crate) fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// Whether it has not ended by itself.
    pub(crate) fn daemon_lives(&mut self) -> bool {
        self.daemon.as_mut().unwrap().try_wait().unwrap().is_none()
    }

    /// kill -9.
    pub(crate) fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// SIGTERM.
    pub(crate) fn stop_daemon(&mut self) -> ExitStatus {
        let mut daemon = self.daemon.take().unwrap();
        processes::signal(daemon.id(), Signal::SIGTERM);
        wait("the daemon to end on SIGTERM", || daemon.try_wait().unwrap())
    }

    /// All the daemon has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    /// `nightporter` with these arguments.
    pub(crate) fn cli(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nightporter"));
        command.arg(if self.system { "--system" } else { "--user" }).args(arguments);
        command.env(self.bus_variable(), self.bus.address());
        command.env("no_proxy", "127.0.0.1").output().unwrap()
    }

    /// A document of the manager.
    pub(crate) fn ask<T: DeserializeOwned>(&self, member: &str, app: Option<&str>) -> T {
        let (name, path, interface) = ("org.nightporter1", "/org/nightporter1", "org.nightporter1.Manager");
        let reply = match app {
            Some(app) => block_on(self.control.call_method(Some(name), path, Some(interface), member, &app)),
            None => block_on(self.control.call_method(Some(name), path, Some(interface), member, &())),
        };
        serde_json::from_str(reply.unwrap().body().deserialize().unwrap()).unwrap()
    }

    pub(crate) fn status(&self) -> view::Status {
        self.ask("Status", None)
    }

    pub(crate) fn show(&self, app: &str) -> view::Show {
        self.ask("Show", Some(app))
    }

    pub(crate) fn why(&self, app: &str) -> view::Why {
        self.ask("Why", Some(app))
    }

    /// Whether this was decided about the app, with a reason in which these words are.
    pub(crate) fn decided(&self, app: &str, verdict: &str, words: &str) -> bool {
        self.why(app).decisions.iter().any(|decision| decision.verdict == verdict && decision.reason.contains(words))
    }

    pub(crate) fn wait_state(&self, app: &str, state: &str) -> view::Show {
        wait(&format!("{app} to be {state}"), || {
            let show = self.show(app);
            (show.app.state == state).then_some(show)
        })
    }

    /// An app of this process.
    pub(crate) fn client(&self, name: &str, behaviour: Behaviour) -> Client {
        Client::start(&self.bus.address(), Some(name), behaviour)
    }

    /// The same with only its unique name.
    pub(crate) fn nameless(&self) -> Client {
        Client::start(&self.bus.address(), None, Behaviour::Accept)
    }

    /// Makes a sample app that the bus can start; a second time it changes how it behaves from its next start on.
    pub(crate) fn install(&self, app: &str, fault: &str) {
        self.install_with(app, fault, BALLAST_KIB);
    }

    /// A sample that listens and saves its state (docs/lifecycle.md).
    pub(crate) fn install_listener(&self, app: &str, fault: &str) {
        self.install_sample(app, fault, BALLAST_KIB, &["NIGHTPORTER_SAMPLE_LISTEN=1"]);
    }

    pub(crate) fn install_with(&self, app: &str, fault: &str, ballast: &str) {
        self.install_sample(app, fault, ballast, &[]);
    }

    fn install_sample(&self, app: &str, fault: &str, ballast: &str, more: &[&str]) {
        let environment = self.sample_environment(app, fault, ballast).into_iter();
        let mut environment: Vec<String> = environment.map(|(name, value)| format!("{name}={value}")).collect();
        environment.extend(more.iter().map(|entry| (*entry).to_owned()));
        let sample = env!("CARGO_BIN_EXE_nightporter-sample");
        let dir = text(self.dir.path());
        self.install_command(app, &format!("/usr/bin/env -C {dir} {} {sample}", environment.join(" ")));
    }

    /// Makes any program an app that the bus can start.
    pub(crate) fn install_command(&self, app: &str, command: &str) {
        self.bus.service(app, &format!("Exec={command}"));
        self.ask_bus("ReloadConfig", &());
    }

    /// Makes a program an app that the bus can start: a line for the shell that ends in `exec`, whose output is kept. It ends
    /// with this world.
    pub(crate) fn install_program(&self, app: &str, line: &str) -> PathBuf {
        let output = self.dir.path().join(format!("{app}.out"));
        let script = self.dir.path().join(format!("{app}.sh"));
        let (report, address) = (self.report_path(), self.bus.address());
        let text = format!(
            "export NIGHTPORTER_SAMPLE_REPORT='{report}' DBUS_SESSION_BUS_ADDRESS='{address}'\n{line} >>'{}' 2>&1\n",
            text(&output)
        );
        fs::write(&script, text).unwrap();
        self.install_command(app, &format!("/bin/sh {}", script.display()));
        output
    }

    /// Starts an app that is installed, as the user does.
    pub(crate) fn launch(&self, app: &str) {
        self.ask_bus("StartServiceByName", &(app, 0_u32));
    }

    /// Where the bus is.
    pub(crate) fn bus_address(&self) -> String {
        self.bus.address()
    }

    /// Installs and starts apps, and waits until they are registered.
    pub(crate) fn samples(&self, apps: &[(&str, &str)]) {
        for (app, fault) in apps {
            self.install(app, fault);
            self.launch(app);
        }
        for (app, _) in apps {
            self.wait_ready(app);
        }
    }

    /// Starts an app that the bus cannot start.
    pub(crate) fn spawn(&mut self, app: &str, fault: &str) -> u32 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nightporter-sample"));
        command.envs(self.sample_environment(app, fault, BALLAST_KIB)).current_dir(self.dir.path());
        command.env("DBUS_SESSION_BUS_ADDRESS", self.bus.address()).stdin(Stdio::null());
        let child = command.spawn().unwrap();
        let pid = child.id();
        self.children.push(Ended(child));
        pid
    }

    pub(crate) fn wait_ready(&self, app: &str) {
        wait(&format!("{app} to be registered"), || {
            (self.reports.count(app, "ready") > 0 && self.reports.endpoint(app).is_some()).then_some(())
        });
    }

    /// Times the app has come up.
    pub(crate) fn starts(&self, app: &str) -> usize {
        self.reports.count(app, "ready")
    }

    /// NewEndpoints the app got.
    pub(crate) fn endpoints_told(&self, app: &str) -> usize {
        self.reports.count(app, "endpoint")
    }

    pub(crate) fn endpoint(&self, app: &str) -> String {
        self.reports.endpoint(app).unwrap()
    }

    pub(crate) fn pid(&self, app: &str) -> u32 {
        self.ask_bus("GetConnectionUnixProcessID", &app).body().deserialize().unwrap()
    }

    pub(crate) fn is_owned(&self, service: &str) -> bool {
        self.ask_bus("NameHasOwner", &service).body().deserialize().unwrap()
    }

    fn ask_bus<B: Serialize + DynamicType + Sync>(&self, member: &str, body: &B) -> Message {
        let (name, path) = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
        block_on(self.control.call_method(Some(name), path, Some(name), member, body)).unwrap()
    }

    /// The bus ends, and every app on it loses its connection.
    pub(crate) fn stop_bus(&mut self) {
        self.bus.stop();
    }

    pub(crate) fn start_bus(&mut self) {
        self.bus.start();
        self.control = block_on(connect(&self.bus.address()));
    }

    /// Sends to a sample app; gives back the message's resource.
    pub(crate) fn post(&self, app: &str, body: &str) -> String {
        self.post_with(app, &[("TTL", "600")], body)
    }

    pub(crate) fn post_with(&self, app: &str, headers: &[(&str, &str)], body: &str) -> String {
        self.post_to(&self.endpoint(app), headers, body)
    }

    pub(crate) fn post_to(&self, endpoint: &str, headers: &[(&str, &str)], body: &str) -> String {
        let response = self.relay().post(endpoint, headers, body.as_bytes());
        assert_eq!(response.status, 201, "{response:?}");
        response.header("location").unwrap().to_owned()
    }

    /// Whether the relay has handed the message over for good. What it still has, it loses by this.
    pub(crate) fn is_acked(&self, location: &str) -> bool {
        self.relay().delete(location) == 404
    }

    /// What the app has reported under this name, in order.
    pub(crate) fn reported(&self, app: &str, event: &str) -> Vec<serde_json::Value> {
        self.reports.all(app, event)
    }

    pub(crate) fn seen(&self, app: &str) -> Vec<Seen> {
        self.reports.seen(app)
    }

    pub(crate) fn bodies(&self, app: &str) -> Vec<String> {
        self.seen(app).into_iter().map(|seen| seen.body).collect()
    }

    /// Waits until the app has seen exactly these, in this order.
    pub(crate) fn expect(&self, app: &str, bodies: &[&str]) {
        if wait_for(PATIENCE, || (self.bodies(app).len() >= bodies.len()).then_some(())).is_none() {
            panic!("{app} has seen {:?}, not {bodies:?}", self.bodies(app));
        }
        assert_eq!(self.bodies(app), bodies);
    }

    /// Sends, waits until the app has it, and gives back how long that took.
    pub(crate) fn round_trip(&self, app: &str, body: &str) -> Duration {
        let sent = clock::boot();
        self.post(app, body);
        let seen = wait(&format!("{app} to see {body}"), || self.seen(app).into_iter().find(|seen| seen.body == body));
        Duration::from_nanos(seen.at_nanos - sent.as_nanos())
    }

    fn sample_environment(&self, app: &str, fault: &str, ballast: &str) -> Vec<(&'static str, String)> {
        vec![
            ("NIGHTPORTER_SAMPLE_NAME", app.to_owned()),
            ("NIGHTPORTER_SAMPLE_MODE", "shared".to_owned()),
            ("NIGHTPORTER_SAMPLE_REPORT", self.report_path()),
            ("NIGHTPORTER_SAMPLE_BALLAST_KIB", ballast.to_owned()),
            ("NIGHTPORTER_SAMPLE_FAULT", fault.to_owned()),
            ("DBUS_SESSION_BUS_ADDRESS", self.bus.address()),
        ]
    }

    fn bus_variable(&self) -> &'static str {
        if self.system { "DBUS_SYSTEM_BUS_ADDRESS" } else { "DBUS_SESSION_BUS_ADDRESS" }
    }

    fn report_path(&self) -> String {
        text(&self.dir.path().join("report"))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            if daemon.try_wait().is_ok_and(|status| status.is_none()) {
                processes::signal(daemon.id(), Signal::SIGTERM);
            }
            let until = Instant::now() + Duration::from_secs(8);
            while matches!(daemon.try_wait(), Ok(None)) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = (daemon.kill(), daemon.wait());
        }
        let apps = processes::with_environment(&format!("NIGHTPORTER_SAMPLE_REPORT={}", self.report_path()));
        for pid in apps.into_iter().filter(|pid| is_running(*pid)) {
            processes::signal(pid, Signal::SIGKILL);
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("the daemon's log:\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }
}

/// The daemon's program, with a clean environment around it.
pub(crate) fn nightporterd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nightporterd"));
    for variable in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "STATE_DIRECTORY", "RUNTIME_DIRECTORY", "CREDENTIALS_DIRECTORY"]
    {
        command.env_remove(variable);
    }
    // What this machine is in, and its sleep, are none of a test's business.
    command.env("NIGHTPORTER_LOG", "debug").env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent");
    command
}

/// The standard error output of a program.
pub(crate) fn of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}
