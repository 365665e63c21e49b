//! `[[upstream]]`: a push server, its protocol and how to log in there.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde::Deserialize;

use super::{ConfigError, values};
use crate::model::Secret;

/// One `[[upstream]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamSettings {
    /// How the user calls it.
    pub name: Arc<str>,
    /// Which protocol.
    pub kind: UpstreamKind,
    /// Base URL without query, always ending in `/`: `http`, `https`, `ws` or `wss`; for MQTT `mqtt`, `mqtts`, `ws` or
    /// `wss`.
    pub url: Arc<str>,
    /// Refuse registrations without a VAPID key (`VAPID_REQUIRED`).
    pub require_vapid: bool,
    /// Where the credentials are.
    pub credentials: Credentials,
    /// A PEM file of certificates trusted for this upstream instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// What this client shows to a server that wants a certificate.
    pub client_certificate: Option<ClientCertificate>,
    /// How the URL senders post to is made of a channel's secret name, where the server does not make it: `{channel}` is
    /// replaced. Gotify and MQTT only.
    pub endpoint: Option<Arc<str>>,
    /// ntfy: topics of 14 characters, which servers with `visitor-subscriber-rate-limiting` insist on.
    pub short_topics: bool,
    /// MQTT's own.
    pub mqtt: MqttSettings,
}

/// What only MQTT knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MqttSettings {
    /// Which version to speak; `None`: 5, and 3.1.1 where the broker has no 5.
    pub version: Option<MqttVersion>,
    /// What topics begin with, ending in `/`.
    pub topic_prefix: Arc<str>,
    /// How long the broker keeps the session, and with it the messages, of a device that is away.
    pub session_expiry: Duration,
    /// Messages the broker may have on the way to us, not acknowledged.
    pub receive_maximum: u16,
}

/// Versions of MQTT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MqttVersion {
    /// 3.1.1
    V3,
    /// 5
    V5,
}

impl Default for MqttSettings {
    fn default() -> Self {
        Self {
            version: None,
            topic_prefix: "up/".into(),
            session_expiry: Duration::from_secs(28 * 24 * 3600),
            receive_maximum: 64,
        }
    }
}

/// A certificate and its key for TLS client authentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    /// A PEM file with the certificate, and those between it and its root.
    pub certificate: PathBuf,
    /// Where the private key is, in PEM.
    pub key: SecretSource,
}

impl UpstreamSettings {
    /// Settings with nothing but the defaults beside these three.
    pub fn new(name: impl Into<Arc<str>>, kind: UpstreamKind, url: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            kind,
            url: url.into(),
            require_vapid: false,
            credentials: Credentials::None,
            ca_file: None,
            client_certificate: None,
            endpoint: None,
            short_topics: false,
            mqtt: MqttSettings::default(),
        }
    }

    /// The base URL for HTTP: `ws` and `wss` written as `http` and `https`.
    pub fn http_url(&self) -> String {
        match self.url.strip_prefix("ws") {
            Some(rest) => format!("http{rest}"),
            None => self.url.to_string(),
        }
    }

    /// The base URL for a WebSocket: `http` and `https` written as `ws` and `wss`.
    pub fn ws_url(&self) -> String {
        match self.url.strip_prefix("http") {
            Some(rest) => format!("ws{rest}"),
            None => self.url.to_string(),
        }
    }
}

/// The protocols spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamKind {
    /// Mozilla autopush, and `nightporter-relay`.
    Autopush,
    /// ntfy.
    Ntfy,
    /// MQTT 5 and 3.1.1.
    Mqtt,
    /// Nextcloud's uppush app.
    NextPush,
    /// Gotify.
    Gotify,
}

impl UpstreamKind {
    /// As in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Autopush => "autopush",
            Self::Ntfy => "ntfy",
            Self::Mqtt => "mqtt",
            Self::NextPush => "nextpush",
            Self::Gotify => "gotify",
        }
    }

    /// Checks a base URL of a server of this kind and completes it: with the slash at its end, and for NextPush, where it
    /// is only the address of the Nextcloud, with the app's own path.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence part.
    pub fn base_url(self, text: &str) -> Result<String, String> {
        let url = base_url(text, self.schemes())?;
        Ok(match self {
            Self::NextPush if !url.contains("/apps/uppush/") => format!("{url}index.php/apps/uppush/"),
            _ => url,
        })
    }

    const fn schemes(self) -> &'static [&'static str] {
        match self {
            Self::Autopush | Self::Ntfy | Self::NextPush | Self::Gotify => &["wss", "ws", "https", "http"],
            Self::Mqtt => &["mqtts", "mqtt", "wss", "ws"],
        }
    }
}

