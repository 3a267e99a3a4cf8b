//! Which pages may have been written since the last freeze.

use crate::addr::page_set::{PageSet, joined, runs};
use crate::addr::{Gfn, GfnRange};
use crate::steps::step;
use crate::sys::Written;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// What the caller of a freeze knows of the guest's writes.
#[derive(Clone, Copy, Debug)]
pub enum Dirty<'a> {
    /// Nothing: no log was kept since the last freeze, so every private page counts as dirty.
    Every,
    /// What KVM's dirty log says for each memory slot.
    Logged(&'a [SlotLog]),
}

/// The dirty log of one memory slot: bit `n` of word `w` stands for frame `first + 64·w + n`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotLog {
    /// First frame of the slot.
    pub first: Gfn,
    /// The bits.
    pub words: Vec<u64>,
}

impl SlotLog {
    /// The pages that it names, sorted, not adjacent.
    pub fn pages(&self) -> impl Iterator<Item = GfnRange> {
        let word = |(index, &bits): (usize, &u64)| runs(Gfn(self.first.0 + index as u64 * WORD), bits);
        joined(self.words.iter().enumerate().flat_map(word))
    }
}

const WORD: u64 = u64::BITS as u64;

/// One bit per page of RAM.
#[derive(Clone, Debug)]
pub(super) struct DirtyMap {
    slots: Vec<DirtySlot>,
}

/// One RAM range.
#[derive(Clone, Debug)]
struct DirtySlot {
    range: GfnRange,
    words: Vec<u64>,
    /// Bit `n` of word `w`: word `64·w + n` is not empty. Of a large guest most are, and it stands still meanwhile.
    index: Vec<u64>,
    /// Every page is dirty, whatever the words say: to write that into each would take as long as the guest is large.
    every: bool,
}

impl DirtySlot {
    fn clean(range: GfnRange) -> Self {
        let empty = |bits: u64| vec![0; bits.div_ceil(WORD) as usize];
        let words: Vec<u64> = empty(range.count().0);
        Self { range, index: empty(words.len() as u64), words, every: false }
    }

    fn mark(&mut self, word: usize, bits: u64) {
        if let Some(at) = self.words.get_mut(word).filter(|_| bits != 0) {
            *at |= bits;
            self.index[word / WORD as usize] |= 1 << (word % WORD as usize);
        }
    }

    /// Has the words say that every page is dirty, if it is.
    fn spell_out(&mut self) {
        if std::mem::take(&mut self.every) {
            (0..self.words.len()).for_each(|word| self.mark(word, u64::MAX));
        }
    }

    fn clear(&mut self) {
        self.every = false;
        for (at, index) in self.index.iter_mut().enumerate() {
            ones(std::mem::take(index)).for_each(|bit| self.words[at * WORD as usize + bit] = 0);
        }
    }

    /// A word, with what every page being dirty says of it.
    fn word(&self, word: usize) -> u64 {
        step();
        if self.every { u64::MAX } else { self.words[word] }
    }

    /// The words that are not empty, with their numbers.
    fn marked(&self) -> impl Iterator<Item = (usize, u64)> {
        let words = |(at, &index): (usize, &u64)| ones(index).map(move |bit| at * WORD as usize + bit);
        self.index.iter().enumerate().flat_map(words).map(|word| (word, self.word(word)))
    }
}

/// Numbers of the bits that are set, from the lowest.
fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(bit)
    })
}

impl DirtyMap {
    /// No page of `ram` is dirty.
    pub fn clean(ram: &[GfnRange]) -> Self {
        Self { slots: ram.iter().map(|range| DirtySlot::clean(*range)).collect() }
    }

    /// Marks pages, which lie in one RAM range.
    pub fn mark(&mut self, pages: GfnRange) {
        let slot = self.slots.iter_mut().find(|slot| slot.range.contains(pages.start()));
        let Some(slot) = slot else { return };
        for gfn in pages.iter() {
            let bit = gfn.0 - slot.range.start().0;
            slot.mark((bit / WORD) as usize, 1 << (bit % WORD));
        }
    }

    /// Pages, which lie in one RAM range, are not dirty.
    pub fn unmark(&mut self, pages: GfnRange) {
        let slot = self.slots.iter_mut().find(|slot| slot.range.contains(pages.start()));
        let Some(slot) = slot else { return };
        slot.spell_out();
        let DirtySlot { range, words, index, .. } = slot;
        let mut at = pages.start().0 - range.start().0;
        // To the end of the last word: what lies behind the range may be marked, and is no page.
        let end = if pages.end() < range.end() { pages.end().0 - range.start().0 } else { words.len() as u64 * WORD };
        while at < end {
            let (word, bit) = ((at / WORD) as usize, at % WORD);
            let count = (WORD - bit).min(end - at);
            words[word] &= !((u64::MAX >> (WORD - count)) << bit);
            if words[word] == 0 {
                index[word / WORD as usize] &= !(1 << (word % WORD as usize));
            }
            at += count;
        }
    }

