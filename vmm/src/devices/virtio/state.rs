//! A device that stands still, as plain data.

use serde::{Deserialize, Serialize};

/// A device's registers and queues, and what it holds besides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Device status, as the guest and the device have set it.
    pub status: u32,
    /// Pending causes of an interrupt.
    pub interrupts: u32,
    /// Which half of the offered features is shown.
    pub features_select: u32,
    /// Which half of the accepted features is written.
    pub accepted_select: u32,
    /// The accepted features.
    pub accepted: u64,
    /// The queue that the queue registers show.
    pub queue_select: u32,
    /// The queues.
    pub queues: Vec<QueueState>,
    /// What the device says of itself.
    pub device: Vec<u8>,
}

/// A queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Its length.
    pub size: u16,
    /// Whether the guest has set it up.
    pub ready: bool,
    /// Address of its descriptors.
    pub descriptors: u64,
    /// Address of the ring of what is available.
    pub available: u64,
    /// Address of the ring of what was used.
    pub used: u64,
    /// Next entry of the ring of what is available.
    pub next_available: u16,
    /// Next entry of the ring of what was used.
    pub next_used: u16,
}
