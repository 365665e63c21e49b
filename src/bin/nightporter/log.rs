//! `nightporter log`: the latest decisions about all apps.

use std::{
    io::{self, Write},
    thread,
    time::Duration,
};

use nightporter::view;

use crate::{
    args::Log,
    client::{self, Daemon},
    exit::{Exit, Failure},
    render, resolve,
};

/// Between two questions while following. The daemon is woken as often, so nobody leaves it running for long.
const PAUSE: Duration = Duration::from_secs(1);

/// Does the command and gives back what to print; with `--follow` it prints by itself until it is interrupted.
pub(crate) fn run(daemon: &Daemon, args: &Log) -> Result<String, Failure> {
    let app = args.app.as_deref().map(|app| resolve::app(daemon, app)).transpose()?;
    let ask = |after| -> Result<view::Log, Failure> {
        let mut log: view::Log = client::decode(&daemon.log(after)?)?;
        log.entries.retain(|entry| app.as_ref().is_none_or(|app| entry.name == *app));
        Ok(log)
    };
    let mut log = ask(0)?;
    if !args.follow {
        return if args.output.json { json(&log) } else { Ok(render::log(&log)) };
    }
    loop {
        for entry in &log.entries {
            let text = if args.output.json { json(entry)? } else { render::log_line(entry) };
            match io::stdout().lock().write_all(text.as_bytes()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(String::new()),
                Err(error) => return Err(Failure::new(Exit::System, format!("cannot write: {error}"))),
            }
        }
        thread::sleep(PAUSE);
        log = ask(log.latest)?;
    }
}

fn json(document: &impl serde::Serialize) -> Result<String, Failure> {
    let text = serde_json::to_string(document).map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    Ok(text + "\n")
}
