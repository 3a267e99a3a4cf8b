//! `fork`: freeze the parent, share what it has, start the children.

pub mod hint;

use crate::api::{Answer, Child, Failure, Fork, MAX_NAME};
use crate::clock::monotonic_ns;
use crate::host::latency::LEASE;
use crate::machine::state::PackedState;
use crate::name::check_name;
use crate::server::Server;
use crate::server::clients::connection::ClientId;
use crate::server::fork::hint::Hint;
use crate::server::freeze::queue::Purpose;
use crate::server::memory::idle::IdleBalloon;
use crate::server::procs::process::Parcel;
use crate::server::registry::launch::Beginning;
use crate::server::registry::vm::{FamilyId, Generation, Phase, Vm};
use crate::wire::{self, Frozen, Machine, RunState, Take, ToVm};
use guest_mem::manager::{Copied, WRITEBACK_BATCH};
use guest_mem::{Destination, GfnRange, PageCount, StoreId, VmId};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Names a fork under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForkId(pub u64);

/// Most children of one fork.
const COUNT_MAX: u32 = 1000;
/// A guest that asks for children itself gets fewer than this at a time, and only as long as there are no more VMs than this:
/// one that does so in a loop leaves something to others.
const INSIDE_EACH: u32 = 65;
const INSIDE_ALL: usize = 1024;

/// For so long what is not urgent waits for a fork: the list of names, processes for the next one.
const HURRY: Duration = Duration::from_millis(50);

/// Who asked for a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asker {
    Client(ClientId),
    Guest,
}

/// A child on its way.
#[derive(Debug)]
struct Progress {
    generation: Generation,
    name: String,
    ready_ns: Option<u64>,
    first_ns: Option<u64>,
    runs: u64,
    /// It runs and has shown a sign of life, or stands still as asked.
    there: bool,
}

/// A fork under way.
#[derive(Debug)]
pub struct ForkOp {
    asker: Asker,
    parent: Generation,
    asked_ns: u64,
    /// It is not in a hurry any more.
    rests_at: Instant,
    paused: bool,
    wait_settled: bool,
    pub hint: Hint,
    /// What the guest was asked to have in its balloon when it was frozen: by its user, and besides.
    asked_balloon: u64,
    idle: IdleBalloon,
    /// How far it is.
    stage: Stage,
    /// The freeze's store, once it has taken something, and the family it is of.
    store: Option<(FamilyId, StoreId)>,
    pause_ns: Option<u64>,
    moved: u64,
    children: Vec<Progress>,
    failure: Option<String>,
}

/// How far a fork is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The parent has not been frozen for it.
    Waiting,
    /// The parent has, and the children begin. The freeze has more to tell.
    Begun,
    /// The freeze has told all.
    Told,
}

impl ForkOp {
    fn new(asker: Asker, parent: Generation, asked_ns: u64) -> Self {
        Self {
            asker,
            parent,
            asked_ns,
            rests_at: Instant::now() + HURRY,
            paused: false,
            wait_settled: false,
            hint: Hint::Unasked,
            asked_balloon: 0,
            idle: IdleBalloon::default(),
            stage: Stage::Waiting,
            store: None,
            pause_ns: None,
            moved: 0,
            children: Vec::new(),
            failure: None,
        }
    }

    /// Whether children are about to begin, or the parent is about to go on.
    pub fn awaits_guests(&self) -> bool {
        let some_to_come = match self.stage {
            Stage::Waiting => false,
            Stage::Begun => true,
            Stage::Told => self.children.iter().any(|child| !child.there),
        };
        self.failure.is_none() && some_to_come
    }
}

impl Server {
    /// Whether a fork has just begun, and what is not urgent waits for it.
    pub fn forks_hurry(&self, now: Instant) -> bool {
        self.forks.values().any(|op| op.rests_at > now)
    }

    /// When that is over for the first of them.
    pub fn forks_rest(&self, now: Instant) -> Option<Instant> {
        self.forks.values().map(|op| op.rests_at).filter(|at| *at > now).min()
    }

