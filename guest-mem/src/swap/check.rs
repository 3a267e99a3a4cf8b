//! The invariants of a swap store.

use super::books::Sums;
use super::cluster::{Class, ClusterState};
use super::store::SwapStore;
use std::collections::BTreeMap;

impl SwapStore {
    /// Checks that
    ///
    /// 1. every block is free or exactly one cluster's,
    /// 2. the blocks of a cluster are those that its state says,
    /// 3. the queues have the clusters that are in their states, and no others,
    /// 4. the sums are those of the clusters,
    /// 5. clusters have slots in use; those that have none have a job that is not done,
    /// 6. copies of what is on the disk keep to their limits.
    ///
    /// Returns every one that does not hold, and where.
    pub fn check(&self) -> Vec<String> {
        let mut broken = Vec::new();
        self.check_blocks(&mut broken);
        self.check_clusters(&mut broken);
        let sums = Sums::of(self.books.clusters.iter().map(|(_, cluster)| cluster));
        if sums != self.books.sums {
            broken.push(format!("4: the sums are {sums:?}, and the books say {:?}", self.books.sums));
        }
        if sums.read > self.limits.cache || sums.wanted_clusters > self.limits.wanted {
            broken.push(format!("6: too many copies: {sums:?}, {:?}", self.limits));
        }
        broken
    }

    /// 1: a walk over the disk.
    fn check_blocks(&self, broken: &mut Vec<String>) {
        let free = self.books.extents.iter().map(|range| (range.start, (range.end, "free blocks".to_string())));
        let mut pieces: BTreeMap<u64, (u64, String)> = free.collect();
        let free: u64 = pieces.iter().map(|(start, (end, _))| end - start).sum();
        if free != self.books.extents.free_blocks() {
            broken.push(format!("1: {free} blocks are free, not {}", self.books.extents.free_blocks()));
        }
        if !self.books.extents.stale_is_sound() {
            broken.push(format!("1: stale blocks are not free, or not {}", self.books.extents.stale_blocks()));
        }
        if let Some(place) = self.books.discarding {
            pieces.insert(place.start, (place.end(), "blocks to discard".to_string()));
        }
        for (key, cluster) in &self.books.clusters {
            let Some(place) = cluster.state.place() else { continue };
            if let Some((_, other)) = pieces.insert(place.start, (place.end(), format!("cluster {key}"))) {
                broken.push(format!("1: block {:#x} is cluster {key}'s and {other}'s", place.start));
            }
        }
        let mut at = 0;
        for (start, (end, whose)) in pieces {
            if start != at {
                broken.push(format!("1: {whose}: start at block {start:#x}, the last end at {at:#x}"));
            }
            at = end;
        }
        if at != self.books.extents.total() {
            broken.push(format!("1: blocks from {at:#x} on are nobody's"));
        }
    }

    /// 2, 3 and 5: cluster by cluster.
    fn check_clusters(&self, broken: &mut Vec<String>) {
        let books = &self.books;
        let (mut dirty, mut clean, mut placed) = (0, 0, 0);
        for (key, cluster) in &books.clusters {
            let queued = match &cluster.state {
                ClusterState::Memory(_) => {
                    dirty += 1;
                    books.dirty.get(&cluster.sequence) == Some(&key)
                }
                ClusterState::Clean { keep, stamp, .. } => {
                    clean += 1;
                    books.clean.get(&(keep.class(), *stamp)) == Some(&key)
                }
                _ => true,
            };
            if !queued {
                broken.push(format!("3: cluster {key} is in no queue: {cluster:?}"));
            }
            if let Some(place) = cluster.state.place() {
                placed += 1;
                if books.placed.get(&place.start) != Some(&key) {
                    broken.push(format!("2: {place:?} of cluster {key} is not known as its own"));
                }
            }
            if (cluster.live == 0) != matches!(cluster.state, ClusterState::Dropped(_)) {
                broken.push(format!("5: cluster {key} has slots {:#x}: {:?}", cluster.live, cluster.state));
            }
        }
        if (dirty, clean) != (books.dirty.len(), books.clean.len()) {
            broken.push("3: a queue has a cluster in another state".into());
        }
        if placed != books.placed.len() {
            broken.push("2: blocks are known as those of a cluster that does not have them".into());
        }
        let written = books.coldest(Class::Written).is_some();
        if written && books.sums.dirty + books.sums.writing > self.limits.hard {
            broken.push("6: there are copies of written clusters, and no room".into());
        }
    }
}
