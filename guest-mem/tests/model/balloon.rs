//! Guests that give pages back.

use crate::fakes::Gaps;
use crate::world::{Layout, World};
use guest_mem::VmId;
use guest_mem::addr::{Gfn, GfnRange};
use std::ops::Range;

fn pages(range: Range<u64>) -> GfnRange {
    range.into()
}

/// A VM that wrote all of its 32 pages, and so many clones.
fn family(clones: usize) -> (World, Vec<VmId>) {
    let mut world = World::new(&Layout::flat(32));
    let first = world.ids()[0];
    (0..32).for_each(|page| world.write(first, Gfn(page)));
    world.freeze(first, Gaps::None);
    for _ in 0..clones {
        world.fork_frozen(first);
    }
    world.write_back_all();
    let all = world.ids();
    (world, all)
}

fn end(mut world: World) {
    world.check();
    world.check_counts();
    world.verify();
    world.end();
}

#[test]
fn a_page_that_others_see_is_theirs_still() {
    let (mut world, vms) = family(2);
    world.balloon(vms[1], pages(4..12));
    assert_eq!(world.ledger.pages(), 32);
    assert_eq!(world.manager.family().runs(vms[1]).len(), 3);
    world.write(vms[1], Gfn(5));
    end(world);
}

#[test]
fn what_everybody_gives_back_is_freed_with_the_last() {
    let (mut world, vms) = family(2);
    for (done, &vm) in vms.iter().enumerate() {
        world.balloon(vm, pages(4..12));
        world.check();
        world.write_back_all();
        assert_eq!(world.ledger.pages(), if done == 2 { 24 } else { 32 });
    }
    end(world);
}

#[test]
fn what_everybody_gives_back_whole_leaves_no_store() {
    let (mut world, vms) = family(3);
    vms.iter().for_each(|&vm| world.balloon(vm, pages(0..32)));
    world.write_back_all();
    assert_eq!((world.ledger.pages(), world.ledger.stores()), (0, 0));
    end(world);
}

#[test]
fn a_page_of_ones_own_is_freed_at_once() {
    let (mut world, vms) = family(0);
    world.balloon(vms[0], pages(0..8));
    assert_eq!(world.ledger.pages() - world.manager.hidden().0, 24);
    (4..6).for_each(|page| world.write(vms[0], Gfn(page)));
    world.freeze(vms[0], Gaps::All);
    world.balloon(vms[0], pages(5..7));
    end(world);
}

/// Every generation writes the page; the youngest gives it back, and none of the bytes before shows.
#[test]
fn no_ancestors_bytes_come_back() {
    for gaps in [Gaps::None, Gaps::All] {
        let mut world = World::new(&Layout::flat(32).with_files(&[(0, 8)]));
        let mut line = world.ids();
        for generation in 0..4 {
            let vm = line[generation];
            (0..16).step_by(1 + generation).for_each(|page| world.write(vm, Gfn(page)));
            line.push(world.fork(vm, gaps));
        }
        let last = line[4];
        world.balloon(last, pages(2..20));
        world.check();
        (0..32).for_each(|page| world.read(last, Gfn(page)));
        let child = world.fork(last, gaps);
        for ancestor in line {
            world.exit(ancestor);
            world.check();
        }
        world.write_back_all();
        world.check();
        (0..32).for_each(|page| world.read(child, Gfn(page)));
        end(world);
    }
}

/// Pages that have not been written back, copy-ups among them, are not waited for any more.
#[test]
fn what_has_not_settled_need_not() {
    let (mut world, vms) = family(1);
    (0..32).step_by(3).for_each(|page| world.write(vms[1], Gfn(page)));
    world.freeze(vms[1], Gaps::All);
    assert_ne!(world.manager.family().totals().in_flight, 0);
    world.balloon(vms[1], pages(0..32));
    assert_eq!(world.manager.family().totals().in_flight, 0);
    end(world);
}

/// A guest gives pages back while the server has a freeze of it on its way.
#[test]
fn before_it_stands_for_a_freeze() {
    let (mut world, vms) = family(1);
    (0..32).step_by(2).for_each(|page| world.write(vms[1], Gfn(page)));
    world.balloon_and_freeze(vms[1], pages(3..20), Gaps::None);
    let child = world.fork_frozen(vms[1]);
    world.write(child, Gfn(4));
    end(world);
}

/// What a VM process says is a claim.
#[test]
fn pages_that_are_not_memory_do_not_count() {
    let mut world = World::new(&Layout::flat(64).with_hole(24, 40));
    let vm = world.ids()[0];
    (20..24).chain(40..44).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze(vm, Gaps::None);
    world.balloon(vm, pages(0..1 << 40));
    end(world);
}
