//! Objects: logical memory, stacked copy-on-write (Dillon 2000).
//!
//! An object is a range of pages, each in a [`Slot`] or absent; what is absent is looked for in its *backing* object.
//! Every object is frozen: its bytes never change. What a VM has written since its last freeze is not in an object yet. The
//! one exception is [shared memory](ObjectKind::Shared), which is never frozen.
//!
//! Objects know nothing of stage-2 tables and of windows. They own the accounts of the stores: a store ends with the
//! last slot that names it, and a scratch range with the last page that waits in it.

pub(crate) mod accounts;
mod chain;
mod collapse;
mod pending;
mod slot;
mod users;
mod zeros;

use accounts::{Accounts, SlotsId};
pub use chain::{Found, Segment};
use pending::WritebackQueue;
pub use slot::{Loss, Slot, SwapBase};
pub(crate) use users::User;
pub(crate) use zeros::ZERO_CLUSTER;

use crate::addr::cluster::clusters;
use crate::addr::page_map::PageMap;
use crate::addr::{PageCount, PageIndex, PageOrigin, PageRange};
use crate::effect::{Effect, Effects};
use crate::ids::{Activity, ObjectId, Source, StoreId, VmId};
use crate::steps::step;
use rangemap::RangeSet;
use std::collections::{BTreeMap, BTreeSet};

/// What lies beneath an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The object beneath.
    pub object: ObjectId,
    /// Page `i + origin` of the object on top lies over its page `i`.
    pub origin: PageOrigin,
}

/// Kinds of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectKind {
    /// What VMs of the family wrote.
    Anonymous,
    /// A file: frozen from birth, all its pages in one store that belongs to no family.
    File,
    /// Shared memory: all its pages in one store, which those who map it write. It is never frozen, so nothing of it is taken
    /// by a freeze, written to swap, or stacked on.
    Shared,
}

/// A range of pages in its place in the forest.
#[derive(Debug)]
pub struct Object {
    pub(crate) kind: ObjectKind,
    pub(crate) backing: Option<Backing>,
    /// Objects stacked directly on this one.
    pub(crate) shadows: BTreeSet<ObjectId>,
    /// Whose map entries show this object, and how many of each: its space's *list of all vmas that use it* (Lokier 2000).
    pub(crate) mappings: BTreeMap<VmId, u32>,
    /// Entries of VMs that run, and shadows that are active: somebody may need a page of it soon.
    pub(crate) active: u32,
    pub(crate) slots: PageMap<PageIndex, Slot>,
    /// What the accounts of stores call these slots.
    slots_id: SlotsId,
    /// Slots that are copy-ups.
    pub(crate) copy_ups: u64,
    /// Where write-back goes on: most likely where somebody needs pages next.
    writeback_from: u64,
}

/// All objects of a family: the forest, with the accounts of its stores and the queue of what is written back.
#[derive(Debug, Default)]
pub struct Objects {
    objects: slab::Slab<Object>,
    /// What stores hold, and for whom.
    pub(crate) accounts: Accounts,
    /// What has still to get into its store.
    pub(crate) writeback: WritebackQueue,
    /// Objects that nothing needs, or only the one above, and that have something yet.
    pub(crate) untidy: BTreeSet<ObjectId>,
}

impl Object {
    /// Whether somebody may need a page of it soon.
    fn activity(&self) -> Activity {
        if self.active > 0 { Activity::Running } else { Activity::Idle }
    }
}

impl Objects {
    /// A file of `pages` pages, in the store `store`.
    pub(crate) fn add_file(&mut self, store: StoreId, pages: PageCount) -> ObjectId {
        self.add_whole(ObjectKind::File, store, pages)
    }

    /// Shared memory of `pages` pages, in the store `store`. The books count all its pages as if they were there: which are is
    /// up to those who write them.
    pub(crate) fn add_shared(&mut self, store: StoreId, pages: PageCount) -> ObjectId {
        self.add_whole(ObjectKind::Shared, store, pages)
    }

