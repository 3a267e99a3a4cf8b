//! The keeper: a sleeping process that shares this process's memory and nothing else, so that pages which have not
//! settled outlive a VM process that is killed.
#![allow(unsafe_code)] // clone with shared memory; nothing but raw system calls in the keeper

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::Pid;
use std::arch::asm;

/// It makes system calls only, and has no signal handlers.
const STACK: usize = 4 << 10;

/// Starts the keeper: a child of `server`, which ends it. It has no descriptors, takes no signal but `SIGKILL`, and
/// dies with the server.
///
/// # Errors
/// Of `clone`.
pub(super) fn start(server: Pid) -> Result<Pid, Errno> {
    // Its stack is never given back: it is in use for as long as these addresses are.
    let stack = Box::leak(Box::<[u128; STACK / size_of::<u128>()]>::new_uninit());
    let top = (&raw mut *stack).wrapping_add(1);
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
    let flags = libc::CLONE_VM | libc::CLONE_PARENT | libc::SIGCHLD;
    // Not whoever the parent is by now: where the server has just died, that is somebody who lives on.
    let server = server.as_raw() as usize as *mut libc::c_void;
    // SAFETY: The stack is the keeper's alone and is never freed. `keep` shares this thread's thread-local storage and
    // touches none of it: it makes raw system calls only.
    let pid = Errno::result(unsafe { libc::clone(keep, top.cast(), flags, server) });
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    pid.map(Pid::from_raw)
}

/// The keeper's life. No allocation, no thread-local storage (not even `errno`), no panic.
extern "C" fn keep(server: *mut libc::c_void) -> libc::c_int {
    system_call(libc::SYS_close_range, [0, u32::MAX as usize, 0]);
    system_call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as usize, libc::SIGKILL as usize, 0]);
    // The server may have died before that.
    while system_call(libc::SYS_getppid, [0; 3]) == server as usize {
        system_call(libc::SYS_pause, [0; 3]);
    }
    system_call(libc::SYS_exit, [0; 3]);
    0
}

#[inline(always)]
fn system_call(number: libc::c_long, [first, second, third]: [usize; 3]) -> usize {
    let result: usize;
    // SAFETY: The calls made here (close_range, prctl, getppid, pause, exit) touch no memory of this process.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as usize => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") third,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}
