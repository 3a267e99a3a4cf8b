//! Working sets: the pages that children of a VM need in their first moments, learned from their siblings, and brought
//! before the next child needs them.
//!
//! * A page that a child waited for (**read**) is written back first by the next freeze, before children begin: a fault costs
//!   the child more than that.
//! * A page that two children wrote (**write**) is copied ahead into the next child's window, in one batch, which costs a
//!   tenth of a copy at each first write. It takes two: what one child writes may be its own affair, and a copy that is not
//!   written is memory that is not shared.
//!
//! There is one notion for both: a set belongs to a parent, a child inherits its parent's (it goes on from the same place,
//! so its own children most likely do what it did), and a page that was of no use so many times in a row is forgotten.

use crate::server::ids::Generation;
use guest_mem::family::Family;
use guest_mem::{Gfn, GfnRange, VmId};
use rangemap::{RangeMap, RangeSet};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// Pages remembered per parent (8 MiB): a child waits for all of its copies.
const MOST: u64 = 2048;
/// Pages among them that are only read: the fork waits until each is written back.
const READS_MOST: u64 = 64;
/// A page that was of no use to so many children in a row is forgotten. To bring one costs a tenth of what it saves, and most
/// children do what their siblings did, or nothing.
const MISSES: u8 = 3;

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    /// This child wrote it.
    Once(Generation),
    /// Children need it; so many in a row did not.
    Member(Access, u8),
}

/// For what children need a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

/// One parent's.
#[derive(Clone, Debug, Default)]
struct WorkingSet(RangeMap<u64, Page>);

/// What is known of the children of each VM.
#[derive(Debug, Default)]
pub struct WorkingSets(BTreeMap<Generation, Rc<WorkingSet>>);

impl WorkingSets {
    /// Pages that the next child of `parent` is likely to read before all else.
    pub fn reads(&self, parent: Generation) -> Vec<Gfn> {
        self.members(parent, Access::Read).flat_map(GfnRange::iter).collect()
    }

    /// Pages that the next child of `parent` is likely to write, but for those that are not in stores: `member` is the parent
    /// in the books of its family.
    pub fn writes(&self, parent: Generation, books: &Family, member: VmId) -> Vec<GfnRange> {
        self.members(parent, Access::Write).flat_map(|pages| books.at_hand(member, pages)).collect()
    }

    fn members(&self, parent: Generation, access: Access) -> impl Iterator<Item = GfnRange> {
        let known = self.0.get(&parent).into_iter().flat_map(|set| set.0.iter());
        known
            .filter(move |(_, page)| matches!(page, Page::Member(of, _) if *of == access))
            .map(|(pages, _)| pages.clone().into())
    }

    /// A child of `parent` goes on from where `parent` stands.
    pub fn inherit(&mut self, parent: Generation, child: Generation) {
        if let Some(set) = self.0.get(&parent) {
            self.0.insert(child, Rc::clone(set));
        }
    }

    /// A child of `parent` waited for a page before its first sign of life.
    pub fn waited(&mut self, parent: Generation, gfn: Gfn) {
        let has_room = self.members(parent, Access::Read).map(|pages| pages.count().0).sum::<u64>() < READS_MOST;
        let set = self.set(parent);
        match set.0.get(&gfn.0) {
            Some(Page::Member(Access::Write, _)) => {}
            Some(Page::Member(Access::Read, _)) => set.put(gfn.0..gfn.0 + 1, Page::Member(Access::Read, 0)),
            Some(Page::Once(_)) | None if has_room => set.put(gfn.0..gfn.0 + 1, Page::Member(Access::Read, 0)),
            Some(Page::Once(_)) | None => {}
        }
    }

    /// A fork of `parent` found a page that children read where they find it without waiting.
    pub fn was_there(&mut self, parent: Generation, gfn: Gfn) {
        self.set(parent).miss(gfn.0..gfn.0 + 1, Access::Read);
    }

