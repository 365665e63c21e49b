//! A TLS server in front of a plain port, with a certificate authority of its own.

use std::{
    fs,
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{ServerConfig, ServerConnection, pki_types::PrivateKeyDer};

use super::Result;

/// Listens on a loopback port as `localhost` and 127.0.0.1. Its threads end with the benchmark.
pub(crate) struct TlsProxy {
    pub(crate) address: SocketAddr,
    /// PEM: the authority to trust.
    pub(crate) ca_file: PathBuf,
}

impl TlsProxy {
    /// Begins to forward connections to `target`; the authority's certificate goes to `dir`.
    pub(crate) fn start(dir: &Path, target: SocketAddr) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // With the default name for both, OpenSSL takes the server's certificate for a self-signed one.
        params.distinguished_name.push(DnType::CommonName, "Night Porter benchmark authority");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let certificate = CertificateParams::new(names)?.signed_by(&key, &authority)?;
        let config = ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.into()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let ca_file = dir.join(format!("ca-{}.pem", address.port()));
        fs::write(&ca_file, authority.pem())?;
        let config = Arc::new(config);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let config = Arc::clone(&config);
                // What ends a connection is told to both its sides by closing it.
                thread::spawn(move || forward(config, client, target));
            }
        });
        Ok(Self { address, ca_file })
    }
}

/// Bytes held for a side that does not read, at most.
const BUFFER: usize = 64 * 1024;

fn forward(config: Arc<ServerConfig>, mut client: TcpStream, target: SocketAddr) -> Result<()> {
    let mut server = TcpStream::connect(target)?;
    let mut tls = ServerConnection::new(config)?;
    for side in [&client, &server] {
        side.set_nonblocking(true)?;
        side.set_nodelay(true)?;
    }
    // Decrypted, on the way to the server.
    let mut up = Vec::new();
    let mut chunk = [0; 16 * 1024];
    let mut server_ended = false;
    loop {
        let mut of_client = PollFlags::empty();
        of_client.set(PollFlags::POLLIN, up.len() < BUFFER);
        of_client.set(PollFlags::POLLOUT, tls.wants_write());
        let mut of_server = PollFlags::empty();
        of_server.set(PollFlags::POLLIN, !tls.wants_write() && !server_ended && !tls.is_handshaking());
        of_server.set(PollFlags::POLLOUT, !up.is_empty());
        let mut fds = [PollFd::new(client.as_fd(), of_client), PollFd::new(server.as_fd(), of_server)];
        poll(&mut fds, PollTimeout::NONE)?;
        let [of_client, of_server] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));

        if of_client.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            if tls.read_tls(&mut client)? == 0 {
                return Ok(());
            }
            let state = tls.process_new_packets();
            if let Err(error) = state {
                let _ = tls.write_tls(&mut client);
                return Err(error.into());
            }
            loop {
                match tls.reader().read(&mut chunk) {
                    // close_notify
                    Ok(0) => return Ok(()),
                    Ok(n) => up.extend_from_slice(&chunk[..n]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        if of_server.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) && !server_ended {
            match again(server.read(&mut chunk))? {
                Some(0) => {
                    server_ended = true;
                    tls.send_close_notify();
                }
                Some(n) => tls.writer().write_all(&chunk[..n])?,
                None => {}
            }
        }
        if !up.is_empty()
            && let Some(n) = again(server.write(&up))?
        {
            up.drain(..n);
        }
        while tls.wants_write() && again(tls.write_tls(&mut client))?.is_some() {}
        if server_ended && !tls.wants_write() {
            return Ok(());
        }
    }
}

/// `None` when it would block.
fn again(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(n) => Ok(Some(n)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}
