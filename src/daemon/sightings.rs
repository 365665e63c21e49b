//! What is seen of processes all the time (PipeWire, MPRIS, logind, the compositor), told by process id, becomes what the
//! core knows: targets.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    event::Event,
    model::{Bus, TargetId, Veto, Window},
    sys::process::Targets,
};

/// Vetoes told of one target at most.
const VETOES: usize = 16;

/// The latest word of each source, and what of it the core has been told.
#[derive(Debug, Default)]
pub(super) struct Sightings {
    vetoes: BTreeMap<(&'static str, u32), Vec<(u32, Veto)>>,
    windows: BTreeMap<u32, Vec<(Window, Option<u32>)>>,
    told: BTreeMap<TargetId, Vec<Veto>>,
}

impl Sightings {
    /// A source says what it sees of the processes of a session.
    pub(super) fn seen(
        &mut self,
        source: &'static str,
        uid: u32,
        vetoes: Vec<(u32, Veto)>,
        targets: &Targets,
        out: &mut impl Extend<Event>,
    ) {
        if vetoes.is_empty() {
            self.vetoes.remove(&(source, uid));
        } else {
            self.vetoes.insert((source, uid), vetoes);
        }
        self.tell(targets, out);
    }

    /// A compositor says which windows there are.
    pub(super) fn windows(
        &mut self,
        uid: u32,
        windows: Option<Vec<(Window, Option<u32>)>>,
        targets: &Targets,
        out: &mut impl Extend<Event>,
    ) {
        match windows {
            Some(windows) => {
                out.extend([Event::Windows(Bus::Session(uid), Some(resolved(&windows, targets)))]);
                self.windows.insert(uid, windows);
            }
            None => {
                self.windows.remove(&uid);
                out.extend([Event::Windows(Bus::Session(uid), None)]);
            }
        }
    }

    /// A process has become a target, which may have been seen before.
    pub(super) fn adopted(&mut self, targets: &Targets, out: &mut impl Extend<Event>) {
        self.tell(targets, out);
        for (uid, windows) in &self.windows {
            if windows.iter().any(|(_, pid)| pid.is_some()) {
                out.extend([Event::Windows(Bus::Session(*uid), Some(resolved(windows, targets)))]);
            }
        }
    }

    /// A target is no more.
    pub(super) fn forget(&mut self, target: TargetId) {
        self.told.remove(&target);
    }

    fn tell(&mut self, targets: &Targets, out: &mut impl Extend<Event>) {
        let mut now: BTreeMap<TargetId, BTreeSet<Veto>> = BTreeMap::new();
        for (pid, veto) in self.vetoes.values().flatten() {
            if let Some(target) = targets.of_pid(*pid) {
                now.entry(target).or_default().insert(veto.clone());
            }
        }
        let over: Vec<TargetId> = self.told.keys().filter(|target| !now.contains_key(target)).copied().collect();
        for target in over {
            self.told.remove(&target);
            out.extend([Event::Vetoes(target, Vec::new())]);
        }
        for (target, vetoes) in now {
            let vetoes: Vec<Veto> = vetoes.into_iter().take(VETOES).collect();
            if self.told.get(&target) != Some(&vetoes) {
                out.extend([Event::Vetoes(target, vetoes.clone())]);
                self.told.insert(target, vetoes);
            }
        }
    }
}

fn resolved(windows: &[(Window, Option<u32>)], targets: &Targets) -> Vec<Window> {
    let of = |(window, pid): &(Window, Option<u32>)| Window {
        target: pid.and_then(|pid| targets.of_pid(pid)),
        told_pid: pid.is_some(),
        ..window.clone()
    };
    windows.iter().map(of).collect()
}
