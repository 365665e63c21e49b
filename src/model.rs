//! The nouns both halves share: plain data, no behaviour that needs the world.

mod ledger;

use std::{fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

pub use self::ledger::{Charged, History, HistoryRow, Sample, SelfSample, Total, Zram, ZramSource};
use crate::{time::UnixTime, transfer::Transfer};

/// Which bus an app lives on. Users are kept apart by it: nothing crosses from one bus to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bus {
    /// The system bus: system services on a board.
    System,
    /// The session bus of the user with this uid.
    Session(u32),
}

impl Bus {
    /// As a number for the store: the uid, or -1 for the system bus.
    pub fn to_number(self) -> i64 {
        match self {
            Self::System => -1,
            Self::Session(uid) => i64::from(uid),
        }
    }

    /// The inverse of [`Bus::to_number`]; `None` for a number that names no bus.
    pub fn from_number(number: i64) -> Option<Self> {
        match number {
            -1 => Some(Self::System),
            uid => u32::try_from(uid).ok().map(Self::Session),
        }
    }
}

impl fmt::Display for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System => f.write_str("system"),
            Self::Session(uid) => write!(f, "user {uid}"),
        }
    }
}

/// An app: a bus and the name it registers under (its well-known bus name, or a unique name as KDE's self test does).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AppKey {
    /// The bus the app lives on.
    pub bus: Bus,
    /// The `service` of UnifiedPush's Register.
    pub service: Arc<str>,
}

impl AppKey {
    /// The app `service` on `bus`.
    pub fn new(bus: Bus, service: impl Into<Arc<str>>) -> Self {
        Self { bus, service: service.into() }
    }

    /// Whether the name is a unique bus name, which dies with its connection.
    pub fn is_unique_name(&self) -> bool {
        self.service.starts_with(':')
    }
}

impl fmt::Display for AppKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.service)
    }
}

/// Who holds an app's name right now: the unique bus name, which is never used twice in a bus's life. Together with the
/// app it is the instance's identity (design.md, invariant 5).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(pub Arc<str>);

/// A handle on one process instance, given out by `sys::targets`: behind it a pidfd and, where there is one, a cgroup
/// directory fd with its inode. Never used twice while the daemon lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetId(pub u64);

/// What `sys::targets` found out about the process behind an app's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessFacts {
    /// Process id, for people only; the pidfd behind the [`TargetId`] is what is acted on.
    pub pid: u32,
    /// How it would be frozen.
    pub freezer: Freezer,
    /// Whether its memory can be paged out (`memory.reclaim`, or `process_madvise` with swap present).
    pub can_page_out: bool,
    /// Set when the process must never be touched, with the reason as a sentence part ("it is the message bus").
    pub protected: Option<Arc<str>>,
}

/// How a process is held still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Freezer {
    /// `cgroup.freeze` of a cgroup v2 that holds the app and nothing else.
    Cgroup2,
    /// SIGSTOP of the process and its descendants.
    Signal,
}

/// Why an app must not be held still although nobody looks at it: what the system says of it (lifecycle.md §6).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Veto {
    /// Which kind: its name is shown by `nightporter why`.
    pub kind: VetoKind,
    /// A sentence with the app as its subject: "it plays sound (PipeWire stream \"Lollypop\")". At most 200 bytes.
    pub reason: Arc<str>,
}

/// The kinds of [`Veto`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VetoKind {
    /// A running PipeWire node that plays: holding its client still silences everybody (lifecycle.md §0.2).
    Playback,
    /// A running PipeWire node that records: microphone, camera, screen.
    Capture,
    /// An MPRIS player that says `Playing`.
    MediaPlayer,
    /// A call is ringing or under way.
    Call,
    /// It holds logind's lock against sleep.
    SleepInhibitor,
    /// It holds logind's, or the session's, lock against idling.
    IdleInhibitor,
    /// It holds a file lock that a process which is not held still waits for (`/proc/locks`).
    AwaitedLock,
    /// It serves a file system (FUSE) or answers permission events (fanotify).
    FileSystem,
    /// Its unit has a watchdog, which would kill it.
    Watchdog,
    /// Its unit has a pending job, or is not in a state to be held.
    UnitJob,
    /// It has a tray item: the shell calls it.
    Tray,
    /// It serves a name that others call.
    Service,
    /// It uses a device: camera, sound, serial.
    Device,
    /// A screen reader or another help for seeing, hearing and moving.
    Accessibility,
    /// An input method or on-screen keyboard.
    InputMethod,
    /// The lock screen, or what rings in an emergency.
    LockScreen,
    /// Somebody traces it, who would wait for it.
    Debugger,
    /// It is not held still although it should be: it uses the processor, parts of it run, or somebody lets it run.
    NotHeld,
}

