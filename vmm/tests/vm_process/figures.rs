//! What things cost here.

use crate::family::{Family, Machine};
use nix::time::{ClockId, clock_gettime};
use std::time::Instant;
use vmm::wire::{Origin, RunState};

const MEM: u64 = 256 << 20;

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

pub fn figures() {
    let mut family = Family::new(MEM);
    let prepare: Vec<u64> = (0..10)
        .map(|_| {
            let before = Instant::now();
            let worker = family.prepare();
            let elapsed = before.elapsed().as_micros() as u64;
            drop(worker);
            elapsed
        })
        .collect();
    println!("  exec and prepare a VM process: {} us", median(prepare));

    for mib in [0_u64, 1, 16, 64] {
        let mut parent = family.launch();
        // The first freeze takes everything and turns the dirty log on.
        drop(family.fork(&mut parent, "first"));
        let pages = mib << 8;
        let (mut pauses, mut ready, mut sign, mut moved) = (vec![], vec![], vec![], 0);
        for round in 0..9_u64 {
            if pages > 0 {
                parent.worker.ok(&format!("fill 1024 {pages} {round}"));
            }
            let frozen = family.freeze(&mut parent);
            pauses.push(frozen.pause_ns.unwrap() / 1000);
            moved = frozen.harvest.private().iter().map(|range| range.count().0).sum();
            if moved > 0 {
                family.settle(&mut parent, &frozen);
            }
            let mut worker = family.prepare();
            let (start, fds) = family.start("child", &parent.runs, Origin::Fork { index: 1 }, RunState::Running);
            let asked = now_ns();
            worker.start(start, &fds);
            worker.load(&frozen.state);
            let (running, alive) = (worker.running(), worker.first_sign());
            ready.push((running - asked) / 1000);
            sign.push((alive - asked) / 1000);
            let mut child = Machine { worker, runs: parent.runs.clone() };
            if pages > 0 {
                child.worker.ok(&format!("verify 1024 {pages} {round}"));
            }
        }
        println!(
            "  {mib} MiB written: {moved} pages moved, pause {} us (max {}), child runs after {} us, first sign {} us",
            median(pauses.clone()),
            pauses.iter().max().unwrap(),
            median(ready),
            median(sign),
        );
    }
}
