//! What is done as a freeze goes on, whoever wants it: here, and in the two that want freezes, `fork` and `memory::reclaim`.

use crate::server::Server;
use crate::server::freeze::Said;
use crate::server::freeze::op::{Broken, FreezeAction, FreezeEvent};
use crate::server::freeze::queue::{Last, Purpose, Step};
use crate::server::ids::{Generation, ProcessId};
use crate::server::procs::answers::Owed;
use crate::server::procs::process::Role;
use crate::server::registry::phase::Phase;
use crate::wire::{Frozen, RunState};
use guest_mem::StoreId;

impl Server {
    /// Freezes a VM for whoever has the turn, if it is now.
    pub fn freeze(&mut self, vm: Generation) {
        match self.registry.vms.get(vm).and_then(|vm| vm.freezes.turn()) {
            Some(Purpose::Fork(fork)) => self.freeze_for_fork(vm, fork),
            // Begun as soon as it is wanted, and only then.
            Some(Purpose::Swap) | None => {}
        }
    }

    /// A VM process has been told of a freeze.
    pub fn freeze_begins(&mut self, vm: Generation, store: StoreId) {
        if let Some(vm) = self.registry.vms.get_mut(vm) {
            vm.freezes.begin(store);
        }
    }

    /// A VM process says something of a freeze.
    pub fn freeze_says(&mut self, generation: Generation, said: Said) {
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        let (store, event) = said.event();
        let Some(step) = vm.freezes.on(store, event) else {
            return self.freeze_broken(generation, Broken::Order);
        };
        match (step.action, said) {
            (FreezeAction::Stand, _) => {
                if let Some((family, member)) = vm.memory {
                    let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
                    manager.stands(member).expect("a family knows its VMs");
                }
            }
            (FreezeAction::Take, Said::Frozen(frozen)) => self.take(generation, &step, &frozen),
            (FreezeAction::HandOn, Said::Saved { store, state, still }) => {
                let process = vm.process.and_then(|id| self.procs.all.get_mut(&id)).filter(|_| still);
                process.into_iter().for_each(|process| process.stood_still(store, &state));
                if let Purpose::Fork(fork) = step.purpose {
                    self.load_children(fork, generation, state);
                }
            }
            (FreezeAction::NotePause, Said::WentOn { pause_ns, .. }) => {
                if let Purpose::Fork(fork) = step.purpose {
                    self.note_pause(fork, pause_ns);
                }
            }
            (FreezeAction::Abort, Said::Failed(why)) => self.abort_freeze(generation, &step, &why),
            (FreezeAction::End(broken), _) => self.freeze_broken(generation, broken),
            // That copies are there has been noted, whatever became of the VM.
            _ => {}
        }
        self.freeze_stepped(generation, &step);
    }

    /// Nothing has come of a freeze for too long, and `why` says so.
    pub fn freeze_is_late(&mut self, generation: Generation, store: StoreId, why: &str) {
        let step =
            self.registry.vms.get_mut(generation).and_then(|vm| vm.freezes.on(Some(store), FreezeEvent::Deadline));
        match step.map(|step| step.action) {
            Some(FreezeAction::End(Broken::Silence)) => self.end_vm(generation, Phase::Dead(why.into())),
            Some(FreezeAction::End(broken)) => self.freeze_broken(generation, broken),
            _ => {}
        }
    }

    /// Whoever wanted a freeze hears when it is over, and nothing more is owed of it.
    fn freeze_stepped(&mut self, generation: Generation, step: &Step) {
        if step.last == Last::No {
            return;
        }
        let process = self.registry.vms.get(generation).and_then(|vm| vm.process);
        if let Some(process) = process.and_then(|id| self.procs.all.get_mut(&id)) {
            process.answers.paid(Owed::Freeze(step.store));
        }
        if let Purpose::Fork(fork) = step.purpose {
            self.fork_told(fork);
        }
    }

    /// A freeze has taken what it takes.
    fn take(&mut self, generation: Generation, step: &Step, frozen: &Frozen) {
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        let (Some((family, member)), Some(process)) = (vm.memory, vm.process) else { return };
        vm.fresh = false;
        let before = if vm.stands() { RunState::Paused } else { RunState::Running };
        self.procs.all[&process].memory.note_scratch(frozen);
        let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
        manager.finish_freeze(member, &frozen.harvest).expect("a family knows its VMs");
        if frozen.copy.is_some() {
            self.dedup_later(generation, frozen.store);
        }
        match step.purpose {
            Purpose::Fork(fork) => self.taken_for_fork(generation, fork, frozen, before),
            Purpose::Swap => self.taken_for_swap(generation, frozen),
        }
        self.freeze(generation);
    }

    /// The window could not freeze, and has changed nothing.
    fn abort_freeze(&mut self, generation: Generation, step: &Step, why: &str) {
        let Some(vm) = self.registry.vms.get(generation) else { return };
        if let Some(process) = vm.process.and_then(|id| self.procs.all.get(&id)) {
            process.memory.cut_lifeline();
        }
        if let Some((family, member)) = vm.memory {
            let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
            manager.abort_freeze(member).expect("a family knows its VMs");
        }
        match step.purpose {
            Purpose::Fork(fork) => {
                let why = format!("freeze VM {:?}: {why}", vm.name);
                self.fail_fork(fork, &why);
            }
            Purpose::Swap => self.no_freeze_for_swap(generation, step.store, why),
        }
        self.freeze(generation);
    }

    /// Whoever has the turn gets no freeze: there is no store for it.
    pub fn no_freeze(&mut self, generation: Generation, why: &str) {
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        let why = format!("freeze VM {:?}: {why}", vm.name);
        if let Some(Purpose::Fork(fork)) = vm.freezes.skip() {
            self.fail_fork(fork, &why);
        }
        self.freeze(generation);
    }

    fn freeze_broken(&mut self, generation: Generation, broken: Broken) {
        let why = match broken {
            Broken::Order => "its process told of a freeze that it was not asked for, or out of turn",
            Broken::Promise => "its process could not go on after a freeze",
            Broken::Silence => "does not answer",
        };
        self.end_vm(generation, Phase::Dead(why.into()));
    }

    /// A VM has ended, and these were its freezes.
    pub fn freezes_died(&mut self, generation: Generation, freezes: (Vec<Step>, Vec<Purpose>), why: &str) {
        let (steps, waiting) = freezes;
        for step in steps {
            match (step.action, step.purpose) {
                (FreezeAction::Abort, Purpose::Fork(fork)) => self.fail_fork(fork, why),
                (FreezeAction::Lose, Purpose::Fork(fork)) => self.state_is_lost(fork, why),
                // What was for swap is gone with the VM.
                _ => {}
            }
            self.freeze_stepped(generation, &step);
        }
        for purpose in waiting {
            if let Purpose::Fork(fork) = purpose {
                self.fail_fork(fork, why);
            }
        }
    }

    /// All pages that stayed with the parent at this freeze can be read, also of a parent that is about to end: what its window
    /// shows may be others by now.
    pub fn copied(&mut self, process: ProcessId, store: StoreId) {
        let Some(process) = self.procs.all.get(&process) else { return };
        let role = process.role;
        process.memory.copied(store);
        self.pages_came();
        if let Role::Vm(vm) = role {
            self.freeze_says(vm, Said::Copied { store });
        }
    }
}
