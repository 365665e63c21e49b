//! `nightporter-relay` as senders and devices see it: the real binary, on loopback.
#![cfg(all(feature = "relay", feature = "daemon"))]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

#[path = "relay/harness.rs"]
mod harness;

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    thread::sleep,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use harness::{Device, Relay, Sender, Signer, channel, path_of};
use serde_json::{Value, json};

#[test]
fn a_message_goes_from_post_to_frame() {
    let relay = Relay::in_memory(&[]);
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    assert!(uaid.len() == 32 && uaid.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')), "{uaid}");
    let endpoint = device.register(1, None);
    assert!(endpoint.starts_with(&format!("http://{}/wpush/", relay.address)), "{endpoint}");
    assert!(path_of(&endpoint).len() - "/wpush/".len() >= 27, "160 bits of base64url");

    let headers = [("TTL", "60"), ("Topic", "news"), ("Urgency", "high"), ("Content-Encoding", "aes128gcm")];
    let posted = Instant::now();
    let response = relay.post(&endpoint, &headers, b"\x00\xffhello");
    assert_eq!((response.status, response.header("ttl")), (201, Some("60")));
    let location = response.header("location").unwrap();
    assert!(location.starts_with(&format!("http://{}/m/", relay.address)), "{location}");

    let frame = device.receive();
    let version = frame["version"].as_str().unwrap().to_owned();
    let ttl = left_of(60, posted, &frame);
    assert_eq!(
        frame,
        json!({
            "messageType": "notification", "channelID": channel(1), "version": version,
            "data": BASE64_URL_SAFE_NO_PAD.encode(b"\x00\xffhello"), "headers": {"encoding": "aes128gcm"},
            "ttl": ttl, "topic": "news", "urgency": "high",
        })
    );
    let empty = relay.post(&endpoint, &[("TTL", "999999999"), ("Encryption", "salt=a"), ("Crypto-Key", "dh=b")], b"");
    assert_eq!(empty.header("ttl"), Some("2592000"), "capped at 30 days and said so");
    let frame = device.receive();
    assert_eq!(frame.get("data"), None);
    assert_eq!(frame["headers"], json!({"encryption": "salt=a", "crypto_key": "dh=b"}));
    assert_eq!(frame["urgency"], "normal");
}

#[test]
fn the_public_url_is_what_endpoints_begin_with() {
    let relay = Relay::in_memory(&["--public-url", "https://example.org/push/"]);
    let mut device = Device::connect(&relay);
    device.hello(None);
    let endpoint = device.register(1, None);
    let token = endpoint.strip_prefix("https://example.org/push/wpush/").unwrap();
    let response = relay.request("POST", &format!("/wpush/{token}"), &[("TTL", "9")], b"x");
    assert!(response.header("location").unwrap().starts_with("https://example.org/push/m/"));
}

#[test]
fn senders_get_the_status_the_rfc_names() {
    let relay = Relay::in_memory(&[]);
    let mut device = Device::connect(&relay);
    device.hello(None);
    let endpoint = device.register(1, None);

    for headers in [
        &[][..],
        &[("TTL", "")],
        &[("TTL", "-1")],
        &[("TTL", "1.5")],
        &[("TTL", "1"), ("TTL", "2")],
        &[("TTL", "1"), ("Topic", "no spaces")],
        &[("TTL", "1"), ("Topic", "123456789012345678901234567890123")],
        &[("TTL", "1"), ("Urgency", "urgent")],
    ] {
        assert_eq!(relay.post(&endpoint, headers, b"x").status, 400, "{headers:?}");
    }
    assert_eq!(relay.post(&endpoint, &[("TTL", "1")], &[7; 4096]).status, 201);
    assert_eq!(relay.post(&endpoint, &[("TTL", "1")], &[7; 4097]).status, 413);
    let chunked = [("TTL", "1"), ("Transfer-Encoding", "chunked")];
    let mut body = b"1001\r\n".to_vec();
    body.extend([7; 4097]);
    body.extend(b"\r\n0\r\n\r\n");
    assert_eq!(relay.post(&endpoint, &chunked, &body).status, 413, "no Content-Length to go by");
    let long = "x".repeat(20_000);
    assert_eq!(relay.post(&endpoint, &[("TTL", "1"), ("X-Long", &long)], b"x").status, 431);

    let unknown = format!("/wpush/{}", "A".repeat(32));
    for path in [&*unknown, "/wpush/", "/wpush/short", "/wpush/../health", "/elsewhere", "/m"] {
        assert_eq!(relay.request("POST", path, &[("TTL", "1")], b"x").status, 404, "{path}");
    }
    let message = format!("/m/{}", "A".repeat(32));
    for (method, path, allowed) in [
        ("GET", path_of(&endpoint), "POST"),
        ("PUT", path_of(&endpoint), "POST"),
        ("DELETE", path_of(&endpoint), "POST"),
        ("GET", &message, "DELETE"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/", "GET"),
    ] {
        let response = relay.request(method, path, &[("TTL", "1")], b"");
        assert_eq!((response.status, response.header("allow")), (405, Some(allowed)), "{method} {path}");
    }
    let health = relay.request("GET", "/health", &[], b"");
    assert_eq!((health.status, health.body.trim()), (200, "ok"));
    assert!((400..500).contains(&relay.request("GET", "/", &[], b"").status), "a WebSocket or nothing");

    assert_eq!(device.receive()["data"], BASE64_URL_SAFE_NO_PAD.encode([7; 4096]), "the only one accepted");
    device.unregister(1);
    assert_eq!(relay.post(&endpoint, &[("TTL", "1")], b"x").status, 410);
}

#[test]
fn frames_that_break_the_protocol_close_the_connection() {
    let relay = Relay::in_memory(&["--handshake-timeout", "300ms"]);
    let late = Device::connect(&relay).closing();
    assert_eq!(late.0, 1011, "hello came too late");
    for first in ["", "rubbish", "[]", "{}", r#"{"messageType":"ping"}"#, r#"{"messageType":"hello","uaid":7}"#] {
        let mut device = Device::connect(&relay);
        device.send_text(first);
        assert_eq!(device.closing().0, 1011, "{first:?}");
    }
    for (frame, code) in [
        ("rubbish".to_owned(), 1011),
        (r#"{"messageType":"unheard-of"}"#.to_owned(), 1011),
        (r#"{"messageType":"hello"}"#.to_owned(), 1011),
        (json!({"messageType": "register", "channelID": channel(1).to_uppercase()}).to_string(), 1011),
        (json!({"messageType": "register", "channelID": channel(1).replace('-', "")}).to_string(), 1011),
        (" ".repeat(70_000), 1009),
        (" ".repeat(600_000), 1002),
    ] {
        let mut device = Device::connect(&relay);
        device.hello(None);
        device.send_text(&frame);
        assert_eq!(device.closing().0, code, "{:.40}", frame);
    }
    let mut device = Device::connect(&relay);
    device.hello(None);
    device.send_binary(b"{}");
    assert_eq!(device.closing().0, 1003);
    assert_eq!(relay.request("GET", "/health", &[], b"").status, 200, "nothing of this hurts the server");
}

#[test]
fn registering_again_keeps_the_endpoint_and_another_key_moves_it() {
    let relay = Relay::in_memory(&["--max-channels", "2", "--max-users", "1"]);
    let (key, other) = (Signer::new().key(), Signer::new().key());
    let mut device = Device::connect(&relay);
    device.hello(None);
    let plain = device.register(1, None);
    assert_eq!(device.register(1, None), plain);
    let bound = device.register(1, Some(&key));
    assert_ne!(bound, plain);
    assert_eq!(relay.post(&plain, &[("TTL", "1")], b"x").status, 410);
    assert_eq!(device.register(1, Some(&key)), bound);
    assert_ne!(device.register(1, Some(&other)), bound);

    for bad in ["", "rubbish", &key[..80]] {
        assert_eq!(device.try_register(2, Some(bad))["status"], 400, "{bad:?}");
    }
    device.register(2, None);
    assert_eq!(device.try_register(3, None)["status"], 500, "--max-channels");
    device.unregister(3);
    device.unregister(2);
    device.register(3, None);

    let mut second = Device::connect(&relay);
    second.hello(None);
    assert_eq!(second.try_register(1, None)["status"], 500, "--max-users");
}

#[test]
fn a_bound_endpoint_takes_messages_from_its_key_only() {
    let relay = Relay::in_memory(&[]);
    let (signer, stranger) = (Signer::new(), Signer::new());
    let mut device = Device::connect(&relay);
    device.hello(None);
    let bound = device.register(1, Some(&signer.key()));
    let open = device.register(2, None);
    let origin = format!("http://{}", relay.address);
    let good = signer.authorization(&origin, 3600);
    for (authorization, why) in [
        (String::new(), "nothing proved"),
        (stranger.authorization(&origin, 3600), "another key"),
        (good.replace(&signer.key(), &stranger.key()), "another key named"),
        (signer.authorization("https://elsewhere.example", 3600), "another audience"),
        (signer.authorization(&origin, -1), "expired"),
        (signer.authorization(&origin, 90_000), "valid for too long"),
        ("Bearer abc".to_owned(), "another scheme"),
    ] {
        let headers = [("TTL", "9"), ("Authorization", &*authorization)];
        let headers = if authorization.is_empty() { &headers[..1] } else { &headers[..] };
        let response = relay.post(&bound, headers, b"x");
        assert_eq!((response.status, response.header("www-authenticate")), (401, Some("vapid")), "{why}");
    }
    assert_eq!(relay.post(&bound, &[("TTL", "9"), ("Authorization", &good)], b"mine").status, 201);
    assert_eq!(device.receive()["data"], BASE64_URL_SAFE_NO_PAD.encode("mine"), "and none of the others");
    assert_eq!(relay.post(&open, &[("TTL", "9")], b"x").status, 201);
}

#[test]
fn messages_expire() {
    let relay = Relay::in_memory(&[]);
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    let endpoint = device.register(1, None);
    assert_eq!(relay.post(&endpoint, &[("TTL", "0")], b"now").status, 201);
    assert_eq!(device.receive()["ttl"], 0, "a connected device gets it");
    device.leave();

    let now_or_never = relay.post(&endpoint, &[("TTL", "0")], b"never");
    assert_eq!((now_or_never.status, now_or_never.header("ttl")), (201, Some("0")));
    assert_eq!(relay.delete(now_or_never.header("location").unwrap()), 404, "it was never stored");
    let short = relay.post(&endpoint, &[("TTL", "1")], b"short");
    let posted = Instant::now();
    relay.post(&endpoint, &[("TTL", "60")], b"long");
    sleep(Duration::from_millis(2100));
    assert_eq!(relay.delete(short.header("location").unwrap()), 404);
    let mut device = Device::connect(&relay);
    device.hello(Some(&uaid));
    let frame = device.receive();
    assert_eq!(frame["data"], BASE64_URL_SAFE_NO_PAD.encode("long"));
    assert!(left_of(60, posted, &frame) <= 58, "seconds left: {frame}");
    device.hears_nothing();
}

#[test]
fn a_topic_keeps_the_newest_only() {
    let relay = Relay::in_memory(&[]);
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    let (one, two) = (device.register(1, None), device.register(2, None));
    device.leave();
    let old = relay.post(&one, &[("TTL", "60"), ("Topic", "t")], b"old");
    relay.post(&one, &[("TTL", "60")], b"no topic");
    relay.post(&two, &[("TTL", "60"), ("Topic", "t")], b"other channel");
    relay.post(&one, &[("TTL", "60"), ("Topic", "u")], b"other topic");
    relay.post(&one, &[("TTL", "60"), ("Topic", "t")], b"new");
    assert_eq!(relay.delete(old.header("location").unwrap()), 404);
    let mut device = Device::connect(&relay);
    device.hello(Some(&uaid));
    assert_eq!(device.bodies(4), ["no topic", "other channel", "other topic", "new"]);
    device.hears_nothing();
}

#[test]
fn what_got_201_survives_kill_9_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().to_str().unwrap();
    let relay = Relay::start(&["--state-dir", state]);
    let mode = fs::metadata(directory.path().join("relay.sqlite3")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "endpoints and device ids are secrets");
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    let endpoint = device.register(1, None);
    device.leave();
    for number in 0..25 {
        assert_eq!(relay.post(&endpoint, &[("TTL", "60")], format!("{number}").as_bytes()).status, 201);
    }
    relay.kill();

    let relay = Relay::start(&["--state-dir", state]);
    let mut device = Device::connect(&relay);
    assert_eq!(device.hello(Some(&uaid)), uaid);
    let all: Vec<String> = (0..25).map(|number| number.to_string()).collect();
    assert_eq!(device.bodies(10), all[..10]);
    device.hears_nothing();
    device.ack(9);
    device.hears_nothing();
    device.ack(1);
    assert_eq!(device.bodies(10), all[10..20]);
    device.ack(10);
    assert_eq!(device.bodies(5), all[20..]);
    device.ack(2);
    // An answer to something later shows that the acknowledgements are in.
    device.register(2, None);
    relay.kill();

    let relay = Relay::start(&["--state-dir", state]);
    let mut device = Device::connect(&relay);
    assert_eq!(device.hello(Some(&uaid)), uaid);
    assert_eq!(device.bodies(3), all[22..], "what was acknowledged does not come back");
    relay.request("POST", path_of(&endpoint), &[("TTL", "60")], b"live");
    assert_eq!(device.bodies(1), ["live"]);
}

#[test]
fn live_messages_come_back_until_they_are_acknowledged() {
    let relay = Relay::in_memory(&[]);
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    let endpoint = device.register(1, None);
    relay.post(&endpoint, &[("TTL", "60")], b"one");
    relay.post(&endpoint, &[("TTL", "60")], b"two");
    assert_eq!(device.bodies(2), ["one", "two"]);
    device.send(&json!({"messageType": "nack", "version": device.unacked[0].1, "code": 302}));
    device.ack_version("never seen");
    device.ack(1);
    device.leave();
    let mut device = Device::connect(&relay);
    device.hello(Some(&uaid));
    assert_eq!(device.bodies(1), ["two"]);
    device.hears_nothing();
}

#[test]
fn an_unknown_device_gets_a_new_name() {
    let relay = Relay::in_memory(&[]);
    let unknown = "0123456789abcdef0123456789abcdef";
    for sent in [unknown, "", "rubbish"] {
        assert_ne!(Device::connect(&relay).hello(Some(sent)), sent);
    }
    // The record is written with the first channel.
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    device.leave();
    assert_ne!(Device::connect(&relay).hello(Some(&uaid)), uaid);
}

#[test]
fn a_device_that_reads_too_much_is_reset() {
    let relay = Relay::in_memory(&["--message-limit", "15"]);
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    let endpoint = device.register(1, None);
    device.leave();
    for _ in 0..16 {
        relay.post(&endpoint, &[("TTL", "60")], b"x");
    }
    let mut device = Device::connect(&relay);
    device.hello(Some(&uaid));
    device.bodies(10);
    device.ack(10);
    assert_eq!(device.closing(), (1000, "SM".to_owned()));
    assert_eq!(relay.post(&endpoint, &[("TTL", "60")], b"x").status, 410);
    assert_ne!(Device::connect(&relay).hello(Some(&uaid)), uaid);
}

#[test]
fn the_newer_connection_of_a_device_wins() {
    let relay = Relay::in_memory(&[]);
    let mut old = Device::connect(&relay);
    let uaid = old.hello(None);
    let endpoint = old.register(1, None);
    let mut new = Device::connect(&relay);
    assert_eq!(new.hello(Some(&uaid)), uaid);
    assert_eq!(old.closing().0, 1011);
    relay.post(&endpoint, &[("TTL", "60")], b"x");
    assert_eq!(new.bodies(1), ["x"], "the old one's goodbye takes nothing from the new one");
}

#[test]
fn pings_have_rules_on_both_sides() {
    let relay = Relay::in_memory(&["--min-client-ping", "400ms"]);
    let mut device = Device::connect(&relay);
    device.hello(None);
    device.send_text("{}");
    assert_eq!(device.receive(), json!({}));
    sleep(Duration::from_millis(450));
    device.send_text(r#"{"messageType":"ping"}"#);
    assert_eq!(device.receive(), json!({}));
    device.send_text("{}");
    assert_eq!(device.closing().0, 1011);

    let relay = Relay::in_memory(&["--ping-interval", "200ms", "--pong-timeout", "300ms"]);
    let mut device = Device::connect(&relay);
    device.hello(None);
    let until = Instant::now() + Duration::from_millis(900);
    while Instant::now() < until {
        device.hears_nothing();
    }
    assert!(device.pings >= 3, "answered and asked again: {}", device.pings);
    sleep(Duration::from_millis(700));
    assert_eq!(device.closing().0, 1011, "no pong in time");
}

#[test]
fn quotas_answer_429_and_when_to_come_back() {
    let limits = ["--max-channel-messages", "2", "--max-messages", "3", "--max-bytes", "100"];
    let relay = Relay::in_memory(&limits);
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    let (one, two, three) = (device.register(1, None), device.register(2, None), device.register(3, None));
    device.leave();
    let post = |endpoint: &str, body: &[u8]| relay.post(endpoint, &[("TTL", "60"), ("Topic", "t")], body).status;
    assert_eq!(relay.post(&three, &[("TTL", "60")], &[1; 101]).status, 429, "bytes of the device");
    assert_eq!(relay.post(&one, &[("TTL", "60")], b"a").status, 201);
    assert_eq!(post(&one, b"b"), 201);
    let refused = relay.post(&one, &[("TTL", "60")], b"c");
    assert_eq!(refused.status, 429, "messages of the channel");
    assert!(refused.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
    assert_eq!(post(&one, b"d"), 201, "a replacement takes no more room");
    assert_eq!(post(&two, b"e"), 201);
    assert_eq!(post(&three, b"f"), 429, "messages of the device");
    assert_eq!(relay.post(&three, &[("TTL", "0")], b"g").status, 201, "TTL 0 waits nowhere");
    let mut device = Device::connect(&relay);
    device.hello(Some(&uaid));
    assert_eq!(device.bodies(3), ["a", "d", "e"]);
    device.ack(3);
    device.register(4, None);
    assert_eq!(post(&three, b"h"), 201, "room again");

    let relay = Relay::in_memory(&["--burst", "3", "--rate", "1"]);
    let mut device = Device::connect(&relay);
    device.hello(None);
    let (one, two) = (device.register(1, None), device.register(2, None));
    for _ in 0..3 {
        assert_eq!(relay.post(&one, &[("TTL", "0")], b"x").status, 201);
    }
    let refused = relay.post(&one, &[("TTL", "0")], b"x");
    assert_eq!(refused.status, 429);
    assert!((50..=60).contains(&refused.header("retry-after").unwrap().parse().unwrap()));
    assert_eq!(relay.post(&two, &[("TTL", "0")], b"x").status, 201);
}

#[test]
fn a_sender_can_take_a_message_back() {
    let relay = Relay::in_memory(&[]);
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    let endpoint = device.register(1, None);
    device.leave();
    let response = relay.post(&endpoint, &[("TTL", "60")], b"sorry");
    let location = response.header("location").unwrap();
    assert_eq!(relay.delete(location), 204);
    assert_eq!(relay.delete(location), 404);
    relay.post(&endpoint, &[("TTL", "60")], b"stays");
    let mut device = Device::connect(&relay);
    device.hello(Some(&uaid));
    assert_eq!(device.bodies(1), ["stays"]);
}

#[test]
fn a_device_that_reads_slowly_loses_nothing() {
    const COUNT: usize = 1500;
    let relay = Relay::in_memory(&[]);
    let mut device = Device::connect(&relay);
    device.hello(None);
    let endpoint = device.register(1, None);
    let other = device.register(2, None);
    // About 8 MB in base64: more than the socket's buffers and the 128 slots hold.
    let mut sender = Sender::connect(&relay);
    let padding = "x".repeat(4080);
    for number in 0..COUNT {
        let endpoint = if number % 2 == 0 { &endpoint } else { &other };
        assert_eq!(sender.post(endpoint, 60, format!("{number:06}{padding}").as_bytes()), 201);
    }
    for number in 0..COUNT {
        let body = device.bodies(1).remove(0);
        assert_eq!(body[..6], format!("{number:06}"));
        device.ack(1);
    }
    device.hears_nothing();
    assert!(relay.stop().contains("is behind"), "the detour through the database was taken");
}

#[test]
fn connections_and_slow_requests_are_bounded() {
    let relay = Relay::in_memory(&["--max-connections", "2", "--request-timeout", "400ms"]);
    let mut device = Device::connect(&relay);
    device.hello(None);
    let mut slow = std::net::TcpStream::connect(&relay.address).unwrap();
    slow.write_all(b"POST /wpush/").unwrap();
    slow.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    sleep(Duration::from_millis(50));
    let refused = relay.request("GET", "/health", &[], b"");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("30")));
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest);
    sleep(Duration::from_millis(50));
    assert_eq!(relay.request("GET", "/health", &[], b"").status, 200, "the slow one has lost its place");
    device.hears_nothing();
}

#[test]
fn a_full_database_refuses_new_messages_and_keeps_the_old() {
    let directory = tempfile::tempdir().unwrap();
    let relay = Relay::start(&["--state-dir", directory.path().to_str().unwrap(), "--max-database", "262144"]);
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    let endpoint = device.register(1, None);
    device.leave();
    let mut stored = 0;
    let refused = loop {
        let response = relay.post(&endpoint, &[("TTL", "60")], &[b'x'; 4000]);
        match response.status {
            201 => stored += 1,
            _ => break response,
        }
        assert!(stored < 100, "the bound does not hold");
    };
    assert_eq!(refused.status, 507);
    assert!(refused.header("retry-after").is_some());
    let mut device = Device::connect(&relay);
    assert_eq!(device.hello(Some(&uaid)), uaid);
    for _ in 0..stored {
        device.bodies(1);
        device.ack(1);
    }
    device.hears_nothing();
    assert_eq!(relay.post(&endpoint, &[("TTL", "60")], &[b'x'; 4000]).status, 201, "acknowledging made room");
}

#[test]
fn a_damaged_database_is_kept_aside() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().to_str().unwrap();
    let file = directory.path().join("relay.sqlite3");
    fs::write(&file, b"this was a database once".repeat(1000)).unwrap();
    let relay = Relay::start(&["--state-dir", state]);
    Device::connect(&relay).hello(None);
    assert!(relay.stop().contains("DAMAGED"), "said loudly");
    let kept: Vec<_> = fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_str().unwrap().contains(".damaged-"))
        .collect();
    assert_eq!(fs::read(&kept[0]).unwrap(), b"this was a database once".repeat(1000));

    // Damage in the middle of a real one.
    let relay = Relay::start(&["--state-dir", state]);
    let mut device = Device::connect(&relay);
    device.hello(None);
    for number in 0..20 {
        device.register(number, None);
    }
    relay.stop();
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle..].fill(0xa5);
    fs::write(&file, bytes).unwrap();
    let relay = Relay::start(&["--state-dir", state]);
    assert!(relay.stop().contains("DAMAGED"));
}

