//! Where moved pages stay until they have settled.

use crate::addr::{Gfn, GfnRange, PageCount};
use crate::sys::{Advice, Area, Place};
use crate::window::{ScratchRange, StoreId};
use std::collections::BTreeMap;
use std::io;

/// The scratch ranges of one window: areas like the window itself, so that a page keeps its frame number and whole
/// page tables can move.
#[derive(Debug)]
pub(super) struct Scratches {
    /// A fixed window's scratch areas stand in a row behind it, `stride` apart.
    row: Option<Row>,
    frames: PageCount,
    areas: BTreeMap<StoreId, Scratch>,
}

#[derive(Debug)]
struct Row {
    first: u64,
    stride: u64,
}

#[derive(Debug)]
struct Scratch {
    area: Area,
    private: Vec<GfnRange>,
    places: ScratchRange,
}

/// Fixed areas end below this, far from where the kernel places mappings of its own choice.
const FIXED_END: u64 = 0x4000_0000_0000;

impl Scratches {
    /// Scratch ranges for the window `area` of `frames` frames, which stands at `place`.
    pub fn beside(area: &Area, place: Place, frames: PageCount) -> Self {
        // An area has room for every frame twice, once moved and once copied, and as much again lies between two areas.
        let stride = 4 * Area::span(frames);
        let row = match place {
            Place::Fixed(_) => Some(Row { first: area.base() + stride, stride }),
            Place::Anywhere => None,
        };
        Self { row, frames, areas: BTreeMap::new() }
    }

    /// A new, empty scratch area.
    pub fn make(&self) -> io::Result<Area> {
        let room = PageCount(self.copies().0 + self.frames.0);
        let Some(row) = &self.row else { return Area::reserve(Place::Anywhere, room) };
        let free = (row.first..)
            .step_by(row.stride as usize)
            .take_while(|base| base + row.stride <= FIXED_END)
            .find(|base| self.areas.values().all(|scratch| scratch.area.base() != *base));
        let base = free.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let area = Area::reserve(Place::Fixed(base), room)?;
        area.vacate()?;
        Ok(area)
    }

    /// The frame of every scratch area where copies begin.
    pub fn copies(&self) -> Gfn {
        Gfn::of_gpa(Area::span(self.frames))
    }

    /// `area` now holds the pages that the freeze into `store` took; the `private` ones may be read.
    pub fn keep(&mut self, store: StoreId, area: Area, private: Vec<GfnRange>, copied: &[GfnRange]) {
        let places = ScratchRange::new(area.base(), self.copies(), copied);
        let before = self.areas.insert(store, Scratch { area, private, places });
        debug_assert!(before.is_none(), "a store takes one freeze");
    }

    /// Reads pages that were moved together, or copied.
    pub fn read(&self, store: StoreId, first: Gfn, buf: &mut [u8]) -> io::Result<()> {
        let pages = GfnRange::new(first, PageCount::covering(buf.len() as u64));
        let gone = || io::Error::new(io::ErrorKind::NotFound, format!("{store:?} has no scratch range"));
        let scratch = self.areas.get(&store).ok_or_else(gone)?;
        // What was moved along between private pages still shows the old store, whose holes must not be touched.
        if !scratch.private.iter().any(|range| range.intersect(pages) == pages) {
            let what = format!("guest pages {pages:?} were not harvested into {store:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        scratch.area.copy_out(scratch.places.frame(first), buf)
    }

    /// Gives the memory of pages back that were moved together, or copied.
    pub fn leave(&mut self, store: StoreId, pages: GfnRange) {
        let Some(Scratch { area, places, .. }) = self.areas.get(&store) else { return };
        let there = GfnRange::new(places.frame(pages.start()), pages.count());
        if let Err(error) = area.advise(there, Advice::DropPrivate) {
            log::warn!("memory of settled pages {pages:?} stays: {error}");
        }
    }

    /// Unmaps the scratch area of the freeze into `store`.
    pub fn drop(&mut self, store: StoreId) {
        if self.areas.remove(&store).is_none() {
            log::warn!("{store:?} has no scratch range to drop");
        }
    }
}
