//! From the HTTP POST at the real ntfy to the first line of the app's handler, and what a message costs the daemon.
//!
//! `cargo bench --bench latency -- [--messages N] [--burst N] [--only PART]`; `PART` is `latency`, `cpu` or `burst`.
//! Tables, then one line of JSON. Ends with 1 only when a message was lost; targets that are missed are marked.
//!
//! The arms take turns message by message, 20 ms apart, so that whatever else the machine does meets all of them:
//!
//! - `subscriber + call`, the floor: a thread reads ntfy's WebSocket and, on receipt, writes one D-Bus call to the app's
//!   connector into a socket, without any library. Nobody who does the job at all can do less.
//! - `subscriber` and `plain call`: its halves. The first is the floor's own time stamp between the two; the second is a
//!   call by a client that slept before, as a distributor's would have if receiving had been free.
//! - `running` and `frozen`: through the daemon.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark's output is its point")]

#[path = "../tests/ntfy/held.rs"]
mod held;
#[path = "../tests/ntfy/server.rs"]
#[expect(dead_code, clippy::unwrap_used, reason = "shared with the tests, which need more of it and may panic")]
mod server;
#[expect(dead_code, reason = "shared with the other benchmarks")]
mod support;

use std::{
    collections::HashMap,
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    os::unix::net::{UnixDatagram, UnixStream},
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::mpsc::{self, Receiver, Sender},
    thread,
    time::{Duration, Instant},
};

use nightporter::sys::clock;
use nix::{sys::signal, time::clock_getcpuclockid, unistd::Pid};
use serde_json::{Value, json};
use tungstenite::stream::MaybeTlsStream;
use zbus::{Connection, Message, Variant, connection::Builder};

use held::{Held, held};
use server::{Ntfy, Publisher};
use support::{
    Result,
    bus::PrivateBus,
    memory::{Memory, settled},
    stats::percentile,
};

const RUNNING: &str = "org.example.Running";
const FROZEN: &str = "org.example.Frozen";
const WARM_UP: usize = 20;
const GAP: Duration = Duration::from_millis(20);
const PAYLOAD: usize = 100;
/// A message that has not come by then is lost.
const PATIENCE: Duration = Duration::from_secs(10);
/// Writes that may wait are made within this.
const LAZY: Duration = Duration::from_secs(3);
const MAX_RUNNING: f64 = 1.3;
const MAX_FROZEN: f64 = 1.6;
const MAX_CPU: Duration = Duration::from_micros(400);
const MAX_GROWTH: f64 = 1.1;

struct Options {
    messages: usize,
    burst: usize,
    only: Option<String>,
}

fn main() -> ExitCode {
    match options().and_then(|options| run(&options)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(lost) => {
            eprintln!("latency: {lost} messages were lost");
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("latency: {error}");
            ExitCode::from(2)
        }
    }
}

