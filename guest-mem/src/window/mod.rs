//! The window: one VM's guest-physical space as a range of some process's addresses, and the only way by which the
//! manager touches a real address space (BSD's pmap layer, for host mappings).
//!
//! A window is made of *runs*: stretches of guest frames that one [`Source`](crate::ids::Source) supplies. A run of a store is a private
//! (`MAP_PRIVATE`) mapping of the store's file, registered for traps; an anonymous run is plain private memory that
//! never traps. What the guest writes becomes private pages of the process that holds the window, the VM's *live layer*,
//! which only [a freeze](host::HostWindow::freeze) takes out. A run of shared memory is a `MAP_SHARED` mapping of its store,
//! which never traps either: what the guest writes there is in the store, and no freeze looks at it.

pub mod host;

use crate::addr::extents::{merged, without};
use crate::addr::{Gfn, GfnRange, PageCount};
use crate::ids::StoreId;
use crate::space::map::Protection;
use serde::{Deserialize, Serialize};
use std::io;

/// Clean pages that a freeze takes along, if it takes anything; all of them sorted, apart, within RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Along {
    /// What the window keeps of these is copied once more: nobody else has it.
    pub copies: Vec<GfnRange>,
    /// At these the freeze's store is mapped, which is to get what is there; the window keeps nothing.
    pub moves: Vec<GfnRange>,
}

impl Along {
    /// Whether there is nothing to take.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty() && self.moves.is_empty()
    }
}

/// What a freeze took out of a window.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Harvest {
    /// Runs that now map the freeze's store, sorted, apart. They hold private pages and gaps of clean ones between, or clean
    /// pages alone, which were [taken along](Along::moves).
    pub moved: Vec<GfnRange>,
    /// Pages that were copied, sorted, not adjacent, none of them moved: the window keeps them as private pages over
    /// whatever it maps there, and they never trap.
    pub copied: Vec<GfnRange>,
    /// The private pages among those that were moved; sorted, not adjacent.
    pub moved_private: Vec<GfnRange>,
}

impl Harvest {
    /// Whether this can be what was taken out of `ram` (sorted, apart).
    pub fn is_valid(&self, ram: &[GfnRange]) -> bool {
        let Self { moved, copied, moved_private } = self;
        [moved, copied, &merged(moved, copied)].iter().all(|pages| are_apart(pages, ram))
            && are_apart(moved_private, moved)
    }

    /// The same without `pages` (sorted), of which nothing can have been taken.
    pub(crate) fn besides(&self, pages: &[GfnRange]) -> Self {
        let [moved, copied, moved_private] =
            [&self.moved, &self.copied, &self.moved_private].map(|taken| without(taken, pages));
        Self { moved, copied, moved_private }
    }

    /// Whether nothing was private.
    pub fn is_empty(&self) -> bool {
        self.moved.is_empty() && self.copied.is_empty()
    }

    /// What was moved and what was copied, sorted.
    pub fn taken(&self) -> Vec<GfnRange> {
        merged(&self.moved, &self.copied)
    }

    /// The private pages, as they are in the scratch range; sorted, not adjacent.
    pub fn private(&self) -> Vec<GfnRange> {
        merged(&self.moved_private, &self.copied)
    }

    /// How many pages were private.
    pub fn count(&self) -> PageCount {
        PageCount(self.moved_private.iter().chain(&self.copied).map(|pages| pages.count().0).sum())
    }
}

/// Whether `pages` are sorted, apart, none of them empty, and each within one of `bounds` (the same).
pub fn are_apart(pages: &[GfnRange], bounds: &[GfnRange]) -> bool {
    let mut bounds = bounds.iter().copied().peekable();
    let mut from = Gfn(0);
    pages.iter().all(|pages| {
        let next = pages.start() >= std::mem::replace(&mut from, pages.end()) && !pages.is_empty();
        while bounds.next_if(|bounds| bounds.end() <= pages.start()).is_some() {}
        next && bounds.peek().is_some_and(|bounds| bounds.intersect(*pages) == *pages)
    })
}

/// Where the pages of a freeze are in its scratch range: what was moved at its own frame, what was copied one after the
/// other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScratchRange {
    base: u64,
    copies: Vec<(GfnRange, Gfn)>,
}

impl ScratchRange {
    /// A scratch range whose frame 0 stands at the address `base`, with copies of `copied` (sorted) from the frame
    /// `copies` on.
    pub fn new(base: u64, copies: Gfn, copied: &[GfnRange]) -> Self {
        let place = |at: &mut u64, pages: &GfnRange| {
            let first = Gfn(*at);
            *at += pages.count().0;
            Some((*pages, first))
        };
        Self { base, copies: copied.iter().scan(copies.0, place).collect() }
    }

    /// The frame of the range where a page is, and, as long as it was moved or copied together with it, the next.
    pub fn frame(&self, gfn: Gfn) -> Gfn {
        let next = self.copies.partition_point(|(pages, _)| pages.end() <= gfn);
        match self.copies.get(next) {
            Some((pages, at)) if pages.contains(gfn) => Gfn(at.0 + gfn.0 - pages.start().0),
            _ => gfn,
        }
    }

    /// Stretches that were copied each as a whole (sorted), and the frame where each begins; `None` if one of them was not.
    pub fn of_copies(&self, copied: &[GfnRange]) -> Option<Vec<(GfnRange, Gfn)>> {
        let first = copied.first().map_or(Gfn(0), |pages| pages.start());
        let mut places = self.copies[self.copies.partition_point(|(whole, _)| whole.end() <= first)..].iter();
        copied.iter().map(|pages| places.find(|(whole, _)| whole == pages).copied()).collect()
    }

