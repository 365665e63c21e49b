//! From a unique bus name to its process. A pid from the bus may be somebody else's by the time it is used; a pidfd
//! cannot. So the pidfd is the bus's own where it gives one and we take any (not of a user's bus: `sys/users/guard.rs`);
//! else it is opened by pid and the bus is asked *afterwards* whether the connection is still there.

use std::{fs, os::fd::OwnedFd, sync::Arc};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use zbus::fdo::ConnectionCredentials;

use super::{
    polkit::Subject,
    sandbox::{self, Sandbox},
    unit,
    wire::{Failure, Pending, Response, Wire},
};
use crate::{model::AppKey, sys::inbox::Process};

/// What a process is wanted for.
#[derive(Clone)]
pub(super) enum Purpose {
    /// It owns the name of a watched app.
    Watch(AppKey),
    /// It called us.
    Caller,
    /// polkit is to be asked about this call of its.
    Check(u64),
}

/// Who a caller is.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) uid: u32,
    pub(super) pid: u32,
    pub(super) app_id: Option<Arc<str>>,
    pub(super) sandboxed: bool,
    pub(super) networked: bool,
}

/// Asks for the process of `owner`; ends with [`credentials`], [`user`], [`number`] or [`alive`].
pub(super) fn ask(wire: &mut Wire, owner: &Arc<str>, purpose: Purpose) {
    if wire.takes_fds {
        wire.ask_bus("GetConnectionCredentials", &&**owner, Pending::Credentials(Arc::clone(owner), purpose));
    } else {
        // Those have a pidfd among them.
        wire.ask_bus("GetConnectionUnixUser", &&**owner, Pending::User(Arc::clone(owner), purpose));
    }
}

/// The bus told the user of `owner`. `None` while it is asked for its process.
pub(super) fn user(
    wire: &mut Wire,
    owner: &Arc<str>,
    purpose: &Purpose,
    response: Response,
) -> Option<Result<Process, Arc<str>>> {
    match told(response) {
        Ok(uid) => {
            let pending = Pending::Number(Arc::clone(owner), purpose.clone(), uid);
            wire.ask_bus("GetConnectionUnixProcessID", &&**owner, pending);
            None
        }
        Err(reason) => Some(Err(reason)),
    }
}

/// The bus told the process id of `owner`. `None` while it is asked once more.
pub(super) fn number(
    wire: &mut Wire,
    owner: &Arc<str>,
    purpose: &Purpose,
    uid: u32,
    response: Response,
) -> Option<Result<Process, Arc<str>>> {
    match told(response) {
        Ok(pid) => open(wire, owner, purpose, uid, pid),
        Err(reason) => Some(Err(reason)),
    }
}

fn told(response: Response) -> Result<u32, Arc<str>> {
    let message = response.map_err(gone_or)?;
    message.body().deserialize::<u32>().map_err(|_| "the bus told its credentials in a form we do not know".into())
}

/// The bus told the credentials of `owner`. `None` while it is asked once more.
pub(super) fn credentials(
    wire: &mut Wire,
    owner: &Arc<str>,
    purpose: &Purpose,
    response: Response,
) -> Option<Result<Process, Arc<str>>> {
    let message = match response {
        Ok(message) => message,
        Err(failure) => return Some(Err(gone_or(failure))),
    };
    let Ok(known) = message.body().deserialize::<ConnectionCredentials>() else {
        return Some(Err("the bus told its credentials in a form we do not know".into()));
    };
    let (Some(uid), Some(pid)) = (known.unix_user_id(), known.process_id()) else {
        return Some(Err("the bus does not know its process".into()));
    };
    if let Some(pidfd) = known.into_process_fd() {
        let pidfd = OwnedFd::from(pidfd);
        // The bus may live in another pid namespace; the number that counts is ours.
        let own = sandbox::fdinfo(&pidfd, "Pid:").and_then(|pid| pid.parse::<u32>().ok());
        return Some(own.map(|pid| Process { pid, uid, pidfd }).ok_or_else(|| "its process ended".into()));
    }
    open(wire, owner, purpose, uid, pid)
}

