//! The rows about which upstream an app is reached by: former routes and what users prefer.

use std::sync::Arc;

use rusqlite::{Connection, Result, params};

use super::rows::{RowError, known, rows, signed, unsigned};
use crate::{
    model::{Bus, FormerRoute, Preference, RegistrationId},
    time::UnixTime,
};

/// The tables format 2 adds. The preference of a whole bus has an empty service.
pub(super) const FORMAT_2: &str = "
    CREATE TABLE former_routes (
        registration INTEGER NOT NULL, upstream TEXT NOT NULL, channel TEXT NOT NULL, endpoint TEXT NOT NULL,
        until INTEGER, PRIMARY KEY (registration, upstream)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE preferences (
        bus INTEGER NOT NULL, service TEXT NOT NULL, upstream TEXT NOT NULL, PRIMARY KEY (bus, service)
    ) STRICT, WITHOUT ROWID;
";

pub(super) fn put_former(db: &Connection, route: &FormerRoute) -> Result<()> {
    let FormerRoute { registration, upstream, channel, endpoint, until } = route;
    db.prepare_cached("INSERT OR REPLACE INTO former_routes VALUES (?1, ?2, ?3, ?4, ?5)")?.execute(params![
        signed(registration.0),
        upstream,
        channel,
        endpoint,
        until.map(|until| signed(until.as_millis()))
    ])?;
    Ok(())
}

pub(super) fn delete_former(db: &Connection, registration: RegistrationId, upstream: &str) -> Result<()> {
    db.prepare_cached("DELETE FROM former_routes WHERE registration = ?1 AND upstream = ?2")?
        .execute(params![signed(registration.0), upstream])?;
    Ok(())
}

pub(super) fn delete_all_former(db: &Connection, registration: RegistrationId) -> Result<()> {
    db.prepare_cached("DELETE FROM former_routes WHERE registration = ?1")?.execute([signed(registration.0)])?;
    Ok(())
}

pub(super) fn put_preference(db: &Connection, preference: &Preference) -> Result<()> {
    let Preference { bus, service, upstream } = preference;
    db.prepare_cached("INSERT OR REPLACE INTO preferences VALUES (?1, ?2, ?3)")?.execute(params![
        bus.to_number(),
        service.as_deref().unwrap_or_default(),
        upstream
    ])?;
    Ok(())
}

pub(super) fn delete_preference(db: &Connection, bus: Bus, service: Option<&str>) -> Result<()> {
    db.prepare_cached("DELETE FROM preferences WHERE bus = ?1 AND service = ?2")?
        .execute(params![bus.to_number(), service.unwrap_or_default()])?;
    Ok(())
}

/// Those of registrations that exist.
pub(super) fn former(db: &Connection) -> Result<Vec<FormerRoute>> {
    rows(
        db,
        "SELECT registration, upstream, channel, endpoint, until FROM former_routes
         WHERE registration IN (SELECT id FROM registrations)",
        |row| {
            let until: Option<i64> = row.get(4)?;
            Ok(FormerRoute {
                registration: RegistrationId(unsigned(row, 0)?),
                upstream: row.get(1)?,
                channel: row.get(2)?,
                endpoint: row.get(3)?,
                until: until
                    .map(|millis| u64::try_from(millis).map(UnixTime::from_millis))
                    .transpose()
                    .map_err(|_| RowError("a time before 1970".into()))?,
            })
        },
    )
}

pub(super) fn preferences(db: &Connection) -> Result<Vec<Preference>> {
    rows(db, "SELECT bus, service, upstream FROM preferences", |row| {
        let service: Arc<str> = row.get(1)?;
        Ok(Preference {
            bus: known(row.get(0)?, "bus", Bus::from_number)?,
            service: (!service.is_empty()).then_some(service),
            upstream: row.get(2)?,
        })
    })
}
