//! What is not a caller's own: the bus thread asks polkit. Against a stand-in of every kind, and the real one.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "support/polkit.rs"]
mod polkit;
#[path = "polkit/real.rs"]
mod real;
#[path = "bus/support.rs"]
#[expect(dead_code, reason = "made for the tests of the buses; shared")]
mod support;

use std::{
    fs,
    future::poll_fn,
    pin::Pin,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use futures_core::Stream;
use nightporter::{
    action::{ErrorKind, Reply},
    event::{Authorization, BusEvent, CallId, Caller, Event, Privilege, Request},
    model::Bus,
    sys::{bus::BusAddress, inbox::Incoming},
};
use polkit::{Check, Heard, Polkit, Says};
use serde::Serialize;
use support::{DISTRIBUTOR, Daemon, Loop, connect, run};
use zbus::{
    Connection, DynamicType, Message, MessageStream,
    message::{Flags, Type},
};

const PATH: &str = "/org/nightporter1";
const MANAGER: &str = "org.nightporter1.Manager";
const APP: &str = "org.example.App";

/// The bus thread on these buses, all up.
fn serving(buses: &[(Bus, &Daemon)]) -> Loop {
    let at = |(bus, daemon): &(Bus, &Daemon)| BusAddress { bus: *bus, address: Some(daemon.address()) };
    let mut main = Loop::on(buses.iter().map(at).collect());
    for (bus, _) in buses {
        main.expect(|incoming| {
            matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(up))) if up == bus).then_some(())
        });
    }
    main
}

/// On a system bus alone, with a polkit on it.
fn asking_polkit(says: Says) -> (Daemon, Polkit, Loop) {
    let daemon = Daemon::new();
    let polkit = Polkit::start(&daemon.address(), says);
    let main = serving(&[(Bus::System, &daemon)]);
    (daemon, polkit, main)
}

fn call<B: Serialize + DynamicType>(member: &'static str, flags: Flags, body: &B) -> Message {
    let call = Message::method_call(PATH, member).destination(DISTRIBUTOR).interface(MANAGER);
    call.with_flags(flags).build(body).unwrap()
}

/// Sends a call and waits for the reply: empty, or the name of the error and its text.
async fn answered(client: &Connection, call: Message) -> Result<(), (String, String)> {
    let mut stream = MessageStream::from(client);
    client.send(&call).await.unwrap();
    loop {
        let reply = poll_fn(|context| Pin::new(&mut stream).poll_next(context)).await.unwrap().unwrap();
        let header = reply.header();
        if header.reply_serial() != Some(call.primary_header().serial_num()) {
            continue;
        }
        return match header.message_type() {
            Type::Error => Err((header.error_name().unwrap().to_string(), reply.body().deserialize().unwrap())),
            _ => Ok(()),
        };
    }
}

/// A client of its own with one call.
fn calling(daemon: &Daemon, call: Message) -> JoinHandle<Result<(), (String, String)>> {
    let address = daemon.address();
    run(async move { answered(&connect(&address).await, call).await })
}

fn kill() -> Message {
    call("Kill", Flags::empty(), &APP)
}

/// A client with calls that are not waited for; it leaves with this.
struct Waiting(Connection);

impl Waiting {
    fn new(daemon: &Daemon) -> Self {
        Self(zbus::block_on(connect(&daemon.address())))
    }

    fn send(&self) {
        zbus::block_on(self.0.send(&kill())).unwrap();
    }

    fn leave(self) {
        zbus::block_on(self.0.close()).unwrap();
    }
}

/// What the core does with a call that it does not let through by itself.
fn authorize(main: &mut Loop, privilege: Privilege, interactive: bool) -> (CallId, Caller, Request) {
    let (call, caller, request) = main.call();
    assert_eq!(caller.authorization, Authorization::NotAsked);
    main.reply(call, Reply::Authorize { privilege, interactive });
    (call, caller, request)
}

