//! The swap that the families of a host have in common.

use crate::addr::PageCount;
use crate::ids::SwapSlot;
use crate::swap::{Fetch, Swap};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, io};
use vmm_sys_util::eventfd::EventFd;

/// For users without swap: nothing is ever evicted.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSwap;

impl Swap for NoSwap {
    fn put(&mut self, _: &[u8]) -> io::Result<SwapSlot> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "there is no swap"))
    }

    fn get(&mut self, first: SwapSlot, _: &mut [u8]) -> io::Result<Fetch> {
        unreachable!("{first:?} was never given out")
    }

    fn free(&mut self, first: SwapSlot, _: PageCount) {
        unreachable!("{first:?} was never given out")
    }
}

/// One swap for all who hold this. [`NoSwap`] by default.
#[derive(Clone)]
pub struct SharedSwap(Rc<RefCell<dyn Swap>>);

impl SharedSwap {
    /// A share in `swap`.
    pub fn new<S: Swap + 'static>(swap: Rc<RefCell<S>>) -> Self {
        Self(swap)
    }
}

impl Default for SharedSwap {
    fn default() -> Self {
        Self::new(Rc::new(RefCell::new(NoSwap)))
    }
}

impl fmt::Debug for SharedSwap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedSwap")
    }
}

impl Swap for SharedSwap {
    fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot> {
        self.0.borrow_mut().put(pages)
    }

    fn get(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        self.0.borrow_mut().get(first, buf)
    }

    fn expect(&mut self, first: SwapSlot, count: PageCount) -> PageCount {
        self.0.borrow_mut().expect(first, count)
    }

    fn get_expected(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        self.0.borrow_mut().get_expected(first, buf)
    }

    fn count_hits(&mut self, pages: PageCount) {
        self.0.borrow_mut().count_hits(pages);
    }

    fn free(&mut self, first: SwapSlot, count: PageCount) {
        self.0.borrow_mut().free(first, count);
    }

    fn used(&self) -> Option<Vec<(SwapSlot, PageCount)>> {
        self.0.borrow().used()
    }
}

/// One swap for families on several threads.
impl<S: Swap + ?Sized> Swap for Arc<Mutex<S>> {
    fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot> {
        lock(self).put(pages)
    }

    fn get(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        lock(self).get(first, buf)
    }

    fn expect(&mut self, first: SwapSlot, count: PageCount) -> PageCount {
        lock(self).expect(first, count)
    }

    fn get_expected(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        lock(self).get_expected(first, buf)
    }

    fn count_hits(&mut self, pages: PageCount) {
        lock(self).count_hits(pages);
    }

    fn free(&mut self, first: SwapSlot, count: PageCount) {
        lock(self).free(first, count);
    }

    fn used(&self) -> Option<Vec<(SwapSlot, PageCount)>> {
        lock(self).used()
    }

    fn collect(&mut self) {
        lock(self).collect();
    }

    fn completions(&self) -> Option<Arc<EventFd>> {
        lock(self).completions()
    }
}

/// A thread that panicked in the swap has broken its own family; what swap has of the others is whole.
fn lock<S: ?Sized>(swap: &Arc<Mutex<S>>) -> MutexGuard<'_, S> {
    swap.lock().unwrap_or_else(PoisonError::into_inner)
}
