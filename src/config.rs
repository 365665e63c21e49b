//! Configuration: the raw file (serde, unknown keys are errors) → [`Settings`], valid by construction.
//!
//! Secrets are never in here, only where to find them; `sys::credentials` reads them when a link is made.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde::Deserialize;

use crate::model::{LifecycleTimes, Profile};

/// Valid settings. Every key has a default, so an empty file is a valid one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How much is enforced.
    pub profile: Profile,
    /// At least one; the first is the default for new registrations.
    pub upstreams: Vec<UpstreamSettings>,
    /// Lifecycle times.
    pub lifecycle: LifecycleTimes,
    /// Bounds.
    pub limits: Limits,
}

/// One `[[upstream]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamSettings {
    /// How the user calls it.
    pub name: Arc<str>,
    /// Which protocol.
    pub kind: UpstreamKind,
    /// Base URL, `http`, `https`, `ws` or `wss`, without query, always ending in `/`.
    pub url: Arc<str>,
    /// Refuse registrations without a VAPID key (`VAPID_REQUIRED`).
    pub require_vapid: bool,
    /// Where the credentials are.
    pub credentials: Credentials,
    /// A PEM file of certificates trusted for this upstream instead of the system's.
    pub ca_file: Option<PathBuf>,
}

impl UpstreamSettings {
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
}

impl UpstreamKind {
    /// As in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Autopush => "autopush",
            Self::Ntfy => "ntfy",
        }
    }
}

/// Where an upstream's secret is. The files are read at each connect, so that a changed one needs no restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Credentials {
    /// None needed.
    #[default]
    None,
    /// `Authorization: Bearer` with the first line of this file.
    TokenFile(SecretSource),
    /// `Authorization: Basic` with this user and the first line of this file.
    Password {
        /// User name.
        username: Arc<str>,
        /// Where the password is.
        password: SecretSource,
    },
}

/// A file, or a systemd credential (`LoadCredential=`, systemd.exec(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// An absolute path.
    File(PathBuf),
    /// A name below `$CREDENTIALS_DIRECTORY`.
    Credential(String),
}

/// Bounds on what peers can make the daemon keep (design.md, invariant 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Registrations in all; beyond it ACTION_REQUIRED.
    pub registrations: usize,
    /// Registrations of one app; beyond it ACTION_REQUIRED.
    pub registrations_per_app: usize,
    /// Messages waiting for one app; beyond it the oldest is dropped and `why` says so.
    pub messages_per_app: usize,
    /// Longest a message without a TTL of its own is kept.
    pub max_age: Duration,
    /// Tries before a message is given up.
    pub attempts: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            registrations: 1000,
            registrations_per_app: 64,
            messages_per_app: 2048,
            max_age: Duration::from_secs(28 * 24 * 3600),
            attempts: 8,
        }
    }
}

impl Default for LifecycleTimes {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(10),
            page_out_after: Duration::from_secs(60),
            tombstone_after: Duration::from_secs(600),
            awake_window: Duration::from_secs(10),
        }
    }
}

/// What is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML, an unknown key, or a wrong type; the text shows the line.
    #[error("{0}")]
    Syntax(String),
    /// A value that makes no sense.
    #[error("{key}: {problem}")]
    Value {
        /// Which key, as a path.
        key: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}

