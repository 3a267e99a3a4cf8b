//! A VM process that has been taken over hurts its own VM, and nobody else.

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use offshoot_tests::hostile::{Hostile, frozen, that_have_seen_memory};
use offshoot_tests::{Guest, TEN_SECONDS, TestHome, fork_settled, wait_until};
use std::fs;
use std::thread;
use vmm::client::{ForkOptions, Vm};
use vmm::machine::WINDOW_BASE;
use vmm::units::ByteSize;
use vmm::wire::{Ending, FromVm};

/// A VM of another family, which nothing may happen to.
struct Bystander {
    parent: Vm,
    child: Vm,
}

impl Bystander {
    fn launch(home: &TestHome) -> Self {
        let parent = home.launch("bystander", ByteSize::mib(64));
        parent.fill(1000..3000, 5);
        let child = fork_settled(&parent, 1).remove(0);
        Self { parent, child }
    }

    /// It is served, pages from swap included, and so are clients.
    #[track_caller]
    fn is_well(&self, home: &TestHome) {
        home.cli(&["ls"]).good();
        self.parent.reclaim(ByteSize::mib(16)).expect("reclaim");
        for vm in [&self.child, &self.parent] {
            vm.verify(1000..3000, 5);
        }
        let forked = fork_settled(&self.parent, 1).remove(0);
        forked.verify(1000..3000, 5);
        forked.remove().expect("remove");
    }
}

/// Why a VM is dead, as soon as it is.
#[track_caller]
fn reason(home: &TestHome, name: &str) -> String {
    let mut reason = None;
    wait_until("the attacker's VM is dead", TEN_SECONDS, || {
        let all = home.client().list().expect("ls");
        reason = all.into_iter().find(|vm| vm.name == name).and_then(|vm| vm.reason);
        reason.is_some()
    });
    reason.expect("waited for")
}

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

/// The flags of the descriptor that traps are read from belong to both its holders. A process cleared the one that keeps
/// the server from waiting, touched a page, and nobody was served any more.
#[test]
fn the_server_waits_for_no_trap() {
    let Some(home) = TestHome::new() else { return };
    let bystander = Bystander::launch(&home);
    let parent = home.launch("a", ByteSize::mib(64));
    parent.fill(1000..3000, 1);
    let child = fork_settled(&parent, 1).remove(0);
    parent.reclaim(ByteSize::mib(16)).expect("reclaim");
    let Some(hostile) = Hostile::take_over(&child) else { return };
    let Some(traps) = hostile.take("anon_inode:[userfaultfd]") else { return };
    fcntl(&traps, FcntlArg::F_SETFL(OFlag::empty())).expect("fcntl");
    let name = child.name().to_owned();
    let guest = thread::spawn(move || child.try_verify(1000..3000, 1));
    bystander.is_well(&home);
    assert!(guest.join().expect("a thread").is_err());
    let why = reason(&home, &name);
    assert!(why.contains("tampered"), "{why}");
    // Nor did its relatives suffer.
    parent.verify(1000..3000, 1);
}

/// A process named memory that traps as the place of its frozen pages: the server read it, and waited for the trap that it
/// alone could serve.
#[test]
fn the_server_waits_for_no_page_that_it_reads() {
    let Some(home) = TestHome::new() else { return };
    let bystander = Bystander::launch(&home);
    let vm = home.launch("a", ByteSize::mib(64));
    let Some(mut hostile) = Hostile::take_over(&vm) else { return };
    let _traps = hostile.take("anon_inode:[userfaultfd]");
    hostile.stop();
    let fork = thread::spawn(move || vm.fork(ForkOptions::new()).map(drop));
    let store = hostile.hear_freeze();
    // Pages of the built-in guest's image that it has not touched.
    let image = firmware::abi::IMAGE_BASE >> 12;
    hostile.say(&[FromVm::Standing, frozen(store, vec![(image + 8..image + 24).into()], WINDOW_BASE)]);
    bystander.is_well(&home);
    assert!(fork.join().expect("a thread").is_err());
    let why = reason(&home, "a");
    assert!(why.contains("makes no sense"), "{why}");
}

/// One packet of a byte for each message cost the server forty times as much memory, and seconds.
#[test]
fn a_flood_costs_who_sends_it() {
    let Some(home) = TestHome::new() else { return };
    let bystander = Bystander::launch(&home);
    let vm = home.launch("a", ByteSize::mib(64));
    let Some(mut hostile) = Hostile::take_over(&vm) else { return };
    let server = home.server().expect("it runs");
    let peak = || {
        let status = fs::read_to_string(format!("/proc/{server}/status")).expect("read a process's status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a process has a peak");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10
    };
    let before = peak();
    let standing = vmm_encoded(&FromVm::Standing);
    hostile.say_this(&vec![standing; 16 << 20]);
    bystander.is_well(&home);
    let why = reason(&home, "a");
    assert!(why.contains("makes no sense"), "{why}");
    assert!(peak() < before + 64, "the server took {} MiB, before it was {before} MiB", peak());
}

/// A message without anything in it, as it is encoded.
fn vmm_encoded(message: &FromVm) -> u8 {
    match message {
        FromVm::Standing => 6,
        other => panic!("{other:?} has something in it"),
    }
}

/// Small messages, as many as the socket takes: the others have their share of the server.
#[test]
fn who_talks_all_the_time_keeps_nobody_from_being_heard() {
    let Some(home) = TestHome::new() else { return };
    let bystander = Bystander::launch(&home);
    let vm = home.launch("a", ByteSize::mib(64));
    let Some(mut hostile) = Hostile::take_over(&vm) else { return };
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let flood = thread::spawn(move || {
        while is_done.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            let some: Vec<FromVm> = (0..60).map(|_| FromVm::Hinted).collect();
            hostile.say(&some);
        }
    });
    bystander.is_well(&home);
    vm.fill(100..200, 1);
    done.send(()).expect("it listens");
    flood.join().expect("a thread");
}

/// What a process says is the end of its VM went to terminals as it was.
#[test]
fn no_reason_reaches_a_terminal_as_it_is() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("a", ByteSize::mib(32));
    let Some(mut hostile) = Hostile::take_over(&vm) else { return };
    let why = format!("\u{1b}]0;owned\u{7}\nb  running  {}\u{9b}2J\u{202e}", "x".repeat(10_000));
    hostile.say(&[FromVm::Ended(Ending::Dead(why))]);
    let shown = reason(&home, "a");
    assert!(shown.len() < 2000 && shown.contains("owned"), "{shown}");
    for command in [&["ls"][..], &["tree"], &["send", "a", "id"]] {
        let outcome = home.cli(command);
        let all = format!("{}{}", outcome.out, outcome.err);
        assert!(all.chars().all(|c| c == '\n' || !(c.is_control() || c == '\u{202e}')), "{all:?}");
        assert!(!all.lines().any(|line| line.starts_with("b  running")), "{all}");
    }
}
