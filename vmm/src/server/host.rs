//! What a server knows of its host, once and for all, and asks of it.

use crate::host::latency::{LEASE, WakeLatency};
use crate::wire::{HostFeatures, Isolation};
use std::path::PathBuf;
use std::time::Instant;

/// What VM processes are told of the host, and what is asked of it for their sake.
#[derive(Debug)]
pub struct HostFacts {
    pub features: HostFeatures,
    /// What VM processes run with.
    pub niceness: i32,
    /// How they are kept apart.
    pub isolation: Isolation,
    /// The empty directory that is their root.
    pub cage: PathBuf,
    /// Mappings a window may have: a quarter of what the kernel allows a process.
    pub max_runs: u32,
    /// What idle processors do during forks.
    pub latency: WakeLatency,
}

impl HostFacts {
    /// A fork begins: idle processors are to take its work up soon.
    pub fn fork_begins(&mut self, now: Instant) {
        self.latency.lease(now + LEASE);
    }
}
