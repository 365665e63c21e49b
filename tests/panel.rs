//! KDE's settings panel against the bus thread, on a real dbus-daemon. The calls and what is expected of them are those of
//! kunifiedpush's own panel (src/kcm/kcmpushnotifications.cpp, clientmodel.cpp, ui/main.qml), played by zbus: the panel
//! itself needs Plasma and is not run here.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

#[expect(dead_code, reason = "made for the tests of the bus; shared")]
#[path = "bus/support.rs"]
mod bus;
#[path = "panel/support.rs"]
mod support;

use std::{collections::BTreeMap, time::Duration};

use bus::{App, BUS, Behaviour, Daemon, Loop, call_once, connect, error_of, run};
use nightporter::{
    action::{Action, ErrorKind, Reply},
    config::{Credentials, SecretSource, UpstreamKind, UpstreamSettings},
    event::{BusEvent, Event, PanelRequest, Request},
    model::{Bus, ConnectorVersion, Secret},
    sys::{bus::BusAddress, inbox::Incoming},
};
use support::*;
use zbus::Variant;

#[test]
fn the_name_and_the_object_are_there_when_the_configuration_says_so() {
    let daemon = Daemon::new();
    let main = up(&daemon);
    let client = Client::new(&daemon);
    assert!(owned_soon(&client, KDE));
    assert_eq!(client.owner(KDE), client.owner(bus::DISTRIBUTOR));
    assert!(client.introspect("/").contains("<node name=\"Management\"/>"));
    drop(main);
    assert!(gone_soon(&client, bus::DISTRIBUTOR));

    let _main = Loop::up(&daemon);
    assert!(owned_soon(&client, bus::DISTRIBUTOR));
    assert_eq!(client.owner(KDE), None);
    let missing = call_once(&daemon, "/Management", MANAGEMENT, "status", ()).join().unwrap();
    assert_eq!(error_of(missing).0, "org.freedesktop.DBus.Error.UnknownObject");
    let root = call_once(&daemon, "/", "org.freedesktop.DBus.Introspectable", "Introspect", ()).join().unwrap();
    assert!(!root.unwrap().body().deserialize::<String>().unwrap().contains("Management"));
}

#[test]
fn a_system_bus_has_no_panel() {
    let daemon = Daemon::new();
    let mut main = Loop::with(vec![BusAddress { bus: Bus::System, address: Some(daemon.address()) }], true);
    main.expect(|incoming| matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Up(_)))).then_some(()));
    let missing = call_once(&daemon, "/Management", MANAGEMENT, "status", ()).join().unwrap();
    assert_eq!(error_of(missing).0, "org.freedesktop.DBus.Error.UnknownObject");
    assert_eq!(Client::new(&daemon).owner(KDE), None);
}

#[test]
fn kdes_own_distributor_keeps_its_name_and_leaves_it_to_us_when_it_ends() {
    let daemon = Daemon::new();
    let theirs = App::start(&daemon.address(), KDE, Behaviour::Accept);
    let mut main = up(&daemon);
    let client = Client::new(&daemon);
    // Asked after the panel's name was: all of it has been answered by now.
    let status = client.call_to(bus::DISTRIBUTOR, "status", ());
    main.answer(state());
    assert_eq!(status.join().unwrap().unwrap().body().deserialize::<i32>().unwrap(), 2);
    assert_eq!(client.owner(KDE).as_deref(), Some(&*theirs.owner.0));
    let ours = client.owner(bus::DISTRIBUTOR);
    assert_eq!(client.in_line(KDE), [&*theirs.owner.0]);
    theirs.quit();
    assert!(owned_soon(&client, KDE));
    assert_eq!(client.owner(KDE), ours);
    // It comes back: then it is told that the name is taken, as by an instance of its own.
    assert_eq!(client.request_name(KDE, 4), 3);
}

