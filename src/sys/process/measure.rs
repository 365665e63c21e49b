//! What apps cost, read on a worker thread: the kernel walks page tables for `smaps_rollup`.
//!
//! Nothing here touches the memory of a process. `cmdline`, `environ` and `mem` would, and what was paged out would come
//! back; all that is read is the kernel's own (`stat`, `smaps_rollup`, `fd`, `ns`, `net`, cgroup files, processor clocks).

use std::{cell::OnceCell, io, sync::Arc, time::Duration};

use nix::{
    time::{clock_getcpuclockid, clock_gettime},
    unistd::{Pid, SysconfVar, sysconf},
};

use super::{
    cgroup::{Cgroup, number},
    connections::Connections,
    procfs::{Member, ProcDir, Processes, Stat},
};
use crate::{
    model::{Charged, Memory, Sample},
    sys::clock,
    time::Instant,
};

/// What `smaps_rollup` tells, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rollup {
    pub(super) memory: Memory,
    /// `Pss_Anon` and `Pss_File`; zero before Linux 5.4.
    pub(super) anon: u64,
    pub(super) file: u64,
}

/// `/proc/PID/smaps_rollup`. A kernel thread's is empty and costs nothing; `None` when a line is missing.
pub(super) fn parse_rollup(text: &str) -> Option<Rollup> {
    if text.is_empty() {
        return Some(Rollup::default());
    }
    let mut found = [None; 6];
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let place = match key {
            "Pss" => 0,
            "Private_Clean" => 1,
            "Private_Dirty" => 2,
            "SwapPss" => 3,
            "Pss_Anon" => 4,
            "Pss_File" => 5,
            _ => continue,
        };
        let kib = value.trim().strip_suffix("kB").and_then(|value| value.trim_end().parse::<u64>().ok())?;
        if let Some(place) = found.get_mut(place) {
            *place = Some(kib);
        }
    }
    let [pss, clean, dirty, swap, anon, file] = found;
    Some(Rollup {
        // Swap is not there on a kernel without it.
        memory: Memory { pss: pss?, uss: clean?.checked_add(dirty?)?, swap: swap.unwrap_or(0) },
        anon: anon.unwrap_or(0),
        file: file.unwrap_or(0),
    })
}

/// Where the processes of an app are found at the moment of measuring.
#[derive(Debug)]
pub(super) struct Scope {
    pub(super) main: Member,
    /// Its own cgroup, if it has one.
    pub(super) cgroup: Option<Cgroup>,
}

/// Measurements taken at the same time: what is the same for all of them is read once, and only if one needs it.
#[derive(Debug, Default)]
pub(super) struct Batch {
    processes: OnceCell<Processes>,
    connections: Connections,
}

impl Batch {
    /// The app now.
    ///
    /// # Errors
    /// As a sentence part.
    pub(super) fn sample(&mut self, scope: &Scope) -> Result<Sample, Arc<str>> {
        let (members, own) = self.members(scope)?;
        let mut sample = Sample { charged: own.and_then(charged), age: age(&scope.main), ..Sample::default() };
        let mut sockets = Vec::new();
        for member in members {
            let Some((dir, stat, rollup)) = read(member)? else { continue };
            add(&mut sample.memory, rollup.memory);
            sample.anon = sample.anon.saturating_add(rollup.anon);
            sample.file = sample.file.saturating_add(rollup.file);
            sample.cpu = sample.cpu.saturating_add(processor_time(&stat));
            sample.faults = sample.faults.saturating_add(stat.major_faults);
            self.connections.collect(&dir, &mut sockets);
        }
        scope.is_there()?;
        // Processes of one app share sockets.
        sockets.sort_unstable();
        sockets.dedup();
        sample.connections = u32::try_from(sockets.len()).unwrap_or(u32::MAX);
        Ok(sample)
    }

    /// Only its memory, and what of it is in swap by its cgroup's account, in KiB.
    ///
    /// # Errors
    /// As a sentence part.
    pub(super) fn memory(&mut self, scope: &Scope) -> Result<(Memory, u64), Arc<str>> {
        let (members, own) = self.members(scope)?;
        let mut sum = Memory::default();
        for member in members {
            if let Some((.., rollup)) = read(member)? {
                add(&mut sum, rollup.memory);
            }
        }
        scope.is_there()?;
        Ok((sum, own.and_then(|cgroup| bytes(cgroup, "memory.swap.current")).unwrap_or(0)))
    }

