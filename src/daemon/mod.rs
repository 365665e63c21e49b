//! The shell: one mio loop, the only code that knows both halves. It translates, it does not decide.

mod options;
mod shell;
mod sightings;
mod watchdog;

use std::{io, path::PathBuf};

pub use self::options::{HELP, Options, Task};
use self::shell::Shell;
use crate::{
    config::ConfigError,
    core::Core,
    sys::{clock, process, store::StoreOpenError},
};

/// Why the daemon could not start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A wrong command line.
    #[error("{0}\nTry 'nightporterd --help'.")]
    Usage(String),
    /// The configuration file could not be read.
    #[error("cannot read {}: {}", .0.display(), .1)]
    ConfigUnreadable(PathBuf, io::Error),
    /// The configuration file is not valid.
    #[error("{}: {}", .0.display(), .1)]
    Config(PathBuf, ConfigError),
    /// No directory for a purpose.
    #[error("no {0} directory: set {1}")]
    NoDirectory(&'static str, &'static str),
    /// No session bus to serve.
    #[error("no session bus: DBUS_SESSION_BUS_ADDRESS is not set; run inside a session, or through dbus-run-session")]
    NoSessionBus,
    /// The store could not be opened.
    #[error(transparent)]
    Store(#[from] StoreOpenError),
    /// The operating system refused something the daemon cannot do without.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

impl DaemonError {
    /// The exit code of sysexits.h that says this.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 64,
            Self::ConfigUnreadable(..) => 66,
            Self::NoSessionBus => 69,
            Self::System(..) => 71,
            Self::NoDirectory(..) => 73,
            Self::Store(error) => error.exit_code(),
            Self::Config(..) => 78,
        }
    }
}

/// Serves until it is asked to end.
///
/// # Errors
/// [`DaemonError`] when it cannot start.
pub fn run(options: &Options) -> Result<(), DaemonError> {
    let (settings, path) = options.settings()?;
    match path {
        Some(path) => log::info!("configuration: {}", path.display()),
        None => log::info!("no configuration file: defaults"),
    }
    let runtime_dir = options.runtime_dir()?;
    let (mut shell, snapshot) = Shell::new(options, &settings, &options.state_dir()?, runtime_dir)?;
    let mut seed = [0; 32];
    fill_random(&mut seed).map_err(|error| DaemonError::System("cannot get random numbers", error))?;
    let mut core = Core::new(settings, seed, snapshot, clock::now());
    let result = shell.run(&mut core);
    shell.end();
    result
}

/// Reads the configuration and reports on it.
///
/// # Errors
/// [`DaemonError`] with what is wrong.
pub fn check_config(options: &Options) -> Result<String, DaemonError> {
    let (settings, path) = options.settings()?;
    let names: Vec<&str> = settings.upstreams.iter().map(|upstream| &*upstream.name).collect();
    let place = path.map_or_else(|| "defaults".into(), |path| path.display().to_string());
    Ok(format!("{place}: valid (upstreams: {})", names.join(", ")))
}

/// Thaws what an earlier life left frozen.
///
/// # Errors
/// [`DaemonError::NoDirectory`] when it cannot be known where to look.
pub fn thaw_all(options: &Options) -> Result<String, DaemonError> {
    Ok(process::thaw_leftovers(&options.runtime_dir()?).to_string())
}

fn fill_random(seed: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = seed.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
