//! The system calls the crate rests on, each behind a small type that can only reach what it owns.
//!
//! An [`Area`] is a stretch of this process's addresses that mirrors guest-physical space: everything that maps, moves
//! or unmaps takes guest frames and cannot reach outside of it. [`Userfaultfd`] traps touches of missing pages,
//! [`Pagemap`] tells which pages are private, [`Memfd`] is the file behind a store and [`Alias`] the one way by which
//! bytes get into it.

mod alias;
mod area;
mod memfd;
mod pagemap;
mod userfaultfd;
mod written;

pub use alias::{Alias, FillError};
pub use area::{Advice, Area, MapAccess, Place};
pub use memfd::Memfd;
pub use pagemap::{Pagemap, ScanMethod};
pub use userfaultfd::{FaultEvent, Touch, Userfaultfd};
pub use written::Written;

/// Lets a test make the n-th system call fail that this thread makes through an [`Area`] or a [`Userfaultfd`].
#[cfg(test)]
pub(crate) mod inject {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        static COUNTDOWN: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// The call after `calls` successful ones fails with `ENOMEM`; all later ones go through.
    pub fn fail_after(calls: u32) {
        COUNTDOWN.set(Some(calls));
    }

    /// No call fails. Tells whether one did since [`fail_after`].
    pub fn stop() -> bool {
        COUNTDOWN.take().is_none()
    }

    pub(super) fn check() -> io::Result<()> {
        match COUNTDOWN.get() {
            None => Ok(()),
            Some(0) => {
                COUNTDOWN.set(None);
                Err(io::Error::from_raw_os_error(libc::ENOMEM))
            }
            Some(left) => {
                COUNTDOWN.set(Some(left - 1));
                Ok(())
            }
        }
    }
}

#[cfg(not(test))]
pub(crate) mod inject {
    #[inline]
    pub(super) fn check() -> std::io::Result<()> {
        Ok(())
    }
}
