//! Prepared VM processes, by shape: KVM VM, vCPU and memory slot are made, and a fork only has to fill them in.
//!
//! A shape has prepared processes for as long as a VM of it lives. How many follows use: the pool grows by
//! one each time it was found empty, and shrinks when it was not used for a while, or memory is short. An empty pool is slower, never an error.

use crate::machine::state::PackedState;
use crate::server::ids::{Generation, ProcessId};
use crate::server::procs::expect::{Favourites, fitting};
use crate::wire::MachineShape;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

const SMALLEST: usize = 2;
const LARGEST: usize = 64;
/// An unused pool is halved after this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// For how long none is made after one could not be.
const REST: Duration = Duration::from_secs(1);

/// Prepared processes of all shapes.
#[derive(Debug, Default)]
pub struct Pool {
    shelves: BTreeMap<MachineShape, Shelf>,
    /// Until when none is made.
    rest_until: Option<Instant>,
}

/// Those of one shape.
#[derive(Debug)]
struct Shelf {
    /// The next to be taken first.
    ready: VecDeque<Prepared>,
    preparing: usize,
    wanted: usize,
    used: Instant,
    favourites: Favourites,
}

/// A process that waits for a VM to become, and whose child it expects to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prepared {
    process: ProcessId,
    expects: Option<Generation>,
}

/// What else there is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rivals {
    /// Memory is short: what is only handy goes.
    pub memory: bool,
    /// Guests wait for pages, or soon will, and come first; but an empty pool is filled.
    pub pages: bool,
    /// A fork hurries, whose own processes come first.
    pub fork: bool,
}

/// What is to be done for the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolActions {
    /// These processes are to end.
    pub end: Vec<ProcessId>,
    pub next: PoolNext,
}

/// What is to be done for it next, at most one thing at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolNext {
    Nothing,
    /// A process of this shape is to be made, after none could be for a while where that is said.
    Make(MachineShape, Rested),
    /// A prepared one may be told what to expect.
    Tell,
}

/// Whether the pool has rested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rested {
    Yes,
    No,
}

impl Pool {
    /// There is a VM of this shape.
    pub fn used(&mut self, shape: MachineShape, now: Instant) {
        self.shelves.entry(shape).or_insert_with(|| Shelf {
            ready: VecDeque::new(),
            preparing: 0,
            wanted: SMALLEST,
            used: now,
            favourites: Favourites::default(),
        });
    }

    /// `parent`, a VM of this shape, is forked.
    pub fn forked(&mut self, shape: MachineShape, parent: Generation) {
        if let Some(shelf) = self.shelves.get_mut(&shape) {
            shelf.favourites.forked(parent);
        }
    }

    /// A prepared process for a child of `parent`, or for a VM of nobody's: best one that expects that. None where one has to be
    /// made.
    pub fn take(&mut self, shape: MachineShape, parent: Option<Generation>, now: Instant) -> Option<ProcessId> {
        let shelf = self.shelves.get_mut(&shape)?;
        shelf.used = now;
        let best = fitting(shelf.ready.iter().map(|prepared| prepared.expects), parent);
        let taken = best.and_then(|best| shelf.ready.remove(best));
        if taken.is_none() {
            shelf.wanted = (shelf.wanted + 1).clamp(SMALLEST, LARGEST);
        }
        taken.map(|prepared| prepared.process)
    }

    /// A process has prepared itself, for a child of that VM where it expects one. Whether there is a place for it.
    pub fn put(&mut self, shape: MachineShape, process: ProcessId, expects: Option<Generation>) -> bool {
        let Some(shelf) = self.shelves.get_mut(&shape) else { return false };
        shelf.preparing = shelf.preparing.saturating_sub(1);
        shelf.ready.push_back(Prepared { process, expects });
        true
    }

    /// A prepared process expects to become a child of this VM.
    pub fn expects(&mut self, shape: MachineShape, process: ProcessId, parent: Generation) {
        let shelf = self.shelves.get_mut(&shape);
        let prepared = shelf.and_then(|shelf| shelf.ready.iter_mut().find(|prepared| prepared.process == process));
        if let Some(prepared) = prepared {
            prepared.expects = Some(parent);
        }
    }

    /// A prepared process is to get something ready first.
    pub fn withdraw(&mut self, shape: MachineShape, process: ProcessId) {
        self.lost(shape, process);
        if let Some(shelf) = self.shelves.get_mut(&shape) {
            shelf.preparing += 1;
        }
    }

    /// A process that was to be put here ends instead.
    pub fn ended(&mut self, shape: MachineShape) {
        if let Some(shelf) = self.shelves.get_mut(&shape) {
            shelf.preparing = shelf.preparing.saturating_sub(1);
        }
    }

    /// A prepared process has died.
    pub fn lost(&mut self, shape: MachineShape, process: ProcessId) {
        if let Some(shelf) = self.shelves.get_mut(&shape) {
            shelf.ready.retain(|prepared| prepared.process != process);
        }
    }

