//! The two ends of each lease: a pipe. The holder has the end to read from, so that it can do nothing with it but close it,
//! or wait for its end; ours is watched for the holder's being closed, by the reactor alone, and closed to take the lease
//! away.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, pipe},
    os::fd::{AsFd, OwnedFd},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zbus::{Fd, Message};
use zruntime::{AsyncIo, Shared, SharedRuntime, Task};

use super::interfaces::{APP, NIGHTPORTER_PATH};
use crate::{
    action::Action,
    event::{BusEvent, Event},
    model::LeaseId,
    sys::inbox::{Incoming, Sender},
};

/// Our ends of the leases held over one connection. With it they all are closed.
#[derive(Default)]
pub(super) struct Ends {
    // As many as the core gives.
    held: BTreeMap<LeaseId, Task<(), Shared>>,
}

impl Ends {
    /// The answer to `call`, with the holder's end in it; `BusEvent::LeaseClosed` follows when all that is left of that end
    /// is closed.
    pub(super) fn open(&mut self, call: &Message, lease: LeaseId, inbox: &Sender) -> Result<Message, String> {
        self.held.retain(|_, watching| !watching.is_finished());
        let (theirs, ours) = pipe().map_err(|error| error.to_string())?;
        let ours = SharedRuntime::current().and_then(|runtime| AsyncIo::new(&runtime, File::from(OwnedFd::from(ours))));
        let ours = ours.map_err(|error| error.to_string())?;
        let body = (Fd::from(OwnedFd::from(theirs)), lease.0);
        let answer = Message::method_return(&call.header()).build(&body).map_err(|error| error.to_string())?;
        let inbox = inbox.clone();
        let watching = zruntime::spawn(async move {
            if let Err(error) = given_back(&ours).await {
                log::warn!("lease {}: cannot see when it is given back, so it is over: {error}", lease.0);
            }
            tell_closed(&inbox, lease);
        });
        self.held.insert(lease, watching);
        Ok(answer)
    }

    /// Closes our end.
    pub(super) fn close(&mut self, lease: LeaseId) {
        self.held.remove(&lease);
    }
}

/// Nobody holds this lease (any more).
pub(super) fn tell_closed(inbox: &Sender, lease: LeaseId) {
    // False means that the loop is gone, and this thread about to end.
    let _ = inbox.send(Incoming::Event(Event::Bus(BusEvent::LeaseClosed(lease))));
}

/// What tells a holder that its lease is about to be taken; nothing for another action.
pub(super) fn ending(action: &Action) -> Option<Message> {
    let Action::LeaseEnding { holder, lease, within, .. } = action else { return None };
    let millis = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
    let signal = Message::signal(NIGHTPORTER_PATH, APP, "LeaseEnding").destination(&*holder.0);
    let signal = signal.build(&(lease.0, millis));
    signal.inspect_err(|error| log::error!("cannot make a signal: {error}")).ok()
}

/// Waits until nobody can read from the pipe any more.
async fn given_back(ours: &AsyncIo<File, Shared>) -> io::Result<()> {
    let closed = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
    // An error is reported whatever is asked for; asking for room to write would end the wait at once.
    ours.read_with(|ours| {
        let mut ours = [PollFd::from_borrowed_fd(ours.as_fd(), PollFlags::empty())];
        poll(&mut ours, Some(&Timespec::default()))?;
        let [ours] = ours;
        match ours.revents().intersects(closed) {
            true => Ok(()),
            false => Err(io::Error::from(io::ErrorKind::WouldBlock)),
        }
    })
    .await
}
