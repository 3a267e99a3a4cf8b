//! One family's memory manager: the books, and the hands that carry out what they say.

mod check;
mod error;
mod map;
mod readahead;
mod reclaim;
mod waiters;
mod writeback;

pub use error::Error;
use readahead::Readahead;
pub use reclaim::{Evicted, SwapCounts};
use waiters::{Reason, Waiters};

use crate::addr::{Gfn, GfnRange, PageCount, PageIndex};
use crate::effect::{Effect, Effects};
use crate::family::{Family, ObjectMapping};
use crate::ids::{StoreId, SwapSlot, VmId};
use crate::object::{Loss, ZERO_CLUSTER};
use crate::ops::{Compaction, Destination, Fault};
use crate::space::map::Protection;
use crate::space::runs::Runs;
use crate::stage2::Shape;
use crate::store::{FileStore, Store, StoreFactory};
use crate::swap::{Fetch, Swap};
use crate::sys::Touch;
use crate::window::{Along, Failure, Harvest, Window};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::rc::Rc;

/// Most pages written back at a time: few enough that whoever owns the manager soon gets to a waiting trap.
pub const WRITEBACK_BATCH: PageCount = PageCount(64);
/// Pages of stores freed at a time, where nobody waits for it.
const FREED_BATCH: PageCount = PageCount(512);
/// Slots of swap given back at a time.
const SLOTS_BATCH: PageCount = PageCount(2048);
/// Pages whose memory a scratch range gives back at a time.
const LEFT_BATCH: PageCount = PageCount(512);
/// A stretch of zero pages takes no storage from this length on. Shorter ones are stored: each would cost a trap.
const ZERO_RUN: u64 = 16;

/// Mappings a window may have: a quarter of `vm.max_map_count`, as the kernel has it by default.
pub const MAX_RUNS: usize = 65530 / 4;

/// What was copied for a freeze, by the time all of it has been written back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Pages put into the store, copy-ups included.
    pub pages: u64,
    /// Clean pages among them.
    pub copy_ups: u64,
}

/// One family's memory. Single owner, no locks, and no method waits.
///
/// It owns the family's stores and the windows of its VMs; file stores are shared. When a VM exits, its window lives on until
/// the last of its moved-out pages that others see has been written back. A call that cannot fail panics where it is asked
/// about a VM that is gone: see [`Local`](crate::Local) for VMs that may be.
pub struct Manager<S: StoreFactory, W> {
    family: Family,
    factory: S,
    span: PageCount,
    stores: HashMap<StoreId, S::Store>,
    /// Those among them that are shared memory.
    shared: HashSet<StoreId>,
    files: HashMap<StoreId, Rc<S::File>>,
    windows: HashMap<VmId, W>,
    copied: HashMap<StoreId, Copied>,
    waiters: Waiters,
    ahead: Readahead,
    /// Who waited last goes on in order.
    in_order: bool,
    /// Stores that pages came back to lately, the last one last.
    awake: VecDeque<StoreId>,
    /// Stores of freezes whose pages go to swap.
    to_swap: HashSet<StoreId>,
    /// Pages that nobody sees any more and that are still in their stores: to free them takes time, and guests that wait come
    /// first.
    hidden: BTreeMap<StoreId, Vec<GfnRange>>,
    /// Pages of a scratch range that have been written back, and whose memory has not been given back.
    left: HashMap<StoreId, GfnRange>,
    swap_counts: SwapCounts,
    /// Slots of swap that nobody needs any more, and that have not been given back.
    unneeded: Vec<(SwapSlot, PageCount)>,
    /// Stores whose pages are being listed, and which of them have come or gone meanwhile.
    watched: HashMap<StoreId, Vec<GfnRange>>,
    staging: Vec<u8>,
    /// A stretch of zero pages takes no storage from this length on.
    zero_run: u64,
    /// Mappings a window may have.
    max_runs: usize,
    compaction: Compaction,
}

