//! Reading single values of an experiment's file.

use std::{fmt, ops::RangeInclusive, time::Duration};

/// What is wrong with the file, for whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem(pub(super) String);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(super) fn wrong(key: &str, problem: impl fmt::Display) -> Problem {
    Problem(format!("{key}: {problem}"))
}

pub(super) fn duration(
    key: &str,
    text: Option<String>,
    default: Duration,
    range: RangeInclusive<Duration>,
) -> Result<Duration, Problem> {
    let Some(text) = text else { return Ok(default) };
    let parsed = humantime::parse_duration(&text)
        .map_err(|error| wrong(key, format!("\"{text}\" is not a duration such as \"10s\" or \"2min\": {error}")))?;
    if range.contains(&parsed) {
        return Ok(parsed);
    }
    let (from, to) = (humantime::format_duration(*range.start()), humantime::format_duration(*range.end()));
    Err(wrong(key, format!("\"{text}\" is out of range; {from} to {to} are possible")))
}

pub(super) fn count(
    key: &str,
    given: Option<usize>,
    default: usize,
    range: RangeInclusive<usize>,
) -> Result<usize, Problem> {
    match given {
        None => Ok(default),
        Some(n) if range.contains(&n) => Ok(n),
        Some(n) => Err(wrong(key, format!("{n} is out of range; {} to {} are possible", range.start(), range.end()))),
    }
}

/// `"10%"`, `"2.5 %"`.
pub(super) fn percent(key: &str, text: Option<String>) -> Result<Option<f64>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let number = text.strip_suffix('%').and_then(|number| number.trim_end().parse::<f64>().ok());
    match number.filter(|number| (0.0..=1000.0).contains(number)) {
        Some(number) => Ok(Some(number)),
        None => Err(wrong(key, format!("\"{text}\" is not a percentage such as \"10%\""))),
    }
}

/// `"64MiB"`, in KiB; not nothing.
pub(super) fn size(key: &str, text: Option<String>) -> Result<Option<u64>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let read = || {
        let end = text.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = text[..end].parse().ok()?;
        let unit = match text[end..].trim_start() {
            "KiB" => 1,
            "MiB" => 1024,
            "GiB" => 1024 * 1024,
            _ => return None,
        };
        number.checked_mul(unit).filter(|kib| *kib > 0)
    };
    match read() {
        Some(kib) => Ok(Some(kib)),
        None => Err(wrong(key, format!("\"{text}\" is not a size such as \"64MiB\""))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_percentages_are_read_with_their_units() {
        let size = |text: &str| size("k", Some(text.into())).ok().flatten();
        assert_eq!((size("64MiB"), size("1 GiB"), size("5KiB")), (Some(65536), Some(1_048_576), Some(5)));
        for wrong in ["64", "MiB", "1.5GiB", "64MB", "-1MiB", "0KiB", "99999999999999999GiB", ""] {
            assert_eq!(size(wrong), None, "{wrong}");
        }
        let percent = |text: &str| percent("k", Some(text.into())).ok().flatten();
        assert_eq!((percent("10%"), percent("2.5 %")), (Some(10.0), Some(2.5)));
        for wrong in ["10", "-1%", "NaN%", "inf%", "%", ""] {
            assert_eq!(percent(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_out_of_range_is_told_with_the_range() {
        let problem = count("runs", Some(0), 3, 1..=100).unwrap_err().to_string();
        assert_eq!(problem, "runs: 0 is out of range; 1 to 100 are possible");
        let second = Duration::from_secs(1);
        let problem = duration("hold", Some("2h".into()), second, second..=60 * second).unwrap_err().to_string();
        assert_eq!(problem, "hold: \"2h\" is out of range; 1s to 1m are possible");
    }
}
