//! The way back in: reads, read-ahead and the cache of what was read.

use super::cluster::{Class, ClusterLoss, ClusterState, Keep};
use super::extents::DiskExtent;
use super::packed::Packed;
use super::pool::{DiskJob, Work};
use super::store::SwapStore;
use crate::addr::PageCount;
use crate::addr::cluster::CLUSTER;
use std::io;
use std::sync::Arc;

/// Nothing is read ahead while so many clusters are on their way in.
const READS: u64 = 32;
/// The largest window.
const WINDOW: usize = 8;

/// How far to read ahead: 1 to 8 clusters, as many as proved useful.
#[derive(Clone, Copy, Debug)]
pub struct ReadAhead {
    window: usize,
    hits: usize,
    misses: usize,
}

impl Default for ReadAhead {
    fn default() -> Self {
        Self { window: 1, hits: 0, misses: 0 }
    }
}

impl ReadAhead {
    /// How many clusters.
    pub fn window(&self) -> usize {
        self.window
    }

    /// A cluster that was read ahead was asked for.
    fn hit(&mut self) {
        self.hits += 1;
        self.adapt();
    }

    /// A cluster that was read ahead went unasked for.
    fn miss(&mut self) {
        self.misses += 1;
        self.adapt();
    }

    /// After a windowful, the window doubles if most were hit, and halves if not.
    fn adapt(&mut self) {
        if self.hits + self.misses >= self.window {
            let mostly_hit = self.hits > self.misses;
            let window = if mostly_hit { self.window * 2 } else { self.window / 2 };
            *self = Self { window: window.clamp(1, WINDOW), hits: 0, misses: 0 };
        }
    }
}

impl SwapStore {
    /// Starts to read a cluster that somebody waits for, and some that follow.
    pub(super) fn demand(&mut self, key: usize, place: DiskExtent) {
        self.read(key, place, Keep::Wanted);
        self.read_ahead(place);
    }

    /// Somebody is about to come for a cluster. How many pages were read ahead for that.
    pub(super) fn look_ahead(&mut self, key: usize) -> PageCount {
        let live = PageCount(self.books[key].live.count_ones().into());
        match &self.books[key].state {
            &ClusterState::Disk(place) => {
                self.counters.readahead_pages += live.0;
                self.read(key, place, Keep::Expected);
            }
            &ClusterState::Reading { place, keep: Keep::Ahead } => {
                self.books.turn(key, ClusterState::Reading { place, keep: Keep::Expected });
            }
            ClusterState::Clean { packed, place, keep: Keep::Ahead, .. } => {
                let (packed, place) = (Arc::clone(packed), *place);
                let stamp = self.books.stamp();
                self.books.turn(key, ClusterState::Clean { packed, place, keep: Keep::Expected, stamp });
                self.trim();
            }
            _ => return PageCount(0),
        }
        live
    }

    /// A cluster on its way in was asked for.
    pub(super) fn await_read(&mut self, key: usize, place: DiskExtent, keep: Keep) {
        self.books.turn(key, ClusterState::Reading { place, keep: Keep::Wanted });
        if keep == Keep::Ahead {
            self.hit_ahead(key, place);
        }
    }

    /// A clean copy was asked for.
    pub(super) fn used(&mut self, key: usize) {
        let ClusterState::Clean { packed, place, keep, .. } = &self.books[key].state else { return };
        let (packed, place, keep) = (Arc::clone(packed), *place, *keep);
        if keep != Keep::Written {
            let stamp = self.books.stamp();
            self.books.turn(key, ClusterState::Clean { packed, place, keep: Keep::Asked, stamp });
        }
        if keep == Keep::Ahead {
            self.hit_ahead(key, place);
        }
    }

    /// Whoever reads in order finds the next window on its way by then.
    fn hit_ahead(&mut self, key: usize, place: DiskExtent) {
        self.counters.readahead_hits += u64::from(self.books[key].live.count_ones());
        self.ahead.hit();
        self.read_ahead(place);
    }

    /// Reads what is not in memory of the clusters that follow on the disk, which is the order of eviction.
    fn read_ahead(&mut self, place: DiskExtent) {
        // A window larger than half the cache would push itself out before anybody comes for it.
        let window = self.ahead.window().min((self.limits.cache / CLUSTER.bytes() / 2) as usize);
        let following = self.books.placed.range(place.end()..).map(|(_, &key)| key);
        let following: Vec<usize> = following.take(window).collect();
        for key in following {
            if self.books.sums.reads >= READS {
                break;
            }
            if let ClusterState::Disk(place) = self.books[key].state {
                self.counters.readahead_pages += u64::from(self.books[key].live.count_ones());
                self.read(key, place, Keep::Ahead);
            }
        }
    }

    fn read(&mut self, key: usize, place: DiskExtent, keep: Keep) {
        self.books.turn(key, ClusterState::Reading { place, keep });
        let work = if keep == Keep::Wanted { Work::Demand } else { Work::Ahead };
        self.submit(DiskJob { key, place, tag: self.tag(key), work });
    }

    /// A read is done; is somebody to come for it?
    pub(super) fn was_read(&mut self, key: usize, result: io::Result<Packed>) -> bool {
        let ClusterState::Reading { place, keep } = self.books[key].state else {
            self.dropped(key);
            return false;
        };
        let state = match result {
            Ok(packed) => ClusterState::Clean { packed: Arc::new(packed), place, keep, stamp: self.books.stamp() },
            // Whoever wants it will see for himself.
            Err(_) if keep.is_ahead() => ClusterState::Disk(place),
            Err(error) => {
                log::error!("pages are lost: {error}");
                ClusterState::Lost { place, loss: ClusterLoss::from(error) }
            }
        };
        self.books.turn(key, state);
        keep.class() == Class::Wanted
    }

    /// Lets go of copies beyond the limits.
    pub(super) fn trim(&mut self) {
        while self.books.sums.wanted_clusters > self.limits.wanted {
            self.relax();
        }
        while self.books.sums.read > self.limits.cache {
            self.forget(Class::Read);
        }
        while self.books.sums.written > 0 && self.tier_bytes() > self.limits.tier {
            self.forget(Class::Written);
        }
    }

    /// The tier's bytes, with those that could go at once.
    fn tier_bytes(&self) -> u64 {
        self.books.sums.dirty + self.books.sums.writing + self.books.sums.written
    }

    /// Whoever wanted the copy that waits longest may have gone: it is one like the others now.
    fn relax(&mut self) {
        let key = self.books.coldest(Class::Wanted).expect("the sums say that there is one");
        self.used(key);
    }

    fn forget(&mut self, class: Class) {
        let key = self.books.coldest(class).expect("the sums say that there is one");
        let ClusterState::Clean { place, keep, .. } = self.books[key].state else {
            unreachable!("{key} is a clean copy")
        };
        self.books.turn(key, ClusterState::Disk(place));
        if keep == Keep::Ahead {
            self.ahead.miss();
        }
    }
}
