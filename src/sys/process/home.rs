//! Where an app lives: whether a cgroup holds it and nothing else, whether it may be touched at all, and moving it to a
//! cgroup of its own where no systemd manages them.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{Access, AtFlags, CWD, accessat};

use super::{
    cgroup::{Cgroup, parse_mountinfo},
    procfs::{Member, ProcDir, Processes, Stat, is_gone, parse_cgroup},
    role::{self, Role},
    walks::Walks,
};
use crate::{model::TargetId, sys::clock, time::Instant};

const PREFIX: &str = "nightporter-";
/// Looks for children born meanwhile before giving up on a tree that forks without end.
const ROUNDS: usize = 8;

/// What was found out about an app right now.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) home: Home,
    /// The processes that would be held, parents before their children.
    pub(super) members: Vec<Member>,
    /// Must never be touched.
    pub(super) protected: Option<Role>,
    /// Cannot be touched without touching another app, with the reason as a sentence part.
    pub(super) conflict: Option<Arc<str>>,
}

impl Survey {
    /// Why it must not be held or ended, as a sentence part.
    pub(super) fn refusal(&self) -> Option<Arc<str>> {
        self.protected.as_ref().map(|role| &role.reason).or(self.conflict.as_ref()).cloned()
    }
}

/// How an app can be held.
#[derive(Debug)]
pub(super) enum Home {
    /// By this cgroup, which holds it and nothing else.
    Cgroup {
        cgroup: Cgroup,
        /// The cgroup was made for this app, so that whatever is in it belongs to the app.
        whole: bool,
    },
    /// By a cgroup that is made for it before its first freeze; until then nothing is touched.
    Movable,
    /// By signals.
    Tree,
}

/// What does not change while the daemon lives.
#[derive(Debug)]
pub(super) struct World {
    /// The cgroup v2 hierarchy, if it is to be used.
    mount: Option<PathBuf>,
    systemd: bool,
    me: Member,
    walks: Arc<Walks>,
}

/// How `/proc` is walked through.
#[derive(Clone, Copy, Debug)]
pub(super) enum Walk {
    /// For this alone.
    Own,
    /// On a worker: together with whoever else asks, not before this.
    Shared(Instant),
}

impl World {
    /// `mount`: the cgroup v2 hierarchy instead of the one of `/proc/self/mountinfo`.
    pub(super) fn new(mount: Option<PathBuf>, systemd: Option<bool>) -> io::Result<Self> {
        let mount = mount.or_else(|| parse_mountinfo(&fs::read_to_string("/proc/self/mountinfo").ok()?));
        // sd_booted(3).
        let systemd = systemd.unwrap_or_else(|| Path::new("/run/systemd/system").is_dir());
        let me = Member::of(&ProcDir::open(std::process::id())?.stat()?);
        Ok(Self { mount, systemd, me, walks: Arc::default() })
    }

    /// Without cgroups.
    pub(super) fn signals_only(self) -> Self {
        Self { mount: None, ..self }
    }

    /// The walks its looks share.
    pub(super) fn walks(&self) -> &Arc<Walks> {
        &self.walks
    }

    /// Every process there is.
    pub(super) fn walk(&self, walk: Walk) -> io::Result<Arc<Processes>> {
        match walk {
            Walk::Own => Processes::now().map(Arc::new),
            Walk::Shared(asked) => self.walks.since(asked, clock::boot, Processes::now),
        }
    }

