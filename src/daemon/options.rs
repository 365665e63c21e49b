//! The daemon's command line and where its files are.

use std::{
    env,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use lexopt::{Arg, Parser, ValueExt};

use super::DaemonError;
use crate::config::Settings;

/// What `nightporterd` was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Serve.
    Run(Options),
    /// Read the configuration and say whether it is valid.
    CheckConfig(Options),
    /// Thaw what an earlier life left frozen (`ExecStopPost=`).
    ThawAll(Options),
    /// Print the version.
    Version,
    /// Print how to call it.
    Help,
}

/// Options of `nightporterd`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Serve this session's bus without privileges instead of the system.
    pub user: bool,
    /// Configuration file; must exist when given.
    pub config: Option<PathBuf>,
    /// Where the database is.
    pub state_dir: Option<PathBuf>,
}

/// `--help`.
pub const HELP: &str = "\
Usage: nightporterd [OPTIONS]

One push connection for all apps; apps nobody looks at are frozen, paged out and ended, and brought back by a push.

Options:
      --user             Serve this session's bus (DBUS_SESSION_BUS_ADDRESS) instead of the system
      --config FILE      Read FILE instead of nightporter.toml in $XDG_CONFIG_HOME/nightporter (--user)
                         or /etc/nightporter
      --state-dir DIR    Keep the database in DIR
      --check-config     Read the configuration, say whether it is valid, and end
      --thaw-all         Thaw whatever an earlier life left frozen, and end
  -V, --version          Print the version
  -h, --help             Print this help

NIGHTPORTER_LOG sets what is logged: error, warn, info (default), debug, trace.
";

impl Task {
    /// Reads the command line (without the program's name).
    ///
    /// # Errors
    /// [`DaemonError::Usage`].
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, DaemonError> {
        let usage = |error: lexopt::Error| DaemonError::Usage(error.to_string());
        let mut options = Options::default();
        let mut task: fn(Options) -> Self = Self::Run;
        let mut parser = Parser::from_args(args);
        while let Some(arg) = parser.next().map_err(usage)? {
            match arg {
                Arg::Long("user") => options.user = true,
                Arg::Long("config") => options.config = Some(path(parser.value().map_err(usage)?)?),
                Arg::Long("state-dir") => options.state_dir = Some(path(parser.value().map_err(usage)?)?),
                Arg::Long("check-config") => task = Self::CheckConfig,
                Arg::Long("thaw-all") => task = Self::ThawAll,
                Arg::Short('V') | Arg::Long("version") => return Ok(Self::Version),
                Arg::Short('h') | Arg::Long("help") => return Ok(Self::Help),
                Arg::Value(value) => {
                    return Err(DaemonError::Usage(format!(
                        "unexpected argument {:?}",
                        value.string().unwrap_or_default()
                    )));
                }
                Arg::Short(_) | Arg::Long(_) => return Err(usage(arg.unexpected())),
            }
        }
        Ok(task(options))
    }
}

impl Options {
    /// Reads and checks the configuration. Without `--config`, a file that is not there means the defaults.
    ///
    /// # Errors
    /// [`DaemonError::ConfigUnreadable`] or [`DaemonError::Config`].
    pub fn settings(&self) -> Result<(Settings, Option<PathBuf>), DaemonError> {
        let candidates = match &self.config {
            Some(path) => vec![path.clone()],
            None => self.default_configs(),
        };
        for path in candidates {
            let text = match fs::read_to_string(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound && self.config.is_none() => continue,
                Err(error) => return Err(DaemonError::ConfigUnreadable(path, error)),
            };
            let settings = Settings::parse(&text).map_err(|error| DaemonError::Config(path.clone(), error))?;
            return Ok((settings, Some(path)));
        }
        Ok((Settings::default(), None))
    }

