//! Traps for touches of missing pages, and for writes.
#![allow(unsafe_code)] // ioctls of userfaultfd(2)

use super::Window;
use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFDIO_COPY_MODE_DONTWAKE, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP,
    uffd_msg, uffdio_api, uffdio_copy, uffdio_range, uffdio_register, uffdio_writeprotect,
};
use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT,
};
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd};

/// `_IO(USERFAULTFD_IOC, 0)` of `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// `UFFDIO_WRITEPROTECT_MODE_WP`, which it leaves out as well.
const PROTECT: u64 = 1;

/// What is to be trapped.
#[derive(Clone, Copy, Debug)]
pub enum Trap {
    /// Touches of missing pages.
    Missing,
    /// Those, and writes to pages that are protected.
    MissingAndWrites,
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(File);

impl Uffd {
    /// One for this process.
    pub fn new() -> io::Result<Self> {
        let fd = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
            // SAFETY: The request takes plain flags and returns a descriptor.
            Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) },
            // SAFETY: The call takes plain flags and returns a descriptor.
            Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32 },
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: The descriptor is new and nobody else's.
        let uffd = Self(unsafe { File::from_raw_fd(fd) });
        let features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
        uffd.request(UFFDIO_API, &mut uffdio_api { api: UFFD_API.into(), features: features.into(), ioctls: 0 })?;
        Ok(uffd)
    }

    /// Traps in this part of a window.
    pub fn register(&self, window: &Window, at: u64, len: u64, trap: Trap) -> io::Result<()> {
        let mode = match trap {
            Trap::Missing => UFFDIO_REGISTER_MODE_MISSING,
            Trap::MissingAndWrites => UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
        };
        let range = range(window, at, len);
        self.request(UFFDIO_REGISTER, &mut uffdio_register { range, mode: mode.into(), ioctls: 0 })
    }

    /// Traps there no more.
    pub fn unregister(&self, window: &Window, at: u64, len: u64) -> io::Result<()> {
        self.request(UFFDIO_UNREGISTER, &mut range(window, at, len))
    }

    /// Protects a part against writes.
    pub fn write_protect(&self, window: &Window, at: u64, len: u64) -> io::Result<()> {
        let range = range(window, at, len);
        self.request(UFFDIO_WRITEPROTECT, &mut uffdio_writeprotect { range, mode: PROTECT })
    }

    /// Puts copies of pages where none are. Wakes nobody.
    pub fn copy(&self, window: &Window, at: u64, pages: &[u8]) -> io::Result<()> {
        let uffdio_range { start, len } = range(window, at, pages.len() as u64);
        let (src, mode) = (pages.as_ptr() as u64, UFFDIO_COPY_MODE_DONTWAKE.into());
        self.request(UFFDIO_COPY, &mut uffdio_copy { dst: start, src, len, mode, copy: 0 })
    }

    /// Wakes who waits there.
    pub fn wake(&self, window: &Window, at: u64, len: u64) -> io::Result<()> {
        self.request(UFFDIO_WAKE, &mut range(window, at, len))
    }

    /// Waits for a touch: its host address.
    pub fn read(&self) -> io::Result<u64> {
        loop {
            let mut message = MaybeUninit::<uffd_msg>::zeroed();
            // SAFETY: The kernel writes at most one message.
            let got = unsafe { libc::read(self.0.as_raw_fd(), message.as_mut_ptr().cast(), size_of::<uffd_msg>()) };
            if got < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: All bytes are initialised (zeroed), and every bit pattern is a message.
            let message = unsafe { message.assume_init() };
            if u32::from(message.event) == UFFD_EVENT_PAGEFAULT {
                // SAFETY: The event says which member of the union holds.
                return Ok(unsafe { message.arg.pagefault }.address);
            }
        }
    }

    fn request<T>(&self, request: u32, argument: &mut T) -> io::Result<()> {
        // SAFETY: The callers, all in this file, pass the structure that belongs to the request.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request.into(), argument) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn range(window: &Window, at: u64, len: u64) -> uffdio_range {
    uffdio_range { start: window.base() + at, len }
}
