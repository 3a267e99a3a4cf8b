//! More memory than there is: many clones under a budget; and what they share goes out once and comes back once.

use offshoot_tests::process::host_memory;
use offshoot_tests::{Guest, Served, TEN_SECONDS, TestHome, each, fork_settled, wait_until};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vmm::api::VmState;
use vmm::units::ByteSize;

/// How often memory is looked at.
const SAMPLE: Duration = Duration::from_millis(100);

/// What memory a server had when it was looked at.
#[derive(Clone, Debug, Default)]
struct Samples {
    /// As the server accounts for it.
    accounted: Vec<u64>,
    /// As the server finds its processes and stores.
    host: Vec<u64>,
    /// As we find them.
    measured: Vec<u64>,
}

/// What all but one sample in fifty were below, and what all were below, as parts of `budget`. (This host may be
/// anybody's: a server that was not let run for a while cannot stop anybody.)
fn most(samples: &[u64], budget: u64) -> (f64, f64) {
    let mut sorted: Vec<f64> = samples.iter().map(|bytes| *bytes as f64 / budget as f64).collect();
    sorted.sort_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) * 49 / 50], sorted[sorted.len() - 1])
}

/// Looks at memory while `act` goes on.
fn watched(home: &TestHome, act: impl FnOnce()) -> Samples {
    let server = home.server().expect("a server");
    let first = home.client().list().expect("ls").remove(0).name;
    let first = home.client().vm(first);
    let done = AtomicBool::new(false);
    let watch = || {
        let mut samples = Samples::default();
        let mut next = Instant::now();
        while !done.load(Ordering::Relaxed) {
            // All pages of all VMs are not counted for this.
            let totals = first.stats_and_totals().expect("stats").total;
            samples.accounted.push(totals.accounted_bytes);
            samples.host.push(totals.host_bytes);
            samples.measured.push(host_memory(server));
            next += SAMPLE;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        samples
    };
    thread::scope(|scope| {
        let watch = scope.spawn(watch);
        act();
        done.store(true, Ordering::Relaxed);
        watch.join().expect("watch memory")
    })
}

/// Forty clones write four times what the budget allows, and each has all its pages afterwards.
#[test]
fn forty_clones_in_a_quarter_of_the_memory_they_need() {
    let Some(home) = TestHome::alone() else { return };
    const CLONES: u64 = 40;
    const SHARED: Range<u64> = 1000..1000 + 8192;
    // 24 MiB each: half over what all see, half where nobody has written.
    const OWN: u64 = 6144;
    let over = |index: usize| SHARED.start + index as u64 * 125..SHARED.start + index as u64 * 125 + OWN / 2;
    let fresh = |index: usize| 12_000 + index as u64 * 1000..12_000 + index as u64 * 1000 + OWN / 2;
    let seed = |index: usize| 10 + index as u64;

    let parent = home.launch("a", ByteSize::mib(256));
    parent.fill(SHARED, 1);
    let clones = fork_settled(&parent, CLONES as u32);
    let distinct = (SHARED.end - SHARED.start + CLONES * OWN) * 4096;
    let budget = distinct / 4;
    home.client().set_budget(Some(ByteSize(budget))).expect("a budget");
    wait_until("the budget is kept", TEN_SECONDS, || home.totals().accounted_bytes <= budget);

    let start = Instant::now();
    let samples = watched(&home, || {
        each(&clones, |index, clone| {
            clone.fill(over(index), seed(index));
            clone.fill(fresh(index), seed(index));
        });
        println!("written after {:?}", start.elapsed());
        each(&clones, |index, clone| {
            clone.verify(over(index), seed(index));
            clone.verify(fresh(index), seed(index));
        });
        println!("read after {:?}", start.elapsed());
    });
    each(&clones, |index, clone| {
        clone.verify(SHARED.start..over(index).start, 1);
        clone.verify(over(index).end..SHARED.end, 1);
        clone.verify_zero(fresh(index).end..fresh(index).end + 100);
    });
    parent.verify(SHARED, 1);
    println!("all verified after {:?}", start.elapsed());
    let [accounted, host, measured] =
        [&samples.accounted, &samples.host, &samples.measured].map(|samples| most(samples, budget));
    println!(
        "of {} MiB, in 98 % and at most: accounted {accounted:.3?}, host {host:.3?}, measured {measured:.3?}; {} samples; {:?}",
        budget >> 20,
        samples.accounted.len(),
        home.totals()
    );
    home.check();
    let listed = home.client().list().expect("ls");
    assert!(listed.iter().all(|vm| vm.state == VmState::Running), "{listed:?}");
    let totals = home.totals();
    assert!(totals.swap_out_pages >= (distinct - budget) / 4096 && totals.lost_pages == 0, "{totals:?}");
    assert!(accounted.0 <= 1.05 && accounted.1 <= 1.10, "accounted {accounted:?} of a budget of {budget}");
    assert!(host.0 <= 1.10 && host.1 <= 1.15, "host {host:?} of a budget of {budget}");
    assert!(measured.0 <= 1.10 && measured.1 <= 1.15, "measured {measured:?} of a budget of {budget}");
}

/// A region that two hundred clones see is written to swap once, read once, and is shared again.
#[test]
fn what_two_hundred_share_goes_once_and_comes_once() {
    let Some(home) = TestHome::alone() else { return };
    const SHARED: Range<u64> = 1000..5096;
    const COUNT: u64 = SHARED.end - SHARED.start;
    // What the monitors touch besides.
    const FEW: u64 = 300;
    let _server = Served::new(&home, &["--compressed", "1M"]);
    let parent = home.launch("a", ByteSize::mib(64));
    parent.fill(SHARED, 1);
    let clones = fork_settled(&parent, 199);
    each(&clones, |_, clone| clone.verify(SHARED, 1));
    let server = home.server().expect("a server");
    let (before, before_bytes) = (home.totals(), host_memory(server));

    let done = home.client().reclaim_all(ByteSize::mib(16)).expect("reclaim");
    assert!(done.reclaimed_bytes >= 15 << 20, "{done:?}");
    wait_until("the tier is written out", TEN_SECONDS, || home.totals().compressed_bytes < 4 << 20);
    let (out, out_bytes) = (home.totals(), host_memory(server));
    let written = out.swap_write_pages - before.swap_write_pages;
    println!("out: {written} pages written, {} KiB less", before_bytes.saturating_sub(out_bytes) >> 10);
    assert!((COUNT - FEW..=COUNT + FEW).contains(&(out.swap_out_pages - before.swap_out_pages)), "{out:?}");
    assert!(written <= COUNT + FEW && out.resident_pages <= FEW, "{out:?}");
    assert!(before_bytes.saturating_sub(out_bytes) >= 10 << 20, "{before_bytes} bytes before, {out_bytes} after");

    let start = Instant::now();
    each(&clones, |_, clone| clone.verify(SHARED, 1));
    println!("200 have seen all of it after {:?}", start.elapsed());
    let (back, back_bytes) = (home.totals(), host_memory(server));
    let read = back.swap_in_pages - out.swap_in_pages;
    println!("back: {read} pages, {} KiB more; {back:?}", back_bytes.saturating_sub(out_bytes) >> 10);
    assert!((COUNT - FEW..=COUNT + FEW).contains(&read), "{read} of {COUNT}: {back:?}");
    // What came in privately, two hundred times, would be gigabytes.
    assert!(back_bytes <= before_bytes + (16 << 20), "{before_bytes} bytes before, {back_bytes} after");
    let stats = home.client().stats().expect("stats");
    for vm in &stats.vms {
        assert!(vm.shared_pages >= COUNT - FEW && vm.private_pages <= FEW, "{vm:?}");
    }
    home.check();

    // Nobody has written since: a second time costs no write.
    let again = home.client().reclaim_all(ByteSize::mib(16)).expect("reclaim again");
    let end = home.totals();
    assert!(
        again.reclaimed_bytes >= 15 << 20 && end.clean_eviction_pages - back.clean_eviction_pages >= COUNT - FEW,
        "{end:?}"
    );
    assert!(end.swap_write_pages <= back.swap_write_pages + FEW, "{end:?}");
    // Nobody sees it any more, and it goes without having been read.
    each(&clones, |index, clone| clone.fill(SHARED.start..SHARED.start + 256, 10 + index as u64));
    parent.fill(SHARED.start..SHARED.start + 256, 2);
    home.client().remove(clones.iter().map(|clone| clone.name().to_owned())).expect("rm");
    fork_settled(&parent, 1);
    let end = home.totals();
    assert!(end.discarded_pages - back.discarded_pages >= 256, "{end:?}");
    parent.verify(SHARED.start + 256..SHARED.end, 1);
    home.check();
    home.client().remove_all().expect("rm --all");
    assert_eq!(home.totals().swap_slots, 0);
}
