//! The store on real files: durability across SIGKILL, full disks, damaged files.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use mio::{Poll, Token};
use nightporter::{
    action::StoreOp,
    event::{Event, StoreError, StoreTicket},
    model::{
        AppKey, AppRecord, Bus, ConnectorVersion, Ending, FormerRoute, Memory, Message, MessageSeq, Preference,
        Registration, RegistrationId, Snapshot, Urgency,
    },
    sys::{
        inbox::{self, Inbox, Incoming},
        store::{Store, StoreOpenError},
    },
    time::UnixTime,
    transfer::{Direction, End, How, Metered, Progress, Transfer, TransferId, Wish},
};
use rusqlite::Connection;

#[path = "store/history.rs"]
mod history;

/// Set for the children that tests start: the directory to work in.
const CHILD: &str = "NIGHTPORTER_STORE_TEST_DIR";

struct Fixture {
    store: Store,
    inbox: Inbox,
    _poll: Poll,
}

impl Fixture {
    fn open(dir: &Path) -> (Self, Snapshot) {
        let since = Instant::now();
        loop {
            match Self::try_open(dir) {
                // A child that another test is starting has the lock's descriptor until it runs its own program.
                Err(StoreOpenError::Locked { .. }) if since.elapsed() < Duration::from_secs(10) => {
                    thread::sleep(Duration::from_millis(5));
                }
                opened => return opened.unwrap(),
            }
        }
    }

    fn try_open(dir: &Path) -> Result<(Self, Snapshot), StoreOpenError> {
        let poll = Poll::new().unwrap();
        let (sender, inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        let (store, snapshot) = Store::open(dir, sender)?;
        Ok((Self { store, inbox, _poll: poll }, snapshot))
    }

    fn apply(&self, op: StoreOp) {
        self.store.apply(op, None);
    }

    fn ticket(&self, op: StoreOp, ticket: u64) {
        self.store.apply(op, Some(StoreTicket(ticket)));
    }

    /// The next event; fails after 10 s.
    fn next(&mut self) -> Event {
        self.within(Duration::from_secs(10)).expect("the store says nothing")
    }

    fn within(&mut self, time: Duration) -> Option<Event> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            match self.inbox.take() {
                Some(Incoming::Event(event)) => return Some(event),
                Some(other) => panic!("{other:?}"),
                None => thread::sleep(Duration::from_micros(200)),
            }
        }
        None
    }

    fn stored(&mut self) -> (u64, Result<(), StoreError>) {
        match self.next() {
            Event::Stored(ticket, result) => (ticket.0, result),
            other => panic!("{other:?}"),
        }
    }

    fn body(&mut self, seq: u64) -> Option<Arc<[u8]>> {
        self.apply(StoreOp::LoadBody(MessageSeq(seq)));
        match self.next() {
            Event::Body(found, body) if found.0 == seq => body,
            other => panic!("{other:?}"),
        }
    }

    fn state(&mut self, id: u64) -> Vec<u8> {
        self.ticket(StoreOp::LoadState(registration(id).app), 77);
        match self.next() {
            Event::State(StoreTicket(77), Ok(state)) => state.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    /// Writes and waits until it is durable.
    fn write(&mut self, op: StoreOp) {
        self.ticket(op, 0);
        assert_eq!(self.stored(), (0, Ok(())));
    }

    /// Ends a message, with an eager write for company.
    fn end(&mut self, seq: u64) {
        self.ticket(end(seq), seq);
        self.ticket(put_registration(1), 0);
        assert_eq!(self.stored(), (seq, Ok(())));
        assert_eq!(self.stored(), (0, Ok(())));
    }
}

fn registration(id: u64) -> Registration {
    Registration {
        id: RegistrationId(id),
        app: AppKey::new(Bus::Session(1000), format!("org.example.App{id}")),
        token: format!("{{token-{id}}}").into(),
        description: "".into(),
        vapid: id.is_multiple_of(2).then(|| "B".repeat(87).into()),
        version: if id.is_multiple_of(2) { ConnectorVersion::V2 } else { ConnectorVersion::V1 },
        upstream: "mozilla".into(),
        channel: format!("channel-{id}").into(),
        endpoint: format!("https://push.example/{id}").into(),
        told: true,
    }
}

fn message(seq: u64, registration: u64) -> Message {
    Message {
        seq: MessageSeq(seq),
        registration: RegistrationId(registration),
        id: format!("id-{seq}").into(),
        body: body_of(seq),
        received: UnixTime::from_secs(1_000_000),
        expires: UnixTime::from_secs(2_000_000 + seq),
        topic: seq.is_multiple_of(3).then(|| "mail".into()),
        urgency: [Urgency::VeryLow, Urgency::Low, Urgency::Normal, Urgency::High][seq as usize % 4],
    }
}

fn body_of(seq: u64) -> Arc<[u8]> {
    let size = 1 + seq as usize * 97 % 4096;
    (0..size).map(|n| (n as u64 * 31 + seq) as u8).collect::<Vec<_>>().into()
}

fn put(seq: u64, registration: u64) -> StoreOp {
    StoreOp::PutMessage(message(seq, registration))
}

const fn end(seq: u64) -> StoreOp {
    StoreOp::EndMessage(MessageSeq(seq), Ending::Accepted)
}

fn put_registration(id: u64) -> StoreOp {
    StoreOp::PutRegistration(registration(id))
}

fn upstream(key: &str, value: &str) -> StoreOp {
    StoreOp::PutUpstream { upstream: "mozilla".into(), key: key.into(), value: value.into() }
}

fn database(dir: &Path) -> PathBuf {
    dir.join("nightporter.db")
}

fn temp() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// This test binary again, running only `test` (which is ignored otherwise), in `dir`.
fn child(test: &str, dir: &Path) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD, dir);
    command
}

