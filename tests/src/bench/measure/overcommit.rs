//! Memory beside its budget, while clones write four times as much as fits.

use super::clones;
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{FIRST_PAGE, fork_settled, say, wait};
use crate::processes::Group;
use crate::stats::Samples;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use vmm::units::ByteSize;

/// Pages that each clone writes for its own: 16 MiB.
const OWN: u64 = 4096;

pub fn run(bench: &mut Bench) -> Result<()> {
    let count = bench.pick(40, 8);
    let group = Group::new("budget");
    let home = bench.home()?;
    if let Some(group) = &group {
        group.admit(home.server())?;
    }
    let parent = home.launch("p", 256)?;
    say(&parent, &format!("fill {FIRST_PAGE} {OWN} 1"))?;
    fork_settled(&parent)?.0.remove()?;
    let clones = clones(&parent, count as usize)?;
    let budget = (count + 1) * OWN * 4096 / 4;
    let client = home.client();
    client.set_budget(Some(ByteSize(budget)))?;
    let accounted = || Some(client.stats().ok()?.total.accounted_bytes);
    wait("the budget is kept", || accounted().filter(|&bytes| bytes <= budget))?;

    let done = AtomicBool::new(false);
    let watch = || {
        let [mut ours, mut hosts] = [(); 2].map(|()| Samples::default());
        while !done.load(Ordering::Relaxed) {
            // One that could not be taken is not a sample.
            if let Some(bytes) = accounted() {
                ours.push(bytes as f64 / f64::from(1 << 20));
            }
            if let Some(bytes) = group.as_ref().and_then(Group::user_bytes) {
                hosts.push(bytes as f64 / f64::from(1 << 20));
            }
            thread::sleep(Duration::from_millis(100));
        }
        (ours, hosts)
    };
    // Two write at a time, as many as the smallest host has processors; then all is verified.
    let write = |half: usize| -> Result<()> {
        let range = format!("{FIRST_PAGE} {OWN}");
        for verb in ["fill", "verify"] {
            for (index, clone) in clones.iter().enumerate().skip(half).step_by(2) {
                say(clone, &format!("{verb} {range} {}", 10 + index))?;
            }
        }
        Ok::<_, crate::Error>(())
    };
    let (ours, hosts) = thread::scope(|scope| {
        let watch = scope.spawn(watch);
        let writers = [0, 1].map(|half| scope.spawn(move || write(half)));
        let written = writers.map(|writer| writer.join().unwrap_or_else(|_| Err("a writer panicked".into())));
        done.store(true, Ordering::Relaxed);
        let watched = watch.join().map_err(|_| "the watch panicked")?;
        written.into_iter().collect::<Result<Vec<()>>>()?;
        Ok::<_, crate::Error>(watched)
    })?;
    let limit: Samples = [budget as f64 / f64::from(1 << 20)].into_iter().collect();
    for (what, samples, aim) in [("accounted", &ours, 1.05), ("as the host counts", &hosts, 1.10)] {
        // What the worst moment says, not the middle one.
        let worst: Samples = [samples.p99()].into_iter().collect();
        let of = format!("{what}, p99 of {} samples", samples.len());
        bench.figure(&Figure {
            of,
            unit: "MiB",
            subject: &worst,
            reference: Some(("budget", &limit)),
            aim: Aim::AtMost(aim),
        });
    }
    bench.note(format!("{count} clones write and verify {OWN} pages each, two at a time; sampled every 100 ms"));
    bench.note("as the host counts: anonymous and shared memory of the server's control group, its own heap and stacks included");
    Ok(())
}
