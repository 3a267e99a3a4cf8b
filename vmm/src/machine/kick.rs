//! Gets a vCPU thread out of `KVM_RUN`.
#![allow(unsafe_code)] // a byte of the structure that KVM shares with us, written from another thread

use kvm_ioctls::VcpuFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// `kvm_run.immediate_exit` of one vCPU: while it is set, `KVM_RUN` completes what is in flight and returns `EINTR`.
///
/// It closes the gap of the signal, which is lost on a thread that is just about to enter `KVM_RUN`.
#[derive(Clone, Copy, Debug)]
pub(super) struct StopSwitch(&'static AtomicU8);

impl StopSwitch {
    /// The switch of a vCPU that lives as long as the process.
    pub fn of(vcpu: &'static mut VcpuFd) -> (Self, &'static mut VcpuFd) {
        let byte = &raw mut vcpu.get_kvm_run().immediate_exit;
        // SAFETY: The structure is a mapping that lives as long as the vCPU, which is for ever. KVM only reads the
        // byte, and everybody in this process goes through the atomic.
        (Self(unsafe { AtomicU8::from_ptr(byte) }), vcpu)
    }

    /// The switch of no vCPU.
    #[cfg(test)]
    pub fn of_nobody() -> Self {
        Self(Box::leak(Box::new(AtomicU8::new(0))))
    }

    /// `KVM_RUN` returns at once.
    pub fn set(self) {
        self.0.store(1, Ordering::SeqCst);
    }

    /// `KVM_RUN` runs.
    pub fn clear(self) {
        self.0.store(0, Ordering::SeqCst);
    }
}

extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the kick signal do nothing but interrupt.
pub(super) fn install_handler() -> Result<(), errno::Error> {
    register_signal_handler(SIGRTMIN(), interrupt)
}

/// Interrupts the system call that a vCPU thread is in.
pub(super) fn interrupt_thread(thread: &JoinHandle<()>) {
    if let Err(error) = thread.kill(SIGRTMIN()) {
        log::error!("signal to a vCPU thread: {error}");
    }
}
