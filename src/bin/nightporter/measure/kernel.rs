//! What the kernel says of the whole machine.

use std::{fs, io};

use serde::Serialize;

/// One look at memory. In KiB, but for counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct System {
    pub(super) total: u64,
    pub(super) free: u64,
    pub(super) available: u64,
    /// Free pages that the processors keep at hand for themselves. The kernel counts them neither as free nor as available,
    /// and from 6.7 on lets them grow to a share of all memory after many pages were freed: without them an app's end shows late.
    pub(super) at_hand: u64,
    /// Page cache and slab that the kernel can drop.
    pub(super) droppable: u64,
    /// `total - free - at_hand - droppable`: the primary figure. What zram takes for what it holds is in it.
    ///
    /// This is MemTotal − MemAvailable without the kernel's caution: `MemAvailable` keeps back what the watermarks ask for, and
    /// of page cache and slab up to the low watermark or the half (mm/show_mem.c, `si_mem_available`). The former is the same
    /// at all times. The latter is, too, on a machine in use; but here caches are dropped, and half of what each program's
    /// files take would count.
    pub(super) used: u64,
    /// `total - free - at_hand` without page cache that nobody has mapped: what is mapped of programs and libraries counts here,
    /// and does not in `used`, where the kernel thinks it could do without.
    pub(super) occupied: u64,
    pub(super) swap_used: u64,
    /// Real memory behind zram.
    pub(super) zram: u64,
    /// Before compression.
    pub(super) zram_stored: u64,
    pub(super) slab: u64,
    pub(super) page_tables: u64,
    pub(super) shmem: u64,
    /// Since boot.
    pub(super) major_faults: u64,
    pub(super) pages_swapped_in: u64,
    pub(super) oom_kills: u64,
}

impl System {
    /// Now.
    pub(super) fn now() -> io::Result<Self> {
        // What each processor has counted for itself is added to the whole by a look at this. Only root may.
        let _ = fs::read("/proc/sys/vm/stat_refresh");
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let vmstat = fs::read_to_string("/proc/vmstat")?;
        let zones = fs::read_to_string("/proc/zoneinfo").unwrap_or_default();
        let mut system = Self::parse(&meminfo, &vmstat, &zones).ok_or(io::ErrorKind::InvalidData)?;
        for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            if device.file_name().as_encoded_bytes().starts_with(b"zram")
                && let Ok(text) = fs::read_to_string(device.path().join("mm_stat"))
                && let Some((stored, used)) = parse_mm_stat(&text)
            {
                system.zram += used;
                system.zram_stored += stored;
            }
        }
        Ok(system)
    }

    fn parse(meminfo: &str, vmstat: &str, zones: &str) -> Option<Self> {
        let kib = |key: &str| -> Option<u64> {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            line.trim().strip_suffix("kB")?.trim_end().parse().ok()
        };
        let count = |key: &str| parse_count(vmstat, key);
        let (total, free, available) = (kib("MemTotal")?, kib("MemFree")?, kib("MemAvailable")?);
        let cache = kib("Cached")? + kib("Buffers").unwrap_or(0);
        let at_hand = pages_at_hand(zones).saturating_mul(page_kib());
        let droppable = kib("Active(file)")? + kib("Inactive(file)")? + kib("SReclaimable").unwrap_or(0);
        // Shared memory is in `Cached` and cannot be dropped; what is mapped may not be.
        let unmapped = cache.saturating_sub(kib("Shmem").unwrap_or(0)).saturating_sub(kib("Mapped").unwrap_or(0));
        Some(Self {
            total,
            free,
            available,
            at_hand,
            droppable,
            used: total.saturating_sub(free).saturating_sub(at_hand).saturating_sub(droppable),
            occupied: total.saturating_sub(free).saturating_sub(at_hand).saturating_sub(unmapped),
            swap_used: kib("SwapTotal").unwrap_or(0).saturating_sub(kib("SwapFree").unwrap_or(0)),
            zram: 0,
            zram_stored: 0,
            slab: kib("Slab").unwrap_or(0),
            page_tables: kib("PageTables").unwrap_or(0),
            shmem: kib("Shmem").unwrap_or(0),
            major_faults: count("pgmajfault").unwrap_or(0),
            pages_swapped_in: count("pswpin").unwrap_or(0),
            oom_kills: count("oom_kill").unwrap_or(0),
        })
    }
}

/// Processes the kernel has ended for want of memory since boot. Cheap enough to be asked all the time, as [`System::now`] is
/// not; none where the kernel does not tell.
pub(super) fn oom_kills() -> Option<u64> {
    parse_count(&fs::read_to_string("/proc/vmstat").ok()?, "oom_kill")
}

/// Microseconds since boot that some task has waited for memory; none where the kernel does not tell (PSI).
pub(super) fn stalled() -> Option<u64> {
    parse_pressure(&fs::read_to_string("/proc/pressure/memory").ok()?)
}

/// Writes back and drops caches, so that what was read before does not decide. Only root may.
pub(super) fn drop_caches() -> io::Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")
}

