//! VMs that stand still for moments, unknown to their users, because they grow faster than memory is taken out.

use crate::server::Server;
use crate::server::ids::Generation;
use crate::server::registry::run::RunAction;
use crate::wire::ToVm;
use std::time::{Duration, Instant};

/// How long a VM stands still at most.
const HOLD_MOST: Duration = Duration::from_millis(300);

impl Server {
    /// Has a VM stand still, without telling.
    pub(super) fn hold(&mut self, generation: Generation, now: Instant) {
        if let (Some(vm), Some(seen)) =
            (self.registry.vms.get_mut(generation), self.memory.budget.seen.get_mut(&generation))
        {
            vm.run.hold();
            seen.held = Some(now);
            self.memory.budget.held.insert(generation);
            self.tell(generation, &ToVm::Pause);
        }
    }

    /// Lets a VM run on.
    pub fn release(&mut self, generation: Generation) {
        let action = self.registry.vms.get_mut(generation).map(|vm| vm.run.release());
        if action != Some(RunAction::Resume) {
            return;
        }
        if let Some(seen) = self.memory.budget.seen.get_mut(&generation) {
            (seen.held, seen.released) = (None, Some(Instant::now()));
        }
        self.tell(generation, &ToVm::Resume);
    }

    pub(super) fn release_all(&mut self) {
        let held: Vec<Generation> = self.memory.budget.held.iter().copied().collect();
        held.into_iter().for_each(|vm| self.release(vm));
    }

    /// Nobody stands still for long.
    pub(super) fn release_tired(&mut self, now: Instant) {
        let since = |vm: &Generation| self.memory.budget.seen.get(vm).and_then(|seen| seen.held);
        let tired = |vm: &Generation| since(vm).is_some_and(|at| now >= at + HOLD_MOST);
        let tired: Vec<Generation> = self.memory.budget.held.iter().copied().filter(tired).collect();
        tired.into_iter().for_each(|vm| self.release(vm));
    }

    /// A VM runs again, or is to stand still because somebody has asked for it meanwhile.
    pub fn released(&mut self, generation: Generation, then: RunAction) {
        self.memory.budget.held.remove(&generation);
        if then == RunAction::Pause {
            self.tell(generation, &ToVm::Pause);
        }
    }
}
