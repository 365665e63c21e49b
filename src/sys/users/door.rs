//! A socket of a user's: of the session bus, or another in the runtime directory. Found when it is there, and connected to as
//! that user, for root is not let in.
//!
//! Who listens takes a caller's credentials when it connects, so the connection stays good when the thread that made it is
//! gone.

use std::{
    ffi::OsStr,
    fs::File,
    future::Future,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, OwnedFd},
        linux::fs::MetadataExt,
        unix::{ffi::OsStrExt, fs::FileTypeExt, net::UnixStream},
    },
    path::Path,
    pin::pin,
    task::Poll,
    time::Duration,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use rustix::fs::{CWD, Mode, OFlags, inotify, openat};
use zbus::{Connection, connection::Builder};
use zruntime::{AsyncIo, Shared, SharedRuntime};

use super::{
    User,
    errand::Errands,
    guard::{Closer, Guarded},
};

/// A user's bus that has not let us in within this is as good as absent.
const LIMIT: Duration = Duration::from_secs(5);
/// Between two attempts, first and at most.
pub(in crate::sys) const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Attempts that came to nothing after which only a new socket is worth another: some six minutes.
pub(in crate::sys) const ATTEMPTS: u32 = 10;
/// The file name of the bus's socket (systemd's dbus.socket, pam_systemd's `DBUS_SESSION_BUS_ADDRESS`).
const BUS: &str = "bus";

/// The way to one user's session bus, or to another socket of that user.
#[derive(Debug)]
pub(in crate::sys) struct Door {
    user: User,
    /// The socket's file name.
    socket: &'static str,
    errands: Errands,
    /// Tells of new sockets, once the directory is there.
    watch: Option<AsyncIo<OwnedFd, Shared>>,
    closer: Closer,
    failed: u32,
    /// Whether it is worth looking again without there being a new socket: not, where there was none and one would be told of.
    again: bool,
    /// The connection ends when something is said on it that is not taken.
    strict: bool,
}

/// What looking for the socket came to.
struct Looked {
    watch: Option<OwnedFd>,
    stream: io::Result<UnixStream>,
}

impl Door {
    /// To the session bus.
    pub(in crate::sys) fn new(user: User, errands: Errands) -> Self {
        Self::to(BUS, user, errands)
    }

    /// To another socket, by its file name.
    pub(in crate::sys) fn to(socket: &'static str, user: User, errands: Errands) -> Self {
        Self { user, socket, errands, watch: None, closer: Closer::default(), failed: 0, again: true, strict: false }
    }

    /// To the session bus, for who must hear everything that is said: the connection ends with what is not taken.
    pub(in crate::sys) fn strict(user: User, errands: Errands) -> Self {
        Self { strict: true, ..Self::new(user, errands) }
    }

    /// A connection to the user's bus, within 5 s.
    ///
    /// # Errors
    /// As a sentence part: the socket is not there, is somebody else's, or does not answer.
    pub(in crate::sys) async fn connect(&mut self) -> Result<Connection, String> {
        self.failed += 1;
        let runtime = SharedRuntime::current().map_err(|error| error.to_string())?;
        let connected = runtime.timeout(LIMIT, self.attempt(&runtime)).await;
        connected.unwrap_or_else(|_| Err("it does not answer".into()))
    }

    /// A connection to whoever listens there, who may not have noticed yet, within 5 s. Non-blocking.
    ///
    /// # Errors
    /// As a sentence part: the socket is not there, is somebody else's, or leads nowhere.
    pub(in crate::sys) async fn open(&mut self) -> Result<UnixStream, String> {
        self.failed += 1;
        let runtime = SharedRuntime::current().map_err(|error| error.to_string())?;
        let opened = runtime.timeout(LIMIT, self.enter(&runtime)).await;
        let opened = opened.unwrap_or_else(|_| Err("the directory does not answer".into()));
        if opened.is_ok() {
            self.watch = None;
        }
        opened
    }

    async fn attempt(&mut self, runtime: &SharedRuntime) -> Result<Connection, String> {
        let stream = self.enter(runtime).await?;
        let socket = Guarded::new(stream, self.closer.clone(), self.strict).map_err(|error| error.to_string())?;
        let connected = Builder::socket(socket).user_id(self.user.uid).build().await.map_err(|error| error.to_string());
        if connected.is_ok() {
            // What it says from now on nobody would read.
            self.watch = None;
        }
        connected
    }

