//! Transfers on an app's behalf: the real daemon on a real bus, a server that breaks off, lies and changes its mind, and apps
//! that are frozen, dead, or killed with their daemon in the middle.
#![cfg(all(feature = "cli", feature = "relay"))]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![expect(clippy::print_stderr, reason = "what a failing test wants to be known")]
#![expect(clippy::duplicate_mod, reason = "both worlds of tests have a dbus-daemon of their own")]

#[expect(dead_code, reason = "made for the tests of units; shared")]
#[path = "units/group.rs"]
mod group;
#[expect(dead_code, reason = "made for the stand-ins; shared")]
#[path = "standins/http.rs"]
mod http;
#[path = "transfers/server.rs"]
mod server;
#[expect(dead_code, unused_imports, reason = "made for the tests of the daemon; shared")]
mod support;
#[expect(dead_code, reason = "made for the tests of the surroundings; shared")]
#[path = "surroundings/support.rs"]
mod surroundings;

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{Read, Write},
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use nightporter::view;
use nix::unistd::getuid;
use ring::digest;
use zbus::{Connection, DynamicType, Fd, Message, Variant, block_on};

use crate::{
    group::Group,
    server::{MOMENT, Plan, Server, bytes},
    support::{Behaviour, Client, FAST, PATIENCE, Setup, World, error_of, is_running, of, stays, wait},
    surroundings::{NM, NM_PATH},
};

const APP: &str = "org.example.App";
const OTHER: &str = "org.example.Other";
const UNIT: &str = "app-org.example.App@8.service";
const MIB: usize = 1024 * 1024;
const LOOPBACK: &str = "\n[transfers]\nloopback = true\n";

type Options<'a> = HashMap<&'a str, Variant<'a>>;

fn world() -> World {
    World::new(Setup { limits: LOOPBACK, ..Setup::default() })
}

fn app(world: &World) -> Client {
    let app = world.client(APP, Behaviour::Accept);
    app.endpoint("t");
    app
}

