//! WebSocket links: mio TCP, rustls, tungstenite.
//!
//! Owned by the loop's thread; nothing here waits. What would (name resolution, reading secrets and certificates) is
//! done on a worker before the first packet, and its end comes back through the inbox as `Incoming::Resolved`.

mod connection;
mod transport;
mod upgrade;

#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use mio::{Interest, Registry, Token, event::Event};
use rustls::pki_types::ServerName;

use self::{
    connection::{Connection, Step, Tls},
    upgrade::Request,
};
use crate::{
    config::{UpstreamKind, UpstreamSettings},
    event::{LinkError, LinkEvent, LinkId},
    sys::{
        clock, credentials,
        inbox::{Incoming, Sender},
        jobs::Jobs,
        tls::{self, TlsClient},
    },
    time::{Instant, earliest},
};

/// Links at once. Tokens `first_token..first_token + LINKS` belong to [`Links`].
pub const LINKS: usize = 1024;

/// All WebSocket links.
pub struct Links {
    registry: Registry,
    first_token: usize,
    upstreams: Vec<Upstream>,
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
    interest: Option<Interest>,
    deadline: Option<Instant>,
}

#[derive(Debug)]
enum State {
    /// A worker resolves the name and reads what is needed.
    Preparing(Handover),
    Connected(Box<Connection>),
}

/// Where the worker leaves what it read.
type Handover = Arc<Mutex<Option<Result<Prepared, LinkError>>>>;

#[derive(Debug)]
struct Prepared {
    request: Request,
    tls: Option<Tls>,
}

impl Links {
    /// No links yet. Uses tokens `first_token..first_token + LINKS` of `registry`; `sender` is how the workers in
    /// `jobs` report back.
    pub fn new(
        registry: Registry,
        first_token: usize,
        upstreams: Vec<UpstreamSettings>,
        sender: Sender,
        jobs: Jobs,
    ) -> Self {
        let upstreams =
            upstreams.into_iter().map(|settings| Upstream { settings: Arc::new(settings), tls: None }).collect();
        Self { registry, first_token, upstreams, sender, jobs, links: Vec::new(), ended: VecDeque::new(), first: 0 }
    }

    /// Opens `link` to the upstream of that name; `path` is appended to its base URL. Ends with `LinkEvent::Open`, or
    /// with an error, also one found at once, out of [`Links::poll`]. Each address has five seconds to accept; how long
    /// the whole may take is for the caller to say, with [`Links::close`].
    pub fn connect(&mut self, link: LinkId, upstream: &str, path: &str) {
        if let Err(error) = self.prepare(link, upstream, path) {
            self.ended.push_back((link, LinkEvent::Failed(error)));
        }
    }

    /// Sends a text frame on an open link. What the peer does not take in time breaks the link.
    pub fn send(&mut self, link: LinkId, text: String) {
        self.with_open(link, "a frame", |connection| connection.send(text));
    }

    /// Sends a ping frame on an open link.
    pub fn ping(&mut self, link: LinkId) {
        self.with_open(link, "a ping", Connection::ping);
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
            (_, Err(problem)) => Err(LinkError::Resolve(problem)),
            (Some(Ok(_)), Ok(addresses)) if addresses.is_empty() => Err(LinkError::Resolve("it has no address".into())),
            (Some(Ok(Prepared { request, tls })), Ok(addresses)) => {
                Ok(Box::new(Connection::new(interleave(addresses), request, tls)))
            }
            // Nobody prepared it, so nobody may answer for it.
            (None, _) => return,
        };
        match begun {
            Ok(connection) => {
                if let Some(Some(link)) = self.links.get_mut(index) {
                    link.state = State::Connected(connection);
                }
                self.advance(index, None);
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
        self.links.iter().flatten().fold(None, |first, link| earliest(first, link.deadline))
    }

    /// Time passed: gives up addresses that do not answer and goes on to the next.
    pub fn handle_timeout(&mut self, now: Instant) {
        for index in 0..self.links.len() {
            let Some(Some(link)) = self.links.get_mut(index) else { continue };
            if link.deadline.is_none_or(|deadline| deadline > now) {
                continue;
            }
            link.deadline = None;
            let State::Connected(connection) = &mut link.state else { continue };
            match connection.timed_out() {
                Some(error) => self.end(index, LinkEvent::Failed(error)),
                None => self.advance(index, Some(io::ErrorKind::TimedOut.into())),
            }
        }
    }

    fn prepare(&mut self, id: LinkId, upstream: &str, path: &str) -> Result<(), LinkError> {
        let bad = |what: String| LinkError::Connect(what);
        let upstream = self
            .upstreams
            .iter_mut()
            .find(|one| &*one.settings.name == upstream)
            .ok_or_else(|| bad(format!("no upstream is called \"{upstream}\"")))?;
        let target = Target::parse(&format!("{}{path}", upstream.settings.ws_url())).map_err(bad)?;
        let tls = target.tls.then(|| upstream.tls()).transpose()?;
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
            settings: Arc::clone(&upstream.settings),
            tls,
            handover: Arc::clone(&handover),
            sender: self.sender.clone(),
        };
        if !self.jobs.run(move || job.run()) {
            return Err(LinkError::Resolve("too much is waiting to be done".into()));
        }
        let link = Link {
            id,
            state: State::Preparing(handover),
            readable: false,
            writable: false,
            interest: None,
            deadline: None,
        };
        if let Some(place) = self.links.get_mut(index) {
            *place = Some(link);
        }
        Ok(())
    }

