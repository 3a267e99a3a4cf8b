//! Traps for touches of missing pages.
#![allow(unsafe_code)] // ioctls of userfaultfd(2), whose structures come from the kernel's headers

use super::inject;
use crate::addr::PAGE_SIZE;
use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_MISSING_SHMEM, UFFD_PAGEFAULT_FLAG_WRITE,
    UFFDIO_REGISTER_MODE_MISSING, uffd_msg, uffdio_api, uffdio_copy, uffdio_range, uffdio_register, uffdio_zeropage,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_ZEROPAGE};
use std::fs::OpenOptions;
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// `_IO(USERFAULTFD_IOC, 0)` of `/dev/userfaultfd`, which the headers' generator leaves out.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// What a guest was about to do to the page that it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Touch {
    /// To read it, as far as is known.
    Read,
    /// To write it. A hint: KVM asks for write on some reads.
    Write,
}

/// A touch of a missing page, whose thread waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultEvent {
    /// The host address that was touched.
    pub address: u64,
    /// What the touch said that it would do.
    pub touch: Touch,
}

/// A descriptor that traps touches of missing pages in ranges of the address space it was made in. Whoever holds a
/// duplicate, in any process, may read the traps and answer them.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// Traps for this process's address space, kernel-mode touches included (KVM's are).
    ///
    /// # Errors
    /// This user may neither open `/dev/userfaultfd` nor make one without it, or the kernel cannot trap shared memory.
    pub fn new() -> io::Result<Self> {
        let uffd = Self(Self::open()?);
        let mut api = uffdio_api { api: UFFD_API.into(), features: UFFD_FEATURE_MISSING_SHMEM.into(), ioctls: 0 };
        uffd.update(UFFDIO_API, &mut api)?;
        Ok(uffd)
    }

    fn open() -> io::Result<OwnedFd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
            // SAFETY: The request takes plain flags and returns a descriptor.
            Ok(device) => unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW, flags as libc::c_ulong) },
            // SAFETY: The call takes plain flags and returns a descriptor.
            Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as i32 },
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: The descriptor is new and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// A userfaultfd that another process made and sent.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// From now on touches of missing pages in these bytes trap. They must be mapped.
    ///
    /// # Errors
    /// A part is not mapped, is of a kind that cannot trap, or is another userfaultfd's.
    pub fn register(&self, start: u64, len: usize) -> io::Result<()> {
        inject::check()?;
        let range = uffdio_range { start, len: len as u64 };
        let mut register = uffdio_register { range, mode: UFFDIO_REGISTER_MODE_MISSING.into(), ioctls: 0 };
        self.update(UFFDIO_REGISTER, &mut register)
    }

    /// Touches of missing pages in these bytes trap no more. Wakes who waits for them: they touch again, untrapped.
    ///
    /// # Errors
    /// A part is not mapped.
    pub fn unregister(&self, start: u64, len: usize) -> io::Result<()> {
        inject::check()?;
        let range = uffdio_range { start, len: len as u64 };
        // SAFETY: The request reads a range.
        let result = unsafe { ioctl_with_ref(self, UFFDIO_UNREGISTER.into(), &range) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Wakes who waits for these bytes.
    ///
    /// # Errors
    /// The address space is gone.
    pub fn wake(&self, start: u64, len: usize) -> io::Result<()> {
        let range = uffdio_range { start, len: len as u64 };
        // SAFETY: The request reads a range.
        let result = unsafe { ioctl_with_ref(self, UFFDIO_WAKE.into(), &range) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Puts zero pages where no page is mapped in these registered bytes; pages that are there stay. Wakes nobody.
    ///
    /// # Errors
    /// A part is not registered, or memory is short. What came before it is done.
    pub fn zero(&self, start: u64, len: usize) -> io::Result<()> {
        use linux_raw_sys::general::UFFDIO_ZEROPAGE_MODE_DONTWAKE;
        let end = start + len as u64;
        let (mut at, mut most) = (start, len as u64);
        while at < end {
            let range = uffdio_range { start: at, len: most.min(end - at) };
            let mode = UFFDIO_ZEROPAGE_MODE_DONTWAKE.into();
            let mut zero = uffdio_zeropage { range, mode, zeropage: 0 };
            let done = match self.update(UFFDIO_ZEROPAGE, &mut zero) {
                Ok(()) => range.len,
                // What neighbours in the books may be two mappings, to which no call supplies anything: page by page, then.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) && range.len > PAGE_SIZE as u64 => {
                    most = PAGE_SIZE as u64;
                    continue;
                }
                Err(error) => stopped(error, zero.zeropage)?,
            };
            (at, most) = (at + done, len as u64);
        }
        Ok(())
    }

    /// Whether the address space is gone. `start` is a page of it that may get zeros if it is not.
    pub fn is_orphaned(&self, start: u64) -> bool {
        self.zero(start, PAGE_SIZE).is_err_and(|error| error.raw_os_error() == Some(libc::ESRCH))
    }

    /// Puts a copy of whole pages, in memory of the process that calls, where no page is mapped in these registered bytes.
    /// Where a file is mapped privately they are private pages, as if they had been written, whatever the file has there.
    /// Wakes nobody.
    ///
    /// # Errors
    /// `AlreadyExists`: a page is there. Otherwise the bytes are not registered, or memory is short.
    pub fn supply(&self, start: u64, pages: &[u8]) -> io::Result<()> {
        self.copy(start, pages).map_err(|(_, error)| error)
    }

    /// Copies whole pages to `dst` in this process, where none may be yet. Wakes nobody.
    ///
    /// # Errors
    /// How many bytes were copied, and what stopped it: `EEXIST` says that a page is there.
    pub(crate) fn copy(&self, dst: u64, pages: &[u8]) -> Result<(), (usize, io::Error)> {
        use linux_raw_sys::general::UFFDIO_COPY_MODE_DONTWAKE;
        inject::check().map_err(|error| (0, error))?;
        let mut done = 0;
        while done < pages.len() {
            let rest = &pages[done..];
            let mut copy = uffdio_copy {
                dst: dst + done as u64,
                src: rest.as_ptr() as u64,
                len: rest.len() as u64,
                mode: UFFDIO_COPY_MODE_DONTWAKE.into(),
                copy: 0,
            };
            match self.update(UFFDIO_COPY, &mut copy) {
                Ok(()) => done = pages.len(),
                Err(_) if copy.copy > 0 => done += copy.copy as usize,
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err((done, error)),
            }
        }
        Ok(())
    }

    /// The traps that wait to be read, up to `limit`, appended to `traps`. Never waits, whatever flags another holder of the
    /// descriptor has set: duplicates share them.
    ///
    /// # Errors
    /// Of `preadv2`, but for "nothing there".
    pub fn read(&self, traps: &mut Vec<FaultEvent>, limit: usize) -> io::Result<()> {
        const BATCH: usize = 32;
        let mut room = [MaybeUninit::<uffd_msg>::zeroed(); BATCH];
        let bytes = limit.min(BATCH) * mem::size_of::<uffd_msg>();
        let there = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: bytes };
        let fd = self.0.as_raw_fd();
        // SAFETY: The kernel writes at most `bytes` bytes, which the array has.
        let mut got = unsafe { libc::preadv2(fd, &raw const there, 1, -1, libc::RWF_NOWAIT) };
        if got < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
            // Before Linux 6.11 the flag is all there is: who clears it at the wrong moment still makes us wait.
            // SAFETY: The calls take plain flags; the kernel writes at most `bytes` bytes, which the array has.
            got = unsafe {
                libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK);
                libc::read(fd, there.iov_base, bytes)
            };
        }
        if got < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(()) } else { Err(error) };
        }
        for message in &room[..got as usize / mem::size_of::<uffd_msg>()] {
            // SAFETY: All bytes are initialised (zeroed), and every bit pattern is a message.
            let message = unsafe { message.assume_init() };
            if u32::from(message.event) == UFFD_EVENT_PAGEFAULT {
                // SAFETY: The event says which member of the union holds.
                let fault = unsafe { message.arg.pagefault };
                let writes = fault.flags & u64::from(UFFD_PAGEFAULT_FLAG_WRITE) != 0;
                let touch = if writes { Touch::Write } else { Touch::Read };
                traps.push(FaultEvent { address: fault.address & !(PAGE_SIZE as u64 - 1), touch });
            }
        }
        Ok(())
    }

    fn update<T>(&self, request: u32, argument: &mut T) -> io::Result<()> {
        // SAFETY: The callers, all in this file, pass the structure that belongs to the request.
        let result = unsafe { ioctl_with_mut_ref(self, request.into(), argument) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// How far to go on after a request that stopped part-way: past what it did, or past the page that was there already.
fn stopped(error: io::Error, done: i64) -> io::Result<u64> {
    match error.raw_os_error() {
        _ if done > 0 => Ok(done as u64),
        Some(libc::EEXIST) => Ok(PAGE_SIZE as u64),
        Some(libc::EAGAIN) => Ok(0),
        _ => Err(error),
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Userfaultfd {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}
