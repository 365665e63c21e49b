use std::{
    io::Write,
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
};

use mio::{Events, Poll, Token};

use super::{
    stand_in::{TlsServer, behind, client, ok, redirect, serve, upstream},
    *,
};
use crate::{
    config::{Credentials, SecretSource, UpstreamKind},
    model::Secret,
    sys::inbox::Incoming,
};

fn asking(method: &'static str, path: &str, json: Option<&str>) -> HttpRequest {
    HttpRequest { method, path: path.into(), json: json.map(str::to_owned), limit: 100 }
}

#[test]
fn the_event_carries_the_ticket_and_the_answer() {
    let (url, requests) = serve(vec![
        "HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbusy".to_owned(),
    ]);
    let mut poll = Poll::new().unwrap();
    let (sender, mut inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
    let (_dir, settings) = upstream(&url);
    let (jobs, ticket) = (Jobs::default(), HttpTicket(9));
    let full = request(&jobs, &sender, ticket, &settings, &Proxy::Direct, asking("GET", "app?x=1", None));
    assert_eq!(full, None);
    poll.poll(&mut Events::with_capacity(1), Some(Duration::from_secs(20))).unwrap();
    let Some(Incoming::Event(Event::Http(HttpTicket(9), Ok(response)))) = inbox.take() else { panic!() };
    let retry_after = Some(Duration::from_secs(7));
    assert_eq!(response, HttpResponse { status: 503, body: "busy".into(), retry_after });
    let head = requests.recv().unwrap();
    assert!(head.starts_with("get /app?x=1 http/1.1\r\n"), "{head}");
}

#[test]
fn a_full_queue_answers_at_once() {
    let poll = Poll::new().unwrap();
    let (sender, _inbox) = inbox::channel(poll.registry(), Token(0)).unwrap();
    let (_dir, settings) = upstream("http://127.0.0.1:9/");
    let jobs = Jobs::new(1);
    let (release, wait) = mpsc::channel::<()>();
    jobs.run(move || {
        wait.recv().ok();
    });
    while jobs.run(|| {}) {}
    let full = request(&jobs, &sender, HttpTicket(1), &settings, &Proxy::Direct, asking("GET", "", None));
    assert!(matches!(full, Some(Event::Http(HttpTicket(1), Err(HttpError::Failed(_))))), "{full:?}");
    drop(release);
}

#[test]
fn every_method_goes_out_with_its_document_and_credentials() {
    for (kind, field) in [(UpstreamKind::NextPush, "authorization: basic "), (UpstreamKind::Gotify, "x-gotify-key: c1")]
    {
        for (method, json) in [
            ("GET", None),
            ("PUT", Some("{\"deviceName\":\"phone\"}")),
            ("PUT", None),
            ("POST", Some("{}")),
            ("POST", None),
            ("DELETE", None),
            ("DELETE", Some("{}")),
        ] {
            let (url, bodies) = serve_one();
            let mut settings = UpstreamSettings::new("up", kind, url.as_str());
            let secret = |text: &str| SecretSource::Given(Secret::new(text));
            settings.credentials = match kind {
                UpstreamKind::Gotify => Credentials::TokenFile(secret("c1")),
                _ => Credentials::Password { username: "ali".into(), password: secret("baba") },
            };
            let response = perform(&client(&settings), &asking(method, "x", json)).unwrap();
            assert_eq!((response.status, response.body.as_str()), (200, "done"));
            let (head, body) = bodies.join().unwrap();
            assert!(head.starts_with(&format!("{} /x http/1.1", method.to_lowercase())), "{head}");
            assert!(head.contains(&format!("\r\n{field}")), "{head}");
            assert_eq!(head.contains("content-type: application/json"), json.is_some(), "{head}");
            assert_eq!(body, json.unwrap_or_default());
        }
    }
}

/// Serves one request; its head in lower case and its body come out.
fn serve_one() -> (String, thread::JoinHandle<(String, String)>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let head = read_head(&mut stream).to_lowercase();
        let length = head.split_once("content-length: ").and_then(|(_, rest)| rest.lines().next()?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body).unwrap();
        stream.write_all(ok("done").as_bytes()).unwrap();
        (head, String::from_utf8(body).unwrap())
    });
    (url, server)
}

fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

