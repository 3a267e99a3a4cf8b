//! Bugs that were, and shapes that must not come back.

use crate::fakes::{Call, FakeFile, Gaps};
use crate::world::{Layout, World};
use guest_mem::addr::{Gfn, GfnRange};
use guest_mem::manager::Copied;
use guest_mem::sys::Touch;
use guest_mem::{Protection, VmId};

/// Two VMs over an object of pages 0 to 3, of which 1 and 2 are left to a copy-up of the second VM alone. Returns that VM.
fn with_a_gap(world: &mut World) -> VmId {
    let first = world.ids()[0];
    (0..4).for_each(|page| world.write(first, Gfn(page)));
    let second = world.fork(first, Gaps::None);
    let third = world.fork_frozen(first);
    world.write_back_all();
    for vm in [first, third] {
        (1..3).for_each(|page| world.write(vm, Gfn(page)));
        world.freeze(vm, Gaps::None);
    }
    world.write(second, Gfn(0));
    world.write(second, Gfn(3));
    world.freeze(second, Gaps::All);
    world.check();
    second
}

/// A page that only a copy-up kept was kept for good when the copy-up went with its VM before it had been filled.
#[test]
fn a_gap_that_goes_lets_go_of_what_is_below() {
    let mut world = World::new(&Layout::flat(16));
    let vm = with_a_gap(&mut world);
    assert_eq!(world.ledger.pages(), 4);
    world.exit(vm);
    world.check();
    world.write_back_all();
    assert_eq!(world.ledger.pages(), 2 + 4, "pages 0 and 3, which the other two see, and what they wrote");
    world.verify();
    world.end();
}

/// The same when the VM writes into its own copy-up, and freezes again.
#[test]
fn a_gap_that_is_written_over_lets_go_of_what_is_below() {
    let mut world = World::new(&Layout::flat(16));
    let vm = with_a_gap(&mut world);
    (0..16).for_each(|page| world.write(vm, Gfn(page)));
    let written_back_by_traps = world.ledger.pages();
    world.freeze(vm, Gaps::None);
    world.check();
    assert!(world.ledger.pages() - world.manager.hidden().0 < written_back_by_traps);
    world.verify();
    world.end();
}

/// A copy-up kept a page in every object below it, not only in the one it is to be copied from, and let go of the one only.
#[test]
fn a_gap_keeps_only_what_it_is_copied_from() {
    let mut world = World::new(&Layout::flat(16));
    let parent = world.ids()[0];
    (0..3).for_each(|page| world.write(parent, Gfn(page)));
    let child = world.fork(parent, Gaps::None);
    world.write(child, Gfn(1));
    let grandchild = world.fork(child, Gaps::None);
    world.write_back_all();
    world.write(grandchild, Gfn(0));
    world.write(grandchild, Gfn(2));
    world.freeze(grandchild, Gaps::All);
    world.check();
    // Page 1 of the first object is nobody's now: the copy-up is over the child's.
    world.write(parent, Gfn(1));
    world.freeze(parent, Gaps::None);
    world.check();
    world.write_back_all();
    world.verify();
    world.end();
}

/// An object that has been written back takes up a larger one that has not: what is left of that is written back as well.
#[test]
fn what_is_pending_stays_pending_when_it_is_absorbed() {
    let mut world = World::new(&Layout::flat(32));
    let vm = world.ids()[0];
    // An object that goes soon leaves a lower number, whose turn to be written back comes first, to the one that takes it up.
    world.write(vm, Gfn(0));
    let short_lived = world.fork(vm, Gaps::None);
    (1..16).step_by(2).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze(vm, Gaps::None);
    world.exit(short_lived);
    let child = world.fork_frozen(vm);
    world.write(child, Gfn(20));
    world.freeze(child, Gaps::None);
    for _ in 0..3 {
        world.write_back();
    }
    assert_ne!(world.manager.family().totals().in_flight, 0);
    world.exit(vm);
    world.check();
    world.write_back_all();
    world.verify();
    world.end();
}