/// Where an upstream's secret is. The files are read at each connect, so that a changed one needs no restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Credentials {
    /// None needed.
    #[default]
    None,
    /// A token: the first line of this file. `Authorization: Bearer`, Gotify's client token, MQTT's password.
    TokenFile(SecretSource),
    /// `Authorization: Basic`, or MQTT's own, with this user and the first line of this file.
    Password {
        /// User name.
        username: Arc<str>,
        /// Where the password is.
        password: SecretSource,
    },
}

/// Where a secret is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// A file, by its absolute path.
    File(PathBuf),
    /// A systemd credential (`LoadCredential=`, systemd.exec(5)): a name below `$CREDENTIALS_DIRECTORY`.
    Credential(String),
    /// Here: the user has typed it into a settings panel.
    Given(Secret),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct RawUpstream {
    name: String,
    kind: UpstreamKind,
    url: String,
    #[serde(default)]
    require_vapid: bool,
    token_file: Option<String>,
    token_credential: Option<String>,
    username: Option<String>,
    password_file: Option<String>,
    password_credential: Option<String>,
    ca_file: Option<String>,
    certificate_file: Option<String>,
    key_file: Option<String>,
    key_credential: Option<String>,
    endpoint: Option<String>,
    #[serde(default)]
    short_topics: bool,
    mqtt_version: Option<String>,
    topic_prefix: Option<String>,
    session_expiry: Option<String>,
    receive_maximum: Option<u16>,
}

impl RawUpstream {
    pub(super) fn check(self, index: usize) -> Result<UpstreamSettings, ConfigError> {
        let key = |name: &str| format!("upstream[{index}].{name}");
        if self.name.is_empty() || self.name.len() > 64 || self.name.chars().any(char::is_control) {
            return Err(values::wrong(key("name"), "must be 1 to 64 bytes without control characters".into()));
        }
        if self.name.starts_with("panel-") {
            return Err(values::wrong(
                key("name"),
                "\"panel-…\" is what servers set up on a settings panel are called".into(),
            ));
        }
        let url = self.kind.base_url(&self.url).map_err(|problem| values::wrong(key("url"), problem))?;
        let token = secret(&key("token"), self.token_file, self.token_credential)?;
        let password = secret(&key("password"), self.password_file, self.password_credential)?;
        let credentials = match (token, self.username, password) {
            (None, None, None) => Credentials::None,
            (Some(token), None, None) => Credentials::TokenFile(token),
            (None, Some(username), Some(password)) => Credentials::Password { username: username.into(), password },
            (Some(_), _, _) => {
                let problem = "give either a token or a username and password, not both";
                return Err(values::wrong(key("token-file"), problem.into()));
            }
            (None, _, _) => {
                return Err(values::wrong(key("username"), "username and password-file belong together".into()));
            }
        };
        let mqtt_only = [
            ("mqtt-version", self.mqtt_version.is_some()),
            ("topic-prefix", self.topic_prefix.is_some()),
            ("session-expiry", self.session_expiry.is_some()),
            ("receive-maximum", self.receive_maximum.is_some()),
        ];
        if self.kind != UpstreamKind::Mqtt
            && let Some((name, _)) = mqtt_only.iter().find(|(_, given)| *given)
        {
            return Err(values::wrong(key(name), "is for kind = \"mqtt\" only".into()));
        }
        if self.short_topics && self.kind != UpstreamKind::Ntfy {
            return Err(values::wrong(key("short-topics"), "is for kind = \"ntfy\" only".into()));
        }
        let endpoint = self.endpoint.map(|template| endpoint(&key("endpoint"), template, self.kind)).transpose()?;
        let client_key = secret(&key("key"), self.key_file, self.key_credential)?;
        let client_certificate = match (self.certificate_file, client_key) {
            (None, None) => None,
            (Some(certificate), Some(client_key)) => Some(ClientCertificate {
                certificate: values::absolute(&key("certificate-file"), certificate)?,
                key: client_key,
            }),
            (Some(_), None) | (None, Some(_)) => {
                let problem = "certificate-file and key-file belong together";
                return Err(values::wrong(key("certificate-file"), problem.into()));
            }
        };
        let mqtt = mqtt(
            &key,
            self.mqtt_version.as_deref(),
            self.topic_prefix.as_deref(),
            self.session_expiry,
            self.receive_maximum,
        )?;
        Ok(UpstreamSettings {
            name: self.name.into(),
            kind: self.kind,
            url: url.into(),
            require_vapid: self.require_vapid,
            credentials,
            ca_file: self.ca_file.map(|path| values::absolute(&key("ca-file"), path)).transpose()?,
            client_certificate,
            endpoint,
            short_topics: self.short_topics,
            mqtt,
        })
    }
}