#[test]
fn everything_comes_back_after_a_restart() {
    let dir = temp();
    let dir = dir.path().join("made").join("on the way");
    let app = AppRecord {
        app: AppKey::new(Bus::System, "org.example.Board"),
        declares: true,
        resident: Some(Memory { pss: 9000, uss: 8000, swap: 7 }),
        measured: Some(UnixTime::from_secs(5)),
        conditions: Some("11 other apps ran".into()),
    };
    let plain = AppRecord {
        app: AppKey::new(Bus::Session(0), "org.a"),
        declares: false,
        resident: None,
        measured: None,
        conditions: None,
    };
    {
        let (f, snapshot) = Fixture::open(&dir);
        assert_eq!(
            snapshot,
            Snapshot { next_registration: 1, next_message: 1, next_transfer: 1, ..Snapshot::default() }
        );
        for op in [
            put_registration(1),
            put_registration(2),
            put(1, 1),
            put(2, 2),
            put(3, 1),
            end(1),
            upstream("uaid", "abc"),
            upstream("uaid", "def"),
            upstream("cursor", "x"),
            upstream("cursor", ""),
            StoreOp::PutApp(app.clone()),
            StoreOp::PutApp(plain.clone()),
            StoreOp::PutApp(AppRecord { app: AppKey::new(Bus::System, "gone"), ..plain.clone() }),
            StoreOp::DeleteApp(AppKey::new(Bus::System, "gone")),
        ] {
            f.apply(op);
        }
        f.store.close();
    }
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(database(&dir)).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!dir.join("nightporter.db-wal").exists(), "close() folds the journal into the database");

    let (mut f, snapshot) = Fixture::open(&dir);
    assert_eq!(fs::metadata(dir.join("nightporter.db-wal")).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(snapshot.registrations, [registration(1), registration(2)]);
    let waiting: Vec<_> = snapshot.messages.iter().map(|m| m.seq.0).collect();
    assert_eq!(waiting, [2, 3]);
    let (read, written) = (&snapshot.messages[1], message(3, 1));
    assert_eq!(
        (read.registration, &read.id, read.size as usize, read.expires, &read.topic, read.urgency),
        (written.registration, &written.id, written.body.len(), written.expires, &written.topic, written.urgency)
    );
    assert_eq!(snapshot.seen, [(RegistrationId(1), "id-1".into())]);
    assert_eq!(snapshot.upstreams, [("mozilla".into(), "uaid".into(), "def".into())]);
    assert_eq!(snapshot.apps, [app, plain]);
    assert_eq!((snapshot.next_registration, snapshot.next_message), (3, 4));
    assert_eq!(snapshot.damaged, None);
    assert_eq!(f.body(3), Some(body_of(3)));
    assert_eq!(f.body(1), None, "an ended message has no body");
    assert_eq!(f.body(99), None);
    f.store.close();
}

#[test]
fn the_same_message_twice_is_one_message() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    f.write(put_registration(1));
    f.write(put(1, 1));
    f.write(put(1, 1));
    // Same id under another number while the first still waits: still one message, the first.
    f.write(StoreOp::PutMessage(Message { id: "id-1".into(), ..message(2, 1) }));
    assert_eq!(f.body(1), Some(body_of(1)));
    assert_eq!(f.body(2), None);
    // A retry that comes after the end does not bring it back.
    f.write(end(1));
    f.write(put(1, 1));
    assert_eq!(f.body(1), None);
    f.store.close();
    let (f, snapshot) = Fixture::open(dir.path());
    assert_eq!(snapshot.messages, []);
    assert_eq!(snapshot.seen, [(RegistrationId(1), "id-1".into())]);
    f.store.close();
}

