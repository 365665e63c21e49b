//! SQLite on its own thread: registrations, messages until they end, and what upstreams and the ledger must remember.
//!
//! Group commit: the thread takes what is queued, writes it in one transaction and answers every ticket in order once
//! that is on the disk. Lazy operations alone wait up to 2 s for company, history up to an hour. With nothing queued and
//! no history waiting the thread sleeps without a timeout.

mod database;
mod history;
mod holdback;
mod later;
mod means;
mod routes;
mod rows;
mod states;
mod transfers;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, TryRecvError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

pub use self::holdback::Holdback;
use self::{
    database::{Database, WriteError},
    later::Later,
};
use crate::{
    action::StoreOp,
    event::{Event, StoreError, StoreTicket},
    model::{Ending, HistoryRow, Message, MessageSeq, Snapshot},
    sys::inbox::{Incoming, Sender},
    time::UnixTime,
};

/// How long lazy operations wait for company.
const LAZY: Duration = Duration::from_secs(2);
/// Operations in one transaction at most: bounds the bodies read in it, and the journal.
const BATCH: usize = 256;
/// Queued operations beyond which messages are refused: they are what a remote peer can flood us with while the disk
/// hangs. Bounds the bodies held to 8 MiB.
const MESSAGES_QUEUED: usize = 2048;
/// Queued operations beyond which lazy ones are refused too: a cursor or a sample is small, and a lost one is made up
/// for. What is left (registrations, the end of messages we took) is bounded by the core's limits and never refused.
const LAZY_QUEUED: usize = 4 * MESSAGES_QUEUED;
/// Operations after which SQLite's caches are given back once the queue is dry.
const BURST: usize = 128;
/// Enough for SQLite's parser and b-tree code.
const STACK: usize = 512 * 1024;

/// A handle on the store's thread. Dropped without [`Store::close`], the thread still writes what is queued, but nobody
/// waits for it.
pub struct Store {
    queue: mpsc::Sender<Entry>,
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// Why the store cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreOpenError {
    /// The state directory or a file in it cannot be made, opened or moved.
    #[error("cannot use {}: {problem}", path.display())]
    Unusable {
        /// Which file or directory.
        path: PathBuf,
        /// What the system or SQLite says.
        problem: String,
    },
    /// The disk is full: not even an empty database can be made.
    #[error("cannot open {}: the disk is full", path.display())]
    Full {
        /// The database.
        path: PathBuf,
    },
    /// Another daemon uses this directory.
    #[error("{} is in use by another nightporterd (process {pid}); end that one or give another --state-dir", dir.display())]
    Locked {
        /// The state directory.
        dir: PathBuf,
        /// Process id of the other daemon as it noted it, or "unknown".
        pid: String,
    },
    /// Written by a newer version of this program. It is not touched.
    #[error(
        "{} was written by a newer nightporterd (format {found}, this one knows {known}); install that version again or \
         move the file away",
        path.display()
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its format.
        found: i64,
        /// The newest format this program knows.
        known: i64,
    },
}

impl StoreOpenError {
    /// The exit code of sysexits.h that says this.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Unusable { .. } => 73,
            Self::Full { .. } => 74,
            Self::Locked { .. } => 75,
            Self::Newer { .. } => 78,
        }
    }
}

impl Store {
    /// Opens the store in `dir`, making what is missing, and reads everything but the bodies. Blocks; for start-up.
    ///
    /// A damaged database is moved aside and a fresh one begun; the snapshot says so.
    ///
    /// # Errors
    /// [`StoreOpenError`]; nothing of a database that is not ours to change was changed.
    pub fn open(dir: &Path, sender: Sender) -> Result<(Self, Snapshot), StoreOpenError> {
        let (database, snapshot) = Database::open(dir)?;
        let shared = Arc::new(Shared::default());
        let (queue, receiver) = mpsc::channel();
        let writer = Writer {
            database,
            sender,
            shared: Arc::clone(&shared),
            later: Later::default(),
            since_release: 0,
            failing: false,
            loop_gone: false,
        };
        let thread = thread::Builder::new()
            .name("store".into())
            .stack_size(STACK)
            .spawn(move || writer.run(&receiver))
            .map_err(|error| unusable(dir, &error))?;
        Ok((Self { queue, shared, thread }, snapshot))
    }

