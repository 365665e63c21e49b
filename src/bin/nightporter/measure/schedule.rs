//! Which arm comes when. Pure: the same seed gives the same order.

use super::arm::Arm;

/// Every arm once in each run, each run in an order of its own.
pub(super) fn order(arms: &[Arm], runs: usize, seed: u64) -> Vec<(usize, Arm)> {
    let mut random = Random(seed);
    let mut order = Vec::with_capacity(arms.len() * runs);
    for run in 1..=runs {
        let mut arms = arms.to_vec();
        random.shuffle(&mut arms);
        order.extend(arms.into_iter().map(|arm| (run, arm)));
    }
    order
}

/// splitmix64 (Steele, Lea, Flood 2014).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `bound`, and 0 if there is nothing less.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        match u64::try_from(bound) {
            // The remainder's bias is bound / 2^64.
            Ok(bound @ 1..) => usize::try_from(self.next() % bound).unwrap_or(0),
            _ => 0,
        }
    }

    /// Fisher and Yates, as Durstenfeld has it.
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_run_has_each_arm_once(seed in any::<u64>(), runs in 1_usize..20) {
            let order = order(&Arm::DEFAULT, runs, seed);
            for run in 1..=runs {
                let of_run: Vec<Arm> = order.iter().filter(|(n, _)| *n == run).map(|(_, arm)| *arm).collect();
                let different: HashSet<Arm> = of_run.iter().copied().collect();
                prop_assert_eq!((of_run.len(), different.len()), (Arm::DEFAULT.len(), Arm::DEFAULT.len()));
            }
            prop_assert!(order.is_sorted_by_key(|(run, _)| *run));
        }
    }

    #[test]
    fn every_arm_comes_first_now_and_then_and_a_seed_says_when() {
        let firsts: Vec<Arm> = (0..200).map(|seed| order(&Arm::DEFAULT, 1, seed)[0].1).collect();
        for arm in Arm::DEFAULT {
            let times = firsts.iter().filter(|first| **first == arm).count();
            assert!((25..=80).contains(&times), "{arm:?} came first {times} times in 200");
        }
        assert_eq!(order(&Arm::DEFAULT, 5, 7), order(&Arm::DEFAULT, 5, 7));
        assert_ne!(order(&Arm::DEFAULT, 5, 7), order(&Arm::DEFAULT, 5, 8));
    }
}
