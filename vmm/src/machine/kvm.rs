//! The KVM VM of a VM process: memory slots and their dirty log.
#![allow(unsafe_code)] // memory slots, and the ioctls of the dirty log, of which kvm-ioctls lacks one and allocates in the other

use crate::wire::Machine;
use guest_mem::window::host::SlotLog;
use guest_mem::{GfnRange, PAGE_SIZE};
use kvm_bindings::{
    CpuId, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_PIT_SPEAKER_DUMMY, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use rangemap::RangeSet;
use std::hint::black_box;
use std::sync::Arc;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{errno, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Three pages that KVM on Intel hosts wants for itself, among the devices.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Something KVM refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum KvmError {
    #[error("{call}: {cause}")]
    Call { call: &'static str, cause: errno::Error },
    #[error("{call} of guest pages {pages:?}: {cause}")]
    Slot { call: &'static str, pages: GfnRange, cause: errno::Error },
    #[error("this host's KVM lacks {0:?}")]
    Lacks(Cap),
}

pub(super) fn during(call: &'static str) -> impl FnOnce(errno::Error) -> KvmError {
    move |cause| KvmError::Call { call, cause }
}

/// Whether KVM logs which pages the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DirtyLog {
    /// It does, page by page: no huge mappings.
    On,
    /// It does not: guests run on huge pages.
    Off,
}

/// A KVM VM and its memory slots: slot `n` is the `n`-th RAM range.
#[derive(Debug)]
pub(super) struct KvmVm {
    vm: Arc<VmFd>,
    slots: Vec<GfnRange>,
    window_base: u64,
    log: DirtyLog,
    /// What the log said.
    logs: Vec<SlotLog>,
}

impl KvmVm {
    /// A VM whose RAM stands in the window at `window_base`, with the dirty log on. The window keeps these addresses
    /// for as long as the process lives. The memory slots come first: they are slow to make once there are interrupt
    /// controllers.
    pub fn new(kvm: &Kvm, ram: &[GfnRange], window_base: u64, machine: Machine) -> Result<Self, KvmError> {
        if let Some(cap) = [Cap::UserMemory, Cap::ImmediateExit].into_iter().find(|cap| !kvm.check_extension(*cap)) {
            return Err(KvmError::Lacks(cap));
        }
        let vm = kvm.create_vm().map_err(during("KVM_CREATE_VM"))?;
        let manual = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into(), 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&manual).map_err(during("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(during("KVM_SET_TSS_ADDR"))?;
        let mut this =
            Self { vm: Arc::new(vm), slots: ram.to_vec(), window_base, log: DirtyLog::Off, logs: Vec::new() };
        this.set_log(DirtyLog::On)?;
        if machine == Machine::Linux {
            this.vm.create_irq_chip().map_err(during("KVM_CREATE_IRQCHIP"))?;
            let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            this.vm.create_pit2(timer).map_err(during("KVM_CREATE_PIT2"))?;
        }
        Ok(this)
    }

    /// The VM.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Whether writes are logged.
    pub fn log(&self) -> DirtyLog {
        self.log
    }

    /// Makes the memory slots, or changes whether their writes are logged: from then on, also if the vCPUs run.
    pub fn set_log(&mut self, log: DirtyLog) -> Result<(), KvmError> {
        // Until all slots are as told, the log is not to be asked.
        self.log = DirtyLog::Off;
        for (slot, pages) in self.slots.iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: if log == DirtyLog::On { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: pages.start().gpa(),
                memory_size: pages.count().bytes(),
                userspace_addr: self.window_base + pages.start().gpa(),
            };
            // SAFETY: The addresses are the window's, for the life of the process: the guest cannot reach anything else.
            let done = unsafe { self.vm.set_user_memory_region(region) };
            done.map_err(slot_error("KVM_SET_USER_MEMORY_REGION", *pages))?;
        }
        self.log = log;
        Ok(())
    }

    /// Reads the log of every slot, where there is one. It stays as it is until it is [cleared](Self::clear_log).
    ///
    /// It is read to where it was read before: fresh memory for it would take longer than reading it.
    pub fn read_log(&mut self) -> Result<(), KvmError> {
        if self.log == DirtyLog::Off {
            self.forget_log();
            return Ok(());
        }
        self.prepare_log();
        for (slot, (pages, log)) in self.slots.iter().zip(&mut self.logs).enumerate() {
            let bitmap = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: log.words.as_mut_ptr().cast() };
            let read = kvm_dirty_log { slot: slot as u32, padding1: 0, __bindgen_anon_1: bitmap };
            // SAFETY: KVM writes one bit for each of the slot's pages, which the words have.
            if unsafe { ioctl_with_ref(&self.vm, KVM_GET_DIRTY_LOG(), &read) } != 0 {
                return Err(slot_error("KVM_GET_DIRTY_LOG", *pages)(errno::Error::last()));
            }
        }
        Ok(())
    }

    /// Gets the memory that the log is read to, if it has none. Of a large guest it takes time to be supplied: this is done
    /// while nobody waits.
    pub fn prepare_log(&mut self) {
        if self.logs.is_empty() {
            let log = |pages: &GfnRange| {
                let mut words: Vec<u64> = vec![0; pages.count().0.div_ceil(u64::BITS.into()) as usize];
                // The kernel puts zeroed memory off until it is written.
                words.iter_mut().step_by(PAGE_SIZE / size_of::<u64>()).for_each(|word| *word = black_box(0));
                SlotLog { first: pages.start(), words }
            };
            self.logs = self.slots.iter().map(log).collect();
        }
    }

    /// What was read last.
    pub fn logs(&self) -> &[SlotLog] {
        &self.logs
    }

    /// Gives the memory back that logs are read to.
    pub fn forget_log(&mut self) {
        self.logs = Vec::new();
    }

    /// Clears what the log said when it was [read](Self::read_log), so that the next write to these pages is logged again.
    /// The vCPUs stand still since.
    ///
    /// Cheap once the pages have been moved out of the window: while they are mapped, KVM protects each of them anew.
    pub fn clear_log(&self) -> Result<(), KvmError> {
        for (slot, SlotLog { words, .. }) in self.logs.iter().enumerate() {
            // Large guests write little of their memory: the rest need not be gone through.
            let Some(first) = words.iter().position(|word| *word != 0) else { continue };
            let last = words.iter().rposition(|word| *word != 0).unwrap_or(first);
            self.clear(slot, first, &words[first..=last])?;
        }
        Ok(())
    }

    /// Has the log say nothing of these pages, which nobody has written since they were mapped.
    pub fn forget_writes(&self, pages: &RangeSet<u64>) -> Result<(), KvmError> {
        const BITS: u64 = u64::BITS as u64;
        for (slot, there) in self.slots.iter().enumerate().filter(|_| self.log == DirtyLog::On) {
            let parts = pages.overlapping(there.raw()).map(|part| GfnRange::from(part.clone()).intersect(*there));
            let bits: Vec<u64> = parts.flat_map(|part| part.raw()).map(|page| page - there.start().0).collect();
            let (Some(first), Some(last)) = (bits.first(), bits.last()) else { continue };
            let first = first / BITS;
            let mut words = vec![0; (last / BITS - first + 1) as usize];
            bits.iter().for_each(|bit| words[(bit / BITS - first) as usize] |= 1 << (bit % BITS));
            self.clear(slot, first as usize, &words)?;
        }
        Ok(())
    }

    /// Clears what these words say of a slot, the first of which is its `first`.
    fn clear(&self, slot: usize, first: usize, words: &[u64]) -> Result<(), KvmError> {
        let pages = self.slots[slot];
        let first_page = (first * u64::BITS as usize) as u64;
        let num_pages = ((words.len() * u64::BITS as usize) as u64).min(pages.count().0 - first_page) as u32;
        let clear = kvm_clear_dirty_log {
            slot: slot as u32,
            num_pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_ptr().cast_mut().cast() },
        };
        // SAFETY: KVM reads one bit for each of these pages, which the words have.
        match unsafe { ioctl_with_ref(&self.vm, KVM_CLEAR_DIRTY_LOG(), &clear) } {
            0 => Ok(()),
            _ => Err(slot_error("KVM_CLEAR_DIRTY_LOG", pages)(errno::Error::last())),
        }
    }

    /// A vCPU that shows its guest `cpuid`.
    pub fn make_vcpu(&self, number: u8, cpuid: &CpuId) -> Result<VcpuFd, KvmError> {
        let vcpu = self.vm.create_vcpu(number.into()).map_err(during("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(during("KVM_SET_CPUID2"))?;
        Ok(vcpu)
    }
}

fn slot_error(call: &'static str, pages: GfnRange) -> impl FnOnce(errno::Error) -> KvmError {
    move |cause| KvmError::Slot { call, pages, cause }
}
