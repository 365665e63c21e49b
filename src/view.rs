//! What the daemon shows of itself: the JSON documents of `org.nightporter1.Manager`, which `nightporter --json` prints
//! as they are. Fields are only ever added.

mod ledger;

use serde::{Deserialize, Serialize};

pub use self::ledger::{
    Account, AppAt, AppHistory, History, LedgerRow, Report, TotalAt, WakeAt, WakeStats, WhatIf, WhatIfApp, WhatIfSpan,
};
use crate::{
    model::{Ending, Freezer, LeaseKind, NetworkKind, Profile, Reach, Urgency},
    transfer::Direction,
};

/// `Status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// The profile in force.
    pub profile: Profile,
    /// Each configured upstream, in the order of the configuration; the first is the default.
    pub upstreams: Vec<Upstream>,
    /// The buses served now, as [`crate::model::Bus`] prints itself.
    pub buses: Vec<String>,
    /// Number of apps known.
    pub apps: usize,
    /// Number of registrations.
    pub registrations: usize,
    /// Messages accepted from upstreams and not yet ended.
    pub messages_waiting: usize,
    /// Messages since the daemon started, by how they ended.
    pub messages: Messages,
    /// What power and network are; none where nothing says so.
    pub surroundings: Option<Surroundings>,
    /// The least urgency that may wake an app now, unless the configuration gives the app another.
    pub min_urgency: Option<Urgency>,
    /// Why, as a sentence.
    pub min_urgency_reason: Option<String>,
    /// How short memory is.
    pub pressure: Option<Pressure>,
    /// Troubles a user should act on, each a sentence (full disk, damaged database, refused credentials). Often empty.
    pub troubles: Vec<String>,
}

/// How short memory is, and what has been done about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pressure {
    /// `enough`, `low` (apps are paged out), `moderate` or `severe` (apps are ended as well).
    pub level: String,
    /// Seconds since memory became short, or not short any more.
    pub since_secs: u64,
    /// The same as a sentence.
    pub reason: String,
    /// Apps paged out for it since the daemon started, beside those that time pages out.
    pub paged_out: u64,
    /// Apps ended for it since the daemon started.
    pub ended: u64,
}

/// What the machine is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Surroundings {
    /// Whether it runs on mains, where something says so.
    pub on_mains: Option<bool>,
    /// Charge of the battery in percent, where there is one.
    pub battery: Option<u8>,
    /// What carries the network.
    pub network: NetworkKind,
    /// The network's name, for who may control this daemon: it tells where the machine is.
    pub network_id: Option<String>,
    /// Whether each byte is paid for.
    pub metered: bool,
    /// Whether a mobile network is not the subscriber's own.
    pub roaming: bool,
    /// How far the network reaches.
    pub reach: Reach,
}

/// Counts since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Messages {
    /// Came from upstreams, duplicates not counted.
    pub received: u64,
    /// Known already and not handed to the app again.
    pub duplicates: u64,
    /// Taken by their apps.
    pub accepted: u64,
    /// TTL passed.
    pub expired: u64,
    /// A newer one with the same topic came.
    pub replaced: u64,
    /// Not taken in the tries allowed.
    pub given_up: u64,
    /// Dropped from a full queue.
    pub overflowed: u64,
    /// Their registration went away.
    pub unregistered: u64,
    /// Empty or over 4096 bytes, or an attachment that could not be had: never queued.
    pub unusable: u64,
}

impl Messages {
    /// Counts what others have counted.
    pub const fn add(&mut self, other: &Self) {
        self.received += other.received;
        self.duplicates += other.duplicates;
        self.accepted += other.accepted;
        self.expired += other.expired;
        self.replaced += other.replaced;
        self.given_up += other.given_up;
        self.overflowed += other.overflowed;
        self.unregistered += other.unregistered;
        self.unusable += other.unusable;
    }

    /// Counts one ending.
    pub fn ended(&mut self, ending: Ending) {
        let counter = match ending {
            Ending::Accepted => &mut self.accepted,
            Ending::Expired => &mut self.expired,
            Ending::Replaced => &mut self.replaced,
            Ending::GivenUp => &mut self.given_up,
            Ending::Overflowed => &mut self.overflowed,
            Ending::Unregistered => &mut self.unregistered,
        };
        *counter += 1;
    }
}

/// One upstream's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Upstream {
    /// The configured name.
    pub name: String,
    /// `autopush`, `ntfy`, `mqtt`, `nextpush` or `gotify`.
    pub kind: String,
    /// Where it stands.
    pub state: LinkState,
    /// Seconds it has been in this state.
    pub since_secs: u64,
    /// Seconds until the next attempt, when waiting for one.
    pub retry_in_secs: Option<u64>,
    /// Why the last connection ended or failed, if one did.
    pub last_error: Option<String>,
    /// Registrations served by it.
    pub registrations: usize,
    /// Seconds between two signs of life on the link, while there is one.
    pub heartbeat_secs: Option<u64>,
    /// Who sets that rhythm: `server` or `client`.
    pub heartbeat_by: Option<String>,
}

/// Where an upstream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// No registration needs it: not connected on purpose.
    Idle,
    /// On the way.
    Connecting,
    /// Receiving.
    Online,
    /// Waiting for the next attempt.
    Waiting,
    /// Kept from connecting (`network.roaming = "off"`).
    Off,
}

