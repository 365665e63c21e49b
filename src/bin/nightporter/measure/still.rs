//! When memory counts as standing still. Pure.

use std::collections::VecDeque;

/// The last few looks at used memory.
#[derive(Debug, Default)]
pub(super) struct Still(VecDeque<u64>);

/// Looks that have to agree.
const LOOKS: usize = 6;
/// They agree when they are this near to each other, in KiB, or within this part of what is used.
const NEAR: u64 = 1024;
const PART: u64 = 200;

impl Still {
    /// One more look, in KiB. True when the last few are as good as the same.
    pub(super) fn add(&mut self, used: u64) -> bool {
        if self.0.len() == LOOKS {
            self.0.pop_front();
        }
        self.0.push_back(used);
        let (least, most) = (self.0.iter().min().copied().unwrap_or(0), self.0.iter().max().copied().unwrap_or(0));
        self.0.len() == LOOKS && most - least <= NEAR.max(least / PART)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn add_all(looks: impl IntoIterator<Item = u64>) -> bool {
        let mut still = Still::default();
        looks.into_iter().fold(false, |_, used| still.add(used))
    }

    #[test]
    fn it_takes_a_few_looks_that_agree() {
        assert!(!add_all([500_000; LOOKS - 1]));
        assert!(add_all([500_000; LOOKS]));
        assert!(!add_all([1, 2000, 4000, 6000, 8000, 10_000, 12_000]));
        assert!(add_all([900_000, 1, 2, 3, 4, 5, 6]));
    }

    proptest! {
        #[test]
        fn what_moves_by_more_than_a_part_of_it_does_not_stand(from in 0_u64..1 << 34, by in 1_u64..1 << 20) {
            let step = by.max(from / PART).max(NEAR) + 1;
            prop_assert!(!add_all((0..20).map(|n| from + n * step)));
            prop_assert!(add_all(std::iter::repeat_n(from, 20)));
        }
    }
}
