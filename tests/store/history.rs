//! The ledger's history in the store: written with others, thinned with age, bounded, gone with its app.

use nightporter::model::{History, HistoryRow, Total};

use super::*;

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;
/// A midnight.
const START: u64 = 20_000 * DAY;

/// All that the tables hold.
const COUNT: &str = "SELECT (SELECT count(*) FROM history_totals) + (SELECT count(*) FROM history_apps)
    + (SELECT count(*) FROM history_wakes) + (SELECT count(*) FROM history_woulds)";

fn row(at: u64, span: u32, what: History) -> HistoryRow {
    HistoryRow { at: UnixTime::from_secs(at), span, what }
}

fn total(at: u64, figure: u64) -> HistoryRow {
    total_over(at, 0, figure, 1)
}

fn total_over(at: u64, span: u64, figure: u64, messages: u32) -> HistoryRow {
    let total = Total { apps: 3, resident: figure, messages, ..Total::default() };
    row(at, span as u32, History::Total { bus: Bus::Session(1000), total })
}

fn app(at: u64, span: u64, id: u64, state: &str, pss: u64) -> HistoryRow {
    let saved = Some(-(pss as i64));
    let app = registration(id).app;
    row(at, span as u32, History::App { app, state: state.into(), pss: Some(pss), zram: 5, saved })
}

fn wake(at: u64, id: u64) -> HistoryRow {
    let app = registration(id).app;
    let (from, urgency) = ("reclaimed".into(), Urgency::High);
    row(at, 0, History::Wake { app, from, took: 70, urgency, cpu: Some(9), faults: None })
}

fn would(at: u64, id: u64) -> HistoryRow {
    let (app, reason) = (registration(id).app, "nobody looks at it".into());
    row(at, 60, History::Would { app, state: "frozen".into(), reason, saved: 77 })
}

fn put_all(rows: Vec<HistoryRow>) -> StoreOp {
    StoreOp::PutHistory(rows.into())
}

impl Fixture {
    /// Writes history with something else for company, and waits for it.
    fn keep(&mut self, rows: Vec<HistoryRow>) {
        self.ticket(put_all(rows), 8);
        self.ticket(put_registration(1), 9);
        assert_eq!((self.stored(), self.stored()), ((8, Ok(())), (9, Ok(()))));
    }

    fn history(&mut self, since: u64) -> Vec<HistoryRow> {
        self.ticket(StoreOp::LoadHistory(UnixTime::from_secs(since)), 5);
        match self.next() {
            Event::History(StoreTicket(5), Ok(rows)) => rows,
            other => panic!("{other:?}"),
        }
    }
}

fn count(dir: &Path) -> i64 {
    Connection::open(database(dir)).unwrap().query_row(COUNT, [], |row| row.get(0)).unwrap()
}

#[test]
fn history_comes_back_in_order() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    assert_eq!(f.history(0), []);
    let rows = vec![
        total(START, 1),
        app(START + 1, 0, 1, "frozen", 100),
        wake(START + 2, 1),
        // The same moment for two messages of one app.
        wake(START + 2, 1),
        would(START + 3, 2),
        app(START + 4, 10, 2, "gone", 0),
    ];
    // As they are while they wait, and as they are written.
    f.apply(put_all(rows[..3].to_vec()));
    f.apply(put_all(rows[3..].to_vec()));
    assert_eq!(f.history(0), rows);
    assert_eq!(count(dir.path()), 0, "reading is no reason to write");
    f.write(put_registration(1));
    assert_eq!(f.history(0), rows);
    assert_eq!(f.history(START + 2), rows[2..]);
    // What reaches into the time asked for.
    assert_eq!(f.history(START + 14), [rows[4].clone(), rows[5].clone()]);
    assert_eq!(f.history(START + 64), []);
    f.store.close();
    let (mut f, _) = Fixture::open(dir.path());
    assert_eq!(f.history(0), rows);
    f.store.close();
}

#[test]
fn history_alone_is_not_written_until_close() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    f.write(put_registration(1));
    let journal = || fs::metadata(database(dir.path()).with_extension("db-wal")).unwrap().len();
    let before = journal();
    f.ticket(put_all(vec![total(START, 1)]), 1);
    // Longer than what is lazy waits for company.
    assert_eq!(f.within(Duration::from_secs(3)), None);
    // What only reads is no company.
    assert_eq!(f.state(1), b"");
    assert_eq!(f.history(0).len(), 1);
    assert_eq!((count(dir.path()), journal()), (0, before));
    f.ticket(put_registration(2), 2);
    assert_eq!((f.stored(), f.stored()), ((1, Ok(())), (2, Ok(()))));
    assert_eq!(count(dir.path()), 1);
    f.apply(put_all(vec![total(START + 1, 1)]));
    f.store.close();
    assert_eq!(count(dir.path()), 2);
}

