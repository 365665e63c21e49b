//! The demo's world: a directory of its own, a private bus, a push server on loopback, the daemon, the apps. However the
//! demo ends, all of it ends with it.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::TempDir;

use super::{inbox::Inbox, measure, processes};
use crate::{
    args::Demo,
    client::{self, Daemon},
    exit::{Exit, Failure},
};

pub(super) struct World {
    // Dropped first, so that nothing writes below the directory any more when it goes.
    children: Vec<(String, Child)>,
    inbox: Inbox,
    dir: TempDir,
    report_socket: String,
    apps: Vec<String>,
    app_command: String,
    interrupted: Arc<AtomicBool>,
    port: u16,
    ended: bool,
}

const START: Duration = Duration::from_secs(15);
/// The daemon thaws every app before it goes.
const DAEMON_END: Duration = Duration::from_secs(10);
const END: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(5);
/// sun_path has 108 bytes; our names below the directory take up to 20.
const LONGEST_DIR: usize = 80;
const LOG_LINES: usize = 15;
/// Little for a chat app, and as much as makes paging out worth while (design.md: 8 MiB).
const BALLAST_KIB: u64 = 8192;

/// For the panic hook: the release build aborts on a panic, so no `Drop` runs.
static DIR: OnceLock<PathBuf> = OnceLock::new();
/// The daemon's pid, or 0.
static DAEMON: AtomicU32 = AtomicU32::new(0);