fn refusal(caller: &Caller) -> String {
    match &caller.authorization {
        Authorization::Refused(reason) => reason.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_call_comes_again_with_polkits_leave() {
    let (daemon, polkit, mut main) = asking_polkit(Says::Yes);
    let both = Flags::ALLOW_INTERACTIVE_AUTH;
    for (message, privilege, allowed, flags, details) in [
        (call("Kill", Flags::empty(), &APP), Privilege::ManageApps, true, 0, Some(("service", APP))),
        (call("Freeze", both, &APP), Privilege::ManageApps, true, 1, Some(("service", APP))),
        // For an app nobody is asked, whatever it allows.
        (call("Thaw", both, &APP), Privilege::ManageApps, false, 0, Some(("service", APP))),
        (call("Move", both, &(APP, "home")), Privilege::ManageApps, true, 1, Some(("service", APP))),
        (call("Move", both, &("", "home")), Privilege::ManageApps, true, 1, None),
        (call("Endpoints", both, &APP), Privilege::ManageApps, true, 1, Some(("service", APP))),
        (call("Show", both, &APP), Privilege::Read, true, 1, Some(("service", APP))),
        (call("Apps", Flags::empty(), &()), Privilege::Read, true, 0, None),
        (call("ForgetUser", both, &7_u32), Privilege::ManageUsers, true, 1, Some(("uid", "7"))),
    ] {
        let client = calling(&daemon, message);
        let (first, asking, request) = authorize(&mut main, privilege, allowed);
        let (second, caller, again) = main.call();
        assert_eq!(again, request);
        assert_ne!(first, second);
        assert_eq!(caller, Caller { authorization: Authorization::Granted(privilege), ..asking });
        let check = polkit.check();
        let details = details.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let expected = Check {
            kind: "system-bus-name".into(),
            name: Some(caller.owner.0.to_string()),
            action: privilege.action().into(),
            // polkit takes them from root alone.
            details: details.into_iter().filter(|_| nix::unistd::geteuid().is_root()).collect(),
            flags,
            number: check.number.clone(),
            ..Check::default()
        };
        assert_eq!(check, expected);
        // What was asked first is answered already.
        main.reply(first, Reply::Error(ErrorKind::Failed, "too late".into()));
        main.reply(second, Reply::Done);
        match request {
            Request::Query(_) => assert!(client.join().unwrap().is_err(), "a document was expected"),
            _ => client.join().unwrap().unwrap(),
        }
    }
}

#[test]
fn whatever_is_not_a_clear_yes_is_a_no() {
    let daemon = Daemon::new();
    let mut main = serving(&[(Bus::System, &daemon)]);
    for (says, flags, word) in [
        (None, Flags::empty(), "no polkit"),
        (Some(Says::No), Flags::empty(), "does not allow"),
        (Some(Says::Challenge), Flags::empty(), "does not let anybody"),
        (Some(Says::Challenge), Flags::ALLOW_INTERACTIVE_AUTH, "authentication agent"),
        (Some(Says::Dismissed), Flags::ALLOW_INTERACTIVE_AUTH, "dismissed"),
        (Some(Says::Error), Flags::empty(), "not registered"),
        (Some(Says::Garbage), Flags::empty(), "form"),
        (Some(Says::Loose), Flags::empty(), "form"),
        (Some(Says::Empty), Flags::empty(), "form"),
        (Some(Says::Vanish), Flags::empty(), "ended while"),
        (None, Flags::ALLOW_INTERACTIVE_AUTH, "no polkit"),
    ] {
        let polkit = says.map(|says| Polkit::start(&daemon.address(), says));
        let client = calling(&daemon, call("Kill", flags, &APP));
        authorize(&mut main, Privilege::ManageApps, true);
        let (call, caller, _) = main.call();
        let reason = refusal(&caller);
        assert!(reason.contains(word), "{says:?}: {reason}");
        main.reply(call, Reply::Error(ErrorKind::NotAuthorized, reason.clone()));
        assert_eq!(client.join().unwrap().unwrap_err(), ("org.nightporter1.Error.NotAuthorized".into(), reason));
        drop(polkit);
    }
}

#[test]
fn without_a_system_bus_there_is_nobody_to_ask() {
    let session = Daemon::new();
    let uid = nix::unistd::geteuid().as_raw();
    let system = BusAddress { bus: Bus::System, address: Some("unix:path=/nonexistent".into()) };
    let own = Bus::Session(uid);
    let mut main = Loop::on(vec![system, BusAddress { bus: own, address: Some(session.address()) }]);
    main.expect(|incoming| {
        matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(up))) if *up == own).then_some(())
    });
    let _client = calling(&session, kill());
    authorize(&mut main, Privilege::ManageApps, true);
    assert!(refusal(&main.call().1).contains("no system bus"));
}

