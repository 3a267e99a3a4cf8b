//! Parents that wrote short stretches all over their memory: children begin while those are still being copied.

use offshoot_tests::process::kill;
use offshoot_tests::{Guest, TestHome};
use std::ops::Range;
use std::thread;
use std::time::Duration;
use vmm::client::{ForkOptions, Vm};
use vmm::units::ByteSize;

/// Stretches as long as they may be without being moved.
const STRETCH: u64 = 16;
const STEP: usize = 24;
const COUNT: usize = 250;
const PAGES: u64 = COUNT as u64 * STRETCH;

fn stretches() -> impl Iterator<Item = Range<u64>> {
    (1000..).step_by(STEP).take(COUNT).map(|first| first..first + STRETCH)
}

/// Writes a word of each page.
fn scatter(vm: &Vm, seed: u64) {
    stretches().for_each(|pages| vm.touch(pages, seed));
}

fn verify(vm: &Vm, seed: u64) {
    stretches().for_each(|pages| vm.verify_touch(pages, seed));
}

/// Children that go over all pages at once, while their parent writes them anew: each sees what was there at its fork.
#[test]
fn children_see_what_was_there_at_the_fork() {
    let Some(home) = TestHome::new() else { return };
    let parent = home.launch("p", ByteSize::mib(128));
    // From its second freeze on short stretches stay.
    parent.fork(ForkOptions::new().wait_settled(true)).unwrap();
    for seed in 1..4 {
        scatter(&parent, seed);
        let children = parent.fork(ForkOptions::new().count(2)).unwrap();
        assert!(children[0].figures.moved_pages >= PAGES, "{:?}", children[0].figures);
        thread::scope(|scope| {
            scope.spawn(|| scatter(&parent, 100 + seed));
            children.iter().for_each(|child| drop(scope.spawn(|| verify(&child.vm, seed))));
        });
        home.check();
    }
    home.client().remove_all().unwrap();
}

/// A parent that is killed at some moment of its fork: either the fork fails, or its children have every page, those too
/// that it had not copied yet.
#[test]
fn a_parent_killed_while_it_is_forked_leaves_no_wrong_page() {
    const ROUNDS: u64 = 16;
    let Some(home) = TestHome::new() else { return };
    let (mut failed, mut midway, mut late) = (0, 0, 0);
    for round in 0..ROUNDS {
        let parent = home.launch("p", ByteSize::mib(128));
        // The first fork has a way of its own, and the second gets memory for copies, which the third uses again.
        for seed in [100, 101] {
            parent.fork(ForkOptions::new().wait_settled(true)).unwrap().remove(0).vm.remove().unwrap();
            scatter(&parent, seed + round);
        }
        let pid = parent.pid();
        let forked = thread::scope(|scope| {
            let fork = scope.spawn(|| parent.fork(ForkOptions::new().count(2)));
            // A fork takes some 3 ms here. The last one is over.
            thread::sleep(Duration::from_micros(400 * round));
            if round < ROUNDS - 1 {
                kill(pid);
            }
            let forked = fork.join().expect("a fork that fails says so");
            kill(pid);
            forked
        });
        match forked {
            Err(_) => failed += 1,
            Ok(children) => {
                *(if children[0].figures.pause_us.is_none() { &mut midway } else { &mut late }) += 1;
                children.iter().for_each(|child| verify(&child.vm, 101 + round));
            }
        }
        home.check();
        home.client().remove_all().unwrap();
    }
    println!("killed before {failed} forks, in {midway}, after {late}");
    assert!(midway + late > 0, "the last round kills a parent that has been forked");
    assert_eq!(home.processes(), [0; 0]);
}