/// Resident pages did count those of files.
#[test]
fn pages_of_files_are_not_the_familys() {
    let mut world = World::new(&Layout::flat(16).with_files(&[(4, 12)]));
    world.verify();
    assert_eq!(world.manager.family().totals().resident, 0);
    assert_eq!(world.manager.family().totals().stores, 1);
    assert_eq!(FakeFile::content(3), 0);
    world.end();
}

/// Printing a table took a leaf for one at frame 0.
#[test]
fn a_family_with_a_file_can_be_printed() {
    let world = World::new(&Layout::flat(16).with_files(&[(5, 12)]));
    assert!(format!("{:?}", world.manager.family()).contains("Stage2"));
    world.end();
}

/// Memory that was cleared takes no storage, and a clone maps none for it.
#[test]
fn a_stretch_of_zeros_is_stored_by_nobody() {
    let mut world = World::new(&Layout::flat(64));
    let parent = world.ids()[0];
    (0..64).for_each(|page| world.write(parent, Gfn(page)));
    world.fork(parent, Gaps::None);
    world.write_back_all();
    (10..40).for_each(|page| world.clear(parent, Gfn(page)));
    let store = world.freeze(parent, Gaps::None);
    world.write_back_all();
    assert!(world.manager.store(store).is_none());
    let child = world.fork_frozen(parent);
    assert_eq!(world.manager.family().runs(child).len(), 3);
    world.write(parent, Gfn(20));
    world.write(child, Gfn(20));
    world.fork(child, Gaps::All);
    world.fork(parent, Gaps::All);
    world.check();
    world.verify();
    world.check();
    world.end();
}

#[test]
fn what_a_freeze_copied_is_told_once_gaps_apart() {
    let mut world = World::new(&Layout::flat(16));
    let vm = world.ids()[0];
    (0..16).for_each(|page| world.write(vm, Gfn(page)));
    let first = world.freeze(vm, Gaps::None);
    world.write_back_all();
    (0..16).step_by(4).for_each(|page| world.write(vm, Gfn(page)));
    let second = world.freeze(vm, Gaps::All);
    world.write_back_all();
    assert_eq!(world.copied(second), Copied { pages: 16, copy_ups: 12 });
    assert_eq!(world.copied(second), Copied::default());
    assert!(world.manager.store(first).is_none(), "nothing of the first freeze is seen any more");
    world.end();
}

/// Forks of forks, whose ancestors exit.
#[test]
fn a_deep_line_of_forks_keeps_no_more_objects_than_it_needs() {
    for gaps in [Gaps::None, Gaps::Some(0x5a5a), Gaps::All] {
        for written_back in [true, false] {
            let mut world = World::new(&Layout::flat(32).with_files(&[(8, 16)]));
            let mut vm = world.ids()[0];
            for generation in 0..64 {
                world.write(vm, Gfn(generation % 32));
                world.write(vm, Gfn(generation * 7 % 32));
                let child = world.fork(vm, gaps);
                // Every eighth lives on.
                if generation % 8 != 0 {
                    world.exit(vm);
                }
                vm = child;
                if written_back {
                    world.write_back_all();
                }
                world.check();
            }
            world.write_back_all();
            world.check();
            let family = world.manager.family();
            // Three entries each, a tree without unneeded inner nodes, and the file.
            let bound = 2 * 3 * world.vms.len() as u64 + 1;
            assert!(family.totals().objects <= bound, "{} objects, not {bound}", family.totals().objects);
            assert!(family.chain_depth(vm) <= world.vms.len() as u64 + 2, "{}", family.chain_depth(vm));
            world.verify();
            for old in world.ids().into_iter().filter(|&old| old != vm) {
                world.exit(old);
            }
            world.check();
            assert!(world.manager.family().chain_depth(vm) <= 2);
            world.verify();
            world.end();
        }
    }
}

/// A VM that runs on after its pages have moved, and touches one before the server has heard of it, got a zero page in
/// its place: the books still had nothing there. It waits, and is woken when the freeze is over.
#[test]
fn a_page_that_may_just_have_moved_is_not_supplied_with_zeros() {
    let mut world = World::new(&Layout::flat(16));
    let vm = world.ids()[0];
    world.write(vm, Gfn(3));
    world.freeze_and_touch(vm, Gfn(3));
    world.write_back_all();
    world.check();
    world.verify();
    world.end();
}

