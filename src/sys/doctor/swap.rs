//! `/proc/swaps` and zram's `/sys/block/zramN`.

use super::Root;
use crate::doctor::facts::{Seen, Swap, SwapSpace, Zram};

pub(super) fn look(root: &Root) -> Seen<Swap> {
    let swaps = root.read("proc/swaps");
    // A kernel without CONFIG_SWAP has no such file; one without /proc mounted has none at all.
    let meminfo = root.read("proc/meminfo").ok_or("/proc/meminfo cannot be read")?;
    let memory = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let memory = memory.and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok()).unwrap_or_default();
    let spaces = swaps.unwrap_or_default().lines().skip(1).filter_map(|line| space(root, line)).collect();
    let zram_devices = root.list("sys/block").iter().filter(|name| is_zram(name)).count();
    Ok(Swap { memory, spaces, zram_devices })
}

fn space(root: &Root, line: &str) -> Option<SwapSpace> {
    let mut fields = line.split_ascii_whitespace();
    let path = fields.next()?.replace("\\040", " ");
    let (size, used) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
    let name = path.rsplit('/').next().filter(|name| is_zram(name));
    let zram = name.map(|name| zram(root, name));
    Some(SwapSpace { path, size, used, zram })
}

fn is_zram(name: &str) -> bool {
    name.strip_prefix("zram").is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

fn zram(root: &Root, name: &str) -> Zram {
    let algorithms = root.read(format!("sys/block/{name}/comp_algorithm")).unwrap_or_default();
    let algorithm = algorithms.split_ascii_whitespace().find_map(|one| one.strip_prefix('[')?.strip_suffix(']'));
    // orig_data_size, compr_data_size, mem_used_total, mem_limit (zram.rst), in bytes.
    let sizes = root.words(format!("sys/block/{name}/mm_stat"));
    let size = |index: usize| Some(sizes.get(index)?.parse::<u64>().ok()? / 1024);
    Zram { algorithm: algorithm.map(str::to_owned), memory_used: size(2), memory_limit: size(3) }
}
