//! What siblings wrote in their first moments, the next one has copies of.

use offshoot_tests::{Guest, TEN_SECONDS, TestHome, wait_until};
use std::thread;
use std::time::{Duration, Instant};
use vmm::client::{ForkOptions, Vm};
use vmm::units::ByteSize;

/// A VM that has written, and been forked once.
fn settled(home: &TestHome) -> Vm {
    let parent = home.launch("p", ByteSize::mib(64));
    parent.fill(1000..5000, 1);
    parent.fork(ForkOptions::new().wait_settled(true)).expect("fork").remove(0).vm.remove().expect("remove");
    parent
}

/// A clone that has not run yet, and how many pages it has to itself.
fn unborn(parent: &Vm) -> (Vm, u64) {
    let child = parent.fork(ForkOptions::new().paused(true)).expect("fork").remove(0).vm;
    let pages = child.stats().expect("stats").private_pages;
    (child, pages)
}

#[test]
fn a_clone_starts_with_copies_of_what_its_siblings_wrote_until_they_write_it_no_more() {
    let Some(home) = TestHome::new() else { return };
    let parent = settled(&home);
    assert!(unborn(&parent).1 <= 64, "nothing is known");

    // On a busy host, an order may come when the first moments of a clone are over.
    wait_until("copies are made", TEN_SECONDS, || {
        let child = parent.fork(ForkOptions::new()).expect("fork").remove(0).vm;
        child.fill(2000..2500, 9);
        child.remove().expect("remove");
        unborn(&parent).1 >= 500
    });

    // A copy is what the parent has, and is nobody else's.
    let (child, _) = unborn(&parent);
    child.resume().expect("resume");
    child.verify(1000..5000, 1);
    child.fill(2000..2100, 5);
    let grandchild = child.fork(ForkOptions::new()).expect("fork").remove(0).vm;
    for vm in [&child, &grandchild] {
        vm.verify(2000..2100, 5);
        vm.verify(2100..5000, 1);
    }
    parent.verify(1000..5000, 1);

    // Clones that do not write it cost their siblings the habit.
    wait_until("none are made any more", TEN_SECONDS, || {
        let child = parent.fork(ForkOptions::new()).expect("fork").remove(0).vm;
        thread::sleep(Duration::from_millis(150));
        child.remove().expect("remove");
        unborn(&parent).1 <= 64
    });
}

/// Prepared processes have copies of what the next child will write. A page may leave its store while one copies it: the
/// process waited for ever, or showed its guest zeros.
#[test]
fn pages_leave_while_prepared_processes_copy_them() {
    let Some(home) = TestHome::new() else { return };
    let parent = settled(&home);
    let end = Instant::now() + Duration::from_secs(4);
    thread::scope(|scope| {
        scope.spawn(|| {
            while Instant::now() < end {
                home.client().reclaim_all(ByteSize::mib(64)).expect("reclaim");
            }
        });
        let mut rounds = 0;
        while Instant::now() < end || rounds < 5 {
            let child = parent.fork(ForkOptions::new()).expect("fork").remove(0).vm;
            child.fill(2000..2500, 9);
            child.verify(1900..2000, 1);
            child.verify(2000..2500, 9);
            child.remove().expect("remove");
            let (child, _) = unborn(&parent);
            child.resume().expect("resume");
            child.verify(1900..2600, 1);
            child.remove().expect("remove");
            rounds += 1;
        }
        println!("{rounds} rounds");
    });
    parent.verify(1000..5000, 1);
    home.check();
}
