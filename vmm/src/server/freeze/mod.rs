//! Freezes: what is done as one goes on, whoever wants it.
//!
//! What a VM process says of a freeze goes to the VM's [queue](queue::FreezeQueue), which has the freeze as a
//! [value](op::FreezeOp) and answers what is to be done.

pub mod op;
pub mod queue;
#[cfg(test)]
mod tests;

use crate::machine::state::PackedState;
use crate::wire::Frozen;
use guest_mem::StoreId;
use op::{FreezeEvent, Rest};

/// What a VM process says of a freeze.
#[derive(Debug)]
pub enum Said {
    /// Its vCPUs stand.
    Standing,
    /// What was taken.
    Frozen(Box<Frozen>),
    /// How the machine stood.
    Saved { store: StoreId, state: PackedState, still: bool },
    /// What stayed has been copied.
    Copied { store: StoreId },
    /// The guest runs again.
    WentOn { store: StoreId, pause_ns: u64 },
    /// There is no freeze.
    Failed(String),
}

impl Said {
    /// What it is, and of which freeze, where that is said.
    pub fn event(&self) -> (Option<StoreId>, FreezeEvent) {
        match self {
            Self::Standing => (None, FreezeEvent::Standing),
            Self::Frozen(frozen) => (Some(frozen.store), FreezeEvent::Frozen(Rest::of(frozen))),
            Self::Saved { store, .. } => (Some(*store), FreezeEvent::Saved),
            Self::Copied { store } => (Some(*store), FreezeEvent::Copied),
            Self::WentOn { store, .. } => (Some(*store), FreezeEvent::WentOn),
            Self::Failed(_) => (None, FreezeEvent::Failed),
        }
    }
}
