//! Moving a frozen app's memory to swap, on a worker thread, in pieces small enough to be called off.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use sysinfo::{MemoryRefreshKind, System};

use super::{
    cgroup::{Cgroup, number},
    measure::{Batch, Scope, Seen},
    procfs::{Member, ProcDir, is_gone},
    zram::{self, Crowd},
};
use crate::{event::Outcome, sys::clock};

/// Per call to the kernel: tens of milliseconds of work on a slow phone.
const CHUNK: u64 = 16 * 1024 * 1024;
/// As much anonymous memory may stay: each look at the end of it is work, too.
const NEXT_TO_NOTHING: u64 = 256 * 1024;
/// `UIO_MAXIOV`.
const MAX_RANGES: usize = 1024;
/// `CAP_SYS_NICE` of capabilities(7).
const CAP_SYS_NICE: u32 = 23;

/// One page-out under way: the loop can call it off and see whether it has ended.
#[derive(Debug, Default)]
pub(super) struct Ticket {
    cancelled: AtomicBool,
    done: AtomicBool,
}

impl Ticket {
    /// Ends it at the next piece.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    fn go_on(&self) -> Result<(), Arc<str>> {
        if self.cancelled.load(Ordering::Relaxed) { Err("it was asked to run again first".into()) } else { Ok(()) }
    }
}

/// Whether memory could be paged out: there is swap, and the cgroup takes `memory.reclaim` or we may use
/// process_madvise(2) on others.
pub(super) fn is_possible(cgroup: Option<&Cgroup>) -> bool {
    swap().is_some_and(|swap| swap.total > 0) && (cgroup.is_some_and(has_reclaim) || has_capability(CAP_SYS_NICE))
}

/// Pages `scope` out and measures it and zram before and after. Blocks; never call it on the loop.
pub(super) fn run(scope: &Scope, ticket: &Ticket, crowd: &Crowd) -> Outcome {
    let outcome = page_out(scope, ticket, crowd).unwrap_or_else(Outcome::PageOutFailed);
    ticket.done.store(true, Ordering::Release);
    outcome
}

/// What a page-out has done, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paged {
    /// PSS before less PSS after.
    pub freed: u64,
    /// Growth of what zram really uses.
    pub zram: u64,
}

/// Pages out a process and all below it, or what is in its cgroup, just as the daemon does with a frozen app. For
/// experiments: what it is done to must be held still, and it blocks.
///
/// # Errors
/// As a sentence part: without swap, or a way to move memory there.
pub fn page_out_now(pid: u32, cgroup: Option<&Path>) -> Result<Paged, Arc<str>> {
    let stat = ProcDir::open(pid).and_then(|dir| dir.stat()).map_err(|_| "its process has ended")?;
    let cgroup = cgroup.map(Cgroup::open).transpose().map_err(|error| format!("its cgroup: {error}"))?;
    if !is_possible(cgroup.as_ref()) {
        return Err("this machine has no swap, or no way to move an app's memory there".into());
    }
    match page_out(&Scope { main: Member::of(&stat), cgroup }, &Ticket::default(), &Crowd::default())? {
        Outcome::PagedOut { freed, zram, .. } => Ok(Paged { freed, zram }),
        _ => Ok(Paged::default()),
    }
}

fn page_out(scope: &Scope, ticket: &Ticket, crowd: &Crowd) -> Result<Outcome, Arc<str>> {
    match swap() {
        None => return Err("whether there is swap cannot be read".into()),
        Some(Swap { total: 0, .. }) => return Err("there is no swap".into()),
        Some(Swap { free: 0, .. }) => return Err("the swap is full".into()),
        Some(_) => {}
    }
    ticket.go_on()?;
    let since = clock::boot();
    let turn = crowd.enter();
    let ((before, charged_before), zram_before) = (Batch::default().memory(scope)?, zram::now());
    match scope.cgroup.as_ref().filter(|cgroup| has_reclaim(cgroup)) {
        Some(cgroup) => reclaim(cgroup, ticket)?,
        None => {
            for member in Batch::default().members(scope)?.0.into_iter().filter_map(Seen::member) {
                madvise(member, ticket)?;
            }
        }
    }
    let (zram_after, (after, charged_after)) = (zram::now(), Batch::default().memory(scope)?);
    // By the account of its cgroup, which knows its shared memory, or by that of its processes, which knows what was still
    // in swap from before and costs again now that it is in memory no more.
    let swapped = after.swap.saturating_sub(before.swap).max(charged_after.saturating_sub(charged_before));
    let (zram, source) = zram::cost(zram_before, zram_after, swapped, turn.is_alone());
    Ok(Outcome::PagedOut {
        freed: before.pss.saturating_sub(after.pss),
        zram,
        source,
        took: clock::boot().since(since),
    })
}

/// `memory.reclaim` (Documentation/admin-guide/cgroup-v2.rst), until next to no anonymous memory is left. What the kernel
/// says it has reclaimed may have been pages of files, so what is left is looked at after each piece.
fn reclaim(cgroup: &Cgroup, ticket: &Ticket) -> Result<(), Arc<str>> {
    let anonymous = || cgroup.read("memory.stat").ok().and_then(|text| number(&text, "anon"));
    reclaim_all(anonymous, |text| cgroup.write("memory.reclaim", text), ticket)
}