impl<S: StoreFactory, W: Window> Manager<S, W> {
    /// A family without VMs, whose guest frames are all below `span`.
    pub fn new(shape: Shape, span: PageCount, factory: S) -> Self {
        Self {
            family: Family::new(shape),
            factory,
            span,
            stores: HashMap::new(),
            shared: HashSet::new(),
            files: HashMap::new(),
            windows: HashMap::new(),
            copied: HashMap::new(),
            waiters: Waiters::default(),
            ahead: Readahead::default(),
            in_order: false,
            awake: VecDeque::new(),
            to_swap: HashSet::new(),
            hidden: BTreeMap::new(),
            left: HashMap::new(),
            swap_counts: SwapCounts::default(),
            unneeded: Vec::new(),
            watched: HashMap::new(),
            staging: vec![0; WRITEBACK_BATCH.bytes() as usize],
            zero_run: ZERO_RUN,
            max_runs: MAX_RUNS,
            compaction: Compaction::default(),
        }
    }

    /// The same, where windows may have `max_runs` mappings; a quarter of the kernel's default otherwise.
    pub fn with_max_runs(mut self, max_runs: usize) -> Self {
        self.max_runs = max_runs;
        self
    }

    /// The same, with other bounds of what is compacted.
    #[must_use]
    pub fn with_compaction(mut self, compaction: Compaction) -> Self {
        self.compaction = compaction;
        self
    }

    /// For windows without traps: zeros are stored like all pages, since a hole would be filled by whoever reads it.
    #[must_use]
    pub fn without_holes(mut self) -> Self {
        self.zero_run = u64::MAX;
        self
    }

    /// The books.
    pub fn family(&self) -> &Family {
        &self.family
    }

    fn find(&self, vm: VmId) -> Result<(), Error> {
        if self.family.vms.contains_key(&vm) { Ok(()) } else { Err(Error::NoSuchVm(vm)) }
    }

    /// The store behind an id, for its descriptor.
    pub fn store(&self, id: StoreId) -> Option<&S::Store> {
        self.stores.get(&id)
    }

    /// The file store behind an id.
    pub fn file(&self, id: StoreId) -> Option<&Rc<S::File>> {
        self.files.get(&id)
    }

    /// A VM's window; there is one for each VM, and for some that are gone.
    pub fn window(&self, vm: VmId) -> Option<&W> {
        self.windows.get(&vm)
    }

    /// The same, to change it.
    pub fn window_mut(&mut self, vm: VmId) -> Option<&mut W> {
        self.windows.get_mut(&vm)
    }

    /// Windows there are, those of VMs that are gone included.
    pub fn windows(&self) -> usize {
        self.windows.len()
    }

    /// A VM of `ram`, with files at their places, and at those of `shared` memory that all VMs which descend from this one have
    /// in common. The caller makes the window map [`Family::runs`].
    ///
    /// # Errors
    /// [`Error::CreateStore`]; nothing has changed.
    pub fn launch(
        &mut self,
        ram: &[GfnRange],
        files: &[(GfnRange, Rc<S::File>)],
        shared: &[GfnRange],
        window: W,
    ) -> Result<VmId, Error> {
        let stores = shared.iter().map(|pages| self.create_shared(pages.count())).collect::<Result<Vec<_>, _>>()?;
        let mut mappings = Vec::new();
        for (pages, file) in files {
            let (object, store) = self.family.add_file(pages.count());
            self.files.insert(store, Rc::clone(file));
            mappings.push(ObjectMapping { pages: *pages, object });
        }
        for (&pages, store) in shared.iter().zip(stores) {
            let (object, id) = self.family.add_shared(pages.count());
            self.insert_shared(id, store);
            mappings.push(ObjectMapping { pages, object });
        }
        let vm = self.family.launch(ram, &mappings);
        self.windows.insert(vm, window);
        Ok(vm)
    }

    fn create_shared(&mut self, pages: PageCount) -> Result<S::Store, Error> {
        self.factory.create_shared(pages).map_err(|source| Error::CreateStore { pages, source })
    }

    /// Pages of shared memory that are there, each once however many VMs have them.
    pub fn shared_resident(&self) -> PageCount {
        let resident = self.shared.iter().filter_map(|id| self.stores[id].resident().ok());
        PageCount(resident.map(|pages| pages.0).sum())
    }

