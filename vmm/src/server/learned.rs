//! What siblings needed: the pages that children of a VM wrote in their first moments. The next child has copies of them
//! before its first instruction, made in one batch, which costs a tenth of a copy at each first write.
//!
//! It takes two siblings: what one of them writes may be its own affair, and a copy that is not written is memory that is
//! not shared.

use super::vm::Generation;
use guest_mem::family::Family;
use guest_mem::{GfnRange, VmId};
use rangemap::{RangeMap, RangeSet};
use std::collections::BTreeMap;
use std::ops::Range;

/// Pages remembered per parent (8 MiB): a child waits for all of its copies.
const MOST: u64 = 2048;
/// A page that so many children in a row had a copy of and did not write is forgotten. A copy costs a tenth of what it
/// saves, and most children write what their siblings wrote, or nothing.
const MISSES: u8 = 3;

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    /// This child wrote it.
    Once(Generation),
    /// Several did; so many in a row had a copy since, and did not write it.
    Likely(u8),
}

/// What is known of the children of each VM.
#[derive(Debug, Default)]
pub struct Learned(BTreeMap<Generation, RangeMap<u64, Page>>);

impl Learned {
    /// Pages that the next child of `parent` is likely to write.
    pub fn of(&self, parent: Generation) -> impl Iterator<Item = GfnRange> {
        let known = self.0.get(&parent).into_iter().flat_map(|known| known.iter());
        known.filter(|(_, page)| matches!(page, Page::Likely(_))).map(|(pages, _)| pages.clone().into())
    }

    /// The same, but for those that are not in stores: `member` is the parent in the books of its family.
    pub fn at_hand(&self, parent: Generation, books: &Family, member: VmId) -> Vec<GfnRange> {
        self.of(parent).flat_map(|pages| books.at_hand(member, pages)).collect()
    }

    /// A child of `parent` has written these pages so far.
    pub fn wrote(&mut self, parent: Generation, child: Generation, pages: &[GfnRange]) {
        let known = self.0.entry(parent).or_default();
        let mut room = MOST.saturating_sub(known.iter().map(|(pages, _)| count(pages)).sum());
        for pages in pages {
            let before = known.overlapping(pages.raw()).filter(|(_, page)| **page != Page::Once(child));
            let before: Vec<_> = before.map(|(part, _)| cut(part, &pages.raw())).collect();
            before.into_iter().for_each(|part| known.insert(part, Page::Likely(0)));
            let new: Vec<_> = known.gaps(&pages.raw()).collect();
            for part in new {
                let part = part.start..part.end.min(part.start + room);
                room -= count(&part);
                if !part.is_empty() {
                    known.insert(part, Page::Once(child));
                }
            }
        }
    }

    /// The first moments of a child of `parent` are over: it had copies of `ahead`, and wrote `pages`.
    pub fn settled_in(&mut self, parent: Generation, child: Generation, ahead: &[GfnRange], pages: &[GfnRange]) {
        self.wrote(parent, child, pages);
        let Some(known) = self.0.get_mut(&parent) else { return };
        let wrote: RangeSet<u64> = pages.iter().map(|pages| pages.raw()).collect();
        for missed in ahead.iter().flat_map(|ahead| wrote.gaps(&ahead.raw()).collect::<Vec<_>>()) {
            let parts: Vec<_> =
                known.overlapping(missed.clone()).map(|(part, &page)| (cut(part, &missed), page)).collect();
            for (part, page) in parts {
                match page {
                    Page::Once(_) => {}
                    Page::Likely(misses) if misses + 1 < MISSES => known.insert(part, Page::Likely(misses + 1)),
                    Page::Likely(_) => known.remove(part),
                }
            }
        }
    }

    /// Forgets the children of VMs that are gone.
    pub fn retain(&mut self, lives: impl Fn(Generation) -> bool) {
        self.0.retain(|&parent, _| lives(parent));
    }
}

fn count(pages: &Range<u64>) -> u64 {
    pages.end - pages.start
}

fn cut(part: &Range<u64>, to: &Range<u64>) -> Range<u64> {
    part.start.max(to.start)..part.end.min(to.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: Generation = Generation(7);

    fn ranges(raw: &[(u64, u64)]) -> Vec<GfnRange> {
        raw.iter().map(|&(start, end)| (start..end).into()).collect()
    }

    fn known(learned: &Learned) -> Vec<GfnRange> {
        let pages: RangeSet<u64> = learned.of(PARENT).map(GfnRange::raw).collect();
        pages.into_iter().map(GfnRange::from).collect()
    }

    #[test]
    fn it_takes_two_siblings_and_one_that_says_it_twice_is_one() {
        let mut learned = Learned::default();
        learned.wrote(PARENT, Generation(1), &ranges(&[(10, 20)]));
        learned.wrote(PARENT, Generation(1), &ranges(&[(10, 25)]));
        assert_eq!(known(&learned), []);
        learned.settled_in(PARENT, Generation(2), &[], &ranges(&[(15, 30)]));
        assert_eq!(known(&learned), ranges(&[(15, 25)]));
    }

    #[test]
    fn what_siblings_do_not_write_any_more_is_forgotten() {
        let mut learned = Learned::default();
        for child in [1, 2] {
            learned.wrote(PARENT, Generation(child), &ranges(&[(10, 20), (40, 41)]));
        }
        for child in [3, 4] {
            let ahead = ranges(&[(10, 20), (40, 41)]);
            learned.settled_in(PARENT, Generation(child), &ahead, &ranges(&[(12, 14)]));
        }
        assert_eq!(known(&learned), ranges(&[(10, 20), (40, 41)]));
        // Who comes without copies says nothing of them.
        learned.settled_in(PARENT, Generation(5), &[], &ranges(&[(12, 14)]));
        learned.settled_in(PARENT, Generation(6), &ranges(&[(10, 20)]), &ranges(&[(13, 15)]));
        assert_eq!(known(&learned), ranges(&[(12, 15), (40, 41)]));
        learned.retain(|parent| parent != PARENT);
        assert_eq!(known(&learned), []);
    }

    #[test]
    fn no_more_is_learned_than_a_child_may_wait_for() {
        let mut learned = Learned::default();
        for child in [1, 2] {
            learned.wrote(PARENT, Generation(child), &ranges(&[(100, 110), (0, 5000)]));
        }
        assert_eq!(known(&learned).iter().map(|pages| pages.count().0).sum::<u64>(), MOST);
        assert!(known(&learned).iter().any(|pages| pages.contains(guest_mem::Gfn(105))));
        for child in [1, 2] {
            learned.wrote(PARENT, Generation(child), &ranges(&[(9000, 9001)]));
        }
        assert!(known(&learned).iter().all(|pages| !pages.contains(guest_mem::Gfn(9000))));
    }
}
