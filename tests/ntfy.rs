//! The real daemon against the real ntfy server: registering, every kind of body, credentials, outages, crashes, limits.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "ntfy/front.rs"]
mod front;
#[path = "ntfy/held.rs"]
mod held;
#[path = "ntfy/server.rs"]
mod server;
#[path = "ntfy/world.rs"]
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::net::UnixDatagram,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use self::{
    front::Front,
    held::{Held, held},
    server::{Ntfy, Publisher, path_of},
    world::{Apps, Bus, PATIENCE, Porter, Received},
};

fn name(n: usize) -> String {
    format!("org.example.App{n}")
}

fn publisher(ntfy: &Ntfy) -> Publisher {
    Publisher::new(ntfy.port()).unwrap()
}

fn bodies(messages: &[Received]) -> Vec<String> {
    messages.iter().map(|message| String::from_utf8_lossy(&message.body).into_owned()).collect()
}

/// Connections that subscribed, by the server's own log.
fn subscriptions(ntfy: &Ntfy) -> usize {
    ntfy.log().lines().filter(|line| line.contains("WebSocket connection opened")).count()
}

#[test]
fn a_hundred_apps_register_in_one_burst_within_the_default_limits() {
    let (ntfy, bus) = (Ntfy::start("log-level: debug"), Bus::start());
    let porter = Porter::start(&bus, &ntfy.url(), "", "");
    // One sender may have 32 calls waiting, which is more than a process has apps.
    let processes: Vec<(Apps, Vec<String>)> =
        (0..5).map(|process| (Apps::start(&bus), (0..20).map(|n| name(20 * process + n)).collect())).collect();
    let first = Apps::start(&bus);
    first.register_one("org.example.First");
    assert_eq!(subscriptions(&ntfy), 1);

    processes.iter().for_each(|(apps, names)| apps.own(names));
    let under_way: Vec<_> = processes.iter().map(|(apps, names)| apps.register_later(names)).collect();
    for results in under_way {
        assert_eq!(results(), vec![Ok(()); 20]);
    }
    let made = subscriptions(&ntfy);
    // One more would do; another is forgiven on a machine so busy that the burst takes longer than it is waited for.
    assert!((2..=3).contains(&made), "{made} connections for 101 registrations");

    let mut publisher = publisher(&ntfy);
    let all = || processes.iter().flat_map(|(apps, names)| names.iter().map(move |name| (apps, name)));
    for (apps, name) in all() {
        publisher.publish(&apps.endpoint(name), name.as_bytes()).unwrap();
    }
    for (apps, name) in all() {
        assert_eq!(bodies(&apps.wait_messages(name, 1)), [name.as_str()]);
    }
    assert_eq!(subscriptions(&ntfy), made, "it reconnected without need");
    assert_eq!(porter.upstream().registrations, 101);
    assert!(!ntfy.log().contains("limit reached"), "a limit was reached");
}

