//! A family of VMs on fakes, and beside it what each of them must see.

use crate::fakes::{FakeFile, FakeSwap, FakeWindow, Gaps, Ledger, Mapped, Stamp, Trapped, VecStores, Write};
use guest_mem::addr::{Gfn, GfnRange, PageCount};
use guest_mem::check::check_swap;
use guest_mem::manager::{Copied, Error, Evicted, SETTLE_BATCH};
use guest_mem::object::{Found, ObjectId, Slot};
use guest_mem::stage2::Shape;
use guest_mem::stats::PageCounts;
use guest_mem::{Destination, Manager, Protection, Source, StoreId, Touch, VmId, Window};
use rangemap::RangeSet;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// A family's shape.
#[derive(Clone, Debug)]
pub struct Layout {
    pub shape: Shape,
    pub ram: Vec<(u64, u64)>,
    pub files: Vec<(u64, u64)>,
}

impl Layout {
    /// `pages` of RAM from 0, tables of four entries.
    pub fn flat(pages: u64) -> Self {
        let levels = if pages <= 64 { 3 } else { 4 };
        Self { shape: Shape { bits: 2, levels, leaf_levels: levels - 1 }, ram: vec![(0, pages)], files: Vec::new() }
    }

    /// The same with files at these places.
    pub fn with_files(self, files: &[(u64, u64)]) -> Self {
        Self { files: files.to_vec(), ..self }
    }

    /// Two ranges of RAM.
    pub fn with_hole(self, from: u64, to: u64) -> Self {
        let end = self.ram[0].1;
        Self { ram: vec![(0, from), (to, end)], ..self }
    }
}

/// What one VM must see: its pages that are not zero.
type Memory = BTreeMap<u64, Stamp>;

pub struct World {
    pub manager: Manager<VecStores, FakeWindow>,
    pub ledger: Rc<Ledger>,
    pub swap: Rc<RefCell<FakeSwap>>,
    ram: Vec<GfnRange>,
    pub vms: BTreeMap<VmId, Memory>,
    /// What VMs may not write.
    read_only: BTreeMap<VmId, BTreeSet<u64>>,
    /// VMs that are gone; their windows may be needed.
    gone: BTreeSet<VmId>,
    writes: u64,
    killed: bool,
    /// Whether reads from swap have ended of which the manager has not been told.
    untold: bool,
}

fn range((start, end): (u64, u64)) -> GfnRange {
    GfnRange::between(Gfn(start), Gfn(end))
}

impl World {
    /// A family with one VM. Its RAM is fresh, but for the files.
    pub fn new(layout: &Layout) -> Self {
        let ledger = Rc::new(Ledger::default());
        let ram: Vec<GfnRange> = layout.ram.iter().copied().map(range).collect();
        let span = layout.shape.table_span(layout.shape.levels);
        let (stores, swap) = VecStores::new(&ledger);
        let mut manager = Manager::new(layout.shape, span, stores);
        let files: Vec<_> = layout.files.iter().map(|&at| (range(at), file(range(at).count(), &ledger))).collect();
        let vm = manager.launch(&ram, &files, FakeWindow::new(&ram, &ledger));
        let mut memory = Memory::new();
        for (pages, _) in &files {
            for gfn in pages.iter() {
                set(&mut memory, gfn, FakeFile::content(gfn.0 - pages.start().0));
            }
        }
        let vms = BTreeMap::from([(vm, memory)]);
        let mut world = Self {
            manager,
            ledger,
            swap,
            ram,
            vms,
            read_only: BTreeMap::new(),
            gone: BTreeSet::new(),
            writes: 0,
            killed: false,
            untold: false,
        };
        world.map_runs(vm);
        world
    }

    /// The VMs, oldest first.
    pub fn ids(&self) -> Vec<VmId> {
        self.vms.keys().copied().collect()
    }

    /// All frames of RAM.
    pub fn frames(&self) -> impl Iterator<Item = Gfn> + use<> {
        self.ram.clone().into_iter().flat_map(GfnRange::iter)
    }

    pub fn window(&self, vm: VmId) -> &FakeWindow {
        self.manager.window(vm).expect("a VM has a window")
    }

