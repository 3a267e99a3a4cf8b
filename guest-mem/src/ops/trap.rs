//! Trap: a guest waits for a page that is not there.

use super::settle::Job;
use crate::addr::{Gfn, GfnRange, PageCount};
use crate::family::{Family, VmId};
use crate::object::{Kind, Slot};
use crate::window::StoreId;

/// Pages served together: 64 KiB.
pub(crate) const CLUSTER: PageCount = PageCount(16);
/// Zero pages supplied together: 2 MiB.
const ZERO_CLUSTER: PageCount = PageCount(512);

/// What a trap needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// The page is there: wake who waits.
    Wake(GfnRange),
    /// These pages are zero.
    Zero(GfnRange),
    /// The VM is being frozen, and this page, zero as far as we know, may have been written, and moved out: wait until
    /// the freeze is over, and look again.
    Wait,
    /// First this job, then ask again.
    Settle(Job),
    /// These pages of a file's store must be filled from the file; then the window is woken.
    File {
        /// The file's store.
        store: StoreId,
        /// Its pages.
        pages: GfnRange,
        /// The same pages, as guest frames.
        wake: GfnRange,
    },
    /// The page is lost.
    Lost,
    /// The VM has no memory here.
    Outside,
}

impl Family {
    /// What a trap of `vm` at `gfn` needs.
    pub fn trap(&self, vm: VmId, gfn: Gfn) -> Trap {
        let Some((entry_pages, entry)) = self.vm(vm).map.get(gfn) else { return Trap::Outside };
        let cluster = aligned(gfn, CLUSTER).intersect(entry_pages);
        let segments = self.objects.resolve(entry.object, entry.origin, cluster);
        let segment = segments.iter().find(|segment| segment.pages.contains(gfn)).expect("the cluster holds the page");
        let Some(found) = segment.found else { return self.zeros(vm, gfn) };
        match found.slot {
            Slot::Zero => self.zeros(vm, gfn),
            Slot::Lost(_) => Trap::Lost,
            Slot::Unsettled(_) | Slot::Gap(_) => {
                Trap::Settle(self.job(found.object, found.indexes(segment.pages), found.slot))
            }
            Slot::Resident(store) => match self.objects.get(found.object).kind {
                Kind::Anonymous => Trap::Wake(segment.pages),
                Kind::File => Trap::File { store, pages: found.indexes(segment.pages), wake: segment.pages },
            },
        }
    }

    /// The zero pages around `gfn`.
    fn zeros(&self, vm: VmId, gfn: Gfn) -> Trap {
        if self.vm(vm).freezing.is_some() {
            return Trap::Wait;
        }
        let (entry_pages, entry) = self.vm(vm).map.get(gfn).expect("a trap within the VM's memory");
        let around = aligned(gfn, ZERO_CLUSTER).intersect(entry_pages);
        let mut zeros = rangemap::RangeSet::new();
        for segment in self.objects.resolve(entry.object, entry.origin, around) {
            if segment.found.is_none_or(|found| found.slot == Slot::Zero) {
                zeros.insert(segment.pages.raw());
            }
        }
        let zeros = GfnRange::from(zeros.get(&gfn.0).expect("the page is zero").clone());
        let run = self.vm(vm).runs.get_key_value(&gfn.0).expect("a trap within the window").0;
        Trap::Zero(zeros.intersect(run.clone().into()))
    }
}

/// The aligned group of `size` frames that holds `gfn`.
fn aligned(gfn: Gfn, size: PageCount) -> GfnRange {
    GfnRange::new(Gfn(gfn.0 / size.0 * size.0), size)
}
