//! Stories of memory pressure: what goes to swap, how often, and who hears of it.

use crate::fakes::{Call, Gaps};
use crate::swap::{Reads, WorldSwap};
use crate::world::{Layout, World};
use guest_mem::addr::{Gfn, PageCount};
use guest_mem::{Activity, Touch, VmId};

/// A VM that has written the first `pages` pages of its RAM, frozen and written back.
fn with_pages(ram: u64, pages: u64) -> (World, VmId) {
    let mut world = World::new(&Layout::flat(ram));
    let vm = world.ids()[0];
    (0..pages).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze(vm, Gaps::None);
    world.write_back_all();
    (world, vm)
}

#[test]
fn a_page_that_two_hundred_see_is_written_once_read_once_and_shared_again() {
    let (mut world, parent) = with_pages(16, 16);
    while world.vms.len() < 200 {
        world.fork_frozen(parent);
    }
    let tables = world.manager.family().totals().tables;
    world.swap.borrow_mut().reads = Reads::Later;
    world.evict_all();
    assert_eq!((world.ledger.pages(), world.swap.borrow().pages()), (0, 16));
    world.check();
    for vm in world.ids() {
        world.prefetch(vm, Gfn(7), Touch::Read);
    }
    assert_eq!(world.manager.waiting_for_pages().count(), 200);
    world.io_done();
    assert!(world.ids().iter().all(|&vm| !world.window(vm).is_waiting(Gfn(7))), "one read wakes all");
    world.verify();
    assert_eq!((world.swap.borrow().calls(), world.ledger.pages()), ((1, 1), 16));
    assert_eq!(world.manager.family().totals().tables, tables, "tables say nothing of where pages are");
    world.check();
    world.end();
}

#[test]
fn a_page_that_has_been_to_swap_is_not_written_again() {
    let (mut world, vm) = with_pages(32, 32);
    world.evict_all();
    world.verify();
    world.evict_all();
    assert_eq!(world.ledger.pages(), 0);
    let counts = world.manager.counts();
    assert_eq!((counts.swap_out_pages, counts.swap_in_pages, counts.clean_evictions), (32, 32, 32));
    world.check();
    // Half of a cluster is in swap already, and comes back with the rest.
    (0..8).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze(vm, Gaps::None);
    world.write_back_all();
    world.evict_all();
    assert_eq!(world.manager.counts().swap_out_pages, 40);
    world.verify();
    world.check();
    world.end();
}

#[test]
fn what_everybody_hides_is_discarded_from_swap() {
    let (mut world, parent) = with_pages(16, 16);
    let child = world.fork_frozen(parent);
    world.evict_all();
    for vm in [parent, child] {
        assert_eq!(world.swap.borrow().pages(), 16);
        (4..8).for_each(|page| world.write(vm, Gfn(page)));
        world.freeze(vm, Gaps::None);
    }
    world.write_back_all();
    assert_eq!((world.swap.borrow().pages(), world.manager.counts().discarded_pages), (12, 4));
    world.check();
    world.verify();
    world.end();
}

#[test]
fn a_failed_read_stops_only_who_touches_it() {
    let (mut world, parent) = with_pages(32, 32);
    let (child, other) = (world.fork_frozen(parent), world.fork_frozen(parent));
    world.evict_all();
    world.expect_losses();
    world.ledger.fail(Call::GetSwap, 0);
    world.read(child, Gfn(3));
    let why = world.window(child).failed.clone().unwrap();
    assert!(why.contains("could not be read back from swap"), "{why}");
    (16..32).for_each(|page| world.read(parent, Gfn(page)));
    world.read(other, Gfn(15));
    assert!(world.window(parent).failed.is_none() && world.window(other).failed.is_some());
    assert_eq!((world.swap.borrow().pages(), world.manager.counts().lost_pages), (16, 16));
    world.check();
    world.reap();
    assert_eq!(world.ids(), [parent]);
    world.end();
}

/// Pages of a frozen machine go to swap without being in a store first, but for the one it waits for, and zeros.
#[test]
fn a_freeze_to_swap_fills_nothing_in() {
    let mut world = World::new(&Layout::flat(128));
    let vm = world.ids()[0];
    (0..100).for_each(|page| world.write(vm, Gfn(page)));
    (40..70).for_each(|page| world.clear(vm, Gfn(page)));
    world.freeze_to_swap(vm, Gaps::None);
    world.read(vm, Gfn(0));
    assert_eq!(world.ledger.pages(), 16);
    world.write_back_all();
    assert_eq!((world.ledger.pages(), world.swap.borrow().pages()), (16, 54));
    world.check();
    world.verify();
    world.end();
}

