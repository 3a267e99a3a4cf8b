//! This process's own heap.
#![allow(unsafe_code)] // calls that the C library offers and no crate wraps

/// Gives freed memory back to the host, as far as the allocator keeps any.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, may be called at any time from any thread, and changes no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Has all threads that come allocate from the heap of the first. That is for processes of which there are many: a heap of
/// its own costs a thread three pages, with its page tables.
pub fn share() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes numbers, and changes where memory comes from that is not allocated yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Keeps memory that is freed for what is allocated next, up to some megabytes. Otherwise lists of some thousand entries are
/// mapped anew each time, and a freeze waits longer for their pages than for what is done with them.
pub fn keep() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes numbers, and changes where memory comes from that is not allocated yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 4 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 16 << 20);
    }
}
