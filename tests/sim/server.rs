//! A Mozilla autopush server (push.md §3a): durable, forgetful on demand.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use nightporter::model::Urgency;
use serde_json::{Value, json};

use crate::{
    clock::{At, MS, Rng, SEC},
    reference::MessageNumber,
    world::LinkKey,
};

/// Stored messages handed out at a time.
const BATCH: usize = 10;

#[derive(Default)]
pub(crate) struct Autopush {
    clients: BTreeMap<String, Client>,
    endpoints: BTreeMap<String, (String, String)>,
    conns: BTreeMap<LinkKey, Conn>,
    count: u64,
    /// No register is refused and none is lost.
    pub(crate) kind: bool,
    /// Messages thrown away by the server itself, to be told to the reference.
    pub(crate) dropped: Vec<MessageNumber>,
    /// Channels whose registration was refused for good.
    pub(crate) refused: Vec<String>,
}

#[derive(Default)]
struct Client {
    channels: BTreeSet<String>,
    stored: Vec<Stored>,
    conn: Option<LinkKey>,
}

#[derive(Clone)]
struct Stored {
    number: MessageNumber,
    channel: String,
    version: String,
    frame: String,
    topic: Option<String>,
    expires: Option<At>,
}

#[derive(Default)]
struct Conn {
    uaid: Option<String>,
    outstanding: BTreeSet<String>,
    /// Acknowledged, but the batch is not: it comes again if the link ends now.
    batch: Vec<Stored>,
}

/// What the server does.
pub(crate) enum Deed {
    Send { link: LinkKey, after: At, frame: String, message: Option<MessageNumber> },
    Close { link: LinkKey, code: u16, reason: &'static str },
}

/// What a sender posts.
pub(crate) struct Post<'a> {
    pub(crate) number: MessageNumber,
    pub(crate) body: &'a [u8],
    pub(crate) ttl: Option<u64>,
    pub(crate) topic: Option<&'a str>,
    pub(crate) urgency: Option<Urgency>,
}

impl Autopush {
    pub(crate) fn connected(&mut self, link: LinkKey) {
        self.conns.insert(link, Conn::default());
    }

    /// The link is gone as the server sees it.
    pub(crate) fn disconnected(&mut self, link: LinkKey, rng: &mut Rng) {
        let Some(conn) = self.conns.remove(&link) else { return };
        let Some(client) = conn.uaid.and_then(|uaid| self.clients.get_mut(&uaid)) else { return };
        client.conn.take_if(|conn| *conn == link);
        if !conn.outstanding.is_empty() && rng.chance(5000) {
            for (at, message) in conn.batch.into_iter().enumerate() {
                if client.channels.contains(&message.channel) {
                    client.stored.insert(at.min(client.stored.len()), message);
                }
            }
        }
        // What was handed out when its successor came is not given out again: of a topic the newest stays.
        let newest: Vec<(String, Option<String>, String)> =
            client.stored.iter().map(|m| (m.channel.clone(), m.topic.clone(), m.version.clone())).collect();
        let dropped = &mut self.dropped;
        client.stored.retain(|m| {
            let newer = |(channel, topic, version): &(String, Option<String>, String)| {
                topic.is_some() && *channel == m.channel && *topic == m.topic && *version > m.version
            };
            let keep = !newest.iter().any(newer);
            if !keep {
                dropped.push(m.number);
            }
            keep
        });
    }

    pub(crate) fn links(&self) -> Vec<LinkKey> {
        self.conns.keys().copied().collect()
    }

    pub(crate) fn frame(&mut self, link: LinkKey, text: &str, now: At, rng: &mut Rng) -> Vec<Deed> {
        let mut deeds = Vec::new();
        let frame: Value = serde_json::from_str(text).expect("the daemon sends JSON");
        if !self.conns.contains_key(&link) {
            return deeds;
        }
        let channel = frame["channelID"].as_str().unwrap_or_default().to_owned();
        match frame["messageType"].as_str() {
            Some("hello") => self.hello(link, frame["uaid"].as_str(), now, &mut deeds),
            Some("register") => self.register(link, channel, frame["key"].as_str(), rng, &mut deeds),
            Some("unregister") => {
                if let Some(client) = self.client_of(link) {
                    client.channels.remove(&channel);
                    let (gone, kept) =
                        std::mem::take(&mut client.stored).into_iter().partition(|m| m.channel == channel);
                    client.stored = kept;
                    let gone: Vec<Stored> = gone;
                    self.dropped.extend(gone.iter().map(|message| message.number));
                    self.endpoints.retain(|_, (_, other)| *other != channel);
                }
                send(
                    link,
                    &json!({"messageType": "unregister", "channelID": channel, "status": 200}),
                    None,
                    &mut deeds,
                );
            }
            Some("ack") => {
                let versions: Vec<&str> =
                    frame["updates"].as_array().into_iter().flatten().filter_map(|u| u["version"].as_str()).collect();
                for version in versions {
                    self.ack(link, version);
                }
                self.hand_out(link, now, &mut deeds);
            }
            other => panic!("the daemon sent a frame of type {other:?}"),
        }
        deeds
    }