fn reclaim_all(
    anonymous: impl Fn() -> Option<u64>,
    ask: impl Fn(&str) -> io::Result<()>,
    ticket: &Ticket,
) -> Result<(), Arc<str>> {
    let mut left = anonymous().ok_or("memory.stat of its cgroup cannot be read")?;
    // Each byte may be asked for twice, so that it ends whatever the kernel takes instead.
    let mut most = left.saturating_mul(2);
    let mut in_vain = 0;
    // Anonymous memory only (Linux 6.14 or so), mostly anonymous, or whatever an older kernel picks.
    let mut styles = [" swappiness=max", " swappiness=200", ""].into_iter();
    let mut style = styles.next().unwrap_or_default();
    while left > NEXT_TO_NOTHING && most > 0 && in_vain < 2 {
        ticket.go_on()?;
        let chunk = CHUNK.min(left).min(most);
        match ask(&format!("{chunk}{style}")) {
            Ok(()) => {}
            // Less than asked for could be had.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                style = styles.next().ok_or("the kernel refuses memory.reclaim")?;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(format!("memory.reclaim: {error}").into()),
        }
        most = most.saturating_sub(chunk);
        let now = anonymous().unwrap_or(0);
        // Locked memory stays, and memory that is written meanwhile.
        in_vain = if left.saturating_sub(now) < chunk / 16 { in_vain + 1 } else { 0 };
        left = now;
    }
    Ok(())
}

/// process_madvise(2) with MADV_PAGEOUT over the private anonymous memory of one process.
fn madvise(member: Member, ticket: &Ticket) -> Result<(), Arc<str>> {
    // What ends meanwhile has no memory left to page out.
    let Ok(pidfd) = member.pidfd() else { return Ok(()) };
    let maps = match member.dir().and_then(|dir| dir.read("maps")) {
        Ok(maps) => maps,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(format!("reading the mappings of process {} takes CAP_SYS_PTRACE", member.pid).into());
        }
        Err(_) => return Ok(()),
    };
    let mut ranges = pieces(parse_maps(&maps)).peekable();
    while ranges.peek().is_some() {
        ticket.go_on()?;
        let mut size = 0;
        let mut batch = Vec::new();
        while batch.len() < MAX_RANGES
            && let Some(range) = ranges.next_if(|(start, end)| size == 0 || size + (end - start) <= CHUNK)
        {
            size += range.1 - range.0;
            batch.push(range);
        }
        match advise(&pidfd, &batch) {
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return Err("process_madvise takes CAP_SYS_NICE and CAP_SYS_PTRACE".into());
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                return Err("the kernel has no process_madvise (Linux 5.10)".into());
            }
            Ok(advised) if advised >= size => {}
            // The kernel stops at the first piece it will not take (locked memory, a hole): the others one by one.
            Ok(_) | Err(_) => {
                for range in batch {
                    let _ = advise(&pidfd, &[range]);
                }
            }
        }
    }
    Ok(())
}

/// Private, anonymous, accessible mappings of a `/proc/PID/maps`: (start, end).
fn parse_maps(maps: &str) -> impl Iterator<Item = (u64, u64)> {
    maps.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let mode = fields.next()?;
        let inode = fields.nth(2)?;
        let name = fields.next().unwrap_or_default();
        let anonymous =
            inode == "0" && (name.is_empty() || name == "[heap]" || name == "[stack]" || name.starts_with("[anon"));
        let range = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        (anonymous && mode.starts_with('r') && mode.ends_with('p') && range.0 < range.1).then_some(range)
    })
}

fn pieces(ranges: impl Iterator<Item = (u64, u64)>) -> impl Iterator<Item = (u64, u64)> {
    ranges.flat_map(|(start, end)| {
        let count = (end - start).div_ceil(CHUNK);
        (0..count).map(move |n| (start + n * CHUNK, end.min(start.saturating_add((n + 1) * CHUNK))))
    })
}

#[expect(unsafe_code, reason = "neither nix nor rustix wraps process_madvise")]
fn advise(pidfd: &OwnedFd, ranges: &[(u64, u64)]) -> io::Result<u64> {
    let vectors: Vec<libc::iovec> = ranges
        .iter()
        .filter_map(|(start, end)| {
            Some(libc::iovec {
                iov_base: std::ptr::without_provenance_mut(usize::try_from(*start).ok()?),
                iov_len: usize::try_from(end - start).ok()?,
            })
        })
        .collect();
    // SAFETY: the kernel only reads the vector, whose length is given, while the call lasts. The addresses in it belong
    // to another process and are not accessed through us; MADV_PAGEOUT changes no content there.
    let result = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            pidfd.as_raw_fd(),
            vectors.as_ptr(),
            vectors.len(),
            libc::MADV_PAGEOUT,
            0,
        )
    };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn has_reclaim(cgroup: &Cgroup) -> bool {
    cgroup.may_write("memory.reclaim")
}

