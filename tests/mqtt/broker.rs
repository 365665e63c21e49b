//! The real mosquitto on a loopback port, its publisher, and a front that knows MQTT 3.1.1 only.

use std::{
    env, fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const START: Duration = Duration::from_secs(20);

/// A running mosquitto; ends when dropped.
pub(crate) struct Broker {
    program: PathBuf,
    dir: tempfile::TempDir,
    address: SocketAddr,
    child: Option<Child>,
}

impl Broker {
    /// Starts one that keeps its sessions on disk. `settings` are further lines of its configuration, with `{dir}` for a
    /// directory of its own.
    pub(crate) fn start(settings: &str) -> Self {
        Self::start_with(settings, |_| {})
    }

    /// The same, after `prepare` has had the directory.
    pub(crate) fn start_with(settings: &str, prepare: impl Fn(&Path)) -> Self {
        Self::start_on(Ipv4Addr::LOCALHOST, settings, prepare)
    }

    /// The same on another address of this machine.
    pub(crate) fn start_on(host: Ipv4Addr, settings: &str, prepare: impl Fn(&Path)) -> Self {
        let program = program();
        let mut last = None;
        // Another process may take the port between our looking and the broker's listening.
        for _ in 0..5 {
            let dir = tempfile::tempdir().unwrap();
            prepare(dir.path());
            let address = TcpListener::bind((host, 0)).unwrap().local_addr().unwrap();
            let at = dir.path().display();
            let anonymous = if settings.contains("allow_anonymous") { "" } else { "allow_anonymous true\n" };
            let text = format!(
                "user root\nlistener {} {host}\n{anonymous}persistence true\npersistence_location {at}/\n\
                 autosave_interval 1\nautosave_on_changes true\nlog_dest file {at}/log\nlog_type all\n\
                 max_queued_messages 0\n{}\n",
                address.port(),
                settings.replace("{dir}", &at.to_string())
            );
            fs::write(dir.path().join("mosquitto.conf"), text).unwrap();
            let mut broker = Self { program: program.clone(), dir, address, child: None };
            match broker.try_start() {
                Ok(()) => return broker,
                Err(error) => last = Some(error),
            }
        }
        panic!("mosquitto does not start: {last:?}");
    }

    /// Asks it to end, which makes it write its sessions.
    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
            child.wait().unwrap();
        }
    }

    /// Starts it again on the same port.
    pub(crate) fn start_again(&mut self) {
        let until = Instant::now() + START;
        while let Err(error) = self.try_start() {
            assert!(Instant::now() < until, "mosquitto does not start again: {error}");
        }
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) const fn port(&self) -> u16 {
        self.address.port()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Publishes with QoS 1; returns when the broker has it.
    pub(crate) fn publish(&self, topic: &str, body: &str, more: &[&str]) {
        let status = self.publisher(topic, more).args(["-m", body]).status().unwrap();
        assert!(status.success(), "mosquitto_pub {more:?}: {status}");
    }

    /// Publishes each line.
    pub(crate) fn publish_lines(&self, topic: &str, lines: impl Iterator<Item = String>) {
        let mut child = self.publisher(topic, &[]).arg("-l").stdin(Stdio::piped()).spawn().unwrap();
        let text: Vec<String> = lines.collect();
        child.stdin.take().unwrap().write_all((text.join("\n") + "\n").as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    }

    fn publisher(&self, topic: &str, more: &[&str]) -> Command {
        let mut command = Command::new("mosquitto_pub");
        command.args([
            "-V",
            "5",
            "-h",
            &self.address.ip().to_string(),
            "-p",
            &self.port().to_string(),
            "-q",
            "1",
            "-t",
            topic,
        ]);
        command.args(more).stdin(Stdio::null());
        command
    }

    fn try_start(&mut self) -> io::Result<()> {
        // Whoever answers at the port may be another test's.
        let running = |log: String| log.matches(" running").count();
        let before = running(self.log());
        let mut child = Command::new(&self.program)
            .arg("-c")
            .arg(self.dir.path().join("mosquitto.conf"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let until = Instant::now() + START;
        loop {
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("ended with {status}: {}", self.log())));
            }
            if running(self.log()) > before && TcpStream::connect(self.address()).is_ok() {
                self.child = Some(child);
                return Ok(());
            }
            if Instant::now() > until {
                let _ = child.kill();
                let _ = child.wait();
                return Err(io::Error::other("does not listen in time"));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Whatever `tests/setup/mosquitto` provides.
pub(crate) fn program() -> PathBuf {
    if let Some(given) = env::var_os("NIGHTPORTER_TEST_MOSQUITTO").filter(|given| !given.is_empty()) {
        return PathBuf::from(given);
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/setup/mosquitto");
    let output = Command::new(&script).stdin(Stdio::null()).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{} failed: these tests need the real mosquitto", script.display());
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// How a broker without version 5 says so.
#[derive(Clone, Copy)]
pub(crate) enum Refusal {
    /// CONNACK with return code 1, in the form of 3.1.1.
    Answer,
    /// It hangs up.
    HangUp,
}

/// Stands in for a broker without version 5: refuses it, and passes everything else on to the real one.
pub(crate) struct OldFront {
    pub(crate) port: u16,
    pub(crate) refused: Arc<AtomicUsize>,
}

impl OldFront {
    pub(crate) fn start(broker: u16, refusal: Refusal) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let refused = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&refused);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let count = Arc::clone(&count);
                thread::spawn(move || serve(stream, broker, refusal, &count));
            }
        });
        Self { port, refused }
    }
}

fn serve(mut stream: TcpStream, broker: u16, refusal: Refusal, count: &AtomicUsize) -> Option<()> {
    let mut bytes = vec![0; 4096];
    let length = stream.read(&mut bytes).ok()?;
    let name = bytes[..length].windows(4).position(|part| part == b"MQTT")?;
    if bytes[name + 4] == 5 {
        count.fetch_add(1, Ordering::Relaxed);
        if matches!(refusal, Refusal::Answer) {
            stream.write_all(&[0x20, 2, 0, 1]).ok()?;
        }
        return None;
    }
    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, broker)).ok()?;
    server.write_all(&bytes[..length]).ok()?;
    let (mut from, mut to) = (server.try_clone().ok()?, stream.try_clone().ok()?);
    let back = thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
    let _ = io::copy(&mut stream, &mut server);
    let _ = server.shutdown(Shutdown::Both);
    back.join().ok()
}
