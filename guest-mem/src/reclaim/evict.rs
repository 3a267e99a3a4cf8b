//! Evict: stored pages go to swap, and leave holes that trap.
//!
//! No table and no window is changed, however many VMs look: they go on mapping the store, which has a hole now. A page
//! that has been to swap before is there still, and is not written again. Frozen bytes never change, so there is no
//! write to race with. What nobody sees any more, as the reverse map tells, is freed instead.

use crate::addr::cluster::{cluster_of, pages_of};
use crate::addr::{PageCount, PageIndex, PageRange};
use crate::effect::{Effect, Effects};
use crate::family::Family;
use crate::ids::{Batch, ObjectId, StoreId, SwapSlot};
use crate::object::{ObjectKind, Slot, SwapBase};
use crate::reclaim::queue::Turn;

/// Neighbouring pages of an object to evict, all in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim {
    pub(crate) object: ObjectId,
    /// The pages, as they count in the object and in the store.
    pub pages: PageRange,
    /// The store that has them.
    pub store: StoreId,
    /// Where they are in swap already.
    pub(crate) clean: Option<SwapBase>,
}

impl Victim {
    /// Whether the pages are in swap already.
    pub fn is_clean(&self) -> bool {
        self.clean.is_some()
    }
}

impl Family {
    /// What can be evicted of an object's pages. They are of one cluster. Nothing of a file's: [its store](crate::store::file) is
    /// other families' too.
    pub fn victims(&self, object: ObjectId, pages: PageRange) -> Vec<Victim> {
        debug_assert_eq!(cluster_of(pages.start()).intersect(pages), pages, "one cluster at a time");
        if self.objects.get(object).kind != ObjectKind::Anonymous {
            return Vec::new();
        }
        let slots = self.objects.slots_in(object, pages);
        slots
            .filter_map(|(pages, slot)| Some(Victim { object, pages, store: slot.resident()?, clean: slot.swap() }))
            .collect()
    }

