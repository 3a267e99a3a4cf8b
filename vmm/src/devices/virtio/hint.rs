//! What the balloon's configuration tells a guest to do about its free pages.
//!
//! ```text
//!   DONE ── begin ──► a number of its own: tell of free pages, and keep them ── end ──► DONE: use them again
//! ```

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

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
    /// A hinting is over, and the guest has not been told to look.
    untold: AtomicBool,
}

/// The same as plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    shown: u32,
    last: u32,
    untold: bool,
}

impl Default for Command {
    fn default() -> Self {
        Self { shown: AtomicU32::new(DONE), last: AtomicU32::new(FIRST), untold: AtomicBool::new(false) }
    }
}

impl Command {
    /// A new hinting.
    pub fn begin(&self) {
        let next = self.last.load(Ordering::Relaxed).wrapping_add(1) | FIRST;
        self.last.store(next, Ordering::Relaxed);
        self.shown.store(next, Ordering::Relaxed);
    }

    /// It is over.
    pub fn end(&self) {
        if self.shown.swap(DONE, Ordering::Relaxed) >= FIRST {
            self.untold.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the guest is to be told that one is over. It is taken to be, then.
    pub fn take_untold(&self) -> bool {
        self.untold.swap(false, Ordering::Relaxed)
    }

    /// Whether this is the number of the hinting under way.
    pub fn is(&self, number: u32) -> bool {
        number >= FIRST && number == self.shown()
    }

    /// What the guest sees.
    pub fn shown(&self) -> u32 {
        self.shown.load(Ordering::Relaxed)
    }

    /// What there is to save.
    pub fn save(&self) -> Saved {
        let load = |number: &AtomicU32| number.load(Ordering::Relaxed);
        Saved { shown: load(&self.shown), last: load(&self.last), untold: self.untold.load(Ordering::Relaxed) }
    }

    /// Becomes what was saved.
    pub fn load(&self, saved: Saved) {
        self.shown.store(saved.shown, Ordering::Relaxed);
        self.last.store(saved.last, Ordering::Relaxed);
        self.untold.store(saved.untold, Ordering::Relaxed);
    }
}
