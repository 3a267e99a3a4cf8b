//! Which pages are in the balloon: a sorted list of ranges in a page of their own, which forks hand down.

use core::ops::Range;
use core::sync::atomic::Ordering::Relaxed;

use crate::abi::{BALLOON_RANGES, BalloonPage};

/// The list.
pub(crate) struct Balloon<'m>(pub &'m BalloonPage);

/// What the list is to become: some of its ranges, next to each other, give way to others.
pub(crate) struct Change {
    replaced: Range<usize>,
    with: [Range<u64>; 2],
    /// How many pages are in the balloon then.
    pub held: u64,
}

impl Balloon<'_> {
    fn len(&self) -> usize {
        BALLOON_RANGES.min(self.0.len.load(Relaxed) as usize)
    }

    fn get(&self, index: usize) -> Range<u64> {
        let range = &self.0.ranges[index];
        range.first.load(Relaxed)..range.end.load(Relaxed)
    }

    fn set(&self, index: usize, pages: Range<u64>) {
        self.0.ranges[index].first.store(pages.start, Relaxed);
        self.0.ranges[index].end.store(pages.end, Relaxed);
    }

    /// How many pages are in the balloon.
    pub fn held(&self) -> u64 {
        (0..self.len()).map(|index| count(&self.get(index))).sum()
    }

    /// The first of `pages` that is in the balloon.
    pub fn first_of(&self, pages: &Range<u64>) -> Option<u64> {
        let mut ranges = (0..self.len()).map(|index| self.get(index));
        let found = ranges.find(|range| range.start < pages.end && pages.start < range.end)?;
        Some(found.start.max(pages.start))
    }

    /// The list with `pages`; none if it gets too long.
    pub fn with(&self, pages: Range<u64>) -> Option<Change> {
        // What adjoins becomes one range.
        let replaced = self.between(|range| range.end < pages.start, |range| range.start <= pages.end);
        let ends = replaced.clone().map(|index| self.get(index));
        let all = ends.fold(pages, |all, range| all.start.min(range.start)..all.end.max(range.end));
        self.change(replaced, [all, 0..0])
    }

    /// The list without `pages`; none if it gets too long.
    pub fn without(&self, pages: Range<u64>) -> Option<Change> {
        let replaced = self.between(|range| range.end <= pages.start, |range| range.start < pages.end);
        let with = match (replaced.clone().next(), replaced.clone().last()) {
            (Some(first), Some(last)) => [self.get(first).start..pages.start, pages.end..self.get(last).end],
            _ => [0..0, 0..0],
        };
        self.change(replaced, with)
    }

    fn between(&self, before: impl Fn(&Range<u64>) -> bool, reaches: impl Fn(&Range<u64>) -> bool) -> Range<usize> {
        let len = self.len();
        let from = (0..len).find(|&index| !before(&self.get(index))).unwrap_or(len);
        let to = (from..len).find(|&index| !reaches(&self.get(index))).unwrap_or(len);
        from..to
    }

    fn change(&self, replaced: Range<usize>, with: [Range<u64>; 2]) -> Option<Change> {
        let gone: u64 = replaced.clone().map(|index| count(&self.get(index))).sum();
        let new: u64 = with.iter().map(count).sum();
        let change = Change { replaced, with, held: self.held() - gone + new };
        (self.len_after(&change) <= BALLOON_RANGES).then_some(change)
    }

    fn len_after(&self, change: &Change) -> usize {
        self.len() - change.replaced.len() + change.added().count()
    }

    /// Makes the list what a change of it says.
    pub fn apply(&self, change: &Change) {
        let (len, after) = (self.len(), self.len_after(change));
        let tail = change.replaced.end..len;
        // Backwards where it moves up, so that nothing is written over before it has moved.
        let move_one = |index: usize| self.set(index + after - len, self.get(index));
        if after > len {
            tail.rev().for_each(move_one)
        } else {
            tail.for_each(move_one)
        }
        for (index, pages) in (change.replaced.start..).zip(change.added()) {
            self.set(index, pages.clone());
        }
        self.0.len.store(after as u32, Relaxed);
    }
}

impl Change {
    fn added(&self) -> impl Iterator<Item = &Range<u64>> {
        self.with.iter().filter(|pages| count(pages) > 0)
    }
}

fn count(pages: &Range<u64>) -> u64 {
    pages.end.saturating_sub(pages.start)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::abi::BalloonRange;
    use core::sync::atomic::{AtomicU32, AtomicU64};
    use std::collections::BTreeSet;

    fn page() -> BalloonPage {
        let number = || AtomicU64::new(0);
        let ranges = core::array::from_fn(|_| BalloonRange { first: number(), end: number() });
        let (state, len) = (AtomicU32::new(0), AtomicU32::new(0));
        BalloonPage { first: number(), count: number(), held: number(), state, len, ranges }
    }

    /// Many changes, against a set of pages.
    #[test]
    fn the_list_is_the_set_it_should_be() {
        let page = page();
        let balloon = Balloon(&page);
        let mut set = BTreeSet::new();
        let mut seed = 1_u64;
        let mut random = |bound: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % bound
        };
        for _ in 0..5000 {
            let start = random(100);
            let pages = start..start + 1 + random(12);
            let change = if random(2) == 0 {
                set.extend(pages.clone());
                balloon.with(pages)
            } else {
                set.retain(|page| !pages.contains(page));
                balloon.without(pages)
            };
            let change = change.expect("room for so few");
            balloon.apply(&change);
            assert_eq!((balloon.held(), change.held), (set.len() as u64, set.len() as u64));
            let listed: std::vec::Vec<u64> = (0..balloon.len()).flat_map(|index| balloon.get(index)).collect();
            assert!(listed.iter().eq(set.iter()));
            assert!((1..balloon.len()).all(|index| balloon.get(index - 1).end < balloon.get(index).start));
            assert_eq!(balloon.first_of(&(40..60)), set.range(40..60).next().copied());
        }
    }

    #[test]
    fn a_full_list_takes_only_what_makes_it_no_longer() {
        let page = page();
        let balloon = Balloon(&page);
        for index in 0..BALLOON_RANGES as u64 {
            balloon.apply(&balloon.with(index * 10..index * 10 + 5).unwrap());
        }
        assert!(balloon.with(8..9).is_none() && balloon.without(2..3).is_none());
        assert!(balloon.without(3..5).is_some() && balloon.with(5..10).is_some());
        page.len.store(u32::MAX, Relaxed);
        assert_eq!(balloon.held(), 5 * BALLOON_RANGES as u64, "an absurd length is no more than there can be");
    }
}
