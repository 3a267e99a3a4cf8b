//! Figures: who has what to itself, and what is shared.

use crate::addr::{GfnRange, PageCount};
use crate::family::Family;
use crate::ids::{StoreId, VmId};
use crate::object::{ObjectKind, Slot};
use crate::space::runs::push_run;
use crate::stage2::TableSharing;
use rangemap::RangeSet;
use std::ops::{AddAssign, Range};

/// A VM's pages by kind; they add up to its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageCounts {
    /// Its live layer, and frozen pages and shared memory that only it sees.
    pub private: u64,
    /// Frozen pages, and pages of shared memory, that others see too.
    pub shared: u64,
    /// Pages without storage.
    pub zero: u64,
    /// Frozen pages that have not been written back; counted above as well.
    pub in_flight: u64,
    /// Frozen pages that are in swap only; counted above as well.
    pub swapped: u64,
}

/// Figures of a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FamilyTotals {
    /// Objects.
    pub objects: u64,
    /// Stores, files' included.
    pub stores: u64,
    /// Pages in stores, those of files and of shared memory left out.
    pub resident: u64,
    /// Pages of shared memory, written or not, each once.
    pub shared: u64,
    /// Pages in swap only.
    pub swapped: u64,
    /// Pages that have not been written back.
    pub in_flight: u64,
    /// Stage-2 tables.
    pub tables: u64,
    /// Stage-2 tables there would be if VMs shared none.
    pub unshared_tables: u64,
}

/// Of two parts of a VM's memory.
impl AddAssign for PageCounts {
    fn add_assign(&mut self, other: Self) {
        self.private += other.private;
        self.shared += other.shared;
        self.zero += other.zero;
        self.in_flight += other.in_flight;
        self.swapped += other.swapped;
    }
}

impl Family {
    /// A VM's pages by kind. `live` is its live layer: the private pages of its window. Costs as much as the VM has leaves: what
    /// a shared table shows is shared, and of what only its own tables show the reverse map knows whether others see it.
    pub fn page_counts(&self, id: VmId, live: &RangeSet<u64>) -> PageCounts {
        self.page_counts_within(id, (0..u64::MAX).into(), live)
    }

    /// The same of those frames of its memory that lie in `pages`.
    pub fn page_counts_within(&self, id: VmId, pages: GfnRange, live: &RangeSet<u64>) -> PageCounts {
        let vm = self.vm(id);
        let count = |pages: &Range<u64>| pages.end - pages.start;
        let inside = pages.raw();
        let written = live.overlapping(&inside).map(|part| GfnRange::from(part.clone()).intersect(pages).count().0);
        let mut counts = PageCounts { private: written.sum(), ..PageCounts::default() };
        let (mut own, mut shared) = (Vec::new(), Vec::new());
        let mut memory = 0;
        for (bounds, _) in vm.map.iter() {
            let bounds = bounds.intersect(pages);
            if bounds.is_empty() {
                continue;
            }
            memory += bounds.count().0;
            self.stage2.for_each_leaf(vm.root, &[bounds], TableSharing::Own, &mut |run, sharing| match sharing {
                TableSharing::Own => push_run(&mut own, run),
                TableSharing::Shared => push_run(&mut shared, run),
            });
        }
        let own = own.into_iter().map(|run| (run, TableSharing::Own));
        for (run, sharing) in own.chain(shared.into_iter().map(|run| (run, TableSharing::Shared))) {
            let Some((store, origin)) = run.source.store() else { continue };
            let indexes = origin.pages(run.pages);
            let by_others = match sharing {
                TableSharing::Own => self.seen(store, indexes, Some(id)),
                TableSharing::Shared => RangeSet::from_iter([indexes.raw()]),
            };
            for segment in self.objects.stored(store, origin, run.pages) {
                let Some(found) = segment.found else { continue };
                match found.slot {
                    Slot::InFlight(_) | Slot::CopyUp(..) => counts.in_flight += segment.pages.count().0,
                    Slot::Swapped(..) => counts.swapped += segment.pages.count().0,
                    _ => {}
                }
                for frozen in live.gaps(&segment.pages.raw()) {
                    let pages = origin.pages(frozen.clone().into()).raw();
                    let own: u64 = by_others.gaps(&pages).map(|part| count(&part)).sum();
                    counts.private += own;
                    counts.shared += count(&pages) - own;
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
        PageCount(self.objects.accounts.resident_pages)
    }

    /// Pages in one store.
    pub fn resident_in(&self, store: StoreId) -> PageCount {
        PageCount(self.objects.accounts.stores.get(&store).map_or(0, |account| account.resident))
    }

    /// Pages that have not been written back.
    pub fn in_flight(&self) -> PageCount {
        let accounts = self.objects.accounts.stores.values();
        PageCount(accounts.map(|a| a.copy_ups + a.scratch.map_or(0, |scratch| scratch.left)).sum())
    }

    /// Figures of the family.
    pub fn totals(&self) -> FamilyTotals {
        let accounts = &self.objects.accounts.stores;
        let anonymous = accounts.values().filter(|account| account.kind == ObjectKind::Anonymous);
        FamilyTotals {
            objects: self.objects.len() as u64,
            stores: accounts.len() as u64,
            resident: self.resident().0,
            shared: accounts.values().filter(|a| a.kind == ObjectKind::Shared).map(|account| account.resident).sum(),
            swapped: anonymous.map(|account| account.swapped).sum(),
            in_flight: self.in_flight().0,
            tables: self.stage2.tables() as u64,
            unshared_tables: self.stage2.unshared(self.vms.values().map(|vm| vm.root)),
        }
    }
}