/// Opens a process the bus knows by its number alone, and has the bus asked whether it was the right one.
fn open(wire: &mut Wire, owner: &Arc<str>, purpose: &Purpose, uid: u32, pid: u32) -> Option<Result<Process, Arc<str>>> {
    let opened = i32::try_from(pid).ok().and_then(Pid::from_raw).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    match opened {
        Some(Ok(pidfd)) => {
            let process = Process { pid, uid, pidfd };
            let pending = Pending::Alive(Arc::clone(owner), purpose.clone(), process);
            wire.ask_bus("NameHasOwner", &&**owner, pending);
            None
        }
        Some(Err(rustix::io::Errno::SRCH)) => Some(Err("its process ended".into())),
        Some(Err(error)) => Some(Err(format!("cannot open its process {pid}: {error}").into())),
        None => Some(Err(format!("{pid} is no process id").into())),
    }
}

/// The bus told whether the connection outlived the opening of its process.
pub(super) fn alive(process: Process, response: Response) -> Result<Process, Arc<str>> {
    match response {
        Ok(message) if message.body().deserialize::<bool>().unwrap_or(false) => Ok(process),
        Ok(_) => Err("its process ended".into()),
        Err(failure) => Err(gone_or(failure)),
    }
}

/// Everything the kernel says about a caller.
pub(super) fn identify(process: &Process) -> Result<Identity, Arc<str>> {
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
    let placement = unit::placement(&cgroup);
    let (app_id, sandboxed) = match sandbox::look(process.pid) {
        Sandbox::Flatpak(app) => (Some(app), true),
        Sandbox::Other => (placement.app_id, true),
        Sandbox::None => (placement.app_id, placement.sandbox),
    };
    let network = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let own = network("self");
    let networked = own.is_some() && own == network(&process.pid.to_string());
    // All of it was read by pid: it holds only if the process behind the pidfd still has that pid.
    if has_ended(process) {
        return Err("its process ended".into());
    }
    Ok(Identity { uid: process.uid, pid: process.pid, app_id: app_id.map(Into::into), sandboxed, networked })
}

/// A process on the session bus of user `uid`, for polkit. That bus is the user's to fake: of nobody else's process it
/// can make polkit believe that it asks for something.
pub(super) fn subject(process: Process, uid: u32) -> Result<Subject, Arc<str>> {
    let Process { pid, pidfd, .. } = &process;
    let read = |file| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let (stat, status) = (read("stat"), read("status"));
    // All of it was read by pid: it holds only if the process behind the pidfd still has that pid.
    if sandbox::fdinfo(pidfd, "Pid:").as_deref() != Some(&*pid.to_string()) || has_ended(&process) {
        return Err("its process ended".into());
    }
    let Some(start_time) = start_time(&stat) else {
        return Err("its process cannot be looked at".into());
    };
    if !has_only_uid(&status, uid) {
        return Err(format!("its process is not only user {uid}'s").into());
    }
    Ok(Subject::Process { pid: process.pid, start_time, uid, pidfd: process.pidfd })
}

/// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)). The second, a name in parentheses, may hold anything.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// Whether the real, effective, saved and file system uid in `/proc/PID/status` are all this one.
fn has_only_uid(status: &str, uid: u32) -> bool {
    let mut ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default().split_whitespace();
    ids.clone().count() == 4 && ids.all(|id| id.parse() == Ok(uid))
}

