//! Links that are not autopush's or ntfy's WebSockets: streams, event streams, binary frames, other headers.

use super::{
    tls_links::{Authority, serve_tls},
    *,
};
use crate::{event::Login, model};

fn of_kind(kind: UpstreamKind, url: &str) -> UpstreamSettings {
    UpstreamSettings::new("up", kind, url)
}

fn given(secret: &str) -> SecretSource {
    SecretSource::Given(model::Secret::new(secret))
}

fn password() -> Credentials {
    Credentials::Password { username: "phone".into(), password: given("s é cret") }
}

fn login() -> LinkEvent {
    LinkEvent::Login(Login { username: Some("phone".into()), password: Some(model::Secret::new("s é cret")) })
}

fn bytes_of(events: &[(LinkId, LinkEvent)]) -> Vec<u8> {
    let mut all = Vec::new();
    for (_, event) in events {
        if let LinkEvent::Bytes(bytes) = event {
            assert!((1..=16 * 1024).contains(&bytes.len()));
            all.extend_from_slice(bytes);
        }
    }
    all
}

fn closed() -> LinkEvent {
    LinkEvent::Closed { code: None, reason: String::new() }
}

/// What came, with neighbouring bytes joined.
fn story(world: &World) -> Vec<LinkEvent> {
    let mut story: Vec<LinkEvent> = Vec::new();
    for (_, event) in &world.events {
        match (story.last_mut(), event) {
            (Some(LinkEvent::Bytes(before)), LinkEvent::Bytes(bytes)) => before.extend_from_slice(bytes),
            _ => story.push(event.clone()),
        }
    }
    story
}

// Streams (MQTT).

fn echo<S: Read + Write>(mut stream: S) {
    let mut hello = [0; 5];
    stream.read_exact(&mut hello).unwrap();
    stream.write_all(&hello).unwrap();
    stream.flush().unwrap();
    let _ = stream.read(&mut [0]);
}

#[test]
fn a_stream_logs_in_opens_and_carries_bytes_until_its_end() {
    let (url, server) = serve(|mut stream| {
        stream.write_all(b"first").unwrap();
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(&hello).unwrap();
        hello
    });
    let mut upstream = of_kind(UpstreamKind::Mqtt, &url.replace("ws://", "mqtt://"));
    upstream.credentials = password();
    let mut world = World::new(vec![upstream]);
    world.open("this is for WebSockets only");
    world.links.ping(LINK);
    world.links.send(LINK, "no text here".into());
    world.links.send_bytes(LINK, b"hel".to_vec());
    world.links.send_bytes(LINK, b"lo".to_vec());
    assert_eq!(world.until_over(), closed());
    assert_eq!(&server.join().unwrap(), b"hello");
    assert_eq!(story(&world), [login(), LinkEvent::Open, LinkEvent::Bytes(b"firsthello".to_vec()), closed()]);
}

#[test]
fn a_token_is_the_password_and_nothing_is_nothing() {
    for (credentials, password) in
        [(Credentials::TokenFile(given("tk")), Some(model::Secret::new("tk"))), (Credentials::None, None)]
    {
        let (url, _server) = serve(echo);
        let mut upstream = of_kind(UpstreamKind::Mqtt, &url.replace("ws://", "mqtt://"));
        upstream.credentials = credentials;
        let mut world = World::new(vec![upstream]);
        world.open("");
        assert_eq!(world.events[0].1, LinkEvent::Login(Login { username: None, password }));
        assert_eq!(world.events[1].1, LinkEvent::Open);
    }
}

#[test]
fn an_encrypted_stream_opens_when_it_is_encrypted() {
    let authority = Authority::new();
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let (url, _server) = serve_tls(authority.server("127.0.0.1", version), echo);
        let mut upstream = of_kind(UpstreamKind::Mqtt, &url.replace("wss://", "mqtts://"));
        upstream.ca_file = Some(authority.ca_file());
        upstream.credentials = password();
        let mut world = World::new(vec![upstream]);
        world.open("");
        assert_eq!(story(&world), [login(), LinkEvent::Open]);
        assert!(!world.links.upstreams[0].tls.clone().unwrap().roots_held());
        world.links.send_bytes(LINK, b"hello".to_vec());
        world.until("the echo", |events| bytes_of(events) == b"hello");
        world.links.close(LINK);
    }
}

