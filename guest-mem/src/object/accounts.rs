//! The accounts of stores: a store ends with the last slot that names it, and a scratch range with the last page that waits in
//! it. What is counted here is counted where a slot changes, and nowhere else.

use super::zeros::ZeroRuns;
use super::{ObjectKind, Slot};
use crate::addr::PageRange;
use crate::effect::{Effect, Effects};
use crate::ids::{Activity, ObjectId, Run, Source, StoreId, VmId};
use crate::reclaim::queue::ReclaimQueue;
use std::collections::{BTreeMap, BTreeSet};

/// Names the slots of an object in the accounts of stores: they may become another object's as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SlotsId(u32);

/// The accounts of a store.
#[derive(Debug)]
pub(crate) struct StoreAccount {
    pub(crate) kind: ObjectKind,
    /// Slots that name it, by object: as many objects as the freeze found map entries, at most.
    slots: BTreeMap<SlotsId, u64>,
    /// Those among them of active objects.
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
    /// An object with slots of it has become active, or is not any more: where none is, its pages are evicted first.
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

/// Slots that accounts know by a name.
#[derive(Debug)]
pub(crate) struct Owner {
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

/// The accounts of all stores of a family, and what can be told of them together.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    /// Whose the slots are that accounts know by a name.
    pub(crate) owners: slab::Slab<Owner>,
    pub(crate) stores: BTreeMap<StoreId, StoreAccount>,
    /// How often windows that are made have come to need less of some store: a long stretch of its pages has turned out zero, or
    /// it has gone.
    pub(crate) hollowed: u64,
    /// Scratch ranges that are in use, by the VMs that hold them.
    pub(crate) scratches: BTreeMap<VmId, u32>,
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

impl Accounts {
    /// A name for the slots of an object.
    pub(super) fn name_slots(&mut self, object: ObjectId) -> SlotsId {
        SlotsId(self.owners.insert(Owner { object, stores: BTreeSet::new() }) as u32)
    }

    /// The slots of that name are `object`'s from now on.
    pub(super) fn give_slots(&mut self, slots_id: SlotsId, object: ObjectId) {
        self.owners[slots_id.0 as usize].object = object;
    }

    /// Nobody has slots of that name any more.
    pub(super) fn forget_slots(&mut self, slots_id: SlotsId) {
        self.owners.remove(slots_id.0 as usize);
    }

    /// The stores that slots of that name need.
    pub(super) fn stores_of(&self, slots_id: SlotsId) -> impl Iterator<Item = StoreId> {
        self.owners[slots_id.0 as usize].stores.iter().copied()
    }

    /// The object with these slots has become active, or idle: so may stores.
    pub(super) fn set_activity(&mut self, slots_id: SlotsId, now: Activity) {
        for store in &self.owners[slots_id.0 as usize].stores {
            let account = self.stores.get_mut(store).expect("slots name stores with accounts");
            account.count_active(*store, now, &mut self.queue);
        }
    }

    /// Pages where windows map `store` are zero.
    pub(super) fn turned_zero(&mut self, store: StoreId, pages: PageRange) {
        let account = self.stores.get_mut(&store).expect("a slot names a store with an account");
        self.hollowed += u64::from(account.zeros.add(pages));
    }

    /// Opens the account of a store that has all its pages from the beginning.
    pub(super) fn open_whole(&mut self, store: StoreId, kind: ObjectKind) {
        self.stores.insert(store, StoreAccount::new(kind, None));
    }

    /// Opens the account of a freeze's store, whose pages wait with `holder`.
    pub(crate) fn open_store(&mut self, store: StoreId, holder: VmId) {
        let scratch = Some(ScratchAccount { holder, left: 0 });
        self.stores.insert(store, StoreAccount::new(ObjectKind::Anonymous, scratch));
        self.queue.set_idle(store, true);
        *self.scratches.entry(holder).or_default() += 1;
    }

    /// Pages of these slots have come to need `store`.
    pub(crate) fn charge(&mut self, slots_id: SlotsId, activity: Activity, slot: Slot, count: u64) {
        let Some(store) = slot.store() else { return };
        let account = self.stores.get_mut(&store).expect("a slot names a store with an account");
        let held = account.slots.entry(slots_id).or_default();
        let is_new = *held == 0;
        *held += count;
        if is_new {
            self.owners[slots_id.0 as usize].stores.insert(store);
            if activity == Activity::Running {
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
            Slot::CopyUp(..) => account.copy_ups += count,
            Slot::Lost(..) => self.lost += count,
            Slot::Zero => {}
        }
    }

    /// Pages of these slots need their store no longer.
    pub(crate) fn discharge(
        &mut self,
        slots_id: SlotsId,
        activity: Activity,
        slot: Slot,
        count: u64,
        effects: &mut Effects,
    ) {
        let Some(store) = slot.store() else { return };
        let account = self.stores.get_mut(&store).expect("a slot names a store with an account");
        let held = account.slots.get_mut(&slots_id).expect("an account knows whose pages it has");
        *held -= count;
        if *held == 0 {
            account.slots.remove(&slots_id);
            self.owners[slots_id.0 as usize].stores.remove(&store);
            if activity == Activity::Running {
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
            Slot::CopyUp(..) => account.copy_ups -= count,
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

    /// How many slots name a store, by object.
    pub(crate) fn owners(&self, store: StoreId) -> impl Iterator<Item = (ObjectId, u64)> {
        let slots = self.stores.get(&store).into_iter().flat_map(|account| &account.slots);
        slots.map(|(slots_id, &count)| (self.owners[slots_id.0 as usize].object, count))
    }

    /// Whether all pages of a freeze's store are where they belong.
    pub(crate) fn is_written_back(&self, store: StoreId) -> bool {
        self.stores.get(&store).is_none_or(|account| account.copy_ups == 0 && account.scratch.is_none())
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
                self.zeros(store).is_none_or(|zeros| zeros.covers(origin.pages(run.pages)))
            }
            Source::Shared { .. } => false,
        }
    }
}
