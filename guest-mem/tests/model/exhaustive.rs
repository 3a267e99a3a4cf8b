//! Small scope, all of it.

use crate::fakes::Gaps;
use crate::swap::Reads;
use crate::world::{Layout, World};
use guest_mem::addr::{Gfn, GfnRange};
use guest_mem::{Protection, Touch};

/// One operation; VMs by their age among those that live.
#[derive(Clone, Copy, Debug)]
enum Op {
    Write(usize, u64),
    Fork(usize),
    Freeze(usize),
    /// Of the first page.
    Balloon(usize),
    Exit(usize),
    /// Of the second page: it may not be written, or may be again.
    Protect(usize, Protection),
    Settle,
    /// All there is.
    Evict,
    /// What a VM has written goes straight to swap, and nobody waits for it.
    FreezeToSwap(usize),
    /// A VM touches a page, and is left waiting if that is in swap.
    Touch(usize, u64),
    EndReads,
}

/// What is done besides writes, forks and exits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extra {
    None,
    /// Memory is short.
    Pressure,
    /// Map entries are changed.
    Entries,
}

const PAGES: u64 = 2;
const MAX_VMS: usize = 3;

/// All that can be done with so many VMs.
fn choices(vms: usize, extra: Extra) -> impl Iterator<Item = Op> {
    let of_one = move |vm| {
        let fork = (vms < MAX_VMS).then_some(Op::Fork(vm));
        (0..PAGES)
            .map(move |page| Op::Write(vm, page))
            .chain([Op::Freeze(vm), Op::Balloon(vm), Op::Exit(vm)])
            .chain(fork)
    };
    let pressed = move |vm| (0..PAGES).map(move |page| Op::Touch(vm, page)).chain([Op::FreezeToSwap(vm)]);
    let pressed = (0..vms).flat_map(pressed).chain([Op::Evict, Op::EndReads]);
    let pressed = pressed.filter(move |_| extra == Extra::Pressure);
    let entries = move |vm| [Protection::ReadOnly, Protection::ReadWrite].map(|protection| Op::Protect(vm, protection));
    let entries = (0..vms).flat_map(entries).filter(move |_| extra == Extra::Entries);
    (0..vms).flat_map(of_one).chain([Op::Settle]).chain(pressed).chain(entries)
}

fn run(world: &mut World, op: Op, gaps: Gaps) {
    let ids = world.ids();
    match op {
        Op::Write(vm, page) => world.write(ids[vm], Gfn(page)),
        Op::Fork(vm) => {
            world.fork(ids[vm], gaps);
        }
        Op::Freeze(vm) => {
            world.freeze(ids[vm], gaps);
        }
        Op::Balloon(vm) => world.balloon(ids[vm], GfnRange::between(Gfn(0), Gfn(1))),
        Op::Exit(vm) => world.exit(ids[vm]),
        Op::Protect(vm, protection) => world.protect(ids[vm], GfnRange::from(1..2), protection),
        Op::Settle => {
            world.settle();
        }
        Op::Evict => world.evict_all(),
        Op::FreezeToSwap(vm) => {
            world.freeze_to_swap(ids[vm], gaps);
        }
        Op::Touch(vm, page) => world.prefetch(ids[vm], Gfn(page), Touch::Write),
        Op::EndReads => {
            world.io_done();
        }
    }
}

/// Where sequences play.
struct Scope {
    layout: Layout,
    gaps: Gaps,
    extra: Extra,
}

/// Every sequence of `depth` more operations after `ops`; what is on the way to them was checked when it was the end.
fn explore(scope: &Scope, ops: &mut Vec<Op>, depth: usize, ends: &mut u64) {
    let &Scope { ref layout, gaps, extra } = scope;
    let mut world = World::new(layout);
    if extra == Extra::Pressure {
        world.swap.borrow_mut().reads = Reads::Later;
    }
    for &op in ops.iter() {
        run(&mut world, op, gaps);
    }
    world.check();
    world.check_counts();
    let vms = world.vms.len();
    world.verify();
    world.end();
    *ends += 1;
    if depth > 0 {
        for op in choices(vms, extra) {
            ops.push(op);
            explore(scope, ops, depth - 1, ends);
            ops.pop();
        }
    }
}

#[test]
fn every_sequence_of_five_operations_on_two_pages() {
    let mut ends = 0;
    for gaps in [Gaps::None, Gaps::All, Gaps::Stay] {
        let scope = Scope { layout: Layout::flat(PAGES), gaps, extra: Extra::None };
        explore(&scope, &mut Vec::new(), 5, &mut ends);
    }
    assert!(ends > 10_000, "{ends}");
}

#[test]
fn every_sequence_of_four_operations_over_a_file() {
    let layout = Layout::flat(PAGES).with_files(&[(1, 2)]);
    for gaps in [Gaps::None, Gaps::All, Gaps::Stay] {
        let scope = Scope { layout: layout.clone(), gaps, extra: Extra::None };
        explore(&scope, &mut Vec::new(), 4, &mut 0);
    }
}

#[test]
fn every_sequence_of_four_operations_on_entries() {
    for layout in [Layout::flat(PAGES), Layout::flat(PAGES).with_files(&[(1, 2)])] {
        for gaps in [Gaps::None, Gaps::All, Gaps::Stay] {
            let scope = Scope { layout: layout.clone(), gaps, extra: Extra::Entries };
            explore(&scope, &mut Vec::new(), 4, &mut 0);
        }
    }
}

/// The first two are given, without which nothing can be evicted.
#[test]
fn every_sequence_of_five_operations_under_pressure() {
    for gaps in [Gaps::None, Gaps::All, Gaps::Stay] {
        let scope = Scope { layout: Layout::flat(PAGES), gaps, extra: Extra::Pressure };
        explore(&scope, &mut vec![Op::Write(0, 0), Op::FreezeToSwap(0)], 3, &mut 0);
        explore(&scope, &mut vec![Op::Write(0, 1), Op::Fork(0), Op::Settle, Op::Evict], 3, &mut 0);
    }
}

/// All orders of the numbers below four.
fn orders() -> Vec<[usize; 4]> {
    let all = (0..256).map(|n| [n & 3, n >> 2 & 3, n >> 4 & 3, n >> 6]);
    all.filter(|order| (0..4).all(|n| order.contains(&n))).collect()
}

/// When pages settle in [`every_order_of_exits_of_a_tree_of_four`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum Settle {
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
            for settle in [Settle::Never, Settle::First, Settle::Between] {
                for gaps in [Gaps::None, Gaps::All, Gaps::Stay] {
                    let mut world = tree(parents, gaps);
                    let nodes = world.ids();
                    if settle == Settle::First {
                        world.settle_all();
                    }
                    for node in order {
                        world.exit(nodes[node]);
                        world.check();
                        if settle == Settle::Between {
                            world.settle();
                            world.check();
                        }
                        if settle != Settle::Never {
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
