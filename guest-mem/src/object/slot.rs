//! Where a page of an object is: a closed set of states, and the only place that knows.

use crate::window::StoreId;

/// State of one page of an object. A page without a slot is *absent*: look further down the chain.
///
/// The page's index in the store named here is its index in the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Known to be zero. Hides what is below, and takes no storage.
    Zero,
    /// Moved out of a window by the freeze into this store, and still in that window's scratch range.
    Unsettled(StoreId),
    /// A clean page between moved ones: windows map this store here, which is to get a copy of what is below.
    Gap(StoreId),
    /// In the store.
    Resident(StoreId),
    /// It was in a scratch range whose memory is gone.
    Lost(StoreId),
}

impl Slot {
    /// The store that windows map for this page.
    pub fn store(self) -> Option<StoreId> {
        match self {
            Self::Zero => None,
            Self::Unsettled(s) | Self::Gap(s) | Self::Resident(s) | Self::Lost(s) => Some(s),
        }
    }

    /// Whether the page has still to get into its store.
    pub fn is_pending(self) -> bool {
        matches!(self, Self::Unsettled(_) | Self::Gap(_))
    }
}
