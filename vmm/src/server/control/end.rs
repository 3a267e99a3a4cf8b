//! `stop`, `kill`, `wait`, `rm`, `shutdown`: how VMs end.

use crate::api::{Answer, ErrorKind, Failure, Removed};
use crate::server::clients::deadlines::Deadline;
use crate::server::ids::{ClientId, FamilyId, Generation, ProcessId};
use crate::server::procs::process::{Role, VmProcess};
use crate::server::registry::phase::{Phase, Starter};
use crate::server::registry::removals::{EndCause, Remains};
use crate::server::registry::vm::Vm;
use crate::server::{FamilyManager, Server};
use crate::wire::ToVm;
use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

impl Server {
    pub fn stop(&mut self, name: &str) -> Result<(), Failure> {
        let generation = self.find_alive(name)?.generation;
        self.tell(generation, &ToVm::Stop);
        Ok(())
    }

    pub fn wait(&mut self, client: ClientId, name: &str, timeout_ms: Option<u64>) {
        match self.find(name).map(|vm| (vm.generation, vm.is_alive(), self.registry.vms.summary(vm, None))) {
            Err(failure) => self.reply(client, Err(failure)),
            Ok((_, false, summary)) => self.reply(client, Ok(Answer::Ended(summary))),
            Ok((generation, true, _)) => {
                self.registry.vms.get_mut(generation).expect("found above").waiters.push(client);
                self.set_deadline(timeout_ms, Deadline::End(generation, client));
            }
        }
    }

    /// Ends a VM, which stays listed.
    pub fn kill(&mut self, client: ClientId, name: &str) {
        match self.find_alive(name).map(|vm| vm.generation) {
            Err(failure) => self.reply(client, Err(failure)),
            Ok(generation) => {
                self.end_vm(generation, Phase::Dead("killed, as its user asked".into()));
                self.grant_wants();
                self.answer_when_ended(client, Answer::Done, |vm| vm == Some(generation));
            }
        }
    }

    /// Removes the VMs that are there.
    pub fn remove(&mut self, client: ClientId, names: &[String]) {
        let mut gone = Removed::default();
        let mut generations = Vec::new();
        for name in names {
            match self.registry.vms.find(name).map(|vm| vm.generation) {
                None => gone.missing.push(name.clone()),
                Some(generation) if generations.contains(&generation) => {}
                Some(generation) => {
                    gone.removed.push(name.clone());
                    generations.push(generation);
                }
            }
        }
        // Who names a VM before its children has them end first all the same.
        generations.reverse();
        let of_these: HashSet<Generation> = generations.iter().copied().collect();
        self.forget_vms(generations);
        // This client does not wait for somebody else's processes, which may hold on to what they have.
        let waits = |vm: Option<Generation>| vm.is_none_or(|vm| of_these.contains(&vm));
        self.answer_when_ended(client, Answer::Removed(gone), waits);
    }

    /// Removes all VMs.
    pub fn remove_all(&mut self, client: ClientId) {
        let removed = self.registry.vms.iter().map(|vm| vm.name.clone()).collect();
        self.forget_vms(self.all_from_the_leaves());
        self.answer_when_ended(client, Answer::Removed(Removed { removed, missing: Vec::new() }), |_| true);
    }

    fn forget_vms(&mut self, generations: Vec<Generation>) {
        generations.into_iter().for_each(|generation| self.forget_vm(generation));
        self.grant_wants();
        // With the last VM of a shape its pool goes, and is gone when this is answered.
        self.end_unused();
    }

    /// Answers a client when processes that are ending, those of these VMs, are gone.
    fn answer_when_ended(&mut self, client: ClientId, answer: Answer, of_these: impl Fn(Option<Generation>) -> bool) {
        let ending = self.procs.all.values().filter(|process| process.role == Role::Ending && of_these(process.vm));
        let processes = ending.map(|process| process.id).collect();
        self.registry.removals.wait(Some(client), processes, answer, Instant::now());
    }

    /// All VMs, children first: then nothing of their parents has to settle for them. Leaves from the oldest on, since the
    /// kernel looks for processes that have ended among the oldest first.
    fn all_from_the_leaves(&self) -> Vec<Generation> {
        let parents: HashSet<Generation> = self.registry.vms.iter().filter_map(Vm::parent).collect();
        let (inner, leaves): (Vec<&Vm>, Vec<&Vm>) =
            self.registry.vms.iter().partition(|vm| parents.contains(&vm.generation));
        leaves.into_iter().chain(inner.into_iter().rev()).map(|vm| vm.generation).collect()
    }

