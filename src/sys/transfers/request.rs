//! One request of a transfer with its redirects, over ureq: the system's trust, the configured proxy, and none of the daemon's
//! own credentials.
//!
//! The URL is the app's word, which can reach most of what this daemon can. It cannot be this daemon: what listens on this
//! machine's loopback, and what is on the link itself, may tell root from others, so transfers do not lead there.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use ureq::{
    Agent, Body, Error, SendBody,
    config::Config,
    unversioned::{
        resolver::{ResolvedSocketAddrs, Resolver},
        transport::{DefaultConnector, NextTimeout},
    },
};

use super::Worker;
use crate::{
    sys::{
        clock,
        http::{
            client::{Origin, describe, redirect},
            resolver::Eyeballs,
        },
        proxy::{self, ProxyServer},
        tls,
    },
    time::UnixTime,
    transfer::Attempted,
};

const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// Nothing is read or written for that long: the connection is dead.
const SILENCE: Duration = Duration::from_secs(60);
/// Until a server answers; one may have to think about what it was sent.
const ANSWER_LIMIT: Duration = Duration::from_secs(300);
const HEADERS: usize = 32 * 1024;
const REDIRECTS: usize = 5;
/// What goes along to another server than the app named: what is no secret.
const HARMLESS: [&str; 4] = ["accept", "accept-language", "content-type", "user-agent"];

/// Why there is no answer.
pub(super) enum Trouble {
    /// It makes no sense to try again.
    Never(String),
    /// It may work later.
    Later(String),
}

impl Trouble {
    pub(super) fn ended(self, worker: &Worker, bytes: u64) -> Attempted {
        match self {
            Self::Never(text) => Attempted::Failed(text.into()),
            Self::Later(text) => worker.later(bytes, &text),
        }
    }
}

/// Makes the request with these fields beside the app's own. `body` gives the body for each hop.
pub(super) fn send<'a>(
    worker: &Worker,
    fields: &[(header::HeaderName, String)],
    mut body: impl FnMut() -> io::Result<Option<SendBody<'a>>>,
) -> Result<Response<Body>, Trouble> {
    let wish = &worker.attempt.wish;
    let never = Trouble::Never;
    let first: Uri = wish.url.parse().map_err(|error| never(format!("its URL cannot be used: {error}")))?;
    let method: Method = wish.method.parse().map_err(|_| never(format!("\"{}\" is no method", wish.method)))?;
    let (mut uri, mut at_home) = (first, true);
    for _ in 0..=REDIRECTS {
        let origin = Origin::of(&uri)
            .ok_or_else(|| never(format!("it leads to \"{uri}\", which is not http:// or https://")))?;
        let body = body().map_err(|error| Trouble::Later(format!("the spool cannot be read: {error}")))?;
        let mut request = Request::builder().method(&method).uri(&uri);
        for (name, value) in &wish.headers {
            if at_home || HARMLESS.iter().any(|known| name.eq_ignore_ascii_case(known)) {
                request = request.header(&**name, &**value);
            }
        }
        for (name, value) in fields {
            request = request.header(name, value);
        }
        let answer = once(worker, &origin, request, body)?;
        let Some(next) = redirect(&uri, answer.status(), answer.headers()) else { return Ok(answer) };
        let after =
            Origin::of(&next).ok_or_else(|| never("it is redirected to what is not http:// or https://".into()))?;
        if origin.secure && !after.secure {
            return Err(never("it is redirected away from https".into()));
        }
        let moved = matches!(answer.status(), StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT);
        if method != Method::GET && !moved {
            return Ok(answer);
        }
        at_home &= after == origin;
        uri = next;
    }
    Err(never(format!("more than {REDIRECTS} redirects")))
}

fn once(
    worker: &Worker,
    origin: &Origin,
    request: http::request::Builder,
    body: Option<SendBody<'_>>,
) -> Result<Response<Body>, Trouble> {
    let loopback = worker.attempt.loopback;
    let local = origin.host == "localhost" || origin.host.ends_with(".localhost");
    let literal = origin.host.trim_matches(['[', ']']).parse().ok();
    if !loopback && (local || literal.is_some_and(is_local)) {
        return Err(Trouble::Never(format!("it leads to {}, {LOCAL}", origin.host)));
    }
    let later = Trouble::Later;
    let proxy = proxy::choose(&worker.proxy, &origin.host, origin.secure).map_err(|error| later(error.to_string()))?;
    let agent = agent(origin.secure, proxy.as_ref(), loopback).map_err(later)?;
    if !worker.stop.waits(&agent) {
        return Err(later("it was stopped".into()));
    }
    let answer = match body {
        None => request.body(()).map_err(Error::from).and_then(|request| agent.run(request)),
        Some(body) => request.body(body).map_err(Error::from).and_then(|request| agent.run(request)),
    };
    answer.map_err(|error| match error {
        Error::Io(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Trouble::Never(format!("it leads to {}, {LOCAL}", origin.host))
        }
        Error::Http(error) => Trouble::Never(format!("it cannot be asked for: {error}")),
        error => Trouble::Later(describe(error, proxy.as_ref())),
    })
}

