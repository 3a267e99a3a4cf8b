//! Pages that guests wait for, and pages that settle behind their backs.

use crate::server::ids::{FamilyId, Generation, ProcessId};
use crate::server::procs::process::Role;
use crate::server::registry::phase::Phase;
use crate::server::registry::vm::Vm;
use crate::server::{FamilyManager, Server};
use guest_mem::manager::Error as MemoryError;
use guest_mem::ops::Fault;
use guest_mem::{Gfn, Touch, VmId};
use std::collections::BTreeSet;
use std::error::Error as _;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long a family in which a page could not be filled in waits for the next try.
const RETRY: Duration = Duration::from_millis(50);

impl Server {
    /// Settles a batch of every family. Whether there is more, or may be.
    pub fn settle(&mut self, now: Instant) -> bool {
        let due: Vec<FamilyId> =
            self.memory.retries.iter().filter(|(_, at)| **at <= now).map(|(&family, _)| family).collect();
        for family in due {
            self.memory.retries.remove(&family);
            self.serve_waiting(family);
        }
        if !self.memory.families.values().any(FamilyManager::has_writeback) {
            self.memory.pace.all_settled();
            return false;
        }
        self.memory.pace.children(self.forks.await_guests(), now);
        if self.memory.pace.wait(now).is_some() {
            // Something may be left; the next round tells.
            return true;
        }
        let limit = self.memory.pace.batch(now);
        let started = Instant::now();
        let mut more = false;
        let mut failed = Vec::new();
        // A family in which something failed has its turn at the next try, and holds nobody else up.
        let retries = &self.memory.retries;
        for (&id, manager) in self.memory.families.iter_mut().filter(|(id, _)| !retries.contains_key(id)) {
            match manager.write_back(limit) {
                Ok(left) => more |= left,
                Err(error) => failed.push((id, error)),
            }
        }
        if more {
            let ended = Instant::now();
            log::trace!("a batch has settled in {:?}", ended - started);
            self.memory.pace.settled(started, ended);
        }
        for (family, error) in failed {
            self.memory_error(family, &error);
        }
        more
    }

    /// Pages have come, from swap or as copies: who waits for such is served before the next batch settles.
    pub fn pages_came(&mut self) {
        let now = Instant::now();
        self.memory.retries.extend(self.memory.families.keys().map(|&family| (family, now)));
    }

    /// Serves those again whose traps could not be answered.
    fn serve_waiting(&mut self, family: FamilyId) {
        let Some(manager) = self.memory.families.get(&family) else { return };
        let waiting: BTreeSet<VmId> = manager.waiting_for_pages().map(|(vm, _)| vm).collect();
        if !waiting.is_empty() {
            // As with new traps, a freeze that stands was announced before.
            let waits = |vm: &&Vm| vm.memory.is_some_and(|(of, vm)| of == family && waiting.contains(&vm));
            let processes: Vec<ProcessId> =
                self.registry.vms.iter().filter(waits).filter_map(|vm| vm.process).collect();
            // All of them, whatever the others have to say: there may be more to hear than belongs into one round.
            let unheard = processes.into_iter().filter(|&process| !self.serve_process(process)).count();
            if unheard > 0 {
                self.memory.retries.insert(family, Instant::now());
                return;
            }
        }
        if let Some(Err(error)) = self.memory.families.get_mut(&family).map(FamilyManager::retry) {
            self.memory_error(family, &error);
        }
    }

    /// Traps cannot be polled any more, which would keep the loop busy: the process has made the descriptor, whose flags it
    /// shares with us, one that waits.
    pub fn traps_broken(&mut self, id: ProcessId) {
        let Some(process) = self.procs.all.get_mut(&id) else { return };
        if let Some(token) = process.trap_token.take() {
            self.watches.remove(token, Rc::clone(&process.memory));
        }
        self.expel(id, "its process has tampered with its traps");
    }

    /// A VM's guests wait for pages.
    pub fn serve_traps(&mut self, id: ProcessId) {
        let Some(process) = self.procs.all.get(&id) else { return };
        let generation = match process.role {
            Role::Vm(generation) => generation,
            Role::Ending => return process.memory.dismiss_traps(),
            Role::Preparing => {
                log::debug!("{id:?} was to copy a page that has left its store meanwhile");
                self.procs.pool.ended(process.shape);
                return self.end_process(id);
            }
            // Nobody touches its window.
            Role::Pooled => return,
        };
        let memory = Rc::clone(&process.memory);
        let process = self.procs.all.get_mut(&id).expect("looked at above");
        if let Some(source) = memory.traps.get()
            && let Err(error) = source.read(&mut process.traps, 64)
        {
            log::debug!("traps of {id:?}: {error}");
        }
        // A freeze that stands was announced before the traps that it causes. Where there is more to hear than belongs into
        // one round, the traps are served when all is heard.
        if !self.serve_process(id) {
            return;
        }
        let Some(process) = self.procs.all.get_mut(&id) else { return };
        let mut traps = std::mem::take(&mut process.traps);
        // Several vCPUs may wait for one page, which one answer supplies: by a second one, a guest may have written to it,
        // and stand for a freeze that has moved it out.
        traps.sort_unstable_by_key(|trap| trap.address);
        traps.dedup_by_key(|trap| trap.address);
        if !traps.is_empty() {
            self.has_trapped(generation);
        }
        for trap in traps {
            if let Some(vm) = self.registry.vms.get_mut(generation) {
                vm.traps += 1;
                self.memory.traps += 1;
            }
            self.serve_trap(generation, memory.gfn(trap.address), trap.touch);
        }
    }

    /// A guest waits for a page.
    pub fn serve_trap(&mut self, generation: Generation, gfn: Gfn, touch: Touch) {
        let Some(record) = self.registry.vms.get(generation) else { return };
        let Some((family, vm)) = record.memory else { return };
        let parent = match (&record.phase, &record.born) {
            (Phase::Forking(_), Some((parent, _))) => self.registry.vms.get(*parent).filter(|parent| parent.is_alive()),
            _ => None,
        };
        let parent = parent.map(|parent| parent.generation);
        let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
        if let Some(parent) = parent
            && matches!(manager.family().fault(vm, gfn), Fault::WriteBack(_) | Fault::SwapIn(_))
        {
            self.working_sets.waited(parent, gfn);
        }
        let started = Instant::now();
        let answered = manager.fault(vm, gfn, touch);
        let alone = self.memory.families.iter().all(|(&id, manager)| id == family || !manager.has_writeback());
        let answered_at = Instant::now();
        log::trace!("{:?} waited at {gfn}: answered in {:?}", record.name, answered_at - started);
        match answered {
            // The next batch is what it needs next.
            Ok(true) if alone => {}
            Ok(_) => self.memory.pace.trapped(answered_at),
            Err(error) => self.memory_error(family, &error),
        }
    }

    /// A page could not be filled in. A planted page ends the family; everything else is tried again.
    pub fn memory_error(&mut self, family: FamilyId, error: &MemoryError) {
        log::error!("{error}: {}", error.source().map(ToString::to_string).unwrap_or_default());
        if error.is_planted() {
            let members: Vec<Generation> = self.members(family);
            for generation in members {
                self.end_vm(generation, Phase::Dead("memory of its family was tampered with".into()));
            }
        } else {
            self.memory.retries.entry(family).or_insert_with(|| Instant::now() + RETRY);
        }
    }
}