#[test]
fn an_answer_that_cannot_be_used_is_none() {
    let binary = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n".to_owned();
    let cut = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nabc".to_owned();
    let (url, _) = serve(vec![ok(&"x".repeat(101)), ok(&"x".repeat(100)), binary.clone() + "\u{e9}", cut]);
    let (_dir, settings) = upstream(&url);
    let get = || perform(&client(&settings), &asking("GET", "", None));
    assert!(matches!(get(), Err(HttpError::Unusable(text)) if text.contains("100 bytes")));
    assert_eq!(get().unwrap().body.len(), 100);
    assert_eq!(get().unwrap().body, "é");
    assert!(matches!(get(), Err(HttpError::Failed(_))));

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_head(&mut stream);
        stream.write_all(binary.as_bytes()).unwrap();
        stream.write_all(b"\xff\xfe").unwrap();
    });
    let (_dir, settings) = upstream(&url);
    let error = perform(&client(&settings), &asking("GET", "", None)).unwrap_err();
    assert!(matches!(&error, HttpError::Unusable(text) if text.contains("UTF-8")), "{error:?}");
}

#[test]
fn redirects_stay_on_the_host_and_keep_what_was_asked() {
    let (other, at_other) = serve(vec![ok("never")]);
    let away = redirect(&other.replace("127.0.0.1", "localhost"));
    let moved = redirect("/moved");
    let kept = moved.replace("302 Found", "307 Temporary Redirect");
    let (url, requests) = serve(vec![moved.clone(), ok("a"), kept, ok("b"), away, moved]);
    let (_dir, settings) = upstream(&url);
    let ask = |method, json| perform(&client(&settings), &asking(method, "x", json)).unwrap();
    assert_eq!(ask("GET", None).body, "a");
    assert_eq!(ask("PUT", Some("{}")).body, "b");
    let heads: Vec<String> = requests.try_iter().collect();
    assert!(heads[1].starts_with("get /moved") && heads[1].contains("authorization"), "{heads:?}");
    assert!(heads[3].starts_with("put /moved") && heads[3].contains("authorization"), "{heads:?}");
    // What leads away, and what would turn a document into a question, is answered with as it is.
    assert_eq!(ask("GET", None).status, 302);
    assert_eq!(ask("POST", Some("{}")).status, 302);
    assert!(at_other.try_recv().is_err());
}

#[test]
fn trust_and_time_are_the_upstreams() {
    let (good, bad) = (TlsServer::start(ok("secret")), TlsServer::start(ok("secret")));
    let (_dir, mut settings) = upstream(&good.url);
    settings.ca_file = Some(good.ca_file);
    assert_eq!(perform(&client(&settings), &asking("GET", "", None)).unwrap().body, "secret");
    settings.url = bad.url.as_str().into();
    let error = perform(&client(&settings), &asking("GET", "", None)).unwrap_err();
    assert!(matches!(&error, HttpError::Failed(text) if text.contains("certificate")), "{error:?}");

    // A server that says nothing.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (_dir, settings) = upstream(&format!("http://{}/", listener.local_addr().unwrap()));
    let mut brief = client(&settings);
    brief.deadline = Instant::now() + Duration::from_millis(100);
    assert!(matches!(perform(&brief, &asking("GET", "", None)), Err(HttpError::Failed(_))));
    assert!(
        matches!(perform(&brief, &asking("GET", "", None)), Err(HttpError::Failed(text)) if text.contains("too long"))
    );
}

#[test]
fn the_proxy_is_gone_through_and_its_refusals_are_told() {
    for (answer, word) in [(None, None), (Some("HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n"), Some("407"))] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let proxy = Proxy::Url(format!("http://{}/", listener.local_addr().unwrap()).into());
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let connect = read_head(&mut stream);
            if let Some(answer) = answer {
                stream.write_all(answer.as_bytes()).unwrap();
                return connect;
            }
            stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").unwrap();
            let inner = read_head(&mut stream);
            stream.write_all(ok("through it").as_bytes()).unwrap();
            connect + &inner
        });
        // Only a proxy can lead to such a name.
        let (_dir, settings) = upstream("http://push.test.invalid:81/");
        let result = perform(&behind(&proxy, &settings), &asking("GET", "x", None));
        let heads = server.join().unwrap();
        assert!(heads.starts_with("CONNECT push.test.invalid:81 "), "{heads}");
        match word {
            None => {
                assert_eq!(result.unwrap().body, "through it");
                let (connect, inner) = heads.split_once("\r\n\r\n").unwrap();
                assert!(!connect.contains("tk_1") && inner.contains("tk_1"), "{heads}");
            }
            Some(word) => assert!(matches!(&result, Err(HttpError::Failed(text)) if text.contains(word)), "{result:?}"),
        }
    }
}
