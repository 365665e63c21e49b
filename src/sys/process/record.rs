//! The freeze record: what is held still, written down before it is, so that however the daemon ends somebody can thaw
//! it (design.md, invariant 4). It lies on a tmpfs: it must outlive the daemon, not the machine.
//!
//! One line each, so that damage costs one entry:
//!
//! ```text
//! nightporter-frozen 1 BOOT-ID
//! cgroup INODE PATH
//! process PID START-TIME
//! oom PID START-TIME BEFORE SET
//! ```

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::process::Signal;

use super::{
    cgroup::Cgroup,
    oom::Raised,
    procfs::{Member, boot_id, is_gone, read_text},
};
use crate::model::TargetId;

const FILE: &str = "frozen";
const HEADER: &str = "nightporter-frozen 1 ";

/// What [`thaw_leftovers`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThawReport {
    /// Cgroups and processes that run again.
    pub thawed: usize,
    /// Processes whose `oom_score_adj` is again what it was.
    pub restored: usize,
    /// Entries whose cgroup or process has ended (or was not held any more).
    pub gone: usize,
    /// What could not be thawed, with why. Stays in the record for the next try.
    pub failed: Vec<String>,
    /// Lines of the record that could not be read.
    pub damaged: Vec<String>,
}

impl ThawReport {
    /// Whether there was nothing to do.
    pub fn is_empty(&self) -> bool {
        self == &Self::default()
    }
}

impl fmt::Display for ThawReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} thawed, {} already gone", self.thawed, self.gone)?;
        if self.restored > 0 {
            write!(f, ", {} oom_score_adj restored", self.restored)?;
        }
        for failed in &self.failed {
            write!(f, "; not thawed: {failed}")?;
        }
        for line in &self.damaged {
            write!(f, "; unreadable in the freeze record: {line:?}")?;
        }
        Ok(())
    }
}

/// Thaws everything in the freeze record of `runtime_dir` that is still what it was. For the start of the daemon and
/// for `nightporterd --thaw-all`; does nothing when there is no record.
pub fn thaw_leftovers(runtime_dir: &Path) -> ThawReport {
    let mut report = ThawReport::default();
    let path = runtime_dir.join(FILE);
    let text = match File::open(&path).and_then(read_text) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return report,
        Err(error) => {
            report.failed.push(format!("cannot read {}: {error}", path.display()));
            return report;
        }
    };
    let Parsed { boot, entries, damaged } = Parsed::parse(&text);
    report.damaged = damaged;
    let mut left = Vec::new();
    // After a reboot nothing of it can be left, and a pid may be anybody's. A record without a readable header is taken
    // for one of this boot: the inodes and start times decide.
    if boot.is_some_and(|then| boot_id().is_some_and(|now| then != now)) {
        report.gone = entries.len();
    } else {
        for entry in entries {
            match entry.thaw() {
                Ok(true) if entry.is_oom() => report.restored += 1,
                Ok(true) => report.thawed += 1,
                Ok(false) => report.gone += 1,
                Err(error) => {
                    report.failed.push(format!("{entry}: {error}"));
                    left.push(entry);
                }
            }
        }
    }
    if let Err(error) = write(runtime_dir, left.iter()) {
        report.failed.push(format!("cannot update {}: {error}", path.display()));
    }
    report
}

/// One thing held still, or changed while it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Cgroup { inode: u64, path: PathBuf },
    Process { pid: u32, start: u64 },
    Oom(Raised),
}

impl Entry {
    pub(super) fn cgroup(cgroup: &Cgroup) -> Self {
        Self::Cgroup { inode: cgroup.inode(), path: cgroup.path().to_owned() }
    }

