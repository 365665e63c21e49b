//! cgroup v2: finding the mount, and directories that are known by file descriptor and inode.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Access, AtFlags, Mode, OFlags, accessat, fstat, fstatfs, openat};

use super::procfs::{MAX_MEMBERS, read_text};

/// `CGROUP2_SUPER_MAGIC` of the kernel's `include/uapi/linux/magic.h`.
const MAGIC: u32 = 0x6367_7270;
/// Levels below an app's cgroup that are looked at.
const MAX_DEPTH: usize = 8;

/// Where the whole hierarchy is mounted, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
pub(in crate::sys) fn parse_mountinfo(text: &str) -> Option<PathBuf> {
    text.lines().find_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        let mut front = front.split(' ').skip(3);
        let (root, point) = (front.next()?, front.next()?);
        // A mount of a part of the hierarchy would not match the paths of /proc/PID/cgroup.
        (back.split(' ').next()? == "cgroup2" && root == "/").then(|| unescape(point))
    })
}

/// Where the cgroup v2 hierarchy is mounted as a whole, if it is.
pub fn mount() -> Option<PathBuf> {
    parse_mountinfo(&std::fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// `cgroup.events`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Events {
    pub(super) populated: bool,
    pub(super) frozen: bool,
}

impl Events {
    pub(super) fn parse(text: &str) -> Self {
        Self { populated: number(text, "populated") == Some(1), frozen: number(text, "frozen") == Some(1) }
    }
}

/// The number behind `key` in a flat keyed file (`cgroup.events`, `memory.stat`).
pub(super) fn number(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim_end().parse().ok())
}

/// The process ids of a `cgroup.procs`; zero stands for processes outside our pid namespace and is kept.
pub(super) fn parse_procs(text: &str) -> Vec<u32> {
    text.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

/// One cgroup. Everything goes through the directory's file descriptor: another cgroup of the same name is not it.
#[derive(Debug)]
pub(super) struct Cgroup {
    fd: OwnedFd,
    path: PathBuf,
    inode: u64,
}

impl Cgroup {
    /// The cgroup whose directory is `path`; an error when it is anything but a cgroup v2.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        if u32::try_from(fstatfs(&fd)?.f_type).ok() != Some(MAGIC) {
            return Err(io::Error::other("not a cgroup v2"));
        }
        let inode = fstat(&fd)?.st_ino;
        Ok(Self { fd, path: path.to_owned(), inode })
    }

    /// Where it is, for people, for the record and for removing it.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's number for it; not given again while the machine runs (on 64 bit).
    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// Whether its path still leads to it.
    pub(super) fn is_current(&self) -> bool {
        Self::open(&self.path).is_ok_and(|now| now.inode == self.inode)
    }

    pub(super) fn open_file(&self, name: &str) -> io::Result<File> {
        Ok(File::from(openat(&self.fd, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?))
    }

    pub(super) fn read(&self, name: &str) -> io::Result<String> {
        read_text(self.open_file(name)?)
    }

    pub(super) fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let fd = openat(&self.fd, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        File::from(fd).write_all(text.as_bytes())
    }

    pub(super) fn may_write(&self, name: &str) -> bool {
        accessat(&self.fd, name, Access::WRITE_OK, AtFlags::EACCESS).is_ok()
    }

    pub(super) fn events(&self) -> io::Result<Events> {
        Ok(Events::parse(&self.read("cgroup.events")?))
    }

    /// Asks the kernel to freeze it or to let it run; `cgroup.events` tells when it is done.
    pub(super) fn set_frozen(&self, frozen: bool) -> io::Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Whether this very cgroup (not one above it) was asked to be frozen.
    pub(super) fn asked_frozen(&self) -> io::Result<bool> {
        Ok(self.read("cgroup.freeze")?.trim() == "1")
    }

    /// SIGKILL for everything in it, without a race against fork (Linux 5.14).
    pub(super) fn kill(&self) -> io::Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Every process in it and below it.
    ///
    /// # Errors
    /// When it cannot be read, is nested deeper than 8 levels, or holds more than 4096 processes.
    pub(super) fn procs(&self) -> io::Result<Vec<u32>> {
        let mut pids = Vec::new();
        collect(&self.fd, 0, &mut pids)?;
        Ok(pids)
    }

    /// The names of the cgroups right below it.
    pub(super) fn children(&self) -> io::Result<Vec<OsString>> {
        children(&self.fd)
    }

    /// A handle of its own on the same cgroup, for a worker.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, path: self.path.clone(), inode: self.inode })
    }
}

fn collect(dir: &OwnedFd, depth: usize, pids: &mut Vec<u32>) -> io::Result<()> {
    let procs = openat(dir, "cgroup.procs", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    pids.extend(parse_procs(&read_text(File::from(procs))?));
    if pids.len() > MAX_MEMBERS {
        return Err(io::Error::other("more than 4096 processes"));
    }
    for name in children(dir)? {
        if depth >= MAX_DEPTH {
            return Err(io::Error::other("cgroups nested too deep"));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(dir.as_fd(), name.as_os_str(), flags, Mode::empty()) {
            Ok(child) => collect(&child, depth + 1, pids)?,
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn children(dir: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if entry.file_type() == rustix::fs::FileType::Directory && name != b"." && name != b".." {
            names.push(std::ffi::OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}

/// Undoes the octal escapes of mountinfo (`\040` for a space).
fn unescape(text: &str) -> PathBuf {
    let mut rest = text.as_bytes();
    let mut out = Vec::with_capacity(rest.len());
    while let Some((&byte, tail)) = rest.split_first() {
        let code = (byte == b'\\').then(|| tail.get(..3)).flatten();
        let code = code.and_then(|c| u8::from_str_radix(std::str::from_utf8(c).ok()?, 8).ok());
        out.push(code.unwrap_or(byte));
        rest = tail.get(if code.is_some() { 3 } else { 0 }..).unwrap_or_default();
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_among_others() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw shared:3 - cgroup cgroup rw,cpu\n\
                      40 31 0:38 /part /mnt rw - cgroup2 cgroup2 rw\n\
                      38 31 0:38 / /sys/fs/cg\\040x/unified rw shared:9 master:1 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(parse_mountinfo(hybrid), Some(PathBuf::from("/sys/fs/cg x/unified")));
        for text in ["", "31 23 0:28 / /x rw - cgroup cgroup rw", "31 23 - cgroup2", " - ", "31 23 0:28 / - cgroup2 x"]
        {
            assert_eq!(parse_mountinfo(text), None, "{text:?}");
        }
        assert_eq!(unescape(r"/a\134b\04"), PathBuf::from(r"/a\b\04"));
    }

    #[test]
    fn keyed_files_are_read_by_whole_keys() {
        assert_eq!(Events::parse("populated 1\nfrozen 0\n"), Events { populated: true, frozen: false });
        assert_eq!(Events::parse(""), Events::default());
        assert_eq!(Events::parse("frozen"), Events::default());
        let stat = "anon_thp 5\nanon 4096\nfile x\n";
        assert_eq!(number(stat, "anon"), Some(4096));
        assert_eq!(number(stat, "file"), None);
        assert_eq!(number(stat, "kernel"), None);
        assert_eq!(parse_procs("12\n\nx\n0\n7"), [12, 0, 7]);
    }
}