#[test]
fn a_name_that_is_not_served_is_not_asked_for() {
    let daemon = Daemon::new();
    let other = App::start(&daemon.address(), "org.nightporter1", Behaviour::Deaf);
    let mut main = Loop::with(vec![BusAddress { bus: BUS, address: Some(daemon.address()) }], true);
    main.expect(|incoming| matches!(incoming, Incoming::Event(Event::Bus(BusEvent::Down(..)))).then_some(()));
    let client = Client::new(&daemon);
    assert_eq!(client.owner(KDE), None, "apps would prefer a distributor that refuses them");
    other.quit();
    assert!(owned_soon(&client, KDE));
}

#[test]
fn introspection_is_that_of_kdes_interface() {
    let daemon = Daemon::new();
    let _main = up(&daemon);
    let client = Client::new(&daemon);
    assert!(owned_soon(&client, KDE));
    let xml = client.introspect("/Management");
    let (_, interface) = xml.split_once("<interface name=\"org.kde.kunifiedpush.Management\">").unwrap();
    let (interface, _) = interface.split_once("</interface>").unwrap();
    // From src/interfaces/org.kde.kunifiedpush.distributor.Management.xml: member, in, out, without reply.
    let expected: BTreeMap<&str, (&str, &str, bool)> = [
        ("status", ("", "i", false)),
        ("errorMessage", ("", "s", false)),
        ("pushProviderId", ("", "s", false)),
        ("pushProviderConfiguration", ("s", "a{sv}", false)),
        ("setPushProvider", ("sa{sv}", "", true)),
        ("registeredClients", ("", "a(sss)", false)),
        ("forceUnregisterClient", ("s", "", true)),
    ]
    .into();
    let mut found = BTreeMap::new();
    for method in interface.split("<method name=\"").skip(1) {
        let (name, rest) = method.split_once('"').unwrap();
        let body = rest.split("</method>").next().unwrap();
        let of = |direction: &str| {
            let args = body.split("<arg ").skip(1).filter(|arg| arg.contains(&format!("direction=\"{direction}\"")));
            let types = args.map(|arg| arg.split_once("type=\"").unwrap().1.split('"').next().unwrap());
            types.collect::<String>()
        };
        found.insert(name, (of("in"), of("out"), body.contains("org.freedesktop.DBus.Method.NoReply")));
    }
    let expected: BTreeMap<_, _> =
        expected.into_iter().map(|(name, (args, result, no))| (name, (args.into(), result.into(), no))).collect();
    assert_eq!(found, expected);
    let signals: Vec<&str> =
        interface.split("<signal name=\"").skip(1).map(|signal| signal.split('"').next().unwrap()).collect();
    assert_eq!(signals, SIGNALS);
    // libKUnifiedPush looks for this text under the name it prefers.
    assert!(client.introspect("/org/unifiedpush/Distributor").contains("org.unifiedpush.Distributor2"));
}

#[test]
fn apps_register_under_kdes_name() {
    let daemon = Daemon::new();
    let mut main = up(&daemon);
    let client = Client::new(&daemon);
    assert!(owned_soon(&client, KDE));
    let address = daemon.address();
    let app = run(async move {
        let connection = connect(&address).await;
        let unique = connection.unique_name().unwrap().to_string();
        let arguments = (unique.as_str(), "{t}", "Self test");
        let interface = Some("org.unifiedpush.Distributor1");
        let reply = connection.call_method(Some(KDE), bus::DISTRIBUTOR_PATH, interface, "Register", &arguments).await;
        (unique, reply.unwrap().body().deserialize::<(String, String)>().unwrap())
    });
    let (call, caller, request) = main.call();
    main.reply(call, Reply::Registered);
    let (unique, result) = app.join().unwrap();
    assert!(caller.owns_service);
    assert_eq!(result, ("REGISTRATION_SUCCEEDED".into(), String::new()));
    let expected = Request::Register {
        service: unique.into(),
        token: "{t}".into(),
        description: "Self test".into(),
        vapid: None,
        version: ConnectorVersion::V1,
        upstream: None,
        notify: None,
    };
    assert_eq!(request, expected);
}

