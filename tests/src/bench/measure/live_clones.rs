//! The first instruction over the number of live clones.

use super::{PRIVATE, Points, clones, curve, sample};
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::reference::Reference;
use crate::stats::Samples;

const MIB: u64 = 256;

pub fn run(bench: &mut Bench) -> Result<()> {
    let counts: &[u64] = bench.pick(&[1, 10, 50, 100, 200, 500], &[1, 10, 100]);
    let (alone, crowded) = (bench.home()?, bench.home()?);
    let lone_parent = alone.launch_settled("p", MIB, PRIVATE)?;
    let parent = crowded.launch_settled("p", MIB, PRIVATE)?;
    let _clone = clones(&lone_parent, 1)?;
    let mut floor = Reference::start("floor", &[MIB, PRIVATE])?;
    let [mut ours, mut lone, mut others] = [(); 3].map(|()| Points::at(counts.iter().copied()));
    let mut live = 0;
    for (index, &count) in counts.iter().enumerate() {
        clones(&parent, count as usize - live)?;
        live = count as usize;
        let mut in_process = Reference::start("in-process", &[MIB, PRIVATE, count])?;
        let mut floors = Samples::default();
        for _ in bench.rounds(60, 15) {
            ours.push(index, sample(&crowded, &parent, 1 + live)?.first);
            lone.push(index, sample(&alone, &lone_parent, 2)?.first);
            others.push(index, in_process.figure("fork")?);
            floors.push(floor.figure("fork")?);
        }
        let subject = &ours.points[index].1;
        let of = format!("first-instruction/{count}");
        let flat = Some(("1 live clone", &lone.points[index].1));
        bench.figure(&Figure { of: of.clone(), unit: "us", subject, reference: flat, aim: Aim::AtMost(1.2) });
        let aim = match count {
            10 => Aim::AtMostOrFloor { times: 0.6, floor: floors.median() },
            500 => Aim::AtMostOrFloor { times: 0.2, floor: floors.median() },
            _ => Aim::Report,
        };
        let name = format!("in-process, {count} live");
        let reference = Some((name.as_str(), &others.points[index].1));
        bench.figure(&Figure { of: of.clone(), unit: "us", subject, reference, aim });
        bench.figure(&Figure { of, unit: "us", subject, reference: Some(("floor", &floors)), aim: Aim::Report });
    }
    bench.note(
        "each point beside a server with one live clone, in turn: a machine that slows down meanwhile does not show",
    );
    let series = vec![
        ours.series("Offshoot"),
        lone.series("Offshoot with 1 live clone, at the same time"),
        others.series("in-process"),
    ];
    let title = "Fork to the child's first instruction over live clones";
    bench.curve(curve("live-clones", title, "live clones", "µs, median", series));
    Ok(())
}
