//! A family of VMs on fakes, and beside it what each of them must see.

use super::fakes::{
    FakeFile, FakeWindow, Gaps, Ledger, Mapped, Stamp, Trapped, VecStore, VecStores, Write, carry_pages, carry_set,
};
use super::swap::{FakeSwap, WorldSwap};
use guest_mem::addr::{Distance, Gfn, GfnRange, PageCount, PageOrigin};
use guest_mem::check::check_swap;
use guest_mem::ids::ObjectId;
use guest_mem::manager::{Copied, Error, Evicted, MAX_RUNS, WRITEBACK_BATCH};
use guest_mem::object::{Found, Slot};
use guest_mem::ops::Compaction;
use guest_mem::stage2::Shape;
use guest_mem::stats::PageCounts;
use guest_mem::{Along, Destination, Harvest, Manager, Protection, Sharing, Source, StoreId, Touch, VmId};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// A family's shape.
#[derive(Clone, Debug)]
pub struct Layout {
    pub shape: Shape,
    pub ram: Vec<(u64, u64)>,
    pub files: Vec<(u64, u64)>,
    /// Memory that all VMs share.
    pub shared: Vec<(u64, u64)>,
    pub max_runs: usize,
    pub compaction: Compaction,
}

impl Layout {
    /// `pages` of RAM from 0, tables of four entries.
    pub fn flat(pages: u64) -> Self {
        let levels = if pages <= 64 { 3 } else { 4 };
        Self {
            shape: Shape { bits: 2, levels, leaf_levels: levels - 1 },
            ram: vec![(0, pages)],
            files: Vec::new(),
            shared: Vec::new(),
            max_runs: MAX_RUNS,
            compaction: Compaction { stores: 2, runs: 3, kept: 4, pages: PageCount(12), remapped: 4 },
        }
    }

    /// The same with files at these places.
    pub fn with_files(self, files: &[(u64, u64)]) -> Self {
        Self { files: files.to_vec(), ..self }
    }

    /// The same with shared memory at these places.
    pub fn with_shared(self, shared: &[(u64, u64)]) -> Self {
        Self { shared: shared.to_vec(), ..self }
    }

    /// Two ranges of RAM.
    pub fn with_hole(self, from: u64, to: u64) -> Self {
        let end = self.ram[0].1;
        Self { ram: vec![(0, from), (to, end)], ..self }
    }
}

/// What one VM must see: its pages that are not zero.
pub type Memory = BTreeMap<u64, Stamp>;

/// Where a VM has shared memory: which frame shows which page of which region.
type Shares = BTreeMap<u64, (u64, u64)>;

/// What a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Stamp,
    Zero,
}

/// A freeze between its halves.
#[derive(Debug)]
pub enum Half {
    /// The VM runs still.
    Begun(StoreId, Destination),
    /// It stands, and its pages may be moved any moment.
    Standing(StoreId, Destination),
    /// It runs again: this is what its window has taken, and its memory as it was then. The manager has not heard of it.
    Taken(Harvest, Memory),
}

/// What a window is to give up.
#[derive(Debug)]
pub enum Dedup {
    /// It has not done so.
    Asked(StoreId, Vec<GfnRange>),
    /// It has, and the manager has not heard of it.
    Done(StoreId, Vec<GfnRange>),
}

pub struct World<S = FakeSwap> {
    pub manager: Manager<VecStores, FakeWindow>,
    pub ledger: Rc<Ledger>,
    pub swap: Rc<RefCell<S>>,
    ram: Vec<GfnRange>,
    pub vms: BTreeMap<VmId, Memory>,
    /// Regions of shared memory, and who has which where.
    regions: BTreeMap<u64, Memory>,
    shares: BTreeMap<VmId, Shares>,
    next_region: u64,
    /// Where VMs have nothing.
    holes: BTreeMap<VmId, BTreeSet<u64>>,
    /// What VMs may not write.
    read_only: BTreeMap<VmId, BTreeSet<u64>>,
    /// What a child would see: the memory of each VM as of its last freeze.
    frozen: BTreeMap<VmId, Memory>,
    /// Freezes between their halves.
    pub halves: BTreeMap<VmId, Half>,
    /// What freezes under way are to take along.
    along: BTreeMap<VmId, Along>,
    pub dedups: BTreeMap<VmId, Dedup>,
    /// VMs that are gone; their windows may be needed.
    gone: BTreeSet<VmId>,
    writes: u64,
    killed: bool,
    /// Whether reads from swap have ended of which the manager has not been told, or it could not do all that is to be done
    /// then.
    untold: bool,
}

