//! A private dbus-daemon, for those who write its configuration.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

/// A real dbus-daemon. It ends with this.
pub(crate) struct Daemon {
    child: Option<Child>,
    dir: TempDir,
}

impl Daemon {
    /// With the configuration `bus.conf` in the directory, where its socket is to be; not started yet.
    pub(crate) fn configured(dir: TempDir) -> Self {
        Self { child: None, dir }
    }

    pub(crate) fn start(&mut self) {
        let _ = fs::remove_file(self.path("socket"));
        let mut child = Command::new("dbus-daemon")
            .args(["--nofork", "--print-address", "--config-file"])
            .arg(self.path("bus.conf"))
            .stdout(Stdio::piped())
            // It tells of every start there, and of limits a container does not let it raise.
            .stderr(Stdio::null())
            .spawn()
            .expect("dbus-daemon must be installed");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("unix:"), "dbus-daemon said {line:?}");
        self.child = Some(child);
    }

    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(crate) fn address(&self) -> String {
        format!("unix:path={}", self.path("socket").display())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}