#[test]
fn what_swap_has_no_room_for_settles_into_memory() {
    let mut world = World::new(&Layout::flat(64));
    let vm = world.ids()[0];
    world.swap.borrow_mut().size = 20;
    (0..64).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze_to_swap(vm, Gaps::None);
    world.write_back_all();
    assert_eq!((world.ledger.pages(), world.swap.borrow().pages()), (48, 16));
    assert!(world.evict_some(16).stopped.is_some_and(|error| error.is_full()));
    world.check();
    world.verify();
    world.end();
}

/// What came back from swap is in both places. Where swap is full, memory that has no copy there gets its place.
#[test]
fn a_full_swap_gives_up_copies() {
    let mut world = World::new(&Layout::flat(64));
    let vm = world.ids()[0];
    world.swap.borrow_mut().size = 32;
    (0..32).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze(vm, Gaps::None);
    world.write_back_all();
    world.evict_all();
    (0..32).for_each(|page| world.read(vm, Gfn(page)));
    assert_eq!((world.ledger.pages(), world.swap.borrow().pages()), (32, 32));

    // Evicted from a store, and written back straight into swap.
    (32..48).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze(vm, Gaps::None);
    world.write_back_all();
    let others = world.objects();
    assert!(others.iter().all(|&object| world.manager.evict(object, (32..48).into()).stopped.is_none()));
    world.check();
    (48..64).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze_to_swap(vm, Gaps::None);
    world.write_back_all();
    assert_eq!((world.ledger.pages(), world.swap.borrow().pages()), (32, 32), "all copies are given up");
    world.check();
    assert!(world.evict_some(16).stopped.is_some_and(|error| error.is_full()), "nothing is left to give up");
    world.verify();
    world.check();
    world.end();
}

/// The victims themselves may be among the copies that are given up for them.
#[test]
fn half_a_cluster_is_given_up_for_the_other_half() {
    let (mut world, vm) = with_pages(32, 8);
    world.swap.borrow_mut().size = 8;
    world.evict_all();
    world.verify();
    (8..16).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze(vm, Gaps::None);
    world.write_back_all();
    world.evict_all();
    world.check();
    assert_eq!(world.manager.counts().discarded_pages, 0);
    world.verify();
    world.check();
    world.end();
}

/// A copy-up over a page in swap is not asked for again and again while that is being read, and keeps nothing else waiting.
#[test]
fn a_copy_that_waits_for_others_is_put_off() {
    let (mut world, parent) = with_pages(64, 64);
    let child = world.fork_frozen(parent);
    world.evict_all();
    world.swap.borrow_mut().reads = Reads::Later;
    for vm in [parent, child] {
        world.swap.borrow_mut().reads = Reads::AtOnce;
        [0, 20].into_iter().for_each(|page| world.write(vm, Gfn(page)));
        world.swap.borrow_mut().reads = Reads::Later;
    }
    world.evict_all();
    world.freeze(parent, Gaps::All);
    world.freeze(child, Gaps::None);
    let mut batches = 0;
    while world.write_back() {
        batches += 1;
    }
    assert!(batches < 8 && world.manager.family().totals().in_flight > 0);
    assert!(!world.write_back(), "it waits");
    world.check();
    world.write_back_all();
    assert!(world.manager.family().totals().swapped > 0, "what is copied need not come back itself");
    world.check();
    world.verify();
    world.end();
}

/// A read that fails for one VM was waited for by another: its slots are freed, and nobody would tell of it.
#[test]
fn who_waits_for_a_read_hears_of_its_failure() {
    let (mut world, parent) = with_pages(16, 16);
    let child = world.fork_frozen(parent);
    world.evict_all();
    world.swap.borrow_mut().reads = Reads::Later;
    world.prefetch(parent, Gfn(1), Touch::Read);
    assert!(world.window(parent).is_waiting(Gfn(1)));
    world.expect_losses();
    world.ledger.fail(Call::GetSwap, 0);
    world.read(child, Gfn(2));
    assert!(!world.window(parent).is_waiting(Gfn(1)), "it touches its page again");
    assert!(world.window(parent).failed.is_none() && world.window(child).failed.is_some());
    world.check();
    world.read(parent, Gfn(1));
    assert!(world.window(parent).failed.is_some());
    world.reap();
    world.end();
}

