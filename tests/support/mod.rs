//! A whole world on loopback for tests of the daemon: a private bus, a relay behind a front that can be cut, the daemon,
//! sample apps in processes of their own and apps played by the test. All of it ends with its [`World`].

mod app;
#[path = "../bus/support.rs"]
#[expect(dead_code, reason = "made for the tests of the bus; shared")]
pub(crate) mod bus;
mod fake;
mod front;
mod patience;
mod processes;
#[path = "../relay/harness.rs"]
#[expect(dead_code, reason = "made for the tests of the relay; shared")]
mod relay;
mod reports;
mod world;

use std::time::Duration;

pub(crate) use self::{
    app::{Client, dict},
    bus::{Behaviour, error_of},
    fake::{Fake, Peer},
    front::Authority,
    patience::{PATIENCE, wait, wait_for},
    processes::{is_held, is_running, memory, signal},
    relay::{Relay, Sender},
    world::{FAST, Setup, World, alone, nightporterd, of},
};

/// Whether something stays as it is for a while.
pub(crate) fn stays(time: Duration, mut look: impl FnMut() -> bool) -> bool {
    wait_for(time, || (!look()).then_some(())).is_none()
}
