//! The storage thread: the one place that touches the database, and where order is made.
//!
//! Everything that waits when a transaction ends shares the next one, so that many posts cost one fsync. After the
//! commit, effects happen in the order of the commands: a message goes to its connected device and its sender gets
//! 201. Both what a device reads from the database and what comes in live reach it through one queue, filled here.
//! So a device that has caught up sees each message once and in order without any lock.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rusqlite::ErrorCode;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::{
    args::Limits,
    autopush::{ChannelId, Message},
    clock,
    database::{Database, Endpoint, Registered, is_damage},
    quota::Rates,
    token::Uaid,
    vapid::{Key, Proof, VapidError},
    webpush::Headers,
};

/// Messages handed out at a time to a device that is behind, as autopush does.
pub(crate) const BATCH: u32 = 10;
/// Places between this thread and one device. Beyond them the device reads from the database again.
const CLIENT_SLOTS: usize = 128;
/// Kept free for the answers to the device's own questions, of which one is under way at a time.
const RESERVED_SLOTS: usize = 2;
/// Commands that wait for the thread; beyond them senders get 503 and devices are read more slowly.
const COMMAND_SLOTS: usize = 1024;
/// Commands that share a transaction.
const TRANSACTION_MAX: usize = 256;
/// What a sender is told to wait when too much is stored. It depends on the device, so nobody knows.
const QUOTA_RETRY: Duration = Duration::from_secs(60);

/// A handle on the storage thread.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    commands: mpsc::Sender<Command>,
    something_stored: Arc<Notify>,
}

/// Why a command failed; nothing of it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StoreError {
    /// Too many commands wait.
    #[error("the server is busy")]
    Busy,
    /// No space on the disk, or `--max-database` reached.
    #[error("the server's storage is full")]
    Full,
    /// Anything else; the log has it.
    #[error("the server's storage failed")]
    Failed,
}

/// A push message to be stored and delivered.
#[derive(Debug)]
pub(crate) struct Submission {
    /// The endpoint posted to.
    pub(crate) token: String,
    /// The id the message is to have.
    pub(crate) version: Arc<str>,
    /// Its headers.
    pub(crate) headers: Headers,
    /// Its body.
    pub(crate) data: Arc<[u8]>,
    /// Who sent it.
    pub(crate) proof: Proof,
}

/// What became of a submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// No such endpoint: 404.
    Unknown,
    /// A removed one: 410.
    Removed,
    /// The endpoint is bound to another key, or nothing was proved: 401.
    Unauthorized(Option<VapidError>),
    /// Too much or too fast: 429.
    TooMany(Duration),
    /// Durable (or TTL 0): 201.
    Accepted,
}

/// What a device's socket is told.
#[derive(Debug)]
pub(crate) enum ClientEvent {
    /// The answer to hello, with the first stored messages.
    Welcome(Uaid, Batch),
    /// More stored messages.
    Batch(Batch),
    /// A message that has just come in.
    Live(Arc<Message>),
}

/// Stored messages, oldest first.
#[derive(Debug)]
pub(crate) struct Batch {
    /// At most [`BATCH`].
    pub(crate) messages: Vec<Arc<Message>>,
    /// Whether nothing else waits; from here on messages come live.
    pub(crate) is_last: bool,
}

/// Why a socket is to end, set from outside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kick {
    /// The same device has connected again.
    Ghost,
    /// The database failed while it was asked.
    Storage,
}

/// What a socket is told beside the queue.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    flags: AtomicU8,
    notify: Notify,
}

/// How the storage thread reaches one connected device.
#[derive(Debug)]
pub(crate) struct Client {
    /// Number of the connection.
    session: u64,
    events: mpsc::Sender<ClientEvent>,
    gate: Arc<Gate>,
    /// Whether it has caught up, so that messages are sent as they come.
    is_live: bool,
}

