//! Processes for VMs: from the pool, or made now; and the end of those that nobody needs.

use crate::server::Server;
use crate::server::ids::{Generation, ProcessId};
use crate::server::procs::pool::{PoolActions, PoolNext, Rested, Rivals};
use crate::server::procs::process::{Role, VmProcess};
use crate::server::procs::window::RemoteWindow;
use crate::wire::MachineShape;
use std::io;
use std::rc::Rc;
use std::time::Instant;

impl Server {
    /// A process for a VM of this shape, a child of `parent`: a prepared one, or one that starts to prepare itself now.
    pub fn take_process(&mut self, shape: MachineShape, parent: Option<Generation>) -> io::Result<ProcessId> {
        match self.procs.pool.take(shape, parent, Instant::now()) {
            Some(id) => Ok(id),
            None => self.spawn_process(shape),
        }
    }

    /// Fills the pool by at most one process, or empties it. Whether there is more to do at once. `pages`: guests wait for
    /// some, or soon will.
    pub fn tend_pool(&mut self, now: Instant, pages: bool) -> bool {
        self.end_unused();
        let rivals = Rivals { memory: self.memory.budget.is_tight(), pages, fork: self.forks.hurry(now) };
        let PoolActions { end, next } = self.procs.pool.tend(now, rivals);
        end.into_iter().for_each(|id| self.end_process(id));
        match next {
            PoolNext::Nothing => false,
            PoolNext::Tell => self.tell_what_to_expect(),
            PoolNext::Make(shape, rested) => match self.spawn_process(shape) {
                Ok(_) => true,
                Err(error) => {
                    if rested == Rested::No {
                        log::warn!("prepare a VM process for the pool: {error}");
                    }
                    self.procs.pool.rest(shape, now);
                    false
                }
            },
        }
    }

    /// Ends the prepared processes of shapes that no VM has any more, and those on their way.
    pub fn end_unused(&mut self) {
        let (stopping, vms) = (self.stopping.is_some(), &self.registry.vms);
        let is_used = |shape| !stopping && vms.iter().any(|vm| vm.is_alive() && vm.shape == shape);
        for shape in self.procs.pool.drop_unused(is_used) {
            let spare =
                |process: &&VmProcess| process.shape == shape && matches!(process.role, Role::Preparing | Role::Pooled);
            let spare: Vec<ProcessId> = self.procs.all.values().filter(spare).map(|process| process.id).collect();
            spare.into_iter().for_each(|id| self.end_process(id));
        }
    }

    /// Prepared processes there are.
    pub fn pooled(&self) -> u64 {
        self.procs.all.values().filter(|process| process.is_prepared()).count() as u64
    }

    /// Ends a process that holds no window. One that is not prepared yet ends when it is: only then its keeper is known.
    pub fn end_process(&mut self, id: ProcessId) {
        if let Some(process) = self.procs.all.get_mut(&id) {
            process.role = Role::Ending;
            if process.ready {
                process.kill();
                process.kill_keeper();
            }
        }
    }

    /// The window of the process that is to hold a VM's memory.
    pub fn window_of(&self, id: ProcessId) -> RemoteWindow {
        RemoteWindow(Rc::clone(&self.procs.all[&id].memory))
    }
}
