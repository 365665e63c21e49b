//! A world of its own: a directory, a private bus, a push server on loopback, the daemon, the apps. However the command
//! ends, all of it ends with it.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::TempDir;

use super::{
    cgroups,
    inbox::Inbox,
    processes,
    scripts::{self, AppSpec, cannot_write, quoted, text},
    sockets,
};
use crate::{
    client::{self, Daemon},
    exit::{Exit, Failure},
};

pub(crate) struct World {
    // Dropped first, so that nothing writes below the directory any more when it goes.
    children: Vec<(String, Child)>,
    inbox: Inbox,
    dir: TempDir,
    report_socket: String,
    apps: Vec<AppSpec>,
    names: Vec<String>,
    interrupted: Arc<AtomicBool>,
    server: String,
    port: u16,
    ended: bool,
}

/// What is to be there.
pub(crate) struct Setup {
    /// What the directory's name begins with.
    pub(crate) prefix: &'static str,
    /// Where the directory is made, unless TMPDIR says.
    pub(crate) parent: PathBuf,
    pub(crate) apps: Vec<AppSpec>,
}

/// How the daemon is to be.
pub(crate) struct DaemonSetup<'a> {
    pub(crate) profile: &'a str,
    /// The lines below `[lifecycle]`.
    pub(crate) lifecycle: &'a str,
}

/// An emulated machine takes its time over everything.
const START: Duration = Duration::from_secs(60);
/// The daemon thaws every app before it goes.
const DAEMON_END: Duration = Duration::from_secs(30);
/// More than a wrapped program gets from its wrapper (nightporter-sample --exec).
const END: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);
/// sun_path has 108 bytes; our names below the directory take up to 20.
const LONGEST_DIR: usize = 80;
const LOG_LINES: usize = 15;
/// For the panic hook: the release build aborts on a panic, so no `Drop` runs.
static DIR: Mutex<Option<PathBuf>> = Mutex::new(None);
static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();
/// The daemon's pid, or 0.
static DAEMON: AtomicU32 = AtomicU32::new(0);

impl World {
    pub(crate) fn new(setup: Setup) -> Result<Self, Failure> {
        let interrupted = watch_for_the_end()?;
        let mut parent = env::var_os("TMPDIR").map_or(setup.parent, PathBuf::from);
        if parent.as_os_str().len() > LONGEST_DIR - 30 {
            parent = "/tmp".into();
        }
        let dir = tempfile::Builder::new().prefix(setup.prefix).tempdir_in(&parent).map_err(|error| {
            Failure::new(Exit::CannotCreate, format!("cannot make a directory in {}: {error}", parent.display()))
        })?;
        let report_path = dir.path().join("report");
        let inbox = Inbox::open(&report_path).map_err(|error| Failure::system("cannot listen for reports", error))?;
        *DIR.lock().unwrap_or_else(PoisonError::into_inner) = Some(dir.path().to_owned());
        Ok(Self {
            children: Vec::new(),
            inbox,
            report_socket: text(&report_path)?,
            names: setup.apps.iter().map(|app| app.name.clone()).collect(),
            apps: setup.apps,
            dir,
            interrupted,
            server: String::new(),
            port: 0,
            ended: false,
        })
    }

    /// The apps' names.
    pub(crate) fn apps(&self) -> &[String] {
        &self.names
    }

    pub(crate) const fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    pub(crate) fn report_socket(&self) -> &str {
        &self.report_socket
    }

