//! The write-back queue: objects with pages that are in flight or to be copied up, and whose turn it is.

use crate::addr::GfnRange;
use crate::ids::{ObjectId, StoreId};
use std::collections::BTreeSet;

/// What has still to get into its store.
#[derive(Debug, Default)]
pub(crate) struct WritebackQueue {
    /// Objects with pending slots.
    pub(crate) pending: BTreeSet<ObjectId>,
    /// Those among them whose next page is on its way: being read from swap, or still to be copied by its window.
    pub(crate) put_off: BTreeSet<ObjectId>,
    /// The object of which somebody waited for a page last.
    pub(crate) last_faulted: Option<ObjectId>,
    /// Pages that copy-ups were to be copied from and are not any more: perhaps nobody needs them.
    pub(crate) unneeded: Vec<(StoreId, GfnRange)>,
}

impl WritebackQueue {
    /// The object whose pages are written back next, if not all are on their way: the one that somebody waited for last, or
    /// else the oldest.
    pub(crate) fn next(&self) -> Option<ObjectId> {
        let last_faulted = self.last_faulted.filter(|id| self.pending.contains(id) && !self.put_off.contains(id));
        last_faulted.or_else(|| self.pending.difference(&self.put_off).next().copied())
    }

    /// Pages that no copy-up is to be copied from any more, since it was last asked.
    pub(crate) fn take_unneeded(&mut self) -> Vec<(StoreId, GfnRange)> {
        std::mem::take(&mut self.unneeded)
    }
}
