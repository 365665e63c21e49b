//! A user's compositors, found by their sockets: `wayland-*` in the runtime directory. Which of them is the session's is not
//! known to a daemon of the system (`WAYLAND_DISPLAY` is in the session's environment), so all of them are followed.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    pin::{Pin, pin},
    task::Poll,
    time::{Duration, Instant},
};

use zruntime::{AsyncIo, Shared, SharedRuntime, Task};

use super::{desk::Desk, link};
use crate::sys::users::{
    User,
    door::{self, ATTEMPTS, RETRY, socket_came},
    errand::Errands,
};

/// Compositors of a user that are followed at once.
const COMPOSITORS: usize = 4;
/// Sockets that are tried, and names that are looked at for them.
const SOCKETS: usize = 8;
const NAMES: usize = 4096;
/// A compositor that lived this long was of use.
const OF_USE: Duration = Duration::from_secs(60);

/// One user's compositors.
#[derive(Debug)]
pub(super) struct Sockets {
    user: User,
    /// A socket of another name.
    also: Option<OsString>,
    errands: Errands,
    desk: Desk,
    /// Tells of new sockets, once the directory is there.
    watch: Option<AsyncIo<OwnedFd, Shared>>,
    open: Vec<Open>,
    /// Whether it is worth looking again without there being a new socket.
    again: bool,
    /// Looks in vain and compositors that did not live long, since there was a new socket.
    failed: u32,
}

#[derive(Debug)]
struct Open {
    name: OsString,
    since: Instant,
    /// Ends with the reason.
    task: Task<String, Shared>,
}

/// What looking came to.
#[derive(Debug, Default)]
struct Looked {
    watch: Option<OwnedFd>,
    streams: Vec<(OsString, UnixStream)>,
    /// Something did not work that may work later.
    failed: Option<io::Error>,
    /// There are more sockets than are tried.
    more: bool,
}

/// Why waiting ended.
enum News {
    /// There may be a new socket, or what failed may work by now.
    Look,
    /// The compositor with this index is gone, for this reason.
    Gone(usize, String),
}

impl Sockets {
    pub(super) fn new(user: User, also: Option<OsString>, errands: Errands, desk: Desk) -> Self {
        Self { user, also, errands, desk, watch: None, open: Vec::new(), again: false, failed: 0 }
    }

    /// Follows all that is there and comes, until it is dropped.
    pub(super) async fn follow(mut self) {
        let runtime = match SharedRuntime::current() {
            Ok(runtime) => runtime,
            Err(error) => return log::error!("no runtime for the compositors: {error}"),
        };
        loop {
            self.look(&runtime).await;
            // However much is made of new sockets.
            runtime.sleep(RETRY.0).await;
            while let News::Gone(index, reason) = self.news(&runtime).await {
                let Open { name, since, .. } = self.open.swap_remove(index);
                log::debug!("user {}: {}: {reason}", self.user.uid, name.display());
                // Its successor may come under the same name, which is not a new one then.
                self.again = true;
                self.failed = if since.elapsed() >= OF_USE { 1 } else { self.failed + 1 };
            }
        }
    }

    async fn look(&mut self, runtime: &SharedRuntime) {
        self.watch = None;
        let (directory, uid, also) = (self.user.runtime_dir.clone(), self.user.uid, self.also.clone());
        let known: Vec<OsString> = self.open.iter().map(|open| open.name.clone()).collect();
        let looked = self.errands.run(&self.user, move || look(&directory, uid, also.as_deref(), &known)).await;
        let looked = looked.unwrap_or_else(|error| Looked { failed: Some(error), ..Looked::default() });
        self.watch = looked.watch.and_then(|watch| AsyncIo::new(runtime, watch).ok());
        let more = looked.more || self.open.len() + looked.streams.len() > COMPOSITORS;
        for (name, stream) in looked.streams {
            if self.open.len() >= COMPOSITORS {
                break;
            }
            let (desk, known_as) = (self.desk.clone(), name.to_string_lossy().into_owned());
            let task = zruntime::spawn(async move { link::follow(&known_as, stream, &desk).await });
            self.open.push(Open { name, since: Instant::now(), task });
        }
        self.desk.more(more);
        self.again = looked.failed.is_some();
        if let Some(error) = looked.failed {
            log::debug!("user {}: compositors: {error}", self.user.uid);
            self.failed += 1;
        }
    }