/// A freeze that moves nothing leaves everything in memory twice, until its VM gives up what has been written back: what it has
/// written since stays, zeros do not trap, and a second freeze or what it has given back is left alone.
#[test]
fn what_stayed_is_shed_when_it_has_settled() {
    let mut world = World::new(&Layout::flat(128));
    let parent = world.ids()[0];
    (0..64).for_each(|page| world.write(parent, Gfn(page)));
    (64..96).for_each(|page| world.write(parent, Gfn(page)));
    (64..96).for_each(|page| world.clear(parent, Gfn(page)));
    let store = world.freeze(parent, Gaps::Stay);
    let child = world.fork_frozen(parent);
    assert_eq!(world.dedup(parent, store, 1, 1000), 0, "nothing has been written back");
    world.write_back_all();

    (10..12).for_each(|page| world.write(parent, Gfn(page)));
    (20..22).for_each(|page| world.write(parent, Gfn(page)));
    world.freeze(parent, Gaps::Stay);
    world.balloon(parent, (30..33).into());
    (40..42).for_each(|page| world.write(parent, Gfn(page)));
    // 0..10, 12..20, 22..30 and 33..96 are as they were frozen first, or have been written since.
    assert_eq!(world.dedup(parent, store, 9, 20), 20, "of the longest two, as much as was asked for");
    assert_eq!(world.dedup(parent, store, 9, 1000), 63 - 10);
    assert_eq!(world.dedup(parent, store, 9, 1000), 0);
    world.check();
    let kept: u64 = world.window(parent).kept().iter().map(|pages| pages.count().0).sum();
    assert_eq!(kept, 8 + 8 + 4, "too short, and of the second freeze");
    assert_eq!(world.window(parent).read(Gfn(70)), Ok(0), "zeros are there");
    (0..96).for_each(|page| assert!(world.window(parent).read(Gfn(page)).is_ok(), "page {page} traps"));
    world.verify();
    world.write(child, Gfn(50));
    world.exit(parent);
    world.verify();
    world.end();
}

/// A child that needs a page which its parent has still to copy waits for that alone, and write-back of its relatives goes on.
#[test]
fn a_page_that_is_still_to_be_copied_is_waited_for() {
    let mut world = World::new(&Layout::flat(16));
    let parent = world.ids()[0];
    (0..4).for_each(|page| world.write(parent, Gfn(page)));
    let child = world.fork(parent, Gaps::Stay);
    world.copies_behind(parent);
    world.write(child, Gfn(9));
    let grandchild = world.fork(child, Gaps::Stay);
    world.prefetch(grandchild, Gfn(2), Touch::Read);
    assert!(world.window(grandchild).is_waiting(Gfn(2)));
    while world.write_back() {}
    world.check();
    assert_eq!(world.manager.family().totals().in_flight, 4, "what the child wrote has been written back");
    world.exit(parent);
    world.check();
    assert!(world.io_done());
    assert!(!world.window(grandchild).is_waiting(Gfn(2)));
    world.verify();
    world.write_back_all();
    world.check();
    world.end();
}

/// What a child touches first trapped in each child of a parent that kept it.
#[test]
fn what_a_parent_keeps_is_settled_ahead_for_its_children() {
    let mut world = World::new(&Layout::flat(16));
    let parent = world.ids()[0];
    world.write(parent, Gfn(5));
    world.freeze(parent, Gaps::Stay);
    world.manager.write_ahead(parent, Gfn(5)).unwrap();
    let child = world.fork_frozen(parent);
    assert!(world.window(child).read(Gfn(5)).is_ok(), "the child traps");
    world.verify();
    world.check();
    world.end();
}

