//! What TLS adds.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::{
    HandshakeKind, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
};
use tempfile::TempDir;

use super::*;
use crate::config::ClientCertificate;

pub(super) struct Authority {
    pub(super) dir: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let dir = tempfile::tempdir().unwrap();
        // A name of its own, or another authority would seem to be this one with a wrong key.
        params.distinguished_name.push(rcgen::DnType::CommonName, dir.path().display().to_string());
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { dir, issuer }
    }

    pub(super) fn ca_file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    pub(super) fn server(&self, name: &str, version: &'static rustls::SupportedProtocolVersion) -> Arc<ServerConfig> {
        self.server_with(name, version, None, None)
    }

    /// One whose certificate is valid in these years only, or that wants one from `clients`.
    fn server_with(
        &self,
        name: &str,
        version: &'static rustls::SupportedProtocolVersion,
        years: Option<(i32, i32)>,
        clients: Option<&Self>,
    ) -> Arc<ServerConfig> {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        if let Some((from, until)) = years {
            params.not_before = rcgen::date_time_ymd(from, 1, 1);
            params.not_after = rcgen::date_time_ymd(until, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[version]).unwrap();
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(authority.issuer.der().clone()).unwrap();
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
                builder.with_client_cert_verifier(verifier)
            }
        };
        Arc::new(builder.with_single_cert(vec![cert.der().clone()], key).unwrap())
    }

    /// A certificate for a client, and its key, in files of these names.
    fn client(&self, name: &str) -> ClientCertificate {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let (certificate, key_file) =
            (self.dir.path().join(format!("{name}.pem")), self.dir.path().join(format!("{name}.key")));
        fs::write(&certificate, cert.pem()).unwrap();
        fs::write(&key_file, key.serialize_pem()).unwrap();
        ClientCertificate { certificate, key: SecretSource::File(key_file) }
    }
}

pub(super) fn serve_tls<T: Send + 'static>(
    config: Arc<ServerConfig>,
    work: impl FnOnce(StreamOwned<ServerConnection, TcpStream>) -> T + Send + 'static,
) -> (String, JoinHandle<T>) {
    let (url, server) = serve(move |stream| work(StreamOwned::new(ServerConnection::new(config).unwrap(), stream)));
    (url.replace("ws://", "wss://"), server)
}

pub(super) fn tls_world(url: &str, authority: &Authority) -> World {
    let mut upstream = settings(url);
    upstream.ca_file = Some(authority.ca_file());
    World::new(vec![upstream])
}

#[test]
fn a_burst_over_tls_is_whole_and_the_trust_store_is_dropped() {
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let authority = Authority::new();
        let (url, server) = serve_tls(authority.server("127.0.0.1", version), send_burst);
        let mut world = tls_world(&url, &authority);
        burst(&mut world);
        let trust = world.links.upstreams[0].tls.clone().unwrap();
        assert!(!trust.roots_held());
        drop(world);
        server.join().unwrap();
    }
}

#[test]
fn text_ping_and_close_pass_through_tls() {
    let authority = Authority::new();
    let (url, server) = serve_tls(authority.server("localhost", &rustls::version::TLS13), |stream| {
        let (mut socket, ..) = accept(stream);
        let hello = socket.read().unwrap();
        socket.send(Message::Ping("p".into())).unwrap();
        let pong = socket.read().unwrap();
        socket.close(Some(CloseFrame { code: CloseCode::Normal, reason: "SM".into() })).unwrap();
        while socket.read().is_ok() {}
        (hello, pong)
    });
    let mut world = tls_world(&url.replace("127.0.0.1", "localhost"), &authority);
    world.open("");
    world.links.send(LINK, "hello".into());
    assert_eq!(world.until_over(), LinkEvent::Closed { code: Some(1000), reason: "SM".into() });
    assert_eq!(server.join().unwrap(), (Message::text("hello"), Message::Pong("p".into())));
}

