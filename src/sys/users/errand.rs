//! Work done with a user's rights instead of root's: what a user can put into a path (a link to a device, a file system
//! that never answers) then reaches no further than that user does, and nobody else waits for it.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use rustix::{
    process::{Gid, Uid, getegid, geteuid},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

use super::User;

/// Threads a user may have hanging; what comes then is refused.
const THREADS: usize = 4;
/// They open a few files.
const STACK: usize = 128 * 1024;

/// The threads under way.
#[derive(Clone, Debug, Default)]
pub(in crate::sys) struct Errands {
    running: Arc<Mutex<BTreeMap<u32, usize>>>,
}

impl Errands {
    /// Does `work` as `user`, on a thread that ends with it. Dropping the future leaves the thread to itself.
    ///
    /// # Errors
    /// When the system does not let us become that user (it takes CAP_SETUID and CAP_SETGID), or too much of what was
    /// asked before never ended.
    pub(in crate::sys) fn run<T, W>(
        &self,
        user: &User,
        work: W,
    ) -> impl Future<Output = io::Result<T>> + Send + use<T, W>
    where
        T: Send + 'static,
        W: FnOnce() -> T + Send + 'static,
    {
        let (told, answer) = async_channel::bounded(1);
        let started = self.start(user, move |became| {
            // Nobody may be waiting any more.
            let _ = told.try_send(became.map(|()| work()));
        });
        async move {
            started?;
            answer.recv().await.unwrap_or_else(|_| Err(io::Error::other("the thread ended without an answer")))
        }
    }

    fn start(&self, user: &User, work: impl FnOnce(io::Result<()>) + Send + 'static) -> io::Result<()> {
        let (uid, gid) = (user.uid, user.gid);
        let place = Place::take(&self.running, uid)?;
        let thread = thread::Builder::new().name(format!("user {uid}")).stack_size(STACK);
        thread.spawn(move || {
            let _place = place;
            work(become_user(uid, gid));
        })?;
        Ok(())
    }
}

/// One of a user's threads.
struct Place {
    running: Arc<Mutex<BTreeMap<u32, usize>>>,
    uid: u32,
}

impl Place {
    fn take(running: &Arc<Mutex<BTreeMap<u32, usize>>>, uid: u32) -> io::Result<Self> {
        let mut counts = lock(running);
        let count = counts.entry(uid).or_default();
        if *count >= THREADS {
            return Err(io::Error::other("what was tried before still hangs in that user's files"));
        }
        *count += 1;
        Ok(Self { running: Arc::clone(running), uid })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = lock(&self.running);
        if let Some(count) = counts.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.uid);
            }
        }
    }
}

fn lock(running: &Mutex<BTreeMap<u32, usize>>) -> MutexGuard<'_, BTreeMap<u32, usize>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives this thread, and no other, the rights of a user. Only the effective ids change: by the real and the saved ones
/// it stays root's, so that the user can neither signal nor trace it. There is no way back; the thread ends soon.
fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    // The kernel takes this for "leave it as it is".
    if uid == u32::MAX || gid == u32::MAX {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    if uid == geteuid().as_raw() {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // rustix makes the plain system calls; those of the C library would change every thread of the process. The uid is
    // last, for with it go the capabilities.
    set_thread_groups(&[gid])?;
    set_thread_res_gid(None::<Gid>, gid, None::<Gid>)?;
    set_thread_res_uid(None::<Uid>, uid, None::<Uid>)?;
    if (geteuid(), getegid()) == (uid, gid) { Ok(()) } else { Err(io::Error::from(io::ErrorKind::PermissionDenied)) }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf, sync::mpsc};

    use super::*;

    fn user(uid: u32) -> User {
        User { uid, gid: uid, runtime_dir: PathBuf::new() }
    }

    fn ids() -> [String; 3] {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        ["Uid:", "Gid:", "Groups:"].map(|field| {
            let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
            line.split_ascii_whitespace().collect::<Vec<_>>().join(" ")
        })
    }

    #[test]
    fn only_the_thread_becomes_the_user_and_root_keeps_hold_of_it() {
        assert!(geteuid().is_root(), "this test must run as root");
        let before = ids();
        let inside = zbus::block_on(Errands::default().run(&user(4_002_001), ids)).unwrap();
        let (uid, real) = (4_002_001, 0);
        assert_eq!(
            inside,
            [format!("{real} {uid} {real} {uid}"), format!("{real} {uid} {real} {uid}"), uid.to_string()]
        );
        assert_eq!(ids(), before);
        let secret = fs::read("/etc/shadow").map(drop).is_ok();
        let inside = zbus::block_on(Errands::default().run(&user(4_002_001), || fs::read("/etc/shadow").is_ok()));
        assert!(secret && !inside.unwrap());
    }

    #[test]
    fn a_user_whose_files_hang_has_a_few_threads_and_others_go_on() {
        let errands = Errands::default();
        let (hold, held) = (0..THREADS).map(|_| mpsc::channel::<()>()).unzip::<_, _, Vec<_>, Vec<_>>();
        for held in held {
            drop(errands.run(&user(4_002_001), move || held.recv()));
        }
        assert!(zbus::block_on(errands.run(&user(4_002_001), || ())).is_err());
        zbus::block_on(errands.run(&user(4_002_002), || ())).unwrap();
        drop(hold);
        while zbus::block_on(errands.run(&user(4_002_001), || ())).is_err() {
            thread::yield_now();
        }
    }

    #[test]
    fn nobody_becomes_the_id_that_means_no_change() {
        assert!(become_user(u32::MAX, 1).is_err());
        assert!(become_user(1, u32::MAX).is_err());
    }
}
