//! Guests that give memory back.

use offshoot_tests::{Guest, PATIENCE, Setup, TestHome};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};
use std::{fs, thread};
use vmm::api::{Balloon, ErrorKind, VmState};
use vmm::client::{ForkOptions, Vm};
use vmm::units::{ByteSize, PAGE_BYTES};

/// 64 MiB, the highest of a machine of 128 MiB.
const PAGES: std::ops::Range<u64> = 16384..32768;
const MEMORY: ByteSize = ByteSize::mib(128);
const HALF: ByteSize = ByteSize::mib(64);

fn clone_of(vm: &Vm) -> Vm {
    vm.fork(ForkOptions::new().wait_settled(true)).expect("fork").remove(0).vm
}

fn shrink(vm: &Vm, size: ByteSize) -> Balloon {
    vm.balloon(size, PATIENCE).unwrap_or_else(|e| panic!("{}: {e}", vm.name()))
}

/// The anonymous memory of a VM's process, in pages.
fn anonymous(vm: &Vm) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).expect("read the status of a process");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a process has anonymous memory");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("kilobytes") * 1024 / PAGE_BYTES
}

fn resident(home: &TestHome) -> u64 {
    home.cli(&["stats", "--json"]).json()["total"]["resident_pages"].as_u64().expect("a count")
}

/// What the host has for a home's VMs, in pages: the files of the server, and the anonymous memory of VM processes. No book
/// of ours is asked.
fn on_host(home: &TestHome) -> u64 {
    let server = home.server().expect("a server");
    let open = fs::read_dir(format!("/proc/{server}/fd")).expect("read the descriptors of the server");
    let mut blocks = BTreeMap::new();
    for path in open.filter_map(|entry| Some(entry.ok()?.path())) {
        if fs::read_link(&path).is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:"))
            && let Ok(file) = fs::metadata(&path)
        {
            blocks.insert((file.dev(), file.ino()), file.blocks());
        }
    }
    let vms = home.client().list().expect("list");
    let anonymous: u64 = vms.iter().map(|vm| anonymous(&home.client().vm(&vm.name))).sum();
    blocks.values().sum::<u64>() * 512 / PAGE_BYTES + anonymous
}

/// The same, once all has settled and it stays the same for a second: a process frees what has settled in its own time.
fn on_host_at_rest(home: &TestHome) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    let (mut last, mut same) = (on_host(home), 0);
    while same < 10 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(100));
        let now = on_host(home);
        let settled = home.client().stats().expect("stats").total.unsettled_pages == 0;
        same = if now == last && settled { same + 1 } else { 0 };
        last = now;
    }
    last
}

#[track_caller]
fn check(home: &TestHome) {
    let report = home.client().check().expect("check");
    assert!(report.broken.is_empty(), "{report:?}");
}

fn within_one_percent(left: u64, right: u64) -> bool {
    left.abs_diff(right) * 100 <= PAGES.end - PAGES.start
}

/// A clone writes 64 MiB and gives them back: so much memory comes back, and nobody else notices.
#[test]
fn what_a_clone_wrote_comes_back() {
    let Some(home) = TestHome::new() else { return };
    let base = home.launch("b", MEMORY);
    base.fill(PAGES, 1);
    let clone = clone_of(&base);
    let (private, rss) = (clone.stats().unwrap().private_pages, anonymous(&clone));
    clone.fill(PAGES, 2);
    let (full, full_rss) = (clone.stats().unwrap().private_pages, anonymous(&clone));
    assert!(within_one_percent(full - private, 16384) && within_one_percent(full_rss - rss, 16384));

    let balloon = shrink(&clone, HALF);
    assert_eq!((balloon.size_bytes, balloon.balloon_bytes), (HALF.0, HALF.0));
    let stats = clone.stats().unwrap();
    println!("private pages {private}, {full}, {}; RSS {rss}, {full_rss}, {}", stats.private_pages, anonymous(&clone));
    assert!(within_one_percent(stats.private_pages, private), "{stats:?}");
    assert!(within_one_percent(anonymous(&clone), rss));
    assert_eq!((stats.ballooned_pages, stats.vm.balloon_bytes), (16384, HALF.0));
    check(&home);

    base.verify(PAGES, 1);
    assert_eq!(clone.ask("fill 16384 1 3", PATIENCE).unwrap(), "err page=16384 is in the balloon: deflate it first");
    clone.verify_zero(PAGES);
    assert_eq!(shrink(&clone, MEMORY).balloon_bytes, 0);
    clone.verify_zero(PAGES);
    clone.fill(PAGES.start..PAGES.start + 100, 4);
    clone.verify(PAGES.start..PAGES.start + 100, 4);
    clone.verify_zero(PAGES.start + 100..PAGES.end);
    base.verify(PAGES, 1);
    check(&home);
}

