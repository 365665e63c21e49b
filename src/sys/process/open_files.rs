//! What a process has open that others depend on: devices, file systems it serves, files it keeps locked.
//!
//! Links and fdinfo are the kernel's own records. A file is never opened, and asked about itself only below `/dev` and
//! only from the cache, so that no file system, an app's own least of all, can keep us waiting.

use std::{io, os::fd::OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, StatxFlags, readlinkat, statx};

use super::{locks::Lock, procfs::ProcDir};
use crate::model::VetoKind;

/// Open files of one process that are looked at.
const MAX_FILES: usize = 4096;

/// What speaks against holding a process still, as a sentence.
pub(super) type Finding = (VetoKind, String);

/// A process's open files.
pub(super) struct OpenFiles {
    dir: OwnedFd,
    /// Number and what the link says.
    links: Vec<(String, String)>,
}

impl OpenFiles {
    /// Of the process whose directory this is, 4096 at most.
    pub(super) fn of(process: &ProcDir) -> io::Result<Self> {
        let dir = process.open_dir("fd")?;
        let mut links = Vec::new();
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            if entry.file_name() == c"." || entry.file_name() == c".." {
                continue;
            }
            // One that was closed meanwhile.
            let Ok(link) = readlinkat(&dir, entry.file_name(), Vec::new()) else { continue };
            let number = entry.file_name().to_string_lossy().into_owned();
            links.push((number, link.to_string_lossy().into_owned()));
            if links.len() >= MAX_FILES {
                break;
            }
        }
        Ok(Self { dir, links })
    }

    /// What of it others depend on. `terminal`: the process's own, as in its stat.
    pub(super) fn findings(&self, process: &ProcDir, terminal: i64) -> Vec<Finding> {
        let mut found = Vec::new();
        for (number, link) in &self.links {
            let finding = match link.as_str() {
                "anon_inode:[fanotify]" => {
                    let info = process.read(&format!("fdinfo/{number}")).unwrap_or_default();
                    answers_permissions(&info).then(|| {
                        (VetoKind::FileSystem, "it decides whether others may open files (fanotify)".to_owned())
                    })
                }
                link if link.starts_with("anon_inode:kvm-vm") => Some(virtual_machine()),
                link if link.contains("/dev/") => self
                    .device(number)
                    .and_then(|device| if device.is_terminal(terminal) { None } else { device.finding(link) }),
                _ => None,
            };
            if let Some(finding) = finding.filter(|finding| !found.contains(finding)) {
                found.push(finding);
            }
        }
        found
    }

    /// The name of the open file with this inode that is locked so; `None` when it is not among them.
    pub(super) fn locked(&self, process: &ProcDir, lock: &Lock) -> Option<String> {
        let links = self.links.iter().filter(|(_, link)| link.starts_with('/'));
        links
            .filter(|(number, _)| {
                let info = process.read(&format!("fdinfo/{number}")).unwrap_or_default();
                holds(&info, lock)
            })
            .map(|(_, link)| link.clone())
            .next()
    }

    fn device(&self, number: &str) -> Option<Device> {
        let status = statx(&self.dir, number, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
        let is_device = FileType::from_raw_mode(status.stx_mode.into()) == FileType::CharacterDevice;
        is_device.then_some(Device { major: status.stx_rdev_major, minor: status.stx_rdev_minor })
    }
}

/// A character device (Documentation/admin-guide/devices.txt).
#[derive(Clone, Copy, Debug)]
struct Device {
    major: u32,
    minor: u32,
}

impl Device {
    /// Whether it is the terminal with this number in a stat file (proc_pid_stat(5), `tty_nr`).
    fn is_terminal(self, terminal: i64) -> bool {
        let number = (self.minor & 0xff) | (self.major << 8) | ((self.minor & !0xff) << 12);
        terminal != 0 && terminal == i64::from(number)
    }

    /// What holding its user still would do. Some devices have no number of their own and are known by name.
    fn finding(self, path: &str) -> Option<Finding> {
        let name = path.rsplit_once("/dev/").map_or(path, |(_, name)| name);
        let device = |does: &str| Some((VetoKind::Device, format!("{does} (/dev/{name})")));
        match (self.major, self.minor) {
            (10, 229) => Some((VetoKind::FileSystem, "it serves a file system (FUSE)".to_owned())),
            (10, 203) => Some((VetoKind::FileSystem, "it serves a device to others (CUSE)".to_owned())),
            (10, 232) => Some(virtual_machine()),
            (10, 200) | (108, _) => device("it carries a network connection"),
            (10, 223 | 239) => device("it serves an input device"),
            (10, 130) => device("it keeps the machine's watchdog quiet"),
            _ if name.starts_with("watchdog") => device("it keeps the machine's watchdog quiet"),
            (13, _) => device("it reads an input device"),
            (81, _) => device("it uses a camera or video device"),
            (116, _) => match name.strip_prefix("snd/") {
                Some(pcm) if pcm.starts_with("pcm") && pcm.ends_with('c') => device("it records sound"),
                Some(pcm) if pcm.starts_with("pcm") => device("it plays sound"),
                Some(midi) if midi.starts_with("midi") => device("it uses a musical instrument"),
                _ => None,
            },
            (14, _) if name.starts_with("dsp") => device("it uses sound"),
            (166 | 188 | 204 | 216, _) => device("it uses a serial device"),
            (4, 64..) => device("it uses a serial device"),
            (189, _) => device("it uses a USB device"),
            (212, _) => device("it uses a tuner"),
            _ if name.starts_with("hidraw") => device("it uses an input device"),
            _ if name.starts_with("gnss") => device("it uses satellite navigation"),
            // Those of phones' chips: ttyMSM0, ttyHS0, ttymxc1, ttyGS0.
            _ if name.strip_prefix("tty").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic())) => {
                device("it uses a serial device")
            }
            _ => None,
        }
    }
}

