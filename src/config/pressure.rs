//! `[pressure]`: when memory counts as short.

use std::time::Duration;

use serde::Deserialize;

use super::{ConfigError, values};

/// `[pressure]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PressureSettings {
    /// Whether frozen apps go deeper when memory is short.
    pub enabled: bool,
    /// Of each second, how long some task waits for memory when it is short.
    pub moderate: Duration,
    /// The same when it is very short; all tasks waiting for `moderate` is that, too.
    pub severe: Duration,
}

/// As Android's lmkd has it (lifecycle.md §1.4).
impl Default for PressureSettings {
    fn default() -> Self {
        Self { enabled: true, moderate: Duration::from_millis(70), severe: Duration::from_millis(200) }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawPressure {
    enabled: Option<bool>,
    moderate: Option<String>,
    severe: Option<String>,
}

impl RawPressure {
    pub(super) fn check(self) -> Result<PressureSettings, ConfigError> {
        let default = PressureSettings::default();
        let range = Duration::from_millis(10)..=Duration::from_millis(900);
        let moderate = values::duration("pressure.moderate", self.moderate, default.moderate, range.clone())?;
        let severe = values::duration("pressure.severe", self.severe, default.severe.max(moderate), range)?;
        if severe < moderate {
            return Err(values::wrong("pressure.severe".into(), "is shorter than pressure.moderate".into()));
        }
        Ok(PressureSettings { enabled: self.enabled.unwrap_or(default.enabled), moderate, severe })
    }
}
