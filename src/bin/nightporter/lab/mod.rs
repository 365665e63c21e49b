//! What `demo` and `measure` both stand on: a private bus, a push server, the daemon and apps, all of them processes of
//! their own that end with it, and what can be seen of them.

pub(crate) mod cgroups;
pub(crate) mod inbox;
pub(crate) mod processes;
pub(crate) mod pushes;
pub(crate) mod scripts;
pub(crate) mod sockets;
pub(crate) mod state;
pub(crate) mod world;
