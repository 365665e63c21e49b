//! Through proxies.

use super::{
    tls_links::{Authority, serve_tls},
    *,
};
use rustls::{ServerConnection, StreamOwned};

/// No name of this machine's, so that only a proxy can lead there and nothing excepts it.
const HOST: &str = "push.test.invalid";

/// A proxy that leads everybody to `target`; its first request comes out.
fn proxy(target: &str, answer: &'static str) -> (Proxy, JoinHandle<String>) {
    let port = port_of(target);
    let (url, server) = serve(move |mut stream| {
        let head = read_head(&mut stream);
        stream.write_all(answer.as_bytes()).unwrap();
        if answer.contains(" 200 ") {
            let upstream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
            pump(stream, upstream);
        }
        head
    });
    (Proxy::Url(url.replace("ws://", "http://").replace("/base/", "/").into()), server)
}

fn port_of(url: &str) -> u16 {
    url.parse::<http::Uri>().unwrap().port_u16().unwrap()
}

fn read_head(stream: &mut impl Read) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

fn pump(one: TcpStream, other: TcpStream) {
    let copy = |mut from: TcpStream, mut to: TcpStream| {
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(std::net::Shutdown::Write);
        })
    };
    let there = copy(one.try_clone().unwrap(), other.try_clone().unwrap());
    let back = copy(other, one);
    there.join().unwrap();
    back.join().unwrap();
}

const OK: &str = "HTTP/1.1 200 Connection established\r\n\r\n";

fn echo_socket<S: Read + Write>(stream: S) {
    let (mut socket, ..) = accept(stream);
    let text = socket.read().unwrap();
    socket.send(text).unwrap();
    let _ = socket.read();
}

fn echoes(world: &mut World) {
    world.open("");
    world.links.send(LINK, "through it".into());
    world.until("the echo", |events| events.contains(&(LINK, LinkEvent::Text("through it".into()))));
    world.links.close(LINK);
}

#[test]
fn a_websocket_goes_through_a_proxy() {
    // The second is what small proxies answer.
    for answer in [OK, "HTTP/1.0 200 Connection established\r\nProxy-agent: tinyproxy/1.11\r\n\r\n"] {
        let (url, server) = serve(echo_socket);
        let (proxy, asked) = proxy(&url, answer);
        let mut world = World::behind(proxy, vec![settings(&format!("ws://{HOST}:{}/", port_of(&url)))]);
        echoes(&mut world);
        server.join().unwrap();
        let head = asked.join().unwrap();
        let destination = format!("{HOST}:{}", port_of(&url));
        assert!(head.starts_with(&format!("CONNECT {destination} HTTP/1.1\r\nHost: {destination}\r\n")), "{head}");
        assert!(!head.to_lowercase().contains("authorization"), "{head}");
    }
}

#[test]
fn the_servers_certificate_is_checked_behind_the_proxy() {
    let authority = Authority::new();
    let (url, server) = serve_tls(authority.server(HOST, &rustls::version::TLS13), echo_socket);
    let (proxy, _) = proxy(&url, OK);
    let mut upstream = settings(&format!("wss://{HOST}:{}/", port_of(&url)));
    upstream.ca_file = Some(authority.ca_file());
    let mut world = World::behind(proxy, vec![upstream]);
    echoes(&mut world);
    server.join().unwrap();
}

#[test]
fn a_stream_goes_through_a_proxy() {
    let (url, server) = serve(|mut stream| {
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(&hello).unwrap();
    });
    let (proxy, _) = proxy(&url, OK);
    let upstream = UpstreamSettings::new("up", UpstreamKind::Mqtt, format!("mqtt://{HOST}:{}/", port_of(&url)));
    let mut world = World::behind(proxy, vec![upstream]);
    world.open("");
    world.links.send_bytes(LINK, b"hello".to_vec());
    world.until("the echo", |events| events.contains(&(LINK, LinkEvent::Bytes(b"hello".to_vec()))));
    server.join().unwrap();
}

