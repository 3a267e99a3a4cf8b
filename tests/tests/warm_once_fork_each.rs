//! Tests as a project of your own would have them: a VM is brought up once, and each test gets a fork of it.

use offshoot_tests::TestHome;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;
use vmm::client::{Client, Error, LaunchOptions, Vm, Warm, warm};
use vmm::units::ByteSize;

const PATIENCE: Duration = Duration::from_secs(30);

/// Brings up what all tests start from.
fn warm_up(client: &Client) -> Result<Warm, Error> {
    warm(client, LaunchOptions::new().name("warm").memory(ByteSize::mib(96)), |vm| {
        vm.send("fill 64 16384 1", PATIENCE).map(drop) // 64 MiB of state that was dear to come by
    })
}

fn one_test(warm: &Warm) -> Result<(), Error> {
    let vm = warm.fork()?;
    vm.send("fill 64 1 2", PATIENCE)?;
    vm.send("verify 64 1 2", PATIENCE)?;
    Ok(()) // the fork is removed
}

fn another_test(warm: &Warm) -> Result<(), Error> {
    // It never sees what the other wrote.
    warm.fork()?.send("verify 64 16384 1", PATIENCE)?;
    Ok(())
}

fn left(home: &TestHome) -> Vec<String> {
    home.client().list().unwrap().into_iter().map(|vm| vm.name).collect()
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
    warm.vm().send("verify 64 16384 1", PATIENCE).unwrap();
    assert_eq!(left(&home), ["warm"]);
    drop(warm);
    assert!(left(&home).is_empty());
}

#[test]
fn each_case_has_a_fork_and_its_result_is_where_it_belongs() {
    let Some(home) = TestHome::new() else { return };
    let warm = warm_up(home.client()).unwrap();
    let write_own = |vm: &Vm, seed: u64| {
        vm.send("verify 64 16384 1", PATIENCE)?;
        vm.send(&format!("fill 64 1 {seed}"), PATIENCE)?;
        vm.send(&format!("verify 64 1 {seed}"), PATIENCE)?;
        Ok::<_, Error>(seed)
    };
    assert_eq!(warm.fork_each(2..32, write_own).unwrap(), (2..32).collect::<Vec<_>>());
    // A test that fails, or panics, leaves no more than one that does not.
    let failed = warm.fork_each(0..6, |vm, case| match case {
        3 => vm.send("no such command", PATIENCE),
        _ => vm.send("verify 64 16384 1", PATIENCE),
    });
    assert!(matches!(failed, Err(Error::Guest(_))), "{failed:?}");
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        warm.fork_each(0..6, |_, case| if case == 2 { panic!("as a test may") } else { Ok::<_, Error>(()) })
    }));
    assert!(panicked.is_err());
    assert_eq!(left(&home), ["warm"]);
}

#[test]
fn what_cannot_be_brought_up_goes() {
    let Some(home) = TestHome::new() else { return };
    let failed = warm(home.client(), LaunchOptions::new(), |vm| vm.send("no such command", PATIENCE).map(drop));
    assert!(matches!(failed, Err(Error::Guest(_))), "{failed:?}");
    assert!(left(&home).is_empty());
}
