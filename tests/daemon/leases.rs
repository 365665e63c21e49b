//! Leases: real processes take them over a real bus, give them back, die with them, and have them taken away.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use nightporter::view;
use zbus::{MessageStream, block_on, message::Type};

use crate::{
    lease::{Options, Puppet, play, take},
    support::{Behaviour, Client, FAST, Setup, World, is_held, is_running, of, stays, wait},
};

const APP: &str = "org.example.App";
const HOLDER: &str = "org.example.Holder";
/// Some times the grace of `FAST`.
const PAST_GRACE: Duration = Duration::from_millis(1000);

fn world() -> World {
    World::new(Setup { top: "profile = \"cached\"", lifecycle: FAST, ..Setup::default() })
}

fn held(world: &World) -> Vec<view::Lease> {
    world.ask("Leases", Some(""))
}

fn why_contains(world: &World, app: &str, words: &str) -> bool {
    world.why(app).decisions.iter().any(|decision| decision.reason.contains(words))
}

/// This very program as another process: an app with this name, or nobody in particular.
fn puppet(world: &World, name: Option<&str>, service: Option<&str>) -> Puppet {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["leases::play_a_holder", "--exact", "--nocapture"]);
    command.env("PUPPET_BUS", world.bus_address());
    command.envs(name.map(|name| ("PUPPET_NAME", name))).envs(service.map(|service| ("PUPPET_SERVICE", service)));
    Puppet::start(command)
}

#[test]
/// Played by other tests, as a process of its own; by itself it does nothing.
fn play_a_holder() {
    let Ok(bus) = std::env::var("PUPPET_BUS") else { return };
    let name = std::env::var("PUPPET_NAME").ok();
    let client = Client::start(&bus, name.as_deref(), Behaviour::Accept);
    if name.is_some() {
        client.endpoint("t");
        // First the lease: from then on it may be frozen at any time.
    }
    play(&client.connection);
}

#[test]
fn an_app_stays_awake_until_it_gives_its_lease_back() {
    let world = world();
    let mut app = puppet(&world, Some(HOLDER), None);
    app.tell("take");
    let id: u32 = app.hear("taken").parse().unwrap();
    let shell = world.nameless();
    shell.porter("org.nightporter1.App", "SetStateOf", &[HOLDER, "background"]).unwrap();
    wait("the reason", || {
        why_contains(&world, HOLDER, "it holds a lease: transfer \"upload of 3 photos\"").then_some(())
    });
    assert!(stays(PAST_GRACE, || is_running(app.pid()) && !is_held(app.pid())), "{:?}", world.why(HOLDER));
    let listed = held(&world);
    assert_eq!((listed.len(), listed[0].id, &*listed[0].app), (1, id, HOLDER));
    assert!(listed[0].counting && listed[0].left_secs.is_some_and(|left| left > 3600), "{listed:?}");
    assert_eq!(world.show(HOLDER).leases, held(&world));
    let printed = world.cli(&["leases", "holder"]);
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert!(printed.contains("transfer") && printed.contains("upload of 3 photos"), "{printed}");
    let shown = String::from_utf8(world.cli(&["show", HOLDER]).stdout).unwrap();
    assert!(shown.contains(&format!("Lease {id}")), "{shown}");

    app.tell("close");
    wait("it to be frozen", || is_held(app.pid()).then_some(()));
    assert!(held(&world).is_empty());
    // A dead app holds nothing, and one that died holding something neither.
    shell.porter("org.nightporter1.App", "SetStateOf", &[HOLDER, "foreground"]).unwrap();
    wait("it to run", || (!is_held(app.pid())).then_some(()));
    app.tell("take");
    app.hear("taken");
    assert_eq!(held(&world).len(), 1);
    app.kill();
    wait("its lease to be over", || held(&world).is_empty().then_some(()));
}

#[test]
fn a_lease_ends_with_its_holder() {
    let world = world();
    world.samples(&[(APP, "")]);
    let pid = world.pid(APP);
    wait("it to be frozen", || is_held(pid).then_some(()));
    let mut holder = puppet(&world, None, Some(APP));
    holder.tell("take");
    holder.hear("taken");
    wait("it to be thawed", || (!is_held(pid)).then_some(()));
    assert!(stays(PAST_GRACE, || !is_held(pid)), "{:?}", world.why(APP));
    holder.kill();
    wait("it to be frozen again", || is_held(pid).then_some(()));
    assert!(held(&world).is_empty());
}

