//! Configuration: the raw file (serde, unknown keys are errors) → [`Settings`], valid by construction.
//!
//! Secrets are never in here, only where to find them; `sys::credentials` reads them when a link is made.

mod app;
mod network;
mod pressure;
mod rules;
mod transfers;
mod upstream;
mod values;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::Deserialize;

pub use self::{
    app::{AppSettings, PayloadHelper, UrgencySettings},
    network::{NetworkSettings, Proxy, Roaming},
    pressure::PressureSettings,
    rules::Role,
    transfers::TransferSettings,
    upstream::{
        ClientCertificate, Credentials, MqttSettings, MqttVersion, SecretSource, UpstreamKind, UpstreamSettings,
    },
};
use self::{
    app::{RawApp, RawUrgency},
    network::RawNetwork,
    pressure::RawPressure,
    rules::{Presets, RawRules},
    transfers::RawTransfers,
    upstream::RawUpstream,
};
use crate::model::{LifecycleTimes, Profile, Rules};

/// Valid settings. Every key has a default, so an empty file is a valid one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How much is enforced.
    pub profile: Profile,
    /// At least one; the first is the default for new registrations.
    pub upstreams: Vec<UpstreamSettings>,
    /// What single apps are allowed.
    pub apps: Vec<AppSettings>,
    /// Which messages may wake an app when.
    pub urgency: UrgencySettings,
    /// How the network is used.
    pub network: NetworkSettings,
    /// Lifecycle times.
    pub lifecycle: LifecycleTimes,
    /// When memory counts as short.
    pub pressure: PressureSettings,
    /// What apps may have downloaded and uploaded for them.
    pub transfers: TransferSettings,
    /// Bounds.
    pub limits: Limits,
    /// Whether KDE's settings panel is served, and the name it looks for asked for, on session buses.
    pub kde_panel: bool,
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
    /// Wake-ups of one app by messages of normal urgency or less, and as many by urgent ones, within an hour.
    pub wakes_per_hour: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            registrations: 1000,
            registrations_per_app: 64,
            messages_per_app: 2048,
            max_age: Duration::from_secs(28 * 24 * 3600),
            attempts: 8,
            wakes_per_hour: 200,
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
    app: Vec<RawApp>,
    role: BTreeMap<Role, RawRules>,
    urgency: RawUrgency,
    network: RawNetwork,
    lifecycle: RawLifecycle,
    pressure: RawPressure,
    transfers: RawTransfers,
    limits: RawLimits,
    kde: RawKde,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct RawKde {
    panel: bool,
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
    wakes_per_hour: Option<usize>,
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
            let upstream = upstream.check(index)?;
            if upstreams.iter().any(|other| other.name == upstream.name) {
                return Err(values::wrong(
                    format!("upstream[{index}].name"),
                    format!("\"{}\" is used twice; each upstream needs a name of its own", upstream.name),
                ));
            }
            upstreams.push(upstream);
        }
        if upstreams.is_empty() {
            upstreams.push(default_upstream());
        }
        let all = RawRules {
            grace: raw.lifecycle.grace,
            page_out_after: raw.lifecycle.page_out_after,
            tombstone_after: raw.lifecycle.tombstone_after,
            awake_window: raw.lifecycle.awake_window,
            ..RawRules::default()
        };
        let all = all.on("lifecycle", &Rules::new(raw.profile, LifecycleTimes::default()))?;
        let lifecycle = all.times;
        let presets = Presets::new(all, raw.role)?;
        let names: Vec<Arc<str>> = upstreams.iter().map(|upstream| Arc::clone(&upstream.name)).collect();
        let mut apps: Vec<AppSettings> = Vec::with_capacity(raw.app.len());
        for (index, app) in raw.app.into_iter().enumerate() {
            let app = app.check(index, &names, &presets)?;
            if apps.iter().any(|other| other.name == app.name) {
                return Err(values::wrong(format!("app[{index}].name"), format!("\"{}\" is used twice", app.name)));
            }
            apps.push(app);
        }
        Ok(Self {
            profile: raw.profile,
            upstreams,
            apps,
            urgency: raw.urgency.check()?,
            network: raw.network.check()?,
            lifecycle,
            pressure: raw.pressure.check()?,
            transfers: raw.transfers.check()?,
            limits: limits(raw.limits)?,
            kde_panel: raw.kde.panel,
        })
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            profile: Profile::default(),
            upstreams: vec![default_upstream()],
            apps: Vec::new(),
            urgency: UrgencySettings::default(),
            network: NetworkSettings::default(),
            lifecycle: LifecycleTimes::default(),
            pressure: PressureSettings::default(),
            transfers: TransferSettings::default(),
            limits: Limits::default(),
            kde_panel: false,
        }
    }
}

fn default_upstream() -> UpstreamSettings {
    UpstreamSettings::new("mozilla", UpstreamKind::Autopush, MOZILLA)
}

