//! Figures: who has what to itself, and what is shared.

use crate::addr::PageCount;
use crate::family::{Family, VmId};
use crate::object::{Kind, Slot};
use crate::stage2::{View, entries};
use crate::window::{Source, StoreId};
use rangemap::{RangeMap, RangeSet};
use std::collections::HashMap;

/// How many VMs see each stored page, by store and guest frame. Made once for a report, by one pass over the distinct
/// tables.
#[derive(Debug, Default)]
pub struct Census(HashMap<StoreId, RangeMap<u64, u32>>);

/// A VM's pages by kind; they add up to its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Its live layer, and frozen pages that only it sees.
    pub private: u64,
    /// Frozen pages that others see too.
    pub shared: u64,
    /// Pages without storage.
    pub zero: u64,
    /// Frozen pages that have not settled; counted above as well.
    pub unsettled: u64,
    /// Frozen pages that are in swap only; counted above as well.
    pub swapped: u64,
}

/// Figures of a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Objects.
    pub objects: u64,
    /// Stores, files' included.
    pub stores: u64,
    /// Pages in stores, files' left out.
    pub resident: u64,
    /// Pages in swap only.
    pub swapped: u64,
    /// Pages that have not settled.
    pub unsettled: u64,
    /// Stage-2 tables.
    pub tables: u64,
    /// Stage-2 tables there would be if VMs shared none.
    pub unshared_tables: u64,
}

impl Family {
    /// Counts the viewers of every stored page.
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        let viewers = self.stage2.viewers(self.vms.values().map(|vm| vm.root));
        for (table, count) in viewers {
            for (pages, entry) in entries(self.stage2.shape(), self.stage2.table(table)) {
                if let View::Leaf(Source::Store { store, .. }) = entry.view(pages.start()) {
                    add(census.0.entry(store).or_default(), pages.raw(), count);
                }
            }
        }
        census
    }

    /// A VM's pages by kind. `live` is its live layer: the private pages of its window.
    pub fn page_counts(&self, id: VmId, census: &Census, live: &RangeSet<u64>) -> PageCounts {
        let vm = self.vm(id);
        let mut counts = PageCounts { private: live.iter().map(|r| r.end - r.start).sum(), ..PageCounts::default() };
        let mut memory = 0;
        for (pages, entry) in vm.map.iter() {
            memory += pages.count().0;
            for segment in self.objects.resolve(entry.object, entry.origin, pages) {
                let Some(found) = segment.found else { continue };
                match found.slot {
                    Slot::Unsettled(_) | Slot::Gap(_) => counts.unsettled += segment.pages.count().0,
                    Slot::Swapped(..) => counts.swapped += segment.pages.count().0,
                    _ => {}
                }
                let Some(viewers) = found.slot.store().and_then(|store| census.0.get(&store)) else { continue };
                if found.slot == Slot::Zero {
                    continue;
                }
                for part in live.gaps(&segment.pages.raw()) {
                    for (seen, &by) in viewers.overlapping(part.clone()) {
                        let pages = seen.end.min(part.end) - seen.start.max(part.start);
                        *(if by > 1 { &mut counts.shared } else { &mut counts.private }) += pages;
                    }
                }
            }
        }
        counts.zero = memory.saturating_sub(counts.private + counts.shared);
        counts
    }

    /// Objects one behind the other in a VM's longest chain.
    pub fn chain_depth(&self, id: VmId) -> u64 {
        let chains = self.vm(id).map.iter().map(|(_, entry)| self.objects.chain(entry.object).count() as u64);
        chains.max().unwrap_or(0)
    }

    /// Pages in stores, files' left out.
    pub fn resident(&self) -> PageCount {
        PageCount(self.objects.resident_pages)
    }

    /// Pages in one store.
    pub fn resident_in(&self, store: StoreId) -> PageCount {
        PageCount(self.objects.stores.get(&store).map_or(0, |account| account.resident))
    }

    /// Pages that have not settled.
    pub fn unsettled(&self) -> PageCount {
        let accounts = self.objects.stores.values();
        PageCount(accounts.map(|a| a.gaps + a.scratch.map_or(0, |scratch| scratch.left)).sum())
    }

    /// Figures of the family.
    pub fn totals(&self) -> Totals {
        let accounts = &self.objects.stores;
        let anonymous = accounts.values().filter(|account| account.kind == Kind::Anonymous);
        Totals {
            objects: self.objects.len() as u64,
            stores: accounts.len() as u64,
            resident: self.resident().0,
            swapped: anonymous.map(|account| account.swapped).sum(),
            unsettled: self.unsettled().0,
            tables: self.stage2.tables() as u64,
            unshared_tables: self.vms.values().map(|vm| self.stage2.tables_below(vm.root) as u64).sum(),
        }
    }
}

fn add(counts: &mut RangeMap<u64, u32>, pages: std::ops::Range<u64>, by: u32) {
    let seen: Vec<_> = counts
        .overlapping(pages.clone())
        .map(|(range, &count)| (range.start.max(pages.start)..range.end.min(pages.end), count))
        .collect();
    counts.insert(pages, by);
    for (range, count) in seen {
        counts.insert(range, count + by);
    }
}
