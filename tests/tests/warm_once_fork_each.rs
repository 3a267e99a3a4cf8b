//! The example of the client library's first page, as tests of a project of your own would have it: a VM is brought up
//! once, and each test gets a fork of it.

use offshoot_tests::TestHome;
use std::time::Duration;
use vmm::client::{Client, Error, ForkOptions, LaunchOptions, Scoped, Vm};
use vmm::units::ByteSize;

const PATIENCE: Duration = Duration::from_secs(30);

/// Brings the VM up that all tests start from.
fn warm_up(client: &Client) -> Result<Vm, Error> {
    let vm = client.launch(LaunchOptions::new().name("warm").memory(ByteSize::mib(96)))?;
    vm.send("fill 64 16384 1", PATIENCE)?; // 64 MiB of state that was dear to come by
    Ok(vm)
}

/// A VM in that state, for one test. It goes when the value does.
fn fresh(warm: &Vm) -> Result<Scoped, Error> {
    Ok(warm.fork(ForkOptions::new())?.remove(0).vm.scoped())
}

fn one_test(warm: &Vm) -> Result<(), Error> {
    let vm = fresh(warm)?;
    vm.send("fill 64 1 2", PATIENCE)?;
    vm.send("verify 64 1 2", PATIENCE)?;
    Ok(())
}

fn another_test(warm: &Vm) -> Result<(), Error> {
    // It never sees what the other wrote.
    fresh(warm)?.send("verify 64 16384 1", PATIENCE)?;
    Ok(())
}

/// Two tests of a project, each run five times, all at once: each has a VM of its own, and none is left.
#[test]
fn each_test_has_a_warm_vm_of_its_own() {
    let Some(home) = TestHome::new() else { return };
    let warm = warm_up(home.client()).unwrap();
    std::thread::scope(|scope| {
        for test in [one_test, another_test].repeat(5) {
            let warm = &warm;
            scope.spawn(move || test(warm).expect("a test of a project of your own"));
        }
    });
    warm.send("verify 64 16384 1", PATIENCE).unwrap();
    let left = home.client().list().unwrap();
    assert_eq!(left.len(), 1, "{left:?}");
}
