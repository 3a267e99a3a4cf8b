//! Processes that do not answer: who waits for one is told in time, and nobody else notices.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use offshoot_tests::hostile::{Hostile, frozen};
use offshoot_tests::process::{self, is_alive};
use offshoot_tests::{Guest, Served, TEN_SECONDS, TestHome, fork_settled, wait_until};
use std::fs;
use std::thread;
use std::time::{Duration, Instant};
use vmm::api::VmState;
use vmm::client::{Error, ForkOptions, Forked, LaunchOptions, Vm};
use vmm::machine::WINDOW_BASE;
use vmm::units::ByteSize;
use vmm::wire::FromVm;

/// How long a process may take here, and when somebody is told of it at the latest.
const WITHIN: Duration = Duration::from_secs(2);
const LATEST: Duration = Duration::from_secs(15);

fn serve(home: &TestHome) -> Served {
    Served::new(home, &["--answer-within", "2"])
}

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("send a signal");
}

/// What this comes to takes as long as a process may, and no longer than somebody who waits should.
#[track_caller]
fn in_time<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let done = act();
    let took = began.elapsed();
    assert!(took >= WITHIN / 2 && took < LATEST, "{what} took {took:?}");
    done
}

#[track_caller]
fn is_told(failed: Result<Vec<Forked>, Error>) {
    let why = failed.expect_err("nobody has answered").to_string();
    assert!(why.contains("does not answer"), "{why}");
}

#[track_caller]
fn is_dead(home: &TestHome, name: &str) {
    let all = home.client().list().expect("ls");
    let vm = all.iter().find(|vm| vm.name == name).expect("it is listed");
    assert_eq!(vm.state, VmState::Dead);
    assert!(vm.reason.as_ref().is_some_and(|why| why.starts_with("does not answer")), "{vm:?}");
}

/// The fork waited for ever. Meanwhile no family had processes prepared, no name was put down, and `check` did not come back.
#[test]
fn a_fork_of_a_stopped_process_fails_and_nobody_else_notices() {
    let Some(home) = TestHome::new() else { return };
    let _server = serve(&home);
    let (stuck, other) = (home.launch("stuck", ByteSize::mib(64)), home.launch("other", ByteSize::mib(64)));
    other.fill(1000..3000, 1);
    fork_settled(&other, 1);
    stuck.fill(1000..3000, 2);
    let pid = stuck.pid();
    signal(pid, Signal::SIGSTOP);
    thread::scope(|scope| {
        let fork = scope.spawn(|| in_time("the fork", || stuck.fork(ForkOptions::new().count(2))));
        thread::sleep(Duration::from_millis(200));
        let began = Instant::now();
        // More than are prepared.
        let children = other.fork(ForkOptions::new().count(6)).expect("fork");
        children.iter().for_each(|child| child.vm.verify(1000..3000, 1));
        wait_until("processes are prepared", WITHIN, || home.totals().pooled >= 2);
        let names = || fs::read_to_string(home.path().join("vms")).expect("the list of names");
        wait_until("names are put down", WITHIN, || names().contains("+other-7\n"));
        assert!(!fork.is_finished() || began.elapsed() >= WITHIN, "all that was while the fork waited");
        is_told(fork.join().expect("a thread"));
    });
    is_dead(&home, "stuck");
    wait_until("its process has ended", TEN_SECONDS, || !is_alive(pid));
    assert!(home.client().list().expect("ls").iter().all(|vm| !vm.name.starts_with("stuck-")));
    home.check();
}

/// Who stood between was asked no more, and who waited behind it neither.
#[test]
fn all_who_wait_for_a_stopped_process_are_told() {
    let Some(home) = TestHome::new() else { return };
    let _server = serve(&home);
    let vm = home.launch("a", ByteSize::mib(64));
    signal(vm.pid(), Signal::SIGSTOP);
    thread::scope(|scope| {
        let forks: Vec<_> = (0..3).map(|_| scope.spawn(|| vm.fork(ForkOptions::new()))).collect();
        let why = in_time("the pause", || vm.pause()).expect_err("nobody has answered").to_string();
        assert!(why.contains("does not answer"), "{why}");
        forks.into_iter().for_each(|fork| is_told(fork.join().expect("a thread")));
    });
    is_dead(&home, "a");
    let (vm, other) = (home.launch("b", ByteSize::mib(64)), home.launch("c", ByteSize::mib(64)));
    [&vm, &other].into_iter().for_each(|vm| vm.fill(1000..3000, 1));
    signal(vm.pid(), Signal::SIGSTOP);
    thread::scope(|scope| {
        let reclaim = scope.spawn(|| in_time("the one", || vm.reclaim(ByteSize::mib(16))));
        thread::sleep(Duration::from_millis(300));
        let began = Instant::now();
        let reclaimed = other.reclaim(ByteSize::mib(4)).expect("it waits for nobody");
        assert!(reclaimed.reclaimed_bytes > 0 && began.elapsed() < WITHIN / 2, "{reclaimed:?} {:?}", began.elapsed());
        reclaim.join().expect("a thread").expect("nothing is taken out");
    });
    is_dead(&home, "b");
}

