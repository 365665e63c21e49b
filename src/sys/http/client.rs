//! One HTTP request to an upstream, with its trust, its credentials and the proxy, over ureq. Blocks.

use std::time::{Duration, Instant};

use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use ureq::{Agent, Body, Error, unversioned::transport::DefaultConnector};

use super::resolver::Eyeballs;
use crate::{
    config::{Proxy, UpstreamSettings},
    sys::{
        clock, credentials,
        proxy::{self, ProxyServer},
        tls,
    },
};

/// For a connection to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Redirects followed.
const REDIRECTS: u32 = 3;

/// What is asked of which server, and until when.
pub(in crate::sys) struct Client<'a> {
    pub(in crate::sys) upstream: &'a UpstreamSettings,
    pub(in crate::sys) proxy: &'a Proxy,
    pub(in crate::sys) deadline: Instant,
}

impl Client<'_> {
    /// Makes a request and follows its redirects, as long as they stay on the host and do not leave TLS. What leads away
    /// is given back as it is: a redirect.
    ///
    /// # Errors
    /// Why there is no answer, in words for people.
    pub(in crate::sys) fn send(
        &self,
        mut method: Method,
        mut uri: Uri,
        json: Option<&str>,
    ) -> Result<Response<Body>, String> {
        let mut json = json;
        let mut redirects = 0;
        loop {
            let origin = Origin::of(&uri).ok_or_else(|| format!("\"{uri}\" is not http:// or https://"))?;
            let response = self.once(&method, &uri, &origin, json)?;
            let Some(next) = redirect(&uri, response.status(), response.headers()) else { return Ok(response) };
            let allowed =
                Origin::of(&next).is_some_and(|next| next.host == origin.host && next.secure >= origin.secure);
            if !allowed {
                return Ok(response);
            }
            match response.status() {
                StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT => {}
                // Nobody says again what it was that was asked for.
                StatusCode::SEE_OTHER => (method, json) = (Method::GET, None),
                _ if method == Method::GET => {}
                _ => return Ok(response),
            }
            redirects += 1;
            if redirects > REDIRECTS {
                return Err(format!("more than {REDIRECTS} redirects"));
            }
            uri = next;
        }
    }

    fn once(&self, method: &Method, uri: &Uri, origin: &Origin, json: Option<&str>) -> Result<Response<Body>, String> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err("it took too long".into());
        }
        let proxy = proxy::choose(self.proxy, &origin.host, origin.secure).map_err(|error| error.to_string())?;
        let mut request = Request::builder().method(method).uri(uri);
        if self.at_home(origin) {
            let field = credentials::header(self.upstream.kind, &self.upstream.credentials)
                .map_err(|error| error.to_string())?;
            if let Some(field) = field {
                request = request.header(field.name, field.value.expose());
            }
        }
        let agent = self.agent(origin.secure, proxy.as_ref(), left)?;
        let answer = match json {
            None => request.body(()).map_err(Error::from).and_then(|request| agent.run(request)),
            Some(json) => request
                .header(header::CONTENT_TYPE, "application/json")
                .body(json)
                .map_err(Error::from)
                .and_then(|request| agent.run(request)),
        };
        let response = answer.map_err(|error| describe(error, proxy.as_ref()))?;
        if let Some(date) = response.headers().get(header::DATE).and_then(|value| value.to_str().ok()) {
            clock::compare(&origin.host, date);
        }
        Ok(response)
    }

    /// Whether the credentials may go there: to the origin of the upstream, or to its TLS port where it has none itself.
    fn at_home(&self, origin: &Origin) -> bool {
        home(self.upstream).is_some_and(|home| {
            let upgraded = home.host == origin.host && !home.secure && origin.secure && origin.port == 443;
            home == *origin || upgraded
        })
    }

    /// Made for one request: a kept one would keep its trust store and its connections too.
    fn agent(&self, secure: bool, proxy: Option<&ProxyServer>, limit: Duration) -> Result<Agent, String> {
        // Without TLS anywhere a device without certificates gets along as well.
        let tls = if secure || proxy.is_some_and(|proxy| proxy.tls) {
            tls::ureq_for(self.upstream).map_err(|error| error.to_string())?
        } else {
            tls::ureq_without_trust()
        };
        let proxy = proxy.map(ProxyServer::for_ureq).transpose()?;
        let config = Agent::config_builder()
            .tls_config(tls)
            .https_only(secure)
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_LIMIT))
            .timeout_global(Some(limit))
            .user_agent(concat!("nightporter/", env!("CARGO_PKG_VERSION")))
            .proxy(proxy)
            .build();
        Ok(Agent::with_parts(config, DefaultConnector::new(), Eyeballs::default()))
    }
}

/// RFC 6454.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::sys) struct Origin {
    pub(in crate::sys) secure: bool,
    pub(in crate::sys) host: String,
    pub(in crate::sys) port: u16,
}

impl Origin {
    /// `None` for what is not HTTP.
    pub(in crate::sys) fn of(uri: &Uri) -> Option<Self> {
        let secure = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let host = uri.host().filter(|host| !host.is_empty())?.trim_end_matches('.').to_ascii_lowercase();
        Some(Self { secure, host, port: uri.port_u16().unwrap_or(if secure { 443 } else { 80 }) })
    }
}

/// Where the upstream is.
pub(in crate::sys) fn home(upstream: &UpstreamSettings) -> Option<Origin> {
    upstream.http_url().parse().ok().and_then(|uri| Origin::of(&uri))
}

/// Where a redirect leads to; `None` when it is none, or leads nowhere that can be told.
pub(in crate::sys) fn redirect(from: &Uri, status: StatusCode, headers: &HeaderMap) -> Option<Uri> {
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let location = headers.get(header::LOCATION)?.to_str().ok()?.trim();
    let (scheme, authority) = (from.scheme_str()?, from.authority()?);
    // RFC 3986 §5.2, the forms servers use.
    let absolute = if location.contains("://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    // Fragments are not for servers.
    absolute.split('#').next()?.parse().ok()
}

pub(in crate::sys) fn describe(error: Error, proxy: Option<&ProxyServer>) -> String {
    match error {
        Error::Rustls(error) => tls::describe(&error),
        Error::Io(error) => tls::tls_error(&error).map_or_else(|| error.to_string(), tls::describe),
        Error::ConnectProxyFailed(reason) => {
            let name = proxy.map(ProxyServer::name).unwrap_or_default();
            format!("the proxy {name} does not lead there: {reason}")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_resolved() {
        let from: Uri = "https://h:8443/a/b?c=d".parse().unwrap();
        let resolve = |location: &str| {
            let headers = HeaderMap::from_iter([(header::LOCATION, location.parse().unwrap())]);
            redirect(&from, StatusCode::FOUND, &headers).map(|uri| uri.to_string())
        };
        assert_eq!(resolve("https://o/x").as_deref(), Some("https://o/x"));
        assert_eq!(resolve("//o/x#y").as_deref(), Some("https://o/x"));
        assert_eq!(resolve("/x?y").as_deref(), Some("https://h:8443/x?y"));
        assert_eq!(resolve("x").as_deref(), Some("https://h:8443/a/x"));
        assert_eq!(resolve("https://a b/"), None);
        assert_eq!(redirect(&from, StatusCode::FOUND, &HeaderMap::new()), None);
        let headers = HeaderMap::from_iter([(header::LOCATION, "/x".parse().unwrap())]);
        assert_eq!(redirect(&from, StatusCode::OK, &headers), None);
    }
}
