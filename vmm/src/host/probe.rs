//! Kernel features that can only be found by trying. The raw calls that this takes are why `unsafe` is allowed here;
//! none of them passes memory but `userfaultfd_features`.

#![allow(unsafe_code)]

use linux_raw_sys::general::{UFFD_API, uffdio_api};
use linux_raw_sys::ioctl::UFFDIO_API;
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, chroot, fork};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// `_IO(0xAA, 0)`
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// The features (`UFFD_FEATURE_*`) of a userfaultfd that serves traps from KVM, which are traps from kernel mode.
pub fn userfaultfd() -> io::Result<u64> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let raw: RawFd = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: the argument is a number.
        Ok(device) => Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) })?,
        // SAFETY: the argument is a number.
        Err(_) => Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })? as RawFd,
    };
    // SAFETY: the kernel has just made it, for nobody else.
    let uffd = unsafe { OwnedFd::from_raw_fd(raw) };
    let mut api = uffdio_api { api: UFFD_API.into(), features: 0, ioctls: 0 };
    // SAFETY: the request takes a pointer to exactly this structure, which outlives the call.
    Errno::result(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API.into(), &mut api) })?;
    Ok(api.features)
}

/// Whether a process can be ended for a system call that it is not to make.
pub fn system_call_filter() -> io::Result<()> {
    let action: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the call reads a number.
    let known = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    Ok(Errno::result(known).map(drop)?)
}

/// Whether the pagemap has the `PAGEMAP_SCAN` ioctl.
pub fn pagemap_scan() -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    // SAFETY: with no argument, a kernel that knows the request fails on reading it, and another one before.
    match Errno::result(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, std::ptr::null::<u8>()) }) {
        Err(Errno::EFAULT) => Ok(()),
        Err(e) => Err(e.into()),
        Ok(_) => Err(io::Error::other("PAGEMAP_SCAN took no argument for one")),
    }
}

/// Whether a process may enter a user namespace of its own and change its root directory there. (Some systems allow the
/// first, and then take the capabilities away that the second needs.)
pub fn user_namespace() -> io::Result<()> {
    // SAFETY: the child makes system calls only, and allocates nothing.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let tried = unshare(CloneFlags::CLONE_NEWUSER).and_then(|()| chroot(c"/"));
            // SAFETY: nothing of the parent's is to be run or flushed here.
            unsafe { libc::_exit(tried.err().map_or(0, |errno| errno as i32)) }
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, errno) => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(io::Error::other("the trial process was killed")),
        },
    }
}
