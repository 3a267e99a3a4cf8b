//! Memory that is taken out of VMs comes back as it was: by `reclaim`, and by a budget.

use offshoot_tests::{Guest, Served, Setup, TEN_SECONDS, TestHome, each, fork_settled, wait_until};
use serde_json::Value;
use std::fs::{self, File};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vmm::api::VmState;
use vmm::client::Vm;
use vmm::units::ByteSize;

/// 64 MiB.
const PAGES: std::ops::Range<u64> = 1000..17384;
const COUNT: u64 = PAGES.end - PAGES.start;
/// Pages that guests touch besides: their monitors', and what lies around them.
const FEW: u64 = 400;

/// Parent and children see what they saw, though all of it was out of memory; and what nobody has written since needs no
/// second way out.
#[test]
fn reclaimed_pages_come_back() {
    let Some(home) = TestHome::new() else { return };
    let parent = home.launch("a", ByteSize::mib(128));
    parent.fill(PAGES, 1);
    let children = fork_settled(&parent, 2);
    children[0].fill(2000..2100, 2);

    let start = Instant::now();
    let done = home.cli(&["reclaim", "--all", "64M"]).good();
    let reclaimed: u64 = done.trim().strip_prefix("reclaimed ").expect("a line").parse().expect("a number");
    let before = home.totals();
    println!("{reclaimed} bytes in {:?}: {before:?}", start.elapsed());
    assert!(reclaimed >= 60 << 20 && before.resident_pages < FEW, "{reclaimed}: {before:?}");
    assert!(before.swapped_pages >= COUNT - FEW && before.swap_slots >= before.swapped_pages, "{before:?}");
    home.check();

    let start = Instant::now();
    parent.verify(PAGES, 1);
    println!("read again in {:?}", start.elapsed());
    children[0].verify(2000..2100, 2);
    children[0].verify(2100..PAGES.end, 1);
    children[1].verify(PAGES, 1);
    let back = home.totals();
    assert!((COUNT - FEW..=COUNT + FEW).contains(&back.swap_in_pages), "{back:?}");

    let again = parent.reclaim(ByteSize::mib(64)).expect("reclaim again");
    let after = home.totals();
    println!("again {again:?}: {after:?}");
    assert!(again.reclaimed_bytes >= 60 << 20 && after.clean_eviction_pages >= COUNT - FEW, "{again:?} {after:?}");
    assert!(after.swap_out_pages <= before.swap_out_pages + FEW, "{before:?} {after:?}");
    home.check();
    children[1].verify(PAGES, 1);

    home.client().remove_all().expect("rm --all");
    let end = home.totals();
    assert_eq!((end.swap_slots, end.compressed_bytes, end.disk_bytes, end.resident_pages), (0, 0, 0, 0), "{end:?}");
    assert_eq!(end.accounted_bytes, 0, "{end:?}");
}

/// A page that twenty clones need comes back once.
#[test]
fn clones_share_what_comes_back() {
    let Some(home) = TestHome::new() else { return };
    let parent = home.launch("a", ByteSize::mib(128));
    parent.fill(PAGES, 1);
    let clones = fork_settled(&parent, 20);
    home.client().reclaim_all(ByteSize::mib(64)).expect("reclaim");
    let before = home.totals();
    each(&clones, |_, clone| clone.verify(PAGES, 1));
    let after = home.totals();
    let back = after.swap_in_pages - before.swap_in_pages;
    println!("{back} pages came back for {} clones of {COUNT}", clones.len());
    assert!((COUNT - FEW..=COUNT + FEW).contains(&back), "{back} of {COUNT}");
    home.check();
}