#[test]
fn an_id_may_be_used_again_once_the_core_has_forgotten_it() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    f.write(put_registration(1));
    f.write(put(1, 1));
    f.write(end(1));
    f.write(StoreOp::PutMessage(Message { id: "id-1".into(), ..message(2, 1) }));
    assert_eq!(f.body(2), Some(body_of(2)));
    f.store.close();
    let (f, snapshot) = Fixture::open(dir.path());
    assert_eq!(snapshot.messages.len(), 1);
    assert_eq!(snapshot.seen, []);
    f.store.close();
}

#[test]
fn one_senseless_operation_does_not_take_others_with_it() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    f.write(put_registration(1));
    f.write(put(1, 1));
    // Held back until the eager ones come, so that all four share a transaction.
    f.apply(upstream("uaid", "abc"));
    f.ticket(put(2, 1), 2);
    f.ticket(StoreOp::PutMessage(Message { id: "another".into(), ..message(1, 1) }), 3);
    f.ticket(put(4, 1), 4);
    assert_eq!(f.stored(), (2, Ok(())));
    let (ticket, result) = f.stored();
    assert_eq!(ticket, 3);
    assert!(matches!(result, Err(StoreError::Other(_))), "{result:?}");
    assert_eq!(f.stored(), (4, Ok(())));
    assert_eq!(f.body(1), Some(body_of(1)));
    f.store.close();
    let (f, snapshot) = Fixture::open(dir.path());
    assert_eq!(snapshot.messages.len(), 3);
    assert_eq!(snapshot.upstreams.len(), 1);
    f.store.close();
}

#[test]
fn numbers_are_never_used_twice() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    for id in 1..=7 {
        f.apply(put_registration(id));
        f.apply(put(id * 10, id));
    }
    for id in 1..=7 {
        f.apply(StoreOp::DeleteRegistration(RegistrationId(id)));
    }
    f.store.close();
    for _ in 0..2 {
        let (f, snapshot) = Fixture::open(dir.path());
        assert_eq!((snapshot.registrations.len(), snapshot.messages.len()), (0, 0));
        assert_eq!((snapshot.next_registration, snapshot.next_message), (8, 71));
        f.store.close();
    }
}

#[test]
fn seen_ids_are_the_latest_1000_in_the_order_they_ended() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    f.apply(put_registration(1));
    f.apply(put_registration(2));
    f.apply(put(3000, 2));
    f.apply(end(3000));
    // The first to come ends last.
    for seq in 1..=1500 {
        f.apply(put(seq, 1));
    }
    for seq in (2..=1500).chain([1]) {
        f.apply(end(seq));
    }
    f.store.close();
    let (f, snapshot) = Fixture::open(dir.path());
    let of = |id| snapshot.seen.iter().filter(|(r, _)| r.0 == id).map(|(_, id)| id.to_string()).collect::<Vec<_>>();
    let expected: Vec<_> = (502..=1500).chain([1]).map(|seq| format!("id-{seq}")).collect();
    assert_eq!(of(1), expected);
    assert_eq!(of(2), ["id-3000"]);
    assert_eq!(snapshot.next_message, 3001);
    f.store.close();
    let rows: i64 = Connection::open(database(dir.path()))
        .unwrap()
        .query_row("SELECT count(*) FROM messages WHERE registration = 1", [], |row| row.get(0))
        .unwrap();
    assert!((1000..=1064).contains(&rows), "{rows} rows are kept");
}

#[test]
fn tickets_are_answered_in_order_and_every_one() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    f.apply(put_registration(1));
    for n in 1..=2000 {
        match n % 4 {
            0 => f.ticket(put(n, 1), n),
            1 => f.ticket(upstream("cursor", &n.to_string()), n),
            2 => f.ticket(end(n - 2), n),
            _ => f.ticket(put_registration(1), n),
        }
    }
    for n in 1..=2000 {
        assert_eq!(f.stored(), (n, Ok(())));
    }
    f.store.close();
}

#[test]
fn lazy_writes_wait_for_company_but_not_for_ever() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    f.write(put_registration(1));
    f.write(put(1, 1));

    f.ticket(end(1), 1);
    assert_eq!(f.within(Duration::from_secs(1)), None, "a lazy write alone waits");
    assert_eq!(f.body(1), None, "reading sees what waits to be written, without writing it");
    assert_eq!(f.within(Duration::from_millis(200)), None, "reading is no reason to write");
    assert_eq!(f.stored(), (1, Ok(())));

    // A disk others use may take its time with any one write: of five, the quickest says what was waited for.
    let quickest = (1..=5).map(|n| {
        let start = Instant::now();
        f.ticket(upstream("cursor", &n.to_string()), 2 * n);
        f.ticket(put(n + 1, 1), 2 * n + 1);
        assert_eq!(f.stored(), (2 * n, Ok(())));
        assert_eq!(f.stored(), (2 * n + 1, Ok(())));
        start.elapsed()
    });
    let quickest = quickest.min().unwrap();
    assert!(quickest < Duration::from_secs(1), "a lazy write goes with an eager one: {quickest:?}");
    f.store.close();
}

