//! Map entries: which part of a VM's address space shows which part of which object (Dillon, 2000, on FreeBSD's
//! `vm_map_entry`: *map entries* map portions of an address space to portions of a VM *object*).
//!
//! An entry says where its object's page 0 would stand, its *origin*, and not where in the object it begins: as Linux's
//! `vm_pgoff` does, this stays true whatever is cut off an entry or joined to it, so neighbours that continue each other
//! say the same and are one, and `mprotect` of a part makes three of one. For anonymous memory the origin is 0 in the whole
//! family until somebody [moves](crate::manager::Manager::move_pages) some of it; a file or shared memory may stand anywhere.

use crate::addr::{Distance, Gfn, GfnRange, PageOrigin};
use crate::ids::ObjectId;
use rangemap::RangeMap;
use serde::{Deserialize, Serialize};

/// What a VM may do with what an entry shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protection {
    /// It may read. A write never reaches memory, and is an error of the VM: its window refuses it.
    ReadOnly,
    /// It may read and write.
    #[default]
    ReadWrite,
}

/// What becomes of what a VM writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Sharing {
    /// It is the VM's own, and no relative sees it.
    #[default]
    CopyOnWrite,
    /// All who have the entry see it, the VM's children among them: `MAP_SHARED | MAP_ANONYMOUS` (Tweedie and LaHaise,
    /// linux-mm 2000).
    Shared,
}

/// What stretch of guest frames shows what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The top object; none for memory nobody has written before the VM's last freeze.
    pub object: Option<ObjectId>,
    /// Where its pages stand.
    pub origin: PageOrigin,
    /// The object is, or may get, shared: the next freeze stacks a new one. Set by a fork on both sides, and from birth
    /// over a file; cleared by the freeze that makes the VM's next object.
    pub needs_copy: bool,
    /// What the VM may do there. A child begins with its parent's.
    pub protection: Protection,
    /// Who sees what the VM writes there. The object of a shared entry is [shared memory](crate::object::ObjectKind::Shared): no
    /// freeze takes anything of it, and nothing is ever stacked on it.
    pub sharing: Sharing,
}

impl MapEntry {
    /// Fresh memory.
    pub const ANONYMOUS: Self = Self {
        object: None,
        origin: PageOrigin(0),
        needs_copy: false,
        protection: Protection::ReadWrite,
        sharing: Sharing::CopyOnWrite,
    };

    /// Whether a write makes a private copy of something. No other stores than those of shared memory are written through a
    /// window, so this holds for all but that, and memory that shows no object yet.
    pub fn copy_on_write(&self) -> bool {
        self.object.is_some() && !self.is_shared()
    }

    /// Whether it shows shared memory.
    pub fn is_shared(&self) -> bool {
        self.sharing == Sharing::Shared
    }
}

/// A VM's address space: entries in order, without overlap; neighbours that continue each other are one.
#[derive(Clone, Debug, Default)]
pub struct AddressMap(RangeMap<u64, MapEntry>);

impl AddressMap {
    /// Shows `entry` at `pages`, in place of what was there.
    pub fn set(&mut self, pages: GfnRange, entry: MapEntry) {
        if !pages.is_empty() {
            self.0.insert(pages.raw(), entry);
        }
    }

    /// Changes every entry of `pages`: those that reach beyond are split.
    pub(crate) fn change(&mut self, pages: GfnRange, change: impl Fn(&mut MapEntry)) {
        let there: Vec<_> = self.within(pages).collect();
        for (part, mut entry) in there {
            change(&mut entry);
            self.set(part, entry);
        }
    }

    /// Shows nothing at `pages` any more: entries that reach beyond are cut, and one that reaches beyond both ends becomes two.
    pub(crate) fn clear(&mut self, pages: GfnRange) {
        if !pages.is_empty() {
            self.0.remove(pages.raw());
        }
    }

    /// Shows, so far from `pages`, where it shows nothing, what it shows there, and nothing there any more. An entry's origin
    /// moves with it, and nothing else of it changes: the pages of its object keep their numbers.
    pub(crate) fn move_pages(&mut self, pages: GfnRange, by: Distance) {
        let there: Vec<_> = self.within(pages).collect();
        self.clear(pages);
        for (part, entry) in there {
            // Fresh memory stands anywhere.
            let origin = entry.object.map_or(entry.origin, |_| entry.origin.moved(by));
            self.set(part.moved(by), MapEntry { origin, ..entry });
        }
    }

    /// The entry at a frame, and all its frames.
    pub fn get(&self, gfn: Gfn) -> Option<(GfnRange, MapEntry)> {
        self.0.get_key_value(&gfn.0).map(|(pages, &entry)| (pages.clone().into(), entry))
    }