#[test]
fn it_ends_politely() {
    let relay = Relay::in_memory(&[]);
    let mut device = Device::connect(&relay);
    device.hello(None);
    relay.terminate();
    assert_eq!(device.closing().0, 1001);
    relay.stop();
}

#[test]
fn failures_have_the_exit_codes_of_sysexits() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().to_str().unwrap();
    let running = Relay::start(&["--state-dir", state]);
    assert_eq!(Relay::exit_code(&["--no-such-flag"]), 64);
    assert_eq!(Relay::exit_code(&["--memory", "--public-url", "nonsense"]), 64);
    assert_eq!(Relay::exit_code(&["--memory", "--ping-interval", "0s"]), 64);
    assert_eq!(Relay::exit_code(&["--version"]), 0);
    assert_eq!(Relay::exit_code(&["--memory", "--listen", &running.address]), 69);
    assert_eq!(Relay::exit_code(&["--listen", "127.0.0.1:0", "--state-dir", state]), 69, "in use");
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    assert_eq!(Relay::exit_code(&["--state-dir", file.join("below").to_str().unwrap()]), 73);
    running.stop();
    let database = rusqlite::Connection::open(directory.path().join("relay.sqlite3")).unwrap();
    database.execute_batch("PRAGMA user_version = 99").unwrap();
    drop(database);
    assert_eq!(Relay::exit_code(&["--listen", "127.0.0.1:0", "--state-dir", state]), 78);
}

