//! A process whose main thread makes the system calls that a test wants, as one that has been taken over could: with what it
//! really has, and under the rules that really hold for it. That takes root.
#![allow(unsafe_code)] // ptrace, which has no safe wrapper here

use crate::process::is_alive;
use crate::{Lack, TEN_SECONDS, is_root, skip, wait_until};
use libc::user_regs_struct;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::{self, OpenOptions};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

/// Such a process. It stands still until this is dropped, and goes on then, if it lives.
#[derive(Debug)]
pub struct Puppet {
    pid: i32,
    before: user_regs_struct,
    lives: bool,
}

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Called {
    /// It was made, and gave this.
    Gave(u64),
    /// It was made, and failed.
    Failed(Errno),
    /// The process was ended for it.
    Ended,
}

/// `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// What a new process does that nobody wants to do anything, by a call that VM processes may make: `test eax, eax; jnz end;
/// again: xor edi, edi; xor esi, esi; or edx, -1; mov eax, SYS_poll; syscall; jmp again; end:`.
const SLEEP: [u8; 20] =
    [0x85, 0xc0, 0x75, 0x10, 0x31, 0xff, 0x31, 0xf6, 0x83, 0xca, 0xff, 0xb8, 7, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf0];

impl Puppet {
    /// Takes a process that waits in a system call; none where this test may not, which is told loudly.
    #[must_use]
    pub fn take(pid: i32) -> Option<Self> {
        if !is_root() {
            skip(Lack::Root, "only root may trace other users' processes");
            return None;
        }
        if let Err(error) = ptrace(libc::PTRACE_ATTACH, pid, 0) {
            skip(Lack::Root, format!("ptrace: {error}"));
            return None;
        }
        stand_still(pid);
        let before = registers(pid);
        let puppet = Self { pid, before, lives: true };
        let mut code = [0; 2];
        puppet.memory().read_exact_at(&mut code, before.rip - 2).expect("read a process's code");
        assert_eq!(code, SYSCALL, "it does not wait in a system call");
        Some(puppet)
    }

    /// Takes a process that does much, while it waits for events and does nothing: whatever else it was doing would come to
    /// nothing.
    #[must_use]
    pub fn take_idle(pid: i32) -> Option<Self> {
        const WAITS: u64 = libc::SYS_epoll_wait as u64;
        let mut taken = None;
        let mut skipped = false;
        wait_until("it waits for events", TEN_SECONDS, || {
            let idle = || fs::read_to_string(format!("/proc/{pid}/syscall")).is_ok_and(|call| call.starts_with("232 "));
            if !idle() {
                return false;
            }
            if !is_root() || ptrace(libc::PTRACE_ATTACH, pid, 0).is_err() {
                skip(Lack::Root, "only root may trace other users' processes");
                skipped = true;
                return true;
            }
            stand_still(pid);
            let before = registers(pid);
            // Interrupted, and not done with.
            if before.orig_rax == WAITS && (before.rax as i64) < 0 {
                taken = Some(Self { pid, before, lives: true });
                return true;
            }
            ptrace(libc::PTRACE_DETACH, pid, 0).expect("let a process go");
            false
        });
        assert!(taken.is_some() || skipped);
        taken
    }

    /// Where its stack is: memory of its own that can be read, and has a zero byte soon.
    #[must_use]
    pub fn stack(&self) -> u64 {
        self.before.rsp
    }

    /// All its memory, code included.
    fn memory(&self) -> fs::File {
        let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{}/mem", self.pid));
        memory.expect("open a process's memory")
    }