    fn window_mut(&mut self, vm: VmId) -> &mut FakeWindow {
        self.manager.window_mut(vm).expect("a VM has a window")
    }

    fn map_runs(&mut self, vm: VmId) {
        let runs: Vec<_> = self.manager.family().vm(vm).runs().collect();
        for run in runs {
            let mapped = match run.source {
                Source::Anonymous => None,
                Source::Store { store, .. } => Some(match self.manager.file(store) {
                    Some(file) => Mapped::File(Rc::clone(file)),
                    None => Mapped::store(self.manager.store(store).expect("a new window maps stores that exist")),
                }),
            };
            self.window_mut(vm).map(run, mapped);
        }
        let read_only: Vec<_> = self.manager.family().vm(vm).map().protected(Protection::ReadOnly).collect();
        for pages in read_only {
            self.window_mut(vm).protect(pages, Protection::ReadOnly).expect("nothing is to fail");
        }
    }

    /// Does what a guest does, traps included; none if the VM failed in it.
    fn touch<R>(
        &mut self,
        vm: VmId,
        gfn: Gfn,
        touch: Touch,
        mut action: impl FnMut(&mut FakeWindow) -> Result<R, Trapped>,
    ) -> Result<Option<R>, Error> {
        for _ in 0..2 {
            if let Ok(done) = action(self.window_mut(vm)) {
                return Ok(Some(done));
            }
            self.window_mut(vm).wait(gfn);
            if let Err(error) = self.manager.trap(vm, gfn, touch) {
                // The server knows that it has to try again.
                self.window_mut(vm).wake(GfnRange::new(gfn, PageCount(1)));
                return Err(error);
            }
            self.finish_reads(vm, gfn)?;
            if self.window(vm).failed.is_some() {
                return Ok(None);
            }
            assert!(!self.window(vm).is_waiting(gfn), "a trap of {vm:?} at {gfn} is answered by a wake");
        }
        Ok(Some(action(self.window_mut(vm)).expect("two traps bring a page")))
    }

    /// A guest that waits for swap is waited for: a page may be read for a gap, and once more for what is below.
    fn finish_reads(&mut self, vm: VmId, gfn: Gfn) -> Result<(), Error> {
        while self.window(vm).is_waiting(gfn) && self.window(vm).failed.is_none() && (self.end_reads() || self.untold) {
            self.untold = false;
            self.manager.retry()?;
        }
        Ok(())
    }

    /// All reads from swap and all copies that are under way end, and nobody has been told. Whether there were any.
    pub fn end_reads(&mut self) -> bool {
        let mut ended = self.swap.borrow_mut().end_reads();
        for vm in self.windows() {
            ended |= std::mem::take(&mut self.window_mut(vm).copying);
        }
        self.untold |= ended;
        ended
    }

    /// The last freeze of a VM was told of before its pages had been copied.
    pub fn copies_behind(&mut self, vm: VmId) {
        self.window_mut(vm).copying = true;
    }

    /// VMs that have a window, those that are gone included.
    fn windows(&self) -> Vec<VmId> {
        self.ids().into_iter().chain(self.holders()).collect()
    }

    /// All reads from swap end. Whether there were any.
    pub fn io_done(&mut self) -> bool {
        let ended = self.end_reads() || self.untold;
        self.untold = false;
        self.manager.retry().expect("nothing is to fail");
        ended
    }

    /// A guest touches a page, and is left waiting if that is in swap.
    pub fn prefetch(&mut self, vm: VmId, gfn: Gfn, touch: Touch) {
        if self.window(vm).read(gfn).is_err() {
            self.window_mut(vm).wait(gfn);
            self.manager.trap(vm, gfn, touch).expect("nothing is to fail");
        }
    }

    /// All anonymous memory there is.
    pub fn evict_all(&mut self) {
        for object in self.objects() {
            let evicted = self.manager.evict(object, self.span());
            assert!(evicted.stopped.is_none_or(|error| error.is_full()), "nothing is to fail");
        }
    }

    /// The family's objects.
    pub fn objects(&self) -> Vec<ObjectId> {
        self.manager.family().objects().iter().map(|(id, _)| id).collect()
    }

    fn span(&self) -> GfnRange {
        GfnRange::between(Gfn(0), self.ram.last().expect("a VM has RAM").end())
    }