fn options() -> Result<Options> {
    let mut options = Options { messages: 300, burst: 1000, only: None };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} takes a value"));
        match arg.as_str() {
            "--messages" => options.messages = value()?.parse()?,
            "--burst" => options.burst = value()?.parse()?,
            "--only" => options.only = Some(value()?),
            // cargo bench says so.
            "--bench" => {}
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<usize> {
    let dir = tempfile::tempdir()?;
    let ntfy = Ntfy::start("");
    let bus = PrivateBus::start(dir.path())?;
    let mut world = World::start(dir.path(), &ntfy, &bus)?;
    let wanted = |part: &str| options.only.as_deref().is_none_or(|only| only == part);
    let mut figures = json!({ "messages": options.messages });
    let mut lost = 0;
    if wanted("latency") {
        lost += latency(&mut world, options.messages, &mut figures)?;
    }
    if wanted("cpu") {
        lost += cpu(&mut world, options.messages, &mut figures)?;
    }
    if wanted("burst") {
        lost += burst(&mut world, &ntfy, options.burst, &mut figures)?;
    }
    world.end()?;
    figures["lost"] = json!(lost);
    println!("{figures}");
    Ok(lost)
}

/// A process that is ended when dropped, however that happens.
struct Process(std::process::Child);

impl Process {
    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn nix_pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(self.pid().try_into()?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What an app saw: the text, and when.
struct Report {
    body: String,
    at: u64,
}

/// An app, and what it reports.
struct App {
    process: Process,
    endpoint: String,
    reports: Receiver<Report>,
}

struct World {
    daemon: Process,
    running: App,
    frozen: App,
    publisher: Publisher,
    /// When the floor's subscriber had the message.
    received: Receiver<u64>,
    floor_endpoint: String,
    caller: Caller,
}

impl World {
    fn start(dir: &Path, ntfy: &Ntfy, bus: &PrivateBus) -> Result<Self> {
        let config = dir.join("nightporter.toml");
        fs::write(
            &config,
            format!(
                "profile = \"tombstone\"\n[[upstream]]\nname = \"ntfy\"\nkind = \"ntfy\"\nurl = \"{}\"\n[lifecycle]\n\
                 grace = \"100ms\"\npage-out-after = \"1h\"\ntombstone-after = \"2h\"\nawake-window = \"50ms\"\n\
                 [limits]\nwakes-per-hour = 3600\n",
                ntfy.url()
            ),
        )?;
        let daemon = Process(
            Command::new(env!("CARGO_BIN_EXE_nightporterd"))
                .arg("--user")
                .arg("--config")
                .arg(&config)
                .arg("--state-dir")
                .arg(dir.join("state"))
                .env("DBUS_SESSION_BUS_ADDRESS", &bus.address)
                .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent")
                .env_remove("NOTIFY_SOCKET")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(dir.join("daemon.log"))?)
                .spawn()?,
        );
        let client = zbus::block_on(Builder::address(bus.address.as_str()).build())?;
        wait_for_name(&client, "org.unifiedpush.Distributor.nightporter")?;
        let running = App::start(dir, bus, RUNNING)?;
        let frozen = App::start(dir, bus, FROZEN)?;
        // It would be frozen like the other: the samples say that they are in the background.
        zbus::block_on(client.call_method(
            Some("org.nightporter1"),
            "/org/nightporter1",
            Some("org.nightporter1.App"),
            "SetStateOf",
            &(RUNNING, "foreground"),
        ))?;
        let connector = zbus::block_on(async {
            let bus = zbus::fdo::DBusProxy::new(&client).await?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(
                bus.get_name_owner(RUNNING.try_into()?).await?.to_string(),
            )
        })?;
        let topic = "upfloor0000000000000000000000000000";
        let received = subscribe(ntfy, topic, Caller::connect(bus, &connector)?)?;
        Ok(Self {
            daemon,
            running,
            frozen,
            publisher: Publisher::new(ntfy.port())?,
            received,
            floor_endpoint: format!("{}{topic}?up=1", ntfy.url()),
            caller: Caller::connect(bus, &connector)?,
        })
    }

    /// Ends the daemon in order: nothing stays frozen, no cgroup stays behind.
    fn end(mut self) -> Result<()> {
        signal::kill(self.daemon.nix_pid()?, signal::Signal::SIGTERM)?;
        let status = self.daemon.0.wait()?;
        if !status.success() {
            return Err(format!("the daemon ended with {status}").into());
        }
        Ok(())
    }
}

impl App {
    fn start(dir: &Path, bus: &PrivateBus, name: &str) -> Result<Self> {
        let socket = dir.join(name);
        let incoming = UnixDatagram::bind(&socket)?;
        let process = Process(
            Command::new(env!("CARGO_BIN_EXE_nightporter-sample"))
                .env("DBUS_SESSION_BUS_ADDRESS", &bus.address)
                .env("NIGHTPORTER_SAMPLE_MODE", "shared")
                .env("NIGHTPORTER_SAMPLE_NAME", name)
                .env("NIGHTPORTER_SAMPLE_BALLAST_KIB", "1024")
                .env("NIGHTPORTER_SAMPLE_REPORT", &socket)
                .stdin(Stdio::null())
                .spawn()?,
        );
        let (sender, reports) = mpsc::channel();
        let (endpoint_sender, endpoints) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            while let Ok(length) = incoming.recv(&mut buffer) {
                let Ok(report) = serde_json::from_slice::<Value>(&buffer[..length]) else { continue };
                let text = |key: &str| report[key].as_str().unwrap_or_default().to_owned();
                let told = match report["event"].as_str() {
                    Some("endpoint") => endpoint_sender.send(text("endpoint")).is_ok(),
                    Some("message") => {
                        let at = report["boottime_ns"].as_u64().unwrap_or_default();
                        sender.send(Report { body: text("body"), at }).is_ok()
                    }
                    _ => true,
                };
                if !told && report["event"] == "message" {
                    return;
                }
            }
        });
        let endpoint = endpoints.recv_timeout(PATIENCE).map_err(|_| format!("{name} got no endpoint"))?;
        Ok(Self { process, endpoint, reports })
    }

    /// Waits for the message that begins with `mark`; when it was in the handler, none if it is lost.
    fn got(&self, mark: &str) -> Option<u64> {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let report = self.reports.recv_timeout(left).ok()?;
            if report.body.split('.').next() == Some(mark) {
                return Some(report.at);
            }
        }
    }
}

