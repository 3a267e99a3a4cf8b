//! Pages that stayed in a window at a VM's first freeze, and leave it when they have settled.

use crate::server::Server;
use crate::server::ids::Generation;
use crate::server::registry::phase::Phase;
use crate::server::registry::vm::Vm;
use crate::wire::ToVm;
use guest_mem::window::host::HostWindow;
use guest_mem::{GfnRange, PageCount, StoreId};
use std::collections::BTreeSet;

/// Pages of one dedup, for which the VM stands still: 16 MiB.
const BATCH: PageCount = PageCount(4096);

/// VMs that have something in memory twice, and have not been told to give it back.
#[derive(Debug, Default)]
pub struct Dedups(BTreeSet<Generation>);

impl Server {
    /// A VM has been frozen in a copy of its process.
    pub fn dedup_later(&mut self, generation: Generation, store: StoreId) {
        if let Some(vm) = self.registry.vms.get_mut(generation) {
            vm.deduping = Some(store);
            self.memory.dedups.0.insert(generation);
        }
    }

    /// Has VMs give back what has settled, a batch at a time.
    pub fn tend_dedups(&mut self) {
        let ready = |generation: &Generation| self.registry.vms.get(*generation).is_none_or(|vm| self.may_dedup(vm));
        let ready: Vec<Generation> = self.memory.dedups.0.iter().copied().filter(ready).collect();
        for generation in ready {
            self.memory.dedups.0.remove(&generation);
            self.dedup(generation);
        }
    }

    /// Whether all pages have settled, and the VM is not wanted for a freeze.
    fn may_dedup(&self, vm: &Vm) -> bool {
        let (Some((family, _)), Some(store)) = (vm.memory, vm.deduping) else { return true };
        vm.freezes.is_idle() && self.memory.families[&family].is_written_back(store)
    }

    fn dedup(&mut self, generation: Generation) {
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        let (Some((family, member)), Some(store)) = (vm.memory, vm.deduping) else { return };
        let manager = &self.memory.families[&family];
        let pages = manager.to_dedup(member, store, HostWindow::SHED_LEAST, BATCH).expect("a family knows its VMs");
        let process = vm.process.and_then(|id| self.procs.all.get_mut(&id));
        match (pages.is_empty(), process, manager.store(store)) {
            (false, Some(process), Some(file)) => process.send(&ToVm::Dedup { store, pages }, &[file.read_only()]),
            _ => vm.deduping = None,
        }
    }

    /// These pages have left a VM's window, and may have more.
    pub fn deduped(&mut self, generation: Generation, store: StoreId, pages: &[GfnRange]) {
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        let Some((family, member)) = vm.memory else { return };
        if vm.deduping != Some(store) {
            return self.end_vm(generation, Phase::Dead("its process has given back what it was not asked for".into()));
        }
        let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
        manager.dedup(member, store, pages).expect("a family knows its VMs");
        self.memory.budget.stir();
        if pages.is_empty() {
            vm.deduping = None;
        } else {
            self.memory.dedups.0.insert(generation);
        }
    }
}