struct Swap {
    total: u64,
    free: u64,
}

fn swap() -> Option<Swap> {
    let mut system = System::new().ok()?;
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_swap());
    Some(Swap { total: system.total_swap(), free: system.free_swap() })
}

fn has_capability(number: u32) -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| parse_capability(&status, number))
}

fn parse_capability(status: &str, number: u32) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|bits| bits >> number & 1 == 1)
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    #[test]
    fn only_private_anonymous_memory_is_taken() {
        let maps = "1000-3000 rw-p 00000000 00:00 0 \n\
            3000-4000 r-xp 00000000 fe:00 12 /usr/bin/x\n\
            4000-5000 rw-p 00000000 fe:00 12 /usr/bin/x\n\
            5000-6000 rw-p 00000000 00:00 0 [heap]\n\
            6000-7000 rw-s 00000000 00:01 99 /memfd:x (deleted)\n\
            7000-8000 ---p 00000000 00:00 0 \n\
            8000-9000 rw-p 00000000 00:00 0 [anon:mine]\n\
            9000-a000 r-xp 00000000 00:00 0 [vdso]\n\
            b000-b000 rw-p 00000000 00:00 0\nx\n\nzz-1 rw-p 0 0 0\nc000-";
        let ranges: Vec<_> = parse_maps(maps).collect();
        assert_eq!(ranges, [(0x1000, 0x3000), (0x5000, 0x6000), (0x8000, 0x9000)]);
    }

    #[test]
    fn large_mappings_are_cut() {
        let whole = (0x1000, 0x1000 + 2 * CHUNK + 4096);
        let cut: Vec<_> = pieces([whole].into_iter()).collect();
        assert_eq!(cut.len(), 3);
        assert_eq!((cut[0].0, cut[2].1), whole);
        assert!(cut.windows(2).all(|pair| pair[0].1 == pair[1].0));
        assert!(cut.iter().all(|(start, end)| end - start <= CHUNK));
    }

    const MIB: u64 = 1 << 20;

    /// What is left, and what was asked for, of `anonymous` bytes: `take` says how many the kernel takes of a piece.
    fn reclaimed(anonymous: u64, take: impl Fn(&str, u64) -> io::Result<u64>) -> (u64, Vec<String>) {
        let (left, asked) = (Cell::new(anonymous), RefCell::new(Vec::new()));
        let ask = |text: &str| {
            asked.borrow_mut().push(text.to_owned());
            let bytes = text.split(' ').next().unwrap().parse().unwrap();
            left.set(left.get().saturating_sub(take(text, bytes)?));
            Ok(())
        };
        reclaim_all(|| Some(left.get()), ask, &Ticket::default()).unwrap();
        (left.get(), asked.into_inner())
    }

    #[test]
    fn what_the_kernel_takes_of_files_instead_is_asked_for_again() {
        let (left, asked) = reclaimed(40 * MIB, |_, bytes| Ok(bytes * 3 / 4));
        assert!(left <= NEXT_TO_NOTHING, "{left}");
        assert_eq!(asked[..2], [format!("{CHUNK} swappiness=max"), format!("{CHUNK} swappiness=max")]);
        // As much as the kernel refuses to take, with or without a word.
        assert_eq!(reclaimed(40 * MIB, |_, _| Ok(0)).1.len(), 2);
        assert_eq!(reclaimed(40 * MIB, |_, _| Err(io::ErrorKind::WouldBlock.into())).1.len(), 2);
        let (left, asked) = reclaimed(40 * MIB, |_, bytes| Ok(bytes / 15));
        assert!(left > 30 * MIB && asked.len() <= 6, "twice as much at most: {left}, {asked:?}");
        assert_eq!(reclaimed(NEXT_TO_NOTHING, |_, bytes| Ok(bytes)).1, Vec::<String>::new());
    }

    #[test]
    fn a_kernel_is_asked_in_its_own_words() {
        let older = |known: &'static str| {
            move |text: &str, bytes| match text.split_once(' ').map_or("", |(_, style)| style) {
                style if style == known => Ok(bytes),
                _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            }
        };
        for known in ["swappiness=max", "swappiness=200", ""] {
            assert_eq!(reclaimed(20 * MIB, older(known)).0, 0, "{known:?}");
        }
        let refuses = |_: &str| Err(io::Error::from_raw_os_error(libc::EINVAL));
        assert!(reclaim_all(|| Some(MIB), refuses, &Ticket::default()).is_err());
        assert!(reclaim_all(|| None, |_| Ok(()), &Ticket::default()).is_err());
        let ticket = Ticket::default();
        ticket.cancel();
        assert!(reclaim_all(|| Some(MIB), |_| Ok(()), &ticket).is_err(), "called off");
    }

    #[test]
    fn capabilities_are_bits() {
        assert!(parse_capability("CapPrm:\t0\nCapEff:\t0000000000800000\n", CAP_SYS_NICE));
        assert!(!parse_capability("CapEff:\t0000000000400000\n", CAP_SYS_NICE));
        assert!(!parse_capability("", CAP_SYS_NICE));
    }
}
