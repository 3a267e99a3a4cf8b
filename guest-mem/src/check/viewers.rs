//! Who sees a page, by the reverse map and by a scan of all VMs.

use super::Chains;
use crate::addr::{GfnRange, PageOrigin, PageRange};
use crate::family::Family;
use crate::ids::{StoreId, VmId};
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
            for pages in pages.iter() {
                let _ = self.viewers(store, pages.clone().into(), |vm, run| {
                    // What is seen elsewhere besides is another part's.
                    let there = run.pages.intersect(frames);
                    found.entry((store, vm)).or_default().extend(Some(there.raw()).filter(|_| !there.is_empty()));
                    ControlFlow::Continue(())
                });
            }
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
        for (id, object) in self.objects.iter() {
            for (part, slot) in object.slots.within(pages) {
                let Some(store) = slot.store() else { continue };
                if let Slot::CopyUp(_, source) = slot {
                    let sources: Vec<(Found, PageRange)> = self.objects.copy_up_sources(source, part).collect();
                    let backing = object.backing.map(|below| (Some(below.object), below.origin)).unwrap_or_default();
                    let below = self.objects.resolve(backing.0, backing.1, PageOrigin(0).frames(part)).into_iter();
                    let below = below.filter_map(|segment| {
                        segment.found.filter(|found| found.slot != Slot::Zero).map(|f| (f, f.indexes(segment.pages)))
                    });
                    let below: Vec<(Found, PageRange)> = below.collect();
                    if below != sources {
                        broken.push(format!(
                            "3: the copy-up {part:?} of {id:?} is over {sources:?}, its chain has {below:?}"
                        ));
                    }
                }
                if object.kind == ObjectKind::File || !self.is_tidy() {
                    continue;
                }
                for hidden in self.seen(store, part, None).gaps(&part.raw()) {
                    for part in self.objects.pending_copy_sources(id, hidden.clone().into()).gaps(&hidden) {
                        broken.push(format!("6: nobody sees pages {part:?} of {store:?}, state {slot:?}"));
                    }
                }
            }
        }
    }
}
