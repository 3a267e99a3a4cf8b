//! When pages settle that nobody waits for: behind the guests' backs, and not in their way.
//!
//! A guest that goes on after a fork touches one page after the other. A batch of pages that settle meanwhile makes it wait
//! for as long as the batch takes, each time; so after a trap the next batch waits for as long, in case another trap comes,
//! and batches are small while traps come. But not where a guest touches its memory in order: settling goes on behind the
//! page that it has waited for, and gets ahead of it. Children that are about to begin need the server, and the processor that a batch
//! runs on, for less time than one takes: none begins meanwhile.

use guest_mem::PageCount;
use guest_mem::manager::WRITEBACK_BATCH;
use std::time::{Duration, Instant};

/// A batch in so many may wait no longer: traps settle pages too, but not those that nobody touches.
const LONGEST: u32 = 8;
/// Traps come as long as the last one is no longer ago than so many batches, nor than this.
const RECENT: (u32, Duration) = (64, Duration::from_millis(50));
/// Pages of a batch meanwhile: what a trap settles.
const SMALL: PageCount = PageCount(16);

/// So long children are waited for, all in all, while there is something to settle.
const PATIENCE: Duration = Duration::from_millis(10);

/// What is known of the pace.
#[derive(Debug, Default)]
pub struct Pace {
    /// Since when there are children that are about to begin.
    children: Option<Instant>,
    /// How long others before them were waited for.
    waited: Duration,
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
        match self.children {
            None if there_are => self.children = Some(now),
            Some(since) if !there_are => {
                self.waited += now.saturating_duration_since(since);
                self.children = None;
            }
            _ => {}
        }
    }

    /// Nothing is left to settle.
    pub fn all_settled(&mut self) {
        self.waited = Duration::ZERO;
    }

    /// How many pages the next batch is to settle.
    pub fn batch(&self, now: Instant) -> PageCount {
        match self.last_trap {
            Some(trap) if now < trap + (RECENT.0 * self.batch).min(RECENT.1) => SMALL,
            _ => WRITEBACK_BATCH,
        }
    }

    /// How long the next batch is to wait.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        let quiet = self.last_trap.zip(self.last_batch);
        let quiet = quiet.map(|(trap, batch)| (trap + self.batch).min(batch + LONGEST * self.batch));
        let begun = self.children.map(|since| since + PATIENCE.saturating_sub(self.waited));
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
        assert_eq!([pace.batch(at(18)), pace.batch(at(67))], [SMALL, WRITEBACK_BATCH]);
        pace.settled(at(70), at(70) + Duration::from_micros(50));
        pace.trapped(at(70));
        assert_eq!([pace.batch(at(73)), pace.batch(at(74))], [SMALL, WRITEBACK_BATCH]);
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
        pace.all_settled();
        pace.children(false, at(11));
        assert_eq!(pace.wait(at(11)), None);
    }

    /// Who is forked again and again has children that are about to begin almost always.
    #[test]
    fn a_batch_waits_for_many_children_as_long_as_for_one() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::default();
        for begin in [0, 10, 20] {
            pace.children(true, at(begin));
            assert!(pace.wait(at(begin + 3)).is_some());
            pace.children(false, at(begin + 3));
        }
        pace.children(true, at(30));
        assert_eq!(pace.wait(at(30)), Some(Duration::from_millis(1)));
        pace.children(false, at(33));
        pace.children(true, at(40));
        assert_eq!(pace.wait(at(40)), None);
        pace.children(false, at(41));
        pace.all_settled();
        pace.children(true, at(42));
        assert_eq!(pace.wait(at(42)), Some(Duration::from_millis(10)));
    }
}
