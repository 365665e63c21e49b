//! What the kernel does to processes: slowly, and not always.

use std::{sync::Arc, time::Duration};

use nightporter::{
    event::{BusEvent, Command, Event, Outcome},
    model::{Charged, Freezer, Memory, ProcessFacts, Profile, Sample, TargetId, Veto, VetoKind, ZramSource},
};

use crate::{
    clock::{At, MS, SEC, START},
    world::{Due, World},
};

/// A handle on one instance, in one life of the daemon.
pub(crate) struct Target {
    instance: u64,
    /// The last word was to hold it still.
    held: bool,
    last: At,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum KernelOp {
    Freeze,
    Thaw,
    PageOut,
    Kill(Duration),
    Sample,
    Gone,
    Inspect,
}

impl World {
    pub(crate) fn identify(&mut self, life: u32, app: usize, n: u64) {
        if life != self.life || !self.is_up() || self.apps[app].instance != Some(n) {
            return;
        }
        let Some(owner) = self.instances.get(&n).and_then(|instance| instance.owner.clone()) else { return };
        let process = if self.rng.chance(500) {
            Err(Arc::from("its process cannot be looked at"))
        } else {
            self.next_target += 1;
            let target = TargetId(self.next_target);
            self.targets.insert(target, Target { instance: n, held: false, last: self.at });
            let facts = ProcessFacts {
                pid: u32::try_from(n).unwrap_or(1),
                freezer: if self.rng.chance(5000) { Freezer::Cgroup2 } else { Freezer::Signal },
                can_page_out: self.rng.chance(8000),
                protected: self.rng.chance(400).then(|| Arc::from("it is the message bus")),
            };
            Ok((target, facts))
        };
        let (key, startable) = (self.apps[app].key.clone(), self.apps[app].activatable);
        self.tell(Event::Identified { app: key.clone(), owner, process });
        self.bus_event(BusEvent::Startable(key, startable));
    }

    fn instance_of(&self, target: TargetId, what: &str) -> u64 {
        match self.targets.get(&target) {
            Some(target) => target.instance,
            None => panic!("{what} of target {}, which was forgotten or never was", target.0),
        }
    }

    pub(crate) fn freeze(&mut self, target: TargetId) {
        let n = self.instance_of(target, "freeze");
        assert!(self.may_touch(n, Command::Freeze), "instance {n} is frozen without the right to");
        self.check_told(n);
        self.say_why(n, "freeze");
        self.count("freezes");
        // The record comes first, whatever becomes of the freeze.
        if self.instances.contains_key(&n) {
            self.record.insert(n);
        }
        if let Some(target) = self.targets.get_mut(&target) {
            target.held = true;
        }
        self.kernel(target, KernelOp::Freeze);
    }

    pub(crate) fn page_out(&mut self, target: TargetId) {
        let n = self.instance_of(target, "page-out");
        assert!(self.plan.profile != Profile::Observe, "paged out under observe");
        assert!(
            self.instances.get(&n).is_none_or(|instance| instance.frozen),
            "instance {n} is paged out while it runs"
        );
        self.say_why(n, "page-out");
        self.count("page-outs");
        self.kernel(target, KernelOp::PageOut);
    }

    pub(crate) fn kill_target(&mut self, target: TargetId, grace: Duration) {
        let n = self.instance_of(target, "kill");
        let by_hand = self.may_touch(n, Command::Kill);
        assert!(by_hand, "instance {n} is killed without the right to");
        self.check_may_end(n);
        self.say_why(n, "kill");
        self.count("kills");
        // Thawed first, so that it can hear the signal.
        self.let_run(n);
        if let Some(target) = self.targets.get_mut(&target) {
            target.held = false;
        }
        self.kernel(target, KernelOp::Kill(grace));
    }

    fn say_why(&mut self, n: u64, verdict: &'static str) {
        if let Some(app) = self.instances.get(&n).map(|instance| instance.app) {
            let app = self.apps[app].key.clone();
            self.must_say_why(app, verdict);
        }
    }

    pub(crate) fn kernel(&mut self, target: TargetId, op: KernelOp) {
        let n = self.instance_of(target, "an operation");
        let at = self.soon(MS, 200 * MS);
        let life = self.life;
        if let Some(target) = self.targets.get_mut(&target) {
            if matches!(op, KernelOp::Thaw) {
                target.held = false;
            }
            target.last = target.last.max(at);
        }
        if matches!(op, KernelOp::Thaw)
            && let Some(instance) = self.instances.get_mut(&n)
        {
            instance.commanded = None;
        }
        let at = self.targets.get(&target).map_or(at, |target| target.last);
        self.agenda.add(at, Due::Kernel(life, target, op));
    }

