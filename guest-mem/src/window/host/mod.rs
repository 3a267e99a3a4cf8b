//! The window in this process: guest memory as mappings of our own.
//!
//! ```text
//!   area (window)    |· run ·|··· run ···|  anonymous run  |      frame g at base + g·4096
//!   scratch 0              |moved|   |m|            ··· |copies|  the same frames, moved out by a freeze, and behind
//!   scratch 1                                                     them copies; the next freeze, while 0 is still being written back
//! ```
//!
//! One rule is behind the order of all calls here: **no touch may ever read a hole of a store untrapped**, because the
//! kernel would plant a zero page in the store, for everybody who maps it, for ever. So a store that takes the place of
//! moved pages is mapped inaccessible, registered, and only then opened.

mod balloon;
mod dirty;
mod freeze;
mod map;
mod moves;
mod protect;
mod runs;
mod scratch;
mod snapshot;
#[cfg(test)]
mod tests;

pub use crate::sys::Place;
pub use dirty::{Dirty, SlotLog};
pub use freeze::{Asked, FrozenPages, MovedOut};
pub use moves::SmallExtents;
pub use scratch::ScratchRow;
pub use snapshot::Deduped;

use super::{Failure, Window};
use crate::addr::extents::without;
use crate::addr::page_set::PageSet;
use crate::addr::{Gfn, GfnRange, PageCount};
use crate::ids::{Run, Source, StoreId};
use crate::space::map::Protection;
use crate::sys::{Advice, Area, Pagemap, ScanMethod, Userfaultfd, Written};
use dirty::DirtyMap;
use rangemap::RangeSet;
use runs::RunMap;
use scratch::ScratchPool;
use std::os::fd::{AsFd, BorrowedFd};
use std::{fmt, io};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

/// Which of the kernel's features a window uses; each has a fallback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Traps. Without them whoever freezes keeps the VM still until all pages have been written back.
    pub userfaultfd: bool,
    /// The `PAGEMAP_SCAN` ioctl. Without it the pagemap is read.
    pub pagemap_scan: bool,
}

/// Whether anonymous runs get huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// They do: a launched VM's.
    Advised,
    /// They do not: a clone's, where one write would make 512 pages private.
    Never,
}

/// Something went wrong with a window.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WindowError {
    /// A system call failed. Nothing has changed.
    #[error("{call} of guest pages {pages:?}: {cause}")]
    Call {
        /// Which call.
        call: &'static str,
        /// What it was asked for.
        pages: GfnRange,
        /// Why.
        cause: io::Error,
    },
    /// The kernel lacks something that the window needs.
    #[error("{what}: {cause}")]
    Unsupported {
        /// What.
        what: &'static str,
        /// Why.
        cause: io::Error,
    },
    /// A run lies outside of the window's RAM, or names a store that did not come along.
    #[error("run {0:?} lies outside of RAM, or its store did not come along")]
    BadRun(Run),
    /// There was no room for a scratch range.
    #[error("room for moved pages: {0}")]
    NoScratch(io::Error),
    /// Undoing a failed freeze failed as well: the window has lost pages, the VM must not run on.
    #[error("undoing {failed}: {cause}; the window is torn")]
    Torn {
        /// What failed in the first place.
        failed: Box<WindowError>,
        /// Why it could not be undone.
        cause: io::Error,
    },
}

/// Adds the call and the guest pages to an error of the system.
fn during(call: &'static str, pages: GfnRange) -> impl FnOnce(io::Error) -> WindowError {
    move |cause| WindowError::Call { call, pages, cause }
}

