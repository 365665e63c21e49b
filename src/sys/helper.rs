//! Payload helpers: short-lived programs that make something of a message while its app is held still or does not run.
//!
//! A helper is named by the configuration alone and runs with the user's rights, never root's: new privileges excluded, in a
//! session, a process group and (where this daemon's cgroup is delegated to it) a cgroup of its own, all of which end with it.
//! It has `TIME` and `MEMORY`, prints at most `OUTPUT` bytes, and reaches the network only if it may.
//!
//! - `confine`: what is done between fork and exec.
//! - `group`: the cgroup.

mod confine;
mod group;

use std::{
    io::{self, Read, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, geteuid, kill_process_group, pidfd_open},
};

use self::{
    confine::{Confinement, Identity},
    group::Group,
};
use super::{clock, inbox::Sender, jobs::Jobs};
use crate::{
    event::Event,
    model::Bus,
    notification::{HelperAnswer, HelperJob},
    time::Instant,
};

/// From its start to its end.
const TIME: Duration = Duration::from_secs(5);
/// Bytes of memory: of its cgroup where there is a memory controller, of each process (`RLIMIT_DATA`) anyway.
const MEMORY: u64 = 64 * 1024 * 1024;
/// Bytes it may print.
const OUTPUT: usize = 64 * 1024;

/// Has the helper of `job` run on one of `jobs`' threads, to end with `Event::Helped`. That event at once when it cannot be.
pub fn help(jobs: &Jobs, sender: &Sender, job: HelperJob) -> Option<Event> {
    let (seq, sender) = (job.seq, sender.clone());
    let queued = jobs.run(move || {
        let answer = run(&job).inspect_err(|text| log::info!("{}: its payload helper: {text}", job.app));
        let _ = sender.event(Event::Helped(seq, answer.map_err(Into::into)));
    });
    (!queued).then(|| Event::Helped(seq, Err("there is no thread for it".into())))
}

/// Runs the helper of one message. Blocks for `TIME`, and for as long as the kernel takes to end what is killed.
///
/// # Errors
/// As a sentence part: it could not be started, broke a limit, failed, or printed no answer.
pub fn run(job: &HelperJob) -> Result<HelperAnswer, String> {
    let deadline = clock::boot() + TIME;
    let Bus::Session(uid) = job.app.bus else { return Err("only apps of users have helpers".into()) };
    let user = identity(uid)?;
    let (program, arguments) = job.command.split_first().ok_or("it is not configured")?;
    let group = Group::make(MEMORY);
    let confinement = Confinement::new(user.switch, group.as_ref().map(Group::entrance), MEMORY, TIME, job.network)?;
    let mut command = Command::new(&**program);
    command.args(arguments.iter().map(|word| &**word)).env_clear().current_dir("/");
    command.env("PATH", "/usr/local/bin:/usr/bin:/bin").env("HOME", user.home).env("LANG", "C.UTF-8");
    command.env("NIGHTPORTER_APP", &*job.app.service).env("NIGHTPORTER_TOKEN", &*job.token);
    command.env("NIGHTPORTER_MESSAGE_ID", &*job.id).env("NIGHTPORTER_URGENCY", job.urgency.as_str());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    #[expect(unsafe_code, reason = "std has no safe way to do something between fork and exec")]
    // SAFETY: `Confinement::enter` makes system calls and nothing else: it takes no lock and allocates nothing.
    unsafe {
        command.pre_exec(move || confinement.enter());
    }
    let child = command.spawn().map_err(|error| format!("{program} cannot be started: {error}"))?;
    Running { child, _group: group }.finish(&job.body, deadline)
}

/// Whose rights it has.
struct User {
    /// What to become, if that is not what we are.
    switch: Option<Identity>,
    home: PathBuf,
}

fn identity(uid: u32) -> Result<User, String> {
    let own = geteuid().as_raw();
    if uid == 0 || (own != 0 && own != uid) {
        return Err(format!("it may not run as user {uid}"));
    }
    // The password database may be asked over the network; this thread may wait for it.
    match nix::unistd::User::from_uid(uid.into()) {
        Ok(Some(user)) => {
            Ok(User { switch: (own != uid).then(|| Identity { uid, gid: user.gid.as_raw() }), home: user.dir })
        }
        Ok(None) => Err(format!("user {uid} is not in the user database")),
        Err(error) => Err(format!("the user database says nothing of user {uid}: {error}")),
    }
}

/// A helper that runs: ended, with all its children, when this is dropped.
struct Running {
    child: Child,
    _group: Option<Group>,
}

impl Running {
    fn finish(mut self, payload: &[u8], deadline: Instant) -> Result<HelperAnswer, String> {
        let system = |error: io::Error| format!("it cannot be followed: {error}");
        if let Some(mut input) = self.child.stdin.take() {
            // A pipe takes that much at once. One that does not want to read it has to say so by its answer.
            let _ = input.write_all(payload);
        }
        let mut stdout = self.child.stdout.take().ok_or("it has no output")?;
        let (output, ended) = self.follow(&mut stdout, deadline).map_err(system)?;
        if output.len() > OUTPUT {
            return Err(format!("it printed more than {OUTPUT} bytes"));
        }
        match ended {
            None => Err(format!("it was not done within {} s", TIME.as_secs())),
            Some(status) if status.success() => HelperAnswer::parse(&output),
            Some(status) => Err(format!("it failed: {status}")),
        }
    }

    /// Takes in what it prints until it ends, prints too much or time is up; `None` for the latter two.
    fn follow(&mut self, stdout: &mut ChildStdout, deadline: Instant) -> io::Result<(Vec<u8>, Option<ExitStatus>)> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        fcntl_setfl(&*stdout, fcntl_getfl(&*stdout)? | OFlags::NONBLOCK)?;
        let (mut output, mut open) = (Vec::new(), true);
        loop {
            let left = deadline.since(clock::boot());
            if left.is_zero() {
                return Ok((output, None));
            }
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = vec![PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
            if open {
                fds.push(PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::IN));
            }
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ended = fds.first().is_some_and(|fd| !fd.revents().is_empty());
            drop(fds);
            // What it printed right before its end is there by now. Its children have nothing to add.
            open &= read_on(stdout, &mut output)?;
            if output.len() > OUTPUT {
                return Ok((output, None));
            }
            if ended {
                // Before it is reaped: until then its number is nobody else's.
                let _ = kill_process_group(pid, Signal::KILL);
                return Ok((output, Some(self.child.wait()?)));
            }
        }
    }
}

/// Reads what is there, one byte beyond the limit at most. False at the end.
fn read_on(stdout: &mut ChildStdout, output: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    while output.len() <= OUTPUT {
        match stdout.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(count) => output.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

impl Drop for Running {
    fn drop(&mut self) {
        // Not reaped yet, if it has not ended in order: its number is its own.
        if matches!(self.child.try_wait(), Ok(None)) {
            if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
                let _ = kill_process_group(pid, Signal::KILL);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Says once what is missing on this machine.
fn say_once(said: &AtomicBool, text: &str) {
    if !said.swap(true, Ordering::Relaxed) {
        log::info!("payload helpers: {text}");
    }
}