/// Tweedie's question on linux-mm: what of a child that protects arbitrary regions of what it inherits? It has entries of
/// its own for them, and both sides go on sharing pages, and writing where they may.
#[test]
fn a_child_that_protects_regions_shares_their_pages() {
    let mut world = World::new(&Layout::flat(64).with_files(&[(40, 50)]));
    let parent = world.ids()[0];
    (0..40).for_each(|page| world.write(parent, Gfn(page)));
    let child = world.fork(parent, Gaps::None);
    world.write_back_all();
    let before = world.manager.family().totals();
    for pages in [3..5, 10..20, 38..45] {
        world.protect(child, pages.into(), Protection::ReadOnly);
        world.check();
    }
    assert_eq!(world.manager.family().totals(), before, "nothing was copied");
    let entries = |world: &World, vm| world.manager.family().vm(vm).map().iter().count();
    assert_eq!((entries(&world, parent), entries(&world, child)), (3, 9));
    for vm in [parent, child] {
        // The child's writes count where it may write, and change nothing elsewhere.
        (0..64).step_by(3).for_each(|page| world.write(vm, Gfn(page)));
    }
    world.check_counts();
    // Its own child has the same protections, until it lifts them for itself alone.
    let grandchild = world.fork(child, Gaps::Stay);
    world.protect(grandchild, GfnRange::from(0..64), Protection::ReadWrite);
    (0..64).step_by(2).for_each(|page| world.write(grandchild, Gfn(page)));
    (0..64).step_by(2).for_each(|page| world.write(child, Gfn(page)));
    world.verify();
    world.exit(child);
    world.check();
    world.write_back_all();
    world.verify();
    world.end();
}

/// The parts of an entry are one again when nothing tells them apart, and what both show has one entry's uses.
#[test]
fn what_is_protected_for_a_while_leaves_no_trace() {
    let mut world = World::new(&Layout::flat(64));
    let vm = world.ids()[0];
    (0..64).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze(vm, Gaps::None);
    for pages in [10..20, 30..31, 0..64] {
        world.protect(vm, pages.into(), Protection::ReadOnly);
    }
    world.protect(vm, GfnRange::from(0..64), Protection::ReadWrite);
    world.check();
    assert_eq!(world.manager.family().vm(vm).map().iter().count(), 1);
    world.write(vm, Gfn(15));
    world.freeze(vm, Gaps::None);
    assert_eq!(world.manager.family().totals().objects, 1);
    world.verify();
    world.end();
}

/// An object could not be written back since a VM that was gone had still to copy a page. Its last viewer gave that page back,
/// nobody was left to tell of the copy, and what else the object had stayed in scratch ranges for good.
#[test]
fn what_settling_waits_for_goes_and_the_rest_settles() {
    let mut world = World::new(&Layout::flat(16));
    let parent = world.ids()[0];
    world.write(parent, Gfn(0));
    let child = world.fork(parent, Gaps::Stay);
    world.copies_behind(parent);
    world.write(child, Gfn(5));
    world.freeze(child, Gaps::Stay);
    world.exit(parent);
    while world.write_back() {}
    assert!(world.manager.family().objects().waits_for_others());
    world.balloon(child, (0..1).into());
    world.check();
    while world.write_back() {}
    assert_eq!(world.manager.family().totals().in_flight, 0);
    world.verify();
    world.end();
}

/// A guest waited for a page that was zero when it had been written back. It was supplied, written by its guest and moved out
/// by a freeze of which nobody had heard yet: when the trap was served again, zeros were put over it.
#[test]
fn a_page_that_was_supplied_meanwhile_is_not_supplied_again() {
    for fails in [false, true] {
        let mut world = World::new(&Layout::flat(64));
        let parent = world.ids()[0];
        (0..32).for_each(|page| world.write(parent, Gfn(page)));
        (0..32).for_each(|page| world.clear(parent, Gfn(page)));
        let child = world.fork(parent, Gaps::None);
        match fails {
            true => {
                world.ledger.fail(Call::ReadScratch, 0);
                assert!(world.try_read(child, Gfn(5)).is_err());
            }
            false => {
                world.copies_behind(parent);
                world.prefetch(child, Gfn(5), Touch::Read);
                world.end_reads();
            }
        }
        assert!(world.window(child).is_waiting(Gfn(5)));
        while world.write_back() {}
        assert!(!world.window(child).is_waiting(Gfn(5)) && world.manager.waiting_for_pages().count() == 0);
        world.write(child, Gfn(5));
        world.freeze_unheard(child, |world| assert!(world.io_done()));
        world.verify();
        world.end();
    }
}