#[test]
fn close_writes_what_waits() {
    let quickest = (0..5).map(|_| {
        let dir = temp();
        let (f, _) = Fixture::open(dir.path());
        f.apply(upstream("cursor", "a"));
        let start = Instant::now();
        f.store.close();
        let took = start.elapsed();
        let (f, snapshot) = Fixture::open(dir.path());
        assert_eq!(snapshot.upstreams.len(), 1);
        f.store.close();
        took
    });
    let quickest = quickest.min().unwrap();
    assert!(quickest < Duration::from_millis(1500), "close() does not wait for company: {quickest:?}");
}

#[test]
fn close_does_not_wait_for_a_loop_that_takes_nothing() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    f.apply(put_registration(1));
    for seq in 1..=2000 {
        f.ticket(put(seq, 1), seq);
    }
    f.store.close();
    let (f, snapshot) = Fixture::open(dir.path());
    assert_eq!(snapshot.messages.len(), 2000);
    f.store.close();
}

#[test]
fn ten_thousand_messages_pass_through() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    f.apply(put_registration(1));
    let mut answered = 0;
    for seq in 1..=5000 {
        f.ticket(put(seq, 1), seq);
        f.apply(end(seq));
        // As the core does it: what is not acknowledged is bounded.
        while seq - answered > 500 {
            answered += 1;
            assert_eq!(f.stored(), (answered, Ok(())));
        }
    }
    while answered < 5000 {
        answered += 1;
        assert_eq!(f.stored(), (answered, Ok(())));
    }
    f.store.close();
    let size = fs::metadata(database(dir.path())).unwrap().len();
    assert!(size < 4 * 1024 * 1024, "10 MiB of messages passed and {size} bytes stayed");
    let (f, snapshot) = Fixture::open(dir.path());
    assert_eq!((snapshot.messages.len(), snapshot.seen.len()), (0, 1000));
    f.store.close();
}

#[test]
fn a_flood_is_refused_in_turn_and_the_end_of_messages_is_not() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    f.write(put_registration(1));
    f.write(put(100_000, 1));
    // Another process holds the write lock: the disk "hangs".
    let mut blocker = Connection::open(database(dir.path())).unwrap();
    let transaction = blocker.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).unwrap();
    for seq in 1..=4000 {
        f.ticket(put(seq, 1), seq);
    }
    f.ticket(end(100_000), 4001);
    drop(transaction);
    let mut refused = 0;
    for seq in 1..=4000 {
        let (ticket, result) = f.stored();
        assert_eq!(ticket, seq);
        refused += u64::from(result.is_err());
    }
    assert_eq!(f.stored(), (4001, Ok(())));
    // What one transaction took is not queued any more.
    assert!((4000 - 2048 - 256 - 1..=4000 - 2048).contains(&refused), "{refused} refused");
    f.write(put(5000, 1));
    f.store.close();
    let (f, snapshot) = Fixture::open(dir.path());
    assert_eq!(snapshot.messages.len() as u64, 4001 - refused);
    f.store.close();
}

#[test]
fn a_second_daemon_is_turned_away() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    let Err(error) = Fixture::try_open(dir.path()) else { panic!("two stores in one directory") };
    assert_eq!(error, StoreOpenError::Locked { dir: dir.path().to_owned(), pid: std::process::id().to_string() });
    f.store.close();
    let (f, _) = Fixture::open(dir.path());
    f.store.close();
}

#[test]
fn a_newer_database_is_left_alone() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    f.apply(put_registration(1));
    f.store.close();
    let db = Connection::open(database(dir.path())).unwrap();
    let ours: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    db.pragma_update(None, "user_version", ours + 1).unwrap();
    drop(db);
    let before = fs::read(database(dir.path())).unwrap();
    let Err(error) = Fixture::try_open(dir.path()) else { panic!("opened a newer database") };
    assert!(
        matches!(error, StoreOpenError::Newer { found, known, .. } if (found, known) == (ours + 1, ours)),
        "{error}"
    );
    assert_eq!(fs::read(database(dir.path())).unwrap(), before);
}

#[test]
fn a_database_of_format_1_is_brought_up_to_date() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    f.apply(put_registration(1));
    f.apply(put(1, 1));
    f.store.close();
    let db = Connection::open(database(dir.path())).unwrap();
    db.execute_batch("DROP TABLE former_routes; DROP TABLE preferences; DROP TABLE states; PRAGMA user_version = 1")
        .unwrap();
    as_format_3(&db);
    drop(db);
    let (f, snapshot) = Fixture::open(dir.path());
    assert_eq!((snapshot.registrations.len(), snapshot.messages.len(), snapshot.damaged), (1, 1, None));
    f.apply(StoreOp::PutFormer(former(1, "old", None)));
    f.store.close();
    assert_eq!(Fixture::open(dir.path()).1.former, [former(1, "old", None)]);
}

