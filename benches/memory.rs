//! What the idle daemon costs: 100 registered apps and one live TLS connection, against a bare process with the same
//! libraries and flags (`examples/bare.rs`), in one run.
//!
//! `cargo bench --bench memory -- [--idle SECONDS] [--apps N] [--bare]`; with `--bare` the bare process alone. A table,
//! then one line of JSON. Ends with 1 when a target of the project is missed: PSS at most 4 MiB, private dirty at most
//! 1.5 MiB, PSS at most 1.3 × bare, no wake-up.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark's output is its point")]

mod support;

use std::{
    collections::HashMap,
    env, fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use support::{
    Result,
    bus::PrivateBus,
    child::{Child, example},
    memory::{Memory, settled, switched, switches, threads},
    stats::percentile,
    tls::TlsProxy,
};
use zbus::{Connection, OwnedVariant, Variant, connection::Builder};

const DISTRIBUTOR: &str = "org.unifiedpush.Distributor.nightporter";
const DISTRIBUTOR_PATH: &str = "/org/unifiedpush/Distributor";
const CONNECTOR_PATH: &str = "/org/unifiedpush/Connector";
const MAX_PSS: u64 = 4096;
const MAX_PRIVATE_DIRTY: u64 = 1536;
const MAX_RATIO: f64 = 1.3;

struct Options {
    idle: Duration,
    apps: usize,
    bare: bool,
}

struct Figures {
    memory: Memory,
    threads: usize,
    switches: u64,
}

fn main() -> ExitCode {
    match options().and_then(|options| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("memory: {error}");
            ExitCode::from(2)
        }
    }
}

fn options() -> Result<Options> {
    let mut options = Options { idle: Duration::from_secs(15), apps: 100, bare: false };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse::<usize>().ok()).ok_or(format!("{arg} takes a number"));
        match arg.as_str() {
            "--idle" => options.idle = Duration::from_secs(number()? as u64),
            "--apps" => options.apps = number()?,
            "--bare" => options.bare = true,
            // cargo bench says so.
            "--bench" => {}
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<bool> {
    let bare_program = example("bare")?;
    // Pages of a file just written count as dirty until they are on the disk, and these programs were just linked.
    nix::unistd::sync();
    let dir = tempfile::tempdir()?;
    let bus = PrivateBus::start(dir.path())?;

    // Nobody speaks on the bare process's connection; the kernel accepts it for us.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let proxy = TlsProxy::start(dir.path(), silent.local_addr()?)?;
    let bare = Child::start(
        Command::new(bare_program).arg(&bus.address).arg(proxy.address.to_string()).arg(&proxy.ca_file).arg(dir.path()),
        true,
    )?;
    if options.bare {
        let bare = measure(&bare, settled(bare.pid())?, options.idle)?;
        println!("{}", serde_json::json!({ "bare": json(&bare) }));
        return Ok(true);
    }

    let relay = Child::start(
        Command::new(env!("CARGO_BIN_EXE_nightporter-relay")).args(["--listen", "127.0.0.1:0", "--memory"]),
        true,
    )?;
    let proxy = TlsProxy::start(dir.path(), address_in(&relay.first_line)?)?;
    let config = dir.path().join("nightporter.toml");
    fs::write(
        &config,
        format!(
            "[[upstream]]\nname = \"relay\"\nkind = \"autopush\"\nurl = \"wss://localhost:{}/\"\nca-file = \"{}\"\n",
            proxy.address.port(),
            proxy.ca_file.display()
        ),
    )?;
    let mut daemon = Child::start(
        Command::new(env!("CARGO_BIN_EXE_nightporterd"))
            .arg("--user")
            .arg("--config")
            .arg(&config)
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .env("DBUS_SESSION_BUS_ADDRESS", &bus.address)
            // Nobody is there to tell of power, network and sleep, but the connection counts.
            .env("DBUS_SYSTEM_BUS_ADDRESS", &bus.address)
            // As a user has it; PipeWire and a compositor may come.
            .env("XDG_RUNTIME_DIR", dir.path())
            .env("NIGHTPORTER_LOG", env::var_os("NIGHTPORTER_LOG").unwrap_or_else(|| "warn".into())),
        false,
    )?;
    let (_connection, latencies) = zbus::block_on(register(&bus.address, options.apps, &mut daemon))?;

    let memory = (settled(daemon.pid())?, settled(bare.pid())?);
    let (daemon_figures, bare_figures) = thread::scope(|scope| {
        let bare = scope.spawn(|| measure(&bare, memory.1, options.idle));
        let daemon = measure(&daemon, memory.0, options.idle);
        (daemon, bare.join().unwrap_or_else(|_| Err("measuring panicked".into())))
    });
    if let Some(status) = daemon.ended()? {
        return Err(format!("nightporterd ended: {status}").into());
    }
    Ok(show(options, &daemon_figures?, &bare_figures?, &latencies))
}

/// Counts what wakes `child` in `idle`.
fn measure(child: &Child, memory: Memory, idle: Duration) -> Result<Figures> {
    let before = switches(child.pid())?;
    thread::sleep(idle);
    let after = switches(child.pid())?;
    Ok(Figures { memory, threads: threads(child.pid())?, switches: switched(&before, &after) })
}

/// The address in the relay's first line of output.
fn address_in(line: &str) -> Result<SocketAddr> {
    line.split(|c: char| c.is_whitespace() || c == '/')
        .find_map(|word| word.parse().ok())
        .ok_or_else(|| format!("the relay names no address: {line}").into())
}

struct Connector;

/// Says yes to everything.
#[zbus::interface(name = "org.unifiedpush.Connector2")]
impl Connector {
    fn new_endpoint(&self, _args: HashMap<String, OwnedVariant>) -> HashMap<String, OwnedVariant> {
        HashMap::new()
    }

    fn message(&self, _args: HashMap<String, OwnedVariant>) -> HashMap<String, OwnedVariant> {
        HashMap::new()
    }

    fn unregistered(&self, _args: HashMap<String, OwnedVariant>) -> HashMap<String, OwnedVariant> {
        HashMap::new()
    }
}

/// Owns a name for each app and registers it. The connection must be kept for the names to stay.
async fn register(bus: &str, apps: usize, daemon: &mut Child) -> Result<(Connection, Vec<Duration>)> {
    let connection = Builder::address(bus)
        .serve_at(CONNECTOR_PATH, Connector)
        .method_timeout(Duration::from_secs(30))
        .build()
        .await?;
    wait_for_name(&connection, daemon).await?;
    let mut latencies = Vec::with_capacity(apps);
    for n in 1..=apps {
        let service = format!("org.example.App{n}");
        connection.request_name(service.as_str()).await?;
        let token = format!("token-{n}");
        let args: HashMap<&str, Variant<'_>> = HashMap::from([
            ("service", Variant::from(service.as_str())),
            ("token", Variant::from(token.as_str())),
            ("description", Variant::from("a benchmark")),
        ]);
        let start = Instant::now();
        let reply = connection
            .call_method(Some(DISTRIBUTOR), DISTRIBUTOR_PATH, Some("org.unifiedpush.Distributor2"), "Register", &args)
            .await?;
        latencies.push(start.elapsed());
        let answer: HashMap<String, OwnedVariant> = reply.body().deserialize()?;
        let success = answer.get("success").map(|value| value.to_string()).unwrap_or_default();
        if !success.contains("REGISTRATION_SUCCEEDED") {
            return Err(format!("registering {service} was answered with {answer:?}").into());
        }
    }
    Ok((connection, latencies))
}