fn has_ended(process: &Process) -> bool {
    let mut fds = [PollFd::new(&process.pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_or(true, |ready| ready > 0)
}

fn gone_or(failure: Failure) -> Arc<str> {
    if failure.name == "org.freedesktop.DBus.Error.NameHasNoOwner" {
        return "its process ended".into();
    }
    format!("the bus does not tell its credentials: {failure}").into()
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        os::fd::AsFd,
        process::{Command, Stdio},
    };

    use zbus::{Fd, Message, Variant};

    use super::*;
    use crate::{model::Bus, sys::inbox};

    /// What `credentials` makes of the bus's answer, and whether it asks on.
    fn from_bus(answer: &HashMap<&str, Variant<'_>>) -> (Option<Result<Process, Arc<str>>>, usize) {
        let poll = mio::Poll::new().unwrap();
        let (sender, _inbox) = inbox::channel(poll.registry(), mio::Token(0)).unwrap();
        let mut wire = Wire::new(Bus::System, sender, true);
        let call = Message::method_call("/", "X").build(&()).unwrap();
        let reply = Message::method_return(&call.header()).build(answer).unwrap();
        let result = credentials(&mut wire, &":1.5".into(), &Purpose::Caller, Ok(reply));
        (result, wire.drain().len())
    }

    #[test]
    fn the_bus_own_pidfd_is_taken_where_it_gives_one() {
        let own = std::process::id();
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        // The number is another's: only the pidfd counts.
        let mut answer: HashMap<&str, Variant<'_>> = HashMap::from([
            ("UnixUserID", 7_u32.into()),
            ("ProcessID", own.into()),
            ("Future", vec![1_u8].into()),
            ("ProcessFD", Fd::from(pidfd.as_fd()).into()),
        ]);
        let (process, asked) = from_bus(&answer);
        let process = process.unwrap().unwrap();
        assert_eq!((process.pid, process.uid, asked), (child.id(), 7, 0));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(from_bus(&answer).0.unwrap().unwrap_err(), "its process ended".into());
        answer.remove("ProcessFD");
        let (waiting, asked) = from_bus(&answer);
        assert!(waiting.is_none() && asked == 1, "without a pidfd the bus must be asked again");
        answer.remove("ProcessID");
        assert!(from_bus(&answer).0.unwrap().is_err());
        answer.insert("ProcessID", u32::MAX.into());
        assert!(from_bus(&answer).0.unwrap().is_err());
        answer.insert("ProcessID", "1".into());
        assert!(from_bus(&answer).0.unwrap().is_err());
    }

    #[test]
    fn a_subject_is_the_users_own_living_process() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pidfd = || pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let process = |pidfd| Process { pid: child.id(), uid: 7, pidfd };
        let (own, kept) = (rustix::process::geteuid().as_raw(), pidfd());
        let Subject::Process { pid, start_time, uid, .. } = subject(process(pidfd()), own).unwrap() else {
            panic!("not a process")
        };
        assert_eq!((pid, uid), (child.id(), own));
        let mine = super::start_time(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        assert!(start_time >= mine && start_time < mine + 360_000, "{start_time} and {mine}");
        assert!(subject(process(pidfd()), own + 1).is_err());
        // The pid is another's.
        assert!(subject(Process { pid: std::process::id(), uid: own, pidfd: pidfd() }, own).is_err());
        let id = child.id();
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(subject(Process { pid: id, uid: own, pidfd: kept }, own).is_err());
    }

    #[test]
    fn what_the_kernel_says_of_a_process() {
        let stat = "7 (a) Z 1 (b) S 1 7 7 0 -1 4194304 103 0 0 0 0 0 0 0 20 0 1 0 160231 5 6";
        assert_eq!(start_time(stat), Some(160_231));
        assert_eq!(start_time("7 (a) S 1 7"), None);
        assert_eq!(start_time(""), None);
        assert!(has_only_uid("Name:\tUid:\nUid:\t5\t5\t5\t5\n", 5));
        for status in ["Uid:\t5\t0\t5\t5\n", "Uid:\t0\t5\t5\t5\n", "Uid:\t5\n", "Uid:\n", "Gid:\t5\t5\t5\t5\n", ""] {
            assert!(!has_only_uid(status, 5), "{status}");
        }
    }

    #[test]
    fn without_file_descriptors_user_and_process_are_asked_for() {
        let poll = mio::Poll::new().unwrap();
        let (sender, _inbox) = inbox::channel(poll.registry(), mio::Token(0)).unwrap();
        let mut wire = Wire::new(Bus::Session(7), sender, false);
        let (owner, purpose): (Arc<str>, _) = (":1.5".into(), Purpose::Caller);
        let members = |wire: &mut Wire| -> Vec<String> {
            wire.drain().iter().map(|call| call.header().member().unwrap().to_string()).collect()
        };
        let reply = |number: u32| {
            let call = Message::method_call("/", "X").build(&()).unwrap();
            Ok(Message::method_return(&call.header()).build(&number).unwrap())
        };
        ask(&mut wire, &owner, purpose.clone());
        assert_eq!(members(&mut wire), ["GetConnectionUnixUser"]);
        assert!(user(&mut wire, &owner, &purpose, reply(7)).is_none());
        assert_eq!(members(&mut wire), ["GetConnectionUnixProcessID"]);
        assert!(number(&mut wire, &owner, &purpose, 7, reply(std::process::id())).is_none());
        assert_eq!(members(&mut wire), ["NameHasOwner"]);
        assert!(number(&mut wire, &owner, &purpose, 7, reply(u32::MAX)).unwrap().is_err());
        let failure = Failure { name: "org.x.Error".into(), text: String::new(), by_bus: true };
        assert!(user(&mut wire, &owner, &purpose, Err(failure)).unwrap().is_err());
    }

    #[test]
    fn a_process_that_ended_is_noticed() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let process = Process { pid: child.id(), uid: 0, pidfd: pidfd_open(pid, PidfdFlags::empty()).unwrap() };
        assert!(!identify(&process).unwrap().sandboxed);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(identify(&process).is_err());
    }
}
