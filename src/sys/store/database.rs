//! The database file: made, checked, brought up to date, kept aside when damaged; transactions and their errors.

#![expect(unsafe_code, reason = "two SQLite calls that rusqlite has no safe wrapper for")]

use std::{
    ffi::c_int,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    ptr,
    sync::{Arc, Once},
    time::Duration,
};

use nix::errno::Errno;
use rusqlite::{Connection, Error, ErrorCode, OpenFlags, Transaction, TransactionBehavior, ffi};

use super::{
    StoreOpenError, Work,
    history::{self, Tidied},
    routes,
    rows::{self, Numbers},
    states, transfers, unusable,
};
use crate::{
    action::StoreOp,
    event::StoreError,
    model::{AppKey, HistoryRow, MessageSeq, Snapshot},
    sys::clock,
    time::UnixTime,
};

const FILE: &str = "nightporter.db";
const LOCK: &str = "lock";
/// "NPrt": tells file(1), and us, whose database it is.
const APPLICATION_ID: i64 = 0x4e50_7274;
/// The newest format we know: the number of [`MIGRATIONS`].
const FORMAT: i64 = MIGRATIONS.len() as i64;
/// What makes format n+1 of format n.
const MIGRATIONS: [&str; 5] =
    [rows::FORMAT_1, routes::FORMAT_2, states::FORMAT_3, transfers::FORMAT_4, history::TABLES];
/// Checking a file this large takes about 0.1 s on eMMC. A larger one is only checked where it is read anyway.
const CHECKED_SIZE: u64 = 8 * 1024 * 1024;
/// Free pages (4 KiB) above which the file is shortened after a burst.
const SPARE_PAGES: i64 = 256;

/// The open database, and the lock that makes it ours alone.
pub(super) struct Database {
    connection: Connection,
    path: PathBuf,
    numbers: Numbers,
    tidied: Tidied,
    /// Locked until dropped.
    _lock: File,
}

/// Why a transaction was rolled back.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum WriteError {
    #[error("the disk is full")]
    Full,
    #[error(
        "the database is damaged ({0}); restart nightporterd, it keeps the damaged file aside and begins a fresh one"
    )]
    Damaged(String),
    #[error("the database refused it: {0}")]
    Constraint(String),
    #[error("{0}")]
    Other(String),
}

impl From<WriteError> for StoreError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Full => Self::Full,
            other => Self::Other(other.to_string()),
        }
    }
}

