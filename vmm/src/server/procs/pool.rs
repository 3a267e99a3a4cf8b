//! Prepared VM processes, by shape: KVM VM, vCPU and memory slot are made, and a fork only has to fill them in.
//!
//! A shape has prepared processes for as long as a VM of it lives. How many follows use: the pool grows by
//! one each time it was found empty, and shrinks when it was not used for a while, or memory is short. An empty pool is slower, never an error.

use crate::machine::state::PackedState;
use crate::server::Server;
use crate::server::ids::{Generation, ProcessId};
use crate::server::procs::expect::{Favourites, fitting};
use crate::server::procs::process::{Role, VmProcess};
use crate::server::procs::window::RemoteWindow;
use crate::wire::MachineShape;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

const SMALLEST: usize = 2;
const LARGEST: usize = 64;
/// An unused pool is halved after this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// For how long none is made after one could not be.
const REST: Duration = Duration::from_secs(1);

/// Prepared processes of all shapes, and until when none is made.
#[derive(Debug, Default)]
pub struct Pool(BTreeMap<MachineShape, Shelf>, Option<Instant>);

#[derive(Debug)]
struct Shelf {
    ready: VecDeque<ProcessId>,
    preparing: usize,
    wanted: usize,
    used: Instant,
    favourites: Favourites,
}

impl Pool {
    /// There is a VM of this shape.
    pub fn used(&mut self, shape: MachineShape) {
        self.0.entry(shape).or_insert_with(|| Shelf {
            ready: VecDeque::new(),
            preparing: 0,
            wanted: SMALLEST,
            used: Instant::now(),
            favourites: Favourites::default(),
        });
    }

    /// `parent`, a VM of this shape, is forked.
    pub fn forked(&mut self, shape: MachineShape, parent: Generation) {
        if let Some(shelf) = self.0.get_mut(&shape) {
            shelf.favourites.forked(parent);
        }
    }

    /// A process has prepared itself. Whether there is a place for it.
    pub fn put(&mut self, shape: MachineShape, process: ProcessId) -> bool {
        let Some(shelf) = self.0.get_mut(&shape) else { return false };
        shelf.preparing = shelf.preparing.saturating_sub(1);
        shelf.ready.push_back(process);
        true
    }

    /// A prepared process is to get something ready first.
    pub fn withdraw(&mut self, shape: MachineShape, process: ProcessId) {
        self.lost(shape, process);
        if let Some(shelf) = self.0.get_mut(&shape) {
            shelf.preparing += 1;
        }
    }

    /// A process that was to be put here ends instead.
    pub fn ended(&mut self, shape: MachineShape) {
        if let Some(shelf) = self.0.get_mut(&shape) {
            shelf.preparing = shelf.preparing.saturating_sub(1);
        }
    }

    /// A prepared process has died.
    pub fn lost(&mut self, shape: MachineShape, process: ProcessId) {
        if let Some(shelf) = self.0.get_mut(&shape) {
            shelf.ready.retain(|&id| id != process);
        }
    }

    /// A process could not prepare itself: the pool stays empty until a process is taken from it again.
    pub fn failed(&mut self, shape: MachineShape) {
        self.ended(shape);
        if let Some(shelf) = self.0.get_mut(&shape) {
            shelf.wanted = 0;
        }
    }

    /// A process could not be made: none is for a while.
    pub fn rest(&mut self, shape: MachineShape, now: Instant) {
        self.ended(shape);
        self.1 = Some(now + REST);
    }

    /// VMs whose children prepared processes are to expect, by their shapes, but for those of which processes are on their
    /// way.
    pub fn favourites(&self) -> impl Iterator<Item = (MachineShape, &Favourites)> {
        self.0.iter().filter(|(_, shelf)| shelf.preparing == 0).map(|(&shape, shelf)| (shape, &shelf.favourites))
    }

    /// The children of `parent`, a VM of this shape, begin as this.
    pub fn saved(&mut self, shape: MachineShape, parent: Generation, state: PackedState) {
        if let Some(shelf) = self.0.get_mut(&shape) {
            shelf.favourites.saved(parent, state);
        }
    }

    /// Forgets VMs that are gone.
    pub fn retain(&mut self, lives: impl Fn(Generation) -> bool) {
        self.0.values_mut().for_each(|shelf| shelf.favourites.retain(&lives));
    }

    /// Prepared processes of a shape are to expect nothing, until a VM has been forked again and again anew.
    pub fn forget_favourites(&mut self, shape: MachineShape) {
        if let Some(shelf) = self.0.get_mut(&shape) {
            shelf.favourites = Favourites::default();
        }
    }

