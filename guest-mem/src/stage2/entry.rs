//! An entry of a stage-2 table: 8 bytes that say what supplies a stretch of guest frames, or which table knows.

use crate::addr::{Gfn, PageCount, PageIndex, PageOrigin};
use crate::ids::{Source, StoreId};

/// Names a table of its [`Stage2`](super::Stage2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u32);

/// What an entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Nothing known: ask the chain.
    Empty,
    /// All frames below it have this source.
    Leaf(Source),
    /// The table of the next level down.
    Table(TableId),
}

/// A [`View`] in 8 bytes: 3 bits of kind, then 27 bits of store and 34 of the index of the store's page at the entry's
/// first frame, or 32 bits of table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Entry(u64);

const KIND_BITS: u32 = 3;
const STORE_BITS: u32 = 27;
/// So many stores can be named.
pub(crate) const MAX_STORES: u32 = 1 << STORE_BITS;
const EMPTY: u64 = 0;
const ANONYMOUS: u64 = 1;
const STORE: u64 = 2;
const TABLE: u64 = 3;
const SHARED: u64 = 4;

impl Entry {
    /// An entry whose first frame is `first`.
    ///
    /// # Panics
    /// If a store's number or page index does not fit: 134 million stores, 64 TiB.
    pub fn new(view: View, first: Gfn) -> Self {
        Self(match view {
            View::Empty => EMPTY,
            View::Leaf(Source::Anonymous) => ANONYMOUS,
            View::Leaf(Source::Store { store, origin }) => STORE | page(store, origin, first),
            View::Leaf(Source::Shared { store, origin }) => SHARED | page(store, origin, first),
            View::Table(table) => TABLE | u64::from(table.0) << KIND_BITS,
        })
    }

    /// Whether it goes on with what the entry `span` frames before it says.
    pub(super) fn continues(self, before: Self, span: PageCount) -> bool {
        let step = match self.0 & ((1 << KIND_BITS) - 1) {
            TABLE => return false,
            STORE | SHARED => span.0 << (KIND_BITS + STORE_BITS),
            _ => 0,
        };
        self.0 == before.0.wrapping_add(step)
    }

    /// What the entry, whose first frame is `first`, holds.
    pub fn view(self, first: Gfn) -> View {
        let payload = self.0 >> KIND_BITS;
        match self.0 & ((1 << KIND_BITS) - 1) {
            EMPTY => View::Empty,
            ANONYMOUS => View::Leaf(Source::Anonymous),
            kind @ (STORE | SHARED) => {
                let store = StoreId((payload & ((1 << STORE_BITS) - 1)) as u32);
                let origin = PageOrigin::of(PageIndex(payload >> STORE_BITS), first);
                View::Leaf(match kind {
                    STORE => Source::Store { store, origin },
                    _ => Source::Shared { store, origin },
                })
            }
            _ => View::Table(TableId(payload as u32)),
        }
    }
}

/// A store and its page at the first frame, behind the bits of the kind.
fn page(store: StoreId, origin: PageOrigin, first: Gfn) -> u64 {
    let PageIndex(index) = origin.page(first);
    assert!(store.0 < MAX_STORES && index < 1 << (64 - KIND_BITS - STORE_BITS), "stage-2 leaf overflow");
    u64::from(store.0) << KIND_BITS | index << (KIND_BITS + STORE_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_view_survives_its_encoding() {
        let first = Gfn(1 << 30);
        for view in [
            View::Empty,
            View::Leaf(Source::Anonymous),
            View::Leaf(Source::Store { store: StoreId(MAX_STORES - 1), origin: PageOrigin(0) }),
            View::Leaf(Source::Store { store: StoreId(7), origin: PageOrigin::at(first) }),
            View::Leaf(Source::Store { store: StoreId(0), origin: PageOrigin::of(PageIndex(5), first) }),
            View::Leaf(Source::Shared { store: StoreId(MAX_STORES - 1), origin: PageOrigin::of(PageIndex(5), first) }),
            View::Table(TableId(u32::MAX)),
        ] {
            assert_eq!(Entry::new(view, first).view(first), view);
        }
    }
}
