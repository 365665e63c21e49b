//! The ballast test: how much more can be allocated before memory is short? A child of its own takes it, in steps; the
//! child is the first to go when memory runs out, ends when this process does, and all of it is given back.

use std::{
    collections::VecDeque,
    fs,
    io::{self, BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    mm::{MlockAllFlags, mlockall},
    process::{
        Pid, PidfdFlags, Resource, Signal, geteuid, getppid, getrlimit, pidfd_open, pidfd_send_signal,
        set_parent_process_death_signal,
    },
};
use serde::Serialize;

use super::{
    experiment::BallastPlan,
    kernel,
    schedule::Random,
    stage::{Stage, look},
};
use crate::exit::{Exit, Failure};

/// Unless the experiment says, at most this many times what is available when it begins: beyond it lies what others give up.
pub(super) const FACTOR: u64 = 2;
/// No step is shorter, so that all arms are asked for memory at the same pace: 80 MiB a second in steps of 16.
const PACE: Duration = Duration::from_millis(200);
const TURN: Duration = Duration::from_millis(100);
/// A step that takes longer than this is as good as refused.
const LONGEST_STEP: Duration = Duration::from_secs(120);
/// First of all to be ended for want of memory.
const FIRST_TO_GO: &str = "1000";

/// What came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Ballast {
    /// What was taken before the time in which memory was short, in KiB.
    pub(super) kib: u64,
    pub(super) ended: Ended,
    /// Share of the time some task waited for memory at the end, in percent.
    pub(super) pressure: f64,
    /// Whether it could not be moved to swap (mlockall(2)).
    pub(super) locked: bool,
    pub(super) seconds: f64,
}

/// What kept it from taking more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Ended {
    Pressure,
    /// The kernel refused more, or ended it.
    Refused,
    /// `ballast.max`.
    Max,
}

/// Takes what there is. Leaves nothing behind, whatever it gives back.
pub(super) fn run(stage: &Stage<'_>, plan: &BallastPlan) -> Result<Ballast, Failure> {
    let began = Instant::now();
    let max = plan.max.unwrap_or(look()?.available * FACTOR);
    let mut load = Load::start(stage, max)?;
    let mut taken = 0;
    let mut recent = Recent::new(plan.window);
    let (ended, kib, pressure) = loop {
        stage.world.check_interrupted()?;
        let over = recent.add(Instant::now(), kernel::stalled().unwrap_or(0), taken);
        if let Some((before, share)) = over.filter(|(_, share)| *share > plan.pressure) {
            break (Ended::Pressure, before, share);
        }
        let share = over.map_or(0.0, |(_, share)| share);
        if taken >= max {
            break (Ended::Max, taken, share);
        }
        let step = plan.step.min(max - taken);
        let from = Instant::now();
        if !load.take(stage, step)? || !load.lives() {
            break (Ended::Refused, taken, share);
        }
        taken += step;
        stage.world.pause(PACE.saturating_sub(from.elapsed()))?;
    };
    let locked = load.locked;
    drop(load);
    Ok(Ballast { kib, ended, pressure, locked, seconds: began.elapsed().as_secs_f64() })
}

/// What tasks have waited, over the last few steps. Pure.
struct Recent {
    window: Duration,
    looks: VecDeque<(Instant, u64, u64)>,
}

impl Recent {
    const fn new(window: Duration) -> Self {
        Self { window, looks: VecDeque::new() }
    }

    /// One more look: microseconds waited since boot, and what is taken. Once it reaches back a whole window: what was taken
    /// when that began, and the share of it that was waited.
    fn add(&mut self, at: Instant, stalled: u64, taken: u64) -> Option<(u64, f64)> {
        self.looks.push_back((at, stalled, taken));
        // The second is far enough back as well.
        while self.looks.get(1).is_some_and(|(then, ..)| at.duration_since(*then) >= self.window) {
            self.looks.pop_front();
        }
        let (then, before, taken_then) = *self.looks.front()?;
        let over = at.duration_since(then);
        (over >= self.window).then(|| (taken_then, kernel::share(stalled.saturating_sub(before), over)))
    }
}

/// The child that takes memory.
struct Load {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
    locked: bool,
}

