//! A cgroup for one helper, so that all of it can be ended and its memory bounded as a whole. Only where this daemon's own
//! cgroup is its to divide: systemd has delegated it (`DelegateSubgroup=daemon` in the unit), or there is no systemd.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::sys::process::parse_mountinfo;

/// Where the unit puts the daemon itself (`DelegateSubgroup=`).
const OWN: &str = "daemon";
const PREFIX: &str = "helper-";
/// Processes and threads at most.
const TASKS: &str = "32";
/// A cgroup can be removed when the last process is reaped, which takes its time after a kill.
const REMOVAL: (u32, Duration) = (50, Duration::from_millis(10));

/// One helper's cgroup: all in it is killed, and it is removed, when this is dropped.
#[derive(Debug)]
pub(super) struct Group {
    path: PathBuf,
}

impl Group {
    /// An empty one. `None` where there can be none; then a process group has to do.
    pub(super) fn make(memory: u64) -> Option<Self> {
        static SAID: AtomicBool = AtomicBool::new(false);
        static SWEPT: Once = Once::new();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let Some(base) = base() else {
            super::say_once(
                &SAID,
                "they have no cgroup of their own here; process groups and resource limits hold them",
            );
            return None;
        };
        SWEPT.call_once(|| sweep(&base));
        for controller in ["+memory", "+pids"] {
            // Refused where it is not to be had.
            let _ = fs::write(base.join("cgroup.subtree_control"), controller);
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("{PREFIX}{}-{number}", std::process::id()));
        if let Err(error) = fs::create_dir(&path) {
            super::say_once(&SAID, &format!("no cgroup can be made for them: {error}"));
            return None;
        }
        let group = Self { path };
        if !group.path.join("cgroup.kill").exists() {
            // Linux 5.14. Without it a cgroup is of no use here.
            super::say_once(&SAID, "this kernel cannot end a cgroup as a whole; process groups hold them");
            return None;
        }
        for (file, limit) in [("memory.max", &*memory.to_string()), ("memory.swap.max", "0"), ("pids.max", TASKS)] {
            let path = group.path.join(file);
            if path.exists()
                && let Err(error) = fs::write(path, limit)
            {
                log::debug!("payload helpers: {file}: {error}");
            }
        }
        Some(group)
    }

    /// To write `0` to, by who enters.
    pub(super) fn entrance(&self) -> io::Result<OwnedFd> {
        Ok(openat(CWD, self.path.join("cgroup.procs"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        for _ in 0..REMOVAL.0 {
            match fs::remove_dir(&self.path) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => thread::sleep(REMOVAL.1),
                _ => return,
            }
        }
        log::warn!("payload helpers: {} cannot be removed", self.path.display());
    }
}

/// Those of an earlier life.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().filter_map(Result::ok) {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            drop(Group { path: entry.path() });
        }
    }
}

fn base() -> Option<PathBuf> {
    let mount = parse_mountinfo(&fs::read_to_string("/proc/self/mountinfo").ok()?)?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // sd_booted(3).
    base_of(&mount.join(own), Path::new("/run/systemd/system").is_dir())
}

/// Below which directory helpers have theirs.
fn base_of(own: &Path, systemd: bool) -> Option<PathBuf> {
    match own.file_name().is_some_and(|name| name == OWN) {
        true => own.parent().map(Path::to_owned),
        false if systemd => None,
        false => Some(own.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_this_daemons_to_divide_is_divided() {
        let cgroup = |path: &str| PathBuf::from("/sys/fs/cgroup").join(path);
        let unit = cgroup("system.slice/nightporterd.service");
        assert_eq!(base_of(&unit.join("daemon"), true), Some(unit.clone()));
        assert_eq!(base_of(&unit, true), None);
        assert_eq!(base_of(&cgroup("openrc.nightporterd"), false), Some(cgroup("openrc.nightporterd")));
    }
}
