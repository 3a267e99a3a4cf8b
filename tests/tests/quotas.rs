//! Quotas: how many VMs a server has, how many descend from one, how fast guests fork, and how long a VM lives. What is
//! refused is refused whole, in a line that says whose limit it is.

use nix::sys::signal::{Signal, kill as send_signal};
use nix::unistd::Pid;
use offshoot_tests::{Guest, Served, TEN_SECONDS, TestHome, wait_until};
use std::thread;
use std::time::{Duration, Instant};
use vmm::api::{ErrorKind, VmState};
use vmm::client::{Error, ForkOptions, LaunchOptions, Vm};
use vmm::units::ByteSize;

fn names(home: &TestHome) -> Vec<String> {
    home.client().list().expect("ls").into_iter().map(|vm| vm.name).collect()
}

fn options(name: &str) -> LaunchOptions {
    LaunchOptions::new().name(name).memory(ByteSize::mib(16))
}

fn fork(vm: &Vm, name: &str) -> Vm {
    vm.fork(ForkOptions::new().children([name])).expect("fork").remove(0).vm
}

#[track_caller]
fn refused<T: std::fmt::Debug>(done: Result<T, Error>, subject: &str) -> String {
    let error = done.expect_err("it is more than there may be");
    assert_eq!((error.kind(), error.subject().as_deref()), (ErrorKind::Limit, Some(subject)), "{error}");
    error.to_string()
}

/// A guest's request that is refused.
#[track_caller]
fn guest_refused(vm: &Vm, line: &str) -> String {
    let error = vm.send(line, TEN_SECONDS).expect_err("it is more than there may be");
    assert_eq!(error.kind(), ErrorKind::Guest, "{error}");
    error.to_string()
}

#[test]
fn a_server_has_as_many_vms_as_it_may() {
    let Some(home) = TestHome::new() else { return };
    let _served = Served::new(&home, &["--max-vms", "4"]);
    let a = home.launch("a", ByteSize::mib(16));
    // Of more than there may be, none is made, whoever asks.
    let why = home.cli(&["fork", "a", "--count", "4"]).failure(2);
    assert!(why.contains("1 VM (0 of them ended) and 4 more: this server may list 4 (serve --max-vms)"), "{why}");
    let why = guest_refused(&a, "fork 4");
    assert!(why.contains("--max-vms"), "{why}");
    assert_eq!(names(&home), ["a"]);
    a.fork(ForkOptions::new().count(3)).expect("as many as there may be");
    let why = home.cli(&["launch", "b", "--json"]);
    assert!(
        why.code == 2 && why.err.contains("\"kind\":\"limit\"") && why.err.contains("\"subject\":\"b\""),
        "{why:?}"
    );
    // One that has ended is listed, and makes room when it is removed.
    home.client().vm("a-2").kill().expect("kill");
    let why = refused(a.fork(ForkOptions::new()), "a");
    assert!(why.contains("4 VMs (1 of them ended)"), "{why}");
    home.client().vm("a-2").remove().expect("rm");
    home.launch("b", ByteSize::mib(16));
    assert_eq!(names(&home).len(), 4);
    home.check();
}

/// The limit is one of all that descend from the launched VM, and stays when it goes: who is left does not count anew.
#[test]
fn as_many_descend_from_a_vm_as_may() {
    let Some(home) = TestHome::new() else { return };
    let base = home.client().launch(options("base").max_children(3)).expect("launch");
    let other = home.launch("other", ByteSize::mib(16));
    let child = fork(&base, "child");
    let grandchild = fork(&child, "grandchild");
    for vm in [&base, &child, &grandchild] {
        assert_eq!(vm.inspect().expect("inspect").stats.vm.max_children, Some(3));
        let why = refused(vm.fork(ForkOptions::new().count(2)), vm.name());
        let begins = format!("VM {:?}: 2 descend from \"base\", and 2 more", vm.name());
        assert!(why.contains(&begins) && why.ends_with("it may have 3 (launch --max-children)"), "{why}");
        let why = guest_refused(vm, "fork 2");
        assert!(why.contains("--max-children"), "{why}");
    }
    assert_eq!(names(&home), ["base", "other", "child", "grandchild"]);
    // Others have nothing to do with it.
    other.fork(ForkOptions::new().count(4)).expect("fork");
    grandchild.say("fork 1");
    refused(child.fork(ForkOptions::new()), "child");
    base.remove().expect("rm");
    refused(grandchild.fork(ForkOptions::new()), "grandchild");
    child.remove().expect("rm");
    fork(&grandchild, "late");
    refused(grandchild.fork(ForkOptions::new()), "grandchild");
    home.cli(&["launch", "leaf", "--max-children", "0"]).good();
    home.cli(&["fork", "leaf"]).failure(2);
    home.check();
}

