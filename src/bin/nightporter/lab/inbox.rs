//! What the apps report, collected by a thread so that no app ever waits for us.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::unix::net::UnixDatagram,
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde::Deserialize;

/// A report: `nightporter demo --help` has the contract.
#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Report {
    Endpoint {
        app: String,
        endpoint: String,
    },
    Ready {
        app: String,
    },
    Message {
        body: String,
        boottime_ns: u64,
    },
    #[serde(other)]
    Other,
}

/// Our end.
pub(crate) struct Inbox {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    closed: AtomicBool,
}

#[derive(Default)]
struct State {
    endpoints: HashMap<String, String>,
    ready: HashSet<String>,
    /// Every body that was sent, with what came of it.
    messages: HashMap<String, Arrived>,
}

/// What came of one message.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Arrived {
    /// How often it reached its app.
    pub(crate) times: u64,
    /// CLOCK_BOOTTIME in the app's handler, the first time, in nanoseconds.
    pub(crate) first: u64,
}

/// Between looks at whether it is over.
const TURN: Duration = Duration::from_millis(100);
/// A message of 4096 bytes, every byte of it escaped, and its frame.
const LARGEST: usize = 32 * 1024;

impl Inbox {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::bind(path)?;
        socket.set_read_timeout(Some(TURN))?;
        let shared = Arc::new(Shared::default());
        let collector = Arc::clone(&shared);
        let thread = thread::Builder::new().name("reports".into()).spawn(move || collector.collect(&socket))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The app's endpoint, once it has reported one.
    pub(crate) fn endpoint(&self, app: &str) -> Option<String> {
        self.shared.lock().endpoints.get(app).cloned()
    }

    pub(crate) fn is_ready(&self, app: &str) -> bool {
        let state = self.shared.lock();
        state.ready.contains(app) && state.endpoints.contains_key(app)
    }

    /// Forgets who was ready, for the next half.
    pub(crate) fn forget_apps(&self) {
        let mut state = self.shared.lock();
        state.endpoints.clear();
        state.ready.clear();
    }

    /// Forgets these apps, which are to be started anew.
    pub(crate) fn forget(&self, apps: &[String]) {
        let mut state = self.shared.lock();
        for app in apps {
            state.endpoints.remove(app);
            state.ready.remove(app);
        }
    }

    /// Counts messages with this body from now on. Reports of any other are ignored.
    pub(crate) fn expect(&self, body: &str) {
        self.shared.lock().messages.insert(body.to_owned(), Arrived::default());
    }

    pub(crate) fn arrived(&self, body: &str) -> Arrived {
        self.shared.lock().messages.get(body).copied().unwrap_or_default()
    }

    /// Waits until the message has reached its app, at most `patience`.
    pub(crate) fn wait_for(&self, body: &str, patience: Duration) -> Option<Arrived> {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        loop {
            match state.messages.get(body) {
                Some(arrived) if arrived.times > 0 => return Some(*arrived),
                _ => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            (state, _) = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain data that no panic can leave half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn collect(&self, socket: &UnixDatagram) {
        let mut buffer = vec![0; LARGEST];
        while !self.closed.load(Ordering::Relaxed) {
            // An error is the read timeout, or EINTR.
            let Ok(length) = socket.recv(&mut buffer) else { continue };
            let Ok(report) = serde_json::from_slice(&buffer[..length]) else { continue };
            let mut state = self.lock();
            match report {
                Report::Endpoint { app, endpoint } => {
                    state.endpoints.insert(app, endpoint);
                }
                Report::Ready { app } => {
                    state.ready.insert(app);
                }
                Report::Message { body, boottime_ns } => {
                    if let Some(arrived) = state.messages.get_mut(&body) {
                        arrived.times += 1;
                        if arrived.times == 1 {
                            arrived.first = boottime_ns;
                        }
                    }
                }
                Report::Other => {}
            }
            drop(state);
            self.changed.notify_all();
        }
    }
}