/// What only one clone uses, wherever it is: just written, frozen by a fork that is over, or written by an ancestor that is
/// gone. So much comes back, by the host's count, and what others see stays.
#[test]
fn what_only_one_clone_used_comes_back_to_the_host() {
    let Some(home) = TestHome::new() else { return };
    let base = home.launch("b", MEMORY);
    base.fill(PAGES, 1);
    let mut clone = clone_of(&base);
    for depth in 0..3 {
        clone.fill(16384..20480, 2);
        // Two see it, then one.
        clone_of(&clone).remove().unwrap();
        clone.fill(20480..24576, 3);
        clone.verify(24576..PAGES.end, 1);
        let next = clone_of(&clone);
        next.verify(16384..20480, 2);
        let parent = std::mem::replace(&mut clone, next);
        if depth < 2 {
            parent.remove().unwrap();
            continue;
        }
        // Both of the last two see what was frozen: only what it writes now is the clone's own.
        clone.fill(22528..26624, 4);
        let before = on_host_at_rest(&home);
        shrink(&clone, HALF);
        let after = on_host_at_rest(&home);
        println!("{before} pages on the host with two of them, then {after}");
        assert!(within_one_percent(before.saturating_sub(after), 4096), "{before} pages, then {after}");
        parent.verify(20480..24576, 3);
        shrink(&clone, MEMORY);
        shrink(&parent, HALF);
        let last = on_host_at_rest(&home);
        println!("then {last}");
        assert!(within_one_percent(after.saturating_sub(last), 8192), "{after} pages, then {last}");
        check(&home);
    }
    base.verify(PAGES, 1);
    clone.verify_zero(PAGES);
}

/// A launched guest has huge pages, which go as well.
#[test]
fn what_a_launched_guest_wrote_comes_back() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("b", MEMORY);
    vm.fill(PAGES, 1);
    let (full, full_rss) = (vm.stats().unwrap().private_pages, anonymous(&vm));
    shrink(&vm, HALF);
    assert!(within_one_percent(full - vm.stats().unwrap().private_pages, 16384));
    assert!(within_one_percent(full_rss - anonymous(&vm), 16384));
    assert_eq!(vm.stats().unwrap().window_runs, 3, "nothing lay beneath, so nothing is mapped anew");
    check(&home);
    shrink(&vm, MEMORY);
    vm.verify_zero(PAGES);
}

/// Memory that all of a family share goes with the last who gives it back, in any order of generations.
#[test]
fn what_everybody_gives_back_is_freed() {
    let Some(home) = TestHome::new() else { return };
    let base = home.launch("b", MEMORY);
    base.fill(PAGES, 1);
    let mut family = vec![clone_of(&base)];
    family.push(clone_of(&family[0]));
    family[1].fill(PAGES.start..PAGES.start + 1000, 2);
    family.push(clone_of(&family[1]));
    family.push(base);
    let (full, full_on_host) = (resident(&home), on_host_at_rest(&home));
    assert!(full >= 16384 + 1000);
    for vm in &family {
        shrink(vm, HALF);
        check(&home);
    }
    let left = resident(&home);
    println!("{full} pages in stores, {left} when everybody has given them back");
    assert!(within_one_percent(full - left, 16384 + 1000) && left < 200);
    let on_host = full_on_host - on_host_at_rest(&home);
    println!("{on_host} pages come back to the host");
    assert!(within_one_percent(on_host, 16384 + 1000), "{on_host} pages of {full_on_host}");
    for vm in &family {
        shrink(vm, MEMORY);
        vm.verify_zero(PAGES);
    }
}

