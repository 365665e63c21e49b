//! `[network]`: how the network is used.

use std::{sync::Arc, time::Duration};

use serde::Deserialize;

use super::{ConfigError, upstream::base_url, values};

/// `[network]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkSettings {
    /// The proxy for every upstream.
    pub proxy: Proxy,
    /// What to do on a mobile network that is not the subscriber's own.
    pub roaming: Roaming,
    /// Whether a sleeping machine may be woken for the heartbeat of a link, where the client sets the rhythm.
    pub wake_for_heartbeat: bool,
    /// Bounds of the heartbeat where the client sets the rhythm: the longest that is tried, and the shortest.
    pub heartbeat: (Duration, Duration),
}

/// Where the proxy comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Proxy {
    /// `https_proxy`, `http_proxy`, `all_proxy`, `no_proxy` of the environment, in either case.
    #[default]
    Environment,
    /// None, whatever the environment says.
    Direct,
    /// This one: `http://HOST:PORT/` (the proxy itself is spoken to without TLS) or `https://HOST:PORT/`.
    Url(Arc<str>),
}

/// What roaming allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Roaming {
    /// The same as at home; attachments are not fetched.
    #[default]
    Connect,
    /// No link at all.
    Off,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            proxy: Proxy::Environment,
            roaming: Roaming::Connect,
            wake_for_heartbeat: false,
            heartbeat: (Duration::from_secs(60), Duration::from_secs(29 * 60)),
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawNetwork {
    proxy: Option<String>,
    roaming: Option<Roaming>,
    wake_for_heartbeat: Option<bool>,
    heartbeat_min: Option<String>,
    heartbeat_max: Option<String>,
}

impl RawNetwork {
    pub(super) fn check(self) -> Result<NetworkSettings, ConfigError> {
        let default = NetworkSettings::default();
        let proxy = match self.proxy.as_deref() {
            None | Some("environment") => Proxy::Environment,
            Some("none") => Proxy::Direct,
            Some(url) => Proxy::Url(
                base_url(url, &["http", "https"])
                    .map_err(|problem| {
                        let problem = format!("{problem} (or be \"none\" or \"environment\")");
                        values::wrong("network.proxy".into(), problem)
                    })?
                    .into(),
            ),
        };
        let range = Duration::from_secs(20)..=Duration::from_secs(3600);
        let (min, max) = default.heartbeat;
        let min = values::duration("network.heartbeat-min", self.heartbeat_min, min, range.clone())?;
        let max = values::duration("network.heartbeat-max", self.heartbeat_max, max.max(min), range)?;
        if max < min {
            let problem = "is shorter than network.heartbeat-min";
            return Err(values::wrong("network.heartbeat-max".into(), problem.into()));
        }
        Ok(NetworkSettings {
            proxy,
            roaming: self.roaming.unwrap_or(default.roaming),
            wake_for_heartbeat: self.wake_for_heartbeat.unwrap_or(default.wake_for_heartbeat),
            heartbeat: (min, max),
        })
    }
}