fn limits(raw: RawLimits) -> Result<Limits, ConfigError> {
    let default = Limits::default();
    let count = |key: &str, given, default, most| values::count(&format!("limits.{key}"), given, default, most);
    let max_age = values::duration(
        "limits.max-age",
        raw.max_age,
        default.max_age,
        Duration::from_secs(60)..=Duration::from_secs(30 * 24 * 3600),
    )?;
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
        wakes_per_hour: count("wakes-per-hour", raw.wakes_per_hour, default.wakes_per_hour, 3600)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Urgency, notification::NotifyWhen};

    fn rules_of(text: &str) -> Rules {
        Settings::parse(text).unwrap().apps[0].rules.clone().unwrap()
    }

    #[test]
    fn an_app_without_rules_of_its_own_has_those_of_all() {
        assert_eq!(Settings::parse("[[app]]\nname = \"org.a.B\"").unwrap().apps[0].rules, None);
    }

    #[test]
    fn roles_are_presets_that_can_be_changed_as_a_whole_and_for_one_app() {
        const TOMBSTONE: &str = "profile = \"tombstone\"\n";
        let music = "[[app]]\nname = \"org.a.B\"\nrole = \"music\"\n";
        let rules = rules_of(&format!("{TOMBSTONE}{music}"));
        assert_eq!((rules.profile, rules.times.grace), (Profile::Cached, Duration::from_secs(30)));
        assert_eq!(rules_of(music).profile, Profile::Observe, "a role does not switch enforcement on");
        let rules = rules_of(&format!("{TOMBSTONE}{music}[role.music]\ngrace = \"50s\"\nprofile = \"tombstone\""));
        assert_eq!((rules.profile, rules.times.grace), (Profile::Tombstone, Duration::from_secs(50)));
        let rules =
            rules_of(&format!("{TOMBSTONE}{music}grace = \"5s\"\nbackground = false\n[role.music]\ngrace = \"50s\""));
        assert_eq!((rules.times.grace, rules.background), (Duration::from_secs(5), false));
        let terminal = "[[app]]\nname = \"org.a.B\"\nrole = \"terminal\"\n";
        let why = rules_of(terminal).exempt.unwrap();
        assert_eq!(&*why, "it is never frozen (role terminal): its jobs are the user's");
        assert_eq!(rules_of(&format!("{terminal}freeze = true")).exempt, None);
        assert!(rules_of("[[app]]\nname = \"org.a.B\"\nfreeze = false").exempt.is_some());
    }

    #[test]
    fn rules_that_make_no_sense_are_refused_by_their_key() {
        for (text, key) in [
            ("[role.mail]\ngrace = \"20min\"", "role.mail.tombstone-after"),
            ("[[app]]\nname = \"org.a.B\"\ngrace = \"soon\"", "app[0].grace"),
            ("[lifecycle]\ngrace = \"20min\"", "lifecycle.tombstone-after"),
        ] {
            let error = Settings::parse(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{key}:")), "{error}");
        }
        assert!(Settings::parse("[role.game]\ngrace = \"1s\"").unwrap_err().to_string().contains("game"));
    }

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
            [pressure]
            enabled = false
            moderate = "100ms"
            severe = "300ms"
            [limits]
            messages-per-app = 7
            wakes-per-hour = 30
            max-age = "2days"
            [urgency]
            enabled = false
            low-battery = 20
            hold-at-most = "6h"
            [network]
            proxy = "http://proxy.example:3128"
            roaming = "off"
            wake-for-heartbeat = true
            heartbeat-min = "2min"
            heartbeat-max = "10min"
            [[upstream]]
            name = "broker"
            kind = "mqtt"
            url = "mqtts://broker.example:8883"
            certificate-file = "/etc/nightporter/client.pem"
            key-credential = "mqtt-key"
            endpoint = "https://gateway.example/up/{channel}"
            mqtt-version = "3.1.1"
            topic-prefix = "phones/mine"
            session-expiry = "7days"
            receive-maximum = 10
            [[upstream]]
            name = "loud"
            kind = "ntfy"
            url = "https://loud.example"
            short-topics = true
            [[app]]
            name = "im.dino.Dino"
            upstream = "broker"
            urgency = "high"
            calls = true
            min-urgency = "very-low"
            notify = "always"
            payload-helper = ["/usr/libexec/dino-push", "--terse"]
            payload-helper-network = true
            [kde]
            panel = true
            "#,
        )
        .unwrap();
        assert_eq!(settings.profile, Profile::Tombstone);
        assert_eq!(&*settings.upstreams[0].url, "https://ntfy.example/");
        assert_eq!(settings.upstreams[0].ws_url(), "wss://ntfy.example/");
        assert_eq!(settings.lifecycle.tombstone_after, Duration::from_secs(3600));
        assert_eq!(settings.lifecycle.awake_window, Duration::from_millis(500));
        assert_eq!((settings.limits.messages_per_app, settings.limits.wakes_per_hour), (7, 30));
        assert!(settings.kde_panel);
        assert_eq!(settings.limits.max_age, Duration::from_secs(2 * 86_400));
        assert_eq!(
            settings.urgency,
            UrgencySettings { enabled: false, low_battery: 20, hold_at_most: Duration::from_secs(6 * 3600) }
        );
        assert_eq!(
            settings.network,
            NetworkSettings {
                proxy: Proxy::Url("http://proxy.example:3128/".into()),
                roaming: Roaming::Off,
                wake_for_heartbeat: true,
                heartbeat: (Duration::from_secs(120), Duration::from_secs(600)),
            }
        );
        let broker = &settings.upstreams[1];
        assert_eq!(&*broker.url, "mqtts://broker.example:8883/");
        assert_eq!(
            broker.client_certificate,
            Some(ClientCertificate {
                certificate: "/etc/nightporter/client.pem".into(),
                key: SecretSource::Credential("mqtt-key".into()),
            })
        );
        assert_eq!(broker.endpoint.as_deref(), Some("https://gateway.example/up/{channel}"));
        assert_eq!(
            broker.mqtt,
            MqttSettings {
                version: Some(MqttVersion::V3),
                topic_prefix: "phones/mine/".into(),
                session_expiry: Duration::from_secs(7 * 86_400),
                receive_maximum: 10,
            }
        );
        assert!(settings.upstreams[2].short_topics);
        assert_eq!(
            settings.apps,
            [AppSettings {
                upstream: Some("broker".into()),
                urgency: Urgency::High,
                calls: true,
                min_urgency: Some(Urgency::VeryLow),
                notify: Some(NotifyWhen::Always),
                payload_helper: Some(PayloadHelper {
                    command: ["/usr/libexec/dino-push", "--terse"].map(Arc::from).into(),
                    network: true
                }),
                ..AppSettings::new("im.dino.Dino")
            }]
        );
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
            ("[kde]\npanels = true", "panels"),
            ("[urgency]\nlow-battery = 101", "urgency.low-battery"),
            ("[pressure]\nmoderate = \"2s\"", "pressure.moderate"),
            ("[pressure]\nmoderate = \"100ms\"\nsevere = \"90ms\"", "pressure.severe"),
            ("[network]\nproxy = \"socks5://x\"", "network.proxy"),
            ("[network]\nheartbeat-min = \"5min\"\nheartbeat-max = \"4min\"", "network.heartbeat-max"),
            ("[[app]]\nname = \"a.b\"\nupstream = \"nowhere\"", "app[0].upstream"),
            ("[[app]]\nname = \"a.b\"\npayload-helper = [\"helper\"]", "app[0].payload-helper"),
            ("[[app]]\nname = \"a.b\"\npayload-helper = []", "app[0].payload-helper"),
            ("[[app]]\nname = \"a.b\"\npayload-helper-network = true", "app[0].payload-helper-network"),
            ("[[app]]\nname = \"a.b\"\nnotify = \"sometimes\"", "sometimes"),
            ("[[app]]\nname = \"a.b\"\n[[app]]\nname = \"a.b\"", "app[1].name"),
            ("[[upstream]]\nname = \"a\"\nkind = \"mqtt\"\nurl = \"https://x\"", "upstream[0].url"),
            ("[[upstream]]\nname = \"panel-1\"\nkind = \"ntfy\"\nurl = \"https://x\"", "upstream[0].name"),
            (
                "[[upstream]]\nname = \"a\"\nkind = \"ntfy\"\nurl = \"https://x\"\ntopic-prefix = \"a\"",
                "upstream[0].topic",
            ),
            (
                "[[upstream]]\nname = \"a\"\nkind = \"gotify\"\nurl = \"https://x\"\nendpoint = \"https://x/UP\"",
                "upstream[0].endpoint",
            ),
            (
                "[[upstream]]\nname = \"a\"\nkind = \"mqtt\"\nurl = \"mqtts://x\"\ncertificate-file = \"/x\"",
                "upstream[0].certificate-file",
            ),
        ];
        for (text, key) in cases {
            let error = Settings::parse(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text:?} gave {error:?}");
        }
    }

    #[test]
    fn the_address_of_a_nextcloud_suffices() {
        for (given, made) in [
            ("https://cloud.example", "https://cloud.example/index.php/apps/uppush/"),
            ("https://x.example/nc/", "https://x.example/nc/index.php/apps/uppush/"),
            ("https://x.example/apps/uppush", "https://x.example/apps/uppush/"),
        ] {
            assert_eq!(UpstreamKind::NextPush.base_url(given).as_deref(), Ok(made));
        }
    }

    #[test]
    fn two_upstreams_need_two_names() {
        let one = "[[upstream]]\nname = \"a\"\nkind = \"ntfy\"\nurl = \"https://x\"\n";
        assert!(Settings::parse(&format!("{one}{one}")).unwrap_err().to_string().contains("twice"));
    }
}
