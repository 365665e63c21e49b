//! The cgroup of a unit, made as systemd makes it.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Its processes are killed with its drop.
pub(crate) struct Group {
    path: PathBuf,
    /// How many directories are ours.
    depth: usize,
}

impl Group {
    /// Of `unit` under the manager of user `uid`.
    pub(crate) fn of_user(uid: u32, unit: &str) -> Self {
        Self::new(&[&format!("user@{uid}.service"), "app.slice", unit])
    }

    /// Of `unit` under the system's manager.
    pub(crate) fn of_system(unit: &str) -> Self {
        Self::new(&["np.slice", unit])
    }

    fn new(parts: &[&str]) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut path = mount().join(format!("np-units-{}-{number}.slice", std::process::id()));
        fs::create_dir(&path).expect("these tests need root and cgroup v2");
        for part in parts {
            path.push(part);
            fs::create_dir(&path).unwrap();
        }
        Self { path, depth: parts.len() + 1 }
    }

    /// As `/proc/PID/cgroup` has it.
    pub(crate) fn name(&self) -> String {
        format!("/{}", self.path.strip_prefix(mount()).unwrap().display())
    }

    /// A shell line that runs `command` in it.
    pub(crate) fn run(&self, command: &str) -> String {
        format!("echo $$ >{}/cgroup.procs && exec {command}", self.path.display())
    }

    /// Moves a process that runs into it.
    pub(crate) fn take(&self, pid: u32) {
        fs::write(self.path.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    pub(crate) fn is_frozen(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.events")).unwrap().contains("frozen 1")
    }

    pub(crate) fn kill(&self) {
        fs::write(self.path.join("cgroup.kill"), "1").unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(self.path.join("cgroup.freeze"), "0");
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        let mut path = self.path.clone();
        for _ in 0..self.depth {
            for _ in 0..200 {
                if fs::remove_dir(&path).is_ok() {
                    break;
                }
                thread::sleep(Duration::from_millis(10));
            }
            path.pop();
        }
    }
}

fn mount() -> PathBuf {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = text.lines().find(|line| line.contains(" - cgroup2 ")).expect("these tests need cgroup v2");
    PathBuf::from(line.split(' ').nth(4).unwrap())
}
