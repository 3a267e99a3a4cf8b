//! Small scope, all of it.

use crate::fakes::Gaps;
use crate::swap::Reads;
use crate::world::{Dedup, Half, Layout, What, World};
use guest_mem::addr::{Gfn, GfnRange, PageCount};
use guest_mem::{Destination, Protection, Sharing, Touch, VmId};

/// One operation; VMs by their age among those that live.
#[derive(Clone, Copy, Debug)]
enum Op {
    Write(usize, u64),
    Fork(usize),
    Freeze(usize),
    /// Of the first page.
    Balloon(usize),
    Exit(usize),
    /// Of the last page: it may not be written, or may be again.
    Protect(usize, Protection),
    /// There is nothing, or new memory.
    Unmap(usize),
    Map(usize, Sharing),
    /// The first page is where nothing is.
    Move(usize),
    /// Back from there.
    MoveBack(usize),
    WriteBack,
    /// All there is.
    Evict,
    /// What a VM has written goes straight to swap, and nobody waits for it.
    FreezeToSwap(usize),
    /// A VM touches a page, and is left waiting if that is in swap.
    Touch(usize, u64),
    /// Of swap, and of pages that are copied.
    EndReads,
    /// A freeze, step by step, and a child of what the last one took.
    Begin(usize),
    Take(usize),
    Finish(usize),
    Abort(usize),
    ForkFrozen(usize),
    /// A window gives up what stayed in it, and the manager hears of that.
    DoShed(usize),
    TellDedup(usize),
    /// What the last freeze took has still to be copied.
    CopiesBehind(usize),
}

/// What can be done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ops {
    /// As long as there is memory enough.
    Plain,
    /// And when there is not.
    Pressure,
    /// Map entries are changed.
    Entries,
    /// The halves of freezes and dedups are operations of their own.
    Halves,
}

/// Where sequences play.
#[derive(Clone)]
struct Scope {
    layout: Layout,
    gaps: Gaps,
    ops: Ops,
    most_vms: usize,
}

impl Scope {
    /// Two pages and three VMs.
    fn new(gaps: Gaps, ops: Ops) -> Self {
        Self { layout: Layout::flat(2), gaps, ops, most_vms: 3 }
    }

    /// One page and two VMs.
    fn smallest(gaps: Gaps, ops: Ops) -> Self {
        Self { layout: Layout::flat(1), most_vms: 2, ..Self::new(gaps, ops) }
    }

    fn may_evict(&self) -> bool {
        matches!(self.ops, Ops::Pressure | Ops::Halves)
    }

    /// All that can be done now.
    fn choices(&self, world: &World) -> Vec<Op> {
        let pages = self.layout.ram[0].1;
        let ids = world.ids();
        let mut choices = vec![Op::WriteBack];
        for (vm, id) in ids.iter().enumerate() {
            let all = (0..pages).map(|page| Op::Write(vm, page)).chain([Op::Balloon(vm), Op::Exit(vm)]);
            choices.extend(all.filter(|op| !matches!(op, Op::Balloon(_)) || !is_between(world, *id)));
            let may_fork = ids.len() < self.most_vms;
            match self.ops {
                Ops::Plain | Ops::Pressure | Ops::Entries => {
                    choices.push(Op::Freeze(vm));
                    choices.extend(Some(Op::Fork(vm)).filter(|_| may_fork));
                }
                Ops::Halves => {
                    choices.extend(Some(Op::ForkFrozen(vm)).filter(|_| may_fork));
                    choices.extend(halves(world, vm, *id));
                }
            }
            if self.ops == Ops::Entries {
                choices.extend(match world.has(*id, Gfn(pages - 1)) {
                    true => PROTECTIONS.map(|protection| Op::Protect(vm, protection)).to_vec(),
                    false => SHARINGS.map(|sharing| Op::Map(vm, sharing)).to_vec(),
                });
                choices.extend(Some(Op::Unmap(vm)).filter(|_| world.has(*id, Gfn(pages - 1))));
                choices.extend(match [0, pages - 1].map(|page| world.has(*id, Gfn(page))) {
                    [true, false] => Some(Op::Move(vm)),
                    [false, true] => Some(Op::MoveBack(vm)),
                    _ => None,
                });
            }
            if self.ops == Ops::Pressure {
                choices.extend((0..pages).map(|page| Op::Touch(vm, page)).chain([Op::FreezeToSwap(vm)]));
            }
        }
        if self.may_evict() {
            choices.extend([Op::Evict, Op::EndReads]);
        }
        choices
    }
}

/// Whether the manager hears of this VM's freeze or dedup before anything that it does now.
fn is_between(world: &World, vm: VmId) -> bool {
    matches!(world.halves.get(&vm), Some(Half::Taken(..))) || world.dedups.contains_key(&vm)
}