    /// The host address where a page is.
    pub fn address(&self, gfn: Gfn) -> u64 {
        self.base + self.frame(gfn).gpa()
    }
}

/// What the manager asks of a real address space. The in-process implementation is [`host::HostWindow`]; a VMM with a
/// process per VM puts one behind a socket.
///
/// No method waits for the holder of the window. Pages that were moved out by the freeze into store `scratch` are read
/// through [`read_scratch`](Self::read_scratch) until [`drop_scratch`](Self::drop_scratch) gives their memory back.
pub trait Window {
    /// Reads moved-out pages, from `first` on, into `buf` (a multiple of the page size).
    ///
    /// # Errors
    /// `WouldBlock`: their holder has still to copy them; the manager is to [retry](crate::manager::Manager::retry) when it
    /// has. `NotFound`: it and its memory are gone, and the pages are lost. Anything else says nothing of the pages: they are
    /// read again later.
    fn read_scratch(&self, scratch: StoreId, first: Gfn, buf: &mut [u8]) -> io::Result<()>;

    /// These pages of the freeze into `scratch` have been written back: they will not be read again, and their memory may be
    /// given back.
    fn leave_scratch(&mut self, scratch: StoreId, pages: GfnRange);

    /// All pages of the freeze into `scratch` have been written back: gives their memory back.
    fn drop_scratch(&mut self, scratch: StoreId);

    /// Supplies zero pages where nothing is present yet, and wakes who waits for them. Pages that are there stay.
    ///
    /// Only for pages that are known to be zero: one that the store holds, but nobody has touched here, would be hidden.
    fn zero(&mut self, pages: GfnRange);

    /// Puts a private page with these bytes at `gfn`, where none is present, into the live layer. It is clean until the guest
    /// writes it, and is dropped by a freeze before that: what lies beneath must stay. Wakes nobody.
    ///
    /// # Errors
    /// `AlreadyExists`: a page is there. Otherwise the window cannot take it: nothing has changed.
    fn supply(&mut self, gfn: Gfn, page: &[u8]) -> io::Result<()>;

    /// From now on the VM may do this with these pages, whatever is or will be mapped there: a write to what is read-only
    /// is refused by the kernel. Frames where nothing is mapped yet count, those outside of RAM do not.
    ///
    /// # Errors
    /// The window is as it was.
    fn protect(&mut self, pages: GfnRange, protection: Protection) -> io::Result<()>;

    /// Wakes who waits for these pages.
    fn wake(&mut self, pages: GfnRange);

    /// Somebody waits for a page that nobody can supply: the VM must never run on.
    fn fail(&mut self, failure: Failure);
}

/// Why a VM must never run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The page was on its way into a store when the process that had it ended.
    #[error("memory at {0} was lost with the process of the VM that wrote it")]
    LostWithProcess(Gfn),
    /// The device of the swap failed, or did not return what it was given.
    #[error("memory at {0} could not be read back from swap")]
    LostInSwap(Gfn),
    /// Its window traps where it has no memory.
    #[error("a trap outside of its memory, at {0}")]
    Outside(Gfn),
    /// A call failed in the middle of a freeze, and another one when the first was undone.
    #[error("a freeze has torn its memory")]
    Torn,
}

impl Failure {
    /// The page that is waited for.
    pub fn page(self) -> Option<Gfn> {
        match self {
            Self::LostWithProcess(gfn) | Self::LostInSwap(gfn) | Self::Outside(gfn) => Some(gfn),
            Self::Torn => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ranges;

    #[test]
    fn pages_are_apart_and_within_bounds() {
        let ram = ranges(&[(0, 100), (200, 300)]);
        let apart = |raw: &[(u64, u64)]| are_apart(&ranges(raw), &ram);
        assert!(apart(&[]) && apart(&[(0, 10), (10, 20), (50, 100), (200, 300)]));
        assert!(!apart(&[(10, 20), (0, 5)]), "out of order");
        assert!(!apart(&[(10, 20), (19, 30)]), "not apart");
        assert!(!apart(&[(10, 10)]), "empty");
        assert!(!apart(&[(90, 101)]) && !apart(&[(90, 210)]) && !apart(&[(300, 301)]), "outside");
    }

    #[test]
    fn a_harvest_makes_sense_or_not() {
        let ram = ranges(&[(0, 100)]);
        let is_valid = |moved: &[_], moved_private: &[_], copied: &[_]| {
            let [moved, moved_private, copied] = [moved, moved_private, copied].map(ranges);
            Harvest { moved, copied, moved_private }.is_valid(&ram)
        };
        assert!(is_valid(&[], &[], &[]));
        assert!(is_valid(&[(10, 20), (40, 50)], &[(10, 12), (19, 20), (40, 50)], &[(5, 10), (30, 31)]));
        assert!(!is_valid(&[(10, 20)], &[(30, 31)], &[]), "private and not moved");
        assert!(!is_valid(&[(10, 20)], &[], &[(15, 16)]), "moved and copied");
        assert!(!is_valid(&[(40, 50), (10, 20)], &[], &[(30, 31)]), "out of order");
        assert!(!is_valid(&[(90, 101)], &[], &[]), "outside");
    }
}
