//! A window that another process holds.
//!
//! The server reaches into it in three ways: through the process's userfaultfd (zeros, wakes), by reading its memory
//! (moved-out pages; the keeper shares it and outlives the process, and of a first freeze there is a copy of the process),
//! and by messages, which the server's loop sends.
//!
//! Memory is read through `/proc/PID/mem`, not by `process_vm_readv`: whoever reads that way never waits for somebody else
//! to supply a page. A process that is taken over may have pages trapped by a userfaultfd of its own, or by ours, which
//! nobody serves while the server waits. It costs some 0.2 µs more for each page. And what was opened when the process
//! was made is its memory for good, whatever process has its number later.

pub mod memory;
#[cfg(test)]
mod tests;

use crate::procfs;
use crate::server::ids::ProcessId;
use guest_mem::sys::Userfaultfd;
use guest_mem::{Failure, Gfn, GfnRange, Protection, StoreId, Window};
use memory::{Memory, image_of};
use nix::unistd::Pid;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

/// A page that could not be read so often is held back: the manager tries every 50 ms.
const REFUSED_MOST: u32 = 100;

/// What a window asks of the loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// See when the process's socket takes what is queued.
    Room,
    /// See to it that the process answers.
    Answer,
    /// Tell the process to drop this freeze's scratch range.
    DropScratch(StoreId),
    /// Tell the process that these pages of this freeze's scratch range are not needed any more.
    LeaveScratch(StoreId, GfnRange),
    /// Tell the process what its VM may do with these pages.
    Protect(GfnRange, Protection),
    /// Its VM must not run on, for this reason.
    Fail(String),
    /// Nobody needs the window any more.
    Release,
}

/// What windows ask, in order.
pub type Wants = Rc<RefCell<VecDeque<(ProcessId, Want)>>>;

/// The window of one VM. Dropping it ends what is left of the process.
#[derive(Debug)]
pub struct RemoteWindow(pub Rc<Memory>);

impl Window for RemoteWindow {
    fn read_scratch(&self, scratch: StoreId, first: Gfn, buf: &mut [u8]) -> io::Result<()> {
        let memory = &self.0;
        let gone = || io::Error::new(io::ErrorKind::NotFound, "the processes that had the memory are gone");
        let ranges = memory.scratch.borrow();
        let scratch = ranges.get(&scratch).ok_or_else(gone)?;
        let image = match &scratch.copy {
            Some(copy) if copy.image.get().is_none() && memory.copies.borrow().contains(&copy.pid) => {
                let image = image_of(copy.pid)?;
                Some(copy.image.get_or_init(|| image))
            }
            Some(copy) => copy.image.get(),
            None => memory.image.get(),
        };
        let address = memory.address(scratch, first)?;
        let why = match image.ok_or_else(gone)?.read_at(buf, address) {
            Ok(0) => return Err(gone()),
            Ok(n) if n == buf.len() => {
                memory.refused.set(0);
                return Ok(());
            }
            Ok(n) => format!("{n} of {} bytes of scratch memory", buf.len()),
            Err(error) => format!("scratch memory: {error}"),
        };
        // The kernel says so where nothing is mapped, where it was short of memory, and where the process has trapped a page.
        let holders = match &scratch.copy {
            Some(copy) => [memory.copies.borrow().contains(&copy.pid).then_some(copy.pid), None],
            None => [memory.keeper.get(), memory.main()],
        };
        if !holders.into_iter().flatten().any(|holder| is_mapped(holder, address..address + buf.len() as u64)) {
            return Err(io::Error::new(io::ErrorKind::NotFound, why));
        }
        memory.refused.set(memory.refused.get() + 1);
        if memory.refused.get() == REFUSED_MOST {
            memory.want(Want::Fail("its process holds back what it had when it was frozen".into()));
        }
        Err(io::Error::other(why))
    }

    fn leave_scratch(&mut self, scratch: StoreId, pages: GfnRange) {
        // What a copy has is shared with the process, as long as that does not write.
        if !self.0.is_in_copy(scratch) {
            self.0.want(Want::LeaveScratch(scratch, pages));
        }
    }

    fn drop_scratch(&mut self, scratch: StoreId) {
        let dropped = self.0.scratch.borrow_mut().remove(&scratch);
        if dropped.is_none_or(|scratch| scratch.copy.is_none()) {
            self.0.want(Want::DropScratch(scratch));
        }
    }

    fn zero(&mut self, pages: GfnRange) {
        self.answer("zero", pages, Userfaultfd::zero);
        self.wake(pages);
    }

    fn supply(&mut self, gfn: Gfn, page: &[u8]) -> io::Result<()> {
        let traps = self.0.traps.get().ok_or(io::ErrorKind::Unsupported)?;
        traps.supply(self.0.base.get() + gfn.gpa(), page)
    }

    /// The process does it before anything that it is told afterwards. If it cannot, its VM ends.
    fn protect(&mut self, pages: GfnRange, protection: Protection) -> io::Result<()> {
        self.0.want(Want::Protect(pages, protection));
        Ok(())
    }

    fn wake(&mut self, pages: GfnRange) {
        self.answer("wake", pages, Userfaultfd::wake);
    }

    fn fail(&mut self, failure: Failure) {
        self.0.want(Want::Fail(failure.to_string()));
    }
}

/// Whether a process that lives has all these addresses mapped.
fn is_mapped(pid: Pid, bytes: Range<u64>) -> bool {
    let there = procfs::maps(pid.as_raw()).and_then(|maps| procfs::mappings(maps, &bytes)).unwrap_or_default();
    let mapped = there.iter().map(|m| m.addresses.end.min(bytes.end) - m.addresses.start.max(bytes.start));
    mapped.sum::<u64>() == bytes.end - bytes.start
}

impl RemoteWindow {
    fn answer(&self, what: &str, pages: GfnRange, call: impl Fn(&Userfaultfd, u64, usize) -> io::Result<()>) {
        let Some(traps) = self.0.traps.get() else { return };
        if let Err(error) = call(traps, self.0.base.get() + pages.start().gpa(), pages.len_bytes()) {
            // The process may just have died; otherwise the trap comes again.
            log::debug!("{what} {pages:?} in the window of {:?}: {error}", self.0.process);
        }
    }
}

impl Drop for RemoteWindow {
    fn drop(&mut self) {
        self.0.want(Want::Release);
    }
}
