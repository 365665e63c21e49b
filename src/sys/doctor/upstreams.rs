//! The push servers: as the daemon has them, or by connecting to each as the daemon would: name, TCP, proxy, TLS, first
//! answer. Nothing is registered, and no credentials are sent.

use std::{collections::BTreeMap, time::Duration};

use mio::{Events, Poll, Token};

use crate::{
    config::{Credentials, Proxy, UpstreamSettings},
    doctor::facts::{Seen, Upstream},
    event::{LinkError, LinkEvent, LinkId},
    sys::{
        clock,
        inbox::{self, Incoming},
        jobs::Jobs,
        link::Links,
    },
    time::Instant,
    view::{self, LinkState},
};

const INBOX: Token = Token(0);
const LINKS: usize = 1;
/// Tried at once; a configuration with more is told of those only.
const TRIES: usize = 32;
/// Events taken in per turn.
const BUDGET: usize = 64;

/// `told`: what the daemon says. Those it is not connected to, and all when it does not run, are tried.
pub(super) fn look(
    told: Option<Vec<view::Upstream>>,
    settings: Vec<UpstreamSettings>,
    proxy: Proxy,
    limit: Duration,
) -> Vec<Upstream> {
    let mut upstreams: Vec<Upstream> = match told {
        Some(told) => told
            .into_iter()
            .map(|one| Upstream { name: one.name.clone(), kind: one.kind.clone(), daemon: Some(one), tried: None })
            .collect(),
        None => settings
            .iter()
            .map(|one| Upstream {
                name: one.name.to_string(),
                kind: one.kind.as_str().to_owned(),
                daemon: None,
                tried: None,
            })
            .collect(),
    };
    let wanted = |name: &str| {
        upstreams.iter().any(|one| {
            let state = one.daemon.as_ref().map(|told| told.state);
            one.name == name && !matches!(state, Some(LinkState::Online | LinkState::Off))
        })
    };
    let tried: Vec<UpstreamSettings> = settings.into_iter().filter(|one| wanted(&one.name)).take(TRIES).collect();
    let mut results = match attempt(tried.clone(), proxy, limit) {
        Ok(results) => results,
        Err(error) => tried.iter().map(|one| (one.name.to_string(), Err(error.clone()))).collect(),
    };
    for one in &mut upstreams {
        one.tried = results.remove(&one.name);
    }
    upstreams
}

/// Connects to all of them at once; each one's milliseconds, or why it could not be reached.
fn attempt(
    upstreams: Vec<UpstreamSettings>,
    proxy: Proxy,
    limit: Duration,
) -> Result<BTreeMap<String, Seen<u64>>, String> {
    let broken = |error: std::io::Error| error.to_string();
    let mut poll = Poll::new().map_err(broken)?;
    let (sender, mut inbox) = inbox::channel(poll.registry(), INBOX).map_err(broken)?;
    let registry = poll.registry().try_clone().map_err(broken)?;
    // Whether a server is there shows before it is told who asks.
    let anonymous = upstreams.iter().map(|one| UpstreamSettings { credentials: Credentials::None, ..one.clone() });
    let jobs = Jobs::new(upstreams.len().clamp(1, TRIES));
    let mut links = Links::new(registry, LINKS, anonymous.collect(), proxy, sender, jobs);
    let begun = clock::boot();
    let end = begun + limit;
    let mut waiting: BTreeMap<LinkId, String> = BTreeMap::new();
    for (index, upstream) in (0..).zip(&upstreams) {
        links.connect(LinkId(index), &upstream.name, "", Vec::new());
        waiting.insert(LinkId(index), upstream.name.to_string());
    }
    let mut results = BTreeMap::new();
    let mut out = Vec::new();
    let mut more = true;
    while !waiting.is_empty() {
        let now = clock::boot();
        if now >= end {
            break;
        }
        let wait = if more { Duration::ZERO } else { until(links.poll_timeout(), end, now) };
        let mut events = Events::with_capacity(BUDGET);
        match poll.poll(&mut events, Some(wait)) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error.to_string()),
            _ => {}
        }
        for event in &events {
            if links.owns(event.token()) {
                links.ready(event.token(), event);
            }
        }
        while let Some(incoming) = inbox.take() {
            if let Incoming::Resolved(link, addresses) = incoming {
                links.resolved(link, addresses);
            }
        }
        links.handle_timeout(clock::boot());
        more = links.poll(&mut out, BUDGET);
        for (link, event) in out.drain(..) {
            let Some(reached) = verdict(event) else { continue };
            if let Some(name) = waiting.remove(&link) {
                let took = u64::try_from(clock::boot().since(begun).as_millis()).unwrap_or(u64::MAX);
                results.insert(name, reached.map(|()| took));
                links.close(link);
            }
        }
    }
    let late = || Err(format!("no answer within {} s", limit.as_secs()));
    results.extend(waiting.into_values().map(|name| (name, late())));
    Ok(results)
}

/// What an event of a link says of its server; `None` when nothing yet.
fn verdict(event: LinkEvent) -> Option<Seen<()>> {
    match event {
        // It answers; that it refuses a stranger at this path is as it should be.
        LinkEvent::Failed(LinkError::Http { status, .. }) if status < 500 => Some(Ok(())),
        LinkEvent::Failed(error) => Some(Err(error.to_string())),
        LinkEvent::Open => Some(Ok(())),
        LinkEvent::Closed { .. } => Some(Err("it closed the connection at once".to_owned())),
        _ => None,
    }
}

fn until(next: Option<Instant>, end: Instant, now: Instant) -> Duration {
    next.map_or(end, |next| next.min(end)).since(now)
}
