//! The least of a VMM that runs the built-in guest: what the references are made of. It shares nothing with Offshoot's own
//! but the guest image and the registers it starts with.

pub mod memory;
pub mod snapshot;
pub mod uffd;
pub mod vm;

pub use memory::{MemoryFile, Window};
pub use snapshot::Snapshot;
pub use vm::{Platform, Vm};

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// `CLOCK_MONOTONIC` in nanoseconds: the same for all processes.
pub fn now_ns() -> u64 {
    vmm::clock::monotonic_ns()
}
