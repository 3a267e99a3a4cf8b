//! What the books want done to the world.
//!
//! Operations of a [`Family`](crate::family::Family) change its data and collect effects; the
//! [`Manager`](crate::manager::Manager) is the one place that carries them out, in the order they were collected. None of
//! them can fail in a way that would have to be undone: what can fail is reserved before the data changes.

use crate::addr::{GfnRange, PageCount, PageRange};
use crate::ids::{StoreId, SwapSlot, VmId};

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Free these pages of a store: nobody sees them.
    Punch(StoreId, PageRange),
    /// Nobody needs what is in these slots of swap.
    FreeSwap(SwapSlot, PageCount),
    /// Nothing refers to the store any more.
    DropStore(StoreId),
    /// Every page of the freeze into this store has left the holder's scratch range.
    DropScratch(VmId, StoreId),
    /// Supply zeros to a window that maps a hole here, so that it will not trap.
    Zero(VmId, GfnRange),
    /// The VM is gone and none of its pages is waited for.
    DropWindow(VmId),
    /// A page that this VM sees is lost with the process that had it.
    Fail(VmId, GfnRange),
}

/// Effects, in order.
#[derive(Debug, Default)]
#[must_use = "effects must be carried out"]
pub struct Effects(pub(crate) Vec<Effect>);

impl Effects {
    pub(crate) fn push(&mut self, effect: Effect) {
        self.0.push(effect);
    }
}
