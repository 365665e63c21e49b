//! What processes and zram cost: `smaps_rollup` and `mm_stat`. Read on worker threads: the kernel walks page tables for
//! it. Neither faults a page in.

use std::{fs, io, sync::Arc};

use super::{
    cgroup::Cgroup,
    procfs::{Member, Processes},
};
use crate::{
    event::Event,
    model::{self, Memory, SelfSample},
};

/// `/proc/PID/smaps_rollup`. A kernel thread's is empty and costs nothing; `None` when a line is missing.
pub(super) fn parse_rollup(text: &str) -> Option<Memory> {
    if text.is_empty() {
        return Some(Memory::default());
    }
    let kib = |key: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim_end().parse().ok()
    };
    Some(Memory {
        pss: kib("Pss")?,
        uss: kib("Private_Clean")?.checked_add(kib("Private_Dirty")?)?,
        // Not there on a kernel without swap.
        swap: kib("SwapPss").unwrap_or(0),
    })
}

/// Real use of all zram devices, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Zram {
    /// `mem_used_total`.
    pub(super) used: u64,
    /// `orig_data_size`.
    pub(super) stored: u64,
}

impl Zram {
    /// One `mm_stat` (Documentation/admin-guide/blockdev/zram.rst); `None` for anything else.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split_ascii_whitespace();
        let stored: u64 = fields.next()?.parse().ok()?;
        let _compressed: u64 = fields.next()?.parse().ok()?;
        let used: u64 = fields.next()?.parse().ok()?;
        Some(Self { used: used / 1024, stored: stored / 1024 })
    }

    /// All devices; zero where there is none.
    pub(super) fn now() -> Self {
        let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let zram = devices.filter(|device| device.file_name().as_encoded_bytes().starts_with(b"zram"));
        zram.filter_map(|device| Self::parse(&fs::read_to_string(device.path().join("mm_stat")).ok()?)).fold(
            Self::default(),
            |sum, one| Self { used: sum.used.saturating_add(one.used), stored: sum.stored.saturating_add(one.stored) },
        )
    }
}

/// Where the processes of an app are found at the moment of measuring.
#[derive(Debug)]
pub(super) struct Scope {
    pub(super) main: Member,
    /// Its own cgroup, if it has one.
    pub(super) cgroup: Option<Cgroup>,
}

impl Scope {
    /// Everything that runs in it now.
    ///
    /// # Errors
    /// As a sentence part; when the main process has ended in particular.
    pub(super) fn members(&self) -> Result<Vec<Member>, Arc<str>> {
        let pids = self.cgroup.as_ref().and_then(|cgroup| cgroup.procs().ok());
        self.main.dir().map_err(|_| "its process has ended")?;
        let processes = Processes::now().map_err(|error| format!("/proc cannot be read: {error}"))?;
        let stats = match pids {
            Some(pids) => pids.into_iter().filter_map(|pid| processes.find(pid)).collect(),
            None => processes.tree(self.main.pid).ok_or("it has more than 4096 processes")?,
        };
        Ok(stats.into_iter().filter(|stat| !stat.is_dead()).map(Member::of).collect())
    }

    /// The sum over its processes.
    ///
    /// # Errors
    /// As a sentence part.
    pub(super) fn measure(&self) -> Result<Memory, Arc<str>> {
        let mut sum = Memory::default();
        for member in self.members()? {
            match rollup(member) {
                Ok(one) => {
                    sum.pss = sum.pss.saturating_add(one.pss);
                    sum.uss = sum.uss.saturating_add(one.uss);
                    sum.swap = sum.swap.saturating_add(one.swap);
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(format!("reading the memory of process {} takes CAP_SYS_PTRACE", member.pid).into());
                }
                // One that ended meanwhile costs nothing any more; the main process is looked at below.
                Err(_) => {}
            }
        }
        self.main.dir().map_err(|_| "its process has ended")?;
        Ok(sum)
    }
}

/// This process and zram.
pub(super) fn this_process() -> Event {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").ok().and_then(|text| parse_rollup(&text));
    if rollup.is_none() {
        log::warn!("cannot read the daemon's own memory: /proc/self/smaps_rollup");
    }
    let zram = Zram::now();
    let daemon = SelfSample { memory: rollup.unwrap_or_default(), ..SelfSample::default() };
    Event::SampledSelf { daemon, zram: model::Zram { used: zram.used, stored: zram.stored } }
}

fn rollup(member: Member) -> io::Result<Memory> {
    // The directory is held, so that the file read is this very process's.
    let text = member.dir()?.read("smaps_rollup")?;
    parse_rollup(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLLUP: &str = "55d0-7ffc ---p 00000000 00:00 0    [rollup]\nRss:    1000 kB\nPss:   700 kB\n\
        Pss_Dirty:   5 kB\nPss_Anon: 4 kB\nShared_Clean: 9 kB\nPrivate_Clean:  20 kB\nPrivate_Dirty:  3 kB\n\
        Swap:   8 kB\nSwapPss:  6 kB\nLocked:  0 kB\n";

    #[test]
    fn a_rollup_is_summed() {
        assert_eq!(parse_rollup(ROLLUP), Some(Memory { pss: 700, uss: 23, swap: 6 }));
        assert_eq!(parse_rollup(""), Some(Memory::default()));
        let without_swap = ROLLUP.replace("SwapPss:  6 kB\n", "");
        assert_eq!(parse_rollup(&without_swap), Some(Memory { pss: 700, uss: 23, swap: 0 }));
    }

    #[test]
    fn half_a_rollup_is_none() {
        let end = ROLLUP.find("Private_Dirty").unwrap();
        for text in [&ROLLUP[..end], "x", "Pss: many kB\nPrivate_Clean: 1 kB\nPrivate_Dirty: 1 kB\n", "Pss:\n"] {
            assert_eq!(parse_rollup(text), None, "{text:?}");
        }
        let huge = format!("Pss: 1 kB\nPrivate_Clean: {0} kB\nPrivate_Dirty: {0} kB\n", u64::MAX);
        assert_eq!(parse_rollup(&huge), None);
    }

    #[test]
    fn mm_stat_is_read() {
        let line = "  8192000   1024000  2048000        0  2048000        7        0        0        0\n";
        assert_eq!(Zram::parse(line), Some(Zram { used: 2000, stored: 8000 }));
        for text in ["", "8192 1024", "a b c", "-1 2 3"] {
            assert_eq!(Zram::parse(text), None, "{text:?}");
        }
    }
}
