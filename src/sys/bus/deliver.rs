//! Calls to the apps' connectors (UnifiedPush `Connector1` and `Connector2`). They go to the unique name of the instance
//! that is meant, never start anything, and wait as long as it takes.

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroU32,
    sync::Arc,
};

use serde::Serialize;
use zbus::{DynamicType, Message, SerializeDict, Type, message::Flags};

use super::{
    interfaces::PEER,
    wire::{Failure, Pending, Response, Wire},
};
use crate::{
    action::ConnectorCall,
    event::{BusEvent, CallOutcome, DeliveryTicket},
    model::{AppKey, ConnectorVersion, Owner},
};

/// Where the specification wants connectors.
const PATH: &str = "/org/unifiedpush/Connector";
/// Where `unifiedpush_linux` ≤ 0.1.0 puts its own.
const OLD_PATH: &str = "/";
/// Instances remembered to have theirs at the old path, and as many not to answer.
const REMEMBERED: usize = 256;

/// The calls to apps under way on one connection.
#[derive(Default)]
pub(super) struct Deliveries {
    // The core has at most one per registration.
    open: HashMap<u64, Delivery>,
    count: u64,
    at_old_path: HashSet<Owner>,
    /// Instances whose connector of version 1 does not answer. The bus keeps a place for every reply that is still to
    /// come, 128 on a system bus, so from such an instance none is asked any more.
    silent: HashSet<Owner>,
}

struct Delivery {
    ticket: DeliveryTicket,
    app: AppKey,
    owner: Owner,
    version: ConnectorVersion,
    call: ConnectorCall,
    old_path: bool,
    serials: [Option<NonZeroU32>; 2],
}

impl Deliveries {
    /// Calls a method of an app's connector. Ends with `BusEvent::CallDone`.
    pub(super) fn call(
        &mut self,
        wire: &mut Wire,
        ticket: DeliveryTicket,
        app: AppKey,
        owner: Owner,
        version: ConnectorVersion,
        call: ConnectorCall,
    ) {
        let old_path = self.at_old_path.contains(&owner);
        self.send(wire, Delivery { ticket, app, owner, version, call, old_path, serials: [None; 2] });
    }

    /// The connector's method was answered.
    pub(super) fn answered(&mut self, wire: &mut Wire, number: u64, response: Response) {
        let Some(delivery) = self.close(wire, number) else { return };
        let Err(failure) = response else {
            if delivery.old_path {
                remember(&mut self.at_old_path, &delivery.owner);
            }
            wire.event(BusEvent::CallDone(delivery.ticket, CallOutcome::Accepted));
            return;
        };
        if is_unknown(&failure) && !delivery.old_path {
            self.send(wire, Delivery { old_path: true, ..delivery });
            return;
        }
        log::debug!("{}: {failure}", delivery.app);
        wire.event(BusEvent::CallDone(delivery.ticket, outcome(&failure)));
    }

    /// The Ping behind a v1 call was answered. Connectors of v1 may never answer the call itself; a peer handles what it
    /// gets in order, so an answer to the Ping, be it an error, says that the call before it was taken.
    pub(super) fn pinged(&mut self, wire: &mut Wire, number: u64, response: Response) {
        let Some(delivery) = self.close(wire, number) else { return };
        let outcome = match response {
            Err(failure) if failure.by_bus => outcome(&failure),
            _ => {
                if delivery.old_path {
                    remember(&mut self.at_old_path, &delivery.owner);
                }
                remember(&mut self.silent, &delivery.owner);
                CallOutcome::Accepted
            }
        };
        wire.event(BusEvent::CallDone(delivery.ticket, outcome));
    }

    /// The connection is gone, and with it every owner.
    pub(super) fn end(self, wire: &Wire) {
        for delivery in self.open.into_values() {
            wire.event(BusEvent::CallDone(delivery.ticket, CallOutcome::Vanished));
        }
    }

    fn send(&mut self, wire: &mut Wire, mut delivery: Delivery) {
        let path = if delivery.old_path { OLD_PATH } else { PATH };
        let silent = delivery.version == ConnectorVersion::V1 && self.silent.contains(&delivery.owner);
        let flags = if silent { Flags::NO_AUTO_START | Flags::NO_REPLY_EXPECTED } else { Flags::NO_AUTO_START };
        let messages = message(&delivery, path, flags).and_then(|call| match delivery.version {
            ConnectorVersion::V1 => Ok((call, Some(ping(&delivery.owner, path)?))),
            ConnectorVersion::V2 => Ok((call, None)),
        });
        let (call, ping) = match messages {
            Ok(messages) => messages,
            Err(error) => {
                let outcome = CallOutcome::NotSent(format!("cannot make the message: {error}"));
                wire.event(BusEvent::CallDone(delivery.ticket, outcome));
                return;
            }
        };
        self.count += 1;
        let (number, to) = (self.count, Arc::clone(&delivery.owner.0));
        let answer = if silent {
            wire.send(call);
            None
        } else {
            Some(wire.call(Arc::clone(&to), call, Pending::Delivery(number)))
        };
        delivery.serials = [answer, ping.map(|ping| wire.call(to, ping, Pending::Ping(number)))];
        self.open.insert(number, delivery);
    }

