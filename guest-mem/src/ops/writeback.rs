//! Write-back: moved-out pages get into their store, behind the back of the VMs that run on.

use crate::addr::{PageCount, PageIndex, PageOrigin, PageRange};
use crate::effect::{Effect, Effects};
use crate::family::Family;
use crate::ids::{ObjectId, Run, Source, StoreId, SwapSlot, VmId};
use crate::object::accounts::StoreAccount;
use crate::object::{Found, Loss, Segment, Slot, SwapBase};
use std::ops::ControlFlow;

/// Where the bytes of a job are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyFrom {
    /// In the scratch range of this VM's window.
    Scratch(VmId),
    /// In another store, from this page on.
    Store(StoreId, PageIndex),
    /// In swap, in consecutive slots.
    Swap {
        /// The object that they are to be copied from.
        object: ObjectId,
        /// The first of them there.
        page: PageIndex,
        /// Its slot.
        first: SwapSlot,
    },
    /// Nowhere: they are zero.
    Zero,
    /// Nowhere any more.
    Lost(Loss),
}

/// Pages to put into a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WritebackJob {
    /// The object they belong to.
    pub(crate) object: ObjectId,
    /// The object whose write-back waits for this.
    pub(crate) needed_by: ObjectId,
    /// Which.
    pub pages: PageRange,
    /// The store they belong into.
    pub store: StoreId,
    /// Where they are.
    pub from: CopyFrom,
}

/// What became of pages of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// They are in the store.
    Stored,
    /// They are zero, and take no storage.
    Zero,
    /// They are in swap.
    Swapped(SwapBase),
    /// Their bytes are gone.
    Lost(Loss),
}

impl Family {
    /// Some pages that have not been written back, at most `limit`; none if all have, or are on their way.
    pub fn next_job(&mut self, limit: PageCount) -> Option<WritebackJob> {
        loop {
            let object = self.objects.writeback.next()?;
            if let Some((pages, slot)) = self.objects.next_pending(object, limit) {
                return Some(self.job(object, pages, slot));
            }
        }
    }

    /// What has to be done for pending pages of one state: a job for them, or for what they are to be copied from.
    pub(crate) fn job(&self, object: ObjectId, pages: PageRange, slot: Slot) -> WritebackJob {
        let needed_by = object;
        let (mut object, mut pages, mut slot) = (object, pages, slot);
        // Copy-ups may lie over copy-ups, generation over generation.
        loop {
            let store = slot.store().expect("a pending page is bound for a store");
            if let Slot::InFlight(_) = slot {
                let scratch =
                    self.objects.accounts.stores[&store].scratch.expect("an unsettled page waits in a scratch range");
                return WritebackJob { object, needed_by, pages, store, from: CopyFrom::Scratch(scratch.holder) };
            }
            // An object has the page of each frame at that frame's number.
            let frames = PageOrigin(0).frames(pages);
            let segment = match slot {
                Slot::CopyUp(_, Source::Store { store, origin }) => self.objects.stored(store, origin, frames)[0],
                _ => Segment { pages: frames, found: None },
            };
            let from = match segment.found {
                None | Some(Found { slot: Slot::Zero, .. }) => CopyFrom::Zero,
                Some(Found { slot: Slot::Lost(_, loss), .. }) => CopyFrom::Lost(loss),
                Some(Found { slot: Slot::Resident(store) | Slot::Clean(store, _), origin, .. }) => {
                    CopyFrom::Store(store, origin.page(segment.pages.start()))
                }
                Some(Found { object, slot: Slot::Swapped(_, base), origin }) => {
                    let page = origin.page(segment.pages.start());
                    CopyFrom::Swap { object, page, first: base.slot(page) }
                }
                Some(found @ Found { slot: Slot::InFlight(_) | Slot::CopyUp(..), .. }) => {
                    (object, pages, slot) = (found.object, found.indexes(segment.pages), found.slot);
                    continue;
                }
            };
            return WritebackJob { object, needed_by, pages: PageOrigin(0).pages(segment.pages), store, from };
        }
    }

    /// A job for a page of each scratch range that `vm` holds.
    pub(crate) fn jobs_of(&self, vm: VmId) -> Vec<WritebackJob> {
        if !self.objects.accounts.waits_for(vm) {
            return Vec::new();
        }
        let held = |account: &StoreAccount| account.scratch.is_some_and(|scratch| scratch.holder == vm);
        let stores = self.objects.accounts.stores.iter().filter(|(_, account)| held(account));
        let first = |&store: &StoreId| {
            let (object, pages) = self.in_flight_of(store).next()?;
            Some(self.job(object, pages, Slot::InFlight(store)))
        };
        stores.filter_map(|(store, _)| first(store)).collect()
    }

    /// The pages that wait in the scratch range of the freeze into `store`, and whose they are.
    fn in_flight_of(&self, store: StoreId) -> impl Iterator<Item = (ObjectId, PageRange)> {
        let owners = self.objects.accounts.owners(store).map(|(object, _)| object);
        owners.flat_map(move |object| {
            let slots = self.objects.get(object).slots.iter();
            slots.filter(move |(_, slot)| *slot == Slot::InFlight(store)).map(move |(pages, _)| (object, pages))
        })
    }

    /// What had the pages of the freeze into `store` has gone, and so have they.
    pub(crate) fn lose_in_flight(&mut self, store: StoreId, effects: &mut Effects) {
        let lost: Vec<(ObjectId, PageRange)> = self.in_flight_of(store).collect();
        for (object, pages) in lost {
            self.objects.advance(object, pages, Slot::Lost(store, Loss::Process), effects);
            self.tell_windows(pages, store, Placed::Lost(Loss::Process), effects);
        }
    }