    /// A sender's request. The version, if it is taken.
    pub(crate) fn publish(
        &mut self,
        endpoint: &str,
        post: &Post<'_>,
        now: At,
        deeds: &mut Vec<Deed>,
    ) -> Option<(String, String)> {
        let (uaid, channel) = self.endpoints.get(endpoint)?.clone();
        let client = self.clients.get_mut(&uaid)?;
        if !client.channels.contains(&channel) {
            return None;
        }
        self.count += 1;
        let version = format!("v{:06}", self.count);
        let mut frame = json!({
            "messageType": "notification", "channelID": channel, "version": version,
            "data": BASE64_URL_SAFE_NO_PAD.encode(post.body),
        });
        if let Some(ttl) = post.ttl {
            frame["ttl"] = ttl.into();
        }
        if let Some(topic) = post.topic {
            frame["topic"] = topic.into();
        }
        if let Some(urgency) = post.urgency {
            frame["urgency"] = urgency.as_str().into();
        }
        if let Some(topic) = post.topic {
            // Replaces what waits with this topic; what was handed out goes on to wait for its ack.
            let out = client.conn.and_then(|conn| self.conns.get(&conn)).map(|conn| &conn.outstanding);
            let dropped = &mut self.dropped;
            client.stored.retain(|m| {
                let keep = m.channel != channel
                    || m.topic.as_deref() != Some(topic)
                    || out.is_some_and(|out| out.contains(&m.version));
                if !keep {
                    dropped.push(m.number);
                }
                keep
            });
        }
        let stored = Stored {
            number: post.number,
            channel: channel.clone(),
            version: version.clone(),
            frame: frame.to_string(),
            topic: post.topic.map(str::to_owned),
            expires: post.ttl.map(|ttl| now + ttl * SEC),
        };
        client.stored.push(stored.clone());
        if let Some(link) = client.conn
            && let Some(conn) = self.conns.get_mut(&link)
        {
            conn.outstanding.insert(version.clone());
            deeds.push(Deed::Send { link, after: 0, frame: stored.frame, message: Some(post.number) });
        }
        Some((channel, version))
    }

    /// Sends something once more for no reason.
    pub(crate) fn repeat(&self, rng: &mut Rng, deeds: &mut Vec<Deed>) {
        for (link, conn) in &self.conns {
            let Some(client) = conn.uaid.as_ref().and_then(|uaid| self.clients.get(uaid)) else { continue };
            let out: Vec<&Stored> = client.stored.iter().filter(|m| conn.outstanding.contains(&m.version)).collect();
            if let Some(message) = rng.pick(&out) {
                let (frame, message) = (message.frame.clone(), Some(message.number));
                deeds.push(Deed::Send { link: *link, after: rng.below(100) * MS, frame, message });
            }
        }
    }

    /// Drops a user's record; `told` closes the link with 1000 "SM" as a storage overrun does.
    pub(crate) fn forget(&mut self, told: bool, deeds: &mut Vec<Deed>) {
        for (_, client) in std::mem::take(&mut self.clients) {
            self.dropped.extend(client.stored.iter().map(|message| message.number));
            if let Some(link) = client.conn {
                if told {
                    deeds.push(Deed::Close { link, code: 1000, reason: "SM" });
                }
                if let Some(conn) = self.conns.get_mut(&link) {
                    conn.batch.clear();
                }
            }
        }
        self.endpoints.clear();
    }

    pub(crate) fn is_live(&self, endpoint: &str) -> bool {
        self.endpoints.get(endpoint).is_some_and(|(uaid, channel)| {
            self.clients.get(uaid).is_some_and(|client| client.channels.contains(channel))
        })
    }

    fn client_of(&mut self, link: LinkKey) -> Option<&mut Client> {
        let uaid = self.conns.get(&link)?.uaid.as_ref()?;
        self.clients.get_mut(uaid)
    }