/// Checks a base URL and gives it the slash at its end. The error is a sentence part.
pub(super) fn base_url(text: &str, schemes: &[&str]) -> Result<String, String> {
    let uri: http::Uri = text.parse().map_err(|e| format!("\"{text}\" is not a URL: {e}"))?;
    if !uri.scheme_str().is_some_and(|scheme| schemes.contains(&scheme)) {
        let schemes: Vec<String> = schemes.iter().map(|scheme| format!("{scheme}://")).collect();
        return Err(format!("\"{text}\" must begin with {}", schemes.join(" or ")));
    }
    let Some(authority) = uri.authority().filter(|a| !a.host().is_empty()) else {
        return Err(format!("\"{text}\" names no host"));
    };
    if authority.as_str().contains('@') {
        return Err("must not hold a user name or password; use username and password-file".into());
    }
    if uri.query().is_some() {
        return Err(format!("\"{text}\" must not hold a query"));
    }
    Ok(if text.ends_with('/') { text.to_owned() } else { format!("{text}/") })
}

/// The URL must be one once its channel is filled in.
fn endpoint(key: &str, template: String, kind: UpstreamKind) -> Result<Arc<str>, ConfigError> {
    let wrong = |problem: String| Err(values::wrong(key.into(), problem));
    if !matches!(kind, UpstreamKind::Mqtt | UpstreamKind::Gotify) {
        return wrong(format!("a server of kind \"{}\" makes its endpoints itself", kind.as_str()));
    }
    if !template.contains("{channel}") {
        return wrong("must hold {channel}, which is replaced by the secret name of the registration".into());
    }
    let filled = template.replace("{channel}", "x");
    let absolute = filled.parse::<http::Uri>().is_ok_and(|uri| uri.scheme().is_some() && uri.authority().is_some());
    if !absolute || template.len() > 900 {
        return wrong(format!("\"{template}\" is not an absolute URL of at most 900 bytes"));
    }
    Ok(template.into())
}

fn mqtt(
    key: &impl Fn(&str) -> String,
    version: Option<&str>,
    prefix: Option<&str>,
    expiry: Option<String>,
    receive_maximum: Option<u16>,
) -> Result<MqttSettings, ConfigError> {
    let default = MqttSettings::default();
    let version = match version {
        None => None,
        Some("5") => Some(MqttVersion::V5),
        Some("3.1.1") => Some(MqttVersion::V3),
        Some(other) => {
            return Err(values::wrong(key("mqtt-version"), format!("\"{other}\" must be \"5\" or \"3.1.1\"")));
        }
    };
    let topic_prefix = match prefix {
        None => default.topic_prefix,
        Some(prefix) => {
            let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '#' | '+' | '$');
            if prefix.len() > 128 || !prefix.chars().all(plain) {
                let problem = "must be at most 128 visible ASCII characters without \"#\", \"+\" and \"$\"";
                return Err(values::wrong(key("topic-prefix"), problem.into()));
            }
            match prefix.trim_end_matches('/') {
                "" => "".into(),
                prefix => format!("{prefix}/").into(),
            }
        }
    };
    let session_expiry = values::duration(
        &key("session-expiry"),
        expiry,
        default.session_expiry,
        Duration::from_secs(60)..=Duration::from_secs(365 * 24 * 3600),
    )?;
    let receive_maximum = match receive_maximum {
        None => default.receive_maximum,
        Some(0) => return Err(values::wrong(key("receive-maximum"), "must be 1 to 65535".into())),
        Some(n) => n,
    };
    Ok(MqttSettings { version, topic_prefix, session_expiry, receive_maximum })
}

fn secret(key: &str, file: Option<String>, credential: Option<String>) -> Result<Option<SecretSource>, ConfigError> {
    match (file, credential) {
        (None, None) => Ok(None),
        (Some(path), None) => Ok(Some(SecretSource::File(values::absolute(&format!("{key}-file"), path)?))),
        (None, Some(name)) if !name.is_empty() && !name.contains('/') && name != ".." => {
            Ok(Some(SecretSource::Credential(name)))
        }
        (None, Some(_)) => Err(values::wrong(format!("{key}-credential"), "must be a name without \"/\"".into())),
        (Some(_), Some(_)) => {
            Err(values::wrong(format!("{key}-file"), format!("give either this or {key}-credential, not both")))
        }
    }
}