/// A VM's guest-physical space in this process.
///
/// Owns the mappings, the scratch ranges of freezes that have not been written back, the traps and the record of what the VMM
/// wrote. Stays outside: the stores (the window keeps no descriptor, mappings hold the files), KVM, and who stops the
/// vCPUs. Dropping it [retires](Self::retire) the memory that somebody still holds, and unmaps everything else.
pub struct HostWindow {
    memory: GuestMemoryMmap<Written>,
    /// The same, where nobody needs to know what the VMM writes.
    plain: GuestMemoryMmap,
    /// Ends after what it has lent.
    area: Area,
    ram: Vec<GfnRange>,
    /// Pages that were waited for and that nobody can supply, as far as nobody has [asked](Self::take_failures).
    failures: Vec<Failure>,
    retired: bool,
    runs: RunMap,
    scratches: ScratchPool,
    /// Frozen pages that stayed, and must: what is mapped there shows something older.
    kept: PageSet,
    /// What the VM may not write, mapped or not.
    read_only: PageSet,
    /// Where shared memory is mapped: nothing of it is private, and whatever freezes, gives back or moves leaves it alone.
    shared: RangeSet<u64>,
    /// Where nothing is mapped any more.
    unmapped: RangeSet<u64>,
    /// Pages dirty since the last successful freeze, as far as we were told and have not used it.
    pending: DirtyMap,
    /// Pages given back since the last successful freeze: what a log says of them may be of the time before.
    given_back: PageSet,
    uffd: Option<Userfaultfd>,
    pagemap: Pagemap,
}

impl HostWindow {
    /// Reserves room for `ram` (sorted, apart): guest address `g` will stand at `base + g`, and what lies between the
    /// RAM ranges stays empty. Nothing is mapped yet.
    ///
    /// # Errors
    /// The place is taken, or the kernel lacks what `features` ask for.
    pub fn reserve(ram: &[GfnRange], place: Place, features: Features) -> Result<Self, WindowError> {
        let end = ram.last().map_or(Gfn(0), |range| range.end());
        let all = GfnRange::between(Gfn(0), end);
        let mut area = Area::reserve(place, all.count()).map_err(during("reserving addresses", all))?;
        let uffd = features.userfaultfd.then(Userfaultfd::new).transpose();
        let uffd = uffd.map_err(|cause| WindowError::Unsupported { what: "userfaultfd", cause })?;
        let method = if features.pagemap_scan { ScanMethod::Scan } else { ScanMethod::Read };
        let pagemap = Pagemap::open(method);
        let pagemap = pagemap.map_err(|cause| WindowError::Unsupported { what: "/proc/self/pagemap", cause })?;
        Ok(Self {
            memory: area.guest_memory(ram).map_err(during("describing", all))?,
            plain: area.guest_memory(ram).map_err(during("describing", all))?,
            failures: Vec::new(),
            retired: false,
            scratches: ScratchPool::beside(&area, place, all.count()),
            pending: DirtyMap::clean(ram),
            kept: PageSet::default(),
            read_only: PageSet::default(),
            shared: RangeSet::new(),
            unmapped: RangeSet::new(),
            given_back: PageSet::default(),
            ram: ram.to_vec(),
            runs: RunMap::default(),
            area,
            uffd,
            pagemap,
        })
    }

    /// Host address of guest-physical address 0.
    pub fn base(&self) -> u64 {
        self.area.base()
    }