impl VetoKind {
    /// The name, as `nightporter why` shows it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Playback => "playback",
            Self::Capture => "capture",
            Self::MediaPlayer => "media-player",
            Self::Call => "call",
            Self::SleepInhibitor => "sleep-inhibitor",
            Self::IdleInhibitor => "idle-inhibitor",
            Self::AwaitedLock => "awaited-lock",
            Self::FileSystem => "file-system",
            Self::Watchdog => "watchdog",
            Self::UnitJob => "unit-job",
            Self::Tray => "tray",
            Self::Service => "service",
            Self::Device => "device",
            Self::Accessibility => "accessibility",
            Self::InputMethod => "input-method",
            Self::LockScreen => "lock-screen",
            Self::Debugger => "debugger",
            Self::NotHeld => "not-held",
        }
    }
}

/// One window of a session, as its compositor tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The application id it gave itself; possibly empty, at most 255 bytes.
    pub app_id: Arc<str>,
    /// The app's process it belongs to, where the compositor tells process ids and the process is one of ours.
    pub target: Option<TargetId>,
    /// Whether the compositor told a process id at all: then a window without a target is none of our apps'.
    pub told_pid: bool,
    /// Whether input goes to it.
    pub active: bool,
    /// Whether it is certain that nothing of it can be seen.
    pub hidden: bool,
}

/// Counter that names a registration for good; a registration made again gets another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RegistrationId(pub u64);

/// Which UnifiedPush connector interface an app speaks (push.md §0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ConnectorVersion {
    /// `org.unifiedpush.Connector1`: no acknowledgement of its own.
    V1,
    /// `org.unifiedpush.Connector2`: dictionaries, the reply is the acknowledgement.
    V2,
}

/// One registration of one app, as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Its own identity.
    pub id: RegistrationId,
    /// Who registered.
    pub app: AppKey,
    /// The app's own name for it; at most 100 bytes (UnifiedPush D-Bus 0.3.0).
    pub token: Arc<str>,
    /// Shown to the user; at most 100 bytes.
    pub description: Arc<str>,
    /// VAPID public key of the app's server: 87 characters of base64url, or none.
    pub vapid: Option<Arc<str>>,
    /// Interface to call back on.
    pub version: ConnectorVersion,
    /// Name of the upstream that serves it.
    pub upstream: Arc<str>,
    /// The upstream's name for it: an autopush channelID or an ntfy topic.
    pub channel: Arc<str>,
    /// The capability URL senders post to.
    pub endpoint: Arc<str>,
    /// Whether the app has taken this endpoint; false means that it is still owed a NewEndpoint.
    pub told: bool,
}

/// Our own number of a message: the order of arrival, and its row in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageSeq(pub u64);

/// What a message counts as once it has reached its app (design.md): RFC 8030's urgency, and calls, which it does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Urgency low or very low.
    Low,
    /// The default.
    #[default]
    Normal,
    /// Urgency high.
    High,
    /// Urgency high, for an app whose messages of that urgency are calls (`calls` in the configuration): it must ring.
    Call,
}

impl Priority {
    /// Of a message of this urgency, for an app that gets calls or does not.
    pub const fn of(urgency: Urgency, calls: bool) -> Self {
        match (urgency, calls) {
            (Urgency::VeryLow | Urgency::Low, _) => Self::Low,
            (Urgency::Normal, _) => Self::Normal,
            (Urgency::High, false) => Self::High,
            (Urgency::High, true) => Self::Call,
        }
    }
}

/// RFC 8030 §5.3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Urgency {
    /// On mains and on Wi-Fi only.
    VeryLow,
    /// On mains or on Wi-Fi.
    Low,
    /// The default.
    #[default]
    Normal,
    /// Even at low battery.
    High,
}

impl Urgency {
    /// The header's value, in the writing of RFC 8030.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VeryLow => "very-low",
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }

    /// The header's value (`very-low`, `low`, `normal`, `high`), any case; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        [("very-low", Self::VeryLow), ("low", Self::Low), ("normal", Self::Normal), ("high", Self::High)]
            .into_iter()
            .find_map(|(name, urgency)| text.eq_ignore_ascii_case(name).then_some(urgency))
    }
}

/// A message as it came from an upstream, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Our number.
    pub seq: MessageSeq,
    /// Whom it is for.
    pub registration: RegistrationId,
    /// The upstream's id of it: what duplicates are known by, and the `id` the app sees.
    pub id: Arc<str>,
    /// 1 to 4096 bytes, exactly as received.
    pub body: Arc<[u8]>,
    /// When it arrived here.
    pub received: UnixTime,
    /// When it is of no use any more (TTL).
    pub expires: UnixTime,
    /// RFC 8030 §5.4: replaces a waiting message with the same topic.
    pub topic: Option<Arc<str>>,
    /// RFC 8030 §5.3.
    pub urgency: Urgency,
}