    /// First half of a freeze: a store for the window to put in the place of what it moves out. The moved pages are written back
    /// into it, or, with [`Destination::Swap`], into swap.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::CreateStore`]; nothing has changed.
    pub fn begin_freeze(&mut self, vm: VmId, to: Destination) -> Result<StoreId, Error> {
        self.find(vm)?;
        let pages = self.span;
        let store = self.factory.create(pages).map_err(|source| Error::CreateStore { pages, source })?;
        let id = self.family.begin_freeze(vm);
        while self.stores.contains_key(&id) {
            // Of the last that had this id, nothing is left but pages to be freed.
            self.free_hidden();
        }
        self.stores.insert(id, store);
        if to == Destination::Swap && self.may_evict() {
            self.to_swap.insert(id);
        }
        Ok(id)
    }

    /// What the window of `vm` is to take along in the freeze that has begun, written or not: of small old stores, and
    /// what is [lost](Self::mends) but for the copy that the window keeps.
    pub fn takes_along(&mut self, vm: VmId) -> Along {
        let copies = self.mends(vm);
        let moves = match copies.is_empty() && self.zero_run < u64::MAX {
            true => self.family.compact(vm, self.compaction),
            false => Vec::new(),
        };
        Along { copies, moves }
    }

    /// Pages of `vm` that are lost to its children, and that its window has a copy of. What a copy of its process had is lost
    /// with it, whether anybody has asked for it or not.
    pub fn mends(&mut self, vm: VmId) -> Vec<GfnRange> {
        self.find_lost(vm);
        self.family.to_mend(vm)
    }

    /// Nothing else is to be done: gets ready for the next freeze.
    pub fn stock_up(&mut self) {
        self.factory.stock_up(self.span);
    }

    /// The VM that is being frozen stands still. Whoever holds its window says so before it moves the first page, and
    /// whoever owns the manager hears it before any trap that comes afterwards: what is zero in the books may have been
    /// written and moved out, and must not be supplied any more.
    pub fn stands(&mut self, vm: VmId) {
        self.family.stands(vm);
    }

    /// The window could not freeze, and has changed nothing.
    pub fn abort_freeze(&mut self, vm: VmId) {
        let mut effects = Effects::default();
        self.family.abort_freeze(vm, &mut effects);
        self.carry_out(effects);
        self.wake_frozen(vm);
    }

    /// Second half of a freeze: the window has moved pages out.
    pub fn finish_freeze(&mut self, vm: VmId, harvest: &Harvest) {
        let mut effects = Effects::default();
        // Without traps a hole in a store would be filled by whoever reads it.
        let bridge = if self.zero_run == u64::MAX { PageCount(0) } else { ZERO_CLUSTER };
        self.family.finish_freeze(vm, harvest, bridge, &mut effects);
        self.carry_out_in_time(effects);
        self.wake_frozen(vm);
    }

    /// Carries out what cannot wait: pages are freed bit by bit, but for those that go with their store, and so are slots of
    /// swap where they are many.
    fn carry_out_in_time(&mut self, effects: Effects) {
        let (mut rest, mut slots) = (Effects::default(), PageCount(0));
        for effect in effects.0 {
            match effect {
                // What is there of shared memory is not known, but to its store.
                Effect::Punch(store, pages) if self.shared.contains(&store) => self.punch(store, pages),
                Effect::Punch(store, pages) => self.hidden.entry(store).or_default().push(pages),
                Effect::FreeSwap(first, count) if slots >= SLOTS_BATCH => self.unneeded.push((first, count)),
                effect => {
                    if let Effect::FreeSwap(_, count) = effect {
                        slots.0 += count.0;
                    }
                    rest.push(effect);
                }
            }
        }
        self.carry_out(rest);
    }

    /// Finds out about some of what freezes have hidden whether anybody sees it.
    fn tidy(&mut self) {
        let mut effects = Effects::default();
        self.family.tidy(&mut effects);
        self.carry_out_in_time(effects);
    }

    /// Frees some pages that are hidden from everybody, in stores and in swap. Whether more are left.
    fn free_hidden(&mut self) -> bool {
        self.give_slots_back(SLOTS_BATCH);
        if !self.family.is_tidy() {
            self.tidy();
        }
        let mut most = FREED_BATCH.0;
        while most > 0
            && let Some(mut entry) = self.hidden.first_entry()
        {
            let store = *entry.key();
            let Some(pages) = entry.get_mut().pop() else {
                entry.remove();
                if !self.family.objects().accounts.stores.contains_key(&store) {
                    self.drop_store(store);
                }
                continue;
            };
            let part = GfnRange::between(pages.start(), pages.end().min(Gfn(pages.start().0 + most)));
            if part.end() < pages.end() {
                entry.get_mut().push(GfnRange::between(part.end(), pages.end()));
            }
            most -= part.count().0;
            self.punch(store, part);
        }
        !self.hidden.is_empty() || !self.unneeded.is_empty() || !self.family.is_tidy()
    }