    fn hello(&mut self, link: LinkKey, uaid: Option<&str>, now: At, deeds: &mut Vec<Deed>) {
        let known = uaid.filter(|uaid| self.clients.contains_key(*uaid)).map(str::to_owned);
        let uaid = known.unwrap_or_else(|| {
            self.count += 1;
            format!("{:032x}", self.count)
        });
        // Not a record before the first register: until then a new uaid at each connect is normal.
        if let Some(client) = self.clients.get_mut(&uaid)
            && let Some(ghost) = client.conn.replace(link)
            && ghost != link
        {
            deeds.push(Deed::Close { link: ghost, code: 1011, reason: "ghost" });
            self.conns.remove(&ghost);
        }
        if let Some(conn) = self.conns.get_mut(&link) {
            conn.uaid = Some(uaid.clone());
        }
        let reply = json!({"messageType": "hello", "uaid": uaid, "status": 200, "use_webpush": true, "broadcasts": {}});
        send(link, &reply, None, deeds);
        self.hand_out(link, now, deeds);
    }

    fn register(&mut self, link: LinkKey, channel: String, key: Option<&str>, rng: &mut Rng, deeds: &mut Vec<Deed>) {
        let Some(uaid) = self.conns.get(&link).and_then(|conn| conn.uaid.clone()) else { return };
        let reply = |status: u16, endpoint: &str| {
            json!({"messageType": "register", "channelID": channel, "status": status, "pushEndpoint": endpoint})
                .to_string()
        };
        let dice = if self.kind { 9999 } else { rng.below(10_000) };
        let after = match dice % 10 {
            0 => rng.between(1, 15) * SEC,
            _ => rng.below(200) * MS,
        };
        let frame = match dice {
            0..500 => return,
            500..1000 => reply(500, ""),
            1000..1100 => {
                self.refused.push(channel.clone());
                reply(400, "bad key")
            }
            _ => {
                self.count += 1;
                let kind = if key.is_some() { "v2" } else { "v1" };
                let endpoint = format!("https://push.sim/wpush/{kind}/{:06}", self.count);
                let client = self.clients.entry(uaid.clone()).or_default();
                client.conn = Some(link);
                client.channels.insert(channel.clone());
                self.endpoints.insert(endpoint.clone(), (uaid, channel.clone()));
                reply(200, &endpoint)
            }
        };
        // Some are done and the answer is lost.
        if self.kind || !rng.chance(300) {
            deeds.push(Deed::Send { link, after, frame, message: None });
        }
    }

    fn ack(&mut self, link: LinkKey, version: &str) {
        let Some(conn) = self.conns.get_mut(&link) else { return };
        conn.outstanding.remove(version);
        if let Some(client) = conn.uaid.as_ref().and_then(|uaid| self.clients.get_mut(uaid)) {
            let (done, kept) = std::mem::take(&mut client.stored).into_iter().partition(|m| m.version == version);
            client.stored = kept;
            let done: Vec<Stored> = done;
            conn.batch.extend(done);
        }
    }

    fn hand_out(&mut self, link: LinkKey, now: At, deeds: &mut Vec<Deed>) {
        let Some(conn) = self.conns.get_mut(&link) else { return };
        let Some(client) = conn.uaid.as_ref().and_then(|uaid| self.clients.get_mut(uaid)) else { return };
        if client.conn != Some(link) || !conn.outstanding.is_empty() {
            return;
        }
        conn.batch.clear();
        let dropped = &mut self.dropped;
        client.stored.retain(|message| {
            let keep = message.expires.is_none_or(|at| at > now);
            if !keep {
                dropped.push(message.number);
            }
            keep
        });
        for message in client.stored.iter().take(BATCH) {
            conn.outstanding.insert(message.version.clone());
            let frame = message.frame.clone();
            deeds.push(Deed::Send { link, after: 0, frame, message: Some(message.number) });
        }
    }
}

fn send(link: LinkKey, frame: &Value, message: Option<MessageNumber>, deeds: &mut Vec<Deed>) {
    deeds.push(Deed::Send { link, after: 0, frame: frame.to_string(), message });
}

/// Unique, 1 to 4096 bytes.
pub(crate) fn body(number: MessageNumber, rng: &mut Rng) -> Arc<[u8]> {
    let mut body = format!("message {number} ").into_bytes();
    let more = if rng.chance(500) { rng.below(4000) } else { rng.below(40) };
    body.extend((0..more).map(|n| (n % 251) as u8));
    body.into()
}
