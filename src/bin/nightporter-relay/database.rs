//! SQLite: devices, channels, messages and the names of removed endpoints. Knows no thread, no clock and no network;
//! every method is one or a few statements inside a transaction its caller has begun.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nightporter::model::Urgency;
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, named_params, params};

use crate::{
    args::Limits,
    autopush::{ChannelId, Message},
    token::Uaid,
    vapid::Key,
};

/// Devices that have not connected for this long are forgotten, as at Mozilla: 60 days in seconds.
const USER_LIFETIME: i64 = 60 * 24 * 60 * 60;
/// Removed endpoints answer 410 for this long, then 404.
const REMOVED_LIFETIME: i64 = 60 * 24 * 60 * 60;
/// A device's last connection is written at most this often: flash wears out.
const SEEN_GRANULARITY: i64 = 24 * 60 * 60;
const SCHEMA_VERSION: i64 = 1;
const PAGE_SIZE: u64 = 4096;
const FILE_NAME: &str = "relay.sqlite3";

// AUTOINCREMENT: a number used again would be behind the cursor of a device that is reading.
const SCHEMA: &str = "
    CREATE TABLE users (
        id INTEGER PRIMARY KEY,
        uaid TEXT NOT NULL UNIQUE,
        seen INTEGER NOT NULL
    );
    CREATE TABLE channels (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
        channel TEXT NOT NULL,
        key TEXT,
        token TEXT NOT NULL UNIQUE,
        UNIQUE (user, channel)
    );
    CREATE TABLE messages (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
        channel INTEGER NOT NULL REFERENCES channels ON DELETE CASCADE,
        version TEXT NOT NULL UNIQUE,
        topic TEXT,
        urgency INTEGER NOT NULL,
        expires INTEGER NOT NULL,
        size INTEGER NOT NULL,
        data BLOB NOT NULL,
        encoding TEXT,
        encryption TEXT,
        crypto_key TEXT
    );
    CREATE INDEX messages_of_user ON messages (user, seq, channel, size);
    CREATE INDEX messages_of_channel ON messages (channel, topic);
    CREATE INDEX messages_by_expiry ON messages (expires);
    CREATE TABLE removed (
        token TEXT PRIMARY KEY,
        at INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX removed_by_age ON removed (at);
    PRAGMA user_version = 1;
";

/// The open database.
#[derive(Debug)]
pub(crate) struct Database {
    connection: Connection,
    limits: Limits,
}

/// Why the database could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// The directory.
    #[error("cannot make the state directory {0}: {1}")]
    Directory(PathBuf, io::Error),
    /// The file.
    #[error("cannot make or write the database {0}: {1}")]
    File(PathBuf, io::Error),
    /// A damaged file that could not be renamed.
    #[error("cannot set the damaged database {0} aside: {1}")]
    Aside(PathBuf, io::Error),
    /// Locked.
    #[error("another nightporter-relay is using {0}")]
    InUse(PathBuf),
    /// Made by a later version.
    #[error("{path} was made by a newer nightporter-relay (schema {version}); upgrade, or use another --state-dir")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its `user_version`.
        version: i64,
    },
    /// Everything else.
    #[error("cannot open the database {0}: {1}")]
    Sqlite(PathBuf, rusqlite::Error),
}

/// Whom an endpoint belongs to.
#[derive(Clone, Debug)]
pub(crate) enum Endpoint {
    /// It never existed, or was removed too long ago.
    Unknown,
    /// It was removed.
    Removed,
    /// It is in use.
    InUse(Target),
}

/// The channel behind an endpoint.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    user: i64,
    /// Its row, which is never used twice.
    pub(crate) id: i64,
    /// The device.
    pub(crate) uaid: Uaid,
    /// The device's name for it.
    pub(crate) channel: Arc<str>,
    /// The VAPID key it was registered with.
    pub(crate) key: Option<Arc<str>>,
}

/// What `register` came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Registered {
    /// The token of the endpoint.
    Token(Arc<str>),
    /// `--max-users` is reached.
    TooManyUsers,
    /// `--max-channels` is reached.
    TooManyChannels,
}

