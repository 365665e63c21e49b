//! Who notifies the user, on real buses: with the daemon's own rights, and with a user's. The second must run as root.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "bus/notifying.rs"]
mod notifying;
#[path = "bus/support.rs"]
#[expect(dead_code, reason = "made for the tests of the buses; shared")]
mod support;

use std::{
    fs,
    future::ready,
    os::unix::{
        fs::{PermissionsExt, chown},
        net::UnixStream,
    },
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use mio::{Events, Poll, Token};
use nightporter::{
    action::Action,
    event::Event,
    model::Bus,
    sys::{
        bus::BusThread,
        inbox::{self, Inbox},
        users::{self, User, Usher},
    },
};
use notifying::{Notifier, Side, Told, is_seen_while_it_is_wanted, told};
use support::{BUS, Daemon, Loop};

/// On every Debian (base-passwd).
const USER: u32 = 6;
const PATIENCE: Duration = Duration::from_secs(30);

impl Side for Loop {
    fn perform(&self, action: Action) {
        Self::perform(self, action);
    }

    fn told(&mut self, limit: Duration) -> Option<Told> {
        self.expect_within(limit, told)
    }
}

/// A user with a session bus who is logged in, and the loop's side.
struct Users {
    bus: Option<BusThread>,
    poll: Poll,
    inbox: Inbox,
    _usher: Usher,
    daemon: Child,
    dir: tempfile::TempDir,
}

impl Users {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test must run as root");
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        chown(dir.path(), Some(USER), Some(USER)).unwrap();
        let (uid, socket) = (USER.to_string(), dir.path().join("bus"));
        let daemon = Command::new("setpriv")
            .args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--", "dbus-daemon", "--session", "--nofork"])
            .args(["--nopidfile", "--address", &format!("unix:path={}", socket.display())])
            .current_dir("/")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let until = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < until, "no bus");
            thread::sleep(Duration::from_millis(5));
        }
        let poll = Poll::new().unwrap();
        let (sender, inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        let (usher, roster) = users::roster();
        usher.present(vec![User { uid: USER, gid: USER, runtime_dir: dir.path().to_owned() }]);
        let bus = BusThread::spawn_watching(vec![], Some(roster), false, None, sender, ready(())).unwrap();
        let mut this = Self { bus: Some(bus), poll, inbox, _usher: usher, daemon, dir };
        let up = |incoming: &inbox::Incoming| {
            let up = nightporter::event::BusEvent::Up(Bus::Session(USER));
            matches!(incoming, inbox::Incoming::Event(Event::Bus(event)) if *event == up).then_some(())
        };
        this.expect(PATIENCE, up).expect("the bus is served");
        this
    }

    fn expect<T>(&mut self, limit: Duration, mut pick: impl FnMut(&inbox::Incoming) -> Option<T>) -> Option<T> {
        let until = Instant::now() + limit;
        let mut events = Events::with_capacity(4);
        loop {
            while let Some(incoming) = self.inbox.take() {
                if let Some(picked) = pick(&incoming) {
                    return Some(picked);
                }
            }
            let left = until.checked_duration_since(Instant::now())?;
            let _ = self.poll.poll(&mut events, Some(left));
        }
    }
}

impl Drop for Users {
    fn drop(&mut self) {
        self.bus.take().into_iter().for_each(BusThread::stop);
        let _ = (self.daemon.kill(), self.daemon.wait());
    }
}

impl Side for Users {
    fn perform(&self, action: Action) {
        self.bus.as_ref().unwrap().perform(action);
    }

    fn told(&mut self, limit: Duration) -> Option<Told> {
        self.expect(limit, told)
    }
}

#[test]
fn app_process() {
    support::be_app();
}

#[test]
fn notifications_are_seen_while_that_is_wanted_and_their_senders_told() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    is_seen_while_it_is_wanted(&mut main, BUS, &daemon.address());
}

#[test]
fn a_bus_that_ends_or_is_not_there_says_that_nothing_is_seen() {
    let mut daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    main.perform(Action::WatchNotifications(BUS, true));
    assert_eq!(main.told(PATIENCE), Some(Told::Seen(BUS, true)));
    daemon.stop();
    assert_eq!(main.told(PATIENCE), Some(Told::Seen(BUS, false)));
    main.perform(Action::WatchNotifications(BUS, true));
    assert_eq!(main.told(PATIENCE), Some(Told::Seen(BUS, false)));
    main.perform(Action::WatchNotifications(Bus::Session(1), true));
    assert_eq!(main.told(PATIENCE), Some(Told::Seen(Bus::Session(1), false)), "nobody's");
}

#[test]
fn more_than_anybody_reads_ends_it() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    main.perform(Action::WatchNotifications(BUS, true));
    assert_eq!(main.told(PATIENCE), Some(Told::Seen(BUS, true)));
    let notifier = Notifier::new(&daemon.address());
    (0..2000).for_each(|_| notifier.say("org.freedesktop.Notifications", "Notify", "x"));
    let mut seen = 0;
    while let Some(told) = main.told(PATIENCE) {
        seen += 1;
        if told == Told::Seen(BUS, false) {
            break;
        }
    }
    assert!((2..1900).contains(&seen), "{seen}");
}

#[test]
fn a_users_bus_is_watched_with_that_users_rights_and_what_is_not_taken_ends_it() {
    let mut users = Users::new();
    let (bus, socket) = (Bus::Session(USER), users.dir.path().join("bus"));
    // Root may not connect to a user's bus, so the app is a program of that user's.
    let notify = |texts: &[&str]| {
        let uid = USER.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--", "dbus-send", "--session"]);
        command.args(["--print-reply", "--dest=org.freedesktop.DBus", "/org/example"]);
        command.arg("org.freedesktop.Notifications.Notify").args(texts.iter().map(|text| format!("string:{text}")));
        command.env("DBUS_SESSION_BUS_ADDRESS", format!("unix:path={}", socket.display()));
        // The bus itself has no such method: it says so.
        assert!(!command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    };
    users.perform(Action::WatchNotifications(bus, true));
    assert_eq!(users.told(PATIENCE), Some(Told::Seen(bus, true)));
    notify(&["hello"]);
    let told = users.told(PATIENCE);
    assert!(matches!(told, Some(Told::Notified(of, ..)) if of == bus), "{told:?}");
    let large = "x".repeat(100_000);
    notify(&[&large, &large, &large]);
    assert_eq!(users.told(PATIENCE), Some(Told::Seen(bus, false)), "it was missed, so nobody is to be blamed");
}
