//! Logging to stderr with the priorities journald reads.

use std::{
    env,
    fmt::{self, Write as _},
    io::Write as _,
    os::fd::AsFd,
};

use env_logger::{Builder, Target, WriteStyle};
use log::{Level, LevelFilter, Record};
use nix::sys::stat::fstat;

use crate::{sys::clock, time::UnixTime};

/// Names the level, or directives as env_logger reads them: `debug`, `nightporter::sys::link=trace`.
const VARIABLE: &str = "NIGHTPORTER_LOG";
/// Libraries whose debug output would show requests with their secrets; to be asked for by name.
const TALKATIVE: [&str; 6] = ["rustls", "tracing", "tungstenite", "ureq", "ureq_proto", "zbus"];

/// Starts logging to stderr. A second call does nothing. A closed stderr loses lines and nothing else.
pub fn init() {
    let journal = env::var("JOURNAL_STREAM").is_ok_and(|stream| is_journal(&stream, &std::io::stderr()));
    let mut builder = Builder::new();
    builder.filter_level(LevelFilter::Info);
    for module in TALKATIVE {
        builder.filter_module(module, LevelFilter::Warn);
    }
    if let Ok(directives) = env::var(VARIABLE) {
        builder.parse_filters(&directives);
    }
    builder.target(Target::Stderr).write_style(WriteStyle::Never).format(move |out, record| {
        let mut line = String::with_capacity(128);
        // A String takes everything.
        let _ = if journal { journal_line(&mut line, record) } else { terminal_line(&mut line, record) };
        out.write_all(line.as_bytes())
    });
    // Err: there is a logger already.
    let _ = builder.try_init();
}

/// systemd.exec(5): `JOURNAL_STREAM` holds device and inode of the stream; a redirected stderr has others.
fn is_journal(stream: &str, fd: &impl AsFd) -> bool {
    let numbers = stream.split_once(':').and_then(|(dev, ino)| Some((dev.parse().ok()?, ino.parse().ok()?)));
    fstat(fd).is_ok_and(|stat| Some((stat.st_dev, stat.st_ino)) == numbers)
}

/// sd-daemon(3).
fn journal_line(line: &mut String, record: &Record<'_>) -> fmt::Result {
    let priority = match record.level() {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    write!(line, "<{priority}>")?;
    write!(Escaped(line), "{}", record.args())?;
    line.write_char('\n')
}

fn terminal_line(line: &mut String, record: &Record<'_>) -> fmt::Result {
    let now: UnixTime = clock::now().wall;
    let time = now.to_string();
    // "2026-11-22T01:39:00Z"
    write!(line, "{} {:5} ", time.get(11..19).unwrap_or(&time), record.level())?;
    write!(Escaped(line), "{}", record.args())?;
    line.write_char('\n')
}

/// Servers' and apps' words end up in the log; none of them may begin a line of its own or steer a terminal.
struct Escaped<'a>(&'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if c.is_control() {
                write!(self.0, "{}", c.escape_default())?;
            } else {
                self.0.push(c);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        process::{Command, Stdio},
    };

    use super::*;

    /// Set in the process that a test starts of itself.
    const CHILD: &str = "NIGHTPORTER_LOGGER_TEST_CHILD";

    #[test]
    fn a_peer_cannot_forge_a_line() {
        let mut line = String::new();
        let record = |level| Record::builder().level(level).target("nightporter").build();
        journal_line(&mut line, &Record::builder().level(Level::Warn).args(format_args!("a\n<0>b\x1b[2J é")).build())
            .unwrap();
        assert_eq!(line, "<4>a\\n<0>b\\u{1b}[2J é\n");
        line.clear();
        terminal_line(&mut line, &record(Level::Info)).unwrap();
        let (time, rest) = line.split_at(8);
        assert!(
            time.bytes().enumerate().all(|(i, b)| if i % 3 == 2 { b == b':' } else { b.is_ascii_digit() }),
            "{line}"
        );
        assert_eq!(rest, " INFO  \n");
    }

    #[test]
    fn the_journal_is_known_by_device_and_inode() {
        let file = tempfile::tempfile().unwrap();
        let stat = fstat(&file).unwrap();
        assert!(is_journal(&format!("{}:{}", stat.st_dev, stat.st_ino), &file));
        assert!(!is_journal(&format!("{}:{}", stat.st_dev, stat.st_ino + 1), &file));
        assert!(!is_journal("rubbish", &file));
    }

    /// In a process of its own: the logger is one per process, and stderr is closed at the far end.
    #[test]
    fn a_closed_stderr_does_not_panic() {
        if env::var_os(CHILD).is_some() {
            return logs_into_nothing();
        }
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "sys::logger::tests::a_closed_stderr_does_not_panic", "--nocapture"])
            .env(VARIABLE, "debug")
            .env(CHILD, "1")
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stderr.take());
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(child.wait().unwrap().success() && text.contains("1 passed"), "{text}");
    }

    fn logs_into_nothing() {
        init();
        init();
        for _ in 0..1000 {
            log::debug!("nobody reads this");
        }
        assert!(log::log_enabled!(Level::Debug));
        assert!(!log::log_enabled!(target: "ureq", Level::Debug));
    }
}
