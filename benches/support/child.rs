//! Processes that end with the benchmark.

use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{self, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use super::Result;

/// A child whose first line of output was read, and which is killed when dropped.
pub(crate) struct Child {
    child: process::Child,
    /// The first line it printed; empty when it was not asked for one.
    pub(crate) first_line: String,
}

impl Child {
    /// Starts `command` and, if `says` is set, waits up to 20 s for its first line.
    pub(crate) fn start(command: &mut Command, says: bool) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let stdout = if says { Stdio::piped() } else { Stdio::null() };
        let child =
            command.stdin(Stdio::null()).stdout(stdout).spawn().map_err(|e| format!("cannot start {name}: {e}"))?;
        // From here on dropping it ends it.
        let mut this = Self { child, first_line: String::new() };
        if let Some(stdout) = this.child.stdout.take() {
            let (sender, line) = mpsc::channel();
            thread::spawn(move || {
                let mut stdout = BufReader::new(stdout);
                let mut first = String::new();
                let read = stdout.read_line(&mut first);
                let _ = sender.send(read.map(|_| first));
                // Kept open and drained, so that it never blocks nor gets SIGPIPE.
                let _ = std::io::copy(&mut stdout.by_ref(), &mut std::io::sink());
            });
            let line = line.recv_timeout(Duration::from_secs(20)).map_err(|_| format!("{name} says nothing"))??;
            if line.trim().is_empty() {
                return Err(format!("{name} ended at once").into());
            }
            line.trim().clone_into(&mut this.first_line);
        }
        Ok(this)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, once it ended.
    pub(crate) fn ended(&mut self) -> Result<Option<process::ExitStatus>> {
        Ok(self.child.try_wait()?)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Builds the example `name` with the flags of the release and tells where it is. Cargo builds the examples with all
/// benchmarks, but not with one of them.
pub(crate) fn example(name: &str) -> Result<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--locked", "--message-format=json", "--example", name])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("cannot build the example {name}").into());
    }
    let executable = |message: serde_json::Value| {
        let ours = message["target"]["kind"][0] == "example" && message["target"]["name"] == name;
        if ours { message["executable"].as_str().map(PathBuf::from) } else { None }
    };
    String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .find_map(executable)
        .ok_or_else(|| format!("cargo does not tell where the example {name} is").into())
}
