//! A VM process that has been taken over hurts its own VM, and nobody else.

use offshoot_tests::hostile::that_have_seen_memory;
use offshoot_tests::{Guest, TEN_SECONDS, TestHome, wait_until};
use vmm::client::{ForkOptions, Vm};
use vmm::units::ByteSize;

fn spare(home: &TestHome, vms: &[&Vm]) -> Vec<i32> {
    let mut pids = home.processes();
    pids.retain(|pid| vms.iter().all(|vm| vm.pid() != *pid));
    pids
}

/// A VM that is forked again and again has prepared processes expect its children: they have its memory mapped and its
/// registers set. A launch of another family got such a process, and with it what a hostile VM had put there.
#[test]
fn what_has_seen_one_family_never_becomes_anothers() {
    let Some(home) = TestHome::new() else { return };
    let parent = home.launch("a", ByteSize::mib(32));
    for _ in 0..3 {
        parent.fork(ForkOptions::new().wait_settled(true)).expect("fork").remove(0).vm.remove().expect("remove");
    }
    // As many as may: nobody is left who expects nothing.
    let mut expectant = Vec::new();
    wait_until("prepared processes expect children of one VM", TEN_SECONDS, || {
        expectant = that_have_seen_memory(&spare(&home, &[&parent]));
        expectant.len() >= 2
    });
    // More than the pool has.
    let others: Vec<Vm> = (0..6).map(|n| home.launch(&format!("b{n}"), ByteSize::mib(32))).collect();
    for other in &others {
        assert!(!expectant.contains(&other.pid()), "{} runs in a process that has seen \"a\"", other.pid());
        other.fill(100..200, 3);
        other.verify(100..200, 3);
    }
    // Forks of other families are no exception.
    let child = others[0].fork(ForkOptions::new()).expect("fork").remove(0).vm;
    assert!(!expectant.contains(&child.pid()));
    child.verify(100..200, 3);
    parent.remove().expect("remove");
    wait_until("they end with the family", TEN_SECONDS, || {
        expectant.iter().all(|&pid| !offshoot_tests::process::is_alive(pid))
    });
}
