//! Swap-in: evicted pages get back into their stores, once for all who see them.
//!
//! ```text
//!   Resident ──evict, put──► Swapped ──read, fill──► Clean ──evict, nothing written──► Swapped
//!                               └──the read fails──► Lost
//! ```

use crate::addr::cluster::cluster_of;
use crate::addr::{Gfn, GfnRange, PageCount, PageIndex, PageRange};
use crate::effect::{Effect, Effects};
use crate::family::Family;
use crate::ids::{Batch, ObjectId, StoreId, SwapSlot, VmId};
use crate::object::{Loss, Slot, SwapBase};
use crate::ops::Fault;
use crate::reclaim::Return;

/// Pages of one cluster and one put, in consecutive slots, to be read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwapIn {
    pub(crate) object: ObjectId,
    /// From the first of them to the last.
    span: PageRange,
    batch: Batch,
    /// Their first slot.
    pub first: SwapSlot,
    /// How many there are.
    pub count: PageCount,
}

impl Family {
    /// What is read together with a page that is in swap only.
    pub(crate) fn swap_in(&self, object: ObjectId, page: PageIndex, base: SwapBase) -> SwapIn {
        let mut found: Option<SwapIn> = None;
        for (pages, slot) in self.objects.slots_in(object, cluster_of(page)) {
            let Slot::Swapped(_, other) = slot else { continue };
            if other.batch() != base.batch() {
                continue;
            }
            let first = other.slot(pages.start());
            match &mut found {
                Some(all) if first.0 == all.first.0 + all.count.0 => {
                    all.span = PageRange::between(all.span.start(), pages.end());
                    all.count.0 += pages.count().0;
                }
                Some(all) if all.span.contains(page) => break,
                _ => found = Some(SwapIn { object, span: pages, batch: base.batch(), first, count: pages.count() }),
            }
        }
        found.expect("the page itself is in swap")
    }

    /// The page that `vm` waits for, to write it, if it is in swap only and nobody else sees it: a copy of its own is all that
    /// anybody needs (exclusive swap-in). Its slot stays until a freeze tells that the copy was written.
    pub(crate) fn exclusive_swap_in(&self, vm: VmId, gfn: Gfn) -> Option<SwapIn> {
        // A page that is on its way out may have been written.
        self.vms.get(&vm).filter(|member| member.freezing.is_none())?;
        let Fault::SwapIn(read) = self.fault(vm, gfn) else { return None };
        self.is_alone(vm, gfn).then_some(read)
    }

    /// What `vm` sees of a cluster that is in swap only, each part as it is read.
    pub(crate) fn swapped(&self, vm: VmId, cluster: GfnRange) -> Vec<SwapIn> {
        let mut reads: Vec<SwapIn> = Vec::new();
        let segments = if self.vms.contains_key(&vm) { self.shown(vm, cluster) } else { Vec::new() };
        for segment in segments {
            if let Some(found) = segment.found
                && let Slot::Swapped(_, base) = found.slot
            {
                let read = self.swap_in(found.object, found.indexes(segment.pages).start(), base);
                if !reads.contains(&read) {
                    reads.push(read);
                }
            }
        }
        reads
    }

    /// The stretches of pages that are read together, in the order of their slots, and their stores.
    pub(crate) fn swapping_in(&self, read: &SwapIn) -> Vec<(PageRange, StoreId)> {
        let slots = self.objects.slots_in(read.object, read.span);
        slots
            .filter_map(|(pages, slot)| match slot {
                Slot::Swapped(store, base) if base.batch() == read.batch => Some((pages, store)),
                _ => None,
            })
            .collect()
    }

    /// Some of these pages are in their store again.
    pub(crate) fn swapped_in(&mut self, read: &SwapIn, pages: PageRange, how: Return, effects: &mut Effects) {
        for (pages, slot) in self.in_swap_only(read.object, pages) {
            if let Slot::Swapped(store, base) = slot {
                self.objects.advance(read.object, pages, Slot::Clean(store, base), effects);
                self.objects.accounts.queue.came_back(store, pages, how);
            }
        }
        self.objects.writeback.put_off.clear();
    }

    /// These pages have been read. Whether they were evicted too early.
    pub(crate) fn count_return(&mut self, read: &SwapIn) -> Return {
        let how = self.objects.accounts.queue.returned(read.batch);
        self.objects.accounts.queue.count_return(how);
        how
    }

    /// Pages that are in swap only cannot be read back. Who touches one fails.
    pub(crate) fn lose(&mut self, object: ObjectId, pages: PageRange, effects: &mut Effects) {
        for (pages, slot) in self.in_swap_only(object, pages) {
            if let Slot::Swapped(store, base) = slot {
                self.objects.advance(object, pages, Slot::Lost(store, Loss::Swap), effects);
                effects.push(Effect::FreeSwap(base.slot(pages.start()), pages.count()));
            }
        }
        self.objects.writeback.put_off.clear();
    }

    fn in_swap_only(&self, object: ObjectId, pages: PageRange) -> Vec<(PageRange, Slot)> {
        self.objects.slots_in(object, pages).filter(|(_, slot)| matches!(slot, Slot::Swapped(..))).collect()
    }

    /// Whether `vm` takes the page at `gfn` from this page of `store`.
    pub(crate) fn maps(&self, vm: VmId, gfn: Gfn, store: StoreId, pages: PageRange) -> bool {
        let source = self.vms.get(&vm).and_then(|_| self.window_at(vm, gfn));
        source.and_then(|source| source.page(gfn)).is_some_and(|(s, page)| s == store && pages.contains(page))
    }
}