    /// A child of `parent` has written these pages so far.
    pub fn wrote(&mut self, parent: Generation, child: Generation, pages: &[GfnRange]) {
        let set = self.set(parent);
        let mut room = MOST.saturating_sub(set.0.iter().map(|(pages, _)| count(pages)).sum());
        for pages in pages {
            // Of a page that is read already, too: two children have needed it, and one of them wrote it.
            let before = set.parts(&pages.raw(), |page| page != Page::Once(child));
            before.into_iter().for_each(|(part, _)| set.put(part, Page::Member(Access::Write, 0)));
            let new: Vec<_> = set.0.gaps(&pages.raw()).collect();
            for part in new {
                let part = part.start..part.end.min(part.start + room);
                room -= count(&part);
                if !part.is_empty() {
                    set.put(part, Page::Once(child));
                }
            }
        }
    }

    /// The first moments of a child of `parent` are over: it had copies of `ahead`, and wrote `pages`.
    pub fn began(&mut self, parent: Generation, child: Generation, ahead: &[GfnRange], pages: &[GfnRange]) {
        self.wrote(parent, child, pages);
        let wrote: RangeSet<u64> = pages.iter().map(|pages| pages.raw()).collect();
        let set = self.set(parent);
        for missed in ahead.iter().flat_map(|ahead| wrote.gaps(&ahead.raw()).collect::<Vec<_>>()) {
            set.miss(missed, Access::Write);
        }
    }

    /// A VM is gone, and has no more children.
    pub fn forget(&mut self, parent: Generation) {
        self.0.remove(&parent);
    }

    fn set(&mut self, parent: Generation) -> &mut WorkingSet {
        Rc::make_mut(self.0.entry(parent).or_default())
    }
}

impl WorkingSet {
    fn put(&mut self, pages: Range<u64>, page: Page) {
        self.0.insert(pages, page);
    }

    /// The parts of `pages` of which something is known that `wanted` is true of.
    fn parts(&self, pages: &Range<u64>, wanted: impl Fn(Page) -> bool) -> Vec<(Range<u64>, Page)> {
        let parts = self.0.overlapping(pages).filter(|(_, page)| wanted(**page));
        parts.map(|(part, &page)| (part.start.max(pages.start)..part.end.min(pages.end), page)).collect()
    }

    /// These pages were brought for nothing.
    fn miss(&mut self, pages: Range<u64>, access: Access) {
        for (part, page) in self.parts(&pages, |page| matches!(page, Page::Member(of, _) if of == access)) {
            match page {
                Page::Member(_, misses) if misses + 1 < MISSES => self.put(part, Page::Member(access, misses + 1)),
                Page::Member(..) | Page::Once(_) => self.0.remove(part),
            }
        }
    }
}

