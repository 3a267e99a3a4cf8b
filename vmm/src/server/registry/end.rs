//! `stop`, `kill`, `wait`, `rm`, `shutdown`: how VMs end.

use crate::api::{Answer, ErrorKind, Failure, Removed};
use crate::server::Server;
use crate::server::clients::deadlines::Deadline;
use crate::server::ids::{ClientId, Generation, ProcessId};
use crate::server::procs::process::Role;
use crate::server::registry::vm::{Hold, Phase, Vm};
use crate::units::count;
use crate::wire::ToVm;
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// Why the server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndCause {
    /// This client asked for it, and is told.
    Client(ClientId),
    /// A signal did.
    Signal,
    /// There is no home any more in which somebody would look for it.
    HomeIsGone,
}

/// Somebody, a client mostly, who waits until these processes are gone.
#[derive(Debug)]
pub struct Removal {
    client: Option<ClientId>,
    processes: Vec<ProcessId>,
    /// What it is told then.
    answer: Answer,
    /// It waits no longer.
    pub until: Instant,
}

/// How long the memory of processes that have been ended may stay. Where it stays longer, somebody holds on to it.
const PATIENCE: Duration = Duration::from_secs(10);

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
        self.registry.removals.push(Removal {
            client: Some(client),
            processes,
            answer,
            until: Instant::now() + PATIENCE,
        });
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
            return self.registry.removals.clear();
        }
        self.end_zygote();
        self.forget_vms(self.all_from_the_leaves());
        let client = match cause {
            EndCause::Client(client) => Some(client),
            EndCause::Signal | EndCause::HomeIsGone => None,
        };
        let processes = self.procs.all.keys().copied().collect();
        let until = Instant::now() + PATIENCE;
        self.registry.removals.push(Removal { client, processes, answer: Answer::Done, until });
    }

    /// Answers those whose processes are gone.
    pub fn finish_removals(&mut self, now: Instant) {
        let processes = &self.procs.all;
        let left = |removal: &Removal| removal.processes.iter().filter(|id| processes.contains_key(id)).count();
        // What families that are gone had in swap is given back bit by bit.
        let freeing = self.memory.families.values().any(|manager| manager.windows() == 0 && manager.has_writeback());
        let over = |removal: &mut Removal| removal.until <= now || (!freeing && left(removal) == 0);
        let done =
            self.registry.removals.extract_if(.., over).map(|removal| (left(&removal), removal.client, removal.answer));
        for (left, client, answer) in done.collect::<Vec<_>>() {
            let reply = match left {
                0 => Ok(answer),
                left => {
                    let processes = count(left as u64, "VM process");
                    let why = format!("the memory of {processes} is held on to by somebody");
                    Err(Failure::host(why))
                }
            };
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
        let Some(vm) = self.registry.vms.get_mut(generation).filter(|vm| vm.is_alive()) else { return };
        let before = std::mem::replace(&mut vm.phase, end.clone());
        let name = vm.name.clone();
        let (memory, process) = (vm.memory.take(), vm.process.take());
        let (freezes, viewers) = (vm.freezes.died(), std::mem::take(&mut vm.viewers));
        let waiters = std::mem::take(&mut vm.waiters);
        vm.shedding = None;
        vm.hold = Hold::Free;
        let late = std::mem::take(&mut vm.late_pausers);
        let mut asked: Vec<ClientId> =
            vm.sends.drain().map(|(_, client)| client).chain(vm.pausers.drain(..)).chain(late).collect();
        let remove = vm.remove_when_off;

        let why = match (&end, &before) {
            (Phase::Dead(why), Phase::Live) => format!("VM {name:?} is dead: {why}"),
            (Phase::Dead(why), _) => format!("VM {name:?} did not start: {why}"),
            _ => format!("VM {name:?} is off"),
        };
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
        match before {
            Phase::Launching(Some(client)) => self.reply(client, Err(Failure::new(ErrorKind::VmEnded, why.clone()))),
            Phase::Forking(fork) => self.child_failed(fork, generation, why.clone()),
            _ => {}
        }
        asked.extend(self.balloon_ops_of(generation));
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