    /// The traps' descriptor, if the window traps.
    pub fn userfaultfd(&self) -> Option<BorrowedFd<'_>> {
        self.uffd.as_ref().map(Userfaultfd::as_fd)
    }

    /// Makes private copies of pages that the guest is likely to write, and that nobody has to supply first: a batch costs a
    /// tenth of a copy at each first write. They are clean until the guest writes them, or touches them ahead. A kernel that
    /// does not know the call (before Linux 5.14) makes none.
    pub fn copy_ahead(&self, pages: GfnRange) {
        self.area.hint(pages, Advice::Populate);
    }

    /// Gives back the memory that the copies of earlier freezes have left for the next: worth it where none comes soon.
    pub fn drop_spare(&mut self) {
        self.scratches.drop_spare();
    }

    /// The guest's memory, for the VMM's own reads and writes: it records what is written. Only mapped frames may be
    /// touched, so not before [`map`](Self::map), nor while the window is frozen; a touch of a page that no store holds yet
    /// waits for the manager. Clones outlive the window, and are [zero](Self::retire) from then on.
    pub fn memory(&self) -> &GuestMemoryMmap<Written> {
        &self.memory
    }

    /// The same memory without the record: for users whose every freeze looks at [every page](Dirty::Every).
    pub fn plain_memory(&self) -> &GuestMemoryMmap {
        &self.plain
    }

    /// What has made its VM fail since this was last asked.
    pub fn take_failures(&mut self) -> Vec<Failure> {
        std::mem::take(&mut self.failures)
    }

    /// Nobody supplies the window's pages any more: all of its RAM becomes zero memory of its own that never traps. Who
    /// waits for a page goes on, and whoever holds the memory may go on to use it. Nothing of it is shared with anybody.
    ///
    /// # Errors
    /// Of `mmap`: some of the memory is as it was, and who waits there waits on.
    pub fn retire(&mut self) -> Result<(), WindowError> {
        if self.retired {
            return Ok(());
        }
        for &pages in &self.ram {
            self.area.map_anonymous(pages).map_err(during("mmap", pages))?;
            self.runs.mapped(pages, Source::Anonymous);
        }
        self.kept.clear();
        self.read_only.clear();
        (self.shared, self.unmapped) = Default::default();
        self.retired = true;
        self.wake(GfnRange::between(Gfn(0), self.ram.last().map_or(Gfn(0), |ram| ram.end())));
        Ok(())
    }

    /// Where shared memory is mapped: what is written there is nothing of the VM's own.
    pub fn shared(&self) -> impl Iterator<Item = GfnRange> {
        self.shared.iter().map(|pages| pages.clone().into())
    }

    /// Where nothing is private, whatever a log says: shared memory, and what is not mapped.
    fn not_own(&self) -> impl Iterator<Item = GfnRange> {
        self.shared.iter().chain(self.unmapped.iter()).map(|pages| pages.clone().into())
    }

    /// The rest of RAM.
    fn own_ram(&self) -> Vec<GfnRange> {
        let mut others: Vec<GfnRange> = self.not_own().collect();
        others.sort_unstable_by_key(|pages| pages.start());
        without(&self.ram, &others)
    }

    /// What is mapped, sorted; neighbours that continue each other are one.
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        self.runs.joined()
    }
}

impl Window for HostWindow {
    fn read_scratch(&self, scratch: StoreId, first: Gfn, buf: &mut [u8]) -> io::Result<()> {
        self.scratches.read(scratch, first, buf)
    }

    fn leave_scratch(&mut self, scratch: StoreId, pages: GfnRange) {
        self.scratches.leave(scratch, pages);
    }

    fn drop_scratch(&mut self, scratch: StoreId) {
        self.scratches.drop(scratch);
    }

    fn zero(&mut self, pages: GfnRange) {
        let Some(uffd) = &self.uffd else { return };
        for (range, source) in self.runs.within(pages) {
            let Source::Store { .. } = source else { continue };
            let done = self.area.host(range).and_then(|(start, len)| uffd.zero(start, len));
            if let Err(error) = done {
                log::error!("UFFDIO_ZEROPAGE of guest pages {range:?}: {error}");
            }
        }
        self.wake(pages);
    }

    fn supply(&mut self, gfn: Gfn, page: &[u8]) -> io::Result<()> {
        let uffd = self.uffd.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let (start, _) = self.area.host(GfnRange::new(gfn, PageCount(1)))?;
        uffd.supply(start, page)
    }

    fn protect(&mut self, pages: GfnRange, protection: Protection) -> io::Result<()> {
        self.set_protection(pages, protection)
    }

    fn wake(&mut self, pages: GfnRange) {
        let Some(uffd) = &self.uffd else { return };
        if let Err(error) = self.area.host(pages).and_then(|(start, len)| uffd.wake(start, len)) {
            log::error!("UFFDIO_WAKE of guest pages {pages:?}: {error}");
        }
    }

    fn fail(&mut self, failure: Failure) {
        log::error!("{failure}: the VM must not run on");
        self.failures.push(failure);
    }
}

impl Drop for HostWindow {
    fn drop(&mut self) {
        if let Err(error) = self.retire() {
            log::error!("memory of a window that ends: {error}");
            // Without its traps, whoever touches it would plant pages of zeros in stores that others see.
            std::mem::forget(self.uffd.take());
        }
    }
}

impl fmt::Debug for HostWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostWindow({:#x}, {} runs)", self.base(), self.runs.count())
    }
}
