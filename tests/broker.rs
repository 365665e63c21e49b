//! The bus thread on dbus-broker instead of dbus-daemon: what apps, callers and polkit need of a bus. The broker is real;
//! this test is its controller, in place of dbus-broker-launch, which needs systemd. So nothing can be activated here;
//! `tests/vm` has the two together.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "bus/notifying.rs"]
mod notifying;
#[path = "support/polkit.rs"]
#[expect(dead_code, reason = "made for the tests of polkit; shared")]
mod polkit;
#[path = "bus/support.rs"]
#[expect(dead_code, reason = "made for the tests of the buses; shared")]
mod support;

use std::{
    io::{BufRead, BufReader, Write},
    os::fd::AsFd,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nightporter::{
    action::{Action, ErrorKind, Reply},
    event::{Authorization, BusEvent, CallOutcome, Event, Privilege, Request, StartOutcome},
    model::{AppKey, Bus, ConnectorVersion},
    sys::{bus::BusAddress, inbox::Incoming},
};
use polkit::{Polkit, Says};
use support::{App, BUS, Behaviour, DISTRIBUTOR, DISTRIBUTOR_PATH, Ended, Loop, connect, error_of, message, run};
use zbus::{Fd, Message, ObjectPath, Variant};

const APP: &str = "org.example.App";

/// dbus-broker with a socket of its own; it ends with this.
struct Broker {
    _controller: Ended,
    dir: tempfile::TempDir,
}

type Rule = (bool, u64, &'static str, &'static str, &'static str, &'static str, u32, u32, u64, u64);
type Batch = (bool, u64, Vec<(bool, u64, bool, &'static str)>, Vec<Rule>, Vec<Rule>);

impl Broker {
    fn new() -> Self {
        Self::within(tempfile::tempdir().unwrap())
    }

    fn within(dir: tempfile::TempDir) -> Self {
        let program = program();
        // What its controller tells it of a policy has one field more since version 34.
        for typed in [false, true] {
            let _ = std::fs::remove_file(dir.path().join("socket"));
            if let Some(controller) = start(&program, dir.path(), typed) {
                return Self { _controller: controller, dir };
            }
        }
        panic!("{program} takes no listener");
    }

    fn address(&self) -> String {
        format!("unix:path={}/socket", self.dir.path().display())
    }

    /// Killed, and another in its place.
    fn again(self) -> Self {
        let Self { _controller: controller, dir } = self;
        drop(controller);
        Self::within(dir)
    }
}

fn program() -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/setup/dbus-broker");
    let output = Command::new(script).stdin(Stdio::null()).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{script} failed: this test needs the real dbus-broker");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// `None` if it does not understand us.
fn start(program: &str, dir: &Path, typed: bool) -> Option<Ended> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/broker/controller.py");
    let mut command = Command::new("python3");
    command.args([script, program]).arg(dir.join("socket")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = Ended(command.stderr(Stdio::null()).spawn().unwrap());
    let all: Rule = (true, 1, "", "", "", "", 0, 0, 0, u64::MAX);
    let everything: Batch = (true, 1, vec![(true, 1, true, "")], vec![all], vec![all]);
    let (users, groups) = (vec![(u32::MAX, everything)], Vec::<(bool, u32, u32, Batch)>::new());
    let contexts = Vec::<(String, String)>::new();
    let policy = match typed {
        true => Variant::from((users, groups, contexts, false, "session")),
        false => Variant::from((users, groups, contexts, false)),
    };
    let path = ObjectPath::try_from("/org/bus1/DBus/Listener/0").unwrap();
    let call = Message::method_call("/org/bus1/DBus/Broker", "AddListener").interface("org.bus1.DBus.Broker");
    // The descriptor only counts here; the controller sends its own.
    let stdin = std::io::stdin();
    let call = call.build(&(path, Fd::from(stdin.as_fd()), policy)).unwrap();
    child.0.stdin.take().unwrap().write_all(call.data()).unwrap();
    let mut answer = String::new();
    BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut answer).unwrap();
    (answer == "ok\n").then_some(child)
}

fn up(main: &mut Loop, bus: Bus) {
    main.expect(|incoming| {
        matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(up))) if *up == bus).then_some(())
    });
}

