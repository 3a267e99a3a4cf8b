//! Freeze: what a VM has written becomes an object.
//!
//! In two halves around the window's part, which takes time and can fail: [`begin`](Family::begin_freeze) reserves,
//! [`finish`](Family::finish_freeze) cannot fail, [`abort`](Family::abort_freeze) leaves no trace.

use crate::addr::{Gfn, GfnRange};
use crate::effect::{Effect, Effects};
use crate::family::{Family, Freezing, VmId};
use crate::map::MapEntry;
use crate::object::{Backing, ObjectId, Slot};
use crate::stage2::Cursor;
use crate::window::{Harvest, Run, Source, StoreId};

/// Where the pages of a freeze go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Destination {
    /// Into the freeze's store.
    #[default]
    Store,
    /// Into swap, but for those that somebody waits for. Into the store where swap does not take them.
    Swap,
}

impl Family {
    /// Reserves the store that is to take the place of what `vm` has written.
    ///
    /// # Panics
    /// If a freeze of this VM is under way.
    pub fn begin_freeze(&mut self, vm: VmId) -> StoreId {
        let store = self.objects.reserve_store();
        let before = self.vm_mut(vm).freezing.replace(Freezing::Stopping(store));
        assert_eq!(before, None, "one freeze of a VM at a time");
        store
    }

    /// The VM that is being frozen stands still: from now on its pages may be moved out any moment.
    pub fn stands(&mut self, vm: VmId) {
        let freezing = &mut self.vm_mut(vm).freezing;
        *freezing = freezing.map(|freezing| Freezing::Standing(freezing.store()));
    }

    fn end_freeze(&mut self, vm: VmId) -> StoreId {
        self.vm_mut(vm).freezing.take().expect("a freeze under way").store()
    }

    /// The window changed nothing: forget the freeze.
    pub fn abort_freeze(&mut self, vm: VmId, effects: &mut Effects) {
        let store = self.end_freeze(vm);
        effects.push(Effect::DropStore(store));
    }

    /// The window has taken `harvest`: makes it the top of the VM's chains. Where nothing was private, no object is
    /// made.
    pub fn finish_freeze(&mut self, vm: VmId, harvest: &Harvest, effects: &mut Effects) {
        let store = self.end_freeze(vm);
        if harvest.is_empty() {
            effects.push(Effect::DropStore(store));
            return;
        }
        self.objects.open_store(store, vm);
        let source = Source::Store { store, origin: Gfn(0) };
        let before = self.vm(vm).map.clone();
        let mut replaced = Vec::new();
        let all_taken = harvest.taken();
        for (pages, entry) in before.iter() {
            let taken: Vec<GfnRange> = within(&all_taken, pages).collect();
            if taken.is_empty() {
                continue;
            }
            let private: Vec<GfnRange> = within(&harvest.private, pages).collect();
            let top = match entry.object {
                Some(top) if !entry.needs_copy && taken == private => top,
                below => self.stack_top(vm, pages, below, entry.origin),
            };
            self.fill_top(top, &taken, &private, store, effects);
            if let Some(below) = entry.object.filter(|&below| below != top) {
                let pace = self.vm(vm).pace;
                self.objects.unmap(below, pace, effects);
            }
        }
        let books = self.vms.get_mut(&vm).expect("a VM of this family");
        for &pages in &all_taken {
            Cursor::new(&mut self.stage2, &mut books.root).set(Run { pages, source }, &mut replaced);
        }
        for pages in &harvest.moved {
            books.runs.insert(pages.raw(), source);
            books.kept.remove(pages.raw());
        }
        harvest.copied.iter().for_each(|pages| books.kept.insert(pages.raw()));
        for (_, entry) in books.map.iter() {
            if let Some(top) = entry.object {
                self.objects.shorten(top, effects);
            }
        }
        self.free_unseen(replaced, effects);
    }

    /// A new object over `below`, shown by the entry at `pages` from now on.
    pub(super) fn stack_top(&mut self, vm: VmId, pages: GfnRange, below: Option<ObjectId>, origin: Gfn) -> ObjectId {
        let top = self.objects.stack(below.map(|object| Backing { object, origin: origin.0 }));
        let pace = self.vm(vm).pace;
        self.objects.map(top, pace);
        self.vm_mut(vm).map.set(pages, MapEntry { object: Some(top), origin: Gfn(0), needs_copy: false });
        top
    }

    fn fill_top(
        &mut self,
        top: ObjectId,
        taken: &[GfnRange],
        private: &[GfnRange],
        store: StoreId,
        effects: &mut Effects,
    ) {
        for &pages in taken {
            // Only an object that is this VM's alone has slots here: what they held is hidden from everybody now.
            self.objects.vacate(top, pages, effects);
            let mut at = pages.start();
            for part in within(private, pages) {
                self.put_between(top, at, part.start(), Slot::Gap(store));
                self.objects.put(top, part.raw(), Slot::Unsettled(store));
                at = part.end();
            }
            self.put_between(top, at, pages.end(), Slot::Gap(store));
        }
    }

    fn put_between(&mut self, top: ObjectId, from: Gfn, to: Gfn, slot: Slot) {
        if from < to {
            self.objects.put(top, from.0..to.0, slot);
        }
    }
}

/// The parts of sorted ranges that lie within `bounds`.
fn within(ranges: &[GfnRange], bounds: GfnRange) -> impl Iterator<Item = GfnRange> {
    let first = ranges.partition_point(move |range| range.end() <= bounds.start());
    ranges[first..]
        .iter()
        .take_while(move |range| range.start() < bounds.end())
        .map(move |range| range.intersect(bounds))
}