    async fn enter(&mut self, runtime: &SharedRuntime) -> Result<UnixStream, String> {
        let (directory, uid, name) = (self.user.runtime_dir.clone(), self.user.uid, self.socket);
        (self.watch, self.again) = (None, true);
        let looked = self.errands.run(&self.user, move || look(&directory, name, uid)).await;
        let looked = looked.map_err(|error| format!("cannot act as user {uid}: {error}"))?;
        // The directory may be another one than before: the user's own is mounted over the first.
        self.watch = looked.watch.and_then(|watch| AsyncIo::new(runtime, watch).ok());
        let missing = looked.stream.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        self.again = !missing || self.watch.is_none();
        let at = self.user.runtime_dir.join(self.socket);
        looked.stream.map_err(|error| format!("{}: {error}", at.display()))
    }

    /// It was of use.
    pub(in crate::sys) fn succeeded(&mut self) {
        self.failed = 0;
    }

    /// Until it is worth trying again: a new socket is there, or, where something was there or nothing tells of new ones,
    /// some time has passed, less often each time and in the end not at all.
    pub(in crate::sys) async fn wait(&mut self) {
        let Ok(runtime) = SharedRuntime::current() else { return };
        // However much is made of new sockets.
        runtime.sleep(RETRY.0).await;
        let mut sleep = pin!(async {
            match self.again && self.failed < ATTEMPTS {
                true => runtime.sleep(delay(self.failed) - RETRY.0).await,
                false => std::future::pending().await,
            }
        });
        let mut news = pin!(async {
            match &self.watch {
                Some(watch) => socket_came(watch, |name| name == self.socket).await,
                None => std::future::pending().await,
            }
        });
        std::future::poll_fn(|context| match sleep.as_mut().poll(context) {
            Poll::Pending => news.as_mut().poll(context),
            ready => ready,
        })
        .await;
    }
}

/// Waits until there is something new of a name that is `ours`, or the directory is gone.
pub(in crate::sys) async fn socket_came(watch: &AsyncIo<OwnedFd, Shared>, ours: impl Fn(&OsStr) -> bool) {
    let read = watch.read_with(|watch| {
        let mut buffer = [MaybeUninit::uninit(); 1024];
        let mut reader = inotify::Reader::new(watch, &mut buffer);
        loop {
            let event = reader.next()?;
            let lost = inotify::ReadFlags::IGNORED | inotify::ReadFlags::QUEUE_OVERFLOW;
            let ours = event.file_name().is_some_and(|name| ours(OsStr::from_bytes(name.to_bytes())));
            if ours || event.events().intersects(lost) {
                return Ok(());
            }
        }
    });
    if let Err(error) = read.await {
        log::debug!("a directory is not watched any more: {error}");
        // Nothing more will be heard.
        std::future::pending().await
    }
}

/// How long after as many attempts in vain another is worth it; twice as long each time, up to a minute.
pub(in crate::sys) fn delay(failed: u32) -> Duration {
    let doublings = failed.saturating_sub(1);
    (RETRY.0 * 2_u32.saturating_pow(doublings)).min(RETRY.1)
}

/// As the user: watches the directory, then looks for the socket, so that none can come between.
fn look(directory: &Path, socket: &str, uid: u32) -> Looked {
    let opened = match open(directory, uid) {
        Ok(opened) => opened,
        Err(error) => return Looked { watch: None, stream: Err(error) },
    };
    let watch = watch(&opened).inspect_err(|error| log::debug!("cannot watch {}: {error}", directory.display())).ok();
    Looked { watch, stream: enter(&opened, OsStr::new(socket), uid) }
}

