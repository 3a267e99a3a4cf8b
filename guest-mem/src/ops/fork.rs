//! Fork: one more VM that sees what its parent saw at its last freeze.

use crate::addr::{GfnRange, PageCount};
use crate::family::{Family, Vm, VmId};
use crate::object::Slot;
use crate::stage2::push_run;
use crate::window::{Run, Source};

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
        let runs = self.fresh_runs(parent).into_iter().map(|run| (run.pages.raw(), run.source)).collect();
        self.insert_vm(Vm { map, root, runs, freezing: None })
    }

    /// The runs of a new window on what `vm` sees: as stage-2 says, but anonymous where pages have turned out zero.
    fn fresh_runs(&self, vm: VmId) -> Vec<Run> {
        let vm = self.vm(vm);
        let mut runs = Vec::new();
        for (pages, entry) in vm.map.iter() {
            for run in self.stage2.runs(vm.root, pages) {
                if run.source == Source::Anonymous || !self.has_zeros(run.pages) {
                    push_run(&mut runs, run);
                    continue;
                }
                for segment in self.objects.resolve(entry.object, entry.origin, run.pages) {
                    let zero = segment.found.is_none_or(|found| found.slot == Slot::Zero);
                    let source = if zero { Source::Anonymous } else { run.source };
                    push_run(&mut runs, Run { pages: segment.pages, source });
                }
            }
        }
        runs
    }

    /// Whether any object has a page known to be zero among these.
    fn has_zeros(&self, pages: GfnRange) -> bool {
        pages.count() > PageCount(0)
            && self.objects.iter().any(|(_, o)| o.slots.overlapping(pages.raw()).any(|(_, s)| *s == Slot::Zero))
    }
}
