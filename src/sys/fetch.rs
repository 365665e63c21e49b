//! Downloads attachments on a worker thread.

use std::{io::Read, path::Path, sync::Arc, time::Duration};

use http::{StatusCode, Uri};
use ureq::{Agent, Error, config::RedirectAuthHeaders};

use crate::{
    config::UpstreamSettings,
    event::{Event, FetchError, FetchTicket},
    sys::{
        credentials, inbox,
        jobs::Jobs,
        tls::{self, TlsError},
    },
};

/// For a connection to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// For the whole download. It holds a worker that name resolution may need.
const LIMIT: Duration = Duration::from_secs(30);
/// Redirects followed.
const REDIRECTS: u32 = 3;

/// Downloads `url`, which a message of `upstream` names, and reports `Event::Fetched` with `ticket`: the body if it has
/// at most `limit` bytes. The upstream's credentials go to the upstream's own origin only, and never along a redirect;
/// whoever begins with https stays there.
pub fn fetch(
    jobs: &Jobs,
    sender: &inbox::Sender,
    ticket: FetchTicket,
    upstream: &UpstreamSettings,
    url: String,
    limit: u32,
) {
    let upstream = upstream.clone();
    let worker = sender.clone();
    let taken = jobs.run(move || {
        let result = download(&upstream, &url, limit);
        worker.event(Event::Fetched(ticket, result));
    });
    if !taken {
        // This is the loop's own thread, and the inbox may be full: nobody could empty it while we wait.
        let sender = sender.clone();
        let failed = Err(FetchError::Failed("too much is waiting to be done".into()));
        let told = std::thread::Builder::new().stack_size(64 * 1024).spawn(move || {
            sender.event(Event::Fetched(ticket, failed));
        });
        if let Err(error) = told {
            log::error!("the attachment {} is lost: {error}", ticket.0);
        }
    }
}

fn download(upstream: &UpstreamSettings, url: &str, limit: u32) -> Result<Arc<[u8]>, FetchError> {
    let failed = |text: String| FetchError::Failed(text);
    let uri: Uri = url.parse().map_err(|error| failed(format!("\"{url}\" is not a URL: {error}")))?;
    let origin = Origin::of(&uri).ok_or_else(|| failed(format!("\"{url}\" is not http:// or https://")))?;
    let home = upstream.http_url().parse::<Uri>().ok().and_then(|uri| Origin::of(&uri));
    let at_home = home.as_ref() == Some(&origin);
    let secure = origin.secure || home.is_some_and(|home| home.secure);
    if secure && !origin.secure {
        return Err(failed(format!("\"{url}\" is not encrypted, but its upstream is")));
    }
    // Certificates and credentials given for the upstream are for the upstream alone.
    let (ca_file, secret) = if at_home {
        let secret =
            credentials::header(upstream.kind, &upstream.credentials).map_err(|error| failed(error.to_string()))?;
        (upstream.ca_file.as_deref(), secret)
    } else {
        (None, None)
    };
    let mut request = agent(ca_file, secure).map_err(|error| failed(error.to_string()))?.get(uri);
    if let Some(secret) = secret {
        request = request.header(secret.name, secret.value.expose());
    }
    let response = request.call().map_err(|error| failed(describe(error)))?;
    match response.status() {
        StatusCode::NOT_FOUND | StatusCode::GONE => return Err(FetchError::Gone),
        status if !status.is_success() => return Err(failed(format!("the server answered {status}"))),
        _ => {}
    }
    let body = response.into_body();
    let most = u64::from(limit);
    if body.content_length().is_some_and(|length| length > most) {
        return Err(FetchError::TooLarge { limit });
    }
    let mut bytes = Vec::new();
    body.into_reader().take(most + 1).read_to_end(&mut bytes).map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > most {
        return Err(FetchError::TooLarge { limit });
    }
    Ok(bytes.into())
}

