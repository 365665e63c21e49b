//! Links to upstreams: mio TCP, rustls, and on top of them WebSockets (tungstenite), HTTP event streams, or a plain stream;
//! straight or through a proxy.
//!
//! Owned by the loop's thread; nothing here waits. What would (name resolution, reading secrets and certificates) is
//! done on a worker before the first packet, and its end comes back through the inbox as `Incoming::Resolved`.

mod body;
mod connection;
mod event_stream;
mod exchange;
mod prepare;
pub(super) mod race;
mod stream;
mod transport;
mod tunnel;
mod upgrade;
mod websocket;

#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{Arc, PoisonError},
};

use mio::{Interest, Registry, Token, event::Event};

use self::{
    connection::{Connection, Step},
    prepare::{Handover, Preparation, Target},
    race::Context,
};
use crate::{
    config::{self, UpstreamSettings},
    event::{LinkError, LinkEvent, LinkId},
    sys::{
        clock,
        inbox::Sender,
        jobs::Jobs,
        proxy,
        tls::{self, TlsClient},
    },
    time::{Instant, earliest},
};

/// Links at once. Tokens `first_token..first_token + LINKS` belong to [`Links`].
pub const LINKS: usize = 1024;

/// All links.
pub struct Links {
    registry: Registry,
    first_token: usize,
    upstreams: Vec<Upstream>,
    proxy: config::Proxy,
    /// For proxies that are spoken to through TLS.
    proxy_tls: Option<Arc<TlsClient>>,
    sender: Sender,
    jobs: Jobs,
    /// A link's place is its token; places are used again.
    links: Vec<Option<Link>>,
    /// Last events of links that are gone already.
    ended: VecDeque<(LinkId, LinkEvent)>,
    /// Whose turn is first, so that a busy link does not always come before the others.
    first: usize,
}

#[derive(Debug)]
struct Upstream {
    settings: Arc<UpstreamSettings>,
    tls: Option<Arc<TlsClient>>,
}

#[derive(Debug)]
struct Link {
    id: LinkId,
    state: State,
    readable: bool,
    writable: bool,
    /// What the one socket is registered for, once there is one.
    interest: Option<Interest>,
}

#[derive(Debug)]
enum State {
    /// A worker resolves the name and reads what is needed.
    Preparing(Handover),
    Connected(Box<Connection>),
}

impl Links {
    /// No links yet. Uses tokens `first_token..first_token + LINKS` of `registry`; `sender` is how the workers in
    /// `jobs` report back.
    pub fn new(
        registry: Registry,
        first_token: usize,
        upstreams: Vec<UpstreamSettings>,
        proxy: config::Proxy,
        sender: Sender,
        jobs: Jobs,
    ) -> Self {
        let upstreams =
            upstreams.into_iter().map(|settings| Upstream { settings: Arc::new(settings), tls: None }).collect();
        Self {
            registry,
            first_token,
            upstreams,
            proxy,
            proxy_tls: None,
            sender,
            jobs,
            links: Vec::new(),
            ended: VecDeque::new(),
            first: 0,
        }
    }

    /// From now on there is an upstream with these settings; they replace those of the same name. Links that are open, or
    /// about to be, stay as they are.
    pub fn configure(&mut self, settings: UpstreamSettings) {
        let upstream = Upstream { settings: Arc::new(settings), tls: None };
        match self.upstreams.iter_mut().find(|one| one.settings.name == upstream.settings.name) {
            Some(place) => *place = upstream,
            None => self.upstreams.push(upstream),
        }
    }

