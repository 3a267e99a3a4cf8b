//! What the balloon's configuration tells a guest to do about its free pages.
//!
//! ```text
//!   DONE ── begin ──► a number of its own: tell of free pages, and keep them ── end ──► DONE: use them again
//! ```

use std::sync::atomic::{AtomicU32, Ordering};

/// The guest sends this when it has told of all, or was interrupted.
pub const STOP: u32 = 0;
/// The guest may use again what it has told of.
const DONE: u32 = 1;
/// Numbers of hintings, each unlike the one before: that one the guest takes for done.
const FIRST: u32 = 1 << 31;

/// The command that the guest sees.
#[derive(Debug)]
pub struct Command {
    shown: AtomicU32,
    last: AtomicU32,
}

impl Default for Command {
    fn default() -> Self {
        Self { shown: AtomicU32::new(DONE), last: AtomicU32::new(FIRST) }
    }
}

impl Command {
    /// A new hinting.
    pub fn begin(&self) {
        let next = (self.last().wrapping_add(1)) | FIRST;
        self.last.store(next, Ordering::Relaxed);
        self.shown.store(next, Ordering::Relaxed);
    }

    /// It is over. Whether there was one.
    pub fn end(&self) -> bool {
        self.shown.swap(DONE, Ordering::Relaxed) >= FIRST
    }

    /// Whether this is the number of the hinting under way.
    pub fn is(&self, number: u32) -> bool {
        number >= FIRST && number == self.shown()
    }

    /// What the guest sees.
    pub fn shown(&self) -> u32 {
        self.shown.load(Ordering::Relaxed)
    }

    /// The number of the last hinting.
    pub fn last(&self) -> u32 {
        self.last.load(Ordering::Relaxed)
    }

    /// Becomes what was saved.
    pub fn load(&self, shown: u32, last: u32) {
        self.shown.store(shown, Ordering::Relaxed);
        self.last.store(last | FIRST, Ordering::Relaxed);
    }
}