#[test]
fn the_log_holds_no_secrets() {
    let relay = Relay::in_memory(&[]);
    let mut device = Device::connect(&relay);
    let uaid = device.hello(None);
    let endpoint = device.register(1, None);
    let response = relay.post(&endpoint, &[("TTL", "60")], b"very private");
    assert_eq!(device.bodies(1), ["very private"]);
    device.ack(1);
    device.send_text("rubbish");
    device.closing();
    let location = response.header("location").unwrap().to_owned();
    let log = relay.stop();
    assert!(log.contains("session 1"), "the harness logs at trace level");
    let body = BASE64_URL_SAFE_NO_PAD.encode("very private");
    for secret in [&*uaid, &path_of(&endpoint)[7..], &path_of(&location)[3..], "very private", &body] {
        assert!(!log.contains(secret), "{secret} in\n{log}");
    }
}

/// What is left of a message's TTL when its frame comes, in whole seconds: no less than the time since it was posted leaves.
fn left_of(ttl: u64, posted: Instant, frame: &Value) -> u64 {
    let left = frame["ttl"].as_u64().unwrap();
    let least = ttl.saturating_sub(posted.elapsed().as_secs() + 1);
    assert!((least..=ttl).contains(&left), "{least} to {ttl}: {frame}");
    left
}
