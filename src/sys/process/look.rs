//! Looks at `/proc` that take too long for the loop: done on workers of their own, because a page-out may keep the others
//! busy for seconds. What was seen comes back through an eventfd.

use std::{
    cell::Cell,
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
};

use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::event::{EventfdFlags, eventfd};

use super::{home::Survey, inspect::Inspection, procfs::Processes};
use crate::{model::TargetId, sys::jobs::Jobs};

/// Looks at a time.
const THREADS: usize = 2;

/// What was seen.
#[derive(Debug)]
pub(super) enum Sight {
    Survey(Result<Survey, Arc<str>>),
    Processes(io::Result<Processes>),
    Inspection(Box<Inspection>),
}

/// What was seen, for whom, and which question it answers.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) target: TargetId,
    pub(super) ticket: u64,
    pub(super) sight: Sight,
}

/// Where looks are asked for. Each target has one of a kind under way at most, which bounds what waits.
pub(super) struct Looker {
    jobs: Jobs,
    sender: Sender<Seen>,
    receiver: Receiver<Seen>,
    bell: Arc<OwnedFd>,
    tickets: Cell<u64>,
}

impl Looker {
    /// `token` becomes readable when something was seen.
    pub(super) fn new(registry: &Registry, token: Token) -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        registry.register(&mut SourceFd(&bell.as_raw_fd()), token, Interest::READABLE)?;
        let (sender, receiver) = mpsc::channel();
        Ok(Self { jobs: Jobs::new(THREADS), sender, receiver, bell: Arc::new(bell), tickets: Cell::new(0) })
    }

    /// Has `look` done. Returns its ticket; `None` when too much waits already.
    pub(super) fn ask(&self, target: TargetId, look: impl FnOnce() -> Sight + Send + 'static) -> Option<u64> {
        let ticket = self.tickets.get() + 1;
        self.tickets.set(ticket);
        let (sender, bell) = (self.sender.clone(), Arc::clone(&self.bell));
        let run = move || {
            let seen = Seen { target, ticket, sight: look() };
            // Full or gone: the loop looks anyway, or does not any more.
            if sender.send(seen).is_ok() {
                let _ = rustix::io::write(&*bell, &1_u64.to_ne_bytes());
            }
        };
        self.jobs.run(run).then_some(ticket)
    }

    /// What has been seen since.
    pub(super) fn take(&self) -> Vec<Seen> {
        let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
        self.receiver.try_iter().collect()
    }
}