impl Database {
    pub(super) fn open(dir: &Path) -> Result<(Self, Snapshot), StoreOpenError> {
        configure();
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| unusable(dir, &e))?;
        let lock = lock(dir)?;
        let path = dir.join(FILE);
        let mut damaged = None;
        loop {
            match load(&path) {
                Ok((connection, mut snapshot, numbers)) => {
                    snapshot.damaged = damaged;
                    let tidied = Tidied::default();
                    return Ok((Self { connection, path, numbers, tidied, _lock: lock }, snapshot));
                }
                Err(LoadError::Damaged(problem)) if damaged.is_none() => {
                    let aside = keep_aside(&path).map_err(|e| unusable(&path, &e))?;
                    log::error!(
                        "{} is damaged ({problem}): it was moved to {} and a fresh one begun; apps must register again",
                        path.display(),
                        aside.display()
                    );
                    damaged = Some(Arc::from(aside.to_string_lossy()));
                }
                Err(LoadError::Damaged(problem)) => return Err(StoreOpenError::Unusable { path, problem }),
                Err(LoadError::Failed(error)) => return Err(error),
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Adds `history` and does `works` in order, all or none, and makes them durable. Gives the bodies asked for, in order.
    pub(super) fn write<'a>(
        &mut self,
        works: impl Iterator<Item = &'a Work>,
        history: &[HistoryRow],
    ) -> Result<Vec<Option<Arc<[u8]>>>, WriteError> {
        let result = (|| {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let mut bodies = Vec::new();
            let mut changes = rows::Changes::default();
            history::put(&transaction, history, &mut self.tidied)?;
            for work in works {
                match work {
                    Work::Op(StoreOp::LoadBody(seq)) => bodies.push(body(&transaction, *seq)),
                    Work::Op(op) => rows::apply(&transaction, op, &mut self.numbers, &mut changes)?,
                    Work::Ended(message, ending) => {
                        rows::put_ended(&transaction, message, *ending, &mut self.numbers, &mut changes)?;
                    }
                    Work::Refused => {}
                }
            }
            rows::tidy(&transaction, &mut self.numbers, &changes)?;
            transaction.commit()?;
            Ok(bodies)
        })();
        result.map_err(|error| write_error(&self.connection, &error))
    }

    /// A message's body; none when it is gone or unreadable.
    pub(super) fn body(&self, seq: MessageSeq) -> Option<Arc<[u8]>> {
        body(&self.connection, seq)
    }

    /// An app's saved state; none when there is none.
    pub(super) fn state(&self, app: &AppKey) -> Result<Option<Arc<[u8]>>, StoreError> {
        states::load(&self.connection, app).map_err(|error| write_error(&self.connection, &error).into())
    }

    /// The history since then, with the rows that are not written yet.
    pub(super) fn history(&self, since: UnixTime, waiting: &[HistoryRow]) -> Result<Vec<HistoryRow>, StoreError> {
        history::load(&self.connection, since, waiting).map_err(|error| write_error(&self.connection, &error).into())
    }

    /// Gives memory, and disk when there is much to give, back to the system.
    pub(super) fn release(&self) {
        let result = (|| {
            let spare: i64 = self.connection.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
            if spare > SPARE_PAGES {
                self.connection.execute_batch("PRAGMA incremental_vacuum")?;
            }
            self.connection.flush_prepared_statement_cache();
            self.connection.release_memory()
        })();
        if let Err(error) = result {
            log::debug!("cannot tidy {}: {error}", self.path.display());
        }
    }

    /// Folds the journal into the database so that its space is written again from the start; false if that failed.
    pub(super) fn reuse_journal(&self) -> bool {
        let busy = self.connection.query_row("PRAGMA wal_checkpoint(RESTART)", [], |row| row.get::<_, i64>(0));
        busy == Ok(0)
    }

    /// Folds the journal into the database and closes it.
    pub(super) fn close(self) {
        let checkpoint = self.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
        let closed = self.connection.close().map_err(|(_, error)| error);
        if let Err(error) = checkpoint.and(closed) {
            // Nothing is lost: the journal is read at the next start.
            log::warn!("cannot close {} cleanly: {error}", self.path.display());
        }
    }
}

enum LoadError {
    Damaged(String),
    Failed(StoreOpenError),
}

/// Process-wide settings that make SQLite small. They count only before its first use.
fn configure() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: sqlite3_config takes, after each of these options, exactly the arguments given here (two ints; one
        // int; a pointer, which may be null, and two ints). It is called once, before this process' first connection;
        // were SQLite in use already, it would refuse with SQLITE_MISUSE.
        let results = unsafe {
            [
                // No statistics: saves a mutex on every allocation.
                ffi::sqlite3_config(ffi::SQLITE_CONFIG_MEMSTATUS, c_int::from(false)),
                ffi::sqlite3_config(ffi::SQLITE_CONFIG_SMALL_MALLOC, c_int::from(true)),
                // 120 KiB a connection by default; we run one short statement at a time.
                ffi::sqlite3_config(ffi::SQLITE_CONFIG_LOOKASIDE, c_int::from(128_i16), c_int::from(64_i16)),
                // No page buffers ahead of need.
                ffi::sqlite3_config(
                    ffi::SQLITE_CONFIG_PAGECACHE,
                    ptr::null_mut::<std::ffi::c_void>(),
                    c_int::from(0_i16),
                    c_int::from(0_i16),
                ),
            ]
        };
        if results.iter().any(|&result| result != ffi::SQLITE_OK) {
            log::debug!("SQLite was in use before it could be made small: {results:?}");
        }
    });
}

