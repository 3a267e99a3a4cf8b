//! Samples, and what is told of them.

use std::time::{Duration, Instant};

/// Figures of one thing, measured several times.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The middle one; of an even number, the mean of the two. NaN of none.
    pub fn median(&self) -> f64 {
        let sorted = self.sorted();
        match sorted.len() {
            0 => f64::NAN,
            len if len % 2 == 1 => sorted[len / 2],
            len => f64::midpoint(sorted[len / 2 - 1], sorted[len / 2]),
        }
    }

    /// The least that 99 % of the samples do not exceed: of fewer than a hundred, the largest. NaN of none.
    pub fn p99(&self) -> f64 {
        let sorted = self.sorted();
        let rank = (sorted.len() * 99).div_ceil(100);
        sorted.get(rank.wrapping_sub(1)).copied().unwrap_or(f64::NAN)
    }

    /// The same figures in another unit.
    pub fn scaled(&self, factor: f64) -> Self {
        self.0.iter().map(|value| value * factor).collect()
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

/// Microseconds.
pub fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// What `act` gives, and how many microseconds it took.
pub fn timed<T>(act: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let value = act();
    (value, us(start.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: impl IntoIterator<Item = u32>) -> Samples {
        values.into_iter().map(f64::from).collect()
    }

    #[test]
    fn medians() {
        assert!(samples([]).median().is_nan());
        assert_eq!(samples([3]).median(), 3.0);
        assert_eq!(samples([9, 1, 3]).median(), 3.0);
        assert_eq!(samples([9, 1, 3, 4]).median(), 3.5);
    }

    #[test]
    fn the_99th_percentile_is_a_sample() {
        assert!(samples([]).p99().is_nan());
        assert_eq!(samples([5]).p99(), 5.0);
        assert_eq!(samples(1..=50).p99(), 50.0);
        assert_eq!(samples(1..=100).p99(), 99.0);
        assert_eq!(samples(1..=200).p99(), 198.0);
    }

    #[test]
    fn another_unit() {
        assert_eq!(samples([1, 2]).scaled(1000.0), samples([1000, 2000]));
    }
}
