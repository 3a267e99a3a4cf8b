//! A vCPU's registers: saved whole, and restored as far as they differ from what the vCPU has.
//!
//! A vCPU ioctl takes 6–10 µs on some hosts, and a fork restores into a vCPU that has never run. So a [`Registers`]
//! remembers the vCPU as it was made, or as it was expected to become, and restoring leaves out what is the same.
#![allow(unsafe_code)] // XSAVE areas of variable length, and the vCPU device attribute that kvm-ioctls lacks

use super::state::{Tsc, VcpuState};
use crate::wire::Machine;
use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, Xsave, kvm_device_attr, kvm_msr_entry, kvm_sync_regs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::mem;
use thiserror::Error;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{errno, ioctl_iow_nr};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

const IA32_TSC: u32 = 0x10;
/// Whether, and where, KVM tells the guest of pages that are on their way, so that it can do something else meanwhile.
const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;

/// What `KVM_RUN` leaves behind, where it can.
const SHARED: i32 = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS) as i32;

/// A register could not be read or set.
#[derive(Debug, Error)]
pub(super) enum RegistersError {
    #[error("{call}: {cause}")]
    Call { call: &'static str, cause: errno::Error },
    #[error("{call} of MSR {index:#x} is refused")]
    Msr { call: &'static str, index: u32 },
    #[error("the saved state has {has} words of XSAVE, this host {wants}")]
    XsaveLength { has: usize, wants: usize },
    #[error("the saved state has other MSRs than this host, or in another order")]
    MsrList,
}

/// Adds the call to an error of KVM.
fn during(call: &'static str) -> impl FnOnce(errno::Error) -> RegistersError {
    move |cause| RegistersError::Call { call, cause }
}

/// How to read and set the registers of one vCPU.
#[derive(Debug)]
pub(super) struct Registers {
    access: Access,
    fresh: VcpuState,
    /// What it had after it was made ready for a state to come.
    expected: Option<VcpuState>,
}

/// What this host can read and set.
#[derive(Clone, Debug)]
pub(super) struct Access {
    msrs: Vec<u32>,
    xsave_words: usize,
    tsc: TscAccess,
    machine: Machine,
    /// `KVM_RUN` can leave general and system registers and events behind.
    shares: bool,
}

#[derive(Clone, Copy, Debug)]
enum TscAccess {
    Offset,
    Msr,
}

impl Registers {
    /// Those of a vCPU that has its CPUID and has not run.
    pub fn of_fresh(access: Access, vcpu: &VcpuFd) -> Result<Self, RegistersError> {
        let fresh = access.save(vcpu, None)?;
        Ok(Self { access, fresh, expected: None })
    }

    /// The vCPU as it was before it ran.
    pub fn fresh(&self) -> &VcpuState {
        &self.fresh
    }

    /// Reads everything, but for what `KVM_RUN` has just left behind in `shared`.
    pub fn save(&self, vcpu: &VcpuFd, shared: Option<&kvm_sync_regs>) -> Result<VcpuState, RegistersError> {
        self.access.save(vcpu, shared)
    }

    /// Whether `KVM_RUN` can leave registers behind in memory that it shares with us.
    pub fn can_share(&self) -> bool {
        self.access.shares
    }

    /// Waits until KVM's workers touch no page any more on behalf of the vCPU, which has just stopped.
    ///
    /// KVM waits for a page in a worker, while a Linux guest that knows of it runs something else, and one that does not
    /// rests until its next interrupt. Such a worker does not stop with the vCPU, and in the middle of a freeze it would find
    /// a page where no trap is yet. Turning the feature off, even where it is off, ends all workers; turning it on again has
    /// the guest look again for everything that it waits for.
    pub fn end_page_workers(&self, vcpu: &VcpuFd) -> Result<(), RegistersError> {
        if self.access.machine == Machine::Monitor || !self.access.msrs.contains(&KVM_ASYNC_PF_EN) {
            return Ok(());
        }
        let was = read_msr(vcpu, KVM_ASYNC_PF_EN)?;
        write_msr(vcpu, KVM_ASYNC_PF_EN, 0)?;
        if was != 0 {
            write_msr(vcpu, KVM_ASYNC_PF_EN, was)?;
        }
        Ok(())
    }

    /// Makes the vCPU, which has not run, what `state` says, but for what may not wait or is lost: what is pending comes
    /// with [`restore`](Self::restore). A state to come will most likely be like this one; what the vCPU then has is to be
    /// [learned](Self::learn).
    ///
    /// A vCPU with an interrupt controller is left as it is: its timer runs, also while it does not, and MSRs that name
    /// guest memory make KVM touch that, which is not there yet.
    pub fn expect(&mut self, vcpu: &VcpuFd, state: VcpuState) -> Result<(), RegistersError> {
        if self.access.machine == Machine::Linux {
            return Ok(());
        }
        let state = VcpuState { mp: self.fresh.mp, events: self.fresh.events, ..state };
        self.restore(vcpu, &state)
    }

    /// Reads what the vCPU has been made since it was fresh. What it was told to become is only what somebody said, and the
    /// guest's own code may have run on it.
    pub fn learn(&mut self, vcpu: &VcpuFd) -> Result<(), RegistersError> {
        if self.access.machine == Machine::Monitor {
            self.expected = Some(self.access.save(vcpu, None)?);
        }
        Ok(())
    }

    /// Makes the vCPU, which has not run, what `state` says.
    ///
    /// The order matters: the TSC before the MSRs that refer to it, system registers (which place the LAPIC) before the
    /// LAPIC, that (which says what kind of timer it is) before the MSR of its deadline, events last, because setting
    /// system registers drops them.
    ///
    /// # Errors
    /// Of KVM; or the state is none of a vCPU of this host. An MSR more than the vCPU is compared by would stay in it.
    pub fn restore(&mut self, vcpu: &VcpuFd, state: &VcpuState) -> Result<(), RegistersError> {
        if !state.msrs.iter().map(|msr| msr.index).eq(self.access.msrs.iter().copied()) {
            return Err(RegistersError::MsrList);
        }
        // It is of no use afterwards, and there are many clones.
        let expected = self.expected.take();
        let has = expected.as_ref().unwrap_or(&self.fresh);
        if state.tsc != has.tsc {
            set_tsc(vcpu, state.tsc)?;
        }
        if state.sregs != has.sregs {
            vcpu.set_sregs(&state.sregs).map_err(during("KVM_SET_SREGS"))?;
        }
        if state.regs != has.regs {
            vcpu.set_regs(&state.regs).map_err(during("KVM_SET_REGS"))?;
        }
        if state.xcrs != has.xcrs {
            vcpu.set_xcrs(&state.xcrs).map_err(during("KVM_SET_XCRS"))?;
        }
        if state.xsave != has.xsave {
            self.access.write_xsave(vcpu, &state.xsave)?;
        }
        if state.debug != has.debug {
            vcpu.set_debug_regs(&state.debug).map_err(during("KVM_SET_DEBUGREGS"))?;
        }
        if let Some(lapic) = state.lapic.as_ref().filter(|_| state.lapic != has.lapic) {
            vcpu.set_lapic(lapic).map_err(during("KVM_SET_LAPIC"))?;
        }
        write_msrs(vcpu, &state.msrs, &has.msrs)?;
        if state.mp != has.mp {
            vcpu.set_mp_state(state.mp).map_err(during("KVM_SET_MP_STATE"))?;
        }
        if state.events != has.events {
            vcpu.set_vcpu_events(&state.events).map_err(during("KVM_SET_VCPU_EVENTS"))?;
        }
        Ok(())
    }
}

impl Access {
    /// Learns it from a vCPU that has its CPUID and has not run.
    pub fn of_fresh(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd, machine: Machine) -> Result<Self, RegistersError> {
        let area = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let xsave_words = area.max(mem::size_of::<kvm_xsave>()) / mem::size_of::<u32>();
        let tsc = match read_tsc_offset(vcpu) {
            Ok(_) => TscAccess::Offset,
            Err(error) => {
                log::info!("KVM_VCPU_TSC_OFFSET: {error}; the guest's clock stands still during a fork");
                TscAccess::Msr
            }
        };
        let list = kvm.get_msr_index_list().map_err(during("KVM_GET_MSR_INDEX_LIST"))?;
        let wanted = list.as_slice().iter().copied().filter(|index| *index != IA32_TSC);
        let msrs = wanted.filter(|index| can_read_and_set(vcpu, *index)).collect();
        let shares = kvm.check_extension_int(Cap::SyncRegs) & SHARED == SHARED;
        Ok(Self { msrs, xsave_words, tsc, machine, shares })
    }

    fn save(&self, vcpu: &VcpuFd, shared: Option<&kvm_sync_regs>) -> Result<VcpuState, RegistersError> {
        Ok(VcpuState {
            mp: vcpu.get_mp_state().map_err(during("KVM_GET_MP_STATE"))?,
            regs: match shared {
                Some(shared) => shared.regs,
                None => vcpu.get_regs().map_err(during("KVM_GET_REGS"))?,
            },
            sregs: match shared {
                Some(shared) => shared.sregs,
                None => vcpu.get_sregs().map_err(during("KVM_GET_SREGS"))?,
            },
            xsave: self.read_xsave(vcpu)?,
            xcrs: vcpu.get_xcrs().map_err(during("KVM_GET_XCRS"))?,
            debug: vcpu.get_debug_regs().map_err(during("KVM_GET_DEBUGREGS"))?,
            // Before the LAPIC: a timer that fires in between is then seen twice, and not lost.
            msrs: self.read_msrs(vcpu)?,
            lapic: match self.machine {
                Machine::Monitor => None,
                Machine::Linux => Some(vcpu.get_lapic().map_err(during("KVM_GET_LAPIC"))?),
            },
            events: match shared {
                Some(shared) => shared.events,
                None => vcpu.get_vcpu_events().map_err(during("KVM_GET_VCPU_EVENTS"))?,
            },
            tsc: match self.tsc {
                TscAccess::Offset => Tsc::Offset(read_tsc_offset(vcpu).map_err(during("KVM_VCPU_TSC_OFFSET"))?),
                TscAccess::Msr => Tsc::Value(read_msr(vcpu, IA32_TSC)?),
            },
        })
    }

    fn read_xsave(&self, vcpu: &VcpuFd) -> Result<Vec<u32>, RegistersError> {
        let mut area = self.xsave_area();
        // SAFETY: The area is as long as KVM_CAP_XSAVE2 says, so that KVM does not write past its end.
        unsafe { vcpu.get_xsave2(&mut area) }.map_err(during("KVM_GET_XSAVE2"))?;
        let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
        words.extend_from_slice(area.as_slice());
        Ok(words)
    }

    fn write_xsave(&self, vcpu: &VcpuFd, words: &[u32]) -> Result<(), RegistersError> {
        if words.len() != self.xsave_words {
            return Err(RegistersError::XsaveLength { has: words.len(), wants: self.xsave_words });
        }
        let mut area = self.xsave_area();
        let (region, extra) = words.split_at(REGION_WORDS);
        area.as_mut_slice().copy_from_slice(extra);
        // SAFETY: The length of the area stays as it is.
        unsafe { area.as_mut_fam_struct() }.xsave.region.copy_from_slice(region);
        // SAFETY: The area is as long as KVM_CAP_XSAVE2 says, so that KVM does not read past its end.
        unsafe { vcpu.set_xsave2(&area) }.map_err(during("KVM_SET_XSAVE"))
    }

    fn xsave_area(&self) -> Xsave {
        Xsave::new(self.xsave_words - REGION_WORDS).expect("an XSAVE area is shorter than the limit of its type")
    }

    fn read_msrs(&self, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, RegistersError> {
        let mut entries = Vec::with_capacity(self.msrs.len());
        for indexes in self.msrs.chunks(KVM_MAX_MSR_ENTRIES) {
            let wanted: Vec<_> = indexes.iter().map(|index| entry(*index)).collect();
            let mut msrs = batch(&wanted);
            let read = vcpu.get_msrs(&mut msrs).map_err(during("KVM_GET_MSRS"))?;
            if let Some(index) = indexes.get(read) {
                return Err(RegistersError::Msr { call: "KVM_GET_MSRS", index: *index });
            }
            entries.extend_from_slice(msrs.as_slice());
        }
        Ok(entries)
    }
}

const REGION_WORDS: usize = mem::size_of::<kvm_xsave>() / mem::size_of::<u32>();

fn entry(index: u32) -> kvm_msr_entry {
    kvm_msr_entry { index, ..Default::default() }
}

fn batch(entries: &[kvm_msr_entry]) -> Msrs {
    Msrs::from_entries(entries).expect("a batch of MSRs is within KVM's limit")
}

/// KVM lists MSRs that it then refuses to read, or to set to what was read.
fn can_read_and_set(vcpu: &VcpuFd, index: u32) -> bool {
    let mut msrs = batch(&[entry(index)]);
    let works = matches!(vcpu.get_msrs(&mut msrs), Ok(1)) && matches!(vcpu.set_msrs(&msrs), Ok(1));
    if !works {
        log::debug!("MSR {index:#x} cannot be read and set: left out");
    }
    works
}

/// Sets those that the vCPU does not have.
fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry], has: &[kvm_msr_entry]) -> Result<(), RegistersError> {
    // Both are in the order of KVM's list.
    let differ = entries.iter().enumerate().filter(|&(place, entry)| has.get(place) != Some(entry));
    let differ: Vec<_> = differ.map(|(_, entry)| *entry).collect();
    for entries in differ.chunks(KVM_MAX_MSR_ENTRIES) {
        let set = vcpu.set_msrs(&batch(entries)).map_err(during("KVM_SET_MSRS"))?;
        if let Some(entry) = entries.get(set) {
            return Err(RegistersError::Msr { call: "KVM_SET_MSRS", index: entry.index });
        }
    }
    Ok(())
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Result<u64, RegistersError> {
    let mut msrs = batch(&[entry(index)]);
    match vcpu.get_msrs(&mut msrs).map_err(during("KVM_GET_MSRS"))? {
        1 => Ok(msrs.as_slice()[0].data),
        _ => Err(RegistersError::Msr { call: "KVM_GET_MSRS", index }),
    }
}

fn write_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<(), RegistersError> {
    match vcpu.set_msrs(&batch(&[kvm_msr_entry { data, ..entry(index) }])).map_err(during("KVM_SET_MSRS"))? {
        1 => Ok(()),
        _ => Err(RegistersError::Msr { call: "KVM_SET_MSRS", index }),
    }
}

fn read_tsc_offset(vcpu: &VcpuFd) -> Result<u64, errno::Error> {
    let mut offset = 0_u64;
    let attribute = tsc_offset_attribute(&raw mut offset as u64);
    // SAFETY: KVM writes the attribute's eight bytes to `offset`.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    if result == 0 { Ok(offset) } else { Err(errno::Error::last()) }
}

fn set_tsc(vcpu: &VcpuFd, tsc: Tsc) -> Result<(), RegistersError> {
    match tsc {
        Tsc::Offset(offset) => {
            let attribute = tsc_offset_attribute(&raw const offset as u64);
            // SAFETY: KVM reads the attribute's eight bytes from `offset`.
            match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } {
                0 => Ok(()),
                _ => Err(during("KVM_VCPU_TSC_OFFSET")(errno::Error::last())),
            }
        }
        Tsc::Value(value) => write_msr(vcpu, IA32_TSC, value),
    }
}

fn tsc_offset_attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr }
}
