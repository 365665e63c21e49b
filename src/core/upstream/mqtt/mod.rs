//! MQTT 5 and 3.1.1 (push.md §3e).

mod identity;
mod wire;

use std::sync::Arc;

use super::{Beginning, Output, Standing};
use crate::{
    event::{LinkEvent, LinkId},
    model::RegistrationId,
    time::{Instant, Now},
    view::LinkState,
};

/// One server's session.
#[derive(Debug)]
pub struct Session {
    since: Instant,
}

impl Session {
    /// A session that goes on where an earlier life ended.
    pub fn new(_beginning: Beginning<'_>, now: Now) -> Self {
        Self { since: now.boot }
    }

    /// An event on a link.
    pub fn handle_link(&mut self, _link: LinkId, _event: LinkEvent, _now: Now) {}

    /// Time passed.
    pub fn handle_timeout(&mut self, _now: Now) {}

    /// The network came back or changed, or the machine woke up.
    pub fn handle_network(&mut self, _now: Now) {}

    /// Which network it is now.
    pub fn set_network(&mut self, _id: Option<Arc<str>>, _now: Now) {}

    /// Whether there may be a link at all.
    pub fn set_allowed(&mut self, _allowed: bool, _now: Now) {}

    /// Messages were turned away that the server still has.
    pub fn restart(&mut self, _now: Now) {}

    /// Make a registration.
    pub fn register(&mut self, _registration: RegistrationId, _now: Now) {}

    /// Give a registration up.
    pub fn unregister(&mut self, _registration: RegistrationId, _now: Now) {}

    /// The message is safe: acknowledge it.
    pub fn safe(&mut self, _registration: RegistrationId, _id: &Arc<str>, _now: Now) {}

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        None
    }

    /// When [`Session::handle_timeout`] wants to be called next.
    pub const fn poll_timeout(&self) -> Option<Instant> {
        None
    }

    /// What is worth waking a sleeping machine for.
    pub const fn poll_wake(&self) -> Option<Instant> {
        None
    }

    /// What `status` shows.
    pub fn standing(&self) -> Standing {
        Standing {
            state: LinkState::Idle,
            since: self.since,
            retry_at: None,
            last_error: None,
            trouble: None,
            registrations: 0,
            heartbeat: None,
        }
    }
}
