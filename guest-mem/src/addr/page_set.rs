//! Sets of pages, single ones by the thousand.

use crate::addr::{Gfn, GfnRange};
use std::collections::BTreeMap;
use std::iter;
use std::ops::Range;

/// Pages, one bit each, in chunks that have any: what a guest writes lies near each other, and is looked for while it stands
/// still.
#[derive(Debug, Default)]
pub(crate) struct PageSet {
    chunks: BTreeMap<u64, Chunk>,
}

/// Bit `n` of word `w`: page `64·w + n` of the chunk.
type Chunk = [u64; WORDS];

const WORDS: usize = 8;
const WORD: u64 = u64::BITS as u64;
const CHUNK: u64 = WORDS as u64 * WORD;

impl PageSet {
    /// Takes pages in.
    pub fn add(&mut self, pages: GfnRange) {
        self.add_all([pages]);
    }

    /// Takes stretches in. Costs least where they are sorted.
    pub fn add_all(&mut self, all: impl IntoIterator<Item = GfnRange>) {
        let cut = |pages| chunks(pages).map(move |chunk| (chunk, part(pages, chunk)));
        let mut parts = all.into_iter().flat_map(cut).peekable();
        while let Some(&(chunk, _)) = parts.peek() {
            let words = self.chunks.entry(chunk).or_default();
            while let Some((_, (from, to))) = parts.next_if(|&(next, _)| next == chunk) {
                masks(from, to).for_each(|(word, mask)| words[word] |= mask);
            }
        }
    }

    /// Takes pages out.
    pub fn remove(&mut self, pages: GfnRange) {
        let mut empty = Vec::new();
        for (&chunk, words) in self.chunks.range_mut(chunks(pages)) {
            let (from, to) = part(pages, chunk);
            masks(from, to).for_each(|(word, mask)| words[word] &= !mask);
            if *words == [0; WORDS] {
                empty.push(chunk);
            }
        }
        for chunk in empty {
            self.chunks.remove(&chunk);
        }
    }

    /// No page is in it any more.
    pub fn clear(&mut self) {
        self.chunks.clear();
    }

    /// Whether one of `pages` is.
    pub fn touches(&self, pages: GfnRange) -> bool {
        self.within(pages).next().is_some()
    }

    /// Which of the 64 pages from `first` on are: bit `n` is page `first + n`.
    pub fn word(&self, first: Gfn) -> u64 {
        let at = |page: u64| self.chunks.get(&(page / CHUNK)).map_or(0, |words| words[(page % CHUNK / WORD) as usize]);
        match first.0 % WORD {
            0 => at(first.0),
            shift => at(first.0) >> shift | at(first.0 + WORD) << (WORD - shift),
        }
    }

    /// The stretches, sorted, not adjacent.
    pub fn iter(&self) -> impl Iterator<Item = GfnRange> {
        self.within((0..u64::MAX).into())
    }

    /// Those among `pages`, cut to them.
    pub fn within(&self, pages: GfnRange) -> impl Iterator<Item = GfnRange> {
        let words = self.chunks.range(chunks(pages)).flat_map(move |(&chunk, words)| {
            let (from, to) = part(pages, chunk);
            let touched = (from / WORD..to.div_ceil(WORD)).zip(&words[(from / WORD) as usize..]);
            touched.map(move |(word, &bits)| (Gfn(chunk * CHUNK + word * WORD), bits))
        });
        let runs = words.flat_map(|(first, bits)| runs(first, bits));
        let cut = runs.map(move |run| run.intersect(pages)).filter(|run| !run.is_empty());
        joined(cut)
    }
}

/// The stretches that a word of bits stands for, from `first` on.
pub(crate) fn runs(first: Gfn, mut bits: u64) -> impl Iterator<Item = GfnRange> {
    iter::from_fn(move || {
        let start = (bits != 0).then(|| bits.trailing_zeros())?;
        let run = (bits >> start).trailing_ones();
        // All from bit 0 to the end of the run.
        bits &= u64::MAX.checked_shl(start + run).unwrap_or(0);
        Some((first.0 + u64::from(start)..first.0 + u64::from(start + run)).into())
    })
}

/// Sorted ranges, with neighbours as one.
pub(crate) fn joined(ranges: impl Iterator<Item = GfnRange>) -> impl Iterator<Item = GfnRange> {
    let mut ranges = ranges.peekable();
    iter::from_fn(move || {
        let mut range = ranges.next()?;
        while let Some(next) = ranges.next_if(|next| next.start() == range.end()) {
            range = GfnRange::between(range.start(), next.end());
        }
        Some(range)
    })
}

fn chunks(pages: GfnRange) -> Range<u64> {
    if pages.is_empty() { 0..0 } else { pages.start().0 / CHUNK..pages.end().0.div_ceil(CHUNK) }
}

/// From where to where a chunk has `pages`.
fn part(pages: GfnRange, chunk: u64) -> (u64, u64) {
    let base = chunk * CHUNK;
    (pages.start().0.max(base) - base, pages.end().0.min(base + CHUNK) - base)
}

/// The words of a chunk that have its pages `from..to`, with the bits of those.
fn masks(from: u64, to: u64) -> impl Iterator<Item = (usize, u64)> {
    (from / WORD..to.div_ceil(WORD)).map(move |word| {
        let (low, high) = (from.saturating_sub(word * WORD), (to - word * WORD).min(WORD));
        (word as usize, (u64::MAX >> (WORD - (high - low))) << low)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 3 * CHUNK;

    /// For many pseudo-random changes, long and short, near the borders of words and chunks and far from them: the same as an
    /// array.
    #[test]
    fn a_set_is_what_an_array_of_bits_would_be() {
        let mut random = crate::testing::numbers();
        let (mut set, mut model) = (PageSet::default(), [false; PAGES as usize]);
        for step in 0..4000 {
            let start = random(PAGES);
            let most = if random(4) == 0 { PAGES } else { 4 };
            let pages = GfnRange::from(start..(start + random(most)).min(PAGES));
            let adds = random(2) == 0;
            if adds {
                set.add(pages)
            } else {
                set.remove(pages)
            }
            model[pages.start().0 as usize..pages.end().0 as usize].fill(adds);
            let asked = GfnRange::from(random(PAGES)..random(PAGES));
            let want: Vec<Gfn> = asked.iter().filter(|page| model[page.0 as usize]).collect();
            assert_eq!(set.touches(asked), !want.is_empty(), "step {step}");
            assert_eq!(set.within(asked).flat_map(GfnRange::iter).collect::<Vec<_>>(), want, "step {step}");
            let all: Vec<GfnRange> = set.iter().collect();
            assert!(all.windows(2).all(|pair| pair[0].end() < pair[1].start()), "step {step}: {all:?}");
            assert!(all.iter().all(|pages| !pages.is_empty()), "step {step}: {all:?}");
            let page = random(PAGES - WORD);
            let bits = (0..WORD).filter(|bit| model[(page + bit) as usize]).fold(0, |bits, bit| bits | 1 << bit);
            assert_eq!(set.word(Gfn(page)), bits, "step {step}");
        }
        set.remove((0..PAGES).into());
        assert!(set.chunks.is_empty());
    }
}