async fn wait_for_name(connection: &Connection, daemon: &mut Child) -> Result<()> {
    let bus = zbus::fdo::DBusProxy::new(connection).await?;
    for _ in 0..200 {
        if bus.name_has_owner(DISTRIBUTOR.try_into()?).await? {
            return Ok(());
        }
        if let Some(status) = daemon.ended()? {
            return Err(format!("nightporterd ended: {status}").into());
        }
        thread::sleep(Duration::from_millis(50));
    }
    Err("nightporterd does not come to the bus".into())
}

/// Prints everything; whether all targets are met.
fn show(options: &Options, daemon: &Figures, bare: &Figures, latencies: &[Duration]) -> bool {
    let idle = options.idle.as_secs();
    println!("{:<28}{:>10}{:>10}{:>10}", format!("{} apps, idle {idle} s", options.apps), "daemon", "bare", "at most");
    let row = |name: &str, daemon: u64, bare: u64, most: &str| println!("{name:<28}{daemon:>10}{bare:>10}{most:>10}");
    row("PSS, KiB", daemon.memory.pss, bare.memory.pss, &MAX_PSS.to_string());
    row("private dirty, KiB", daemon.memory.private_dirty, bare.memory.private_dirty, &MAX_PRIVATE_DIRTY.to_string());
    row("swapped out, KiB", daemon.memory.swap, bare.memory.swap, "");
    row("threads", daemon.threads as u64, bare.threads as u64, "");
    row("context switches", daemon.switches, bare.switches, "0");
    let ratio = daemon.memory.pss as f64 / bare.memory.pss as f64;
    println!("{:<28}{ratio:>10.2}{:>10}{MAX_RATIO:>10}", "PSS, daemon / bare", "");
    let (p50, p99) = (percentile(latencies, 50), percentile(latencies, 99));
    println!("{:<28}{:>10.2}{:>10.2}", "Register, ms (p50, p99)", millis(p50), millis(p99));
    println!(
        "{}",
        serde_json::json!({
            "apps": options.apps,
            "idle_s": idle,
            "daemon": json(daemon),
            "bare": json(bare),
            "pss_ratio": ratio,
            "register_ms": { "p50": millis(p50), "p99": millis(p99) },
        })
    );
    daemon.memory.pss <= MAX_PSS
        && daemon.memory.private_dirty <= MAX_PRIVATE_DIRTY
        && ratio <= MAX_RATIO
        && daemon.switches == 0
}

fn json(figures: &Figures) -> serde_json::Value {
    serde_json::json!({
        "pss_kib": figures.memory.pss,
        "private_dirty_kib": figures.memory.private_dirty,
        "swap_kib": figures.memory.swap,
        "threads": figures.threads,
        "context_switches": figures.switches,
    })
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}