const LOCAL: &str = "which is this machine itself or its link: transfers do not lead there";

/// Made for one request, like those of `sys::http`.
fn agent(secure: bool, proxy: Option<&ProxyServer>, loopback: bool) -> Result<Agent, String> {
    let tls = match secure || proxy.is_some_and(|proxy| proxy.tls) {
        true => tls::ureq_config(None).map_err(|error| error.to_string())?,
        false => tls::ureq_without_trust(),
    };
    // Its own name is resolved here, that of the server by it.
    let resolver = Guarded { resolver: Eyeballs::default(), open: loopback || proxy.is_some() };
    let proxy = proxy.map(ProxyServer::for_ureq).transpose()?;
    let config = Agent::config_builder()
        .tls_config(tls)
        .https_only(secure)
        .http_status_as_error(false)
        .max_redirects(0)
        .max_response_header_size(HEADERS)
        .accept_encoding("identity")
        .timeout_connect(Some(CONNECT_LIMIT))
        .timeout_per_read(Some(SILENCE))
        .timeout_per_write(Some(SILENCE))
        .timeout_recv_response(Some(ANSWER_LIMIT))
        .user_agent(concat!("nightporter/", env!("CARGO_PKG_VERSION")))
        .proxy(proxy)
        .build();
    Ok(Agent::with_parts(config, DefaultConnector::new(), resolver))
}

/// Gives no address that transfers do not lead to, whatever the name server says.
#[derive(Debug)]
struct Guarded {
    resolver: Eyeballs,
    open: bool,
}

impl Resolver for Guarded {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let found = self.resolver.resolve(uri, config, timeout)?;
        if self.open {
            return Ok(found);
        }
        let mut allowed = self.empty();
        found.iter().filter(|address| !is_local(SocketAddr::ip(address))).for_each(|address| allowed.push(*address));
        match allowed.is_empty() {
            true => Err(Error::Io(io::ErrorKind::PermissionDenied.into())),
            false => Ok(allowed),
        }
    }
}

/// Loopback, this link (where clouds and routers keep what is for this machine alone), or nobody's.
pub(super) fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            address.is_loopback()
                || address.is_link_local()
                || address.is_multicast()
                || address.is_broadcast()
                || address.octets()[0] == 0
        }
        IpAddr::V6(address) => {
            address.is_loopback()
                || address.is_unspecified()
                || address.is_multicast()
                || address.is_unicast_link_local()
                || within(address).is_some_and(|address| is_local(address.into()))
        }
    }
}

/// The IPv4 address in an IPv6 one: mapped, compatible, 6to4, or NAT64's.
fn within(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, .., g, h] = address.segments();
    let [high, low] = match (a, b) {
        (0, 0) | (0x64, 0xff9b) => [g, h],
        (0x2002, _) => [b, c],
        _ => return None,
    };
    let [[a, b], [c, d]] = [high.to_be_bytes(), low.to_be_bytes()];
    Some(Ipv4Addr::new(a, b, c, d))
}

/// What is to be done about a status that is no success.
pub(super) fn refused(answer: &Response<Body>, bytes: u64) -> Attempted {
    let text = status(answer);
    let later = matches!(answer.status().as_u16(), 408 | 425 | 429 | 500..=599);
    match later {
        true => Attempted::Later { bytes, after: retry_after(answer.headers(), clock::now().wall), text: text.into() },
        false => Attempted::Failed(text.into()),
    }
}

/// For people.
pub(super) fn status(answer: &Response<Body>) -> String {
    format!("the server answered {}", answer.status())
}

/// Seconds or a date (RFC 9110 §10.2.3).
fn retry_after(headers: &HeaderMap, now: UnixTime) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    match value.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => clock::http_date(value).map(|date| date.since(now)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_local_is_known_in_every_disguise() {
        for local in [
            "127.0.0.1",
            "127.8.9.10",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "::ffff:169.254.0.1",
        ] {
            assert!(is_local(local.parse().unwrap()), "{local}");
        }
        for other in
            ["192.168.1.1", "10.0.0.1", "1.1.1.1", "2001:db8::1", "fd00::1", "::ffff:192.168.1.1", "64:ff9b::101:101"]
        {
            assert!(!is_local(other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn waiting_is_told_in_seconds_or_as_a_date() {
        let now = UnixTime::from_secs(784_111_777);
        let of = |value: &str| retry_after(&HeaderMap::from_iter([(header::RETRY_AFTER, value.parse().unwrap())]), now);
        assert_eq!(of("120"), Some(Duration::from_secs(120)));
        assert_eq!(of("Sun, 06 Nov 1994 08:50:37 GMT"), Some(Duration::from_secs(60)));
        assert_eq!(of("Sun, 06 Nov 1994 08:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(of("soon"), None);
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }
}