impl Database {
    /// One that is gone when the process is.
    pub(crate) fn in_memory(limits: Limits) -> Result<Self, OpenError> {
        let failed = |error| OpenError::Sqlite(":memory:".into(), error);
        let connection = Connection::open_in_memory().map_err(failed)?;
        prepare(&connection, limits).map_err(failed)?;
        Ok(Self { connection, limits })
    }

    /// The one in `directory`, made if missing. A damaged one is renamed and a fresh one begun.
    pub(crate) fn open(directory: &Path, limits: Limits, now: i64) -> Result<Self, OpenError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| OpenError::Directory(directory.into(), error))?;
        let path = directory.join(FILE_NAME);
        match open_file(&path, limits) {
            Err(OpenError::Sqlite(_, error)) if is_damage(&error) => {
                let aside = set_aside(&path, now)?;
                log::error!(
                    "the database {} is DAMAGED ({error}); it is kept as {} and a fresh one is begun: devices will be \
                     given new endpoints, waiting messages are lost",
                    path.display(),
                    aside.display()
                );
                open_file(&path, limits)
            }
            opened => opened,
        }
        .map(|connection| Self { connection, limits })
    }

    /// Begin a transaction; it becomes a writing one with the first write.
    pub(crate) fn begin(&self) -> rusqlite::Result<()> {
        self.run("BEGIN")
    }

    /// Make everything since `begin` durable.
    pub(crate) fn commit(&self) -> rusqlite::Result<()> {
        self.run("COMMIT")
    }

    /// Undo everything since `begin`, if SQLite has not done so by itself.
    pub(crate) fn rollback(&self) {
        if !self.connection.is_autocommit()
            && let Err(error) = self.run("ROLLBACK")
        {
            log::error!("rollback failed: {error}");
        }
    }

    /// Whether the device has registered anything.
    pub(crate) fn knows(&self, uaid: &Uaid) -> rusqlite::Result<bool> {
        self.user(uaid).map(|user| user.is_some())
    }

    /// Remember that the device was here.
    pub(crate) fn touch(&self, uaid: &Uaid, now: i64) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached("UPDATE users SET seen = ?2 WHERE uaid = ?1 AND seen < ?2 - ?3")?
            .execute(params![uaid.reveal(), now, SEEN_GRANULARITY])
            .map(drop)
    }

    /// Up to `count` messages that wait for the device, oldest first, behind `after`.
    pub(crate) fn waiting(&self, uaid: &Uaid, after: i64, count: u32, now: i64) -> rusqlite::Result<Vec<Arc<Message>>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT m.seq, m.version, c.channel, m.data, m.encoding, m.encryption, m.crypto_key, m.expires, m.topic, m.urgency
             FROM messages m JOIN channels c ON c.id = m.channel
             WHERE m.user = (SELECT id FROM users WHERE uaid = ?1) AND m.seq > ?2 AND m.expires > ?3
             ORDER BY m.seq LIMIT ?4",
        )?;
        let rows = statement.query_map(params![uaid.reveal(), after, now, count], |row| message(row).map(Arc::new))?;
        rows.collect()
    }

    /// Make a channel, or return the endpoint of one that exists with the same key. Another key makes another
    /// endpoint and removes the old one: its holders must not get in with the old key.
    pub(crate) fn register(
        &self,
        uaid: &Uaid,
        channel: &ChannelId,
        key: Option<&Key>,
        token: &Arc<str>,
        now: i64,
    ) -> rusqlite::Result<Registered> {
        let Some(user) = self.user_or_new(uaid, now)? else { return Ok(Registered::TooManyUsers) };
        let key = key.map(Key::as_str);
        let existing = self
            .connection
            .prepare_cached("SELECT id, key, token FROM channels WHERE user = ?1 AND channel = ?2")?
            .query_row(params![user, channel.as_str()], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, Option<String>>(1)?, row.get::<_, Arc<str>>(2)?))
            })
            .optional()?;
        match existing {
            Some((_, known, token)) if known.as_deref() == key => return Ok(Registered::Token(token)),
            Some((id, _, old)) => {
                self.bury(&old, now)?;
                self.connection
                    .prepare_cached("UPDATE channels SET key = ?2, token = ?3 WHERE id = ?1")?
                    .execute(params![id, key, token])?;
            }
            None => {
                if self.count("SELECT count(*) FROM channels WHERE user = ?1", user)?
                    >= i64::from(self.limits.max_channels)
                {
                    return Ok(Registered::TooManyChannels);
                }
                self.connection
                    .prepare_cached("INSERT INTO channels (user, channel, key, token) VALUES (?1, ?2, ?3, ?4)")?
                    .execute(params![user, channel.as_str(), key, token])?;
            }
        }
        Ok(Registered::Token(token.clone()))
    }

    /// Remove a channel and what waits for it. One that does not exist is removed already.
    pub(crate) fn unregister(&self, uaid: &Uaid, channel: &ChannelId, now: i64) -> rusqlite::Result<()> {
        let Some(user) = self.user(uaid)? else { return Ok(()) };
        let removed: Option<Arc<str>> = self
            .connection
            .prepare_cached("DELETE FROM channels WHERE user = ?1 AND channel = ?2 RETURNING token")?
            .query_row(params![user, channel.as_str()], |row| row.get(0))
            .optional()?;
        removed.map_or(Ok(()), |token| self.bury(&token, now))
    }

    /// Drop the device with all its channels and messages.
    pub(crate) fn forget(&self, uaid: &Uaid, now: i64) -> rusqlite::Result<()> {
        let Some(user) = self.user(uaid)? else { return Ok(()) };
        let tokens: Vec<Arc<str>> = self
            .connection
            .prepare_cached("SELECT token FROM channels WHERE user = ?1")?
            .query_map([user], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        for token in tokens {
            self.bury(&token, now)?;
        }
        self.connection.prepare_cached("DELETE FROM users WHERE id = ?1")?.execute([user]).map(drop)
    }

    /// Delete what the device says is safe; versions it was never sent, or that are gone, are passed over.
    pub(crate) fn acknowledge(&self, uaid: &Uaid, versions: &[Arc<str>]) -> rusqlite::Result<()> {
        let mut statement = self.connection.prepare_cached(
            "DELETE FROM messages WHERE version = ?1 AND user = (SELECT id FROM users WHERE uaid = ?2)",
        )?;
        for version in versions {
            statement.execute(params![version, uaid.reveal()])?;
        }
        Ok(())
    }

    /// Whom an endpoint belongs to.
    pub(crate) fn endpoint(&self, token: &str) -> rusqlite::Result<Endpoint> {
        let target = self
            .connection
            .prepare_cached(
                "SELECT c.user, c.id, u.uaid, c.channel, c.key FROM channels c JOIN users u ON u.id = c.user
                 WHERE c.token = ?1",
            )?
            .query_row([token], |row| {
                let uaid: String = row.get(2)?;
                let uaid = Uaid::parse(&uaid).ok_or(rusqlite::Error::InvalidQuery)?;
                Ok(Target { user: row.get(0)?, id: row.get(1)?, uaid, channel: row.get(3)?, key: row.get(4)? })
            })
            .optional()?;
        if let Some(target) = target {
            return Ok(Endpoint::InUse(target));
        }
        let removed = self.connection.prepare_cached("SELECT 1 FROM removed WHERE token = ?1")?.exists([token])?;
        Ok(if removed { Endpoint::Removed } else { Endpoint::Unknown })
    }

    /// Whether a message of `size` bytes that replaces `topic` would exceed what may wait for its device or channel.
    /// Expired messages count until [`Database::expire`]: they take space.
    pub(crate) fn is_full(&self, target: &Target, topic: Option<&str>, size: i64) -> rusqlite::Result<bool> {
        let (messages, bytes, of_channel): (i64, i64, i64) = self
            .connection
            .prepare_cached(
                "SELECT count(*), coalesce(sum(size), 0), coalesce(sum(channel = :channel), 0) FROM messages
                 WHERE user = :user AND seq IS NOT (SELECT seq FROM messages WHERE channel = :channel AND topic = :topic)",
            )?
            .query_row(
                named_params! { ":user": target.user, ":channel": target.id, ":topic": topic },
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
            )?;
        let Limits { max_messages, max_channel_messages, max_bytes, .. } = self.limits;
        Ok(messages >= i64::from(max_messages)
            || of_channel >= i64::from(max_channel_messages)
            || bytes + size > i64::from(max_bytes))
    }

    /// Drop what waits under the topic of a channel.
    pub(crate) fn replace(&self, target: &Target, topic: &str) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached("DELETE FROM messages WHERE channel = ?1 AND topic = ?2")?
            .execute(params![target.id, topic])
            .map(drop)
    }

    /// Store a message; the result is its place in the order.
    pub(crate) fn insert(&self, target: &Target, message: &Message, size: i64) -> rusqlite::Result<i64> {
        self.connection
            .prepare_cached(
                "INSERT INTO messages
                 (user, channel, version, topic, urgency, expires, size, data, encoding, encryption, crypto_key)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
            )?
            .execute(params![
                target.user,
                target.id,
                message.version,
                message.topic,
                urgency_number(message.urgency),
                message.expires,
                size,
                message.data,
                message.encoding,
                message.encryption,
                message.crypto_key,
            ])?;
        Ok(self.connection.last_insert_rowid())
    }

    /// Delete a message on behalf of its sender; whether there was one.
    pub(crate) fn delete(&self, version: &str, now: i64) -> rusqlite::Result<bool> {
        let expires: Option<i64> = self
            .connection
            .prepare_cached("DELETE FROM messages WHERE version = ?1 RETURNING expires")?
            .query_row([version], |row| row.get(0))
            .optional()?;
        Ok(expires.is_some_and(|expires| expires > now))
    }

    /// Delete what is expired, and devices that have not been here for long and are not `connected`; whether anything
    /// is left that will expire.
    pub(crate) fn purge(&self, now: i64, connected: impl Fn(&Uaid) -> bool) -> rusqlite::Result<bool> {
        self.connection.prepare_cached("DELETE FROM messages WHERE expires <= ?1")?.execute([now])?;
        self.connection.prepare_cached("DELETE FROM removed WHERE at <= ?1")?.execute([now - REMOVED_LIFETIME])?;
        let absent: Vec<String> = self
            .connection
            .prepare_cached("SELECT uaid FROM users WHERE seen <= ?1")?
            .query_map([now - USER_LIFETIME], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        for uaid in absent.iter().filter_map(|uaid| Uaid::parse(uaid)).filter(|uaid| !connected(uaid)) {
            self.forget(&uaid, now)?;
        }
        self.connection.query_row(
            "SELECT EXISTS (SELECT 1 FROM messages) OR EXISTS (SELECT 1 FROM removed)",
            [],
            |row| row.get(0),
        )
    }

    /// Delete the expired messages of one device, to make room.
    pub(crate) fn expire(&self, target: &Target, now: i64) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached("DELETE FROM messages WHERE user = ?1 AND expires <= ?2")?
            .execute([target.user, now])
            .map(drop)
    }

    fn run(&self, sql: &str) -> rusqlite::Result<()> {
        self.connection.prepare_cached(sql)?.execute([]).map(drop)
    }

    fn user(&self, uaid: &Uaid) -> rusqlite::Result<Option<i64>> {
        self.connection
            .prepare_cached("SELECT id FROM users WHERE uaid = ?1")?
            .query_row([uaid.reveal()], |row| row.get(0))
            .optional()
    }

    fn user_or_new(&self, uaid: &Uaid, now: i64) -> rusqlite::Result<Option<i64>> {
        if let Some(user) = self.user(uaid)? {
            return Ok(Some(user));
        }
        let users: i64 = self.connection.query_row("SELECT count(*) FROM users", [], |row| row.get(0))?;
        if users >= i64::from(self.limits.max_users) {
            return Ok(None);
        }
        self.connection
            .prepare_cached("INSERT INTO users (uaid, seen) VALUES (?1, ?2)")?
            .execute(params![uaid.reveal(), now])?;
        Ok(Some(self.connection.last_insert_rowid()))
    }

    fn count(&self, sql: &str, of: i64) -> rusqlite::Result<i64> {
        self.connection.prepare_cached(sql)?.query_row([of], |row| row.get(0))
    }

    fn bury(&self, token: &str, now: i64) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached("INSERT OR REPLACE INTO removed (token, at) VALUES (?1, ?2)")?
            .execute(params![token, now])?;
        self.connection
            .prepare_cached(
                "DELETE FROM removed WHERE token IN (SELECT token FROM removed ORDER BY at DESC LIMIT -1 OFFSET ?1)",
            )?
            .execute([self.limits.max_removed])
            .map(drop)
    }
}

