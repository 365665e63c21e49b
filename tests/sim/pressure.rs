//! Memory gets short now and then, and the kernel says so, or does not.

use nightporter::{
    event::{Command, Event},
    model::{Pressure, Profile, Stall, Stalled},
};

use crate::{
    clock::{At, MS, SEC},
    world::{Due, World},
};

const TOTAL: u64 = 3_000_000;
/// What is measured between two looks may be of this long ago.
const LAG: At = 7 * SEC;

/// How much memory there is.
#[derive(Default)]
pub(crate) struct Shortage {
    until: At,
    severe: bool,
    swap_free: u64,
    read: At,
    waited: u64,
}

impl World {
    pub(crate) fn memory_gets_short(&mut self) {
        self.count("memory shortages");
        let until = self.soon(2 * SEC, 60 * SEC);
        self.shortage.until = until;
        self.shortage.severe = self.rng.chance(5000);
        self.shortage.swap_free = self.rng.below(2_000_000);
        self.note(|| "memory is short".to_owned());
        if self.plan.psi {
            self.agenda.add(self.at, Due::Stall(self.life));
        }
    }

    pub(crate) fn memory_is_enough(&mut self) {
        self.shortage.until = self.shortage.until.min(self.at);
    }

    /// The kernel says it once in each window.
    pub(crate) fn stall(&mut self, life: u32) {
        if self.at >= self.shortage.until || life != self.life {
            return;
        }
        let trigger = if self.shortage.severe { Stall::Severe } else { Stall::Moderate };
        let reading = self.reading(Some(trigger));
        self.tell(Event::Pressure(reading));
        let at = self.soon(SEC, 3 * SEC);
        self.agenda.add(at, Due::Stall(life));
    }

    pub(crate) fn read_pressure(&mut self) {
        let reading = self.reading(None);
        let at = self.soon(0, 5 * MS);
        self.agenda.add(at, Due::Core(self.life, Event::Pressure(reading)));
    }

    fn reading(&mut self, trigger: Option<Stall>) -> Pressure {
        let shortage = &mut self.shortage;
        let short = self.at < shortage.until;
        if short {
            let share = if shortage.severe { 3 } else { 10 };
            shortage.waited += (self.at - shortage.read) / 1000 / share;
        }
        shortage.read = self.at;
        let stalled = Stalled { some_total: shortage.waited, ..Stalled::default() };
        Pressure {
            trigger,
            stalled: self.plan.psi.then_some(stalled),
            total: TOTAL,
            available: if short { TOTAL / 10 } else { TOTAL / 3 },
            swap_total: 2_000_000,
            swap_free: if short { shortage.swap_free } else { 1_500_000 },
            zram_used: 0,
            zram_limit: 0,
        }
    }

    /// An app is ended that nobody has asked to end: it can be started again, and under `cached` memory is short.
    pub(crate) fn check_may_end(&mut self, n: u64) {
        let Some(instance) = self.instances.get(&n) else { return };
        if instance.commanded == Some((self.life, Command::Kill)) {
            return;
        }
        let key = &self.apps[instance.app].key;
        assert!(self.apps[instance.app].activatable, "{key} is ended, and nothing can start it again");
        if self.plan.profile == Profile::Cached {
            let late = self.at.saturating_sub(self.shortage.until);
            assert!(late <= LAG, "{key} is ended {} s after memory was short", late / SEC);
            self.count("apps ended for want of memory");
            // That helps, or does not.
            if self.rng.chance(3000) {
                self.memory_is_enough();
            }
        }
    }
}
