//! A stand-in for a Gotify server, with the rewriting proxy in front of it.
//!
//! It follows `docs/spec.json` of <https://github.com/gotify/server> (Gotify REST-API 2.0.2: `POST` and `GET
//! /application`, `DELETE /application/{id}`, `POST /message`, `GET /message` with `limit` and `since`, `DELETE
//! /message/{id}`, `/stream`) and, for what that leaves open, `api/message.go`, `api/application.go` and
//! `api/stream/client.go` there: pages, the order store first and then notify, one stream of all of a user's
//! applications, pings each 45 s, frames of at most 64 bytes from the client.
//!
//! `UP?token=` follows `rewrite/gotify.go` of <https://codeberg.org/UnifiedPush/common-proxies>: the body as the text of a
//! message, whatever is no UTF-8 replaced. [`Standin::publish_encoded`] does what the proxy in
//! nightporter-gotify(7) does.
//!
//! The client token is `Cclient`.

use std::{
    collections::BTreeMap,
    io::{BufReader, ErrorKind, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tungstenite::{Error, Message, WebSocket, handshake::derive_accept_key, protocol::Role};

use super::{
    faults::Faults,
    http::{Answer, Request, ask},
};

/// `X-Gotify-Key` of the client.
pub(crate) const TOKEN: &str = "Cclient";
/// Where in a domain the server is.
const BASE: &str = "/gotify/";
const PING: Duration = Duration::from_secs(45);
/// Between two looks of a stream's thread.
const TICK: Duration = Duration::from_millis(5);

/// A running server; it ends with this value.
pub(crate) struct Standin {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    faults: Faults,
}

#[derive(Default)]
struct State {
    stop: bool,
    applications: BTreeMap<u64, (String, Value)>,
    application_count: u64,
    messages: BTreeMap<u64, Value>,
    message_count: u64,
    streams: Vec<Sender<Frame>>,
    connects: usize,
    requests: Vec<String>,
}

#[derive(Clone)]
enum Frame {
    Text(String),
    /// The connection breaks.
    Cut,
    /// The connection ends well.
    End,
    /// Nothing is read or written any more.
    Freeze,
}

impl Standin {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
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

    /// Posts to the endpoint's path, as an app's server does: through the proxy, which makes text of it.
    pub(crate) fn publish(&self, token: &str, body: &[u8]) -> u16 {
        ask(self.address, "POST", &format!("{BASE}UP?token={token}"), &[], body).unwrap().0
    }

    /// The same through a proxy that keeps the bytes, and the urgency as the priority.
    pub(crate) fn publish_encoded(&self, token: &str, body: &[u8], priority: u8) -> u16 {
        let message = json!({
            "message": BASE64_STANDARD.encode(body),
            "priority": priority,
            "extras": {"nightporter::body": {"encoding": "base64"}},
        });
        let headers = [("Content-Type", "application/json".to_owned())];
        let path = format!("{BASE}message?token={token}");
        ask(self.address, "POST", &path, &headers, message.to_string().as_bytes()).unwrap().0
    }

    /// Another application of the same user, which has nothing to do with push: its token.
    pub(crate) fn other_application(&self) -> String {
        let headers = [("X-Gotify-Key", TOKEN.to_owned())];
        let (status, body) =
            ask(self.address, "POST", &format!("{BASE}application"), &headers, br#"{"name":"Backup"}"#).unwrap();
        assert_eq!(status, 200);
        let made: Value = serde_json::from_str(&body).unwrap();
        made["token"].as_str().unwrap().to_owned()
    }

    /// Breaks the streams.
    pub(crate) fn cut(&self) {
        self.frame(&Frame::Cut);
    }

    /// Ends the streams with a close frame.
    pub(crate) fn end(&self) {
        self.frame(&Frame::End);
    }

    /// Leaves the streams open and never touches them again.
    pub(crate) fn freeze(&self) {
        self.frame(&Frame::Freeze);
    }

    /// Sends this over the streams.
    pub(crate) fn send(&self, text: &str) {
        self.frame(&Frame::Text(text.to_owned()));
    }

    /// What the user does in Gotify's own interface.
    pub(crate) fn delete_application(&self, id: u64) {
        self.shared.lock().delete_application(id);
    }

    /// Loses everything, as a database made anew has.
    pub(crate) fn forget(&self) {
        let mut state = self.shared.lock();
        state.applications.clear();
        state.messages.clear();
        (state.application_count, state.message_count) = (0, 0);
        drop(state);
        self.cut();
    }

    /// Ids of the applications there are.
    pub(crate) fn applications(&self) -> Vec<u64> {
        self.shared.lock().applications.keys().copied().collect()
    }

    /// Messages there are, of all applications.
    pub(crate) fn stored(&self) -> usize {
        self.shared.lock().messages.len()
    }

    /// Streams there have been.
    pub(crate) fn connects(&self) -> usize {
        self.shared.lock().connects
    }

    /// Methods and paths of all requests so far.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.shared.lock().requests.clone()
    }

    fn frame(&self, frame: &Frame) {
        self.shared.lock().notify(frame);
    }
}

impl Drop for Standin {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.frame(&Frame::Cut);
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
            let fault = self.faults.take(&request, BASE);
            let known = request.header("x-gotify-key") == Some(TOKEN);
            if fault.is_none() && known && path == "stream" {
                return self.stream(stream, request.header("sec-websocket-key")?);
            }
            fault.unwrap_or_else(|| self.answer(&request, &path, known)).write(&stream).ok()?;
        }
    }

    fn answer(&self, request: &Request, path: &str, known: bool) -> Answer {
        let error = |status: u16, text: &str| {
            Answer::json(status, &json!({"error": text, "errorCode": status, "errorDescription": text}))
        };
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let parameter = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        let number = |name: &str| parameter(name).map(|text| text.parse::<u64>().ok());
        let mut state = self.lock();
        match (request.method.as_str(), path) {
            ("POST", "UP") => {
                let text = String::from_utf8_lossy(&request.body).into_owned();
                state.post(parameter("token"), &json!({"message": text})).unwrap_or_else(|status| error(status, "no"))
            }
            ("POST", "message") => {
                let message = serde_json::from_slice(&request.body).unwrap_or_default();
                state.post(parameter("token"), &message).unwrap_or_else(|status| error(status, "no"))
            }
            _ if !known => {
                error(401, "you need to provide a valid access token or user credentials to access this api")
            }
            ("POST", "application") => {
                let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
                if !body["name"].is_string() {
                    return error(400, "Field 'name' is required");
                }
                state.application_count += 1;
                let id = state.application_count;
                // Random at the real server: no two are alike, also after everything was lost.
                let token = format!("A{:012x}.{id}", state.requests.len());
                state.applications.insert(id, (token.clone(), body.clone()));
                Answer::json(200, &application(id, &token, &body))
            }
            ("GET", "application") => {
                let all = state.applications.iter().map(|(id, (token, body))| application(*id, token, body));
                Answer::json(200, &Value::Array(all.collect()))
            }
            ("GET", "message") => match (number("limit").unwrap_or(Some(100)), number("since").unwrap_or(Some(0))) {
                (Some(limit @ 1..=200), Some(since)) => Answer::json(200, &state.page(limit as usize, since)),
                _ => error(400, "Bad Request"),
            },
            ("DELETE", path) => {
                let done = match path.split_once('/').map(|(kind, id)| (kind, id.parse::<u64>())) {
                    Some(("message", Ok(id))) => state.messages.remove(&id).is_some(),
                    Some(("application", Ok(id))) => state.delete_application(id),
                    _ => false,
                };
                if done { Answer::status(200) } else { error(404, "does not exist") }
            }
            _ => error(404, "page not found"),
        }
    }

    /// The WebSocket, until it ends.
    fn stream(&self, stream: TcpStream, key: &str) -> Option<()> {
        let head = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {}\r\n\r\n",
            derive_accept_key(key.as_bytes())
        );
        (&stream).write_all(head.as_bytes()).ok()?;
        let (sender, frames) = channel();
        let mut state = self.lock();
        state.streams.push(sender);
        state.connects += 1;
        drop(state);
        stream.set_read_timeout(Some(TICK)).ok()?;
        talk(WebSocket::from_raw_socket(stream, Role::Server, None), &frames)
    }
}

