//! Looks at `/proc` that take too long for the loop: done on workers of their own, because a page-out may keep the others
//! busy for seconds. What was seen comes back through an eventfd.

use std::{
    cell::Cell,
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{self, Receiver, Sender},
    },
};

use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::event::{EventfdFlags, eventfd};

use super::{home::Survey, inspect::Inspection, procfs::Processes, walks::Walks};
use crate::{model::TargetId, sys::jobs::Jobs};

/// Looks at a time, of each haste.
const THREADS: usize = 2;

/// What waits behind what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Haste {
    /// A freeze is under way, and has a deadline.
    Now,
    /// It says whether to begin with one.
    Whenever,
}

/// A look that was asked for.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) number: u64,
    /// Whether it has come to it.
    pub(super) begun: Arc<AtomicBool>,
}

/// What was seen.
#[derive(Debug)]
pub(super) enum Sight {
    Survey(Result<Survey, Arc<str>>),
    Processes(io::Result<Arc<Processes>>),
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
    hasty: Jobs,
    others: Jobs,
    walks: Arc<Walks>,
    /// Looks that wait or are under way.
    open: Arc<AtomicUsize>,
    sender: Sender<Seen>,
    receiver: Receiver<Seen>,
    bell: Arc<OwnedFd>,
    tickets: Cell<u64>,
}

impl Looker {
    /// `token` becomes readable when something was seen. `walks`: those the looks share.
    pub(super) fn new(registry: &Registry, token: Token, walks: Arc<Walks>) -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        registry.register(&mut SourceFd(&bell.as_raw_fd()), token, Interest::READABLE)?;
        let (sender, receiver) = mpsc::channel();
        Ok(Self {
            hasty: Jobs::new(THREADS),
            others: Jobs::new(THREADS),
            walks,
            open: Arc::default(),
            sender,
            receiver,
            bell: Arc::new(bell),
            tickets: Cell::new(0),
        })
    }

    /// Has `look` done. `None` when too much waits already.
    pub(super) fn ask(
        &self,
        target: TargetId,
        haste: Haste,
        look: impl FnOnce() -> Sight + Send + 'static,
    ) -> Option<Ticket> {
        let number = self.tickets.get() + 1;
        self.tickets.set(number);
        let ticket = Ticket { number, begun: Arc::default() };
        let (sender, bell, begun) = (self.sender.clone(), Arc::clone(&self.bell), Arc::clone(&ticket.begun));
        let open = Open::new(&self.open, &self.walks);
        let run = move || {
            begun.store(true, Ordering::Relaxed);
            let seen = Seen { target, ticket: number, sight: look() };
            drop(open);
            // Full or gone: the loop looks anyway, or does not any more.
            if sender.send(seen).is_ok() {
                let _ = rustix::io::write(&*bell, &1_u64.to_ne_bytes());
            }
        };
        let jobs = if haste == Haste::Now { &self.hasty } else { &self.others };
        jobs.run(run).then_some(ticket)
    }

    /// What has been seen since.
    pub(super) fn take(&self) -> Vec<Seen> {
        let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
        self.receiver.try_iter().collect()
    }
}

/// A look that waits or is under way. With the last of them the walk they shared goes.
struct Open {
    count: Arc<AtomicUsize>,
    walks: Arc<Walks>,
}

impl Open {
    fn new(count: &Arc<AtomicUsize>, walks: &Arc<Walks>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self { count: Arc::clone(count), walks: Arc::clone(walks) }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if self.count.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.walks.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Barrier, mpsc::RecvTimeoutError},
        time::Duration,
    };

    use super::*;
    use crate::sys::clock;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn looker() -> (Looker, mio::Poll) {
        let poll = mio::Poll::new().unwrap();
        (Looker::new(poll.registry(), Token(0), Arc::default()).unwrap(), poll)
    }

    fn nothing() -> Sight {
        Sight::Processes(Ok(Arc::default()))
    }

    /// What is seen next.
    fn next(looker: &Looker) -> Result<u64, RecvTimeoutError> {
        looker.receiver.recv_timeout(PATIENCE).map(|seen| seen.ticket)
    }

    #[test]
    fn what_waits_has_not_begun_and_a_freeze_waits_for_no_inspection() {
        let (looker, _poll) = looker();
        let gate = Arc::new(Barrier::new(THREADS + 1));
        let stuck: Vec<Ticket> = (0..THREADS)
            .map(|_| {
                let gate = Arc::clone(&gate);
                let look = move || {
                    gate.wait();
                    nothing()
                };
                looker.ask(TargetId(1), Haste::Whenever, look).unwrap()
            })
            .collect();
        let waiting = looker.ask(TargetId(2), Haste::Whenever, nothing).unwrap();
        let hasty = looker.ask(TargetId(3), Haste::Now, nothing).unwrap();
        assert_eq!(next(&looker), Ok(hasty.number));
        assert!(hasty.begun.load(Ordering::Relaxed) && !waiting.begun.load(Ordering::Relaxed));
        gate.wait();
        let mut seen: Vec<u64> = (0..=THREADS).map(|_| next(&looker).unwrap()).collect();
        seen.sort_unstable();
        assert_eq!(seen, [stuck[0].number, stuck[1].number, waiting.number]);
        assert!(waiting.begun.load(Ordering::Relaxed));
    }

    #[test]
    fn the_walk_they_shared_goes_with_the_last_of_them() {
        let (looker, _poll) = looker();
        let asked = clock::boot();
        let walks = Arc::clone(&looker.walks);
        let look = move || Sight::Processes(walks.since(asked, clock::boot, || Ok(Processes::default())));
        looker.ask(TargetId(1), Haste::Now, look).unwrap();
        let Ok(Seen { sight: Sight::Processes(Ok(processes)), .. }) = looker.receiver.recv_timeout(PATIENCE) else {
            panic!("nothing was seen");
        };
        // Nobody has it any more but who asked.
        assert_eq!((Arc::strong_count(&processes), looker.open.load(Ordering::Relaxed)), (1, 0));
    }
}
