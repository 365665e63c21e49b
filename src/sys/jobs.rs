//! Blocking work off the loop: name resolution, downloads, `smaps_rollup`, `memory.reclaim`. Threads are made when there
//! is work and end when there is none, so that an idle daemon keeps none of their memory.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

type Job = Box<dyn FnOnce() + Send>;

/// Threads at most, where nothing else is asked for.
const THREADS: usize = 2;
/// Jobs waiting at most. Each belongs to one app or link, so this is beyond what the core can ask for at once.
const QUEUE: usize = 4096;
/// A thread without work ends after this.
const LINGER: Duration = Duration::from_secs(2);
/// Enough for getaddrinfo(3), ureq and rustls.
const STACK: usize = 512 * 1024;

/// A handle on a group of workers. Work that may wait for a slow peer has a group of its own, so that nothing else waits
/// with it.
#[derive(Clone)]
pub struct Jobs {
    shared: Arc<Shared>,
}

impl Default for Jobs {
    fn default() -> Self {
        Self::new(THREADS)
    }
}

struct Shared {
    most: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Jobs {
    /// A group of at most `threads` workers, none of which exists yet.
    pub fn new(threads: usize) -> Self {
        Self { shared: Arc::new(Shared { most: threads, state: Mutex::default(), wake: Condvar::new() }) }
    }

    /// Runs `job` soon on another thread. False when the queue is full or no thread can be made: the job is dropped.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let mut state = self.shared.lock();
        if state.queue.len() >= QUEUE {
            return false;
        }
        state.queue.push_back(Box::new(job));
        if state.idle >= state.queue.len() {
            self.shared.wake.notify_one();
            return true;
        }
        if state.threads >= self.shared.most {
            return true;
        }
        let shared = Arc::clone(&self.shared);
        let spawned = thread::Builder::new().name("job".into()).stack_size(STACK).spawn(move || shared.work());
        match spawned {
            Ok(_) => state.threads += 1,
            Err(error) if state.threads == 0 => {
                log::error!("cannot start a worker thread: {error}");
                state.queue.pop_back();
                return false;
            }
            // The threads there are will come to it.
            Err(_) => {}
        }
        true
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain data that no panic can leave half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let (back, timeout) = self.wake.wait_timeout(state, LINGER).unwrap_or_else(PoisonError::into_inner);
            state = back;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn every_job_runs_and_the_threads_end() {
        let jobs = Jobs::default();
        let (sender, receiver) = mpsc::channel();
        for n in 0..100 {
            let sender = sender.clone();
            assert!(jobs.run(move || sender.send(n).unwrap()));
        }
        drop(sender);
        let mut seen: Vec<i32> = receiver.iter().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
        while jobs.shared.lock().threads > 0 {
            thread::sleep(Duration::from_millis(20));
        }
    }
}