    /// A process could not prepare itself: the pool stays empty until a process is taken from it again.
    pub fn failed(&mut self, shape: MachineShape) {
        self.ended(shape);
        if let Some(shelf) = self.shelves.get_mut(&shape) {
            shelf.wanted = 0;
        }
    }

    /// A process could not be made: none is for a while.
    pub fn rest(&mut self, shape: MachineShape, now: Instant) {
        self.ended(shape);
        self.rest_until = Some(now + REST);
    }

    /// The children of `parent`, a VM of this shape, begin as this.
    pub fn saved(&mut self, shape: MachineShape, parent: Generation, state: PackedState) {
        if let Some(shelf) = self.shelves.get_mut(&shape) {
            shelf.favourites.saved(parent, state);
        }
    }

    /// Forgets VMs that are gone.
    pub fn retain(&mut self, lives: impl Fn(Generation) -> bool) {
        self.shelves.values_mut().for_each(|shelf| shelf.favourites.retain(&lives));
    }

    /// Prepared processes of a shape are to expect nothing, until a VM has been forked again and again anew.
    pub fn forget_favourites(&mut self, shape: MachineShape) {
        if let Some(shelf) = self.shelves.get_mut(&shape) {
            shelf.favourites = Favourites::default();
        }
    }

    /// The state that prepared processes of a shape are to expect as children of `parent`.
    pub fn state_to_expect(&self, shape: MachineShape, parent: Generation) -> Option<Rc<PackedState>> {
        self.shelves.get(&shape).and_then(|shelf| shelf.favourites.state(parent))
    }

    /// Which prepared process is to expect what, where none of its shape is on its way: its shape, the VM, and the process.
    pub fn to_tell(&self) -> Option<(MachineShape, Generation, ProcessId)> {
        let mut calm = self.shelves.iter().filter(|(_, shelf)| shelf.preparing == 0);
        calm.find_map(|(&shape, shelf)| {
            let expected: Vec<_> = shelf.ready.iter().map(|prepared| prepared.expects).collect();
            let (at, parent) = shelf.favourites.to_tell(&expected)?;
            Some((shape, parent, shelf.ready[at].process))
        })
    }

    /// Forgets shapes that no VM has any more: their processes, and those on their way, are to end.
    pub fn drop_unused(&mut self, is_used: impl Fn(MachineShape) -> bool) -> Vec<MachineShape> {
        let unused: Vec<MachineShape> = self.shelves.keys().copied().filter(|&shape| !is_used(shape)).collect();
        unused.iter().for_each(|shape| drop(self.shelves.remove(shape)));
        unused
    }

    /// What is to be done now.
    pub fn tend(&mut self, now: Instant, rivals: Rivals) -> PoolActions {
        let mut end = Vec::new();
        let mut hungry = None;
        let most = if rivals.memory { SMALLEST } else { LARGEST };
        for (&shape, shelf) in &mut self.shelves {
            shelf.tend(now, most, &mut end);
            let coming = shelf.ready.len() + shelf.preparing;
            if coming < if rivals.pages { 1 } else { shelf.wanted } {
                hungry = Some(shape);
            }
        }
        if rivals.fork || self.rest_until.is_some_and(|until| until > now) {
            return PoolActions { end, next: PoolNext::Nothing };
        }
        let rested = if self.rest_until.take().is_some() { Rested::Yes } else { Rested::No };
        let next = match hungry.and_then(|shape| Some((shape, self.shelves.get_mut(&shape)?))) {
            Some((shape, shelf)) => {
                shelf.preparing += 1;
                PoolNext::Make(shape, rested)
            }
            None if rivals.pages => PoolNext::Nothing,
            None => PoolNext::Tell,
        };
        PoolActions { end, next }
    }

    /// When the pool should be looked after next.
    pub fn next_look(&self) -> Option<Instant> {
        let shelves = self.shelves.values().filter(|shelf| shelf.wanted > SMALLEST).map(|shelf| shelf.used + PATIENCE);
        shelves.chain(self.rest_until).min()
    }
}

impl Shelf {
    /// Has as many as are wanted, and none that nobody can use.
    fn tend(&mut self, now: Instant, most: usize, end: &mut Vec<ProcessId>) {
        self.wanted = self.wanted.min(most);
        if self.wanted > SMALLEST && now >= self.used + PATIENCE {
            self.wanted = (self.wanted / 2).max(SMALLEST);
            self.used = now;
            self.favourites = Favourites::default();
        }
        // Each has one, the last one two, and another is there for everybody else.
        let favourites = self.favourites.all();
        if !favourites.is_empty() && self.wanted > 0 {
            self.wanted = self.wanted.max((favourites.len() + 2).min(most));
        }
        // What expects a VM that is none any more has seen its memory, and is of no use to others.
        self.ready.retain(|prepared| {
            let stale = prepared.expects.is_some_and(|parent| !favourites.contains(&parent));
            end.extend(stale.then_some(prepared.process));
            !stale
        });
        while self.ready.len() > self.wanted {
            end.extend(self.ready.pop_back().map(|prepared| prepared.process));
        }
    }
}

#[cfg(test)]
mod tests;
