//! The app of the demo and the tests: plain, and small because its memory is measured. `nightporter demo --help` has the
//! contract of its environment.
//!
//! `resident` is what every app does on its own: one process, one connection to the push server. `shared` is a UnifiedPush
//! app: it registers with the daemon, says that it is in the background, and is called when something comes.
//! `NIGHTPORTER_SAMPLE_FAULT` makes it a bad app, for tests: `never-reply`, `slow-reply:MS`, `error`, `crash-on:N`,
//! `empty-reply`, `at-root`, `v1`, `deaf`, `silent`.
//!
//! With `NIGHTPORTER_SAMPLE_LISTEN=1` it does what docs/lifecycle.md asks of an app: it is told before it is frozen and after,
//! and saves and restores its state, which is the last message it has seen.
//!
//! `nightporter-sample --exec CMD ARGS…` makes an app of a real program that knows nothing of all this: this process owns the
//! name, holds the connection or registers, and reports; the program runs below it, in the same cgroup. It says that it is
//! ready, and in the background, once the program does next to nothing any more (`NIGHTPORTER_SAMPLE_IDLE_WITHIN`
//! seconds at most, 60 by default). It holds no history of its own then.

#[path = "nightporter-sample/exec.rs"]
mod exec;

use std::{
    collections::HashMap,
    env,
    error::Error,
    fmt::Write,
    future::pending,
    os::unix::net::UnixDatagram,
    process::{ExitCode, abort},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use exec::{Program, Role};
use nightporter::{sys::clock, time::Instant};
use serde::Serialize;
use serde_json::{Value, json};
use tungstenite::Message;
use zbus::{Connection, DynamicType, ObjectPath, OwnedVariant, Variant, connection::Builder, fdo, interface};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;
type Dictionary = HashMap<String, OwnedVariant>;

const DISTRIBUTOR: &str = "org.unifiedpush.Distributor.nightporter";
const DISTRIBUTOR_PATH: &str = "/org/unifiedpush/Distributor";
const CONNECTOR_PATH: &str = "/org/unifiedpush/Connector";
const PORTER: &str = "org.nightporter1";
const PORTER_PATH: &str = "/org/nightporter1";
const CLIENT_PATH: &str = "/org/nightporter1/Client";
/// A registration takes up to 10 s at the daemon.
const TIMEOUT: Duration = Duration::from_secs(30);
const DEFAULT_BALLAST_KIB: usize = 8192;
/// From a connection that was lost to the next try; doubled while there is none.
const RECONNECT: Duration = Duration::from_millis(500);
const LONGEST_RECONNECT: Duration = Duration::from_secs(30);
/// More than the longest line of that history has bytes.
const LONGEST_MESSAGE: usize = 512;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "a program of its own, with nowhere else to complain")]
            {
                eprintln!("nightporter-sample: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let role = Role::from_args()?;
    let name = required("NIGHTPORTER_SAMPLE_NAME")?;
    let (program, ballast) = match role {
        Role::With(command) => (Some(Program::start(&command)?), 0),
        Role::Alone => {
            // Ends with status 0 from within the handler: a thread for it would count as the app's memory.
            signal_hook::flag::register_conditional_shutdown(libc::SIGTERM, 0, Arc::new(AtomicBool::new(true)))?;
            let ballast = match env::var("NIGHTPORTER_SAMPLE_BALLAST_KIB") {
                Ok(kib) => kib.parse().map_err(|_| format!("NIGHTPORTER_SAMPLE_BALLAST_KIB={kib} is not a number"))?,
                Err(_) => DEFAULT_BALLAST_KIB,
            };
            (None, ballast)
        }
    };
    let history = history(&name, ballast * 1024);
    let reporter = Reporter::new(&name)?;
    match required("NIGHTPORTER_SAMPLE_MODE")?.as_str() {
        "resident" => {
            let server = required("NIGHTPORTER_SAMPLE_SERVER")?;
            if let Some(program) = &program {
                program.wait_until_idle();
            }
            resident(&name, &server, &reporter)?;
        }
        "shared" => zbus::block_on(shared(&name, reporter, Fault::from_env()?, program))?,
        other => return Err(format!("NIGHTPORTER_SAMPLE_MODE={other}; it is resident or shared").into()),
    }
    drop(history);
    Ok(())
}

fn required(name: &str) -> Result<String> {
    env::var(name).map_err(|_| format!("{name} is not set; see nightporter demo --help").into())
}

/// Tells the demo or a test what happened. Without a socket to report to, says nothing.
struct Reporter {
    app: String,
    socket: Option<UnixDatagram>,
}

impl Reporter {
    fn new(app: &str) -> Result<Self> {
        let socket = match env::var("NIGHTPORTER_SAMPLE_REPORT") {
            Ok(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(&path).map_err(|error| format!("cannot report to {path}: {error}"))?;
                Some(socket)
            }
            Err(_) => None,
        };
        Ok(Self { app: app.to_owned(), socket })
    }

    fn report(&self, mut event: Value) {
        if let Some(socket) = &self.socket {
            event["app"] = json!(self.app);
            // Whoever listened may be gone; the app goes on all the same.
            let _ = socket.send(event.to_string().as_bytes());
        }
    }

    fn message(&self, body: &[u8], id: Option<&str>, at: Instant) {
        let body = String::from_utf8_lossy(body);
        self.report(json!({ "event": "message", "body": body, "id": id, "boottime_ns": at.as_nanos() }));
    }
}

/// One process, one connection: Mozilla autopush as a client. Like any app of its kind it connects anew when the connection
/// is lost, as after it was held still for so long that the server gave it up; the first has to come about.
fn resident(name: &str, server: &str, reporter: &Reporter) -> Result<()> {
    let channel = uuid::Builder::from_random_bytes(digest(name).to_be_bytes()).into_uuid().hyphenated().to_string();
    let mut resident = Resident { server, channel, reporter, uaid: None, registered: false };
    let mut pause = RECONNECT;
    loop {
        let mut answered = false;
        let lost = resident.hold_connection(&mut answered);
        if !resident.registered {
            return lost;
        }
        pause = if answered { RECONNECT } else { (pause * 2).min(LONGEST_RECONNECT) };
        thread::sleep(pause);
    }
}

struct Resident<'a> {
    server: &'a str,
    channel: String,
    reporter: &'a Reporter,
    /// Who we are to the server, once it has said.
    uaid: Option<String>,
    registered: bool,
}

