//! A phone's session: compositor, sound server, daemon and apps are real. Each app is a UnifiedPush app with, as its child, a
//! shell that does in the app's name what the test wants: opens its window, plays, records, takes a lock.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::{
        fs::{MetadataExt, chown},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, sys::stat::Mode, unistd::mkfifo};

use crate::{
    processes::{is_running, signal},
    session::{Cgroups, Session, mount, open_to_all, wait},
    shell::Shell,
    watch::Book,
};

/// Debian's user `games` (base-passwd).
const UID: u32 = 5;

/// What the user's systemd does for an app, with the user's rights; and the app's child that does what it is told.
const SCOPE: &str = r#"#!/bin/sh
set -e
app="$2"
scope="$1/app-$app-$$.scope"
mkdir "$scope"
echo 0 >"$scope/cgroup.procs"
shift 2
case "$app" in *.cliptest) export NIGHTPORTER_SAMPLE_FAULT=silent ;; esac
(exec 3<>"$XDG_RUNTIME_DIR/$app.orders" && while read -r order <&3; do eval "$order"; done) &
exec "$@"
"#;

/// A program of the session's; it ends with this.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

pub(crate) struct Phone {
    pub(crate) shell: Option<Shell>,
    compositor: Option<Running>,
    sound: Vec<Running>,
    pub(crate) session: Session,
}

impl Phone {
    pub(crate) fn new() -> Self {
        let session = Session::new(UID, Cgroups::Delegated);
        fs::write(session.path("scope"), SCOPE).unwrap();
        fs::write(session.path("phoc.ini"), "[core]\nxwayland=false\n").unwrap();
        open_to_all(&session.path("phoc.ini"), 0o644);
        let noise = session.path("noise.wav");
        fs::write(&noise, sound()).unwrap();
        open_to_all(&noise, 0o644);
        let drop_ins = session.path("home/.config/pipewire/pipewire.conf.d");
        session.sh(&format!("mkdir -p {}", drop_ins.display()));
        let sink = "context.objects = [ { factory = adapter args = { factory.name = support.null-audio-sink \
                    node.name = quiet media.class = Audio/Sink audio.position = [ FL FR ] } } ]";
        fs::write(drop_ins.join("quiet.conf"), sink).unwrap();
        let mut phone = Self { shell: None, compositor: None, sound: Vec::new(), session };
        phone.start_compositor();
        phone.start_sound();
        phone.session.start_daemon();
        phone
    }

    fn program(&self, program: &str, arguments: &[&str]) -> Running {
        let log = File::options().create(true).append(true).open(self.session.path("programs.log")).unwrap();
        let mut command = self.session.run(None, program);
        command.args(arguments).stdout(log.try_clone().unwrap()).stderr(log);
        // GSettings' schemas are there.
        command.env_remove("XDG_DATA_DIRS");
        command.envs([("WLR_BACKENDS", "headless"), ("WLR_LIBINPUT_NO_DEVICES", "1"), ("WLR_RENDERER", "pixman")]);
        Running(command.spawn().unwrap_or_else(|error| panic!("{program}: {error}")))
    }

    pub(crate) fn start_compositor(&mut self) {
        let config = self.session.path("phoc.ini");
        self.compositor = Some(self.program("phoc", &["-C", config.to_str().unwrap()]));
        let socket = self.session.path("run/wayland-0");
        wait("phoc", || UnixStream::connect(&socket).ok());
        self.shell = Some(Shell::on(&socket));
    }

    /// Without a word to anybody.
    pub(crate) fn kill_compositor(&mut self) {
        self.compositor = None;
        wait("the compositor's end", || self.shell().is_over().then_some(()));
        self.shell = None;
    }

    pub(crate) fn start_sound(&mut self) {
        self.sound.push(self.program("pipewire", &[]));
        wait("PipeWire", || self.session.path("run/pipewire-0").exists().then_some(()));
        self.sound.push(self.program("wireplumber", &[]));
        self.sound.push(self.program("pipewire-pulse", &[]));
        // Whoever plays before the session manager knows the sink is told that there is none.
        wait("the sink", || {
            let asked = self.session.run(None, "pactl").arg("get-default-sink").output().unwrap();
            (asked.stdout.trim_ascii() == b"quiet").then_some(())
        });
    }

    pub(crate) fn kill_sound(&mut self) {
        self.sound.clear();
        for stale in ["pipewire-0", "pipewire-0.lock", "pipewire-0-manager", "pulse/native", "pulse/pid"] {
            let _ = fs::remove_file(self.session.path("run").join(stale));
        }
    }

    pub(crate) fn shell(&self) -> &Shell {
        self.shell.as_ref().unwrap()
    }

