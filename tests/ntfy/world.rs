//! A private bus, the real daemon on it, and apps played by the test.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, mpsc},
    thread,
    time::{Duration, Instant},
};

use futures_core::Stream;
use nightporter::view;
use zbus::{Connection, Message, MessageStream, OwnedVariant, Variant, connection::Builder, message::Type};

const DISTRIBUTOR: &str = "org.unifiedpush.Distributor.nightporter";
const DISTRIBUTOR_PATH: &str = "/org/unifiedpush/Distributor";
/// Within this everything a test waits for has happened, also on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

/// A message bus of its own.
pub(crate) struct Bus {
    daemon: Child,
    pub(crate) address: String,
    _dir: tempfile::TempDir,
}

impl Bus {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("bus.conf");
        let text = format!(
            "<busconfig><type>session</type><listen>unix:path={}/bus</listen><auth>EXTERNAL</auth>\
             <policy context=\"default\"><allow send_destination=\"*\" eavesdrop=\"true\"/><allow eavesdrop=\"true\"/>\
             <allow own=\"*\"/></policy></busconfig>",
            dir.path().display()
        );
        fs::write(&config, text).unwrap();
        let mut daemon = Command::new("dbus-daemon")
            .args(["--nofork", "--print-address=1"])
            .arg(format!("--config-file={}", config.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("dbus-daemon must be installed");
        let mut address = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut address).unwrap();
        assert!(address.starts_with("unix:"), "dbus-daemon said {address:?}");
        Self { daemon, address: address.trim().to_owned(), _dir: dir }
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// What a daemon is started with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup<'a> {
    /// The upstream's kind.
    pub(crate) kind: &'a str,
    /// Where it is.
    pub(crate) url: &'a str,
    /// Further keys of it.
    pub(crate) upstream: &'a str,
    /// Further sections.
    pub(crate) more: &'a str,
    /// A process in whose network namespace it is to run, if not in the test's own.
    pub(crate) beside: Option<u32>,
}

/// The daemon, its configuration and its state.
pub(crate) struct Porter {
    child: Option<Child>,
    beside: Option<u32>,
    bus: String,
    dir: tempfile::TempDir,
    client: Connection,
}

impl Porter {
    /// Starts it with one ntfy server at `url`. `upstream` are further keys of that, `more` further sections.
    pub(crate) fn start(bus: &Bus, url: &str, upstream: &str, more: &str) -> Self {
        Self::with(bus, Setup { kind: "ntfy", url, upstream, more, beside: None })
    }

    pub(crate) fn with(bus: &Bus, setup: Setup<'_>) -> Self {
        let Setup { kind, url, upstream, more, beside } = setup;
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            "profile = \"tombstone\"\n[[upstream]]\nname = \"home\"\nkind = \"{kind}\"\nurl = \"{url}\"\n{upstream}\n{more}\n"
        );
        fs::write(dir.path().join("nightporter.toml"), config).unwrap();
        let client = zbus::block_on(Builder::address(bus.address.as_str()).build()).unwrap();
        let mut porter = Self { child: None, beside, bus: bus.address.clone(), dir, client };
        porter.start_again();
        porter
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Starts it on the state that is there, and waits until it serves the bus.
    pub(crate) fn start_again(&mut self) {
        let log = File::options().create(true).append(true).open(self.dir.path().join("daemon.log")).unwrap();
        let program = env!("CARGO_BIN_EXE_nightporterd");
        let mut command = match self.beside {
            // It becomes the daemon: the process is the same.
            Some(beside) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/proc/{beside}/ns/net")).arg("--").arg(program);
                command
            }
            None => Command::new(program),
        };
        let child = command
            .arg("--user")
            .arg("--config")
            .arg(self.dir.path().join("nightporter.toml"))
            .arg("--state-dir")
            .arg(self.dir.path().join("state"))
            .env("DBUS_SESSION_BUS_ADDRESS", &self.bus)
            .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent")
            .env("NIGHTPORTER_LOG", "debug")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        self.wait("the daemon to serve the bus", |porter| porter.try_ask("Status", None).is_ok());
    }

    /// `org.nightporter1.Manager`.
    pub(crate) fn ask(&self, method: &'static str, app: Option<&str>) -> String {
        self.try_ask(method, app).unwrap_or_else(|error| panic!("{method}: {error}\n{}", self.log()))
    }

