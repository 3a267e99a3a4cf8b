//! Trap: a guest waits for a page that is not there.

use crate::addr::cluster::CLUSTER;
use crate::addr::extents::push;
use crate::addr::{Gfn, GfnRange, PageCount, PageRange};
use crate::family::{Family, Freezing};
use crate::ids::{Source, StoreId, VmId};
use crate::object::{Loss, ObjectKind, Segment, Slot, ZERO_CLUSTER};
use crate::ops::writeback::WritebackJob;
use crate::reclaim::swap_in::SwapIn;

/// What a trap needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The page is there: wake who waits.
    Wake(GfnRange),
    /// These pages are zero, and its window maps stores there.
    Zero(Vec<GfnRange>),
    /// The VM stands still for a freeze, or has just gone on, and this page may have been moved out: wait until the freeze is
    /// over, and look again.
    Wait,
    /// First this job, then ask again.
    WriteBack(WritebackJob),
    /// First these pages must be read from swap, then ask again.
    SwapIn(SwapIn),
    /// These pages of a file's store must be filled from the file; then the window is woken.
    File {
        /// The file's store.
        store: StoreId,
        /// Its pages.
        pages: PageRange,
        /// The same pages, as guest frames.
        wake: GfnRange,
    },
    /// The page is lost.
    Lost(Loss),
    /// The VM has no memory here.
    Outside,
}

impl Family {
    /// What a trap of `vm` at `gfn` needs.
    pub fn fault(&self, vm: VmId, gfn: Gfn) -> Fault {
        if self.vm(vm).map.get(gfn).is_none() {
            return Fault::Outside;
        }
        if let Some(Freezing::Standing(_)) = self.vm(vm).freezing {
            // It runs again, and the page may have been moved out: the books are of the time before.
            return Fault::Wait;
        }
        if self.vm(vm).overlay.kept.get(gfn).is_some() {
            // A late one: the page is there.
            return Fault::Wake(GfnRange::new(gfn, PageCount(1)));
        }
        self.beneath(vm, gfn)
    }

    /// What it takes to have what `vm` sees at `gfn` in a store, whether its window keeps that page or not.
    pub fn beneath(&self, vm: VmId, gfn: Gfn) -> Fault {
        let Some((entry_pages, _)) = self.vm(vm).map.get(gfn) else { return Fault::Outside };
        let segments = self.shown(vm, aligned(gfn, CLUSTER).intersect(entry_pages));
        let segment = segments.iter().find(|segment| segment.pages.contains(gfn)).expect("the cluster holds the page");
        let Some(found) = segment.found else { return self.zeros(vm, gfn) };
        match found.slot {
            Slot::Zero => self.zeros(vm, gfn),
            Slot::Lost(_, loss) => Fault::Lost(loss),
            Slot::InFlight(_) | Slot::CopyUp(..) => {
                Fault::WriteBack(self.job(found.object, found.indexes(segment.pages), found.slot))
            }
            Slot::Swapped(_, base) => {
                let page = found.origin.page(gfn);
                Fault::SwapIn(self.swap_in(found.object, page, base))
            }
            Slot::Resident(store) | Slot::Clean(store, _) => match self.objects.get(found.object).kind {
                // Shared memory is there, or becomes so by the touch.
                ObjectKind::Anonymous | ObjectKind::Shared => Fault::Wake(segment.pages),
                ObjectKind::File => Fault::File { store, pages: found.indexes(segment.pages), wake: segment.pages },
            },
        }
    }

    /// Those of `pages` that are in stores of the family: a touch by `vm` finds them, and does not trap.
    pub fn at_hand(&self, vm: VmId, pages: GfnRange) -> Vec<GfnRange> {
        let stored = self.shown(vm, pages).into_iter().filter(|segment| {
            let found = segment.found.filter(|found| found.slot.resident().is_some());
            found.is_some_and(|found| self.objects.get(found.object).kind == ObjectKind::Anonymous)
        });
        stored.map(|segment| segment.pages).collect()
    }

    /// The zero pages around `gfn`.
    fn zeros(&self, vm: VmId, gfn: Gfn) -> Fault {
        if self.vm(vm).freezing.is_some() {
            // Nothing but the page that keeps the guest from being stopped: others may be moved out meanwhile.
            return Fault::Zero(vec![aligned(gfn, PageCount(1))]);
        }
        Fault::Zero(self.trapping_zeros(vm, aligned(gfn, ZERO_CLUSTER)))
    }

