//! A machine with several users: a system bus with a stand-in for logind, a real session bus for each user under that
//! user's uid with the rules every distribution ships, and the system's daemon.

#[path = "../support/patience.rs"]
mod patience;

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{PermissionsExt, chown},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use futures_core::Stream;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use zbus::{Connection, Message, MessageStream, ObjectPath, Variant, connection::Builder, message::Type};

use crate::{
    processes::{self, is_running},
    relay::Relay,
    reports::Reports,
    services::Daemon as SystemBus,
};

use self::patience::PATIENCE;
pub(crate) use self::patience::wait;

/// Everything; it ends with this.
pub(crate) struct Machine {
    daemon: Option<Child>,
    users: Vec<User>,
    pub(crate) logind: Logind,
    pub(crate) relay: Relay,
    system: SystemBus,
    dir: TempDir,
}

impl Machine {
    /// Without the daemon, and nobody logged in.
    pub(crate) fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test must run as root");
        let dir = tempfile::tempdir().unwrap();
        open_to_all(dir.path(), 0o755);
        // The users cannot go where the build is, perhaps.
        let sample = dir.path().join("sample");
        fs::copy(env!("CARGO_BIN_EXE_nightporter-sample"), &sample).unwrap();
        open_to_all(&sample, 0o755);
        let system = SystemBus::new();
        let relay = Relay::in_memory(&[]);
        let config = format!("[[upstream]]\nname = \"home\"\nkind = \"autopush\"\nurl = \"ws://{}/\"\n", relay.address);
        fs::write(dir.path().join("nightporter.toml"), config).unwrap();
        let logind = Logind::start(system.address());
        Self { daemon: None, users: Vec::new(), logind, relay, system, dir }
    }

    /// More of the configuration; it holds from the daemon's next start on.
    pub(crate) fn configure(&self, more: &str) {
        let path = self.dir.path().join("nightporter.toml");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, text + more).unwrap();
    }

    /// A file that everybody may read and run.
    pub(crate) fn place(&self, name: &str, text: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        open_to_all(&path, 0o755);
        path
    }

    pub(crate) fn start_daemon(&mut self) {
        self.start_daemon_by(Command::new(env!("CARGO_BIN_EXE_nightporterd")));
    }

    /// On a system that knows no user of this uid.
    pub(crate) fn start_daemon_without_account(&mut self, uid: u32) {
        let accounts = fs::read_to_string("/etc/passwd").unwrap();
        let others = |line: &&str| line.split(':').nth(2) != Some(&uid.to_string());
        let left: Vec<&str> = accounts.lines().filter(others).collect();
        assert!(left.len() < accounts.lines().count(), "there is no such user anyway");
        let passwd = self.dir.path().join("passwd");
        fs::write(&passwd, left.join("\n") + "\n").unwrap();
        let mut command = Command::new("unshare");
        let script = "mount --make-rprivate / && mount --bind \"$0\" /etc/passwd && exec \"$@\"";
        command.args(["-m", "sh", "-c", script]).arg(passwd).arg(env!("CARGO_BIN_EXE_nightporterd"));
        self.start_daemon_by(command);
    }

    pub(crate) fn stop_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            processes::signal(daemon.id(), Signal::SIGTERM);
            assert!(daemon.wait().unwrap().success());
        }
    }

    /// The processor time the daemon has used, in clock ticks.
    pub(crate) fn daemon_ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.daemon_pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        [11, 12].map(|at| fields[at].parse::<u64>().unwrap()).iter().sum()
    }

    pub(crate) fn system_address(&self) -> String {
        self.system.address()
    }

    fn start_daemon_by(&mut self, mut command: Command) {
        let log = File::options().create(true).append(true).open(self.dir.path().join("daemon.log")).unwrap();
        let ready = self.count_log("system bus: ready");
        for variable in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "STATE_DIRECTORY", "RUNTIME_DIRECTORY"] {
            command.env_remove(variable);
        }
        command.arg("--config").arg(self.dir.path().join("nightporter.toml"));
        command.arg("--state-dir").arg(self.dir.path().join("state"));
        command.env("NIGHTPORTER_LOG", "debug").env("DBUS_SYSTEM_BUS_ADDRESS", self.system.address());
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.daemon = Some(command.spawn().unwrap());
        wait("the daemon", || (self.count_log("system bus: ready") > ready).then_some(()));
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    pub(crate) fn count_log(&self, text: &str) -> usize {
        self.log().matches(text).count()
    }

    pub(crate) fn wait_log(&self, text: &str) {
        wait(&format!("{text:?} in the log"), || self.log().contains(text).then_some(()));
    }

    /// Waits until the user's bus has come up this many times.
    pub(crate) fn wait_up(&self, uid: u32, times: usize) {
        let text = format!("user {uid} bus: ready");
        wait(&format!("{times} × {text:?}"), || (self.count_log(&text) == times).then_some(()));
    }

    /// `nightporter`, by a user, with the system's daemon.
    pub(crate) fn cli_of(&self, user: usize, arguments: &[&str]) -> Output {
        let tool = self.dir.path().join("nightporter");
        if !tool.exists() {
            fs::copy(env!("CARGO_BIN_EXE_nightporter"), &tool).unwrap();
            open_to_all(&tool, 0o755);
        }
        let mut command = self.at(user).run(tool);
        command.arg("--system").args(arguments).env("DBUS_SYSTEM_BUS_ADDRESS", self.system.address());
        command.output().unwrap()
    }

    /// `nightporter`, by root, with the system's daemon.
    pub(crate) fn cli(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nightporter"));
        command.arg("--system").args(arguments).env("DBUS_SYSTEM_BUS_ADDRESS", self.system.address());
        command.output().unwrap()
    }

    pub(crate) fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// A user, with a runtime directory and without a bus. Which one it is is its index.
    pub(crate) fn user(&mut self, uid: u32) -> usize {
        let home = self.dir.path().join(format!("home-{uid}"));
        fs::create_dir(&home).unwrap();
        let report = home.join("report");
        let reports = Reports::listen(&report);
        open_to_all(&report, 0o666);
        fs::create_dir_all(home.join("data/dbus-1/services")).unwrap();
        let runtime_dir = self.dir.path().join(format!("run-{uid}"));
        // Nor where this test is.
        let this = self.dir.path().join("this");
        if !this.exists() {
            fs::copy(std::env::current_exe().unwrap(), &this).unwrap();
            open_to_all(&this, 0o755);
        }
        let user = User { uid, home, runtime_dir, reports, bus: None, sample: self.dir.path().join("sample"), this };
        user.make_runtime_dir();
        self.users.push(user);
        self.users.len() - 1
    }

    pub(crate) fn at(&self, user: usize) -> &User {
        &self.users[user]
    }

    pub(crate) fn at_mut(&mut self, user: usize) -> &mut User {
        &mut self.users[user]
    }

    /// logind says so.
    pub(crate) fn log_in(&self, user: usize) {
        self.logind.log_in(self.at(user).uid, &self.at(user).runtime_dir);
    }

    /// As systemd does it: the bus ends, the directory goes, logind says so.
    pub(crate) fn log_out(&mut self, user: usize) {
        self.at_mut(user).stop_bus();
        fs::remove_dir_all(&self.at(user).runtime_dir).unwrap();
        self.logind.log_out(self.at(user).uid);
    }

    pub(crate) fn post(&self, endpoint: &str, body: &str) {
        let response = self.relay.post(endpoint, &[("TTL", "600")], body.as_bytes());
        assert_eq!(response.status, 201, "{response:?}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = (daemon.kill(), daemon.wait());
        }
        for user in &mut self.users {
            user.stop_bus();
            for pid in processes::with_environment(&user.report_variable()).into_iter().filter(|pid| is_running(*pid)) {
                processes::signal(pid, Signal::SIGKILL);
            }
        }
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("the daemon's log:\n{}", lines[lines.len().saturating_sub(80)..].join("\n"));
        }
    }
}