    /// Opens `link` to the upstream of that name, as what its protocol and URL call for: a WebSocket, an event stream or
    /// a stream. `path` is appended to the base URL, and `headers` go with the request, where there is one. Ends with
    /// `LinkEvent::Open`, or with an error, also one found at once, out of [`Links::poll`]. How long it may take is for
    /// the caller to say, with [`Links::close`].
    pub fn connect(&mut self, link: LinkId, upstream: &str, path: &str, headers: Vec<(&'static str, String)>) {
        if let Err(error) = self.prepare(link, upstream, path, headers) {
            self.ended.push_back((link, LinkEvent::Failed(error)));
        }
    }

    /// Sends a text frame on an open WebSocket. What the peer does not take in time breaks the link.
    pub fn send(&mut self, link: LinkId, text: String) {
        self.with_open(link, |connection| connection.send(text));
    }

    /// Sends a binary frame on an open WebSocket, or bytes on an open stream. What the peer does not take in time breaks
    /// the link.
    pub fn send_bytes(&mut self, link: LinkId, bytes: Vec<u8>) {
        self.with_open(link, |connection| connection.send_bytes(bytes));
    }

    /// Sends a ping frame on an open WebSocket. On other links it does nothing: their protocols have pings of their own.
    pub fn ping(&mut self, link: LinkId) {
        self.with_open(link, Connection::ping);
    }

    /// Closes a link, with a close frame if the socket takes one at once. No event follows.
    pub fn close(&mut self, link: LinkId) {
        self.ended.retain(|(id, _)| *id != link);
        let Some(index) = self.find(link) else { return };
        if let Some(Link { state: State::Connected(mut connection), .. }) =
            self.links.get_mut(index).and_then(Option::take)
        {
            connection.close(&self.registry);
        }
    }

    /// A worker's word on the link's addresses, from the inbox. Unknown links are ignored: they were closed meanwhile.
    pub fn resolved(&mut self, link: LinkId, addresses: Result<Vec<SocketAddr>, String>) {
        let Some(index) = self.find(link) else { return };
        let Some(Some(Link { state: State::Preparing(handover), .. })) = self.links.get(index) else { return };
        let prepared = handover.lock().unwrap_or_else(PoisonError::into_inner).take();
        let begun = match (prepared, addresses) {
            (Some(Err(error)), _) => Err(error),
            (Some(Ok(plan)), Err(problem)) => Err(match plan.proxy {
                Some(_) => LinkError::Proxy(format!("cannot resolve its name: {problem}")),
                None => LinkError::Resolve(problem),
            }),
            (Some(Ok(plan)), Ok(addresses)) => Ok(Box::new(Connection::new(addresses, plan))),
            // Nobody prepared it, so nobody may answer for it.
            (None, _) => return,
        };
        match begun {
            Ok(mut connection) => {
                // The first attempts; the rest comes with readiness and time. There is nobody to connect to yet, so
                // nothing to tell either.
                let step = connection.drive(self.context(index), false, 0, &mut |_| {});
                if let Some(Some(link)) = self.links.get_mut(index) {
                    link.state = State::Connected(connection);
                    // A connect over loopback may be done by now.
                    link.writable = true;
                }
                if let Step::End(event) = step {
                    self.end(index, event);
                }
            }
            Err(error) => self.end(index, LinkEvent::Failed(error)),
        }
    }

    /// Whether a token of mio's is one of ours.
    pub const fn owns(&self, token: Token) -> bool {
        self.first_token <= token.0 && token.0 < self.first_token + LINKS
    }

    /// A readiness event for one of our tokens; [`Links::poll`] does the work.
    pub fn ready(&mut self, token: Token, event: &Event) {
        let index = token.0.wrapping_sub(self.first_token);
        // An event may belong to an earlier link of this place: the work then finds nothing to do.
        if let Some(Some(link)) = self.links.get_mut(index) {
            let broken = event.is_error() || event.is_read_closed() || event.is_write_closed();
            link.readable |= event.is_readable() || broken;
            link.writable |= event.is_writable() || broken;
        }
    }

    /// Does what is ready and appends what happened to `out`, `budget` events at most and one more for a link that ends
    /// as it opens. True when there is more to do without any new readiness: mio will not tell again. To be called in
    /// each turn, after all that was handed in: errors found at once by the other calls come out here.
    pub fn poll(&mut self, out: &mut Vec<(LinkId, LinkEvent)>, budget: usize) -> bool {
        let mut left = budget;
        while left > 0
            && let Some(ended) = self.ended.pop_front()
        {
            out.push(ended);
            left -= 1;
        }
        let active: Vec<usize> = self.active().collect();
        self.first = self.first.wrapping_add(1);
        for turn in 0..active.len() {
            if left == 0 {
                break;
            }
            let Some(index) = active.get((turn + self.first) % active.len()).copied() else { break };
            let share = left.div_ceil(active.len() - turn);
            left = left.saturating_sub(self.drive(index, share, out));
        }
        !self.ended.is_empty() || self.active().next().is_some()
    }

    /// When [`Links::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.links.iter().flatten().fold(None, |first, link| earliest(first, link.deadline()))
    }

    /// Time passed: the next [`Links::poll`] does what was due.
    pub fn handle_timeout(&mut self, now: Instant) {
        for link in self.links.iter_mut().flatten() {
            link.readable |= link.deadline().is_some_and(|deadline| deadline <= now);
        }
    }