fn wait_for_name(client: &Connection, name: &str) -> Result<()> {
    for _ in 0..200 {
        let owned = zbus::block_on(async {
            let bus = zbus::fdo::DBusProxy::new(client).await?;
            bus.name_has_owner(name.try_into()?).await
        })?;
        if owned {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    Err(format!("nobody takes the name {name}").into())
}

/// Reads `topic` on a thread that first of all passes each text on to the connector. Then its time is told.
fn subscribe(ntfy: &Ntfy, topic: &str, mut caller: Caller) -> Result<Receiver<u64>> {
    let (times, received) = mpsc::channel();
    let mut socket = open(ntfy, topic)?;
    thread::spawn(move || {
        while let Ok(frame) = socket.read() {
            let at = clock::boot().as_nanos();
            let tungstenite::Message::Text(text) = frame else { continue };
            let Some(body) = body_of(&text) else { continue };
            if caller.call(&body).is_err() || times.send(at).is_err() {
                return;
            }
        }
    });
    Ok(received)
}

type Socket = tungstenite::WebSocket<MaybeTlsStream<TcpStream>>;

fn open(ntfy: &Ntfy, topic: &str) -> Result<Socket> {
    let (mut socket, _) = tungstenite::connect(format!("ws://127.0.0.1:{}/{topic}/ws", ntfy.port()))?;
    if let MaybeTlsStream::Plain(stream) = socket.get_ref() {
        stream.set_nodelay(true)?;
    }
    let first = socket.read()?;
    if !first.to_text()?.contains("\"open\"") {
        return Err(format!("ntfy says {first}").into());
    }
    Ok(socket)
}

fn body_of(text: &str) -> Option<String> {
    let event: Value = serde_json::from_str(text).ok()?;
    if event["event"] == "message" { event["message"].as_str().map(str::to_owned) } else { None }
}

/// A connection to the bus with nothing in it but the socket.
struct Caller {
    socket: UnixStream,
    connector: String,
}

impl Caller {
    fn connect(bus: &PrivateBus, connector: &str) -> Result<Self> {
        let path = bus.address.strip_prefix("unix:path=").and_then(|rest| rest.split(',').next());
        let mut socket = UnixStream::connect(path.ok_or("the bus is not at a path")?)?;
        let uid: String = nix::unistd::geteuid().to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
        socket.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(&socket).read_line(&mut line)?;
        if !line.starts_with("OK ") {
            return Err(format!("the bus says {line:?}").into());
        }
        socket.write_all(b"BEGIN\r\n")?;
        let hello = Message::method_call("/org/freedesktop/DBus", "Hello")
            .destination("org.freedesktop.DBus")
            .interface("org.freedesktop.DBus")
            .build(&())?;
        socket.write_all(hello.data().bytes())?;
        // Whatever comes back is read, so that the bus does not hold it, and not looked at.
        let mut replies = socket.try_clone()?;
        thread::spawn(move || std::io::copy(&mut replies, &mut std::io::sink()));
        Ok(Self { socket, connector: connector.to_owned() })
    }

    /// One plain call of the connector; its answer is not waited for.
    fn call(&mut self, body: &str) -> Result<()> {
        let args: HashMap<&str, Variant<'_>> = HashMap::from([
            ("token", Variant::from("floor")),
            ("message", Variant::from(body.as_bytes().to_vec())),
            ("id", Variant::from("floor")),
        ]);
        let message = Message::method_call("/org/unifiedpush/Connector", "Message")
            .destination(self.connector.as_str())
            .interface("org.unifiedpush.Connector2")
            .build(&args)?;
        Ok(self.socket.write_all(message.data().bytes())?)
    }
}

