//! Shed: a window gives up copies of frozen pages that stayed in it, and shows their store instead.
//!
//! A freeze may leave pages where they are, and have their copies settle. As long as the window keeps them they are in
//! memory twice, and no others can share this VM's.

use crate::addr::{Gfn, GfnRange, PageCount};
use crate::effect::{Effect, Effects};
use crate::family::{Family, VmId};
use crate::object::{Segment, Slot};
use crate::window::{Source, StoreId};
use rangemap::RangeSet;

impl Family {
    /// Stretches of pages that the window of `vm` keeps though they are in `store`, or in swap for it: each of at least
    /// `least` pages (shorter ones are not worth a mapping), about `limit` pages in all. Its window gets more runs by them
    /// only up to `max_runs`.
    pub fn to_shed(
        &self,
        vm: VmId,
        store: StoreId,
        least: PageCount,
        limit: PageCount,
        max_runs: usize,
    ) -> Vec<GfnRange> {
        let vm = self.vm(vm);
        let mut there = RangeSet::new();
        for kept in vm.kept() {
            for (bounds, entry) in vm.map.iter() {
                let runs = self.stage2.runs(vm.root, kept.intersect(bounds)).into_iter();
                for run in runs.filter(|run| run.source.is_store(store)) {
                    let segments = self.objects.resolve(entry.object, entry.origin, run.pages).into_iter();
                    segments.filter(is_placed).for_each(|segment| there.insert(segment.pages.raw()));
                }
            }
        }
        let mut runs = vm.runs.len();
        let mut left = limit.0;
        let mut stretches = Vec::new();
        for stretch in there.into_iter().map(GfnRange::from).filter(|stretch| stretch.count() >= least) {
            // A run in the middle of another makes three of one.
            runs += 2;
            if left == 0 || runs > max_runs {
                break;
            }
            let end = Gfn(stretch.start().0 + stretch.count().0.min(left.max(least.0)));
            left = left.saturating_sub(end.0 - stretch.start().0);
            stretches.push(GfnRange::between(stretch.start(), end));
        }
        stretches
    }

    /// The window of `vm` maps `store` where it kept these pages; what its guest has written there since they were frozen
    /// is in its live layer.
    pub fn shed(&mut self, vm: VmId, store: StoreId, pages: &[GfnRange], effects: &mut Effects) {
        let books = self.vms.get_mut(&vm).expect("a VM of this family");
        for pages in pages {
            books.kept.remove(*pages);
            books.runs.insert(pages.raw(), Source::Store { store, origin: Gfn(0) });
        }
        let books = self.vm(vm);
        if books.freezing.is_some() {
            // A freeze may move out what its guest has written over zeros.
            return;
        }
        for (bounds, entry) in books.map.iter() {
            for part in pages.iter().map(|pages| pages.intersect(bounds)).filter(|part| !part.is_empty()) {
                let segments = self.objects.resolve(entry.object, entry.origin, part).into_iter();
                let zeros = segments.filter(|segment| segment.found.is_some_and(|found| found.slot == Slot::Zero));
                zeros.for_each(|segment| effects.push(Effect::Zero(vm, segment.pages)));
            }
        }
    }
}

/// Whether pages have settled, and are not lost.
fn is_placed(segment: &Segment) -> bool {
    segment.found.is_some_and(|found| !found.slot.is_pending() && !matches!(found.slot, Slot::Lost(..)))
}
