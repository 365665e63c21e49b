//! What `nightporter doctor` has seen of a machine: plain data, put together by `sys::doctor`.

use crate::{config::Settings, view};

/// Something that was looked at, or why it could not be seen, as a sentence part.
pub type Seen<T> = Result<T, String>;

/// Everything.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Whether the question is about `nightporterd --user`.
    pub user: bool,
    /// Who asks (effective user id).
    pub uid: u32,
    /// What machine it is.
    pub machine: Seen<Machine>,
    /// What its kernel can do.
    pub kernel: Seen<Kernel>,
    /// Its cgroups.
    pub cgroups: Seen<Cgroups>,
    /// Where memory can be paged out to.
    pub swap: Seen<Swap>,
    /// The system bus.
    pub system_bus: Seen<Bus>,
    /// The bus of the session this was asked in; `None` outside of a session.
    pub session_bus: Option<Seen<Bus>>,
    /// The configuration.
    pub config: Seen<Config>,
    /// The state directory.
    pub state: Seen<StateDir>,
    /// The apps that have registered, where a daemon told.
    pub apps: Seen<Vec<App>>,
    /// The push servers.
    pub upstreams: Seen<Vec<Upstream>>,
}

/// The machine and its system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// `/proc/device-tree/model`, else what DMI says.
    pub model: Option<String>,
    /// `PRETTY_NAME` of os-release(5).
    pub os: Option<String>,
    /// `ID` and `ID_LIKE` of os-release(5).
    pub ids: Vec<String>,
    /// How the kernel's parameters are set.
    pub boot: Boot,
    /// `/proc/cmdline`.
    pub cmdline: String,
    /// The name of process 1; `None` where it cannot be read.
    pub init: Option<String>,
    /// sd_booted(3).
    pub systemd: bool,
    /// systemd's version, as the name of its library says; the bus knows better.
    pub systemd_version: Option<u32>,
    /// Lomiri's process, where it runs.
    pub lomiri: Option<u32>,
    /// Waydroid's `suspend_action`, where it is installed.
    pub waydroid: Option<String>,
}

/// How the kernel's parameters are set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Boot {
    /// The Raspberry Pi's firmware reads them from this file.
    RaspberryPi(String),
    /// GRUB; with `/etc/default/grub.d` or without, and `update-grub` or without.
    Grub {
        /// Whether there is `/etc/default/grub.d`.
        fragments: bool,
        /// Whether there is `update-grub`.
        update: bool,
    },
    /// Debian's u-boot-menu (extlinux), as Mobian uses it.
    UBootMenu,
    /// postmarketOS: `/etc/kernel-cmdline.d` where that is known, else deviceinfo.
    PostmarketOs {
        /// Whether `generate-kernel-cmdline` is there.
        fragments: bool,
    },
    /// Armbian's `/boot/armbianEnv.txt`.
    Armbian,
    /// kernel-install(8) with `/etc/kernel/cmdline`.
    KernelInstall,
    /// None of these.
    #[default]
    Unknown,
}

/// The kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// Whether pidfd_open(2) is there (Linux 5.3).
    pub pidfd: bool,
    /// Whether process_madvise(2) is there (Linux 5.10).
    pub process_madvise: bool,
    /// Whether `/proc/pressure/memory` can be read.
    pub psi: bool,
    /// `CONFIG_PSI` of the configuration in `/boot`, where that can be read.
    pub psi_built: Option<bool>,
    /// Clocks that can wake the machine.
    pub wake_clocks: Vec<String>,
    /// Clocks that cannot.
    pub other_clocks: Vec<String>,
    /// Whether the machine can be suspended at all (`/sys/power/state`).
    pub suspends: bool,
}

impl Kernel {
    /// Major and minor version.
    pub fn version(&self) -> Option<(u32, u32)> {
        let mut parts = self.release.split(|c: char| !c.is_ascii_digit());
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    }
}

/// cgroups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Where cgroup v2 is mounted.
    pub mount: Option<String>,
    /// Whether that mount is read-only.
    pub read_only: bool,
    /// Controllers that version 1 holds (hybrid mode).
    pub v1: Vec<String>,
    /// Controllers at the top of version 2.
    pub controllers: Vec<String>,
    /// Whether `/proc/cgroups` says that the memory controller is enabled; `None`: it does not know it.
    pub memory_enabled: Option<bool>,
    /// A cgroup below the top, as the files in it say what the kernel can do: one with apps, where there is one.
    pub sample: Option<CgroupFiles>,
    /// Each user manager's `app.slice`, or this user's alone.
    pub slices: Vec<AppSlice>,
}

/// What a cgroup below the top has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupFiles {
    /// Its path below the mount.
    pub path: String,
    /// `cgroup.freeze` (Linux 5.2).
    pub freeze: bool,
    /// `cgroup.kill` (Linux 5.14).
    pub kill: bool,
    /// `memory.reclaim` (Linux 5.19, with the memory controller).
    pub reclaim: bool,
    /// What it takes; `None` where that could not be tried.
    pub swappiness: Option<Swappiness>,
}

