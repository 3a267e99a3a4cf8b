//! A stretch of this process's addresses that mirrors guest-physical space.
#![allow(unsafe_code)] // mmap and its relatives: every call stays within an area that this type owns

use super::inject;
use crate::addr::{Gfn, GfnRange, PAGE_SIZE, PageCount, PageIndex};
use std::any::Any;
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::{io, ptr};
use vm_memory::bitmap::NewBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, VolatileSlice};

/// Where an [`Area`] goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where the kernel finds room. The area's addresses stay reserved to its end.
    Anywhere,
    /// At this address, which must be free and far from where the kernel places mappings of its own choice: nothing holds
    /// the addresses but that nobody else asks for them. Mapping into an empty range is cheaper than over a reservation.
    Fixed(u64),
}

/// What may be done with mapped pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapAccess {
    /// Nothing: a touch is an error.
    None,
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// What the kernel is told about mapped pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Huge pages are welcome.
    Huge,
    /// No huge pages, whatever the system's setting: one write must not make 512 pages private.
    Small,
    /// Private copies are not needed any more: what lies beneath shows again.
    DropPrivate,
    /// All of them will be written: supply them now.
    Populate,
}

/// Addresses that mirror guest-physical space from frame 0: frame `g` stands at `base + g * 4096`.
///
/// An area owns its addresses: nothing else in the process maps, unmaps or refers to them, and no reference into them is
/// ever made (guest bytes are touched by volatile access alone). All methods take guest frames and refuse those beyond
/// the area. Dropping it unmaps everything, but not before the last clone of its [guest memory](Self::guest_memory) has
/// gone: until then the addresses are nobody else's.
#[derive(Debug)]
pub struct Area {
    base: u64,
    frames: GfnRange,
    place: Place,
    /// Regions that were given out. They hold no mapping, and whoever has one may touch what is mapped here.
    lent: Vec<Lent>,
}

type Lent = Arc<dyn Any + Send + Sync>;

/// What is left of an area whose guest memory somebody still holds.
#[derive(Debug)]
struct Remains {
    base: u64,
    len: usize,
    lent: Vec<Lent>,
}

/// Areas to be unmapped as soon as nobody holds their memory. The regions' own type has no room for a guard, so it is looked
/// at whenever an area ends.
static REMAINS: Mutex<Vec<Remains>> = Mutex::new(Vec::new());

impl Remains {
    /// Whether somebody still holds a region, or could get hold of one. Nobody can once this has said no: ours is the
    /// last.
    fn is_lent(&mut self) -> bool {
        self.lent.iter_mut().any(|region| Arc::get_mut(region).is_none())
    }
}

/// Both ends of an area are multiples of this (1 GiB), so that moving pages between two areas moves whole page tables.
const ALIGN: u64 = 1 << 30;

impl Area {
    /// Reserves room for the frames from 0 to `frames`.
    ///
    /// # Errors
    /// There is no room, or with [`Place::Fixed`] something stands there already.
    pub fn reserve(place: Place, frames: PageCount) -> io::Result<Self> {
        let span = Self::span(frames);
        let base = match place {
            Place::Fixed(base) => {
                let at = reserve_at(base, span as usize, libc::MAP_FIXED_NOREPLACE)?;
                unmap_raw(at, span as usize)?;
                if at != base {
                    // A kernel that does not know MAP_FIXED_NOREPLACE takes the address as a hint.
                    return Err(io::Error::from_raw_os_error(libc::EEXIST));
                }
                base
            }
            Place::Anywhere => {
                let at = reserve_at(0, (span + ALIGN) as usize, 0)?;
                let base = at.next_multiple_of(ALIGN);
                let (head, tail) = ((base - at) as usize, (at + ALIGN - base) as usize);
                for (start, len) in [(at, head), (base + span, tail)] {
                    if len > 0 {
                        unmap_raw(start, len)?;
                    }
                }
                base
            }
        };
        Ok(Self { base, frames: GfnRange::new(Gfn(0), PageCount(span / PAGE_SIZE as u64)), place, lent: Vec::new() })
    }

