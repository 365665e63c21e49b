//! The real ntfy server on a loopback port, and a publisher. Shared with `benches/latency.rs`.

use std::{
    env,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const START: Duration = Duration::from_secs(20);

/// A running ntfy; ends when dropped.
pub(crate) struct Ntfy {
    program: PathBuf,
    dir: tempfile::TempDir,
    address: SocketAddr,
    child: Option<Child>,
}

impl Ntfy {
    /// Starts one with its stored messages on disk. `settings` are further lines of its `server.yml`, with
    /// `{dir}` for a directory of its own.
    pub(crate) fn start(settings: &str) -> Self {
        Self::start_on(Ipv4Addr::LOCALHOST, settings)
    }

    /// The same on another address of this machine.
    pub(crate) fn start_on(host: Ipv4Addr, settings: &str) -> Self {
        let program = program();
        let mut last = None;
        // Another process may take the port between our looking and ntfy's listening.
        for _ in 0..5 {
            let dir = tempfile::tempdir().unwrap();
            let address = TcpListener::bind((host, 0)).unwrap().local_addr().unwrap();
            let at = dir.path().display();
            let text = format!(
                "base-url: \"http://{address}\"\nlisten-http: \"{address}\"\ncache-file: \"{at}/cache.db\"\n\
                 attachment-cache-dir: \"{at}/attachments\"\nlog-file: \"{at}/ntfy.log\"\nbehind-proxy: true\n\
                 web-root: disable\n{}\n",
                settings.replace("{dir}", &at.to_string())
            );
            fs::write(dir.path().join("server.yml"), text).unwrap();
            let mut ntfy = Self { program: program.clone(), dir, address, child: None };
            match ntfy.try_start() {
                Ok(()) => return ntfy,
                Err(error) => last = Some(error),
            }
        }
        panic!("ntfy does not start: {last:?}");
    }

    /// Kills it as a crash would; stored messages stay.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Starts it again on the same port.
    pub(crate) fn start_again(&mut self) {
        let until = Instant::now() + START;
        while let Err(error) = self.try_start() {
            assert!(Instant::now() < until, "ntfy does not start again: {error}");
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// What it has logged; with `log-level: debug` every connection.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("ntfy.log")).unwrap_or_default()
    }

    /// One of its other commands, such as `user add`; gives what it prints.
    pub(crate) fn command(&self, arguments: &[&str], password: &str) -> String {
        let (name, rest) = arguments.split_first().unwrap();
        let mut command = Command::new(&self.program);
        command.arg(name).arg("--config").arg(self.dir.path().join("server.yml")).args(rest);
        let output = command.env("NTFY_PASSWORD", password).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "ntfy {arguments:?}: {said}");
        said
    }

    fn try_start(&mut self) -> io::Result<()> {
        let log = File::options().create(true).append(true).open(self.dir.path().join("ntfy.out"))?;
        let mut child = Command::new(&self.program)
            .args(["serve", "--config"])
            .arg(self.dir.path().join("server.yml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let until = Instant::now() + START;
        loop {
            if let Some(status) = child.try_wait()? {
                let said = fs::read_to_string(self.dir.path().join("ntfy.out")).unwrap_or_default();
                return Err(io::Error::other(format!("ended with {status}: {said} {}", self.log())));
            }
            let healthy = Publisher::to(self.address())
                .and_then(|mut client| client.request("GET", "v1/health", &[], b""))
                .is_ok_and(|answer| answer.status == 200);
            if healthy {
                self.child = Some(child);
                return Ok(());
            }
            if Instant::now() > until {
                let _ = child.kill();
                let _ = child.wait();
                return Err(io::Error::other("not healthy in time"));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Ntfy {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `NIGHTPORTER_TEST_NTFY`, or whatever `tests/setup/ntfy` provides.
pub(crate) fn program() -> PathBuf {
    if let Some(given) = env::var_os("NIGHTPORTER_TEST_NTFY").filter(|given| !given.is_empty()) {
        let path = PathBuf::from(given);
        assert!(path.is_file(), "NIGHTPORTER_TEST_NTFY={} is not there", path.display());
        return path;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/setup/ntfy");
    let output = Command::new(&script).stdin(Stdio::null()).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{} failed: these tests need the real ntfy", script.display());
    let path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    assert!(path.is_file(), "{} gave no program", script.display());
    path
}

/// An HTTP client with one connection that is kept. Each request comes from another visitor, as publishers on the
/// internet do, so that the server's limits count for the daemon alone.
pub(crate) struct Publisher {
    stream: BufReader<TcpStream>,
    visitor: u32,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

impl Publisher {
    pub(crate) fn new(port: u16) -> io::Result<Self> {
        Self::to((Ipv4Addr::LOCALHOST, port).into())
    }

    pub(crate) fn to(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        // Where one publisher's visitors begin does not matter much: a visitor has 60 requests.
        let visitor = stream.local_addr()?.port().into();
        Ok(Self { stream: BufReader::new(stream), visitor })
    }

    /// Posts to an endpoint; gives the id ntfy assigned.
    pub(crate) fn publish(&mut self, endpoint: &str, body: &[u8]) -> io::Result<String> {
        self.publish_with(endpoint, &[], body)
    }

    pub(crate) fn publish_with(&mut self, endpoint: &str, headers: &[(&str, &str)], body: &[u8]) -> io::Result<String> {
        let answer = self.request("POST", path_of(endpoint), headers, body)?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        if answer.status != 200 {
            return Err(io::Error::other(format!("answered {}: {text}", answer.status)));
        }
        let event: serde_json::Value = serde_json::from_str(&text)?;
        event["id"].as_str().map(str::to_owned).ok_or_else(|| io::Error::other(text))
    }

    pub(crate) fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Answer> {
        self.visitor = self.visitor.wrapping_add(1 << 16);
        let mut request = format!(
            "{method} /{path} HTTP/1.1\r\nHost: ntfy\r\nX-Forwarded-For: {}\r\nContent-Length: {}\r\n",
            Ipv4Addr::from(0x0a00_0000 | self.visitor & 0x00ff_ffff),
            body.len()
        );
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        // In one write: in two the second would wait for the first one's acknowledgement.
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body);
        self.stream.get_mut().write_all(&bytes)?;
        self.answer()
    }

    fn answer(&mut self) -> io::Result<Answer> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("no HTTP: {line:?}")))?;
        let (mut length, mut chunked) = (0, false);
        loop {
            line.clear();
            self.stream.read_line(&mut line)?;
            let header = line.trim_end().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse().map_err(io::Error::other)?;
            }
            chunked |= header == "transfer-encoding: chunked";
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        while chunked {
            line.clear();
            self.stream.read_line(&mut line)?;
            let length = usize::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
            let mut chunk = vec![0; length + 2];
            self.stream.read_exact(&mut chunk)?;
            body.extend_from_slice(&chunk[..length]);
            chunked = length > 0;
        }
        Ok(Answer { status, body })
    }
}

/// An endpoint's path and query.
pub(crate) fn path_of(endpoint: &str) -> &str {
    endpoint.splitn(4, '/').nth(3).unwrap_or_default()
}