    pub(super) fn process(member: Member) -> Self {
        Self::Process { pid: member.pid, start: member.start }
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(3, ' ');
        match (words.next()?, words.next()?, words.next()?) {
            ("cgroup", inode, path) if path.starts_with('/') => {
                Some(Self::Cgroup { inode: inode.parse().ok()?, path: PathBuf::from(path) })
            }
            ("process", pid, start) => Some(Self::Process { pid: pid.parse().ok()?, start: start.parse().ok()? }),
            ("oom", pid, rest) => {
                let mut words = rest.split(' ');
                let (start, before, set) = (words.next()?, words.next()?, words.next()?);
                let member = Member { pid: pid.parse().ok()?, start: start.parse().ok()? };
                let raised = Raised { member, before: before.parse().ok()?, set: set.parse().ok()? };
                words.next().is_none().then_some(Self::Oom(raised))
            }
            _ => None,
        }
    }

    fn is_oom(&self) -> bool {
        matches!(self, Self::Oom(_))
    }

    /// False when there is nothing left to thaw.
    fn thaw(&self) -> io::Result<bool> {
        let result = match self {
            Self::Cgroup { inode, path } => Cgroup::open(path).and_then(|cgroup| {
                let held = cgroup.inode() == *inode && cgroup.asked_frozen()?;
                if held {
                    cgroup.set_frozen(false)?;
                }
                Ok(held)
            }),
            // Sent whether it is seen stopped or not: the SIGSTOP may not have reached it yet, and SIGCONT takes it back.
            Self::Process { pid, start } => Member { pid: *pid, start: *start }.signal(Signal::CONT).map(|()| true),
            Self::Oom(raised) => raised.restore(),
        };
        match result {
            Err(error) if is_gone(&error) => Ok(false),
            result => result,
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cgroup { inode, path } => write!(f, "cgroup {inode} {}", path.display()),
            Self::Process { pid, start } => write!(f, "process {pid} {start}"),
            Self::Oom(Raised { member, before, set }) => {
                write!(f, "oom {} {} {before} {set}", member.pid, member.start)
            }
        }
    }
}

/// The record of the daemon that lives.
#[derive(Debug)]
pub(super) struct Record {
    dir: PathBuf,
    /// What an earlier daemon froze and could not be thawed yet.
    inherited: Vec<Entry>,
    entries: BTreeMap<TargetId, Vec<Entry>>,
}

