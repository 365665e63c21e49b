//! The bus thread against a real dbus-daemon.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "bus/support.rs"]
mod support;

use std::{
    collections::HashMap,
    process::Command,
    time::{Duration, Instant},
};

use nightporter::{
    action::{Action, ClientCall, ConnectorCall, ErrorKind, Reply},
    event::{
        BusEvent, CallOutcome, Claim, DeliveryTicket, Event, NoticeTicket, Query, Request, STATE_MAX, StartOutcome,
    },
    model::{AppKey, Bus, ConnectorVersion, FailureReason, Owner},
    sys::{bus::BusAddress, inbox::Incoming},
};
use support::*;
use zbus::{Message, OwnedVariant, Variant};

const V1: &str = "org.unifiedpush.Distributor1";
const V2: &str = "org.unifiedpush.Distributor2";
const VAPID: &str = "BA1Hxzyi1RUM1b5wjxsn7nGxAszw2u61m164i3MrAIxHF6YK5h4SDYic-dRuU_RCPCfA5aq9ojSwk5Y2EmClBPs";

fn dict(entries: &[(&'static str, Variant<'static>)]) -> HashMap<&'static str, Variant<'static>> {
    entries.iter().map(|(key, value)| (*key, value.try_clone().unwrap())).collect()
}

fn result_of(reply: &Message) -> HashMap<String, String> {
    let body = reply.body();
    let dict: HashMap<String, OwnedVariant> = body.deserialize().unwrap();
    dict.into_iter().map(|(key, value)| (key, String::try_from(value).unwrap())).collect()
}

#[test]
fn app_process() {
    be_app();
}

#[test]
fn registration_v2_round_trip() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let address = daemon.address();
    let client = run(async move {
        let connection = connect(&address).await;
        connection.request_name("org.example.Chat").await.unwrap();
        let unique = connection.unique_name().unwrap().to_string();
        let arguments = dict(&[
            ("service", "org.example.Chat".into()),
            ("token", "{3f2504e0-4f89-11d3-9a0c-0305e82c3301}".into()),
            ("description", "Chat messages".into()),
            ("vapid", VAPID.into()),
            ("future", Variant::from(vec![1_u32])),
        ]);
        let call = || connection.call_method(Some(DISTRIBUTOR), DISTRIBUTOR_PATH, Some(V2), "Register", &arguments);
        let first = result_of(&call().await.unwrap());
        let second = result_of(&call().await.unwrap());
        let token = dict(&[("token", "t".into())]);
        let third = connection.call_method(Some(DISTRIBUTOR), DISTRIBUTOR_PATH, Some(V2), "Unregister", &token).await;
        (unique, first, second, result_of(&third.unwrap()))
    });
    let (call, caller, request) = main.call();
    assert_eq!(
        request,
        Request::Register {
            service: "org.example.Chat".into(),
            token: "{3f2504e0-4f89-11d3-9a0c-0305e82c3301}".into(),
            description: "Chat messages".into(),
            vapid: Some(VAPID.into()),
            version: ConnectorVersion::V2,
            upstream: None,
            notify: None,
        }
    );
    assert_eq!(caller.bus, BUS);
    assert_eq!(caller.pid, std::process::id());
    assert_eq!(caller.uid, nix::unistd::getuid().as_raw());
    assert!(caller.owns_service);
    assert!(!caller.sandboxed);
    main.reply(call, Reply::Registered);
    let (call, ..) = main.call();
    main.reply(call, Reply::RegisterFailed(FailureReason::VapidRequired, "no key".into()));
    let (call, _, request) = main.call();
    assert_eq!(request, Request::Unregister { token: "t".into(), version: ConnectorVersion::V2 });
    main.reply(call, Reply::Done);
    let (unique, first, second, third) = client.join().unwrap();
    assert_eq!(*caller.owner.0, *unique);
    assert_eq!(first, HashMap::from([("success".into(), "REGISTRATION_SUCCEEDED".into())]));
    assert_eq!(second["success"], "REGISTRATION_FAILED");
    assert_eq!(second["reason"], "VAPID_REQUIRED");
    assert!(third.is_empty());
}

#[test]
fn registration_v1_round_trip() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let address = daemon.address();
    let client = run(async move {
        let connection = connect(&address).await;
        connection.request_name("org.example.Old").await.unwrap();
        let arguments = ("org.example.Old", "tok", "");
        let call = || connection.call_method(Some(DISTRIBUTOR), DISTRIBUTOR_PATH, Some(V1), "Register", &arguments);
        let first: (String, String) = call().await.unwrap().body().deserialize().unwrap();
        let second: (String, String) = call().await.unwrap().body().deserialize().unwrap();
        let third = connection.call_method(Some(DISTRIBUTOR), DISTRIBUTOR_PATH, Some(V1), "Unregister", &"tok").await;
        (first, second, third.unwrap().body().is_empty())
    });
    let (call, caller, request) = main.call();
    assert!(caller.owns_service);
    assert!(matches!(request, Request::Register { version: ConnectorVersion::V1, vapid: None, .. }));
    main.reply(call, Reply::Registered);
    let (call, ..) = main.call();
    main.reply(call, Reply::RegisterFailed(FailureReason::Network, "the server cannot be reached".into()));
    let (call, _, request) = main.call();
    assert_eq!(request, Request::Unregister { token: "tok".into(), version: ConnectorVersion::V1 });
    main.reply(call, Reply::Done);
    let (first, second, third) = client.join().unwrap();
    assert_eq!(first, ("REGISTRATION_SUCCEEDED".into(), String::new()));
    assert_eq!(second, ("REGISTRATION_FAILED".into(), "the server cannot be reached".into()));
    assert!(third);
}

