//! The manager's dealings with swap: what is evicted, and how it comes back.

use super::waiters::Reason;
use super::{Error, Manager};
use crate::addr::cluster::by_clusters;
use crate::addr::{Gfn, GfnRange, PageCount, PageRange};
use crate::effect::Effects;
use crate::ids::{Activity, ObjectId, StoreId, SwapSlot, VmId};
use crate::manager::readahead::{StagedPart, SwapInOrder, WaitedPage};
use crate::ops::Placed;
use crate::reclaim::evict::count;
use crate::reclaim::{Return, SwapIn, Victim};
use crate::store::{Store, StoreFactory};
use crate::swap::{Fetch, Swap};
use crate::sys::Touch;
use crate::window::Window;
use std::collections::HashMap;
use std::io;
use std::ops::{Add, Range};

/// What went to swap and came back, in pages, since the family began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SwapCounts {
    /// Written to swap.
    pub swap_out_pages: u64,
    /// Read from swap.
    pub swap_in_pages: u64,
    /// Evicted without a write, since swap had them still.
    pub clean_evictions: u64,
    /// Freed in swap, since nobody saw them any more.
    pub discarded_pages: u64,
    /// Read from swap, and evicted not long before.
    pub refaults: u64,
    /// Could not be read back.
    pub lost_pages: u64,
    /// Read from swap into the live layer of the only VM that saw them, which was about to write them.
    pub swap_in_live_pages: u64,
}

/// What two families did.
impl Add for SwapCounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            swap_out_pages: self.swap_out_pages + other.swap_out_pages,
            swap_in_pages: self.swap_in_pages + other.swap_in_pages,
            clean_evictions: self.clean_evictions + other.clean_evictions,
            discarded_pages: self.discarded_pages + other.discarded_pages,
            refaults: self.refaults + other.refaults,
            lost_pages: self.lost_pages + other.lost_pages,
            swap_in_live_pages: self.swap_in_live_pages + other.swap_in_live_pages,
        }
    }
}

/// Copies in swap that are given up at a time when it is full.
const COPIES: PageCount = PageCount(256);

/// Stores that pages have just come back to, and that are ready for more.
const AWAKE: usize = 16;

/// What was evicted.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Evicted {
    /// Pages freed in stores.
    pub pages: PageCount,
    /// Why it ended before the limit, if not for want of pages. The cluster at which it ended is as it was.
    pub stopped: Option<Error>,
}

impl<S: StoreFactory, W: Window> Manager<S, W> {
    /// What went to swap and came back.
    pub fn counts(&self) -> SwapCounts {
        SwapCounts { discarded_pages: self.family.objects.accounts.discarded, ..self.swap_counts }
    }

