//! Where cgroups are and what they offer.

use std::{collections::BTreeSet, fs, io::Write, path::Path};

use super::Root;
use crate::{
    doctor::facts::{AppSlice, CgroupFiles, Cgroups, Seen, Swappiness},
    sys::process::parse_mountinfo,
};

/// `user`: whose apps alone matter.
pub(super) fn look(root: &Root, user: Option<u32>) -> Seen<Cgroups> {
    let mounts = root.read("proc/self/mountinfo").ok_or("/proc/self/mountinfo cannot be read")?;
    let mut cgroups = Cgroups { v1: v1(&mounts), memory_enabled: memory_enabled(root), ..Cgroups::default() };
    let Some(mount) = parse_mountinfo(&mounts) else { return Ok(cgroups) };
    cgroups.mount = Some(mount.display().to_string());
    cgroups.read_only = is_read_only(&mounts, &mount.display().to_string());
    cgroups.controllers = root.words(mount.join("cgroup.controllers"));
    if cgroups.controllers.iter().any(|one| one == "memory") {
        cgroups.memory_enabled = Some(true);
    }
    cgroups.slices = slices(root, &mount, user);
    cgroups.sample = sample(root, &mount, &cgroups.slices);
    Ok(cgroups)
}

/// The controllers of version 1 that are mounted, sorted.
fn v1(mounts: &str) -> Vec<String> {
    let options = mounts.lines().filter_map(|line| {
        let mut back = line.split_once(" - ")?.1.split(' ');
        (back.next()? == "cgroup").then(|| back.nth(1)).flatten()
    });
    // systemd's own hierarchy (name=systemd) has no controller.
    let none = ["rw", "ro", "none", "xattr", "clone_children", "noprefix", "cpuset_v2_mode", "favordynmods"];
    let controllers: BTreeSet<&str> = options
        .flat_map(|options| options.split(','))
        .filter(|one| !one.contains('=') && !none.contains(one))
        .collect();
    controllers.into_iter().map(str::to_owned).collect()
}

fn is_read_only(mounts: &str, mount: &str) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(4);
        fields.next() == Some(mount)
            && fields.next().is_some_and(|options| options.split(',').any(|option| option == "ro"))
            && line.contains(" - cgroup2 ")
    })
}

/// As `/proc/cgroups` has it. A kernel without version 1 of the controller does not list it there, whatever it has; then
/// the command line says whether it was switched off.
fn memory_enabled(root: &Root) -> Option<bool> {
    let text = root.read("proc/cgroups").unwrap_or_default();
    let line = text.lines().find(|line| line.split_ascii_whitespace().next() == Some("memory"));
    if let Some(enabled) = line.and_then(|line| line.split_ascii_whitespace().nth(3)) {
        return Some(enabled == "1");
    }
    let is_off = |word: &str| {
        word.strip_prefix("cgroup_disable=").is_some_and(|list| list.split(',').any(|one| one == "memory"))
    };
    root.words("proc/cmdline").iter().any(|word| is_off(word)).then_some(false)
}

fn slices(root: &Root, mount: &Path, user: Option<u32>) -> Vec<AppSlice> {
    let users = root.list(mount.join("user.slice"));
    let uids = users.iter().filter_map(|name| name.strip_prefix("user-")?.strip_suffix(".slice")?.parse::<u32>().ok());
    uids.filter(|uid| user.is_none_or(|user| user == *uid))
        .filter_map(|uid| {
            let path = format!("/user.slice/user-{uid}.slice/user@{uid}.service/app.slice");
            let at = mount.join(path.trim_start_matches('/'));
            if !root.is_dir(&at) {
                return None;
            }
            let memory = |file: &str| root.words(at.join(file)).iter().any(|one| one == "memory");
            let below = children(root, &at);
            let may = |file: &str| {
                let files: Vec<_> =
                    below.iter().map(|name| at.join(name).join(file)).filter(|f| root.exists(f)).collect();
                (!files.is_empty()).then(|| files.iter().all(|file| root.may_write(file)))
            };
            Some(AppSlice {
                uid,
                memory: memory("cgroup.controllers"),
                memory_on: memory("cgroup.subtree_control"),
                freeze_writable: may("cgroup.freeze"),
                reclaim_writable: may("memory.reclaim"),
                writable: root.may_write(&at) && root.may_write(at.join("cgroup.procs")),
                path,
            })
        })
        .collect()
}

/// An app's cgroup, else any below the top: what is at the top differs.
fn sample(root: &Root, mount: &Path, slices: &[AppSlice]) -> Option<CgroupFiles> {
    let apps = slices.iter().map(|slice| slice.path.clone());
    let path = apps.chain([String::new()]).find_map(|parent| {
        let at = mount.join(parent.trim_start_matches('/'));
        let name = children(root, &at).into_iter().next()?;
        Some(format!("{parent}/{name}"))
    })?;
    let at = mount.join(path.trim_start_matches('/'));
    let has = |file: &str| root.exists(at.join(file));
    let reclaim = at.join("memory.reclaim");
    Some(CgroupFiles {
        freeze: has("cgroup.freeze"),
        kill: has("cgroup.kill"),
        reclaim: has("memory.reclaim"),
        swappiness: if root.may_write(&reclaim) { swappiness(&root.path(reclaim)) } else { None },
        path,
    })
}

fn children(root: &Root, at: &Path) -> Vec<String> {
    root.list(at).into_iter().filter(|name| root.is_dir(at.join(name))).collect()
}

/// Asks for zero bytes, which reclaims nothing; a kernel that does not know the words refuses them with EINVAL.
fn swappiness(file: &Path) -> Option<Swappiness> {
    for (words, meaning) in [("0 swappiness=max", Swappiness::Max), ("0 swappiness=200", Swappiness::Number)] {
        let written =
            fs::OpenOptions::new().write(true).open(file).and_then(|mut file| file.write_all(words.as_bytes()));
        match written {
            Ok(()) => return Some(meaning),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(_) => return None,
        }
    }
    Some(Swappiness::No)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
        32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
        35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
        41 31 0:38 / /sys/fs/cgroup/unified ro,nosuid - cgroup2 cgroup2 rw\n";

    #[test]
    fn version_1_is_told_by_its_controllers() {
        assert_eq!(v1(HYBRID), ["cpu", "cpuacct", "memory"]);
        assert!(v1("41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n").is_empty());
        assert!(v1("\n - \nx - cgroup").is_empty());
    }

    #[test]
    fn a_read_only_mount_is_the_mount_point_s_own_matter() {
        assert!(is_read_only(HYBRID, "/sys/fs/cgroup/unified"));
        assert!(!is_read_only(HYBRID, "/sys/fs/cgroup"));
        assert!(!is_read_only(&HYBRID.replace("ro,nosuid", "rw"), "/sys/fs/cgroup/unified"));
    }
}
