//! Walks through all of `/proc`, shared among workers. One takes milliseconds where hundreds of processes run, and many times
//! as long where memory is short; a burst of apps that go to the background asks for several of each. Walked for each alone,
//! the looks fall behind just when apps have to be frozen: more run, so that each walk takes longer still.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::procfs::Processes;
use crate::time::Instant;

/// What a walk saw is of use for others this long after it began.
const SHARED_FOR: Duration = Duration::from_secs(1);

/// The last walk, while somebody may want to share it.
#[derive(Debug, Default)]
pub(super) struct Walks {
    last: Mutex<Option<Walk>>,
}

#[derive(Debug)]
struct Walk {
    begun: Instant,
    processes: Arc<Processes>,
}

impl Walks {
    /// What runs, by a walk that began when it was `asked` for or later, and lately; else by a new one. Waits while another
    /// walks: never call it on the loop.
    ///
    /// # Errors
    /// Those of `walk`.
    pub(super) fn since(
        &self,
        asked: Instant,
        now: impl Fn() -> Instant,
        walk: impl FnOnce() -> io::Result<Processes>,
    ) -> io::Result<Arc<Processes>> {
        // Whoever waits here was asked before the next walk begins, and shares that.
        let mut last = self.lock();
        let begun = now();
        if let Some(last) = &*last
            && last.begun >= asked
            && begun.since(last.begun) < SHARED_FOR
        {
            return Ok(Arc::clone(&last.processes));
        }
        // Not two in memory at a time.
        *last = None;
        let processes = Arc::new(walk()?);
        *last = Some(Walk { begun, processes: Arc::clone(&processes) });
        Ok(processes)
    }

    /// Nobody waits for a look: an idle daemon keeps nothing.
    pub(super) fn forget(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Walk>> {
        // Plain data that no panic can leave half-changed.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant::from_nanos(millis * 1_000_000)
    }

    #[test]
    fn those_who_asked_before_it_began_share_a_walk_for_a_second() {
        let walks = Walks::default();
        let ask = |asked, now| walks.since(at(asked), || at(now), || Ok(Processes::default())).unwrap();
        let first = ask(1000, 1100);
        assert!(Arc::ptr_eq(&first, &ask(1000, 1500)) && Arc::ptr_eq(&first, &ask(1100, 2099)));
        assert!(!Arc::ptr_eq(&first, &ask(1101, 1500)), "what it asks about may have come after");
        let second = ask(1000, 5000);
        assert!(Arc::ptr_eq(&second, &ask(1000, 5999)) && !Arc::ptr_eq(&second, &ask(1000, 6000)));
    }

    #[test]
    fn nothing_is_kept_of_what_failed_or_is_forgotten() {
        let walks = Walks::default();
        let none = || unreachable!("it is shared");
        let failed = walks.since(at(0), || at(1), || Err(io::ErrorKind::PermissionDenied.into()));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        let kept = walks.since(at(0), || at(2), || Ok(Processes::default())).unwrap();
        assert!(Arc::ptr_eq(&kept, &walks.since(at(0), || at(2), none).unwrap()));
        walks.forget();
        assert_eq!(Arc::strong_count(&kept), 1);
    }
}