fn call<B>(connection: &Connection, member: &'static str, body: &B) -> Result<Message, (String, String)>
where
    B: serde::Serialize + DynamicType + Sync,
{
    let interface = "org.nightporter1.Transfers";
    let call = connection.call_method(Some("org.nightporter1"), "/org/nightporter1", Some(interface), member, body);
    block_on(call).map_err(|error| {
        let (name, text) = error_of(Err(error));
        (name.rsplit('.').next().unwrap_or_default().to_owned(), text)
    })
}

fn download_with(
    app: &Client,
    url: &str,
    headers: &[(&str, &str)],
    options: &Options<'_>,
) -> Result<u64, (String, String)> {
    let headers: HashMap<&str, &str> = headers.iter().copied().collect();
    call(&app.connection, "Download", &(url, headers, options)).map(|reply| reply.body().deserialize().unwrap())
}

fn download(app: &Client, url: &str) -> u64 {
    download_with(app, url, &[], &Options::new()).unwrap()
}

fn upload(app: &Client, url: &str, size: u64, options: &Options<'_>) -> Result<(File, u64), (String, String)> {
    let headers: HashMap<&str, &str> = [("Content-Type", "image/jpeg")].into();
    let reply = call(&app.connection, "Upload", &(url, size, headers, options))?;
    let body = reply.body();
    let (content, id): (Fd<'_>, u64) = body.deserialize().unwrap();
    Ok((File::from(OwnedFd::try_from(content).unwrap()), id))
}

fn collect(app: &Client, id: u64) -> Result<Vec<u8>, (String, String)> {
    let reply = call(&app.connection, "Collect", &id)?;
    let body = reply.body();
    let (file, size): (Fd<'_>, u64) = body.deserialize().unwrap();
    let mut bytes = Vec::new();
    File::from(OwnedFd::try_from(file).unwrap()).read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, size);
    Ok(bytes)
}

/// What an app is told next of a transfer: which, how it ended, and more about that. Other calls are passed over.
fn told(app: &Client) -> (u64, String, String) {
    loop {
        let call = app.calls.recv_timeout(PATIENCE).expect("it is told of no transfer");
        if call.header().member().is_some_and(|member| member.as_str() == "TransferDone") {
            return call.body().deserialize().unwrap();
        }
    }
}

fn listed(world: &World) -> Vec<view::Transfer> {
    world.ask("Transfers", Some(""))
}

fn one(world: &World, id: u64) -> Option<view::Transfer> {
    listed(world).into_iter().find(|transfer| transfer.id == id)
}

fn wait_for_reason(world: &World, id: u64, words: &str) -> view::Transfer {
    wait(words, || {
        one(world, id).filter(|transfer| transfer.reason.as_deref().is_some_and(|reason| reason.contains(words)))
    })
}

fn spool(world: &World) -> Vec<String> {
    let names = fs::read_dir(world.state.join("transfers")).unwrap();
    let mut names: Vec<String> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name != "boot");
    names.sort();
    names
}

fn sha256(bytes: &[u8]) -> String {
    digest::digest(&digest::SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_file_comes_and_is_kept_until_it_is_fetched() {
    let world = world();
    let content = bytes(3 * MIB, 1);
    let server = Server::start(&content);
    let app = app(&world);
    let digest = sha256(&content);
    let options = Options::from([("sha256", Variant::from(&*digest)), ("title", Variant::from("A map"))]);
    let id = download_with(&app, &server.url(), &[("X-Mine", "yes")], &options).unwrap();
    assert_eq!(told(&app), (id, "done".into(), "200 OK".into()));
    let request = &server.requests()[0];
    assert_eq!((request.header("x-mine"), request.header("accept-encoding")), (Some("yes"), Some("identity")));
    assert!(request.header("user-agent").unwrap().starts_with("nightporter/"));
    let printed = String::from_utf8(world.cli(&["transfers", "app"]).stdout).unwrap();
    assert!(printed.contains("A map") && printed.contains("done") && printed.contains("3.0 MiB"), "{printed}");
    assert!(world.decided(APP, "transfer-done", "A map"), "{:?}", world.why(APP));
    assert_eq!(collect(&app, id).unwrap(), content);
    wait("the spool to be empty", || (spool(&world).is_empty() && listed(&world).is_empty()).then_some(()));
    assert_eq!(collect(&app, id).unwrap_err().0, "Refused");
}

#[test]
fn a_cut_is_gone_on_from_and_only_with_the_same_version() {
    let world = world();
    let content = bytes(2 * MIB, 2);
    let server = Server::start(&content);
    let app = app(&world);
    server.plan(Plan::Cut(MIB));
    let id = download(&app, &server.url());
    assert_eq!(told(&app).1, "done");
    let requests = server.requests();
    let parts: Vec<_> = requests.iter().map(|request| (request.header("range"), request.header("if-range"))).collect();
    assert_eq!(parts[0], (None, None));
    assert_eq!(parts[1], (Some(&*format!("bytes={MIB}-")), Some("\"one\"")));
    assert_eq!(parts.len(), 2);
    assert_eq!(collect(&app, id).unwrap(), content);

    // Another version comes from its start.
    server.plan(Plan::Cut(MIB));
    let id = download(&app, &server.url());
    wait_for_reason(&world, id, "another try");
    let newer = bytes(MIB + 5, 3);
    server.change(&newer, Some("\"two\""), true);
    assert_eq!(told(&app).1, "done");
    assert_eq!(collect(&app, id).unwrap(), newer);

    // And so does one of which no version is told, or no parts are given.
    for (etag, ranges) in [(None, true), (Some("W/\"weak\""), true), (Some("\"three\""), false)] {
        let content = bytes(MIB, 4);
        server.change(&content, etag, ranges);
        server.plan(Plan::Cut(MIB / 2));
        let id = download(&app, &server.url());
        assert_eq!(told(&app).1, "done");
        assert_eq!(collect(&app, id).unwrap(), content, "{etag:?} {ranges}");
    }
}

#[test]
fn a_server_that_lies_about_its_parts_does_no_harm() {
    let world = world();
    let content = bytes(MIB, 5);
    let server = Server::start(&content);
    let app = app(&world);
    for lie in [
        "HTTP/1.1 206 P\r\nETag: \"one\"\r\nContent-Range: bytes 7-9/10\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
        "HTTP/1.1 206 P\r\nETag: \"other\"\r\nContent-Range: bytes 1000-1002/1003\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
        "HTTP/1.1 416 N\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    ] {
        server.plan(Plan::Cut(1000));
        server.plan(Plan::Raw(lie.into()));
        let id = download(&app, &server.url());
        assert_eq!(told(&app).1, "done");
        assert_eq!(collect(&app, id).unwrap(), content, "{lie}");
    }
}

#[test]
fn what_the_server_says_is_heeded() {
    let world = world();
    let server = Server::start(b"at last");
    let app = app(&world);
    server.plan(Plan::Raw(
        b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec(),
    ));
    let begun = Instant::now();
    let id = download(&app, &server.url());
    let waiting = wait_for_reason(&world, id, "503");
    assert!(waiting.retry_in_secs.is_some_and(|secs| secs <= 7), "{waiting:?}");
    assert!(world.decided(APP, "transfer-wait", "503"), "{:?}", world.why(APP));
    assert_eq!(told(&app).1, "done");
    assert!(begun.elapsed() >= Duration::from_secs(7), "{:?}", begun.elapsed());
    assert_eq!(collect(&app, id).unwrap(), b"at last");
    for (answer, words) in [
        ("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "404"),
        (
            "HTTP/1.1 302 Found\r\nLocation: ftp://elsewhere/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            "not http",
        ),
    ] {
        server.plan(Plan::Raw(answer.into()));
        let id = download(&app, &server.url());
        let (id_told, status, text) = told(&app);
        assert_eq!((id_told, &*status), (id, "failed"));
        assert!(text.contains(words), "{text}");
        assert_eq!(collect(&app, id).unwrap_err().0, "Refused");
    }
    wait("nothing to be left", || (spool(&world).is_empty() && listed(&world).is_empty()).then_some(()));
}

#[test]
fn a_login_does_not_go_along_to_another_server() {
    let world = world();
    let (first, second) = (Server::start(b"never"), Server::start(b"elsewhere"));
    let app = app(&world);
    let to = |place: &str| {
        let text = format!("HTTP/1.1 307 T\r\nLocation: {place}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        Plan::Raw(text.into_bytes())
    };
    first.plan(to("/there"));
    first.plan(to(&second.url()));
    let headers = [("Authorization", "Bearer secret"), ("X-Key", "secret"), ("Accept", "image/*")];
    let id = download_with(&app, &first.url(), &headers, &Options::new()).unwrap();
    assert_eq!(told(&app).1, "done");
    assert_eq!(collect(&app, id).unwrap(), b"elsewhere");
    let seen = |request: &http::Request| {
        ["authorization", "x-key", "accept"].map(|name| request.header(name).map(str::to_owned))
    };
    let all = headers.map(|(_, value)| Some(value.to_owned()));
    assert_eq!(first.requests().iter().map(seen).collect::<Vec<_>>(), [all.clone(), all]);
    assert_eq!(seen(&second.requests()[0]), [None, None, Some("image/*".into())]);
}

#[test]
fn a_daemon_killed_in_the_middle_goes_on_where_it_was() {
    let mut world = world();
    let content = bytes(4 * MIB, 6);
    let server = Server::start(&content);
    let first = app(&world);
    let half = 2 * MIB + 12_345;
    server.plan(Plan::Hold(half));
    let digest = sha256(&content);
    let options = Options::from([("sha256", Variant::from(&*digest))]);
    let id = download_with(&first, &server.url(), &[], &options).unwrap();
    let file = world.state.join("transfers").join(id.to_string());
    wait("half of it", || fs::metadata(&file).ok().filter(|file| file.len() == half as u64));
    // What tells the version is known to the store a moment later.
    std::thread::sleep(Duration::from_secs(3));
    world.kill_daemon();
    world.start_daemon();
    assert_eq!(told(&first).1, "done");
    let ranges: Vec<_> = server.requests().iter().map(|request| request.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges, [None, Some(format!("bytes={half}-"))]);
    assert_eq!(collect(&first, id).unwrap(), content);

    // One that is done and not yet told is told after a crash, and no number is used twice.
    first.quit();
    wait("it to be gone", || (!world.is_owned(APP)).then_some(()));
    let other = world.client(OTHER, Behaviour::Fail);
    assert_eq!(other.register("t").0, "REGISTRATION_SUCCEEDED");
    let next = download(&other, &server.url());
    wait("its end", || one(&world, next).filter(|transfer| transfer.state == "done"));
    assert!(next > id);
    other.quit();
    world.kill_daemon();
    world.start_daemon();
    assert_eq!(one(&world, next).unwrap().told, Some(false));
    let other = world.client(OTHER, Behaviour::Accept);
    assert_eq!(told(&other).0, next);
    assert_eq!(collect(&other, next).unwrap(), content);
    server.release();
}

#[test]
fn a_metered_network_is_left_to_what_may_use_it() {
    let system = surroundings::Daemon::new();
    let network = surroundings::network_manager(&system);
    network.set(NM_PATH, NM, vec![("Metered", 1_u32.into())]);
    let mut world = World::without_daemon(Setup { limits: LOOPBACK, ..Setup::default() });
    world.environment.push(("DBUS_SYSTEM_BUS_ADDRESS", system.address()));
    world.start_daemon();
    wait("the network to be known", || world.status().surroundings.filter(|around| around.metered));
    let (small, large) = (Server::start(b"small"), Server::start(&bytes(2 * MIB, 7)));
    let app = app(&world);
    let id = download(&app, &large.url());
    wait_for_reason(&world, id, "not metered");
    let id = download(&app, &small.url());
    assert_eq!(told(&app).0, id, "what is small goes");
    let never = Options::from([("metered", Variant::from("never"))]);
    let never = download_with(&app, &small.url(), &[], &never).unwrap();
    let allow = Options::from([("metered", Variant::from("allow"))]);
    let allow = download_with(&app, &large.url(), &[], &allow).unwrap();
    assert_eq!(told(&app).0, allow);
    assert!(stays(MOMENT, || one(&world, never).is_some_and(|transfer| transfer.state == "waiting")));
    network.set(NM_PATH, NM, vec![("Metered", 4_u32.into())]);
    let mut done = [told(&app), told(&app)];
    done.sort();
    assert!(done.iter().all(|(_, status, _)| status == "done") && done[1].0 == never, "{done:?}");
    // And it stops what is under way when it becomes one.
    large.plan(Plan::Hold(MIB / 2));
    let id = download(&app, &large.url());
    wait("the middle of it", || one(&world, id).filter(|transfer| transfer.state == "running"));
    network.set(NM_PATH, NM, vec![("Metered", 1_u32.into())]);
    wait_for_reason(&world, id, "not metered");
    network.set(NM_PATH, NM, vec![("Metered", 2_u32.into())]);
    assert_eq!(told(&app), (id, "done".into(), "206 Partial Content".into()));
    large.release();
}

#[test]
fn the_example_is_frozen_then_dead_and_woken_each_time() {
    let tombstone = Setup { top: "profile = \"tombstone\"", lifecycle: FAST, limits: LOOPBACK, ..Setup::default() };
    let world = World::new(tombstone);
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/lifecycle/python/app.py");
    let group = Group::of_user(getuid().as_raw(), UNIT);
    let output = world.install_program(APP, &group.run(&format!("/usr/bin/python3 {} {APP}", program.display())));
    let lines =
        || -> Vec<String> { fs::read_to_string(&output).unwrap_or_default().lines().map(ToOwned::to_owned).collect() };
    let says =
        |what: &str, nth: usize| wait(what, || lines().into_iter().filter(|line| line.starts_with(what)).nth(nth));
    world.launch(APP);
    let endpoint = says("endpoint: ", 0).split_off("endpoint: ".len());
    let content = bytes(2 * MIB, 8);
    let fetched = format!("fetched {} bytes: {}", content.len(), &sha256(&content)[..16]);

    let server = Server::start(&content);
    server.plan(Plan::Hold(MIB));
    world.post_to(&endpoint, &[("TTL", "600")], &format!("fetch {}", server.url()));
    says("transfer ", 0);
    let pid = world.pid(APP);
    wait("it to be frozen in the middle", || group.is_frozen().then_some(()));
    assert!(stays(MOMENT, || group.is_frozen()));
    server.release();
    assert_eq!(says("fetched ", 0), fetched);
    assert_eq!(world.pid(APP), pid);
    assert!(world.decided(APP, "thaw", "a transfer of it has ended"), "{:?}", world.why(APP));

    let server = Server::start(&content);
    server.plan(Plan::Hold(MIB));
    world.post_to(&endpoint, &[("TTL", "600")], &format!("fetch {}", server.url()));
    says("transfer ", 1);
    let kill = world.cli(&["kill", APP]);
    assert!(kill.status.success() && !is_running(pid), "{}", of(&kill));
    server.release();
    assert_eq!(says("fetched ", 1), fetched);
    assert_ne!(world.pid(APP), pid);
    assert!(world.decided(APP, "start", "a transfer of it has ended"), "{:?}", world.why(APP));
    wait("nothing to be left", || (spool(&world).is_empty() && listed(&world).is_empty()).then_some(()));
}

#[test]
fn an_upload_goes_on_without_its_app() {
    let mut world = world();
    let server = Server::start(b"");
    let sender = app(&world);
    let photo = bytes(MIB, 9);
    for method in ["PUT", "POST"] {
        let options = Options::from([("method", Variant::from(method))]);
        let (mut content, id) = upload(&sender, &server.url(), photo.len() as u64, &options).unwrap();
        content.write_all(&photo).unwrap();
        drop(content);
        assert_eq!(told(&sender), (id, "done".into(), "201 Created".into()));
        let request = server.requests().pop().unwrap();
        assert_eq!((&*request.method, request.header("content-type")), (method, Some("image/jpeg")));
        assert!(request.body == photo, "not the same bytes");
    }
    // Its app and the daemon are gone once it is handed over; the server is not there at first.
    let unavailable = "HTTP/1.1 503 B\r\nRetry-After: 2\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    server.plan(Plan::Raw(unavailable.into()));
    let (mut content, id) = upload(&sender, &server.url(), photo.len() as u64, &Options::new()).unwrap();
    content.write_all(&photo).unwrap();
    drop(content);
    wait("the first try", || one(&world, id).filter(|transfer| transfer.retry_in_secs.is_some()));
    sender.quit();
    world.kill_daemon();
    world.start_daemon();
    wait("its end", || one(&world, id).filter(|transfer| transfer.state == "done"));
    assert!(server.requests().pop().unwrap().body == photo);
    let sender = world.client(APP, Behaviour::Accept);
    assert_eq!(told(&sender).0, id);
}

#[test]
fn the_servers_answer_to_an_upload_can_be_read_until_it_is_taken_note_of() {
    let world = world();
    let server = Server::start(b"");
    let app = world.client(APP, Behaviour::Silent);
    assert_eq!(app.register("t").0, "REGISTRATION_SUCCEEDED");
    let (mut content, id) = upload(&app, &server.url(), 5, &Options::new()).unwrap();
    content.write_all(b"photo").unwrap();
    drop(content);
    wait("its end", || one(&world, id).filter(|transfer| transfer.state == "done"));
    assert_eq!(collect(&app, id).unwrap(), b"5 bytes");
}

#[test]
fn what_is_handed_over_in_part_is_not_sent_and_its_app_hears_so() {
    let mut world = world();
    let server = Server::start(b"");
    let sender = app(&world);
    for (sent, words) in [(&b"photo"[..], "5 of 10 bytes are missing"), (b"photograph!", "more than the 10 bytes")] {
        let (mut content, id) = upload(&sender, &server.url(), 10, &Options::new()).unwrap();
        let _ = content.write_all(sent);
        drop(content);
        let (id_told, status, text) = told(&sender);
        assert_eq!((id_told, &*status), (id, "failed"));
        assert!(text.contains(words), "{text}");
    }
    // The daemon dies with half of it.
    let (mut content, id) = upload(&sender, &server.url(), 10, &Options::new()).unwrap();
    content.write_all(b"photo").unwrap();
    world.kill_daemon();
    world.start_daemon();
    let (id_told, status, text) = told(&sender);
    assert_eq!((id_told, &*status), (id, "failed"));
    assert!(text.contains("not handed over"), "{text}");
    assert!(server.requests().is_empty());
    wait("nothing to be left", || spool(&world).is_empty().then_some(()));
}

#[test]
fn no_server_makes_the_daemon_grow_or_wait_for_ever() {
    let limits = "\n[transfers]\nloopback = true\nmax-size = \"1MiB\"\nspool-quota = \"2MiB\"\n";
    let world = World::new(Setup { limits, ..Setup::default() });
    let (server, app) = (Server::start(&bytes(MIB + 1, 10)), app(&world));
    let failed = |words: &str| {
        let (_, status, text) = told(&app);
        assert!(status == "failed" && text.contains(words), "{status}: {text}");
    };
    download(&app, &server.url());
    failed("more than 1048576 bytes");
    server.plan(Plan::Endless);
    download(&app, &server.url());
    failed("more than 1048576 bytes");
    wait("the server to be left", || (server.left() == 1).then_some(()));
    let less = Options::from([("max-size", Variant::from(100_u64))]);
    download_with(&app, &server.url(), &[], &less).unwrap();
    failed("more than 100 bytes");
    let wrong = "0".repeat(64);
    server.change(b"fine", Some("\"fine\""), true);
    download_with(&app, &server.url(), &[], &Options::from([("sha256", Variant::from(&*wrong))])).unwrap();
    failed("SHA-256");
    // Headers without an end are no answer.
    server.plan(Plan::Raw([&b"HTTP/1.1 200 OK\r\nX: "[..], &vec![b'x'; MIB]].concat()));
    let id = download(&app, &server.url());
    wait_for_reason(&world, id, "another try");
    call(&app.connection, "Cancel", &id).unwrap();
    // Who says nothing is left when the user is tired of it.
    server.plan(Plan::Silence);
    let silent = download(&app, &server.url());
    wait("the request", || (server.requests().len() == 6).then_some(()));
    let cancelled = world.cli(&["cancel-transfer", &silent.to_string()]);
    assert!(cancelled.status.success(), "{}", of(&cancelled));
    assert_eq!((told(&app), server.left()).0.1, "cancelled");
    wait("the server to be left", || (server.left() == 2).then_some(()));
    // An app's share of the spool.
    assert_eq!(upload(&app, &server.url(), MIB as u64 + 1, &Options::new()).unwrap_err().0, "LimitsExceeded");
    let held: Vec<_> = (0..2).map(|_| upload(&app, &server.url(), MIB as u64, &Options::new()).unwrap()).collect();
    assert_eq!(upload(&app, &server.url(), 1, &Options::new()).unwrap_err().0, "LimitsExceeded");
    for (_, id) in &held {
        call(&app.connection, "Cancel", id).unwrap();
    }
    drop(held);
    wait("nothing to be left", || (spool(&world).is_empty() && listed(&world).is_empty()).then_some(()));
}

#[test]
fn who_may_do_what() {
    let world = world();
    let server = Server::start(b"mine");
    let stranger = world.nameless();
    let refused = |result: Result<u64, (String, String)>| result.unwrap_err().0;
    assert_eq!(refused(download_with(&stranger, &server.url(), &[], &Options::new())), "NoSuchApp");
    let app = app(&world);
    let other = world.client(OTHER, Behaviour::Accept);
    other.endpoint("t");
    server.plan(Plan::Silence);
    let id = download(&app, &server.url());
    assert_eq!(collect(&other, id).unwrap_err().0, "Refused");
    assert_eq!(call(&other.connection, "Cancel", &id).unwrap_err().0, "NotAuthorized");
    let own = |app: &Client| -> Vec<view::Transfer> {
        let reply = call(&app.connection, "List", &()).unwrap();
        serde_json::from_str(reply.body().deserialize().unwrap()).unwrap()
    };
    assert_eq!((own(&app).len(), own(&other).len()), (1, 0));
    assert_eq!(
        other.porter("org.nightporter1.Manager", "Transfers", &[APP]),
        Err("org.nightporter1.Error.NotAuthorized".into())
    );
    for url in ["file:///etc/passwd", "https://user:secret@files.example/", "no url"] {
        assert_eq!(refused(download_with(&app, url, &[], &Options::new())), "InvalidArgs", "{url}");
    }
    let smuggled = [("X", "1\r\nAuthorization: root")];
    assert_eq!(refused(download_with(&app, &server.url(), &smuggled, &Options::new())), "InvalidArgs");
    // With the last registration everything goes.
    app.unregister("t");
    wait("nothing to be left", || (listed(&world).is_empty() && spool(&world).is_empty()).then_some(()));
}

#[test]
fn this_machine_itself_is_not_reached_through_the_daemon() {
    let world = World::new(Setup::default());
    let server = Server::start(b"for this machine alone");
    let app = app(&world);
    let port = server.address.port();
    for place in ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "127.1.2.3"] {
        download(&app, &format!("http://{place}:{port}/"));
        let (_, status, text) = told(&app);
        assert!(status == "failed" && text.contains("this machine itself"), "{place}: {text}");
    }
    assert!(server.requests().is_empty());
    let off = World::new(Setup { limits: "\n[transfers]\nenabled = false\n", ..Setup::default() });
    let app = off.client(APP, Behaviour::Accept);
    app.endpoint("t");
    let (name, text) = download_with(&app, &server.url(), &[], &Options::new()).unwrap_err();
    assert!(name == "Refused" && text.contains("enabled = false"), "{name}: {text}");
}
