//! A parent that does nothing is left alone by its forks: what they would find is known.

use offshoot_tests::{Guest, TestHome, fork_settled};
use std::thread;
use vmm::client::{ForkOptions, Vm};
use vmm::units::ByteSize;

fn messages(vm: &Vm) -> u64 {
    vm.stats().expect("stats").messages
}

/// Two forks find out, and tell: afterwards the parent hears of none.
fn settle_down(parent: &Vm) {
    for _ in 0..2 {
        fork_settled(parent, 1).remove(0).remove().expect("remove");
    }
}

#[test]
fn forks_of_a_parent_that_waits_or_is_paused_do_not_ask_it() {
    let Some(home) = TestHome::new() else { return };
    let parent = home.launch("p", ByteSize::mib(64));
    parent.fill(1000..2000, 1);
    settle_down(&parent);
    let before = messages(&parent);
    let children = parent.fork(ForkOptions::new().count(3).wait_settled(true)).expect("fork");
    for child in &children {
        assert_eq!((child.figures.pause_us, child.figures.moved_pages), (Some(0), 0));
        assert_eq!((child.figures.copied_pages, child.figures.gap_pages), (Some(0), Some(0)));
        child.vm.verify(1000..2000, 1);
    }
    assert_eq!(messages(&parent), before);

    // Clones of what has run since have that.
    parent.fill(1500..2500, 2);
    let child = parent.fork(ForkOptions::new()).expect("fork").remove(0);
    assert!(child.figures.moved_pages >= 1000, "{:?}", child.figures);
    child.vm.verify(1500..2500, 2);

    parent.pause().expect("pause");
    settle_down(&parent);
    let before = messages(&parent);
    let paused = parent.fork(ForkOptions::new()).expect("fork").remove(0);
    assert_eq!(messages(&parent), before);
    assert_eq!(paused.figures.pause_us, None, "it stood already");
    paused.vm.verify(1000..1500, 1);
    parent.resume().expect("resume");
    parent.fill(1000..1100, 3);
    parent.fork(ForkOptions::new()).expect("fork").remove(0).vm.verify(1000..1100, 3);
    home.check();
}

/// Lines and forks at the same time: what a fork takes for still may just have been told to run, and of two forks one after
/// the other the second is under way when the first has its state.
#[test]
fn forks_beside_lines_have_all_of_what_was_answered_before() {
    let Some(home) = TestHome::new() else { return };
    let parent = home.launch("p", ByteSize::mib(32));
    settle_down(&parent);
    for round in 1..=40 {
        parent.fill(1000..1016, round);
        let fork = |prefix: &str| parent.fork(ForkOptions::new().prefix(prefix)).expect("fork").remove(0).vm;
        let during = thread::scope(|scope| {
            let forks = ["one", "two", "three"].map(|prefix| scope.spawn(move || fork(prefix)));
            parent.fill(2000..if round % 2 == 0 { 2004 } else { 4000 }, round);
            forks.map(|fork| fork.join().expect("a fork"))
        });
        let after = [fork("four"), fork("five")];
        for vm in during.iter().chain(&after) {
            vm.verify(1000..1016, round);
        }
        for vm in &after {
            vm.verify(2000..2004, round);
        }
        for vm in during.into_iter().chain(after) {
            vm.remove().expect("remove");
        }
    }
    home.check();
}
