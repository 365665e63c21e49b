//! What the tests of `demo` and `measure` share: both start a world of processes below a directory of their own, and have
//! to leave nothing of it.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output},
};

use rustix::process::{Pid, Signal, kill_process};

pub(crate) fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whatever still runs on behalf of the demo below `dir`.
pub(crate) fn left_behind(dir: &Path) -> Vec<String> {
    let needle = dir.to_str().unwrap().as_bytes();
    let mentions = |path: std::path::PathBuf| {
        fs::read(path).is_ok_and(|content| content.windows(needle.len()).any(|window| window == needle))
    };
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()))
        .filter(|entry| mentions(entry.path().join("cmdline")) || mentions(entry.path().join("environ")))
        .map(|entry| {
            format!("{:?} {}", entry.file_name(), text(&fs::read(entry.path().join("cmdline")).unwrap_or_default()))
        })
        .collect()
}

pub(crate) fn assert_clean(dir: &Path) {
    assert_eq!(left_behind(dir), Vec::<String>::new(), "processes were left behind");
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0, "files were left behind");
}

pub(crate) fn interrupt(child: &Child) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
}
