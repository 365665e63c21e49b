//! What may block before the first packet: secrets, certificates, name resolution. Runs on a worker.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    sync::{Arc, Mutex, PoisonError},
};

use rustls::pki_types::ServerName;

use super::{
    connection::{Opening, Plan, Proxy, Tls},
    exchange::{Exchange, Peer, Purpose, Request},
    tunnel::Tunnel,
    upgrade::Upgrade,
};
use crate::{
    config::{UpstreamKind, UpstreamSettings},
    event::{LinkError, LinkId},
    sys::{
        credentials,
        inbox::{Incoming, Sender},
        proxy::ProxyServer,
        tls::TlsClient,
    },
};

/// Where the worker leaves what it read.
pub(super) type Handover = Arc<Mutex<Option<Result<Plan, LinkError>>>>;

/// What the link is once it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carrier {
    /// With this subprotocol.
    WebSocket(Option<&'static str>),
    EventStream,
    Stream,
}

/// Where a link goes.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) tls: bool,
    pub(super) authority: String,
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) path: String,
    pub(super) carrier: Carrier,
}

impl Target {
    /// `path` below the base URL of `settings`; a stream has none.
    pub(super) fn new(settings: &UpstreamSettings, path: &str) -> Result<Self, String> {
        let (base, carrier) = match settings.kind {
            UpstreamKind::Autopush => (settings.ws_url(), Carrier::WebSocket(Some("push-notification"))),
            UpstreamKind::Ntfy | UpstreamKind::Gotify => (settings.ws_url(), Carrier::WebSocket(None)),
            UpstreamKind::NextPush => (settings.http_url(), Carrier::EventStream),
            UpstreamKind::Mqtt if settings.url.starts_with("mqtt") => (settings.url.to_string(), Carrier::Stream),
            UpstreamKind::Mqtt => (settings.ws_url(), Carrier::WebSocket(Some("mqtt"))),
        };
        let url = if carrier == Carrier::Stream { base } else { format!("{base}{path}") };
        Self::parse(&url, carrier)
    }

    pub(super) fn parse(url: &str, carrier: Carrier) -> Result<Self, String> {
        let uri: http::Uri = url.parse().map_err(|error| format!("its URL cannot be used: {error}"))?;
        let (Some(scheme), Some(authority), Some(path)) = (uri.scheme_str(), uri.authority(), uri.path_and_query())
        else {
            return Err(format!("\"{url}\" names no host"));
        };
        let (tls, port) = match scheme {
            "wss" | "https" => (true, 443),
            "ws" | "http" => (false, 80),
            "mqtts" => (true, 8883),
            "mqtt" => (false, 1883),
            _ => return Err(format!("\"{url}\" is of no kind known here")),
        };
        Ok(Self {
            tls,
            authority: authority.as_str().to_owned(),
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(port),
            path: path.as_str().to_owned(),
            carrier,
        })
    }
}

/// The job.
pub(super) struct Preparation {
    pub(super) id: LinkId,
    pub(super) target: Target,
    /// Beside those of our own.
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) settings: Arc<UpstreamSettings>,
    pub(super) tls: Option<Arc<TlsClient>>,
    pub(super) proxy: Option<(ProxyServer, Option<Arc<TlsClient>>)>,
    pub(super) handover: Handover,
    pub(super) sender: Sender,
}

impl Preparation {
    pub(super) fn run(self) {
        let plan = self.plan();
        let addresses = match (&plan, &self.proxy) {
            (Ok(_), None) => resolve(&self.target.host, self.target.port),
            (Ok(_), Some((proxy, _))) => resolve(&proxy.host, proxy.port),
            // The handover says what is wrong.
            (Err(_), _) => Ok(Vec::new()),
        };
        *self.handover.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan);
        self.sender.send(Incoming::Resolved(self.id, addresses));
    }

    fn plan(&self) -> Result<Plan, LinkError> {
        let Target { host, port, carrier, .. } = &self.target;
        let proxy = match &self.proxy {
            None => None,
            Some((proxy, client)) => {
                let tls = client.as_deref().map(|client| tls(client, &proxy.host)).transpose();
                Some(Box::new(Proxy {
                    name: proxy.name(),
                    tls: tls.map_err(|error| LinkError::Proxy(format!("{}: {error}", proxy.name())))?,
                    exchange: Tunnel::exchange(proxy, host, *port),
                }))
            }
        };
        let tls = self.tls.as_deref().map(|client| tls(client, host)).transpose()?;
        let unreadable = |error: credentials::CredentialError| LinkError::Connect(error.to_string());
        let login = match self.settings.kind {
            UpstreamKind::Mqtt => Some(credentials::login(&self.settings.credentials).map_err(unreadable)?),
            _ => None,
        };
        let opening = match carrier {
            Carrier::Stream => Opening::Stream,
            Carrier::WebSocket(protocol) => {
                let mut request = self.request()?;
                let upgrade = Upgrade::ask(&mut request, *protocol);
                Opening::WebSocket(Box::new(self.exchange(request, Purpose::Upgrade(upgrade))))
            }
            Carrier::EventStream => {
                let mut request = self.request()?;
                request.field("Accept", "text/event-stream");
                request.field("Cache-Control", "no-cache");
                Opening::EventStream(Box::new(self.exchange(request, Purpose::EventStream)))
            }
        };
        Ok(Plan { proxy, tls, opening, login })
    }

    fn request(&self) -> Result<Request, LinkError> {
        let mut request = Request::new("GET", &self.target.path, &self.target.authority);
        let settings = &self.settings;
        let field = credentials::header(settings.kind, &settings.credentials)
            .map_err(|error| LinkError::Connect(error.to_string()))?;
        if let Some(field) = field {
            request.secret(field.name, &field.value);
        }
        for (name, value) in &self.headers {
            request.foreign(name, value).map_err(LinkError::Connect)?;
        }
        Ok(request)
    }

    fn exchange(&self, request: Request, purpose: Purpose) -> Exchange {
        Exchange::new(request, purpose, Peer { host: self.target.host.clone(), proved: self.target.tls })
    }
}

fn tls(client: &TlsClient, host: &str) -> Result<Tls, LinkError> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| LinkError::Tls(format!("\"{host}\" is no name a certificate can have")))?;
    let (config, roots) = client.prepare().map_err(|error| LinkError::Tls(error.to_string()))?;
    Ok(Tls { config, name, _roots: roots })
}

fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    (host, port).to_socket_addrs().map(Iterator::collect).map_err(|error| format!("{host}: {error}"))
}
