//! `/proc/PID`: parsers, and readers that cannot be fooled by a pid used again.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use rustix::{
    fs::{Mode, OFlags, openat, readlinkat},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

/// Processes of one app at most; an app with more is left alone.
pub(super) const MAX_MEMBERS: usize = 4096;
/// `PF_KTHREAD` of the kernel's `include/linux/sched.h`.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// `PF_EXITING`, likewise.
const EXITING: u64 = 0x4;
/// Most bytes taken from one file below `/proc/PID`.
const MAX_FILE: u64 = 8 * 1024 * 1024;

/// What is used of `/proc/PID/stat` (proc_pid_stat(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) pid: u32,
    /// At most 15 bytes, chosen by the process itself: may hold anything.
    pub(super) comm: String,
    pub(super) state: char,
    pub(super) parent: u32,
    pub(super) session: u32,
    /// Zero without a controlling terminal.
    pub(super) terminal: i64,
    pub(super) flags: u64,
    /// Of its own and of its children that it has waited for.
    pub(super) major_faults: u64,
    /// Processor time of its children that it has waited for, in clock ticks.
    pub(super) waited: u64,
    pub(super) threads: u64,
    /// Clock ticks between boot and the start of the process.
    pub(super) start: u64,
}

impl Stat {
    /// `None` for anything that is not a whole stat line.
    pub(super) fn parse(text: &str) -> Option<Self> {
        // The name may itself contain ") Z 1 (": the last parenthesis is the true one.
        let open = text.find('(')?;
        let close = text.rfind(')')?;
        let pid = text.get(..open)?.trim().parse().ok()?;
        let comm = text.get(open + 1..close)?.to_owned();
        let fields: Vec<&str> = text.get(close + 1..)?.split_ascii_whitespace().collect();
        // Numbered from 1 in proc(5), and the first two are behind us.
        let field = |number: usize| fields.get(number - 3).copied();
        let mut state = field(3)?.chars();
        let (Some(state), None) = (state.next(), state.next()) else { return None };
        let sum = |a: &str, b: &str| a.parse::<u64>().ok()?.checked_add(b.parse().ok()?);
        Some(Self {
            pid,
            comm,
            state,
            parent: field(4)?.parse().ok()?,
            session: field(6)?.parse().ok()?,
            terminal: field(7)?.parse().ok()?,
            flags: field(9)?.parse().ok()?,
            major_faults: sum(field(12)?, field(13)?)?,
            waited: sum(field(16)?, field(17)?)?,
            threads: field(20)?.parse().ok()?,
            start: field(22)?.parse().ok()?,
        })
    }

    pub(super) fn is_kernel_thread(&self) -> bool {
        self.flags & KERNEL_THREAD != 0
    }

    /// By SIGSTOP and its like, or by a debugger.
    pub(super) fn is_stopped(&self) -> bool {
        matches!(self.state, 'T' | 't')
    }

    /// Ended or ending for good. A process whose first thread has ended looks like that while the others run.
    pub(super) fn is_dead(&self) -> bool {
        (matches!(self.state, 'Z' | 'X' | 'x') || self.flags & EXITING != 0) && self.threads <= 1
    }
}

/// `/proc/PID` held open: after the process has ended every read fails, whoever has its pid then.
#[derive(Debug)]
pub(super) struct ProcDir {
    fd: OwnedFd,
}