    /// Looks at the app `service` whose process is `main`. `others`: the processes of all other apps.
    ///
    /// # Errors
    /// As a sentence part, when the process is gone or has too much below it.
    pub(super) fn survey(
        &self,
        service: &str,
        main: Member,
        others: &[(u32, Arc<str>)],
        walk: Walk,
    ) -> Result<Survey, Arc<str>> {
        let dir = main.dir().map_err(|_| "its process has ended")?;
        // Before the processes are listed, so that everything in the cgroup is in the list or has ended.
        let cgroup = self.cgroup_of(&dir);
        let unreadable = |error: io::Error| format!("/proc cannot be read: {error}");
        let mut processes = self.walk(walk).map_err(unreadable)?;
        // A walk of others' may have been before that.
        if let (Found::Cgroup { pids, .. }, Walk::Shared(_)) = (&cgroup, walk)
            && pids.iter().any(|pid| *pid != 0 && processes.find(*pid).is_none())
        {
            processes = self.walk(Walk::Own).map_err(unreadable)?;
        }
        let tree = processes.tree(main.pid).ok_or("it has more than 4096 processes")?;
        let protected = self.protected(service, main, &tree, &processes);

        let mut members: Vec<Member> = tree.iter().filter(|s| !s.is_dead()).map(|s| Member::of(s)).collect();
        let home = match cgroup {
            Found::Cgroup { cgroup, whole, pids } => {
                let in_tree: HashSet<u32> = tree.iter().map(|stat| stat.pid).collect();
                let strangers = pids.iter().filter(|pid| !in_tree.contains(pid));
                let strangers: Vec<&Stat> = strangers.filter_map(|pid| processes.find(*pid)).collect();
                let fits = !pids.contains(&0)
                    && (strangers.is_empty() || whole)
                    && strangers.iter().all(|stat| self.is_harmless(stat, &processes));
                let owner = owner_of(&cgroup);
                if fits {
                    let pids: HashSet<u32> = pids.into_iter().collect();
                    members.retain(|member| pids.contains(&member.pid));
                    members.extend(strangers.iter().filter(|s| !s.is_dead()).map(|s| Member::of(s)));
                    match owner {
                        // Of a daemon that is dead: whoever starts next thaws it, so that it is of no use to us.
                        Some(owner) if owner != self.me && owner.dir().is_err() => self.homeless(),
                        Some(owner) if owner != self.me => {
                            return Err(format!("another Night Porter (process {}) takes care of it", owner.pid).into());
                        }
                        _ => Home::Cgroup { cgroup, whole },
                    }
                } else {
                    self.homeless()
                }
            }
            Found::Shared => self.homeless(),
            Found::None => Home::Tree,
        };
        let conflict = conflict(&members, others);
        Ok(Survey { home, members, protected, conflict })
    }

    /// Whether what `survey` found a moment ago still holds, by a look at the app's own processes alone: it lives in the
    /// same cgroup, which holds the processes it held and what they have started, and none of them must not be touched.
    /// `None`: it is to be looked at anew.
    pub(super) fn confirm(&self, survey: Survey, main: Member, others: &[(u32, Arc<str>)]) -> Option<Survey> {
        let dir = main.dir().ok()?;
        // Elsewhere processes are looked at one by one when they are stopped or moved.
        let Home::Cgroup { cgroup, whole } = &survey.home else {
            return Some(Survey { conflict: conflict(&survey.members, others), ..survey });
        };
        let text = dir.read("cgroup").unwrap_or_default();
        let same =
            parse_cgroup(&text).is_some_and(|path| self.path_of(unit_of(path).0) == Some(cgroup.path().to_owned()));
        if !same || !cgroup.is_current() {
            return None;
        }
        let pids = cgroup.procs().ok()?;
        if pids.contains(&0) {
            return None;
        }
        let mut seen: HashMap<u32, (Stat, Option<PathBuf>)> = HashMap::with_capacity(pids.len());
        for pid in pids {
            let Ok(dir) = ProcDir::open(pid) else { continue };
            let Ok(stat) = dir.stat() else { continue };
            seen.insert(pid, (stat, dir.exe()));
        }
        let known: HashSet<Member> = survey.members.iter().copied().collect();
        let parents: HashSet<u32> = seen.values().map(|(stat, _)| stat.parent).collect();
        let living = || seen.values().filter(|(stat, _)| !stat.is_dead());
        let belongs = |stat: &Stat| known.contains(&Member::of(stat)) || *whole || seen.contains_key(&stat.parent);
        let harmless = |stat: &Stat, exe: Option<&Path>| {
            stat.pid != self.me.pid && role::of_process(stat, exe, parents.contains(&stat.pid)).is_none()
        };
        let fits = living().all(|(stat, exe)| belongs(stat) && harmless(stat, exe.as_deref()));
        if !seen.contains_key(&main.pid) || !fits {
            return None;
        }
        let members: Vec<Member> = living().map(|(stat, _)| Member::of(stat)).collect();
        Some(Survey { conflict: conflict(&members, others), members, ..survey })
    }

