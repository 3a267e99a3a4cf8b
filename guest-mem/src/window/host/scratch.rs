//! Where moved pages stay until they have been written back.

use crate::addr::{Gfn, GfnRange, PageCount};
use crate::ids::StoreId;
use crate::sys::{Advice, Area, Place};
use crate::window::ScratchRange;
use std::collections::BTreeMap;
use std::io;

/// The scratch ranges of one window: areas like the window itself, so that a page keeps its frame number and whole
/// page tables can move.
#[derive(Debug)]
pub(super) struct ScratchPool {
    /// Where a fixed window's scratch areas stand.
    row: Option<ScratchRow>,
    frames: PageCount,
    areas: BTreeMap<StoreId, ScratchArea>,
    /// Memory for the copies of the next freeze: those of one before it have been written back.
    spare: Option<Draft>,
}

/// Where the scratch areas of a window at a fixed address may stand: in a row behind it, `stride` apart.
#[derive(Clone, Debug)]
pub struct ScratchRow {
    first: u64,
    stride: u64,
    frames: PageCount,
}

impl ScratchRow {
    /// Of a window of so many frames whose frame 0 stands at the address `base`.
    pub fn behind(base: u64, frames: PageCount) -> Self {
        // An area has room for every frame twice, once moved and once copied, and as much again lies between two areas.
        let stride = 4 * Area::span(frames);
        Self { first: base + stride, stride, frames }
    }

    /// The addresses where one may stand.
    fn places(&self) -> impl Iterator<Item = u64> {
        let &Self { first, stride, .. } = self;
        (first..).step_by(stride as usize).take_while(move |base| base + stride <= FIXED_END)
    }

    /// Whether one may stand there, as `scratch_base`, with its copies from the frame `copies` on.
    pub fn has(&self, scratch_base: u64, copies: Gfn) -> bool {
        let Self { first, stride, frames } = self;
        let behind = scratch_base.checked_sub(*first);
        behind.is_some_and(|behind| behind % stride == 0)
            && scratch_base.checked_add(*stride).is_some_and(|end| end <= FIXED_END)
            && copies == copies_begin(*frames)
    }
}

/// The frame of a scratch area where copies begin.
fn copies_begin(frames: PageCount) -> Gfn {
    Gfn::of_gpa(Area::span(frames))
}

#[derive(Debug)]
struct ScratchArea {
    draft: Draft,
    private: Vec<GfnRange>,
    places: ScratchRange,
    copies: PageCount,
}

/// A scratch area whose first `room` pages for copies have memory.
#[derive(Debug)]
pub(super) struct Draft {
    pub area: Area,
    room: PageCount,
}

/// Pages of copies whose memory stays for the next freeze at most (18 MiB). To be supplied with new memory while the VM
/// stands still takes up to twenty times as long as to copy.
const SPARE_MOST: PageCount = PageCount(9 * HUGE);

/// Pages of a huge page.
const HUGE: u64 = 512;

/// Fixed areas end below this, far from where the kernel places mappings of its own choice.
const FIXED_END: u64 = 0x4000_0000_0000;

impl ScratchPool {
    /// Scratch ranges for the window `area` of `frames` frames, which stands at `place`.
    pub fn beside(area: &Area, place: Place, frames: PageCount) -> Self {
        let row = match place {
            Place::Fixed(_) => Some(ScratchRow::behind(area.base(), frames)),
            Place::Anywhere => None,
        };
        Self { row, frames, areas: BTreeMap::new(), spare: None }
    }

    /// A new, empty scratch area.
    pub fn make(&self) -> io::Result<Area> {
        let room = PageCount(self.copies().0 + self.frames.0);
        let Some(row) = &self.row else { return Area::reserve(Place::Anywhere, room) };
        let taken = || self.areas.values().map(|scratch| &scratch.draft).chain(&self.spare);
        let free = row.places().find(|base| taken().all(|draft| draft.area.base() != *base));
        let base = free.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Area::reserve(Place::Fixed(base), room)
    }

    /// A scratch area with memory for so many copies.
    pub fn make_for(&mut self, copies: PageCount) -> io::Result<Draft> {
        let mut draft = match self.spare.take() {
            Some(spare) => spare,
            None => Draft { area: self.make()?, room: PageCount(0) },
        };
        let missing = copies.0.saturating_sub(draft.room.0);
        if missing > 0 {
            draft.supply(Gfn(self.copies().0 + draft.room.0), PageCount(missing))?;
        }
        Ok(draft)
    }

    /// Whether there is memory for so many copies.
    pub fn is_prepared(&self, copies: PageCount) -> bool {
        self.spare.as_ref().is_some_and(|spare| spare.room >= copies)
    }

    /// Gets memory for the copies of the next freeze.
    pub fn prepare(&mut self, copies: PageCount) {
        match self.make_for(copies) {
            Ok(draft) => self.spare = Some(draft),
            Err(error) => log::debug!("memory for {copies:?} ahead of a freeze: {error}"),
        }
    }

    /// The frame of every scratch area where copies begin.
    pub fn copies(&self) -> Gfn {
        copies_begin(self.frames)
    }

