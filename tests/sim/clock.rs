//! Time that steps from one due thing to the next, and the one source of chance.

use std::{cmp::Ordering, collections::BinaryHeap};

use nightporter::time::{Instant, Now, UnixTime};

/// Nanoseconds.
pub(crate) type At = u64;

pub(crate) const MS: At = 1_000_000;
pub(crate) const SEC: At = 1000 * MS;

/// Boot time at the beginning of a run: not zero, so that a subtraction too many shows.
pub(crate) const START: At = 1000 * SEC;
const WALL_START: u64 = 1_795_000_000_000;

/// Both clocks at `at`.
pub(crate) fn now(at: At) -> Now {
    Now { boot: Instant::from_nanos(at), wall: wall(at) }
}

/// Wall time at `at`.
pub(crate) fn wall(at: At) -> UnixTime {
    UnixTime::from_millis(WALL_START + at / MS)
}

/// splitmix64: small, fast and the same everywhere.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, which is not zero.
    pub(crate) const fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// From `low` to `high`.
    pub(crate) const fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True `n` times in ten thousand.
    pub(crate) const fn chance(&mut self, n: u64) -> bool {
        self.below(10_000) < n
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        if from.is_empty() { None } else { from.get(self.below(from.len() as u64) as usize) }
    }

    pub(crate) fn seed(&mut self) -> [u8; 32] {
        let mut seed = [0; 32];
        for part in seed.chunks_mut(8) {
            part.copy_from_slice(&self.next().to_le_bytes());
        }
        seed
    }
}

/// What is due when; things due at the same time come in the order they were put in.
pub(crate) struct Agenda<T> {
    heap: BinaryHeap<Item<T>>,
    count: u64,
}

struct Item<T> {
    at: At,
    order: u64,
    what: T,
}

impl<T> Agenda<T> {
    pub(crate) const fn new() -> Self {
        Self { heap: BinaryHeap::new(), count: 0 }
    }

    pub(crate) fn add(&mut self, at: At, what: T) {
        self.count += 1;
        self.heap.push(Item { at, order: self.count, what });
    }

    pub(crate) fn next_at(&self) -> Option<At> {
        self.heap.peek().map(|item| item.at)
    }

    pub(crate) fn pop(&mut self) -> Option<T> {
        self.heap.pop().map(|item| item.what)
    }
}

impl<T> PartialEq for Item<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<T> Eq for Item<T> {}

impl<T> PartialOrd for Item<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The earliest is the greatest, because the heap gives the greatest first.
impl<T> Ord for Item<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}