#[test]
fn apps_register_and_are_delivered_to() {
    let broker = Broker::new();
    let mut main = Loop::on(vec![BusAddress { bus: BUS, address: Some(broker.address()) }]);
    up(&mut main, BUS);
    // A caller is known for who it is, with the name it owns.
    let address = broker.address();
    let client = run(async move {
        let client = connect(&address).await;
        client.request_name(APP).await.unwrap();
        let register = Some("org.unifiedpush.Distributor1");
        let own = client.call_method(Some(DISTRIBUTOR), DISTRIBUTOR_PATH, register, "Register", &(APP, "t", ""));
        own.await.unwrap();
        let path = "/org/nightporter1";
        let other = client.call_method(Some(DISTRIBUTOR), path, None::<&str>, "Kill", &"org.example.Other");
        error_of(other.await).0
    });
    let (call, caller, request) = main.call();
    assert!(matches!(request, Request::Register { .. }) && caller.owns_service);
    assert_eq!((caller.pid, caller.uid), (std::process::id(), nix::unistd::geteuid().as_raw()));
    main.reply(call, Reply::Registered);
    let (call, caller, _) = main.call();
    assert!(!caller.owns_service);
    main.reply(call, Reply::Error(ErrorKind::NotAuthorized, "no".into()));
    assert_eq!(client.join().unwrap(), "org.nightporter1.Error.NotAuthorized");

    // Apps come, take messages, and go.
    let key = AppKey::new(BUS, APP);
    main.perform(Action::Watch(key.clone()));
    let mut last = main.owner(&key);
    let app = App::start(&broker.address(), APP, Behaviour::Accept);
    while last.as_ref() != Some(&app.owner) {
        last = main.owner(&key);
    }
    let (owner, process) = main.process(&key);
    assert_eq!((owner, process.pid), (app.owner.clone(), std::process::id()));
    let ticket = main.deliver(&key, &app.owner, ConnectorVersion::V2, message(b"hello"));
    assert_eq!(main.done(ticket), CallOutcome::Accepted);
    let owner = app.owner.clone();
    app.quit();
    assert_eq!(main.owner(&key), None);
    let ticket = main.deliver(&key, &owner, ConnectorVersion::V2, message(b"late"));
    assert_eq!(main.done(ticket), CallOutcome::Vanished);
    // One that takes a message and goes without a word.
    let silent = App::start(&broker.address(), APP, Behaviour::Silent);
    let ticket = main.deliver(&key, &silent.owner, ConnectorVersion::V2, message(b"unanswered"));
    silent.calls.recv_timeout(Duration::from_secs(20)).unwrap();
    silent.quit();
    assert_eq!(main.done(ticket), CallOutcome::Vanished);
    // Nobody says how to start it.
    main.perform(Action::Start(key.clone()));
    let started = main.expect(|incoming| match incoming {
        Incoming::Event(Event::Bus(BusEvent::Started(about, outcome))) if *about == key => Some(outcome.clone()),
        _ => None,
    });
    assert_eq!(started, StartOutcome::NotActivatable);
}

#[test]
fn a_broker_that_dies_is_served_again_when_it_is_back() {
    let broker = Broker::new();
    let mut main = Loop::on(vec![BusAddress { bus: BUS, address: Some(broker.address()) }]);
    up(&mut main, BUS);
    let app = App::start(&broker.address(), APP, Behaviour::Silent);
    main.perform(Action::Watch(app.key.clone()));
    assert_eq!(main.owner(&app.key), Some(app.owner.clone()));
    let ticket = main.deliver(&app.key, &app.owner, ConnectorVersion::V2, message(b"in flight"));
    app.calls.recv_timeout(Duration::from_secs(20)).unwrap();
    let begun = Instant::now();
    let broker = broker.again();
    // Not delivered, as far as can be known; and not refused.
    let outcome = main.done(ticket);
    assert!(matches!(outcome, CallOutcome::NotSent(_) | CallOutcome::Vanished), "{outcome:?}");
    up(&mut main, BUS);
    assert!(begun.elapsed() < Duration::from_secs(60));
    let again = App::start(&broker.address(), APP, Behaviour::Accept);
    while main.owner(&again.key).as_ref() != Some(&again.owner) {}
    let ticket = main.deliver(&again.key, &again.owner, ConnectorVersion::V2, message(b"in flight"));
    assert_eq!(main.done(ticket), CallOutcome::Accepted);
}

#[test]
fn polkit_is_asked_there_as_well() {
    let broker = Broker::new();
    let mut main = Loop::on(vec![BusAddress { bus: Bus::System, address: Some(broker.address()) }]);
    up(&mut main, Bus::System);
    for (says, word) in [
        (None, Some("no polkit")),
        (Some(Says::Yes), None),
        (Some(Says::No), Some("does not allow")),
        (Some(Says::Garbage), Some("form")),
        (Some(Says::Vanish), Some("ended while")),
    ] {
        let polkit = says.map(|says| Polkit::start(&broker.address(), says));
        let address = broker.address();
        let client = run(async move {
            let client = connect(&address).await;
            let manager = Some("org.nightporter1.Manager");
            client.call_method(Some(DISTRIBUTOR), "/org/nightporter1", manager, "Kill", &APP).await.unwrap();
        });
        let (call, ..) = main.call();
        main.reply(call, Reply::Authorize { privilege: Privilege::ManageApps, interactive: true });
        let (call, caller, _) = main.call();
        match (&caller.authorization, word) {
            (Authorization::Granted(Privilege::ManageApps), None) => {}
            (Authorization::Refused(reason), Some(word)) => assert!(reason.contains(word), "{reason}"),
            other => panic!("{says:?}: {other:?}"),
        }
        main.reply(call, Reply::Done);
        client.join().unwrap();
        drop(polkit);
    }
}

impl notifying::Side for Loop {
    fn perform(&self, action: Action) {
        Self::perform(self, action);
    }

    fn told(&mut self, limit: Duration) -> Option<notifying::Told> {
        self.expect_within(limit, notifying::told)
    }
}

#[test]
fn notifications_are_seen_while_that_is_wanted_and_their_senders_told() {
    let broker = Broker::new();
    let mut main = Loop::on(vec![BusAddress { bus: BUS, address: Some(broker.address()) }]);
    main.expect(|incoming| matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(BUS)))).then_some(()));
    notifying::is_seen_while_it_is_wanted(&mut main, BUS, &broker.address());
}
