//! What stands in front of the relay: one address for as long as the test runs, whichever relay is behind it, and TLS
//! where it is wanted. It can be cut, as a network is.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};

const TURN: Duration = Duration::from_millis(2);

/// A front. Its threads end with the connections, its listener with the test program.
pub(crate) struct Front {
    address: SocketAddr,
    tls: bool,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    behind: Option<String>,
    streams: Vec<TcpStream>,
    seen: usize,
}

impl Front {
    pub(crate) fn start(tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let front = Self { address, tls: tls.is_some(), state: Arc::clone(&state) };
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = {
                    let mut state = state.lock().unwrap();
                    state.seen += 1;
                    let server = state.behind.as_ref().and_then(|behind| TcpStream::connect(behind).ok());
                    if let Some(server) = &server {
                        state.streams.extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
                    }
                    server
                };
                let Some(server) = server else { continue };
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                let tls = tls.clone();
                thread::spawn(move || match tls {
                    Some(config) => carry_tls(client, server, config),
                    None => carry(client, server),
                });
            }
        });
        front
    }

    /// As devices reach it.
    pub(crate) fn url(&self) -> String {
        format!("{}://{}/", if self.tls { "wss" } else { "ws" }, self.address)
    }

    /// As senders do.
    pub(crate) fn public_url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.address)
    }

    /// Leads to the server at `address` from now on.
    pub(crate) fn lead_to(&self, address: &str) {
        self.state.lock().unwrap().behind = Some(address.to_owned());
    }

    /// Cuts all connections and lets no new one through.
    pub(crate) fn cut(&self) {
        let mut state = self.state.lock().unwrap();
        state.behind = None;
        for stream in state.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Connections so far, also those that came to nothing.
    pub(crate) fn seen(&self) -> usize {
        self.state.lock().unwrap().seen
    }
}

fn carry(client: TcpStream, server: TcpStream) {
    let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut from, mut to) = (server, client);
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
}

/// One thread for both ways, because a TLS connection cannot be halved.
fn carry_tls(client: TcpStream, mut server: TcpStream, config: Arc<ServerConfig>) {
    client.set_read_timeout(Some(TURN)).unwrap();
    server.set_read_timeout(Some(TURN)).unwrap();
    let mut client = StreamOwned::new(ServerConnection::new(config).unwrap(), client);
    let mut buffer = [0; 16 * 1024];
    while pass(&mut client, &mut server, &mut buffer) && pass(&mut server, &mut client, &mut buffer) {}
    let _ = (client.sock.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
}

fn pass(from: &mut impl Read, to: &mut impl Write, buffer: &mut [u8]) -> bool {
    match from.read(buffer) {
        Ok(0) => false,
        Ok(count) => to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_ok(),
        Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
    }
}

/// A certificate authority of the test's own.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("ca.pem");
        std::fs::write(&path, self.0.pem()).unwrap();
        path
    }

    /// For a server on 127.0.0.1.
    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = certificate.signed_by(&key, &self.0).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key);
        Arc::new(config.unwrap())
    }
}
