//! Who notifies the user on a session bus, while somebody wants to know: a second connection that the bus has become a monitor
//! of. It is told who calls, never what is said; the texts are read past.
//!
//! What cannot be seen in full (a message too large, one with file descriptors, too many) ends the watch, so that nobody is
//! blamed for what was missed.

use std::{
    collections::BTreeMap,
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
};

use futures_core::Stream;
use zbus::{Connection, MessageStream, message::Type};
use zruntime::SharedRuntime;

use super::{
    session::{self, CONNECT_LIMIT, Way},
    wire::BUS_NAME,
};
use crate::{
    event::Event,
    model::{Bus, Owner},
    sys::{
        clock,
        inbox::{Incoming, Sender},
        users::door::Door,
    },
    time::Instant,
};

/// What an app calls to notify the user: the desktop's own interface, the portal's, and that of GNOME's shell.
const CALLS: [(&str, &str); 3] = [
    ("org.freedesktop.Notifications", "Notify"),
    ("org.freedesktop.portal.Notification", "AddNotification"),
    ("org.gtk.Notifications", "AddNotification"),
];
/// Notifications in one second; nobody reads more, and the loop is not to be kept busy with them.
const MOST: u32 = 64;
/// Senders whose process is remembered.
const SENDERS: usize = 64;

/// Watches until it is dropped, or cannot go on.
pub(super) async fn watch(bus: Bus, way: Way, inbox: Sender) {
    let Ok(runtime) = SharedRuntime::current() else { return };
    if let Err(text) = follow(bus, &way, &runtime, &inbox).await {
        log::info!("{bus} bus: notifications are not watched: {text}");
    }
    let _ = inbox.event(Event::NotificationsSeen(bus, false));
}

async fn follow(bus: Bus, way: &Way, runtime: &SharedRuntime, inbox: &Sender) -> Result<(), String> {
    let connection = connect(bus, way, runtime).await?;
    let mut stream = MessageStream::from(&connection);
    let rules =
        CALLS.map(|(interface, member)| format!("type='method_call',interface='{interface}',member='{member}'"));
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let arguments = (rules, 0_u32);
    let become_one = connection.call_method(
        Some(BUS_NAME),
        "/org/freedesktop/DBus",
        Some("org.freedesktop.DBus.Monitoring"),
        "BecomeMonitor",
        &arguments,
    );
    in_time(runtime, become_one).await?;
    log::debug!("{bus} bus: notifications are watched");
    let _ = inbox.event(Event::NotificationsSeen(bus, true));
    let mut processes = Processes { bus, way, runtime, connection: None, known: BTreeMap::new() };
    let (mut since, mut count) = (Instant::default(), 0);
    loop {
        let message = poll_fn(|context| Pin::new(&mut stream).poll_next(context)).await;
        let message = match message {
            Some(Ok(message)) => message,
            Some(Err(error)) => return Err(error.to_string()),
            None => return Err("the connection ended".into()),
        };
        let header = message.header();
        let called = header.interface().zip(header.member());
        let notifies = called.is_some_and(|(interface, member)| CALLS.contains(&(interface.as_str(), member.as_str())));
        let Some(sender) = header.sender().filter(|_| notifies && message.message_type() == Type::MethodCall) else {
            continue;
        };
        let now = clock::boot();
        if now.since(since).as_secs() >= 1 {
            (since, count) = (now, 0);
        }
        count += 1;
        if count > MOST {
            return Err(format!("more than {MOST} of them in a second"));
        }
        let pid = processes.of(sender.as_str()).await;
        let owner = Owner(sender.as_str().into());
        if !inbox.send(Incoming::Notified { bus, owner, pid }) {
            return Ok(());
        }
    }
}

/// Asks whose process a sender is, on a connection of its own: a monitor may not say anything.
struct Processes<'a> {
    bus: Bus,
    way: &'a Way,
    runtime: &'a SharedRuntime,
    connection: Option<Connection>,
    /// A unique name is never used twice.
    known: BTreeMap<Arc<str>, Option<u32>>,
}

impl Processes<'_> {
    async fn of(&mut self, sender: &str) -> Option<u32> {
        if let Some(known) = self.known.get(sender) {
            return *known;
        }
        let asked = self.ask(sender).await;
        let pid = asked.inspect_err(|text| log::debug!("{} bus: whose {sender} is: {text}", self.bus)).ok();
        if self.known.len() >= SENDERS {
            self.known.clear();
        }
        self.known.insert(sender.into(), pid);
        pid
    }

    async fn ask(&mut self, sender: &str) -> Result<u32, String> {
        let connection = match &self.connection {
            Some(connection) => connection,
            None => self.connection.insert(connect(self.bus, self.way, self.runtime).await?),
        };
        let (path, member) = ("/org/freedesktop/DBus", "GetConnectionUnixProcessID");
        let call = connection.call_method(Some(BUS_NAME), path, Some(BUS_NAME), member, &sender);
        let reply = in_time(self.runtime, call).await?;
        reply.body().deserialize::<u32>().map_err(|error| error.to_string())
    }
}

async fn connect(bus: Bus, way: &Way, runtime: &SharedRuntime) -> Result<Connection, String> {
    match way {
        Way::User(user, errands) => Door::strict(user.clone(), errands.clone()).connect().await,
        Way::Address(address) => in_time(runtime, session::connect(address.clone(), bus)).await,
    }
}

async fn in_time<T>(runtime: &SharedRuntime, work: impl Future<Output = zbus::Result<T>>) -> Result<T, String> {
    match runtime.timeout(CONNECT_LIMIT, work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("the bus does not answer".into()),
    }
}
