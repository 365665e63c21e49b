//! Carries out transfers, on worker threads of their own: downloads into the spool, uploads out of it (`core/transfers`).
//!
//! - `spool`: the files, and what is known of them after a crash.
//! - `request`: one request with its redirects, and where none may lead.
//! - `download`, `upload`: one attempt each.
//! - `content`: what an app hands over, through a pipe.

mod content;
mod download;
mod request;
mod spool;
mod upload;

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ureq::Agent;

use self::spool::Spool;
use crate::{
    config::Proxy,
    event::Event,
    sys::{inbox::Sender, jobs::Jobs},
    transfer::{Attempt, Attempted, Direction, Transfer, TransferEvent, TransferId},
};

/// Between two reports of how far it has come, and for how much nothing is moved before it counts as stalled.
const REPORT: Duration = Duration::from_secs(3);
const WINDOW: Duration = Duration::from_secs(60);
/// Bytes that must be moved in each [`WINDOW`]: a peer that gives less must not hold a place that others wait for. A quarter
/// of a kilobyte each second is less than the worst of mobile networks give.
const LEAST: u64 = 16 * 1024;
/// At a time.
const CHUNK: usize = 64 * 1024;
/// Handed over at a time.
const COPIES: usize = 4;

/// The executor of transfers.
pub struct Transfers {
    spool: Arc<Spool>,
    jobs: Jobs,
    copies: Jobs,
    sender: Sender,
    proxy: Proxy,
    running: HashMap<TransferId, Stop>,
}

impl Transfers {
    /// With the spool in `dir`, from which everything goes that is no transfer of `known`. Blocks; for start-up.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub fn open(dir: &Path, known: &[Transfer], at_a_time: usize, proxy: Proxy, sender: Sender) -> io::Result<Self> {
        let spool = Arc::new(Spool::open(dir, known.iter().map(|transfer| transfer.id))?);
        let (jobs, copies) = (Jobs::new(at_a_time), Jobs::new(COPIES));
        Ok(Self { spool, jobs, copies, sender, proxy, running: HashMap::new() })
    }

    /// Makes an attempt. `TransferEvent::Ended` follows; the event itself when no thread can be had.
    #[must_use]
    pub fn start(&mut self, attempt: Attempt) -> Option<Event> {
        self.running.retain(|_, stop| !stop.lock().over);
        let (id, stop) = (attempt.id, Stop::default());
        let bytes = attempt.progress.good;
        let worker = Worker {
            spool: Arc::clone(&self.spool),
            stop: stop.clone(),
            sender: self.sender.clone(),
            proxy: self.proxy.clone(),
            attempt,
        };
        let taken = self.jobs.run(move || worker.run());
        if taken {
            self.running.insert(id, stop);
            return None;
        }
        let text = "no thread can be made".into();
        Some(Event::Transfer(id, TransferEvent::Ended(Attempted::Later { bytes, after: None, text })))
    }

    /// Has the attempt end soon.
    pub fn stop(&self, id: TransferId) {
        if let Some(stop) = self.running.get(&id) {
            stop.ask(Asked::Stop);
        }
    }

    /// Deletes what there is of it, once an attempt that runs has ended.
    pub fn remove(&self, id: TransferId) {
        if let Some(stop) = self.running.get(&id)
            && stop.ask(Asked::Remove)
        {
            return;
        }
        // Gigabytes are not deleted in no time.
        let spool = Arc::clone(&self.spool);
        if !self.copies.run(move || spool.remove(id)) {
            self.spool.remove(id);
        }
    }

    /// The end of a pipe that takes the content of an upload of `size` bytes. `TransferEvent::Spooled` follows.
    ///
    /// # Errors
    /// When there can be no pipe or no thread.
    pub fn take(&self, id: TransferId, size: u64) -> io::Result<OwnedFd> {
        let (ours, theirs) = content::pipe()?;
        let (spool, sender) = (Arc::clone(&self.spool), self.sender.clone());
        let taken = self.copies.run(move || {
            let result = content::take(&spool, id, ours, size).map_err(Arc::from);
            sender.event(Event::Transfer(id, TransferEvent::Spooled(result)));
        });
        if taken { Ok(theirs) } else { Err(io::Error::other("no thread can be made")) }
    }

    /// The file of a download, or what the server answered to an upload, for reading, and its size.
    ///
    /// # Errors
    /// When it is not there.
    pub fn file(&self, id: TransferId, direction: Direction) -> io::Result<(OwnedFd, u64)> {
        let file = match direction {
            Direction::Download => self.spool.read(id)?,
            Direction::Upload => self.spool.read_answer(id)?,
        };
        let size = file.metadata()?.len();
        Ok((file.into(), size))
    }
}

