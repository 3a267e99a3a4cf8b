//! Devices. No KVM types in here: a device is told of accesses and says what it wants done.

pub mod interrupt;
pub mod serial;
pub mod virtio;
