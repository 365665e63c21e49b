//! Reading single values.

use std::{ops::RangeInclusive, path::PathBuf, time::Duration};

use super::ConfigError;

pub(super) const fn wrong(key: String, problem: String) -> ConfigError {
    ConfigError::Value { key, problem }
}

pub(super) fn absolute(key: &str, path: String) -> Result<PathBuf, ConfigError> {
    let path = PathBuf::from(path);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(wrong(key.into(), format!("\"{}\" must be an absolute path", path.display())))
    }
}

pub(super) fn duration(
    key: &str,
    text: Option<String>,
    default: Duration,
    range: RangeInclusive<Duration>,
) -> Result<Duration, ConfigError> {
    let Some(text) = text else { return Ok(default) };
    let parsed = humantime::parse_duration(&text)
        .map_err(|e| wrong(key.into(), format!("\"{text}\" is not a duration such as \"10s\" or \"10min\": {e}")))?;
    if range.contains(&parsed) {
        return Ok(parsed);
    }
    let (from, to) = (humantime::format_duration(*range.start()), humantime::format_duration(*range.end()));
    Err(wrong(key.into(), format!("\"{text}\" is out of range; {from} to {to} are possible")))
}

pub(super) fn count(key: &str, given: Option<usize>, default: usize, most: usize) -> Result<usize, ConfigError> {
    match given {
        None => Ok(default),
        Some(n) if (1..=most).contains(&n) => Ok(n),
        Some(n) => Err(wrong(key.into(), format!("{n} is out of range; 1 to {most} are possible"))),
    }
}

/// `"2GiB"`, `"500MiB"`, `"64KiB"`.
pub(super) fn size(
    key: &str,
    text: Option<String>,
    default: u64,
    range: RangeInclusive<u64>,
) -> Result<u64, ConfigError> {
    let Some(text) = text else { return Ok(default) };
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let found = units.iter().find_map(|(unit, shift)| Some((text.trim().strip_suffix(unit)?, 1_u64 << shift)));
    let bytes = found.and_then(|(number, unit)| number.trim_end().parse::<u64>().ok()?.checked_mul(unit));
    match bytes {
        Some(bytes) if range.contains(&bytes) => Ok(bytes),
        Some(_) => Err(wrong(key.into(), format!("\"{text}\" is out of range; 1MiB to 1TiB are possible"))),
        None => Err(wrong(key.into(), format!("\"{text}\" is not a size such as \"500MiB\" or \"2GiB\""))),
    }
}
