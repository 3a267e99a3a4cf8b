//! Children: they begin when their parent has been frozen, and are waited for until they live.

use super::op::Step;
use crate::api::AgentNotice;
use crate::clock::monotonic_ns;
use crate::devices::virtio::Noticed;
use crate::machine::state::PackedState;
use crate::server::Server;
use crate::server::ids::{FamilyId, ForkId, Generation};
use crate::server::procs::process::Parcel;
use crate::server::registry::launch::Beginning;
use crate::server::registry::vm::Vm;
use crate::wire::{self, Machine, RunState, ToVm};
use guest_mem::{GfnRange, PageCount, VmId};
use std::time::Instant;

impl Server {
    pub fn start_children(&mut self, fork: ForkId, (family, parent): (FamilyId, VmId)) {
        let op = self.forks.get(fork).expect("a fork under way");
        if op.failure().is_some() {
            return;
        }
        let parent_generation = op.parent;
        self.write_back_ahead(parent_generation, (family, parent));
        let op = self.forks.get(fork).expect("a fork under way");
        let ahead = self.working_sets.writes(parent_generation, self.memory.families[&family].family(), parent);
        let Some(parent_vm) = self.registry.vms.get(op.parent) else { return };
        let (balloon_pages, guest_memory) = (parent_vm.balloon_pages, parent_vm.guest_memory);
        let asked_ns = op.asked_ns();
        let (asked_balloon, idle) = (op.balloon.0, op.balloon.1.of_child(Instant::now()));
        let activity = if op.paused { RunState::Paused } else { RunState::Running };
        let children: Vec<Generation> = op.children().collect();
        for (index, generation) in (1..).zip(children) {
            let Some(process) = self.registry.vms.get(generation).and_then(|vm| vm.process) else { continue };
            let window = self.window_of(process);
            let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
            let child = manager.fork(parent, window).expect("a family knows its VMs");
            let runs = manager.family().runs(child).len() as u64;
            let vm = self.registry.vms.get_mut(generation).expect("a child of the fork");
            vm.memory = Some((family, child));
            if activity == RunState::Paused {
                vm.run.begin_paused();
            }
            vm.born = Some((parent_generation, ahead.clone()));
            vm.forked_ns = Some(asked_ns);
            self.working_sets.inherit(parent_generation, generation);
            (vm.balloon_pages, vm.guest_memory) = (balloon_pages, guest_memory);
            (vm.asked_balloon, vm.idle) = (asked_balloon, idle);
            self.child_did(fork, generation, Step::Mapped { runs });
            let origin = wire::Origin::Fork { index };
            self.start(generation, Beginning { origin, kernel: None, activity, ahead: ahead.clone() });
        }
    }

    /// Writes back what children are about to read, if it is not in a store yet.
    fn write_back_ahead(&mut self, parent: Generation, (family, member): (FamilyId, VmId)) {
        let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
        for gfn in self.working_sets.reads(parent) {
            if !manager.family().at_hand(member, GfnRange::new(gfn, PageCount(1))).is_empty() {
                self.working_sets.was_there(parent, gfn);
            } else if let Err(error) = manager.write_ahead(member, gfn) {
                log::debug!("write {gfn} back ahead: {error}");
            }
        }
    }

    /// A child tells what it has written since it began: so far, or in all of its first moments.
    pub fn child_wrote(&mut self, child: Generation, pages: &[GfnRange], last: bool) {
        let Some((parent, ahead)) = self.registry.vms.get(child).and_then(|vm| vm.born.as_ref()) else { return };
        if self.registry.vms.get(*parent).is_some_and(Vm::is_alive) {
            match last {
                true => self.working_sets.began(*parent, child, ahead, pages),
                false => self.working_sets.wrote(*parent, child, pages),
            }
        }
    }

    /// The parent's state is there, and its children can run.
    pub fn load_children(&mut self, fork: ForkId, parent: Generation, state: PackedState) {
        let Some(op) = self.forks.get(fork) else { return };
        let children: Vec<Generation> = op.children().collect();
        for process in children.iter().filter_map(|&child| self.registry.vms.get(child).and_then(|vm| vm.process)) {
            let process = self.procs.all.get_mut(&process).expect("a VM's process");
            let expected = process.expectation.take_state().is_some_and(|expected| *expected == state);
            let message = if expected { ToVm::LoadExpected } else { ToVm::Load(state.clone()) };
            process.send_when_ready(Parcel { message, descriptors: Vec::new() });
        }
        if let Some(vm) = self.registry.vms.get(parent) {
            self.procs.pool.saved(vm.shape, parent, state);
        }
    }

    /// A child's vCPU is about to run, or stands still as asked. A Linux guest gives no sign of its own.
    pub fn child_ready(&mut self, fork: ForkId, generation: Generation, at_ns: Option<u64>) {
        let silent = self.registry.vms.get(generation).is_some_and(|vm| vm.shape.machine == Machine::Linux);
        let step = match at_ns {
            None => Step::Stands,
            Some(at_ns) if silent => Step::RunsSilently { at_ns },
            Some(at_ns) => Step::Runs { at_ns },
        };
        self.child_did(fork, generation, step);
        self.finish_fork_if_there(fork);
    }

    /// A child has shown its first sign of life.
    pub fn child_alive(&mut self, fork: ForkId, generation: Generation, at_ns: u64) {
        self.child_did(fork, generation, Step::Alive { at_ns });
        self.finish_fork_if_there(fork);
    }

    /// What came of the notice of the fork that a child's agent was given.
    pub fn child_noticed(&mut self, generation: Generation, noticed: Noticed) {
        let now = monotonic_ns();
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        // A process that has been taken over may say so of a VM that was launched.
        let Some(asked_ns) = vm.forked_ns else { return };
        let step = match noticed {
            Noticed::NoAgent => Step::NoAgent,
            Noticed::Acked { reseeded, trouble } => {
                let acked_us = now.saturating_sub(asked_ns) / 1000;
                let trouble = Some(trouble).filter(|trouble| !trouble.is_empty());
                vm.agent = Some(AgentNotice { acked_us, reseeded, trouble });
                Step::Acked { at_ns: now }
            }
        };
        if let Some(op) = self.forks.of_child(generation) {
            op.child(generation, step);
        }
    }

    /// A child never came to life: the whole fork fails.
    pub fn child_failed(&mut self, fork: ForkId, generation: Generation, why: String) {
        let Some(op) = self.forks.get_mut(fork) else { return self.forget_vm(generation) };
        op.fail(why);
        op.child(generation, Step::Failed);
        self.finish_fork_if_there(fork);
    }

    fn child_did(&mut self, fork: ForkId, generation: Generation, step: Step) {
        if let Some(op) = self.forks.get_mut(fork) {
            op.child(generation, step);
        }
    }
}
