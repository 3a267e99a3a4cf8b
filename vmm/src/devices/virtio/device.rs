//! What a device is to the transport.

use guest_mem::sys::Written;
use std::fmt::Debug;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

/// Guest memory; what is written is recorded.
pub type Memory = GuestMemoryMmap<Written>;

/// What the guest put into a queue makes no sense: the device stops until the guest resets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// A virtio device, without its registers and its queues, which the transport keeps.
pub trait Device: Debug + Send {
    /// Its device id in the specification.
    fn id(&self) -> u32;

    /// The features it offers, besides those of the transport.
    fn features(&self) -> u64 {
        0
    }

    /// The length of each of its queues, at most.
    fn queue_sizes(&self) -> &[u16];

    /// Reads its configuration space; what lies past the end of it reads as 0.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Writes its configuration space.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The guest says that there is something in queue `index`, which it has set up. Whether it wants to know what was done.
    ///
    /// # Errors
    /// A queue makes no sense.
    fn notified(&mut self, index: usize, queues: &mut [Queue], memory: &Memory) -> Result<bool, Broken>;

    /// The guest and it have agreed on these features, of those that it offers.
    fn agreed(&mut self, _features: u64) {}

    /// Does what the machine has asked for since, not the guest. Whether the guest wants to know what was done.
    ///
    /// # Errors
    /// A queue makes no sense.
    fn attend(&mut self, _queues: &mut [Queue], _memory: &Memory) -> Result<bool, Broken> {
        Ok(false)
    }

    /// The guest has reset it.
    fn reset(&mut self) {}

    /// What it holds besides its queues, for a fork.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Becomes what was saved.
    ///
    /// # Errors
    /// Why that cannot be.
    fn load(&mut self, saved: &[u8]) -> Result<(), String> {
        if saved.is_empty() { Ok(()) } else { Err("it has no state of its own".into()) }
    }
}
