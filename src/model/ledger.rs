//! What the ledger is made from: what one look at an app, the daemon or zram finds, and the rows of its history.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{AppKey, Bus, Memory, Urgency};
use crate::time::UnixTime;

/// What one look at an app finds. Sizes in KiB, summed over its processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// From `smaps_rollup`.
    pub memory: Memory,
    /// `Pss_Anon`: what of the PSS is no file's; zero where the kernel does not tell.
    pub anon: u64,
    /// `Pss_File`.
    pub file: u64,
    /// What its cgroup is charged, where it has one of its own with the memory controller.
    pub charged: Option<Charged>,
    /// Processor time its processes have used since they began.
    pub cpu: Duration,
    /// Since its main process began; zero when that is not known.
    pub age: Duration,
    /// Major page faults of its processes since they began.
    pub faults: u64,
    /// Its established TCP connections that leave the machine.
    pub connections: u32,
}

impl From<Memory> for Sample {
    fn from(memory: Memory) -> Self {
        Self { memory, ..Self::default() }
    }
}

/// What a cgroup is charged (Documentation/admin-guide/cgroup-v2.rst). In KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charged {
    /// `memory.current`.
    pub current: u64,
    /// `anon` of `memory.stat`.
    pub anon: u64,
    /// `file` of `memory.stat`: whoever touched a page first is charged for it.
    pub file: u64,
    /// `kernel` of `memory.stat`.
    pub kernel: u64,
    /// `sock` of `memory.stat`.
    pub sock: u64,
    /// `memory.swap.current`: uncompressed.
    pub swap: u64,
}

/// What the daemon itself costs. Sizes in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SelfSample {
    /// From its own `smaps_rollup`.
    pub memory: Memory,
    /// Kernel memory of all its sockets (`SO_MEMINFO`).
    pub sockets: u64,
    /// Its established TCP connections.
    pub connections: u32,
    /// Processor time it has used since it began.
    pub cpu: Duration,
}

/// All zram devices that are swap, together (Documentation/admin-guide/blockdev/zram.rst). In KiB; zero where there is
/// none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zram {
    /// `mem_used_total`: real memory.
    pub used: u64,
    /// `orig_data_size`: what it holds, uncompressed.
    pub stored: u64,
}

/// How an app's share of zram's real memory is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ZramSource {
    /// By how much zram grew while the app was paged out, and nothing else was.
    Measured,
    /// By how well zram compresses all it holds: something else went in or out meanwhile.
    Ratio,
}

/// One row of the ledger's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryRow {
    /// When it was, or when the time it stands for began.
    pub at: UnixTime,
    /// How long a time it stands for, in seconds; zero: a moment.
    pub span: u32,
    /// What there was.
    pub what: History,
}

/// What a [`HistoryRow`] tells. Sizes in KiB. The store thins it with age: totals and apps become means over hours, then
/// days; what single wakes cost goes after a month.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum History {
    /// All apps of one bus and the daemon.
    Total {
        /// Whose: one user's figures are none of another's business.
        bus: Bus,
        /// The sum.
        total: Total,
    },
    /// One app.
    App {
        /// Which.
        app: AppKey,
        /// Its lifecycle state, as [`crate::view::App`] has it.
        state: Arc<str>,
        /// What it cost, if that was known.
        pss: Option<u64>,
        /// Its share of zram's real memory.
        zram: u64,
        /// `resident - pss - zram`, where known.
        saved: Option<i64>,
    },
    /// A message woke an app, or reached it while it ran.
    Wake {
        /// Which.
        app: AppKey,
        /// The state it was in, as [`crate::view::App`] has it.
        from: Arc<str>,
        /// From the message's arrival here to the app's acceptance, in ms.
        took: u32,
        /// RFC 8030 §5.3.
        urgency: Urgency,
        /// Processor time the app used until it was held still again, in ms, where known.
        cpu: Option<u32>,
        /// Major faults until then.
        faults: Option<u32>,
    },
    /// Under the profile `observe`: what would have been done with an app for `span` seconds.
    Would {
        /// Which.
        app: AppKey,
        /// The state it would have been in: `frozen`, `reclaimed` or `tombstone`.
        state: Arc<str>,
        /// Why, as a sentence.
        reason: Arc<str>,
        /// What that would have saved; an estimate for `reclaimed`.
        saved: u64,
    },
}

/// What all apps of a bus cost and save at a moment, or on the mean. Sizes in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Total {
    /// Apps known.
    pub apps: u32,
    /// Of these, apps that run.
    pub running: u32,
    /// Sum of the baselines.
    pub resident: u64,
    /// Sum of what those cost.
    pub now: u64,
    /// Their share of zram's real memory.
    pub zram: u64,
    /// The daemon, its sockets' kernel memory included.
    pub daemon: u64,
    /// Upstream connections held.
    pub connections: u32,
    /// Connections those apps would hold by themselves.
    pub replaced: u32,
    /// Messages received in the time it stands for.
    pub messages: u32,
}