/// Whether the file is broken, in contrast to the disk or the request.
pub(crate) fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

fn open_file(path: &Path, limits: Limits) -> Result<Connection, OpenError> {
    let failed = |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => OpenError::InUse(path.into()),
        _ => OpenError::Sqlite(path.into(), error),
    };
    // SQLite gives its journals the mode of the database; whoever can read it can read and use every endpoint.
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| OpenError::File(path.into(), error))?;
    let connection = Connection::open(path).map_err(failed)?;
    connection.busy_timeout(Duration::from_secs(1)).map_err(failed)?;
    connection
        .execute_batch("PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
        .map_err(failed)?;
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(failed)?;
    if verdict != "ok" {
        let damage = rusqlite::ffi::Error { code: ErrorCode::DatabaseCorrupt, extended_code: 11 };
        return Err(failed(rusqlite::Error::SqliteFailure(damage, Some(verdict))));
    }
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
    if version > SCHEMA_VERSION {
        return Err(OpenError::Newer { path: path.into(), version });
    }
    prepare(&connection, limits).map_err(failed)?;
    Ok(connection)
}

fn prepare(connection: &Connection, limits: Limits) -> rusqlite::Result<()> {
    connection.set_prepared_statement_cache_capacity(64);
    connection.execute_batch(&format!(
        "PRAGMA foreign_keys = ON; PRAGMA journal_size_limit = 1048576; PRAGMA max_page_count = {};",
        limits.max_database / PAGE_SIZE
    ))?;
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version == 0 {
        connection.execute_batch(&format!("BEGIN IMMEDIATE; {SCHEMA} COMMIT;"))?;
    }
    Ok(())
}

