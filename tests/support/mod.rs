//! A whole world on loopback for tests of the daemon: a private bus, a relay behind a front that can be cut, the daemon,
//! sample apps in processes of their own and apps played by the test. All of it ends with its [`World`].

mod app;
#[path = "../bus/support.rs"]
#[expect(dead_code, reason = "made for the tests of the bus; shared")]
pub(crate) mod bus;
mod fake;
mod front;
mod processes;
#[path = "../relay/harness.rs"]
#[expect(dead_code, reason = "made for the tests of the relay; shared")]
mod relay;
mod reports;
mod world;

use std::{
    thread,
    time::{Duration, Instant},
};

pub(crate) use self::{
    app::{Client, dict},
    bus::{Behaviour, error_of},
    fake::{Fake, Peer},
    front::Authority,
    processes::{is_held, is_running, memory, signal},
    relay::{Relay, Sender},
    world::{FAST, Setup, World, alone, nightporterd, of},
};

/// For what takes a moment; far more than it takes on a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Looks again and again until `look` sees it.
pub(crate) fn wait<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    wait_for(PATIENCE, look).unwrap_or_else(|| panic!("waited {} s for {what}", PATIENCE.as_secs()))
}

/// The same, with a limit; `None` when it did not come.
pub(crate) fn wait_for<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let until = Instant::now() + limit;
    loop {
        if let Some(seen) = look() {
            return Some(seen);
        }
        if Instant::now() >= until {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether something stays as it is for a while.
pub(crate) fn stays(time: Duration, mut look: impl FnMut() -> bool) -> bool {
    wait_for(time, || (!look()).then_some(())).is_none()
}