#[test]
fn what_the_panel_reads() {
    let daemon = Daemon::new();
    let mut main = up(&daemon);
    let client = Client::new(&daemon);
    assert!(owned_soon(&client, KDE));
    assert_eq!(client.ask::<i32>(&mut main, "status", (), state()), 2);
    assert_eq!(client.ask::<String>(&mut main, "errorMessage", (), state()), "no route");
    assert_eq!(client.ask::<String>(&mut main, "pushProviderId", (), state()), "Ntfy");
    let clients: Vec<(String, String, String)> = client.ask(&mut main, "registeredClients", (), state());
    assert_eq!(clients, [("{t}".into(), "org.kde.neochat".into(), "Messages".into())]);
    let none = nightporter::action::PanelState { clients: Vec::new(), ..state() };
    assert!(client.ask::<Vec<(String, String, String)>>(&mut main, "registeredClients", (), none).is_empty());
}

#[test]
fn each_kind_of_provider_has_kdes_name_and_keys() {
    let daemon = Daemon::new();
    let mut main = up(&daemon);
    let client = Client::new(&daemon);
    assert!(owned_soon(&client, KDE));
    for (id, settings, config) in providers() {
        assert_eq!(client.ask::<String>(&mut main, "pushProviderId", (), of(settings.clone())), id);
        assert_eq!(client.config(&mut main, id, settings.clone()), texts(&config), "{id}");
        // The panel takes what it read, puts the fields' contents in and sends all of it.
        let mut sent = config;
        sent.push(("DeviceId", "0123"));
        let set = client.call("setPushProvider", (id, dict(&sent)));
        let (call, caller, request) = main.call();
        assert_eq!(request, Request::Panel(PanelRequest::SetProvider(Box::new(settings))));
        assert_eq!((caller.uid, caller.sandboxed), (nix::unistd::getuid().as_raw(), false));
        main.reply(call, Reply::Done);
        assert!(set.join().unwrap().unwrap().body().is_empty());
    }
    // Of the others there is nothing, and nobody need be asked about what KDE's panel asks when none is selected.
    let other =
        client.config(&mut main, "Gotify", UpstreamSettings::new("kde", UpstreamKind::Ntfy, "https://n.example/"));
    assert!(other.is_empty());
    for unknown in ["", "Mqtt", "ntfy"] {
        let empty = client.call("pushProviderConfiguration", unknown).join().unwrap().unwrap();
        assert!(read_dict(&empty).is_empty());
    }
    assert!(main.no_call());
    // What the panel has no form for.
    let broker = UpstreamSettings::new("broker", UpstreamKind::Mqtt, "mqtts://b.example:8883/");
    assert_eq!(client.ask::<String>(&mut main, "pushProviderId", (), of(broker)), "");
}

#[test]
fn a_login_in_a_file_stays_there() {
    let daemon = Daemon::new();
    let mut main = up(&daemon);
    let client = Client::new(&daemon);
    assert!(owned_soon(&client, KDE));
    let file = || SecretSource::File("/etc/nightporter/secret".into());
    let password = || Credentials::Password { username: "phone".into(), password: file() };
    let url = ("Url", "https://a.example/");
    for (kind, credentials, config) in [
        (UpstreamKind::Ntfy, password(), vec![url]),
        (UpstreamKind::Ntfy, Credentials::TokenFile(SecretSource::Credential("ntfy".into())), vec![url]),
        (UpstreamKind::Gotify, Credentials::TokenFile(file()), vec![url, ("ClientToken", "")]),
        (UpstreamKind::NextPush, password(), vec![url, ("Username", ""), ("AppPassword", "")]),
        (UpstreamKind::Autopush, password(), vec![url]),
    ] {
        let settings = UpstreamSettings { credentials, ..UpstreamSettings::new("home", kind, "wss://a.example/") };
        assert_eq!(client.config(&mut main, id_of(kind), settings), texts(&config), "{kind:?}");
    }
}