/// A user of the machine.
pub(crate) struct User {
    pub(crate) uid: u32,
    home: PathBuf,
    pub(crate) runtime_dir: PathBuf,
    pub(crate) reports: Reports,
    bus: Option<Child>,
    sample: PathBuf,
    this: PathBuf,
}

impl User {
    pub(crate) fn make_runtime_dir(&self) {
        fs::create_dir(&self.runtime_dir).unwrap();
        open_to_all(&self.runtime_dir, 0o700);
        self.give(&self.runtime_dir);
    }

    fn give(&self, path: &Path) {
        chown(path, Some(self.uid), Some(self.uid)).unwrap();
    }

    pub(crate) fn address(&self) -> String {
        format!("unix:path={}", self.runtime_dir.join("bus").display())
    }

    /// A program run by the user.
    fn run(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("setpriv");
        let uid = self.uid.to_string();
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--"]).arg(program);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", &self.home)
            .env("XDG_RUNTIME_DIR", &self.runtime_dir);
        command.env("XDG_DATA_HOME", self.home.join("data")).env("XDG_DATA_DIRS", "/nonexistent");
        command.env("DBUS_SESSION_BUS_ADDRESS", self.address()).current_dir("/").stdin(Stdio::null());
        command
    }

    /// One of this program's tests, which does nothing otherwise, in a process of the user's.
    pub(crate) fn run_this(&self, test: &[&str], environment: &[(&str, &str)]) -> Command {
        let mut command = self.run(&self.this);
        command.args(test).args(["--exact", "--nocapture"]);
        command.env("PUPPET_BUS", self.address()).envs(environment.iter().copied());
        command
    }

    /// The bus with the rules that are shipped with it.
    pub(crate) fn start_bus(&mut self) {
        let mut command = self.run("dbus-daemon");
        command.args(["--session", "--nofork", "--nopidfile", "--address", &self.address()]);
        self.bus = Some(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        wait("the user's bus", || self.runtime_dir.join("bus").exists().then_some(()));
    }

    /// kill -9.
    pub(crate) fn stop_bus(&mut self) {
        if let Some(mut bus) = self.bus.take() {
            bus.kill().unwrap();
            bus.wait().unwrap();
            let _ = fs::remove_file(self.runtime_dir.join("bus"));
        }
    }

    /// Somebody listens where the bus should be, as `owner`.
    pub(crate) fn pretend_bus(&self, owner: u32) -> UnixListener {
        let path = self.runtime_dir.join("bus");
        let listener = UnixListener::bind(&path).unwrap();
        open_to_all(&path, 0o666);
        chown(&path, Some(owner), Some(owner)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    fn report_variable(&self) -> String {
        format!("NIGHTPORTER_SAMPLE_REPORT={}", self.home.join("report").display())
    }

    /// Makes a sample app that the user's bus can start, from its next start on.
    pub(crate) fn install(&self, app: &str, fault: &str) {
        let exec = format!(
            "/usr/bin/env NIGHTPORTER_SAMPLE_NAME={app} NIGHTPORTER_SAMPLE_MODE=shared NIGHTPORTER_SAMPLE_BALLAST_KIB=64 \
             NIGHTPORTER_SAMPLE_FAULT={fault} {} {}",
            self.report_variable(),
            self.sample.display()
        );
        let text = format!("[D-BUS Service]\nName={app}\nExec={exec}\n");
        fs::write(self.home.join(format!("data/dbus-1/services/{app}.service")), text).unwrap();
    }

    /// Has the user's bus do or say something, asked by the user.
    pub(crate) fn ask(&self, to: &str, path: &str, method: &str, arguments: &[&str]) -> Result<String, String> {
        let mut command = self.run("dbus-send");
        command.args(["--print-reply=literal", &format!("--bus={}", self.address())]);
        let output = command.arg(format!("--dest={to}")).args([path, method]).args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// What the manager says to this user on the bus at `address`.
    pub(crate) fn manager_at(&self, address: &str, method: &str, arguments: &[&str]) -> Result<String, String> {
        let mut command = self.run("dbus-send");
        command.args(["--print-reply=literal", &format!("--bus={address}"), "--dest=org.nightporter1"]);
        let method = format!("org.nightporter1.Manager.{method}");
        let output = command.args(["/org/nightporter1", &method]).args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// A document of the manager.
    pub(crate) fn manager(&self, method: &str, arguments: &[&str]) -> Result<String, String> {
        self.ask("org.nightporter1", "/org/nightporter1", &format!("org.nightporter1.Manager.{method}"), arguments)
    }

    /// Starts an app and waits until it is registered; its endpoint.
    pub(crate) fn launch(&self, app: &str) -> String {
        let name = format!("string:{app}");
        let (bus, path) = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
        self.ask(bus, path, "org.freedesktop.DBus.StartServiceByName", &[&name, "uint32:0"]).unwrap();
        wait(&format!("{app} of user {}", self.uid), || {
            (self.reports.count(app, "ready") > 0).then(|| self.reports.endpoint(app)).flatten()
        })
    }

    pub(crate) fn bodies(&self, app: &str) -> Vec<String> {
        self.reports.seen(app).into_iter().map(|seen| seen.body).collect()
    }
}

fn open_to_all(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A stand-in for logind: what org.freedesktop.login1(5) says of users, and locks.
pub(crate) struct Logind {
    silent: Arc<AtomicBool>,
    users: Arc<Mutex<BTreeMap<u32, PathBuf>>>,
    out: async_channel::Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

const PATH: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";

impl Logind {
    fn start(address: String) -> Self {
        let users = Arc::new(Mutex::new(BTreeMap::new()));
        let (out, outgoing) = async_channel::unbounded::<Message>();
        let (told, ready) = mpsc::channel();
        let (known, silent) = (Arc::clone(&users), Arc::new(AtomicBool::new(false)));
        let mute = Arc::clone(&silent);
        let thread = thread::spawn(move || {
            zbus::block_on(async move {
                let connection = Builder::address(address.as_str()).build().await.unwrap();
                let stream = MessageStream::from(&connection);
                connection.request_name("org.freedesktop.login1").await.unwrap();
                told.send(()).unwrap();
                let serving = connection.clone();
                let task = zruntime::spawn(async move { serve(&serving, stream, &known, &mute).await });
                while let Ok(message) = outgoing.recv().await {
                    connection.send(&message).await.unwrap();
                }
                let _ = task.cancel().await;
            });
        });
        ready.recv_timeout(PATIENCE).unwrap();
        Self { silent, users, out, thread: Some(thread) }
    }

    /// Takes calls and never answers them, or answers again those that come from now on.
    pub(crate) fn be_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::SeqCst);
    }

    fn log_in(&self, uid: u32, runtime_dir: &Path) {
        self.users.lock().unwrap().insert(uid, runtime_dir.to_owned());
        self.signal("UserNew", uid);
    }

    fn log_out(&self, uid: u32) {
        self.forget(uid);
        self.signal("UserRemoved", uid);
    }

    /// Without a word.
    pub(crate) fn forget(&self, uid: u32) {
        self.users.lock().unwrap().remove(&uid);
    }

    fn signal(&self, member: &'static str, uid: u32) {
        let signal = Message::signal(PATH, MANAGER, member).build(&(uid, object(uid))).unwrap();
        self.out.try_send(signal).unwrap();
    }
}

impl Drop for Logind {
    fn drop(&mut self) {
        self.out.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn object(uid: u32) -> ObjectPath<'static> {
    ObjectPath::try_from(format!("{PATH}/user/_{uid}")).unwrap()
}

async fn serve(
    connection: &Connection,
    mut stream: MessageStream,
    users: &Mutex<BTreeMap<u32, PathBuf>>,
    silent: &AtomicBool,
) {
    loop {
        let next = std::future::poll_fn(|context| std::pin::Pin::new(&mut stream).poll_next(context)).await;
        let Some(Ok(call)) = next else { return };
        if call.message_type() != Type::MethodCall || silent.load(Ordering::SeqCst) {
            continue;
        }
        let header = call.header();
        let done = match header.member().unwrap().as_str() {
            "ListUsers" => {
                let users = users.lock().unwrap().clone();
                let users: Vec<_> = users.keys().map(|uid| (*uid, format!("user{uid}"), object(*uid))).collect();
                connection.reply(&header, &users).await
            }
            "GetAll" => {
                let users = users.lock().unwrap().clone();
                let user = users.iter().find(|(uid, _)| object(**uid) == *header.path().unwrap());
                match user {
                    Some((uid, path)) => {
                        let path = path.to_str().unwrap();
                        let properties: HashMap<&str, Variant<'_>> = HashMap::from([
                            ("UID", Variant::from(*uid)),
                            ("GID", Variant::from(*uid)),
                            ("Name", Variant::from("somebody")),
                            ("RuntimePath", Variant::from(path)),
                            ("State", Variant::from("active")),
                        ]);
                        connection.reply(&header, &properties).await
                    }
                    None => {
                        let error = "org.freedesktop.DBus.Error.UnknownObject";
                        connection.reply_error(&header, error, &"no such user").await
                    }
                }
            }
            "ListInhibitors" => connection.reply(&header, &Vec::<(&str, &str, &str, &str, u32, u32)>::new()).await,
            "Inhibit" => {
                let (_, writer) = std::io::pipe().unwrap();
                connection.reply(&header, &zbus::OwnedFd::from(OwnedFd::from(writer))).await
            }
            other => panic!("nobody calls {other}"),
        };
        // Whoever asked may be gone.
        let _ = done;
    }
}
