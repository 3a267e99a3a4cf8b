//! What the accounts of stores say, held against slots.

use crate::addr::PageRange;
use crate::addr::cluster::clusters;
use crate::family::Family;
use crate::ids::{ObjectId, StoreId};
use crate::object::{ObjectKind, Slot};
use rangemap::RangeSet;
use std::collections::{BTreeMap, BTreeSet};

/// Pages of a store, by what they are.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    held: u64,
    resident: u64,
    copy_ups: u64,
    in_flight: u64,
    swapped: u64,
}

impl Counts {
    fn add(&mut self, slot: Slot, pages: u64) {
        self.held += pages;
        match slot {
            Slot::Resident(_) | Slot::Clean(..) => self.resident += pages,
            Slot::CopyUp(..) => self.copy_ups += pages,
            Slot::InFlight(_) => self.in_flight += pages,
            Slot::Swapped(..) => self.swapped += pages,
            Slot::Zero | Slot::Lost(..) => {}
        }
    }
}

impl Family {
    /// 3: what slots say of pages that have these numbers. Each page of a store is in one object only.
    pub(super) fn check_slots(&self, pages: PageRange, broken: &mut Vec<String>) {
        let accounts = &self.objects.accounts;
        let mut owned: BTreeMap<StoreId, RangeSet<u64>> = BTreeMap::new();
        for (id, object) in self.objects.iter() {
            for (part, slot) in object.slots.within(pages) {
                let Some(store) = slot.store() else { continue };
                let owned = owned.entry(store).or_default();
                if owned.overlaps(&part.raw()) {
                    broken.push(format!("3: pages {part:?} of {store:?} belong to {id:?} and to another object"));
                }
                owned.insert(part.raw());
                let is_evictable = object.kind == ObjectKind::Anonymous && slot.resident().is_some();
                if is_evictable && !accounts.queue.has(store, part) {
                    broken
                        .push(format!("3: pages {part:?} of {store:?} are in memory, and never come up for eviction"));
                }
                if let Slot::Clean(store, _) = slot
                    && !clusters(part).all(|cluster| accounts.clean.contains(&(store, cluster)))
                {
                    broken.push(format!("3: copies in swap of pages {part:?} of {store:?} would never be given up"));
                }
                if slot.is_pending() && !self.objects.writeback.pending.contains(&id) {
                    broken.push(format!("3: {id:?} has pending pages and is not listed"));
                }
            }
        }
    }

    /// 3: how many pages an object has of which kind, and the accounts of stores of them.
    pub(super) fn check_pages(&self, id: ObjectId, broken: &mut Vec<String>) {
        let object = self.objects.get(id);
        let mut copy_ups = 0;
        let mut counts: BTreeMap<StoreId, Counts> = BTreeMap::new();
        for (pages, slot) in object.slots.iter() {
            let Some(store) = slot.store() else { continue };
            counts.entry(store).or_default().add(slot, pages.count().0);
            if let Slot::CopyUp(..) = slot {
                copy_ups += pages.count().0;
            }
        }
        if copy_ups != object.copy_ups {
            broken.push(format!("3: {id:?} counts {} copy-ups, and has {copy_ups}", object.copy_ups));
        }
        let known: BTreeSet<StoreId> = self.objects.stores_of(id).collect();
        for &store in known.iter().chain(counts.keys().filter(|store| !known.contains(store))) {
            let counted = counts.get(&store).copied().unwrap_or_default();
            let owners: Vec<(ObjectId, u64)> = self.objects.accounts.owners(store).collect();
            let told = owners.iter().find(|(owner, _)| *owner == id).map_or(0, |(_, held)| *held);
            if told != counted.held {
                broken.push(format!("3: {store:?} has {told} pages of {id:?}, its slots say {}", counted.held));
            }
            // What several have is counted by itself.
            if owners.len() == 1 {
                self.check_account(store, counted, broken);
            }
        }
    }

    /// 3: the account of a store of which several objects have pages.
    pub(super) fn check_shared_store(&self, store: StoreId, broken: &mut Vec<String>) {
        let mut counts = Counts::default();
        for (id, _) in self.objects.accounts.owners(store) {
            let slots = self.objects.get(id).slots.iter().filter(|(_, slot)| slot.store() == Some(store));
            slots.for_each(|(pages, slot)| counts.add(slot, pages.count().0));
        }
        if self.objects.accounts.stores.contains_key(&store) {
            self.check_account(store, counts, broken);
        }
    }

    fn check_account(&self, store: StoreId, counted: Counts, broken: &mut Vec<String>) {
        let Some(account) = self.objects.accounts.stores.get(&store) else {
            return broken.push(format!("3: {store:?} has pages and no account"));
        };
        let left = account.scratch.map_or(0, |scratch| scratch.left);
        let told = [account.resident, account.copy_ups, left, account.swapped];
        let counted = [counted.resident, counted.copy_ups, counted.in_flight, counted.swapped];
        if told != counted {
            broken.push(format!("3: the account of {store:?} says {told:?}, its slots {counted:?}"));
        }
    }

    /// 3 and 11: the accounts among each other.
    pub(super) fn check_accounts(&self, broken: &mut Vec<String>) {
        for id in self.objects.writeback.put_off.difference(&self.objects.writeback.pending) {
            broken.push(format!("3: {id:?} waits for swap, and has nothing pending"));
        }
        let anonymous =
            self.objects.accounts.stores.iter().filter(|(_, account)| account.kind == ObjectKind::Anonymous);
        let resident: u64 = anonymous.clone().map(|(_, account)| account.resident).sum();
        if resident != self.objects.accounts.resident_pages {
            broken.push(format!("3: {resident} pages are in stores, not {}", self.objects.accounts.resident_pages));
        }
        let is_idle =
            |store: &StoreId| !self.objects.accounts.owners(*store).any(|(id, _)| self.objects.get(id).active > 0);
        let idle: BTreeSet<StoreId> = anonymous.map(|(&store, _)| store).filter(is_idle).collect();
        if !self.objects.accounts.queue.idle_is_sound(&idle) {
            broken.push(format!("3: {idle:?} are the stores that only idle VMs see"));
        }
        for (&store, account) in &self.objects.accounts.stores {
            let active = self.objects.accounts.owners(store).filter(|(id, _)| self.objects.get(*id).active > 0).count();
            if active as u32 != account.active {
                broken
                    .push(format!("3: {store:?} counts {} active objects, {active} have pages of it", account.active));
            }
            let strangers =
                self.objects.accounts.owners(store).filter(|(id, _)| self.objects.stores_of(*id).all(|of| of != store));
            for (id, held) in strangers {
                broken.push(format!("3: {store:?} has {held} pages of {id:?}, which knows nothing of it"));
            }
            if account.scratch.is_some_and(|scratch| scratch.left == 0) {
                broken.push(format!("11: the scratch range of {store:?} is kept for nothing"));
            }
        }
    }
}