#[test]
fn bad_registrations_are_refused_and_the_loop_never_hears_of_them() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let (service, token) = (("service", Variant::from("org.example.App")), ("token", Variant::from("t")));
    let with = |entries: &[(&'static str, Variant<'static>)]| {
        let mut all = dict(&[(service.0, service.1.try_clone().unwrap()), (token.0, token.1.try_clone().unwrap())]);
        all.extend(dict(entries));
        all
    };
    let mut not_04 = VAPID.to_owned();
    not_04.replace_range(0..2, "AA");
    for (arguments, about) in [
        (dict(&[]), "service"),
        (dict(&[("service", "org.example.App".into())]), "token"),
        (dict(&[("token", "t".into())]), "service"),
        (with(&[("service", Variant::from(7_u32))]), "service"),
        (with(&[("token", Variant::from(vec!["t"]))]), "token"),
        (with(&[("token", Variant::from(b"t".to_vec()))]), "token"),
        (with(&[("token", "".into())]), "empty"),
        (with(&[("token", "x".repeat(101).into())]), "101"),
        (with(&[("description", "é".repeat(51).into())]), "102"),
        (with(&[("description", Variant::from(true))]), "description"),
        (with(&[("service", "not a name".into())]), "not a name"),
        (with(&[("service", "".into())]), "D-Bus name"),
        (with(&[("service", "nodots".into())]), "nodots"),
        (with(&[("service", format!("org.{}", "x".repeat(260)).into())]), "D-Bus name"),
        (with(&[("vapid", "short".into())]), "VAPID"),
        (with(&[("vapid", "*".repeat(87).into())]), "VAPID"),
        (with(&[("vapid", not_04.into())]), "VAPID"),
        (with(&[("vapid", Variant::from(1_i64))]), "vapid"),
    ] {
        let shown = format!("{arguments:?}");
        let (name, text) = error_of(call_once(&daemon, DISTRIBUTOR_PATH, V2, "Register", arguments).join().unwrap());
        assert_eq!(name, "org.freedesktop.DBus.Error.InvalidArgs", "{shown}");
        assert!(text.contains(about), "{shown}: {text}");
    }
    for (service, token, description) in [
        ("org.example.App", "", ""),
        ("org.example.App", &*"x".repeat(101), ""),
        ("no name", "t", ""),
        ("org.example.App", "t", &*"d".repeat(101)),
    ] {
        let body = (service.to_owned(), token.to_owned(), description.to_owned());
        let (name, _) = error_of(call_once(&daemon, DISTRIBUTOR_PATH, V1, "Register", body).join().unwrap());
        assert_eq!(name, "org.freedesktop.DBus.Error.InvalidArgs");
    }
    // Wrong signatures altogether.
    let wrong = call_once(&daemon, DISTRIBUTOR_PATH, V2, "Register", ("a", "b", "c")).join().unwrap();
    assert_eq!(error_of(wrong).0, "org.freedesktop.DBus.Error.InvalidArgs");
    let wrong = call_once(&daemon, DISTRIBUTOR_PATH, V2, "Register", HashMap::from([("token", "t")])).join().unwrap();
    assert_eq!(error_of(wrong).0, "org.freedesktop.DBus.Error.InvalidArgs");
    let wrong = call_once(&daemon, DISTRIBUTOR_PATH, V1, "Register", ("a", "b")).join().unwrap();
    assert_eq!(error_of(wrong).0, "org.freedesktop.DBus.Error.InvalidArgs");
    let wrong =
        call_once(&daemon, DISTRIBUTOR_PATH, V2, "Unregister", dict(&[("token", 5_u32.into())])).join().unwrap();
    assert_eq!(error_of(wrong).0, "org.freedesktop.DBus.Error.InvalidArgs");
    assert!(main.no_call());
    // The longest token there may be is not refused.
    let client = call_once(&daemon, DISTRIBUTOR_PATH, V2, "Register", with(&[("token", "x".repeat(100).into())]));
    let (call, ..) = main.call();
    main.reply(call, Reply::Registered);
    client.join().unwrap().unwrap();
}

#[test]
fn whose_service_it_is() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let victim = App::start(&daemon.address(), "org.example.Victim", Behaviour::Accept);
    let address = daemon.address();
    let foreign = victim.owner.0.to_string();
    let client = run(async move {
        let connection = connect(&address).await;
        let unique = connection.unique_name().unwrap().to_string();
        for service in ["org.example.Victim".to_owned(), "org.example.Nobody".to_owned(), foreign, unique] {
            let arguments = (service, "t", "");
            connection
                .call_method(Some(DISTRIBUTOR), DISTRIBUTOR_PATH, Some(V1), "Register", &arguments)
                .await
                .unwrap();
        }
        let path = "/org/nightporter1";
        connection.call_method(Some(DISTRIBUTOR), path, None::<&str>, "SetState", &"background").await.unwrap();
    });
    for owns in [false, false, false, true] {
        let (call, caller, _) = main.call();
        assert_eq!(caller.owns_service, owns);
        main.reply(call, Reply::Registered);
    }
    let (call, caller, request) = main.call();
    assert_eq!(request, Request::Declare { service: None, claim: Claim::Background });
    assert!(caller.owns_service);
    main.reply(call, Reply::Done);
    client.join().unwrap();
}

#[test]
fn our_own_interface_and_its_errors() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let manager = "org.nightporter1.Manager";
    let status = call_once(&daemon, "/org/nightporter1", manager, "Status", ());
    let (call, _, request) = main.call();
    assert_eq!(request, Request::Query(Query::Status));
    main.reply(call, Reply::Json("{\"apps\":0}".into()));
    assert_eq!(status.join().unwrap().unwrap().body().deserialize::<String>().unwrap(), "{\"apps\":0}");
    for (kind, name) in [
        (ErrorKind::InvalidArgs, "org.freedesktop.DBus.Error.InvalidArgs"),
        (ErrorKind::LimitsExceeded, "org.freedesktop.DBus.Error.LimitsExceeded"),
        (ErrorKind::NotAuthorized, "org.nightporter1.Error.NotAuthorized"),
        (ErrorKind::NoSuchApp, "org.nightporter1.Error.NoSuchApp"),
        (ErrorKind::NotRunning, "org.nightporter1.Error.NotRunning"),
        (ErrorKind::Refused, "org.nightporter1.Error.Refused"),
        (ErrorKind::Failed, "org.nightporter1.Error.Failed"),
    ] {
        let kill = call_once(&daemon, "/org/nightporter1", manager, "Kill", "org.example.App");
        let (call, ..) = main.call();
        main.reply(call, Reply::Error(kind, "because".into()));
        assert_eq!(error_of(kill.join().unwrap()), (name.into(), "because".into()));
    }
    let get = call_once(&daemon, "/org/nightporter1", "org.freedesktop.DBus.Properties", "Get", (manager, "Version"));
    let version: OwnedVariant = get.join().unwrap().unwrap().body().deserialize().unwrap();
    assert_eq!(String::try_from(version).unwrap(), env!("CARGO_PKG_VERSION"));
}

/// The policy we install for the system bus is enough for us, and no more than that for others.
#[test]
fn the_policy_for_the_system_bus() {
    let policy = concat!(env!("CARGO_MANIFEST_DIR"), "/config/dbus-1/system.d/org.nightporter1.conf");
    let policy = std::fs::read_to_string(policy).unwrap();
    let uid = nix::unistd::getuid();
    for (user, allowed) in [(uid.to_string(), true), ("12345".to_owned(), false)] {
        let daemon = Daemon::like_system(&policy.replace("user=\"root\"", &format!("user=\"{user}\"")));
        let mut main = Loop::on(vec![BusAddress { bus: BUS, address: Some(daemon.address()) }]);
        if !allowed {
            assert!(down(&mut main).contains("policy file"));
            continue;
        }
        up(&mut main);
        let client = call_once(&daemon, DISTRIBUTOR_PATH, V1, "Register", (":1.1", "t", ""));
        let (call, ..) = main.call();
        main.reply(call, Reply::Registered);
        client.join().unwrap().unwrap();
        call_once(&daemon, "/", "org.freedesktop.DBus.Introspectable", "Introspect", ()).join().unwrap().unwrap();
        let refused = call_once(&daemon, "/", "org.example.Else", "Anything", ()).join().unwrap();
        assert_eq!(error_of(refused).0, "org.freedesktop.DBus.Error.AccessDenied");
        let app = App::start(&daemon.address(), "org.example.Allowed", Behaviour::Silent);
        for version in [ConnectorVersion::V1, ConnectorVersion::V2] {
            let ticket = main.deliver(&app.key, &app.owner, version, message(b"x"));
            app.calls.recv_timeout(Duration::from_secs(5)).unwrap();
            if version == ConnectorVersion::V1 {
                assert_eq!(main.done(ticket), CallOutcome::Accepted);
            }
        }
        notify(&main, &app, 1);
        let call = app.calls.recv_timeout(Duration::from_secs(5)).unwrap();
        assert_eq!(call.header().interface().unwrap().as_str(), "org.nightporter1.Client");
    }
}