impl Resident<'_> {
    /// Until the connection is lost. `answered`: whether the server has said hello.
    fn hold_connection(&mut self, answered: &mut bool) -> Result<()> {
        let (mut socket, _) = tungstenite::connect(self.server)?;
        let mut hello = json!({ "messageType": "hello", "use_webpush": true });
        if let Some(uaid) = &self.uaid {
            hello["uaid"] = json!(uaid);
        }
        socket.send(Message::text(hello.to_string()))?;
        loop {
            let text = match socket.read()? {
                Message::Text(text) => text,
                Message::Close(_) => return Err("the push server closed the connection".into()),
                _ => continue,
            };
            let at = clock::boot();
            let frame: Value = serde_json::from_str(&text)?;
            match frame["messageType"].as_str() {
                Some("hello") => {
                    *answered = true;
                    let uaid = frame["uaid"].as_str().map(str::to_owned);
                    // A server that still knows us still knows the channel.
                    if !self.registered || uaid != self.uaid {
                        let register = json!({ "messageType": "register", "channelID": self.channel });
                        socket.send(Message::text(register.to_string()))?;
                    }
                    self.uaid = uaid;
                }
                Some("register") => {
                    let (Some(200), Some(endpoint)) = (frame["status"].as_u64(), frame["pushEndpoint"].as_str()) else {
                        return Err(format!("the push server refused to register: {frame}").into());
                    };
                    self.registered = true;
                    self.reporter.report(json!({ "event": "endpoint", "endpoint": endpoint }));
                    self.reporter.report(json!({ "event": "ready" }));
                }
                Some("notification") => {
                    let data = frame["data"].as_str().unwrap_or_default().trim_end_matches('=');
                    let version = frame["version"].as_str().unwrap_or_default();
                    self.reporter.message(&URL_SAFE_NO_PAD.decode(data)?, Some(version), at);
                    let update = json!({ "channelID": frame["channelID"], "version": version, "code": 100 });
                    socket.send(Message::text(json!({ "messageType": "ack", "updates": [update] }).to_string()))?;
                }
                _ => {}
            }
        }
    }
}

