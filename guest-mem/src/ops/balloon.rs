//! Balloon: a VM gives pages back.
//!
//! The pages become zero for this VM alone, and its window shows anonymous memory there: whatever it touches later reads
//! zeros. To drop its private pages alone would bring the bytes of an ancestor back. What lies beneath goes with its last
//! viewer, at once.

use crate::addr::{GfnRange, PageOrigin};
use crate::effect::Effects;
use crate::family::Family;
use crate::ids::{Run, Source, VmId};
use crate::object::Slot;
use crate::space::map::MapEntry;
use crate::space::runs::outside;
use crate::stage2::Cursor;
use rangemap::RangeSet;

impl Family {
    /// `vm` has given `pages` back. Its window holds no private page there and shows anonymous memory already: the window
    /// decides which pages it has a mapping to spare for. Frames outside of the VM's memory do not count, nor those of shared
    /// memory, which is not its own to give.
    ///
    /// # Panics
    /// If the VM stands for a freeze: its pages may be on their way out. Whoever holds the window does one after the other.
    pub fn balloon(&mut self, vm: VmId, pages: &[GfnRange], effects: &mut Effects) {
        assert!(!self.vm(vm).stands(), "pages are given back before a freeze or after it");
        let given: RangeSet<u64> =
            pages.iter().filter(|pages| pages.start() < pages.end()).map(|pages| pages.raw()).collect();
        let map = self.vm(vm).map.clone();
        let mut replaced = Vec::new();
        for (bounds, entry) in map.iter().filter(|(_, entry)| !entry.is_shared()) {
            let parts: Vec<GfnRange> =
                given.overlapping(bounds.raw()).map(|part| GfnRange::from(part.clone()).intersect(bounds)).collect();
            if parts.is_empty() {
                continue;
            }
            self.hide(vm, bounds, entry, &parts, effects);
            for part in parts {
                self.uncover(vm, part, &mut replaced);
            }
        }
        let given: Vec<GfnRange> = given.into_iter().map(GfnRange::from).collect();
        let books = self.vm_mut(vm);
        books.overlay.uncover(&given);
        books.bridges = outside(&books.bridges, &given);
        (books.runs, books.child) = Default::default();
        let tops: Vec<_> = self.vm(vm).map.iter().filter_map(|(_, entry)| entry.object).collect();
        for top in tops {
            self.objects.shorten(top, effects);
        }
        self.free_unseen(replaced, effects);
    }

    /// Makes `parts` of an entry zero in its top object, which is this VM's alone, or becomes so.
    fn hide(&mut self, vm: VmId, bounds: GfnRange, entry: MapEntry, parts: &[GfnRange], effects: &mut Effects) {
        let segments = parts.iter().flat_map(|&part| self.shown(vm, part));
        let shown: RangeSet<u64> =
            segments.filter(|segment| !segment.is_zero()).map(|segment| segment.pages.raw()).collect();
        if shown.is_empty() {
            return;
        }
        let (top, origin) = match entry.object {
            Some(top) if !entry.needs_copy => (top, entry.origin),
            _ => (self.stack_top(vm, bounds, entry), PageOrigin(0)),
        };
        for pages in shown.iter().map(|frames| origin.pages(frames.clone().into())) {
            self.objects.vacate(top, pages, effects);
            self.objects.put(top, pages, Slot::Zero);
        }
        if let Some(below) = entry.object.filter(|&below| below != top) {
            let activity = self.vm(vm).activity;
            self.objects.unmap(below, vm, activity, effects);
        }
    }

    /// Nothing lies beneath these pages of `vm` any more. Tables that say so already are left alone.
    fn uncover(&mut self, vm: VmId, pages: GfnRange, replaced: &mut Vec<Run>) {
        let books = self.vms.get_mut(&vm).expect("a VM of this family");
        for run in self.stage2.runs(books.root, pages) {
            if run.source != Source::Anonymous {
                let run = Run { source: Source::Anonymous, ..run };
                Cursor::new(&mut self.stage2, &mut books.root).set(run, replaced);
            }
        }
    }
}