    /// Queues `op`. Never blocks. With a `ticket`, [`Event::Stored`] follows, in the order of the calls but for
    /// [`StoreOp::PutHistory`], which may wait for an hour. [`StoreOp::LoadBody`] is answered with [`Event::Body`],
    /// [`StoreOp::LoadState`] with [`Event::State`], [`StoreOp::LoadHistory`] with [`Event::History`].
    pub fn apply(&self, op: StoreOp, ticket: Option<StoreTicket>) {
        self.send(Work::Op(op), ticket);
    }

    fn send(&self, work: Work, ticket: Option<StoreTicket>) {
        let queued = self.shared.queued.fetch_add(1, Ordering::Relaxed);
        // The channel itself has no bound because the loop must not block; this is its bound.
        let refused = match &work {
            Work::Op(StoreOp::PutMessage(_)) => queued >= MESSAGES_QUEUED,
            Work::Op(
                StoreOp::PutUpstream { .. } | StoreOp::PutApp(_) | StoreOp::PutHistory(_) | StoreOp::NoteTransfer(_),
            )
            | Work::Ended(..) => queued >= LAZY_QUEUED,
            Work::Op(_) | Work::Refused => false,
        };
        if refused && !self.shared.refusing.swap(true, Ordering::Relaxed) {
            log::error!("the disk does not keep up: {queued} writes wait, new messages are refused");
        }
        let work = if refused { Work::Refused } else { work };
        if self.queue.send(Entry { work, ticket }).is_err() {
            // Only a panic ends the thread before close(); the release build aborts on it.
            log::error!("the store's thread is gone; restart nightporterd");
        }
    }

    /// Writes everything queued, folds the journal into the database and ends the thread. Events that do not fit into
    /// the inbox any more are dropped: the loop that would take them is the caller.
    pub fn close(self) {
        self.shared.closing.store(true, Ordering::Release);
        drop(self.queue);
        if self.thread.join().is_err() {
            log::error!("the store's thread panicked");
        }
    }
}

#[derive(Default)]
struct Shared {
    queued: AtomicUsize,
    refusing: AtomicBool,
    closing: AtomicBool,
}

struct Entry {
    work: Work,
    ticket: Option<StoreTicket>,
}

enum Work {
    Op(StoreOp),
    /// A message that ended before it was written: of it only the id is kept, for duplicates.
    Ended(Message, Ending),
    /// Refused by the bound; here only so that its ticket is answered in its turn.
    Refused,
}

impl Entry {
    /// Whether it may wait for company.
    fn is_lazy(&self) -> bool {
        matches!(&self.work, Work::Op(op) if op.is_lazy())
    }

    /// Whether it changes anything.
    const fn is_write(&self) -> bool {
        !matches!(
            self.work,
            Work::Refused | Work::Op(StoreOp::LoadBody(_) | StoreOp::LoadState(_) | StoreOp::LoadHistory(_))
        )
    }

    /// Whether it makes room in the database. These get a second chance on a full disk.
    const fn gives_space(&self) -> bool {
        matches!(
            self.work,
            Work::Op(
                StoreOp::EndMessage(..)
                    | StoreOp::DeleteRegistration(_)
                    | StoreOp::DeleteApp(_)
                    | StoreOp::DeleteTransfer(_)
            )
        )
    }
}

struct Writer {
    database: Database,
    sender: Sender,
    shared: Arc<Shared>,
    /// History that waits for another write.
    later: Later,
    since_release: usize,
    failing: bool,
    loop_gone: bool,
}