    /// Installs and starts an app; its endpoint and its cgroup.
    pub(crate) fn launch(&self, app: &str) -> (String, PathBuf) {
        let orders = self.session.path(&format!("run/{app}.orders"));
        mkfifo(&orders, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        chown(&orders, Some(UID), Some(UID)).unwrap();
        self.session.install(app);
        let endpoint = self.session.launch(app);
        let cgroup = self.session.cgroup_of(self.session.pid(app));
        assert!(cgroup.starts_with(mount()) && cgroup.extension().is_some_and(|kind| kind == "scope"), "{cgroup:?}");
        (endpoint, cgroup)
    }

    /// Has the app start a program, which is found again under `what`. It does so as soon as it runs.
    pub(crate) fn order(&self, app: &str, what: &str, command: &str) {
        let pid = self.pid_file(app, what);
        let _ = fs::remove_file(&pid);
        let mut orders = File::options().read(true).write(true).open(self.session.path(&format!("run/{app}.orders")));
        let line = format!("{command} >/dev/null 2>&1 & echo $! >{}\n", pid.display());
        orders.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
    }

    /// The program, once the app has started it.
    pub(crate) fn started(&self, app: &str, what: &str) -> Option<u32> {
        fs::read_to_string(self.pid_file(app, what)).ok()?.trim().parse().ok()
    }

    /// Ends the program, whether the app is held or not.
    pub(crate) fn end(&self, app: &str, what: &str) {
        let pid = wait(what, || self.started(app, what));
        if is_running(pid) {
            signal(pid, Signal::SIGKILL);
        }
        wait("its end", || (!is_running(pid)).then_some(()));
    }

    fn pid_file(&self, app: &str, what: &str) -> PathBuf {
        self.session.path(&format!("run/{app}.{what}"))
    }

    /// Waits until PipeWire says that this node runs.
    pub(crate) fn wait_stream(&self, name: &str) {
        wait(name, || {
            let dump = self.session.run(None, "pw-dump").output().unwrap();
            let all: Vec<serde_json::Value> = serde_json::from_slice(&dump.stdout).ok()?;
            all.iter()
                .any(|one| one["info"]["props"]["node.name"] == name && one["info"]["state"] == "running")
                .then_some(())
        });
    }

    /// Waits until the file's lock is held by somebody.
    pub(crate) fn wait_lock(&self, path: &Path) {
        wait("the lock", || lock_lines(path).next().map(drop));
    }

    /// Somebody else who wants the lock; waits until the kernel says so.
    pub(crate) fn want_lock(&self, path: &Path) -> Running {
        let waiter = self.program("flock", &["-x", path.to_str().unwrap(), "true"]);
        wait("the lock to be awaited", || lock_lines(path).any(|line| line.contains("->")).then_some(()));
        waiter
    }

    /// Waits until something holds; false if it does not in time.
    pub(crate) fn within(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
        let until = Instant::now() + limit;
        while !holds() {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        true
    }

    /// All that is known, for a complaint.
    pub(crate) fn why(&self, book: &Book) -> String {
        let mut text = String::new();
        for app in &book.apps {
            let why = self.session.nightporter(&["--user", "why", app.name]);
            text += &format!("{app:?}\n{}\n", String::from_utf8_lossy(&why.stdout));
        }
        text
    }
}

impl Drop for Phone {
    fn drop(&mut self) {
        (self.shell, self.compositor) = (None, None);
        self.sound.clear();
        if std::thread::panicking() {
            let said = fs::read_to_string(self.session.path("programs.log")).unwrap_or_default();
            eprintln!("what the programs said:\n{}", &said[said.len().saturating_sub(4000)..]);
        }
    }
}

/// What the kernel says of the file's locks.
fn lock_lines(path: &Path) -> impl Iterator<Item = String> {
    let inode = fs::metadata(path).map(|file| format!(":{} ", file.ino())).unwrap_or_else(|_| "no file".into());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    locks.lines().filter(|line| line.contains(&inode)).map(str::to_owned).collect::<Vec<_>>().into_iter()
}

/// Ten minutes, one channel.
fn sound() -> Vec<u8> {
    let (rate, seconds) = (8_000_u32, 600);
    let length = rate * seconds * 2;
    let mut wave = Vec::new();
    wave.extend(b"RIFF");
    wave.extend((36 + length).to_le_bytes());
    wave.extend(b"WAVEfmt ");
    wave.extend(16_u32.to_le_bytes());
    wave.extend([1, 0, 1, 0]);
    wave.extend(rate.to_le_bytes());
    wave.extend((rate * 2).to_le_bytes());
    wave.extend([2, 0, 16, 0]);
    wave.extend(b"data");
    wave.extend(length.to_le_bytes());
    wave.extend((0..length).map(|n| (n % 199) as u8));
    wave
}
