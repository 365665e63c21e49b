//! The way through a proxy (RFC 9110 §9.3.6): `CONNECT`, whatever is spoken behind it.

use super::exchange::{Exchange, Head, Peer, Purpose, Request};
use crate::{event::LinkError, sys::proxy::ProxyServer};

/// Where a proxy is to lead to.
#[derive(Debug)]
pub(super) struct Tunnel {
    destination: String,
    with_password: bool,
}

impl Tunnel {
    /// What to send to `proxy` for a connection to `host`.
    pub(super) fn exchange(proxy: &ProxyServer, host: &str, port: u16) -> Exchange {
        let destination = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let mut request = Request::new("CONNECT", &destination, &destination);
        if let Some(secret) = &proxy.authorization {
            request.secret("Proxy-Authorization", secret);
        }
        let tunnel = Self { destination, with_password: proxy.authorization.is_some() };
        let peer = Peer { host: proxy.host.clone(), proved: proxy.tls };
        Exchange::new(request, Purpose::Tunnel(tunnel), peer)
    }

    /// What to do about a refusal.
    pub(super) fn refusal(&self, head: &Head) -> LinkError {
        let (status, destination) = (head.status, &self.destination);
        let text = match status {
            407 if self.with_password => "it does not accept the user name and password in the environment".into(),
            407 => "it wants a user name and password; give them in the environment, as in \
                    https_proxy=http://USER:PASSWORD@HOST:PORT"
                .into(),
            502..=504 => format!("it cannot reach {destination}"),
            511 => return LinkError::Portal(None),
            _ => format!("it does not lead to {destination} (many lead to port 443 only)"),
        };
        let reason: String = head.reason.replace(char::is_control, " ");
        LinkError::Proxy(format!("{text}; it answered {status} {reason}").trim_end().into())
    }
}
