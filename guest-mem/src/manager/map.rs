//! What a VM maps, unmaps and moves after its launch.

use super::{Error, Manager};
use crate::addr::{Distance, Gfn, GfnRange};
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
        self.wake_gone(vm, pages);
        Ok(())
    }

    /// `vm` has from `to` on, where it had nothing, what it has at `from`, and nothing there any more: its window is to `carry` it.
    /// Whatever it is, it stays what it is: private, frozen and wherever it has got since, given back, protected, shared with
    /// relatives. Nothing is copied. Children have it where their parent has it when they are forked, and relatives where they
    /// had it. Whoever touches `from` from now on touches memory that is not there.
    ///
    /// While the VM is being frozen it cannot be done: what its window has taken, it tells by where it was.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], [`Error::Freezing`], [`Error::OutOfBounds`], [`Error::NotMapped`]; [`Error::Overlaps`] also where
    /// `from` itself is in the way; [`Error::Map`] where the window could not. Nothing has changed.
    pub fn move_pages(
        &mut self,
        vm: VmId,
        from: GfnRange,
        to: Gfn,
        carry: impl FnOnce(&mut W) -> io::Result<()>,
    ) -> Result<(), Error> {
        self.may_remap(vm, from)?;
        let by = Distance::between(from.start(), to);
        // Beyond all that there can be, it ends where it starts.
        let there = if to < Gfn(self.span.0) { from.moved(by) } else { GfnRange::between(to, to) };
        self.may_remap(vm, there)?;
        let map = self.family.vm(vm).map();
        if !map.covers(from) {
            return Err(Error::NotMapped { pages: from });
        }
        if let Some((with, _)) = map.within(there).next() {
            return Err(Error::Overlaps { pages: there, with });
        }
        let window = self.windows.get_mut(&vm).expect("a VM has a window");
        carry(window).map_err(|source| Error::Map { pages: from, source })?;
        let mut effects = Effects::default();
        self.family.move_pages(vm, from, by, &mut effects);
        self.carry_out(effects);
        self.wake_gone(vm, from);
        Ok(())
    }

    /// Who waited for one of these pages is told by the kernel that there is none.
    fn wake_gone(&mut self, vm: VmId, pages: GfnRange) {
        if self.waiters.take(vm, pages) {
            self.window_do(vm, |window| window.wake(pages));
        }
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