#[test]
fn a_stream_that_never_becomes_encrypted_never_opens() {
    let mqtts = |url: &str| of_kind(UpstreamKind::Mqtt, &url.replace("ws://", "mqtts://"));
    let (url, server) = serve(|mut stream| {
        stream.read_exact(&mut [0; 64]).unwrap();
        // Ends in the middle of the handshake.
    });
    let authority = Authority::new();
    let mut upstream = mqtts(&url);
    upstream.ca_file = Some(authority.ca_file());
    let mut world = World::new(vec![upstream]);
    world.links.connect(LINK, "up", "", Vec::new());
    let event = world.until_over();
    assert!(matches!(&event, LinkEvent::Failed(LinkError::Io(_))), "{event:?}");
    server.join().unwrap();

    let (url, _server) = serve(|mut stream| {
        // A broker without TLS takes the hello for something else.
        stream.read_exact(&mut [0; 64]).unwrap();
        stream.write_all(b"\x20\x02\x00\x01 and so on").unwrap();
    });
    let mut upstream = mqtts(&url);
    upstream.ca_file = Some(authority.ca_file());
    let mut world = World::new(vec![upstream]);
    world.links.connect(LINK, "up", "", Vec::new());
    let event = world.until_over();
    assert!(matches!(&event, LinkEvent::Failed(LinkError::Tls(_))), "{event:?}");
    assert_eq!(world.events.len(), 1, "neither a login nor an open link came before");
}

#[test]
fn a_large_stream_comes_whole_in_bounded_pieces() {
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let expected = sent.clone();
    let (url, _server) = serve(move |mut stream| {
        stream.write_all(&sent).unwrap();
        let _ = stream.read(&mut [0]);
    });
    let mut world = World::new(vec![of_kind(UpstreamKind::Mqtt, &url.replace("ws://", "mqtt://"))]);
    world.links.connect(LINK, "up", "", Vec::new());
    let length = expected.len();
    world.until("all of it", |events| bytes_of(events).len() == length);
    assert!(bytes_of(&world.events) == expected);
}

#[test]
fn a_stream_whose_peer_does_not_read_breaks() {
    let (release, wait) = mpsc::channel::<()>();
    let (url, server) = serve(move |stream| {
        wait.recv().ok();
        drop(stream);
    });
    let mut world = World::new(vec![of_kind(UpstreamKind::Mqtt, &url.replace("ws://", "mqtt://"))]);
    world.open("");
    let mut sent = 0;
    // At once, before the patience with a slow peer ends.
    while world.links.ended.is_empty() {
        world.links.send_bytes(LINK, vec![7; 16 * 1024]);
        sent += 1;
        assert!(sent < 4096, "64 MiB are not bounded");
    }
    assert!(matches!(world.until_over(), LinkEvent::Failed(LinkError::Io(text)) if text.contains("does not read")));
    drop(release);
    server.join().unwrap();
}

#[test]
fn a_peer_that_takes_nothing_for_long_is_given_up() {
    let (release, wait) = mpsc::channel::<()>();
    let (url, server) = serve(move |stream| {
        wait.recv().ok();
        drop(stream);
    });
    let mut world = World::new(vec![of_kind(UpstreamKind::Mqtt, &url.replace("ws://", "mqtt://"))]);
    world.open("");
    assert_eq!(world.links.poll_timeout(), None);
    // More than the socket's buffers take, less than what is kept here.
    while world.links.poll_timeout().is_none() {
        world.links.send_bytes(LINK, vec![7; 16 * 1024]);
        assert!(world.links.ended.is_empty());
    }
    let patience = world.links.poll_timeout().unwrap().since(clock::boot());
    assert!(patience > Duration::from_secs(30) && patience <= Duration::from_secs(60), "{patience:?}");
    world.quiet();
    assert!(!world.events.iter().any(|(_, event)| matches!(event, LinkEvent::Failed(_))));
    drop(release);
    server.join().unwrap();
}

#[test]
fn what_a_stream_could_not_send_goes_out_later() {
    let (url, server) = serve(|mut stream| {
        thread::sleep(Duration::from_millis(200));
        let mut all = Vec::new();
        let mut buffer = [0; 4096];
        while !all.ends_with(b"end") {
            let length = stream.read(&mut buffer).unwrap();
            all.extend_from_slice(&buffer[..length]);
        }
        stream.write_all(b"!").unwrap();
        all
    });
    let mut world = World::new(vec![of_kind(UpstreamKind::Mqtt, &url.replace("ws://", "mqtt://"))]);
    world.open("");
    let mut expected = Vec::new();
    let mut n = 0_u8;
    while world.links.poll_timeout().is_none() {
        n = n.wrapping_add(1);
        let piece = vec![n; 30_000];
        expected.extend_from_slice(&piece);
        world.links.send_bytes(LINK, piece);
    }
    world.links.send_bytes(LINK, b"end".to_vec());
    expected.extend_from_slice(b"end");
    world.until("the answer", |events| bytes_of(events) == b"!");
    assert!(server.join().unwrap() == expected);
    assert_eq!(world.links.poll_timeout(), None, "nobody waits for the peer any more");
}

// WebSockets of other kinds.