/// What `memory.reclaim` takes besides a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swappiness {
    /// `swappiness=max`: anonymous memory only.
    Max,
    /// `swappiness=200`: mostly anonymous memory (Linux 6.8).
    Number,
    /// Nothing.
    No,
}

/// Where a user's apps live.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AppSlice {
    /// Whose.
    pub uid: u32,
    /// Path below the mount.
    pub path: String,
    /// Whether apps in it can have the memory controller (`cgroup.controllers`).
    pub memory: bool,
    /// Whether they have it (`cgroup.subtree_control`).
    pub memory_on: bool,
    /// Whether whoever asks may write `cgroup.freeze` of the cgroups in it; `None` when there are none to try.
    pub freeze_writable: Option<bool>,
    /// Likewise for `memory.reclaim`.
    pub reclaim_writable: Option<bool>,
    /// Whether whoever asks may make cgroups in it and move processes there.
    pub writable: bool,
}

/// Swap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swap {
    /// Memory of the machine, in KiB.
    pub memory: u64,
    /// Each swap space in use.
    pub spaces: Vec<SwapSpace>,
    /// zram devices there are, swap or not.
    pub zram_devices: usize,
}

/// One line of `/proc/swaps`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SwapSpace {
    /// Device or file.
    pub path: String,
    /// In KiB.
    pub size: u64,
    /// In KiB.
    pub used: u64,
    /// Where it is zram.
    pub zram: Option<Zram>,
}

/// A zram device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Zram {
    /// The compression in use.
    pub algorithm: Option<String>,
    /// Memory it takes now, in KiB.
    pub memory_used: Option<u64>,
    /// Memory it may take, in KiB; zero: no limit.
    pub memory_limit: Option<u64>,
}

/// One message bus.
#[derive(Clone, Debug, Default)]
pub struct Bus {
    /// The name of its process: `dbus-daemon` or `dbus-broker`.
    pub implementation: Option<String>,
    /// Names with an owner.
    pub names: Vec<String>,
    /// Names the bus could start.
    pub activatable: Vec<String>,
    /// Owners of the names `org.unifiedpush.Distributor.*`, and of `org.nightporter1`: (name, owner).
    pub owners: Vec<(String, String)>,
    /// What its systemd says its version is.
    pub systemd: Option<String>,
    /// The state of `nightporterd.service` there, where there is a systemd: `LoadState` and `ActiveState`.
    pub unit: Option<(String, String)>,
    /// The daemon, where it owns its name.
    pub daemon: Option<Daemon>,
}

/// A running daemon.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// Its process, where the bus told.
    pub pid: Option<u32>,
    /// The user it runs as, whatever it was when it connected.
    pub uid: Option<u32>,
    /// Whether it has CAP_WAKE_ALARM.
    pub may_wake: Option<bool>,
    /// `Status`.
    pub status: Seen<view::Status>,
    /// `Apps`.
    pub apps: Seen<Vec<view::App>>,
}

/// The configuration.
#[derive(Clone, Debug)]
pub enum Config {
    /// No file.
    Defaults,
    /// A valid file.
    Valid(String, Box<Settings>),
    /// It may not be read by whoever asks.
    Denied(String),
    /// It cannot be read: which, and why.
    Unreadable(String, String),
    /// It is wrong: which, and what is wrong.
    Invalid(String, String),
}

/// Where the database is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateDir {
    /// The directory.
    pub path: String,
    /// Whether it is there; `None` where that may not be seen.
    pub exists: Option<bool>,
    /// Free space of its file system for the daemon, in bytes.
    pub free: u64,
    /// Whether that file system is read-only.
    pub read_only: bool,
}

/// An app that has registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct App {
    /// Its bus name.
    pub name: String,
    /// Its bus, as [`crate::model::Bus`] prints itself.
    pub bus: String,
    /// Its D-Bus service file, if it has one.
    pub file: Seen<Option<ServiceFile>>,
    /// Whether the bus knows that it could start it; `None` where that bus was not asked.
    pub known_to_bus: Option<bool>,
}

/// What matters of a D-Bus service file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceFile {
    /// `SystemdService=`.
    pub systemd_service: Option<String>,
    /// Whether there is an `Exec=` that can be run.
    pub exec: bool,
    /// Whether there is a `User=`.
    pub user: bool,
}

/// A push server.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// As configured.
    pub name: String,
    /// Likewise.
    pub kind: String,
    /// What the daemon says of it.
    pub daemon: Option<view::Upstream>,
    /// What came of an attempt to connect: the milliseconds it took; `None` when none was made.
    pub tried: Option<Seen<u64>>,
}
