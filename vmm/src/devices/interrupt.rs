//! How a device gets the guest's attention.

use std::fmt::Debug;

/// An interrupt line of one device, edge-triggered.
pub trait Interrupt: Debug + Send + Sync {
    /// Raises it, and lowers it again.
    fn pulse(&self);
}

/// The interrupt of a device whose guest asks by itself.
#[derive(Clone, Copy, Debug)]
pub struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn pulse(&self) {}
}
