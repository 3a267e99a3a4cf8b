//! What prepared processes are told to [expect](crate::server::procs::expect).

use crate::server::Server;
use crate::server::ids::{Generation, ProcessId};
use crate::server::procs::expect::{Expectation, told_first, without_shared};
use crate::server::procs::process::{Parcel, Role};
use crate::server::registry::launch::stores_of;
use crate::wire::{Expect, MachineShape, ToVm};
use guest_mem::GfnRange;
use rangemap::RangeSet;

impl Server {
    /// Tells one prepared process what to expect, if there is one that is to expect something else, and no other gets ready
    /// meanwhile. Whether there was.
    pub fn tell_what_to_expect(&mut self) -> bool {
        let Some((shape, parent, process)) = self.procs.pool.to_tell() else { return false };
        if self.expect(shape, parent, process) {
            self.procs.pool.withdraw(shape, process);
            self.procs.all.get_mut(&process).expect("a process of the pool").role = Role::Preparing;
        }
        true
    }

    /// Tells a process whose child it most likely becomes. Whether there is something that it is to get ready.
    fn expect(&mut self, shape: MachineShape, parent: Generation, process: ProcessId) -> bool {
        let memory = self.registry.vms.get(parent).and_then(|parent| parent.memory);
        let process = self.procs.all.get_mut(&process).expect("a process of the pool");
        process.expectation = Expectation::of(parent);
        self.procs.pool.expects(shape, process.id, parent);
        let Some((family, member)) = memory else { return false };
        let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
        let runs = without_shared(manager.runs_of_child(member).expect("a family knows its VMs"));
        // Where descriptors are short, it expects nothing.
        let Ok((stores, descriptors)) = stores_of(manager, &runs) else { return false };
        let state = self.procs.pool.state_to_expect(shape, parent);
        // Without traps it would plant zeros in the store of a page that has left it.
        let ahead = match self.host.features.userfaultfd {
            true => {
                let books = manager.family();
                let told = told_first(shape.machine).into_iter().flat_map(|page| books.at_hand(member, page));
                let writes = self.working_sets.writes(parent, books, member);
                let pages: RangeSet<u64> = told.chain(writes).map(GfnRange::raw).collect();
                pages.into_iter().map(GfnRange::from).collect()
            }
            false => Vec::new(),
        };
        process.expectation = Expectation::of(parent).with((family, runs.clone()), &ahead, state.clone());
        let expect = Expect { runs: runs.to_vec(), stores, ahead, state: state.as_deref().cloned() };
        process.send_when_ready(Parcel { message: ToVm::Expect(Box::new(expect)), descriptors });
        true
    }
}
