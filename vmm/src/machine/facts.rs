//! What KVM on this host says of itself. It is the same for all vCPUs of a kind of machine, and slow to find out: so the
//! zygote does, once, from a VM that never runs.

use super::cpuid::{Cpuid, Supported};
use super::filter::Filters;
use super::kvm::KvmVm;
use super::registers::Access;
use super::vm::VmError;
use crate::wire::{Machine, MachineShape};
use guest_mem::PageCount;
use kvm_ioctls::Kvm;
use std::path::Path;
use std::sync::Arc;

/// Of one kind of machine.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub cpuid: Supported,
    pub access: Access,
}

impl Facts {
    fn of(kvm: &Kvm, machine: Machine) -> Result<Self, VmError> {
        let cpuid = Supported::of_host(kvm)?;
        let vm = KvmVm::new(kvm, &[], 0, machine)?;
        let shape = MachineShape { ram: PageCount(0), vcpus: 1, machine };
        let vcpu = vm.make_vcpu(0, &Cpuid::new(&cpuid, shape).of_vcpu(0))?;
        let access = Access::of_fresh(kvm, vm.fd(), &vcpu, machine)?;
        Ok(Self { cpuid, access })
    }
}

/// What has been found out so far.
#[derive(Debug)]
pub(super) struct Known {
    /// Mappings that a window may have.
    pub max_runs: u32,
    /// The empty directory of the jail that this process is in, if it is in one.
    pub jail: Option<&'static Path>,
    /// What VM processes are held to.
    pub filters: Arc<Filters>,
    facts: Vec<(Machine, Facts)>,
}

impl Known {
    /// What is cheap.
    pub fn little() -> Self {
        Self {
            max_runs: crate::host::max_map_count() / 4,
            jail: None,
            filters: Arc::new(Filters::compile()),
            facts: Vec::new(),
        }
    }

    /// Finds out what can be found out, for processes that are made in this jail. What cannot will be an error of who needs it.
    pub fn learn(jail: Option<&'static Path>) -> Self {
        let little = Self { jail, ..Self::little() };
        let Ok(kvm) = Kvm::new() else { return little };
        let learn = |machine| Some((machine, Facts::of(&kvm, machine).ok()?));
        Self { facts: [Machine::Monitor, Machine::Linux].into_iter().filter_map(learn).collect(), ..little }
    }

    /// The facts of a kind of machine.
    pub fn facts(&self, kvm: &Kvm, machine: Machine) -> Result<Facts, VmError> {
        match self.facts.iter().find(|(of, _)| *of == machine) {
            Some((_, facts)) => Ok(facts.clone()),
            None => Facts::of(kvm, machine),
        }
    }
}
