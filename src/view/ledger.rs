//! The ledger's documents: `Report`, `History` and `WhatIf`. All memory in KiB.

use serde::{Deserialize, Serialize};

use crate::model::{Charged, Memory, Profile, Total, ZramSource};

/// `Report`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// When it was measured, UTC.
    pub at: String,
    /// The profile in force: under `observe` nothing is saved.
    pub profile: Profile,
    /// One row an app, sorted by name.
    pub apps: Vec<LedgerRow>,
    /// What the daemon itself costs.
    pub daemon: Memory,
    /// Kernel memory of the daemon's sockets.
    #[serde(default)]
    pub sockets: u64,
    /// Pages of files among `resident - now`: page cache, which the kernel drops when it needs room, with or without us, and
    /// keeps when an app ends. It does not count as saved.
    #[serde(default)]
    pub cache: i64,
    /// Kernel memory (page tables, stacks, slab, sockets) the apps are charged less than resident, where that is known.
    #[serde(default)]
    pub kernel: i64,
    /// What the apps that run cost less than resident by their own doing, and no page-out's; negative where they have grown.
    /// It does not count.
    #[serde(default)]
    pub drift: i64,
    /// Real memory behind what is in swap of the apps beyond their baselines, as far as that is zram.
    pub zram: u64,
    /// How `zram` is known: `ratio` as soon as it is for one app.
    #[serde(default)]
    pub zram_source: Option<ZramSource>,
    /// Sum of the baselines of the apps that have one.
    pub resident: u64,
    /// What those same apps cost now (PSS; swap is in `zram`).
    pub now: u64,
    /// `resident - now - cache + kernel - zram - drift - daemon - sockets`; negative when the daemon costs more than it saves.
    pub saved: i64,
    /// Apps without a baseline yet: they count neither way.
    pub unmeasured: usize,
    /// Over time.
    #[serde(default)]
    pub account: Option<Account>,
}

/// One app in the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LedgerRow {
    /// Its bus name.
    pub name: String,
    /// Its lifecycle state.
    pub state: String,
    /// The baseline: in the background and idle, before the first freeze.
    pub resident: Option<Memory>,
    /// When the baseline was taken, UTC.
    pub measured: Option<String>,
    /// Under which conditions, as a sentence part.
    #[serde(default)]
    pub conditions: Option<String>,
    /// The latest sample while frozen.
    pub frozen: Option<Memory>,
    /// The latest sample after page-out.
    pub paged_out: Option<Memory>,
    /// Now; zero when it is not running, none when it could not be measured.
    pub now: Option<Memory>,
    /// What its cgroup is charged now, where it has one of its own with the memory controller.
    #[serde(default)]
    pub charged: Option<Charged>,
    /// Pages of files among `resident.pss - now.pss`: not counted as saved, as in [`Report::cache`].
    #[serde(default)]
    pub cache: i64,
    /// Kernel memory it is charged less than resident, where that is known.
    #[serde(default)]
    pub kernel: i64,
    /// What it costs less than resident by its own doing, while it runs: not counted, as in [`Report::drift`].
    #[serde(default)]
    pub drift: i64,
    /// Its share of zram's real memory.
    #[serde(default)]
    pub zram: u64,
    /// How that is known; none while it is zero.
    #[serde(default)]
    pub zram_source: Option<ZramSource>,
    /// `resident.pss - now.pss - cache + kernel - zram - drift`, where both are known.
    pub saved: Option<i64>,
    /// MiB·h saved since the ledger's account began.
    #[serde(default)]
    pub saved_mib_hours: f64,
    /// Times it was woken for a message since then.
    #[serde(default)]
    pub wakes: u64,
    /// Processor time these wakes cost, in ms.
    #[serde(default)]
    pub wake_cpu_ms: u64,
    /// Major faults these wakes cost.
    #[serde(default)]
    pub wake_faults: u64,
}