    /// The state that prepared processes of a shape are to expect as children of `parent`.
    pub fn state_to_expect(&self, shape: MachineShape, parent: Generation) -> Option<Rc<PackedState>> {
        self.0.get(&shape).and_then(|shelf| shelf.favourites.state(parent))
    }

    /// Prepared processes of a shape, the next to be taken first.
    pub fn ready(&self, shape: MachineShape) -> impl Iterator<Item = ProcessId> {
        self.0.get(&shape).into_iter().flat_map(|shelf| shelf.ready.iter().copied())
    }

    /// When the pool should be looked after next.
    pub fn next_look(&self) -> Option<Instant> {
        let shelves = self.0.values().filter(|shelf| shelf.wanted > SMALLEST).map(|shelf| shelf.used + PATIENCE);
        shelves.chain(self.1).min()
    }
}

impl Server {
    /// A process for a VM of this shape, a child of `parent`: a prepared one, best one that expects that, or one that starts to
    /// prepare itself now.
    pub fn take_process(&mut self, shape: MachineShape, parent: Option<Generation>) -> io::Result<ProcessId> {
        if let Some(shelf) = self.procs.pool.0.get_mut(&shape) {
            shelf.used = Instant::now();
            let expected = shelf.ready.iter().map(|id| self.procs.all[id].expectation.parent);
            if let Some(id) = fitting(expected, parent).and_then(|best| shelf.ready.remove(best)) {
                return Ok(id);
            }
            shelf.wanted = (shelf.wanted + 1).clamp(SMALLEST, LARGEST);
        }
        self.spawn_process(shape)
    }

    /// Fills the pool by at most one process, or empties it. Whether there is more to do at once. `settling`: guests wait
    /// for pages, or soon will, and come first; but an empty pool is filled.
    pub fn tend_pool(&mut self, now: Instant, settling: bool) -> bool {
        self.end_unused();
        let mut surplus = Vec::new();
        let mut hungry = None;
        let most = if self.memory.budget.is_tight() { SMALLEST } else { LARGEST };
        for (&shape, shelf) in &mut self.procs.pool.0 {
            shelf.wanted = shelf.wanted.min(most);
            if shelf.wanted > SMALLEST && now >= shelf.used + PATIENCE {
                shelf.wanted = (shelf.wanted / 2).max(SMALLEST);
                shelf.used = now;
                shelf.favourites = Favourites::default();
            }
            // Each has one, the last one two, and another is there for everybody else.
            let favourites = shelf.favourites.all();
            if !favourites.is_empty() && shelf.wanted > 0 {
                shelf.wanted = shelf.wanted.max((favourites.len() + 2).min(most));
            }
            // What expects a VM that is none any more has seen its memory, and is of no use to others.
            let is_stale = |parent| !favourites.contains(&parent);
            shelf.ready.retain(|id| {
                let stale = self.procs.all[id].expectation.parent.is_some_and(is_stale);
                surplus.extend(stale.then_some(*id));
                !stale
            });
            while shelf.ready.len() > shelf.wanted {
                surplus.extend(shelf.ready.pop_back());
            }
            let coming = shelf.ready.len() + shelf.preparing;
            if coming < if settling { 1 } else { shelf.wanted } {
                hungry = Some(shape);
            }
        }
        for id in surplus {
            self.end_process(id);
        }
        // While a fork hurries its own processes come first.
        if self.forks.hurry(now) || self.procs.pool.1.is_some_and(|until| until > now) {
            return false;
        }
        let rested = self.procs.pool.1.take().is_some();
        let Some(shape) = hungry else { return !settling && self.tell_what_to_expect() };
        self.procs.pool.0.get_mut(&shape).expect("a shape of the pool").preparing += 1;
        if let Err(error) = self.spawn_process(shape) {
            if !rested {
                log::warn!("prepare a VM process for the pool: {error}");
            }
            self.procs.pool.rest(shape, now);
            return false;
        }
        true
    }

    /// Ends the prepared processes of shapes that no VM has any more, and those on their way.
    pub fn end_unused(&mut self) {
        let unused: Vec<MachineShape> =
            self.procs.pool.0.keys().copied().filter(|&shape| !self.is_used(shape)).collect();
        for shape in unused {
            self.procs.pool.0.remove(&shape);
            let spare =
                |process: &&VmProcess| process.shape == shape && matches!(process.role, Role::Preparing | Role::Pooled);
            let spare: Vec<ProcessId> = self.procs.all.values().filter(spare).map(|process| process.id).collect();
            spare.into_iter().for_each(|id| self.end_process(id));
        }
    }

    fn is_used(&self, shape: MachineShape) -> bool {
        self.stopping.is_none() && self.registry.vms.iter().any(|vm| vm.is_alive() && vm.shape == shape)
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