/// A fork has its parent's balloon, and neither sees what was there before; so in a fork of that, when its ancestors are
/// gone.
#[test]
fn a_fork_has_its_parents_balloon() {
    let Some(home) = TestHome::new() else { return };
    let base = home.launch("b", MEMORY);
    base.fill(1000..PAGES.end, 1);
    let parent = clone_of(&base);
    shrink(&parent, ByteSize::mib(96));
    let child = clone_of(&parent);
    let grandchild = clone_of(&child);
    for vm in [&parent, &child, &grandchild] {
        assert_eq!(vm.stats().unwrap().ballooned_pages, 8192);
        assert_eq!(vm.say("mem"), "first=64 pages=32768 ballooned=8192");
    }
    assert_eq!(child.say("deflate 30000 100"), "ballooned=8092");
    child.fill(30000..30050, 2);
    base.remove().unwrap();
    parent.remove().unwrap();
    check(&home);
    for (vm, low) in [(&child, 30050), (&grandchild, 24576)] {
        vm.verify(1000..24576, 1);
        vm.verify_zero(low..PAGES.end);
    }
    child.verify(30000..30050, 2);
    let last = clone_of(&child);
    last.verify(30000..30050, 2);
    last.verify_zero(30050..PAGES.end);
    check(&home);
}

/// Forks fall into a guest that gives pages back and takes them again: every child is on one side or the other, and goes
/// on from there.
#[test]
fn forks_while_it_inflates() {
    for disable in ["", "userfaultfd", "pagemap-scan"] {
        let Some(home) = (Setup { disable, ..Setup::default() }).home() else { return };
        let vm = home.launch("b", ByteSize::mib(64));
        vm.fill(4000..12000, 1);
        let children = thread::scope(|scope| {
            let busy = scope.spawn(|| {
                for round in 0..40 {
                    let first = 4000 + round * 100;
                    vm.say(&format!("inflate {first} 3000"));
                    vm.say(&format!("deflate {first} 2900"));
                    vm.fill(first..first + 100, 2);
                }
            });
            let mut children = Vec::new();
            while !busy.is_finished() && children.len() < 12 {
                thread::sleep(Duration::from_millis(7));
                children.push(vm.fork(ForkOptions::new()).expect("fork").remove(0).vm);
            }
            children
        });
        check(&home);
        for vm in children.iter().chain([&vm]) {
            vm.say("deflate 64 16320");
            vm.verify(11000..12000, 1);
            let whole = |page: u64| [1, 2].into_iter().any(|seed| vm.try_verify(page..page + 1, seed).is_ok());
            for page in (4000..11000).step_by(97) {
                assert!(whole(page) || vm.say(&format!("sum {page} 1")) == "sum=0", "{} at {page}", vm.name());
            }
        }
        vm.verify(4000..8000, 2);
        vm.verify_zero(8000..10900);
        check(&home);
    }
}

/// A family, three deep, gives memory back while each of them is forked: the clones have what their parents had, and when
/// they have given it back too, all of it is the host's again.
#[test]
fn a_whole_family_gives_back_while_it_is_forked() {
    let Some(home) = TestHome::new() else { return };
    let base = home.launch("b", MEMORY);
    let empty = on_host_at_rest(&home);
    base.fill(PAGES, 1);
    let mut family = vec![base];
    for _ in 0..2 {
        family.push(clone_of(&family[family.len() - 1]));
    }
    family[1].fill(16384..18384, 2);
    let full = on_host_at_rest(&home);
    let late = thread::scope(|scope| {
        let shrinking = family.iter().map(|vm| scope.spawn(|| shrink(vm, HALF))).collect::<Vec<_>>();
        let mut late = Vec::new();
        for _ in 0..2 {
            late.extend(family.iter().map(|vm| vm.fork(ForkOptions::new()).expect("fork").remove(0).vm));
        }
        shrinking.into_iter().for_each(|done| assert_eq!(done.join().unwrap().balloon_bytes, HALF.0));
        late
    });
    for vm in &late {
        // On its way, before it or behind it: what is not in the balloon is what the parent had.
        shrink(vm, MEMORY);
        let whole = |page: u64| [1, 2].into_iter().any(|seed| vm.try_verify(page..page + 1, seed).is_ok());
        let good = |page: u64| whole(page) || vm.say(&format!("sum {page} 1")) == "sum=0";
        assert!(PAGES.step_by(509).all(good), "{}", vm.name());
        shrink(vm, HALF);
    }
    check(&home);
    let left = on_host_at_rest(&home);
    // What a VM has of its own (its process, its first pages) is some hundred pages.
    println!(
        "{empty} pages on the host, {full} with a family of three, {left} when these and {} clones are ballooned",
        late.len()
    );
    assert!(left < empty + 300 * (family.len() + late.len()) as u64);
    assert!(full - left > 16384 + 2000 - 300 * (family.len() + late.len()) as u64);
}

