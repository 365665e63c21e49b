//! What is watched all the time and speaks against holding an app still (lifecycle.md §0, §4.6, §6): as
//! [`Incoming::Sightings`], by process id, whenever it changes.
//!
//! | source | where | seen |
//! |---|---|---|
//! | `pipewire` | each user's `pipewire-0` | nodes that run: playback, capture |
//! | `session bus` | each user's session bus | MPRIS players that play, tray items, names with a role, GNOME's inhibitors, calls |
//! | `logind` | the system bus | locks against sleep and idling |
//!
//! - `pipewire`: a client that only looks, without libpipewire.
//! - `watch`: a task on a connection to a bus; `session`, `system`: what is looked at there.
//! - `roles`: the table of names. `line`: calls, from the system bus to the sessions. `teller`: when it is told.
//!
//! All of it runs on the bus thread and sleeps while nothing changes. Nobody here is waited for: who does not answer is as
//! good as absent. What belongs to a user is believed of that user's processes alone.
//!
//! Not seen: streams of a PulseAudio that is not PipeWire's; a PipeWire run for the whole system; idle inhibitors of the
//! Wayland protocol, of KDE's power management and of `org.freedesktop.ScreenSaver`, which nobody lists with a process;
//! GNOME's where the app's id is not its bus name; calls that ModemManager does not carry (oFono, VoIP), but for their
//! sound; names called by others that are not in the table, such as search providers.
//!
//! [`Incoming::Sightings`]: super::inbox::Incoming::Sightings

mod line;
mod pipewire;
mod roles;
mod session;
mod system;
mod teller;
mod watch;

use std::fmt;

use zbus::Connection;
use zruntime::{Shared, Task};

use self::{line::Line, session::SessionBus, system::SystemBus, teller::Teller};
use super::{
    inbox::Sender,
    users::{User, errand::Errands},
};

/// Hands out the watching, to whoever has the connections.
#[derive(Clone)]
pub struct Signs {
    inbox: Sender,
    line: Line,
}

impl fmt::Debug for Signs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signs").finish_non_exhaustive()
    }
}

impl Signs {
    /// `inbox` gets `Sightings`.
    pub fn new(inbox: Sender) -> Self {
        Self { inbox, line: Line::default() }
    }

    /// Watches the system bus until it is dropped or the connection breaks.
    pub(super) fn on_system_bus(&self, connection: Connection) -> Task<(), Shared> {
        let teller = Teller::new("logind", self.inbox.clone());
        zruntime::spawn(watch::watch(connection, SystemBus::new(self.line.clone()), teller))
    }

    /// Watches a user's session bus until it is dropped or the connection breaks.
    pub(super) fn on_session_bus(&self, connection: Connection, uid: u32) -> Task<(), Shared> {
        let teller = Teller::new("session bus", self.inbox.clone());
        zruntime::spawn(watch::watch(connection, SessionBus::new(uid, self.line.listen()), teller))
    }

    /// Watches what a user has beside the bus until it is dropped.
    pub(super) fn of_user(&self, user: User, errands: Errands) -> Task<(), Shared> {
        zruntime::spawn(pipewire::serve(user, errands, self.inbox.clone()))
    }
}
