//! The one way into the loop from other threads: a bounded channel and a `mio::Waker`.

use std::{
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{
        Arc,
        mpsc::{self, Receiver, SyncSender, TrySendError},
    },
};

use mio::{Registry, Token, Waker};

use crate::{
    event::{Event, LinkId},
    model::{AppKey, Bus, Owner, TargetId, Veto, Window},
};

/// What other threads hand to the loop.
#[derive(Debug)]
pub enum Incoming {
    /// For the core as it is.
    Event(Event),
    /// A bus told which process owns an app's name. For `sys::targets`, which makes `Event::Identified` of it.
    Process {
        /// Which app.
        app: AppKey,
        /// Which instance.
        owner: Owner,
        /// Its process, or why it could not be had.
        process: Result<Process, Arc<str>>,
    },
    /// What one source that is watched all the time says of the processes of a session: it replaces what it said before.
    Sightings {
        /// Which source, by a name of its own: `pipewire`, `mpris`, `logind`.
        source: &'static str,
        /// Whose session.
        uid: u32,
        /// All it sees, at most 256.
        vetoes: Vec<(u32, Veto)>,
    },
    /// All windows of a session, with the process ids where the compositor tells them; `None`: it tells no more.
    Windows {
        /// Whose session.
        uid: u32,
        /// All windows, at most 256.
        windows: Option<Vec<(Window, Option<u32>)>>,
    },
    /// Somebody on a session bus has notified the user.
    Notified {
        /// On which bus.
        bus: Bus,
        /// Who, as the bus says.
        owner: Owner,
        /// As which process, as the bus says, if it could be had.
        pid: Option<u32>,
    },
    /// The manager of the app's unit will stop it, or why it does not. For `sys::targets`.
    UnitStopped(TargetId, Result<(), Arc<str>>),
    /// Name resolution for a link ended. For `sys::link`.
    Resolved(LinkId, Result<Vec<SocketAddr>, String>),
}

/// A process that is proved to be the one meant: the pidfd was opened while the bus still vouched for the pid.
#[derive(Debug)]
pub struct Process {
    /// Process id in our namespace.
    pub pid: u32,
    /// Its user id, as the bus knows it.
    pub uid: u32,
    /// pidfd_open(2).
    pub pidfd: OwnedFd,
}

/// Messages waiting for the loop at most. Other threads block beyond it; the loop itself never does. The channel keeps
/// room for all of them, some 140 bytes each.
const BOUND: usize = 256;

/// The loop's end.
#[derive(Debug)]
pub struct Inbox {
    receiver: Receiver<Incoming>,
}

/// The other threads' end.
#[derive(Clone, Debug)]
pub struct Sender {
    sender: SyncSender<Incoming>,
    waker: Arc<Waker>,
}

/// Makes both ends; `token` becomes readable when something waits.
///
/// # Errors
/// When the eventfd behind the waker cannot be made.
pub fn channel(registry: &Registry, token: Token) -> io::Result<(Sender, Inbox)> {
    let waker = Arc::new(Waker::new(registry, token)?);
    let (sender, receiver) = mpsc::sync_channel(BOUND);
    Ok((Sender { sender, waker }, Inbox { receiver }))
}

impl Inbox {
    /// The next message, if one waits.
    pub fn take(&mut self) -> Option<Incoming> {
        self.receiver.try_recv().ok()
    }
}

impl Sender {
    /// Hands `incoming` to the loop, waiting while the inbox is full. False once the loop is gone.
    pub fn send(&self, incoming: Incoming) -> bool {
        self.sender.send(incoming).is_ok() && self.waker.wake().is_ok()
    }

    /// [`Sender::send`] that does not wait.
    ///
    /// # Errors
    /// `incoming` itself while the inbox is full, nothing once the loop is gone.
    #[expect(clippy::result_large_err, reason = "the full inbox gives back what it was given")]
    pub fn try_send(&self, incoming: Incoming) -> Result<(), Option<Incoming>> {
        match self.sender.try_send(incoming) {
            Ok(()) => self.waker.wake().map_err(|_| None),
            Err(TrySendError::Full(incoming)) => Err(Some(incoming)),
            Err(TrySendError::Disconnected(_)) => Err(None),
        }
    }

    /// [`Sender::send`] of a plain event.
    pub fn event(&self, event: Event) -> bool {
        self.send(Incoming::Event(event))
    }
}
