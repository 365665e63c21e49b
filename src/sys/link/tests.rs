mod carriers;
mod proxies;
mod tls_links;

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
    path::PathBuf,
    sync::mpsc,
    thread::{self, JoinHandle},
    time::{Duration, Instant as StdInstant},
};

use mio::{Events, Poll};
use tungstenite::{
    Message, WebSocket,
    handshake::server::{Request as ServerRequest, Response as ServerResponse},
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use super::{prepare::Carrier, *};
use crate::{
    config::{Credentials, Proxy, SecretSource, UpstreamKind},
    sys::inbox::{self, Inbox, Incoming},
};

const INBOX: Token = Token(0);
const FIRST: usize = 100;
const LINK: LinkId = LinkId(7);

/// The loop in small.
struct World {
    poll: Poll,
    inbox: Inbox,
    links: Links,
    events: Vec<(LinkId, LinkEvent)>,
    budget: usize,
    busy: bool,
}

impl World {
    fn new(upstreams: Vec<UpstreamSettings>) -> Self {
        Self::behind(Proxy::Direct, upstreams)
    }

    fn behind(proxy: Proxy, upstreams: Vec<UpstreamSettings>) -> Self {
        let poll = Poll::new().unwrap();
        let (sender, inbox) = inbox::channel(poll.registry(), INBOX).unwrap();
        let links = Links::new(poll.registry().try_clone().unwrap(), FIRST, upstreams, proxy, sender, Jobs::default());
        Self { poll, inbox, links, events: Vec::new(), budget: 16, busy: false }
    }

    fn turn(&mut self) {
        let mut ready = Events::with_capacity(16);
        let wait = if self.busy { Duration::ZERO } else { Duration::from_millis(20) };
        self.poll.poll(&mut ready, Some(wait)).unwrap();
        for event in &ready {
            if event.token() == INBOX {
                while let Some(incoming) = self.inbox.take() {
                    let Incoming::Resolved(link, addresses) = incoming else { panic!("{incoming:?}") };
                    self.links.resolved(link, addresses);
                }
            } else {
                assert!(self.links.owns(event.token()));
                self.links.ready(event.token(), event);
            }
        }
        self.links.handle_timeout(clock::boot());
        let before = self.events.len();
        self.busy = self.links.poll(&mut self.events, self.budget);
        assert!(self.events.len() - before <= self.budget + 1, "over the budget");
    }

    #[track_caller]
    fn until(&mut self, what: &str, mut done: impl FnMut(&[(LinkId, LinkEvent)]) -> bool) {
        let start = StdInstant::now();
        while !done(&self.events) {
            assert!(start.elapsed() < Duration::from_secs(20), "{what} did not come: {:?}", self.events);
            self.turn();
        }
    }

    #[track_caller]
    fn until_over(&mut self) -> LinkEvent {
        self.until("the end", |events| {
            matches!(events.last(), Some((_, LinkEvent::Failed(_) | LinkEvent::Closed { .. })))
        });
        assert!(self.links.links.iter().all(Option::is_none), "the link's place is free again");
        self.events.last().unwrap().1.clone()
    }

    #[track_caller]
    fn open(&mut self, path: &str) {
        self.links.connect(LINK, "up", path, Vec::new());
        self.until("open", |events| events.contains(&(LINK, LinkEvent::Open)));
    }

    fn quiet(&mut self) {
        for _ in 0..5 {
            self.turn();
        }
    }
}

fn settings(url: &str) -> UpstreamSettings {
    UpstreamSettings::new("up", UpstreamKind::Autopush, url)
}

/// A listener and a thread that serves its first connection.
fn serve<T: Send + 'static>(work: impl FnOnce(TcpStream) -> T + Send + 'static) -> (String, JoinHandle<T>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("ws://{}/base/", listener.local_addr().unwrap());
    (url, thread::spawn(move || work(listener.accept().unwrap().0)))
}

