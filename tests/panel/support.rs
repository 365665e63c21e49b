//! What KDE's settings panel does, in the order it does it, and the upstreams it can show.

#[path = "../support/patience.rs"]
#[expect(dead_code, reason = "shared; only one way of waiting is needed here")]
mod patience;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    future::poll_fn,
    pin::Pin,
    process::{Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread::{self, JoinHandle},
    time::Duration,
};

use futures_core::Stream;
use nightporter::{
    action::{PanelState, Reply},
    config::{Credentials, SecretSource, UpstreamKind, UpstreamSettings},
    event::{BusEvent, Event, PanelRequest, Request},
    model::Secret,
    sys::{bus::BusAddress, inbox::Incoming},
};
use serde::{Serialize, de::DeserializeOwned};
use zbus::{
    Connection, DynamicType, Message, MessageStream, OwnedVariant, block_on,
    message::{Flags, Type},
};

use crate::bus::{BUS, Daemon, Ended, Loop, connect, error_of, run};

pub(crate) const KDE: &str = "org.unifiedpush.Distributor.kde";
pub(crate) const MANAGEMENT: &str = "org.kde.kunifiedpush.Management";
pub(crate) const SIGNALS: [&str; 4] =
    ["statusChanged", "errorMessageChanged", "pushProviderChanged", "registeredClientsChanged"];
const THE_BUS: &str = "org.freedesktop.DBus";

/// The bus thread with the panel, up.
pub(crate) fn up(daemon: &Daemon) -> Loop {
    let mut main = Loop::with(vec![BusAddress { bus: BUS, address: Some(daemon.address()) }], true);
    main.expect(|incoming| matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(BUS)))).then_some(()));
    main
}

impl Loop {
    /// Answers the next call, which must be one for the panel's state.
    pub(crate) fn answer(&mut self, state: PanelState) {
        let (call, _, request) = self.call();
        assert_eq!(request, Request::Panel(PanelRequest::State));
        self.reply(call, Reply::Panel(Box::new(state)));
    }
}

/// Something to show.
pub(crate) fn state() -> PanelState {
    PanelState {
        status: 2,
        error: "no route".into(),
        upstream: UpstreamSettings::new("home", UpstreamKind::Ntfy, "https://ntfy.example/"),
        clients: vec![("{t}".into(), "org.kde.neochat".into(), "Messages".into())],
    }
}

pub(crate) fn of(upstream: UpstreamSettings) -> PanelState {
    PanelState { upstream, ..state() }
}

pub(crate) fn id_of(kind: UpstreamKind) -> &'static str {
    match kind {
        UpstreamKind::Gotify => "Gotify",
        UpstreamKind::NextPush => "NextPush",
        UpstreamKind::Ntfy => "Ntfy",
        UpstreamKind::Autopush => "Autopush",
        UpstreamKind::Mqtt => "",
    }
}

type Config = Vec<(&'static str, &'static str)>;

/// KDE's names, what they are here, and what they are there.
pub(crate) fn providers() -> Vec<(&'static str, UpstreamSettings, Config)> {
    let given = |text: &str| SecretSource::Given(Secret::new(text));
    let login = || Credentials::Password { username: "phone".into(), password: given("pass word") };
    let with = |kind: UpstreamKind, credentials| {
        let url = kind.base_url("https://push.example/sub/").unwrap();
        UpstreamSettings { credentials, ..UpstreamSettings::new("kde", kind, url) }
    };
    let url = ("Url", "https://push.example/sub/");
    let all = [
        (UpstreamKind::Autopush, Credentials::None, vec![]),
        (UpstreamKind::Gotify, Credentials::TokenFile(given("Ctoken")), vec![("ClientToken", "Ctoken")]),
        (UpstreamKind::NextPush, login(), vec![("Username", "phone"), ("AppPassword", "pass word")]),
        (UpstreamKind::Ntfy, Credentials::None, vec![]),
        (UpstreamKind::Ntfy, login(), vec![("AuthMethod", "Basic"), ("Username", "phone"), ("Secret", "pass word")]),
        (UpstreamKind::Ntfy, Credentials::TokenFile(given("tk_1")), vec![("AuthMethod", "Bearer"), ("Secret", "tk_1")]),
    ];
    let entry = |(kind, credentials, mut config): (_, _, Config)| {
        config.push(url);
        (id_of(kind), with(kind, credentials), config)
    };
    all.into_iter().map(entry).collect()
}