    /// The directory of this path of `/proc/PID/cgroup`.
    pub(super) fn path_of(&self, path: &str) -> Option<PathBuf> {
        Some(self.mount.as_ref()?.join(path.trim_start_matches('/')))
    }

    /// Moves `members`, `main` and everything below it to a cgroup of its own.
    pub(super) fn make_own(
        &self,
        service: &str,
        target: TargetId,
        main: Member,
        members: &[Member],
    ) -> io::Result<Cgroup> {
        let base = self.base().ok_or(io::ErrorKind::PermissionDenied)?;
        let ours = base.join(format!("{PREFIX}{}.{}", self.me.pid, self.me.start));
        let path = ours.join(format!("app-{}-{}", sanitise(service), target.0));
        let mut made = Err(io::ErrorKind::NotFound.into());
        // Ours goes away with the last app in it, maybe right now.
        for _ in 0..ROUNDS {
            match fs::create_dir(&ours) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => made = fs::create_dir(&path),
            }
            if !made.as_ref().is_err_and(is_gone) {
                break;
            }
        }
        made?;
        let cgroup = Cgroup::open(&path)?;
        move_to(&cgroup, members)?;
        for _ in 0..ROUNDS {
            let outside = self.outside(&cgroup, main, &Processes::now()?)?;
            if outside.is_empty() {
                return Ok(cgroup);
            }
            move_to(&cgroup, &outside)?;
        }
        Err(io::Error::other("it starts processes faster than they can be moved"))
    }

    /// Everything in `cgroup` that lives.
    pub(super) fn inside(&self, cgroup: &Cgroup, processes: &Processes) -> Vec<Member> {
        let pids = cgroup.procs().unwrap_or_default().into_iter();
        pids.filter_map(|pid| processes.find(pid)).filter(|stat| !stat.is_dead()).map(Member::of).collect()
    }

    /// What runs below `main`, is not in `cgroup`, and is no app on its own.
    pub(super) fn outside(&self, cgroup: &Cgroup, main: Member, processes: &Processes) -> io::Result<Vec<Member>> {
        let inside: HashSet<u32> = cgroup.procs()?.into_iter().collect();
        let tree = processes.tree(main.pid).ok_or_else(|| io::Error::other("it has more than 4096 processes"))?;
        let outside = tree.into_iter().filter(|stat| !stat.is_dead() && !inside.contains(&stat.pid));
        Ok(outside.map(Member::of).filter(|member| !is_app_of_its_own(*member)).collect())
    }

    /// The path of the systemd unit that `home` is, below the root of the hierarchy.
    pub(super) fn unit(&self, home: &Home) -> Option<String> {
        let Home::Cgroup { cgroup, .. } = home else { return None };
        let path = cgroup.path().strip_prefix(self.mount.as_ref()?).ok()?.to_str()?;
        (path.ends_with(".service") || path.ends_with(".scope")).then(|| format!("/{path}"))
    }

    /// Whether `cgroup` is one of those made by [`World::make_own`].
    pub(super) fn is_own(&self, cgroup: &Cgroup) -> bool {
        self.base().is_some_and(|base| {
            cgroup.path().strip_prefix(base).is_ok_and(|path| is_made_by_us(&path.to_string_lossy()))
        })
    }

    /// Thaws and removes what daemons that are dead left behind. Returns the cgroups in which apps still run.
    pub(super) fn sweep_dead(&self) -> Vec<PathBuf> {
        let Some(base) = self.base() else { return Vec::new() };
        let names = Cgroup::open(&base).and_then(|base| base.children()).unwrap_or_default();
        let dead = names.into_iter().filter(|name| {
            let owner = name.to_str().and_then(parse_owner);
            owner.is_some_and(|owner| owner.dir().is_err())
        });
        let mut left = Vec::new();
        for ours in dead.map(|name| base.join(name)) {
            let names = Cgroup::open(&ours).and_then(|dir| dir.children()).unwrap_or_default();
            for path in names.into_iter().map(|name| ours.join(name)) {
                if let Ok(cgroup) = Cgroup::open(&path)
                    && cgroup.asked_frozen().unwrap_or(true)
                    && let Err(error) = cgroup.set_frozen(false)
                {
                    log::error!("cannot thaw {}, left by a daemon that is dead: {error}", path.display());
                }
                if !remove(&path) {
                    left.push(path);
                }
            }
            remove(&ours);
        }
        left
    }

    fn protected(&self, service: &str, main: Member, tree: &[&Stat], processes: &Processes) -> Option<Role> {
        if main.pid == self.me.pid {
            return Some(Role::other("it is the porter itself"));
        }
        if let Some(role) = role::of_service(service) {
            return Some(role);
        }
        tree.iter().find_map(|stat| {
            let role = self.role_of(stat, processes)?;
            let below = || format!("{} below it must not be touched: {}", stat.comm, role.reason).into();
            Some(if stat.pid == main.pid { role } else { Role { reason: below(), ..role } })
        })
    }

    fn role_of(&self, stat: &Stat, processes: &Processes) -> Option<Role> {
        if stat.pid == self.me.pid || processes.ancestors(self.me.pid).contains(&stat.pid) {
            return Some(Role::other("the porter itself runs below it"));
        }
        let exe = ProcDir::open(stat.pid).ok().and_then(|dir| dir.exe());
        role::of_process(stat, exe.as_deref(), processes.has_children(stat.pid))
    }

    fn is_harmless(&self, stat: &Stat, processes: &Processes) -> bool {
        self.role_of(stat, processes).is_none()
    }

    fn cgroup_of(&self, dir: &ProcDir) -> Found {
        let Some(mount) = &self.mount else { return Found::None };
        let Ok(text) = dir.read("cgroup") else { return Found::None };
        let Some(path) = parse_cgroup(&text) else { return Found::None };
        let (unit, whole) = unit_of(path);
        let mine = ProcDir::open(self.me.pid).and_then(|dir| dir.read("cgroup")).unwrap_or_default();
        let mine = parse_cgroup(&mine).unwrap_or("/");
        let unit = unit.trim_start_matches('/');
        if unit.is_empty() || unit.ends_with(".slice") || Path::new(mine).starts_with(Path::new("/").join(unit)) {
            return Found::Shared;
        }
        let Ok(cgroup) = Cgroup::open(&mount.join(unit)) else { return Found::None };
        // The record keeps one line for each.
        if !cgroup.may_write("cgroup.freeze") || cgroup.path().to_str().is_none_or(|path| path.contains('\n')) {
            return Found::None;
        }
        match cgroup.procs() {
            Ok(pids) => Found::Cgroup { cgroup, whole, pids },
            Err(_) => Found::Shared,
        }
    }

    fn homeless(&self) -> Home {
        if self.base().is_some() { Home::Movable } else { Home::Tree }
    }

    /// Where apps' own cgroups are made. The top is tried before our own cgroup: whoever stops the daemon by its cgroup
    /// must not stop the apps with it.
    fn base(&self) -> Option<PathBuf> {
        if self.systemd {
            return None;
        }
        let mount = self.mount.clone()?;
        let mine = || {
            let text = ProcDir::open(self.me.pid).and_then(|dir| dir.read("cgroup")).ok()?;
            Some(mount.join(parse_cgroup(&text)?.trim_start_matches('/')))
        };
        let may_write = |path: &Path| {
            [path.to_owned(), path.join("cgroup.procs")]
                .iter()
                .all(|path| accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok())
        };
        if may_write(&mount) { Some(mount) } else { mine().filter(|mine| may_write(mine)) }
    }
}

