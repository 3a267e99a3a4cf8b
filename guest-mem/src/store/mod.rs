//! Stores: where the bytes of objects are.
//!
//! Windows map a store privately and find holes through traps. So a page must get into a store at once and whole: with
//! a memfd there is exactly one way, `UFFDIO_COPY` into a registered alias of it ([`memfd`]).

pub mod file;
pub mod memfd;

use crate::addr::{PageCount, PageIndex, PageRange};
use crate::swap::Swap;
use std::io;

/// The pages of one store. Absent pages are holes.
pub trait Store {
    /// Puts whole pages where there are holes. Whoever looks sees a hole, or the whole page.
    ///
    /// # Errors
    /// `AlreadyExists`: a page that should not be there is (nothing is overwritten). Otherwise the store is out of memory.
    fn fill(&mut self, first: PageIndex, bytes: &[u8]) -> io::Result<()>;

    /// Reads pages that are there.
    ///
    /// # Errors
    /// The store cannot be read.
    fn read(&self, first: PageIndex, buf: &mut [u8]) -> io::Result<()>;

    /// Makes a hole again, in all windows too.
    fn punch(&mut self, first: PageIndex, count: PageCount);

    /// The pages that are there, in order.
    ///
    /// # Errors
    /// The store cannot tell.
    fn extents(&self) -> io::Result<Vec<PageRange>>;

    /// How many pages are there.
    ///
    /// # Errors
    /// The store cannot tell.
    fn resident(&self) -> io::Result<PageCount>;

    /// No page is expected to be filled in for a while: lets go of what only filling needs.
    fn rest(&mut self) {}
}

/// Makes stores.
pub trait StoreFactory {
    /// What it makes.
    type Store: Store;
    /// Stores of files that go with them.
    type File: FileStore;
    /// Where pages of its stores are evicted to.
    type Swap: Swap;

    /// An empty store of `pages` pages.
    ///
    /// # Errors
    /// The host has no memory or no descriptors left.
    fn create(&mut self, pages: PageCount) -> io::Result<Self::Store>;

    /// Shared memory of `pages` pages, all of them holes, which whoever maps it writes: a touch of a hole makes it a page of
    /// zeros.
    ///
    /// # Errors
    /// As above.
    fn create_shared(&mut self, pages: PageCount) -> io::Result<Self::Store>;

    /// Nothing else is to be done: gets ready for the next store of `pages` pages.
    fn stock_up(&mut self, _pages: PageCount) {}

    /// The swap.
    fn swap(&mut self) -> &mut Self::Swap;
}

/// A file's store: filled from the file on first touch, shared by families.
pub trait FileStore {
    /// Makes sure that these pages are there.
    ///
    /// # Errors
    /// The file cannot be read.
    fn ensure(&self, pages: PageRange) -> io::Result<()>;

    /// Reads pages, there yet or not.
    ///
    /// # Errors
    /// The file cannot be read.
    fn read(&self, first: PageIndex, buf: &mut [u8]) -> io::Result<()>;
}
