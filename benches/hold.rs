//! What holding an app still costs the loop, and how soon it runs again: an app of 50 processes in its own cgroup among
//! 400 others, against the bare write to `cgroup.freeze`. Needs root and cgroup v2.
//!
//! `cargo bench --bench hold -- [--rounds N] [--others N] [--processes N]`. A table, then one line of JSON. Ends with 1
//! when the project's target is missed: from `Targets::thaw` to `Outcome::Thawed` at most 5 ms more than the kernel's own
//! thaw, at the 99th percentile.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark's output is its point")]

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use mio::{Events, Poll, Token};
use nightporter::{
    event::{Event, Outcome},
    model::{AppKey, Bus, TargetId},
    sys::{
        clock,
        inbox::{self, Inbox, Incoming, Process},
        jobs::Jobs,
        process::{Options, Targets},
    },
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const TARGET: Duration = Duration::from_millis(5);
const FIRST: usize = 100;

struct Arguments {
    rounds: usize,
    others: usize,
    processes: usize,
}

fn main() -> ExitCode {
    match arguments().and_then(|arguments| run(&arguments)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("hold: {error}");
            ExitCode::from(2)
        }
    }
}

fn arguments() -> Result<Arguments> {
    let mut arguments = Arguments { rounds: 200, others: 400, processes: 50 };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse::<usize>().ok()).ok_or(format!("{arg} takes a number"));
        match arg.as_str() {
            "--rounds" => arguments.rounds = number()?.max(1),
            "--others" => arguments.others = number()?,
            "--processes" => arguments.processes = number()?.max(1),
            // cargo bench says so.
            "--bench" => {}
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    Ok(arguments)
}

/// Times of one kind, sorted.
struct Times(Vec<Duration>);

impl Times {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }

    fn at(&self, percent: usize) -> Duration {
        let index = (self.0.len() * percent / 100).min(self.0.len().saturating_sub(1));
        self.0.get(index).copied().unwrap_or_default()
    }

    fn show(&self, name: &str) {
        let millis = |percent| self.at(percent).as_secs_f64() * 1000.0;
        println!("{name:44} {:8.3} {:8.3} {:8.3}", millis(50), millis(99), millis(100));
    }

    fn json(&self) -> serde_json::Value {
        let micros = |percent| u64::try_from(self.at(percent).as_micros()).unwrap_or(u64::MAX);
        serde_json::json!({ "p50_us": micros(50), "p99_us": micros(99), "max_us": micros(100) })
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let crowd = Crowd::start(arguments.others)?;
    let app = App::start(arguments.processes)?;
    // As /run: a tmpfs.
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let mut porter = Porter::new(dir.path())?;
    let target = porter.adopt(app.shell.id())?;

    let (mut bare, mut thaw) = (Vec::new(), Vec::new());
    let mut freeze = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
    for round in 0..arguments.rounds {
        bare.push(app.bare_thaw()?);
        let inspected = round % 2;
        if inspected == 1 {
            porter.targets.inspect(target);
            porter.until(|event| matches!(event, Event::Inspected(..)))?;
        }
        porter.longest = Duration::ZERO;
        let started = Instant::now();
        porter.timed(|targets| targets.freeze(target));
        match porter.until(|event| matches!(event, Event::Outcome(..)))? {
            Event::Outcome(_, Outcome::Frozen { .. }) => {}
            other => return Err(format!("{other:?}").into()),
        }
        freeze[inspected].1.push(started.elapsed());
        freeze[inspected].0.push(porter.longest);
        porter.rest()?;
        let started = Instant::now();
        porter.targets.thaw(target);
        match porter.until(|event| matches!(event, Event::Outcome(..)))? {
            Event::Outcome(_, Outcome::Thawed { .. }) => thaw.push(started.elapsed()),
            other => return Err(format!("{other:?}").into()),
        }
        porter.rest()?;
    }

    let [(alone_loop, alone), (after_loop, after)] = freeze;
    let (bare, thaw) = (Times::of(bare), Times::of(thaw));
    let rows = [
        ("thaw: the kernel alone", "bare_thaw", &bare),
        ("thaw: from the call to the outcome", "thaw", &thaw),
        ("freeze: to the outcome", "freeze", &Times::of(alone)),
        ("freeze: longest stay on the loop", "freeze_loop", &Times::of(alone_loop)),
        ("freeze after an inspection: to the outcome", "inspected_freeze", &Times::of(after)),
        ("freeze after an inspection: longest stay", "inspected_freeze_loop", &Times::of(after_loop)),
    ];
    println!("{} processes, {} others, {} rounds", arguments.processes, crowd.0.len(), arguments.rounds);
    println!("{:44} {:>8} {:>8} {:>8}  (ms)", "", "p50", "p99", "max");
    rows.iter().for_each(|(name, _, times)| times.show(name));
    let figures: serde_json::Map<_, _> = rows.iter().map(|(_, key, times)| ((*key).to_owned(), times.json())).collect();
    println!("{}", serde_json::Value::Object(figures));
    Ok(thaw.at(99).saturating_sub(bare.at(99)) <= TARGET)
}

