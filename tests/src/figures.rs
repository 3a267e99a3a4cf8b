//! Figures, random numbers, and waiting for something to become so.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

/// What should take moments, and may take that long on a busy machine.
pub const TEN_SECONDS: Duration = Duration::from_secs(10);

/// The middle one; of an even number, the upper of the two.
pub fn median<T: Copy + PartialOrd>(values: &[T]) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).expect("figures can be compared"));
    sorted[sorted.len() / 2]
}

/// Looks every few milliseconds until something is so.
///
/// # Panics
/// It never is.
#[track_caller]
pub fn wait_until(what: &str, patience: Duration, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !so() {
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Random numbers that a seed repeats (Steele and others, SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.bits() % end
    }

    /// Some of the pages of `all`, `most` at most.
    pub fn part(&mut self, all: &Range<u64>, most: u64) -> Range<u64> {
        let start = all.start + self.below(all.end - all.start);
        start..(start + 1 + self.below(most)).min(all.end)
    }
}
