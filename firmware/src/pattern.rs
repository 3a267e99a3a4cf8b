//! The values that `fill` writes and `verify` expects.

/// Words of a page.
pub const PAGE_WORDS: usize = 512;

/// The increment of splitmix64 (Steele, Lea and Flood, 2014): 2⁶⁴ divided by the golden ratio.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The words of one page under one seed: a splitmix64 stream that starts at a state of the page's own.
///
/// ```
/// use firmware::pattern::{Words, word};
/// assert_eq!(Words::new(7, 64).nth(3), Some(word(7, 64, 3)));
/// ```
#[derive(Clone, Debug)]
pub struct Words {
    state: u64,
}

impl Words {
    /// The words of linear page `page`, from word 0. The stream does not end; a page takes [`PAGE_WORDS`] of it.
    #[inline]
    pub const fn new(seed: u64, page: u64) -> Self {
        Self { state: mix(mix(seed).wrapping_add(page)) }
    }
}

impl Iterator for Words {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        self.state = self.state.wrapping_add(GAMMA);
        Some(mix(self.state))
    }
}

/// The value of the 8-byte word `index` of linear page `page` under `seed`.
pub const fn word(seed: u64, page: u64, index: u64) -> u64 {
    mix(Words::new(seed, page).state.wrapping_add(GAMMA.wrapping_mul(index.wrapping_add(1))))
}

/// The finalizer of splitmix64, a bijection.
#[inline]
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mix_is_the_published_generator() {
        // The first outputs of splitmix64 seeded with 0.
        assert_eq!(mix(GAMMA), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix(GAMMA.wrapping_mul(2)), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn neighbours_share_no_words() {
        extern crate std;
        let mut seen = std::collections::HashSet::new();
        for seed in 0..3 {
            for page in 64..80 {
                for (index, value) in Words::new(seed, page).take(PAGE_WORDS).enumerate() {
                    assert_eq!(value, word(seed, page, index as u64));
                    assert!(seen.insert(value));
                }
            }
        }
    }
}