/// A copy-up over a copy-up over a page in swap: both objects wait.
#[test]
fn a_copy_of_a_copy_that_waits_for_others_is_put_off() {
    let (mut world, parent) = with_pages(16, 16);
    world.fork_frozen(parent);
    for _ in 0..2 {
        [0, 8].into_iter().for_each(|page| world.write(parent, Gfn(page)));
        world.evict_all();
        world.swap.borrow_mut().reads = Reads::Later;
        world.freeze(parent, Gaps::All);
        world.fork_frozen(parent);
        world.check();
    }
    while world.write_back() {}
    assert!(world.manager.family().objects().waits_for_others());
    world.check();
    world.write_back_all();
    world.verify();
    world.end();
}

/// An object is merged while a copy of its waits for swap: whoever gets its number next must not wait for that.
#[test]
fn what_is_absorbed_while_it_waits_for_others_is_not_remembered() {
    let (mut world, parent) = with_pages(16, 16);
    world.fork_frozen(parent);
    [0, 3].into_iter().for_each(|page| world.write(parent, Gfn(page)));
    world.evict_all();
    world.freeze(parent, Gaps::All);
    let child = world.fork_frozen(parent);
    world.write(child, Gfn(0));
    world.freeze(child, Gaps::None);
    world.swap.borrow_mut().reads = Reads::Later;
    while world.write_back() {}
    assert!(world.manager.family().objects().waits_for_others());
    world.exit(parent);
    world.check();
    while world.write_back() {}
    world.check();
    world.write_back_all();
    world.verify();
    world.end();
}

/// Who is paused gives first, however old the pages of others are; what both see is not taken for it.
#[test]
fn the_memory_of_idle_machines_goes_first() {
    let (mut world, busy) = with_pages(128, 64);
    let idle = world.fork_frozen(busy);
    (64..128).for_each(|page| world.write(busy, Gfn(page)));
    world.freeze(busy, Gaps::None);
    world.write_back_all();
    (64..96).for_each(|page| world.write(idle, Gfn(page)));
    world.freeze(idle, Gaps::None);
    world.write_back_all();
    world.manager.set_activity(idle, Activity::Idle).unwrap();
    assert_eq!(world.evict_some(32).pages.0, 32);
    let resident = |world: &World, vm, page| world.window(vm).read(Gfn(page)).is_ok();
    assert!((64..96).all(|page| !resident(&world, idle, page)));
    assert!((0..128).all(|page| resident(&world, busy, page)));
    assert_eq!(world.evict_some(16).pages.0, 16);
    assert!((0..128).all(|page| resident(&world, busy, page) == (page >= 16)), "then the oldest");
    world.check();
    world.verify();
    world.end();
}

/// A working set that does not fit is seen to be one.
#[test]
fn what_comes_back_soon_is_a_refault() {
    let (mut world, vm) = with_pages(128, 128);
    for round in 1..8 {
        world.evict_some(64);
        (0..128).for_each(|page| world.read(vm, Gfn(page)));
        assert_eq!(world.manager.counts().refaults, 64 * round);
    }
    world.check();
    world.end();
}

/// What the only viewer is about to write goes into its live layer alone, and its slot with the next freeze.
#[test]
fn a_page_that_its_only_viewer_writes_does_not_come_back_to_its_store() {
    for reads in [Reads::AtOnce, Reads::Later] {
        let (mut world, vm) = with_pages(32, 32);
        world.swap.borrow_mut().reads = reads;
        world.evict_all();
        world.write(vm, Gfn(7));
        assert_eq!((world.ledger.pages(), world.manager.counts().swap_in_live_pages), (15, 1));
        assert_eq!(world.swap.borrow().pages(), 32, "nobody knows yet that it was written");
        world.check();
        world.freeze(vm, Gaps::None);
        world.write_back_all();
        assert_eq!((world.ledger.pages(), world.swap.borrow().pages()), (16, 31));
        world.verify();
        world.check();
        world.end();
    }
}

