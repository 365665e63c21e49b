//! Users with real session buses and real sound servers, and stand-ins for what needs a phone.

#[path = "../support/patience.rs"]
mod patience;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    future::ready,
    os::unix::{
        fs::{PermissionsExt, chown},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use futures_core::Stream;
use mio::{Events, Poll, Token};
use nightporter::{
    model::{Veto, VetoKind},
    sys::{
        bus::BusThread,
        inbox::{self, Inbox, Incoming},
        signs::Signs,
        surroundings::Surroundings,
        users::{self, User, Usher},
    },
};
use tempfile::TempDir;
use zbus::{Message, MessageStream, connection::Builder, message::Type};

pub(crate) use self::patience::{PATIENCE, wait};

/// A user with a runtime directory; what runs in it ends with this.
pub(crate) struct Home {
    pub(crate) uid: u32,
    dir: TempDir,
    running: Vec<Running>,
}

/// A program of a user's. It ends with this.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

impl Home {
    /// With a session bus.
    pub(crate) fn new(uid: u32) -> Self {
        let mut home = Self::bare(uid);
        let address = home.address();
        let bus = home.run("dbus-daemon", &["--session", "--nofork", "--nopidfile", "--address", &address]);
        home.running.push(bus);
        wait("the bus", || UnixStream::connect(home.runtime_dir().join("bus")).ok());
        home
    }

    /// Without.
    pub(crate) fn bare(uid: u32) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test must run as root");
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let home = Self { uid, dir, running: Vec::new() };
        for made in [home.runtime_dir(), home.path("config"), home.path("config/pipewire")] {
            fs::create_dir(&made).unwrap();
            home.give(&made);
        }
        fs::set_permissions(home.runtime_dir(), fs::Permissions::from_mode(0o700)).unwrap();
        home
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.path("run")
    }

    pub(crate) fn address(&self) -> String {
        format!("unix:path={}", self.runtime_dir().join("bus").display())
    }

    pub(crate) fn user(&self) -> User {
        User { uid: self.uid, gid: self.uid, runtime_dir: self.runtime_dir() }
    }

    pub(crate) fn give(&self, path: &Path) {
        chown(path, Some(self.uid), Some(self.uid)).unwrap();
    }

    /// Starts a program as this user.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> Running {
        let log = File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = self.command(program, arguments);
        command.stdout(log.try_clone().unwrap()).stderr(log);
        Running(command.spawn().unwrap_or_else(|error| panic!("{program}: {error}")))
    }

    /// Starts a program as this user in a pid namespace of its own, where it is process 1.
    pub(crate) fn run_apart(&self, program: &str, arguments: &[&str]) -> Running {
        let command = self.command(program, arguments);
        let inner: Vec<_> =
            std::iter::once(command.get_program()).chain(command.get_args()).map(ToOwned::to_owned).collect();
        let mut apart = Command::new("unshare");
        apart.args(["--pid", "--fork", "--"]).args(inner).env_clear();
        apart.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Running(apart.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let uid = self.uid.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--", program]).args(arguments);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("TERM", "xterm")
            .env("HOME", self.dir.path())
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_STATE_HOME", self.path("config"))
            .env("XDG_RUNTIME_DIR", self.runtime_dir())
            .env("DBUS_SESSION_BUS_ADDRESS", self.address())
            .current_dir("/");
        command.stdin(Stdio::null());
        command
    }

    /// Starts PipeWire, with a sink that can be heard nowhere, a session manager and the stand-in for PulseAudio.
    pub(crate) fn start_sound(&self) -> Vec<Running> {
        let sink = "context.objects = [ { factory = adapter args = { factory.name = support.null-audio-sink \
                    node.name = quiet media.class = Audio/Sink audio.position = [ FL FR ] } } ]";
        let drop_ins = self.path("config/pipewire/pipewire.conf.d");
        fs::create_dir_all(&drop_ins).unwrap();
        fs::write(drop_ins.join("quiet.conf"), sink).unwrap();
        let mut running = vec![self.run("pipewire", &[])];
        wait("PipeWire", || self.runtime_dir().join("pipewire-0").exists().then_some(()));
        running.push(self.run("wireplumber", &[]));
        running.push(self.run("pipewire-pulse", &[]));
        wait("pipewire-pulse", || self.runtime_dir().join("pulse/native").exists().then_some(()));
        // Whoever plays before the session manager knows the sink is told that there is none.
        wait("the sink", || {
            let asked = self.command("pactl", &["get-default-sink"]).output().unwrap();
            (asked.stdout.trim_ascii() == b"quiet").then_some(())
        });
        running
    }

    /// A minute of noise.
    pub(crate) fn noise(&self) -> String {
        let path = self.path("noise.wav");
        let (rate, seconds, frame) = (48_000_u32, 60, 4);
        let length = rate * seconds * frame;
        let mut wave = Vec::new();
        wave.extend(b"RIFF");
        wave.extend((36 + length).to_le_bytes());
        wave.extend(b"WAVEfmt ");
        wave.extend(16_u32.to_le_bytes());
        // PCM, two channels.
        wave.extend([1, 0, 2, 0]);
        wave.extend(rate.to_le_bytes());
        wave.extend((rate * frame).to_le_bytes());
        wave.extend([4, 0, 16, 0]);
        wave.extend(b"data");
        wave.extend(length.to_le_bytes());
        let mut random = 1_u32;
        wave.extend((0..length).map(|_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 24) as u8
        }));
        fs::write(&path, wave).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// cmus, which is a real MPRIS player that needs no screen but a terminal. Its process id.
    pub(crate) fn start_cmus(&mut self) -> u32 {
        let config = self.path("config/cmus");
        fs::create_dir_all(&config).unwrap();
        fs::write(config.join("rc"), "set output_plugin=pulse\n").unwrap();
        self.give(&config);
        let pid = self.runtime_dir().join("cmus.pid");
        let socket = self.cmus_socket();
        let command = format!("echo $$ > {}; exec cmus --listen {socket}", pid.display());
        let terminal = self.run("script", &["-qec", &command, "/dev/null"]);
        self.running.push(terminal);
        wait("cmus", || UnixStream::connect(&socket).ok());
        fs::read_to_string(pid).unwrap().trim().parse().unwrap()
    }

    /// Tells cmus what to do.
    pub(crate) fn cmus(&self, arguments: &[&str]) {
        let socket = self.cmus_socket();
        let mut remote = self.run("cmus-remote", &[&["--server", &socket], arguments].concat());
        assert!(remote.0.wait().unwrap().success(), "cmus-remote {arguments:?}");
    }

    fn cmus_socket(&self) -> String {
        self.runtime_dir().join("cmus.socket").display().to_string()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // What was started last first: a bus that is gone is a reason to complain.
        while self.running.pop().is_some() {}
        if thread::panicking() {
            println!(
                "what user {}'s programs said:\n{}",
                self.uid,
                fs::read_to_string(self.path("log")).unwrap_or_default()
            );
        }
    }
}