    pub(crate) fn kernel_done(&mut self, life: u32, target: TargetId, op: KernelOp) {
        if life != self.life || !self.is_up() {
            return;
        }
        let Some(n) = self.targets.get(&target).map(|target| target.instance) else { return };
        let lives = self.instances.contains_key(&n);
        let unlucky = !self.calm && self.rng.chance(700);
        let took = Duration::from_millis(3);
        let event = match op {
            KernelOp::Gone => Event::TargetGone(target),
            KernelOp::Inspect if unlucky => {
                self.count("inspections that found something");
                let veto = Veto { kind: VetoKind::AwaitedLock, reason: "process 7 waits for its lock".into() };
                Event::Inspected(target, Ok(vec![veto]))
            }
            KernelOp::Inspect => Event::Inspected(target, Ok(Vec::new())),
            KernelOp::Freeze if unlucky || !lives => {
                self.count("freezes failed");
                self.record.remove(&n);
                if let Some(target) = self.targets.get_mut(&target) {
                    target.held = false;
                }
                Event::Outcome(target, Outcome::FreezeFailed("device or resource busy".into()))
            }
            KernelOp::Freeze => {
                if let Some(instance) = self.instances.get_mut(&n) {
                    instance.frozen = true;
                }
                Event::Outcome(target, Outcome::Frozen { took })
            }
            KernelOp::Thaw if unlucky || !lives => {
                self.count("thaws failed");
                self.trouble_thawing();
                Event::Outcome(target, Outcome::ThawFailed("input/output error".into()))
            }
            KernelOp::Thaw => {
                self.let_run(n);
                Event::Outcome(target, Outcome::Thawed { took })
            }
            KernelOp::PageOut if unlucky || !lives => Event::Outcome(target, Outcome::PageOutFailed("no swap".into())),
            KernelOp::PageOut => Event::Outcome(
                target,
                Outcome::PagedOut { freed: 9000, zram: 3000, source: ZramSource::Measured, took },
            ),
            KernelOp::Kill(_) if unlucky && lives => {
                self.let_run(n);
                Event::Outcome(target, Outcome::KillFailed("operation not permitted".into()))
            }
            KernelOp::Kill(grace) => {
                self.let_run(n);
                let grace = u64::try_from(grace.as_nanos()).unwrap_or(SEC);
                let at = self.soon(MS, grace);
                self.agenda.add(at, Due::Exit(n));
                return;
            }
            KernelOp::Sample if unlucky || !lives => Event::Sampled(target, Err("no such process".into())),
            KernelOp::Sample => {
                let pss = self.rng.between(4000, 60_000);
                let memory = Memory { pss, uss: pss - 1000, swap: self.rng.below(9000) };
                let file = self.rng.below(3000);
                let cpu = Duration::from_nanos(self.at - START);
                let faults = (self.at - START) / SEC;
                let charged = Some(Charged { kernel: 300, ..Charged::default() });
                Event::Sampled(target, Ok(Sample { anon: pss - file, file, charged, cpu, faults, ..memory.into() }))
            }
        };
        self.tell(event);
    }

    fn let_run(&mut self, n: u64) {
        self.record.remove(&n);
        if let Some(instance) = self.instances.get_mut(&n)
            && std::mem::take(&mut instance.frozen)
        {
            self.set_to_work(n);
        }
    }

    pub(crate) fn forget(&mut self, target: TargetId) {
        let n = self.instance_of(target, "forgetting");
        self.targets.remove(&target);
        if !self.targets.values().any(|other| other.instance == n && other.held) {
            self.let_run(n);
        }
    }

    /// Invariant 4: nobody calls an app that is held still.
    pub(crate) fn check_not_held(&self, n: u64, what: &impl std::fmt::Debug) {
        let held = self.targets.values().any(|target| target.instance == n && target.held);
        let frozen = self.instances.get(&n).is_some_and(|instance| instance.frozen);
        assert!(!held && !frozen, "instance {n} is called while it is held still: {what:?}");
    }

    pub(crate) fn targets_of_dead(&mut self, n: u64) {
        let gone: Vec<TargetId> =
            self.targets.iter().filter(|(_, target)| target.instance == n).map(|(id, _)| *id).collect();
        for target in gone {
            self.kernel(target, KernelOp::Gone);
        }
    }

    /// The daemon is gone: a freeze under way has happened or never will.
    pub(crate) fn kernel_crash(&mut self) {
        for target in std::mem::take(&mut self.targets).into_values() {
            if target.held
                && self.rng.chance(5000)
                && let Some(instance) = self.instances.get_mut(&target.instance)
            {
                instance.frozen = true;
            }
        }
        if self.instances.values().any(|instance| instance.frozen) {
            self.count("crashes with frozen apps");
        }
    }

    /// What the next start does with the record of the last.
    pub(crate) fn thaw_record(&mut self) {
        for n in std::mem::take(&mut self.record) {
            self.let_run(n);
        }
    }
}
