//! Evict: stored pages go to swap, and leave holes that trap.
//!
//! No table and no window is changed, however many VMs look: they go on mapping the store, which has a hole now. A page
//! that has been to swap before is there still, and is not written again. Frozen bytes never change, so there is no
//! write to race with. Pages that nobody sees do not get here: invariant 6 has them freed.

use crate::addr::{Gfn, GfnRange, PageCount};
use crate::effect::{Effect, Effects};
use crate::family::{Family, Pace};
use crate::object::{Batch, Kind, ObjectId, Slot, SwapBase};
use crate::reclaim::Turn;
use crate::swap::{CLUSTER, SwapSlot};
use crate::window::StoreId;
use std::collections::BTreeSet;

/// Neighbouring pages of an object to evict, all in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim {
    pub(crate) object: ObjectId,
    /// The pages, as they count in the object and in the store.
    pub pages: GfnRange,
    /// The store that has them.
    pub store: StoreId,
    /// Where they are in swap already.
    pub(crate) clean: Option<SwapBase>,
}

/// A search for victims: it ends where it began.
#[derive(Debug)]
pub(crate) struct Search {
    /// Stores of which only idle VMs see pages.
    idle: Vec<StoreId>,
    end: Turn,
}

impl Victim {
    /// Whether the pages are in swap already.
    pub fn is_clean(&self) -> bool {
        self.clean.is_some()
    }
}

impl Family {
    /// What can be evicted of an object's pages. They are of one cluster.
    pub fn victims(&self, object: ObjectId, pages: GfnRange) -> Vec<Victim> {
        debug_assert_eq!(cluster_of(pages.start()).intersect(pages), pages, "one cluster at a time");
        if self.objects.get(object).kind == Kind::File {
            return Vec::new();
        }
        let slots = self.objects.slots_in(object, pages);
        slots
            .filter_map(|(pages, slot)| Some(Victim { object, pages, store: slot.resident()?, clean: slot.swap() }))
            .collect()
    }

    /// These pages of one cluster are in swap: those that were not there before in consecutive slots from `put` on.
    pub fn evicted(&mut self, victims: &[Victim], put: Option<SwapSlot>, effects: &mut Effects) {
        let mut next = put.map(|slot| (slot, self.objects.ages.next_batch()));
        let mut again: Vec<(Batch, Batch)> = Vec::new();
        for &Victim { object, pages, store, clean } in victims {
            let base = match (clean, &mut next) {
                (Some(base), _) => base.again(self.batch_again(base.batch(), &mut again)),
                (None, Some((slot, batch))) => {
                    let base = SwapBase::new(*slot, pages.start(), *batch);
                    *slot = SwapSlot(slot.0 + pages.count().0);
                    base
                }
                (None, None) => unreachable!("pages that are not in swap were put there"),
            };
            self.objects.advance(object, pages, Slot::Swapped(store, base), effects);
            effects.push(Effect::Punch(store, pages));
        }
    }

    /// What pages from `first` on, which swap took into slots from `slot` on, say of where they are.
    pub(crate) fn new_base(&mut self, slot: SwapSlot, first: Gfn) -> SwapBase {
        SwapBase::new(slot, first, self.objects.ages.next_batch())
    }

    /// The number that pages of the eviction `old` get now: one for all of them, since they are read together.
    fn batch_again(&mut self, old: Batch, again: &mut Vec<(Batch, Batch)>) -> Batch {
        if let Some((_, new)) = again.iter().find(|(before, _)| *before == old) {
            return *new;
        }
        let new = self.objects.ages.next_batch();
        again.push((old, new));
        new
    }

    /// Starts a search among all that is listed now.
    pub(crate) fn search_victims(&self) -> Search {
        Search { idle: self.idle_stores(), end: self.objects.ages.end() }
    }

    /// The next cluster to evict, and the objects that have pages of it.
    pub(crate) fn next_victim(&mut self, search: &mut Search) -> Option<(StoreId, GfnRange, Vec<ObjectId>)> {
        let of_idle = loop {
            let Some(&store) = search.idle.last() else { break None };
            match self.objects.ages.take_of(store, search.end) {
                None => search.idle.pop(),
                found => break found,
            };
        };
        let (store, pages) = of_idle.or_else(|| self.objects.ages.take_oldest(search.end))?;
        Some((store, pages, self.objects.owners(store).map(|(object, _)| object).collect()))
    }

    /// A cluster of a search could not be evicted.
    pub(crate) fn keep_victim(&mut self, store: StoreId, pages: GfnRange) {
        self.objects.ages.put_back(store, pages);
    }

    /// Stores with pages that only idle VMs see, as far as chains tell; the oldest last.
    fn idle_stores(&self) -> Vec<StoreId> {
        if self.vms.values().all(|vm| vm.pace == Pace::Running) {
            return Vec::new();
        }
        let mut busy: BTreeSet<ObjectId> = BTreeSet::new();
        for vm in self.vms.values().filter(|vm| vm.pace == Pace::Running) {
            for (_, entry) in vm.map.iter() {
                self.objects.chain(entry.object).take_while(|&object| busy.insert(object)).for_each(drop);
            }
        }
        let is_busy = |store: &StoreId| self.objects.owners(*store).any(|(object, _)| busy.contains(&object));
        let mut idle: Vec<StoreId> = self.objects.ages.stores().filter(|store| !is_busy(store)).collect();
        idle.reverse();
        idle
    }
}

/// The cluster that a page of an object is in.
pub(crate) fn cluster_of(page: Gfn) -> GfnRange {
    GfnRange::new(Gfn(page.0 / CLUSTER.0 * CLUSTER.0), CLUSTER)
}

/// Cuts pages at the borders of clusters.
pub(crate) fn by_clusters(pages: GfnRange) -> impl Iterator<Item = GfnRange> {
    let first = cluster_of(pages.start()).start().0;
    (first..pages.end().0).step_by(CLUSTER.0 as usize).map(move |at| GfnRange::new(Gfn(at), CLUSTER).intersect(pages))
}

/// How many pages.
pub(crate) fn count(victims: &[Victim]) -> PageCount {
    PageCount(victims.iter().map(|victim| victim.pages.count().0).sum())
}