    /// These pages of one cluster are in swap: those that were not there before in consecutive slots from `put` on.
    pub fn evicted(&mut self, victims: &[Victim], put: Option<SwapSlot>, effects: &mut Effects) {
        let mut next = put.map(|slot| (slot, self.objects.accounts.queue.next_batch()));
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
    pub(crate) fn new_base(&mut self, slot: SwapSlot, first: PageIndex) -> SwapBase {
        SwapBase::new(slot, first, self.objects.accounts.queue.next_batch())
    }

    /// The number that pages of the eviction `old` get now: one for all of them, since they are read together.
    fn batch_again(&mut self, old: Batch, again: &mut Vec<(Batch, Batch)>) -> Batch {
        if let Some((_, new)) = again.iter().find(|(before, _)| *before == old) {
            return *new;
        }
        let new = self.objects.accounts.queue.next_batch();
        again.push((old, new));
        new
    }

    /// Where a search for victims ends that begins now.
    pub(crate) fn search_victims(&self) -> Turn {
        self.objects.accounts.queue.end()
    }

    /// The next cluster to evict, and the objects that have pages of it. What only idle VMs see, as far as chains tell,
    /// goes first. What a freeze has hidden from everybody, and nobody has [tidied up](Self::tidy), is freed here.
    pub(crate) fn next_victim(
        &mut self,
        end: Turn,
        effects: &mut Effects,
    ) -> Option<(StoreId, PageRange, Vec<ObjectId>)> {
        let queue = &mut self.objects.accounts.queue;
        let (store, pages) = queue.take_idle().or_else(|| queue.take_oldest(end))?;
        if !self.is_tidy() {
            self.free_suspects(vec![(store, pages)], effects);
        }
        Some((store, pages, self.objects.accounts.owners(store).map(|(object, _)| object).collect()))
    }

    /// A cluster of a search could not be evicted.
    pub(crate) fn keep_victim(&mut self, store: StoreId, pages: PageRange) {
        self.objects.accounts.queue.put_back(store, pages);
    }

    /// Gives up slots in swap of pages that are in memory as well, about so many. How many.
    pub(crate) fn reclaim_swap_cache(&mut self, limit: PageCount, effects: &mut Effects) -> PageCount {
        let mut given = PageCount(0);
        while given < limit
            && let Some((store, cluster)) = self.objects.accounts.clean.pop_last()
        {
            let owners: Vec<ObjectId> = self.objects.accounts.owners(store).map(|(object, _)| object).collect();
            for object in owners {
                let slots: Vec<_> = self.objects.slots_in(object, pages_of(cluster)).collect();
                for (pages, slot) in slots {
                    if let Slot::Clean(of, base) = slot
                        && of == store
                    {
                        self.objects.advance(object, pages, Slot::Resident(store), effects);
                        effects.push(Effect::FreeSwap(base.slot(pages.start()), pages.count()));
                        given.0 += pages.count().0;
                    }
                }
            }
        }
        given
    }
}

/// How many pages.
pub(crate) fn count(victims: &[Victim]) -> PageCount {
    PageCount(victims.iter().map(|victim| victim.pages.count().0).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Gfn, GfnRange};
    use crate::ids::Activity;
    use crate::ops::Placed;
    use crate::stage2::Shape;
    use crate::window::Harvest;

    /// A family of so many VMs, each with 4 clusters of its own in a store; every second one is idle.
    fn family(vms: usize) -> Family {
        let ram = GfnRange::new(Gfn(0), PageCount(64));
        let mut family = Family::new(Shape::X86_64);
        let mut effects = Effects::default();
        let mut all = vec![family.launch(&[ram], &[])];
        while all.len() < vms {
            all.push(family.fork(all[0], 1000));
        }
        for (index, &vm) in all.iter().enumerate() {
            family.begin_freeze(vm);
            family.finish_freeze(
                vm,
                &Harvest { moved: vec![ram], moved_private: vec![ram], ..Harvest::default() },
                PageCount(0),
                &mut effects,
            );
            if index % 2 == 1 {
                family.set_activity(vm, Activity::Idle);
            }
        }
        while let Some(job) = family.next_job(PageCount(64)) {
            family.written_back(&job, &[(job.pages, Placed::Stored)], &mut effects);
        }
        family.check_invariants().unwrap();
        family
    }

    /// A freeze hid pages from everybody, and eviction wrote them to swap, or had to tidy up all that freezes had left first.
    #[test]
    fn what_nobody_sees_is_freed_and_not_written() {
        let mut family = family(1);
        let vm = family.vms().next().expect("one").0;
        let old = family.objects.accounts.stores.keys().next().copied().expect("one");
        // The next freeze stacks an object of its own, and hides the other's pages from everybody.
        let child = family.fork(vm, 1000);
        family.exit(child, &mut Effects::default());
        family.begin_freeze(vm);
        let moved = vec![GfnRange::from(0..40)];
        let harvest = Harvest { moved_private: moved.clone(), moved, ..Harvest::default() };
        family.finish_freeze(vm, &harvest, PageCount(0), &mut Effects::default());
        assert!(!family.is_tidy());
        let (mut effects, mut victims) = (Effects::default(), 0);
        let end = family.search_victims();
        while let Some((store, pages, objects)) = family.next_victim(end, &mut effects) {
            let found = objects.iter().flat_map(|&object| family.victims(object, pages));
            victims += found.filter(|victim| victim.store == old).count();
            family.keep_victim(store, pages);
        }
        assert_eq!(victims, 2, "pages 40 to 63");
        let freed = effects.0.iter().filter_map(|effect| match effect {
            Effect::Punch(store, pages) if *store == old => Some(pages.count().0),
            _ => None,
        });
        assert_eq!(freed.sum::<u64>(), 40);
        family.check_invariants().unwrap();
    }

    /// Choosing a victim takes as many steps however many VMs there are, with idle ones among them and without.
    #[test]
    fn a_choice_costs_the_same_with_ten_and_with_a_thousand() {
        for vms in [10, 1000] {
            let mut family = family(vms);
            for activity in [Activity::Idle, Activity::Running] {
                if activity == Activity::Running {
                    let all: Vec<_> = family.vms().map(|(id, _)| id).collect();
                    all.into_iter().for_each(|vm| family.set_activity(vm, Activity::Running));
                }
                // So many that the queue is cleared of what is out of date now and then.
                let choices = 4 * 4 * vms as u64;
                let before = family.objects.accounts.queue.steps;
                for _ in 0..choices {
                    let end = family.search_victims();
                    let (store, pages, objects) =
                        family.next_victim(end, &mut Effects::default()).expect("there are victims");
                    assert_eq!(objects.len(), 1);
                    family.keep_victim(store, pages);
                }
                let steps = family.objects.accounts.queue.steps - before;
                assert!(steps <= 4 * choices, "{vms} VMs, {activity:?}: {steps} steps for {choices} choices");
                family.check_invariants().unwrap();
            }
        }
    }
}
