//! A family in this process: the manager, memfd stores and host windows put together.
//!
//! For tests, benchmarks, and VMMs that keep several VMs in one process. Who runs vCPUs on these windows stops them
//! around [`Local::fork`], and has some thread call [`Local::serve_traps`] when a window's
//! [trap descriptor](Local::trap_descriptor) is readable, or settles everything first.

use crate::addr::{GfnRange, PageCount};
use crate::family::VmId;
use crate::manager::{self, Evicted, MAX_RUNS, Manager, SETTLE_BATCH};
use crate::map::Protection;
use crate::ops::Destination;
use crate::stage2::Shape;
use crate::store::memfd::MemfdStores;
use crate::store::swap::SharedSwap;
use crate::sys::Userfaultfd;
use crate::sys::Written;
use crate::window::host::{Dirty, Features, HostWindow, HugePages, Place, Short, WindowError};
use crate::window::{Run, Source, StoreId, Window};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host has no userfaultfd for us.
    #[error("userfaultfd: {0}")]
    Userfaultfd(io::Error),
    /// Of a window.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// Of the manager.
    #[error(transparent)]
    Manager(#[from] manager::Error),
}

/// VMs that descend from one launch, their windows in this process.
///
/// ```
/// use guest_mem::local::Local;
/// use guest_mem::{Gfn, GfnRange, PageCount};
/// use vm_memory::{Bytes, GuestAddress};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut family = Local::new(vec![GfnRange::new(Gfn(0), PageCount(1024))])?;
/// let parent = family.launch()?;
/// family.memory(parent).write_obj(1u64, GuestAddress(0x5000))?;
///
/// let child = family.fork(parent)?;
/// family.settle()?;
/// family.memory(parent).write_obj(2u64, GuestAddress(0x5000))?;
/// assert_eq!(family.memory(child).read_obj::<u64>(GuestAddress(0x5000))?, 1);
///
/// // A fork of the fork sees what its parent saw, and nothing of its aunt.
/// let grandchild = family.fork(child)?;
/// family.exit(child);
/// assert_eq!(family.memory(grandchild).read_obj::<u64>(GuestAddress(0x5000))?, 1);
/// family.manager().family().check_invariants().unwrap();
/// # Ok(())
/// # }
/// ```
pub struct Local {
    manager: Manager<MemfdStores, HostWindow>,
    ram: Vec<GfnRange>,
    features: Features,
    /// Duplicates of the windows' trap descriptors: windows are mapped from one side and served from the other.
    traps: BTreeMap<VmId, Userfaultfd>,
}

impl Local {
    /// A family whose VMs all have this memory. Nothing of it is evicted.
    ///
    /// # Errors
    /// The host has no userfaultfd for us.
    pub fn new(ram: Vec<GfnRange>) -> Result<Self, Error> {
        Self::with_swap(ram, SharedSwap::default())
    }

    /// The same, whose frozen pages can be evicted to `swap`.
    ///
    /// # Errors
    /// The host has no userfaultfd for us.
    pub fn with_swap(ram: Vec<GfnRange>, swap: SharedSwap) -> Result<Self, Error> {
        let span = PageCount(ram.last().map_or(0, |range| range.end().0));
        let fills = Arc::new(Userfaultfd::new().map_err(Error::Userfaultfd)?);
        let manager = Manager::new(Shape::X86_64, span, MemfdStores::new(Some(fills)).with_swap(swap));
        let features = Features { userfaultfd: true, pagemap_scan: true };
        Ok(Self { manager, ram, features, traps: BTreeMap::new() })
    }

    /// A VM whose memory is zero.
    ///
    /// # Errors
    /// The window could not be made; there is no such VM.
    pub fn launch(&mut self) -> Result<VmId, Error> {
        let window = HostWindow::reserve(&self.ram, Place::Anywhere, self.features)?;
        let vm = self.manager.launch(&self.ram, &[], window);
        self.open(vm, HugePages::Advised)
    }

