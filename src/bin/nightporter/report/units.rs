//! Figures as people read them. In the browser's text a space before a unit never breaks.

use std::time::UNIX_EPOCH;

use nightporter::{model::ZramSource, time::UnixTime};

/// No-break space.
const SPACE: char = '\u{a0}';
const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// KiB as MiB: `84.2 MiB`, `1,204 MiB`.
pub(super) fn size(kib: u64) -> String {
    format!("{}{SPACE}MiB", figure(float(kib) / 1024.0))
}

/// [`size`] with a minus sign where it is negative.
pub(super) fn signed(kib: i64) -> String {
    let sign = if kib < 0 { "\u{2212}" } else { "" };
    format!("{sign}{}", size(kib.unsigned_abs()))
}

/// `9,814 MiB·h`.
pub(super) fn mib_hours(figure_: f64) -> String {
    let sign = if figure_ < 0.0 { "\u{2212}" } else { "" };
    format!("{sign}{}{SPACE}MiB·h", figure(figure_.abs()))
}

/// One decimal below a thousand, none from there on.
pub(super) fn figure(value: f64) -> String {
    match value {
        value if !value.is_finite() => "–".into(),
        value if value < 999.95 => format!("{value:.1}"),
        value => grouped(&format!("{value:.0}")),
    }
}

/// `12,345`.
pub(super) fn count(number: u64) -> String {
    grouped(&number.to_string())
}

/// `74 ms`, `1.2 s`, `2.5 min`.
pub(super) fn millis(ms: u64) -> String {
    let seconds = float(ms) / 1000.0;
    match ms {
        0..1000 => format!("{ms}{SPACE}ms"),
        1000..60_000 => format!("{seconds:.1}{SPACE}s"),
        60_000..3_600_000 => format!("{:.1}{SPACE}min", seconds / 60.0),
        _ => format!("{}{SPACE}h", figure(seconds / 3600.0)),
    }
}

/// Hours, a figure from elsewhere, as [`crate::render::duration`] says them.
pub(super) fn hours(hours: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates, and NaN is zero")]
    let secs = (hours * 3600.0).round() as u64;
    crate::render::duration(secs).replace(' ', "\u{a0}")
}

/// `22 Nov 2026, 11:36 UTC` of the daemon's `2026-11-22T11:36:09Z`; anything else as it is.
pub(super) fn when(utc: &str) -> String {
    parsed(utc).map_or_else(|| utc.to_owned(), |secs| format!("{}, {} UTC", date(secs, true), clock(secs)))
}

/// Seconds since 1970 of a date of the daemon.
pub(super) fn parsed(utc: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339(utc).ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

/// `22 Nov`, or `22 Nov 2026`.
pub(super) fn date(secs: u64, with_year: bool) -> String {
    let text = UnixTime::from_secs(secs).to_string();
    let mut parts = text.split(['-', 'T']);
    let (Some(year), Some(month), Some(day)) = (parts.next(), parts.next(), parts.next()) else { return text };
    let month = month.parse::<usize>().ok().and_then(|month| MONTHS.get(month.wrapping_sub(1)));
    let day = day.trim_start_matches('0');
    let year = if with_year { format!(" {year}") } else { String::new() };
    format!("{day} {}{year}", month.copied().unwrap_or_default())
}

/// `11:36`.
pub(super) fn clock(secs: u64) -> String {
    format!("{:02}:{:02}", secs % 86_400 / 3600, secs % 3600 / 60)
}

/// How zram's share is known, as a sentence.
pub(super) const fn source(source: ZramSource) -> &'static str {
    match source {
        ZramSource::Measured => "zram's share is measured: by how much it grew with each page-out.",
        ZramSource::Ratio => {
            "zram's share is estimated for some apps, by how well zram compresses all it holds: other things went in meanwhile."
        }
    }
}

/// Exact up to 2^53, which no figure of this world reaches.
#[expect(clippy::cast_precision_loss, reason = "rounded for people anyway")]
pub(super) const fn float(number: u64) -> f64 {
    number as f64
}

fn grouped(digits: &str) -> String {
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_as_many_digits_as_mean_something() {
        assert_eq!(
            [0, 51, 86_221, 1_023_999, 12_641_280].map(size),
            ["0.0\u{a0}MiB", "0.0\u{a0}MiB", "84.2\u{a0}MiB", "1,000\u{a0}MiB", "12,345\u{a0}MiB"]
        );
        assert_eq!(signed(-1536), "\u{2212}1.5\u{a0}MiB");
        assert_eq!(signed(i64::MIN), "\u{2212}9,007,199,254,740,992\u{a0}MiB");
        assert_eq!(
            [0, 999, 1234, 90_000, 7_200_000].map(millis).map(|text| text.replace('\u{a0}', " ")),
            ["0 ms", "999 ms", "1.2 s", "1.5 min", "2.0 h"]
        );
        assert_eq!([999, 1000, 1_234_567].map(count), ["999", "1,000", "1,234,567"]);
        assert_eq!(
            [mib_hours(-2.0), mib_hours(f64::NAN)].map(|text| text.replace('\u{a0}', " ")),
            ["\u{2212}2.0 MiB·h", "– MiB·h"]
        );
        let told = [hours(53.0), hours(-1.0), hours(f64::NAN)].map(|text| text.replace('\u{a0}', " "));
        assert_eq!(told, ["2 d 5 h", "0 s", "0 s"]);
    }

    #[test]
    fn dates_read_as_dates_and_nonsense_as_it_is() {
        assert_eq!(when("2026-11-02T01:39:09Z"), "2 Nov 2026, 01:39 UTC");
        assert_eq!(when("yesterday"), "yesterday");
        assert_eq!(parsed("1969-01-01T00:00:00Z"), None);
        assert_eq!(date(u64::MAX, false), date(u64::MAX / 1000, false), "no year is too far off");
    }
}
