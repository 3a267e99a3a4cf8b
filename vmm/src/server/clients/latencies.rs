//! How long answers take, for each kind of request: histograms of fixed buckets, into which an answer is counted without
//! any allocation.

use crate::api::{LatencyBucket, RequestKind, RequestLatency};

/// What each bucket but the last goes up to, in microseconds. The last has all that took longer.
const BOUNDS_US: [u64; 18] = [
    50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000,
    5_000_000, 10_000_000, 60_000_000,
];

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Failed,
}

/// How long answers have taken since the server began.
#[derive(Clone, Debug, Default)]
pub struct Latencies([Histogram; RequestKind::ALL.len()]);

#[derive(Clone, Debug, Default)]
struct Histogram {
    /// Not cumulative.
    buckets: [u64; BOUNDS_US.len() + 1],
    total_ns: u64,
    failures: u64,
}

impl Latencies {
    /// An answer has been given.
    pub fn add(&mut self, kind: RequestKind, took_ns: u64, outcome: Outcome) {
        let histogram = &mut self.0[kind as usize];
        let took_us = took_ns.div_ceil(1000);
        histogram.buckets[BOUNDS_US.partition_point(|&bound| bound < took_us)] += 1;
        histogram.total_ns = histogram.total_ns.saturating_add(took_ns);
        histogram.failures += u64::from(outcome == Outcome::Failed);
    }

    /// All kinds of requests that there were.
    pub fn shown(&self) -> Vec<RequestLatency> {
        let asked = RequestKind::ALL.into_iter().zip(&self.0).map(|(kind, histogram)| histogram.shown(kind));
        asked.filter(|shown| shown.answers > 0).collect()
    }
}

impl Histogram {
    fn shown(&self, kind: RequestKind) -> RequestLatency {
        let bounds = BOUNDS_US.into_iter().map(Some).chain([None]);
        let mut answers = 0;
        let bucket = |(up_to_us, &within): (Option<u64>, &u64)| {
            answers += within;
            LatencyBucket { up_to_us, answers }
        };
        let buckets = bounds.zip(&self.buckets).map(bucket).collect();
        RequestLatency { kind, answers, failures: self.failures, total_us: self.total_ns / 1000, buckets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_is_in_its_bucket_and_in_all_above() {
        let mut latencies = Latencies::default();
        for took_ns in [0, 49_999, 50_000, 50_001, 999_000, 60_000_000_000, 60_000_000_001, u64::MAX] {
            latencies.add(RequestKind::Fork, took_ns, Outcome::Done);
        }
        latencies.add(RequestKind::Shutdown, 1, Outcome::Failed);
        let shown = latencies.shown();
        assert_eq!(shown.iter().map(|of| of.kind).collect::<Vec<_>>(), [RequestKind::Fork, RequestKind::Shutdown]);
        let within =
            |us: Option<u64>| shown[0].buckets.iter().find(|bucket| bucket.up_to_us == us).expect("a bucket").answers;
        let us = [Some(50), Some(100), Some(500), Some(1000), Some(10_000_000), Some(60_000_000), None];
        assert_eq!(us.map(within), [3, 4, 4, 5, 5, 6, 8]);
        assert_eq!((shown[0].answers, shown[0].failures, shown[1].failures), (8, 0, 1));
        assert_eq!(shown[0].total_us, u64::MAX / 1000, "it does not wrap");
    }

    #[test]
    fn kinds_are_counted_where_they_belong() {
        assert!(BOUNDS_US.is_sorted());
        for (at, kind) in RequestKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, at, "{kind:?}");
        }
    }
}