    fn add_whole(&mut self, kind: ObjectKind, store: StoreId, pages: PageCount) -> ObjectId {
        self.accounts.open_whole(store, kind);
        let id = self.insert(kind, None);
        if pages.0 > 0 {
            self.put(id, (0..pages.0).into(), Slot::Resident(store));
        }
        id
    }

    /// An empty anonymous object over `backing`.
    pub(crate) fn stack(&mut self, backing: Option<Backing>) -> ObjectId {
        let id = self.insert(ObjectKind::Anonymous, backing);
        if let Some(backing) = backing {
            self.get_mut(backing.object).shadows.insert(id);
        }
        id
    }

    fn insert(&mut self, kind: ObjectKind, backing: Option<Backing>) -> ObjectId {
        let entry = self.objects.vacant_entry();
        let id = ObjectId(entry.key() as u32);
        let slots_id = self.accounts.name_slots(id);
        let (slots, shadows, mappings) = (PageMap::default(), BTreeSet::new(), BTreeMap::new());
        let object =
            Object { kind, backing, shadows, mappings, active: 0, slots, slots_id, copy_ups: 0, writeback_from: 0 };
        entry.insert(object);
        id
    }

    /// An object.
    pub fn get(&self, id: ObjectId) -> &Object {
        step();
        &self.objects[id.0 as usize]
    }

    fn get_mut(&mut self, id: ObjectId) -> &mut Object {
        &mut self.objects[id.0 as usize]
    }