fn body(mark: &str) -> String {
    format!("{mark}.{}", "x".repeat(PAYLOAD - mark.len() - 1))
}

#[derive(Default)]
struct Times {
    chained: Vec<Duration>,
    subscriber: Vec<Duration>,
    plain: Vec<Duration>,
    running: Vec<Duration>,
    frozen: Vec<Duration>,
}

fn latency(world: &mut World, messages: usize, figures: &mut Value) -> Result<usize> {
    let mut times = Times::default();
    let mut lost = 0;
    let mut freezer = Held::No;
    let since = |start: u64, at: u64| Duration::from_nanos(at.saturating_sub(start));
    for n in 0..WARM_UP + messages {
        let measured = n >= WARM_UP;
        let mut note = |times: &mut Vec<Duration>, start: u64, at: Option<u64>| match at {
            Some(at) if measured => times.push(since(start, at)),
            Some(_) => {}
            None => lost += 1,
        };

        let mark = format!("floor{n}");
        let start = clock::boot().as_nanos();
        world.publisher.publish(&world.floor_endpoint, body(&mark).as_bytes())?;
        note(&mut times.chained, start, world.running.got(&mark));
        note(&mut times.subscriber, start, world.received.recv_timeout(PATIENCE).ok());
        thread::sleep(GAP);

        let mark = format!("plain{n}");
        let text = body(&mark);
        let start = clock::boot().as_nanos();
        world.caller.call(&text)?;
        note(&mut times.plain, start, world.running.got(&mark));
        thread::sleep(GAP);

        let mark = format!("running{n}");
        let start = clock::boot().as_nanos();
        world.publisher.publish(&world.running.endpoint, body(&mark).as_bytes())?;
        note(&mut times.running, start, world.running.got(&mark));
        thread::sleep(GAP);

        freezer = wait_frozen(world.frozen.process.pid())?;
        thread::sleep(GAP);
        let mark = format!("frozen{n}");
        let start = clock::boot().as_nanos();
        world.publisher.publish(&world.frozen.endpoint, body(&mark).as_bytes())?;
        note(&mut times.frozen, start, world.frozen.got(&mark));
        thread::sleep(GAP);
    }
    show_latency(&times, freezer, figures);
    Ok(lost)
}

fn wait_frozen(pid: u32) -> Result<Held> {
    let until = Instant::now() + PATIENCE;
    loop {
        match held(pid) {
            Held::No if Instant::now() > until => return Err("the app is not frozen".into()),
            Held::No => thread::sleep(Duration::from_millis(5)),
            by => return Ok(by),
        }
    }
}

