//! Map, unmap and move: something is where a VM had nothing, or nothing where it had something.
//!
//! As `mmap` and `munmap` do it: an entry that is cut in the middle becomes two of the same object and origin, and what is
//! mapped beside an entry that it continues is one with it. Whatever a VM maps anew is fresh, whatever an ancestor had there.
//!
//! A move, as by `mremap`, moves no page: *offset is `vm_pgoff`, whatever mremap does* (linux-mm 2000). The pages stay in
//! their objects and stores, where they had their numbers from the frames where they were frozen, and go on to be shared with
//! relatives that have them elsewhere; entries, leaves and the window's overlay say of this VM that they stand so much further
//! on. Torvalds (2004) had a page that others map copied when it moves, since its number was all that told where to look for it
//! in any of them. Here the reverse map finds it: an entry says where its object stands in this VM, and an object where it
//! stands over the one beneath. What is written after the move is frozen into an object of its own, in which pages have the
//! numbers of their new frames. So objects of which a part was moved are never [merged](crate::object::Objects::tidy) with
//! those above: their pages cannot change their numbers. They go when all of their pages are hidden, or nobody's.

use crate::addr::{Distance, GfnRange, PageOrigin};
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
            Some(_) => MapEntry {
                object: shared,
                origin: PageOrigin::at(pages.start()),
                sharing: Sharing::Shared,
                ..MapEntry::ANONYMOUS
            },
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
        let origin = PageOrigin::at(pages.start());
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

    /// `vm` has so far from `pages`, where it had nothing, what it had there: its window shows it already. No page is copied, or
    /// freed.
    pub(crate) fn move_pages(&mut self, vm: VmId, pages: GfnRange, by: Distance, effects: &mut Effects) {
        let books = self.vms.get_mut(&vm).expect("a VM of this family");
        let runs = self.stage2.runs(books.root, pages);
        let mut cursor = Cursor::new(&mut self.stage2, &mut books.root);
        cursor.clear(pages, &mut Vec::new());
        runs.into_iter().for_each(|run| cursor.set(run.moved(by), &mut Vec::new()));
        books.overlay.move_pages(pages, by);
        // Zeros between pages may be no longer.
        books.bridges = outside(&books.bridges, &[pages]);
        books.dedup = None;
        books.has_changed();
        self.edit_map(vm, |map| map.move_pages(pages, by), effects);
    }
}

impl VmBooks {
    /// Its window shows something else than before, and so will those of its children.
    fn has_changed(&mut self) {
        (self.runs, self.child) = Default::default();
    }
}
