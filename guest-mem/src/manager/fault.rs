//! A page fault, from the trap to the answer: what [`Family::fault`] says is done until nothing is left but to wake who waits.

use super::effects::lost;
use super::waiters::Reason;
use super::{Error, Manager};
use crate::addr::{Gfn, GfnRange, PageCount};
use crate::family::Family;
use crate::ids::VmId;
use crate::ops::{Destination, Fault};
use crate::store::{FileStore, StoreFactory};
use crate::swap::Fetch;
use crate::sys::Touch;
use crate::window::{Failure, Window};

impl<S: StoreFactory, W: Window> Manager<S, W> {
    /// A guest waits for the page at `gfn`: gets it there and wakes the guest, now or when its page has been read from
    /// swap. Whether it goes on in order, so that it most likely needs the pages that are written back next.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`]. Otherwise the page could not be filled in: the guest waits on, and is served by the next
    /// [`retry`](Self::retry).
    pub fn fault(&mut self, vm: VmId, gfn: Gfn, touch: Touch) -> Result<bool, Error> {
        self.find(vm)?;
        self.in_order = false;
        let served = self.serve(vm, gfn, touch);
        match served {
            Ok(None) => drop(self.waiters.take(vm, GfnRange::new(gfn, PageCount(1)))),
            Ok(Some(reason)) => self.waiters.add(vm, gfn, touch, reason),
            Err(_) => self.waiters.add(vm, gfn, touch, Reason::Retry),
        }
        served.map(|_| self.in_order)
    }

    /// Answers a trap, if that can be done now; otherwise what its guest waits for.
    fn serve(&mut self, vm: VmId, gfn: Gfn, touch: Touch) -> Result<Option<Reason>, Error> {
        match self.exclusive_swap_in(vm, gfn, touch)? {
            None => {}
            Some(Fetch::Here) => return Ok(None),
            Some(Fetch::Coming) => return Ok(Some(Reason::Page)),
        }
        let answer = match self.write_back_at(vm, gfn, Family::fault)? {
            Fault::File { store, pages, wake } => {
                self.files[&store].ensure(pages).map_err(|source| Error::File { pages, source })?;
                Fault::Wake(wake)
            }
            answer => answer,
        };
        let Some(window) = self.windows.get_mut(&vm) else { return Ok(None) };
        let waiters = &mut self.waiters;
        let mut wake = |window: &mut W, pages| {
            waiters.take(vm, pages);
            window.wake(pages);
        };
        match answer {
            Fault::Zero(zeros) => {
                // First, and whatever becomes of the others: who waits for this one is woken at once.
                let page = GfnRange::new(gfn, PageCount(1));
                if zeros.iter().any(|pages| pages.contains(gfn)) {
                    window.zero(page);
                }
                wake(window, page);
                for &pages in zeros.iter().filter(|pages| **pages != page) {
                    window.zero(pages);
                    // Who has trapped there and has not been heard has its turn later.
                    if waiters.take(vm, pages) {
                        window.wake(pages);
                    }
                }
            }
            Fault::Lost(loss) => window.fail(lost(gfn, loss)),
            Fault::Outside => window.fail(Failure::Outside(gfn)),
            Fault::Wake(pages) | Fault::File { wake: pages, .. } => wake(window, pages),
            Fault::Wait => return Ok(Some(Reason::Freeze)),
            Fault::WriteBack(_) | Fault::SwapIn(_) => return Ok(Some(Reason::Page)),
        }
        Ok(None)
    }

    /// Writes back what `vm` sees around `gfn`, if it has not been written back, and has it read if it is in swap: its
    /// children are about to need it.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`]. Otherwise a page could not be filled in.
    pub fn write_ahead(&mut self, vm: VmId, gfn: Gfn) -> Result<(), Error> {
        self.find(vm)?;
        self.write_back_at(vm, gfn, Family::beneath).map(drop)
    }

    /// Does what `look` says until nothing is left but for who waits there; [`Fault::WriteBack`] and [`Fault::SwapIn`] where a
    /// read is under way.
    fn write_back_at(
        &mut self,
        vm: VmId,
        gfn: Gfn,
        look: impl Fn(&Family, VmId, Gfn) -> Fault,
    ) -> Result<Fault, Error> {
        loop {
            match look(&self.family, vm, gfn) {
                Fault::WriteBack(job) => match self.run_job(&job, Destination::Store)? {
                    Fetch::Here => self.in_order = self.family.continue_after(&job),
                    Fetch::Coming => return Ok(Fault::WriteBack(job)),
                },
                Fault::SwapIn(read) => {
                    let order = self.look_ahead(vm, gfn);
                    match self.swap_in(&read, order)? {
                        Fetch::Here => {}
                        Fetch::Coming => return Ok(Fault::SwapIn(read)),
                    }
                }
                answer => return Ok(answer),
            }
        }
    }
}