/// The steps that this VM can take now.
fn halves(world: &World, vm: usize, id: VmId) -> Vec<Op> {
    let mut steps = match world.halves.get(&id) {
        None => vec![Op::Begin(vm)],
        Some(Half::Begun(..) | Half::Standing(..)) => vec![Op::Take(vm), Op::Abort(vm)],
        Some(Half::Taken(..)) => vec![Op::Finish(vm)],
    };
    match world.dedups.get(&id) {
        Some(Dedup::Asked(..)) => {}
        Some(Dedup::Done(..)) => steps.push(Op::TellDedup(vm)),
        None if world.halves.contains_key(&id) || world.kept_stores(id).is_empty() => {}
        None => steps.push(Op::DoShed(vm)),
    }
    if world.window(id).has_scratch() && !world.window(id).is_copying() {
        steps.push(Op::CopiesBehind(vm));
    }
    steps
}

fn run(world: &mut World, op: Op, gaps: Gaps) {
    let ids = world.ids();
    match op {
        Op::Write(vm, page) if is_between(world, ids[vm]) => {
            world.attempt_write(ids[vm], Gfn(page), What::Stamp).expect("nothing is to fail");
        }
        Op::Write(vm, page) => world.write(ids[vm], Gfn(page)),
        Op::Fork(vm) => {
            world.fork(ids[vm], gaps);
        }
        Op::Freeze(vm) => {
            world.freeze(ids[vm], gaps);
        }
        Op::Balloon(vm) => world.balloon(ids[vm], GfnRange::between(Gfn(0), Gfn(1))),
        Op::Exit(vm) => world.exit(ids[vm]),
        Op::Protect(vm, protection) => {
            let last = world.frames().last().expect("RAM");
            world.protect(ids[vm], GfnRange::new(last, PageCount(1)), protection);
        }
        Op::Unmap(vm) => {
            let last = world.frames().last().expect("RAM");
            world.try_unmap(ids[vm], GfnRange::new(last, PageCount(1))).expect("it is there");
        }
        Op::Map(vm, sharing) => {
            let last = world.frames().last().expect("RAM");
            world.try_map(ids[vm], GfnRange::new(last, PageCount(1)), sharing).expect("nothing is there");
        }
        Op::Move(vm) => {
            let last = world.frames().last().expect("RAM");
            world.try_move(ids[vm], (0..1).into(), last).expect("nothing is there");
        }
        Op::MoveBack(vm) => {
            let last = world.frames().last().expect("RAM");
            world.try_move(ids[vm], GfnRange::one(last), Gfn(0)).expect("nothing is there");
        }
        Op::WriteBack => {
            world.write_back();
        }
        Op::Evict => world.evict_all(),
        Op::FreezeToSwap(vm) => {
            world.freeze_to_swap(ids[vm], gaps);
        }
        Op::Touch(vm, page) => world.prefetch(ids[vm], Gfn(page), Touch::Write),
        Op::EndReads => {
            world.io_done();
        }
        Op::Begin(vm) => {
            world.begin(ids[vm], Destination::Store).expect("nothing is to fail");
        }
        Op::Take(vm) => {
            world.stand(ids[vm]);
            world.take(ids[vm], gaps);
        }
        Op::Finish(vm) => world.finish(ids[vm]),
        Op::Abort(vm) => world.abort(ids[vm]),
        Op::ForkFrozen(vm) => {
            world.fork_frozen(ids[vm]);
        }
        Op::DoShed(vm) => {
            let store = *world.kept_stores(ids[vm]).first().expect("pages stayed");
            world.ask_to_dedup(ids[vm], store, 1, u64::MAX);
            world.do_dedup(ids[vm]);
        }
        Op::TellDedup(vm) => world.tell_dedup(ids[vm]),
        Op::CopiesBehind(vm) => world.copies_behind(ids[vm]),
    }
}

/// Every sequence of `depth` more operations after `ops`; what is on the way to them was checked when it was the end. How many
/// sequences.
fn explore(scope: &Scope, ops: &mut Vec<Op>, depth: usize) -> u64 {
    let mut world = World::new(&scope.layout);
    if scope.may_evict() {
        world.swap.borrow_mut().reads = Reads::Later;
    }
    for &op in ops.iter() {
        run(&mut world, op, scope.gaps);
    }
    world.check();
    world.check_counts();
    let choices = scope.choices(&world);
    world.close();
    world.verify();
    world.end();
    let mut ends = 1;
    for op in choices.into_iter().filter(|_| depth > 0) {
        ops.push(op);
        ends += explore(scope, ops, depth - 1);
        ops.pop();
    }
    ends
}

const PROTECTIONS: [Protection; 2] = [Protection::ReadOnly, Protection::ReadWrite];
const SHARINGS: [Sharing; 2] = [Sharing::CopyOnWrite, Sharing::Shared];
const GAPS: [Gaps; 3] = [Gaps::None, Gaps::All, Gaps::Stay];

#[test]
fn every_sequence_of_five_operations_on_two_pages() {
    let ends: u64 = GAPS.map(|gaps| explore(&Scope::new(gaps, Ops::Plain), &mut Vec::new(), 5)).iter().sum();
    assert!(ends > 10_000, "{ends}");
}

