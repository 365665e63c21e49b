//! Waiting for what others do: another process, a thread, a program.

use std::{
    thread,
    time::{Duration, Instant},
};

/// For what takes a moment; far more than it takes on a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

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
