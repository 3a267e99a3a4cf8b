//! What can go wrong with a family's memory.

use crate::addr::{GfnRange, PageCount};
use crate::window::StoreId;
use std::io;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A store could not be made: nothing has changed.
    #[error("cannot make a store of {} pages", pages.0)]
    CreateStore {
        /// Its size.
        pages: PageCount,
        /// Why.
        source: io::Error,
    },
    /// Pages could not be put into their store. They wait on; try again.
    #[error("cannot put pages {pages:?} into store {store:?}")]
    Fill {
        /// The store.
        store: StoreId,
        /// The pages.
        pages: GfnRange,
        /// Why.
        source: io::Error,
    },
    /// Pages of a store, of which a copy is to be made, could not be read. They wait on; try again.
    #[error("cannot read store {store:?} for pages {pages:?}")]
    Read {
        /// The store.
        store: StoreId,
        /// The pages that are to get the copy.
        pages: GfnRange,
        /// Why.
        source: io::Error,
    },
    /// A file's pages could not be read. They wait on; try again.
    #[error("cannot read pages {pages:?} of a file")]
    File {
        /// The pages.
        pages: GfnRange,
        /// Why.
        source: io::Error,
    },
    /// A window could not change what its VM may do: nothing has changed.
    #[error("cannot protect pages {pages:?}")]
    Protect {
        /// The pages.
        pages: GfnRange,
        /// Why.
        source: io::Error,
    },
    /// Swap did not take pages: they stay where they are.
    #[error("cannot put pages {pages:?} into swap")]
    PutSwap {
        /// The pages.
        pages: GfnRange,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    /// Swap has no room for pages.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::PutSwap { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }

    /// Somebody put a page where the books say that there is none: nothing that sees the store can be trusted.
    pub fn is_planted(&self) -> bool {
        matches!(self, Self::Fill { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
    }
}