const MOZILLA: &str = "wss://push.services.mozilla.com/";
/// A typo of a unit (`"10h"` for `"10s"`) must not silently switch the mechanism off or spin it.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);
const SHORTEST: Duration = Duration::from_millis(10);

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[derive(Default)]
struct RawConfig {
    profile: Profile,
    upstream: Vec<RawUpstream>,
    lifecycle: RawLifecycle,
    limits: RawLimits,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RawUpstream {
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
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct RawLifecycle {
    grace: Option<String>,
    page_out_after: Option<String>,
    tombstone_after: Option<String>,
    awake_window: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct RawLimits {
    registrations: Option<usize>,
    registrations_per_app: Option<usize>,
    messages_per_app: Option<usize>,
    max_age: Option<String>,
    attempts: Option<u32>,
}

impl Settings {
    /// Reads a configuration file's text.
    ///
    /// # Errors
    /// [`ConfigError`] with the key or line at fault.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text).map_err(|e| ConfigError::Syntax(e.to_string()))?;
        let mut upstreams: Vec<UpstreamSettings> = Vec::with_capacity(raw.upstream.len().max(1));
        for (index, upstream) in raw.upstream.into_iter().enumerate() {
            let upstream = upstream_settings(upstream, index)?;
            if upstreams.iter().any(|other| other.name == upstream.name) {
                return Err(value(
                    format!("upstream[{index}].name"),
                    format!("\"{}\" is used twice; each upstream needs a name of its own", upstream.name),
                ));
            }
            upstreams.push(upstream);
        }
        if upstreams.is_empty() {
            upstreams.push(default_upstream());
        }
        let times = LifecycleTimes::default();
        let lifecycle = LifecycleTimes {
            grace: duration("lifecycle.grace", raw.lifecycle.grace, times.grace)?,
            page_out_after: duration("lifecycle.page-out-after", raw.lifecycle.page_out_after, times.page_out_after)?,
            tombstone_after: duration(
                "lifecycle.tombstone-after",
                raw.lifecycle.tombstone_after,
                times.tombstone_after,
            )?,
            awake_window: duration("lifecycle.awake-window", raw.lifecycle.awake_window, times.awake_window)?,
        };
        if lifecycle.tombstone_after < lifecycle.grace {
            return Err(value(
                "lifecycle.tombstone-after".into(),
                "is shorter than lifecycle.grace; an app would be killed before it is frozen".into(),
            ));
        }
        Ok(Self { profile: raw.profile, upstreams, lifecycle, limits: limits(raw.limits)? })
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            profile: Profile::default(),
            upstreams: vec![default_upstream()],
            lifecycle: LifecycleTimes::default(),
            limits: Limits::default(),
        }
    }
}

fn default_upstream() -> UpstreamSettings {
    UpstreamSettings {
        name: "mozilla".into(),
        kind: UpstreamKind::Autopush,
        url: MOZILLA.into(),
        require_vapid: false,
        credentials: Credentials::None,
        ca_file: None,
    }
}

fn upstream_settings(raw: RawUpstream, index: usize) -> Result<UpstreamSettings, ConfigError> {
    let key = |name: &str| format!("upstream[{index}].{name}");
    if raw.name.is_empty() || raw.name.len() > 64 || raw.name.chars().any(char::is_control) {
        return Err(value(key("name"), "must be 1 to 64 bytes without control characters".into()));
    }
    let url = base_url(&raw.url).map_err(|problem| value(key("url"), problem))?;
    let token = secret(&key("token"), raw.token_file, raw.token_credential)?;
    let password = secret(&key("password"), raw.password_file, raw.password_credential)?;
    let credentials = match (token, raw.username, password) {
        (None, None, None) => Credentials::None,
        (Some(token), None, None) => Credentials::TokenFile(token),
        (None, Some(username), Some(password)) => Credentials::Password { username: username.into(), password },
        (Some(_), _, _) => {
            return Err(value(key("token-file"), "give either a token or a username and password, not both".into()));
        }
        (None, _, _) => {
            return Err(value(key("username"), "username and password-file belong together".into()));
        }
    };
    Ok(UpstreamSettings {
        name: raw.name.into(),
        kind: raw.kind,
        url: url.into(),
        require_vapid: raw.require_vapid,
        credentials,
        ca_file: raw.ca_file.map(|path| absolute(&key("ca-file"), path)).transpose()?,
    })
}

fn base_url(text: &str) -> Result<String, String> {
    let uri: http::Uri = text.parse().map_err(|e| format!("\"{text}\" is not a URL: {e}"))?;
    match uri.scheme_str() {
        Some("ws" | "wss" | "http" | "https") => {}
        _ => return Err(format!("\"{text}\" must begin with wss://, ws://, https:// or http://")),
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

fn secret(key: &str, file: Option<String>, credential: Option<String>) -> Result<Option<SecretSource>, ConfigError> {
    match (file, credential) {
        (None, None) => Ok(None),
        (Some(path), None) => Ok(Some(SecretSource::File(absolute(&format!("{key}-file"), path)?))),
        (None, Some(name)) if !name.is_empty() && !name.contains('/') && name != ".." => {
            Ok(Some(SecretSource::Credential(name)))
        }
        (None, Some(_)) => Err(value(format!("{key}-credential"), "must be a name without \"/\"".into())),
        (Some(_), Some(_)) => {
            Err(value(format!("{key}-file"), format!("give either this or {key}-credential, not both")))
        }
    }
}

fn absolute(key: &str, path: String) -> Result<PathBuf, ConfigError> {
    let path = PathBuf::from(path);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(value(key.into(), format!("\"{}\" must be an absolute path", path.display())))
    }
}

fn duration(key: &str, text: Option<String>, default: Duration) -> Result<Duration, ConfigError> {
    let Some(text) = text else { return Ok(default) };
    let parsed = humantime::parse_duration(&text)
        .map_err(|e| value(key.into(), format!("\"{text}\" is not a duration such as \"10s\" or \"10min\": {e}")))?;
    if (SHORTEST..=LONGEST).contains(&parsed) {
        Ok(parsed)
    } else {
        Err(value(key.into(), format!("\"{text}\" is out of range; 10ms to 7days are possible")))
    }
}

fn limits(raw: RawLimits) -> Result<Limits, ConfigError> {
    let default = Limits::default();
    let count = |key: &str, given: Option<usize>, default: usize, most: usize| match given {
        None => Ok(default),
        Some(n) if (1..=most).contains(&n) => Ok(n),
        Some(n) => Err(value(format!("limits.{key}"), format!("{n} is out of range; 1 to {most} are possible"))),
    };
    let max_age = match raw.max_age {
        None => default.max_age,
        Some(text) => humantime::parse_duration(&text)
            .ok()
            .filter(|age| (Duration::from_secs(60)..=Duration::from_secs(30 * 24 * 3600)).contains(age))
            .ok_or_else(|| {
                value("limits.max-age".into(), format!("\"{text}\" is not a duration from \"1min\" to \"30days\""))
            })?,
    };
    let attempts = count("attempts", raw.attempts.map(|n| n as usize), default.attempts as usize, 100)?;
    Ok(Limits {
        registrations: count("registrations", raw.registrations, default.registrations, 10_000)?,
        registrations_per_app: count(
            "registrations-per-app",
            raw.registrations_per_app,
            default.registrations_per_app,
            1000,
        )?,
        messages_per_app: count("messages-per-app", raw.messages_per_app, default.messages_per_app, 20_000)?,
        max_age,
        attempts: u32::try_from(attempts).unwrap_or(default.attempts),
    })
}

const fn value(key: String, problem: String) -> ConfigError {
    ConfigError::Value { key, problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_default_configuration() {
        assert_eq!(Settings::parse("").unwrap(), Settings::default());
    }

    #[test]
    fn every_key_is_read() {
        let settings = Settings::parse(
            r#"
            profile = "tombstone"
            [[upstream]]
            name = "home"
            kind = "ntfy"
            url = "https://ntfy.example"
            username = "phone"
            password-file = "/etc/nightporter/ntfy.password"
            ca-file = "/etc/nightporter/ca.pem"
            [lifecycle]
            grace = "5s"
            page-out-after = "1min"
            tombstone-after = "1h"
            awake-window = "500ms"
            [limits]
            messages-per-app = 7
            max-age = "2days"
            "#,
        )
        .unwrap();
        assert_eq!(settings.profile, Profile::Tombstone);
        assert_eq!(&*settings.upstreams[0].url, "https://ntfy.example/");
        assert_eq!(settings.upstreams[0].ws_url(), "wss://ntfy.example/");
        assert_eq!(settings.lifecycle.tombstone_after, Duration::from_secs(3600));
        assert_eq!(settings.lifecycle.awake_window, Duration::from_millis(500));
        assert_eq!(settings.limits.messages_per_app, 7);
        assert_eq!(settings.limits.max_age, Duration::from_secs(2 * 86_400));
    }

    #[test]
    fn bad_values_name_their_key() {
        let cases = [
            ("colour = 1", "colour"),
            ("[lifecycle]\ngrce = \"1s\"", "grce"),
            ("profile = \"ios\"", "ios"),
            ("[lifecycle]\ngrace = \"soon\"", "lifecycle.grace"),
            ("[lifecycle]\ngrace = \"30days\"", "lifecycle.grace"),
            ("[lifecycle]\ngrace = \"1h\"", "lifecycle.tombstone-after"),
            ("[[upstream]]\nname = \"a\"\nkind = \"ntfy\"\nurl = \"ftp://x\"", "upstream[0].url"),
            ("[[upstream]]\nname = \"a\"\nkind = \"ntfy\"\nurl = \"https://u:p@x\"", "upstream[0].url"),
            ("[[upstream]]\nname = \"\"\nkind = \"ntfy\"\nurl = \"https://x\"", "upstream[0].name"),
            (
                "[[upstream]]\nname = \"a\"\nkind = \"ntfy\"\nurl = \"https://x\"\nusername = \"u\"",
                "upstream[0].username",
            ),
            (
                "[[upstream]]\nname = \"a\"\nkind = \"ntfy\"\nurl = \"https://x\"\ntoken-file = \"relative\"",
                "upstream[0].token-file",
            ),
            ("[limits]\nattempts = 0", "limits.attempts"),
        ];
        for (text, key) in cases {
            let error = Settings::parse(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text:?} gave {error:?}");
        }
    }

    #[test]
    fn two_upstreams_need_two_names() {
        let one = "[[upstream]]\nname = \"a\"\nkind = \"ntfy\"\nurl = \"https://x\"\n";
        assert!(Settings::parse(&format!("{one}{one}")).unwrap_err().to_string().contains("twice"));
    }
}
