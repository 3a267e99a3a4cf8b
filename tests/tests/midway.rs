//! Forks of a guest that is in the middle of something.

use offshoot_tests::{Guest, Lack, PATIENCE, TEN_SECONDS, TestHome, skip, wait_until};
use std::fs::OpenOptions;
use std::io::Write;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{thread, time::Instant};
use vmm::client::{ForkOptions, Vm};
use vmm::units::ByteSize;

const PAGES: Range<u64> = 1000..15000;

/// Forks `vm` every `pause` while it fills [`PAGES`].
fn fork_while_it_fills(vm: &Vm, seed: u64, pause: Duration) -> Vec<Vm> {
    thread::scope(|scope| {
        let filling = scope.spawn(|| vm.fill(PAGES, seed));
        let mut children = Vec::new();
        while !filling.is_finished() && children.len() < 8 {
            thread::sleep(pause);
            children.push(vm.fork(ForkOptions::new()).expect("fork").remove(0).vm);
        }
        filling.join().expect("fill");
        children
    })
}

/// Each child finishes the `fill` that it was born in, tells so in its log, and has every page; so has the parent.
#[test]
fn children_finish_the_fill_they_were_born_in() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("f", ByteSize::mib(64));
    let mut midway = 0;
    // How many of the forks fall into a fill depends on how fast the machine is at either: rounds go on until enough did.
    for round in 0..20 {
        for child in fork_while_it_fills(&vm, round, Duration::from_millis(10 + 30 * (round % 4))) {
            // Queues behind the fill, if that goes on.
            child.say("id");
            child.verify(PAGES, round);
            let answer = format!("ok filled={}\n", PAGES.count());
            midway += u32::from(child.log().contains(&answer));
            child.remove().unwrap();
        }
        vm.verify(PAGES, round);
        if midway >= 6 && round >= 2 {
            break;
        }
    }
    println!("{midway} children were born in the middle of a fill");
    assert!(midway >= 6, "only {midway} children were born in the middle of a fill");
    assert!(home.client().check().unwrap().broken.is_empty());
}

/// A `fill` goes on in a child of a child that was born in its middle.
#[test]
fn a_fill_goes_on_through_two_forks() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("f", ByteSize::mib(64));
    let grandchild = thread::scope(|scope| {
        scope.spawn(|| vm.fill(PAGES, 5));
        thread::sleep(Duration::from_millis(60));
        let child = vm.fork(ForkOptions::new()).expect("fork").remove(0).vm;
        child.fork(ForkOptions::new()).expect("fork a child").remove(0).vm
    });
    for name in [grandchild.name(), "f-1", "f"] {
        let vm = home.client().vm(name);
        vm.say("id");
        vm.verify(PAGES, 5);
    }
}

/// The clock that a guest watches stands still for moments only while it is forked. On a host that has no time for anybody
/// it may take another look.
#[test]
fn a_guest_hardly_notices_its_forks() {
    let Some(home) = TestHome::alone() else { return };
    let vm = home.launch("g", ByteSize::mib(64));
    vm.fill(1000..9000, 1);
    vm.fork(ForkOptions::new().wait_settled(true)).unwrap();
    let gaps: Vec<u64> = (0..4).map(|_| gap_while_forked(&vm)).take_while(|gap| *gap >= 200_000).collect();
    assert!(gaps.len() < 4, "the guest stood still for {gaps:?} us");
}

/// The longest that the clock stands still for a guest that is forked five times, in microseconds.
fn gap_while_forked(vm: &Vm) -> u64 {
    let (gap, pauses) = thread::scope(|scope| {
        let watching = scope.spawn(|| vm.say("gap 600"));
        let mut pauses = Vec::new();
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(80));
            let child = vm.fork(ForkOptions::new()).expect("fork").remove(0);
            pauses.extend(child.figures.pause_us);
            // It watches the clock as well, and was not there for a while.
            child.vm.remove().expect("remove");
        }
        (watching.join().expect("gap"), pauses)
    });
    println!("gap while forked five times: {gap}; pauses {pauses:?} us");
    assert_eq!(pauses.len(), 5);
    gap.strip_prefix("max_gap_us=").unwrap().parse().unwrap()
}

