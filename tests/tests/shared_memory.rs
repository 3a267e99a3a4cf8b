//! Memory that a family shares: who has it, who sees what is written there, and who does not.

use offshoot_tests::process::{descriptors, maps};
use offshoot_tests::{Guest, TEN_SECONDS, TestHome, wait_until};
use std::ops::Range;
use vmm::client::{ForkOptions, LaunchOptions, Vm};
use vmm::units::ByteSize;

/// Pages, and the same in bytes.
const SHARED: Range<u64> = 2000..2100;

fn launch(home: &TestHome, name: &str) -> Vm {
    let options = LaunchOptions::new().name(name).memory(ByteSize::mib(32)).share(SHARED.start << 12..SHARED.end << 12);
    home.client().launch(options).unwrap()
}

/// The mappings of a VM process that it shares with others.
fn shared_mappings(vm: &Vm) -> Vec<String> {
    let is_shared = |line: &String| line.split_whitespace().nth(1).is_some_and(|flags| flags.ends_with('s'));
    maps(vm.pid()).into_iter().filter(|line| line.contains("/memfd:") && is_shared(line)).collect()
}

fn inodes(vm: &Vm) -> Vec<String> {
    let inode = |line: String| line.split_whitespace().nth(4).expect("a line of maps").to_owned();
    shared_mappings(vm).into_iter().map(inode).collect()
}

/// A parent, its children and theirs, forked again and again so that prepared processes expect it: what one writes all
/// others see. Another launch has memory of its own at the same place, and who has launched without has none. Each page
/// counts once.
#[test]
fn a_family_shares_memory_and_nobody_else_has_it() {
    let Some(home) = TestHome::new() else { return };
    let parent = launch(&home, "p");
    let (other, plain) = (launch(&home, "o"), home.launch("n", ByteSize::mib(32)));
    parent.fill(1900..2200, 1);
    let mut relatives = Vec::new();
    for round in 0..4 {
        parent.fill(1950..1990, 10 + round);
        let forked = parent.fork(ForkOptions::new().count(2).wait_settled(true)).unwrap();
        relatives.extend(forked.into_iter().map(|child| child.vm));
        home.check();
    }
    let grandchild = relatives[3].fork(ForkOptions::new().wait_settled(true)).unwrap().pop().expect("one").vm;
    relatives.push(grandchild);
    for (writer, at) in (0..).zip([0, 3, 8]) {
        let vm = &relatives[at];
        vm.fill(SHARED, 100 + writer);
        vm.fill(2150..2160, 100 + writer);
        relatives.iter().chain([&parent]).for_each(|vm| vm.verify(SHARED, 100 + writer));
        parent.verify(2150..2160, 1);
    }
    parent.fill(SHARED.start..SHARED.start + 1, 7);
    relatives.iter().for_each(|vm| vm.verify(SHARED.start..SHARED.start + 1, 7));
    other.fill(SHARED, 8);
    parent.verify(SHARED.start + 1..SHARED.end, 102);

    let ours = inodes(&parent);
    assert_eq!(ours.len(), 1);
    assert!(relatives.iter().all(|vm| inodes(vm) == ours));
    assert!(inodes(&other).len() == 1 && inodes(&other) != ours);
    assert_eq!(shared_mappings(&plain), Vec::<String>::new());
    // Nor has anybody a descriptor that is left over, nor a process that is no VM's yet anything of it.
    let mut theirs: Vec<i32> = Vec::new();
    for vm in relatives.iter().chain([&parent, &other]) {
        theirs.push(vm.pid());
        theirs.extend(vm.inspect().unwrap().keeper_pid);
    }
    for pid in home.processes() {
        let open = descriptors(pid);
        assert!(!open.iter().any(|(_, name)| name.contains("memfd:")), "{pid}: {open:?}");
    }
    let has = |pid: &i32| maps(*pid).iter().any(|line| line.contains("offshoot-shared"));
    // A copy that a first freeze made of its process has it, too, until it is reaped.
    wait_until("only VMs have shared memory", TEN_SECONDS, || {
        !home.processes().iter().any(|pid| !theirs.contains(pid) && has(pid))
    });
    home.check();
    relatives.into_iter().chain([parent]).for_each(|vm| vm.remove().unwrap());
    other.verify(SHARED, 8);
    home.check();
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let Some(home) = TestHome::new() else { return };
    let bytes = |pages: Range<u64>| pages.start << 12..pages.end << 12;
    let all = [
        vec![bytes(10..20)],
        vec![bytes(8000..9000)],
        vec![bytes(2000..2000)],
        vec![bytes(3000..3001), bytes(2000..2001)],
        std::iter::once((2000 << 12) + 1..2100 << 12).collect(),
    ];
    for shared in all {
        let options = LaunchOptions::new().memory(ByteSize::mib(32));
        let options = shared.iter().cloned().fold(options, LaunchOptions::share);
        let error = home.client().launch(options).unwrap_err();
        assert!(error.to_string().contains("shared"), "{shared:x?}: {error}");
    }
}
