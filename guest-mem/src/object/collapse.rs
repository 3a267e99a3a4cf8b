//! Keeping the forest small. There are exactly two ways (as in FreeBSD's `vm_object_collapse`):
//!
//! * **absorb**: an object that no map entry shows and that has one shadow gives that shadow what it does not hide. The
//!   stores stay as they are: nothing is copied, and no window is touched.
//! * **bypass**: a shadow that hides everything its backing object has is stacked on what lies beneath that.
//!
//! Neither is done over a shadow with gaps: those pages are still to be copied from below.

use super::{Backing, Kind, ObjectId, Objects, Slot};
use crate::addr::GfnRange;
use crate::effect::Effects;

impl Objects {
    /// One map entry less shows `id`.
    pub(crate) fn unmap(&mut self, id: ObjectId, effects: &mut Effects) {
        self.get_mut(id).mappings -= 1;
        self.tidy(id, effects);
    }

    /// Removes `id` if nothing needs it, absorbs it if one shadow does, and goes on below.
    pub(crate) fn tidy(&mut self, id: ObjectId, effects: &mut Effects) {
        if !self.contains(id) {
            return;
        }
        let object = self.get(id);
        if object.mappings > 0 {
            return;
        }
        match object.shadows.len() {
            0 => {
                let all: Vec<GfnRange> = object.slots.iter().map(|(pages, _)| pages.clone().into()).collect();
                for pages in all {
                    self.vacate(id, pages, effects);
                }
                let backing = self.get(id).backing;
                self.objects.remove(id.0 as usize);
                self.pending.remove(&id);
                if let Some(Backing { object: below, .. }) = backing {
                    self.get_mut(below).shadows.remove(&id);
                    self.tidy(below, effects);
                }
            }
            1 if object.kind == Kind::Anonymous => {
                let shadow = *object.shadows.first().expect("it has one");
                if !self.has_gaps(shadow) {
                    self.absorb(id, shadow, effects);
                }
            }
            _ => {}
        }
    }

    /// Gives `shadow` what it does not hide of `id`, and its place in the chain.
    fn absorb(&mut self, id: ObjectId, shadow: ObjectId, effects: &mut Effects) {
        let origin = self.get(shadow).backing.expect("a shadow has a backing object").origin;
        assert_eq!(origin, 0, "anonymous objects of a family share one index space");
        let slots: Vec<(GfnRange, Slot)> = self.get(id).slots.iter().map(|(p, &s)| (p.clone().into(), s)).collect();
        for (pages, slot) in slots {
            let free: Vec<GfnRange> = self.get(shadow).slots.gaps(&pages.raw()).map(GfnRange::from).collect();
            for part in free {
                // Charged before the old slot is discharged, so that no store ends in between.
                self.put(shadow, part.raw(), slot);
                self.get_mut(id).slots.remove(part.raw());
                self.discharge(slot, part.count().0, effects);
            }
            self.vacate(id, pages, effects);
        }
        let backing = self.get(id).backing;
        self.get_mut(shadow).backing = backing;
        if let Some(Backing { object: below, .. }) = backing {
            let below = &mut self.get_mut(below).shadows;
            below.remove(&id);
            below.insert(shadow);
        }
        self.objects.remove(id.0 as usize);
        self.pending.remove(&id);
    }

    /// Unlinks `id` from backing objects of which it hides everything.
    pub(crate) fn bypass(&mut self, id: ObjectId, effects: &mut Effects) {
        while self.contains(id) && !self.has_gaps(id) {
            let Some(Backing { object: below, origin }) = self.get(id).backing else { return };
            let top = &self.get(id).slots;
            let hidden =
                self.get(below).slots.iter().all(|(p, _)| top.gaps(&(p.start + origin..p.end + origin)).next().is_none());
            if !hidden {
                return;
            }
            let beneath = self.get(below).backing;
            self.get_mut(id).backing = beneath.map(|b| Backing { object: b.object, origin: b.origin + origin });
            self.get_mut(below).shadows.remove(&id);
            if let Some(Backing { object, .. }) = beneath {
                self.get_mut(object).shadows.insert(id);
            }
            self.tidy(below, effects);
        }
    }

    /// `id` lost pages, or pages of it became hidden: makes of it and its shadows what can be made.
    pub(crate) fn collapse(&mut self, id: ObjectId, effects: &mut Effects) {
        if !self.contains(id) {
            return;
        }
        for shadow in self.get(id).shadows.clone() {
            self.bypass(shadow, effects);
        }
        self.tidy(id, effects);
    }

    pub(crate) fn contains(&self, id: ObjectId) -> bool {
        self.objects.contains(id.0 as usize)
    }

    /// Whether pages of `id` are still to be copied from below.
    pub(crate) fn has_gaps(&self, id: ObjectId) -> bool {
        self.pending.contains(&id) && self.get(id).slots.iter().any(|(_, slot)| matches!(slot, Slot::Gap(_)))
    }
}