    /// Every page of RAM is dirty.
    pub fn mark_every(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.every = true);
    }

    /// Marks what KVM's log of a slot says. A log that fits no RAM range marks nothing: there are no such slots.
    pub fn mark_log(&mut self, log: &SlotLog) {
        let slot = self.slots.iter_mut().find(|slot| slot.range.start() == log.first);
        debug_assert!(slot.is_some(), "a dirty log of {:?}, which is no RAM", log.first);
        if let Some(slot) = slot {
            let words = log.words.iter().enumerate().filter(|(_, bits)| **bits != 0);
            words.for_each(|(word, bits)| slot.mark(word, *bits));
        }
    }

    /// Marks what the VMM wrote, and clears its record.
    pub fn take_writes(&mut self, memory: &GuestMemoryMmap<Written>) {
        for slot in &mut self.slots {
            let region = memory.find_region(GuestAddress(slot.range.start().gpa()));
            debug_assert!(region.is_some_and(|region| region.len() == slot.range.len_bytes() as u64));
            let Some(region) = region else { continue };
            std::ops::Deref::deref(region).bitmap().take(|word, bits| slot.mark(word, bits));
        }
    }

    /// No page is dirty.
    pub fn clear(&mut self) {
        self.slots.iter_mut().for_each(DirtySlot::clear);
    }

    /// Where to look for private pages: sorted ranges that hold all dirty pages, and clean ones between.
    pub fn candidates(&self) -> Vec<Candidate> {
        let mut candidates: Vec<Candidate> = Vec::new();
        for slot in &self.slots {
            if slot.every {
                candidates.push(Candidate { pages: slot.range, density: Density::All });
                continue;
            }
            let from = candidates.len();
            for (index, word) in slot.marked() {
                let start = Gfn(slot.range.start().0 + index as u64 * WORD);
                let pages = GfnRange::between(start, Gfn(start.0 + WORD).min(slot.range.end()));
                let density = if word == u64::MAX { Density::All } else { Density::Some };
                let reach = match density {
                    Density::All => 0,
                    // Up to one clean word between: as cheap to look at as to ask again.
                    Density::Some => WORD,
                };
                match candidates[from..].last_mut() {
                    Some(last) if last.density == density && start.0 - last.pages.end().0 <= reach => {
                        last.pages = GfnRange::between(last.pages.start(), pages.end());
                    }
                    _ => candidates.push(Candidate { pages, density }),
                }
            }
        }
        candidates
    }

    /// Whether one of `pages`, a candidate's, is dirty and not in `set`.
    pub fn has_besides(&self, pages: GfnRange, set: &PageSet) -> bool {
        let slot = self.slots.iter().find(|slot| slot.range.contains(pages.start()));
        let Some(slot) = slot else { return false };
        let range = slot.range;
        let [from, to] = [pages.start(), pages.end()].map(|gfn| (gfn.0 - range.start().0).div_ceil(WORD) as usize);
        (from..to).any(|word| slot.word(word) & !set.word(Gfn(range.start().0 + word as u64 * WORD)) != 0)
    }

    /// Cuts `pages`, which lie in one RAM range, into stretches that are dirty throughout or clean throughout.
    pub fn split(&self, pages: GfnRange, mut each: impl FnMut(GfnRange, Cleanness)) {
        let slot = self.slots.iter().find(|slot| slot.range.contains(pages.start()));
        let Some(slot) = slot else { return };
        let range = slot.range;
        if slot.every {
            return each(pages.intersect(range), Cleanness::Dirty);
        }
        let dirty = |frame: u64| {
            let bit = frame - range.start().0;
            slot.word((bit / WORD) as usize) >> (bit % WORD)
        };
        let end = pages.end().min(range.end()).0;
        let mut at = pages.start().0;
        while at < end {
            let from = at;
            let state = dirty(at) & 1;
            while at < end && dirty(at) & 1 == state {
                let left_in_word = WORD - (at - range.start().0) % WORD;
                let same = if state == 1 { dirty(at).trailing_ones() } else { dirty(at).trailing_zeros() };
                at += left_in_word.min(same.into());
            }
            let cleanness = if state == 1 { Cleanness::Dirty } else { Cleanness::Clean };
            each((from..at.min(end)).into(), cleanness);
        }
    }
}

/// Pages among which some are dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// The pages.
    pub pages: GfnRange,
    /// How many of them are.
    pub density: Density,
}

/// How many pages of a candidate are dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Density {
    /// Every one.
    All,
    /// Not all of them.
    Some,
}

