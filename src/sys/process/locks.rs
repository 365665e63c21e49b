//! `/proc/locks`: who keeps others waiting (proc_locks(5)).

use std::collections::HashSet;

/// Found at most.
const MAX_AWAITED: usize = 16;
/// Waiters behind waiters that are followed.
const MAX_DEPTH: usize = 64;

/// How a lock is owned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// By this process (POSIX).
    Process(u32),
    /// By an open file, which may have been handed on since: what is told of is the process that took the lock, and not
    /// even that for OFD locks.
    OpenFile(Option<u32>),
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lock {
    pub(super) owner: Owner,
    /// As the kernel calls it: `POSIX`, `FLOCK`, `OFDLCK`, `LEASE`, `DELEG`.
    pub(super) kind: String,
    /// Of the file, `MAJOR:MINOR:INODE`.
    pub(super) file: String,
    /// A lease that is being taken away.
    breaking: bool,
}

impl Lock {
    /// The line behind its number and arrow. The text also stands in `/proc/PID/fdinfo/FD`, behind `lock:` and a number.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_ascii_whitespace();
        let (kind, state, _mode) = (words.next()?, words.next()?, words.next()?);
        let (pid, file) = (words.next()?, words.next()?);
        let pid = pid.parse::<i64>().ok()?;
        let pid = u32::try_from(pid).ok().filter(|pid| *pid > 0);
        let owner = match (kind, pid) {
            ("POSIX", Some(pid)) => Owner::Process(pid),
            _ => Owner::OpenFile(pid),
        };
        Some(Self { owner, kind: kind.to_owned(), file: file.to_owned(), breaking: state == "BREAKING" })
    }

    fn taker(&self) -> Option<u32> {
        match self.owner {
            Owner::Process(pid) => Some(pid),
            Owner::OpenFile(pid) => pid,
        }
    }
}

/// A lock that somebody waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Awaited {
    pub(super) lock: Lock,
    /// Who waits, where it is told.
    pub(super) waiter: Option<u32>,
    /// Whether the lock's owner is one of `members` for certain; otherwise it is to be sought in their open files.
    pub(super) certain: bool,
}

/// The locks that are, or may be, held by one of `members` and that somebody else waits for, 16 at most.
pub(super) fn parse_awaited(text: &str, members: &HashSet<u32>) -> Vec<Awaited> {
    let mut found: Vec<Awaited> = Vec::new();
    // A holder, who waits for it, who waits behind that one, and so on.
    let mut line_up: Vec<Lock> = Vec::new();
    let is_member = |pid: Option<u32>| pid.is_some_and(|pid| members.contains(&pid));
    for line in text.lines() {
        let Some((_, rest)) = line.split_once(": ") else { continue };
        let bare = rest.trim_start();
        let (depth, bare) = match bare.strip_prefix("->") {
            Some(waiter) => (1 + rest.len() - bare.len(), waiter),
            None => (0, bare),
        };
        let Some(lock) = Lock::parse(bare) else { continue };
        line_up.truncate(depth);
        let breaking = lock.breaking.then_some((&lock, None));
        let waited_for = line_up.iter().map(|before| (before, lock.taker()));
        let waited_for = waited_for.filter(|(_, waiter)| depth > 0 && !is_member(*waiter));
        for (lock, waiter) in waited_for.chain(breaking) {
            let certain = is_member(lock.taker());
            // A POSIX lock is its process's; any other may belong to whoever has the file open.
            let possible = certain || matches!(lock.owner, Owner::OpenFile(_));
            let known = found.iter().any(|awaited| awaited.lock == *lock);
            if possible && !known && found.len() < MAX_AWAITED {
                found.push(Awaited { lock: lock.clone(), waiter, certain });
            }
        }
        if line_up.len() < MAX_DEPTH {
            line_up.push(lock);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCKS: &str = "1: POSIX  ADVISORY  WRITE 10 fe:00:77 0 EOF\n\
        1: -> POSIX  ADVISORY  WRITE 20 fe:00:77 0 EOF\n\
        1:  -> POSIX  ADVISORY  READ 30 fe:00:77 0 EOF\n\
        2: FLOCK  ADVISORY  WRITE 40 08:01:5 0 EOF\n\
        3: OFDLCK ADVISORY  WRITE -1 08:01:6 0 9\n\
        3: -> OFDLCK ADVISORY  READ -1 08:01:6 0 9\n\
        4: LEASE  BREAKING  READ  50 08:01:7 0 EOF\n\
        5: POSIX  ADVISORY  WRITE 60 <none>:0 0 EOF\n";

    fn holders(members: &[u32]) -> Vec<(String, Option<u32>, bool)> {
        let members = members.iter().copied().collect();
        let found = parse_awaited(LOCKS, &members).into_iter();
        found.map(|awaited| (awaited.lock.file, awaited.waiter, awaited.certain)).collect()
    }

    #[test]
    fn who_keeps_others_waiting() {
        let unsure = ("08:01:6".to_owned(), None, false);
        let lease = |certain| ("08:01:7".to_owned(), None, certain);
        let posix = |waiter| ("fe:00:77".to_owned(), Some(waiter), true);
        assert_eq!(holders(&[10]), [posix(20), unsure.clone(), lease(false)]);
        assert_eq!(holders(&[10, 20]), [posix(30), posix(30), unsure.clone(), lease(false)]);
        assert_eq!(holders(&[10, 20, 30]), [unsure.clone(), lease(false)]);
        // It waits itself, and somebody behind it: that one will wait for it once it has the lock.
        assert_eq!(holders(&[20]), [posix(30), unsure.clone(), lease(false)]);
        assert_eq!(holders(&[50]), [unsure, lease(true)]);
        let lock = Lock::parse("FLOCK  ADVISORY  WRITE 40 08:01:5 0 EOF").unwrap();
        assert_eq!((lock.owner, lock.file.as_str()), (Owner::OpenFile(Some(40)), "08:01:5"));
    }

    #[test]
    fn rubbish_is_passed_over() {
        let members = HashSet::from([1]);
        for text in ["", "1:", ": ->", "1: -> POSIX", "x\n1: -> -> -> 1 2 3", "9: POSIX ADVISORY WRITE x y 0 EOF"] {
            assert_eq!(parse_awaited(text, &members), [], "{text:?}");
        }
        let deep: String =
            (1..500).map(|n| format!("1: {}-> POSIX ADVISORY WRITE {n} a:b:1 0 0\n", " ".repeat(n))).collect();
        assert!(parse_awaited(&deep, &(1..500).collect()).is_empty());
        assert_eq!(parse_awaited(&deep, &HashSet::from([3])).len(), 1);
    }
}
