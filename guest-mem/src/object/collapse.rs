//! Keeping the forest small. There are exactly two ways (as in FreeBSD's `vm_object_collapse`):
//!
//! * **merge** (Lokier 2000: an only child takes over its parent; FreeBSD's collapse): an object that no map entry shows and
//!   that has one shadow gives that shadow what it does not hide. The stores stay as they are: nothing is copied, and no
//!   window is touched.
//! * **cut** (Lokier: all pages have been modified; FreeBSD's bypass): a shadow that hides everything its backing object has
//!   is stacked on what lies beneath that.
//!
//! Neither is done over a shadow with copy-ups: those pages are still to be copied from below. Nor is an object merged into one
//! in which its pages have other numbers, since they were moved: a page has one number in its object and in its store.

use super::{Backing, ObjectKind, Objects, Slot};
use crate::addr::extents::without;
use crate::addr::{PageOrigin, PageRange};
use crate::effect::Effects;
use crate::ids::{Activity, ObjectId, VmId};

/// Stretches of slots that one call frees or gives to another object: guests that wait come before the rest.
const SLOTS_BATCH: usize = 2048;

impl Objects {
    /// One map entry less, of this VM of this pace, shows `id`.
    pub(crate) fn unmap(&mut self, id: ObjectId, vm: VmId, activity: Activity, effects: &mut Effects) {
        self.unmap_untidily(id, vm, activity);
        self.tidy(id, effects);
    }

    /// The same; what can be made of `id` now is made later.
    pub(crate) fn unmap_untidily(&mut self, id: ObjectId, vm: VmId, activity: Activity) {
        let mappings = &mut self.get_mut(id).mappings;
        let entries = mappings.get_mut(&vm).expect("an object lists who shows it");
        *entries -= 1;
        if *entries == 0 {
            mappings.remove(&vm);
        }
        if activity == Activity::Running {
            self.dec_active(id);
        }
    }

    /// Removes `id` if nothing needs it, merges it into its shadow if one does, and goes on below. Of what is long, a part is done
    /// at once, and the rest by [others](Self::go_on_tidying): after each part, all is found where it was.
    pub(crate) fn tidy(&mut self, id: ObjectId, effects: &mut Effects) {
        let (mut next, mut left) = (Some(id), SLOTS_BATCH);
        while let Some(id) = next.filter(|&id| self.contains(id) && self.get(id).mappings.is_empty()) {
            let mut shadows = self.get(id).shadows.iter().copied();
            let done = match (shadows.next(), shadows.next()) {
                _ if left == 0 => false,
                (None, _) => self.empty(id, &mut left, effects),
                (Some(shadow), None) if self.may_merge(id, shadow) => self.merge(id, shadow, &mut left, effects),
                _ => return,
            };
            if !done {
                self.untidy.insert(id);
                return;
            }
            left = left.saturating_sub(1);
            next = self.remove(id);
        }
    }

    /// Goes on with an object that takes long. Whether there was one.
    pub(crate) fn go_on_tidying(&mut self, effects: &mut Effects) -> bool {
        let next = self.untidy.pop_first();
        next.into_iter().for_each(|id| self.tidy(id, effects));
        next.is_some()
    }

    /// Whether an object that no entry shows can be merged into `shadow`, its only one.
    pub(crate) fn may_merge(&self, id: ObjectId, shadow: ObjectId) -> bool {
        let is_same_space = self.get(shadow).backing.is_some_and(|backing| backing.origin == PageOrigin(0));
        self.get(id).kind == ObjectKind::Anonymous && is_same_space && !self.has_copy_ups(shadow)
    }

    /// Frees what an object has that nothing needs. Whether that was all.
    fn empty(&mut self, id: ObjectId, left: &mut usize, effects: &mut Effects) -> bool {
        for (pages, slot) in self.take_slots(id, left) {
            self.free(id, pages, slot, effects);
        }
        self.get(id).slots.is_empty()
    }

    /// Removes an object that has nothing. Returns what lies beneath.
    fn remove(&mut self, id: ObjectId) -> Option<ObjectId> {
        let below = self.get(id).backing.map(|backing| backing.object);
        if let Some(below) = below {
            self.get_mut(below).shadows.remove(&id);
        }
        let gone = self.objects.remove(id.0 as usize);
        assert!(gone.active == 0 && gone.slots.is_empty(), "nobody who is active needs {id:?}, or what it has");
        self.accounts.forget_slots(gone.slots_id);
        self.writeback.pending.remove(&id);
        self.writeback.put_off.remove(&id);
        below
    }

    /// Gives `shadow` what it does not hide of `id`, and its place in the chain. Costs as much as the smaller of the two: a
    /// small change often merges all memory of a machine. Whether that was all.
    fn merge(&mut self, id: ObjectId, shadow: ObjectId, left: &mut usize, effects: &mut Effects) -> bool {
        let shadow_is_smaller = self.get(id).slots.outnumber(&self.get(shadow).slots);
        let (from, to) = if shadow_is_smaller { (shadow, id) } else { (id, shadow) };
        for (pages, slot) in self.take_slots(from, left) {
            if shadow_is_smaller {
                pages.iter().for_each(|&part| self.vacate(to, part, effects));
            }
            let hidden: Vec<PageRange> =
                pages.iter().flat_map(|&part| self.slots_in(to, part)).map(|(part, _)| part).collect();
            let shown = without(&pages, &hidden);
            let count: u64 = shown.iter().map(|part| part.count().0).sum();
            // Charged before the old slot is discharged, so that no store ends in between.
            self.put_all(to, shown, slot);
            if count > 0 {
                self.discharge(from, slot, count, effects);
            }
            self.free(from, hidden, slot, effects);
        }
        if !self.get(from).slots.is_empty() {
            return false;
        }
        if shadow_is_smaller {
            self.swap_slots(id, shadow);
        }
        let backing = self.get(id).backing;
        self.get_mut(shadow).backing = backing;
        if let Some(Backing { object: below, .. }) = backing {
            self.get_mut(below).shadows.insert(shadow);
        }
        // Not before: slots count as their object does, and these have changed hands.
        if self.get(shadow).active > 0 {
            self.take_over(id, backing);
        }
        true
    }

