//! `fork`: freeze the parent, share what it has, start the children.

pub mod children;
pub mod hint;
pub mod op;

use crate::api::{Answer, ErrorKind, Failure, Fork, MAX_CHILDREN, MAX_NAME};
use crate::clock::monotonic_ns;
use crate::machine::state::PackedState;
use crate::name::check_name;
use crate::server::Server;
use crate::server::fork::hint::Hint;
use crate::server::freeze::queue::Purpose;
use crate::server::ids::{ClientId, FamilyId, ForkId, Generation};
use crate::server::registry::phase::Phase;
use crate::server::registry::quota;
use crate::server::registry::vm::Ancestry;
use crate::wire::{Frozen, Machine, RunState, Take, ToVm};
use guest_mem::manager::{Copied, WRITEBACK_BATCH};
use guest_mem::{Destination, VmId};
use op::{Asker, ForkOp};
use std::collections::HashSet;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A guest that asks for children itself gets fewer than this at a time, and only as long as there are no more VMs than this:
/// one that does so in a loop leaves something to others.
const INSIDE_EACH: u32 = 65;
const INSIDE_ALL: usize = 1024;

impl Server {
    pub fn fork(&mut self, client: ClientId, fork: Fork) {
        self.host.fork_begins(Instant::now());
        let asked_ns = self.clients.asked_ns(client);
        let checked = self.find_started(&fork.name).and_then(|parent| {
            let expires = quota::expires(fork.ttl_ms, Instant::now())?;
            if fork.wait_agent_ms.is_some() && self.find(&fork.name)?.shape.machine != Machine::Linux {
                let why = format!("VM {:?} has the built-in guest, which has no agent", fork.name);
                return Err(Failure::new(ErrorKind::Unsupported, why));
            }
            self.check_quotas(Some(parent), fork.count as usize)?;
            let names = match &fork.children[..] {
                [] => self.child_names(parent, fork.prefix.as_deref(), fork.count)?,
                children => self.given_names(children, &fork)?,
            };
            Ok((parent, names, expires))
        });
        match checked {
            Err(failure) => self.reply(client, Err(failure)),
            Ok((parent, names, expires)) => {
                let mut op = ForkOp::new(Asker::Client(client), parent, asked_ns, Instant::now());
                (op.paused, op.wait_settled) = (fork.paused, fork.wait_settled);
                // One that is to stand still hears of nothing.
                let patience = fork.wait_agent_ms.filter(|_| !fork.paused).map(Duration::from_millis);
                op.agents_by = patience.and_then(|patience| Instant::now().checked_add(patience));
                op.hint = fork.hint_free_ms.map_or(Hint::Unasked, Hint::Wanted);
                self.begin_fork(op, names, expires);
            }
        }
    }

    /// The guest of `parent` rang for a fork.
    pub fn fork_from_inside(&mut self, parent: Generation, count: u32) {
        self.host.fork_begins(Instant::now());
        let asked_ns = monotonic_ns();
        let Some(vm) = self.registry.vms.get(parent) else { return };
        let lineage = Rc::clone(&vm.ancestry.lineage);
        // Those that have ended count as well: they are listed until somebody removes them.
        let there = self.registry.vms.iter().len();
        let names = match count {
            INSIDE_EACH.. => Err(Failure::bad_request(format!("{count} children: fewer than {INSIDE_EACH} at a time"))),
            _ if there + count as usize > INSIDE_ALL => {
                let why = format!("{there} VMs are there: guests fork while there are at most {INSIDE_ALL}");
                Err(Failure::new(ErrorKind::Limit, why))
            }
            _ => self
                .check_quotas(Some(parent), count as usize)
                .and_then(|()| lineage.ask(count, Instant::now()))
                .and_then(|()| self.child_names(parent, None, count)),
        };
        match names {
            Err(failure) => self.tell_guest(parent, Err(failure.message)),
            Ok(names) => self.begin_fork(ForkOp::new(Asker::Guest, parent, asked_ns, Instant::now()), names, None),
        }
    }

