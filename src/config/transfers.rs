//! `[transfers]`: what apps may have downloaded and uploaded for them.

use std::time::Duration;

use serde::Deserialize;

use super::{ConfigError, values};
use crate::transfer::Metered;

/// `[transfers]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferSettings {
    /// Whether apps may hand over any.
    pub enabled: bool,
    /// Bytes of one transfer at most.
    pub max_size: u64,
    /// Bytes one app's transfers may take in the spool together.
    pub spool_quota: u64,
    /// What may go over a metered network: an app can ask for less, and where this is not `never` for `allow`.
    pub metered: Metered,
    /// How many run at a time.
    pub at_a_time: usize,
    /// Whether they may lead to this machine itself.
    pub loopback: bool,
    /// How long what nobody fetches is kept.
    pub keep: Duration,
}

const MIB: u64 = 1024 * 1024;
const DAY: Duration = Duration::from_secs(24 * 3600);

impl Default for TransferSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            max_size: 2048 * MIB,
            spool_quota: 4096 * MIB,
            metered: Metered::Small,
            at_a_time: 2,
            loopback: false,
            keep: 7 * DAY,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawTransfers {
    enabled: Option<bool>,
    max_size: Option<String>,
    spool_quota: Option<String>,
    metered: Option<Metered>,
    at_a_time: Option<usize>,
    loopback: Option<bool>,
    keep: Option<String>,
}

impl RawTransfers {
    pub(super) fn check(self) -> Result<TransferSettings, ConfigError> {
        let default = TransferSettings::default();
        let range = MIB..=1024 * 1024 * MIB;
        let max_size = values::size("transfers.max-size", self.max_size, default.max_size, range.clone())?;
        let quota = default.spool_quota.max(max_size);
        let spool_quota = values::size("transfers.spool-quota", self.spool_quota, quota, range)?;
        if spool_quota < max_size {
            return Err(values::wrong("transfers.spool-quota".into(), "is less than transfers.max-size".into()));
        }
        Ok(TransferSettings {
            enabled: self.enabled.unwrap_or(default.enabled),
            max_size,
            spool_quota,
            metered: self.metered.unwrap_or(default.metered),
            at_a_time: values::count("transfers.at-a-time", self.at_a_time, default.at_a_time, 8)?,
            loopback: self.loopback.unwrap_or(default.loopback),
            keep: values::duration("transfers.keep", self.keep, default.keep, DAY / 24..=30 * DAY)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    #[test]
    fn every_key_is_read_and_what_makes_no_sense_refused() {
        let text = "[transfers]\nenabled = false\nmax-size = \"3GiB\"\nmetered = \"never\"\nat-a-time = 1\n\
                    loopback = true\nkeep = \"2days\"";
        let read = Settings::parse(text).unwrap().transfers;
        assert_eq!(
            read,
            TransferSettings {
                enabled: false,
                max_size: 3 << 30,
                spool_quota: 4 << 30,
                metered: Metered::Never,
                at_a_time: 1,
                loopback: true,
                keep: 2 * DAY,
            }
        );
        for (line, key) in [
            ("max-size = \"3 apples\"", "max-size"),
            ("max-size = \"1KiB\"", "max-size"),
            ("max-size = \"99999999999GiB\"", "max-size"),
            ("spool-quota = \"1MiB\"", "spool-quota"),
            ("at-a-time = 0", "at-a-time"),
            ("keep = \"1s\"", "keep"),
        ] {
            let error = Settings::parse(&format!("[transfers]\n{line}")).unwrap_err().to_string();
            assert!(error.starts_with(&format!("transfers.{key}:")), "{error}");
        }
        assert!(Settings::parse("[transfers]\nmetered = \"some\"").is_err());
    }
}
