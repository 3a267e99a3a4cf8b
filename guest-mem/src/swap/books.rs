//! All clusters, and what can be told of them together.

use super::cluster::{Class, Cluster, ClusterState, bits};
use super::extents::{DiskExtent, Extents};
use super::packed::Packed;
use crate::addr::PageCount;
use crate::addr::cluster::CLUSTER;
use crate::ids::SwapSlot;
use slab::Slab;
use std::collections::BTreeMap;
use std::ops::Index;
use std::sync::Arc;

/// The clusters, in their states, and the queues and sums that follow from the states: every change of a state goes
/// through [`turn`](Self::turn), which keeps them right. Knows no threads and no limits.
#[derive(Debug)]
pub struct Books {
    pub(super) clusters: Slab<Cluster>,
    /// Clusters in memory only, by sequence.
    pub(super) dirty: BTreeMap<u64, usize>,
    /// Clean copies, in the order in which they go.
    pub(super) clean: BTreeMap<(Class, u64), usize>,
    /// Who has which blocks, by the first.
    pub(super) placed: BTreeMap<u64, usize>,
    pub(super) extents: Extents,
    /// Free blocks that the disk is just told of.
    pub(super) discarding: Option<DiskExtent>,
    pub(super) sums: Sums,
    stamp: u64,
}

/// Sums over the clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Slots in use.
    pub slots: u64,
    /// Bytes in memory only.
    pub dirty: u64,
    /// Bytes on their way out.
    pub writing: u64,
    /// Bytes of copies of what has been written.
    pub written: u64,
    /// Bytes of copies of what has been read.
    pub read: u64,
    /// Bytes of copies that somebody is expected to come for.
    pub wanted: u64,
    /// How many clusters the latter are.
    pub wanted_clusters: u64,
    /// Clusters on their way out.
    pub writes: u64,
    /// Clusters on their way in.
    pub reads: u64,
    /// Clusters that nobody needs, with a job that is not done.
    pub dropped: u64,
}

impl Sums {
    /// Bytes in memory.
    pub fn memory(&self) -> u64 {
        self.dirty + self.writing + self.written + self.read + self.wanted
    }

    /// Whether no job is under way.
    pub fn idle(&self) -> bool {
        self.writes + self.reads + self.dropped == 0
    }

    fn add(&mut self, cluster: &Cluster) {
        self.apply(cluster, |sum, number| *sum += number);
    }

    fn subtract(&mut self, cluster: &Cluster) {
        self.apply(cluster, |sum, number| *sum -= number);
    }

    fn apply(&mut self, cluster: &Cluster, change: impl Fn(&mut u64, u64)) {
        change(&mut self.slots, cluster.live.count_ones().into());
        match &cluster.state {
            ClusterState::Zero | ClusterState::Disk(_) | ClusterState::Lost { .. } => {}
            ClusterState::Memory(packed) => change(&mut self.dirty, packed.footprint()),
            ClusterState::Writing { packed, .. } => {
                change(&mut self.writing, packed.footprint());
                change(&mut self.writes, 1);
            }
            ClusterState::Clean { packed, keep, .. } => match keep.class() {
                Class::Written => change(&mut self.written, packed.footprint()),
                Class::Read => change(&mut self.read, packed.footprint()),
                Class::Wanted => {
                    change(&mut self.wanted, packed.footprint());
                    change(&mut self.wanted_clusters, 1);
                }
            },
            ClusterState::Reading { .. } => change(&mut self.reads, 1),
            ClusterState::Dropped(_) => change(&mut self.dropped, 1),
        }
    }

    /// Made anew, to compare with.
    pub(super) fn of<'a>(clusters: impl Iterator<Item = &'a Cluster>) -> Self {
        let mut sums = Self::default();
        clusters.for_each(|cluster| sums.add(cluster));
        sums
    }
}

impl Books {
    /// No clusters, and a disk of `blocks` blocks.
    pub fn new(blocks: u64) -> Self {
        Self {
            clusters: Slab::new(),
            dirty: BTreeMap::new(),
            clean: BTreeMap::new(),
            placed: BTreeMap::new(),
            extents: Extents::new(blocks),
            discarding: None,
            sums: Sums::default(),
            stamp: 0,
        }
    }