    pub fn find_started(&self, name: &str) -> Result<Generation, Failure> {
        let vm = self.find_alive(name)?;
        match vm.phase {
            Phase::Live => Ok(vm.generation),
            _ => Err(Failure::new(ErrorKind::Busy, format!("VM {name:?} has not started yet"))),
        }
    }

    /// The next names PREFIX-1, PREFIX-2, …, where the prefix is, unless one is given, what the first VM of the family was
    /// called: so names do not grow with each generation.
    fn child_names(&mut self, parent: Generation, prefix: Option<&str>, count: u32) -> Result<Vec<String>, Failure> {
        if !(1..=MAX_CHILDREN).contains(&count) {
            return Err(Failure::bad_request(format!("{count} children: from 1 to {MAX_CHILDREN} at a time")));
        }
        let family = Rc::clone(&self.registry.vms.get(parent).expect("found above").ancestry.lineage.name);
        let prefix = prefix.unwrap_or(&family);
        check_name(prefix).map_err(|e| Failure::bad_request(e.to_string()).about(prefix))?;
        let names = self.registry.vms.draw_names(prefix, count as usize);
        if names.last().is_some_and(|name| name.len() > MAX_NAME) {
            let why =
                format!("names {prefix}-N would be longer than {MAX_NAME}: give a prefix (--name) or a child's name");
            return Err(Failure::bad_request(why));
        }
        Ok(names)
    }

    /// The names that children are to have, as they were given.
    fn given_names(&self, names: &[String], fork: &Fork) -> Result<Vec<String>, Failure> {
        if fork.count as usize != names.len() || names.len() > MAX_CHILDREN as usize || fork.prefix.is_some() {
            let why = format!("{} with {} names of children, or a prefix as well", fork.count, names.len());
            return Err(Failure::bad_request(why));
        }
        let mut others = HashSet::new();
        for name in names {
            self.check_new_name(name)?;
            if !others.insert(name) {
                return Err(Failure::bad_request(format!("two children cannot both be called {name:?}")).about(name));
            }
        }
        Ok(names.to_vec())
    }

    /// Freezes the parent as soon as no other fork does, and meanwhile lists the children and finds processes for them.
    /// They end when the parent does where no time of their own is given.
    fn begin_fork(&mut self, op: ForkOp, names: Vec<String>, expires: Option<Instant>) {
        let id = self.forks.fresh_id();
        let parent = self.registry.vms.get_mut(op.parent).expect("found above");
        let (generation, shape, ancestry) = (parent.generation, parent.shape, Ancestry::below(parent));
        let expires = expires.or(parent.expires);
        parent.freezes.push(Purpose::Fork(id));
        let alone = parent.freezes.turn() == Some(Purpose::Fork(id));
        self.forks.insert(id, op);
        self.procs.pool.forked(shape, generation);
        // Of one that is still everything is known, and children start at once: they must be listed before.
        let first = alone && self.still(generation).is_none();
        if first {
            self.freeze(generation);
        }
        for name in names {
            // The freeze may have failed already.
            if self.forks.get(id).is_none() {
                return;
            }
            let process = self.take_process(shape, Some(generation));
            let child = process.map(|process| {
                let phase = Phase::Forking(id);
                self.add_vm(name.clone(), ancestry.clone(), shape, phase, process, None)
            });
            let op = self.forks.get_mut(id).expect("looked at above");
            match child {
                Ok(child) => {
                    op.add_child(child, name);
                    self.live_until(child, expires);
                }
                Err(e) => {
                    op.fail(format!("start a VM process: {e}"));
                    break;
                }
            }
        }
        if alone && !first {
            self.freeze(generation);
        }
    }

    /// The state of a VM that has not run since its last freeze, if that is known.
    fn still(&self, vm: Generation) -> Option<&PackedState> {
        let process = self.registry.vms.get(vm)?.process?;
        self.procs.all.get(&process)?.still()
    }