impl Store {
    /// Start the thread. `on_damage` is called once if the database turns out to be damaged while in use.
    pub(crate) fn start(
        database: Database,
        limits: Limits,
        on_damage: impl FnOnce() + Send + 'static,
    ) -> io::Result<(Self, JoinHandle<()>)> {
        let (commands, waiting) = mpsc::channel(COMMAND_SLOTS);
        let something_stored = Arc::new(Notify::new());
        // There may be messages from an earlier life.
        something_stored.notify_one();
        let channels = usize::try_from(u64::from(limits.max_users) * u64::from(limits.max_channels));
        let mut worker = Worker {
            database,
            clients: HashMap::new(),
            rates: Rates::new(limits.rate, limits.burst, channels.unwrap_or(usize::MAX).min(10_000)),
            something_stored: something_stored.clone(),
            on_damage: Some(Box::new(on_damage)),
            follow_up: Vec::new(),
        };
        let thread = thread::Builder::new().name("storage".to_owned()).spawn(move || worker.run(waiting))?;
        Ok((Self { commands, something_stored }, thread))
    }

    /// Store and deliver a message. Returns after the commit.
    pub(crate) async fn submit(&self, submission: Submission) -> Result<Verdict, StoreError> {
        self.ask(|reply| Command::Submit { submission, reply }).await
    }

    /// Delete a message for its sender; whether there was one.
    pub(crate) async fn delete(&self, version: String) -> Result<bool, StoreError> {
        self.ask(|reply| Command::Delete { version, reply }).await
    }

    /// Let a device in. What it is told comes through the receiver.
    pub(crate) async fn hello(
        &self,
        uaid: Option<Uaid>,
        fresh: Uaid,
        session: u64,
        gate: Arc<Gate>,
    ) -> mpsc::Receiver<ClientEvent> {
        let (events, receiver) = mpsc::channel(CLIENT_SLOTS + RESERVED_SLOTS);
        self.tell(Command::Hello { uaid, fresh, client: Client { session, events, gate, is_live: false } }).await;
        receiver
    }

    /// Ask for the stored messages behind `after`; they come through the device's queue.
    pub(crate) async fn fetch(&self, uaid: Uaid, session: u64, after: i64) {
        self.tell(Command::Fetch { uaid, session, after }).await;
    }

    /// Make a channel; `token` is used if it needs a new endpoint.
    pub(crate) async fn register(
        &self,
        uaid: Uaid,
        channel: ChannelId,
        key: Option<Key>,
        token: Arc<str>,
    ) -> Result<Registered, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.tell(Command::Register { uaid, channel, key, token, reply }).await;
        answer.await.unwrap_or(Err(StoreError::Failed))
    }

    /// Remove a channel.
    pub(crate) async fn unregister(&self, uaid: Uaid, channel: ChannelId) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        self.tell(Command::Unregister { uaid, channel, reply }).await;
        answer.await.unwrap_or(Err(StoreError::Failed))
    }

    /// Delete messages the device has.
    pub(crate) async fn acknowledge(&self, uaid: Uaid, versions: Vec<Arc<str>>) {
        self.tell(Command::Ack { uaid, versions }).await;
    }

    /// Drop a device and all it has.
    pub(crate) async fn forget(&self, uaid: Uaid) {
        self.tell(Command::Forget { uaid }).await;
    }

    /// The socket has ended.
    pub(crate) async fn goodbye(&self, uaid: Uaid, session: u64) {
        self.tell(Command::Bye { uaid, session }).await;
    }

    /// Delete what has expired; whether anything is left that will.
    pub(crate) async fn purge(&self) -> Result<bool, StoreError> {
        self.ask(|reply| Command::Purge { reply }).await
    }

    /// Wait until something is stored that will expire.
    pub(crate) async fn something_stored(&self) {
        self.something_stored.notified().await;
    }

    /// For requests from outside: refused at once when too many wait.
    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(command(reply)).map_err(|_| StoreError::Busy)?;
        answer.await.unwrap_or(Err(StoreError::Failed))
    }

    /// For connected devices: they wait, and are not read from meanwhile.
    async fn tell(&self, command: Command) {
        if self.commands.send(command).await.is_err() {
            log::error!("the storage thread has ended");
        }
    }
}

impl Gate {
    const GHOST: u8 = 1;
    const STORAGE: u8 = 2;
    const LAGGING: u8 = 4;

    /// Wait for something to be raised.
    pub(crate) async fn raised(&self) {
        self.notify.notified().await;
    }

    /// Whether the socket is to end.
    pub(crate) fn kick(&self) -> Option<Kick> {
        let flags = self.flags.load(Ordering::Acquire);
        if flags & Self::GHOST != 0 { Some(Kick::Ghost) } else { (flags & Self::STORAGE != 0).then_some(Kick::Storage) }
    }

