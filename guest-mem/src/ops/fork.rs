//! Fork: one more VM that sees what its parent saw at its last freeze.

use crate::family::{Family, Vm, VmId};
use crate::object::Slot;
use crate::window::{Run, Source};
use rangemap::RangeMap;

impl Family {
    /// A child of `parent`. It shares the parent's stage-2 tables, root and all, and its objects: parent and child are
    /// equals from here on. Costs the same at any RAM size, but for the list of the child's runs.
    ///
    /// The parent's live layer must have been frozen, and not been written since.
    pub fn fork(&mut self, parent: VmId) -> VmId {
        let vm = self.vm_mut(parent);
        vm.map.share();
        let (map, root) = (vm.map.clone(), vm.root);
        for (_, entry) in map.iter() {
            if let Some(object) = entry.object {
                self.objects.map(object);
            }
        }
        let root = self.stage2.share(root);
        let runs = self.fresh_runs(parent);
        self.insert_vm(Vm { map, root, runs, freezing: None })
    }

    /// The runs of a new window on what `vm` sees: as its own, but anonymous where pages have turned out zero.
    fn fresh_runs(&self, vm: VmId) -> RangeMap<u64, Source> {
        let vm = self.vm(vm);
        let mut runs = vm.runs.clone();
        let zeros = |run: &Run| matches!(run.source, Source::Store { store, .. } if self.objects.has_zeros(store));
        for run in vm.runs().filter(zeros) {
            for (pages, entry) in vm.map.iter() {
                for segment in self.objects.resolve(entry.object, entry.origin, run.pages.intersect(pages)) {
                    if segment.found.is_some_and(|found| found.slot == Slot::Zero) {
                        runs.insert(segment.pages.raw(), Source::Anonymous);
                    }
                }
            }
        }
        runs
    }
}