    /// Everything that runs in it now, and its cgroup, if it is in there.
    ///
    /// # Errors
    /// As a sentence part; when the main process has ended in particular.
    pub(super) fn members<'a>(&self, scope: &'a Scope) -> Result<(Vec<Seen>, Option<&'a Cgroup>), Arc<str>> {
        scope.is_there()?;
        let pids = scope.cgroup.as_ref().and_then(|cgroup| Some((cgroup, cgroup.procs().ok()?)));
        if let Some((cgroup, pids)) = pids.filter(|(_, pids)| pids.contains(&scope.main.pid)) {
            let seen = |pid| Seen { pid, start: None };
            return Ok((pids.into_iter().map(seen).collect(), Some(cgroup)));
        }
        let tree = self.processes()?.tree(scope.main.pid).ok_or("it has more than 4096 processes")?;
        Ok((tree.into_iter().map(|stat| Seen { pid: stat.pid, start: Some(stat.start) }).collect(), None))
    }

    fn processes(&self) -> Result<&Processes, Arc<str>> {
        if let Some(processes) = self.processes.get() {
            return Ok(processes);
        }
        let now = Processes::now().map_err(|error| format!("/proc cannot be read: {error}"))?;
        Ok(self.processes.get_or_init(|| now))
    }
}

/// A process that was seen to be the app's a moment ago.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pid: u32,
    /// Not asked where its cgroup vouches for it.
    start: Option<u64>,
}

impl Seen {
    /// Held open, so that what is read is this very process's; `None` when it has ended.
    fn open(self) -> Option<(ProcDir, Stat)> {
        let dir = ProcDir::open(self.pid).ok()?;
        let stat = dir.stat().ok()?;
        (!stat.is_dead() && self.start.is_none_or(|start| start == stat.start)).then_some((dir, stat))
    }

    pub(super) fn member(self) -> Option<Member> {
        self.open().map(|(_, stat)| Member::of(&stat))
    }
}

impl Scope {
    fn is_there(&self) -> Result<(), Arc<str>> {
        self.main.dir().map(drop).map_err(|_| "its process has ended".into())
    }
}

/// `None` of one that has ended, which costs nothing any more.
fn read(seen: Seen) -> Result<Option<(ProcDir, Stat, Rollup)>, Arc<str>> {
    let Some((dir, stat)) = seen.open() else { return Ok(None) };
    match dir.read("smaps_rollup").map(|text| parse_rollup(&text)) {
        Ok(rollup) => Ok(rollup.map(|rollup| (dir, stat, rollup))),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(format!("reading the memory of process {} takes CAP_SYS_PTRACE", seen.pid).into())
        }
        Err(_) => Ok(None),
    }
}

fn add(sum: &mut Memory, one: Memory) {
    sum.pss = sum.pss.saturating_add(one.pss);
    sum.uss = sum.uss.saturating_add(one.uss);
    sum.swap = sum.swap.saturating_add(one.swap);
}

/// Of the process, its threads that have ended included, and of its children that it has waited for. The process's own
/// clock is exact, where `stat` counts in ticks of 10 ms; a cgroup's account would begin anew when an app is moved.
fn processor_time(stat: &Stat) -> Duration {
    let pid = i32::try_from(stat.pid).ok().map(Pid::from_raw);
    let clock = pid.and_then(|pid| clock_getcpuclockid(pid).ok()).and_then(|clock| clock_gettime(clock).ok());
    clock.map_or(Duration::ZERO, Duration::from).saturating_add(ticks(stat.waited).unwrap_or_default())
}

/// Zero when it is not known.
fn age(main: &Member) -> Duration {
    // `stat` counts from the boot, suspend included.
    ticks(main.start).map_or(Duration::ZERO, |start| clock::boot().since(Instant::default() + start))
}

fn ticks(count: u64) -> Option<Duration> {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|told| u64::try_from(told).ok())?;
    let nanos = u128::from(count) * 1_000_000_000 / u128::from(per_second.max(1));
    Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
}

