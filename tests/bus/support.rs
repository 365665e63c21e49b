//! A private dbus-daemon, the loop's side of the bus thread, and apps of every kind.

#[path = "../support/dbus.rs"]
mod dbus;

use std::{
    collections::VecDeque,
    fs,
    future::Future,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mio::{Events, Poll, Token};
use nightporter::{
    action::{Action, ConnectorCall, Reply},
    event::{BusEvent, CallId, CallOutcome, Caller, DeliveryTicket, Event, Request},
    model::{AppKey, Bus, ConnectorVersion, Owner},
    sys::{
        bus::{BusAddress, BusThread},
        inbox::{self, Inbox, Incoming, Process},
    },
};
use serde::Serialize;
use zbus::{Connection, DynamicType, Message, MessageStream, connection::Builder, message::Type};

pub(crate) use self::dbus::Daemon;

pub(crate) const UID: u32 = 4242;
pub(crate) const BUS: Bus = Bus::Session(UID);
pub(crate) const DISTRIBUTOR: &str = "org.unifiedpush.Distributor.nightporter";
pub(crate) const DISTRIBUTOR_PATH: &str = "/org/unifiedpush/Distributor";
pub(crate) const CONNECTOR_PATH: &str = "/org/unifiedpush/Connector";

impl Daemon {
    pub(crate) fn new() -> Self {
        let policy = "<allow send_destination=\"*\" eavesdrop=\"true\"/><allow eavesdrop=\"true\"/><allow own=\"*\"/>";
        Self::with(&format!("<policy context=\"default\">{policy}</policy>"), "")
    }

    /// With the rules of a distribution's system bus and one more policy file.
    pub(crate) fn like_system(policy: &str) -> Self {
        let default = "<policy context=\"default\"><allow user=\"*\"/><deny own=\"*\"/><deny send_type=\"method_call\"/>\
             <allow send_type=\"signal\"/><allow send_requested_reply=\"true\" send_type=\"method_return\"/>\
             <allow send_requested_reply=\"true\" send_type=\"error\"/><allow receive_type=\"method_call\"/>\
             <allow receive_type=\"method_return\"/><allow receive_type=\"error\"/><allow receive_type=\"signal\"/>\
             <allow send_destination=\"org.freedesktop.DBus\" send_interface=\"org.freedesktop.DBus\"/>\
             <allow own=\"org.example.Allowed\"/></policy><include>policy.conf</include>";
        Self::with(default, policy)
    }

    pub(crate) fn with(rules: &str, included: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("services")).unwrap();
        let config = format!(
            "<busconfig><type>session</type><listen>unix:path={0}/socket</listen><auth>EXTERNAL</auth>\
             <servicedir>{0}/services</servicedir>\
             <limit name=\"max_replies_per_connection\">50000</limit>{rules}</busconfig>",
            dir.path().display()
        );
        fs::write(dir.path().join("bus.conf"), config).unwrap();
        fs::write(dir.path().join("policy.conf"), included).unwrap();
        let mut daemon = Self::configured(dir);
        daemon.start();
        daemon
    }

    /// Puts a D-Bus service file for `name`.
    pub(crate) fn service(&self, name: &str, lines: &str) {
        let text = format!("[D-BUS Service]\nName={name}\n{lines}\n");
        fs::write(self.path(&format!("services/{name}.service")), text).unwrap();
    }
}

/// The loop's side: takes what the bus thread says and gives it orders.
pub(crate) struct Loop {
    poll: Poll,
    inbox: Inbox,
    pub(crate) bus: Option<BusThread>,
    waiting: VecDeque<Incoming>,
    ticket: u64,
}

impl Loop {
    pub(crate) fn on(addresses: Vec<BusAddress>) -> Self {
        Self::with(addresses, false)
    }

