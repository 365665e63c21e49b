//! Tables and rows: what each operation does to them, and how a snapshot is read.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use rusqlite::{Connection, OptionalExtension, Result, Row, params};

use super::{history, routes, states, transfers};
use crate::{
    action::StoreOp,
    model::{
        AppKey, AppRecord, Bus, ConnectorVersion, Ending, Memory, Message, MessageSeq, Registration, RegistrationId,
        Snapshot, StoredMessage, Urgency,
    },
    time::UnixTime,
};

/// The tables of format 1.
///
/// A message that ended keeps its row, without the body, to know duplicates by; `ended` counts the order of endings.
/// `numbers` keeps what deleted rows would otherwise make forgotten.
pub(super) const FORMAT_1: &str = "
    CREATE TABLE registrations (
        id INTEGER PRIMARY KEY, bus INTEGER NOT NULL, service TEXT NOT NULL, token TEXT NOT NULL,
        description TEXT NOT NULL, vapid TEXT, version INTEGER NOT NULL, upstream TEXT NOT NULL, channel TEXT NOT NULL,
        endpoint TEXT NOT NULL, told INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE messages (
        seq INTEGER PRIMARY KEY, registration INTEGER NOT NULL, id TEXT NOT NULL, body BLOB, received INTEGER NOT NULL,
        expires INTEGER NOT NULL, topic TEXT, urgency INTEGER NOT NULL, ending INTEGER, ended INTEGER,
        UNIQUE (registration, id)
    ) STRICT;
    CREATE INDEX messages_ended ON messages (registration, ended) WHERE ended IS NOT NULL;
    CREATE TABLE upstreams (
        upstream TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (upstream, key)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE apps (
        bus INTEGER NOT NULL, service TEXT NOT NULL, declares INTEGER NOT NULL, pss INTEGER, uss INTEGER, swap INTEGER,
        measured INTEGER, PRIMARY KEY (bus, service)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE numbers (
        one INTEGER PRIMARY KEY CHECK (one = 1), next_registration INTEGER NOT NULL, next_message INTEGER NOT NULL
    ) STRICT;
    INSERT INTO numbers VALUES (1, 1, 1);
";

/// Ids of ended messages kept per registration.
const SEEN: usize = 1000;
/// Ids above [`SEEN`] before the oldest are deleted, so that it is done once in so many messages.
const SEEN_SLACK: usize = 64;
/// Endings of any registration between two looks at the same one, which walk all its ids.
const TIDY_EVERY: i64 = 32;

/// The first numbers not used yet.
pub(super) struct Numbers {
    registration: i64,
    message: i64,
    ended: i64,
    /// For each registration the `ended` at which its ids were last looked through.
    tidied: BTreeMap<i64, i64>,
}

/// What [`tidy`] must look at before a commit.
#[derive(Default)]
pub(super) struct Changes {
    ended: BTreeSet<i64>,
    deleted: bool,
}

/// Does what `op` says, except what loads, which changes nothing, and `PutHistory`, which waits for the others.
pub(super) fn apply(db: &Connection, op: &StoreOp, numbers: &mut Numbers, changes: &mut Changes) -> Result<()> {
    match op {
        StoreOp::PutRegistration(registration) => {
            numbers.registration = numbers.registration.max(signed(registration.id.0).saturating_add(1));
            put_registration(db, registration)
        }
        StoreOp::DeleteRegistration(id) => {
            changes.deleted = true;
            numbers.tidied.remove(&signed(id.0));
            db.prepare_cached("DELETE FROM messages WHERE registration = ?1")?.execute([signed(id.0)])?;
            db.prepare_cached("DELETE FROM registrations WHERE id = ?1")?.execute([signed(id.0)])?;
            routes::delete_all_former(db, *id)
        }
        StoreOp::PutMessage(message) => {
            numbers.message = numbers.message.max(signed(message.seq.0).saturating_add(1));
            put_message(db, message)
        }
        StoreOp::EndMessage(seq, ending) => end_message(db, *seq, *ending, numbers, changes),
        StoreOp::LoadBody(_) | StoreOp::LoadState(_) | StoreOp::PutHistory(_) | StoreOp::LoadHistory(_) => Ok(()),
        StoreOp::PutUpstream { upstream, key, value } if value.is_empty() => {
            db.prepare_cached("DELETE FROM upstreams WHERE upstream = ?1 AND key = ?2")?.execute([upstream, key])?;
            Ok(())
        }
        StoreOp::PutUpstream { upstream, key, value } => {
            db.prepare_cached("INSERT OR REPLACE INTO upstreams VALUES (?1, ?2, ?3)")?
                .execute([upstream, key, value])?;
            Ok(())
        }
        StoreOp::PutFormer(route) => routes::put_former(db, route),
        StoreOp::DeleteFormer(registration, upstream) => routes::delete_former(db, *registration, upstream),
        StoreOp::PutPreference(preference) => routes::put_preference(db, preference),
        StoreOp::DeletePreference(bus, service) => routes::delete_preference(db, *bus, service.as_deref()),
        StoreOp::PutApp(record) => put_app(db, record),
        StoreOp::DeleteApp(app) => {
            db.prepare_cached("DELETE FROM apps WHERE bus = ?1 AND service = ?2")?
                .execute(params![app.bus.to_number(), app.service])?;
            transfers::delete_all(db, app)?;
            history::delete(db, app)?;
            states::put(db, app, &[])
        }
        StoreOp::PutState(app, state) => states::put(db, app, state),
        StoreOp::PutTransfer(transfer) | StoreOp::NoteTransfer(transfer) => transfers::put(db, transfer),
        StoreOp::DeleteTransfer(id) => transfers::delete(db, *id),
    }
}

/// Keeps the id of a message that was never written and need not be any more.
pub(super) fn put_ended(
    db: &Connection,
    message: &Message,
    ending: Ending,
    numbers: &mut Numbers,
    changes: &mut Changes,
) -> Result<()> {
    numbers.message = numbers.message.max(signed(message.seq.0).saturating_add(1));
    put_message(db, message)?;
    end_message(db, message.seq, ending, numbers, changes)
}

/// Drops what is not needed any more; last in a transaction.
pub(super) fn tidy(db: &Connection, numbers: &mut Numbers, changes: &Changes) -> Result<()> {
    let mut deleted = changes.deleted;
    for registration in &changes.ended {
        if numbers.tidied.get(registration).is_some_and(|at| numbers.ended - at < TIDY_EVERY) {
            continue;
        }
        numbers.tidied.insert(*registration, numbers.ended);
        // Index steps only, and none of them a deletion until the slack is used up.
        let pruned = db
            .prepare_cached(
                "DELETE FROM messages WHERE registration = ?1 AND ended <= (
                     SELECT ended FROM messages WHERE registration = ?1 AND ended IS NOT NULL
                     ORDER BY ended DESC LIMIT 1 OFFSET ?2
                 ) AND EXISTS (
                     SELECT 1 FROM messages WHERE registration = ?1 AND ended IS NOT NULL LIMIT 1 OFFSET ?3
                 )",
            )?
            .execute(params![registration, SEEN as i64, (SEEN + SEEN_SLACK) as i64])?;
        deleted |= pruned > 0;
    }
    if deleted {
        db.prepare_cached("UPDATE numbers SET next_registration = ?1, next_message = ?2")?
            .execute([numbers.registration, numbers.message])?;
    }
    Ok(())
}

/// A message's body; none when there is no such message or it ended.
pub(super) fn body(db: &Connection, seq: MessageSeq) -> Result<Option<Arc<[u8]>>> {
    let body: Option<Option<Arc<[u8]>>> = db
        .prepare_cached("SELECT body FROM messages WHERE seq = ?1")?
        .query_row([signed(seq.0)], |row| row.get(0))
        .optional()?;
    Ok(body.flatten())
}

/// Everything but the bodies. A row that makes no sense is left out and logged; an error means the file is damaged.
pub(super) fn read(db: &Connection) -> Result<(Snapshot, Numbers)> {
    let mut numbers = db.query_row(
        "SELECT max(next_registration, (SELECT ifnull(max(id), 0) + 1 FROM registrations)),
                max(next_message, (SELECT ifnull(max(seq), 0) + 1 FROM messages)),
                (SELECT ifnull(max(ended), 0) + 1 FROM messages)
         FROM numbers",
        [],
        |row| {
            Ok(Numbers { registration: row.get(0)?, message: row.get(1)?, ended: row.get(2)?, tidied: BTreeMap::new() })
        },
    )?;
    numbers.registration = numbers.registration.max(1);
    numbers.message = numbers.message.max(1);
    drop_orphans(db, &mut numbers)?;
    states::drop_orphans(db)?;
    transfers::drop_orphans(db)?;
    let (transfers, next_transfer) = transfers::read(db)?;
    let snapshot = Snapshot {
        registrations: rows(
            db,
            "SELECT id, bus, service, token, description, vapid, version, upstream, channel, endpoint, told
             FROM registrations ORDER BY id",
            registration,
        )?,
        messages: rows(
            db,
            "SELECT seq, registration, id, length(body), expires, topic, urgency, received FROM messages
             WHERE ended IS NULL ORDER BY seq",
            message,
        )?,
        seen: seen(db)?,
        upstreams: rows(db, "SELECT upstream, key, value FROM upstreams", |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?,
        apps: rows(db, "SELECT bus, service, declares, pss, uss, swap, measured, conditions FROM apps", app)?,
        former: routes::former(db)?,
        preferences: routes::preferences(db)?,
        states: states::sizes(db)?,
        transfers,
        next_transfer,
        next_registration: numbers.registration.unsigned_abs(),
        next_message: numbers.message.unsigned_abs(),
        damaged: None,
    };
    Ok((snapshot, numbers))
}

/// Messages whose registration could not be stored while they could: nobody can ever take them.
fn drop_orphans(db: &Connection, numbers: &mut Numbers) -> Result<()> {
    let orphans = db.execute("DELETE FROM messages WHERE registration NOT IN (SELECT id FROM registrations)", [])?;
    if orphans > 0 {
        log::warn!("{orphans} stored messages belong to no registration and were dropped");
        tidy(db, numbers, &Changes { deleted: true, ..Changes::default() })?;
    }
    Ok(())
}

fn end_message(
    db: &Connection,
    seq: MessageSeq,
    ending: Ending,
    numbers: &mut Numbers,
    changes: &mut Changes,
) -> Result<()> {
    let registration: Option<i64> = db
        .prepare_cached(
            "UPDATE messages SET body = NULL, ending = ?2, ended = ?3 WHERE seq = ?1 AND ended IS NULL
             RETURNING registration",
        )?
        .query_row(params![signed(seq.0), ending_number(ending), numbers.ended], |row| row.get(0))
        .optional()?;
    if let Some(registration) = registration {
        numbers.ended += 1;
        changes.ended.insert(registration);
    }
    Ok(())
}

fn put_registration(db: &Connection, registration: &Registration) -> Result<()> {
    let Registration { id, app, token, description, vapid, version, upstream, channel, endpoint, told } = registration;
    db.prepare_cached("INSERT OR REPLACE INTO registrations VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)")?
        .execute(params![
            signed(id.0),
            app.bus.to_number(),
            app.service,
            token,
            description,
            vapid,
            version_number(*version),
            upstream,
            channel,
            endpoint,
            told
        ])?;
    Ok(())
}

/// The same message again changes nothing. An id whose message ended may be used again: what counts as a duplicate is
/// for the core to say.
fn put_message(db: &Connection, message: &Message) -> Result<()> {
    let Message { seq, registration, id, body, received, expires, topic, urgency } = message;
    db.prepare_cached(
        "INSERT INTO messages VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, NULL, NULL)
         ON CONFLICT (registration, id) DO UPDATE SET
             seq = excluded.seq, body = excluded.body, received = excluded.received, expires = excluded.expires,
             topic = excluded.topic, urgency = excluded.urgency, ending = NULL, ended = NULL
         WHERE ended IS NOT NULL AND seq < excluded.seq",
    )?
    .execute(params![
        signed(seq.0),
        signed(registration.0),
        id,
        body,
        signed(received.as_millis()),
        signed(expires.as_millis()),
        topic,
        urgency_number(*urgency)
    ])?;
    Ok(())
}

fn put_app(db: &Connection, record: &AppRecord) -> Result<()> {
    let AppRecord { app, declares, resident, measured, conditions } = record;
    db.prepare_cached("INSERT OR REPLACE INTO apps VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?.execute(params![
        app.bus.to_number(),
        app.service,
        declares,
        resident.map(|m| signed(m.pss)),
        resident.map(|m| signed(m.uss)),
        resident.map(|m| signed(m.swap)),
        measured.map(|t| signed(t.as_millis())),
        conditions
    ])?;
    Ok(())
}

fn seen(db: &Connection) -> Result<Vec<(RegistrationId, Arc<str>)>> {
    // Newest first, so that the slack is what is cut off; then turned round.
    let all: Vec<(RegistrationId, Arc<str>)> = rows(
        db,
        "SELECT registration, id FROM messages WHERE ended IS NOT NULL ORDER BY registration DESC, ended DESC",
        |row| Ok((RegistrationId(unsigned(row, 0)?), row.get(1)?)),
    )?;
    let mut seen = Vec::with_capacity(all.len());
    let mut current = None;
    let mut count = 0;
    for (registration, id) in all {
        if current != Some(registration) {
            current = Some(registration);
            count = 0;
        }
        count += 1;
        if count <= SEEN {
            seen.push((registration, id));
        }
    }
    seen.reverse();
    Ok(seen)
}

/// Reads rows. SQLite's own errors end it; a row that cannot be understood does not.
pub(super) fn rows<T>(db: &Connection, sql: &str, read: impl Fn(&Row<'_>) -> Result<T, RowError>) -> Result<Vec<T>> {
    let mut statement = db.prepare(sql)?;
    let mut cursor = statement.query([])?;
    let mut all = Vec::new();
    while let Some(row) = cursor.next()? {
        match read(row) {
            Ok(item) => all.push(item),
            Err(RowError(problem)) => log::error!("a stored row makes no sense and is ignored: {problem} ({sql})"),
        }
    }
    Ok(all)
}

pub(super) struct RowError(pub(super) String);

impl From<rusqlite::Error> for RowError {
    fn from(error: rusqlite::Error) -> Self {
        Self(error.to_string())
    }
}

fn registration(row: &Row<'_>) -> Result<Registration, RowError> {
    Ok(Registration {
        id: RegistrationId(unsigned(row, 0)?),
        app: app_key(row, 1)?,
        token: row.get(3)?,
        description: row.get(4)?,
        vapid: row.get(5)?,
        version: known(row.get(6)?, "connector version", |n| match n {
            1 => Some(ConnectorVersion::V1),
            2 => Some(ConnectorVersion::V2),
            _ => None,
        })?,
        upstream: row.get(7)?,
        channel: row.get(8)?,
        endpoint: row.get(9)?,
        told: row.get(10)?,
    })
}

fn message(row: &Row<'_>) -> Result<StoredMessage, RowError> {
    Ok(StoredMessage {
        seq: MessageSeq(unsigned(row, 0)?),
        registration: RegistrationId(unsigned(row, 1)?),
        id: row.get(2)?,
        size: row.get(3)?,
        received: UnixTime::from_millis(unsigned(row, 7)?),
        expires: UnixTime::from_millis(unsigned(row, 4)?),
        topic: row.get(5)?,
        urgency: known(row.get(6)?, "urgency", urgency_of)?,
    })
}

fn app(row: &Row<'_>) -> Result<AppRecord, RowError> {
    let amount = |column| row.get::<_, Option<i64>>(column).map(|n| n.and_then(|n| u64::try_from(n).ok()));
    let resident = match (amount(3)?, amount(4)?, amount(5)?) {
        (Some(pss), Some(uss), Some(swap)) => Some(Memory { pss, uss, swap }),
        _ => None,
    };
    Ok(AppRecord {
        app: app_key(row, 0)?,
        declares: row.get(2)?,
        resident,
        measured: amount(6)?.map(UnixTime::from_millis),
        conditions: row.get(7)?,
    })
}

pub(super) fn app_key(row: &Row<'_>, column: usize) -> Result<AppKey, RowError> {
    let bus = known(row.get(column)?, "bus", Bus::from_number)?;
    Ok(AppKey::new(bus, row.get::<_, Arc<str>>(column + 1)?))
}

pub(super) fn known<T>(number: i64, what: &str, find: impl Fn(i64) -> Option<T>) -> Result<T, RowError> {
    find(number).ok_or_else(|| RowError(format!("unknown {what} {number}")))
}

pub(super) fn unsigned(row: &Row<'_>, column: usize) -> Result<u64, RowError> {
    let number: i64 = row.get(column)?;
    u64::try_from(number).map_err(|_| RowError(format!("negative number {number}")))
}

/// SQLite's integers are signed. No clock or counter of ours reaches the half that does not fit.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

const fn version_number(version: ConnectorVersion) -> i64 {
    match version {
        ConnectorVersion::V1 => 1,
        ConnectorVersion::V2 => 2,
    }
}

pub(super) const fn urgency_number(urgency: Urgency) -> i64 {
    match urgency {
        Urgency::VeryLow => 0,
        Urgency::Low => 1,
        Urgency::Normal => 2,
        Urgency::High => 3,
    }
}

pub(super) const fn urgency_of(number: i64) -> Option<Urgency> {
    match number {
        0 => Some(Urgency::VeryLow),
        1 => Some(Urgency::Low),
        2 => Some(Urgency::Normal),
        3 => Some(Urgency::High),
        _ => None,
    }
}

/// For people who look into the file: nothing reads it back.
const fn ending_number(ending: Ending) -> i64 {
    match ending {
        Ending::Accepted => 0,
        Ending::Expired => 1,
        Ending::Replaced => 2,
        Ending::GivenUp => 3,
        Ending::Overflowed => 4,
        Ending::Unregistered => 5,
    }
}
