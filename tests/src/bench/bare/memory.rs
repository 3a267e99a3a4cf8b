//! Guest memory: a stretch of addresses of our own, and what is mapped there.
#![allow(unsafe_code)] // mmap, munmap and mremap of addresses that a window owns; volatile access to them

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// Windows stand in a row from here on, far from where the kernel places mappings of its own choice.
const FIRST: u64 = 0x1000_0000_0000;
/// As far apart as the largest is, twice.
const STRIDE: u64 = 1 << 36;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A memfd.
#[derive(Debug)]
pub struct MemoryFile(File);

impl MemoryFile {
    /// An empty one of `len` bytes.
    pub fn new(len: u64) -> io::Result<Self> {
        // SAFETY: The name is a C string.
        let fd = unsafe { libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: The descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len)?;
        Ok(Self(file))
    }

    /// Writes bytes.
    pub fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, at)
    }
}

impl AsRawFd for MemoryFile {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// What a window, or a part of it, is to show.
#[derive(Clone, Copy, Debug)]
pub enum Show<'a> {
    /// Memory of its own.
    Anonymous,
    /// The file, page for page; writes go to it.
    Shared(&'a MemoryFile),
    /// The file, page for page; writes stay here.
    Private(&'a MemoryFile),
}

/// Guest-physical address space in this process: guest address `g` stands at `base + g`.
#[derive(Debug)]
pub struct Window {
    base: u64,
    len: u64,
}

impl Window {
    /// Room for `len` bytes, with nothing in it.
    pub fn reserve(len: u64) -> io::Result<Self> {
        assert!(len < STRIDE / 2, "a window of {len} bytes");
        let base = FIRST + NEXT.fetch_add(1, Ordering::Relaxed) * STRIDE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: Replaces no mapping.
        let place = unsafe { libc::mmap(base as *mut _, len as usize, libc::PROT_NONE, flags, -1, 0) };
        if place as u64 != base {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base, len })
    }

    /// Room for `len` bytes that shows something.
    pub fn showing(len: u64, show: Show<'_>) -> io::Result<Self> {
        let window = Self::reserve(len)?;
        window.map(0, len, show)?;
        Ok(window)
    }

    /// Host address of guest address 0.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Takes away what is mapped, and keeps the addresses: nobody else is given any from this far down.
    pub fn vacate(&self) -> io::Result<()> {
        // SAFETY: The range is ours, and no reference into it exists.
        check(unsafe { libc::munmap(self.base as *mut _, self.len as usize) })
    }

    /// Maps `len` bytes at guest address `at`, over what is there.
    pub fn map(&self, at: u64, len: u64, show: Show<'_>) -> io::Result<()> {
        self.check(at, len);
        let (flags, fd, offset) = match show {
            Show::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
            Show::Shared(file) => (libc::MAP_SHARED, file.as_raw_fd(), at),
            Show::Private(file) => (libc::MAP_PRIVATE, file.as_raw_fd(), at),
        };
        let flags = flags | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: The range is ours, and no reference into it exists.
        let place =
            unsafe { libc::mmap((self.base + at) as *mut _, len as usize, access, flags, fd, offset as libc::off_t) };
        if place == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Moves what is mapped at `at` to the same place in `other`.
    pub fn move_to(&self, other: &Self, at: u64, len: u64) -> io::Result<()> {
        self.check(at, len);
        other.check(at, len);
        let (from, to, len) = ((self.base + at) as *mut _, (other.base + at) as *mut libc::c_void, len as usize);
        // SAFETY: Both ranges are ours, and no reference into them exists.
        let place = unsafe { libc::mremap(from, len, len, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to) };
        if place == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Copies bytes in.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.check(at, bytes.len() as u64);
        for (to, byte) in (self.base + at..).zip(bytes) {
            // SAFETY: The range is ours and mapped by the caller; the guest that may look at it meanwhile stands still.
            unsafe { ptr::write_volatile(to as *mut u8, *byte) };
        }
    }

    /// Copies bytes out.
    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        self.check(at, bytes.len() as u64);
        for (from, byte) in (self.base + at..).zip(bytes) {
            // SAFETY: As above.
            *byte = unsafe { ptr::read_volatile(from as *const u8) };
        }
    }

    /// A number of 8 bytes.
    pub fn set_u64(&self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    /// A number of 4 bytes.
    pub fn set_u32(&self, at: u64, value: u32) {
        self.write(at, &value.to_le_bytes());
    }

    /// A number of 4 bytes.
    pub fn u32_at(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn check(&self, at: u64, len: u64) {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "{len} bytes at {at:#x} of {:#x}", self.len);
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // It fails for ranges that are none only.
        let _ = self.vacate();
    }
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