    /// A new cluster of `count` pages, and its key.
    pub fn insert(&mut self, sequence: u64, count: PageCount, packed: Packed) -> usize {
        let state = if packed.is_zero() { ClusterState::Zero } else { ClusterState::Memory(Arc::new(packed)) };
        let key = self.clusters.insert(Cluster { sequence, live: bits(0, count), state });
        self.link(key);
        key
    }

    /// The cluster that has these slots in use, and which of its pages the first is.
    pub fn find(&self, first: SwapSlot, count: PageCount) -> Option<(usize, u64)> {
        let (key, page) = (first.0 / CLUSTER.0, first.0 % CLUSTER.0);
        let key = usize::try_from(key).ok()?;
        self.clusters.get(key).is_some_and(|cluster| cluster.has(page, count)).then_some((key, page))
    }

    /// Changes a cluster's state. Its blocks must be the same before and after: see [`place`](Self::place) and
    /// [`release`](Self::release).
    pub fn turn(&mut self, key: usize, state: ClusterState) {
        self.unlink(key);
        self.clusters[key].state = state;
        self.link(key);
    }

    /// Marks slots of a cluster as not in use; which are left?
    pub fn kill(&mut self, key: usize, dead: u16) -> u16 {
        self.sums.subtract(&self.clusters[key]);
        self.clusters[key].live &= !dead;
        self.sums.add(&self.clusters[key]);
        self.clusters[key].live
    }

    /// Forgets a cluster, whose blocks are free then.
    pub fn remove(&mut self, key: usize) {
        self.unlink(key);
        let cluster = self.clusters.remove(key);
        if let Some(place) = cluster.state.place() {
            self.release(key, place);
        }
    }

    /// Blocks for a cluster that has none.
    pub fn place(&mut self, key: usize, blocks: u64) -> Option<DiskExtent> {
        let place = self.extents.allocate(blocks)?;
        self.placed.insert(place.start, key);
        Some(place)
    }

    /// Frees a cluster's blocks.
    pub fn release(&mut self, key: usize, place: DiskExtent) {
        let holder = self.placed.remove(&place.start);
        assert_eq!(holder, Some(key), "blocks {place:?} are another cluster's");
        self.extents.release(place);
    }

    /// Free blocks that hold what nobody needs, at most so many: nobody gets them until they are
    /// [discarded](Self::discarded).
    pub fn take_stale(&mut self, most: u64) -> Option<DiskExtent> {
        assert_eq!(self.discarding, None, "one discard at a time");
        self.discarding = self.extents.take_stale(most);
        self.discarding
    }

    /// The disk has been told.
    pub fn discarded(&mut self) {
        let place = self.discarding.take().expect("a discard is under way");
        self.extents.release_discarded(place);
    }

    /// Blocks that no cluster has.
    pub fn free_blocks(&self) -> u64 {
        self.extents.free_blocks() + self.discarding.map_or(0, |place| place.blocks)
    }

    /// A number above all it gave before.
    pub fn stamp(&mut self) -> u64 {
        self.stamp += 1;
        self.stamp
    }

    /// The first of the copies of this class to go.
    pub fn coldest(&self, class: Class) -> Option<usize> {
        let next = self.clean.range((class, 0)..).next()?;
        (next.0.0 == class).then_some(*next.1)
    }

    fn link(&mut self, key: usize) {
        let cluster = &self.clusters[key];
        self.sums.add(cluster);
        match &cluster.state {
            ClusterState::Memory(_) => assert_eq!(self.dirty.insert(cluster.sequence, key), None),
            ClusterState::Clean { keep, stamp, .. } => assert_eq!(self.clean.insert((keep.class(), *stamp), key), None),
            _ => {}
        }
    }

    fn unlink(&mut self, key: usize) {
        let cluster = &self.clusters[key];
        self.sums.subtract(cluster);
        match &cluster.state {
            ClusterState::Memory(_) => assert_eq!(self.dirty.remove(&cluster.sequence), Some(key)),
            ClusterState::Clean { keep, stamp, .. } => {
                assert_eq!(self.clean.remove(&(keep.class(), *stamp)), Some(key))
            }
            _ => {}
        }
    }
}

impl Index<usize> for Books {
    type Output = Cluster;

    fn index(&self, key: usize) -> &Cluster {
        &self.clusters[key]
    }
}
