//! Who sees a page, by the reverse map and by a scan of all VMs.

use super::Chains;
use crate::addr::{GfnRange, PageOrigin, PageRange};
use crate::family::Family;
use crate::ids::{ObjectId, Source, StoreId, VmId};
use crate::object::{Found, ObjectKind, Slot};
use rangemap::RangeSet;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

impl Family {
    /// 7: the reverse map finds who sees which page at these frames, neither more nor fewer than a scan of all VMs does.
    pub(super) fn check_viewers(&self, chains: &BTreeMap<VmId, Chains>, frames: GfnRange, broken: &mut Vec<String>) {
        type Viewers = BTreeMap<(StoreId, VmId), RangeSet<u64>>;
        let (mut scanned, mut found) = (Viewers::new(), Viewers::new());
        let mut seen: BTreeMap<StoreId, RangeSet<u64>> = BTreeMap::new();
        for (&vm, chains) in chains {
            for (frames, Found { origin, slot, .. }) in chains.iter() {
                let Some(store) = slot.store() else { continue };
                seen.entry(store).or_default().insert(origin.pages(frames.clone().into()).raw());
                scanned.entry((store, vm)).or_default().insert(frames.clone());
            }
        }
        for (&store, pages) in &seen {
            let (Some(first), Some(last)) = (pages.first(), pages.last()) else { continue };
            let _ = self.viewers(store, (first.start..last.end).into(), |vm, run| {
                let Some((_, origin)) = run.source.store() else { return ControlFlow::Continue(()) };
                let shown = origin.pages(run.pages);
                // Leaves go on to show what has turned zero. What is seen elsewhere besides is another part's.
                let parts = pages.overlapping(shown.raw()).map(|part| shown.intersect(part.clone().into()));
                let there = parts.map(|part| origin.frames(part).intersect(frames)).filter(|part| !part.is_empty());
                found.entry((store, vm)).or_default().extend(there.map(GfnRange::raw));
                ControlFlow::Continue(())
            });
        }
        found.retain(|_, frames| !frames.is_empty());
        if found != scanned {
            let differ = |(a, b): &(_, _)| a != b;
            let first = found.iter().zip(&scanned).find(differ);
            broken.push(format!("7: the reverse map and a scan of all VMs differ, first at {first:?}"));
        }
    }

    /// 6: each of these pages of an object is seen by some VM, or waited for by a copy-up. 3: copy-ups are over what the chain
    /// has.
    pub(super) fn check_seen(&self, pages: PageRange, broken: &mut Vec<String>) {
        let mut seen: BTreeMap<StoreId, RangeSet<u64>> = BTreeMap::new();
        for (id, object) in self.objects.iter() {
            for (part, slot) in object.slots.within(pages) {
                let Some(store) = slot.store() else { continue };
                if let Slot::CopyUp(_, source) = slot {
                    self.check_copy_up(id, source, part, broken);
                }
                if object.kind == ObjectKind::File || !self.is_tidy() {
                    continue;
                }
                let seen = seen.entry(store).or_insert_with(|| self.seen(store, pages, None));
                for hidden in seen.gaps(&part.raw()) {
                    for part in self.objects.pending_copy_sources(id, hidden.clone().into()).gaps(&hidden) {
                        broken.push(format!("6: nobody sees pages {part:?} of {store:?}, state {slot:?}"));
                    }
                }
            }
        }
    }

    fn check_copy_up(&self, id: ObjectId, source: Source, pages: PageRange, broken: &mut Vec<String>) {
        let sources: Vec<(Found, PageRange)> = self.objects.copy_up_sources(source, pages).collect();
        let below = self.objects.get(id).backing.map(|below| (Some(below.object), below.origin));
        let (below, origin) = below.unwrap_or_default();
        let below = self.objects.resolve(below, origin, PageOrigin(0).frames(pages)).into_iter();
        let below = below.filter_map(|segment| {
            segment.found.filter(|found| found.slot != Slot::Zero).map(|found| (found, found.indexes(segment.pages)))
        });
        let below: Vec<(Found, PageRange)> = below.collect();
        if below != sources {
            broken.push(format!("3: the copy-up {pages:?} of {id:?} is over {sources:?}, its chain has {below:?}"));
        }
    }
}