#[test]
fn addresses_are_taken_as_people_type_them() {
    let daemon = Daemon::new();
    let mut main = up(&daemon);
    let client = Client::new(&daemon);
    assert!(owned_soon(&client, KDE));
    for (typed, url) in [
        ("https://ntfy.example", "https://ntfy.example/"),
        ("ntfy.example", "https://ntfy.example/"),
        (" ntfy.example:8080/sub \n", "https://ntfy.example:8080/sub/"),
        ("http://[::1]:8080/", "http://[::1]:8080/"),
    ] {
        let set = client.call("setPushProvider", ("Ntfy", dict(&[("Url", typed)])));
        let (call, _, request) = main.call();
        let expected = UpstreamSettings::new("kde", UpstreamKind::Ntfy, url);
        assert_eq!(request, Request::Panel(PanelRequest::SetProvider(Box::new(expected))), "{typed:?}");
        main.reply(call, Reply::Done);
        set.join().unwrap().unwrap();
    }
}

#[test]
fn a_configuration_that_cannot_be_used_is_refused_and_the_one_who_sent_it_sees_why() {
    let daemon = Daemon::new();
    let mut main = up(&daemon);
    let (client, other) = (Client::new(&daemon), Client::new(&daemon));
    assert!(owned_soon(&client, KDE));
    let url = ("Url", "https://a.example");
    let long = format!("https://a.example/{}", "x".repeat(500));
    let secret = "s".repeat(1025);
    for (id, config, about) in [
        ("Mqtt", vec![url], "provider"),
        ("", vec![url], "provider"),
        ("Ntfy", vec![], "Url"),
        ("Ntfy", vec![("Url", "")], "Url"),
        ("Ntfy", vec![("Url", "ftp://a.example")], "https://"),
        ("Ntfy", vec![("Url", "https://")], "Url"),
        ("Ntfy", vec![("Url", "two words")], "Url"),
        ("Ntfy", vec![("Url", "https://u:p@a.example")], "password"),
        ("Ntfy", vec![("Url", "https://a.example/?x=1")], "query"),
        ("Ntfy", vec![("Url", &long)], "500"),
        ("Ntfy", vec![url, ("AuthMethod", "Digest")], "AuthMethod"),
        ("Ntfy", vec![url, ("AuthMethod", "Basic"), ("Secret", "s")], "Username"),
        ("Ntfy", vec![url, ("AuthMethod", "Bearer")], "Secret"),
        ("Ntfy", vec![url, ("AuthMethod", "Bearer"), ("Secret", "a\r\nX-Evil: 1")], "control"),
        ("Gotify", vec![url], "ClientToken"),
        ("Gotify", vec![url, ("ClientToken", &secret)], "1024"),
        ("NextPush", vec![url, ("Username", "u"), ("AppPassword", "")], "AppPassword"),
    ] {
        let refused = client.call("setPushProvider", (id, dict(&config))).join().unwrap();
        let (name, text) = error_of(refused);
        assert_eq!(name, "org.freedesktop.DBus.Error.InvalidArgs", "{id} {config:?}");
        assert!(text.contains(about), "{id} {config:?}: {text}");
        assert_eq!(client.ask::<i32>(&mut main, "status", (), state()), 5);
        assert_eq!(client.ask::<String>(&mut main, "errorMessage", (), state()), text);
    }
    let number = std::collections::HashMap::from([("Url", Variant::from(7_u32))]);
    assert!(error_of(client.call("setPushProvider", ("Ntfy", number)).join().unwrap()).1.contains("Url"));
    assert!(main.no_call());
    // Nobody else is concerned; what is in force is in force.
    assert_eq!(other.ask::<i32>(&mut main, "status", (), state()), 2);
    assert_eq!(other.ask::<String>(&mut main, "errorMessage", (), state()), "no route");
    assert_eq!(client.ask::<String>(&mut main, "pushProviderId", (), state()), "Ntfy");
    // What the core refuses is told in the same way, and what it takes ends it.
    let set = client.call("setPushProvider", ("Ntfy", dict(&[url])));
    let (call, ..) = main.call();
    main.reply(call, Reply::Error(ErrorKind::Refused, "not on this phone".into()));
    assert_eq!(error_of(set.join().unwrap()), ("org.nightporter1.Error.Refused".into(), "not on this phone".into()));
    assert_eq!(client.ask::<String>(&mut main, "errorMessage", (), state()), "not on this phone");
    let set = client.call("setPushProvider", ("Ntfy", dict(&[url])));
    let (call, ..) = main.call();
    main.reply(call, Reply::Done);
    set.join().unwrap().unwrap();
    assert_eq!(client.ask::<i32>(&mut main, "status", (), state()), 2);
}

