//! The rows of transfers.

use rusqlite::{Connection, Result, params};
use serde::{Deserialize, Serialize};

use super::rows::{RowError, app_key, rows};
use crate::{
    model::AppKey,
    transfer::{End, Progress, Transfer, TransferId, Wish},
};

/// What format 4 adds. What is asked for and how far it has come are one document: nothing is looked up by a part of it.
pub(super) const FORMAT_4: &str = "
    CREATE TABLE transfers (
        id INTEGER PRIMARY KEY, bus INTEGER NOT NULL, service TEXT NOT NULL, transfer TEXT NOT NULL
    ) STRICT;
    ALTER TABLE numbers ADD COLUMN next_transfer INTEGER NOT NULL DEFAULT 1;
";

#[derive(Serialize, Deserialize)]
struct Document {
    wish: Wish,
    progress: Progress,
    end: Option<End>,
}

pub(super) fn put(db: &Connection, transfer: &Transfer) -> Result<()> {
    let Transfer { id, app, wish, progress, end } = transfer.clone();
    let document = serde_json::to_string(&Document { wish, progress, end });
    let document = document.map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
    let id = id.0.cast_signed();
    let (bus, service) = (app.bus.to_number(), app.service);
    db.prepare_cached("INSERT OR REPLACE INTO transfers VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![id, bus, service, document])?;
    db.prepare_cached("UPDATE numbers SET next_transfer = ?1 WHERE next_transfer < ?1")?.execute([id + 1])?;
    Ok(())
}

pub(super) fn delete(db: &Connection, id: TransferId) -> Result<()> {
    db.prepare_cached("DELETE FROM transfers WHERE id = ?1")?.execute([id.0.cast_signed()])?;
    Ok(())
}

pub(super) fn delete_all(db: &Connection, app: &AppKey) -> Result<()> {
    db.prepare_cached("DELETE FROM transfers WHERE bus = ?1 AND service = ?2")?
        .execute(params![app.bus.to_number(), app.service])?;
    Ok(())
}

/// All of them, and the first number not used yet.
pub(super) fn read(db: &Connection) -> Result<(Vec<Transfer>, u64)> {
    let all = rows(db, "SELECT id, bus, service, transfer FROM transfers ORDER BY id", |row| {
        let text: String = row.get(3)?;
        let Document { wish, progress, end } =
            serde_json::from_str(&text).map_err(|error| RowError(format!("a transfer: {error}")))?;
        let id = TransferId(row.get::<_, i64>(0)?.cast_unsigned());
        Ok(Transfer { id, app: app_key(row, 1)?, wish, progress, end })
    })?;
    let next: i64 = db.query_row("SELECT next_transfer FROM numbers", [], |row| row.get(0))?;
    Ok((all, next.max(1).cast_unsigned()))
}

/// Transfers of apps whose registrations are gone: nobody else may find them under the same name.
pub(super) fn drop_orphans(db: &Connection) -> Result<()> {
    let orphans = db.execute(
        "DELETE FROM transfers WHERE NOT EXISTS (
             SELECT 1 FROM registrations
             WHERE registrations.bus = transfers.bus AND registrations.service = transfers.service
         )",
        [],
    )?;
    if orphans > 0 {
        log::info!("{orphans} transfers belong to no registered app and were dropped");
    }
    Ok(())
}
