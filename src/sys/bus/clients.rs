//! Calls to apps that listen (`org.nightporter1.Client`): to the connection that is meant, and never starting anything.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    time::Duration,
};

use zbus::{Message, message::Flags};

use super::{
    deliver,
    wire::{Pending, Response, Wire},
};
use crate::{
    action::ClientCall,
    event::{BusEvent, CallOutcome, NoticeTicket, TransferTicket},
    model::{AppKey, Owner},
};

const PATH: &str = "/org/nightporter1/Client";
const INTERFACE: &str = "org.nightporter1.Client";

/// The notices under way on one connection.
#[derive(Default)]
pub(super) struct Clients {
    /// Who has not answered the notice it was given last, with that notice. The bus keeps a place for every reply that is
    /// still to come, 128 on a system bus, so there is one for each app at most.
    open: HashMap<AppKey, (Owner, NoticeTicket)>,
    /// One for each app at most: the core waits for an answer before the next.
    transfers: HashSet<TransferTicket>,
}

impl Clients {
    /// Calls a method of an app. `WillSuspend` ends with `BusEvent::Prepared`.
    pub(super) fn call(&mut self, wire: &mut Wire, app: AppKey, owner: Owner, call: ClientCall) {
        match call {
            ClientCall::WillSuspend { ticket, within } => self.notify(wire, app, owner, ticket, within),
            ClientCall::TransferDone { ticket, id, status, text } => {
                let text = text.replace('\0', "");
                match done(&owner, &(id.0, status, text.as_str())) {
                    Ok(message) => {
                        wire.call(owner.0, message, Pending::Transfer(ticket));
                        self.transfers.insert(ticket);
                    }
                    Err(error) => {
                        let outcome = CallOutcome::NotSent(format!("cannot make the message: {error}"));
                        wire.event(BusEvent::TransferTold(ticket, outcome));
                    }
                }
            }
            ClientCall::Resumed { frozen } => match message(&owner, true, "Resumed", frozen) {
                Ok(message) => wire.send(message),
                Err(error) => log::error!("cannot make a call of Resumed: {error}"),
            },
        }
    }

    /// The app answered `TransferDone`, or the bus did for one that is gone.
    pub(super) fn told(&mut self, wire: &Wire, ticket: TransferTicket, response: Response) {
        if self.transfers.remove(&ticket) {
            let outcome = match response {
                Ok(_) => CallOutcome::Accepted,
                Err(failure) => deliver::outcome(&failure),
            };
            wire.event(BusEvent::TransferTold(ticket, outcome));
        }
    }

    fn notify(&mut self, wire: &mut Wire, app: AppKey, owner: Owner, ticket: NoticeTicket, within: Duration) {
        // Who has not answered the one before is told, and not waited for.
        let silent = self.open.get(&app).is_some_and(|(asked, _)| *asked == owner);
        match message(&owner, silent, "WillSuspend", within) {
            Ok(message) if silent => {
                wire.send(message);
                wire.event(BusEvent::Prepared(app, ticket));
            }
            Ok(message) => {
                wire.call(owner.0.clone(), message, Pending::Notice(app.clone(), ticket));
                self.open.insert(app, (owner, ticket));
            }
            Err(error) => {
                log::error!("cannot make a call of WillSuspend: {error}");
                wire.event(BusEvent::Prepared(app, ticket));
            }
        }
    }

    /// The app answered, or the bus did for one that is gone.
    pub(super) fn answered(&mut self, wire: &Wire, app: AppKey, ticket: NoticeTicket, response: Response) {
        if let Entry::Occupied(open) = self.open.entry(app.clone())
            && open.get().1 == ticket
        {
            open.remove();
        }
        if let Err(failure) = response {
            log::debug!("{app}: {failure}");
        }
        wire.event(BusEvent::Prepared(app, ticket));
    }

    /// The connection is gone.
    pub(super) fn end(self, wire: &Wire) {
        for (app, (_, ticket)) in self.open {
            wire.event(BusEvent::Prepared(app, ticket));
        }
        for ticket in self.transfers {
            wire.event(BusEvent::TransferTold(ticket, CallOutcome::Vanished));
        }
    }
}

fn done(owner: &Owner, arguments: &(u64, &str, &str)) -> zbus::Result<Message> {
    let call = Message::method_call(PATH, "TransferDone").destination(&*owner.0).interface(INTERFACE);
    call.with_flags(Flags::NO_AUTO_START).build(arguments)
}

/// `t`: milliseconds.
fn message(owner: &Owner, no_reply: bool, member: &'static str, time: Duration) -> zbus::Result<Message> {
    let flags = if no_reply { Flags::NO_AUTO_START | Flags::NO_REPLY_EXPECTED } else { Flags::NO_AUTO_START };
    let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Message::method_call(PATH, member).destination(&*owner.0).interface(INTERFACE).with_flags(flags).build(&millis)
}
