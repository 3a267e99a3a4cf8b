//! Taking a cluster of 64 KiB out of memory, over the number of those who see it.

use super::{Points, clones, curve};
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{FIRST_PAGE, say};
use crate::stats::timed;
use crate::{Result, fail};
use vmm::client::Vm;
use vmm::units::ByteSize;

const CLUSTER: ByteSize = ByteSize(64 << 10);
/// Pages that all viewers have read, and nobody has written since.
const PAGES: u64 = 2048;

pub fn run(bench: &mut Bench) -> Result<()> {
    let viewers: &[u64] = bench.pick(&[1, 10, 200], &[1, 10, 50]);
    let mut ours = Points::at(viewers.iter().copied());
    for (index, &count) in viewers.iter().enumerate() {
        let home = bench.home()?;
        let parent = home.launch_settled("p", 64, PAGES)?;
        let clones = clones(&parent, count as usize - 1)?;
        let all: Vec<&Vm> = clones.iter().chain([&parent]).collect();
        for vm in &all {
            say(vm, &format!("verify {FIRST_PAGE} {PAGES} 1"))?;
        }
        for _ in bench.rounds(60, 20) {
            let (done, us) = timed(|| parent.reclaim(CLUSTER));
            let bytes = done?.reclaimed_bytes;
            if bytes == 0 {
                return fail("nothing is taken out");
            }
            ours.push(index, us * CLUSTER.0 as f64 / bytes as f64);
        }
    }
    for (count, samples) in &ours.points {
        let of = format!("64 KiB, {count} viewers");
        bench.figure(&Figure { of, unit: "us", subject: samples, reference: None, aim: Aim::Report });
    }
    let title = "Taking 64 KiB out of memory (compressed tier) over viewers";
    bench.curve(curve("evict", title, "VMs that have the pages mapped", "µs, median", vec![ours.series("Offshoot")]));
    bench.note("the client's clock: a request for 64 KiB, which the server may overdo; scaled to 64 KiB");
    Ok(())
}
