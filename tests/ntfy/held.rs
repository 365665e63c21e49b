//! Whether the kernel holds a process still, seen from outside. Shared with `benches/latency.rs`.

use std::fs;

/// How it is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// It runs, or is gone.
    No,
    /// By the cgroup v2 freezer.
    Cgroup,
    /// Stopped by a signal.
    Signal,
}

/// Looks at `pid`.
pub(crate) fn held(pid: u32) -> Held {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name may hold anything, but nothing after it holds a parenthesis.
    if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')) {
        return Held::Signal;
    }
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let Some(path) = cgroup.lines().find_map(|line| line.strip_prefix("0::")) else { return Held::No };
    let events = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(|root| format!("{root}{path}/cgroup.events"));
    let frozen = |file: &String| fs::read_to_string(file).is_ok_and(|events| events.contains("frozen 1"));
    if events.iter().any(frozen) { Held::Cgroup } else { Held::No }
}
