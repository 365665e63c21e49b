//! Memory pressure: the kernel's word when tasks begin to wait (PSI triggers, Documentation/accounting/psi.rst), and
//! readings of how short memory is. Small files of /proc and /sys, read on the loop.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
    time::Duration,
};

use mio::{Interest, Registry, Token, event::Source, unix::SourceFd};

use crate::{
    config::PressureSettings,
    model::{Pressure, Stall, Stalled},
};

const FILE: &str = "proc/pressure/memory";
/// The window that is asked for, and the one that everybody may ask for (multiples of 2 s, since Linux 6.4).
const WINDOWS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(2)];

/// Wakes the loop when tasks wait for memory; asks nothing while they do not.
#[derive(Debug, Default)]
pub struct Triggers {
    // One for each: the kernel takes one trigger for each open file.
    files: Vec<(Stall, File)>,
    first: usize,
}

impl Triggers {
    /// Watches from now on, with tokens from `first` on, three at most. Where the kernel does not offer it, that is said
    /// in the log, and nothing ever comes.
    pub fn new(settings: &PressureSettings, registry: &Registry, first: usize) -> Self {
        Self::below(Path::new("/"), settings, registry, first)
    }

    fn below(root: &Path, settings: &PressureSettings, registry: &Registry, first: usize) -> Self {
        match Self::open(root, settings, registry, first) {
            Ok(triggers) => triggers,
            Err(error) => {
                log::info!(
                    "the kernel does not say when memory is short ({error}); it is looked at when an app is frozen or \
                     thawed (nightporter doctor)"
                );
                Self::default()
            }
        }
    }