    /// Some slots of an object, which has them no longer, with the pages of each in a row; the accounts do not know yet.
    fn take_slots(&mut self, id: ObjectId, left: &mut usize) -> Vec<(Vec<PageRange>, Slot)> {
        let some = self.get_mut(id).slots.take_some(left);
        let same = some.chunk_by(|(_, a), (_, b)| a == b);
        same.map(|parts| (parts.iter().map(|(pages, _)| *pages).collect(), parts[0].1)).collect()
    }

    /// What was active for the sake of `below` is so for what it has beneath it now.
    fn take_over(&mut self, below: ObjectId, beneath: Option<Backing>) {
        if let Some(Backing { object, .. }) = beneath {
            self.inc_active(object);
        }
        self.dec_active(below);
    }

    /// Makes the slots of `id` those of `shadow`, and the other way round; accounts need not know.
    fn swap_slots(&mut self, id: ObjectId, shadow: ObjectId) {
        let (a, b) = self.objects.get2_mut(id.0 as usize, shadow.0 as usize).expect("two objects");
        std::mem::swap(&mut a.slots, &mut b.slots);
        std::mem::swap(&mut a.slots_id, &mut b.slots_id);
        std::mem::swap(&mut a.copy_ups, &mut b.copy_ups);
        std::mem::swap(&mut a.writeback_from, &mut b.writeback_from);
        self.accounts.give_slots(a.slots_id, id);
        self.accounts.give_slots(b.slots_id, shadow);
        // What is still pending of the shadow's own slots lists it again when it gets them back.
        if self.writeback.pending.contains(&id) {
            self.writeback.pending.insert(shadow)
        } else {
            self.writeback.put_off.remove(&shadow);
            self.writeback.pending.remove(&shadow)
        };
    }

    /// Unlinks `id` from backing objects of which it hides everything.
    pub(crate) fn cut(&mut self, id: ObjectId, effects: &mut Effects) {
        while self.contains(id) && !self.has_copy_ups(id) {
            let Some(Backing { object: below, origin }) = self.get(id).backing else { return };
            let top = &self.get(id).slots;
            let hidden = self.get(below).slots.iter().all(|(pages, _)| top.covers(origin.over(pages)));
            if !hidden {
                return;
            }
            let beneath = self.get(below).backing;
            self.get_mut(id).backing = beneath.map(|b| Backing { object: b.object, origin: b.origin + origin });
            self.get_mut(below).shadows.remove(&id);
            if let Some(Backing { object, .. }) = beneath {
                self.get_mut(object).shadows.insert(id);
            }
            if self.get(id).active > 0 {
                self.take_over(below, beneath);
            }
            self.tidy(below, effects);
        }
    }

    /// Takes out of the chain below `id` what `id` hides, or is alone to need.
    pub(crate) fn shorten(&mut self, id: ObjectId, effects: &mut Effects) {
        self.cut(id, effects);
        if let Some(below) = self.objects.get(id.0 as usize).and_then(|object| object.backing) {
            self.tidy(below.object, effects);
        }
    }

    /// `id` lost pages: makes of it and of its shadows what can be made.
    pub(crate) fn collapse(&mut self, id: ObjectId, effects: &mut Effects) {
        if !self.contains(id) {
            return;
        }
        for shadow in self.get(id).shadows.clone() {
            self.cut(shadow, effects);
        }
        if self.contains(id) {
            self.shorten(id, effects);
            self.tidy(id, effects);
        }
    }

    pub(crate) fn contains(&self, id: ObjectId) -> bool {
        self.objects.contains(id.0 as usize)
    }

    /// Whether pages of `id` are still to be copied from below.
    pub(crate) fn has_copy_ups(&self, id: ObjectId) -> bool {
        self.get(id).copy_ups > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{StoreId, VmId};
    use crate::steps::steps;

    /// Steps to absorb an object of two stores, page by page, into one that has as many stretches between.
    fn merge(stretches: u64) -> u64 {
        let mut objects = Objects::default();
        let stores = [StoreId(1), StoreId(2)];
        stores.iter().for_each(|&store| objects.accounts.open_store(store, VmId(1)));
        let below = objects.stack(None);
        let top = objects.stack(Some(Backing { object: below, origin: PageOrigin(0) }));
        objects.map(top, VmId(1), Activity::Running);
        for at in (0..stretches).map(|stretch| stretch * 8) {
            for (page, store) in (at..).zip(stores) {
                objects.put(below, (page..page + 1).into(), Slot::Resident(store));
            }
            for page in [at + 3, at + 5, at + 7] {
                objects.put(top, (page..page + 1).into(), Slot::Zero);
            }
        }
        let ((), steps) = steps(|| {
            objects.tidy(below, &mut Effects::default());
            while objects.go_on_tidying(&mut Effects::default()) {}
        });
        assert_eq!(objects.len(), 1);
        steps
    }

    /// For each group of pages in one state, all that the shadow had was gone over.
    #[test]
    fn to_absorb_costs_as_much_as_there_are_stretches() {
        let (few, many) = (merge(500), merge(2000));
        assert!(many <= 5 * few, "{few} steps, and {many} for four times as many");
    }
}