#[test]
fn a_database_of_format_2_is_brought_up_to_date() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    f.apply(put_registration(1));
    f.apply(StoreOp::PutFormer(former(1, "old", None)));
    f.store.close();
    let db = Connection::open(database(dir.path())).unwrap();
    db.execute_batch("DROP TABLE states; PRAGMA user_version = 2").unwrap();
    as_format_3(&db);
    drop(db);
    let (mut f, snapshot) = Fixture::open(dir.path());
    assert_eq!((snapshot.former, snapshot.states), (vec![former(1, "old", None)], Vec::new()));
    f.write(StoreOp::PutState(registration(1).app, b"kept"[..].into()));
    assert_eq!(f.state(1), b"kept");
}

fn as_format_3(db: &Connection) {
    db.execute_batch(
        "DROP TABLE transfers; ALTER TABLE numbers DROP COLUMN next_transfer;
         DROP TABLE history_totals; DROP TABLE history_apps; DROP TABLE history_wakes; DROP TABLE history_woulds;
         ALTER TABLE apps DROP COLUMN conditions",
    )
    .unwrap();
}

fn transfer(app: u64, id: u64) -> Transfer {
    Transfer {
        id: TransferId(id),
        app: registration(app).app,
        wish: Wish {
            direction: Direction::Download,
            url: "https://files.example/map".into(),
            method: "GET".into(),
            headers: vec![("Authorization".into(), "Bearer x".into())],
            size: None,
            title: "A map".into(),
            metered: Some(Metered::Never),
            sha256: None,
            most: Some(5),
        },
        progress: Progress {
            begun: UnixTime::from_secs(1),
            content: true,
            good: 3,
            total: Some(4),
            validator: Some("\"v\"".into()),
            not_before: None,
        },
        end: None,
    }
}

#[test]
fn a_database_of_format_3_is_brought_up_to_date() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    f.apply(put_registration(1));
    f.store.close();
    let db = Connection::open(database(dir.path())).unwrap();
    as_format_3(&db);
    db.pragma_update(None, "user_version", 3).unwrap();
    drop(db);
    let (mut f, snapshot) = Fixture::open(dir.path());
    assert_eq!((snapshot.transfers, snapshot.next_transfer), (Vec::new(), 1));
    f.write(StoreOp::PutTransfer(Box::new(transfer(1, 1))));
    f.store.close();
    assert_eq!(Fixture::open(dir.path()).1.transfers, [transfer(1, 1)]);
}

#[test]
fn transfers_are_kept_as_they_are_end_with_their_app_and_their_numbers_are_not_used_again() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    f.write(put_registration(1));
    f.write(put_registration(2));
    for (app, id) in [(1, 1), (2, 2), (1, 3), (1, 4)] {
        f.write(StoreOp::PutTransfer(Box::new(transfer(app, id))));
    }
    let end = End { how: How::Done, text: "200 OK".into(), at: UnixTime::from_secs(9), told: true, collected: false };
    let ended = Transfer { end: Some(end), ..transfer(1, 3) };
    f.apply(StoreOp::NoteTransfer(Box::new(ended.clone())));
    f.apply(StoreOp::DeleteTransfer(TransferId(4)));
    f.store.close();
    let (f, snapshot) = Fixture::open(dir.path());
    assert_eq!((snapshot.transfers, snapshot.next_transfer), (vec![transfer(1, 1), transfer(2, 2), ended], 5));
    f.apply(StoreOp::DeleteApp(registration(1).app));
    f.apply(StoreOp::DeleteRegistration(RegistrationId(2)));
    f.store.close();
    let (_f, snapshot) = Fixture::open(dir.path());
    assert_eq!((snapshot.transfers, snapshot.next_transfer), (Vec::new(), 5));
}

