//! Start, accept, stop.

use std::{
    convert::Infallible,
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::body::Body;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    pin,
    runtime::Builder,
    signal::unix::{Signal, SignalKind, signal},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, timeout},
};

use crate::{
    args::{self, EX_CANTCREAT, EX_CONFIG, EX_IOERR, EX_UNAVAILABLE, EX_USAGE, Limits, PublicUrl, Settings, Times},
    clock,
    database::{Database, OpenError},
    http::{self, ENDPOINT_PATH, MESSAGE_PATH},
    store::Store,
};

const PURGE_INTERVAL: Duration = Duration::from_secs(60 * 60);
/// How long open connections may take to end when the server does.
const GRACE: Duration = Duration::from_secs(3);
const HEADERS_MAX: usize = 64;

/// What every connection shares.
#[derive(Debug)]
pub(crate) struct Relay {
    /// The database's thread.
    pub(crate) store: Store,
    /// `--…-timeout` and intervals.
    pub(crate) times: Times,
    /// `--max-…`.
    pub(crate) limits: Limits,
    /// What endpoints begin with.
    pub(crate) public_url: PublicUrl,
    /// Turns true when the server ends.
    pub(crate) shutdown: watch::Receiver<bool>,
    sessions: AtomicU64,
}

/// Why the server does not start, or ends before it is told to.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot find a state directory: give --state-dir, or --memory to keep nothing")]
    NoStateDirectory,
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("cannot listen on {0}: {1}")]
    Listen(std::net::SocketAddr, io::Error),
    #[error("cannot start: {0}")]
    Start(io::Error),
    #[error("the database is damaged; start again and it is set aside")]
    Damaged,
}

impl Relay {
    /// The URL senders post to.
    pub(crate) fn endpoint(&self, token: &str) -> String {
        format!("{}{ENDPOINT_PATH}{token}", self.public_url.base)
    }

    /// The URL of a message.
    pub(crate) fn message(&self, version: &str) -> String {
        format!("{}{MESSAGE_PATH}{version}", self.public_url.base)
    }

    /// A number for the log: a device's id must not be in it.
    pub(crate) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }
}

/// Wait until the server ends.
pub(crate) async fn ended(shutdown: &mut watch::Receiver<bool>) {
    // An error is a sender that is gone, which is an end as well; the guard inside must not outlive this line.
    let _ = shutdown.wait_for(|ends| *ends).await.is_ok();
}

/// Run until a signal; the exit code is one of sysexits.h.
pub(crate) fn main(settings: Settings) -> ExitCode {
    let mut logger = env_logger::Builder::from_env(env_logger::Env::new().filter_or("NIGHTPORTER_LOG", "info"));
    // Below the surface whole frames and requests are logged, with the secrets in them.
    for verbose in ["hyper", "tokio_tungstenite", "tungstenite"] {
        logger.filter_module(verbose, log::LevelFilter::Off);
    }
    logger.init();
    match run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            log::error!("{failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(settings: Settings) -> Result<(), Failure> {
    let database = open(&settings)?;
    let runtime = Builder::new_current_thread().enable_all().build().map_err(Failure::Start)?;
    let (end, shutdown) = watch::channel(false);
    let (damaged, mut damage) = watch::channel(false);
    let limits = settings.limits;
    let (store, thread) = Store::start(database, limits, move || {
        damaged.send_replace(true);
    })
    .map_err(Failure::Start)?;
    let result = runtime.block_on(async {
        let mut signals = Signals::new().map_err(Failure::Start)?;
        let listener =
            TcpListener::bind(settings.listen).await.map_err(|error| Failure::Listen(settings.listen, error))?;
        let address = listener.local_addr().map_err(|error| Failure::Listen(settings.listen, error))?;
        let public_url = settings.public_url.unwrap_or_else(|| PublicUrl::of_address(address));
        if !address.ip().is_loopback() {
            log::warn!("listening on {address} without TLS: whoever listens in can read and use endpoints");
        }
        let relay =
            Arc::new(Relay { store, times: settings.times, limits, public_url, shutdown, sessions: AtomicU64::new(1) });
        let slots = Arc::new(Semaphore::new(limits.max_connections as usize));
        args::announce(&format!("listening on http://{address}")).map_err(Failure::Start)?;
        let result = tokio::select! {
            () = accept(&listener, &relay, &slots) => Ok(()),
            () = purge(&relay.store) => Ok(()),
            () = signals.next() => Ok(()),
            // The sender lives in the storage thread; if that is gone the server is useless all the same.
            _ = damage.wait_for(|damaged| *damaged) => Err(Failure::Damaged),
        };
        drop(listener);
        end.send_replace(true);
        if timeout(GRACE, slots.acquire_many(limits.max_connections)).await.is_err() {
            log::warn!("some connections did not end in time");
        }
        result
    });
    // Drops the last handles on the store, upon which its thread finishes what waits and ends.
    drop(runtime);
    if thread.join().is_err() {
        log::error!("the storage thread failed");
    }
    result
}

fn open(settings: &Settings) -> Result<Database, Failure> {
    if settings.memory {
        return Ok(Database::in_memory(settings.limits)?);
    }
    let directory = settings.state_dir().ok_or(Failure::NoStateDirectory)?;
    Ok(Database::open(&directory, settings.limits, clock::unix_now())?)
}

async fn accept(listener: &TcpListener, relay: &Arc<Relay>, slots: &Arc<Semaphore>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, or a peer that has gone again: neither may end or spin the server.
                log::warn!("cannot accept a connection: {error}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        match slots.clone().try_acquire_owned() {
            Ok(slot) => {
                tokio::spawn(serve(stream, relay.clone(), Arc::new(slot)));
            }
            Err(_) => refuse(&stream),
        }
    }
}

async fn serve(stream: TcpStream, relay: Arc<Relay>, slot: Arc<OwnedSemaphorePermit>) {
    // Small frames must not wait for an acknowledgement of the one before.
    if let Err(error) = stream.set_nodelay(true) {
        log::debug!("TCP_NODELAY: {error}");
    }
    let mut shutdown = relay.shutdown.clone();
    let (times, limits) = (relay.times, relay.limits);
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (relay, slot) = (relay.clone(), slot.clone());
        async move { Ok::<_, Infallible>(http::respond(relay, slot, request.map(Body::new)).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(times.request_timeout)
        .max_buf_size(limits.max_head as usize)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = ended(&mut shutdown) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        log::debug!("connection: {error}");
    }
}

/// Best effort, without a task: a full server spends nothing on those it turns away.
fn refuse(stream: &TcpStream) {
    let answer =
        b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 30\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    if let Err(error) = stream.try_write(answer) {
        log::debug!("refusing a connection: {error}");
    }
}

/// Hourly, and only while something is stored that will expire.
async fn purge(store: &Store) {
    loop {
        store.something_stored().await;
        while {
            sleep(PURGE_INTERVAL).await;
            store.purge().await.unwrap_or(true)
        } {}
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::NoStateDirectory => EX_USAGE,
            Self::Open(OpenError::Directory(..) | OpenError::File(..) | OpenError::Aside(..)) => EX_CANTCREAT,
            Self::Open(OpenError::InUse(_)) | Self::Listen(..) => EX_UNAVAILABLE,
            Self::Open(OpenError::Newer { .. }) => EX_CONFIG,
            Self::Open(OpenError::Sqlite(..)) | Self::Start(_) | Self::Damaged => EX_IOERR,
        }
    }
}
