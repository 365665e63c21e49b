//! The real `nightporter` against a daemon played by this test on a private bus: what it prints, what it exits with.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;
use zbus::{Connection, DBusError, block_on, connection::Builder, interface};

const NOWHERE: &str = "unix:path=/nonexistent/bus";

/// A bus of its own.
struct Bus {
    daemon: Child,
    address: String,
    _dir: TempDir,
}

impl Bus {
    fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let config = dir.path().join("bus.conf");
        fs::write(
            &config,
            format!(
                r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={}</listen>
  <policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy>
</busconfig>"#,
                dir.path().join("bus").display()
            ),
        )
        .unwrap();
        let mut daemon = Command::new("dbus-daemon")
            .args(["--nofork", "--print-address=1"])
            .arg(format!("--config-file={}", config.display()))
            .stdout(Stdio::piped())
            .spawn()
            .expect("dbus-daemon is needed for this test (package dbus-daemon)");
        let mut address = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Self { daemon, address: address.trim().to_owned(), _dir: dir }
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[derive(Debug, DBusError)]
#[zbus(prefix = "org.nightporter1.Error")]
enum Refusal {
    #[zbus(error)]
    ZBus(zbus::Error),
    NotAuthorized(String),
    NoSuchApp(String),
    NotRunning(String),
    Refused(String),
    Failed(String),
}

/// What the daemon would say.
struct Fake {
    endpoints: Value,
}

impl Fake {
    fn refusal(app: &str) -> Result<(), Refusal> {
        match app {
            "org.example.Forbidden" => Err(Refusal::NotAuthorized("you may not act on it".into())),
            "org.example.Vanished" => Err(Refusal::NoSuchApp("it has just gone".into())),
            "org.example.Off" => Err(Refusal::NotRunning("it is not running".into())),
            "org.example.Bus" => Err(Refusal::Refused("it is the message bus".into())),
            "org.example.Broken" => Err(Refusal::Failed("its cgroup cannot be written".into())),
            _ => Ok(()),
        }
    }
}

#[interface(name = "org.nightporter1.Manager")]
impl Fake {
    fn status(&self) -> String {
        status().to_string()
    }

    fn apps(&self) -> String {
        apps().to_string()
    }

    fn show(&self, app: &str) -> Result<String, Refusal> {
        Self::refusal(app)?;
        Ok(show(app).to_string())
    }

    fn why(&self, app: &str) -> Result<String, Refusal> {
        Self::refusal(app)?;
        Ok(why(app).to_string())
    }

    fn report(&self) -> String {
        report().to_string()
    }

    fn endpoints(&self, app: &str) -> Result<String, Refusal> {
        Self::refusal(app)?;
        Ok(self.endpoints.to_string())
    }

    fn freeze(&self, app: &str, #[zbus(header)] header: zbus::message::Header<'_>) -> Result<(), Refusal> {
        // polkit may have a password asked for.
        assert!(header.primary().flags().contains(zbus::message::Flags::ALLOW_INTERACTIVE_AUTH));
        Self::refusal(app)
    }

    fn thaw(&self, app: &str) -> Result<(), Refusal> {
        Self::refusal(app)
    }

    fn kill(&self, app: &str) -> Result<(), Refusal> {
        Self::refusal(app)
    }

    #[zbus(name = "Move")]
    fn relocate(&self, app: &str, upstream: &str) -> zbus::fdo::Result<()> {
        match (app, upstream) {
            ("im.dino.Dino" | "", "home") => Ok(()),
            _ => Err(zbus::fdo::Error::InvalidArgs(format!("\"{app}\" to \"{upstream}\""))),
        }
    }
}

/// A bus with the fake daemon on it.
struct World {
    bus: Bus,
    _daemon: Connection,
}

impl World {
    fn new(endpoints: Value) -> Self {
        let bus = Bus::start();
        let daemon = Builder::address(bus.address.as_str())
            .serve_at("/org/nightporter1", Fake { endpoints })
            .name("org.nightporter1");
        let daemon = block_on(daemon.build()).unwrap();
        Self { bus, _daemon: daemon }
    }

