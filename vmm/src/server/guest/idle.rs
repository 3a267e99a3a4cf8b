//! Balloons of idle VMs, which go up and down by themselves.
//!
//! A Linux guest that has not run for a while is asked how it is off for memory; what it could do without, but for some to
//! begin with when it wakes, goes into its balloon. When it runs again, it gets its balloon back as its user left it. What to
//! do is a pure function of what is known of one VM.
//!
//! ```text
//!   AsAsked ── idle ──► Asked ── enough to spare ──► Inflating ── there, or as far as it got ──► Inflated
//!      ▲                  │ no                                                                     │
//!      │                  ▼                                        it runs, or takes pages back    │
//!      └── runs, or ── Declined ◄──────────────────────────────────────────────────────────────────┘
//!          a minute
//! ```
//!
//! The built-in guest is not asked: it knows of no free pages.

use crate::api::MIN_MEMORY;
use guest_mem::{PAGE_SIZE, PageCount};
use std::time::{Duration, Instant};

/// How long a guest may take to say how it is off.
const ANSWER: Duration = Duration::from_secs(5);
/// How long it may take to fill its balloon. Then what it has got to is enough.
const FILL: Duration = Duration::from_secs(10);
/// What runs this short after a change is that change: ticks are not counted more often than that.
const GRACE: Duration = Duration::from_secs(2);
/// A guest that had nothing to spare is asked again after this time.
const REST: Duration = Duration::from_secs(60);
/// What a guest keeps of the memory that it could do without: an eighth of all, and at least this.
const HEADROOM: u64 = 32 << 20;
const HEADROOM_PART: u64 = 8;
/// Less than this is not worth waking a guest.
const WORTH: u64 = 4 << 20;

/// When balloons of idle VMs are inflated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AutoBalloon {
    /// Never.
    Off,
    /// When memory comes near the budget, or the host is short of it.
    #[default]
    Pressure,
    /// Always.
    Idle,
}

/// The policy of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleConfig {
    /// When.
    pub when: AutoBalloon,
    /// A VM that has not run for so long is idle.
    pub after: Duration,
}

impl Default for IdleConfig {
    fn default() -> Self {
        Self { when: AutoBalloon::default(), after: Duration::from_secs(10) }
    }
}

/// Where a VM's balloon is, without its user's doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdleBalloon {
    /// As its user left it.
    #[default]
    AsAsked,
    /// The guest is to say how it is off.
    Asked { at: Instant },
    /// It was asked for so many pages, and is busy with that.
    Inflating { pages: u64, until: Instant },
    /// It has given them. What it does from `since` on is a sign of life.
    Inflated { pages: u64, since: Instant },
    /// It had nothing to spare, or wanted it back.
    Declined { at: Instant },
}

impl IdleBalloon {
    /// What it is in a fork that begins now, and is no sign of life by itself.
    pub fn of_child(self, now: Instant) -> Self {
        match self {
            Self::Asked { .. } => Self::AsAsked,
            Self::Inflated { pages, since } => Self::Inflated { pages, since: since.max(now + GRACE) },
            other => other,
        }
    }
}

/// What is known of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    pub balloon: IdleBalloon,
    /// When it last had something to do.
    pub ran_at: Instant,
    /// Memory is wanted.
    pub wanted: bool,
    pub ram: u64,
    /// Pages in its balloon, and those that its user wants there.
    pub actual: u64,
    pub asked: u64,
    /// Memory that it could do without, and when it said so.
    pub available: Option<(u64, Instant)>,
}

/// What to tell a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Nothing,
    /// It is to say how it is off.
    Ask,
    /// It is to have so many pages in its balloon.
    Target(u64),
}

/// What becomes of its balloon, and what to tell it.
pub fn next(known: &Known, after: Duration, now: Instant) -> (IdleBalloon, Act) {
    let ran_since = |at: Instant| known.ran_at > at;
    let passed = |at: Instant, time: Duration| now >= at + time;
    match known.balloon {
        IdleBalloon::AsAsked => {
            // A guest on its way to where its user wants it is not idle.
            if known.wanted && passed(known.ran_at, after) && known.actual == known.asked {
                return (IdleBalloon::Asked { at: now }, Act::Ask);
            }
        }
        IdleBalloon::Asked { at } => match known.available.filter(|(_, said)| *said >= at) {
            Some((available, _)) => {
                let pages = spare(known, available);
                if (pages - known.actual) * PAGE_SIZE as u64 >= WORTH {
                    return (IdleBalloon::Inflating { pages, until: now + FILL }, Act::Target(pages));
                }
                return (IdleBalloon::Declined { at: now }, Act::Nothing);
            }
            None if passed(at, ANSWER) => return (IdleBalloon::Declined { at: now }, Act::Nothing),
            None => {}
        },
        IdleBalloon::Inflating { pages, .. } if known.actual == pages => {
            return (IdleBalloon::Inflated { pages, since: now + GRACE }, Act::Nothing);
        }
        IdleBalloon::Inflating { until, .. } if now >= until => {
            // Otherwise it would go on trying for ever.
            let pages = known.actual;
            return (IdleBalloon::Inflated { pages, since: now + GRACE }, Act::Target(pages));
        }
        IdleBalloon::Inflating { .. } => {}
        IdleBalloon::Inflated { pages, since } => {
            if known.actual < pages {
                return (IdleBalloon::Declined { at: now }, Act::Target(known.asked));
            }
            if ran_since(since) {
                return (IdleBalloon::AsAsked, Act::Target(known.asked));
            }
        }
        IdleBalloon::Declined { at } => {
            if ran_since(at + GRACE) || passed(at, REST) {
                return (IdleBalloon::AsAsked, Act::Nothing);
            }
        }
    }
    (known.balloon, Act::Nothing)
}