    fn drop_store(&mut self, store: StoreId) {
        self.hidden.remove(&store);
        self.to_swap.remove(&store);
        self.watched.remove(&store);
        self.stores.remove(&store);
        self.shared.remove(&store);
        self.copied.remove(&store);
        self.files.remove(&store);
    }

    fn punch(&mut self, store: StoreId, pages: GfnRange) {
        self.touches(store, pages);
        if let Some(store) = self.stores.get_mut(&store) {
            store.punch(PageIndex(pages.start().0), pages.count());
        }
    }

    /// Pages in stores that are about to be freed.
    pub fn hidden(&self) -> PageCount {
        PageCount(self.hidden.values().flatten().map(|pages| pages.count().0).sum())
    }

    /// Who waited for the end of a freeze touches its page again.
    fn wake_frozen(&mut self, vm: VmId) {
        self.wake_all(|waiter, _, reason| waiter == vm && reason == Reason::Freeze);
    }

    /// Those who wait for this touch their pages again.
    fn wake_all(&mut self, waits: impl Fn(VmId, Gfn, Reason) -> bool) {
        for (vm, gfn, _) in self.waiters.take_all(waits) {
            self.window_do(vm, |window| window.wake(GfnRange::new(gfn, PageCount(1))));
        }
    }

    /// A child of `parent`, whose live layer is empty. The caller makes the window map [`Family::runs`], and protects what the
    /// child's [map](crate::family::VmBooks::map) says.
    pub fn fork(&mut self, parent: VmId, window: W) -> VmId {
        let child = self.family.fork(parent, self.max_runs);
        self.windows.insert(child, window);
        child
    }

    /// From now on `vm` has this protection at `pages`, for as long as it lives or until it is changed; children inherit it.
    /// Pages stay shared as they are. Frames outside of its memory do not count.
    ///
    /// A write to what is read-only changes nothing for anybody, and ends its VM or its thread: a window refuses it as the
    /// kernel refuses a write to read-only memory, `KVM_RUN` returns `EFAULT` to who runs the vCPU, and a thread gets
    /// `SIGSEGV`. A VM process that is taken over could lift a protection of memory that is its own: whoever must not write
    /// what others see is not given a way to.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::Protect`]; nothing has changed.
    pub fn protect(&mut self, vm: VmId, pages: GfnRange, protection: Protection) -> Result<(), Error> {
        self.find(vm)?;
        if let Some(window) = self.windows.get_mut(&vm) {
            window.protect(pages, protection).map_err(|source| Error::Protect { pages, source })?;
        }
        let mut effects = Effects::default();
        self.family.protect(vm, pages, protection, &mut effects);
        self.carry_out(effects);
        Ok(())
    }

    /// What the window of a child of `parent` will most likely show: all of it, if the parent has written nothing since its
    /// last freeze.
    pub fn runs_of_child(&mut self, parent: VmId) -> Runs {
        self.family.runs_of_child(parent, self.max_runs)
    }

    /// `vm` has given pages back: its window shows nothing there any more, as anonymous memory does, and this is told
    /// before anything that its window did later. Frames outside of its memory do not count.
    ///
    /// # Panics
    /// If the VM [stands](crate::family::VmBooks::stands) for a freeze.
    pub fn balloon(&mut self, vm: VmId, pages: &[GfnRange]) {
        let mut effects = Effects::default();
        self.family.balloon(vm, pages, &mut effects);
        self.carry_out_in_time(effects);
        // Who waited for one of them to come back from swap finds it zero.
        for &pages in pages.iter().filter(|&&pages| self.waiters.take(vm, pages)) {
            if let Some(window) = self.windows.get_mut(&vm) {
                window.wake(pages);
            }
        }
    }

