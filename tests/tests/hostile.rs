//! A VM process that has been taken over hurts its own VM, and nobody else.

use guest_mem::StoreId;
use guest_mem::sys::Userfaultfd;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use offshoot_tests::hostile::{Hostile, frozen, frozen_in_copy, that_have_seen_memory};
use offshoot_tests::process::{descriptors, is_alive, users};
use offshoot_tests::puppet::{Called, Puppet};
use offshoot_tests::{Guest, TEN_SECONDS, TestHome, fork_settled, wait_until};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};
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

/// The server is asked for a freeze of the attacker's VM, and hears `say` of the store in the process's place. Why the VM is
/// dead then.
fn freeze_of_liar(home: &TestHome, attacker: Vm, say: impl FnOnce(StoreId) -> FromVm) -> Option<String> {
    let name = attacker.name().to_owned();
    let mut hostile = Hostile::take_over(&attacker)?;
    hostile.stop();
    let fork = thread::spawn(move || attacker.fork(ForkOptions::new()).map(drop));
    let store = hostile.hear_freeze();
    hostile.say(&[FromVm::Standing, say(store)]);
    assert!(fork.join().expect("a thread").is_err());
    Some(reason(home, &name))
}

/// Between the making of a copy and the message that tells of it, any process could name the copy as its own: the server
/// read a sibling's memory into the attacker's store. A keeper that was known was passed over without a word.
#[test]
fn nobody_names_what_another_process_has_made() {
    let Some(home) = TestHome::new() else { return };
    let bystander = Bystander::launch(&home);
    let victim = home.launch("victim", ByteSize::mib(64));
    victim.fill(1000..3000, 7);
    // As the copy of a first fork, but that nobody tells of it.
    let Some(mut puppet) = Puppet::take(victim.pid()) else { return };
    let made = puppet.make_process(libc::CLONE_PARENT | libc::SIGCHLD);
    let Called::Gave(copy) = made else { panic!("{made:?}") };
    drop(puppet);
    let pages = || vec![(2000..2008).into()];
    let attacker = home.launch("a", ByteSize::mib(64));
    let Some(why) = freeze_of_liar(&home, attacker, |store| frozen_in_copy(store, pages(), copy as i32)) else {
        return;
    };
    assert!(why.contains("has not made"), "{why}");
    assert!(is_alive(copy as i32), "nor is the sibling's copy ended for it");
    let keeper = spare(&home, &[&victim])
        .into_iter()
        .find(|&pid| users(pid) == users(victim.pid()) && descriptors(pid).is_empty());
    let keeper = keeper.expect("a VM process has a keeper");
    let attacker = home.launch("b", ByteSize::mib(64));
    let why = freeze_of_liar(&home, attacker, |store| frozen_in_copy(store, pages(), keeper));
    assert!(why.as_ref().is_some_and(|why| why.contains("somebody else's")), "{why:?}");
    victim.verify(1000..3000, 7);
    fork_settled(&victim, 1).remove(0).verify(1000..3000, 7);
    bystander.is_well(&home);
    victim.remove().expect("remove");
    wait_until("what it has made has ended with it", TEN_SECONDS, || !is_alive(copy as i32));
}

/// A process made others, which nobody knew of and nobody ended: children of the server, children of its own that became
/// those of the host, and some that had its memory, for which `rm` and `shutdown` waited for ever.
#[test]
fn what_a_process_leaves_behind_ends_with_it() {
    let Some(home) = TestHome::new() else { return };
    let bystander = Bystander::launch(&home);
    for (name, flags) in [
        ("sibling", libc::CLONE_PARENT),
        ("child", 0),
        ("sibling-with-memory", libc::CLONE_PARENT | libc::CLONE_VM),
        ("child-with-memory", libc::CLONE_VM),
    ] {
        let vm = home.launch(name, ByteSize::mib(32));
        let Some(mut puppet) = Puppet::take(vm.pid()) else { return };
        let made = puppet.make_process(flags | libc::SIGCHLD);
        drop(puppet);
        let began = Instant::now();
        vm.remove().expect(name);
        assert!(began.elapsed() < Duration::from_secs(5), "{name}: removed after {:?}", began.elapsed());
        match made {
            Called::Gave(stray) => {
                wait_until("what was left behind has ended", TEN_SECONDS, || !is_alive(stray as i32));
            }
            // Where the filter holds, all but the first.
            made => assert!(made == Called::Ended && flags != libc::CLONE_PARENT, "{name}: {made:?}"),
        }
    }
    bystander.is_well(&home);
}

