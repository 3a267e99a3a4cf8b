//! The thread that owns a family.

use super::{Error, Event, LocalSwap, LocalVm, Observer, Options};
use crate::addr::{Gfn, GfnRange, PageCount};
use crate::ids::{Run, StoreId, VmId};
use crate::manager::{Evicted, MAX_RUNS, Manager, WRITEBACK_BATCH};
use crate::ops::Destination;
use crate::space::map::{Protection, Sharing};
use crate::stage2::Shape;
use crate::store::memfd::{MemfdStore, MemfdStores};
use crate::swap::Swap;
use crate::swap::handle::SharedSwap;
use crate::sys::{Touch, Userfaultfd};
use crate::window::host::{Asked, Dirty, Features, HostWindow, HugePages, Place, SmallExtents, WindowError};
use crate::window::{Failure, Harvest, Window, are_apart};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// What the thread is asked to do.
pub(super) type OwnerRequest = Box<dyn FnOnce(&mut FamilyThread) + Send>;

/// Whether the thread goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Round {
    /// With the next round at once.
    More,
    /// When something happens.
    Idle,
    /// Nobody asks any more.
    Last,
}

/// Frames that a VM's memory may have: what a leaf of stage-2 can name (64 TiB).
const MOST: u64 = 1 << 34;
/// Traps read at a time.
const TRAPS: usize = 32;
/// So long (in ms) until what could not be done is tried again. Of reads from a swap that others share they may hear alone.
const AGAIN: i32 = 10;
/// Events of the loop that are no VM's.
const BELL: u64 = u64::MAX;
const SWAP: u64 = u64::MAX - 1;

/// Why the manager cannot say that there is no such VM.
const MEMBER: &str = "the manager knows all members";

/// A VM of the family.
struct LocalMember {
    /// A duplicate of its window's descriptor: windows are mapped from one side and served from the other.
    traps: Userfaultfd,
    /// Host address of its guest frame 0.
    base: u64,
    failure: Option<Failure>,
}

/// Everything that a family has.
pub(super) struct FamilyThread {
    family: u64,
    manager: Manager<MemfdStores, HostWindow>,
    ram: Vec<GfnRange>,
    /// What launched VMs share with those that descend from them.
    shared: Vec<GfnRange>,
    members: BTreeMap<VmId, LocalMember>,
    swap: Option<LocalSwap>,
    observer: Option<Observer>,
    epoll: Epoll,
    requests: Receiver<OwnerRequest>,
    bell: Arc<EventFd>,
    /// Who waits until all pages have been written back.
    written_back: Vec<Sender<Result<(), Error>>>,
}

impl FamilyThread {
    pub fn new(
        family: u64,
        ram: Vec<GfnRange>,
        options: Options,
        requests: Receiver<OwnerRequest>,
        bell: Arc<EventFd>,
    ) -> Result<Self, Error> {
        let bounds = [GfnRange::from(0..MOST)];
        let Some(last) = ram.last().filter(|_| are_apart(&ram, &bounds)) else { return Err(Error::BadMemory(ram)) };
        if !are_apart(&options.shared, &ram) {
            return Err(Error::BadMemory(options.shared));
        }
        let span = PageCount(last.end().0);
        let mut stores = MemfdStores::new(Some(Arc::new(Userfaultfd::new().map_err(Error::Begin)?)));
        if let Some(swap) = &options.swap {
            stores = stores.with_swap(SharedSwap::new(Rc::new(RefCell::new(Arc::clone(swap)))));
        }
        let epoll = Epoll::new().map_err(Error::Begin)?;
        let Options { swap, observer, shared } = options;
        let completions = swap.as_ref().and_then(|swap| swap.completions());
        let owner = Self {
            family,
            manager: Manager::new(Shape::X86_64, span, stores),
            ram,
            shared,
            members: BTreeMap::new(),
            swap,
            observer,
            epoll,
            requests,
            bell,
            written_back: Vec::new(),
        };
        owner.watch(owner.bell.as_raw_fd(), BELL).map_err(Error::Begin)?;
        if let Some(completions) = completions {
            owner.watch(completions.as_raw_fd(), SWAP).map_err(Error::Begin)?;
        }
        Ok(owner)
    }

