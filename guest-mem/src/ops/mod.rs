//! The few operations in which objects and stage-2 tables meet, one file each.

mod exit;
mod fork;
mod freeze;
mod launch;
mod settle;
mod trap;

pub use settle::{CopyFrom, Job, Placed};
pub use trap::Trap;

use crate::addr::GfnRange;
use crate::effect::Effects;
use crate::family::Family;
use crate::map::AddressMap;
use crate::object::{ObjectId, Slot};
use crate::window::{Run, Source};
use std::collections::BTreeSet;

impl Family {
    /// Frees the pages of `runs` that nobody sees any more. They were seen through `map`, or are by it no longer.
    ///
    /// Who sees a page is one look per distinct table. A page that a gap above is still to be copied from stays.
    fn free_unseen(&mut self, map: &AddressMap, runs: Vec<Run>, effects: &mut Effects) {
        let mut lighter: BTreeSet<ObjectId> = BTreeSet::new();
        for run in crate::stage2::merge_runs(runs) {
            let Source::Store { store, .. } = run.source else { continue };
            let seen = self.stage2.rmap().seen(&self.stage2, run.pages, store);
            let unseen: Vec<GfnRange> = seen.gaps(&run.pages.raw()).map(GfnRange::from).collect();
            for pages in unseen {
                self.free_store_pages(map, pages, run.source, &mut lighter, effects);
            }
        }
        for object in lighter {
            self.objects.collapse(object, effects);
        }
    }

    fn free_store_pages(
        &mut self,
        map: &AddressMap,
        pages: GfnRange,
        source: Source,
        lighter: &mut BTreeSet<ObjectId>,
        effects: &mut Effects,
    ) {
        let Source::Store { store, origin: store_origin } = source else { return };
        let entries: Vec<_> = map.iter().filter(|(range, _)| !range.intersect(pages).is_empty()).collect();
        for (range, entry) in entries {
            let mut origin = entry.origin;
            let mut next = entry.object;
            while let Some(id) = next {
                let backing = self.objects.get(id).backing;
                if origin == store_origin {
                    let part = crate::object::shift_down(range.intersect(pages), origin);
                    let held: Vec<GfnRange> = self
                        .objects
                        .slots_in(id, part)
                        .filter(|&(_, slot)| slot.store() == Some(store))
                        .map(|(part, _)| part)
                        .collect();
                    for part in held {
                        for free in self.not_needed_above(id, part) {
                            if self.objects.get(id).kind == crate::object::Kind::Anonymous {
                                self.objects.vacate(id, free, effects);
                                lighter.insert(id);
                            }
                        }
                    }
                }
                next = backing.map(|b| {
                    origin.0 += b.origin;
                    b.object
                });
            }
        }
    }

    /// The part of an object's pages that no gap above is to be copied from.
    fn not_needed_above(&self, object: ObjectId, pages: GfnRange) -> Vec<GfnRange> {
        let mut free = rangemap::RangeSet::new();
        free.insert(pages.raw());
        for &above in &self.objects.pending {
            let gaps = self.objects.slots_in(above, pages).filter(|(_, slot)| matches!(slot, Slot::Gap(_)));
            for (gap, _) in gaps {
                if self.objects.chain(Some(above)).skip(1).any(|below| below == object) {
                    free.remove(gap.raw());
                }
            }
        }
        free.iter().map(|part| part.clone().into()).collect()
    }
}
