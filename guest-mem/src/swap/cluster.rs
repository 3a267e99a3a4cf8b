//! What is known of a cluster.

use super::extents::DiskExtent;
use super::packed::Packed;
use crate::addr::PageCount;
use crate::ids::SwapSlot;
use std::io;
use std::sync::Arc;

/// The pages of one put.
#[derive(Debug)]
pub struct Cluster {
    /// The put's number: the order of eviction.
    pub sequence: u64,
    /// A bit for each page whose slot is in use.
    pub live: u16,
    /// Where its bytes are. Changed by the [books](super::books::Books) alone.
    pub state: ClusterState,
}

/// Where a cluster's bytes are.
#[derive(Debug)]
pub enum ClusterState {
    /// Nowhere: all live pages are zeros.
    Zero,
    /// In memory, and not on the disk.
    Memory(Arc<Packed>),
    /// In memory, and on their way to the disk.
    Writing {
        /// The bytes.
        packed: Arc<Packed>,
        /// Where they go.
        place: DiskExtent,
    },
    /// On the disk and in memory.
    Clean {
        /// The bytes.
        packed: Arc<Packed>,
        /// Where they are on the disk.
        place: DiskExtent,
        /// Why they are kept in memory.
        keep: Keep,
        /// When they were last of use.
        stamp: u64,
    },
    /// On the disk.
    Disk(DiskExtent),
    /// On the disk, and being read.
    Reading {
        /// Where they are.
        place: DiskExtent,
        /// Why.
        keep: Keep,
    },
    /// They could not be read.
    Lost {
        /// Where they were.
        place: DiskExtent,
        /// What `get` answers.
        loss: ClusterLoss,
    },
    /// Nobody needs them, but a read or a write still has their place.
    Dropped(DiskExtent),
}

/// Why there is a copy in memory of what is on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// It has just been written.
    Written,
    /// It was read ahead, and nobody has asked for it yet.
    Ahead,
    /// It was read ahead for somebody who is about to come for it.
    Expected,
    /// It was asked for.
    Asked,
    /// Somebody waits for it, or was told to come for it and has not yet.
    Wanted,
}

/// Which limit holds for a copy, in the order in which copies go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// The tier's.
    Written,
    /// The read cache's.
    Read,
    /// So many clusters.
    Wanted,
}

/// How bytes got lost: what an [`io::Error`] says, which cannot be cloned.
#[derive(Clone, Debug)]
pub struct ClusterLoss {
    kind: io::ErrorKind,
    message: Arc<str>,
}

impl Cluster {
    /// Whether `count` pages from `first` are all in use.
    pub fn has(&self, first: u64, count: PageCount) -> bool {
        let bits = bits(first, count);
        bits != 0 && self.live & bits == bits
    }
}

/// The bits of `count` pages from `first` in [`Cluster::live`]; none if these are not pages of a cluster.
pub fn bits(first: u64, count: PageCount) -> u16 {
    match first.checked_add(count.0) {
        Some(end) if end <= super::CLUSTER.0 => (((1_u32 << count.0) - 1) << first) as u16,
        _ => 0,
    }
}

/// The first slot of the cluster with this key.
pub fn slot(key: usize) -> SwapSlot {
    SwapSlot(key as u64 * super::CLUSTER.0)
}

impl ClusterState {
    /// The blocks that are taken for it.
    pub fn place(&self) -> Option<DiskExtent> {
        match self {
            Self::Zero | Self::Memory(_) => None,
            Self::Writing { place, .. }
            | Self::Clean { place, .. }
            | Self::Disk(place)
            | Self::Reading { place, .. }
            | Self::Lost { place, .. }
            | Self::Dropped(place) => Some(*place),
        }
    }
}

impl Keep {
    /// The limit that holds.
    pub fn class(self) -> Class {
        match self {
            Self::Written => Class::Written,
            Self::Ahead | Self::Asked => Class::Read,
            Self::Expected | Self::Wanted => Class::Wanted,
        }
    }

    /// Whether nobody has asked for it yet: where it cannot be read, nothing is lost so far.
    pub fn is_ahead(self) -> bool {
        matches!(self, Self::Ahead | Self::Expected)
    }
}

impl ClusterLoss {
    /// The error once more.
    pub fn error(&self) -> io::Error {
        io::Error::new(self.kind, &*self.message)
    }
}

impl From<io::Error> for ClusterLoss {
    fn from(error: io::Error) -> Self {
        Self { kind: error.kind(), message: error.to_string().into() }
    }
}
