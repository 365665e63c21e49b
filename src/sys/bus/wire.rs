//! One connection's outgoing side: messages waiting to be written, and calls of ours waiting for a reply.
//!
//! Calls are kept by serial here, not as futures: every reply and every signal of a bus then comes through one place in
//! the order the bus sent them, which is what makes "the owner now, and each change" free of races.

use std::{collections::HashMap, num::NonZeroU32, sync::Arc};

use serde::Serialize;
use zbus::{DynamicType, Message, message::Type};

use super::{manager::Asked, process::Purpose, transfers::Handed};
use crate::{
    event::{BusEvent, Event, NoticeTicket, TransferTicket},
    model::{AppKey, Bus, LeaseId},
    sys::inbox::{Incoming, Process, Sender},
};

pub(super) use crate::sys::asking::BUS_NAME;

/// The outgoing side of a connection.
pub(super) struct Wire {
    /// Which bus.
    pub(super) bus: Bus,
    /// Whether file descriptors are taken from it.
    pub(super) takes_fds: bool,
    inbox: Sender,
    out: Vec<Message>,
    /// Leases to hand out, each with the call that asked for it.
    leases: Vec<(Message, LeaseId)>,
    /// Files to hand out, each with the call that asked for it.
    files: Vec<(Message, Handed)>,
    // As many as the core has deliveries and watches, plus one per waiting caller.
    pending: HashMap<NonZeroU32, (Arc<str>, Pending)>,
}

/// What a reply is for.
pub(super) enum Pending {
    /// RequestName of the name with this index.
    Name(usize),
    /// RequestName of the name KDE's panel looks for.
    PanelName,
    /// GetConnectionUnixProcessID of whoever has the name with this index.
    Holder(usize),
    /// AddMatch for this name.
    Match(AppKey),
    /// GetNameOwner of a watched name, with the count of watches at the time.
    Owner(AppKey, u64),
    /// GetConnectionCredentials of this unique name.
    Credentials(Arc<str>, Purpose),
    /// GetConnectionUnixUser of this unique name.
    User(Arc<str>, Purpose),
    /// GetConnectionUnixProcessID of this unique name, which is of the user with this number.
    Number(Arc<str>, Purpose, u32),
    /// NameHasOwner of this unique name, after its process was opened.
    Alive(Arc<str>, Purpose, Process),
    /// GetNameOwner of the service that the first waiting call of this sender is about.
    Service(Arc<str>),
    /// A connector's method, by delivery number.
    Delivery(u64),
    /// The Ping behind it.
    Ping(u64),
    /// WillSuspend, by app and ticket.
    Notice(AppKey, NoticeTicket),
    /// TransferDone.
    Transfer(TransferTicket),
    /// Something about systemd.
    Manager(Asked),
}

/// A reply.
pub(super) type Response = Result<Message, Failure>;

/// An error reply.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// D-Bus error name.
    pub(super) name: String,
    /// Its text, if it has one.
    pub(super) text: String,
    /// Whether the bus itself made it, not the one that was called.
    pub(super) by_bus: bool,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.text.is_empty() { f.write_str(&self.name) } else { write!(f, "{}: {}", self.name, self.text) }
    }
}

impl Wire {
    pub(super) fn new(bus: Bus, inbox: Sender, takes_fds: bool) -> Self {
        Self { bus, takes_fds, inbox, out: Vec::new(), leases: Vec::new(), files: Vec::new(), pending: HashMap::new() }
    }

    /// Tells the loop.
    pub(super) fn event(&self, event: BusEvent) {
        self.tell(Incoming::Event(Event::Bus(event)));
    }

    /// Tells the loop.
    pub(super) fn tell(&self, incoming: Incoming) {
        // False means that the loop is gone; then the daemon is ending and so will this thread.
        let _ = self.inbox.send(incoming);
    }

    /// Calls a method of the bus; the reply comes with `pending`.
    pub(super) fn ask_bus<B: Serialize + DynamicType>(&mut self, member: &'static str, body: &B, pending: Pending) {
        if let Some(message) = bus_call(member, body) {
            self.call(BUS_NAME.into(), message, pending);
        }
    }

    /// Calls a method of the bus whose reply does not matter.
    pub(super) fn tell_bus<B: Serialize + DynamicType>(&mut self, member: &'static str, body: &B) {
        self.out.extend(bus_call(member, body));
    }

    /// Sends a method call; the reply comes with `pending`.
    pub(super) fn call(&mut self, to: Arc<str>, message: Message, pending: Pending) -> NonZeroU32 {
        let serial = message.primary_header().serial_num();
        self.pending.insert(serial, (to, pending));
        self.out.push(message);
        serial
    }

    /// Sends a message that has no reply.
    pub(super) fn send(&mut self, message: Message) {
        self.out.push(message);
    }

    /// Hands out a lease as the reply to `call`.
    pub(super) fn lease(&mut self, call: &Message, lease: LeaseId) {
        self.leases.push((call.clone(), lease));
    }

    /// The leases that wait to be handed out.
    pub(super) fn drain_leases(&mut self) -> Vec<(Message, LeaseId)> {
        std::mem::take(&mut self.leases)
    }

    /// Hands out a file as the reply to `call`.
    pub(super) fn hand(&mut self, call: Message, handed: Handed) {
        self.files.push((call, handed));
    }

    /// The files that wait to be handed out.
    pub(super) fn drain_files(&mut self) -> Vec<(Message, Handed)> {
        std::mem::take(&mut self.files)
    }

    /// Does not wait for a reply any more.
    pub(super) fn forget(&mut self, serial: NonZeroU32) {
        self.pending.remove(&serial);
    }

    /// What a reply is for, if it is one we wait for from the one who sent it: serials can be guessed, senders not.
    pub(super) fn take(&mut self, message: &Message) -> Option<(Pending, Response)> {
        let header = message.header();
        let serial = header.reply_serial()?;
        let sender = header.sender()?.as_str();
        let (called, _) = self.pending.get(&serial)?;
        let by_bus = sender == BUS_NAME;
        if !by_bus && sender != &**called {
            log::debug!("{sender} sent a reply to a call that was made to {called}; ignored");
            return None;
        }
        let (_, pending) = self.pending.remove(&serial)?;
        let response = if header.message_type() == Type::Error {
            let body = message.body();
            Err(Failure {
                name: header.error_name().map_or_else(String::new, ToString::to_string),
                text: body.deserialize::<&str>().map(clip).unwrap_or_default(),
                by_bus,
            })
        } else {
            Ok(message.clone())
        };
        Some((pending, response))
    }

    /// What waits to be written.
    pub(super) fn drain(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.out)
    }
}

/// A call of a method of the bus.
fn bus_call<B: Serialize + DynamicType>(member: &'static str, body: &B) -> Option<Message> {
    let message =
        Message::method_call("/org/freedesktop/DBus", member).destination(BUS_NAME).interface(BUS_NAME).build(body);
    message.inspect_err(|error| log::error!("cannot make a call of {member}: {error}")).ok()
}

/// Error texts of others are shown to people and stored; their beginning is enough.
pub(super) fn clip(text: &str) -> String {
    text.chars().take(300).collect()
}