/// Serves these many WebSockets one after the other; how each handshake went.
fn serve_handshakes(config: Arc<ServerConfig>, count: usize) -> (String, JoinHandle<Vec<Option<HandshakeKind>>>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("wss://{}/", listener.local_addr().unwrap());
    let server = thread::spawn(move || {
        let one = |_| {
            let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = StreamOwned::new(connection, listener.accept().unwrap().0);
            if stream.conn.complete_io(&mut stream.sock).is_err() {
                return None;
            }
            let (mut socket, ..) = accept(stream);
            socket.send(Message::text("with the tickets")).unwrap();
            let _ = socket.read();
            socket.get_ref().conn.handshake_kind()
        };
        (0..count).map(one).collect()
    });
    (url, server)
}

fn open_once(world: &mut World) {
    world.events.clear();
    world.open("");
    world.until("text", |events| events.len() == 2);
    world.links.close(LINK);
}

#[test]
fn a_reconnect_resumes_the_tls_session() {
    let authority = Authority::new();
    let (url, server) = serve_handshakes(authority.server("127.0.0.1", &rustls::version::TLS13), 2);
    let mut world = tls_world(&url, &authority);
    open_once(&mut world);
    open_once(&mut world);
    assert_eq!(server.join().unwrap(), [Some(HandshakeKind::Full), Some(HandshakeKind::Resumed)]);
}

#[test]
fn a_changed_ca_file_ends_what_was_trusted_before() {
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let (authority, other) = (Authority::new(), Authority::new());
        let (url, server) = serve_handshakes(authority.server("127.0.0.1", version), 3);
        let mut world = tls_world(&url, &authority);
        open_once(&mut world);
        // One more is trusted: the server is looked at anew.
        let both = [authority.issuer.pem(), other.issuer.pem()].concat();
        fs::write(authority.ca_file(), both).unwrap();
        open_once(&mut world);
        // The server's own is not trusted any more.
        fs::write(authority.ca_file(), other.issuer.pem()).unwrap();
        world.links.connect(LINK, "up", "", Vec::new());
        let event = world.until_over();
        assert!(matches!(&event, LinkEvent::Failed(LinkError::Tls(text)) if text.contains("trusts")), "{event:?}");
        let kinds = server.join().unwrap();
        assert_eq!(kinds, [Some(HandshakeKind::Full), Some(HandshakeKind::Full), None]);
    }
}

#[test]
fn the_client_certificate_is_shown_and_read_at_each_connect() {
    let authority = Authority::new();
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let config = authority.server_with("127.0.0.1", version, None, Some(&authority));
        let (url, server) = serve_handshakes(config, 3);
        let mut upstream = settings(&url);
        upstream.ca_file = Some(authority.ca_file());
        upstream.client_certificate = Some(authority.client("phone"));
        let mut world = World::new(vec![upstream]);
        open_once(&mut world);
        open_once(&mut world);
        // Another one in the same place.
        authority.client("phone");
        open_once(&mut world);
        let expected = [HandshakeKind::Full, HandshakeKind::Resumed, HandshakeKind::Full].map(Some);
        assert_eq!(server.join().unwrap(), expected);
    }
}

#[test]
fn a_server_that_wants_a_certificate_is_understood() {
    let authority = Authority::new();
    let config = authority.server_with("127.0.0.1", &rustls::version::TLS13, None, Some(&authority));
    let (url, _server) = serve_handshakes(config, 1);
    let mut world = tls_world(&url, &authority);
    world.links.connect(LINK, "up", "", Vec::new());
    let event = world.until_over();
    assert!(
        matches!(&event, LinkEvent::Failed(LinkError::Tls(text)) if text.contains("certificate-file")),
        "{event:?}"
    );

    // A certificate and somebody else's key, a file that is none, and one that is not there.
    let (one, other) = (authority.client("one"), authority.client("other"));
    let mixed = ClientCertificate { certificate: one.certificate.clone(), key: other.key };
    let key_file = authority.dir.path().join("one.key");
    let swapped = ClientCertificate { certificate: key_file, key: SecretSource::File(one.certificate.clone()) };
    let missing = ClientCertificate { certificate: one.certificate, key: SecretSource::File("/nonexistent".into()) };
    for (certificate, word) in [(mixed, "one.pem"), (swapped, "one.key"), (missing, "/nonexistent")] {
        let mut upstream = settings("wss://127.0.0.1:9/");
        upstream.ca_file = Some(authority.ca_file());
        upstream.client_certificate = Some(certificate);
        let mut world = World::new(vec![upstream]);
        world.links.connect(LINK, "up", "", Vec::new());
        let event = world.until_over();
        assert!(matches!(&event, LinkEvent::Failed(LinkError::Tls(text)) if text.contains(word)), "{event:?}");
    }
}

