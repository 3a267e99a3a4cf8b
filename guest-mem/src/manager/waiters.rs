//! Guests whose traps cannot be answered yet.

use crate::addr::{Gfn, GfnRange};
use crate::ids::VmId;
use crate::sys::Touch;
use std::collections::BTreeMap;

/// What a guest waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// The end of a freeze of its VM.
    Freeze,
    /// A page on its way: being read from swap, or still to be copied by the window that has it.
    Page,
    /// The next try, for a page that could not be filled in.
    Retry,
}

/// All of them, by page: each is in here once, until its page is supplied or it is woken to touch it again. Whatever supplies
/// pages takes out those who waited for them: to serve one again whose page was there meanwhile could put zeros over what its
/// guest has written, and a freeze moved out.
#[derive(Debug, Default)]
pub(super) struct Waiters(BTreeMap<(VmId, Gfn), (Touch, Reason)>);

impl Waiters {
    pub fn add(&mut self, vm: VmId, gfn: Gfn, touch: Touch, reason: Reason) {
        self.0.insert((vm, gfn), (touch, reason));
    }

    /// Takes out those of `vm` that wait for one of these pages. Whether there was one.
    pub fn take(&mut self, vm: VmId, pages: GfnRange) -> bool {
        let waiting = self.0.range((vm, pages.start())..(vm, pages.end().max(pages.start())));
        let waiting: Vec<(VmId, Gfn)> = waiting.map(|(&waiter, _)| waiter).collect();
        for waiter in &waiting {
            self.0.remove(waiter);
        }
        !waiting.is_empty()
    }

    /// Takes out those who wait for this.
    pub fn take_all(&mut self, waits: impl Fn(VmId, Gfn, Reason) -> bool) -> Vec<(VmId, Gfn, Touch)> {
        let taken = self.0.iter().filter(|&(&(vm, gfn), &(_, reason))| waits(vm, gfn, reason));
        let taken: Vec<_> = taken.map(|(&(vm, gfn), &(touch, _))| (vm, gfn, touch)).collect();
        for &(vm, gfn, _) in &taken {
            self.0.remove(&(vm, gfn));
        }
        taken
    }

    /// The VM is gone.
    pub fn forget(&mut self, vm: VmId) {
        self.take(vm, (0..u64::MAX).into());
    }

    pub fn iter(&self) -> impl Iterator<Item = (VmId, Gfn, Reason)> {
        self.0.iter().map(|(&(vm, gfn), &(_, reason))| (vm, gfn, reason))
    }
}