    /// Whether messages were left in the database because the queue was full; asking resets it.
    pub(crate) fn take_lagging(&self) -> bool {
        self.flags.fetch_and(!Self::LAGGING, Ordering::AcqRel) & Self::LAGGING != 0
    }

    fn raise(&self, flag: u8) {
        self.flags.fetch_or(flag, Ordering::AcqRel);
        self.notify.notify_one();
    }
}

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

#[derive(Debug)]
enum Command {
    Hello { uaid: Option<Uaid>, fresh: Uaid, client: Client },
    Fetch { uaid: Uaid, session: u64, after: i64 },
    Register { uaid: Uaid, channel: ChannelId, key: Option<Key>, token: Arc<str>, reply: Reply<Registered> },
    Unregister { uaid: Uaid, channel: ChannelId, reply: Reply<()> },
    Ack { uaid: Uaid, versions: Vec<Arc<str>> },
    Forget { uaid: Uaid },
    Touch { uaid: Uaid },
    Bye { uaid: Uaid, session: u64 },
    Submit { submission: Submission, reply: Reply<Verdict> },
    Delete { version: String, reply: Reply<bool> },
    Purge { reply: Reply<bool> },
}

/// What a command came to inside the transaction; it is acted on after the commit.
enum Effect {
    Nothing,
    Known { known: bool, batch: Batch },
    Batch(Batch),
    Registered(Registered),
    Verdict(Verdict),
    Deliver { uaid: Uaid, message: Arc<Message> },
    Flag(bool),
}

struct Worker {
    database: Database,
    clients: HashMap<Uaid, Client>,
    rates: Rates,
    something_stored: Arc<Notify>,
    on_damage: Option<Box<dyn FnOnce() + Send>>,
    follow_up: Vec<Command>,
}

impl Worker {
    fn run(&mut self, mut waiting: mpsc::Receiver<Command>) {
        while let Some(first) = waiting.blocking_recv() {
            let mut commands = vec![first];
            while commands.len() < TRANSACTION_MAX
                && let Ok(next) = waiting.try_recv()
            {
                commands.push(next);
            }
            self.process(commands);
            let follow_up = std::mem::take(&mut self.follow_up);
            if !follow_up.is_empty() {
                self.process(follow_up);
            }
        }
    }

    fn process(&mut self, commands: Vec<Command>) {
        let now = clock::unix_now();
        match self.attempt(&commands, now) {
            Ok(effects) => {
                for (command, effect) in commands.into_iter().zip(effects) {
                    self.conclude(command, Ok(effect));
                }
            }
            // One command may have spoilt the transaction of all: each gets its own.
            Err(_) if commands.len() > 1 => commands.into_iter().for_each(|command| self.process(vec![command])),
            Err(error) => {
                let error = self.report(&error);
                for command in commands {
                    self.conclude(command, Err(error));
                }
            }
        }
    }

    fn attempt(&mut self, commands: &[Command], now: i64) -> rusqlite::Result<Vec<Effect>> {
        self.database.begin()?;
        let effects = commands.iter().map(|command| self.apply(command, now)).collect::<rusqlite::Result<Vec<_>>>();
        let result = effects.and_then(|effects| self.database.commit().map(|()| effects));
        if result.is_err() {
            self.database.rollback();
        }
        result
    }

    /// The part that can be rolled back. It may run twice for a command (see `process`); the rate limit then counts it
    /// twice, which is no harm on a failing disk.
    fn apply(&mut self, command: &Command, now: i64) -> rusqlite::Result<Effect> {
        let database = &self.database;
        match command {
            Command::Hello { uaid, .. } => {
                let known = match uaid {
                    Some(uaid) if database.knows(uaid)? => Some(uaid),
                    _ => None,
                };
                let batch = match known {
                    Some(uaid) => batch(database.waiting(uaid, 0, BATCH, now)?),
                    None => batch(Vec::new()),
                };
                Ok(Effect::Known { known: known.is_some(), batch })
            }
            Command::Fetch { uaid, after, .. } => Ok(Effect::Batch(batch(database.waiting(uaid, *after, BATCH, now)?))),
            Command::Register { uaid, channel, key, token, .. } => {
                database.register(uaid, channel, key.as_ref(), token, now).map(Effect::Registered)
            }
            Command::Unregister { uaid, channel, .. } => {
                database.unregister(uaid, channel, now).map(|()| Effect::Nothing)
            }
            Command::Ack { uaid, versions } => database.acknowledge(uaid, versions).map(|()| Effect::Nothing),
            Command::Forget { uaid } => database.forget(uaid, now).map(|()| Effect::Nothing),
            Command::Touch { uaid } => database.touch(uaid, now).map(|()| Effect::Nothing),
            Command::Bye { .. } => Ok(Effect::Nothing),
            Command::Submit { submission, .. } => self.submit(submission, now),
            Command::Delete { version, .. } => database.delete(version, now).map(Effect::Flag),
            Command::Purge { .. } => {
                let clients = &self.clients;
                database.purge(now, |uaid| clients.contains_key(uaid)).map(Effect::Flag)
            }
        }
    }

