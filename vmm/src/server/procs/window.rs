//! A window that another process holds.
//!
//! The server reaches into it in three ways: through the process's userfaultfd (zeros, wakes), by reading its memory
//! (moved-out pages; the keeper shares it and outlives the process, and of a first freeze there is a copy of the process),
//! and by messages, which the server's loop sends.
//!
//! Memory is read through `/proc/PID/mem`, not by `process_vm_readv`: whoever reads that way never waits for somebody else
//! to supply a page. A process that is taken over may have pages trapped by a userfaultfd of its own, or by ours, which
//! nobody serves while the server waits. It costs some 0.2 µs more for each page. And what was opened when the process
//! was made is its memory for good, whatever process has its number later.

use crate::procfs;
use crate::server::procs::process::ProcessId;
use crate::wire::{ADDRESSES_END, Frozen};
use guest_mem::sys::Userfaultfd;
use guest_mem::{Failure, Gfn, GfnRange, PAGE_SIZE, Protection, ScratchRange, StoreId, Window};
use nix::fcntl::OFlag;
use nix::sys::stat::fstat;
use nix::unistd::{Pid, pipe2};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

/// What a window asks of the loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// See when the process's socket takes what is queued.
    Room,
    /// See to it that the process answers.
    Answer,
    /// Tell the process to drop this freeze's scratch range.
    DropScratch(StoreId),
    /// Tell the process that these pages of this freeze's scratch range are not needed any more.
    LeaveScratch(StoreId, GfnRange),
    /// Tell the process what its VM may do with these pages.
    Protect(GfnRange, Protection),
    /// Its VM must not run on, for this reason.
    Fail(String),
    /// Nobody needs the window any more.
    Release,
}

/// What windows ask, in order.
pub type Wants = Rc<RefCell<VecDeque<(ProcessId, Want)>>>;

