//! What was recorded at transitions, whenever those were, as evenly spaced figures to draw.

use nightporter::view::History;

use super::units::{float, parsed};

/// A time to draw, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// First second.
    pub(super) from: u64,
    /// The second after the last, later than `from`.
    pub(super) to: u64,
}

/// Something from a moment on, or for a while.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) at: u64,
    /// Seconds it stands for; 0: from then until the next.
    pub(super) span: u32,
    /// None where it is not known.
    pub(super) value: Option<f64>,
}

impl Window {
    /// The time a history was asked for, or else the time its rows are of.
    pub(super) fn of(history: &History) -> Option<Self> {
        if let (Some(from), Some(to)) = (parsed(&history.since), parsed(&history.until))
            && from < to
        {
            return Some(Self { from, to });
        }
        let times = || history.totals.iter().map(|row| (row.at, row.at.saturating_add(u64::from(row.span))));
        let from = times().map(|(begin, _)| begin).min()?;
        let to = times().map(|(_, end)| end).max()?;
        Some(Self { from, to: to.max(from.saturating_add(1)) })
    }

    /// Where `at` is: 0 at the start, 1 at the end.
    pub(super) fn position(self, at: u64) -> f64 {
        let (at, from, length) = (float(at), float(self.from), float(self.secs()));
        ((at - from) / length).clamp(0.0, 1.0)
    }

    pub(super) const fn secs(self) -> u64 {
        self.to.saturating_sub(self.from)
    }
}

/// The mean over each of `count` equal parts of the window, of what holds from each point on until the next. None where
/// nothing is known.
pub(super) fn means(points: &[Point], window: Window, count: usize) -> Vec<Option<f64>> {
    let mut sums = vec![(0.0, 0.0); count];
    for (index, point) in points.iter().enumerate() {
        let next = points.get(index + 1).map_or(window.to, |next| next.at);
        let Some(value) = point.value else { continue };
        spread(window, count, point.at, next, |part, share| {
            sums[part].0 += value * share;
            sums[part].1 += share;
        });
    }
    sums.into_iter().map(|(sum, weight)| (weight > 0.0).then(|| sum / weight)).collect()
}

/// How much fell into each of `count` equal parts of the window: each point's value, spread over its span.
pub(super) fn sums(points: &[Point], window: Window, count: usize) -> Vec<f64> {
    let mut sums = vec![0.0; count];
    for point in points {
        let (Some(value), span) = (point.value, u64::from(point.span.max(1))) else { continue };
        let part_of_it = float(window.secs()) / (parts(count) * float(span));
        spread(window, count, point.at, point.at.saturating_add(span), |part, share| {
            sums[part] += value * share * part_of_it;
        });
    }
    sums
}

/// Tells `take` which parts of the window lie from `begin` to `end`, and how much of each.
fn spread(window: Window, count: usize, begin: u64, end: u64, mut take: impl FnMut(usize, f64)) {
    let scale = parts(count);
    let (begin, end) = (window.position(begin) * scale, window.position(end) * scale);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to count, clamped by position")]
    for part in begin as usize..(end.ceil() as usize).min(count) {
        let from = parts(part);
        let share = end.min(from + 1.0) - begin.max(from);
        if share > 0.0 {
            take(part, share);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a few hundred")]
const fn parts(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Window = Window { from: 1000, to: 1400 };

    fn at(at: u64, value: Option<f64>) -> Point {
        Point { at, span: 0, value }
    }

    #[test]
    fn what_was_recorded_holds_until_the_next() {
        let points = [at(900, Some(4.0)), at(1150, Some(8.0)), at(1250, None), at(1300, Some(2.0))];
        assert_eq!(means(&points, WINDOW, 4), [Some(4.0), Some(6.0), Some(8.0), Some(2.0)]);
        assert_eq!(means(&points[3..], WINDOW, 4), [None, None, None, Some(2.0)]);
        assert_eq!(means(&[], WINDOW, 2), [None, None]);
        assert_eq!(means(&[at(2000, Some(1.0))], WINDOW, 2), [None, None]);
    }

    #[test]
    fn out_of_order_and_absurd_points_do_no_harm() {
        let points = [at(u64::MAX, Some(1.0)), at(0, Some(f64::MAX)), at(1200, Some(3.0))];
        assert_eq!(means(&points, WINDOW, 2)[1], Some(3.0));
        let long = Point { at: 0, span: u32::MAX, value: Some(1.0) };
        assert!(sums(&[long], WINDOW, 3).iter().all(|sum| (0.0..1.0).contains(sum)));
    }

    #[test]
    fn messages_are_counted_once() {
        let points = [
            Point { at: 1000, span: 400, value: Some(40.0) },
            Point { at: 1399, span: 0, value: Some(5.0) },
            Point { at: 5000, span: 0, value: Some(9.0) },
        ];
        let sums = sums(&points, WINDOW, 4);
        assert!(sums.iter().zip([10.0, 10.0, 10.0, 15.0]).all(|(a, b): (&f64, f64)| (a - b).abs() < 1e-9), "{sums:?}");
    }

    #[test]
    fn a_history_says_its_window_or_its_rows_do() {
        let mut history = History {
            since: "1970-01-01T00:16:40Z".into(),
            until: "1970-01-01T00:23:20Z".into(),
            ..History::default()
        };
        assert_eq!(Window::of(&history), Some(WINDOW));
        history.until = String::new();
        assert_eq!(Window::of(&history), None);
        history.totals = vec![nightporter::view::TotalAt { at: 7, ..Default::default() }];
        assert_eq!(Window::of(&history), Some(Window { from: 7, to: 8 }));
    }
}
