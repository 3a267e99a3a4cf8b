//! Signals that would end this process, taken as events: so that it can put things right first.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;

const ENDING: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// SIGINT, SIGTERM, SIGHUP and SIGQUIT. Threads that are started from now on leave them to this as well; processes get
/// them as ever.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
    mask: SigSet,
}

impl Signals {
    /// From now on. To be called while there is one thread.
    pub fn catch() -> io::Result<Self> {
        Self::of(&ENDING)
    }

    /// The same, and the one that tells that the terminal has another size.
    pub fn catch_and_resizes() -> io::Result<Self> {
        Self::of(&[&ENDING[..], &[Signal::SIGWINCH]].concat())
    }

    fn of(signals: &[Signal]) -> io::Result<Self> {
        let mask: SigSet = signals.iter().copied().collect();
        mask.thread_block()?;
        Ok(Self { descriptor: SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?, mask })
    }

    /// Waits for one.
    pub fn wait(&self) -> io::Result<Signal> {
        Ok(self.mask.wait()?)
    }

    /// The one that came, if one did: the descriptor is readable then.
    pub fn take(&self) -> io::Result<Option<Signal>> {
        let came = self.descriptor.read_signal()?;
        Ok(came.and_then(|info| Signal::try_from(info.ssi_signo as i32).ok()))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The exit code of a process that a signal ended, as shells see it.
pub fn exit_code(signal: Signal) -> u8 {
    128 + signal as u8
}

/// The same, for `main`.
pub fn exit(signal: Signal) -> ExitCode {
    exit_code(signal).into()
}