    fn run(&self, args: &[&str]) -> Output {
        run(&self.bus.address, NOWHERE, args)
    }

    fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.text(args)).unwrap()
    }

    /// Fails with this code; gives back what it says.
    fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?} printed a result and failed");
        stderr(&output)
    }
}

fn run(session: &str, system: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nightporter"))
        .args(args)
        .env("DBUS_SESSION_BUS_ADDRESS", session)
        .env("DBUS_SYSTEM_BUS_ADDRESS", system)
        .env("no_proxy", "127.0.0.1")
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn status() -> Value {
    json!({
        "version": "0.1.0", "profile": "tombstone", "buses": ["user 1000"], "apps": 2, "registrations": 3,
        "upstreams": [{ "name": "mozilla", "kind": "autopush", "state": "waiting", "since_secs": 185,
            "retry_in_secs": 12, "last_error": "cannot connect", "registrations": 3, "heartbeat_secs": 300,
            "heartbeat_by": "server" }],
        "messages_waiting": 1, "troubles": ["The disk is full."],
        "pressure": { "level": "moderate", "since_secs": 3, "reason": "memory is short: tasks waited for it 12 % of the last 10 s",
            "paged_out": 2, "ended": 1 },
        "messages": { "received": 9, "duplicates": 1, "accepted": 7, "expired": 0, "replaced": 0, "given_up": 1,
            "overflowed": 0, "unregistered": 0, "unusable": 0 },
        "a field of a newer daemon": true
    })
}

fn line(name: &str) -> Value {
    json!({ "name": name, "bus": "user 1000", "state": "frozen", "since_secs": 185, "pid": 4711,
        "registrations": 1, "waiting": 0, "reason": "in the background for 10 s" })
}

fn apps() -> Value {
    let names = [
        "im.dino.Dino",
        "org.gnome.Fractal",
        "com.example.Fractal",
        "org.example.Forbidden",
        "org.example.Vanished",
        "org.example.Off",
        "org.example.Bus",
        "org.example.Broken",
    ];
    Value::Array(names.into_iter().map(line).collect())
}

fn row(name: &str) -> Value {
    let memory = |pss: u64| json!({ "pss": pss, "uss": pss - 100, "swap": 0 });
    json!({ "name": name, "state": "frozen", "resident": memory(10240), "measured": "2026-11-22T01:39:00Z",
        "frozen": memory(10240), "paged_out": memory(1024), "now": memory(1024), "saved": 9216 })
}

fn show(name: &str) -> Value {
    let mut show = line(name);
    show["freezer"] = json!("cgroup2");
    show["protected"] = Value::Null;
    show["registered"] = json!([{ "token": "{a-token}", "description": "Messages\u{1b}[2J", "upstream": "mozilla",
        "version": 2, "vapid": true, "waiting": 0 }]);
    show["memory"] = row(name);
    show
}

fn why(name: &str) -> Value {
    json!({ "name": name, "state": "frozen", "decisions": [
        { "at": "2026-11-22T01:39:00Z", "verdict": "freeze", "reason": "in the background for 10 s" },
        { "at": "2026-11-22T01:40:00Z", "verdict": "page-out", "reason": "frozen for 60 s" }] })
}

fn report() -> Value {
    json!({ "at": "2026-11-22T01:39:00Z", "profile": "tombstone", "apps": [row("im.dino.Dino")],
        "daemon": { "pss": 3072, "uss": 3000, "swap": 0 }, "zram": 512, "resident": 10240, "now": 1024,
        "saved": 5632, "unmeasured": 1 })
}

#[test]
fn help_shows_the_commands_and_not_the_packagers_ones() {
    let output = run(NOWHERE, NOWHERE, &["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = String::from_utf8(output.stdout).unwrap();
    for command in
        ["status", "apps", "show", "why", "freeze", "thaw", "kill", "move", "forget-user", "push", "report", "demo"]
    {
        assert!(help.contains(&format!("\n  {command} ")), "{command} is missing:\n{help}");
    }
    assert!(!help.contains("completions"));
    let demo = run(NOWHERE, NOWHERE, &["demo", "--help"]);
    assert!(String::from_utf8(demo.stdout).unwrap().contains("NIGHTPORTER_SAMPLE_SERVER"));
}

#[test]
fn wrong_use_is_64() {
    for args in [&["frobnicate"][..], &[], &["show"], &["--user", "--system", "apps"], &["demo", "--apps", "0"]] {
        let output = run(NOWHERE, NOWHERE, args);
        assert_eq!(output.status.code(), Some(64), "{args:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn without_a_daemon_it_says_where_it_looked_and_how_to_start_one() {
    let bus = Bus::start();
    let output = run(&bus.address, NOWHERE, &["status"]);
    assert_eq!(output.status.code(), Some(69));
    let text = stderr(&output);
    for expected in ["session bus: org.nightporter1 is not there", "system bus: cannot connect", "nightporterd --user"]
    {
        assert!(text.contains(expected), "{expected} is missing:\n{text}");
    }
    let text = stderr(&run(&bus.address, NOWHERE, &["--user", "status"]));
    assert!(!text.contains("system bus"), "{text}");
}

#[test]
fn the_system_bus_is_asked_when_the_session_has_no_daemon() {
    let world = World::new(json!([]));
    let empty = Bus::start();
    let output = run(&empty.address, &world.bus.address, &["apps", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let output = run(&empty.address, &world.bus.address, &["--user", "apps"]);
    assert_eq!(output.status.code(), Some(69));
    let output = run(&empty.address, &world.bus.address, &["apps", "--system"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn json_is_the_daemons_document_as_it_is() {
    let world = World::new(json!([]));
    assert_eq!(world.json(&["status", "--json"]), status());
    assert_eq!(world.json(&["apps", "--json"]), apps());
    assert_eq!(world.json(&["report", "--json"]), report());
    assert_eq!(world.json(&["show", "im.dino.Dino", "--json"]), show("im.dino.Dino"));
    assert_eq!(world.json(&["why", "--json", "dino"]), why("im.dino.Dino"));
    for command in ["freeze", "thaw", "kill"] {
        assert_eq!(world.json(&[command, "dino", "--json"]), json!({ "app": "im.dino.Dino", "done": true }));
    }
}

#[test]
fn text_is_aligned_and_says_what_matters() {
    let world = World::new(json!([]));
    let text = world.text(&["status"]);
    for expected in [
        "profile tombstone",
        "mozilla (autopush): waiting for 3 min, next try in 12 s",
        "3 registrations\n",
        "heartbeat every 5 min, set by the server",
        "last error: cannot connect",
        "1 given up",
        "memory is short: tasks waited for it 12 %",
        "2 page-outs and 1 ended apps",
        "! The disk is full.",
    ] {
        assert!(text.contains(expected), "{expected} is missing:\n{text}");
    }
    let text = world.text(&["apps"]);
    let column = text.lines().next().unwrap().find("STATE").unwrap();
    assert!(text.lines().skip(1).all(|line| line[column..].starts_with("frozen")), "{text}");
    let text = world.text(&["show", "dino"]);
    for expected in ["cgroup v2", "10.0 MiB (measured 2026-11-22T01:39:00Z)", "{a-token}", "yes"] {
        assert!(text.contains(expected), "{expected} is missing:\n{text}");
    }
    assert!(!text.contains('\u{1b}'), "an app's description reached the terminal as it is");
    let text = world.text(&["why", "dino"]);
    assert!(text.contains("2026-11-22T01:40:00Z  page-out  frozen for 60 s\n"), "{text}");
    let text = world.text(&["report"]);
    for expected in ["5.5 MiB", "3.0 MiB", "1 app is without a baseline"] {
        assert!(text.contains(expected), "{expected} is missing:\n{text}");
    }
    assert!(!text.contains('█'), "bars are for terminals only");
    assert_eq!(world.text(&["freeze", "dino"]), "im.dino.Dino: frozen\n");
}

#[test]
fn apps_move_to_another_upstream() {
    let world = World::new(json!([]));
    let text = world.text(&["move", "dino", "home"]);
    assert!(text.starts_with("im.dino.Dino: home from now on"), "{text}");
    assert!(world.text(&["move", "--all", "home"]).starts_with("All apps: home from now on"));
    let moved = json!({ "app": "im.dino.Dino", "upstream": "home", "done": true });
    assert_eq!(world.json(&["move", "dino", "home", "--json"]), moved);
    assert_eq!(world.json(&["move", "--all", "home", "--json"])["app"], Value::Null);
    assert!(world.fails(64, &["move", "dino", "nowhere"]).contains("\"im.dino.Dino\" to \"nowhere\""));
    world.fails(67, &["move", "dimo", "home"]);
    for wrong in [&["move"][..], &["move", "home"], &["move", "--all"], &["move", "--all", "dino", "home"]] {
        world.fails(64, wrong);
    }
}

#[test]
fn the_end_of_a_name_is_enough_unless_it_fits_several() {
    let world = World::new(json!([]));
    assert!(world.text(&["show", "Dino"]).contains("im.dino.Dino"));
    assert!(world.text(&["show", "gnome.Fractal"]).contains("org.gnome.Fractal"));
    let text = world.fails(64, &["show", "fractal"]);
    assert!(text.contains("org.gnome.Fractal") && text.contains("com.example.Fractal"), "{text}");
    let text = world.fails(67, &["show", "dimo"]);
    assert!(text.contains("im.dino.Dino"), "{text}");
}

#[test]
fn each_error_of_the_daemon_has_its_exit_code() {
    let world = World::new(json!([]));
    assert!(world.fails(77, &["freeze", "forbidden"]).contains("root"));
    assert!(world.fails(67, &["why", "vanished"]).contains("gone"));
    assert!(world.fails(75, &["thaw", "off"]).contains("not running"));
    assert!(world.fails(1, &["freeze", "org.example.Bus"]).contains("it is the message bus"));
    assert!(world.fails(70, &["kill", "broken"]).contains("cgroup"));
}

#[test]
fn a_push_goes_to_autopush_as_web_push() {
    let (url, requests) = push_server("HTTP/1.1 201 Created\r\nLocation: http://127.0.0.1/m/1\r\n");
    let endpoint = format!("{url}/wpush/v1/secret");
    let world = World::new(json!([{ "token": "t", "endpoint": endpoint, "vapid": false, "kind": "autopush" }]));
    let text = world.text(&["push", "dino", "Hello there"]);
    assert!(text.contains("201") && text.contains("not encrypted"), "{text}");
    let request = requests.recv_timeout(Duration::from_secs(5)).unwrap();
    let head = request.to_ascii_lowercase();
    assert!(request.starts_with("POST /wpush/v1/secret HTTP/1.1"), "{request}");
    for header in ["ttl: 60", "urgency: normal", "content-encoding: aes128gcm"] {
        assert!(head.contains(&format!("\r\n{header}\r\n")), "{header} is missing:\n{request}");
    }
    assert!(request.ends_with("\r\n\r\nHello there"), "{request}");
    let document = world.json(&["push", "dino", "Hello", "--json"]);
    let expected = json!({ "app": "im.dino.Dino", "token": "t", "status": 201, "location": "http://127.0.0.1/m/1" });
    assert_eq!(document, expected);
}

#[test]
fn a_push_goes_to_ntfy_in_unified_push_mode() {
    let (url, requests) = push_server("HTTP/1.1 200 OK\r\n");
    for (endpoint, path) in [("/upTopic", "/upTopic?up=1"), ("/upTopic?up=1", "/upTopic?up=1")] {
        let endpoint = format!("{url}{endpoint}");
        let world = World::new(json!([{ "token": "t", "endpoint": endpoint, "vapid": false, "kind": "ntfy" }]));
        world.text(&["push", "dino", "Hello"]);
        let request = requests.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(request.starts_with(&format!("POST {path} ")), "{request}");
        assert!(!request.to_ascii_lowercase().contains("content-encoding"), "{request}");
    }
}

#[test]
fn several_registrations_want_a_choice() {
    let (url, requests) = push_server("HTTP/1.1 201 Created\r\n");
    let endpoint = |token: &str| {
        let endpoint = format!("{url}/{token}");
        json!({ "token": token, "endpoint": endpoint, "vapid": false, "kind": "autopush" })
    };
    let world = World::new(json!([endpoint("one"), endpoint("two")]));
    let text = world.fails(64, &["push", "dino", "Hello"]);
    assert!(text.contains("one") && text.contains("two") && text.contains("--registration"), "{text}");
    world.text(&["push", "dino", "Hello", "--registration", "two"]);
    assert!(requests.recv_timeout(Duration::from_secs(5)).unwrap().starts_with("POST /two "));
    assert!(world.fails(67, &["push", "dino", "Hello", "--registration", "three"]).contains("one"));
}

#[test]
fn a_push_that_cannot_work_says_why() {
    let vapid = json!([{ "token": "t", "endpoint": "http://127.0.0.1:9/", "vapid": true, "kind": "autopush" }]);
    let world = World::new(vapid);
    assert!(world.fails(77, &["push", "dino", "Hello"]).contains("sign"));
    assert!(world.fails(65, &["push", "dino", &"x".repeat(4097)]).contains("4096"));
    assert!(world.fails(65, &["push", "dino", ""]).contains("1 to 4096"));
    let world = World::new(json!([]));
    assert!(world.fails(67, &["push", "dino", "Hello"]).contains("no registration"));
    for (answer, code, expected) in [
        ("HTTP/1.1 410 Gone\r\n", 69, "register again"),
        ("HTTP/1.1 429 Too Many Requests\r\n", 75, "later"),
        ("HTTP/1.1 413 Payload Too Large\r\n", 65, "too long"),
        ("HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\n", 76, "302"),
    ] {
        let (url, _requests) = push_server(answer);
        let world = World::new(json!([{ "token": "t", "endpoint": url, "vapid": false, "kind": "autopush" }]));
        let text = world.fails(code, &["push", "dino", "Hello"]);
        assert!(text.contains(expected), "{answer}: {text}");
    }
}

#[test]
fn a_demo_without_dbus_daemon_names_the_package() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nightporter"));
    let output = command.arg("demo").env("PATH", "/nonexistent").output().unwrap();
    assert_eq!(output.status.code(), Some(69), "{}", stderr(&output));
    assert!(stderr(&output).contains("apt install dbus-daemon"), "{}", stderr(&output));
}

#[test]
fn the_manual_page_is_the_one_the_program_prints() {
    let output = run(NOWHERE, NOWHERE, &["man"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("man/nightporter.1");
    let kept = fs::read_to_string(page).unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(printed, kept, "run: nightporter man > man/nightporter.1");
}

/// They are kept in the tree because a package for another architecture cannot run the program it has built.
#[test]
fn the_completions_are_those_the_program_prints() {
    for (shell, file) in [("bash", "nightporter.bash"), ("fish", "nightporter.fish"), ("zsh", "_nightporter")] {
        let output = run(NOWHERE, NOWHERE, &["completions", shell]);
        assert_eq!(output.status.code(), Some(0));
        let kept = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("completions").join(file)).unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        assert_eq!(printed, kept, "run: nightporter completions {shell} > completions/{file}");
    }
}

/// A push server that gives every request this answer. Gives back its URL and the requests it gets.
fn push_server(answer: &'static str) -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, requests) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = sender.send(answer_request(stream.unwrap(), answer));
        }
    });
    (url, requests)
}

fn answer_request(stream: TcpStream, answer: &str) -> String {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        assert!(reader.read_line(&mut request).unwrap() > 0, "the request ended early");
    }
    let length = request
        .lines()
        .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.trim().parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    request.push_str(std::str::from_utf8(&body).unwrap());
    write!(reader.get_mut(), "{answer}Content-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
    request
}
