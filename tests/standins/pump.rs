//! Runs a session against a server over real sockets: blocking threads, and the session's own clock, which can be set on.

use std::{
    collections::HashMap,
    io::ErrorKind,
    net::{Shutdown, SocketAddr, TcpStream},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant as StdInstant},
};

use nightporter::{
    action::HttpRequest,
    config::{NetworkSettings, UpstreamKind, UpstreamSettings},
    core::upstream::{Beginning, Channel, IncomingBody, IncomingMessage, LinkIds, Output, Session},
    event::{HttpError, HttpResponse, HttpTicket, LinkError, LinkEvent, LinkId},
    model::RegistrationId,
    time::{Instant, Now, UnixTime},
};
use tungstenite::{ClientRequestBuilder, Error, Message};

use super::http;

/// The longest anything may take: a busy machine, not a slow server.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Pump {
    pub(crate) session: Session,
    kind: UpstreamKind,
    address: SocketAddr,
    base: String,
    credentials: (&'static str, String),
    start: StdInstant,
    ahead: Duration,
    events: Receiver<Event>,
    sender: Sender<Event>,
    links: HashMap<LinkId, Link>,
    /// What the session put out and nobody has asked for yet.
    pub(crate) seen: Vec<Output>,
    /// What it remembers, as a store would have it.
    pub(crate) remembered: HashMap<&'static str, String>,
}

/// An open link: its socket, and for a WebSocket where to ask for pings.
struct Link {
    stream: TcpStream,
    pings: Sender<()>,
}

enum Event {
    Link(LinkId, LinkEvent),
    Http(HttpTicket, Result<HttpResponse, HttpError>),
}

impl Pump {
    /// A session on the server at `url`, a new one for `channels` and what was remembered.
    pub(crate) fn new(
        settings: &UpstreamSettings,
        credentials: (&'static str, &str),
        channels: Vec<Channel>,
        remembered: HashMap<&'static str, String>,
        seed: u8,
    ) -> Self {
        let url = settings.http_url();
        let (address, base) = url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).expect("an URL");
        let now = Now { boot: Instant::from_nanos(1_000_000_000_000), wall: UnixTime::from_secs(1) };
        let beginning = Beginning {
            settings,
            network: &NetworkSettings::default(),
            remembered: remembered.iter().map(|(key, value)| ((*key).into(), value.as_str().into())).collect(),
            channels,
            seed: [seed; 32],
            links: LinkIds::new(0),
        };
        let (sender, events) = channel();
        Self {
            session: Session::new(beginning, now),
            kind: settings.kind,
            address: address.parse().expect("an address"),
            base: format!("/{base}"),
            credentials: (credentials.0, credentials.1.to_owned()),
            start: StdInstant::now(),
            ahead: Duration::ZERO,
            events,
            sender,
            links: HashMap::new(),
            seen: Vec::new(),
            remembered,
        }
    }

    pub(crate) fn now(&self) -> Now {
        let passed = self.start.elapsed() + self.ahead;
        Now { boot: Instant::from_nanos(1_000_000_000_000) + passed, wall: UnixTime::from_secs(1) + passed }
    }

    /// Sets the session's clock on: everything due until then happens.
    pub(crate) fn skip(&mut self, time: Duration) {
        self.turn(Duration::ZERO);
        self.ahead += time;
        self.session.handle_timeout(self.now());
        self.turn(Duration::ZERO);
    }

    /// Refuses to use another password from now on.
    pub(crate) fn set_credentials(&mut self, value: &str) {
        self.credentials.1 = value.to_owned();
    }

    pub(crate) fn register(&mut self, n: u64) -> (String, String) {
        self.session.register(RegistrationId(n), None, self.now());
        self.registered(n)
    }

    /// Waits for a registration: its channel and endpoint.
    pub(crate) fn registered(&mut self, n: u64) -> (String, String) {
        self.until("a registration", |output| match output {
            Output::Registered { registration, channel, endpoint } if registration.0 == n => {
                Some((channel.to_string(), endpoint.to_string()))
            }
            _ => None,
        })
    }

    pub(crate) fn message(&mut self) -> IncomingMessage {
        self.until("a message", |output| match output {
            Output::Message(message) => Some(message.clone()),
            _ => None,
        })
    }

