//! The first instruction over the size of memory.

use super::{Points, curve, sample};
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::reference::Reference;

/// 32 MiB, whatever the size.
const PRIVATE: u64 = 8192;

pub fn run(bench: &mut Bench) -> Result<()> {
    let wanted: &[u64] = bench.pick(&[64, 256, 1024, 2048, 4096, 8192], &[64, 1024, 8192]);
    let room = vmm::host::available_memory()? >> 20;
    let (sizes, left_out): (Vec<u64>, Vec<u64>) = wanted.iter().partition(|&&mib| mib < room);
    if !left_out.is_empty() {
        bench.note(format!("SKIPPED: {left_out:?} MiB: this host can give {room}"));
    }
    // A home each: every size has a pool of its own.
    let mut homes = Vec::new();
    for &mib in &sizes {
        let home = bench.home()?;
        let parent = home.launch_settled("p", mib, PRIVATE)?;
        let floor = Reference::start("floor", &[mib, PRIVATE])?;
        let in_process = Reference::start("in-process", &[mib, PRIVATE, 0])?;
        homes.push((home, parent, floor, in_process));
    }
    let [mut ours, mut floors, mut others] = [(); 3].map(|()| Points::at(sizes.iter().copied()));
    for _ in bench.rounds(60, 12) {
        for (index, (home, parent, floor, in_process)) in homes.iter_mut().enumerate() {
            ours.push(index, sample(home, parent, 1)?.first);
            floors.push(index, floor.figure("fork")?);
            others.push(index, in_process.figure("fork")?);
        }
    }
    ours.tell_flat(bench, " MiB");
    for (name, references) in [("floor", &floors), ("in-process, no other VM live", &others)] {
        for ((mib, subject), (_, reference)) in ours.points.iter().zip(&references.points) {
            let (of, reference) = (format!("first-instruction/{mib} MiB"), Some((name, reference)));
            bench.figure(&Figure { of, unit: "us", subject, reference, aim: Aim::Report });
        }
    }
    let series = vec![ours.series("Offshoot"), floors.series("floor"), others.series("in-process, no other VM live")];
    let title = "Fork to the child's first instruction over RAM size";
    bench.curve(curve("ram", title, "RAM (MiB), 32 MiB of it written", "µs, median", series));
    Ok(())
}