#[test]
fn every_body_arrives_as_it_was_sent() {
    let (ntfy, bus) = (Ntfy::start(""), Bus::start());
    let porter = Porter::start(&bus, &ntfy.url(), "", "");
    let apps = Apps::start(&bus);
    let app = name(1);
    let endpoint = apps.register_one(&app);
    let topic = endpoint.strip_suffix("?up=1").unwrap();
    let mut publisher = publisher(&ntfy);
    let mut sent = Vec::new();

    // Web Push as servers send it: binary, with the header that switches UnifiedPush mode on by itself.
    let binary: Vec<u8> = (0..=255).collect();
    let encrypted = [("Content-Encoding", "aes128gcm"), ("TTL", "60"), ("Urgency", "high")];
    publisher.publish_with(topic, &encrypted, &binary).unwrap();
    sent.push(binary.clone());
    for body in [
        binary.repeat(16),
        "Grüße, 世界 🌍".as_bytes().to_vec(),
        b"x".to_vec(),
        vec![b'a'; 4096],
        b"  spaces and a newline stay \n".to_vec(),
        b"\xff".to_vec(),
        br#"{"looks":"like \"JSON\"","event":"open"}"#.to_vec(),
    ] {
        publisher.publish(&endpoint, &body).unwrap();
        sent.push(body);
    }
    // ntfy itself makes a word of nothing.
    publisher.publish(&endpoint, b"").unwrap();
    sent.push(b"triggered".to_vec());
    let got = apps.wait_messages(&app, sent.len());
    let differing = got.iter().zip(&sent).position(|(got, sent)| got.body != *sent);
    assert_eq!((differing, got.len()), (None, sent.len()));

    // A sender that does not know of UnifiedPush: what is binary or long becomes an attachment.
    let got = got.len();
    let small: Vec<u8> = (0..4096_u32).map(|n| (n * 7 % 256) as u8).collect();
    publisher.publish_with(topic, &[("Filename", "photo.bin")], &small).unwrap();
    assert_eq!(apps.wait_messages(&app, got + 1)[got].body, small);
    let large: Vec<u8> = binary.repeat(17);
    publisher.publish(topic, &large).unwrap();
    publisher.publish(&endpoint, b"after").unwrap();
    assert_eq!(bodies(&apps.wait_messages(&app, got + 2)[got + 1..]), ["after"]);
    let why = porter.ask("Why", Some(&app));
    assert!(why.contains("its attachment has 4352 bytes, 4096 are the most"), "{why}");
    assert_eq!(porter.status().messages.unusable, 1);
}

/// Read for one user, write for everybody, as ntfy's manual has it for UnifiedPush.
fn guarded() -> Ntfy {
    let ntfy = Ntfy::start("auth-file: \"{dir}/auth.db\"\nauth-default-access: deny-all");
    ntfy.command(&["user", "add", "phone"], "correct horse");
    ntfy.command(&["access", "phone", "up*", "rw"], "");
    ntfy.command(&["access", "everyone", "up*", "wo"], "");
    ntfy
}

fn secret(path: &Path, text: &str) {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = fs::File::options();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path).unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
}

