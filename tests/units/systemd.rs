//! A systemd manager of our own making on a private bus: it knows the units it is told, and does what it is told.

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use futures_core::Stream;
use zbus::{Connection, Message, MessageStream, ObjectPath, Structure, Variant, message::Type};

const NAME: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
pub(crate) const STOP_JOB: &str = "/org/freedesktop/systemd1/job/77";

/// A unit.
#[derive(Clone, Debug)]
pub(crate) struct Unit {
    pub(crate) group: String,
    pub(crate) watchdog: u64,
    pub(crate) job: u32,
    pub(crate) state: &'static str,
}

impl Unit {
    pub(crate) fn of(group: &str) -> Self {
        // USEC_INFINITY is what a service without one has on old systemd, 0 on newer.
        Self { group: group.to_owned(), watchdog: u64::MAX, job: 0, state: "active" }
    }
}

/// What is done with StopUnit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopping {
    Grant,
    Refuse,
    /// No answer ever.
    Silent,
    /// Its connection ends before it answers.
    Vanish,
}

enum Order {
    Signal { path: String, interface: &'static str, member: &'static str, to: Option<String>, body: Signal },
    Quit,
}

enum Signal {
    JobNew(u32, String),
    JobRemoved(u32, String, &'static str),
    State(&'static str),
}

/// Ends with its drop.
pub(crate) struct Systemd {
    units: Arc<Mutex<HashMap<String, Unit>>>,
    orders: async_channel::Sender<Order>,
    /// Every call, with its first argument; of those for properties the last of a look, `ActiveState`.
    pub(crate) asked: mpsc::Receiver<(String, String)>,
    thread: Option<JoinHandle<()>>,
}

impl Systemd {
    pub(crate) fn start(address: &str, units: &[(&str, Unit)], stopping: Stopping) -> Self {
        let units = units.iter().map(|(name, unit)| ((*name).to_owned(), unit.clone())).collect();
        let units: Arc<Mutex<HashMap<String, Unit>>> = Arc::new(Mutex::new(units));
        let (orders, ordered) = async_channel::unbounded();
        let (asking, asked) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let (address, known) = (address.to_owned(), Arc::clone(&units));
        let thread = std::thread::spawn(move || {
            zbus::block_on(async move {
                let builder = zbus::connection::Builder::address(address.as_str());
                let connection = builder.build().await.unwrap();
                let mut stream = MessageStream::from(&connection);
                connection.request_name(NAME).await.unwrap();
                ready.send(()).unwrap();
                let mut ordered = std::pin::pin!(ordered);
                loop {
                    let next = poll_fn(|context| {
                        if let std::task::Poll::Ready(order) = ordered.as_mut().poll_next(context) {
                            return std::task::Poll::Ready(Err(order));
                        }
                        Pin::new(&mut stream).poll_next(context).map(Ok)
                    });
                    match next.await {
                        Ok(Some(Ok(call))) if call.message_type() == Type::MethodCall => {
                            if !answer(&connection, &call, &known, stopping, &asking).await {
                                break;
                            }
                        }
                        Ok(Some(Ok(_))) => {}
                        Err(Some(Order::Signal { path, interface, member, to, body })) => {
                            emit(&connection, &path, interface, member, to, body).await;
                        }
                        _ => break,
                    }
                }
                let _ = connection.close().await;
            });
        });
        is_ready.recv_timeout(Duration::from_secs(10)).unwrap();
        Self { units, orders, asked, thread: Some(thread) }
    }

    /// Waits until a unit has been looked at.
    pub(crate) fn expect_look(&self) {
        self.expect("Get");
    }

    pub(crate) fn set(&self, name: &str, change: impl FnOnce(&mut Unit)) {
        change(self.units.lock().unwrap().get_mut(name).unwrap());
    }

    pub(crate) fn job_new(&self, job: u32, unit: &str) {
        self.signal(PATH, MANAGER, "JobNew", None, Signal::JobNew(job, unit.to_owned()));
    }

    pub(crate) fn job_removed(&self, job: u32, unit: &str, result: &'static str) {
        self.signal(PATH, MANAGER, "JobRemoved", None, Signal::JobRemoved(job, unit.to_owned(), result));
    }

    pub(crate) fn state(&self, unit: &str, state: &'static str) {
        let properties = "org.freedesktop.DBus.Properties";
        self.set(unit, |unit| unit.state = state);
        self.signal(&path_of(unit), properties, "PropertiesChanged", None, Signal::State(state));
    }

    /// The next call of this method, and its first argument.
    pub(crate) fn expect(&self, member: &str) -> String {
        loop {
            let (called, argument) =
                self.asked.recv_timeout(Duration::from_secs(10)).unwrap_or_else(|_| panic!("no {member}"));
            if called == member {
                return argument;
            }
        }
    }

    fn signal(&self, path: &str, interface: &'static str, member: &'static str, to: Option<String>, body: Signal) {
        let _ = self.orders.try_send(Order::Signal { path: path.to_owned(), interface, member, to, body });
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = self.orders.try_send(Order::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A job of a unit, told by somebody who is not systemd, straight to `to`.
pub(crate) async fn forge(connection: &Connection, to: &str, unit: &str) {
    emit(connection, PATH, MANAGER, "JobNew", Some(to.to_owned()), Signal::JobNew(5, unit.to_owned())).await;
}

async fn emit(
    connection: &Connection,
    path: &str,
    interface: &'static str,
    member: &'static str,
    to: Option<String>,
    body: Signal,
) {
    let job = |number: u32| ObjectPath::try_from(format!("{PATH}/job/{number}")).unwrap();
    let to = to.as_deref();
    match body {
        Signal::JobNew(number, unit) => {
            connection.emit_signal(to, path, interface, member, &(number, job(number), unit.as_str())).await
        }
        Signal::JobRemoved(number, unit, result) => {
            connection.emit_signal(to, path, interface, member, &(number, job(number), unit.as_str(), result)).await
        }
        Signal::State(state) => {
            let changed = HashMap::from([("ActiveState", Variant::from(state)), ("SubState", Variant::from("x"))]);
            let body = ("org.freedesktop.systemd1.Unit", changed, Vec::<&str>::new());
            connection.emit_signal(to, path, interface, member, &body).await
        }
    }
    .unwrap();
}

/// False when it is to vanish.
async fn answer(
    connection: &Connection,
    call: &Message,
    units: &Mutex<HashMap<String, Unit>>,
    stopping: Stopping,
    asking: &mpsc::Sender<(String, String)>,
) -> bool {
    let header = call.header();
    let member = header.member().unwrap().as_str().to_owned();
    let body = call.body();
    if member == "Get" {
        let (interface, property): (&str, &str) = body.deserialize().unwrap();
        let unit = {
            let units = units.lock().unwrap();
            let path = header.path().unwrap().as_str();
            units.iter().find(|(name, _)| path_of(name) == path).map(|(name, unit)| (name.clone(), unit.clone()))
        };
        let (name, unit) = unit.unwrap();
        let kind = if name.ends_with(".scope") { "Scope" } else { "Service" };
        let value = match (interface.rsplit_once('.').unwrap().1, property) {
            (of, "ControlGroup") if of == kind => Variant::from(unit.group.clone()),
            ("Service", "WatchdogUSec") if kind == "Service" => Variant::from(unit.watchdog),
            ("Unit", "Job") => {
                let path = ObjectPath::try_from(if unit.job == 0 {
                    "/".to_owned()
                } else {
                    format!("{PATH}/job/{}", unit.job)
                });
                Variant::from(Structure::from((unit.job, path.unwrap())))
            }
            ("Unit", "ActiveState") => Variant::from(unit.state),
            other => panic!("systemd has no property {other:?} of {name}"),
        };
        connection.reply(&header, &value).await.unwrap();
        if property == "ActiveState" {
            asking.send((member, property.to_owned())).unwrap_or_default();
        }
        return true;
    }
    let first = body.deserialize::<&str>().or_else(|_| body.deserialize::<(&str, &str)>().map(|(unit, _)| unit));
    let first = first.unwrap_or_default().to_owned();
    asking.send((member.clone(), first.clone())).unwrap_or_default();
    match &*member {
        "GetUnit" if units.lock().unwrap().contains_key(&first) => {
            connection.reply(&header, &ObjectPath::try_from(path_of(&first)).unwrap()).await.unwrap();
        }
        "GetUnit" => {
            let error = "org.freedesktop.systemd1.NoSuchUnit";
            connection.reply_error(&header, error, &format!("Unit {first} not loaded.").as_str()).await.unwrap();
        }
        "StopUnit" => {
            assert_eq!(body.deserialize::<(&str, &str)>().unwrap().1, "replace");
            match stopping {
                Stopping::Grant => {
                    connection.reply(&header, &ObjectPath::try_from(STOP_JOB).unwrap()).await.unwrap();
                }
                Stopping::Refuse => {
                    let error = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired";
                    connection.reply_error(&header, error, &"Interactive authentication required.").await.unwrap();
                }
                Stopping::Silent => {}
                Stopping::Vanish => return false,
            }
        }
        "Subscribe" | "Unsubscribe" => {}
        other => panic!("systemd was asked to {other}"),
    }
    true
}

fn path_of(unit: &str) -> String {
    let escaped: String = unit
        .bytes()
        .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("_{b:02x}") })
        .collect();
    format!("{PATH}/unit/{escaped}")
}
