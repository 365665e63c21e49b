//! A private dbus-daemon as the system bus, stand-ins for the services on it, and the loop's side.
//!
//! The stand-ins answer GetAll and Inhibit and send signals as the D-Bus APIs of the real ones say: UPower 1.90, NetworkManager
//! 1.42, ModemManager 1.20, systemd 252.

#[path = "../support/dbus.rs"]
mod dbus;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{PipeReader, Read},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use futures_core::Stream;
use mio::{Events, Poll, Token};
use nightporter::{
    event::Event,
    model::{Network, NetworkKind, Reach, Surroundings},
    sys::{
        bus::BusThread,
        inbox::{self, Inbox, Incoming},
        surroundings,
    },
};
use zbus::{Connection, Message, MessageStream, ObjectPath, Variant, connection::Builder, message::Type};

pub(crate) use self::dbus::Daemon;

pub(crate) const LOW_BATTERY: u8 = 15;
/// Longer than anything here takes on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) const LOGIND: &str = "org.freedesktop.login1";
pub(crate) const LOGIND_PATH: &str = "/org/freedesktop/login1";
pub(crate) const MANAGER: &str = "org.freedesktop.login1.Manager";
pub(crate) const UPOWER: &str = "org.freedesktop.UPower";
pub(crate) const UPOWER_PATH: &str = "/org/freedesktop/UPower";
pub(crate) const BATTERY_PATH: &str = "/org/freedesktop/UPower/devices/DisplayDevice";
pub(crate) const BATTERY: &str = "org.freedesktop.UPower.Device";
pub(crate) const NM: &str = "org.freedesktop.NetworkManager";
pub(crate) const NM_PATH: &str = "/org/freedesktop/NetworkManager";
pub(crate) const ACTIVE: &str = "org.freedesktop.NetworkManager.Connection.Active";
pub(crate) const ACCESS_POINT: &str = "org.freedesktop.NetworkManager.AccessPoint";
pub(crate) const DEVICE: &str = "org.freedesktop.NetworkManager.Device";
pub(crate) const DEVICE_MODEM: &str = "org.freedesktop.NetworkManager.Device.Modem";
pub(crate) const MM: &str = "org.freedesktop.ModemManager1";
pub(crate) const MODEM_PATH: &str = "/org/freedesktop/ModemManager1/Modem/0";
pub(crate) const MODEM_3GPP: &str = "org.freedesktop.ModemManager1.Modem.Modem3gpp";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

impl Daemon {
    /// Not started yet.
    pub(crate) fn prepared() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            "<busconfig><type>system</type><listen>unix:path={}/socket</listen><auth>EXTERNAL</auth>\
             <policy context=\"default\"><allow user=\"*\"/><allow send_destination=\"*\"/><allow send_type=\"signal\"/>\
             <allow send_requested_reply=\"true\" send_type=\"method_return\"/>\
             <allow send_requested_reply=\"true\" send_type=\"error\"/><allow receive_type=\"method_call\"/>\
             <allow receive_type=\"method_return\"/><allow receive_type=\"error\"/>\
             <allow receive_type=\"signal\"/><allow own=\"*\"/></policy></busconfig>",
            dir.path().display()
        );
        fs::write(dir.path().join("bus.conf"), config).unwrap();
        Self::configured(dir)
    }

    pub(crate) fn new() -> Self {
        let mut daemon = Self::prepared();
        daemon.start();
        daemon
    }
}

/// The loop's side.
pub(crate) struct World {
    poll: Poll,
    inbox: Inbox,
    bus: Option<BusThread>,
    pub(crate) surroundings: surroundings::Surroundings,
}