#[test]
fn every_sequence_of_four_operations_over_a_file() {
    for gaps in GAPS {
        let scope = Scope::new(gaps, Ops::Plain);
        let layout = scope.layout.clone().with_files(&[(1, 2)]);
        explore(&Scope { layout, ..scope }, &mut Vec::new(), 4);
    }
}

/// Both pages, one page beside one that is not, and whatever becomes of a page that never is private.
#[test]
fn every_sequence_of_operations_beside_shared_memory() {
    for gaps in GAPS {
        let scope = Scope::new(gaps, Ops::Plain);
        let layout = Layout::flat(2).with_shared(&[(1, 2)]);
        let ends = explore(&Scope { layout: layout.clone(), ..scope.clone() }, &mut Vec::new(), 4);
        assert!(ends > 1_000, "{ends}");
        explore(&Scope { layout, ..Scope::new(gaps, Ops::Entries) }, &mut Vec::new(), 3);
        let layout = Layout::flat(3).with_shared(&[(0, 1), (2, 3)]);
        explore(&Scope { layout: layout.clone(), ..Scope::new(gaps, Ops::Pressure) }, &mut Vec::new(), 3);
        explore(&Scope { layout, ..Scope::new(gaps, Ops::Halves) }, &mut Vec::new(), 3);
    }
}

#[test]
fn every_sequence_of_four_operations_on_entries() {
    for gaps in GAPS {
        let scope = Scope::new(gaps, Ops::Entries);
        explore(&scope, &mut Vec::new(), 4);
        let layout = scope.layout.clone().with_files(&[(1, 2)]);
        explore(&Scope { layout, ..scope }, &mut Vec::new(), 4);
    }
}

/// The first ones are given, without which nothing can be evicted.
#[test]
fn every_sequence_of_three_operations_under_pressure() {
    for gaps in GAPS {
        let scope = Scope::new(gaps, Ops::Pressure);
        explore(&scope, &mut vec![Op::Write(0, 0), Op::FreezeToSwap(0)], 3);
        explore(&scope, &mut vec![Op::Write(0, 1), Op::Fork(0), Op::WriteBack, Op::Evict], 3);
    }
}

#[test]
fn every_sequence_of_five_operations_under_pressure() {
    for gaps in [Gaps::None, Gaps::Stay] {
        let ends = explore(&Scope::smallest(gaps, Ops::Pressure), &mut Vec::new(), 5);
        assert!(ends > 10_000, "{ends}");
    }
}

/// Freezes in two steps, snapshots among them, which are copied later, and dedups.
#[test]
fn every_sequence_of_five_steps_of_freezes_and_dedups() {
    for gaps in [Gaps::None, Gaps::Stay] {
        let scope = Scope::smallest(gaps, Ops::Halves);
        explore(&scope, &mut vec![Op::Write(0, 0)], 4);
        let ends = explore(&scope, &mut vec![Op::Write(0, 0), Op::Begin(0), Op::Take(0), Op::Finish(0)], 5);
        assert!(ends > 10_000, "{ends}");
    }
    let scope = Scope::new(Gaps::Stay, Ops::Halves);
    explore(&scope, &mut vec![Op::Write(0, 0), Op::Begin(0), Op::Take(0), Op::Finish(0), Op::ForkFrozen(0)], 3);
}

/// All orders of the numbers below four.
fn orders() -> Vec<[usize; 4]> {
    let all = (0..256).map(|n| [n & 3, n >> 2 & 3, n >> 4 & 3, n >> 6]);
    all.filter(|order| (0..4).all(|n| order.contains(&n))).collect()
}

/// When pages are written back in [`every_order_of_exits_of_a_tree_of_four`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum WriteBack {
    Never,
    First,
    Between,
}

/// A tree of four: parents by the number of the node. All write the same page, and one of their own.
fn tree(parents: [usize; 3], gaps: Gaps) -> World {
    let mut world = World::new(&Layout::flat(16));
    let mut nodes = world.ids();
    for parent in parents {
        let parent = nodes[parent];
        for page in [0, u64::from(parent.0) * 2] {
            world.write(parent, Gfn(page));
        }
        nodes.push(world.fork(parent, gaps));
    }
    for &node in &nodes {
        world.write(node, Gfn(u64::from(node.0)));
    }
    world
}

#[test]
fn every_order_of_exits_of_a_tree_of_four() {
    let chain = [0, 1, 2];
    let star = [0, 0, 0];
    let fork = [0, 1, 1];
    for parents in [chain, star, fork] {
        for order in orders() {
            for write_back in [WriteBack::Never, WriteBack::First, WriteBack::Between] {
                for gaps in [Gaps::None, Gaps::All, Gaps::Stay] {
                    let mut world = tree(parents, gaps);
                    let nodes = world.ids();
                    if write_back == WriteBack::First {
                        world.write_back_all();
                    }
                    for node in order {
                        world.exit(nodes[node]);
                        world.check();
                        if write_back == WriteBack::Between {
                            world.write_back();
                            world.check();
                        }
                        if write_back != WriteBack::Never {
                            world.verify();
                        }
                        world.check_counts();
                    }
                    world.end();
                }
            }
        }
    }
}