/// What was saved and paid since the daemon started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Account {
    /// Since when, UTC.
    pub since: String,
    /// How long that is.
    pub hours: f64,
    /// Memory saved, times how long.
    pub saved_mib_hours: f64,
    /// Upstream connections held now.
    pub connections: u64,
    /// Connections the registered apps would hold by themselves: one each.
    pub connections_replaced: u64,
    /// Heartbeats on our connections since then, computed from their rhythm and the time they were held.
    pub heartbeats: u64,
    /// Heartbeats the apps' own connections would have cost at the same rhythm.
    pub heartbeats_replaced: u64,
    /// Processor time of the daemon since it started, in ms.
    pub daemon_cpu_ms: u64,
    /// Messages that reached their apps, by the state those were in: `running`, `frozen`, `reclaimed`, `tombstone`.
    pub wakes: Vec<WakeStats>,
}

/// How long messages took to apps in one state, and what that cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WakeStats {
    /// `running`, `frozen`, `reclaimed` or `tombstone`.
    pub from: String,
    /// How many.
    pub count: u64,
    /// From the message's arrival here to the app's acceptance: median, in ms.
    pub p50_ms: u32,
    /// 95 of 100 were quicker.
    pub p95_ms: u32,
    /// The slowest.
    pub max_ms: u32,
    /// Processor time the apps used until they were held still again, in ms: the sum.
    pub cpu_ms: u64,
    /// Major faults until then: the sum.
    pub faults: u64,
}

/// `History`: oldest first; older figures are means over hours, then days.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Asked from, UTC.
    pub since: String,
    /// Asked until, UTC.
    pub until: String,
    /// All apps together.
    pub totals: Vec<TotalAt>,
    /// By app, sorted by name.
    pub apps: Vec<AppHistory>,
    /// What messages did.
    pub wakes: Vec<WakeAt>,
}

/// One row of totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TotalAt {
    /// Seconds since 1970, UTC.
    pub at: u64,
    /// Seconds it stands for; 0: a moment.
    pub span: u32,
    /// The figures.
    #[serde(flatten)]
    pub total: Total,
}

/// One app over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AppHistory {
    /// Its bus name.
    pub name: String,
    /// Oldest first.
    pub points: Vec<AppAt>,
}

/// One row of an app.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AppAt {
    /// Seconds since 1970, UTC.
    pub at: u64,
    /// Seconds it stands for; 0: a moment.
    pub span: u32,
    /// Its lifecycle state; of a mean the one it was in longest.
    pub state: String,
    /// What it cost, if known.
    pub pss: Option<u64>,
    /// Its share of zram's real memory.
    pub zram: u64,
    /// What was saved, if known.
    pub saved: Option<i64>,
}

/// One message that woke an app or reached it while it ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WakeAt {
    /// Seconds since 1970, UTC.
    pub at: u64,
    /// The app's bus name.
    pub name: String,
    /// The state it was in.
    pub from: String,
    /// From the message's arrival here to the app's acceptance.
    pub took_ms: u32,
}

/// `WhatIf`: what the profile `tombstone` would have done while `observe` was in force.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WhatIf {
    /// From, UTC.
    pub since: String,
    /// Until, UTC.
    pub until: String,
    /// How much of that was observed, in hours.
    pub hours: f64,
    /// The profile in force now.
    pub profile: Profile,
    /// By app, sorted by name; those nothing would have been done with as well.
    pub apps: Vec<WhatIfApp>,
    /// Sum over all apps.
    pub saved_mib_hours: f64,
    /// On the mean over the time observed, in KiB.
    pub saved_mean: u64,
    /// How well zram is taken to compress what is paged out, for the estimates: 1 where there is no swap.
    pub compression: f64,
    /// Whether that is this machine's own figure; else it is assumed, for nothing is in zram yet.
    #[serde(default)]
    pub compression_measured: bool,
}

/// One app of [`WhatIf`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WhatIfApp {
    /// Its bus name.
    pub name: String,
    /// Oldest first.
    pub spans: Vec<WhatIfSpan>,
    /// Sum over the spans.
    pub saved_mib_hours: f64,
    /// What kept it from being frozen most of the rest of the time, as a sentence, if anything did.
    pub kept_by: Option<String>,
}

/// A time in which something would have been done with an app.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WhatIfSpan {
    /// From, UTC.
    pub from: String,
    /// How long, in seconds.
    pub secs: u64,
    /// `frozen`, `reclaimed` or `tombstone`.
    pub state: String,
    /// Why, as a sentence.
    pub reason: String,
    /// What that would have saved, in KiB; an estimate for `reclaimed`, zero for `frozen`.
    pub saved: u64,
}
