//! Small scope, all of it.

use crate::fakes::Gaps;
use crate::world::{Layout, World};
use guest_mem::addr::{Gfn, GfnRange};

/// One operation; VMs by their age among those that live.
#[derive(Clone, Copy, Debug)]
enum Op {
    Write(usize, u64),
    Fork(usize),
    Freeze(usize),
    /// Of the first page.
    Balloon(usize),
    Exit(usize),
    Settle,
}

const PAGES: u64 = 2;
const MAX_VMS: usize = 3;

/// All that can be done with so many VMs.
fn choices(vms: usize) -> impl Iterator<Item = Op> {
    let of_one = move |vm| {
        let fork = (vms < MAX_VMS).then_some(Op::Fork(vm));
        (0..PAGES)
            .map(move |page| Op::Write(vm, page))
            .chain([Op::Freeze(vm), Op::Balloon(vm), Op::Exit(vm)])
            .chain(fork)
    };
    (0..vms).flat_map(of_one).chain([Op::Settle])
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
        Op::Settle => {
            world.settle();
        }
    }
}

/// Every sequence of `depth` more operations after `ops`; what is on the way to them was checked when it was the end.
fn explore(layout: &Layout, gaps: Gaps, ops: &mut Vec<Op>, depth: usize, ends: &mut u64) {
    let mut world = World::new(layout);
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
        for op in choices(vms) {
            ops.push(op);
            explore(layout, gaps, ops, depth - 1, ends);
            ops.pop();
        }
    }
}

#[test]
fn every_sequence_of_five_operations_on_two_pages() {
    let mut ends = 0;
    explore(&Layout::flat(PAGES), Gaps::None, &mut Vec::new(), 5, &mut ends);
    explore(&Layout::flat(PAGES), Gaps::All, &mut Vec::new(), 5, &mut ends);
    assert!(ends > 10_000, "{ends}");
}

#[test]
fn every_sequence_of_four_operations_over_a_file() {
    let layout = Layout::flat(PAGES).with_files(&[(1, 2)]);
    for gaps in [Gaps::None, Gaps::All] {
        explore(&layout, gaps, &mut Vec::new(), 4, &mut 0);
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
                for gaps in [Gaps::None, Gaps::All] {
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
