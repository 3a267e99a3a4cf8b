//! The registers of a virtio device over MMIO (version 2 of them), the same for every device.

use super::device::{Device, Memory};
use super::state::{QueueState, State};
use crate::devices::interrupt::Interrupt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use virtio_queue::{Queue, QueueT};

/// A device with its registers and queues.
#[derive(Debug)]
pub struct Transport {
    device: Box<dyn Device>,
    interrupt: Arc<dyn Interrupt>,
    memory: Memory,
    queues: Vec<Queue>,
    status: u32,
    interrupts: Arc<AtomicU32>,
    features_select: u32,
    accepted_select: u32,
    accepted: u64,
    queue_select: u32,
}

/// Tells a guest that a device's configuration space has changed.
#[derive(Clone, Debug)]
pub struct ConfigChange {
    interrupts: Arc<AtomicU32>,
    interrupt: Arc<dyn Interrupt>,
}

impl ConfigChange {
    /// It has just done so.
    pub fn announce(&self) {
        self.interrupts.fetch_or(CONFIG_CHANGED, Ordering::Relaxed);
        self.interrupt.pulse();
    }
}

/// Offsets of the registers.
mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const FEATURES: u64 = 0x10;
    pub const FEATURES_SELECT: u64 = 0x14;
    pub const ACCEPTED: u64 = 0x20;
    pub const ACCEPTED_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const DESCRIPTORS_LOW: u64 = 0x80;
    pub const DESCRIPTORS_HIGH: u64 = 0x84;
    pub const AVAILABLE_LOW: u64 = 0x90;
    pub const AVAILABLE_HIGH: u64 = 0x94;
    pub const USED_LOW: u64 = 0xa0;
    pub const USED_HIGH: u64 = 0xa4;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the device status.
mod status {
    pub const FEATURES_OK: u32 = 8;
    pub const DRIVER_OK: u32 = 4;
    pub const NEEDS_RESET: u32 = 64;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"OFFS");
/// The device follows version 1 of the specification.
const VERSION_1: u64 = 1 << 32;
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGED: u32 = 2;

impl Transport {
    /// A device that has just been reset.
    pub fn new(device: Box<dyn Device>, interrupt: Arc<dyn Interrupt>, memory: Memory) -> Self {
        let queues = fresh_queues(&*device);
        Self {
            device,
            interrupt,
            memory,
            queues,
            status: 0,
            interrupts: Arc::default(),
            features_select: 0,
            accepted_select: 0,
            accepted: 0,
            queue_select: 0,
        }
    }

    /// How to tell the guest of a new configuration without the transport, which a vCPU may have.
    pub fn config_change(&self) -> ConfigChange {
        ConfigChange { interrupts: Arc::clone(&self.interrupts), interrupt: Arc::clone(&self.interrupt) }
    }

