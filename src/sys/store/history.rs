//! The rows of the ledger's history: thinned with age, bounded, and read back in one piece.

use rusqlite::{Connection, OptionalExtension, Params, Result, Row, params};

use super::{
    means::Means,
    rows::{RowError, app_key, known, signed, unsigned, urgency_number, urgency_of},
};
use crate::{
    model::{AppKey, Bus, History, HistoryRow, Total},
    time::UnixTime,
};

/// What the format with history adds. `grain` is how coarse a row is (below) and comes first, so that what is thinned
/// next, or dropped first, are the first rows there are.
pub(super) const TABLES: &str = "
    ALTER TABLE apps ADD COLUMN conditions TEXT;
    CREATE TABLE history_totals (
        grain INTEGER NOT NULL, at INTEGER NOT NULL, bus INTEGER NOT NULL, span INTEGER NOT NULL, apps INTEGER NOT NULL,
        running INTEGER NOT NULL, resident INTEGER NOT NULL, now INTEGER NOT NULL, zram INTEGER NOT NULL,
        daemon INTEGER NOT NULL, connections INTEGER NOT NULL, replaced INTEGER NOT NULL, messages INTEGER NOT NULL,
        PRIMARY KEY (grain, at, bus)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE history_apps (
        grain INTEGER NOT NULL, at INTEGER NOT NULL, bus INTEGER NOT NULL, service TEXT NOT NULL, span INTEGER NOT NULL,
        state TEXT NOT NULL, pss INTEGER, zram INTEGER NOT NULL, saved INTEGER, PRIMARY KEY (grain, at, bus, service)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE history_wakes (
        id INTEGER PRIMARY KEY, at INTEGER NOT NULL, span INTEGER NOT NULL, bus INTEGER NOT NULL, service TEXT NOT NULL,
        state TEXT NOT NULL, took INTEGER NOT NULL, urgency INTEGER NOT NULL, cpu INTEGER, faults INTEGER
    ) STRICT;
    CREATE INDEX history_wakes_at ON history_wakes (at);
    CREATE TABLE history_woulds (
        at INTEGER NOT NULL, bus INTEGER NOT NULL, service TEXT NOT NULL, state TEXT NOT NULL, span INTEGER NOT NULL,
        reason TEXT NOT NULL, saved INTEGER NOT NULL, PRIMARY KEY (at, bus, service, state)
    ) STRICT, WITHOUT ROWID;
";

/// Seconds.
const HOUR: u32 = 3600;
const DAY: u32 = 24 * HOUR;
/// The same in ms.
const DAY_MS: i64 = DAY as i64 * 1000;

/// As it came, a mean over an hour, over a day.
const GRAINS: [Grain; 3] = [
    Grain { age: 2 * DAY_MS, coarser: HOUR, totals: 3000, apps: 12_000 },
    Grain { age: 30 * DAY_MS, coarser: DAY, totals: 3000, apps: 12_000 },
    Grain { age: 400 * DAY_MS, coarser: 0, totals: 2000, apps: 6000 },
];
/// Wakes and what would have been done go after this, in ms.
const EVENTS_AGE: i64 = 30 * DAY_MS;
const WAKES: i64 = 6000;
const WOULDS: i64 = 5000;
/// Rows between two rounds of tidying, and the time. With the bounds above: 50,000 rows at most.
const TIDY_ROWS: usize = 1000;
const TIDY_EVERY: u64 = HOUR as u64 * 1000;

/// Rows that [`load`] gives at most: means first, then wakes and what would have been done.
const LOADED_MEANS: usize = 10_000;
const LOADED_EVENTS: usize = 5000;
/// What means are made over to come below [`LOADED_MEANS`], in seconds.
const COARSER: [u32; 4] = [HOUR, 6 * HOUR, DAY, 7 * DAY];
const COARSEST: u32 = 28 * DAY;

const TOTALS: &str =
    "at, span, bus, apps, running, resident, now, zram, daemon, connections, replaced, messages FROM history_totals";
const APPS: &str = "at, span, bus, service, state, pss, zram, saved FROM history_apps";
const WAKE: &str = "at, span, bus, service, state, took, urgency, cpu, faults FROM history_wakes";
const WOULD: &str = "at, span, bus, service, state, reason, saved FROM history_woulds";

/// Makes something of a row.
type Read = fn(&Row<'_>) -> Result<HistoryRow, RowError>;

/// How rows of one coarseness age.
#[derive(Clone, Copy)]
struct Grain {
    /// After this, in ms, they are made coarser, or dropped.
    age: i64,
    /// Made means over this then, in seconds; zero: dropped.
    coarser: u32,
    /// Rows at most. With more they are made coarser early.
    totals: i64,
    apps: i64,
}

/// When it was last tidied: not with each write.
#[derive(Debug, Default)]
pub(super) struct Tidied {
    at: Option<UnixTime>,
    rows: usize,
}

/// Adds the rows, and tidies up when it is time for that: one day's worth of each kind, so that it stays quick however
/// much has piled up.
pub(super) fn put(db: &Connection, rows: &[HistoryRow], tidied: &mut Tidied) -> Result<()> {
    for row in rows {
        put_row(db, row)?;
    }
    let newest = rows.iter().map(|row| row.at.as_millis().saturating_add(u64::from(row.span) * 1000)).max();
    let Some(now) = newest.map(UnixTime::from_millis) else { return Ok(()) };
    tidied.rows = tidied.rows.saturating_add(rows.len());
    // A clock that was set back is no reason to wait.
    let due = tidied.at.is_none_or(|at| at.as_millis().abs_diff(now.as_millis()) >= TIDY_EVERY);
    if due || tidied.rows >= TIDY_ROWS {
        *tidied = Tidied { at: Some(now), rows: 0 };
        tidy(db, signed(now.as_millis()))?;
    }
    Ok(())
}

/// All that is kept of the app; with the last app of its bus that bus' totals as well.
pub(super) fn delete(db: &Connection, app: &AppKey) -> Result<()> {
    let bus = app.bus.to_number();
    for table in ["history_apps", "history_wakes", "history_woulds"] {
        db.prepare(&format!("DELETE FROM {table} WHERE bus = ?1 AND service = ?2"))?
            .execute(params![bus, app.service])?;
    }
    db.prepare(
        "DELETE FROM history_totals WHERE bus = ?1 AND NOT EXISTS (SELECT 1 FROM registrations WHERE bus = ?1)",
    )?
    .execute([bus])?;
    Ok(())
}

/// What there has been since then, `waiting` included, oldest first; 20,000 rows at most. Were there more, those before
/// become coarser means, and only the latest events are given.
pub(super) fn load(db: &Connection, since: UnixTime, waiting: &[HistoryRow]) -> Result<Vec<HistoryRow>> {
    let since = signed(since.as_millis());
    let reaches = |row: &&HistoryRow| signed(row.at.as_millis()).saturating_add(i64::from(row.span) * 1000) >= since;
    let waiting: Vec<&HistoryRow> = waiting.iter().filter(reaches).collect();
    let mut out = means(db, since, &waiting, None, LOADED_MEANS)?;
    for over in COARSER {
        if out.len() <= LOADED_MEANS {
            break;
        }
        out = means(db, since, &waiting, Some(Means::over(over)), LOADED_MEANS)?;
    }
    if out.len() > LOADED_MEANS {
        out = means(db, since, &waiting, Some(Means::over(COARSEST)), usize::MAX)?;
    }
    out.sort_by_key(|row| row.at);
    out.drain(..out.len().saturating_sub(LOADED_MEANS));
    out.extend(events(db, (WAKE, wake), since, waiting.iter().filter(|row| matches!(row.what, History::Wake { .. })))?);
    out.extend(events(
        db,
        (WOULD, would),
        since,
        waiting.iter().filter(|row| matches!(row.what, History::Would { .. })),
    )?);
    out.sort_by_key(|row| row.at);
    Ok(out)
}

/// Totals and apps as they are, or as coarser means; breaks off with more than `most`.
fn means(
    db: &Connection,
    since: i64,
    waiting: &[&HistoryRow],
    means: Option<Means>,
    most: usize,
) -> Result<Vec<HistoryRow>> {
    let (mut means, mut out) = (means, Vec::new());
    let mut take = |row| {
        match &mut means {
            Some(means) => means.add(row, &mut out),
            None => out.push(row),
        }
        out.len() <= most
    };
    // The coarsest stand for a day.
    let from = since.saturating_sub(DAY_MS);
    for (select, read) in [(TOTALS, total as Read), (APPS, app)] {
        // Coarse rows first: they are the older ones.
        for grain in [2, 1, 0] {
            let order = "WHERE grain = ?1 AND at >= ?2 AND at + span * 1000 >= ?3 ORDER BY at";
            if !each(db, &format!("SELECT {select} {order}"), params![grain, from, since], read, &mut take)? {
                return Ok(out);
            }
        }
        let of_kind = waiting.iter().filter(|row| match row.what {
            History::Total { .. } => select == TOTALS,
            History::App { .. } => select == APPS,
            History::Wake { .. } | History::Would { .. } => false,
        });
        if !of_kind.cloned().cloned().all(&mut take) {
            return Ok(out);
        }
    }
    if let Some(means) = &mut means {
        means.finish(&mut out);
    }
    Ok(out)
}

/// The latest of one kind.
fn events<'a>(
    db: &Connection,
    (select, read): (&str, Read),
    since: i64,
    waiting: impl Iterator<Item = &'a &'a HistoryRow>,
) -> Result<Vec<HistoryRow>> {
    let mut rows = Vec::new();
    let sql = format!("SELECT {select} WHERE at + span * 1000 >= ?1 ORDER BY at DESC LIMIT ?2");
    each(db, &sql, params![since, LOADED_EVENTS as i64], read, |row| {
        rows.push(row);
        true
    })?;
    rows.reverse();
    rows.extend(waiting.map(|row| HistoryRow::clone(row)));
    rows.drain(..rows.len().saturating_sub(LOADED_EVENTS));
    Ok(rows)
}

fn put_row(db: &Connection, row: &HistoryRow) -> Result<()> {
    let (at, span) = (signed(row.at.as_millis()), row.span);
    let grain: i64 = match span {
        0..HOUR => 0,
        HOUR..DAY => 1,
        DAY.. => 2,
    };
    match &row.what {
        History::Total { bus, total } => {
            let Total { apps, running, resident, now, zram, daemon, connections, replaced, messages } = *total;
            let [resident, now, zram, daemon] = [resident, now, zram, daemon].map(signed);
            db.prepare_cached(
                "INSERT OR REPLACE INTO history_totals VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
            )?
            .execute(params![
                grain,
                at,
                bus.to_number(),
                span,
                apps,
                running,
                resident,
                now,
                zram,
                daemon,
                connections,
                replaced,
                messages
            ])?;
        }
        History::App { app, state, pss, zram, saved } => {
            db.prepare_cached("INSERT OR REPLACE INTO history_apps VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)")?
                .execute(params![
                    grain,
                    at,
                    app.bus.to_number(),
                    app.service,
                    span,
                    state,
                    pss.map(signed),
                    signed(*zram),
                    saved
                ])?;
        }
        History::Wake { app, from, took, urgency, cpu, faults } => {
            db.prepare_cached("INSERT INTO history_wakes VALUES (NULL, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)")?.execute(
                params![at, span, app.bus.to_number(), app.service, from, took, urgency_number(*urgency), cpu, faults],
            )?;
        }
        History::Would { app, state, reason, saved } => {
            db.prepare_cached("INSERT OR REPLACE INTO history_woulds VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?
                .execute(params![at, app.bus.to_number(), app.service, state, span, reason, signed(*saved)])?;
        }
    }
    Ok(())
}

fn tidy(db: &Connection, now: i64) -> Result<()> {
    let dropped_before =
        GRAINS.map(|grain| grain.age).into_iter().max().map_or(i64::MIN, |age| now.saturating_sub(age));
    for (number, grain) in (0i64..).zip(GRAINS) {
        for (table, select, most) in [("history_totals", TOTALS, grain.totals), ("history_apps", APPS, grain.apps)] {
            db.prepare_cached(&format!("DELETE FROM {table} WHERE grain = ?1 AND at < ?2"))?
                .execute([number, dropped_before])?;
            let count = || {
                db.prepare_cached(&format!("SELECT count(*) FROM {table} WHERE grain = ?1"))?
                    .query_row([number], |row| row.get::<_, i64>(0))
            };
            if grain.coarser > 0 {
                let age = if count()? > most { 0 } else { grain.age };
                make_coarser(db, (table, select), number, grain.coarser, now.saturating_sub(age))?;
            }
            let over = count()? - most;
            if over > 0 {
                let key = if table == "history_apps" { "grain, at, bus, service" } else { "grain, at, bus" };
                db.prepare_cached(&format!(
                    "DELETE FROM {table} WHERE ({key}) IN (SELECT {key} FROM {table} WHERE grain = ?1 ORDER BY at LIMIT ?2)"
                ))?
                .execute([number, over])?;
            }
        }
    }
    for (table, key, most) in [("history_wakes", "id", WAKES), ("history_woulds", "at, bus, service, state", WOULDS)] {
        db.prepare_cached(&format!("DELETE FROM {table} WHERE at < ?1"))?.execute([now.saturating_sub(EVENTS_AGE)])?;
        let over = db.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get::<_, i64>(0))? - most;
        if over > 0 {
            db.prepare_cached(&format!(
                "DELETE FROM {table} WHERE ({key}) IN (SELECT {key} FROM {table} ORDER BY at LIMIT ?1)"
            ))?
            .execute([over])?;
        }
    }
    Ok(())
}

/// Makes means over `secs` of the oldest day's rows of this grain that are from before `until`.
fn make_coarser(db: &Connection, (table, select): (&str, &str), grain: i64, secs: u32, until: i64) -> Result<()> {
    let over = i64::from(secs) * 1000;
    // Of whole hours or days only: the rest of one would be a mean of its own.
    let until = until - until.rem_euclid(over);
    let oldest: Option<i64> = db
        .prepare_cached(&format!("SELECT at FROM {table} WHERE grain = ?1 ORDER BY at LIMIT 1"))?
        .query_row([grain], |row| row.get(0))
        .optional()?;
    let Some(oldest) = oldest.filter(|oldest| *oldest < until) else { return Ok(()) };
    let from = oldest - oldest.rem_euclid(DAY_MS);
    let until = until.min(from.saturating_add(DAY_MS));
    let (mut means, mut coarser) = (Means::over(secs), Vec::new());
    let read: Read = if table == "history_apps" { app } else { total };
    let sql = format!("SELECT {select} WHERE grain = ?1 AND at >= ?2 AND at < ?3 ORDER BY at");
    each(db, &sql, params![grain, oldest, until], read, |row| {
        means.add(row, &mut coarser);
        true
    })?;
    means.finish(&mut coarser);
    db.prepare_cached(&format!("DELETE FROM {table} WHERE grain = ?1 AND at < ?2"))?.execute([grain, until])?;
    coarser.iter().try_for_each(|row| put_row(db, row))
}

/// Reads rows until `take` has enough; whether it had not. One that makes no sense is left out.
fn each(
    db: &Connection,
    sql: &str,
    parameters: impl Params,
    read: Read,
    mut take: impl FnMut(HistoryRow) -> bool,
) -> Result<bool> {
    let mut statement = db.prepare(sql)?;
    let mut cursor = statement.query(parameters)?;
    let mut senseless = (0u64, None);
    let mut complete = true;
    while complete && let Some(row) = cursor.next()? {
        match read(row) {
            Ok(row) => complete = take(row),
            Err(RowError(problem)) => senseless = (senseless.0 + 1, Some(problem)),
        }
    }
    if let (count, Some(problem)) = senseless {
        log::error!("{count} stored rows make no sense and are ignored: {problem} ({sql})");
    }
    Ok(complete)
}

fn total(row: &Row<'_>) -> Result<HistoryRow, RowError> {
    let bus = known(row.get(2)?, "bus", Bus::from_number)?;
    let total = Total {
        apps: row.get(3)?,
        running: row.get(4)?,
        resident: unsigned(row, 5)?,
        now: unsigned(row, 6)?,
        zram: unsigned(row, 7)?,
        daemon: unsigned(row, 8)?,
        connections: row.get(9)?,
        replaced: row.get(10)?,
        messages: row.get(11)?,
    };
    at(row, History::Total { bus, total })
}

fn app(row: &Row<'_>) -> Result<HistoryRow, RowError> {
    let pss = row.get::<_, Option<i64>>(5)?.map(|_| unsigned(row, 5)).transpose()?;
    let what =
        History::App { app: app_key(row, 2)?, state: row.get(4)?, pss, zram: unsigned(row, 6)?, saved: row.get(7)? };
    at(row, what)
}

fn wake(row: &Row<'_>) -> Result<HistoryRow, RowError> {
    let what = History::Wake {
        app: app_key(row, 2)?,
        from: row.get(4)?,
        took: row.get(5)?,
        urgency: known(row.get(6)?, "urgency", urgency_of)?,
        cpu: row.get(7)?,
        faults: row.get(8)?,
    };
    at(row, what)
}

fn would(row: &Row<'_>) -> Result<HistoryRow, RowError> {
    let what =
        History::Would { app: app_key(row, 2)?, state: row.get(4)?, reason: row.get(5)?, saved: unsigned(row, 6)? };
    at(row, what)
}

fn at(row: &Row<'_>, what: History) -> Result<HistoryRow, RowError> {
    Ok(HistoryRow { at: UnixTime::from_millis(unsigned(row, 0)?), span: row.get(1)?, what })
}
