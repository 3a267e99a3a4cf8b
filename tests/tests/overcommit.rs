//! More memory than there is: many clones under a budget; and what they share goes out once and comes back once.

use offshoot_tests::process::host_memory;
use offshoot_tests::{Guest, TEN_SECONDS, TestHome, each, fork_settled, wait_until};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vmm::api::VmState;
use vmm::units::ByteSize;

/// How often memory is looked at.
const SAMPLE: Duration = Duration::from_millis(100);

/// The most memory that a server had.
#[derive(Clone, Copy, Debug, Default)]
struct Most {
    samples: u32,
    /// As the server accounts for it.
    accounted: u64,
    /// As the server finds its processes and stores.
    host: u64,
    /// As we find them.
    measured: u64,
}

/// Looks at memory while `act` goes on.
fn watched(home: &TestHome, act: impl FnOnce()) -> Most {
    let server = home.server().expect("a server");
    let first = home.client().list().expect("ls").remove(0).name;
    let first = home.client().vm(first);
    let done = AtomicBool::new(false);
    let watch = || {
        let mut most = Most::default();
        let mut next = Instant::now();
        while !done.load(Ordering::Relaxed) {
            // All pages of all VMs are not counted for this.
            let totals = first.stats_and_totals().expect("stats").total;
            most.samples += 1;
            most.accounted = most.accounted.max(totals.accounted_bytes);
            most.host = most.host.max(totals.host_bytes);
            most.measured = most.measured.max(host_memory(server));
            next += SAMPLE;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        most
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
    let most = watched(&home, || {
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
    let part = |bytes: u64| bytes as f64 / budget as f64;
    println!(
        "of {} MiB: accounted {:.3}, host {:.3}, measured {:.3} ({} samples); {:?}",
        budget >> 20,
        part(most.accounted),
        part(most.host),
        part(most.measured),
        most.samples,
        home.totals()
    );
    home.check();
    let listed = home.client().list().expect("ls");
    assert!(listed.iter().all(|vm| vm.state == VmState::Running), "{listed:?}");
    let totals = home.totals();
    assert!(totals.swap_out_pages >= (distinct - budget) / 4096 && totals.lost_pages == 0, "{totals:?}");
    assert!(part(most.accounted) <= 1.05, "{most:?} for a budget of {budget}");
    assert!(part(most.host) <= 1.10 && part(most.measured) <= 1.10, "{most:?} for a budget of {budget}");
}