/// The user's own directory.
pub(in crate::sys) fn open(directory: &Path, uid: u32) -> io::Result<File> {
    let opened = openat(CWD, directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(io::Error::from).and_then(|fd| owned_by(fd, uid))
}

/// Tells of what is new in the directory.
pub(in crate::sys) fn watch(directory: &File) -> io::Result<OwnedFd> {
    let inotify = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    let news = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::ONLYDIR;
    inotify::add_watch(&inotify, itself(directory), news)?;
    Ok(inotify)
}

/// Connects to the socket in the directory, if it is the user's own. Does not wait for whoever listens.
pub(in crate::sys) fn enter(directory: &File, name: &OsStr, uid: u32) -> io::Result<UnixStream> {
    let found = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let found = owned_by(found, uid)?;
    if !found.metadata()?.file_type().is_socket() {
        return Err(io::Error::other("it is no socket"));
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // Through the very socket that was looked at, whatever the name leads to by now.
    connect(stream.as_raw_fd(), &UnixAddr::new(itself(&found).as_str())?)?;
    Ok(stream.into())
}

/// It belongs to the user, not to somebody who put it there for the daemon to talk to.
fn owned_by(fd: OwnedFd, uid: u32) -> io::Result<File> {
    let file = File::from(fd);
    let owner = file.metadata()?.st_uid();
    if owner == uid { Ok(file) } else { Err(io::Error::other(format!("it belongs to user {owner}"))) }
}

fn itself(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixListener, time::Instant};

    use super::*;

    fn own_uid() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[test]
    fn only_the_users_own_socket_is_entered() {
        let dir = tempfile::tempdir().unwrap();
        let error = |uid: u32| look(dir.path(), BUS, uid).stream.unwrap_err().to_string();
        let uid = own_uid();
        assert!(error(uid).contains("No such file"), "{}", error(uid));
        fs::write(dir.path().join("bus"), "").unwrap();
        assert!(error(uid).contains("no socket"), "{}", error(uid));
        fs::remove_file(dir.path().join("bus")).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        let listener = UnixListener::bind(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, dir.path().join("bus")).unwrap();
        assert!(error(uid).contains("no socket"), "a link is not followed: {}", error(uid));
        fs::rename(&elsewhere, dir.path().join("bus")).unwrap();
        look(dir.path(), BUS, uid).stream.unwrap();
        drop(listener);
        assert!(error(uid).contains("refused"), "{}", error(uid));
        assert!(error(uid + 1).contains("belongs to user"), "{}", error(uid + 1));
    }

    #[test]
    fn who_accepts_nobody_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bus");
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        nix::sys::socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let waiting: Vec<_> = (0..8).map(|_| look(dir.path(), BUS, own_uid()).stream).collect();
        assert!(waiting.iter().any(Result::is_ok) && waiting.iter().any(Result::is_err));
    }

    #[test]
    fn a_new_socket_is_noticed_at_once_and_other_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let user = User { uid: own_uid(), gid: 0, runtime_dir: dir.path().into() };
        let mut door = Door::new(user, Errands::default());
        zbus::block_on(async {
            assert!(door.connect().await.is_err());
            fs::write(dir.path().join("other"), "").unwrap();
            let runtime = SharedRuntime::current().unwrap();
            assert!(runtime.timeout(RETRY.0 * 3, door.wait()).await.is_err());
            let _listener = UnixListener::bind(dir.path().join("bus")).unwrap();
            assert!(runtime.timeout(LIMIT * 6, door.wait()).await.is_ok());
        });
    }

    #[test]
    fn a_socket_nobody_listens_at_is_tried_again_and_in_the_end_only_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bus");
        drop(UnixListener::bind(&path).unwrap());
        let user = User { uid: own_uid(), gid: 0, runtime_dir: dir.path().into() };
        let mut door = Door::new(user, Errands::default());
        zbus::block_on(async {
            assert!(door.connect().await.is_err());
            let runtime = SharedRuntime::current().unwrap();
            assert!(runtime.timeout(LIMIT * 6, door.wait()).await.is_ok());
            door.failed = ATTEMPTS;
            assert!(runtime.timeout(RETRY.0 * 2, door.wait()).await.is_err());
            fs::remove_file(&path).unwrap();
            let _listener = UnixListener::bind(&path).unwrap();
            assert!(runtime.timeout(LIMIT * 6, door.wait()).await.is_ok());
        });
    }

    #[test]
    fn who_never_answers_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(dir.path().join("bus")).unwrap();
        let user = User { uid: own_uid(), gid: 0, runtime_dir: dir.path().into() };
        let begun = Instant::now();
        let error = zbus::block_on(Door::new(user, Errands::default()).connect()).unwrap_err();
        assert_eq!(error, "it does not answer");
        assert!(begun.elapsed() >= LIMIT);
    }
}
