//! Launch: a new VM over files, shared memory and fresh memory.

use crate::addr::{GfnRange, PageOrigin};
use crate::family::{Family, ObjectMapping, VmBooks};
use crate::ids::{Run, Source, VmId};
use crate::object::{Found, ObjectKind};
use crate::space::map::{AddressMap, MapEntry, Sharing};
use crate::stage2::Cursor;

impl Family {
    /// A VM whose memory is `ram`, with `objects` in it.
    pub fn launch(&mut self, ram: &[GfnRange], objects: &[ObjectMapping]) -> VmId {
        let mut map = AddressMap::default();
        for &pages in ram {
            map.set(pages, MapEntry::ANONYMOUS);
        }
        for &ObjectMapping { pages, object } in objects {
            let sharing = match self.objects.get(object).kind {
                ObjectKind::Shared => Sharing::Shared,
                ObjectKind::Anonymous | ObjectKind::File => Sharing::CopyOnWrite,
            };
            let needs_copy = sharing == Sharing::CopyOnWrite;
            let (object, origin) = (Some(object), PageOrigin::at(pages.start()));
            map.set(pages, MapEntry { object, origin, needs_copy, sharing, ..MapEntry::ANONYMOUS });
        }
        let root = self.stage2.new_root();
        let mut vm = VmBooks::new(map, root);
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
                let source = segment.found.and_then(|found| self.source_of(found)).unwrap_or(Source::Anonymous);
                crate::space::runs::push_run(&mut runs, Run { pages: segment.pages, source });
            }
        }
        runs
    }

    /// How a window shows what an object has.
    fn source_of(&self, Found { object, origin, slot }: Found) -> Option<Source> {
        let store = slot.store()?;
        Some(match self.objects.get(object).kind {
            ObjectKind::Shared => Source::Shared { store, origin },
            ObjectKind::Anonymous | ObjectKind::File => Source::Store { store, origin },
        })
    }
}
