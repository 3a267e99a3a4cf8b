//! The file behind a store.

use crate::addr::{PageCount, PageIndex, PageRange};
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::ftruncate;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// A memory file of fixed length. Its owner holds the only writable descriptor; everybody else gets
/// [read-only ones](Self::read_only), and its mode keeps other users from opening it again for writing.
#[derive(Debug)]
pub struct Memfd {
    file: OwnedFd,
    pages: PageCount,
}

impl Memfd {
    /// An empty file of `pages` pages, all of them holes.
    ///
    /// # Errors
    /// Of the system calls: too many descriptors, or no memory.
    pub fn new(name: &str, pages: PageCount) -> io::Result<Self> {
        let name = CString::new(name).map_err(io::Error::other)?;
        let file = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let len = i64::try_from(pages.bytes()).map_err(io::Error::other)?;
        ftruncate(&file, len)?;
        fchmod(&file, Mode::S_IRUSR)?;
        // A seal against writing would forbid punching holes as well.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(Self { file, pages })
    }

    /// Its length.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// A descriptor that cannot be written through, for a VM process.
    ///
    /// # Errors
    /// There is no `/proc`, or no descriptor is left.
    pub fn read_only(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)
    }

    /// Frees the pages from `first` on: they are holes again, in every window.
    ///
    /// # Errors
    /// Of `fallocate`.
    pub fn punch(&self, first: PageIndex, count: PageCount) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, flags, first.offset() as i64, count.bytes() as i64)?)
    }

    /// The file's pages as a range, for an [`Alias`](super::Alias) of it.
    pub(super) fn range(&self) -> PageRange {
        PageRange::new(PageIndex(0), self.pages)
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
