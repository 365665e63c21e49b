//! A relay process, a device and a sender to try it with.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

const PATIENCE: Duration = Duration::from_secs(5);
/// How long silence is listened to before it is believed.
const SILENCE: Duration = Duration::from_millis(150);

/// A running `nightporter-relay`, killed when dropped.
pub(crate) struct Relay {
    child: Child,
    log: mpsc::Receiver<String>,
    pub(crate) address: String,
}

impl Relay {
    pub(crate) fn in_memory(arguments: &[&str]) -> Self {
        Self::start(&[&["--memory"], arguments].concat())
    }

    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_on("127.0.0.1:0", arguments)
    }

    pub(crate) fn start_on(listen: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_nightporter-relay"))
            .args(["--listen", listen])
            .args(arguments)
            .env("NIGHTPORTER_LOG", "trace")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, log) = mpsc::channel();
        let mut stderr = child.stderr.take().unwrap();
        thread::spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).unwrap();
            let _ = sender.send(text);
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let Some(address) = line.trim().strip_prefix("listening on http://") else {
            panic!("{line:?}, and in the log:\n{}", log.recv().unwrap());
        };
        Self { address: address.to_owned(), child, log }
    }

    /// Run one that is expected to end by itself.
    pub(crate) fn exit_code(arguments: &[&str]) -> i32 {
        let output = Command::new(env!("CARGO_BIN_EXE_nightporter-relay")).args(arguments).output().unwrap();
        output.status.code().unwrap()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn terminate(&self) {
        let pid = i32::try_from(self.child.id()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGTERM).unwrap();
    }

    /// SIGTERM, a clean exit, and the log.
    pub(crate) fn stop(mut self) -> String {
        self.terminate();
        let status = self.child.wait().unwrap();
        let log = self.log.recv().unwrap();
        assert_eq!(status.code(), Some(0), "{log}");
        log
    }

    pub(crate) fn post(&self, endpoint: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        self.request("POST", path_of(endpoint), headers, body)
    }

    pub(crate) fn delete(&self, location: &str) -> u16 {
        self.request("DELETE", path_of(location), &[], b"").status
    }

    pub(crate) fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.address);
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        if !headers.iter().any(|(name, _)| *name == "Transfer-Encoding") {
            request += &format!("Content-Length: {}\r\n", body.len());
        }
        request += "\r\n";
        // One write: a server that refuses early may have closed before a second.
        let bytes = [request.as_bytes(), body].concat();
        stream.write_all(&bytes).unwrap();
        Response::read(&mut BufReader::new(stream))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| &**value)
    }

    fn read(reader: &mut impl BufRead) -> Self {
        let mut line = || {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            line.trim_end().to_owned()
        };
        let status = line().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: Vec<(String, String)> = std::iter::from_fn(|| {
            line().split_once(':').map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        })
        .collect();
        let mut response = Self { status, headers, body: String::new() };
        let length = response.header("content-length").map_or(0, |length| length.parse().unwrap());
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        response.body = String::from_utf8(body).unwrap();
        response
    }
}

/// Many posts over one connection.
pub(crate) struct Sender(BufReader<TcpStream>);

