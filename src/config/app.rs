//! `[[app]]` and `[urgency]`: what one app is allowed that others are not, and which messages may wake any of them when.

use std::{sync::Arc, time::Duration};

use serde::Deserialize;

use super::{
    ConfigError,
    rules::{Presets, RawRules, Role},
    values,
};
use crate::{
    model::{Profile, Rules, Urgency},
    notification::NotifyWhen,
};

/// One `[[app]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppSettings {
    /// The bus name it registers.
    pub name: Arc<str>,
    /// Name of the upstream its registrations use, unless the user has said otherwise.
    pub upstream: Option<Arc<str>>,
    /// What its messages count as where the protocol does not carry an urgency.
    pub urgency: Urgency,
    /// The least urgency that may wake it, instead of what power and network would have; `VeryLow` lets all pass.
    pub min_urgency: Option<Urgency>,
    /// Its messages of high urgency are calls.
    pub calls: bool,
    /// When the user is notified in its stead, whatever its registrations ask for.
    pub notify: Option<NotifyWhen>,
    /// Makes a notification of a payload while the app stays as it is.
    pub payload_helper: Option<PayloadHelper>,
    /// What kind of app it is, if the configuration says so.
    pub role: Option<Role>,
    /// What is done with it in the background, where that differs from what is done with others.
    pub rules: Option<Rules>,
}

impl AppSettings {
    /// Nothing special.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            upstream: None,
            urgency: Urgency::default(),
            min_urgency: None,
            calls: false,
            notify: None,
            payload_helper: None,
            role: None,
            rules: None,
        }
    }
}

/// An app's payload helper (docs/lifecycle.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PayloadHelper {
    /// An absolute path and arguments.
    pub command: Arc<[Arc<str>]>,
    /// Whether it may use the network.
    pub network: bool,
}

/// `[urgency]`: RFC 8030 §5.3 and the table of the UnifiedPush specification (push.md §0.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UrgencySettings {
    /// Whether messages are held at all.
    pub enabled: bool,
    /// Charge in percent up to which the battery is low.
    pub low_battery: u8,
    /// Longest a message is held for want of power or network; its TTL may be shorter.
    pub hold_at_most: Duration,
}

impl Default for UrgencySettings {
    fn default() -> Self {
        Self { enabled: true, low_battery: 15, hold_at_most: Duration::from_secs(24 * 3600) }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct RawApp {
    name: String,
    upstream: Option<String>,
    urgency: Option<Urgency>,
    min_urgency: Option<Urgency>,
    #[serde(default)]
    calls: bool,
    notify: Option<NotifyWhen>,
    payload_helper: Option<Vec<String>>,
    #[serde(default)]
    payload_helper_network: bool,
    role: Option<Role>,
    // As in `RawRules`: serde cannot flatten and refuse unknown keys at once.
    profile: Option<Profile>,
    grace: Option<String>,
    page_out_after: Option<String>,
    tombstone_after: Option<String>,
    awake_window: Option<String>,
    background: Option<bool>,
    freeze: Option<bool>,
}

impl RawApp {
    pub(super) fn check(
        self,
        index: usize,
        upstreams: &[Arc<str>],
        presets: &Presets,
    ) -> Result<AppSettings, ConfigError> {
        let key = |name: &str| format!("app[{index}].{name}");
        if !self.name.contains('.') || self.name.len() > 255 || self.name.contains(char::is_whitespace) {
            return Err(values::wrong(key("name"), format!("\"{}\" is not a D-Bus name", self.name)));
        }
        let known = |name: &String| upstreams.iter().find(|known| ***known == **name).cloned();
        let upstream = match &self.upstream {
            None => None,
            Some(name) => Some(
                known(name)
                    .ok_or_else(|| values::wrong(key("upstream"), format!("no [[upstream]] is called \"{name}\"")))?,
            ),
        };
        let own = RawRules {
            profile: self.profile,
            grace: self.grace,
            page_out_after: self.page_out_after,
            tombstone_after: self.tombstone_after,
            awake_window: self.awake_window,
            background: self.background,
            freeze: self.freeze,
        };
        let rules = match (self.role, own.is_empty()) {
            (None, true) => None,
            (role, _) => Some(own.on(&format!("app[{index}]"), &presets.of(role)?)?),
        };
        let payload_helper = match self.payload_helper {
            Some(words) => Some(PayloadHelper {
                command: helper(words).map_err(|problem| values::wrong(key("payload-helper"), problem))?,
                network: self.payload_helper_network,
            }),
            None if self.payload_helper_network => {
                let problem = "there is no payload-helper that could use the network".into();
                return Err(values::wrong(key("payload-helper-network"), problem));
            }
            None => None,
        };
        Ok(AppSettings {
            notify: self.notify,
            payload_helper,
            role: self.role,
            rules,
            name: self.name.into(),
            upstream,
            urgency: self.urgency.unwrap_or_default(),
            min_urgency: self.min_urgency,
            calls: self.calls,
        })
    }
}

fn helper(words: Vec<String>) -> Result<Arc<[Arc<str>]>, String> {
    match words.first() {
        Some(program) if program.starts_with('/') => {}
        Some(program) => return Err(format!("\"{program}\" is not an absolute path")),
        None => return Err("it is empty; its first word is the path of a program".into()),
    }
    if words.len() > 64 || words.iter().any(|word| word.contains('\0') || word.len() > 4096) {
        return Err("it has more than 64 words, or one that no program can be given".into());
    }
    Ok(words.into_iter().map(Arc::from).collect())
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawUrgency {
    enabled: Option<bool>,
    low_battery: Option<u8>,
    hold_at_most: Option<String>,
}

impl RawUrgency {
    pub(super) fn check(self) -> Result<UrgencySettings, ConfigError> {
        let default = UrgencySettings::default();
        let low_battery = self.low_battery.unwrap_or(default.low_battery);
        if low_battery > 100 {
            return Err(values::wrong("urgency.low-battery".into(), format!("{low_battery} is more than 100 percent")));
        }
        let hold_at_most = values::duration(
            "urgency.hold-at-most",
            self.hold_at_most,
            default.hold_at_most,
            Duration::from_secs(60)..=Duration::from_secs(28 * 24 * 3600),
        )?;
        Ok(UrgencySettings { enabled: self.enabled.unwrap_or(default.enabled), low_battery, hold_at_most })
    }
}