    fn default_configs(&self) -> Vec<PathBuf> {
        let system = PathBuf::from("/etc/nightporter/nightporter.toml");
        let user = xdg("XDG_CONFIG_HOME", ".config").filter(|_| self.user);
        user.map(|dir| dir.join("nightporter/nightporter.toml")).into_iter().chain([system]).collect()
    }

    /// Where the database is: `--state-dir`, `$STATE_DIRECTORY` (systemd.exec(5)), `$XDG_STATE_HOME/nightporter` for a
    /// user, `/var/lib/nightporter` for the system.
    ///
    /// # Errors
    /// [`DaemonError::NoDirectory`].
    pub fn state_dir(&self) -> Result<PathBuf, DaemonError> {
        if let Some(dir) = self.state_dir.clone().or_else(|| systemd_dir("STATE_DIRECTORY")) {
            return Ok(dir);
        }
        if !self.user {
            return Ok(PathBuf::from("/var/lib/nightporter"));
        }
        xdg("XDG_STATE_HOME", ".local/state")
            .map(|dir| dir.join("nightporter"))
            .ok_or(DaemonError::NoDirectory("state", "HOME or XDG_STATE_HOME, or give --state-dir"))
    }

    /// Where the record of what is frozen is kept: it must survive this process but not a reboot. With `--state-dir` it
    /// is below that, so that two daemons never share one.
    ///
    /// # Errors
    /// [`DaemonError::NoDirectory`].
    pub fn runtime_dir(&self) -> Result<PathBuf, DaemonError> {
        if let Some(dir) = &self.state_dir {
            return Ok(dir.join("run"));
        }
        if let Some(dir) = systemd_dir("RUNTIME_DIRECTORY") {
            return Ok(dir);
        }
        if !self.user {
            return Ok(PathBuf::from("/run/nightporter"));
        }
        match env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute()) {
            Some(dir) => Ok(dir.join("nightporter")),
            None => self.state_dir().map(|dir| dir.join("run")),
        }
    }
}

fn path(value: OsString) -> Result<PathBuf, DaemonError> {
    let path = PathBuf::from(value);
    if path.as_os_str().is_empty() {
        return Err(DaemonError::Usage("a path must not be empty".into()));
    }
    std::path::absolute(&path).map_err(|error| DaemonError::Usage(format!("{}: {error}", path.display())))
}

/// The first of the directories systemd made for the service (they are separated by colons).
fn systemd_dir(variable: &str) -> Option<PathBuf> {
    let value = env::var_os(variable)?;
    env::split_paths(&value).next().filter(|dir| dir.is_absolute())
}

fn xdg(variable: &str, below_home: &str) -> Option<PathBuf> {
    let given = env::var_os(variable).map(PathBuf::from).filter(|dir| dir.is_absolute());
    given.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(below_home)).filter(|dir| dir.is_absolute()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Task, DaemonError> {
        Task::parse(args.iter().map(OsString::from))
    }

    #[test]
    fn options_are_read() {
        let options = Options { user: true, config: Some("/c.toml".into()), state_dir: Some("/s".into()) };
        assert_eq!(parse(&["--user", "--config", "/c.toml", "--state-dir=/s"]).unwrap(), Task::Run(options));
        assert_eq!(parse(&["--check-config"]).unwrap(), Task::CheckConfig(Options::default()));
        assert_eq!(parse(&["-V"]).unwrap(), Task::Version);
    }

    #[test]
    fn what_is_not_an_option_is_named() {
        for args in [&["--colour"][..], &["word"], &["--config"], &["-x"], &["--config", ""]] {
            assert!(matches!(parse(args), Err(DaemonError::Usage(_))), "{args:?}");
        }
    }

    #[test]
    fn a_state_dir_of_its_own_has_a_runtime_dir_of_its_own() {
        let options = Options { state_dir: Some("/s".into()), ..Options::default() };
        assert_eq!(options.state_dir().unwrap(), Path::new("/s"));
        assert_eq!(options.runtime_dir().unwrap(), Path::new("/s/run"));
    }
}