/// Made for one download: a kept one would keep its trust store and its connections too.
fn agent(ca_file: Option<&Path>, secure: bool) -> Result<Agent, TlsError> {
    let tls = match tls::ureq_config(ca_file) {
        Ok(tls) => tls,
        Err(_) if !secure => tls::ureq_without_trust(),
        Err(error) => return Err(error),
    };
    let config = Agent::config_builder()
        .tls_config(tls)
        .https_only(secure)
        .http_status_as_error(false)
        .max_redirects(REDIRECTS)
        .redirect_auth_headers(RedirectAuthHeaders::Never)
        .timeout_connect(Some(CONNECT_LIMIT))
        .timeout_global(Some(LIMIT))
        .user_agent(concat!("nightporter/", env!("CARGO_PKG_VERSION")))
        // Environment variables are for logging only.
        .proxy(None)
        .build();
    Ok(config.new_agent())
}

/// RFC 6454.
#[derive(Debug, PartialEq, Eq)]
struct Origin {
    secure: bool,
    host: String,
    port: u16,
}

impl Origin {
    fn of(uri: &Uri) -> Option<Self> {
        let secure = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let host = uri.host()?.to_ascii_lowercase();
        Some(Self { secure, host, port: uri.port_u16().unwrap_or(if secure { 443 } else { 80 }) })
    }
}

