//! What waits to be written to a bus, and calls of ours that wait for a reply: kept by serial, so that replies and signals
//! come through one place in the order the bus sent them.

use std::{collections::HashMap, num::NonZeroU32, sync::Arc};

use serde::Serialize;
use zbus::{
    DynamicType, Message,
    message::{Flags, Type},
};

/// The bus itself, as destination and as sender.
pub(super) const BUS_NAME: &str = "org.freedesktop.DBus";
/// The match rule for the owners of all names; `,arg0='…'` makes it one for a single name.
pub(super) const OWNERS_RULE: &str =
    "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',member='NameOwnerChanged'";
/// The standard interface of properties.
pub(super) const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// A reply, or the text of an error.
pub(super) type Response = Result<Message, String>;

/// The outgoing side of a connection. `P` says what a reply is for.
#[derive(Debug)]
pub(super) struct Calls<P> {
    out: Vec<Message>,
    // Whoever asks bounds it; the bus answers for who is gone.
    pending: HashMap<NonZeroU32, (Arc<str>, P)>,
}

impl<P> Default for Calls<P> {
    fn default() -> Self {
        Self { out: Vec::new(), pending: HashMap::new() }
    }
}

impl<P> Calls<P> {
    /// Calls a method of the bus.
    pub(super) fn ask_bus(&mut self, member: &'static str, argument: &str, pending: P) {
        let _ = self.call(&BUS_NAME.into(), "/org/freedesktop/DBus", BUS_NAME, member, &argument, pending);
    }

    /// Calls a method of whoever has the unique name `to`. Starts nobody. `None` when there can be no such call.
    pub(super) fn call<B: Serialize + DynamicType>(
        &mut self,
        to: &Arc<str>,
        path: &str,
        interface: &'static str,
        member: &'static str,
        body: &B,
        pending: P,
    ) -> Option<NonZeroU32> {
        let message = Message::method_call(path, member)
            .destination(&**to)
            .interface(interface)
            .with_flags(Flags::NO_AUTO_START)
            .build(body);
        match message {
            Ok(message) => {
                let serial = message.primary_header().serial_num();
                self.pending.insert(serial, (Arc::clone(to), pending));
                self.out.push(message);
                Some(serial)
            }
            Err(error) => {
                log::debug!("cannot call {interface}.{member} at {path}: {error}");
                None
            }
        }
    }

    /// Does not wait for a reply any more.
    pub(super) fn forget(&mut self, serial: NonZeroU32) {
        self.pending.remove(&serial);
    }

    /// What a reply is for, if it is one we wait for from the one who sent it: serials can be guessed, senders not.
    pub(super) fn take(&mut self, message: &Message) -> Option<(NonZeroU32, P, Response)> {
        let header = message.header();
        let serial = header.reply_serial()?;
        let sender = header.sender()?.as_str();
        let (called, _) = self.pending.get(&serial)?;
        if sender != BUS_NAME && sender != &**called {
            return None;
        }
        let (_, pending) = self.pending.remove(&serial)?;
        let response = if header.message_type() == Type::Error {
            let body = message.body();
            let name = header.error_name().map_or("an error without a name", |name| name.as_str());
            let text: String = body.deserialize::<&str>().unwrap_or_default().chars().take(LONGEST_ERROR).collect();
            Err(if text.is_empty() { name.to_owned() } else { format!("{name}: {text}") })
        } else {
            Ok(message.clone())
        };
        Some((serial, pending, response))
    }

    /// How many calls wait for a reply.
    pub(super) fn waiting(&self) -> usize {
        self.pending.len()
    }

    /// What waits to be written.
    pub(super) fn drain(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.out)
    }
}

/// Error texts go to the log; their beginning is enough.
const LONGEST_ERROR: usize = 300;