/// What the cgroup is charged; `None` without the memory controller.
fn charged(cgroup: &Cgroup) -> Option<Charged> {
    let current = bytes(cgroup, "memory.current")?;
    let stat = cgroup.read("memory.stat").ok()?;
    // Without swap or its accounting the file is not there.
    let swap = bytes(cgroup, "memory.swap.current").unwrap_or(0);
    Some(Charged { current, swap, ..parse_memory_stat(&stat) })
}

fn bytes(cgroup: &Cgroup, name: &str) -> Option<u64> {
    Some(cgroup.read(name).ok()?.trim().parse::<u64>().ok()? / 1024)
}

fn parse_memory_stat(text: &str) -> Charged {
    let kib = |key| number(text, key).map(|bytes| bytes / 1024);
    // Before Linux 5.18 there is no sum.
    let parts = || {
        let parts = ["kernel_stack", "pagetables", "percpu", "slab"];
        parts.into_iter().filter_map(kib).fold(0, u64::saturating_add)
    };
    Charged {
        anon: kib("anon").unwrap_or(0),
        file: kib("file").unwrap_or(0),
        kernel: kib("kernel").unwrap_or_else(parts),
        sock: kib("sock").unwrap_or(0),
        ..Charged::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLLUP: &str = "55d0-7ffc ---p 00000000 00:00 0    [rollup]\nRss:    1000 kB\nPss:   700 kB\n\
        Pss_Dirty:   5 kB\nPss_Anon: 4 kB\nPss_File:   690 kB\nPss_Shmem: 6 kB\nShared_Clean: 9 kB\n\
        Private_Clean:  20 kB\nPrivate_Dirty:  3 kB\nSwap:   8 kB\nSwapPss:  6 kB\nLocked:  0 kB\n";

    fn rollup(pss: u64, uss: u64, swap: u64) -> Option<Rollup> {
        Some(Rollup { memory: Memory { pss, uss, swap }, anon: 4, file: 690 })
    }

    #[test]
    fn a_rollup_is_summed() {
        assert_eq!(parse_rollup(ROLLUP), rollup(700, 23, 6));
        assert_eq!(parse_rollup(""), Some(Rollup::default()));
        assert_eq!(parse_rollup(&ROLLUP.replace("SwapPss:  6 kB\n", "")), rollup(700, 23, 0));
        let old = ROLLUP.replace("Pss_Anon: 4 kB\nPss_File:   690 kB\n", "");
        assert_eq!(parse_rollup(&old), Some(Rollup { anon: 0, file: 0, ..rollup(700, 23, 6).unwrap() }));
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
    fn a_cgroups_account_is_read() {
        let text = "anon 4096000\nfile 2048000\nkernel 1024000\nkernel_stack 1024\npagetables 2048\nsec_pagetables 9\n\
            percpu 0\nsock 512000\nslab 4096\nanon_thp 77\n";
        let expected = Charged { anon: 4000, file: 2000, kernel: 1000, sock: 500, ..Charged::default() };
        assert_eq!(parse_memory_stat(text), expected);
        let old = text.replace("kernel 1024000\n", "");
        assert_eq!(parse_memory_stat(&old), Charged { kernel: 1 + 2 + 4, ..expected });
        assert_eq!(parse_memory_stat("anon x\nfile"), Charged::default());
    }

    #[test]
    fn a_process_that_works_takes_time() {
        let mut children = std::process::Command::new("sh");
        // Both in a child that is waited for and in the process itself.
        children.args(["-c", "sh -c 'i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done'; echo; read x"]);
        let mut child =
            children.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut byte = [0];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let stat = ProcDir::open(child.id()).unwrap().stat().unwrap();
        let scope = Scope { main: Member::of(&stat), cgroup: None };
        let sample = Batch::default().sample(&scope).unwrap();
        let alone = processor_time(&Stat { waited: 0, ..stat });
        assert!(alone > Duration::ZERO && sample.cpu > alone, "{alone:?} {sample:?}");
        assert!(sample.age < Duration::from_secs(600) && sample.age + Duration::from_millis(20) > alone, "{sample:?}");
        assert!(sample.memory.pss > 0 && sample.anon > 0 && sample.anon + sample.file <= sample.memory.pss + 8);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(&*Batch::default().sample(&scope).unwrap_err(), "its process has ended");
    }
}