    fn watch(&self, fd: RawFd, data: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data))
    }

    pub fn manager(&self) -> &Manager<MemfdStores, HostWindow> {
        &self.manager
    }

    /// Until nobody asks any more.
    pub fn run(mut self) {
        let mut round = Round::Idle;
        while round != Round::Last {
            let timeout = match round {
                Round::More => 0,
                _ if self.awaits_something() => AGAIN,
                _ => -1,
            };
            round = self.round(timeout);
        }
    }

    /// Does what is to be done now, traps first, and some of what can wait.
    fn round(&mut self, timeout: i32) -> Round {
        let mut events = [EpollEvent::default(); TRAPS];
        // A signal is no event.
        let count = self.epoll.wait(timeout, &mut events).unwrap_or(0);
        let events = events[..count].iter().map(EpollEvent::data);
        events.clone().filter(|&data| data < SWAP).for_each(|vm| self.serve(VmId(vm as u32)));
        if timeout > 0 || events.clone().any(|data| data == SWAP) {
            self.try_again();
        }
        if events.clone().any(|data| data == BELL) {
            let _ = self.bell.read();
            match self.requests.try_recv() {
                Ok(request) => request(self),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Round::Last,
            }
        }
        self.write_back()
    }

    /// Whether something is to be tried again, or is read from swap.
    fn awaits_something(&self) -> bool {
        self.manager.waiting_for_pages().next().is_some() || self.manager.family().in_flight() > PageCount(0)
    }

    /// Writes a batch of frozen pages back.
    fn write_back(&mut self) -> Round {
        match self.manager.write_back(WRITEBACK_BATCH) {
            Ok(true) => return Round::More,
            Ok(false) if self.manager.family().in_flight() == PageCount(0) => {
                self.written_back.drain(..).for_each(|written_back| drop(written_back.send(Ok(()))));
            }
            Ok(false) => {}
            Err(cause) => match self.written_back.pop() {
                Some(written_back) => drop(written_back.send(Err(Error::Memory { operation: "write back", cause }))),
                None => log::warn!("write back: {cause}"),
            },
        }
        Round::Idle
    }

    /// Answers the traps of a VM.
    pub fn serve(&mut self, vm: VmId) {
        let Some(member) = self.members.get(&vm) else { return };
        let (mut traps, base) = (Vec::new(), member.base);
        if let Err(error) = member.traps.read(&mut traps, TRAPS) {
            log::error!("read the traps of {vm:?}: {error}");
        }
        traps.into_iter().for_each(|trap| self.answer(vm, Gfn::of_gpa(trap.address - base), trap.touch));
    }

    /// Answers a trap, now or later.
    fn answer(&mut self, vm: VmId, gfn: Gfn, touch: Touch) {
        if let Err(error) = self.manager.fault(vm, gfn, touch) {
            log::warn!("the page at {gfn} for {vm:?}: {error}");
            self.tell(vm, Event::Delayed(&error));
        }
        self.see_failures(vm);
    }

    /// Takes in what was read from swap, and answers the traps that waited for that or for something else.
    pub fn try_again(&mut self) {
        if let Some(swap) = &mut self.swap {
            swap.collect();
        }
        let waiting: BTreeSet<VmId> = self.manager.waiting_for_pages().map(|(vm, _)| vm).collect();
        if let Err(error) = self.manager.retry() {
            log::warn!("pages from swap: {error}");
        }
        waiting.into_iter().for_each(|vm| self.see_failures(vm));
    }

    /// A page that is lost is told first, then becomes zero, so that who waits for it can be stopped.
    fn see_failures(&mut self, vm: VmId) {
        let Some(window) = self.manager.window_mut(vm) else { return };
        for failure in window.take_failures() {
            self.fail(vm, failure);
            if let (Some(gfn), Some(window)) = (failure.page(), self.manager.window_mut(vm)) {
                window.zero(GfnRange::new(gfn, PageCount(1)));
            }
        }
    }

    fn fail(&mut self, vm: VmId, failure: Failure) {
        if let Some(member) = self.members.get_mut(&vm) {
            member.failure.get_or_insert(failure);
            self.tell(vm, Event::Failed(failure));
        }
    }

    fn tell(&mut self, id: VmId, event: Event<'_>) {
        if let Some(observer) = &mut self.observer {
            observer(LocalVm { family: self.family, id }, event);
        }
    }

    /// The member that `vm` names.
    fn find(&self, operation: &'static str, vm: LocalVm) -> Result<&LocalMember, Error> {
        let member = self.members.get(&vm.id).filter(|_| vm.family == self.family);
        member.ok_or(Error::NoSuchVm { operation, vm })
    }

    /// The same, if it has all of its memory.
    fn find_whole(&self, operation: &'static str, vm: LocalVm) -> Result<VmId, Error> {
        match self.find(operation, vm)?.failure {
            Some(failure) => Err(Error::Failed { operation, vm, failure }),
            None => Ok(vm.id),
        }
    }

    pub fn launch(&mut self) -> Result<LocalVm, Error> {
        let window = self.reserve("launch")?;
        let vm = self.manager.launch(&self.ram, &[], &self.shared, window);
        let vm = vm.map_err(|cause| Error::Memory { operation: "launch", cause })?;
        self.open("launch", vm, HugePages::Advised)
    }

    pub fn fork(&mut self, parent: LocalVm) -> Result<LocalVm, Error> {
        let vm = self.find_whole("fork", parent)?;
        let in_window = |cause| Error::Window { operation: "fork", cause };
        let store = self.manager.begin_freeze(vm, Destination::Store);
        let store = store.map_err(|cause| Error::Memory { operation: "fork", cause })?;
        match self.freeze(vm, store) {
            Ok(harvest) => self.manager.finish_freeze(vm, &harvest).expect(MEMBER),
            Err(cause) => {
                self.manager.abort_freeze(vm).expect(MEMBER);
                self.see_torn(vm, &cause);
                return Err(in_window(cause));
            }
        }
        let window = self.reserve("fork")?;
        let child = self.manager.fork(vm, window).expect(MEMBER);
        self.open("fork", child, HugePages::Never)
    }

    fn reserve(&self, operation: &'static str) -> Result<HostWindow, Error> {
        let features = Features { userfaultfd: true, pagemap_scan: true };
        let window = HostWindow::reserve(&self.ram, Place::Anywhere, features);
        window.map_err(|cause| Error::Window { operation, cause })
    }

    fn freeze(&mut self, vm: VmId, store: StoreId) -> Result<Harvest, WindowError> {
        let along = self.manager.takes_along(vm).expect(MEMBER);
        let file = self.manager.store(store).expect("just made").read_only();
        let file = file.try_clone_to_owned().map_err(WindowError::NoScratch)?;
        let window = self.manager.window_mut(vm).expect("a VM has a window");
        let asked = Asked { max_runs: MAX_RUNS as u32, short: SmallExtents::CopyInPlace, along: &along };
        Ok(window.freeze(Dirty::Every, store, file.as_fd(), asked)?.harvest)
    }

    /// Maps a new VM's window.
    fn open(&mut self, operation: &'static str, vm: VmId, huge: HugePages) -> Result<LocalVm, Error> {
        match self.map(vm, huge) {
            Ok(member) => {
                self.members.insert(vm, member);
                Ok(LocalVm { family: self.family, id: vm })
            }
            Err(cause) => {
                self.manager.exit(vm).expect(MEMBER);
                Err(Error::Window { operation, cause })
            }
        }
    }

    fn map(&mut self, vm: VmId, huge: HugePages) -> Result<LocalMember, WindowError> {
        let runs = self.manager.family().runs(vm).clone();
        let mut files = BTreeMap::new();
        for run in runs.iter() {
            if let Some((store, _)) = run.source.store() {
                let file = self.manager.store(store).expect("a run's store").for_windows();
                files.insert(store, file.try_clone_to_owned().map_err(WindowError::NoScratch)?);
            }
        }
        let stores: Vec<(StoreId, BorrowedFd<'_>)> = files.iter().map(|(&id, file)| (id, file.as_fd())).collect();
        let read_only: Vec<GfnRange> = self.manager.family().vm(vm).map().protected(Protection::ReadOnly).collect();
        let window = self.manager.window_mut(vm).expect("a VM has a window");
        let protect = |&pages: &GfnRange| window.protect(pages, Protection::ReadOnly);
        read_only.iter().try_for_each(protect).map_err(WindowError::NoScratch)?;
        window.map(&runs, &stores, huge)?;
        let traps = window.userfaultfd().expect("asked for").try_clone_to_owned().map_err(WindowError::NoScratch)?;
        let member = LocalMember { traps: Userfaultfd::from_fd(traps), base: window.base(), failure: None };
        self.watch(member.traps.as_raw_fd(), vm.0.into()).map_err(WindowError::NoScratch)?;
        Ok(member)
    }

    pub fn memory(&self, vm: LocalVm) -> Result<GuestMemoryMmap, Error> {
        self.find("memory of", vm)?;
        Ok(self.manager.window(vm.id).expect("a VM has a window").plain_memory().clone())
    }

    pub fn failure(&self, vm: LocalVm) -> Result<Option<Failure>, Error> {
        Ok(self.find("failure of", vm)?.failure)
    }

    /// Tells when all pages have been written back, or why some have not.
    pub fn tell_written_back(&mut self, written_back: Sender<Result<(), Error>>) {
        self.written_back.push(written_back);
    }

    pub fn evict_some(&mut self, limit: PageCount) -> Evicted {
        self.manager.evict_some(limit)
    }

    pub fn balloon(&mut self, vm: LocalVm, pages: &[GfnRange]) -> Result<Vec<GfnRange>, Error> {
        let vm = self.find_whole("balloon", vm)?;
        let window = self.manager.window_mut(vm).expect("a VM has a window");
        let given = window.balloon(pages, MAX_RUNS);
        self.manager.balloon(vm, &given).expect(MEMBER);
        Ok(given)
    }

    pub fn protect(&mut self, vm: LocalVm, pages: GfnRange, protection: Protection) -> Result<(), Error> {
        let vm = self.find_whole("protect", vm)?;
        let protected = self.manager.protect(vm, pages, protection);
        protected.map_err(|cause| Error::Memory { operation: "protect", cause })
    }

    pub fn map_pages(&mut self, vm: LocalVm, pages: GfnRange, sharing: Sharing) -> Result<(), Error> {
        let vm = self.find_whole("map", vm)?;
        let show = |window: &mut HostWindow, run: Run, store: Option<&MemfdStore>| {
            let store = run.source.store().map(|(id, _)| id).zip(store.map(MemfdStore::for_windows));
            let mapped = window.map(&[run], store.as_slice(), HugePages::Never);
            // What was half mapped is not there.
            mapped.inspect_err(|_| drop(window.unmap(pages))).map_err(io::Error::other)
        };
        self.manager.map(vm, pages, sharing, show).map_err(|cause| Error::Memory { operation: "map", cause })
    }

    pub fn unmap_pages(&mut self, vm: LocalVm, pages: GfnRange) -> Result<(), Error> {
        let vm = self.find_whole("unmap", vm)?;
        let hide = |window: &mut HostWindow| window.unmap(pages).map_err(io::Error::other);
        self.manager.unmap(vm, pages, hide).map_err(|cause| Error::Memory { operation: "unmap", cause })
    }

    pub fn move_pages(&mut self, vm: LocalVm, from: GfnRange, to: Gfn) -> Result<(), Error> {
        let vm = self.find_whole("move", vm)?;
        let mut torn = None;
        let carry = |window: &mut HostWindow| {
            let carried = window.move_pages(from, to);
            carried.map_err(|error| {
                let what = io::Error::other(error.to_string());
                torn = Some(error);
                what
            })
        };
        let moved = self.manager.move_pages(vm, from, to, carry);
        torn.into_iter().for_each(|error| self.see_torn(vm, &error));
        moved.map_err(|cause| Error::Memory { operation: "move", cause })
    }

    /// A VM whose window is torn must not run on.
    fn see_torn(&mut self, vm: VmId, error: &WindowError) {
        if matches!(error, WindowError::Torn { .. }) {
            self.retire(vm);
            self.fail(vm, Failure::Torn);
        }
    }

    pub fn exit(&mut self, vm: LocalVm) -> Result<(), Error> {
        self.find("exit of", vm)?;
        let vm = vm.id;
        self.retire(vm);
        if let Some(member) = self.members.remove(&vm)
            && let Err(error) =
                self.epoll.ctl(ControlOperation::Delete, member.traps.as_raw_fd(), EpollEvent::default())
        {
            log::error!("the traps of {vm:?}: {error}");
        }
        self.manager.exit(vm).expect(MEMBER);
        Ok(())
    }

    /// Nobody waits any more in the window of a VM that ends. The window may live on, for the pages that others need.
    fn retire(&mut self, vm: VmId) {
        if let Some(Err(error)) = self.manager.window_mut(vm).map(HostWindow::retire) {
            log::error!("memory of {vm:?}, which ends: {error}");
        }
    }

    /// Whether traps of a VM can be read.
    #[cfg(test)]
    pub fn waits_readable(&self, vm: LocalVm) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let traps = self.members[&vm.id].traps.as_fd();
        poll(&mut [PollFd::new(traps, PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1)
    }
}