    /// Set once the user wants to stop.
    pub(crate) fn interrupted(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.interrupted)
    }

    /// The push server's.
    pub(crate) const fn port(&self) -> u16 {
        self.port
    }

    /// Starts the push server. Gives back its process.
    pub(crate) fn start_relay(&mut self) -> Result<u32, Failure> {
        let pid = self.spawn(
            "the push server",
            &beside("nightporter-relay")?,
            ["--memory", "--listen", "127.0.0.1:0"],
            "relay.log",
            |_| {},
        )?;
        self.port = self.wait("the push server to listen", START, |_| Ok(sockets::port_of(pid)))?;
        self.server = format!("ws://127.0.0.1:{}/", self.port);
        Ok(pid)
    }

    /// Uses a push server that runs already instead.
    pub(crate) fn use_server(&mut self, url: &str, port: u16) {
        url.clone_into(&mut self.server);
        self.port = port;
    }

    /// Starts an app on its own.
    pub(crate) fn start_resident(&mut self, app: &str) -> Result<(), Failure> {
        let Some(spec) = self.apps.iter().find(|spec| spec.name == app) else {
            return Err(Failure::new(Exit::Failed, format!("{app} is not one of the apps")));
        };
        let address = self.address()?;
        let more = [("NIGHTPORTER_SAMPLE_SERVER", self.server.as_str()), ("DBUS_SESSION_BUS_ADDRESS", &address)];
        let script = scripts::start(&self.place(), spec, "resident", &spec.resident, &more)?;
        self.spawn(app, Path::new("/bin/sh"), [script.as_os_str()], "apps.log", |_| {}).map(drop)
    }

    /// Starts the private bus, with a file for each app that says how to start it.
    pub(crate) fn start_bus(&mut self) -> Result<(), Failure> {
        let address = self.address()?;
        let services = self.dir.path().join("services");
        fs::create_dir(&services).map_err(|error| cannot_write(&services, &error))?;
        for spec in &self.apps {
            let more = [("DBUS_SESSION_BUS_ADDRESS", address.as_str())];
            let mut script = scripts::start(&self.place(), spec, "shared", &spec.shared, &more)?;
            if let Some(registering) = &spec.registering {
                let first = scripts::start(&self.place(), spec, "registering", registering, &more)?;
                script = scripts::first(&self.place(), spec, &first, &script)?;
            }
            // The bus splits the line itself; the directory is ours and has no spaces unless TMPDIR has.
            let service = format!("[D-BUS Service]\nName={}\nExec=/bin/sh {}\n", spec.name, quoted(&text(&script)?));
            let path = services.join(format!("{}.service", spec.name));
            fs::write(&path, service).map_err(|error| cannot_write(&path, &error))?;
        }
        let config = self.dir.path().join("bus.conf");
        let bus_config = scripts::bus(&address, &text(&services)?);
        fs::write(&config, bus_config).map_err(|error| cannot_write(&config, &error))?;
        let log = self.log("bus.log")?;
        let mut child = Command::new("dbus-daemon")
            .arg("--nofork")
            .arg("--print-address=1")
            .arg(format!("--config-file={}", config.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Failure::new(
                    Exit::Unavailable,
                    "dbus-daemon is not installed; it is needed for the private bus. It is in the package \
                     dbus-daemon (apt install dbus-daemon)",
                ),
                _ => Failure::system("cannot start dbus-daemon", error),
            })?;
        let stdout = child.stdout.take();
        self.children.push(("dbus-daemon".into(), child));
        // The line comes when the bus listens; none comes when it ends first.
        let mut line = String::new();
        match stdout.map(|stdout| BufReader::new(stdout).read_line(&mut line)) {
            Some(Ok(1..)) => Ok(()),
            _ => Err(Failure::new(Exit::Failed, format!("dbus-daemon did not start{}", self.log_end("bus.log")))),
        }
    }

    /// Starts the daemon on the private bus, and connects to it.
    pub(crate) fn start_daemon(&mut self, setup: &DaemonSetup<'_>) -> Result<(Daemon, u32), Failure> {
        let config = self.dir.path().join("nightporter.toml");
        let settings = format!(
            "profile = \"{}\"\n\n[[upstream]]\nname = \"demo\"\nkind = \"autopush\"\nurl = \"{}\"\n\n\
             [limits]\nwakes-per-hour = 3600\n\n[lifecycle]\n{}",
            setup.profile, self.server, setup.lifecycle
        );
        fs::write(&config, settings).map_err(|error| cannot_write(&config, &error))?;
        let state = self.dir.path().join("state");
        fs::create_dir(&state).map_err(|error| cannot_write(&state, &error))?;
        let address = self.address()?;
        let arguments = [
            OsStr::new("--user"),
            OsStr::new("--config"),
            config.as_os_str(),
            OsStr::new("--state-dir"),
            state.as_os_str(),
        ];
        let pid = self.spawn("the daemon", &beside("nightporterd")?, arguments, "daemon.log", |command| {
            // Under systemd we may have a socket of our own caller's; the daemon must not speak for us. Nor must it act
            // on this machine's battery and network, or hold up its sleep.
            command.env("DBUS_SESSION_BUS_ADDRESS", &address).env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent");
            command.env_remove("NOTIFY_SOCKET").env_remove("WATCHDOG_USEC");
        })?;
        DAEMON.store(pid, Ordering::Relaxed);
        let daemon = Daemon::at(&address)?;
        self.wait("the daemon to come up", START, |_| {
            let up = daemon.owned(client::NAME)? && daemon.owned("org.unifiedpush.Distributor.nightporter")?;
            Ok(up.then_some(()))
        })?;
        Ok((daemon, pid))
    }

    /// Looks again and again until `look` has seen what it wants, at most `patience`.
    pub(crate) fn wait<T>(
        &mut self,
        what: &str,
        patience: Duration,
        mut look: impl FnMut(&Self) -> Result<Option<T>, Failure>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(seen) = look(self)? {
                return Ok(seen);
            }
            self.check()?;
            if Instant::now() >= deadline {
                let text = format!("waited {} s for {what}{}", patience.as_secs(), self.logs());
                return Err(Failure::new(Exit::Failed, text));
            }
            thread::sleep(POLL);
        }
    }

    /// Does nothing for a while, unless interrupted.
    pub(crate) fn pause(&self, time: Duration) -> Result<(), Failure> {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            self.check_interrupted()?;
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Fails when the user wants to stop, or a program that should run has ended.
    pub(crate) fn check(&mut self) -> Result<(), Failure> {
        self.check_interrupted()?;
        match self.ended_by_itself() {
            Some(text) => Err(Failure::new(Exit::Failed, text + &self.logs())),
            None => Ok(()),
        }
    }

    /// A program that should run and has ended, as a sentence.
    pub(crate) fn ended_by_itself(&mut self) -> Option<String> {
        self.children.iter_mut().find_map(|(name, child)| {
            let status = child.try_wait().ok().flatten()?;
            Some(format!("{name} ended by itself ({status})"))
        })
    }

    /// Ends these processes of apps. Gives back how many did not take SIGTERM for an answer.
    pub(crate) fn end_processes(&mut self, processes: &[processes::Process]) -> usize {
        let stubborn = processes::end(processes, END);
        self.children.retain_mut(|(_, child)| !matches!(child.try_wait(), Ok(Some(_))));
        stubborn.len()
    }

    /// Ends every app that runs now.
    pub(crate) fn end_apps(&mut self) -> Result<(), Failure> {
        let stubborn = processes::end(&processes::apps(&self.report_socket), END);
        self.children.retain_mut(|(_, child)| !matches!(child.try_wait(), Ok(Some(_))));
        match stubborn.first() {
            Some(process) => Err(Failure::new(Exit::Failed, format!("{} did not end on SIGTERM", process.label()))),
            None => Ok(()),
        }
    }

    /// The ends of the logs, for a message.
    pub(crate) fn logs(&self) -> String {
        ["daemon.log", "relay.log", "apps.log"].map(|log| self.log_end(log)).concat()
    }

    /// Ends all that was started. Fails when something had to be killed or was left frozen.
    pub(crate) fn end(&mut self) -> Result<(), Failure> {
        self.ended = true;
        let mut troubles = end_daemon();
        // Apps that are awake are right to be there; they end like any app at the end of its session.
        troubles.extend(
            processes::end(&processes::apps(&self.report_socket), END)
                .iter()
                .map(|process| format!("{} did not end on SIGTERM", process.label())),
        );
        troubles.extend(
            processes::end(&processes::ours(), END)
                .iter()
                .map(|process| format!("{} did not end on SIGTERM", process.label())),
        );
        for (_, child) in &mut self.children {
            let _ = child.wait();
        }
        troubles.extend(processes::ours().iter().map(|process| format!("{} is still there", process.label())));
        match troubles.is_empty() {
            true => Ok(()),
            false => {
                Err(Failure::new(Exit::Failed, format!("the following was left behind:\n  {}", troubles.join("\n  "))))
            }
        }
    }

    fn place(&self) -> scripts::Place<'_> {
        scripts::Place { dir: self.dir.path(), report_socket: &self.report_socket }
    }

    fn address(&self) -> Result<String, Failure> {
        // Escaped as the D-Bus specification has it for addresses.
        let path = text(&self.dir.path().join("bus"))?;
        let mut address = String::from("unix:path=");
        for byte in path.bytes() {
            match byte {
                b'-' | b'_' | b'/' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => address.push(char::from(byte)),
                other => address.push_str(&format!("%{other:02x}")),
            }
        }
        Ok(address)
    }

    fn spawn<A: AsRef<OsStr>>(
        &mut self,
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
        log: &str,
        more: impl FnOnce(&mut Command),
    ) -> Result<u32, Failure> {
        let log = self.log(log)?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        command.stdout(log.try_clone().map_err(|error| Failure::system("cannot open a log", error))?).stderr(log);
        // Ctrl-C is for us, who then ends the others in the right order.
        command.process_group(0);
        more(&mut command);
        let child =
            command.spawn().map_err(|error| Failure::system(format!("cannot start {}", program.display()), error))?;
        let pid = child.id();
        self.children.push((name.into(), child));
        Ok(pid)
    }

    fn log(&self, name: &str) -> Result<File, Failure> {
        let path = self.dir.path().join(name);
        File::options().append(true).create(true).open(&path).map_err(|error| cannot_write(&path, &error))
    }

    fn log_end(&self, name: &str) -> String {
        let Ok(log) = fs::read(self.dir.path().join(name)) else { return String::new() };
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        if lines.is_empty() {
            return String::new();
        }
        let end = &lines[lines.len().saturating_sub(LOG_LINES)..];
        format!("\n  {name}:\n    {}", end.join("\n    "))
    }

    /// Fails when the user wants to stop.
    pub(crate) fn check_interrupted(&self) -> Result<(), Failure> {
        match self.interrupted.load(Ordering::Relaxed) {
            true => Err(Failure::new(Exit::Interrupted, "interrupted")),
            false => Ok(()),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.end();
        }
    }
}