    fn submit(&mut self, submission: &Submission, now: i64) -> rusqlite::Result<Effect> {
        let Submission { token, version, headers, data, proof } = submission;
        let target = match self.database.endpoint(token)? {
            Endpoint::Unknown => return Ok(Effect::Verdict(Verdict::Unknown)),
            Endpoint::Removed => return Ok(Effect::Verdict(Verdict::Removed)),
            Endpoint::InUse(target) => target,
        };
        if let Some(required) = &target.key {
            match proof {
                Proof::Holds(key) if key.as_str() == &**required => {}
                Proof::Failed(error) => return Ok(Effect::Verdict(Verdict::Unauthorized(Some(*error)))),
                Proof::Absent | Proof::Holds(_) => return Ok(Effect::Verdict(Verdict::Unauthorized(None))),
            }
        }
        if let Err(wait) = self.rates.take(target.id, Instant::now()) {
            return Ok(Effect::Verdict(Verdict::TooMany(wait)));
        }
        let kept: usize = [&headers.encoding, &headers.encryption, &headers.crypto_key]
            .into_iter()
            .flatten()
            .map(|text| text.len())
            .sum();
        let size = i64::try_from(data.len() + kept).unwrap_or(i64::MAX);
        let is_stored = headers.ttl > 0;
        let topic = headers.topic.as_deref();
        if is_stored && self.database.is_full(&target, topic, size)? {
            self.database.expire(&target, now)?;
            if self.database.is_full(&target, topic, size)? {
                return Ok(Effect::Verdict(Verdict::TooMany(QUOTA_RETRY)));
            }
        }
        if let Some(topic) = topic {
            self.database.replace(&target, topic)?;
        }
        let mut message = Message {
            seq: None,
            version: version.clone(),
            channel: target.channel.clone(),
            data: data.clone(),
            encoding: headers.encoding.clone(),
            encryption: headers.encryption.clone(),
            crypto_key: headers.crypto_key.clone(),
            expires: now.saturating_add(headers.ttl),
            topic: headers.topic.clone(),
            urgency: headers.urgency,
        };
        if is_stored {
            message.seq = Some(self.database.insert(&target, &message, size)?);
        }
        Ok(Effect::Deliver { uaid: target.uaid, message: Arc::new(message) })
    }

    /// The part that cannot be undone: after the commit, in the order of the commands.
    fn conclude(&mut self, command: Command, result: Result<Effect, StoreError>) {
        match (command, result) {
            (Command::Hello { uaid, fresh, client }, Ok(Effect::Known { known, batch })) => {
                let uaid = uaid.filter(|_| known).unwrap_or(fresh);
                self.welcome(uaid, known, client, batch);
            }
            (Command::Hello { client, .. }, _) => client.gate.raise(Gate::STORAGE),
            (Command::Fetch { uaid, session, .. }, result) => self.hand_out(&uaid, session, result),
            (Command::Register { reply, .. }, result) => answer(reply, result, |effect| match effect {
                Effect::Registered(registered) => Some(registered),
                _ => None,
            }),
            (Command::Unregister { reply, .. }, result) => answer(reply, result, |_| Some(())),
            (Command::Bye { uaid, session }, _) => {
                if self.clients.get(&uaid).is_some_and(|client| client.session == session) {
                    self.clients.remove(&uaid);
                    self.follow_up.push(Command::Touch { uaid });
                }
            }
            (Command::Submit { reply, .. }, Ok(Effect::Deliver { uaid, message })) => {
                if message.seq.is_some() {
                    self.something_stored.notify_one();
                }
                self.deliver(&uaid, message);
                // The sender may have hung up; the message is accepted all the same.
                let _ = reply.send(Ok(Verdict::Accepted));
            }
            (Command::Submit { reply, .. }, result) => answer(reply, result, |effect| match effect {
                Effect::Verdict(verdict) => Some(verdict),
                _ => None,
            }),
            (Command::Delete { reply, .. } | Command::Purge { reply }, result) => {
                answer(reply, result, |effect| match effect {
                    Effect::Flag(flag) => Some(flag),
                    _ => None,
                });
            }
            // Not deleted means sent again, which a device has to bear anyway.
            (Command::Ack { .. } | Command::Forget { .. } | Command::Touch { .. }, _) => {}
        }
    }