#[test]
fn what_is_taken_away_reads_to_its_end() {
    let mut world = world();
    world.samples(&[(APP, "")]);
    let (pid, shell) = (world.pid(APP), world.nameless());
    let for_app = Options { service: Some(APP), ..Options::default() };
    let lease = take(&shell.connection, "navigation", "the way home", for_app).unwrap();
    assert!(stays(PAST_GRACE, || !is_held(pid)), "{:?}", world.why(APP));
    // By whom it is nobody's business it is not.
    let other = world.client("org.example.Other", Behaviour::Accept);
    other.endpoint("t");
    let manager = "org.nightporter1.Manager";
    let ended = |client: &Client, id: u32| {
        let call = client.connection.call_method(
            Some("org.nightporter1"),
            "/org/nightporter1",
            Some(manager),
            "EndLease",
            &id,
        );
        block_on(call).map(drop).map_err(|error| error.to_string())
    };
    assert!(ended(&other, lease.id).unwrap_err().contains("NotAuthorized"));
    assert!(
        ended(&other, lease.id + 1).unwrap_err().contains("NotAuthorized"),
        "who may not is not told what there is"
    );
    assert!(ended(&shell, lease.id + 1).unwrap_err().contains("there is no lease"));
    assert_eq!(other.porter(manager, "Leases", &[APP]), Err("org.nightporter1.Error.NotAuthorized".into()));
    let output = world.cli(&["end-lease", &lease.id.to_string()]);
    assert!(output.status.success(), "{}", of(&output));
    lease.wait_taken();
    wait("it to be frozen", || is_held(pid).then_some(()));
    assert!(world.decided(APP, "lease-ended", "took it away"), "{:?}", world.why(APP));
    // And so it is for all when the daemon ends.
    let lease = take(&shell.connection, "navigation", "the way home", for_app).unwrap();
    world.kill_daemon();
    lease.wait_taken();
}

#[test]
fn an_end_by_time_is_announced_before_it_comes() {
    let world = world();
    world.samples(&[(APP, "")]);
    let (pid, shell) = (world.pid(APP), world.nameless());
    let mut signals = MessageStream::from(&shell.connection);
    let wish = Options { service: Some(APP), seconds: Some(7) };
    let begun = Instant::now();
    let lease = take(&shell.connection, "task", "saving", wish).unwrap();
    let (id, millis) = block_on(async {
        use futures_core::Stream;
        loop {
            let next = std::future::poll_fn(|context| std::pin::Pin::new(&mut signals).poll_next(context)).await;
            let message = next.unwrap().unwrap();
            let member = message.header().member().map(ToString::to_string);
            if message.message_type() == Type::Signal && member.as_deref() == Some("LeaseEnding") {
                break message.body().deserialize::<(u32, u64)>().unwrap();
            }
        }
    });
    assert_eq!(id, lease.id);
    assert!((1..=5000).contains(&millis), "{millis} ms");
    assert!(!is_held(pid));
    lease.wait_taken();
    assert!(begun.elapsed() >= Duration::from_secs(7));
    assert!(begun.elapsed() < Duration::from_secs(7 + 20));
    wait("it to be frozen", || is_held(pid).then_some(()));
    assert!(world.decided(APP, "lease-ended", "its time in the background is over"), "{:?}", world.why(APP));
}

#[test]
fn who_may_hold_what() {
    let never = "\n[[app]]\nname = \"org.example.Never\"\nbackground = false\n";
    let world = World::new(Setup { lifecycle: FAST, limits: never, ..Setup::default() });
    let shell = world.nameless();
    let refused = |client: &Client, kind: &str, reason: &str, options: Options<'_>| {
        let (name, text) = take(&client.connection, kind, reason, options).unwrap_err();
        (name.rsplit('.').next().unwrap_or_default().to_owned(), text)
    };
    let none = Options::default();
    // Nobody in particular, for itself and for what is not there.
    assert_eq!(refused(&shell, "task", "r", none).0, "NoSuchApp");
    let of_app = Options { service: Some(APP), ..none };
    assert_eq!(refused(&shell, "task", "r", of_app).0, "NoSuchApp");

    let app = world.client(APP, Behaviour::Accept);
    app.endpoint("t");
    let other = world.client("org.example.Other", Behaviour::Accept);
    other.endpoint("t");
    assert_eq!(refused(&other, "task", "r", of_app).0, "NotAuthorized");
    // Itself by name is itself.
    drop(take(&app.connection, "task", "r", of_app).unwrap());
    for (kind, reason, options) in [
        ("game", "r", none),
        ("task", "", none),
        ("task", "two\nlines", none),
        ("task", &*"r".repeat(101), none),
        ("task", "r", Options { seconds: Some(0), ..none }),
        ("task", "r", Options { service: Some("no name"), ..none }),
    ] {
        assert_eq!(refused(&app, kind, reason, options).0, "InvalidArgs", "{kind} {reason} {options:?}");
    }
    wait("the first to be over", || held(&world).is_empty().then_some(()));
    let leases: Vec<_> = (0..8).map(|_| take(&app.connection, "sync", "r", none).unwrap()).collect();
    assert_eq!(refused(&app, "sync", "r", none).0, "LimitsExceeded");
    assert_eq!(refused(&shell, "sync", "r", of_app).0, "LimitsExceeded", "whoever holds them");
    take(&other.connection, "sync", "r", none).unwrap();
    drop(leases);
    wait("room", || take(&app.connection, "sync", "r", none).ok());

    let never = world.client("org.example.Never", Behaviour::Accept);
    never.endpoint("t");
    let (name, text) = refused(&never, "task", "r", none);
    assert!(name == "Refused" && text.contains("background = false"), "{name}: {text}");
    // Who is not there cannot be kept awake.
    app.quit();
    wait("it to be gone", || (!world.is_owned(APP)).then_some(()));
    wait("the daemon to hear of it", || (refused(&shell, "task", "r", of_app).0 == "NotRunning").then_some(()));
}

#[test]
fn a_bus_that_ends_takes_its_leases_along() {
    let mut world = world();
    let app = world.client(APP, Behaviour::Accept);
    app.endpoint("t");
    let lease = take(&app.connection, "transfer", "r", Options::default()).unwrap();
    world.stop_bus();
    lease.wait_taken();
}
