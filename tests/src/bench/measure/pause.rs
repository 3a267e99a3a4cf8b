//! The parent's pause over what it has written in one piece since its last fork.

use super::{Points, curve};
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{fork_settled, say};
use crate::reference::Reference;

const RAM: u64 = 512;
/// What a pause may cost besides, in µs.
pub const PLUS: f64 = 300.0;
/// Where page tables begin, as in the reference.
const FIRST: u64 = 512;

pub fn run(bench: &mut Bench) -> Result<()> {
    let sizes = [0_u64, 16, 64, 256];
    let home = bench.home()?;
    let parent = home.launch_settled("p", RAM, 0)?;
    let mut move_out = Reference::start("move-out", &[RAM])?;
    let [mut ours, mut theirs] = [(); 2].map(|()| Points::at(sizes));
    let mut firsts = Points::at(sizes);
    for _ in bench.rounds(12, 3) {
        for (index, pages) in sizes.map(|mib| mib << 8).into_iter().enumerate() {
            for _ in 0..if pages == 0 { bench.pick(10, 4) } else { 1 } {
                if pages > 0 {
                    say(&parent, &format!("touch {FIRST} {pages} 2"))?;
                }
                home.rest(1)?;
                let (child, times) = fork_settled(&parent)?;
                child.remove()?;
                home.rest(1)?;
                ours.push(index, times.pause);
                firsts.push(index, times.first);
                theirs.push(index, move_out.figure(format!("contiguous {pages}"))?);
            }
        }
    }
    for (index, mib) in sizes.into_iter().enumerate() {
        let (ours, theirs) = (&ours.points[index].1, &theirs.points[index].1);
        let aim = Aim::AtMostPlus { times: 2.0, plus: PLUS };
        let reference = Some(("bare move-out", theirs));
        bench.figure(&Figure { of: format!("{mib} MiB"), unit: "us", subject: ours, reference, aim });
        let of = format!("{mib} MiB/first-instruction");
        bench.figure(&Figure { of, unit: "us", subject: &firsts.points[index].1, reference: None, aim: Aim::Report });
    }
    let series = vec![ours.series("Offshoot: pause"), theirs.series("bare move-out")];
    let x = "written in one piece since the last fork (MiB), of 512 MiB";
    bench.curve(curve("pause", "The parent's pause over what it has written", x, "µs, median", series));
    let title = "Fork to the child's first instruction over what the parent has written";
    bench.curve(curve("private", title, x, "µs, median", vec![firsts.series("Offshoot: first instruction")]));
    Ok(())
}