    /// Pages that the window of `vm` keeps from a freeze into `store`, and could [give up](Self::dedup): see
    /// [`Family::to_dedup`].
    pub fn to_dedup(&self, vm: VmId, store: StoreId, least: PageCount, limit: PageCount) -> Vec<GfnRange> {
        self.family.to_dedup(vm, store, least, limit, self.max_runs)
    }

    /// The window of `vm` keeps these pages no longer, and maps `store` there; this is told before anything that its
    /// window did later.
    pub fn dedup(&mut self, vm: VmId, store: StoreId, pages: &[GfnRange]) {
        let mut effects = Effects::default();
        self.family.dedup(vm, store, pages, &mut effects);
        self.carry_out(effects);
    }

    /// Takes a VM out.
    pub fn exit(&mut self, vm: VmId) {
        let mut effects = Effects::default();
        self.family.exit(vm, &mut effects);
        self.waiters.forget(vm);
        self.ahead.streams.forget(vm);
        self.carry_out_in_time(effects);
    }

    /// A guest waits for the page at `gfn`: gets it there and wakes the guest, now or when its page has been read from
    /// swap. Whether it goes on in order, so that it most likely needs the pages that are written back next.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`]. Otherwise the page could not be filled in: the guest waits on, and is served by the next
    /// [`retry`](Self::retry).
    pub fn fault(&mut self, vm: VmId, gfn: Gfn, touch: Touch) -> Result<bool, Error> {
        self.find(vm)?;
        self.in_order = false;
        let served = self.serve(vm, gfn, touch);
        match served {
            Ok(None) => drop(self.waiters.take(vm, GfnRange::new(gfn, PageCount(1)))),
            Ok(Some(reason)) => self.waiters.add(vm, gfn, touch, reason),
            Err(_) => self.waiters.add(vm, gfn, touch, Reason::Retry),
        }
        served.map(|_| self.in_order)
    }

    /// Answers a trap, if that can be done now; otherwise what its guest waits for.
    fn serve(&mut self, vm: VmId, gfn: Gfn, touch: Touch) -> Result<Option<Reason>, Error> {
        match self.exclusive_swap_in(vm, gfn, touch)? {
            None => {}
            Some(Fetch::Here) => return Ok(None),
            Some(Fetch::Coming) => return Ok(Some(Reason::Page)),
        }
        let answer = match self.write_back_at(vm, gfn, Family::fault)? {
            Fault::File { store, pages, wake } => {
                self.files[&store].ensure(pages).map_err(|source| Error::File { pages, source })?;
                Fault::Wake(wake)
            }
            answer => answer,
        };
        let Some(window) = self.windows.get_mut(&vm) else { return Ok(None) };
        let mut wake = |window: &mut W, pages| {
            self.waiters.take(vm, pages);
            window.wake(pages);
        };
        match answer {
            Fault::Zero(zeros) => {
                let page = GfnRange::new(gfn, PageCount(1));
                if zeros.iter().any(|pages| pages.contains(gfn)) {
                    // Whatever becomes of the others.
                    window.zero(page);
                }
                zeros.iter().for_each(|&pages| window.zero(pages));
                zeros.iter().chain([&page]).for_each(|&pages| wake(window, pages));
            }
            Fault::Lost(loss) => window.fail(lost(gfn, loss)),
            Fault::Outside => window.fail(Failure::Outside(gfn)),
            Fault::Wake(pages) | Fault::File { wake: pages, .. } => wake(window, pages),
            Fault::Wait => return Ok(Some(Reason::Freeze)),
            Fault::WriteBack(_) | Fault::SwapIn(_) => return Ok(Some(Reason::Page)),
        }
        Ok(None)
    }

    /// Writes back what `vm` sees around `gfn`, if it has not been written back, and has it read if it is in swap: its
    /// children are about to need it.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`]. Otherwise a page could not be filled in.
    pub fn write_ahead(&mut self, vm: VmId, gfn: Gfn) -> Result<(), Error> {
        self.find(vm)?;
        self.write_back_at(vm, gfn, Family::beneath).map(drop)
    }