    pub(crate) fn status(&self) -> view::Status {
        serde_json::from_str(&self.ask("Status", None)).unwrap()
    }

    pub(crate) fn upstream(&self) -> view::Upstream {
        self.status().upstreams.remove(0)
    }

    /// The lifecycle state of `app`; empty when it is not known.
    pub(crate) fn state_of(&self, app: &str) -> String {
        let apps: Vec<view::App> = serde_json::from_str(&self.ask("Apps", None)).unwrap();
        apps.into_iter().find(|known| known.name == app).map(|known| known.state).unwrap_or_default()
    }

    /// Waits until `seen`, looking again and again.
    pub(crate) fn wait(&self, what: &str, mut seen: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !seen(self) {
            assert!(Instant::now() < until, "waited in vain for {what}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn wait_online(&self) {
        self.wait("the upstream", |porter| porter.upstream().state == view::LinkState::Online);
    }

    pub(crate) fn log(&self) -> String {
        let log = fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    fn try_ask(&self, method: &'static str, app: Option<&str>) -> zbus::Result<String> {
        zbus::block_on(async {
            let (path, interface) = ("/org/nightporter1", Some("org.nightporter1.Manager"));
            let reply = match app {
                Some(app) => {
                    self.client.call_method(Some("org.nightporter1"), path, interface, method, &(app,)).await?
                }
                None => self.client.call_method(Some("org.nightporter1"), path, interface, method, &()).await?,
            };
            reply.body().deserialize::<String>()
        })
    }
}

impl Porter {
    /// Ends it in order and starts it again.
    pub(crate) fn restart(mut self) -> Self {
        self.stop();
        self.start_again();
        self
    }

    fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        for _ in 0..500 {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Porter {
    fn drop(&mut self) {
        // In order, so that nothing it froze stays frozen.
        self.stop();
    }
}

/// What an app was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) token: String,
    pub(crate) id: String,
    pub(crate) body: Vec<u8>,
}

#[derive(Default)]
struct Seen {
    messages: Vec<Received>,
    endpoints: HashMap<String, String>,
    replies: HashMap<u32, Result<(), String>>,
}

/// Any number of apps on one connection: UnifiedPush 2, each with one registration.
pub(crate) struct Apps {
    connection: Connection,
    seen: Arc<(Mutex<Seen>, Condvar)>,
    _quit: async_channel::Sender<()>,
}

impl Apps {
    pub(crate) fn start(bus: &Bus) -> Self {
        let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let (told, connection) = mpsc::channel();
        let (quit, quitting) = async_channel::bounded::<()>(1);
        let (address, theirs) = (bus.address.clone(), Arc::clone(&seen));
        thread::spawn(move || {
            zbus::block_on(async move {
                let connection = Builder::address(address.as_str()).method_timeout(PATIENCE).build().await.unwrap();
                let stream = MessageStream::from(&connection);
                told.send(connection.clone()).unwrap();
                let task = zruntime::spawn(async move { serve(&connection, stream, &theirs).await });
                let _ = quitting.recv().await;
                drop(task);
            });
        });
        Self { connection: connection.recv().unwrap(), seen, _quit: quit }
    }

    /// Registers every app of `names` without waiting for the one before; its token is its name. What came of each.
    pub(crate) fn register(&self, names: &[String]) -> Vec<Result<(), String>> {
        self.own(names);
        self.register_later(names)()
    }

    /// Takes the bus names that [`Apps::register_later`] needs.
    pub(crate) fn own(&self, names: &[String]) {
        for name in names {
            zbus::block_on(self.connection.request_name(name.as_str())).unwrap();
        }
    }

    /// [`Apps::register`] that is already under way when this returns, and whose answers are waited for later.
    pub(crate) fn register_later(&self, names: &[String]) -> impl FnOnce() -> Vec<Result<(), String>> {
        let calls: Vec<Message> = names
            .iter()
            .map(|name| {
                let args: HashMap<&str, Variant<'_>> = HashMap::from([
                    ("service", Variant::from(name.as_str())),
                    ("token", Variant::from(name.as_str())),
                    ("description", Variant::from("a test")),
                ]);
                call("Register", &args)
            })
            .collect();
        zbus::block_on(self.connection.send_all(&calls)).unwrap();
        move || calls.iter().map(|call| self.reply(call)).collect()
    }

    pub(crate) fn register_one(&self, name: &str) -> String {
        let result = self.register(&[name.to_owned()]);
        assert_eq!(result, [Ok(())], "{name}");
        self.endpoint(name)
    }

    pub(crate) fn unregister(&self, name: &str) {
        let args: HashMap<&str, Variant<'_>> = HashMap::from([("token", Variant::from(name))]);
        let call = call("Unregister", &args);
        zbus::block_on(self.connection.send(&call)).unwrap();
        self.reply(&call).unwrap();
    }

    /// The endpoint the app was told, once it was.
    pub(crate) fn endpoint(&self, name: &str) -> String {
        self.wait(&format!("an endpoint for {name}"), |seen| seen.endpoints.get(name).cloned())
    }

    /// What `name` got so far.
    pub(crate) fn messages(&self, name: &str) -> Vec<Received> {
        let seen = self.seen.0.lock().unwrap();
        seen.messages.iter().filter(|message| message.token == name).cloned().collect()
    }

    /// What `name` got, once that are `count` or more.
    pub(crate) fn wait_messages(&self, name: &str, count: usize) -> Vec<Received> {
        self.wait(&format!("{count} messages for {name}"), |seen| {
            let theirs = seen.messages.iter().filter(|message| message.token == name);
            (theirs.clone().count() >= count).then(|| theirs.cloned().collect())
        })
    }

    fn reply(&self, call: &Message) -> Result<(), String> {
        let serial = call.primary_header().serial_num().get();
        self.wait("a reply", |seen| seen.replies.remove(&serial))
    }

    fn wait<T>(&self, what: &str, mut look: impl FnMut(&mut MutexGuard<'_, Seen>) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        let mut seen = self.seen.0.lock().unwrap();
        loop {
            if let Some(found) = look(&mut seen) {
                return found;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited in vain for {what}; {} messages came", seen.messages.len());
            seen = self.seen.1.wait_timeout(seen, left).unwrap().0;
        }
    }
}

fn call(member: &'static str, args: &HashMap<&str, Variant<'_>>) -> Message {
    let builder = Message::method_call(DISTRIBUTOR_PATH, member).destination(DISTRIBUTOR);
    builder.interface("org.unifiedpush.Distributor2").build(args).unwrap()
}

async fn serve(connection: &Connection, mut stream: MessageStream, seen: &(Mutex<Seen>, Condvar)) {
    loop {
        let next = std::future::poll_fn(|context| std::pin::Pin::new(&mut stream).poll_next(context)).await;
        let Some(Ok(message)) = next else { return };
        let header = message.header();
        let body = message.body();
        match message.message_type() {
            Type::MethodCall => {
                let args: HashMap<String, OwnedVariant> = body.deserialize().unwrap();
                {
                    let mut seen = seen.0.lock().unwrap();
                    let token = text(&args, "token");
                    match header.member().map(|member| member.as_str()) {
                        Some("Message") => {
                            let body = Vec::<u8>::try_from(args["message"].clone()).unwrap();
                            seen.messages.push(Received { token, id: text(&args, "id"), body });
                        }
                        Some("NewEndpoint") => {
                            seen.endpoints.insert(token, text(&args, "endpoint"));
                        }
                        _ => {}
                    }
                }
                connection.reply(&header, &HashMap::<&str, Variant<'_>>::new()).await.unwrap();
            }
            Type::MethodReturn => {
                let serial = header.reply_serial().unwrap().get();
                let answer: HashMap<String, OwnedVariant> = body.deserialize().unwrap_or_default();
                let result = match text(&answer, "success").as_str() {
                    "" | "REGISTRATION_SUCCEEDED" => Ok(()),
                    _ => Err(text(&answer, "reason")),
                };
                seen.0.lock().unwrap().replies.insert(serial, result);
            }
            Type::Error => {
                let serial = header.reply_serial().unwrap().get();
                let error = format!("{:?} {:?}", header.error_name(), body.deserialize::<String>());
                seen.0.lock().unwrap().replies.insert(serial, Err(error));
            }
            Type::Signal => continue,
        }
        seen.1.notify_all();
    }
}

fn text(args: &HashMap<String, OwnedVariant>, key: &str) -> String {
    args.get(key).and_then(|value| <&str>::try_from(value).ok()).unwrap_or_default().to_owned()
}
