//! What a vCPU's accesses to the devices' memory do.

use super::linux::VirtioDevices;
use crate::devices::virtio::Transport;
use crate::layout::devices::{VIRTIO, VIRTIO_SIZE};
use std::sync::{Arc, MutexGuard, PoisonError};

/// The devices' memory, as the vCPUs see it.
#[derive(Clone, Debug)]
pub(super) struct Mmio {
    virtio: Arc<VirtioDevices>,
}

impl Mmio {
    /// The memory of these devices.
    pub fn new(virtio: Arc<VirtioDevices>) -> Self {
        Self { virtio }
    }

    /// A vCPU reads. Where nothing is, it reads all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, data),
            None => {
                log::debug!("{} bytes read from {address:#x}, where nothing is", data.len());
                data.fill(0xff);
            }
        }
    }

    /// A vCPU writes.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address) {
            Some((mut device, offset)) => device.write(offset, data),
            None => log::debug!("{} bytes written to {address:#x}, where nothing is", data.len()),
        }
    }

    /// Has the devices do what the machine asked them for.
    pub fn attend(&self) {
        self.virtio.0.iter().for_each(|device| device.lock().unwrap_or_else(PoisonError::into_inner).attend());
    }

    /// The device at an address, for as long as the access takes: other vCPUs that want it wait.
    fn find(&self, address: u64) -> Option<(MutexGuard<'_, Transport>, u64)> {
        let offset = address.checked_sub(VIRTIO.into())?;
        let size = u64::from(VIRTIO_SIZE);
        let device = self.virtio.0.get(usize::try_from(offset / size).ok()?)?;
        Some((device.lock().unwrap_or_else(PoisonError::into_inner), offset % size))
    }
}
