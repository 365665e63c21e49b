//! Which proxy leads to a server: the configured one, or the environment's (`https_proxy` and the like, as curl has them).

use std::net::IpAddr;

use base64::{Engine, prelude::BASE64_STANDARD};
use http::Uri;

use super::credentials::Secret;
use crate::config::Proxy;

/// An HTTP proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyServer {
    /// Whether it is spoken to through TLS.
    pub tls: bool,
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// `Proxy-Authorization`, where the URL holds a user name.
    pub authorization: Option<Secret>,
    url: Secret,
}

/// Why nobody can say which.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// Not the URL of a proxy.
    #[error("{from} is not http://HOST:PORT or https://HOST:PORT, the kinds of proxy that can be used")]
    Unusable {
        /// Where it was found.
        from: String,
    },
}

impl ProxyServer {
    /// For people: without what is secret.
    pub fn name(&self) -> String {
        let host = &self.host;
        if host.contains(':') { format!("[{host}]:{}", self.port) } else { format!("{host}:{}", self.port) }
    }

    /// The same for ureq.
    ///
    /// # Errors
    /// As a sentence, where ureq does not understand it.
    pub fn for_ureq(&self) -> Result<ureq::Proxy, &'static str> {
        ureq::Proxy::new(self.url.expose()).map_err(|_| "the proxy's URL cannot be used")
    }

    fn parse(url: &str, from: &str) -> Result<Self, ProxyError> {
        let unusable = || ProxyError::Unusable { from: from.to_owned() };
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let uri: Uri = url.parse().map_err(|_| unusable())?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(unusable()),
        };
        let authority = uri.authority().filter(|authority| !authority.host().is_empty()).ok_or_else(unusable)?;
        let authorization = authority.as_str().rsplit_once('@').map(|(user, _)| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let plain = [decode(name), b":".to_vec(), decode(password)].concat();
            Secret::new(format!("Basic {}", BASE64_STANDARD.encode(plain)))
        });
        Ok(Self {
            tls,
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            authorization,
            url: Secret::new(url),
        })
    }
}

/// The proxy for a connection to `host`, `secure` being whether that will be encrypted; `None`: straight there. This
/// machine itself is always reached straight: to a proxy, loopback is another machine.
///
/// # Errors
/// [`ProxyError`] when there is to be one and it is not understood: going straight instead could tell the network what it
/// is not to know.
pub fn choose(settings: &Proxy, host: &str, secure: bool) -> Result<Option<ProxyServer>, ProxyError> {
    choose_from(settings, host, secure, &|name| std::env::var(name).ok())
}