impl World {
    pub(crate) fn on(daemon: &Daemon) -> Self {
        let poll = Poll::new().unwrap();
        let (sender, inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        let (surroundings, task) = surroundings::Surroundings::new(Some(daemon.address()), LOW_BATTERY, sender.clone());
        let bus = BusThread::spawn_with(Vec::new(), None, false, sender, task).unwrap();
        Self { poll, inbox, bus: Some(bus), surroundings }
    }

    pub(crate) fn event_within(&mut self, limit: Duration) -> Option<Event> {
        let until = Instant::now() + limit;
        let mut events = Events::with_capacity(4);
        loop {
            match self.inbox.take() {
                Some(Incoming::Event(event)) => return Some(event),
                Some(other) => panic!("{other:?}"),
                None => {}
            }
            let left = until.checked_duration_since(Instant::now())?;
            let _ = self.poll.poll(&mut events, Some(left));
        }
    }

    /// The next event.
    pub(crate) fn event(&mut self) -> Event {
        self.event_within(LIMIT).expect("nothing was told")
    }

    /// The next event, which must be about the surroundings.
    pub(crate) fn told(&mut self) -> Surroundings {
        match self.event() {
            Event::Surroundings(surroundings) => surroundings,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(bus) = self.bus.take() {
            bus.stop();
        }
    }
}

type Properties = Vec<(&'static str, Variant<'static>)>;

/// Properties by path and interface.
type Objects = BTreeMap<(String, String), HashMap<String, Variant<'static>>>;

/// What was done with Inhibit.
pub(crate) struct Inhibited {
    /// What, who, why, mode.
    pub(crate) arguments: (String, String, String, String),
    reader: PipeReader,
}

impl Inhibited {
    /// Whether the lock is let go: every copy of the other end is closed.
    pub(crate) fn released(&mut self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut fds = [PollFd::new(self.reader.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() != 0 && self.reader.read(&mut [0]).unwrap() == 0
    }

    pub(crate) fn wait_released(&mut self) {
        let until = Instant::now() + LIMIT;
        while !self.released() {
            assert!(Instant::now() < until, "the {} lock is still held", self.arguments.3);
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// How a stand-in behaves; can be changed at any time.
#[derive(Default)]
pub(crate) struct Manners {
    /// Refuses locks.
    pub(crate) refuses: AtomicBool,
    /// Gives its answers only once this is false again.
    pub(crate) holds_back: AtomicBool,
    /// Never answers GetAll.
    pub(crate) silent: AtomicBool,
}

/// A stand-in for a service.
pub(crate) struct Fake {
    objects: Arc<Mutex<Objects>>,
    pub(crate) manners: Arc<Manners>,
    /// Every Inhibit.
    pub(crate) inhibited: mpsc::Receiver<Inhibited>,
    /// Path and interface of every GetAll, path and `Inhibit` of every Inhibit, as they come in.
    pub(crate) asked: mpsc::Receiver<(String, String)>,
    out: async_channel::Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    /// On the bus, with its name once there is anything to say.
    pub(crate) fn start(daemon: &Daemon, name: &'static str, objects: Objects) -> Self {
        let objects = Arc::new(Mutex::new(objects));
        let manners = Arc::new(Manners::default());
        let (inhibit, inhibited) = mpsc::channel();
        let (ask, asked) = mpsc::channel();
        let (out, outgoing) = async_channel::unbounded::<Message>();
        let (told, ready) = mpsc::channel();
        let address = daemon.address();
        let server = Server { objects: Arc::clone(&objects), manners: Arc::clone(&manners), inhibit, ask };
        let thread = thread::spawn(move || {
            zbus::block_on(async move {
                let connection = Builder::address(address.as_str()).build().await.unwrap();
                let stream = MessageStream::from(&connection);
                if !name.is_empty() {
                    connection.request_name(name).await.unwrap();
                }
                told.send(()).unwrap();
                let serving = connection.clone();
                let task = zruntime::spawn(async move { server.serve(&serving, stream).await });
                while let Ok(message) = outgoing.recv().await {
                    connection.send(&message).await.unwrap();
                }
                let _ = task.cancel().await;
                let _ = connection.close().await;
            });
        });
        ready.recv_timeout(LIMIT).unwrap();
        Self { objects, manners, inhibited, asked, out, thread: Some(thread) }
    }

    /// Changes properties without a word.
    pub(crate) fn put(&self, path: &str, interface: &str, properties: Properties) {
        let mut objects = self.objects.lock().unwrap();
        let object = objects.entry((path.into(), interface.into())).or_default();
        object.extend(properties.into_iter().map(|(name, value)| (name.to_owned(), value)));
    }

    /// Changes properties and says so.
    pub(crate) fn set(&self, path: &str, interface: &str, properties: Properties) {
        self.changed(path, interface, &properties, &[]);
        self.put(path, interface, properties);
    }

    /// Says that properties have changed.
    pub(crate) fn changed(
        &self,
        path: &str,
        interface: &str,
        changed: &[(&'static str, Variant<'static>)],
        invalidated: &[&str],
    ) {
        let changed: HashMap<&str, &Variant<'_>> = changed.iter().map(|(name, value)| (*name, value)).collect();
        self.signal(path, PROPERTIES, "PropertiesChanged", &(interface, changed, invalidated));
    }

    pub(crate) fn signal<B: serde::Serialize + zbus::DynamicType>(
        &self,
        path: &str,
        interface: &str,
        member: &str,
        body: &B,
    ) {
        let message = Message::signal(path, interface, member).build(body).unwrap();
        self.out.try_send(message).unwrap();
    }

    pub(crate) fn prepare_for_sleep(&self, start: bool) {
        self.signal(LOGIND_PATH, MANAGER, "PrepareForSleep", &start);
    }

    /// The next lock asked for.
    pub(crate) fn lock(&self) -> Inhibited {
        self.inhibited.recv_timeout(LIMIT).expect("no lock was asked for")
    }

    /// Waits until a lock has been asked for, not until it was given or refused.
    pub(crate) fn wait_asked_for_lock(&self) {
        assert_eq!(self.asked.recv_timeout(LIMIT).unwrap(), (LOGIND_PATH.to_owned(), "Inhibit".to_owned()));
    }

    /// Leaves the bus.
    pub(crate) fn quit(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.manners.holds_back.store(false, Ordering::Relaxed);
        self.out.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.end();
    }
}

struct Server {
    objects: Arc<Mutex<Objects>>,
    manners: Arc<Manners>,
    inhibit: mpsc::Sender<Inhibited>,
    ask: mpsc::Sender<(String, String)>,
}

impl Server {
    async fn serve(self, connection: &Connection, mut stream: MessageStream) {
        loop {
            let next = std::future::poll_fn(|context| std::pin::Pin::new(&mut stream).poll_next(context)).await;
            let Some(Ok(call)) = next else { return };
            if call.message_type() != Type::MethodCall {
                continue;
            }
            let header = call.header();
            if header.member().is_some_and(|member| member.as_str() == "ListInhibitors") {
                // Asked by others than those that are tested here.
                let _ = connection.reply(&header, &Vec::<(&str, &str, &str, &str, u32, u32)>::new()).await;
                continue;
            }
            let body = call.body();
            let about = body.deserialize::<&str>().unwrap_or("Inhibit");
            let _ = self.ask.send((header.path().unwrap().to_string(), about.to_owned()));
            while self.manners.holds_back.load(Ordering::Relaxed) {
                zruntime::SharedRuntime::current().unwrap().sleep(Duration::from_millis(5)).await;
            }
            let done = match header.member().unwrap().as_str() {
                "GetAll" => {
                    let interface: &str = body.deserialize().unwrap();
                    let key = (header.path().unwrap().to_string(), interface.to_owned());
                    if self.manners.silent.load(Ordering::Relaxed) {
                        continue;
                    }
                    let properties = self.objects.lock().unwrap().get(&key).map(|properties| {
                        let owned = |(name, value): (&String, &Variant<'_>)| {
                            (name.clone(), value.try_to_owned().map(Variant::from).unwrap())
                        };
                        properties.iter().map(owned).collect::<HashMap<String, Variant<'static>>>()
                    });
                    match properties {
                        Some(properties) => connection.reply(&header, &properties).await,
                        None => {
                            let error = "org.freedesktop.DBus.Error.UnknownObject";
                            connection.reply_error(&header, error, &"there is no such object").await
                        }
                    }
                }
                "Inhibit" if self.manners.refuses.load(Ordering::Relaxed) => {
                    let error = "org.freedesktop.DBus.Error.AccessDenied";
                    connection.reply_error(&header, error, &"Permission denied").await
                }
                "Inhibit" => {
                    let (reader, writer) = std::io::pipe().unwrap();
                    let writer = zbus::OwnedFd::from(OwnedFd::from(writer));
                    let done = connection.reply(&header, &writer).await;
                    drop(writer);
                    let _ = self.inhibit.send(Inhibited { arguments: body.deserialize().unwrap(), reader });
                    done
                }
                other => panic!("nobody calls {other}"),
            };
            // Whoever asked may be gone.
            let _ = done;
        }
    }
}

pub(crate) fn path(path: &'static str) -> Variant<'static> {
    Variant::from(ObjectPath::try_from(path).unwrap())
}

pub(crate) fn paths(path: &'static str) -> Variant<'static> {
    Variant::from(vec![ObjectPath::try_from(path).unwrap()])
}

fn objects(list: Vec<(&str, &str, Properties)>) -> Objects {
    let object = |(path, interface, properties): (&str, &str, Properties)| {
        let properties = properties.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        ((path.to_owned(), interface.to_owned()), properties)
    };
    list.into_iter().map(object).collect()
}

pub(crate) fn logind(daemon: &Daemon) -> Fake {
    Fake::start(daemon, LOGIND, Objects::new())
}

/// With a battery, discharging.
pub(crate) fn upower(daemon: &Daemon, percent: f64) -> Fake {
    Fake::start(
        daemon,
        UPOWER,
        objects(vec![
            (UPOWER_PATH, UPOWER, vec![("DaemonVersion", "0.99.20".into()), ("OnBattery", true.into())]),
            (
                BATTERY_PATH,
                BATTERY,
                vec![
                    ("Type", 2_u32.into()),
                    ("IsPresent", true.into()),
                    ("Percentage", percent.into()),
                    ("State", 2_u32.into()),
                    ("TimeToEmpty", 7200_i64.into()),
                ],
            ),
        ]),
    )
}

/// On Wi-Fi, with a cable (`/…/ActiveConnection/2`) and a modem (`/…/ActiveConnection/3`) to go over to.
pub(crate) fn network_manager(daemon: &Daemon) -> Fake {
    let active = |kind: &'static str, id: &'static str, specific: &'static str, device: &'static str| {
        vec![
            ("Type", kind.into()),
            ("Id", id.into()),
            ("Uuid", "7d0f6e8e-9d5f-4f7c-9d9c-0a8a3a3b2f11".into()),
            ("State", 2_u32.into()),
            ("SpecificObject", path(specific)),
            ("Devices", paths(device)),
        ]
    };
    Fake::start(
        daemon,
        NM,
        objects(vec![
            (
                NM_PATH,
                NM,
                vec![
                    ("Startup", false.into()),
                    ("State", 70_u32.into()),
                    ("Connectivity", 4_u32.into()),
                    ("Metered", 4_u32.into()),
                    ("PrimaryConnection", path(WIFI)),
                    ("Version", "1.42.4".into()),
                ],
            ),
            (WIFI, ACTIVE, active("802-11-wireless", "Home", POINT, "/org/freedesktop/NetworkManager/Devices/2")),
            (POINT, ACCESS_POINT, vec![("Ssid", b"Home 5G".to_vec().into()), ("Strength", 70_u8.into())]),
            (CABLE, ACTIVE, active("802-3-ethernet", "Dock", "/", "/org/freedesktop/NetworkManager/Devices/1")),
            (MOBILE, ACTIVE, active("gsm", "Provider", "/", MODEM_DEVICE)),
            (MODEM_DEVICE, DEVICE, vec![("Udi", MODEM_PATH.into()), ("Interface", "cdc-wdm0".into())]),
            (MODEM_DEVICE, DEVICE_MODEM, vec![("OperatorCode", "26201".into()), ("Apn", "internet".into())]),
        ]),
    )
}

pub(crate) const WIFI: &str = "/org/freedesktop/NetworkManager/ActiveConnection/1";
pub(crate) const CABLE: &str = "/org/freedesktop/NetworkManager/ActiveConnection/2";
pub(crate) const MOBILE: &str = "/org/freedesktop/NetworkManager/ActiveConnection/3";
pub(crate) const POINT: &str = "/org/freedesktop/NetworkManager/AccessPoint/17";
pub(crate) const MODEM_DEVICE: &str = "/org/freedesktop/NetworkManager/Devices/3";

/// Registered in the home network, or abroad.
pub(crate) fn modem_manager(daemon: &Daemon, registration: u32) -> Fake {
    let properties = vec![("RegistrationState", registration.into()), ("OperatorCode", "26201".into())];
    Fake::start(daemon, MM, objects(vec![(MODEM_PATH, MODEM_3GPP, properties)]))
}

/// On the Internet by Wi-Fi, as [`network_manager`] has it.
pub(crate) fn home() -> Network {
    Network { kind: NetworkKind::Wifi, id: Some("wifi/Home 5G".into()), reach: Reach::Full, ..Network::default() }
}

/// By modem.
pub(crate) fn mobile(roaming: bool) -> Network {
    Network {
        kind: NetworkKind::Mobile,
        id: Some("mobile/26201/internet".into()),
        metered: true,
        roaming,
        reach: Reach::Full,
    }
}
