//! A family in this process: the manager, memfd stores and host windows put together, and a thread that owns them.
//!
//! The thread answers traps, writes frozen pages back to their stores, and takes in what has been read from swap; the
//! methods of [`Local`] ask it. So guest memory can be touched from any thread at any time, whether its pages have been
//! written back or not, with one exception: nobody touches a VM's memory while [`Local::fork`] forks it.

mod owner;
#[cfg(test)]
mod tests;

use crate::addr::{Gfn, GfnRange, PageCount};
use crate::ids::VmId;
use crate::manager::{self, Evicted, Manager, SwapCounts};
use crate::space::map::{Protection, Sharing};
use crate::stats::FamilyTotals;
use crate::store::memfd::MemfdStores;
use crate::swap::Swap;
use crate::window::Failure;
use crate::window::host::{HostWindow, WindowError};
use owner::{FamilyThread, OwnerRequest};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

/// What went wrong. Nothing has changed, if nothing else is said.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The family cannot begin: the host has no userfaultfd for us, no thread, or no descriptors.
    #[error("begin a family: {0}")]
    Begin(#[source] io::Error),
    /// Memory must be some ranges of frames, sorted, apart, none of them empty, below 64 TiB; and shared memory such ranges
    /// within it.
    #[error("{0:?} cannot be a VM's memory")]
    BadMemory(Vec<GfnRange>),
    /// The VM is of another family, or gone.
    #[error("{operation} {vm}: there is no such VM in this family")]
    NoSuchVm {
        /// What was asked for.
        operation: &'static str,
        /// Of which VM.
        vm: LocalVm,
    },
    /// The VM has lost memory: it can be taken out, and nothing else.
    #[error("{operation} {vm}: {failure}")]
    Failed {
        /// What was asked for.
        operation: &'static str,
        /// Of which VM.
        vm: LocalVm,
        /// Why it has failed.
        failure: Failure,
    },
    /// A window could not be made, or not be frozen.
    #[error("{operation}: {cause}")]
    Window {
        /// What was asked for.
        operation: &'static str,
        /// Why.
        #[source]
        cause: WindowError,
    },
    /// The manager could not do it.
    #[error("{operation}: {cause}")]
    Memory {
        /// What was asked for.
        operation: &'static str,
        /// Why.
        #[source]
        cause: manager::Error,
    },
    /// An [observer](Options::observe) asked: the family's thread is the one that runs it, and would wait for itself.
    #[error("an observer cannot ask its own family")]
    Observing,
    /// The family's thread has panicked. Its VMs' memory is lost: all of it reads zero.
    #[error("the family's thread has panicked")]
    Panicked,
}

/// Names a VM of a family in this process. It is never another one's name, in this family or any other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalVm {
    family: u64,
    id: VmId,
}

impl LocalVm {
    /// Its name in the [books](Local::inspect) of its family.
    pub fn id(self) -> VmId {
        self.id
    }
}

impl fmt::Display for LocalVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM {} of family {}", self.id.0, self.family)
    }
}

impl fmt::Debug for LocalVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What an [observer](Options::observe) is told.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The VM must not run on. Where it is a page that is lost, somebody waits for it: as soon as the observer returns, they
    /// go on, and find zeros. So this is the place to stop the VM's vCPUs: one that waits in `KVM_RUN` and is sent a signal
    /// now comes out of it before it executes another instruction.
    Failed(Failure),
    /// Somebody waits for a page that cannot be brought just now. It is tried again until it can.
    Delayed(&'a manager::Error),
}