    /// Until it is worth looking again.
    async fn news(&mut self, runtime: &SharedRuntime) -> News {
        let mut sleep = (self.again && self.failed < ATTEMPTS).then(|| runtime.sleep(door::delay(self.failed)));
        let watch = &self.watch;
        let mut socket = pin!(async {
            match watch {
                Some(watch) => socket_came(watch, |name| is_socket(name, self.also.as_deref())).await,
                None => std::future::pending().await,
            }
        });
        let open = &mut self.open;
        std::future::poll_fn(|context| {
            for (index, open) in open.iter_mut().enumerate() {
                if let Poll::Ready(ended) = Pin::new(&mut open.task).poll(context) {
                    return Poll::Ready(News::Gone(index, ended.unwrap_or_else(|error| error.to_string())));
                }
            }
            if socket.as_mut().poll(context).is_ready() {
                self.failed = 0;
                return Poll::Ready(News::Look);
            }
            match &mut sleep {
                Some(sleep) => Pin::new(sleep).poll(context).map(|()| News::Look),
                None => Poll::Pending,
            }
        })
        .await
    }
}

/// As the user: watches the directory, then looks for sockets, so that none can come between; connects to those that are
/// not `known`.
fn look(directory: &Path, uid: u32, also: Option<&OsStr>, known: &[OsString]) -> Looked {
    let opened = match door::open(directory, uid) {
        Ok(opened) => opened,
        Err(error) => return Looked { failed: Some(error), ..Looked::default() },
    };
    let mut looked = Looked { watch: door::watch(&opened).ok(), ..Looked::default() };
    let entries = match fs::read_dir(format!("/proc/self/fd/{}", opened.as_raw_fd())) {
        Ok(entries) => entries,
        Err(error) => return Looked { failed: Some(error), ..looked },
    };
    let names = entries.take(NAMES).filter_map(|entry| Some(entry.ok()?.file_name()));
    let mut names: Vec<OsString> = names.filter(|name| is_socket(name, also)).collect();
    names.sort();
    looked.more = names.len() > SOCKETS;
    for name in names.into_iter().take(SOCKETS).filter(|name| !known.contains(name)) {
        match door::enter(&opened, &name, uid) {
            Ok(stream) => looked.streams.push((name, stream)),
            // Left behind by a compositor that is gone, or there a moment before one listens.
            Err(error) => looked.failed = Some(error),
        }
    }
    looked
}

fn is_socket(name: &OsStr, also: Option<&OsStr>) -> bool {
    let name = name.as_encoded_bytes();
    let usual = name.starts_with(b"wayland-") && !name.ends_with(b".lock");
    usual || also.is_some_and(|also| also.as_encoded_bytes() == name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn names(looked: &Looked) -> Vec<&str> {
        looked.streams.iter().map(|(name, _)| name.to_str().unwrap()).collect()
    }

    #[test]
    fn every_socket_that_may_be_a_compositors_is_entered() {
        let dir = tempfile::tempdir().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        let listen = |name: &str| UnixListener::bind(dir.path().join(name)).unwrap();
        let find = |also: Option<&str>, known: &[OsString]| look(dir.path(), uid, also.map(OsStr::new), known);
        assert!(find(None, &[]).failed.is_none());
        let listeners = ["wayland-1", "wayland-0", "wayland-0.lock", "bus", "other"].map(listen);
        assert_eq!(names(&find(None, &[])), ["wayland-0", "wayland-1"]);
        assert_eq!(names(&find(Some("other"), &["wayland-1".into()])), ["other", "wayland-0"]);
        assert!(!find(None, &[]).more && find(None, &[]).watch.is_some());
        drop(listeners);
        let found = find(None, &[]);
        assert!(found.failed.is_some() && found.streams.is_empty());
        let many: Vec<_> = (2..12).map(|n| listen(&format!("wayland-{n}"))).collect();
        let found = find(None, &[]);
        assert!(found.more && found.streams.len() <= SOCKETS);
        drop(many);
        assert!(look(dir.path(), uid + 1, None, &[]).failed.is_some());
        assert!(look(&dir.path().join("none"), uid, None, &[]).failed.is_some());
    }
}
