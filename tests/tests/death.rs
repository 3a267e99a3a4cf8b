//! Processes that are killed, and what becomes of their relatives.

use offshoot_tests::process::{children_of, descriptors, is_alive, kill, orphans};
use offshoot_tests::{Guest, TEN_SECONDS, TestHome, Traced, wait_until};
use std::thread;
use std::time::{Duration, Instant};
use vmm::api::{ErrorKind, VmState};
use vmm::client::ForkOptions;
use vmm::units::ByteSize;

/// A parent is killed at some moment after a fork of 64 MiB, from at once to when all has settled: its children have
/// every page. It is listed as dead, and why.
#[test]
fn a_parent_is_killed_right_after_a_fork() {
    let Some(home) = TestHome::new() else { return };
    let pages = 1000..1000 + 16384;
    let mut unsettled = Vec::new();
    for (seed, delay) in [0, 0, 1, 3, 8, 20, 50].into_iter().enumerate() {
        let vm = home.launch("p", ByteSize::mib(80));
        vm.fill(pages.clone(), seed as u64);
        let pid = vm.pid();
        let children = vm.fork(ForkOptions::new().count(2)).unwrap();
        thread::sleep(Duration::from_millis(delay));
        kill(pid);
        unsettled.push(home.client().stats().unwrap().total.unsettled_pages);
        for child in &children {
            child.vm.verify(pages.clone(), seed as u64);
        }
        let dead = vm.wait(Some(TEN_SECONDS)).unwrap();
        assert_eq!((dead.state, dead.pid), (VmState::Dead, None));
        assert!(dead.reason.as_ref().is_some_and(|why| why.contains("SIGKILL")), "{dead:?}");
        let listed = home.client().list().unwrap();
        assert_eq!(listed[0].reason, dead.reason);
        assert!(home.client().check().unwrap().broken.is_empty());
        home.client().remove_all().unwrap();
        assert_eq!(home.processes(), [0; 0], "after rm --all");
        assert_eq!(home.client().stats().unwrap().total.stores, 0);
    }
    println!("unsettled pages right after the kills: {unsettled:?}");
    assert!(unsettled.iter().any(|&pages| pages > 1000), "no parent was killed in time: {unsettled:?}");
}

/// A VM in the middle of a family is killed: only it is dead, its relatives go on and can be forked, it cannot.
#[test]
fn a_vm_is_killed_and_its_relatives_go_on() {
    let Some(home) = TestHome::new() else { return };
    let mut first = Traced::new(home.launch("k", ByteSize::mib(32)), 1000..3000);
    first.write(1000..2000);
    let mut middle = first.fork(ForkOptions::new()).remove(0);
    middle.write(1500..2500);
    let last = middle.fork(ForkOptions::new().count(2));
    middle.write(1000..1100);
    kill(middle.vm.pid());
    let dead = middle.vm.wait(Some(TEN_SECONDS)).unwrap();
    assert_eq!(dead.state, VmState::Dead);
    let refusal = middle.vm.fork(ForkOptions::new()).unwrap_err();
    assert!(refusal.kind() == ErrorKind::NotRunning && refusal.to_string().contains("dead"), "{refusal}");
    assert_eq!(middle.vm.send("id", TEN_SECONDS).unwrap_err().kind(), ErrorKind::NotRunning);
    first.write(1200..1300);
    let more = last[0].fork(ForkOptions::new()).remove(0);
    [&first, &last[0], &last[1], &more].into_iter().for_each(Traced::verify);
    assert!(home.client().check().unwrap().broken.is_empty());
    middle.vm.remove().unwrap();
    assert_eq!(home.client().list().unwrap().len(), 4);
}

/// Somebody waits for an answer of a VM that is killed: that ends at once, with the reason.
#[test]
fn who_waits_for_a_killed_vm_is_told() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("w", ByteSize::mib(16));
    let pid = vm.pid();
    let start = Instant::now();
    thread::scope(|scope| {
        let asking = scope.spawn(|| vm.send("gap 20000", Duration::from_secs(30)));
        let waiting = scope.spawn(|| vm.wait(None));
        thread::sleep(Duration::from_millis(50));
        kill(pid);
        let told = asking.join().unwrap().unwrap_err();
        assert!(told.kind() == ErrorKind::VmEnded && told.to_string().contains("SIGKILL"), "{told}");
        assert_eq!(waiting.join().unwrap().unwrap().state, VmState::Dead);
    });
    assert!(start.elapsed() < TEN_SECONDS);
}

/// A keeper is killed: the VM goes on, and so does its family, once all has settled.
#[test]
fn a_keeper_is_killed() {
    let Some(home) = TestHome::new() else { return };
    let mut vm = Traced::new(home.launch("k", ByteSize::mib(32)), 1000..3000);
    vm.write(1000..3000);
    let child = vm.fork(ForkOptions::new().wait_settled(true)).remove(0);
    kill(vm.vm.inspect().unwrap().keeper_pid.expect("a VM has a keeper"));
    vm.write(1500..1600);
    let late = vm.fork(ForkOptions::new()).remove(0);
    [&vm, &child, &late].into_iter().for_each(Traced::verify);
}