/// What a VM has written since, or nobody has forked yet, goes too. The disk gets it where memory may hold little.
#[test]
fn live_layers_go_to_the_disk_and_their_vm_forks_on() {
    let Some(home) = TestHome::new() else { return };
    let _server = Served::new(&home, &["--compressed", "1M"]);
    let vm = home.launch("a", ByteSize::mib(128));
    vm.fill(PAGES, 1);
    let done = home.cli(&["reclaim", "a", "64M", "--json"]).json();
    assert_eq!(done["requested_bytes"], 64 << 20);
    assert!(done["reclaimed_bytes"].as_u64().is_some_and(|bytes| bytes >= 60 << 20), "{done}");
    wait_until("the tier is written out", TEN_SECONDS, || home.totals().compressed_bytes < 4 << 20);
    let out = home.totals();
    println!("{out:?}");
    // What the disk was too slow for settled in memory.
    assert!(out.disk_bytes >= 56 << 20 && out.swapped_pages >= COUNT - 1000, "{out:?}");
    assert!(!home.path().join("swap").exists(), "it has no name");

    let children = fork_settled(&vm, 3);
    children[0].fill(1000..2000, 2);
    each(&children[1..], |_, child| child.verify(PAGES, 1));
    children[0].verify(1000..2000, 2);
    children[0].verify(2000..PAGES.end, 1);
    vm.verify(PAGES, 1);
    home.check();
    let end = home.totals();
    println!("{end:?}");
    assert!(end.readahead_pages > 0 && end.readahead_hit_pages > 0, "{end:?}");
    home.client().remove_all().expect("rm --all");
    wait_until("the disk is free", TEN_SECONDS, || home.totals().disk_bytes == 0);
    assert_eq!(home.totals().swap_slots, 0);
}

/// What its only viewer writes goes from swap straight into its live layer: nothing of it gets into a store. What a clone sees
/// as well comes back there, for both of them.
#[test]
fn a_page_that_only_its_writer_sees_is_not_in_memory_twice() {
    const STEP: u64 = 64;
    const TOUCHED: u64 = 100;
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("a", ByteSize::mib(128));
    vm.fill(PAGES, 1);
    // From the end: nothing is brought ahead of such touches.
    let page = |nth: u64, offset: u64| PAGES.end - nth * STEP + offset..PAGES.end - nth * STEP + offset + 1;
    let write = |offset: u64| {
        home.client().reclaim_all(ByteSize::mib(64)).expect("reclaim");
        let before = home.totals();
        (1..=TOUCHED).for_each(|nth| vm.fill(page(nth, offset), 2));
        let after = home.totals();
        println!("{before:?} {after:?}");
        (
            after.swap_in_live_pages - before.swap_in_live_pages,
            after.swap_in_pages - before.swap_in_pages,
            after.resident_pages - before.resident_pages,
        )
    };
    let (live, came, stored) = write(0);
    assert!((TOUCHED..TOUCHED + FEW).contains(&live), "{live} of {TOUCHED}");
    assert_eq!(came - stored, live, "what came with them is in stores");
    home.check();

    let clones = fork_settled(&vm, 1);
    let (live, came, stored) = write(STEP / 2);
    assert!(live < TOUCHED / 2 && came - stored == live, "{live} of {came}, {stored} are in stores");
    (1..=TOUCHED).for_each(|nth| {
        vm.verify(page(nth, 0), 2);
        vm.verify(page(nth, STEP / 2), 2);
        clones[0].verify(page(nth, 0), 2);
        clones[0].verify(page(nth, STEP / 2), 1);
    });
    vm.verify(PAGES.start..PAGES.end - TOUCHED * STEP, 1);
    home.check();
}

/// Ten clones write four times what the budget allows.
#[test]
fn a_budget_is_kept() {
    let Some(home) = TestHome::alone() else { return };
    const OWN: u64 = 4096;
    let parent = home.launch("a", ByteSize::mib(128));
    parent.fill(PAGES, 1);
    let clones = fork_settled(&parent, 10);
    let budget = (COUNT + 10 * OWN) * 4096 / 4;
    assert_eq!(home.cli(&["budget", &budget.to_string()]).good(), "56M\n");
    wait_until("the budget is kept", TEN_SECONDS, || home.totals().accounted_bytes <= budget);

    let done = AtomicBool::new(false);
    let own = |index: usize| PAGES.start + index as u64 * 500..PAGES.start + index as u64 * 500 + OWN;
    let start = Instant::now();
    let most = thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = 0;
            while !done.load(Ordering::Relaxed) {
                most = most.max(home.totals().accounted_bytes);
                thread::sleep(Duration::from_millis(20));
            }
            most
        });
        each(&clones, |index, clone| clone.fill(own(index), 10 + index as u64));
        println!("written after {:?}", start.elapsed());
        each(&clones, |index, clone| clone.verify(own(index), 10 + index as u64));
        println!("verified after {:?}", start.elapsed());
        done.store(true, Ordering::Relaxed);
        watch.join().expect("watch")
    });
    let total = home.totals();
    println!("budget {budget}, at most {most} ({:.3}): {total:?}", most as f64 / budget as f64);
    for (index, clone) in clones.iter().enumerate() {
        clone.verify(PAGES.start..own(index).start, 1);
        clone.verify(own(index).end..PAGES.end, 1);
    }
    parent.verify(PAGES, 1);
    home.check();
    assert!(most as f64 <= budget as f64 * 1.15, "{most} bytes for a budget of {budget}");
    assert!(total.swap_out_pages > 10 * OWN, "{total:?}");
    let listed = home.client().list().expect("ls");
    assert!(listed.iter().all(|vm| vm.state == VmState::Running), "{listed:?}");
    assert_eq!(home.cli(&["budget", "none"]).good(), "none\n");
}