/// What the server knows of the memory of a VM process.
#[derive(Debug)]
pub struct Memory {
    process: ProcessId,
    /// Reads its traps and answers them; none before it is ready, or on a host without.
    pub traps: OnceCell<Userfaultfd>,
    /// Host address of guest frame 0 in its window.
    pub base: Cell<u64>,
    /// All its memory, for reading; opened when it is ready.
    image: OnceCell<File>,
    /// How often in a row it could not be read.
    refused: Cell<u32>,
    /// The number that the process was born with.
    born: OnceCell<Pid>,
    life: Cell<Life>,
    /// It has ended, and all that it said has been heard.
    silent: Cell<bool>,
    /// A process that has the same memory and outlives it.
    pub keeper: Cell<Option<Pid>>,
    /// The scratch range of each freeze.
    scratch: RefCell<HashMap<StoreId, Scratch>>,
    /// Keeps the copy alive that the freeze under way may make.
    lifeline: RefCell<Option<OwnedFd>>,
    /// Copies of the process that have not been reaped.
    copies: RefCell<Vec<Pid>>,
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
struct Scratch {
    range: ScratchRange,
    /// The copy of the process that has them, if it is not the process itself.
    copy: Option<Copy>,
    /// Pages that the process has still to copy there, sorted. Its window shows them until it does, or for good where it ends
    /// before.
    uncopied: Vec<GfnRange>,
}

/// A copy of a VM process. It ends when this is dropped.
#[derive(Debug)]
struct Copy {
    pid: Pid,
    image: OnceCell<File>,
    _lifeline: OwnedFd,
}

/// How often traps that are dismissed are looked for in a round.
const DISMISSALS: usize = 16;

/// A page that could not be read so often is held back: the manager tries every 50 ms.
const REFUSED_MOST: u32 = 100;

/// All memory of a child that has not been reaped.
fn image_of(pid: Pid) -> io::Result<File> {
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
    fn address(&self, scratch: &Scratch, gfn: Gfn) -> io::Result<u64> {
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

    fn is_in_copy(&self, scratch: StoreId) -> bool {
        self.scratch.borrow().get(&scratch).is_some_and(|scratch| scratch.copy.is_some())
    }

    /// The guest frame at a host address of the window.
    pub fn gfn(&self, address: u64) -> Gfn {
        Gfn::of_gpa(address.saturating_sub(self.base.get()))
    }
}

/// The window of one VM. Dropping it ends what is left of the process.
#[derive(Debug)]
pub struct RemoteWindow(pub Rc<Memory>);

impl Window for RemoteWindow {
    fn read_scratch(&self, scratch: StoreId, first: Gfn, buf: &mut [u8]) -> io::Result<()> {
        let memory = &self.0;
        let gone = || io::Error::new(io::ErrorKind::NotFound, "the processes that had the memory are gone");
        let ranges = memory.scratch.borrow();
        let scratch = ranges.get(&scratch).ok_or_else(gone)?;
        let image = match &scratch.copy {
            Some(copy) if copy.image.get().is_none() && memory.copies.borrow().contains(&copy.pid) => {
                let image = image_of(copy.pid)?;
                Some(copy.image.get_or_init(|| image))
            }
            Some(copy) => copy.image.get(),
            None => memory.image.get(),
        };
        let address = memory.address(scratch, first)?;
        let why = match image.ok_or_else(gone)?.read_at(buf, address) {
            Ok(0) => return Err(gone()),
            Ok(n) if n == buf.len() => {
                memory.refused.set(0);
                return Ok(());
            }
            Ok(n) => format!("{n} of {} bytes of scratch memory", buf.len()),
            Err(error) => format!("scratch memory: {error}"),
        };
        // The kernel says so where nothing is mapped, where it was short of memory, and where the process has trapped a page.
        let holders = match &scratch.copy {
            Some(copy) => [memory.copies.borrow().contains(&copy.pid).then_some(copy.pid), None],
            None => [memory.keeper.get(), memory.main()],
        };
        if !holders.into_iter().flatten().any(|holder| is_mapped(holder, address..address + buf.len() as u64)) {
            return Err(io::Error::new(io::ErrorKind::NotFound, why));
        }
        memory.refused.set(memory.refused.get() + 1);
        if memory.refused.get() == REFUSED_MOST {
            memory.want(Want::Fail("its process holds back what it had when it was frozen".into()));
        }
        Err(io::Error::other(why))
    }

    fn leave_scratch(&mut self, scratch: StoreId, pages: GfnRange) {
        // What a copy has is shared with the process, as long as that does not write.
        if !self.0.is_in_copy(scratch) {
            self.0.want(Want::LeaveScratch(scratch, pages));
        }
    }

    fn drop_scratch(&mut self, scratch: StoreId) {
        let dropped = self.0.scratch.borrow_mut().remove(&scratch);
        if dropped.is_none_or(|scratch| scratch.copy.is_none()) {
            self.0.want(Want::DropScratch(scratch));
        }
    }

    fn zero(&mut self, pages: GfnRange) {
        self.answer("zero", pages, Userfaultfd::zero);
        self.wake(pages);
    }

    fn supply(&mut self, gfn: Gfn, page: &[u8]) -> io::Result<()> {
        let traps = self.0.traps.get().ok_or(io::ErrorKind::Unsupported)?;
        traps.supply(self.0.base.get() + gfn.gpa(), page)
    }

    /// The process does it before anything that it is told afterwards. If it cannot, its VM ends.
    fn protect(&mut self, pages: GfnRange, protection: Protection) -> io::Result<()> {
        self.0.want(Want::Protect(pages, protection));
        Ok(())
    }

    fn wake(&mut self, pages: GfnRange) {
        self.answer("wake", pages, Userfaultfd::wake);
    }

    fn fail(&mut self, failure: Failure) {
        self.0.want(Want::Fail(failure.to_string()));
    }
}

/// Whether a process that lives has all these addresses mapped.
fn is_mapped(pid: Pid, bytes: Range<u64>) -> bool {
    let there = procfs::maps(pid.as_raw()).and_then(|maps| procfs::mappings(maps, &bytes)).unwrap_or_default();
    let mapped = there.iter().map(|m| m.addresses.end.min(bytes.end) - m.addresses.start.max(bytes.start));
    mapped.sum::<u64>() == bytes.end - bytes.start
}

impl RemoteWindow {
    fn answer(&self, what: &str, pages: GfnRange, call: impl Fn(&Userfaultfd, u64, usize) -> io::Result<()>) {
        let Some(traps) = self.0.traps.get() else { return };
        if let Err(error) = call(traps, self.0.base.get() + pages.start().gpa(), pages.len_bytes()) {
            // The process may just have died; otherwise the trap comes again.
            log::debug!("{what} {pages:?} in the window of {:?}: {error}", self.0.process);
        }
    }
}

impl Drop for RemoteWindow {
    fn drop(&mut self) {
        self.0.want(Want::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory_of_this(process: u64, wants: Wants) -> Memory {
        let memory = Memory::new(ProcessId(process), wants);
        memory.is_born(Pid::this());
        memory
    }
    use crate::skips::{Lack, skip};
    use guest_mem::sys::Memfd;
    use guest_mem::window::host::{Features, HostWindow, HugePages, Place};
    use guest_mem::{PageCount, PageOrigin, Run, Source};
    use std::os::fd::AsFd;
    use std::thread;
    use std::time::{Duration, Instant};
    use vm_memory::{Bytes, GuestAddress};

    /// Pages whose process lives were taken for lost where they could not be read for a moment. Here a part of a mapping lies
    /// beyond its file, which the kernel tells as it tells that it was short of memory.
    #[test]
    fn only_memory_that_is_gone_is_lost() {
        let pages = GfnRange::from(0..16);
        let features = Features { userfaultfd: false, pagemap_scan: false };
        let mut window = HostWindow::reserve(&[pages], Place::Anywhere, features).unwrap();
        let (store, file) = (StoreId(1), Memfd::new("store", PageCount(4)).unwrap());
        let run = Run { pages, source: Source::Store { store, origin: PageOrigin(0) } };
        window.map(&[run], &[(store, file.as_fd())], HugePages::Never).unwrap();
        let remote = RemoteWindow(Rc::new(memory_of_this(1, Wants::default())));
        remote.0.open_image().unwrap();
        let range = ScratchRange::new(window.base(), Gfn(0), &[]);
        remote.0.scratch.borrow_mut().insert(store, Scratch { range, copy: None, uncopied: Vec::new() });
        let read = |first| {
            let read = remote.read_scratch(store, Gfn(first), &mut [0; 2 * PAGE_SIZE]);
            read.map_err(|error| error.kind())
        };
        assert_eq!(read(2), Ok(()));
        assert_eq!([read(3), read(8)], [Err(io::ErrorKind::Other); 2]);
        // One that has ended, of two that have the memory.
        remote.0.keeper.set(Some(Pid::from_raw(i32::MAX)));
        assert_eq!([read(2), read(8)], [Ok(()), Err(io::ErrorKind::Other)]);
        drop(window);
        assert_eq!(read(2), Err(io::ErrorKind::NotFound));
        remote.0.is_no_more();
        assert_eq!(read(2), Err(io::ErrorKind::NotFound));
    }

    /// A process that was taken over named memory whose pages it had trapped: the server, which alone could have served the
    /// trap, waited for ever.
    #[test]
    fn whoever_reads_memory_never_waits_for_who_has_it() {
        if !crate::host::features().userfaultfd {
            return skip(Lack::Userfaultfd, "no userfaultfd");
        }
        let pages = GfnRange::from(0..16);
        let features = Features { userfaultfd: true, pagemap_scan: false };
        let mut window = HostWindow::reserve(&[pages], Place::Anywhere, features).unwrap();
        let (store, file) = (StoreId(1), Memfd::new("store", PageCount(16)).unwrap());
        let run = Run { pages, source: Source::Store { store, origin: PageOrigin(0) } };
        window.map(&[run], &[(store, file.as_fd())], HugePages::Never).unwrap();
        let wants = Wants::default();
        let remote = RemoteWindow(Rc::new(memory_of_this(1, Rc::clone(&wants))));
        remote.0.open_image().unwrap();
        let range = ScratchRange::new(window.base(), Gfn(0), &[]);
        remote.0.scratch.borrow_mut().insert(store, Scratch { range, copy: None, uncopied: Vec::new() });
        // Page 5 is there, its neighbours trap.
        window.supply(Gfn(5), &[9; PAGE_SIZE]).unwrap();
        let mut page = [0; PAGE_SIZE];
        remote.read_scratch(store, Gfn(5), &mut page).unwrap();
        assert_eq!(page, [9; PAGE_SIZE]);
        let (done, is_done) = std::sync::mpsc::channel();
        thread::spawn(move || {
            // Who waited would be freed by nothing but the end of this program.
            if is_done.recv_timeout(Duration::from_secs(20)).is_err() {
                eprintln!("whoever reads memory waits");
                std::process::abort();
            }
        });
        for first in [4, 5, 6] {
            assert!(remote.read_scratch(store, Gfn(first), &mut [0; 2 * PAGE_SIZE]).is_err(), "{first}");
        }
        done.send(()).unwrap();
        let failed = || wants.borrow().iter().any(|(_, want)| matches!(want, Want::Fail(_)));
        assert!(!failed());
        (0..REFUSED_MOST).for_each(|_| drop(remote.read_scratch(store, Gfn(6), &mut page)));
        assert!(failed(), "what is held back for long ends the VM");
    }

    /// A process named a copy that a sibling had made of itself as its own, and the server read that family's memory.
    #[test]
    fn only_who_was_given_the_lifeline_has_it() {
        let memory = memory_of_this(1, Wants::default());
        let theirs = memory.spin_lifeline().unwrap();
        let other = memory_of_this(2, Wants::default());
        let others = other.spin_lifeline().unwrap();
        // A child that has one of the two; closed on exec.
        let mut child = std::process::Command::new("sleep").arg("60").stdin(theirs).spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        assert!(memory.has_lifeline(pid));
        assert!(!other.has_lifeline(pid));
        memory.cut_lifeline();
        assert!(!memory.has_lifeline(pid), "no freeze is under way");
        drop(others);
        child.kill().and_then(|()| child.wait()).unwrap();
    }

    /// A guest's page was being read from swap when its VM was removed: nobody answered the trap any more, and the worker of
    /// KVM's that waited kept the memory, so that `rm` never came back.
    #[test]
    fn who_waits_for_a_forgotten_trap_touches_its_page_again() {
        if !crate::host::features().userfaultfd {
            return skip(Lack::Userfaultfd, "no userfaultfd");
        }
        let pages = GfnRange::from(0..16);
        let features = Features { userfaultfd: true, pagemap_scan: false };
        let mut window = HostWindow::reserve(&[pages], Place::Anywhere, features).unwrap();
        let (store, file) = (StoreId(1), Memfd::new("store", PageCount(16)).unwrap());
        let run = Run { pages, source: Source::Store { store, origin: PageOrigin(0) } };
        window.map(&[run], &[(store, file.as_fd())], HugePages::Never).unwrap();
        let memory = memory_of_this(1, Wants::default());
        let traps = window.userfaultfd().unwrap().try_clone_to_owned().unwrap();
        memory.traps.set(Userfaultfd::from_fd(traps)).unwrap();
        memory.base.set(window.base());
        let touched = || {
            let deadline = Instant::now() + Duration::from_secs(10);
            let mut traps = Vec::new();
            while traps.is_empty() && Instant::now() < deadline {
                memory.traps.get().unwrap().read(&mut traps, 64).unwrap();
                thread::sleep(Duration::from_millis(1));
            }
            traps.iter().map(|trap| memory.gfn(trap.address)).collect::<Vec<Gfn>>()
        };
        thread::scope(|scope| {
            let guest = scope.spawn(|| window.memory().read_obj::<u64>(GuestAddress(5 << 12)).unwrap());
            let first = touched();
            memory.wake_all();
            let again = touched();
            let traps = memory.traps.get().unwrap();
            let page = memory.base.get() + (5 << 12);
            traps.zero(page, PAGE_SIZE).and(traps.wake(page, PAGE_SIZE)).unwrap();
            assert_eq!(guest.join().unwrap(), 0);
            assert_eq!((first, again), (vec![Gfn(5)], vec![Gfn(5)]));
        });
    }
}
