//! Is a process in a sandbox, and whose? The sandbox's own file tree must be looked at for that, and a hostile process
//! can put a file system of its own there (FUSE in a user namespace) that never answers. So nothing here is opened that
//! is not first proved to be in memory already: `RESOLVE_CACHED` and `O_PATH` ask no file system, and only then is the
//! mount looked up in the kernel's own table.

use std::{
    fs::{self, File},
    io::Read,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};

/// What a process's root directory says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sandbox {
    /// None: it sees the same root directory as this daemon.
    None,
    /// Flatpak's, with the application's id.
    Flatpak(String),
    /// Another, or one that cannot be looked into.
    Other,
}

/// Largest `.flatpak-info` read, in bytes.
const SIZE: u64 = 64 * 1024;

/// Looks at `/proc/PID/root`. The caller holds a pidfd and checks afterwards that the process still lives.
pub(super) fn look(pid: u32) -> Sandbox {
    let Ok(root) = open_path(&format!("/proc/{pid}/root")) else { return Sandbox::Other };
    if let Some(app) = flatpak_info(pid, &root).as_deref().and_then(parse_info) {
        return Sandbox::Flatpak(app);
    }
    let same =
        open_path("/proc/self/root").is_ok_and(|own| identity(&own).is_some() && identity(&own) == identity(&root));
    if same { Sandbox::None } else { Sandbox::Other }
}

/// The application's id in a `.flatpak-info` (flatpak-metadata(5): `[Application] name=`; `[Runtime]` for no app).
fn parse_info(text: &str) -> Option<String> {
    let mut group = "";
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            group = name;
        } else if group == "Application"
            && let Some((key, value)) = line.split_once('=')
            && key.trim_end() == "name"
        {
            let id = value.trim();
            let plausible = id.contains('.') && zbus::names::WellKnownName::try_from(id).is_ok();
            return plausible.then(|| id.to_owned());
        }
    }
    None
}

fn flatpak_info(pid: u32, root: &OwnedFd) -> Option<String> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let path =
        openat2(root, ".flatpak-info", flags, Mode::empty(), ResolveFlags::CACHED | ResolveFlags::IN_ROOT).ok()?;
    // bwrap gives the file as a bind mount from a tmpfs; on a tmpfs neither open nor read can wait for anybody.
    let mount = fdinfo(&path, "mnt_id:")?;
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
    if mount_type(&table, &mount)? != "tmpfs" {
        return None;
    }
    // Now its type may be asked: a FIFO would block the opening, and a link is not followed.
    let stat = statx(&path, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE).ok()?;
    if !FileType::from_raw_mode(stat.stx_mode.into()).is_file() {
        return None;
    }
    let file = File::open(format!("/proc/self/fd/{}", path.as_raw_fd())).ok()?;
    let mut text = String::new();
    file.take(SIZE).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The file system type of a mount in `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).
fn mount_type<'a>(table: &'a str, mount: &str) -> Option<&'a str> {
    let line = table.lines().find(|line| line.split(' ').next() == Some(mount))?;
    line.split_once(" - ")?.1.split(' ').next()
}

/// A field of `/proc/self/fdinfo/FD`.
pub(super) fn fdinfo(fd: &OwnedFd, field: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    text.lines().find_map(|line| line.strip_prefix(field)).map(|value| value.trim().to_owned())
}

fn open_path(path: &str) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

fn identity(fd: &OwnedFd) -> Option<(u32, u32, u64)> {
    // What the kernel has in memory is enough, and asks no file system.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = statx(fd, "", flags, StatxFlags::INO).ok()?;
    Some((stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino))
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Child, Command, Stdio},
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn this_process_is_in_no_sandbox_and_a_missing_one_cannot_be_vouched_for() {
        assert_eq!(look(std::process::id()), Sandbox::None);
        assert_eq!(look(u32::MAX), Sandbox::Other);
    }

    /// A process with a root directory of its own, as bubblewrap makes one.
    fn sandboxed(file_system: &str, info: &str) -> (Child, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            "mount -t {file_system} t $0 && mkdir $0/usr && mount --rbind /usr $0/usr && \
             ln -s usr/lib $0/lib && ln -s usr/lib64 $0/lib64 && {info} && exec chroot $0 /usr/bin/cat"
        );
        // Who is not root becomes it in a user namespace, as bubblewrap does.
        let namespaces = if rustix::process::geteuid().is_root() { "-m" } else { "-Urm" };
        let child = Command::new("unshare")
            .args([namespaces, "sh", "-c", &script])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        (child, dir)
    }

    #[test]
    fn sandboxes_are_told_apart() {
        let info = "printf '[Application]\\nname=im.dino.Dino\\n' > $0/.flatpak-info";
        for (file_system, info, expected) in [
            ("tmpfs", info, Sandbox::Flatpak("im.dino.Dino".into())),
            // Not on a file system that is known not to block.
            ("ramfs", info, Sandbox::Other),
            ("tmpfs", "true", Sandbox::Other),
            ("tmpfs", "ln -s /usr/share/os-release $0/.flatpak-info", Sandbox::Other),
            ("tmpfs", "mkfifo $0/.flatpak-info", Sandbox::Other),
        ] {
            let (mut child, _dir) = sandboxed(file_system, info);
            let until = Instant::now() + Duration::from_secs(20);
            let mut seen = look(child.id());
            while seen == Sandbox::None && Instant::now() < until {
                thread::sleep(Duration::from_millis(10));
                seen = look(child.id());
            }
            let running = child.try_wait().unwrap().is_none();
            drop(child.stdin.take());
            child.wait().unwrap();
            assert!(running, "the sandbox could not be made");
            assert_eq!(seen, expected, "{file_system} {info}");
        }
    }

    #[test]
    fn flatpak_info_text() {
        for (text, id) in [
            ("[Application]\nname=im.dino.Dino\nruntime=x\n[Instance]\ninstance-id=1\n", Some("im.dino.Dino")),
            ("[Instance]\nname=org.fake.App\n[Application]\n name = org.real.App \n", Some("org.real.App")),
            ("[Runtime]\nname=org.gnome.Platform\n", None),
            ("[Application]\nname=\n", None),
            ("[Application]\nname=../../etc\n", None),
            ("[Application]\nname=:1.5\n", None),
            ("[Application]\nname=nodots\n", None),
            ("name=org.a.B\n", None),
            ("[Application\nname=org.a.B\n", None),
            ("", None),
        ] {
            assert_eq!(parse_info(text).as_deref(), id, "{text}");
        }
    }

    #[test]
    fn mount_types() {
        let table = "22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n\
                     223 22 0:9 /x /.flatpak-info ro - tmpfs tmpfs rw\n3 x\n";
        assert_eq!(mount_type(table, "22"), Some("ext4"));
        assert_eq!(mount_type(table, "223"), Some("tmpfs"));
        assert_eq!(mount_type(table, "2"), None);
        assert_eq!(mount_type(table, "3"), None);
        assert_eq!(mount_type("", ""), None);
    }
}