    /// How many bytes of addresses an area of so many frames takes: whole GiB.
    pub fn span(frames: PageCount) -> u64 {
        frames.bytes().next_multiple_of(ALIGN).max(ALIGN)
    }

    /// The host address of guest frame 0.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// All its frames.
    pub fn frames(&self) -> GfnRange {
        self.frames
    }

    /// The host address where `range` starts, and its length in bytes.
    ///
    /// # Errors
    /// `ERANGE`: it is not within the area.
    pub fn host(&self, range: GfnRange) -> io::Result<(u64, usize)> {
        if range.intersect(self.frames) != range {
            return Err(io::Error::from_raw_os_error(libc::ERANGE));
        }
        Ok((self.base + range.start().gpa(), range.len_bytes()))
    }

    /// Unmaps what is there; the addresses stay the area's.
    ///
    /// # Errors
    /// Of `munmap` or `mmap`.
    pub fn clear(&self, range: GfnRange) -> io::Result<()> {
        let (start, len) = self.host(range)?;
        match self.place {
            Place::Fixed(_) => unmap_raw(start, len),
            Place::Anywhere => self.map(range, MapAccess::None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
        }
    }

    /// Maps private zero-filled memory.
    ///
    /// # Errors
    /// Of `mmap`; nothing has changed.
    pub fn map_anonymous(&self, range: GfnRange) -> io::Result<()> {
        self.map(range, MapAccess::ReadWrite, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)
    }

    /// Maps `file` privately, its page `first` at the start of the range.
    ///
    /// # Errors
    /// Of `mmap`; nothing has changed.
    pub fn map_private(
        &self,
        range: GfnRange,
        file: BorrowedFd<'_>,
        first: PageIndex,
        access: MapAccess,
    ) -> io::Result<()> {
        self.map(range, access, libc::MAP_PRIVATE, Some((file, first)))
    }

    /// Maps `file`, which can be written, shared, its page `first` at the start of the range.
    ///
    /// # Errors
    /// Of `mmap`; nothing has changed.
    pub(crate) fn map_shared(&self, range: GfnRange, file: BorrowedFd<'_>, first: PageIndex) -> io::Result<()> {
        self.map(range, MapAccess::ReadWrite, libc::MAP_SHARED, Some((file, first)))
    }

    fn map(
        &self,
        range: GfnRange,
        access: MapAccess,
        flags: i32,
        file: Option<(BorrowedFd<'_>, PageIndex)>,
    ) -> io::Result<()> {
        let (start, len) = self.host(range)?;
        let (fd, offset) = file.map_or((-1, 0), |(fd, first)| (fd.as_raw_fd(), first.offset()));
        let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        inject::check()?;
        let flags = flags | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: The range lies within this area, whose addresses nobody else uses and nobody refers to.
        let at = unsafe { libc::mmap(start as *mut libc::c_void, len, access.bits(), flags, fd, offset) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Changes what may be done with mapped pages.
    ///
    /// # Errors
    /// Of `mprotect`; part of the range may have changed.
    pub fn protect(&self, range: GfnRange, access: MapAccess) -> io::Result<()> {
        let (start, len) = self.host(range)?;
        inject::check()?;
        // SAFETY: The range lies within this area; nobody holds a reference into it.
        check(unsafe { libc::mprotect(start as *mut libc::c_void, len, access.bits()) })
    }

    /// Gives advice about mapped pages.
    ///
    /// # Errors
    /// Of `madvise`.
    pub fn advise(&self, range: GfnRange, advice: Advice) -> io::Result<()> {
        let (start, len) = self.host(range)?;
        inject::check()?;
        // SAFETY: The range lies within this area; no advice that is given here can affect memory elsewhere.
        check(unsafe { libc::madvise(start as *mut libc::c_void, len, advice.bits()) })
    }

    /// Gives advice that a kernel may refuse, or not know: nothing depends on it.
    pub fn hint(&self, range: GfnRange, advice: Advice) {
        if let Err(error) = self.advise(range, advice) {
            log::debug!("{advice:?} advice for pages {range:?}: {error}");
        }
    }

    /// Moves the pages of `range`, which one mapping holds, to the same place in `to`. Page tables move, bytes do not. What
    /// is left behind must be mapped anew before it is touched.
    ///
    /// # Errors
    /// Of `mremap`; nothing has changed. `EFAULT`: it is not one mapping.
    pub fn move_to(&self, to: &Self, range: GfnRange) -> io::Result<()> {
        self.carry(range, to, range)
    }

    /// The same, to another place in this area.
    ///
    /// # Errors
    /// As [`move_to`](Self::move_to).
    pub fn move_within(&self, range: GfnRange, to: GfnRange) -> io::Result<()> {
        self.carry(range, self, to)
    }

    fn carry(&self, range: GfnRange, to: &Self, place: GfnRange) -> io::Result<()> {
        let (from, len) = self.host(range)?;
        let (there, _) = to.host(place)?;
        let stays = match self.place {
            Place::Fixed(_) => 0,
            // The kernel would give the addresses to the next who asks for some, a thread for its stack, say.
            Place::Anywhere => libc::MREMAP_DONTUNMAP,
        };
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | stays;
        inject::check()?;
        // SAFETY: Both ranges lie within areas whose addresses nobody else uses and nobody refers to.
        let at = unsafe { libc::mremap(from as *mut libc::c_void, len, len, flags, there as *mut libc::c_void) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The memory of `ram` as vm-memory sees it, with a bitmap of the caller's choice. Whoever holds it, or a clone,
    /// touches mapped frames only. It may outlive the area: what is mapped there at the area's end stays.
    ///
    /// # Errors
    /// A range is not within the area, or the ranges overlap.
    pub fn guest_memory<B>(&mut self, ram: &[GfnRange]) -> io::Result<GuestMemoryMmap<B>>
    where
        B: NewBitmap + Send + Sync + 'static,
    {
        let mut regions = Vec::new();
        for range in ram {
            let (start, len) = self.host(*range)?;
            let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            // SAFETY: The range lies within this area, which stays for as long as the region is lent. That only mapped frames
            // are touched is the holder's duty, as documented: vm-memory makes no reference to guest bytes, an unmapped page
            // means a signal.
            let region = unsafe { MmapRegion::build_raw(start as *mut u8, len, MapAccess::ReadWrite.bits(), flags) };
            let region = Arc::new(region.map_err(io::Error::other)?);
            self.lent.push(Arc::clone(&region) as Lent);
            let region = GuestRegionMmap::with_arc(region, GuestAddress(range.start().gpa()));
            regions.push(region.ok_or_else(|| io::Error::from_raw_os_error(libc::ERANGE))?);
        }
        GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)
    }

    /// Copies out pages that are mapped and can be read.
    ///
    /// # Errors
    /// The range is not within the area.
    pub fn copy_out(&self, first: Gfn, buf: &mut [u8]) -> io::Result<()> {
        let (start, len) = self.host(GfnRange::new(first, PageCount::covering(buf.len() as u64)))?;
        debug_assert_eq!(len, buf.len(), "whole pages");
        // SAFETY: The range lies within this area, nobody has a reference into it, and the slice is gone at the end of
        // this function. An unmapped page means a signal, not a wrong access.
        let slice: VolatileSlice<'_> = unsafe { VolatileSlice::new(start as *mut u8, buf.len()) };
        slice.copy_to(buf);
        Ok(())
    }
}

impl Area {
    /// Copies stretches of pages, which are mapped and which nobody writes, each to the frames of `to` from the one beside it
    /// on, where writable ones are mapped.
    ///
    /// # Errors
    /// `ERANGE`: one is not within its area. Some before it have been copied.
    pub fn copy_to(&self, to: &Self, stretches: &[(GfnRange, Gfn)]) -> io::Result<()> {
        for (index, &(pages, at)) in stretches.iter().enumerate() {
            let (from, len) = self.host(pages)?;
            let (there, _) = to.host(GfnRange::new(at, pages.count()))?;
            if let Some((next, _)) = stretches.get(index + 1) {
                prefetch(self.host(*next)?.0);
            }
            // SAFETY: Both ranges lie within areas, into which nobody has a reference. An unmapped page means a signal, not
            // a wrong access.
            unsafe { ptr::copy(from as *const u8, there as *mut u8, len) };
        }
        Ok(())
    }
}

/// Has the processor look up an address and fetch the first bytes there: by itself it does so within a page only.
fn prefetch(address: u64) {
    const LINE: u64 = 64;
    for line in 0..8 {
        // SAFETY: A hint. It never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>((address + line * LINE) as *const i8) };
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        let ends = Remains { base: self.base, len: self.frames.len_bytes(), lent: std::mem::take(&mut self.lent) };
        let mut remains = REMAINS.lock().unwrap_or_else(PoisonError::into_inner);
        remains.push(ends);
        remains.retain_mut(|ends| {
            let stays = ends.is_lent();
            if !stays && let Err(error) = unmap_raw(ends.base, ends.len) {
                log::error!("munmap of the area at {:#x}: {error}", ends.base);
            }
            stays
        });
    }
}

impl MapAccess {
    fn bits(self) -> i32 {
        match self {
            Self::None => libc::PROT_NONE,
            Self::Read => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

impl Advice {
    fn bits(self) -> i32 {
        match self {
            Self::Huge => libc::MADV_HUGEPAGE,
            Self::Small => libc::MADV_NOHUGEPAGE,
            Self::DropPrivate => libc::MADV_DONTNEED,
            Self::Populate => libc::MADV_POPULATE_WRITE,
        }
    }
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn reserve_at(at: u64, len: usize, extra_flags: i32) -> io::Result<u64> {
    let hint = if at == 0 { ptr::null_mut() } else { at as *mut libc::c_void };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | extra_flags;
    inject::check()?;
    // SAFETY: Without MAP_FIXED the call replaces no mapping.
    let got = unsafe { libc::mmap(hint, len, libc::PROT_NONE, flags, -1, 0) };
    if got == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(got as u64) }
}

/// Only for addresses that an area owns.
fn unmap_raw(at: u64, len: usize) -> io::Result<()> {
    // SAFETY: The callers, all in this file, pass addresses of an area or of a reservation just made for one.
    check(unsafe { libc::munmap(at as *mut libc::c_void, len) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryBackend;

    #[test]
    fn a_fixed_place_that_is_taken_is_refused() {
        let first = Area::reserve(Place::Anywhere, PageCount(16)).unwrap();
        let error = Area::reserve(Place::Fixed(first.base()), PageCount(16)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(first.base() % ALIGN, 0);
    }

    /// The next area was given the same addresses, and whoever had the memory of the one before wrote into it.
    #[test]
    fn an_area_lasts_as_long_as_its_memory() {
        let ram = [GfnRange::new(Gfn(0), PageCount(4)), GfnRange::new(Gfn(8), PageCount(4))];
        let mut area = Area::reserve(Place::Anywhere, PageCount(12)).unwrap();
        let base = area.base();
        let memory: GuestMemoryMmap = area.guest_memory(&ram).unwrap();
        ram.iter().for_each(|&range| area.map_anonymous(range).unwrap());
        // A region alone, and what it is made of, are enough.
        let mapping = memory.iter().last().unwrap().get_mmap();
        drop((area, memory));
        let taken = |base| Area::reserve(Place::Fixed(base), PageCount(12)).map(drop).map_err(|e| e.raw_os_error());
        assert_eq!(taken(base), Err(Some(libc::EEXIST)));
        drop(mapping);
        drop(Area::reserve(Place::Anywhere, PageCount(1)).unwrap());
        assert_eq!(taken(base), Ok(()));
    }

    #[test]
    fn frames_beyond_the_area_are_refused() {
        let area = Area::reserve(Place::Anywhere, PageCount(16)).unwrap();
        let beyond = GfnRange::new(Gfn(ALIGN / PAGE_SIZE as u64 - 1), PageCount(2));
        assert_eq!(area.map_anonymous(beyond).unwrap_err().raw_os_error(), Some(libc::ERANGE));
    }
}