/// Processes that are nobody's business.
struct Crowd(Vec<Child>);

impl Crowd {
    fn start(count: usize) -> Result<Self> {
        let mut crowd = Self(Vec::new());
        for _ in 0..count {
            crowd.0.push(Command::new("sleep").arg("infinity").stdin(Stdio::null()).spawn()?);
        }
        Ok(crowd)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// An app in a cgroup as systemd would make it.
struct App {
    shell: Child,
    cgroup: PathBuf,
}

impl App {
    fn start(processes: usize) -> Result<Self> {
        let text = fs::read_to_string("/proc/self/mountinfo")?;
        let line = text.lines().find(|line| line.contains(" - cgroup2 ")).ok_or("there is no cgroup v2")?;
        let mount = PathBuf::from(line.split(' ').nth(4).ok_or("mountinfo is odd")?);
        let cgroup = mount.join(format!("np-bench-{}", std::process::id())).join("app-org.example.Bench-1.scope");
        fs::create_dir_all(&cgroup)?;
        let script = format!(
            "echo $$ > '{}/cgroup.procs'; for i in $(seq {}); do sleep infinity & done; wait",
            cgroup.display(),
            processes - 1
        );
        let app = Self { shell: Command::new("sh").args(["-c", &script]).spawn()?, cgroup };
        for _ in 0..500 {
            if fs::read_to_string(app.cgroup.join("cgroup.procs"))?.lines().count() == processes {
                // What has just been started is still loading.
                thread::sleep(Duration::from_millis(200));
                return Ok(app);
            }
            thread::sleep(Duration::from_millis(10));
        }
        Err("the app did not start".into())
    }

    /// Frozen and thawed by hand: from the write until the kernel says so.
    fn bare_thaw(&self) -> Result<Duration> {
        let is_frozen =
            || -> Result<bool> { Ok(fs::read_to_string(self.cgroup.join("cgroup.events"))?.contains("frozen 1")) };
        fs::write(self.cgroup.join("cgroup.freeze"), "1")?;
        while !is_frozen()? {
            thread::yield_now();
        }
        let started = Instant::now();
        fs::write(self.cgroup.join("cgroup.freeze"), "0")?;
        while is_frozen()? {
            thread::yield_now();
        }
        Ok(started.elapsed())
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup.join("cgroup.freeze"), "0");
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let _ = self.shell.wait();
        for _ in 0..200 {
            if fs::remove_dir(&self.cgroup).is_ok() {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let _ = self.cgroup.parent().map(fs::remove_dir);
    }
}

/// The loop in small, with a clock on it.
struct Porter {
    targets: Targets,
    poll: Poll,
    inbox: Inbox,
    seen: Vec<Event>,
    /// Spent in the longest call to `targets`.
    longest: Duration,
}

impl Porter {
    fn new(dir: &Path) -> Result<Self> {
        let poll = Poll::new()?;
        let (sender, inbox) = inbox::channel(poll.registry(), Token(7))?;
        let options = Options { systemd: Some(true), ..Options::default() };
        let registry = poll.registry().try_clone()?;
        let targets = Targets::new(registry, FIRST, sender, Jobs::default(), dir.to_owned(), options)?;
        Ok(Self { targets, poll, inbox, seen: Vec::new(), longest: Duration::ZERO })
    }

    fn adopt(&mut self, pid: u32) -> Result<TargetId> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or("an odd pid")?;
        let uid = rustix::process::getuid().as_raw();
        let process = Process { pid, uid, pidfd: pidfd_open(raw, PidfdFlags::empty())? };
        let app = AppKey::new(Bus::Session(uid), "org.example.Bench");
        let (target, _) = self.targets.adopt(&app, process).map_err(|reason| reason.to_string())?;
        Ok(target)
    }

    fn timed(&mut self, act: impl FnOnce(&mut Targets)) {
        let started = Instant::now();
        act(&mut self.targets);
        self.longest = self.longest.max(started.elapsed());
    }

    fn until(&mut self, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        let started = Instant::now();
        loop {
            self.targets.drain(&mut self.seen);
            if let Some(at) = self.seen.iter().position(&wanted) {
                return Ok(self.seen.swap_remove(at));
            }
            if started.elapsed() > Duration::from_secs(10) {
                return Err("waited in vain".into());
            }
            self.turn()?;
        }
    }

    fn rest(&mut self) -> Result<()> {
        while self.targets.poll_timeout().is_some() {
            self.turn()?;
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<()> {
        let due = self.targets.poll_timeout().map(|due| due.since(clock::boot()));
        let mut events = Events::with_capacity(16);
        self.poll.poll(&mut events, Some(due.unwrap_or(Duration::from_millis(50))))?;
        for event in &events {
            if self.targets.owns(event.token()) {
                self.timed(|targets| targets.ready(event.token()));
            }
        }
        while let Some(incoming) = self.inbox.take() {
            if let Incoming::Event(event) = incoming {
                self.seen.push(event);
            }
        }
        let now = clock::boot();
        if self.targets.poll_timeout().is_some_and(|due| due <= now) {
            self.timed(|targets| targets.handle_timeout(now));
        }
        Ok(())
    }
}
