//! A stand-in for Nextcloud with the uppush app.
//!
//! It follows `lib/Controller/UnifiedPushProviderController.php` and `appinfo/routes.php` of
//! <https://github.com/UP-NextPush/server-app> (routes, answers, statuses, events and their data, the 144 connections,
//! `close` for the connection before), read at version 1.4. For version 2 no server source could be read: that messages
//! have an SSE `id:`, stay until `DELETE message/<id>`, are sent again to the next connection, and that the request header
//! `urgency` keeps those below it back, follows push.md §3c, which has it from client code and the changelog.
//!
//! Credentials are the user `user` with the password `secret`; as on the real server none are needed for the stream and
//! for posting.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{BufReader, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::{
    faults::Faults,
    http::{Answer, Request, ask},
};

/// `Authorization` of the user.
pub(crate) const AUTHORIZATION: &str = "Basic dXNlcjpzZWNyZXQ=";
const BASE: &str = "/index.php/apps/uppush/";

/// Which server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// Messages are forgotten when they are written; unknown devices and tokens get 401.
    One,
    /// Messages have ids and stay until they are deleted; what is unknown gets 404.
    Two,
}

/// A running server; it ends with this value.
pub(crate) struct Standin {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    version: Version,
    state: Mutex<State>,
    changed: Condvar,
    faults: Faults,
}

#[derive(Default)]
struct State {
    stop: bool,
    keepalive: u64,
    /// Everything ever made gets a number of its own.
    count: u64,
    devices: BTreeMap<String, Device>,
    apps: BTreeMap<String, App>,
    requests: Vec<String>,
}

struct App {
    device: String,
    request: Value,
}

#[derive(Default)]
struct Device {
    connects: usize,
    queue: VecDeque<Item>,
    /// What the connection of the moment has to do.
    orders: VecDeque<Order>,
    /// Numbers of the messages this connection has been sent.
    sent: u64,
    urgency: Option<String>,
    streaming: bool,
}

#[derive(Clone)]
struct Item {
    number: u64,
    event: &'static str,
    data: String,
    urgency: u8,
}

#[derive(Clone)]
enum Order {
    Cut,
    End,
    Raw(Vec<u8>),
}

impl Standin {
    /// A server of version 2.
    pub(crate) fn start() -> Self {
        Self::of(Version::Two)
    }