/// The file's lock lasts as long as it is open. Closing it with the process, however that ends, releases it.
fn lock(dir: &Path) -> Result<File, StoreOpenError> {
    let path = dir.join(LOCK);
    let unusable = |error: io::Error| unusable(&path, &error);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(unusable)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = file.take(20).read_to_string(&mut pid);
            let pid = pid.trim();
            let pid = if !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit()) { pid } else { "unknown" };
            return Err(StoreOpenError::Locked { dir: dir.to_owned(), pid: pid.to_owned() });
        }
        Err(TryLockError::Error(error)) => return Err(unusable(error)),
    }
    // Only for people; on a full disk the lock holds without it.
    if let Err(error) = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())) {
        log::warn!("cannot write {}: {error}", path.display());
    }
    Ok(file)
}

fn load(path: &Path) -> Result<(Connection, Snapshot, Numbers), LoadError> {
    // SQLite would make it readable for everyone; endpoints are secrets.
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| LoadError::Failed(unusable(path, &e)))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).map_err(|e| load_error(path, None, &e))?;
    match read(&mut connection, path) {
        Ok((snapshot, numbers)) => Ok((connection, snapshot, numbers)),
        Err(ReadError::Sqlite(error)) => Err(load_error(path, Some(&connection), &error)),
        Err(ReadError::Damaged(problem)) => Err(LoadError::Damaged(problem)),
        Err(ReadError::Newer(found)) => {
            Err(LoadError::Failed(StoreOpenError::Newer { path: path.to_owned(), found, known: FORMAT }))
        }
    }
}

enum ReadError {
    Sqlite(Error),
    Damaged(String),
    Newer(i64),
}

impl From<Error> for ReadError {
    fn from(error: Error) -> Self {
        Self::Sqlite(error)
    }
}

