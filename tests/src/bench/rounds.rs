//! How often to sample: so many times, but not for ever where the host is busy with others.

use std::time::{Duration, Instant};

/// Rounds of sampling. Whatever is compared is sampled in each.
#[derive(Debug)]
pub struct Rounds {
    left: usize,
    begun: usize,
    since: Instant,
    most: Duration,
}

/// So many there are, however long they take.
const LEAST: usize = 2;

impl Rounds {
    /// At most `count`, and no new one after `most`.
    pub fn new(count: usize, most: Duration) -> Self {
        Self { left: count, begun: 0, since: Instant::now(), most }
    }
}

impl Iterator for Rounds {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let late = self.begun >= LEAST && self.since.elapsed() > self.most;
        if self.left == 0 || late {
            return None;
        }
        self.left -= 1;
        self.begun += 1;
        Some(self.begun - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_end_in_time_but_there_are_some() {
        assert_eq!(Rounds::new(3, Duration::from_secs(60)).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(Rounds::new(1, Duration::ZERO).count(), 1);
        assert_eq!(Rounds::new(1000, Duration::ZERO).count(), LEAST);
    }
}