fn count(pages: &Range<u64>) -> u64 {
    pages.end - pages.start
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: Generation = Generation(7);

    fn ranges(raw: &[(u64, u64)]) -> Vec<GfnRange> {
        raw.iter().map(|&(start, end)| (start..end).into()).collect()
    }

    fn writes(sets: &WorkingSets, parent: Generation) -> Vec<GfnRange> {
        let pages: RangeSet<u64> = sets.members(parent, Access::Write).map(GfnRange::raw).collect();
        pages.into_iter().map(GfnRange::from).collect()
    }

    #[test]
    fn it_takes_two_siblings_and_one_that_says_it_twice_is_one() {
        let mut sets = WorkingSets::default();
        sets.wrote(PARENT, Generation(1), &ranges(&[(10, 20)]));
        sets.wrote(PARENT, Generation(1), &ranges(&[(10, 25)]));
        assert_eq!(writes(&sets, PARENT), []);
        sets.began(PARENT, Generation(2), &[], &ranges(&[(15, 30)]));
        assert_eq!(writes(&sets, PARENT), ranges(&[(15, 25)]));
    }

    #[test]
    fn what_siblings_do_not_write_any_more_is_forgotten() {
        let mut sets = WorkingSets::default();
        for child in [1, 2] {
            sets.wrote(PARENT, Generation(child), &ranges(&[(10, 20), (40, 41)]));
        }
        for child in [3, 4] {
            let ahead = ranges(&[(10, 20), (40, 41)]);
            sets.began(PARENT, Generation(child), &ahead, &ranges(&[(12, 14)]));
        }
        assert_eq!(writes(&sets, PARENT), ranges(&[(10, 20), (40, 41)]));
        // Who comes without copies says nothing of them.
        sets.began(PARENT, Generation(5), &[], &ranges(&[(12, 14)]));
        sets.began(PARENT, Generation(6), &ranges(&[(10, 20)]), &ranges(&[(13, 15)]));
        assert_eq!(writes(&sets, PARENT), ranges(&[(12, 15), (40, 41)]));
        sets.forget(PARENT);
        assert_eq!(writes(&sets, PARENT), []);
    }

    /// The first 64 frames that children of a family ever waited for were brought at each fork for ever.
    #[test]
    fn what_children_wait_for_is_brought_until_it_is_always_there() {
        let mut sets = WorkingSets::default();
        (0..100).for_each(|gfn| sets.waited(PARENT, Gfn(gfn)));
        assert_eq!(sets.reads(PARENT), (0..READS_MOST).map(Gfn).collect::<Vec<_>>());
        for _ in 0..MISSES {
            (0..READS_MOST).filter(|gfn| *gfn != 5).for_each(|gfn| sets.was_there(PARENT, Gfn(gfn)));
        }
        assert_eq!(sets.reads(PARENT), [Gfn(5)]);
        sets.waited(PARENT, Gfn(200));
        assert_eq!(sets.reads(PARENT), [Gfn(5), Gfn(200)], "there is room again");
        sets.was_there(PARENT, Gfn(5));
        sets.waited(PARENT, Gfn(5));
        (1..MISSES).for_each(|_| sets.was_there(PARENT, Gfn(5)));
        assert_eq!(sets.reads(PARENT), [Gfn(5), Gfn(200)], "misses in a row count");
        sets.wrote(PARENT, Generation(1), &ranges(&[(5, 6)]));
        assert_eq!((sets.reads(PARENT), writes(&sets, PARENT)), (vec![Gfn(200)], ranges(&[(5, 6)])));
        sets.waited(PARENT, Gfn(5));
        assert_eq!(sets.reads(PARENT), [Gfn(200)], "who has a copy does not wait for the page");
    }

    /// In a line in which each VM is forked once, nobody has siblings to learn from.
    #[test]
    fn a_child_inherits_and_goes_its_own_way() {
        let mut sets = WorkingSets::default();
        let [child, grandchild] = [8, 9].map(Generation);
        sets.waited(PARENT, Gfn(3));
        sets.inherit(PARENT, child);
        sets.wrote(PARENT, child, &ranges(&[(10, 20)]));
        sets.inherit(PARENT, grandchild);
        sets.wrote(child, grandchild, &ranges(&[(10, 20)]));
        assert_eq!(writes(&sets, child), []);
        sets.wrote(grandchild, Generation(10), &ranges(&[(10, 12)]));
        assert_eq!(writes(&sets, grandchild), ranges(&[(10, 12)]));
        assert_eq!((sets.reads(child), sets.reads(grandchild)), (vec![Gfn(3)], vec![Gfn(3)]));
        sets.was_there(child, Gfn(3));
        (0..MISSES).for_each(|_| sets.was_there(PARENT, Gfn(3)));
        assert_eq!((sets.reads(PARENT), sets.reads(child)), (vec![], vec![Gfn(3)]));
    }

    #[test]
    fn no_more_is_learned_than_a_child_may_wait_for() {
        let mut sets = WorkingSets::default();
        for child in [1, 2] {
            sets.wrote(PARENT, Generation(child), &ranges(&[(100, 110), (0, 5000)]));
        }
        assert_eq!(writes(&sets, PARENT).iter().map(|pages| pages.count().0).sum::<u64>(), MOST);
        assert!(writes(&sets, PARENT).iter().any(|pages| pages.contains(Gfn(105))));
        for child in [1, 2] {
            sets.wrote(PARENT, Generation(child), &ranges(&[(9000, 9001)]));
        }
        assert!(writes(&sets, PARENT).iter().all(|pages| !pages.contains(Gfn(9000))));
    }
}
