//! The names by which parts of a family speak of each other, and what a run of guest frames shows. Nothing here knows what it
//! names, so every module may use all of it.

use crate::addr::{Distance, Gfn, GfnRange, PageIndex, PageOrigin};
use serde::{Deserialize, Serialize};

/// Names a VM of its family. It may be another's when the VM, and all that waits in its window, is gone, and all other ids have
/// been used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmId(pub u32);

/// Names an object of its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub u32);

/// Names a store of its family. It may be another's when nothing names it any more, and all other ids have been used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StoreId(pub u32);

/// A page's place in swap. The pages of one `put` have consecutive ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SwapSlot(pub u64);

impl SwapSlot {
    /// The slot of the page that is `pages` further on in the same [`put`](crate::swap::Swap::put).
    pub fn nth(self, pages: u64) -> Self {
        Self(self.0 + pages)
    }
}

/// Names what was evicted together: pages that say the same are of one put. Later evictions have higher numbers,
/// wrapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Batch(pub(crate) u32);

/// Whether a VM is likely to need its memory soon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// It runs.
    #[default]
    Running,
    /// It is paused, or has nothing to do: what only such VMs see is evicted first.
    Idle,
}

/// What supplies the pages of a run that the guest has not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Source {
    /// Nothing lies beneath: private zero-filled memory.
    Anonymous,
    /// A store.
    Store {
        /// The store.
        store: StoreId,
        /// Where its pages stand.
        origin: PageOrigin,
    },
    /// Shared memory: its store, which the guest writes.
    Shared {
        /// The store.
        store: StoreId,
        /// Where its pages stand.
        origin: PageOrigin,
    },
}

impl Source {
    /// The store's page that stands at `gfn`, if a store supplies it.
    pub fn page(self, gfn: Gfn) -> Option<(StoreId, PageIndex)> {
        self.store().map(|(store, origin)| (store, origin.page(gfn)))
    }

    /// The store that supplies it, if one does, and where its pages stand.
    pub fn store(self) -> Option<(StoreId, PageOrigin)> {
        match self {
            Self::Anonymous => None,
            Self::Store { store, origin } | Self::Shared { store, origin } => Some((store, origin)),
        }
    }
}

impl Source {
    /// What supplies the same pages once they have moved.
    pub fn moved(self, by: Distance) -> Self {
        match self {
            Self::Anonymous => self,
            Self::Store { store, origin } => Self::Store { store, origin: origin.moved(by) },
            Self::Shared { store, origin } => Self::Shared { store, origin: origin.moved(by) },
        }
    }

    /// Whether a page of this source is `store`'s page at the same place.
    pub(crate) fn is_store(self, store: StoreId) -> bool {
        self.store().is_some_and(|(id, _)| id == store)
    }
}

/// Guest frames that one source supplies: one mapping of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Which frames.
    pub pages: GfnRange,
    /// What lies beneath them.
    pub source: Source,
}

impl Run {
    /// The same pages once they have moved.
    pub fn moved(self, by: Distance) -> Self {
        Self { pages: self.pages.moved(by), source: self.source.moved(by) }
    }
}
