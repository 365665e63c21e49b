//! A file server that does as it is told, for better and for worse.

use std::{
    collections::VecDeque,
    io::{BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};

use crate::{http::Request, support::PATIENCE};

/// What it does with one request; without a plan it answers as a good server does.
#[derive(Clone)]
pub(crate) enum Plan {
    /// Sends so much of what was asked for, and breaks off.
    Cut(usize),
    /// Sends so much of it, and the rest when it is released.
    Hold(usize),
    /// Just this, and the connection ends.
    Raw(Vec<u8>),
    /// Bytes without an end.
    Endless,
    /// Nothing.
    Silence,
}

#[derive(Default)]
struct State {
    content: Vec<u8>,
    etag: Option<String>,
    ranges: bool,
    plans: VecDeque<Plan>,
    released: bool,
    requests: Vec<Request>,
    /// Connections that ended on the other side while it said nothing, or too much.
    left: usize,
}

#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Server {
    /// With this content, of a version that can be told, and in parts.
    pub(crate) fn start(content: &[u8]) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = State { content: content.to_vec(), etag: Some("\"one\"".into()), ranges: true, ..State::default() };
        let server = Self { address, state: Arc::new((Mutex::new(state), Condvar::new())) };
        let serving = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = serving.clone();
                thread::spawn(move || server.serve(stream));
            }
        });
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/file", self.address)
    }

    pub(crate) fn plan(&self, plan: Plan) {
        self.with(|state| state.plans.push_back(plan));
    }

    /// Another version.
    pub(crate) fn change(&self, content: &[u8], etag: Option<&str>, ranges: bool) {
        self.with(|state| {
            (state.content, state.etag, state.ranges) = (content.to_vec(), etag.map(str::to_owned), ranges)
        });
    }

    pub(crate) fn release(&self) {
        self.with(|state| state.released = true);
        self.state.1.notify_all();
    }

    /// What it was asked so far.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.with(|state| state.requests.clone())
    }

    pub(crate) fn left(&self) -> usize {
        self.with(|state| state.left)
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.0.lock().unwrap())
    }

    fn serve(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        while let Some(request) = Request::read(&mut reader) {
            let plan = self.with(|state| {
                state.requests.push(request.clone());
                state.plans.pop_front()
            });
            if self.answer(&stream, &request, plan).is_none() {
                return;
            }
        }
    }

    fn answer(&self, mut stream: &TcpStream, request: &Request, plan: Option<Plan>) -> Option<()> {
        if let Some(Plan::Raw(bytes)) = plan {
            let _ = stream.write_all(&bytes);
            return None;
        }
        if request.method != "GET" {
            let body = format!("{} bytes", request.body.len());
            let text = format!("HTTP/1.1 201 Created\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            return stream.write_all(text.as_bytes()).ok();
        }
        match plan {
            Some(Plan::Silence) => {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut byte = [0];
                let _ = std::io::Read::read(&mut stream, &mut byte);
                self.with(|state| state.left += 1);
                return None;
            }
            Some(Plan::Endless) => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").ok()?;
                while stream.write_all(&[b'x'; 65536]).is_ok() {}
                self.with(|state| state.left += 1);
                return None;
            }
            _ => {}
        }
        let (head, body) = self.with(|state| reply(state, request));
        stream.write_all(head.as_bytes()).ok()?;
        match plan {
            Some(Plan::Cut(most)) => {
                stream.write_all(&body[..most.min(body.len())]).ok()?;
                None
            }
            Some(Plan::Hold(most)) => {
                let most = most.min(body.len());
                stream.write_all(&body[..most]).ok()?;
                let (state, released) = &*self.state;
                let held = state.lock().unwrap();
                drop(released.wait_timeout_while(held, PATIENCE, |state| !state.released).unwrap());
                stream.write_all(&body[most..]).ok()
            }
            _ => stream.write_all(&body).ok(),
        }
    }
}

fn reply(state: &State, request: &Request) -> (String, Vec<u8>) {
    let etag = state.etag.as_ref().map(|etag| format!("ETag: {etag}\r\n")).unwrap_or_default();
    let from = request.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let same = request.header("if-range") == state.etag.as_deref();
    let total = state.content.len();
    match from {
        Some(from) if state.ranges && same && from < total => {
            let body = state.content[from..].to_vec();
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\n{etag}Content-Range: bytes {from}-{}/{total}\r\nContent-Length: {}\r\n\r\n",
                total - 1,
                body.len()
            );
            (head, body)
        }
        Some(from) if state.ranges && same => {
            let head = format!("HTTP/1.1 416 No\r\nContent-Range: bytes */{total}\r\nContent-Length: 0\r\n\r\n");
            let _: usize = from;
            (head, Vec::new())
        }
        _ => (format!("HTTP/1.1 200 OK\r\n{etag}Content-Length: {total}\r\n\r\n"), state.content.clone()),
    }
}

/// Bytes that are nowhere the same.
pub(crate) fn bytes(count: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// A little longer than what would have come by then.
pub(crate) const MOMENT: Duration = Duration::from_millis(300);
