//! When pages settle that nobody waits for: behind the guests' backs, and not in their way.
//!
//! A guest that goes on after a fork touches one page after the other. A batch of pages that settle meanwhile makes it wait
//! for as long as the batch takes, each time; so after a trap the next batch waits for as long, in case another trap comes,
//! and batches are small while traps come.

use guest_mem::PageCount;
use guest_mem::manager::SETTLE_BATCH;
use std::time::{Duration, Instant};

/// A batch in so many may wait no longer: traps settle pages too, but not those that nobody touches.
const LONGEST: u32 = 8;
/// Traps come as long as the last one is no longer ago.
const RECENT: Duration = Duration::from_millis(50);
/// Pages of a batch meanwhile: what a trap settles.
const SMALL: PageCount = PageCount(16);

/// What is known of the pace.
#[derive(Debug, Default)]
pub struct Pace {
    batch: Duration,
    last_batch: Option<Instant>,
    last_trap: Option<Instant>,
}

impl Pace {
    /// A batch has settled.
    pub fn settled(&mut self, started: Instant, ended: Instant) {
        self.batch = ended.saturating_duration_since(started);
        self.last_batch = Some(ended);
    }

    /// A trap was served.
    pub fn trapped(&mut self, at: Instant) {
        self.last_trap = Some(at);
    }

    /// How many pages the next batch is to settle.
    pub fn batch(&self, now: Instant) -> PageCount {
        match self.last_trap {
            Some(trap) if now < trap + RECENT => SMALL,
            _ => SETTLE_BATCH,
        }
    }

    /// How long the next batch is to wait.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        let quiet = self.last_trap? + self.batch;
        let latest = self.last_batch? + LONGEST * self.batch;
        quiet.min(latest).checked_duration_since(now).filter(|wait| !wait.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_waits_after_a_trap_but_not_for_ever() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::default();
        assert_eq!(pace.wait(at(0)), None);
        pace.settled(at(0), at(2));
        assert_eq!(pace.wait(at(2)), None, "no trap");
        pace.trapped(at(3));
        assert_eq!(pace.wait(at(3)), Some(Duration::from_millis(2)));
        assert_eq!(pace.wait(at(5)), None);
        pace.trapped(at(17));
        assert_eq!(pace.wait(at(17)), Some(Duration::from_millis(1)), "8 batches' time after the last one");
        assert_eq!(pace.wait(at(18)), None);
        assert_eq!([pace.batch(at(18)), pace.batch(at(67))], [SMALL, SETTLE_BATCH]);
    }
}
