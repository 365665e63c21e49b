//! Downloads attachments on a worker thread.

use std::{
    io::Read,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Method, StatusCode, Uri};

use crate::{
    config::{Proxy, UpstreamSettings},
    event::{Event, FetchError, FetchTicket},
    sys::{
        http::client::{Client, Origin, home},
        inbox,
        jobs::Jobs,
    },
};

/// For the whole download.
const LIMIT: Duration = Duration::from_secs(30);

/// Downloads `url`, which a message of `upstream` names, and reports `Event::Fetched` with `ticket`: the body if it has
/// at most `limit` bytes.
///
/// Only from the upstream's own host, at its own port or the usual one: the URL is a sender's word, and this machine can
/// reach what the sender cannot (a router's pages, services on loopback). Redirects stay there as well, and whoever begins
/// with https stays with it. The upstream's credentials go to its own origin alone.
///
/// The event itself when too much is waiting already: it is then for the caller to pass on.
#[must_use]
pub fn fetch(
    jobs: &Jobs,
    sender: &inbox::Sender,
    ticket: FetchTicket,
    upstream: &UpstreamSettings,
    proxy: &Proxy,
    url: String,
    limit: u32,
) -> Option<Event> {
    let (upstream, proxy, worker) = (upstream.clone(), proxy.clone(), sender.clone());
    let taken = jobs.run(move || {
        // It holds the one worker that others wait for, so its time begins here.
        let deadline = Instant::now() + LIMIT;
        let result = download(&Client { upstream: &upstream, proxy: &proxy, deadline }, &url, limit);
        worker.event(Event::Fetched(ticket, result));
    });
    let failed = || Event::Fetched(ticket, Err(FetchError::Failed("too much is waiting to be done".into())));
    (!taken).then(failed)
}

