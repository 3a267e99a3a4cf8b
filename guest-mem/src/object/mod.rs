//! Objects: logical memory, stacked copy-on-write (Dillon 2000).
//!
//! An object is a range of pages, each in a [`Slot`] or absent; what is absent is looked for in its *backing* object.
//! Every object is frozen: its bytes never change. What a VM has written since its last freeze is not in an object yet. The
//! one exception is [shared memory](ObjectKind::Shared), which is never frozen.
//!
//! Objects know nothing of stage-2 tables and of windows. They own the accounts of the stores: a store ends with the
//! last slot that names it, and a scratch range with the last page that waits in it.

mod chain;
mod collapse;
mod slot;
mod users;
mod zeros;

pub(crate) use chain::shift_down;
pub use chain::{Found, Segment};
pub use slot::{Loss, Slot, SwapBase};
pub(crate) use users::User;
pub(crate) use zeros::ZERO_CLUSTER;
use zeros::ZeroRuns;

use crate::addr::cluster::clusters;
use crate::addr::page_map::PageMap;
use crate::addr::{GfnRange, PageCount};
use crate::effect::{Effect, Effects};
use crate::ids::ObjectId;
use crate::ids::{Activity, VmId};
use crate::ids::{Run, Source, StoreId};
use crate::reclaim::queue::ReclaimQueue;
use crate::steps::step;
use rangemap::RangeSet;
use std::collections::{BTreeMap, BTreeSet};

/// What lies beneath an object: its page `i` over page `i - origin` of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The object beneath.
    pub object: ObjectId,
    /// Index, in the object on top, of the page over page 0 of the one beneath.
    pub origin: u64,
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
    /// Entries of VMs that run, and shadows that are busy: somebody may need a page of it soon.
    pub(crate) active: u32,
    pub(crate) slots: PageMap<Slot>,
    /// What the accounts of stores call these slots.
    slots_id: SlotsId,
    /// Slots that are copy-ups.
    pub(crate) copy_ups: u64,
    /// Where write-back goes on: most likely where somebody needs pages next.
    writeback_from: u64,
}

/// Names the slots of an object in the accounts of stores: they may become another object's as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SlotsId(u32);

/// The accounts of a store.
#[derive(Debug)]
pub(crate) struct StoreAccount {
    pub(crate) kind: ObjectKind,
    /// Slots that name it, by object: as many objects as the freeze found map entries, at most.
    slots: BTreeMap<SlotsId, u64>,
    /// Those among them of busy objects.
    pub(crate) active: u32,
    /// Slots of them whose page is in the store.
    pub(crate) resident: u64,
    /// Slots of them whose page is in swap only.
    pub(crate) swapped: u64,
    /// Slots of them that have still to be copied from below.
    pub(crate) copy_ups: u64,
    /// Slots of them whose page is still in a scratch range, and whose.
    pub(crate) scratch: Option<ScratchAccount>,
    /// Pages that were bound for it and have turned out zero.
    zeros: ZeroRuns,
}

/// Slots that accounts know by a name.
#[derive(Debug)]
struct Owner {
    /// Whose they are.
    object: ObjectId,
    /// The stores whose accounts know them.
    stores: BTreeSet<StoreId>,
}

/// Pages that have not been written back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScratchAccount {
    pub(crate) holder: VmId,
    pub(crate) left: u64,
}