    /// A server of this version.
    pub(crate) fn of(version: Version) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Mutex::new(State { keepalive: 50, ..State::default() });
        let shared = Arc::new(Shared { version, state, changed: Condvar::new(), faults: Faults::default() });
        let server = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if server.lock().stop {
                    return;
                }
                let server = Arc::clone(&server);
                thread::spawn(move || server.serve(stream.ok()?));
            }
        });
        Self { address, shared }
    }

    /// The base URL to configure.
    pub(crate) fn url(&self) -> String {
        format!("http://{}{BASE}", self.address)
    }

    /// What to answer wrongly.
    pub(crate) fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// Posts a message as an app's server does; returns the status.
    pub(crate) fn publish(&self, token: &str, body: &[u8]) -> u16 {
        self.publish_with(token, body, &[])
    }

    /// The same with header fields such as `Urgency`.
    pub(crate) fn publish_with(&self, token: &str, body: &[u8], headers: &[(&str, String)]) -> u16 {
        ask(self.address, "POST", &format!("{BASE}push/{token}"), headers, body).unwrap().0
    }

    /// Seconds between two pings, told to connections made from now on.
    pub(crate) fn set_keepalive(&self, secs: u64) {
        self.shared.lock().keepalive = secs;
    }

    /// Breaks the streams in the middle of an event.
    pub(crate) fn cut(&self) {
        self.order(Order::Cut);
    }

    /// Ends the streams well, as a proxy's time limit does.
    pub(crate) fn end(&self) {
        self.order(Order::End);
    }

    /// Sends these bytes over the streams.
    pub(crate) fn send(&self, bytes: impl Into<Vec<u8>>) {
        self.order(Order::Raw(bytes.into()));
    }

    /// Connects to the device as somebody else would, and leaves again.
    pub(crate) fn take_over(&self) {
        let device = self.devices().remove(0);
        let stream = TcpStream::connect(self.address).unwrap();
        write!(&stream, "GET {BASE}device/{device} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut first = [0; 1];
        std::io::Read::read_exact(&mut &stream, &mut first).unwrap();
        stream.shutdown(Shutdown::Both).unwrap();
    }

    /// Forgets all devices with their registrations, and ends their streams.
    pub(crate) fn forget(&self) {
        self.end();
        let mut state = self.shared.lock();
        state.apps.clear();
        for device in std::mem::take(&mut state.devices).into_values() {
            assert!(device.connects < 10_000);
        }
        self.shared.changed.notify_all();
    }

    /// What the user does in Nextcloud's settings.
    pub(crate) fn delete_app(&self, token: &str) {
        let path = format!("{BASE}app/{token}");
        let headers = [("Authorization", AUTHORIZATION.to_owned())];
        assert_eq!(ask(self.address, "DELETE", &path, &headers, b"").unwrap().0, 200);
    }

    /// Ids of the devices there are.
    pub(crate) fn devices(&self) -> Vec<String> {
        self.shared.lock().devices.keys().cloned().collect()
    }

    /// Tokens of the registrations there are.
    pub(crate) fn tokens(&self) -> Vec<String> {
        self.shared.lock().apps.keys().cloned().collect()
    }

    /// The request that made a registration.
    pub(crate) fn app(&self, token: &str) -> Value {
        self.shared.lock().apps[token].request.clone()
    }

    /// Messages not acknowledged (version 2), or not written (version 1).
    pub(crate) fn stored(&self) -> usize {
        self.shared.lock().devices.values().map(|device| device.queue.len()).sum()
    }

    /// Streams there have been of the devices of the moment.
    pub(crate) fn connects(&self) -> usize {
        self.shared.lock().devices.values().map(|device| device.connects).sum()
    }

    /// The `urgency` header of the latest stream.
    pub(crate) fn urgency(&self) -> Option<String> {
        self.shared.lock().devices.values().find_map(|device| device.urgency.clone())
    }

    /// Methods and paths of all requests so far.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.shared.lock().requests.clone()
    }

    fn order(&self, order: Order) {
        for device in self.shared.lock().devices.values_mut().filter(|device| device.streaming) {
            device.orders.push_back(order.clone());
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for Standin {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        // The listener waits for one more.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// One connection, request by request.
    fn serve(&self, stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        loop {
            let request = Request::read(&mut reader)?;
            let path = request.path.strip_prefix(BASE).unwrap_or("?").to_owned();
            self.lock().requests.push(format!("{} {path}", request.method));
            let answer = match self.faults.take(&request, BASE) {
                Some(fault) => fault,
                None => match (request.method.as_str(), path.split_once('/')) {
                    ("GET", Some(("device", id))) if self.lock().devices.contains_key(id) => {
                        return self.stream(&stream, id, &request);
                    }
                    _ => self.answer(&request, &path),
                },
            };
            answer.write(&stream).ok()?;
        }
    }

    fn answer(&self, request: &Request, path: &str) -> Answer {
        let unknown = match self.version {
            Version::One => 401,
            Version::Two => 404,
        };
        let no = Answer::json(unknown, &json!({"success": false}));
        let yes = Answer::json(200, &json!({"success": true}));
        let known = request.header("authorization") == Some(AUTHORIZATION);
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let mut state = self.lock();
        match (request.method.as_str(), path.split_once('/').unwrap_or((path, ""))) {
            // Public pages.
            ("GET", ("device", _)) => no,
            ("GET", ("push", _)) => Answer::json(200, &json!({"unifiedpush": {"version": 1}})),
            ("POST", ("push", token)) => match state.apps.get(token).map(|app| app.device.clone()) {
                None => Answer { status: 404, ..no },
                Some(device) => {
                    let data =
                        json!({"type": "message", "token": token, "message": BASE64_STANDARD.encode(&request.body)});
                    let urgency = rank(request.header("urgency").unwrap_or("normal"));
                    state.push(&device, "message", &data, urgency);
                    self.changed.notify_all();
                    Answer::json(201, &json!({"success": true})).with("TTL", "0")
                }
            },
            // Nextcloud's own answer.
            _ if !known => Answer::json(401, &json!({"message": "Current user is not logged in"})),
            ("GET", ("", "")) => yes,
            ("PUT", ("device", "")) if body["deviceName"].is_string() => {
                state.count += 1;
                let id = format!("device-{:036}", state.count);
                state.devices.insert(id.clone(), Device::default());
                Answer::json(200, &json!({"success": true, "deviceId": id}))
            }
            ("DELETE", ("device", id)) if state.devices.remove(id).is_some() => {
                state.apps.retain(|_, app| app.device != id);
                yes
            }
            ("PUT", ("app", "")) if body["appName"].is_string() => {
                let device = body["deviceId"].as_str().unwrap_or_default().to_owned();
                if !state.devices.contains_key(&device) {
                    return no;
                }
                state.count += 1;
                let token = format!("app-{:036}", state.count);
                state.apps.insert(token.clone(), App { device, request: body });
                Answer::json(200, &json!({"success": true, "token": token}))
            }
            ("DELETE", ("app", token)) => match state.apps.remove(token) {
                None => no,
                Some(app) => {
                    let data = json!({"type": "deleteApp", "token": token, "message": ""});
                    state.push(&app.device, "deleteApp", &data, 3);
                    self.changed.notify_all();
                    yes
                }
            },
            ("DELETE", ("message", id)) if self.version == Version::Two => {
                let number = id.strip_prefix("message-").and_then(|number| number.parse::<u64>().ok());
                let mut found = false;
                for device in state.devices.values_mut() {
                    device.queue.retain(|item| {
                        found |= Some(item.number) == number;
                        Some(item.number) != number
                    });
                }
                if found { yes } else { no }
            }
            _ => Answer::status(404),
        }
    }

    /// The event stream, until it ends.
    fn stream(&self, stream: &TcpStream, id: &str, request: &Request) -> Option<()> {
        let chunked = self.version == Version::Two;
        let mut head =
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream;charset=UTF-8\r\nCache-Control: no-cache\r\n\
                        X-Accel-Buffering: no\r\n"
                .to_owned();
        head.push_str(if chunked { "Transfer-Encoding: chunked\r\n\r\n" } else { "Connection: close\r\n\r\n" });
        let write = |bytes: &[u8]| {
            let mut stream = stream;
            if chunked {
                let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
                chunk.extend_from_slice(bytes);
                chunk.extend_from_slice(b"\r\n");
                stream.write_all(&chunk).ok()
            } else {
                stream.write_all(bytes).ok()
            }
        };
        let event = |kind: &str, data: &Value| write(format!("event: {kind}\ndata: {data}\n\n").as_bytes());
        let mut state = self.lock();
        let keepalive = state.keepalive;
        let device = state.devices.get_mut(id)?;
        device.connects += 1;
        let (connect, connects) = (device.connects, device.connects);
        device.sent = 0;
        device.streaming = true;
        device.orders.clear();
        device.urgency = request.header("urgency").map(str::to_owned);
        let least = rank(device.urgency.as_deref().filter(|_| chunked).unwrap_or("very-low"));
        self.changed.notify_all();
        drop(state);
        { stream }.write_all(head.as_bytes()).ok()?;
        event("start", &json!({"type": "start"}))?;
        if connects > 144 {
            let message = format!("Connected {connects} times in 12 hours");
            event("warning", &json!({"type": "warning", "message": message}))?;
        }
        event("keepalive", &json!({"type": "keepalive", "keepalive": keepalive}))?;
        let mut state = self.lock();
        loop {
            if state.stop {
                return stream.shutdown(Shutdown::Both).ok();
            }
            let Some(device) = state.devices.get_mut(id).filter(|device| device.connects == connect) else {
                let forgotten = !state.devices.contains_key(id);
                drop(state);
                if !forgotten {
                    event("close", &json!({"type": "close"}))?;
                }
                return self.end(stream, chunked);
            };
            let order = device.orders.pop_front();
            let sent = device.sent;
            let item = match self.version {
                _ if order.is_some() => None,
                Version::One => device.queue.pop_front(),
                Version::Two => device.queue.iter().find(|item| item.number > sent && item.urgency >= least).cloned(),
            };
            if order.is_none() && item.is_none() {
                let (after, timeout) = self.changed.wait_timeout(state, Duration::from_secs(keepalive)).unwrap();
                state = after;
                if timeout.timed_out() {
                    drop(state);
                    event("ping", &json!({"type": "ping"}))?;
                    state = self.lock();
                }
                continue;
            }
            if let Some(item) = &item {
                device.sent = item.number;
                if item.event == "deleteApp" {
                    device.queue.retain(|other| other.number != item.number);
                }
            }
            if matches!(order, Some(Order::Cut | Order::End)) {
                device.streaming = false;
            }
            drop(state);
            match (order, item) {
                (Some(Order::Cut), _) => {
                    write(b"event: message\ndata: {\"type\":\"mess");
                    return stream.shutdown(Shutdown::Both).ok();
                }
                (Some(Order::End), _) => return self.end(stream, chunked),
                (Some(Order::Raw(bytes)), _) => write(&bytes)?,
                (None, Some(item)) => {
                    let id = match self.version {
                        Version::Two if item.event == "message" => format!("id: message-{}\n", item.number),
                        _ => String::new(),
                    };
                    // In two pieces: nothing keeps events whole.
                    write(format!("{id}event: {}\nda", item.event).as_bytes())?;
                    write(format!("ta: {}\n\n", item.data).as_bytes())?;
                }
                (None, None) => {}
            }
            state = self.lock();
        }
    }

    fn end(&self, mut stream: &TcpStream, chunked: bool) -> Option<()> {
        if chunked {
            stream.write_all(b"0\r\n\r\n").ok()?;
        }
        stream.shutdown(Shutdown::Both).ok()
    }
}

impl State {
    fn push(&mut self, device: &str, event: &'static str, data: &Value, urgency: u8) {
        self.count += 1;
        let number = self.count;
        if let Some(device) = self.devices.get_mut(device) {
            device.queue.push_back(Item { number, event, data: data.to_string(), urgency });
        }
    }
}

fn rank(urgency: &str) -> u8 {
    match urgency {
        "very-low" => 0,
        "low" => 1,
        "normal" => 2,
        _ => 3,
    }
}
