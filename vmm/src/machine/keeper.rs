//! Sleeping processes that have this process's memory and nothing else, so that pages which have not settled outlive a VM
//! process that is killed: the keeper shares it, and a copy has it as it was, copy-on-write.
#![allow(unsafe_code)] // clone; nothing but raw system calls in the new processes

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::unistd::Pid;
use seccompiler::BpfProgram;
use std::arch::asm;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `SECCOMP_SET_MODE_FILTER`.
const SET_FILTER: usize = 1;

/// It makes system calls only, and has no signal handlers.
const STACK: usize = 4 << 10;

/// What the keeper is told: it stays where it is for as long as these addresses do.
struct Life {
    server: usize,
    rules: libc::sock_fprog,
}

/// Starts the keeper: a child of `server`, which ends it. It has no descriptors, makes no system calls but those that `rules`
/// allow, takes no signal but `SIGKILL`, and dies with the server.
///
/// # Errors
/// Of `clone`.
pub(super) fn start(server: Pid, rules: BpfProgram) -> Result<Pid, Errno> {
    // Its stack is never given back: it is in use for as long as these addresses are.
    let stack = Box::leak(Box::<[u128; STACK / size_of::<u128>()]>::new_uninit());
    let top = (&raw mut *stack).wrapping_add(1);
    let flags = libc::CLONE_VM | libc::CLONE_PARENT | libc::SIGCHLD;
    let rules = rules.leak();
    let rules = libc::sock_fprog { len: rules.len() as u16, filter: rules.as_mut_ptr().cast() };
    // Not whoever the parent is by now: where the server has just died, that is somebody who lives on.
    let life = Box::leak(Box::new(Life { server: server.as_raw() as usize, rules }));
    let life = (&raw mut *life).cast();
    // SAFETY: The stack is the keeper's alone and is never freed. `keep` shares this thread's thread-local storage and
    // touches none of it: it makes raw system calls only.
    let pid = without_signals(|| Errno::result(unsafe { libc::clone(keep, top.cast(), flags, life) }))?;
    Ok(Pid::from_raw(pid))
}

/// Ends a keeper that nobody has been told of.
pub(super) fn end(keeper: Pid) {
    if let Err(error) = kill(keeper, Signal::SIGKILL) {
        log::error!("end keeper {keeper}: {error}");
    }
}

/// Makes a copy of this process, which sleeps until the other end of `lifeline`, a pipe, is closed: whoever has that end
/// reads the memory, and is the copy's parent. It has no other descriptor, and takes no signal but `SIGKILL`.
///
/// # Errors
/// Of `clone`.
pub(super) fn copy(lifeline: BorrowedFd<'_>) -> Result<Pid, Errno> {
    let lifeline = lifeline.as_raw_fd() as usize;
    let flags = (libc::CLONE_PARENT | libc::SIGCHLD) as usize;
    without_signals(|| match system_call(libc::SYS_clone, [flags, 0, 0]) {
        0 => sleep(lifeline),
        pid => Errno::result(pid as libc::pid_t),
    })
    .map(Pid::from_raw)
}

/// The copy's life. Of its memory it touches its stack alone: no allocation, no panic.
fn sleep(lifeline: usize) -> ! {
    if lifeline > 0 {
        system_call(libc::SYS_close_range, [0, lifeline - 1, 0]);
    }
    system_call(libc::SYS_close_range, [lifeline + 1, u32::MAX as usize, 0]);
    let mut byte = 0_u8;
    // Nothing is ever written: this returns when the other end is closed.
    system_call(libc::SYS_read, [lifeline, (&raw mut byte).addr(), 1]);
    loop {
        system_call(libc::SYS_exit_group, [0; 3]);
    }
}

/// The processes that are made here have no signal handlers.
fn without_signals<T>(act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
    let done = act();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    done
}

/// The keeper's life. No allocation, no thread-local storage (not even `errno`), no panic.
extern "C" fn keep(life: *mut libc::c_void) -> libc::c_int {
    // SAFETY: It is the leaked one that `start` has passed, and nobody writes to it.
    let Life { server, rules } = unsafe { &*life.cast::<Life>() };
    // Whoever gets hold of this memory has the keeper do nothing but what it does.
    if system_call(libc::SYS_seccomp, [SET_FILTER, 0, (&raw const *rules).addr()]) != 0 {
        system_call(libc::SYS_exit, [1, 0, 0]);
    }
    let server = *server;
    system_call(libc::SYS_close_range, [0, u32::MAX as usize, 0]);
    system_call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as usize, libc::SIGKILL as usize, 0]);
    // The server may have died before that.
    while system_call(libc::SYS_getppid, [0; 3]) == server {
        system_call(libc::SYS_pause, [0; 3]);
    }
    system_call(libc::SYS_exit, [0; 3]);
    0
}

#[inline(always)]
fn system_call(number: libc::c_long, [first, second, third]: [usize; 3]) -> usize {
    let result: usize;
    // SAFETY: The calls made here (seccomp, which reads a filter that stays, close_range, prctl, getppid, pause, exit, exit_group, and clone without a stack, which
    // goes on with a copy of this one) touch no memory of this process, but for `read`, which gets a byte of the caller's
    // stack.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as usize => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") third,
            in("r10") 0,
            in("r8") 0,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}