impl Writer {
    fn run(mut self, queue: &Receiver<Entry>) {
        loop {
            let first = match self.later.due() {
                None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(due) => queue.recv_timeout(due.saturating_duration_since(Instant::now())),
            };
            let batch = match first {
                Ok(first) => self.collect(first, queue),
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            self.write(batch);
            if self.since_release >= BURST && self.shared.queued.load(Ordering::Relaxed) == 0 {
                self.since_release = 0;
                self.database.release();
            }
        }
        let rest = std::mem::take(&mut self.later);
        self.write_history(rest, &[]);
        self.database.close();
    }

    /// Takes what is queued; waits only while all of it is lazy.
    fn collect(&mut self, first: Entry, queue: &Receiver<Entry>) -> Vec<Entry> {
        let mut batch = Vec::new();
        let mut eager = false;
        let mut deadline = None;
        let mut next = Some(first);
        loop {
            if let Some(entry) = next {
                self.taken();
                if let Work::Op(StoreOp::DeleteApp(app)) = &entry.work {
                    self.later.forget(app);
                }
                if let Work::Op(StoreOp::PutHistory(rows)) = &entry.work {
                    self.later.add(rows, entry.ticket, Instant::now());
                } else if let (false, Entry { work: Work::Op(StoreOp::LoadBody(seq)), ticket: None }) = (eager, &entry)
                {
                    // Nothing queued before it can have brought the message, so reading needs no commit first.
                    self.answer_body(*seq, &batch);
                } else {
                    eager |= !entry.is_lazy();
                    batch.push(entry);
                }
            }
            if batch.len() >= BATCH {
                return batch;
            }
            next = match queue.try_recv() {
                Ok(entry) => Some(entry),
                Err(TryRecvError::Disconnected) => return batch,
                Err(TryRecvError::Empty) if eager || batch.is_empty() => return batch,
                Err(TryRecvError::Empty) => {
                    let deadline = *deadline.get_or_insert_with(|| Instant::now() + LAZY);
                    match queue.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                        Ok(entry) => Some(entry),
                        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return batch,
                    }
                }
            };
        }
    }

