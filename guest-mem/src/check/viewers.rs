//! Who sees a page, by the reverse map and by a scan of all VMs.

use super::Chains;
use crate::addr::{Gfn, GfnRange};
use crate::family::Family;
use crate::ids::{ObjectId, StoreId, VmId};
use crate::object::{Found, ObjectKind, Slot, shift_down};
use rangemap::RangeSet;
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

impl Family {
    /// 6 and 7: every page in a store or in swap is seen by some VM (or waited for by a copy-up), and the reverse map finds who
    /// sees it, neither more nor fewer than a scan of all VMs does.
    pub(super) fn check_viewers(
        &self,
        chains: &BTreeMap<VmId, Chains>,
        origins: &HashMap<ObjectId, Gfn>,
        frames: GfnRange,
        broken: &mut Vec<String>,
    ) {
        type Viewers = BTreeMap<(StoreId, VmId), RangeSet<u64>>;
        let (mut scanned, mut found) = (Viewers::new(), Viewers::new());
        let mut seen: BTreeMap<StoreId, RangeSet<u64>> = BTreeMap::new();
        for (&vm, chains) in chains {
            for (frames, Found { origin, slot, .. }) in chains.iter() {
                let Some(store) = slot.store() else { continue };
                let pages = shift_down(frames.clone().into(), *origin).raw();
                seen.entry(store).or_default().insert(pages.clone());
                scanned.entry((store, vm)).or_default().insert(pages);
            }
        }
        // Anonymous objects stand at frame 0, whether anybody sees them or not; files and shared memory where they are seen.
        let indexes = |id: ObjectId| {
            let origin = match (origins.get(&id), self.objects.get(id).kind) {
                (Some(&origin), _) => origin,
                (None, ObjectKind::Anonymous) => Gfn(0),
                (None, ObjectKind::File | ObjectKind::Shared) => return GfnRange::default(),
            };
            let frames = frames.intersect(GfnRange::between(origin, Gfn(u64::MAX)));
            if frames.is_empty() { frames } else { shift_down(frames, origin) }
        };
        let mut awaited: HashMap<ObjectId, RangeSet<u64>> = HashMap::new();
        for (id, object) in self.objects.iter().filter(|(_, object)| object.copy_ups > 0) {
            for (copied, slot) in object.slots.within(indexes(id)) {
                let Slot::CopyUp(_, source) = slot else { continue };
                let sources: Vec<(Found, GfnRange)> = self.objects.copy_up_sources(source, copied).collect();
                for (found, pages) in &sources {
                    awaited.entry(found.object).or_default().insert(pages.raw());
                }
                let below = self.objects.get(id).backing.map(|below| (Some(below.object), Gfn(below.origin)));
                let (below, origin) = below.unwrap_or_default();
                let below = self.objects.resolve(below, origin, copied).into_iter().filter_map(|segment| {
                    segment.found.filter(|found| found.slot != Slot::Zero).map(|f| (f, f.indexes(segment.pages)))
                });
                let below: Vec<(Found, GfnRange)> = below.collect();
                if below != sources {
                    broken.push(format!(
                        "3: the copy-up {copied:?} of {id:?} is over {sources:?}, its chain has {below:?}"
                    ));
                }
            }
        }
        for (id, object) in self.objects.iter() {
            for (pages, slot) in object.slots.within(indexes(id)) {
                let Some(store) = slot.store() else { continue };
                let _ = self.viewers(store, pages, |vm, run| {
                    let pages = run.indexes().expect("a run of a store").raw();
                    found.entry((store, vm)).or_default().insert(pages);
                    ControlFlow::Continue(())
                });
                if object.kind == ObjectKind::File || !self.is_tidy() {
                    continue;
                }
                let awaited = awaited.entry(id).or_default();
                for hidden in seen.entry(store).or_default().gaps(&pages.raw()) {
                    awaited.gaps(&hidden).for_each(|part| {
                        broken.push(format!("6: nobody sees pages {part:?} of {store:?}, state {slot:?}"));
                    });
                }
            }
        }
        if found != scanned {
            let differ = |(a, b): &(_, _)| a != b;
            let first = found.iter().zip(&scanned).find(differ);
            broken.push(format!("7: the reverse map and a scan of all VMs differ, first at {first:?}"));
        }
    }
}