    /// The next message, called safe.
    pub(crate) fn take(&mut self) -> (u64, Vec<u8>) {
        let message = self.message();
        self.session.safe(message.registration, &message.id, self.now());
        (message.registration.0, body(&message))
    }

    /// Runs until the session has put out what `f` looks for.
    pub(crate) fn until<T>(&mut self, what: &str, f: impl Fn(&Output) -> Option<T>) -> T {
        let end = StdInstant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.iter().position(|output| f(output).is_some()) {
                return f(&self.seen.remove(at)).expect("as just seen");
            }
            assert!(StdInstant::now() < end, "{what} does not come: {:?} {:?}", self.seen, self.session.standing());
            self.turn(Duration::from_millis(20));
        }
    }

    /// Runs until this holds.
    pub(crate) fn wait(&mut self, what: &str, f: impl Fn(&Self) -> bool) {
        let end = StdInstant::now() + PATIENCE;
        while !f(self) {
            assert!(StdInstant::now() < end, "{what} does not come: {:?} {:?}", self.seen, self.session.standing());
            self.turn(Duration::from_millis(20));
        }
    }

    /// Runs for a while.
    pub(crate) fn run(&mut self, time: Duration) {
        let end = StdInstant::now() + time;
        while StdInstant::now() < end {
            self.turn(Duration::from_millis(20));
        }
    }

    /// Does what is to do, and waits for something to happen.
    pub(crate) fn turn(&mut self, at_most: Duration) {
        self.perform();
        let due = self.session.poll_timeout().map(|at| at.since(self.now().boot));
        let event = self.events.recv_timeout(due.unwrap_or(at_most).min(at_most)).ok();
        let now = self.now();
        match event {
            None => {}
            Some(Event::Link(link, event)) => self.session.handle_link(link, event, now),
            Some(Event::Http(ticket, result)) => self.session.handle_http(ticket, result, now),
        }
        if self.session.poll_timeout().is_some_and(|at| at <= now.boot) {
            self.session.handle_timeout(now);
        }
        self.perform();
    }

    fn perform(&mut self) {
        while let Some(output) = self.session.poll_output() {
            match output {
                Output::Connect { link, path, headers } => self.connect(link, &path, &headers),
                Output::Http(ticket, request) => self.request(ticket, request),
                Output::Close(link) => {
                    if let Some(link) = self.links.remove(&link) {
                        let _ = link.stream.shutdown(Shutdown::Both);
                    }
                }
                Output::Remember { key, value } | Output::RememberBehind { key, value } => {
                    self.remembered.insert(key, value);
                }
                Output::Ping(link) => {
                    if let Some(link) = self.links.get(&link) {
                        let _ = link.pings.send(());
                    }
                }
                output => self.seen.push(output),
            }
        }
    }

    fn request(&self, ticket: HttpTicket, request: HttpRequest) {
        let (sender, address) = (self.sender.clone(), self.address);
        let path = format!("{}{}", self.base, request.path);
        let headers = [(self.credentials.0, self.credentials.1.clone()), ("Content-Type", "application/json".into())];
        thread::spawn(move || {
            let body = request.json.unwrap_or_default();
            let failed = |error: std::io::Error| HttpError::Failed(error.to_string());
            let result = TcpStream::connect(address)
                .and_then(|stream| http::request(stream, request.method, &path, &headers, body.as_bytes()))
                .map_err(failed)
                .and_then(|mut response| {
                    let retry_after = response.header("retry-after").and_then(|secs| secs.parse().ok());
                    let body = response.text();
                    match body.len() > request.limit as usize {
                        true => Err(HttpError::Unusable("too large".into())),
                        false => Ok(HttpResponse {
                            status: response.status,
                            body,
                            retry_after: retry_after.map(Duration::from_secs),
                        }),
                    }
                });
            let _ = sender.send(Event::Http(ticket, result));
        });
    }

    fn connect(&mut self, link: LinkId, path: &str, headers: &[(&'static str, String)]) {
        let sender = self.sender.clone();
        let report = move |event| sender.send(Event::Link(link, event)).is_ok();
        let stream = match TcpStream::connect(self.address) {
            Ok(stream) => stream,
            Err(error) => {
                report(LinkEvent::Failed(LinkError::Connect(error.to_string())));
                return;
            }
        };
        let (pings, asked) = channel();
        self.links.insert(link, Link { stream: stream.try_clone().expect("a second handle"), pings });
        let path = format!("{}{path}", self.base);
        let mut headers = headers.to_vec();
        headers.push((self.credentials.0, self.credentials.1.clone()));
        match self.kind {
            UpstreamKind::Gotify => {
                let host = self.address.to_string();
                thread::spawn(move || websocket(stream, &host, &path, &headers, &asked, report));
            }
            _ => {
                thread::spawn(move || events(stream, &path, &headers, report));
            }
        }
    }
}

/// The bytes of a message.
pub(crate) fn body(message: &IncomingMessage) -> Vec<u8> {
    match &message.body {
        IncomingBody::Bytes(bytes) => bytes.to_vec(),
        other => panic!("{other:?}"),
    }
}

fn events(stream: TcpStream, path: &str, headers: &[(&'static str, String)], report: impl Fn(LinkEvent) -> bool) {
    let mut response = match http::request(stream, "GET", path, headers, b"") {
        Ok(response) => response,
        Err(error) => {
            report(LinkEvent::Failed(LinkError::Io(error.to_string())));
            return;
        }
    };
    if response.status != 200 {
        let retry_after = response.header("retry-after").and_then(|secs| secs.parse().ok()).map(Duration::from_secs);
        let (status, body) = (response.status, response.text());
        report(LinkEvent::Failed(LinkError::Http { status, body, retry_after }));
        return;
    }
    assert!(response.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")));
    report(LinkEvent::Open);
    loop {
        let event = match response.more() {
            Ok(bytes) if bytes.is_empty() => LinkEvent::Closed { code: None, reason: String::new() },
            Ok(bytes) => LinkEvent::Bytes(bytes),
            Err(error) => LinkEvent::Failed(LinkError::Io(error.to_string())),
        };
        let last = !matches!(event, LinkEvent::Bytes(_));
        if !report(event) || last {
            return;
        }
    }
}

fn websocket(
    stream: TcpStream,
    host: &str,
    path: &str,
    headers: &[(&'static str, String)],
    pings: &Receiver<()>,
    report: impl Fn(LinkEvent) -> bool,
) {
    let uri = format!("ws://{host}{path}").parse().expect("an URI");
    let request = headers
        .iter()
        .fold(ClientRequestBuilder::new(uri), |request, (name, value)| request.with_header(*name, value.clone()));
    let mut socket = match tungstenite::client(request, stream) {
        Ok((socket, _)) => socket,
        Err(tungstenite::HandshakeError::Failure(Error::Http(response))) => {
            let status = response.status().as_u16();
            let retry_after = None;
            report(LinkEvent::Failed(LinkError::Http { status, body: String::new(), retry_after }));
            return;
        }
        Err(error) => {
            report(LinkEvent::Failed(LinkError::Protocol(error.to_string())));
            return;
        }
    };
    report(LinkEvent::Open);
    let _ = socket.get_ref().set_read_timeout(Some(Duration::from_millis(5)));
    loop {
        if pings.try_recv().is_ok() {
            let _ = socket.send(Message::Ping(Vec::new().into()));
        }
        let event = match socket.read() {
            Err(Error::Io(error)) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            Ok(Message::Text(text)) => LinkEvent::Text(text.to_string()),
            Ok(Message::Ping(_)) => LinkEvent::Ping,
            Ok(Message::Pong(_)) => LinkEvent::Pong,
            Ok(Message::Binary(bytes)) => LinkEvent::Bytes(bytes.to_vec()),
            Ok(Message::Close(_) | Message::Frame(_)) => continue,
            Err(Error::ConnectionClosed | Error::AlreadyClosed) => {
                LinkEvent::Closed { code: Some(1000), reason: String::new() }
            }
            Err(error) => LinkEvent::Failed(LinkError::Io(error.to_string())),
        };
        let last = matches!(event, LinkEvent::Closed { .. } | LinkEvent::Failed(_));
        if !report(event) || last {
            return;
        }
    }
}