fn choose_from(
    settings: &Proxy,
    host: &str,
    secure: bool,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<ProxyServer>, ProxyError> {
    if loopback(host) {
        return Ok(None);
    }
    let either = |name: &str| {
        [name.to_owned(), name.to_ascii_uppercase()]
            .into_iter()
            .find_map(|name| environment(&name).filter(|value| !value.trim().is_empty()).map(|value| (name, value)))
    };
    let chosen = match settings {
        Proxy::Direct => None,
        Proxy::Url(url) => Some(("network.proxy".to_owned(), url.to_string())),
        Proxy::Environment => either(if secure { "https_proxy" } else { "http_proxy" }).or_else(|| either("all_proxy")),
    };
    let Some((from, url)) = chosen else { return Ok(None) };
    if either("no_proxy").is_some_and(|(_, list)| excepted(&list, host)) {
        return Ok(None);
    }
    ProxyServer::parse(url.trim(), &from).map(Some)
}

fn loopback(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// As curl reads `no_proxy`: names with all below them, addresses, networks, or `*`, separated by commas or spaces.
fn excepted(list: &str, host: &str) -> bool {
    if list.trim() == "*" {
        return true;
    }
    let host = host.trim_matches(['[', ']']).trim_end_matches('.');
    let address: Option<IpAddr> = host.parse().ok();
    list.split([',', ' ', '\t']).filter(|entry| !entry.is_empty()).any(|entry| match address {
        Some(address) => network_holds(entry, address),
        None => {
            let name = entry.trim_start_matches('.').trim_end_matches('.');
            let start = host.len().checked_sub(name.len());
            let (Some(start), false) = (start, name.is_empty()) else { return false };
            host.get(start..).is_some_and(|end| end.eq_ignore_ascii_case(name))
                && (start == 0 || host.as_bytes().get(start - 1) == Some(&b'.'))
        }
    })
}

/// Whether `entry`, an address or a network in CIDR form, holds `address`.
fn network_holds(entry: &str, address: IpAddr) -> bool {
    let (network, bits) = match entry.split_once('/') {
        None => (entry, None),
        Some((network, bits)) => match bits.parse::<u32>() {
            Ok(bits) => (network, Some(bits)),
            Err(_) => return false,
        },
    };
    let same = |one: u128, other: u128, width: u32| match bits.unwrap_or(width) {
        0 => true,
        bits if bits > width => false,
        bits => (one ^ other) >> (width - bits) == 0,
    };
    match (network.trim_matches(['[', ']']).parse(), address) {
        (Ok(IpAddr::V4(one)), IpAddr::V4(other)) => same(one.to_bits().into(), other.to_bits().into(), 32),
        (Ok(IpAddr::V6(one)), IpAddr::V6(other)) => same(one.to_bits(), other.to_bits(), 128),
        _ => false,
    }
}

/// Percent-encoding (RFC 3986 §2.1); what is none stays as it is.
fn decode(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let byte = match (first, after) {
            (b'%', [high, low, ..]) => {
                char::from(*high).to_digit(16).zip(char::from(*low).to_digit(16)).map(|(h, l)| h * 16 + l)
            }
            _ => None,
        };
        match byte.and_then(|byte| u8::try_from(byte).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose_in(pairs: &[(&str, &str)], host: &str, secure: bool) -> Result<Option<String>, ProxyError> {
        let environment = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        choose_from(&Proxy::Environment, host, secure, &environment).map(|proxy| proxy.map(|proxy| proxy.name()))
    }

    #[test]
    fn the_environment_is_read_as_curl_reads_it() {
        let proxy = |name: &str| Ok(Some(name.to_owned()));
        let both = [("https_proxy", "http://secure:3128"), ("http_proxy", "plain:8080"), ("all_proxy", "http://all")];
        assert_eq!(choose_in(&both, "x", true), proxy("secure:3128"));
        assert_eq!(choose_in(&both, "x", false), proxy("plain:8080"));
        assert_eq!(choose_in(&both[2..], "x", false), proxy("all:80"));
        assert_eq!(choose_in(&[("HTTPS_PROXY", "https://[fd00::1]/")], "x", true), proxy("[fd00::1]:443"));
        assert_eq!(choose_in(&[("https_proxy", ""), ("HTTPS_PROXY", "a:1")], "x", true), proxy("a:1"));
        assert_eq!(choose_in(&[("http_proxy", "a:1")], "x", true), Ok(None));
        assert_eq!(choose_in(&[], "x", true), Ok(None));
        for this_machine in ["localhost", "127.0.0.2", "::1", "[::1]"] {
            assert_eq!(choose_in(&both, this_machine, true), Ok(None));
        }
        // Never straight where there is to be a proxy.
        let error = choose_in(&[("all_proxy", "socks5://user:hush@x:1080")], "x", true).unwrap_err().to_string();
        assert!(error.contains("all_proxy") && !error.contains("hush"), "{error}");
        assert!(choose_in(&[("all_proxy", "http://")], "x", true).is_err());
    }

    #[test]
    fn what_is_configured_comes_first() {
        let environment = |name: &str| match name {
            "https_proxy" => Some("http://environment:1".to_owned()),
            "no_proxy" => Some("home.example".to_owned()),
            _ => None,
        };
        let choose = |settings, host| choose_from(&settings, host, true, &environment).unwrap().map(|p| p.name());
        let configured = Proxy::Url("http://configured:3128/".into());
        assert_eq!(choose(configured.clone(), "x").as_deref(), Some("configured:3128"));
        assert_eq!(choose(configured, "home.example"), None);
        assert_eq!(choose(Proxy::Direct, "x"), None);
        assert_eq!(choose(Proxy::Environment, "x").as_deref(), Some("environment:1"));
    }

    #[test]
    fn exceptions_are_names_addresses_and_networks() {
        for (list, host, expected) in [
            ("*", "anything", true),
            ("a,*", "anything", false),
            ("example.com", "example.com", true),
            ("example.com", "push.EXAMPLE.com.", true),
            ("example.com", "badexample.com", false),
            (".example.com", "example.com", true),
            (".example.com.", "push.example.com", true),
            ("a b,\tc", "c", true),
            ("localhost,127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "127.0.0.10", false),
            ("192.168.0.0/16", "192.168.77.1", true),
            ("192.168.0.0/16", "192.169.0.1", false),
            ("0.0.0.0/0", "1.2.3.4", true),
            ("10.0.0.0/33", "10.0.0.0", false),
            ("10.0.0.0/x", "10.0.0.0", false),
            ("fd00::/8", "fd12::1", true),
            ("[::1]", "[::1]", true),
            ("::1", "0:0:0:0:0:0:0:1", true),
            ("0.1", "127.0.0.1", false),
            (",,.", "x", false),
            ("", "x", false),
            ("é", "xé", false),
        ] {
            assert_eq!(excepted(list, host), expected, "{list:?} {host:?}");
        }
    }

    #[test]
    fn a_user_name_becomes_basic_and_is_never_shown() {
        let proxy = ProxyServer::parse("http://us%65r:p%40ss:w%zz@proxy:3128", "https_proxy").unwrap();
        let expected = format!("Basic {}", BASE64_STANDARD.encode("user:p@ss:w%zz"));
        assert_eq!(proxy.authorization.as_ref().unwrap().expose(), expected);
        assert_eq!(proxy.name(), "proxy:3128");
        assert!(!format!("{proxy:?}").contains("w%zz"));
        assert!(proxy.for_ureq().is_ok());
        assert_eq!(ProxyServer::parse("proxy", "x").unwrap().authorization, None);
    }
}