    fn welcome(&mut self, uaid: Uaid, known: bool, mut client: Client, batch: Batch) {
        client.is_live = batch.is_last;
        if client.events.try_send(ClientEvent::Welcome(uaid.clone(), batch)).is_err() {
            return;
        }
        if known {
            self.follow_up.push(Command::Touch { uaid: uaid.clone() });
        }
        if let Some(ghost) = self.clients.insert(uaid, client) {
            ghost.gate.raise(Gate::GHOST);
        }
    }

    fn hand_out(&mut self, uaid: &Uaid, session: u64, result: Result<Effect, StoreError>) {
        let Some(client) = self.clients.get_mut(uaid).filter(|client| client.session == session) else { return };
        match result {
            Ok(Effect::Batch(batch)) => {
                client.is_live = batch.is_last;
                if client.events.try_send(ClientEvent::Batch(batch)).is_err() {
                    // Cannot happen while a slot is reserved for it; without the batch the device would wait for ever.
                    client.gate.raise(Gate::STORAGE);
                }
            }
            _ => client.gate.raise(Gate::STORAGE),
        }
    }

    fn deliver(&mut self, uaid: &Uaid, message: Arc<Message>) {
        let Some(client) = self.clients.get_mut(uaid) else { return };
        let is_stored = message.seq.is_some();
        let has_room = client.events.capacity() > RESERVED_SLOTS;
        if is_stored && !client.is_live {
            return;
        }
        if has_room {
            // A closed queue is a socket about to say goodbye.
            let _ = client.events.try_send(ClientEvent::Live(message));
        } else if is_stored {
            client.is_live = false;
            client.gate.raise(Gate::LAGGING);
        } else {
            log::debug!("a message with TTL 0 is dropped: its device has {CLIENT_SLOTS} to read");
        }
    }

    fn report(&mut self, error: &rusqlite::Error) -> StoreError {
        log::error!("database: {error}");
        if is_damage(error)
            && let Some(on_damage) = self.on_damage.take()
        {
            on_damage();
        }
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => StoreError::Full,
            _ => StoreError::Failed,
        }
    }
}

fn batch(messages: Vec<Arc<Message>>) -> Batch {
    let is_last = messages.len() < usize::try_from(BATCH).unwrap_or(usize::MAX);
    Batch { messages, is_last }
}

