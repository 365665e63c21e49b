//! The files of transfers: private, in the state directory.
//!
//! Beside a download lies what tells its version (`ID.version`): written to the disk before the first byte of that version
//! is, so that after any crash the two belong together. Of the bytes themselves those count that are in the file, unless the
//! machine itself has stopped in between: then only those that were written to the disk before the store was told.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::fs::statvfs;

use crate::transfer::TransferId;

/// The boot in which the files were written.
const BOOT: &str = "boot";
/// Of the disk, what transfers leave free: the twentieth part, or this where that is less.
const RESERVE: u64 = 512 * 1024 * 1024;

pub(super) struct Spool {
    dir: PathBuf,
    /// Written before the machine started: their ends may be anything.
    doubtful: Mutex<HashSet<TransferId>>,
}

impl Spool {
    pub(super) fn open(dir: &Path, known: impl Iterator<Item = TransferId>) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let known: HashSet<TransferId> = known.collect();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let same = !boot.is_empty() && fs::read_to_string(dir.join(BOOT)).is_ok_and(|before| before == boot);
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let id = name.split('.').next().and_then(|number| number.parse().ok()).map(TransferId);
            if name != BOOT && id.is_none_or(|id| !known.contains(&id)) {
                fs::remove_file(entry.path())?;
            }
        }
        if !same {
            private(&dir.join(BOOT), true)?.write_all(boot.as_bytes())?;
        }
        let doubtful = if same { HashSet::new() } else { known };
        Ok(Self { dir: dir.to_owned(), doubtful: Mutex::new(doubtful) })
    }

    /// How much of a download is there, of which version, and the file to append to; a fresh one if nothing can be used.
    /// `good` and `version` are the store's word.
    pub(super) fn resume(
        &self,
        id: TransferId,
        good: u64,
        version: Option<&str>,
    ) -> io::Result<(File, u64, Option<Arc<str>>)> {
        let doubtful = self.doubtful.lock().unwrap_or_else(PoisonError::into_inner).contains(&id);
        let found = fs::read_to_string(self.path(id, ".version")).ok().filter(|found| !found.is_empty());
        let file = OpenOptions::new().append(true).open(self.path(id, ""));
        let (Some(found), Ok(file)) = (found, file) else { return Ok((private(&self.path(id, ""), true)?, 0, None)) };
        let length = file.metadata()?.len();
        let length = match (doubtful, version == Some(&found)) {
            (false, _) => length,
            (true, true) => length.min(good),
            (true, false) => 0,
        };
        file.set_len(length)?;
        self.is_certain(id);
        Ok((file, length, Some(found.into())))
    }

    /// An empty file for this version of a download; without one that it could be told by, nothing of it is used again.
    pub(super) fn restart(&self, id: TransferId, version: Option<&str>) -> io::Result<File> {
        self.is_certain(id);
        let (file, beside) = (self.path(id, ""), self.path(id, ".version"));
        for old in [&file, &beside] {
            match fs::remove_file(old) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if let Some(version) = version {
            let mut beside = private(&beside, true)?;
            beside.write_all(version.as_bytes())?;
            beside.sync_data()?;
        }
        // The names as well.
        File::open(&self.dir)?.sync_all()?;
        private(&file, true)
    }

    /// For the content of an upload.
    pub(super) fn content(&self, id: TransferId) -> io::Result<File> {
        self.is_certain(id);
        private(&self.path(id, ""), true)
    }

    /// Makes its name durable, too.
    pub(super) fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_data()?;
        File::open(&self.dir)?.sync_all()
    }

    pub(super) fn read(&self, id: TransferId) -> io::Result<File> {
        File::open(self.path(id, ""))
    }

    pub(super) fn read_answer(&self, id: TransferId) -> io::Result<File> {
        File::open(self.path(id, ".answer"))
    }

    pub(super) fn keep_answer(&self, id: TransferId, answer: &[u8]) -> io::Result<()> {
        let mut file = private(&self.path(id, ".answer"), true)?;
        file.write_all(answer)?;
        file.sync_data()
    }

    pub(super) fn remove(&self, id: TransferId) {
        self.is_certain(id);
        for end in ["", ".version", ".answer"] {
            match fs::remove_file(self.path(id, end)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    log::warn!("cannot delete {}: {error}", self.path(id, end).display());
                }
                _ => {}
            }
        }
    }

    /// Bytes that transfers may still write.
    pub(super) fn room(&self) -> u64 {
        let Ok(disk) = statvfs(&self.dir) else { return u64::MAX };
        let reserve = (disk.f_blocks * disk.f_frsize / 20).min(RESERVE);
        (disk.f_bavail * disk.f_frsize).saturating_sub(reserve)
    }

    fn is_certain(&self, id: TransferId) {
        self.doubtful.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    fn path(&self, id: TransferId, end: &str) -> PathBuf {
        self.dir.join(format!("{}{end}", id.0))
    }
}

/// For appending, readable for nobody else.
fn private(path: &Path, fresh: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).mode(0o600);
    if fresh {
        options.write(true).truncate(true)
    } else {
        options.append(true)
    };
    options.open(path)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const ID: TransferId = TransferId(7);

    fn spool(dir: &Path) -> Spool {
        Spool::open(dir, [ID].into_iter()).unwrap()
    }

    fn written(spool: &Spool, bytes: &[u8]) {
        spool.restart(ID, Some("\"a\"")).unwrap().write_all(bytes).unwrap();
    }

    #[test]
    fn after_a_crash_of_the_daemon_alone_every_byte_counts() {
        let dir = tempfile::tempdir().unwrap();
        written(&spool(dir.path()), b"0123456789");
        let (mut file, length, version) = spool(dir.path()).resume(ID, 4, Some("\"old\"")).unwrap();
        assert_eq!((length, version.as_deref()), (10, Some("\"a\"")));
        file.write_all(b"ab").unwrap();
        let mut text = String::new();
        spool(dir.path()).read(ID).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "0123456789ab");
    }

    #[test]
    fn after_one_of_the_machine_only_what_is_known_to_be_durable() {
        let dir = tempfile::tempdir().unwrap();
        for (good, version, left) in
            [(4, Some("\"a\""), 4), (99, Some("\"a\""), 10), (4, Some("\"b\""), 0), (4, None, 0)]
        {
            written(&spool(dir.path()), b"0123456789");
            fs::write(dir.path().join(BOOT), "another").unwrap();
            let rebooted = spool(dir.path());
            assert_eq!(rebooted.resume(ID, good, version).unwrap().1, left, "{good} {version:?}");
            assert_eq!(rebooted.resume(ID, 0, None).unwrap().1, left, "asked once");
        }
    }

    #[test]
    fn what_belongs_to_nobody_is_deleted_and_nothing_is_readable_for_others() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("transfers");
        written(&spool(&dir), b"x");
        for name in ["8", "8.version", "junk", "7.answer"] {
            fs::write(dir.join(name), "x").unwrap();
        }
        let spool = spool(&dir);
        let mut left: Vec<_> =
            fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["7", "7.answer", "7.version", "boot"]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join("7"))), (0o700, 0o600));
        spool.remove(ID);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }
}