    pub fn fork(&mut self, client: ClientId, fork: Fork) {
        self.latency.lease(Instant::now() + LEASE);
        let asked_ns = self.clients.get(&client).map_or_else(monotonic_ns, |client| client.asked_ns);
        let prefix = fork.prefix.clone().unwrap_or_else(|| fork.name.clone());
        let checked = self.find_started(&fork.name).and_then(|parent| {
            let names = self.child_names(&prefix, fork.count)?;
            Ok((parent, names))
        });
        match checked {
            Err(failure) => self.reply(client, Err(failure)),
            Ok((parent, names)) => {
                let op = ForkOp::new(Asker::Client(client), parent, asked_ns);
                let hint = fork.hint_free_ms.map_or(Hint::Unasked, Hint::Wanted);
                self.begin_fork(ForkOp { paused: fork.paused, wait_settled: fork.wait_settled, hint, ..op }, names);
            }
        }
    }

    /// The guest of `parent` rang for a fork.
    pub fn fork_from_inside(&mut self, parent: Generation, count: u32) {
        self.latency.lease(Instant::now() + LEASE);
        let asked_ns = monotonic_ns();
        let Some(vm) = self.vms.get(parent) else { return };
        let prefix = vm.name.clone();
        let there = self.vms.iter().filter(|vm| vm.is_alive()).count();
        let names = match count {
            INSIDE_EACH.. => Err(Failure::bad_input(format!("{count} children: fewer than {INSIDE_EACH} at a time"))),
            _ if there + count as usize > INSIDE_ALL => {
                Err(Failure::failed(format!("{there} VMs are there: guests fork while there are at most {INSIDE_ALL}")))
            }
            _ => self.child_names(&prefix, count),
        };
        match names {
            Err(failure) => self.tell_guest(parent, Err(failure.message)),
            Ok(names) => self.begin_fork(ForkOp::new(Asker::Guest, parent, asked_ns), names),
        }
    }

    pub fn find_started(&self, name: &str) -> Result<Generation, Failure> {
        let vm = self.find_alive(name)?;
        match vm.phase {
            Phase::Live => Ok(vm.generation),
            _ => Err(Failure::failed(format!("VM {name:?} has not started yet"))),
        }
    }

    /// The first free names PREFIX-1, PREFIX-2, ….
    fn child_names(&self, prefix: &str, count: u32) -> Result<Vec<String>, Failure> {
        if count == 0 || count > COUNT_MAX {
            return Err(Failure::bad_input(format!("{count} children: from 1 to {COUNT_MAX} at a time")));
        }
        check_name(prefix).map_err(|e| Failure::bad_input(e.to_string()))?;
        let names = self.vms.names().first_free(prefix, count as usize);
        if names.last().is_some_and(|name| name.len() > MAX_NAME) {
            return Err(Failure::bad_input(format!(
                "names of children of {prefix:?} would be longer than {MAX_NAME}: give them a prefix (--name)"
            )));
        }
        Ok(names)
    }

