//! Many VMs, and what is left when they are gone.

use offshoot_tests::process::kill;
use offshoot_tests::{Guest, TestHome};
use std::thread;
use std::time::Instant;
use vmm::api::VmState;
use vmm::client::ForkOptions;
use vmm::units::ByteSize;

/// Two hundred VMs of one family at once: each writes pages of its own, and has them when all have.
#[test]
fn two_hundred_at_once() {
    let Some(home) = TestHome::alone() else { return };
    let base = home.launch("c", ByteSize::mib(16));
    base.fill(1000..2000, 1);
    let start = Instant::now();
    let children = base.fork(ForkOptions::new().count(199)).unwrap();
    println!("199 children in {:?}", start.elapsed());
    let halves = children.split_at(100);
    let in_two_threads = |act: &(dyn Fn(usize, &vmm::client::Vm) + Sync)| {
        thread::scope(|scope| {
            for (half, offset) in [(halves.0, 0), (halves.1, 100)] {
                scope.spawn(move || half.iter().enumerate().for_each(|(index, child)| act(offset + index, &child.vm)));
            }
        });
    };
    in_two_threads(&|index, vm| vm.fill(1100 + index as u64..1110 + index as u64, 1000 + index as u64));
    in_two_threads(&|index, vm| {
        let own = 1100 + index as u64..1110 + index as u64;
        vm.verify(own.clone(), 1000 + index as u64);
        vm.verify(1000..own.start, 1);
        vm.verify(own.end..2000, 1);
    });
    println!("written and verified after {:?}", start.elapsed());
    base.verify(1000..2000, 1);
    let tree = home.client().tree().unwrap();
    assert_eq!(tree.len(), 200);
    assert!(tree.iter().all(|row| row.vm.state == VmState::Running), "{tree:?}");
    let report = home.client().check().unwrap();
    assert!(report.broken.is_empty() && report.vms == 200, "{report:?}");
    let total = home.client().stats().unwrap().total;
    println!(
        "{} MiB for 200 VMs; {} tables, unshared {}",
        total.host_bytes >> 20,
        total.stage2_tables,
        total.stage2_tables_unshared_equivalent
    );
    let removing = Instant::now();
    home.client().remove_all().unwrap();
    println!("removed in {:?}; all in {:?}", removing.elapsed(), start.elapsed());
    assert_eq!(home.processes(), [0; 0]);
}

/// Launches, forks, kills and writes, as a user may; then everything is removed.
fn round(home: &TestHome) {
    for name in ["a", "b"] {
        let vm = home.launch(name, ByteSize::mib(64));
        vm.fill(1000..5000, 1);
        let children = vm.fork(ForkOptions::new().count(3)).unwrap();
        vm.fill(2000..2500, 2);
        children[0].vm.fill(3000..3500, 3);
        children[0].vm.fork(ForkOptions::new().count(2)).unwrap();
        kill(children[1].vm.pid());
        children[2].vm.stop().unwrap();
    }
    home.client().remove_all().unwrap();
}

/// After `rm --all` there is no store, no process, no file of a VM, and no memory used that was not used before.
#[test]
fn nothing_is_left_after_rm_all() {
    let Some(home) = TestHome::alone() else { return };
    round(&home);
    let total = || home.client().stats().unwrap().total;
    let (start, files, descriptors) = (total().host_bytes, home.files(), open_descriptors(&home));
    for _ in 0..4 {
        round(&home);
        let total = total();
        assert_eq!((total.vms, total.objects, total.stores, total.pooled), (0, 0, 0, 0), "{total:?}");
        assert_eq!((total.resident_pages, total.unsettled_pages, total.stage2_tables), (0, 0, 0), "{total:?}");
        assert_eq!(home.processes(), [0; 0]);
        assert_eq!(home.files(), files);
    }
    let end = total().host_bytes;
    println!("host_bytes: {start} before, {end} after");
    assert!(end.abs_diff(start) <= 1 << 20, "{start} bytes before, {end} after");
    assert_eq!(open_descriptors(&home), descriptors, "descriptors of the server");
}

/// What the server has open, apart from its clients' connections.
fn open_descriptors(home: &TestHome) -> Vec<String> {
    let all = offshoot_tests::process::descriptors(home.server().expect("a server"));
    let mut names: Vec<String> =
        all.into_iter().map(|(_, name)| name).filter(|name| !name.starts_with("socket:")).collect();
    names.sort();
    names
}