fn set_aside(path: &Path, now: i64) -> Result<PathBuf, OpenError> {
    let suffixed = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let aside = suffixed(&format!(".damaged-{now}"));
    fs::rename(path, &aside).map_err(|error| OpenError::Aside(path.into(), error))?;
    // A journal left behind would be replayed into the fresh file.
    for journal in ["-wal", "-shm"] {
        match fs::rename(suffixed(journal), suffixed(&format!(".damaged-{now}{journal}"))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(OpenError::Aside(suffixed(journal), error));
            }
            _ => {}
        }
    }
    Ok(aside)
}

fn message(row: &Row<'_>) -> rusqlite::Result<Message> {
    Ok(Message {
        seq: Some(row.get(0)?),
        version: row.get(1)?,
        channel: row.get(2)?,
        data: row.get(3)?,
        encoding: row.get(4)?,
        encryption: row.get(5)?,
        crypto_key: row.get(6)?,
        expires: row.get(7)?,
        topic: row.get(8)?,
        urgency: urgency(row.get(9)?),
    })
}

const URGENCIES: [Urgency; 4] = [Urgency::VeryLow, Urgency::Low, Urgency::Normal, Urgency::High];

fn urgency_number(urgency: Urgency) -> i64 {
    URGENCIES.iter().zip(0..).find_map(|(candidate, number)| (*candidate == urgency).then_some(number)).unwrap_or(2)
}

