//! Tries to write to a store: the server's check that a VM process cannot.
#![allow(unsafe_code)] // tries to map a descriptor in a way that must be refused

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl, open};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::ftruncate;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The ways by which the descriptor let itself be written to, or become writable. None, if all is well.
pub(super) fn ways_to_write(store: BorrowedFd<'_>) -> Vec<String> {
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let attempts: [(&str, bool); 6] = [
        ("open it again through /proc", reopens(store)),
        ("change its mode, then open it again", fchmod(store, Mode::S_IRWXU).is_ok() && reopens(store)),
        ("map it shared and writable", maps_shared(store)),
        ("truncate it", ftruncate(store, 0).is_ok()),
        ("punch a hole", fallocate(store, punch, 0, 4096).is_ok()),
        ("seal it", fcntl(store, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_ok()),
    ];
    attempts.iter().filter(|(_, worked)| *worked).map(|(way, _)| (*way).to_owned()).collect()
}

fn reopens(store: BorrowedFd<'_>) -> bool {
    let path = format!("/proc/self/fd/{}", store.as_raw_fd());
    open(path.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).is_ok()
}

fn maps_shared(store: BorrowedFd<'_>) -> bool {
    let page = NonZeroUsize::new(guest_mem::PAGE_SIZE).expect("a page is not empty");
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: A new mapping at an address of the kernel's choice disturbs nothing; nobody touches it.
    let mapped = unsafe { mmap(None, page, access, MapFlags::MAP_SHARED, store, 0) };
    // SAFETY: The mapping is the one just made.
    mapped.is_ok_and(|at| unsafe { munmap(at, page.get()) }.is_ok())
}
