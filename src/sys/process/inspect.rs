//! What speaks against holding an app still, or on, as its own processes show it. Runs on a worker.
//!
//! Nothing here reads a process's memory: what was paged out stays there. Open files, status, stat and locks are the
//! kernel's own records.

use std::{collections::HashSet, fs::File, sync::Arc, time::Duration};

use super::{
    cgroup::{Cgroup, number},
    home::{Home, Survey, Walk, World},
    locks::{Awaited, Owner, parse_awaited},
    open_files::OpenFiles,
    procfs::{MAX_MEMBERS, Member, ProcDir, Processes, is_gone, parse_process, parse_tracer, read_text},
};
use crate::{
    model::{Veto, VetoKind},
    sys::clock,
    time::Instant,
};

/// An app that takes longer to be looked at is not known.
const PATIENCE: Duration = Duration::from_secs(4);
/// Told at most.
const MAX_VETOES: usize = 16;
/// Of a reason, in bytes.
const MAX_REASON: usize = 200;
/// A frozen cgroup that uses the processor for this share of the time, in percent, and this long at least, spins: the
/// kernel charges it a little for work on its behalf (lifecycle.md §4.1: task work of io_uring).
const SPIN: (u64, Duration) = (10, Duration::from_millis(100));

/// What is to be looked at.
pub(super) struct Request {
    pub(super) world: Arc<World>,
    pub(super) service: Arc<str>,
    pub(super) main: Member,
    /// The processes of all other apps.
    pub(super) others: Vec<(u32, Arc<str>)>,
    pub(super) held: Option<Held>,
    pub(super) asked: Instant,
}

/// How it is held at this time.
pub(super) enum Held {
    Cgroup { cgroup: Cgroup, usage: Option<Usage> },
    Tree { stopped: Vec<Member> },
}

/// What a cgroup had used of the processor when it came to rest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    micros: u64,
    at: Instant,
}

impl Usage {
    /// By now.
    pub(super) fn of(cgroup: &Cgroup) -> Option<Self> {
        let micros = number(&cgroup.read("cpu.stat").ok()?, "usage_usec")?;
        Some(Self { micros, at: clock::boot() })
    }

    /// How much it has used since, and in how long, if that is too much for something frozen.
    fn spun(self, now: Self) -> Option<(Duration, Duration)> {
        let used = Duration::from_micros(now.micros.saturating_sub(self.micros));
        let time = now.at.since(self.at);
        let much = used.as_millis().saturating_mul(100) >= time.as_millis().saturating_mul(u128::from(SPIN.0));
        (used >= SPIN.1 && much).then_some((used, time))
    }
}

/// What was found.
#[derive(Debug)]
pub(super) struct Inspection {
    pub(super) vetoes: Result<Vec<Veto>, Arc<str>>,
    /// For a freeze that follows soon.
    pub(super) survey: Option<(Survey, Instant)>,
    /// What runs although it should be held still.
    pub(super) loose: Option<Loose>,
}

/// What runs although it should be held still, and can be taken in again.
#[derive(Debug)]
pub(super) enum Loose {
    /// Below the main process, outside the cgroup.
    Outside(Vec<Member>),
    /// Of a tree that is held by signals.
    Awake(Arc<Processes>),
}

/// Looks. Takes milliseconds; never call it on the loop.
pub(super) fn inspect(request: Request) -> Inspection {
    let now = clock::boot();
    let walk = Walk::Shared(request.asked);
    let survey = match request.world.survey(&request.service, request.main, &request.others, walk) {
        Ok(survey) => survey,
        Err(reason) => return Inspection { vetoes: Err(reason), survey: None, loose: None },
    };
    let mut found = Found::default();
    let seen = look(&request, &survey, now + PATIENCE, &mut found);
    let loose = match seen {
        Ok(loose) => loose,
        Err(reason) => return Inspection { vetoes: Err(reason), survey: None, loose: None },
    };
    let survey = matches!(survey.home, Home::Cgroup { .. }).then_some((survey, now));
    Inspection { vetoes: Ok(found.vetoes), survey, loose }
}