    /// Says whether a VM needs its memory soon.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn set_activity(&mut self, vm: VmId, activity: Activity) -> Result<(), Error> {
        self.find(vm)?;
        self.family.set_activity(vm, activity);
        Ok(())
    }

    /// Evicts about `limit` pages: those that only idle VMs see, then the oldest. A call looks at no page twice.
    pub fn evict_some(&mut self, limit: PageCount) -> Evicted {
        let mut all = Evicted::default();
        if !self.may_evict() {
            return all;
        }
        let end = self.family.search_victims();
        while all.pages < limit && all.stopped.is_none() {
            let (mut effects, before) = (Effects::default(), self.family.resident());
            let victim = self.family.next_victim(end, &mut effects);
            all.pages.0 += before.0 - self.family.resident().0;
            self.carry_out(effects);
            let Some((store, pages, objects)) = victim else { break };
            for object in objects {
                match self.evict_cluster(object, pages) {
                    Ok(freed) => all.pages.0 += freed.0,
                    Err(error) => {
                        self.family.keep_victim(store, pages);
                        all.stopped = Some(error);
                        break;
                    }
                }
            }
        }
        all
    }

    /// Gives up slots in swap of pages that are in memory as well, about so many: swap is full. How many. When these
    /// pages are evicted again, they have to be written again.
    pub fn reclaim_swap_cache(&mut self, limit: PageCount) -> PageCount {
        let unneeded = self.give_slots_back(limit);
        if unneeded > PageCount(0) {
            return unneeded;
        }
        let mut effects = Effects::default();
        let given = self.family.reclaim_swap_cache(limit, &mut effects);
        self.carry_out(effects);
        given
    }

    /// Gives slots of swap back that nobody needs, of about so many pages. How many.
    pub(super) fn give_slots_back(&mut self, limit: PageCount) -> PageCount {
        let mut given = PageCount(0);
        while given < limit
            && let Some((first, count)) = self.unneeded.pop()
        {
            self.factory.swap().free(first, count);
            given.0 += count.0;
        }
        given
    }

    /// All slots of swap that the family has: those of its pages, and those that it has still to give back.
    pub fn swap_slots(&self) -> impl Iterator<Item = (SwapSlot, PageCount)> {
        self.family.swap_slots().chain(self.unneeded.iter().copied())
    }

    /// Slots of swap that nobody needs, and that are about to be given back.
    pub fn unneeded_slots(&self) -> PageCount {
        PageCount(self.unneeded.iter().map(|(_, count)| count.0).sum())
    }

    /// Evicts what is in stores of these pages of an object, cluster by cluster.
    pub fn evict(&mut self, object: ObjectId, pages: PageRange) -> Evicted {
        let mut all = Evicted::default();
        let pages = if self.may_evict() { pages } else { PageRange::default() };
        for part in by_clusters(pages) {
            match self.evict_cluster(object, part) {
                Ok(freed) => all.pages.0 += freed.0,
                Err(error) => return Evicted { stopped: Some(error), ..all },
            }
        }
        all
    }

    /// Without traps, nobody would bring a page back.
    pub(super) fn may_evict(&self) -> bool {
        self.zero_run != u64::MAX
    }

    /// Evicts pages of one cluster, all or none.
    fn evict_cluster(&mut self, object: ObjectId, pages: PageRange) -> Result<PageCount, Error> {
        let (victims, put) = loop {
            let victims = self.family.victims(object, pages);
            match self.put_victims(pages, &victims) {
                // Some of the victims may have been among these copies.
                Err(error) if error.is_full() && self.reclaim_swap_cache(COPIES).0 > 0 => {}
                put => break (victims, put?),
            }
        };
        let freed = count(&victims);
        let mut effects = Effects::default();
        self.family.evicted(&victims, put, &mut effects);
        self.carry_out(effects);
        Ok(freed)
    }

    /// Writes those of the victims to swap that are not there, and counts all.
    fn put_victims(&mut self, pages: PageRange, victims: &[Victim]) -> Result<Option<SwapSlot>, Error> {
        let mut end = 0;
        for victim in victims.iter().filter(|victim| !victim.is_clean()) {
            let buf = &mut self.staging[end..end + victim.pages.len_bytes()];
            let (store, pages) = (victim.store, victim.pages);
            let read = self.stores[&store].read(pages.start(), buf);
            read.map_err(|source| Error::Read { store, pages, source })?;
            end += victim.pages.len_bytes();
        }
        let written = PageCount::covering(end as u64);
        let put = match end {
            0 => None,
            _ => {
                let put = self.factory.swap().put(&self.staging[..end]);
                Some(put.map_err(|source| Error::PutSwap { pages, source })?)
            }
        };
        self.swap_counts.swap_out_pages += written.0;
        self.swap_counts.clean_evictions += count(victims).0 - written.0;
        Ok(put)
    }

    /// Reads pages from swap into their stores, and wakes who is known to wait for them. Nothing is there yet where they
    /// are coming; what cannot be read is lost in the books afterwards.
    pub(super) fn swap_in(&mut self, read: &SwapIn, order: SwapInOrder) -> Result<Fetch, Error> {
        let buf = &mut self.staging[..read.count.bytes() as usize];
        match self.factory.swap().get(read.first, buf) {
            Ok(Fetch::Coming) => return Ok(Fetch::Coming),
            Ok(Fetch::Here) => {}
            Err(error) => {
                for (pages, _) in self.family.swapping_in(read) {
                    self.lose(read.object, pages, &error);
                }
                return Ok(Fetch::Here);
            }
        }
        let how = self.family.count_return(read);
        if how == Return::Refault {
            self.swap_counts.refaults += read.count.0;
        }
        self.place_read(read, order, how)?;
        Ok(Fetch::Here)
    }

    /// Puts pages that were read from swap into their stores: they are staged in the order of their slots.
    pub(super) fn place_read(&mut self, read: &SwapIn, order: SwapInOrder, how: Return) -> Result<(), Error> {
        self.swap_counts.swap_in_pages += read.count.0;
        for StagedPart { pages, store, staged } in order.parts(&self.family.swapping_in(read)) {
            let waits = order.first().filter(|waited| pages.contains(waited.page));
            let supplied = match (order, waits) {
                (SwapInOrder::Live(_), Some(waited)) => self.supply(waited.vm, waited.gfn, staged.clone()),
                _ => false,
            };
            if !supplied {
                self.fill(store, pages, staged)?;
                let mut effects = Effects::default();
                self.family.swapped_in(read, pages, how, &mut effects);
                self.carry_out(effects);
                self.doze(store);
                self.wake_for_pages(store, pages);
            }
            if let Some(WaitedPage { vm, gfn, .. }) = waits {
                wake(&mut self.windows, vm, gfn);
            }
        }
        Ok(())
    }

    /// Brings a page that is in swap only, and that its only viewer is about to write, into that VM's live layer: in its
    /// store it would be copied at once, and then be there for nothing. What is read together with it goes where it belongs.
    /// Nothing is done for any other page.
    ///
    /// # Errors
    /// One of the others could not be filled in.
    pub(super) fn exclusive_swap_in(&mut self, vm: VmId, gfn: Gfn, touch: Touch) -> Result<Option<Fetch>, Error> {
        let read = match touch {
            Touch::Read => None,
            Touch::Write => self.family.exclusive_swap_in(vm, gfn),
        };
        let Some(read) = read else { return Ok(None) };
        self.look_ahead(vm, gfn);
        match self.swap_in(&read, SwapInOrder::Live(self.waited(vm, gfn)))? {
            Fetch::Coming => Ok(Some(Fetch::Coming)),
            // In the books it is where it was, unless it was lost, or its window did not take it.
            Fetch::Here => Ok(self.family.exclusive_swap_in(vm, gfn).map(|_| Fetch::Here)),
        }
    }

    /// Puts a staged page into a live layer. Whether it is there.
    fn supply(&mut self, vm: VmId, gfn: Gfn, staged: Range<usize>) -> bool {
        let Some(window) = self.windows.get_mut(&vm) else { return false };
        match window.supply(gfn, &self.staging[staged]) {
            Ok(()) => self.swap_counts.swap_in_live_pages += 1,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                log::debug!("the page at {gfn} goes into its store: {error}");
                return false;
            }
        }
        // One answer is enough for all who wait for it: by a second one, it may have been written and moved out.
        self.waiters.take(vm, GfnRange::new(gfn, PageCount(1)));
        true
    }

    /// A store that has been written back was filled, and may soon be again: what that needs is kept for the last few.
    fn doze(&mut self, store: StoreId) {
        if self.awake.back() == Some(&store) {
            return;
        }
        self.awake.retain(|&awake| awake != store);
        self.awake.push_back(store);
        if self.awake.len() > AWAKE
            && let Some(longest) = self.awake.pop_front()
        {
            self.rest(longest);
        }
    }

    /// Guests that wait for these pages look again.
    fn wake_for_pages(&mut self, store: StoreId, pages: PageRange) {
        let family = &self.family;
        for (vm, gfn, _) in self.waiters.take_all(|vm, gfn, _| family.maps(vm, gfn, store, pages)) {
            wake(&mut self.windows, vm, gfn);
        }
    }

    /// Pages have come that were on their way, from swap or into a scratch range, or what failed is to be tried again: serves
    /// the guests that wait for them, and [`write_back`](Self::write_back) goes on with what they held up.
    ///
    /// # Errors
    /// The first page that could not be filled in. Its guest waits on, and is served when this is called again.
    pub fn retry(&mut self) -> Result<(), Error> {
        self.family.retry_put_off();
        let mut first = Ok(());
        for (vm, gfn, touch) in self.waiters.take_all(|_, _, reason| reason != Reason::Freeze) {
            first = first.and(self.fault(vm, gfn, touch).map(drop));
        }
        first
    }

    /// Guests that wait for pages on their way, from swap or into a scratch range, and for those that could not be filled in.
    pub fn waiting_for_pages(&self) -> impl Iterator<Item = (VmId, Gfn)> {
        let waiting = self.waiters.iter().filter(|(.., reason)| *reason != Reason::Freeze);
        waiting.map(|(vm, gfn, _)| (vm, gfn))
    }

    /// Pages that are in swap only cannot be read from there.
    pub(super) fn lose(&mut self, object: ObjectId, pages: PageRange, why: &io::Error) {
        log::error!("pages {pages:?} of {object:?} are lost in swap: {why}");
        self.swap_counts.lost_pages += pages.count().0;
        let mut effects = Effects::default();
        self.family.lose(object, pages, &mut effects);
        self.carry_out(effects);
        // Nobody will tell of a read that was for these pages.
        self.wake_all(|_, _, reason| reason == Reason::Page);
    }

    /// Puts staged pages of one cluster that have not been written back into swap, if swap takes them.
    pub(super) fn put_staged(&mut self, pages: PageRange, staged: Range<usize>) -> Option<Placed> {
        let put = loop {
            match self.factory.swap().put(&self.staging[staged.clone()]) {
                Err(error) if error.kind() == io::ErrorKind::StorageFull && self.reclaim_swap_cache(COPIES).0 > 0 => {}
                put => break put,
            }
        };
        match put {
            Ok(slot) => {
                self.swap_counts.swap_out_pages += pages.count().0;
                Some(Placed::Swapped(self.family.new_base(slot, pages.start())))
            }
            Err(error) => {
                log::debug!("pages {pages:?} go into memory: {error}");
                None
            }
        }
    }
}