/// What a reader of the results must know of the machine.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    pub(super) kernel: String,
    pub(super) cpus: usize,
    pub(super) memory_kib: u64,
    /// Lines of `/proc/swaps`, without its head.
    pub(super) swaps: Vec<String>,
    /// The compression of each zram device.
    pub(super) zram_algorithms: Vec<String>,
    /// Whether the multi-generational LRU is on (`/sys/kernel/mm/lru_gen/enabled`).
    pub(super) lru_gen: Option<String>,
    pub(super) transparent_hugepages: Option<String>,
    pub(super) swappiness: Option<String>,
    pub(super) pressure_stall_information: bool,
}

impl Machine {
    pub(super) fn look() -> Self {
        let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let zram = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let zram = zram.filter(|device| device.file_name().as_encoded_bytes().starts_with(b"zram"));
        Self {
            kernel: read("/proc/sys/kernel/osrelease").unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_kib: System::now().map_or(0, |system| system.total),
            swaps: read("/proc/swaps").unwrap_or_default().lines().skip(1).map(str::to_owned).collect(),
            zram_algorithms: zram
                .filter_map(|device| fs::read_to_string(device.path().join("comp_algorithm")).ok())
                .map(|text| text.trim().to_owned())
                .collect(),
            lru_gen: read("/sys/kernel/mm/lru_gen/enabled"),
            transparent_hugepages: read("/sys/kernel/mm/transparent_hugepage/enabled"),
            swappiness: read("/proc/sys/vm/swappiness"),
            pressure_stall_information: stalled().is_some(),
        }
    }
}

/// Share of a time that was waited in, in percent: what `avg10` is an average of.
pub(super) fn share(stalled_micros: u64, over: std::time::Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "microseconds of an experiment are far below 2^53")]
    let stalled = stalled_micros as f64 / 1e6;
    if over.is_zero() { 0.0 } else { (stalled / over.as_secs_f64() * 100.0).min(100.0) }
}

/// A line of `/proc/vmstat`.
fn parse_count(vmstat: &str, key: &str) -> Option<u64> {
    vmstat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

fn page_kib() -> u64 {
    let bytes = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    bytes.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(4096) / 1024
}

/// `count:` of each `pagesets` in `/proc/zoneinfo`.
fn pages_at_hand(zones: &str) -> u64 {
    zones.lines().filter_map(|line| line.trim_start().strip_prefix("count:")?.trim().parse::<u64>().ok()).sum()
}

fn parse_pressure(text: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix("some "))?
        .split(' ')
        .find_map(|field| field.strip_prefix("total="))?
        .parse()
        .ok()
}

/// `orig_data_size` and `mem_used_total`, in KiB.
fn parse_mm_stat(text: &str) -> Option<(u64, u64)> {
    let mut fields = text.split_ascii_whitespace();
    let stored: u64 = fields.next()?.parse().ok()?;
    let used: u64 = fields.nth(1)?.parse().ok()?;
    Some((stored / 1024, used / 1024))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn used_is_what_is_not_available_and_occupied_is_what_is_not_free_nor_cache() {
        let meminfo = "MemTotal:  1000 kB\nMemFree: 300 kB\nMemAvailable: 600 kB\nBuffers: 10 kB\nCached: 390 kB\n\
                       Active(file): 250 kB\nInactive(file): 40 kB\nSReclaimable: 10 kB\n\
                       SwapCached: 0 kB\nShmem: 50 kB\nMapped: 100 kB\nSwapTotal: 500 kB\nSwapFree: 400 kB\n";
        let vmstat = "pgfault 5\npgmajfault 7\noom_kill 1\n";
        let system = System::parse(meminfo, vmstat, "").unwrap();
        assert_eq!((system.used, system.swap_used, system.major_faults, system.oom_kills), (400, 100, 7, 1));
        // 700 not free, of which 400 cache less 50 shared less 100 mapped.
        assert_eq!(system.occupied, 450);
        let zones = "Node 0, zone   Normal\n  pagesets\n    cpu: 0\n              count: 5\n              high: 7\n    cpu: 1\n              count: 3\n";
        let page = page_kib();
        let less = System::parse(meminfo, vmstat, zones).unwrap();
        assert_eq!((less.at_hand, less.used, less.occupied), (8 * page, 400 - 8 * page, 450 - 8 * page));
        assert_eq!(System::parse("MemTotal: 5 kB\n", "", ""), None);
        assert_eq!(system.used + system.free + system.droppable, system.total);
    }

    #[test]
    fn pressure_and_zram_are_read() {
        let text =
            "some avg10=1.00 avg60=0.00 avg300=0.00 total=68933000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n";
        assert_eq!(parse_pressure(text), Some(68_933_000));
        assert_eq!(parse_pressure("full total=5\n"), None);
        assert_eq!(parse_mm_stat("  2048 1024 4096 0 8192 0 0 0 0\n"), Some((2, 4)));
        assert_eq!(share(200_000, Duration::from_secs(2)), 10.0);
        assert_eq!(share(200_000, Duration::ZERO), 0.0);
    }

    #[test]
    fn this_machine_is_read() {
        let system = System::now().unwrap();
        assert!(system.total > system.free && system.used > 0 && system.occupied > 0, "{system:?}");
    }
}