    /// A child of `parent`, whose memory nobody writes meanwhile. Pages settle afterwards.
    ///
    /// # Errors
    /// There is no child, and the parent is as it was.
    pub fn fork(&mut self, parent: VmId) -> Result<VmId, Error> {
        let store = self.manager.begin_freeze(parent, Destination::Store)?;
        match self.freeze(parent, store) {
            Ok(harvest) => self.manager.finish_freeze(parent, &harvest),
            Err(error) => {
                self.manager.abort_freeze(parent);
                return Err(error.into());
            }
        }
        let window = HostWindow::reserve(&self.ram, Place::Anywhere, self.features)?;
        let child = self.manager.fork(parent, window);
        let child = self.open(child, HugePages::Never)?;
        // Whoever touches them has nobody to answer once all has settled.
        let zeros: Vec<GfnRange> =
            self.ram.iter().flat_map(|&ram| self.manager.family().trapping_zeros(child, ram)).collect();
        let window = self.manager.window_mut(child).expect("a VM has a window");
        zeros.into_iter().for_each(|pages| window.zero(pages));
        Ok(child)
    }

    fn freeze(&mut self, vm: VmId, store: StoreId) -> Result<crate::Harvest, WindowError> {
        let file = self.manager.store(store).expect("just made").read_only();
        let file = file.try_clone_to_owned().map_err(WindowError::NoScratch)?;
        let window = self.manager.window_mut(vm).expect("a VM has a window");
        Ok(window.freeze(Dirty::Every, store, file.as_fd(), MAX_RUNS as u32, Short::Copied)?.harvest)
    }

    /// Maps a new VM's window.
    fn open(&mut self, vm: VmId, huge: HugePages) -> Result<VmId, Error> {
        let opened = self.map(vm, huge);
        if opened.is_err() {
            self.exit(vm);
        }
        opened.map(|()| vm)
    }

    fn map(&mut self, vm: VmId, huge: HugePages) -> Result<(), Error> {
        let runs: Vec<Run> = self.manager.family().vm(vm).runs().collect();
        let mut files = BTreeMap::new();
        for run in &runs {
            if let Source::Store { store, .. } = run.source {
                let file = self.manager.store(store).expect("a run's store").read_only();
                files.insert(store, file.try_clone_to_owned().map_err(WindowError::NoScratch)?);
            }
        }
        let stores: Vec<(StoreId, BorrowedFd<'_>)> = files.iter().map(|(&id, file)| (id, file.as_fd())).collect();
        let read_only: Vec<GfnRange> = self.manager.family().vm(vm).map().protected(Protection::ReadOnly).collect();
        let window = self.manager.window_mut(vm).expect("a VM has a window");
        let protect = |&pages: &GfnRange| window.protect(pages, Protection::ReadOnly);
        read_only.iter().try_for_each(protect).map_err(WindowError::NoScratch)?;
        window.map(&runs, &stores, huge)?;
        if let Some(traps) = window.userfaultfd() {
            let traps = traps.try_clone_to_owned().map_err(Error::Userfaultfd)?;
            self.traps.insert(vm, Userfaultfd::from_fd(traps));
        }
        Ok(())
    }

    /// A VM's memory, by `vm-memory`'s traits: `GuestMemoryBackend` for loaders, and through it `GuestMemory` for
    /// virtio queues.
    ///
    /// # Panics
    /// If the VM is gone.
    pub fn memory(&self, vm: VmId) -> &GuestMemoryMmap<Written> {
        self.manager.window(vm).expect("a VM of this family").memory()
    }

    /// Settles all pages there are to settle.
    ///
    /// # Errors
    /// The host has no memory for them; they wait on.
    pub fn settle(&mut self) -> Result<(), Error> {
        while self.manager.settle(SETTLE_BATCH)? {}
        Ok(())
    }

    /// Evicts about `limit` frozen pages, the oldest first.
    pub fn evict_some(&mut self, limit: PageCount) -> Evicted {
        self.manager.evict_some(limit)
    }

    /// Reads from swap have ended: serves who waits for them.
    ///
    /// # Errors
    /// A page could not be filled in; its thread waits on.
    pub fn retry(&mut self) -> Result<(), Error> {
        Ok(self.manager.retry()?)
    }

    /// Readable when a thread waits for a page of this VM.
    pub fn trap_descriptor(&self, vm: VmId) -> Option<BorrowedFd<'_>> {
        self.traps.get(&vm).map(AsFd::as_fd)
    }

    /// Serves all traps that wait. How many there were.
    ///
    /// # Errors
    /// A page could not be filled in; its thread waits on.
    pub fn serve_traps(&mut self) -> Result<usize, Error> {
        let mut served = 0;
        for (&vm, source) in &self.traps {
            let mut traps = Vec::new();
            source.read(&mut traps, usize::MAX).map_err(Error::Userfaultfd)?;
            let base = self.manager.window(vm).map_or(0, HostWindow::base);
            for trap in traps {
                self.manager.trap(vm, crate::Gfn::of_gpa(trap.address - base), trap.touch)?;
                served += 1;
            }
        }
        Ok(served)
    }