/// Every second page alone: more stretches than the balloon has room for, and a child that sees them all.
#[test]
fn a_balloon_full_of_holes() {
    let Some(home) = TestHome::new() else { return };
    let base = home.launch("b", ByteSize::mib(16));
    base.fill(100..2000, 1);
    let clone = clone_of(&base);
    for page in 0..254 {
        clone.say(&format!("inflate {} 1", 100 + 2 * page));
    }
    let refused = clone.ask("inflate 1000 1", PATIENCE).unwrap();
    assert_eq!(refused, "err more than 254 ranges of pages in the balloon");
    clone.fill(101..102, 2);
    let child = clone_of(&clone);
    for vm in [&clone, &child] {
        vm.verify_zero(100..101);
        vm.verify(101..102, 2);
        (102..608).for_each(
            |page| {
                if page % 2 == 0 { vm.verify_zero(page..page + 1) } else { vm.verify(page..page + 1, 1) }
            },
        );
    }
    check(&home);
    assert_eq!(shrink(&clone, ByteSize::mib(16)).balloon_bytes, 0);
    base.verify(100..2000, 1);
}

#[test]
fn the_command_line_says_how_it_went() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("b", HALF);
    assert_eq!(home.cli(&["balloon", "b", "16M"]).good(), "b: 16M left, 48M in the balloon\n");
    assert_eq!(home.cli(&["ls", "--json"]).json()[0]["balloon_bytes"], 48 << 20);
    let json = home.cli(&["balloon", "b", "48M", "--json"]).json();
    assert_eq!((json["size_bytes"].as_u64(), json["balloon_bytes"].as_u64()), (Some(48 << 20), Some(16 << 20)));
    for (arguments, what) in [
        (["balloon", "b", "65M"], "VM \"b\" cannot have 65M left: from 16M to its 64M"),
        (["balloon", "b", "15M"], "guest memory is at least 16M"),
        (["balloon", "b", "much"], "not a size"),
        (["balloon", "c", "16M"], "there is no VM \"c\""),
    ] {
        assert!(home.cli(&arguments).failure(2).contains(what), "{arguments:?}");
    }
    vm.pause().unwrap();
    let late = home.cli(&["balloon", "b", "32M", "--timeout", "0.3"]).failure(3);
    assert!(late.contains("VM \"b\" is not there in time: it has 48M left, 16M in the balloon"), "{late}");
    vm.resume().unwrap();
    vm.say("id");
    assert_eq!(vm.stats().unwrap().vm.state, VmState::Running);
    vm.say("inflate 64 1");
    assert_eq!(vm.balloon(ByteSize::mib(1), PATIENCE).unwrap_err().kind(), ErrorKind::BadRequest);
    assert_eq!(shrink(&vm, HALF).balloon_bytes, 0);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| home.cli(&["balloon", "b", "32M"]));
        vm.pause().unwrap();
        thread::sleep(Duration::from_millis(300));
        home.client().remove(["b"]).unwrap();
        let outcome = waiting.join().unwrap();
        assert!(outcome.code <= 2, "{outcome:?}");
    });
}
