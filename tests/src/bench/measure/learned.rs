//! A clone that writes what its siblings wrote, beside one whose siblings wrote nothing.

use super::PRIVATE;
use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{FIRST_PAGE, Home, fork, say};
use crate::stats::{Samples, timed};
use vmm::client::Vm;

const MIB: u64 = 256;
const COUNT: u64 = 1000;

pub fn run(bench: &mut Bench) -> Result<()> {
    let home = bench.home()?;
    let known = home.launch_settled("k", MIB, PRIVATE)?;
    // Siblings to learn from.
    for _ in 0..5 {
        time_of_writes(&home, 1, &known)?;
    }
    let [mut with, mut without] = [(); 2].map(|()| Samples::default());
    for _ in bench.rounds(40, 8) {
        with.push(time_of_writes(&home, 1, &known)?);
        // Of the clones of a new VM nobody knows anything.
        let fresh = home.launch_settled("f", MIB, PRIVATE)?;
        without.push(time_of_writes(&home, 2, &fresh)?);
        fresh.remove()?;
    }
    let reference = Some(("siblings that wrote nothing", &without));
    bench.figure(&Figure { of: "1,000 pages".into(), unit: "us", subject: &with, reference, aim: Aim::AtMost(0.35) });
    bench.note("from the client's request for the fork to the answer that the last page is written");
    Ok(())
}

fn time_of_writes(home: &Home, vms: usize, parent: &Vm) -> Result<f64> {
    home.rest(vms)?;
    let (child, us) = timed(|| {
        let (child, _) = fork(parent)?;
        say(&child, &format!("touch {FIRST_PAGE} {COUNT} 3"))?;
        Ok::<_, crate::Error>(child)
    });
    child?.remove()?;
    Ok(us)
}