/// What an attempt is asked to do, and whether it has ended.
#[derive(Clone, Default)]
struct Stop(Arc<Mutex<Stopping>>);

#[derive(Default)]
struct Stopping {
    asked: Option<Asked>,
    /// What waits for the network.
    agent: Option<Agent>,
    over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Stop,
    Remove,
}

impl Stop {
    fn lock(&self) -> MutexGuard<'_, Stopping> {
        // Plain data, which no panic leaves half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False when it has ended already.
    fn ask(&self, what: Asked) -> bool {
        let mut stopping = self.lock();
        if stopping.over {
            return false;
        }
        if stopping.asked != Some(Asked::Remove) {
            stopping.asked = Some(what);
        }
        if let Some(agent) = stopping.agent.take() {
            drop(stopping);
            agent.shutdown();
        }
        true
    }

    fn is_asked(&self) -> bool {
        self.lock().asked.is_some()
    }

    /// This waits for the network from now on. False when it is not to.
    fn waits(&self, agent: &Agent) -> bool {
        let mut stopping = self.lock();
        stopping.agent = Some(agent.clone());
        stopping.asked.is_none()
    }
}

/// One attempt on its thread.
struct Worker {
    spool: Arc<Spool>,
    stop: Stop,
    sender: Sender,
    proxy: Proxy,
    attempt: Attempt,
}

impl Worker {
    fn run(self) {
        let id = self.attempt.id;
        let attempted = match self.stop.is_asked() {
            true => Attempted::Stopped { bytes: self.attempt.progress.good },
            false => match self.attempt.wish.direction {
                Direction::Download => download::attempt(&self),
                Direction::Upload => upload::attempt(&self),
            },
        };
        let asked = {
            let mut stopping = self.stop.lock();
            (stopping.over, stopping.agent) = (true, None);
            stopping.asked
        };
        if asked == Some(Asked::Remove) {
            self.spool.remove(id);
        } else {
            self.tell(TransferEvent::Ended(attempted));
        }
    }

    fn tell(&self, event: TransferEvent) {
        self.sender.event(Event::Transfer(self.attempt.id, event));
    }

    /// It may work later; or it was asked to stop, which breaks a connection as well.
    fn later(&self, bytes: u64, text: &str) -> Attempted {
        match self.stop.is_asked() {
            true => Attempted::Stopped { bytes },
            false => Attempted::Later { bytes, after: None, text: text.into() },
        }
    }
}

/// Whether a peer moves enough.
struct Pace {
    since: Instant,
    bytes: u64,
    reported: Instant,
}

impl Pace {
    const fn new(bytes: u64, now: Instant) -> Self {
        Self { since: now, bytes, reported: now }
    }

    /// False when it has moved too little in the latest window.
    fn is_enough(&mut self, bytes: u64, now: Instant) -> bool {
        if now.duration_since(self.since) < WINDOW {
            return true;
        }
        let enough = bytes.saturating_sub(self.bytes) >= LEAST;
        (self.since, self.bytes) = (now, bytes);
        enough
    }

    fn is_report_due(&mut self, now: Instant) -> bool {
        let due = now.duration_since(self.reported) >= REPORT;
        if due {
            self.reported = now;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sends_a_byte_now_and_then_does_not_hold_a_place() {
        let begun = Instant::now();
        let at = |secs| begun + Duration::from_secs(secs);
        let mut pace = Pace::new(1000, begun);
        assert!((0..60).all(|secs| pace.is_enough(1000 + secs, at(secs))));
        assert!(!pace.is_enough(1060, at(60)), "a slow loris");
        let mut pace = Pace::new(1000, begun);
        assert!((1..600).all(|secs| pace.is_enough(1000 + secs * 300, at(secs))), "a slow network");
        assert!(pace.is_enough(1000 + 600 * 300, at(660)));
        assert!(!pace.is_enough(1000 + 600 * 300, at(720)), "one that was lost");
    }
}