fn download(client: &Client<'_>, url: &str, limit: u32) -> Result<Arc<[u8]>, FetchError> {
    let failed = FetchError::Failed;
    let uri = permitted(client.upstream, url).map_err(FetchError::Refused)?;
    let response = client.send(Method::GET, uri, None).map_err(failed)?;
    match response.status() {
        StatusCode::NOT_FOUND | StatusCode::GONE => return Err(FetchError::Gone),
        status if status.is_redirection() => {
            return Err(FetchError::Refused("it redirects to another host, or away from https".into()));
        }
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

/// `url`, if it is one this machine may be sent to; else why not.
fn permitted(upstream: &UpstreamSettings, url: &str) -> Result<Uri, String> {
    let uri: Uri = url.parse().map_err(|error| format!("\"{url}\" is not a URL: {error}"))?;
    let origin = Origin::of(&uri).ok_or_else(|| format!("\"{url}\" is not http:// or https://"))?;
    let home = home(upstream).ok_or("its upstream has no files")?;
    if origin.host != home.host {
        return Err(format!("it is on {}, and only what is on {} itself is fetched", origin.host, home.host));
    }
    let usual = if origin.secure { 443 } else { 80 };
    if origin.port != home.port && origin.port != usual {
        return Err(format!("it is at port {}, which is not the upstream's", origin.port));
    }
    if home.secure && !origin.secure {
        return Err(format!("\"{url}\" is not encrypted, but its upstream is"));
    }
    Ok(uri)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{Ipv4Addr, TcpListener},
        thread,
    };

    use mio::{Events, Poll, Token};

    use super::*;
    use crate::sys::{
        http::stand_in::{TlsServer, client, ok, redirect, serve, upstream},
        inbox::Incoming,
    };

    fn get(upstream: &UpstreamSettings, url: &str, limit: u32) -> Result<Arc<[u8]>, FetchError> {
        download(&client(upstream), url, limit)
    }

    #[test]
    fn the_event_carries_the_ticket_and_the_body() {
        let (url, _) = serve(vec![ok("attached")]);
        let mut poll = Poll::new().unwrap();
        let (sender, mut inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
        let (_dir, settings) = upstream(&url);
        let jobs = Jobs::default();
        let full = fetch(&jobs, &sender, FetchTicket(9), &settings, &Proxy::Direct, format!("{url}file"), 8);
        assert_eq!(full, None);
        poll.poll(&mut Events::with_capacity(1), Some(Duration::from_secs(20))).unwrap();
        let Some(Incoming::Event(Event::Fetched(FetchTicket(9), Ok(body)))) = inbox.take() else { panic!() };
        assert_eq!(&*body, b"attached");
    }

    #[test]
    fn nobody_is_sent_anywhere_but_to_the_upstream_itself() {
        let (other, at_other) = serve(vec![ok("never")]);
        let elsewhere = other.replace("127.0.0.1", "localhost");
        let (home, at_home) = serve(vec![ok("a"), redirect(&elsewhere), redirect("http://router.example/")]);
        let (_dir, settings) = upstream(&home);
        assert_eq!(&*get(&settings, &format!("{home}x"), 100).unwrap(), b"a");
        assert!(at_home.recv().unwrap().contains("authorization: bearer tk_1"));
        for (url, word) in [
            (elsewhere.as_str(), "localhost"),
            ("http://192.168.1.1/reboot", "192.168.1.1"),
            (&other, "port"),
            ("http://127.0.0.1:1/", "port"),
            (&format!("{home}y"), "redirects"),
            (&format!("{home}z"), "redirects"),
        ] {
            let error = get(&settings, url, 100).unwrap_err();
            assert!(matches!(&error, FetchError::Refused(text) if text.contains(word)), "{url}: {error:?}");
        }
        assert!(at_other.try_recv().is_err());
        // The usual port of its host may be where its files are, but not without TLS where the upstream has it.
        let mut settings = settings;
        let ok = |settings: &UpstreamSettings, url| permitted(settings, url).is_ok();
        settings.url = "https://ntfy.example:8443/".into();
        assert!(ok(&settings, "https://NTFY.example:8443/file/1") && ok(&settings, "https://ntfy.example/file/1"));
        assert!(!ok(&settings, "http://ntfy.example/file/1") && !ok(&settings, "http://ntfy.example:8443/file/1"));
        assert!(!ok(&settings, "https://ntfy.example.evil/") && !ok(&settings, "https://user@evil/ntfy.example"));
        settings.url = "mqtts://ntfy.example/".into();
        assert!(!ok(&settings, "https://ntfy.example/"));
    }

    #[test]
    fn the_limit_holds_whatever_the_server_says() {
        let endless = format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{}", "x".repeat(1 << 20));
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n".to_owned();
        let liar = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nabc".to_owned();
        let (url, _) = serve(vec![ok("12345"), ok("123456"), endless, chunked.clone(), chunked, liar]);
        let (_dir, settings) = upstream(&url);
        let get = |limit| get(&settings, &format!("{url}file"), limit);
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
        assert_eq!(get(&settings, &url, 10_000), Err(FetchError::TooLarge { limit: 10_000 }));
        server.join().unwrap();
    }

    #[test]
    fn gone_is_told_from_what_may_work_later() {
        let status = |line: &str| format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        let (url, _) = serve(vec![status("404 Not Found"), status("410 Gone"), status("503 Busy"), status("401 No")]);
        let (_dir, settings) = upstream(&url);
        let get = || get(&settings, &format!("{url}file"), 5);
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
        assert_eq!(&*get(&settings, &url, 5).unwrap(), b"x");
        let (url, _) = serve(round(4));
        let (_dir, settings) = upstream(&url);
        assert!(matches!(get(&settings, &url, 5), Err(FetchError::Failed(text)) if text.contains("redirects")));
    }

    #[test]
    fn what_is_encrypted_stays_so() {
        let (plain, requests) = serve(vec![ok("never read")]);
        let secure = TlsServer::start(redirect(&plain));
        let (_dir, mut settings) = upstream(&secure.url);
        settings.ca_file = Some(secure.ca_file.clone());
        let error = get(&settings, &secure.url, 100).unwrap_err();
        assert!(matches!(&error, FetchError::Refused(text) if text.contains("https")), "{error:?}");
        assert!(requests.try_recv().is_err());
        for url in ["ftp://127.0.0.1/x", "file:///etc/passwd", "/etc/passwd", "http://", "https://a b/"] {
            assert!(matches!(get(&settings, url, 100), Err(FetchError::Refused(_))), "{url}");
        }
    }

    #[test]
    fn the_ca_file_is_what_is_trusted() {
        let (good, bad) = (TlsServer::start(ok("secret")), TlsServer::start(ok("secret")));
        let (_dir, mut settings) = upstream(&good.url);
        settings.ca_file = Some(good.ca_file.clone());
        assert_eq!(&*get(&settings, &good.url, 100).unwrap(), b"secret");
        settings.url = bad.url.as_str().into();
        let error = get(&settings, &bad.url, 100).unwrap_err();
        assert!(matches!(&error, FetchError::Failed(text) if text.contains("certificate")), "{error:?}");
    }
}
