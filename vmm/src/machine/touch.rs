//! Touching pages before the guest needs them.
//!
//! A first write to a page costs a copy, and an exit in which KVM maps it. [`copy_ahead`] makes the copies; KVM maps what the
//! guest touches. So the built-in guest's own code touches them, on a vCPU that nobody uses yet; of a Linux guest's memory
//! KVM maps what it is told to, where the host has nested paging.
//!
//! [`copy_ahead`]: guest_mem::window::host::HostWindow::copy_ahead
#![allow(unsafe_code)] // an ioctl that kvm-ioctls lacks

use super::kick::StopSwitch;
use super::mailbox::Memory;
use crate::boot::monitor;
use crate::wire::Machine;
use firmware::abi::{DOORBELL, Doorbell};
use guest_mem::{Gfn, GfnRange, PAGE_SIZE, Run};
use kvm_bindings::{KVM_CAP_PRE_FAULT_MEMORY, KVMIO, kvm_pre_fault_memory, kvm_regs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use rangemap::RangeSet;
use std::collections::BTreeMap;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::{errno, ioctl_iowr_nr};

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// A vCPU is begun again so often with a stretch of pages.
const INTERRUPTED_MOST: u32 = 100;

/// How pages are touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The monitor does it.
    Monitor,
    /// KVM does it (Linux 6.11, nested paging).
    PreFault,
    /// Not at all.
    Not,
}

/// A vCPU that touches pages does something else.
#[derive(Debug, Error)]
pub(super) enum TouchError {
    #[error("{call}: {cause}")]
    Call { call: &'static str, cause: errno::Error },
    #[error("KVM_RUN returned with {0}")]
    Exit(String),
}

impl Way {
    /// How it is done for this machine on this host.
    pub fn of(machine: Machine, kvm: &Kvm) -> Self {
        match machine {
            Machine::Monitor => Self::Monitor,
            Machine::Linux if kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0 => Self::PreFault,
            Machine::Linux => Self::Not,
        }
    }

    /// Touches pages on a vCPU that has these registers, and has them afterwards. It stands, and its switch says so.
    pub fn touch(
        self,
        vcpu: &mut VcpuFd,
        stop: StopSwitch,
        registers: &kvm_regs,
        pages: &[GfnRange],
    ) -> Result<(), TouchError> {
        match self {
            Self::Monitor if pages.is_empty() => Ok(()),
            Self::Monitor => {
                for pages in pages {
                    run_toucher(vcpu, stop, registers, *pages)?;
                }
                set_regs(vcpu, registers)
            }
            Self::PreFault => {
                pages.iter().for_each(|pages| pre_fault(vcpu, *pages));
                Ok(())
            }
            Self::Not => Ok(()),
        }
    }
}

fn run_toucher(vcpu: &mut VcpuFd, stop: StopSwitch, registers: &kvm_regs, pages: GfnRange) -> Result<(), TouchError> {
    set_regs(vcpu, &monitor::toucher(registers, pages.start().gpa(), pages.count().0))?;
    stop.clear();
    let mut interrupted = 0;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(DOORBELL, value)) if *value == (Doorbell::Touched as u32).to_le_bytes() => break,
            Ok(exit) => return Err(TouchError::Exit(format!("{exit:?}"))),
            // Nobody wants it to stop.
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) && interrupted < INTERRUPTED_MOST => {
                interrupted += 1;
            }
            Err(cause) => return Err(TouchError::Call { call: "KVM_RUN", cause }),
        }
    }
    // The doorbell's write is complete when KVM is entered again.
    stop.set();
    match vcpu.run() {
        Err(error) if error.errno() == libc::EINTR => Ok(()),
        Err(cause) => Err(TouchError::Call { call: "KVM_RUN", cause }),
        Ok(exit) => Err(TouchError::Exit(format!("{exit:?}"))),
    }
}

fn set_regs(vcpu: &VcpuFd, registers: &kvm_regs) -> Result<(), TouchError> {
    vcpu.set_regs(registers).map_err(|cause| TouchError::Call { call: "KVM_SET_REGS", cause })
}

/// What KVM does not map now, it maps when it is needed.
fn pre_fault(vcpu: &VcpuFd, pages: GfnRange) {
    let mut left = kvm_pre_fault_memory { gpa: pages.start().gpa(), size: pages.count().bytes(), ..Default::default() };
    while left.size > 0 {
        // SAFETY: KVM reads and writes the structure, which says how far it has got.
        if unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut left) } != 0 {
            match errno::Error::last() {
                error if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
                error => return log::debug!("KVM_PRE_FAULT_MEMORY of {pages:?}: {error}"),
            }
        }
    }
}

/// What pages held when they were touched.
///
/// For KVM's dirty log they are written from then on: it maps them for writing, and hears no more of them. Whether the
/// guest has written them shows in what they hold.
#[derive(Debug, Default)]
pub(super) struct Touched(BTreeMap<Gfn, u32>);

impl Touched {
    /// Takes down pages of a window that are about to be touched.
    pub fn note(&mut self, memory: &Memory, pages: &[GfnRange]) -> Result<(), GuestMemoryError> {
        let mut page = vec![0; PAGE_SIZE];
        for gfn in pages.iter().flat_map(|pages| pages.iter()) {
            self.0.insert(gfn, sum(memory, gfn, &mut page)?);
        }
        Ok(())
    }

    /// Something else is mapped at `runs`. Gives the pages there that had been touched, and forgets them.
    pub fn mapped_over(&mut self, runs: &[Run]) -> RangeSet<u64> {
        let mut over = RangeSet::new();
        for Run { pages, .. } in runs {
            let gone: Vec<Gfn> = self.0.range(pages.start()..pages.end()).map(|(&gfn, _)| gfn).collect();
            for gfn in gone {
                self.0.remove(&gfn);
                over.insert(gfn.0..gfn.0 + 1);
            }
        }
        over
    }

    /// Takes those pages from what the log says that hold what they held.
    pub fn leave_out_unchanged(&self, memory: &Memory, logged: &mut RangeSet<u64>) -> Result<(), GuestMemoryError> {
        let mut page = vec![0; PAGE_SIZE];
        for (&gfn, &before) in &self.0 {
            if logged.contains(&gfn.0) && sum(memory, gfn, &mut page)? == before {
                logged.remove(gfn.0..gfn.0 + 1);
            }
        }
        Ok(())
    }

    /// Takes all of them from what the log says.
    pub fn leave_out(&self, logged: &mut RangeSet<u64>) {
        self.0.keys().for_each(|gfn| logged.remove(gfn.0..gfn.0 + 1));
    }
}

fn sum(memory: &Memory, gfn: Gfn, page: &mut [u8]) -> Result<u32, GuestMemoryError> {
    memory.read_slice(page, GuestAddress(gfn.gpa()))?;
    Ok(crc32fast::hash(page))
}