#[test]
fn mqtt_over_a_websocket_is_binary_with_its_subprotocol_and_its_own_login() {
    let (url, server) = serve(|stream| {
        let (mut socket, headers, uri) = accept(stream);
        let hello = socket.read().unwrap();
        socket.send(Message::Binary(vec![0x20, 0].into())).unwrap();
        let _ = socket.read();
        (headers, uri, hello)
    });
    let mut upstream = of_kind(UpstreamKind::Mqtt, &url);
    upstream.credentials = password();
    let mut world = World::new(vec![upstream]);
    world.open("mqtt");
    world.links.send_bytes(LINK, vec![0x10, 0]);
    world.until("bytes", |events| bytes_of(events) == [0x20, 0]);
    assert_eq!(story(&world), [login(), LinkEvent::Open, LinkEvent::Bytes(vec![0x20, 0])]);
    world.links.close(LINK);
    let (headers, uri, hello) = server.join().unwrap();
    assert_eq!(headers["sec-websocket-protocol"], "mqtt");
    assert!(!headers.contains_key("authorization"));
    assert_eq!(uri, "/base/mqtt");
    assert_eq!(hello, Message::Binary(vec![0x10, 0].into()));
}

#[test]
fn gotify_has_a_header_of_its_own_and_others_may_be_added() {
    let (url, server) = serve(|stream| accept(stream).1);
    let mut upstream = of_kind(UpstreamKind::Gotify, &url.replace("ws://", "http://"));
    upstream.credentials = Credentials::TokenFile(given("C123"));
    let mut world = World::new(vec![upstream]);
    world.links.connect(LINK, "up", "stream", vec![("X-More", "yes".into())]);
    world.until("open", |events| events.contains(&(LINK, LinkEvent::Open)));
    let headers = server.join().unwrap();
    assert_eq!(headers["x-gotify-key"], "C123");
    assert_eq!(headers["x-more"], "yes");
    assert!(!headers.contains_key("authorization") && !headers.contains_key("sec-websocket-protocol"));

    let mut world = World::new(vec![of_kind(UpstreamKind::Gotify, "ws://127.0.0.1:9/")]);
    world.links.connect(LINK, "up", "", vec![("X-More", "yes\r\nX-Evil: 1".into())]);
    let event = world.until_over();
    assert!(matches!(&event, LinkEvent::Failed(LinkError::Connect(text)) if text.contains("X-More")), "{event:?}");
}

// Event streams (NextPush).

fn next_push(url: &str) -> UpstreamSettings {
    of_kind(UpstreamKind::NextPush, &url.replace("ws://", "http://"))
}

#[test]
fn an_event_stream_is_asked_for_and_comes_without_its_framing() {
    let (url, server) = serve(|mut stream| {
        let request = read_head(&mut stream);
        stream.set_nodelay(true).unwrap();
        let answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\
                       Transfer-Encoding: chunked\r\n\r\n9\r\nevent: a\n\r\nB;x=y\r\ndata: hello\r\n2\r\n\n\n\r\n0\r\n\r\n";
        for byte in answer {
            stream.write_all(&[*byte]).unwrap();
            thread::sleep(Duration::from_micros(200));
        }
        // Until the client is gone: the last chunk ends it, not the end of the connection.
        let _ = stream.read(&mut [0]);
        request
    });
    let mut upstream = next_push(&url);
    upstream.credentials = password();
    let mut world = World::new(vec![upstream]);
    world.links.connect(LINK, "up", "device/1", vec![("urgency", "high".into())]);
    assert_eq!(world.until_over(), closed());
    let expected = LinkEvent::Bytes(b"event: a\ndata: hello\n\n".to_vec());
    assert_eq!(story(&world), [LinkEvent::Open, expected, closed()]);
    let request = server.join().unwrap().to_lowercase();
    assert!(request.starts_with("get /base/device/1 http/1.1\r\n"), "{request}");
    for field in ["accept: text/event-stream", "authorization: basic ", "urgency: high"] {
        assert!(request.contains(&format!("\r\n{field}")), "{request}");
    }
    assert!(!request.contains("encoding") && !request.contains("upgrade"), "{request}");
}

fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

fn event_stream(answer: &'static [u8]) -> Vec<LinkEvent> {
    let (url, _server) = serve_bytes(answer);
    let mut world = World::new(vec![next_push(&url)]);
    world.links.connect(LINK, "up", "", Vec::new());
    world.until_over();
    story(&world)
}

