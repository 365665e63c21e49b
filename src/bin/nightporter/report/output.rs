//! Writes a file so that nobody ever reads half of it: beside it, then renamed.

use std::{fs, io::Write, os::unix::fs::PermissionsExt, path::Path};

use tempfile::Builder;

use crate::exit::{Exit, Failure};

/// Replaces `path` with `content`, readable by all, as node_exporter runs as somebody else. What is no regular file
/// (`/dev/stdout`, a pipe) is written to.
pub(super) fn write(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let failed =
        |error: std::io::Error| Failure::new(Exit::CannotCreate, format!("cannot write {}: {error}", path.display()));
    // Through a symbolic link, so that the link stays one.
    let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    if fs::metadata(&target).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        let mut file = fs::OpenOptions::new().write(true).open(&target).map_err(failed)?;
        return file.write_all(content).map_err(failed);
    }
    let directory = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // The textfile collector reads whatever ends in .prom: not this.
    let mut file = Builder::new().prefix(".nightporter-").suffix(".new").tempfile_in(directory).map_err(failed)?;
    file.write_all(content).map_err(failed)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed)?;
    file.persist(&target).map(drop).map_err(|error| failed(error.error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_readable_by_all() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("a.prom"), dir.path().join("link"));
        fs::write(&path, "much longer than what comes").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&path, &link).unwrap();
        write(&link, b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert!(link.is_symlink());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "something was left behind");
    }

    #[test]
    fn a_device_stays_one_and_what_fails_says_why() {
        write(Path::new("/dev/null"), b"x").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(write(dir.path(), b"x").unwrap_err().exit, Exit::CannotCreate);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let nowhere = write(&dir.path().join("missing/a.html"), b"x").unwrap_err();
        assert!(nowhere.text.contains("missing/a.html: No such file"), "{nowhere}");
    }
}