    /// Some memory. A put that fails changes nothing.
    pub fn evict_some(&mut self, limit: u64) -> Evicted {
        let (before, tidy) = (self.manager.family().totals(), self.manager.family().is_tidy());
        let evicted = self.manager.evict_some(PageCount(limit));
        let after = self.manager.family().totals();
        if tidy {
            assert_eq!(before.resident - after.resident, evicted.pages.0, "{evicted:?}");
            assert_eq!(after.swapped - before.swapped, evicted.pages.0, "{evicted:?}");
        } else {
            assert!(
                before.resident - after.resident >= evicted.pages.0,
                "what nobody sees goes uncounted: {evicted:?}"
            );
        }
        evicted
    }

    /// A guest reads, and must see what the model says.
    pub fn try_read(&mut self, vm: VmId, gfn: Gfn) -> Result<(), Error> {
        if let Some(seen) = self.touch(vm, gfn, Touch::Read, |window| window.read(gfn))? {
            let want = self.vms[&vm].get(&gfn.0).copied().unwrap_or(0);
            assert_eq!(seen, want, "{vm:?} at page {}: saw {seen:#x}, not {want:#x}", gfn.0);
        }
        Ok(())
    }

    pub fn read(&mut self, vm: VmId, gfn: Gfn) {
        self.try_read(vm, gfn).expect("nothing is to fail");
    }

    /// A stamp nobody has used: VM and number of the write.
    fn stamp(&mut self, vm: VmId) -> Stamp {
        self.writes += 1;
        u64::from(vm.0) << 32 | self.writes
    }

    /// A guest writes a page.
    pub fn try_write(&mut self, vm: VmId, gfn: Gfn) -> Result<(), Error> {
        let stamp = self.stamp(vm);
        self.try_write_stamp(vm, gfn, stamp)
    }

    pub fn write(&mut self, vm: VmId, gfn: Gfn) {
        self.try_write(vm, gfn).expect("nothing is to fail");
    }

    /// A guest clears a page.
    pub fn try_clear(&mut self, vm: VmId, gfn: Gfn) -> Result<(), Error> {
        self.try_write_stamp(vm, gfn, 0)
    }

    pub fn clear(&mut self, vm: VmId, gfn: Gfn) {
        self.try_clear(vm, gfn).expect("nothing is to fail");
    }

    fn try_write_stamp(&mut self, vm: VmId, gfn: Gfn, stamp: Stamp) -> Result<(), Error> {
        let read_only = self.read_only.get(&vm).is_some_and(|pages| pages.contains(&gfn.0));
        if let Some(write) = self.touch(vm, gfn, Touch::Write, |window| window.write(gfn, stamp))? {
            assert_eq!(write == Write::Refused, read_only, "{vm:?} writes page {}", gfn.0);
            if write == Write::Done {
                set(self.vms.get_mut(&vm).expect("a VM of the model"), gfn, stamp);
            }
        }
        Ok(())
    }

    /// A VM may write a part of its memory no more, or again.
    pub fn try_protect(&mut self, vm: VmId, pages: GfnRange, protection: Protection) -> Result<(), Error> {
        self.manager.protect(vm, pages, protection)?;
        let frames = self.frames().filter(|gfn| pages.contains(*gfn)).map(|gfn| gfn.0);
        let read_only = self.read_only.entry(vm).or_default();
        match protection {
            Protection::ReadOnly => read_only.extend(frames),
            Protection::ReadWrite => read_only.retain(|page| !pages.contains(Gfn(*page))),
        }
        Ok(())
    }

    pub fn protect(&mut self, vm: VmId, pages: GfnRange, protection: Protection) {
        self.try_protect(vm, pages, protection).expect("nothing is to fail");
    }

    /// KVM makes a private copy of a page that the guest only reads.
    pub fn copy_clean(&mut self, vm: VmId, gfn: Gfn) {
        self.touch(vm, gfn, Touch::Write, |window| window.copy_clean(gfn)).expect("nothing is to fail");
    }