#[test]
fn the_panel_does_not_wait_for_replies_and_gets_none() {
    let daemon = Daemon::new();
    let mut main = up(&daemon);
    let client = Client::new(&daemon);
    assert!(owned_soon(&client, KDE));
    // Sent as QtDBus sends what is marked so: first what is refused, then what is taken, then what is forgotten.
    let replies = client.without_reply(|wire| {
        wire.send("setPushProvider", &("Ntfy", dict(&[("Url", "")])));
        wire.send("setPushProvider", &("Ntfy", dict(&[("Url", "https://a.example")])));
        wire.send("forceUnregisterClient", &"{t}");
        wire.send("forceUnregisterClient", &"");
        for _ in 0..2 {
            let (call, ..) = main.call();
            main.reply(call, Reply::Done);
        }
    });
    // Of the refusal, and of its end.
    assert_eq!(replies.signals, [SIGNALS, SIGNALS].concat());
    assert_eq!(replies.replies, 0);
    assert!(main.no_call());
}

#[test]
fn an_app_is_unregistered_by_its_token() {
    let daemon = Daemon::new();
    let mut main = up(&daemon);
    let client = Client::new(&daemon);
    assert!(owned_soon(&client, KDE));
    let gone = client.call("forceUnregisterClient", "{3f2504e0-4f89-11d3-9a0c-0305e82c3301}");
    let (call, _, request) = main.call();
    let token = "{3f2504e0-4f89-11d3-9a0c-0305e82c3301}".into();
    assert_eq!(request, Request::Panel(PanelRequest::ForceUnregister(token)));
    main.reply(call, Reply::Done);
    assert!(gone.join().unwrap().unwrap().body().is_empty());
    let refused = client.call("registeredClients", ());
    let (call, _, request) = main.call();
    assert_eq!(request, Request::Panel(PanelRequest::State));
    main.reply(call, Reply::Error(ErrorKind::NotAuthorized, "not yours".into()));
    assert_eq!(error_of(refused.join().unwrap()).0, "org.nightporter1.Error.NotAuthorized");
}

#[test]
fn wrong_arguments_are_refused_and_the_loop_never_hears_of_them() {
    let daemon = Daemon::new();
    let mut main = up(&daemon);
    let client = Client::new(&daemon);
    assert!(owned_soon(&client, KDE));
    for member in ["status", "errorMessage", "pushProviderId", "registeredClients"] {
        let (name, _) = error_of(client.call(member, "x").join().unwrap());
        assert_eq!(name, "org.freedesktop.DBus.Error.InvalidArgs", "{member}");
    }
    for wrong in [
        client.call("pushProviderConfiguration", ()),
        client.call("pushProviderConfiguration", 7_u32),
        client.call("setPushProvider", "Ntfy"),
        client.call("setPushProvider", ("Ntfy", std::collections::HashMap::from([("Url", "https://a.example")]))),
        client.call("forceUnregisterClient", ()),
        client.call("forceUnregisterClient", ""),
        client.call("forceUnregisterClient", "x".repeat(101)),
        client.call("forceUnregisterClient", ("{t}", "{t}")),
    ] {
        assert_eq!(error_of(wrong.join().unwrap()).0, "org.freedesktop.DBus.Error.InvalidArgs");
    }
    let (name, _) =
        error_of(client.call("setPushProvider", ("Ntfy", dict(&[("Url", &"x".repeat(70_000))]))).join().unwrap());
    assert_eq!(name, "org.freedesktop.DBus.Error.LimitsExceeded");
    let (name, _) = error_of(client.call("quit", ()).join().unwrap());
    assert_eq!(name, "org.freedesktop.DBus.Error.UnknownMethod");
    assert!(main.no_call());
}

