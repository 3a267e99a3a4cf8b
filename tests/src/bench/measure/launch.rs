//! A launch of the built-in guest, as the client sees it.

use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::wait;
use crate::processes;
use crate::reference::Reference;
use crate::stats::{Samples, timed};

const MIB: u64 = 256;

pub fn run(bench: &mut Bench) -> Result<()> {
    let home = bench.home()?;
    let [mut ours, mut theirs] = [(); 2].map(|()| Samples::default());
    for _ in bench.rounds(100, 20) {
        let (vm, us) = timed(|| home.launch("p", MIB));
        ours.push(us);
        drop(vm?);
        // No pool is left for the next.
        home.client().remove_all()?;
        wait("all are gone", || processes::vms_of(home.server()).is_empty().then_some(()))?;
        let (bare, us) = timed(|| Reference::start("bare-launch", &[MIB]));
        theirs.push(us);
        drop(bare?);
    }
    let reference = Some(("bare launch", &theirs));
    bench.figure(&Figure { of: String::new(), unit: "us", subject: &ours, reference, aim: Aim::AtMost(2.0) });
    Ok(())
}