/// A veto whose reason is cut to what the contract allows.
pub(super) fn veto(kind: VetoKind, reason: &str) -> Veto {
    let printable = |c: char| if c.is_control() { '?' } else { c };
    let mut text = String::new();
    for c in reason.chars().map(printable) {
        if text.len() + c.len_utf8() > MAX_REASON {
            break;
        }
        text.push(c);
    }
    Veto { kind, reason: text.into() }
}

#[derive(Default)]
struct Found {
    vetoes: Vec<Veto>,
}

impl Found {
    fn add(&mut self, kind: VetoKind, reason: &str) {
        let veto = veto(kind, reason);
        if self.vetoes.len() < MAX_VETOES && !self.vetoes.contains(&veto) {
            self.vetoes.push(veto);
        }
    }
}

fn look(request: &Request, survey: &Survey, until: Instant, found: &mut Found) -> Result<Option<Loose>, Arc<str>> {
    if let Some(role) = &survey.protected {
        found.add(role.kind, &role.reason);
    }
    if let Some(conflict) = &survey.conflict {
        found.add(VetoKind::UnitJob, conflict);
    }
    let loose = match &request.held {
        Some(Held::Cgroup { cgroup, usage }) => look_at_cgroup(request, cgroup, *usage, found)?,
        Some(Held::Tree { stopped }) => look_at_tree(request, stopped)?,
        None => None,
    };
    let members: HashSet<u32> = survey.members.iter().map(|member| member.pid).collect();
    let locks =
        File::open("/proc/locks").and_then(read_text).map_err(|e| format!("/proc/locks cannot be read: {e}"))?;
    let mut awaited = parse_awaited(&locks, &members);
    for member in survey.members.iter().take(MAX_MEMBERS) {
        if clock::boot() > until {
            return Err("its open files are too many to be looked at".into());
        }
        // What has ended meanwhile speaks against nothing.
        let Ok(dir) = member.dir() else { continue };
        if let Some(tracer) = tracer_of(&dir)
            && !members.contains(&tracer)
        {
            found.add(VetoKind::Debugger, &format!("process {} of it is traced by {}", member.pid, name_of(tracer)));
        }
        let files = match OpenFiles::of(&dir) {
            Ok(files) => files,
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied && member.dir().is_ok() => {
                return Err(format!("seeing the open files of process {} takes CAP_SYS_PTRACE", member.pid).into());
            }
            Err(_) => continue,
        };
        let terminal = dir.stat().map_or(0, |stat| stat.terminal);
        for (kind, reason) in files.findings(&dir, terminal) {
            found.add(kind, &reason);
        }
        awaited.retain(|awaited| !tell_if_held(awaited, *member, &files, &dir, found));
    }
    // The process that took it is the app's, though the file was not found open there.
    for awaited in awaited.into_iter().filter(|awaited| awaited.certain) {
        found.add(VetoKind::AwaitedLock, &lock_reason(&awaited, None));
    }
    Ok(loose)
}

/// Whether this member holds the lock; then it is told.
fn tell_if_held(awaited: &Awaited, member: Member, files: &OpenFiles, dir: &ProcDir, found: &mut Found) -> bool {
    if matches!(awaited.lock.owner, Owner::Process(pid) if pid != member.pid) {
        return false;
    }
    let Some(path) = files.locked(dir, &awaited.lock) else { return false };
    found.add(VetoKind::AwaitedLock, &lock_reason(awaited, Some(&path)));
    true
}

