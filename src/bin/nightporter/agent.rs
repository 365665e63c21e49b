//! Somebody who asks for the password: polkit's agent for terminals, as long as a question may come.

use std::{
    io::{self, IsTerminal},
    os::fd::AsFd,
    process::{Child, Command, Stdio},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// For the agent to be ready. Without it the question is answered by no at once.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// `pkttyagent` for this process; it ends with this. None where there is no terminal to ask at, and none for root.
#[derive(Debug)]
pub(crate) struct Agent(Option<Child>);

impl Agent {
    pub(crate) fn start() -> Self {
        let needed = io::stdin().is_terminal() && !rustix::process::geteuid().is_root();
        Self(needed.then(register).and_then(Result::ok))
    }
}

/// Without `--process` it is for its parent, this process; with `--fallback` a desktop's own agent goes first.
fn register() -> io::Result<Child> {
    let (ready, writer) = io::pipe()?;
    // It closes the descriptor when it is registered, and talks to the terminal itself.
    let child = Command::new("pkttyagent")
        .args(["--notify-fd", "1", "--fallback"])
        .stdout(writer)
        .stderr(Stdio::null())
        .spawn()?;
    let mut fds = [PollFd::from_borrowed_fd(ready.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&PATIENCE))?;
    Ok(child)
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.0 {
            // It has a terminal's echo to put back if it is asking.
            let asked =
                rustix::process::kill_process(rustix::process::Pid::from_child(agent), rustix::process::Signal::TERM);
            if asked.is_ok() {
                let _ = agent.wait();
            }
        }
    }
}