    /// Freezes the parent as soon as no other fork does, and meanwhile lists the children and finds processes for them.
    fn begin_fork(&mut self, op: ForkOp, names: Vec<String>) {
        let id = ForkId(self.fresh_id());
        let parent = self.vms.get_mut(op.parent).expect("found above");
        let (generation, shape, parent_name) = (parent.generation, parent.shape, parent.name.clone());
        parent.freezes.push(Purpose::Fork(id));
        let alone = parent.freezes.turn() == Some(Purpose::Fork(id));
        self.forks.insert(id, op);
        self.pool.forked(shape, generation);
        // Of one that is still everything is known, and children start at once: they must be listed before.
        let first = alone && self.still(generation).is_none();
        if first {
            self.freeze(generation);
        }
        for name in names {
            // The freeze may have failed already.
            if !self.forks.contains_key(&id) {
                return;
            }
            let process = self.take_process(shape, Some(generation));
            let op = self.forks.get_mut(&id).expect("looked at above");
            match process {
                Ok(process) => {
                    let phase = Phase::Forking(id);
                    let child = self.add_vm(name.clone(), Some(parent_name.clone()), shape, phase, process, None);
                    let progress =
                        Progress { generation: child, name, ready_ns: None, first_ns: None, runs: 0, there: false };
                    self.forks.get_mut(&id).expect("still there").children.push(progress);
                }
                Err(e) => {
                    op.failure = Some(format!("start a VM process: {e}"));
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
        let process = self.vms.get(vm)?.process?;
        self.processes.get(&process)?.still()
    }

    /// It is this fork's turn to have its parent frozen.
    pub fn freeze_for_fork(&mut self, parent: Generation, fork: ForkId) {
        self.release(parent);
        let Some(vm) = self.vms.get(parent) else { return };
        let (Some((family, member)), Some(process)) = (vm.memory, vm.process) else { return };
        if self.asks_for_hints(parent, fork) {
            return;
        }
        // It hears of later ones when it is frozen.
        if let (Some(op), Some(vm)) = (self.forks.get_mut(&fork), self.vms.get(parent)) {
            (op.asked_balloon, op.idle) = (vm.asked_balloon, vm.idle);
        }
        let manager = self.families.get_mut(&family).expect("a VM has a family");
        let lost = !manager.mends(member).expect("a family knows its VMs").is_empty();
        // What its children would miss, a freeze takes.
        if let Some(state) = self.still(parent).filter(|_| !lost).cloned() {
            return self.fork_still(parent, (family, member), state);
        }
        let may_copy = self.vms.get(parent).is_some_and(|vm| vm.fresh) && self.has_room_twice(parent);
        let manager = self.families.get_mut(&family).expect("a VM has a family");
        match manager.begin_freeze(member, Destination::Store) {
            Ok(store) => {
                let along = manager.takes_along(member).expect("a family knows its VMs");
                let file = manager.store(store).expect("just made");
                let (max_runs, first) = (self.max_runs, self.working_sets.reads(parent));
                let process = self.processes.get_mut(&process).expect("a VM's process");
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
        let Some(vm) = self.vms.get_mut(parent) else { return };
        let Some(Purpose::Fork(fork)) = vm.freezes.skip() else { return };
        let pause = (!vm.stands()).then_some(0);
        let op = self.forks.get_mut(&fork).expect("a queued fork");
        (op.pause_ns, op.stage) = (pause, Stage::Told);
        self.start_children(fork, memory);
        self.load_children(fork, parent, state);
        self.freeze(parent);
        self.finish_fork_if_there(fork);
    }

    /// The parent has been frozen, and most likely runs on, or will when it has copied what stays. `before`: whether it stood.
    pub fn taken_for_fork(&mut self, parent: Generation, fork: ForkId, frozen: &Frozen, before: RunState) {
        let Some(memory) = self.vms.get(parent).and_then(|vm| vm.memory) else { return };
        let Some(op) = self.forks.get_mut(&fork) else { return };
        (op.stage, op.store) = (Stage::Begun, Some((memory.0, frozen.store)));
        op.moved = frozen.harvest.count().0;
        if !self.features.userfaultfd && !self.settle_now(parent, fork) {
            return;
        }
        if frozen.activity == RunState::Paused && before == RunState::Running {
            self.resume_settled(parent, fork, frozen);
        }
        self.start_children(fork, memory);
    }

    fn start_children(&mut self, fork: ForkId, (family, parent): (FamilyId, VmId)) {
        let op = self.forks.get_mut(&fork).expect("a fork under way");
        if op.failure.is_some() {
            return;
        }
        let parent_generation = op.parent;
        self.write_back_ahead(parent_generation, (family, parent));
        let op = &self.forks[&fork];
        let ahead = self.working_sets.writes(parent_generation, self.families[&family].family(), parent);
        let Some(parent_vm) = self.vms.get(op.parent) else { return };
        let (balloon_pages, guest_memory) = (parent_vm.balloon_pages, parent_vm.guest_memory);
        let (asked_balloon, idle) = (op.asked_balloon, op.idle.of_child(Instant::now()));
        let activity = if op.paused { RunState::Paused } else { RunState::Running };
        let children: Vec<Generation> = op.children.iter().map(|child| child.generation).collect();
        for (index, generation) in (1..).zip(children) {
            let Some(process) = self.vms.get(generation).and_then(|vm| vm.process) else { continue };
            let window = self.window_of(process);
            let manager = self.families.get_mut(&family).expect("a VM has a family");
            let child = manager.fork(parent, window).expect("a family knows its VMs");
            let runs = manager.family().runs(child).len() as u64;
            let vm = self.vms.get_mut(generation).expect("a child of the fork");
            vm.memory = Some((family, child));
            vm.paused = activity == RunState::Paused;
            vm.born = Some((parent_generation, ahead.clone()));
            self.working_sets.inherit(parent_generation, generation);
            (vm.balloon_pages, vm.guest_memory) = (balloon_pages, guest_memory);
            (vm.asked_balloon, vm.idle) = (asked_balloon, idle);
            self.child_mut(fork, generation, |child| child.runs = runs);
            let origin = wire::Origin::Fork { index };
            self.start(generation, Beginning { origin, kernel: None, activity, ahead: ahead.clone() });
        }
    }

    /// Writes back what children are about to read, if it is not in a store yet.
    fn write_back_ahead(&mut self, parent: Generation, (family, member): (FamilyId, VmId)) {
        let manager = self.families.get_mut(&family).expect("a VM has a family");
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
        let Some((parent, ahead)) = self.vms.get(child).and_then(|vm| vm.born.as_ref()) else { return };
        if self.vms.get(*parent).is_some_and(Vm::is_alive) {
            match last {
                true => self.working_sets.began(*parent, child, ahead, pages),
                false => self.working_sets.wrote(*parent, child, pages),
            }
        }
    }

    /// The parent's state is there, and its children can run.
    pub fn load_children(&mut self, fork: ForkId, parent: Generation, state: PackedState) {
        let Some(op) = self.forks.get(&fork) else { return };
        let children: Vec<Generation> = op.children.iter().map(|child| child.generation).collect();
        for process in children.iter().filter_map(|&child| self.vms.get(child).and_then(|vm| vm.process)) {
            let process = self.processes.get_mut(&process).expect("a VM's process");
            let expected = process.expectation.take_state().is_some_and(|expected| *expected == state);
            let message = if expected { ToVm::LoadExpected } else { ToVm::Load(state.clone()) };
            process.send_when_ready(Parcel { message, descriptors: Vec::new() });
        }
        if let Some(vm) = self.vms.get(parent) {
            self.pool.saved(vm.shape, parent, state);
        }
    }

    /// How long the freeze for this fork has kept the guest from running.
    pub fn note_pause(&mut self, fork: ForkId, pause_ns: u64) {
        if let Some(op) = self.forks.get_mut(&fork) {
            op.pause_ns = Some(pause_ns);
        }
    }

    /// All is known that the freeze for this fork tells.
    pub fn fork_told(&mut self, fork: ForkId) {
        if let Some(op) = self.forks.get_mut(&fork) {
            op.stage = Stage::Told;
            self.finish_fork_if_there(fork);
        }
    }

    /// Children that wait for the state of their parent never get it.
    pub fn state_is_lost(&mut self, fork: ForkId, why: &str) {
        if let Some(op) = self.forks.get_mut(&fork) {
            op.failure.get_or_insert_with(|| why.to_owned());
        }
    }

    /// Without traps, nobody may run before all pages are where they belong. Whether they are; if not, the parent and the
    /// fork are over.
    fn settle_now(&mut self, parent: Generation, fork: ForkId) -> bool {
        let Some((family, store)) = self.forks.get(&fork).and_then(|op| op.store) else { return true };
        let manager = self.families.get_mut(&family).expect("a VM has a family");
        while !manager.is_written_back(store) {
            if let Err(error) = manager.write_back(WRITEBACK_BATCH) {
                self.memory_error(family, &error);
                let why = "its memory could not be settled";
                if let Some(op) = self.forks.get_mut(&fork) {
                    op.failure = Some(why.into());
                }
                self.finish_fork(fork);
                self.end_vm(parent, Phase::Dead(why.into()));
                return false;
            }
        }
        true
    }

    /// The parent has stood still until its pages had settled, and goes on.
    fn resume_settled(&mut self, parent: Generation, fork: ForkId, frozen: &Frozen) {
        let Some(process) = self.vms.get(parent).and_then(|vm| vm.process) else { return };
        self.processes.get_mut(&process).expect("a VM's process").send(&ToVm::Resume, &[]);
        let pause = monotonic_ns().saturating_sub(frozen.kicked_ns);
        if let Some(op) = self.forks.get_mut(&fork) {
            op.pause_ns = Some(pause);
        }
    }

    /// The parent was not frozen for this fork, and is not any more.
    pub fn fail_fork(&mut self, fork: ForkId, why: &str) {
        if let Some(op) = self.forks.get_mut(&fork) {
            op.failure = Some(why.to_owned());
            self.finish_fork(fork);
        }
    }

    /// A child's vCPU is about to run, or stands still as asked. A Linux guest gives no sign of its own.
    pub fn child_ready(&mut self, fork: ForkId, generation: Generation, at_ns: Option<u64>) {
        let silent = self.vms.get(generation).is_some_and(|vm| vm.shape.machine == Machine::Linux);
        self.child_mut(fork, generation, |child| {
            child.ready_ns = at_ns;
            child.there |= silent || at_ns.is_none();
        });
        self.finish_fork_if_there(fork);
    }

    /// A child has shown its first sign of life.
    pub fn child_alive(&mut self, fork: ForkId, generation: Generation, at_ns: u64) {
        self.child_mut(fork, generation, |child| {
            child.first_ns = Some(at_ns);
            child.there = true;
        });
        self.finish_fork_if_there(fork);
    }

    /// A child never came to life: the whole fork fails.
    pub fn child_failed(&mut self, fork: ForkId, generation: Generation, why: String) {
        let Some(op) = self.forks.get_mut(&fork) else { return self.forget_vm(generation) };
        op.failure.get_or_insert(why);
        self.child_mut(fork, generation, |child| child.there = true);
        self.finish_fork_if_there(fork);
    }

    fn child_mut(&mut self, fork: ForkId, generation: Generation, change: impl FnOnce(&mut Progress)) {
        let op = self.forks.get_mut(&fork);
        if let Some(child) = op.and_then(|op| op.children.iter_mut().find(|child| child.generation == generation)) {
            change(child);
        }
    }

    fn finish_fork_if_there(&mut self, fork: ForkId) {
        let Some(op) = self.forks.get(&fork) else { return };
        if op.stage != Stage::Told || (op.failure.is_none() && !op.children.iter().all(|child| child.there)) {
            return;
        }
        let settled = !op.wait_settled || op.failure.is_some() || self.has_settled(op);
        if op.failure.is_none() {
            // Whether somebody waits for pages to settle or not: they are VMs like any other.
            for child in &op.children {
                if let Some(vm) = self.vms.get_mut(child.generation).filter(|vm| vm.phase == Phase::Forking(fork)) {
                    vm.phase = Phase::Live;
                }
            }
        }
        if settled {
            self.finish_fork(fork);
        }
    }

    /// Whether all pages are where they belong, and nowhere else.
    fn has_settled(&self, op: &ForkOp) -> bool {
        op.store.is_none_or(|(family, store)| {
            let shed = self.vms.get(op.parent).is_none_or(|parent| parent.shedding != Some(store));
            shed && self.families.get(&family).is_none_or(|manager| manager.is_written_back(store))
        })
    }

    /// Looks after forks whose answer waits for their pages.
    pub fn answer_settled_forks(&mut self) {
        let waiting: Vec<ForkId> =
            self.forks.iter().filter(|(_, op)| op.wait_settled && self.has_settled(op)).map(|(&id, _)| id).collect();
        for fork in waiting {
            self.finish_fork_if_there(fork);
        }
    }

    /// Answers a fork that is over, well or not. Of one that failed nothing stays.
    fn finish_fork(&mut self, fork: ForkId) {
        let Some(op) = self.forks.remove(&fork) else { return };
        if let Some(why) = op.failure {
            for child in &op.children {
                self.forget_vm(child.generation);
            }
            return match op.asker {
                Asker::Client(client) => self.reply(client, Err(Failure::failed(why))),
                Asker::Guest => self.tell_guest(op.parent, Err(why)),
            };
        }
        match op.asker {
            Asker::Guest => {
                let names = op.children.into_iter().map(|child| child.name).collect();
                self.tell_guest(op.parent, Ok(names));
            }
            Asker::Client(client) => {
                let copied = match op.store {
                    Some((family, store)) if op.wait_settled => {
                        self.families.get_mut(&family).map(|manager| manager.take_copied(store))
                    }
                    None if op.wait_settled => Some(Copied::default()),
                    _ => None,
                };
                let us = |ns: u64| ns.saturating_sub(op.asked_ns) / 1000;
                let children = op.children.iter().map(|child| Child {
                    name: child.name.clone(),
                    pause_us: op.pause_ns.map(|ns| ns / 1000),
                    ready_us: child.ready_ns.map(us),
                    first_exit_us: child.first_ns.map(us),
                    moved_pages: op.moved,
                    copied_pages: copied.map(|copied| copied.pages),
                    gap_pages: copied.map(|copied| copied.copy_ups),
                    runs: child.runs,
                    hinted_pages: match op.hint {
                        Hint::Unasked => None,
                        Hint::Wanted(_) => Some(0),
                        Hint::Asked(count) | Hint::Over(count) => Some(count),
                    },
                });
                let children = children.collect();
                self.reply(client, Ok(Answer::Forked(children)));
            }
        }
    }

    fn tell_guest(&mut self, parent: Generation, result: Result<Vec<String>, String>) {
        let process = self.vms.get(parent).and_then(|vm| vm.process);
        if let Some(process) = process.and_then(|id| self.processes.get_mut(&id)) {
            process.send(&ToVm::ForkDone(result), &[]);
        }
    }
}