fn talk(mut socket: WebSocket<TcpStream>, frames: &Receiver<Frame>) -> Option<()> {
    let mut pinged = Instant::now();
    loop {
        match socket.read() {
            Ok(message) if message.len() > 64 => return None,
            Ok(_) => {}
            Err(Error::Io(error)) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return None,
        }
        while let Ok(frame) = frames.try_recv() {
            match frame {
                Frame::Text(text) => socket.send(Message::text(text)).ok()?,
                Frame::Cut => return socket.get_ref().shutdown(Shutdown::Both).ok(),
                Frame::End => socket.close(None).ok()?,
                Frame::Freeze => loop {
                    if matches!(frames.recv().ok()?, Frame::Cut) {
                        return None;
                    }
                },
            }
        }
        if pinged.elapsed() >= PING {
            pinged = Instant::now();
            socket.send(Message::Ping(Vec::new().into())).ok()?;
        }
    }
}

impl State {
    /// Stores a message, then tells the streams.
    fn post(&mut self, token: Option<&str>, message: &Value) -> Result<Answer, u16> {
        let found = self.applications.iter().find(|(_, (own, _))| Some(own.as_str()) == token);
        let (application, (_, settings)) = found.ok_or(401_u16)?;
        let text = message["message"].as_str().filter(|text| !text.is_empty()).ok_or(400_u16)?;
        let id = self.message_count + 1;
        let mut stored = json!({
            "id": id,
            "appid": application,
            "message": text,
            "title": settings["name"],
            "priority": message["priority"].as_i64().or(settings["defaultPriority"].as_i64()).unwrap_or(0),
            "date": "2026-11-22T05:33:14.123456789+01:00",
        });
        if message["extras"].is_object() {
            stored["extras"] = message["extras"].clone();
        }
        self.message_count = id;
        self.notify(&Frame::Text(stored.to_string()));
        // As a database gives it back.
        stored["date"] = "2026-11-22T04:33:14.123Z".into();
        self.messages.insert(id, stored.clone());
        Ok(Answer::json(200, &stored))
    }