/// All objects of a family and the accounts of their stores.
#[derive(Debug, Default)]
pub struct Objects {
    objects: slab::Slab<Object>,
    /// Whose the slots are that accounts know by a name.
    owners: slab::Slab<Owner>,
    pub(crate) stores: BTreeMap<StoreId, StoreAccount>,
    /// How often windows that are made have come to need less of some store: a long stretch of its pages has turned out zero, or
    /// it has gone.
    pub(crate) hollowed: u64,
    /// Objects with pending slots.
    pub(crate) pending: BTreeSet<ObjectId>,
    /// Those among them whose next page is on its way: being read from swap, or still to be copied by its window.
    pub(crate) put_off: BTreeSet<ObjectId>,
    /// The object of which somebody waited for a page last.
    pub(crate) last_faulted: Option<ObjectId>,
    /// Scratch ranges that are in use, by the VMs that hold them.
    scratches: BTreeMap<VmId, u32>,
    /// Pages that copy-ups were to be copied from and are not any more: perhaps nobody needs them.
    unneeded: Vec<(StoreId, GfnRange)>,
    /// Which stored pages are evicted next.
    pub(crate) queue: ReclaimQueue,
    /// Clusters that may have clean pages, by store: their slots in swap can be given up.
    pub(crate) clean: BTreeSet<(StoreId, u64)>,
    /// Pages in the stores of anonymous objects.
    pub(crate) resident_pages: u64,
    /// Slots whose pages are lost.
    pub(crate) lost: u64,
    /// Pages that were freed in swap since nobody saw them.
    pub(crate) discarded: u64,
}

impl StoreAccount {
    fn new(kind: ObjectKind, scratch: Option<ScratchAccount>) -> Self {
        Self {
            kind,
            slots: BTreeMap::new(),
            active: 0,
            resident: 0,
            swapped: 0,
            copy_ups: 0,
            scratch,
            zeros: ZeroRuns::default(),
        }
    }
}

impl StoreAccount {
    /// An object with slots of it has become busy, or is not any more: where none is, its pages are evicted first.
    fn count_active(&mut self, store: StoreId, now: Activity, queue: &mut ReclaimQueue) {
        match now {
            Activity::Running => self.active += 1,
            Activity::Idle => self.active -= 1,
        }
        if self.kind == ObjectKind::Anonymous {
            queue.set_idle(store, self.active == 0);
        }
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
        self.stores.insert(store, StoreAccount::new(kind, None));
        let id = self.insert(kind, None);
        if pages.0 > 0 {
            self.put(id, (0..pages.0).into(), Slot::Resident(store));
        }
        id
    }

