//! Addresses, frame numbers and counts, each a type of its own, and all range arithmetic of the crate.
//!
//! Everything is counted in pages of [`PAGE_SIZE`] bytes. A guest frame number ([`Gfn`]) names a page of guest-physical
//! space; a [`PageIndex`] names a page of an object or a store. An [`PageOrigin`] is all that leads from one to the other: 0 for
//! anonymous memory that has not been moved, so that a page has one address in all address spaces of its family.

pub(crate) mod cluster;
pub(crate) mod extents;
pub(crate) mod page_map;
pub(crate) mod page_set;

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Add, Range};

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

    /// The page of a store that holds the byte at `offset`.
    pub fn of_offset(offset: u64) -> Self {
        Self(offset >> PAGE_SHIFT)
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

/// A number that names a page of its space, so that ranges of one space are not taken for ranges of another.
pub trait PageNumber: Copy + Ord + Default + fmt::Debug {
    /// The page that has this number.
    fn from_raw(raw: u64) -> Self;
    /// Its number.
    fn raw(self) -> u64;
}

impl PageNumber for Gfn {
    fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    fn raw(self) -> u64 {
        self.0
    }
}

impl PageNumber for PageIndex {
    fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    fn raw(self) -> u64 {
        self.0
    }
}

/// A half-open range of pages of one space.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Ends<I>", bound(deserialize = "I: PageNumber + Deserialize<'de>"))]
pub struct RangeOf<I> {
    start: I,
    end: I,
}

/// Guest frames that follow each other.
pub type GfnRange = RangeOf<Gfn>;

/// Pages of an object or a store that follow each other.
pub type PageRange = RangeOf<PageIndex>;

/// A range as it comes from elsewhere.
#[derive(Deserialize)]
struct Ends<I> {
    start: I,
    end: I,
}

impl<I: PageNumber> From<Ends<I>> for RangeOf<I> {
    fn from(Ends { start, end }: Ends<I>) -> Self {
        Self::between(start, end)
    }
}

impl<I: PageNumber> RangeOf<I> {
    /// The `count` pages from `start`.
    ///
    /// # Panics
    /// If the range does not fit into 64 bits: lengths from outside are checked before they get here.
    pub fn new(start: I, count: PageCount) -> Self {
        let end = start.raw().checked_add(count.0).expect("a range of pages fits into 64 bits");
        Self { start, end: I::from_raw(end) }
    }

    /// One page.
    pub fn one(page: I) -> Self {
        Self::new(page, PageCount(1))
    }

    /// The pages from `start` up to, not including, `end`; empty where `end` comes first.
    pub fn between(start: I, end: I) -> Self {
        Self { start, end: end.max(start) }
    }

    /// The first page.
    pub fn start(self) -> I {
        self.start
    }

    /// The page after the last.
    pub fn end(self) -> I {
        self.end
    }

    /// How many pages there are.
    pub fn count(self) -> PageCount {
        PageCount(self.end.raw() - self.start.raw())
    }

    /// Whether there is no page.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The length in bytes, as the system calls take it.
    pub fn len_bytes(self) -> usize {
        self.count().bytes() as usize
    }

    /// Whether `page` lies within.
    pub fn contains(self, page: I) -> bool {
        self.start <= page && page < self.end
    }

    /// The pages that both ranges have.
    pub fn intersect(self, other: Self) -> Self {
        Self::between(self.start.max(other.start), self.end.min(other.end))
    }

    /// The pages, one by one.
    pub fn iter(self) -> impl Iterator<Item = I> {
        self.raw().map(I::from_raw)
    }

    /// The range as plain numbers, the key type of the interval maps.
    pub fn raw(self) -> Range<u64> {
        self.start.raw()..self.end.raw()
    }
}

impl<I: PageNumber> From<Range<u64>> for RangeOf<I> {
    fn from(raw: Range<u64>) -> Self {
        Self::between(I::from_raw(raw.start), I::from_raw(raw.end))
    }
}

impl<I: PageNumber> fmt::Debug for RangeOf<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start.raw(), self.end.raw())
    }
}

impl GfnRange {
    /// The frames to which something moves from these.
    pub fn moved(self, by: Distance) -> Self {
        shifted(self, by.0)
    }
}

/// How far something moves: so many frames up, or down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Distance(i64);

impl Distance {
    /// From one frame to another.
    pub fn between(from: Gfn, to: Gfn) -> Self {
        Self(to.0.wrapping_sub(from.0) as i64)
    }
}

/// Where the pages of an object, or of a store, stand: page `i` at frame `i + origin`. Below zero where memory was moved down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageOrigin(pub i64);

impl PageOrigin {
    /// Page 0 stands at this frame.
    pub fn at(first: Gfn) -> Self {
        Self::of(PageIndex(0), first)
    }

    /// `page` stands at `gfn`.
    pub fn of(page: PageIndex, gfn: Gfn) -> Self {
        Self(gfn.0.wrapping_sub(page.0) as i64)
    }

    /// The page at a frame.
    ///
    /// # Panics
    /// If no page stands there, since all stand behind it.
    pub fn page(self, gfn: Gfn) -> PageIndex {
        let page = gfn.0.checked_add_signed(-self.0);
        PageIndex(page.expect("a frame that shows a page does not come before page 0"))
    }

    /// The pages at these frames. Those before page 0 have none.
    pub fn pages(self, frames: GfnRange) -> PageRange {
        shifted(frames, -self.0)
    }

    /// The frames of these pages. Pages that would stand before frame 0 have none.
    pub fn frames(self, pages: PageRange) -> GfnRange {
        shifted(pages, self.0)
    }

    /// Where they stand once all of them have moved.
    pub fn moved(self, by: Distance) -> Self {
        Self(self.0 + by.0)
    }

    /// Pages of an object beneath another one, as they count in that, where this is what [lies between
    /// them](crate::object::Backing::origin).
    pub(crate) fn over(self, pages: PageRange) -> PageRange {
        shifted(pages, self.0)
    }
}

impl Add for PageOrigin {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

fn shifted<I: PageNumber, J: PageNumber>(pages: RangeOf<I>, by: i64) -> RangeOf<J> {
    let shift = |page: I| J::from_raw(page.raw().saturating_add_signed(by));
    RangeOf::between(shift(pages.start), shift(pages.end))
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
    fn pages_stand_at_or_behind_their_origin() {
        let (up, down) = (PageOrigin::at(Gfn(10)), PageOrigin::of(PageIndex(10), Gfn(4)));
        assert_eq!((up.page(Gfn(12)), down.page(Gfn(12))), (PageIndex(2), PageIndex(18)));
        assert_eq!((up.pages((5..12).into()), down.frames((2..8).into())), ((0..2).into(), (0..2).into()));
        assert_eq!((up + down, down.over((6..7).into())), (PageOrigin(4), (0..1).into()));
    }

    #[test]
    #[should_panic(expected = "fits into 64 bits")]
    fn a_range_past_the_end_of_space_is_refused() {
        let _ = GfnRange::new(Gfn(u64::MAX), PageCount(2));
    }
}
