//! Protect: what a VM may do with a part of its memory.
//!
//! This is Tweedie's question (linux-mm, 2000): a child that protects arbitrary regions has areas of its own afterwards,
//! and still shares the pages. Here the entry is split, both parts show the same object, and nothing beneath them changes:
//! no page is copied, no table is unshared, and the relatives do not notice.

use crate::addr::GfnRange;
use crate::effect::Effects;
use crate::family::Family;
use crate::ids::VmId;
use crate::space::map::{AddressMap, Protection};

impl Family {
    /// From now on `vm` has this protection at `pages`: its window shows it already. Frames outside of its memory do not
    /// count.
    pub fn protect(&mut self, vm: VmId, pages: GfnRange, protection: Protection, effects: &mut Effects) {
        self.edit_map(vm, |map| map.change(pages, |entry| entry.protection = protection), effects);
    }

    /// Changes the map of `vm`, and how many entries show each object: every one that the map has afterwards counts before
    /// those that it had do not any more, so that no object goes in between.
    pub(super) fn edit_map(&mut self, vm: VmId, edit: impl FnOnce(&mut AddressMap), effects: &mut Effects) {
        let books = self.vms.get_mut(&vm).expect("a VM of this family");
        let before: Vec<_> = books.map.objects().collect();
        edit(&mut books.map);
        books.map.objects().for_each(|object| self.objects.map(object, vm, books.activity));
        let activity = books.activity;
        before.into_iter().for_each(|object| self.objects.unmap(object, vm, activity, effects));
    }
}
