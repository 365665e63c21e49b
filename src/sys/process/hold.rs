//! What holds an app still, how it lets go, and how long to wait for the kernel's word.

use std::{fs::File, io, os::unix::fs::FileExt, time::Duration};

use rustix::process::Signal;

use super::{
    cgroup::{Cgroup, Events},
    procfs::{Member, ProcDir, is_gone},
};
use crate::time::Instant;

/// Between looks at a tree that is stopping: doubled each time, from the first to the last of these.
const LOOK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// Processes, and threads of each, that are asked why a freeze does not end.
const SUSPECTS: usize = 256;
/// Where a parent in vfork(2) waits, as different kernels call it.
const VFORK: &[&str] = &["kernel_clone", "wait_for_vfork_done", "_do_fork"];

/// What holds an app still.
#[derive(Debug)]
pub(super) enum Hold {
    Cgroup { cgroup: Cgroup, events: File },
    Tree { stopped: Vec<Member> },
}

impl Hold {
    /// Lets run what is held; completion is the kernel's.
    pub(super) fn release(&self) -> io::Result<()> {
        match self {
            Self::Cgroup { cgroup, .. } => match cgroup.set_frozen(false) {
                Err(error) if is_gone(&error) => Ok(()),
                result => result,
            },
            Self::Tree { stopped, .. } => {
                let mut result = Ok(());
                // Children before their parents, so that nobody waits for a child that is still stopped.
                for member in stopped.iter().rev() {
                    match member.signal(Signal::CONT) {
                        Err(error) if !is_gone(&error) => result = Err(error),
                        _ => {}
                    }
                }
                result
            }
        }
    }

    /// Whether the kernel lets it run again.
    pub(super) fn is_running(&self) -> io::Result<bool> {
        match self {
            Self::Cgroup { events, .. } => match read_frozen(events) {
                Ok(frozen) => Ok(!frozen),
                Err(error) if is_gone(&error) => Ok(true),
                Err(error) => Err(error),
            },
            Self::Tree { stopped, .. } => Ok(stopped.iter().all(|member| member.is_stopped() != Some(true))),
        }
    }
}

/// What is waited for, and since when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    pub(super) since: Instant,
    pub(super) deadline: Instant,
    pub(super) next: Instant,
    pause: Duration,
}

impl Wait {
    pub(super) fn start(now: Instant, patience: Duration) -> Self {
        Self { since: now, deadline: now + patience, next: now + LOOK.0, pause: LOOK.0 }
    }

    /// Something else speaks up before the deadline.
    pub(super) fn only_deadline(&mut self) {
        self.next = self.deadline;
    }

    /// Looks again soon, or only at the deadline where the kernel speaks up by itself.
    pub(super) fn again(&mut self, now: Instant, told: bool) {
        self.pause = (self.pause * 2).min(LOOK.1);
        self.next = if told { self.deadline } else { self.deadline.min(now + self.pause) };
    }
}

/// How far a freeze has come.
pub(super) enum Progress {
    /// These are.
    Held(Vec<Member>),
    /// The kernel tells when there is more to see.
    Told,
    /// To be looked at again; why it is not held yet.
    Look(String),
}

/// Which of the processes in a cgroup keeps it from coming to rest, as a sentence part.
pub(super) fn hanging(hold: &Hold) -> Option<String> {
    let Hold::Cgroup { cgroup, .. } = hold else { return None };
    let mut at_worst = None;
    for pid in cgroup.procs().ok()?.into_iter().take(SUSPECTS) {
        let Ok(dir) = ProcDir::open(pid) else { continue };
        for thread in dir.threads(pid).unwrap_or_default().into_iter().take(SUSPECTS) {
            let what = match thread.state {
                'D' => "hangs in the kernel",
                'R' => "does not stop running",
                _ => continue,
            };
            let place = dir.read(&format!("task/{}/wchan", thread.pid)).unwrap_or_default();
            // Waiting for a child in vfork(2) counts as being at rest.
            let at_rest = VFORK.contains(&place.as_str());
            let place = if place.is_empty() || place == "0" { String::new() } else { format!(", {place}") };
            let told = format!("process {pid} ({}{place}) {what}", thread.comm);
            if !at_rest {
                return Some(told);
            }
            at_worst.get_or_insert(told);
        }
    }
    at_worst
}

/// `frozen` of `cgroup.events`; reading is also what arms the next notification.
pub(super) fn read_frozen(events: &File) -> io::Result<bool> {
    let mut buffer = [0; 256];
    let length = events.read_at(&mut buffer, 0)?;
    let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
    Ok(Events::parse(&text).frozen)
}