/// Removes a cgroup made by us, and the directory around it when it was the last. True when it is gone.
pub(super) fn remove(path: &Path) -> bool {
    let gone = match fs::remove_dir(path) {
        Ok(()) => true,
        Err(error) => is_gone(&error),
    };
    if gone && let Some(ours) = path.parent().filter(|p| p.file_name().is_some_and(|n| is_ours(&n.to_string_lossy()))) {
        // Fails while another app is in it, which is well.
        let _ = fs::remove_dir(ours);
    }
    gone
}

enum Found {
    Cgroup {
        cgroup: Cgroup,
        whole: bool,
        pids: Vec<u32>,
    },
    /// It is known to hold others.
    Shared,
    /// There is none, or none of use.
    None,
}

/// The cgroup of the app a cgroup path belongs to, and whether the system made it for one app
/// (systemd's DESKTOP_ENVIRONMENTS.md: `app[-launcher]-ID[-RANDOM].scope` or `.service`).
pub(super) fn unit_of(path: &str) -> (&str, bool) {
    let mut end = 0;
    for part in path.split('/').skip(1) {
        end += part.len() + 1;
        let unit = path.get(..end).unwrap_or(path);
        if part.starts_with("app-") && (part.ends_with(".scope") || part.ends_with(".service")) || is_made_by_us(unit) {
            return (unit, true);
        }
    }
    (path, false)
}