    /// `panel`: with what KDE's settings panel needs.
    pub(crate) fn with(addresses: Vec<BusAddress>, panel: bool) -> Self {
        let poll = Poll::new().unwrap();
        let (sender, inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        let bus = BusThread::spawn(addresses, panel, sender).unwrap();
        Self { poll, inbox, bus: Some(bus), waiting: VecDeque::new(), ticket: 0 }
    }

    /// Serving `daemon`, and up.
    pub(crate) fn up(daemon: &Daemon) -> Self {
        let mut this = Self::on(vec![BusAddress { bus: BUS, address: Some(daemon.address()) }]);
        this.expect(|incoming| matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(BUS)))).then_some(()));
        this
    }

    pub(crate) fn perform(&self, action: Action) {
        self.bus.as_ref().unwrap().perform(action);
    }

    pub(crate) fn reply(&self, call: CallId, reply: Reply) {
        self.perform(Action::Reply(call, reply));
    }

    fn fresh(&mut self, until: Instant) -> Option<Incoming> {
        let mut events = Events::with_capacity(4);
        loop {
            if let Some(incoming) = self.inbox.take() {
                return Some(incoming);
            }
            let left = until.checked_duration_since(Instant::now())?;
            let _ = self.poll.poll(&mut events, Some(left));
        }
    }

    /// The first thing that `pick` takes; others stay for later, in order.
    pub(crate) fn expect<T>(&mut self, pick: impl FnMut(&Incoming) -> Option<T>) -> T {
        self.expect_within(Duration::from_secs(10), pick)
            .unwrap_or_else(|| panic!("not told; waiting: {:?}", self.waiting))
    }

    pub(crate) fn expect_within<T>(
        &mut self,
        limit: Duration,
        mut pick: impl FnMut(&Incoming) -> Option<T>,
    ) -> Option<T> {
        for at in 0..self.waiting.len() {
            if let Some(picked) = pick(&self.waiting[at]) {
                self.waiting.remove(at);
                return Some(picked);
            }
        }
        let until = Instant::now() + limit;
        loop {
            let incoming = self.fresh(until)?;
            if let Some(picked) = pick(&incoming) {
                return Some(picked);
            }
            self.waiting.push_back(incoming);
        }
    }

    pub(crate) fn call(&mut self) -> (CallId, Caller, Request) {
        self.expect(|incoming| match incoming {
            Incoming::Event(Event::Bus(BusEvent::Call { call, caller, request })) => {
                Some((*call, caller.clone(), request.clone()))
            }
            _ => None,
        })
    }

    /// Whether the loop is asked nothing for a moment.
    pub(crate) fn no_call(&mut self) -> bool {
        self.expect_within(Duration::from_millis(150), |incoming| {
            matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Call { .. }))).then_some(())
        })
        .is_none()
    }

    pub(crate) fn owner(&mut self, app: &AppKey) -> Option<Owner> {
        self.expect(|incoming| match incoming {
            Incoming::Event(Event::Bus(BusEvent::OwnerChanged(about, owner))) if about == app => Some(owner.clone()),
            _ => None,
        })
    }

    pub(crate) fn process(&mut self, app: &AppKey) -> (Owner, Process) {
        let mut found = None;
        self.expect(|incoming| match incoming {
            Incoming::Process { app: about, owner, process } if about == app => {
                let process = process.as_ref().unwrap();
                let pidfd = process.pidfd.try_clone().unwrap();
                found = Some((owner.clone(), Process { pid: process.pid, uid: process.uid, pidfd }));
                Some(())
            }
            _ => None,
        });
        found.unwrap()
    }

    /// Asks for a call; its end is `done`.
    pub(crate) fn deliver(
        &mut self,
        app: &AppKey,
        owner: &Owner,
        version: ConnectorVersion,
        call: ConnectorCall,
    ) -> DeliveryTicket {
        self.ticket += 1;
        let ticket = DeliveryTicket(self.ticket);
        self.perform(Action::Call { ticket, app: app.clone(), owner: owner.clone(), version, call });
        ticket
    }

    pub(crate) fn done(&mut self, ticket: DeliveryTicket) -> CallOutcome {
        self.done_within(ticket, Duration::from_secs(10)).expect("the call did not end")
    }

    pub(crate) fn done_within(&mut self, ticket: DeliveryTicket, limit: Duration) -> Option<CallOutcome> {
        self.expect_within(limit, |incoming| match incoming {
            Incoming::Event(Event::Bus(BusEvent::CallDone(about, outcome))) if *about == ticket => {
                Some(outcome.clone())
            }
            _ => None,
        })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Some(bus) = self.bus.take() {
            bus.stop();
        }
    }
}

pub(crate) fn message(body: &[u8]) -> ConnectorCall {
    ConnectorCall::Message { token: "{t}".into(), body: body.into(), id: "7".into() }
}

pub(crate) async fn connect(address: &str) -> Connection {
    Builder::address(address).method_timeout(Duration::from_secs(20)).build().await.unwrap()
}

/// Runs a client on a thread of its own, as the loop's side is played by the test.
pub(crate) fn run<T: Send + 'static>(client: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    thread::spawn(|| zbus::block_on(client))
}

/// One call over a connection of its own.
pub(crate) fn call_once<B>(
    daemon: &Daemon,
    path: &'static str,
    interface: &'static str,
    member: &'static str,
    body: B,
) -> JoinHandle<zbus::Result<Message>>
where
    B: Serialize + DynamicType + Send + Sync + 'static,
{
    let address = daemon.address();
    run(async move {
        let client = connect(&address).await;
        client.call_method(Some(DISTRIBUTOR), path, Some(interface), member, &body).await
    })
}

/// Name and text of an error reply.
pub(crate) fn error_of(result: zbus::Result<Message>) -> (String, String) {
    match result.unwrap_err() {
        zbus::Error::MethodError(name, text, _) => (name.to_string(), text.unwrap_or_default()),
        zbus::Error::FDO(error) => {
            let text = zbus::DBusError::description(&*error).unwrap_or_default().to_owned();
            (zbus::DBusError::name(&*error).to_string(), text)
        }
        other => panic!("no error reply: {other}"),
    }
}