    /// Gives back pages that nobody uses in `vm`: they read zero, and what only it saw is freed. Returns those that were
    /// given back: each stretch takes a mapping, and where they are short, the shortest stay as they are.
    pub fn balloon(&mut self, vm: VmId, pages: &[GfnRange]) -> Vec<GfnRange> {
        let window = self.manager.window_mut(vm).expect("a VM has a window");
        let given = window.balloon(pages, MAX_RUNS);
        self.manager.balloon(vm, &given);
        given
    }

    /// From now on a thread that writes these pages of `vm` gets `SIGSEGV`, or may write them again: see
    /// [`Manager::protect`].
    ///
    /// # Errors
    /// The window could not be protected; nothing has changed.
    pub fn protect(&mut self, vm: VmId, pages: GfnRange, protection: Protection) -> Result<(), Error> {
        Ok(self.manager.protect(vm, pages, protection)?)
    }

    /// Takes a VM out. Its window goes as soon as nobody waits for its pages.
    pub fn exit(&mut self, vm: VmId) {
        self.traps.remove(&vm);
        self.manager.exit(vm);
    }

    /// The manager, to look at.
    pub fn manager(&self) -> &Manager<MemfdStores, HostWindow> {
        &self.manager
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gfn;
    use crate::swap::{Fetch, Swap, SwapSlot};
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::cell::RefCell;
    use std::rc::Rc;
    use vm_memory::{Bytes, GuestAddress};

    fn family(pages: u64) -> Local {
        Local::new(vec![GfnRange::new(Gfn(0), PageCount(pages))]).expect("these tests need userfaultfd")
    }

    fn at(page: u64) -> GuestAddress {
        GuestAddress(page * 4096)
    }

    /// A child reads pages that have not settled while another thread serves its traps.
    #[test]
    fn a_page_is_there_when_it_is_needed() {
        let mut family = family(4096);
        let parent = family.launch().unwrap();
        for page in 0..2048u64 {
            family.memory(parent).write_obj(page + 1, at(page)).unwrap();
        }
        let child = family.fork(parent).unwrap();
        let memory = family.memory(child).clone();
        let reader = std::thread::spawn(move || {
            (0..4096u64).rev().map(|page| memory.read_obj::<u64>(at(page)).unwrap()).collect::<Vec<_>>()
        });
        let mut served = 0;
        while !reader.is_finished() {
            let descriptor = family.trap_descriptor(child).unwrap();
            let mut wait = [PollFd::new(descriptor, PollFlags::POLLIN)];
            poll(&mut wait, PollTimeout::from(10u8)).unwrap();
            served += family.serve_traps().unwrap();
            family.manager().family().check_invariants().unwrap();
        }
        let read = reader.join().unwrap();
        assert!(read.iter().rev().take(2048).copied().eq(1..=2048) && read[..2048].iter().all(|&word| word == 0));
        assert!((1..=2048 / 16).contains(&served), "{served} traps for 128 clusters");
    }

    /// All members of a family give the same pages back: the store has room again, and nobody sees them.
    #[test]
    fn pages_that_are_given_back_are_freed() {
        let mut family = family(1024);
        let parent = family.launch().unwrap();
        (0..512).for_each(|page| family.memory(parent).write_obj(page + 1, at(page)).unwrap());
        let mut vms = vec![parent];
        vms.extend((0..3).map(|_| family.fork(parent).unwrap()));
        family.settle().unwrap();
        let pages = GfnRange::new(Gfn(100), PageCount(200));
        for &vm in &vms {
            assert_eq!(family.manager().family().totals().resident, 512);
            assert_eq!(family.balloon(vm, &[pages]), [pages]);
            family.manager().family().check_invariants().unwrap();
        }
        assert_eq!(family.manager().family().totals().resident, 312);
        let mut broken = Vec::new();
        family.manager().check_stores(&mut broken);
        assert_eq!(broken, Vec::<String>::new());
        let child = family.fork(vms[2]).unwrap();
        for vm in vms.into_iter().chain([child]) {
            let words = [99, 100, 299, 300].map(|page| family.memory(vm).read_obj::<u64>(at(page)).unwrap());
            assert_eq!(words, [100, 0, 0, 301]);
        }
    }

    /// Pages in a vector, each read at the second time of asking.
    #[derive(Default)]
    struct VecSwap {
        pages: Vec<u8>,
        asked: bool,
        freed: u64,
    }

    impl Swap for VecSwap {
        fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot> {
            let first = SwapSlot((self.pages.len() / 4096) as u64);
            self.pages.extend_from_slice(pages);
            Ok(first)
        }

        fn get(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
            self.asked = !self.asked;
            if self.asked {
                return Ok(Fetch::Coming);
            }
            let at = first.0 as usize * 4096;
            buf.copy_from_slice(&self.pages[at..at + buf.len()]);
            Ok(Fetch::Here)
        }

        fn free(&mut self, _: SwapSlot, count: PageCount) {
            self.freed += count.0;
        }
    }

    /// Parent and child read what was evicted under their eyes, twice; what they have written themselves stays.
    #[test]
    fn evicted_pages_come_back_through_real_windows() {
        let swap = Rc::new(RefCell::new(VecSwap::default()));
        let ram = vec![GfnRange::new(Gfn(0), PageCount(512))];
        let mut family = Local::with_swap(ram, SharedSwap::new(Rc::clone(&swap))).expect("this test needs userfaultfd");
        let parent = family.launch().unwrap();
        (0..512).for_each(|page| family.memory(parent).write_obj(page + 1, at(page)).unwrap());
        let child = family.fork(parent).unwrap();
        family.settle().unwrap();
        (0..512).step_by(16).for_each(|page| family.memory(child).write_obj(0u64, at(page)).unwrap());
        for round in 0..2 {
            let evicted = family.evict_some(PageCount(512));
            assert_eq!((evicted.pages, evicted.stopped.is_none()), (PageCount(512), true));
            assert_eq!(family.manager().family().totals().resident, 0);
            for vm in [child, parent] {
                let memory = family.memory(vm).clone();
                let read = move || (0..512).map(|page| memory.read_obj::<u64>(at(page)).unwrap()).collect::<Vec<_>>();
                let reader = std::thread::spawn(read);
                while !reader.is_finished() {
                    let mut wait = [PollFd::new(family.trap_descriptor(vm).unwrap(), PollFlags::POLLIN)];
                    poll(&mut wait, PollTimeout::from(10u8)).unwrap();
                    family.serve_traps().unwrap();
                    family.retry().unwrap();
                }
                for (page, read) in (0..).zip(reader.join().unwrap()) {
                    assert_eq!(read, if vm == child && page % 16 == 0 { 0 } else { page + 1 }, "round {round}");
                }
            }
            let mut broken = Vec::new();
            family.manager().check_stores(&mut broken);
            assert_eq!(broken, Vec::<String>::new());
            family.manager().family().check_invariants().unwrap();
        }
        let counts = family.manager().counts();
        assert_eq!((counts.swap_out_pages, counts.swap_in_pages, counts.clean_evictions), (512, 1024, 512));
        family.exit(parent);
        family.exit(child);
        assert_eq!((swap.borrow().freed, family.manager().windows()), (512, 0));
    }

    /// Generations of forks, each writing one page, each reading all of its ancestors'; the books and the real mappings
    /// agree, and the end leaves nothing.
    #[test]
    fn generations() {
        let mut family = family(1024);
        let mut vms = vec![family.launch().unwrap()];
        for generation in 0..16u64 {
            let vm = *vms.last().unwrap();
            family.memory(vm).write_obj(generation + 1, at(generation * 3)).unwrap();
            vms.push(family.fork(vm).unwrap());
            if generation % 3 == 0 {
                family.settle().unwrap();
            }
        }
        family.settle().unwrap();
        for (age, &vm) in vms.iter().enumerate() {
            for generation in 0..16u64 {
                let want = if age as u64 >= generation { generation + 1 } else { 0 };
                assert_eq!(family.memory(vm).read_obj::<u64>(at(generation * 3)).unwrap(), want);
            }
        }
        let mut broken = Vec::new();
        family.manager().check_stores(&mut broken);
        assert_eq!(broken, Vec::<String>::new());
        for vm in vms {
            family.exit(vm);
            family.manager().family().check_invariants().unwrap();
        }
        let totals = family.manager().family().totals();
        assert_eq!((totals.objects, totals.stores, totals.tables, family.manager().windows()), (0, 0, 0, 0));
    }
}
