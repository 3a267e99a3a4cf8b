//! Where a page of an object is: a closed set of states, and the only place that knows.

use crate::addr::PageIndex;
use crate::ids::{Batch, Source, StoreId, SwapSlot};

/// State of one page of an object. A page without a slot is *absent*: look further down the chain.
///
/// The page's index in the store named here is its index in the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Known to be zero. Hides what is below, and takes no storage.
    Zero,
    /// Moved out of a window by the freeze into this store, and still in that window's scratch range.
    InFlight(StoreId),
    /// A clean page between moved ones: windows map this store here, which is to get a copy of what its VM saw there before:
    /// this, at the same guest frame. What is named so stays the same, whatever becomes of the chain.
    CopyUp(StoreId, Source),
    /// In the store.
    Resident(StoreId),
    /// In the store, and in swap as well: frozen bytes do not change, so it can be evicted without a write.
    Clean(StoreId, SwapBase),
    /// In swap only. Windows map this store here, which has a hole, and trap.
    Swapped(StoreId, SwapBase),
    /// Its bytes are gone.
    Lost(StoreId, Loss),
}

/// How bytes were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// They were in a scratch range whose process is gone.
    Process,
    /// They could not be read back from swap.
    Swap,
}

/// Where in swap the pages are that went there together: page `i` of the object in slot `base + i`, wrapping, so that
/// neighbours say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwapBase {
    base: u64,
    batch: Batch,
}

impl SwapBase {
    /// Page `first` of an object is in `slot`, and its neighbours in the slots around.
    pub(crate) fn new(slot: SwapSlot, first: PageIndex, batch: Batch) -> Self {
        Self { base: slot.0.wrapping_sub(first.0), batch }
    }

    /// The slot of a page.
    pub fn slot(self, page: PageIndex) -> SwapSlot {
        SwapSlot(self.base.wrapping_add(page.0))
    }

    pub(crate) fn batch(self) -> Batch {
        self.batch
    }

    /// The same slots, evicted once more.
    pub(crate) fn again(self, batch: Batch) -> Self {
        Self { batch, ..self }
    }
}

impl Slot {
    /// The store that windows map for this page.
    pub fn store(self) -> Option<StoreId> {
        match self {
            Self::Zero => None,
            Self::InFlight(s)
            | Self::CopyUp(s, _)
            | Self::Resident(s)
            | Self::Clean(s, _)
            | Self::Swapped(s, _)
            | Self::Lost(s, _) => Some(s),
        }
    }

    /// The store that has the page.
    pub fn resident(self) -> Option<StoreId> {
        match self {
            Self::Resident(s) | Self::Clean(s, _) => Some(s),
            _ => None,
        }
    }

    /// Where the page is in swap.
    pub fn swap(self) -> Option<SwapBase> {
        match self {
            Self::Clean(_, base) | Self::Swapped(_, base) => Some(base),
            _ => None,
        }
    }

    /// Whether the page has still to get into its store.
    pub fn is_pending(self) -> bool {
        matches!(self, Self::InFlight(_) | Self::CopyUp(..))
    }

    /// Whether a page in this state may get into that one.
    pub(crate) fn may_become(self, to: Self) -> bool {
        match (self, to) {
            (Self::InFlight(_) | Self::CopyUp(..), _) => !to.is_pending(),
            (Self::Resident(a), Self::Swapped(b, _))
            | (Self::Clean(a, _), Self::Resident(b))
            | (Self::Swapped(a, _), Self::Lost(b, Loss::Swap)) => a == b,
            (Self::Clean(a, from), Self::Swapped(b, to)) | (Self::Swapped(a, from), Self::Clean(b, to)) => {
                a == b && from.base == to.base
            }
            _ => false,
        }
    }
}
