//! The first fork of a launched VM, which has all of its memory in huge pages of its own: it goes on without waiting for any
//! of them, and nothing stays in memory twice.

use offshoot_tests::process::{host_memory, kill};
use offshoot_tests::{Guest, TEN_SECONDS, TestHome, wait_until};
use std::collections::BTreeSet;
use std::ops::Range;
use vmm::api::VmState;
use vmm::client::{ForkOptions, Vm};
use vmm::units::ByteSize;

const WRITTEN: Range<u64> = 1000..33768;
const BYTES: u64 = (WRITTEN.end - WRITTEN.start) * 4096;

fn launched(home: &TestHome) -> Vm {
    let vm = home.launch("p", ByteSize::mib(160));
    vm.fill(WRITTEN, 1);
    vm
}

/// The processes that a fork adds to those of a VM: a copy of its parent's, which is not its child's.
fn copies(home: &TestHome, before: &BTreeSet<i32>, fork: impl FnOnce() -> Vm) -> (Vm, Vec<i32>) {
    let child = fork();
    let is_copy = |pid: &i32| {
        // It has the memory of its parent at once, and one descriptor.
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
        let resident: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        resident * 4096 > BYTES && descriptors == 1
    };
    (child, home.processes().into_iter().filter(|pid| !before.contains(pid)).filter(is_copy).collect())
}

/// Parent and child go on, write, and are both right; the parent has not waited once. When all has settled, the parent has
/// no more to itself than what it wrote.
#[test]
fn a_launched_vm_goes_on_without_waiting() {
    let Some(home) = TestHome::new() else { return };
    let vm = launched(&home);
    let before = vm.stats().unwrap();
    assert!(before.private_pages >= WRITTEN.end - WRITTEN.start);
    let child = vm.fork(ForkOptions::new()).unwrap().remove(0).vm;
    let unsettled = home.totals().unsettled_pages;
    vm.verify(WRITTEN, 1);
    vm.fill(2000..3000, 2);
    let after = vm.stats().unwrap();
    println!("{unsettled} pages unsettled after the fork; traps of the parent: {}", after.traps - before.traps);
    assert!(after.traps - before.traps <= 2, "{before:?}, {after:?}");
    child.verify(WRITTEN, 1);
    child.fill(20000..21000, 3);

    let deduped = || vm.stats().unwrap().private_pages < 1200;
    wait_until("what has settled has left the parent's window", TEN_SECONDS, deduped);
    vm.verify(WRITTEN.start..2000, 1);
    vm.verify(2000..3000, 2);
    vm.verify(3000..WRITTEN.end, 1);
    child.verify(WRITTEN.start..20000, 1);
    child.verify(20000..21000, 3);
    wait_until("nothing is in memory twice", TEN_SECONDS, || host_memory(home.server().unwrap()) < BYTES + (40 << 20));
    home.check();
    // What it has written since is its own, and moves at its next fork.
    vm.fill(5000..6000, 4);
    let next = vm.fork(ForkOptions::new().wait_settled(true)).unwrap().remove(0);
    assert!((2000..2100).contains(&next.figures.moved_pages), "{:?}", next.figures);
    next.vm.verify(5000..6000, 4);
    next.vm.verify(2000..3000, 2);
}

/// A fork that waits for its pages waits until they are nowhere else.
#[test]
fn settled_is_when_nothing_is_in_memory_twice() {
    let Some(home) = TestHome::new() else { return };
    let vm = launched(&home);
    let figures = vm.fork(ForkOptions::new().wait_settled(true)).unwrap().remove(0).figures;
    assert!(figures.moved_pages >= WRITTEN.end - WRITTEN.start, "{figures:?}");
    assert!(figures.copied_pages >= Some(WRITTEN.end - WRITTEN.start), "{figures:?}");
    let private = vm.stats().unwrap().private_pages;
    assert!(private < 200, "{private} private pages");
    home.check();
}

