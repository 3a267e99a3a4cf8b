//! When pages settle that nobody waits for: behind the guests' backs, and not in their way.
//!
//! A guest that goes on after a fork touches one page after the other. A batch of pages that settle meanwhile makes it wait
//! for as long as the batch takes, each time; so after a trap the next batch waits for as long, in case another trap comes,
//! and batches are small while traps come. But not where a guest touches its memory in order: settling goes on behind the
//! page that it has waited for, and gets ahead of it. Children that are about to begin need the server, and the processor that a batch
//! runs on, for less time than one takes: none begins meanwhile.

use guest_mem::PageCount;
use guest_mem::manager::SETTLE_BATCH;
use std::time::{Duration, Instant};

/// A batch in so many may wait no longer: traps settle pages too, but not those that nobody touches.
const LONGEST: u32 = 8;
/// Traps come as long as the last one is no longer ago than so many batches, or than this.
const RECENT: (u32, Duration) = (64, Duration::from_millis(50));
/// Pages of a batch meanwhile: what a trap settles.
const SMALL: PageCount = PageCount(16);

/// Children that have not begun by then are waited for no longer.
const PATIENCE: Duration = Duration::from_millis(10);

/// What is known of the pace.
#[derive(Debug, Default)]
pub struct Pace {
    /// Since when there are children that are about to begin.
    children: Option<Instant>,
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

    /// Whether there are children that are about to begin.
    pub fn children(&mut self, there_are: bool, now: Instant) {
        self.children = there_are.then(|| self.children.unwrap_or(now));
    }

    /// How many pages the next batch is to settle.
    pub fn batch(&self, now: Instant) -> PageCount {
        match self.last_trap {
            Some(trap) if now < trap + (RECENT.0 * self.batch).min(RECENT.1) => SMALL,
            _ => SETTLE_BATCH,
        }
    }

    /// How long the next batch is to wait.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        let quiet = self.last_trap.zip(self.last_batch);
        let quiet = quiet.map(|(trap, batch)| (trap + self.batch).min(batch + LONGEST * self.batch));
        let begun = self.children.map(|since| since + PATIENCE);
        quiet.max(begun)?.checked_duration_since(now).filter(|wait| !wait.is_zero())
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
        pace.settled(at(70), at(70) + Duration::from_micros(50));
        pace.trapped(at(70));
        assert_eq!([pace.batch(at(73)), pace.batch(at(74))], [SMALL, SETTLE_BATCH]);
    }

    /// A child waited for milliseconds while its parent's pages settled on the processor that it was to begin on.
    #[test]
    fn a_batch_waits_for_children_but_not_for_ever() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::default();
        pace.children(true, at(0));
        assert_eq!(pace.wait(at(1)), Some(Duration::from_millis(9)));
        pace.children(true, at(8));
        assert_eq!(pace.wait(at(10)), None, "there are always some");
        pace.children(false, at(11));
        pace.children(true, at(12));
        assert_eq!(pace.wait(at(12)), Some(Duration::from_millis(10)));
        pace.children(false, at(13));
        assert_eq!(pace.wait(at(13)), None);
    }
}