/// The server is killed, with a family, a pool and unsettled pages: no process of it stays, not for a moment. The next
/// command starts clean and tells what was lost.
#[test]
fn the_server_is_killed() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("lost", ByteSize::mib(80));
    vm.fill(1000..17000, 1);
    let children = vm.fork(ForkOptions::new().count(2)).unwrap();
    children[0].vm.fork(ForkOptions::new()).unwrap();
    // Names are put down when a command has been answered, before the next is.
    assert_eq!(home.client().list().unwrap().len(), 4);
    let server = home.server().expect("a server");
    let processes = children_of(server);
    assert!(processes.len() >= 8, "VM processes and keepers: {processes:?}");
    kill(server);
    let start = Instant::now();
    wait_until("all processes have ended", Duration::from_secs(2), || processes.iter().all(|&pid| !is_alive(pid)));
    println!("{} processes ended {:?} after the server was killed", processes.len(), start.elapsed());

    let outcome = home.cli(&["ls", "--json"]);
    assert_eq!((outcome.code, outcome.out.trim()), (0, "[]"), "{outcome:?}");
    assert_eq!(outcome.err.lines().count(), 1, "{outcome:?}");
    let names = ["lost", "lost-1", "lost-2", "lost-3"];
    assert!(names.iter().all(|name| outcome.err.contains(name)), "{outcome:?}");
    // The next server tells of it once more, and then never again; and the name is free.
    let outcome = home.cli(&["launch", "lost", "--mem", "16M"]);
    assert_eq!((outcome.code, outcome.out.trim()), (0, "lost"), "{outcome:?}");
    assert!(names.iter().all(|name| outcome.err.contains(name)), "{outcome:?}");
    home.cli(&["ls"]).good();
}

/// The zygote is killed, with VMs and while nothing is ready for the next: its VMs do not notice, and what comes next has
/// a new one. None has a descriptor of another process.
#[test]
fn the_zygote_is_killed() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("z", ByteSize::mib(32));
    vm.fill(1000..3000, 1);
    let mut earlier = Vec::new();
    for round in 0..3 {
        let zygote = home.zygote().expect("a server with VMs has a zygote");
        assert!(!earlier.contains(&zygote));
        let open = descriptors(zygote);
        assert!(open.len() <= 4, "standard streams and a socket: {open:?}");
        kill(zygote);
        earlier.push(zygote);
        // A shape that nothing is prepared for, and more than the pool has.
        home.launch(&format!("next-{round}"), ByteSize::mib(33 + round));
        let children = vm.fork(ForkOptions::new().count(5)).unwrap();
        children.iter().for_each(|child| child.vm.verify(1000..3000, 1));
    }
    vm.verify(1000..3000, 1);
    assert!(home.client().check().unwrap().broken.is_empty());
    let zygote = home.zygote().expect("a zygote");
    home.cli(&["shutdown"]).good();
    assert!(!is_alive(zygote), "the zygote outlives the shutdown");
}

/// The server is killed at some moment of a large fork, while its zygote makes processes: nothing stays.
#[test]
fn the_server_is_killed_while_the_zygote_works() {
    let Some(home) = TestHome::new() else { return };
    for delay_us in [0, 200, 1000, 3000] {
        let vm = home.launch("z", ByteSize::mib(16));
        let server = home.server().expect("a server");
        let mut seen = children_of(server);
        thread::scope(|scope| {
            let forks = scope.spawn(|| vm.fork(ForkOptions::new().count(40)));
            thread::sleep(Duration::from_micros(delay_us));
            seen.extend(children_of(server));
            kill(server);
            let _ = forks.join().unwrap();
        });
        wait_until("all processes have ended", Duration::from_secs(2), || seen.iter().all(|&pid| !is_alive(pid)));
        wait_until("nobody is without a server", Duration::from_secs(2), || orphans().is_empty());
        assert_eq!(home.cli(&["budget", "none"]).code, 0);
        // Where the fork was done before, this client has not heard that its server is gone.
        let _ = home.client().list();
    }
}

/// Two servers have VMs of the same names, and nothing else in common.
#[test]
fn two_servers_side_by_side() {
    let (Some(here), Some(there)) = (TestHome::new(), TestHome::new()) else { return };
    for (home, seed) in [(&here, 1), (&there, 2)] {
        let vm = home.launch("same", ByteSize::mib(32));
        vm.fill(1000..2000, seed);
        vm.fork(ForkOptions::new().count(2)).unwrap();
    }
    for (home, seed) in [(&here, 1), (&there, 2)] {
        for name in ["same", "same-1", "same-2"] {
            home.client().vm(name).verify(1000..2000, seed);
        }
    }
    assert_ne!(here.server(), there.server());
    kill(there.server().expect("a server"));
    here.client().vm("same-2").fill(1500..1600, 3);
    here.client().vm("same-1").verify(1000..2000, 1);
    assert_eq!(here.client().list().unwrap().len(), 3);
    assert!(here.client().check().unwrap().broken.is_empty());
    for verb in [&["ls"][..], &["budget", "none"]] {
        let outcome = there.cli(verb);
        assert!(outcome.code == 0 && outcome.err.contains("same-2"), "{outcome:?}");
    }
}
