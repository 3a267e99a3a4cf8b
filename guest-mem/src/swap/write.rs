//! Write-out: the way from memory to the disk.

use super::cluster::{ClusterState, Keep, slot};
use super::frame::{self, Tag};
use super::packed::Packed;
use super::pool::{DiskJob, Work};
use super::store::SwapStore;
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// Clusters on their way out at a time; more would only wait in the queue, where they cannot be kept back any more.
const WRITES: u64 = 64;
/// Blocks discarded at a time: 64 MiB.
const DISCARDED: u64 = 1 << 14;
/// Clusters written ahead each time the disk is found idle.
const AHEAD: usize = 8;
/// So many of the oldest are tried when the disk is nearly full: a smaller one may fit.
const TRIED: usize = 16;

impl SwapStore {
    /// Writes the oldest clusters while the tier is over its limit, and some while it is over half of that and the disk
    /// is idle.
    pub(super) fn write_back(&mut self) {
        let mut ahead = if self.books.sums.idle() { AHEAD } else { 0 };
        while self.books.sums.writes < WRITES && !self.disk_rests() {
            let dirty = self.books.sums.dirty;
            if dirty <= self.limits.tier {
                if ahead == 0 || dirty <= self.limits.tier / 2 {
                    break;
                }
                ahead -= 1;
            }
            let written = match self.write_oldest() {
                Some(pages) => pages,
                None => break,
            };
            if dirty <= self.limits.tier {
                self.counters.writeahead_pages += written;
            }
        }
    }

    /// After a failed write, the disk gets a rest; then one write shows how it does.
    fn disk_rests(&self) -> bool {
        let resting = |since: Instant| self.books.sums.writes > 0 || since.elapsed() < self.limits.rest;
        self.pool.is_none() || self.failing.is_some_and(resting)
    }

    /// Starts to write one of the oldest clusters; of how many pages? Nothing if there is none that fits.
    fn write_oldest(&mut self) -> Option<u64> {
        let oldest: Vec<usize> = self.books.dirty.values().take(TRIED).copied().collect();
        oldest.into_iter().find_map(|key| self.write(key))
    }

    fn write(&mut self, key: usize) -> Option<u64> {
        let cluster = &self.books[key];
        let ClusterState::Memory(packed) = &cluster.state else { unreachable!("cluster {key} is in memory only") };
        let live = cluster.live;
        let packed = match packed.live_bytes(live) {
            all if all == packed.bytes().len() => Arc::clone(packed),
            _ => Arc::new(packed.retain(live)),
        };
        if packed.is_zero() {
            self.books.turn(key, ClusterState::Zero);
            return Some(0);
        }
        let place = self.books.place(key, frame::blocks(&packed))?;
        let work = Work::Write(Arc::downgrade(&packed));
        self.books.turn(key, ClusterState::Writing { packed, place });
        self.submit(DiskJob { key, place, tag: self.tag(key), work });
        Some(live.count_ones().into())
    }

    /// A write is done.
    pub(super) fn written(&mut self, key: usize, result: io::Result<()>) {
        let ClusterState::Writing { packed, place } = &self.books[key].state else {
            return self.dropped(key);
        };
        let (packed, place) = (Arc::clone(packed), *place);
        match result {
            Ok(()) => {
                // Not one that began before the failure.
                if self.failing.take_if(|since| since.elapsed() >= self.limits.rest).is_some() {
                    log::warn!("swap: the disk takes writes again");
                }
                self.counters.swap_write_pages += u64::from(self.books[key].live.count_ones());
                let stamp = self.books.stamp();
                self.books.turn(key, ClusterState::Clean { packed, place, keep: Keep::Written, stamp });
            }
            Err(error) => {
                if self.failing.replace(Instant::now()).is_none() {
                    log::error!("{error}; what should have gone to the disk stays in memory");
                }
                self.books.turn(key, ClusterState::Memory(packed));
                self.books.release(key, place);
            }
        }
    }

    /// The last job of a cluster that nobody needs is done.
    pub(super) fn dropped(&mut self, key: usize) {
        match self.books[key].state {
            ClusterState::Dropped(_) => self.books.remove(key),
            ref state => unreachable!("a job of cluster {key} is done, which is {state:?}"),
        }
    }

    /// Lets go of the bytes of dead pages once they are half of a cluster in memory.
    pub(super) fn shrink(&mut self, key: usize) {
        let cluster = &self.books[key];
        if let ClusterState::Memory(packed) = &cluster.state {
            let live_bytes = packed.live_bytes(cluster.live);
            if live_bytes <= packed.bytes().len() / 2 {
                let packed: Packed = packed.retain(cluster.live);
                let state = if packed.is_zero() { ClusterState::Zero } else { ClusterState::Memory(Arc::new(packed)) };
                self.books.turn(key, state);
            }
        }
    }

    /// Tells an idle disk which blocks nobody needs, once they are many, or all.
    pub(super) fn discard(&mut self) {
        let stale = self.books.extents.stale_blocks();
        let many = stale >= self.limits.stale || (stale > 0 && self.books.placed.is_empty());
        let rests = self.pool.is_none() || self.failing.is_some() || !self.books.sums.idle();
        if !self.discards || !many || rests || self.books.discarding.is_some() {
            return;
        }
        if let Some(place) = self.books.take_stale(DISCARDED) {
            // They are no cluster's, and no frame.
            let tag = Tag { run: self.run, sequence: 0, slot: slot(0) };
            self.submit(DiskJob { key: usize::MAX, place, tag, work: Work::Discard });
        }
    }

    /// The disk knows which blocks nobody needs.
    pub(super) fn discarded(&mut self, result: io::Result<()>) {
        self.books.discarded();
        if let Err(error) = result {
            log::info!("swap: blocks that nobody needs are not discarded: {error}");
            self.discards = false;
        }
    }

    /// What a cluster's frame says of itself.
    pub(super) fn tag(&self, key: usize) -> Tag {
        Tag { run: self.run, sequence: self.books[key].sequence, slot: slot(key) }
    }

    pub(super) fn submit(&self, job: DiskJob) {
        self.pool.as_ref().expect("only with a disk are there jobs").submit(job);
    }
}
