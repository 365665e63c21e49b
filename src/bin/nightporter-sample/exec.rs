//! `nightporter-sample --exec CMD ARGS…`: a real program that knows nothing of the contract, with this process as the part
//! of it that is reachable. It runs below this process and in its cgroup, ends with it, and ends it.

use std::{
    collections::HashMap,
    env,
    ffi::OsString,
    fs, io,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, Stdio, exit},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use nix::unistd::{SysconfVar, sysconf};
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};
use signal_hook::{
    consts::{SIGCHLD, SIGTERM},
    iterator::Signals,
};

use crate::Result;

const EXEC: &str = "--exec";
/// Our own, between fork and the real program.
const CHILD: &str = "--exec-below";
/// How long it may do things at its start before it counts as started, in seconds.
const IDLE_WITHIN: &str = "NIGHTPORTER_SAMPLE_IDLE_WITHIN";
const DEFAULT_IDLE_WITHIN: Duration = Duration::from_secs(60);
/// Idle is less than this much of one CPU, over this long.
const IDLE_PERCENT: u64 = 5;
const IDLE_WINDOW: Duration = Duration::from_secs(2);
/// From SIGTERM to SIGKILL: less than the daemon waits before it ends both.
const GRACE: Duration = Duration::from_secs(4);

/// What the command line asks for.
pub(crate) enum Role {
    /// An app that is nothing but this.
    Alone,
    /// An app with this program as its main part.
    With(Vec<OsString>),
}

impl Role {
    /// From the command line. Does not return in a process that is to become the program.
    pub(crate) fn from_args() -> Result<Self> {
        let mut args = env::args_os().skip(1);
        match args.next() {
            None => Ok(Self::Alone),
            Some(word) if word == CHILD => Err(become_program(args.collect()).into()),
            Some(word) if word == EXEC => match args.collect::<Vec<_>>() {
                command if command.is_empty() => Err("--exec needs a program to run".into()),
                command => Ok(Self::With(command)),
            },
            Some(other) => Err(format!("{} is not an argument known here: --exec CMD ARGS…", other.display()).into()),
        }
    }
}

/// A program that runs.
pub(crate) struct Program {
    pid: u32,
    idle_within: Duration,
}

impl Program {
    /// Starts it. From here on SIGTERM ends it first, and its end is the end of this process, with its status.
    pub(crate) fn start(command: &[OsString]) -> Result<Self> {
        let idle_within = match env::var(IDLE_WITHIN) {
            Ok(seconds) => {
                Duration::from_secs(seconds.parse().map_err(|_| format!("{IDLE_WITHIN}={seconds} is not a number"))?)
            }
            Err(_) => DEFAULT_IDLE_WITHIN,
        };
        let signals = Signals::new([SIGTERM, SIGCHLD])?;
        // Threads may end before the process does, and with the one that forked would go the program.
        let child = Command::new(env::current_exe()?)
            .arg(CHILD)
            .arg(std::process::id().to_string())
            .args(command)
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", command[0].display()))?;
        let pid = child.id();
        let (sender, receiver) = channel();
        thread::Builder::new().name("signals".into()).spawn(move || listen(signals, &sender))?;
        thread::Builder::new().name("program".into()).spawn(move || guard(child, &receiver))?;
        Ok(Self { pid, idle_within })
    }

    /// Waits until it has started: until it and all below it do next to nothing.
    pub(crate) fn wait_until_idle(&self) {
        let deadline = Instant::now() + self.idle_within;
        let per_second = ticks_per_second();
        let mut before = ticks_below(self.pid);
        while Instant::now() < deadline {
            let from = Instant::now();
            thread::sleep(IDLE_WINDOW.min(deadline.saturating_duration_since(from)));
            let now = ticks_below(self.pid);
            let window = u64::try_from(from.elapsed().as_millis()).unwrap_or(u64::MAX);
            if now.saturating_sub(before) * 1000 * 100 <= per_second * window * IDLE_PERCENT {
                return;
            }
            before = now;
        }
    }
}