#[test]
fn introspection_is_answered_while_a_registration_waits() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let waiting = call_once(&daemon, DISTRIBUTOR_PATH, V1, "Register", (":1.1", "t", ""));
    let (call, ..) = main.call();
    let started = Instant::now();
    let xml = call_once(&daemon, DISTRIBUTOR_PATH, "org.freedesktop.DBus.Introspectable", "Introspect", ());
    let xml = xml.join().unwrap().unwrap();
    assert!(xml.body().deserialize::<&str>().unwrap().contains("org.unifiedpush.Distributor2"));
    assert!(started.elapsed() < Duration::from_secs(10));
    call_once(&daemon, "/", "org.freedesktop.DBus.Peer", "Ping", ()).join().unwrap().unwrap();
    // gdbus is what people introspect with; it parses the document.
    let parsed = Command::new("gdbus")
        .args(["introspect", "--recurse", "--address", &daemon.address(), "--dest", "org.nightporter1", "-o", "/"])
        .output()
        .unwrap();
    let parsed = String::from_utf8(parsed.stdout).unwrap();
    assert!(parsed.contains("SetStateOf(in  s service") && parsed.contains("org.unifiedpush.Distributor1"), "{parsed}");
    main.reply(call, Reply::Registered);
    waiting.join().unwrap().unwrap();
}

#[test]
fn one_sender_has_a_limited_number_of_calls_in_flight() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let address = daemon.address();
    let (done, results) = async_channel::unbounded();
    let client = run(async move {
        let connection = connect(&address).await;
        let tasks: Vec<_> = (0..40)
            .map(|n| {
                let (connection, done) = (connection.clone(), done.clone());
                zruntime::spawn(async move {
                    let arguments = (connection.unique_name().unwrap().to_string(), format!("t{n}"), "");
                    let result = connection
                        .call_method(Some(DISTRIBUTOR), DISTRIBUTOR_PATH, Some(V1), "Register", &arguments)
                        .await;
                    done.send(result).await.unwrap();
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
    for _ in 0..8 {
        let refused = results.recv_blocking().unwrap();
        assert_eq!(error_of(refused).0, "org.freedesktop.DBus.Error.LimitsExceeded");
    }
    // Somebody else is served meanwhile.
    let other = call_once(&daemon, "/org/nightporter1", "org.nightporter1.Manager", "Apps", ());
    let mut calls = Vec::new();
    loop {
        let (call, _, request) = main.call();
        match request {
            Request::Register { token, .. } => calls.push((call, token)),
            _ => break main.reply(call, Reply::Json("[]".into())),
        }
    }
    other.join().unwrap().unwrap();
    let tokens: Vec<_> = calls.iter().map(|(_, token)| token.to_string()).collect();
    assert_eq!(tokens, (0..32).map(|n| format!("t{n}")).collect::<Vec<_>>(), "calls of one sender stay in order");
    for (call, _) in calls {
        main.reply(call, Reply::Registered);
    }
    for _ in 0..32 {
        results.recv_blocking().unwrap().unwrap();
    }
    client.join().unwrap();
}

#[test]
fn calls_in_flight_are_limited_and_callers_that_vanish_leave_nothing_behind() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let address = daemon.address();
    let (leave, leaving) = async_channel::bounded::<()>(1);
    let callers = run(async move {
        let mut connections = Vec::new();
        for _ in 0..33 {
            let connection = connect(&address).await;
            for _ in 0..32 {
                let call =
                    Message::method_call("/org/nightporter1", "Apps").destination(DISTRIBUTOR).build(&()).unwrap();
                connection.send(&call).await.unwrap();
            }
            connections.push(connection);
        }
        leaving.recv().await.unwrap();
    });
    let calls: Vec<_> = (0..1024).map(|_| main.call().0).collect();
    assert!(main.no_call(), "more than 1024 calls in flight");
    let refused = call_once(&daemon, "/org/nightporter1", "org.nightporter1.Manager", "Apps", ()).join().unwrap();
    assert_eq!(error_of(refused).0, "org.freedesktop.DBus.Error.LimitsExceeded");
    leave.send_blocking(()).unwrap();
    callers.join().unwrap();
    for call in calls {
        main.reply(call, Reply::Json("[]".into()));
        main.reply(call, Reply::Json("twice".into()));
    }
    let alive = call_once(&daemon, "/org/nightporter1", "org.nightporter1.Manager", "Apps", ());
    let (call, ..) = main.call();
    main.reply(call, Reply::Json("[]".into()));
    alive.join().unwrap().unwrap();
}

#[test]
fn deliveries_end_as_the_app_ends_them() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    for (index, (behaviour, v2, v1)) in [
        (Behaviour::Accept, "accepted", "accepted"),
        (Behaviour::EmptyBody, "accepted", "accepted"),
        (Behaviour::WrongBody, "accepted", "accepted"),
        (Behaviour::OldPath, "accepted", "accepted"),
        (Behaviour::Nowhere, "not here", "not here"),
        (Behaviour::Fail, "org.example.Broken: database locked", "org.example.Broken: database locked"),
    ]
    .into_iter()
    .enumerate()
    {
        let app = App::start(&daemon.address(), &format!("org.example.App{index}"), behaviour);
        for (version, expected) in [(ConnectorVersion::V2, v2), (ConnectorVersion::V1, v1)] {
            let ticket = main.deliver(&app.key, &app.owner, version, message(b"\x00\xffhello"));
            let outcome = main.done(ticket);
            match &outcome {
                CallOutcome::Accepted => assert_eq!(expected, "accepted", "{behaviour:?} {version:?}"),
                CallOutcome::Refused(text) => assert!(text.contains(expected), "{behaviour:?} {version:?}: {text}"),
                other => panic!("{behaviour:?} {version:?}: {other:?}"),
            }
        }
    }
}

#[test]
fn what_the_app_gets() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let app = App::start(&daemon.address(), "org.example.App", Behaviour::Accept);
    let endpoint = ConnectorCall::NewEndpoint { token: "{t}".into(), endpoint: "https://push.example/x".into() };
    let gone = |token: &str| ConnectorCall::Unregistered { token: token.into() };
    for call in [message(b"\x00\xff"), endpoint, gone("{t}"), gone("")] {
        for version in [ConnectorVersion::V2, ConnectorVersion::V1] {
            let ticket = main.deliver(&app.key, &app.owner, version, call.clone());
            assert_eq!(main.done(ticket), CallOutcome::Accepted);
        }
    }
    let got: Vec<Message> = app.calls.iter().take(8).collect();
    let named = |member: &str, interface: &str| {
        let wanted: Vec<_> = got
            .iter()
            .filter(|call| {
                let header = call.header();
                assert!(header.primary().flags().contains(zbus::message::Flags::NO_AUTO_START));
                header.member().unwrap().as_str() == member && header.interface().unwrap().as_str() == interface
            })
            .inspect(|call| assert_eq!(call.header().path().unwrap().as_str(), CONNECTOR_PATH))
            .map(Message::body)
            .collect();
        wanted
    };
    let v2 = "org.unifiedpush.Connector2";
    let dict: HashMap<String, OwnedVariant> = named("Message", v2)[0].deserialize().unwrap();
    assert_eq!(dict["token"].to_string(), "\"{t}\"");
    assert_eq!(Vec::<u8>::try_from(dict["message"].try_clone().unwrap()).unwrap(), b"\x00\xff");
    assert_eq!(String::try_from(dict["id"].try_clone().unwrap()).unwrap(), "7");
    assert_eq!(dict.len(), 3);
    let dict: HashMap<String, OwnedVariant> = named("NewEndpoint", v2)[0].deserialize().unwrap();
    assert_eq!(String::try_from(dict["endpoint"].try_clone().unwrap()).unwrap(), "https://push.example/x");
    assert_eq!(dict.len(), 2);
    let dict: HashMap<String, OwnedVariant> = named("Unregistered", v2)[0].deserialize().unwrap();
    assert_eq!(dict.len(), 1);
    let dict: HashMap<String, OwnedVariant> = named("Unregistered", v2)[1].deserialize().unwrap();
    assert!(dict.is_empty());
    let v1 = "org.unifiedpush.Connector1";
    let message: (String, Vec<u8>, String) = named("Message", v1)[0].deserialize().unwrap();
    assert_eq!(message, ("{t}".into(), b"\x00\xff".to_vec(), "7".into()));
    let endpoint: (String, String) = named("NewEndpoint", v1)[0].deserialize().unwrap();
    assert_eq!(endpoint, ("{t}".into(), "https://push.example/x".into()));
    assert_eq!(named("Unregistered", v1)[0].deserialize::<&str>().unwrap(), "{t}");
    assert_eq!(named("Unregistered", v1)[1].deserialize::<&str>().unwrap(), "");
}

#[test]
fn an_old_path_is_remembered() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let app = App::start(&daemon.address(), "org.example.Flutter", Behaviour::OldPath);
    for _ in 0..2 {
        let ticket = main.deliver(&app.key, &app.owner, ConnectorVersion::V2, message(b"x"));
        assert_eq!(main.done(ticket), CallOutcome::Accepted);
    }
    let paths: Vec<_> = app.calls.iter().take(3).map(|call| call.header().path().unwrap().to_string()).collect();
    assert_eq!(paths, [CONNECTOR_PATH, "/", "/"]);
}

#[test]
fn a_connector_that_does_not_answer_is_not_asked_to() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let app = App::start(&daemon.address(), "org.example.Silent", Behaviour::Silent);
    for expects_reply in [true, false, false] {
        let ticket = main.deliver(&app.key, &app.owner, ConnectorVersion::V1, message(b"x"));
        assert_eq!(main.done(ticket), CallOutcome::Accepted);
        let call = app.calls.recv_timeout(Duration::from_secs(5)).unwrap();
        let flags = call.primary_header().flags();
        assert_eq!(!flags.contains(zbus::message::Flags::NO_REPLY_EXPECTED), expects_reply);
        assert!(flags.contains(zbus::message::Flags::NO_AUTO_START));
    }
}