/// A UnifiedPush app behind the daemon.
async fn shared(name: &str, reporter: Reporter, fault: Fault, program: Option<Program>) -> Result<()> {
    let app = Arc::new(App { reporter, fault, taken: AtomicU64::new(0), latest: Mutex::default() });
    let listens = env::var_os("NIGHTPORTER_SAMPLE_LISTEN").is_some();
    let path = if fault == Fault::AtRoot { "/" } else { CONNECTOR_PATH };
    let builder = Builder::session().method_timeout(TIMEOUT);
    let builder = match fault {
        Fault::V1 => builder.serve_at(path, ConnectorV1(Arc::clone(&app))),
        Fault::EmptyReply => builder.serve_at(path, EmptyConnector(Arc::clone(&app))),
        _ => builder.serve_at(path, Connector(Arc::clone(&app))),
    };
    let builder = if listens { builder.serve_at(CLIENT_PATH, Client(Arc::clone(&app))) } else { builder };
    // The name is taken once the connector is there to be called.
    let connection = builder.name(name.to_owned()).build().await?;
    register(&connection, name, fault == Fault::V1).await?;
    if listens {
        let state = porter(&connection, "RestoreState", &()).await?;
        app.restore(state.body().deserialize::<Vec<u8>>()?);
        porter(&connection, "Listen", &(true,)).await?;
    }
    if let Some(program) = program {
        elsewhere(move || program.wait_until_idle()).await;
    }
    if fault != Fault::Silent {
        porter(&connection, "SetState", &("background",)).await?;
    }
    app.reporter.report(json!({ "event": "ready" }));
    pending().await
}

/// Calls `org.nightporter1.App`.
async fn porter<B: Serialize + DynamicType + Sync>(
    connection: &Connection,
    member: &'static str,
    arguments: &B,
) -> Result<zbus::Message> {
    connection
        .call_method(Some(PORTER), PORTER_PATH, Some("org.nightporter1.App"), member, arguments)
        .await
        .map_err(|error| format!("{PORTER} refuses {member}: {error}").into())
}

async fn register(connection: &Connection, name: &str, v1: bool) -> Result<()> {
    // The same token at each start, so that a new process takes over the registration of the one before.
    let token = format!("{:032x}", digest(name));
    let path = ObjectPath::try_from(DISTRIBUTOR_PATH)?;
    let (result, reason) = if v1 {
        let body = (name, token.as_str(), "Messages");
        let interface = Some("org.unifiedpush.Distributor1");
        let reply = connection.call_method(Some(DISTRIBUTOR), path, interface, "Register", &body).await?;
        reply.body().deserialize::<(String, String)>()?
    } else {
        let body: HashMap<&str, Variant<'_>> = HashMap::from([
            ("service", Variant::from(name)),
            ("token", Variant::from(token.as_str())),
            ("description", Variant::from("Messages")),
        ]);
        let interface = Some("org.unifiedpush.Distributor2");
        let reply = connection.call_method(Some(DISTRIBUTOR), path, interface, "Register", &body).await?;
        let reply: Dictionary = reply.body().deserialize()?;
        (text(&reply, "success").to_owned(), text(&reply, "reason").to_owned())
    };
    match result.as_str() {
        "REGISTRATION_SUCCEEDED" => Ok(()),
        _ => Err(format!("the distributor refused to register: {result} {reason}").into()),
    }
}

/// What is wrong with this app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Takes messages and never answers.
    NeverReply,
    /// Answers late.
    SlowReply(Duration),
    /// Answers with a D-Bus error and does not take the message.
    Error,
    /// Dies at its Nth message, before it answers.
    CrashOn(u64),
    /// Answers without the dictionary the specification wants.
    EmptyReply,
    /// Serves its connector at `/`, as an old library did.
    AtRoot,
    /// Speaks UnifiedPush version 1.
    V1,
    /// Listens and never answers.
    Deaf,
    /// Never says whether it is in the foreground.
    Silent,
}

impl Fault {
    fn from_env() -> Result<Self> {
        let Ok(text) = env::var("NIGHTPORTER_SAMPLE_FAULT") else { return Ok(Self::None) };
        let number = |digits: &str| digits.parse::<u64>().map_err(|_| format!("\"{digits}\" is not a number"));
        Ok(match text.split_once(':') {
            None if text.is_empty() => Self::None,
            None if text == "never-reply" => Self::NeverReply,
            None if text == "error" => Self::Error,
            None if text == "empty-reply" => Self::EmptyReply,
            None if text == "at-root" => Self::AtRoot,
            None if text == "v1" => Self::V1,
            None if text == "deaf" => Self::Deaf,
            None if text == "silent" => Self::Silent,
            Some(("slow-reply", ms)) => Self::SlowReply(Duration::from_millis(number(ms)?)),
            Some(("crash-on", n)) => Self::CrashOn(number(n)?),
            _ => return Err(format!("NIGHTPORTER_SAMPLE_FAULT={text} is not a fault known here").into()),
        })
    }
}