    /// Does what `look` says until nothing is left but for who waits there; [`Fault::WriteBack`] and [`Fault::SwapIn`] where a
    /// read is under way.
    fn write_back_at(
        &mut self,
        vm: VmId,
        gfn: Gfn,
        look: impl Fn(&Family, VmId, Gfn) -> Fault,
    ) -> Result<Fault, Error> {
        loop {
            match look(&self.family, vm, gfn) {
                Fault::WriteBack(job) => match self.run_job(&job, Destination::Store)? {
                    Fetch::Here => self.in_order = self.family.continue_after(&job),
                    Fetch::Coming => return Ok(Fault::WriteBack(job)),
                },
                Fault::SwapIn(read) => {
                    let order = self.look_ahead(vm, gfn);
                    match self.swap_in(&read, order)? {
                        Fetch::Here => {}
                        Fetch::Coming => return Ok(Fault::SwapIn(read)),
                    }
                }
                answer => return Ok(answer),
            }
        }
    }

    /// Writes back one batch of pages, at most `limit` and [`WRITEBACK_BATCH`]. Whether more are left, those apart that are on
    /// their way: they are done after [`retry`](Self::retry).
    ///
    /// # Errors
    /// [`Error::Fill`]: the batch waits on.
    pub fn write_back(&mut self, limit: PageCount) -> Result<bool, Error> {
        let more = self.free_hidden();
        while let Some(job) = self.family.next_job(limit) {
            let to = if self.to_swap.contains(&job.store) { Destination::Swap } else { Destination::Store };
            match self.run_job(&job, to)? {
                Fetch::Here => return Ok(true),
                Fetch::Coming => self.family.put_off(&job),
            }
        }
        Ok(more)
    }

    /// Whether there is something that [`write_back`](Self::write_back) sees to.
    pub fn has_writeback(&self) -> bool {
        let all_freed = self.hidden.is_empty() && self.unneeded.is_empty() && self.family.is_tidy();
        !all_freed || !self.family.objects().writeback.pending.is_empty()
    }

    /// Whether all pages of a freeze are where they belong.
    pub fn is_written_back(&self, store: StoreId) -> bool {
        self.family.objects().accounts.is_written_back(store)
    }

    /// What was copied for a freeze so far; asked for once, when it has been written back.
    pub fn take_copied(&mut self, store: StoreId) -> Copied {
        self.copied.remove(&store).unwrap_or_default()
    }

    fn window_do(&mut self, vm: VmId, action: impl FnOnce(&mut W)) {
        if let Some(window) = self.windows.get_mut(&vm) {
            action(window);
        }
    }

    fn carry_out(&mut self, effects: Effects) {
        for effect in effects.0 {
            match effect {
                Effect::Punch(store, pages) => self.punch(store, pages),
                Effect::FreeSwap(first, count) => self.factory.swap().free(first, count),
                Effect::DropStore(store) => {
                    // Windows of others may hold on to it beneath copies of their own, and must not to its pages.
                    if !self.hidden.contains_key(&store) || self.family.vms.is_empty() {
                        self.drop_store(store);
                    }
                }
                Effect::DropScratch(holder, store) => {
                    self.left.remove(&store);
                    self.window_do(holder, |window| window.drop_scratch(store));
                    if self.family.window_is_done(holder) {
                        self.windows.remove(&holder);
                    }
                }
                Effect::Zero(vm, pages) => {
                    let waited = self.waiters.take(vm, pages);
                    self.window_do(vm, |window| {
                        window.zero(pages);
                        if waited {
                            window.wake(pages);
                        }
                    });
                }
                Effect::DropWindow(vm) => {
                    self.windows.remove(&vm);
                }
                Effect::Fail(vm, pages) => self.window_do(vm, |window| window.fail(lost(pages.start(), Loss::Process))),
            }
        }
    }
}

fn lost(gfn: Gfn, loss: Loss) -> Failure {
    match loss {
        Loss::Process => Failure::LostWithProcess(gfn),
        Loss::Swap => Failure::LostInSwap(gfn),
    }
}

/// What the family has in swap goes with it.
impl<S: StoreFactory, W> Drop for Manager<S, W> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Books that may not be in order give nothing back.
            return;
        }
        let slots: Vec<(SwapSlot, PageCount)> = self.family.swap_slots().chain(self.unneeded.drain(..)).collect();
        slots.into_iter().for_each(|(first, count)| self.factory.swap().free(first, count));
    }
}

impl<S: StoreFactory, W> fmt::Debug for Manager<S, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Manager({} windows, {} stores)", self.windows.len(), self.stores.len())
    }
}
