//! This process's own heap.
#![allow(unsafe_code)] // one call that the C library offers and no crate wraps

/// Gives freed memory back to the host, as far as the allocator keeps any.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, may be called at any time from any thread, and changes no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