#[test]
fn a_state_is_replaced_forgotten_and_ends_with_its_app() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    let state = |id, bytes: &[u8]| StoreOp::PutState(registration(id).app, bytes.into());
    for id in 1..=3 {
        f.write(put_registration(id));
    }
    assert_eq!(f.state(1), b"");
    f.write(state(1, b"one"));
    f.write(state(1, &[0; 65536]));
    f.write(state(2, b"two"));
    f.write(state(3, b"three"));
    assert_eq!(f.state(1), [0; 65536]);
    // Read behind what is queued before it.
    f.apply(state(1, b"\xff\0"));
    assert_eq!(f.state(1), b"\xff\0");
    f.write(state(2, b""));
    assert_eq!(f.state(2), b"");
    f.write(state(2, b"two again"));
    f.write(StoreOp::DeleteApp(registration(2).app));
    assert_eq!(f.state(2), b"");
    f.store.close();
    let (mut f, snapshot) = Fixture::open(dir.path());
    assert_eq!(snapshot.states, [(registration(1).app, 2), (registration(3).app, 5)]);
    assert_eq!(f.state(3), b"three");
    // The app's own row was not deleted; without a registration it is nobody's.
    f.write(StoreOp::DeleteRegistration(RegistrationId(3)));
    f.store.close();
    let (mut f, snapshot) = Fixture::open(dir.path());
    assert_eq!(snapshot.states, [(registration(1).app, 2)]);
    assert_eq!(f.state(3), b"");
}

#[test]
fn former_routes_end_with_their_registration() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    for id in 1..=2 {
        f.apply(put_registration(id));
        f.apply(StoreOp::PutFormer(former(id, "old", None)));
    }
    f.apply(StoreOp::PutFormer(former(1, "old", Some(7))));
    f.apply(StoreOp::PutFormer(former(1, "older", None)));
    f.apply(StoreOp::PutFormer(former(9, "nobody's", None)));
    f.store.close();
    let (f, mut snapshot) = Fixture::open(dir.path());
    snapshot.former.sort_by_key(|route| (route.registration, route.upstream.clone()));
    let expected = [former(1, "old", Some(7)), former(1, "older", None), former(2, "old", None)];
    assert_eq!(snapshot.former, expected);
    f.apply(StoreOp::DeleteFormer(RegistrationId(1), "older".into()));
    f.apply(StoreOp::DeleteRegistration(RegistrationId(2)));
    f.store.close();
    assert_eq!(Fixture::open(dir.path()).1.former, [former(1, "old", Some(7))]);
}

#[test]
fn preferences_are_kept_by_bus_and_app() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    let preference = |bus, service: Option<&str>, upstream: &str| Preference {
        bus,
        service: service.map(Into::into),
        upstream: upstream.into(),
    };
    let bus = Bus::Session(1000);
    f.apply(StoreOp::PutPreference(preference(bus, None, "a")));
    f.apply(StoreOp::PutPreference(preference(bus, Some("org.a.B"), "b")));
    f.apply(StoreOp::PutPreference(preference(Bus::System, None, "c")));
    f.apply(StoreOp::PutPreference(preference(bus, None, "d")));
    f.apply(StoreOp::DeletePreference(bus, Some("org.a.B".into())));
    f.store.close();
    let mut kept = Fixture::open(dir.path()).1.preferences;
    kept.sort_by_key(|preference| preference.bus);
    assert_eq!(kept, [preference(Bus::System, None, "c"), preference(bus, None, "d")]);
}

fn former(id: u64, upstream: &str, until: Option<u64>) -> FormerRoute {
    FormerRoute {
        registration: RegistrationId(id),
        upstream: upstream.into(),
        channel: "channel".into(),
        endpoint: "https://old.example/x".into(),
        until: until.map(UnixTime::from_secs),
    }
}

#[test]
fn a_place_that_cannot_be_used_is_named() {
    let dir = temp();
    fs::write(dir.path().join("file"), "").unwrap();
    let Err(error) = Fixture::try_open(&dir.path().join("file/state")) else { panic!("opened below a file") };
    assert!(error.to_string().contains("file/state"), "{error}");
    fs::create_dir(database(dir.path())).unwrap();
    let Err(error) = Fixture::try_open(dir.path()) else { panic!("opened a directory") };
    assert!(error.to_string().contains("nightporter.db"), "{error}");
}

/// Fills a store, lets `damage` change the file, and checks that it is kept aside byte for byte and that the fresh one
/// works.
fn damaged(damage: impl Fn(&mut Vec<u8>)) {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    for id in 1..=50 {
        f.apply(put_registration(id));
        f.apply(put(id, id));
    }
    f.store.close();
    let path = database(dir.path());
    let mut bytes = fs::read(&path).unwrap();
    let sound = bytes.clone();
    damage(&mut bytes);
    assert_ne!(bytes, sound);
    fs::write(&path, &bytes).unwrap();

    let (mut f, snapshot) = Fixture::open(dir.path());
    let aside = snapshot.damaged.as_deref().expect("the damage is noticed");
    assert!(aside.starts_with(&format!("{}.damaged-", path.display())), "{aside}");
    assert_eq!(fs::read(aside).unwrap(), bytes);
    assert!(snapshot.registrations.is_empty() && snapshot.messages.is_empty());
    f.write(put_registration(1));
    f.store.close();
    let (f, snapshot) = Fixture::open(dir.path());
    assert_eq!((snapshot.registrations.len(), snapshot.damaged), (1, None));
    f.store.close();
}

