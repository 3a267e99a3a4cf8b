//! The window: one VM's guest-physical space as a range of some process's addresses, and the only way by which the
//! manager touches a real address space (BSD's pmap layer, for host mappings).
//!
//! A window is made of *runs*: stretches of guest frames that one [`Source`] supplies. A run of a store is a private
//! (`MAP_PRIVATE`) mapping of the store's file, registered for traps; an anonymous run is plain private memory that
//! never traps. What the guest writes becomes private pages of the process that holds the window, the VM's *live layer*,
//! which only [a freeze](host::HostWindow::freeze) takes out.

pub mod host;

use crate::addr::{Gfn, GfnRange, PageIndex};
use serde::{Deserialize, Serialize};
use std::io;

/// Names a store for as long as its manager lives; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StoreId(pub u32);

/// What supplies the pages of a run that the guest has not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Source {
    /// Nothing lies beneath: private zero-filled memory.
    Anonymous,
    /// A store, whose page 0 would stand at guest frame `origin`.
    Store {
        /// The store.
        store: StoreId,
        /// Guest frame of the store's page 0.
        origin: Gfn,
    },
}

impl Source {
    /// The store's page that stands at `gfn`, if a store supplies it.
    pub fn page(self, gfn: Gfn) -> Option<(StoreId, PageIndex)> {
        match self {
            Self::Anonymous => None,
            Self::Store { store, origin } => Some((store, PageIndex(gfn.0 - origin.0))),
        }
    }
}

/// Guest frames that one source supplies: one mapping of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Which frames.
    pub pages: GfnRange,
    /// What lies beneath them.
    pub source: Source,
}

/// What a freeze took out of a window.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Harvest {
    /// Runs that now map the freeze's store, sorted, not adjacent. They hold `private` and gaps of clean pages between.
    pub moved: Vec<GfnRange>,
    /// The private pages among them, now in the scratch range and nowhere else; sorted, not adjacent.
    pub private: Vec<GfnRange>,
}

/// What the manager asks of a real address space. The in-process implementation is [`host::HostWindow`]; a VMM with a
/// process per VM puts one behind a socket.
///
/// No method waits for the holder of the window. Pages that were moved out by the freeze into store `scratch` are read
/// through [`read_scratch`](Self::read_scratch) until [`drop_scratch`](Self::drop_scratch) gives their memory back.
pub trait Window {
    /// Reads moved-out pages, from `first` on, into `buf` (a multiple of the page size).
    ///
    /// # Errors
    /// The holder and its memory are gone: the pages are lost.
    fn read_scratch(&self, scratch: StoreId, first: Gfn, buf: &mut [u8]) -> io::Result<()>;

    /// All pages of the freeze into `scratch` have settled: gives their memory back.
    fn drop_scratch(&mut self, scratch: StoreId);

    /// Supplies zero pages where nothing is present yet, and wakes who waits for them. Pages that are there stay.
    ///
    /// Only for pages that are known to be zero: one that the store holds, but nobody has touched here, would be hidden.
    fn zero(&mut self, pages: GfnRange);

    /// Wakes who waits for these pages.
    fn wake(&mut self, pages: GfnRange);

    /// A page this window needs is lost: its VM must never run on. `why` is for its user.
    fn fail(&mut self, why: &str);
}