    /// The guest reads at `offset`. Registers are read in words of 4 bytes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= register::CONFIG {
            return self.device.read_config(offset - register::CONFIG, data);
        }
        data.fill(0);
        if data.len() == size_of::<u32>() {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.id(),
            register::VENDOR_ID => VENDOR,
            register::FEATURES => half(self.offered(), self.features_select),
            register::QUEUE_SIZE_MAX => queue.map_or(0, |queue| queue.max_size().into()),
            register::QUEUE_READY => queue.is_some_and(Queue::ready).into(),
            register::INTERRUPT_STATUS => self.interrupts.load(Ordering::Relaxed),
            register::STATUS => self.status,
            register::CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    /// The guest writes at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= register::CONFIG {
            return self.device.write_config(offset - register::CONFIG, data);
        }
        if let Ok(word) = data.try_into() {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::FEATURES_SELECT => self.features_select = value,
            register::ACCEPTED_SELECT => self.accepted_select = value,
            register::ACCEPTED if self.status & status::FEATURES_OK == 0 => {
                let (value, mask) = (u64::from(value), u64::from(u32::MAX));
                match self.accepted_select {
                    0 => self.accepted = self.accepted & !mask | value,
                    1 => self.accepted = self.accepted & mask | value << 32,
                    _ => {}
                }
            }
            register::QUEUE_SELECT => self.queue_select = value,
            register::QUEUE_NOTIFY => self.notified(value as usize),
            register::INTERRUPT_ACK => drop(self.interrupts.fetch_and(!value, Ordering::Relaxed)),
            register::STATUS => self.set_status(value),
            _ => self.write_queue(offset, value),
        }
    }

    /// The registers of the selected queue, which stay as they are once it is in use.
    fn write_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        if offset == register::QUEUE_READY {
            return queue.set_ready(value == 1);
        }
        if queue.ready() {
            return;
        }
        match offset {
            // What is no size, or no address, leaves the queue as it is, and that is found out when it is used.
            register::QUEUE_SIZE => queue.set_size(value.try_into().unwrap_or(0)),
            register::DESCRIPTORS_LOW => queue.set_desc_table_address(Some(value), None),
            register::DESCRIPTORS_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::AVAILABLE_LOW => queue.set_avail_ring_address(Some(value), None),
            register::AVAILABLE_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::USED_LOW => queue.set_used_ring_address(Some(value), None),
            register::USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let mut value = value | self.status & status::NEEDS_RESET;
        if self.accepted & !self.offered() != 0 || self.accepted & VERSION_1 == 0 {
            // The guest sees that these features are not to be had so.
            value &= !status::FEATURES_OK;
        }
        let before = std::mem::replace(&mut self.status, value);
        if value & !before & status::FEATURES_OK != 0 {
            self.device.agreed(self.accepted & !VERSION_1);
        }
        if value & !before & status::DRIVER_OK != 0 {
            // Drivers offer buffers before they say this, Linux's balloon for one, and do not tell of them again.
            (0..self.queues.len()).for_each(|index| self.notified(index));
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues = fresh_queues(&*self.device);
        (self.status, self.accepted) = (0, 0);
        self.interrupts.store(0, Ordering::Relaxed);
        (self.features_select, self.accepted_select, self.queue_select) = (0, 0, 0);
    }

    fn notified(&mut self, index: usize) {
        if self.status & (status::DRIVER_OK | status::NEEDS_RESET) != status::DRIVER_OK {
            return;
        }
        let Some(queue) = self.queues.get(index).filter(|queue| queue.ready()) else { return };
        let done = match queue.is_valid(&self.memory) {
            true => self.device.notified(index, &mut self.queues, &self.memory),
            false => Err(super::Broken),
        };
        self.tell(done);
    }

    /// Has the device do what the machine asked it for.
    pub fn attend(&mut self) {
        if self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK {
            let done = self.device.attend(&mut self.queues, &self.memory);
            self.tell(done);
        }
    }

    /// Tells the guest what was done, if it wants to know.
    fn tell(&mut self, done: Result<bool, super::Broken>) {
        match done {
            Ok(false) => {}
            Ok(true) => self.interrupt(USED_BUFFER),
            Err(super::Broken) => {
                log::debug!("virtio device {}: a queue makes no sense", self.device.id());
                self.status |= status::NEEDS_RESET;
                self.interrupt(CONFIG_CHANGED);
            }
        }
    }

    fn interrupt(&mut self, cause: u32) {
        self.interrupts.fetch_or(cause, Ordering::Relaxed);
        self.interrupt.pulse();
    }

    fn offered(&self) -> u64 {
        self.device.features() | VERSION_1
    }

    /// The device as the guest sees it.
    pub fn save(&self) -> State {
        let queue = |queue: &Queue| QueueState {
            size: queue.size(),
            ready: queue.ready(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
        };
        State {
            status: self.status,
            interrupts: self.interrupts.load(Ordering::Relaxed),
            features_select: self.features_select,
            accepted_select: self.accepted_select,
            accepted: self.accepted,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(queue).collect(),
            device: self.device.save(),
        }
    }

    /// Becomes the saved device.
    ///
    /// # Errors
    /// It was another one.
    pub fn load(&mut self, state: &State) -> Result<(), String> {
        let id = self.device.id();
        if state.queues.len() != self.queues.len() {
            return Err(format!("virtio device {id}: {} queues, not {}", state.queues.len(), self.queues.len()));
        }
        self.device.load(&state.device).map_err(|why| format!("virtio device {id}: {why}"))?;
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
            queue.set_size(saved.size);
            let (low, high) = halves(saved.descriptors);
            queue.set_desc_table_address(low, high);
            let (low, high) = halves(saved.available);
            queue.set_avail_ring_address(low, high);
            let (low, high) = halves(saved.used);
            queue.set_used_ring_address(low, high);
            queue.set_next_avail(saved.next_available);
            queue.set_next_used(saved.next_used);
            queue.set_ready(saved.ready);
        }
        self.status = state.status;
        if state.status & status::FEATURES_OK != 0 {
            self.device.agreed(state.accepted & !VERSION_1);
        }
        self.interrupts.store(state.interrupts, Ordering::Relaxed);
        (self.features_select, self.accepted_select) = (state.features_select, state.accepted_select);
        (self.accepted, self.queue_select) = (state.accepted, state.queue_select);
        Ok(())
    }
}

fn fresh_queues(device: &dyn Device) -> Vec<Queue> {
    let queue = |&size: &u16| Queue::new(size).expect("a device's queues have sizes that queues can have");
    device.queue_sizes().iter().map(queue).collect()
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
