//! The tree of files that is looked at: this machine's, or one made by a test.

use std::{
    fs,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::{Access, AtFlags, CWD, OFlags, accessat};

/// Largest file that is read; what is beyond it is not looked at.
const SIZE: u64 = 1 << 20;
/// Entries of a directory that are looked at.
const ENTRIES: usize = 32_768;

/// Where `/` is.
#[derive(Clone, Debug)]
pub struct Root {
    path: PathBuf,
}

impl Root {
    /// This machine's.
    pub fn real() -> Self {
        Self { path: PathBuf::from("/") }
    }

    /// A directory that stands for it.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// `path`, absolute or not, below it.
    pub(super) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.path.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The text of a regular file; `None` where there is none, or it cannot be read.
    pub(super) fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        // Neither a FIFO nor a terminal under that name may make us wait.
        let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOCTTY).bits()).ok()?;
        let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(self.path(path)).ok()?;
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(SIZE).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Likewise, without what surrounds it; `None` when it is empty.
    pub(super) fn line(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = self.read(path)?;
        let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// A text of words between spaces.
    pub(super) fn words(&self, path: impl AsRef<Path>) -> Vec<String> {
        self.read(path).unwrap_or_default().split_ascii_whitespace().map(str::to_owned).collect()
    }

    pub(super) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    pub(super) fn is_dir(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).is_dir()
    }

    /// access(2) for writing, with the rights we have.
    pub(super) fn may_write(&self, path: impl AsRef<Path>) -> bool {
        accessat(CWD, self.path(path), Access::WRITE_OK, AtFlags::EACCESS).is_ok()
    }

    /// The names in a directory, sorted.
    pub(super) fn list(&self, path: impl AsRef<Path>) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(path)) else { return Vec::new() };
        let names = entries.take(ENTRIES).filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.collect();
        names.sort_unstable();
        names
    }
}
