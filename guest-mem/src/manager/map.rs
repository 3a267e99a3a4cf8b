//! What a VM maps and unmaps after its launch.

use super::{Error, Manager};
use crate::addr::{Gfn, GfnRange};
use crate::effect::Effects;
use crate::ids::{Run, StoreId, VmId};
use crate::space::map::Sharing;
use crate::store::StoreFactory;
use crate::window::Window;
use std::io;

impl<S: StoreFactory, W: Window> Manager<S, W> {
    /// `vm` has memory of zeros at `pages`, where it had nothing: its own, or [shared](Sharing::Shared) with those that are
    /// forked from it afterwards. Its window is to `show` this run; of shared memory it gets the store.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::Freezing`], [`Error::OutOfBounds`], [`Error::Overlaps`], [`Error::CreateStore`];
    /// [`Error::Map`] where the window could not. Nothing has changed.
    pub fn map(
        &mut self,
        vm: VmId,
        pages: GfnRange,
        sharing: Sharing,
        show: impl FnOnce(&mut W, Run, Option<&S::Store>) -> io::Result<()>,
    ) -> Result<(), Error> {
        self.may_remap(vm, pages)?;
        if let Some((with, _)) = self.family.vm(vm).map().within(pages).next() {
            return Err(Error::Overlaps { pages, with });
        }
        let store = match sharing {
            Sharing::CopyOnWrite => None,
            Sharing::Shared => Some(self.create_shared(pages.count())?),
        };
        let shared = store.is_some().then(|| self.family.add_shared(pages.count()));
        let object = shared.map(|(object, _)| object);
        let run = self.family.run_of(pages, object);
        let window = self.windows.get_mut(&vm).expect("a VM has a window");
        let shown = show(window, run, store.as_ref());
        let mut effects = Effects::default();
        let done = match shown {
            Ok(()) => {
                self.family.map(vm, pages, object, &mut effects);
                store.into_iter().zip(shared).for_each(|(store, (_, id))| self.insert_shared(id, store));
                Ok(())
            }
            Err(source) => {
                object.into_iter().for_each(|object| self.family.objects.tidy(object, &mut effects));
                Err(Error::Map { pages, source })
            }
        };
        self.carry_out(effects);
        done
    }

    /// `vm` has nothing at `pages` any more, all of which it has: its window is to `hide` them. What nobody sees by that is
    /// freed. Whoever touches them from now on touches memory that is not there.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::Freezing`], [`Error::OutOfBounds`], [`Error::NotMapped`]; [`Error::Map`] where the window
    /// could not. Nothing has changed.
    pub fn unmap(
        &mut self,
        vm: VmId,
        pages: GfnRange,
        hide: impl FnOnce(&mut W) -> io::Result<()>,
    ) -> Result<(), Error> {
        self.may_remap(vm, pages)?;
        if !self.family.vm(vm).map().covers(pages) {
            return Err(Error::NotMapped { pages });
        }
        let window = self.windows.get_mut(&vm).expect("a VM has a window");
        hide(window).map_err(|source| Error::Map { pages, source })?;
        let mut effects = Effects::default();
        self.family.unmap(vm, pages, &mut effects);
        self.carry_out_in_time(effects);
        // Who waited for one of them is told by the kernel that there is none.
        if self.waiters.take(vm, pages) {
            self.window_do(vm, |window| window.wake(pages));
        }
        Ok(())
    }

    /// A store of shared memory that somebody maps.
    pub(super) fn insert_shared(&mut self, id: StoreId, store: S::Store) {
        while self.stores.contains_key(&id) {
            // Of the last that had this id, nothing is left but pages to be freed.
            self.free_hidden();
        }
        self.stores.insert(id, store);
        self.shared.insert(id);
    }

    /// Whether what `vm` maps at `pages` may change now.
    fn may_remap(&self, vm: VmId, pages: GfnRange) -> Result<(), Error> {
        self.find(vm)?;
        if pages.is_empty() || pages.end() > Gfn(self.span.0) {
            return Err(Error::OutOfBounds { pages });
        }
        match self.family.vm(vm).freezing {
            Some(_) => Err(Error::Freezing(vm)),
            None => Ok(()),
        }
    }
}