    /// A guest gives pages back. Its window goes first; the manager hears of it.
    pub fn balloon(&mut self, vm: VmId, pages: GfnRange) {
        self.window_mut(vm).balloon(pages);
        self.manager.balloon(vm, &[pages]);
        self.vms.get_mut(&vm).expect("a VM of the model").retain(|page, _| !pages.contains(Gfn(*page)));
    }

    /// A freeze of a VM that gives pages back before it is stopped: the manager hears of that in the middle.
    pub fn balloon_and_freeze(&mut self, vm: VmId, pages: GfnRange, gaps: Gaps) {
        let store = self.manager.begin_freeze(vm, Destination::Store).expect("nothing is to fail");
        let mapped = Mapped::store(self.manager.store(store).expect("a freeze makes a store"));
        self.balloon(vm, pages);
        self.manager.stands(vm);
        let harvest = self.window_mut(vm).freeze(store, mapped, gaps);
        self.manager.finish_freeze(vm, &harvest);
    }

    /// What a VM has written becomes an object.
    pub fn try_freeze(&mut self, vm: VmId, gaps: Gaps) -> Result<StoreId, Error> {
        self.try_freeze_to(vm, gaps, Destination::Store)
    }

    /// What a VM has written becomes an object, in memory or in swap.
    pub fn try_freeze_to(&mut self, vm: VmId, gaps: Gaps, to: Destination) -> Result<StoreId, Error> {
        let store = self.manager.begin_freeze(vm, to)?;
        let mapped = Mapped::store(self.manager.store(store).expect("a freeze makes a store"));
        self.manager.stands(vm);
        if to == Destination::Swap {
            self.window_mut(vm).forget_kept();
        }
        let harvest = self.window_mut(vm).freeze(store, mapped, gaps);
        self.manager.finish_freeze(vm, &harvest);
        Ok(store)
    }

    pub fn freeze(&mut self, vm: VmId, gaps: Gaps) -> StoreId {
        self.try_freeze(vm, gaps).expect("nothing is to fail")
    }

    pub fn freeze_to_swap(&mut self, vm: VmId, gaps: Gaps) -> StoreId {
        self.try_freeze_to(vm, gaps, Destination::Swap).expect("nothing is to fail")
    }

    /// A freeze whose VM runs on, and touches a page, before the manager hears how it went.
    pub fn freeze_and_touch(&mut self, vm: VmId, gfn: Gfn) {
        let store = self.manager.begin_freeze(vm, Destination::Store).expect("nothing is to fail");
        let mapped = Mapped::store(self.manager.store(store).expect("a freeze makes a store"));
        self.manager.stands(vm);
        let harvest = self.window_mut(vm).freeze(store, mapped, Gaps::None);
        self.window_mut(vm).wait(gfn);
        self.manager.trap(vm, gfn, Touch::Write).expect("nothing is to fail");
        assert!(self.window(vm).is_waiting(gfn), "nobody can know yet what is there");
        self.manager.finish_freeze(vm, &harvest);
        assert!(!self.window(vm).is_waiting(gfn), "it looks again");
    }

    /// A window gives up what stayed in it since a freeze into `store`: stretches of at least `least` pages, about `limit`
    /// pages in all. How many it did.
    pub fn shed(&mut self, vm: VmId, store: StoreId, least: u64, limit: u64) -> u64 {
        let pages = self.manager.to_shed(vm, store, PageCount(least), PageCount(limit));
        if !pages.is_empty() {
            let mapped = Mapped::store(self.manager.store(store).expect("pages are in a store that is there"));
            self.window_mut(vm).shed(store, mapped, &pages);
            self.manager.shed(vm, store, &pages);
        }
        pages.iter().map(|pages| pages.count().0).sum()
    }

    /// Stores from whose freezes a window may keep pages.
    pub fn kept_stores(&self, vm: VmId) -> BTreeSet<StoreId> {
        let kept = self.manager.family().vm(vm).kept().flat_map(GfnRange::iter);
        kept.filter_map(|gfn| self.find(vm, gfn)?.slot.store()).collect()
    }

    /// A freeze whose window could not do its part.
    pub fn freeze_in_vain(&mut self, vm: VmId) {
        self.manager.begin_freeze(vm, Destination::Swap).expect("nothing is to fail");
        self.manager.abort_freeze(vm);
    }