/// A guest touches its page again.
fn wake<W: Window>(windows: &mut HashMap<VmId, W>, vm: VmId, gfn: Gfn) {
    if let Some(window) = windows.get_mut(&vm) {
        window.wake(GfnRange::new(gfn, PageCount(1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Destination;
    use crate::stage2::Shape;
    use crate::store::memfd::MemfdStores;
    use crate::swap::handle::SharedSwap;
    use crate::testing::Ones;
    use crate::window::Harvest;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// Takes all, and knows how much it has.
    #[derive(Default)]
    struct Counter {
        next: u64,
        has: u64,
    }

    impl Swap for Counter {
        fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot> {
            let count = PageCount::covering(pages.len() as u64).0;
            self.has += count;
            self.next += count;
            Ok(SwapSlot(self.next - count))
        }

        fn get(&mut self, _: SwapSlot, _: &mut [u8]) -> io::Result<Fetch> {
            Ok(Fetch::Coming)
        }

        fn free(&mut self, _: SwapSlot, count: PageCount) {
            self.has -= count.0;
        }
    }

    const PAGES: u64 = 16384;

    /// A VM all of whose memory is in swap.
    fn swapped() -> (Rc<RefCell<Counter>>, Manager<MemfdStores, Ones>, VmId) {
        let swap = Rc::new(RefCell::new(Counter::default()));
        let stores = MemfdStores::new(None).with_swap(SharedSwap::new(Rc::clone(&swap)));
        let mut manager = Manager::new(Shape::X86_64, PageCount(PAGES), stores);
        let ram = GfnRange::from(0..PAGES);
        let vm = manager.launch(&[ram], &[], &[], Ones).unwrap();
        manager.begin_freeze(vm, Destination::Swap).unwrap();
        let harvest = Harvest { moved: vec![ram], moved_private: vec![ram], ..Harvest::default() };
        manager.finish_freeze(vm, &harvest).unwrap();
        while manager.write_back(PageCount(64)).unwrap() {}
        assert_eq!(swap.borrow().has, PAGES);
        (swap, manager, vm)
    }

    /// All that a VM had in swap was freed when it ended, before anybody else was heard.
    #[test]
    fn slots_of_a_vm_that_is_gone_are_given_back_bit_by_bit() {
        let (swap, mut manager, vm) = swapped();
        manager.exit(vm).unwrap();
        let mut left = swap.borrow().has;
        assert!(PAGES - left <= 2048, "{left} pages are left");
        assert_eq!(manager.unneeded_slots(), PageCount(left));
        while left > 0 {
            assert!(manager.has_writeback());
            assert_eq!(manager.swap_slots().map(|(_, count)| count.0).sum::<u64>(), left);
            manager.write_back(PageCount(64)).unwrap();
            let now = swap.borrow().has;
            assert!(now < left && left - now <= 2048, "{} pages in one step", left - now);
            left = now;
        }
        assert!(!manager.has_writeback());
    }

    /// Swap that others wait for is not kept for want of time.
    #[test]
    fn slots_that_nobody_needs_are_given_back_before_copies_are_given_up_and_with_their_family() {
        let (swap, mut manager, vm) = swapped();
        manager.exit(vm).unwrap();
        let before = swap.borrow().has;
        assert_eq!(manager.reclaim_swap_cache(PageCount(64)), PageCount(64));
        assert_eq!(swap.borrow().has, before - 64);
        drop(manager);
        assert_eq!(swap.borrow().has, 0);
        let (swap, manager, _) = swapped();
        drop(manager);
        assert_eq!(swap.borrow().has, 0);
    }
}
