//! Every call that can fail does, once, at each place where it is made.

use crate::fakes::{Call, Gaps};
use crate::world::{Layout, World};
use guest_mem::addr::{Gfn, GfnRange};
use guest_mem::manager::Error;
use guest_mem::{Destination, Protection, VmId};
use std::ops::Range;

/// Tries again what failed, which must leave everything in order, and succeed.
fn insist<R>(world: &mut World, mut action: impl FnMut(&mut World) -> Result<R, Error>) -> R {
    let before = world.manager.family().totals();
    match action(world) {
        Ok(done) => done,
        Err(error) => {
            world.check();
            world.check_counts();
            if !matches!(error, Error::Fill { .. } | Error::PutSwap { .. } | Error::Read { .. }) {
                assert_eq!(world.manager.family().totals(), before, "{error} changes nothing");
            }
            // Not for ever: what has been done is not to be done again.
            for _ in 0..30 {
                if let Ok(done) = action(world) {
                    return done;
                }
                world.check();
            }
            panic!("it never succeeds: {error}")
        }
    }
}

/// Writes, zeros and forks over files, copy-ups in between; half of it is written back by traps, half in batches.
fn play(world: &mut World) {
    let first = world.ids()[0];
    for page in (0..64).step_by(5).chain(3..20).chain(62..64) {
        insist(world, |world| world.try_write(first, Gfn(page)));
    }
    for page in 64..100 {
        insist(world, |world| world.try_clear(first, Gfn(page)));
    }
    insist(world, |world| world.try_write(first, Gfn(81)));
    let second = insist(world, |world| world.try_fork(first, Gaps::All));
    for page in [0, 7, 45, 127] {
        insist(world, |world| world.try_write(second, Gfn(page)));
    }
    let third = insist(world, |world| world.try_fork(second, Gaps::All));
    for (pages, protection) in [(8..60, Protection::ReadOnly), (20..40, Protection::ReadWrite)] {
        insist(world, |world| world.try_protect(third, pages.clone().into(), protection));
    }
    read(world, third, 0..30);
    while insist(world, World::try_write_back) {}
    world.reap();
    if world.vms.contains_key(&second) {
        world.exit(second);
    }
    evict(world);
    read(world, third, 0..128);
    read(world, first, 0..128);
    evict(world);
    if world.vms.contains_key(&first) {
        for page in 30..35 {
            insist(world, |world| world.try_write(first, Gfn(page)));
        }
        insist(world, |world| world.try_fork(first, Gaps::All));
        if world.vms.contains_key(&first) {
            insist(world, |world| world.try_write(first, Gfn(32)));
        }
    }
    world.reap();
    if world.vms.contains_key(&third) {
        insist(world, |world| world.try_write(third, Gfn(90)));
        insist(world, |world| world.try_freeze_to(third, Gaps::All, Destination::Swap));
        while insist(world, World::try_write_back) {}
    }
}

/// All memory, of which some is in swap already.
fn evict(world: &mut World) {
    insist(world, |world| match world.evict_some(u64::MAX).stopped {
        Some(error) => Err(error),
        None => Ok(()),
    });
}

/// A VM reads, as far as it gets.
fn read(world: &mut World, vm: VmId, pages: Range<u64>) {
    for page in pages {
        if world.vms.contains_key(&vm) {
            insist(world, |world| world.try_read(vm, Gfn(page)));
            world.reap();
        }
    }
}

/// Runs [`play`] with the first, second, … call failing, for as long as there is one more. Returns how many there were.
fn fail_every(call: Call) -> u64 {
    for nth in 0.. {
        let mut world = World::new(&Layout::flat(128).with_files(&[(40, 50)]));
        world.ledger.fail(call, nth);
        if matches!(call, Call::LoseScratch | Call::GetSwap) {
            world.expect_losses();
        }
        play(&mut world);
        let unfailed = world.ledger.take_unfailed();
        world.check();
        world.write_back_all();
        world.reap();
        world.verify();
        world.check();
        world.end();
        if unfailed {
            return nth;
        }
    }
    unreachable!("there are only so many calls")
}

/// Runs [`play`] with every second, third, … call failing, all the time.
fn fail_each(call: Call) {
    for nth in 2..8 {
        let mut world = World::new(&Layout::flat(128).with_files(&[(40, 50)]));
        world.ledger.fail_each(call, nth);
        if matches!(call, Call::ReadScratch | Call::GetSwap) {
            world.expect_losses();
        }
        play(&mut world);
        world.ledger.take_unfailed();
        world.check();
        world.write_back_all();
        world.reap();
        world.verify();
        world.check();
        world.end();
    }
}

#[test]
fn every_second_third_and_so_on_of_all_calls_fails() {
    use Call::*;
    [Create, Fill, Read, ReadFile, PutSwap, GetSwap, ReadScratch, Supply, Protect].into_iter().for_each(fail_each);
}

#[test]
fn a_store_that_cannot_be_read_is_read_again() {
    assert!(fail_every(Call::Read) > 5);
}

#[test]
fn a_live_layer_that_takes_no_page_leaves_it_to_the_store() {
    assert!(fail_every(Call::Supply) >= 1);
}

/// Pages stay allocated until their store goes. Nobody sees anything of it.
#[test]
fn what_cannot_be_freed_goes_with_its_store() {
    for nth in 1..5 {
        let mut world = World::new(&Layout::flat(64));
        let parent = world.ids()[0];
        (0..40).for_each(|page| world.write(parent, Gfn(page)));
        let child = world.fork(parent, Gaps::None);
        world.write_back_all();
        world.ledger.fail_each(Call::Punch, nth);
        for vm in [parent, child] {
            (0..20).for_each(|page| world.write(vm, Gfn(page)));
            world.freeze(vm, Gaps::None);
        }
        world.balloon(child, GfnRange::between(Gfn(25), Gfn(30)));
        world.balloon(parent, GfnRange::between(Gfn(24), Gfn(32)));
        world.write_back_all();
        assert!(nth > 1 || world.ledger.stuck() > 0);
        world.check();
        world.verify();
        world.exit(parent);
        world.check();
        world.verify();
        world.end();
    }
}

#[test]
fn a_store_that_cannot_be_made_changes_nothing() {
    assert_eq!(fail_every(Call::Create), 4);
}

#[test]
fn a_fill_that_fails_half_way_is_done_again() {
    assert!(fail_every(Call::Fill) > 10);
}

#[test]
fn a_file_that_cannot_be_read_is_read_again() {
    assert!(fail_every(Call::ReadFile) >= 3);
}

#[test]
fn what_cannot_be_protected_is_as_it_was() {
    assert_eq!(fail_every(Call::Protect), 2);
}

#[test]
fn what_swap_does_not_take_stays_where_it_is() {
    assert!(fail_every(Call::PutSwap) > 10);
}

#[test]
fn what_swap_has_lost_stops_who_needs_it_and_nobody_else() {
    assert!(fail_every(Call::GetSwap) > 10);
}

#[test]
fn a_lost_page_stops_who_needs_it_and_nobody_else() {
    assert!(fail_every(Call::LoseScratch) > 10);
}

/// Any error was taken for the end of the process that has the pages: they were lost though it lived.
#[test]
fn what_cannot_be_read_out_of_a_scratch_range_is_read_again() {
    assert!(fail_every(Call::ReadScratch) > 10);
}