/// What an app does with a call of its connector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// An empty dictionary.
    Accept,
    /// A reply without a body.
    EmptyBody,
    /// A reply of a type the specification does not have.
    WrongBody,
    /// Nothing at the specification's path; accepts at `/`.
    OldPath,
    /// Nothing at either path.
    Nowhere,
    /// An error of its own.
    Fail,
    /// Accepts after this many milliseconds.
    Late(u64),
    /// Never answers the connector's methods; Ping it does answer.
    Silent,
    /// Answers nothing at all.
    Deaf,
}

/// An app in this process.
pub(crate) struct App {
    pub(crate) key: AppKey,
    pub(crate) owner: Owner,
    /// Every call it got, but Ping.
    pub(crate) calls: mpsc::Receiver<Message>,
    quit: async_channel::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl App {
    pub(crate) fn start(address: &str, name: &str, behaviour: Behaviour) -> Self {
        let (address, name) = (address.to_owned(), name.to_owned());
        let (told, unique) = mpsc::channel();
        let (seen, calls) = mpsc::channel();
        let (quit, quitting) = async_channel::bounded(1);
        let key = AppKey::new(BUS, name.as_str());
        let thread = run(async move {
            let connection = connect(&address).await;
            let stream = MessageStream::from(&connection);
            connection.request_name(name.as_str()).await.unwrap();
            told.send(connection.unique_name().unwrap().to_string()).unwrap();
            let serving = connection.clone();
            let task = zruntime::spawn(async move { answer_all(&serving, stream, behaviour, seen).await });
            let _ = quitting.recv().await;
            drop(task);
            let _ = connection.close().await;
        });
        let owner = Owner(unique.recv_timeout(Duration::from_secs(10)).unwrap().into());
        Self { key, owner, calls, quit, thread: Some(thread) }
    }

    pub(crate) fn quit(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.quit.try_send(());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.end();
    }
}

/// Serves a connector until the connection ends.
pub(crate) async fn answer_all(
    connection: &Connection,
    mut stream: MessageStream,
    behaviour: Behaviour,
    seen: mpsc::Sender<Message>,
) {
    use futures_core::Stream;
    loop {
        let next = std::future::poll_fn(|context| std::pin::Pin::new(&mut stream).poll_next(context)).await;
        let Some(Ok(call)) = next else { return };
        if call.message_type() != Type::MethodCall {
            continue;
        }
        answer(connection, &call, behaviour).await;
        if call.header().member().is_some_and(|member| member.as_str() != "Ping") {
            let _ = seen.send(call);
        }
    }
}

async fn answer(connection: &Connection, call: &Message, behaviour: Behaviour) {
    let header = call.header();
    if behaviour == Behaviour::Deaf {
        return;
    }
    if header.member().is_some_and(|member| member.as_str() == "Ping") {
        return connection.reply(&header, &()).await.unwrap();
    }
    let at_root = header.path().is_some_and(|path| path.as_str() == "/");
    let empty = std::collections::HashMap::<&str, zbus::Variant<'_>>::new();
    match behaviour {
        Behaviour::Accept => connection.reply(&header, &empty).await,
        Behaviour::EmptyBody => connection.reply(&header, &()).await,
        Behaviour::WrongBody => connection.reply(&header, &(1_u32, "x")).await,
        Behaviour::OldPath if at_root => connection.reply(&header, &()).await,
        Behaviour::OldPath | Behaviour::Nowhere => {
            connection.reply_error(&header, "org.freedesktop.DBus.Error.UnknownObject", &"not here").await
        }
        Behaviour::Fail => connection.reply_error(&header, "org.example.Broken", &"database locked").await,
        Behaviour::Late(millis) => {
            zruntime::SharedRuntime::current().unwrap().sleep(Duration::from_millis(millis)).await;
            connection.reply(&header, &empty).await
        }
        Behaviour::Silent | Behaviour::Deaf => Ok(()),
    }
    .unwrap();
}

/// This test program again, as an app in a process of its own: it runs only the test `app_process`.
pub(crate) fn app_command(address: &str, name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["app_process", "--exact", "--nocapture"]).env("NP_TEST_APP", format!("{address}|{name}"));
    command.stdout(Stdio::null());
    command
}

/// The body of `app_process`.
pub(crate) fn be_app() {
    let Ok(who) = std::env::var("NP_TEST_APP") else { return };
    let (address, name) = who.split_once('|').unwrap();
    let (address, name) = (address.to_owned(), name.to_owned());
    zbus::block_on(async move {
        let connection = connect(&address).await;
        let stream = MessageStream::from(&connection);
        connection.request_name(name.as_str()).await.unwrap();
        let (seen, _calls) = mpsc::channel();
        answer_all(&connection, stream, Behaviour::Accept, seen).await;
    });
}

/// A process that is ended with the test.
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