/// One line of `Apps`; the document is an array of them, sorted by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct App {
    /// Its bus name.
    pub name: String,
    /// The bus it lives on.
    pub bus: String,
    /// Its lifecycle state: `foreground`, `background`, `awake`, `freezing`, `frozen`, `reclaimed`, `ending` (being killed),
    /// `tombstone`, `gone`.
    pub state: String,
    /// Seconds in that state.
    pub since_secs: u64,
    /// Process id of the running instance.
    pub pid: Option<u32>,
    /// Number of registrations.
    pub registrations: usize,
    /// Messages waiting.
    pub waiting: usize,
    /// Of these, messages that wait for better power or network, or for the app to run for another reason.
    #[serde(default)]
    pub held: usize,
    /// The latest decision about it, as a sentence.
    pub reason: String,
}

/// `Show`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Show {
    /// As in `Apps`.
    #[serde(flatten)]
    pub app: App,
    /// How it would be frozen; none when it is not running.
    pub freezer: Option<Freezer>,
    /// Why it can not be touched at all, if so.
    pub protected: Option<String>,
    /// Its registrations.
    pub registered: Vec<Registered>,
    /// Its memory, as the ledger has it.
    pub memory: LedgerRow,
    /// The leases that keep it awake.
    #[serde(default)]
    pub leases: Vec<Lease>,
}

/// `Transfers`: an array of these, by id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Its number, for `CancelTransfer`.
    pub id: u64,
    /// Whose it is.
    pub app: String,
    /// Which way it goes.
    pub direction: Direction,
    /// What the app calls it; possibly empty.
    pub title: String,
    /// The server and the path, without what may be a secret.
    pub place: String,
    /// `taking-over`, `waiting`, `running`, `done`, `failed` or `cancelled`.
    pub state: String,
    /// What it waits for, or how it ended.
    pub reason: Option<String>,
    /// Bytes that are there, or sent.
    pub bytes: u64,
    /// Bytes in all, where that is known.
    pub total: Option<u64>,
    /// Seconds until it is tried again, where that is arranged.
    pub retry_in_secs: Option<u64>,
    /// When it was handed over.
    pub begun: String,
    /// Whether the app has heard how it ended, once it has.
    pub told: Option<bool>,
}

/// `Leases`: an array of these, by id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Its number, for `EndLease`.
    pub id: u32,
    /// The app it keeps awake.
    pub app: String,
    /// The bus that lives on.
    pub bus: String,
    /// The unique name of whoever holds it.
    pub holder: String,
    /// What it was taken as.
    pub kind: LeaseKind,
    /// What it counts as: `task` where it was taken for something that is not to be seen.
    pub counts_as: LeaseKind,
    /// What its holder says it is for.
    pub reason: String,
    /// Seconds it has been held.
    pub since_secs: u64,
    /// Seconds it has left in the background, where they are limited.
    pub left_secs: Option<u64>,
    /// Whether they are running: its app is in the background.
    pub counting: bool,
}

/// One registration, without its endpoint (which is a secret).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Registered {
    /// The app's name for it.
    pub token: String,
    /// What the app says it is for.
    pub description: String,
    /// Which upstream serves it.
    pub upstream: String,
    /// UnifiedPush D-Bus interface version, 1 or 2.
    pub version: u8,
    /// Whether senders must sign with VAPID.
    pub vapid: bool,
    /// Messages waiting.
    pub waiting: usize,
}

/// `Endpoints`: an array of these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The app's name for the registration.
    pub token: String,
    /// The capability URL.
    pub endpoint: String,
    /// Whether senders must sign with VAPID.
    pub vapid: bool,
    /// `autopush` or `ntfy`: senders need `Content-Encoding` for the one and UnifiedPush mode for the other.
    pub kind: String,
}

/// `Why`: the last decisions, oldest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Why {
    /// The app's name.
    pub name: String,
    /// Its state now.
    pub state: String,
    /// At most ten.
    pub decisions: Vec<Decision>,
}

/// `Log`: the latest decisions about all apps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Log {
    /// The number of the newest decision, of whatever app: ask for those after it the next time.
    pub latest: u64,
    /// Oldest first.
    pub entries: Vec<LogEntry>,
}

/// One decision about one app.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogEntry {
    /// The app's name.
    pub name: String,
    /// The bus it lives on.
    pub bus: String,
    /// What was decided, when and why.
    #[serde(flatten)]
    pub decision: Decision,
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// UTC, `2026-11-22T01:39:00Z`.
    pub at: String,
    /// What was decided: `freeze`, `thaw`, `page-out`, `kill`, `start`, `deliver`, `give-up`, `leave`, …
    pub verdict: String,
    /// Why, as a sentence a user can read.
    pub reason: String,
}

/// `nightporter doctor --json`: what the machine offers and lacks. Made by the command line, not by the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doctor {
    /// The version of the program that looked.
    pub version: String,
    /// `system`, or `user` for `--user`.
    pub scope: String,
    /// The machine and its system, as they call themselves.
    pub machine: String,
    /// How many findings there are of each verdict.
    pub counts: DoctorCounts,
    /// By area, in an order that stays.
    pub findings: Vec<Finding>,
}

/// Findings by verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorCounts {
    /// As it should be.
    pub ok: usize,
    /// Worth knowing, or not to be seen.
    pub note: usize,
    /// Not offered by this machine.
    pub lacks: usize,
    /// Does not work; the exit status is then 1.
    pub broken: usize,
}

/// One finding of `nightporter doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// `kernel`, `memory`, `system`, `bus`, `daemon` or `push`.
    pub area: String,
    /// What was looked at, such as `memory-controller`; stays the same from version to version.
    pub id: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found, as a sentence.
    pub text: String,
    /// What the daemon does instead, or what does not work because of it.
    pub instead: Option<String>,
    /// What mends it: commands, and where none does it, what is to be done. Empty when nothing is to be mended.
    pub mend: Vec<String>,
}

/// How a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Worth knowing, or it could not be seen.
    Note,
    /// This machine does not offer it; the daemon does without.
    Lacks,
    /// It does not work and should.
    Broken,
}