    /// `draft` is for the pages that the freeze into `store` takes: it has those that were moved, and room for copies.
    pub fn keep(&mut self, store: StoreId, draft: Draft, copied: &[GfnRange]) {
        let places = ScratchRange::new(draft.area.base(), self.copies(), copied);
        let copies = PageCount(copied.iter().map(|pages| pages.count().0).sum());
        let before = self.areas.insert(store, ScratchArea { draft, private: Vec::new(), places, copies });
        debug_assert!(before.is_none(), "a store takes one freeze");
    }

    /// Copies `pages` (sorted) of a window to their places.
    pub fn copy_in(&self, store: StoreId, window: &Area, pages: &[GfnRange]) -> io::Result<()> {
        let ScratchArea { draft, places, .. } = self.get(store)?;
        window.copy_to(&draft.area, &places.of_copies(pages).ok_or(io::ErrorKind::NotFound)?)
    }

    /// Where guest frame 0 would stand among the pages that were moved, whose area this is.
    pub fn area(&self, store: StoreId) -> io::Result<&Area> {
        self.get(store).map(|scratch| &scratch.draft.area)
    }

    /// The `private` pages of a freeze may be [read](Self::read).
    pub fn harvested(&mut self, store: StoreId, private: Vec<GfnRange>) {
        if let Some(scratch) = self.areas.get_mut(&store) {
            scratch.private = private;
        }
    }

    fn get(&self, store: StoreId) -> io::Result<&ScratchArea> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, format!("{store:?} has no scratch range"));
        self.areas.get(&store).ok_or_else(gone)
    }

    /// Reads pages that were moved together, or copied.
    pub fn read(&self, store: StoreId, first: Gfn, buf: &mut [u8]) -> io::Result<()> {
        let pages = GfnRange::new(first, PageCount::covering(buf.len() as u64));
        let scratch = self.get(store)?;
        // What was moved along between private pages still shows the old store, whose holes must not be touched.
        if !scratch.private.iter().any(|range| range.intersect(pages) == pages) {
            let what = format!("guest pages {pages:?} were not harvested into {store:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        scratch.draft.area.copy_out(scratch.places.frame(first), buf)
    }

    /// Gives the memory of pages back that were moved together, or copied, unless it is for the next freeze.
    pub fn leave(&mut self, store: StoreId, pages: GfnRange) {
        let stays = self.spare_most();
        let Some(ScratchArea { draft, places, .. }) = self.areas.get(&store) else { return };
        let there = GfnRange::new(places.frame(pages.start()), pages.count());
        if stays.intersect(there) == there {
            return;
        }
        if let Err(error) = draft.area.advise(there, Advice::DropPrivate) {
            log::warn!("memory of pages that were written back: {pages:?} stays: {error}");
        }
    }

    /// Unmaps the scratch area of the freeze into `store`. About as much memory as its copies took is for the next freeze.
    pub fn drop(&mut self, store: StoreId) {
        let stays = self.spare_most();
        let Some(ScratchArea { mut draft, copies, .. }) = self.areas.remove(&store) else {
            return log::warn!("{store:?} has no scratch range to drop");
        };
        // The next is likely to be of a few more.
        let room = draft.room.min(PageCount(copies.0 + copies.0 / 16)).min(stays.count());
        if self.spare.as_ref().is_some_and(|spare| spare.room >= room) || room == PageCount(0) {
            return;
        }
        match draft.keep_only(GfnRange::new(stays.start(), room)) {
            Ok(()) => self.spare = Some(draft),
            Err(error) => log::warn!("memory of earlier copies is not used again: {error}"),
        }
    }

    /// Gives back the memory that is for the next freeze.
    pub fn drop_spare(&mut self) {
        self.spare = None;
    }

    /// What a spare may have memory for.
    fn spare_most(&self) -> GfnRange {
        GfnRange::new(self.copies(), SPARE_MOST)
    }
}

impl Draft {
    /// Maps memory behind what is there already. Nobody else knows of it: it is huge pages' best case.
    fn supply(&mut self, from: Gfn, mut count: PageCount) -> io::Result<()> {
        let huge = count.0 >= HUGE / 2;
        if huge {
            count = PageCount((from.0 + count.0).next_multiple_of(HUGE) - from.0);
        }
        let pages = GfnRange::new(from, count);
        self.area.map_anonymous(pages)?;
        if huge {
            self.area.hint(pages, Advice::Huge);
        }
        // Where the kernel does not know the call, each page is supplied when it is written.
        self.area.hint(pages, Advice::Populate);
        self.room = PageCount(self.room.0 + count.0);
        Ok(())
    }

    /// Unmaps all but these pages, the first of its room.
    fn keep_only(&mut self, pages: GfnRange) -> io::Result<()> {
        let all = self.area.frames();
        self.area.clear(GfnRange::between(all.start(), pages.start()))?;
        self.area.clear(GfnRange::between(pages.end(), all.end()))?;
        self.room = pages.count();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_places_that_it_gives() {
        let frames = PageCount(300_000);
        let row = ScratchRow::behind(0x1000_0000_0000, frames);
        let copies = copies_begin(frames);
        assert!(row.places().count() > 1000 && row.places().all(|base| row.has(base, copies)));
        let first = row.places().next().unwrap();
        let last = row.places().last().unwrap();
        for base in
            [0, 0x1000_0000_0000, first - row.stride, first + 4096, last + row.stride, u64::MAX, u64::MAX - 4095]
        {
            assert!(!row.has(base, copies), "{base:#x}");
        }
        assert!(!row.has(first, Gfn(0)) && !row.has(first, Gfn(copies.0 + 1)));
    }
}