/// Swap that is too small takes what it can, and guests go on.
#[test]
fn a_small_swap_takes_what_it_can() {
    let Some(home) = TestHome::new() else { return };
    let file = home.path().with_file_name("small");
    let place = format!("{}:8M", file.display());
    let _server = Served::new(&home, &["--swap", &place, "--compressed", "2M"]);
    let vm = home.launch("a", ByteSize::mib(128));
    vm.fill(PAGES, 1);
    let children = fork_settled(&vm, 2);
    let done = home.client().reclaim_all(ByteSize::mib(64)).expect("reclaim");
    println!("{done:?}: {:?}", home.totals());
    assert!((2 << 20..20 << 20).contains(&done.reclaimed_bytes), "{done:?}");
    home.client().set_budget(Some(ByteSize::mib(32))).expect("a budget that cannot be kept");
    each(&children, |_, child| child.verify(PAGES, 1));
    children[0].fill(5000..6000, 2);
    children[0].verify(5000..6000, 2);
    children[1].verify(PAGES, 1);
    home.check();
    home.client().remove_all().expect("rm --all");
    assert_eq!(home.totals().swap_slots, 0);
}

/// What came back from a full swap is in both places, and gives up that one for another family's memory.
#[test]
fn a_full_swap_gives_up_copies() {
    let Some(home) = TestHome::new() else { return };
    let file = home.path().with_file_name("small");
    let place = format!("{}:40M", file.display());
    let _server = Served::new(&home, &["--swap", &place, "--compressed", "1M"]);
    let (first, second) = (home.launch("a", ByteSize::mib(64)), home.launch("b", ByteSize::mib(64)));
    // 31 MiB each.
    for (vm, seed) in [(&first, 1), (&second, 2)] {
        vm.fill(1000..9000, seed);
        fork_settled(vm, 1);
    }
    let out = |vm: &Vm| {
        let taken = (0..4).map(|_| vm.reclaim(ByteSize::mib(31)).expect("reclaim").reclaimed_bytes);
        taken.sum::<u64>()
    };
    assert!(out(&first) >= 30 << 20);
    assert!(out(&second) <= 20 << 20, "there is no room for both: {:?}", home.totals());
    first.verify(1000..9000, 1);
    let before = home.totals();
    let taken = out(&second);
    println!("{taken} bytes more: {:?}", home.totals());
    assert!(taken >= 8 << 20, "{taken}: {before:?} {:?}", home.totals());
    home.check();
    first.verify(1000..9000, 1);
    second.verify(1000..9000, 2);
    home.check();
    home.client().remove_all().expect("rm --all");
    assert_eq!(home.totals().swap_slots, 0);
}

/// Bytes that swap does not give back stop the guest that needs them, with that reason, and nobody else.
#[test]
fn a_broken_disk_stops_who_needs_it() {
    let Some(home) = TestHome::new() else { return };
    let file = home.path().with_file_name("broken");
    let place = format!("{}:256M", file.display());
    let _server = Served::new(&home, &["--swap", &place, "--compressed", "1M"]);
    let vm = home.launch("a", ByteSize::mib(128));
    vm.fill(PAGES, 1);
    let child = fork_settled(&vm, 1).remove(0);
    child.fill(PAGES, 2);
    let other = home.launch("b", ByteSize::mib(16));
    let done = vm.reclaim(ByteSize::mib(200)).expect("reclaim");
    println!("{done:?}");
    wait_until("the tier is written out", TEN_SECONDS, || home.totals().compressed_bytes < 4 << 20);
    let len = fs::metadata(&file).expect("the swap file").len();
    fs::write(&file, vec![0; 48 << 20]).expect("overwrite a part of it");
    File::options().write(true).open(&file).and_then(|file| file.set_len(len)).expect("leave its length");

    let refused = [(&vm, 1), (&child, 2)].map(|(vm, seed)| vm.try_verify(PAGES, seed));
    println!("{refused:?}");
    let listed = home.client().list().expect("ls");
    let dead: Vec<_> = listed.iter().filter(|vm| vm.state == VmState::Dead).collect();
    assert!(!dead.is_empty(), "{listed:?}");
    for vm in dead {
        let reason = vm.reason.as_deref().unwrap_or_default();
        assert!(reason.contains("could not be read back from swap"), "{reason}");
    }
    assert!(refused.iter().any(Result::is_err), "somebody read what is not there: {refused:?}");
    other.fill(1000..2000, 3);
    other.verify(1000..2000, 3);
    home.check();
}

