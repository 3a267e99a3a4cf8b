//! Random numbers: one queue, whose buffers are filled from the host's.

use super::device::{Broken, Device, Memory};
use guest_mem::sys::Written;
use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

/// Most bytes for one request: a guest that asks for more takes the rest later.
const REQUEST_MAX: u32 = 4096;
const QUEUE_SIZE: u16 = 64;
const ID: u32 = 4;

/// The device. It has no state: whatever is left in its queue after a fork, each side fills by itself, differently.
#[derive(Debug)]
pub struct Rng {
    source: File,
}

impl Rng {
    /// Random numbers from `source`, which never ends and never waits (`/dev/urandom`).
    pub fn new(source: File) -> Self {
        Self { source }
    }

    /// Fills the buffers of one request. How many bytes that were.
    fn fill<M>(
        &mut self,
        chain: virtio_queue::DescriptorChain<M>,
        memory: &GuestMemoryMmap<Written>,
    ) -> Result<u32, Broken>
    where
        M: Deref<Target = GuestMemoryMmap<Written>> + Clone,
    {
        let mut done = 0;
        for buffer in chain.writable() {
            let len = buffer.len().min(REQUEST_MAX - done);
            let mut bytes = vec![0; len as usize];
            self.source.read_exact(&mut bytes).map_err(|error| {
                log::error!("read random numbers: {error}");
                Broken
            })?;
            memory.write_slice(&bytes, buffer.addr()).map_err(|_| Broken)?;
            done += len;
        }
        Ok(done)
    }
}

impl Device for Rng {
    fn id(&self) -> u32 {
        ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn notified(&mut self, index: usize, queues: &mut [Queue], memory: &Memory) -> Result<bool, Broken> {
        let queue = &mut queues[index];
        let mut used = false;
        // Not more than there can be: a guest that goes on adding does not keep us here.
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop_descriptor_chain(memory) else { break };
            let head = chain.head_index();
            let done = self.fill(chain, memory)?;
            queue.add_used(memory, head, done).map_err(|_| Broken)?;
            used = true;
        }
        Ok(used && queue.needs_notification(memory).map_err(|_| Broken)?)
    }
}