#[test]
fn a_wrong_clock_shows_both_times() {
    let authority = Authority::new();
    for (years, word) in [((2001, 2002), "until 2002-01-01"), ((2090, 2091), "from 2090-01-01")] {
        let config = authority.server_with("127.0.0.1", &rustls::version::TLS13, Some(years), None);
        let (url, _server) = serve_tls(config, |mut stream| stream.read(&mut [0; 16]));
        let mut world = tls_world(&url, &authority);
        world.links.connect(LINK, "up", "", Vec::new());
        let event = world.until_over();
        let today = clock::now().wall.to_string();
        let LinkEvent::Failed(LinkError::Clock(text)) = &event else { panic!("{event:?}") };
        assert!(text.contains(word) && text.contains(&format!("it is {}", &today[..10])), "{text}");
    }
}

#[test]
fn a_long_request_waits_for_the_tls_handshake() {
    let authority = Authority::new();
    let (url, server) = serve_tls(authority.server("127.0.0.1", &rustls::version::TLS13), |mut stream| {
        let mut request = Vec::new();
        let mut buffer = [0; 4096];
        while !request.ends_with(b"\r\n\r\n") {
            let length = stream.read(&mut buffer).unwrap();
            request.extend_from_slice(&buffer[..length]);
        }
        stream.write_all(b"HTTP/1.1 414 Long\r\nContent-Length: 0\r\n\r\n").unwrap();
        request.len()
    });
    let mut world = tls_world(&url, &authority);
    world.links.connect(LINK, "up", &"t".repeat(60_000), Vec::new());
    assert!(matches!(world.until_over(), LinkEvent::Failed(LinkError::Http { status: 414, .. })));
    assert!(server.join().unwrap() > 60_000);
}

fn event_text(event: &LinkEvent) -> String {
    match event {
        LinkEvent::Failed(error) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_certificate_that_proves_nothing_is_a_tls_error() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let version = &rustls::version::TLS13;
    for (config, word) in [
        (theirs.server("127.0.0.1", version), "trusts"),
        (ours.server("elsewhere.example", version), "elsewhere.example"),
    ] {
        let (url, server) = serve_tls(config, |mut stream| stream.read(&mut [0; 16]));
        let mut world = tls_world(&url, &ours);
        world.links.connect(LINK, "up", "", Vec::new());
        let event = world.until_over();
        assert!(matches!(&event, LinkEvent::Failed(LinkError::Tls(text)) if text.contains(word)), "{event:?}");
        if word == "elsewhere.example" {
            assert!(event_text(&event).contains("captive portal"));
        }
        // The alert reached the server.
        assert!(server.join().unwrap().unwrap_err().to_string().contains("alert"));
    }
    let (url, _server) = serve(|mut stream| {
        stream.read_exact(&mut [0; 64]).unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let mut world = tls_world(&url.replace("ws://", "wss://"), &ours);
    world.links.connect(LINK, "up", "", Vec::new());
    assert!(matches!(world.until_over(), LinkEvent::Failed(LinkError::Tls(_))));
}

#[test]
fn a_tls_peer_that_does_not_read_breaks_the_link() {
    let authority = Authority::new();
    let (release, wait) = mpsc::channel::<()>();
    let (url, server) = serve_tls(authority.server("127.0.0.1", &rustls::version::TLS13), move |stream| {
        let accepted = accept(stream);
        wait.recv().ok();
        drop(accepted);
    });
    let mut world = tls_world(&url, &authority);
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