impl World {
    pub(super) fn new(args: &Demo) -> Result<Self, Failure> {
        // Whatever our processes leave behind becomes our child, so that it can be found and ended.
        nix::sys::prctl::set_child_subreaper(true)
            .map_err(|error| Failure::system("cannot become the parent of orphans", error))?;
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))
                .map_err(|error| Failure::system("cannot handle signals", error))?;
        }
        let mut parent = env::temp_dir();
        if parent.as_os_str().len() > LONGEST_DIR - 30 {
            parent = "/tmp".into();
        }
        let dir = tempfile::Builder::new().prefix("nightporter-demo-").tempdir_in(&parent).map_err(|error| {
            Failure::new(Exit::CannotCreate, format!("cannot make a directory in {}: {error}", parent.display()))
        })?;
        let report_path = dir.path().join("report");
        let inbox = Inbox::open(&report_path).map_err(|error| Failure::system("cannot listen for reports", error))?;
        if DIR.set(dir.path().to_owned()).is_ok() {
            clean_up_on_panic();
        }
        Ok(Self {
            children: Vec::new(),
            inbox,
            report_socket: text(&report_path)?,
            apps: (1..=args.apps).map(|n| format!("org.nightporter.Sample{n}")).collect(),
            app_command: match &args.app_command {
                Some(command) => command.clone(),
                None => quoted(&text(&beside("nightporter-sample")?)?),
            },
            dir,
            interrupted,
            port: 0,
            ended: false,
        })
    }

    pub(super) fn apps(&self) -> &[String] {
        &self.apps
    }

    pub(super) const fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    pub(super) fn report_socket(&self) -> &str {
        &self.report_socket
    }

    /// Set once the user wants to stop.
    pub(super) fn interrupted(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.interrupted)
    }

    /// The push server's.
    pub(super) const fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn start_relay(&mut self) -> Result<(), Failure> {
        let pid = self.spawn(
            "the push server",
            &beside("nightporter-relay")?,
            ["--memory", "--listen", "127.0.0.1:0"],
            "relay.log",
            |_| {},
        )?;
        self.port = self.wait("the push server to listen", START, |_| Ok(measure::port_of(pid)))?;
        Ok(())
    }

    /// Starts an app on its own.
    pub(super) fn start_resident(&mut self, app: &str) -> Result<(), Failure> {
        let server = format!("ws://127.0.0.1:{}/", self.port);
        let script = self.write_start(app, "resident", &[("NIGHTPORTER_SAMPLE_SERVER", &server)])?;
        self.spawn(app, Path::new("/bin/sh"), [script.as_os_str()], "apps.log", |_| {}).map(drop)
    }

    /// Starts the private bus, with a file for each app that says how to start it.
    pub(super) fn start_bus(&mut self) -> Result<(), Failure> {
        let address = self.address()?;
        let services = self.dir.path().join("services");
        fs::create_dir(&services).map_err(|error| cannot_write(&services, &error))?;
        for app in self.apps.clone() {
            let script = self.write_start(&app, "shared", &[("DBUS_SESSION_BUS_ADDRESS", &address)])?;
            // The bus splits the line itself; the directory is ours and has no spaces unless TMPDIR has.
            let service = format!("[D-BUS Service]\nName={app}\nExec=/bin/sh {}\n", quoted(&text(&script)?));
            let path = services.join(format!("{app}.service"));
            fs::write(&path, service).map_err(|error| cannot_write(&path, &error))?;
        }
        let config = self.dir.path().join("bus.conf");
        let bus_config = bus_config(&xml(&address), &xml(&text(&services)?));
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
                    "dbus-daemon is not installed; the demo needs it for its private bus. It is in the package \
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
    pub(super) fn start_daemon(&mut self, lifecycle: &str) -> Result<(Daemon, u32), Failure> {
        let config = self.dir.path().join("nightporter.toml");
        let settings = format!(
            "profile = \"tombstone\"\n\n[[upstream]]\nname = \"demo\"\nkind = \"autopush\"\n\
             url = \"ws://127.0.0.1:{}/\"\n\n[lifecycle]\n{lifecycle}",
            self.port
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
    pub(super) fn wait<T>(
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
    pub(super) fn pause(&self, time: Duration) -> Result<(), Failure> {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            self.check_interrupted()?;
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Fails when the user wants to stop, or a program that should run has ended.
    pub(super) fn check(&mut self) -> Result<(), Failure> {
        self.check_interrupted()?;
        for (name, child) in &mut self.children {
            if let Ok(Some(status)) = child.try_wait() {
                let text = format!("{name} ended by itself ({status})");
                return Err(Failure::new(Exit::Failed, text + &self.logs()));
            }
        }
        Ok(())
    }

    /// Ends every app that runs now.
    pub(super) fn end_apps(&mut self) -> Result<(), Failure> {
        let stubborn = processes::end(&processes::apps(&self.report_socket), END);
        self.children.retain_mut(|(_, child)| !matches!(child.try_wait(), Ok(Some(_))));
        match stubborn.first() {
            Some(process) => Err(Failure::new(Exit::Failed, format!("{} did not end on SIGTERM", process.label()))),
            None => Ok(()),
        }
    }

    /// The ends of the logs, for a message.
    pub(super) fn logs(&self) -> String {
        ["daemon.log", "relay.log", "apps.log"].map(|log| self.log_end(log)).concat()
    }

    /// Ends all that was started. Fails when something had to be killed or was left frozen.
    pub(super) fn end(&mut self) -> Result<(), Failure> {
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
            false => Err(Failure::new(Exit::Failed, format!("the demo was left with:\n  {}", troubles.join("\n  ")))),
        }
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

    /// Writes the script that starts an app: the same contract in both halves.
    fn write_start(&self, app: &str, mode: &str, more: &[(&str, &str)]) -> Result<PathBuf, Failure> {
        let mut script = String::new();
        if let Ok(dir) = env::current_dir() {
            script.push_str(&format!("cd {} || exit\n", quoted(&text(&dir)?)));
        }
        let ballast = ballast_kib().to_string();
        let own = [
            ("NIGHTPORTER_SAMPLE_BALLAST_KIB", ballast.as_str()),
            ("NIGHTPORTER_SAMPLE_NAME", app),
            ("NIGHTPORTER_SAMPLE_MODE", mode),
            ("NIGHTPORTER_SAMPLE_REPORT", &self.report_socket),
        ];
        for (name, value) in own.iter().chain(more) {
            script.push_str(&format!("export {name}={}\n", quoted(value)));
        }
        // The log is given here because the bus starts apps with its own.
        script.push_str(&format!(
            "exec {} 2>>{}\n",
            self.app_command,
            quoted(&text(&self.dir.path().join("apps.log"))?)
        ));
        let path = self.dir.path().join(format!("{app}.{mode}.sh"));
        fs::write(&path, script).map_err(|error| cannot_write(&path, &error))?;
        Ok(path)
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
        // Ctrl-C is for the demo, which then ends the others in the right order.
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
    pub(super) fn check_interrupted(&self) -> Result<(), Failure> {
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
        processes::end(&processes::ours(), END);
        if let Some(dir) = DIR.get() {
            let _ = fs::remove_dir_all(dir);
        }
    }));
}

/// How much history each app is told to hold.
pub(super) fn ballast_kib() -> u64 {
    env::var("NIGHTPORTER_SAMPLE_BALLAST_KIB").ok().and_then(|kib| kib.parse().ok()).unwrap_or(BALLAST_KIB)
}

/// A program installed where this one is.
fn beside(name: &str) -> Result<PathBuf, Failure> {
    let own = env::current_exe().map_err(|error| Failure::system("cannot find this program's own path", error))?;
    let path = own.with_file_name(name);
    match path.is_file() {
        true => Ok(path),
        false => Err(Failure::new(
            Exit::Unavailable,
            format!(
                "{} is not there; the demo needs nightporterd, nightporter-relay and nightporter-sample",
                path.display()
            ),
        )),
    }
}

fn bus_config(address: &str, services: &str) -> String {
    format!(
        r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>{address}</listen>
  <auth>EXTERNAL</auth>
  <servicedir>{services}</servicedir>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
  <limit name="max_connections_per_user">4096</limit>
  <limit name="max_pending_service_starts">4096</limit>
</busconfig>
"#
    )
}

fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    Failure::new(Exit::CannotCreate, format!("cannot write {}: {error}", path.display()))
}

fn text(path: &Path) -> Result<String, Failure> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::new(Exit::Data, format!("the path {} is not UTF-8", path.display())))
}

/// Quoted for sh, and for the bus, which splits `Exec=` the same way.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shell_gets_stays_one_word() {
        assert_eq!(quoted("/tmp/it's here"), r"'/tmp/it'\''s here'");
        assert_eq!(xml("a<b>&c"), "a&lt;b&gt;&amp;c");
    }
}