#[test]
fn a_token_opens_a_guarded_server() {
    let (ntfy, bus) = (guarded(), Bus::start());
    let said = ntfy.command(&["token", "add", "phone"], "");
    let token = said.split_whitespace().find(|word| word.starts_with("tk_")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    secret(&file, &format!("{token}\n"));
    let _porter = Porter::start(&bus, &ntfy.url(), &format!("token-file = \"{}\"", file.display()), "");
    let apps = Apps::start(&bus);
    let endpoint = apps.register_one(&name(1));
    publisher(&ntfy).publish(&endpoint, b"hello").unwrap();
    assert_eq!(bodies(&apps.wait_messages(&name(1), 1)), ["hello"]);
    // Who only has the endpoint can write and not read.
    let read = publisher(&ntfy).request("GET", &path_of(&endpoint).replace("?up=1", "/json?poll=1"), &[], b"").unwrap();
    assert_eq!(read.status, 403);
}

#[test]
fn a_wrong_password_is_told_and_a_mended_one_used_without_a_restart() {
    let (ntfy, bus) = (guarded(), Bus::start());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    secret(&file, "wrong");
    let keys = format!("username = \"phone\"\npassword-file = \"{}\"", file.display());
    let porter = Porter::start(&bus, &ntfy.url(), &keys, "");
    let apps = Apps::start(&bus);
    assert_eq!(apps.register(&[name(1)]), [Err("ACTION_REQUIRED".to_owned())]);
    let troubles = porter.status().troubles;
    assert!(troubles.iter().any(|text| text.contains("check the credentials")), "{troubles:?}");
    assert!(!porter.log().contains("wrong\""), "the password is in the log");

    secret(&file, "correct horse");
    let until = Instant::now() + PATIENCE;
    // As an app does: it asks again when it is started again.
    while apps.register(&[name(1)]) != [Ok(())] {
        assert!(Instant::now() < until, "still refused: {:?}\n{}", porter.status(), porter.log());
        thread::sleep(Duration::from_secs(1));
    }
    assert_eq!(porter.status().troubles, Vec::<String>::new());
    publisher(&ntfy).publish(&apps.endpoint(&name(1)), b"hello").unwrap();
    assert_eq!(bodies(&apps.wait_messages(&name(1), 1)), ["hello"]);
}

/// Publishes `count` numbered messages, again and again each until the server has it. A server that dies between storing
/// and answering has it twice then, so what was tried more than once is told apart.
fn publish_through(ntfy_port: u16, endpoint: &str, count: usize, gap: Duration) -> Vec<(String, usize)> {
    let mut connection = None;
    let until = Instant::now() + PATIENCE;
    (0..count)
        .map(|n| {
            let body = format!("message {n}");
            for tries in 1.. {
                assert!(Instant::now() < until, "the server does not come back");
                if connection.is_none() {
                    connection = Publisher::new(ntfy_port).ok();
                }
                let published = connection.as_mut().map(|client| client.publish(endpoint, body.as_bytes()));
                if let Some(Ok(_)) = published {
                    thread::sleep(gap);
                    return (body, tries);
                }
                connection = None;
                thread::sleep(Duration::from_millis(20));
            }
            unreachable!()
        })
        .collect()
}

#[test]
fn a_server_that_crashes_and_returns_loses_and_repeats_nothing() {
    let (mut ntfy, bus) = (Ntfy::start(""), Bus::start());
    let porter = Porter::start(&bus, &ntfy.url(), "", "");
    let apps = Apps::start(&bus);
    let (app, port) = (name(1), ntfy.port());
    let endpoint = apps.register_one(&app);
    let sent = thread::scope(|scope| {
        let sent = scope.spawn(|| publish_through(port, &endpoint, 200, Duration::from_millis(5)));
        for _ in 0..2 {
            thread::sleep(Duration::from_millis(400));
            ntfy.kill();
            thread::sleep(Duration::from_millis(150));
            ntfy.start_again();
        }
        sent.join().unwrap()
    });
    porter.wait_online();
    let wanted: BTreeSet<&str> = sent.iter().map(|(body, _)| body.as_str()).collect();
    porter.wait("all messages", |_| {
        let got = bodies(&apps.messages(&app));
        wanted.iter().all(|body| got.iter().any(|got| got == body))
    });
    thread::sleep(Duration::from_millis(500));
    let got = apps.messages(&app);
    let ids: BTreeSet<&str> = got.iter().map(|message| message.id.as_str()).collect();
    assert_eq!(ids.len(), got.len(), "an id was handed over twice");
    for (body, tries) in &sent {
        let times = bodies(&got).iter().filter(|got| *got == body).count();
        assert!((1..=*tries).contains(&times), "{body} came {times} times and was sent {tries} times");
    }
}

#[test]
fn a_daemon_that_is_killed_loses_nothing_and_repeats_under_the_same_id_only() {
    let (ntfy, bus) = (Ntfy::start(""), Bus::start());
    let mut porter = Porter::start(&bus, &ntfy.url(), "", "");
    let apps = Apps::start(&bus);
    let (app, port) = (name(1), ntfy.port());
    let endpoint = apps.register_one(&app);
    const COUNT: usize = 400;
    let sent = thread::scope(|scope| {
        let sent = scope.spawn(|| publish_through(port, &endpoint, COUNT, Duration::from_millis(8)));
        for round in 0..6 {
            thread::sleep(Duration::from_millis(150 + round * 77));
            porter.kill();
            thread::sleep(Duration::from_millis(30));
            porter.start_again();
        }
        sent.join().unwrap()
    });
    assert_eq!(sent.len(), COUNT);
    porter.wait("all messages", |_| bodies(&apps.messages(&app)).iter().collect::<BTreeSet<_>>().len() == COUNT);
    // On a busy machine what is repeated takes its time.
    porter.wait("the last repetition", |_| {
        let so_far = apps.messages(&app).len();
        thread::sleep(Duration::from_secs(1));
        apps.messages(&app).len() == so_far
    });
    let got = apps.messages(&app);
    let mut ids: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for (message, body) in got.iter().zip(bodies(&got)) {
        ids.entry(body).or_default().insert(&message.id);
    }
    assert!(ids.values().all(|ids| ids.len() == 1), "a message came under two ids");
    // Of each life only what was taken in the last quarter of a second may come again, some 30 messages.
    assert!(got.len() <= COUNT + 6 * 45, "{} deliveries of {COUNT} messages in 7 lives", got.len());

    // What was taken before that is known for good.
    let before = got.len();
    thread::sleep(Duration::from_secs(1));
    porter.kill();
    porter.start_again();
    porter.wait_online();
    publisher(&ntfy).publish(&endpoint, b"last").unwrap();
    porter.wait("the last message", |_| bodies(&apps.messages(&app)).contains(&"last".to_owned()));
    thread::sleep(Duration::from_millis(500));
    assert_eq!(apps.messages(&app).len(), before + 1);
}

#[test]
fn a_restarted_daemon_hands_over_nothing_again() {
    let (ntfy, bus) = (Ntfy::start(""), Bus::start());
    let apps = Apps::start(&bus);
    let app = name(1);
    let porter = Porter::start(&bus, &ntfy.url(), "", "");
    let endpoint = apps.register_one(&app);
    let mut publisher = publisher(&ntfy);
    for n in 0..300 {
        publisher.publish(&endpoint, format!("{n}").as_bytes()).unwrap();
    }
    apps.wait_messages(&app, 300);
    let porter = porter.restart();
    porter.wait_online();
    publisher.publish(&endpoint, b"last").unwrap();
    porter.wait("the last message", |_| bodies(&apps.messages(&app)).contains(&"last".to_owned()));
    thread::sleep(Duration::from_millis(500));
    assert_eq!(apps.messages(&app).len(), 301);
}

#[test]
fn messages_keep_coming_in_order_while_other_apps_come_and_go() {
    let (ntfy, bus) = (Ntfy::start("log-level: debug"), Bus::start());
    let porter = Porter::start(&bus, &ntfy.url(), "", "");
    let apps = Apps::start(&bus);
    let endpoints: Vec<String> = (0..3).map(|n| apps.register_one(&name(n))).collect();
    let over = AtomicBool::new(false);
    let sent = thread::scope(|scope| {
        let sent = scope.spawn(|| {
            let mut publisher = publisher(&ntfy);
            let mut count = 0;
            while !over.load(Ordering::Relaxed) {
                for endpoint in &endpoints {
                    publisher.publish(endpoint, count.to_string().as_bytes()).unwrap();
                }
                count += 1;
                thread::sleep(Duration::from_millis(3));
            }
            count
        });
        for round in 0..5 {
            let guest = name(10 + round);
            apps.register_one(&guest);
            thread::sleep(Duration::from_millis(60));
            if round % 2 == 0 {
                apps.unregister(&guest);
            }
        }
        over.store(true, Ordering::Relaxed);
        sent.join().unwrap()
    });
    let wanted: Vec<String> = (0..sent).map(|n| n.to_string()).collect();
    for n in 0..3 {
        apps.wait_messages(&name(n), sent);
        thread::sleep(Duration::from_millis(100));
        assert_eq!(bodies(&apps.messages(&name(n))), wanted, "app {n}");
    }
    assert!(subscriptions(&ntfy) >= 4, "the list of topics never changed");
    assert_eq!(porter.status().messages.accepted as usize, 3 * sent);
}

#[test]
fn a_server_that_counts_requests_is_left_alone_until_it_agrees() {
    // Three requests at once, then one in 3 s.
    let limits = "visitor-request-limit-burst: 3\nvisitor-request-limit-replenish: 3s\nlog-level: debug";
    let (ntfy, bus) = (Ntfy::start(limits), Bus::start());
    let porter = Porter::start(&bus, &ntfy.url(), "", "");
    let apps = Apps::start(&bus);
    let first = apps.register_one(&name(0));
    let mut publisher = publisher(&ntfy);
    let results: Vec<_> = (1..6)
        .flat_map(|n| {
            publisher.publish(&first, n.to_string().as_bytes()).unwrap();
            apps.register(&[name(n)])
        })
        .collect();
    assert!(ntfy.log().contains("limit reached"), "the limit was never met");
    assert_eq!(results, vec![Ok(()); 5], "{}", porter.log());
    assert_eq!(bodies(&apps.wait_messages(&name(0), 5)), ["1", "2", "3", "4", "5"]);
    for n in 1..6 {
        publisher.publish(&apps.endpoint(&name(n)), b"hello").unwrap();
        apps.wait_messages(&name(n), 1);
    }
    assert_eq!(porter.status().troubles, Vec::<String>::new());
}

#[test]
fn retry_after_is_obeyed_and_nothing_is_lost_meanwhile() {
    let (ntfy, bus) = (Ntfy::start(""), Bus::start());
    let front = Front::before(ntfy.port());
    let porter = Porter::start(&bus, &front.url(), "", "");
    let apps = Apps::start(&bus);
    let app = name(1);
    let endpoint = apps.register_one(&app);
    let mut publisher = publisher(&ntfy);
    publisher.publish(&endpoint, b"before").unwrap();
    apps.wait_messages(&app, 1);

    front.refuse("HTTP/1.1 429 Too Many Requests\r\nRetry-After: 4\r\nContent-Length: 0\r\n\r\n");
    front.cut();
    porter.wait("the refusal", |_| front.refused().len() == 1);
    publisher.publish(&endpoint, b"meanwhile").unwrap();
    let seen = porter.upstream();
    assert!(seen.last_error.as_deref().is_some_and(|error| error.contains("429")), "{seen:?}");
    assert!(seen.retry_in_secs.is_some_and(|secs| (2..=8).contains(&secs)), "{seen:?}");
    let asked = front.refused()[0];
    thread::sleep(Duration::from_millis(3500));
    assert_eq!(front.refused(), [asked], "asked again before the time");
    front.allow();
    let got = apps.wait_messages(&app, 2);
    assert!(asked.elapsed() >= Duration::from_secs(4), "{:?}", asked.elapsed());
    assert_eq!(bodies(&got), ["before", "meanwhile"]);
}

/// `nightporter-sample`, a process of its own that can be frozen.
struct Sample {
    child: Child,
    reports: UnixDatagram,
    _dir: tempfile::TempDir,
}

impl Sample {
    fn start(bus: &Bus, name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("reports");
        let reports = UnixDatagram::bind(&socket).unwrap();
        reports.set_read_timeout(Some(PATIENCE)).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_nightporter-sample"))
            .env("DBUS_SESSION_BUS_ADDRESS", &bus.address)
            .env("NIGHTPORTER_SAMPLE_MODE", "shared")
            .env("NIGHTPORTER_SAMPLE_NAME", name)
            .env("NIGHTPORTER_SAMPLE_BALLAST_KIB", "64")
            .env("NIGHTPORTER_SAMPLE_REPORT", &socket)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, reports, _dir: dir }
    }

    fn next(&self, event: &str) -> serde_json::Value {
        let mut buffer = vec![0; 65536];
        loop {
            let length = self.reports.recv(&mut buffer).unwrap_or_else(|error| panic!("no {event}: {error}"));
            let report: serde_json::Value = serde_json::from_slice(&buffer[..length]).unwrap();
            if report["event"] == event {
                return report;
            }
        }
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_frozen_app_is_thawed_for_a_message_from_ntfy_and_frozen_again() {
    let (ntfy, bus) = (Ntfy::start(""), Bus::start());
    let times =
        "[lifecycle]\ngrace = \"100ms\"\npage-out-after = \"1h\"\ntombstone-after = \"2h\"\nawake-window = \"100ms\"";
    let porter = Porter::start(&bus, &ntfy.url(), "", times);
    let app = "org.example.Sample";
    let sample = Sample::start(&bus, app);
    let endpoint = sample.next("endpoint")["endpoint"].as_str().unwrap().to_owned();
    let mut publisher = publisher(&ntfy);
    for n in 0..3 {
        porter.wait("the app to be frozen", |porter| porter.state_of(app) == "frozen");
        assert_ne!(held(sample.child.id()), Held::No, "it is said to be frozen and is not");
        let body = format!("message {n}");
        publisher.publish(&endpoint, body.as_bytes()).unwrap();
        assert_eq!(sample.next("message")["body"], body);
    }
    assert_eq!(porter.status().messages.accepted, 3);
}