/// Ends the daemon and checks that it left nothing frozen.
fn end_daemon() -> Vec<String> {
    let pid = DAEMON.swap(0, Ordering::Relaxed);
    let daemon: Vec<_> = processes::ours().into_iter().filter(|process| process.pid == pid).collect();
    if daemon.is_empty() {
        return Vec::new();
    }
    for process in &daemon {
        processes::signal(process, Signal::TERM);
    }
    let mut troubles = Vec::new();
    for process in processes::wait_for_end(&daemon, DAEMON_END) {
        troubles.push(format!("the daemon did not end on SIGTERM within {} s", DAEMON_END.as_secs()));
        processes::signal(&process, Signal::KILL);
    }
    let stopped = processes::ours().into_iter().filter(processes::Process::is_stopped);
    troubles.extend(stopped.map(|process| format!("{} was left frozen", process.label())));
    troubles
}

fn clean_up_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        before(panic);
        end_daemon();
        cgroups::thaw_whatever();
        processes::end(&processes::ours(), END);
        cgroups::release();
        if let Some(dir) = &*DIR.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = fs::remove_dir_all(dir);
        }
    }));
}

/// Becomes the parent of orphans, and gives back what is set once the user wants to stop. What happens once a process.
fn watch_for_the_end() -> Result<Arc<AtomicBool>, Failure> {
    if let Some(interrupted) = INTERRUPTED.get() {
        return Ok(Arc::clone(interrupted));
    }
    processes::leave_who_is_here();
    // Whatever our processes leave behind becomes our child, so that it can be found and ended.
    nix::sys::prctl::set_child_subreaper(true)
        .map_err(|error| Failure::system("cannot become the parent of orphans", error))?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|error| Failure::system("cannot handle signals", error))?;
    }
    clean_up_on_panic();
    Ok(Arc::clone(INTERRUPTED.get_or_init(|| interrupted)))
}

/// A program installed where this one is.
pub(crate) fn beside(name: &str) -> Result<PathBuf, Failure> {
    let own = env::current_exe().map_err(|error| Failure::system("cannot find this program's own path", error))?;
    let path = own.with_file_name(name);
    match path.is_file() {
        true => Ok(path),
        false => Err(Failure::new(
            Exit::Unavailable,
            format!(
                "{} is not there; nightporterd, nightporter-relay and nightporter-sample are needed beside nightporter",
                path.display()
            ),
        )),
    }
}
