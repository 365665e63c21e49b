//! The processes the demo started: found below its own in the process tree, measured, ended by pidfd.

use std::{
    collections::{HashMap, HashSet},
    fs,
    sync::OnceLock,
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// One process, as `/proc/PID/stat` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    parent: u32,
    state: char,
    /// In clock ticks after boot: with the pid it names the process for good.
    start: u64,
    name: String,
    /// CPU time in clock ticks, of its own and of children it has waited for.
    pub(crate) ticks: u64,
    /// Page faults that took a read, of its own and of children it has waited for.
    pub(crate) major_faults: u64,
}

impl Process {
    /// Held still by a signal. (A process in a frozen cgroup is not.)
    pub(crate) const fn is_stopped(&self) -> bool {
        self.state == 'T'
    }

    /// For people.
    pub(crate) fn label(&self) -> String {
        format!("{} (pid {})", self.name, self.pid)
    }
}

/// This process, if it lives.
pub(crate) fn of(pid: u32) -> Option<Process> {
    read(pid)
}

/// Who was below this one before it began: a shell's process substitution, say, is its child and none of its own.
static OTHERS: OnceLock<Vec<Process>> = OnceLock::new();

/// Leaves alone for good whoever is below this process now. Counts once.
pub(crate) fn leave_who_is_here() {
    OTHERS.get_or_init(|| below(std::process::id(), all()));
}

/// Every process below this one that it started and that has not ended. Orphans are among them, because the demo is their
/// subreaper.
pub(crate) fn ours() -> Vec<Process> {
    let mut all = all();
    if let Some(others) = OTHERS.get() {
        all.retain(|process| !others.iter().any(|other| (other.pid, other.start) == (process.pid, process.start)));
    }
    below(std::process::id(), all)
}

/// Sends a signal to exactly this process: never to another one that got its number since.
pub(crate) fn signal(process: &Process, signal: Signal) {
    let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else { return };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    if read(process.pid).is_some_and(|now| now.start == process.start) {
        // It may end at any moment by itself.
        let _ = pidfd_send_signal(&pidfd, signal);
    }
}

/// Ends these processes: SIGTERM, and SIGKILL after `patience`. Gives back those that needed SIGKILL.
pub(crate) fn end(processes: &[Process], patience: Duration) -> Vec<Process> {
    for process in processes {
        signal(process, Signal::TERM);
        // A stopped process cannot hear SIGTERM.
        signal(process, Signal::CONT);
    }
    let stubborn = wait_for_end(processes, patience);
    for process in &stubborn {
        signal(process, Signal::KILL);
    }
    wait_for_end(&stubborn, patience);
    stubborn
}

/// Waits until these have ended, at most `patience`. Gives back those that have not.
pub(crate) fn wait_for_end(processes: &[Process], patience: Duration) -> Vec<Process> {
    let deadline = Instant::now() + patience;
    loop {
        let left: Vec<Process> = processes.iter().filter(|process| is_alive(process)).cloned().collect();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Memory of the apps' processes, by app, in KiB of PSS. An app's processes are known by what its start put into their
/// environment, so that whatever they started is counted as well.
pub(crate) fn apps_pss(report_socket: &str) -> HashMap<String, u64> {
    let mut apps: HashMap<String, u64> = HashMap::new();
    for process in ours() {
        if let Some(app) = app_of(process.pid, report_socket)
            && let Some(pss) = pss(process.pid)
        {
            *apps.entry(app).or_default() += pss;
        }
    }
    apps
}

/// Which app a process belongs to, without a look at its own memory where that can be helped: an environment lies in it,
/// and a look would bring it back from swap.
#[derive(Default)]
pub(crate) struct Tracker {
    known: HashMap<(u32, u64), Option<String>>,
    report_socket: String,
}

impl Tracker {
    pub(crate) fn new(report_socket: &str) -> Self {
        Self { known: HashMap::new(), report_socket: report_socket.to_owned() }
    }

    /// The processes of all apps that run now.
    pub(crate) fn apps(&mut self) -> Vec<(String, Process)> {
        let mut found = Vec::new();
        let mut alive = HashMap::new();
        for process in ours() {
            let key = (process.pid, process.start);
            let app = match self.known.remove(&key) {
                // The shell that is to become an app is not one yet.
                Some(Some(app)) => Some(app),
                Some(None) | None => by_cgroup(process.pid).or_else(|| app_of(process.pid, &self.report_socket)),
            };
            if let Some(app) = &app {
                found.push((app.clone(), process));
            }
            alive.insert(key, app);
        }
        self.known = alive;
        found
    }
}

/// By the cgroup that `cgroups` made for it.
fn by_cgroup(pid: u32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let (_, below) = path.split_once("/nightporter-measure-")?;
    Some(below.split('/').nth(1)?.strip_prefix("app-")?.strip_suffix(".scope")?.to_owned())
}

/// PSS, and what of it is in swap, of one process in KiB.
pub(crate) fn memory(pid: u32) -> Option<(u64, u64)> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    Some((parse_pss(&rollup)?, parse_rollup_line(&rollup, "SwapPss:").unwrap_or(0)))
}

/// The apps' processes.
pub(crate) fn apps(report_socket: &str) -> Vec<Process> {
    ours().into_iter().filter(|process| app_of(process.pid, report_socket).is_some()).collect()
}

/// PSS of one process in KiB.
pub(crate) fn pss(pid: u32) -> Option<u64> {
    parse_pss(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?)
}

/// Inodes of the sockets a process holds.
pub(crate) fn sockets(pid: u32) -> HashSet<u64> {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return HashSet::new() };
    fds.flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .filter_map(|target| target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok())
        .collect()
}