/// A stored message without its body, as read back at start-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredMessage {
    /// Our number.
    pub seq: MessageSeq,
    /// Whom it is for.
    pub registration: RegistrationId,
    /// The upstream's id.
    pub id: Arc<str>,
    /// Length of the body in bytes.
    pub size: u32,
    /// When it arrived here.
    pub received: UnixTime,
    /// When it is of no use any more.
    pub expires: UnixTime,
    /// Replaces a waiting message with the same topic.
    pub topic: Option<Arc<str>>,
    /// RFC 8030 §5.3.
    pub urgency: Urgency,
}

/// How a message's life here ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// The app took it.
    Accepted,
    /// Its TTL passed first.
    Expired,
    /// A newer message with the same topic took its place.
    Replaced,
    /// The app could not be made to take it in the tries allowed.
    GivenUp,
    /// The app's queue was full and this was the oldest.
    Overflowed,
    /// The registration went away.
    Unregistered,
}

/// Memory of one process or one app, in KiB. All from `/proc/PID/smaps_rollup`, summed over the app's processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Proportional set size: sums to the truth over all processes.
    pub pss: u64,
    /// Unique set size: what killing gives back.
    pub uss: u64,
    /// Proportional share of swap, *uncompressed*.
    pub swap: u64,
}

/// An app's lifecycle record as stored: the resident baseline must outlive the daemon (design.md, the ledger).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppRecord {
    /// Which app.
    pub app: AppKey,
    /// Whether it, or a shell for it, has ever declared a lifecycle state; only then may an instance we start for a push
    /// count as in the background.
    pub declares: bool,
    /// Cost while resident: measured in the background and idle, right before the first freeze.
    pub resident: Option<Memory>,
    /// When that was measured.
    pub measured: Option<UnixTime>,
    /// Under which conditions, as a sentence part.
    pub conditions: Option<Arc<str>>,
}

/// How short memory is, as read at one moment. Sizes in KiB; what nothing tells is `None` or zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// What set the reading off, where it was the kernel's word and not a question of ours.
    pub trigger: Option<Stall>,
    /// How long tasks have waited for memory, where the kernel tells (PSI).
    pub stalled: Option<Stalled>,
    /// `MemTotal`.
    pub total: u64,
    /// `MemAvailable`.
    pub available: u64,
    /// `SwapTotal`.
    pub swap_total: u64,
    /// `SwapFree`.
    pub swap_free: u64,
    /// Over all zram devices that have a limit (`mem_limit`): what they take, and what they may.
    pub zram_used: u64,
    /// The sum of these limits; zero where none is set.
    pub zram_limit: u64,
}

/// How much tasks wait for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stall {
    /// Some wait now and then.
    Moderate,
    /// Some wait much of the time, or all of them now and then.
    Severe,
}

/// `/proc/pressure/memory`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stalled {
    /// Hundredths of a percent of the last 10 s in which at least one task waited.
    pub some_avg10: u32,
    /// The same for all tasks at once.
    pub full_avg10: u32,
    /// Since boot, in µs: at least one task waited.
    pub some_total: u64,
    /// Since boot, in µs: all tasks waited.
    pub full_total: u64,
}

/// What the machine is in, as far as the system says: it decides which messages may wake an app now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Whether the machine runs on mains; `None` where nothing says so (a board without a battery counts as on mains).
    pub on_mains: Option<bool>,
    /// Charge of the battery in percent, where there is one.
    pub battery: Option<u8>,
    /// The way to the Internet.
    pub network: Network,
}

/// The network in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// What carries it.
    pub kind: NetworkKind,
    /// Names this network among all the machine meets, for what is learnt about it: `wifi/SSID`, `mobile/OPERATOR/APN`,
    /// `wired/CONNECTION`; `None` where nothing says so.
    pub id: Option<Arc<str>>,
    /// Whether each byte is paid for, where the system says so.
    pub metered: bool,
    /// Whether a mobile network is not the subscriber's own.
    pub roaming: bool,
    /// How far it reaches.
    pub reach: Reach,
}

/// What carries the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkKind {
    /// Nothing says so.
    #[default]
    Unknown,
    /// A cable, or something as cheap.
    Wired,
    /// Wi-Fi.
    Wifi,
    /// A modem.
    Mobile,
}

/// How far the network reaches (NetworkManager's `Connectivity`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// Nothing says so.
    #[default]
    Unknown,
    /// There is no network.
    None,
    /// A captive portal wants to be seen first.
    Portal,
    /// A network, but no Internet.
    Limited,
    /// The Internet.
    Full,
}

