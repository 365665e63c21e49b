//! A user with a runtime directory of that user's own, real compositors in it without a screen, real windows, and everything
//! that is told of them.

#[path = "../support/patience.rs"]
mod patience;

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{FileTypeExt, PermissionsExt, chown},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use mio::{Events, Poll, Token};
use nightporter::{
    model::Window,
    sys::{
        bus::BusThread,
        inbox::{self, Inbox, Incoming},
        users::User,
        windows::{Whose, serve},
    },
};
use tempfile::TempDir;

use self::patience::PATIENCE;
pub(crate) use self::patience::wait;

/// sway does not run as root.
const SOMEBODY: u32 = 64321;

/// A user's runtime directory.
pub(crate) struct Home {
    dir: TempDir,
    pub(crate) user: User,
}

impl Home {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = nix::unistd::geteuid().is_root();
        let uid = if root { SOMEBODY } else { nix::unistd::geteuid().as_raw() };
        let gid = if root { SOMEBODY } else { nix::unistd::getegid().as_raw() };
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        chown(dir.path(), Some(uid), Some(gid)).unwrap();
        let user = User { uid, gid, runtime_dir: dir.path().into() };
        Self { dir, user }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A program of the user.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let log = File::options().append(true).create(true).open(self.path("log")).unwrap();
        command.uid(self.user.uid).gid(self.user.gid).current_dir("/").env_clear();
        command.env("PATH", "/usr/bin:/bin:/usr/sbin").env("HOME", self.dir.path());
        command.env("XDG_RUNTIME_DIR", self.dir.path());
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command
    }

    /// A socket of the user's, behind which is what the test makes of it.
    pub(crate) fn socket(&self, name: &str) -> UnixListener {
        let listener = UnixListener::bind(self.path(name)).unwrap();
        chown(self.path(name), Some(self.user.uid), Some(self.user.gid)).unwrap();
        listener
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Where somebody listens.
    fn displays(&self) -> Vec<String> {
        let names = fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap());
        let sockets = names.filter(|entry| entry.file_type().unwrap().is_socket());
        let names = sockets.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| name.starts_with("wayland-") && UnixStream::connect(self.path(name)).is_ok()).collect()
    }

    /// A compositor without a screen.
    pub(crate) fn compositor(&self, kind: Kind) -> Compositor {
        let before = self.displays();
        let mut command = match kind {
            Kind::Sway => {
                let config = self.path("sway.conf");
                fs::write(&config, "xwayland disable\nfocus_follows_mouse no\ndefault_border none\n").unwrap();
                fs::set_permissions(&config, fs::Permissions::from_mode(0o644)).unwrap();
                let mut command = self.command("sway");
                command.arg("-c").arg(config);
                command
            }
            Kind::Phoc => {
                let config = self.path("phoc.ini");
                fs::write(&config, "[core]\nxwayland=false\n").unwrap();
                fs::set_permissions(&config, fs::Permissions::from_mode(0o644)).unwrap();
                let mut command = self.command("phoc");
                command.arg("-C").arg(config);
                command
            }
        };
        command.envs([("WLR_BACKENDS", "headless"), ("WLR_LIBINPUT_NO_DEVICES", "1"), ("WLR_RENDERER", "pixman")]);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{kind:?} does not start: {error}"));
        let display = wait("the compositor's socket", || {
            assert!(child.try_wait().unwrap().is_none(), "{kind:?} ended: {}", self.log());
            self.displays().into_iter().find(|name| !before.contains(name))
        });
        Compositor { child, display }
    }

    /// A window under a name that is chosen, by a real terminal.
    pub(crate) fn open(&self, on: &Compositor, app_id: &str) -> Ended {
        self.run(on, &["foot", &format!("--app-id={app_id}"), "sleep", "600"])
    }

    /// A program with a window.
    pub(crate) fn run(&self, on: &Compositor, command: &[&str]) -> Ended {
        let (program, args) = command.split_first().unwrap();
        let child = self.command(program).args(args).env("WAYLAND_DISPLAY", &on.display).spawn();
        Ended(child.unwrap_or_else(|error| panic!("{program} does not start: {error}")))
    }

    /// A pointer, by wlr-virtual-pointer: phoc has no seat, and nothing that could be active, before the first device.
    pub(crate) fn pointer(&self, on: &Compositor) -> UnixStream {
        const MANAGER: &str = "zwlr_virtual_pointer_manager_v1";
        let mut stream = UnixStream::connect(self.path(&on.display)).unwrap();
        let (registry, manager, pointer) = (2, 3, 4);
        stream.write_all(&event(1, 1, &[registry], None, &[])).unwrap();
        let mut said = Vec::new();
        let global = wait("the compositor's pointers", || {
            let mut buffer = [0; 4096];
            let read = stream.read(&mut buffer).unwrap();
            said.extend_from_slice(&buffer[..read]);
            // The number of a global, the length of its name, and its name.
            let at = said.windows(MANAGER.len()).position(|part| part == MANAGER.as_bytes())?;
            Some(u32::from_ne_bytes(said[at - 8..at - 4].try_into().unwrap()))
        });
        stream.write_all(&event(registry, 0, &[global], Some(MANAGER), &[1, manager])).unwrap();
        stream.write_all(&event(manager, 0, &[0, pointer], None, &[])).unwrap();
        stream
    }

    /// `swaymsg`.
    pub(crate) fn sway(&self, compositor: &Compositor, order: &str) {
        let socket = self.path(&format!("sway-ipc.{}.{}.sock", self.user.uid, compositor.child.id()));
        let mut command = self.command("swaymsg");
        let done = command.arg("--socket").arg(socket).arg("--").arg(order).status().unwrap();
        assert!(done.success(), "{order}: {}", self.log());
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Sway,
    Phoc,
}