#[test]
fn history_that_cannot_be_written_takes_nothing_with_it() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    f.write(put_registration(1));
    let tables = Connection::open(database(dir.path())).unwrap();
    tables.execute_batch("ALTER TABLE history_totals RENAME TO elsewhere").unwrap();
    f.ticket(put_all(vec![total(START, 1)]), 1);
    f.ticket(put(1, 1), 2);
    assert!(matches!(f.stored(), (1, Err(StoreError::Other(_)))));
    assert_eq!(f.stored(), (2, Ok(())));
    // Nor is it tried again with each write.
    tables.execute_batch("ALTER TABLE elsewhere RENAME TO history_totals").unwrap();
    f.write(put(2, 1));
    assert_eq!(count(dir.path()), 0);
    f.store.close();
    assert_eq!(count(dir.path()), 1);
}

#[test]
fn history_becomes_means_with_age() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    // Two hours: 15 minutes at 10, 45 at 20; 60 at 40. Then a day later, then the rest of the week.
    f.keep(vec![
        total(START, 10),
        app(START, 0, 1, "background", 100),
        total(START + 900, 20),
        app(START + 900, 0, 1, "frozen", 200),
        total(START + HOUR, 40),
        wake(START + HOUR, 1),
        would(START + HOUR, 1),
    ]);
    f.keep(vec![total(START + 2 * DAY - 1, 50)]);
    assert_eq!(f.history(0).len(), 8, "young enough to stay as it is");
    f.keep(vec![total(START + 3 * DAY, 60)]);
    let hours = [
        total_over(START, HOUR, 18, 2),
        app(START, HOUR, 1, "frozen", 175),
        total_over(START + HOUR, HOUR, 40, 1),
        wake(START + HOUR, 1),
        would(START + HOUR, 1),
        total(START + 2 * DAY - 1, 50),
        total(START + 3 * DAY, 60),
    ];
    assert_eq!(f.history(0), hours);

    // Each write makes one day coarser at most, and then there is no more to do.
    for day in 29..34 {
        f.keep(vec![total(START + day * DAY, 70)]);
    }
    let history = f.history(0);
    let expected =
        [total_over(START, DAY, 29, 3), app(START, DAY, 1, "frozen", 175), total_over(START + DAY, DAY, 50, 1)];
    assert_eq!(history[..3], expected);
    assert_eq!(history[3], total_over(START + 3 * DAY, HOUR, 60, 1));
    assert!(!history.iter().any(|row| matches!(row.what, History::Wake { .. } | History::Would { .. })));

    f.keep(vec![total(START + 401 * DAY, 80)]);
    let left = f.history(0);
    assert_eq!(left[..2], [total_over(START + DAY, DAY, 50, 1), total_over(START + 3 * DAY, DAY, 60, 1)]);
    f.store.close();
}

#[test]
fn history_is_bounded_and_read_in_one_piece() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    // A hundred apps that never rest: within two days nothing is old.
    const APPS: u64 = 100;
    let mut at = START;
    let mut most = 0;
    for _ in 0..70 {
        let mut rows = Vec::new();
        for _ in 0..8 {
            at += 300;
            rows.push(total(at, 5));
            rows.extend((0..APPS).map(|id| app(at, 0, id, "frozen", 10)));
            rows.extend((0..10).flat_map(|id| [wake(at, id), would(at, id)]));
        }
        f.keep(rows);
        most = most.max(count(dir.path()));
    }
    assert!((20_000..=50_000).contains(&most), "{most}");
    let history = f.history(0);
    assert!((5000..=20_000).contains(&history.len()), "{}", history.len());
    assert!(history.is_sorted_by_key(|row| row.at));
    let means = history.iter().filter(|row| row.what == app(0, 0, 7, "frozen", 10).what);
    // All the time is there, if coarser.
    let (first, spans) = means
        .fold((u64::MAX, 0), |(first, spans), row| (first.min(row.at.as_millis() / 1000), spans + u64::from(row.span)));
    assert!(first <= START + HOUR && spans + 12 * HOUR > at - START, "{} {spans}", first - START);
    let latest = |kind: fn(&History) -> bool| history.iter().rfind(|row| kind(&row.what)).unwrap().at;
    assert_eq!(latest(|what| matches!(what, History::Wake { .. })), UnixTime::from_secs(at));
    assert_eq!(latest(|what| matches!(what, History::Would { .. })), UnixTime::from_secs(at));
    f.store.close();
}

