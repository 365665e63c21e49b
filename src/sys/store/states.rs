//! The rows of states that apps save.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Result, params};

use super::rows::{app_key, rows};
use crate::model::AppKey;

/// The table format 3 adds. With row ids: states are larger than what belongs into an index.
pub(super) const FORMAT_3: &str = "
    CREATE TABLE states (
        bus INTEGER NOT NULL, service TEXT NOT NULL, state BLOB NOT NULL, PRIMARY KEY (bus, service)
    ) STRICT;
";

/// The same again costs the flash nothing; an empty one is none.
pub(super) fn put(db: &Connection, app: &AppKey, state: &[u8]) -> Result<()> {
    let bus = app.bus.to_number();
    if state.is_empty() {
        db.prepare_cached("DELETE FROM states WHERE bus = ?1 AND service = ?2")?.execute(params![bus, app.service])?;
    } else {
        db.prepare_cached(
            "INSERT INTO states VALUES (?1, ?2, ?3)
             ON CONFLICT (bus, service) DO UPDATE SET state = excluded.state WHERE state <> excluded.state",
        )?
        .execute(params![bus, app.service, state])?;
    }
    Ok(())
}

pub(super) fn load(db: &Connection, app: &AppKey) -> Result<Option<Arc<[u8]>>> {
    db.prepare_cached("SELECT state FROM states WHERE bus = ?1 AND service = ?2")?
        .query_row(params![app.bus.to_number(), app.service], |row| row.get(0))
        .optional()
}

pub(super) fn sizes(db: &Connection) -> Result<Vec<(AppKey, u32)>> {
    rows(db, "SELECT bus, service, length(state) FROM states", |row| Ok((app_key(row, 0)?, row.get(2)?)))
}

/// States of apps whose registrations are gone: nobody else may find them under the same name.
pub(super) fn drop_orphans(db: &Connection) -> Result<()> {
    let orphans = db.execute(
        "DELETE FROM states WHERE NOT EXISTS (
             SELECT 1 FROM registrations WHERE registrations.bus = states.bus AND registrations.service = states.service
         )",
        [],
    )?;
    if orphans > 0 {
        log::info!("{orphans} saved states belong to no registered app and were dropped");
    }
    Ok(())
}