pub(crate) struct Compositor {
    child: Child,
    pub(crate) display: String,
}

impl Compositor {
    /// Without a word to anybody.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Compositor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program that ends with this.
pub(crate) struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the loop is told.
pub(crate) struct Told {
    poll: Poll,
    inbox: Inbox,
    bus: Option<BusThread>,
    pub(crate) uid: u32,
    /// The latest; the outer is whether anything was told at all.
    pub(crate) latest: Option<Option<Vec<Window>>>,
}

impl Told {
    pub(crate) fn of(home: &Home) -> Self {
        Self::with(Whose::One(home.user.clone(), None), home.user.uid)
    }

    pub(crate) fn with(whose: Whose, uid: u32) -> Self {
        let poll = Poll::new().unwrap();
        let (sender, inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        let bus = BusThread::spawn_with(Vec::new(), None, false, sender.clone(), serve(whose, sender)).unwrap();
        Self { poll, inbox, bus: Some(bus), uid, latest: None }
    }

    /// What is told next, if anything is by then.
    pub(crate) fn next(&mut self, until: Instant) -> Option<Option<Vec<Window>>> {
        let mut events = Events::with_capacity(1);
        loop {
            match self.inbox.take() {
                Some(Incoming::Windows { uid, windows }) => {
                    assert_eq!(uid, self.uid);
                    let check = |(window, pid): (Window, Option<u32>)| {
                        assert_eq!((window.target, window.told_pid), (None, pid.is_some()));
                        window
                    };
                    let windows = windows.map(|windows| windows.into_iter().map(check).collect::<Vec<_>>());
                    self.latest = Some(windows.clone());
                    return Some(windows);
                }
                Some(other) => panic!("{other:?}"),
                None => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.poll.poll(&mut events, Some(left)).unwrap();
        }
    }

    /// Until the latest of what is told is as expected.
    pub(crate) fn until(&mut self, what: &str, mut expected: impl FnMut(Option<&[Window]>) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !self.latest.as_ref().is_some_and(|latest| expected(latest.as_deref())) {
            let next = self.next(until);
            assert!(next.is_some(), "waited {} s for {what}, last: {:?}", PATIENCE.as_secs(), self.latest);
        }
    }

    /// Until these windows are there: name, whether it is active, whether it is hidden.
    pub(crate) fn windows(&mut self, expected: &[(&str, bool, bool)]) {
        self.until(&format!("{expected:?}"), |windows| {
            let told = windows.map(|windows| {
                windows.iter().map(|window| (&*window.app_id, window.active, window.hidden)).collect::<Vec<_>>()
            });
            told.as_deref() == Some(expected)
        });
    }

    pub(crate) fn nothing_known(&mut self) {
        self.until("nothing to be known", |windows| windows.is_none());
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(bus) = self.bus.take() {
            bus.stop();
        }
    }
}

/// Something that is no compositor, behind a socket: does `what` with everybody who connects.
pub(crate) fn behind(
    listener: UnixListener,
    what: impl Fn(UnixStream, &AtomicUsize) + Send + 'static,
) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            what(stream, &counted);
        }
    });
    count
}

/// Writes until the other end has gone, counting bytes.
pub(crate) fn flood(mut stream: UnixStream, begin: &[u8], again: &[u8], written: &AtomicUsize) {
    let mut bytes = begin.to_vec();
    loop {
        match stream.write(&bytes) {
            Ok(count) => {
                written.fetch_add(count, Ordering::Relaxed);
                bytes.drain(..count);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
        while bytes.len() < 65536 {
            bytes.extend(again);
        }
    }
}

/// Sends a file descriptor with each of these.
pub(crate) fn send_with_fds(stream: &UnixStream, bytes: &[u8], times: usize) {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let null = File::open("/dev/null").unwrap();
    let fds = [null.as_raw_fd(); 16];
    for _ in 0..times {
        let parts = [std::io::IoSlice::new(bytes)];
        let sent =
            sendmsg::<()>(stream.as_raw_fd(), &parts, &[ControlMessage::ScmRights(&fds)], MsgFlags::MSG_NOSIGNAL, None);
        if sent.is_err() {
            return;
        }
    }
}

/// Reads until the other end has gone.
pub(crate) fn drain(mut stream: UnixStream) {
    let mut buffer = [0; 4096];
    while stream.read(&mut buffer).is_ok_and(|read| read > 0) {}
}

/// An event, with these words and this text as arguments.
pub(crate) fn event(object: u32, opcode: u16, before: &[u32], text: Option<&str>, after: &[u32]) -> Vec<u8> {
    let mut args: Vec<u8> = before.iter().flat_map(|word| word.to_ne_bytes()).collect();
    if let Some(text) = text {
        args.extend(u32::try_from(text.len() + 1).unwrap().to_ne_bytes());
        args.extend(text.as_bytes());
        args.resize(args.len() + (text.len() + 1).next_multiple_of(4) - text.len(), 0);
    }
    args.extend(after.iter().flat_map(|word| word.to_ne_bytes()));
    let second = u32::try_from(args.len() + 8).unwrap() << 16 | u32::from(opcode);
    [&object.to_ne_bytes()[..], &second.to_ne_bytes()[..], &args].concat()
}

/// Everything up to where windows are told: registry 2, first answer 3, manager 4, second answer 5.
pub(crate) fn compositor_says() -> Vec<u8> {
    let manager = event(2, 0, &[1], Some("zwlr_foreign_toplevel_manager_v1"), &[3]);
    [manager, event(3, 0, &[0], None, &[])].concat()
}

pub(crate) fn fds_open() -> usize {
    fs::read_dir(Path::new("/proc/self/fd")).unwrap().count()
}