/// How many pages its balloon can have: not fewer than now.
fn spare(known: &Known, available: u64) -> u64 {
    let headroom = HEADROOM.max(PageCount(known.ram).bytes() / HEADROOM_PART);
    let give = available.saturating_sub(headroom) / PAGE_SIZE as u64;
    let most = known.ram.saturating_sub(PageCount::covering(MIN_MEMORY).0);
    known.actual.saturating_add(give).min(most).max(known.actual)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(10);
    const MIB: u64 = 256;

    /// A VM of 256 MiB, seconds after `start`.
    struct Story {
        start: Instant,
        known: Known,
    }

    impl Story {
        fn new() -> Self {
            let start = Instant::now();
            let balloon = IdleBalloon::AsAsked;
            let known =
                Known { balloon, ran_at: start, wanted: true, ram: 256 * MIB, actual: 0, asked: 0, available: None };
            Self { start, known }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        fn look(&mut self, seconds: u64) -> Act {
            let (balloon, act) = next(&self.known, AFTER, self.at(seconds));
            self.known.balloon = balloon;
            act
        }

        fn says(&mut self, seconds: u64, mib: u64) {
            self.known.available = Some((mib << 20, self.at(seconds)));
        }

        /// Idle, asked, and asked for 156 MiB.
        fn inflating() -> Self {
            let mut story = Self::new();
            story.says(1, 100);
            assert_eq!((story.look(9), story.look(10)), (Act::Nothing, Act::Ask));
            assert_eq!(story.look(11), Act::Nothing, "what it has said is old");
            story.says(11, 188);
            assert_eq!(story.look(12), Act::Target(156 * MIB));
            story
        }
    }

    #[test]
    fn an_idle_guest_gives_and_has_it_back_when_it_runs() {
        let mut story = Story::inflating();
        story.known.ran_at = story.at(13);
        assert_eq!(story.look(13), Act::Nothing, "it is busy with what we want");
        story.known.actual = 156 * MIB;
        assert_eq!(story.look(14), Act::Nothing);
        (story.known.ran_at, story.known.wanted) = (story.at(15), false);
        assert_eq!((story.look(20), story.look(3000)), (Act::Nothing, Act::Nothing));
        story.known.ran_at = story.at(3001);
        assert_eq!(story.look(3001), Act::Target(0));
        story.known.actual = 0;
        assert_eq!(story.look(3012), Act::Nothing, "nobody wants its memory");
        story.known.wanted = true;
        assert_eq!(story.look(3013), Act::Ask);
    }

    #[test]
    fn a_guest_that_cannot_give_all_gives_what_it_can() {
        let mut story = Story::inflating();
        story.known.actual = 100 * MIB;
        assert_eq!((story.look(15), story.look(22)), (Act::Nothing, Act::Target(100 * MIB)));
        // It takes some of it back by itself: it wants it.
        story.known.actual = 90 * MIB;
        assert_eq!(story.look(23), Act::Target(0));
        story.known.actual = 0;
        assert_eq!((story.look(82), story.look(83)), (Act::Nothing, Act::Nothing));
        assert_eq!(story.look(84), Act::Ask);
    }

    #[test]
    fn a_guest_with_little_to_spare_is_left_alone() {
        let mut story = Story::new();
        assert_eq!(story.look(10), Act::Ask);
        story.says(10, 35);
        assert_eq!((story.look(11), story.look(70)), (Act::Nothing, Act::Nothing));
        assert_eq!((story.look(71), story.look(72)), (Act::Nothing, Act::Ask));
        assert_eq!((story.look(73), story.look(78)), (Act::Nothing, Act::Nothing), "it does not answer");
        assert!(matches!(story.known.balloon, IdleBalloon::Declined { .. }));
    }

    #[test]
    fn what_its_user_asked_for_stays() {
        let mut story = Story::new();
        (story.known.asked, story.known.actual) = (64 * MIB, 20 * MIB);
        assert_eq!(story.look(30), Act::Nothing, "it is on its way");
        story.known.actual = 64 * MIB;
        assert_eq!(story.look(31), Act::Ask);
        story.says(31, 132);
        assert_eq!(story.look(32), Act::Target(164 * MIB));
        story.known.actual = 164 * MIB;
        assert_eq!(story.look(33), Act::Nothing);
        story.known.ran_at = story.at(50);
        assert_eq!(story.look(50), Act::Target(64 * MIB));
    }

    #[test]
    fn nothing_overflows_whatever_a_guest_says() {
        let mut story = Story::new();
        story.look(10);
        story.says(10, u64::MAX >> 20);
        assert_eq!(story.look(11), Act::Target(240 * MIB));
        story.known.actual = u64::MAX;
        story.known.balloon = IdleBalloon::Asked { at: story.at(10) };
        assert_eq!(story.look(11), Act::Nothing);
    }

    #[test]
    fn a_fork_of_an_idle_guest_is_idle_until_it_runs() {
        let story = Story::new();
        let parent = IdleBalloon::Inflated { pages: 5, since: story.at(1) };
        let child = parent.of_child(story.at(10));
        assert_eq!(child, IdleBalloon::Inflated { pages: 5, since: story.at(12) });
        assert_eq!(IdleBalloon::Asked { at: story.at(1) }.of_child(story.at(2)), IdleBalloon::AsAsked);
    }
}