fn accept<S: Read + Write>(stream: S) -> (WebSocket<S>, http::HeaderMap, String) {
    let mut seen = None;
    #[expect(clippy::result_large_err, reason = "tungstenite's type")]
    let callback = |request: &ServerRequest, mut response: ServerResponse| {
        seen = Some((request.headers().clone(), request.uri().to_string()));
        if let Some(protocol) = request.headers().get("sec-websocket-protocol") {
            response.headers_mut().insert("sec-websocket-protocol", protocol.clone());
        }
        Ok(response)
    };
    let socket = tungstenite::accept_hdr(stream, callback).unwrap();
    let (headers, uri) = seen.unwrap();
    (socket, headers, uri)
}

/// Answers every request with these bytes; gives back the request.
fn serve_bytes(answer: &'static [u8]) -> (String, JoinHandle<String>) {
    serve(move |mut stream| {
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
            request.push(byte[0]);
        }
        stream.write_all(answer).unwrap();
        String::from_utf8(request).unwrap()
    })
}

fn failed(url: &str) -> LinkError {
    let mut world = World::new(vec![settings(url)]);
    world.links.connect(LINK, "up", "", Vec::new());
    match world.until_over() {
        LinkEvent::Failed(error) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn text_goes_both_ways_and_the_request_is_right() {
    let (url, server) = serve(|stream| {
        let (mut socket, headers, uri) = accept(stream);
        let hello = socket.read().unwrap();
        socket.send(Message::text("world é")).unwrap();
        socket.send(Message::Binary(vec![1, 2].into())).unwrap();
        socket.send(Message::Ping("p".into())).unwrap();
        let pong = socket.read().unwrap();
        let ping = socket.read().unwrap();
        socket.flush().unwrap();
        let frame = CloseFrame { code: CloseCode::from(4774), reason: "SM".into() };
        socket.close(Some(frame)).unwrap();
        // Our answer to it.
        let closed = socket.read().unwrap();
        (headers, uri, hello, pong, ping, closed)
    });
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("token"), "tk_1\n").unwrap();
    let mut upstream = settings(&url);
    upstream.credentials = Credentials::TokenFile(SecretSource::File(dir.path().join("token")));
    let mut world = World::new(vec![upstream]);
    world.open("a,b/ws?since=x");
    world.links.send(LINK, "hello".into());
    world.until("ping", |events| events.contains(&(LINK, LinkEvent::Ping)));
    world.links.ping(LINK);
    assert_eq!(world.until_over(), LinkEvent::Closed { code: Some(4774), reason: "SM".into() });
    let expected = [LinkEvent::Open, LinkEvent::Text("world é".into()), LinkEvent::Bytes(vec![1, 2]), LinkEvent::Ping];
    assert_eq!(
        world.events[..4].iter().map(|(_, event)| event).collect::<Vec<_>>(),
        expected.iter().collect::<Vec<_>>()
    );
    assert!(world.events.contains(&(LINK, LinkEvent::Pong)));
    let (headers, uri, hello, pong, ping, closed) = server.join().unwrap();
    assert_eq!(uri, "/base/a,b/ws?since=x");
    assert_eq!(headers["authorization"], "Bearer tk_1");
    assert_eq!(headers["sec-websocket-protocol"], "push-notification");
    assert_eq!(headers["user-agent"], concat!("nightporter/", env!("CARGO_PKG_VERSION")));
    assert!(url.contains(headers["host"].to_str().unwrap()));
    assert_eq!(hello, Message::text("hello"));
    assert_eq!(pong, Message::Pong("p".into()));
    assert_eq!(ping, Message::Ping("".into()));
    assert!(matches!(closed, Message::Close(Some(frame)) if frame.code == CloseCode::from(4774)));
}

#[test]
fn ntfy_is_asked_for_no_subprotocol() {
    let (url, server) = serve(|stream| accept(stream).1);
    let mut upstream = settings(&url);
    upstream.kind = UpstreamKind::Ntfy;
    let mut world = World::new(vec![upstream]);
    world.open("t/ws");
    assert!(!server.join().unwrap().contains_key("sec-websocket-protocol"));
}

#[test]
fn a_close_of_ours_says_so_and_no_event_follows() {
    let (url, server) = serve(|stream| {
        let (mut socket, ..) = accept(stream);
        socket.send(Message::text("too late")).unwrap();
        socket.read().unwrap()
    });
    let mut world = World::new(vec![settings(&url)]);
    world.open("");
    world.events.clear();
    world.links.close(LINK);
    assert!(matches!(server.join().unwrap(), Message::Close(Some(frame)) if frame.code == CloseCode::Normal));
    world.quiet();
    assert!(world.events.is_empty());
    // Everything on a link that is gone does nothing.
    world.links.close(LINK);
    world.links.send(LINK, "x".into());
    world.links.resolved(LINK, Ok(vec!["127.0.0.1:1".parse().unwrap()]));
    world.quiet();
    assert!(world.events.is_empty());
}

#[test]
fn an_end_without_close_frame_is_closed_without_code() {
    let (url, server) = serve(|stream| drop(accept(stream)));
    let mut world = World::new(vec![settings(&url)]);
    world.open("");
    assert_eq!(world.until_over(), LinkEvent::Closed { code: None, reason: String::new() });
    server.join().unwrap();
}

#[test]
fn breaches_of_the_protocol_are_told_and_answered() {
    for (bytes, code) in [
        // A text frame of 64 KiB and one byte, told by its header.
        (&b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x01"[..], CloseCode::Size),
        (b"\x81\x02\xff\xfe", CloseCode::Invalid),
        (b"\xf1\x00", CloseCode::Protocol),
        (b"\x80\x01a", CloseCode::Protocol),
        (b"\x81\x81\x00\x00\x00\x00a", CloseCode::Protocol),
    ] {
        let (url, server) = serve(move |stream| {
            let (mut socket, ..) = accept(stream);
            socket.get_mut().write_all(bytes).unwrap();
            socket.read()
        });
        let mut world = World::new(vec![settings(&url)]);
        world.open("");
        let event = world.until_over();
        assert!(matches!(event, LinkEvent::Failed(LinkError::Protocol(_))), "{bytes:x?}: {event:?}");
        let answer = server.join().unwrap();
        assert!(matches!(&answer, Ok(Message::Close(Some(frame))) if frame.code == code), "{bytes:x?}: {answer:?}");
    }
}

#[test]
fn the_largest_message_fits() {
    let text = "x".repeat(64 * 1024);
    let sent = text.clone();
    let (url, _server) = serve(move |stream| {
        let (mut socket, ..) = accept(stream);
        socket.send(Message::text(sent)).unwrap();
        socket.read().map(drop)
    });
    let mut world = World::new(vec![settings(&url)]);
    world.open("");
    world.until("text", |events| events.contains(&(LINK, LinkEvent::Text(text.clone()))));
}

#[test]
fn a_refusal_carries_status_body_and_retry_after() {
    let (url, server) =
        serve_bytes(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 21\r\n\r\n{\"error\":\"forbidden\"}and more");
    let error = failed(&url);
    assert_eq!(error, LinkError::Http { status: 401, body: "{\"error\":\"forbidden\"}".into(), retry_after: None });
    assert!(server.join().unwrap().starts_with("GET /base/ HTTP/1.1\r\n"));

    let (url, _) = serve_bytes(
        b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 120\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nslow\r\n0\r\n\r\n",
    );
    let retry_after = Some(Duration::from_secs(120));
    assert_eq!(failed(&url), LinkError::Http { status: 429, body: "slow".into(), retry_after });

    let (url, _) = serve_bytes(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n");
    let body = "it redirects to http://127.0.0.1:1/".into();
    assert_eq!(failed(&url), LinkError::Http { status: 302, body, retry_after: None });

    let (url, _) = serve(|mut stream| {
        stream.write_all(b"HTTP/1.1 503 Busy\r\n\r\n").unwrap();
        stream.write_all(&[b'x'; 5000]).unwrap();
        thread::sleep(Duration::from_millis(500));
    });
    assert_eq!(failed(&url), LinkError::Http { status: 503, body: "x".repeat(512), retry_after: None });
}

#[test]
fn a_refusal_that_never_ends_is_told_all_the_same() {
    let (release, wait) = mpsc::channel::<()>();
    let (url, server) = serve(move |mut stream| {
        stream.write_all(b"HTTP/1.1 500 Oops\r\nContent-Length: 100\r\n\r\nhalf of").unwrap();
        wait.recv().ok();
    });
    assert_eq!(failed(&url), LinkError::Http { status: 500, body: "half of".into(), retry_after: None });
    drop(release);
    server.join().unwrap();
}

#[test]
fn what_is_no_websocket_server_is_told() {
    let huge: &'static [u8] = Vec::leak([&b"HTTP/1.1 200 OK\r\nX: "[..], &[b'a'; 20_000]].concat());
    for answer in [
        &b"SSH-2.0-OpenSSH_10.0\r\n\r\n"[..],
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: bm9wZQ==\r\n\r\n",
        huge,
    ] {
        let (url, _) = serve_bytes(answer);
        let error = failed(&url);
        assert!(matches!(error, LinkError::Protocol(_)), "{error:?}");
    }
    let (url, _) = serve_bytes(b"HTTP/1.1 101 Swi");
    assert!(matches!(failed(&url), LinkError::Io(_)));
}

/// A stream that is slow in the extreme.
struct Dribble(TcpStream);

impl Read for Dribble {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Dribble {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        thread::sleep(Duration::from_millis(1));
        self.0.write(&buffer[..1])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_handshake_in_pieces_of_one_byte_succeeds() {
    let (url, _server) = serve(|stream| {
        stream.set_nodelay(true).unwrap();
        let (mut socket, ..) = accept(Dribble(stream));
        socket.send(Message::text("slow but here")).unwrap();
        socket.read().map(drop)
    });
    let mut world = World::new(vec![settings(&url)]);
    world.open("");
    world.until("text", |events| events.contains(&(LINK, LinkEvent::Text("slow but here".into()))));
}

fn burst(world: &mut World) {
    world.open("");
    world.until("the last frame", |events| events.len() == 501);
    for (n, (_, event)) in world.events[1..].iter().enumerate() {
        assert_eq!(*event, LinkEvent::Text(format!("frame {n} {}", "x".repeat(n))));
    }
}

fn send_burst<S: Read + Write>(stream: S) {
    let (mut socket, ..) = accept(stream);
    for n in 0..500 {
        socket.write(Message::text(format!("frame {n} {}", "x".repeat(n)))).unwrap();
    }
    socket.flush().unwrap();
    // Until the client is gone: an end would hide a lost edge.
    let _ = socket.read();
}

#[test]
fn a_burst_is_read_in_turns_and_none_is_lost() {
    let (url, server) = serve(send_burst);
    let mut world = World::new(vec![settings(&url)]);
    burst(&mut world);
    drop(world);
    server.join().unwrap();
}

#[test]
fn a_busy_link_does_not_starve_another() {
    let (loud, _loud) = serve(|stream| {
        let (mut socket, ..) = accept(stream);
        while socket.send(Message::text("noise")).is_ok() {}
    });
    let (calm, _calm) = serve(|stream| {
        let (mut socket, ..) = accept(stream);
        while let Ok(message) = socket.read() {
            if socket.send(message).is_err() {
                break;
            }
        }
    });
    let mut second = settings(&calm);
    second.name = "calm".into();
    let mut world = World::new(vec![settings(&loud), second]);
    let other = LinkId(8);
    world.links.connect(LINK, "up", "", Vec::new());
    world.links.connect(other, "calm", "", Vec::new());
    world.until("both", |events| {
        events.contains(&(LINK, LinkEvent::Open)) && events.contains(&(other, LinkEvent::Open))
    });
    for n in 0..20 {
        world.links.send(other, format!("{n}"));
        world.until("the echo", |events| events.contains(&(other, LinkEvent::Text(format!("{n}")))));
        world.events.clear();
    }
}

#[test]
fn fragments_that_never_end_do_not_keep_the_loop() {
    let (url, server) = serve(|stream| {
        let (mut socket, ..) = accept(stream);
        let stream = socket.get_mut();
        stream.write_all(b"\x01\x00").unwrap();
        let empty = [0x00, 0x00].repeat(32 * 1024);
        while stream.write_all(&empty).is_ok() {}
    });
    let mut world = World::new(vec![settings(&url)]);
    world.open("");
    // Each turn comes back although there is always more.
    for _ in 0..50 {
        world.turn();
    }
    world.links.close(LINK);
    server.join().unwrap();
}

#[test]
fn what_comes_after_a_flood_of_fragments_is_read_without_a_new_edge() {
    let (url, _server) = serve(|stream| {
        let (mut socket, ..) = accept(stream);
        // More than is read in one turn, and all there before the first.
        let bytes = [&b"\x01\x00"[..], &[0; 100_000], b"\x80\x02hi"].concat();
        socket.get_mut().write_all(&bytes).unwrap();
        socket.read().map(drop)
    });
    let mut world = World::new(vec![settings(&url)]);
    world.open("");
    thread::sleep(Duration::from_millis(200));
    world.until("text", |events| events.contains(&(LINK, LinkEvent::Text("hi".into()))));
}

#[test]
fn a_peer_that_does_not_read_breaks_the_link_and_not_the_daemon() {
    let (release, wait) = mpsc::channel::<()>();
    let (url, server) = serve(move |stream| {
        let accepted = accept(stream);
        wait.recv().ok();
        drop(accepted);
    });
    let mut world = World::new(vec![settings(&url)]);
    world.open("");
    let mut sent = 0;
    while world.events.len() < 2 {
        world.links.send(LINK, "y".repeat(16 * 1024));
        world.turn();
        sent += 1;
        assert!(sent < 4096, "64 MiB are not bounded");
    }
    assert!(matches!(world.until_over(), LinkEvent::Failed(LinkError::Io(text)) if text.contains("does not read")));
    drop(release);
    server.join().unwrap();
}

#[test]
fn what_the_socket_does_not_take_at_once_goes_out_later() {
    let (url, _server) = serve(|stream| {
        let (mut socket, ..) = accept(stream);
        thread::sleep(Duration::from_millis(200));
        let mut total = 0;
        while let Ok(Message::Text(text)) = socket.read() {
            total += text.len();
            if text.as_str() == "end" {
                break;
            }
        }
        socket.send(Message::text(format!("{total}"))).unwrap();
        socket.read().map(drop)
    });
    let mut world = World::new(vec![settings(&url)]);
    world.open("");
    let mut expected = 3;
    // More than the socket's buffers take, up to what is kept here.
    loop {
        world.links.send(LINK, "z".repeat(50_000));
        expected += 50_000;
        let Some(Some(link)) = world.links.links.first() else { panic!("{:?}", world.events) };
        let State::Connected(connection) = &link.state else { panic!() };
        if connection.wants_write() {
            break;
        }
    }
    world.links.send(LINK, "end".into());
    world.until("the count", |events| events.contains(&(LINK, LinkEvent::Text(format!("{expected}")))));
}

#[test]
fn the_next_address_is_tried_when_one_refuses() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let good = listener.local_addr().unwrap();
    let server = thread::spawn(move || drop(accept(listener.accept().unwrap().0)));
    let refusing = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let mut world = World::new(vec![settings("ws://127.0.0.1:9/")]);
    connect_to(&mut world, vec![refusing, "[::1]:9".parse().unwrap(), good]);
    world.until("open", |events| events.contains(&(LINK, LinkEvent::Open)));
    server.join().unwrap();
}

/// A link whose addresses are these, whatever the name resolves to.
fn connect_to(world: &mut World, addresses: Vec<SocketAddr>) {
    world.links.connect(LINK, "up", "", Vec::new());
    // The worker's own answer is replaced.
    while world.inbox.take().is_none() {
        thread::sleep(Duration::from_millis(5));
    }
    world.links.resolved(LINK, Ok(addresses));
}

#[test]
fn a_silent_address_is_left_behind_by_the_next_and_may_still_win() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let good = listener.local_addr().unwrap();
    let server = thread::spawn(move || drop(accept(listener.accept().unwrap().0)));
    let (black, _held) = silent();
    let (hole, _held_too) = silent();
    let mut world = World::new(vec![settings("ws://127.0.0.1:9/")]);
    connect_to(&mut world, vec![black, hole, good]);
    // Not before its time, which is a quarter of a second for each.
    let first = world.links.poll_timeout().unwrap();
    assert!(first.since(clock::boot()) <= Duration::from_millis(250));
    world.until("open", |events| events.contains(&(LINK, LinkEvent::Open)));
    assert!(clock::boot() >= first + Duration::from_millis(250));
    server.join().unwrap();
    // The others are closed: nothing is due, and nothing comes.
    assert_eq!(world.links.poll_timeout(), None);
}

#[test]
fn a_family_that_leads_nowhere_costs_one_delay_however_many_addresses_it_has() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let good = listener.local_addr().unwrap();
    let server = thread::spawn(move || drop(accept(listener.accept().unwrap().0)));
    let holes: Vec<_> = (0..4).map(|_| silent_at(Ipv6Addr::LOCALHOST)).collect();
    let mut addresses: Vec<SocketAddr> = holes.iter().map(|(address, _)| *address).collect();
    addresses.push(good);
    let mut world = World::new(vec![settings("ws://127.0.0.1:9/")]);
    connect_to(&mut world, addresses);
    // Only the first of them was begun when the other family's turn came.
    let second = world.links.poll_timeout().unwrap();
    world.until("open", |events| events.contains(&(LINK, LinkEvent::Open)));
    server.join().unwrap();
    assert!(clock::boot() >= second);
    // One after the other, with five seconds each, took twenty.
    let took = clock::boot().since(second);
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[test]
fn the_first_attempt_goes_on_while_the_next_are_made() {
    let (late, (listener, held)) = silent();
    let (never, _held) = silent();
    let mut world = World::new(vec![settings("ws://127.0.0.1:9/")]);
    connect_to(&mut world, vec![late, never]);
    while world.links.poll_timeout().is_some() {
        world.turn();
    }
    // Both are under way, nothing more is due, and no end comes: that is for the caller.
    world.quiet();
    assert!(world.events.is_empty());
    // Room for the first: its SYN, sent again by the kernel, gets through.
    let count = held.len();
    let server = thread::spawn(move || {
        // Those that filled the backlog end at once; whoever is left is the link.
        drop(held);
        for _ in 0..=count {
            let (stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            if stream.peek(&mut [0]).is_ok_and(|length| length > 0) {
                drop(accept(stream));
                return;
            }
        }
        panic!("the link did not come");
    });
    world.until("open", |events| events.contains(&(LINK, LinkEvent::Open)));
    server.join().unwrap();
}

#[test]
fn many_silent_addresses_are_given_up_one_by_one() {
    let mut held = Vec::new();
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for _ in 0..12 {
        let (address, guard) = silent();
        addresses.push(address);
        held.push(guard);
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    addresses.push(listener.local_addr().unwrap());
    let server = thread::spawn(move || drop(accept(listener.accept().unwrap().0)));
    let mut world = World::new(vec![settings("ws://127.0.0.1:9/")]);
    connect_to(&mut world, addresses);
    world.until("open", |events| events.contains(&(LINK, LinkEvent::Open)));
    server.join().unwrap();
}

#[test]
fn closing_in_the_middle_of_a_race_leaves_nothing() {
    let (black, _held) = silent();
    let mut world = World::new(vec![settings("ws://127.0.0.1:9/")]);
    connect_to(&mut world, vec![black, black]);
    world.links.close(LINK);
    assert_eq!(world.links.poll_timeout(), None);
    world.quiet();
    assert!(world.events.is_empty());
    assert!(world.links.links.iter().all(Option::is_none));
}

/// An address that answers no SYN: a listener whose backlog is full.
fn silent() -> (SocketAddr, (TcpListener, Vec<mio::net::TcpStream>)) {
    silent_at(Ipv4Addr::LOCALHOST)
}

fn silent_at(host: impl Into<IpAddr>) -> (SocketAddr, (TcpListener, Vec<mio::net::TcpStream>)) {
    let listener = TcpListener::bind((host.into(), 0)).unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let held = (0..8).map(|_| mio::net::TcpStream::connect(address).unwrap()).collect();
    (address, (listener, held))
}

#[test]
fn a_target_is_read_from_its_url() {
    let read = |url: &str| {
        let carrier = Carrier::WebSocket(None);
        Target::parse(url, carrier).map(|t| (t.tls, t.authority, t.host, t.port, t.path))
    };
    let expect = |tls, authority: &str, host: &str, port, path: &str| {
        Ok((tls, authority.to_owned(), host.to_owned(), port, path.to_owned()))
    };
    assert_eq!(read("wss://push.example/"), expect(true, "push.example", "push.example", 443, "/"));
    assert_eq!(read("ws://h/a/b?c=d"), expect(false, "h", "h", 80, "/a/b?c=d"));
    assert_eq!(read("wss://[fd00::1]:8443/x"), expect(true, "[fd00::1]:8443", "fd00::1", 8443, "/x"));
    assert_eq!(read("mqtt://h/"), expect(false, "h", "h", 1883, "/"));
    assert_eq!(read("mqtts://h/"), expect(true, "h", "h", 8883, "/"));
    assert!(read("/x").is_err() && read("ftp://h/").is_err());
}

#[test]
fn what_fails_before_the_first_packet_comes_out_of_poll() {
    let error = failed("ws://no-such-host.invalid/");
    assert!(matches!(&error, LinkError::Resolve(text) if text.contains("no-such-host.invalid")), "{error:?}");

    let mut upstream = settings("ws://127.0.0.1:9/");
    upstream.credentials = Credentials::TokenFile(SecretSource::File("/nonexistent/token".into()));
    let mut world = World::new(vec![upstream]);
    world.links.connect(LINK, "up", "", Vec::new());
    assert!(matches!(world.until_over(), LinkEvent::Failed(LinkError::Connect(text)) if text.contains("/nonexistent")));

    let mut upstream = settings("wss://127.0.0.1:9/");
    upstream.ca_file = Some("/nonexistent/ca.pem".into());
    let mut world = World::new(vec![upstream]);
    world.links.connect(LINK, "up", "", Vec::new());
    assert!(matches!(world.until_over(), LinkEvent::Failed(LinkError::Tls(text)) if text.contains("/nonexistent")));

    for (name, path) in [("other", ""), ("up", "a b"), ("up", "a\r\nX: y")] {
        world.events.clear();
        world.links.connect(LINK, name, path, Vec::new());
        assert!(matches!(world.until_over(), LinkEvent::Failed(LinkError::Connect(_))), "{path:?}");
    }
    // Closed before anybody looked: silence.
    world.events.clear();
    world.links.connect(LINK, "other", "", Vec::new());
    world.links.close(LINK);
    world.quiet();
    assert!(world.events.is_empty());
}

#[test]
fn there_is_a_bound_on_links_and_places_are_used_again() {
    let mut world = World::new(vec![settings("ws://127.0.0.1:9/")]);
    for n in 0..LINKS as u64 + 1 {
        world.links.connect(LinkId(n), "up", "", Vec::new());
    }
    let too_many = |(_, event): &&(LinkId, LinkEvent)| matches!(event, LinkEvent::Failed(LinkError::Connect(text)) if text.contains("open already"));
    world.until("all ends", |events| events.len() == LINKS + 1);
    assert_eq!(world.events.iter().filter(too_many).count(), 1);
    assert_eq!(world.links.links.len(), LINKS);
}