    /// A child of a VM that is frozen for it.
    pub fn try_fork(&mut self, parent: VmId, gaps: Gaps) -> Result<VmId, Error> {
        self.try_freeze(parent, gaps)?;
        Ok(self.fork_frozen(parent))
    }

    pub fn fork(&mut self, parent: VmId, gaps: Gaps) -> VmId {
        self.try_fork(parent, gaps).expect("nothing is to fail")
    }

    /// A child of a VM that has written nothing since its last freeze.
    pub fn fork_frozen(&mut self, parent: VmId) -> VmId {
        let child = self.manager.fork(parent, FakeWindow::new(&self.ram, &self.ledger));
        self.vms.insert(child, self.vms[&parent].clone());
        if let Some(read_only) = self.read_only.get(&parent).cloned() {
            self.read_only.insert(child, read_only);
        }
        self.map_runs(child);
        child
    }

    /// A VM ends. Its process waits until what it moved out has settled.
    pub fn exit(&mut self, vm: VmId) {
        self.vms.remove(&vm);
        self.manager.exit(vm);
        self.gone.insert(vm);
    }

    /// A VM's process dies, or that of a VM that is gone.
    pub fn kill(&mut self, vm: VmId) {
        self.killed = true;
        self.window_mut(vm).killed = true;
        if self.vms.contains_key(&vm) {
            self.exit(vm);
        }
    }

    /// Moved-out pages will be lost, though nobody dies.
    pub fn expect_losses(&mut self) {
        self.killed = true;
    }

    /// Processes with moved-out pages that outlived their VM.
    pub fn holders(&self) -> Vec<VmId> {
        self.gone.iter().copied().filter(|&vm| self.manager.window(vm).is_some()).collect()
    }

    pub fn try_settle(&mut self) -> Result<bool, Error> {
        self.manager.settle(SETTLE_BATCH)
    }

    pub fn settle(&mut self) -> bool {
        self.try_settle().expect("nothing is to fail")
    }

    pub fn settle_all(&mut self) {
        while self.settle() || self.manager.bring_ahead() || self.io_done() {}
        assert_eq!(self.manager.family().totals().unsettled, 0);
        assert_eq!(self.manager.windows(), self.vms.len(), "nobody waits any more");
        assert!(self.ids().iter().all(|&vm| !self.window(vm).has_scratch()));
    }

    pub fn copied(&mut self, store: StoreId) -> Copied {
        self.manager.take_copied(store)
    }

    /// Ends VMs that were told they had lost memory.
    pub fn reap(&mut self) {
        for vm in self.ids() {
            if let Some(why) = self.window(vm).failed.clone() {
                assert!(self.killed, "{vm:?} fails for nothing: {why}");
                self.exit(vm);
            }
        }
    }

    /// Reads all memory of all VMs.
    pub fn verify(&mut self) {
        for vm in self.ids() {
            for gfn in self.frames() {
                if self.window(vm).failed.is_none() {
                    self.read(vm, gfn);
                }
            }
        }
        self.reap();
    }

    /// The books hold, windows map what they say, and stores hold what they say.
    pub fn check(&self) {
        let family = self.manager.family();
        let mut broken = family.check_invariants().err().unwrap_or_default();
        self.manager.check_stores(&mut broken);
        check_swap([family], Some(&*self.swap.borrow()), &mut broken);
        assert!(broken.is_empty(), "{}", broken.join("\n"));
        for &vm in self.vms.keys() {
            let told: Vec<_> = family.vm(vm).runs().collect();
            assert_eq!(self.window(vm).runs(), told, "the window of {vm:?} maps what the books say");
        }
        for &vm in self.vms.keys() {
            let read_only = family.vm(vm).map().protected(Protection::ReadOnly).flat_map(GfnRange::raw).collect();
            assert_eq!(self.window(vm).read_only, read_only, "the window of {vm:?} protects what the books say");
        }
        for &vm in self.vms.keys() {
            let books: RangeSet<u64> = family.vm(vm).kept().map(GfnRange::raw).collect();
            let lost = self.window(vm).kept().into_iter().find(|pages| !books.gaps(&pages.raw()).eq([]));
            assert_eq!(lost, None, "the window of {vm:?} keeps what the books do not know of");
        }
        assert_eq!(family.vms().count(), self.vms.len());
        let holders = self.holders();
        assert_eq!(self.manager.windows(), self.vms.len() + holders.len());
        for vm in holders {
            assert!(self.window(vm).has_scratch(), "the window of {vm:?}, which is gone, is kept for nothing");
        }
        let stored = family.totals().resident + self.manager.hidden().0;
        assert_eq!(self.ledger.pages(), stored, "stores hold the pages the books say");
        self.check_waiting();
    }

