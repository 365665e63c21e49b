//! What the sample apps tell the test.

use std::{
    os::unix::net::UnixDatagram,
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use serde_json::Value;

/// Everything told so far. Its thread ends with the test program.
pub(super) struct Reports(Arc<Mutex<Vec<Value>>>);

/// One message as an app has seen it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) body: String,
    pub(crate) id: String,
    /// CLOCK_BOOTTIME.
    pub(crate) at_nanos: u64,
}

impl Reports {
    pub(super) fn listen(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        let all = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&all);
        thread::spawn(move || {
            let mut buffer = [0; 16 * 1024];
            while let Ok(length) = socket.recv(&mut buffer) {
                to.lock().unwrap().push(serde_json::from_slice(&buffer[..length]).unwrap());
            }
        });
        Self(all)
    }

    pub(super) fn count(&self, app: &str, event: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|told| told["app"] == app && told["event"] == event).count()
    }

    /// All the app told under this name, in order.
    pub(super) fn all(&self, app: &str, event: &str) -> Vec<Value> {
        let all = self.0.lock().unwrap();
        all.iter().filter(|told| told["app"] == app && told["event"] == event).cloned().collect()
    }

    /// The app's latest endpoint.
    pub(super) fn endpoint(&self, app: &str) -> Option<String> {
        let all = self.0.lock().unwrap();
        let told = all.iter().rfind(|told| told["app"] == app && told["event"] == "endpoint")?;
        Some(told["endpoint"].as_str().unwrap().to_owned())
    }

    /// The messages the app has seen, in order.
    pub(super) fn seen(&self, app: &str) -> Vec<Seen> {
        let all = self.0.lock().unwrap();
        let messages = all.iter().filter(|told| told["app"] == app && told["event"] == "message");
        let seen = messages.map(|told| Seen {
            body: told["body"].as_str().unwrap().to_owned(),
            id: told["id"].as_str().unwrap_or_default().to_owned(),
            at_nanos: told["boottime_ns"].as_u64().unwrap(),
        });
        seen.collect()
    }
}