#[test]
fn a_burst_is_delivered_in_order_and_all_of_it_ends() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let app = App::start(&daemon.address(), "org.example.App", Behaviour::Accept);
    let bodies: Vec<[u8; 4]> = (0..1000_u32).map(u32::to_be_bytes).collect();
    let tickets: Vec<_> =
        bodies.iter().map(|body| main.deliver(&app.key, &app.owner, ConnectorVersion::V2, message(body))).collect();
    for ticket in tickets {
        assert_eq!(main.done(ticket), CallOutcome::Accepted);
    }
    let got = app.calls.iter().take(1000).map(|call| {
        let body = call.body();
        let mut dict: HashMap<String, OwnedVariant> = body.deserialize().unwrap();
        Vec::<u8>::try_from(dict.remove("message").unwrap()).unwrap()
    });
    assert!(got.eq(bodies.iter().map(|body| body.to_vec())));
}

#[test]
fn replies_and_signals_of_others_are_not_believed() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let app = App::start(&daemon.address(), "org.example.App", Behaviour::Deaf);
    main.perform(Action::Watch(app.key.clone()));
    assert_eq!(main.owner(&app.key), Some(app.owner.clone()));
    main.deliver(&app.key, &app.owner, ConnectorVersion::V2, message(b"x"));
    let call = app.calls.recv_timeout(Duration::from_secs(5)).unwrap();
    let address = daemon.address();
    let forged = call.header().primary().serial_num();
    run(async move {
        let connection = connect(&address).await;
        let template = Message::method_call("/", "X").destination(DISTRIBUTOR).build(&()).unwrap();
        let reply = Message::method_return(&template.header())
            .destination("org.nightporter1")
            .reply_serial(std::num::NonZeroU32::new(forged.get()))
            .build(&())
            .unwrap();
        connection.send(&reply).await.unwrap();
        let (path, interface) = ("/org/freedesktop/DBus", "org.freedesktop.DBus");
        let body = ("org.example.App", "", "");
        let to = Some("org.nightporter1");
        connection.emit_signal(to, path, interface, "NameOwnerChanged", &body).await.unwrap();
        connection.emit_signal(to, path, interface, "NameLost", &"org.nightporter1").await.unwrap();
        // Whatever the bus let through of that was handled before this is answered.
        let ping = connection.call_method(to, "/", Some("org.freedesktop.DBus.Peer"), "Ping", &());
        ping.await.unwrap();
    })
    .join()
    .unwrap();
    let told = main.expect_within(Duration::from_millis(200), |incoming| match incoming {
        // Asked of the bus itself as the app came.
        Incoming::Event(Event::Bus(BusEvent::Startable(..))) => None,
        Incoming::Event(event) => Some(event.clone()),
        _ => None,
    });
    assert_eq!(told, None);
}

/// Tells an app that it will be frozen, as notice `number`.
fn notify(main: &Loop, app: &App, number: u64) {
    let call = ClientCall::WillSuspend { ticket: NoticeTicket(number), within: Duration::from_millis(5000) };
    main.perform(Action::CallClient { app: app.key.clone(), owner: app.owner.clone(), call });
}

/// Whether the notice ends within the time.
fn prepared(main: &mut Loop, app: &App, number: u64, limit: Duration) -> bool {
    let expected = BusEvent::Prepared(app.key.clone(), NoticeTicket(number));
    let found =
        |incoming: &Incoming| matches!(incoming, Incoming::Event(Event::Bus(e)) if *e == expected).then_some(());
    main.expect_within(limit, found).is_some()
}