#[test]
fn a_proxy_may_be_encrypted_itself() {
    let (theirs, ours) = (Authority::new(), Authority::new());
    let (url, server) = serve_tls(ours.server(HOST, &rustls::version::TLS13), echo_socket);
    let port = port_of(&url);
    let (proxy_url, _proxy) = serve_tls(theirs.server("127.0.0.1", &rustls::version::TLS13), move |mut stream| {
        read_head(&mut stream);
        stream.write_all(OK.as_bytes()).unwrap();
        let upstream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        relay(stream, upstream);
    });
    let mut upstream = settings(&format!("wss://{HOST}:{port}/"));
    upstream.ca_file = Some(ours.ca_file());
    let proxy = Proxy::Url(proxy_url.replace("wss://", "https://").replace("/base/", "/").into());
    let mut world = World::behind(proxy, vec![upstream.clone()]);
    let client = Arc::new(TlsClient::new(Some(theirs.ca_file()), None).unwrap());
    world.links.proxy_tls = Some(Arc::clone(&client));
    echoes(&mut world);
    assert!(!client.roots_held());
    server.join().unwrap();

    // The upstream's own authority does not vouch for proxies.
    let (proxy_url, _proxy) =
        serve_tls(ours.server("elsewhere", &rustls::version::TLS13), |mut stream| stream.read(&mut [0; 16]));
    let proxy = Proxy::Url(proxy_url.replace("wss://", "https://").replace("/base/", "/").into());
    let mut world = World::behind(proxy, vec![upstream]);
    world.links.proxy_tls = Some(client);
    world.links.connect(LINK, "up", "", Vec::new());
    let event = world.until_over();
    assert!(matches!(&event, LinkEvent::Failed(LinkError::Proxy(text)) if text.contains("trusts")), "{event:?}");
}

/// Moves bytes between an encrypted and a plain stream, in turns.
fn relay(mut stream: StreamOwned<ServerConnection, TcpStream>, mut upstream: TcpStream) {
    let brief = Some(Duration::from_millis(5));
    stream.sock.set_read_timeout(brief).unwrap();
    upstream.set_read_timeout(brief).unwrap();
    let mut buffer = [0; 4096];
    let waiting = |error: &io::Error| matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => upstream.write_all(&buffer[..length]).unwrap(),
            Err(error) if waiting(&error) => {}
            Err(_) => return,
        }
        match upstream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => stream.write_all(&buffer[..length]).unwrap(),
            Err(error) if waiting(&error) => {}
            Err(_) => return,
        }
    }
}

#[test]
fn a_proxy_that_does_not_lead_there_says_what_to_do() {
    for (answer, word) in [
        (
            "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n",
            "USER",
        ),
        ("HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno.", "443 only"),
        ("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "cannot reach push.test.invalid:81"),
        ("SSH-2.0-OpenSSH\r\n\r\n", "not HTTP"),
        ("", "closed"),
        // What comes before it is asked for cannot be the server's.
        ("HTTP/1.1 200 OK\r\n\r\nwelcome", "before it is asked"),
    ] {
        let (url, _server) = serve(move |mut stream| {
            read_head(&mut stream);
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let proxy = Proxy::Url(url.replace("ws://", "http://").into());
        let mut world = World::behind(proxy, vec![settings(&format!("ws://{HOST}:81/"))]);
        world.links.connect(LINK, "up", "", Vec::new());
        let event = world.until_over();
        assert!(matches!(&event, LinkEvent::Failed(LinkError::Proxy(text)) if text.contains(word)), "{event:?}");
    }
}

#[test]
fn a_proxy_that_is_not_there_is_told_from_a_server_that_is_not() {
    let refusing = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    for (url, word) in [(format!("http://{refusing}/"), "refused"), ("http://proxy.invalid:1/".into(), "resolve")] {
        let mut world = World::behind(Proxy::Url(url.into()), vec![settings(&format!("ws://{HOST}/"))]);
        world.links.connect(LINK, "up", "", Vec::new());
        let event = world.until_over();
        assert!(matches!(&event, LinkEvent::Failed(LinkError::Proxy(text)) if text.contains(word)), "{event:?}");
    }
}
