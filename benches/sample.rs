//! What measuring costs: 50 apps of various sizes, some of three processes, half of them in cgroups of their own, measured
//! by the real code as for a report; and that nothing of theirs comes back into memory by it. Needs root and cgroup v2.
//!
//! `cargo bench --bench sample -- [--apps N] [--rounds N]`. Where there is swap the apps are paged out first. A table,
//! then one line of JSON. Ends with 1 when a target of the project is missed: 50 ms of CPU for one full sample of 50 apps
//! (1 ms for each) in the least disturbed round, for others on the same cores make it dearer, and no memory of an app
//! raised by it.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark's output is its point")]

use std::{
    env,
    error::Error,
    fs,
    io::{BufRead, BufReader},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use mio::{Events, Poll, Token};
use nightporter::{
    event::{Event, Outcome},
    model::{AppKey, Bus, Sample, TargetId},
    sys::{
        clock,
        inbox::{self, Inbox, Incoming, Process},
        jobs::Jobs,
        process::{Options, Targets},
    },
};
use nix::sys::resource::{UsageWho, getrusage};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// CPU for each app.
const TARGET: Duration = Duration::from_millis(1);
const FIRST: usize = 100;
/// Set for the apps: how much memory to hold, in KiB.
const SIZE: &str = "NP_BENCH_KIB";
/// Set for the apps: how many processes more.
const MORE: &str = "NP_BENCH_MORE";
const SIZES: [usize; 6] = [2, 4, 8, 16, 32, 64];

fn main() -> ExitCode {
    if let Some(kib) = env::var(SIZE).ok().and_then(|kib| kib.parse().ok()) {
        return match be_an_app(kib) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("an app: {error}");
                ExitCode::from(2)
            }
        };
    }
    match arguments().and_then(|(apps, rounds)| run(apps, rounds)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("sample: {error}");
            ExitCode::from(2)
        }
    }
}

fn arguments() -> Result<(usize, usize)> {
    let (mut apps, mut rounds) = (50, 20);
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse::<usize>().ok()).ok_or(format!("{arg} takes a number"));
        match arg.as_str() {
            "--apps" => apps = number()?.max(1),
            "--rounds" => rounds = number()?.max(1),
            // cargo bench says so.
            "--bench" => {}
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    Ok((apps, rounds))
}

fn run(count: usize, rounds: usize) -> Result<bool> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    // Before the porter, which lets them run when it is dropped: held still they would not end.
    let apps: Vec<App> = (0..count).map(App::start).collect::<Result<_>>()?;
    let mut porter = Porter::new(dir.path())?;
    let targets: Vec<TargetId> = apps.iter().map(|app| porter.adopt(app.child.id())).collect::<Result<_>>()?;
    let swapped = porter.hold_still(&targets)?;
    let processes: Vec<u32> = apps.iter().flat_map(App::processes).collect();
    let before: Vec<Memory> = processes.iter().map(|pid| Memory::of(*pid)).collect::<Result<_>>()?;

    let (mut cpu, mut wall, mut pss) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (began, used) = (Instant::now(), processor_time()?);
        for target in &targets {
            porter.targets.sample(*target);
        }
        porter.targets.sample_self();
        let samples = porter.samples(count)?;
        cpu.push(processor_time()?.saturating_sub(used));
        wall.push(began.elapsed());
        pss.push(samples.iter().map(|sample| sample.memory.pss).sum::<u64>());
    }
    let after: Vec<Memory> = processes.iter().map(|pid| Memory::of(*pid)).collect::<Result<_>>()?;
    let sum = |all: &[Memory]| all.iter().fold(Memory::default(), |sum, one| sum.plus(*one));
    let raised = before.iter().zip(&after).filter(|(before, after)| before.is_raised_in(after)).count();
    let (before, after) = (sum(&before), sum(&after));

    cpu.sort_unstable();
    wall.sort_unstable();
    let millis = |times: &[Duration]| {
        let at = |index: usize| times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1000.0);
        (at(0), at(times.len() / 2), at(times.len() - 1))
    };
    let (cpu, wall) = (millis(&cpu), millis(&wall));
    println!(
        "{count} apps of {} processes, {} MiB of PSS, {} MiB of it swapped out before; {} other processes; {rounds} rounds",
        processes.len(),
        before.pss / 1024,
        swapped / 1024,
        others(&processes)?,
    );
    println!("one full sample                {:>10} {:>10} {:>10}  (ms)", "least", "median", "most");
    println!("  CPU of the daemon            {:10.1} {:10.1} {:10.1}", cpu.0, cpu.1, cpu.2);
    println!("  until the last answer        {:10.1} {:10.1} {:10.1}", wall.0, wall.1, wall.2);
    println!("the apps                       {:>10} {:>10}  (KiB)", "before", "after");
    for (name, before, after) in [
        ("PSS", before.pss, after.pss),
        ("resident (RSS)", before.rss, after.rss),
        ("swapped out", before.swap, after.swap),
        ("major faults", before.faults, after.faults),
    ] {
        println!("  {name:28} {before:10} {after:10}");
    }
    let first = pss.first().copied().unwrap_or_default();
    println!("  {:28} {first:10} {:10}", "PSS as sampled", pss.last().copied().unwrap_or_default());
    println!(
        "{}",
        serde_json::json!({
            "apps": count, "processes": processes.len(), "cpu_ms_least": cpu.0, "cpu_ms": cpu.1, "cpu_ms_max": cpu.2, "wall_ms": wall.1,
            "pss_before": before.pss, "pss_after": after.pss, "swap_before": before.swap, "swap_after": after.swap,
            "processes_raised": raised,
        })
    );
    if raised > 0 {
        println!("MISSED: {raised} processes have more in memory, or less in swap, than before");
    }
    let target = TARGET * u32::try_from(count)?;
    let met = cpu.0 <= target.as_secs_f64() * 1000.0;
    if !met {
        println!("MISSED: more than {target:?} of CPU for one full sample");
    }
    Ok(met && raised == 0)
}