/// The loop's side.
pub(crate) struct World {
    poll: Poll,
    inbox: Inbox,
    bus: Option<BusThread>,
    usher: Usher,
    _surroundings: Option<Surroundings>,
    /// The latest word of each source.
    said: BTreeMap<(&'static str, u32), Vec<(u32, Veto)>>,
    /// How often anything was said.
    pub(crate) words: usize,
}

impl World {
    /// With these users logged in, and without a system bus.
    pub(crate) fn new(homes: &[&Home]) -> Self {
        Self::with_system_bus(homes, None)
    }

    pub(crate) fn with_system_bus(homes: &[&Home], system: Option<String>) -> Self {
        let poll = Poll::new().unwrap();
        let (sender, inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        let (usher, roster) = users::roster();
        usher.present(homes.iter().map(|home| home.user()).collect());
        let signs = Signs::new(sender.clone());
        let (bus, surroundings) = match system {
            None => (BusThread::spawn_watching(vec![], Some(roster), false, Some(signs), sender, ready(())), None),
            Some(_) => {
                let (surroundings, beside) =
                    Surroundings::watching(system, 15, None, Some(signs.clone()), sender.clone());
                let bus = BusThread::spawn_watching(vec![], Some(roster), false, Some(signs), sender, beside);
                (bus, Some(surroundings))
            }
        };
        Self {
            poll,
            inbox,
            bus: Some(bus.unwrap()),
            usher,
            _surroundings: surroundings,
            said: BTreeMap::new(),
            words: 0,
        }
    }

    /// These are logged in from now on.
    pub(crate) fn log_in(&self, homes: &[&Home]) {
        self.usher.present(homes.iter().map(|home| home.user()).collect());
    }

    /// All that is said of a process now.
    pub(crate) fn of(&self, pid: u32) -> Vec<&Veto> {
        self.said.values().flatten().filter(|(of, _)| *of == pid).map(|(_, veto)| veto).collect()
    }

    pub(crate) fn kinds(&self, pid: u32) -> BTreeSet<VetoKind> {
        self.of(pid).into_iter().map(|veto| veto.kind).collect()
    }

    /// Every process anything is said of.
    pub(crate) fn pids(&self) -> BTreeSet<u32> {
        self.said.values().flatten().map(|(pid, _)| *pid).collect()
    }

    /// Listens until something holds.
    pub(crate) fn wait(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        assert!(self.within(PATIENCE, holds), "waited {} s for {what}; said: {:#?}", PATIENCE.as_secs(), self.said);
    }

    /// Listens until something holds; false if it did not in time.
    pub(crate) fn within(&mut self, limit: Duration, holds: impl Fn(&Self) -> bool) -> bool {
        let until = Instant::now() + limit;
        let mut events = Events::with_capacity(4);
        loop {
            while let Some(incoming) = self.inbox.take() {
                if let Incoming::Sightings { source, uid, vetoes } = incoming {
                    assert!(vetoes.len() <= 256 && vetoes.iter().all(|(_, veto)| veto.reason.len() <= 200));
                    self.words += 1;
                    self.said.insert((source, uid), vetoes);
                }
            }
            if holds(self) {
                return true;
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
            let _ = self.poll.poll(&mut events, Some(left));
        }
    }

    /// Waits until exactly this is said of a process.
    pub(crate) fn wait_kinds(&mut self, pid: u32, kinds: &[VetoKind]) {
        let kinds: BTreeSet<VetoKind> = kinds.iter().copied().collect();
        self.wait(&format!("{kinds:?} of {pid}"), |world| world.kinds(pid) == kinds);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(bus) = self.bus.take() {
            bus.stop();
        }
    }
}

/// A stand-in for a service, or an app: names on a bus, answers to calls, signals. Its process is the test's own.
pub(crate) struct StandIn {
    out: async_channel::Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl StandIn {
    pub(crate) fn start(
        address: &str,
        names: &[&'static str],
        answer: impl Fn(&Message) -> Option<Message> + Send + 'static,
    ) -> Self {
        let (out, outgoing) = async_channel::unbounded::<Message>();
        let (told, is_ready) = mpsc::channel();
        let (address, names) = (address.to_owned(), names.to_vec());
        let thread = thread::spawn(move || {
            zbus::block_on(async move {
                let connection = Builder::address(address.as_str()).build().await.unwrap();
                let mut stream = MessageStream::from(&connection);
                for name in names {
                    connection.request_name(name).await.unwrap();
                }
                told.send(()).unwrap();
                let serving = connection.clone();
                let task = zruntime::spawn(async move {
                    loop {
                        let next =
                            std::future::poll_fn(|context| std::pin::Pin::new(&mut stream).poll_next(context)).await;
                        let Some(Ok(message)) = next else { return };
                        if message.message_type() == Type::MethodCall
                            && let Some(reply) = answer(&message)
                        {
                            let _ = serving.send(&reply).await;
                        }
                    }
                });
                while let Ok(message) = outgoing.recv().await {
                    connection.send(&message).await.unwrap();
                }
                let _ = task.cancel().await;
                let _ = connection.close().await;
            });
        });
        is_ready.recv_timeout(PATIENCE).unwrap();
        Self { out, thread: Some(thread) }
    }

    /// One that only has names.
    pub(crate) fn named(address: &str, names: &[&'static str]) -> Self {
        Self::start(address, names, |_| None)
    }

    pub(crate) fn signal<B: serde::Serialize + zbus::DynamicType>(
        &self,
        path: &str,
        interface: &str,
        member: &str,
        body: &B,
    ) {
        self.out.try_send(Message::signal(path, interface, member).build(body).unwrap()).unwrap();
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.out.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The reply to a call.
pub(crate) fn reply<B: serde::Serialize + zbus::DynamicType>(call: &Message, body: &B) -> Option<Message> {
    Message::method_return(&call.header()).build(body).ok()
}
