//! What an app costs at a moment, and what the difference to another moment is worth.

use crate::model::{Charged, Memory, Sample};

/// What an app costs at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cost {
    pub(super) memory: Memory,
    /// `Pss_File`, where the kernel tells.
    pub(super) file: Option<u64>,
    /// Kernel memory charged to it, sockets included, where that is known.
    pub(super) kernel: Option<u64>,
    pub(super) charged: Option<Charged>,
}

impl Cost {
    /// Nothing: it does not run.
    pub(super) const NONE: Self =
        Self { memory: Memory { pss: 0, uss: 0, swap: 0 }, file: Some(0), kernel: Some(0), charged: None };

    pub(super) fn of(sample: &Sample) -> Self {
        Self {
            memory: sample.memory,
            file: (sample.anon > 0 || sample.file > 0).then_some(sample.file.min(sample.memory.pss)),
            kernel: sample.charged.map(|charged| charged.kernel.saturating_add(charged.sock)),
            charged: sample.charged,
        }
    }

    /// What of it counts (see the module): what ending the app would give back.
    pub(super) fn counted(&self) -> u64 {
        let pages = self.memory.pss.saturating_sub(self.file.unwrap_or(0));
        pages.saturating_add(self.kernel.unwrap_or(0))
    }
}

/// What the row of an app comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) resident: u64,
    pub(super) now: u64,
    pub(super) cache: i64,
    pub(super) kernel: i64,
    pub(super) drift: i64,
    pub(super) zram: u64,
}

impl Claim {
    pub(super) fn new(resident: &Cost, now: &Cost, zram: u64) -> Self {
        let less = |before: Option<u64>, after: Option<u64>| before.zip(after).map_or(0, |(b, a)| difference(b, a));
        Self {
            resident: resident.memory.pss,
            now: now.memory.pss,
            cache: less(resident.file, now.file),
            kernel: less(resident.kernel, now.kernel),
            drift: 0,
            zram,
        }
    }

    /// Of an app that runs: all that is less because of us is what we keep in swap, `ours` KiB of it. The rest it would cost
    /// less or more without us as well.
    pub(super) fn of_running(resident: &Cost, now: &Cost, zram: u64, ours: u64) -> Self {
        let claim = Self::new(resident, now, zram);
        Self { drift: claim.saved().saturating_sub(difference(ours, zram).max(0)), ..claim }
    }

    pub(super) fn saved(&self) -> i64 {
        let of = |sum: i128| i64::try_from(sum).unwrap_or(if sum < 0 { -i64::MAX } else { i64::MAX });
        let pages = i128::from(self.resident) - i128::from(self.now) - i128::from(self.cache);
        of(pages + i128::from(self.kernel) - i128::from(self.zram) - i128::from(self.drift))
    }
}

fn difference(before: u64, after: u64) -> i64 {
    let size = |kib: u64| i64::try_from(kib).unwrap_or(i64::MAX);
    size(before.saturating_sub(after)).saturating_sub(size(after.saturating_sub(before)))
}