    /// All objects.
    pub fn iter(&self) -> impl Iterator<Item = (ObjectId, &Object)> {
        self.objects.iter().map(|(id, object)| (ObjectId(id as u32), object))
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// One more map entry, of this VM of this pace, shows `id`.
    pub(crate) fn map(&mut self, id: ObjectId, vm: VmId, activity: Activity) {
        *self.get_mut(id).mappings.entry(vm).or_default() += 1;
        if activity == Activity::Running {
            self.inc_active(id);
        }
    }

    /// One more of those who show `id` is active. Costs as many steps as objects become active.
    pub(crate) fn inc_active(&mut self, id: ObjectId) {
        let mut next = Some(id);
        while let Some(id) = next {
            let object = self.get_mut(id);
            object.active += 1;
            next = object.backing.map(|backing| backing.object).filter(|_| object.active == 1);
            if object.active == 1 {
                let slots_id = object.slots_id;
                self.accounts.set_activity(slots_id, Activity::Running);
            }
        }
    }

    /// One less is.
    pub(crate) fn dec_active(&mut self, id: ObjectId) {
        let mut next = Some(id);
        while let Some(id) = next {
            let object = self.get_mut(id);
            object.active -= 1;
            next = object.backing.map(|backing| backing.object).filter(|_| object.active == 0);
            if object.active == 0 {
                let slots_id = object.slots_id;
                self.accounts.set_activity(slots_id, Activity::Idle);
            }
        }
    }

    /// Slots of `id` have got this state.
    fn charge(&mut self, id: ObjectId, slot: Slot, count: u64) {
        if let Slot::CopyUp(_, source) = slot {
            self.get_mut(id).copy_ups += count;
            self.writeback.note_distance(source, count);
        }
        let object = self.get(id);
        let (slots_id, activity) = (object.slots_id, object.activity());
        self.accounts.charge(slots_id, activity, slot, count);
    }

    /// Slots of `id` have it no longer.
    fn discharge(&mut self, id: ObjectId, slot: Slot, count: u64, effects: &mut Effects) {
        if slot.is_pending() {
            // It may be one of these pages that the object was put off for: nobody will tell of it any more.
            self.writeback.put_off.remove(&id);
        }
        if let Slot::CopyUp(_, source) = slot {
            self.get_mut(id).copy_ups -= count;
            self.writeback.forget_distance(source, count);
        }
        let object = self.get(id);
        let (slots_id, activity) = (object.slots_id, object.activity());
        self.accounts.discharge(slots_id, activity, slot, count, effects);
    }

    /// Whether pages cannot be written back before others have come that are on their way.
    pub fn waits_for_others(&self) -> bool {
        !self.writeback.put_off.is_empty()
    }

    /// Gives absent pages a slot.
    pub(crate) fn put(&mut self, id: ObjectId, pages: PageRange, slot: Slot) {
        self.put_all(id, [pages], slot);
    }

    /// Gives many absent stretches a slot of this kind.
    pub(crate) fn put_all(&mut self, id: ObjectId, all: impl IntoIterator<Item = PageRange>, slot: Slot) {
        let mut count = 0;
        let counted = all.into_iter().inspect(|pages| count += pages.count().0);
        self.get_mut(id).slots.insert(counted, slot);
        if count == 0 {
            return;
        }
        if slot.is_pending() {
            self.writeback.pending.insert(id);
        }
        self.charge(id, slot, count);
    }

    /// Says of absent pages that they are zero, which windows map `store` at.
    pub(crate) fn put_zeros(&mut self, id: ObjectId, all: impl IntoIterator<Item = PageRange>, store: StoreId) {
        for pages in all {
            self.accounts.turned_zero(store, pages);
            self.put(id, pages, Slot::Zero);
        }
    }

    /// Moves pages from one state to the next. Their storage goes with them where it stays the same store.
    pub(crate) fn advance(&mut self, id: ObjectId, pages: PageRange, to: Slot, effects: &mut Effects) {
        let old: Vec<(PageRange, Slot)> = self.slots_in(id, pages).collect();
        let held: u64 = old.iter().map(|(part, _)| part.count().0).sum();
        assert_eq!(held, pages.count().0, "only pages that have a slot move on");
        self.charge(id, to, held);
        self.get_mut(id).slots.replace(pages, to);
        match to {
            Slot::Resident(store) => self.accounts.queue.written_back(store, pages),
            Slot::Clean(store, _) => self.accounts.clean.extend(clusters(pages).map(|cluster| (store, cluster))),
            _ => {}
        }
        for (part, slot) in old {
            assert!(slot.may_become(to), "a page that is {slot:?} does not become {to:?}");
            if let (Slot::Zero, Some(store)) = (to, slot.store()) {
                self.accounts.turned_zero(store, part);
            }
            if let Slot::CopyUp(_, source) = slot {
                self.end_copy_up(source, part);
            }
            self.discharge(id, slot, part.count().0, effects);
        }
    }

    /// Makes pages absent and frees their storage: nobody sees them.
    pub(crate) fn vacate(&mut self, id: ObjectId, pages: PageRange, effects: &mut Effects) {
        let old: Vec<(PageRange, Slot)> = self.slots_in(id, pages).collect();
        if old.is_empty() {
            return;
        }
        self.get_mut(id).slots.remove(pages);
        old.into_iter().for_each(|(part, slot)| self.free(id, [part], slot, effects));
    }

    /// Frees the storage of pages that had `slot`.
    fn free(&mut self, id: ObjectId, all: impl IntoIterator<Item = PageRange>, slot: Slot, effects: &mut Effects) {
        let of_family = |store: &StoreId| self.accounts.stores[store].kind == ObjectKind::Anonymous;
        let (stored, swapped) = (slot.resident().filter(of_family), slot.swap());
        let mut count = 0;
        for pages in all {
            stored.iter().for_each(|&store| effects.push(Effect::Punch(store, pages)));
            swapped.iter().for_each(|base| effects.push(Effect::FreeSwap(base.slot(pages.start()), pages.count())));
            if let Slot::CopyUp(_, source) = slot {
                self.end_copy_up(source, pages);
            }
            count += pages.count().0;
        }
        if count > 0 {
            self.accounts.discarded += swapped.map_or(0, |_| count);
            self.discharge(id, slot, count, effects);
        }
    }

    /// These pages are not copy-ups any more.
    fn end_copy_up(&mut self, source: Source, pages: PageRange) {
        let sources = self.copy_up_sources(source, pages).filter_map(|(found, part)| Some((found.slot.store()?, part)));
        let sources: Vec<_> = sources.collect();
        self.writeback.unneeded.extend(sources);
    }

    /// What copy-ups over `source` are to be copied from, and which pages of that.
    pub(crate) fn copy_up_sources(&self, source: Source, pages: PageRange) -> impl Iterator<Item = (Found, PageRange)> {
        let segments = match source {
            Source::Store { store, origin } => self.stored(store, origin, PageOrigin(0).frames(pages)),
            // No freeze takes shared memory, so nothing is copied up from it.
            Source::Anonymous | Source::Shared { .. } => Vec::new(),
        };
        segments.into_iter().filter_map(|segment| segment.found.map(|found| (found, found.indexes(segment.pages))))
    }

    /// The part of an object's pages that a copy-up above is to be copied from.
    pub(crate) fn pending_copy_sources(&self, object: ObjectId, pages: PageRange) -> RangeSet<u64> {
        let mut waited = RangeSet::new();
        for &above in self.writeback.pending.iter().filter(|&&above| self.has_copy_ups(above)) {
            for &distance in self.writeback.distances.keys() {
                for (copied, slot) in self.slots_in(above, distance.over(pages)) {
                    let Slot::CopyUp(_, source) = slot else { continue };
                    let sources = self.copy_up_sources(source, copied).filter(|(found, _)| found.object == object);
                    waited.extend(sources.map(|(_, part)| part.raw()));
                }
            }
        }
        waited
    }

    /// The stores that slots of an object name.
    pub(crate) fn stores_of(&self, id: ObjectId) -> impl Iterator<Item = StoreId> {
        self.accounts.stores_of(self.get(id).slots_id)
    }

    /// The slots of `pages`, cut to them.
    pub(crate) fn slots_in(&self, id: ObjectId, pages: PageRange) -> impl Iterator<Item = (PageRange, Slot)> {
        self.get(id).slots.within(pages)
    }

    /// The pending slot of `id` that is to be written back next, and its pages, at most `limit`: the first one from where
    /// somebody waited last, or else the first one.
    pub(crate) fn next_pending(&mut self, id: ObjectId, limit: PageCount) -> Option<(PageRange, Slot)> {
        let object = self.get_mut(id);
        let from = object.writeback_from;
        let first = |pages: std::ops::Range<u64>| object.slots.parts(pages.into()).find(|(_, slot)| slot.is_pending());
        let Some((pages, _)) = first(from..u64::MAX).or_else(|| first(0..from)) else {
            object.writeback_from = 0;
            self.writeback.pending.remove(&id);
            self.writeback.put_off.remove(&id);
            return None;
        };
        object.writeback_from = pages.start().0;
        object.slots.within(PageRange::new(pages.start(), limit)).next()
    }

    /// Somebody has waited for these pages of `id`, and most likely needs the next ones soon. Whether they are those that
    /// would have been next anyway, or almost.
    pub(crate) fn writeback_from(&mut self, id: ObjectId, pages: std::ops::Range<u64>) -> bool {
        const NEAR: u64 = 128;
        let Some(object) = self.objects.get_mut(id.0 as usize) else { return false };
        self.writeback.last_faulted = Some(id);
        let from = std::mem::replace(&mut object.writeback_from, pages.end);
        (from..from + NEAR).contains(&pages.start)
    }

    /// The pages that are in a store, object by object.
    pub(crate) fn resident_in(&self, store: StoreId) -> Vec<PageRange> {
        let slots = self.accounts.owners(store).flat_map(|(object, _)| self.get(object).slots.iter());
        slots.filter(|(_, slot)| slot.resident() == Some(store)).map(|(pages, _)| pages).collect()
    }
}
