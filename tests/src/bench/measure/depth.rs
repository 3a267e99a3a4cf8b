//! The first instruction over the depth of the parent: clones of clones, each of which has written something.

use super::{Points, curve, sample};
use crate::Result;
use crate::bench::Bench;
use crate::home::{fork_settled, say};
use vmm::client::ForkOptions;

/// 32 MiB written by the first.
const PRIVATE: u64 = 8192;
/// Pages that each generation writes.
const OWN: u64 = 64;

pub fn run(bench: &mut Bench) -> Result<()> {
    let depths: &[u64] = bench.pick(&[1, 2, 4, 8, 16, 32, 64], &[1, 8, 64]);
    let home = bench.home()?;
    let mut family = vec![home.launch_settled("p", 256, PRIVATE)?];
    let deepest = depths.last().copied().unwrap_or(1);
    for depth in 1..=deepest {
        let parent = &family[depth as usize - 1];
        // Names that tell all generations would become too long.
        let options = ForkOptions::new().wait_settled(true).prefix(format!("d{depth}"));
        let child = parent.fork(options)?.remove(0).vm;
        say(&child, &format!("touch {} {OWN} {depth}", 64 + depth * OWN))?;
        family.push(child);
    }
    // All that they have written settles, so that no sample moves anything.
    for vm in &family {
        for _ in 0..2 {
            fork_settled(vm)?.0.remove()?;
        }
    }
    let mut ours = Points::at(depths.iter().copied());
    for _ in bench.rounds(60, 15) {
        for (index, &depth) in depths.iter().enumerate() {
            ours.push(index, sample(&home, &family[depth as usize], family.len())?.first);
        }
    }
    ours.tell_flat(bench, "");
    let title = "Fork to the child's first instruction over the parent's depth";
    let series = vec![ours.series("Offshoot")];
    bench.curve(curve(
        "depth",
        title,
        "generations above the parent, each with 64 pages of its own",
        "µs, median",
        series,
    ));
    Ok(())
}
