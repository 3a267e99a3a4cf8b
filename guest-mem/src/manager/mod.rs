//! One family's memory manager: the books, and the hands that carry out what they say.

mod check;
mod effects;
mod error;
mod fault;
mod map;
mod readahead;
mod reclaim;
mod waiters;
mod writeback;

pub use error::Error;
use readahead::Readahead;
pub use reclaim::{Evicted, SwapCounts};
use waiters::{Reason, Waiters};

use crate::addr::{Gfn, GfnRange, PageCount, PageRange};
use crate::effect::Effects;
use crate::family::{Family, ObjectMapping};
use crate::ids::{StoreId, SwapSlot, VmId};
use crate::object::ZERO_CLUSTER;
use crate::ops::{Compaction, Destination};
use crate::space::map::Protection;
use crate::space::runs::Runs;
use crate::stage2::Shape;
use crate::store::{Store, StoreFactory};
use crate::swap::Fetch;
use crate::window::{Along, Harvest, Window};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::rc::Rc;

/// Most pages written back at a time: few enough that whoever owns the manager soon gets to a waiting trap.
pub const WRITEBACK_BATCH: PageCount = PageCount(64);
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
/// the last of its moved-out pages that others see has been written back. A call about a VM that is gone, or was never of this
/// family, is [an error](Error::NoSuchVm) and changes nothing.
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
    hidden: BTreeMap<StoreId, Vec<PageRange>>,
    /// Pages of a scratch range that have been written back, and whose memory has not been given back.
    left: HashMap<StoreId, PageRange>,
    swap_counts: SwapCounts,
    /// Slots of swap that nobody needs any more, and that have not been given back.
    unneeded: Vec<(SwapSlot, PageCount)>,
    /// Stores whose pages are being listed, and which of them have come or gone meanwhile.
    watched: HashMap<StoreId, Vec<PageRange>>,
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
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn takes_along(&mut self, vm: VmId) -> Result<Along, Error> {
        let copies = self.mends(vm)?;
        let moves = match copies.is_empty() && self.zero_run < u64::MAX {
            true => self.family.compact(vm, self.compaction),
            false => Vec::new(),
        };
        Ok(Along { copies, moves })
    }

    /// Pages of `vm` that are lost to its children, and that its window has a copy of. What a copy of its process had is lost
    /// with it, whether anybody has asked for it or not.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn mends(&mut self, vm: VmId) -> Result<Vec<GfnRange>, Error> {
        self.find(vm)?;
        self.find_lost(vm);
        Ok(self.family.to_mend(vm))
    }

    /// Nothing else is to be done: gets ready for the next freeze.
    pub fn stock_up(&mut self) {
        self.factory.stock_up(self.span);
    }

    /// The VM that is being frozen stands still. Whoever holds its window says so before it moves the first page, and
    /// whoever owns the manager hears it before any trap that comes afterwards: what is zero in the books may have been
    /// written and moved out, and must not be supplied any more.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    ///
    /// # Panics
    /// If no freeze of it is under way.
    pub fn stands(&mut self, vm: VmId) -> Result<(), Error> {
        self.find(vm)?;
        self.family.stands(vm);
        Ok(())
    }

    /// The window could not freeze, and has changed nothing.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    ///
    /// # Panics
    /// If no freeze of it is under way.
    pub fn abort_freeze(&mut self, vm: VmId) -> Result<(), Error> {
        self.find(vm)?;
        let mut effects = Effects::default();
        self.family.abort_freeze(vm, &mut effects);
        self.carry_out(effects);
        self.wake_frozen(vm);
        Ok(())
    }

    /// Second half of a freeze: the window has moved pages out.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    ///
    /// # Panics
    /// If no freeze of it is under way.
    pub fn finish_freeze(&mut self, vm: VmId, harvest: &Harvest) -> Result<(), Error> {
        self.find(vm)?;
        let mut effects = Effects::default();
        // Without traps a hole in a store would be filled by whoever reads it.
        let bridge = if self.zero_run == u64::MAX { PageCount(0) } else { ZERO_CLUSTER };
        self.family.finish_freeze(vm, harvest, bridge, &mut effects);
        self.carry_out_in_time(effects);
        self.wake_frozen(vm);
        Ok(())
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
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn fork(&mut self, parent: VmId, window: W) -> Result<VmId, Error> {
        self.find(parent)?;
        let child = self.family.fork(parent, self.max_runs);
        self.windows.insert(child, window);
        Ok(child)
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
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn runs_of_child(&mut self, parent: VmId) -> Result<Runs, Error> {
        self.find(parent)?;
        Ok(self.family.runs_of_child(parent, self.max_runs))
    }

    /// `vm` has given pages back: its window shows nothing there any more, as anonymous memory does, and this is told
    /// before anything that its window did later. Frames outside of its memory do not count.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    ///
    /// # Panics
    /// If the VM [stands](crate::family::VmBooks::stands) for a freeze.
    pub fn balloon(&mut self, vm: VmId, pages: &[GfnRange]) -> Result<(), Error> {
        self.find(vm)?;
        let mut effects = Effects::default();
        self.family.balloon(vm, pages, &mut effects);
        self.carry_out_in_time(effects);
        // Who waited for one of them to come back from swap finds it zero.
        for &pages in pages.iter().filter(|&&pages| self.waiters.take(vm, pages)) {
            if let Some(window) = self.windows.get_mut(&vm) {
                window.wake(pages);
            }
        }
        Ok(())
    }

    /// Pages that the window of `vm` keeps from a freeze into `store`, and could [give up](Self::dedup): see
    /// [`Family::to_dedup`].
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn to_dedup(
        &self,
        vm: VmId,
        store: StoreId,
        least: PageCount,
        limit: PageCount,
    ) -> Result<Vec<GfnRange>, Error> {
        self.find(vm)?;
        Ok(self.family.to_dedup(vm, store, least, limit, self.max_runs))
    }

    /// The window of `vm` keeps these pages no longer, and maps `store` there; this is told before anything that its
    /// window did later.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn dedup(&mut self, vm: VmId, store: StoreId, pages: &[GfnRange]) -> Result<(), Error> {
        self.find(vm)?;
        let mut effects = Effects::default();
        self.family.dedup(vm, store, pages, &mut effects);
        self.carry_out(effects);
        Ok(())
    }

    /// Takes a VM out.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn exit(&mut self, vm: VmId) -> Result<(), Error> {
        self.find(vm)?;
        let mut effects = Effects::default();
        self.family.exit(vm, &mut effects);
        self.waiters.forget(vm);
        self.ahead.streams.forget(vm);
        self.carry_out_in_time(effects);
        Ok(())
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
}

impl<S: StoreFactory, W> fmt::Debug for Manager<S, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Manager({} windows, {} stores)", self.windows.len(), self.stores.len())
    }
}