/// CPU this process has used, all threads together.
fn processor_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = |time: nix::sys::time::TimeVal| u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec());
    Ok(Duration::from_micros(micros(usage.user_time())? + micros(usage.system_time())?))
}

fn others(ours: &[u32]) -> Result<usize> {
    let pids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    Ok(pids.filter(|pid| !ours.contains(pid)).count())
}

/// A process's memory, in KiB.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    rss: u64,
    pss: u64,
    swap: u64,
    faults: u64,
}

impl Memory {
    fn of(pid: u32) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let kib = |key: &str| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix(key))?.trim().strip_suffix("kB")?.trim_end().parse().ok()
        };
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let faults = stat.rsplit_once(')').and_then(|(_, rest)| rest.split(' ').nth(10)?.parse().ok());
        let all = [kib("Rss:"), kib("Pss:"), kib("Swap:"), faults];
        let [Some(rss), Some(pss), Some(swap), Some(faults)] = all else { return Err("smaps_rollup is odd".into()) };
        Ok(Self { rss, pss, swap, faults })
    }

    /// PSS is others' doing as well: it grows as they end.
    fn is_raised_in(&self, after: &Self) -> bool {
        after.rss > self.rss || after.swap < self.swap || after.faults > self.faults
    }

    fn plus(self, other: Self) -> Self {
        Self {
            rss: self.rss + other.rss,
            pss: self.pss + other.pss,
            swap: self.swap + other.swap,
            faults: self.faults + other.faults,
        }
    }
}

/// Holds memory, has a thread, files and a connection as apps do, and does nothing more.
fn be_an_app(kib: usize) -> Result<()> {
    let more = env::var(MORE).ok().and_then(|more| more.parse().ok()).unwrap_or(0u32);
    let mut command = Command::new(env::current_exe()?);
    command.env(SIZE, "1024").env_remove(MORE).stdin(Stdio::inherit()).stdout(Stdio::null());
    let mut children = (0..more).map(|_| command.spawn()).collect::<std::io::Result<Vec<_>>>()?;
    let memory: Vec<u64> = (0..kib as u64 * 128).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24).collect();
    let files = (0..20).map(|_| fs::File::open("/proc/self/exe")).collect::<std::io::Result<Vec<_>>>()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let connection = TcpStream::connect(listener.local_addr()?)?;
    thread::spawn(|| thread::sleep(Duration::from_secs(3600)));
    println!("ready");
    // Until the benchmark ends.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    drop((std::hint::black_box(memory), files, connection));
    for child in &mut children {
        child.wait()?;
    }
    Ok(())
}

struct App {
    child: Child,
    cgroup: Option<PathBuf>,
}

