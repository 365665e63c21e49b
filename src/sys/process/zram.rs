//! What zram costs: `mm_stat` (Documentation/admin-guide/blockdev/zram.rst), and what one page-out cost of it.

use std::{
    collections::HashSet,
    fs,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::model::{Zram, ZramSource};

/// What zram stored may be off from what the app put out by a quarter and this much, in KiB, and still be the app's.
const NOISE: u64 = 1024;

/// The zram devices that are swap; zero where there is none.
pub(super) fn now() -> Zram {
    below(Path::new("/"))
}

/// The same of a machine whose `/proc` and `/sys` are below `root`. A zram device may hold a file system as well, whose
/// content is no app's swap.
fn below(root: &Path) -> Zram {
    let swaps = fs::read_to_string(root.join("proc/swaps")).unwrap_or_default();
    let devices = parse_swaps(&swaps);
    devices.into_iter().fold(Zram::default(), |sum, device| {
        let path = root.join("sys/block").join(device).join("mm_stat");
        let one = fs::read_to_string(path).ok().and_then(|text| parse(&text)).unwrap_or_default();
        Zram { used: sum.used.saturating_add(one.used), stored: sum.stored.saturating_add(one.stored) }
    })
}

/// The names of the zram devices in a `/proc/swaps` (proc_swaps(5)).
fn parse_swaps(text: &str) -> HashSet<&str> {
    let paths = text.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
    let names = paths.filter_map(|path| path.strip_prefix("/dev/")).map(|name| name.trim_start_matches("block/"));
    let is_zram = |name: &&str| {
        name.strip_prefix("zram").is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
    };
    names.filter(is_zram).collect()
}

/// One `mm_stat`; `None` for anything else.
fn parse(text: &str) -> Option<Zram> {
    let mut fields = text.split_ascii_whitespace();
    let stored: u64 = fields.next()?.parse().ok()?;
    let _compressed: u64 = fields.next()?.parse().ok()?;
    let used: u64 = fields.next()?.parse().ok()?;
    Some(Zram { used: used / 1024, stored: stored / 1024 })
}

/// What it cost to put `swapped` KiB of an app out, in KiB. `alone`: nobody we know of put anything out meanwhile.
pub(super) fn cost(before: Zram, after: Zram, swapped: u64, alone: bool) -> (u64, ZramSource) {
    let grown = after.stored.saturating_sub(before.stored);
    // That it shrank is something else's doing as well.
    let off = grown.abs_diff(swapped).saturating_add(before.stored.saturating_sub(after.stored));
    if alone && off <= (swapped / 4).saturating_add(NOISE) {
        return (after.used.saturating_sub(before.used), ZramSource::Measured);
    }
    let share = u128::from(swapped) * u128::from(after.used) / u128::from(after.stored.max(1));
    // Nothing costs more than all there is.
    (u64::try_from(share).unwrap_or(u64::MAX).min(after.used), ZramSource::Ratio)
}

/// The page-outs under way: what zram grows by is one app's only while that one is alone.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: usize,
    begun: u64,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    crowd: &'a Crowd,
    number: u64,
    others: bool,
}