impl Sender {
    pub(crate) fn connect(relay: &Relay) -> Self {
        let stream = TcpStream::connect(&relay.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    pub(crate) fn post(&mut self, endpoint: &str, ttl: u32, body: &[u8]) -> u16 {
        let path = path_of(endpoint);
        let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nTTL: {ttl}\r\nContent-Length: {}\r\n\r\n", body.len());
        self.0.get_mut().write_all(&[head.as_bytes(), body].concat()).unwrap();
        Response::read(&mut self.0).status
    }
}

/// A device on the autopush WebSocket.
pub(crate) struct Device {
    socket: WebSocket<TcpStream>,
    /// Channel and version of what has come and is not acknowledged, oldest first.
    pub(crate) unacked: VecDeque<(String, String)>,
    /// Ping frames seen.
    pub(crate) pings: u32,
}

impl Device {
    pub(crate) fn connect(relay: &Relay) -> Self {
        let stream = TcpStream::connect(&relay.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (socket, _) = tungstenite::client(format!("ws://{}/", relay.address), stream).unwrap();
        Self { socket, unacked: VecDeque::new(), pings: 0 }
    }

    /// Say hello; the result is the uaid of the answer.
    pub(crate) fn hello(&mut self, uaid: Option<&str>) -> String {
        self.send(&json!({"messageType": "hello", "uaid": uaid, "use_webpush": true}));
        let answer = self.receive();
        assert_eq!((&answer["messageType"], &answer["status"]), (&json!("hello"), &json!(200)), "{answer}");
        assert_eq!((&answer["use_webpush"], &answer["broadcasts"]), (&json!(true), &json!({})));
        answer["uaid"].as_str().unwrap().to_owned()
    }

    pub(crate) fn try_register(&mut self, number: u32, key: Option<&str>) -> Value {
        let mut request = json!({"messageType": "register", "channelID": channel(number)});
        if let Some(key) = key {
            request["key"] = key.into();
        }
        self.send(&request);
        let answer = self.receive();
        assert_eq!((&answer["messageType"], &answer["channelID"]), (&json!("register"), &json!(channel(number))));
        answer
    }

    /// Register; the result is the endpoint.
    pub(crate) fn register(&mut self, number: u32, key: Option<&str>) -> String {
        let answer = self.try_register(number, key);
        assert_eq!(answer["status"], 200, "{answer}");
        answer["pushEndpoint"].as_str().unwrap().to_owned()
    }

    pub(crate) fn unregister(&mut self, number: u32) {
        self.send(&json!({"messageType": "unregister", "channelID": channel(number), "code": 200}));
        let answer = json!({"messageType": "unregister", "channelID": channel(number), "status": 200});
        assert_eq!(self.receive(), answer);
    }

    /// The bodies of the next `count` notifications.
    pub(crate) fn bodies(&mut self, count: usize) -> Vec<String> {
        let body = |_| {
            let frame = self.receive();
            assert_eq!(frame["messageType"], "notification", "{frame}");
            let text = |name: &str| frame[name].as_str().unwrap().to_owned();
            self.unacked.push_back((text("channelID"), text("version")));
            String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(text("data")).unwrap()).unwrap()
        };
        (0..count).map(body).collect()
    }

    /// Acknowledge the `count` oldest.
    pub(crate) fn ack(&mut self, count: usize) {
        let updates: Vec<Value> = self
            .unacked
            .drain(..count)
            .map(|(channel, version)| json!({"channelID": channel, "version": version, "code": 100}))
            .collect();
        self.send(&json!({"messageType": "ack", "updates": updates}));
    }

    pub(crate) fn ack_version(&mut self, version: &str) {
        self.send(&json!({"messageType": "ack", "updates": [{"channelID": channel(1), "version": version}]}));
    }

    pub(crate) fn send(&mut self, frame: &Value) {
        self.send_text(&frame.to_string());
    }

    pub(crate) fn send_text(&mut self, text: &str) {
        // A server that has hung up in the middle is looked at by `closing`.
        let _ = self.socket.send(Message::text(text));
    }

    pub(crate) fn send_binary(&mut self, bytes: &'static [u8]) {
        self.socket.send(Message::binary(bytes)).unwrap();
    }

    /// The next text frame.
    pub(crate) fn receive(&mut self) -> Value {
        loop {
            match self.socket.read().unwrap() {
                Message::Text(text) => return serde_json::from_str(&text).unwrap(),
                Message::Ping(_) => self.pings += 1,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Assert that no text frame comes for a while.
    pub(crate) fn hears_nothing(&mut self) {
        self.socket.get_ref().set_read_timeout(Some(SILENCE)).unwrap();
        loop {
            match self.socket.read() {
                Ok(Message::Ping(_)) => self.pings += 1,
                Ok(other) => panic!("{other:.200}"),
                Err(tungstenite::Error::Io(_)) => break,
                Err(error) => panic!("{error}"),
            }
        }
        self.socket.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
    }

    /// The code and reason of the close frame that must come next.
    pub(crate) fn closing(mut self) -> (u16, String) {
        loop {
            match self.socket.read() {
                Ok(Message::Close(Some(frame))) => return (frame.code.into(), frame.reason.as_str().to_owned()),
                Ok(Message::Ping(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Close, and wait until the server has seen it.
    pub(crate) fn leave(mut self) {
        self.socket.close(None).unwrap();
        while self.socket.read().is_ok() {}
    }
}

/// An application server's VAPID key.
pub(crate) struct Signer(EcdsaKeyPair);

impl Signer {
    pub(crate) fn new() -> Self {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        Self(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap())
    }

    pub(crate) fn key(&self) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(self.0.public_key().as_ref())
    }

    /// A header for `audience`, valid for `seconds` from now.
    pub(crate) fn authorization(&self, audience: &str, seconds: i64) -> String {
        let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
        let encode = |value: Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let header = encode(json!({"typ": "JWT", "alg": "ES256"}));
        let claims = encode(json!({"aud": audience, "exp": now + seconds, "sub": "mailto:me@example.org"}));
        let signed = format!("{header}.{claims}");
        let signature = self.0.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("vapid t={signed}.{}, k={}", BASE64_URL_SAFE_NO_PAD.encode(signature.as_ref()), self.key())
    }
}

/// The channel id with this number.
pub(crate) fn channel(number: u32) -> String {
    format!("d5d2a1c4-0c0a-4a5e-9d0a-{number:012x}")
}

/// The path of a URL.
pub(crate) fn path_of(url: &str) -> &str {
    let rest = url.split_once("://").unwrap().1;
    &rest[rest.find('/').unwrap()..]
}