fn is_made_by_us(path: &str) -> bool {
    let mut parts = path.rsplit('/');
    let (leaf, parent) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    leaf.starts_with("app-") && is_ours(parent)
}

fn is_ours(name: &str) -> bool {
    parse_owner(name).is_some()
}

/// The daemon whose directory of cgroups bears this name.
fn parse_owner(name: &str) -> Option<Member> {
    let (pid, start) = name.strip_prefix(PREFIX)?.split_once('.')?;
    Some(Member { pid: pid.parse().ok()?, start: start.parse().ok()? })
}

/// The daemon that made this cgroup, if one did.
fn owner_of(cgroup: &Cgroup) -> Option<Member> {
    let parent = cgroup.path().parent()?.file_name()?.to_str()?;
    cgroup.path().file_name()?.to_str()?.starts_with("app-").then(|| parse_owner(parent)).flatten()
}

/// Another app among these, with the reason as a sentence part.
fn conflict(members: &[Member], others: &[(u32, Arc<str>)]) -> Option<Arc<str>> {
    let pids: HashSet<u32> = members.iter().map(|member| member.pid).collect();
    let (_, other) = others.iter().find(|(pid, _)| pids.contains(pid))?;
    Some(format!("{other} runs together with it").into())
}

/// Moves these very processes to `cgroup`; the frozen one holds them from then on.
pub(super) fn move_to(cgroup: &Cgroup, members: &[Member]) -> io::Result<()> {
    for member in members {
        // The pidfd is held over the write: the pid cannot become another process's meanwhile.
        match member.pidfd().and_then(|_pidfd| cgroup.write("cgroup.procs", &member.pid.to_string())) {
            Err(error) if !is_gone(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn is_app_of_its_own(member: Member) -> bool {
    let text = member.dir().and_then(|dir| dir.read("cgroup")).unwrap_or_default();
    parse_cgroup(&text).is_some_and(|path| unit_of(path).1)
}

/// A bus name as a part of a file name.
fn sanitise(service: &str) -> String {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    service.chars().take(64).map(|c| if good(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_apps_are_known_by_name() {
        let app = "/user.slice/user-1000.slice/user@1000.service/app.slice/app-flatpak-im.fractal-7.scope";
        assert_eq!(unit_of(app), (app, true));
        assert_eq!(unit_of(&format!("{app}/inner/most")), (app, true));
        let made = "/nightporter-12.34/app-im.fractal-1";
        assert_eq!(unit_of(made), (made, true));
        for other in ["/", "/a/session.slice/dbus.service", "/app-x/y", "/nightporter-x/app-x", "/app.slice"] {
            assert_eq!(unit_of(other), (other, false));
        }
    }

    #[test]
    fn names_become_harmless() {
        assert_eq!(sanitise("../a/:1.5\n\u{e9}"), ".._a__1.5__");
        assert_eq!(sanitise(&"x".repeat(300)).len(), 64);
    }
}
