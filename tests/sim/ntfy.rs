//! An ntfy server (push.md §3b): a log in one global order, a cache that may lose its old end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::json;

use crate::{
    clock::{At, SEC},
    reference::MessageNumber,
    world::LinkKey,
};

#[derive(Default)]
pub(crate) struct Ntfy {
    pub(crate) log: Vec<Cached>,
    conns: BTreeMap<LinkKey, Conn>,
    count: u64,
}

pub(crate) struct Cached {
    pub(crate) id: Arc<str>,
    pub(crate) topic: String,
    pub(crate) number: MessageNumber,
    secs: u64,
    frame: String,
}

struct Conn {
    topics: BTreeSet<String>,
    list: String,
    replay: Vec<(String, MessageNumber)>,
}

impl Ntfy {
    /// Subscribes. What is cached after `since` waits to be replayed; what comes live does not wait for that.
    pub(crate) fn connected(&mut self, link: LinkKey, path: &str) {
        let (list, since) = path.split_once("/ws?since=").expect("a subscription");
        let topics: BTreeSet<String> = list.split(',').map(str::to_owned).collect();
        let after = self.log.iter().position(|cached| *cached.id == *since).map_or(0, |at| at + 1);
        let mut replay: Vec<&Cached> =
            self.log.iter().skip(after).filter(|cached| topics.contains(&cached.topic)).collect();
        // Sorted by the second, in no order within it.
        replay.reverse();
        replay.sort_by_key(|cached| cached.secs);
        let replay = replay.into_iter().map(|cached| (cached.frame.clone(), cached.number)).collect();
        self.conns.insert(link, Conn { topics, list: list.to_owned(), replay });
    }

    pub(crate) fn open(&self, link: LinkKey, now: At) -> Option<String> {
        let conn = self.conns.get(&link)?;
        let open = json!({"id": format!("open{}", link.1), "time": now / SEC, "event": "open", "topic": conn.list});
        Some(open.to_string())
    }

    /// The next of the stored messages.
    pub(crate) fn replay(&mut self, link: LinkKey, most: usize) -> Vec<(String, MessageNumber)> {
        let Some(conn) = self.conns.get_mut(&link) else { return Vec::new() };
        conn.replay.drain(..most.min(conn.replay.len())).collect()
    }

    pub(crate) fn disconnected(&mut self, link: LinkKey) {
        self.conns.remove(&link);
    }

    pub(crate) fn links(&self) -> Vec<LinkKey> {
        self.conns.keys().copied().collect()
    }

    /// A sender's request. Whoever is subscribed gets it at once.
    pub(crate) fn publish(
        &mut self,
        topic: &str,
        number: MessageNumber,
        body: &[u8],
        priority: Option<u8>,
        now: At,
    ) -> (Arc<str>, String, Vec<LinkKey>) {
        self.count += 1;
        let id: Arc<str> = format!("n{:011}", self.count).into();
        let mut event = json!({
            "id": &*id, "time": now / SEC, "expires": now / SEC + 43200, "event": "message", "topic": topic,
        });
        if let Some(priority) = priority {
            event["priority"] = priority.into();
        }
        match std::str::from_utf8(body) {
            Ok(text) => event["message"] = text.into(),
            Err(_) => {
                event["message"] = BASE64_STANDARD.encode(body).into();
                event["encoding"] = "base64".into();
            }
        }
        let frame = event.to_string();
        let cached =
            Cached { id: Arc::clone(&id), topic: topic.to_owned(), number, secs: now / SEC, frame: frame.clone() };
        self.log.push(cached);
        let links = self.conns.iter().filter(|(_, conn)| conn.topics.contains(topic)).map(|(link, _)| *link).collect();
        (id, frame, links)
    }

    /// Everything stored up to `id`, with it.
    pub(crate) fn up_to(&self, id: &str) -> &[Cached] {
        match self.log.iter().position(|cached| *cached.id == *id) {
            Some(at) => &self.log[..=at],
            None => &[],
        }
    }
}