    /// All entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = (GfnRange, MapEntry)> {
        self.0.iter().map(|(pages, &entry)| (pages.clone().into(), entry))
    }

    /// What is at `pages`, in order, entries cut to them.
    pub fn within(&self, pages: GfnRange) -> impl Iterator<Item = (GfnRange, MapEntry)> {
        let there = self.0.overlapping(pages.raw());
        there.map(move |(part, &entry)| (pages.intersect(part.clone().into()), entry))
    }

    /// Whether something is at each of `pages`.
    pub fn covers(&self, pages: GfnRange) -> bool {
        self.0.gaps(&pages.raw()).next().is_none()
    }

    /// The stretches with this protection.
    pub fn protected(&self, protection: Protection) -> impl Iterator<Item = GfnRange> {
        self.iter().filter(move |(_, entry)| entry.protection == protection).map(|(pages, _)| pages)
    }

    /// The stretches of shared memory.
    pub fn shared(&self) -> impl Iterator<Item = GfnRange> {
        self.iter().filter(|(_, entry)| entry.is_shared()).map(|(pages, _)| pages)
    }

    /// The object of each entry that shows one.
    pub(crate) fn objects(&self) -> impl Iterator<Item = ObjectId> {
        self.0.iter().filter_map(|(_, entry)| entry.object)
    }

    /// Marks every entry that shows an object, but for shared memory: children see what it shows from now on.
    pub(crate) fn share(&mut self) {
        self.change((0..u64::MAX).into(), |entry| entry.needs_copy = entry.copy_on_write());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OBJECT: MapEntry = MapEntry { object: Some(ObjectId(7)), ..MapEntry::ANONYMOUS };

    fn all(map: &AddressMap) -> Vec<(std::ops::Range<u64>, MapEntry)> {
        map.iter().map(|(pages, entry)| (pages.raw(), entry)).collect()
    }

    fn protect(map: &mut AddressMap, pages: std::ops::Range<u64>, protection: Protection) {
        map.change(pages.into(), |entry| entry.protection = protection);
    }

    #[test]
    fn to_protect_a_part_splits_and_to_open_it_again_joins() {
        let read_only = MapEntry { protection: Protection::ReadOnly, ..OBJECT };
        let mut map = AddressMap::default();
        map.set((0..20).into(), OBJECT);
        protect(&mut map, 5..10, Protection::ReadOnly);
        assert_eq!(all(&map), [(0..5, OBJECT), (5..10, read_only), (10..20, OBJECT)]);
        assert_eq!(map.protected(Protection::ReadOnly).collect::<Vec<_>>(), [GfnRange::from(5..10)]);
        protect(&mut map, 10..12, Protection::ReadOnly);
        assert_eq!(all(&map), [(0..5, OBJECT), (5..12, read_only), (12..20, OBJECT)]);
        protect(&mut map, 5..8, Protection::ReadWrite);
        protect(&mut map, 0..30, Protection::ReadWrite);
        assert_eq!(all(&map), [(0..20, OBJECT)]);
    }

    #[test]
    fn a_change_reaches_over_entries_and_leaves_holes_alone() {
        let mut map = AddressMap::default();
        map.set((0..10).into(), OBJECT);
        map.set((10..12).into(), MapEntry::ANONYMOUS);
        map.set((15..20).into(), OBJECT);
        assert!(map.covers((0..12).into()) && !map.covers((0..16).into()));
        protect(&mut map, 8..16, Protection::ReadOnly);
        assert_eq!(map.protected(Protection::ReadOnly).map(GfnRange::raw).collect::<Vec<_>>(), [8..10, 10..12, 15..16]);
        assert_eq!(map.get(Gfn(12)), None);
    }

    #[test]
    fn to_clear_the_middle_makes_two_that_continue_each_other() {
        let mut map = AddressMap::default();
        map.set((0..20).into(), OBJECT);
        map.clear((8..12).into());
        map.clear((30..40).into());
        assert_eq!(all(&map), [(0..8, OBJECT), (12..20, OBJECT)]);
        map.set((8..12).into(), MapEntry::ANONYMOUS);
        assert_eq!(map.iter().count(), 3);
        map.set((8..12).into(), OBJECT);
        assert_eq!(all(&map), [(0..20, OBJECT)]);
    }

    /// What moves keeps its index, and its origin tells where it stands: at home again, it is one with its neighbours.
    #[test]
    fn what_moves_away_and_back_is_as_it_was() {
        let mut map = AddressMap::default();
        map.set((10..20).into(), OBJECT);
        map.set((20..22).into(), MapEntry::ANONYMOUS);
        let by = |from, to| Distance::between(Gfn(from), Gfn(to));
        map.move_pages((15..22).into(), by(15, 3));
        let moved = MapEntry { origin: PageOrigin(-12), ..OBJECT };
        assert_eq!(all(&map), [(3..8, moved), (8..10, MapEntry::ANONYMOUS), (10..15, OBJECT)]);
        map.move_pages((3..8).into(), by(3, 15));
        assert_eq!(all(&map), [(8..10, MapEntry::ANONYMOUS), (10..20, OBJECT)]);
    }

    /// The same object at another distance is not continued: origin and index differ.
    #[test]
    fn only_neighbours_that_continue_each_other_are_one() {
        let mut map = AddressMap::default();
        map.set((0..10).into(), OBJECT);
        map.set((10..20).into(), MapEntry { origin: PageOrigin(10), ..OBJECT });
        assert_eq!(map.iter().count(), 2);
        map.set((10..20).into(), OBJECT);
        assert_eq!(all(&map), [(0..20, OBJECT)]);
    }
}