fn urgency(number: i64) -> Urgency {
    usize::try_from(number).ok().and_then(|index| URGENCIES.get(index)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Settings;

    const DAY: i64 = 24 * 60 * 60;

    fn database(extra: &[&str]) -> Database {
        Database::in_memory(Settings::parse_from(["relay"].iter().chain(extra)).limits).unwrap()
    }

    fn uaid(digit: char) -> Uaid {
        Uaid::parse(&String::from(digit).repeat(32)).unwrap()
    }

    fn channel(number: u32) -> ChannelId {
        ChannelId::parse(&format!("d5d2a1c4-0c0a-4a5e-9d0a-{number:012x}")).unwrap()
    }

    fn target(database: &Database, token: &str) -> Target {
        match database.endpoint(token).unwrap() {
            Endpoint::InUse(target) => target,
            other => panic!("{other:?}"),
        }
    }

    fn message(version: &str, expires: i64, urgency: Urgency) -> Message {
        Message {
            seq: None,
            version: version.into(),
            channel: channel(1).as_str().into(),
            data: Arc::from(&b"data"[..]),
            encoding: Some("aes128gcm".into()),
            encryption: Some("salt".into()),
            crypto_key: Some("dh".into()),
            expires,
            topic: Some("topic".into()),
            urgency,
        }
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let database = database(&[]);
        database.register(&uaid('a'), &channel(1), None, &"t".into(), 0).unwrap();
        let target = target(&database, "t");
        for urgency in URGENCIES {
            let mut sent = message(&format!("{urgency:?}"), 10, urgency);
            sent.topic = Some(format!("{urgency:?}").into());
            sent.seq = Some(database.insert(&target, &sent, 4).unwrap());
            let last = sent.seq.unwrap() - 1;
            assert_eq!(*database.waiting(&uaid('a'), last, 1, 9).unwrap()[0], sent);
        }
        assert_eq!(database.waiting(&uaid('a'), 0, 9, 10).unwrap(), [], "expired");
        assert_eq!(database.waiting(&uaid('b'), 0, 9, 0).unwrap(), [], "somebody else's");
    }

    #[test]
    fn a_device_acknowledges_its_own_messages_only() {
        let database = database(&[]);
        database.register(&uaid('a'), &channel(1), None, &"t".into(), 0).unwrap();
        database.insert(&target(&database, "t"), &message("v", 10, Urgency::Normal), 4).unwrap();
        database.acknowledge(&uaid('b'), &["v".into()]).unwrap();
        assert_eq!(database.waiting(&uaid('a'), 0, 9, 0).unwrap().len(), 1);
        database.acknowledge(&uaid('a'), &["v".into()]).unwrap();
        assert_eq!(database.waiting(&uaid('a'), 0, 9, 0).unwrap().len(), 0);
    }

    #[test]
    fn places_are_never_used_twice() {
        let database = database(&[]);
        database.register(&uaid('a'), &channel(1), None, &"t".into(), 0).unwrap();
        let target = target(&database, "t");
        let first = database.insert(&target, &message("v", 10, Urgency::Normal), 4).unwrap();
        assert!(database.delete("v", 0).unwrap());
        assert!(database.insert(&target, &message("w", 10, Urgency::Normal), 4).unwrap() > first);
    }

    #[test]
    fn purging_removes_what_is_over() {
        let database = database(&[]);
        for (uaid, token) in [(uaid('a'), "a"), (uaid('b'), "b"), (uaid('c'), "c")] {
            database.register(&uaid, &channel(1), None, &token.into(), 0).unwrap();
        }
        database.insert(&target(&database, "a"), &message("v", 10, Urgency::Normal), 4).unwrap();
        assert!(database.purge(9, |_| false).unwrap(), "it still waits");
        assert!(!database.purge(10, |_| false).unwrap());

        database.touch(&uaid('a'), 30 * DAY).unwrap();
        assert!(database.purge(60 * DAY, |connected| *connected == uaid('b')).unwrap(), "a removed endpoint is left");
        assert!(database.knows(&uaid('a')).unwrap() && database.knows(&uaid('b')).unwrap());
        assert!(!database.knows(&uaid('c')).unwrap(), "absent for 60 days");
        assert!(matches!(database.endpoint("c").unwrap(), Endpoint::Removed));
        database.purge(120 * DAY, |_| true).unwrap();
        assert!(matches!(database.endpoint("c").unwrap(), Endpoint::Unknown));
    }

    #[test]
    fn removed_endpoints_are_bounded_oldest_first() {
        let database = database(&["--max-removed", "2"]);
        for (number, token) in (1..).zip(["a", "b", "c"]) {
            database.register(&uaid('a'), &channel(number), None, &token.into(), 0).unwrap();
            database.unregister(&uaid('a'), &channel(number), i64::from(number)).unwrap();
        }
        assert!(matches!(database.endpoint("a").unwrap(), Endpoint::Unknown));
        assert!(matches!(database.endpoint("b").unwrap(), Endpoint::Removed));
        assert!(matches!(database.endpoint("c").unwrap(), Endpoint::Removed));
    }
}
