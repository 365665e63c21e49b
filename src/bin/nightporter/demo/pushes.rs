//! Sends the demo's messages, each with a body of its own, and counts what became of them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use nightporter::sys::clock;
use ureq::Agent;

use super::{inbox::Inbox, measure::Messages};
use crate::exit::{Exit, Failure};

/// The application servers of all apps at once.
pub(super) struct Pushes {
    agent: Agent,
    bodies: Vec<String>,
    interrupted: Arc<AtomicBool>,
}

const HTTP_TIMEOUT: Duration = Duration::from_secs(10);
/// Between looks at whether the user wants to stop.
const TURN: Duration = Duration::from_millis(100);

impl Pushes {
    pub(super) fn new(interrupted: Arc<AtomicBool>) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // The push server is on loopback, whatever the environment says of proxies.
            .proxy(None)
            .timeout_global(Some(HTTP_TIMEOUT))
            .build()
            .into();
        Self { agent, bodies: Vec::new(), interrupted }
    }

    /// Posts a message to the app's endpoint and waits until the app has it. Gives back the nanoseconds between, or none
    /// when it did not come within `patience` (it may come still).
    pub(super) fn send(
        &mut self,
        inbox: &Inbox,
        app: &str,
        about: &str,
        patience: Duration,
    ) -> Result<Option<u64>, Failure> {
        let Some(endpoint) = inbox.endpoint(app) else {
            return Err(Failure::new(Exit::Failed, format!("{app} has reported no endpoint")));
        };
        let body = format!("demo message {} to {app}, {about}", self.bodies.len() + 1);
        inbox.expect(&body);
        self.bodies.push(body.clone());
        let sent = clock::boot().as_nanos();
        let response = self
            .agent
            .post(&endpoint)
            .header("TTL", "60")
            .header("Urgency", "normal")
            .header("Content-Encoding", "aes128gcm")
            .send(body.as_bytes())
            .map_err(|error| Failure::new(Exit::Failed, format!("cannot post to the push server: {error}")))?;
        if !response.status().is_success() {
            return Err(Failure::new(
                Exit::Failed,
                format!("the push server refused a message to {app}: HTTP {}", response.status()),
            ));
        }
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline && !self.interrupted.load(Ordering::Relaxed) {
            if let Some(arrived) = inbox.wait_for(&body, TURN) {
                return Ok(Some(arrived.first.saturating_sub(sent)));
            }
        }
        Ok(None)
    }

    /// What became of all messages so far.
    pub(super) fn count(&self, inbox: &Inbox) -> Messages {
        let mut messages = Messages::default();
        for body in &self.bodies {
            messages.sent += 1;
            match inbox.arrived(body).times {
                0 => messages.lost += 1,
                times => {
                    messages.delivered += 1;
                    messages.duplicated += times - 1;
                }
            }
        }
        messages
    }
}
