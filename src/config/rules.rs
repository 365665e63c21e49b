//! `[lifecycle]`, `[role.NAME]` and the lifecycle part of `[[app]]`: what is done with an app in the background.
//!
//! Roles are presets: what suits a kind of app, changed as a whole in `[role.NAME]` and for one app in `[[app]]`.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{ConfigError, LONGEST, SHORTEST, values};
use crate::model::{LifecycleTimes, Profile, Rules};

/// What kind of app it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Chat and calls.
    Messenger,
    /// Mail, and what else fetches after a push: it has longer for that.
    Mail,
    /// Plays music or podcasts: kept where the user left it, not ended by time alone.
    Music,
    /// Maps and routes: longer grace, not ended by time alone.
    Navigation,
    /// A terminal: never frozen, for its jobs are the user's.
    Terminal,
    /// Alarm clock, timer, metronome: never frozen, for it must ring.
    Alarm,
}

impl Role {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Messenger => "messenger",
            Self::Mail => "mail",
            Self::Music => "music",
            Self::Navigation => "navigation",
            Self::Terminal => "terminal",
            Self::Alarm => "alarm",
        }
    }

    /// The preset, on top of what counts for all apps.
    fn apply(self, rules: &mut Rules) {
        let kept = |profile| if profile == Profile::Tombstone { Profile::Cached } else { profile };
        match self {
            Self::Messenger => {}
            Self::Mail => rules.times.awake_window = rules.times.awake_window.max(Duration::from_secs(30)),
            Self::Music => {
                rules.profile = kept(rules.profile);
                rules.times.grace = rules.times.grace.max(Duration::from_secs(30));
            }
            Self::Navigation => {
                rules.profile = kept(rules.profile);
                rules.times.grace = rules.times.grace.max(Duration::from_secs(60));
            }
            Self::Terminal | Self::Alarm => {
                let why = if self == Self::Terminal { "its jobs are the user's" } else { "it must ring in time" };
                rules.exempt = Some(format!("it is never frozen (role {}): {why}", self.as_str()).into());
            }
        }
    }
}

/// The keys of a table that changes rules.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawRules {
    pub(super) profile: Option<Profile>,
    pub(super) grace: Option<String>,
    pub(super) page_out_after: Option<String>,
    pub(super) tombstone_after: Option<String>,
    pub(super) awake_window: Option<String>,
    pub(super) background: Option<bool>,
    pub(super) freeze: Option<bool>,
}

impl RawRules {
    /// Whether nothing is changed.
    pub(super) const fn is_empty(&self) -> bool {
        self.profile.is_none()
            && self.grace.is_none()
            && self.page_out_after.is_none()
            && self.tombstone_after.is_none()
            && self.awake_window.is_none()
            && self.background.is_none()
            && self.freeze.is_none()
    }

    /// `before` with what is written here; `table` names it in errors.
    pub(super) fn on(self, table: &str, before: &Rules) -> Result<Rules, ConfigError> {
        let duration =
            |key: &str, text, default| values::duration(&format!("{table}.{key}"), text, default, SHORTEST..=LONGEST);
        let times = before.times;
        let times = LifecycleTimes {
            grace: duration("grace", self.grace, times.grace)?,
            page_out_after: duration("page-out-after", self.page_out_after, times.page_out_after)?,
            tombstone_after: duration("tombstone-after", self.tombstone_after, times.tombstone_after)?,
            awake_window: duration("awake-window", self.awake_window, times.awake_window)?,
        };
        if times.tombstone_after < times.grace {
            return Err(values::wrong(
                format!("{table}.tombstone-after"),
                format!("is shorter than {table}.grace; an app would be killed before it is frozen"),
            ));
        }
        let exempt = match self.freeze {
            None => before.exempt.clone(),
            Some(true) => None,
            Some(false) => Some("it is never frozen: the configuration says so".into()),
        };
        Ok(Rules {
            profile: self.profile.unwrap_or(before.profile),
            times,
            exempt,
            background: self.background.unwrap_or(before.background),
        })
    }
}

/// What counts for the apps of each role.
#[derive(Debug)]
pub(super) struct Presets {
    all: Rules,
    roles: BTreeMap<Role, RawRules>,
}

impl Presets {
    pub(super) fn new(all: Rules, roles: BTreeMap<Role, RawRules>) -> Result<Self, ConfigError> {
        let presets = Self { all, roles };
        for role in presets.roles.keys() {
            presets.of(Some(*role))?;
        }
        Ok(presets)
    }

    /// What counts for an app of this role.
    pub(super) fn of(&self, role: Option<Role>) -> Result<Rules, ConfigError> {
        let mut rules = self.all.clone();
        let Some(role) = role else { return Ok(rules) };
        role.apply(&mut rules);
        match self.roles.get(&role) {
            Some(own) => own.clone().on(&format!("role.{}", role.as_str()), &rules),
            None => Ok(rules),
        }
    }
}