    /// Those of `pages` that are zero, and that the window of `vm` takes from stores: a touch traps. Stretches that lie in one
    /// run each, since no call supplies zeros to two mappings.
    pub fn trapping_zeros(&self, vm: VmId, pages: GfnRange) -> Vec<GfnRange> {
        let mut zeros = Vec::new();
        for run in self.window_runs(vm, pages).into_iter().filter(|run| matches!(run.source, Source::Store { .. })) {
            let mut of_run = Vec::new();
            let shown = self.shown(vm, run.pages).into_iter();
            shown.filter(Segment::is_zero).for_each(|segment| push(&mut of_run, segment.pages));
            zeros.append(&mut of_run);
        }
        zeros
    }

    /// What `vm` sees of `pages`, as of its last freeze; in order. Stage-2 says which store's page each frame shows, and the
    /// slot that names this page says where it is now: no chain is asked, so this costs the same at any depth. Frames
    /// outside of its memory do not count.
    ///
    /// It is what a look down the chain tells, but for zeros: a page that has turned out zero names no store any more, and
    /// its leaves go on to show the hole it left. So the rule is: *a leaf names the one page that a frame can show, and that
    /// page is zero where no slot names it*. A copy-up's slot names the page that is to be filled. Windows lag behind: where
    /// one keeps a copy, stage-2 says what lies beneath it, and where it bridges zeros, that they are zero.
    pub(crate) fn shown(&self, vm: VmId, pages: GfnRange) -> Vec<Segment> {
        let runs = self.stage2.runs(self.vm(vm).root, pages).into_iter();
        let segments = runs.flat_map(|run| match run.source.store() {
            None => vec![Segment { pages: run.pages, found: None }],
            Some((store, origin)) => self.objects.stored(store, origin, run.pages),
        });
        segments.collect()
    }
}

/// The aligned group of `size` frames that holds `gfn`.
fn aligned(gfn: Gfn, size: PageCount) -> GfnRange {
    GfnRange::new(Gfn(gfn.0 / size.0 * size.0), size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effect::Effects;
    use crate::ops::Placed;
    use crate::stage2::Shape;
    use crate::window::Harvest;

    /// A guest wrote fresh memory, was frozen, and touched it again before the books knew of the freeze: they said zero,
    /// and zeros were put over what the guest had written.
    #[test]
    fn no_zeros_while_pages_may_be_on_their_way_out() {
        let ram = GfnRange::new(Gfn(0), PageCount(64));
        let mut family = Family::new(Shape::X86_64);
        let mut effects = Effects::default();
        let vm = family.launch(&[ram], &[]);
        let page = GfnRange::new(Gfn(5), PageCount(1));

        family.begin_freeze(vm);
        assert_eq!(family.fault(vm, Gfn(5)), Fault::Zero(vec![page]), "a guest that waits cannot be stopped");
        family.stands(vm);
        assert_eq!(family.fault(vm, Gfn(5)), Fault::Wait);
        family.finish_freeze(
            vm,
            &Harvest { moved: vec![ram], moved_private: vec![ram], ..Harvest::default() },
            PageCount(0),
            &mut effects,
        );
        assert!(matches!(family.fault(vm, Gfn(5)), Fault::WriteBack(_)));
    }

    /// The same by the other road: pages of an earlier freeze turned out zero, and their window got zeros ahead of its
    /// touches, over what it had written since.
    #[test]
    fn no_zeros_ahead_into_a_window_that_is_being_frozen() {
        let ram = GfnRange::new(Gfn(0), PageCount(64));
        let mut family = Family::new(Shape::X86_64);
        let mut effects = Effects::default();
        let vm = family.launch(&[ram], &[]);
        let other = family.fork(vm, 1000);
        family.begin_freeze(vm);
        family.finish_freeze(
            vm,
            &Harvest { moved: vec![ram], moved_private: vec![ram], ..Harvest::default() },
            PageCount(0),
            &mut effects,
        );
        let child = family.fork(vm, 1000);
        family.begin_freeze(vm);
        let job = family.next_job(PageCount(64)).unwrap();
        let mut effects = Effects::default();
        family.written_back(&job, &[(job.pages, Placed::Zero)], &mut effects);
        let zeros =
            |id| effects.0.iter().any(|effect| matches!(effect, crate::effect::Effect::Zero(vm, _) if *vm == id));
        assert!(zeros(child) && !zeros(vm) && !zeros(other));
    }
}