fn app_of(pid: u32, report_socket: &str) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let value = |name: &str| {
        environment
            .split(|byte| *byte == 0)
            .find_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix(name)?.strip_prefix('='))
    };
    (value("NIGHTPORTER_SAMPLE_REPORT")? == report_socket).then(|| value("NIGHTPORTER_SAMPLE_NAME"))?.map(str::to_owned)
}

fn is_alive(process: &Process) -> bool {
    read(process.pid).is_some_and(|now| now.start == process.start && !matches!(now.state, 'Z' | 'X'))
}

fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| read(entry.file_name().to_str()?.parse().ok()?)).collect()
}

fn read(pid: u32) -> Option<Process> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn below(root: u32, processes: Vec<Process>) -> Vec<Process> {
    let mut children: HashMap<u32, Vec<Process>> = HashMap::new();
    for process in processes {
        children.entry(process.parent).or_default().push(process);
    }
    let mut found = Vec::new();
    let mut parents = vec![root];
    while let Some(parent) = parents.pop() {
        for process in children.remove(&parent).unwrap_or_default() {
            parents.push(process.pid);
            if !matches!(process.state, 'Z' | 'X') {
                found.push(process);
            }
        }
    }
    found
}

/// proc_pid_stat(5). The name may hold anything, so the fields are counted from its closing parenthesis.
fn parse_stat(text: &str) -> Option<Process> {
    let (pid, rest) = text.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Process {
        pid: pid.parse().ok()?,
        parent: fields.get(1)?.parse().ok()?,
        state: fields.first()?.chars().next()?,
        start: fields.get(19)?.parse().ok()?,
        name: name.to_owned(),
        ticks: fields.get(11..15)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum(),
        major_faults: fields.get(9..11)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum(),
    })
}

fn parse_pss(rollup: &str) -> Option<u64> {
    parse_rollup_line(rollup, "Pss:")
}

fn parse_rollup_line(rollup: &str, key: &str) -> Option<u64> {
    rollup.lines().find_map(|line| line.strip_prefix(key))?.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "42 (a (b) c) S 7 42 42 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 9876 1000 50 184467";

    #[test]
    fn a_stat_line_is_read_whatever_the_name_holds() {
        let process = parse_stat(STAT).unwrap();
        assert_eq!((process.pid, process.parent, process.state, process.start), (42, 7, 'S', 9876));
        assert_eq!(process.label(), "a (b) c (pid 42)");
        assert_eq!((process.ticks, process.major_faults), (3, 0));
        assert_eq!(parse_stat("42 (x"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn the_tree_is_walked_and_the_dead_are_left_out() {
        let process = |pid, parent, state| Process {
            pid,
            parent,
            state,
            start: 0,
            name: String::new(),
            ticks: 0,
            major_faults: 0,
        };
        let all = vec![process(2, 1, 'S'), process(3, 2, 'Z'), process(4, 3, 'T'), process(5, 9, 'S')];
        let mut found: Vec<u32> = below(1, all).iter().map(|process| process.pid).collect();
        found.sort_unstable();
        assert_eq!(found, [2, 4]);
    }

    #[test]
    fn pss_is_read_and_not_one_of_its_neighbours() {
        assert_eq!(parse_pss("Rss:  9 kB\nPss:    1234 kB\nPss_Anon: 5 kB\n"), Some(1234));
        assert_eq!(parse_pss("Pss_Dirty: 5 kB\n"), None);
        assert!(pss(std::process::id()).unwrap() > 0);
    }

    #[test]
    fn a_child_is_found_and_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let found: Vec<Process> = ours().into_iter().filter(|process| process.pid == child.id()).collect();
        assert_eq!(found.len(), 1);
        signal(&found[0], Signal::STOP);
        assert_eq!(end(&found, Duration::from_secs(5)), []);
        child.wait().unwrap();
    }
}
