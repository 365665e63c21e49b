//! The state directory and the room in it.

use std::{io, path::Path};

use rustix::fs::{StatVfsMountFlags, statvfs};

use crate::doctor::facts::{Seen, StateDir};

pub(super) fn look(path: &Path) -> Seen<StateDir> {
    let exists = match path.metadata() {
        Ok(_) => Some(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some(false),
        Err(_) => None,
    };
    // Where it is not there yet, or nobody else may look inside, what is above it is on the same file system.
    let stat = path.ancestors().find_map(|at| statvfs(at).ok()).ok_or("its file system does not answer")?;
    // root may use what is kept for it.
    let blocks = if rustix::process::geteuid().is_root() { stat.f_bfree } else { stat.f_bavail };
    Ok(StateDir {
        path: path.display().to_string(),
        exists,
        free: blocks.saturating_mul(stat.f_frsize),
        read_only: stat.f_flag.contains(StatVfsMountFlags::RDONLY),
    })
}