impl ProcDir {
    /// The directory of the process that has `pid` now.
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { fd: rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty())? })
    }

    /// A file below the directory as text, 8 MiB of it at most.
    pub(super) fn read(&self, name: &str) -> io::Result<String> {
        let fd = openat(&self.fd, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        read_text(File::from(fd))
    }

    /// What a link below the directory says.
    pub(super) fn link(&self, name: &str) -> io::Result<CString> {
        Ok(readlinkat(&self.fd, name, Vec::new())?)
    }

    /// Never faults a page of the process in: the kernel makes it from its own records.
    pub(super) fn stat(&self) -> io::Result<Stat> {
        Stat::parse(&self.read("stat")?).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    /// Where its executable is, if we may know.
    pub(super) fn exe(&self) -> Option<PathBuf> {
        let path = readlinkat(&self.fd, "exe", Vec::new()).ok()?;
        Some(PathBuf::from(path.into_string().ok()?))
    }

    /// A directory below it.
    pub(super) fn open_dir(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(openat(&self.fd, name, flags, Mode::empty())?)
    }

    /// A file below the directory, to be read and written.
    pub(super) fn open_writable(&self, name: &str) -> io::Result<File> {
        Ok(File::from(openat(&self.fd, name, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// All its threads.
    pub(super) fn threads(&self, pid: u32) -> io::Result<Vec<Stat>> {
        let tasks = pids_in(&self.open_dir("task")?)?;
        if tasks == [pid] {
            return Ok(vec![self.stat()?]);
        }
        Ok(tasks.into_iter().filter_map(|task| Stat::parse(&self.read(&format!("task/{task}/stat")).ok()?)).collect())
    }
}

impl AsFd for ProcDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One process of an app by pid and start time: what is done to it reaches it or nobody. Its pidfd is opened for each
/// act; an app of a thousand processes costs no thousand file descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Member {
    pub(super) pid: u32,
    pub(super) start: u64,
}

impl Member {
    pub(super) fn of(stat: &Stat) -> Self {
        Self { pid: stat.pid, start: stat.start }
    }

    /// Its pidfd; an error when it is gone.
    pub(super) fn pidfd(self) -> io::Result<OwnedFd> {
        let pidfd = open_pidfd(self.pid)?;
        // The start time is read after the pidfd is open: if it is the one meant, so is the process behind the pidfd,
        // for a pid is not given away while the process that had it at `start` lives.
        self.dir()?;
        Ok(pidfd)
    }

    pub(super) fn signal(self, signal: Signal) -> io::Result<()> {
        Ok(pidfd_send_signal(self.pidfd()?.as_fd(), signal)?)
    }

    pub(super) fn dir(self) -> io::Result<ProcDir> {
        let dir = ProcDir::open(self.pid)?;
        if dir.stat()?.start == self.start { Ok(dir) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Whether it is stopped; `None` when it has ended.
    pub(super) fn is_stopped(self) -> Option<bool> {
        let dir = self.dir().ok()?;
        let threads = dir.threads(self.pid).ok()?;
        // All are asked: the first may have ended, and those behind it stop a little later.
        let mut live = threads.iter().filter(|thread| !matches!(thread.state, 'Z' | 'X')).peekable();
        live.peek()?;
        Some(live.all(Stat::is_stopped))
    }
}

/// Whether the error says that the process or cgroup is not there any more.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENODEV))
}

/// pidfd_open(2).
pub(super) fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Every process there is now. (sysinfo would keep a record and an open file for each, and knows start times in whole
/// seconds only; here identity needs clock ticks.)
#[derive(Debug, Default)]
pub(super) struct Processes {
    by_pid: HashMap<u32, Stat>,
    children: HashMap<u32, Vec<u32>>,
}

impl Processes {
    pub(super) fn now() -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::open("/proc", flags, Mode::empty())?;
        let stats = pids_in(&proc)?.into_iter().filter_map(|pid| {
            let fd = openat(&proc, format!("{pid}/stat"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
            Stat::parse(&read_text(File::from(fd)).ok()?)
        });
        Ok(Self::from_stats(stats))
    }

    fn from_stats(stats: impl Iterator<Item = Stat>) -> Self {
        let mut all = Self::default();
        for stat in stats {
            all.children.entry(stat.parent).or_default().push(stat.pid);
            all.by_pid.insert(stat.pid, stat);
        }
        all
    }

    pub(super) fn find(&self, pid: u32) -> Option<&Stat> {
        self.by_pid.get(&pid)
    }

    /// `root` and its descendants, parents before their children; `None` when they are too many.
    pub(super) fn tree(&self, root: u32) -> Option<Vec<&Stat>> {
        let mut tree: Vec<&Stat> = self.by_pid.get(&root).into_iter().collect();
        let mut next = 0;
        while let Some(stat) = tree.get(next) {
            next += 1;
            let children = self.children.get(&stat.pid).into_iter().flatten();
            tree.extend(children.filter(|pid| **pid != root).filter_map(|pid| self.by_pid.get(pid)));
            if tree.len() > MAX_MEMBERS {
                return None;
            }
        }
        Some(tree)
    }

    pub(super) fn has_children(&self, pid: u32) -> bool {
        self.children.get(&pid).is_some_and(|children| !children.is_empty())
    }

    /// `pid`, its parent, and so on up to the first process.
    pub(super) fn ancestors(&self, pid: u32) -> Vec<u32> {
        let mut line = vec![pid];
        // A snapshot is not atomic: it could show a loop, which the bound ends.
        while let Some(stat) = line.last().and_then(|pid| self.by_pid.get(pid))
            && stat.parent != 0
            && line.len() < MAX_MEMBERS
        {
            line.push(stat.parent);
        }
        line
    }
}

/// The uids of `/proc/PID/status`: real, effective, saved, file system.
pub(super) fn parse_uids(status: &str) -> Option<Vec<u32>> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let uids: Vec<u32> = line.split_ascii_whitespace().map_while(|uid| uid.parse().ok()).collect();
    (uids.len() == 4).then_some(uids)
}

/// The thread that traces the process of this `/proc/PID/status`, if one does.
pub(super) fn parse_tracer(status: &str) -> Option<u32> {
    parse_number(status, "TracerPid:")
}

/// The process this `/proc/TID/status` is of a thread of.
pub(super) fn parse_process(status: &str) -> Option<u32> {
    parse_number(status, "Tgid:")
}

fn parse_number(status: &str, key: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().parse().ok().filter(|number| *number != 0)
}

/// The cgroup v2 path of `/proc/PID/cgroup`; `None` when there is none or it lies outside our namespace.
pub(super) fn parse_cgroup(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let good = path.starts_with('/') && !path.ends_with(" (deleted)") && path.split('/').all(|part| part != "..");
    good.then_some(path)
}

/// A file as text, bounded; what is not UTF-8 is replaced.
pub(super) fn read_text(file: File) -> io::Result<String> {
    // Room for all of a stat file: from nothing it would be read in five pieces, and there are hundreds to read.
    let mut bytes = Vec::with_capacity(1024);
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
}

/// The kernel's name for this boot: a pid says nothing across one.
pub(super) fn boot_id() -> Option<String> {
    Some(fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}

fn pids_in(dir: &OwnedFd) -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        if let Ok(name) = entry?.file_name().to_str()
            && let Ok(pid) = name.parse()
        {
            pids.push(pid);
        }
    }
    Ok(pids)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAIL: &str = "1 7 7 34816 7 4194304 1 0 5 6 1 2 3 4 20 0 3 0 160231 5681152 322 18446744073709551615";

    #[test]
    fn a_stat_line_is_read() {
        let stat = Stat::parse(&format!("7 (sh) S {TAIL}\n")).unwrap();
        assert_eq!((stat.pid, stat.comm.as_str(), stat.state, stat.parent), (7, "sh", 'S', 1));
        assert_eq!((stat.session, stat.terminal, stat.start), (7, 34816, 160_231));
        assert_eq!((stat.major_faults, stat.waited), (11, 7));
        assert!(!stat.is_kernel_thread() && !stat.is_dead());
        let first_thread_ended = Stat { state: 'Z', ..stat.clone() };
        assert!(!first_thread_ended.is_dead());
        assert!(Stat { threads: 1, ..first_thread_ended }.is_dead());
        assert!(Stat { threads: 1, flags: 0x40_0004, ..stat }.is_dead());
    }

    #[test]
    fn a_hostile_name_fools_nobody() {
        for comm in [") Z 1 (", "a) b", "(((", ")))", "x\n9 (y) R 2", ") T 0 0 0", ""] {
            let stat = Stat::parse(&format!("7 ({comm}) S {TAIL}")).unwrap();
            assert_eq!((stat.pid, stat.comm.as_str(), stat.state, stat.parent), (7, comm, 'S', 1), "{comm:?}");
        }
    }

    #[test]
    fn half_a_stat_line_is_none() {
        let whole = format!("7 (sh) S {TAIL}");
        let start_time = whole.find("160231").unwrap();
        for end in 0..=start_time {
            assert_eq!(Stat::parse(&whole[..end]), None, "{end}");
        }
        for text in ["", "\0", ")(", "7 (sh", "7 sh) S 1", "x (sh) S 1 1", "7 (sh) SS 1 7 7 0 7 0"] {
            assert_eq!(Stat::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_tree_has_parents_first_and_nothing_else() {
        let stat = |pid: u32, parent: u32| {
            Stat::parse(&format!("{pid} (x) S {}", TAIL.replacen('1', &parent.to_string(), 1))).unwrap()
        };
        let all =
            Processes::from_stats([stat(1, 0), stat(9, 5), stat(5, 2), stat(2, 1), stat(3, 1), stat(6, 2)].into_iter());
        let pids: Vec<u32> = all.tree(2).unwrap().iter().map(|s| s.pid).collect();
        assert_eq!(pids, [2, 5, 6, 9]);
        assert_eq!(all.ancestors(9), [9, 5, 2, 1]);
        assert!(all.tree(4).unwrap().is_empty());
        let crowd = Processes::from_stats((2..MAX_MEMBERS as u32 + 3).map(|pid| stat(pid, 1)).chain([stat(1, 0)]));
        assert!(crowd.tree(1).is_none());
        let looped = Processes::from_stats([stat(2, 3), stat(3, 2)].into_iter());
        assert_eq!(looped.tree(2).unwrap().len(), 2);
        assert!(looped.ancestors(2).len() <= MAX_MEMBERS);
    }

    #[test]
    fn uids_and_cgroups_are_read() {
        assert_eq!(parse_uids("Name:\tx\nUid:\t1\t2\t3\t4\n"), Some(vec![1, 2, 3, 4]));
        assert_eq!(parse_uids("Uid:\t1\t2\n"), None);
        assert_eq!(parse_uids(""), None);
        assert_eq!(parse_tracer("Name:\tx\nTracerPid:\t77\n"), Some(77));
        assert_eq!(parse_tracer("TracerPid:\t0\n"), None);
        assert_eq!(parse_process("Name:\tx\nTgid:\t5\nNgid:\t0\nPid:\t7\n"), Some(5));
        assert_eq!(parse_cgroup("4:memory:/a\n0::/user.slice/app.scope\n"), Some("/user.slice/app.scope"));
        assert_eq!(parse_cgroup("0::/\n"), Some("/"));
        for text in ["", "4:memory:/a\n", "0::/../other\n", "0::/x (deleted)\n", "0::relative\n"] {
            assert_eq!(parse_cgroup(text), None, "{text:?}");
        }
    }

    #[test]
    fn this_process_is_found_and_a_wrong_start_time_is_not() {
        let me = std::process::id();
        let stat = ProcDir::open(me).unwrap().stat().unwrap();
        assert!(Member::of(&stat).pidfd().is_ok());
        assert_eq!(Member::of(&stat).is_stopped(), Some(false));
        let another = Member { pid: me, start: stat.start + 1 };
        assert!(is_gone(&another.pidfd().unwrap_err()));
        // Were it sent, this test would end here.
        assert!(is_gone(&another.signal(Signal::KILL).unwrap_err()));
        assert_eq!(another.is_stopped(), None);
        assert_eq!(ProcDir::open(me).unwrap().exe(), std::env::current_exe().ok());
        assert!(Processes::now().unwrap().ancestors(me).contains(&1));
    }
}