    /// Opens the account of a freeze's store, whose pages wait with `holder`.
    pub(crate) fn open_store(&mut self, store: StoreId, holder: VmId) {
        let scratch = Some(ScratchAccount { holder, left: 0 });
        self.stores.insert(store, StoreAccount::new(ObjectKind::Anonymous, scratch));
        self.queue.set_idle(store, true);
        *self.scratches.entry(holder).or_default() += 1;
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
        let slots_id = SlotsId(self.owners.insert(Owner { object: id, stores: BTreeSet::new() }) as u32);
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

    /// One more of those who show `id` is busy. Costs as many steps as objects become busy.
    pub(crate) fn inc_active(&mut self, id: ObjectId) {
        let mut next = Some(id);
        while let Some(id) = next {
            let object = self.get_mut(id);
            object.active += 1;
            next = object.backing.map(|backing| backing.object).filter(|_| object.active == 1);
            if object.active == 1 {
                self.tell_stores(id, Activity::Running);
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
                self.tell_stores(id, Activity::Idle);
            }
        }
    }

    /// An object has become busy, or idle: so may stores.
    fn tell_stores(&mut self, id: ObjectId, now: Activity) {
        let owner = &self.owners[self.get(id).slots_id.0 as usize];
        for store in &owner.stores {
            let account = self.stores.get_mut(store).expect("slots name stores with accounts");
            account.count_active(*store, now, &mut self.queue);
        }
    }

    /// Gives absent pages a slot.
    pub(crate) fn put(&mut self, id: ObjectId, pages: GfnRange, slot: Slot) {
        self.put_all(id, [pages], slot);
    }

    /// Gives many absent stretches a slot of this kind.
    pub(crate) fn put_all(&mut self, id: ObjectId, all: impl IntoIterator<Item = GfnRange>, slot: Slot) {
        let mut count = 0;
        let counted = all.into_iter().inspect(|pages| count += pages.count().0);
        self.get_mut(id).slots.insert(counted, slot);
        if count == 0 {
            return;
        }
        if slot.is_pending() {
            self.pending.insert(id);
        }
        self.charge(id, slot, count);
    }

    /// Says of absent pages that they are zero, which windows map `store` at.
    pub(crate) fn put_zeros(&mut self, id: ObjectId, pages: &[GfnRange], store: StoreId) {
        let account = self.stores.get_mut(&store).expect("a freeze opens its store's account");
        let long = pages.iter().filter(|&&pages| account.zeros.add(pages)).count();
        self.hollowed += long as u64;
        self.put_all(id, pages.iter().copied(), Slot::Zero);
    }

    /// Moves pages from one state to the next. Their storage goes with them where it stays the same store.
    pub(crate) fn advance(&mut self, id: ObjectId, pages: GfnRange, to: Slot, effects: &mut Effects) {
        let old: Vec<(GfnRange, Slot)> = self.slots_in(id, pages).collect();
        let held: u64 = old.iter().map(|(part, _)| part.count().0).sum();
        assert_eq!(held, pages.count().0, "only pages that have a slot move on");
        self.charge(id, to, held);
        self.get_mut(id).slots.replace(pages, to);
        match to {
            Slot::Resident(store) => self.queue.written_back(store, pages),
            Slot::Clean(store, _) => self.clean.extend(clusters(pages).map(|cluster| (store, cluster))),
            _ => {}
        }
        for (part, slot) in old {
            assert!(slot.may_become(to), "a page that is {slot:?} does not become {to:?}");
            if let (Slot::Zero, Some(store)) = (to, slot.store()) {
                let account = self.stores.get_mut(&store).expect("a slot names a store with an account");
                self.hollowed += u64::from(account.zeros.add(part));
            }
            if let Slot::CopyUp(_, source) = slot {
                self.end_copy_up(source, part);
            }
            self.discharge(id, slot, part.count().0, effects);
        }
    }

    /// Makes pages absent and frees their storage: nobody sees them.
    pub(crate) fn vacate(&mut self, id: ObjectId, pages: GfnRange, effects: &mut Effects) {
        let old: Vec<(GfnRange, Slot)> = self.slots_in(id, pages).collect();
        if old.is_empty() {
            return;
        }
        self.get_mut(id).slots.remove(pages);
        old.into_iter().for_each(|(part, slot)| self.free(id, [part], slot, effects));
    }

    /// Frees the storage of pages that had `slot`.
    fn free(&mut self, id: ObjectId, all: impl IntoIterator<Item = GfnRange>, slot: Slot, effects: &mut Effects) {
        let of_family = |store: &StoreId| self.stores[store].kind == ObjectKind::Anonymous;
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
            self.discarded += swapped.map_or(0, |_| count);
            self.discharge(id, slot, count, effects);
        }
    }

    /// These pages are not copy-ups any more.
    fn end_copy_up(&mut self, source: Source, pages: GfnRange) {
        let sources = self.copy_up_sources(source, pages).filter_map(|(found, part)| Some((found.slot.store()?, part)));
        let sources: Vec<_> = sources.collect();
        self.unneeded.extend(sources);
    }

    /// What copy-ups over `source` are to be copied from, and which pages of that.
    pub(crate) fn copy_up_sources(&self, source: Source, pages: GfnRange) -> impl Iterator<Item = (Found, GfnRange)> {
        let segments = match source {
            Source::Store { store, origin } => self.stored(store, origin, pages),
            // No freeze takes shared memory, so nothing is copied up from it.
            Source::Anonymous | Source::Shared { .. } => Vec::new(),
        };
        segments.into_iter().filter_map(|segment| segment.found.map(|found| (found, found.indexes(segment.pages))))
    }