#[test]
fn an_apps_history_ends_with_it() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    let of = |id| vec![app(START, 0, id, "frozen", 1), wake(START + 1, id), would(START + 2, id)];
    for id in 1..=2 {
        f.write(put_registration(id));
    }
    f.keep([of(1), of(2), vec![total(START + 3, 1)]].concat());
    // One of them waits to be written when its app goes.
    f.apply(put_all([of(1), of(2)].concat()));
    f.write(StoreOp::DeleteRegistration(RegistrationId(1)));
    f.apply(put_all(of(1)));
    f.write(StoreOp::DeleteApp(registration(1).app));
    let left = f.history(0);
    assert!(left.contains(&total(START + 3, 1)) && left.contains(&app(START, 0, 2, "frozen", 1)));
    let is_of_1 = |row: &HistoryRow| match &row.what {
        History::App { app, .. } | History::Wake { app, .. } | History::Would { app, .. } => {
            *app == registration(1).app
        }
        History::Total { .. } => false,
    };
    assert!(!left.iter().any(is_of_1), "{left:?}");
    // With a user's last app nothing of that user is left.
    f.write(StoreOp::DeleteRegistration(RegistrationId(2)));
    f.write(StoreOp::DeleteApp(registration(2).app));
    assert_eq!(f.history(0), []);
    assert_eq!(count(dir.path()), 0);
    f.store.close();
}

#[test]
fn history_that_makes_no_sense_is_skipped() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    let rows = |at| vec![total(at, 1), app(at, 0, 1, "frozen", 1), wake(at, 1), would(at, 1)];
    f.keep([rows(START), rows(START + 1)].concat());
    Connection::open(database(dir.path()))
        .unwrap()
        .execute_batch(&format!(
            "UPDATE history_totals SET bus = -9 WHERE at = {START}000;
             UPDATE history_apps SET pss = -1 WHERE at = {START}000;
             UPDATE history_wakes SET urgency = 7 WHERE at = {START}000;
             UPDATE history_woulds SET reason = CAST(x'ff' AS TEXT) WHERE at = {START}000;
             INSERT INTO history_apps VALUES (0, -5, 1, 'x', 0, 's', 1, 1, 1), (7, 8, 1, 'x', 0, 's', 1, 1, 1);"
        ))
        .unwrap();
    assert_eq!(f.history(0), rows(START + 1));
    // Nor does it stand in the way of tidying.
    f.keep(vec![total(START + 10 * DAY, 2)]);
    assert_eq!(f.history(0).first(), Some(&total_over(START, HOUR, 1, 1)));
    f.store.close();
}

/// As a daemon of format 3 left it.
const FORMAT_3: &str = "
    PRAGMA page_size = 4096; PRAGMA auto_vacuum = INCREMENTAL;
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

#[test]
fn a_database_of_format_3_is_brought_up_to_date() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    f.store.close();
    // The tables of formats 2 and 3 are as they were; only those named here have changed since.
    let now = Connection::open(database(dir.path())).unwrap();
    let tables: Vec<String> = now
        .prepare("SELECT sql FROM sqlite_schema WHERE name IN ('former_routes', 'preferences', 'states')")
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(tables.len(), 3);
    drop(now);
    fs::remove_file(database(dir.path())).unwrap();
    let old = Connection::open(database(dir.path())).unwrap();
    old.execute_batch(FORMAT_3).unwrap();
    old.execute_batch(&tables.join(";")).unwrap();
    old.execute_batch(
        "INSERT INTO registrations VALUES (4, 1000, 'org.example.App4', '{token-4}', '', NULL, 2, 'u', 'c', 'e', 1);
         INSERT INTO apps VALUES (1000, 'org.example.App4', 1, 5000, 4000, 3, 951782400000);
         INSERT INTO states VALUES (1000, 'org.example.App4', x'01');
         PRAGMA application_id = 1313895028; PRAGMA user_version = 3",
    )
    .unwrap();
    drop(old);
    let (mut f, snapshot) = Fixture::open(dir.path());
    let record = |conditions: Option<&str>| AppRecord {
        app: registration(4).app,
        declares: true,
        resident: Some(Memory { pss: 5000, uss: 4000, swap: 3 }),
        measured: Some(UnixTime::from_secs(951_782_400)),
        conditions: conditions.map(Into::into),
    };
    assert_eq!((snapshot.registrations.len(), snapshot.damaged), (1, None));
    assert_eq!(snapshot.apps, [record(None)]);
    f.apply(StoreOp::PutApp(record(Some("alone"))));
    f.keep(vec![total(START, 1)]);
    assert_eq!(f.state(4), b"\x01");
    f.store.close();
    let (mut f, snapshot) = Fixture::open(dir.path());
    assert_eq!(snapshot.apps, [record(Some("alone"))]);
    assert_eq!(f.history(0), [total(START, 1)]);
    f.store.close();
}