#[test]
fn apps_are_told_that_they_will_be_frozen_and_that_they_were() {
    let (patience, moment) = (Duration::from_secs(10), Duration::from_millis(200));
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let good = App::start(&daemon.address(), "org.example.Good", Behaviour::Accept);
    notify(&main, &good, 1);
    assert!(prepared(&mut main, &good, 1, patience));
    let frozen = Duration::from_millis(90_001);
    let call = ClientCall::Resumed { frozen };
    main.perform(Action::CallClient { app: good.key.clone(), owner: good.owner.clone(), call });
    for (member, millis) in [("WillSuspend", 5000_u64), ("Resumed", 90_001)] {
        let call = good.calls.recv_timeout(patience).unwrap();
        let header = call.header();
        assert_eq!(header.member().unwrap().as_str(), member);
        assert_eq!(header.interface().unwrap().as_str(), "org.nightporter1.Client");
        assert_eq!(header.path().unwrap().as_str(), "/org/nightporter1/Client");
        assert_eq!(call.body().deserialize::<u64>().unwrap(), millis);
    }
    // An error is an answer, and so is the end of the app.
    let broken = App::start(&daemon.address(), "org.example.Broken", Behaviour::Fail);
    notify(&main, &broken, 2);
    assert!(prepared(&mut main, &broken, 2, patience));
    let silent = App::start(&daemon.address(), "org.example.Silent", Behaviour::Silent);
    notify(&main, &silent, 3);
    assert!(!prepared(&mut main, &silent, 3, moment));
    // Who has not answered is not waited for again, however often: the bus has room for 128 replies.
    for number in 4..300 {
        notify(&main, &silent, number);
        assert!(prepared(&mut main, &silent, number, patience), "{number}");
    }
    notify(&main, &good, 300);
    assert!(prepared(&mut main, &good, 300, patience));
    let key = silent.key.clone();
    silent.quit();
    let expected = BusEvent::Prepared(key, NoticeTicket(3));
    main.expect(|incoming| matches!(incoming, Incoming::Event(Event::Bus(e)) if *e == expected).then_some(()));
}

#[test]
fn states_come_and_go_as_bytes() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let address = daemon.address();
    let client = run(async move {
        let connection = connect(&address).await;
        let (name, path, interface) = ("org.nightporter1", "/org/nightporter1", "org.nightporter1.App");
        let state = vec![0xff_u8; STATE_MAX];
        connection.call_method(Some(name), path, Some(interface), "SaveState", &state).await.unwrap();
        let reply = connection.call_method(Some(name), path, Some(interface), "RestoreState", &()).await.unwrap();
        reply.body().deserialize::<Vec<u8>>().unwrap()
    });
    let (id, _, request) = main.call();
    assert_eq!(request, Request::SaveState(vec![0xff; STATE_MAX].into()));
    main.reply(id, Reply::Done);
    let (id, _, request) = main.call();
    assert_eq!(request, Request::RestoreState);
    main.reply(id, Reply::State([0, 1, 0xff][..].into()));
    assert_eq!(client.join().unwrap(), [0, 1, 0xff]);
}

#[test]
fn late_silent_and_vanishing_apps_delay_nobody() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let late = App::start(&daemon.address(), "org.example.Late", Behaviour::Late(4000));
    let deaf = App::start(&daemon.address(), "org.example.Deaf", Behaviour::Deaf);
    let silent = App::start(&daemon.address(), "org.example.Silent", Behaviour::Silent);
    let quick = App::start(&daemon.address(), "org.example.Quick", Behaviour::Accept);
    let late_ticket = main.deliver(&late.key, &late.owner, ConnectorVersion::V2, message(b"x"));
    let deaf_tickets = [
        main.deliver(&deaf.key, &deaf.owner, ConnectorVersion::V2, message(b"x")),
        main.deliver(&deaf.key, &deaf.owner, ConnectorVersion::V1, message(b"x")),
    ];
    // Version 1 has no acknowledgement: that the app handles the Ping behind it must do.
    let silent_v1 = main.deliver(&silent.key, &silent.owner, ConnectorVersion::V1, message(b"x"));
    assert_eq!(main.done(silent_v1), CallOutcome::Accepted);
    let silent_v2 = main.deliver(&silent.key, &silent.owner, ConnectorVersion::V2, message(b"x"));
    let ticket = main.deliver(&quick.key, &quick.owner, ConnectorVersion::V2, message(b"x"));
    assert_eq!(main.done(ticket), CallOutcome::Accepted);
    assert_eq!(main.done_within(late_ticket, Duration::from_millis(100)), None, "it was not to be answered yet");
    assert_eq!(main.done(late_ticket), CallOutcome::Accepted);
    for ticket in deaf_tickets.into_iter().chain([silent_v2]) {
        assert_eq!(main.done_within(ticket, Duration::from_millis(50)), None);
    }
    deaf.quit();
    silent.quit();
    for ticket in deaf_tickets.into_iter().chain([silent_v2]) {
        assert_eq!(main.done(ticket), CallOutcome::Vanished);
    }
    let nobody = Owner(":1.99999".into());
    for version in [ConnectorVersion::V1, ConnectorVersion::V2] {
        let ticket = main.deliver(&quick.key, &nobody, version, message(b"x"));
        assert_eq!(main.done(ticket), CallOutcome::Vanished);
    }
}

#[test]
fn a_stopped_process_delays_nobody_and_gets_it_when_it_runs_again() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let key = AppKey::new(BUS, "org.example.Stopped");
    let child = Ended(app_command(&daemon.address(), "org.example.Stopped").spawn().unwrap());
    main.perform(Action::Watch(key.clone()));
    let (owner, _) = main.process(&key);
    let quick = App::start(&daemon.address(), "org.example.Quick", Behaviour::Accept);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.0.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let stopped: Vec<DeliveryTicket> =
        (0..50).map(|_| main.deliver(&key, &owner, ConnectorVersion::V2, message(&[7; 4096]))).collect();
    for _ in 0..50 {
        let ticket = main.deliver(&quick.key, &quick.owner, ConnectorVersion::V2, message(&[7; 4096]));
        assert_eq!(main.done(ticket), CallOutcome::Accepted);
    }
    assert_eq!(main.done_within(stopped[0], Duration::from_millis(50)), None);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    for ticket in stopped {
        assert_eq!(main.done(ticket), CallOutcome::Accepted);
    }
}

#[test]
fn the_owner_is_told_at_once_and_at_each_change_in_order() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let key = AppKey::new(BUS, "org.example.App");
    main.perform(Action::Watch(key.clone()));
    assert_eq!(main.owner(&key), None);
    for _ in 0..20 {
        let app = App::start(&daemon.address(), "org.example.App", Behaviour::Accept);
        let owner = app.owner.clone();
        app.quit();
        assert_eq!(main.owner(&key), Some(owner));
        assert_eq!(main.owner(&key), None);
    }
    // While names come and go as fast as they can, the first answer and the changes fit together.
    let address = daemon.address();
    let (stop, stopped) = async_channel::bounded::<()>(1);
    let churn = run(async move {
        let connection = connect(&address).await;
        while stopped.try_recv().is_err() {
            connection.request_name("org.example.App").await.unwrap();
            connection.release_name("org.example.App").await.unwrap();
        }
    });
    for round in 0..50 {
        main.perform(Action::Watch(key.clone()));
        let mut last = main.owner(&key);
        for _ in 0..5 {
            let next = main.owner(&key);
            assert_ne!(last.is_some(), next.is_some(), "two in a row of the same kind");
            last = next;
        }
        main.perform(Action::Unwatch(key.clone()));
        // What was on its way: all of it comes before this is answered.
        let nobody = AppKey::new(BUS, format!("org.example.Nobody{round}"));
        main.perform(Action::Watch(nobody.clone()));
        assert_eq!(main.owner(&nobody), None);
        while let Some(next) = main.expect_within(Duration::ZERO, |incoming| match incoming {
            Incoming::Event(Event::Bus(BusEvent::OwnerChanged(about, owner))) if *about == key => Some(owner.clone()),
            _ => None,
        }) {
            assert_ne!(last.is_some(), next.is_some());
            last = next;
        }
    }
    stop.send_blocking(()).unwrap();
    churn.join().unwrap();
    // A unique name is watched like any other.
    let app = App::start(&daemon.address(), "org.example.Test", Behaviour::Accept);
    let unique = AppKey::new(BUS, &*app.owner.0);
    main.perform(Action::Watch(unique.clone()));
    assert_eq!(main.owner(&unique), Some(app.owner.clone()));
    app.quit();
    assert_eq!(main.owner(&unique), None);
}

