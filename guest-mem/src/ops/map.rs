//! Map and unmap: something is where a VM had nothing, or nothing where it had something.
//!
//! As `mmap` and `munmap` do it: an entry that is cut in the middle becomes two of the same object and origin, and what is
//! mapped beside an entry that it continues is one with it. Whatever a VM maps anew is fresh, whatever an ancestor had there.

use crate::addr::GfnRange;
use crate::effect::Effects;
use crate::family::{Family, VmBooks};
use crate::ids::{ObjectId, Run, Source, VmId};
use crate::space::map::{MapEntry, Sharing};
use crate::space::runs::outside;
use crate::stage2::Cursor;

impl Family {
    /// `vm` has fresh memory at `pages`, where it had nothing, or `shared` memory, from its page 0 on: its window shows it
    /// already.
    pub(crate) fn map(&mut self, vm: VmId, pages: GfnRange, shared: Option<ObjectId>, effects: &mut Effects) {
        let entry = match shared {
            None => MapEntry::ANONYMOUS,
            Some(_) => {
                MapEntry { object: shared, origin: pages.start(), sharing: Sharing::Shared, ..MapEntry::ANONYMOUS }
            }
        };
        let run = self.run_of(pages, shared);
        let books = self.vms.get_mut(&vm).expect("a VM of this family");
        Cursor::new(&mut self.stage2, &mut books.root).set(run, &mut Vec::new());
        books.has_changed();
        self.edit_map(vm, |map| map.set(pages, entry), effects);
    }

    /// What a window maps at `pages` that are fresh, or show shared memory from its page 0 on.
    pub(crate) fn run_of(&self, pages: GfnRange, shared: Option<ObjectId>) -> Run {
        let store = shared.and_then(|object| self.objects.stores_of(object).next());
        let origin = pages.start();
        Run { pages, source: store.map_or(Source::Anonymous, |store| Source::Shared { store, origin }) }
    }

    /// `vm` has nothing at `pages` any more: its window shows nothing there already. What nobody sees by that is freed at
    /// once, pages of shared memory among it. Frames where it had nothing do not count.
    pub fn unmap(&mut self, vm: VmId, pages: GfnRange, effects: &mut Effects) {
        let mut replaced = Vec::new();
        let books = self.vms.get_mut(&vm).expect("a VM of this family");
        Cursor::new(&mut self.stage2, &mut books.root).clear(pages, &mut replaced);
        books.overlay.uncover(&[pages]);
        books.bridges = outside(&books.bridges, &[pages]);
        books.has_changed();
        self.edit_map(vm, |map| map.clear(pages), effects);
        self.free_unseen(replaced, effects);
    }
}

impl VmBooks {
    /// Its window shows something else than before, and so will those of its children.
    fn has_changed(&mut self) {
        (self.runs, self.child) = Default::default();
    }
}
