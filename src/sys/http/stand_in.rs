//! Servers for tests.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener},
    sync::{
        Arc,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use super::client::Client;
use crate::config::{Credentials, Proxy, SecretSource, UpstreamKind, UpstreamSettings};

pub(in crate::sys) fn client(upstream: &UpstreamSettings) -> Client<'_> {
    behind(&Proxy::Direct, upstream)
}

pub(in crate::sys) fn behind<'a>(proxy: &'a Proxy, upstream: &'a UpstreamSettings) -> Client<'a> {
    Client { upstream, proxy, deadline: Instant::now() + Duration::from_secs(30) }
}

pub(in crate::sys) fn upstream(url: &str) -> (tempfile::TempDir, UpstreamSettings) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("token"), "tk_1").unwrap();
    let mut settings = UpstreamSettings::new("up", UpstreamKind::Ntfy, url);
    settings.credentials = Credentials::TokenFile(SecretSource::File(dir.path().join("token")));
    (dir, settings)
}

/// Answers one request after another; the requests come out of the channel.
pub(in crate::sys) fn serve(answers: Vec<String>) -> (String, Receiver<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
                request.push(byte[0]);
            }
            // Not every test looks, and the client may have seen enough.
            let _ = sender.send(String::from_utf8_lossy(&request).to_lowercase());
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    (url, receiver)
}

pub(in crate::sys) fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

pub(in crate::sys) fn redirect(to: &str) -> String {
    format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

pub(in crate::sys) struct TlsServer {
    pub(in crate::sys) url: String,
    pub(in crate::sys) ca_file: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl TlsServer {
    pub(in crate::sys) fn start(answer: String) -> Self {
        use rustls::{ServerConfig, ServerConnection, StreamOwned, pki_types::PrivatePkcs8KeyDer};
        let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let ca_file = dir.path().join("ca.pem");
        fs::write(&ca_file, made.cert.pem()).unwrap();
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("https://{}/", listener.local_addr().unwrap());
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = StreamOwned::new(ServerConnection::new(Arc::new(config)).unwrap(), stream);
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
                request.push(byte[0]);
            }
            let _ = stream.write_all(answer.as_bytes());
        });
        Self { url, ca_file, _dir: dir }
    }
}
