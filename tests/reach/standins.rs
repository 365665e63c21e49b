//! The whole daemon against NextPush and Gotify, as far as their stand-ins go: registering, messages, broken streams, and
//! what is sent while the daemon is away.

use std::{fs, io::Write, os::unix::fs::OpenOptionsExt, path::Path, thread, time::Duration};

use super::{
    stand_in::{gotify, nextpush},
    world::{Apps, Bus, Porter, Setup},
};

const APP: &str = "org.example.App";

/// A server as this test sees it.
trait StandIn {
    fn publish(&self, endpoint: &str, body: &str);
    /// The stream breaks.
    fn cut(&self);
    /// It ends well.
    fn end(&self);
    /// How many streams there have been.
    fn connects(&self) -> usize;
    /// Messages that the server still keeps for the device.
    fn stored(&self) -> usize;
}

impl StandIn for nextpush::Standin {
    fn publish(&self, endpoint: &str, body: &str) {
        assert_eq!(Self::publish(self, endpoint.rsplit('/').next().unwrap(), body.as_bytes()), 201);
    }

    fn cut(&self) {
        Self::cut(self);
    }

    fn end(&self) {
        Self::end(self);
    }

    fn connects(&self) -> usize {
        Self::connects(self)
    }

    fn stored(&self) -> usize {
        Self::stored(self)
    }
}

impl StandIn for gotify::Standin {
    fn publish(&self, endpoint: &str, body: &str) {
        assert_eq!(Self::publish(self, endpoint.rsplit("token=").next().unwrap(), body.as_bytes()), 200);
    }

    fn cut(&self) {
        Self::cut(self);
    }

    fn end(&self) {
        Self::end(self);
    }

    fn connects(&self) -> usize {
        Self::connects(self)
    }

    fn stored(&self) -> usize {
        Self::stored(self)
    }
}

pub(crate) fn nextpush() {
    let (server, dir) = (nextpush::Standin::start(), tempfile::tempdir().unwrap());
    let keys = format!("username = \"user\"\npassword-file = \"{}\"", secret(dir.path(), "secret"));
    serves("nextpush", &server.url(), &keys, &server);
}

pub(crate) fn gotify() {
    let (server, dir) = (gotify::Standin::start(), tempfile::tempdir().unwrap());
    let keys = format!("token-file = \"{}\"", secret(dir.path(), gotify::TOKEN));
    serves("gotify", &server.url(), &keys, &server);
}

fn serves(kind: &str, url: &str, upstream: &str, server: &dyn StandIn) {
    let bus = Bus::start();
    let mut porter = Porter::with(&bus, Setup { kind, url, upstream, more: "", beside: None });
    let apps = Apps::start(&bus);
    let endpoint = apps.register_one(APP);
    porter.wait_online();
    let mut sent: Vec<String> = Vec::new();
    let mut send = |what: &str, count: usize| {
        for n in 0..count {
            let body = format!("{what} {n}");
            server.publish(&endpoint, &body);
            sent.push(body);
        }
        sent.len()
    };
    apps.wait_messages(APP, send("at once", 3));

    for how in ["broken", "ended"] {
        let before = server.connects();
        match how {
            "broken" => server.cut(),
            _ => server.end(),
        }
        let count = send(how, 20);
        apps.wait_messages(APP, count);
        assert_eq!(server.connects(), before + 1, "one new stream");
        porter.wait_online();
    }

    porter.kill();
    let count = send("away", 20);
    porter.start_again();
    apps.wait_messages(APP, count);
    let count = send("killed", 20);
    porter.kill();
    porter.start_again();
    apps.wait_messages(APP, count);
    porter.wait("the server to be told that all is safe", |_| server.stored() == 0);
    // What came twice across the crash was counted above: what is safe may still be on its way to the app.
    let came = |body: &String| apps.messages(APP).iter().any(|message| message.body == body.as_bytes());
    porter.wait("every message", |_| sent.iter().all(came));
    thread::sleep(Duration::from_millis(500));

    let mut got = apps.messages(APP);
    // Only across the crash may one come again, and then with its id.
    got.sort_by(|one, other| one.id.cmp(&other.id));
    got.dedup();
    let mut bodies: Vec<String> = got.into_iter().map(|message| String::from_utf8(message.body).unwrap()).collect();
    bodies.sort();
    sent.sort();
    assert_eq!(bodies, sent);
}

/// A file that holds a secret; its path.
fn secret(dir: &Path, text: &str) -> String {
    let path = dir.join("secret");
    let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    path.to_str().unwrap().to_owned()
}