fn show_latency(times: &Times, freezer: Held, figures: &mut Value) {
    let freezer = if freezer == Held::Signal { "signal" } else { "cgroup2" };
    println!("{:<30}{:>9}{:>9}{:>9}{:>10}{:>10}", "POST to handler, µs", "p50", "p95", "p99", "× floor", "at most");
    let floor = percentile(&times.chained, 50).as_secs_f64();
    let mut row = |name: &str, key: &str, times: &[Duration], most: Option<f64>| {
        let of = |percent| percentile(times, percent).as_nanos() as f64 / 1000.0;
        let ratio = percentile(times, 50).as_secs_f64() / floor;
        let verdict =
            most.map_or_else(String::new, |most| format!("{most}{}", if ratio > most { " MISSED" } else { "" }));
        println!("{name:<30}{:>9.0}{:>9.0}{:>9.0}{ratio:>10.2}{verdict:>10}", of(50), of(95), of(99));
        figures["latency_us"][key] = json!({ "p50": of(50), "p95": of(95), "p99": of(99), "ratio": ratio });
    };
    row("subscriber + call (the floor)", "floor", &times.chained, None);
    row("  subscriber", "subscriber", &times.subscriber, None);
    row("  plain call", "plain_call", &times.plain, None);
    row("daemon, running", "running", &times.running, Some(MAX_RUNNING));
    row(&format!("daemon, frozen ({freezer})"), "frozen", &times.frozen, Some(MAX_FROZEN));
    let sum = percentile(&times.subscriber, 50) + percentile(&times.plain, 50);
    let to_sum = |times: &[Duration]| percentile(times, 50).as_secs_f64() / sum.as_secs_f64();
    println!(
        "{:<30}{:>9.0}   running {:.2}, frozen {:.2} times that",
        "sum of the halves' p50",
        sum.as_nanos() as f64 / 1000.0,
        to_sum(&times.running),
        to_sum(&times.frozen)
    );
    figures["freezer"] = json!(freezer);
    figures["latency_us"]["sum_of_halves"] = json!({
        "p50": sum.as_nanos() as f64 / 1000.0,
        "running_ratio": to_sum(&times.running),
        "frozen_ratio": to_sum(&times.frozen),
    });
}

/// CPU time of all threads of a process, those that ended included.
fn cpu_time(process: &Process) -> Result<Duration> {
    Ok(clock_getcpuclockid(process.nix_pid()?)?.now()?.into())
}

fn cpu(world: &mut World, messages: usize, figures: &mut Value) -> Result<usize> {
    thread::sleep(LAZY);
    let mut lost = 0;
    println!();
    println!("{:<30}{:>9}{:>29}", "CPU of the daemon, µs", "a message", "at most");
    for (name, key, frozen) in [("running", "running", false), ("frozen", "frozen", true)] {
        let app = if frozen { &world.frozen } else { &world.running };
        let before = cpu_time(&world.daemon)?;
        for n in 0..messages {
            if frozen {
                wait_frozen(app.process.pid())?;
            }
            let mark = format!("cpu{n}");
            world.publisher.publish(&app.endpoint, body(&mark).as_bytes())?;
            lost += usize::from(app.got(&mark).is_none());
            thread::sleep(GAP);
        }
        thread::sleep(LAZY);
        let each = (cpu_time(&world.daemon)? - before) / u32::try_from(messages)?;
        let most = match frozen {
            false => format!("{}{}", MAX_CPU.as_micros(), if each > MAX_CPU { " MISSED" } else { "" }),
            true => String::new(),
        };
        println!("{:<30}{:>9.0}{most:>29}", format!("daemon, {name}"), each.as_nanos() as f64 / 1000.0);
        figures["cpu_us"][key] = json!(each.as_nanos() as f64 / 1000.0);
    }
    Ok(lost)
}