    /// Ends all VMs, and the server when they are gone. Who sends a second signal does not want to wait for them.
    pub fn shut_down(&mut self, cause: EndCause) {
        let again = self.stopping.replace(cause).is_some();
        if again && cause == EndCause::Signal {
            return self.registry.removals.give_up();
        }
        self.end_zygote();
        self.forget_vms(self.all_from_the_leaves());
        let client = match cause {
            EndCause::Client(client) => Some(client),
            EndCause::Signal | EndCause::HomeIsGone => None,
        };
        let processes = self.procs.all.keys().copied().collect();
        self.registry.removals.wait(client, processes, Answer::Done, Instant::now());
    }

    /// Answers those whose processes are gone.
    pub fn finish_removals(&mut self, now: Instant) {
        let remains = Left { processes: &self.procs.all, families: &self.memory.families };
        for (client, reply) in self.registry.removals.finish(now, &remains) {
            match (client, reply) {
                (Some(client), reply) => self.reply(client, reply),
                (None, Ok(_)) => {}
                (None, Err(failure)) => log::error!("{failure}"),
            }
        }
    }

    /// Ends a VM if it has not ended, and takes it off the list.
    pub fn forget_vm(&mut self, generation: Generation) {
        self.end_vm(generation, Phase::Dead("removed".into()));
        self.registry.vms.remove(generation);
    }

    /// A VM has come to its end: its process ends, what only it held is freed, and everybody who waits is told.
    pub fn end_vm(&mut self, generation: Generation, end: Phase) {
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        let Some((why, starter)) = vm.phase.end(end, &vm.name) else { return };
        let (memory, process) = (vm.memory.take(), vm.process.take());
        let (freezes, viewers) = (vm.freezes.died(), std::mem::take(&mut vm.viewers));
        let waiters = std::mem::take(&mut vm.waiters);
        vm.deduping = None;
        let mut asked: Vec<ClientId> = vm.sends.drain().map(|(_, client)| client).chain(vm.run.end()).collect();
        let remove = vm.remove_when_off;

        log::info!("{why}");
        self.working_sets.forget(generation);
        if let Some((family, member)) = memory {
            let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
            manager.exit(member).expect("a family knows its VMs");
        }
        if let Some(id) = process {
            match memory {
                Some(_) => {
                    let process = self.procs.all.get_mut(&id).expect("a VM's process");
                    process.role = Role::Ending;
                    if process.ready {
                        process.kill();
                    }
                }
                None => self.end_process(id),
            }
        }
        // While it is listed: a child of a fork that fails is not for long.
        self.answer_stats_waiters(generation);
        self.freezes_died(generation, freezes, &why);
        match starter {
            Starter::Nobody => {}
            Starter::Client(client) => self.reply(client, Err(Failure::new(ErrorKind::VmEnded, why.clone()))),
            Starter::Fork(fork) => self.child_failed(fork, generation, why.clone()),
        }
        asked.extend(self.memory.balloons.ended(generation));
        asked.extend(self.connections_end(generation));
        for client in asked {
            self.reply(client, Err(Failure::new(ErrorKind::VmEnded, why.clone())));
        }
        if let Some(summary) = self.registry.vms.get(generation).map(|vm| self.registry.vms.summary(vm, None)) {
            for client in waiters {
                self.reply(client, Ok(Answer::Ended(summary.clone())));
            }
        }
        for viewer in viewers {
            self.clients.close(viewer);
        }
        self.check_lost_vm(generation);
        self.deadlines.forget(generation);
        if remove {
            self.registry.vms.remove(generation);
        }
    }
}

/// What there still is.
struct Left<'a> {
    processes: &'a BTreeMap<ProcessId, VmProcess>,
    families: &'a BTreeMap<FamilyId, FamilyManager>,
}

impl Remains for Left<'_> {
    fn has(&self, process: ProcessId) -> bool {
        self.processes.contains_key(&process)
    }

    fn is_freeing(&self) -> bool {
        self.families.values().any(|manager| manager.windows() == 0 && manager.has_writeback())
    }
}