    fn taken(&mut self) {
        self.since_release += 1;
        if self.shared.queued.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.shared.refusing.store(false, Ordering::Relaxed);
        }
    }

    fn answer_body(&mut self, seq: MessageSeq, before: &[Entry]) {
        let ended = |entry: &Entry| matches!(&entry.work, Work::Op(StoreOp::EndMessage(ended, _)) if *ended == seq);
        let body = if before.iter().any(ended) { None } else { self.database.body(seq) };
        self.tell(Event::Body(seq, body));
    }

    fn write(&mut self, batch: Vec<Entry>) {
        let history = self.later.take(batch.iter().any(Entry::is_write), Instant::now());
        if !history.is_empty() {
            // Should it not go, the others are written without it.
            if let Some(bodies) = self.write_history(history, &batch) {
                return self.written(batch, bodies);
            }
        }
        if batch.is_empty() {
            return;
        }
        let works = || batch.iter().map(|entry| &entry.work);
        let mut result = self.database.write(works(), &[]);
        if matches!(result, Err(WriteError::Full)) && self.database.reuse_journal() {
            result = self.database.write(works(), &[]);
        }
        let error = match result {
            Ok(bodies) => return self.written(batch, bodies),
            Err(error) => error,
        };
        self.note(Some(&error));
        if matches!(error, WriteError::Constraint(_)) && batch.len() > 1 {
            // One operation that makes no sense must not take the others with it.
            for entry in batch {
                self.write(vec![entry]);
            }
            return;
        }
        let mut helping = matches!(error, WriteError::Full);
        let error = StoreError::from(error);
        for entry in batch {
            // What makes room may fit alone; nothing relies on it having come after what failed before it.
            let stored = helping && entry.gives_space() && {
                helping = self.database.write([&entry.work].into_iter(), &[]).is_ok();
                helping
            };
            if let Work::Op(StoreOp::LoadBody(seq)) = entry.work {
                let body = self.database.body(seq);
                self.tell(Event::Body(seq, body));
            }
            if !self.answer_read(&entry) {
                self.answer(entry.ticket, if stored { Ok(()) } else { Err(error.clone()) });
            }
        }
    }

    /// Writes history with company; the bodies that asks for, if it went.
    fn write_history(&mut self, history: Later, company: &[Entry]) -> Option<Vec<Option<Arc<[u8]>>>> {
        let result = self.database.write(company.iter().map(|entry| &entry.work), &history.rows);
        let told = result.as_ref().map(|_| ()).map_err(|error| StoreError::from(error.clone()));
        for ticket in &history.tickets {
            self.answer(Some(*ticket), told.clone());
        }
        match result {
            Ok(bodies) => Some(bodies),
            Err(error) => {
                // The company says so itself, if it is the reason.
                if company.is_empty() {
                    self.note(Some(&error));
                }
                if company.is_empty() && matches!(error, WriteError::Constraint(_)) {
                    log::error!("{} rows of history make no sense and are dropped: {error}", history.rows.len());
                } else {
                    self.later.put_back(history, Instant::now());
                }
                None
            }
        }
    }

    fn written(&mut self, batch: Vec<Entry>, bodies: Vec<Option<Arc<[u8]>>>) {
        self.note(None);
        let mut bodies = bodies.into_iter();
        for entry in batch {
            if let Work::Op(StoreOp::LoadBody(seq)) = &entry.work {
                self.tell(Event::Body(*seq, bodies.next().flatten()));
            }
            if self.answer_read(&entry) {
                continue;
            }
            let refused = matches!(entry.work, Work::Refused);
            self.answer(entry.ticket, if refused { Err(too_slow()) } else { Ok(()) });
        }
    }

    /// Logs the first of a row of failures and its end.
    fn note(&mut self, error: Option<&WriteError>) {
        match error {
            Some(error) if !self.failing => log::error!("cannot write {}: {error}", self.database.path().display()),
            None if self.failing => log::warn!("{} can be written again", self.database.path().display()),
            _ => {}
        }
        self.failing = error.is_some();
    }

    fn answer(&mut self, ticket: Option<StoreTicket>, result: Result<(), StoreError>) {
        if let Some(ticket) = ticket {
            self.tell(Event::Stored(ticket, result));
        }
    }

    /// Answers what is read after the commit; false when it is nothing of that kind. What was saved meanwhile is as good.
    fn answer_read(&mut self, entry: &Entry) -> bool {
        let event = match &entry.work {
            Work::Op(StoreOp::LoadState(app)) => {
                let state = self.database.state(app).map(Option::unwrap_or_default);
                entry.ticket.map(|ticket| Event::State(ticket, state))
            }
            Work::Op(StoreOp::LoadHistory(since)) => {
                entry.ticket.map(|ticket| Event::History(ticket, self.history(*since)))
            }
            _ => return false,
        };
        if let Some(event) = event {
            self.tell(event);
        }
        true
    }

    /// With what is not written yet: reading is no reason to write.
    fn history(&mut self, since: UnixTime) -> Result<Vec<HistoryRow>, StoreError> {
        // It went through all of it.
        self.since_release += BURST;
        self.database.history(since, &self.later.rows)
    }

    fn tell(&mut self, event: Event) {
        if self.loop_gone {
            return;
        }
        let mut rest = self.sender.try_send(Incoming::Event(event));
        while let Err(Some(incoming)) = rest {
            // In close() the loop waits for this thread, so waiting for the loop would be for ever.
            if self.shared.closing.load(Ordering::Acquire) {
                return;
            }
            thread::sleep(Duration::from_millis(1));
            rest = self.sender.try_send(incoming);
        }
        self.loop_gone = rest.is_err();
    }
}

fn too_slow() -> StoreError {
    StoreError::Other(format!("the disk does not keep up: more than {MESSAGES_QUEUED} writes wait"))
}

fn unusable(path: &Path, problem: &io::Error) -> StoreOpenError {
    StoreOpenError::Unusable { path: path.to_owned(), problem: problem.to_string() }
}