fn range((start, end): (u64, u64)) -> GfnRange {
    GfnRange::between(Gfn(start), Gfn(end))
}

impl World {
    /// A family with one VM. Its RAM is fresh, but for the files.
    pub fn new(layout: &Layout) -> Self {
        Self::with_swap(layout, FakeSwap::new)
    }
}

impl<S: WorldSwap> World<S> {
    /// The same, over a swap.
    pub fn with_swap(layout: &Layout, swap: impl FnOnce(&Rc<Ledger>) -> S) -> Self {
        let ledger = Rc::new(Ledger::default());
        let ram: Vec<GfnRange> = layout.ram.iter().copied().map(range).collect();
        let span = layout.shape.table_span(layout.shape.levels);
        let swap = Rc::new(RefCell::new(swap(&ledger)));
        let stores = VecStores::new(&ledger, &swap);
        let mut manager =
            Manager::new(layout.shape, span, stores).with_max_runs(layout.max_runs).with_compaction(layout.compaction);
        let files: Vec<_> = layout.files.iter().map(|&at| (range(at), file(range(at).count(), &ledger))).collect();
        let shared: Vec<GfnRange> = layout.shared.iter().copied().map(range).collect();
        let window = FakeWindow::new(&ram, &ledger);
        let vm = manager.launch(&ram, &files, &shared, window).expect("nothing is to fail");
        let shares: Shares = (0..).zip(&shared).flat_map(|(region, pages)| shares(region, *pages)).collect();
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
            regions: (0..).zip(&shared).map(|(region, _)| (region, Memory::new())).collect(),
            shares: BTreeMap::from([(vm, shares)]),
            next_region: shared.len() as u64,
            holes: BTreeMap::from([(vm, BTreeSet::new())]),
            read_only: BTreeMap::new(),
            frozen: vms.clone(),
            vms,
            halves: BTreeMap::new(),
            along: BTreeMap::new(),
            dedups: BTreeMap::new(),
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
    pub fn frames(&self) -> impl Iterator<Item = Gfn> + use<S> {
        self.ram.clone().into_iter().flat_map(GfnRange::iter)
    }

    pub fn window(&self, vm: VmId) -> &FakeWindow {
        self.manager.window(vm).expect("a VM has a window")
    }

    fn window_mut(&mut self, vm: VmId) -> &mut FakeWindow {
        self.manager.window_mut(vm).expect("a VM has a window")
    }

    fn map_runs(&mut self, vm: VmId) {
        let runs = self.manager.family().runs(vm).clone();
        for &run in runs.iter() {
            let mapped = match run.source {
                Source::Anonymous => None,
                Source::Store { store, .. } | Source::Shared { store, .. } => Some(match self.manager.file(store) {
                    Some(file) => Mapped::File(Rc::clone(file)),
                    None => Mapped::store(self.manager.store(store).expect("a new window maps stores that exist")),
                }),
            };
            self.window_mut(vm).map(run, mapped);
        }
        let read_only: Vec<_> = self.manager.family().vm(vm).map().protected(Protection::ReadOnly).collect();
        // Whoever makes a window maps it so from the start.
        self.window_mut(vm).read_only = read_only.into_iter().flat_map(GfnRange::raw).collect();
    }

    /// Does what a guest does, traps included; none if the VM failed in it.
    fn touch<R>(
        &mut self,
        vm: VmId,
        gfn: Gfn,
        touch: Touch,
        mut action: impl FnMut(&mut FakeWindow) -> Result<R, Trapped>,
    ) -> Result<Option<R>, Error> {
        if !self.has(vm, gfn) {
            return Ok(None);
        }
        for _ in 0..2 {
            if let Ok(done) = action(self.window_mut(vm)) {
                return Ok(Some(done));
            }
            self.window_mut(vm).wait(gfn);
            if let Err(error) = self.manager.fault(vm, gfn, touch) {
                // Somebody is to try again.
                self.untold = true;
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

    /// A guest tries to do something once. None if it is left waiting, or failed in it.
    pub fn attempt<R>(
        &mut self,
        vm: VmId,
        gfn: Gfn,
        touch: Touch,
        mut action: impl FnMut(&mut FakeWindow) -> Result<R, Trapped>,
    ) -> Result<Option<R>, Error> {
        if !self.has(vm, gfn) {
            return Ok(None);
        }
        for _ in 0..3 {
            if let Ok(done) = action(self.window_mut(vm)) {
                return Ok(Some(done));
            }
            self.window_mut(vm).wait(gfn);
            if let Err(error) = self.manager.fault(vm, gfn, touch) {
                // Somebody is to try again.
                self.untold = true;
                return Err(error);
            }
            if self.window(vm).failed.is_some() || self.window(vm).is_waiting(gfn) {
                return Ok(None);
            }
        }
        let knows = self.is_between(vm);
        assert!(knows, "{vm:?} traps at page {} again and again", gfn.0);
        Ok(None)
    }

    /// Reads a page, if it can be had now.
    pub fn attempt_read(&mut self, vm: VmId, gfn: Gfn) -> Result<(), Error> {
        if let Some(seen) = self.attempt(vm, gfn, Touch::Read, |window| window.read(gfn))? {
            self.assert_seen(vm, gfn, seen);
        }
        Ok(())
    }

    /// Writes a page, or clears it, if it can be had now.
    pub fn attempt_write(&mut self, vm: VmId, gfn: Gfn, what: What) -> Result<(), Error> {
        let stamp = match what {
            What::Stamp => self.stamp(vm),
            What::Zero => 0,
        };
        let write = self.attempt(vm, gfn, Touch::Write, |window| window.write(gfn, stamp))?;
        if self.was_written(vm, gfn, write) {
            self.note(vm, gfn, stamp);
        }
        Ok(())
    }

    /// Whether a write went through, which depends on the page's protection alone.
    fn was_written(&self, vm: VmId, gfn: Gfn, write: Option<Write>) -> bool {
        let read_only = self.read_only.get(&vm).is_some_and(|pages| pages.contains(&gfn.0));
        assert!(write.is_none_or(|write| (write == Write::Refused) == read_only), "{vm:?} writes page {}", gfn.0);
        write == Some(Write::Done)
    }

    fn assert_seen(&self, vm: VmId, gfn: Gfn, seen: Stamp) {
        let (memory, page) = match self.shares[&vm].get(&gfn.0) {
            Some((region, page)) => (&self.regions[region], page),
            None => (&self.vms[&vm], &gfn.0),
        };
        let want = memory.get(page).copied().unwrap_or(0);
        assert_eq!(seen, want, "{vm:?} at page {}: saw {seen:#x}, not {want:#x}", gfn.0);
    }

    /// A page has been written.
    fn note(&mut self, vm: VmId, gfn: Gfn, stamp: Stamp) {
        match self.shares[&vm].get(&gfn.0) {
            Some((region, page)) => set(self.regions.get_mut(region).expect("a region"), Gfn(*page), stamp),
            None => set(self.vms.get_mut(&vm).expect("a VM of the model"), gfn, stamp),
        }
    }

    /// Whoever waits is served, as far as that works.
    pub fn try_retry(&mut self) -> Result<(), Error> {
        let done = self.manager.retry();
        self.untold = done.is_err();
        done
    }

    /// A guest that waits for swap is waited for: a page may be read for a copy-up, and once more for what is below.
    fn finish_reads(&mut self, vm: VmId, gfn: Gfn) -> Result<(), Error> {
        while self.window(vm).is_waiting(gfn) && self.window(vm).failed.is_none() && (self.end_reads() || self.untold) {
            self.untold = false;
            if let Err(error) = self.manager.retry() {
                self.untold = true;
                return Err(error);
            }
        }
        Ok(())
    }

    /// All reads from swap and all copies that are under way end, and nobody has been told. Whether there were any.
    pub fn end_reads(&mut self) -> bool {
        let mut ended = self.swap.borrow_mut().end_reads();
        for vm in self.windows() {
            ended |= self.window_mut(vm).end_copies();
        }
        self.untold |= ended;
        ended
    }

    /// The last freeze of a VM was told of before its pages had been copied.
    pub fn copies_behind(&mut self, vm: VmId) {
        self.window_mut(vm).copies_behind();
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
        if self.has(vm, gfn) && self.window(vm).read(gfn).is_err() {
            self.window_mut(vm).wait(gfn);
            self.manager.fault(vm, gfn, touch).expect("nothing is to fail");
        }
    }

    /// All anonymous memory there is.
    pub fn evict_all(&mut self) {
        for object in self.objects() {
            let evicted = self.manager.evict(object, PageOrigin(0).pages(self.span()));
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
            self.assert_seen(vm, gfn, seen);
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
        let write = self.touch(vm, gfn, Touch::Write, |window| window.write(gfn, stamp))?;
        if self.was_written(vm, gfn, write) {
            self.note(vm, gfn, stamp);
        }
        Ok(())
    }

    /// A VM may write a part of its memory no more, or again.
    pub fn try_protect(&mut self, vm: VmId, pages: GfnRange, protection: Protection) -> Result<(), Error> {
        self.manager.protect(vm, pages, protection)?;
        let frames = self.frames().filter(|gfn| pages.contains(*gfn) && self.has(vm, *gfn));
        let frames: Vec<u64> = frames.map(|gfn| gfn.0).collect();
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

    /// Whether a VM has something at a frame: a guest that touches what is not there is over, and plays no part.
    pub fn has(&self, vm: VmId, gfn: Gfn) -> bool {
        !self.holes[&vm].contains(&gfn.0)
    }

    /// A VM gets new memory where it has nothing. What stands in its way is told.
    pub fn try_map(&mut self, vm: VmId, pages: GfnRange, sharing: Sharing) -> Result<(), Error> {
        let show = |window: &mut FakeWindow, run, store: Option<&VecStore>| window.show(run, store.map(Mapped::store));
        let done = self.manager.map(vm, pages, sharing, show);
        let is_free = pages.iter().all(|gfn| !self.has(vm, gfn));
        assert_eq!(matches!(done, Err(Error::Overlaps { .. })), !is_free && !self.halves.contains_key(&vm), "{done:?}");
        done?;
        self.holes.get_mut(&vm).expect("a VM of the model").retain(|page| !pages.contains(Gfn(*page)));
        if sharing == Sharing::Shared {
            let region = self.next_region;
            self.next_region += 1;
            self.regions.insert(region, Memory::new());
            self.shares.get_mut(&vm).expect("a VM of the model").extend(shares(region, pages));
        }
        Ok(())
    }

    /// A VM has nothing at these pages any more. Whatever its window has done before is told first.
    pub fn try_unmap(&mut self, vm: VmId, pages: GfnRange) -> Result<(), Error> {
        self.tell_dedup(vm);
        let done = self.manager.unmap(vm, pages, |window| window.hide(pages));
        let is_there = pages.iter().all(|gfn| self.has(vm, gfn) && self.frames().any(|frame| frame == gfn));
        assert_eq!(
            matches!(done, Err(Error::NotMapped { .. })),
            !is_there && !self.halves.contains_key(&vm),
            "{done:?}"
        );
        done?;
        self.holes.get_mut(&vm).expect("a VM of the model").extend(pages.raw());
        self.shares.get_mut(&vm).expect("a VM of the model").retain(|page, _| !pages.contains(Gfn(*page)));
        for memory in [&mut self.vms, &mut self.frozen] {
            memory.get_mut(&vm).expect("a VM of the model").retain(|page, _| !pages.contains(Gfn(*page)));
        }
        if let Some(read_only) = self.read_only.get_mut(&vm) {
            read_only.retain(|page| !pages.contains(Gfn(*page)));
        }
        Ok(())
    }

    /// A VM has pages somewhere else from now on. Whatever its window has done before is told first.
    pub fn try_move(&mut self, vm: VmId, from: GfnRange, to: Gfn) -> Result<(), Error> {
        self.tell_dedup(vm);
        let done = self.manager.move_pages(vm, from, to, |window| window.carry(from, to));
        let by = Distance::between(from.start(), to);
        let ram: BTreeSet<u64> = self.frames().map(|gfn| gfn.0).collect();
        let is_there = |gfn: Gfn| ram.contains(&gfn.0) && self.has(vm, gfn);
        if !self.halves.contains_key(&vm) {
            let all_there = from.iter().all(is_there);
            assert_eq!(matches!(done, Err(Error::NotMapped { .. })), !all_there, "{done:?}");
            let in_the_way = all_there && from.moved(by).iter().any(is_there);
            assert_eq!(matches!(done, Err(Error::Overlaps { .. })), in_the_way, "{done:?}");
        }
        done?;
        let holes = self.holes.get_mut(&vm).expect("a VM of the model");
        holes.retain(|page| !from.moved(by).contains(Gfn(*page)));
        holes.extend(from.raw());
        self.read_only.get_mut(&vm).into_iter().for_each(|pages| carry_set(pages, from, by));
        for memory in [&mut self.vms, &mut self.frozen] {
            carry_pages(memory.get_mut(&vm).expect("a VM of the model"), from, by);
        }
        carry_pages(self.shares.get_mut(&vm).expect("a VM of the model"), from, by);
        Ok(())
    }

    /// Moves as many of these pages as fit into the first hole of a VM that takes one. Whether there is one.
    pub fn try_move_into_hole(&mut self, vm: VmId, frames: &[Gfn]) -> Result<bool, Error> {
        let from: Vec<Gfn> = frames.iter().copied().take_while(|gfn| self.has(vm, *gfn)).collect();
        let from = from.chunk_by(|a, b| a.0 + 1 == b.0).next().unwrap_or_default();
        let in_ram: BTreeSet<u64> = self.frames().map(|gfn| gfn.0).collect();
        let holes: Vec<u64> = self.holes[&vm].iter().copied().filter(|page| in_ram.contains(page)).collect();
        let hole = holes.chunk_by(|a, b| a + 1 == *b).next();
        let Some((hole, first)) = hole.zip(from.first()) else { return Ok(false) };
        let count = from.len().min(hole.len()) as u64;
        self.try_move(vm, GfnRange::new(*first, PageCount(count)), Gfn(hole[0]))?;
        Ok(true)
    }

    /// Unmaps pages, or, where one is not there, maps all that are not, and changes nothing of what is.
    pub fn try_remap(&mut self, vm: VmId, frames: &[Gfn], sharing: Sharing) -> Result<(), Error> {
        let apart = |a: &Gfn, b: &Gfn| self.has(vm, *a) == self.has(vm, *b) && a.0 + 1 == b.0;
        let parts: Vec<(GfnRange, bool)> = frames
            .chunk_by(apart)
            .map(|part| (GfnRange::new(part[0], PageCount(part.len() as u64)), self.has(vm, part[0])))
            .collect();
        let all_there = parts.iter().all(|(_, is_there)| *is_there);
        for (pages, is_there) in parts {
            match is_there {
                true if all_there => self.try_unmap(vm, pages)?,
                true => {}
                false => self.try_map(vm, pages, sharing)?,
            }
        }
        Ok(())
    }

    /// KVM makes a private copy of a page that the guest only reads.
    pub fn copy_clean(&mut self, vm: VmId, gfn: Gfn) {
        self.touch(vm, gfn, Touch::Write, |window| window.copy_clean(gfn)).expect("nothing is to fail");
    }

    /// A guest gives pages back. Its window goes first; the manager hears of it.
    pub fn balloon(&mut self, vm: VmId, pages: GfnRange) {
        self.window_mut(vm).balloon(pages);
        self.manager.balloon(vm, &[pages]).expect("a VM of the family");
        for memory in [&mut self.vms, &mut self.frozen] {
            memory.get_mut(&vm).expect("a VM of the model").retain(|page, _| !pages.contains(Gfn(*page)));
        }
    }

    /// A freeze begins: the VM is to be stopped.
    pub fn begin(&mut self, vm: VmId, to: Destination) -> Result<StoreId, Error> {
        let store = self.manager.begin_freeze(vm, to)?;
        let along = match to {
            Destination::Store => self.manager.takes_along(vm).expect("a VM of the family"),
            Destination::Swap => Along::default(),
        };
        self.along.insert(vm, along);
        self.halves.insert(vm, Half::Begun(store, to));
        Ok(store)
    }

    /// It stands.
    pub fn stand(&mut self, vm: VmId) {
        let Some(Half::Begun(store, to)) = self.halves.remove(&vm) else { panic!("{vm:?} is not to be stopped") };
        self.tell_dedup(vm);
        self.manager.stands(vm).expect("a VM of the family");
        self.halves.insert(vm, Half::Standing(store, to));
    }

    /// Its window does its part, and it runs on.
    pub fn take(&mut self, vm: VmId, gaps: Gaps) {
        let Some(Half::Standing(store, to)) = self.halves.remove(&vm) else { panic!("{vm:?} does not stand") };
        let mapped = Mapped::store(self.manager.store(store).expect("a freeze makes a store"));
        if to == Destination::Swap {
            self.window_mut(vm).forget_kept();
        }
        let along = self.along.remove(&vm).expect("it was asked for");
        let harvest = self.window_mut(vm).freeze(store, mapped, gaps, &along);
        self.halves.insert(vm, Half::Taken(harvest, self.vms[&vm].clone()));
    }

    /// The manager hears of it.
    pub fn finish(&mut self, vm: VmId) {
        let Some(Half::Taken(harvest, memory)) = self.halves.remove(&vm) else { panic!("{vm:?} was not frozen") };
        self.manager.finish_freeze(vm, &harvest).expect("a VM of the family");
        self.frozen.insert(vm, memory);
    }

    /// Its window could not do its part.
    pub fn abort(&mut self, vm: VmId) {
        let half = self.halves.remove(&vm);
        assert!(matches!(half, Some(Half::Begun(..) | Half::Standing(..))), "{vm:?}: {half:?}");
        self.manager.abort_freeze(vm).expect("a VM of the family");
    }

    /// A freeze of a VM that gives pages back before it is stopped: the manager hears of that in the middle.
    pub fn balloon_and_freeze(&mut self, vm: VmId, pages: GfnRange, gaps: Gaps) {
        self.begin(vm, Destination::Store).expect("nothing is to fail");
        self.balloon(vm, pages);
        self.stand(vm);
        self.take(vm, gaps);
        self.finish(vm);
    }

    /// A freeze of which the manager hears late: it does something else first.
    pub fn freeze_unheard(&mut self, vm: VmId, meanwhile: impl FnOnce(&mut Self)) {
        let store = self.manager.begin_freeze(vm, Destination::Store).expect("nothing is to fail");
        let mapped = Mapped::store(self.manager.store(store).expect("a freeze makes a store"));
        let along = self.along.remove(&vm).unwrap_or_default();
        let harvest = self.window_mut(vm).freeze(store, mapped, Gaps::None, &along);
        meanwhile(self);
        self.manager.stands(vm).expect("a VM of the family");
        self.manager.finish_freeze(vm, &harvest).expect("a VM of the family");
    }

    /// What a VM has written becomes an object.
    pub fn try_freeze(&mut self, vm: VmId, gaps: Gaps) -> Result<StoreId, Error> {
        self.try_freeze_to(vm, gaps, Destination::Store)
    }

    /// What a VM has written becomes an object, in memory or in swap.
    pub fn try_freeze_to(&mut self, vm: VmId, gaps: Gaps, to: Destination) -> Result<StoreId, Error> {
        let store = self.begin(vm, to)?;
        self.stand(vm);
        self.take(vm, gaps);
        self.finish(vm);
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
        self.begin(vm, Destination::Store).expect("nothing is to fail");
        self.stand(vm);
        self.take(vm, Gaps::None);
        self.window_mut(vm).wait(gfn);
        self.manager.fault(vm, gfn, Touch::Write).expect("nothing is to fail");
        assert!(self.window(vm).is_waiting(gfn), "nobody can know yet what is there");
        self.finish(vm);
        assert!(!self.window(vm).is_waiting(gfn), "it looks again");
    }

    /// A window gives up what stayed in it since a freeze into `store`: stretches of at least `least` pages, about `limit`
    /// pages in all. How many it did.
    pub fn dedup(&mut self, vm: VmId, store: StoreId, least: u64, limit: u64) -> u64 {
        self.ask_to_dedup(vm, store, least, limit);
        let pages = match self.dedups.get(&vm) {
            Some(Dedup::Asked(_, pages)) => pages.iter().map(|pages| pages.count().0).sum(),
            _ => 0,
        };
        self.tell_dedup(vm);
        pages
    }

    /// A window is asked to.
    pub fn ask_to_dedup(&mut self, vm: VmId, store: StoreId, least: u64, limit: u64) {
        let pages = self.manager.to_dedup(vm, store, PageCount(least), PageCount(limit)).expect("a VM of the family");
        if !pages.is_empty() {
            let before = self.dedups.insert(vm, Dedup::Asked(store, pages));
            assert!(before.is_none(), "one thing after the other is asked of {vm:?}");
        }
    }

    /// It does so, if it is asked to.
    pub fn do_dedup(&mut self, vm: VmId) {
        if let Some(Dedup::Asked(store, pages)) = self.dedups.get(&vm) {
            let (store, pages) = (*store, pages.clone());
            // It holds on to the descriptor.
            let done = match self.manager.store(store).map(Mapped::store) {
                Some(mapped) => self.window_mut(vm).dedup(store, mapped, &pages),
                None => Vec::new(),
            };
            self.dedups.insert(vm, Dedup::Done(store, done));
        }
    }

    /// It does so, if it has not done so, and the manager hears of it.
    pub fn tell_dedup(&mut self, vm: VmId) {
        self.do_dedup(vm);
        if let Some(Dedup::Done(store, pages)) = self.dedups.remove(&vm) {
            self.manager.dedup(vm, store, &pages).expect("a VM of the family");
        }
    }

    /// What is half done comes to its end.
    pub fn close(&mut self) {
        for vm in self.ids() {
            self.tell_dedup(vm);
            match self.halves.get(&vm) {
                Some(Half::Taken(..)) => self.finish(vm),
                Some(Half::Begun(..) | Half::Standing(..)) => self.abort(vm),
                None => {}
            }
        }
    }

    /// Whether the manager does not know what the window of `vm` shows.
    fn is_between(&self, vm: VmId) -> bool {
        matches!(self.halves.get(&vm), Some(Half::Taken(..))) || matches!(self.dedups.get(&vm), Some(Dedup::Done(..)))
    }

    /// Stores from whose freezes a window may keep pages.
    pub fn kept_stores(&self, vm: VmId) -> BTreeSet<StoreId> {
        let kept = self.manager.family().vm(vm).kept().flat_map(GfnRange::iter);
        kept.filter_map(|gfn| self.find(vm, gfn)?.slot.store()).collect()
    }

    /// A freeze whose window could not do its part.
    pub fn freeze_in_vain(&mut self, vm: VmId) {
        self.begin(vm, Destination::Swap).expect("nothing is to fail");
        self.abort(vm);
    }

    /// A child of a VM that is frozen for it.
    pub fn try_fork(&mut self, parent: VmId, gaps: Gaps) -> Result<VmId, Error> {
        self.try_freeze(parent, gaps)?;
        Ok(self.fork_frozen(parent))
    }

    pub fn fork(&mut self, parent: VmId, gaps: Gaps) -> VmId {
        self.try_fork(parent, gaps).expect("nothing is to fail")
    }

    /// A child of what a VM was at its last freeze.
    pub fn fork_frozen(&mut self, parent: VmId) -> VmId {
        let child = self.manager.fork(parent, FakeWindow::new(&self.ram, &self.ledger)).expect("a VM of the family");
        let seen = self.frozen[&parent].clone();
        self.vms.insert(child, seen.clone());
        self.frozen.insert(child, seen);
        self.shares.insert(child, self.shares[&parent].clone());
        self.holes.insert(child, self.holes[&parent].clone());
        if let Some(read_only) = self.read_only.get(&parent).cloned() {
            self.read_only.insert(child, read_only);
        }
        self.map_runs(child);
        child
    }

    /// A VM ends. Its process waits until what it moved out has been written back.
    pub fn exit(&mut self, vm: VmId) {
        self.vms.remove(&vm);
        self.frozen.remove(&vm);
        self.shares.remove(&vm);
        self.holes.remove(&vm);
        self.halves.remove(&vm);
        self.dedups.remove(&vm);
        self.manager.exit(vm).expect("a VM of the family");
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

    /// A copy of a VM's process dies, which had what its freezes took.
    pub fn lose_scratch(&mut self, vm: VmId) {
        self.killed = true;
        self.window_mut(vm).lose_scratch();
    }

    /// Moved-out pages will be lost, though nobody dies.
    pub fn expect_losses(&mut self) {
        self.killed = true;
    }

    /// Processes with moved-out pages that outlived their VM.
    pub fn holders(&self) -> Vec<VmId> {
        self.gone.iter().copied().filter(|&vm| self.manager.window(vm).is_some()).collect()
    }

    pub fn try_write_back(&mut self) -> Result<bool, Error> {
        self.manager.write_back(WRITEBACK_BATCH)
    }

    pub fn write_back(&mut self) -> bool {
        self.try_write_back().expect("nothing is to fail")
    }

    pub fn write_back_all(&mut self) {
        while self.write_back() || self.manager.bring_ahead() || self.io_done() {}
        assert_eq!(self.manager.family().totals().in_flight, 0);
        assert_eq!(self.manager.windows(), self.vms.len(), "nobody waits any more");
        let taken = |vm| matches!(self.halves.get(&vm), Some(Half::Taken(..)));
        assert!(self.ids().iter().all(|&vm| taken(vm) || !self.window(vm).has_scratch()));
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
        for part in family.check_parts(PageCount(24)) {
            family.check_part(part, &mut broken);
        }
        self.manager.check_stores(&mut broken);
        check_swap(self.manager.swap_slots(), Some(&*self.swap.borrow()), &mut broken);
        assert!(broken.is_empty(), "{}", broken.join("\n"));
        for &vm in self.vms.keys().filter(|vm| !self.is_between(**vm)) {
            let told = &**family.runs(vm);
            assert_eq!(self.window(vm).runs(), told, "the window of {vm:?} maps what the books say");
        }
        for &vm in self.vms.keys() {
            let read_only = family.vm(vm).map().protected(Protection::ReadOnly).flat_map(GfnRange::raw).collect();
            assert_eq!(self.window(vm).read_only, read_only, "the window of {vm:?} protects what the books say");
        }
        for &vm in self.vms.keys().filter(|vm| !self.is_between(**vm)) {
            let books: Vec<_> = family.vm(vm).kept().collect();
            assert_eq!(self.window(vm).stayed(), books, "the window of {vm:?} keeps what the books say");
        }
        assert_eq!(family.vms().count(), self.vms.len());
        let holders = self.holders();
        assert_eq!(self.manager.windows(), self.vms.len() + holders.len());
        for vm in holders {
            assert!(self.window(vm).has_scratch(), "the window of {vm:?}, which is gone, is kept for nothing");
        }
        let stored = family.totals().resident + self.manager.hidden().0 + self.manager.shared_resident().0;
        assert_eq!(self.ledger.pages(), stored, "stores hold the pages the books say");
        self.check_waiting();
    }

    /// Whoever waits is known to the manager. (A VM that fails waits for ever.)
    fn check_waiting(&self) {
        let known: BTreeSet<(VmId, Gfn)> = self.manager.waiting_for_pages().collect();
        let stands = |vm| matches!(self.halves.get(&vm), Some(Half::Standing(..) | Half::Taken(..)));
        let copying = self.windows().into_iter().any(|vm| self.window(vm).is_copying());
        let reading = self.untold || copying || self.swap.borrow().is_reading();
        assert!(known.is_empty() || reading, "nobody waits for nothing: {known:?}");
        assert!(known.iter().all(|(vm, _)| self.vms.contains_key(vm)), "nobody waits who is gone: {known:?}");
        assert!(!self.manager.family().objects().waits_for_others() || reading, "nothing is put off for nothing");
        for &vm in self.vms.keys().filter(|vm| self.window(**vm).failed.is_none()) {
            for &page in self.window(vm).waiting() {
                assert!(
                    known.contains(&(vm, Gfn(page))) || stands(vm),
                    "{vm:?} waits at page {page}, and nobody knows"
                );
            }
        }
    }

    /// Page counts add up, and are what looking at every page of every VM finds.
    pub fn check_counts(&self) {
        let family = self.manager.family();
        let mut viewers: BTreeMap<(StoreId, u64), u64> = BTreeMap::new();
        for vm in self.ids() {
            for gfn in self.frames().filter(|gfn| self.has(vm, *gfn)) {
                if let Some(page) = self.stored(vm, gfn) {
                    *viewers.entry(page).or_default() += 1;
                }
            }
        }
        for vm in self.ids() {
            let live = self.window(vm).live();
            let mut want = PageCounts::default();
            for gfn in self.frames().filter(|gfn| self.has(vm, *gfn)) {
                let found = self.find(vm, gfn);
                want.swapped += u64::from(found.is_some_and(|found| matches!(found.slot, Slot::Swapped(..))));
                want.in_flight += u64::from(found.is_some_and(|found| found.slot.is_pending()));
                match self.stored(vm, gfn) {
                    _ if live.contains(&gfn.0) => want.private += 1,
                    Some(page) if viewers[&page] == 1 => want.private += 1,
                    Some(_) => want.shared += 1,
                    None => want.zero += 1,
                }
            }
            assert_eq!(family.page_counts(vm, &live), want, "of {vm:?}");
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
        Some((found.slot.store()?, found.origin.page(gfn).0))
    }

    /// Ends all VMs: nothing is left of anything.
    pub fn end(mut self) {
        for vm in self.ids() {
            self.exit(vm);
            self.check();
        }
        self.write_back_all();
        let family = self.manager.family();
        let totals = family.totals();
        assert_eq!((totals.objects, totals.stores, totals.tables, totals.resident), (0, 0, 0, 0));
        assert_eq!(totals.shared, 0, "shared memory goes with the last who has it");
        assert_eq!((totals.swapped, self.swap.borrow().pages()), (0, 0), "no slot is left over");
        assert_eq!((self.ledger.pages(), self.ledger.stores(), self.manager.windows()), (0, 0, 0));
        assert_eq!(self.ledger.stuck(), 0, "what could not be freed went with its store");
    }
}

/// Shows a region at `pages`, from its first page on.
fn shares(region: u64, pages: GfnRange) -> impl Iterator<Item = (u64, (u64, u64))> {
    pages.iter().zip(0..).map(move |(gfn, page)| (gfn.0, (region, page)))
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
