//! Which windows the sessions' compositors show (lifecycle.md §4.5).
//!
//! - `sockets`: the compositors' sockets in a user's runtime directory, connected to as that user.
//! - `link`: one socket; `desk`: what all compositors of a user tell together.
//! - `session`: what is said over a socket, without the socket; `toplevels` (wlroots), `plasma` (KWin): the protocols.
//! - `wire`: the bytes.
//!
//! It runs on the bus thread ([`super::bus::BusThread::spawn_with`]). Every socket is a user's to fake: what comes over it is
//! bounded in size and pace, and concerns that user's windows only. Nothing runs while no window changes.
//!
//! A compositor whose windows are not told (GNOME's; one that does not answer) counts as one window that may be anybody's
//! where another one of the same user tells its windows, and as nothing known where none does.

mod desk;
mod link;
mod plasma;
mod session;
mod sockets;
mod toplevels;
mod wire;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    future::{pending, poll_fn},
    path::{Path, PathBuf},
};

use zruntime::{Shared, Task};

use self::{desk::Desk, sockets::Sockets};
use super::{
    inbox::Sender,
    users::{Roster, USERS, User, errand::Errands},
};

/// Whose windows.
#[derive(Debug)]
pub enum Whose {
    /// Those of all users who are logged in.
    Users(Roster),
    /// This user's, with what `WAYLAND_DISPLAY` says, if anything.
    One(User, Option<OsString>),
}

impl Whose {
    /// Those of the user this process runs as; `None` without `XDG_RUNTIME_DIR`.
    pub fn own() -> Option<Self> {
        let runtime_dir = PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())?);
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let display = std::env::var_os("WAYLAND_DISPLAY").filter(|display| !display.is_empty());
        Some(Self::One(User { uid, gid, runtime_dir }, display))
    }
}

/// Follows the compositors until it is dropped. `inbox` gets `Incoming::Windows`: all windows of a user, at each change.
pub async fn serve(whose: Whose, inbox: Sender) {
    let errands = Errands::default();
    match whose {
        Whose::One(mut user, display) => {
            let display = display.map(PathBuf::from);
            if let Some(directory) = display.as_deref().filter(|path| path.is_absolute()).and_then(Path::parent) {
                user.runtime_dir = directory.into();
            }
            let name = display.as_deref().and_then(Path::file_name).map(OsString::from);
            Sockets::new(user.clone(), name, errands, Desk::new(user.uid, inbox)).follow().await;
        }
        Whose::Users(mut roster) => {
            let mut open = BTreeMap::new();
            while let Some(users) = poll_fn(|context| roster.poll_changed(context)).await {
                present(&users, &mut open, &errands, &inbox).await;
            }
            // Nobody says any more who comes and goes; who is there stays.
            pending().await
        }
    }
}

/// What is open for a user.
struct Open {
    user: User,
    desk: Desk,
    task: Task<(), Shared>,
}

/// Follows these users' compositors and no others'.
async fn present(users: &[User], open: &mut BTreeMap<u32, Open>, errands: &Errands, inbox: &Sender) {
    let gone: Vec<_> = open.extract_if(.., |_, open| !users.contains(&open.user)).collect();
    for (_, Open { desk, task, .. }) in gone {
        task.cancel().await;
        desk.close();
    }
    for user in users.iter().take(USERS) {
        open.entry(user.uid).or_insert_with(|| {
            let desk = Desk::new(user.uid, inbox.clone());
            let sockets = Sockets::new(user.clone(), None, errands.clone(), desk.clone());
            Open { user: user.clone(), desk, task: zruntime::spawn(sockets.follow()) }
        });
    }
}
