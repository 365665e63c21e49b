//! The users who are logged in, and the way to each one's session bus (design.md, "One process on every bus").
//!
//! - `errand`: work done as a user, on a short-lived thread that alone has that user's rights.
//! - `door`: the socket of a user's bus, or another of that user: when it is there, and a connection made as that user.
//! - `guard`: what a bus that belongs to somebody else may send us.

pub(super) mod door;
pub(super) mod errand;
mod guard;

use std::{
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use async_channel::Receiver;
use futures_core::Stream;

/// A user who is logged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// The user's own group.
    pub gid: u32,
    /// `$XDG_RUNTIME_DIR`, where the session bus is.
    pub runtime_dir: PathBuf,
}

/// Users served at once; who logs in beyond it is not.
pub(super) const USERS: usize = 64;

/// Says who is logged in.
#[derive(Debug)]
pub struct Usher {
    present: Arc<Mutex<Vec<User>>>,
    rings: Vec<async_channel::Sender<()>>,
}

/// Hears who is logged in. The latest counts, so nothing need be queued.
#[derive(Debug)]
pub struct Roster {
    present: Arc<Mutex<Vec<User>>>,
    // Pinned once and for all, to be polled as it is.
    rung: Pin<Box<Receiver<()>>>,
}

/// Both ends.
pub fn roster() -> (Usher, Roster) {
    let mut usher = Usher { present: Arc::default(), rings: Vec::new() };
    let roster = usher.roster();
    (usher, roster)
}

impl Usher {
    /// One more who hears it, from now on.
    pub fn roster(&mut self) -> Roster {
        let (ring, rung) = async_channel::bounded(1);
        self.rings.push(ring);
        Roster { present: Arc::clone(&self.present), rung: Box::pin(rung) }
    }

    /// These are logged in, and nobody else.
    pub fn present(&self, users: Vec<User>) {
        *lock(&self.present) = users;
        for ring in &self.rings {
            // Full means that it rings already.
            let _ = ring.try_send(());
        }
    }
}

impl Roster {
    /// Who is logged in, when that has changed; `None` once nobody says so any more.
    pub(super) fn poll_changed(&mut self, context: &mut Context<'_>) -> Poll<Option<Vec<User>>> {
        let rung = self.rung.as_mut().poll_next(context);
        rung.map(|rung| rung.map(|()| lock(&self.present).clone()))
    }
}

fn lock(present: &Mutex<Vec<User>>) -> MutexGuard<'_, Vec<User>> {
    present.lock().unwrap_or_else(PoisonError::into_inner)
}