#[test]
fn more_apps_than_a_connection_may_have_rules_come_and_go_as_well() {
    // The system's bus, like this one, lets a connection have 512.
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let keys: Vec<AppKey> = (0..1000).map(|n| AppKey::new(BUS, format!("org.example.Many{n}"))).collect();
    let comes_and_goes = |main: &mut Loop, key: &AppKey| {
        let app = App::start(&daemon.address(), &key.service, Behaviour::Accept);
        assert_eq!(main.owner(key), Some(app.owner.clone()), "{key}");
        app.quit();
        assert_eq!(main.owner(key), None, "{key}");
    };
    for key in &keys {
        main.perform(Action::Watch(key.clone()));
        assert_eq!(main.owner(key), None);
    }
    for n in [0, 255, 256, 511, 512, 999] {
        comes_and_goes(&mut main, &keys[n]);
    }
    // As many are watched as before, others than before; then few again.
    for key in &keys[..500] {
        main.perform(Action::Unwatch(key.clone()));
    }
    for key in &keys[..500] {
        main.perform(Action::Watch(key.clone()));
        assert_eq!(main.owner(key), None);
    }
    for n in [0, 255, 256, 499, 500, 999] {
        comes_and_goes(&mut main, &keys[n]);
    }
    for key in &keys[10..] {
        main.perform(Action::Unwatch(key.clone()));
    }
    comes_and_goes(&mut main, &keys[9]);
}

#[test]
fn the_process_is_the_right_one() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let key = AppKey::new(BUS, "org.example.Child");
    main.perform(Action::Watch(key.clone()));
    let mut child = Ended(app_command(&daemon.address(), "org.example.Child").spawn().unwrap());
    let (owner, process) = main.process(&key);
    assert_eq!(main.owner(&key), None);
    assert_eq!(main.owner(&key), Some(owner));
    assert_eq!(process.pid, child.0.id());
    assert_eq!(process.uid, nix::unistd::getuid().as_raw());
    rustix::process::pidfd_send_signal(&process.pidfd, rustix::process::Signal::KILL).unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.0.wait().unwrap()), Some(9));
    assert_eq!(main.owner(&key), None);
}

fn startable(main: &mut Loop, app: &AppKey) -> bool {
    main.expect(|incoming| match incoming {
        Incoming::Event(Event::Bus(BusEvent::Startable(about, startable))) if about == app => Some(*startable),
        _ => None,
    })
}

#[test]
fn whether_an_app_could_be_started_again_is_told_for_each_instance() {
    let daemon = Daemon::new();
    daemon.service("org.example.Listed", "Exec=/bin/false");
    let mut main = Loop::up(&daemon);
    // The bus looks for new service files when it is asked for what it does not know.
    let listed = AppKey::new(BUS, "org.example.Listed");
    main.perform(Action::Start(listed.clone()));
    assert!(matches!(started(&mut main, &listed), StartOutcome::Failed(_)));
    for (name, expected) in [("org.example.Listed", true), ("org.example.Unlisted", false)] {
        let key = AppKey::new(BUS, name);
        main.perform(Action::Watch(key.clone()));
        assert_eq!(main.owner(&key), None);
        for _ in 0..2 {
            let app = App::start(&daemon.address(), name, Behaviour::Accept);
            assert_eq!(main.owner(&key), Some(app.owner.clone()));
            assert_eq!(startable(&mut main, &key), expected, "{name}");
            app.quit();
            assert_eq!(main.owner(&key), None);
        }
    }
    let app = App::start(&daemon.address(), "org.example.Listed", Behaviour::Accept);
    let unique = AppKey::new(BUS, &*app.owner.0);
    main.perform(Action::Watch(unique.clone()));
    assert!(!startable(&mut main, &unique), "a unique name never comes again");
}

fn started(main: &mut Loop, app: &AppKey) -> StartOutcome {
    main.expect(|incoming| match incoming {
        Incoming::Event(Event::Bus(BusEvent::Started(about, outcome))) if about == app => Some(outcome.clone()),
        _ => None,
    })
}

#[test]
fn apps_are_started_by_the_bus() {
    let daemon = Daemon::new();
    let name = "org.example.Activated";
    let command = app_command(&daemon.address(), name);
    let script = format!(
        "#!/bin/sh\nNP_TEST_APP='{}|{name}' exec '{}' app_process --exact --nocapture >/dev/null\n",
        daemon.address(),
        command.get_program().display()
    );
    std::fs::write(daemon.path("app.sh"), script).unwrap();
    daemon.service(name, &format!("Exec=/bin/sh {}", daemon.path("app.sh").display()));
    daemon.service("org.example.Broken", "Exec=/bin/false");
    let mut main = Loop::up(&daemon);
    let key = AppKey::new(BUS, name);
    main.perform(Action::Watch(key.clone()));
    assert_eq!(main.owner(&key), None);
    main.perform(Action::Start(key.clone()));
    main.perform(Action::Start(key.clone()));
    assert_eq!(started(&mut main, &key), StartOutcome::Started);
    let (owner, process) = main.process(&key);
    let ticket = main.deliver(&key, &owner, ConnectorVersion::V2, message(b"hello"));
    assert_eq!(main.done(ticket), CallOutcome::Accepted);
    let again = main.expect_within(Duration::from_millis(100), |incoming| {
        matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Started(..)))).then_some(())
    });
    assert_eq!(again, None, "one start at a time, told once");
    rustix::process::pidfd_send_signal(&process.pidfd, rustix::process::Signal::KILL).unwrap();

    for (name, expected) in [("org.example.Unknown", true), (":1.77", true), ("org.example.Broken", false)] {
        let key = AppKey::new(BUS, name);
        main.perform(Action::Start(key.clone()));
        let outcome = started(&mut main, &key);
        assert_eq!(outcome == StartOutcome::NotActivatable, expected, "{name}: {outcome:?}");
        assert_ne!(outcome, StartOutcome::Started);
    }
}

