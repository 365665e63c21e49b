//! Whose process a process id is.

use std::{collections::HashMap, path::Path};

use super::{
    hold::Hold,
    home::{Home, World, unit_of},
    procfs::{ProcDir, Stat, parse_cgroup, parse_uids},
    target::{Phase, Target},
};
use crate::model::TargetId;

/// Parents that are asked.
const MAX_LEVELS: usize = 64;

/// The target this process belongs to: whose cgroup it is in, or else whose main process it runs below. A process of
/// another user than the target's is nobody's.
pub(super) fn whose(pid: u32, targets: &HashMap<TargetId, Target>, world: &World) -> Option<TargetId> {
    let dir = ProcDir::open(pid).ok()?;
    let uids = parse_uids(&dir.read("status").ok()?)?;
    let text = dir.read("cgroup").ok()?;
    let (unit, whole) = parse_cgroup(&text).map_or(("", false), unit_of);
    let candidates: Vec<&Target> =
        targets.values().filter(|target| uids.iter().all(|uid| *uid == target.uid)).collect();
    let first = |found: &mut dyn Iterator<Item = &Target>| found.map(|target| target.id).min();

    let path = world.path_of(unit);
    let lives_there = |target: &&&Target| {
        let cgroup = match (&target.phase, &target.home) {
            (Phase::Freezing(Hold::Cgroup { cgroup, .. }, _) | Phase::Frozen(Hold::Cgroup { cgroup, .. }), _) => cgroup,
            // Strangers may have moved into what was not made for one app.
            (_, Home::Cgroup { cgroup, whole: true }) => cgroup,
            _ => return false,
        };
        path.as_deref().is_some_and(|path| path.starts_with(cgroup.path())) && cgroup.is_current()
    };
    let mut residents = candidates.iter().filter(lives_there).copied();
    if let Some(found) = first(&mut residents) {
        return Some(found);
    }

    let mains: HashMap<u32, Vec<&Target>> = candidates.iter().fold(HashMap::new(), |mut mains, target| {
        mains.entry(target.main.pid).or_insert_with(Vec::new).push(*target);
        mains
    });
    let mut stat = dir.stat().ok()?;
    for _ in 0..MAX_LEVELS {
        let here = mains.get(&stat.pid).into_iter().flatten();
        let mut here = here.filter(|target| target.main.start == stat.start).copied();
        if let Some(found) = first(&mut here) {
            // What an app has started may be an app of its own.
            return (!whole || is_in(&stat, unit)).then_some(found);
        }
        if stat.parent <= 1 {
            return None;
        }
        stat = ProcDir::open(stat.parent).ok()?.stat().ok()?;
    }
    None
}

fn is_in(stat: &Stat, unit: &str) -> bool {
    let text = ProcDir::open(stat.pid).and_then(|dir| dir.read("cgroup")).unwrap_or_default();
    parse_cgroup(&text).is_some_and(|path| Path::new(path).starts_with(unit))
}
