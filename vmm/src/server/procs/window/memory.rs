//! What the server knows of the memory of a VM process, and how it reads and wakes it.

use super::{Want, Wants};
use crate::procfs;
use crate::server::ids::ProcessId;
use crate::wire::{ADDRESSES_END, Frozen};
use guest_mem::sys::Userfaultfd;
use guest_mem::{Gfn, GfnRange, PAGE_SIZE, ScratchRange, StoreId};
use nix::fcntl::OFlag;
use nix::sys::stat::fstat;
use nix::unistd::{Pid, pipe2};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// What the server knows of the memory of a VM process.
#[derive(Debug)]
pub struct Memory {
    pub(super) process: ProcessId,
    /// Reads its traps and answers them; none before it is ready, or on a host without.
    pub traps: OnceCell<Userfaultfd>,
    /// Host address of guest frame 0 in its window.
    pub base: Cell<u64>,
    /// All its memory, for reading; opened when it is ready.
    pub(super) image: OnceCell<File>,
    /// How often in a row it could not be read.
    pub(super) refused: Cell<u32>,
    /// The number that the process was born with.
    born: OnceCell<Pid>,
    life: Cell<Life>,
    /// It has ended, and all that it said has been heard.
    silent: Cell<bool>,
    /// A process that has the same memory and outlives it.
    pub keeper: Cell<Option<Pid>>,
    /// The scratch range of each freeze.
    pub(super) scratch: RefCell<HashMap<StoreId, Scratch>>,
    /// Keeps the copy alive that the freeze under way may make.
    lifeline: RefCell<Option<OwnedFd>>,
    /// Copies of the process that have not been reaped.
    pub(super) copies: RefCell<Vec<Pid>>,
    wants: Wants,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// It is about to be made, or has been, and we have not heard its number.
    Unborn,
    /// It is there, be it as a zombie.
    Lives(Pid),
    /// It has been reaped, or was never made.
    Gone,
}

/// Where the pages of a freeze are.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) range: ScratchRange,
    /// The copy of the process that has them, if it is not the process itself.
    pub(super) copy: Option<Copy>,
    /// Pages that the process has still to copy there, sorted. Its window shows them until it does, or for good where it ends
    /// before.
    pub(super) uncopied: Vec<GfnRange>,
}

/// A copy of a VM process. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) pid: Pid,
    pub(super) image: OnceCell<File>,
    _lifeline: OwnedFd,
}

/// How often traps that are dismissed are looked for in a round.
const DISMISSALS: usize = 16;

/// All memory of a child that has not been reaped.
pub(super) fn image_of(pid: Pid) -> io::Result<File> {
    File::open(format!("/proc/{pid}/mem"))
}

impl Memory {
    /// The memory of a process that is not there yet.
    pub fn new(process: ProcessId, wants: Wants) -> Self {
        Self {
            process,
            traps: OnceCell::new(),
            base: Cell::new(0),
            image: OnceCell::new(),
            refused: Cell::new(0),
            born: OnceCell::new(),
            life: Cell::new(Life::Unborn),
            silent: Cell::new(false),
            keeper: Cell::new(None),
            scratch: RefCell::default(),
            lifeline: RefCell::default(),
            copies: RefCell::default(),
            wants,
        }
    }

    /// The process has been made.
    pub fn is_born(&self, pid: Pid) {
        self.life.set(Life::Lives(*self.born.get_or_init(|| pid)));
    }

    /// The process has been reaped, or will not be made.
    pub fn is_no_more(&self) {
        self.life.set(Life::Gone);
    }

    /// Whether its process has still to be made.
    pub fn is_unborn(&self) -> bool {
        self.life.get() == Life::Unborn
    }

    /// The process, if it is there.
    pub fn main(&self) -> Option<Pid> {
        match self.life.get() {
            Life::Lives(pid) => Some(pid),
            Life::Unborn | Life::Gone => None,
        }
    }

    /// The number that the process was born with, whether it is still there or not.
    pub fn born(&self) -> Option<Pid> {
        self.born.get().copied()
    }

    /// Opens its memory, as long as the process is there.
    ///
    /// # Errors
    /// Of `open`.
    pub fn open_image(&self) -> io::Result<()> {
        if let Some(main) = self.main() {
            let image = image_of(main)?;
            self.image.get_or_init(|| image);
        }
        Ok(())
    }

    /// Notes what the server is to do.
    pub fn want(&self, want: Want) {
        self.wants.borrow_mut().push_back((self.process, want));
    }

    /// Where the pages of a freeze are.
    pub fn note_scratch(&self, frozen: &Frozen) {
        let Frozen { store, harvest, scratch_base, copies, copy, .. } = frozen;
        let lifeline = self.lifeline.take();
        if harvest.is_empty() {
            return;
        }
        let of_copy = |(pid, lifeline)| Copy { pid: Pid::from_raw(pid), image: OnceCell::new(), _lifeline: lifeline };
        let copy = copy.zip(lifeline).map(of_copy);
        // In a copy, every page is where it was.
        let copied = if copy.is_some() { &[][..] } else { &harvest.copied };
        let range = ScratchRange::new(*scratch_base, *copies, copied);
        let there = frozen.copied.as_deref().unwrap_or(copied);
        let is_there = |pages: &&GfnRange| there.binary_search_by_key(&pages.start(), |there| there.start()).is_ok();
        let uncopied = copied.iter().filter(|pages| !is_there(pages)).copied().collect();
        self.scratch.borrow_mut().insert(*store, Scratch { range, copy, uncopied });
    }