fn lock_reason(awaited: &Awaited, path: Option<&str>) -> String {
    // The end of a path says more than its beginning.
    let tail = |path: &str| -> String {
        let start = path.char_indices().rev().map(|(at, _)| at).take(100).last().unwrap_or(0);
        path.get(start..).unwrap_or_default().to_owned()
    };
    let file = path.map_or_else(|| format!("a file ({})", awaited.lock.file), tail);
    match awaited.waiter {
        Some(waiter) => format!("{} waits for its lock on {file}", name_of(waiter)),
        None => format!("somebody waits for its lock on {file}"),
    }
}

/// The process that traces this one.
fn tracer_of(dir: &ProcDir) -> Option<u32> {
    let thread = parse_tracer(&dir.read("status").ok()?)?;
    let status = ProcDir::open(thread).and_then(|dir| dir.read("status")).ok();
    Some(status.and_then(|status| parse_process(&status)).unwrap_or(thread))
}

fn name_of(pid: u32) -> String {
    match ProcDir::open(pid).and_then(|dir| dir.stat()) {
        Ok(stat) => format!("{} (process {pid})", stat.comm),
        Err(_) => format!("process {pid}"),
    }
}

fn look_at_cgroup(
    request: &Request,
    cgroup: &Cgroup,
    usage: Option<Usage>,
    found: &mut Found,
) -> Result<Option<Loose>, Arc<str>> {
    match cgroup.events() {
        Ok(events) if !events.frozen => {
            found.add(VetoKind::NotHeld, "somebody else lets it run");
            return Ok(None);
        }
        Err(error) if !is_gone(&error) => return Err(format!("cgroup.events cannot be read: {error}").into()),
        _ => {}
    }
    if let (Some(then), Some(now)) = (usage, Usage::of(cgroup))
        && let Some((used, time)) = then.spun(now)
    {
        let (used, time) = (used.as_millis(), time.as_millis());
        found.add(VetoKind::NotHeld, &format!("it used the processor for {used} of the {time} ms it was held still"));
    }
    let processes = processes(request)?;
    let outside = request.world.outside(cgroup, request.main, &processes).map_err(|error| error.to_string())?;
    let Some(first) = outside.first() else { return Ok(None) };
    if request.world.is_own(cgroup) {
        return Ok(Some(Loose::Outside(outside)));
    }
    found.add(VetoKind::NotHeld, &format!("{} below it runs outside its cgroup", name_of(first.pid)));
    Ok(None)
}

fn processes(request: &Request) -> Result<Arc<Processes>, Arc<str>> {
    request.world.walk(Walk::Shared(request.asked)).map_err(|error| format!("/proc cannot be read: {error}").into())
}

fn look_at_tree(request: &Request, stopped: &[Member]) -> Result<Option<Loose>, Arc<str>> {
    let processes = processes(request)?;
    let tree = processes.tree(request.main.pid).ok_or("it has more than 4096 processes")?;
    let known: HashSet<Member> = stopped.iter().copied().collect();
    let mut living = tree.iter().filter(|stat| !stat.is_dead());
    let awake = living.any(|stat| !known.contains(&Member::of(stat)) || Member::of(stat).is_stopped() == Some(false));
    Ok(awake.then_some(Loose::Awake(processes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spin_is_told_from_the_kernels_own_work() {
        let at = |millis: u64, micros: u64| Usage { micros, at: Instant::from_nanos(millis * 1_000_000) };
        let spun = |millis: u64, micros: u64| at(0, 5).spun(at(millis, micros + 5)).is_some();
        assert!(spun(1000, 900_000));
        assert!(spun(1000, 100_000));
        assert!(!spun(1000, 99_000));
        assert!(!spun(60_000, 1_000_000), "1 s in a minute: page-out on its behalf");
        assert!(at(0, 10).spun(at(1000, 5)).is_none(), "a counter that went back");
    }

    #[test]
    fn reasons_are_short_and_harmless() {
        let veto = veto(VetoKind::Device, &format!("a\nb{}", "\u{e9}".repeat(300)));
        assert!(veto.reason.len() <= 200 && veto.reason.len() > 196);
        assert!(veto.reason.starts_with("a?b\u{e9}"));
    }
}