    /// Tries the next address, `failed` being what the last one said.
    fn advance(&mut self, index: usize, failed: Option<io::Error>) {
        let token = Token(self.first_token + index);
        let Some(Some(link)) = self.links.get_mut(index) else { return };
        let State::Connected(connection) = &mut link.state else { return };
        match connection.next_address(&self.registry, token, failed) {
            Ok(limit) => {
                link.interest = Some(Interest::READABLE | Interest::WRITABLE);
                (link.readable, link.writable) = (false, false);
                link.deadline = Some(clock::boot() + limit);
            }
            Err(error) => self.end(index, LinkEvent::Failed(error)),
        }
    }

    /// Works on one link; how many events came of it.
    fn drive(&mut self, index: usize, share: usize, out: &mut Vec<(LinkId, LinkEvent)>) -> usize {
        let Some(Some(link)) = self.links.get_mut(index) else { return 0 };
        let State::Connected(connection) = &mut link.state else { return 0 };
        let id = link.id;
        let before = out.len();
        let step = connection.drive(link.writable, share, &mut |event| out.push((id, event)));
        link.writable = false;
        match step {
            Step::Wait { more, limit } => {
                link.readable = more;
                link.deadline = limit.map(|limit| link.deadline.unwrap_or_else(|| clock::boot() + limit));
                if let Err(error) = self.update_interest(index) {
                    self.end(index, LinkEvent::Failed(LinkError::Io(error.to_string())));
                }
            }
            Step::NextAddress(error) => self.advance(index, Some(error)),
            Step::End(event) => {
                self.discard(index);
                out.push((id, event));
            }
        }
        out.len() - before
    }

    fn with_open(
        &mut self,
        link: LinkId,
        what: &str,
        operation: impl FnOnce(&mut Connection) -> Result<(), LinkEvent>,
    ) {
        let place = self.find(link);
        let Some(index) = place else { return };
        let Some(Some(Link { state: State::Connected(connection), .. })) = self.links.get_mut(index) else {
            log::debug!("link {}: {what} before it was open is dropped", link.0);
            return;
        };
        let result = operation(connection).and_then(|()| {
            self.update_interest(index).map_err(|error| LinkEvent::Failed(LinkError::Io(error.to_string())))
        });
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

impl Upstream {
    fn tls(&mut self) -> Result<Arc<TlsClient>, LinkError> {
        if let Some(tls) = &self.tls {
            return Ok(Arc::clone(tls));
        }
        let ca_file: Option<PathBuf> = self.settings.ca_file.clone();
        let tls = Arc::new(TlsClient::new(ca_file).map_err(|error| LinkError::Tls(error.to_string()))?);
        self.tls = Some(Arc::clone(&tls));
        Ok(tls)
    }
}

/// Where a link goes.
#[derive(Debug)]
struct Target {
    tls: bool,
    authority: String,
    host: String,
    port: u16,
    path: String,
}

impl Target {
    fn parse(url: &str) -> Result<Self, String> {
        let uri: http::Uri = url.parse().map_err(|error| format!("its URL cannot be used: {error}"))?;
        let tls = uri.scheme_str() == Some("wss");
        let (Some(authority), Some(path)) = (uri.authority(), uri.path_and_query()) else {
            return Err(format!("\"{url}\" names no host"));
        };
        Ok(Self {
            tls,
            authority: authority.as_str().to_owned(),
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            path: path.as_str().to_owned(),
        })
    }
}

/// The part of a connect that may block.
struct Preparation {
    id: LinkId,
    target: Target,
    settings: Arc<UpstreamSettings>,
    tls: Option<Arc<TlsClient>>,
    handover: Handover,
    sender: Sender,
}

impl Preparation {
    fn run(self) {
        let prepared = self.prepare();
        let addresses = match &prepared {
            Ok(_) => resolve(&self.target.host, self.target.port),
            // The handover says what is wrong.
            Err(_) => Ok(Vec::new()),
        };
        *self.handover.lock().unwrap_or_else(PoisonError::into_inner) = Some(prepared);
        self.sender.send(Incoming::Resolved(self.id, addresses));
    }

    fn prepare(&self) -> Result<Prepared, LinkError> {
        let tls = match &self.tls {
            None => None,
            Some(client) => {
                let name = ServerName::try_from(self.target.host.clone()).map_err(|_| {
                    LinkError::Tls(format!("\"{}\" is no name a certificate can have", self.target.host))
                })?;
                let roots = client.roots().map_err(|error| LinkError::Tls(error.to_string()))?;
                Some(Tls { config: client.config(), name, roots })
            }
        };
        let secret = credentials::authorization(&self.settings.credentials)
            .map_err(|error| LinkError::Connect(error.to_string()))?;
        let protocol = match self.settings.kind {
            UpstreamKind::Autopush => Some("push-notification"),
            UpstreamKind::Ntfy | UpstreamKind::Mqtt | UpstreamKind::NextPush | UpstreamKind::Gotify => None,
        };
        let request = Request::new(&self.target.authority, &self.target.path, protocol, secret.as_ref());
        Ok(Prepared { request, tls })
    }
}

fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    use std::net::ToSocketAddrs;
    (host, port).to_socket_addrs().map(Iterator::collect).map_err(|error| format!("{host}: {error}"))
}

/// Alternates the address families, beginning with the resolver's first choice: a network where one of them leads
/// nowhere then costs one failed try, not all of them.
fn interleave(addresses: Vec<SocketAddr>) -> VecDeque<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (mut one, mut other): (VecDeque<_>, VecDeque<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let mut mixed = VecDeque::with_capacity(one.len() + other.len());
    while let Some(address) = one.pop_front().or_else(|| other.pop_front()) {
        mixed.push_back(address);
        mixed.extend(other.pop_front());
    }
    mixed
}

fn error_of_io(error: &io::Error) -> LinkError {
    match tls::tls_error(error) {
        Some(error) => LinkError::Tls(tls::describe(error)),
        None => LinkError::Io(error.to_string()),
    }
}
