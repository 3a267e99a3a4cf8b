//! The choice of what to evict, over the number of VMs: the memory manager's books alone, on windows and stores that are
//! counters, since a thousand real VMs do not fit everywhere.

use crate::aim::Aim;
use crate::bench::Bench;
use crate::books::{self, Books, Nothing, freeze, write_back};
use crate::entry::Figure;
use crate::stats::{Samples, timed};
use crate::{Result, fail};
use guest_mem::{Activity, Gfn, GfnRange, PageCount};

const RAM: PageCount = PageCount(65536);
/// Clusters of 16 pages that there are to choose from, whoever's.
const CLUSTERS: u64 = 4000;
const CLUSTER: PageCount = PageCount(16);

pub fn run(bench: &mut Bench) -> Result<()> {
    for (what, pace) in [("all run", Activity::Running), ("half are idle", Activity::Idle)] {
        let [mut few, mut many] = [(); 2].map(|()| Samples::default());
        let (mut small, mut large) = (family(10, pace)?, family(1000, pace)?);
        for _ in bench.rounds(1000, 300) {
            few.push(evict(&mut small)?);
            many.push(evict(&mut large)?);
        }
        let of = format!("1,000 VMs, {what}");
        let reference = Some(("10 VMs", &few));
        bench.figure(&Figure { of, unit: "us", subject: &many, reference, aim: Aim::AtMost(1.5) });
    }
    bench.note(
        "guest-mem alone, without a kernel: one cluster is chosen and evicted at a time; no guest runs in this one",
    );
    Ok(())
}

/// A family of so many VMs. Each has frozen its part of the clusters; every second one is of that pace.
fn family(vms: u64, pace: Activity) -> Result<Books> {
    let (mut family, root) = books::launched(RAM)?;
    let mut all = vec![root];
    for nth in 0..vms {
        let vm = if nth == 0 { root } else { family.fork(root, Nothing::default())? };
        freeze(&mut family, vm, GfnRange::new(Gfn(nth * 16 % 32768), PageCount(CLUSTERS / vms * CLUSTER.0)))?;
        write_back(&mut family)?;
        all.push(vm);
    }
    all.iter().step_by(2).try_for_each(|&vm| family.set_activity(vm, pace))?;
    Ok(family)
}

fn evict(family: &mut Books) -> Result<f64> {
    let (evicted, us) = timed(|| family.evict_some(CLUSTER));
    if evicted.pages == CLUSTER { Ok(us) } else { fail(format!("a cluster was to be evicted: {evicted:?}")) }
}