/// Becomes the program, which is then not to outlive its parent. Gives back why it could not.
fn become_program(mut words: Vec<OsString>) -> String {
    let parent = (!words.is_empty()).then(|| words.remove(0));
    let (Some(parent), Some(program)) = (parent, words.first()) else { return format!("{CHILD} is internal") };
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return format!("cannot be tied to its parent: {error}");
    }
    // It may have ended before it was asked for.
    if getppid().is_none_or(|now| now.as_raw_nonzero().to_string() != *parent.to_string_lossy()) {
        return "its parent has ended".into();
    }
    format!("cannot run {}: {}", program.display(), Command::new(program).args(&words[1..]).exec())
}

fn listen(mut signals: Signals, sender: &Sender<i32>) {
    for signal in &mut signals {
        if sender.send(signal).is_err() {
            return;
        }
    }
}

/// Waits for its end, which ends this process.
fn guard(mut child: Child, signals: &Receiver<i32>) {
    let mut kill_at: Option<Instant> = None;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            let code = match kill_at {
                Some(_) => 0,
                None => status.code().unwrap_or(128 + status.signal().unwrap_or(0)),
            };
            exit(code);
        }
        let patience = kill_at.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        match signals.recv_timeout(patience) {
            Ok(SIGTERM) => {
                // Not waited for yet, so that the number is still its own.
                let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
                let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
                kill_at.get_or_insert(Instant::now() + GRACE);
            }
            Err(RecvTimeoutError::Timeout) if kill_at.is_some() => {
                let _ = child.kill();
            }
            Err(RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(100)),
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

fn ticks_per_second() -> u64 {
    let told = sysconf(SysconfVar::CLK_TCK).ok().flatten();
    // What Linux has told programs on every machine of this century.
    told.and_then(|told| u64::try_from(told).ok()).filter(|told| *told > 0).unwrap_or(100)
}

/// CPU time of a process and all below it, in clock ticks.
fn ticks_below(root: u32) -> u64 {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    let mut ticks: HashMap<u32, u64> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let stat: io::Result<String> = fs::read_to_string(entry.path().join("stat"));
        if let Some((parent, used)) = stat.ok().as_deref().and_then(parse_stat) {
            children.entry(parent).or_default().push(pid);
            ticks.insert(pid, used);
        }
    }
    let mut sum = 0;
    let mut left = vec![root];
    while let Some(pid) = left.pop() {
        sum += ticks.get(&pid).copied().unwrap_or(0);
        left.extend(children.remove(&pid).unwrap_or_default());
    }
    sum
}

/// proc_pid_stat(5): the parent, and the CPU time of it and of children it has waited for. The name may hold anything.
fn parse_stat(text: &str) -> Option<(u32, u64)> {
    let fields: Vec<&str> = text.rsplit_once(") ")?.1.split_ascii_whitespace().collect();
    let used = fields.get(11..15)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    Some((fields.get(1)?.parse().ok()?, used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_process_is_its_own_and_that_of_the_children_it_waited_for() {
        let stat = "42 (a ) b) S 7 42 42 0 -1 4194560 100 0 0 0 10 20 3 4 20 0 1 0 9876 1000 50 184467";
        assert_eq!(parse_stat(stat), Some((7, 37)));
        assert_eq!(parse_stat("42 (x) S"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn time_below_is_counted() {
        let mut child = Command::new("sh").args(["-c", "while :; do :; done & wait"]).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while ticks_below(child.id()) < 5 {
            assert!(Instant::now() < deadline, "a busy grandchild was not seen");
            thread::sleep(Duration::from_millis(20));
        }
        // The loop goes with the shell's group, not with the shell; so it is ended by its own number.
        let below = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
        for pid in below.split_whitespace() {
            kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), Signal::KILL).unwrap();
        }
        child.wait().unwrap();
    }
}