    /// It is this fork's turn to have its parent frozen.
    pub fn freeze_for_fork(&mut self, parent: Generation, fork: ForkId) {
        self.release(parent);
        let Some(vm) = self.registry.vms.get(parent) else { return };
        let (Some((family, member)), Some(process)) = (vm.memory, vm.process) else { return };
        if self.asks_for_hints(parent, fork) {
            return;
        }
        // It hears of later ones when it is frozen.
        if let (Some(op), Some(vm)) = (self.forks.get_mut(fork), self.registry.vms.get(parent)) {
            op.balloon = (vm.asked_balloon, vm.idle);
        }
        let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
        let lost = !manager.mends(member).expect("a family knows its VMs").is_empty();
        // What its children would miss, a freeze takes.
        if let Some(state) = self.still(parent).filter(|_| !lost).cloned() {
            return self.fork_still(parent, (family, member), state);
        }
        let may_copy = self.registry.vms.get(parent).is_some_and(|vm| vm.fresh) && self.has_room_twice(parent);
        let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
        match manager.begin_freeze(member, Destination::Store) {
            Ok(store) => {
                let along = manager.takes_along(member).expect("a family knows its VMs");
                let file = manager.store(store).expect("just made");
                let (max_runs, first) = (self.host.max_runs, self.working_sets.reads(parent));
                let process = self.procs.all.get_mut(&process).expect("a VM's process");
                // What is frozen in a copy is in memory twice, until it has left the window.
                let lifeline = may_copy.then(|| process.memory.spin_lifeline().ok()).flatten();
                let take = if lifeline.is_some() { Take::Snapshot } else { Take::CopyInPlace };
                let message = ToVm::Freeze { store, max_runs, take, along, first };
                let fds: Vec<_> = [file.read_only()].into_iter().chain(lifeline.iter().map(AsFd::as_fd)).collect();
                process.send(&message, &fds);
                self.freeze_begins(parent, store);
            }
            Err(e) => {
                let cause = std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default();
                self.no_freeze(parent, &format!("{e}: {cause}"));
            }
        }
    }

    /// What a freeze would find is known: the parent is left alone.
    fn fork_still(&mut self, parent: Generation, memory: (FamilyId, VmId), state: PackedState) {
        let Some(vm) = self.registry.vms.get_mut(parent) else { return };
        let Some(Purpose::Fork(fork)) = vm.freezes.skip() else { return };
        let pause = (!vm.stands()).then_some(0);
        let op = self.forks.get_mut(fork).expect("a queued fork");
        op.note_pause(pause);
        op.told();
        self.start_children(fork, memory);
        self.load_children(fork, parent, state);
        self.freeze(parent);
        self.finish_fork_if_there(fork);
    }

    /// The parent has been frozen, and most likely runs on, or will when it has copied what stays. `before`: whether it stood.
    pub fn taken_for_fork(&mut self, parent: Generation, fork: ForkId, frozen: &Frozen, before: RunState) {
        let Some(memory) = self.registry.vms.get(parent).and_then(|vm| vm.memory) else { return };
        let Some(op) = self.forks.get_mut(fork) else { return };
        op.begin((memory.0, frozen.store), frozen.harvest.count().0);
        if !self.host.features.userfaultfd && !self.settle_now(parent, fork) {
            return;
        }
        if frozen.activity == RunState::Paused && before == RunState::Running {
            self.resume_settled(parent, fork, frozen);
        }
        self.start_children(fork, memory);
    }

    /// How long the freeze for this fork has kept the guest from running.
    pub fn note_pause(&mut self, fork: ForkId, pause_ns: u64) {
        if let Some(op) = self.forks.get_mut(fork) {
            op.note_pause(Some(pause_ns));
        }
    }

    /// All is known that the freeze for this fork tells.
    pub fn fork_told(&mut self, fork: ForkId) {
        if let Some(op) = self.forks.get_mut(fork) {
            op.told();
            self.finish_fork_if_there(fork);
        }
    }

    /// Children that wait for the state of their parent never get it.
    pub fn state_is_lost(&mut self, fork: ForkId, why: &str) {
        if let Some(op) = self.forks.get_mut(fork) {
            op.fail(why);
        }
    }

    /// Without traps, nobody may run before all pages are where they belong. Whether they are; if not, the parent and the
    /// fork are over.
    fn settle_now(&mut self, parent: Generation, fork: ForkId) -> bool {
        let Some((family, store)) = self.forks.get(fork).and_then(ForkOp::store) else { return true };
        let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
        while !manager.is_written_back(store) {
            if let Err(error) = manager.write_back(WRITEBACK_BATCH) {
                self.memory_error(family, &error);
                let why = "its memory could not be settled";
                self.fail_fork(fork, why);
                self.end_vm(parent, Phase::Dead(why.into()));
                return false;
            }
        }
        true
    }