#[test]
fn apps_are_started_by_systemd() {
    // The service files are found by the environment, which a test may not change in its own process.
    if std::env::var_os("NP_TEST_SYSTEMD").is_some() {
        return started_by_systemd();
    }
    let data = tempfile::tempdir().unwrap();
    let services = data.path().join("dbus-1/services");
    std::fs::create_dir_all(&services).unwrap();
    for (name, lines) in [
        ("org.example.Plain-App", "Exec=/usr/bin/app --gapplication-service 'a b' $HOME"),
        ("org.example.Unit", "Exec=/bin/false\nSystemdService=app-unit.service"),
        ("org.example.Fails", "Exec=/usr/bin/fails"),
        ("org.example.Frozen", "Exec=/bin/false\nSystemdService=Frozen.service"),
        ("org.example.Taken", "Exec=/usr/bin/taken"),
        ("org.example.Denied", "Exec=/bin/false\nSystemdService=Denied.service"),
        ("org.example.Unanswered", "Exec=/bin/false\nSystemdService=Unanswered.service"),
    ] {
        std::fs::write(services.join(format!("{name}.service")), format!("[D-BUS Service]\nName={name}\n{lines}\n"))
            .unwrap();
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["apps_are_started_by_systemd", "--exact", "--nocapture"])
        .env("NP_TEST_SYSTEMD", "1")
        .env("XDG_DATA_HOME", data.path())
        .status()
        .unwrap();
    assert!(status.success());
}

/// Against a systemd manager of our own making, which records what it is asked.
fn started_by_systemd() {
    let daemon = Daemon::new();
    let uid = nix::unistd::getuid().as_raw();
    let bus = Bus::Session(uid);
    let mut main = Loop::on(vec![BusAddress { bus, address: Some(daemon.address()) }]);
    main.expect(|incoming| matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(_)))).then_some(()));
    let systemd = App::start(&daemon.address(), "org.example.systemd", Behaviour::Deaf);
    systemd.quit();
    let (address, (asked, asks)) = (daemon.address(), std::sync::mpsc::channel());
    let (ready, is_ready) = std::sync::mpsc::channel();
    let _manager = run(async move { be_systemd(&address, &ready, &asked).await });
    is_ready.recv_timeout(Duration::from_secs(10)).unwrap();

    // Waited for at the end, and nobody else waits for it.
    main.perform(Action::Start(AppKey::new(bus, "org.example.Unanswered")));
    asks.recv_timeout(Duration::from_secs(5)).unwrap();

    let key = AppKey::new(bus, "org.example.Plain-App");
    main.perform(Action::Start(key.clone()));
    assert_eq!(started(&mut main, &key), StartOutcome::Started);
    let call: Message = asks.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(call.header().member().unwrap().as_str(), "StartTransientUnit");
    let body = call.body();
    assert_eq!(body.signature().to_string_no_parens(), "ssa(sv)a(sa(sv))");
    type Properties = Vec<(String, OwnedVariant)>;
    type Arguments = (String, String, Properties, Vec<(String, Properties)>);
    let (unit, mode, properties, none): Arguments = body.deserialize().unwrap();
    assert!(unit.starts_with("app-nightporter-org.example.Plain\\x2dApp@") && unit.ends_with(".service"), "{unit}");
    assert_eq!((mode.as_str(), none.len()), ("fail", 0));
    let properties: HashMap<_, _> = properties.into_iter().collect();
    let text = |key: &str| String::try_from(properties[key].try_clone().unwrap()).unwrap();
    assert_eq!(text("Slice"), "app.slice");
    assert_eq!(text("Type"), "dbus");
    assert_eq!(text("BusName"), "org.example.Plain-App");
    assert_eq!(text("CollectMode"), "inactive-or-failed");
    let exec = &properties["ExecStart"];
    assert_eq!(exec.value_signature().to_string(), "a(sasb)");
    let shown = exec.to_string();
    assert!(shown.contains("[\"/usr/bin/app\", \"--gapplication-service\", \"a b\", \"$$HOME\"]"), "{shown}");
    // The rest is as in the user's manager.
    let environment = Vec::<String>::try_from(properties["Environment"].try_clone().unwrap()).unwrap();
    let starter = format!("DBUS_STARTER_ADDRESS={}", daemon.address());
    assert_eq!(environment, [starter.as_str(), "DBUS_STARTER_BUS_TYPE=session"]);
    assert_eq!(properties.len(), 7, "{:?}", properties.keys());

    let key = AppKey::new(bus, "org.example.Unit");
    main.perform(Action::Start(key.clone()));
    assert_eq!(started(&mut main, &key), StartOutcome::Started);
    let call = asks.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(call.header().member().unwrap().as_str(), "StartUnit");
    assert_eq!(call.body().deserialize::<(String, String)>().unwrap(), ("app-unit.service".into(), "replace".into()));

    main.perform(Action::Start(AppKey::new(bus, "org.example.Fails")));
    let failure = |main: &mut Loop, name: &str| {
        let StartOutcome::Failed(text) = started(main, &AppKey::new(bus, name)) else { panic!("{name} did not fail") };
        text
    };
    let text = failure(&mut main, "org.example.Fails");
    assert!(text.contains("failed (start-limit-hit); see systemctl --user status app-nightporter-"), "{text}");

    main.perform(Action::Start(AppKey::new(bus, "org.example.Frozen")));
    let text = failure(&mut main, "org.example.Frozen");
    assert!(text.contains("systemctl --user thaw Frozen.service"), "{text}");

    let key = AppKey::new(bus, "org.example.Taken");
    main.perform(Action::Start(key.clone()));
    assert_eq!(started(&mut main, &key), StartOutcome::Started);
    let units: Vec<String> = asks.try_iter().map(|call| first_argument(&call)).collect();
    let [.., first, second] = &units[..] else { panic!("{units:?}") };
    assert!(first != second && first.contains("Taken") && second.contains("Taken"), "{units:?}");

    // The bus may what we may not; here it has no service file, though.
    main.perform(Action::Start(AppKey::new(bus, "org.example.Denied")));
    assert_eq!(started(&mut main, &AppKey::new(bus, "org.example.Denied")), StartOutcome::NotActivatable);

    let unanswered = main.expect_within(Duration::from_secs(40), |incoming| match incoming {
        Incoming::Event(Event::Bus(BusEvent::Started(_, StartOutcome::Failed(text)))) => Some(text.clone()),
        _ => None,
    });
    assert!(unanswered.is_some_and(|text| text.contains("does not answer")));
}

fn first_argument(call: &Message) -> String {
    type Properties = Vec<(String, OwnedVariant)>;
    let body = call.body();
    let two = body.deserialize::<(String, String)>().map(|(unit, _)| unit);
    let all = || body.deserialize::<(String, String, Properties, Vec<(String, Properties)>)>().map(|all| all.0);
    two.or_else(|_| body.deserialize::<String>()).or_else(|_| all()).unwrap()
}

