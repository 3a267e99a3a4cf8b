//! The first fork of a launched VM that has written much.

use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{FIRST_PAGE, fork, say};
use crate::stats::Samples;

pub fn run(bench: &mut Bench) -> Result<()> {
    let mib: u64 = bench.pick(1024, 256);
    let line = format!("touch {FIRST_PAGE} {} 2", mib << 8);
    let [mut pause, mut first, mut before, mut after] = [(); 4].map(|()| Samples::default());
    for _ in bench.rounds(3, 1) {
        let home = bench.home()?;
        let vm = home.launch("p", mib + 256)?;
        say(&vm, &line)?;
        before.push(say(&vm, &line)? / 1e3);
        home.rest(1)?;
        let (_child, times) = fork(&vm)?;
        after.push(say(&vm, &line)? / 1e3);
        pause.push(times.pause);
        first.push(times.first);
    }
    for (what, subject) in [("pause", &pause), ("first-instruction", &first)] {
        let of = format!("{mib} MiB/{what}");
        bench.figure(&Figure { of, unit: "us", subject, reference: None, aim: Aim::Report });
    }
    let of = format!("{mib} MiB/parent's next pass");
    let reference = Some(("its pass before", &before));
    bench.figure(&Figure { of, unit: "ms", subject: &after, reference, aim: Aim::Report });
    Ok(())
}