    fn page(&self, limit: usize, since: u64) -> Value {
        let below = if since == 0 { u64::MAX } else { since };
        let mut page: Vec<&Value> = self.messages.range(..below).rev().take(limit + 1).map(|(_, one)| one).collect();
        let more = page.len() > limit;
        page.truncate(limit);
        let last = page.last().filter(|_| more).and_then(|message| message["id"].as_u64());
        let mut paging = json!({"size": page.len(), "limit": limit, "since": last.unwrap_or(0)});
        if let Some(last) = last {
            paging["next"] = format!("http://push.example/message?limit={limit}&since={last}").into();
        }
        json!({"messages": page, "paging": paging})
    }

    fn delete_application(&mut self, id: u64) -> bool {
        self.messages.retain(|_, message| message["appid"] != id);
        self.applications.remove(&id).is_some()
    }

    fn notify(&mut self, frame: &Frame) {
        self.streams.retain(|stream| stream.send(frame.clone()).is_ok());
    }
}

fn application(id: u64, token: &str, body: &Value) -> Value {
    json!({
        "id": id,
        "token": token,
        "name": body["name"],
        "description": body["description"].as_str().unwrap_or_default(),
        "defaultPriority": body["defaultPriority"].as_i64().unwrap_or(0),
        "internal": false,
        "image": "static/defaultapp.png",
    })
}