    /// The part of an object's pages that a copy-up above is to be copied from.
    pub(crate) fn pending_copy_sources(&self, object: ObjectId, pages: GfnRange) -> RangeSet<u64> {
        let mut waited = RangeSet::new();
        for &above in self.pending.iter().filter(|&&above| self.has_copy_ups(above)) {
            for (gap, slot) in self.slots_in(above, pages) {
                let Slot::CopyUp(_, source) = slot else { continue };
                let sources = self.copy_up_sources(source, gap).filter(|(found, _)| found.object == object);
                waited.extend(sources.map(|(_, part)| part.raw()));
            }
        }
        waited
    }

    /// Pages that no copy-up is to be copied from any more, since it was last asked.
    pub(crate) fn take_unneeded(&mut self) -> Vec<(StoreId, GfnRange)> {
        std::mem::take(&mut self.unneeded)
    }

    /// How many slots name a store, by object.
    pub(crate) fn owners(&self, store: StoreId) -> impl Iterator<Item = (ObjectId, u64)> {
        let slots = self.stores.get(&store).into_iter().flat_map(|account| &account.slots);
        slots.map(|(slots_id, &count)| (self.owners[slots_id.0 as usize].object, count))
    }

    /// The stores that slots of an object name.
    pub(crate) fn stores_of(&self, id: ObjectId) -> impl Iterator<Item = StoreId> {
        self.owners[self.get(id).slots_id.0 as usize].stores.iter().copied()
    }

    /// The slots of `pages`, cut to them.
    pub(crate) fn slots_in(&self, id: ObjectId, pages: GfnRange) -> impl Iterator<Item = (GfnRange, Slot)> {
        self.get(id).slots.within(pages)
    }

    /// The pending slot of `id` that is to be written back next, and its pages, at most `limit`: the first one from where
    /// somebody waited last, or else the first one.
    pub(crate) fn next_pending(&mut self, id: ObjectId, limit: PageCount) -> Option<(GfnRange, Slot)> {
        let object = self.get_mut(id);
        let from = object.writeback_from;
        let first = |pages: std::ops::Range<u64>| object.slots.parts(pages.into()).find(|(_, slot)| slot.is_pending());
        let Some((pages, _)) = first(from..u64::MAX).or_else(|| first(0..from)) else {
            object.writeback_from = 0;
            self.pending.remove(&id);
            self.put_off.remove(&id);
            return None;
        };
        object.writeback_from = pages.start().0;
        object.slots.within(GfnRange::new(pages.start(), limit)).next()
    }

    /// Somebody has waited for these pages of `id`, and most likely needs the next ones soon. Whether they are those that
    /// would have been next anyway, or almost.
    pub(crate) fn writeback_from(&mut self, id: ObjectId, pages: std::ops::Range<u64>) -> bool {
        const NEAR: u64 = 128;
        let Some(object) = self.objects.get_mut(id.0 as usize) else { return false };
        self.last_faulted = Some(id);
        let from = std::mem::replace(&mut object.writeback_from, pages.end);
        (from..from + NEAR).contains(&pages.start)
    }

    fn charge(&mut self, id: ObjectId, slot: Slot, count: u64) {
        let Some(store) = slot.store() else { return };
        let (slots_id, active) = (self.get(id).slots_id, self.get(id).active > 0);
        let account = self.stores.get_mut(&store).expect("a slot names a store with an account");
        let held = account.slots.entry(slots_id).or_default();
        let is_new = *held == 0;
        *held += count;
        if is_new {
            self.owners[slots_id.0 as usize].stores.insert(store);
            if active {
                account.count_active(store, Activity::Running, &mut self.queue);
            }
        }
        if slot.resident().is_some() && account.kind == ObjectKind::Anonymous {
            self.resident_pages += count;
        }
        match slot {
            Slot::InFlight(_) => account.scratch.as_mut().expect("a freeze has a scratch range").left += count,
            Slot::Resident(_) | Slot::Clean(..) => account.resident += count,
            Slot::Swapped(..) => account.swapped += count,
            Slot::CopyUp(..) => {
                account.copy_ups += count;
                self.get_mut(id).copy_ups += count;
            }
            Slot::Lost(..) => self.lost += count,
            Slot::Zero => {}
        }
    }

