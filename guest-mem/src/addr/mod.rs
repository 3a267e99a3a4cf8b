//! Addresses, frame numbers and counts, each a type of its own, and all range arithmetic of the crate.
//!
//! Everything is counted in pages of [`PAGE_SIZE`] bytes. A guest frame number ([`Gfn`]) names a page of guest-physical
//! space; a [`PageIndex`] names a page of an object or a store. In a family the two are the same for anonymous memory:
//! a page has one address in all its address spaces.

pub(crate) mod cluster;
pub(crate) mod extents;
pub(crate) mod page_map;
pub(crate) mod page_set;

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;
/// `log2(PAGE_SIZE)`.
pub const PAGE_SHIFT: u32 = 12;

/// A guest frame number: a guest-physical address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gfn(pub u64);

/// A page's place in an object or a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

/// A number of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageCount(pub u64);

impl Gfn {
    /// The guest-physical address of the frame's first byte.
    pub fn gpa(self) -> u64 {
        self.0 << PAGE_SHIFT
    }

    /// The frame that holds the guest-physical address `gpa`.
    pub fn of_gpa(gpa: u64) -> Self {
        Self(gpa >> PAGE_SHIFT)
    }
}

impl PageIndex {
    /// The byte offset of the page in its store.
    pub fn offset(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

impl PageCount {
    /// The count in bytes.
    pub fn bytes(self) -> u64 {
        self.0 << PAGE_SHIFT
    }

    /// The pages that `bytes` fill, the last one perhaps in part.
    pub fn covering(bytes: u64) -> Self {
        Self(bytes.div_ceil(PAGE_SIZE as u64))
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.gpa())
    }
}

/// A half-open range of guest frames.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Ends")]
pub struct GfnRange {
    start: Gfn,
    end: Gfn,
}

/// A range as it comes from elsewhere.
#[derive(Deserialize)]
struct Ends {
    start: Gfn,
    end: Gfn,
}

impl From<Ends> for GfnRange {
    fn from(Ends { start, end }: Ends) -> Self {
        Self::between(start, end)
    }
}

impl GfnRange {
    /// The `count` frames from `start`.
    ///
    /// # Panics
    /// If the range does not fit into 64 bits: lengths from outside are checked before they get here.
    pub fn new(start: Gfn, count: PageCount) -> Self {
        let end = start.0.checked_add(count.0).expect("a range of guest frames fits into 64 bits");
        Self { start, end: Gfn(end) }
    }

    /// The frames from `start` up to, not including, `end`; empty where `end` comes first.
    pub fn between(start: Gfn, end: Gfn) -> Self {
        Self { start, end: end.max(start) }
    }

    /// The first frame.
    pub fn start(self) -> Gfn {
        self.start
    }

    /// The frame after the last.
    pub fn end(self) -> Gfn {
        self.end
    }

    /// How many frames there are.
    pub fn count(self) -> PageCount {
        PageCount(self.end.0 - self.start.0)
    }

    /// Whether there is no frame.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The length in bytes, as the system calls take it.
    pub fn len_bytes(self) -> usize {
        self.count().bytes() as usize
    }

    /// Whether `gfn` lies within.
    pub fn contains(self, gfn: Gfn) -> bool {
        self.start <= gfn && gfn < self.end
    }

    /// The frames that both ranges have.
    pub fn intersect(self, other: Self) -> Self {
        Self::between(self.start.max(other.start), self.end.min(other.end))
    }

    /// The frames, one by one.
    pub fn iter(self) -> impl Iterator<Item = Gfn> {
        (self.start.0..self.end.0).map(Gfn)
    }

    /// The range as plain numbers, the key type of the interval maps.
    pub fn raw(self) -> Range<u64> {
        self.start.0..self.end.0
    }
}

impl From<Range<u64>> for GfnRange {
    fn from(raw: Range<u64>) -> Self {
        Self::between(Gfn(raw.start), Gfn(raw.end))
    }
}

impl fmt::Debug for GfnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start.0, self.end.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_intersect_and_count() {
        let a = GfnRange::new(Gfn(4), PageCount(8));
        let b = GfnRange::between(Gfn(10), Gfn(20));
        assert_eq!(a.intersect(b), GfnRange::between(Gfn(10), Gfn(12)));
        assert_eq!(a.intersect(GfnRange::between(Gfn(12), Gfn(13))).count(), PageCount(0));
        assert!(GfnRange::between(Gfn(5), Gfn(3)).is_empty());
        assert!(a.contains(Gfn(11)) && !a.contains(Gfn(12)));
        assert_eq!(Gfn::of_gpa(Gfn(7).gpa() + 4095), Gfn(7));
        assert_eq!(PageCount::covering(4097), PageCount(2));
    }

    #[test]
    #[should_panic(expected = "fits into 64 bits")]
    fn a_range_past_the_end_of_space_is_refused() {
        let _ = GfnRange::new(Gfn(u64::MAX), PageCount(2));
    }
}