/// Each stretch of a store was punched before the store was dropped, while everybody waited.
#[test]
fn nothing_is_punched_that_goes_with_its_store() {
    let mut world = World::new(&Layout::flat(64));
    let parent = world.ids()[0];
    (0..64).step_by(2).for_each(|page| world.write(parent, Gfn(page)));
    let child = world.fork(parent, Gaps::None);
    (0..64).step_by(4).for_each(|page| world.write(parent, Gfn(page)));
    world.freeze(parent, Gaps::None);
    world.write_back_all();
    let punches = world.ledger.punches();
    // What the child saw alone of the first store is freed bit by bit.
    world.exit(child);
    world.check();
    assert_eq!((world.ledger.punches() - punches, world.ledger.pages()), (0, 32 + 16));
    world.write_back_all();
    assert_eq!((world.ledger.punches() - punches, world.ledger.pages()), (16, 32));
    // The stores go whole.
    world.exit(parent);
    assert_eq!((world.ledger.punches() - punches, world.ledger.pages()), (16, 0));
    world.end();
}

/// How many objects are looked through for a page that a VM sees.
fn depth(world: &World, vm: VmId) -> u64 {
    world.manager.family().chain_depth(vm)
}

/// Lokier's *cut*: a space that replaced all that its parent has is no child of it any more. Nothing but the length of chains
/// tells: without it all memory was right, and a line of VMs that write all they have grew by an object with each fork.
#[test]
fn a_child_that_has_replaced_everything_is_cut_from_its_parent() {
    let mut world = World::new(&Layout::flat(16));
    let mut line = world.ids();
    (0..8).for_each(|page| world.write(line[0], Gfn(page)));
    for generation in 1..6 {
        let child = world.fork(line[generation - 1], Gaps::None);
        world.write_back_all();
        if generation % 2 == 0 {
            // What is in swap only is hidden as well.
            world.evict_all();
        }
        (0..7).for_each(|page| world.write(child, Gfn(page)));
        world.freeze(child, Gaps::None);
        world.write_back_all();
        assert_eq!(depth(&world, child), 2, "generation {generation}: it sees one page of its parent's");
        world.write(child, Gfn(7));
        world.freeze(child, Gaps::None);
        world.write_back_all();
        assert_eq!(depth(&world, child), 1, "generation {generation}: it sees nothing of its parent's");
        line.push(child);
    }
    world.check();
    world.verify();
    // The other way round: what the parent lost is hidden by all that lies over it.
    let child = world.fork(line[5], Gaps::None);
    (0..4).for_each(|page| world.write(child, Gfn(page)));
    world.freeze(child, Gaps::None);
    world.write_back_all();
    assert_eq!(depth(&world, child), 2);
    for vm in [child, line[5]] {
        world.balloon(vm, GfnRange::between(Gfn(4), Gfn(8)));
    }
    world.write_back_all();
    assert_eq!(depth(&world, child), 1, "of pages 0 to 3 it has its own, and 4 to 7 are gone");
    world.check();
    world.verify();
    world.end();
}

/// A gap holds the cut off: its pages are still to be copied from below.
#[test]
fn a_cut_waits_for_what_is_copied_from_below() {
    let mut world = World::new(&Layout::flat(16));
    let parent = world.ids()[0];
    (0..8).for_each(|page| world.write(parent, Gfn(page)));
    let child = world.fork(parent, Gaps::None);
    world.write_back_all();
    (0..8).step_by(2).chain([7]).for_each(|page| world.write(child, Gfn(page)));
    world.freeze(child, Gaps::All);
    assert_eq!(depth(&world, child), 2);
    world.check();
    world.write_back_all();
    assert_eq!(depth(&world, child), 1);
    world.check();
    world.verify();
    world.end();
}