    fn prepare(
        &mut self,
        id: LinkId,
        upstream: &str,
        path: &str,
        headers: Vec<(&'static str, String)>,
    ) -> Result<(), LinkError> {
        let bad = |what: String| LinkError::Connect(what);
        let upstream = self
            .upstreams
            .iter_mut()
            .find(|one| &*one.settings.name == upstream)
            .ok_or_else(|| bad(format!("no upstream is called \"{upstream}\"")))?;
        let target = Target::new(&upstream.settings, path).map_err(bad)?;
        let tls = target.tls.then(|| upstream.tls()).transpose()?;
        let settings = Arc::clone(&upstream.settings);
        let proxy = match proxy::choose(&self.proxy, &target.host, target.tls) {
            Ok(None) => None,
            Ok(Some(proxy)) => {
                let tls = proxy.tls.then(|| client(&mut self.proxy_tls, || TlsClient::new(None, None))).transpose()?;
                Some((proxy, tls))
            }
            Err(error) => return Err(LinkError::Proxy(error.to_string())),
        };
        let index = match self.links.iter().position(Option::is_none) {
            Some(index) => index,
            None if self.links.len() < LINKS => {
                self.links.push(None);
                self.links.len() - 1
            }
            None => return Err(bad(format!("{LINKS} links are open already"))),
        };
        let handover = Handover::default();
        let job = Preparation {
            id,
            target,
            headers,
            settings,
            tls,
            proxy,
            handover: Arc::clone(&handover),
            sender: self.sender.clone(),
        };
        if !self.jobs.run(move || job.run()) {
            return Err(LinkError::Resolve("too much is waiting to be done".into()));
        }
        let link = Link { id, state: State::Preparing(handover), readable: false, writable: false, interest: None };
        if let Some(place) = self.links.get_mut(index) {
            *place = Some(link);
        }
        Ok(())
    }

    /// Works on one link; how many events came of it.
    fn drive(&mut self, index: usize, share: usize, out: &mut Vec<(LinkId, LinkEvent)>) -> usize {
        let context = Context { registry: &self.registry, token: Token(self.first_token + index), now: clock::boot() };
        let Some(Some(link)) = self.links.get_mut(index) else { return 0 };
        let State::Connected(connection) = &mut link.state else { return 0 };
        let id = link.id;
        let before = out.len();
        let step = connection.drive(context, link.writable, share, &mut |event| out.push((id, event)));
        link.writable = false;
        match step {
            Step::Wait { more } => {
                link.readable = more;
                if let Err(error) = self.update_interest(index) {
                    self.end(index, LinkEvent::Failed(LinkError::Io(error.to_string())));
                }
            }
            Step::End(event) => {
                self.discard(index);
                out.push((id, event));
            }
        }
        out.len() - before
    }

    fn with_open(&mut self, link: LinkId, operation: impl FnOnce(&mut Connection) -> Result<(), LinkEvent>) {
        let place = self.find(link);
        let Some(index) = place else { return };
        let Some(Some(Link { state: State::Connected(connection), .. })) = self.links.get_mut(index) else {
            log::debug!("link {}: what was sent before it was open is dropped", link.0);
            return;
        };
        let mut result = operation(connection);
        // From here on the peer's time runs, should it not have taken all of it.
        connection.lose_patience(clock::boot());
        if let Err(error) = self.update_interest(index) {
            result = result.and(Err(LinkEvent::Failed(LinkError::Io(error.to_string()))));
        }
        if let Err(event) = result {
            self.end(index, event);
        }
    }

    fn update_interest(&mut self, index: usize) -> io::Result<()> {
        let token = Token(self.first_token + index);
        let Some(Some(link)) = self.links.get_mut(index) else { return Ok(()) };
        let State::Connected(connection) = &mut link.state else { return Ok(()) };
        let wanted =
            if connection.wants_write() { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        if link.interest != Some(wanted)
            && let Some(socket) = connection.socket()
        {
            self.registry.reregister(socket, token, wanted)?;
            link.interest = Some(wanted);
        }
        Ok(())
    }

    fn end(&mut self, index: usize, event: LinkEvent) {
        if let Some(id) = self.discard(index) {
            self.ended.push_back((id, event));
        }
    }

    fn discard(&mut self, index: usize) -> Option<LinkId> {
        let mut link = self.links.get_mut(index)?.take()?;
        if let State::Connected(connection) = &mut link.state {
            connection.deregister(&self.registry);
        }
        Some(link.id)
    }

    fn context(&self, index: usize) -> Context<'_> {
        Context { registry: &self.registry, token: Token(self.first_token + index), now: clock::boot() }
    }

    fn active(&self) -> impl Iterator<Item = usize> {
        self.links
            .iter()
            .enumerate()
            .filter(|(_, link)| link.as_ref().is_some_and(|link| link.readable || link.writable))
            .map(|(index, _)| index)
    }

    fn find(&self, link: LinkId) -> Option<usize> {
        self.links.iter().position(|place| place.as_ref().is_some_and(|one| one.id == link))
    }
}

impl Link {
    fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Preparing(_) => None,
            State::Connected(connection) => connection.deadline(),
        }
    }
}

impl Upstream {
    fn tls(&mut self) -> Result<Arc<TlsClient>, LinkError> {
        let settings = &self.settings;
        client(&mut self.tls, || TlsClient::new(settings.ca_file.clone(), settings.client_certificate.clone()))
    }
}

/// Made when it is needed first.
fn client(
    place: &mut Option<Arc<TlsClient>>,
    make: impl FnOnce() -> Result<TlsClient, tls::TlsError>,
) -> Result<Arc<TlsClient>, LinkError> {
    if let Some(client) = place {
        return Ok(Arc::clone(client));
    }
    let client = make().map(Arc::new).map_err(|error| LinkError::Tls(error.to_string()))?;
    *place = Some(Arc::clone(&client));
    Ok(client)
}

fn error_of_io(error: &io::Error) -> LinkError {
    match tls::tls_error(error) {
        Some(error) => error_of_tls(error),
        None => LinkError::Io(error.to_string()),
    }
}

fn error_of_tls(error: &rustls::Error) -> LinkError {
    match tls::wrong_time(error) {
        Some(times) => LinkError::Clock(times),
        None => LinkError::Tls(tls::describe(error)),
    }
}