    fn discharge(&mut self, id: ObjectId, slot: Slot, count: u64, effects: &mut Effects) {
        if slot.is_pending() {
            // It may be one of these pages that the object was put off for: nobody will tell of it any more.
            self.put_off.remove(&id);
        }
        let Some(store) = slot.store() else { return };
        let (slots_id, active) = (self.get(id).slots_id, self.get(id).active > 0);
        let account = self.stores.get_mut(&store).expect("a slot names a store with an account");
        let held = account.slots.get_mut(&slots_id).expect("an account knows whose pages it has");
        *held -= count;
        if *held == 0 {
            account.slots.remove(&slots_id);
            self.owners[slots_id.0 as usize].stores.remove(&store);
            if active {
                account.count_active(store, Activity::Idle, &mut self.queue);
            }
        }
        if slot.resident().is_some() && account.kind == ObjectKind::Anonymous {
            self.resident_pages -= count;
        }
        match slot {
            Slot::InFlight(_) => account.scratch.as_mut().expect("a freeze has a scratch range").left -= count,
            Slot::Resident(_) | Slot::Clean(..) => account.resident -= count,
            Slot::Swapped(..) => account.swapped -= count,
            Slot::CopyUp(..) => {
                account.copy_ups -= count;
                self.get_mut(id).copy_ups -= count;
            }
            Slot::Lost(..) => self.lost -= count,
            Slot::Zero => {}
        }
        self.close_account(store, effects);
    }

    /// Closes the scratch range and the account of a store that need not be open any more.
    fn close_account(&mut self, store: StoreId, effects: &mut Effects) {
        let account = self.stores.get_mut(&store).expect("a store has an account");
        if let Some(ScratchAccount { holder, left: 0 }) = account.scratch {
            account.scratch = None;
            effects.push(Effect::DropScratch(holder, store));
            let open = self.scratches.get_mut(&holder).expect("a holder's scratch ranges are counted");
            *open -= 1;
            if *open == 0 {
                self.scratches.remove(&holder);
            }
        }
        if account.slots.is_empty() {
            self.stores.remove(&store);
            self.hollowed += 1;
            self.queue.forget(store);
            let gone: Vec<(StoreId, u64)> = self.clean.range((store, 0)..=(store, u64::MAX)).copied().collect();
            for cluster in gone {
                self.clean.remove(&cluster);
            }
            effects.push(Effect::DropStore(store));
        }
    }

    /// Whether all pages of a freeze's store are where they belong.
    pub fn is_written_back(&self, store: StoreId) -> bool {
        self.stores.get(&store).is_none_or(|account| account.copy_ups == 0 && account.scratch.is_none())
    }

    /// Whether pages cannot be written back before others have come that are on their way.
    pub fn waits_for_others(&self) -> bool {
        !self.put_off.is_empty()
    }

    /// The pages that are in a store, object by object.
    pub(crate) fn resident_in(&self, store: StoreId) -> Vec<GfnRange> {
        let slots = self.owners(store).flat_map(|(object, _)| self.get(object).slots.iter());
        slots.filter(|(_, slot)| slot.resident() == Some(store)).map(|(pages, _)| pages).collect()
    }

    /// Whether pages of a window of `holder` are waited for.
    pub(crate) fn waits_for(&self, holder: VmId) -> bool {
        self.scratches.contains_key(&holder)
    }

    /// The pages of `store` that have turned out zero; none where it has gone, and all that anybody sees of it are.
    pub(crate) fn zeros(&self, store: StoreId) -> Option<&ZeroRuns> {
        self.stores.get(&store).map(|account| &account.zeros)
    }

    /// Whether all pages that these runs show are zero.
    pub(crate) fn are_zero(&self, run: &Run) -> bool {
        match run.source {
            Source::Anonymous => true,
            Source::Store { store, origin } => {
                self.zeros(store).is_none_or(|zeros| zeros.covers(shift_down(run.pages, origin)))
            }
            Source::Shared { .. } => false,
        }
    }
}