fn virtual_machine() -> Finding {
    (VetoKind::Device, "it runs a virtual machine (KVM)".to_owned())
}

/// Whether somebody waits at each access for what this fanotify group says (proc_pid_fdinfo(5), fanotify(7)).
fn answers_permissions(info: &str) -> bool {
    /// `FAN_OPEN_PERM`, `FAN_ACCESS_PERM`, `FAN_OPEN_EXEC_PERM`, `FAN_PRE_ACCESS`.
    const PERMISSION: u64 = 0x10000 | 0x20000 | 0x40000 | 0x10_0000;
    let masks = info.lines().filter(|line| line.starts_with("fanotify ")).filter_map(|line| {
        let mask = line.split(' ').find_map(|word| word.strip_prefix("mask:"))?;
        u64::from_str_radix(mask, 16).ok()
    });
    masks.into_iter().any(|mask| mask & PERMISSION != 0)
}

/// Whether the open file behind this fdinfo holds a lock like this one.
fn holds(info: &str, lock: &Lock) -> bool {
    let locks = info.lines().filter_map(|line| line.strip_prefix("lock:")?.split_once(": "));
    locks.filter_map(|(_, lock)| Lock::parse(lock)).any(|one| one.kind == lock.kind && one.file == lock.file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(major: u32, minor: u32, path: &str) -> Option<VetoKind> {
        Device { major, minor }.finding(path).map(|(kind, _)| kind)
    }

    #[test]
    fn devices_others_feel() {
        for (major, minor, path) in [
            (81, 0, "/dev/video0"),
            (116, 3, "/dev/snd/pcmC0D0c"),
            (116, 4, "/dev/snd/pcmC0D0p"),
            (188, 0, "/dev/ttyUSB0"),
            (166, 0, "/dev/ttyACM0"),
            (4, 64, "/dev/ttyS0"),
            (240, 1, "/dev/ttyMSM0"),
            (13, 64, "/dev/input/event0"),
            (10, 130, "/dev/watchdog"),
            (248, 0, "/dev/watchdog0"),
            (10, 200, "/dev/net/tun"),
            (10, 232, "/dev/kvm"),
            (189, 2, "/dev/bus/usb/001/003"),
        ] {
            assert_eq!(kind(major, minor, path), Some(VetoKind::Device), "{path}");
        }
        assert_eq!(kind(10, 229, "/newroot/dev/fuse"), Some(VetoKind::FileSystem));
        for (major, minor, path) in [
            (226, 128, "/dev/dri/renderD128"),
            (116, 0, "/dev/snd/controlC0"),
            (116, 33, "/dev/snd/timer"),
            (1, 3, "/dev/null"),
            (1, 9, "/dev/urandom"),
            (5, 0, "/dev/tty"),
            (4, 1, "/dev/tty1"),
            (5, 2, "/dev/ptmx"),
            (136, 7, "/dev/pts/7"),
        ] {
            assert_eq!(kind(major, minor, path), None, "{path}");
        }
    }

    #[test]
    fn its_own_terminal_is_no_device_in_use() {
        assert!(Device { major: 4, minor: 64 }.is_terminal(0x440));
        assert!(Device { major: 136, minor: 0x101 }.is_terminal(0x0010_8801));
        assert!(!Device { major: 188, minor: 0 }.is_terminal(0));
    }

    #[test]
    fn fanotify_groups_that_only_listen_keep_nobody_waiting() {
        let info = |mask| {
            format!(
                "pos:\t0\nfanotify flags:4 event-flags:8000\nfanotify mnt_id:1f mflags:0 mask:{mask} ignored_mask:0\n"
            )
        };
        assert!(answers_permissions(&info("10000")));
        assert!(answers_permissions(&info("4001b")));
        assert!(!answers_permissions(&info("3b")));
        assert!(!answers_permissions("fanotify flags:4 event-flags:0\n"));
        assert!(!answers_permissions("fanotify mask:xyz\n"));
    }

    #[test]
    fn a_lock_is_found_in_an_fdinfo() {
        let info = "pos:\t0\nino:\t6\nlock:\t1: FLOCK  ADVISORY  WRITE 9 08:01:6 0 EOF\n";
        let lock = |text| Lock::parse(text).unwrap();
        assert!(holds(info, &lock("FLOCK ADVISORY READ 1 08:01:6 0 EOF")));
        assert!(!holds(info, &lock("FLOCK ADVISORY READ 1 08:01:7 0 EOF")));
        assert!(!holds(info, &lock("OFDLCK ADVISORY READ -1 08:01:6 0 EOF")));
    }
}
