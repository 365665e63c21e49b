//! Cgroups of the experiment's own: one for each app, below one for all, so that the same thing can be frozen, paged out
//! and counted whoever starts the app. Removed, and thawed before, however the command ends.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nightporter::sys::process::cgroup_mount;

/// For the panic hook, as in `world`.
static BASE: Mutex<Option<PathBuf>> = Mutex::new(None);

/// The cgroup around all apps.
pub(crate) struct Cgroups {
    base: PathBuf,
    /// Whether memory is counted in them.
    memory: bool,
}

/// The kernel may take a moment until a cgroup whose last process has ended can be removed.
const REMOVAL: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

impl Cgroups {
    /// Makes them for these apps.
    ///
    /// # Errors
    /// As a sentence part; mostly because it takes root, or a cgroup that was delegated.
    pub(crate) fn make<'a>(apps: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mount = cgroup_mount().ok_or("the cgroup v2 hierarchy is not mounted")?;
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").trim_start_matches('/');
        // The top first, as for the daemon without systemd; then our own, which is right where it was delegated.
        let name = format!("nightporter-measure-{}", std::process::id());
        let mut last = "cannot be made".to_owned();
        for parent in [mount.clone(), mount.join(own)] {
            let base = parent.join(&name);
            // Fails where it is there already for all cgroups, or may not be: seen below.
            let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory");
            if let Err(error) = fs::create_dir(&base) {
                last = format!("{}: {error}", base.display());
                continue;
            }
            *BASE.lock().unwrap_or_else(PoisonError::into_inner) = Some(base.clone());
            let memory = fs::write(base.join("cgroup.subtree_control"), "+memory").is_ok();
            let cgroups = Self { base, memory };
            for app in apps {
                let path = cgroups.path_of(app);
                fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            }
            return Ok(cgroups);
        }
        Err(last)
    }

    /// The app's.
    pub(crate) fn path_of(&self, app: &str) -> PathBuf {
        // systemd's name for what holds one app and nothing else, so that the daemon takes it for that, too.
        self.base.join(format!("app-{app}.scope"))
    }

    /// One of its own for something else, such as ballast.
    pub(crate) fn make_other(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.base.join(name);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(path),
        }
    }

    /// Whether the kernel counts memory in them.
    pub(crate) const fn has_memory(&self) -> bool {
        self.memory
    }

    /// CPU time of everything that ever ran in them, in microseconds.
    pub(crate) fn cpu_micros(&self) -> Option<u64> {
        number(&self.base.join("cpu.stat"), "usage_usec")
    }

    /// Ends everything of these apps at once, frozen or not (`cgroup.kill`, Linux 5.14), without a look at any process, and waits
    /// until it is gone, at most `patience`.
    pub(crate) fn kill(&self, apps: &[String], patience: Duration) -> io::Result<()> {
        for app in apps {
            fs::write(self.path_of(app).join("cgroup.kill"), "1")?;
        }
        let deadline = Instant::now() + patience;
        apps.iter().try_for_each(|app| {
            let left = deadline.saturating_duration_since(Instant::now());
            wait_for_event(&self.path_of(app), "populated", 0, left)
        })
    }

    /// Lets everything in them run.
    pub(crate) fn thaw(&self) {
        thaw_all(&self.base);
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        release();
    }
}

/// A number behind a key of a flat keyed file.
fn number(path: &Path, key: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// A file of a cgroup that holds one number, in bytes; in KiB.
pub(crate) fn kib(path: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(path.join(file)).ok()?.trim().parse::<u64>().ok().map(|bytes| bytes / 1024)
}

/// Freezes a cgroup or lets it run, and waits until it is so, at most `patience`.
pub(crate) fn set_frozen(path: &Path, frozen: bool, patience: Duration) -> io::Result<()> {
    let digit = if frozen { "1" } else { "0" };
    fs::write(path.join("cgroup.freeze"), digit)?;
    wait_for_event(path, "frozen", u64::from(frozen), patience)
}

/// Waits until a line of `cgroup.events` says so.
fn wait_for_event(path: &Path, key: &str, wanted: u64, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    while number(&path.join("cgroup.events"), key) != Some(wanted) {
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// Thaws and removes whatever [`Cgroups::make`] made last. What still runs in it keeps it there, and is told of.
pub(crate) fn release() -> Vec<String> {
    let Some(base) = BASE.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Vec::new() };
    thaw_all(&base);
    let deadline = Instant::now() + REMOVAL;
    loop {
        let mut left = Vec::new();
        for path in below(&base).into_iter().chain([base.clone()]) {
            if let Err(error) = fs::remove_dir(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                left.push(format!("the cgroup {}: {error}", path.display()));
            }
        }
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        thread::sleep(POLL);
    }
}

/// Lets whatever there is of ours run, for an end that comes unforeseen.
pub(crate) fn thaw_whatever() {
    if let Some(base) = &*BASE.lock().unwrap_or_else(PoisonError::into_inner) {
        thaw_all(base);
    }
}

fn thaw_all(base: &Path) {
    for path in below(base) {
        let _ = fs::write(path.join("cgroup.freeze"), "0");
    }
}

fn below(base: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}
