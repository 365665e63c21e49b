//! The daemon's entry point.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program's own words to its caller")]

use std::{env, process::ExitCode};

use nightporter::{
    daemon::{self, DaemonError, HELP, Task},
    sys::{logger, memory},
};

fn main() -> ExitCode {
    memory::tune();
    match perform() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nightporterd: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn perform() -> Result<(), DaemonError> {
    match Task::parse(env::args_os().skip(1))? {
        Task::Run(options) => {
            logger::init();
            daemon::run(&options)?;
        }
        Task::CheckConfig(options) => println!("{}", daemon::check_config(&options)?),
        Task::ThawAll(options) => {
            logger::init();
            println!("{}", daemon::thaw_all(&options)?);
        }
        Task::Version => println!("nightporterd {}", env!("CARGO_PKG_VERSION")),
        Task::Help => print!("{HELP}"),
    }
    Ok(())
}