#[test]
fn a_question_nobody_answers_holds_up_nobody_and_ends_with_its_caller() {
    let (daemon, polkit, mut main) = asking_polkit(Says::Nothing);
    let asking = Waiting::new(&daemon);
    asking.send();
    authorize(&mut main, Privilege::ManageApps, true);
    let number = polkit.check().number;
    // The same caller and others are served.
    asking.send();
    let other = calling(&daemon, call("Thaw", Flags::empty(), &APP));
    for _ in 0..2 {
        let (call, caller, _) = main.call();
        assert_eq!(caller.authorization, Authorization::NotAsked);
        main.reply(call, Reply::Done);
    }
    other.join().unwrap().unwrap();
    asking.leave();
    assert_eq!(polkit.next(), Heard::Cancel(number));
    // Nobody is there for whom it could be done.
    assert!(main.no_call());
}

#[test]
fn a_caller_that_is_gone_is_not_asked_about() {
    let (daemon, polkit, mut main) = asking_polkit(Says::Yes);
    let asking = Waiting::new(&daemon);
    asking.send();
    let (call, caller, _) = main.call();
    asking.leave();
    // Until the bus knows.
    let name = caller.owner.0.to_string();
    zbus::block_on(async {
        let client = connect(&daemon.address()).await;
        let bus = "org.freedesktop.DBus";
        let has_owner = async || {
            let reply = client.call_method(Some(bus), "/", Some(bus), "NameHasOwner", &name.as_str()).await;
            reply.unwrap().body().deserialize::<bool>().unwrap()
        };
        while has_owner().await {}
    });
    main.reply(call, Reply::Authorize { privilege: Privilege::ManageApps, interactive: true });
    let (_, again, _) = main.call();
    assert!(refusal(&again).contains("ended"), "{again:?}");
    assert!(polkit.was_left_alone());
}

#[test]
fn questions_are_bounded_for_each_caller_and_in_all() {
    let (daemon, polkit, mut main) = asking_polkit(Says::Nothing);
    let mut clients: Vec<Waiting> = Vec::new();
    for _ in 0..8 {
        let client = Waiting::new(&daemon);
        for _ in 0..2 {
            client.send();
            authorize(&mut main, Privilege::ManageApps, true);
            polkit.check();
        }
        clients.push(client);
    }
    // A third of the same caller, and the first of another.
    clients[0].send();
    authorize(&mut main, Privilege::ManageApps, true);
    let (call, caller, _) = main.call();
    assert!(refusal(&caller).contains("2 of your calls"), "{caller:?}");
    main.reply(call, Reply::Done);
    let late = Waiting::new(&daemon);
    late.send();
    authorize(&mut main, Privilege::ManageApps, true);
    let (call, caller, _) = main.call();
    assert!(refusal(&caller).contains("too many"), "{caller:?}");
    main.reply(call, Reply::Done);
    // Who leaves makes room.
    clients.remove(0).leave();
    for _ in 0..2 {
        assert!(matches!(polkit.next(), Heard::Cancel(_)));
    }
    polkit.set(Says::Yes);
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        late.send();
        authorize(&mut main, Privilege::ManageApps, true);
        let (call, caller, _) = main.call();
        main.reply(call, Reply::Done);
        if caller.authorization == Authorization::Granted(Privilege::ManageApps) {
            break;
        }
        assert!(Instant::now() < until, "{caller:?}");
    }
}

#[test]
fn polkit_has_its_time_and_no_more() {
    let (daemon, polkit, mut main) = asking_polkit(Says::Nothing);
    let client = calling(&daemon, kill());
    authorize(&mut main, Privilege::ManageApps, true);
    let number = polkit.check().number;
    let (call, caller, _) = main
        .expect_within(Duration::from_secs(60), |incoming| match incoming {
            Incoming::Event(Event::Bus(BusEvent::Call { call, caller, request })) => {
                Some((*call, caller.clone(), request.clone()))
            }
            _ => None,
        })
        .expect("it waits for ever");
    assert!(refusal(&caller).contains("within 25 s"), "{caller:?}");
    assert_eq!(polkit.next(), Heard::Cancel(number));
    main.reply(call, Reply::Done);
    client.join().unwrap().unwrap();
}