impl Load {
    fn start(stage: &Stage<'_>, max: u64) -> Result<Self, Failure> {
        let exe = std::env::current_exe().map_err(|error| Failure::system("cannot find this program", error))?;
        let mut command = Command::new(exe);
        command.arg("measure-ballast").arg(std::process::id().to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        if let Some(cgroups) = &stage.cgroups
            && let Ok(cgroup) = cgroups.make_other("ballast")
        {
            // The bound holds whatever this program does wrong.
            let _ = fs::write(cgroup.join("memory.max"), ((max + 64 * 1024) * 1024).to_string());
            command.arg(cgroup.join("cgroup.procs"));
        }
        let mut child = command.spawn().map_err(|error| Failure::system("cannot start the ballast", error))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            let _ = child.kill();
            return Err(Failure::new(Exit::Failed, "the ballast has no pipes"));
        };
        let (sender, answers) = channel();
        // Ends with the child.
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut load = Self { child, stdin, answers, locked: false };
        match load.answer(stage)? {
            Some(answer) => load.locked = answer == "locked",
            None => return Err(Failure::new(Exit::Failed, "the ballast did not start")),
        }
        Ok(load)
    }

    /// Takes more. False when it was not to be had.
    fn take(&mut self, stage: &Stage<'_>, kib: u64) -> Result<bool, Failure> {
        if writeln!(self.stdin, "{kib}").and_then(|()| self.stdin.flush()).is_err() {
            return Ok(false);
        }
        Ok(self.answer(stage)?.is_some_and(|answer| answer == "taken"))
    }

    /// What it says next; none when it has ended, or takes too long.
    fn answer(&self, stage: &Stage<'_>) -> Result<Option<String>, Failure> {
        let deadline = Instant::now() + LONGEST_STEP;
        while Instant::now() < deadline {
            stage.world.check_interrupted()?;
            match self.answers.recv_timeout(TURN) {
                Ok(answer) => return Ok(Some(answer)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        Ok(None)
    }

    fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // Not waited for yet, so that the number is still its own.
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
            && self.lives()
            && let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
        {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// The child: reads how many KiB to take, line by line, and says when it has.
pub(super) fn child(parent: u32, cgroup: Option<&Path>) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before that was asked for.
    if getppid().is_none_or(|now| u32::try_from(now.as_raw_nonzero().get()) != Ok(parent)) {
        return Ok(());
    }
    fs::write("/proc/self/oom_score_adj", FIRST_TO_GO)?;
    if let Some(cgroup) = cgroup {
        fs::write(cgroup, "0")?;
    }
    // Within a limit, what is refused would be the lock's fault and not memory's.
    let unlimited = geteuid().is_root() || getrlimit(Resource::Memlock).current.is_none();
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE;
    let locked = unlimited && mlockall(all | MlockAllFlags::ONFAULT).is_ok();
    let mut stdout = io::stdout();
    writeln!(stdout, "{}", if locked { "locked" } else { "not locked" })?;
    stdout.flush()?;
    let mut random = Random(u64::from(parent));
    let mut held: Vec<Vec<u64>> = Vec::new();
    for line in io::stdin().lines() {
        let words = line?.trim().parse::<usize>().unwrap_or(0) * 128;
        let mut piece = Vec::new();
        let answer = match piece.try_reserve_exact(words) {
            // Random, so that it neither compresses nor is found to be the same as anything else.
            Ok(()) => {
                piece.extend((0..words).map(|_| random.next()));
                held.push(piece);
                "taken"
            }
            Err(_) => "refused",
        };
        writeln!(stdout, "{answer}")?;
        stdout.flush()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_judged_over_a_whole_window_and_blamed_on_what_was_taken_in_it() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut recent = Recent::new(2 * second);
        assert_eq!(recent.add(start, 500, 0), None);
        // However much is waited at once.
        assert_eq!(recent.add(start + second, 900_500, 16), None);
        assert_eq!(recent.add(start + 2 * second, 900_500, 32), Some((0, 45.0)));
        assert_eq!(recent.add(start + 3 * second, 900_500, 48), Some((16, 0.0)));
        // A long step reaches further back.
        assert_eq!(recent.add(start + 8 * second, 900_500 + 3_000_000, 64), Some((48, 60.0)));
    }
}