    /// The pages of a job have been placed.
    pub fn written_back(&mut self, job: &WritebackJob, placed: &[(PageRange, Placed)], effects: &mut Effects) {
        for &(pages, outcome) in placed {
            let to = match outcome {
                Placed::Stored => Slot::Resident(job.store),
                Placed::Zero => Slot::Zero,
                Placed::Swapped(base) => Slot::Swapped(job.store, base),
                Placed::Lost(loss) => Slot::Lost(job.store, loss),
            };
            // Before, as long as a slot tells whose pages these are.
            self.tell_windows(pages, job.store, outcome, effects);
            self.objects.advance(job.object, pages, to, effects);
        }
        if !matches!(job.from, CopyFrom::Scratch(_)) {
            // Pages below, and the chain to them, may have been kept for these copy-ups alone.
            self.objects.shorten(job.object, effects);
            self.free_unseen(Vec::new(), effects);
        }
    }

    /// Somebody has waited for this job: write-back goes on behind it. Whether that is where it was about to go on.
    pub(crate) fn continue_after(&mut self, job: &WritebackJob) -> bool {
        self.objects.writeback_from(job.object, job.pages.raw())
    }

    /// The page that this job needs is on its way, from swap or into a scratch range: it is done again when [pages have
    /// arrived](Self::retry_put_off).
    pub(crate) fn put_off(&mut self, job: &WritebackJob) {
        self.objects.writeback.put_off.insert(job.needed_by);
    }

    /// Pages that were on their way may be here.
    pub(crate) fn retry_put_off(&mut self) {
        self.objects.writeback.put_off.clear();
    }

    /// Windows that map a hole here get zeros before they trap, unless a freeze may have moved a later write of theirs
    /// out; those that see a page that is lost with its process fail. What swap has lost fails who touches it.
    fn tell_windows(&self, pages: PageRange, store: StoreId, outcome: Placed, effects: &mut Effects) {
        if !matches!(outcome, Placed::Zero | Placed::Lost(Loss::Process)) {
            return;
        }
        let _ = self.viewers(store, pages, |vm, run| {
            let shown = self.window_runs(vm, run.pages).into_iter().filter(|part| part.source == run.source);
            for Run { pages: part, .. } in shown {
                if outcome != Placed::Zero {
                    effects.push(Effect::Fail(vm, part));
                } else if self.vm(vm).freezing.is_none() {
                    effects.push(Effect::Zero(vm, part));
                }
            }
            ControlFlow::Continue(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Gfn, GfnRange};
    use crate::ops::Fault;
    use crate::stage2::Shape;
    use crate::window::Harvest;

    fn freeze(family: &mut Family, vm: VmId, pages: GfnRange) {
        family.begin_freeze(vm);
        let harvest = Harvest { moved: vec![pages], moved_private: vec![pages], ..Harvest::default() };
        family.finish_freeze(vm, &harvest, PageCount(0), &mut Effects::default());
    }

    /// A VM of 256 pages, all of which are to be written back.
    fn frozen() -> (Family, VmId) {
        let ram = GfnRange::new(Gfn(0), PageCount(256));
        let mut family = Family::new(Shape::X86_64);
        let vm = family.launch(&[ram], &[]);
        freeze(&mut family, vm, ram);
        (family, vm)
    }

    fn store(family: &mut Family, job: &WritebackJob) -> std::ops::Range<u64> {
        family.written_back(job, &[(job.pages, Placed::Stored)], &mut Effects::default());
        job.pages.raw()
    }

    /// Somebody waits: what is written back then, and whether write-back was about to come there.
    fn wait(family: &mut Family, vm: VmId, gfn: u64) -> (std::ops::Range<u64>, bool) {
        let Fault::WriteBack(job) = family.fault(vm, Gfn(gfn)) else { panic!("{gfn} has been written back") };
        (store(family, &job), family.continue_after(&job))
    }

    /// The first pages of all that is written back, in order.
    fn write_back_all(family: &mut Family) -> Vec<u64> {
        std::iter::from_fn(|| family.next_job(PageCount(16)).map(|job| store(family, &job).start)).collect()
    }

    /// A guest that went over its memory in order waited for every 16th page, while others were written back that it needed last.
    #[test]
    fn writeback_goes_on_behind_the_page_that_somebody_waits_for_and_leaves_none_out() {
        let (mut family, vm) = frozen();
        assert_eq!(wait(&mut family, vm, 0), (0..16, true));
        assert_eq!(wait(&mut family, vm, 200), (192..208, false));
        assert_eq!(wait(&mut family, vm, 210), (208..224, true));
        assert_eq!(
            write_back_all(&mut family),
            [224, 240].into_iter().chain((16..192).step_by(16)).collect::<Vec<_>>()
        );
        let wakes = |gfn: &u64| matches!(family.fault(vm, Gfn(*gfn)), Fault::Wake(_));
        assert_eq!((0..256).filter(wakes).count(), 256);
    }

    /// The older of two freezes was written back first, whoever waited for pages of the other.
    #[test]
    fn the_freeze_that_somebody_waits_for_settles_first() {
        let (mut family, vm) = frozen();
        family.fork(vm, 1000);
        freeze(&mut family, vm, (128..192).into());
        assert_eq!(wait(&mut family, vm, 128).0, 128..144);
        let written_back = write_back_all(&mut family);
        assert_eq!(written_back[..4], [144, 160, 176, 0]);
        assert_eq!(written_back.len(), 3 + 16, "{written_back:?}");
    }
}