fn describe(error: Error) -> String {
    match error {
        Error::Rustls(error) => tls::describe(&error),
        Error::Io(error) => tls::tls_error(&error).map_or_else(|| error.to_string(), tls::describe),
        Error::RequireHttpsOnly(_) => "it redirects from https to http".into(),
        Error::TooManyRedirects => format!("more than {REDIRECTS} redirects"),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Write,
        net::{Ipv4Addr, TcpListener},
        sync::mpsc::{self, Receiver},
        thread,
    };

    use mio::{Events, Poll, Token};

    use super::*;
    use crate::{
        config::{Credentials, SecretSource, UpstreamKind},
        sys::inbox::Incoming,
    };

    fn upstream(url: &str) -> (tempfile::TempDir, UpstreamSettings) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("token"), "tk_1").unwrap();
        let mut settings = UpstreamSettings::new("up", UpstreamKind::Ntfy, url);
        settings.credentials = Credentials::TokenFile(SecretSource::File(dir.path().join("token")));
        (dir, settings)
    }

    /// Answers one request after another; the requests come out of the channel.
    fn serve(answers: Vec<String>) -> (String, Receiver<String>) {
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

    fn ok(body: &str) -> String {
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
    }

    fn redirect(to: &str) -> String {
        format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    }

    #[test]
    fn the_event_carries_the_ticket_and_the_body() {
        let (url, _) = serve(vec![ok("attached")]);
        let mut poll = Poll::new().unwrap();
        let (sender, mut inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        let (_dir, settings) = upstream(&url);
        fetch(&Jobs::default(), &sender, FetchTicket(9), &settings, format!("{url}file"), 8);
        poll.poll(&mut Events::with_capacity(1), Some(Duration::from_secs(20))).unwrap();
        let Some(Incoming::Event(Event::Fetched(FetchTicket(9), Ok(body)))) = inbox.take() else { panic!() };
        assert_eq!(&*body, b"attached");
    }

    #[test]
    fn credentials_go_to_the_upstream_alone() {
        let (other, at_other) = serve(vec![ok("b"), ok("c")]);
        let (home, at_home) = serve(vec![ok("a"), redirect(&format!("{other}moved"))]);
        let (_dir, settings) = upstream(&home);
        let get = |url: &str| download(&settings, url, 100).unwrap();
        assert_eq!(&*get(&format!("{home}x")), b"a");
        assert!(at_home.recv().unwrap().contains("authorization: bearer tk_1"));
        assert_eq!(&*get(&format!("{other}x")), b"b");
        assert!(!at_other.recv().unwrap().contains("authorization"));
        // Redirected from home to elsewhere.
        assert_eq!(&*get(&format!("{home}y")), b"c");
        assert!(at_home.recv().unwrap().contains("authorization"));
        let request = at_other.recv().unwrap();
        assert!(request.contains("get /moved") && !request.contains("authorization"), "{request}");
    }

    #[test]
    fn the_limit_holds_whatever_the_server_says() {
        let endless = format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{}", "x".repeat(1 << 20));
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n".to_owned();
        let liar = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nabc".to_owned();
        let (url, _) = serve(vec![ok("12345"), ok("123456"), endless, chunked.clone(), chunked, liar]);
        let (_dir, settings) = upstream(&url);
        let get = |limit| download(&settings, &format!("{url}file"), limit);
        assert_eq!(&*get(5).unwrap(), b"12345");
        assert_eq!(get(5), Err(FetchError::TooLarge { limit: 5 }));
        assert_eq!(get(5), Err(FetchError::TooLarge { limit: 5 }));
        assert_eq!(&*get(5).unwrap(), b"abcde");
        assert_eq!(get(4), Err(FetchError::TooLarge { limit: 4 }));
        assert!(matches!(get(100), Err(FetchError::Failed(_))), "a cut-off body is no body");
    }

    #[test]
    fn an_endless_body_is_left_at_the_limit() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").unwrap();
            while stream.write_all(&[b'x'; 4096]).is_ok() {}
        });
        let (_dir, settings) = upstream(&url);
        assert_eq!(download(&settings, &url, 10_000), Err(FetchError::TooLarge { limit: 10_000 }));
        server.join().unwrap();
    }

    #[test]
    fn gone_is_told_from_what_may_work_later() {
        let status = |line: &str| format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        let (url, _) = serve(vec![status("404 Not Found"), status("410 Gone"), status("503 Busy"), status("401 No")]);
        let (_dir, settings) = upstream(&url);
        let get = || download(&settings, &format!("{url}file"), 5);
        assert_eq!(get(), Err(FetchError::Gone));
        assert_eq!(get(), Err(FetchError::Gone));
        assert!(matches!(get(), Err(FetchError::Failed(text)) if text.contains("503")));
        assert!(matches!(get(), Err(FetchError::Failed(text)) if text.contains("401")));
    }

    #[test]
    fn three_redirects_and_no_more() {
        let round = |n: usize| (0..n).map(|n| redirect(&format!("/{n}"))).chain([ok("x")]).collect::<Vec<_>>();
        let (url, _) = serve(round(3));
        let (_dir, settings) = upstream(&url);
        assert_eq!(&*download(&settings, &url, 5).unwrap(), b"x");
        let (url, _) = serve(round(4));
        let (_dir, settings) = upstream(&url);
        assert!(matches!(download(&settings, &url, 5), Err(FetchError::Failed(text)) if text.contains("redirects")));
    }

    #[test]
    fn what_is_encrypted_stays_so() {
        let (plain, requests) = serve(vec![ok("never read")]);
        let secure = TlsServer::start(redirect(&plain));
        let (_dir, mut settings) = upstream(&secure.url);
        settings.ca_file = Some(secure.ca_file.clone());
        let error = download(&settings, &secure.url, 100).unwrap_err();
        assert!(matches!(&error, FetchError::Failed(text) if text.contains("https to http")), "{error:?}");
        let error = download(&settings, &format!("{plain}x"), 100).unwrap_err();
        assert!(matches!(&error, FetchError::Failed(text) if text.contains("not encrypted")), "{error:?}");
        assert!(requests.try_recv().is_err());
        for url in ["ftp://127.0.0.1/x", "file:///etc/passwd", "/etc/passwd", "http://", "https://a b/"] {
            assert!(matches!(download(&settings, url, 100), Err(FetchError::Failed(_))), "{url}");
        }
    }

    #[test]
    fn the_ca_file_is_what_is_trusted() {
        let (good, bad) = (TlsServer::start(ok("secret")), TlsServer::start(ok("secret")));
        let (_dir, mut settings) = upstream(&good.url);
        settings.ca_file = Some(good.ca_file.clone());
        assert_eq!(&*download(&settings, &good.url, 100).unwrap(), b"secret");
        settings.url = bad.url.as_str().into();
        let error = download(&settings, &bad.url, 100).unwrap_err();
        assert!(matches!(&error, FetchError::Failed(text) if text.contains("certificate")), "{error:?}");
    }

    struct TlsServer {
        url: String,
        ca_file: std::path::PathBuf,
        _dir: tempfile::TempDir,
    }

    impl TlsServer {
        fn start(answer: String) -> Self {
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
}