/// Compaction puts pages under migration while they are harvested: they are private all the same, and none is lost.
#[test]
fn the_host_compacts_memory_meanwhile() {
    let Some(home) = TestHome::alone() else { return };
    let Ok(mut compact) = OpenOptions::new().write(true).open("/proc/sys/vm/compact_memory") else {
        return skip(Lack::Proc, "/proc/sys/vm/compact_memory cannot be written");
    };
    let vm = home.launch("c", ByteSize::mib(80));
    let (stop, mut compactions, mut forks) = (AtomicBool::new(false), 0, 0);
    thread::scope(|scope| {
        let compacting = scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                compact.write_all(b"1").expect("compact memory");
                count += 1;
            }
            count
        });
        let end = Instant::now() + Duration::from_secs(6);
        let mut seed = 0;
        while Instant::now() < end && forks < 40 {
            seed += 1;
            vm.fill(1000..9000, seed);
            let children = vm.fork(ForkOptions::new().count(2)).expect("fork");
            vm.fill(1000..3000, 1_000_000 + seed);
            for child in children {
                child.vm.verify(1000..9000, seed);
                child.vm.remove().expect("remove");
                forks += 1;
            }
            vm.verify(1000..3000, 1_000_000 + seed);
            vm.verify(3000..9000, seed);
        }
        stop.store(true, Ordering::Relaxed);
        compactions = compacting.join().expect("compact");
    });
    println!("{forks} children verified during {compactions} compactions");
    assert!(compactions > 0 && forks >= 4);
}

/// A guest asks for forks itself; its children too, and they all know who they are.
#[test]
fn a_guest_forks_itself() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("i", ByteSize::mib(32));
    vm.fill(1000..1500, 3);
    assert_eq!(vm.say("fork"), "parent child=i-1");
    assert_eq!(vm.say("fork 3"), "parent child=i-2 child=i-3 child=i-4");
    vm.fill(1000..1010, 4);
    let child = home.client().vm("i-3");
    assert_eq!(child.say("fork 2"), "parent child=i-5 child=i-6");
    for (name, index) in [("i-1", 1), ("i-2", 1), ("i-3", 2), ("i-4", 3), ("i-5", 1), ("i-6", 2)] {
        let vm = home.client().vm(name);
        vm.verify(1000..1500, 3);
        assert!(vm.say("id").starts_with(&format!("name={name} ")));
        let told = format!("ok child index={index}\n");
        wait_until("a child tells its index", TEN_SECONDS, || vm.log().contains(&told));
    }
    for refused in ["fork 0", "fork 100000"] {
        let before = home.client().list().unwrap().len();
        assert!(vm.ask(refused, PATIENCE).unwrap().starts_with("err "), "{refused}");
        assert_eq!(home.client().list().unwrap().len(), before);
    }
}

/// A guest forks itself while it is forked from outside: neither waits for ever, and no name is given twice.
#[test]
fn inside_and_outside_forks_meet() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("m", ByteSize::mib(32));
    vm.fill(1000..2000, 7);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..6 {
                assert!(vm.say("fork 2").starts_with("parent child="));
            }
        });
        scope.spawn(|| {
            for _ in 0..6 {
                assert_eq!(vm.fork(ForkOptions::new().count(2)).expect("fork").len(), 2);
            }
        });
    });
    vm.fill(1500..1600, 8);
    // A child that is born while its parent is about to ask makes the request too, as it makes every line under way.
    let vms = home.client().list().unwrap();
    assert!(vms.len() >= 25, "{} VMs", vms.len());
    for child in vms.iter().filter(|child| child.name != "m") {
        home.client().vm(&child.name).verify(1000..2000, 7);
    }
    assert!(home.client().check().unwrap().broken.is_empty());
}