/// `rm` waited for all processes that were about to end, be they another VM's that somebody kept from it.
#[test]
fn a_removal_waits_for_nobody_elses_process() {
    let Some(home) = TestHome::new() else { return };
    let lingering = home.launch("a", ByteSize::mib(32));
    let other = home.launch("b", ByteSize::mib(32));
    let name = lingering.name().to_owned();
    // A process that is traced is not reaped before its tracer lets it go.
    let Some(puppet) = Puppet::take(lingering.pid()) else { return };
    let removal = {
        let client = home.client().clone();
        thread::spawn(move || client.remove([name]))
    };
    wait_until("the VM is off the list", TEN_SECONDS, || home.client().list().expect("ls").len() == 1);
    let began = Instant::now();
    other.remove().expect("remove");
    assert!(began.elapsed() < Duration::from_secs(5), "removed after {:?}", began.elapsed());
    drop(puppet);
    removal.join().expect("a thread").expect("remove");
}

/// The server's log was the standard error of every VM process, which could write into it, empty it and fill the disk. And
/// its pagemap, opened by root, told where in the host's memory pages are.
#[test]
fn a_process_has_no_file_of_the_hosts_and_sees_no_frame_numbers() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("a", ByteSize::mib(32));
    vm.fill(1000..1100, 1);
    let child = fork_settled(&vm, 1).remove(0);
    for vm in [&vm, &child] {
        let may_be = |name: &str| {
            ["/dev/null", "/dev/urandom", "socket:", "anon_inode:"].iter().any(|is| name.starts_with(is))
                || name == format!("/proc/{}/pagemap", vm.pid())
        };
        // It has let go of the store of its freeze a moment after the fork is answered.
        wait_until("it has nothing else open", TEN_SECONDS, || {
            descriptors(vm.pid()).iter().all(|(_, name)| may_be(name))
        });
    }
    // Pages of the process's own: those of before have left it.
    vm.fill(1000..1100, 2);
    let Some(hostile) = Hostile::take_over(&vm) else { return };
    let pagemap = hostile.take(&format!("/proc/{}/pagemap", vm.pid())).expect("a VM process has its pagemap");
    let mut entries = [0; 8 * 100];
    File::from(pagemap).read_exact_at(&mut entries, (WINDOW_BASE / 4096 + 1000) * 8).expect("read a pagemap");
    let entries = entries.chunks_exact(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().expect("eight")));
    let (there, frames): (Vec<bool>, Vec<u64>) =
        entries.map(|entry| (entry >> 63 == 1, entry & ((1 << 55) - 1))).unzip();
    assert!(there.iter().any(|there| *there), "there is a page to look at");
    assert!(frames.iter().all(|frame| *frame == 0), "{frames:x?}");
}

/// Pages of the built-in guest that nobody had touched yet were holes of a file that all families map. A process whose traps
/// were off made zeros of them, for everybody, by looking.
#[test]
fn nobody_changes_by_looking_what_all_map() {
    let Some(home) = TestHome::new() else { return };
    let attacker = home.launch("a", ByteSize::mib(64));
    let Some(hostile) = Hostile::take_over(&attacker) else { return };
    let Some(traps) = hostile.take("anon_inode:[userfaultfd]") else { return };
    let traps = Userfaultfd::from_fd(traps);
    let base = WINDOW_BASE + firmware::abi::IMAGE_BASE;
    // What is not registered cannot be unregistered: not all of it may be.
    for page in (0..firmware::IMAGE.len() as u64).step_by(4096) {
        let _ = traps.unregister(base + page, 4096);
    }
    let image_of = |vm: &Vm| {
        let mut image = vec![0; firmware::IMAGE.len()];
        let memory = File::open(format!("/proc/{}/mem", vm.pid())).expect("open a process's memory");
        memory.read_exact_at(&mut image, base).map(|()| image)
    };
    assert!(image_of(&attacker).expect("read an image") == firmware::IMAGE, "the attacker sees something else");
    let other = home.launch("b", ByteSize::mib(64));
    assert!(image_of(&other).expect("read an image") == firmware::IMAGE, "another family sees something else");
    other.fill(1000..2000, 1);
    other.verify(1000..2000, 1);
    home.check();
}