/// Whether pages differ from what lies beneath them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cleanness {
    /// They were written.
    Dirty,
    /// They were not.
    Clean,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageCount;
    use crate::steps::steps;

    fn map_of(frames: &[u64]) -> DirtyMap {
        let ram = [GfnRange::new(Gfn(0), PageCount(200)), GfnRange::new(Gfn(1000), PageCount(100))];
        let mut map = DirtyMap::clean(&ram);
        for frame in frames {
            let first = if *frame < 1000 { Gfn(0) } else { Gfn(1000) };
            let mut words = vec![0; 4];
            words[((frame - first.0) / 64) as usize] = 1 << ((frame - first.0) % 64);
            map.mark_log(&SlotLog { first, words });
        }
        map
    }

    #[test]
    fn candidates_cover_the_dirty_words_and_stay_within_ram() {
        let some = |pages: std::ops::Range<u64>| Candidate { pages: pages.into(), density: Density::Some };
        assert_eq!(map_of(&[3, 199, 1099]).candidates(), [some(0..64), some(192..200), some(1064..1100)]);
        assert_eq!(map_of(&[3, 130]).candidates(), [some(0..192)]);
        let mut map = map_of(&[3, 130]);
        map.mark_log(&SlotLog { first: Gfn(0), words: vec![0, u64::MAX, 0, 0] });
        let all = Candidate { pages: (64..128).into(), density: Density::All };
        assert_eq!(map.candidates(), [some(0..64), all, some(128..192)]);
    }

    #[test]
    fn every_page_is_a_candidate_where_all_are_dirty_and_none_after_that() {
        let all = |pages: std::ops::Range<u64>| Candidate { pages: pages.into(), density: Density::All };
        let mut map = map_of(&[3, 130]);
        map.mark_every();
        assert_eq!(map.candidates(), [all(0..200), all(1000..1100)]);
        map.clear();
        assert_eq!(map.candidates(), []);
    }

    /// The first freeze of a guest of 20 GiB that had written 4 MiB went over all of its memory, page by page.
    #[test]
    fn that_every_page_is_dirty_is_said_at_once() {
        let cost = |pages| {
            let all = GfnRange::new(Gfn(0), PageCount(pages));
            let mut map = DirtyMap::clean(&[all]);
            let mut dirty = Vec::new();
            let ((), steps) = steps(|| {
                map.mark_every();
                assert_eq!(map.candidates(), [Candidate { pages: all, density: Density::All }]);
                map.split((100..1124).into(), |pages, cleanness| dirty.push((pages, cleanness)));
                map.clear();
            });
            assert_eq!(dirty, [((100..1124).into(), Cleanness::Dirty)]);
            assert_eq!(map.candidates(), []);
            steps
        };
        assert!(cost(5 << 20) <= cost(1 << 16) + 16);
    }

    #[test]
    fn what_is_unmarked_is_no_candidate() {
        let some = |pages: std::ops::Range<u64>| Candidate { pages: pages.into(), density: Density::Some };
        let mut map = map_of(&[3, 70, 130, 199, 1001]);
        map.unmark((60..190).into());
        map.unmark((1001..1100).into());
        assert_eq!(map.candidates(), [some(0..64), some(192..200)]);
        map.mark_every();
        map.unmark((70..72).into());
        map.unmark((192..200).into());
        let all = |pages: std::ops::Range<u64>| Candidate { pages: pages.into(), density: Density::All };
        assert_eq!(map.candidates(), [all(0..64), some(64..128), all(128..192), all(1000..1100)]);
        let mut dirty = Vec::new();
        map.split((64..128).into(), |pages, cleanness| dirty.push((pages, cleanness)));
        assert_eq!(dirty[1], ((70..72).into(), Cleanness::Clean));
    }

    #[test]
    fn dirty_pages_besides_a_set_are_found_wherever_ram_begins() {
        let frames = [3, 130, 199, 1001, 1099];
        let map = map_of(&frames);
        let mut set = PageSet::default();
        let found = |set: &PageSet| {
            let candidates = map.candidates().into_iter().map(|candidate| candidate.pages);
            candidates.filter(|pages| map.has_besides(*pages, set)).count()
        };
        assert_eq!(found(&set), 2);
        frames.into_iter().for_each(|frame| set.add((frame..frame + 1).into()));
        assert_eq!(found(&set), 0);
        for frame in frames {
            set.remove((frame..frame + 1).into());
            assert_eq!(found(&set), 1, "{frame}");
            set.add((frame..frame + 1).into());
        }
    }

    #[test]
    fn a_log_tells_its_pages() {
        let pages = |words: &[u64]| SlotLog { first: Gfn(1000), words: words.to_vec() }.pages().collect::<Vec<_>>();
        assert_eq!(pages(&[0, 0]), []);
        assert_eq!(pages(&[0b1011 | 1 << 63, u64::MAX, 1]), [1000..1002, 1003..1004, 1063..1129].map(GfnRange::from));
    }

    #[test]
    fn split_is_exact_at_every_boundary() {
        for (from, to) in [(0, 200), (3, 4), (60, 70), (63, 65), (128, 200)] {
            let frames: Vec<u64> = (0..200).filter(|frame| frame % 7 == 3 || (62..67).contains(frame)).collect();
            let map = map_of(&frames);
            let mut seen = Vec::new();
            map.split((from..to).into(), |range, cleanness| {
                seen.extend(range.iter().map(|gfn| (gfn.0, cleanness == Cleanness::Dirty)));
            });
            let expect: Vec<_> = (from..to).map(|frame| (frame, frames.contains(&frame))).collect();
            assert_eq!(seen, expect);
        }
    }
}
