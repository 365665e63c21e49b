//! Leases as their holders see them.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    os::fd::OwnedFd,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use zbus::{Connection, Variant, block_on};

/// A lease and its number.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) fd: OwnedFd,
    pub(crate) id: u32,
}

/// What may be given with a wish.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options<'a> {
    pub(crate) seconds: Option<u32>,
    pub(crate) service: Option<&'a str>,
}

/// Asks for a lease; else the name of the error, and its text.
pub(crate) fn take(
    connection: &Connection,
    kind: &str,
    reason: &str,
    options: Options<'_>,
) -> Result<Lease, (String, String)> {
    let mut dict: HashMap<&str, Variant<'_>> = HashMap::new();
    dict.extend(options.seconds.map(|seconds| ("seconds", Variant::from(seconds))));
    dict.extend(options.service.map(|service| ("service", Variant::from(service))));
    let (name, path, interface) = ("org.nightporter1", "/org/nightporter1", "org.nightporter1.App");
    let wish = (kind, reason, dict);
    match block_on(connection.call_method(Some(name), path, Some(interface), "Lease", &wish)) {
        Ok(reply) => {
            let (fd, id): (zbus::OwnedFd, u32) = reply.body().deserialize().unwrap();
            Ok(Lease { fd: fd.into(), id })
        }
        Err(zbus::Error::MethodError(name, text, _)) => Err((name.to_string(), text.unwrap_or_default())),
        // Those of the bus have a type of their own, and print like this.
        Err(error) => {
            let text = error.to_string();
            Err(text.split_once(": ").map(|(name, text)| (name.to_owned(), text.to_owned())).unwrap())
        }
    }
}

impl Lease {
    /// Waits until it is taken away: then it can be read to its end.
    pub(crate) fn wait_taken(self) {
        assert_eq!(std::fs::File::from(self.fd).read(&mut [0]).unwrap(), 0);
    }
}

/// A process of its own that does as it is told, a word a line, and says what came of it.
pub(crate) struct Puppet {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Puppet {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, stdin, stdout }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it do something.
    pub(crate) fn tell(&mut self, word: &str) {
        writeln!(self.stdin, "{word}").unwrap();
    }

    /// Waits until it says a line that begins with this, and gives back the rest.
    pub(crate) fn hear(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.stdout.read_line(&mut line).unwrap() > 0, "it ended without saying {word}");
            // The harness around it speaks as well, on the same line perhaps.
            if let Some((_, rest)) = line.split_once(&format!("puppet: {word}")) {
                return rest.trim().to_owned();
            }
        }
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}

/// The puppet's part: takes a lease over `connection` for what the environment says, and does as it is told.
#[expect(clippy::print_stdout, reason = "what the other side reads")]
pub(crate) fn play(connection: &Connection) {
    let service = std::env::var("PUPPET_SERVICE").ok();
    let options = Options { service: service.as_deref(), ..Options::default() };
    let mut held = None;
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "take" => {
                let lease = take(connection, "transfer", "upload of 3 photos", options).unwrap();
                println!("puppet: taken {}", lease.id);
                held = Some(lease);
            }
            "close" => held = None,
            "wait" => {
                held.take().unwrap().wait_taken();
                println!("puppet: over");
            }
            other => panic!("{other}"),
        }
    }
}