struct App {
    reporter: Reporter,
    fault: Fault,
    taken: AtomicU64,
    /// The state: the last message it has seen.
    latest: Mutex<String>,
}

impl App {
    fn restore(&self, state: Vec<u8>) {
        let state = String::from_utf8(state).unwrap_or_default();
        self.reporter.report(json!({ "event": "restored", "state": state }));
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        // A message may be faster than the answer, and is the later of the two.
        if latest.is_empty() {
            *latest = state;
        }
    }

    fn state(&self) -> String {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes a message, in the way its fault has it.
    async fn message(&self, body: &[u8], id: Option<&str>, at: Instant) -> fdo::Result<()> {
        let number = self.taken.fetch_add(1, Ordering::Relaxed) + 1;
        match self.fault {
            Fault::Error => return Err(fdo::Error::Failed("this app takes no messages".into())),
            Fault::CrashOn(n) if n == number => abort(),
            _ => {}
        }
        self.reporter.message(body, id, at);
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = String::from_utf8_lossy(body).into_owned();
        match self.fault {
            Fault::NeverReply => pending().await,
            Fault::SlowReply(delay) => elsewhere(move || thread::sleep(delay)).await,
            _ => {}
        }
        Ok(())
    }

    fn endpoint(&self, endpoint: &str) {
        self.reporter.report(json!({ "event": "endpoint", "endpoint": endpoint }));
    }

    fn unregistered(&self) {
        self.reporter.report(json!({ "event": "unregistered" }));
    }
}

/// Waits for what takes its time, on a thread: the runtime has no timer of its own to offer, and messages come meanwhile.
async fn elsewhere(work: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = async_channel::bounded::<()>(1);
    thread::spawn(move || {
        work();
        drop(sender);
    });
    // Ends with an error as soon as the sender is dropped, which is the point.
    let _ = receiver.recv().await;
}

struct Connector(Arc<App>);

#[interface(name = "org.unifiedpush.Connector2")]
impl Connector {
    async fn message(&self, arguments: Dictionary) -> fdo::Result<Dictionary> {
        let at = clock::boot();
        let (body, id) = message_of(&arguments)?;
        self.0.message(&body, id, at).await?;
        Ok(arguments.iter().filter(|(key, _)| *key == "id").map(|(key, id)| (key.clone(), id.clone())).collect())
    }

    async fn new_endpoint(&self, arguments: Dictionary) -> Dictionary {
        self.0.endpoint(text(&arguments, "endpoint"));
        Dictionary::new()
    }

    async fn unregistered(&self, _arguments: Dictionary) -> Dictionary {
        self.0.unregistered();
        Dictionary::new()
    }
}

struct EmptyConnector(Arc<App>);

#[interface(name = "org.unifiedpush.Connector2")]
impl EmptyConnector {
    async fn message(&self, arguments: Dictionary) -> fdo::Result<()> {
        let at = clock::boot();
        let (body, id) = message_of(&arguments)?;
        self.0.message(&body, id, at).await
    }

    async fn new_endpoint(&self, arguments: Dictionary) {
        self.0.endpoint(text(&arguments, "endpoint"));
    }

    async fn unregistered(&self, _arguments: Dictionary) {
        self.0.unregistered();
    }
}

struct ConnectorV1(Arc<App>);

#[interface(name = "org.unifiedpush.Connector1")]
impl ConnectorV1 {
    async fn message(&self, _token: String, message: Vec<u8>, id: String) {
        let at = clock::boot();
        // Version 1 has no answer to put an error into.
        let _ = self.0.message(&message, Some(&id), at).await;
    }

    async fn new_endpoint(&self, _token: String, endpoint: String) {
        self.0.endpoint(&endpoint);
    }