/// A second fork, and a third of the child, before the first has settled; and while its dedup is under way. All stay right.
#[test]
fn forks_before_and_during_dedup() {
    let Some(home) = TestHome::new() else { return };
    for round in 0..3 {
        let vm = launched(&home);
        let child = vm.fork(ForkOptions::new()).unwrap().remove(0).vm;
        vm.fill(10000..12000, 2);
        let second = vm.fork(ForkOptions::new()).unwrap().remove(0).vm;
        let grandchild = child.fork(ForkOptions::new()).unwrap().remove(0).vm;
        let mut forks = 0;
        let mut late = Vec::new();
        wait_until("what has settled has left the parent's window", TEN_SECONDS, || {
            vm.fill(20000..20100, 3 + forks);
            late.push((vm.fork(ForkOptions::new()).unwrap().remove(0).vm, 3 + forks));
            forks += 1;
            vm.stats().unwrap().private_pages < 3000
        });
        println!("round {round}: {forks} forks while pages settled");
        for vm in [&child, &grandchild] {
            vm.verify(WRITTEN, 1);
        }
        second.verify(10000..12000, 2);
        second.verify(12000..WRITTEN.end, 1);
        for (late, seed) in &late {
            late.verify(20000..20100, *seed);
            late.verify(10000..12000, 2);
            late.verify(20100..21000, 1);
        }
        vm.verify(WRITTEN.start..10000, 1);
        home.check();
        home.client().remove_all().unwrap();
        assert_eq!(home.processes(), [0; 0], "after rm --all");
    }
}

/// The copy of its process dies before its pages have settled: a child that needs them is stopped, and shows no wrong byte;
/// its parent, which has them all, goes on.
#[test]
fn a_copy_that_dies_takes_nothing_with_it_but_what_it_had() {
    let Some(home) = TestHome::new() else { return };
    let mut lost = 0;
    for _ in 0..20 {
        let vm = launched(&home);
        let before = home.processes().into_iter().collect();
        let (child, copies) = copies(&home, &before, || vm.fork(ForkOptions::new()).unwrap().remove(0).vm);
        copies.iter().copied().for_each(kill);
        vm.verify(WRITTEN, 1);
        match child.send(&format!("verify {} {} 1", WRITTEN.start, WRITTEN.end - WRITTEN.start), TEN_SECONDS) {
            // All had been written back before it died.
            Ok(answer) => assert_eq!(answer, format!("verified={}", WRITTEN.end - WRITTEN.start)),
            Err(error) => {
                assert!(error.to_string().contains("lost"), "{error}");
                let dead = child.wait(Some(TEN_SECONDS)).unwrap();
                assert_eq!(dead.state, VmState::Dead);
                lost += copies.len();
            }
        }
        vm.fill(2000..2100, 5);
        vm.verify(2000..2100, 5);
        home.client().remove_all().unwrap();
        assert_eq!(home.processes(), [0; 0], "after rm --all");
        if lost > 0 {
            return;
        }
    }
    panic!("no copy was killed in time");
}

/// The copy dies before its pages have settled, and the VM, which has all of them, is forked again: that child has them too.
/// Every one that such a parent ever had died at its first touch of what its first child had lost.
#[test]
fn a_parent_whose_copy_died_has_children_that_lose_nothing() {
    let Some(home) = TestHome::new() else { return };
    for _ in 0..20 {
        let vm = launched(&home);
        let before = home.processes().into_iter().collect();
        let (child, copies) = copies(&home, &before, || vm.fork(ForkOptions::new()).unwrap().remove(0).vm);
        copies.iter().copied().for_each(kill);
        let verify = format!("verify {} {} 1", WRITTEN.start, WRITTEN.end - WRITTEN.start);
        let lost = child.send(&verify, TEN_SECONDS).is_err();
        for _ in 0..3 {
            let next = vm.fork(ForkOptions::new()).unwrap().remove(0).vm;
            next.verify(WRITTEN, 1);
        }
        vm.verify(WRITTEN, 1);
        home.check();
        home.client().remove_all().unwrap();
        if lost {
            return;
        }
    }
    panic!("no copy was killed in time");
}

/// Two freezes of a VM had not settled when it was removed with all who saw them. Its window went with the first scratch
/// range that was dropped; the copy of its process, which had the other, heard of nothing, and lived on: the removal was
/// never answered.
#[test]
fn a_vm_can_go_before_its_forks_have_settled() {
    let Some(home) = TestHome::new() else { return };
    for _ in 0..5 {
        let vm = home.launch("p", ByteSize::mib(1024));
        vm.fill(1000..201_000, 1);
        vm.fork(ForkOptions::new()).unwrap();
        vm.fill(1000..21_000, 2);
        vm.fork(ForkOptions::new()).unwrap();
        let unsettled = home.totals().unsettled_pages;
        home.client().remove_all().unwrap();
        assert_eq!(home.processes().len(), 0);
        if unsettled > 21_000 {
            return;
        }
    }
    panic!("the first fork had settled each time, and this tests nothing");
}
