//! Map entries: which part of a VM's address space shows which part of which object.

use crate::addr::{Gfn, GfnRange};
use crate::object::ObjectId;
use rangemap::RangeMap;

/// What a stretch of guest frames shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The top object; none for memory nobody has written before the VM's last freeze.
    pub object: Option<ObjectId>,
    /// Guest frame of the object's page 0.
    pub origin: Gfn,
    /// The object is, or may get, shared: the next freeze stacks a new one. Set by a fork on both sides, and from birth
    /// over a file; cleared by the freeze that makes the VM's next object.
    pub needs_copy: bool,
}

impl MapEntry {
    /// Fresh memory.
    pub const ANONYMOUS: Self = Self { object: None, origin: Gfn(0), needs_copy: false };

    /// Whether a write makes a private copy of something: stores are never written through a window, so this holds for
    /// all but memory that shows no object yet.
    pub fn copy_on_write(&self) -> bool {
        self.object.is_some()
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

    /// The entry at a frame, and all its frames.
    pub fn get(&self, gfn: Gfn) -> Option<(GfnRange, MapEntry)> {
        self.0.get_key_value(&gfn.0).map(|(pages, &entry)| (pages.clone().into(), entry))
    }

    /// All entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = (GfnRange, MapEntry)> {
        self.0.iter().map(|(pages, &entry)| (pages.clone().into(), entry))
    }

    /// Marks every entry that shows an object: what it shows is shared from now on.
    pub(crate) fn share(&mut self) {
        let shared: Vec<_> = self.iter().filter(|(_, entry)| entry.copy_on_write()).collect();
        for (pages, entry) in shared {
            self.set(pages, MapEntry { needs_copy: true, ..entry });
        }
    }
}
