//! What the parent pays while its pages settle.

use super::PRIVATE;
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{FIRST_PAGE, fork, say, wait};
use crate::reference::Reference;
use crate::stats::Samples;

const MIB: u64 = 256;

pub fn run(bench: &mut Bench) -> Result<()> {
    let home = bench.home()?;
    let parent = home.launch_settled("p", MIB, PRIVATE)?;
    let mut remapped = Reference::start("remapped", &[MIB, PRIVATE])?;
    let [mut ours, mut theirs] = [(); 2].map(|()| Samples::default());
    let line = format!("touch {FIRST_PAGE} {PRIVATE} 2");
    for _ in bench.rounds(10, 3) {
        // All of it is private again, then moves.
        say(&parent, &line)?;
        home.rest(1)?;
        let (child, _) = fork(&parent)?;
        ours.push(say(&parent, &line)? / PRIVATE as f64);
        wait("all has settled", || (home.client().stats().ok()?.total.unsettled_pages == 0).then_some(()))?;
        child.remove()?;
        home.rest(1)?;
        theirs.push(remapped.figure("again")? / PRIVATE as f64);
    }
    let reference = Some(("in-process VM, just remapped", &theirs));
    bench.figure(&Figure { of: String::new(), unit: "us/page", subject: &ours, reference, aim: Aim::AtMost(1.5) });
    Ok(())
}