    /// Whoever waits is known to the manager. (A VM that fails waits for ever.)
    fn check_waiting(&self) {
        let known: BTreeSet<(VmId, Gfn)> = self.manager.waiting_for_pages().collect();
        let copying = self.windows().into_iter().any(|vm| self.window(vm).copying);
        let reading = self.untold || copying || self.swap.borrow().is_reading();
        assert!(known.is_empty() || reading, "nobody waits for nothing: {known:?}");
        assert!(!self.manager.family().objects().waits_for_others() || reading, "nothing is put off for nothing");
        for &vm in self.vms.keys().filter(|vm| self.window(**vm).failed.is_none()) {
            for &page in self.window(vm).waiting() {
                assert!(known.contains(&(vm, Gfn(page))), "{vm:?} waits at page {page}, and nobody knows");
            }
        }
    }

    /// Page counts add up, and are what looking at every page of every VM finds.
    pub fn check_counts(&self) {
        let family = self.manager.family();
        let census = family.census();
        let mut viewers: BTreeMap<(StoreId, u64), u64> = BTreeMap::new();
        for vm in self.ids() {
            for gfn in self.frames() {
                if let Some(page) = self.stored(vm, gfn) {
                    *viewers.entry(page).or_default() += 1;
                }
            }
        }
        for vm in self.ids() {
            let live = self.window(vm).live();
            let mut want = PageCounts::default();
            for gfn in self.frames() {
                let found = self.find(vm, gfn);
                want.swapped += u64::from(found.is_some_and(|found| matches!(found.slot, Slot::Swapped(..))));
                want.unsettled += u64::from(found.is_some_and(|found| found.slot.is_pending()));
                match self.stored(vm, gfn) {
                    _ if live.contains(&gfn.0) => want.private += 1,
                    Some(page) if viewers[&page] == 1 => want.private += 1,
                    Some(_) => want.shared += 1,
                    None => want.zero += 1,
                }
            }
            assert_eq!(family.page_counts(vm, &census, &live), want, "of {vm:?}");
        }
    }

    fn find(&self, vm: VmId, gfn: Gfn) -> Option<Found> {
        let family = self.manager.family();
        let (_, entry) = family.vm(vm).map().get(gfn).expect("RAM is mapped");
        family.objects().resolve(entry.object, entry.origin, GfnRange::new(gfn, PageCount(1)))[0].found
    }

    /// The stored page that a VM sees beneath its live layer.
    fn stored(&self, vm: VmId, gfn: Gfn) -> Option<(StoreId, u64)> {
        let found = self.find(vm, gfn).filter(|found| found.slot != Slot::Zero)?;
        Some((found.slot.store()?, gfn.0 - found.origin.0))
    }

    /// Ends all VMs: nothing is left of anything.
    pub fn end(mut self) {
        for vm in self.ids() {
            self.exit(vm);
            self.check();
        }
        self.settle_all();
        let family = self.manager.family();
        let totals = family.totals();
        assert_eq!((totals.objects, totals.stores, totals.tables, totals.resident), (0, 0, 0, 0));
        assert_eq!((totals.swapped, self.swap.borrow().pages()), (0, 0), "no slot is left over");
        assert_eq!((self.ledger.pages(), self.ledger.stores(), self.manager.windows()), (0, 0, 0));
    }
}

fn file(pages: PageCount, ledger: &Rc<Ledger>) -> Rc<FakeFile> {
    Rc::new(FakeFile::new(pages, ledger))
}

fn set(memory: &mut Memory, gfn: Gfn, stamp: Stamp) {
    if stamp == 0 {
        memory.remove(&gfn.0);
    } else {
        memory.insert(gfn.0, stamp);
    }
}
