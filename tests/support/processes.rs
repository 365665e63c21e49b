//! What the kernel says of processes, read by the test itself and not through the daemon's code.

use std::fs;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

pub(crate) fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// Whether there is such a process and it is no zombie.
pub(crate) fn is_running(pid: u32) -> bool {
    state(pid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Whether the process is held still: stopped, or in a frozen cgroup.
pub(crate) fn is_held(pid: u32) -> bool {
    is_stopped(pid) || is_frozen(pid).unwrap_or(false)
}

/// Whether the process was stopped by a signal.
pub(crate) fn is_stopped(pid: u32) -> bool {
    state(pid) == Some('T')
}

fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn is_frozen(pid: u32) -> Option<bool> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "))?.split(' ').nth(4)?;
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let events = fs::read_to_string(format!("{mount}{cgroup}/cgroup.events")).ok()?;
    Some(events.lines().any(|line| line == "frozen 1"))
}

/// From `smaps_rollup`, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) pss: u64,
    pub(crate) uss: u64,
}

pub(crate) fn memory(pid: u32) -> Memory {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |name: &str| -> u64 {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_ascii_whitespace().next().unwrap().parse().unwrap()
    };
    Memory { pss: field("Pss:"), uss: field("Private_Clean:") + field("Private_Dirty:") }
}

/// The processes that have this in their environment.
pub(super) fn with_environment(entry: &str) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|dir| dir.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|line| line == entry.as_bytes())
    })
    .collect()
}
