//! What can go wrong with a family's memory.

use crate::addr::{GfnRange, PageCount, PageRange};
use crate::ids::{StoreId, VmId};
use std::io;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The VM is gone, or was never of this family: nothing has changed.
    #[error("there is no {0:?} in this family")]
    NoSuchVm(VmId),
    /// A store could not be made: nothing has changed.
    #[error("cannot make a store of {} pages", pages.0)]
    CreateStore {
        /// Its size.
        pages: PageCount,
        /// Why.
        source: io::Error,
    },
    /// Pages could not be put into their store. They wait on; try again.
    #[error("cannot put pages {pages:?} into store {store:?}")]
    Fill {
        /// The store.
        store: StoreId,
        /// The pages.
        pages: PageRange,
        /// Why.
        source: io::Error,
    },
    /// Pages could not be read where they are: in a store, of which a copy is to be made, or in the scratch range of the
    /// freeze into it. They wait on; try again.
    #[error("cannot read pages {pages:?} of store {store:?}")]
    Read {
        /// The store.
        store: StoreId,
        /// The pages.
        pages: PageRange,
        /// Why.
        source: io::Error,
    },
    /// A file's pages could not be read. They wait on; try again.
    #[error("cannot read pages {pages:?} of a file")]
    File {
        /// The pages.
        pages: PageRange,
        /// Why.
        source: io::Error,
    },
    /// A window could not change what its VM may do: nothing has changed.
    #[error("cannot protect pages {pages:?}")]
    Protect {
        /// The pages.
        pages: GfnRange,
        /// Why.
        source: io::Error,
    },
    /// The VM is being frozen: nothing has changed, and can once that is over.
    #[error("{0:?} is being frozen")]
    Freezing(VmId),
    /// No VM can have memory there: nothing has changed.
    #[error("pages {pages:?} are none, or lie outside of what can be mapped")]
    OutOfBounds {
        /// The pages.
        pages: GfnRange,
    },
    /// The VM has something there: nothing has changed.
    #[error("pages {pages:?} overlap what is mapped at {with:?}")]
    Overlaps {
        /// The pages.
        pages: GfnRange,
        /// Those of them that are mapped, from the first on.
        with: GfnRange,
    },
    /// The VM has nothing at some of the pages: nothing has changed.
    #[error("pages {pages:?} are not mapped, or not all of them")]
    NotMapped {
        /// The pages.
        pages: GfnRange,
    },
    /// A window could not change what it maps: nothing has changed.
    #[error("cannot change what is mapped at pages {pages:?}")]
    Map {
        /// The pages.
        pages: GfnRange,
        /// Why.
        source: io::Error,
    },
    /// Swap did not take pages: they stay where they are.
    #[error("cannot put pages {pages:?} into swap")]
    PutSwap {
        /// The pages.
        pages: PageRange,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    /// Swap has no room for pages.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::PutSwap { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }

    /// Somebody put a page where the books say that there is none: nothing that sees the store can be trusted.
    pub fn is_planted(&self) -> bool {
        matches!(self, Self::Fill { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Manager;
    use crate::addr::Gfn;
    use crate::ids::Activity;
    use crate::ops::Destination;
    use crate::space::map::{Protection, Sharing};
    use crate::stage2::Shape;
    use crate::store::memfd::MemfdStores;
    use crate::sys::Touch;
    use crate::testing::Ones;
    use crate::window::Harvest;

    /// Each of them panicked. One VM is gone, and one is of another family; both have a relative who goes on.
    #[test]
    fn a_vm_that_is_not_there_is_an_error_and_nothing_changes() {
        let ram = GfnRange::from(0..64);
        let mut manager = Manager::new(Shape::X86_64, PageCount(128), MemfdStores::new(None));
        let vm = manager.launch(&[ram], &[], &[], Ones).unwrap();
        let store = manager.begin_freeze(vm, Destination::Store).unwrap();
        let harvest = Harvest { moved: vec![ram], moved_private: vec![ram], ..Harvest::default() };
        manager.finish_freeze(vm, &harvest).unwrap();
        let gone = manager.fork(vm, Ones).unwrap();
        manager.exit(gone).unwrap();
        while manager.write_back(PageCount(64)).unwrap() {}
        let state = |manager: &Manager<MemfdStores, Ones>| {
            let vms: Vec<_> = manager.family().vms().map(|(id, vm)| (id, format!("{vm:?}"))).collect();
            (manager.family().totals(), manager.windows(), manager.has_writeback(), vms)
        };
        let before = state(&manager);
        for stranger in [gone, VmId(77)] {
            let pages = GfnRange::from(0..1);
            let errors = [
                manager.begin_freeze(stranger, Destination::Store).map(drop),
                manager.takes_along(stranger).map(drop),
                manager.mends(stranger).map(drop),
                manager.stands(stranger),
                manager.abort_freeze(stranger),
                manager.finish_freeze(stranger, &harvest),
                manager.fork(stranger, Ones).map(drop),
                manager.runs_of_child(stranger).map(drop),
                manager.balloon(stranger, &[pages]),
                manager.to_dedup(stranger, store, PageCount(1), PageCount(1)).map(drop),
                manager.dedup(stranger, store, &[pages]),
                manager.set_activity(stranger, Activity::Idle),
                manager.fault(stranger, Gfn(0), Touch::Read).map(drop),
                manager.write_ahead(stranger, Gfn(0)),
                manager.protect(stranger, pages, Protection::ReadOnly),
                manager.map(stranger, (64..65).into(), Sharing::Shared, |_, _, _| Ok(())),
                manager.unmap(stranger, pages, |_| Ok(())),
                manager.move_pages(stranger, pages, Gfn(64), |_| Ok(())),
                manager.exit(stranger),
            ];
            for (call, error) in errors.iter().enumerate() {
                assert!(matches!(error, Err(Error::NoSuchVm(of)) if *of == stranger), "call {call}: {error:?}");
            }
            assert!(manager.window(stranger).is_none() && manager.window_mut(stranger).is_none());
            assert_eq!(state(&manager), before);
            manager.family().check_invariants().unwrap();
        }
    }
}