    /// Has it make a call that does not wait.
    pub fn call(&mut self, number: libc::c_long, arguments: &[u64]) -> Called {
        assert!(self.lives, "it has ended");
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        let mut registers = user_regs_struct { rip: self.before.rip - 2, rax: number as u64, ..self.before };
        // Or the kernel would make the call again that the process waits in.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = all;
        set_registers(self.pid, &registers);
        ptrace(libc::PTRACE_SINGLESTEP, self.pid, 0).expect("have a process make a system call");
        match hear_of(self.pid).expect("it is told what became of a system call") {
            WaitStatus::Stopped(..) => {}
            WaitStatus::Signaled(..) | WaitStatus::Exited(..) => {
                self.lives = false;
                return Called::Ended;
            }
            other => panic!("{other:?}"),
        }
        match self::registers(self.pid).rax as i64 {
            error @ -4095..0 => Called::Failed(Errno::from_raw(-error as i32)),
            given => Called::Gave(given as u64),
        }
    }

    /// Has it make a process with these flags, which does nothing.
    pub fn make_process(&mut self, flags: i32) -> Called {
        let memory = self.memory();
        let (at, mut code) = (self.before.rip, [0; SLEEP.len()]);
        memory.read_exact_at(&mut code, at).expect("read a process's code");
        memory.write_all_at(&SLEEP, at).expect("write to a process's code");
        let made = self.call(libc::SYS_clone, &[flags as u64]);
        if let Called::Gave(pid) = made {
            let call = || fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
            wait_until("the new process sleeps", TEN_SECONDS, || call().starts_with("7 "));
        }
        if self.lives {
            memory.write_all_at(&code, at).expect("write to a process's code");
        }
        made
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // It has waited for nothing.
        let mut before = user_regs_struct { rax: 0, orig_rax: u64::MAX, ..self.before };
        let registers = (&raw mut before).expose_provenance();
        let goes_on = self.lives
            && is_alive(self.pid)
            && ptrace(libc::PTRACE_SETREGS, self.pid, registers).is_ok()
            && ptrace(libc::PTRACE_DETACH, self.pid, 0).is_ok();
        if !goes_on {
            // It has ended, or does so now: whoever made it hears of that when its tracer has.
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
            let _ = hear_of(self.pid);
        }
    }
}

/// What the kernel tells of a traced process, within a deadline: it tells each thing once, and to any thread of this process
/// that waits for that process. Who has started a process must not trace it while another thread waits for its end.
fn hear_of(pid: i32) -> Result<WaitStatus, String> {
    let deadline = Instant::now() + TEN_SECONDS;
    while Instant::now() < deadline {
        match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => thread::sleep(Duration::from_micros(200)),
            Ok(status) => return Ok(status),
            Err(error) => return Err(format!("wait for process {pid}: {error}")),
        }
    }
    Err(format!("nothing was told of process {pid} within {TEN_SECONDS:?}; does another thread wait for it?"))
}

/// Waits until a process that has just been attached to stands still. From then on it ends if this one does: nobody else could
/// have it go on with what it did.
fn stand_still(pid: i32) {
    let stopped = hear_of(pid).expect("a process that is traced stands still");
    assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
    ptrace(libc::PTRACE_SETOPTIONS, pid, libc::PTRACE_O_EXITKILL as usize).expect("end a process with its tracer");
}

fn ptrace(request: libc::c_uint, pid: i32, data: usize) -> nix::Result<()> {
    // SAFETY: None of the requests that are made here touches memory of this process, but for those that are given a place
    // for registers in `data`.
    Errno::result(unsafe { libc::ptrace(request, pid, 0, data) }).map(drop)
}

fn registers(pid: i32) -> user_regs_struct {
    let mut registers = MaybeUninit::<user_regs_struct>::zeroed();
    ptrace(libc::PTRACE_GETREGS, pid, registers.as_mut_ptr().expose_provenance()).expect("read a process's registers");
    // SAFETY: They are numbers, and were zeros before they were read.
    unsafe { registers.assume_init() }
}

fn set_registers(pid: i32, registers: &user_regs_struct) {
    ptrace(libc::PTRACE_SETREGS, pid, (&raw const *registers).expose_provenance()).expect("set a process's registers");
}
