//! What CPUID tells each vCPU: all that this host's KVM supports, and the vCPU's place among its siblings. One package,
//! one thread per core.

use super::kvm::{KvmError, during};
use crate::wire::{Machine, MachineShape};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// What this host's KVM supports.
#[derive(Clone, Debug)]
pub(super) struct Supported {
    entries: Vec<kvm_cpuid_entry2>,
    /// KVM emulates the deadline timer, which it does not list everywhere.
    deadline_timer: bool,
}

impl Supported {
    /// Asks KVM.
    pub fn of_host(kvm: &Kvm) -> Result<Self, KvmError> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(during("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { entries: supported.as_slice().to_vec(), deadline_timer })
    }
}

/// The CPUID of a machine's vCPUs.
#[derive(Debug)]
pub(super) struct Cpuid<'a> {
    supported: &'a Supported,
    shape: MachineShape,
}

/// Feature bits, by register.
mod feature {
    pub const VMX_ECX: u32 = 1 << 5;
    pub const DEADLINE_TIMER_ECX: u32 = 1 << 24;
    pub const HYPERVISOR_ECX: u32 = 1 << 31;
    pub const SEVERAL_IDS_EDX: u32 = 1 << 28;
    pub const CORES_ONLY_ECX: u32 = 1 << 1;
    pub const SVM_ECX: u32 = 1 << 2;
}

impl<'a> Cpuid<'a> {
    /// What this host supports, for a machine of this shape.
    pub fn new(supported: &'a Supported, shape: MachineShape) -> Self {
        Self { supported, shape }
    }

    /// What vCPU `number` is told.
    pub fn of_vcpu(&self, number: u8) -> CpuId {
        let mut entries = self.supported.entries.clone();
        for entry in &mut entries {
            // KVM fills in the APIC id of the processor that it was asked on.
            match entry.function {
                0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(number) << 24,
                0xb | 0x1f => entry.edx = number.into(),
                _ => {}
            }
        }
        if self.shape.machine == Machine::Linux {
            self.adapt(&mut entries, number);
        }
        CpuId::from_entries(&entries).expect("as many entries as KVM gave, and two")
    }

    fn adapt(&self, entries: &mut Vec<kvm_cpuid_entry2>, number: u8) {
        let (id, vcpus) = (u32::from(number), u32::from(self.shape.vcpus));
        let id_bits = vcpus.next_power_of_two().trailing_zeros();
        for entry in &mut *entries {
            match entry.function {
                0x1 => {
                    entry.ebx = entry.ebx & 0xff00_ffff | vcpus << 16;
                    // A guest of the guest has state that a fork does not carry over.
                    entry.ecx = entry.ecx & !feature::VMX_ECX | feature::HYPERVISOR_ECX;
                    if self.supported.deadline_timer {
                        entry.ecx |= feature::DEADLINE_TIMER_ECX;
                    }
                    entry.edx = set(entry.edx, feature::SEVERAL_IDS_EDX, vcpus > 1);
                }
                // Caches of Intel processors: all but the last level belong to one core.
                0x4 if entry.eax != 0 => {
                    let level = entry.eax >> 5 & 0x7;
                    let sharing = if level >= 3 { vcpus - 1 } else { 0 };
                    entry.eax = entry.eax & 0x3fff | sharing << 14 | (vcpus - 1) << 26;
                }
                0x8000_0001 => {
                    entry.ecx &= !feature::SVM_ECX;
                    entry.ecx = set(entry.ecx, feature::CORES_ONLY_ECX, vcpus > 1);
                }
                0x8000_0008 => entry.ecx = id_bits << 12 | (vcpus - 1),
                0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
                0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
                _ => {}
            }
        }
        let last = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
        entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
        if last >= 0xb {
            const THREADS: u32 = 1;
            const CORES: u32 = 2;
            let level = |index, kind, bits, count| kvm_cpuid_entry2 {
                function: 0xb,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: bits,
                ebx: count,
                ecx: kind << 8 | index,
                edx: id,
                ..Default::default()
            };
            entries.extend([level(0, THREADS, 0, 1), level(1, CORES, id_bits, vcpus)]);
        }
    }
}

fn set(register: u32, bits: u32, on: bool) -> u32 {
    if on { register | bits } else { register & !bits }
}
