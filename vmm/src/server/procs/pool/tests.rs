//! The pool by script: processes prepare themselves, are taken and die as we say, and the time is ours.

use super::*;
use crate::wire::Machine;
use guest_mem::PageCount;

const SHAPE: MachineShape = MachineShape { ram: PageCount(4096), vcpus: 1, machine: Machine::Monitor };
const OTHER: MachineShape = MachineShape { ram: PageCount(8192), vcpus: 1, machine: Machine::Monitor };
const PARENT: Generation = Generation(7);

struct Script {
    pool: Pool,
    now: Instant,
    next: u64,
}

impl Script {
    /// A pool with as many as it wants.
    fn new() -> Self {
        let now = Instant::now();
        let mut script = Self { pool: Pool::default(), now, next: 0 };
        script.pool.used(SHAPE, now);
        script.fill();
        script
    }

    fn tend(&mut self, rivals: Rivals) -> PoolActions {
        self.pool.tend(self.now, rivals)
    }

    /// Has all made that is wanted, and tells how many that were.
    fn fill(&mut self) -> u64 {
        let before = self.next;
        while let PoolNext::Make(shape, _) = self.tend(Rivals::default()).next {
            self.put(shape, None);
        }
        self.next - before
    }

    fn put(&mut self, shape: MachineShape, expects: Option<Generation>) -> ProcessId {
        self.next += 1;
        assert!(self.pool.put(shape, ProcessId(self.next), expects));
        ProcessId(self.next)
    }

    /// So many are wanted, whether they are there or not.
    fn take_many(&mut self, count: u32) {
        (0..count).for_each(|_| {
            self.take(None);
        });
    }

    fn take(&mut self, parent: Option<Generation>) -> Option<ProcessId> {
        self.pool.take(SHAPE, parent, self.now)
    }
}

const END_NOBODY: Vec<ProcessId> = Vec::new();

#[test]
fn it_grows_when_it_is_found_empty_and_shrinks_unused() {
    let mut script = Script::new();
    assert_eq!(script.next, SMALLEST as u64);
    assert_eq!([(); 3].map(|()| script.take(None)), [Some(ProcessId(1)), Some(ProcessId(2)), None]);
    assert_eq!(script.fill(), SMALLEST as u64 + 1);
    script.take_many(200);
    script.fill();
    assert_eq!(script.pool.shelves[&SHAPE].ready.len(), LARGEST);
    let mut sizes = Vec::new();
    for _ in 0..7 {
        script.now += PATIENCE;
        assert!(script.pool.next_look().is_none_or(|at| at <= script.now));
        script.tend(Rivals::default());
        sizes.push(script.pool.shelves[&SHAPE].ready.len());
    }
    assert_eq!(sizes, [32, 16, 8, 4, 2, 2, 2]);
    assert_eq!(script.pool.next_look(), None);
}

#[test]
fn others_come_first_but_an_empty_pool_is_filled() {
    let mut script = Script::new();
    script.take(None);
    let [pages, fork] = [Rivals { pages: true, ..Rivals::default() }, Rivals { fork: true, ..Rivals::default() }];
    assert_eq!(script.tend(pages).next, PoolNext::Nothing, "one is there");
    script.take(None);
    assert_eq!(script.tend(fork).next, PoolNext::Nothing);
    assert_eq!(script.tend(pages).next, PoolNext::Make(SHAPE, Rested::No));
    assert_eq!(script.tend(pages).next, PoolNext::Nothing, "one is on its way");
    assert_eq!(script.tend(Rivals::default()).next, PoolNext::Make(SHAPE, Rested::No));
    assert_eq!(script.tend(Rivals::default()).next, PoolNext::Tell);
}

#[test]
fn where_memory_is_short_it_is_small() {
    let mut script = Script::new();
    script.take_many(10);
    script.fill();
    let many = script.pool.shelves[&SHAPE].ready.len();
    let ended = script.tend(Rivals { memory: true, ..Rivals::default() }).end;
    assert_eq!(ended.len(), many - SMALLEST);
    assert_eq!(script.fill(), 0, "it grows when it is used again");
}

#[test]
fn who_cannot_be_made_or_prepared_is_not_asked_for_again_and_again() {
    let mut script = Script::new();
    script.take(None);
    assert_eq!(script.tend(Rivals::default()).next, PoolNext::Make(SHAPE, Rested::No));
    script.pool.rest(SHAPE, script.now);
    assert_eq!(script.tend(Rivals::default()).next, PoolNext::Nothing);
    assert_eq!(script.pool.next_look(), Some(script.now + REST));
    script.now += REST;
    assert_eq!(script.tend(Rivals::default()).next, PoolNext::Make(SHAPE, Rested::Yes));
    script.pool.failed(SHAPE);
    let actions = script.tend(Rivals::default());
    assert_eq!((actions.end.len(), actions.next), (1, PoolNext::Tell), "the others would fare no better");
    script.now += PATIENCE;
    assert_eq!(script.fill(), 0);
    assert_eq!(script.take(None), None);
    assert_eq!(script.fill(), SMALLEST as u64, "somebody needs one after all");
}

#[test]
fn a_vm_that_is_forked_again_and_again_is_expected() {
    let mut script = Script::new();
    script.pool.forked(SHAPE, PARENT);
    script.fill();
    assert_eq!(script.pool.to_tell(), None, "once is not enough");
    script.pool.forked(SHAPE, PARENT);
    assert_eq!(script.fill(), 1, "two for its children, and one for all others");
    let told = script.pool.to_tell().unwrap();
    assert_eq!(told, (SHAPE, PARENT, ProcessId(1)));
    script.pool.expects(SHAPE, told.2, PARENT);
    script.pool.withdraw(SHAPE, told.2);
    assert_eq!(script.pool.to_tell(), None, "one at a time");
    assert_eq!(script.fill(), 0, "it comes back");
    assert!(script.pool.put(SHAPE, told.2, Some(PARENT)));
    assert_eq!(script.take(Some(PARENT)), Some(told.2), "rather than those that expect nothing");
    let stranger = script.take(Some(Generation(8))).unwrap();
    assert_ne!(stranger, told.2);
}

/// Whoever has seen a VM's memory becomes its child, or ends.
#[test]
fn nobody_else_gets_what_expects_a_vm() {
    let mut script = Script::new();
    (0..2).for_each(|_| script.pool.forked(SHAPE, PARENT));
    while script.take(None).is_some() {}
    let expects = script.put(SHAPE, Some(PARENT));
    assert_eq!((script.take(None), script.take(Some(Generation(8)))), (None, None));
    assert_eq!(script.tend(Rivals::default()).end, END_NOBODY);
    script.pool.retain(|vm| vm != PARENT);
    assert_eq!(script.tend(Rivals::default()).end, [expects]);
}

#[test]
fn a_shape_that_no_vm_has_has_no_pool() {
    let mut script = Script::new();
    script.pool.used(OTHER, script.now);
    let gone = script.take(None).unwrap();
    script.pool.lost(SHAPE, gone);
    assert_eq!(script.pool.drop_unused(|shape| shape == OTHER), [SHAPE]);
    assert!(!script.pool.put(SHAPE, gone, None), "one that was on its way has no place");
    assert_eq!(script.take(None), None);
    assert!(script.pool.drop_unused(|_| true).is_empty());
    assert_eq!(
        script.tend(Rivals::default()),
        PoolActions { end: END_NOBODY, next: PoolNext::Make(OTHER, Rested::No) }
    );
}