#[test]
fn a_page_that_others_see_comes_back_for_all_of_them() {
    let (mut world, parent) = with_pages(16, 16);
    let child = world.fork_frozen(parent);
    world.evict_all();
    world.write(parent, Gfn(7));
    assert_eq!((world.ledger.pages(), world.manager.counts().swap_in_live_pages), (16, 0));
    world.verify();
    // With tables of its own, the parent still is not the only one; without the child, it is.
    world.write(parent, Gfn(8));
    world.freeze(parent, Gaps::None);
    world.write_back_all();
    world.evict_all();
    world.write(parent, Gfn(9));
    assert_eq!(world.manager.counts().swap_in_live_pages, 0);
    world.evict_all();
    world.exit(child);
    world.write(parent, Gfn(10));
    assert_eq!(world.manager.counts().swap_in_live_pages, 1);
    world.check();
    world.verify();
    world.end();
}

/// KVM asks for write where its guest reads: the copy is dropped with the next freeze, and what it was made of is there.
#[test]
fn a_page_that_was_not_written_after_all_is_read_again() {
    let (mut world, vm) = with_pages(16, 16);
    world.evict_all();
    world.copy_clean(vm, Gfn(7));
    assert_eq!(world.manager.counts().swap_in_live_pages, 1);
    let child = world.fork(vm, Gaps::None);
    world.read(child, Gfn(7));
    assert_eq!((world.ledger.pages(), world.swap.borrow().calls()), (16, (1, 2)));
    world.check();
    world.verify();
    world.end();
}

#[test]
fn a_live_layer_that_cannot_take_a_page_leaves_it_to_the_store() {
    let (mut world, vm) = with_pages(16, 16);
    world.evict_all();
    world.ledger.fail(Call::Supply, 0);
    world.write(vm, Gfn(7));
    assert!(!world.ledger.take_unfailed());
    assert_eq!((world.ledger.pages(), world.manager.counts().swap_in_live_pages), (16, 0));
    world.check();
    world.verify();
    world.end();
}

/// Who touches memory in order finds the next of it there, a window at a time, and what is read for that is known to have
/// been of use when it has been passed.
#[test]
fn what_is_touched_in_order_is_there_before() {
    let (mut world, vm) = with_pages(256, 256);
    world.evict_all();
    world.swap.borrow_mut().reads = Reads::Later;
    let touch = |world: &mut World, cluster: u64| {
        world.read(vm, Gfn(cluster * 16));
        while world.manager.bring_ahead() || world.io_done() {}
        world.check();
        world.ledger.pages() / 16
    };
    let counts: Vec<u64> = [0, 1, 3, 7].map(|cluster| touch(&mut world, cluster)).into();
    assert_eq!(counts, [1, 3, 7, 15], "windows of 2, 4 and 8");
    assert!((0..15 * 16).all(|page| world.window(vm).read(Gfn(page)).is_ok()));
    assert_eq!(world.swap.borrow().hits, 16 * 6, "clusters 2 to 7 have been passed");
    // Not where there is no room for it.
    world.evict_all();
    world.manager.set_room_ahead(PageCount(0));
    let counts: Vec<u64> = [0, 1, 2, 3].map(|cluster| touch(&mut world, cluster)).into();
    assert_eq!(counts, [1, 2, 3, 4]);
    world.verify();
    world.end();
}

/// What cannot be read ahead is not lost by that, and not asked for again and again.
#[test]
fn a_read_ahead_that_fails_is_made_up_for_by_whoever_needs_it() {
    let (mut world, vm) = with_pages(128, 128);
    world.evict_all();
    world.read(vm, Gfn(0));
    world.read(vm, Gfn(16));
    world.ledger.fail(Call::GetSwap, 0);
    while world.manager.bring_ahead() {}
    assert!(!world.ledger.take_unfailed());
    assert_eq!((world.ledger.pages(), world.manager.counts().lost_pages), (32, 0));
    world.check();
    world.verify();
    world.end();
}

/// Pages that a freeze had hidden from everybody were the oldest, and went to swap before anybody had looked.
#[test]
fn what_a_freeze_has_hidden_does_not_go_to_swap() {
    let (mut world, vm) = with_pages(32, 32);
    let child = world.fork_frozen(vm);
    world.exit(child);
    (0..32).for_each(|page| world.write(vm, Gfn(page)));
    world.freeze(vm, Gaps::None);
    world.manager.evict_some(PageCount(32));
    assert_eq!(world.swap.borrow().calls().0, 0);
    world.write_back_all();
    world.verify();
    world.check();
    world.end();
}
