//! Swap: where evicted pages are.

use crate::addr::PageCount;
use std::io;

/// Pages that go to swap and come back together, at most; they are of one aligned group of so many.
pub const CLUSTER: PageCount = PageCount(16);

/// A page's place in swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SwapSlot(pub u64);

/// Whether pages have been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// They are in the buffer.
    Here,
    /// A read is under way: ask again when told.
    Coming,
}

/// Keeps pages outside of memory.
pub trait Swap {
    /// Takes copies of 1..=16 whole pages; consecutive slots.
    ///
    /// # Errors
    /// `StorageFull`: no slots; `WouldBlock`: try later. Nothing was taken then.
    fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot>;

    /// Reads pages of consecutive slots of one put.
    ///
    /// # Errors
    /// The bytes are lost for good.
    fn get(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch>;

    /// Nobody needs these slots any more.
    fn free(&mut self, first: SwapSlot, count: PageCount);

    /// All slots that are in use, if it can tell.
    fn used(&self) -> Option<Vec<(SwapSlot, PageCount)>> {
        None
    }
}
