//! The choice of what to evict, over the number of VMs: the memory manager's books alone, on windows and stores that are
//! counters, since a thousand real VMs do not fit everywhere.

use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::stats::{Samples, timed};
use crate::{Result, fail};
use guest_mem::ids::SwapSlot;
use guest_mem::store::{FileStore, Store, StoreFactory};
use guest_mem::swap::{Fetch, Swap};
use guest_mem::{
    Activity, Destination, Failure, Gfn, GfnRange, Harvest, Manager, PageCount, PageIndex, Protection, StoreId, VmId,
    Window, stage2,
};
use std::io;

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

type Family = Manager<Counters, Nothing>;

/// A family of so many VMs. Each has frozen its part of the clusters; every second one is of that pace.
fn family(vms: u64, pace: Activity) -> Result<Family> {
    let ram = [GfnRange::new(Gfn(0), RAM)];
    let mut family: Family = Manager::new(stage2::Shape::X86_64, RAM, Counters::default());
    let root = family.launch(&ram, &[], &[], Nothing)?;
    let mut all = vec![root];
    for nth in 0..vms {
        let vm = if nth == 0 { root } else { family.fork(root, Nothing) };
        freeze(&mut family, vm, GfnRange::new(Gfn(nth * 16 % 32768), PageCount(CLUSTERS / vms * CLUSTER.0)))?;
        all.push(vm);
    }
    all.iter().step_by(2).for_each(|&vm| family.set_activity(vm, pace));
    Ok(family)
}

fn freeze(family: &mut Family, vm: VmId, pages: GfnRange) -> Result<()> {
    family.begin_freeze(vm, Destination::Store)?;
    family.stands(vm);
    family.finish_freeze(vm, &Harvest { moved: vec![pages], moved_private: vec![pages], ..Harvest::default() });
    while family.write_back(guest_mem::manager::WRITEBACK_BATCH)? {}
    Ok(())
}

fn evict(family: &mut Family) -> Result<f64> {
    let (evicted, us) = timed(|| family.evict_some(CLUSTER));
    if evicted.pages == CLUSTER { Ok(us) } else { fail(format!("a cluster was to be evicted: {evicted:?}")) }
}

/// Stores that hold nothing, and swap that takes everything.
#[derive(Default)]
struct Counters(Slots);

#[derive(Default)]
struct Slots(u64);

struct Nothing;

impl StoreFactory for Counters {
    type Store = Nothing;
    type File = Nothing;
    type Swap = Slots;

    fn create(&mut self, _: PageCount) -> io::Result<Nothing> {
        Ok(Nothing)
    }

    fn create_shared(&mut self, _: PageCount) -> io::Result<Nothing> {
        Ok(Nothing)
    }

    fn swap(&mut self) -> &mut Slots {
        &mut self.0
    }
}

impl Swap for Slots {
    fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot> {
        let first = self.0;
        self.0 += PageCount::covering(pages.len() as u64).0;
        Ok(SwapSlot(first))
    }

    fn get(&mut self, _: SwapSlot, _: &mut [u8]) -> io::Result<Fetch> {
        Ok(Fetch::Here)
    }

    fn free(&mut self, _: SwapSlot, _: PageCount) {}
}

impl Store for Nothing {
    fn fill(&mut self, _: PageIndex, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, _: PageIndex, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }

    fn punch(&mut self, _: PageIndex, _: PageCount) {}

    fn extents(&self) -> io::Result<Vec<GfnRange>> {
        Ok(Vec::new())
    }

    fn resident(&self) -> io::Result<PageCount> {
        Ok(PageCount(0))
    }
}

impl FileStore for Nothing {
    fn ensure(&self, _: GfnRange) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, _: PageIndex, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }
}

impl Window for Nothing {
    fn leave_scratch(&mut self, _: StoreId, _: GfnRange) {}

    /// Pages that are not zero, which would take no store.
    fn read_scratch(&self, _: StoreId, _: Gfn, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(1);
        Ok(())
    }

    fn drop_scratch(&mut self, _: StoreId) {}

    fn zero(&mut self, _: GfnRange) {}

    fn protect(&mut self, _: GfnRange, _: Protection) -> io::Result<()> {
        Ok(())
    }

    fn supply(&mut self, _: Gfn, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn wake(&mut self, _: GfnRange) {}

    fn fail(&mut self, _: Failure) {}
}
