//! Swap and zram.

use super::{
    Area,
    facts::{Facts, Swap, SwapSpace, Zram},
    mend,
};
use crate::view::{Finding, Verdict};

/// Percent of the swap in use from which on little more can be paged out.
const FULL: u64 = 90;

pub(super) fn examine(facts: &Facts, findings: &mut Vec<Finding>) {
    let mut area = Area { name: "memory", findings };
    let Some(swap) = area.seen("swap", "swap", &facts.swap) else { return };
    let machine = facts.machine.as_ref().ok();
    let (size, used) = sums(&swap.spaces);
    if size == 0 {
        let idle = match swap.zram_devices {
            0 => "",
            _ => " (there is a zram device, but it is not used as swap)",
        };
        area.say(
            "swap",
            Verdict::Lacks,
            format!("there is no swap{idle}"),
            Some("nothing can be paged out: a frozen app keeps its memory, and only ending it gives it back"),
            mend::zram(machine),
        );
        return;
    }
    let described: Vec<String> = swap.spaces.iter().map(describe).collect();
    let text = described.join("; ");
    if used.saturating_mul(100) >= size.saturating_mul(FULL) {
        area.say(
            "swap",
            Verdict::Note,
            format!("{text}: nearly full"),
            Some("little more can be paged out until something ends"),
            Vec::new(),
        );
    } else {
        area.ok("swap", text);
    }
    zram(&mut area, facts, swap);
}

fn zram(area: &mut Area<'_>, facts: &Facts, swap: &Swap) {
    let devices: Vec<(&SwapSpace, &Zram)> =
        swap.spaces.iter().filter_map(|space| Some((space, space.zram.as_ref()?))).collect();
    if devices.is_empty() {
        area.say(
            "zram",
            Verdict::Lacks,
            "swap is on a disk or card, none of it in compressed memory (zram)",
            Some("paging out wears that storage and is slow to undo; the ledger counts all of it as saved"),
            mend::zram(facts.machine.as_ref().ok()),
        );
        return;
    }
    for (space, zram) in devices {
        let limit = zram.memory_limit.unwrap_or_default();
        let used = zram.memory_used.unwrap_or_default();
        let name = space.path.rsplit('/').next().unwrap_or_default();
        let algorithm = zram.algorithm.as_deref().unwrap_or("unknown compression");
        if limit > 0 && used.saturating_mul(100) >= limit.saturating_mul(FULL) {
            area.say(
                "zram",
                Verdict::Note,
                format!("{name} takes {} of the {} it may take (mem_limit)", mib(used), mib(limit)),
                Some("what does not fit is refused, and stays in memory"),
                vec![format!("echo 0 | sudo tee /sys/block/{name}/mem_limit")],
            );
            continue;
        }
        let limit = match limit {
            0 => "without a limit (mem_limit)".to_owned(),
            limit => format!("{} at most", mib(limit)),
        };
        area.ok("zram", format!("{name}: {algorithm}, takes {} of memory now, {limit}", mib(used)));
    }
}

fn describe(space: &SwapSpace) -> String {
    format!("{}: {}, {} used", space.path, mib(space.size), mib(space.used))
}

fn sums(spaces: &[SwapSpace]) -> (u64, u64) {
    spaces.iter().fold((0, 0), |(size, used), space| (size.saturating_add(space.size), used.saturating_add(space.used)))
}

pub(super) fn mib(kib: u64) -> String {
    format!("{} MiB", kib.div_ceil(1024))
}