#[test]
fn what_has_changed_is_told_and_only_under_the_name_the_panel_listens_to() {
    let daemon = Daemon::new();
    let theirs = App::start(&daemon.address(), KDE, Behaviour::Accept);
    let mut main = up(&daemon);
    let client = Client::new(&daemon);
    let heard = client.listen();
    main.perform(Action::PanelChanged(BUS));
    // Behind it on the same way: by its answer a signal would have been sent.
    let status = client.call_to(bus::DISTRIBUTOR, "status", ());
    main.answer(state());
    status.join().unwrap().unwrap();
    assert!(heard.recv_timeout(Duration::from_millis(150)).is_err(), "told under a name that is another's");
    theirs.quit();
    assert!(owned_soon(&client, KDE));
    main.perform(Action::PanelChanged(Bus::System));
    main.perform(Action::PanelChanged(BUS));
    let ours = client.owner(KDE).unwrap();
    for expected in SIGNALS {
        let signal = heard.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(signal, (ours.clone(), expected.to_owned(), String::new()));
    }
    // Many changes at once are fewer signals. How many is the scheduler's choice, so there are several tries.
    let fewer = (0..5).any(|_| {
        for _ in 0..100 {
            main.perform(Action::PanelChanged(BUS));
        }
        let status = client.call("status", ());
        main.answer(state());
        status.join().unwrap().unwrap();
        let told = std::iter::from_fn(|| heard.recv_timeout(Duration::from_millis(500)).ok()).count();
        assert!(told >= SIGNALS.len() && told.is_multiple_of(SIGNALS.len()), "{told}");
        told < 100 * SIGNALS.len()
    });
    assert!(fewer);
}

#[test]
fn secrets_are_not_in_what_is_logged() {
    let settings = UpstreamSettings {
        credentials: Credentials::TokenFile(SecretSource::Given(Secret::new("hunter2"))),
        ..UpstreamSettings::new("kde", UpstreamKind::Gotify, "https://a.example/")
    };
    let request = Request::Panel(PanelRequest::SetProvider(Box::new(settings.clone())));
    let reply = Reply::Panel(Box::new(of(settings)));
    assert!(!format!("{request:?} {reply:?}").contains("hunter2"));
}

/// The daemon itself, by its configuration file.
#[test]
fn the_daemon_serves_the_panel_its_configuration_asks_for() {
    let daemon = Daemon::new();
    for (config, expected) in [("[kde]\npanel = true\n", true), ("", false)] {
        let process = nightporterd(&daemon, config);
        let client = Client::new(&daemon);
        assert!(owned_soon(&client, bus::DISTRIBUTOR));
        if expected {
            assert!(owned_soon(&client, KDE));
            assert!(client.introspect("/Management").contains(MANAGEMENT));
        } else {
            let missing = call_once(&daemon, "/Management", MANAGEMENT, "status", ()).join().unwrap();
            assert_eq!(error_of(missing).0, "org.freedesktop.DBus.Error.UnknownObject");
            assert_eq!(client.owner(KDE), None);
        }
        drop(process);
        assert!(gone_soon(&client, bus::DISTRIBUTOR));
    }
}
