//! The memory manager's books alone, on windows and stores that hold nothing: a thousand real VMs do not fit everywhere, and a
//! tebibyte does nowhere.

use crate::Result;
use guest_mem::ids::SwapSlot;
use guest_mem::store::{FileStore, Store, StoreFactory};
use guest_mem::swap::{Fetch, Swap};
use guest_mem::{
    Destination, Failure, Gfn, GfnRange, Harvest, Manager, PageCount, PageIndex, PageRange, Protection, StoreId, VmId,
    Window, stage2,
};
use std::io;

/// A family's memory manager.
pub type Books = Manager<Counters, Nothing>;

/// A family whose only VM has so much RAM.
pub fn launched(ram: PageCount) -> Result<(Books, VmId)> {
    let mut family = Manager::new(stage2::Shape::X86_64, ram, Counters::default());
    let vm = family.launch(&[GfnRange::new(Gfn(0), ram)], &[], &[], Nothing::default())?;
    Ok((family, vm))
}

/// A VM has written these pages, which a freeze moves out.
pub fn freeze(family: &mut Books, vm: VmId, pages: GfnRange) -> Result<StoreId> {
    freeze_as(family, vm, &Harvest { moved: vec![pages], moved_private: vec![pages], ..Harvest::default() })
}

/// The same, with this to be taken.
pub fn freeze_as(family: &mut Books, vm: VmId, harvest: &Harvest) -> Result<StoreId> {
    let store = family.begin_freeze(vm, Destination::Store)?;
    family.stands(vm)?;
    family.finish_freeze(vm, harvest)?;
    Ok(store)
}

/// All of it is written back.
pub fn write_back(family: &mut Books) -> Result<()> {
    while family.write_back(guest_mem::manager::WRITEBACK_BATCH)? {}
    Ok(())
}

/// Stores that hold nothing, and swap that takes everything.
#[derive(Default)]
pub struct Counters(Slots);

/// Swap.
#[derive(Default)]
pub struct Slots(u64);

/// A window, or a store: nothing happens.
#[derive(Default)]
pub struct Nothing {
    /// What its guest writes is zero.
    pub writes_zeros: bool,
}

impl StoreFactory for Counters {
    type Store = Nothing;
    type File = Nothing;
    type Swap = Slots;

    fn create(&mut self, _: PageCount) -> io::Result<Nothing> {
        Ok(Nothing::default())
    }

    fn create_shared(&mut self, _: PageCount) -> io::Result<Nothing> {
        Ok(Nothing::default())
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

    fn extents(&self) -> io::Result<Vec<PageRange>> {
        Ok(Vec::new())
    }

    fn resident(&self) -> io::Result<PageCount> {
        Ok(PageCount(0))
    }
}

impl FileStore for Nothing {
    fn ensure(&self, _: PageRange) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, _: PageIndex, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }
}

impl Window for Nothing {
    fn leave_scratch(&mut self, _: StoreId, _: GfnRange) {}

    fn read_scratch(&self, _: StoreId, _: Gfn, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(u8::from(!self.writes_zeros));
        Ok(())
    }

    fn drop_scratch(&mut self, _: StoreId) {}

    fn zero(&mut self, _: GfnRange) {}

    fn protect(&mut self, _: GfnRange, _: Protection) -> io::Result<()> {
        Ok(())
    }

    fn supply(&mut self, _: Gfn, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn wake(&mut self, _: GfnRange) {}

    fn fail(&mut self, _: Failure) {}
}