/// The argument of `setPushProvider`.
pub(crate) fn dict(entries: &[(&str, &str)]) -> HashMap<String, OwnedVariant> {
    let variant = |text: &str| zbus::Variant::from(text.to_owned()).try_into().unwrap();
    entries.iter().map(|(key, value)| ((*key).to_owned(), variant(value))).collect()
}

pub(crate) fn texts(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
    entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub(crate) fn read_dict(reply: &Message) -> BTreeMap<String, String> {
    let dict: HashMap<String, OwnedVariant> = reply.body().deserialize().unwrap();
    dict.into_iter().map(|(key, value)| (key, String::try_from(value).unwrap())).collect()
}

/// A program on the bus that calls `/Management`.
pub(crate) struct Client {
    connection: Connection,
    address: String,
}

impl Client {
    pub(crate) fn new(daemon: &Daemon) -> Self {
        let address = daemon.address();
        Self { connection: block_on(connect(&address)), address }
    }

    fn ask_bus<B: Serialize + DynamicType>(&self, member: &str, body: &B) -> zbus::Result<Message> {
        block_on(self.connection.call_method(Some(THE_BUS), "/org/freedesktop/DBus", Some(THE_BUS), member, body))
    }

    /// Who owns a name.
    pub(crate) fn owner(&self, name: &str) -> Option<String> {
        match self.ask_bus("GetNameOwner", &name) {
            Ok(reply) => Some(reply.body().deserialize().unwrap()),
            failed => {
                assert_eq!(error_of(failed).0, "org.freedesktop.DBus.Error.NameHasNoOwner");
                None
            }
        }
    }

    /// Who owns a name, and who waits for it.
    pub(crate) fn in_line(&self, name: &str) -> Vec<String> {
        self.ask_bus("ListQueuedOwners", &name).unwrap().body().deserialize().unwrap()
    }

    /// What RequestName says.
    pub(crate) fn request_name(&self, name: &str, flags: u32) -> u32 {
        self.ask_bus("RequestName", &(name, flags)).unwrap().body().deserialize().unwrap()
    }

    pub(crate) fn introspect(&self, path: &str) -> String {
        let interface = "org.freedesktop.DBus.Introspectable";
        let reply = block_on(self.connection.call_method(Some(KDE), path, Some(interface), "Introspect", &()));
        reply.unwrap().body().deserialize().unwrap()
    }

    /// Calls a method while the test plays the loop.
    pub(crate) fn call<B>(&self, member: &'static str, body: B) -> JoinHandle<zbus::Result<Message>>
    where
        B: Serialize + DynamicType + Send + Sync + 'static,
    {
        self.call_to(KDE, member, body)
    }

    pub(crate) fn call_to<B>(
        &self,
        name: &'static str,
        member: &'static str,
        body: B,
    ) -> JoinHandle<zbus::Result<Message>>
    where
        B: Serialize + DynamicType + Send + Sync + 'static,
    {
        let connection = self.connection.clone();
        run(async move { connection.call_method(Some(name), "/Management", Some(MANAGEMENT), member, &body).await })
    }

    /// Calls a method that shows `state`.
    pub(crate) fn ask<T: DeserializeOwned + zbus::Type>(
        &self,
        main: &mut Loop,
        member: &'static str,
        body: impl Serialize + DynamicType + Send + Sync + 'static,
        state: PanelState,
    ) -> T {
        let reply = self.call(member, body);
        main.answer(state);
        reply.join().unwrap().unwrap().body().deserialize().unwrap()
    }

    /// `pushProviderConfiguration`.
    pub(crate) fn config(
        &self,
        main: &mut Loop,
        id: &'static str,
        upstream: UpstreamSettings,
    ) -> BTreeMap<String, String> {
        let reply = self.call("pushProviderConfiguration", id);
        main.answer(of(upstream));
        read_dict(&reply.join().unwrap().unwrap())
    }

    /// What is said to a connection of its own that sends calls without wanting replies, as `talk` does.
    pub(crate) fn without_reply(&self, talk: impl FnOnce(&Mute)) -> Heard {
        let connection = block_on(connect(&self.address));
        let mut stream = MessageStream::from(&connection);
        talk(&Mute(connection.clone()));
        // Its own call is answered after all that was caused before.
        let ping = Message::method_call("/Management", "Ping")
            .destination(KDE)
            .interface("org.freedesktop.DBus.Peer")
            .build(&())
            .unwrap();
        block_on(connection.send(&ping)).unwrap();
        let mut heard = Heard { signals: Vec::new(), replies: 0 };
        loop {
            let next = block_on(poll_fn(|context| Pin::new(&mut stream).poll_next(context))).unwrap().unwrap();
            let header = next.header();
            if header.reply_serial() == Some(ping.primary_header().serial_num()) {
                return heard;
            }
            match next.message_type() {
                Type::Signal if header.interface().is_some_and(|interface| interface.as_str() == MANAGEMENT) => {
                    heard.signals.push(header.member().unwrap().to_string());
                }
                Type::MethodReturn | Type::Error => heard.replies += 1,
                _ => {}
            }
        }
    }

    /// The interface's signals: sender, name, signature of the arguments.
    pub(crate) fn listen(&self) -> Receiver<(String, String, String)> {
        let (sender, heard) = mpsc::channel();
        let (ready, listening) = mpsc::channel();
        let address = self.address.clone();
        thread::spawn(move || {
            block_on(async move {
                let connection = connect(&address).await;
                let mut stream = MessageStream::from(&connection);
                let rule = format!("type='signal',interface='{MANAGEMENT}',path='/Management'");
                let path = "/org/freedesktop/DBus";
                connection.call_method(Some(THE_BUS), path, Some(THE_BUS), "AddMatch", &rule).await.unwrap();
                ready.send(()).unwrap();
                loop {
                    let next = poll_fn(|context| Pin::new(&mut stream).poll_next(context)).await;
                    let Some(Ok(message)) = next else { return };
                    let header = message.header();
                    if header.interface().is_none_or(|interface| interface.as_str() != MANAGEMENT) {
                        continue;
                    }
                    let (from, member) = (header.sender().unwrap().to_string(), header.member().unwrap().to_string());
                    if sender.send((from, member, message.body().signature().to_string())).is_err() {
                        return;
                    }
                }
            });
        });
        listening.recv_timeout(Duration::from_secs(10)).unwrap();
        heard
    }
}

/// Sends calls that want no reply.
pub(crate) struct Mute(Connection);

impl Mute {
    pub(crate) fn send<B: Serialize + DynamicType>(&self, member: &str, body: &B) {
        let call = Message::method_call("/Management", member)
            .destination(KDE)
            .interface(MANAGEMENT)
            .with_flags(Flags::NO_REPLY_EXPECTED)
            .build(body)
            .unwrap();
        block_on(self.0.send(&call)).unwrap();
    }
}

/// What came back.
pub(crate) struct Heard {
    pub(crate) signals: Vec<String>,
    pub(crate) replies: usize,
}

/// Whether somebody comes to own the name.
pub(crate) fn owned_soon(client: &Client, name: &str) -> bool {
    soon(|| client.owner(name).is_some())
}

/// Whoever had the name is gone: the bus notices an end a moment after it.
pub(crate) fn gone_soon(client: &Client, name: &str) -> bool {
    soon(|| client.owner(name).is_none())
}

fn soon(done: impl Fn() -> bool) -> bool {
    patience::wait_for(Duration::from_secs(20), || done().then_some(())).is_some()
}

/// The daemon as a process of its own on this bus, with this configuration.
pub(crate) fn nightporterd(daemon: &Daemon, config: &str) -> Ended {
    let dir = daemon.path("nightporterd");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("nightporter.toml"), config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_nightporterd"));
    command.arg("--user").arg("--config").arg(dir.join("nightporter.toml")).arg("--state-dir").arg(dir.join("state"));
    command.env("DBUS_SESSION_BUS_ADDRESS", daemon.address()).env("XDG_RUNTIME_DIR", &dir);
    Ended(command.stderr(Stdio::null()).spawn().unwrap())
}