/// Something that must not be seen: it prints as an ellipsis.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Takes a secret in.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// The secret itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// A way a registration was reached before it moved to another upstream: messages may still come along it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormerRoute {
    /// Whose.
    pub registration: RegistrationId,
    /// Name of the upstream.
    pub upstream: Arc<str>,
    /// The upstream's name for it.
    pub channel: Arc<str>,
    /// The capability URL senders may still post to.
    pub endpoint: Arc<str>,
    /// When it is given up; `None` until the app has been told of the new endpoint.
    pub until: Option<UnixTime>,
}

/// Which upstream a user wants for an app, or for all apps on a bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preference {
    /// Which bus.
    pub bus: Bus,
    /// Which app; `None`: all of the bus that have no preference of their own.
    pub service: Option<Arc<str>>,
    /// Name of the upstream.
    pub upstream: Arc<str>,
}

/// Everything the store gives back at start-up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// All registrations.
    pub registrations: Vec<Registration>,
    /// Messages not yet ended, in order of arrival.
    pub messages: Vec<StoredMessage>,
    /// Ids of the latest ended messages per registration, oldest first.
    pub seen: Vec<(RegistrationId, Arc<str>)>,
    /// What upstreams asked to remember: (upstream, key, value).
    pub upstreams: Vec<(Arc<str>, Arc<str>, Arc<str>)>,
    /// Lifecycle records.
    pub apps: Vec<AppRecord>,
    /// Ways registrations were reached before.
    pub former: Vec<FormerRoute>,
    /// Which upstreams users want.
    pub preferences: Vec<Preference>,
    /// The saved states there are, with their sizes in bytes.
    pub states: Vec<(AppKey, u32)>,
    /// The transfers there are, by number.
    pub transfers: Vec<Transfer>,
    /// The first numbers not yet used.
    pub next_registration: u64,
    /// See `next_registration`.
    pub next_message: u64,
    /// See `next_registration`.
    pub next_transfer: u64,
    /// Set when a damaged database was kept aside, with the path it was moved to.
    pub damaged: Option<Arc<str>>,
}

/// Why a registration failed: UnifiedPush D-Bus 0.3.0, `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureReason {
    /// Something broke here or at the server; the app may try again later.
    InternalError,
    /// The server cannot be reached now.
    Network,
    /// The user must act: credentials refused, or this distributor's limit of registrations is reached.
    ActionRequired,
    /// The server takes registrations with a VAPID key only.
    VapidRequired,
    /// The caller may not register this service.
    Unauthorized,
}

impl FailureReason {
    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InternalError => "INTERNAL_ERROR",
            Self::Network => "NETWORK",
            Self::ActionRequired => "ACTION_REQUIRED",
            Self::VapidRequired => "VAPID_REQUIRED",
            Self::Unauthorized => "UNAUTHORIZED",
        }
    }
}

/// How much of the tombstone mechanism is enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Like iOS: freeze, page out, kill after a while.
    Tombstone,
    /// Like Android: freeze and page out; kill only under pressure.
    Cached,
    /// Decide and measure, touch nothing.
    #[default]
    Observe,
}

/// What is done with an app in the background.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// How much is enforced.
    pub profile: Profile,
    /// When.
    pub times: LifecycleTimes,
    /// Why it is never frozen, as a sentence, if so.
    pub exempt: Option<Arc<str>>,
    /// Whether leases may keep it awake: the user's switch "may run in the background".
    pub background: bool,
}

impl Rules {
    /// Nothing special.
    pub const fn new(profile: Profile, times: LifecycleTimes) -> Self {
        Self { profile, times, exempt: None, background: true }
    }
}

/// The times of the lifecycle (design.md, "States of an app").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LifecycleTimes {
    /// In the background before freezing.
    pub grace: Duration,
    /// Frozen before paging out.
    pub page_out_after: Duration,
    /// In the background before the tombstone.
    pub tombstone_after: Duration,
    /// Awake after a push was taken.
    pub awake_window: Duration,
}

/// Names a lease; not used again while the daemon lives, but for the wrap-around after 2^32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u32);

/// What a lease is for (design.md, "Leases"). In order of how much it is worth: the last keeps the app awake most surely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseKind {
    /// To finish what was begun.
    Task,
    /// To fetch what is new.
    Sync,
    /// To receive or send something large.
    Transfer,
    /// To guide somebody on the way.
    Navigation,
    /// To play or record; verified.
    Audio,
    /// To speak with somebody; verified.
    Call,
}

impl LeaseKind {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Task, Self::Sync, Self::Transfer, Self::Navigation, Self::Audio, Self::Call];

    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Task => "task",
            Self::Sync => "sync",
            Self::Transfer => "transfer",
            Self::Navigation => "navigation",
            Self::Audio => "audio",
            Self::Call => "call",
        }
    }

    /// The inverse of [`LeaseKind::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}