/// A guest that asks for children in a loop. The names would be too long, so that none is made.
#[test]
fn guests_fork_only_so_often() {
    let Some(home) = TestHome::new() else { return };
    let name = "n".repeat(63);
    let vm = home.launch(&name, ByteSize::mib(16));
    let begun = Instant::now();
    let mut asked = 0;
    let why = loop {
        let why = guest_refused(&vm, "fork 64");
        match why.contains("longer than") {
            true => asked += 64,
            false => break why,
        }
    };
    assert!(why.contains("256") && why.contains("64 children a second"), "{why}");
    let most = 256 + 64 * (begun.elapsed().as_secs() + 1);
    assert!((256..=most).contains(&asked), "{asked} children in {:?}", begun.elapsed());
    // Its user is not held up by that, and it may ask again after a while.
    fork(&vm, "of-its-user");
    wait_until("the guest may fork again", TEN_SECONDS, || guest_refused(&vm, "fork 1").contains("longer than"));
}

#[test]
fn a_vm_ends_when_its_time_is_over() {
    let Some(home) = TestHome::new() else { return };
    let base = home.launch("base", ByteSize::mib(16));
    let begun = Instant::now();
    home.cli(&["fork", "base", "short", "--ttl", "700ms"]).good();
    let short = home.client().vm("short");
    let long = base.fork(ForkOptions::new().children(["long"]).ttl(Duration::from_secs(3600))).expect("fork");
    let ttl = |name: &str| home.client().vm(name).summary().expect("ls").ttl_ms;
    assert!(ttl("short").is_some_and(|ms| ms <= 700) && ttl("base").is_none());
    assert!(ttl("long").is_some_and(|ms| (3_500_000..=3_600_000).contains(&ms)));
    let inspected = home.cli(&["inspect", "long"]).good();
    assert!(inspected.lines().any(|line| line.starts_with("ends            in 35")), "{inspected}");
    // It ends with its parent, whoever asks for it, paused or not, unless its user says otherwise.
    short.say("fork 1");
    fork(&short, "heir").pause().expect("pause");
    let later = short.fork(ForkOptions::new().children(["later"]).ttl(Duration::from_secs(60))).expect("fork");
    for name in ["short", "base-1", "heir"] {
        let ended = home.client().vm(name).wait(Some(TEN_SECONDS)).expect("it ends");
        assert_eq!((ended.state, ended.reason.as_deref()), (VmState::Dead, Some("its time to live is over")), "{name}");
        assert_eq!(ended.ttl_ms, None);
    }
    assert!(begun.elapsed() >= Duration::from_millis(700), "{:?}", begun.elapsed());
    for vm in [&base, &long[0].vm, &later[0].vm] {
        vm.say("id");
    }
    let refused = home.cli(&["fork", "short"]).failure(2);
    assert!(refused.contains("dead: its time to live is over"), "{refused}");
    // What is removed at its end is gone.
    home.cli(&["launch", "brief", "--rm", "--ttl", "0.3"]).good();
    wait_until("it is removed", TEN_SECONDS, || !names(&home).contains(&"brief".to_owned()));
    home.check();
}

/// A VM whose process does nothing any more ends all the same, and one that has not begun leaves nothing.
#[test]
fn time_is_over_for_those_that_hang() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.client().launch(options("hung").ttl(Duration::from_secs(1))).expect("launch");
    send_signal(Pid::from_raw(vm.pid()), Signal::SIGSTOP).expect("stop a process");
    let ended = vm.wait(Some(TEN_SECONDS)).expect("it ends");
    assert_eq!(ended.reason.as_deref(), Some("its time to live is over"));
    let zygote = Pid::from_raw(home.zygote().expect("a zygote"));
    // Another size, of which no process is prepared.
    send_signal(zygote, Signal::SIGSTOP).expect("stop a process");
    let launched = home.client().launch(options("unborn").memory(ByteSize::mib(17)).ttl(Duration::from_millis(200)));
    send_signal(zygote, Signal::SIGCONT).expect("let it go on");
    let error = launched.map(|vm| vm.name().to_owned()).expect_err("its time was over before it began");
    assert_eq!(error.kind(), ErrorKind::VmEnded, "{error}");
    assert!(error.to_string().contains("did not start: its time to live is over"), "{error}");
    assert_eq!(names(&home), ["hung"]);
    thread::sleep(Duration::from_millis(100));
    home.check();
}
