//! Medians and spreads. Pure.

use serde::Serialize;

/// Some figures of one kind in five numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) n: usize,
    pub(super) min: f64,
    /// A quarter of them is below.
    pub(super) q1: f64,
    pub(super) median: f64,
    /// A quarter of them is above.
    pub(super) q3: f64,
    pub(super) max: f64,
}

impl Summary {
    /// None without any; what is not a number is left out.
    pub(super) fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().filter(|figure| figure.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            n: sorted.len(),
            min: *sorted.first()?,
            q1: quantile(&sorted, 0.25)?,
            median: quantile(&sorted, 0.5)?,
            q3: quantile(&sorted, 0.75)?,
            max: *sorted.last()?,
        })
    }
}

/// Latencies in milliseconds, by nearest rank: each is one that was seen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Latency {
    pub(super) n: usize,
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) max: f64,
}

impl Latency {
    pub(super) fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().filter(|figure| figure.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let rank = |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).checked_sub(1)?).copied();
        Some(Self { n: sorted.len(), p50: rank(50)?, p95: rank(95)?, max: *sorted.last()? })
    }
}

/// Between two neighbours as R's type 7 has it, which is what most programs say.
fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "there are far fewer than 2^53 of them")]
    let at = part * (sorted.len().checked_sub(1)? as f64);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index of a slice")]
    let below = at.floor() as usize;
    let (low, high) = (*sorted.get(below)?, *sorted.get(below + 1).or(sorted.last())?);
    // Halves, so that the difference of the two greatest numbers there are is one as well.
    Some(low + (high / 2.0 - low / 2.0) * (at - at.floor()) * 2.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quartiles_are_those_of_a_textbook() {
        let summary = Summary::of([7.0, 15.0, 36.0, 39.0, 40.0, 41.0]).unwrap();
        assert_eq!((summary.q1, summary.median, summary.q3), (20.25, 37.5, 39.75));
        assert_eq!((summary.n, summary.min, summary.max), (6, 7.0, 41.0));
        assert_eq!(Summary::of([]), None);
        assert_eq!(Summary::of([f64::NAN]), None);
        assert_eq!(Summary::of([3.0]).unwrap().q3, 3.0);
    }

    #[test]
    fn latencies_are_by_nearest_rank() {
        let latency = Latency::of((1..=200).rev().map(f64::from)).unwrap();
        assert_eq!((latency.p50, latency.p95, latency.max, latency.n), (100.0, 190.0, 200.0, 200));
        assert_eq!(Latency::of([]), None);
        assert_eq!(Latency::of([5.0]).unwrap().p95, 5.0);
    }

    proptest! {
        #[test]
        fn numbers_are_in_order_and_order_does_not_matter(mut figures in prop::collection::vec(-1e12_f64..1e12, 1..200)) {
            let summary = Summary::of(figures.iter().copied()).unwrap();
            let five = [summary.min, summary.q1, summary.median, summary.q3, summary.max];
            prop_assert!(five.windows(2).all(|pair| pair[0] <= pair[1]), "{five:?}");
            prop_assert!(figures.contains(&summary.min) && figures.contains(&summary.max));
            let below = figures.iter().filter(|figure| **figure < summary.median).count();
            let above = figures.iter().filter(|figure| **figure > summary.median).count();
            prop_assert!(below * 2 <= figures.len() && above * 2 <= figures.len(), "{below} {above}");
            figures.reverse();
            prop_assert_eq!(Summary::of(figures), Some(summary));
        }

        #[test]
        fn what_is_added_is_added_to_all(figures in prop::collection::vec(-1000_i32..1000, 1..50), by in -1000_i32..1000) {
            // Quarters of whole numbers have no rounding.
            let one = Summary::of(figures.iter().map(|figure| f64::from(*figure))).unwrap();
            let other = Summary::of(figures.iter().map(|figure| f64::from(figure + by))).unwrap();
            prop_assert_eq!((one.q1 + f64::from(by), one.median + f64::from(by)), (other.q1, other.median));
        }

        #[test]
        fn a_rank_is_one_that_was_seen(figures in prop::collection::vec(0.0_f64..1e9, 1..200)) {
            let latency = Latency::of(figures.iter().copied()).unwrap();
            prop_assert!(figures.contains(&latency.p50) && figures.contains(&latency.p95));
            let within = figures.iter().filter(|figure| **figure <= latency.p95).count();
            prop_assert!(within * 100 >= figures.len() * 95);
        }
    }
}
