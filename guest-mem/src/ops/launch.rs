//! Launch: a new VM over files and fresh memory.

use crate::addr::GfnRange;
use crate::family::{Family, FileMapping, Vm, VmId};
use crate::map::{AddressMap, MapEntry};
use crate::stage2::Cursor;
use crate::window::{Run, Source};

impl Family {
    /// A VM whose memory is `ram`, with `files` in it.
    pub fn launch(&mut self, ram: &[GfnRange], files: &[FileMapping]) -> VmId {
        let mut map = AddressMap::default();
        for &pages in ram {
            map.set(pages, MapEntry::ANONYMOUS);
        }
        for mapping in files {
            let entry = MapEntry {
                object: Some(mapping.file),
                origin: mapping.pages.start(),
                needs_copy: true,
                ..MapEntry::ANONYMOUS
            };
            map.set(mapping.pages, entry);
        }
        let root = self.stage2.new_root();
        let mut vm = Vm::new(map, root);
        for run in self.chain_runs(&vm.map) {
            Cursor::new(&mut self.stage2, &mut vm.root).set(run, &mut Vec::new());
        }
        self.insert_vm(vm)
    }

    /// What the chains behind a map supply, run by run: what stage-2 says of a VM that has just been launched.
    pub(crate) fn chain_runs(&self, map: &AddressMap) -> Vec<Run> {
        let mut runs = Vec::new();
        for (pages, entry) in map.iter() {
            for segment in self.objects.resolve(entry.object, entry.origin, pages) {
                let source = segment
                    .found
                    .and_then(|found| found.slot.store().map(|store| Source::Store { store, origin: found.origin }));
                let run = Run { pages: segment.pages, source: source.unwrap_or(Source::Anonymous) };
                crate::stage2::push_run(&mut runs, run);
            }
        }
        runs
    }
}