#[test]
fn a_garbage_header_is_kept_aside() {
    damaged(|bytes| bytes[..100].fill(0xa5));
}

#[test]
fn a_file_of_garbage_is_kept_aside() {
    damaged(|bytes| *bytes = b"not a database at all, but long enough for a look".repeat(100));
}

#[test]
fn a_truncated_file_is_kept_aside() {
    damaged(|bytes| bytes.truncate(bytes.len() / 2));
}

#[test]
fn flipped_bytes_in_the_middle_are_kept_aside() {
    // The header of a b-tree page is its first bytes: no page type is 0xff.
    damaged(|bytes| {
        let pages = bytes.len() / 4096;
        for page in 1..pages {
            bytes[page * 4096] ^= 0xff;
        }
    });
}

#[test]
fn somebody_elses_database_is_kept_aside() {
    let dir = temp();
    let path = database(dir.path());
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE theirs (a); INSERT INTO theirs VALUES (1)").unwrap();
    let (f, snapshot) = Fixture::open(dir.path());
    let aside = snapshot.damaged.expect("it is not ours");
    let kept: i64 = Connection::open(&*aside).unwrap().query_row("SELECT a FROM theirs", [], |row| row.get(0)).unwrap();
    assert_eq!(kept, 1);
    f.store.close();
}

#[test]
fn rows_that_make_no_sense_are_skipped() {
    let dir = temp();
    let (f, _) = Fixture::open(dir.path());
    for id in 1..=6 {
        f.apply(put_registration(id));
        f.apply(put(id, id));
    }
    f.store.close();
    Connection::open(database(dir.path()))
        .unwrap()
        .execute_batch(
            "UPDATE registrations SET bus = -7 WHERE id = 1;
             UPDATE registrations SET version = 3 WHERE id = 2;
             UPDATE registrations SET service = CAST(x'ff' AS TEXT) WHERE id = 3;
             UPDATE messages SET urgency = 9 WHERE seq = 4;
             UPDATE messages SET expires = -1 WHERE seq = 5;
             INSERT INTO apps (bus, service, declares) VALUES (-2, 'a', 1);
             INSERT INTO messages VALUES (99, 77, 'orphan', x'00', 0, 0, NULL, 2, NULL, NULL);",
        )
        .unwrap();
    let (f, snapshot) = Fixture::open(dir.path());
    let ids: Vec<_> = snapshot.registrations.iter().map(|r| r.id.0).collect();
    assert_eq!(ids, [4, 5, 6]);
    let waiting: Vec<_> = snapshot.messages.iter().map(|m| m.seq.0).collect();
    assert_eq!(waiting, [1, 2, 3, 6]);
    assert_eq!((snapshot.apps, snapshot.damaged), (vec![], None));
    assert_eq!(snapshot.next_message, 100, "the orphan's number stays used");
    f.store.close();
}

#[test]
fn damage_found_later_is_told_and_survived() {
    let dir = temp();
    let (mut f, _) = Fixture::open(dir.path());
    for id in 1..=200 {
        f.write(put_registration(id));
    }
    f.store.close();
    let (mut f, _) = Fixture::open(dir.path());
    let mut bytes = fs::read(database(dir.path())).unwrap();
    let pages = bytes.len() / 4096;
    for page in 1..pages {
        bytes[page * 4096..page * 4096 + 64].fill(0xff);
    }
    fs::write(database(dir.path()), bytes).unwrap();
    f.ticket(put_registration(500), 1);
    f.ticket(put(1, 1), 2);
    for ticket in 1..=2 {
        let (found, result) = f.stored();
        assert_eq!(found, ticket);
        let Err(StoreError::Other(text)) = result else { panic!("{result:?}") };
        assert!(text.contains("damaged") && text.contains("restart"), "{text}");
    }
    assert_eq!(f.body(1), None);
    f.store.close();
    let (f, snapshot) = Fixture::open(dir.path());
    assert!(snapshot.damaged.is_some());
    f.store.close();
}