/// A paused VM's memory goes and comes back with it, and it stays paused.
#[test]
fn a_paused_vm_stays_paused() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("a", ByteSize::mib(64));
    vm.fill(1000..9000, 1);
    vm.pause().expect("pause");
    let done = vm.reclaim(ByteSize::mib(32)).expect("reclaim");
    assert!(done.reclaimed_bytes >= 30 << 20, "{done:?}");
    assert_eq!(home.client().list().expect("ls")[0].state, VmState::Paused);
    vm.resume().expect("resume");
    vm.verify(1000..9000, 1);
}

#[test]
fn without_userfaultfd_nothing_is_taken() {
    let setup = Setup { disable: "userfaultfd", ..Setup::default() };
    let Some(home) = setup.home() else { return };
    home.launch("a", ByteSize::mib(16));
    let refusal = home.cli(&["reclaim", "a", "4M"]).failure(2);
    assert!(refusal.contains("userfaultfd"), "{refusal}");
    home.cli(&["budget", "1G"]).failure(2);
    assert_eq!(home.cli(&["budget"]).good(), "none\n");
}

/// A budget that VM processes alone take next to all of cannot be kept, and nobody was told.
#[test]
fn a_budget_tells_its_floor() {
    let Some(home) = TestHome::new() else { return };
    let vm = home.launch("a", ByteSize::mib(16));
    fork_settled(&vm, 47);
    let set = home.cli(&["budget", "16M"]);
    assert_eq!((set.code, set.out.as_str()), (0, "16M\n"), "{set:?}");
    assert!(set.err.starts_with("offshoot: budget: ") && set.err.contains("of 16M cannot be taken out"), "{set:?}");
    let told = home.cli(&["budget", "--json"]).json();
    assert!(told["floor_bytes"].as_u64().is_some_and(|floor| floor > 12 << 20), "{told}");
    // Of a large one nothing needs to be said.
    home.cli(&["budget", "4G"]).good();
}

#[test]
fn bad_input_is_refused() {
    let Some(home) = TestHome::new() else { return };
    let mine = home.path().with_file_name("mine");
    let place = format!("{}:8M", mine.display());
    let _server = Served::new(&home, &["--swap", &place, "--memory", "1G"]);
    assert_eq!(home.cli(&["budget", "--json"]).json()["budget_bytes"], Value::from(1_u64 << 30));
    home.launch("a", ByteSize::mib(16));
    for words in [
        &["reclaim", "nobody", "1M"][..],
        &["reclaim", "a", "1Q"],
        &["reclaim", "a"],
        &["reclaim", "--all", "much"],
        &["reclaim", "a", "1M", "--all"],
        &["budget", "x"],
        &["budget", "1M"],
    ] {
        home.cli(words).failure(2);
    }
    assert!(home.cli(&["budget"]).good().starts_with("1G (floor "));

    let other = TestHome::new().expect("as above");
    for words in [
        &["serve", "--swap", place.as_str()][..],
        &["serve", "--swap", "/no/such/directory/swap:8M"],
        &["serve", "--swap", "/:8M"],
        &["serve", "--swap", "/tmp/x:8Q"],
        &["serve", "--compressed", "-1"],
        &["serve", "--memory", "1"],
    ] {
        let said = other.cli(words).failure(2);
        assert!(said.starts_with("offshoot: serve: "), "{said}");
    }
    assert_eq!(other.files(), ["lock"]);
    let _ = fs::remove_file(other.path().join("lock"));
}