#[test]
fn an_event_stream_ends_as_its_header_says() {
    let bytes = |text: &str| LinkEvent::Bytes(text.into());
    let until_end = event_stream(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: x\n\n");
    assert_eq!(until_end, [LinkEvent::Open, bytes("data: x\n\n"), closed()]);
    let by_length = event_stream(b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nabcdmore");
    assert_eq!(by_length, [LinkEvent::Open, bytes("abcd"), closed()]);
    let empty = event_stream(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(empty, [LinkEvent::Open, closed()]);
    for cut in [
        &b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabcd"[..],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabcd",
    ] {
        let events = event_stream(cut);
        assert_eq!(events[..2], [LinkEvent::Open, bytes("abcd")]);
        assert!(matches!(&events[2], LinkEvent::Failed(LinkError::Io(text)) if text.contains("cut off")), "{events:?}");
    }
    for rubbish in [
        &b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"[..],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n",
    ] {
        let events = event_stream(rubbish);
        assert!(matches!(events.last(), Some(LinkEvent::Failed(LinkError::Protocol(_)))), "{events:?}");
    }
}

#[test]
fn what_is_no_event_stream_is_told() {
    let refused = event_stream(b"HTTP/1.1 503 Busy\r\nRetry-After: 30\r\nContent-Length: 4\r\n\r\nlate");
    let retry_after = Some(Duration::from_secs(30));
    assert_eq!(refused, [LinkEvent::Failed(LinkError::Http { status: 503, body: "late".into(), retry_after })]);
    let page = event_stream(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<h1>Welcome");
    let body = "<h1>Welcome".into();
    assert_eq!(page, [LinkEvent::Failed(LinkError::Http { status: 200, body, retry_after: None })]);
}

#[test]
fn framing_without_data_does_not_keep_the_loop() {
    let (url, server) = serve(|mut stream| {
        read_head(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
        let tiny = b"1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\nx\r\n".repeat(1000);
        while stream.write_all(&tiny).is_ok() {}
    });
    let mut world = World::new(vec![next_push(&url)]);
    world.open("");
    for _ in 0..50 {
        world.turn();
    }
    assert!(bytes_of(&world.events).iter().all(|byte| *byte == b'x'));
    world.links.close(LINK);
    server.join().unwrap();
}

// Whoever answers in the server's place.

#[test]
fn a_captive_portal_is_named_and_the_servers_own_words_are_not_taken_for_one() {
    let page = Some("http://login.example/?from=x".to_owned());
    let (url, _) = serve_bytes(b"HTTP/1.1 302 Found\r\nLocation: http://login.example/?from=x\r\n\r\n");
    assert_eq!(failed(&url), LinkError::Portal(page.clone()));
    let (url, _) = serve_bytes(b"HTTP/1.1 511 Network Authentication Required\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(failed(&url), LinkError::Portal(None));
    let portal = event_stream(b"HTTP/1.1 307 Look\r\nLocation: http://login.example/?from=x\r\n\r\n");
    assert_eq!(portal, [LinkEvent::Failed(LinkError::Portal(page))]);
    // The same host, and no location at all: not another's.
    for answer in [
        &b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"[..],
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
    ] {
        let (url, _) = serve_bytes(answer);
        let error = failed(&url);
        assert!(matches!(error, LinkError::Http { status: 302 | 304, .. }), "{error:?}");
    }
    // ntfy 2.11 refuses WebSockets so.
    let (url, _) = serve_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(failed(&url), LinkError::Http { status: 200, body: String::new(), retry_after: None });
    // Where the certificate is right, it is the server that redirects.
    let authority = Authority::new();
    let (url, _server) = serve_tls(authority.server("127.0.0.1", &rustls::version::TLS13), |mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        stream.write_all(b"HTTP/1.1 301 Moved\r\nLocation: https://new.example/\r\nContent-Length: 0\r\n\r\n").unwrap();
    });
    let mut world = tls_links::tls_world(&url, &authority);
    world.links.connect(LINK, "up", "", Vec::new());
    let body = "it redirects to https://new.example/".into();
    let expected = LinkEvent::Failed(LinkError::Http { status: 301, body, retry_after: None });
    assert_eq!(world.until_over(), expected);
}

#[test]
fn settings_can_be_replaced_and_added_while_links_stay() {
    let (old, _old) = serve(|stream| {
        let (mut socket, ..) = accept(stream);
        let text = socket.read().unwrap();
        socket.send(text).unwrap();
        let _ = socket.read();
    });
    let (new, server) = serve(|stream| accept(stream).1);
    let mut world = World::new(vec![settings(&old)]);
    world.open("");
    let mut replaced = settings(&new);
    replaced.credentials = Credentials::TokenFile(given("tk_2"));
    world.links.configure(replaced);
    let mut added = settings("ws://127.0.0.1:9/");
    added.name = "second".into();
    world.links.configure(added);
    assert_eq!(world.links.upstreams.len(), 2);
    let other = LinkId(8);
    world.links.connect(other, "up", "", Vec::new());
    world.until("open", |events| events.contains(&(other, LinkEvent::Open)));
    assert_eq!(server.join().unwrap()["authorization"], "Bearer tk_2");
    world.links.send(LINK, "still here".into());
    world.until("the echo", |events| events.contains(&(LINK, LinkEvent::Text("still here".into()))));
}