#[test]
fn a_start_in_a_stopped_process_fails() {
    let Some(home) = TestHome::new() else { return };
    let _server = serve(&home);
    let first = home.launch("first", ByteSize::mib(32));
    wait_until("processes are prepared", TEN_SECONDS, || home.totals().pooled >= 2);
    let spare: Vec<i32> = home.processes().into_iter().filter(|&pid| pid != first.pid()).collect();
    spare.iter().for_each(|&pid| signal(pid, Signal::SIGSTOP));
    let launch = || home.client().launch(LaunchOptions::new().name("second").memory(ByteSize::mib(32)));
    let why = in_time("the launch", launch).expect_err("it cannot start").to_string();
    assert!(why.contains("did not start: does not answer"), "{why}");
    is_told(in_time("the fork", || first.fork(ForkOptions::new())));
    // Both of them are gone, and others take their place.
    let children = first.fork(ForkOptions::new().count(2)).expect("fork");
    children.iter().for_each(|child| child.vm.fill(100..200, 1));
    spare.iter().filter(|&&pid| is_alive(pid)).for_each(|&pid| signal(pid, Signal::SIGCONT));
    home.check();
}

/// `check` waited for ever. It looks, and ends nobody.
#[test]
fn a_check_tells_of_a_stopped_process_and_leaves_it_alone() {
    let Some(home) = TestHome::new() else { return };
    let _server = serve(&home);
    let vm = home.launch("a", ByteSize::mib(32));
    vm.fill(100..200, 1);
    let child = fork_settled(&vm, 1).remove(0);
    let pid = child.pid();
    signal(pid, Signal::SIGSTOP);
    let report = in_time("the check", || home.client().check()).expect("check");
    assert!(matches!(&report.broken[..], [one] if one.contains("\"a-1\"")), "{report:?}");
    signal(pid, Signal::SIGCONT);
    child.verify(100..200, 1);
    home.check();
}

/// A parent that ended after its children had begun, and before they knew how it stood, left the fork waiting for ever.
#[test]
fn a_process_that_falls_silent_in_the_middle_of_a_freeze_is_waited_for_no_longer() {
    let Some(home) = TestHome::new() else { return };
    let _server = serve(&home);
    let nothing = |store| vec![FromVm::Standing, frozen(store, Vec::new(), WINDOW_BASE)];
    for (name, silent) in [("standing", true), ("frozen", true), ("killed", false)] {
        let vm: Vm = home.launch(name, ByteSize::mib(32));
        let Some(mut hostile) = Hostile::take_over(&vm) else { return };
        hostile.stop();
        let fork = thread::spawn(move || vm.fork(ForkOptions::new().count(2)));
        let mut said = nothing(hostile.hear_freeze());
        if name == "standing" {
            said.truncate(1);
        }
        hostile.say(&said);
        if !silent {
            process::kill(hostile.pid);
        }
        let began = Instant::now();
        let failed = fork.join().expect("a thread").expect_err("there is no state to start from");
        assert!(began.elapsed() < LATEST, "{name}: {:?}", began.elapsed());
        if silent {
            is_told(Err(failed));
            is_dead(&home, name);
        }
    }
    home.check();
}

/// The one loop stood still for five seconds, traps too.
#[test]
fn nobody_waits_for_a_stopped_zygote() {
    let Some(home) = TestHome::new() else { return };
    let _server = serve(&home);
    let vm = home.launch("a", ByteSize::mib(32));
    vm.fill(1000..3000, 1);
    fork_settled(&vm, 1);
    let zygote = home.zygote().expect("a server with VMs has a zygote");
    signal(zygote, Signal::SIGSTOP);
    thread::scope(|scope| {
        // More than are prepared.
        let fork = scope.spawn(|| in_time("the fork", || vm.fork(ForkOptions::new().count(12))));
        let mut longest = Duration::ZERO;
        while !fork.is_finished() {
            let began = Instant::now();
            home.client().list().expect("ls");
            longest = longest.max(began.elapsed());
            thread::sleep(Duration::from_millis(20));
        }
        assert!(longest < WITHIN / 2, "`ls` took {longest:?}");
        let children = fork.join().expect("a thread").expect("another zygote takes its place");
        children.iter().for_each(|child| child.vm.verify(1000..3000, 1));
    });
    wait_until("it is ended", TEN_SECONDS, || !is_alive(zygote));
    assert_ne!(home.zygote(), Some(zygote));
    home.check();
}