fn read(connection: &mut Connection, path: &Path) -> Result<(Snapshot, Numbers), ReadError> {
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.set_prepared_statement_cache_capacity(8);
    let number =
        |c: &Connection, pragma: &str| c.query_row(&format!("PRAGMA {pragma}"), [], |row| row.get::<_, i64>(0));
    // Reading these changes nothing, so a newer or foreign file stays as it is.
    let format = number(connection, "user_version")?;
    let application = number(connection, "application_id")?;
    let empty = number(connection, "schema_version")? == 0;
    if !empty && application != APPLICATION_ID {
        return Err(ReadError::Damaged(format!("not a database of nightporterd: application id {application:#x}")));
    }
    if format > FORMAT {
        return Err(ReadError::Newer(format));
    }
    if format < 0 || (!empty && format == 0) {
        return Err(ReadError::Damaged(format!("impossible format {format}")));
    }
    if empty {
        // Both count only before the first table is made.
        connection.execute_batch("PRAGMA page_size = 4096; PRAGMA auto_vacuum = INCREMENTAL;")?;
    }
    connection.execute_batch(
        // FULL: durable at commit. A negative cache_size is in KiB. The journal is folded into the database at 1 MiB:
        // rare enough for flash, small enough for the disk.
        "PRAGMA journal_mode = WAL;
         PRAGMA synchronous = FULL;
         PRAGMA cache_size = -128;
         PRAGMA mmap_size = 0;
         PRAGMA temp_store = MEMORY;
         PRAGMA wal_autocheckpoint = 256;
         PRAGMA journal_size_limit = 1048576;",
    )?;
    if !empty && fs::metadata(path).is_ok_and(|m| m.len() <= CHECKED_SIZE) {
        let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if verdict != "ok" {
            return Err(ReadError::Damaged(verdict));
        }
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    migrate(&transaction, format)?;
    let (snapshot, numbers) = rows::read(&transaction)?;
    transaction.commit()?;
    connection.release_memory()?;
    Ok((snapshot, numbers))
}

fn migrate(transaction: &Transaction<'_>, format: i64) -> rusqlite::Result<()> {
    let known = usize::try_from(format).unwrap_or(MIGRATIONS.len());
    if known == MIGRATIONS.len() {
        return Ok(());
    }
    for step in MIGRATIONS.iter().skip(known) {
        transaction.execute_batch(step)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", FORMAT)
}

fn load_error(path: &Path, connection: Option<&Connection>, error: &Error) -> LoadError {
    match connection.map_or_else(|| WriteError::Other(error.to_string()), |c| write_error(c, error)) {
        WriteError::Damaged(_) => LoadError::Damaged(error.to_string()),
        // A table or column is missing although the format is right: somebody edited it, or a bit flipped.
        WriteError::Other(_) if is_schema_error(error) => LoadError::Damaged(error.to_string()),
        WriteError::Full => LoadError::Failed(StoreOpenError::Full { path: path.to_owned() }),
        other => LoadError::Failed(StoreOpenError::Unusable { path: path.to_owned(), problem: other.to_string() }),
    }
}

/// Plain SQLITE_ERROR for one of our own statements: the tables are not what the format says.
fn is_schema_error(error: &Error) -> bool {
    match error {
        Error::SqliteFailure(failure, _) => failure.extended_code == ffi::SQLITE_ERROR,
        Error::SqlInputError { .. } | Error::InvalidColumnType(..) | Error::QueryReturnedNoRows => true,
        _ => false,
    }
}

fn write_error(connection: &Connection, error: &Error) -> WriteError {
    let text = error.to_string();
    let Error::SqliteFailure(failure, _) = error else { return WriteError::Other(text) };
    match failure.code {
        ErrorCode::DiskFull => WriteError::Full,
        ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => WriteError::Damaged(text),
        ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig => WriteError::Constraint(text),
        ErrorCode::SystemIoFailure | ErrorCode::CannotOpen => {
            // SAFETY: the handle is that of an open connection which only this thread uses, and is not kept.
            let errno = unsafe { ffi::sqlite3_system_errno(connection.handle()) };
            match Errno::from_raw(errno) {
                Errno::ENOSPC | Errno::EDQUOT => WriteError::Full,
                errno => WriteError::Other(format!("{text} ({errno})")),
            }
        }
        _ => WriteError::Other(text),
    }
}

fn body(connection: &Connection, seq: MessageSeq) -> Option<Arc<[u8]>> {
    rows::body(connection, seq).unwrap_or_else(|error| {
        log::error!("cannot read message {}: {error}", seq.0);
        None
    })
}

/// Moves the database and what belongs to it to a name nothing has yet.
fn keep_aside(path: &Path) -> io::Result<PathBuf> {
    let with = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let secs = clock::now().wall.as_millis() / 1000;
    let mut mark = format!(".damaged-{secs}");
    for n in 2.. {
        if !with(&mark).exists() {
            break;
        }
        mark = format!(".damaged-{secs}.{n}");
    }
    // The database last: should we be interrupted, it is found damaged again.
    for suffix in ["-shm", "-wal", ""] {
        match fs::rename(with(suffix), with(&format!("{mark}{suffix}"))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(with(&mark))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_durable_and_the_connection_is_small() {
        let dir = tempfile::tempdir().unwrap();
        // The second time the file is there already.
        for _ in 0..2 {
            let (database, _) = Database::open(dir.path()).unwrap();
            let pragma = |name: &str| {
                database
                    .connection
                    .query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, rusqlite::types::Value>(0))
                    .unwrap()
            };
            assert_eq!(pragma("journal_mode"), "wal".to_owned().into());
            assert_eq!(pragma("synchronous"), 2.into());
            assert_eq!(pragma("auto_vacuum"), 2.into());
            assert_eq!(pragma("page_size"), 4096.into());
            assert_eq!(pragma("cache_size"), (-128).into());
            assert_eq!(pragma("application_id"), APPLICATION_ID.into());
            assert_eq!(pragma("user_version"), FORMAT.into());
            database.close();
        }
    }
}