fn answer<T>(reply: Reply<T>, result: Result<Effect, StoreError>, pick: impl FnOnce(Effect) -> Option<T>) {
    // Who asked may have gone.
    let _ = reply.send(result.and_then(|effect| pick(effect).ok_or(StoreError::Failed)));
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use nightporter::model::Urgency;

    use super::*;
    use crate::{args::Settings, token};

    fn worker(extra: &[&str]) -> Worker {
        let limits = Settings::parse_from(["relay"].iter().chain(extra)).limits;
        Worker {
            database: Database::in_memory(limits).unwrap(),
            clients: HashMap::new(),
            rates: Rates::new(limits.rate, limits.burst, 10),
            something_stored: Arc::new(Notify::new()),
            on_damage: None,
            follow_up: Vec::new(),
        }
    }

    fn uaid() -> Uaid {
        Uaid::parse("0123456789abcdef0123456789abcdef").unwrap()
    }

    type Answer<T> = oneshot::Receiver<Result<T, StoreError>>;

    fn register() -> (Command, Answer<Registered>) {
        let (reply, answer) = oneshot::channel();
        let channel = ChannelId::parse("d5d2a1c4-0c0a-4a5e-9d0a-000000000001").unwrap();
        (Command::Register { uaid: uaid(), channel, key: None, token: "endpoint".into(), reply }, answer)
    }

    fn submit(ttl: i64, size: usize) -> (Command, Answer<Verdict>) {
        let (reply, answer) = oneshot::channel();
        let headers =
            Headers { ttl, topic: None, urgency: Urgency::Normal, encoding: None, encryption: None, crypto_key: None };
        let submission = Submission {
            token: "endpoint".to_owned(),
            version: token::capability().unwrap(),
            headers,
            data: vec![0; size].into(),
            proof: Proof::Absent,
        };
        (Command::Submit { submission, reply }, answer)
    }

    fn connect(worker: &mut Worker, session: u64) -> (mpsc::Receiver<ClientEvent>, Arc<Gate>) {
        let (events, receiver) = mpsc::channel(CLIENT_SLOTS + RESERVED_SLOTS);
        let gate = Arc::new(Gate::default());
        let client = Client { session, events, gate: gate.clone(), is_live: false };
        worker.process(vec![Command::Hello { uaid: Some(uaid()), fresh: Uaid::random().unwrap(), client }]);
        (receiver, gate)
    }

    #[test]
    fn one_command_that_fails_spoils_no_other() {
        let mut worker = worker(&["--max-database", "131072"]);
        worker.process(vec![register().0]);
        let mut accepted = 0;
        let (last, (first, mut refused), (second, mut known)) = loop {
            let (command, mut answer) = submit(60, 4000);
            worker.process(vec![command]);
            match answer.try_recv().unwrap() {
                Ok(Verdict::Accepted) => accepted += 1,
                last => break (last, submit(60, 4000), register()),
            }
        };
        assert_eq!(last, Err(StoreError::Full));
        assert!(accepted > 0);
        worker.process(vec![first, second]);
        assert_eq!(refused.try_recv().unwrap(), Err(StoreError::Full));
        assert_eq!(known.try_recv().unwrap(), Ok(Registered::Token("endpoint".into())));
        assert_eq!(worker.database.waiting(&uaid(), 0, 1000, 0).unwrap().len(), accepted);
    }

    #[test]
    fn a_full_queue_turns_to_the_database_and_back() {
        let mut worker = worker(&[]);
        worker.process(vec![register().0]);
        let (mut events, gate) = connect(&mut worker, 1);
        assert!(matches!(events.try_recv(), Ok(ClientEvent::Welcome(_, Batch { is_last: true, .. }))));
        for _ in 0..CLIENT_SLOTS + 5 {
            worker.process(vec![submit(60, 1).0]);
        }
        worker.process(vec![submit(0, 1).0]);
        assert!(gate.take_lagging() && !gate.take_lagging());
        let live = std::iter::from_fn(|| match events.try_recv() {
            Ok(ClientEvent::Live(message)) => Some(message.seq.unwrap()),
            _ => None,
        });
        let last = live.last().unwrap();
        worker.process(vec![submit(60, 1).0]);
        assert!(events.try_recv().is_err(), "nothing overtakes what is in the database");
        worker.process(vec![Command::Fetch { uaid: uaid(), session: 1, after: last }, submit(60, 1).0]);
        match events.try_recv().unwrap() {
            ClientEvent::Batch(batch) => assert_eq!((batch.messages.len(), batch.is_last), (6, true)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(events.try_recv(), Ok(ClientEvent::Live(_))), "caught up");
    }

    #[test]
    fn the_goodbye_of_a_ghost_does_not_disconnect_its_successor() {
        let mut worker = worker(&[]);
        worker.process(vec![register().0]);
        let (_, ghost) = connect(&mut worker, 1);
        let (mut events, gate) = connect(&mut worker, 2);
        assert_eq!((ghost.kick(), gate.kick()), (Some(Kick::Ghost), None));
        worker.process(vec![Command::Bye { uaid: uaid(), session: 1 }, submit(60, 1).0]);
        assert!(matches!(events.try_recv(), Ok(ClientEvent::Welcome(..))));
        assert!(matches!(events.try_recv(), Ok(ClientEvent::Live(_))));
    }
}
