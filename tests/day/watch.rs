//! What must run, as the test knows it, against what the kernel says, all the time.

use std::{
    collections::BTreeSet,
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Who must run must not be found frozen this long after, counted both ways: on a machine that stands still, in looks.
const KNOWN_AFTER: (Duration, u32) = (Duration::from_secs(1), 100);
const LOOK_EVERY: u16 = 5;

/// One app.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    pub(crate) name: &'static str,
    /// Why it must run.
    duties: BTreeSet<&'static str>,
    since: Option<(Instant, u32)>,
    /// It has been thawed since it must run.
    let_go: bool,
    pub(crate) frozen: bool,
    /// When it was asked to the front while it was frozen.
    asked: Option<Instant>,
    pub(crate) freezes: u32,
    pub(crate) thaws_to_front: u32,
    complained: bool,
}

/// What came out.
#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) apps: Vec<Watched>,
    pub(crate) false_freezes: Vec<String>,
    /// From asking for an app's window to its being thawed.
    pub(crate) to_thawed: Vec<Duration>,
    looks: u32,
    /// What happened lately, for the complaint.
    pub(crate) events: Vec<String>,
}

impl Book {
    /// From now on it must run.
    pub(crate) fn must(&mut self, app: usize, why: &'static str) {
        let app = &mut self.apps[app];
        app.duties.insert(why);
        if app.since.is_none() {
            (app.since, app.let_go, app.complained) = (Some((Instant::now(), self.looks)), false, false);
        }
    }

    /// This is no reason any more: say so before it is over.
    pub(crate) fn may(&mut self, app: usize, why: &str) {
        let app = &mut self.apps[app];
        app.duties.remove(why);
        if app.duties.is_empty() {
            app.since = None;
        }
    }

    pub(crate) fn asked_to_front(&mut self, app: usize) {
        let app = &mut self.apps[app];
        app.asked = app.frozen.then(Instant::now);
    }

    fn look(&mut self, app: usize, frozen: bool) {
        let (now, looks) = (Instant::now(), self.looks);
        let app = &mut self.apps[app];
        let became = frozen != app.frozen;
        app.frozen = frozen;
        if became && !frozen {
            app.let_go = true;
            if let Some(asked) = app.asked.take() {
                app.thaws_to_front += 1;
                self.to_thawed.push(now - asked);
            }
        }
        if became && frozen {
            app.freezes += 1;
        }
        let Some((since, from)) = app.since else { return };
        let known = now - since >= KNOWN_AFTER.0 && looks - from >= KNOWN_AFTER.1;
        if frozen && !app.complained && (known || became && app.let_go) {
            app.complained = true;
            let what = if became { "was frozen" } else { "is still frozen" };
            let (name, ago, duties) = (app.name, now - since, &app.duties);
            let last = self.events.iter().rev().take(6).cloned().collect::<Vec<_>>().join(" < ");
            self.false_freezes.push(format!("{name} {what} {ago:?} after it had to run ({duties:?}); {last}"));
        }
    }
}

/// Looks all the time, until it is dropped.
pub(crate) struct Watch {
    pub(crate) book: Arc<Mutex<Book>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Apps with their cgroups.
    pub(crate) fn start(apps: Vec<(&'static str, PathBuf)>) -> Self {
        let watched = apps.iter().map(|(name, _)| Watched { name, ..Watched::default() }).collect();
        let book = Arc::new(Mutex::new(Book { apps: watched, ..Book::default() }));
        let files: Vec<File> = apps.iter().map(|(_, path)| File::open(path.join("cgroup.events")).unwrap()).collect();
        let over = Arc::new(AtomicBool::new(false));
        let (seen, ended) = (Arc::clone(&book), Arc::clone(&over));
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                {
                    // What is read is as new as what is expected.
                    let mut book = seen.lock().unwrap();
                    book.looks += 1;
                    for (index, file) in files.iter().enumerate() {
                        let mut buffer = [0; 128];
                        let count = file.read_at(&mut buffer, 0).unwrap();
                        let frozen = String::from_utf8_lossy(&buffer[..count]).contains("frozen 1");
                        book.look(index, frozen);
                    }
                }
                let mut fds: Vec<PollFd<'_>> =
                    files.iter().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLPRI)).collect();
                let _ = poll(&mut fds, PollTimeout::from(LOOK_EVERY));
            }
        });
        Self { book, over, thread: Some(thread) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
