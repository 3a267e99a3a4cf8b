//! Virtio devices over MMIO, after version 1.2 of the specification.
//!
//! | file | has |
//! | --- | --- |
//! | `mmio` | the registers: one transport for every device |
//! | `device` | what a device is to the transport |
//! | `state` | a transport and its queues as plain data |
//! | `rng`, `balloon`, `vsock` | the devices |
//! | `hint` | the part of the balloon's protocol that is about free pages at a fork |
//!
//! Whoever accesses a register carries out what that asks for, queues included, before the access is over; what the machine
//! asks for, a vCPU's thread carries out between two runs. So a device does nothing while the vCPUs stand still, and is saved
//! whole. It may touch guest memory in any access: no lock is
//! held then that somebody who must not wait could want.
//!
//! A guest that breaks the rules of a ring gets a device that needs a reset (`DEVICE_NEEDS_RESET`), and nothing else.

mod balloon;
#[cfg(test)]
mod balloon_tests;
mod device;
mod hint;
mod mmio;
mod rng;
mod state;
#[cfg(test)]
mod tests;
mod vsock;

pub use balloon::{Balloon, Requests, Sink};
pub use device::{Broken, Device};
pub use mmio::{ConfigChange, Transport};
pub use rng::Rng;
pub use state::{QueueState, State};
pub use vsock::{Child, Host, Noticed, Outcome, Outside, Pair, Vsock, Wanted};

/// Kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Random numbers.
    Rng,
    /// Memory that the guest gives back.
    Balloon,
    /// Streams between the guest and the host.
    Vsock,
}

/// The devices of every Linux guest, in the order of their addresses.
pub const DEVICES: &[Kind] = &[Kind::Rng, Kind::Balloon, Kind::Vsock];
