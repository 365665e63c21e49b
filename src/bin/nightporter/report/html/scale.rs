//! Axes: round figures for memory, times of the day, decades of milliseconds.

use super::super::{
    series::Window,
    units::{clock, date, float, millis},
};

/// Where an axis has a mark, from 0 to 1, and what it says.
pub(super) type Mark = (f64, String);

/// From zero up in round steps.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    /// What the end of the axis stands for; above zero.
    pub(super) top: f64,
    step: f64,
}

impl Linear {
    /// For figures up to `most`, with three to five marks.
    pub(super) fn to(most: f64) -> Self {
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        let magnitude = 10f64.powf((most / 4.0).log10().floor());
        let steps = [1.0, 2.0, 2.5, 5.0, 10.0];
        let step = steps.map(|step| step * magnitude).into_iter().find(|step| step * 4.0 >= most).unwrap_or(most);
        Self { top: (most / step).ceil().max(1.0) * step, step }
    }

    /// Marks from zero up.
    pub(super) fn marks(&self) -> Vec<Mark> {
        let figures = (0..=4u8).map(|index| f64::from(index) * self.step);
        figures
            .filter(|figure| *figure <= self.top * 1.000_001)
            .map(|figure| (figure / self.top, super::super::units::figure(figure).replace(".0", "")))
            .collect()
    }

    /// Where a figure is.
    pub(super) fn position(&self, figure: f64) -> f64 {
        (figure / self.top).clamp(0.0, 1.0)
    }
}

/// At most five marks at round times, in UTC.
pub(super) fn times(window: Window) -> Vec<Mark> {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    const STEPS: [u64; 16] = [
        5 * MINUTE,
        10 * MINUTE,
        15 * MINUTE,
        30 * MINUTE,
        HOUR,
        2 * HOUR,
        3 * HOUR,
        6 * HOUR,
        12 * HOUR,
        DAY,
        2 * DAY,
        7 * DAY,
        14 * DAY,
        28 * DAY,
        91 * DAY,
        364 * DAY,
    ];
    let longest = (window.secs() / 5 + 1).max(1);
    let step = STEPS.into_iter().find(|step| window.secs() / step <= 4).unwrap_or(longest);
    let first = window.from.div_ceil(step).saturating_mul(step);
    let marks = (0..5u64).map(|index| first.saturating_add(index.saturating_mul(step)));
    let say =
        |at: u64| if step < DAY && !(step >= 6 * HOUR && at.is_multiple_of(DAY)) { clock(at) } else { date(at, false) };
    marks.filter(|at| *at <= window.to).map(|at| (window.position(at), say(at))).collect()
}

/// Milliseconds, each decade as wide as the next: from 1 ms up to the decade `slowest` is in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Decades(f64);

impl Decades {
    pub(super) fn to(slowest: u64) -> Self {
        Self(float(slowest.max(2)).log10().ceil())
    }

    /// Where a time is; what is below a millisecond is at the start.
    pub(super) fn position(self, ms: f64) -> f64 {
        (ms.max(1.0).log10() / self.0).clamp(0.0, 1.0)
    }

    /// One mark a decade; every other one where they are many.
    pub(super) fn marks(self) -> Vec<Mark> {
        let stride = if self.0 > 5.0 { 2 } else { 1 };
        let decades = (0..=19u32).step_by(stride).take_while(|decade| f64::from(*decade) <= self.0);
        decades.map(|decade| (f64::from(decade) / self.0, say(10u64.saturating_pow(decade)))).collect()
    }
}

fn say(ms: u64) -> String {
    millis(ms).replace(".0", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(marks: Vec<Mark>) -> Vec<String> {
        assert!(marks.iter().all(|(at, _)| (0.0..=1.0).contains(at)), "{marks:?}");
        assert!(marks.windows(2).all(|pair| pair[0].0 < pair[1].0), "{marks:?}");
        marks.into_iter().map(|(_, text)| text.replace('\u{a0}', " ")).collect()
    }

    #[test]
    fn figures_are_round_and_the_axis_reaches_the_largest() {
        for most in [0.0, f64::NAN, f64::INFINITY, 0.3, 1.0, 7.0, 583.1, 99_999.0, 1e16] {
            let scale = Linear::to(most);
            assert!(scale.top > 0.0 && (!most.is_finite() || scale.top >= most), "{most}: {scale:?}");
            assert!((2..=5).contains(&scale.marks().len()), "{most}: {:?}", scale.marks());
        }
        assert_eq!(said(Linear::to(583.1).marks()), ["0", "200", "400", "600"]);
        assert_eq!(Linear::to(100.0).position(50.0), 0.5);
    }

    #[test]
    fn times_are_round() {
        let day = Window { from: 1_795_311_549, to: 1_795_311_549 + 86_400 };
        assert_eq!(said(times(day)), ["06:00", "12:00", "18:00", "23 Nov"]);
        let week = Window { from: 1_795_311_549, to: 1_795_311_549 + 7 * 86_400 };
        assert!(said(times(week)).iter().all(|text| text.ends_with("Nov")), "{:?}", times(week));
        for secs in [1, 60, 5000, 40_000, 1_000_000, 100_000_000, u64::MAX / 2] {
            let marks = times(Window { from: 1_795_311_549, to: 1_795_311_549 + secs });
            assert!(marks.len() <= 5 && (secs < 5000 || marks.len() >= 2), "{secs}: {marks:?}");
            said(marks);
        }
    }

    #[test]
    fn decades_reach_the_slowest() {
        assert_eq!(said(Decades::to(4200).marks()), ["1 ms", "10 ms", "100 ms", "1 s", "10 s"]);
        assert_eq!(Decades::to(0), Decades(1.0));
        assert!((Decades::to(10_000).position(100.0) - 0.5).abs() < 1e-9);
        assert!(Decades::to(u64::MAX).marks().len() <= 11);
        assert_eq!(Decades::to(u64::MAX).position(f64::NAN), 0.0);
    }
}
