//! Which blocks of the disk are free.

use rangemap::RangeSet;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Bytes in a block: what direct I/O is aligned to.
pub const BLOCK: usize = 4096;

/// Blocks of the disk that hold a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskExtent {
    /// The first block.
    pub start: u64,
    /// How many there are.
    pub blocks: u64,
}

impl DiskExtent {
    /// The block after the last.
    pub fn end(self) -> u64 {
        self.start + self.blocks
    }

    /// Its length in bytes.
    pub fn bytes(self) -> usize {
        self.blocks as usize * BLOCK
    }
}

/// No frame has more blocks than this: 16 pages as they are, and the header. Longer free extents are all alike.
const LONG: u64 = 17;

/// The free blocks, as extents that do not touch.
///
/// Allocation goes on where the last one ended (next fit): what is written in a row lies in a row. Every operation is
/// logarithmic in the number of free extents, which are filed by length as well.
///
/// Freed blocks are *stale* until they are written again or the disk has been told that nobody needs them.
#[derive(Debug)]
pub struct Extents {
    total: u64,
    free: u64,
    /// Start to end.
    extents: BTreeMap<u64, u64>,
    /// The starts of extents of 1, 2, … 16 blocks, and of all longer ones.
    by_length: [BTreeSet<u64>; LONG as usize],
    cursor: u64,
    /// Free blocks that hold what nobody needs.
    stale: RangeSet<u64>,
    stale_blocks: u64,
}

impl Extents {
    /// `total` free blocks.
    pub fn new(total: u64) -> Self {
        let mut extents = Self {
            total,
            free: total,
            extents: BTreeMap::new(),
            by_length: [const { BTreeSet::new() }; LONG as usize],
            cursor: 0,
            stale: RangeSet::new(),
            stale_blocks: 0,
        };
        extents.insert(0..total);
        extents
    }

    /// All blocks there are.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The blocks that are free.
    pub fn free_blocks(&self) -> u64 {
        self.free
    }

    /// Takes `blocks` (1 to 17) in one piece, if there is such a piece.
    pub fn allocate(&mut self, blocks: u64) -> Option<DiskExtent> {
        debug_assert!((1..=LONG).contains(&blocks));
        let start = self.find(blocks)?;
        let place = DiskExtent { start, blocks };
        self.take(place);
        self.cursor = place.end();
        Some(place)
    }

    /// Takes stale blocks, at most so many, to have the disk discard them.
    pub fn take_stale(&mut self, most: u64) -> Option<DiskExtent> {
        let stale = self.stale.iter().next()?;
        let place = DiskExtent { start: stale.start, blocks: (stale.end - stale.start).min(most) };
        self.take(place);
        Some(place)
    }

    /// How many blocks are stale.
    pub fn stale_blocks(&self) -> u64 {
        self.stale_blocks
    }

    /// Takes free blocks.
    fn take(&mut self, place: DiskExtent) {
        let (&from, &to) = self.extents.range(..=place.start).next_back().expect("free blocks are in an extent");
        self.remove(from);
        self.insert(from..place.start);
        self.insert(place.end()..to);
        self.free -= place.blocks;
        let blocks = place.start..place.end();
        let stale = self.stale.overlapping(&blocks).map(|s| s.end.min(blocks.end) - s.start.max(blocks.start));
        self.stale_blocks -= stale.sum::<u64>();
        self.stale.remove(blocks);
    }

    /// Gives blocks back, which hold what nobody needs any more.
    pub fn release(&mut self, place: DiskExtent) {
        self.release_discarded(place);
        self.stale.insert(place.start..place.end());
        self.stale_blocks += place.blocks;
    }

    /// Gives blocks back, which hold nothing.
    pub fn release_discarded(&mut self, place: DiskExtent) {
        let mut range = place.start..place.end();
        let before = self.extents.range(..range.start).next_back().map(|(&start, &end)| start..end);
        let after = self.extents.range(range.start..).next().map(|(&start, &end)| start..end);
        if let Some(before) = before {
            assert!(before.end <= range.start, "blocks {range:?} are free already: {before:?}");
            if before.end == range.start {
                self.remove(before.start);
                range.start = before.start;
            }
        }
        if let Some(after) = after {
            assert!(after.start >= range.end, "blocks {range:?} are free already: {after:?}");
            if after.start == range.end {
                self.remove(after.start);
                range.end = after.end;
            }
        }
        self.insert(range);
        self.free += place.blocks;
    }

    /// Whether the stale blocks are free, and as many as we think.
    pub fn stale_is_sound(&self) -> bool {
        let within = |stale: &Range<u64>| {
            let extent = self.extents.range(..=stale.start).next_back();
            extent.is_some_and(|(_, &end)| stale.end <= end)
        };
        let count: u64 = self.stale.iter().map(|stale| stale.end - stale.start).sum();
        count == self.stale_blocks && self.stale.iter().all(within)
    }

    /// The free extents, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.extents.iter().map(|(&start, &end)| start..end)
    }

    /// At the cursor, or after it, or anywhere.
    fn find(&self, blocks: u64) -> Option<u64> {
        let here = self.extents.range(..=self.cursor).next_back();
        if here.is_some_and(|(_, &end)| end >= self.cursor + blocks) {
            return Some(self.cursor);
        }
        let fitting = &self.by_length[Self::class(blocks)..];
        let after = |from: u64| fitting.iter().filter_map(|starts| starts.range(from..).next()).min().copied();
        after(self.cursor).or_else(|| after(0))
    }

    fn class(blocks: u64) -> usize {
        blocks.min(LONG) as usize - 1
    }

    fn insert(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            self.by_length[Self::class(range.end - range.start)].insert(range.start);
            self.extents.insert(range.start, range.end);
        }
    }

    fn remove(&mut self, start: u64) {
        let end = self.extents.remove(&start).expect("an extent starts here");
        self.by_length[Self::class(end - start)].remove(&start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_in_a_row_lies_in_a_row() {
        let mut extents = Extents::new(40);
        let places: Vec<_> = [3, 1, 17, 5].map(|blocks| extents.allocate(blocks).unwrap()).into();
        assert!(places.windows(2).all(|pair| pair[0].end() == pair[1].start));
        // Freed blocks behind the cursor do not distract it, even if they touch it.
        extents.release(places[3]);
        assert_eq!(extents.allocate(2).unwrap().start, 26);
        assert_eq!(extents.free_blocks(), 40 - 21 - 2);
    }

    #[test]
    fn it_goes_round_and_fills_holes() {
        let mut extents = Extents::new(34);
        let [a, b] = [17, 17].map(|blocks| extents.allocate(blocks).unwrap());
        assert_eq!(extents.allocate(1), None);
        extents.release(a);
        let hole = extents.allocate(6).unwrap();
        assert_eq!(hole, DiskExtent { start: 0, blocks: 6 });
        assert_eq!(extents.allocate(12), None);
        extents.release(b);
        assert!(extents.iter().eq(std::iter::once(6..34)));
        extents.release(hole);
        assert!(extents.iter().eq(std::iter::once(0..34)));
    }

    #[test]
    #[should_panic(expected = "free already")]
    fn blocks_are_not_freed_twice() {
        let mut extents = Extents::new(20);
        let place = extents.allocate(4).unwrap();
        extents.release(place);
        extents.release(place);
    }
}