#[test]
fn what_was_answered_survives_sigkill() {
    if let Some(dir) = env::var_os(CHILD) {
        return child_puts(Path::new(&dir));
    }
    const ROUNDS: u64 = 20;
    const PUTS: u64 = 200;
    let dir = temp();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(std::process::id());
    let mut answered = BTreeSet::new();
    let mut cut_short = 0;
    for round in 0..ROUNDS {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Once after the last of them.
        let kill_after = if round == 0 { PUTS - 1 } else { (random >> 33) % PUTS };
        let mut child = child("what_was_answered_survives_sigkill", dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut seen = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let Some(seq) = line.strip_prefix("stored ") else { continue };
            answered.insert(seq.parse::<u64>().unwrap());
            seen += 1;
            if seen == kill_after + 1 {
                // What it still says until it is dead counts too.
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(seen > kill_after, "round {round}: the child answered only {seen} of {kill_after}");
        cut_short += u64::from(seen < PUTS);

        let (mut f, snapshot) = Fixture::open(dir.path());
        assert_eq!(snapshot.damaged, None);
        let waiting: BTreeMap<_, _> = snapshot.messages.iter().map(|m| (m.seq.0, m.size as usize)).collect();
        for &seq in &answered {
            assert_eq!(waiting.get(&seq), Some(&body_of(seq).len()), "round {round}: message {seq} is lost");
        }
        let last = *answered.last().unwrap();
        assert_eq!(f.body(last), Some(body_of(last)));
        f.store.close();
    }
    assert!(cut_short > ROUNDS / 2, "only {cut_short} of {ROUNDS} children were killed in the middle");
}

fn child_puts(dir: &Path) {
    let (mut f, snapshot) = Fixture::open(dir);
    f.apply(put_registration(1));
    let first = snapshot.next_message;
    let mut out = std::io::stdout();
    // libtest has begun a line with the name of the test.
    out.write_all(b"\n").unwrap();
    let mut answered = 0;
    for n in 0..200 {
        f.ticket(put(first + n, 1), first + n);
        // A few in flight, so that transactions hold one to five.
        while n >= answered + n % 5 {
            let (seq, result) = f.stored();
            result.unwrap();
            out.write_all(format!("stored {seq}\n").as_bytes()).unwrap();
            out.flush().unwrap();
            answered += 1;
        }
    }
    while answered < 200 {
        let (seq, result) = f.stored();
        result.unwrap();
        out.write_all(format!("stored {seq}\n").as_bytes()).unwrap();
        answered += 1;
    }
    // Waits to be killed, unless it was to be after the last.
    thread::sleep(Duration::from_secs(2));
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing_half_written() {
    if let Some(dir) = env::var_os(CHILD) {
        return child_full_disk(Path::new(&dir));
    }
    let dir = temp();
    // A mount namespace of its own, so that the small file system goes with the child.
    let child = child("a_full_disk_is_told_and_leaves_nothing_half_written", dir.path());
    let mut unshare = Command::new("unshare");
    unshare.arg("--mount");
    if !nix::unistd::geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let script = "mount -t tmpfs -o size=4m tmpfs \"$NIGHTPORTER_STORE_TEST_DIR\" && exec \"$0\" \"$@\"";
    unshare.args(["sh", "-c", script]).arg(child.get_program()).args(child.get_args());
    let output = unshare.env(CHILD, dir.path()).output().expect("unshare(1) of util-linux");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
}

fn child_full_disk(dir: &Path) {
    let (mut f, _) = Fixture::open(dir);
    f.write(put_registration(1));
    let mut waiting: BTreeSet<u64> = (1..=200).collect();
    for seq in 1..=200 {
        f.write(put(seq, 1));
    }
    for seq in 1..=150 {
        f.end(seq);
        waiting.remove(&seq);
    }
    // Something else fills the disk. Messages can still end, again and again.
    let filler = dir.join("filler");
    let error = fs::write(&filler, vec![0; 8 << 20]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    for n in 0..500 {
        f.write(put_registration(1 + n % 3));
    }
    for seq in 151..=160 {
        f.end(seq);
        waiting.remove(&seq);
    }
    // What does not fit is told, one by one and many in one transaction, and is not half there.
    let mut full = 0;
    for first in [1000, 1400] {
        for seq in first..first + 400 {
            f.ticket(put(seq, 1), seq);
            if first == 1400 && seq != 1799 {
                continue;
            }
            for _ in if first == 1400 { first..first + 400 } else { seq..seq + 1 } {
                match f.stored() {
                    (ticket, Ok(())) => assert!(waiting.insert(ticket)),
                    (_, Err(StoreError::Full)) => full += 1,
                    (ticket, Err(other)) => panic!("{ticket}: {other}"),
                }
            }
        }
    }
    assert!((400..800).contains(&full), "{full} of 800 did not fit");
    f.store.close();

    let (mut f, snapshot) = Fixture::open(dir);
    assert_eq!(snapshot.damaged, None);
    assert_eq!(snapshot.messages.iter().map(|m| m.seq.0).collect::<BTreeSet<_>>(), waiting);
    for &seq in &waiting {
        assert_eq!(f.body(seq), Some(body_of(seq)));
    }
    f.ticket(put(3000, 1), 3000);
    assert_eq!(f.stored(), (3000, Err(StoreError::Full)));
    fs::remove_file(filler).unwrap();
    f.write(put(3000, 1));
    assert_eq!(f.body(3000), Some(body_of(3000)));
    f.store.close();
}