impl Crowd {
    pub(super) fn enter(&self) -> Turn<'_> {
        let mut state = self.lock();
        let others = state.running > 0;
        state.running += 1;
        state.begun += 1;
        Turn { crowd: self, number: state.begun, others }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Two numbers that no panic can leave half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn<'_> {
    /// Whether no other has been under way since it began.
    pub(super) fn is_alone(&self) -> bool {
        !self.others && self.crowd.lock().begun == self.number
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.crowd.lock().running -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024;

    fn zram(used: u64, stored: u64) -> Zram {
        Zram { used: used * MIB, stored: stored * MIB }
    }

    #[test]
    fn mm_stat_is_read() {
        let line = "  8192000   1024000  2048000        0  2048000        7        0        0        0\n";
        assert_eq!(parse(line), Some(Zram { used: 2000, stored: 8000 }));
        for text in ["", "8192 1024", "a b c", "-1 2 3"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn only_zram_that_is_swap_counts() {
        let root = tempfile::tempdir().unwrap();
        let device = |name: &str, text: &str| {
            let dir = root.path().join("sys/block").join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("mm_stat"), text).unwrap();
        };
        assert_eq!(below(root.path()), Zram::default());
        fs::create_dir(root.path().join("proc")).unwrap();
        let swaps = "Filename\t\t\tType\t\tSize\tUsed\tPriority\n/dev/zram0  partition 1 0 100\n\
            /dev/zram12 partition 1 0 100\n/dev/zram3 partition 1 0 1\n/swap/zram1 file 1 0 1\n/dev/mmcblk0p3 partition 1 0 -2\n";
        fs::write(root.path().join("proc/swaps"), swaps).unwrap();
        device("zram0", "4096000 1 1024000 0 0 0 0 0 0\n");
        // Somebody's /var/log.
        device("zram1", "409600000 1 102400000 0 0 0 0 0 0\n");
        device("zram12", "1024000 1 1024000 0 0 0 0 0 0\n");
        device("zram3", "half a li");
        assert_eq!(below(root.path()), Zram { used: 2000, stored: 5000 });
    }

    #[test]
    fn a_page_out_alone_costs_what_zram_grew_by() {
        // Text, random bytes, and pages of zeroes.
        for (grown, stored) in [(10, 32), (32, 32), (0, 32)] {
            let (before, after) = (zram(100, 300), zram(100 + grown, 300 + stored));
            assert_eq!(cost(before, after, 32 * MIB, true), (grown * MIB, ZramSource::Measured));
        }
        // The bounds: a quarter and 1 MiB.
        let put = |swapped, stored| cost(Zram::default(), Zram { used: 5, stored }, swapped, true).1;
        assert_eq!(put(4000, 4000 + 1000 + 1024), ZramSource::Measured);
        assert_eq!(put(4000, 4000 + 1000 + 1025), ZramSource::Ratio);
        assert_eq!(put(4000, 4000 - 1000 - 1024), ZramSource::Measured);
        assert_eq!(put(8000, 8000 - 2000 - 1024), ZramSource::Measured);
        assert_eq!(put(8000, 8000 - 2000 - 1025), ZramSource::Ratio);
    }

    #[test]
    fn what_others_put_out_is_not_the_apps() {
        // 32 MiB of the app, 64 of another: by the ratio of all, a third.
        let (before, after) = (zram(20, 60), zram(52, 156));
        assert_eq!(cost(before, after, 32 * MIB, true), (32 * MIB * 52 / 156, ZramSource::Ratio));
        assert_eq!(cost(zram(20, 60), zram(31, 92), 32 * MIB, false).1, ZramSource::Ratio);
        // Another's came back meanwhile.
        let (kib, source) = cost(zram(100, 300), zram(70, 200), 32 * MIB, true);
        assert_eq!((kib, source), (32 * MIB * 70 / 200, ZramSource::Ratio));
        // It was all swap on a disk.
        assert_eq!(cost(Zram::default(), Zram::default(), 32 * MIB, true), (0, ZramSource::Ratio));
        assert_eq!(cost(Zram::default(), Zram { used: 7, stored: 1 }, u64::MAX, true), (7, ZramSource::Ratio));
        assert_eq!(cost(zram(9, 9), zram(9, 9), 0, true), (0, ZramSource::Measured));
    }

    #[test]
    fn a_crowd_knows_who_was_alone() {
        let crowd = Crowd::default();
        let alone = crowd.enter();
        assert!(alone.is_alone());
        drop(alone);
        let first = crowd.enter();
        let second = crowd.enter();
        assert!(!first.is_alone() && !second.is_alone());
        drop(second);
        // It was not, for a while.
        assert!(!first.is_alone());
        drop(first);
        assert!(crowd.enter().is_alone());
    }
}
