//! The kernel's word of memory pressure, with pressure made for it: a process that reads more than its cgroup may keep.
#![cfg(feature = "daemon")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    env,
    fs::{self, File},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use mio::{Events, Poll};
use nightporter::{
    config::PressureSettings,
    model::Stall,
    sys::pressure::{self, Triggers},
};

const FIRST: usize = 16;
/// What the process may keep, and what it reads over and over.
const KEEPS: usize = 24 << 20;
const READS: usize = 96 << 20;

/// Not a test of its own: the process that waits for memory.
#[test]
fn thrashing_process() {
    let Some(path) = env::var_os("NP_TEST_THRASH").map(PathBuf::from) else { return };
    // Until it is in its cgroup.
    std::io::stdin().read_exact(&mut [0]).unwrap();
    let mut buffer = vec![0x5a; 1 << 20];
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    for _ in 0..READS / buffer.len() {
        file.write_all(&buffer).unwrap();
    }
    file.sync_all().unwrap();
    loop {
        file.rewind().unwrap();
        while file.read(&mut buffer).unwrap() > 0 {}
    }
}

#[test]
fn the_kernel_says_when_tasks_wait_for_memory() {
    let mut poll = Poll::new().unwrap();
    let settings = PressureSettings { moderate: Duration::from_millis(10), ..PressureSettings::default() };
    let triggers = Triggers::new(&settings, poll.registry(), FIRST);
    if !triggers.is_watching() {
        return println!("skipped: the kernel gives this user no triggers");
    }
    let Some(group) = Group::new() else { return println!("skipped: no cgroup here whose memory can be limited") };
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("thrash-{}", std::process::id()));
    let child = Command::new(env::current_exe().unwrap())
        .args(["thrashing_process", "--exact", "--nocapture"])
        .env("NP_TEST_THRASH", &path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut thrashing = Thrashing { child, path, group };
    thrashing.group.take(thrashing.child.id());
    thrashing.child.stdin.take().unwrap().write_all(b"x").unwrap();

    let before = pressure::read(None).stalled.unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    let mut events = Events::with_capacity(8);
    let mut said = Vec::new();
    // More than once: a word that was heard does not silence the next.
    while said.len() < 2 {
        let left = until.checked_duration_since(Instant::now()).unwrap_or_default();
        assert!(!left.is_zero(), "said so far: {said:?}; {:?}", pressure::read(None));
        assert_eq!(thrashing.child.try_wait().unwrap(), None, "it does not thrash any more");
        poll.poll(&mut events, Some(left)).unwrap();
        let words = events.iter().filter_map(|event| triggers.stall(event.token()));
        said.extend(words.filter(|stall| *stall == Stall::Moderate));
    }
    let after = pressure::read(said.last().copied());
    assert!(after.trigger.is_some() && after.stalled.unwrap().some_total > before.some_total + 10_000, "{after:?}");
    assert!(after.total > 0 && after.available > 0 && after.swap_free <= after.swap_total, "{after:?}");
}

struct Thrashing {
    child: Child,
    path: PathBuf,
    group: Group,
}

impl Drop for Thrashing {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.path);
    }
}

/// A cgroup of either version that may keep little.
struct Group(PathBuf);

impl Group {
    fn new() -> Option<Self> {
        let name = format!("nightporter-pressure-{}", std::process::id());
        let limits = [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")];
        limits.into_iter().find_map(|(mount, limit)| {
            let path = Path::new(mount).join(&name);
            fs::create_dir(&path).ok()?;
            let group = Self(path);
            let file = group.0.join(limit);
            // On a file system that is no cgroup it would be made.
            (file.exists() && fs::write(file, KEEPS.to_string()).is_ok()).then_some(group)
        })
    }

    fn take(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The child is gone before: fields are dropped in this order.
        for _ in 0..50 {
            match fs::remove_dir(&self.0) {
                Ok(()) => return,
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}
