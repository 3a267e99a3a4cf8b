//! Processes that do not answer in time end, and with them what they are for. Nobody else waits for them.

use super::answers::{Excuse, Owed, is_late};
use std::time::{Duration, Instant};

/// A process with an excuse is looked at so often in the time that it has to answer.
const LOOKS: u32 = 4;
/// Who has longer than this to answer has all the time there is.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// How long processes may take to answer, and when to look at them.
#[derive(Debug)]
pub struct Patience {
    within: Duration,
    look_at: Option<Instant>,
}

impl Patience {
    /// So long.
    pub fn new(within: Duration) -> Self {
        Self { within: within.min(LONGEST), look_at: None }
    }

    /// How long that is.
    pub fn within(&self) -> Duration {
        self.within
    }

    /// Somebody owes an answer since now.
    pub fn begin(&mut self, now: Instant) {
        self.look_at.get_or_insert(now + self.within);
    }

    /// When to look again.
    pub fn next_look(&self) -> Option<Instant> {
        self.look_at
    }

    /// Somebody is to be looked at then, or nobody.
    pub fn look_again(&mut self, at: Option<Instant>) {
        self.look_at = at;
    }

    /// Whether it is time to look.
    pub fn is_time(&self, now: Instant) -> bool {
        self.look_at.is_some_and(|at| at <= now)
    }

    /// Who is late, of all who owe something, and when to look again.
    pub fn late<T>(
        &self,
        now: Instant,
        owed: impl Iterator<Item = (T, Owed, Instant)>,
        excuse: impl Fn(&T) -> Excuse,
    ) -> (Vec<(T, Owed)>, Option<Instant>) {
        let (mut late, mut look_at) = (Vec::new(), None);
        for (who, owed, since) in owed {
            let owed_for = now.saturating_duration_since(since);
            let next = match owed_for < self.within {
                true => since + self.within,
                false if is_late(owed_for, self.within, excuse(&who)) => {
                    late.push((who, owed));
                    continue;
                }
                false => now + self.within / LOOKS,
            };
            look_at = Some(look_at.map_or(next, |at: Instant| at.min(next)));
        }
        (late, look_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITHIN: Duration = Duration::from_secs(10);

    #[test]
    fn who_is_late_is_found_when_it_is_and_not_before() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut patience = Patience::new(WITHIN);
        assert!(!patience.is_time(at(1000)), "nobody owes anything");
        patience.begin(at(1));
        patience.begin(at(5));
        assert_eq!([10, 11].map(|seconds| patience.is_time(at(seconds))), [false, true]);
        let owed = [("a", Owed::Start, at(1)), ("b", Owed::RunState, at(5)), ("c", Owed::Dedup, at(0))];
        let busy = |who: &&str| if *who == "c" { Excuse::Busy } else { Excuse::None };
        let late = |seconds, owed: &[_]| patience.late(at(seconds), owed.iter().copied(), busy);
        let (found, next) = late(11, &owed);
        assert_eq!(found, [("a", Owed::Start)]);
        assert_eq!(next, Some(at(11) + WITHIN / LOOKS), "sooner than the next is late");
        let (found, next) = late(40, &owed[2..]);
        assert_eq!((found, next), (vec![("c", Owed::Dedup)], None));
    }

    #[test]
    fn whoever_has_all_the_time_there_is_is_never_late() {
        let mut patience = Patience::new(Duration::MAX);
        patience.begin(Instant::now());
        assert!(!patience.is_time(Instant::now() + LONGEST / 2));
        assert!(is_late(LONGEST * 4, patience.within(), Excuse::Busy), "and nothing overflows");
    }
}