async fn be_systemd(address: &str, ready: &std::sync::mpsc::Sender<()>, asked: &std::sync::mpsc::Sender<Message>) {
    use futures_core::Stream;
    let connection = connect(address).await;
    let mut stream = zbus::MessageStream::from(&connection);
    connection.request_name("org.freedesktop.systemd1").await.unwrap();
    ready.send(()).unwrap();
    let mut taken = false;
    while let Some(Ok(call)) = std::future::poll_fn(|context| std::pin::Pin::new(&mut stream).poll_next(context)).await
    {
        if call.message_type() != zbus::message::Type::MethodCall {
            continue;
        }
        let header = call.header();
        let unit = first_argument(&call);
        match header.member().unwrap().as_str() {
            "GetUnit" => {
                let path = zbus::ObjectPath::try_from("/org/freedesktop/systemd1/unit/x").unwrap();
                connection.reply(&header, &path).await.unwrap();
                continue;
            }
            "Get" => {
                connection.reply(&header, &Variant::from("start-limit-hit")).await.unwrap();
                continue;
            }
            _ => {}
        }
        let refusal = match &*unit {
            "Denied.service" => Some("org.freedesktop.DBus.Error.AccessDenied"),
            "Unanswered.service" => {
                let _ = asked.send(call);
                continue;
            }
            unit if unit.contains("Taken") && !std::mem::replace(&mut taken, true) => {
                Some("org.freedesktop.systemd1.UnitExists")
            }
            _ => None,
        };
        if let Some(refusal) = refusal {
            connection.reply_error(&header, refusal, &"no").await.unwrap();
            let _ = asked.send(call);
            continue;
        }
        let job = zbus::ObjectPath::try_from("/org/freedesktop/systemd1/job/17").unwrap();
        connection.reply(&header, &job).await.unwrap();
        let result = match &*unit {
            "Frozen.service" => "frozen",
            unit if unit.contains("Fails") => "failed",
            _ => "done",
        };
        for (path, unit, result) in [("/other/job", "other.service", "failed"), (job.as_str(), unit.as_str(), result)] {
            let path = zbus::ObjectPath::try_from(path).unwrap();
            let manager = "org.freedesktop.systemd1.Manager";
            let body = (17_u32, path, unit, result);
            connection
                .emit_signal(None::<&str>, "/org/freedesktop/systemd1", manager, "JobRemoved", &body)
                .await
                .unwrap();
        }
        let _ = asked.send(call);
    }
}

fn down(main: &mut Loop) -> String {
    main.expect(|incoming| match incoming {
        Incoming::Event(Event::Bus(BusEvent::Down(BUS, text))) => Some(text.clone()),
        _ => None,
    })
}

fn up(main: &mut Loop) {
    main.expect(|incoming| matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(BUS)))).then_some(()));
}

#[test]
fn a_bus_that_goes_away_comes_back() {
    let mut daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let app = App::start(&daemon.address(), "org.example.App", Behaviour::Deaf);
    main.perform(Action::Watch(app.key.clone()));
    assert_eq!(main.owner(&app.key), Some(app.owner.clone()));
    let ticket = main.deliver(&app.key, &app.owner, ConnectorVersion::V2, message(b"x"));
    app.calls.recv_timeout(Duration::from_secs(5)).unwrap();
    daemon.stop();
    assert!(down(&mut main).contains("connection"));
    assert_eq!(main.done(ticket), CallOutcome::Vanished);
    // With no bus nobody is there and nothing can be done, and that is said at once.
    let other = AppKey::new(BUS, "org.example.Other");
    main.perform(Action::Watch(other.clone()));
    assert_eq!(main.owner(&other), None);
    let ticket = main.deliver(&app.key, &app.owner, ConnectorVersion::V2, message(b"x"));
    assert!(matches!(main.done(ticket), CallOutcome::NotSent(_)));
    main.perform(Action::Start(other.clone()));
    assert!(matches!(started(&mut main, &other), StartOutcome::Failed(_)));
    let key = app.key.clone();
    app.quit();
    daemon.start();
    up(&mut main);
    assert_eq!(main.owner(&key), None);
    assert_eq!(main.owner(&other), None);
    let app = App::start(&daemon.address(), "org.example.App", Behaviour::Accept);
    assert_eq!(main.owner(&key), Some(app.owner.clone()));
    let ticket = main.deliver(&key, &app.owner, ConnectorVersion::V2, message(b"x"));
    assert_eq!(main.done(ticket), CallOutcome::Accepted);
}

#[test]
fn a_name_that_is_taken_is_waited_for() {
    let daemon = Daemon::new();
    let other = App::start(&daemon.address(), "org.nightporter1", Behaviour::Deaf);
    let mut main = Loop::on(vec![BusAddress { bus: BUS, address: Some(daemon.address()) }]);
    let text = down(&mut main);
    assert!(text.contains("org.nightporter1") && text.contains(&std::process::id().to_string()), "{text}");
    // The other name is ours already; who calls it is told why nothing is done.
    let refused = call_once(&daemon, DISTRIBUTOR_PATH, V1, "Register", (":1.1", "t", "")).join().unwrap();
    assert!(error_of(refused).1.contains("org.nightporter1"));
    other.quit();
    up(&mut main);
    let client = call_once(&daemon, "/org/nightporter1", "org.nightporter1.Manager", "Apps", ());
    let (call, ..) = main.call();
    main.reply(call, Reply::Json("[]".into()));
    client.join().unwrap().unwrap();
}

#[test]
fn no_bus_at_all_is_said_and_a_stop_is_quick() {
    let mut main = Loop::on(vec![
        BusAddress { bus: BUS, address: Some("unix:path=/nonexistent/bus".into()) },
        BusAddress { bus: Bus::System, address: Some("nonsense".into()) },
    ]);
    assert!(down(&mut main).contains("cannot connect"));
    // An app of a user who is not logged in.
    let stranger = AppKey::new(Bus::Session(1), "org.example.App");
    main.perform(Action::Watch(stranger.clone()));
    assert_eq!(main.owner(&stranger), None);
    main.perform(Action::Start(stranger.clone()));
    assert!(matches!(started(&mut main, &stranger), StartOutcome::Failed(_)));
    let begun = Instant::now();
    main.bus.take().unwrap().stop();
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[test]
fn what_was_asked_before_the_stop_is_done() {
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    let app = App::start(&daemon.address(), "org.example.App", Behaviour::Accept);
    let client = call_once(&daemon, DISTRIBUTOR_PATH, V1, "Register", (":1.1", "t", ""));
    let (call, ..) = main.call();
    main.reply(call, Reply::Registered);
    main.deliver(&app.key, &app.owner, ConnectorVersion::V2, message(b"last"));
    main.bus.take().unwrap().stop();
    client.join().unwrap().unwrap();
    let last = app.calls.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(last.header().member().unwrap().as_str(), "Message");
}

#[test]
fn an_idle_bus_thread_sleeps() {
    // Every bus thread of this test program has the same name, so this runs in a process of its own.
    if std::env::var_os("NP_TEST_IDLE").is_none() {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["an_idle_bus_thread_sleeps", "--exact", "--nocapture"])
            .env("NP_TEST_IDLE", "1")
            .status()
            .unwrap();
        return assert!(status.success());
    }
    let daemon = Daemon::new();
    let mut main = Loop::up(&daemon);
    for n in 0..20 {
        let key = AppKey::new(BUS, format!("org.example.App{n}"));
        main.perform(Action::Watch(key.clone()));
        assert_eq!(main.owner(&key), None);
    }
    std::thread::sleep(Duration::from_millis(300));
    let before = switches();
    // Programs come and go on the bus, and nobody asked about them.
    for n in 0..10 {
        App::start(&daemon.address(), &format!("org.other.App{n}"), Behaviour::Accept).quit();
    }
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(switches() - before, 0, "the bus thread woke up");
}

/// Voluntary context switches of the thread "bus" of this process.
fn switches() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let statuses = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default());
    let bus: Vec<String> = statuses.filter(|status| status.starts_with("Name:\tbus\n")).collect();
    assert_eq!(bus.len(), 1);
    let line = bus[0].lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}