impl Record {
    /// Starts a record in `dir`, keeping what [`thaw_leftovers`] left there.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let inherited = match File::open(dir.join(FILE)).and_then(read_text) {
            Ok(text) => Parsed::parse(&text).entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let record = Self { dir: dir.to_owned(), inherited, entries: BTreeMap::new() };
        record.save()?;
        Ok(record)
    }

    /// Writes down what is about to be held. When it fails nothing may be frozen.
    pub(super) fn add(&mut self, target: TargetId, entries: Vec<Entry>) -> io::Result<()> {
        self.entries.entry(target).or_default().extend(entries);
        self.save()
    }

    /// Everything held for `target` runs again.
    pub(super) fn remove(&mut self, target: TargetId) {
        self.retain(target, Entry::is_oom);
    }

    /// Every `oom_score_adj` of `target` is what it was.
    pub(super) fn remove_oom(&mut self, target: TargetId) {
        self.retain(target, |entry| !entry.is_oom());
    }

    /// Nothing is left of `target`.
    pub(super) fn remove_all(&mut self, target: TargetId) {
        self.retain(target, |_| false);
    }

    fn retain(&mut self, target: TargetId, keep: impl Fn(&Entry) -> bool) {
        let Some(entries) = self.entries.get_mut(&target) else { return };
        let before = entries.len();
        entries.retain(keep);
        if entries.len() == before {
            return;
        }
        if entries.is_empty() {
            self.entries.remove(&target);
        }
        self.save_or_log();
    }

    /// Something held for `target` could not be thawed and its handle goes away: kept for the next try.
    pub(super) fn abandon(&mut self, target: TargetId) {
        self.inherited.extend(self.entries.remove(&target).into_iter().flatten());
        self.save_or_log();
    }

    /// Tries everything without a handle once more.
    pub(super) fn thaw_inherited(&mut self) {
        if self.inherited.is_empty() {
            return;
        }
        self.inherited.retain(|entry| entry.thaw().inspect_err(|e| log::error!("not thawed: {entry}: {e}")).is_err());
        self.save_or_log();
    }

    fn save(&self) -> io::Result<()> {
        write(&self.dir, self.inherited.iter().chain(self.entries.values().flatten()))
    }

    fn save_or_log(&self) {
        // An entry too many is harmless: it is compared with the world before it is acted on.
        if let Err(error) = self.save() {
            log::error!("cannot update the freeze record in {}: {error}", self.dir.display());
        }
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Parsed {
    boot: Option<String>,
    entries: Vec<Entry>,
    damaged: Vec<String>,
}

impl Parsed {
    fn parse(text: &str) -> Self {
        let mut parsed = Self::default();
        let whole = text.is_empty() || text.ends_with('\n');
        let lines = text.lines().count();
        for (number, line) in text.lines().enumerate() {
            if number == 0
                && let Some(boot) = line.strip_prefix(HEADER).filter(|boot| !boot.is_empty())
            {
                parsed.boot = Some(boot.to_owned());
                continue;
            }
            // A line cut off in the middle can look like a shorter number.
            match Entry::parse(line).filter(|_| whole || number + 1 < lines) {
                Some(entry) => parsed.entries.push(entry),
                None => parsed.damaged.push(line.chars().take(120).collect()),
            }
        }
        parsed
    }
}

/// Replaces the record in one step, or removes it when nothing is held.
fn write<'a>(dir: &Path, entries: impl Iterator<Item = &'a Entry>) -> io::Result<()> {
    let path = dir.join(FILE);
    let mut entries = entries.peekable();
    if entries.peek().is_none() {
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    }
    let mut text = format!("{HEADER}{}\n", boot_id().unwrap_or_default());
    for entry in entries {
        text.push_str(&format!("{entry}\n"));
    }
    let temporary = dir.join("frozen.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&temporary, &path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::open(dir.path()).unwrap();
        let cgroup = Entry::Cgroup { inode: 77, path: PathBuf::from("/sys/fs/cgroup/with a space") };
        let process = Entry::Process { pid: 5, start: 6 };
        record.add(TargetId(1), vec![cgroup.clone()]).unwrap();
        record.add(TargetId(2), vec![process.clone()]).unwrap();
        let oom = Entry::Oom(Raised { member: Member { pid: 5, start: 6 }, before: -17, set: 900 });
        record.add(TargetId(1), vec![oom.clone()]).unwrap();
        let path = dir.path().join(FILE);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let parsed = Parsed::parse(&fs::read_to_string(&path).unwrap());
        assert_eq!(parsed, Parsed { boot: boot_id(), entries: vec![cgroup, oom.clone(), process], damaged: vec![] });
        record.remove(TargetId(1));
        assert_eq!(record.entries.get(&TargetId(1)), Some(&vec![oom]));
        record.remove_oom(TargetId(1));
        record.abandon(TargetId(2));
        assert_eq!(Record::open(dir.path()).unwrap().inherited.len(), 1);
        record.thaw_inherited();
        assert!(!path.exists());
    }

    #[test]
    fn damage_costs_one_entry() {
        let text = "nightporter-frozen 1 b\nprocess 5 6\nprocess 5\ncgroup x /y\ncgroup 7 y\n\u{fffd}\nprocess 8 9\noom 1 2 3\noom 1 2 3 4 5\nprocess 1 2";
        let parsed = Parsed::parse(text);
        assert_eq!(parsed.entries, [Entry::Process { pid: 5, start: 6 }, Entry::Process { pid: 8, start: 9 }]);
        assert_eq!(parsed.damaged.len(), 7, "{:?}", parsed.damaged);
        assert_eq!(Parsed::parse(""), Parsed::default());
    }

    #[test]
    fn a_record_of_another_boot_touches_nobody() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), format!("{HEADER}other\nprocess {} 1\n", std::process::id())).unwrap();
        assert_eq!(thaw_leftovers(dir.path()), ThawReport { gone: 1, ..ThawReport::default() });
        assert!(!dir.path().join(FILE).exists());
        assert!(thaw_leftovers(dir.path()).is_empty());
    }
}