    /// All pages of a freeze are where they will be read.
    pub fn copied(&self, store: StoreId) {
        if let Some(scratch) = self.scratch.borrow_mut().get_mut(&store) {
            scratch.uncopied = Vec::new();
        }
    }

    /// The process has ended, and all that it said has been heard: what it has not copied stays where it is. Whether there is
    /// such a page.
    pub fn falls_silent(&self) -> bool {
        self.silent.set(true);
        self.scratch.borrow().values().any(|scratch| !scratch.uncopied.is_empty())
    }

    /// The host address where a page of a freeze is.
    pub(super) fn address(&self, scratch: &Scratch, gfn: Gfn) -> io::Result<u64> {
        let next = scratch.uncopied.partition_point(|pages| pages.end() <= gfn);
        match scratch.uncopied.get(next).is_some_and(|pages| pages.contains(gfn)) {
            false => Ok(scratch.range.address(gfn)),
            // No vCPU has run since, or it would have said so.
            true if self.silent.get() => Ok(self.base.get() + gfn.gpa()),
            true => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// The end of a pipe that a copy of the process holds on to, if the freeze that is about to begin makes one.
    ///
    /// # Errors
    /// Of `pipe`.
    pub fn spin_lifeline(&self) -> io::Result<OwnedFd> {
        let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
        self.lifeline.replace(Some(ours));
        Ok(theirs)
    }

    /// The freeze under way has made no copy that is needed.
    pub fn cut_lifeline(&self) {
        self.lifeline.take();
    }

    /// Nobody needs the memory any more: copies of the process end.
    pub fn end_copies(&self) {
        self.cut_lifeline();
        self.scratch.borrow_mut().clear();
    }

    /// Whether a process holds on to the pipe of the freeze under way. Nobody was given that but the VM process, from which
    /// its copy has it from its first moment on.
    pub fn has_lifeline(&self, pid: Pid) -> bool {
        let lifeline = self.lifeline.borrow();
        let inode = lifeline.as_ref().and_then(|ours| fstat(ours).ok()).map(|found| found.st_ino);
        inode.is_some_and(|inode| procfs::holds(pid.as_raw(), &format!("pipe:[{inode}]")))
    }

    /// The process has made a copy of itself.
    pub fn note_copy(&self, pid: Pid) {
        self.copies.borrow_mut().push(pid);
    }

    /// The keeper has ended, or a copy.
    pub fn reaped(&self, pid: Pid) {
        if self.keeper.get() == Some(pid) {
            self.keeper.set(None);
        }
        self.copies.borrow_mut().retain(|copy| *copy != pid);
        let needed = |scratch: &Scratch| scratch.copy.as_ref().is_some_and(|copy| copy.pid == pid);
        if self.scratch.borrow().values().any(needed) {
            log::error!("a copy of {:?} has ended before its pages had settled", self.process);
        }
    }

    /// Whether no process is left that has the memory.
    pub fn is_unattended(&self) -> bool {
        self.life.get() == Life::Gone && self.keeper.get().is_none() && self.copies.borrow().is_empty()
    }

    /// Whether the memory itself is gone. A worker of KVM's that waits for a page holds on to it, and outlives the process;
    /// without traps it would put a page of zeros into a store that others map.
    pub fn is_gone(&self) -> bool {
        self.is_unattended() && self.traps.get().is_none_or(|traps| traps.is_orphaned(self.base.get()))
    }

    /// Answers all traps with zeros: the process is about to end, or has ended, and no guest sees them. Who waits would keep
    /// it from ending.
    pub fn dismiss_traps(&self) {
        let Some(source) = self.traps.get() else { return };
        let mut traps = Vec::new();
        // Whoever gives its pages back traps as soon as it has been answered.
        for _ in 0..DISMISSALS {
            if source.read(&mut traps, 64).is_err() || traps.is_empty() {
                return;
            }
            for trap in traps.drain(..) {
                let answered = source.zero(trap.address, PAGE_SIZE).and(source.wake(trap.address, PAGE_SIZE));
                answered.unwrap_or_else(|error| log::debug!("a trap of {:?}, which ends: {error}", self.process));
            }
        }
    }

    /// Has all who wait in the window touch their pages again: of traps that were read, and whose VM has ended since, nobody
    /// knows any more. A worker of KVM's would wait for ever, and hold on to the memory.
    pub fn wake_all(&self) {
        let Some(traps) = self.traps.get() else { return };
        let base = self.base.get();
        if let Err(error) = traps.wake(base, ADDRESSES_END.saturating_sub(base) as usize) {
            log::debug!("wake all in the window of {:?}: {error}", self.process);
        }
    }

    pub(super) fn is_in_copy(&self, scratch: StoreId) -> bool {
        self.scratch.borrow().get(&scratch).is_some_and(|scratch| scratch.copy.is_some())
    }

    /// The guest frame at a host address of the window.
    pub fn gfn(&self, address: u64) -> Gfn {
        Gfn::of_gpa(address.saturating_sub(self.base.get()))
    }
}