fn burst(world: &mut World, ntfy: &Ntfy, count: usize, figures: &mut Value) -> Result<usize> {
    let before = settled(world.daemon.pid())?;
    // ntfy itself lets messages overtake one another at full speed; this is what it really sent.
    let topic = world.running.endpoint.rsplit('/').next().and_then(|last| last.split('?').next()).unwrap_or_default();
    let mut witness = open(ntfy, topic)?;
    let (sender, sent) = mpsc::channel();
    thread::spawn(move || witness_all(&mut witness, &sender));
    let start = Instant::now();
    let cpu = cpu_time(&world.daemon)?;
    for n in 0..count {
        world.publisher.publish(&world.running.endpoint, body(&format!("burst{n}")).as_bytes())?;
    }
    let published = start.elapsed();
    let mut got = Vec::with_capacity(count);
    while got.len() < count
        && let Ok(report) = world.running.reports.recv_timeout(PATIENCE)
    {
        got.push(report.body);
    }
    let delivered = start.elapsed();
    thread::sleep(LAZY);
    let cpu = (cpu_time(&world.daemon)? - cpu) / u32::try_from(count)?;
    got.extend(world.running.reports.try_iter().map(|report| report.body));
    let sent: Vec<String> = sent.try_iter().collect();
    let after = settled(world.daemon.pid())?;

    let mut times: HashMap<&str, usize> = HashMap::new();
    for body in &got {
        *times.entry(body).or_default() += 1;
    }
    let lost = (0..count).filter(|n| !times.contains_key(body(&format!("burst{n}")).as_str())).count();
    let duplicated: usize = times.values().map(|times| times - 1).sum();
    let (ours, theirs) = (inversions(&got), inversions(&sent));
    let same_order = got == sent;
    let growth = after.pss as f64 / before.pss as f64;
    println!();
    println!("{:<30}{:>9}", format!("burst of {count}"), "");
    println!("{:<30}{:>9.0}   all delivered after {:.0} ms", "published in, ms", millis(published), millis(delivered));
    println!("{:<30}{lost:>9}", "lost");
    println!("{:<30}{duplicated:>9}", "duplicated");
    println!("{:<30}{ours:>9}   ntfy's own {theirs}; as ntfy sent them: {same_order}", "overtaken");
    println!("{:<30}{:>9.0}", "CPU a message, µs", cpu.as_nanos() as f64 / 1000.0);
    let verdict = if growth > MAX_GROWTH { " MISSED" } else { "" };
    println!(
        "{:<30}{:>9}   {} before, × {growth:.2} (at most {MAX_GROWTH}{verdict})",
        "PSS after, KiB", after.pss, before.pss
    );
    figures["burst"] = json!({
        "count": count,
        "published_ms": millis(published),
        "delivered_ms": millis(delivered),
        "lost": lost,
        "duplicated": duplicated,
        "overtaken": ours,
        "overtaken_by_ntfy": theirs,
        "same_order": same_order,
        "cpu_us": cpu.as_nanos() as f64 / 1000.0,
        "pss_kib": { "before": pss(before), "after": pss(after), "ratio": growth },
    });
    Ok(lost)
}

fn pss(memory: Memory) -> Value {
    json!({ "pss": memory.pss, "private_dirty": memory.private_dirty })
}

fn witness_all(socket: &mut Socket, sender: &Sender<String>) {
    while let Ok(frame) = socket.read() {
        if let Some(body) = frame.to_text().ok().and_then(body_of)
            && sender.send(body).is_err()
        {
            return;
        }
    }
}

/// How many messages came right after one that was published later.
fn inversions(bodies: &[String]) -> usize {
    let number =
        |body: &String| body.split('.').next().and_then(|mark| mark.strip_prefix("burst")?.parse::<u64>().ok());
    let numbers: Vec<u64> = bodies.iter().filter_map(number).collect();
    numbers.windows(2).filter(|pair| pair[0] > pair[1]).count()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