    fn open(root: &Path, settings: &PressureSettings, registry: &Registry, first: usize) -> io::Result<Self> {
        let wanted = [
            (Stall::Moderate, "some", settings.moderate),
            (Stall::Severe, "some", settings.severe),
            (Stall::Severe, "full", settings.moderate),
        ];
        let path = root.join(FILE);
        let mut refused = io::ErrorKind::NotFound.into();
        for window in WINDOWS {
            let files = wanted.map(|(stall, who, wait)| Ok((stall, trigger(&path, who, wait, window)?)));
            match files.into_iter().collect::<io::Result<Vec<_>>>() {
                Ok(files) => {
                    for (index, (_, file)) in files.iter().enumerate() {
                        SourceFd(&file.as_raw_fd()).register(registry, Token(first + index), Interest::PRIORITY)?;
                    }
                    log::debug!("memory pressure is watched in windows of {} s", window.as_secs());
                    return Ok(Self { files, first });
                }
                // Another window is of use only where the first is not allowed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }

    /// Whether anything is watched.
    pub fn is_watching(&self) -> bool {
        !self.files.is_empty()
    }

    /// What the event with this token says, if it is one of these.
    pub fn stall(&self, token: Token) -> Option<Stall> {
        let index = token.0.checked_sub(self.first)?;
        self.files.get(index).map(|(stall, _)| *stall)
    }
}

fn trigger(path: &Path, who: &str, wait: Duration, window: Duration) -> io::Result<File> {
    let mut file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    // Thresholds are of one second.
    let wait = wait.as_micros() * window.as_micros() / Duration::from_secs(1).as_micros();
    file.write_all(format!("{who} {wait} {}\0", window.as_micros()).as_bytes())?;
    Ok(file)
}

/// How short memory is now. `trigger`: what the kernel has said, if that is why.
pub fn read(trigger: Option<Stall>) -> Pressure {
    read_below(Path::new("/"), trigger)
}

fn read_below(root: &Path, trigger: Option<Stall>) -> Pressure {
    let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let memory = text("proc/meminfo");
    let field = |name: &str| meminfo(&memory, name).unwrap_or_default();
    let (zram_used, zram_limit) = zram(root);
    Pressure {
        trigger,
        stalled: stalled(&text(FILE)),
        total: field("MemTotal"),
        available: field("MemAvailable"),
        swap_total: field("SwapTotal"),
        swap_free: field("SwapFree"),
        zram_used,
        zram_limit,
    }
}

/// A line of /proc/meminfo, in KiB.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// `/proc/pressure/memory`; `None` when it is not there, or is something else.
fn stalled(text: &str) -> Option<Stalled> {
    let line = |who: &str| {
        let fields = text.lines().find_map(|line| line.strip_prefix(who))?;
        let field = |name: &str| fields.split_ascii_whitespace().find_map(|field| field.strip_prefix(name));
        let (whole, hundredths) = field("avg10=")?.split_once('.')?;
        let average = whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(hundredths.parse().ok()?)?;
        Some((average, field("total=")?.parse::<u64>().ok()?))
    };
    let (some_avg10, some_total) = line("some ")?;
    let (full_avg10, full_total) = line("full ").unwrap_or_default();
    Some(Stalled { some_avg10, full_avg10, some_total, full_total })
}

/// Over all zram devices with a limit: what they take and may take, in KiB.
fn zram(root: &Path) -> (u64, u64) {
    let devices = fs::read_dir(root.join("sys/block")).into_iter().flatten().flatten();
    let zram = devices.filter(|device| device.file_name().as_encoded_bytes().starts_with(b"zram"));
    zram.filter_map(|device| {
        // orig_data_size, compr_data_size, mem_used_total, mem_limit (zram.rst), in bytes.
        let text = fs::read_to_string(device.path().join("mm_stat")).ok()?;
        let mut fields = text.split_ascii_whitespace().skip(2).map(str::parse::<u64>);
        let (used, limit) = (fields.next()?.ok()?, fields.next()?.ok()?);
        (limit > 0).then_some((used / 1024, limit / 1024))
    })
    .fold((0, 0), |(used, limit), (one, most)| (used.saturating_add(one), limit.saturating_add(most)))
}

#[cfg(test)]
mod tests {
    use mio::{Events, Poll};

    use super::*;

    const PSI: &str = "some avg10=12.07 avg60=0.19 avg300=0.73 total=44737799\n\
                       full avg10=1.50 avg60=0.00 avg300=0.04 total=13857930\n";

    #[test]
    fn a_machine_is_read() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(read_below(root.path(), None), Pressure::default());
        write("proc/pressure/memory", PSI);
        write(
            "proc/meminfo",
            "MemTotal:        3000000 kB\nMemFree: 1 kB\nMemAvailable:     400000 kB\nSwapTotal: 2000000 kB\nSwapFree:  500 kB\n",
        );
        write("sys/block/zram0/mm_stat", "8192000 1024000 2048000 4096000 2048000 7 0 0 0\n");
        write("sys/block/zram1/mm_stat", "8192000 1024000 2048000 0 2048000 7 0 0 0\n");
        write("sys/block/zram2/mm_stat", "odd\n");
        write("sys/block/sda/mm_stat", "1 1 1048576 1048576\n");
        let expected = Pressure {
            trigger: Some(Stall::Severe),
            stalled: Some(Stalled {
                some_avg10: 1207,
                full_avg10: 150,
                some_total: 44_737_799,
                full_total: 13_857_930,
            }),
            total: 3_000_000,
            available: 400_000,
            swap_total: 2_000_000,
            swap_free: 500,
            zram_used: 2000,
            zram_limit: 4000,
        };
        assert_eq!(read_below(root.path(), Some(Stall::Severe)), expected);
    }

    #[test]
    fn odd_files_say_nothing() {
        for text in ["", "some", "some avg10=1 total=5", "some avg10=1.00 avg60=0.00", "full avg10=1.00 total=1"] {
            assert_eq!(stalled(text), None, "{text:?}");
        }
        let huge = format!("some avg10={}.00 total=1", u32::MAX);
        assert_eq!(stalled(&huge), None);
        // As kernels before 5.13 have it for the processor.
        assert_eq!(stalled("some avg10=1.00 total=5\n").unwrap().full_total, 0);
        assert_eq!(meminfo("MemTotal: many kB", "MemTotal"), None);
    }

    #[test]
    fn a_kernel_without_it_is_no_trouble() {
        let root = tempfile::tempdir().unwrap();
        let poll = Poll::new().unwrap();
        let triggers = Triggers::below(root.path(), &PressureSettings::default(), poll.registry(), 16);
        assert!(!triggers.is_watching());
        assert_eq!(triggers.stall(Token(16)), None);
    }

    /// With the rights this test has, or without: one of the windows is taken by a kernel that has triggers for this user.
    #[test]
    fn the_real_kernel_takes_a_trigger() {
        let text = fs::read_to_string("/proc/pressure/memory").unwrap_or_default();
        if stalled(&text).is_none() {
            println!("skipped: this kernel has no pressure information");
            return;
        }
        let reading = read(None);
        assert!(reading.total > 0 && reading.available <= reading.total, "{reading:?}");
        let mut poll = Poll::new().unwrap();
        match Triggers::open(Path::new("/"), &PressureSettings::default(), poll.registry(), 16) {
            Ok(triggers) => {
                assert!(triggers.is_watching());
                assert_eq!(triggers.stall(Token(15)), None);
                assert_eq!(triggers.stall(Token(16)), Some(Stall::Moderate));
                assert_eq!(triggers.stall(Token(18)), Some(Stall::Severe));
                assert_eq!(triggers.stall(Token(19)), None);
                poll.poll(&mut Events::with_capacity(4), Some(Duration::from_millis(1))).unwrap();
            }
            Err(error) => {
                // Before Linux 6.4 it takes CAP_SYS_RESOURCE.
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
                println!("skipped: this user may not have triggers");
            }
        }
    }
}
