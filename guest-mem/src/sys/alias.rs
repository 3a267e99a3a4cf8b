//! The one way by which bytes get into a store.

use super::{Advice, Area, Memfd, Place, Userfaultfd};
use crate::addr::{GfnRange, PAGE_SIZE, PageCount, PageIndex, PageOrigin, PageRange};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use thiserror::Error;

/// A shared mapping of a store in the process that fills it, registered for traps and never touched.
///
/// `UFFDIO_COPY` into it makes a page appear whole: a copy through a mapping, or `pwrite`, shows half-filled pages to
/// everybody who maps the store. Filling wakes nobody: whoever waits does so in another address space.
#[derive(Debug)]
pub struct Alias {
    area: Area,
    uffd: Arc<Userfaultfd>,
}

/// A page could not be put into a store.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FillError {
    /// There is a page already where the store should have a hole: somebody planted it, and nothing that maps the store
    /// can be trusted.
    #[error("page {:#x} of the store is there already: it was planted", .0.0)]
    Planted(PageIndex),
    /// The system call failed.
    #[error("UFFDIO_COPY to page {:#x} of the store: {cause}", page.0)]
    Call {
        /// The page.
        page: PageIndex,
        /// Why.
        cause: io::Error,
    },
}

/// Where an alias has these pages of its store: its area mirrors no guest's memory.
fn frames(pages: PageRange) -> GfnRange {
    PageOrigin(0).frames(pages)
}

impl Alias {
    /// Maps the store. `uffd` may serve any number of aliases.
    ///
    /// # Errors
    /// Of `mmap` or the registration.
    pub fn new(store: &Memfd, uffd: Arc<Userfaultfd>) -> io::Result<Self> {
        let pages = frames(store.range());
        let area = Area::reserve(Place::Anywhere, pages.count())?;
        area.map_shared(pages, store.as_fd(), PageIndex(0))?;
        let (start, len) = area.host(pages)?;
        uffd.register(start, len)?;
        Ok(Self { area, uffd })
    }

    /// Puts `bytes`, whole pages, into the store from page `first` on.
    ///
    /// # Errors
    /// What stopped it; the pages before it are there.
    pub fn fill(&self, first: PageIndex, bytes: &[u8]) -> Result<(), FillError> {
        debug_assert_eq!(bytes.len() % PAGE_SIZE, 0);
        let range = frames(PageRange::new(first, PageCount::covering(bytes.len() as u64)));
        let (start, _) = self.area.host(range).map_err(|cause| FillError::Call { page: first, cause })?;
        self.uffd.copy(start, bytes).map_err(|(done, cause)| {
            let page = PageIndex(first.0 + (done / PAGE_SIZE) as u64);
            match cause.raw_os_error() {
                Some(libc::EEXIST) => FillError::Planted(page),
                _ => FillError::Call { page, cause },
            }
        })
    }

    /// Drops this process's page table entries of what was filled: the pages stay in the store.
    pub fn forget(&self, first: PageIndex, count: PageCount) {
        let pages = frames(PageRange::new(first, count));
        if let Err(error) = self.area.advise(pages, Advice::DropPrivate) {
            log::warn!("madvise of a store's alias: {error}");
        }
    }
}
