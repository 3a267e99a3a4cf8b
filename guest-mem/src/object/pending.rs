//! The write-back queue: objects with pages that are in flight or to be copied up, and whose turn it is.

use crate::addr::{PageOrigin, PageRange};
use crate::ids::{ObjectId, Source, StoreId};
use std::collections::{BTreeMap, BTreeSet};

/// What has still to get into its store.
#[derive(Debug, Default)]
pub(crate) struct WritebackQueue {
    /// Objects with pending slots.
    pub(crate) pending: BTreeSet<ObjectId>,
    /// Those among them whose next page is on its way: being read from swap, or still to be copied by its window.
    pub(crate) put_off: BTreeSet<ObjectId>,
    /// The object of which somebody waited for a page last.
    pub(crate) last_faulted: Option<ObjectId>,
    /// How far from what they are to be copied from copy-ups lie, and how many so far.
    pub(crate) distances: BTreeMap<PageOrigin, u64>,
    /// Pages that copy-ups were to be copied from and are not any more: perhaps nobody needs them.
    pub(crate) unneeded: Vec<(StoreId, PageRange)>,
}

impl WritebackQueue {
    /// The object whose pages are written back next, if not all are on their way: the one that somebody waited for last, or
    /// else the oldest.
    pub(crate) fn next(&self) -> Option<ObjectId> {
        let last_faulted = self.last_faulted.filter(|id| self.pending.contains(id) && !self.put_off.contains(id));
        last_faulted.or_else(|| self.pending.difference(&self.put_off).next().copied())
    }

    /// So many pages more are to be copied up from a source.
    pub(super) fn note_distance(&mut self, source: Source, count: u64) {
        if let Some((_, distance)) = source.store() {
            *self.distances.entry(distance).or_default() += count;
        }
    }

    /// So many less are.
    pub(super) fn forget_distance(&mut self, source: Source, count: u64) {
        if let Some((_, distance)) = source.store() {
            let left = self.distances.get_mut(&distance).expect("copy-ups are counted");
            *left -= count;
            if *left == 0 {
                self.distances.remove(&distance);
            }
        }
    }

    /// Pages that no copy-up is to be copied from any more, since it was last asked.
    pub(crate) fn take_unneeded(&mut self) -> Vec<(StoreId, PageRange)> {
        std::mem::take(&mut self.unneeded)
    }
}
