//! Sleep, with logind (org.freedesktop.login1.Manager; systemd.io/INHIBITOR_LOCKS): told before it, so that what is
//! under way can be put in order, and held off while a message is on its way to an app.
//!
//! Never more than one lock of each mode. Without logind everything here does nothing.

use std::{num::NonZeroU32, os::fd::OwnedFd, sync::Arc, time::Duration};

use super::calls::{Calls, Pending, Response};
use crate::{event::Event, time::Instant};

pub(super) const PATH: &str = "/org/freedesktop/login1";
pub(super) const MANAGER: &str = "org.freedesktop.login1.Manager";

/// A lock that holds sleep off is let go after this long, whatever the loop thinks: a mistake there must not keep a
/// phone awake all night. Several times the longest awake window.
const LONGEST_BLOCK: Duration = Duration::from_secs(300);

/// Which lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Sleep waits for us, a few seconds at most.
    Delay,
    /// No sleep while it is held.
    Block,
}

impl Mode {
    const fn word(self) -> &'static str {
        match self {
            Self::Delay => "delay",
            Self::Block => "block",
        }
    }

    const fn reason(self) -> &'static str {
        match self {
            Self::Delay => "delivering messages",
            Self::Block => "a message is on its way to an app",
        }
    }
}

/// The locks, and where the machine is on its way to sleep and back.
#[derive(Debug, Default)]
pub(super) struct Inhibitors {
    logind: Option<Arc<str>>,
    sleep: Sleep,
    delay: Lock,
    block: Lock,
    stay_awake: bool,
    /// When the block is let go at the latest.
    enough: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sleep {
    #[default]
    Awake,
    /// About to, and the loop has been told.
    Falling,
    /// The loop has nothing against it.
    Allowed,
}

/// Closing the file descriptor lets the lock go.
#[derive(Debug, Default)]
struct Lock {
    held: Option<OwnedFd>,
    asked: Option<NonZeroU32>,
    /// Whether a refusal was said in the log.
    refused: bool,
}

impl Inhibitors {
    /// logind is there.
    pub(super) fn appeared(&mut self, calls: &mut Calls, owner: Arc<str>) {
        self.logind = Some(owner);
        self.take_missing(calls);
    }

    /// logind is gone, and its locks with it. The event, if it left us between falling asleep and waking up.
    pub(super) fn vanished(&mut self) -> Option<Event> {
        self.logind = None;
        for lock in [&mut self.delay, &mut self.block] {
            (lock.held, lock.asked) = (None, None);
        }
        (std::mem::take(&mut self.sleep) != Sleep::Awake).then_some(Event::Resumed)
    }

    /// The signal PrepareForSleep.
    pub(super) fn prepare_for_sleep(&mut self, calls: &mut Calls, start: bool) -> Option<Event> {
        if start {
            return (std::mem::replace(&mut self.sleep, Sleep::Falling) == Sleep::Awake)
                .then_some(Event::FallingAsleep);
        }
        self.sleep = Sleep::Awake;
        self.take_missing(calls);
        Some(Event::Resumed)
    }

    /// The loop has nothing against sleep any more.
    pub(super) fn allow_sleep(&mut self) {
        if self.sleep != Sleep::Awake {
            self.sleep = Sleep::Allowed;
            self.delay.held = None;
        }
    }

    /// The loop wants sleep held off from now on, or no more.
    pub(super) fn stay_awake(&mut self, calls: &mut Calls, stay_awake: bool, now: Instant) {
        self.stay_awake = stay_awake;
        self.enough = stay_awake.then(|| now + LONGEST_BLOCK);
        if stay_awake {
            self.take_missing(calls);
        } else {
            self.block.held = None;
        }
    }

    /// Asks for what is wanted and not held, after a refusal as well.
    pub(super) fn take_missing(&mut self, calls: &mut Calls) {
        let Some(logind) = &self.logind else { return };
        let wanted = [
            (Mode::Delay, self.sleep == Sleep::Awake, &mut self.delay),
            (Mode::Block, self.stay_awake, &mut self.block),
        ];
        for (mode, wanted, lock) in wanted {
            if wanted && lock.held.is_none() && lock.asked.is_none() {
                let arguments = ("sleep", "Night Porter", mode.reason(), mode.word());
                lock.asked = calls.call(logind, PATH, MANAGER, "Inhibit", &arguments, Pending::Inhibitor(mode));
            }
        }
    }

    /// The answer to Inhibit. A lock nobody wants any more is closed at once.
    pub(super) fn answered(&mut self, mode: Mode, serial: NonZeroU32, response: Response) {
        let (lock, wanted) = match mode {
            Mode::Delay => (&mut self.delay, self.sleep != Sleep::Allowed),
            Mode::Block => (&mut self.block, self.stay_awake),
        };
        if lock.asked != Some(serial) {
            return;
        }
        lock.asked = None;
        let granted = response.and_then(|message| {
            message.body().deserialize::<zbus::OwnedFd>().map(OwnedFd::from).map_err(|error| error.to_string())
        });
        match granted {
            Ok(held) => {
                lock.refused = false;
                lock.held = wanted.then_some(held);
            }
            Err(text) if std::mem::replace(&mut lock.refused, true) => {
                log::debug!("logind grants no {} lock: {text}", mode.word());
            }
            Err(text) => {
                let without = match mode {
                    Mode::Delay => "the machine falls asleep without waiting for this daemon",
                    Mode::Block => "sleep is not held off while a message is delivered",
                };
                log::info!("logind grants no {} lock: {without} ({text})", mode.word());
            }
        }
    }

    /// When [`Inhibitors::handle_timeout`] wants to be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.enough
    }

    /// Time passed.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if self.enough.is_some_and(|at| at <= now) {
            log::warn!("sleep was held off for {} s; no longer", LONGEST_BLOCK.as_secs());
            (self.stay_awake, self.enough, self.block.held) = (false, None, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use zbus::Message;

    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn a_loop_that_forgets_to_let_go_does_not_keep_the_machine_awake() {
        let (mut inhibitors, mut calls) = (Inhibitors::default(), Calls::default());
        inhibitors.appeared(&mut calls, ":1.5".into());
        inhibitors.stay_awake(&mut calls, true, at(0));
        let asked = calls.drain();
        assert_eq!(asked.len(), 2);
        let call = asked.last().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let reply = Message::method_return(&call.header()).build(&zbus::OwnedFd::from(OwnedFd::from(writer))).unwrap();
        inhibitors.answered(Mode::Block, call.primary_header().serial_num(), Ok(reply));
        // Said again: it counts from then.
        inhibitors.stay_awake(&mut calls, true, at(100));
        assert!(calls.drain().is_empty());
        inhibitors.handle_timeout(at(399));
        assert!(inhibitors.block.held.is_some());
        assert_eq!(inhibitors.poll_timeout(), Some(at(400)));
        inhibitors.handle_timeout(at(400));
        assert_eq!((inhibitors.block.held.is_none(), inhibitors.poll_timeout()), (true, None));
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "nobody has it open");
        assert!(inhibitors.delay.asked.is_some());
    }
}