impl App {
    /// Every second in a cgroup of its own, every fifth of three processes.
    fn start(number: usize) -> Result<Self> {
        let size = SIZES.get(number % SIZES.len()).copied().unwrap_or(1);
        let more = if number.is_multiple_of(5) { "2" } else { "0" };
        let mut command = Command::new(env::current_exe()?);
        command.env(SIZE, (size * 1024).to_string()).env(MORE, more).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut app = Self { child: command.spawn()?, cgroup: None };
        let stdout = app.child.stdout.take().ok_or("no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() != "ready" {
            return Err("an app did not start".into());
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while app.processes().len() != if more == "2" { 3 } else { 1 } {
            if Instant::now() > deadline {
                return Err("an app's processes did not start".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        if number.is_multiple_of(2) {
            app.move_out(number)?;
        }
        Ok(app)
    }

    fn move_out(&mut self, number: usize) -> Result<()> {
        let text = fs::read_to_string("/proc/self/mountinfo")?;
        let line = text.lines().find(|line| line.contains(" - cgroup2 ")).ok_or("there is no cgroup v2")?;
        let mount = PathBuf::from(line.split(' ').nth(4).ok_or("mountinfo is odd")?);
        let top = mount.join(format!("np-bench-{}", std::process::id()));
        fs::create_dir_all(&top)?;
        // Where the machine has that controller there.
        let _ = fs::write(mount.join("cgroup.subtree_control"), "+memory");
        let _ = fs::write(top.join("cgroup.subtree_control"), "+memory");
        let cgroup = self.cgroup.insert(top.join(format!("app-org.example.Bench{number}-1.scope"))).clone();
        fs::create_dir(&cgroup)?;
        for pid in self.processes() {
            fs::write(cgroup.join("cgroup.procs"), pid.to_string())?;
        }
        Ok(())
    }

    fn processes(&self) -> Vec<u32> {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        [pid].into_iter().chain(children.split_ascii_whitespace().filter_map(|pid| pid.parse().ok())).collect()
    }
}

impl Drop for App {
    fn drop(&mut self) {
        // The end of its input is its end, and its children's.
        self.child.stdin.take();
        let _ = self.child.wait();
        let Some(cgroup) = &self.cgroup else { return };
        for _ in 0..200 {
            if fs::remove_dir(cgroup).is_ok() {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let _ = cgroup.parent().map(fs::remove_dir);
    }
}

/// The loop in small.
struct Porter {
    targets: Targets,
    poll: Poll,
    inbox: Inbox,
    seen: Vec<Event>,
}

impl Porter {
    fn new(dir: &Path) -> Result<Self> {
        let poll = Poll::new()?;
        let (sender, inbox) = inbox::channel(poll.registry(), Token(7))?;
        let options = Options { systemd: Some(true), ..Options::default() };
        let registry = poll.registry().try_clone()?;
        let targets = Targets::new(registry, FIRST, sender, Jobs::default(), dir.to_owned(), options)?;
        Ok(Self { targets, poll, inbox, seen: Vec::new() })
    }

    fn adopt(&mut self, pid: u32) -> Result<TargetId> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or("an odd pid")?;
        let uid = rustix::process::getuid().as_raw();
        let process = Process { pid, uid, pidfd: pidfd_open(raw, PidfdFlags::empty())? };
        let app = AppKey::new(Bus::Session(uid), format!("org.example.Bench{pid}"));
        let (target, _) = self.targets.adopt(&app, process).map_err(|reason| reason.to_string())?;
        Ok(target)
    }

    /// Frozen, so that what they have in memory is not their own doing, and paged out where there is swap. How much, in
    /// KiB.
    fn hold_still(&mut self, targets: &[TargetId]) -> Result<u64> {
        let swap = fs::read_to_string("/proc/swaps")?.lines().count() > 1;
        let mut sum = 0;
        for target in targets {
            self.targets.freeze(*target);
            match self.next(|event| matches!(event, Event::Outcome(..)))? {
                Event::Outcome(_, Outcome::Frozen { .. }) => {}
                other => return Err(format!("{other:?}").into()),
            }
            if swap {
                self.targets.page_out(*target);
                match self.next(|event| matches!(event, Event::Outcome(..)))? {
                    Event::Outcome(_, Outcome::PagedOut { freed, .. }) => sum += freed,
                    other => return Err(format!("{other:?}").into()),
                }
            }
        }
        while self.targets.poll_timeout().is_some() {
            self.turn()?;
        }
        Ok(sum)
    }

    /// The answers to one full sample.
    fn samples(&mut self, count: usize) -> Result<Vec<Sample>> {
        let mut samples = Vec::new();
        let mut own = false;
        while samples.len() < count || !own {
            match self.next(|event| matches!(event, Event::Sampled(..) | Event::SampledSelf { .. }))? {
                Event::Sampled(_, sample) => samples.push(sample.map_err(|reason| reason.to_string())?),
                _ => own = true,
            }
        }
        Ok(samples)
    }

    fn next(&mut self, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        let started = Instant::now();
        loop {
            self.targets.drain(&mut self.seen);
            if let Some(at) = self.seen.iter().position(&wanted) {
                return Ok(self.seen.swap_remove(at));
            }
            if started.elapsed() > Duration::from_secs(30) {
                return Err("waited in vain".into());
            }
            self.turn()?;
        }
    }

    fn turn(&mut self) -> Result<()> {
        let due = self.targets.poll_timeout().map(|due| due.since(clock::boot()));
        let mut events = Events::with_capacity(16);
        self.poll.poll(&mut events, Some(due.unwrap_or(Duration::from_millis(50))))?;
        for event in &events {
            if self.targets.owns(event.token()) {
                self.targets.ready(event.token());
            }
        }
        while let Some(incoming) = self.inbox.take() {
            if let Incoming::Event(event) = incoming {
                self.seen.push(event);
            }
        }
        let now = clock::boot();
        if self.targets.poll_timeout().is_some_and(|due| due <= now) {
            self.targets.handle_timeout(now);
        }
        Ok(())
    }
}
