//! Looking at a process from outside: its memory, and how often it was woken.

use std::{collections::BTreeMap, fs, thread, time::Duration};

use super::Result;

/// From `/proc/PID/smaps_rollup`, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) pss: u64,
    pub(crate) private_dirty: u64,
    /// Swapped out: zero, or the other two say little.
    pub(crate) swap: u64,
}

/// The memory of `pid` now.
pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    let field = |name: &str| number(&text, name).ok_or_else(|| format!("{path} has no {name}"));
    Ok(Memory { pss: field("Pss:")?, private_dirty: field("Private_Dirty:")?, swap: field("Swap:")? })
}

/// Waits until `pid` has kept its number of threads and its memory, within 16 KiB, for 12 s (at most 60 s); then its
/// memory. 12 s, because the limits set on connecting to a bus and on workers without work run out within that time.
pub(crate) fn settled(pid: u32) -> Result<Memory> {
    let mut before = (memory(pid)?, threads(pid)?);
    let mut quiet = 0;
    for _ in 0..120 {
        thread::sleep(Duration::from_millis(500));
        let now = (memory(pid)?, threads(pid)?);
        let same = now.1 == before.1 && now.0.pss.abs_diff(before.0.pss) <= 16;
        quiet = if same { quiet + 1 } else { 0 };
        before = now;
        if quiet == 24 {
            return Ok(now.0);
        }
    }
    Err(format!("process {pid} does not come to rest: {before:?}").into())
}

/// Number of threads.
pub(crate) fn threads(pid: u32) -> Result<usize> {
    Ok(switches(pid)?.len())
}

/// Context switches, voluntary and not, of each thread of `pid` so far.
pub(crate) fn switches(pid: u32) -> Result<BTreeMap<u32, u64>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Some(tid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A thread may end between the listing and the reading.
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")) else { continue };
        let sum = ["voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:"]
            .iter()
            .filter_map(|name| number(&text, name))
            .sum();
        all.insert(tid, sum);
    }
    Ok(all)
}

/// Context switches from `before` to `after`; a thread that came meanwhile counts from zero.
pub(crate) fn switched(before: &BTreeMap<u32, u64>, after: &BTreeMap<u32, u64>) -> u64 {
    after.iter().map(|(tid, count)| count.saturating_sub(before.get(tid).copied().unwrap_or(0))).sum()
}

fn number(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}