    fn close(&mut self, wire: &mut Wire, number: u64) -> Option<Delivery> {
        let delivery = self.open.remove(&number)?;
        for serial in delivery.serials.into_iter().flatten() {
            wire.forget(serial);
        }
        Some(delivery)
    }
}

fn remember(owners: &mut HashSet<Owner>, owner: &Owner) {
    // Being forgotten costs an instance one more round trip.
    if owners.len() >= REMEMBERED {
        owners.clear();
    }
    owners.insert(owner.clone());
}

pub(super) fn outcome(failure: &Failure) -> CallOutcome {
    const GONE: [&str; 4] = [
        "org.freedesktop.DBus.Error.ServiceUnknown",
        "org.freedesktop.DBus.Error.NameHasNoOwner",
        "org.freedesktop.DBus.Error.NoReply",
        "org.freedesktop.DBus.Error.Disconnected",
    ];
    match failure.by_bus {
        true if GONE.contains(&failure.name.as_str()) => CallOutcome::Vanished,
        true => CallOutcome::NotSent(failure.to_string()),
        false => CallOutcome::Refused(failure.to_string()),
    }
}

fn is_unknown(failure: &Failure) -> bool {
    // The last is godbus's word for the first.
    const UNKNOWN: [&str; 4] = ["UnknownObject", "UnknownMethod", "UnknownInterface", "NoSuchObject"];
    let name = failure.name.strip_prefix("org.freedesktop.DBus.Error.");
    !failure.by_bus && name.is_some_and(|name| UNKNOWN.contains(&name))
}

/// Arguments of version 2: a dictionary each. Absent keys are left out.
#[derive(Default, SerializeDict, Type)]
#[zbus(signature = "a{sv}")]
struct Arguments<'a> {
    token: Option<&'a str>,
    endpoint: Option<&'a str>,
    message: Option<&'a [u8]>,
    id: Option<&'a str>,
}

fn message(delivery: &Delivery, path: &'static str, flags: Flags) -> zbus::Result<Message> {
    let owner = &delivery.owner;
    match (delivery.version, &delivery.call) {
        (ConnectorVersion::V1, ConnectorCall::NewEndpoint { token, endpoint }) => {
            build(owner, path, flags, V1, "NewEndpoint", &(&**token, &**endpoint))
        }
        (ConnectorVersion::V1, ConnectorCall::Message { token, body, id }) => {
            build(owner, path, flags, V1, "Message", &(&**token, &**body, &**id))
        }
        (ConnectorVersion::V1, ConnectorCall::Unregistered { token }) => {
            build(owner, path, flags, V1, "Unregistered", &&**token)
        }
        (ConnectorVersion::V2, ConnectorCall::NewEndpoint { token, endpoint }) => {
            let arguments = Arguments { token: Some(token), endpoint: Some(endpoint), ..Arguments::default() };
            build(owner, path, flags, V2, "NewEndpoint", &arguments)
        }
        (ConnectorVersion::V2, ConnectorCall::Message { token, body, id }) => {
            let arguments = Arguments { token: Some(token), message: Some(body), id: Some(id), ..Arguments::default() };
            build(owner, path, flags, V2, "Message", &arguments)
        }
        (ConnectorVersion::V2, ConnectorCall::Unregistered { token }) => {
            let token = (!token.is_empty()).then_some(&**token);
            build(owner, path, flags, V2, "Unregistered", &Arguments { token, ..Arguments::default() })
        }
    }
}

const V1: &str = "org.unifiedpush.Connector1";
const V2: &str = "org.unifiedpush.Connector2";

fn ping(owner: &Owner, path: &'static str) -> zbus::Result<Message> {
    build(owner, path, Flags::NO_AUTO_START, PEER, "Ping", &())
}

fn build<B: Serialize + DynamicType>(
    owner: &Owner,
    path: &'static str,
    flags: Flags,
    interface: &'static str,
    member: &'static str,
    body: &B,
) -> zbus::Result<Message> {
    Message::method_call(path, member).destination(&*owner.0).interface(interface).with_flags(flags).build(body)
}