    /// The parent has stood still until its pages had settled, and goes on.
    fn resume_settled(&mut self, parent: Generation, fork: ForkId, frozen: &Frozen) {
        let Some(process) = self.registry.vms.get(parent).and_then(|vm| vm.process) else { return };
        self.procs.all.get_mut(&process).expect("a VM's process").send(&ToVm::Resume, &[]);
        self.note_pause(fork, monotonic_ns().saturating_sub(frozen.kicked_ns));
    }

    /// The parent was not frozen for this fork, and is not any more.
    pub fn fail_fork(&mut self, fork: ForkId, why: &str) {
        if let Some(op) = self.forks.get_mut(fork) {
            op.fail(why);
            self.finish_fork(fork);
        }
    }

    pub fn finish_fork_if_there(&mut self, fork: ForkId) {
        let Some(op) = self.forks.get(fork) else { return };
        if !op.is_over() {
            return;
        }
        let settled = op.failure().is_some() || self.may_be_answered(op);
        if op.failure().is_none() {
            // Whether somebody waits for pages to settle or not: they are VMs like any other.
            for child in op.children() {
                let Some(vm) = self.registry.vms.get_mut(child) else { continue };
                vm.phase.forked(fork);
                if let Some(pattern) = &vm.ancestry.lineage.vsock {
                    self.clients.doors.add_like(pattern, (child, &vm.name), &mut self.watches);
                }
            }
        }
        if settled {
            self.finish_fork(fork);
        }
    }

    /// Whether what its answer waits for besides its children is there.
    fn may_be_answered(&self, op: &ForkOp) -> bool {
        (!op.wait_settled || self.has_settled(op)) && !op.awaits_agents(Instant::now())
    }

    /// Whether all pages are where they belong, and nowhere else.
    fn has_settled(&self, op: &ForkOp) -> bool {
        op.store().is_none_or(|(family, store)| {
            let deduped = self.registry.vms.get(op.parent).is_none_or(|parent| parent.deduping != Some(store));
            deduped && self.memory.families.get(&family).is_none_or(|manager| manager.is_written_back(store))
        })
    }

    /// Looks after forks whose answer waits for their pages, or for agents.
    pub fn answer_waiting_forks(&mut self) {
        let waiting = self.forks.that_wait().filter(|(_, op)| self.may_be_answered(op));
        let waiting: Vec<ForkId> = waiting.map(|(id, _)| id).collect();
        for fork in waiting {
            self.finish_fork_if_there(fork);
        }
    }

    /// Answers a fork that is over, well or not. Of one that failed nothing stays.
    fn finish_fork(&mut self, fork: ForkId) {
        let Some(op) = self.forks.remove(fork) else { return };
        if let Some(why) = op.failure() {
            op.children().for_each(|child| self.forget_vm(child));
            return match op.asker {
                Asker::Client(client) => self.reply(client, Err(Failure::failed(why))),
                Asker::Guest => self.tell_guest(op.parent, Err(why.to_owned())),
            };
        }
        match op.asker {
            Asker::Guest => self.tell_guest(op.parent, Ok(op.names())),
            Asker::Client(client) => {
                let copied = match op.store() {
                    Some((family, store)) if op.wait_settled => {
                        self.memory.families.get_mut(&family).map(|manager| manager.take_copied(store))
                    }
                    None if op.wait_settled => Some(Copied::default()),
                    _ => None,
                };
                self.reply(client, Ok(Answer::Forked(op.answer(copied))));
            }
        }
    }

    fn tell_guest(&mut self, parent: Generation, result: Result<Vec<String>, String>) {
        let process = self.registry.vms.get(parent).and_then(|vm| vm.process);
        if let Some(process) = process.and_then(|id| self.procs.all.get_mut(&id)) {
            process.send(&ToVm::ForkDone(result), &[]);
        }
    }
}
