//! `oom_score_adj` of held apps: what is held goes first when the machine is out of memory (proc_pid_oom_score_adj(5)).
//!
//! Anybody who may write the file may raise it. Lowering it again is allowed down to the least value that was last
//! written with CAP_SYS_RESOURCE; that limit cannot be read. So the value that is there is written first: where that is
//! refused, so would be the way back, and it is left alone. A writer that has the capability moves the limit along with
//! each write, and it is back as well after the second.

use std::{io, os::unix::fs::FileExt, time::Duration};

use super::procfs::{Member, is_gone};
use crate::time::Instant;

/// Processes done at a time: what the loop may spend on it.
const BATCH: usize = 32;
/// Between two batches others have their turn.
const PAUSE: Duration = Duration::from_millis(1);
/// Never to be killed: somebody meant that.
const UNKILLABLE: i16 = -1000;
const NAME: &str = "oom_score_adj";

/// One process whose value was raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Raised {
    pub(super) member: Member,
    pub(super) before: i16,
    pub(super) set: i16,
}

impl Raised {
    /// What raising it to `to` would change. `None` when it is as high already, is to be left alone, or could not be
    /// brought back.
    fn plan(member: Member, to: i16) -> Option<Self> {
        let file = member.dir().ok()?.open_writable(NAME).ok()?;
        let before = read(&file).ok()?;
        let raised = Self { member, before, set: to };
        (before < to && before != UNKILLABLE && write(&file, before).is_ok()).then_some(raised)
    }

    fn apply(&self) -> io::Result<()> {
        write(&self.member.dir()?.open_writable(NAME)?, self.set)
    }

    /// Brings it back, unless somebody has set another value since; false then.
    pub(super) fn restore(&self) -> io::Result<bool> {
        let file = self.member.dir()?.open_writable(NAME)?;
        if read(&file)? != self.set {
            return Ok(false);
        }
        write(&file, self.before).map(|()| true)
    }
}

/// What is raised for one app, and what is still to be done. Done in batches, after the freeze or the thaw was told.
#[derive(Debug, Default)]
pub(super) struct Oom {
    raised: Vec<Raised>,
    to_raise: Vec<Member>,
    restoring: bool,
    due: Option<Instant>,
}

impl Oom {
    /// When [`Oom::work`] wants to be called.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// These are held from now on.
    pub(super) fn raise(&mut self, members: Vec<Member>, now: Instant) {
        self.to_raise = members;
        self.due = (!self.to_raise.is_empty()).then_some(now);
    }

    /// They run again. Whether there is anything to bring back.
    pub(super) fn restore(&mut self, now: Instant) -> bool {
        self.to_raise = Vec::new();
        self.restoring = !self.raised.is_empty();
        self.due = self.restoring.then_some(now);
        self.restoring
    }

    /// Does one batch. `record`: writes down what is about to be raised; where it fails nothing is. True when
    /// everything is what it was.
    pub(super) fn work(&mut self, now: Instant, to: i16, record: impl FnOnce(&[Raised]) -> io::Result<()>) -> bool {
        if self.due.take_if(|due| *due <= now).is_none() {
            return false;
        }
        if self.restoring {
            let rest = self.raised.len().saturating_sub(BATCH);
            self.raised.drain(rest..).for_each(restore_or_log);
            self.restoring = !self.raised.is_empty();
            self.due = self.restoring.then_some(now + PAUSE);
            return !self.restoring;
        }
        let rest = self.to_raise.len().saturating_sub(BATCH);
        let planned: Vec<Raised> = self.to_raise.drain(rest..).filter_map(|member| Raised::plan(member, to)).collect();
        if let Err(error) = record(&planned) {
            log::error!("{NAME} is left as it is: the freeze record cannot be written: {error}");
            self.to_raise = Vec::new();
            return false;
        }
        for raised in planned {
            match raised.apply() {
                Err(error) if !is_gone(&error) => log::debug!("{NAME} of process {}: {error}", raised.member.pid),
                _ => self.raised.push(raised),
            }
        }
        self.due = (!self.to_raise.is_empty()).then_some(now + PAUSE);
        false
    }

    /// Brings back everything at once: there is no later.
    pub(super) fn restore_all(&mut self) {
        let raised = std::mem::take(self).raised;
        raised.into_iter().for_each(restore_or_log);
    }
}

fn restore_or_log(raised: Raised) {
    match raised.restore() {
        Err(error) if !is_gone(&error) => {
            log::warn!("{NAME} of process {} stays at {}: {error}", raised.member.pid, raised.set);
        }
        _ => {}
    }
}

fn read(file: &std::fs::File) -> io::Result<i16> {
    let mut buffer = [0; 16];
    let length = file.read_at(&mut buffer, 0)?;
    let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

fn write(file: &std::fs::File, value: i16) -> io::Result<()> {
    file.write_at(value.to_string().as_bytes(), 0).map(|_| ())
}
