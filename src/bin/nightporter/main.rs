//! `nightporter`: asks the daemon over D-Bus, sends test messages, runs the demo.

mod agent;
mod args;
mod client;
mod demo;
mod doctor;
mod exit;
mod lab;
mod log;
mod man;
mod measure;
mod push;
mod render;
mod resolve;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{CommandFactory, Parser, error::ErrorKind};
use nightporter::view;

use crate::{
    args::{Cli, Command, Move, OneApp},
    client::Daemon,
    exit::{Exit, Failure},
    render::Style,
};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    if let Command::Doctor(output) = &cli.command {
        let (text, end) = doctor::run(cli.bus, *output, Style::of_stdout());
        return print(&text, end);
    }
    match run(cli) {
        Ok(text) => print(&text, ExitCode::SUCCESS),
        Err(failure) => {
            // Nothing is left to do when stderr is closed.
            let _ = writeln!(io::stderr(), "nightporter: {failure}");
            failure.exit.into()
        }
    }
}

/// Does the command and gives back what to print.
fn run(cli: Cli) -> Result<String, Failure> {
    let daemon = || Daemon::find(cli.bus);
    let style = Style::of_stdout();
    match cli.command {
        Command::Status(output) => {
            let text = daemon()?.ask("Status", None)?;
            if output.json { Ok(line(text)) } else { Ok(render::status(&client::decode::<view::Status>(&text)?)) }
        }
        Command::Apps(output) => {
            let text = daemon()?.ask("Apps", None)?;
            if output.json { Ok(line(text)) } else { Ok(render::apps(&client::decode::<Vec<view::App>>(&text)?)) }
        }
        Command::Show(OneApp { app, output }) => {
            let text = ask_about(&daemon()?, "Show", &app)?;
            if output.json { Ok(line(text)) } else { Ok(render::show(&client::decode::<view::Show>(&text)?)) }
        }
        Command::Why(OneApp { app, output }) => {
            let text = ask_about(&daemon()?, "Why", &app)?;
            if output.json { Ok(line(text)) } else { Ok(render::why(&client::decode::<view::Why>(&text)?)) }
        }
        Command::Log(args) => log::run(&daemon()?, &args),
        Command::Report(output) => {
            let text = daemon()?.ask("Report", None)?;
            if output.json {
                Ok(line(text))
            } else {
                Ok(render::report(&client::decode::<view::Report>(&text)?, style))
            }
        }
        Command::Freeze(app) => act(&daemon()?, "Freeze", "frozen", &app),
        Command::Thaw(app) => act(&daemon()?, "Thaw", "thawed", &app),
        Command::Kill(app) => act(&daemon()?, "Kill", "ended; the next push starts it again", &app),
        Command::Leases { app, output } => {
            let daemon = daemon()?;
            let app = app.map(|app| resolve::app(&daemon, &app)).transpose()?;
            let text = daemon.ask("Leases", Some(app.as_deref().unwrap_or_default()))?;
            if output.json { Ok(line(text)) } else { Ok(render::leases(&client::decode::<Vec<view::Lease>>(&text)?)) }
        }
        Command::EndLease { id, output } => {
            daemon()?.end_lease(id)?;
            Ok(match output.json {
                true => line(serde_json::json!({ "lease": id, "done": true }).to_string()),
                false => format!("Lease {id}: taken away\n"),
            })
        }
        Command::Move(args) => relocate(&daemon()?, &args),
        Command::ForgetUser { uid } => {
            daemon()?.forget_user(uid)?;
            Ok(format!("User {uid}: forgotten\n"))
        }
        Command::Push(args) => push::run(&daemon()?, &args),
        Command::Doctor(output) => Ok(doctor::run(cli.bus, output, style).0),
        Command::Demo(args) => demo::run(&args),
        Command::Measure(args) => measure::run(&args),
        Command::MeasureBallast(args) => measure::ballast(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "nightporter", &mut script);
            String::from_utf8(script).map_err(|error| Failure::new(Exit::Failed, error.to_string()))
        }
        Command::Man => man::page(),
    }
}

fn ask_about(daemon: &Daemon, method: &str, app: &str) -> Result<String, Failure> {
    daemon.ask(method, Some(&resolve::app(daemon, app)?))
}

fn act(daemon: &Daemon, method: &str, done: &str, args: &OneApp) -> Result<String, Failure> {
    let app = resolve::app(daemon, &args.app)?;
    daemon.act(method, &app)?;
    Ok(match args.output.json {
        true => line(serde_json::json!({ "app": app, "done": true }).to_string()),
        false => format!("{app}: {done}\n"),
    })
}

fn relocate(daemon: &Daemon, args: &Move) -> Result<String, Failure> {
    let app = args.app.as_deref().map(|app| resolve::app(daemon, app)).transpose()?;
    daemon.relocate(app.as_deref(), &args.upstream)?;
    let Move { upstream, .. } = args;
    Ok(match (args.output.json, app) {
        (true, app) => line(serde_json::json!({ "app": app, "upstream": upstream, "done": true }).to_string()),
        (false, Some(app)) => format!("{app}: {upstream} from now on; it is told its new endpoint\n"),
        (false, None) => format!("All apps: {upstream} from now on; they are told their new endpoints\n"),
    })
}

fn line(mut text: String) -> String {
    text.push('\n');
    text
}

/// Prints `text` and ends with `end`, unless that fails.
fn print(text: &str, end: ExitCode) -> ExitCode {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => end,
        // The reader has seen enough (`nightporter apps | head -1`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => end,
        Err(error) => {
            let _ = writeln!(io::stderr(), "nightporter: cannot write the result: {error}");
            Exit::System.into()
        }
    }
}

fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ => Exit::Usage.into(),
    }
}