#[test]
fn on_a_session_bus_it_is_about_a_process() {
    let (system, session) = (Daemon::new(), Daemon::new());
    let polkit = Polkit::start(&system.address(), Says::Yes);
    let uid = nix::unistd::geteuid().as_raw();
    let mut main = serving(&[(Bus::System, &system), (Bus::Session(uid), &session)]);
    let client = calling(&session, kill());
    authorize(&mut main, Privilege::ManageApps, false);
    let (call, caller, _) = main.call();
    assert_eq!(caller.authorization, Authorization::Granted(Privilege::ManageApps));
    main.reply(call, Reply::Done);
    client.join().unwrap().unwrap();
    let check = polkit.check();
    let own = std::process::id();
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let start: u64 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
    assert_eq!((check.kind.as_str(), check.name.clone()), ("unix-process", None));
    assert_eq!((check.pid, check.pidfd, check.start_time), (Some(own), Some(own), Some(start)));
    assert_eq!(check.uid, Some(uid.try_into().unwrap()));
    assert_eq!(check.details.get("service").map(String::as_str), nix::unistd::geteuid().is_root().then_some(APP));
}

#[test]
fn a_users_bus_makes_polkit_believe_nothing_of_anybody_else() {
    // The bus of one user says that a process of another calls.
    let (system, session) = (Daemon::new(), Daemon::new());
    let polkit = Polkit::start(&system.address(), Says::Yes);
    let other = nix::unistd::geteuid().as_raw() + 1;
    let mut main = serving(&[(Bus::System, &system), (Bus::Session(other), &session)]);
    let _client = calling(&session, kill());
    authorize(&mut main, Privilege::ManageApps, true);
    let (_, caller, _) = main.call();
    assert!(refusal(&caller).contains(&format!("user {other}'s")), "{caller:?}");
    assert!(polkit.was_left_alone());
}

#[test]
fn a_bus_that_goes_takes_its_questions_along() {
    let (system, mut session) = (Daemon::new(), Daemon::new());
    let polkit = Polkit::start(&system.address(), Says::Nothing);
    let uid = nix::unistd::geteuid().as_raw();
    let mut main = serving(&[(Bus::System, &system), (Bus::Session(uid), &session)]);
    let asking = Waiting::new(&session);
    asking.send();
    authorize(&mut main, Privilege::ManageApps, true);
    let number = polkit.check().number;
    session.stop();
    assert_eq!(polkit.next(), Heard::Cancel(number));
    assert!(main.no_call());
    // It is back, and is as good as before.
    session.start();
    main.expect(|incoming| {
        matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(Bus::Session(_))))).then_some(())
    });
    polkit.set(Says::Yes);
    let client = calling(&session, kill());
    authorize(&mut main, Privilege::ManageApps, true);
    let (call, caller, _) = main.call();
    assert_eq!(caller.authorization, Authorization::Granted(Privilege::ManageApps));
    main.reply(call, Reply::Done);
    client.join().unwrap().unwrap();
}

#[test]
fn a_stop_waits_for_no_password() {
    let (daemon, polkit, mut main) = asking_polkit(Says::Nothing);
    let asking = Waiting::new(&daemon);
    asking.send();
    authorize(&mut main, Privilege::ManageApps, true);
    polkit.check();
    let begun = Instant::now();
    main.bus.take().unwrap().stop();
    assert!(begun.elapsed() < Duration::from_secs(2));
}

/// The names in the policy file are those that are asked for.
#[test]
fn the_policy_file_has_every_action() {
    let policy = include_str!("../config/polkit-1/actions/org.nightporter1.policy");
    for privilege in Privilege::ALL {
        assert!(policy.contains(&format!("<action id=\"{}\">", privilege.action())), "{privilege:?}");
    }
    assert_eq!(policy.matches("<action id=").count(), Privilege::ALL.len());
    assert!(!policy.contains(">yes<"), "nothing that is not one's own is free");
}