    async fn unregistered(&self, _token: String) {
        self.0.unregistered();
    }
}

/// What an app serves that listens (docs/lifecycle.md).
struct Client(Arc<App>);

#[interface(name = "org.nightporter1.Client")]
impl Client {
    /// It is going to be frozen: what is on the screen goes to the disk, and may be the last the user hears of it.
    async fn will_suspend(&self, milliseconds: u64, #[zbus(connection)] connection: &Connection) -> fdo::Result<()> {
        let App { reporter, fault, .. } = &*self.0;
        reporter.report(json!({ "event": "will-suspend", "milliseconds": milliseconds }));
        if *fault == Fault::Deaf {
            pending::<()>().await;
        }
        let state = self.0.state();
        porter(connection, "SaveState", &(state.as_bytes(),)).await.map_err(|e| fdo::Error::Failed(e.to_string()))?;
        Ok(())
    }

    /// It runs again. With connections of its own it would look at them now: after minutes their other ends have given up.
    async fn resumed(&self, frozen_milliseconds: u64) {
        self.0.reporter.report(json!({ "event": "resumed", "milliseconds": frozen_milliseconds }));
    }
}

fn message_of(arguments: &Dictionary) -> fdo::Result<(Vec<u8>, Option<&str>)> {
    let Some(Ok(body)) = arguments.get("message").map(|value| Vec::<u8>::try_from(value.clone())) else {
        return Err(fdo::Error::InvalidArgs("message (ay) is missing".into()));
    };
    Ok((body, arguments.get("id").and_then(|id| <&str>::try_from(id).ok())))
}

fn text<'a>(dictionary: &'a Dictionary, key: &str) -> &'a str {
    dictionary.get(key).and_then(|value| <&str>::try_from(value).ok()).unwrap_or_default()
}

/// A chat history of `bytes` bytes, the same for the same name: it compresses as text does, neither to nothing, as zeros
/// would, nor not at all, as random bytes would.
fn history(name: &str, bytes: usize) -> String {
    const PEOPLE: [&str; 8] = ["Ada", "Bilal", "Chiara", "Dmitri", "Esi", "Femke", "Goran", "Hana"];
    const WORDS: [&str; 64] = [
        "the",
        "train",
        "is",
        "late",
        "again",
        "can",
        "you",
        "bring",
        "bread",
        "tonight",
        "I",
        "saw",
        "that",
        "film",
        "we",
        "talked",
        "about",
        "yesterday",
        "my",
        "phone",
        "battery",
        "lasts",
        "two",
        "days",
        "now",
        "see",
        "at",
        "station",
        "maybe",
        "tomorrow",
        "or",
        "on",
        "Friday",
        "thanks",
        "for",
        "photos",
        "they",
        "are",
        "lovely",
        "who",
        "has",
        "key",
        "of",
        "garden",
        "house",
        "rain",
        "all",
        "week",
        "dinner",
        "with",
        "parents",
        "call",
        "me",
        "when",
        "home",
        "ok",
        "yes",
        "no",
        "what",
        "time",
        "does",
        "it",
        "start",
        "where",
    ];
    let mut random = Random(digest(name) as u64);
    // In one piece: what an allocator loses between thousands of small ones would not be history.
    let mut history = String::with_capacity(bytes + LONGEST_MESSAGE);
    let mut clock = 1_700_000_000_u64;
    while history.len() < bytes {
        clock += random.below(600);
        let _ = write!(history, "{clock} <{}>", PEOPLE[random.below(PEOPLE.len() as u64) as usize]);
        for _ in 0..4 + random.below(20) {
            history.push(' ');
            history.push_str(WORDS[random.below(WORDS.len() as u64) as usize]);
        }
        if random.below(12) == 0 {
            let _ = write!(history, " https://example.org/p/{:x}", random.below(1 << 48));
        }
        history.push('\n');
    }
    history
}

/// splitmix64 (Steele, Lea, Flood 2014): enough to look like chat, and always the same.
struct Random(u64);

impl Random {
    const fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// FNV-1a of 128 bits: a stable name for a name.
fn digest(name: &str) -> u128 {
    name.bytes().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash, byte| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_is_stable_text_of_the_size_asked_for() {
        let one = history("org.nightporter.Sample1", 100_000);
        assert_eq!(one, history("org.nightporter.Sample1", 100_000));
        assert_ne!(one, history("org.nightporter.Sample2", 100_000));
        assert!((100_000..100_000 + LONGEST_MESSAGE).contains(&one.len()), "{}", one.len());
        let different: std::collections::HashSet<&str> = one.lines().collect();
        assert_eq!(different.len(), one.lines().count());
    }

    #[test]
    fn names_have_tokens_of_their_own() {
        assert_ne!(digest("org.nightporter.Sample1"), digest("org.nightporter.Sample2"));
    }
}
