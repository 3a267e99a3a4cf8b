//! Swap: where pages go that nobody has touched for a while, compressed in memory first, then on a disk.
//!
//! One [`SwapStore`] serves all families of a server. It knows slots and bytes, and not whose they are or when to evict.
//! It has one owner and no locks of its own; it never waits for the disk. Reads and writes are done by a few threads,
//! and an event says that some have ended. What is on its way out or in, or both in memory and on the disk, is found by its slot:
//! it is Tweedie's *swap cache* (1998), in which a page that many share stays one.
//!
//! ```text
//!   put ──► Memory ─────write-out────► Writing ───────────► Clean ──cache is full──► Disk
//!              ▲                          │                   ▲                        │
//!              └──────── write failed ────┘                   └─────── Reading ◄───────┘  get, read-ahead
//!                                                                          └──► Lost
//! ```
//!
//! * The pages of one [`put`](Swap::put) are a **cluster**: they get out and back in together. Each is compressed by
//!   itself (LZ4), so that one can be read without the rest; a page of zeros takes nothing.
//! * The tier of compressed clusters in memory has a limit. Beyond it the oldest are written out; over half of it as
//!   well, while the disk is idle ([written ahead](SwapStats::writeahead_pages)). Neighbours in that order are neighbours on
//!   the disk.
//! * On the disk a cluster is a *frame*: a header with a checksum and the compressed pages, in whole blocks of
//!   4 KiB. The checksum covers the cluster's identity too, so that misplaced and stale data is noticed.
//! * A `get` from the disk starts a read and looks ahead: the clusters that follow on the disk are read as well, up to
//!   eight, as many as proved useful lately. What was read stays in a small cache. The disk's copy stays valid until
//!   its slots are freed, so that a clean page never needs to be written again.
//! * Who knows better than the disk's order what comes next says so ([`expect`](Swap::expect)), and gets it when it is here
//!   ([`get_expected`](Swap::get_expected)).
//! * Blocks that nobody needs any more are discarded (a file gets holes) when they are many and the disk is idle.
//!
//! The file holds nothing that outlives its store: slots are numbers of this process, and headers carry a number that
//! is another one in every run.
//!
//! ```
//! use guest_mem::swap::{Fetch, Swap, SwapOptions, SwapStore};
//! use guest_mem::{PAGE_SIZE, PageCount};
//!
//! let path = std::env::temp_dir().join(format!("swap-example-{}", std::process::id()));
//! let options = SwapOptions { path: Some(path.clone()), size: Some(64 << 20), compressed: 8 << 20 };
//! let mut swap = SwapStore::open(options)?;
//!
//! let mut pages = vec![0; 3 * PAGE_SIZE];
//! pages[PAGE_SIZE] = 7;
//! let first = swap.put(&pages)?;
//!
//! let mut page = vec![0; PAGE_SIZE];
//! loop {
//!     match swap.get(first.nth(1), &mut page)? {
//!         Fetch::Here => break,
//!         // A server polls `swap.event()` instead.
//!         Fetch::Coming => while !swap.complete() {},
//!     }
//! }
//! assert_eq!(page[0], 7);
//! swap.free(first, PageCount(3));
//! assert_eq!(swap.stats().slots_used, 0);
//! # std::fs::remove_file(path)?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # Holes
//! * A frame is one stretch of blocks. On a disk that is nearly full and cut up small, a cluster may find no place.
//! * A cluster on the disk keeps its blocks until its last slot is freed: nothing compacts.
//! * A block device that cannot discard keeps its last contents when the store is dropped; a regular file is emptied.

mod books;
mod check;
mod cluster;
mod device;
mod extents;
mod frame;
pub mod handle;
mod packed;
mod pool;
mod read;
mod store;
#[cfg(test)]
mod tests;
mod write;

pub use store::{SwapCapacity, SwapOptions, SwapStats, SwapStore};

use crate::addr::PageCount;
pub use crate::addr::cluster::CLUSTER;
pub use crate::ids::SwapSlot;
use std::io;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Whether bytes that are asked for are here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fetch {
    /// They are in the buffer.
    Here,
    /// A read is under way: ask again when told so.
    Coming,
}

/// Where evicted pages go.
pub trait Swap {
    /// Takes copies of 1..=16 whole pages. They can be read at once; they get to the disk behind the caller's back.
    ///
    /// # Errors
    /// Nothing has been taken. `StorageFull`: there is no room before something is freed. `ResourceBusy`: the disk takes
    /// no more for now, and memory for what waits is used up. `WouldBlock`: the disk is behind: try again after the next
    /// completion. `InvalidInput`: not 1 to 16 whole pages.
    fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot>;

    /// Reads `buf.len()/4096` pages from consecutive slots of one `put`.
    ///
    /// # Errors
    /// The bytes are lost (`InvalidData`: the checksum differs; or the device's error). Lost for good for those slots: it
    /// answers the same again. `InvalidInput`: these are not slots in use of one `put`.
    fn get(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch>;

    /// Somebody is likely to need these pages soon: what is on a disk only is read now, and waits for
    /// [`get_expected`](Self::get_expected). How many pages were read ahead for that, which
    /// [`count_hits`](Self::count_hits) is to hear of when they prove useful.
    fn expect(&mut self, _first: SwapSlot, _count: PageCount) -> PageCount {
        PageCount(0)
    }

    /// As [`get`](Self::get), for pages that nobody waits for: starts no read.
    ///
    /// # Errors
    /// They are not in memory, and not on their way: nothing is lost by that.
    fn get_expected(&mut self, _first: SwapSlot, _buf: &mut [u8]) -> io::Result<Fetch> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// So many pages that were read because they were [expected](Self::expect) to be needed were.
    fn count_hits(&mut self, _pages: PageCount) {}

    /// These slots are not needed any more (any sub-range of a `put`; each slot once).
    ///
    /// # Panics
    /// If one of them is not in use: somebody else's page would be the next to go.
    fn free(&mut self, first: SwapSlot, count: PageCount);

    /// All slots that are in use, if it can tell.
    fn used(&self) -> Option<Vec<(SwapSlot, PageCount)>> {
        None
    }

    /// Takes in reads and writes that have ended: what was [coming](Fetch::Coming) may be here.
    fn collect(&mut self) {}

    /// Becomes readable when some have ended, and stays so until somebody [collects](Self::collect) them.
    fn completions(&self) -> Option<Arc<EventFd>> {
        None
    }
}
