//! Sends messages, each with a body of its own, and counts what became of them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use nightporter::sys::clock;
use serde::Serialize;
use ureq::Agent;

use super::inbox::{Arrived, Inbox};
use crate::exit::{Exit, Failure};

/// What became of all messages sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Messages {
    pub(crate) sent: u64,
    pub(crate) delivered: u64,
    pub(crate) lost: u64,
    pub(crate) duplicated: u64,
}

/// The application servers of all apps at once.
pub(crate) struct Pushes {
    agent: Agent,
    what: &'static str,
    bytes: usize,
    sent: Vec<Sent>,
    interrupted: Arc<AtomicBool>,
}

/// One message that the push server took.
pub(crate) struct Sent {
    pub(crate) app: String,
    /// What the app was like when it was sent.
    pub(crate) about: &'static str,
    /// CLOCK_BOOTTIME before the request, in nanoseconds.
    pub(crate) at: u64,
    body: String,
}

/// Where it is among those sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Number(usize);

/// Without KVM, beside a compiler, a loopback server may take its time.
const HTTP_TIMEOUT: Duration = Duration::from_secs(30);
/// Between looks at whether the user wants to stop.
const TURN: Duration = Duration::from_millis(100);
/// Longer than any app here is held still.
const TTL: &str = "86400";

impl Pushes {
    /// `what` they are messages of, which is in each of them.
    pub(crate) fn new(what: &'static str, interrupted: Arc<AtomicBool>) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // The push server is on loopback, whatever the environment says of proxies.
            .proxy(None)
            .timeout_global(Some(HTTP_TIMEOUT))
            .build()
            .into();
        Self { agent, what, bytes: 0, sent: Vec::new(), interrupted }
    }

    /// Makes each message at least that long.
    pub(crate) fn of_bytes(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }

    /// Posts a message to the app's endpoint.
    pub(crate) fn post(&mut self, inbox: &Inbox, app: &str, about: &'static str) -> Result<Number, Failure> {
        let Some(endpoint) = inbox.endpoint(app) else {
            return Err(Failure::new(Exit::Failed, format!("{app} has reported no endpoint")));
        };
        let mut body = format!("{} message {} to {app}, {about}", self.what, self.sent.len() + 1);
        body.extend(std::iter::repeat_n('.', self.bytes.saturating_sub(body.len())));
        inbox.expect(&body);
        let at = clock::boot().as_nanos();
        let response = self
            .agent
            .post(&endpoint)
            .header("TTL", TTL)
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
        self.sent.push(Sent { app: app.to_owned(), about, at, body });
        Ok(Number(self.sent.len() - 1))
    }

    /// Waits until the app has it. Gives back the nanoseconds since it was posted, or none when it did not come within
    /// `patience` from now (it may come still), or the user wants to stop.
    pub(crate) fn wait(&self, inbox: &Inbox, number: Number, patience: Duration) -> Option<u64> {
        let sent = self.sent.get(number.0)?;
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(arrived) = inbox.wait_for(&sent.body, left.min(TURN)) {
                return Some(arrived.first.saturating_sub(sent.at));
            }
            if left.is_zero() || self.interrupted.load(Ordering::Relaxed) {
                return None;
            }
        }
    }

    /// [`Pushes::post`] and [`Pushes::wait`].
    pub(crate) fn send(
        &mut self,
        inbox: &Inbox,
        app: &str,
        about: &'static str,
        patience: Duration,
    ) -> Result<Option<u64>, Failure> {
        let number = self.post(inbox, app, about)?;
        Ok(self.wait(inbox, number, patience))
    }

    /// All messages so far, each with what became of it.
    pub(crate) fn outcomes(&self, inbox: &Inbox) -> Vec<(&Sent, Arrived)> {
        self.sent.iter().map(|sent| (sent, inbox.arrived(&sent.body))).collect()
    }

    /// What became of all messages so far.
    pub(crate) fn count(&self, inbox: &Inbox) -> Messages {
        let mut messages = Messages::default();
        for (_, arrived) in self.outcomes(inbox) {
            messages.sent += 1;
            match arrived.times {
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