type Observer = Box<dyn FnMut(LocalVm, Event<'_>) + Send>;

/// A swap that families on several threads share.
pub type LocalSwap = Arc<Mutex<dyn Swap + Send>>;

/// What a family may have.
#[derive(Default)]
#[non_exhaustive]
pub struct Options {
    swap: Option<LocalSwap>,
    observer: Option<Observer>,
    shared: Vec<GfnRange>,
}

impl Options {
    /// Frozen pages can be [evicted](Local::evict_some) to this swap: `Arc::new(Mutex::new(SwapStore::open(…)?))`.
    #[must_use]
    pub fn swap(self, swap: LocalSwap) -> Self {
        Self { swap: Some(swap), ..self }
    }

    /// These parts of memory (sorted, apart, within it) are [shared](crate::Sharing::Shared): a VM that is launched has new
    /// memory of zeros there, and all that descend from it have the same. It is there until the last of them exits; whatever
    /// else there is of it is never evicted, frozen, or given back.
    #[must_use]
    pub fn shared(self, shared: Vec<GfnRange>) -> Self {
        Self { shared, ..self }
    }

    /// Who hears of VMs that have failed. It runs on the family's thread: nobody's trap is answered meanwhile, so it
    /// touches no guest memory, and it cannot call methods of its [`Local`].
    #[must_use]
    pub fn observe(self, observer: impl FnMut(LocalVm, Event<'_>) + Send + 'static) -> Self {
        Self { observer: Some(Box::new(observer)), ..self }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Options(swap: {}, observer: {})", self.swap.is_some(), self.observer.is_some())
    }
}

/// Figures of a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LocalStats {
    /// VMs there are.
    pub vms: u64,
    /// What they have in memory and in swap, as far as it is frozen.
    pub totals: FamilyTotals,
    /// What went to swap and came back.
    pub swap: SwapCounts,
}

/// VMs that descend from one launch, their windows in this process.
///
/// ```
/// use guest_mem::local::Local;
/// use guest_mem::{Gfn, GfnRange, PageCount};
/// use vm_memory::{Bytes, GuestAddress};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let family = Local::new(vec![GfnRange::new(Gfn(0), PageCount(1024))])?;
/// let parent = family.launch()?;
/// family.memory(parent)?.write_obj(1u64, GuestAddress(0x5000))?;
///
/// let child = family.fork(parent)?;
/// family.memory(parent)?.write_obj(2u64, GuestAddress(0x5000))?;
/// assert_eq!(family.memory(child)?.read_obj::<u64>(GuestAddress(0x5000))?, 1);
///
/// // A fork of the fork sees what its parent saw, and nothing of its aunt.
/// let grandchild = family.fork(child)?;
/// family.exit(child)?;
/// assert_eq!(family.memory(grandchild)?.read_obj::<u64>(GuestAddress(0x5000))?, 1);
/// assert!(family.fork(child).is_err());
/// # Ok(())
/// # }
/// ```
pub struct Local {
    family: u64,
    /// `None` once it ends.
    requests: Option<Sender<OwnerRequest>>,
    /// One for each request.
    bell: Arc<EventFd>,
    /// `None` once it has ended.
    owner: Option<JoinHandle<()>>,
}

/// The number of the next family of this process.
static FAMILIES: AtomicU64 = AtomicU64::new(1);

impl Local {
    /// A family whose VMs all have this memory. Nothing of it is evicted.
    ///
    /// # Errors
    /// [`Error::BadMemory`], [`Error::Begin`].
    pub fn new(ram: Vec<GfnRange>) -> Result<Self, Error> {
        Self::with_options(ram, Options::default())
    }

    /// The same, with swap, or with somebody who hears of failures.
    ///
    /// # Errors
    /// [`Error::BadMemory`], [`Error::Begin`].
    pub fn with_options(ram: Vec<GfnRange>, options: Options) -> Result<Self, Error> {
        let family = FAMILIES.fetch_add(1, Ordering::Relaxed);
        let bell = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE).map_err(Error::Begin)?;
        let bell = Arc::new(bell);
        let (requests, taken) = mpsc::channel();
        let (begun, begins) = mpsc::channel();
        let heard = Arc::clone(&bell);
        // The manager never leaves the thread that it is made on.
        let run = move || match FamilyThread::new(family, ram, options, taken, heard) {
            Ok(owner) => {
                let _ = begun.send(Ok(()));
                owner.run();
            }
            Err(error) => {
                let _ = begun.send(Err(error));
            }
        };
        let owner = thread::Builder::new().name("guest-mem".to_owned()).spawn(run).map_err(Error::Begin)?;
        begins.recv().unwrap_or(Err(Error::Panicked))?;
        Ok(Self { family, requests: Some(requests), bell, owner: Some(owner) })
    }

    /// A VM whose memory is zero.
    ///
    /// # Errors
    /// [`Error::Window`]: its window could not be made. [`Error::Memory`]: there was none for what is shared.
    pub fn launch(&self) -> Result<LocalVm, Error> {
        self.ask(FamilyThread::launch)?
    }

    /// A child of `parent`, whose memory nobody touches meanwhile: its vCPUs and devices stand still. Whoever does touch it may
    /// get a SIGSEGV. Its frozen pages are written back afterwards, while both run.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::Failed`]; [`Error::Memory`] or [`Error::Window`]: there is no child, and the parent is as
    /// it was, unless it has [failed](Self::failure).
    pub fn fork(&self, parent: LocalVm) -> Result<LocalVm, Error> {
        self.ask(move |owner| owner.fork(parent))?
    }

    /// A VM's memory, by `vm-memory`'s traits: `GuestMemoryBackend` for loaders, and through it `GuestMemory` for virtio
    /// queues.
    ///
    /// It is there for as long as anybody holds a clone of it. When the VM is gone, or the family, all of it is zero memory of
    /// nobody else; and whoever waits for a page then goes on and finds zeros. Who has made a memory slot of KVM of it keeps
    /// a clone for as long as the slot.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn memory(&self, vm: LocalVm) -> Result<GuestMemoryMmap, Error> {
        self.ask(move |owner| owner.memory(vm))?
    }

    /// Why a VM must never run on, if it must not: somebody has waited for a page that is lost.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn failure(&self, vm: LocalVm) -> Result<Option<Failure>, Error> {
        self.ask(move |owner| owner.failure(vm))?
    }

    /// Waits until all frozen pages have been written back. It goes by itself, too; but what has been written back can be
    /// evicted.
    ///
    /// # Errors
    /// [`Error::Memory`]: the host has no memory for some of them; it is tried again, without anybody who waits for it.
    pub fn write_back(&self) -> Result<(), Error> {
        let (written_back, done) = mpsc::channel();
        self.ask(move |owner| owner.tell_written_back(written_back))?;
        done.recv().map_err(|_| Error::Panicked)?
    }

    /// Evicts about `limit` frozen pages that have been written back, the oldest first.
    ///
    /// # Errors
    /// [`Error::Panicked`], [`Error::Observing`].
    pub fn evict_some(&self, limit: PageCount) -> Result<Evicted, Error> {
        self.ask(move |owner| owner.evict_some(limit))
    }

    /// Gives back pages that nobody uses in `vm`: they read zero, and what only it saw is freed. Returns those that were
    /// given back: each stretch takes a mapping, and where they are short, the shortest stay as they are.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::Failed`].
    pub fn balloon(&self, vm: LocalVm, pages: &[GfnRange]) -> Result<Vec<GfnRange>, Error> {
        let pages = pages.to_vec();
        self.ask(move |owner| owner.balloon(vm, &pages))?
    }

    /// From now on a thread that writes these pages of `vm` gets a SIGSEGV, and `KVM_RUN` returns `EFAULT`; or they may be
    /// written again: see [`Manager::protect`].
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::Failed`], [`Error::Memory`].
    pub fn protect(&self, vm: LocalVm, pages: GfnRange, protection: Protection) -> Result<(), Error> {
        self.ask(move |owner| owner.protect(vm, pages, protection))?
    }

    /// `vm` has new memory of zeros at `pages`, where it has [unmapped](Self::unmap) what it had: its own, or
    /// [shared](Sharing::Shared) with all that are forked from it from now on.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::Failed`]; [`Error::Memory`] where something is there already, the family has no memory
    /// there, or the host had none for it. Nothing has changed.
    pub fn map(&self, vm: LocalVm, pages: GfnRange, sharing: Sharing) -> Result<(), Error> {
        self.ask(move |owner| owner.map_pages(vm, pages, sharing))?
    }

    /// `vm` has nothing at `pages` any more, and what only it saw there is freed. A thread that touches one of them gets a
    /// SIGSEGV, and `KVM_RUN` returns `EFAULT`: whoever holds the VM's [memory](Self::memory) keeps out. Children have nothing
    /// there either.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::Failed`]; [`Error::Memory`] where it has nothing at one of them, or they lie in more than
    /// one range of the family's memory. Nothing has changed.
    pub fn unmap(&self, vm: LocalVm, pages: GfnRange) -> Result<(), Error> {
        self.ask(move |owner| owner.unmap_pages(vm, pages))?
    }

    /// `vm` has from frame `to` on, where it has [nothing](Self::unmap), what it has at `from`, and nothing there any more. Nothing
    /// is copied, and relatives have it where they had it: see [`Manager::move_pages`]. Whoever holds the VM's
    /// [memory](Self::memory) keeps out of both places meanwhile, and out of `from` afterwards.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::Failed`]; [`Error::Memory`] where it does not have all of `from`, something is in the way,
    /// or one of the places lies in more than one range of the family's memory. Nothing has changed, unless the VM has
    /// [failed](Self::failure).
    pub fn move_pages(&self, vm: LocalVm, from: GfnRange, to: Gfn) -> Result<(), Error> {
        self.ask(move |owner| owner.move_pages(vm, from, to))?
    }

    /// Takes a VM out. What only it saw is freed.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn exit(&self, vm: LocalVm) -> Result<(), Error> {
        self.ask(move |owner| owner.exit(vm))?
    }

    /// Figures of the family.
    ///
    /// # Errors
    /// [`Error::Panicked`], [`Error::Observing`].
    pub fn stats(&self) -> Result<LocalStats, Error> {
        self.inspect(|manager| LocalStats {
            vms: manager.family().vms().count() as u64,
            totals: manager.family().totals(),
            swap: manager.counts(),
        })
    }

    /// Lets `look` look at the manager, on the family's thread: nobody's trap is answered meanwhile, so it touches no guest
    /// memory.
    ///
    /// # Errors
    /// [`Error::Panicked`], [`Error::Observing`].
    pub fn inspect<R: Send + 'static>(
        &self,
        look: impl FnOnce(&Manager<MemfdStores, HostWindow>) -> R + Send + 'static,
    ) -> Result<R, Error> {
        self.ask(move |owner| look(owner.manager()))
    }

    /// Has the family's thread carry a request out.
    fn ask<R: Send + 'static>(
        &self,
        request: impl FnOnce(&mut FamilyThread) -> R + Send + 'static,
    ) -> Result<R, Error> {
        let (Some(requests), Some(owner)) = (&self.requests, &self.owner) else { return Err(Error::Panicked) };
        if owner.thread().id() == thread::current().id() {
            return Err(Error::Observing);
        }
        let (answer, answers) = mpsc::channel();
        let request: OwnerRequest = Box::new(move |owner| {
            let _ = answer.send(request(owner));
        });
        requests.send(request).map_err(|_| Error::Panicked)?;
        // It fails where 2^64 requests wait.
        let _ = self.bell.write(1);
        answers.recv().map_err(|_| Error::Panicked)
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.requests = None;
        let _ = self.bell.write(1);
        if let Some(owner) = self.owner.take_if(|owner| owner.thread().id() != thread::current().id()) {
            // What it may have panicked of is on its standard error.
            let _ = owner.join();
        }
    }
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Local(family {})", self.family)
    }
}
